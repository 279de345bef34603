"""Token strings, identifiers and hashes.

A reference token is `tl_<kind>_<43 base62 digits of 32 random bytes><6 base62 digits of a CRC-32>`. The checksum lets
a scanner find leaked tokens and lets a typo be refused before any look-up; it is no protection.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
import zlib
from datetime import UTC, datetime
from typing import Literal

from events.types import Kind

TOKEN_CHARS_MAX = 4096  # a JWT with a long scope stays far below; nothing longer is hashed

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]
_RANDOM_CHARS = 43
_CHECK_CHARS = 6
_LENGTH = len("tl_at_") + _RANDOM_CHARS + _CHECK_CHARS
_LENGTH_LONG = _LENGTH + 1  # `pat` and `sat` have three letters

_SECRET = re.compile(r"tl_[a-z]{2,3}_[0-9A-Za-z]+|eyJ[0-9A-Za-z_-]{8,}(?:\.[0-9A-Za-z_-]*)*")

Prefix = Literal["at", "rt", "pat", "sat", "ac", "cs"]
_KINDS: dict[Kind, Prefix] = {
    Kind.ACCESS: "at",
    Kind.REFRESH: "rt",
    Kind.PAT: "pat",
    Kind.SAT: "sat",
    Kind.CODE: "ac",
}


def mint(prefix: Prefix) -> str:
    """A new reference token, code (`ac`) or client secret (`cs`): 256 random bits."""
    body = f"tl_{prefix}_{random_base62()}"
    return body + checksum(body)


def mint_kind(kind: Kind) -> str:
    """A new reference token of this kind."""
    return mint(_KINDS[kind])


def random_base62() -> str:
    """256 random bits in 43 letters and digits."""
    return _base62(int.from_bytes(secrets.token_bytes(32)), _RANDOM_CHARS)


def checksum(body: str) -> str:
    """Six base62 digits of the CRC-32 of everything before them."""
    high, low = divmod(zlib.crc32(body.encode()), 62**4)
    middle, low = divmod(low, 62**2)
    return _PAIRS[high] + _PAIRS[middle] + _PAIRS[low]


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def well_formed(token: str) -> bool:
    """Whether this may be a token of ours: a reference token with a right checksum, or something shaped like a JWT."""
    if len(token) > TOKEN_CHARS_MAX or not token.isascii():
        return False
    if token.startswith("tl_"):
        if len(token) != _LENGTH and len(token) != _LENGTH_LONG:
            return False
        return checksum(token[:-_CHECK_CHARS]) == token[-_CHECK_CHARS:]
    return token.startswith("eyJ") and token.count(".") == 2


def redacted(text: str) -> str:
    """`text` without tokens and secrets, for what is kept: people paste them into paths and headers."""
    if "tl_" not in text and "eyJ" not in text:
        return text
    return _SECRET.sub(lambda match: match[0][:7] + "…", text)


def sha256(token: str) -> bytes:
    """The hash under which a token or secret is kept, raw, 32 bytes."""
    return hashlib.sha256(token.encode()).digest()


def new_id(prefix: Literal["tok", "grt", "cli", "usr", "fnd", "sub", "whk", "ses"]) -> str:
    """A new identifier: the prefix and a UUIDv7 (RFC 9562 §5.7) in hex, so that ids sort by time."""
    return f"{prefix}_{uuid7_hex()}"


def uuid7_hex() -> str:
    """32 hex digits: milliseconds since 1970, version, 74 random bits."""
    random = int.from_bytes(secrets.token_bytes(10))
    value = (time.time_ns() // 1_000_000) << 80 | random
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return f"{value:032x}"


def is_id(identifier: str, prefix: Literal["tok", "grt", "cli", "usr", "fnd", "sub", "whk", "ses"]) -> bool:
    """Whether this is an identifier with this prefix, to the letter."""
    return (
        len(identifier) == 36
        and identifier[:4] == prefix + "_"
        and all(digit in "0123456789abcdef" for digit in identifier[4:])
    )


def now() -> datetime:
    """The host's clock, UTC."""
    return datetime.now(UTC)
