"""`/account`: what a person allows apps, their personal access tokens, and where they are signed in.

Whoever is not signed in is asked to. Each form says in its CSRF token whose session it was shown in. What changes
something ends in a redirect, so that nothing is sent twice. The form for a new token carries a key: sent again, filled
in otherwise or not, it makes no other token; and by that key the page behind the redirect shows the token, once.
"""

from __future__ import annotations

import asyncio
import functools
import re
import secrets
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any
from urllib.parse import urlencode

from msgspec import Struct

from events.types import Kind, Reason
from projections.current import Hit
from projections.grants import facts
from projections.registry import Session
from service import consents
from service.api.tokens import find_hit
from service.api.wire import concurrently
from service.caller import Caller
from service.commands import Prepared, expand, known_scopes
from service.errors import InvalidRequest, NotFound
from service.grants import IssueToken, prepare_issue, revoke_token
from service.idempotency import Repeatable, once, take
from service.incoming import Incoming, parse_form
from service.oauth.forms import Form
from service.outgoing import Response
from service.pages.render import page, see_other
from service.pages.scopes import scopes_shown
from service.pages.values import (
    Account,
    AppShown,
    Draft,
    Hidden,
    Issued,
    SessionShown,
    ShownBefore,
    SignedOut,
    TokenShown,
)
from service.registry import profile_of, read_sealed
from service.revocations import ending_of
from service.rules.registry import is_plain
from service.runtime import Runtime
from service.signin.browser import CSRF, browser_of, check_csrf, csrf_token, known_browser, read_page_form
from service.signin.doors import sign_in_page
from service.signin.places import place_of
from service.signin.sessions import drop_session, end_everywhere, end_session, session_of, standing
from service.tokens import is_id
from service.validation import scope_of

PATH = "/account"
TOKENS = f"{PATH}/tokens"
ISSUED = f"{TOKENS}/issued"
LIFETIMES_DAYS = (7, 30, 90, 365)
_LIFETIME_DAYS = 30
_DAY_SECONDS = 86_400
_NAME_CHARS_MAX = 200
_TICK = "scope "  # stands before the scope's name, in that of its box
_KEY = "key"
_KEY_SYNTAX = re.compile(r"[A-Za-z0-9_-]{22}")
_TOKEN = "token"
_TOKENS_SHOWN_MAX = 200
_NEWEST_TOKENS = 500  # that are looked at for when apps were last active
_SESSIONS_SHOWN_MAX = 200
_SLICE = 2_000
_SLICES_MAX = 500
_GO_BACK = "go back to your account and try again"
_SAID = {
    "withdrawn": "The app has no access any more.",
    "revoked": "The token was revoked. Whatever used it has stopped working.",
    "ended": "That browser is signed out.",
}


class Person(Struct, frozen=True):
    """Who is signed in. `held`: the scopes that a token of theirs may have."""

    session: Session
    name: str
    held: tuple[str, ...]


Act = Callable[[Runtime, Incoming, Form, Session], Awaitable[Response]]


def _in_session(act: Act) -> Callable[[Runtime, Incoming], Awaitable[Response]]:
    """What a form of the page does, in the session that it was shown in. It raises besides: Forbidden, Unavailable."""

    @functools.wraps(act)
    async def door(runtime: Runtime, incoming: Incoming) -> Response:
        form = await read_page_form(runtime, incoming)
        session = await session_of(runtime, incoming)
        if session is None:
            return see_other(PATH)
        check_csrf(runtime, incoming, form, _purpose(session))
        return await act(runtime, incoming, form, session)

    return door


async def home(runtime: Runtime, incoming: Incoming) -> Response:  # noqa: ARG001 - the same for everybody
    """`GET /`, whose address a start prints: on to the account page."""
    return see_other(PATH)


async def show(runtime: Runtime, incoming: Incoming) -> Response:
    """`GET /account`."""
    person = await _person(runtime, incoming)
    if person is None:
        return await sign_in_page(runtime, incoming)  # which leads back here
    done = dict(parse_form(incoming.query_string)).get("done", "")
    return await _shown(runtime, incoming, person, said=_SAID.get(done))


