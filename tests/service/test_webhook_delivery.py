"""How webhooks are delivered, against a real nats-server: what fails, what is missing, who has received up to where."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import structlog.testing
from msgspec.structs import replace

from events import codec
from events.errors import LedgerUnavailable
from events.ledger import Append, Ledger
from events.server import EmbeddedServer
from events.streams import RECEIPTS, REVOCATIONS, Connection, direct, stream_configs
from events.types import (
    Reason,
    TokenRevoked,
    WebhookChanged,
    WebhookMetadata,
    WebhookRegistered,
    WebhookRemoved,
)
from projections.revocations import Known, cloud_event, revocation
from service.keys import MasterKey
from service.rules.webhooks import Sealed, WebhookSecret
from service.settings import Settings
from service.tokens import new_id, now, uuid7_hex
from service.webhooks import backoff, consumers
from service.webhooks.attempts import Attempt, attempts, last_attempt
from service.webhooks.delivery import Deliverer
from service.webhooks.signatures import new_secret
from service.webhooks.store import Webhook, WebhookStore
from tests import receivers
from tests.logs import LIMITS, connected, kill, server_with_streams, until
from tests.receivers import Receiver

ISSUER = "https://ledger.example"
MASTER = MasterKey(bytes(32))


class World:
    """A log with a feed, and deliverers that come and go."""

    def __init__(self, server: EmbeddedServer, directory: Path, *connections: Connection) -> None:
        self.server = server
        self.service, self.projector, self.admin = connections
        self.ledger = Ledger(self.service)
        self.store = WebhookStore(self.service, self.ledger, MASTER)
        self.settings = Settings(
            data_dir=directory,
            issuer=ISSUER,
            webhook_allowed_networks=(ipaddress.ip_network("127.0.0.0/8"),),
        )
        self._registered: list[str] = []

    @contextlib.asynccontextmanager
    async def delivering(self, **changes: Any) -> AsyncIterator[Deliverer]:
        """A process that delivers, with a connection of its own."""
        async with connected(self.server) as nc:
            deliverer, stop = Deliverer(nc, replace(self.settings, **changes), MASTER), asyncio.Event()
            task = asyncio.create_task(deliverer.run(stop))
            try:
                yield deliverer
            finally:
                stop.set()
                await task

    async def announce(self) -> int:
        """Something is revoked; its sequence."""
        event = TokenRevoked(
            id=uuid7_hex(),
            occurred_at=now(),
            by="system",
            grant_id=new_id("grt"),
            token_id=new_id("tok"),
            reason=Reason.ADMIN,
        )
        (seq,) = await self.ledger.append(Append(f"ledger.main.grant.{event.grant_id}", event))
        recorded = await self.ledger.get(seq)
        assert recorded is not None
        told = revocation(recorded, Known())
        assert told is not None
        data = msgspec.json.encode(cloud_event(*told, recorded.recorded_at, ISSUER))
        await self.projector.jetstream().publish(f"revocations.main.{told[0]}", data)
        return seq

    async def register(self, receiver: Receiver, **changes: Any) -> str:
        """A webhook of everything that is announced from now on."""
        webhook_id, event_id = new_id("whk"), uuid7_hex()
        sealed = Sealed(
            url=receiver.url(),
            secrets=(WebhookSecret(new_secret()),),
            after=changes.pop("after", await self.ledger.last_seq()),
            cursor=event_id,
        )
        metadata = WebhookMetadata(webhook_name="a", owner="usr_a", origin=receiver.url(""), **changes)
        await self.store.seal(webhook_id, event_id, sealed)
        event = WebhookRegistered(id=event_id, occurred_at=now(), by="system", webhook_id=webhook_id, webhook=metadata)
        await self.ledger.append(Append(f"ledger.main.webhook.{webhook_id}", event, 0))
        self._registered.append(webhook_id)
        return webhook_id

    async def change(self, webhook_id: str, **members: Any) -> None:
        """What is sealed changes; a new cursor if `after` does."""
        webhook, event_id = await self.webhook(webhook_id), uuid7_hex()
        if "after" in members:
            members["cursor"] = event_id
        await self.store.seal(webhook_id, event_id, replace(await self.store.open(webhook), **members))
        event = WebhookChanged(
            id=event_id, occurred_at=now(), by="system", webhook_id=webhook_id, webhook=webhook.metadata
        )
        await self.ledger.append(Append(f"ledger.main.webhook.{webhook_id}", event, webhook.seq))

    async def webhook(self, webhook_id: str) -> Webhook:
        found = await self.store.get(webhook_id)
        assert found is not None
        return found

    async def remove_all(self) -> None:
        for webhook_id in self._registered:
            event = WebhookRemoved(id=uuid7_hex(), occurred_at=now(), by="system", webhook_id=webhook_id)
            await self.ledger.append(Append(f"ledger.main.webhook.{webhook_id}", event))
            await consumers.delete(self.service, webhook_id)

    async def drop(self, leaving: int) -> None:
        """Retention takes all announcements but the newest."""
        config = stream_configs(LIMITS)[REVOCATIONS]
        for max_messages in (leaving, -1):
            body = json.dumps(config | {"max_msgs": max_messages}).encode()
            answer = await self.admin.request(f"$JS.API.STREAM.UPDATE.{REVOCATIONS}", body, timeout=5)
            assert "error" not in json.loads(answer.data)

    async def receipts(self, webhook_id: str) -> list[int]:
        """Up to where the webhook has received everything, as it was recorded."""
        query = {"next_by_subj": "receipts.>", "seq": 1, "batch": 10_000}
        blocks = [codec.decode_receipts(one.data) async for one in direct(self.admin, RECEIPTS, query)]
        return [one.ledger_seq for block in blocks for one in block.receipts if one.follower == webhook_id]


async def wait_for(probe: Any, what: str = "") -> None:
    """Until an asynchronous probe is true."""
    for _ in range(1200):
        if await probe():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"not in time: {what or probe}")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[EmbeddedServer, Path]]:
    directory = tmp_path_factory.mktemp("webhooks")
    async with server_with_streams(directory) as server:
        yield server, directory


@pytest_asyncio.fixture
async def world(shared: tuple[EmbeddedServer, Path]) -> AsyncIterator[World]:
    server, directory = shared
    async with (
        connected(server) as service,
        connected(server, "projector") as projector,
        connected(server, "admin") as admin,
    ):
        made = World(server, directory, service, projector, admin)
        try:
            yield made
        finally:
            await made.remove_all()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed attempts are repeated after hundredths of a second."""
    monkeypatch.setattr(backoff, "SCHEDULE_SECONDS", (0.05,))


