"""Signing in and out, as a browser meets it: pages, forms, redirects, and what others cannot make it do."""

from __future__ import annotations

import html
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest

from events.types import ClientRegistered
from projections.registry import Session
from service.errors import Forbidden, InvalidRequest
from service.hashing import passwords
from service.incoming import Incoming
from service.oauth.id_tokens import IdTokenFor, mint_id_token
from service.outgoing import Response
from service.runtime import Runtime
from service.signin import doors
from service.signin.browser import browser_of, seal_request
from service.signin.delays import Delays
from service.signin.sessions import session_of
from service.tokens import new_id, now
from tests.hosts import Host
from tests.making import allowed, head, metadata
from tests.rsgi import request
from tests.signin.people import Browser, Person, joined

Door = Callable[[Runtime, Incoming], Awaitable[Response]]
BACK = "https://app.example/signed-out"
QUERY = "client_id={}&redirect_uri=https%3A%2F%2Fapp.example%2Fback&state=a%26b"


@pytest.fixture(autouse=True)
def nobody_waits(here: Host) -> None:
    """Nothing is remembered, and time stands still."""
    here.runtime.account_delays = Delays(5, 900, clock=lambda: 1e6)
    here.runtime.browser_delays = Delays(5, 900, clock=lambda: 1e6)
    here.runtime.address_delays = Delays(30, 900, clock=lambda: 1e6)


class Page:
    """An answer, as a person sees it."""

    def __init__(self, answer: Response) -> None:
        self.status = answer.status
        self.headers = dict(answer.headers)
        self.text = answer.body.decode()
        fields = re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)"', self.text)
        self.hidden = {name: html.unescape(value) for name, value in fields}
        self.heading = "".join(re.findall(r"<h1>(.*?)</h1>", self.text))
        onward = re.search(r'http-equiv="refresh" content="0; url=([^"]*)"', self.text)
        self.onward = html.unescape(onward[1]) if onward else None
        self.links = [html.unescape(one) for one in re.findall(r'<a class="button[^"]*" href="([^"]*)"', self.text)]


async def opened(here: Host, browser: Browser, door: Door, incoming: Incoming) -> Page:
    """What the door answers, with its cookies kept."""
    answer = await here.projecting(door(here.runtime, incoming))
    browser.keep(answer.headers)
    return Page(answer)


async def asked(here: Host, browser: Browser, query: str = "") -> Page:
    """The sign-in page, as the authorization endpoint would show it for this query."""
    page = await opened(here, browser, doors.sign_in_page, browser.get("/sign-in"))
    if query:
        own = browser_of(here.runtime, browser.get())
        assert own is not None
        page.hidden["request"] = seal_request(here.runtime, own, query, "sign-in")
    return page


async def sent(here: Host, browser: Browser, page: Page, username: str, password: str, **more: Any) -> Page:
    fields = page.hidden | {"username": username, "password": password}
    return await opened(here, browser, doors.sign_in, browser.post("/sign-in", fields, **more))


async def current(here: Host, browser: Browser) -> Session | None:
    return await here.projecting(session_of(here.runtime, browser.get()))


async def client(here: Host, **changes: Any) -> str:
    client_id = new_id("cli")
    changed = metadata(post_logout_redirect_uris=(BACK,), client_name="shop <b>", **changes)
    await here.record(ClientRegistered(**head(), client_id=client_id, metadata=changed, secret_sha256="0" * 64))
    await here.project()
    return client_id


async def somebody(here: Host) -> tuple[Person, Browser, Session]:
    """Who has signed in."""
    person, browser = await joined(here), Browser()
    await sent(here, browser, await asked(here, browser), person.username, person.password)
    session = await current(here, browser)
    assert session is not None
    return person, browser, session


# Signing in


