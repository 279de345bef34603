"""What pages of other origins may read: the answers that apps which run in a browser need. Source: Fetch §3.2.

Any origin may, and never with credentials. None of these doors looks at a cookie: whoever asks proves himself by a code
and its verifier, a token or a secret in the request, which a page of another origin has not got, and who has got it
needs no browser. A list of origins for each client, as other servers keep one, would hide nothing from anybody else.
Pages and the authorization endpoint, where cookies count, stay closed: RFC 9700 §2.6.
"""

from __future__ import annotations

from collections.abc import Iterable

from service.outgoing import Headers, Response

_READABLE: Headers = (
    ("access-control-allow-origin", "*"),
    ("access-control-expose-headers", "www-authenticate, retry-after, x-request-id"),
)
_PREFLIGHT_SECONDS = 600


def readable(response: Response) -> Response:
    """The answer as pages of any origin can read it. Errors too: else their apps see a network that failed."""
    return Response(response.status, response.body, (*response.headers, *_READABLE))


def preflight(methods: Iterable[str]) -> Response:
    """What an app may ask of a door that has these methods."""
    return Response(
        204,
        b"",
        (
            ("access-control-allow-methods", ", ".join(methods)),
            ("access-control-allow-headers", "authorization, content-type"),
            ("access-control-max-age", str(_PREFLIGHT_SECONDS)),
        ),
    )
