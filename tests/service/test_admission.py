"""Who may act for a subscriber, and how the nats-server's users follow from what the ledger has registered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from events.errors import LedgerUnavailable
from events.server import SUBSCRIBERS_FILE, new_nkey
from events.streams import REVOCATIONS, connect, stream_configs
from events.types import SubscriberRegistered, SubscriberRemoved
from service import admission as admission_module
from service import subscribers as module
from service.admission import Admission
from service.caller import Caller
from service.errors import NotFound, Unavailable
from service.registry import Asker
from service.subscribers import acting_subscriber, keep_consumers, put_in_force, registered, remove_subscriber
from service.tokens import new_id
from tests.hosts import Host, host
from tests.logs import LIMITS, SECONDS_MAX, connected
from tests.logs import until as until_async
from tests.making import cli, head, tok, usr

ASKER = Asker(None, "request")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def one(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    """A host for tests that leave it as it was."""
    async with host(tmp_path_factory.mktemp("host")) as made:
        yield made


def registration(**changes: Any) -> SubscriberRegistered:
    fields: dict[str, Any] = {
        "subscriber_id": new_id("sub"),
        "subscriber_name": "orders-api",
        "transport": "nats",
        "owner": usr(1),
        "public_key": new_nkey()[1],
    }
    return SubscriberRegistered(**head(), **fields | changes)


def told(event: SubscriberRegistered) -> dict[str, Any]:
    """What its registration was answered."""
    return {"subscriber_id": event.subscriber_id, "transport": event.transport, "after": event.after}


def caller(*scope: str, subject: str = usr(7), client_id: str | None = None) -> Caller:
    return Caller("tl_sat_x", tok(1), subject, client_id, frozenset(scope))


# Acting for a subscriber


@pytest.mark.parametrize(
    "who",
    [
        pytest.param(caller("ledger:subscribe", subject=usr(1)), id="owner"),
        pytest.param(caller("ledger:subscribe", subject=cli(2), client_id=usr(1)), id="client-of-the-owner"),
        pytest.param(caller("ledger:admin"), id="administrator"),
    ],
)
async def test_acting_for_ones_own_subscriber_is_allowed(one: Host, who: Caller) -> None:
    event = registration(transport="http", public_key=None)
    await one.record(event)
    assert (await acting_subscriber(one.runtime, who, event.subscriber_id)).owner == usr(1)


@pytest.mark.parametrize("who", [caller("ledger:subscribe"), caller("ledger:audit")], ids=["another", "auditor"])
async def test_acting_for_anothers_subscriber_is_refused(one: Host, who: Caller) -> None:
    event = registration(transport="http", public_key=None)
    await one.record(event)
    await acting_subscriber(one.runtime, caller("ledger:admin"), event.subscriber_id)  # now it is remembered
    with pytest.raises(NotFound, match="that you may act for"):
        await acting_subscriber(one.runtime, who, event.subscriber_id)


@pytest.mark.parametrize("name", ["sub_" + "0" * 32, "sub_x", "", "*", ">", "whk_" + "0" * 32])
async def test_acting_for_a_subscriber_that_is_none_is_refused(one: Host, name: str) -> None:
    with pytest.raises(NotFound):
        await acting_subscriber(one.runtime, caller("ledger:admin"), name)


async def test_acting_for_a_removed_subscriber_is_refused_within_a_second(
    one: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = registration(transport="http", public_key=None)
    await one.record(event)
    await acting_subscriber(one.runtime, caller("ledger:admin"), event.subscriber_id)
    await one.record(SubscriberRemoved(**head(), subscriber_id=event.subscriber_id))
    monkeypatch.setattr(module, "_KNOWN_SECONDS", 0.0)
    with pytest.raises(NotFound, match="was removed"):
        await acting_subscriber(one.runtime, caller("ledger:admin"), event.subscriber_id)


async def test_subscribers_that_are_remembered_are_bounded(one: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KNOWN_MAX", 2)
    for _ in range(5):
        event = registration(transport="http", public_key=None)
        await one.record(event)
        await acting_subscriber(one.runtime, caller("ledger:admin"), event.subscriber_id)
        assert len(one.runtime.subscribers) <= 2


# Letting them in


@contextlib.asynccontextmanager
async def admitting(one: Host) -> AsyncIterator[Admission]:
    """What `up` does beside its own nats-server."""
    async with connected(one.server, "admin") as nc:
        admission = Admission(one.server, nc)
        await admission.serve()
        yield admission


def let_in(one: Host) -> set[str]:
    """Whom the server has let in: written once it has read its configuration again."""
    with contextlib.suppress(FileNotFoundError):
        return set(json.loads((one.server.directory / SUBSCRIBERS_FILE).read_bytes()).values())
    return set()


async def test_registered_subscriber_is_let_in_with_its_consumer(tmp_path: Path) -> None:
    async with host(tmp_path) as one, admitting(one):
        seed, public_key = new_nkey()
        event = registration(public_key=public_key)
        await one.record(event)
        assert await put_in_force(one.runtime, told(event)) == {"in_force": True}
        seed_file = tmp_path / f"{event.subscriber_id}.nk"
        seed_file.write_text(seed)
        nc = await connect(one.server.url, seed_file, name="test")
        info = await nc.request(f"L.API.CONSUMER.INFO.REVOCATIONS.{event.subscriber_id}")
        config = json.loads(info.data)["config"]
        assert (config["durable_name"], config["ack_policy"], config["max_ack_pending"]) == (
            event.subscriber_id,
            "explicit",
            1000,
        )
        assert {name for name in ("filter_subject", "filter_subjects", "inactive_threshold") if name in config} == set()
        await nc.close()


async def test_many_at_once_are_all_let_in(tmp_path: Path) -> None:
    async with host(tmp_path) as one, admitting(one):
        events = [registration() for _ in range(20)]

        async def register(event: SubscriberRegistered) -> dict[str, Any]:
            await one.record(event)
            return await put_in_force(one.runtime, told(event))

        answers = await asyncio.gather(*(register(event) for event in events))
        assert answers == [{"in_force": True}] * 20
        assert let_in(one) == {event.public_key for event in events}


async def test_servers_that_nobody_here_runs_are_the_operators_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_NOBODY_ANSWERS_SECONDS", 0.1)
    async with host(tmp_path) as one:
        event = registration()
        await one.record(event)
        answer = await put_in_force(one.runtime, told(event))
        assert answer["in_force"] is False
        assert "token-ledger nats-config --subscribers" in answer["to_do"]
        async with connected(one.server, "admin") as nc:  # its consumer is there all the same
            info = await nc.request(f"$JS.API.CONSUMER.INFO.REVOCATIONS.{event.subscriber_id}")
            assert json.loads(info.data)["name"] == event.subscriber_id


async def test_change_that_the_server_refuses_is_told_and_leaves_the_others_in(tmp_path: Path) -> None:
    async with host(tmp_path) as one, admitting(one):
        good, bad = registration(), registration(public_key="U" + "A" * 55)  # its checksum is wrong
        await one.record(good)
        assert (await put_in_force(one.runtime, told(good)))["in_force"]
        await one.record(bad)
        answer = await put_in_force(one.runtime, told(bad))
        assert (answer["in_force"], "has not taken it over yet" in answer["to_do"]) == (False, True)
        assert let_in(one) == {good.public_key}
        # Once it is gone, all is well again.
        await one.record(SubscriberRemoved(**head(), subscriber_id=bad.subscriber_id))
        another = registration()
        await one.record(another)
        assert (await put_in_force(one.runtime, told(another)))["in_force"]
        assert let_in(one) == {good.public_key, another.public_key}


async def test_removal_that_the_server_has_not_taken_over_is_told_and_repeated(tmp_path: Path) -> None:
    async with host(tmp_path) as one, admitting(one):
        event, bad = registration(), registration(public_key="U" + "A" * 55)
        await one.record(event)
        await put_in_force(one.runtime, told(event))
        await one.record(bad)  # from now on the server refuses its configuration
        await one.project()

        async def remove() -> dict[str, Any]:
            removing = asyncio.create_task(remove_subscriber(one.runtime, ASKER, event.subscriber_id))
            while not removing.done():
                await one.project()
                await asyncio.sleep(0.01)
            return await removing

        with pytest.raises(Unavailable, match="has not taken it over yet"):
            await remove()
        assert let_in(one) == {event.public_key}
        assert event.subscriber_id not in [one.subscriber_id for one in await registered(one.runtime)]
        await one.record(SubscriberRemoved(**head(), subscriber_id=bad.subscriber_id))
        done = await remove()
        assert (done["in_force"], let_in(one)) == (True, set())


async def test_what_could_not_be_taken_over_is_tried_again_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "KEEP_SECONDS", 0.05)
    async with host(tmp_path) as one, connected(one.server, "admin") as nc:
        event = registration()
        await one.record(event)
        keeping = asyncio.create_task(Admission(one.server, nc).keep())
        await until_async(lambda: let_in(one) == {event.public_key}, what="it is let in")
        await one.record(SubscriberRemoved(**head(), subscriber_id=event.subscriber_id))
        await until_async(lambda: let_in(one) == set(), what="it is no more")
        keeping.cancel()


async def test_subscriber_that_takes_too_many_connections_is_shut_out_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server limits only those of all together: one could keep the others out."""
    monkeypatch.setattr(admission_module, "CONNECTIONS_EACH_MAX", 3)
    monkeypatch.setattr(admission_module, "KEEP_SECONDS", 0.05)
    async with host(tmp_path) as one, connected(one.server, "admin") as admin, contextlib.AsyncExitStack() as stack:
        seeds, events = [], []
        for _ in range(2):
            seed, public_key = new_nkey()
            seeds.append(tmp_path / f"{len(seeds)}.nk")
            seeds[-1].write_text(seed)
            events.append(registration(public_key=public_key))
            await one.record(events[-1])
        greedy, modest = events
        keeping = asyncio.create_task(Admission(one.server, admin).keep())
        await until_async(lambda: let_in(one) == {greedy.public_key, modest.public_key}, what="both are let in")

        async def open_connection(number: int) -> None:
            nc = await connect(one.server.url, seeds[number], name="test")

            async def end() -> None:
                # One that the server has ended may be trying to come again: the client ends that by a cancellation.
                with contextlib.suppress(asyncio.CancelledError):
                    await nc.close()

            stack.push_async_callback(end)

        monkeypatch.setattr(admission_module, "SHUT_OUT_SECONDS", 10**6)
        for _ in range(3):
            await open_connection(1)
        # On a busy host one attempt may be two connections, and the last one may be ended before it is open.
        with contextlib.suppress(LedgerUnavailable):
            for _ in range(4):
                await open_connection(0)
        await until_async(lambda: let_in(one) == {modest.public_key}, what="it is shut out, and nobody else")
        keeping.cancel()
        monkeypatch.setattr(admission_module, "SHUT_OUT_SECONDS", 0.0)
        # Its connections are ended; what was shut out is let in again afterwards.
        again = asyncio.create_task(Admission(one.server, admin).keep())
        await until_async(lambda: let_in(one) == {greedy.public_key, modest.public_key}, what="it is let in again")
        again.cancel()


