"""The authorization endpoint and the consent page: RFC 6749 §4.1.1, §4.1.2, OpenID Connect Core §3.1.2, §3.3.2.

Who is not signed in is asked to sign in, who has not consented is asked to; both pages carry the request, sealed for
that browser, so that nothing is kept here until somebody has signed in. Nothing leads to a redirect URI that the client
has not registered; and an error leads there only for somebody who is signed in, or where the client asked that nobody
be asked anything: else whoever registers a client could lead strangers on from our address (RFC 9700 §4.11.2).
"""

from __future__ import annotations

from typing import Final
from urllib.parse import quote, urlencode, urlsplit

import msgspec
from msgspec import Struct

from events.types import Reason
from projections.grants import facts
from projections.registry import Client, Consent, Session, User
from service.commands import expand, known_scopes
from service.consents import give, withdraw
from service.errors import InvalidRequest, InvalidScope, NotFound, TooManyRequests
from service.grants import check_resources, revoke_grant
from service.incoming import Incoming, parse_form
from service.oauth.codes import Authorization, CodeOfForm, FormSpent, code_of_form, grant_code
from service.oauth.forms import oauth_error, read_pairs
from service.oauth.id_tokens import IdTokenFor, mint_id_token, read_id_token_hint
from service.oauth.pushed import Loaded, held_by, load, spend
from service.outgoing import Headers, Response
from service.pages.render import ANYWHERE, destination_of, form_post, onward, page
from service.pages.scopes import scopes_shown
from service.pages.values import Consent as ConsentPage
from service.pages.values import Continue, Hidden, SignIn
from service.registry import profile_of
from service.rules.authorization import (
    OFFLINE_ACCESS,
    REQUEST_CHARS_MAX,
    REQUEST_URI_PREFIX,
    AuthorizationRequest,
    Parameters,
    after_sign_in,
    is_of_native_app,
    location,
    needs_sign_in,
    parse,
)
from service.rules.grants import granted_scope
from service.rules.refusals import (
    AccessDenied,
    ConsentRequired,
    LoginRequired,
    RedirectError,
    ScopeNotAllowed,
    Target,
    TooManyCodes,
    UnknownClient,
    UnreadableRequest,
)
from service.rules.registry import LEDGER_SCOPES, OPENID_SCOPES
from service.runtime import Runtime
from service.signin.browser import (
    CSRF,
    browser_of,
    check_csrf,
    csrf_token,
    known_browser,
    open_carried,
    open_request,
    read_page_form,
    seal_request,
)
from service.signin.doors import REQUEST, SIGN_IN
from service.signin.sessions import session_of
from service.tokens import now

PATH = "/oauth2/authorize"
CONSENT: Final = "consent"  # the purpose of the form
_BEGUN = "begun"  # says, sealed, that a pushed request was taken up in time by this browser
_NO_STORE: Headers = (("cache-control", "no-store"), ("pragma", "no-cache"), ("referrer-policy", "no-referrer"))


class Asked(Struct, frozen=True):
    """A request that was understood. `query`: asks the same again, in the same browser."""

    client: Client
    request: AuthorizationRequest
    query: str
    pushed: Loaded | None = None


class Shown(Struct, frozen=True):
    """What the consent page carries: who saw it, what they saw, and the code that their consent will give.

    `consented`: whether they allowed the client something already.
    """

    session_id: str
    scope: str
    query: str
    gives: CodeOfForm
    consented: bool = True


class Granting(Struct, frozen=True):
    """What a person is about to grant. `scope`: as it will be, implications expanded. `consent`: as it is."""

    user: User
    session: Session
    scope: str
    consent: Consent | None


_decode_shown = msgspec.json.Decoder(Shown).decode


async def authorize(runtime: Runtime, incoming: Incoming) -> Response:
    """`GET /oauth2/authorize`. Raises: PageError and its kin, which are pages."""
    given = Parameters(parse_form(incoming.query_string))
    session = await session_of(runtime, incoming)
    silent = "none" in (given.get("prompt") or "").split()
    try:
        asked = await _understood(runtime, incoming, given, session)
        silent = asked.request.silent
        return await _decided(runtime, incoming, asked, session)
    except RedirectError as error:
        return _refusal(runtime, error) if session is not None or silent else _refusal_page(runtime, error)


async def _decided(runtime: Runtime, incoming: Incoming, asked: Asked, session: Session | None) -> Response:
    """The answer, or the page that comes before it. Raises: RedirectError, with its target."""
    silent = asked.request.silent
    if session is None or _must_sign_in(runtime, asked, session):
        if silent:
            raise _at(LoginRequired("the person has to sign in"), asked)
        return _sign_in_page(runtime, incoming, asked)
    granting = _granting(runtime, asked, session)
    if granting.consent is None or _must_consent(asked, granting, granting.consent):
        if silent:
            raise _at(ConsentRequired("the person has to consent"), asked)
        return await _consent_page(runtime, incoming, asked, granting)
    answer = await _grant(runtime, incoming, asked, granting, granting.consent.seq)
    return _redirect(asked.request.target, asked.client, answer)


