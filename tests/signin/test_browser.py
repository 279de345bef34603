"""What a browser holds and sends: cookies, CSRF tokens and sealed requests, its own and those of others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from msgspec.structs import replace

from service.errors import Forbidden, InvalidRequest
from service.oauth.forms import Form
from service.signin import browser as browsers
from service.signin.browser import (
    Carried,
    browser_of,
    check_csrf,
    csrf_token,
    known_browser,
    new_browser,
    open_carried,
    open_request,
    origin_of,
    read_page_form,
    seal_request,
    set_cookie,
)
from service.signin.doors import _decode_waiting
from tests.hosts import ISSUER, Host
from tests.signin.people import SAME_ORIGIN, Browser

QUERY = "client_id=cli_1&state=%C3%A4&scope=openid"


@pytest.fixture
def browser(here: Host) -> Browser:
    made = Browser()
    made.keep([new_browser(here.runtime)[1]])
    return made


def name(here: Host, browser: Browser) -> str:
    found = browser_of(here.runtime, browser.get())
    assert found is not None
    return found


# Cookies


def test_browser_gets_an_id_once(here: Host) -> None:
    one = Browser()
    assert browser_of(here.runtime, one.get()) is None
    given, cookies = known_browser(here.runtime, one.get())
    one.keep(cookies)
    assert known_browser(here.runtime, one.get()) == (given, ())


@pytest.mark.parametrize("value", ["", "short", "a" * 42 + "!", "a" * 44, "ä" * 43])
def test_what_is_no_id_of_ours_is_none(here: Host, browser: Browser, value: str) -> None:
    (cookie,) = browser.cookies
    browser.cookies[cookie] = value
    assert browser_of(here.runtime, browser.get()) is None


def test_cookies_are_marked_secure_and_prefixed_where_the_issuer_is(here: Host) -> None:
    _, text = set_cookie(here.runtime, "browser", "x")
    assert text.startswith("__Host-tl_browser_")
    assert text.endswith("; Secure")
    settings = here.runtime.settings
    here.runtime.settings = replace(settings, issuer="http://127.0.0.1:8080")
    _, text = set_cookie(here.runtime, "browser", "x")
    here.runtime.settings = settings
    assert text == f"tl_browser_{here.runtime.master.deployment}=x; Path=/; HttpOnly; SameSite=Lax"


# CSRF


def posted(here: Host, browser: Browser, token: str | None, headers: Iterable[tuple[str, str]] = SAME_ORIGIN) -> str:
    fields = {} if token is None else {"csrf": token}
    incoming = browser.post("/sign-in", fields, headers=headers)
    return check_csrf(here.runtime, incoming, Form(list(fields.items())), "sign-in")


def test_form_of_ours_is_taken_from_the_browser_that_was_shown_it(here: Host, browser: Browser) -> None:
    own = name(here, browser)
    assert posted(here, browser, csrf_token(here.runtime, own, "sign-in")) == own


SITES: dict[str, tuple[tuple[tuple[str, str], ...], bool]] = {
    "Origin and site": (SAME_ORIGIN, True),
    "Origin alone": ((("origin", ISSUER),), True),
    "neither": ((), True),
    "null, and the same site": ((("origin", "null"), ("sec-fetch-site", "same-origin")), True),
    "asked for by the person": ((("sec-fetch-site", "none"),), True),
    "null alone": ((("origin", "null"),), False),
    "Origin evil": ((("origin", "https://evil.example"), ("sec-fetch-site", "cross-site")), False),
    "Origin evil alone": ((("origin", "https://evil.example"),), False),
    "neighbour": ((("origin", ISSUER), ("sec-fetch-site", "same-site")), False),
    "cross-site": ((("sec-fetch-site", "cross-site"),), False),
    "other scheme": ((("origin", "http://issuer.example"),), False),
    "other port": ((("origin", "https://issuer.example:444"),), False),
    "longer host": ((("origin", "https://issuer.example.evil.example"),), False),
    "two": ((("origin", ISSUER), ("origin", "https://evil.example")), False),
}


@pytest.mark.parametrize(("headers", "taken"), SITES.values(), ids=SITES.keys())
def test_form_is_taken_from_pages_of_ours_alone(here: Host, browser: Browser, headers: Any, taken: bool) -> None:
    """Row 92 of attacks: with the right token, so that it is the browser's word that counts."""
    token = csrf_token(here.runtime, name(here, browser), "sign-in")
    if taken:
        assert posted(here, browser, token, headers)
    else:
        with pytest.raises(Forbidden):
            posted(here, browser, token, headers)


