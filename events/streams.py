"""Streams and buckets: how they must be configured, how they are reached, made, checked and followed.

This is the only file that knows their configuration. Only the process with the `admin` credentials may make or
change them; every process checks them at its start, since `deny_delete` and `deny_purge` do not stop a change of
configuration from erasing (`max_msgs_per_subject: 1` does).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import nats.errors
import nats.js.errors
from msgspec import Struct
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import api

from events.errors import LedgerError, LedgerUnavailable, UnsafeServer
from events.types import TENANT

LEDGER = "LEDGER"
USAGE = "USAGE"
REVOCATIONS = "REVOCATIONS"
RECEIPTS = "RECEIPTS"  # which follower applied the feed up to where
DELIVERIES = "DELIVERIES"  # attempts to deliver webhooks

SIGNING_KEYS = "signing_keys"  # private halves, sealed under the master key
SUBJECT_KEYS = "subject_keys"  # one key a person or client, sealed under the master key; deleted by erasure
ANSWERS = "answers"  # answers of refreshes, sealed under the presented token, for lost responses
WEBHOOKS = "webhooks"  # their URLs and secrets, sealed under the master key
PUSHED = "pushed"  # authorization requests that clients pushed, each sealed under its request_uri
IDEMPOTENCY = "idempotency"  # what a create was about to do and answer, sealed under the caller's token

MIN_SERVER_VERSION = (2, 15, 0)  # the first whose atomic batch syncs the stream's file once
LEDGER_MESSAGE_BYTES_MAX = 256 * 1024
IDEMPOTENCY_SECONDS = 24 * 3600
DEDUPLICATION_SECONDS = 120
_DELIVERED_MAX = 20_000  # messages held by one follower before it stops reading
_DELIVERED_BYTES_MAX = 16 * 1024**2  # a block of uses has up to 0.9 MB
_FEW_LEFT = 200  # messages in the stream behind a batch: whoever has applied it has caught up
_CLOSE_SECONDS_MAX = 2.0
_DIRECT_SECONDS_MAX = 2.0
_API_AWAY_SECONDS_MAX = 1.0
_API_AWAY_PAUSE_SECONDS = 0.02
_STALLED = "Nats-Consumer-Stalled"
_STORED_HEADERS = b"NATS/1.0\r\n"  # a status of the server, such as a heartbeat, stands in this line
_NS = 1_000_000_000


class StreamLimits(Struct, frozen=True, kw_only=True):
    """What an operator may choose about the streams. Ages in seconds, sizes in bytes, None means unlimited."""

    replicas: int = 1
    usage_age_seconds_max: int = 400 * 86_400
    usage_bytes_max: int = 16 * 1024**3
    ledger_bytes_max: int | None = None
    answers_ttl_seconds: int = 60
    pushed_ttl_seconds: int = 3_600


class RawMessage(Struct, frozen=True, gc=False):
    """A message of a stream as it is stored. `recorded_at_ns`: JetStream's time, nanoseconds since 1970, UTC.

    `left`: how many messages of the stream came after it, when the server sent it.
    """

    seq: int
    recorded_at_ns: int
    subject: str
    data: bytes
    left: int = 0

    @property
    def recorded_at(self) -> datetime:
        """The same time with microseconds."""
        seconds, ns = divmod(self.recorded_at_ns, _NS)
        return datetime.fromtimestamp(seconds, UTC).replace(microsecond=ns // 1000)


class Connection(Client):
    """A NATS client that tells several listeners when its connection is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.reads_headers = True  # of stored messages
        self.holds_back = False
        self.lost_listeners: list[Callable[[], None]] = []
        self.back = asyncio.Event()

    async def _process_headers(self, headers: bytes | None) -> dict[str, str] | None:
        if not self.reads_headers and headers and headers.startswith(_STORED_HEADERS):
            return None
        found: dict[str, str] | None = await super()._process_headers(headers)
        if found and self.holds_back:
            found.pop(_STALLED, None)
        return found

    async def request(  # type: ignore[override]  # what is not named here is passed on
        self,
        subject: str,
        payload: bytes = b"",
        timeout: float = 0.5,  # noqa: ASYNC109 - the client's own name
        **more: Any,
    ) -> Msg:
        """As the client's own, but asks JetStream again when nobody listened.

        While the server takes over a new configuration, its API is away for a moment. Who was not heard was not obeyed.
        """
        ends_at = time.monotonic() + min(timeout, _API_AWAY_SECONDS_MAX)
        while True:
            try:
                return await super().request(subject, payload, timeout, **more)
            except nats.errors.NoRespondersError:
                if not subject.startswith("$JS.API.") or time.monotonic() > ends_at:
                    raise
            await asyncio.sleep(_API_AWAY_PAUSE_SECONDS)

    def hold_back(self, subscription: Any) -> None:
        """Asks the server for more only when what came was taken.

        The client answers flow control at once, and a stalled consumer's heartbeats as well, however much waits: of a
        long stream, all would lie in memory.
        """
        self.holds_back = True
        inner = subscription._sub  # noqa: SLF001 - there is no public way
        state, waiting = inner._jsi, inner._pending_queue  # noqa: SLF001 - as above
        state.get_js_delivered = lambda: state._fciseq - waiting.qsize()  # noqa: SLF001 - as above

    @staticmethod
    def _parse_header_lines(raw: bytes) -> dict[str, str]:
        """The client's own looks at every character of every name, which was half the time of a replay."""
        pairs = (line.partition(":") for line in raw.decode("utf-8", "replace").split("\r\n"))
        return {name: value.strip() for name, colon, value in pairs if colon}

    async def close(self) -> None:
        """Ends the connection, whether the server is there or not."""
        if not self.is_connected:
            # It would be written to a broken pipe, whose error would leave everything else open.
            self._pending, self._pending_data_size = [], 0
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(super().close(), _CLOSE_SECONDS_MAX)

    async def tell_lost(self) -> None:
        self.back.clear()
        for listener in self.lost_listeners:
            listener()

    async def tell_back(self) -> None:
        self.back.set()


