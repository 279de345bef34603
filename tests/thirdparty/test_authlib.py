"""Authlib's client, unmodified, over httpx2 as its users have it today."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from authlib.integrations.base_client import OAuthError
from authlib.integrations.httpx_client import AsyncOAuth2Client, OAuth2Client
from authlib.oauth2.rfc8414 import get_well_known_url

from tests.running import App, Service

FORMS = ["jwt", "opaque"]


@pytest.fixture(scope="module")
def scope(service: Service) -> str:
    return service.scope()


@pytest.fixture(scope="module", params=FORMS)
def app(request: pytest.FixtureRequest, service: Service, scope: str) -> App:
    return service.app(
        grant_types=["client_credentials", "refresh_token"], access_token_format=request.param, scope=scope
    )


@pytest.fixture
def metadata(service: Service) -> dict[str, Any]:
    """Found as RFC 8414 §3 says, from the issuer alone."""
    found: dict[str, Any] = httpx2.get(get_well_known_url(service.issuer, external=True), trust_env=False).json()
    return found


@pytest.fixture
def authlib(app: App, metadata: dict[str, Any], scope: str) -> Iterator[OAuth2Client]:
    endpoint = metadata["token_endpoint"]
    with OAuth2Client(
        app.client_id, app.client_secret, scope=scope, token_endpoint=endpoint, trust_env=False
    ) as session:
        yield session


def test_client_gets_refreshes_introspects_and_revokes(
    authlib: OAuth2Client, metadata: dict[str, Any], scope: str
) -> None:
    first = authlib.fetch_token(grant_type="client_credentials")
    assert first["scope"] == scope
    second = authlib.refresh_token(refresh_token=first["refresh_token"])
    assert second["refresh_token"] != first["refresh_token"]
    introspection = metadata["introspection_endpoint"]
    assert authlib.introspect_token(introspection, second["access_token"]).json()["active"] is True
    assert authlib.revoke_token(metadata["revocation_endpoint"], second["refresh_token"]).status_code == 200
    for token in (first["access_token"], second["access_token"], second["refresh_token"]):
        assert authlib.introspect_token(introspection, token).json() == {"active": False}


def test_client_gets_a_new_token_by_itself_once_the_old_one_has_expired(
    authlib: OAuth2Client, service: Service
) -> None:
    """A session that has been used for long refreshes before it asks, and goes on with what the refresh gave."""
    first = dict(authlib.fetch_token(grant_type="client_credentials"))
    authlib.token = {**first, "expires_at": 0}
    heard: list[dict[str, Any]] = []
    authlib.update_token = lambda token, **_: heard.append(token)
    authlib.get(f"{service.url}/health/live")
    assert [token["access_token"] for token in heard] == [authlib.token["access_token"]]
    assert authlib.token["access_token"] != first["access_token"]
    assert authlib.token["refresh_token"] != first["refresh_token"]
    assert service.code(authlib.token["access_token"]) == "valid"


async def test_client_that_is_asynchronous_gets_a_token(app: App, metadata: dict[str, Any], service: Service) -> None:
    async with AsyncOAuth2Client(app.client_id, app.client_secret, trust_env=False) as session:
        token = await session.fetch_token(metadata["token_endpoint"], grant_type="client_credentials")
    assert service.code(token["access_token"]) == "valid"


@pytest.mark.parametrize(
    ("asked", "error"),
    [({"scope": "no:such"}, "invalid_scope"), ({"resource": "https://x.example"}, "invalid_target")],
    ids=["scope", "resource"],
)
def test_refusal_is_understood(authlib: OAuth2Client, asked: dict[str, str], error: str) -> None:
    with pytest.raises(OAuthError) as refused:
        authlib.fetch_token(grant_type="client_credentials", **asked)
    assert refused.value.error == error
    assert refused.value.description


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
def test_wrong_secret_is_understood(service: Service, metadata: dict[str, Any], method: str) -> None:
    app = service.app(token_endpoint_auth_method=method)
    with OAuth2Client(app.client_id, app.client_secret[:-1], method, trust_env=False) as session:
        with pytest.raises(OAuthError) as refused:
            session.fetch_token(metadata["token_endpoint"], grant_type="client_credentials")
        assert refused.value.error == "invalid_client"
        session.client_secret = app.client_secret
        token = session.fetch_token(metadata["token_endpoint"], grant_type="client_credentials")
    assert service.code(token["access_token"]) == "valid"
