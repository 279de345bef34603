"""What ends with a session: all of it, by whatever the session ended, and no more work for it than needs be."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from events.types import SessionStarted
from projections.registry import Session
from service.endings import finish
from service.pages.account import sign_out_everywhere
from service.signin import doors, sessions
from service.signin.browser import CSRF, browser_of, csrf_token, seal_request, set_cookie
from service.signin.passwords import Proof
from service.tokens import new_id, now
from tests.hosts import Host
from tests.making import head
from tests.signin.people import Browser, Person
from tests.signin.test_consents import give, with_grants, withdraw
from tests.signin.test_doors import asked, current, granted, opened, sent, signed_out_form, somebody, state


async def signed_in_again(here: Host, browser: Browser, person: Person) -> Session:
    """In a browser that somebody is in: the app wanted them to sign in, whoever they are."""
    own = browser_of(here.runtime, browser.get())
    assert own is not None
    page = await asked(here, Browser())
    page.hidden = {
        doors.REQUEST: seal_request(here.runtime, own, "", "sign-in"),
        CSRF: csrf_token(here.runtime, own, doors.SIGN_IN),
    }
    await sent(here, browser, page, person.username, person.password)
    session = await current(here, browser)
    assert session is not None
    return session


async def sign_out(here: Host, browser: Browser) -> None:
    await opened(here, browser, doors.sign_out, browser.post("/sign-out", await signed_out_form(here, browser)))


def started(user_id: str, *, hours: float) -> SessionStarted:
    """Which ends in so many hours, or did."""
    at = now() + timedelta(hours=hours - 12)
    return SessionStarted(
        **head(at),
        session_id=new_id("ses"),
        user_id=user_id,
        auth_time=at,
        expires_at=at + timedelta(hours=12),
        methods=("pwd",),
        user_seq=2**40,
    )


async def began(here: Host, user_id: str, *, hours: float = 12) -> Session:
    event = started(user_id, hours=hours)
    await here.record(event)
    await here.project()
    session = here.runtime.view.session(event.session_id)
    assert session is not None
    return session


# What one can no longer sign out of


async def test_what_a_replaced_session_left_ends_with_the_next_sign_out(here: Host) -> None:
    person, browser, first = await somebody(here)
    grants = [await granted(here, first, offline=offline) for offline in (False, True)]
    await signed_in_again(here, browser, person)
    assert [state(here, one) for one in grants] == ["ActiveGrant", "ActiveGrant"]
    await sign_out(here, browser)
    assert [state(here, one) for one in grants] == ["RevokedGrant", "ActiveGrant"]


async def test_what_an_expired_session_left_ends_with_the_next_sign_out(here: Host) -> None:
    person, browser, _ = await somebody(here)
    expired, elsewhere = await began(here, person.user_id, hours=-1), await began(here, person.user_id)
    grants = [
        await granted(here, expired, offline=False),
        await granted(here, expired, offline=True),
        await granted(here, elsewhere, offline=False),
    ]
    await sign_out(here, browser)
    assert [state(here, one) for one in grants] == ["RevokedGrant", "ActiveGrant", "ActiveGrant"]


async def test_sign_out_that_was_completed_late_ends_what_it_would_have_then(here: Host) -> None:
    """What expired or was granted since is not its own."""
    person, browser, session = await somebody(here)
    replaced = await granted(here, session, offline=False)
    await signed_in_again(here, browser, person)
    await sign_out(here, browser)
    expired = await began(here, person.user_id, hours=-1)
    later = await granted(here, expired, offline=False)
    assert (await here.projecting(finish(here.runtime))).grants == 0
    assert (state(here, replaced), state(here, later)) == ("RevokedGrant", "ActiveGrant")


async def test_another_person_who_signs_in_signs_the_first_one_out(here: Host) -> None:
    _, browser, first = await somebody(here)
    grants = [await granted(here, first, offline=offline) for offline in (False, True)]
    other, _, _ = await somebody(here)
    assert (await signed_in_again(here, browser, other)).user_id == other.user_id
    assert [state(here, one) for one in grants] == ["RevokedGrant", "ActiveGrant"]
    row = here.runtime.view.session(first.session_id)
    assert row is not None
    assert row.reason == "signed_out"


async def test_another_person_who_signs_in_ends_what_was_left_there_by_an_expired_session(here: Host) -> None:
    person, browser, _ = await somebody(here)
    expired = await began(here, person.user_id, hours=-1)
    browser.keep([set_cookie(here.runtime, "session", sessions._signed(here.runtime, expired.session_id))])
    grant_id = await granted(here, expired, offline=False)
    other, _, _ = await somebody(here)
    await signed_in_again(here, browser, other)
    assert state(here, grant_id) == "RevokedGrant"


# Everywhere


async def everywhere(here: Host, browser: Browser, session: Session) -> Any:
    own = browser_of(here.runtime, browser.get())
    assert own is not None
    fields = {CSRF: csrf_token(here.runtime, own, f"account {session.session_id}")}
    return await opened(here, browser, sign_out_everywhere, browser.post("/account/sign-out-everywhere", fields))


async def test_everywhere_is_in_every_session_however_many_there_are(
    here: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever knows the password may begin as many as they like: the newest must not survive."""
    person, browser, session = await somebody(here)
    monkeypatch.setattr(sessions, "_SLICE", 3)
    await here.record(*[started(person.user_id, hours=12) for _ in range(10)])
    await here.project()
    assert len(await sessions.standing(here.runtime, person.user_id)) == 11
    assert (await everywhere(here, browser, session)).heading == "You are signed out"
    assert await sessions.standing(here.runtime, person.user_id) == []


