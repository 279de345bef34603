"""`/account` over HTTP: a person looks after what is theirs, and nobody else can."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.people import Browser, Form, Page, flow, person, redeem, web_app
from tests.running import CANARY_NAME, App, Service, unique, until

ACCOUNT = "/account"
TOKEN = re.compile(r"tl_pat_[0-9A-Za-z]{49}")


@pytest.fixture(scope="module")
def scopes(service: Service) -> tuple[str, str]:
    return service.scope(description="See your orders"), service.scope(description="Change your orders")


@pytest.fixture
def ada(service: Service, scopes: tuple[str, str]) -> dict[str, Any]:
    return person(service, scope=" ".join(scopes))


@pytest.fixture
def browser(service: Service, ada: dict[str, Any]) -> Browser:
    return signed_in(service, ada)


@pytest.fixture(scope="module")
def app(service: Service) -> App:
    return web_app(service)


def signed_in(service: Service, who: dict[str, Any]) -> Browser:
    browser = Browser(service)
    page = browser.sign_in(browser.get(ACCOUNT), who)
    assert page.title.startswith("Your account")
    return browser


def form(page: Page, action: str, **fields: str) -> Form:
    """The page's form that goes there, with these fields among its own."""
    found = [one for one in page.forms if one.action == action and fields.items() <= one.fields.items()]
    assert len(found) == 1, page.text
    return found[0]


def filled(page: Page, *ticked: str, name: str = "", days: str = "30") -> tuple[Form, dict[str, str]]:
    """The form for a new token without its boxes, and what a person fills in."""
    made = form(page, "/account/tokens")
    fields = {key: value for key, value in made.fields.items() if not key.startswith("scope ")}
    wanted = {"name": name or unique(CANARY_NAME), "days": days, **{f"scope {one}": "on" for one in ticked}}
    return Form(made.action, made.method, fields), wanted


def issued(browser: Browser, *ticked: str, **more: str) -> str:
    page = browser.get(ACCOUNT)
    made, wanted = filled(page, *ticked, **more)
    answer = browser.submit(page, made, **wanted)
    assert answer.status == 200, answer.text
    tokens = TOKEN.findall(answer.text)
    assert len(tokens) == 1, answer.text
    return str(tokens[0])


def token_id(service: Service, token: str) -> str:
    return str(service.validate(token)["token_id"])


def test_a_token_of_ones_own_has_the_scopes_that_were_ticked_and_the_life_that_was_chosen(
    service: Service, browser: Browser, ada: dict[str, Any], scopes: tuple[str, str]
) -> None:
    token = issued(browser, scopes[0], days="7")
    verdict = service.validate(token)
    assert verdict["code"] == "valid"
    assert verdict["subject"] == ada["user_id"]
    assert verdict["scope"] == scopes[0]
    shown = service.done("GET", f"/v1/tokens/{verdict['token_id']}")
    lived = datetime.fromisoformat(shown["expires_at"]) - datetime.fromisoformat(shown["issued_at"])
    assert timedelta(days=7) - lived < timedelta(seconds=1)
    history = service.history(verdict["token_id"])
    assert history[0]["by"].startswith("ses_")
    assert token not in browser.get(ACCOUNT).text


@pytest.mark.parametrize(
    ("ticked", "name", "told"),
    [
        ((), "Backup", "Choose at least one thing"),
        ((0,), "", "Give the token a name"),
        ((0,), " blank ", "Give the token a name"),
        ((0,), "x" * 201, "Give the token a name"),
        ((0,), "turned\u202eround", "Give the token a name"),
    ],
    ids=["no scope", "no name", "blanks around", "too long", "unseen letters"],
)
def test_a_form_that_lacks_something_comes_back_as_it_was_and_issues_nothing(
    *, service: Service, browser: Browser, scopes: tuple[str, str], ticked: tuple[int, ...], name: str, told: str
) -> None:
    page = browser.get(ACCOUNT)
    made, wanted = filled(page, *(scopes[at] for at in ticked))
    answer = browser.submit(page, made, **(wanted | {"name": name}))
    assert answer.status == 400
    assert told in answer.text
    assert 'role="alert"' in answer.text
    assert answer.title.startswith("Error: ")
    assert not TOKEN.findall(answer.text)
    assert "You have no tokens." in answer.text


