"""Everything that is revoked and could still matter, from the current-token view.

Followers of the feed begin with it, or begin anew when the feed no longer reaches back to where they stood. What has
expired matters to nobody, and clients, users and keys that are cut off are told however long ago that was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from datetime import datetime, timedelta
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from events.types import Reason
from projections.current import CurrentReader, Freshness
from projections.grants import ActiveGrant, Ended, Grant, RevokedGrant, Token, facts
from projections.registry import Client, Cut, User
from projections.revocations import Revocation, What
from projections.tables import KID

SKEW = timedelta(minutes=5)  # a clock that is late takes a token for good so much longer
_ROWS = 50  # looked at in one go, half a millisecond if all of them are revoked

_decode_token = msgspec.msgpack.Decoder(Token).decode
_decode_grant: Any = msgspec.msgpack.Decoder(tuple[int, Grant]).decode
_decode_cut = msgspec.msgpack.Decoder(Cut).decode
_decode_owner: dict[str, Any] = {
    "client": msgspec.msgpack.Decoder(Client).decode,
    "user": msgspec.msgpack.Decoder(User).decode,
}


class Revoked(Revocation, frozen=True, kw_only=True, gc=False):
    """As an announcement says it. `what`: token, grant, client, subject or key.

    `ledger_seq`: of the event that revoked it; of a disabled client or user, that of its last event.
    """

    what: What


class Found(Struct, frozen=True, gc=False):
    """`batches`: what is revoked, after every so many rows that were looked at. True at `fresh.position`."""

    fresh: Freshness
    batches: Iterator[list[Revoked]]


@contextlib.contextmanager
def revoked(view: CurrentReader, moment: datetime) -> Iterator[Found]:
    """All in one read transaction, which is open for as long as the context.

    Raises: lmdb.Error from `batches` when the view was put in place of by another meanwhile.
    """
    with view.reading() as (txn, tables, fresh):
        scan = _Scan(txn, tables, moment - SKEW)
        yield Found(fresh, scan.batches())


class _Scan:
    def __init__(self, txn: Any, tables: dict[str, Any], moment: datetime) -> None:
        self._txn = txn
        self._tables = tables
        self._moment = moment

    def batches(self) -> Iterator[list[Revoked]]:
        for table, look in (("token", self._token), ("grant", self._grant), ("cut", self._cut)):
            yield from self._rows(table, look)

    def _rows(self, table: str, look: Any) -> Generator[list[Revoked]]:
        found: list[Revoked] = []
        with self._txn.cursor(db=self._tables[table]) as cursor:
            for number, (key, raw) in enumerate(cursor, 1):
                found += look(key, raw)
                if number % _ROWS == 0:
                    yield found
                    found = []
        yield found

    def _get(self, table: str, key: bytes) -> bytes | None:
        value: bytes | None = self._txn.get(key, db=self._tables[table])
        return value

    def _token(self, key: bytes, raw: bytes) -> list[Revoked]:
        token = _decode_token(raw)
        ended = token.ended
        if ended is None or token.expires_at < self._moment:
            return []
        raw_grant = self._get("grant", token.grant_id)
        known = facts(_decode_grant(raw_grant)[1]) if raw_grant is not None else None
        return [_of_token(key, token, known, ended)]

    def _grant(self, key: bytes, raw: bytes) -> list[Revoked]:
        _, grant = _decode_grant(raw)
        known = facts(grant)
        found = []
        if isinstance(grant, RevokedGrant) and self._matters(key):
            ended = grant.ended
            found.append(
                Revoked(
                    what="grant",
                    grant_id="grt_" + key.hex(),
                    **_owners(known),
                    reason=ended.reason,
                    revoked_at=ended.at,
                    ledger_seq=ended.seq,
                )
            )
        if known is not None and known.rotated_from is not None:
            found += self._superseded(bytes.fromhex(known.rotated_from[4:]))
        return found

    def _matters(self, grant_key: bytes) -> bool:
        """Whether a token of the grant is still good by its expiry. One whose tokens nobody knows matters."""
        with self._txn.cursor(db=self._tables["grant_token"]) as cursor:
            if not cursor.set_key(grant_key):
                return True
            for token_key in cursor.iternext_dup():
                raw = self._get("token", token_key)
                if raw is None or _decode_token(raw).expires_at >= self._moment:
                    return True
        return False

    def _superseded(self, token_key: bytes) -> list[Revoked]:
        """The token that another took the place of: it ends, or ended, when the view says that it expires."""
        raw = self._get("token", token_key)
        if raw is None:
            return []
        token = _decode_token(raw)
        raw_grant = self._get("grant", token.grant_id)
        if token.ended is not None or raw_grant is None:
            return []
        seq, grant = _decode_grant(raw_grant)
        return [_of_token(token_key, token, facts(grant), Ended(seq, token.expires_at, Reason.ROTATED))]

    def _cut(self, key: bytes, raw: bytes) -> list[Revoked]:
        cut = _decode_cut(raw)
        if key.startswith(KID):
            kid = key.removeprefix(KID).decode()
            return [Revoked(what="key", kid=kid, **_since(cut), ledger_seq=cut.seq)]
        table, name, prefix = ("client", "client_id", "cli_")
        owner = self._get(table, key)
        if owner is None:
            table, name, prefix = ("user", "subject", "usr_")
            owner = self._get(table, key)
        if owner is None:
            return []
        # The mark of a disabled owner does not say which event it was.
        seq = _decode_owner[table](owner).seq if cut.disabled else cut.seq
        told: dict[str, Any] = {name: prefix + key.hex()}
        what: What = "client" if table == "client" else "subject"
        return [Revoked(what=what, **told, **_since(cut), ledger_seq=seq)]


def _of_token(key: bytes, token: Token, known: ActiveGrant | None, ended: Ended) -> Revoked:
    return Revoked(
        what="token",
        token_id="tok_" + key.hex(),
        token_sha256=token.sha256.hex(),
        grant_id="grt_" + token.grant_id.hex(),
        **_owners(known),
        reason=ended.reason,
        revoked_at=ended.at,
        ledger_seq=ended.seq,
    )


def _since(cut: Cut) -> dict[str, Any]:
    return {"issued_before": cut.at, "reason": cut.reason, "revoked_at": cut.at}


def _owners(known: ActiveGrant | None) -> dict[str, Any]:
    return {} if known is None else {"client_id": known.client_id or UNSET, "subject": known.subject}
