"""Hostile JWTs against the client library (attacks.md, 154 to 172), and the order of what may be wrong."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from typing import Any

import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from service.client.errors import Unreachable
from service.client.jwts import TOKEN_CHARS_MAX
from service.client.verdicts import Asked
from service.tokens import mint
from tests.validators import AUDIENCE, Validator, claims, part


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def validator() -> Validator:
    made = Validator()
    await made.keys.fetch()
    return made


@pytest.mark.parametrize("by", ["EdDSA", "ES256", "RS256"])
async def test_jwt_of_each_kind_of_key_is_valid(validator: Validator, by: str) -> None:
    payload = claims()
    verdict = validator.check(validator.signed(payload, by=by), Asked("orders:read"))
    assert (verdict.valid, verdict.code, verdict.offline) == (True, "valid", True)
    names = ("jti", "grant_id", "sub", "client_id", "scope")
    told = (verdict.token_id, verdict.grant_id, verdict.subject, verdict.client_id, verdict.scope)
    assert told == tuple(payload[name] for name in names)
    assert verdict.audience == (AUDIENCE,)


def hmac_signed(validator: Validator, secret: bytes) -> str:
    text = f"{part({'alg': 'HS256', 'kid': 'RS256', 'typ': 'at+jwt'})}.{part(claims())}"
    # PyJWT refuses such secrets; an attacker does not.
    return f"{text}.{part(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


def forged(validator: Validator) -> dict[str, tuple[str, str]]:
    """Token and code, by what is wrong."""
    good = validator.token()
    head, payload, signature = good.split(".")
    rsa_key = validator.private["RS256"].public_key()
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    pem = rsa_key.public_bytes(serialization.Encoding.PEM, spki)
    der = rsa_key.public_bytes(serialization.Encoding.DER, spki)
    own = ed25519.Ed25519PrivateKey.generate()
    own_jwk = jwt.algorithms.OKPAlgorithm.to_jwk(own.public_key(), as_dict=True)
    ecdsa = validator.signed(claims(), by="ES256").rpartition(".")[0]
    unsigned = {
        f"alg {name}": (f"{part({'alg': name, 'kid': 'EdDSA', 'typ': 'at+jwt'})}.{payload}.", "unknown")
        for name in ("none", "None", "NONE", "nOnE", "")
    }
    return {
        **unsigned,
        "HS256 by the PEM": (hmac_signed(validator, pem), "unknown"),
        "HS256 by the DER": (hmac_signed(validator, der), "unknown"),
        "alg of another key": (
            validator.signed(claims(), {"alg": "EdDSA", "kid": "RS256", "typ": "at+jwt"}, by="EdDSA"),
            "unknown",
        ),
        "embedded jwk": (
            jwt.encode(claims(), own, "EdDSA", headers={"kid": "EdDSA", "typ": "at+jwt", "jwk": own_jwk}),
            "unknown",
        ),
        "embedded jwk, its kid": (
            jwt.encode(claims(), own, "EdDSA", headers={"kid": "own", "typ": "at+jwt", "jwk": own_jwk}),
            "unknown",
        ),
        "another's key": (jwt.encode(claims(), own, "EdDSA", headers={"kid": "EdDSA", "typ": "at+jwt"}), "unknown"),
        "ECDSA r=s=0": (f"{ecdsa}.{part(bytes(64))}", "unknown"),
        "ECDSA in DER": (
            f"{ecdsa}.{part(validator.private['ES256'].sign(ecdsa.encode(), ec.ECDSA(hashes.SHA256())))}",
            "unknown",
        ),
        "Ed25519 all zeros": (f"{head}.{payload}.{part(bytes(64))}", "unknown"),
        "signature cut": (f"{head}.{payload}.{signature[:84]}", "unknown"),
        "no signature": (f"{head}.{payload}.", "unknown"),
        "other payload": (f"{head}.{part(claims())}.{signature}", "unknown"),
        "two parts": (f"{head}.{payload}", "malformed"),
        "four parts": (good + ".e30", "malformed"),
        "padding": (f"{head}=.{payload}.{signature}", "malformed"),
        "another spelling of the signature": (good[:-1] + _next(good[-1]), "malformed"),
        "blank inside": (f"{head}. {payload}.{signature}", "malformed"),
        "standard alphabet": (f"{head}.{payload}.+/{signature[2:]}", "malformed"),
        "not ASCII": (good[:-1] + "é", "malformed"),
        "lone surrogate": (good[:-1] + "\ud800", "malformed"),
        "empty": ("", "malformed"),
        "dots": ("..", "malformed"),
        "too long": (validator.token(scope="a" * TOKEN_CHARS_MAX), "malformed"),
        "a megabyte": ("eyJ" + "a" * 1_000_000, "malformed"),
        "deeply nested": (f"{head}.{part(b'[' * 2800)}.{signature}", "unknown"),
        "deeply nested, signed": (validator.signed(b"[" * 2000), "malformed"),
        "deeply nested header": (f"{part(b'[' * 2800)}.{payload}.{signature}", "malformed"),
    }


def _next(letter: str) -> str:
    """The letter that differs in the last bit: in the last place it means nothing."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return alphabet[alphabet.index(letter) ^ 1]


