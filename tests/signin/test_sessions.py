"""Sessions: begun, found again by their cookie, ended by whatever ends them, and forged by nobody."""

from __future__ import annotations

import asyncio
import hmac
from datetime import timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from events.types import Reason, SubjectRevoked
from projections.grants import ActiveGrant, ByCode
from projections.registry import Cut, Session
from service.errors import Unavailable
from service.keys import MasterKey
from service.registry import UserChange, change_user, disable_user
from service.rules import grants
from service.rules.grants import Stamp
from service.rules.sessions import StartSession, decide_end, decide_start, is_live
from service.signin import passwords, sessions
from service.signin.browser import cookie_name
from service.signin.passwords import Proof
from tests.hosts import Host
from tests.making import DAY, START, after, cli, head, ses, tok, usr
from tests.rsgi import request
from tests.signin.people import SYSTEM, Browser, Person, joined

# Rules


def stamp() -> Stamp:
    return Stamp(("0" * 32, "1" * 32), START, usr(1), None)


BEGUN = Session(ses(1), usr(1), START, START + DAY, ("pwd",), 7, 9)


@pytest.mark.parametrize(
    ("cut", "at", "live"),
    [
        (None, START, True),
        (None, START + DAY - timedelta(seconds=1), True),
        (None, START + DAY, False),
        (Cut(7, START, Reason.PASSWORD_CHANGED), START, True),
        (Cut(8, START, Reason.PASSWORD_CHANGED), START, False),
        (Cut(3, START, Reason.DISABLED, disabled=True), START, False),
    ],
    ids=["begun", "last second", "expired", "cut known when they proved it", "cut since", "disabled"],
)
def test_session_is_live_until_it_ends(cut: Cut | None, at: Any, live: bool) -> None:
    assert is_live(BEGUN, cut, at) is live


def test_ended_session_is_not_live() -> None:
    assert not is_live(replace(BEGUN, ended_at=after(1), reason="replaced"), None, START)


def test_session_begins_now_and_ends_after_its_lifetime() -> None:
    command = StartSession(
        stamp=stamp(),
        session_id=ses(1),
        user_id=usr(1),
        user_seq=7,
        methods=("pwd",),
        ttl=timedelta(hours=12),
        sealed_place=b"sealed",
    )
    event = decide_start(command)
    assert (event.auth_time, event.expires_at) == (START, START + DAY / 2)
    assert (event.by, event.user_seq, event.methods) == (usr(1), 7, ("pwd",))
    assert event.sealed_place == b"sealed"


def test_session_is_ended_once() -> None:
    (event,) = decide_end(stamp(), BEGUN, "signed_out")
    assert (event.session_id, event.user_id, event.reason) == (ses(1), usr(1), "signed_out")
    assert decide_end(stamp(), replace(BEGUN, ended_at=START, reason="admin"), "signed_out") == []
    assert decide_end(stamp(), None, "signed_out") == []
    assert decide_end(Stamp(("0" * 32,), START + DAY, usr(1), None), BEGUN, "signed_out") == []


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize(("cut_seq", "ended"), [(7, False), (8, True)], ids=["known", "since"])
def test_grant_of_a_session_that_was_cut_off_before_is_none(cut_seq: int, ended: bool, offline: bool) -> None:
    """The password was changed, and in the same moment a grant recorded behind that in a session begun with the old."""
    by_code = ByCode(tok(1), ses(1), START, offline, "https://app.example/back", "x" * 43)
    grant = ActiveGrant(usr(1), cli(1), "openid", (), 20, by_code=by_code)
    person = grants.Person(session=BEGUN, cut=Cut(cut_seq, START, Reason.PASSWORD_CHANGED))
    assert grants.is_taken_back(grant, person) is ended


# In a browser


async def signed_in(here: Host, person: Person, browser: Browser) -> Session:
    await here.project()
    user = here.runtime.view.user(person.user_id)
    assert user is not None
    proof = Proof(person.user_id, user.seq, ("pwd",))
    work = sessions.begin(here.runtime, browser.get(), proof)
    session, cookie = await here.projecting(work)
    browser.keep([cookie])
    return session


async def current(here: Host, browser: Browser) -> Session | None:
    return await here.projecting(sessions.session_of(here.runtime, browser.get()))


async def test_browser_is_in_the_session_that_its_cookie_names(here: Host) -> None:
    person, browser = await joined(here), Browser()
    assert await current(here, browser) is None
    session = await signed_in(here, person, browser)
    assert await current(here, browser) == session
    assert session.user_id == person.user_id
    assert await current(here, Browser()) is None


async def test_cookie_is_for_us_alone_and_for_no_script(here: Host) -> None:
    person = await joined(here)
    proof = await here.projecting(passwords.check(here.runtime, person.username, person.password, None))
    _, (header, text) = await here.projecting(sessions.begin(here.runtime, Browser().get(), proof))
    assert header == "set-cookie"
    assert text.startswith("__Host-tl_session_")
    assert set(text.split("; ")[1:]) == {"Path=/", "HttpOnly", "SameSite=Lax", "Secure"}


