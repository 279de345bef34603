"""`/sign-in`, `/sign-out` and `/oauth2/logout`: what people do at them, with or without an app that waits.

What an app wants is carried by the pages themselves, sealed for that browser: the authorization request behind the
sign-in page, the app to go back to behind the sign-out page. Nothing leads to an address that no client registered.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import msgspec
from msgspec import Struct

from projections.registry import Client, Session
from service.errors import InvalidRequest, TooManyRequests
from service.incoming import Incoming, parse_form
from service.oauth.forms import Form
from service.oauth.id_tokens import read_id_token_hint
from service.outgoing import Response
from service.pages.render import onward, page, see_other
from service.pages.values import Link, SignedOut, SignIn, SignOut
from service.registry import profile_of
from service.runtime import Runtime
from service.signin.acquainted import acquaint
from service.signin.browser import (
    CSRF,
    Cookie,
    check_csrf,
    csrf_token,
    known_browser,
    open_carried,
    open_request,
    read_page_form,
    seal_request,
)
from service.signin.passwords import USERNAME_CHARS_MAX, WrongPassword, check, name_hash
from service.signin.sessions import begin, end, session_of

REQUEST = "request"  # the field of what waits, sealed
SIGN_IN: Final = "sign-in"  # the purpose of the form
AUTHORIZE = "/oauth2/authorize"
ACCOUNT = "/account"
_STATE_CHARS_MAX = 4_096


# Signing in


async def sign_in_page(runtime: Runtime, incoming: Incoming) -> Response:
    """`GET /sign-in`, without an app that waits. Raises: Unavailable."""
    if await session_of(runtime, incoming) is not None:
        return see_other(ACCOUNT)
    browser, cookies = known_browser(runtime, incoming)
    return _sign_in_again(runtime, browser, seal_request(runtime, browser, "", SIGN_IN), cookies=cookies)


async def sign_in(runtime: Runtime, incoming: Incoming) -> Response:
    """`POST /sign-in`: a session of its own for each, and on to what waits.

    Raises: Forbidden, InvalidRequest, Unavailable.
    """
    form = await read_page_form(runtime, incoming)
    browser = check_csrf(runtime, incoming, form, SIGN_IN)
    sealed = form.need(REQUEST)
    query = open_request(runtime, browser, sealed, SIGN_IN)
    username = form.get("username") or ""
    ip = incoming.client_ip(runtime.settings)
    try:
        proof = await check(runtime, username, form.get("password") or "", ip, incoming=incoming)
    except (WrongPassword, TooManyRequests) as refused:
        return _sign_in_again(runtime, browser, sealed, query=query, username=username, refused=refused)
    _, cookie = await begin(runtime, incoming, proof)
    cookies = (cookie, acquaint(runtime, incoming, name_hash(runtime, username), proof.user_seq))
    if not query:
        return see_other(ACCOUNT, cookies=cookies)
    return onward(f"{_base(runtime)}{AUTHORIZE}?{query}", cookies=cookies)


def _sign_in_again(
    runtime: Runtime,
    browser: str,
    sealed: str,
    *,
    query: str = "",
    username: str = "",
    refused: WrongPassword | TooManyRequests | None = None,
    cookies: tuple[Cookie, ...] = (),
) -> Response:
    values = SignIn(
        app=_app_of(runtime, query),
        username=username[:USERNAME_CHARS_MAX],
        problem=_told(refused) if refused is not None else None,
        hidden=[(REQUEST, sealed), (CSRF, csrf_token(runtime, browser, SIGN_IN))],
    )
    headers = {} if refused is None else refused.headers
    own = tuple((name.lower(), value) for name, value in headers.items())
    return page("sign_in", values, status=200 if refused is None else refused.status, cookies=(*cookies, *own))


def _told(refused: WrongPassword | TooManyRequests) -> str:
    what = "Username or password is not right." if isinstance(refused, WrongPassword) else "Too many attempts."
    return f"{what} {refused.fix[:1].upper()}{refused.fix[1:]}."


def _app_of(runtime: Runtime, query: str) -> str | None:
    """The name of the client whose request waits. The query is our own, that we have sealed."""
    client = runtime.view.client(dict(parse_qsl(query)).get("client_id", ""))
    return client.metadata.client_name if client is not None else None


def _base(runtime: Runtime) -> str:
    return urlsplit(runtime.settings.issuer).path.rstrip("/")


# Signing out


class Waiting(Struct, frozen=True):
    """The client that asked to sign out, and where to go afterwards, if it said where: registered, and with `state`."""

    client_id: str
    location: str | None


_decode_waiting = msgspec.json.Decoder(Waiting | None).decode


async def sign_out_page(runtime: Runtime, incoming: Incoming) -> Response:
    """`GET /sign-out`. Raises: Unavailable."""
    session = await session_of(runtime, incoming)
    return _signed_out(runtime, None) if session is None else await _ask(runtime, incoming, session, None)


async def sign_out(runtime: Runtime, incoming: Incoming) -> Response:
    """`POST /sign-out`: ends the session and what was granted in it.

    Raises: Forbidden, InvalidRequest, Unavailable.
    """
    form = await read_page_form(runtime, incoming)
    session = await session_of(runtime, incoming)
    if session is None:
        return _signed_out(runtime, None)
    browser = check_csrf(runtime, incoming, form, _purpose(session))
    waiting = open_carried(runtime, browser, form.need(REQUEST), "sign-out", _decode_waiting)
    cookie = await _end(runtime, incoming, session)
    return _signed_out(runtime, waiting, cookies=(cookie,))


async def log_out(runtime: Runtime, incoming: Incoming) -> Response:
    """`GET /oauth2/logout`. Source: OpenID Connect RP-Initiated Logout 1.0 §2, §3.

    With an ID token of whoever is signed in, or when nobody is: at once, and back to the app if its address is
    registered. Else the person is asked first, and the way back is a button.

    Raises: InvalidRequest, Unavailable.
    """
    asked = Form(parse_form(incoming.query_string))
    session = await session_of(runtime, incoming)
    hint = asked.get("id_token_hint")
    claims = read_id_token_hint(runtime, hint) if hint is not None else None
    waiting = _waiting(runtime, asked, claims)
    if claims is None or (session is not None and claims["sub"] != session.user_id):
        return _signed_out(runtime, waiting) if session is None else await _ask(runtime, incoming, session, waiting)
    cookies = () if session is None else (await _end(runtime, incoming, session),)
    if waiting is None or waiting.location is None:
        return _signed_out(runtime, None, cookies=cookies)
    headers = (("cache-control", "no-store"), ("referrer-policy", "no-referrer"), ("location", waiting.location))
    return Response(303, b"", (*headers, *cookies))


async def log_out_by_post(runtime: Runtime, incoming: Incoming) -> Response:
    """`POST /oauth2/logout`: the same by GET, since browsers send no cookies with what pages of other sites post.

    Raises: InvalidRequest.
    """
    form = await read_page_form(runtime, incoming)
    names = ("id_token_hint", "client_id", "post_logout_redirect_uri", "state")
    given = {name: value for name in names if (value := form.get(name)) is not None}
    return see_other(f"/oauth2/logout?{urlencode(given, quote_via=quote)}")


def _waiting(runtime: Runtime, asked: Form, claims: dict[str, Any] | None) -> Waiting | None:
    """Raises: InvalidRequest when it says where to go and that is not registered."""
    client_id, uri = asked.get("client_id"), asked.get("post_logout_redirect_uri")
    audience = claims["aud"] if claims is not None else None
    if claims is not None and client_id is not None and client_id != audience:
        raise InvalidRequest("the ID token was made for another app than the one that asks", fix=_ANYWAY)
    found = runtime.view.client(client_id or (audience if isinstance(audience, str) else "") or "")
    client = found if found is not None and found.disabled_at is None else None
    if claims is None and client_id is None and asked.get("id_token_hint") is not None:
        return None  # whose address it is cannot be told, as when the hint's key was revoked: nobody is led there
    if uri is not None and (client is None or uri not in client.metadata.post_logout_redirect_uris):
        raise InvalidRequest("the app wants to go on to an address that is not registered for it", fix=_ANYWAY)
    if client is None:
        return None
    return Waiting(client.client_id, _location(uri, asked.get("state")) if uri is not None else None)


_ANYWAY = "open your account page here to sign out; you have not been signed out yet"


def _location(uri: str, state: str | None) -> str:
    """Source: RP-Initiated Logout 1.0 §3. Raises: InvalidRequest."""
    if state is None:
        return uri
    if len(state) > _STATE_CHARS_MAX:
        raise InvalidRequest(f"the state is longer than {_STATE_CHARS_MAX} characters", fix=_ANYWAY)
    return f"{uri}{'&' if urlsplit(uri).query else '?'}{urlencode({'state': state}, quote_via=quote)}"


async def _end(runtime: Runtime, incoming: Incoming, session: Session) -> Cookie:
    return await end(runtime, session, "signed_out", by=session.session_id, request_id=incoming.request_id)


async def _ask(runtime: Runtime, incoming: Incoming, session: Session, waiting: Waiting | None) -> Response:
    browser, cookies = known_browser(runtime, incoming)
    client = _client_of(runtime, waiting)
    user = runtime.view.user(session.user_id)
    profile = await profile_of(runtime, user) if user is not None else None
    values = SignOut(
        app=client.metadata.client_name if client is not None else None,
        person=(profile.display_name or profile.username) if profile is not None else session.user_id,
        action="/sign-out",
        hidden=[
            (REQUEST, seal_request(runtime, browser, msgspec.json.encode(waiting).decode(), "sign-out")),
            (CSRF, csrf_token(runtime, browser, _purpose(session))),
        ],
    )
    return page("sign_out", values, cookies=cookies)


def _purpose(session: Session) -> str:
    return f"sign-out {session.session_id}"


def _client_of(runtime: Runtime, waiting: Waiting | None) -> Client | None:
    return runtime.view.client(waiting.client_id) if waiting is not None else None


def _signed_out(runtime: Runtime, waiting: Waiting | None, *, cookies: tuple[Cookie, ...] = ()) -> Response:
    client = _client_of(runtime, waiting)
    link = None
    if waiting is not None and waiting.location is not None and client is not None:
        link = Link(href=waiting.location, label=f"Back to {client.metadata.client_name}")
    return page("signed_out", SignedOut(onward=link), cookies=cookies)
