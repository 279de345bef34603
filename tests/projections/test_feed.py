"""The feed of revocations: each of the log's in REVOCATIONS, once, in order, whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import pytest_asyncio
from msgspec import UNSET

from events import streams
from events.ledger import Append, Ledger
from events.server import EmbeddedServer
from events.streams import LEDGER, REVOCATIONS, Connection, direct
from events.types import (
    AccessRenewed,
    ClientDisabled,
    ClientRevoked,
    GrantRevoked,
    KeyRevoked,
    Kind,
    LedgerEvent,
    Reason,
    Recorded,
    SubjectRevoked,
    TokenRevoked,
    TokenSuperseded,
    UserDisabled,
    UserPasswordChanged,
)
from projections import base
from projections.base import boot_time_ns
from projections.current import CurrentReader, view_path
from projections.revocations import (
    CloudEvent,
    Feed,
    FeedAhead,
    FeedPosition,
    Known,
    cloud_event,
    revocation,
    serve_position,
)
from service.errors import Unavailable
from service.feed import CursorTooOld, Entry, FeedChanged, Filters, ask_position, matches
from service.feed import Feed as Following
from tests.logs import LIMITS, connected, kill, paused, server_with_streams, until
from tests.making import (
    START,
    authorized,
    cli,
    everything,
    grt,
    head,
    issued,
    minted,
    raw,
    redeemed,
    refreshed,
    sha256_of,
    subject_of,
    tok,
    usr,
)
from tests.other_process import Remote
from tests.running import ROOT

ISSUER = "https://ledger.example"


# What is announced, by the event


KNOWN = Known("ab" * 32, grt(1), cli(1), usr(1))
TOKEN = {"token_id": tok(1), "token_sha256": "ab" * 32, "grant_id": grt(1), "client_id": cli(1), "subject": usr(1)}
LATER = START + timedelta(hours=1)
BROAD = {"issued_before": START, "revoked_at": START}
ANNOUNCED: dict[str, tuple[LedgerEvent, str, dict[str, Any]]] = {
    "token": (
        TokenRevoked(**head(), grant_id=grt(1), token_id=tok(1), reason=Reason.LOGOUT),
        "token",
        TOKEN | {"reason": Reason.LOGOUT, "revoked_at": START},
    ),
    "rotated at once": (
        TokenSuperseded(**head(), grant_id=grt(1), token_id=tok(1), successor_id=tok(2), ends_at=START),
        "token",
        TOKEN | {"reason": Reason.ROTATED, "revoked_at": START},
    ),
    "rotated with an overlap": (
        TokenSuperseded(**head(), grant_id=grt(1), token_id=tok(1), successor_id=tok(2), ends_at=LATER),
        "token",
        TOKEN | {"reason": Reason.ROTATED, "revoked_at": LATER},
    ),
    "grant": (
        GrantRevoked(**head(), grant_id=grt(1), reason=Reason.REUSE_DETECTED),
        "grant",
        {
            "grant_id": grt(1),
            "client_id": cli(1),
            "subject": usr(1),
            "reason": Reason.REUSE_DETECTED,
            "revoked_at": START,
        },
    ),
    "client": (
        ClientRevoked(**head(), client_id=cli(1), reason=Reason.ADMIN),
        "client",
        {"client_id": cli(1), "reason": Reason.ADMIN} | BROAD,
    ),
    "client disabled": (
        ClientDisabled(**head(), client_id=cli(1), reason=Reason.DISABLED),
        "client",
        {"client_id": cli(1), "reason": Reason.DISABLED} | BROAD,
    ),
    "subject": (
        SubjectRevoked(**head(), user_id=usr(1), reason=Reason.ABUSE),
        "subject",
        {"subject": usr(1), "reason": Reason.ABUSE} | BROAD,
    ),
    "user disabled": (
        UserDisabled(**head(), user_id=usr(1), reason=Reason.DISABLED),
        "subject",
        {"subject": usr(1), "reason": Reason.DISABLED} | BROAD,
    ),
    "password changed": (
        UserPasswordChanged(**head(), user_id=usr(1), password_hash=None),
        "subject",
        {"subject": usr(1), "reason": Reason.PASSWORD_CHANGED} | BROAD,
    ),
    "key": (
        KeyRevoked(**head(), kid="ed-1", reason=Reason.COMPROMISED),
        "key",
        {"kid": "ed-1", "reason": Reason.COMPROMISED} | BROAD,
    ),
}
REVOKING = {type(event) for event, _, _ in ANNOUNCED.values()}


def recorded(event: LedgerEvent, seq: int = 7) -> Recorded:
    return Recorded(seq=seq, recorded_at=START, subject=subject_of(event), event=event)


@pytest.mark.parametrize("name", ANNOUNCED)
def test_revocation_by_event_says_what_ended(name: str) -> None:
    event, what, members = ANNOUNCED[name]
    found = revocation(recorded(event), KNOWN)
    assert found is not None
    told = {name: value for name, value in msgspec.structs.asdict(found[1]).items() if value is not UNSET}
    assert (what, members | {"ledger_seq": 7}) == (found[0], told)


@pytest.mark.parametrize("event", [one.event for one in everything().recorded if type(one.event) not in REVOKING])
def test_revocation_by_other_event_is_none(event: LedgerEvent) -> None:
    assert revocation(recorded(event), KNOWN) is None


def test_every_event_either_revokes_or_is_tried_not_to() -> None:
    """An event that is new and ends tokens must not be forgotten here."""
    tried = REVOKING | {type(one.event) for one in everything().recorded}
    not_of_tokens = {"AuditRead", "AuditExported", "SubscriberRegistered", "SubscriberRemoved"}
    not_of_tokens |= {"WebhookRegistered", "WebhookChanged", "WebhookRemoved"}
    assert {kind.__name__ for kind in get_args(LedgerEvent)} == {kind.__name__ for kind in tried} | not_of_tokens


def test_cloud_event_has_the_members_of_the_contract() -> None:
    found = revocation(recorded(ANNOUNCED["token"][0]), Known())
    assert found is not None
    moment = START.isoformat().replace("+00:00", "Z")
    assert json.loads(msgspec.json.encode(cloud_event(*found, START, ISSUER))) == {
        "specversion": "1.0",
        "id": "7",
        "source": ISSUER,
        "type": "token-ledger.token.revoked.v1",
        "time": moment,
        "datacontenttype": "application/json",
        "data": {
            "token_id": tok(1),
            "grant_id": grt(1),
            "reason": "logout",
            "revoked_at": moment,
            "ledger_seq": 7,
        },
    }


# Through a real server


@pytest_asyncio.fixture(loop_scope="session")
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    async with server_with_streams(tmp_path / "nats") as one:
        yield one


@contextlib.asynccontextmanager
async def feeding(server: EmbeddedServer, directory: Path) -> AsyncIterator[Feed]:
    """The projection at work; its view, which nobody writes, is not waited for."""
    async with connected(server, "projector") as nc:
        view = CurrentReader(view_path(directory))
        feed = Feed(nc, view, ISSUER, directory / "feed.json")
        await serve_position(nc, feed)
        task = asyncio.create_task(feed.run())
        try:
            yield feed
        finally:
            await base.end_all([task])
            view.close()
            feed.save()


def revoke(number: int) -> Append:
    event = GrantRevoked(**head(), grant_id=grt(number), reason=Reason.ADMIN)
    return Append(subject_of(event), event)


async def append(ledger: Ledger, first: int, count: int) -> list[int]:
    """Revocations of grants, and as many events that revoke nothing; answers the revocations' sequences."""
    entries = [entry for number in range(first, first + count) for entry in (issue(number), revoke(number))]
    seqs = []
    for start in range(0, len(entries), 1000):
        seqs += await ledger.append(*entries[start : start + 1000])
    return seqs[1::2]


