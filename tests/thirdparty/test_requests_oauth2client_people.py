"""requests-oauth2client, unmodified, on the flows in which a person takes part; with pushed requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import requests
from requests_oauth2client import (
    AuthorizationRequest,
    AuthorizationResponse,
    AuthorizationResponseError,
    BearerToken,
    InvalidGrant,
    InvalidRequest,
    LoginRequired,
    OAuth2Client,
)

from tests.relying import BACK, OPENID, Person, web_app
from tests.running import App, Service


@contextmanager
def client_of(service: Service, app: App, **more: Any) -> Iterator[OAuth2Client]:
    """Found through OpenID Connect Discovery. `testing=True` is that library's word for http."""
    with requests.Session() as session:
        session.trust_env = False
        secret = {"client_secret": app.client_secret} if app.client_secret else {"auth": app.client_id}
        yield OAuth2Client.from_discovery_endpoint(
            issuer=service.issuer,
            **({"client_id": app.client_id} if app.client_secret else {}),
            **secret,
            redirect_uri=BACK,
            id_token_signed_response_alg=app.metadata.get("id_token_signed_response_alg", "RS256"),
            session=session,
            testing=True,
            **more,
        )


def callback(person: Person, client: OAuth2Client, asked: AuthorizationRequest, *, pushed: bool) -> str:
    """Where the person arrives."""
    uri = client.pushed_authorization_request(asked).uri if pushed else asked.uri
    arrived: str = person.visit(uri)["url"]
    return arrived


def signed_in(person: Person, client: OAuth2Client, *, pushed: bool, **asked: Any) -> BearerToken:
    """Callback and ID token, each after the library's own checks: state, iss, nonce, signature, hashes, auth_time."""
    request = client.authorization_request(**asked)
    answer = request.validate_callback(callback(person, client, request, pushed=pushed))
    assert isinstance(answer, AuthorizationResponse)
    return client.authorization_code(answer, validate=True)


@pytest.mark.parametrize(("algorithm", "pushed"), [("RS256", False), ("ES256", True), ("EdDSA", True)])
def test_person_signs_in(service: Service, person: Person, algorithm: str, pushed: bool) -> None:
    app = web_app(service, id_token_signed_response_alg=algorithm, require_pushed_authorization_requests=pushed)
    with client_of(service, app) as client:
        assert client.authorization_response_iss_parameter_supported
        token = signed_in(person, client, pushed=pushed, scope=OPENID, max_age=600)
        assert token.id_token.subject == person.user_id
        assert client.userinfo(token)["sub"] == person.user_id
        assert client.introspect_token(token)["sub"] == person.user_id


def test_public_client_refreshes_and_revokes(service: Service, person: Person) -> None:
    app = web_app(service, token_endpoint_auth_method="none")
    with client_of(service, app) as client:
        first = signed_in(person, client, pushed=True, scope=f"{OPENID} offline_access", prompt="consent")
        second = client.refresh_token(first)
        assert second.refresh_token != first.refresh_token
        assert client.userinfo(second)["sub"] == person.user_id
        assert client.revoke_refresh_token(second) is True
        with pytest.raises(InvalidGrant):
            client.refresh_token(second)
    assert service.code(str(second.access_token)) == "revoked"


@pytest.mark.parametrize("pushed", [False, True], ids=["query", "pushed"])
def test_person_who_refuses_is_taken_back_without_a_code(service: Service, person: Person, pushed: bool) -> None:
    with client_of(service, web_app(service)) as client:
        asked = client.authorization_request(scope=OPENID)
        uri = client.pushed_authorization_request(asked).uri if pushed else asked.uri
        with pytest.raises(AuthorizationResponseError) as refused:
            asked.validate_callback(person.refuse(uri)["url"])
    assert refused.value.error == "access_denied"


def test_client_that_may_show_nothing_learns_that_nobody_is_signed_in(service: Service, person: Person) -> None:
    with client_of(service, web_app(service)) as client:
        asked = client.authorization_request(scope=OPENID, prompt="none")
        with pytest.raises(LoginRequired):
            asked.validate_callback(callback(person, client, asked, pushed=True))


def test_code_is_redeemed_once(service: Service, person: Person) -> None:
    with client_of(service, web_app(service)) as client:
        asked = client.authorization_request(scope=OPENID)
        answer = asked.validate_callback(callback(person, client, asked, pushed=False))
        client.authorization_code(answer)
        with pytest.raises(InvalidGrant):
            client.authorization_code(answer)


def test_pushed_request_that_is_wrong_is_refused_at_once(service: Service, person: Person) -> None:
    with client_of(service, web_app(service)) as client:
        asked = client.authorization_request(scope=OPENID, redirect_uri="https://other.example/callback")
        with pytest.raises(InvalidRequest):
            client.pushed_authorization_request(asked)
