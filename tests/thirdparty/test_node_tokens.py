"""openid-client and oauth4webapi, unmodified and strict, where no person takes part."""

from __future__ import annotations

from typing import Any

import pytest

from tests.nodejs import NodeClient
from tests.running import App, Service

OAUTH2 = {"algorithm": "oauth2"}  # discovery by RFC 8414, not by OpenID Connect
CONFIDENTIAL = ["client_secret_basic", "client_secret_post"]
BOTH_FORMS = pytest.mark.parametrize("form", ["jwt", "opaque"])


@pytest.fixture(scope="module")
def scope(service: Service) -> str:
    return service.scope()


def app_of(service: Service, scope: str, **metadata: Any) -> App:
    return service.app(grant_types=["client_credentials", "refresh_token"], scope=scope, **metadata)


def test_client_discovers_the_server(client: NodeClient, service: Service, scope: str) -> None:
    """RFC 8414 §3.3: the issuer is the one that was asked for, to the letter."""
    found = client.run("metadata", service, app_of(service, scope), **OAUTH2)
    assert found["issuer"] == service.issuer
    assert found["token_endpoint"] == f"{service.issuer}/oauth2/token"


@pytest.mark.parametrize("method", CONFIDENTIAL)
@BOTH_FORMS
def test_client_gets_refreshes_introspects_and_revokes(
    client: NodeClient, service: Service, scope: str, form: str, method: str
) -> None:
    app = app_of(service, scope, access_token_format=form, token_endpoint_auth_method=method)
    first = client.run("clientCredentials", service, app, request={"scope": scope}, **OAUTH2)
    assert first["token_type"] == "bearer"  # both libraries fold the case, which RFC 6749 §5.1 leaves open
    assert first["scope"] == scope
    second = client.run("refresh", service, app, refresh_token=first["refresh_token"], **OAUTH2)
    assert second["refresh_token"] != first["refresh_token"]
    seen = client.run("introspect", service, app, token=second["access_token"], **OAUTH2)
    assert (seen["active"], seen["client_id"], seen["scope"]) == (True, app.client_id, scope)
    client.run("revoke", service, app, token=second["refresh_token"], **OAUTH2)
    for token in (first["access_token"], second["access_token"], second["refresh_token"]):
        assert client.run("introspect", service, app, token=token, **OAUTH2) == {"active": False}


def test_lost_answer_of_a_refresh_is_given_again(client: NodeClient, service: Service, scope: str) -> None:
    """To the library it is a refresh like any other; the answer is that of the first."""
    app = app_of(service, scope)
    first = client.run("clientCredentials", service, app, **OAUTH2)
    lost, again = (client.run("refresh", service, app, refresh_token=first["refresh_token"], **OAUTH2) for _ in "12")
    assert again["refresh_token"] == lost["refresh_token"]
    assert service.code(again["access_token"]) == "valid"


def test_narrowed_scope_and_audience_hold(client: NodeClient, service: Service, scope: str) -> None:
    """RFC 6749 §6, RFC 8707 §2."""
    one, two = "https://one.example", "https://two.example"
    app = app_of(service, f"{scope} {service.scope()}", audience=[one, two])
    whole = client.run("clientCredentials", service, app, **OAUTH2)
    less = {"scope": scope, "resource": two}
    narrow = client.run("refresh", service, app, refresh_token=whole["refresh_token"], request=less, **OAUTH2)
    known = service.validate(narrow["access_token"])
    assert (known["scope"], known["audience"]) == (scope, [two])


@pytest.mark.parametrize(
    ("asked", "error"),
    [({"scope": "no:such"}, "invalid_scope"), ({"resource": "https://x.example"}, "invalid_target")],
    ids=["scope", "resource"],
)
def test_refusal_is_understood(
    client: NodeClient, service: Service, scope: str, asked: dict[str, str], error: str
) -> None:
    found = client.run("refusedClientCredentials", service, app_of(service, scope), request=asked, **OAUTH2)
    assert found == {"kind": "ResponseBodyError", "error": error, "status": 400}


@pytest.mark.parametrize("method", CONFIDENTIAL)
def test_wrong_secret_is_understood(client: NodeClient, service: Service, scope: str, method: str) -> None:
    """RFC 6749 §5.2: 401, with a challenge that the libraries parse."""
    app = app_of(service, scope, token_endpoint_auth_method=method)
    wrong = App(app.client_id, app.client_secret[:-1], app.metadata)
    found = client.run("refusedClientCredentials", service, wrong, **OAUTH2)
    assert found == {"kind": "WWWAuthenticateChallengeError", "error": None, "status": 401}


def test_spent_refresh_token_is_refused(client: NodeClient, service: Service, scope: str) -> None:
    app = app_of(service, scope)
    first = client.run("clientCredentials", service, app, **OAUTH2)
    second = client.run("refresh", service, app, refresh_token=first["refresh_token"], **OAUTH2)
    client.run("refresh", service, app, refresh_token=second["refresh_token"], **OAUTH2)
    found = client.run("refusedRefresh", service, app, refresh_token=first["refresh_token"], **OAUTH2)
    assert found == {"kind": "ResponseBodyError", "error": "invalid_grant", "status": 400}


def test_access_token_is_verified_by_a_resource_server(oauth4webapi: NodeClient, service: Service, scope: str) -> None:
    """RFC 9068 §4, with nothing but the issuer's metadata and key set."""
    audience = "https://api.example"
    app = app_of(service, scope, access_token_format="jwt", audience=[audience])
    token = service.grant(app)["access_token"]
    claims = oauth4webapi.run("verify", service, app, token=token, audience=audience, **OAUTH2)
    assert (claims["client_id"], claims["scope"]) == (app.client_id, scope)
    elsewhere = oauth4webapi.run("refusedVerify", service, app, token=token, audience="https://other.example", **OAUTH2)
    assert elsewhere["kind"] == "OperationProcessingError"
