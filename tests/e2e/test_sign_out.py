"""What ends when a person signs out, withdraws a consent or is cut off: sessions, codes and tokens."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest

from tests.people import Browser, Flow, flow, person, redeem, web_app
from tests.running import App, Service

SIGNED_OUT = "https://app.example/signed-out"


def app_of(service: Service) -> App:
    return web_app(service, post_logout_redirect_uris=[SIGNED_OUT])


class Signed:
    """A person in their browser, with an app."""

    def __init__(self, service: Service, app: App | None = None) -> None:
        self.service = service
        self.app = app or app_of(service)
        self.account = person(service, display_name="cnryname-one")
        self.browser = Browser(service)

    def coded(self, scope: str = "openid") -> tuple[Flow, str]:
        made = flow(self.service, self.app, scope=scope)
        return made, self.browser.visit(made.url, self.account).answer["code"]

    def tokens(self, scope: str = "openid") -> dict[str, Any]:
        made, code = self.coded(scope)
        answer = redeem(self.service, made, code)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def sign_out(self) -> None:
        page = self.browser.submit(self.browser.get("/sign-out"))
        assert page.title.startswith("Signed out")


def code_of(service: Service, tokens: dict[str, Any]) -> str:
    return service.code(tokens["access_token"])


def test_signing_out_ends_what_is_used_in_the_session_and_leaves_what_lasts(service: Service) -> None:
    one = Signed(service)
    passing, lasting = one.tokens(), one.tokens("openid offline_access")
    made, code = one.coded()
    one.sign_out()
    assert (code_of(service, passing), code_of(service, lasting)) == ("revoked", "valid")
    assert service.refresh(one.app, lasting["refresh_token"]).status_code == 200
    assert redeem(service, made, code).json()["error"] == "invalid_grant"
    page = one.browser.get(flow(service, one.app).url)
    assert page.title.startswith("Sign in")


def test_signing_in_anew_leaves_what_was_granted_before(service: Service) -> None:
    one = Signed(service)
    before = one.tokens()
    made = flow(service, one.app, prompt="login")
    page = one.browser.get(made.url)
    assert page.title.startswith("Sign in")
    page = one.browser.sign_in(page, one.account)
    assert "code" in page.answer
    assert code_of(service, before) == "valid"


def test_withdrawn_consent_ends_every_token_of_the_app_and_is_asked_for_again(service: Service) -> None:
    one, other = Signed(service), app_of(service)
    tokens = [one.tokens(), one.tokens("openid offline_access")]
    made, code = one.coded()
    elsewhere = flow(service, other)
    kept = redeem(service, elsewhere, one.browser.visit(elsewhere.url, one.account).answer["code"]).json()
    path, query = f"/v1/users/{one.account['user_id']}/consents", {"client_id": one.app.client_id}
    listed = {item["client_id"]: item for item in service.done("GET", path)["items"]}
    assert listed[one.app.client_id]["scope"] == "openid offline_access"
    done = service.done("DELETE", path, params=query)
    assert done["grants"] == 3
    assert [code_of(service, one_of) for one_of in tokens] == ["revoked", "revoked"]
    assert service.refresh(one.app, tokens[1]["refresh_token"]).json()["error"] == "invalid_grant"
    assert redeem(service, made, code).json()["error"] == "invalid_grant"
    assert code_of(service, kept) == "valid"
    assert service.done("DELETE", path, params=query) == {"grants": 0, "ledger_seq": done["ledger_seq"]}
    page = one.browser.get(flow(service, one.app).url)
    assert page.title.startswith("Allow")


def test_app_signs_its_person_out(service: Service) -> None:
    one = Signed(service)
    tokens = one.tokens()
    wanted = {"id_token_hint": tokens["id_token"], "post_logout_redirect_uri": SIGNED_OUT, "state": "s t"}
    page = one.browser.get(f"/oauth2/logout?{urlencode(wanted)}")
    assert page.left is not None
    assert page.left.startswith(SIGNED_OUT + "?")
    assert parse_qsl(urlsplit(page.left).query) == [("state", "s t")]
    assert code_of(service, tokens) == "revoked"
    assert one.browser.get("/sign-in").title.startswith("Sign in")


def test_app_that_posts_signs_its_person_out_too(service: Service) -> None:
    one = Signed(service)
    tokens = one.tokens()
    answer = service.http.post("/oauth2/logout", data={"id_token_hint": tokens["id_token"]}, follow_redirects=False)
    assert answer.status_code == 303
    assert one.browser.get(answer.headers["location"]).title.startswith("Signed out")
    assert code_of(service, tokens) == "revoked"


@pytest.mark.parametrize(
    "wanted",
    [{"post_logout_redirect_uri": "https://evil.example/"}, {"post_logout_redirect_uri": SIGNED_OUT + "/"}],
    ids=["another site", "nearly it"],
)
def test_page_says_that_an_address_is_not_registered_and_leads_nowhere(service: Service, wanted: Any) -> None:
    one = Signed(service)
    tokens = one.tokens()
    page = one.browser.get(f"/oauth2/logout?{urlencode(wanted | {'id_token_hint': tokens['id_token']})}")
    assert (page.status, page.left) == (400, None)
    assert "evil.example" not in page.text
    assert code_of(service, tokens) == "valid"


def test_form_of_another_site_is_refused_with_a_page(service: Service) -> None:
    """Rows 92 and 94: what comes from elsewhere changes nothing, and says so to the person."""
    one = Signed(service)
    one.tokens()
    page = one.browser.get("/sign-out")
    headers = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    answer = one.browser.http.post("/sign-out", data=page.form.fields, headers=headers)
    assert answer.status_code == 403
    assert answer.headers["content-type"].startswith("text/html")
    assert one.browser.get("/sign-in").url.endswith("/account")


def test_userinfo_tells_what_the_scope_says(service: Service) -> None:
    one = Signed(service)
    tokens = one.tokens("openid profile")
    answer = service.http.get("/oauth2/userinfo", headers={"Authorization": f"Bearer {tokens['access_token']}"})
    assert answer.json() == {
        "sub": one.account["user_id"],
        "name": "cnryname-one",
        "preferred_username": one.account["username"],
    }


def test_changed_password_ends_sessions_codes_and_tokens(service: Service) -> None:
    one = Signed(service)
    tokens = one.tokens("openid offline_access")
    made, code = one.coded()
    service.done("PATCH", f"/v1/users/{one.account['user_id']}", json={"password": "cnrypass-of-another-day"})
    assert code_of(service, tokens) == "revoked"
    assert redeem(service, made, code).json()["error"] == "invalid_grant"
    assert one.browser.get(made.url).title.startswith("Sign in")
