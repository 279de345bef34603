"""What pages of other origins may read of the service, over every door it has. Source: Fetch §3.2, RFC 9700 §2.6."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from tests.running import Service

ORIGIN = {"Origin": "https://app.example"}
CORS = "access-control-"
# Doors where no cookie counts: what browser apps ask.
FOR_APPS = {
    "/.well-known/oauth-authorization-server": "GET",
    "/.well-known/openid-configuration": "GET",
    "/oauth2/jwks": "GET",
    "/oauth2/par": "POST",
    "/oauth2/revoke": "POST",
    "/oauth2/token": "POST",
    "/oauth2/userinfo": "GET, POST",
}


def cors_of(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith(CORS)}


def preflight(service: Service, path: str, method: str) -> httpx.Response:
    headers = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "authorization"}
    return service.http.options(path, headers=ORIGIN | headers)


def test_only_what_browser_apps_ask_can_be_read_by_pages_of_other_origins(service: Service) -> None:
    doors: dict[str, Any] = service.http.get("/schema/openapi.json").json()["paths"]
    assert {"/sign-in", "/oauth2/authorize", "/account", "/v1/clients", "/v1/tokens/validate"} <= doors.keys()
    read, asked = set(), set()
    for path, operations in doors.items():
        url = re.sub(r"\{[^}]+\}", "x", path)
        for method in operations:
            if cors_of(service.http.request(method.upper(), url, headers=ORIGIN)):
                read.add(path)
            if cors_of(preflight(service, url, method.upper())):
                asked.add(path)
    assert read == FOR_APPS.keys()
    assert asked == FOR_APPS.keys()


@pytest.mark.parametrize("path", FOR_APPS)
def test_preflight_allows_what_apps_send_and_no_credentials(service: Service, path: str) -> None:
    answer = preflight(service, path, FOR_APPS[path].split(", ")[-1])
    assert answer.status_code == 204
    assert cors_of(answer) == {
        "access-control-allow-origin": "*",
        "access-control-allow-methods": FOR_APPS[path],
        "access-control-allow-headers": "authorization, content-type",
        "access-control-expose-headers": "www-authenticate, retry-after, x-request-id",
        "access-control-max-age": "600",
    }


READABLE = {
    "access-control-allow-origin": "*",
    "access-control-expose-headers": "www-authenticate, retry-after, x-request-id",
}


@pytest.mark.parametrize(
    ("path", "form", "error"),
    [
        pytest.param("/oauth2/token", {"grant_type": "authorization_code"}, "invalid_client", id="token"),
        pytest.param("/oauth2/token", {}, "invalid_request", id="token-empty"),
        pytest.param("/oauth2/revoke", {"token": "x"}, "invalid_client", id="revoke"),
        pytest.param("/oauth2/par", {"client_id": "x"}, "invalid_client", id="push"),
        pytest.param("/oauth2/userinfo", {"access_token": "x"}, "invalid_token", id="userinfo"),
    ],
)
def test_error_can_be_read_by_the_app_that_caused_it(
    service: Service, path: str, form: dict[str, str], error: str
) -> None:
    answer = service.http.post(path, data=form, headers=ORIGIN)
    assert (answer.json()["error"], cors_of(answer)) == (error, READABLE)


@pytest.mark.parametrize("path", FOR_APPS)
def test_a_method_that_a_door_has_not_is_refused_readably(service: Service, path: str) -> None:
    answer = service.http.delete(path, headers=ORIGIN)
    assert (answer.status_code, cors_of(answer)) == (405, READABLE)
    assert answer.headers["allow"] == f"{FOR_APPS[path]}, OPTIONS"
