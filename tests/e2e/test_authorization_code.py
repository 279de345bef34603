"""The whole way of a person: sign in, consent, code, tokens, refresh, userinfo, as any client takes it."""

from __future__ import annotations

import base64
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode

import httpx
import jwt
import pytest

from tests.people import (
    CALLBACK,
    Browser,
    Flow,
    Page,
    flow,
    person,
    push,
    pushed,
    redeem,
    web_app,
)
from tests.running import App, Service, oauth_error, unique, until

PASSWORD_ASKED = "Sign in"
CONSENT_ASKED = "Allow access?"
API, OTHER_API = "https://api.example", "https://other.example"


def claims_of(service: Service, app: App, token: str) -> dict[str, Any]:
    """Of an ID token, verified as a client does it."""
    kid = jwt.get_unverified_header(token)["kid"]
    key = next(one for one in service.http.get("/oauth2/jwks").json()["keys"] if one["kid"] == kid)
    alg = app.metadata.get("id_token_signed_response_alg", "RS256")
    claims: dict[str, Any] = jwt.decode(
        token, jwt.PyJWK(key).key, algorithms=[alg], audience=app.client_id, issuer=service.issuer
    )
    return claims


def half_hash(value: str) -> str:
    """OpenID Connect Core §3.1.3.6, §3.3.2.11, for RS256."""
    return base64.urlsafe_b64encode(hashlib.sha256(value.encode()).digest()[:16]).decode().rstrip("=")


@pytest.fixture
def somebody(service: Service) -> dict[str, Any]:
    return person(service, display_name=unique("cnryname"))


@pytest.fixture
def browser(service: Service) -> Browser:
    return Browser(service)


@pytest.fixture(scope="module")
def app(service: Service) -> App:
    return web_app(service)


def error_of(page: Page) -> str:
    return page.answer["error"]


