"""A clock that never jumps and does not stand still while the machine sleeps."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable

# Seconds since some moment in the past: only differences mean something, and only on this host. Linux' monotonic clock
# stands still while the machine is suspended: what was fresh before would look fresh after.
boot_seconds: Callable[[], float] = (
    functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic
)
