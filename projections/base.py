"""What a projection is, and the one loop that feeds it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import structlog

from events.errors import LedgerUnavailable
from events.streams import Connection, RawMessage, follow, stream_state

log = structlog.get_logger()

CONFIRM_SECONDS = 0.2
_CANCEL_AGAIN_SECONDS = 0.05
_ROOM_SECONDS = 0.01
_GATHER_SECONDS = 0.02  # handing a batch to a thread costs as much as folding several messages


@runtime_checkable
class Projection(Protocol):
    """A fold of one or more streams. Everything in it can be thrown away and rebuilt.

    `apply` commits rows and position together, skips what it has seen, and never refuses a recorded event; bytes it
    cannot read raise UndecodableEvent and stop it, since skipping them could lose a revocation.
    """

    name: str
    version: int

    def position(self, stream: str) -> int:
        """The last applied sequence of `stream`, 0 for none."""

    def apply(self, stream: str, batch: list[RawMessage]) -> None:
        """Folds the batch; an empty one means that nothing arrived for a while."""

    def confirm(self, stream: str, end: int, asked_at_ns: int) -> None:
        """The stream ended at `end` at boot time `asked_at_ns`, and all of it has been applied."""

    def belongs_to(self, stream: str, created: str, end: int) -> bool:
        """Whether what was folded so far comes from this very stream, made at `created` and now ending at `end`."""

    def reset(self) -> None:
        """Throws everything away."""


@runtime_checkable
class SlowProjection(Projection, Protocol):
    """One whose `apply` takes long: it is called in a thread, one at a time for each stream, when there is room."""

    def has_room(self, stream: str) -> bool:
        """Whether `apply` would not have to wait."""


@runtime_checkable
class Publication(Protocol):
    """A projection into another stream, which has to be waited for: else as `Projection`."""

    name: str

    def position(self, stream: str) -> int: ...

    async def publish(self, stream: str, batch: list[RawMessage]) -> None:
        """As `Projection.apply`. What it publishes is on disk when it ends. Raises: LedgerUnavailable."""

    def confirm(self, stream: str, end: int, asked_at_ns: int) -> None: ...

    def belongs_to(self, stream: str, created: str, end: int) -> bool: ...

    def reset(self) -> None: ...


def boot_time_ns() -> int:
    """Nanoseconds since the host started, the same for every process, suspended time included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


async def run(
    nc: Connection,
    projection: Projection | Publication,
    streams: tuple[str, ...],
    *,
    progress: Callable[[str, int, int], None] | None = None,
    until_caught_up: bool = False,
) -> None:
    """Feeds the projection for ever, or until it has reached the present end of every stream.

    `progress` is called with stream, position and end, at most about five times a second.

    Raises: UndecodableEvent; LedgerUnavailable if the server cannot be asked at the start, if a stream was replaced
    by another one, or if events are missing. Called again, it begins where the projection stands.
    """
    created = {stream: await _check_origin(nc, projection, stream) for stream in streams}
    tasks = [asyncio.create_task(_feed(nc, projection, stream, until_caught_up=until_caught_up)) for stream in streams]
    confirming = [
        asyncio.create_task(_confirm(nc, projection, stream, created[stream], progress)) for stream in streams
    ]
    feeding: asyncio.Future[Any] = asyncio.gather(*tasks)
    try:
        # Whichever fails ends all: a projection that is fed and no more confirmed would be stale for ever.
        await asyncio.wait({feeding, *confirming}, return_when=asyncio.FIRST_COMPLETED)
        for task in confirming:
            if task.done():
                task.result()
        await feeding
    finally:
        await end_all([*tasks, *confirming])
        await asyncio.gather(feeding, *tasks, *confirming, return_exceptions=True)


async def end_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancels the tasks until they have ended.

    Once is not enough: a cancellation that meets the answer to a request is swallowed by `asyncio.wait_for` of Python
    3.11, which the NATS client uses, and the task goes on as if nothing had been asked of it.
    """
    running = set(tasks)
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=_CANCEL_AGAIN_SECONDS)


async def _check_origin(nc: Connection, projection: Projection | Publication, stream: str) -> str:
    """When the stream was created, after a projection of another one was thrown away."""
    state = await stream_state(nc, stream)
    if not projection.belongs_to(stream, state["created"], int(state["last_seq"])):
        log.error(
            "projection_is_from_another_log",
            projection=projection.name,
            stream=stream,
            position=projection.position(stream),
            end=state["last_seq"],
            action="rebuilding from the log; was a backup restored?",
        )
        projection.reset()
        projection.belongs_to(stream, state["created"], int(state["last_seq"]))
    return str(state["created"])


async def _feed(nc: Connection, projection: Projection | Publication, stream: str, *, until_caught_up: bool) -> None:
    end = _end(await stream_state(nc, stream)) if until_caught_up else None
    if end is not None and projection.position(stream) >= end:
        return
    slow = projection if isinstance(projection, SlowProjection) else None
    gather_seconds = _GATHER_SECONDS if slow is not None else 0.0
    following = follow(nc, stream, projection.position(stream), gather_seconds=gather_seconds)
    # A thread of its own: what several take and give back in turn is not given back to the system.
    with ThreadPoolExecutor(1, f"apply-{stream}") as thread:
        async with contextlib.aclosing(following) as batches:
            async for batch in batches:
                if isinstance(projection, Publication):
                    await projection.publish(stream, batch)
                elif slow is None:
                    projection.apply(stream, batch)
                else:
                    while not slow.has_room(stream):  # noqa: ASYNC110 - another thread makes it
                        await asyncio.sleep(_ROOM_SECONDS)
                    await _finished(thread.submit(slow.apply, stream, batch))
                if end is not None and projection.position(stream) >= end:
                    return


async def _finished(work: concurrent.futures.Future[None]) -> None:
    """Ends only when the work has, even if it is cancelled: whoever feeds the projection next goes on behind it."""
    done = asyncio.wrap_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not done.done():
        try:
            await asyncio.wait({done})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        done.exception()  # nobody else will look
        raise cancelled
    done.result()


def _end(state: dict[str, Any]) -> int:
    """The last sequence that can still be had: retention may have taken all of a stream, and then nothing is."""
    return int(state["last_seq"]) if state["messages"] else 0


async def _confirm(
    nc: Connection,
    projection: Projection | Publication,
    stream: str,
    created: str,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Says again and again how fresh the projection is: the time at which the end that it has reached was asked."""
    while True:
        asked_at, reached = boot_time_ns(), projection.position(stream)
        try:
            state = await stream_state(nc, stream, seconds=1)
        except LedgerUnavailable:
            state = None
        if state is not None:
            if state["created"] != created or int(state["last_seq"]) < reached:
                # A backup was restored under a running service: what is appended now would be taken for seen.
                raise LedgerUnavailable(f"stream {stream} is another one than before, or ends before {reached}")
            end = _end(state)
            while projection.position(stream) < end:
                if progress is not None:
                    progress(stream, projection.position(stream), end)
                await asyncio.sleep(0.002 if end - projection.position(stream) < 1000 else CONFIRM_SECONDS)
            projection.confirm(stream, end, asked_at)
            if progress is not None:
                progress(stream, projection.position(stream), end)
        await asyncio.sleep(max(0.0, CONFIRM_SECONDS - (boot_time_ns() - asked_at) / 1e9))
