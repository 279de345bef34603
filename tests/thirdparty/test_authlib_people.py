"""Authlib and joserfc, unmodified, on the flows in which a person takes part."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx2
import pytest
from authlib.integrations.base_client import OAuthError
from authlib.integrations.httpx_client import OAuth2Client
from authlib.oauth2 import rfc9207
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata, get_well_known_url
from authlib.oidc.core import CodeIDToken, HybridIDToken
from authlib.oidc.discovery import OpenIDProviderMetadata
from authlib.oidc.discovery import get_well_known_url as get_openid_url
from authlib.oidc.rpinitiated import OpenIDProviderMetadata as LogoutMetadata
from joserfc import jwk, jwt

from tests.relying import BACK, OPENID, Person, web_app
from tests.running import App, Service

# RFC 9864 names the curve; OpenID Connect's clients know EdDSA.
pytestmark = pytest.mark.filterwarnings("ignore:EdDSA is deprecated")


@pytest.fixture
def metadata(service: Service) -> dict[str, Any]:
    """Found as OpenID Connect Discovery says, from the issuer alone."""
    found: dict[str, Any] = httpx2.get(get_openid_url(service.issuer, external=True), trust_env=False).json()
    return found


def test_metadata_holds_to_openid_connect(metadata: dict[str, Any]) -> None:
    """Every check of the library is made: of types, of what is required, and of what contradicts itself."""
    OpenIDProviderMetadata(metadata).validate(
        metadata_classes=[AuthorizationServerMetadata, rfc9207.AuthorizationServerMetadata, LogoutMetadata]
    )


def test_metadata_holds_to_rfc_8414(service: Service, metadata: dict[str, Any]) -> None:
    found = httpx2.get(get_well_known_url(service.issuer, external=True), trust_env=False).json()
    AuthorizationServerMetadata(found).validate(metadata_classes=[rfc9207.AuthorizationServerMetadata])
    assert {name: found[name] for name in found.keys() & metadata.keys()} == {
        name: metadata[name] for name in found.keys() & metadata.keys()
    }


@contextmanager
def session_of(service: Service, app: App, scope: str = OPENID) -> Iterator[OAuth2Client]:
    method = app.metadata["token_endpoint_auth_method"]
    endpoint = f"{service.issuer}/oauth2/token"
    with OAuth2Client(
        app.client_id,
        app.client_secret or None,
        method,
        scope=scope,
        redirect_uri=BACK,
        token_endpoint=endpoint,
        code_challenge_method="S256",
        trust_env=False,
    ) as session:
        yield session


def verified(service: Service, app: App, token: str, kind: type[CodeIDToken | HybridIDToken], **known: Any) -> Any:
    """The ID token's claims: its signature checked by joserfc, what it says by Authlib."""
    keys = jwk.KeySet.import_key_set(service.http.get("/oauth2/jwks").json())
    read = jwt.decode(token, keys, algorithms=[app.metadata.get("id_token_signed_response_alg", "RS256")])
    options = {"iss": {"essential": True, "value": service.issuer}, "aud": {"essential": True, "value": app.client_id}}
    claims = kind(read.claims, read.header, options, {"client_id": app.client_id, **known})
    claims.validate(leeway=10)
    return claims


@pytest.mark.parametrize(
    ("algorithm", "method"), [("RS256", "client_secret_basic"), ("ES256", "client_secret_post"), ("EdDSA", "none")]
)
def test_person_signs_in(
    service: Service, person: Person, metadata: dict[str, Any], algorithm: str, method: str
) -> None:
    app = web_app(service, id_token_signed_response_alg=algorithm, token_endpoint_auth_method=method)
    verifier, nonce = secrets.token_urlsafe(48), secrets.token_urlsafe(16)
    with session_of(service, app) as session:
        url, state = session.create_authorization_url(
            metadata["authorization_endpoint"], code_verifier=verifier, nonce=nonce, max_age=600
        )
        arrived = person.visit(url)["url"]
        token = session.fetch_token(authorization_response=arrived, state=state, code_verifier=verifier)
        known = {"nonce": nonce, "max_age": 600, "access_token": token["access_token"]}
        claims = verified(service, app, token["id_token"], CodeIDToken, **known)
        seen = session.get(metadata["userinfo_endpoint"]).json()
    assert claims["sub"] == seen["sub"] == person.user_id


