"""Followers that are slow, dead, cut off or too late, and services that stop or lose a part under them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from events import streams
from events.ledger import Append, Ledger
from events.streams import REVOCATIONS, Connection
from events.types import Reason, TokenRevoked
from service.tokens import new_id
from tests import running
from tests.following import POLL, SNAPSHOT, STREAM, Follower, Revoked, following, poll_all, snapshot
from tests.making import head, issued, minted, subject_of
from tests.running import Process, Service, StartService, problem, until

pytestmark = pytest.mark.slow

MIB = 1024**2
STREAMS = 200
SILENT = 12
HISTORY = 3_000  # announcements of some 450 bytes, so that each silent follower could be sent 1.3 MB
GROWTH_BYTES_MAX = (SILENT + 60) * MIB  # a stream holds 1 MiB at the most; and the feed's ring and its rest


async def connection(service: Service, role: str) -> Connection:
    url = json.loads((service.data_dir / "bootstrap.json").read_text())["nats_url"]
    return await streams.connect(url, service.data_dir / "nats" / f"{role}.nk", name=f"test-{role}")


def revoke_many(service: Service, count: int) -> int:
    """Appends revocations of tokens that nobody knows, and answers the sequence of the last."""

    async def append() -> int:
        nc = await connection(service, "service")
        ledger = Ledger(nc)
        try:
            events = [
                TokenRevoked(**head(), grant_id=new_id("grt"), token_id=new_id("tok"), reason=Reason.ADMIN)
                for _ in range(count)
            ]
            done = 0
            for at in range(0, count, 500):
                appended = await ledger.append(*(Append(subject_of(one), one) for one in events[at : at + 500]))
                done = appended[-1]
            return done
        finally:
            await nc.close()

    return asyncio.run(append())


def announced(service: Service, token: str, seq: int) -> None:
    """Returns once the feed has reached the sequence."""

    def reached() -> bool:
        answer = service.call("GET", "/v1/revocations/position", token=token)
        return answer.is_success and answer.json()["ledger_seq"] >= seq

    until(reached, seconds=60, what="it is announced")


@contextlib.contextmanager
def silent(service: Service, token: str, target: str, count: int) -> Iterator[list[socket.socket]]:
    """Answers that have begun and are not read any further."""
    request = f"GET {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.settimeout(60)
            one.connect(("127.0.0.1", service.port))
            one.sendall(request)
            opened.append(one)
        for one in opened:
            assert one.recv(12) == b"HTTP/1.1 200"
        yield opened


def followers(service: Service) -> int:
    """As the metrics tell."""
    lines = service.http.get("/metrics").text.splitlines()
    counts = [one.split()[1] for one in lines if one.startswith("token_ledger_followers ")]
    return int(float(counts[0])) if counts else 0


def resident_bytes(process: Process) -> int:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * 4096


INTERFACES: dict[str, dict[str, Any]] = {"RSGI": {}, "ASGI": {"trusted_proxies": "127.0.0.1"}}


@pytest.mark.parametrize("settings", INTERFACES.values(), ids=INTERFACES.keys())
def test_service_with_open_streams_stops_in_time_and_loses_no_use(
    own_service: StartService, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Also with followers that have not read what they were sent, and with polls that wait."""
    service = own_service(directory=tmp_path / "crowded", use_recording="buffered", **settings)
    token, pat = service.bearer("ledger:subscribe"), service.pat()
    last = revoke_many(service, HISTORY)
    announced(service, token, last)
    waiting = f"GET {POLL}?after={last}&wait_seconds=30 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"
    with (
        silent(service, token, STREAM, STREAMS),
        silent(service, token, f"{STREAM}?after=0", 4),
        socket.create_connection(("127.0.0.1", service.port), timeout=60) as polling,
    ):
        polling.sendall(waiting.encode())
        until(lambda: followers(service) >= STREAMS + 1, seconds=60)
        for _ in range(50):
            assert service.code(pat["token"]) == "valid"
        service.stop()  # within CONTRACT's 10 s, every process with 0
        assert polling.recv(12) == b"HTTP/1.1 200"
    again = own_service(directory=tmp_path / "crowded")
    uses = [one for one in again.history(pat["token_id"], uses="true") if one["ledger_seq"] is None]
    assert len(uses) == 50


