"""Token ledger's client: checks access tokens offline, and stops accepting one as soon as it is revoked.

    from token_ledger import SseFeed, TokenValidator

    async with TokenValidator("https://ledger.example", "https://api.example", token=..., feed=SseFeed()) as validator:
        verdict = await validator.validate(token, scope="orders:read")

It imports nothing of the server, is installed alone as `token-ledger[client]`, and is then the package `token_ledger`.
"""

from __future__ import annotations

from .asgi import TokenValidatorMiddleware
from .blocking import SyncTokenValidator
from .errors import LedgerClientError, NotAllowed
from .nats_feed import NatsFeed
from .sse import SseFeed
from .validator import Feed, Status, TokenValidator
from .verdicts import Code, Context, Verdict

__all__ = [
    "Code",
    "Context",
    "Feed",
    "LedgerClientError",
    "NatsFeed",
    "NotAllowed",
    "SseFeed",
    "Status",
    "SyncTokenValidator",
    "TokenValidator",
    "TokenValidatorMiddleware",
    "Verdict",
]