def test_token_is_good_for_one_browser_and_one_purpose(here: Host, browser: Browser) -> None:
    own, (other, _) = name(here, browser), new_browser(here.runtime)
    wrong = [
        None,
        "",
        "x",
        "ä",
        csrf_token(here.runtime, other, "sign-in"),
        csrf_token(here.runtime, own, "consent ses_1"),
        csrf_token(here.runtime, own, "sign-in")[:-1],
    ]
    for token in wrong:
        with pytest.raises(Forbidden):
            posted(here, browser, token)
    with pytest.raises(Forbidden):
        posted(here, Browser(), csrf_token(here.runtime, "", "sign-in"))


async def test_form_must_be_one(here: Host, browser: Browser) -> None:
    assert (await read_page_form(here.runtime, browser.post("/sign-in", {"a": "b"}))).get("a") == "b"
    wrong = browser.get()
    with pytest.raises(InvalidRequest):
        await read_page_form(here.runtime, wrong)


@pytest.mark.parametrize(
    ("issuer", "origin"),
    [
        ("https://a.example", "https://a.example"),
        ("https://a.example:443/tenant", "https://a.example"),
        ("http://a.example:443", "http://a.example:443"),
        ("http://A.Example:80/x", "http://a.example"),
        ("http://[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_origin_is_written_as_browsers_write_it(issuer: str, origin: str) -> None:
    assert origin_of(issuer) == origin


# Sealed requests


def test_request_comes_back_to_the_browser_that_carried_it(here: Host) -> None:
    sealed = seal_request(here.runtime, "b1", QUERY, "sign-in")
    assert open_request(here.runtime, "b1", sealed, "sign-in") == QUERY
    assert "cli_1" not in sealed


def test_request_of_another_browser_or_changed_is_refused(here: Host) -> None:
    """Row 94: a request that somebody else has begun is completed in no other browser."""
    sealed = seal_request(here.runtime, "b1", QUERY, "sign-in")
    changed = sealed[:30] + ("A" if sealed[30] != "A" else "B") + sealed[31:]
    for browser, text in (("b2", sealed), ("b1", changed), ("b1", ""), ("b1", "ä"), ("b1", sealed[:-5]), ("b1", "=")):
        with pytest.raises(InvalidRequest):
            open_request(here.runtime, browser, text, "sign-in")


def test_request_waits_an_hour_and_no_longer(here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 1e9

        def time(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(browsers, "time", clock)
    sealed = seal_request(here.runtime, "b1", QUERY, "sign-in")
    clock.now += 3_600
    assert open_request(here.runtime, "b1", sealed, "sign-in") == QUERY
    clock.now += 1
    with pytest.raises(InvalidRequest, match="too long"):
        open_request(here.runtime, "b1", sealed, "sign-in")


PURPOSES: tuple[Carried, ...] = ("sign-in", "consent", "sign-out", "begun")


@pytest.mark.parametrize("purpose", PURPOSES)
def test_what_is_sealed_for_one_form_opens_in_no_other(here: Host, purpose: Carried) -> None:
    sealed = seal_request(here.runtime, "b1", QUERY, purpose)
    for other in PURPOSES:
        if other == purpose:
            assert open_request(here.runtime, "b1", sealed, other) == QUERY
            continue
        with pytest.raises(InvalidRequest):
            open_request(here.runtime, "b1", sealed, other)


@pytest.mark.parametrize("text", ["", QUERY, "{}", '{"client_id":1}'])
def test_what_cannot_be_read_is_a_bad_request(here: Host, text: str) -> None:
    """Such as what an older version has sealed."""
    sealed = seal_request(here.runtime, "b1", text, "sign-out")
    with pytest.raises(InvalidRequest):
        open_carried(here.runtime, "b1", sealed, "sign-out", _decode_waiting)
