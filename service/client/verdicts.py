"""What is said of a token, and the words for it."""

from __future__ import annotations

import functools
import ipaddress
from datetime import datetime
from typing import Literal

from msgspec import Struct

Code = Literal[
    "stale",
    "malformed",
    "unknown",
    "revoked",
    "client_disabled",
    "subject_disabled",
    "not_yet_valid",
    "expired",
    "ip_not_allowed",
    "wrong_audience",
    "insufficient_scope",
    "valid",
]


class Verdict(Struct, frozen=True, gc=False):
    """The answer to "is this token good here, now?".

    `code`: when several hold, the first in the order of `Code`. `stale`: nothing can be said, so the token must be
    refused; `detail` says why. `ledger_seq`: the position of the ledger that the answer is true at. `offline`: the
    ledger was not asked for this answer. The rest is known of tokens that are the ledger's, good or not.
    """

    valid: bool
    code: Code
    ledger_seq: int
    offline: bool
    token_id: str | None = None
    grant_id: str | None = None
    kind: str | None = None
    subject: str | None = None
    client_id: str | None = None
    scope: str | None = None
    audience: tuple[str, ...] = ()
    issued_at: datetime | None = None
    expires_at: datetime | None = None
    detail: str = ""


class Context(Struct, frozen=True, gc=False, omit_defaults=True):
    """Where a token came from, for the record. `ip` also decides about tokens that are bound to addresses."""

    ip: str | None = None
    user_agent: str | None = None
    method: str | None = None
    path: str | None = None


@functools.lru_cache(maxsize=10_000)
def address_of(text: str) -> str | None:
    """An IP address as the ledger takes it; None for what is none, as of a test client or a Unix socket."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return None if "%" in text else str(address)


class Asked(Struct, frozen=True, gc=False):
    """What a token is asked to be good for, and where it came from. `audience` None: for the validator's own names."""

    scope: str = ""
    audience: tuple[str, ...] | None = None
    context: Context | None = None