async def test_each_sign_in_has_a_session_of_its_own_and_ends_the_one_before(here: Host) -> None:
    person, browser = await joined(here), Browser()
    first = await signed_in(here, person, browser)
    fixed = dict(browser.cookies)
    second = await signed_in(here, person, browser)
    assert first.session_id != second.session_id
    assert await current(here, browser) == second
    old = Browser()
    old.cookies = fixed
    assert await current(here, old) is None
    row = here.runtime.view.session(first.session_id)
    assert row is not None
    assert row.reason == "replaced"


FORGERIES = {
    "no signature": lambda value: value.partition(".")[0],
    "signature of another": lambda value: f"{value.partition('.')[0]}.{'0' * 64}",
    "other session under this signature": lambda value: f"{ses(5)}.{value.partition('.')[2]}",
    "upper case": lambda value: value.upper(),
    "blank": lambda _: "",
    "more behind it": lambda value: value + "0",
    "quoted": lambda value: f'"{value}"',
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
async def test_forged_cookie_is_no_session(here: Host, forge: Any) -> None:
    person, browser = await joined(here), Browser()
    await signed_in(here, person, browser)
    name = cookie_name(here.runtime, "session")
    browser.cookies[name] = forge(browser.cookies[name])
    assert await current(here, browser) is None


async def test_cookie_of_another_ledger_is_no_session(here: Host) -> None:
    """Signed with another key, which is all that tells them apart."""
    person, browser = await joined(here), Browser()
    session = await signed_in(here, person, browser)
    other = MasterKey(bytes(32))
    signature = hmac.digest(other.sessions, session.session_id.encode(), "sha256").hex()
    browser.cookies[cookie_name(here.runtime, "session")] = f"{session.session_id}.{signature}"
    assert await current(here, browser) is None


async def test_second_cookie_of_the_name_makes_both_worthless(here: Host) -> None:
    """A neighbour's page that could set one would else sign somebody in as the neighbour."""
    person, browser = await joined(here), Browser()
    await signed_in(here, person, browser)
    name = cookie_name(here.runtime, "session")
    twice = request(("cookie", f"{name}={browser.cookies[name]}; {name}=tossed"), method="GET", path="/account")
    assert await here.projecting(sessions.session_of(here.runtime, twice)) is None


async def changed_password(here: Host, person: Person) -> None:
    change = UserChange(names=frozenset({"password"}), profile={}, password="cnrypass-another")
    await here.projecting(change_user(here.runtime, SYSTEM, person.user_id, change))


async def disabled(here: Host, person: Person) -> None:
    await here.projecting(disable_user(here.runtime, SYSTEM, person.user_id, erase=False))


async def revoked(here: Host, person: Person) -> None:
    await here.record(SubjectRevoked(**head(), user_id=person.user_id, reason=Reason.ADMIN))
    await here.project()


@pytest.mark.parametrize("happens", [changed_password, disabled, revoked], ids=lambda one: one.__name__)
async def test_cut_off_of_the_user_ends_every_session(here: Host, happens: Any) -> None:
    person, browsers = await joined(here), [Browser(), Browser()]
    for browser in browsers:
        await signed_in(here, person, browser)
    await happens(here, person)
    assert [await current(here, browser) for browser in browsers] == [None, None]


async def test_session_begun_with_a_password_that_was_changed_meanwhile_is_none(here: Host) -> None:
    """The old one was checked, then it was changed, then the session was recorded."""
    person, browser = await joined(here), Browser()
    proof = await here.projecting(passwords.check(here.runtime, person.username, person.password, None))
    await changed_password(here, person)
    _, cookie = await here.projecting(sessions.begin(here.runtime, browser.get(), proof))
    browser.keep([cookie])
    assert await current(here, browser) is None


async def test_sign_in_after_a_cut_off_is_good(here: Host) -> None:
    person, browser = await joined(here), Browser()
    await revoked(here, person)
    session = await signed_in(here, person, browser)
    assert await current(here, browser) == session


async def test_session_that_is_ended_is_over_everywhere_and_ending_it_again_changes_nothing(here: Host) -> None:
    person, browser = await joined(here), Browser()
    session = await signed_in(here, person, browser)
    for _ in range(2):
        cookie = await here.projecting(sessions.end(here.runtime, session, "signed_out", by=person.user_id))
    assert "Max-Age=0" in cookie[1]
    assert await current(here, browser) is None
    events = await here.runtime.ledger.read(f"ledger.main.session.{session.session_id}")
    assert [type(recorded.event).__name__ for recorded in events] == ["SessionStarted", "SessionEnded"]


async def test_two_who_end_it_at_once_record_it_once(here: Host) -> None:
    person, browser = await joined(here), Browser()
    session = await signed_in(here, person, browser)
    both = asyncio.gather(*(sessions.end(here.runtime, session, "signed_out", by=person.user_id) for _ in range(2)))

    async def ended() -> None:
        await both

    await here.projecting(ended())
    assert len(await here.runtime.ledger.read(f"ledger.main.session.{session.session_id}")) == 2


async def test_stale_view_says_nothing_of_a_session(here: Host) -> None:
    person, browser = await joined(here), Browser()
    await signed_in(here, person, browser)
    await here.project(seconds_ago=60)
    with pytest.raises(Unavailable):
        await sessions.session_of(here.runtime, browser.get())