# What is missing


def kinds(receiver: Receiver) -> list[str]:
    return [one.event["type"] for one in list(receiver.received)]


SNAPSHOT, REVOKED = "token-ledger.snapshot.required.v1", "token-ledger.token.revoked.v1"


async def test_webhook_that_missed_what_was_dropped_is_told_to_take_a_snapshot(world: World) -> None:
    with Receiver() as receiver:
        webhook_id = await world.register(receiver)
        async with world.delivering():
            first = await world.announce()
            await until(lambda: receiver.seqs() == {first})
        dropped = [await world.announce() for _ in range(3)]
        left = [await world.announce() for _ in range(2)]
        await world.drop(leaving=2)
        async with world.delivering():
            await until(lambda: receiver.seqs() == {first, *left})
        assert not receiver.seqs() & set(dropped)
        behind = next(one for one in receiver.received if one.event["id"] == str(left[0]))
        asked = [one for one in receiver.received if one.event["type"] == SNAPSHOT]
        assert len(asked) == 1
        assert receiver.received.index(asked[0]) < receiver.received.index(behind)
        assert asked[0].event["data"] == {"ledger_seq": left[0], "snapshot": f"{ISSUER}/v1/revocations/snapshot"}
        count = len(receiver.received)
        async with world.delivering():
            last = await world.announce()
            await until(lambda: last in receiver.seqs())
        assert kinds(receiver)[count:] == [REVOKED]
        assert webhook_id


async def test_webhook_whose_snapshot_message_was_not_delivered_is_told_again(world: World) -> None:
    """The process ends between the two."""
    with Receiver() as receiver:
        await world.register(receiver)
        async with world.delivering():
            await until_received(world, receiver)
        for _ in range(3):
            await world.announce()
        await world.drop(leaving=1)
        receiver.statuses = [500]
        count = len(receiver.received)
        async with world.delivering():
            await until(lambda: len(receiver.received) > count)
        async with world.delivering():
            await until(lambda: REVOKED in kinds(receiver)[count:])
        assert kinds(receiver)[count:] == [SNAPSHOT, SNAPSHOT, REVOKED]
        assert len(set(receiver.ids()[count:])) == 2


async def until_received(world: World, receiver: Receiver) -> int:
    seq = await world.announce()
    await until(lambda: seq in receiver.seqs())
    return seq


async def test_redelivery_from_what_was_dropped_begins_with_a_snapshot(world: World) -> None:
    with Receiver() as receiver:
        webhook_id = await world.register(receiver)
        async with world.delivering():
            for _ in range(3):
                seq = await until_received(world, receiver)
            await world.drop(leaving=1)
            count = len(receiver.received)
            await world.change(webhook_id, after=0)
            await until(lambda: len(receiver.received) == count + 2)
        assert kinds(receiver)[count:] == [SNAPSHOT, REVOKED]
        assert receiver.received[-1].event["id"] == str(seq)


