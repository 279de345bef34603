"""joserfc, which made none of it, reads every key set and verifies every JWT of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from joserfc import jwk, jws, jwt
from joserfc.errors import BadSignatureError, InvalidClaimError

from tests.running import App, Service, until

# RFC 9864 names the curve; RFC 9068's verifiers know EdDSA.
pytestmark = pytest.mark.filterwarnings("ignore:EdDSA is deprecated")

ALGORITHM = "EdDSA"
PRIVATE_MEMBERS = {"d", "p", "q", "dp", "dq", "qi", "oth", "k"}


@pytest.fixture(scope="module")
def app(service: Service) -> App:
    return service.app(access_token_format="jwt")


def key_set(service: Service) -> dict[str, Any]:
    answer: dict[str, Any] = service.http.get("/oauth2/jwks").json()
    return answer


def keys_of(service: Service) -> Iterator[jwk.Key]:
    yield from jwk.KeySet.import_key_set(key_set(service)).keys


def kid_of(token: str) -> str:
    """Unverified: the key that it says it is signed by."""
    kid: str = jws.extract_compact(token.encode()).headers()["kid"]
    return kid


def claims_of(service: Service, token: str, **wanted: Any) -> dict[str, Any]:
    """Raises: JoseError unless it is an access token of RFC 9068, signed by a key of the set and as it should be."""
    keys = jwk.KeySet.import_key_set(key_set(service))
    read = jwt.decode(token, keys, algorithms=[ALGORITHM])
    assert read.header["typ"] == "at+jwt"
    expected = {"iss": service.issuer, "aud": service.issuer, **wanted}
    essential = {name: {"essential": True} for name in ("sub", "exp", "iat", "jti", "client_id")}
    values = {name: {"essential": True, "value": value} for name, value in expected.items()}
    jwt.JWTClaimsRegistry(**essential, **values).validate(read.claims)
    return read.claims


def test_key_set_is_public_and_names_every_key(service: Service) -> None:
    """RFC 7517 §4: a kid of its own, what it is for, by which algorithm; RFC 7638: nothing private in it."""
    keys = key_set(service)["keys"]
    for key in keys:
        assert not key.keys() & PRIVATE_MEMBERS
        assert key["use"] == "sig"
        assert key["alg"]
        assert jwk.import_key(key).is_private is False
    assert len({key["kid"] for key in keys}) == len(keys)


def test_access_token_is_verified(service: Service, app: App) -> None:
    token = service.grant(app)["access_token"]
    claims = claims_of(service, token)
    assert claims["client_id"] == app.client_id
    with pytest.raises(InvalidClaimError):
        claims_of(service, token, aud="https://other.example")


def test_access_tokens_of_the_old_key_and_of_the_new_are_verified(service: Service, app: App) -> None:
    old = service.grant(app)["access_token"]
    kid = service.done("POST", "/v1/keys/rotate", json={"alg": ALGORITHM})["kid"]
    new = until(lambda: next((token for token in [service.grant(app)["access_token"]] if kid_of(token) == kid), None))
    assert kid_of(old) != kid
    for token in (old, new):
        assert claims_of(service, token)["client_id"] == app.client_id


def test_access_token_that_was_changed_is_not(service: Service, app: App) -> None:
    header, _, signature = service.grant(app)["access_token"].split(".")
    _, other, _ = service.grant(app)["access_token"].split(".")
    with pytest.raises(BadSignatureError):
        claims_of(service, f"{header}.{other}.{signature}")


def test_access_token_is_signed_by_the_key_that_it_names_and_no_other(service: Service, app: App) -> None:
    token = service.grant(app)["access_token"]
    verified = []
    for key in keys_of(service):
        if key.key_type != "OKP":
            continue
        try:
            jwt.decode(token, key, algorithms=[ALGORITHM])
        except BadSignatureError:
            continue
        verified.append(key.kid)
    assert verified == [kid_of(token)]
