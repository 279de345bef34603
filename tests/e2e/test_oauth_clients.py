"""A stranger's path: OAuth clients that are not ours, unmodified, and verifiers that never ask us."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
import requests
import requests_oauth2client
from authlib.integrations.requests_client import OAuth2Session
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata, get_well_known_url
from joserfc import jwk as joserfc_jwk
from joserfc import jwt as joserfc_jwt

from tests.running import App, Service, oauth_error, problem

LIFETIME_SECONDS = 3_600
# RFC 9068 §2.2, and our own grant_id.
CLAIMS = {"iss", "sub", "client_id", "aud", "exp", "iat", "jti", "scope", "grant_id"}


@pytest.fixture(scope="module")
def scopes(service: Service) -> tuple[str, str]:
    return service.scope(), service.scope()


@pytest.fixture(scope="module")
def app(service: Service, scopes: tuple[str, str]) -> App:
    return service.app(
        grant_types=["client_credentials", "refresh_token"],
        access_token_format="jwt",
        scope=" ".join(scopes),
    )


@pytest.fixture
def metadata(service: Service) -> dict[str, Any]:
    """Found as RFC 8414 §3 says, from the issuer alone."""
    answer = service.http.get(get_well_known_url(service.issuer, external=True))
    assert answer.status_code == 200
    return answer.json()


def test_metadata_is_valid_and_lists_only_what_works(metadata: dict[str, Any], service: Service) -> None:
    AuthorizationServerMetadata(metadata).validate()
    for name in ("token_endpoint", "jwks_uri", "introspection_endpoint", "revocation_endpoint"):
        assert metadata[name].startswith(service.issuer)
        assert service.http.request("OPTIONS", metadata[name]).status_code != 404
    assert set(metadata["grant_types_supported"]) == {"authorization_code", "client_credentials", "refresh_token"}
    assert {"client_secret_basic", "client_secret_post"} <= set(metadata["token_endpoint_auth_methods_supported"])
    for absent in ("registration_endpoint", "device_authorization_endpoint", "introspection_signing_alg_values"):
        assert absent not in metadata


@pytest.fixture
def authlib(app: App) -> Iterator[OAuth2Session]:
    with OAuth2Session(app.client_id, app.client_secret) as session:
        session.trust_env = False
        yield session


def test_authlib_gets_refreshes_introspects_and_revokes(
    authlib: OAuth2Session, metadata: dict[str, Any], service: Service, scopes: tuple[str, str]
) -> None:
    first = authlib.fetch_token(metadata["token_endpoint"], grant_type="client_credentials")
    assert first["token_type"] == "Bearer"
    assert first["expires_in"] == LIFETIME_SECONDS
    assert set(first["scope"].split()) == set(scopes)
    seen = authlib.introspect_token(metadata["introspection_endpoint"], first["access_token"]).json()
    assert seen["active"] is True
    second = authlib.refresh_token(metadata["token_endpoint"], first["refresh_token"])
    assert second["access_token"] != first["access_token"]
    revoked = authlib.revoke_token(metadata["revocation_endpoint"], second["refresh_token"])
    assert revoked.status_code == 200
    for token in (first["access_token"], second["access_token"], second["refresh_token"]):
        seen = authlib.introspect_token(metadata["introspection_endpoint"], token).json()
        assert seen == {"active": False}
    token_id = service.validate(second["access_token"])["token_id"]
    history = service.history(token_id, uses="true")
    assert [event["type"].partition("/")[0] for event in history if event["ledger_seq"]] == [
        "token.issued",
        "token.refreshed",
        "grant.revoked",
    ]
    assert any(event["ledger_seq"] is None for event in history)


def test_authlib_posts_its_secret_if_registered_so(service: Service, metadata: dict[str, Any]) -> None:
    app = service.app(token_endpoint_auth_method="client_secret_post")
    with OAuth2Session(app.client_id, app.client_secret, "client_secret_post") as session:
        session.trust_env = False
        token = session.fetch_token(metadata["token_endpoint"], grant_type="client_credentials")
    assert service.code(token["access_token"]) == "valid"


def test_requests_oauth2client_gets_refreshes_introspects_and_revokes(
    app: App, service: Service, scopes: tuple[str, str]
) -> None:
    """`testing=True` is that library's word for http, which a loopback address is allowed."""
    with requests.Session() as session:
        session.trust_env = False
        client = requests_oauth2client.OAuth2Client.from_discovery_endpoint(
            get_well_known_url(service.issuer, external=True),
            issuer=service.issuer,
            client_id=app.client_id,
            client_secret=app.client_secret,
            session=session,
            testing=True,
        )
        first = client.client_credentials(scope=scopes[0])
        assert first.scope == scopes[0]
        assert client.introspect_token(first)["active"] is True
        second = client.refresh_token(first)
        assert client.introspect_token(second)["scope"] == scopes[0]
        assert client.revoke_access_token(second) is True
        assert client.introspect_token(second) == {"active": False}
        assert client.introspect_token(first)["active"] is True
        with pytest.raises(requests_oauth2client.InvalidScope):
            client.client_credentials(scope="no:such:scope")