async def test_person_signs_in_and_comes_to_their_account(here: Host) -> None:
    person, browser = await joined(here), Browser()
    page = await asked(here, browser)
    assert (page.status, page.heading) == (200, "Sign in")
    done = await sent(here, browser, page, person.username, person.password)
    assert (done.status, done.headers["location"]) == (303, "/account")
    session = await current(here, browser)
    assert session is not None
    assert session.user_id == person.user_id
    again = await opened(here, browser, doors.sign_in_page, browser.get("/sign-in"))
    assert (again.status, again.headers["location"]) == (303, "/account")


async def test_request_that_waited_goes_on_after_the_sign_in(here: Host) -> None:
    person, browser, query = await joined(here), Browser(), QUERY.format(await client(here))
    done = await sent(here, browser, await asked(here, browser, query), person.username, person.password)
    assert done.status == 200
    assert done.onward == f"/oauth2/authorize?{query}"


async def test_wrong_password_is_asked_for_again_and_the_request_waits_on(here: Host) -> None:
    person, browser, query = await joined(here), Browser(), QUERY.format(await client(here))
    page = await sent(here, browser, await asked(here, browser, query), person.username, "cnrypass-wrong")
    assert page.status == 400
    assert "not right" in page.text
    assert "shop &lt;b&gt;" in page.text
    assert "cnrypass-wrong" not in page.text
    assert f'value="{person.username}"' in page.text
    assert await current(here, browser) is None
    done = await sent(here, browser, page, person.username, person.password)
    assert done.onward == f"/oauth2/authorize?{query}"


async def test_unknown_name_and_wrong_password_get_the_same_page(here: Host) -> None:
    person, browser = await joined(here), Browser()
    page = await asked(here, browser)
    answers = []
    for username in (person.username, "cnryuser-nobody"):
        answer = await sent(here, browser, page, username, "cnrypass-wrong")
        answers.append((answer.status, answer.headers, answer.text.replace(username, "")))
    assert answers[0] == answers[1]


async def test_whoever_fails_too_often_is_told_to_wait(here: Host) -> None:
    person, browser = await joined(here), Browser()
    page = await asked(here, browser)
    for _ in range(5):
        page = await sent(here, browser, page, person.username, "cnrypass-wrong")
    before = passwords.done
    page = await sent(here, browser, page, person.username, person.password)
    assert (page.status, page.headers["retry-after"]) == (429, "1")
    assert "Wait a second" in page.text
    assert (await current(here, browser), passwords.done) == (None, before)


async def test_double_click_signs_in_once_for_the_browser(here: Host) -> None:
    """Two sessions are begun at most, and the browser is in the one whose cookie came last."""
    person, browser = await joined(here), Browser()
    page = await asked(here, browser)
    for _ in range(2):
        await sent(here, browser, page, person.username, person.password)
    session = await current(here, browser)
    assert session is not None
    sessions = here.runtime.view.sessions_of(person.user_id)
    assert [one.session_id for one in sessions if one.ended_at is None] == [session.session_id]


async def test_two_tabs_with_two_requests_each_go_on_with_their_own(here: Host) -> None:
    person, browser = await joined(here), Browser()
    queries = [QUERY.format(await client(here)) + f"&nonce={number}" for number in range(2)]
    pages = [await asked(here, browser, query) for query in queries]
    done = [await sent(here, browser, page, person.username, person.password) for page in pages]
    assert [one.onward for one in done] == [f"/oauth2/authorize?{query}" for query in queries]


# What others cannot make it do: rows 91 to 94 of attacks


async def test_pages_cannot_be_framed(here: Host) -> None:
    page = await asked(here, Browser())
    assert page.headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert "access-control-allow-origin" not in page.headers


CROSS = (("origin", "https://evil.example"), ("sec-fetch-site", "cross-site"))