async def issue(runtime: Runtime, incoming: Incoming) -> Response:
    """`POST /account/tokens`: leads to the page that shows the token, once.

    Raises: Forbidden, InvalidRequest, InvalidScope, Gone, Unavailable.
    """
    form = await read_page_form(runtime, incoming)
    person = await _person(runtime, incoming)
    if person is None:
        return see_other(PATH)
    browser = check_csrf(runtime, incoming, form, _purpose(person.session))
    key = form.get(_KEY) or ""
    if not _KEY_SYNTAX.fullmatch(key):
        raise InvalidRequest("the form is not as it was shown", fix=_GO_BACK)
    draft = _draft(form, person)
    problem = _problem(draft)
    if problem is not None:
        return await _shown(runtime, incoming, person, problem=problem, draft=draft)
    answer, seq = await _issue(runtime, incoming, _caller(runtime, person, browser), draft, key=key)
    if not _stood(runtime, person.session, seq):
        # This worker did not know yet that the session had ended: nobody is to see it.
        await revoke_token(runtime, "system", answer["token_id"], Reason.LOGOUT, None, request_id=incoming.request_id)
        return see_other(PATH)
    return see_other(f"{ISSUED}?{urlencode({_KEY: key})}")


async def show_issued(runtime: Runtime, incoming: Incoming) -> Response:
    """`GET /account/tokens/issued`: the token that a form has just made, once. Raises: Unavailable."""
    person = await _person(runtime, incoming)
    browser = browser_of(runtime, incoming)
    if person is None or browser is None:
        return see_other(PATH)
    key = Form(parse_form(incoming.query_string)).get(_KEY) or ""
    answer = await take(runtime, _caller(runtime, person, browser), Repeatable(key, TOKENS, b""), _TOKEN)
    if answer is None:
        return see_other(PATH)
    if _TOKEN not in answer:
        return await _shown_before(runtime, browser, person, answer)
    values = Issued(
        person=person.name,
        token=answer[_TOKEN],
        label=answer["name"],
        scope=answer["scope"],
        expires_at=datetime.fromisoformat(answer["expires_at"]),
    )
    return page("issued", values)


async def _shown_before(runtime: Runtime, browser: str, person: Person, answer: dict[str, Any]) -> Response:
    """Nobody sees a token twice. It may be that nobody has: where the first answer was lost, this ends the token."""
    hit = await find_hit(runtime, answer["token_id"])
    values = ShownBefore(
        person=person.name,
        token_id=answer["token_id"],
        label=answer["name"],
        expires_at=datetime.fromisoformat(answer["expires_at"]),
        works=hit is not None and ending_of(hit).status == "active",
        hidden=[(CSRF, csrf_token(runtime, browser, _purpose(person.session)))],
    )
    return page("shown_before", values, status=410)


@_in_session
async def revoke(runtime: Runtime, incoming: Incoming, form: Form, session: Session) -> Response:
    """`POST /account/tokens/revoke`. Raises: NotFound."""
    token_id = form.get("token_id") or ""
    hit = await find_hit(runtime, token_id) if is_id(token_id, "tok") else None
    if hit is None or hit.token.kind is not Kind.PAT or _owner(hit) != session.user_id:
        raise NotFound("you have no such token", fix=_GO_BACK)
    await revoke_token(
        runtime, session.session_id, token_id, Reason.OWNER_REQUEST, None, request_id=incoming.request_id
    )
    return see_other(f"{PATH}?done=revoked")


@_in_session
async def withdraw(runtime: Runtime, incoming: Incoming, form: Form, session: Session) -> Response:
    """`POST /account/apps/withdraw`. Raises: NotFound."""
    client_id = form.get("client_id") or ""
    if not is_id(client_id, "cli") or runtime.view.consent(session.user_id, client_id) is None:
        raise NotFound("you allow no such app anything", fix=_GO_BACK)
    await consents.withdraw(runtime, session.user_id, client_id, by=session.session_id, request_id=incoming.request_id)
    return see_other(f"{PATH}?done=withdrawn")


