"""Delays that grow with failures: in this process only, and for no more keys than it can hold."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from service.errors import TooManyRequests

_KEYS_MAX = 50_000
_FORGOTTEN_AFTER_SECONDS = 3_600.0
_DOUBLINGS_MAX = 30


class Delays:
    """After `free` failures one must wait a second, then two, four and so on, up to `seconds_max`.

    An hour without a failure is forgiven all. What cannot be remembered is not delayed.
    """

    def __init__(self, free: int, seconds_max: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._free = free
        self._seconds_max = seconds_max
        self._clock = clock
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how many, and when the last one was

    def seconds(self, key: str) -> float:
        """How long is yet to be waited."""
        count, last = self._known(key)
        if count < self._free:
            return 0.0
        delay = min(1 << min(count - self._free, _DOUBLINGS_MAX), self._seconds_max)
        return max(0.0, last + delay - self._clock())

    def fail(self, key: str) -> None:
        """Notes a failure."""
        count, _ = self._known(key)
        self._failures[key] = (count + 1, self._clock())
        self._failures.move_to_end(key)
        if len(self._failures) > _KEYS_MAX:
            self._failures.popitem(last=False)

    def undo(self, key: str) -> None:
        """Takes back one failure that was none."""
        count, last = self._known(key)
        if count > 1:
            self._failures[key] = (count - 1, last)
        else:
            self._failures.pop(key, None)

    def forgive(self, key: str) -> None:
        """Takes back all."""
        self._failures.pop(key, None)

    def _known(self, key: str) -> tuple[int, float]:
        count, last = self._failures.get(key, (0, 0.0))
        return (0, 0.0) if self._clock() - last > _FORGOTTEN_AFTER_SECONDS else (count, last)


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