async def test_registration_repeated_after_its_removal_puts_nothing_in_force(tmp_path: Path) -> None:
    async with host(tmp_path) as one, admitting(one):
        event = registration()
        await one.record(event, SubscriberRemoved(**head(), subscriber_id=event.subscriber_id))
        answer = await put_in_force(one.runtime, told(event))
        assert (answer["in_force"], "was removed" in answer["to_do"]) == (False, True)
        assert let_in(one) == set()


# Their consumers


async def test_subscriber_away_for_too_long_sees_by_the_sequence_what_was_dropped(tmp_path: Path) -> None:
    """README: sequences have no gaps, so one that it sees is what was dropped meanwhile."""
    async with host(tmp_path) as one, connected(one.server, "admin") as admin, admitting(one):
        seed, public_key = new_nkey()
        event = registration(public_key=public_key)
        await one.record(event)
        assert (await put_in_force(one.runtime, told(event)))["in_force"]
        async with connected(one.server, "projector") as projector:
            for number in range(10):
                await projector.jetstream().publish("revocations.main.grant", str(number).encode())
        seed_file = tmp_path / f"{event.subscriber_id}.nk"
        seed_file.write_text(seed)
        nc = await connect(one.server.url, seed_file, name="test")
        feed = await nc.jetstream(prefix="L.API").pull_subscribe_bind(event.subscriber_id, stream=REVOCATIONS)
        seqs = []
        for _ in range(2):
            [message] = await feed.fetch(1, timeout=SECONDS_MAX)
            await message.ack_sync(timeout=SECONDS_MAX)
            seqs.append(message.metadata.sequence.stream)
        config = stream_configs(LIMITS)[REVOCATIONS] | {"max_msgs": 4}
        await admin.request(f"$JS.API.STREAM.UPDATE.{REVOCATIONS}", json.dumps(config).encode())
        [message] = await feed.fetch(1, timeout=SECONDS_MAX)
        assert [*seqs, message.metadata.sequence.stream] == [1, 2, 7]
        await nc.close()


async def test_consumers_that_are_missing_are_made_and_those_of_the_removed_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may die between two steps, and a stream that was made anew has no consumers."""
    monkeypatch.setattr(module, "KEEP_SECONDS", 0.05)
    async with host(tmp_path) as one, connected(one.server, "admin") as admin:

        async def consumers() -> set[str]:
            answer = await admin.request("$JS.API.CONSUMER.NAMES.REVOCATIONS", b'{"offset": 0}')
            return set(json.loads(answer.data)["consumers"] or ())

        async def until_there_are(*events: SubscriberRegistered) -> None:
            deadline = time.monotonic() + SECONDS_MAX
            while await consumers() != {event.subscriber_id for event in events}:
                assert time.monotonic() < deadline

        first, second = registration(), registration()
        over_http = registration(transport="http", public_key=None)
        await one.record(first, second, over_http)
        keeping = asyncio.create_task(keep_consumers(one.runtime))
        await until_there_are(first, second)
        await admin.request(f"$JS.API.CONSUMER.DELETE.REVOCATIONS.{first.subscriber_id}", b"")
        await until_there_are(first, second)
        await one.record(SubscriberRemoved(**head(), subscriber_id=second.subscriber_id))
        await until_there_are(first)
        keeping.cancel()
