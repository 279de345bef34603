"""JWT access tokens, read as strictly as they can be. Source: RFC 7515, RFC 7519, RFC 8725, RFC 9068."""

from __future__ import annotations

import base64
import binascii
import functools
import json
import math
import zlib
from typing import Any, NoReturn

from msgspec import Struct

from .revoked import JWT_SECONDS_MAX

TOKEN_CHARS_MAX = 4096  # the ledger gives none longer; nothing longer is hashed or decoded
_TYPES = frozenset({"at+jwt", "application/at+jwt"})
_LIFE_SECONDS_MAX = JWT_SECONDS_MAX + 60
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_CHECK_CHARS = 6
_DATE_MAX = 253_402_300_799  # the last second of the year 9999, behind which no calendar goes


class Malformed(Exception):
    """It cannot be an access token of any ledger."""


class Jwt(Struct, frozen=True, gc=False):
    """A JWT as it was sent. Nothing of it may be believed before its signature was verified."""

    algorithm: str
    kid: str
    signed: bytes
    signature: bytes
    payload: bytes


class Claims(Struct, frozen=True, gc=False):
    """What an access token says. Times in seconds since 1970. Source: RFC 9068 §2.2."""

    issuer: str
    subject: str
    audience: tuple[str, ...]
    expires_at: float
    issued_at: float
    not_before: float
    token_id: str
    client_id: str
    grant_id: str
    scope: str


def read(token: str) -> Jwt:
    """Its parts. `token` is ASCII and not too long. Raises: Malformed."""
    parts = token.encode().split(b".")
    if len(parts) != 3:
        raise Malformed("not three parts")
    algorithm, kid = _header_of(parts[0])
    return Jwt(algorithm, kid, parts[0] + b"." + parts[1], _bytes(parts[2]), _bytes(parts[1]))


@functools.lru_cache(maxsize=256)  # all tokens of one key begin with the same
def _header_of(part: bytes) -> tuple[str, str]:
    """Algorithm and key id. Raises: Malformed."""
    header = _json_object(_bytes(part))
    kind, algorithm, kid = header.get("typ"), header.get("alg"), header.get("kid")
    # RFC 9068 §4: an ID token or a logout token by the same key is no access token.
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise Malformed("typ is not at+jwt")
    if not isinstance(algorithm, str) or not isinstance(kid, str):
        raise Malformed("alg or kid is missing")
    if "crit" in header:  # RFC 7515 §4.1.11: none is understood here
        raise Malformed("crit names what is not understood")
    return algorithm, kid


def claims_of(payload: bytes) -> Claims:
    """Raises: Malformed unless all that RFC 9068 wants, and `grant_id`, is there and of its type."""
    found = _json_object(payload)
    audience = found.get("aud")
    names = [audience] if isinstance(audience, str) else audience
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise Malformed("aud is not a name or a list of names")
    scope = found.get("scope", "")
    if not isinstance(scope, str):
        raise Malformed("scope is not a string")
    claims = Claims(
        _text(found, "iss"),
        _text(found, "sub"),
        tuple(names),
        _date(found, "exp"),
        _date(found, "iat"),
        _date(found, "nbf") if "nbf" in found else 0.0,
        _text(found, "jti"),
        _text(found, "client_id"),
        _text(found, "grant_id"),
        scope,
    )
    # Its revocation would be forgotten before it ends.
    if claims.expires_at - claims.issued_at > _LIFE_SECONDS_MAX:
        raise Malformed("it lives longer than any token of the ledger")
    return claims


def well_formed_reference(token: str) -> bool:
    """Whether this has the shape and the checksum of a reference token of the ledger."""
    if not 55 <= len(token) <= 56 or not token.isascii():
        return False
    number, digits = zlib.crc32(token[:-_CHECK_CHARS].encode()), []
    for _ in range(_CHECK_CHARS):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return token[-_CHECK_CHARS:] == "".join(reversed(digits))


def _bytes(part: bytes) -> bytes:
    try:
        raw = base64.urlsafe_b64decode(part + b"==")
    except (binascii.Error, ValueError):
        raise Malformed("not base64url") from None
    # The decoder skips what it does not know; one token must have one spelling.
    if base64.urlsafe_b64encode(raw).rstrip(b"=") != part:
        raise Malformed("not base64url")
    return raw


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data.decode(), object_pairs_hook=_unrepeated, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Malformed("not JSON in UTF-8") from None
    if not isinstance(found, dict):
        raise Malformed("not a JSON object")
    return found


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # readers would differ about which one counts
        raise Malformed("a name is repeated")
    return found


def _no_number(text: str) -> NoReturn:
    raise Malformed(f"{text} is no number")


def _text(found: dict[str, Any], name: str) -> str:
    value = found.get(name)
    if not isinstance(value, str) or not value:
        raise Malformed(f"{name} is missing or not a string")
    return value


def _date(found: dict[str, Any], name: str) -> float:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _DATE_MAX:
        raise Malformed(f"{name} is missing or not a time")
    if not math.isfinite(value):
        raise Malformed(f"{name} is not a time")
    return float(value)