def _credentials(creds: Path | None) -> dict[str, Any]:
    """Options of the client."""
    if creds is None:
        return {}
    text = creds.read_text()
    if "BEGIN NATS USER JWT" in text:
        return {"user_credentials": str(creds)}
    inbox = {"inbox_prefix": f"_INBOX_{creds.stem}"} if creds.suffix == ".nk" else {}
    return {"nkeys_seed_str": text.strip()} | inbox


async def connect(
    url: str,
    creds: Path | None,
    *,
    name: str,
    reads_headers: bool = True,
    on_error: Callable[[Exception], Awaitable[None]] | None = None,
    seconds_max: float = 5,
    attempts: int = 4,
) -> Connection:
    """A connection that reconnects for ever, once made within `seconds_max`.

    `url` may list several servers, separated by commas.

    `reads_headers`: a connection that only follows needs none of what is stored, and reads a fifth faster without.

    `creds` is an nkey seed file or a `.creds` file. Seed files are named after their role or their subscriber's id,
    which may only listen on its own inbox: `_INBOX_<role>`, `_INBOX_<id>`.

    Raises: LedgerUnavailable
    """
    connection = Connection()
    connection.reads_headers = reads_headers
    problem, connected = "", False

    async def note(error: Exception) -> None:
        # Errors on the wire reach callers through their own requests; the client reconnects by itself.
        nonlocal problem
        if connected:
            if on_error is not None:
                await on_error(error)
            return
        problem = str(error) or type(error).__name__
        if "authorization" in problem.lower():
            raise error  # out of the client's loop, which would be refused for ever

    try:
        # With unlimited attempts, which are for reconnecting, the client would try the first time for ever as well.
        first = connection.connect(
            servers=[part.strip() for part in url.split(",")],
            name=name,
            allow_reconnect=True,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.1,  # type: ignore[arg-type]  # seconds; fractions work
            connect_timeout=3,
            ping_interval=5,
            max_outstanding_pings=2,
            error_cb=note,
            disconnected_cb=connection.tell_lost,
            reconnected_cb=connection.tell_back,
            **_credentials(creds),
        )
        await asyncio.wait_for(first, seconds_max)
    except (nats.errors.Error, OSError, TimeoutError) as error:
        with contextlib.suppress(Exception):
            await connection.close()
        if attempts > 1 and "reset" in (problem or str(error)).lower():
            # A server that refuses credentials closes at once, and its reason may be lost with the connection.
            left: dict[str, Any] = {"seconds_max": seconds_max, "attempts": attempts - 1}
            return await connect(url, creds, name=name, reads_headers=reads_headers, on_error=on_error, **left)
        raise LedgerUnavailable(f"cannot reach the nats-server at {url}: {problem or error}") from error
    connected = True
    connection.back.set()
    return connection


