"""The management API: everything over HTTP that is not asked for with every request of an application."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

from litestar import Litestar, Request
from litestar import Response as LitestarResponse
from litestar.exceptions import HTTPException

from service import metrics
from service.api import (
    asyncapi,
    audit,
    backtests,
    blast_radius,
    clients,
    explain,
    exports,
    findings,
    following,
    keys,
    openapi,
    propagation,
    scopes,
    signed_in,
    sql,
    subscribers,
    token_usage,
    tokens,
    usage,
    users,
    uses,
    webhooks,
)
from service.api.health import live, metric_text, ready
from service.api.problems import render
from service.api.routing import GetRuntime, incoming_of, open_route, routes
from service.incoming import Incoming
from service.outgoing import JSON, Response

# Imported for what they declare.
_RESOURCES = (
    audit,
    backtests,
    blast_radius,
    clients,
    explain,
    exports,
    findings,
    following,
    keys,
    propagation,
    scopes,
    signed_in,
    sql,
    subscribers,
    token_usage,
    tokens,
    usage,
    users,
    uses,
    webhooks,
)


_DOCUMENTS = {openapi.PATH: openapi.document, asyncapi.PATH: asyncapi.document}


def _document(make: Callable[[], bytes]) -> Callable[[Incoming], Awaitable[Response]]:
    async def answer(_: Incoming) -> Response:
        return Response(200, make(), (*JSON, ("cache-control", "no-cache")))

    return answer


def _render(request: Request[Any, Any, Any], error: Exception) -> LitestarResponse[bytes]:
    """What is raised outside of a handler: no such path, no such method."""
    incoming = incoming_of(request)
    answer = render(error, incoming)
    metrics.request_done("none", incoming.method, answer.status, 0.0)
    headers = dict(answer.headers)
    media_type = headers.pop("content-type").partition(";")[0]  # it adds the charset to what is text
    return LitestarResponse(answer.body, status_code=answer.status, headers=headers, media_type=media_type)


async def manage(app: Litestar, incoming: Incoming) -> None:
    """Answers by Litestar, which speaks ASGI. Our handlers answer by themselves, and it what it refuses by itself."""
    status, headers = 500, JSON

    async def receive() -> Any:
        return {"type": "http.disconnect"}  # bodies are read by `Incoming`

    async def send(message: Any) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = tuple((name.decode().lower(), value.decode()) for name, value in message["headers"])
        else:
            incoming.answer(Response(status, message.get("body", b""), headers))

    await app(incoming.asgi_scope(), receive, send)  # type: ignore[arg-type]  # a dict is not its TypedDict


def litestar_app(get_runtime: GetRuntime) -> Litestar:
    """The routes. `get_runtime` gives what handlers work with, or raises Unavailable while there is nothing yet."""
    metrics.bind(get_runtime)
    return Litestar(
        route_handlers=[
            *routes(get_runtime),
            open_route("/health/live", lambda _: live()),
            open_route("/health/ready", lambda _: ready(get_runtime)),
            open_route("/metrics", functools.partial(metric_text, get_runtime)),
            *(open_route(path, _document(make)) for path, make in _DOCUMENTS.items()),
        ],
        exception_handlers={HTTPException: _render, Exception: _render},
        openapi_config=None,
        logging_config=None,
    )
