"""What a person sees at an address where nothing is, and how they go on from where they cannot."""

from __future__ import annotations

import pytest

from tests.people import Browser, person
from tests.running import Service

AS_BROWSERS_ASK = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
NOWHERE = ["//", "//sign-in", "/%ff", "/no/such/page", "/favicon.png", "/oauth2/no-such-door"]


@pytest.mark.parametrize("path", NOWHERE)
def test_an_address_where_nothing_is_is_a_page_for_a_browser(service: Service, path: str) -> None:
    browser = Browser(service)
    browser.http.headers["accept"] = AS_BROWSERS_ASK
    page = browser.get(f"{service.url}{path}")
    assert page.status == 404
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["vary"] == "accept"
    assert page.title.startswith("Not found")
    assert "There is nothing at this address." in page.text
    assert "/account" in page.links
    assert page.headers["x-request-id"] in page.text


@pytest.mark.parametrize(
    "accept",
    [
        "*/*",
        "application/json",
        "text/plain",
        "application/json, text/html;q=0.1",
        "text/html;q=0",
        "text/html; Q=0.8, application/problem+json; q=0.9",
        "text/html;q=0.5, application/*;q=0.6",
        "text/html;q=high",
        "text/html, */*",
        None,
    ],
)
@pytest.mark.parametrize("path", NOWHERE)
def test_the_same_is_json_for_a_program(service: Service, path: str, accept: str | None) -> None:
    answer = service.http.get(f"{service.url}{path}", headers={"accept": accept} if accept is not None else {})
    assert answer.status_code == 404
    assert answer.headers["content-type"] in {"application/problem+json", "application/json"}
    assert answer.headers["vary"] == "accept"
    assert answer.json()


@pytest.mark.parametrize("accept", ["text/html", "Text/HTML;q=0.2", "application/json;q=0.1, text/html;level=1;q=0.5"])
def test_the_weights_of_a_request_say_that_a_page_is_preferred(service: Service, accept: str) -> None:
    answer = service.http.get("/no/such/page", headers={"accept": accept})
    assert (answer.status_code, answer.headers["content-type"]) == (404, "text/html; charset=utf-8")


def test_the_address_that_a_start_prints_leads_to_the_account_page(service: Service) -> None:
    browser = Browser(service)
    answer = browser.get(f"{service.url}/")
    assert (answer.status, answer.title.partition(" ")[0]) == (200, "Sign")
    assert service.http.get("/").headers["location"] == "/account"


def test_the_management_api_answers_no_pages(service: Service) -> None:
    answer = service.http.get("/v1/users/no/such", headers={"accept": "text/html"})
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    assert "vary" not in answer.headers


def test_a_program_that_is_refused_gets_json_although_it_takes_pages(service: Service) -> None:
    answer = service.http.get("/v1/users", headers={"accept": AS_BROWSERS_ASK})
    assert answer.headers["content-type"] == "application/problem+json"


def test_browsers_find_the_icon_without_being_told(service: Service) -> None:
    answer = service.http.get("/favicon.ico", headers={"accept": "image/avif,image/webp,*/*;q=0.8"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")
    assert answer.content.startswith(b"<svg")
    assert answer.headers["cache-control"] == "public, max-age=86400"


@pytest.mark.parametrize(
    ("door", "way"),
    [
        ("/sign-in", "/sign-in"),
        ("/sign-out", "/sign-out"),
        ("/oauth2/consent", "/account"),
        ("/account/tokens", "/account"),
    ],
)
def test_whose_cookies_are_gone_is_led_to_where_one_begins_again(service: Service, door: str, way: str) -> None:
    browser, somebody = Browser(service), person(service)
    shown = browser.get("/sign-in")
    if door != "/sign-in":
        browser.sign_in(shown, somebody)
        browser.http.cookies = {name: value for name, value in browser.http.cookies.items() if "_browser_" not in name}
    else:
        browser.http.cookies.clear()
    refused = browser.submit(shown, type(shown.form)(door, "post", dict(shown.form.fields)))
    assert refused.status == 403
    assert "Allow cookies for this site" in refused.text
    assert way in refused.links
    again = browser.get(way)
    assert again.status == 200
    if door == "/sign-in":
        assert browser.sign_in(again, somebody).title.startswith("Your account")