def stream_configs(limits: StreamLimits) -> dict[str, dict[str, Any]]:
    """Every stream and bucket by name, as the server reports it: whole, so that any change shows."""
    ledger = _stream(LEDGER, ["ledger.>"], limits) | {
        "discard": "new",
        "max_bytes": limits.ledger_bytes_max or -1,
        "max_msg_size": LEDGER_MESSAGE_BYTES_MAX,
    }
    usage = _stream(USAGE, ["usage.>"], limits) | {
        "discard": "old",
        "max_bytes": limits.usage_bytes_max,
        "max_age": limits.usage_age_seconds_max * _NS,
    }
    revocations = _stream(REVOCATIONS, ["revocations.>"], limits) | {
        "discard": "old",
        "max_bytes": 1024**3,
        "max_age": 400 * 86_400 * _NS,
    }
    receipts = _stream(RECEIPTS, ["receipts.>"], limits) | {
        "discard": "old",
        "max_bytes": 64 * 1024**2,  # all of it is read when the process that answers from it starts
        "max_age": 30 * 86_400 * _NS,
    }
    deliveries = _stream(DELIVERIES, ["deliveries.>"], limits) | {
        "discard": "old",
        "max_bytes": 256 * 1024**2,
        "max_age": 30 * 86_400 * _NS,
        "max_msgs_per_subject": 10_000,  # so that one webhook that fails does not take the others' place
        "max_msg_size": LEDGER_MESSAGE_BYTES_MAX,
    }
    buckets = [
        _bucket(SIGNING_KEYS, limits, bytes_max=64 * 1024**2),
        _bucket(SUBJECT_KEYS, limits, bytes_max=8 * 1024**3),
        _bucket(WEBHOOKS, limits, bytes_max=64 * 1024**2),
        _bucket(ANSWERS, limits, bytes_max=1024**3, ttl_seconds=limits.answers_ttl_seconds),
        _bucket(PUSHED, limits, bytes_max=1024**3, ttl_seconds=limits.pushed_ttl_seconds),
        _bucket(IDEMPOTENCY, limits, bytes_max=1024**3, ttl_seconds=IDEMPOTENCY_SECONDS),
    ]
    return {config["name"]: config for config in [ledger, usage, revocations, receipts, deliveries, *buckets]}


def _stream(name: str, subjects: list[str], limits: StreamLimits) -> dict[str, Any]:
    return {
        "name": name,
        "subjects": subjects,
        "retention": "limits",
        "max_consumers": -1,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "max_msgs_per_subject": -1,
        "max_msg_size": -1,
        "storage": "file",
        "num_replicas": limits.replicas,
        "duplicate_window": DEDUPLICATION_SECONDS * _NS,
        "compression": "none",
        "allow_direct": True,
        "mirror_direct": False,
        "sealed": False,
        "deny_delete": True,
        "deny_purge": True,
        "allow_rollup_hdrs": False,
        "allow_atomic": True,
        "consumer_limits": {},
    }


