"""A clock that never jumps and does not stand still while the machine sleeps."""

from __future__ import annotations

import sys
import time

# Linux' monotonic clock stands still while the machine is suspended: what was fresh before would look fresh after.
if sys.platform == "linux":

    def boot_seconds() -> float:
        """Seconds since some moment in the past; only differences mean something, and only on this host."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

else:

    def boot_seconds() -> float:
        """Seconds since some moment in the past; only differences mean something, and only on this host."""
        return time.monotonic()
