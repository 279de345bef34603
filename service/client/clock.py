"""A clock that never jumps and does not stand still while the machine sleeps."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable

# Seconds since some moment in the past: only differences mean something, and only on this host. `time.monotonic` stands
# still while the machine is suspended, on Linux and macOS: what was fresh before would look fresh after. The clock that
# goes on is called CLOCK_BOOTTIME on Linux, and CLOCK_MONOTONIC on macOS (clock_gettime(3)).
if sys.platform == "linux":
    boot_seconds: Callable[[], float] = functools.partial(time.clock_gettime, time.CLOCK_BOOTTIME)
elif sys.platform == "darwin":
    boot_seconds = functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
else:
    boot_seconds = time.monotonic
