"""The yardstick: a bare ASGI application that reads the body of a request and sends it back.

`python -m tests.bench.echo PORT WORKERS` serves it as the service's API is served.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any

from service.settings import Settings
from service.supervisor import http_server

HEADERS = [(b"content-type", b"application/octet-stream")]


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Any method, any path: 200 and the same bytes."""
    if scope["type"] != "http":
        return
    message = await receive()
    body = message.get("body", b"")
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    settings = Settings(port=int(sys.argv[1]), workers=int(sys.argv[2]))
    http_server("tests.bench.echo:app", settings, factory=False, interface="asgi").serve()
