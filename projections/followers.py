"""The process part of the receipts: hears what followers say over NATS, answers who applied what, and raises alarms.

It is a process of its own, since subscribers may say as much as they like: what they say here, what announces never
hears, not even their questions for its position.

What a NATS subscriber acknowledges passes here on its way to the server. That is heard at most once, so the server is
asked too: at the start, and again and again for whoever seems to be behind. What is heard becomes a receipt in the log
first and is folded from there, so that a kill loses nothing that the server or the log still has, and invents nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

import msgspec
import nats.errors
import structlog
from nats.aio.msg import Msg

from events.errors import LedgerUnavailable
from events.ledger import Ledger
from events.receipts import ReceiptLog, now_us
from events.streams import REVOCATIONS, Connection, stream_state
from projections.asking_receipts import (
    ASKED_SUBJECT,
    RECEIPTS_SUBJECT,
    SEEN_SUBJECT,
    Follower,
    FollowerStanding,
    ReceiptsAnswer,
    ReceiptsRequest,
    Registered,
    Seen,
)
from projections.base import boot_time_ns
from projections.receipts import Acknowledged, ReceiptsFold, announced_seq, moment_us
from projections.revocations import POSITION_SUBJECT, FeedPosition

log = structlog.get_logger()

_US = 1_000_000
_LOOK_SECONDS = 2.0  # between two looks at who is registered, behind or silent
_ASK_AGAIN_US = 2 * _US  # about the same consumer
_ASK_SECONDS_MAX = 2.0
_EARLY_MAX = 200  # acknowledgements of one follower of announcements that have not been read here yet
_EARLY_US = 5 * _US  # for which they are held
_AHEAD_MAX = 1_000  # announcements that may be on their way here
_CONSUMERS_MAX = 10_000
_POSITION_NS = 100_000_000  # for which the answer of the process that announces is handed on
_HELD_BACK_MAX = 10_000  # messages of subscribers that wait to be read; what comes then is dropped
_WAITING_MAX = 256  # questions that wait for receipts; further ones are answered at once
_TOLD_AT_ONCE = 100
_CARRY_AFTER_NS = 6 * 3600 * 1_000_000_000
_NUMBER_DIGITS_MAX = 19
_ACKNOWLEDGED = {b"", b"+ACK", b"+OK"}
_FIX = (
    "see that it runs and reaches this service; what was revoked meanwhile it may still accept. If it is gone for "
    "good, delete it (`token-ledger subscriber delete`, `token-ledger webhook delete`)"
)

_decode_request = msgspec.json.Decoder(ReceiptsRequest).decode
_decode_position = msgspec.json.Decoder(FeedPosition).decode
_decode_seen = msgspec.json.Decoder(Seen).decode


class Followers:
    """One for the process `project receipts`. `fold` is fed by the loop that feeds all projections."""

    def __init__(
        self, nc: Connection, writer: str, *, silent_seconds_max: int, clock_us: Callable[[], int] = now_us
    ) -> None:
        self.nc = nc
        self.fold = ReceiptsFold(self._folded)
        self.receipts = ReceiptLog(nc, writer)
        self.answers = False
        self._registered = Registered(Ledger(nc))
        self._known: dict[str, Follower] = {}
        self._seen_us: dict[str, int] = {}
        self._consumers: dict[str, Acknowledged] = {}
        self._asked_us: dict[str, int] = {}
        self._early: dict[str, list[tuple[int, int, int]]] = {}
        self._feed = ""
        self._complete = False
        self._silent: set[str] = set()
        self._silent_us = silent_seconds_max * _US
        self._clock_us = clock_us
        self._heard_since_us = clock_us()
        self._changed = asyncio.Event()
        self._look = asyncio.Event()
        self._waiting: set[asyncio.Task[None]] = set()
        self._position: FeedPosition | None = None
        self._position_at_ns = self._position_until_ns = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        for subject, hear in (
            (f"$JS.ACK.{REVOCATIONS}.>", self._acknowledged),
            (f"$JS.API.CONSUMER.MSG.NEXT.{REVOCATIONS}.*", self._fetches),
            (ASKED_SUBJECT, self._position_asked),
        ):
            await self.nc.subscribe(subject, cb=hear, pending_msgs_limit=_HELD_BACK_MAX)
        await self.nc.subscribe(SEEN_SUBJECT, cb=self._told_seen)
        # Whoever asks the server hears of acknowledgements that came before; later ones are heard here.
        with contextlib.suppress(nats.errors.Error, TimeoutError):
            await self.nc.flush()
        self._heard_since_us = self._clock_us()
        while True:
            self._look.clear()
            try:
                await self._look_around()
            except LedgerUnavailable as error:
                log.debug("followers_not_known", why=str(error))
            except Exception:
                log.exception("followers_not_looked_after", alarm=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_LOOK_SECONDS, self._silent_us / _US / 4)):
                    await self._look.wait()

    async def close(self) -> None:
        """Writes the receipts that are held."""
        for task in self._waiting:
            task.cancel()
        await self.receipts.close()

    # What followers say

    async def _acknowledged(self, message: Msg) -> None:
        # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time ns>.<pending>
        fields = message.subject.split(".")
        if len(fields) != 9 or not fields[3].startswith("sub_") or not all(map(_number, (fields[5], fields[7]))):
            return
        follower, stream_seq, stored_ns = fields[3], int(fields[5]), int(fields[7])
        self._see(follower)
        if message.data in _ACKNOWLEDGED or message.data.startswith(b"+NXT"):
            self._take(follower, stream_seq, stored_ns, self._clock_us())
        elif message.data.startswith(b"+TERM"):
            consumer = self._consumer(follower)
            if consumer is not None:
                consumer.refuse(stream_seq)

    def _take(self, follower: str, stream_seq: int, stored_ns: int, heard_us: int) -> None:
        """One acknowledgement: it counts if the message was delivered.

        Whoever was sent the message knows when it was stored; an acknowledgement with another time is made up.
        """
        announced = self.fold.announced
        if not self.fold.complete or stream_seq > announced.end:
            near = not self.fold.complete or stream_seq <= announced.end + _AHEAD_MAX
            held = self._early.setdefault(follower, []) if near else []
            if len(held) < _EARLY_MAX:  # what is not held, the server is asked for
                held.append((stream_seq, stored_ns, heard_us))
            return
        if stream_seq >= announced.first and announced.stored_ns(stream_seq) != stored_ns:
            return
        consumer = self._consumer(follower)
        if consumer is None:
            return
        if consumer.floor is None:
            self._look.set()
        if consumer.acknowledge(stream_seq):
            self._record(follower, consumer.floor or 0, heard_us)

    def _consumer(self, follower: str) -> Acknowledged | None:
        consumer = self._consumers.get(follower)
        if consumer is None and len(self._consumers) < _CONSUMERS_MAX:
            consumer = self._consumers[follower] = Acknowledged()
        return consumer

    def _record(self, follower: str, stream_seq: int, at_us: int) -> bool:
        """Whether it is known which revocation stands there."""
        ledger_seq = self.fold.announced.ledger_seq(stream_seq)
        if ledger_seq is None:
            return False
        steps = self.fold.followers.get(follower)
        if steps is None or ledger_seq > steps.acknowledged:
            self.receipts.record(follower, ledger_seq, at_us)
        return True

    async def _fetches(self, message: Msg) -> None:
        self._see(message.subject.rpartition(".")[2])

    async def _position_asked(self, message: Msg) -> None:
        """Hands on what the process that announces says, with its age; nothing while that says nothing."""
        if boot_time_ns() > self._position_until_ns:
            self._position_at_ns, self._position = boot_time_ns(), None
            with contextlib.suppress(LedgerUnavailable, msgspec.DecodeError):
                self._position = _decode_position((await self._request(POSITION_SUBJECT, b"")).data)
            self._position_until_ns = boot_time_ns() + _POSITION_NS
        if self._position is None or not message.reply:
            return
        age_ms = round(self._position.age_ms + (boot_time_ns() - self._position_at_ns) / 1e6, 3)
        with contextlib.suppress(nats.errors.Error, OSError):
            await message.respond(msgspec.json.encode(msgspec.structs.replace(self._position, age_ms=age_ms)))

    async def _told_seen(self, message: Msg) -> None:
        with contextlib.suppress(msgspec.DecodeError):
            for follower in _decode_seen(message.data).followers:
                self._see(follower)

    def _see(self, follower: str) -> None:
        if follower in self._seen_us or len(self._seen_us) < _CONSUMERS_MAX:
            self._seen_us[follower] = self._clock_us()

    def _folded(self) -> None:
        """Something was read from one of the streams."""
        if self.fold.feed != self._feed:  # positions of another stream mean nothing in this one
            self._feed = self.fold.feed
            self._consumers.clear()
            self._asked_us.clear()
            self._early.clear()
        if self.fold.complete and not self._complete:
            self._look.set()
        self._complete = self.fold.complete
        if self._early and self._complete:
            early, self._early = self._early, {}
            oldest_us = self._clock_us() - _EARLY_US
            for follower, held in early.items():
                for stream_seq, stored_ns, heard_us in held:
                    if heard_us >= oldest_us or stream_seq <= self.fold.announced.end:
                        self._take(follower, stream_seq, stored_ns, heard_us)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # What the server and the log say

    async def _look_around(self) -> None:
        """Raises: LedgerUnavailable."""
        self._known = {one.id: one for one in await self._registered.followers()}
        for held in (self._seen_us, self._consumers, self._asked_us):
            for gone in held.keys() - self._known.keys():
                del held[gone]
        if not self.fold.complete:
            return
        for one in self._known.values():
            if one.transport == "nats" and self._worth_asking(one):
                await self._ask_server(one.id)
            await asyncio.sleep(0)
        if not self.answers:
            await self.nc.subscribe(RECEIPTS_SUBJECT, cb=self._asked)
            self.answers = True
        await self._alarm()
        self._carry_forward()

    def _worth_asking(self, one: Follower) -> bool:
        consumer, clock = self._consumers.get(one.id), self._clock_us()
        if consumer is None or consumer.floor is None:
            return True
        if clock - self._asked_us.get(one.id, 0) < _ASK_AGAIN_US:
            return False
        # A fetch that waits for long says nothing meanwhile, and the server knows of it.
        quiet = clock - self._seen_us.get(one.id, 0) > self._silent_us // 3
        return quiet or bool(self._standing(one.id).pending)

    async def _ask_server(self, follower: str) -> None:
        self._asked_us[follower] = self._clock_us()
        info = await self._ask(f"$JS.API.CONSUMER.INFO.{REVOCATIONS}.{follower}")
        consumer = self._consumer(follower)
        if consumer is None or "ack_floor" not in info:  # there is none yet, or it was deleted
            return
        if info.get("num_waiting"):
            self._see(follower)
        floor = info["ack_floor"]
        consumer.raise_to(int(floor["stream_seq"]))
        if not floor["consumer_seq"] or not consumer.floor:
            return  # nothing was acknowledged: it stands where it began
        if consumer.floor < int((await stream_state(self.nc, REVOCATIONS))["first_seq"]):
            return  # the server's floor passes what retention took, whether or not it was applied
        at = moment_us(floor["last_active"]) if "last_active" in floor else self._clock_us()
        if not self._record(follower, consumer.floor, at):
            await self._record_old(follower, consumer.floor, at)

    async def _record_old(self, follower: str, stream_seq: int, at_us: int) -> None:
        """The same for an announcement that is too old to be held."""
        query = json.dumps({"seq": stream_seq}).encode()
        reply = await self._request(f"$JS.API.DIRECT.GET.{REVOCATIONS}", query)
        if reply.data:  # else retention has taken it, and there are newer ones to come
            ledger_seq = announced_seq(reply.data)
            steps = self.fold.followers.get(follower)
            if steps is None or ledger_seq > steps.acknowledged:
                self.receipts.record(follower, ledger_seq, at_us)

    async def _ask(self, subject: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads((await self._request(subject, b"")).data)
        return answer

    async def _request(self, subject: str, body: bytes) -> Msg:
        if not self.nc.is_connected:
            raise LedgerUnavailable("the connection to the nats-server is down")
        try:
            return await self.nc.request(subject, body, timeout=_ASK_SECONDS_MAX)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise LedgerUnavailable(f"the nats-server does not answer {subject}: {error}") from error

    def _carry_forward(self) -> None:
        """Writes the last receipt of each follower again before it leaves the stream, with the time that it had."""
        clock_ns = self._clock_us() * 1000
        for follower, steps in list(self.fold.followers.items()):
            if clock_ns - steps.recorded_at_ns < _CARRY_AFTER_NS:
                continue
            if follower in self._known:
                steps.recorded_at_ns = clock_ns  # not again before it was read back
                self.receipts.record(follower, steps.acknowledged, steps.last_at_us)
            else:
                self.fold.forget(follower)

    # What is known of them

    def _standing(self, follower: str, ledger_seq: int | None = None) -> FollowerStanding:
        one, steps = self._known.get(follower), self.fold.followers.get(follower)
        acknowledged = steps.acknowledged if steps is not None else None
        seen = max(self._seen_us.get(follower, 0), steps.last_at_us if steps is not None else 0)
        pending, since = 0, None
        if one is not None and one.followed:
            pending, since = self.fold.announced.after(max(one.registered_seq, acknowledged or 0))
        applied = ledger_seq is not None and acknowledged is not None and acknowledged >= ledger_seq
        return FollowerStanding(
            follower=follower,
            acknowledged_seq=acknowledged,
            applied=applied,
            applied_at_us=steps.applied_at_us(ledger_seq) if applied and steps and ledger_seq is not None else None,
            last_seen_at_us=seen or None,
            pending=pending,
            pending_since_us=since,
            silent_since_us=self._silent_since_us(one, seen, since) if one is not None else None,
        )

    def _silent_since_us(self, one: Follower, seen_us: int, pending_since_us: int | None) -> int | None:
        """Since when nothing was heard that should have been; None if that is not too long ago.

        Webhooks are called and do not call: of them nothing is expected but what is pending.
        """
        consumer = self._consumers.get(one.id)
        if not one.followed or not self.fold.complete:
            return None
        if one.transport == "nats" and (consumer is None or consumer.floor is None) and one.id not in self._asked_us:
            return None  # the server was not asked yet
        latest = self._clock_us() - self._silent_us
        heard = max(seen_us, int(one.registered_at.timestamp() * _US), self._heard_since_us)
        since = [heard] if one.transport != "webhook" else []
        since += [pending_since_us] if pending_since_us is not None else []
        return min((one for one in since if one < latest), default=None)

    async def _alarm(self) -> None:
        silent = {}
        for one in list(self._known):
            silent[one] = self._standing(one)
            await asyncio.sleep(0)
        now = {one for one, standing in silent.items() if standing.silent_since_us is not None}
        for follower in sorted(now - self._silent):
            standing = silent[follower]
            since_us = standing.silent_since_us or 0
            log.error(
                "follower_silent",
                alarm=True,
                follower=follower,
                transport=self._known[follower].transport,
                silent_seconds=(self._clock_us() - since_us) // _US,
                pending=standing.pending,
                fix=_FIX,
            )
        for follower in sorted(self._silent - now):
            if follower in self._known:
                log.info("follower_back", follower=follower, pending=silent[follower].pending)
        self._silent = now

    async def _asked(self, message: Msg) -> None:
        if not self.fold.complete:
            return  # another such process may know more
        try:
            request = _decode_request(message.data or b"{}")
        except (msgspec.DecodeError, UnicodeDecodeError):
            request = ReceiptsRequest()
        if request.wait_seconds and len(self._waiting) < _WAITING_MAX:
            task = asyncio.get_running_loop().create_task(self._answer_later(message, request))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)
        else:
            await self._answer(message, request)

    async def _answer_later(self, message: Msg, request: ReceiptsRequest) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(request.wait_seconds):
                while not self._applied_by_all(request):
                    await self._changed.wait()
        await self._answer(message, request)

    def _applied_by_all(self, request: ReceiptsRequest) -> bool:
        seq = request.ledger_seq or 0
        if not self.fold.complete or self.fold.announced.last_ledger_seq < seq:
            return False
        found = (self.fold.followers.get(follower) for follower in request.followers)
        return all(steps is not None and steps.acknowledged >= seq for steps in found)

    async def _answer(self, message: Msg, request: ReceiptsRequest) -> None:
        seq = request.ledger_seq
        standings = []
        for number, follower in enumerate(sorted(self._known.keys() | self.fold.followers.keys()), 1):
            standings.append(self._standing(follower, seq))
            if number % _TOLD_AT_ONCE == 0:
                await asyncio.sleep(0)  # others ask meanwhile
        answer = ReceiptsAnswer(
            followers=standings,
            registered=len(self._known),
            announced_seq=self.fold.announced.last_ledger_seq,
            announced_at_us=self.fold.announced.announced_at_us(seq) if seq is not None else None,
            complete=self.fold.complete,
            heard_since_us=self._heard_since_us,
        )
        with contextlib.suppress(nats.errors.Error, OSError):
            await message.respond(msgspec.json.encode(answer))


def _number(field: str) -> bool:
    return field.isascii() and field.isdecimal() and len(field) <= _NUMBER_DIGITS_MAX
