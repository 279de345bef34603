"""The process that delivers: for each enabled webhook it fetches what was announced, sends, and tries again.

How far a webhook is, what of it is being sent and how often it came stands in its consumer, so that a killed process
loses nothing and several share the work. A webhook has tasks, connections and places in flight of its own, so that
none waits for another; what waits for a slow one waits in the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter as Tally
from collections import OrderedDict
from datetime import datetime, timedelta

import msgspec
import nats.errors
import structlog
from msgspec import UNSET
from nats.aio.msg import Msg

from events.errors import LedgerError, LedgerUnavailable
from events.ledger import Ledger
from events.receipts import ReceiptLog
from events.streams import LEDGER, REVOCATIONS, Connection, stream_state
from projections.base import end_all
from projections.revocations import decode_event, feed_id
from service.feed import Filters, matches
from service.keys import MasterKey
from service.rules.webhooks import DisabledReason, Sealed
from service.settings import Settings, SettingsError
from service.streams import writer_name
from service.tokens import now
from service.webhooks import consumers
from service.webhooks.addresses import Guard, NotCallable, parse
from service.webhooks.attempts import Attempt, AttemptLog, delivered_since, last_attempt
from service.webhooks.backoff import Pauses, delay_seconds
from service.webhooks.commands import disable
from service.webhooks.consumers import ACK_WAIT_SECONDS, IN_FLIGHT_MAX, Delivered, Puller
from service.webhooks.messages import CONTENT_TYPE, Message, announcement, snapshot_required
from service.webhooks.owners import Owners
from service.webhooks.sender import Answer, Line, trusted_certificates
from service.webhooks.signatures import signed_headers
from service.webhooks.status import STATUS_SUBJECT, Status
from service.webhooks.store import Webhook, WebhookStore

log = structlog.get_logger()

_LOOK_SECONDS = 0.5
_AGAIN_SECONDS = 1.0
_OWNERS_SECONDS = 5.0
_FINISH_SECONDS_MAX = 0.7
_GATHER_SECONDS = 0.02
_REMEMBERED_MAX = 64
_FOR_EVER_SECONDS = 86_400.0
_SILENT_MAX = timedelta(hours=2)  # between two attempts, which a receiver may put off by an hour, if anybody tries


_CORRECT = "look at its deliveries, correct the receiver, then `token-ledger webhook enable`"
_FIXES: dict[DisabledReason, str] = {
    "asked": "`token-ledger webhook enable`",
    "gone": _CORRECT,
    "failing": _CORRECT,
    "owner_disabled": "if somebody still needs it, have them register one of their own; then delete this one",
}


class Deliverer:
    """Keeps a runner for every enabled webhook."""

    def __init__(self, nc: Connection, settings: Settings, master: MasterKey, *, guard: Guard | None = None) -> None:
        self.nc = nc
        self.settings = settings
        self.ledger = Ledger(nc)
        self.store = WebhookStore(nc, self.ledger, master)
        self.attempts = AttemptLog(nc)
        self.receipts = ReceiptLog(nc, writer_name())
        self.guard = guard or Guard(settings.webhook_allowed_networks, settings.webhook_ports)
        self.tls = trusted_certificates()
        self.counts: Tally[str] = Tally()
        self.disabled = 0
        self._runners: dict[str, Runner] = {}
        self._told: dict[str, int] = {}  # webhooks that cannot be run, and as of which event that was said
        self._owners = Owners(self.ledger)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; then what is being delivered is finished soon or given back."""
        await self.nc.subscribe(STATUS_SUBJECT, cb=self._answer_status)
        log.info("deliverer_started")
        seen, why = -1, ""
        ending = asyncio.create_task(self._end_with_owners())
        while not stop.is_set():
            try:
                last = await self.store.last_seq()
                if last != seen and await self._reload():
                    seen = last
                why = ""
            except LedgerError as error:
                if str(error) != why:
                    why = str(error)
                    log.warning("delivery_waits", why=why, fix=error.fix)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await stop.wait()
        await end_all([ending])
        await asyncio.gather(*(runner.stop() for runner in self._runners.values()))
        await asyncio.gather(self.attempts.close(), self.receipts.close())

    async def _reload(self) -> bool:
        """Whether every webhook now runs as its last event says."""
        known = {one.webhook_id: one for one in await self.store.all()}
        ended = [one for one in self._runners if one not in known or not known[one].enabled]
        await asyncio.gather(*(self._end(webhook_id, removed=webhook_id not in known) for webhook_id in ended))
        # At once: a runner that gives way to another one may take a moment to end.
        done = await asyncio.gather(*(self._ensure(webhook) for webhook in known.values() if webhook.enabled))
        return all(done)

    async def _end(self, webhook_id: str, *, removed: bool) -> None:
        await self._runners.pop(webhook_id).stop()
        if removed:  # the runner may have made it anew since
            await consumers.delete(self.nc, webhook_id)

    async def _ensure(self, webhook: Webhook) -> bool:
        runner = self._runners.get(webhook.webhook_id)
        if runner is not None and runner.webhook.seq == webhook.seq:
            return True
        try:
            sealed = await self.store.open(webhook)
            if runner is not None and runner.takes(webhook, sealed):
                return True
            if runner is not None:
                await self._runners.pop(webhook.webhook_id).stop()
            self._runners[webhook.webhook_id] = Runner(self, webhook, sealed)
        except (LedgerUnavailable, SettingsError, msgspec.DecodeError, NotCallable) as error:
            # The others must not suffer from one that is damaged.
            if self._told.get(webhook.webhook_id) != webhook.seq:
                self._told[webhook.webhook_id] = webhook.seq
                log.warning("webhook_cannot_be_run", webhook_id=webhook.webhook_id, why=str(error))
            return False
        return True

    async def _end_with_owners(self) -> None:
        """Disables the webhooks of owners who were disabled: nothing else would ever end them."""
        while True:
            try:
                running = [runner.webhook for runner in self._runners.values()]
                ended = await self._owners.disabled(webhook.metadata.owner for webhook in running)
                for webhook in running:
                    if webhook.metadata.owner in ended:
                        await self.disable(webhook, "owner_disabled")
            except LedgerError as error:
                log.info("owners_wait", why=str(error))
            except Exception:
                log.exception("owners_not_looked_at", alarm=True)
            await asyncio.sleep(_OWNERS_SECONDS)

    async def disable(self, webhook: Webhook, reason: DisabledReason) -> bool:
        """Says so in the ledger; the runner is then stopped as if somebody had asked for it.

        False if somebody has changed the webhook meanwhile. Raises: LedgerError.
        """
        if not await disable(self.ledger, self.store, webhook, reason):
            return False
        self.disabled += 1
        log.error(
            "webhook_disabled",
            alarm=True,
            webhook_id=webhook.webhook_id,
            reason=reason,
            fix=_FIXES[reason],
        )
        return True

    async def _answer_status(self, message: Msg) -> None:
        failing = sum(runner.failing for runner in self._runners.values())
        status = Status(attempts=dict(self.counts), disabled=self.disabled, failing=failing)
        try:
            await message.respond(msgspec.json.encode(status))
        except nats.errors.Error as error:
            log.warning("webhooks_status_unanswered", error=str(error))