async def test_sign_in_from_another_site_is_refused(here: Host) -> None:
    """Login CSRF: the attacker's name and password, posted by the victim's browser."""
    person, browser = await joined(here), Browser()
    page = await asked(here, browser)
    with pytest.raises(Forbidden):
        await sent(here, browser, page, person.username, person.password, headers=CROSS)
    attackers = Browser()
    theirs = await asked(here, attackers)
    with pytest.raises(Forbidden):
        await sent(here, browser, theirs, person.username, person.password)
    with pytest.raises(Forbidden):
        await sent(here, Browser(), theirs, person.username, person.password)
    page.hidden.pop("csrf")
    with pytest.raises(Forbidden):
        await sent(here, browser, page, person.username, person.password)
    assert await current(here, browser) is None


async def test_request_that_another_browser_began_is_completed_by_none(here: Host) -> None:
    person, attackers, victims = await joined(here), Browser(), Browser()
    theirs = await asked(here, attackers, QUERY.format("cli_x"))
    page = await asked(here, victims)
    page.hidden["request"] = theirs.hidden["request"]
    with pytest.raises(InvalidRequest):
        await sent(here, victims, page, person.username, person.password)
    assert await current(here, victims) is None


async def test_session_that_was_there_before_is_never_the_one_after(here: Host) -> None:
    """Session fixation: what the attacker planted, or knows, is worth nothing once the victim has signed in."""
    _, attackers, theirs = await somebody(here)
    victim, browser = await joined(here), Browser()
    browser.cookies = dict(attackers.cookies)
    page = await asked(here, attackers)  # 303: they are signed in
    assert page.status == 303
    own = browser_of(here.runtime, browser.get())
    assert own is not None
    hidden = {
        "request": seal_request(here.runtime, own, "", "sign-in"),
        "csrf": doors.csrf_token(here.runtime, own, doors.SIGN_IN),
    }
    page.hidden = hidden
    await sent(here, browser, page, victim.username, victim.password)
    session = await current(here, browser)
    assert session is not None
    assert session.user_id == victim.user_id
    assert session.session_id != theirs.session_id
    assert await current(here, attackers) is None


async def test_sign_in_without_a_request_or_form_is_refused(here: Host) -> None:
    person, browser = await joined(here), Browser()
    page = await asked(here, browser)
    csrf = page.hidden["csrf"]
    for hidden in ({"csrf": csrf}, {"csrf": csrf, "request": "x"}):
        page.hidden = hidden
        with pytest.raises(InvalidRequest):
            await sent(here, browser, page, person.username, person.password)
    with pytest.raises(InvalidRequest):
        await doors.sign_in(here.runtime, request(*browser.header(), ("content-type", "application/json"), path="/"))


# Signing out


async def signed_out_form(here: Host, browser: Browser) -> dict[str, str]:
    return (await opened(here, browser, doors.sign_out_page, browser.get("/sign-out"))).hidden


async def granted(
    here: Host, session: Session, *, offline: bool, redeemed: bool = True, client_id: str | None = None
) -> str:
    """A grant that began in the session; its code is redeemed unless said otherwise."""
    began, spent = allowed(
        session.user_id,
        client_id or await client(here),
        session_id=session.session_id,
        auth_time=session.auth_time,
        redirect_uri=BACK,
        offline=offline,
    )
    await here.record(*([began, spent] if redeemed else [began]))
    await here.project()
    return began.grant_id


def state(here: Host, grant_id: str) -> str:
    return type(here.runtime.view.family(grant_id).grant).__name__


async def test_signing_out_ends_the_session_and_what_was_granted_in_it(here: Host) -> None:
    _, browser, session = await somebody(here)
    _, _, other = await somebody(here)
    grants = [
        await granted(here, session, offline=False),
        await granted(here, session, offline=True),
        await granted(here, session, offline=False, redeemed=False),
        await granted(here, session, offline=True, redeemed=False),
        await granted(here, other, offline=False),
    ]
    page = await opened(here, browser, doors.sign_out_page, browser.get("/sign-out"))
    assert page.heading == "Sign out?"
    done = await opened(here, browser, doors.sign_out, browser.post("/sign-out", page.hidden))
    assert (done.status, done.heading) == (200, "You are signed out")
    assert await current(here, browser) is None
    assert not any("session" in name for name in browser.cookies)
    ends = ["RevokedGrant", "ActiveGrant", "RevokedGrant", "AuthorizedGrant", "ActiveGrant"]
    assert [state(here, grant_id) for grant_id in grants] == ends
    (last,) = (await here.runtime.ledger.read(f"ledger.main.grant.{grants[0]}"))[-1:]
    assert last.event.reason == "logout"  # type: ignore[union-attr]


