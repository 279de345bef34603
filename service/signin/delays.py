"""Delays that grow with failures: in this process only, and for no more keys than it can hold."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from msgspec import Struct

from service.errors import TooManyRequests
from service.settings import Settings

_KEYS_MAX = 50_000
_FORGOTTEN_AFTER_SECONDS = 3_600.0
_DOUBLINGS_MAX = 30
_OF_ADDRESS_SECONDS_MAX = 30
_PASSES_SECONDS = 60.0


class _Kept(Struct):
    """Of one key. `underway`: attempts that are not decided, of which the last began at `begun`.

    `last`: when the last failure was. `from_`: since when failures pass with time.
    """

    count: int = 0
    last: float = 0.0
    from_: float = 0.0
    underway: int = 0
    begun: float = 0.0


class Delays:
    """After `free` failures one must wait a second, then two, four and so on, up to `seconds_max`.

    An hour without a failure is forgiven all, and each `passes_seconds` one failure, if it is given. An attempt counts
    as a failure while it is underway, and leaves no trace if it is none. What cannot be remembered is not delayed.
    """

    def __init__(
        self,
        free: int,
        seconds_max: float,
        *,
        passes_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._free = free
        self._seconds_max = seconds_max
        self._passes_seconds = passes_seconds
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def seconds(self, key: str) -> float:
        """How long is yet to be waited."""
        kept = self._known(key)
        count = kept.count + kept.underway
        if count < self._free:
            return 0.0
        delay = min(1 << min(count - self._free, _DOUBLINGS_MAX), self._seconds_max)
        last = max(kept.last, kept.begun) if kept.underway else kept.last
        return max(0.0, last + delay - self._clock())

    def begin(self, key: str) -> None:
        """Notes an attempt, which `fail` or `undo` decides."""
        kept = self._known(key)
        kept.underway, kept.begun = kept.underway + 1, self._clock()
        self._keep(key, kept)

    def fail(self, key: str) -> None:
        """Notes that an attempt failed."""
        kept = self._known(key)
        moment = self._clock()
        if kept.count == 0:
            kept.from_ = moment
        kept.count, kept.last, kept.underway = kept.count + 1, moment, max(0, kept.underway - 1)
        self._keep(key, kept)

    def undo(self, key: str) -> None:
        """Takes back an attempt, which was no failure: how long others must wait is as it was before."""
        kept = self._known(key)
        kept.underway = max(0, kept.underway - 1)
        if not kept.count and not kept.underway:
            self._kept.pop(key, None)

    def forgive(self, key: str) -> None:
        """Takes back all."""
        self._kept.pop(key, None)

    def _known(self, key: str) -> _Kept:
        kept, moment = self._kept.get(key) or _Kept(), self._clock()
        if moment - kept.last > _FORGOTTEN_AFTER_SECONDS:
            kept.count = 0
        if self._passes_seconds is not None and kept.count:
            passed = int((moment - kept.from_) // self._passes_seconds)
            kept.count, kept.from_ = max(0, kept.count - passed), kept.from_ + passed * self._passes_seconds
        return kept

    def _keep(self, key: str, kept: _Kept) -> None:
        self._kept[key] = kept
        self._kept.move_to_end(key)
        if len(self._kept) > _KEYS_MAX:
            self._kept.popitem(last=False)


def address_delays(settings: Settings, *, of: int) -> Delays:
    """For addresses, from which many people may come, or networks of more: short, and they pass by themselves."""
    seconds_max = min(_OF_ADDRESS_SECONDS_MAX, settings.sign_in_delay_seconds_max)
    return Delays(settings.sign_in_failures_of_address_free * of, seconds_max, passes_seconds=_PASSES_SECONDS / of)


class Counters:
    """Where one attempt to sign in is counted: by account and by address, or for a browser that is known."""

    def __init__(self, counted: Sequence[tuple[Delays, str]]) -> None:
        self._counted = counted
        self._underway = False

    def begin(self) -> None:
        """Raises: TooManyRequests if one must wait; then it was no attempt."""
        check_delays(*(delays.seconds(key) for delays, key in self._counted))
        for delays, key in self._counted:
            delays.begin(key)
        self._underway = True

    def fail(self) -> None:
        """The attempt failed."""
        for delays, key in self._counted:
            delays.fail(key)
        self._underway = False

    def undo(self) -> None:
        """It did not, or was none."""
        for delays, key in self._counted if self._underway else ():
            delays.undo(key)
        self._underway = False


def check_delays(*waits: float) -> None:
    """Raises: TooManyRequests for the longest."""
    seconds = math.ceil(max(waits))
    if seconds > 0:
        raise TooManyRequests(
            "there were too many attempts to sign in",
            fix=f"wait {_worded(seconds)}, and then try again",
            headers={"Retry-After": str(seconds)},
        )


def _worded(seconds: int) -> str:
    if seconds == 1:
        return "a second"
    return f"{seconds} seconds" if seconds < 120 else f"{math.ceil(seconds / 60)} minutes"
