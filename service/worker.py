"""What the HTTP server loads in each worker process."""

from __future__ import annotations

import gc
import signal

from service import logs
from service.app import App
from service.lifeline import SERVED_BY, end_with_parent
from service.settings import Settings

# Objects, and younger collections, until the collector looks at a generation. A request leaves no cycles behind, so
# that looking after every 700 objects, as Python does by itself, finds nothing in those of requests under way.
_COLLECT_AFTER = (20_000, 20, 20)


def create() -> App:
    """The application, with the settings that the environment gives."""
    # Or a killed server would leave its workers behind, which nobody stops and which hold the port. Granian's handler
    # of SIGTERM blocks for ever in a worker that is still starting, so it has to be SIGKILL.
    end_with_parent(SERVED_BY, signal.SIGKILL)
    settings = Settings.load()
    logs.configure(settings)
    gc.freeze()  # what was loaded stays: the collector need not walk it again and again
    gc.set_threshold(*_COLLECT_AFTER)
    return App(settings)