@_in_session
async def end_other_session(runtime: Runtime, incoming: Incoming, form: Form, session: Session) -> Response:
    """`POST /account/sessions/end`: as signing out there does. Raises: NotFound."""
    await runtime.view_at_end()  # begun a moment ago, perhaps on another host
    ended = runtime.view.session(form.get("session_id") or "")
    if ended is None or ended.user_id != session.user_id:
        raise NotFound("you are not signed in there", fix=_GO_BACK)
    await end_session(runtime, ended, "signed_out", by=session.session_id, request_id=incoming.request_id)
    return see_other(f"{PATH}?done=ended")


@_in_session
async def sign_out_everywhere(runtime: Runtime, incoming: Incoming, _: Form, session: Session) -> Response:
    """`POST /account/sign-out-everywhere`: this browser last."""
    here = session.session_id
    await end_everywhere(runtime, session.user_id, "signed_out", by=here, last=here, request_id=incoming.request_id)
    return page("signed_out", SignedOut(onward=None), cookies=(drop_session(runtime),))


def _stood(runtime: Runtime, session: Session, seq: int) -> bool:
    """Whether the session did when `seq` was recorded, which was done in it: of a view that has all up to there."""
    row, cut = runtime.view.session(session.session_id), runtime.view.cut(session.user_id)
    if row is None or (row.ended_at is not None and row.seq < seq):
        return False
    return cut is None or not (cut.disabled or session.user_seq < cut.seq < seq)


def _purpose(session: Session) -> str:
    return f"account {session.session_id}"


async def _person(runtime: Runtime, incoming: Incoming) -> Person | None:
    """Raises: Unavailable."""
    session = await session_of(runtime, incoming)
    user = runtime.view.user(session.user_id) if session is not None else None
    if session is None or user is None or user.disabled_at is not None:
        return None
    scopes = known_scopes(runtime)
    disabled = {name for name, row in scopes.items() if row.disabled_at is not None}
    held = tuple(name for name in expand(scopes, user.scope).split() if name not in disabled)
    profile = await profile_of(runtime, user)
    name = profile.display_name or profile.username if profile is not None else user.user_id
    return Person(session, name, held)


# A new token


def _draft(form: Form, person: Person) -> Draft:
    """What was asked for, of what may be had: a scope that the person has no more is no longer among it.

    Raises: InvalidRequest.
    """
    days = form.get("days") or ""
    if days not in map(str, LIFETIMES_DAYS):
        raise InvalidRequest("the form is not as it was shown", fix=_GO_BACK)
    return Draft(
        name=form.get("name") or "",
        ticked=[name for name in person.held if form.get(_TICK + name) is not None],
        days=int(days),
    )


def _problem(draft: Draft) -> str | None:
    name = draft["name"]
    if not 0 < len(name) <= _NAME_CHARS_MAX or not is_plain(name):
        return f"Give the token a name of up to {_NAME_CHARS_MAX} signs that can be seen, without blanks at its ends."
    if not draft["ticked"]:
        return "Choose at least one thing that the token may do."
    return None


def _caller(runtime: Runtime, person: Person, browser: str) -> Caller:
    """Whose token it will be. What is answered is kept sealed, for this browser in this session alone."""
    session = person.session
    return Caller(
        token=csrf_token(runtime, browser, f"issue {session.session_id}"),
        token_id=session.session_id,
        subject=session.user_id,
        client_id=None,
        scope=frozenset(person.held),
    )


async def _issue(
    runtime: Runtime, incoming: Incoming, caller: Caller, draft: Draft, *, key: str
) -> tuple[dict[str, Any], int]:
    """One token and its sequence, however often the same form is sent. Raises: InvalidScope, Gone, Unavailable."""
    request = IssueToken(
        kind=Kind.PAT,
        user=caller.subject,
        name=draft["name"],
        scope=" ".join(draft["ticked"]),
        expires_in_seconds=draft["days"] * _DAY_SECONDS,
    )

    async def prepare(_: bool) -> Prepared:
        return await prepare_issue(runtime, caller, request, request_id=incoming.request_id)

    # Of what was filled in nothing counts: one form, one token.
    answer, seq = await once(runtime, caller, Repeatable(key, TOKENS, b""), prepare)
    await runtime.applied(seq)
    return answer, seq


