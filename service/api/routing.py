"""What every management operation goes through, and what each says of itself.

A handler is declared once, with everything that its callers must know: from the same declaration come its route, its
checks and its part of the OpenAPI document. What it is called with has been authenticated and read.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import msgspec
from litestar import Request, route
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send
from msgspec import Struct

from service import metrics
from service.api.problems import broke_off, render
from service.caller import Caller
from service.commands import Prepared
from service.errors import NotFound
from service.idempotency import Repeatable, idempotency_key, once
from service.incoming import Incoming
from service.outgoing import JSON, NO_STORE, Answer, FileResponse, Response, StreamResponse
from service.parsing import JSON as JSON_TYPES
from service.parsing import MERGE_PATCH, decode_json_strictly, json_body, query
from service.registry import Asker
from service.runtime import Runtime
from service.validation import authenticate

B = TypeVar("B")
Q = TypeVar("Q")
GetRuntime = Callable[[], Runtime]
_MAY_HOLD_SLASHES = "name"  # of a scope; what stands in a path is read from it as it was sent, not by Litestar


class Nothing(Struct, frozen=True, forbid_unknown_fields=True):
    """No members."""


class Operation(Struct, frozen=True, kw_only=True):
    """One operation. `needs`: scopes of which one is enough; None for what anybody may ask.

    `body` and `query` are the Structs that are read; `answer` is what is sent with `status`. `errors` are the statuses
    that can occur besides those that every operation has. `in_path`: the name of the path's parameter.
    `media_types`: of answers in other formats than JSON. `headers`: those that the handler reads, and what they mean.
    `body_bytes_max`: if it is not what the settings say.
    """

    method: str
    path: str
    handler: Any
    tag: str
    needs: tuple[str, ...] | None
    answer: Any
    status: int = 200
    body: Any = None
    body_optional: bool = False
    body_bytes_max: int | None = None
    query: Any = Nothing
    errors: tuple[int, ...] = ()
    creates: bool = False
    in_path: str | None = None
    media_types: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def summary(self) -> str:
        """The first line of the handler's docstring."""
        return (self.handler.__doc__ or "").strip().partition("\n")[0].rstrip(".")

    @property
    def description(self) -> str:
        """The rest of it."""
        lines = (self.handler.__doc__ or "").strip().partition("\n")[2].splitlines()
        return "\n".join(line.strip() for line in lines).strip()


class Call(Struct, Generic[B, Q], frozen=True, kw_only=True):
    """One request, as a handler meets it. `name` is what stands in the path, if anything does."""

    runtime: Runtime
    incoming: Incoming
    caller: Caller
    name: str
    query: Q
    body: B
    raw_body: bytes

    @property
    def asker(self) -> Asker:
        return Asker(self.caller, self.incoming.request_id)

    @property
    def request_id(self) -> str:
        return self.incoming.request_id

    async def create(self, prepare: Callable[[bool], Awaitable[Prepared]]) -> dict[str, Any]:
        """Creates once, however often the request is repeated, and answers when it is in force on this host.

        Raises: what `prepare` raises; IdempotencyMismatch, Unavailable.
        """
        key = idempotency_key(self.incoming.header_values("idempotency-key"))
        asked = Repeatable(key, self.incoming.path, self.raw_body)
        answer, seq = await once(self.runtime, self.caller, asked, prepare)
        await self.runtime.applied(seq)
        return answer | {"ledger_seq": seq}


Handler = Callable[[Any], Awaitable[Any]]
OPERATIONS: list[Operation] = []


def operation(method: str, path: str, **declared: Any) -> Callable[[Handler], Handler]:
    """Declares the decorated function as the handler of an operation; see `Operation`."""

    def declare(handler: Handler) -> Handler:
        in_path = path.partition("{")[2].partition("}")[0] or None
        OPERATIONS.append(Operation(method=method, path=path, handler=handler, in_path=in_path, **declared))
        return handler

    return declare


def routes(get_runtime: GetRuntime) -> list[HTTPRouteHandler]:
    """A Litestar route for every operation."""
    return [_route(one, get_runtime) for one in OPERATIONS]