async def test_another_session_of_the_same_person_goes_on(here: Host) -> None:
    person, browser, session = await somebody(here)
    other = Browser()
    await sent(here, other, await asked(here, other), person.username, person.password)
    there = await current(here, other)
    assert there is not None
    grant_id = await granted(here, there, offline=False)
    await opened(here, browser, doors.sign_out, browser.post("/sign-out", await signed_out_form(here, browser)))
    assert await current(here, other) == there
    assert state(here, grant_id) == "ActiveGrant"
    assert session.session_id != there.session_id


async def test_signing_out_twice_or_without_a_session_is_well(here: Host) -> None:
    _, browser, _ = await somebody(here)
    form, cookies = await signed_out_form(here, browser), dict(browser.cookies)
    for _ in range(2):
        browser.cookies = dict(cookies)
        done = await opened(here, browser, doors.sign_out, browser.post("/sign-out", form))
        assert done.heading == "You are signed out"
    page = await opened(here, Browser(), doors.sign_out_page, Browser().get("/sign-out"))
    assert page.heading == "You are signed out"


async def test_other_sites_sign_nobody_out(here: Host) -> None:
    _, browser, session = await somebody(here)
    form = await signed_out_form(here, browser)
    with pytest.raises(Forbidden):
        await opened(here, browser, doors.sign_out, browser.post("/sign-out", form, headers=CROSS))
    with pytest.raises(Forbidden):
        await opened(here, browser, doors.sign_out, browser.post("/sign-out", form | {"csrf": "x"}))
    _, others, _ = await somebody(here)
    theirs = await signed_out_form(here, others)
    with pytest.raises(Forbidden):
        await opened(here, browser, doors.sign_out, browser.post("/sign-out", theirs))
    assert await current(here, browser) == session


# An app asks to sign out: OpenID Connect RP-Initiated Logout 1.0


async def hint(here: Host, client_id: str, user_id: str) -> str:
    row = here.runtime.view.client(client_id)
    assert row is not None
    return await here.projecting(mint_id_token(here.runtime, row, IdTokenFor(user_id, now())))


async def logged_out(here: Host, browser: Browser, **parameters: str) -> Page:
    incoming = browser.get("/oauth2/logout", urlencode(parameters))
    return await opened(here, browser, doors.log_out, incoming)


async def test_app_with_an_id_token_signs_its_person_out_and_gets_them_back(here: Host) -> None:
    person, browser, session = await somebody(here)
    client_id = await client(here)
    grant_id = await granted(here, session, offline=False)
    page = await logged_out(
        here,
        browser,
        id_token_hint=await hint(here, client_id, person.user_id),
        post_logout_redirect_uri=BACK,
        state="a&b ä",
    )
    assert page.status == 303
    location = urlsplit(page.headers["location"])
    assert f"{location.scheme}://{location.netloc}{location.path}" == BACK
    assert parse_qsl(location.query) == [("state", "a&b ä")]
    assert await current(here, browser) is None
    assert state(here, grant_id) == "RevokedGrant"
    again = await logged_out(
        here,
        browser,
        id_token_hint=await hint(here, client_id, person.user_id),
        post_logout_redirect_uri=BACK,
    )
    assert (again.status, again.headers["location"]) == (303, BACK)


