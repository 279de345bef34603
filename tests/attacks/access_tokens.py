"""JWT access tokens as the API sees them. It looks a token up by the hash of its string and verifies no signature,
so a forged one is unknown; these rows hold whatever replaces that to the same answers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.attacks.table import Stage, attack, basic, bearer, form, variants
from tests.running import until

REFUSED = {"unknown", "malformed"}


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def segment(value: Any) -> str:
    return b64(json.dumps(value, separators=(",", ":")).encode())


class Parts:
    """A real access token, taken apart."""

    def __init__(self, stage: Stage) -> None:
        app = stage.service.app(access_token_format="jwt")
        self.token: str = stage.service.grant(app)["access_token"]
        self.head, self.body, self.signature = self.token.split(".")
        self.header: dict[str, Any] = json.loads(unb64(self.head))
        self.claims: dict[str, Any] = json.loads(unb64(self.body))
        keys = stage.service.http.get("/oauth2/jwks").json()["keys"]
        self.jwk: dict[str, Any] = next(key for key in keys if key["kid"] == self.header["kid"])
        self.public = jwt.PyJWK(self.jwk).key

    def hs256(self, key: bytes, header: dict[str, Any] | None = None) -> str:
        signed = segment({**self.header, "alg": "HS256", **(header or {})}) + "." + self.body
        return signed + "." + b64(hmac.digest(key, signed.encode(), "sha256"))

    def signed_by_stranger(self, header: dict[str, Any] | None = None, body: str | None = None) -> str:
        key = Ed25519PrivateKey.generate()
        signed = segment({**self.header, **(header or {})}) + "." + (self.body if body is None else body)
        return signed + "." + b64(key.sign(signed.encode()))

    def with_claims(self, **claims: Any) -> str:
        return self.signed_by_stranger(body=segment({**self.claims, **claims}))


def is_refused_everywhere(stage: Stage, token: str) -> None:
    """Looked up where it is short enough to be looked up, and else refused unread."""
    seen = stage.service.call("POST", "/v1/tokens/validate", json={"token": token})
    assert seen.json()["code"] in REFUSED if seen.is_success else seen.status_code in {400, 413}
    answer = stage.post("/oauth2/introspect", form(token=token), basic(*stage.checker.basic))
    assert answer.json() == {"active": False} if answer.status_code == 200 else answer.status_code in {400, 413}
    for path in ("/v1/forward-auth", "/v1/clients"):
        answer = stage.service.raw_call("GET", path, [bearer(token)])
        assert answer.status_code in {400, 401, 431}, answer.text


def entered(row: str, source: str, **forgeries: Callable[[Parts], str]) -> None:
    """Rows that differ only in how the token is forged."""

    def forged_token_is_refused(stage: Stage, forge: Callable[[Parts], str]) -> None:
        parts = Parts(stage)
        assert stage.service.code(parts.token) == "valid"
        is_refused_everywhere(stage, forge(parts))

    variants(row, source, **forgeries)(forged_token_is_refused)


def unsigned(alg: Any) -> Callable[[Parts], str]:
    return lambda parts: segment({**parts.header, "alg": alg}) + "." + parts.body + "."


entered(
    "154",
    "RFC 8725 §3.2",
    none=unsigned("none"),
    title=unsigned("None"),
    upper=unsigned("NONE"),
    mixed=unsigned("nOnE"),
    empty=unsigned(""),
    null=unsigned(None),
    absent=lambda parts: segment({"typ": "at+jwt"}) + "." + parts.body + ".",
    keeps_signature=lambda parts: segment({**parts.header, "alg": "none"}) + "." + parts.body + "." + parts.signature,
    no_third_part=lambda parts: parts.head + "." + parts.body,
)


def spki(parts: Parts, encoding: Encoding) -> bytes:
    data: bytes = parts.public.public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo)
    return data


entered(
    "155",
    "RFC 8725 §2.1, §3.1; Wycheproof SymmetryConfusion",
    pem=lambda parts: parts.hs256(spki(parts, Encoding.PEM)),
    der=lambda parts: parts.hs256(spki(parts, Encoding.DER)),
    jwk=lambda parts: parts.hs256(json.dumps(parts.jwk).encode()),
    x_only=lambda parts: parts.hs256(unb64(parts.jwk["x"])),
    empty=lambda parts: parts.hs256(b""),
)


def _embedded(parts: Parts) -> str:
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    jwk = {"kty": "OKP", "crv": "Ed25519", "x": b64(public), "kid": "mine"}
    signed = segment({**parts.header, "jwk": jwk, "kid": "mine"}) + "." + parts.body
    return signed + "." + b64(key.sign(signed.encode()))


entered(
    "157",
    "RFC 8725 §3.10; Wycheproof embedded jwk",
    jwk=_embedded,
    jku=lambda parts: parts.signed_by_stranger({"jku": "http://127.0.0.1:9/keys"}),
    x5u=lambda parts: parts.signed_by_stranger({"x5u": "http://127.0.0.1:9/certificate"}),
)
entered(
    "158",
    "P, RFC 8725 §3.10",
    unknown=lambda parts: parts.signed_by_stranger({"kid": "no-such-key"}),
    path=lambda parts: parts.signed_by_stranger({"kid": "../../../../dev/null"}),
    sql=lambda parts: parts.signed_by_stranger({"kid": "' or 1=1 --"}),
    long=lambda parts: parts.signed_by_stranger({"kid": "a" * 8_000}),
    number=lambda parts: parts.signed_by_stranger({"kid": 1}),
    null=lambda parts: parts.signed_by_stranger({"kid": None}),
    list=lambda parts: parts.signed_by_stranger({"kid": ["a"]}),
)
entered(
    "160",
    "RFC 9068 §4: typ",
    absent=lambda parts: parts.signed_by_stranger({"typ": None}),
    jwt=lambda parts: parts.signed_by_stranger({"typ": "JWT"}),
)
entered(
    "161",
    "RFC 9068 §4; RFC 8725 §3.12",
    logout=lambda parts: parts.signed_by_stranger({"typ": "logout+jwt"}),
    event=lambda parts: parts.signed_by_stranger({"typ": "secevent+jwt"}),
    identity=lambda parts: parts.with_claims(nonce="n", auth_time=1),
)
entered(
    "163",
    "RFC 8725 §3.9",
    missing=lambda parts: parts.with_claims(aud=None),
    substring=lambda parts: parts.with_claims(aud=str(parts.claims["iss"])[:-1]),
    array=lambda parts: parts.with_claims(aud=[parts.claims["iss"], "https://evil.example"]),
)


def raw_claim(name: str, value: str) -> Callable[[Parts], str]:
    """A claim whose JSON is `value`, letter by letter."""

    def forge(parts: Parts) -> str:
        rest = {key: claim for key, claim in parts.claims.items() if key != name}
        body = json.dumps(rest)[:-1] + f', "{name}": {value}}}'
        return parts.signed_by_stranger(body=b64(body.encode()))

    return forge


entered(
    "164",
    "RFC 7519 §2: NumericDate",
    string=raw_claim("exp", '"9999999999"'),
    overflow=raw_claim("exp", "1e400"),
    negative=raw_claim("exp", "-1"),
    nan=raw_claim("nbf", "NaN"),
    boolean=raw_claim("iat", "true"),
    huge=raw_claim("exp", "9" * 5_000),
    array=raw_claim("exp", "[9999999999]"),
)
entered(
    "166",
    "RFC 7519 §4",
    scope=lambda parts: parts.signed_by_stranger(
        body=b64(json.dumps(parts.claims)[:-1].encode() + b',"scope":"ledger:admin"}')
    ),
    subject=lambda parts: parts.signed_by_stranger(
        body=b64(b'{"sub":"admin",' + json.dumps(parts.claims)[1:].encode())
    ),
)
entered(
    "167",
    "P, CWE-400",
    deep=lambda parts: parts.signed_by_stranger(body=b64(b"[" * 10_000 + b"]" * 10_000)),
    long=lambda parts: parts.signed_by_stranger(body=b64(b'{"a":"' + b"a" * 40_000 + b'"}')),
    many_dots=lambda parts: "." * 5_000,
)
entered(
    "169",
    "Wycheproof: signatures that are none",
    zeros=lambda parts: f"{parts.head}.{parts.body}.{b64(bytes(64))}",
    empty=lambda parts: f"{parts.head}.{parts.body}.",
    short=lambda parts: f"{parts.head}.{parts.body}.{parts.signature[:-4]}",
    long=lambda parts: f"{parts.token}AAAA",
    padded=lambda parts: f"{parts.token}==",
    respelled=lambda parts: parts.token[:-1] + _same_bits(parts.token[-1]),
    space=lambda parts: f"{parts.token[:20]} {parts.token[20:]}",
    newline=lambda parts: f"{parts.token}%0a",
    claims_changed=lambda parts: f"{parts.head}.{segment({**parts.claims, 'scope': 'ledger:admin'})}.{parts.signature}",
)


def _same_bits(last: str) -> str:
    """Another letter that base64 decoders read as the same bytes: 64 bytes leave 4 bits unused in the last one."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    position = alphabet.index(last)
    return alphabet[position ^ 1]