def test_person_signs_in_consents_and_the_client_gets_refreshes_and_uses_tokens(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    made = flow(service, app, scope="openid profile offline_access")
    before = int(time.time())
    page = browser.get(made.url)
    assert page.status == 200
    assert page.title.startswith(PASSWORD_ASKED)
    page = browser.sign_in(page, somebody)
    assert page.title.startswith(CONSENT_ASKED)
    assert app.metadata["client_name"] in page.text
    assert somebody["display_name"] in page.text
    assert "https://app.example" in page.text
    page = browser.consent(page)
    assert page.left is not None
    assert page.left.startswith(CALLBACK + "?")
    answer = page.answer
    assert answer.keys() == {"code", "state", "iss"}
    assert (answer["state"], answer["iss"]) == (made.state, service.issuer)
    given = redeem(service, made, answer["code"])
    assert given.status_code == 200, given.text
    tokens = given.json()
    assert set(tokens["scope"].split()) == {"openid", "profile", "offline_access"}
    claims = claims_of(service, app, tokens["id_token"])
    assert claims["sub"] == somebody["user_id"]
    assert claims["nonce"] == made.parameters["nonce"]
    assert claims["at_hash"] == half_hash(tokens["access_token"])
    assert claims["amr"] == ["pwd"]
    assert before - 1 <= claims["auth_time"] <= time.time() + 1
    told = service.http.get("/oauth2/userinfo", headers={"Authorization": f"Bearer {tokens['access_token']}"})
    assert told.json()["sub"] == somebody["user_id"]
    assert told.json()["name"] == somebody["display_name"]
    again = service.refresh(app, tokens["refresh_token"])
    assert again.status_code == 200, again.text
    renewed = claims_of(service, app, again.json()["id_token"])
    assert {name: renewed[name] for name in ("sub", "auth_time")} == {
        name: claims[name] for name in ("sub", "auth_time")
    }
    assert service.code(again.json()["access_token"]) == "valid"


def test_what_was_allowed_is_remembered_and_more_is_asked_for(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    assert "code" in browser.visit(flow(service, app, scope="openid").url, somebody).answer
    assert "code" in browser.get(flow(service, app, scope="openid").url).answer
    page = browser.get(flow(service, app, scope="openid email").url)
    assert page.title.startswith(CONSENT_ASKED)
    assert "code" in browser.consent(page).answer
    assert "code" in browser.get(flow(service, app, scope="email openid", prompt="none").url).answer
    assert browser.get(flow(service, app, prompt="consent").url).title.startswith(CONSENT_ASKED)
    # Another browser of theirs: they sign in, and that is all.
    page = Browser(service).visit(flow(service, app, scope="openid").url, somebody)
    assert "code" in page.answer


def test_consent_that_was_withdrawn_is_asked_for_again(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    assert "code" in browser.visit(flow(service, app).url, somebody).answer
    query = {"client_id": app.client_id}
    service.done("DELETE", f"/v1/users/{somebody['user_id']}/consents", params=query)
    assert error_of(browser.get(flow(service, app, prompt="none").url)) == "consent_required"
    assert browser.get(flow(service, app).url).title.startswith(CONSENT_ASKED)


def test_refusal_is_told_and_not_remembered(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    made = flow(service, app)
    page = browser.visit(made.url, somebody, allow=False)
    assert (error_of(page), page.answer["state"]) == ("access_denied", made.state)
    assert browser.get(made.url).title.startswith(CONSENT_ASKED)


@pytest.mark.parametrize("prompt", ["login", "select_account", "login consent"])
def test_person_signs_in_again_when_the_client_wants_it(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser, prompt: str
) -> None:
    assert "code" in browser.visit(flow(service, app).url, somebody).answer
    page = browser.get(flow(service, app, prompt=prompt).url)
    assert page.title.startswith(PASSWORD_ASKED)
    page = browser.sign_in(page, somebody)
    if "consent" in prompt:
        page = browser.consent(page)
    assert "code" in page.answer


def test_max_age_is_held_to(service: Service, app: App, somebody: dict[str, Any], browser: Browser) -> None:
    assert "code" in browser.visit(flow(service, app).url, somebody).answer
    assert "code" in browser.get(flow(service, app, max_age="3600").url).answer
    assert error_of(browser.get(flow(service, app, max_age="0", prompt="none").url)) == "login_required"
    until(lambda: browser.get(flow(service, app, max_age="1").url).left is None, what="a second has passed")
    made = flow(service, app, max_age="0")
    page = browser.get(made.url)
    assert page.title.startswith(PASSWORD_ASKED)
    since = int(time.time())
    tokens = redeem(service, made, browser.sign_in(page, somebody).answer["code"]).json()
    assert claims_of(service, app, tokens["id_token"])["auth_time"] >= since


def test_hint_of_somebody_else_is_no_silent_answer(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    made = flow(service, app)
    token = redeem(service, made, browser.visit(made.url, somebody).answer["code"]).json()["id_token"]
    assert "code" in browser.get(flow(service, app, prompt="none", id_token_hint=token).url).answer
    other = Browser(service)
    assert "code" in other.visit(flow(service, app).url, person(service)).answer
    assert error_of(other.get(flow(service, app, prompt="none", id_token_hint=token).url)) == "login_required"
    assert other.get(flow(service, app, id_token_hint=token).url).title.startswith(PASSWORD_ASKED)


@pytest.mark.parametrize("hint", ["garbage", "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.e30.", "foreign"])
def test_hint_that_names_nobody_is_no_dead_end_and_no_silent_answer(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser, hint: str
) -> None:
    """OpenID Connect Core §3.1.2.1: it is a hint. Signed in and allowed, the person sees nothing of it."""
    browser.visit(flow(service, app).url, somebody)
    if hint == "foreign":
        claims = {"iss": service.issuer, "sub": somebody["user_id"], "aud": app.client_id, "iat": 1, "exp": 2}
        hint = jwt.encode(claims, "s" * 32, algorithm="HS256")
    silent = browser.get(flow(service, app, prompt="none", id_token_hint=hint).url)
    assert error_of(silent) == "login_required"
    assert "id_token_hint" in silent.answer["error_description"]
    assert "code" in browser.get(flow(service, app, id_token_hint=hint).url).answer
    assert Browser(service).get(flow(service, app, id_token_hint=hint).url).title.startswith(PASSWORD_ASKED)


def test_login_hint_stands_in_the_field(service: Service, app: App, browser: Browser) -> None:
    assert browser.get(flow(service, app, login_hint='ann"&').url).form.fields["username"] == 'ann"&'


def test_request_by_form_is_the_same(service: Service, app: App, somebody: dict[str, Any], browser: Browser) -> None:
    """Browsers send no cookies of ours with what pages of other sites post: the answer is a redirect to ourselves."""
    assert "code" in browser.visit(flow(service, app).url, somebody).answer
    made = flow(service, app, state="a&b=c ä")
    answer = browser.http.post("/oauth2/authorize", data=made.parameters, headers={"Origin": "https://app.example"})
    assert answer.status_code == 303
    assert browser.get(answer.headers["location"]).answer["state"] == "a&b=c ä"


@pytest.mark.parametrize("mode", [None, "fragment", "form_post"])
def test_hybrid_flow_answers_with_an_id_token_that_vouches_for_the_code(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser, mode: str | None
) -> None:
    made = flow(service, app, response_type="id_token code", response_mode=mode)
    page = browser.visit(made.url, somebody)
    if mode == "form_post":
        assert page.form.action == CALLBACK
        assert page.form.method == "post"
    else:
        assert page.left is not None
        assert page.left.startswith(CALLBACK + "#")
    answer = page.answer
    assert answer.keys() == {"code", "id_token", "state", "iss"}
    first = claims_of(service, app, answer["id_token"])
    assert first["c_hash"] == half_hash(answer["code"])
    assert first["nonce"] == made.parameters["nonce"]
    second = claims_of(service, app, redeem(service, made, answer["code"]).json()["id_token"])
    for name in ("iss", "sub", "aud", "nonce", "auth_time", "amr"):
        assert first[name] == second[name], name


def test_resource_narrows_at_the_authorization_and_again_at_the_token(
    service: Service, somebody: dict[str, Any], browser: Browser
) -> None:
    """RFC 8707 §2.1, §2.2."""
    app = web_app(service, audience=[API, OTHER_API, "https://third.example"])
    made = flow(service, app, scope="openid offline_access")
    url = f"{made.url}&{urlencode([('resource', API), ('resource', OTHER_API)])}"
    code = browser.visit(url, somebody).answer["code"]
    oauth_error(redeem(service, made, code, resource="https://third.example"), 400, "invalid_target")
    narrow = redeem(service, made, code, resource=API).json()
    assert service.validate(narrow["access_token"])["audience"] == [API]
    wide = service.refresh(app, narrow["refresh_token"]).json()
    assert set(service.validate(wide["access_token"])["audience"]) == {API, OTHER_API}
    oauth_error(service.refresh(app, wide["refresh_token"], resource="https://third.example"), 400, "invalid_target")


def test_scope_is_what_client_and_person_both_have(service: Service, browser: Browser) -> None:
    mine, theirs = service.scope(), service.scope()
    app, somebody = web_app(service, scope=f"openid {mine} {theirs}"), person(service, scope=mine)
    made = flow(service, app, scope=f"openid {mine}")
    page = browser.visit(made.url, somebody)
    assert set(redeem(service, made, page.answer["code"]).json()["scope"].split()) == {"openid", mine}
    assert error_of(browser.get(flow(service, app, scope=f"openid {theirs}").url)) == "invalid_scope"
    everything = flow(service, app, scope=None)
    code = browser.get(everything.url).answer["code"]
    assert set(redeem(service, everything, code).json()["scope"].split()) == {"openid", mine}


def test_refresh_token_comes_with_offline_access_only(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    made = flow(service, app, scope="openid")
    assert "refresh_token" not in redeem(service, made, browser.visit(made.url, somebody).answer["code"]).json()
    without = web_app(service, grant_types=["authorization_code"])
    made = flow(service, without, scope="openid offline_access")
    tokens = redeem(service, made, browser.visit(made.url, somebody).answer["code"]).json()
    assert "refresh_token" not in tokens
    assert tokens["scope"] == "openid"


def test_apps_get_no_scope_of_the_ledger_and_no_offline_access_unasked(service: Service, browser: Browser) -> None:
    """Whatever client and person hold: nobody manages the ledger by a token that an app was given."""
    app = web_app(service, scope="openid offline_access ledger:admin ledger:validate")
    admin = person(service, scope="ledger:admin ledger:validate")
    made = flow(service, app, scope=None)
    page = browser.sign_in(browser.get(made.url), admin)
    assert "ledger:" not in page.text
    tokens = redeem(service, made, browser.consent(page).answer["code"]).json()
    assert (tokens["scope"], "refresh_token" in tokens) == ("openid", False)
    assert error_of(browser.get(flow(service, app, scope="openid ledger:validate").url)) == "invalid_scope"


# Pushed requests


def test_pushed_request_goes_the_whole_way(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    made = flow(service, app, prompt="login", state="s" * 500)
    answer = push(service, made)
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json().keys() == {"request_uri", "expires_in"}
    assert answer.json()["expires_in"] == 90
    got = browser.visit(pushed(service, made), somebody).answer
    assert got["state"] == made.state
    assert redeem(service, made, got["code"]).status_code == 200


def test_pushed_request_is_satisfied_by_signing_in_after_it(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    """And by nothing else: who takes `prompt` out of the address bar has taken nothing out of what was pushed."""
    assert "code" in browser.visit(flow(service, app).url, somebody).answer
    url = pushed(service, flow(service, app, prompt="login"))
    assert browser.get(url).title.startswith(PASSWORD_ASKED)
    page = browser.get(url)
    assert page.title.startswith(PASSWORD_ASKED)
    assert "code" in browser.sign_in(page, somebody).answer


def test_pushed_request_of_a_public_client(service: Service, somebody: dict[str, Any], browser: Browser) -> None:
    app = web_app(service, token_endpoint_auth_method="none")
    made = flow(service, app)
    assert redeem(service, made, browser.visit(pushed(service, made), somebody).answer["code"]).status_code == 200


def test_pushed_request_clicked_twice_is_no_error(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    """Whoever has consented before sees no page: both requests are GETs of one link."""
    assert "code" in browser.visit(flow(service, app).url, somebody).answer
    made = flow(service, app)
    url = pushed(service, made)
    first, second = (browser.get(url).answer["code"] for _ in range(2))
    assert redeem(service, made, second).status_code == 200
    assert first != second
    other = Browser(service)
    assert other.sign_in(other.get(flow(service, app).url), somebody).left is not None
    assert "used already" in other.get(url).text


def test_pushed_request_keeps_nothing_that_is_not_read(service: Service, app: App) -> None:
    """Else one client could fill what all share."""
    made = flow(service, app, state="s" * 3_000)
    assert push(service, made, padding="x" * 6_000).status_code == 201


def test_pushed_request_is_kept_unreadable(service: Service, app: App) -> None:
    made = flow(service, app, state=unique("cnryquery"), login_hint=unique("cnryuser"))
    assert push(service, made).status_code == 201
    store = b"".join(path.read_bytes() for path in service.data_dir.rglob("*.blk"))
    assert made.state.encode() not in store
    assert made.parameters["login_hint"].encode() not in store


# Accidents


def allowed_twice(browser: Browser, page: Page, *, at_once: bool) -> list[Page]:
    """The same form, sent twice."""
    if not at_once:
        return [browser.consent(page), browser.consent(page)]
    sent = {**page.form.fields, "decision": "allow"}
    cookies = "; ".join(f"{name}={value}" for name, value in browser.http.cookies.items())
    headers = {"Origin": browser.service.issuer, "Sec-Fetch-Site": "same-origin", "Cookie": cookies}

    def send(_: int) -> httpx.Response:
        with browser.service.caller() as http:
            return http.post(page.form.action, data=sent, headers=headers)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(send, range(2)))
    return [browser._read(page.url, answer) for answer in answers]


def codes_of(pages: list[Page]) -> list[str]:
    for page in pages:
        page.left = page.left or page.refresh
    return [page.answer["code"] for page in pages]


@pytest.mark.parametrize("by_push", [False, True], ids=["plain", "pushed"])
@pytest.mark.parametrize("at_once", [False, True], ids=["one after the other", "at once"])
def test_double_click_on_allow_leaves_one_chain(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser, *, by_push: bool, at_once: bool
) -> None:
    """Whichever answer the browser follows: both bring one code, of one grant."""
    made = flow(service, app, scope="openid offline_access")
    page = browser.sign_in(browser.get(pushed(service, made) if by_push else made.url), somebody)
    first, second = codes_of(allowed_twice(browser, page, at_once=at_once))
    assert first == second
    tokens = redeem(service, made, second)
    assert tokens.status_code == 200
    granted = until(lambda: events_of(service, somebody, "authorization.granted", "code.redeemed", count=2))
    assert [one["type"] for one in granted] == ["authorization.granted", "code.redeemed"]
    live = list(service.items("/v1/tokens", subject=somebody["user_id"]))
    assert sorted(one["kind"] for one in live) == ["access", "refresh"]
    assert len({one["grant_id"] for one in live}) == 1


def events_of(service: Service, who: dict[str, Any], *kinds: str, count: int) -> list[dict[str, Any]]:
    """Of these kinds about this person, in order, once there are as many."""
    events = service.items("/v1/audit/events", subject=who["user_id"])
    found = [one for one in events if one["type"] in kinds]
    return found if len(found) >= count else []


def test_form_that_is_sent_again_when_its_code_was_redeemed_brings_another_and_ends_nothing(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    """Back, and Allow again: the spent code would be taken for stolen."""
    made = flow(service, app)
    page = browser.sign_in(browser.get(made.url), somebody)
    first = browser.consent(page).answer["code"]
    tokens = redeem(service, made, first).json()
    second = browser.consent(page).answer["code"]
    assert second != first
    assert redeem(service, made, second).status_code == 200
    assert service.code(tokens["access_token"]) == "valid"


@pytest.mark.parametrize("by_push", [False, True], ids=["plain", "pushed"])
@pytest.mark.parametrize("redeemed", [False, True], ids=["not redeemed", "redeemed"])
def test_deny_on_a_form_that_was_allowed_before_ends_what_it_gave(
    *, service: Service, app: App, somebody: dict[str, Any], browser: Browser, redeemed: bool, by_push: bool
) -> None:
    """Back, and another decision."""
    made = flow(service, app)
    page = browser.sign_in(browser.get(pushed(service, made) if by_push else made.url), somebody)
    code = browser.consent(page).answer["code"]
    tokens = redeem(service, made, code).json() if redeemed else {}
    answer = browser.consent(page, allow=False)
    if redeemed and by_push:
        assert answer.status == 400  # the request was spent; what it gave ends all the same
    else:
        assert answer.answer["error"] == "access_denied"
    if redeemed:
        assert service.code(tokens["access_token"]) == "revoked"
    else:
        assert redeem(service, made, code).json()["error"] == "invalid_grant"
    again = browser.get(flow(service, app).url)
    assert ("decision", "allow") in again.form.buttons  # nothing is remembered


def test_deny_on_a_form_that_was_allowed_before_leaves_what_was_consented_before(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    first = flow(service, app)
    tokens = redeem(service, first, browser.visit(first.url, somebody).answer["code"]).json()
    page = browser.get(flow(service, app, prompt="consent").url)
    browser.consent(page)
    assert browser.consent(page, allow=False).answer["error"] == "access_denied"
    assert service.code(tokens["access_token"]) == "valid"
    assert "code" in browser.get(flow(service, app).url).answer


def test_two_consent_pages_of_one_request_bring_a_code_each(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    made = flow(service, app, prompt="consent")
    pages = [browser.sign_in(browser.get(made.url), somebody), browser.get(made.url)]
    first, second = (browser.consent(page).answer["code"] for page in pages)
    assert first != second
    assert redeem(service, made, first).status_code == redeem(service, made, second).status_code == 200


@pytest.mark.parametrize("decision", [{}, {"decision": ""}, {"decision": "maybe"}, {"decision": "ALLOW"}], ids=str)
def test_decision_that_is_none_is_refused_in_words_and_grants_nothing(
    *, service: Service, app: App, somebody: dict[str, Any], browser: Browser, decision: dict[str, str]
) -> None:
    made = flow(service, app)
    page = browser.sign_in(browser.get(made.url), somebody)
    refused = browser.submit(page, **decision)
    assert refused.status == 400
    assert refused.headers["content-type"] == "text/html; charset=utf-8"
    assert "Neither Allow nor Deny was chosen." in refused.text
    assert "Go back to the page that asked, and choose one." in refused.text
    assert error_of(browser.get(flow(service, app, prompt="none").url)) == "consent_required"


@pytest.mark.parametrize("public", [True, False], ids=["native", "web"])
def test_only_an_app_that_cannot_prove_who_it_is_is_called_a_program_on_the_device(
    *, service: Service, somebody: dict[str, Any], browser: Browser, public: bool
) -> None:
    method = "none" if public else "client_secret_basic"
    app = web_app(service, token_endpoint_auth_method=method, redirect_uris=["http://127.0.0.1:4711/cb"])
    page = browser.sign_in(browser.get(flow(service, app, redirect_uri="http://127.0.0.1:4711/cb").url), somebody)
    assert page.title.startswith(CONSENT_ASKED)
    assert ("program on your device" in page.text) is public
    assert ("program on this device" in page.text) is public
    assert "127.0.0.1:4711" in page.text


def test_two_tabs_sign_in_one_after_the_other(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    """The second finds the person signed in by the first, and both get their answers."""
    made, other = flow(service, app), flow(service, app)
    first, second = browser.get(made.url), browser.get(other.url)
    one = browser.consent(browser.sign_in(first, somebody)).answer
    two = browser.sign_in(second, somebody).answer
    assert (one["state"], two["state"]) == (made.state, other.state)
    assert redeem(service, made, one["code"]).status_code == 200
    assert redeem(service, other, two["code"]).status_code == 200


def test_consent_page_of_another_session_is_shown_again(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    """Somebody else has signed in in the other tab meanwhile: what the first was shown is not allowed by the second."""
    page = browser.sign_in(browser.get(flow(service, app).url), somebody)
    other = person(service, display_name=unique("cnryname"))
    waiting = browser.sign_in(browser.get(flow(service, app, prompt="login").url), other)
    assert waiting.title.startswith(CONSENT_ASKED)
    again = browser.consent(page)
    assert again.title.startswith(CONSENT_ASKED)
    assert other["display_name"] in again.text
    assert "code" in browser.consent(again).answer
    assert error_of(Browser(service).visit(flow(service, app, prompt="none").url, {})) == "login_required"


def test_consent_page_of_a_session_that_ended_leads_to_signing_in(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    made = flow(service, app)
    page = browser.sign_in(browser.get(made.url), somebody)
    browser.submit(browser.get("/sign-out"))
    again = browser.consent(page)
    assert again.title.startswith(PASSWORD_ASKED)
    assert browser.consent(browser.sign_in(again, somebody)).answer["state"] == made.state


def test_consent_covers_what_was_shown_and_no_more(service: Service, browser: Browser) -> None:
    more = service.scope()
    app, somebody = web_app(service, scope="openid"), person(service, scope=more)
    made = flow(service, app, scope=None)
    page = browser.sign_in(browser.get(made.url), somebody)
    assert more not in page.text
    service.done("PATCH", f"/v1/clients/{app.client_id}", json={"scope": f"openid {more}"})
    page = browser.consent(page)
    assert page.title.startswith(CONSENT_ASKED)
    assert more in page.text
    assert "code" in browser.consent(page).answer


def test_app_of_the_device_is_asked_for_every_time(
    service: Service, somebody: dict[str, Any], browser: Browser
) -> None:
    """RFC 8252 §8.6: whoever asks, nobody knows that it is the same program as the last time."""
    app = web_app(service, token_endpoint_auth_method="none", redirect_uris=["http://127.0.0.1/cb"])
    for port in (49_152, 49_153):
        made = flow(service, app, redirect_uri=f"http://127.0.0.1:{port}/cb")
        page = browser.get(made.url)
        page = browser.sign_in(page, somebody) if "password" in page.form.fields else page
        assert page.title.startswith(CONSENT_ASKED)
        assert redeem(service, made, browser.consent(page).answer["code"]).status_code == 200
    silent = flow(service, app, redirect_uri="http://127.0.0.1:1/cb", prompt="none")
    assert error_of(browser.get(silent.url)) == "consent_required"


def test_person_who_was_disabled_is_signed_out(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    made: Flow = flow(service, app)
    assert "code" in browser.visit(made.url, somebody).answer
    service.done("DELETE", f"/v1/users/{somebody['user_id']}")
    assert browser.get(flow(service, app).url).title.startswith(PASSWORD_ASKED)
    assert error_of(browser.get(flow(service, app, prompt="none").url)) == "login_required"


@pytest.mark.parametrize(
    "path", ["/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"], ids=["openid", "oauth"]
)
def test_metadata_lists_what_works(service: Service, path: str) -> None:
    metadata = service.http.get(path).json()
    assert metadata["issuer"] == service.issuer
    for name, url in metadata.items():
        if name.endswith(("_endpoint", "_uri")):
            assert service.http.request("OPTIONS", url).status_code in {200, 204, 405}, name
    assert metadata["response_types_supported"] == ["code", "code id_token"]
    assert metadata["response_modes_supported"] == ["query", "fragment", "form_post"]
    assert metadata["code_challenge_methods_supported"] == ["S256"]
    assert metadata["authorization_response_iss_parameter_supported"] is True
    assert metadata["request_uri_parameter_supported"] is False
    assert set(metadata["id_token_signing_alg_values_supported"]) == {"RS256", "ES256", "EdDSA"}
    assert {"openid", "profile", "email", "offline_access"} <= set(metadata["scopes_supported"])
    scope = service.scope()
    until(lambda: scope in service.http.get(path).json()["scopes_supported"], what="a new scope is listed")
