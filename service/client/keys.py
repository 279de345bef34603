"""The ledger's public keys: fetched, kept, and fetched again when they are due or one is missing. Source: RFC 7517."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError

from .clock import boot_seconds
from .errors import LedgerClientError, Unreachable

log = logging.getLogger("token_ledger")

_KEYS_MAX = 64
_ID_TOKENS = "id-"  # so begin the ids of the keys that sign ID tokens, and nothing that is taken here
_RSA_BITS_MIN = 2048
_REFRESH_SECONDS = 300.0
COOL_DOWN_SECONDS = 10.0
_FIRST_PAUSE_SECONDS = 0.5

Verify = Callable[[bytes, bytes], bool]  # of what was signed and its signature


class PublicKey:
    """One key and the only algorithm that it is used with."""

    def __init__(self, algorithm: str, verify: Verify, jwk: dict[str, Any]) -> None:
        self.algorithm = algorithm
        self.verify = verify
        self.jwk = jwk


class PublicKeys:
    """`get` never waits; `fetch` asks the ledger, at most once in a cool-down whoever asks for it."""

    def __init__(self, fetch_document: Callable[[], Awaitable[Any]], *, cool_down_seconds: float) -> None:
        self._fetch_document = fetch_document
        self._cool_down_seconds = cool_down_seconds
        self._keys: dict[str, PublicKey] = {}
        self._asked_at = -float("inf")
        self._fetching = asyncio.Lock()
        self.failed = False  # the last time they were asked for
        self.generation = 0  # grows when one is taken away: what it signed was verified for the last time
        self.fetches = 0

    @property
    def known(self) -> bool:
        return bool(self._keys)

    def get(self, kid: str) -> PublicKey | None:
        return self._keys.get(kid)

    @property
    def may_fetch(self) -> bool:
        """Whether a key that is not known may be asked for: a flood of made-up key ids causes no flood of questions."""
        return boot_seconds() - self._asked_at >= self._pause_seconds

    @property
    def may_come(self) -> bool:
        """Whether a key that is not known may yet be one of the ledger's."""
        return self.failed or self._fetching.locked() or self.may_fetch or not self._keys

    def renew(self) -> None:
        """What is known of them is out of date: they may be fetched again at once, by whoever lacks one."""
        self._asked_at = -float("inf")

    @property
    def _pause_seconds(self) -> float:
        return self._cool_down_seconds if self._keys else min(_FIRST_PAUSE_SECONDS, self._cool_down_seconds)

    async def fetch(self) -> None:
        """Raises: Unreachable, Refused. What was known stays known then."""
        async with self._fetching:
            if not self.may_fetch:
                return
            self._asked_at = boot_seconds()
            self.fetches += 1
            self.failed = True
            before, self._keys = self._keys, _keys_of(await self._fetch_document())
            self.failed = False
            if any(kid not in self._keys or self._keys[kid].jwk != key.jwk for kid, key in before.items()):
                self.generation += 1

    async def keep(self) -> None:
        """Fetches them from time to time, so that a key which was announced is known when it begins to sign."""
        while True:
            try:
                await self.fetch()
                seconds = _REFRESH_SECONDS
            except LedgerClientError:
                seconds = self._pause_seconds
            except Exception:
                log.exception("the ledger's keys cannot be read")
                seconds = self._pause_seconds
            await asyncio.sleep(seconds)


def _keys_of(document: Any) -> dict[str, PublicKey]:
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list) or len(listed) > _KEYS_MAX:
        raise Unreachable("the ledger's key set cannot be read")
    found: dict[str, PublicKey] = {}
    for one in listed:
        key = _key_of(one) if isinstance(one, dict) else None
        kid = one.get("kid") if key is not None else None
        if key is not None and isinstance(kid, str) and not kid.startswith(_ID_TOKENS):
            found[kid] = key
    return found


def _key_of(one: dict[str, Any]) -> PublicKey | None:
    """None for a key that is not for signatures, or of a kind that is not taken here."""
    if one.get("use", "sig") != "sig":
        return None
    # The algorithm follows from the key, never from the token (RFC 8725 §3.1).
    algorithm = {"OKP": "EdDSA", "EC": "ES256", "RSA": "RS256"}.get(str(one.get("kty")))
    if algorithm is None or one.get("alg", algorithm) != algorithm:
        return None
    try:
        parsed = jwt.PyJWK(one, algorithm=algorithm)
    except jwt.PyJWTError:
        return None
    key = parsed.key
    if isinstance(key, ed25519.Ed25519PublicKey):
        return PublicKey(algorithm, _ed25519(key.public_bytes_raw()), one)
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < _RSA_BITS_MIN:
        return None
    if isinstance(key, ec.EllipticCurvePublicKey) and not isinstance(key.curve, ec.SECP256R1):
        return None
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        return None
    return PublicKey(algorithm, lambda signed, signature: parsed.Algorithm.verify(signed, key, signature), one)


def _ed25519(key: bytes) -> Verify:
    """libsodium's, which takes a third of the time of OpenSSL's, and refuses what has two spellings."""

    def verify(signed: bytes, signature: bytes) -> bool:
        if len(signature) != 64:
            return False
        try:
            crypto_sign_open(signature + signed, key)
        except BadSignatureError:
            return False
        return True

    return verify
