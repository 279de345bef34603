"""What followers say over NATS, from a real server: acknowledgements become receipts, and none that was not meant."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import structlog.testing
from nats.aio.msg import Msg

from events import streams
from events.ledger import Append, Ledger
from events.receipts import now_us
from events.server import EmbeddedServer
from events.streams import RECEIPTS, REVOCATIONS, Connection
from events.types import Reason, SubscriberRegistered, SubscriberRemoved, WebhookMetadata, WebhookRegistered
from projections import base
from projections.asking_receipts import (
    FollowerStanding,
    ReceiptsAnswer,
    ReceiptsRequest,
    SignsOfLife,
    ask_receipts,
)
from projections.base import boot_time_ns
from projections.followers import Followers
from projections.revocations import FeedPosition, Revocation, cloud_event
from tests.logs import LIMITS, connected, kill, server_with_streams, until
from tests.making import START, head

US = 1_000_000
_numbers = itertools.count(1)


class World:
    """A log with a feed, and the process part of the receipts, which may be killed and started again."""

    def __init__(self, server: EmbeddedServer, service: Connection, projector: Connection) -> None:
        self.server = server
        self.service = service
        self.projector = projector
        self.ledger = Ledger(service)
        self.clock_ahead_us = 0
        self.followers: Followers | None = None
        self._nc: Connection | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self._registered: list[str] = []

    async def start(self, *, silent_seconds_max: int = 60) -> None:
        """As the process starts: with a connection of its own."""
        nc = self._nc = await streams.connect(self.server.url, self.server.creds("projector"), name="followers")
        followers = self.followers = Followers(
            nc,
            f"w{next(_numbers)}",
            silent_seconds_max=silent_seconds_max,
            clock_us=lambda: now_us() + self.clock_ahead_us,
        )
        self._tasks = [
            asyncio.create_task(base.run(nc, followers.fold, (RECEIPTS, REVOCATIONS))),
            asyncio.create_task(followers.run()),
        ]
        await until(lambda: followers.answers, what="the streams were read")

    async def kill(self) -> None:
        """What it held in memory is gone, as with kill -9."""
        await base.end_all(self._tasks)
        assert self._nc is not None
        if self.followers is not None and self.followers.receipts._task is not None:
            await base.end_all([self.followers.receipts._task])
        await self._nc.close()

    async def register(self, *, transport: Any = "nats") -> str:
        """A subscriber and, for NATS, its consumer. Answers when the process knows it."""
        subscriber_id = f"sub_{next(_numbers):032x}"
        event = SubscriberRegistered(
            **head(), subscriber_id=subscriber_id, subscriber_name="gate", transport=transport, owner="usr_1"
        )
        await self.ledger.append(Append(f"ledger.main.subscriber.{subscriber_id}", event, 0))
        self._registered.append(subscriber_id)
        if transport == "nats":
            config = {
                "name": subscriber_id,
                "durable_name": subscriber_id,
                "deliver_policy": "new",
                "ack_policy": "explicit",
                "max_ack_pending": 1000,
            }
            body = json.dumps({"stream_name": REVOCATIONS, "config": config}).encode()
            subject = f"$JS.API.CONSUMER.CREATE.{REVOCATIONS}.{subscriber_id}"
            answer = json.loads((await self.service.request(subject, body)).data)
            assert "error" not in answer, answer
        await self.known(subscriber_id)
        return subscriber_id

    async def remove_all(self) -> None:
        """So that the next test has no silent followers of this one."""
        events = [SubscriberRemoved(**head(), subscriber_id=one) for one in self._registered]
        if events:
            await self.ledger.append(*(Append(f"ledger.main.subscriber.{one.subscriber_id}", one) for one in events))

    async def known(self, follower: str) -> None:
        followers = self.followers
        assert followers is not None
        followers._look.set()
        await until(lambda: follower in followers._known, what="the follower is known")
        consumers = followers._consumers
        if followers._known[follower].transport == "nats":
            await until(lambda: follower in consumers and consumers[follower].floor is not None, what="its floor is")

    async def announce(self, count: int = 1) -> list[int]:
        """Revocations, as the feed announces them; their ledger sequences."""
        seqs = []
        for _ in range(count):
            event = SubscriberRemoved(**head(), subscriber_id="sub_nobody")
            (seq,) = await self.ledger.append(Append("ledger.main.subscriber.sub_nobody", event))
            revoked = Revocation(token_id="tok_1", reason=Reason.ADMIN, revoked_at=START, ledger_seq=seq)
            data = cloud_event("token", revoked, START, "https://issuer.example")
            await self.projector.jetstream().publish("revocations.main.token", msgspec.json.encode(data))
            seqs.append(seq)
        return seqs

    async def fetch(self, subscriber_id: str, batch: int) -> list[Any]:
        pull = await self.service.jetstream().pull_subscribe_bind(subscriber_id, REVOCATIONS)
        try:
            return await pull.fetch(batch, timeout=20)
        finally:
            await pull.unsubscribe()

    async def ask(self, ledger_seq: int | None = None, **wait: Any) -> ReceiptsAnswer:
        return await ask_receipts(self.service, ReceiptsRequest(ledger_seq=ledger_seq, **wait))

    async def standing(self, follower: str, ledger_seq: int | None = None) -> FollowerStanding:
        answer = await self.ask(ledger_seq)
        (found,) = [one for one in answer.followers if one.follower == follower]
        return found

    async def until_acknowledged(self, follower: str, ledger_seq: int) -> FollowerStanding:
        for _ in range(60):
            answer = await self.ask(ledger_seq, followers=(follower,), wait_seconds=1.0)
            found = [one for one in answer.followers if one.follower == follower and one.applied]
            if found:
                return found[0]
        raise AssertionError(f"{follower} has not acknowledged {ledger_seq}: {answer}")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def log_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    async with server_with_streams(tmp_path_factory.mktemp("followers")) as one:
        yield one


@contextlib.asynccontextmanager
async def world_of(server: EmbeddedServer) -> AsyncIterator[World]:
    async with connected(server) as service, connected(server, "projector") as projector:
        made = World(server, service, projector)
        await made.start()
        try:
            yield made
        finally:
            await made.kill()
            await made.remove_all()


@pytest_asyncio.fixture(loop_scope="session")
async def world(log_server: EmbeddedServer) -> AsyncIterator[World]:
    async with world_of(log_server) as made:
        yield made


async def test_acknowledged_revocation_is_applied_at_the_time_of_the_acknowledgement(world):
    gate = await world.register()
    (seq,) = await world.announce()
    assert (await world.standing(gate, seq)).applied is False
    (message,) = await world.fetch(gate, 1)
    before = now_us()
    await message.ack()
    found = await world.until_acknowledged(gate, seq)
    assert found.acknowledged_seq == seq
    assert before <= found.applied_at_us <= now_us()
    assert (found.pending, found.pending_since_us) == (0, None)
    assert found.last_seen_at_us >= before


@pytest.mark.parametrize("body", [b"+ACK", b"+OK", b"+NXT"])
async def test_acknowledgement_in_other_words_counts(world, body):
    gate = await world.register()
    (seq,) = await world.announce()
    (message,) = await world.fetch(gate, 1)
    await world.service.publish(message.reply, body)
    await world.until_acknowledged(gate, seq)


@pytest.mark.parametrize("body", [b"-NAK", b"+WPI", b"+TERM", b"+TERM because"])
async def test_what_is_no_acknowledgement_is_no_receipt(world, body):
    gate = await world.register()
    first, second = await world.announce(2)
    one, other = await world.fetch(gate, 2)
    await world.service.publish(one.reply, body)
    await other.ack()
    other_gate = await world.register()  # what was heard before this one acknowledges was heard
    (third,) = await world.announce()
    await (await world.fetch(other_gate, 1))[0].ack()
    await world.until_acknowledged(other_gate, third)
    world.followers._look.set()
    found = await world.standing(gate, first)
    assert (found.applied, found.acknowledged_seq, found.pending) == (False, None, 3)
    assert not (await world.standing(gate, second)).applied


async def test_acknowledgements_out_of_order_count_when_there_is_no_gap(world):
    gate = await world.register()
    seqs = await world.announce(4)
    messages = await world.fetch(gate, 4)
    for number in (3, 1, 2, 1):
        await world.service.publish(messages[number].reply, b"")
    await world.service.flush()
    found = await world.standing(gate, seqs[3])
    assert (found.applied, found.acknowledged_seq, found.pending) == (False, None, 4)
    await messages[0].ack()
    await world.until_acknowledged(gate, seqs[3])
    times = [(await world.standing(gate, seq)).applied_at_us for seq in seqs]
    assert len(set(times)) == 1  # all were known to be applied when the gap closed


async def test_acknowledging_what_was_not_delivered_is_no_receipt(world):
    gate = await world.register()
    first, second = await world.announce(2)
    (message,) = await world.fetch(gate, 1)
    fields = message.reply.split(".")
    await message.ack()
    await world.until_acknowledged(gate, first)
    stream_seq = int(fields[5])
    for forged in (stream_seq + 1, stream_seq + 2, 2**70):
        await world.service.publish(".".join([*fields[:5], str(forged), *fields[6:]]), b"")
    await world.service.publish(".".join([*fields[:5], "x", *fields[6:]]), b"")
    await world.service.publish(".".join(fields[:6]), b"")
    (third,) = await world.announce()  # the second of the forged ones is there now
    other = await world.register()
    (fourth,) = await world.announce()
    await (await world.fetch(other, 1))[0].ack()
    await world.until_acknowledged(other, fourth)
    found = await world.standing(gate, second)
    assert (found.applied, found.acknowledged_seq, found.pending) == (False, first, 3)
    for one in await world.fetch(gate, 3):
        await one.ack()
    await world.until_acknowledged(gate, third)


async def test_acknowledgement_that_comes_before_the_announcement_was_read_counts(world):
    """The subscriber was faster than this process."""
    gate = await world.register()
    followers = world.followers
    await base.end_all([world._tasks[0]])
    before = now_us()
    (seq,) = await world.announce()
    await (await world.fetch(gate, 1))[0].ack()
    await until(lambda: followers._early, what="it was heard")
    after = now_us()
    world._tasks[0] = asyncio.create_task(base.run(world._nc, followers.fold, (RECEIPTS, REVOCATIONS)))
    found = await world.until_acknowledged(gate, seq)
    assert before <= found.applied_at_us <= after  # when it was heard
    assert followers._early == {}


async def test_made_up_acknowledgements_take_nobody_elses_room(world):
    evil, gate = await world.register(), await world.register()
    followers = world.followers
    await base.end_all([world._tasks[0]])
    (seq,) = await world.announce()
    (message,) = await world.fetch(gate, 1)
    fields = message.reply.split(".")
    for number in range(1_000):
        forged = [*fields[:3], evil, fields[4], str(int(fields[5]) + number), *fields[6:]]
        await world.service.publish(".".join(forged), b"")
    await world.service.flush()
    await message.ack()
    await until(lambda: gate in followers._early, what="it was heard")
    after = now_us()
    world._tasks[0] = asyncio.create_task(base.run(world._nc, followers.fold, (RECEIPTS, REVOCATIONS)))
    assert (await world.until_acknowledged(gate, seq)).applied_at_us <= after


async def test_made_up_acknowledgements_take_no_room(world):
    gate = await world.register()
    (seq,) = await world.announce()
    (message,) = await world.fetch(gate, 1)
    fields = message.reply.split(".")
    stream_seq = int(fields[5])
    for number in range(3_000):
        forged = [*fields[:5], str(stream_seq + 1 + number), *fields[6:]]
        await world.service.publish(".".join(forged), b"")
    await message.ack()
    await world.until_acknowledged(gate, seq)
    early = world.followers._early
    assert len(early[gate]) <= 200
    world.clock_ahead_us += 6 * US
    await world.announce()
    await until(lambda: gate not in world.followers._early, what="what was made up is forgotten")
    await world.announce(3)
    assert (await world.standing(gate)).acknowledged_seq == seq


async def test_killed_between_acknowledgement_and_fold_loses_and_invents_nothing(world):
    gate = await world.register()
    first, second, third = await world.announce(3)
    messages = await world.fetch(gate, 3)
    await messages[0].ack()
    await world.until_acknowledged(gate, first)
    applied_at = (await world.standing(gate, first)).applied_at_us
    consumer = world.followers._consumers[gate]
    floor = consumer.floor
    await messages[1].ack()
    await until(lambda: consumer.floor == floor + 1, what="the acknowledgement was heard")
    await world.kill()  # within the 50 ms in which receipts are gathered, or after: it must not matter
    await world.start()
    found = await world.until_acknowledged(gate, second)
    assert found.acknowledged_seq == second
    assert not (await world.standing(gate, third)).applied
    assert (await world.standing(gate, first)).applied_at_us == applied_at


async def test_receipts_missed_while_nobody_listened_are_filled_in(world):
    gate = await world.register()
    seqs = await world.announce(5)
    messages = await world.fetch(gate, 5)
    await world.kill()
    for message in messages[:3]:
        await message.ack()
    await messages[4].ack()
    await world.service.flush()
    await world.start()
    found = await world.until_acknowledged(gate, seqs[2])
    assert (found.acknowledged_seq, found.pending) == (seqs[2], 2)
    await messages[3].ack()
    # The last one's acknowledgement was not heard here: the server says that it came.
    await world.until_acknowledged(gate, seqs[4])


async def test_restart_without_news_writes_no_receipts(world):
    gate = await world.register()
    (seq,) = await world.announce()
    await (await world.fetch(gate, 1))[0].ack()
    found = await world.until_acknowledged(gate, seq)
    for _ in range(2):
        await world.kill()
        await world.start()
        assert await world.until_acknowledged(gate, seq) == found
    assert world.followers.receipts._task is None


async def test_killed_server_is_survived(world):
    gate = await world.register()
    (first,) = await world.announce()
    await (await world.fetch(gate, 1))[0].ack()
    await world.until_acknowledged(gate, first)
    await kill(world.server)
    await until(lambda: world.service.is_connected and world.projector.is_connected, what="they are connected again")
    (second,) = await world.announce()
    await (await world.fetch(gate, 1))[0].ack()
    found = await world.until_acknowledged(gate, second)
    assert found.acknowledged_seq == second


async def test_fifty_followers_are_told_apart(world):
    gates = [await world.register() for _ in range(50)]
    seqs = await world.announce(3)
    for number, gate in enumerate(gates):
        for message in (await world.fetch(gate, 3))[: number % 4]:
            await message.ack()
    answer = None
    for _ in range(60):
        answer = await world.ask(seqs[0], followers=tuple(gates), wait_seconds=1.0)
        found = {one.follower: one.acknowledged_seq for one in answer.followers}
        expected = [None, *seqs]
        if [found[gate] for gate in gates] == [expected[number % 4] for number in range(50)]:
            break
    else:
        raise AssertionError(answer)
    applied = [gate for gate in gates if next(one for one in answer.followers if one.follower == gate).applied]
    assert len(applied) == sum(1 for number in range(50) if number % 4)
    assert answer.announced_at_us is not None


async def test_follower_is_not_behind_what_was_before_it(world):
    await world.announce(2)
    gate = await world.register()
    found = await world.standing(gate)
    assert (found.pending, found.acknowledged_seq, found.silent_since_us) == (0, None, None)


async def test_http_follower_is_heard_of_by_its_signs_of_life(world):
    gate = await world.register(transport="http")
    assert (await world.standing(gate)).last_seen_at_us is None
    signs = SignsOfLife(world.service)
    signs.heard(gate)
    followers = world.followers
    await until(lambda: gate in followers._seen_us, what="it was heard of")
    assert (await world.standing(gate)).last_seen_at_us is not None
    signs.stop()


async def test_silent_follower_is_an_alarm_once_and_so_is_its_return(world):
    gate = await world.register()
    followers = world.followers
    with structlog.testing.capture_logs() as logs:
        world.clock_ahead_us += 61 * US
        followers._look.set()
        await until(lambda: gate in followers._silent, what="it is silent")
        found = await world.standing(gate)
        assert found.silent_since_us is not None
        followers._look.set()
        followers._asked_us.clear()
        (seq,) = await world.announce()
        await (await world.fetch(gate, 1))[0].ack()
        await world.until_acknowledged(gate, seq)
        followers._look.set()
        await until(lambda: gate not in followers._silent, what="it is back")
    told = [(one["event"], one["log_level"]) for one in logs if one.get("follower") == gate]
    assert told == [("follower_silent", "error"), ("follower_back", "info")]


async def test_follower_that_applies_nothing_is_silent_although_it_is_heard_of(world):
    gate = await world.register()
    await world.announce()
    followers = world.followers
    await world.fetch(gate, 1)
    world.clock_ahead_us += 61 * US
    followers._see(gate)
    found = await world.standing(gate)
    assert found.silent_since_us == found.pending_since_us
    assert found.pending == 1


async def test_fetch_that_waits_for_long_is_a_sign_of_life(world):
    gate = await world.register()
    followers = world.followers
    body, inbox = json.dumps({"batch": 1, "expires": 300 * 10**9}).encode(), world.service.new_inbox()
    await world.service.subscribe(inbox)
    await world.service.publish(f"$JS.API.CONSUMER.MSG.NEXT.{REVOCATIONS}.{gate}", body, reply=inbox)
    await until(lambda: gate in followers._seen_us, what="it was heard")
    world.clock_ahead_us += 61 * US
    followers._look.set()
    await until(
        lambda: followers._seen_us[gate] > followers._heard_since_us + 60 * US, what="the server says that it waits"
    )
    assert (await world.standing(gate)).silent_since_us is None


async def test_removed_follower_is_nobody(world):
    gate = await world.register(transport="http")
    event = SubscriberRemoved(**head(), subscriber_id=gate)
    await world.ledger.append(Append(f"ledger.main.subscriber.{gate}", event))
    followers = world.followers
    followers._look.set()
    await until(lambda: gate not in followers._known, what="it is forgotten")
    assert gate not in [one.follower for one in (await world.ask()).followers]


async def test_last_receipt_is_carried_forward_before_it_leaves_the_stream(world):
    gate = await world.register(transport="http")
    (seq,) = await world.announce()
    world.followers.receipts.record(gate, seq)
    found = await world.until_acknowledged(gate, seq)
    before = world.followers.fold.followers[gate].recorded_at_ns
    world.clock_ahead_us += 7 * 3600 * US
    world.followers._look.set()
    steps = world.followers.fold.followers[gate]
    position = world.followers.fold.position(RECEIPTS)
    await until(lambda: world.followers.fold.position(RECEIPTS) > position, what="it was written again")
    assert steps.recorded_at_ns > before
    after = await world.standing(gate, seq)
    assert after.applied_at_us == found.applied_at_us


async def test_webhook_is_silent_only_if_something_waits_for_it(world):
    webhook_id = f"whk_{next(_numbers):032x}"
    about = WebhookMetadata(webhook_name="hook", owner="usr_1", origin="https://example.com")
    event = WebhookRegistered(**head(), webhook_id=webhook_id, webhook=about)
    await world.ledger.append(Append(f"ledger.main.webhook.{webhook_id}", event, 0))
    await world.known(webhook_id)
    world.clock_ahead_us += 61 * US
    assert (await world.standing(webhook_id)).silent_since_us is None
    await world.announce()
    world.clock_ahead_us += 61 * US
    followers = world.followers
    await until(lambda: followers._standing(webhook_id).silent_since_us is not None, what="it is silent")


async def test_position_is_handed_on_with_its_age_and_seldom_asked_for(world):
    asked, told = 0, FeedPosition(feed="f", ledger_seq=7, stream_seq=3, age_ms=40.0)

    async def announcer(message: Msg) -> None:
        nonlocal asked
        asked += 1
        await message.respond(msgspec.json.encode(told))

    assert await _position(world) is None  # nobody announces
    announcing = await world.projector.subscribe("feed.position", cb=announcer)
    await world.projector.flush()
    began = boot_time_ns()
    deadline = time.monotonic() + 60
    while await _position(world) is None:
        assert time.monotonic() < deadline
    asked, ages = 0, []
    for _ in range(50):
        position = await _position(world)
        assert msgspec.structs.replace(position, age_ms=40.0) == told
        ages.append(position.age_ms)
    passed_ms = (boot_time_ns() - began) / 1e6
    assert asked <= 1 + passed_ms / 100
    assert all(40.0 <= age <= 41.0 + passed_ms for age in ages)
    await announcing.unsubscribe()
    await world.projector.flush()
    deadline = time.monotonic() + 60
    while await _position(world) is not None:
        assert time.monotonic() < deadline, "what nobody says any more is told"


async def _position(world: World) -> FeedPosition | None:
    """What the process tells subscribers now; None if it says nothing to one question."""
    with contextlib.suppress(TimeoutError):
        reply = await world.service.request("feed.asked", b"", timeout=0.5)
        return msgspec.json.decode(reply.data, type=FeedPosition)
    return None


async def test_question_that_cannot_be_read_is_answered_like_the_general_one(world):
    for body in (b"", b"{", b'{"ledger_seq": -1}', b'{"wait_seconds": 99}', b"\xff"):
        reply = await world.service.request("feed.receipts", body, timeout=20)
        assert json.loads(reply.data)["complete"] is True


async def test_announcements_that_retention_took_from_a_follower_are_not_applied(tmp_path: Path) -> None:
    """The server's floor passes them: until the follower acknowledges what comes behind, that is not its word."""
    async with server_with_streams(tmp_path) as server, world_of(server) as world, connected(server, "admin") as admin:
        gate = await world.register()
        first, *_, lost, kept = await world.announce(7)
        messages = await world.fetch(gate, 7)
        await messages[0].ack()
        await world.until_acknowledged(gate, first)
        config = streams.stream_configs(LIMITS)[REVOCATIONS]
        for most in (1, -1):
            body = json.dumps(config | {"max_msgs": most}).encode()
            answer = json.loads((await admin.request(f"$JS.API.STREAM.UPDATE.{REVOCATIONS}", body)).data)
            assert "error" not in answer, answer
        for message in messages[1:]:
            await message.nak()
        (left,) = await world.fetch(gate, 1)
        info = json.loads((await admin.request(f"$JS.API.CONSUMER.INFO.{REVOCATIONS}.{gate}", b"")).data)
        assert info["ack_floor"]["stream_seq"] > 1, "the server's floor has passed them"
        followers = world.followers
        followers._asked_us.clear()
        followers._look.set()
        await until(lambda: followers._consumers[gate].floor == info["ack_floor"]["stream_seq"], what="it was asked")
        followers.receipts.record("sub_after", 1)
        await until(lambda: "sub_after" in followers.fold.followers, what="what was recorded before is folded")
        found = await world.standing(gate, lost)
        assert (found.applied, found.acknowledged_seq) == (False, first)
        await left.ack()
        await world.until_acknowledged(gate, kept)


