"""When a delivery that failed is tried again."""

from __future__ import annotations

import asyncio
import random

SCHEDULE_SECONDS = (1.0, 5.0, 30.0, 120.0, 300.0, 600.0, 900.0)  # the last one from then on
_JITTER = 0.2
_RECOVERED_SECONDS = 10.0


def delay_seconds(number: int) -> float:
    """How long to wait after the attempt with this number, from 1, spread so that many do not come at once."""
    seconds = SCHEDULE_SECONDS[min(number, len(SCHEDULE_SECONDS)) - 1]
    return seconds * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - no secret


class Pauses:
    """The deliveries of one webhook that wait for their next attempt."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], tuple[asyncio.TimerHandle, float]] = {}

    async def wait(self, seconds: float, at_least_seconds: float = 0.0) -> None:
        """Returns after `seconds`, sooner if the receiver recovers, but never before `at_least_seconds`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        soonest = loop.time() + max(at_least_seconds, min(seconds, _RECOVERED_SECONDS))
        timer = loop.call_at(max(loop.time() + seconds, soonest), _end, future)
        self._waiting[future] = (timer, soonest)
        try:
            await future
        finally:
            self._waiting.pop(future)[0].cancel()

    def recovered(self) -> None:
        """The receiver takes deliveries again: none waits much longer.

        One that it refuses while it takes all others comes again no more often than every ten seconds.
        """
        loop = asyncio.get_running_loop()
        for future, (timer, soonest) in self._waiting.items():
            due = max(soonest, loop.time() + random.uniform(0.0, 1.0))  # noqa: S311 - as above
            if due < timer.when():
                timer.cancel()
                self._waiting[future] = (loop.call_at(due, _end, future), soonest)

    def end(self) -> None:
        """Cancels all of them."""
        for future in list(self._waiting):
            future.cancel()


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