# What is shown


async def _shown(
    runtime: Runtime,
    incoming: Incoming,
    person: Person,
    *,
    said: str | None = None,
    problem: str | None = None,
    draft: Draft | None = None,
) -> Response:
    session = person.session
    browser, cookies = known_browser(runtime, incoming)
    tokens, more = await _tokens(runtime, session.user_id)
    others = [one for one in await standing(runtime, session.user_id) if one.session_id != session.session_id]
    sessions = [session, *others[: -_SESSIONS_SHOWN_MAX - 1 : -1]]  # the newest first
    hidden: Hidden = [
        (CSRF, csrf_token(runtime, browser, _purpose(session))),
        (_KEY, secrets.token_urlsafe(16)),
    ]
    values = Account(
        person=person.name,
        said=said,
        problem=problem,
        apps=_apps(runtime, session.user_id),
        tokens=await concurrently(_token(runtime, hit) for hit in tokens),
        more=more,
        offered=scopes_shown(runtime, " ".join(person.held)),
        lifetimes=LIFETIMES_DAYS,
        draft=draft or Draft(name="", ticked=(), days=_LIFETIME_DAYS),
        sessions=await concurrently(_session(runtime, one, session) for one in sessions),
        hidden=hidden,
    )
    return page("account", values, status=200 if problem is None else 400, cookies=cookies)


async def _session(runtime: Runtime, one: Session, current: Session) -> SessionShown:
    place = await place_of(runtime, one)
    return SessionShown(
        session_id=one.session_id,
        browser=place.browser,
        ip=place.ip,
        since=one.auth_time,
        current=one.session_id == current.session_id,
    )


def _apps(runtime: Runtime, user_id: str) -> list[AppShown]:
    found, active = [], _last_active(runtime, user_id)
    for consent in runtime.view.consents_of(user_id):
        client = runtime.view.client(consent.client_id)
        if consent.scope and client is not None:
            found.append(
                AppShown(
                    client_id=consent.client_id,
                    name=client.metadata.client_name,
                    scopes=scopes_shown(runtime, consent.scope),
                    since=consent.changed_at,
                    active=active.get(consent.client_id),
                )
            )
    return sorted(found, key=lambda app: app["since"], reverse=True)


def _last_active(runtime: Runtime, user_id: str) -> dict[str, datetime]:
    """When each client last got a token for the person, where that is among their newest tokens."""
    found: dict[str, datetime] = {}
    for hit in runtime.view.newest_of(user_id, limit=_NEWEST_TOKENS):
        known = facts(hit.grant)
        if known is not None and known.client_id is not None:
            found.setdefault(known.client_id, hit.token.issued_at)
    return found


async def _tokens(runtime: Runtime, user_id: str) -> tuple[list[Hit], bool]:
    """Personal access tokens that still work, the oldest first, and whether there are more. Others have their turn."""
    found: list[Hit] = []
    after: str | None = None
    for _ in range(_SLICES_MAX):
        token_ids, after = runtime.view.token_ids_of_kind(user_id, Kind.PAT, after=after, limit=_SLICE)
        hits = [runtime.view.hit(token_id) for token_id in token_ids]
        found += [hit for hit in hits if hit is not None and ending_of(hit).status == "active"]
        if len(found) > _TOKENS_SHOWN_MAX:
            return found[:_TOKENS_SHOWN_MAX], True
        if after is None:
            break
        await asyncio.sleep(0)
    return found, after is not None


async def _token(runtime: Runtime, hit: Hit) -> TokenShown:
    known = facts(hit.grant)
    return TokenShown(
        token_id=hit.token_id,
        name=await read_sealed(runtime, known.subject, known.sealed_name, "token name") if known else None,
        scope=scope_of(hit),
        issued_at=hit.token.issued_at,
        expires_at=hit.token.expires_at,
    )


def _owner(hit: Hit) -> str | None:
    known = facts(hit.grant)
    return known.subject if known is not None else None