async def test_redelivery_from_later_leaves_out_nothing_that_waits(world: World, soon: None) -> None:
    with Receiver(receivers.answering(receivers.status(500))) as receiver:
        webhook_id = await world.register(receiver)
        async with world.delivering():
            waiting = {await world.announce() for _ in range(3)}
            await until(lambda: receiver.seqs() == waiting)
            receiver.received.clear()
            await world.change(webhook_id, after=max(waiting))
            receiver.behave = receivers.answer_ok
            await until(lambda: receiver.seqs() == waiting)
            await wait_for(lambda: pending(world, webhook_id, 0))


async def pending(world: World, webhook_id: str, count: int) -> bool:
    progress = await consumers.progress(world.service, webhook_id)
    return progress is not None and progress.pending == count


# Receivers that fail


async def test_webhook_that_fails_for_too_long_is_disabled_with_an_alarm(world: World, soon: None) -> None:
    with Receiver(receivers.answering(receivers.status(503))) as receiver:
        webhook_id = await world.register(receiver)
        with structlog.testing.capture_logs() as lines:
            async with world.delivering(webhook_failing_hours_max=0) as deliverer:
                await world.announce()
                await until(lambda: deliverer.disabled == 1)
        assert (await world.webhook(webhook_id)).metadata.disabled_reason == "failing"
        alarms = [line for line in lines if line.get("alarm")]
        assert [(line["event"], line["webhook_id"]) for line in alarms] == [("webhook_disabled", webhook_id)]
        tried = [one for _, one in await attempts(world.service, webhook_id, before=None, limit=100)]
        assert tried[-1].number == 1
        assert {one.failing_since for one in tried} == {tried[-1].at}


async def test_failing_is_remembered_over_a_restart(world: World, soon: None) -> None:
    with Receiver(receivers.answering(receivers.status(500))) as receiver:
        webhook_id = await world.register(receiver)
        for _ in range(2):
            count = len(receiver.received)
            async with world.delivering():
                await world.announce()
                await until(lambda count=count: len(receiver.received) > count + 2)
        tried = [one for _, one in await attempts(world.service, webhook_id, before=None, limit=1000)]
        assert len({one.failing_since for one in tried}) == 1
        assert max(one.number for one in tried) > 2


async def test_time_in_which_nobody_tried_does_not_count_as_failing(world: World) -> None:
    at = now()
    with Receiver() as receiver:
        for silent, counts_from in ((timedelta(days=4), timedelta(hours=1)), (timedelta(hours=1), timedelta(hours=2))):
            webhook_id = await world.register(receiver)
            last = Attempt(
                message_id="a",
                number=9,
                at=at - silent,
                outcome="failed",
                seconds=0.1,
                failing_since=at - silent - timedelta(hours=1),
            )
            async with world.delivering() as deliverer:
                deliverer.attempts.record(webhook_id, last)
                await wait_for(lambda webhook_id=webhook_id: tried(world, webhook_id))
                await until(lambda webhook_id=webhook_id: webhook_id in deliverer._runners)
                assert await deliverer._runners[webhook_id]._failing_before(at) == at - counts_from


async def tried(world: World, webhook_id: str) -> bool:
    return await last_attempt(world.service, webhook_id) is not None