def _bucket(name: str, limits: StreamLimits, *, bytes_max: int, ttl_seconds: int = 0) -> dict[str, Any]:
    # Messages may be deleted here, unlike in buckets that the client makes: erasure overwrites a key.
    return _stream(f"KV_{name}", [f"$KV.{name}.>"], limits) | {
        "discard": "new",
        "max_bytes": bytes_max,
        "max_age": ttl_seconds * _NS,
        "max_msgs_per_subject": 1,
        "max_msg_size": LEDGER_MESSAGE_BYTES_MAX,
        "duplicate_window": min(DEDUPLICATION_SECONDS, ttl_seconds or DEDUPLICATION_SECONDS) * _NS,
        "deny_delete": False,
        "deny_purge": True,
        "allow_atomic": False,
    }


async def _ask(nc: Client, subject: str, body: dict[str, Any] | None = None, *, seconds: float = 5) -> dict[str, Any]:
    """One JetStream API request. Raises: LedgerUnavailable."""
    if not nc.is_connected:  # the client would hold the request until it is connected again
        raise LedgerUnavailable("the connection to the nats-server is down")
    try:
        reply = await nc.request(subject, json.dumps(body).encode() if body else b"", timeout=seconds)
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise LedgerUnavailable(f"the nats-server does not answer {subject}: {error}") from error
    answer: dict[str, Any] = json.loads(reply.data)
    return answer


async def stream_state(nc: Client, stream: str, *, seconds: float = 5) -> dict[str, Any]:
    """The `state` of a stream by its leader: `first_seq`, `last_seq`, `messages`, `bytes`; when it was `created`; and
    `ts`, when this was answered, by the clock that messages are stamped with.

    Raises: LedgerUnavailable.
    """
    answer = await _ask(nc, f"$JS.API.STREAM.INFO.{stream}", seconds=seconds)
    if "error" in answer:
        raise LedgerUnavailable(f"stream {stream}: {answer['error'].get('description')}")
    state: dict[str, Any] = answer["state"]
    return state | {"created": answer["created"], "ts": answer["ts"]}


async def provision(nc: Connection, limits: StreamLimits) -> None:
    """Makes the streams and buckets that are missing, adapts the limits an operator may change, then checks all.

    Needs the admin credentials. Raises: LedgerUnavailable, UnsafeServer.
    """
    await check_server(nc)
    for name, config in stream_configs(limits).items():
        answer = await _ask(nc, f"$JS.API.STREAM.INFO.{name}")
        if "error" in answer and answer["error"].get("err_code") == 10059:  # stream not found
            verb = "CREATE"
        elif "error" in answer:
            raise LedgerUnavailable(f"stream {name}: {answer['error'].get('description')}")
        elif _differences(answer["config"], config) and _only_limits_differ(answer["config"], config):
            verb = "UPDATE"
        else:
            continue
        made = await _ask(nc, f"$JS.API.STREAM.{verb}.{name}", config, seconds=10)
        if "error" in made:
            raise UnsafeServer(f"stream {name} cannot be made: {made['error'].get('description')}")
    if not await feed_fits_log(nc):
        await begin_feed_anew(nc, limits)
    await check(nc, limits)


async def begin_feed_anew(nc: Connection, limits: StreamLimits) -> None:
    """Throws away all announcements of revocations; the projector announces those of the log again.

    Followers see by the other name of the feed that they must begin with a snapshot: sequences that they know may have
    been given again. Needs the admin credentials. Raises: LedgerUnavailable.
    """
    for verb, config in (("DELETE", None), ("CREATE", stream_configs(limits)[REVOCATIONS])):
        answer = await _ask(nc, f"$JS.API.STREAM.{verb}.{REVOCATIONS}", config, seconds=10)
        if "error" in answer:
            raise LedgerUnavailable(f"stream {REVOCATIONS} cannot be begun anew: {answer['error'].get('description')}")


async def check(nc: Client, limits: StreamLimits) -> None:
    """Compares the server's and every stream's whole configuration with what it must be.

    Raises: UnsafeServer naming each setting that differs; LedgerUnavailable.
    """
    await check_server(nc)
    problems = []
    for name, config in stream_configs(limits).items():
        answer = await _ask(nc, f"$JS.API.STREAM.INFO.{name}")
        if "error" in answer:
            problems.append(f"stream {name}: {answer['error'].get('description')}")
        else:
            problems += [f"stream {name}: {line}" for line in _differences(answer["config"], config)]
    if problems:
        raise UnsafeServer("; ".join(problems))