class Runner:
    """Delivers to one webhook until it is stopped."""

    def __init__(self, deliverer: Deliverer, webhook: Webhook, sealed: Sealed) -> None:
        self.webhook = webhook
        self._deliverer = deliverer
        self._nc = deliverer.nc
        self._sealed = sealed
        self._target = parse(sealed.url)
        self._line = Line(deliverer.guard, deliverer.tls, webhook.metadata.owner)
        self._slots = asyncio.Semaphore(IN_FLIGHT_MAX)
        self._pauses = Pauses()
        self._failing_since: datetime | None = None
        self._disabling = False
        self._disabled = False
        self._stopping = False
        self._feed = ""
        self._known = 0  # position in REVOCATIONS up to which all has been handed out once
        self._held: dict[asyncio.Task[None], Delivered] = {}
        self._receipts = Receipts(deliverer, webhook.webhook_id)
        self._task = asyncio.create_task(self._run())
        self._holding = asyncio.create_task(self._hold())

    @property
    def webhook_id(self) -> str:
        return self.webhook.webhook_id

    @property
    def failing(self) -> bool:
        return self._failing_since is not None

    def takes(self, webhook: Webhook, sealed: Sealed) -> bool:
        """Goes on with another name, other filters or secrets; not with another URL or from another cursor."""
        if self._disabled or (sealed.url, sealed.cursor) != (self._sealed.url, self._sealed.cursor):
            return False
        self.webhook, self._sealed = webhook, sealed
        return True

    async def stop(self) -> None:
        """Ends when everything is delivered or given back to the consumer."""
        self._stopping = True
        await end_all([self._task])
        self._pauses.end()
        if self._held:
            await asyncio.wait(set(self._held), timeout=_FINISH_SECONDS_MAX)
        await end_all([*self._held, self._holding])
        await self._receipts.close()
        self._line.close()

    async def _run(self) -> None:
        while True:
            try:
                await self._fetch()
            except LedgerError as error:
                log.info("webhook_waits", webhook_id=self.webhook_id, why=str(error))
            except Exception:
                log.exception("webhook_not_delivered", alarm=True, webhook_id=self.webhook_id)
            # Longer than it takes to hear of a change, so that none makes the consumer of an old cursor anew.
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _fetch(self) -> None:
        """Hands what comes to tasks. Raises: LedgerUnavailable."""
        ledger, feed = await asyncio.gather(stream_state(self._nc, LEDGER), stream_state(self._nc, REVOCATIONS))
        self._feed = feed_id(ledger["created"], feed["created"])
        self._known = (await consumers.ensure(self._nc, self.webhook_id, self._sealed.after, self._sealed.cursor)).known
        self._receipts.look()  # a process that was killed may not have told
        puller = Puller(self._nc, self.webhook_id)
        try:
            while True:
                await self._slots.acquire()
                try:
                    message = await puller.next()
                except BaseException:
                    self._slots.release()
                    raise
                if message is None:
                    self._slots.release()
                    continue
                vouched = message.seq == 1 or (message.times == 1 and self._known >= message.seq - 1)
                self._known = max(self._known, message.seq)
                task = asyncio.create_task(self._handle(message, vouched=vouched))
                self._held[task] = message
                task.add_done_callback(self._handled)
        finally:
            await puller.close()

    def _handled(self, task: asyncio.Task[None]) -> None:
        self._held.pop(task, None)
        self._slots.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("webhook_not_delivered", alarm=True, webhook_id=self.webhook_id, error=repr(error))

    async def _hold(self) -> None:
        """What is being delivered stays leased."""
        while True:
            await asyncio.sleep(ACK_WAIT_SECONDS / 3)
            for message in list(self._held.values()):
                await consumers.hold(self._nc, message)

    async def _handle(self, message: Delivered, *, vouched: bool) -> None:
        """Delivers what was announced, and before it that something is missing, if it is; acknowledges then.

        `vouched`: what was announced before it was handed out.
        """
        acknowledged, seconds = False, _AGAIN_SECONDS
        try:
            revoked = decode_event(message.data).data
            if not vouched and await consumers.ledger_seq_at(self._nc, message.seq - 1) is None:
                issuer = self._deliverer.settings.issuer
                await self._deliver(snapshot_required(self._feed, message.seq, revoked.ledger_seq, issuer), 0)
            if matches(revoked, self._filters()):
                await self._deliver(announcement(self._feed, revoked.ledger_seq, message.data), message.times - 1)
            acknowledged = await consumers.acknowledge(self._nc, message)
            if acknowledged:
                self._receipts.delivered(message.seq, revoked.ledger_seq)
        except LedgerUnavailable as error:
            log.info("webhook_waits", webhook_id=self.webhook_id, why=str(error))
        except asyncio.CancelledError:
            seconds = 0.0  # whoever goes on need not wait
            raise
        finally:
            if not acknowledged:
                await consumers.give_back(self._nc, message, seconds)

    def _filters(self) -> Filters:
        metadata = self.webhook.metadata
        return Filters(
            client_id=metadata.client_id or UNSET,
            subject=metadata.subject or UNSET,
            grant_id=metadata.grant_id or UNSET,
        )

    async def _deliver(self, message: Message, tried: int) -> None:
        """Returns when the receiver has taken it. Raises: CancelledError when the webhook ends before."""
        number = tried
        while True:
            while self._disabled:  # whoever keeps the runners will have heard of it in a moment
                await self._pauses.wait(_FOR_EVER_SECONDS)
            number += 1
            at = now()
            headers = {
                "content-type": CONTENT_TYPE,
                **signed_headers(self._sealed.signing(at), message.id, int(at.timestamp()), message.body),
            }
            answer = await self._line.post(self._target, headers, message.body)
            self._deliverer.counts[answer.outcome] += 1
            if answer.outcome == "delivered":
                self._delivered()
                self._record(message, number, at, answer, None)
                return
            await self._failed(answer, at)
            seconds = max(delay_seconds(number), answer.retry_after_seconds)
            next_at = None if self._disabled else now() + timedelta(seconds=seconds)
            self._record(message, number, at, answer, next_at)
            if self._stopping:
                raise asyncio.CancelledError
            await self._pauses.wait(seconds, answer.retry_after_seconds)

    def _record(self, message: Message, number: int, at: datetime, answer: Answer, next_at: datetime | None) -> None:
        attempt = Attempt(
            message_id=message.id,
            ledger_seq=message.ledger_seq,
            number=number,
            at=at,
            outcome=answer.outcome,
            status=answer.status,
            error=answer.error,
            seconds=round(answer.seconds, 4),
            next_at=next_at,
            failing_since=self._failing_since,
        )
        self._deliverer.attempts.record(self.webhook_id, attempt)

    def _delivered(self) -> None:
        if self._failing_since is not None:
            self._failing_since = None
            self._pauses.recovered()

    async def _failed(self, answer: Answer, at: datetime) -> None:
        """Notes since when nothing was delivered, and disables what is gone or has failed for long."""
        if self._failing_since is None:
            self._failing_since = max(await self._failing_before(at) or at, self.webhook.changed_at)
        limit = timedelta(hours=self._deliverer.settings.webhook_failing_hours_max)
        reason: DisabledReason
        if answer.outcome == "gone":
            reason = "gone"
        elif at - self._failing_since > limit and not await self._delivered_elsewhere():
            reason = "failing"
        else:
            return
        if self._disabling:
            return
        self._disabling = True
        try:
            self._disabled = await self._deliverer.disable(self.webhook, reason)
        except LedgerError as error:
            log.warning("webhook_not_disabled", webhook_id=self.webhook_id, why=str(error))
        finally:
            self._disabling = False

    async def _failing_before(self, at: datetime) -> datetime | None:
        """Since when it failed already before this process looked; a time in which nobody tried does not count."""
        try:
            last = await last_attempt(self._nc, self.webhook_id)
        except LedgerUnavailable:
            return None
        if last is None or last.failing_since is None:
            return None
        silent = at - last.at
        return last.failing_since + (silent if silent > _SILENT_MAX else timedelta(0))

    async def _delivered_elsewhere(self) -> bool:
        """Whether another process reaches the receiver, which this one cannot."""
        try:
            return await delivered_since(self._nc, self.webhook_id, self._failing_since or now())
        except LedgerUnavailable:
            return True