def test_library_of_this_age_sends_basic_percent_encoded(service: Service) -> None:
    """RFC 6749 §2.3.1 form-encodes id and secret before RFC 7617 does its part; ours need no encoding."""
    app = service.app()
    encoded = "".join(f"%{byte:02X}" for byte in app.client_id.encode())
    answer = service.form("/oauth2/token", (encoded, app.client_secret), grant_type="client_credentials")
    assert answer.status_code == 200


def access_token(service: Service, app: App) -> str:
    return service.grant(app)["access_token"]


def test_access_token_is_verified_offline_by_pyjwt(service: Service, app: App, metadata: dict[str, Any]) -> None:
    """RFC 9068 §4, by a verifier that only knows issuer and audience."""
    before = int(time.time())
    token = access_token(service, app)
    keys = jwt.PyJWKClient(metadata["jwks_uri"])
    key = keys.get_signing_key_from_jwt(token)
    claims = jwt.decode(
        token,
        key.key,
        algorithms=["EdDSA"],
        issuer=service.issuer,
        audience=service.issuer,
        options={"require": sorted(CLAIMS)},
    )
    assert jwt.get_unverified_header(token)["typ"] == "at+jwt"
    assert claims.keys() >= CLAIMS
    assert claims["sub"] == claims["client_id"] == app.client_id
    assert claims["exp"] - claims["iat"] == LIFETIME_SECONDS
    assert before - 1 <= claims["iat"] <= int(time.time())
    known = service.validate(token)
    assert known["token_id"] == claims["jti"]
    assert known["grant_id"] == claims["grant_id"]
    assert known["scope"].split() == claims["scope"].split()


@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")  # RFC 9864 names the curve; RFC 9068 verifiers know EdDSA
def test_access_token_is_verified_offline_by_joserfc(service: Service, app: App) -> None:
    keys = joserfc_jwk.KeySet.import_key_set(service.http.get("/oauth2/jwks").json())
    token = joserfc_jwt.decode(access_token(service, app), keys, algorithms=["EdDSA"])
    joserfc_jwt.JWTClaimsRegistry(
        iss={"essential": True, "value": service.issuer},
        aud={"essential": True, "value": service.issuer},
        exp={"essential": True},
    ).validate(token.claims)


def test_jwt_ids_differ_and_no_two_tokens_are_alike(service: Service, app: App) -> None:
    tokens = {access_token(service, app) for _ in range(20)}
    assert len(tokens) == 20


@pytest.mark.parametrize("form", ["jwt", "opaque"])
def test_introspection_shows_what_rfc_7662_names(service: Service, scopes: tuple[str, str], form: str) -> None:
    app = service.app(scope=scopes[0], access_token_format=form)
    answer = service.grant(app)
    seen = service.introspect(app, answer["access_token"])
    assert seen["active"] is True
    assert seen["client_id"] == seen["sub"] == app.client_id
    assert seen["scope"] == scopes[0]
    assert seen["token_type"] == "Bearer"
    assert seen["iss"] == service.issuer
    assert service.issuer in ([seen["aud"]] if isinstance(seen["aud"], str) else seen["aud"])
    assert seen["exp"] - seen["iat"] == LIFETIME_SECONDS
    assert seen["jti"] == service.validate(answer["access_token"])["token_id"]
    assert None not in seen.values()


def test_token_answer_is_not_cached_and_has_no_nulls(service: Service) -> None:
    app = service.app()
    answer = service.form("/oauth2/token", app.basic, grant_type="client_credentials")
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert "refresh_token" not in body
    assert None not in body.values()


def test_client_lifetime_and_format_are_used(service: Service) -> None:
    app = service.app(access_token_ttl_seconds=60, access_token_format="opaque")
    answer = service.grant(app)
    assert answer["expires_in"] == 60
    assert answer["access_token"].startswith("tl_at_")