async def check_server(nc: Client) -> None:
    """Refuses a server that acknowledges before it syncs, or that is too old. Raises: UnsafeServer."""
    info = nc._server_info  # noqa: SLF001 - the client has no public way to the INFO line
    version = tuple(int(part) for part in info.get("version", "0").split("-")[0].split("."))
    if version < MIN_SERVER_VERSION:
        wanted = ".".join(map(str, MIN_SERVER_VERSION))
        raise UnsafeServer(f"nats-server {info.get('version')} is too old: {wanted} or newer is needed")
    for varz in await server_reports(nc):
        jetstream = varz.get("jetstream", {}).get("config", {})
        if not jetstream.get("sync_always"):
            raise UnsafeServer(
                f"nats-server {varz.get('server_name')}: sync_interval is not `always`, so that it acknowledges "
                "events before they are on disk; set `jetstream { sync_interval: always }`"
            )


async def server_reports(nc: Client) -> list[dict[str, Any]]:
    """VARZ of every server of the cluster, through the service that the SYS account exports as `sync.check`.

    Raises: UnsafeServer if nobody answers, since then nobody vouches for `sync_always`.
    """
    inbox = nc.new_inbox()
    answers: list[dict[str, Any]] = []
    subscription = await nc.subscribe(inbox)
    try:
        await nc.publish("sync.check", b"", reply=inbox)
        wait_seconds = 3.0
        while True:
            message = await subscription.next_msg(timeout=wait_seconds)
            if not message.data:
                break
            answers.append(json.loads(message.data)["data"])
            if "cluster" not in nc._server_info:  # noqa: SLF001 - as above; a server that stands alone says nothing
                break
            wait_seconds = 0.25  # the other servers of a cluster answer at about the same time
    except (nats.errors.Error, TimeoutError):
        pass
    finally:
        with contextlib.suppress(Exception):
            await subscription.unsubscribe()
    if not answers:
        raise UnsafeServer(
            "the nats-server does not say whether `sync_interval: always` is set: account SYS must export "
            "$SYS.REQ.SERVER.PING.VARZ and the service's account import it as sync.check"
        )
    return answers


_CHANGEABLE = {
    LEDGER: {"max_bytes", "num_replicas"},
    USAGE: {"max_bytes", "max_age", "num_replicas"},
    f"KV_{ANSWERS}": {"max_age", "duplicate_window", "num_replicas"},
    f"KV_{PUSHED}": {"max_age", "num_replicas"},
}


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    lines = []
    for key in sorted(found.keys() | wanted.keys()):
        default: Any = False if isinstance(wanted.get(key, found.get(key)), bool) else None
        has, should = found.get(key, default), wanted.get(key, default)
        if key == "metadata":
            has = {k: v for k, v in (has or {}).items() if not k.startswith("_nats.")} or None
        if has != should and (has or should):
            lines.append(f"{key} is {has!r} and must be {should!r}")
    return lines