def issue(number: int) -> Append:
    event = issued(grt(number), minted(tok(number)))
    return Append(subject_of(event), event)


async def announced(nc: Connection) -> list[CloudEvent]:
    """All that the stream holds; its message ids are held against it."""
    found = []
    async for message in direct(nc, REVOCATIONS, {"seq": 1, "batch": 100_000}):
        event = msgspec.json.decode(message.data, type=CloudEvent)
        assert (message.headers or {})["Nats-Msg-Id"] == event.id == str(event.data.ledger_seq)
        found.append(event)
    return found


async def reached(feed: Feed, seq: int) -> None:
    await until(lambda: feed.position(LEDGER) >= seq, what=f"the feed has reached {seq}")


async def test_feed_announces_each_revocation_once_and_in_order(server: EmbeddedServer, tmp_path: Path) -> None:
    async with connected(server) as nc, feeding(server, tmp_path) as feed:
        seqs = await append(Ledger(nc), 1, 40)
        await reached(feed, seqs[-1])
        events = await announced(nc)
    assert seqs == [event.data.ledger_seq for event in events]
    assert [grt(number) for number in range(1, 41)] == [event.data.grant_id for event in events]


async def test_feed_of_a_long_log_is_written_in_batches_and_whole(server: EmbeddedServer, tmp_path: Path) -> None:
    """As after an upgrade from a version without it."""
    async with connected(server) as nc:
        seqs = await append(Ledger(nc), 1, 1300)
        async with feeding(server, tmp_path) as feed:
            await reached(feed, seqs[-1])
        assert seqs == [event.data.ledger_seq for event in await announced(nc)]