def test_followers_that_do_not_read_hold_little_and_delay_nobody(own_service: StartService) -> None:
    service = own_service(workers=1, followers_max=SILENT + 1)
    token = service.bearer("ledger:subscribe")
    [worker] = service.workers()
    announced(service, token, revoke_many(service, HISTORY))
    with following(service, token) as healthy:
        before = resident_bytes(worker)
        with silent(service, token, f"{STREAM}?after=0", SILENT):
            # There is no place left.
            body = service.call("GET", STREAM, token=token)
            problem(body, 503, "unavailable")
            assert int(body.headers["retry-after"]) > 0
            problem(service.call("GET", POLL, token=token), 503, "unavailable")
            last = revoke_many(service, HISTORY)
            healthy.wait_reached(last)
            assert len(healthy.seqs) == HISTORY
            growth = resident_bytes(worker) - before
            assert growth < GROWTH_BYTES_MAX
            # Whoever takes nothing is given up.
            until(lambda: followers(service) == 1, seconds=90, what="their places are free again")
        assert service.workers() == [worker]
        seq = revoke_many(service, 1)
        healthy.wait_reached(seq)
    # All of it is more than one stream holds.
    with following(service, token, after=0) as late:
        late.wait_reached(seq)
        assert late.connections > 1
        assert late.events == poll_all(service, token, 0, limit=1000)[0]


def test_one_caller_leaves_places_to_others(own_service: StartService) -> None:
    """With however many tokens."""
    service = own_service(workers=1, followers_max=8, followers_per_caller_max=4)
    user = service.user(kind="service", scope="ledger:subscribe")["user_id"]
    first, second = (service.issue(user, "ledger:subscribe", kind="sat")["token"] for _ in range(2))
    with silent(service, first, STREAM, 4):
        for target in (STREAM, POLL, SNAPSHOT):
            refused = service.call("GET", target, token=second)
            problem(refused, 429, "too_many_requests")
            assert int(refused.headers["retry-after"]) > 0
        with following(service, service.bearer("ledger:subscribe")) as other:
            other.wait_for(revoke_many(service, 1))
    until(lambda: service.call("GET", POLL, token=second).is_success, seconds=60, what="places are free again")


REVOKED_TOKENS = 24_000  # of some 350 bytes each in a snapshot: more than a connection takes unread