def _only_limits_differ(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    allowed = _CHANGEABLE.get(wanted["name"], {"num_replicas"})
    return {line.split(" ", 1)[0] for line in _differences(found, wanted)} <= allowed


class TooManySubjects(LedgerError):
    """The server gives the last messages of so many subjects only one by one."""


def recorded_at(headers: dict[str, str]) -> datetime:
    """When a message that was read directly was stored, with microseconds."""
    return parse_time(headers["Nats-Time-Stamp"])


def parse_time(text: str) -> datetime:
    """A time as the server writes it, with microseconds. Nanoseconds, with trailing zeros cut, are too many digits."""
    main, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{main}.{(fraction + '000000')[:6]}+00:00")


async def feed_fits_log(nc: Connection) -> bool:
    """Whether what the feed announced last is an event of this log: not so if one was restored without the other.

    What cannot be read at the moment, as from a replica that is behind, speaks for neither.
    """
    try:
        state = await stream_state(nc, REVOCATIONS)
        if not state["messages"]:
            return True
        async for last in direct(nc, REVOCATIONS, {"seq": int(state["last_seq"]), "batch": 1}):
            announced = json.loads(last.data)
            if int(announced["id"]) > int((await stream_state(nc, LEDGER))["last_seq"]):
                return False
            async for message in direct(nc, LEDGER, {"seq": int(announced["id"]), "batch": 1}):
                headers = message.headers or {}
                if headers["Nats-Sequence"] == announced["id"]:
                    return recorded_at(headers) == datetime.fromisoformat(announced["time"])
    except LedgerUnavailable:
        pass
    return True


async def direct(nc: Connection, stream: str, query: dict[str, Any]) -> AsyncGenerator[Msg]:
    """Batched direct get (ADR-31): messages until an end-of-batch marker; asks again where the server cut it.

    `query` names where to begin (`seq`, `start_time`, `next_by_subj`, `multi_last`) and how many at most (`batch`).
    Each message's sequence, subject and time stand in its headers.

    Raises: LedgerUnavailable; TooManySubjects.
    """
    left = int(query["batch"])
    while True:
        inbox = nc.new_inbox()
        if not nc.is_connected:
            raise LedgerUnavailable("the connection to the nats-server is down")
        subscription = await nc.subscribe(inbox)
        try:
            await nc.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(query).encode(), reply=inbox)
            last = 0
            while True:
                message = await subscription.next_msg(timeout=_DIRECT_SECONDS_MAX)
                headers = message.headers or {}
                status = headers.get("Status")
                if status in {"404", "204"}:
                    break
                if status == "413":
                    raise TooManySubjects(f"more subjects than the server answers for at once: {query}")
                if status is not None or "Nats-Sequence" not in headers:
                    raise LedgerUnavailable(f"reading the log failed: {headers}")
                last = int(headers["Nats-Sequence"])
                yield message
                left -= 1
                if not left:
                    return
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise LedgerUnavailable(f"reading the log failed: {error}") from error
        finally:
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()
        if status == "404" or headers.get("Nats-Num-Pending", "0") == "0" or not last:
            return
        query = {name: value for name, value in query.items() if name != "start_time"}
        query |= {"seq": last + 1, "batch": left}


async def last_on(nc: Connection, stream: str, subjects: str) -> Msg | None:
    """The last message on subjects such as `ledger.main.webhook.*`, or None. Raises: LedgerUnavailable."""
    if not nc.is_connected:
        raise LedgerUnavailable("the connection to the nats-server is down")
    query = json.dumps({"last_by_subj": subjects}).encode()
    try:
        message = await nc.request(f"$JS.API.DIRECT.GET.{stream}", query, timeout=_DIRECT_SECONDS_MAX)
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise LedgerUnavailable(f"reading the log failed: {error}") from error
    headers = message.headers or {}
    if headers.get("Status") == "404":
        return None
    if "Nats-Sequence" not in headers:
        raise LedgerUnavailable(f"reading the log failed: {headers}")
    return message


class _Delivery:
    """Collects what an ordered consumer delivers until the loop takes it."""

    def __init__(self, position: int, *, gapless: bool) -> None:
        self.position = position
        self.gapless = gapless
        self.broken = False
        self.arrived = asyncio.Event()
        self.room = asyncio.Event()
        self.messages: list[RawMessage] = []
        self.size_bytes = 0

    async def take(self, message: Msg) -> None:
        # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time ns>.<pending>
        fields = message.reply.split(".")
        seq = int(fields[5])
        if seq <= self.position:
            return
        if self.gapless and seq != self.position + 1:
            self.broken = True
        else:
            self.position = seq
            self.messages.append(RawMessage(seq, int(fields[7]), message.subject, message.data, int(fields[8])))
            self.size_bytes += len(message.data)
        self.arrived.set()
        if len(self.messages) >= _DELIVERED_MAX or self.size_bytes >= _DELIVERED_BYTES_MAX:
            self.room.clear()
            await self.room.wait()  # the server's flow control then holds back the rest

    def pop(self, count: int) -> list[RawMessage]:
        taken, self.messages = self.messages[:count], self.messages[count:]
        self.size_bytes -= sum(len(message.data) for message in taken)
        self.room.set()
        return taken