def _route(one: Operation, get_runtime: GetRuntime) -> HTTPRouteHandler:
    decode = msgspec.json.Decoder(one.body).decode if one.body is not None else None

    async def endpoint(request: Request[Any, Any, Any]) -> ASGIApp:
        started = time.perf_counter()
        incoming = incoming_of(request)
        response: Answer
        try:
            response = await _answer(one, get_runtime(), incoming, decode)
        except Exception as error:
            response = render(error, incoming)
        metrics.request_done(one.path, one.method, response.status, time.perf_counter() - started)
        return sending(response, incoming)

    kind = "path" if one.in_path == _MAY_HOLD_SLASHES else "str"
    path = one.path.replace("}", f":{kind}}}")
    return route(path, http_method=[HttpMethod(one.method)], status_code=one.status, name=f"{one.method} {one.path}")(
        endpoint
    )


async def _answer(one: Operation, runtime: Runtime, incoming: Incoming, decode: Any) -> Answer:
    assert one.needs is not None
    caller = await authenticate(runtime, incoming, one.needs)
    name = _name_in_path(one, incoming) if one.in_path else ""
    asked = query(incoming.query_string, one.query)
    raw_body, body = b"", None
    if decode is not None:
        raw_body = await _raw_body(one, runtime, incoming)
        body = decode_json_strictly(decode, raw_body)
    call = Call(runtime=runtime, incoming=incoming, caller=caller, name=name, query=asked, body=body, raw_body=raw_body)
    answer = await one.handler(call)
    if isinstance(answer, Answer):
        return answer
    return Response(one.status, msgspec.json.encode(answer), NO_STORE)


async def _raw_body(one: Operation, runtime: Runtime, incoming: Incoming) -> bytes:
    settings = runtime.settings
    if one.body_optional and incoming.header("content-type") is None:
        data = await incoming.body(settings.request_body_bytes_max, settings.request_seconds_max)
        if not data:
            return b"{}"
    types = MERGE_PATCH if one.method == "PATCH" else JSON_TYPES
    return await json_body(incoming, settings, bytes_max=one.body_bytes_max, types=types)


def _name_in_path(one: Operation, incoming: Incoming) -> str:
    """What stands in the path in the place of the parameter. Raises: NotFound if it is not UTF-8."""
    before, _, rest = one.path.partition("{")
    after = rest.partition("}")[2]
    name = incoming.path[len(before) :]
    if "\ufffd" in name:
        raise NotFound("there is nothing at this path")
    return name if one.in_path == _MAY_HOLD_SLASHES else name.rstrip("/").removesuffix(after)


def incoming_of(request: Request[Any, Any, Any]) -> Incoming:
    """The request that Litestar was given an ASGI scope of."""
    incoming: Incoming = request.scope["incoming"]  # type: ignore[typeddict-item]  # our own
    return incoming


def sending(response: Answer, incoming: Incoming) -> ASGIApp:
    """The response as Litestar takes it."""

    async def send_it(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
        if not isinstance(response, StreamResponse):
            if isinstance(response, FileResponse) and response.sending is not None:
                await incoming.send_file(response, response.sending)
                return
            incoming.answer(response)
            return
        try:
            await incoming.stream(response)
        except Exception as error:
            broke_off(error, incoming)

    return send_it


def open_route(path: str, answer: Callable[[Incoming], Awaitable[Response]]) -> HTTPRouteHandler:
    """A GET that anybody may ask."""

    async def endpoint(request: Request[Any, Any, Any]) -> ASGIApp:
        started = time.perf_counter()
        incoming = incoming_of(request)
        try:
            response = await answer(incoming)
        except Exception as error:
            response = render(error, incoming)
        metrics.request_done(path, "GET", response.status, time.perf_counter() - started)
        return sending(response, incoming)

    return route(path, http_method=[HttpMethod.GET], name=f"GET {path}")(endpoint)


__all__ = [
    "JSON",
    "OPERATIONS",
    "Call",
    "Nothing",
    "Operation",
    "incoming_of",
    "open_route",
    "operation",
    "routes",
    "sending",
]
