"""The sign-in page and what it sends. The request that it stands before waits in it, sealed for that browser."""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from service.errors import TooManyRequests
from service.incoming import Incoming, parse_form
from service.outgoing import Response
from service.pages.render import onward, page
from service.pages.values import SignIn
from service.rules.authorization import Parameters, after_sign_in
from service.runtime import Runtime
from service.signin.browser import (
    CSRF,
    Cookie,
    check_csrf,
    csrf_token,
    open_request,
    read_page_form,
    seal_request,
)
from service.signin.passwords import USERNAME_CHARS_MAX, WrongPassword, check
from service.signin.sessions import begin, session_of

SEALED = "request"  # the form field
PURPOSE = "sign-in"
_AUTHORIZE = "/oauth2/authorize"
_ACCOUNT = "/account"


class Waiting(Struct, frozen=True):
    """A request that goes on once somebody has signed in: the app's name, and the query."""

    app: str
    query: str


_decode = msgspec.json.Decoder(Waiting).decode


def sign_in_page(
    runtime: Runtime,
    browser: str,
    waiting: Waiting | None,
    *,
    username: str = "",
    problem: str | None = None,
    cookies: tuple[Cookie, ...] = (),
) -> Response:
    """Whoever signs in goes on with what waits, or to their account."""
    text = msgspec.json.encode(waiting).decode() if waiting is not None else ""
    values = SignIn(
        app=waiting.app if waiting is not None else None,
        username=username[:USERNAME_CHARS_MAX],
        problem=problem,
        hidden=[(SEALED, seal_request(runtime, browser, text)), (CSRF, csrf_token(runtime, browser, PURPOSE))],
    )
    return page("sign_in", values, cookies=cookies)


async def sign_in(runtime: Runtime, incoming: Incoming) -> Response:
    """`POST /sign-in`. Raises: Forbidden, InvalidRequest, Unavailable."""
    form = await read_page_form(runtime, incoming)
    browser = check_csrf(runtime, incoming, form, PURPOSE)
    sealed = open_request(runtime, browser, form.need(SEALED))
    waiting = _decode(sealed) if sealed else None
    username, password = form.get("username") or "", form.get("password") or ""
    try:
        proof = await check(runtime, username, password, incoming.client_ip(runtime.settings))
    except (WrongPassword, TooManyRequests) as error:
        answer = sign_in_page(runtime, browser, waiting, username=username, problem=_sentence(error.detail))
        own = tuple((name.lower(), value) for name, value in error.headers.items())
        return Response(error.status, answer.body, (*answer.headers, *own))
    _, cookie = await begin(runtime, incoming, proof, replacing=await session_of(runtime, incoming))
    base = urlsplit(runtime.settings.issuer).path.rstrip("/")
    if waiting is None:
        return _see_other(base + _ACCOUNT, cookie)
    query = after_sign_in(Parameters(parse_form(waiting.query.encode())))
    return onward(f"{base}{_AUTHORIZE}?{query}", cookies=(cookie,))


def _see_other(path: str, cookie: Cookie) -> Response:
    return Response(303, b"", (("cache-control", "no-store"), ("location", path), cookie))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