async def follow(
    nc: Connection,
    stream: str,
    after: int,
    *,
    batch_max: int = 5000,
    idle_seconds: float = 0.5,
    gather_seconds: float = 0.0,
) -> AsyncGenerator[list[RawMessage]]:
    """Every message of `stream` after sequence `after`, in order, for ever, in batches of what has arrived.

    An empty batch comes about every `idle_seconds` when nothing arrives. After each batch that leaves few behind,
    messages gather for `gather_seconds`: those that trickle in would make a batch each.

    Survives reconnects, restarts of the server and lost consumers. LEDGER has no gaps, so a gap there is never passed
    over: the consumer is made anew.
    """
    position = after
    while True:
        delivery = _Delivery(position, gapless=stream == LEDGER)
        try:
            subscription = await _subscribe(nc, stream, position, delivery)
        except (nats.errors.Error, TimeoutError, OSError):
            yield []
            await asyncio.sleep(0.2)
            continue
        reconnects = nc.stats["reconnects"]
        quiet_since = time.monotonic()
        try:
            while not delivery.broken and nc.stats["reconnects"] == reconnects:
                if not delivery.messages:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(delivery.arrived.wait(), idle_seconds)
                delivery.arrived.clear()
                if delivery.messages:
                    taken = delivery.pop(batch_max)
                    position = taken[-1].seq
                    quiet_since = time.monotonic()
                    yield taken
                    # Applying may be synchronous: let the client read what arrived meanwhile.
                    await asyncio.sleep(gather_seconds if taken[-1].left < _FEW_LEFT else 0)
                else:
                    yield []
                    if time.monotonic() - quiet_since > 2:
                        if await _is_behind(nc, stream, position):
                            break
                        quiet_since = time.monotonic()
        finally:
            delivery.room.set()
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()


async def _subscribe(nc: Connection, stream: str, position: int, delivery: _Delivery) -> Any:
    js = nc.jetstream(timeout=3)
    # One consumer name a follower and moment: a name that is still there from before a reconnect would be refused.
    name = f"follow_{uuid4().hex}"
    subject = f"{stream.lower()}.>"
    config = api.ConsumerConfig(
        name=name,
        deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
        opt_start_seq=position + 1,
        inactive_threshold=30,
    )
    subscription = await js.subscribe(
        subject,
        stream=stream,
        config=config,
        ordered_consumer=True,
        idle_heartbeat=1,
        cb=delivery.take,
        pending_msgs_limit=-1,
        pending_bytes_limit=-1,
    )
    if stream == USAGE:  # the others are applied by the loop itself, which reads no more meanwhile
        nc.hold_back(subscription)
    return subscription


async def _is_behind(nc: Connection, stream: str, position: int) -> bool:
    try:
        state = await stream_state(nc, stream, seconds=1)
    except LedgerUnavailable:
        return False
    return int(state["last_seq"]) > position


__all__ = [
    "ANSWERS",
    "DELIVERIES",
    "IDEMPOTENCY",
    "LEDGER",
    "MIN_SERVER_VERSION",
    "PUSHED",
    "RECEIPTS",
    "REVOCATIONS",
    "SIGNING_KEYS",
    "SUBJECT_KEYS",
    "TENANT",
    "USAGE",
    "WEBHOOKS",
    "Connection",
    "RawMessage",
    "StreamLimits",
    "TooManySubjects",
    "begin_feed_anew",
    "check",
    "check_server",
    "connect",
    "direct",
    "feed_fits_log",
    "follow",
    "last_on",
    "provision",
    "recorded_at",
    "server_reports",
    "stream_configs",
    "stream_state",
]
