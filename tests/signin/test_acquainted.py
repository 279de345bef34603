"""Browsers that somebody has signed in with: others' guesses do not keep their person out, and they prove no more."""

from __future__ import annotations

from typing import Any

import pytest

from service.registry import UserChange, change_user
from service.signin.acquainted import Acquaintance, acquaint, acquaintance
from service.signin.browser import cookie_name, drop_cookie
from service.signin.delays import Delays
from tests.hosts import Host
from tests.signin.people import SYSTEM, Browser, Person, joined
from tests.signin.test_doors import asked, sent, somebody


@pytest.fixture(autouse=True)
def nobody_waits(here: Host) -> None:
    """Nothing is remembered, and time stands still."""
    here.runtime.account_delays = Delays(5, 900, clock=lambda: 1e6)
    here.runtime.browser_delays = Delays(5, 900, clock=lambda: 1e6)
    here.runtime.address_delays = Delays(30, 900, clock=lambda: 1e6)


async def status(here: Host, browser: Browser, person: Person, password: str, **more: Any) -> int:
    """What signing in is answered by, of who is signed out."""
    browser.keep([drop_cookie(here.runtime, "session")])
    page = await asked(here, browser)
    return (await sent(here, browser, page, person.username, password, **more)).status


async def guessed(here: Host, person: Person, times: int = 5) -> None:
    """By somebody else, elsewhere, until everybody must wait."""
    for _ in range(times):
        assert await status(here, Browser(), person, "cnrypass-wrong", peer="198.51.100.66") == 400
    assert await status(here, Browser(), person, person.password, peer="198.51.100.67") == 429


async def test_guesses_elsewhere_keep_nobody_out_of_a_browser_they_signed_in_with(here: Host) -> None:
    person, browser, _ = await somebody(here)
    await guessed(here, person)
    assert await status(here, browser, person, person.password) == 303
    # What others have guessed was not forgiven by that.
    assert await status(here, Browser(), person, person.password) == 429


async def test_guesses_at_the_address_keep_nobody_out_either(here: Host) -> None:
    person, browser, _ = await somebody(here)
    for _ in range(40):
        here.runtime.address_delays.fail("198.51.100.7")
    assert await status(here, Browser(), person, person.password) == 429
    assert await status(here, browser, person, person.password) == 303


async def test_such_a_browser_has_a_counter_of_its_own(here: Host) -> None:
    """It is no way to guess on."""
    person, browser, _ = await somebody(here)
    for _ in range(5):
        assert await status(here, browser, person, "cnrypass-wrong") == 400
    assert await status(here, browser, person, person.password) == 429
    assert await status(here, Browser(), person, person.password) == 303


async def test_such_a_browser_is_as_any_other_for_other_people(here: Host) -> None:
    _, browser, _ = await somebody(here)
    other = await joined(here)
    await guessed(here, other)
    assert await status(here, browser, other, other.password) == 429


async def test_such_a_browser_is_as_any_other_once_the_password_was_changed(here: Host) -> None:
    """Whoever knew the old one, and signed in with many browsers, has not many counters."""
    person, browser, _ = await somebody(here)
    change = UserChange(names=frozenset({"password"}), profile={}, password="cnrypass-new")
    await here.projecting(change_user(here.runtime, SYSTEM, person.user_id, change))
    person.password = "cnrypass-new"
    await guessed(here, person)
    assert await status(here, browser, person, person.password) == 429


async def test_a_few_people_may_share_a_browser(here: Host) -> None:
    browser = Browser()
    people = [await joined(here) for _ in range(6)]
    for person in people:
        assert await status(here, browser, person, person.password) == 303
    known = []
    for person in people:
        name = here.runtime.master.username_hash(person.username)
        known.append(acquaintance(here.runtime, browser.get(), name) is not None)
    assert known == [False, *[True] * 5]
    cookie = browser.cookies[cookie_name(here.runtime, "acquainted")]
    assert not any(person.username in cookie or person.user_id in cookie for person in people)


def test_cookie_stays_and_is_for_us_alone(here: Host) -> None:
    header, text = acquaint(here.runtime, Browser().get(), "a" * 64, 7)
    assert header == "set-cookie"
    assert set(text.split("; ")[1:]) == {"Path=/", "HttpOnly", "SameSite=Lax", "Secure", "Max-Age=15552000"}


@pytest.mark.parametrize(
    "forge",
    [
        lambda value: value.replace("7-", "8-"),
        lambda value: "A" * 22 + value[22:],
        lambda value: value[:-1] + ("0" if value[-1] != "0" else "1"),
        lambda value: value.replace("-", "", 1),
        lambda value: "",
        lambda value: "." * 200,
        lambda value: value[:22] + ".x" * 10 + value[22:],
        lambda value: "ä" + value,
    ],
    ids=["newer", "other browser", "other signature", "no entry", "empty", "dots", "behind too many", "not ours"],
)
def test_forged_cookie_is_none(here: Host, forge: Any) -> None:
    browser = Browser()
    browser.keep([acquaint(here.runtime, browser.get(), "a" * 64, 7)])
    found = acquaintance(here.runtime, browser.get(), "a" * 64)
    assert found == Acquaintance(found.browser if found is not None else "", 7)
    assert acquaintance(here.runtime, browser.get(), "b" * 64) is None
    name = cookie_name(here.runtime, "acquainted")
    browser.cookies[name] = forge(browser.cookies[name])
    assert acquaintance(here.runtime, browser.get(), "a" * 64) is None
    browser.keep([acquaint(here.runtime, browser.get(), "a" * 64, 9)])
    again = acquaintance(here.runtime, browser.get(), "a" * 64)
    assert again is not None
    assert again.user_seq == 9