async def test_without_an_address_the_person_stays_here(here: Host) -> None:
    person, browser, _ = await somebody(here)
    page = await logged_out(here, browser, id_token_hint=await hint(here, await client(here), person.user_id))
    assert (page.status, page.heading, page.links) == (200, "You are signed out", ["/account"])
    assert await current(here, browser) is None


async def nothing(here: Host, client_id: str, _: Person) -> dict[str, str]:
    return {"client_id": client_id}


async def garbage(here: Host, client_id: str, _: Person) -> dict[str, str]:
    return {"client_id": client_id, "id_token_hint": "eyJhbGciOiJub25lIn0.e30."}


async def of_another(here: Host, client_id: str, _: Person) -> dict[str, str]:
    return {"id_token_hint": await hint(here, client_id, (await joined(here)).user_id)}


@pytest.mark.parametrize("given", [nothing, garbage, of_another], ids=lambda one: one.__name__)
async def test_without_a_good_hint_the_person_is_asked_first(here: Host, given: Any) -> None:
    person, browser, session = await somebody(here)
    client_id = await client(here)
    page = await logged_out(here, browser, post_logout_redirect_uri=BACK, **await given(here, client_id, person))
    assert (page.status, page.heading) == (200, "Sign out?")
    assert "shop &lt;b&gt;" in page.text
    assert await current(here, browser) == session
    done = await opened(here, browser, doors.sign_out, browser.post("/sign-out", page.hidden))
    assert (done.heading, done.links) == ("You are signed out", [BACK])
    assert await current(here, browser) is None


async def test_hint_that_cannot_be_read_any_more_is_no_dead_end(here: Host) -> None:
    """Its key was revoked since. Nothing else says whose address it is."""
    _, browser, session = await somebody(here)
    page = await logged_out(here, browser, post_logout_redirect_uri=BACK, id_token_hint="eyJhbGciOiJub25lIn0.e30.")
    assert (page.status, page.heading) == (200, "Sign out?")
    assert await current(here, browser) == session
    done = await opened(here, browser, doors.sign_out, browser.post("/sign-out", page.hidden))
    assert (done.heading, done.links) == ("You are signed out", ["/account"])


ELSEWHERE = [
    "https://evil.example/",
    BACK + "/",
    BACK + "?x",
    BACK + "#x",
    BACK.upper(),
    "https://app.example@evil.example/signed-out",
    "//evil.example",
    "javascript:alert(1)",
    "/account",
]


@pytest.mark.parametrize("uri", ELSEWHERE)
async def test_nobody_is_led_to_what_is_not_registered(here: Host, uri: str) -> None:
    person, browser, session = await somebody(here)
    client_id = await client(here)
    for more in ({"id_token_hint": await hint(here, client_id, person.user_id)}, {"client_id": client_id}, {}):
        with pytest.raises(InvalidRequest):
            await logged_out(here, browser, post_logout_redirect_uri=uri, **more)
    assert await current(here, browser) == session


async def test_hint_of_one_app_is_no_word_of_another(here: Host) -> None:
    person, browser, session = await somebody(here)
    one, other = await client(here), await client(here)
    with pytest.raises(InvalidRequest):
        await logged_out(here, browser, id_token_hint=await hint(here, one, person.user_id), client_id=other)
    assert await current(here, browser) == session


async def test_what_is_posted_is_asked_again_by_get(here: Host) -> None:
    """A cross-site POST carries no cookie, so that who is signed in could not be told."""
    incoming = Browser().post("/oauth2/logout", {"client_id": "c", "state": "a b", "logout_hint": "x"}, headers=CROSS)
    page = await opened(here, Browser(), doors.log_out_by_post, incoming)
    assert (page.status, page.headers["location"]) == (303, "/oauth2/logout?client_id=c&state=a%20b")


async def test_parameters_that_are_repeated_are_refused(here: Host) -> None:
    with pytest.raises(InvalidRequest):
        await doors.log_out(here.runtime, Browser().get("/oauth2/logout", "state=a&state=b"))
