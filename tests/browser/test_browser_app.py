"""An app that runs in the browser, on a page of another origin: that of the README, to the letter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from service.outgoing import Response
from tests.browser.conftest import NewPage
from tests.browser.serving import serving
from tests.browser.test_flow import HTML, allow, sign_in
from tests.people import person, web_app
from tests.running import App, Service, unique

README = Path(__file__).parents[2] / "README.md"
# What a page of another origin reads, or the error that its browser gives it.
FETCH = """async ([url, options]) => {
    try { const answer = await fetch(url, options); return [answer.status, await answer.text()] }
    catch (error) { return error.name }
}"""
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture
def readme_app(service: Service) -> Iterator[tuple[App, str, str]]:
    """The app, the address of its page, and a scope that it asks for."""
    page = re.findall(r"```html\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(page) == 1
    served: dict[str, str] = {}

    def answer(_: str, path: str, __: str) -> Response:
        found = served.get(path.partition("?")[0])
        return Response(404 if found is None else 200, (found or "").encode(), HTML)

    scope = service.scope(unique("orders").replace("-", ":"), description="Read your orders")
    with serving(answer) as origin:
        address = origin.replace("127.0.0.1", "localhost") + "/app.html"
        app = web_app(
            service,
            token_endpoint_auth_method="none",
            redirect_uris=[address],
            scope=f"openid profile offline_access {scope}",
        )
        changes = {'"CLIENT_ID"': f'"{app.client_id}"', "http://127.0.0.1:8080": service.issuer, "orders:read": scope}
        served["/app.html"] = page[0]
        for old, new in changes.items():
            assert served["/app.html"].count(old) == 1, old
            served["/app.html"] = served["/app.html"].replace(old, new)
        served["/elsewhere.html"] = "<!doctype html><title>Elsewhere</title>"
        yield app, address, scope


@pytest.fixture
def ada(service: Service, readme_app: tuple[App, str, str]) -> dict[str, Any]:
    return person(service, scope=readme_app[2], display_name="Ada Adams")


def signed_in(page: Page, address: str, scope: str, who: dict[str, Any]) -> None:
    page.goto(address)
    sign_in(page, who)
    allow(page)
    expect(page.locator("pre")).to_have_text(f"openid profile {scope} for Ada Adams")


def test_page_of_another_origin_gets_tokens_by_code_and_verifier(
    readme_app: tuple[App, str, str], new_page: NewPage, ada: dict[str, Any]
) -> None:
    _, address, scope = readme_app
    page = new_page()
    answers: dict[str, int] = {}
    page.on("response", lambda answer: answers.update({answer.url.partition("?")[0]: answer.status}))
    signed_in(page, address, scope, ada)
    assert page.url == address  # the code is in no history
    asked = {url.rpartition("/")[2]: status for url, status in answers.items() if not url.startswith(address)}
    assert {"openid-configuration": 200, "token": 200, "userinfo": 200}.items() <= asked.items()


def test_page_of_another_origin_says_that_a_person_refused_and_can_ask_again(
    readme_app: tuple[App, str, str], new_page: NewPage, ada: dict[str, Any]
) -> None:
    _, address, scope = readme_app
    page = new_page()
    page.goto(address)
    sign_in(page, ada)
    page.get_by_role("button", name="Deny").click()
    expect(page.locator("pre")).to_have_text(re.compile(r"^Not signed in: .+\. Reload the page to try again\.$"))
    page.reload()
    allow(page)
    expect(page.locator("pre")).to_have_text(f"openid profile {scope} for Ada Adams")


def test_page_of_another_origin_reads_its_errors_and_revokes_its_token(
    service: Service, readme_app: tuple[App, str, str], new_page: NewPage, ada: dict[str, Any]
) -> None:
    app, address, scope = readme_app
    page = new_page()
    with page.expect_response(f"{service.issuer}/oauth2/token") as answered:
        signed_in(page, address, scope, ada)
    token = answered.value.json()["access_token"]
    form = {"method": "POST", "headers": FORM, "body": f"client_id={app.client_id}&grant_type=refresh_token"}
    status, body = page.evaluate(FETCH, [f"{service.issuer}/oauth2/token", form])
    assert (status, "invalid_request" in body) == (400, True)
    assert service.code(token) == "valid"
    form["body"] = f"client_id={app.client_id}&token={token}"
    assert page.evaluate(FETCH, [f"{service.issuer}/oauth2/revoke", form]) == [200, ""]
    assert service.code(token) == "revoked"
    assert page.evaluate(FETCH, [f"{service.issuer}/oauth2/jwks", {}])[0] == 200


def test_page_of_another_origin_reads_no_page_of_ours_and_nothing_by_a_cookie(
    service: Service, readme_app: tuple[App, str, str], chromium: Browser, ada: dict[str, Any]
) -> None:
    """Chromium refuses, since nothing allows it, and says so on the console; so no `new_page`."""
    _, address, scope = readme_app
    context = chromium.new_context()
    context.set_default_timeout(60_000)
    page = context.new_page()
    signed_in(page, address, scope, ada)
    page.goto(address.replace("app.html", "elsewhere.html"))
    bearer = {"headers": {"Authorization": f"Bearer {service.admin_token}"}}
    refused = {
        f"{credentials} {path}": page.evaluate(FETCH, [service.issuer + path, {"credentials": credentials, **more}])
        for credentials in ("include", "omit")
        for path, more in {
            "/account": {},
            "/sign-in": {},
            "/oauth2/authorize?client_id=x": {},
            "/v1/clients": bearer,
            "/oauth2/introspect": {"method": "POST", "headers": FORM, "body": "token=x"},
        }.items()
    }
    keys = f"{service.issuer}/oauth2/jwks"
    refused["keys with cookies"] = page.evaluate(FETCH, [keys, {"credentials": "include"}])
    context.close()
    assert {name: got for name, got in refused.items() if got != "TypeError"} == {}
