"""From the first start to the last command: what an operator sees, by the command line alone."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import running
from tests.running import CANARY_NAME, CANARY_USERNAME, Service, command, unique

COMMAND_SECONDS_MAX = 30


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TOKEN_LEDGER_")}
    return subprocess.run(
        [*command(), *arguments],
        cwd=running.ROOT,
        env={**clean, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS_MAX,
        check=False,
    )


def ask(service: Service, *arguments: str, expected: int = 0) -> Any:
    """The JSON that a command prints."""
    done = run(*arguments, "--data-dir", str(service.data_dir), "-o", "json")
    assert done.returncode == expected, f"{arguments}: {done.stdout}{done.stderr}"
    return json.loads(done.stdout) if done.stdout.strip() else None


def test_bootstrap_holds_what_the_contract_names(service: Service) -> None:
    path = service.data_dir / "bootstrap.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    bootstrap = json.loads(path.read_text())
    assert bootstrap.keys() == {"issuer", "api_url", "nats_url", "admin_token"}
    assert bootstrap["issuer"] == bootstrap["api_url"] == service.url
    assert bootstrap["nats_url"].startswith("nats://127.0.0.1:")
    assert bootstrap["admin_token"].startswith("tl_sat_")
    known = service.validate(bootstrap["admin_token"])
    assert (known["kind"], known["scope"]) == ("sat", "ledger:admin")


def test_readiness_says_what_it_checked(service: Service) -> None:
    answer = service.http.get("/health/ready")
    assert answer.status_code == 200
    body = answer.json()
    assert body["status"] == "ready" or body["status"] == "ok"
    assert body["checks"]
    assert service.http.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["--port", "0"], {}, "port"),
        ([], {"TOKEN_LEDGER_NO_SUCH_SETTING": "1"}, "TOKEN_LEDGER_NO_SUCH_SETTING"),
        ([], {"TOKEN_LEDGER_USE_RECORDING": "sometimes"}, "TOKEN_LEDGER_USE_RECORDING"),
        (["--issuer", "http://example.com"], {}, "issuer"),
        (["--replicas", "3"], {}, "replicas"),
    ],
    ids=["port", "unknown", "choice", "issuer", "replicas"],
)
def test_wrong_settings_refuse_the_start(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], named: str
) -> None:
    done = run("up", "--data-dir", str(tmp_path / "data"), *arguments, **environment)
    assert done.returncode == 2, done.stdout + done.stderr
    assert named in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_taken_port_is_said_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("up", "--data-dir", str(tmp_path / "data"), "--port", str(port))
    assert done.returncode == 1
    assert str(port) in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_stop_while_it_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    """The stop meets the workers in the middle of their own start."""
    mark = unique("mark")
    arguments = ["up", "--port", str(running.free_port()), "--data-dir", str(tmp_path / "data")]
    environment = {**os.environ, running.MARK: mark}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command(), *arguments], cwd=running.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        running.until(lambda: len(running.marked(mark)) >= 4, seconds=20, what="the processes are there")
        process.terminate()
        assert process.wait(running.STOP_SECONDS_MAX) == 0, (tmp_path / "log").read_text()
        assert running.marked(mark) == []
    finally:
        for left in running.marked(mark):
            left.kill()
        process.wait(5)


def test_second_service_on_the_same_directory_is_refused(service: Service) -> None:
    """Two nats-servers on one store would ruin it."""
    done = run("up", "--data-dir", str(service.data_dir), "--port", str(running.free_port()))
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert service.ready()


def test_strangers_path_by_the_command_line(service: Service) -> None:
    name, scope = unique(CANARY_USERNAME), unique("scope")
    ask(service, "scope", "create", scope, "--description", "to read orders")
    user = ask(service, "user", "create", name, "--scope", scope)
    issued = ask(
        service, "token", "issue", "--kind", "pat", "--subject", name, "--name", unique(CANARY_NAME), "--scope", scope
    )
    assert issued["subject"] == user["user_id"]
    seen = ask(service, "token", "validate", issued["token"], "--scope", scope)
    assert seen["code"] == "valid"
    ask(service, "token", "revoke", issued["token_id"], "--reason", "unused")
    seen = ask(service, "token", "validate", issued["token"], expected=1)
    assert seen["code"] == "revoked"
    history = ask(service, "token", "history", issued["token_id"], "--uses")
    assert [one["type"].partition("/")[0] for one in history["items"] if one["ledger_seq"]] == [
        "token.issued",
        "token.revoked",
    ]
    ask(service, "token", "show", "tok_" + "0" * 32, expected=1)


def test_doctor_finds_a_running_service_well(service: Service) -> None:
    service.forget_followers()
    done = run("doctor", "--data-dir", str(service.data_dir))
    assert done.returncode == 0, done.stdout + done.stderr


def test_lost_admin_token_is_replaced(service: Service) -> None:
    """Needs the data directory's NATS credentials and nothing else."""
    made = ask(service, "admin-token")
    token = made["token"] if "token" in made else made["admin_token"]
    assert service.call("GET", "/v1/clients", token=token, params={"limit": 1}).status_code == 200


def test_table_for_people_is_printed(service: Service) -> None:
    done = run("client", "list", "--data-dir", str(service.data_dir))
    assert done.returncode == 0
    assert "client_id" in done.stdout.lower().replace(" ", "_")


def test_rebuild_gives_the_same_again(tmp_path: Path) -> None:
    """Both projections are thrown away and replayed from the log; the service goes on from there."""
    first = running.start(tmp_path)
    made, gone = first.pat(), first.pat()
    first.done("POST", f"/v1/tokens/{gone['token_id']}/revoke", json={"reason": "admin"})
    first.code(made["token"])
    first.stop()
    for what in ("current", "analytics"):
        done = run("rebuild", what, "--data-dir", str(first.data_dir))
        assert done.returncode == 0, done.stdout + done.stderr
    second = running.start(tmp_path, port=first.port)
    try:
        assert second.code(made["token"]) == "valid"
        assert second.code(gone["token"]) == "revoked"
        events = running.until(lambda: second.history(gone["token_id"]))
        assert [one["type"].partition("/")[0] for one in events] == ["token.issued", "token.revoked"]
        uses = [one for one in second.history(made["token_id"], uses="true") if one["ledger_seq"] is None]
        assert len(uses) == 2
    finally:
        second.stop()


@pytest.mark.parametrize(
    "path",
    [
        *("/health/live", "/health/ready", "/metrics", "/oauth2/jwks", "/.well-known/openid-configuration"),
        "/.well-known/oauth-authorization-server",
    ],
)
def test_what_is_the_same_for_everybody_answers_head_as_get_without_a_body(service: Service, path: str) -> None:
    """RFC 9110 §9.3.2: what watches a service asks so."""
    told, asked = service.http.head(path), service.http.get(path)
    assert (told.status_code, told.content) == (200, b"")
    assert told.headers["content-type"] == asked.headers["content-type"]
    assert int(told.headers["content-length"]) > 0
    assert service.http.get(path).status_code == 200  # on the same connection: nothing was left on it