def end_many_tokens(service: Service, count: int) -> int:
    """Issues and revokes tokens that are good for long, and answers the sequence of the last."""

    async def append() -> int:
        nc = await connection(service, "service")
        ledger, done = Ledger(nc), 0
        try:
            for _ in range(count // 200):
                entries = []
                for _ in range(200):
                    grant_id, token_id = new_id("grt"), new_id("tok")
                    made = issued(grant_id, minted(token_id))
                    ended = TokenRevoked(**head(), grant_id=grant_id, token_id=token_id, reason=Reason.ADMIN)
                    entries += [Append(subject_of(made), made), Append(subject_of(ended), ended)]
                done = (await ledger.append(*entries))[-1]
            return done
        finally:
            await nc.close()

    return asyncio.run(append())


def snapshot_files(service: Service) -> int:
    """Those that are there or still open."""
    found = {str(one) for one in (service.data_dir / "snapshots").iterdir()}
    for one in Path(f"/proc/{service.workers()[0].pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(one.readlink()).removesuffix(" (deleted)"))
    return sum("/snapshots/" in one for one in found)


def test_snapshots_that_are_not_read_are_few_files_and_given_up(own_service: StartService) -> None:
    service = own_service(workers=1, followers_max=SILENT)
    token = service.bearer("ledger:subscribe")
    last = end_many_tokens(service, REVOKED_TOKENS)
    until(lambda: snapshot(service, token)[0]["ledger_seq"] >= last, seconds=120, what="the view has them")
    until(lambda: followers(service) == 0, seconds=60, what="who has read it is done with it")
    with silent(service, token, SNAPSHOT, SILENT):
        assert followers(service) == SILENT
        problem(service.call("GET", SNAPSHOT, token=token), 503, "unavailable")
        assert snapshot_files(service) <= 6
        until(lambda: followers(service) == 0, seconds=90, what="whoever takes nothing is given up")
    until(lambda: snapshot_files(service) == 0, seconds=60, what="their files are gone")
    assert snapshot(service, token)[0]["ledger_seq"] >= last


@pytest.fixture(scope="module")
def battered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = running.start(tmp_path_factory.mktemp("followed"))
    try:
        yield service
    finally:
        service.stop()


VICTIMS = {
    "API worker": lambda service: service.workers()[0],
    "API server": Service.api_server,
    "nats-server": Service.nats_server,
    "feed projector": lambda service: service.projector("revocations"),
}


def test_followers_of_a_service_whose_parts_are_killed_miss_nothing(battered: Service) -> None:
    token = battered.bearer("ledger:subscribe")
    start = snapshot(battered, token)[0]["ledger_seq"]
    with following(battered, token, after=start) as one, following(battered, token, after=start) as other:
        for victim in VICTIMS.values():
            revoke_many(battered, 20)
            killed = victim(battered)
            killed.kill()
            until(lambda: not killed.alive(), seconds=10)  # noqa: B023 - asked at once
            until(battered.ready, seconds=60)
            last = revoke_many(battered, 20)
            for follower in (one, other):
                follower.wait_reached(last)
        until(lambda: len(battered.workers()) == battered.worker_count, seconds=60)
        polled, _ = poll_all(battered, token, start, limit=1000)
        assert len(polled) == 40 * len(VICTIMS)
        for follower in (one, other):
            assert follower.connections > 1
            assert follower.events == polled


def test_follower_that_was_away_begins_where_it_ended(battered: Service) -> None:
    """Stopped, with what it had; begun again with an old cursor, and fed some of it twice."""
    token = battered.bearer("ledger:subscribe")
    start = snapshot(battered, token)[0]["ledger_seq"]
    found = Revoked()
    for after in (start, start + 10, start + 30):  # each cursor lies before what was seen
        last = revoke_many(battered, 25)
        with following(battered, token, after=after) as one:
            one.wait_reached(last)
            for event in one.events:
                found.add(event["data"])
    everything = Revoked()
    for item in poll_all(battered, token, start)[0]:
        everything.add(item["data"])
    assert found.names() == everything.names()
    assert len(everything.names()) == 75


def test_cursor_behind_which_announcements_were_dropped_is_refused_and_a_snapshot_goes_on(battered: Service) -> None:
    token, pat = battered.bearer("ledger:subscribe"), battered.pat()
    battered.done("POST", POLL, json={"grant_id": pat["grant_id"], "reason": "admin"})
    last = revoke_many(battered, 60)
    announced(battered, token, last)
    asyncio.run(keep(battered, 10))
    for worker in battered.workers():
        worker.kill()  # or they would still hold what was dropped
    until(battered.ready, seconds=60)
    for answer in (
        battered.call("GET", STREAM, token=token, params={"after": 0}),
        battered.call("GET", STREAM, token=token, headers={"Last-Event-ID": str(last - 30)}),
        battered.call("GET", POLL, token=token, params={"after": last - 30, "wait_seconds": 5}),
        battered.call("POST", "/v1/subscribers", json={"name": "late", "transport": "nats", "after": last - 30}),
    ):
        body = problem(answer, 410, "cursor_too_old")
        assert "/v1/revocations/snapshot" in body["fix"]
    begun, revoked = snapshot(battered, token)
    assert ("grant", pat["grant_id"]) in {(one["what"], one.get("grant_id")) for one in revoked}
    assert begun["ledger_seq"] >= last
    with following(battered, token, after=begun["ledger_seq"]) as one:
        one.wait_for(revoke_many(battered, 1))
    kept, _ = poll_all(battered, token, last - 5)
    assert [int(item["id"]) for item in kept][:5] == list(range(last - 4, last + 1))


async def keep(service: Service, messages: int) -> None:
    """As if the feed's retention had dropped all but the newest."""
    nc = await connection(service, "admin")
    try:
        subject = f"$JS.API.STREAM.UPDATE.{REVOCATIONS}"
        state = json.loads((await nc.request(f"$JS.API.STREAM.INFO.{REVOCATIONS}", b"", timeout=10)).data)
        for most in (messages, -1):  # another configuration than the service's would keep its workers from starting
            config = json.dumps(state["config"] | {"max_msgs": most}).encode()
            answer = json.loads((await nc.request(subject, config, timeout=10)).data)
            assert "error" not in answer, answer
    finally:
        await nc.close()


def test_follower_of_one_worker_learns_at_once_what_was_revoked_at_another(battered: Service) -> None:
    """Two connections each: whichever worker they meet."""
    token = battered.bearer("ledger:subscribe")
    several = [Follower(battered, token) for _ in range(4)]
    try:
        for one in several:
            one.wait_begun()
        seq = revoke_many(battered, 1)
        for one in several:
            one.wait_for(seq)
    finally:
        for one in several:
            one.close()