@pytest.mark.parametrize("remembers", [True, False])
async def test_feed_started_again_announces_nothing_twice(
    server: EmbeddedServer, tmp_path: Path, remembers: bool
) -> None:
    async with connected(server) as nc:
        ledger = Ledger(nc)
        async with feeding(server, tmp_path) as feed:
            seqs = await append(ledger, 1, 10)
            (end,) = await ledger.append(issue(100))
            await reached(feed, end)
        if not remembers:
            (tmp_path / "feed.json").unlink()
        seqs += await append(ledger, 11, 10)
        async with feeding(server, tmp_path) as feed:
            # What the file remembers need not be read again; without it, what stands behind the last announcement.
            await reached(feed, seqs[-1])
        assert seqs == [event.data.ledger_seq for event in await announced(nc)]


async def test_feed_that_remembers_begins_where_it_read_to(server: EmbeddedServer, tmp_path: Path) -> None:
    async with connected(server) as nc, connected(server, "projector") as projector:
        async with feeding(server, tmp_path) as feed:
            (end,) = await Ledger(nc).append(issue(1))
            await reached(feed, end)
        view = CurrentReader(view_path(tmp_path))
        again = Feed(projector, view, ISSUER, tmp_path / "feed.json")
        await again.start()
        (tmp_path / "feed.json").write_text("{")
        damaged = Feed(projector, view, ISSUER, tmp_path / "feed.json")
        await damaged.start()
        view.close()
        assert (end, 0) == (again.position(LEDGER), damaged.position(LEDGER))


FEED_FOR_EVER = """
import asyncio, sys
from pathlib import Path
from events.streams import connect
from events.errors import LedgerUnavailable
from projections.current import CurrentReader, view_path
from projections.revocations import Feed

async def main():
    url, creds, directory = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    nc = await connect(url, creds, name="feed")
    feed = Feed(nc, CurrentReader(view_path(directory)), "https://ledger.example", directory / "feed.json")
    print("up", flush=True)
    while True:
        try:
            await feed.run()
        except LedgerUnavailable:
            await asyncio.sleep(0.05)

asyncio.run(main())
"""


