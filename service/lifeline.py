"""Children that do not outlive their parent: a process that is killed can end nobody itself, so the kernel is asked."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

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