@pytest.mark.parametrize(("algorithm", "mode"), [("RS256", "fragment"), ("ES256", "form_post"), ("EdDSA", "fragment")])
def test_person_signs_in_by_the_hybrid_flow(
    service: Service, person: Person, metadata: dict[str, Any], algorithm: str, mode: str
) -> None:
    """The ID token comes first, and vouches for the code by c_hash."""
    app = web_app(service, id_token_signed_response_alg=algorithm)
    verifier, nonce = secrets.token_urlsafe(48), secrets.token_urlsafe(16)
    with session_of(service, app) as session:
        url, state = session.create_authorization_url(
            metadata["authorization_endpoint"],
            response_type="code id_token",
            response_mode=mode,
            code_challenge=create_s256_code_challenge(verifier),
            code_challenge_method="S256",
            nonce=nonce,
        )
        arrived = person.visit(url)
        answer = arrived["form"] if mode == "form_post" else dict(parse_qsl(urlsplit(arrived["url"]).fragment))
        assert (answer["state"], answer["iss"]) == (state, service.issuer)
        assert "access_token" not in answer
        first = verified(service, app, answer["id_token"], HybridIDToken, nonce=nonce, code=answer["code"])
        token = session.fetch_token(grant_type="authorization_code", code=answer["code"], code_verifier=verifier)
        known = {"nonce": nonce, "access_token": token["access_token"]}
        second = verified(service, app, token["id_token"], CodeIDToken, **known)
    assert (first["iss"], first["sub"]) == (second["iss"], second["sub"]) == (service.issuer, person.user_id)


def test_session_goes_on_by_itself_with_offline_access(
    service: Service, person: Person, metadata: dict[str, Any]
) -> None:
    """A session that has been used for long refreshes before it asks, and goes on with what the refresh gave."""
    verifier = secrets.token_urlsafe(48)
    with session_of(service, web_app(service), f"{OPENID} offline_access") as session:
        url, state = session.create_authorization_url(
            metadata["authorization_endpoint"], code_verifier=verifier, prompt="consent"
        )
        arrived = person.visit(url)["url"]
        first = session.fetch_token(authorization_response=arrived, state=state, code_verifier=verifier)
        session.token = {**first, "expires_at": 1}
        assert session.get(metadata["userinfo_endpoint"]).json()["sub"] == person.user_id
        assert session.token["access_token"] != first["access_token"]
        assert session.token["refresh_token"] != first["refresh_token"]


def test_person_who_refuses_is_taken_back_without_a_code(
    service: Service, person: Person, metadata: dict[str, Any]
) -> None:
    verifier = secrets.token_urlsafe(48)
    with session_of(service, web_app(service)) as session:
        url, state = session.create_authorization_url(metadata["authorization_endpoint"], code_verifier=verifier)
        answer = dict(parse_qsl(urlsplit(person.refuse(url)["url"]).query))
    assert (answer["error"], answer["state"], answer["iss"]) == ("access_denied", state, service.issuer)
    assert "code" not in answer


def test_code_with_another_verifier_is_refused(service: Service, person: Person, metadata: dict[str, Any]) -> None:
    with session_of(service, web_app(service)) as session:
        url, state = session.create_authorization_url(
            metadata["authorization_endpoint"], code_verifier=secrets.token_urlsafe(48)
        )
        arrived = person.visit(url)["url"]
        with pytest.raises(OAuthError) as refused:
            session.fetch_token(authorization_response=arrived, state=state, code_verifier=secrets.token_urlsafe(48))
    assert refused.value.error == "invalid_grant"
