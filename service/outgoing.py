"""A response of the endpoints that speak ASGI themselves."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

Headers = tuple[tuple[bytes, bytes], ...]

JSON: Headers = ((b"content-type", b"application/json"), (b"x-content-type-options", b"nosniff"))
NO_STORE: Headers = (*JSON, (b"cache-control", b"no-store"), (b"pragma", b"no-cache"))


class Response(Struct, frozen=True):
    """Status, body and headers; `content-length` and `x-request-id` are added when it is sent."""

    status: int
    body: bytes
    headers: Headers = JSON


async def send_response(send: Any, response: Response, request_id: str) -> None:
    """Sends the response over ASGI."""
    headers = [
        *response.headers,
        (b"content-length", str(len(response.body)).encode()),
        (b"x-request-id", request_id.encode()),
    ]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})