async def test_forged_jwt_is_refused(validator: Validator) -> None:
    expected = {name: code for name, (_, code) in forged(validator).items()}
    found = {name: validator.check(token).code for name, (token, _) in forged(validator).items()}
    assert found == expected


HEADERS = {
    "typ missing": {"alg": "EdDSA", "kid": "EdDSA"},
    "typ JWT": {"alg": "EdDSA", "kid": "EdDSA", "typ": "JWT"},
    "ID token": {"alg": "EdDSA", "kid": "EdDSA", "typ": "id_token+jwt"},
    "logout token": {"alg": "EdDSA", "kid": "EdDSA", "typ": "logout+jwt"},
    "typ a list": {"alg": "EdDSA", "kid": "EdDSA", "typ": ["at+jwt"]},
    "kid missing": {"alg": "EdDSA", "typ": "at+jwt"},
    "kid a number": {"alg": "EdDSA", "kid": 1, "typ": "at+jwt"},
    "alg a list": {"alg": ["EdDSA"], "kid": "EdDSA", "typ": "at+jwt"},
    "crit": {"alg": "EdDSA", "kid": "EdDSA", "typ": "at+jwt", "crit": ["exp"]},
    "crit empty": {"alg": "EdDSA", "kid": "EdDSA", "typ": "at+jwt", "crit": []},
    "no object": ["EdDSA"],
    "alg twice": b'{"alg":"EdDSA","kid":"EdDSA","typ":"at+jwt","alg":"none"}',
    "not UTF-8": b'{"alg":"EdDSA","kid":"\xff","typ":"at+jwt"}',
    "UTF-16": '{"alg":"EdDSA","kid":"EdDSA","typ":"at+jwt"}'.encode("utf-16"),
}


@pytest.mark.parametrize("name", HEADERS)
async def test_jwt_with_another_header_is_malformed(validator: Validator, name: str) -> None:
    assert validator.check(validator.signed(claims(), HEADERS[name])).code == "malformed"


async def test_jwt_typ_is_compared_as_a_media_type(validator: Validator) -> None:
    for name in ("AT+JWT", "application/at+jwt"):
        header = {"alg": "EdDSA", "kid": "EdDSA", "typ": name}
        assert validator.check(validator.signed(claims(), header)).valid


def payload_with(name: str, text: str) -> bytes:
    """A payload in which a member is written just so."""
    return json.dumps(claims(**{name: "HERE"})).replace('"HERE"', text).encode()


PAYLOADS = {
    **{f"no {name}": {name: None} for name in ("iss", "sub", "aud", "exp", "iat", "jti", "client_id", "grant_id")},
    **{f"{name} a number": {name: 7} for name in ("iss", "sub", "aud", "jti", "client_id", "grant_id", "scope")},
    **{f"{name} empty": {name: ""} for name in ("sub", "aud", "jti", "client_id", "grant_id")},
    "aud empty list": {"aud": []},
    "aud holds a number": {"aud": [AUDIENCE, 1]},
    "aud an object": {"aud": {AUDIENCE: 1}},
    "scope a list": {"scope": ["orders:read"]},
    "a year of life": {"exp": int(time.time()) + 366 * 86_400},
}


@pytest.mark.parametrize("name", PAYLOADS)
async def test_jwt_with_other_claims_is_malformed(validator: Validator, name: str) -> None:
    changes: dict[str, Any] = PAYLOADS[name]
    assert validator.check(validator.token(**changes)).code == "malformed"


