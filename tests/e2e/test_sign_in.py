"""Signing in and out of a running service, with two workers, over HTTP as browsers speak it."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from tests.running import CANARY_PASSWORD, Service, unique, until

HIDDEN = re.compile(r'<input type="hidden" name="([^"]*)" value="([^"]*)"')


class Browser:
    """Keeps cookies; each request goes over a connection of its own, so that either worker may answer."""

    def __init__(self, service: Service, *, source: str | None = None) -> None:
        self.service = service
        self.source = source
        self.cookies = httpx.Cookies()

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"Sec-Fetch-Site": "same-origin", "Connection": "close"} | more.pop("headers", {})
        if method == "POST":
            headers = {"Origin": self.service.issuer} | headers
        with self.service.caller(source=self.source) as http:
            http.cookies = self.cookies
            answer = http.request(method, path, headers=headers, follow_redirects=False, **more)
            self.cookies = http.cookies
        return answer

    def sign_in(self, person: dict[str, Any], **more: Any) -> httpx.Response:
        hidden = dict(HIDDEN.findall(self.ask("GET", "/sign-in").text))
        data = hidden | {"username": person["username"], "password": person["password"]}
        return self.ask("POST", "/sign-in", data=data, **more)

    def sign_out(self) -> httpx.Response:
        return self.ask("POST", "/sign-out", data=dict(HIDDEN.findall(self.ask("GET", "/sign-out").text)))

    def is_signed_in(self) -> bool:
        return self.ask("GET", "/sign-in").status_code == 303


def person(service: Service) -> dict[str, Any]:
    return service.user(password=unique(CANARY_PASSWORD))


def sessions(service: Service, user: dict[str, Any]) -> list[str]:
    found = service.done("GET", f"/v1/users/{user['user_id']}/sessions")["items"]
    return [one["session_id"] for one in found]


def test_person_signs_in_and_out_whichever_worker_answers(service: Service) -> None:
    user, browser = person(service), Browser(service)
    assert not browser.is_signed_in()
    answer = browser.sign_in(user)
    assert (answer.status_code, answer.headers["location"]) == (303, "/account")
    assert "httponly" in answer.headers["set-cookie"].lower()
    assert [browser.is_signed_in() for _ in range(8)] == [True] * 8
    assert len(sessions(service, user)) == 1
    assert browser.sign_out().status_code == 200
    assert [browser.is_signed_in() for _ in range(8)] == [False] * 8
    assert sessions(service, user) == []


def test_changed_password_ends_sessions_at_once(service: Service) -> None:
    user, browsers = person(service), [Browser(service) for _ in range(2)]
    for browser in browsers:
        browser.sign_in(user)
    assert len(sessions(service, user)) == 2
    new = unique(CANARY_PASSWORD)
    service.done("PATCH", f"/v1/users/{user['user_id']}", json={"password": new})
    assert [browser.is_signed_in() for browser in browsers] == [False, False]
    assert browsers[0].sign_in(user).status_code == 400
    assert browsers[0].sign_in(user | {"password": new}).status_code == 303


def test_disabled_user_is_signed_out(service: Service) -> None:
    user, browser = person(service), Browser(service)
    browser.sign_in(user)
    service.done("DELETE", f"/v1/users/{user['user_id']}")
    assert not browser.is_signed_in()
    assert browser.sign_in(user).status_code == 400


def test_administrator_signs_a_user_out_of_one_browser_or_all(service: Service) -> None:
    user, browsers = person(service), [Browser(service) for _ in range(3)]
    for browser in browsers:
        browser.sign_in(user)
    path, first = f"/v1/users/{user['user_id']}/sessions", sessions(service, user)[0]
    done = service.done("DELETE", path, params={"session_id": first})
    assert done["ended"] == 1
    assert [browser.is_signed_in() for browser in browsers] == [False, True, True]
    assert service.done("DELETE", path, params={"session_id": first}) == {"ended": 0, "ledger_seq": done["ledger_seq"]}
    assert service.done("DELETE", path)["ended"] == 2
    assert [browser.is_signed_in() for browser in browsers] == [False] * 3
    assert service.done("DELETE", path) == {"ended": 0}
    other = person(service)
    Browser(service).sign_in(other)
    theirs = sessions(service, other)[0]
    assert service.call("DELETE", path, params={"session_id": theirs}).status_code == 404
    assert service.call("GET", "/v1/users/usr_x/sessions").status_code == 404
    assert service.call("GET", path, token=service.bearer("ledger:audit")).status_code == 403


def test_sessions_are_listed_page_by_page(service: Service) -> None:
    user = person(service)
    for _ in range(3):
        Browser(service).sign_in(user)
    path = f"/v1/users/{user['user_id']}/sessions"
    pages = [one["session_id"] for one in service.items(path, limit=2)]
    assert pages == sessions(service, user)
    assert len(pages) == 3


def test_consents_of_a_user_are_told(service: Service) -> None:
    user, app = person(service), service.app()
    path = f"/v1/users/{user['user_id']}/consents"
    assert service.done("GET", path) == {"items": []}
    assert service.call("DELETE", path, params={"client_id": app.client_id}).status_code == 404
    assert service.call("DELETE", path).status_code == 400


def test_failures_can_be_counted_by_auditors(service: Service) -> None:
    user, browser = person(service), Browser(service, source="127.0.0.91")
    for _ in range(3):
        assert browser.sign_in(user | {"password": "cnrypass-wrong"}).status_code == 400

    def counted() -> bool:
        found = service.done(
            "GET", "/v1/audit/usage", params={"outcome": "invalid_password", "endpoint": "sign-in", "ip": "127.0.0.91"}
        )
        return found["totals"]["uses"] == 3

    until(counted, what="three refusals at the sign-in door")


def test_events_say_who_signed_in_and_out_and_nothing_personal(service: Service) -> None:
    user, browser = person(service), Browser(service)
    browser.sign_in(user)
    browser.sign_out()

    def found() -> list[dict[str, Any]]:
        events = list(service.items("/v1/audit/events", subject=user["user_id"]))
        return [one for one in events if one["type"].startswith("session.")] if len(events) >= 4 else []

    started, ended = until(found)
    assert [started["type"], ended["type"]] == ["session.started", "session.ended"]
    assert started["by"] == user["user_id"]
    assert ended["by"] == ended["body"]["session_id"] == started["body"]["session_id"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_userinfo_without_a_token_says_how_to_ask(service: Service, method: str) -> None:
    answer = service.http.request(method, "/oauth2/userinfo")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.headers["access-control-allow-origin"] == "*"
    assert service.http.options("/oauth2/userinfo").status_code == 204
    assert service.http.delete("/oauth2/userinfo").status_code == 405
