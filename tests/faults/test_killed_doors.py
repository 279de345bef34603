"""A worker is killed between what it recorded and its answer, at each door where people and their clients come in.

Whoever sends the same again goes on: nobody is signed out by it, nobody gets two chains that live, and what was to end
ends.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.codes import outlast_the_race
from tests.e2e.test_sign_in import sessions
from tests.faults.dying import dying
from tests.pages.test_account import filled, form
from tests.people import Browser, Flow, Page, flow, person, redeem, web_app
from tests.running import App, Service, oauth_error, until

COMPLETED_SECONDS_MAX = 90.0


@pytest.fixture(scope="module")
def app(service: Service) -> App:
    return web_app(service)


@pytest.fixture
def somebody(service: Service) -> dict[str, Any]:
    return person(service, scope=service.scope())


@pytest.fixture
def browser(service: Service) -> Browser:
    return Browser(service)


def granted(service: Service, app: App, browser: Browser, who: dict[str, Any], scope: str) -> dict[str, Any]:
    """The tokens that the app gets from who is signed in there, or signs in."""
    made = flow(service, app, scope=scope)
    tokens: dict[str, Any] = redeemed(service, made, browser.visit(made.url, who)).json()
    return tokens


def redeemed(service: Service, made: Flow, page: Page) -> httpx.Response:
    answer = redeem(service, made, page.answer["code"])
    assert answer.status_code == 200, answer.text
    return answer


def live(service: Service, who: dict[str, Any]) -> list[str]:
    """The kinds of the tokens of a person that are good, those of one grant."""
    found = list(service.items("/v1/tokens", subject=who["user_id"], status="active"))
    assert len({one["grant_id"] for one in found}) <= 1
    return sorted(one["kind"] for one in found)


def is_signed_in(browser: Browser) -> bool:
    return browser.get("/account").title.startswith("Your account")


def signed_in(service: Service, who: dict[str, Any]) -> Browser:
    browser = Browser(service)
    browser.sign_in(browser.get("/sign-in"), who)
    assert is_signed_in(browser)
    return browser


# Signing in and out


def test_sign_in_is_done_by_sending_the_form_again_and_other_devices_go_on(
    service: Service, somebody: dict[str, Any], browser: Browser
) -> None:
    other = signed_in(service, somebody)
    page = browser.get("/sign-in")
    with dying(browser.http, service, "SessionStarted"):
        browser.sign_in(page, somebody)
    assert not is_signed_in(browser)
    assert is_signed_in(other)
    browser.sign_in(page, somebody)
    assert is_signed_in(browser)
    assert is_signed_in(other)


def test_sign_out_is_done_though_nobody_was_told_and_other_devices_go_on(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    here = granted(service, app, browser, somebody, "openid")
    lasting = granted(service, app, browser, somebody, "openid offline_access")
    other = signed_in(service, somebody)
    there = granted(service, app, other, somebody, "openid")
    page = browser.get("/sign-out")
    with dying(browser.http, service, "SessionEnded"):
        browser.submit(page)
    until(lambda: not is_signed_in(browser), what="the other workers know it")
    assert browser.submit(page).status == 200
    until(
        lambda: service.code(here["access_token"]) == "revoked",
        seconds=COMPLETED_SECONDS_MAX,
        what="another worker has ended what was granted in the session",
    )
    assert [service.code(one["access_token"]) for one in (lasting, there)] == ["valid", "valid"]
    assert is_signed_in(other)
    assert service.refresh(app, lasting["refresh_token"]).status_code == 200


def test_sign_out_everywhere_is_done_by_sending_it_again(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    """This browser is signed out last, so that it can ask again."""
    other = signed_in(service, somebody)
    there = granted(service, app, other, somebody, "openid")
    here = granted(service, app, browser, somebody, "openid")
    page = browser.get("/account")
    with dying(browser.http, service, "SessionEnded"):
        browser.submit(page, form(page, "/account/sign-out-everywhere"))
    assert not is_signed_in(other)
    assert is_signed_in(browser)
    browser.submit(page, form(page, "/account/sign-out-everywhere"))
    assert not is_signed_in(browser)
    assert sessions(service, somebody) == []
    assert [service.code(one["access_token"]) for one in (here, there)] == ["revoked", "revoked"]


# What apps get


@pytest.mark.parametrize("event", ["ConsentGiven", "AuthorizationGranted"])
def test_consent_is_given_by_sending_the_form_again_and_one_chain_lives(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser, event: str
) -> None:
    made = flow(service, app, scope="openid offline_access")
    page = browser.sign_in(browser.get(made.url), somebody)
    with dying(browser.http, service, event):
        browser.consent(page)
    assert is_signed_in(browser)
    redeemed(service, made, browser.consent(page))
    assert live(service, somebody) == ["access", "refresh"]


def test_code_that_was_spent_without_an_answer_leaves_one_chain_at_most(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    """Nobody has what it gave, and the app asks the person's browser again, which asks the person nothing."""
    made = flow(service, app, scope="openid offline_access")
    code = browser.visit(made.url, somebody).answer["code"]
    with dying(service.http, service, "CodeRedeemed"):
        redeem(service, made, code)
    outlast_the_race()
    oauth_error(redeem(service, made, code), 400, "invalid_grant")
    assert live(service, somebody) == []
    assert is_signed_in(browser)
    again = flow(service, app, scope="openid offline_access")
    redeemed(service, again, browser.get(again.url))
    assert live(service, somebody) == ["access", "refresh"]


