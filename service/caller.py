"""Who calls."""

from __future__ import annotations

from msgspec import Struct

ADMIN = "ledger:admin"


class Caller(Struct, frozen=True, gc=False):
    """Who calls the management API. `token` is the string itself, for sealing; it is never logged or stored."""

    token: str
    token_id: str
    subject: str
    client_id: str | None
    scope: frozenset[str]

    def __repr__(self) -> str:
        return f"Caller({self.token_id})"

    def holds(self, scope: str) -> bool:
        """`ledger:admin` holds every `ledger:*` scope."""
        return scope in self.scope or (scope.startswith("ledger:") and ADMIN in self.scope)