async def test_everywhere_is_in_sessions_too_that_the_view_does_not_have_yet(here: Host) -> None:
    person, browser, session = await somebody(here)
    event = started(person.user_id, hours=12)
    own = browser_of(here.runtime, browser.get())
    assert own is not None
    fields = {CSRF: csrf_token(here.runtime, own, f"account {session.session_id}")}
    incoming = browser.post("/account/sign-out-everywhere", fields)
    await here.record(event)
    assert here.runtime.view.session(event.session_id) is None
    await here.projecting(sign_out_everywhere(here.runtime, incoming))
    assert await sessions.standing(here.runtime, person.user_id) == []


async def test_everywhere_ends_what_was_granted_in_any_of_them(here: Host) -> None:
    person, browser, session = await somebody(here)
    elsewhere, expired = await began(here, person.user_id), await began(here, person.user_id, hours=-1)
    _, _, others = await somebody(here)
    grants = [await granted(here, one, offline=False) for one in (session, elsewhere, expired, others)]
    offline = await granted(here, elsewhere, offline=True)
    await everywhere(here, browser, session)
    assert [state(here, one) for one in grants] == [*["RevokedGrant"] * 3, "ActiveGrant"]
    assert state(here, offline) == "ActiveGrant"


# What is made up for


@pytest.fixture
def walks(here: Host, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whose tokens were looked through."""
    walked: list[str] = []
    token_ids = here.runtime.view.token_ids

    def counted(**asked: Any) -> list[str]:
        walked.append(asked["subject"])
        return token_ids(**asked)

    monkeypatch.setattr(here.runtime.view, "token_ids", counted)
    return walked


async def test_what_was_finished_is_not_walked_through_again(here: Host, walks: list[str]) -> None:
    person, session, app, _ = await with_grants(here)
    await give(here, person.user_id, app, "openid")
    await withdraw(here, person.user_id, app)
    await here.projecting(sessions.end(here.runtime, session, "signed_out", by=person.user_id))
    walks.clear()
    done = await here.projecting(finish(here.runtime))
    assert walks.count(person.user_id) == 2
    walks.clear()
    again = await here.projecting(finish(here.runtime, after=done.position))
    assert (again.grants, walks) == (0, [])


async def test_others_have_their_turn_after_each_end(here: Host, walks: list[str]) -> None:
    """However many there are: no request waits for more than one of them."""
    person, _, _ = await somebody(here)
    for _ in range(5):
        session = await began(here, person.user_id)
        await here.projecting(sessions.end(here.runtime, session, "signed_out", by=person.user_id))
    after = here.runtime.view.freshness().position - 5 * 2
    walks.clear()
    seen: list[int] = []
    done = asyncio.Event()

    async def others() -> None:
        while not done.is_set():
            seen.append(len(walks))
            await asyncio.sleep(0)

    async def both() -> None:
        watching = asyncio.ensure_future(others())
        await finish(here.runtime, after=after)
        done.set()
        await watching

    await here.projecting(both())
    assert set(range(len(walks) + 1)) <= set(seen)
    assert len(walks) == 5


async def test_end_that_came_after_the_position_is_made_up_for(here: Host) -> None:
    person, _, session = await somebody(here)
    position = (await here.projecting(finish(here.runtime))).position
    grant_id = await granted(here, session, offline=False)
    proof = Proof(person.user_id, 2**40, ("pwd",))
    assert proof.user_id == person.user_id
    mark = sessions.stamp(person.user_id, None)
    (ended,) = sessions.decide_end(mark, here.runtime.view.session(session.session_id), "signed_out")
    await here.record(ended)
    await here.project()
    assert (await here.projecting(finish(here.runtime, after=position))).grants == 1
    assert state(here, grant_id) == "RevokedGrant"
