"""Workers whose view is a moment old while a person is cut off: what they still make is worth nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from events.ledger import Append
from events.types import (
    AuthorizationGranted,
    ClientDisabled,
    ClientRevoked,
    CodeReplayed,
    ConsentGiven,
    Kind,
    LedgerEvent,
    Reason,
    SessionEnded,
    SubjectRevoked,
    TokenIssued,
    UserDisabled,
    UserPasswordChanged,
)
from projections.grants import ActiveGrant
from projections.registry import Client, Session
from service.api.routing import Call, Nothing
from service.api.tokens import NewToken, Rotation, create_token, rotate_token
from service.caller import Caller
from service.errors import Gone, InvalidGrant, InvalidToken, Unavailable
from service.grants import client_credentials
from service.oauth.codes import Authorization, Redemption, grant_code, redeem
from service.pages import account
from service.refresh import Presentation, refresh
from service.rules.codes import RACE, challenge_of
from service.tokens import now
from service.validation import Asked, Code, evaluate
from tests.hosts import Host
from tests.making import CODE_VERIFIER, consented, head, signed_out, withdrawn
from tests.making import scope as registered_scope
from tests.rsgi import request
from tests.running import unique
from tests.signin.people import Browser, Person, joined
from tests.signin.test_doors import asked, client, current, opened, sent, somebody, state

BACK = "https://app.example/back"

CUTS: dict[str, Callable[[Session], LedgerEvent]] = {
    "password changed": lambda of: UserPasswordChanged(**head(), user_id=of.user_id, password_hash=None),
    "subject revoked": lambda of: SubjectRevoked(**head(), user_id=of.user_id, reason=Reason.ADMIN),
    "user disabled": lambda of: UserDisabled(**head(), user_id=of.user_id, reason=Reason.DISABLED),
    "signed out": lambda of: signed_out(of.session_id, of.user_id),
    "signed out by an administrator": lambda of: SessionEnded(
        **head(), session_id=of.session_id, user_id=of.user_id, reason="admin"
    ),
}


CUTS_OF_A_PERSON: dict[str, Callable[[str], LedgerEvent]] = {
    "password changed": lambda of: UserPasswordChanged(**head(), user_id=of, password_hash=None),
    "subject revoked": lambda of: SubjectRevoked(**head(), user_id=of, reason=Reason.ADMIN),
    "user disabled": lambda of: UserDisabled(**head(), user_id=of, reason=Reason.DISABLED),
}


# Codes


async def app_of(here: Host, person_id: str) -> Client:
    """One that the person allows everything."""
    client_id = await client(here, scope="openid offline_access", redirect_uris=(BACK,))
    await here.record(consented(person_id, client_id, "openid offline_access"))
    await here.project()
    found = here.runtime.view.client(client_id)
    assert found is not None
    return found


async def code_for(here: Host, app: Client, session: Session, *, offline: bool) -> str:
    """What the authorization endpoint makes once it has found session and consent good."""
    consent = here.runtime.view.consent(session.user_id, app.client_id)
    assert consent is not None
    authorization = Authorization(
        client_id=app.client_id,
        subject=session.user_id,
        session_id=session.session_id,
        scope="openid offline_access" if offline else "openid",
        audience=("https://api.example",),
        redirect_uri=BACK,
        code_challenge=challenge_of(CODE_VERIFIER),
        nonce=None,
        auth_time=session.auth_time,
        offline=offline,
        response_type="code",
        consent_seq=consent.seq,
    )
    return await grant_code(here.runtime, app, authorization, "req")


async def redeemed(here: Host, app: Client, code: str) -> dict[str, Any]:
    presented = Redemption(
        client=app, code=code, redirect_uri=BACK, code_verifier=CODE_VERIFIER, resources=(), request_id="req"
    )
    answer: dict[str, Any] = json.loads(await here.projecting(redeem(here.runtime, presented)))
    return answer


async def grant_of(here: Host, session: Session) -> str:
    """The last one of the person."""
    end = await here.runtime.ledger.last_seq()
    for seq in range(end, 0, -1):
        recorded = await here.runtime.ledger.get(seq)
        if recorded is not None and isinstance(recorded.event, AuthorizationGranted):
            assert recorded.event.subject == session.user_id
            return recorded.event.grant_id
    raise AssertionError("there is none")


@pytest.mark.parametrize("offline", [False, True], ids=["session", "offline"])
@pytest.mark.parametrize("cut", [*CUTS.values(), None], ids=[*CUTS, "consent withdrawn"])
async def test_code_made_just_behind_a_cut_off_is_worth_nothing(
    here: Host, cut: Callable[[Session], LedgerEvent] | None, offline: bool
) -> None:
    _, _, session = await somebody(here)
    app = await app_of(here, session.user_id)
    good = await code_for(here, app, session, offline=offline)
    assert "access_token" in await redeemed(here, app, good)
    await here.record(cut(session) if cut is not None else withdrawn(session.user_id, app.client_id))
    code = await code_for(here, app, session, offline=offline)
    with pytest.raises(InvalidGrant):
        await redeemed(here, app, code)
    grant_id = await grant_of(here, session)
    assert state(here, grant_id) == "AuthorizedGrant"
    assert list(here.runtime.view.family(grant_id).tokens) == []


async def test_code_made_after_a_new_sign_in_or_consent_is_good(here: Host) -> None:
    person, browser, session = await somebody(here)
    app = await app_of(here, session.user_id)
    await here.record(
        signed_out(session.session_id, session.user_id),
        SubjectRevoked(**head(), user_id=session.user_id, reason=Reason.ADMIN),
        withdrawn(session.user_id, app.client_id),
    )
    await here.project()
    await sent(here, browser, await asked(here, browser), person.username, person.password)
    again = await current(here, browser)
    assert again is not None
    await here.record(
        ConsentGiven(**head(), user_id=session.user_id, client_id=app.client_id, scope="openid offline_access")
    )
    await here.project()
    assert "access_token" in await redeemed(here, app, await code_for(here, app, again, offline=True))


@pytest.mark.parametrize("again", ["before it stands in the log", "behind it"])
async def test_code_of_a_consent_that_was_withdrawn_is_not_brought_back_by_another(here: Host, again: str) -> None:
    _, _, session = await somebody(here)
    app = await app_of(here, session.user_id)
    made = await code_for(here, app, session, offline=True)
    given = consented(session.user_id, app.client_id, "openid offline_access")
    await here.record(withdrawn(session.user_id, app.client_id))
    if again == "before it stands in the log":
        await here.record(given)
    in_flight = await code_for(here, app, session, offline=True)  # by the consent as this worker's view has it
    if again == "behind it":
        await here.record(given)
    await here.project()
    for code in (made, in_flight):
        with pytest.raises(InvalidGrant):
            await redeemed(here, app, code)
    assert "access_token" in await redeemed(here, app, await code_for(here, app, session, offline=True))


async def test_code_goes_on_when_the_consent_grows(here: Host) -> None:
    _, _, session = await somebody(here)
    app = await app_of(here, session.user_id)
    code = await code_for(here, app, session, offline=True)
    await here.record(consented(session.user_id, app.client_id, "openid offline_access email"))
    await here.project()
    assert "access_token" in await redeemed(here, app, code)


# Personal access tokens


async def signed_in_with(here: Host, scope: str) -> tuple[Person, Browser, Session]:
    await here.record(registered_scope(scope))
    await here.project()
    person, browser = await joined(here, scope=scope), Browser()
    await sent(here, browser, await asked(here, browser), person.username, person.password)
    session = await current(here, browser)
    assert session is not None
    return person, browser, session


async def last_token(here: Host) -> str:
    recorded = [await here.runtime.ledger.get(seq) for seq in range(1, await here.runtime.ledger.last_seq() + 1)]
    issued = [one.event for one in recorded if one is not None and isinstance(one.event, TokenIssued)]
    (minted,) = issued[-1].tokens
    assert minted.kind is Kind.PAT
    return minted.token_id


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
async def test_personal_token_made_just_behind_a_cut_off_is_revoked_and_not_shown(
    here: Host, cut: Callable[[Session], LedgerEvent]
) -> None:
    scope = unique("scope")
    _, browser, session = await signed_in_with(here, scope)
    page = await opened(here, browser, account.show, browser.get())
    fields = page.hidden | {"name": "backup", f"scope {scope}": "on", "days": "30"}
    await here.record(cut(session))  # which this worker's view does not know when the form comes
    answer = await opened(here, browser, account.issue, browser.post("/account/tokens", fields))
    assert (answer.status, answer.headers["location"]) == (303, "/account")
    hit = here.runtime.view.hit(await last_token(here))
    assert hit is not None
    assert hit.token.ended is not None
    again = await opened(here, browser, account.issue, browser.post("/account/tokens", fields))
    assert (again.status, "tl_pat_" in again.text) == (303, False)


async def test_personal_token_of_a_session_that_stands_is_shown(here: Host) -> None:
    scope = unique("scope")
    _, browser, _ = await signed_in_with(here, scope)
    page = await opened(here, browser, account.show, browser.get())
    fields = page.hidden | {"name": "backup", f"scope {scope}": "on", "days": "30"}
    answer = await opened(here, browser, account.issue, browser.post("/account/tokens", fields))
    path, _, query = answer.headers["location"].partition("?")
    shown = await opened(here, browser, account.show_issued, browser.get(path, query))
    assert re.search(r">tl_pat_[0-9A-Za-z]+<", shown.text)
    hit = here.runtime.view.hit(await last_token(here))
    assert hit is not None
    assert hit.token.ended is None


async def test_personal_token_that_was_shown_goes_on_when_its_form_comes_again_behind_the_sign_out(here: Host) -> None:
    """A double click whose second half is overtaken by the sign-out in another tab."""
    scope = unique("scope")
    _, browser, session = await signed_in_with(here, scope)
    page = await opened(here, browser, account.show, browser.get())
    fields = page.hidden | {"name": "backup", f"scope {scope}": "on", "days": "30"}
    for cut in ((), (signed_out(session.session_id, session.user_id),)):
        if cut:
            await here.record(*cut)
        answer = await opened(here, browser, account.issue, browser.post("/account/tokens", fields))
        assert (answer.status, answer.headers["location"].partition("?")[0]) == (303, "/account/tokens/issued")
    hit = here.runtime.view.hit(await last_token(here))
    assert hit is not None
    assert hit.token.ended is None


@pytest.mark.parametrize("cut", CUTS_OF_A_PERSON.values(), ids=CUTS_OF_A_PERSON.keys())
async def test_successor_made_just_behind_a_cut_off_ends_and_is_not_shown(
    here: Host, cut: Callable[[str], LedgerEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = unique("scope")
    person, _, _ = await signed_in_with(here, scope)
    _, issued = await here.issued(subject=person.user_id, scope=scope)
    await here.project()
    old = issued.tokens[0].token_id
    append_behind(here, monkeypatch, cut(person.user_id))
    call: Call[Rotation, Nothing] = Call(
        runtime=here.runtime,
        incoming=request(path=f"/v1/tokens/{old}/rotate"),
        caller=Caller("t", old, person.user_id, None, frozenset({"ledger:admin"})),
        name=old,
        query=Nothing(),
        body=Rotation(overlap_seconds=60),
        raw_body=b"{}",
    )
    with pytest.raises(Gone):
        await here.projecting(rotate_token(call))
    hit = here.runtime.view.hit(await last_token(here))
    assert hit is not None
    assert hit.token_id != old
    assert hit.token.ended is not None


@pytest.mark.parametrize("shown_again", [False, True], ids=["made", "made before"])
async def test_token_made_just_behind_the_revocation_of_the_callers_own_ends(
    here: Host, shown_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody holds a token that was taken, and keeps asking for others while it is revoked."""
    scope = unique("scope")
    person, _, _ = await signed_in_with(here, scope)
    _, own = await here.issued(subject=person.user_id, scope="ledger:issue")
    await here.project()
    headers = (("idempotency-key", "k"),)
    call: Call[NewToken, Nothing] = Call(
        runtime=here.runtime,
        incoming=request(*headers, path="/v1/tokens"),
        caller=Caller("t", own.tokens[0].token_id, person.user_id, None, frozenset({"ledger:issue"})),
        name="",
        query=Nothing(),
        body=NewToken(kind="pat", subject=person.user_id, name="another", scope=scope),
        raw_body=b"{}",
    )
    cut = SubjectRevoked(**head(), user_id=person.user_id, reason=Reason.COMPROMISED)
    if shown_again:  # what was told before the revocation is told again, though it is as dead as all of theirs
        made = await here.projecting(create_token(call))
        await here.record(cut)
        assert (await here.projecting(create_token(call)))["token"] == made["token"]
        return
    append_behind(here, monkeypatch, cut)
    with pytest.raises(InvalidToken):
        await here.projecting(create_token(call))
    hit = here.runtime.view.hit(await last_token(here))
    assert hit is not None
    assert hit.token.ended is not None


