"""What the settings ask of the streams, and by which name a process writes into them.

Apart from the rest, since every process needs it and few need what the API loads.
"""

from __future__ import annotations

import os
import socket

from events.streams import StreamLimits
from service.settings import Settings

_ANSWER_TTL_MARGIN_SECONDS = 60
PUSHED_AND_BEGUN_SECONDS = 600  # how long a person may take who began in time


def stream_limits(settings: Settings) -> StreamLimits:
    """The streams' limits that the settings ask for."""
    return StreamLimits(
        replicas=settings.replicas,
        usage_age_seconds_max=settings.usage_retention_days * 86_400,
        usage_bytes_max=settings.usage_bytes_max,
        ledger_bytes_max=settings.ledger_bytes_max,
        answers_ttl_seconds=settings.refresh_retry_window_seconds + _ANSWER_TTL_MARGIN_SECONDS,
        pushed_ttl_seconds=settings.pushed_request_ttl_seconds + PUSHED_AND_BEGUN_SECONDS,
    )


def writer_name() -> str:
    """Names this process in subjects of the logs that it writes blocks to."""
    return f"{socket.gethostname().split('.')[0]}-{os.getpid()}".replace(" ", "_").replace("*", "_")