DATES = [
    '"1900000000"',
    "1e400",
    "-1",
    "true",
    "false",
    "null",
    "[]",
    "NaN",
    "Infinity",
    "9" * 400,
    "-1e3",
    "253402300800",
    str(2**52),
]


@pytest.mark.parametrize("text", DATES)
@pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
async def test_jwt_date_that_is_none_is_malformed(validator: Validator, name: str, text: str) -> None:
    assert validator.check(validator.signed(payload_with(name, text))).code == "malformed"


@pytest.mark.parametrize("name", ["iss", "sub", "aud", "exp", "jti", "grant_id", "scope", "more"])
async def test_jwt_with_a_repeated_claim_is_malformed(validator: Validator, name: str) -> None:
    found = json.dumps(claims(more="x"))
    value = json.dumps(json.loads(found)[name])
    assert validator.check(validator.signed(f'{found[:-1]},"{name}":{value}}}'.encode())).code == "malformed"


async def test_jwt_of_another_issuer_is_unknown(validator: Validator) -> None:
    for issuer in ("https://other.example", "https://ledger.example/", "HTTPS://LEDGER.EXAMPLE"):
        assert validator.check(validator.token(iss=issuer)).code == "unknown"


AUDIENCES = {
    "substring": ("https://api.exampl", "wrong_audience"),
    "longer": (AUDIENCE + "/x", "wrong_audience"),
    "other": (["https://other.example"], "wrong_audience"),
    "ours among others": (["https://other.example", AUDIENCE], "valid"),
}


@pytest.mark.parametrize("name", AUDIENCES)
async def test_jwt_audience_must_name_us(validator: Validator, name: str) -> None:
    audience, expected = AUDIENCES[name]
    assert validator.check(validator.token(aud=audience)).code == expected
    assert validator.check(validator.token(), Asked(audience=("https://b.example", AUDIENCE))).code == "valid"


async def test_codes_come_in_the_order_of_the_contract(validator: Validator) -> None:
    now = int(time.time())
    asked = Asked("admin", ("https://other.example",))
    early = {"nbf": now + 100, "exp": now - 10, "iat": now - 100}
    assert validator.check(validator.token(**early), asked).code == "not_yet_valid"
    assert validator.check(validator.token(exp=now - 10, iat=now - 100), asked).code == "expired"
    assert validator.check(validator.token(), asked).code == "wrong_audience"
    assert validator.check(validator.token(), Asked("admin")).code == "insufficient_scope"
    assert validator.check(validator.token(), Asked("orders:read admin")).code == "insufficient_scope"
    assert validator.check(validator.token(), Asked("orders:write  orders:read")).code == "valid"
    assert validator.check(validator.token(iat=now + 3600, exp=now + 7200)).code == "not_yet_valid"


async def test_seen_token_is_judged_anew_each_time(validator: Validator) -> None:
    token = validator.token(exp=int(time.time()) + 1)
    assert validator.check(token).code == "valid"
    assert validator.check(token, Asked("admin")).code == "insufficient_scope"
    deadline = time.monotonic() + 60
    while validator.check(token).code == "valid":
        assert time.monotonic() < deadline
    assert validator.check(token).code == "expired"


async def test_unknown_key_ids_cause_one_question_in_a_cool_down() -> None:
    made = Validator()
    await made.keys.fetch()
    for number in range(1000):
        header = {"alg": "EdDSA", "kid": f"made-up-{number}", "typ": "at+jwt"}
        assert made.check(made.signed(claims(), header)).code == "unknown"
        await made.keys.fetch()
    assert made.asked == 1


async def test_key_that_is_new_is_fetched_once_the_cool_down_is_over() -> None:
    made = Validator()
    made.keys._cool_down_seconds = 0
    whole = made.document
    made.document = {"keys": [made.public("ES256")]}
    await made.keys.fetch()
    token = made.token()
    assert made.offline.check(token, Asked()) is None  # the ledger is to be asked for its keys
    made.document = whole
    await made.keys.fetch()
    assert made.check(token).valid