@pytest.mark.parametrize("rotates", [True, False], ids=["rotated", "kept"])
def test_refresh_is_answered_again_and_one_chain_lives(
    service: Service, somebody: dict[str, Any], browser: Browser, rotates: bool
) -> None:
    app = web_app(service, refresh_token_rotation=rotates)
    first = granted(service, app, browser, somebody, "openid offline_access")["refresh_token"]
    with dying(service.http, service, "TokenRefreshed" if rotates else "AccessRenewed"):
        service.refresh(app, first)
    second = service.refresh(app, first)
    assert second.status_code == 200, second.text
    assert service.code(second.json()["access_token"]) == "valid"
    successor = second.json().get("refresh_token", first)
    assert (successor != first) == rotates
    assert live(service, somebody).count("refresh") == 1
    with dying(service.http, service, "TokenRefreshed" if rotates else "AccessRenewed"):
        service.refresh(app, successor)
    assert service.refresh(app, successor).status_code == 200
    assert live(service, somebody).count("refresh") == 1


def test_withdrawal_is_done_though_nobody_was_told(
    service: Service, app: App, somebody: dict[str, Any], browser: Browser
) -> None:
    tokens = granted(service, app, browser, somebody, "openid offline_access")
    page = browser.get("/account")
    with dying(browser.http, service, "ConsentWithdrawn"):
        browser.submit(page, form(page, "/account/apps/withdraw", client_id=app.client_id))
    assert is_signed_in(browser)
    oauth_error(service.refresh(app, tokens["refresh_token"]), 400, "invalid_grant")
    until(lambda: live(service, somebody) == [], seconds=COMPLETED_SECONDS_MAX, what="another worker has completed it")


# Personal access tokens


def test_personal_token_is_shown_by_sending_the_form_again_and_there_is_one(
    service: Service, somebody: dict[str, Any]
) -> None:
    browser = signed_in(service, somebody)
    page = browser.get("/account")
    wanted, fields = filled(page, somebody["scope"], name="backup")
    with dying(browser.http, service, "TokenIssued"):
        browser.submit(page, wanted, **fields)
    shown = browser.submit(page, wanted, **fields)
    assert "tl_pat_" in shown.text
    assert live(service, somebody) == ["pat"]