# Clients


def append_behind(here: Host, monkeypatch: pytest.MonkeyPatch, *cuts: LedgerEvent) -> None:
    """What is appended next comes behind these, which its worker does not know yet."""
    append = here.runtime.ledger.append

    async def append_behind_them(*entries: Append) -> list[int]:
        monkeypatch.undo()
        await here.record(*cuts)
        return await append(*entries)

    monkeypatch.setattr(here.runtime.ledger, "append", append_behind_them)


CUTS_OF_A_CLIENT: dict[str, Callable[[str], LedgerEvent]] = {
    "disabled": lambda of: ClientDisabled(**head(), client_id=of, reason=Reason.DISABLED),
    "revoked": lambda of: ClientRevoked(**head(), client_id=of, reason=Reason.COMPROMISED),
}
of_a_client = pytest.mark.parametrize("cut", CUTS_OF_A_CLIENT.values(), ids=CUTS_OF_A_CLIENT.keys())


async def app_with(here: Host, person_id: str, **changes: Any) -> Client:
    """As `app_of`, with refresh tokens."""
    kinds = ("authorization_code", "client_credentials", "refresh_token")
    fields = {"scope": "openid offline_access", "redirect_uris": (BACK,), "grant_types": kinds} | changes
    client_id = await client(here, **fields)
    await here.record(consented(person_id, client_id, "openid offline_access"))
    await here.project()
    found = here.runtime.view.client(client_id)
    assert found is not None
    return found


