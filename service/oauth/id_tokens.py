"""ID tokens: made, and read again where one comes back as a hint. OpenID Connect Core §2, §3.1.3.6, §3.3.2.11.

They stand in no log: nobody may use one to ask for anything, and they end within minutes. Keys of their own sign them.
"""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime
from typing import Any

import jwt
from msgspec import Struct

from events.errors import LedgerError
from projections.registry import Client
from service.commands import refused
from service.runtime import Runtime
from service.tokens import now

ID_TOKEN_TTL_SECONDS = 300
_HINT_CHARS_MAX = 8192
# The hash that belongs to the signature's algorithm: for EdDSA with Ed25519 that inside of it, RFC 8032 §5.1.
_HASHES = {"RS256": "sha256", "ES256": "sha256", "EdDSA": "sha512"}


class IdTokenFor(Struct, frozen=True):
    """Who signed in and when, and what the ID token comes with: the code, the access token or both, if they are told.

    `claims`: what else is said. It cannot change what follows from the rest.
    """

    subject: str
    auth_time: datetime
    nonce: str | None = None
    code: str | None = None
    access_token: str | None = None
    claims: dict[str, Any] = {}


async def mint_id_token(runtime: Runtime, client: Client, about: IdTokenFor) -> str:
    """A signed ID token for the client. Raises: Unavailable if there is no key for it yet or it cannot be fetched."""
    alg = client.metadata.id_token_signed_response_alg
    at = int(now().timestamp())
    hashed = {"c_hash": about.code, "at_hash": about.access_token}
    claims = {
        **about.claims,
        "iss": runtime.settings.issuer,
        "sub": about.subject,
        "aud": client.client_id,
        "exp": at + ID_TOKEN_TTL_SECONDS,
        "iat": at,
        "auth_time": int(about.auth_time.timestamp()),
        "nonce": about.nonce,
        **{name: half_hash(value, alg) if value is not None else None for name, value in hashed.items()},
    }
    try:
        return await runtime.signing_keys.sign_id_token(
            {name: value for name, value in claims.items() if value is not None}, alg
        )
    except LedgerError as error:
        raise refused(error) from error


def half_hash(value: str, alg: str) -> str:
    """`at_hash` or `c_hash` of a token or code. Source: OpenID Connect Core §3.1.3.6, §3.3.2.11."""
    digest = hashlib.new(_HASHES[alg], value.encode("ascii")).digest()
    return base64.urlsafe_b64encode(digest[: len(digest) // 2]).rstrip(b"=").decode()


def read_id_token_hint(runtime: Runtime, text: str) -> dict[str, Any] | None:
    """The claims of an ID token that this service made, however long ago; None for whatever else it may be.

    Source: OpenID Connect Core §3.1.2.1, RP-Initiated Logout 1.0 §2: one that has expired is taken.
    """
    if len(text) > _HINT_CHARS_MAX:
        return None
    try:
        header = jwt.get_unverified_header(text)
        kid = header.get("kid")
        row = next((row for row in runtime.signing_keys.rows() if row.kid == kid and row.purpose == "id"), None)
        if row is None or row.state == "revoked" or header.get("typ") != "JWT":
            return None
        return jwt.decode(
            text,
            jwt.PyJWK.from_json(row.public_jwk).key,
            algorithms=[row.alg],
            issuer=runtime.settings.issuer,
            options={
                "require": ["iss", "sub", "aud", "exp", "iat"],
                "verify_exp": False,
                "verify_iat": False,  # another host's clock may be ahead
                "verify_aud": False,  # whose it is, the caller wants to know
            },
        )
    except (jwt.PyJWTError, ValueError, RecursionError):
        return None
