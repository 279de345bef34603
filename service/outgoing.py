"""What is answered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from msgspec import Struct

Headers = tuple[tuple[str, str], ...]

JSON: Headers = (("content-type", "application/json"), ("x-content-type-options", "nosniff"))
NO_STORE: Headers = (*JSON, ("cache-control", "no-store"), ("pragma", "no-cache"))


class Response(Struct, frozen=True, gc=False):
    """Status, body and headers, all ASCII; `Incoming.answer` adds `x-request-id`, the server `content-length`."""

    status: int
    body: bytes
    headers: Headers = JSON


class Sending(Struct, frozen=True, gc=False):
    """What is sent for a longer time. It ends soon when `stopping` is set.

    `ended` is called once, when neither this process nor the server holds anything of it any more.
    """

    stopping: asyncio.Event
    ended: Callable[[], None]


class FileResponse(Struct, frozen=True, gc=False):
    """A file of `size` bytes, which the server reads while it sends, and so holds only some of at a time.

    With `sending` a client that takes nothing of it, or too little, is given up.
    """

    status: int
    path: Path
    size: int
    headers: Headers
    sending: Sending | None = None


class StreamResponse(Struct, frozen=True, gc=False):
    """What is sent part by part as it comes, until `parts` end, the client hangs up or it is to stop."""

    status: int
    headers: Headers
    parts: AsyncGenerator[bytes, None]
    sending: Sending


Answer = Response | FileResponse | StreamResponse