class Receipts:
    """Tells up to where everything was delivered to a webhook, by whichever process."""

    def __init__(self, deliverer: Deliverer, webhook_id: str) -> None:
        self._deliverer = deliverer
        self._webhook_id = webhook_id
        self._seqs: OrderedDict[int, int] = OrderedDict()  # of REVOCATIONS and of LEDGER
        self._task: asyncio.Task[None] | None = None
        self._again = False

    def delivered(self, seq: int, ledger_seq: int) -> None:
        """What stands at `seq` of REVOCATIONS was delivered. Waits for nothing."""
        self._seqs[seq] = ledger_seq
        if len(self._seqs) > _REMEMBERED_MAX:
            self._seqs.popitem(last=False)
        self.look()

    def look(self) -> None:
        """Asks the consumer up to where everything was delivered. Waits for nothing."""
        self._again = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        while self._again:
            await asyncio.sleep(_GATHER_SECONDS)
            self._again = False
            try:
                progress = await consumers.progress(self._deliverer.nc, self._webhook_id)
                if progress is None or not progress.floor:
                    return
                seq = self._seqs.get(progress.floor)
                if seq is None:
                    seq = await consumers.ledger_seq_at(self._deliverer.nc, progress.floor)
                if seq is not None:
                    self._deliverer.receipts.record(self._webhook_id, seq)
            except LedgerUnavailable as error:
                log.info("receipt_waits", webhook_id=self._webhook_id, why=str(error))

    async def close(self) -> None:
        if self._task is not None:
            await end_all([self._task])
