"""What one process of the API holds: connections, the log, the view, keys and limits."""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from msgspec import Struct

from events.errors import LedgerUnavailable
from events.ledger import Ledger
from events.receipts import ReceiptLog
from events.streams import ANSWERS, IDEMPOTENCY, PUSHED, Connection, check, connect
from events.usage import UsageLog
from projections.asking_receipts import Registered, SignsOfLife
from projections.current import CurrentReader, Freshness, view_path
from service.caller import Caller
from service.errors import TooManyRequests, Unavailable
from service.feed import Feed
from service.keys import Bucket, MasterKey, SubjectKeys
from service.settings import Settings
from service.signin.delays import Delays, address_delays
from service.signing import SigningKeys
from service.snapshots import Snapshots
from service.streams import stream_limits, writer_name

if TYPE_CHECKING:
    from service.rules.subscribers import Subscriber

APPLIED_SECONDS_MAX = 3.0
_POLL_SECONDS = 0.0005
_POLL_UNHURRIED_SECONDS = 0.004  # of which many at once cost next to nothing
_LIMITER_KEYS_MAX = 50_000
CODES_PER_MINUTE_MAX = 30  # for one client in one session: more than all its tabs want when a browser opens them again
_PLACES_OF_A_CLIENT = 4  # from so many networks a public client may push as much as it can


class ViewWaiter:
    """Waits until the view has applied a sequence: one poll for all that wait, and none while nobody does."""

    def __init__(self, view: CurrentReader, poll_seconds: float = _POLL_SECONDS) -> None:
        self._view = view
        self._poll_seconds = poll_seconds
        self._waiting: list[tuple[int, asyncio.Future[bool], float]] = []
        self._task: asyncio.Task[None] | None = None

    async def applied(self, seq: int, seconds: float = APPLIED_SECONDS_MAX) -> bool:
        """Whether the view reached `seq` within `seconds`."""
        if self._view.freshness().position >= seq:
            return True
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((seq, future, time.monotonic() + seconds))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._poll())
        return await future

    async def _poll(self) -> None:
        while self._waiting:
            position, clock = self._view.freshness().position, time.monotonic()
            still = []
            for seq, future, deadline in self._waiting:
                if future.done():
                    continue
                if position >= seq:
                    future.set_result(True)
                elif clock > deadline:
                    future.set_result(False)
                else:
                    still.append((seq, future, deadline))
            self._waiting = still
            await asyncio.sleep(self._poll_seconds)


class RateLimiter:
    """Counts by key and minute, in this process only. What it cannot remember it does not limit."""

    def __init__(self, per_minute_max: int, *, of: str = "failures") -> None:
        self._max = per_minute_max
        self._of = of
        self._counts: OrderedDict[tuple[str, ...], tuple[int, int]] = OrderedDict()

    def check(self, *key: str) -> None:
        """Raises: TooManyRequests when the key has used up its minute."""
        minute, count = self._counts.get(key, (0, 0))
        if minute == int(time.time()) // 60 and count >= self._max:
            wait = 60 - int(time.time()) % 60
            raise TooManyRequests(
                f"more than {self._max} {self._of} within a minute", headers={"Retry-After": str(wait)}
            )

    def take(self, *key: str, times: int = 1) -> None:
        """Notes failures. Raises: TooManyRequests when the key had used up its minute before them."""
        self.check(*key)
        self.count(*key, times=times)

    def count(self, *key: str, times: int = 1) -> None:
        """Notes failures."""
        this = int(time.time()) // 60
        minute, count = self._counts.get(key, (this, 0))
        self._counts[key] = (this, count + times if minute == this else times)
        self._counts.move_to_end(key)
        if len(self._counts) > _LIMITER_KEYS_MAX:
            self._counts.popitem(last=False)


class Places:
    """So many at once in this process, and so many of them for one."""

    def __init__(self, most: int, most_for_one: int) -> None:
        self._most = most
        self._most_for_one = most_for_one
        self._taken: dict[str, int] = {}
        self.taken = 0

    def take(self, what: str, who: str) -> None:
        """Until `give_back`. Raises: Unavailable when all are taken, TooManyRequests when they have their share."""
        if self.taken >= self._most:
            raise Unavailable(
                f"{what}: {self._most} at once are the most", retry_after_seconds=2, fix="retry, or ask another host"
            )
        taken = self._taken.get(who, 0)
        if taken >= self._most_for_one:
            raise TooManyRequests(
                f"{what} of one user or client: {self._most_for_one} at once are the most",
                fix="retry, ask another host, or follow as another client",
                headers={"Retry-After": "2"},
            )
        self._taken[who] = taken + 1
        self.taken += 1

    def give_back(self, who: str) -> None:
        self.taken -= 1
        self._taken[who] -= 1
        if not self._taken[who]:
            del self._taken[who]


class RememberedCaller(Struct, frozen=True, gc=False):
    """A caller whose token was good for `needs` at this position of the view, and is until the view moves on.

    Or until the token expires, in seconds since 1970.
    """

    position: int
    expires_at: float
    needs: tuple[str, ...]
    caller: Caller


