"""`doctor`: what it finds and what it says to do. Requirement: issue "The CLI … doctor"."""

from __future__ import annotations

import json
import math
import secrets
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from events.server import EmbeddedServer
from events.streams import connect, provision
from projections.current import CurrentWriter, view_path
from service import doctor
from service.doctor import Finding
from service.keys import MasterKey, write_private
from service.settings import Settings
from service.streams import stream_limits
from tests import running

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def by_name(findings: list[Finding]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.name, []).append(finding)
    return found


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    tmp_path.chmod(0o700)
    return Settings.load({}, {"data_dir": tmp_path})


def _of_server(found: dict[str, list[Finding]]) -> list[Finding]:
    """Of the one server that reports, by its name."""
    (name,) = (name for name in found if name.startswith("nats-server embedded-"))
    return found[name]


async def examine(settings: Settings) -> dict[str, list[Finding]]:
    """Of the service of this data directory, and no other that the environment may name."""
    return by_name(await doctor.examine(settings, settings.data_dir, None))


@pytest_asyncio.fixture(loop_scope="session")
async def nats(settings: Settings) -> AsyncIterator[EmbeddedServer]:
    """A data directory whose nats-server runs, has its streams and stands in bootstrap.json; and no more."""
    server = EmbeddedServer(settings.data_dir, 0)
    await server.start()
    try:
        admin = await connect(server.url, server.creds("admin"), name="test")
        await provision(admin, stream_limits(settings))
        await admin.close()
        bootstrap = {
            "issuer": "http://127.0.0.1:1",
            "api_url": f"http://127.0.0.1:{running.free_port()}",
            "nats_url": server.url,
            "admin_token": "tl_sat_x",
        }
        write_private(settings.data_dir / "bootstrap.json", json.dumps(bootstrap).encode())
        MasterKey.load(None, settings.data_dir)
        yield server
    finally:
        await server.stop()


async def test_doctor_empty_directory_says_what_is_missing_and_how_to_start(settings: Settings) -> None:
    found = await examine(settings)
    assert found["bootstrap.json"][0].state == "warning"
    for name in ("master key", "API", "nats-server", "current-token view"):
        assert [finding.state for finding in found[name]] == ["problem"], name
    for name in ("bootstrap.json", "API", "nats-server", "current-token view"):
        assert "token-ledger up" in found[name][0].fix, name


async def test_doctor_missing_directory_is_a_problem(tmp_path: Path) -> None:
    found = await examine(Settings.load({}, {"data_dir": tmp_path / "none"}))
    assert found["data directory"][0].state == "problem"
    assert found["disk"][0].state == "ok"
    assert not (tmp_path / "none").exists()


async def test_doctor_api_down_and_server_up_says_so_of_each(settings: Settings, nats: EmbeddedServer) -> None:
    found = await examine(settings)
    assert found["API"][0].state == "problem"
    assert "no service answers at http://127.0.0.1:" in found["API"][0].found
    assert found["nats-server"] == [Finding("nats-server", "ok", f"{nats.url} accepts {nats.creds('service')}")]
    assert {finding.state for finding in _of_server(found)} == {"ok"}
    said = " ".join(finding.found for finding in _of_server(found))
    assert "version 2." in said
    assert "syncs before it acknowledges" in said
    assert "its clock agrees" in said
    assert found["streams"][0].state == "ok"
    assert found["LEDGER"][0].state == "ok"
    assert found["secret files"][0].state == "ok"
    assert found["master key"][0].state == "ok"


async def test_doctor_server_down_says_what_it_met(settings: Settings, nats: EmbeddedServer) -> None:
    await nats.stop()
    (finding,) = (await examine(settings))["nats-server"]
    assert finding.state == "problem"
    assert "Connect call failed" in finding.found


async def test_doctor_wrong_credentials_are_a_problem(settings: Settings, nats: EmbeddedServer) -> None:
    other = EmbeddedServer(settings.data_dir / "other", 0)
    await other.start()
    try:
        nats.creds("service").write_bytes(other.creds("service").read_bytes())
        found = (await examine(settings))["nats-server"]
    finally:
        await other.stop()
    assert found[0].state == "problem"
    assert "uthorization" in found[0].found


async def test_doctor_changed_stream_is_named_with_its_setting(settings: Settings, nats: EmbeddedServer) -> None:
    admin = await connect(nats.url, nats.creds("admin"), name="test")
    reply = await admin.request("$JS.API.STREAM.INFO.LEDGER", b"", timeout=5)
    config = json.loads(reply.data)["config"] | {"allow_direct": False}
    await admin.request("$JS.API.STREAM.UPDATE.LEDGER", json.dumps(config).encode(), timeout=5)
    await admin.close()
    (finding,) = (await examine(settings))["streams"]
    assert finding.state == "problem"
    assert "stream LEDGER: allow_direct is False and must be True" in finding.found
    assert "token-ledger provision" in finding.fix


async def test_doctor_server_that_does_not_sync_is_a_problem(settings: Settings, tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, 0)
    server.prepare()
    config = json.loads(server.config_file.read_text())
    del config["jetstream"]["sync_interval"]
    server.config_file.write_text(json.dumps(config))
    await server.start()
    try:
        bootstrap = {"issuer": "x", "api_url": "http://127.0.0.1:1", "nats_url": server.url, "admin_token": "x"}
        write_private(tmp_path / "bootstrap.json", json.dumps(bootstrap).encode())
        found = await examine(settings)
    finally:
        await server.stop()
    (finding,) = [one for one in _of_server(found) if "sync_interval" in one.found]
    assert finding.state == "problem"
    assert "sync_interval: always" in finding.fix