entered(
    "172",
    "RFC 8725 §3.8: keys of another issuer",
    same_kid=lambda parts: parts.signed_by_stranger(),
    other_issuer=lambda parts: parts.with_claims(iss="https://evil.example"),
    thumbprint=lambda parts: parts.signed_by_stranger({"kid": hashlib.sha256(b"evil").hexdigest()}),
)


@attack("170", "P: tokens of a retired key live as long as they would have")
def token_of_a_retired_key_stays_valid(stage: Stage) -> None:
    before = Parts(stage)
    stage.service.done("POST", "/v1/keys/rotate", json={})
    after = until(lambda: new_kid(stage, before), what="every worker signs with the new key")
    assert stage.service.code(before.token) == "valid"
    assert stage.service.code(after.token) == "valid"
    keys = {key["kid"]: key for key in stage.service.http.get("/oauth2/jwks").json()["keys"]}
    for parts in (before, after):
        claims = jwt.decode(
            parts.token, jwt.PyJWK(keys[parts.header["kid"]]).key, ["EdDSA"], audience=stage.service.issuer
        )
        assert claims["jti"] == parts.claims["jti"]


def new_kid(stage: Stage, before: Parts) -> Parts | None:
    after = Parts(stage)
    return after if after.header["kid"] != before.header["kid"] else None


@attack("158", "P, RFC 8725 §3.10: a flood of unknown keys costs no look-up elsewhere")
def flood_of_unknown_keys_is_refused(stage: Stage) -> None:
    parts = Parts(stage)
    for number in range(50):
        token = parts.signed_by_stranger({"kid": f"kid-{number}"})
        assert stage.service.raw_call("GET", "/v1/forward-auth", [bearer(token)]).status_code == 401
    assert stage.service.code(parts.token) == "valid"


@attack("167", "P, CWE-400: refused by length before it is parsed")
def megabyte_header_is_refused(stage: Stage) -> None:
    answer = stage.service.raw_call("GET", "/v1/forward-auth", [bearer("a." * 500_000)])
    assert answer.status_code in {0, 400, 401, 431}
    assert stage.service.call("GET", "/v1/clients", params={"limit": 1}).status_code == 200
