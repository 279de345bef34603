"""ID tokens, verified by a library that is not ours, and read again as hints."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import jwt
import pytest
import pytest_asyncio
from joserfc import jwt as joserfc_jwt
from joserfc.jwk import KeySet
from msgspec import Struct

from projections.registry import Client
from service.errors import Unavailable
from service.grants import AccessFor, mint_access
from service.oauth.id_tokens import ID_TOKEN_TTL_SECONDS, IdTokenFor, mint_id_token, read_id_token_hint
from service.settings import Algorithm
from service.tokens import mint, new_id, now
from service.validation import BEARER_KINDS, Asked, Code, resolve
from tests.hosts import ISSUER, Host, host
from tests.making import metadata

# RFC 9864 names it Ed25519; clients know EdDSA.
pytestmark = pytest.mark.filterwarnings("ignore:EdDSA is deprecated")

ALGORITHMS: list[Algorithm] = ["RS256", "ES256", "EdDSA"]
SIGNED_IN = datetime(2026, 1, 31, 12, 0, 5, 999_999, tzinfo=UTC)
SUBJECT = new_id("usr")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def one(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    async with host(tmp_path_factory.mktemp("id-tokens")) as made:
        yield made


def client(alg: str = "RS256", **changes: Any) -> Client:
    return Client(new_id("cli"), metadata(id_token_signed_response_alg=alg, **changes), (), now(), 1)


def about(**changes: Any) -> IdTokenFor:
    return IdTokenFor(**({"subject": SUBJECT, "auth_time": SIGNED_IN} | changes))


async def minted(one: Host, whose: Client, what: IdTokenFor) -> str:
    return await one.projecting(mint_id_token(one.runtime, whose, what))


class Read(Struct):
    header: dict[str, Any]
    claims: dict[str, Any]


def verified(one: Host, token: str, alg: str, audience: str) -> Read:
    """By the public key set alone, as a client would."""
    keys = KeySet.import_key_set(one.runtime.signing_keys.jwks())
    found = joserfc_jwt.decode(token, keys, algorithms=[alg])
    registry = joserfc_jwt.JWTClaimsRegistry(
        iss={"essential": True, "value": ISSUER},
        aud={"essential": True, "value": audience},
        exp={"essential": True},
        iat={"essential": True},
        sub={"essential": True},
    )
    registry.validate(found.claims)
    return Read(found.header, found.claims)


@pytest.mark.parametrize("alg", ALGORITHMS)
async def test_id_token_of_each_algorithm_is_verified_by_the_key_set(one: Host, alg: Algorithm) -> None:
    whose = client(alg)
    code, access_token = mint("ac"), mint("at")
    what = about(nonce="n-0S6", code=code, access_token=access_token, claims={"amr": ["pwd"], "email": "a@example"})
    before = int(now().timestamp())
    read = verified(one, await minted(one, whose, what), alg, whose.client_id)
    key = one.runtime.signing_keys.active(alg, "id")
    assert key is not None
    assert read.header == {"alg": alg, "kid": key.kid, "typ": "JWT"}
    assert key.kid.startswith("id-")
    issued_at = read.claims.pop("iat")
    assert before <= issued_at <= int(now().timestamp())
    assert read.claims == {
        "iss": ISSUER,
        "sub": SUBJECT,
        "aud": whose.client_id,
        "exp": issued_at + ID_TOKEN_TTL_SECONDS,
        "auth_time": int(SIGNED_IN.timestamp()),
        "nonce": "n-0S6",
        "c_hash": half(code, alg),
        "at_hash": half(access_token, alg),
        "amr": ["pwd"],
        "email": "a@example",
    }


def half(value: str, alg: str) -> str:
    """OpenID Connect Core §3.1.3.6; for EdDSA what openid/connect#1125 says."""
    digest = hashlib.sha512(value.encode()).digest() if alg == "EdDSA" else hashlib.sha256(value.encode()).digest()
    return base64.urlsafe_b64encode(digest[: len(digest) // 2]).decode().rstrip("=")


async def test_id_token_says_nothing_of_what_it_does_not_come_with(one: Host) -> None:
    whose = client()
    read = verified(one, await minted(one, whose, about()), "RS256", whose.client_id)
    assert set(read.claims) == {"iss", "sub", "aud", "exp", "iat", "auth_time"}


async def test_claims_cannot_change_whom_the_token_is_about(one: Host) -> None:
    whose = client()
    claims = {"iss": "https://evil.example", "sub": "usr_x", "aud": "x", "exp": 1, "iat": 1, "auth_time": 1, "nonce": 1}
    read = verified(one, await minted(one, whose, about(claims=claims)), "RS256", whose.client_id)
    assert (read.claims["iss"], read.claims["sub"], read.claims["aud"]) == (ISSUER, SUBJECT, whose.client_id)
    assert read.claims["exp"] > read.claims["iat"] > read.claims["auth_time"] > 1
    assert "nonce" not in read.claims


async def test_at_hash_is_that_of_the_standard(one: Host) -> None:
    """OpenID Connect Core A.3 and A.4."""
    whose = client()
    code = "Qcb0Orv1zh30vL1MPRsbm-diHiMwcLyZvn1arpZv-Jxf_11jnpEX3Tgfvk"
    what = about(access_token="jHkWEdUXMU1BwAsC4vtUsZwnNvTIxEl0z9K3vx5KF0Y", code=code)
    read = verified(one, await minted(one, whose, what), "RS256", whose.client_id)
    assert read.claims["at_hash"] == "77QmUPtjPfzWtF2AnpK9RQ"
    assert read.claims["c_hash"] == "LDktKdoQak3Pk0cnXxCltA"


async def test_key_set_has_public_keys_for_signatures_with_ids_of_their_own(one: Host) -> None:
    for alg in ALGORITHMS:
        await minted(one, client(alg), about())
    listed = one.runtime.signing_keys.jwks()["keys"]
    assert len({key["kid"] for key in listed}) == len(listed) >= 4
    assert {key["use"] for key in listed} == {"sig"}
    assert not {name for key in listed for name in key} & {"d", "p", "q", "dp", "dq", "qi", "k", "oth"}
    assert {(key["kid"].startswith("id-"), key["alg"]) for key in listed} == {
        (False, "EdDSA"),
        *((True, alg) for alg in ALGORITHMS),
    }


async def test_token_without_a_key_is_refused_in_bounded_time(one: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.signing.ID_KEY_SECONDS_MAX", 0.05)
    monkeypatch.setattr(one.runtime.signing_keys, "active", lambda *_: None)
    with pytest.raises(Unavailable, match="still being made"):
        await mint_id_token(one.runtime, client(), about())


# ID tokens and access tokens are not each other (attacks.md, 160 and 161)


async def access_token(one: Host) -> str:
    grant = AccessFor(new_id("grt"), SUBJECT, "openid", (ISSUER,))
    token, _ = await mint_access(one.runtime, client(access_token_format="jwt"), grant, now())
    return token


@pytest.mark.parametrize("alg", ALGORITHMS)
async def test_id_token_is_no_access_token(one: Host, alg: Algorithm) -> None:
    token = await minted(one, client(alg), about())
    verdict = await one.projecting(resolve(one.runtime, token, Asked(), BEARER_KINDS))
    assert verdict.code is Code.UNKNOWN


async def test_access_token_is_signed_by_no_key_for_id_tokens(one: Host) -> None:
    header = jwt.get_unverified_header(await access_token(one))
    assert (header["typ"], header["kid"].startswith("id-")) == ("at+jwt", False)
    # Joserfc reads it by the same key set: they differ in type, key and audience.
    read = verified(one, await access_token(one), "EdDSA", ISSUER)
    assert read.header["typ"] == "at+jwt"


# Hints


@pytest.mark.parametrize("alg", ALGORITHMS)
async def test_hint_is_read_after_its_end_and_after_its_key_retired(
    one: Host, alg: Algorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    whose = client(alg)
    monkeypatch.setattr("service.oauth.id_tokens.ID_TOKEN_TTL_SECONDS", -3600)
    token = await minted(one, whose, about(nonce="n"))
    await one.projecting(one.runtime.signing_keys.rotate(alg, by="system", purpose="id"))
    read = read_id_token_hint(one.runtime, token)
    assert read is not None
    assert (read["sub"], read["aud"], read["nonce"]) == (SUBJECT, whose.client_id, "n")


async def test_what_is_no_hint_is_none(one: Host) -> None:
    token = await minted(one, client(), about())
    head, body, signature = token.split(".")
    other = await minted(one, client(), about(subject=new_id("usr")))
    claims = jwt.decode(token, options={"verify_signature": False})
    key = one.runtime.signing_keys.active("RS256", "id")
    assert key is not None
    private = one.runtime.signing_keys._private[key.kid]

    def signed(changes: dict[str, Any], **header: Any) -> str:
        return jwt.encode(claims | changes, private, algorithm="RS256", headers={"kid": key.kid, "typ": "JWT"} | header)

    assert read_id_token_hint(one.runtime, signed({})) == claims
    hints = {
        "empty": "",
        "no JWT": "x.y.z",
        "two parts": f"{head}.{body}",
        "signature of another": f"{head}.{body}.{other.rpartition('.')[2]}",
        "claims of another": f"{head}.{other.split('.')[1]}.{signature}",
        "no signature": f"{b64({'alg': 'none', 'typ': 'JWT', 'kid': key.kid})}.{body}.",
        "hmac by the public key": f"{b64({'alg': 'HS256', 'typ': 'JWT', 'kid': key.kid})}.{body}.{signature}",
        "deep": f"{base64.urlsafe_b64encode(b'[' * 3000 + b']' * 3000).decode()}.{body}.{signature}",
        "not ASCII": f"{head}.{body}.\u00e4",
        "long": token + "A" * 9_000,
        "another issuer": signed({"iss": "https://evil.example"}),
        "no subject": signed({"sub": None}),
        "another type": signed({}, typ="at+jwt"),
        "key id is a list": f"{b64({'alg': 'RS256', 'typ': 'JWT', 'kid': [key.kid]})}.{body}.{signature}",
        "access token": await access_token(one),
        "by a stranger": jwt.encode(claims, "0" * 64, algorithm="HS256", headers={"kid": key.kid, "typ": "JWT"}),
    }
    assert {name: read_id_token_hint(one.runtime, text) for name, text in hints.items()} == dict.fromkeys(hints)


def b64(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")