@pytest.mark.parametrize("days", ["", "0", "31", "99999", "x"])
def test_a_life_that_no_form_offers_issues_nothing(
    service: Service, browser: Browser, scopes: tuple[str, str], days: str
) -> None:
    page = browser.get(ACCOUNT)
    made, wanted = filled(page, scopes[0])
    answer = browser.submit(page, made, **(wanted | {"days": days}))
    assert (answer.status, TOKEN.findall(answer.text)) == (400, [])
    assert "You have no tokens." in browser.get(ACCOUNT).text


def test_a_scope_that_the_person_lacks_is_neither_offered_nor_given(
    service: Service, browser: Browser, scopes: tuple[str, str]
) -> None:
    """attacks: no more than one holds, whatever the form says."""
    other = service.scope()
    assert other not in browser.get(ACCOUNT).text
    token = issued(browser, scopes[0], other, "ledger:admin", "openid")
    assert service.validate(token)["scope"] == scopes[0]


def test_whoever_holds_a_ledger_scope_can_give_it_to_a_token_and_nobody_gets_more(service: Service) -> None:
    browser = signed_in(service, person(service, scope="ledger:audit"))
    token = issued(browser, "ledger:audit", "ledger:users")
    assert service.validate(token)["scope"] == "ledger:audit"


def test_a_person_without_scopes_is_told_that_there_is_nothing_to_issue(service: Service) -> None:
    page = signed_in(service, person(service)).get(ACCOUNT)
    assert "holds no scope that a token could have" in page.text
    assert not [one for one in page.forms if one.action == "/account/tokens"]


def posted(browser: Browser, made: Form, wanted: dict[str, str]) -> httpx.Response:
    """The form is sent, and what the answer leads to is not fetched."""
    headers = {"Origin": browser.origin, "Sec-Fetch-Site": "same-origin"}
    return browser.http.post(made.action, data={**made.fields, **wanted}, headers=headers, follow_redirects=False)


def test_a_token_is_shown_once_however_often_its_form_or_its_page_is_asked_for(
    service: Service, browser: Browser, ada: dict[str, Any], scopes: tuple[str, str]
) -> None:
    """A reload, the form sent again, another name typed into it: one form, one token."""
    page = browser.get(ACCOUNT)
    made, wanted = filled(page, scopes[0])
    shown = browser.submit(page, made, **wanted)
    assert shown.url.startswith(f"{service.url}/account/tokens/issued?")
    (token,) = TOKEN.findall(shown.text)
    changed = wanted | {"name": unique(CANARY_NAME), "days": "90"}
    again = [browser.get(shown.url), browser.submit(page, made, **wanted), browser.submit(page, made, **changed)]
    for answer in again:
        assert answer.status == 410
        assert "This token was sent already" in answer.text
        assert wanted["name"] in answer.text
        assert not TOKEN.findall(answer.text)
        assert ACCOUNT in answer.links
    (only,) = service.items("/v1/tokens", subject=ada["user_id"])
    assert only["token_id"] == token_id(service, token)
    another = browser.get(ACCOUNT)
    assert TOKEN.findall(browser.submit(another, filled(another, scopes[0])[0], **changed).text)


def test_a_token_whose_page_was_lost_can_be_revoked_where_that_is_said(
    service: Service, browser: Browser, ada: dict[str, Any], scopes: tuple[str, str]
) -> None:
    """The first answer does not arrive; whoever asks again has never seen the token, which works for a year."""
    where = posted(browser, *filled(browser.get(ACCOUNT), scopes[0], days="365")).headers["location"]
    (lost,) = TOKEN.findall(browser.http.get(where).text)
    refused = browser.get(where)
    assert (refused.status, service.code(lost)) == (410, "valid")
    after = browser.submit(refused, form(refused, "/account/tokens/revoke"))
    assert after.url.endswith("/account?done=revoked")
    assert service.code(lost) == "revoked"
    assert form(after, "/account/tokens")
    again = browser.get(where)
    assert (again.status, "It works no more" in again.text) == (410, True)
    assert "/account/tokens/revoke" not in [one.action for one in again.forms]
    assert ACCOUNT in again.links