async def authorize_by_post(runtime: Runtime, incoming: Incoming) -> Response:
    """`POST /oauth2/authorize`, which OpenID Connect Core §3.1.2.1 wants: the same by GET, since browsers send no
    cookies with what pages of other sites post."""
    query = urlencode(await read_pairs(runtime, incoming), quote_via=quote)
    if len(query) > REQUEST_CHARS_MAX:
        raise _too_long()
    return Response(303, b"", (*_NO_STORE, ("location", _again(runtime, query))))


async def consent(runtime: Runtime, incoming: Incoming) -> Response:
    """`POST /oauth2/consent`: what the person decided. Raises: Forbidden, InvalidRequest, PageError and its kin."""
    form = await read_page_form(runtime, incoming)
    session = await session_of(runtime, incoming)
    browser = check_csrf(runtime, incoming, form, CONSENT)
    shown = open_carried(runtime, browser, form.need(REQUEST), CONSENT, _decode_shown)
    again = onward(_again(runtime, shown.query))
    if session is None or session.session_id != shown.session_id:
        return again  # another person may be here by now, or nobody
    decision = form.get("decision")
    if decision not in {"allow", "deny"}:
        raise InvalidRequest("neither Allow nor Deny was chosen", fix="go back to the page that asked, and choose one")
    try:
        given = Parameters(parse_form(shown.query.encode()))
        try:
            asked = await _understood(runtime, incoming, given, session)
        finally:
            if decision == "deny":  # whatever has become of the request: a pushed one is spent by what it gave
                await _take_back(runtime, incoming, shown, session)
        if decision == "deny":
            raise _at(AccessDenied("the person refused"), asked)
        granting = _granting(runtime, asked, session)
        if granting.scope != shown.scope:
            return again  # what client or person may have has changed: they are to see it
        user_id = granting.user.user_id
        client_id, request_id = asked.client.client_id, incoming.request_id
        consent_seq = await give(runtime, user_id, client_id, granting.scope, by=user_id, request_id=request_id)
        answer = await _grant(runtime, incoming, asked, granting, consent_seq, given=shown.gives)
        return _answer_to_form(asked.request.target, asked.client, answer)
    except FormSpent:
        return again
    except RedirectError as error:
        return _refusal(runtime, error, to_form=True)


async def _take_back(runtime: Runtime, incoming: Incoming, shown: Shown, session: Session) -> None:
    """What the form gave, if it was allowed before and the person has gone back to it. Raises: Unavailable."""
    by, grant_id, request_id = session.session_id, shown.gives.grant_id, incoming.request_id
    try:
        await revoke_grant(runtime, by, grant_id, Reason.OWNER_REQUEST, None, request_id=request_id)
    except NotFound:
        return
    known = facts(runtime.view.family(grant_id).grant)
    if known is not None and known.client_id is not None and not shown.consented:
        await withdraw(runtime, session.user_id, known.client_id, by=by, request_id=request_id)


# Understanding what is asked


async def _understood(runtime: Runtime, incoming: Incoming, given: Parameters, session: Session | None) -> Asked:
    """Raises: PageError; RedirectError, with its target; TooManyRequests, Unavailable."""
    query = given.query()
    if len(query) > REQUEST_CHARS_MAX:
        raise _too_long()
    client = await _client(runtime, incoming, given.get("client_id") or "")
    issuer, request_uri, pushed = runtime.settings.issuer, given.get("request_uri") or "", None
    if request_uri.startswith(REQUEST_URI_PREFIX):
        if client is None:
            raise UnknownClient("no application is registered under this client_id")
        browser, begun = browser_of(runtime, incoming), False
        if browser is not None and given.get(_BEGUN) is not None:
            begun = open_request(runtime, browser, given.get(_BEGUN) or "", "begun") == request_uri
        session_id = session.session_id if session is not None else None
        pushed = await load(runtime, request_uri, client.client_id, begun=begun, session_id=session_id)
        given = Parameters(pushed.pushed.pairs)
    held = held_by(runtime, client) if client is not None else frozenset()
    request = parse(given, client, held, issuer, pushed=pushed is not None)
    assert client is not None
    return Asked(client, request, query, pushed)


