"""Children that do not outlive their parent, and that hear early that they are to stop.

A process that is killed can end nobody itself, so the kernel is asked. The HTTP server's workers stop only when all
answers have ended, and tell nobody that they are to stop: so their parent tells them through a pipe that they inherit.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable

SUPERVISED_BY = "SUPERVISED_BY"  # set by the supervisor for the processes that it starts
SERVED_BY = "SERVED_BY"  # set by the HTTP server for its workers
_PR_SET_PDEATHSIG = 1


def end_with_parent(variable: str, number: signal.Signals = signal.SIGTERM) -> None:
    """Has the kernel send `number` to this process when its parent ends, whose id the environment's `variable` holds.

    Does nothing where it is not set, and on other systems than Linux.
    """
    parent = os.environ.get(variable)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit("the parent has ended")


_stop_pipe: list[int] = []


def prepare_stop() -> None:
    """In the parent, before its workers are forked."""
    _stop_pipe[:] = os.pipe()
    os.set_blocking(_stop_pipe[1], False)


def announce_stop() -> None:
    """In the parent: its workers, and those that are forked later, are to stop. May be called by a signal's handler."""
    if _stop_pipe:
        with contextlib.suppress(BlockingIOError):  # it was told
            os.write(_stop_pipe[1], b".")


def on_stop(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """In a worker: calls once when the parent announces the stop, or has."""
    if not _stop_pipe:
        return
    reading = _stop_pipe[0]

    def told() -> None:
        loop.remove_reader(reading)  # what was written is left for the other workers
        callback()

    loop.add_reader(reading, told)
