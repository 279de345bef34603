"""The inside of a validator in the hands of a test: keys of its own, and knowledge that it gives itself."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from service.client.keys import PublicKeys
from service.client.knowledge import Knowledge
from service.client.offline import Offline
from service.client.verdicts import Asked, Verdict
from service.tokens import uuid7_hex

ISSUER, AUDIENCE = "https://ledger.example", "https://api.example"
KINDS: dict[str, Any] = {"EdDSA": OKPAlgorithm, "ES256": ECAlgorithm, "RS256": RSAAlgorithm}


def part(value: Any) -> str:
    """A part of a JWT: of bytes as they are, of anything else as JSON."""
    raw = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def claims(**changes: Any) -> dict[str, Any]:
    """Those of a good access token; one that is given as None is left out."""
    now = int(time.time())
    found = {
        "iss": ISSUER,
        "sub": f"usr_{uuid7_hex()}",
        "aud": AUDIENCE,
        "exp": now + 3600,
        "iat": now,
        "jti": f"tok_{uuid7_hex()}",
        "client_id": f"cli_{uuid7_hex()}",
        "scope": "orders:read orders:write",
        "grant_id": f"grt_{uuid7_hex()}",
    }
    return {name: value for name, value in (found | changes).items() if value is not None}


class Validator:
    """Keys of all three kinds, whose documents count how often they were asked for."""

    def __init__(self) -> None:
        self.private: dict[str, Any] = {
            "EdDSA": ed25519.Ed25519PrivateKey.generate(),
            "ES256": ec.generate_private_key(ec.SECP256R1()),
            "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
        }
        self.document: Any = {"keys": [self.public(name) for name in self.private]}
        self.asked = 0
        self.knowledge = Knowledge()
        self.knowledge.complete_at = float("inf")
        self.keys = PublicKeys(self._keys, cool_down_seconds=3600)
        self.offline = Offline(
            self.knowledge,
            self.keys,
            None,
            issuer=ISSUER,
            audience=(AUDIENCE,),
            stale_seconds_max=5,
            tokens_max=100,
            reference_seconds_max=10,
        )

    def public(self, name: str, **changes: Any) -> dict[str, Any]:
        jwk = KINDS[name].to_jwk(self.private[name].public_key(), as_dict=True)
        return {**jwk, "kid": name, "alg": name, "use": "sig"} | changes

    async def _keys(self) -> Any:
        self.asked += 1
        return self.document

    def signed(self, payload: Any, header: Any = None, *, by: str = "EdDSA") -> str:
        """Header and payload as they are, with the signature that belongs to them."""
        head = {"alg": by, "kid": by, "typ": "at+jwt"} if header is None else header
        text = f"{part(head)}.{part(payload)}"
        signature = jwt.get_algorithm_by_name(by).sign(text.encode(), self.private[by])
        return f"{text}.{part(signature)}"

    def token(self, *, by: str = "EdDSA", **changes: Any) -> str:
        return self.signed(claims(**changes), by=by)

    def check(self, token: str, asked: Asked = Asked()) -> Verdict:  # noqa: B008 - frozen
        verdict = self.offline.check(token, asked)
        assert verdict is not None
        return verdict


def announcement(seq: int, what: str, at: datetime, *, reason: str = "admin", **named: Any) -> bytes:
    """As the feed has it. `named` are its names, and `revoked_at` if it is not `at`."""
    data = {"reason": reason, "revoked_at": at.isoformat(), "ledger_seq": seq, **named}
    kind = f"token-ledger.{what}.revoked.v1"
    event = {"specversion": "1.0", "id": str(seq), "source": ISSUER, "type": kind, "time": at.isoformat(), "data": data}
    return json.dumps(event).encode()


async def snapshot(seq: int, *revocations: dict[str, Any], feed: str = "feed", count: int = -1) -> AsyncIterator[bytes]:
    """Lines of one; `count` is what its end says, if that is not the truth."""
    taken_at = datetime.now(UTC).isoformat()
    yield json.dumps({"feed": feed, "ledger_seq": seq, "taken_at": taken_at}).encode()
    for number, one in enumerate(revocations, 1):
        yield json.dumps({"reason": "admin", "revoked_at": taken_at, "ledger_seq": number, **one}).encode()
    end = {"end": True, "revocations": len(revocations) if count < 0 else count}
    yield json.dumps(end, separators=(",", ":")).encode()