def test_client_defaults_are_those_of_the_contract(service: Service) -> None:
    made = service.done("POST", "/v1/clients", json={"client_name": "plain"})
    seen = service.done("GET", f"/v1/clients/{made['client_id']}")
    assert "client_secret" not in seen
    expected = {
        "client_name": "plain",
        "grant_types": ["client_credentials"],
        "token_endpoint_auth_method": "client_secret_basic",
        "access_token_format": "jwt",
        "access_token_ttl_seconds": 3_600,
        "refresh_token_idle_ttl_seconds": 14 * 86_400,
        "refresh_token_max_ttl_seconds": 90 * 86_400,
        "audience": [service.issuer],
    }
    assert {name: seen[name] for name in expected} == expected


def test_requested_scope_is_cut_by_nobody_but_refused(service: Service, scopes: tuple[str, str]) -> None:
    app = service.app(scope=scopes[0])
    assert service.grant(app)["scope"] == scopes[0]
    answer = service.form("/oauth2/token", app.basic, grant_type="client_credentials", scope=" ".join(scopes))
    oauth_error(answer, 400, "invalid_scope")


def test_client_scope_can_be_narrowed_and_refresh_follows(service: Service, scopes: tuple[str, str]) -> None:
    """What the client may no longer have, a refresh no longer gives."""
    app = service.app(grant_types=["client_credentials", "refresh_token"], scope=" ".join(scopes))
    answer = service.grant(app)
    service.done("PATCH", f"/v1/clients/{app.client_id}", json={"scope": scopes[0]})
    refreshed = service.refresh(app, answer["refresh_token"])
    assert refreshed.status_code == 200
    assert refreshed.json()["scope"] == scopes[0]


def test_disabled_client_is_shut_out(service: Service) -> None:
    app = service.app()
    token = service.grant(app)["access_token"]
    assert service.done("DELETE", f"/v1/clients/{app.client_id}")["ledger_seq"] > 0
    assert service.code(token) in {"revoked", "client_disabled"}
    answer = service.form("/oauth2/token", app.basic, grant_type="client_credentials")
    oauth_error(answer, 401, "invalid_client")
    again = service.call("PATCH", f"/v1/clients/{app.client_id}", json={"client_name": "x"})
    problem(again, 409)


def test_client_revocation_ends_its_tokens_and_spares_the_client(service: Service) -> None:
    app = service.app()
    old = service.grant(app)["access_token"]
    wanted = {"client_id": app.client_id, "reason": "compromised"}
    dry = service.done("POST", "/v1/revocations", json={**wanted, "dry_run": True})
    assert dry["affected"] == {"grants": 1, "tokens": 1}
    assert service.code(old) == "valid"
    done = service.done("POST", "/v1/revocations", json=wanted)
    assert done["affected"] == {"grants": 1, "tokens": 1}
    assert done["ledger_seq"] > dry["ledger_seq"] or done["ledger_seq"] > 0
    assert service.code(old) == "revoked"
    assert service.code(service.grant(app)["access_token"]) == "valid"


def test_access_only_token_has_its_own_history(service: Service) -> None:
    """Its issue stands among those of its client in the ledger; its history is its own all the same."""
    app = service.app()
    first, second = (service.grant(app)["access_token"] for _ in range(2))
    service.revoke(app, second)
    types = [
        [event["type"] for event in service.history(service.validate(token)["token_id"])] for token in (first, second)
    ]
    assert types == [["token.issued"], ["token.issued", "token.revoked"]]


def test_subject_of_client_credentials_is_the_client(service: Service) -> None:
    app = service.app()
    token = service.grant(app)["access_token"]
    assert service.validate(token)["subject"] == app.client_id
    done = service.done("POST", "/v1/revocations", json={"subject": app.client_id, "reason": "admin"})
    assert done["affected"] == {"grants": 1, "tokens": 1}
    assert service.code(token) == "revoked"


def test_resource_narrows_the_audience(service: Service) -> None:
    """Source: RFC 8707 §2."""
    one, two = "https://one.example", "https://two.example"
    app = service.app(grant_types=["client_credentials", "refresh_token"], audience=[one, two])
    whole = service.grant(app)
    assert service.validate(whole["access_token"])["audience"] == [one, two]
    narrow = service.grant(app, resource=one)
    assert service.validate(narrow["access_token"])["audience"] == [one]
    refreshed = service.refresh(app, whole["refresh_token"], resource=two).json()
    assert service.validate(refreshed["access_token"])["audience"] == [two]
    other = service.form("/oauth2/token", app.basic, grant_type="client_credentials", resource="https://x.example")
    oauth_error(other, 400, "invalid_target")
    wider = service.refresh(app, narrow["refresh_token"], resource=two)
    oauth_error(wider, 400, "invalid_target")