async def _client(runtime: Runtime, incoming: Incoming, client_id: str) -> Client | None:
    runtime.check_fresh(runtime.view.freshness())
    client = runtime.view.client(client_id)
    if client is None and client_id:
        runtime.unknown_tokens.take("authorize", incoming.client_ip(runtime.settings) or "")
        await runtime.view_at_end()  # registered a moment ago, perhaps on another host
        client = runtime.view.client(client_id)
    return client


def _too_long() -> UnreadableRequest:
    return UnreadableRequest(
        f"the request is longer than {REQUEST_CHARS_MAX} characters",
        fix="the application's makers can push it instead (RFC 9126), or send less",
    )


def _at(error: RedirectError, asked: Asked) -> RedirectError:
    error.target = asked.request.target
    return error


def _must_sign_in(runtime: Runtime, asked: Asked, session: Session) -> bool:
    """Raises: LoginRequired for a hint that names nobody, where nobody is asked who they are."""
    request = asked.request
    if request.id_token_hint is not None:
        claims = read_id_token_hint(runtime, request.id_token_hint)
        if claims is not None and claims["sub"] != session.user_id:
            return True
        if claims is None and request.silent:
            # Else it is as if there were no hint, as when an app comes back with one whose key was revoked meanwhile.
            why = "id_token_hint cannot be read, so that it is not known who is meant: the person has to sign in"
            raise _at(LoginRequired(why), asked)
    pushed_at = asked.pushed.pushed.pushed_at if asked.pushed is not None else None
    return needs_sign_in(request, session.auth_time, now(), pushed_at=pushed_at)


def _granting(runtime: Runtime, asked: Asked, session: Session) -> Granting:
    """Raises: ScopeNotAllowed, LoginRequired."""
    user = runtime.view.user(session.user_id)
    if user is None or user.disabled_at is not None:
        raise _at(LoginRequired("nobody is signed in"), asked)
    scopes = known_scopes(runtime)
    disabled = frozenset(name for name, row in scopes.items() if row.disabled_at is not None)
    # Nobody manages the ledger by a token that an app was given; and what outlives the session is asked for by name.
    unasked = LEDGER_SCOPES if asked.request.scope else {*LEDGER_SCOPES, OFFLINE_ACCESS}
    of_client = " ".join(name for name in expand(scopes, asked.client.metadata.scope).split() if name not in unasked)
    of_user = " ".join([expand(scopes, user.scope), *OPENID_SCOPES])
    wanted = asked.request.scope
    try:
        scope = granted_scope(expand(scopes, wanted) if wanted else None, of_client, of_user, disabled=disabled)
    except InvalidScope as error:
        raise _at(ScopeNotAllowed(error.detail), asked) from error
    if "refresh_token" not in asked.client.metadata.grant_types:
        scope = " ".join(name for name in scope.split() if name != OFFLINE_ACCESS)
    return Granting(user, session, scope, runtime.view.consent(user.user_id, asked.client.client_id))


def _must_consent(asked: Asked, granting: Granting, consent: Consent) -> bool:
    request, client = asked.request, asked.client
    if "consent" in request.prompts or is_of_native_app(client, request.target.redirect_uri):
        return True
    return not consent.scope or not set(granting.scope.split()) <= set(consent.scope.split())


# Pages


def _sign_in_page(runtime: Runtime, incoming: Incoming, asked: Asked) -> Response:
    browser, cookies = known_browser(runtime, incoming)
    query = after_sign_in(Parameters(parse_form(_resumed(runtime, browser, asked).encode())))
    sealed = seal_request(runtime, browser, query, SIGN_IN)
    values = SignIn(
        app=asked.client.metadata.client_name,
        username=asked.request.login_hint or "",
        problem=None,
        hidden=[(REQUEST, sealed), (CSRF, csrf_token(runtime, browser, SIGN_IN))],
    )
    return page("sign_in", values, cookies=cookies)


async def _consent_page(runtime: Runtime, incoming: Incoming, asked: Asked, granting: Granting) -> Response:
    browser, cookies = known_browser(runtime, incoming)
    client, redirect_uri = asked.client, asked.request.target.redirect_uri
    native = is_of_native_app(client, redirect_uri)
    before = granting.consent.scope if granting.consent is not None else ""
    query = _resumed(runtime, browser, asked)
    shown = Shown(granting.session.session_id, granting.scope, query, code_of_form(), bool(before))
    profile = await profile_of(runtime, granting.user)
    values = ConsentPage(
        app=client.metadata.client_name,
        person=(profile.display_name or profile.username) if profile is not None else "",
        scopes=scopes_shown(runtime, _union(before, granting.scope)),
        destination=destination_of(redirect_uri, native=native),
        native=native,
        known=bool(before),
        hidden=[
            (REQUEST, seal_request(runtime, browser, msgspec.json.encode(shown).decode(), CONSENT)),
            (CSRF, csrf_token(runtime, browser, CONSENT)),
        ],
    )
    return page("consent", values, cookies=cookies)


