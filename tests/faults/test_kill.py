"""kill -9 in mid-load: what was acknowledged is there, what was revoked stays revoked, all recovers by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import running
from tests.faults.load import Load, seconds_until_acknowledged
from tests.running import Process, Service, until

RECOVERY_SECONDS_MAX = 15.0
BEFORE, AFTER = 60, 60

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def battered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all these tests: each finds it recovered from the one before."""
    service = running.start(tmp_path_factory.mktemp("battered"))
    try:
        yield service
    finally:
        service.stop()


VICTIMS: dict[str, Callable[[Service], Process]] = {
    "nats-server": Service.nats_server,
    "current projector": lambda service: service.projector("current"),
    "analytics projector": lambda service: service.projector("analytics"),
    "feed projector": lambda service: service.projector("revocations"),
    "API worker": lambda service: service.workers()[0],
    "API server": Service.api_server,
}


@pytest.mark.parametrize("victim", VICTIMS.values(), ids=VICTIMS.keys())
def test_kill_in_mid_load_loses_nothing_acknowledged(battered: Service, victim: Callable[[Service], Process]) -> None:
    with Load(battered) as load:
        seconds_until_acknowledged(load, BEFORE, RECOVERY_SECONDS_MAX)
        killed = victim(battered)
        killed.kill()
        until(lambda: not killed.alive(), seconds=5)
        seconds_until_acknowledged(load, AFTER, RECOVERY_SECONDS_MAX)
    until(battered.ready, seconds=RECOVERY_SECONDS_MAX, what="readiness comes back")
    load.check()
    until(lambda: len(battered.workers()) == battered.worker_count, seconds=RECOVERY_SECONDS_MAX, what="all workers")
    until(lambda: not orphans(battered), seconds=RECOVERY_SECONDS_MAX, what="nothing is left of what was killed")
    assert victim(battered).pid != killed.pid


def orphans(service: Service) -> list[Process]:
    """Processes of the service that are in nobody's care."""
    cared_for = {service.process.pid, *(process.pid for process in service.tree())}
    return [process for process in running.marked(service.mark) if process.pid not in cared_for]


def test_kill_of_everything_in_turn_is_survived(battered: Service) -> None:
    with Load(battered) as load:
        for victim in VICTIMS.values():
            seconds_until_acknowledged(load, 20, RECOVERY_SECONDS_MAX)
            victim(battered).kill()
        seconds_until_acknowledged(load, AFTER, 2 * RECOVERY_SECONDS_MAX)
    until(battered.ready, seconds=RECOVERY_SECONDS_MAX)
    until(lambda: not orphans(battered), seconds=RECOVERY_SECONDS_MAX, what="nothing is left of what was killed")
    load.check()


def test_uses_acknowledged_in_durable_mode_survive(battered: Service) -> None:
    """A validation was answered, so its use is on disk: nats-server and analytics are killed at once."""
    made = battered.pat()
    for _ in range(10):
        assert battered.code(made["token"]) == "valid"
    for killed in (battered.nats_server(), battered.projector("analytics")):
        killed.kill()
    until(battered.ready, seconds=RECOVERY_SECONDS_MAX)

    def uses() -> int:
        answer = battered.call("GET", f"/v1/tokens/{made['token_id']}/history", params={"uses": "true"})
        return sum(one["ledger_seq"] is None for one in answer.json()["items"]) if answer.is_success else 0

    until(lambda: uses() >= 10, seconds=RECOVERY_SECONDS_MAX, what="ten uses")
    assert uses() == 10


def test_killed_supervisor_leaves_nothing_behind_and_nothing_lost(tmp_path: Path) -> None:
    """Its processes end with it, but for the nats-server. A second one on the same store would ruin it, so the next
    start ends that before it starts its own."""
    first = running.start(tmp_path)
    with Load(first) as load:
        seconds_until_acknowledged(load, BEFORE, RECOVERY_SECONDS_MAX)
        first.process.kill()
        first.process.wait(5)
    until(lambda: only_nats_server(running.marked(first.mark)), seconds=15, what="its processes have ended")
    first.http.close()
    assert load.wrong == []
    second = running.start(tmp_path, port=first.port)
    try:
        assert running.marked(first.mark) == []
        load.service = second
        load.check()
    finally:
        second.stop()


def only_nats_server(left: list[Process]) -> bool:
    return all("nats-server" in process.command_line.split(" ")[0] for process in left)


def test_stop_in_mid_load_loses_nothing_and_restart_resumes_without_replaying(tmp_path: Path) -> None:
    """The view's file goes on from its position: rows and position were committed together."""
    first = running.start(tmp_path)
    with Load(first) as load:
        seconds_until_acknowledged(load, BEFORE, RECOVERY_SECONDS_MAX)
        first.process.terminate()
        assert first.process.wait(running.STOP_SECONDS_MAX) == 0
    first.stop()
    assert load.wrong == []
    second = running.start(tmp_path, port=first.port)
    try:
        load.service = second
        load.check()
        bootstrap = json.loads((second.data_dir / "bootstrap.json").read_text())
        assert bootstrap["admin_token"] == first.admin_token
        assert start_positions(first) == [0]
        assert start_positions(second)[0] >= load.last_seq
    finally:
        second.stop()


def start_positions(service: Service) -> list[int]:
    """Where the view's projector began each time, by its own log."""
    lines = [json.loads(line) for line in service.log_path.read_text().splitlines() if line.startswith("{")]
    starts = [line for line in lines if line.get("event") == "projector_started"]
    return [line["position"] for line in starts if line["projector"] == "current"]
