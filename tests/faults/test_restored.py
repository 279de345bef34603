"""A service that was lost and is restored as the README says: from `master.key` and `nats`, and from nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from tests import running

KEPT = ("master.key", "nats")


def done(data_dir: Path, *words: str) -> str:
    """What a command prints."""
    ended = subprocess.run(
        [*running.command(), *words, "--data-dir", str(data_dir)],
        cwd=running.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def copy(source: Path, target: Path) -> None:
    for name in KEPT:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        else:
            shutil.copy2(source / name, target / name)


def test_service_is_restored_and_gives_no_key_the_id_of_one_that_is_known_outside(tmp_path: Path) -> None:
    service = running.start(tmp_path)
    data_dir, made = service.data_dir, service.pat()
    service.stop()
    kept = tmp_path / "kept"
    kept.mkdir()
    copy(data_dir, kept)
    service = running.start(tmp_path, port=service.port)
    known = service.done("POST", "/v1/keys/rotate", json={"now": True})["kid"]
    service.stop()
    shutil.rmtree(data_dir)
    data_dir.mkdir(mode=0o700)
    copy(kept, data_dir)

    admin = json.loads(done(data_dir, "admin-token", "-o", "json"))
    done(data_dir, "rebuild", "revocations")
    service = running.start(tmp_path, port=service.port)
    try:
        assert service.admin_token == admin["token"]
        assert service.code(made["token"]) == "valid"
        assert known not in {key["kid"] for key in service.done("GET", "/v1/keys")["items"]}
        again = service.done("POST", "/v1/keys/rotate", json={"now": True})["kid"]
        assert again != known
        assert again.rpartition("-")[0] == known.rpartition("-")[0]  # in the same place
    finally:
        service.stop()


def test_who_lost_the_address_file_of_a_running_service_gets_another_token(tmp_path: Path) -> None:
    service = running.start(tmp_path)
    try:
        (service.data_dir / "bootstrap.json").unlink()
        token = json.loads(done(service.data_dir, "admin-token", "-o", "json"))["token"]
        assert service.call("GET", "/v1/clients", token=token).status_code == 200
    finally:
        service.stop()