async def test_doctor_view_that_nobody_confirms_is_a_problem(settings: Settings, nats: EmbeddedServer) -> None:
    CurrentWriter(view_path(settings.data_dir)).close()
    (finding,) = (await examine(settings))["current-token view"]
    assert finding.state == "problem"
    assert "at 0 of 0" in finding.found
    assert "token-ledger project current" in finding.fix


@pytest.mark.parametrize("name", ["bootstrap.json", "master.key", "nats/service.nk"])
async def test_doctor_secret_that_others_may_read_is_a_problem(
    settings: Settings, nats: EmbeddedServer, name: str
) -> None:
    (settings.data_dir / name).chmod(0o640)
    (finding,) = (await examine(settings))["secret files"]
    assert finding.state == "problem"
    assert finding.fix == f"chmod 600 {settings.data_dir / name}"


async def test_doctor_directory_that_others_may_write_is_a_problem(settings: Settings) -> None:
    settings.data_dir.chmod(0o777)
    (finding,) = (await examine(settings))["data directory"]
    assert finding.state == "problem"
    assert finding.fix == f"chmod 700 {settings.data_dir}"


@pytest.mark.parametrize("content", [b"", b"not base64!", secrets.token_bytes(7)], ids=["empty", "text", "bytes"])
async def test_doctor_damaged_master_key_is_a_problem(settings: Settings, content: bytes) -> None:
    write_private(settings.data_dir / "master.key", content)
    (finding,) = (await examine(settings))["master key"]
    assert finding.state == "problem"
    assert "backup" in finding.fix


async def test_doctor_damaged_analytics_file_that_was_set_aside_is_a_warning(settings: Settings) -> None:
    directory = settings.data_dir / "analytics"
    directory.mkdir(parents=True)
    for name in ("duckdb", "duckdb.replaced-1", "duckdb.corrupt-2", "duckdb.corrupt-2.wal"):
        (directory / f"analytics-2.{name}").touch()
    [finding] = (await examine(settings))["analytics store"]
    assert (finding.state, finding.found.split()[-1]) == ("warning", str(directory / "analytics-2.duckdb.corrupt-2"))
    assert "look at the disk" in finding.fix


async def test_doctor_issuer_that_others_cannot_reach_is_a_warning(settings: Settings) -> None:
    assert "issuer" not in await examine(settings)
    open_to_all = Settings.load({}, {"data_dir": settings.data_dir, "host": "0.0.0.0"})
    (finding,) = (await examine(open_to_all))["issuer"]
    assert finding.state == "warning"


@pytest.mark.parametrize(
    ("seconds", "state"),
    [(0.0, "ok"), (0.9, "ok"), (-1.2, "warning"), (1.2, "warning"), (-6.0, "problem"), (6.0, "problem")],
)
def test_doctor_clock_skew_is_judged_by_its_size(seconds: float, state: str) -> None:
    theirs = NOW + timedelta(seconds=seconds)
    (finding,) = doctor._clock("nats-server a", theirs, NOW, NOW)
    assert finding.state == state


def test_doctor_clock_within_the_time_of_asking_agrees() -> None:
    (finding,) = doctor._clock("nats-server a", NOW, NOW - timedelta(seconds=3), NOW + timedelta(seconds=3))
    assert finding.found == "its clock agrees with this host's"


@pytest.mark.parametrize(
    ("share", "state"), [(0.5, "ok"), (0.8, "warning"), (0.95, "problem"), (1.0, "problem")], ids=str
)
def test_doctor_ledger_that_fills_up_is_told_in_time(share: float, state: str) -> None:
    settings = Settings.load({}, {"ledger_bytes_max": "1GiB"})
    finding = doctor._ledger_size({"messages": 1, "bytes": math.ceil(share * 1024**3)}, settings)
    assert finding.state == state


def test_doctor_usage_log_larger_than_the_disk_is_a_warning(tmp_path: Path) -> None:
    state: dict[str, Any] = {"messages": 1, "bytes": 1}
    small = Settings.load({}, {"data_dir": tmp_path, "usage_bytes_max": "64MiB"})
    large = Settings.load({}, {"data_dir": tmp_path, "usage_bytes_max": "1048576TiB"})
    assert doctor._usage_size(state, small).state == "ok"
    assert doctor._usage_size(state, large).state == "warning"


@pytest.mark.parametrize(
    ("states", "whole"),
    [(["ok"], "ok"), (["ok", "warning"], "warning"), (["warning", "problem", "ok"], "problem"), ([], "ok")],
    ids=["ok", "warning", "problem", "nothing"],
)
def test_doctor_whole_is_as_bad_as_its_worst_part(states: list[Any], whole: str) -> None:
    assert doctor.worst([Finding("x", state, "y") for state in states]) == whole


def test_doctor_port_that_speaks_no_nats_does_not_hang(settings: Settings) -> None:
    """A listener that says nothing: the check gives up in time."""
    import asyncio  # noqa: PLC0415 - this test has a loop of its own

    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = Settings.load(
            {}, {"data_dir": settings.data_dir, "nats_url": f"nats://127.0.0.1:{silent.getsockname()[1]}"}
        )
        (finding,) = asyncio.run(examine(settings))["nats-server"]
    assert finding.state == "problem"
