"""The view's tables: their names, how a transaction writes them, and which event belongs to which row of which."""

from __future__ import annotations

from typing import Any

import lmdb
import msgspec

from events.types import (
    ClientChanged,
    ClientDisabled,
    ClientRegistered,
    ClientRevoked,
    ClientSecretRotated,
    ConsentGiven,
    ConsentWithdrawn,
    KeyActivated,
    KeyIntroduced,
    KeyRemoved,
    KeyRetired,
    KeyRevoked,
    LedgerEvent,
    ScopeChanged,
    ScopeDisabled,
    ScopeRegistered,
    SessionEnded,
    SessionStarted,
    SubjectErased,
    SubjectRevoked,
    UserChanged,
    UserDisabled,
    UsernameClaimed,
    UserPasswordChanged,
    UserRegistered,
)
from projections.registry import Client, Consent, Scope, Session, SigningKey, User, Username

DECODERS: dict[str, Any] = {
    "client": msgspec.msgpack.Decoder(Client).decode,
    "user": msgspec.msgpack.Decoder(User).decode,
    "username": msgspec.msgpack.Decoder(Username).decode,
    "scope": msgspec.msgpack.Decoder(Scope).decode,
    "session": msgspec.msgpack.Decoder(Session).decode,
    "consent": msgspec.msgpack.Decoder(Consent).decode,
    "key": msgspec.msgpack.Decoder(SigningKey).decode,
}
KID = b"kid "  # before a key's id in `cut`, where the other keys are 16 bytes of an id
_INDEXES = ("grant_token", "client_token", "subject_token", "user_code", "user_session")
DUPLICATES = {*_INDEXES, "expiry", "code_expiry", "session_expiry"}
TABLES = ("token", "hash", "grant", "code", "cut", *DECODERS, "meta", *sorted(DUPLICATES))


def open_tables(env: lmdb.Environment, *, create: bool = False) -> dict[str, Any]:
    """Waits for whoever writes, unless the file was opened to be read."""
    return {
        name: env.open_db(name.encode(), create=create, dupsort=name in DUPLICATES, dupfixed=name in DUPLICATES)
        for name in TABLES
    }


class Batch:
    """The rows that one transaction changes: readable at once, written sorted and by the table at its end."""

    def __init__(self, txn: Any, tables: dict[str, Any]) -> None:
        self._txn = txn
        self._tables = tables
        self._rows: dict[str, dict[bytes, bytes | None]] = {name: {} for name in TABLES if name not in DUPLICATES}
        # Whether the pair is to be there: what was said of it last counts.
        self._pairs: dict[str, dict[tuple[bytes, bytes], bool]] = {name: {} for name in DUPLICATES}

    def get(self, table: str, key: bytes) -> bytes | None:
        rows = self._rows[table]
        if key in rows:
            return rows[key]
        value: bytes | None = self._txn.get(key, db=self._tables[table])
        return value

    def put(self, table: str, key: bytes, value: bytes | None) -> None:
        """None deletes the row."""
        self._rows[table][key] = value

    def add(self, table: str, key: bytes, value: bytes) -> None:
        """One more value for a key of an index."""
        self._pairs[table][key, value] = True

    def remove(self, table: str, key: bytes, value: bytes) -> None:
        """Takes a value from a key of an index."""
        self._pairs[table][key, value] = False

    def write(self) -> None:
        for name, rows in self._rows.items():
            kept = sorted((key, value) for key, value in rows.items() if value is not None)
            self._put(name, kept)
            for key, value in rows.items():
                if value is None:
                    self._txn.delete(key, db=self._tables[name])
        for name, pairs in self._pairs.items():
            self._put(name, sorted(pair for pair, there in pairs.items() if there))
            for (key, value), there in pairs.items():
                if not there:
                    self._txn.delete(key, value, db=self._tables[name])

    def _put(self, name: str, items: list[tuple[bytes, bytes]]) -> None:
        if items:
            with self._txn.cursor(db=self._tables[name]) as cursor:
                cursor.putmulti(items)


def index_values(
    txn: Any, table: Any, key: bytes, *, after: bytes | None = None, limit: int = 1_000_000
) -> list[bytes]:
    """Of a key of an index, in their order, from behind `after`."""
    found: list[bytes] = []
    with txn.cursor(db=table) as cursor:
        if after is None:
            on_row = cursor.set_key(key)
        else:
            on_row = cursor.set_range_dup(key, after)
            if on_row and cursor.value() == after:
                on_row = cursor.next_dup()
        while on_row and len(found) < limit:
            found.append(cursor.value())
            on_row = cursor.next_dup()
    return found


def newest_values(txn: Any, table: Any, key: bytes, *, limit: int) -> list[bytes]:
    """The last ones of a key of an index, the very last first."""
    found: list[bytes] = []
    with txn.cursor(db=table) as cursor:
        on_row = cursor.set_key(key) and cursor.last_dup()
        while on_row and len(found) < limit:
            found.append(cursor.value())
            on_row = cursor.prev_dup()
    return found


def raw_id(identifier: str) -> bytes:
    """The 16 bytes of an id such as `tok_…`. Raises: ValueError if it is not one."""
    raw = bytes.fromhex(identifier[4:])
    if len(raw) != 16 or raw.hex() != identifier[4:]:  # fromhex is lenient about case and blanks
        raise ValueError("an id is a prefix and 32 hex digits in lower case")
    return raw


def consent_key(user_id: str, client_id: str) -> bytes:
    """Those of one user stand together. Raises: ValueError if either is not an id."""
    return raw_id(user_id) + raw_id(client_id)


def row_key(event: LedgerEvent) -> tuple[str, bytes]:
    """The registry table and key that an event belongs to."""
    match event:
        case ClientRegistered() | ClientChanged() | ClientSecretRotated() | ClientRevoked() | ClientDisabled():
            return "client", raw_id(event.client_id)
        case (
            UserRegistered()
            | UserChanged()
            | UserPasswordChanged()
            | SubjectRevoked()
            | UserDisabled()
            | SubjectErased()
        ):
            return "user", raw_id(event.user_id)
        case UsernameClaimed():
            return "username", event.username_hash.encode()
        case SessionStarted() | SessionEnded():
            return "session", raw_id(event.session_id)
        case ConsentGiven() | ConsentWithdrawn():
            return "consent", consent_key(event.user_id, event.client_id)
        case ScopeRegistered() | ScopeChanged() | ScopeDisabled():
            return "scope", event.name.encode()
        case KeyIntroduced() | KeyActivated() | KeyRetired() | KeyRemoved() | KeyRevoked():
            return "key", event.kid.encode()
        case _:
            raise TypeError(f"{type(event).__name__} belongs to no registry table")
