"""Workers whose view is a moment old while a person is cut off: what they still make is worth nothing."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from events.ledger import Append
from events.types import (
    AuthorizationGranted,
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
from service.api.tokens import Rotation, rotate_token
from service.caller import Caller
from service.errors import Gone, InvalidGrant
from service.oauth.codes import Authorization, Redemption, grant_code, redeem
from service.pages import account
from service.rules.codes import RACE, challenge_of
from service.tokens import now
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


@pytest.mark.parametrize("cut", CUTS_OF_A_PERSON.values(), ids=CUTS_OF_A_PERSON.keys())
async def test_successor_made_just_behind_a_cut_off_ends_and_is_not_shown(
    here: Host, cut: Callable[[str], LedgerEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = unique("scope")
    person, _, _ = await signed_in_with(here, scope)
    _, issued = await here.issued(subject=person.user_id, scope=scope)
    await here.project()
    old, append = issued.tokens[0].token_id, here.runtime.ledger.append

    async def append_behind_it(*entries: Append) -> list[int]:
        monkeypatch.undo()
        await here.record(cut(person.user_id))
        return await append(*entries)

    monkeypatch.setattr(here.runtime.ledger, "append", append_behind_it)
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