async def alive(here: Host, client_id: str) -> list[str]:
    """What the client has that any door would still take."""
    await here.project()
    hits = [here.runtime.view.hit(one) for one in here.runtime.view.token_ids(client_id=client_id)]
    judged = {hit.token_id: evaluate(hit, Asked(), now()) for hit in hits if hit is not None}
    return [token_id for token_id, code in judged.items() if code is Code.VALID]


@of_a_client
@pytest.mark.parametrize("changes", [{}, {"access_token_format": "jwt"}, {"grant_types": ("client_credentials",)}])
async def test_client_credentials_just_behind_a_cut_off_of_the_client_are_worth_nothing(
    here: Host, cut: Callable[[str], LedgerEvent], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its secret was proven before: whoever has an old one keeps asking while it is taken from them."""
    app = await app_with(here, (await joined(here)).user_id, **changes)
    append_behind(here, monkeypatch, cut(app.client_id))
    with pytest.raises(Unavailable):
        await here.projecting(client_credentials(here.runtime, app, None, (), "req"))
    assert len(here.runtime.view.token_ids(client_id=app.client_id)) > 0
    assert await alive(here, app.client_id) == []


async def test_client_credentials_after_a_revocation_are_good(here: Host) -> None:
    app = await app_with(here, (await joined(here)).user_id)
    await here.record(CUTS_OF_A_CLIENT["revoked"](app.client_id))
    await here.project()
    again = here.runtime.view.client(app.client_id)
    assert again is not None
    await here.projecting(client_credentials(here.runtime, again, None, (), "req"))
    assert len(await alive(here, app.client_id)) == 2


@of_a_client
@pytest.mark.parametrize("at", ["code", "redemption"])
async def test_code_just_behind_a_cut_off_of_the_client_is_worth_nothing(
    here: Host, cut: Callable[[str], LedgerEvent], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The redirect URI was looked at before: it may have been taken from the client meanwhile."""
    _, _, session = await somebody(here)
    app = await app_with(here, session.user_id)
    if at == "code":
        append_behind(here, monkeypatch, cut(app.client_id))
    code = await code_for(here, app, session, offline=True)
    if at == "redemption":
        await here.project()
        append_behind(here, monkeypatch, cut(app.client_id))
        await redeemed(here, app, code)
    else:
        await here.project()
        again = here.runtime.view.client(app.client_id)
        assert again is not None
        with pytest.raises(InvalidGrant):
            await redeemed(here, again, code)
    assert await alive(here, app.client_id) == []


@of_a_client
@pytest.mark.parametrize("rotates", [True, False], ids=["rotated", "kept"])
async def test_refresh_just_behind_a_cut_off_of_the_client_is_worth_nothing(
    here: Host, cut: Callable[[str], LedgerEvent], rotates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, session = await somebody(here)
    app = await app_with(here, session.user_id, refresh_token_rotation=rotates)
    answer = await redeemed(here, app, await code_for(here, app, session, offline=True))
    await here.project()
    append_behind(here, monkeypatch, cut(app.client_id))
    presented = Presentation(client=app, token=answer["refresh_token"], scope=None, resources=(), request_id="req")
    answer |= json.loads(await here.projecting(refresh(here.runtime, presented)))
    assert await alive(here, app.client_id) == []
    with pytest.raises(InvalidGrant):
        await here.projecting(refresh(here.runtime, replace(presented, token=answer["refresh_token"])))


async def test_secret_proven_before_a_revocation_gets_nothing_of_what_came_after(here: Host) -> None:
    """A worker whose view is old takes a secret that was rotated away, and catches up to find what is asked for."""
    _, _, session = await somebody(here)
    old = await app_with(here, session.user_id)
    await here.record(CUTS_OF_A_CLIENT["revoked"](old.client_id))
    await here.project()
    again = here.runtime.view.client(old.client_id)
    assert again is not None
    code = await code_for(here, again, session, offline=True)
    with pytest.raises(Unavailable):
        await redeemed(here, old, code)
    answer = await redeemed(here, again, code)
    await here.project()
    for known, expected in ((old, Unavailable), (again, None)):
        presented = Presentation(
            client=known, token=answer["refresh_token"], scope=None, resources=(), request_id="req"
        )
        with pytest.raises(expected) if expected else contextlib.nullcontext():
            await here.projecting(refresh(here.runtime, presented))


# Clocks


async def replays(here: Host, grant_id: str) -> list[bool]:
    events = [one.event for one in await here.runtime.ledger.read(f"ledger.main.grant.{grant_id}")]
    return [event.raced for event in events if isinstance(event, CodeReplayed)]


@pytest.mark.parametrize(("off", "late"), [(30.0, False), (-60.0, True)], ids=["ahead", "behind"])
async def test_how_soon_a_spent_code_came_again_is_told_by_the_log_whatever_the_hosts_clock_says(
    here: Host, monkeypatch: pytest.MonkeyPatch, off: float, late: bool
) -> None:
    _, _, session = await somebody(here)
    app = await app_of(here, session.user_id)
    code = await code_for(here, app, session, offline=True)
    began = time.monotonic()
    await redeemed(here, app, code)
    if late:
        await asyncio.sleep(RACE.total_seconds() + 0.1)
    monkeypatch.setattr("service.grants.now", lambda: now() + timedelta(seconds=off))
    with pytest.raises(InvalidGrant):
        await redeemed(here, app, code)
    soon = time.monotonic() - began < RACE.total_seconds() / 2  # on a machine that is too busy it counts as late
    grant_id = await grant_of(here, session)
    (raced,) = await replays(here, grant_id)
    assert raced is not late or not (soon or late)
    await here.project()
    assert isinstance(here.runtime.view.family(grant_id).grant, ActiveGrant) == raced