async def test_receiver_that_recovers_gets_all_that_waited(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would have been tried again in minutes is not."""
    monkeypatch.setattr(backoff, "SCHEDULE_SECONDS", (0.1, 600.0))
    monkeypatch.setattr(backoff, "_RECOVERED_SECONDS", 0.1)
    with Receiver(receivers.answering(receivers.status(500))) as receiver:
        webhook_id = await world.register(receiver)
        async with world.delivering():
            first = {await world.announce() for _ in range(3)}
            await until(lambda: len(receiver.received) == 6)
            receiver.behave = receivers.answer_ok
            last = await world.announce()
            await until(lambda: len(receiver.received) == 10)
            assert receiver.seqs() == first | {last}
            await wait_for(lambda: pending(world, webhook_id, 0))


async def test_event_that_is_refused_holds_up_no_other(world: World, soon: None) -> None:
    with Receiver() as receiver:
        webhook_id = await world.register(receiver)
        refused = await world.announce()
        receiver.behave = lambda connection, received: connection.sendall(
            receivers.status(400 if received.event["id"] == str(refused) else 204)
        )
        async with world.delivering():
            others = {await world.announce() for _ in range(30)}
            await until(lambda: others <= receiver.seqs())
            await wait_for(lambda: pending(world, webhook_id, 1))
            # A receipt says that everything before it was delivered, too.
            assert [seq for seq in await world.receipts(webhook_id) if seq >= refused] == []
            receiver.behave = receivers.answer_ok
            await wait_for(lambda: received_all(world, webhook_id, max(others)))


async def received_all(world: World, webhook_id: str, seq: int) -> bool:
    return max(await world.receipts(webhook_id), default=0) == seq


async def test_retry_after_is_waited_for(world: World, soon: None) -> None:
    with Receiver() as receiver:
        await world.register(receiver)
        answers = [receivers.status(429, "Retry-After: 1"), receivers.OK]
        receiver.behave = lambda connection, _: connection.sendall(answers.pop(0))
        async with world.delivering():
            await world.announce()
            await until(lambda: len(receiver.received) == 2)
        first, second = receiver.received
        assert second.at - first.at >= 1.0


async def test_slow_receiver_holds_a_bounded_part_of_the_feed(world: World) -> None:
    with receivers.hanging() as slow, Receiver() as fast:
        slow_id, fast_id = await world.register(slow), await world.register(fast)
        async with world.delivering() as deliverer:
            seqs = {await world.announce() for _ in range(50)}
            await until(lambda: fast.seqs() == seqs)
            await wait_for(lambda: pending(world, fast_id, 0))
            assert len(deliverer._runners[slow_id]._held) == consumers.IN_FLIGHT_MAX
            progress = await consumers.progress(world.service, slow_id)
            assert progress is not None
            assert progress.pending == 50
        # Ended, it has given back what it held.
        slow.behave = receivers.answer_ok
        async with world.delivering():
            await until(lambda: slow.seqs() == seqs)


# Processes and servers that fail


async def test_server_that_is_killed_delays_and_loses_nothing(world: World) -> None:
    with Receiver() as receiver:
        await world.register(receiver)
        async with world.delivering():
            seqs = {await until_received(world, receiver)}
            await kill(world.server)
            await wait_for(lambda: connected_again(world))
            seqs |= {await world.announce() for _ in range(5)}
            await until(lambda: receiver.seqs() == seqs, seconds=60)


async def connected_again(world: World) -> bool:
    return world.service.is_connected and world.projector.is_connected


async def test_webhook_that_cannot_be_opened_stops_no_other(world: World) -> None:
    with Receiver() as receiver:
        broken, whole = await world.register(receiver), await world.register(receiver)
        webhook = await world.webhook(broken)
        await world.store.destroy(broken, webhook.event_id)
        with structlog.testing.capture_logs() as lines:
            async with world.delivering():
                await until_received(world, receiver)
        said = [line for line in lines if line["event"] == "webhook_cannot_be_run"]
        assert [line["webhook_id"] for line in said] == [broken]
        assert await consumers.progress(world.service, broken) is None
        await wait_for(lambda: pending(world, whole, 0))


async def test_attempts_are_read_backwards_whatever_lies_between(world: World, soon: None) -> None:
    with Receiver() as receiver, Receiver() as other:
        seldom, often = await world.register(receiver), await world.register(other)
        async with world.delivering():
            first = await until_received(world, receiver)
            await world.change(seldom, after=first)
        await world.service.flush()
        found = await attempts(world.service, often, before=None, limit=10)
        assert [one.ledger_seq for _, one in found] == [first]
        assert await attempts(world.service, often, before=found[0][0], limit=10) == []
        assert await attempts(world.service, new_id("whk"), before=None, limit=10) == []


async def test_change_leaves_one_sealed_record(world: World) -> None:
    """What a webhook was before can be opened by nobody any more once it is disabled."""
    with Receiver(receivers.answering(receivers.status(410))) as receiver:
        webhook_id = await world.register(receiver)
        before = await world.webhook(webhook_id)
        async with world.delivering() as deliverer:
            await world.announce()
            await until(lambda: deliverer.disabled == 1)
        after = await world.webhook(webhook_id)
        assert (await world.store.open(after)).url == receiver.url()
        with pytest.raises(LedgerUnavailable, match="has just changed"):
            await world.store.open(before)


async def test_announcement_that_cannot_be_delivered_is_not_tried_without_a_pause(world: World) -> None:
    with Receiver() as receiver:
        await world.register(receiver)
        with structlog.testing.capture_logs() as lines:
            async with world.delivering():
                await until_received(world, receiver)
                started = time.monotonic()
                await world.projector.jetstream().publish("revocations.main.token", b"not an announcement")
                for _ in range(30):
                    await until_received(world, receiver)
        failed = [line for line in lines if line["event"] == "webhook_not_delivered"]
        await world.announce()
        await world.drop(leaving=1)
        assert 1 <= len(failed) <= time.monotonic() - started + 1
