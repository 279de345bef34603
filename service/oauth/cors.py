"""What pages of other origins may read: the answers that apps which run in a browser need. Source: Fetch §3.2.

Any origin may, and never with credentials. None of these doors looks at a cookie: whoever asks proves himself by a code
and its verifier, a token or a secret in the request, which a page of another origin has not got, and who has got it
needs no browser. A list of origins for each client, as other servers keep one, would hide nothing from anybody else.
Pages and the authorization endpoint, where cookies count, stay closed: RFC 9700 §2.6.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from service.api.problems import render
from service.incoming import Incoming
from service.outgoing import Headers, Response
from service.runtime import Runtime

Handler = Callable[[Runtime, Incoming], Awaitable[Response]]

_READABLE: Headers = (
    ("access-control-allow-origin", "*"),
    ("access-control-expose-headers", "www-authenticate, retry-after, x-request-id"),
)
_PREFLIGHT_SECONDS = 600


def from_any_origin(door: dict[str, Handler]) -> dict[str, Handler]:
    """A door, handlers by method, whose answers and errors pages of any origin can read, and which they may ask for."""
    answered = {method: _readable(handler) for method, handler in door.items()}
    return {**answered, "OPTIONS": _preflight(", ".join(door))}


def _readable(handler: Handler) -> Handler:
    async def answer(runtime: Runtime, incoming: Incoming) -> Response:
        try:
            response = await handler(runtime, incoming)
        except Exception as error:
            response = render(error, incoming)
        return Response(response.status, response.body, (*response.headers, *_READABLE))

    return answer


def _preflight(methods: str) -> Handler:
    response = Response(
        204,
        b"",
        (
            *_READABLE,
            ("access-control-allow-methods", methods),
            ("access-control-allow-headers", "authorization, content-type"),
            ("access-control-max-age", str(_PREFLIGHT_SECONDS)),
        ),
    )

    async def answer(_: Runtime, __: Incoming) -> Response:
        return response

    return answer