@pytest.fixture
def feed_process(server: EmbeddedServer) -> Any:
    begun: list[subprocess.Popen[bytes]] = []

    def begin(directory: Path) -> subprocess.Popen[bytes]:
        directory.mkdir(exist_ok=True)
        command = [sys.executable, "-c", FEED_FOR_EVER, server.url, str(server.creds("projector")), str(directory)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        begun.append(process)
        return process

    yield begin
    for process in begun:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()


async def test_feed_killed_again_and_again_loses_and_doubles_nothing(
    server: EmbeddedServer, tmp_path: Path, feed_process: Callable[[Path], subprocess.Popen[bytes]]
) -> None:
    async with connected(server) as nc:
        ledger = Ledger(nc)
        seqs: list[int] = []
        for round_ in range(4):
            process = feed_process(tmp_path / "killed")
            assert process.stdout is not None
            await asyncio.to_thread(process.stdout.readline)
            before = len(seqs)
            # In one go, so that some are announced singly, some in batches, and some not yet when it dies.
            seqs += await append(ledger, 1000 * round_ + 1, 200)
            state = await streams.stream_state(nc, REVOCATIONS)
            while int(state["last_seq"]) <= before:
                state = await streams.stream_state(nc, REVOCATIONS)
            os.kill(process.pid, signal.SIGKILL)
        async with feeding(server, tmp_path / "killed") as feed:
            await reached(feed, seqs[-1])
        assert seqs == [event.data.ledger_seq for event in await announced(nc)]


async def test_two_feeds_at_once_announce_each_revocation_once(
    server: EmbeddedServer, tmp_path: Path, feed_process: Callable[[Path], subprocess.Popen[bytes]]
) -> None:
    other = feed_process(tmp_path / "other")
    assert other.stdout is not None
    await asyncio.to_thread(other.stdout.readline)
    async with connected(server) as nc, feeding(server, tmp_path / "one") as feed:
        ledger, seqs = Ledger(nc), []
        for number in range(60):
            seqs += await append(ledger, number + 1, 1)
        seqs += await append(ledger, 1000, 300)
        await reached(feed, seqs[-1])
        assert seqs == [event.data.ledger_seq for event in await announced(nc)]


async def test_feed_survives_a_server_that_stalls_and_dies(server: EmbeddedServer, tmp_path: Path) -> None:
    async with connected(server) as nc:
        ledger = Ledger(nc)
        process = tmp_path / "feed"
        async with connected(server, "projector") as projector:
            view = CurrentReader(view_path(process))
            feed = Feed(projector, view, ISSUER, process / "feed.json")

            async def run() -> None:
                while True:
                    with contextlib.suppress(streams.LedgerUnavailable):
                        await feed.run()
                    await asyncio.sleep(0.05)

            task = asyncio.create_task(run())
            seqs = await append(ledger, 1, 20)
            with paused(server):
                await asyncio.sleep(2.5)  # longer than an announcement waits for its acknowledgement
            seqs += await append(ledger, 101, 20)
            await kill(server)
            await until(lambda: nc.is_connected, what="connected again")
            seqs += await append(ledger, 201, 20)
            await reached(feed, seqs[-1])
            await base.end_all([task])
            view.close()
        assert seqs == [event.data.ledger_seq for event in await announced(nc)]


async def test_feed_beside_a_view_says_whose_the_token_was(server: EmbeddedServer, tmp_path: Path) -> None:
    history = everything()
    with Remote("projections.current:CurrentWriter", view_path(tmp_path)) as view:
        async with connected(server) as nc, feeding(server, tmp_path) as feed:
            seqs = await Ledger(nc).append(*(Append(subject_of(one.event), one.event) for one in history.recorded))
            view.call("apply", LEDGER, [raw(one) for one in history.recorded])
            view.call("confirm", LEDGER, seqs[-1], boot_time_ns())
            await reached(feed, seqs[-1])
            event = TokenRevoked(**head(), grant_id=grt(1), token_id=tok(14), reason=Reason.ADMIN)
            await Ledger(nc).append(Append(subject_of(event), event))
            last = seqs[-1] + 1
            view.call(
                "apply",
                LEDGER,
                [raw(Recorded(seq=last, recorded_at=START, subject=subject_of(event), event=event))],
            )
            await reached(feed, last)
            found = (await announced(nc))[-1].data
    assert (tok(14), grt(1), cli(2), sha256_of(tok(14)).hex()) == (
        found.token_id,
        found.grant_id,
        found.client_id,
        found.token_sha256,
    )


async def test_feed_beside_a_view_that_stands_still_asks_the_log_whose_the_token_was(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    pat = issued(grt(1), minted(tok(1), Kind.PAT), subject=usr(1), client_id=None, audience=())
    chain = issued(grt(2), minted(tok(2)), minted(tok(3), Kind.REFRESH))
    later = refreshed(grt(2), tok(3), minted(tok(4)), minted(tok(5), Kind.REFRESH))
    gone = [TokenRevoked(**head(), grant_id=grt(1), token_id=tok(1), reason=Reason.ADMIN)]
    gone += [TokenRevoked(**head(), grant_id=grt(2), token_id=tok(4), reason=Reason.ADMIN)]
    given = [authorized(grt(3), tok(6)), redeemed(grt(3), tok(6), minted(tok(7)), minted(tok(8), Kind.REFRESH))]
    given += [
        AccessRenewed(
            **head(), grant_id=grt(3), refresh_token_id=tok(8), tokens=(minted(tok(9)),), refresh_expires_at=START
        )
    ]
    gone += [TokenRevoked(**head(), grant_id=grt(3), token_id=tok(number), reason=Reason.ADMIN) for number in (7, 9)]
    async with connected(server) as nc, feeding(server, tmp_path) as feed:
        seqs = [seq for event in (pat, chain, later, *given, *gone) for seq in await append_to_grant(Ledger(nc), event)]
        await reached(feed, seqs[-1])
        found = [event.data for event in await announced(nc)]
    assert [(one.token_sha256, one.subject) for one in found] == [
        (sha256_of(tok(1)).hex(), usr(1)),
        (sha256_of(tok(4)).hex(), chain.subject),
        (sha256_of(tok(7)).hex(), usr(1)),
        (sha256_of(tok(9)).hex(), usr(1)),
    ]


async def append_to_grant(ledger: Ledger, event: Any) -> list[int]:
    return await ledger.append(Append(f"ledger.main.grant.{event.grant_id}", event))


async def test_position_that_was_long_ago_is_not_told(server: EmbeddedServer, tmp_path: Path) -> None:
    """Of two such processes the other answers, which may know more."""
    async with connected(server) as nc, connected(server, "projector") as behind, feeding(server, tmp_path) as feed:
        seqs = await append(Ledger(nc), 1, 1)
        view = CurrentReader(view_path(tmp_path / "behind"))
        old = Feed(behind, view, ISSUER, tmp_path / "behind.json")
        await old.start()
        old.confirm(LEDGER, 0, boot_time_ns() - 11_000_000_000)
        assert old.answer() is not None
        await serve_position(behind, old)
        await behind.flush()
        await until(lambda: (told := feed.answer()) is not None and told.ledger_seq >= seqs[-1])
        for _ in range(20):
            assert (await ask_position(nc, 30)).ledger_seq >= seqs[-1]
        view.close()


# Another log


async def test_feed_does_not_trust_what_it_remembers_of_a_log_that_was_put_back(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    """The log was restored and has grown past where it was read to: the same number is another event."""
    async with connected(server) as nc, connected(server, "projector") as projector:
        async with feeding(server, tmp_path) as feed:
            (end,) = await Ledger(nc).append(issue(1))
            await reached(feed, end)
        file = tmp_path / "feed.json"
        told = json.loads(file.read_bytes())
        file.write_text(json.dumps(told | {"recorded_at": (START - timedelta(days=1)).isoformat()}))
        view = CurrentReader(view_path(tmp_path))
        again = Feed(projector, view, ISSUER, file)
        await again.start()
        view.close()
        assert (told["ledger_seq"], again.position(LEDGER)) == (end, 0)


async def test_feed_that_cannot_save_how_far_it_is_goes_on(server: EmbeddedServer, tmp_path: Path) -> None:
    (tmp_path / "feed.json").mkdir()  # what cannot be written over
    async with connected(server) as nc, feeding(server, tmp_path) as feed:
        seqs = await append(Ledger(nc), 1, 3)
        await reached(feed, seqs[-1])
        feed.save()
        assert seqs == [event.data.ledger_seq for event in await announced(nc)]


async def test_follower_that_begins_while_the_feed_is_begun_anew_follows_the_new_one(
    server: EmbeddedServer, tmp_path: Path, following: Following
) -> None:
    async with connected(server) as nc, connected(server, "admin") as admin:
        async with feeding(server, tmp_path) as feed:
            old = await append(Ledger(nc), 1, 30)
            await reached(feed, old[-1])
        # Nobody announces: a follower that begins now waits.
        beginning = asyncio.create_task(following.start())
        await asyncio.wait({beginning}, timeout=0.5)
        await streams.begin_feed_anew(admin, LIMITS)
        (tmp_path / "feed.json").unlink()
        async with feeding(server, tmp_path) as feed:
            await reached(feed, old[-1])
            with contextlib.suppress(Unavailable):
                await beginning
            async with asyncio.timeout(30):
                while True:
                    with contextlib.suppress(Unavailable):
                        await following.start()
                        break
            new = await append(Ledger(nc), 101, 3)
            await reached(feed, new[-1])
            await following.wait(new[-1] - 1, 30)
            assert old + new == await walk(following, 0, 10)


async def test_feed_ahead_of_its_log_stops_and_provision_begins_it_anew(server: EmbeddedServer, tmp_path: Path) -> None:
    """As when a backup of one was restored without the other."""
    async with connected(server) as nc, connected(server, "admin") as admin, connected(server, "projector") as writer:
        async with feeding(server, tmp_path) as feed:
            seqs = await append(Ledger(nc), 1, 3)
            await reached(feed, seqs[-1])
            await until(lambda: feed.answer() is not None)
            before = feed.answer()
        event = (await announced(nc))[-1]
        ahead = msgspec.structs.replace(event, id="500", data=msgspec.structs.replace(event.data, ledger_seq=500))
        await writer.jetstream().publish("revocations.main.grant", msgspec.json.encode(ahead))
        view = CurrentReader(view_path(tmp_path))
        with pytest.raises(FeedAhead, match="does not hold"):
            await Feed(writer, view, ISSUER, tmp_path / "feed.json").start()
        view.close()
        await streams.provision(admin, LIMITS)
        async with feeding(server, tmp_path) as feed:
            await reached(feed, seqs[-1])
            await until(lambda: feed.answer() is not None)
            anew = feed.answer()
        assert seqs == [event.data.ledger_seq for event in await announced(nc)]
    assert before is not None
    assert anew is not None
    assert before.feed != anew.feed


# As a worker hands it on


@pytest_asyncio.fixture(loop_scope="session")
async def following(server: EmbeddedServer) -> AsyncIterator[Following]:
    async with connected(server) as nc:
        one = Following(nc)
        yield one
        one.stop()


def seqs_of(entries: list[Entry]) -> list[int]:
    return [entry.ledger_seq for entry in entries]


async def walk(following: Following, after: int, limit: int) -> list[int]:
    """Page by page, until there is nothing more."""
    found: list[int] = []
    while True:
        page = await following.read(after, limit)
        if not page.entries and page.reached == after:
            return found
        found += seqs_of(page.entries)
        after = page.reached


async def test_follower_reads_the_same_from_any_cursor_before_and_behind_its_start(
    server: EmbeddedServer, tmp_path: Path, following: Following
) -> None:
    async with connected(server) as nc, feeding(server, tmp_path) as feed:
        ledger = Ledger(nc)
        old = await append(ledger, 1, 30)
        await reached(feed, old[-1])
        await following.start()
        new = await append(ledger, 101, 30)
        await reached(feed, new[-1])
        for after in (0, 1, old[0], old[10], old[-1], old[-1] + 1, new[0], new[20], new[-1]):
            await following.wait(new[-1] - 1, 30)
            expected = [seq for seq in old + new if seq > after]
            assert expected == await walk(following, after, 7), after


async def test_follower_is_woken_by_what_it_waits_for(
    server: EmbeddedServer, tmp_path: Path, following: Following
) -> None:
    async with connected(server) as nc, feeding(server, tmp_path):
        await following.start()
        waiting = asyncio.create_task(following.wait(0, 60))
        seqs = await append(Ledger(nc), 1, 1)
        await asyncio.wait_for(waiting, 30)
        assert seqs == seqs_of((await following.read(0, 10)).entries)


async def test_follower_with_a_cursor_that_was_dropped_is_told(
    server: EmbeddedServer, tmp_path: Path, following: Following
) -> None:
    async with connected(server) as nc, feeding(server, tmp_path) as feed, connected(server, "admin") as admin:
        seqs = await append(Ledger(nc), 1, 10)
        await reached(feed, seqs[-1])
        config = streams.stream_configs(LIMITS)[REVOCATIONS] | {"max_msgs": 4}
        await admin.request(f"$JS.API.STREAM.UPDATE.{REVOCATIONS}", json.dumps(config).encode())
        await following.start()
        for after in (0, seqs[4]):
            with pytest.raises(CursorTooOld):
                await following.read(after, 10)
        assert seqs[7:] == await walk(following, seqs[6], 10)


async def test_follower_with_a_cursor_beyond_the_log_is_refused(
    server: EmbeddedServer, tmp_path: Path, following: Following
) -> None:
    async with connected(server) as nc, feeding(server, tmp_path):
        seqs = await append(Ledger(nc), 1, 1)
        assert (await following.read(seqs[-1], 10)).entries == []
        with pytest.raises(FeedChanged, match="the log ends at"):
            await following.read(seqs[-1] + 1, 10)


async def test_follower_knows_since_when_it_is_complete(
    server: EmbeddedServer, tmp_path: Path, following: Following
) -> None:
    asked_at = boot_time_ns()
    async with connected(server) as nc, feeding(server, tmp_path) as feed:
        seqs = await append(Ledger(nc), 1, 5)
        await reached(feed, seqs[-1])
        await following.start()
        await until(lambda: following.position.ledger_seq >= seqs[-1])
        position = following.position
        assert asked_at < position.as_of_ns <= boot_time_ns()
    # Nobody announces any more: what is known gets older, and is not said to be newer.
    stale = Following(nc)
    with pytest.raises(Unavailable, match="does not answer"):
        await stale.start()
    stale.stop()


async def test_follower_of_a_feed_that_was_begun_anew_sees_the_new_one(
    server: EmbeddedServer, tmp_path: Path, following: Following
) -> None:
    async with connected(server) as nc, connected(server, "admin") as admin:
        async with feeding(server, tmp_path) as feed:
            seqs = await append(Ledger(nc), 1, 5)
            await reached(feed, seqs[-1])
            await following.start()
            before = following.position.feed
        await admin.request(f"$JS.API.STREAM.DELETE.{REVOCATIONS}", b"")
        await streams.provision(admin, LIMITS)
        async with feeding(server, tmp_path) as feed:
            await reached(feed, seqs[-1])

            async def anew() -> bool:
                with contextlib.suppress(Unavailable):
                    await following.start()
                    return following.position.feed != before
                return False

            async with asyncio.timeout(30):
                while not await anew():
                    await following.wait(10**9, 0.05)
            assert seqs == await walk(following, 0, 10)


@pytest.mark.parametrize(
    ("filters", "fits"),
    [
        (Filters(), True),
        (Filters(client_id=cli(1)), True),
        (Filters(client_id=cli(2)), False),
        (Filters(client_id=cli(1), subject=usr(1)), True),
        (Filters(client_id=cli(1), subject=usr(2)), False),
        (Filters(grant_id=grt(2)), False),
    ],
)
def test_filter_keeps_what_names_no_other(filters: Filters, fits: bool) -> None:
    found = revocation(recorded(ANNOUNCED["token"][0]), KNOWN)
    assert found is not None
    assert fits == matches(found[1], filters)


def test_filter_keeps_what_could_concern_anybody() -> None:
    """The whole of a subject is revoked: that may be tokens of the client that is asked for."""
    found = revocation(recorded(ANNOUNCED["subject"][0]), Known())
    assert found is not None
    assert matches(found[1], Filters(client_id=cli(9), grant_id=grt(9)))


def test_position_survives_the_wire() -> None:
    told = FeedPosition(feed="f", ledger_seq=3, stream_seq=2, age_ms=1.5)
    assert told == msgspec.json.decode(msgspec.json.encode(told), type=FeedPosition)