class Runtime:
    """Everything that handlers need. Made once a process by `Runtime.start`."""

    def __init__(self, settings: Settings, nc: Connection) -> None:
        self.settings = settings
        self.nc = nc
        self.master = MasterKey.load(settings.master_key, settings.data_dir)
        self.ledger = Ledger(nc)
        self.usage = UsageLog(nc, writer_name(), settings.use_recording, buffered_uses_max=settings.use_buffer_max)
        self.view = CurrentReader(view_path(settings.data_dir))
        self.waiter = ViewWaiter(self.view)
        self.unhurried = ViewWaiter(self.view, _POLL_UNHURRIED_SECONDS)
        self.feed = Feed(nc)
        self.receipts = ReceiptLog(nc, writer_name())
        self.registered = Registered(self.ledger)
        self.signs_of_life = SignsOfLife(nc)
        self.subject_keys = SubjectKeys(nc, self.master)
        self.signing_keys = SigningKeys(self)
        self.answers = Bucket(nc, ANSWERS)
        self.idempotency = Bucket(nc, IDEMPOTENCY)
        self.pushed = Bucket(nc, PUSHED)
        self.client_failures = RateLimiter(settings.client_auth_failures_per_minute_max)
        self.account_delays = Delays(settings.sign_in_failures_free, settings.sign_in_delay_seconds_max)
        self.browser_delays = Delays(settings.sign_in_failures_free, settings.sign_in_delay_seconds_max)
        self.address_delays = address_delays(settings, of=1)
        # The larger an IPv6 network, the more who are not each other's fault may be in it.
        self.network_delays = {56: address_delays(settings, of=4), 48: address_delays(settings, of=16)}
        self.unknown_tokens = RateLimiter(settings.unknown_tokens_per_minute_max)
        pushes_max = settings.pushed_requests_per_minute_max
        self.pushes = RateLimiter(pushes_max, of="pushed requests")
        self.pushes_unproven = RateLimiter(_PLACES_OF_A_CLIENT * pushes_max, of="pushed requests of the client")
        # Each is an event for ever, and needs no click once the person has consented.
        self.codes = RateLimiter(CODES_PER_MINUTE_MAX, of="authorization codes for one session of this person")
        self.callers: dict[str, RememberedCaller] = {}  # by Authorization header
        self.subscribers: dict[str, tuple[float, Subscriber]] = {}  # by id, with the monotonic time they were read at
        self.followers = Places(settings.followers_max, settings.followers_per_caller_max)
        self.snapshots = Snapshots(self.view, settings.data_dir / "snapshots")
        self.stopping = asyncio.Event()  # whoever waits for something new is to answer now

    @classmethod
    async def start(cls, settings: Settings) -> Runtime:
        """Connects and checks the server. Raises: LedgerUnavailable, UnsafeServer, MasterKeyMismatch."""
        creds = settings.nats_creds
        if settings.nats_url is None:
            raise LedgerUnavailable("no nats_url: start the service with `token-ledger up`, or name the servers")
        nc = await connect(settings.nats_url, creds, name=f"api-{os.getpid()}")
        runtime = None
        try:
            await check(nc, stream_limits(settings))
            runtime = cls(settings, nc)
            await runtime.signing_keys.start()
        except BaseException:
            # Whoever calls tries again, and LMDB opens a file only once in a process.
            if runtime is not None:
                runtime.view.close()
            await nc.close()
            raise
        return runtime

    async def stop(self) -> None:
        """Writes what is held and closes."""
        self.signing_keys.stop()
        self.feed.stop()
        self.snapshots.close()
        self.signs_of_life.stop()
        await asyncio.gather(self.usage.close(), self.receipts.close())
        await self.nc.close()
        self.view.close()

    def check_fresh(self, fresh: Freshness) -> None:
        """Nothing is said from a view that may have missed too much. Raises: Unavailable."""
        if fresh.age_seconds > self.settings.view_staleness_seconds_max:
            raise Unavailable(
                "the view of current tokens is older than it may be",
                fix="wait until the projector has caught up; `token-ledger doctor` says what holds it up",
            )

    async def applied(self, seq: int, *, hurry: bool = True) -> None:
        """Waits until this host's view has applied `seq`. Raises: Unavailable, naming the sequence."""
        if not await (self.waiter if hurry else self.unhurried).applied(seq):
            raise NotYetApplied(seq)

    async def view_at_end(self) -> None:
        """Waits until the view has reached the log's end as of now: after it, what is unknown is unknown.

        In `buffered` mode a log that cannot be asked leaves the view as it is. Raises: Unavailable.
        """
        try:
            end = await self.ledger.last_seq()
        except LedgerUnavailable as error:
            if self.settings.use_recording == "buffered":
                return
            raise Unavailable("the log cannot be asked whether this is known", private=str(error)) from error
        if not await self.waiter.applied(end):
            raise Unavailable("the view is behind the log")


class NotYetApplied(Unavailable):
    """The event is durable and this host's view has not applied it in time. A retry is safe."""

    def __init__(self, seq: int) -> None:
        super().__init__(f"recorded at ledger_seq {seq}, and not yet in force on this host; repeat the request")
        self.ledger_seq = seq


__all__ = ["NotYetApplied", "RateLimiter", "Runtime", "ViewWaiter"]