def _resumed(runtime: Runtime, browser: str, asked: Asked) -> str:
    """The query by which the request goes on after a page: a pushed one was taken up in time by this browser."""
    if asked.pushed is None:
        return asked.query
    request_uri = asked.pushed.request_uri
    begun = seal_request(runtime, browser, request_uri, "begun")
    return urlencode({"client_id": asked.client.client_id, "request_uri": request_uri, _BEGUN: begun})


def _again(runtime: Runtime, query: str) -> str:
    return f"{urlsplit(runtime.settings.issuer).path.rstrip('/')}{PATH}?{query}"


def _union(before: str, more: str) -> str:
    return " ".join(dict.fromkeys([*before.split(), *more.split()]))


# Answers


async def _grant(
    runtime: Runtime,
    incoming: Incoming,
    asked: Asked,
    granting: Granting,
    consent_seq: int,
    *,
    given: CodeOfForm | None = None,
) -> dict[str, str]:
    """The code, and for the hybrid flow the ID token with it. `consent_seq`: of the consent by which it is granted.

    Raises: as `grant_code`, `spend`; TooManyCodes.
    """
    request, client, session = asked.request, asked.client, granting.session
    try:
        runtime.codes.take(session.session_id, client.client_id)
    except TooManyRequests as error:
        raise _at(TooManyCodes(f"{error.detail}: ask again in a minute"), asked) from error
    authorization = Authorization(
        client_id=client.client_id,
        subject=granting.user.user_id,
        session_id=session.session_id,
        scope=granting.scope,
        audience=check_resources(client, request.resources, runtime.settings.issuer),
        redirect_uri=request.target.redirect_uri,
        code_challenge=request.code_challenge,
        nonce=request.nonce,
        auth_time=session.auth_time,
        offline=OFFLINE_ACCESS in granting.scope.split(),
        response_type=request.response_type,
        consent_seq=consent_seq,
    )
    code = await grant_code(runtime, client, authorization, incoming.request_id, given)
    answer = {"code": code}
    if request.response_type != "code":
        about = IdTokenFor(
            granting.user.user_id,
            session.auth_time,
            nonce=request.nonce,
            code=code,
            claims={"amr": list(session.methods)},
        )
        answer["id_token"] = await mint_id_token(runtime, client, about)
    if asked.pushed is not None:
        # Last, so that what fails before can be tried again; the code of who is second is told to nobody.
        await spend(runtime, asked.pushed, session.session_id, code)
    return _whole(runtime, request.target, answer)


def _whole(runtime: Runtime, target: Target, members: dict[str, str]) -> dict[str, str]:
    """With `state` and, against mix-ups, `iss`. Source: RFC 9207 §2."""
    state = {"state": target.state} if target.state is not None else {}
    return members | state | {"iss": runtime.settings.issuer}


def _redirect(target: Target, client: Client, members: dict[str, str]) -> Response:
    """303, so that what a form posted is not posted on. Source: RFC 9700 §4.12."""
    if target.response_mode == "form_post":
        return form_post(target.redirect_uri, client.metadata.client_name, list(members.items()))
    return Response(303, b"", (*_NO_STORE, ("location", location(target, members))))


def _answer_to_form(target: Target, client: Client, members: dict[str, str]) -> Response:
    if target.response_mode == "form_post":
        return form_post(target.redirect_uri, client.metadata.client_name, list(members.items()))
    return onward(location(target, members))


def _refusal(runtime: Runtime, error: RedirectError, *, to_form: bool = False) -> Response:
    """The error at the client's redirect URI."""
    target = error.target
    assert target is not None
    client = runtime.view.client(target.client_id)
    assert client is not None
    answer = _answer_to_form if to_form else _redirect
    return answer(target, client, _error_members(runtime, error, target))


def _refusal_page(runtime: Runtime, error: RedirectError) -> Response:
    """The same, behind a button."""
    target = error.target
    assert target is not None
    client = runtime.view.client(target.client_id)
    name = client.metadata.client_name if client is not None else "the application"
    members = _error_members(runtime, error, target)
    by_form = target.response_mode == "form_post"
    hidden: Hidden = list(members.items()) if by_form else []
    values = Continue(
        title=error.title,
        what=f"{name} sent a request with a mistake: {members['error_description']}.",
        label=f"Back to {name}",
        method="post" if by_form else "link",
        href=target.redirect_uri if by_form else location(target, members),
        hidden=hidden,
    )
    return page("continue", values, status=400, redirects_to=ANYWHERE if by_form else None)


def _error_members(runtime: Runtime, error: RedirectError, target: Target) -> dict[str, str]:
    return _whole(runtime, target, dict(oauth_error(error)))