async def test_jwt_is_unknown_once_its_key_has_left_the_key_set() -> None:
    """Also one whose signature was verified before."""
    made = Validator()
    made.keys._cool_down_seconds = 0
    await made.keys.fetch()
    tokens = made.token(), made.token(by="ES256")
    assert [made.check(token).code for token in tokens] == ["valid", "valid"]
    kept = made.document["keys"]
    made.document = {"keys": [key for key in kept if key["kid"] != "EdDSA"]}
    await made.keys.fetch()
    made.keys._cool_down_seconds = 3600
    assert [made.check(token).code for token in tokens] == ["unknown", "valid"]
    # Another key under the same name is another key.
    made.private["EdDSA"], made.keys._cool_down_seconds = ed25519.Ed25519PrivateKey.generate(), 0
    made.document = {"keys": kept}
    await made.keys.fetch()
    assert made.check(tokens[0]).code == "valid"
    made.document = {"keys": [made.public("EdDSA"), *kept[1:]]}
    await made.keys.fetch()
    assert [made.check(token).code for token in tokens] == ["unknown", "valid"]


UNFIT_KEYS = {
    "symmetric": {"kty": "oct", "k": "AAAA", "kid": "EdDSA", "alg": "HS256"},
    "for encryption": {"use": "enc"},
    "of another alg": {"alg": "ES256"},
    "of another curve": {"crv": "Ed448"},
    "broken": {"x": "AA"},
    "without id": {"kid": None},
}


@pytest.mark.parametrize("name", UNFIT_KEYS)
async def test_key_that_does_not_fit_is_not_taken(name: str) -> None:
    made = Validator()
    made.document = {"keys": [made.public("EdDSA", **UNFIT_KEYS[name]), made.public("ES256")]}
    await made.keys.fetch()
    made.keys._asked_at = float("inf")
    assert made.check(made.token(by="ES256")).valid
    assert made.check(made.token()).code == "unknown"


async def test_short_rsa_key_is_not_taken() -> None:
    made = Validator()
    made.private["RS256"] = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    made.document = {"keys": [made.public("EdDSA"), made.public("RS256")]}
    await made.keys.fetch()
    header = {"alg": "RS256", "kid": "RS256", "typ": "at+jwt"}
    head = f"{part(header)}.{part(claims())}"
    assert made.check(f"{head}.{part(bytes(128))}").code == "unknown"
    assert made.keys.get("RS256") is None


@pytest.mark.parametrize("document", [[], {}, {"keys": {}}, {"keys": [{}] * 1000}], ids=repr)
async def test_key_set_that_is_none_leaves_the_keys_as_they_were(document: Any) -> None:
    made = Validator()
    await made.keys.fetch()
    made.document, made.keys._cool_down_seconds = document, 0
    with pytest.raises(Unreachable):
        await made.keys.fetch()
    assert made.check(made.token()).valid


async def test_stale_comes_before_everything_else() -> None:
    made = Validator()
    await made.keys.fetch()
    good = made.token()
    assert made.check(good).valid
    made.knowledge.complete_at = -float("inf")
    for token in (good, "garbage", made.token(exp=1, iat=0)):
        verdict = made.check(token)
        assert (verdict.valid, verdict.code) == (False, "stale")
        assert "not complete yet" in verdict.detail


async def test_reference_token_with_a_wrong_checksum_is_refused_without_a_question(validator: Validator) -> None:
    token = mint("pat")
    assert validator.offline.check(token, Asked()) is None
    wrong = token[:-1] + ("0" if token[-1] != "0" else "1")
    assert validator.check(wrong).code == "malformed"
    assert validator.check("tl_pat_").code == "malformed"
    assert validator.check("tl_pat_" + "é" * 49).code == "malformed"


# ID tokens are no access tokens (attacks.md, 161)


async def test_key_for_id_tokens_signs_no_access_token() -> None:
    """Whoever stole it can make it sign anything."""
    made = Validator()
    made.document = {"keys": [made.public("EdDSA"), made.public("RS256", kid="id-rs-1")]}
    await made.keys.fetch()
    head = {"alg": "RS256", "kid": "id-rs-1", "typ": "at+jwt"}
    assert made.check(made.signed(claims(), head, by="RS256")).code == "unknown"
    assert made.check(made.token()).code == "valid"


@pytest.mark.parametrize("by", ["EdDSA", "ES256", "RS256"])
async def test_id_token_is_no_access_token_whoever_signed_it(validator: Validator, by: str) -> None:
    payload = claims(aud=AUDIENCE, nonce="n", auth_time=1)
    head = {"alg": by, "kid": by, "typ": "JWT"}
    assert validator.check(validator.signed(payload, head, by=by)).code == "malformed"