def test_a_double_click_issues_one_token_and_shows_it(
    service: Service, browser: Browser, ada: dict[str, Any], scopes: tuple[str, str]
) -> None:
    """The browser follows the second answer only."""
    made, wanted = filled(browser.get(ACCOUNT), scopes[0])
    first, second = (posted(browser, made, wanted) for _ in range(2))
    assert first.status_code == second.status_code == 303
    (token,) = TOKEN.findall(browser.get(second.headers["location"]).text)
    assert not TOKEN.findall(browser.get(first.headers["location"]).text)
    assert service.code(token) == "valid"
    assert len(list(service.items("/v1/tokens", subject=ada["user_id"]))) == 1


def test_of_many_who_ask_for_the_new_token_at_once_one_sees_it(
    service: Service, browser: Browser, scopes: tuple[str, str]
) -> None:
    where = posted(browser, *filled(browser.get(ACCOUNT), scopes[0])).headers["location"]
    cookies = "; ".join(f"{name}={value}" for name, value in browser.http.cookies.items())

    def ask(_: int) -> httpx.Response:
        with service.caller() as http:
            return http.get(where, headers={"Cookie": cookies})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert sorted(answer.status_code for answer in answers) == [200, *[410] * 7]
    assert sum(len(TOKEN.findall(answer.text)) for answer in answers) == 1


@pytest.mark.parametrize("query", ["", "?key=", "?key=nobody", "?key=a&key=b", "?key=%ff"], ids=str)
def test_the_page_of_a_token_that_no_form_made_shows_none(browser: Browser, query: str) -> None:
    answer = browser.get(f"/account/tokens/issued{query}")
    assert answer.status in {200, 400}
    assert not TOKEN.findall(answer.text)


@pytest.mark.parametrize("key", ["", "short", "x" * 23, "\u00e9" * 22], ids=["none", "short", "long", "no ASCII"])
def test_a_form_without_its_key_issues_nothing(
    service: Service, browser: Browser, ada: dict[str, Any], scopes: tuple[str, str], key: str
) -> None:
    page = browser.get(ACCOUNT)
    made, wanted = filled(page, scopes[0])
    assert browser.submit(page, made, **wanted, key=key).status == 400
    assert list(service.items("/v1/tokens", subject=ada["user_id"])) == []


def test_another_session_does_not_get_the_token(
    service: Service, browser: Browser, ada: dict[str, Any], scopes: tuple[str, str]
) -> None:
    where = posted(browser, *filled(browser.get(ACCOUNT), scopes[0])).headers["location"]
    for other in (signed_in(service, ada), signed_in(service, person(service)), Browser(service)):
        assert not TOKEN.findall(other.get(where).text)
    assert TOKEN.findall(browser.get(where).text)


def test_revoking_ends_the_token_and_says_whose_wish_it_was(
    service: Service, browser: Browser, scopes: tuple[str, str]
) -> None:
    token = issued(browser, scopes[0])
    identifier = token_id(service, token)
    page = browser.get(ACCOUNT)
    after = browser.submit(page, form(page, "/account/tokens/revoke", token_id=identifier))
    assert after.url.endswith("/account?done=revoked")
    assert "The token was revoked" in after.text
    assert identifier not in after.text
    assert service.code(token) == "revoked"
    assert service.done("GET", f"/v1/tokens/{identifier}")["reason"] == "owner_request"
    again = browser.submit(page, form(page, "/account/tokens/revoke", token_id=identifier))
    assert again.status == 200  # the wanted state holds already


@pytest.mark.parametrize("what", ["another person's", "a refresh token", "no id", "nobody's"])
def test_only_a_token_of_ones_own_can_be_revoked(
    *, service: Service, browser: Browser, ada: dict[str, Any], scopes: tuple[str, str], app: App, what: str
) -> None:
    theirs = service.pat(scopes[0])
    made = flow(service, app, scope="openid offline_access")
    redeem(service, made, browser.visit(made.url, ada).answer["code"])
    (refresh,) = service.items("/v1/tokens", subject=ada["user_id"], kind="refresh")
    named = {
        "another person's": theirs["token_id"],
        "a refresh token": refresh["token_id"],
        "no id": "tok_../../x",
        "nobody's": "tok_" + "0" * 32,
    }[what]
    issued(browser, scopes[0])
    page = browser.get(ACCOUNT)
    made_form = next(one for one in page.forms if one.action == "/account/tokens/revoke")
    answer = browser.submit(page, made_form, token_id=named)
    assert answer.status == 404
    assert "You have no such token" in answer.text
    assert service.code(theirs["token"]) == "valid"
    assert service.done("GET", f"/v1/tokens/{refresh['token_id']}")["status"] == "active"