async def test_process_that_still_reads_receipts_leaves_the_answers_to_another(world):
    await base.end_all([world._tasks[0]])
    world.followers.fold.reset()
    other = World(world.server, world.service, world.projector)
    await other.start()
    try:
        for _ in range(20):
            assert (await world.ask()).complete
    finally:
        await other.kill()


async def test_service_that_stands_on_another_log_forgets_the_receipts(tmp_path: Path):
    """A restored backup: the feed's stream was made anew, so that its sequences mean something else."""
    async with server_with_streams(tmp_path) as server, world_of(server) as world, connected(server, "admin") as admin:
        gate = await world.register(transport="http")
        (seq,) = await world.announce()
        world.followers.receipts.record(gate, seq + 1000)
        await world.until_acknowledged(gate, seq)
        await world.kill()
        config = json.dumps(streams.stream_configs(LIMITS)[REVOCATIONS]).encode()
        for verb in ("DELETE", "CREATE"):
            answer = await admin.request(f"$JS.API.STREAM.{verb}.{REVOCATIONS}", config if verb == "CREATE" else b"")
            assert "error" not in json.loads(answer.data)
        await world.start()
        await world.known(gate)
        (seq,) = await world.announce()
        found = await world.standing(gate, seq)
        assert (found.acknowledged_seq, found.applied) == (None, False)
