"""Durable consumers: the server keeps how far they are, and leases what is being worked on to one process of several.

How far each webhook is: a consumer of REVOCATIONS named like it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import nats.errors
from msgspec import Struct
from nats.aio.msg import Msg

from events import codec
from events.errors import LedgerUnavailable
from events.streams import REVOCATIONS, Connection, RawMessage, direct
from events.types import Recorded
from projections.revocations import decode_event
from service.feed import CursorTooOld, Feed

IN_FLIGHT_MAX = 8
ACK_WAIT_SECONDS = 6.0  # what a killed process held is delivered by another one after that
_PULL_SECONDS = 5.0  # how long a request waits at the server; one that was lost is missed no longer
_API_SECONDS_MAX = 5.0
_NS = 1_000_000_000
_NOT_FOUND, _EXISTS = 10014, 10148
_CURSOR = "cursor"  # in the consumer's metadata


class Progress(Struct, frozen=True, kw_only=True):
    """How far a consumer is. `floor`: everything up to this position of REVOCATIONS was delivered, 0 if nothing was.

    `undelivered`: where it would go on if it were made anew. `known`: everything up to here was handed out at least
    once. `pending`: how much is not delivered yet.
    """

    cursor: str
    floor: int
    undelivered: int
    known: int
    pending: int


async def _api(
    nc: Connection, verb: str, name: str, body: dict[str, Any] | None = None, *, stream: str = REVOCATIONS
) -> dict[str, Any]:
    """Raises: LedgerUnavailable. That a consumer is not there, or is there already, is an answer."""
    if not nc.is_connected:
        raise LedgerUnavailable("the connection to the nats-server is down")
    try:
        subject = f"$JS.API.CONSUMER.{verb}.{stream}.{name}"
        reply = await nc.request(subject, json.dumps(body).encode() if body else b"", timeout=_API_SECONDS_MAX)
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise LedgerUnavailable(f"consumer {name}: {error}") from error
    answer: dict[str, Any] = json.loads(reply.data)
    error_code = answer.get("error", {}).get("err_code", 0)
    if error_code not in {0, _NOT_FOUND, _EXISTS}:
        raise LedgerUnavailable(f"consumer {name}: {answer['error'].get('description')}")
    return answer


async def make_durable(nc: Connection, stream: str, config: dict[str, Any]) -> None:
    """Nothing is changed where it is there already, whatever it begins with. Raises: LedgerUnavailable."""
    body = {"stream_name": stream, "config": config, "action": "create"}
    await _api(nc, "DURABLE.CREATE", config["durable_name"], body, stream=stream)


async def progress(nc: Connection, webhook_id: str) -> Progress | None:
    """None if there is no such consumer. Raises: LedgerUnavailable."""
    answer = await _api(nc, "INFO", webhook_id)
    if "error" in answer:
        return None
    config, delivered, floor = answer["config"], answer["delivered"], answer["ack_floor"]
    # Before it has handed out anything, the server says where it will begin, which is behind what it had to pass over.
    begins = config.get("opt_start_seq", 1)
    known = delivered["stream_seq"] if delivered["consumer_seq"] else begins - 1
    return Progress(
        cursor=(config.get("metadata") or {}).get(_CURSOR, ""),
        floor=floor["stream_seq"] if floor["consumer_seq"] else 0,
        undelivered=floor["stream_seq"] + 1 if floor["consumer_seq"] else begins,
        known=known,
        pending=answer["num_pending"] + answer["num_ack_pending"],
    )


async def ensure(nc: Connection, webhook_id: str, after: int, cursor: str) -> Progress:
    """The consumer for this cursor, made if there is none or one of another cursor. Raises: LedgerUnavailable."""
    found = await progress(nc, webhook_id)
    if found is not None and found.cursor == cursor:
        return found
    try:
        start = await Feed(nc).stream_seq_after(after)
    except CursorTooOld:
        start = 1  # that what comes first is not what should have come shows by its sequence
    if found is not None:
        start = min(start, found.undelivered)  # nothing is left out
        await delete(nc, webhook_id)
    config = {
        "durable_name": webhook_id,
        "ack_policy": "explicit",
        "ack_wait": int(ACK_WAIT_SECONDS * _NS),
        "max_ack_pending": IN_FLIGHT_MAX,
        "max_deliver": -1,
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": start,
        "metadata": {_CURSOR: cursor},
    }
    await make_durable(nc, REVOCATIONS, config)
    made = await progress(nc, webhook_id)
    if made is None or made.cursor != cursor:
        raise LedgerUnavailable(f"consumer {webhook_id} was made and is gone")
    return made


async def delete(nc: Connection, webhook_id: str) -> None:
    """Raises: LedgerUnavailable."""
    await _api(nc, "DELETE", webhook_id)


async def ledger_seq_at(nc: Connection, stream_seq: int) -> int | None:
    """The position in the ledger of what REVOCATIONS has at `stream_seq`; None if it has it no more.

    Raises: LedgerUnavailable.
    """
    async for message in direct(nc, REVOCATIONS, {"seq": stream_seq, "batch": 1}):
        if int((message.headers or {})["Nats-Sequence"]) == stream_seq:
            return decode_event(message.data).data.ledger_seq
    return None


class Delivered(Struct, frozen=True):
    """A message of a consumer, leased for a time. `times`: how often it was handed out, this included."""

    seq: int
    times: int
    subject: str
    data: bytes
    reply: str

    @property
    def recorded(self) -> Recorded:
        """The event that it is, if it is one of the log."""
        time_ns = int(self.reply.split(".")[7])
        raw = RawMessage(self.seq, time_ns, self.subject, self.data)
        return Recorded(seq=raw.seq, recorded_at=raw.recorded_at, subject=raw.subject, event=codec.decode(raw.data))

    @classmethod
    def of(cls, message: Msg) -> Delivered:
        # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time ns>.<pending>
        fields = message.reply.split(".")
        return cls(int(fields[5]), int(fields[4]), message.subject, message.data, message.reply)


class Puller:
    """Fetches one message after the other. A request waits at the server, so that nothing waits for the next poll.

    It may ask for several: all are leased when they arrive, however long those before them take.
    """

    def __init__(self, nc: Connection, name: str, *, stream: str = REVOCATIONS, batch: int = 1) -> None:
        self._nc = nc
        self._batch = batch
        self._asked = 0  # messages that the server may send yet
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}"
        self._arrived: asyncio.Queue[Msg] = asyncio.Queue()
        self._inbox = ""
        self._subscription: Any = None

    async def next(self) -> Delivered | None:
        """The next message, None if none came for a while. Raises: LedgerUnavailable."""
        if not self._nc.is_connected:
            self._asked = 0
            raise LedgerUnavailable("the connection to the nats-server is down")
        try:
            if self._subscription is None:
                self._inbox = self._nc.new_inbox()
                self._subscription = await self._nc.subscribe(self._inbox, cb=self._arrived.put)
            if self._arrived.empty() and self._asked <= 0:
                body = json.dumps({"batch": self._batch, "expires": int(_PULL_SECONDS * _NS)}).encode()
                await self._nc.publish(self._subject, body, reply=self._inbox)
                self._asked = self._batch
            async with asyncio.timeout(_PULL_SECONDS + 1):
                while True:
                    message = await self._arrived.get()
                    status = (message.headers or {}).get("Status")
                    if status is None:
                        self._asked -= 1
                        return Delivered.of(message)
                    self._asked = 0
                    if status in {"404", "408"}:
                        return None
                    raise LedgerUnavailable(f"the consumer answers {status}")
        except TimeoutError:
            self._asked = 0
            return None
        except (nats.errors.Error, OSError) as error:
            self._asked = 0
            raise LedgerUnavailable(f"fetching failed: {error}") from error

    async def close(self) -> None:
        """What has arrived and was not taken goes back."""
        if self._subscription is not None:
            with contextlib.suppress(Exception):
                await self._subscription.unsubscribe()
        while not self._arrived.empty():
            message = self._arrived.get_nowait()
            if message.reply:
                await give_back(self._nc, Delivered.of(message))


async def acknowledge(nc: Connection, message: Delivered) -> bool:
    """Whether the server took it; if not, the message will come again."""
    try:
        await nc.request(message.reply, b"+ACK", timeout=_API_SECONDS_MAX)
    except (nats.errors.Error, TimeoutError, OSError):
        return False
    return True


async def pass_over(nc: Connection, message: Delivered) -> None:
    """Acknowledges what there was nothing to do about. Nobody waits: if it is lost, the message will come again."""
    with contextlib.suppress(nats.errors.Error, OSError):
        await nc.publish(message.reply, b"+ACK")


async def hold(nc: Connection, message: Delivered) -> None:
    """Asks for the lease to begin anew."""
    with contextlib.suppress(nats.errors.Error, OSError):
        await nc.publish(message.reply, b"+WPI")


async def give_back(nc: Connection, message: Delivered, after_seconds: float = 0.0) -> None:
    """Lets another process have it, at once or later."""
    body = b"-NAK " + json.dumps({"delay": int(after_seconds * _NS)}).encode() if after_seconds else b"-NAK"
    with contextlib.suppress(nats.errors.Error, OSError):
        await nc.publish(message.reply, body)