def test_withdrawing_ends_what_the_app_had_and_it_must_ask_again(
    service: Service, browser: Browser, ada: dict[str, Any], app: App
) -> None:
    made = flow(service, app, scope="openid offline_access")
    tokens = redeem(service, made, browser.visit(made.url, ada).answer["code"]).json()
    page = browser.get(ACCOUNT)
    assert app.metadata["client_name"] in page.text
    assert "Keep this access while you are away" in page.text
    after = browser.submit(page, form(page, "/account/apps/withdraw", client_id=app.client_id))
    assert after.url.endswith("/account?done=withdrawn")
    assert "No app has access to your account." in after.text
    assert service.code(tokens["access_token"]) == "revoked"
    assert service.refresh(app, tokens["refresh_token"]).json()["error"] == "invalid_grant"
    assert browser.get(made.url).title.startswith("Allow access?")
    other = browser.submit(page, form(page, "/account/apps/withdraw", client_id=app.client_id), client_id="cli_x")
    assert other.status == 404


def test_an_app_is_listed_with_when_it_last_got_a_token(
    service: Service, browser: Browser, ada: dict[str, Any], app: App
) -> None:
    made = flow(service, app, scope="openid offline_access")
    code = browser.visit(made.url, ada).answer["code"]
    assert "last active" not in browser.get(ACCOUNT).text
    assert redeem(service, made, code).status_code == 200
    (refresh,) = service.items("/v1/tokens", subject=ada["user_id"], kind="refresh")
    assert f'last active <time datetime="{refresh["issued_at"][:13]}' in browser.get(ACCOUNT).text


