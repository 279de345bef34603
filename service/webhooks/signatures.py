"""Secrets of webhooks and what they sign. Source: Standard Webhooks 1.0, symmetric signatures."""

from __future__ import annotations

import base64
import hmac
import secrets
from collections.abc import Iterable

SECRET_BYTES = 32
_PREFIX = "whsec_"


def new_secret() -> str:
    """`whsec_` and base64 of 32 random bytes."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def signed_headers(keys: Iterable[str], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers. With several secrets, as while one replaces another, there is a signature of each."""
    content = f"{message_id}.{timestamp}.".encode() + body
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{_signature(key, content)}" for key in keys),
    }


def _signature(key: str, content: bytes) -> str:
    raw = base64.b64decode(key.removeprefix(_PREFIX))
    return base64.b64encode(hmac.digest(raw, content, "sha256")).decode()