def recorded(service: Service, who: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return list(service.items("/v1/audit/events", subject=who["user_id"], type=kind))


FIREFOX = "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:132.0) Gecko/20100101 Firefox/132.0"


def test_each_session_is_listed_with_browser_and_address_and_can_be_ended_by_itself(
    service: Service, browser: Browser, ada: dict[str, Any], app: App
) -> None:
    other = Browser(service, source="127.0.0.9")
    other.http.headers["user-agent"] = FIREFOX
    other.sign_in(other.get(ACCOUNT), ada)
    made, kept = flow(service, app), flow(service, app, scope="openid offline_access")
    short = redeem(service, made, other.visit(made.url, ada).answer["code"]).json()["access_token"]
    lasting = redeem(service, kept, other.visit(kept.url, ada).answer["code"]).json()["access_token"]
    page = browser.get(ACCOUNT)
    assert "Firefox on Windows" in page.text
    assert "127.0.0.9" in page.text
    (end,) = (one for one in page.forms if one.action == "/account/sessions/end")  # not for the browser that one is in
    after = browser.submit(page, end)
    assert after.url.endswith("/account?done=ended")
    assert "That browser is signed out." in after.text
    assert "Firefox on Windows" not in after.text
    assert other.get(ACCOUNT).title.startswith("Sign in")
    assert service.code(short) == "revoked"
    assert service.code(lasting) == "valid"
    (left,) = service.items(f"/v1/users/{ada['user_id']}/sessions")
    (event,) = until(lambda: recorded(service, ada, "session.ended"))
    assert event["body"]["session_id"] == end.fields["session_id"]
    assert (event["body"]["reason"], event["by"]) == ("signed_out", left["session_id"])
    assert browser.submit(page, end).status == 200  # the wanted state holds already


def test_where_somebody_signed_in_is_told_to_who_manages_users_and_stands_in_no_event(
    service: Service, ada: dict[str, Any]
) -> None:
    browser = Browser(service, source="127.0.0.9")
    browser.http.headers["user-agent"] = FIREFOX
    browser.sign_in(browser.get(ACCOUNT), ada)
    (listed,) = service.items(f"/v1/users/{ada['user_id']}/sessions")
    assert (listed["browser"], listed["ip"]) == ("Firefox on Windows", "127.0.0.9")
    (event,) = until(lambda: recorded(service, ada, "session.started"))
    assert "Firefox" not in str(event)
    assert "127.0.0.9" not in str(event)


@pytest.mark.parametrize("what", ["another person's", "no id", "nobody's", ""])
def test_only_a_session_of_ones_own_can_be_ended(
    service: Service, browser: Browser, ada: dict[str, Any], what: str
) -> None:
    theirs = person(service)
    other = signed_in(service, theirs)
    (listed,) = service.items(f"/v1/users/{theirs['user_id']}/sessions")
    named = {"another person's": listed["session_id"], "no id": "ses_../x", "nobody's": "ses_" + "0" * 32}
    signed_in(service, ada)
    page = browser.get(ACCOUNT)
    answer = browser.submit(page, form(page, "/account/sessions/end"), session_id=named.get(what, ""))
    assert answer.status == 404
    assert "You are not signed in there" in answer.text
    assert other.get(ACCOUNT).title.startswith("Your account")


def test_signing_out_everywhere_ends_all_sessions_and_keeps_tokens(
    service: Service, browser: Browser, ada: dict[str, Any], scopes: tuple[str, str], app: App
) -> None:
    token = issued(browser, scopes[0])
    other = signed_in(service, ada)
    made = flow(service, app)
    short = redeem(service, made, other.visit(made.url, ada).answer["code"]).json()["access_token"]
    page = browser.get(ACCOUNT)
    assert page.text.count("Unknown browser") == 2
    assert page.text.count("This browser") == 1
    after = browser.submit(page, form(page, "/account/sign-out-everywhere"))
    assert after.title.startswith("Signed out")
    for one in (browser, other):
        assert one.get(ACCOUNT).title.startswith("Sign in")
    assert service.code(token) == "valid"
    assert service.code(short) == "revoked"  # it was to last as long as its session


DOORS = (
    "/account/tokens",
    "/account/tokens/revoke",
    "/account/apps/withdraw",
    "/account/sessions/end",
    "/account/sign-out-everywhere",
)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("headers", "csrf"),
    [
        ({}, ""),
        ({}, "guess"),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, None),
        ({"Sec-Fetch-Site": "same-site"}, None),
    ],
    ids=["no token", "wrong token", "another site", "a sibling site"],
)
def test_what_another_site_sends_changes_nothing(
    *, service: Service, browser: Browser, scopes: tuple[str, str], door: str, headers: dict[str, str], csrf: str | None
) -> None:
    """attacks 92."""
    token = issued(browser, scopes[0])
    page = browser.get(ACCOUNT)
    fields = form(page, "/account/tokens").fields
    sent = {
        "csrf": fields["csrf"] if csrf is None else csrf,
        "name": "Theirs",
        "days": "30",
        f"scope {scopes[0]}": "on",
        "token_id": token_id(service, token),
        "client_id": "cli_" + "0" * 32,
    }
    answer = browser.http.post(door, data=sent, headers=headers)
    assert answer.status_code == 403
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert service.code(token) == "valid"
    assert browser.get(ACCOUNT).title.startswith("Your account")


@pytest.mark.parametrize("door", DOORS)
def test_the_forms_of_one_session_do_nothing_in_another(service: Service, browser: Browser, door: str) -> None:
    stranger = signed_in(service, person(service))
    csrf = form(stranger.get(ACCOUNT), "/account/sign-out-everywhere").fields["csrf"]
    assert browser.http.post(door, data={"csrf": csrf}).status_code == 403


@pytest.mark.parametrize("door", DOORS)
def test_whoever_is_not_signed_in_is_asked_to(service: Service, door: str) -> None:
    browser = Browser(service)
    answer = browser.http.post(door, data={"csrf": "x"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, ACCOUNT)
    assert browser.get(ACCOUNT).title.startswith("Sign in")


@pytest.mark.parametrize(
    "query", ["?done=revoked", "?done=%3Cscript%3E", "?done=a&done=b", "?done", "?%00=%ff"], ids=str
)
def test_an_address_that_somebody_made_up_shows_nothing_of_its_own(browser: Browser, query: str) -> None:
    answer = browser.http.get(ACCOUNT + query)
    assert answer.status_code in {200, 400}
    assert "<script" not in answer.text


def test_a_disabled_person_is_signed_out(service: Service, browser: Browser, ada: dict[str, Any]) -> None:
    service.done("DELETE", f"/v1/users/{ada['user_id']}")
    assert browser.get(ACCOUNT).title.startswith("Sign in")
