"""The current-token view: what is true now, in LMDB, for fast validation.

One process a host writes (`CurrentWriter`); all API workers read (`CurrentReader`). Rows and position commit in one
transaction, so a restart resumes exactly there. A deleted file is rebuilt from the log.

Tables, key → value (`array_like` MessagePack unless said otherwise; ids are the 16 bytes behind their prefix):

    token         token id → grants.Token            hash          SHA-256 of the token string → token id
    grant         grant id → (seq, grants.Grant)     grant_token   grant id → token ids
    client_token  client id → token ids              subject_token user id → token ids
    expiry        minute at which the row may go → token ids
    code          SHA-256 of an authorization code → grant id: no door that takes tokens looks here
    code_expiry   minute at which the row may go → keys of `code`
    user_code     user id → grant ids, while the code is not redeemed and so no token leads to the grant
    cut           client or user id, or `kid ` and a key's id → registry.Cut, only where there is one
    client, user, username, scope, key               id, user id, keyed hash, name, kid → the row of registry.py
    session       session id → registry.Session      user_session  user id → session ids
    session_expiry  minute at which the row may go → session ids
    consent       user id and client id → registry.Consent
    meta          `state` → position, confirmed (boot time, ns), boot id; `origin` → when the stream was created
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import lmdb
import msgspec
from msgspec import Struct

from events import codec
from events.errors import LedgerUnavailable
from events.streams import LEDGER, RawMessage
from events.types import (
    CHANGING_NO_TOKEN,
    AccessRenewed,
    AuthorizationGranted,
    CodeRedeemed,
    CodeRefused,
    CodeReplayed,
    GrantRevoked,
    Kind,
    Recorded,
    RefreshReplayed,
    TokenIssued,
    TokenRefreshed,
    TokenRevoked,
    TokenSuperseded,
)
from projections import grants, registry
from projections.base import boot_time_ns
from projections.grants import Family, Grant, NoGrant, Token, facts
from projections.registry import Client, Consent, Cut, Row, Session, User
from projections.tables import (
    DECODERS,
    KID,
    TABLES,
    Batch,
    consent_key,
    index_values,
    newest_values,
    open_tables,
    raw_id,
    row_key,
)

VERSION = 3
KEPT_AFTER_EXPIRY = timedelta(days=7)
_SESSION_KEPT_AFTER_EXPIRY = timedelta(hours=1)
_MAP_BYTES = 256 * 1024**3  # address space, not disk: the file grows as it is used
_READERS_MAX = 512
_TRIM_ROWS_MAX = 500
_TRIM_SECONDS = 1.0
_TRIM_AGE_NS_MAX = 10 * 1_000_000_000
_READER_CHECK_SECONDS = 10
_NO_STATE = (0, 0, bytes(16), False)
_RECENT_MAX = 4096  # decoded tokens that a reader remembers, as long as nothing changes
_STATE = struct.Struct("<QQ16s?")  # position, confirmed, boot id, retired
_NO_GRANT = NoGrant()

_encode = msgspec.msgpack.Encoder().encode
_decode_token = msgspec.msgpack.Decoder(Token).decode
_decode_grant: Any = msgspec.msgpack.Decoder(tuple[int, Grant]).decode
_decode_cut = msgspec.msgpack.Decoder(Cut).decode


def view_path(data_dir: Path) -> Path:
    """A changed layout is a new, numbered file, built by replay."""
    return data_dir / "view" / f"current-{VERSION}.mdb"


_owner_key = functools.lru_cache(maxsize=10_000)(raw_id)


def boot_id() -> bytes:
    """Tells one start of the host from another, 16 bytes: boot time means nothing across them."""
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))


class Hit(Struct, frozen=True, gc=False):
    """What the view knows of one token, read in one transaction. The cuts are None where there is none.

    `key_cut`: of the key that signed it.
    """

    token_id: str
    token: Token
    grant: Grant
    client_cut: Cut | None
    subject_cut: Cut | None
    key_cut: Cut | None = None


class Freshness(Struct, frozen=True, gc=False):
    """`position`: the last applied sequence. `age_seconds`: since the view was last known to be complete."""

    position: int
    age_seconds: float


@contextlib.contextmanager
def _naming(path: Path, how: int) -> Iterator[None]:
    """While it is held (`LOCK_SH` to open, `LOCK_EX` to change), `path` keeps naming the same file."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (path.parent / f"{path.name}.naming").open("w") as file:
        fcntl.flock(file, how)
        yield


def _take_name(built: Path, path: Path) -> None:
    """Gives the file `built` the name `path`. Only while nobody opens either.

    LMDB's lock file changes its name with its data file. It holds the last transaction's number, by which readers
    pick the newer one of a file's two roots: two data files with one lock file would mislead each other's readers.
    """
    built.rename(path)
    Path(f"{built}-lock").rename(f"{path}-lock")


def _open(path: Path, *, readonly: bool, sync: bool) -> tuple[lmdb.Environment, dict[str, Any]]:
    """The file that `path` names; one that was never written is made, empty and unconfirmed, whole or not at all."""
    while True:
        with _naming(path, fcntl.LOCK_SH):
            env = _environment(path, readonly=readonly, sync=sync) if path.exists() else None
        if env is not None:
            return env, open_tables(env)
        with _naming(path, fcntl.LOCK_EX):
            if not path.exists():
                _take_name(_make_file(path), path)


def _make_file(path: Path) -> Path:
    """An empty view beside `path`."""
    made = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    env = _environment(made, readonly=False, sync=True, create=True)
    open_tables(env, create=True)
    env.close()
    return made


def _environment(path: Path, *, readonly: bool, sync: bool, create: bool = False) -> lmdb.Environment:
    return lmdb.open(
        str(path),
        map_size=_MAP_BYTES,
        subdir=False,
        max_dbs=len(TABLES),
        max_readers=_READERS_MAX,
        readonly=readonly,
        create=create,
        mode=0o600,
        # Crash-safe: data pages are on disk before the meta page names them. The last transactions before a power
        # cut may be lost, and are read again from the log.
        sync=sync,
        metasync=False,
        readahead=False,
    )


class ViewBusy(RuntimeError):
    """Another process writes the view."""

    fix = "stop the service, or the other `token-ledger project current`, first"


class CurrentWriter:
    """The only writer of the view on a host. Raises at construction if another one runs."""

    name = "current"
    version = VERSION

    def __init__(self, path: Path, *, sync: bool = True) -> None:
        self.path = path
        self._sync = sync
        self._boot_id = boot_id()
        self._readers_checked = self._trimmed = 0.0
        self._untrimmed = 0  # events applied since
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = (path.parent / f"{path.name}.writer").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise ViewBusy(f"another projector writes {path}") from None
        self._open()

    def _open(self) -> None:
        self.env, self._db = _open(self.path, readonly=False, sync=self._sync)
        with self.env.begin() as txn:
            self._position, confirmed, boot, _ = _state(txn, self._db)
        # Boot time means nothing across boots: under this one's id an old time could lie in the future.
        self._confirmed = confirmed if boot == self._boot_id else 0

    @contextlib.contextmanager
    def _write(self) -> Iterator[Any]:
        """A write transaction on the file that is in force, whoever replaced it meanwhile."""
        while True:
            txn = self.env.begin(write=True)
            if not _state(txn, self._db)[3]:
                break
            txn.abort()
            self.env.close()
            self._open()
        with txn:
            yield txn

    def position(self, stream: str) -> int:
        return self._position if stream == LEDGER else 0

    def belongs_to(self, stream: str, created: str, end: int) -> bool:
        with self._write() as txn:
            origin = txn.get(b"origin", db=self._db["meta"])
            if origin is None and self._position == 0:
                txn.put(b"origin", created.encode(), db=self._db["meta"])
                return True
            return bool(origin == created.encode() and self._position <= end)

    def reset(self) -> None:
        """Starts an empty file in place of this one. Readers are told by the mark in the old one."""
        made = _make_file(self.path)
        with self.env.begin(write=True) as txn:
            _replace(txn, self._db, made, self.path)
        self.env.close()
        self._open()

    def apply(self, stream: str, batch: list[RawMessage]) -> None:
        """One transaction for the batch. Nothing of it is applied if this raises.

        Raises: UndecodableEvent; LedgerUnavailable if events are missing before it.
        """
        events = [
            Recorded(seq=m.seq, recorded_at=m.recorded_at, subject=m.subject, event=codec.decode(m.data)) for m in batch
        ]
        if time.monotonic() - self._readers_checked > _READER_CHECK_SECONDS:
            # A reader that was killed in the middle of a transaction would keep every later page from reuse.
            self.env.reader_check()
            self._readers_checked = time.monotonic()
        if not events:
            self._trim_if_fresh()
            return
        with self._write() as txn:
            position = _state(txn, self._db)[0]
            if events[0].seq > position + 1:
                raise LedgerUnavailable(f"event {position + 1} is missing before {events[0].seq}: reading again")
            rows = Batch(txn, self._db)
            for recorded in events:
                if recorded.seq > position:
                    self._fold(rows, recorded)
            rows.write()
            position = max(position, events[-1].seq)
            self._put_state(txn, position)
        self._position = position
        self._untrimmed += len(events)
        if time.monotonic() - self._trimmed > _TRIM_SECONDS:
            self._trim_if_fresh()

    def _trim_if_fresh(self) -> None:
        """Not in the middle of a replay: a grant that looks long expired there may have been refreshed since."""
        if self._confirmed and boot_time_ns() - self._confirmed < _TRIM_AGE_NS_MAX:
            self.trim(datetime.now(UTC), rows_max=max(_TRIM_ROWS_MAX, 2 * self._untrimmed))
            self._trimmed, self._untrimmed = time.monotonic(), 0

    def _put_state(self, txn: Any, position: int) -> None:
        state = _STATE.pack(position, self._confirmed, self._boot_id, False)
        txn.put(b"state", state, db=self._db["meta"])

    def confirm(self, stream: str, end: int, asked_at_ns: int) -> None:
        """Notes that at boot time `asked_at_ns` the log ended at `end`, all of which is in the view."""
        with self._write() as txn:
            position = _state(txn, self._db)[0]
            if position < end:
                return
            self._confirmed = asked_at_ns
            self._put_state(txn, position)

    def _fold(self, rows: Batch, recorded: Recorded) -> None:
        event = recorded.event
        match event:
            case TokenIssued() | CodeRefused() | CodeReplayed() | RefreshReplayed() | GrantRevoked():
                self._fold_grant(rows, recorded, event.grant_id, ())
            case CodeRedeemed():
                self._fold_grant(rows, recorded, event.grant_id, ())
                key = raw_id(event.grant_id)
                known = facts(_decode_grant(raw)[1]) if (raw := rows.get("grant", key)) else None
                if known is not None:
                    rows.remove("user_code", _owner_key(known.subject), key)
            case AuthorizationGranted():
                self._fold_grant(rows, recorded, event.grant_id, ())
                key = bytes.fromhex(event.code.sha256)
                rows.put("code", key, raw_id(event.grant_id))
                rows.add("code_expiry", _minute(event.code.expires_at + KEPT_AFTER_EXPIRY), key)
                rows.add("user_code", _owner_key(event.subject), raw_id(event.grant_id))
            case AccessRenewed():
                self._fold_grant(rows, recorded, event.grant_id, (event.refresh_token_id,))
            case TokenRefreshed():
                self._fold_grant(rows, recorded, event.grant_id, (event.spent_token_id,))
            case TokenRevoked() | TokenSuperseded():
                self._fold_grant(rows, recorded, event.grant_id, (event.token_id,))
            case _ if isinstance(event, CHANGING_NO_TOKEN):
                pass
            case _:
                table, key = row_key(event)
                raw = rows.get(table, key)
                row = registry.evolve(DECODERS[table](raw) if raw else None, recorded)
                rows.put(table, key, _encode(row) if row is not None else None)
                if isinstance(row, Session) and raw is None:
                    rows.add("user_session", raw_id(row.user_id), key)
                    rows.add("session_expiry", _session_expiry_key(row), key)
                if table in {"client", "user", "key"}:
                    owner = KID + key if table == "key" else key
                    old = rows.get("cut", owner)
                    cut = registry.cut(_decode_cut(old) if old else None, recorded)
                    if cut is not None:
                        rows.put("cut", owner, _encode(cut[1]))

    def _fold_grant(self, rows: Batch, recorded: Recorded, grant_id: str, token_ids: tuple[str, ...]) -> None:
        key = raw_id(grant_id)
        raw = rows.get("grant", key)
        seq, grant = _decode_grant(raw) if raw else (0, _NO_GRANT)
        tokens = {}
        for token_id in token_ids:
            raw_token = rows.get("token", raw_id(token_id))
            if raw_token:
                tokens[token_id] = _decode_token(raw_token)
        after = grants.evolve(Family(grant, tokens, seq), recorded)
        if after.grant is not grant or after.seq != seq:
            rows.put("grant", key, _encode((after.seq, after.grant)))
        for token_id, token in after.tokens.items():
            old = tokens.get(token_id)
            if old is token:
                continue
            token_key = raw_id(token_id)
            rows.put("token", token_key, _encode(token))
            if old is None:
                rows.put("hash", token.sha256, token_key)
                rows.add("grant_token", key, token_key)
                rows.add("expiry", _expiry_key(token), token_key)
                for table, owner in _owners(facts(after.grant)):
                    rows.add(table, owner, token_key)
            elif old.expires_at != token.expires_at:
                rows.remove("expiry", _expiry_key(old), token_key)
                rows.add("expiry", _expiry_key(token), token_key)

    def trim(self, now: datetime, *, rows_max: int = _TRIM_ROWS_MAX) -> int:
        """Drops tokens and codes that expired more than seven days before `now`, and sessions that ended.

        Up to `rows_max` of each; returns how many.
        """
        until = _minute(now)
        tables = {"expiry": self._drop, "code_expiry": self._drop_code, "session_expiry": self._drop_session}
        return sum(self._trim(table, until, rows_max, drop) for table, drop in tables.items())

    def _trim(self, table: str, until: bytes, rows_max: int, drop: Callable[[Any, bytes], None]) -> int:
        with self.env.begin() as txn, txn.cursor(db=self._db[table]) as cursor:
            if not cursor.first() or cursor.key() > until:
                return 0
        dropped = 0
        with self._write() as txn, txn.cursor(db=self._db[table]) as cursor:
            while dropped < rows_max and cursor.first() and cursor.key() <= until:
                key = cursor.value()
                cursor.delete()
                drop(txn, key)
                dropped += 1
        return dropped

    def _drop_session(self, txn: Any, key: bytes) -> None:
        raw = txn.pop(key, db=self._db["session"])
        if raw is not None:
            txn.delete(raw_id(DECODERS["session"](raw).user_id), key, db=self._db["user_session"])

    def _drop_code(self, txn: Any, code_key: bytes) -> None:
        grant_key = txn.pop(code_key, db=self._db["code"])
        if grant_key is not None and txn.get(grant_key, db=self._db["grant_token"]) is None:
            raw = txn.pop(grant_key, db=self._db["grant"])
            known = facts(_decode_grant(raw)[1]) if raw else None
            if known is not None:
                txn.delete(_owner_key(known.subject), grant_key, db=self._db["user_code"])

    def _drop(self, txn: Any, token_key: bytes) -> None:
        db = self._db
        raw = txn.pop(token_key, db=db["token"])
        if raw is None:
            return
        token = _decode_token(raw)
        txn.delete(token.sha256, db=db["hash"])
        txn.delete(token.grant_id, token_key, db=db["grant_token"])
        raw_grant = txn.get(token.grant_id, db=db["grant"])
        for table, owner in _owners(facts(_decode_grant(raw_grant)[1]) if raw_grant else None):
            txn.delete(owner, token_key, db=db[table])
        if txn.get(token.grant_id, db=db["grant_token"]) is None:
            txn.delete(token.grant_id, db=db["grant"])

    def dump(self) -> dict[str, list[tuple[bytes, bytes]]]:
        """Every row of every table but `meta`, to compare two views."""
        with self.env.begin() as txn:
            rows = {}
            for name in TABLES:
                if name != "meta":
                    with txn.cursor(db=self._db[name]) as cursor:
                        rows[name] = list(cursor)
            return rows

    def sync(self) -> None:
        """Puts everything on disk."""
        self.env.sync(True)

    def close(self) -> None:
        self.sync()
        self.env.close()
        self._lock.close()


class HeldView:
    """The view in force, whose writer waits until this is closed: so that a rebuilt one can catch up with it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        while True:
            self._env, self._tables = _open(path, readonly=False, sync=True)
            self._txn = self._env.begin(write=True)
            if not _state(self._txn, self._tables)[3]:
                break
            self.close()  # replaced by another while this one waited

    def replace_by(self, built: Path) -> None:
        """Puts a rebuilt file, closed, in the place of the one in force. Its writer and readers move over.

        Raises: ValueError if the rebuilt file is behind, since what was in force would be taken back.
        """
        env = _environment(built, readonly=True, sync=True)
        tables = open_tables(env)
        with env.begin() as txn:
            reached = _state(txn, tables)[0]
        env.close()
        if reached < _state(self._txn, self._tables)[0]:
            raise ValueError(f"the rebuilt view has reached {reached} and the one in force is further")
        _replace(self._txn, self._tables, built, self._path)
        self._txn.commit()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets the writer go on, with this view if it was not replaced."""
        self._txn.abort()
        self._env.close()


def _replace(txn: Any, tables: dict[str, Any], built: Path, path: Path) -> None:
    """The mark in the old file is committed after the new one has taken its name.

    Whoever sees the mark finds the new file, and until then the old one is complete, since its writer is held back.
    """
    with _naming(path, fcntl.LOCK_EX):
        _take_name(built, path)
    txn.put(b"state", _STATE.pack(0, 0, bytes(16), True), db=tables["meta"])


def _state(txn: Any, tables: dict[str, Any]) -> tuple[int, int, bytes, bool]:
    """Position, confirmed, boot id and whether the file was replaced."""
    raw = txn.get(b"state", db=tables["meta"])
    return _STATE.unpack(raw) if raw else (0, 0, bytes(16), False)


def _owners(grant: grants.ActiveGrant | None) -> list[tuple[str, bytes]]:
    """The index tables and keys under which a grant's tokens are found by client and by user."""
    if grant is None:
        return []
    owners = [] if grant.client_id is None else [("client_token", _owner_key(grant.client_id))]
    if grant.subject != grant.client_id:
        owners.append(("subject_token", _owner_key(grant.subject)))
    return owners


def _minute(moment: datetime) -> bytes:
    return (int(moment.timestamp()) // 60).to_bytes(5, "big")


def _expiry_key(token: Token) -> bytes:
    return _minute(token.expires_at + KEPT_AFTER_EXPIRY)


def _session_expiry_key(session: Session) -> bytes:
    return _minute(session.expires_at + _SESSION_KEPT_AFTER_EXPIRY)


class CurrentReader:
    """The view as the API reads it. Every method is one short read transaction and never blocks the writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._boot_id = boot_id()
        self._recent: dict[bytes, tuple[int, Hit]] = {}
        self._open()

    def _open(self) -> None:
        self._recent.clear()
        self.env, tables = _open(self.path, readonly=True, sync=True)
        self._db = tables
        self._hash, self._token, self._grant, self._cut = (tables[n] for n in ("hash", "token", "grant", "cut"))
        self._meta = tables["meta"]

    @contextlib.contextmanager
    def _read(self) -> Iterator[Any]:
        while True:
            txn = self.env.begin()
            raw = txn.get(b"state", db=self._meta)
            if raw is None or not _STATE.unpack(raw)[3]:
                break
            txn.abort()
            self._reopen()
        with txn:
            yield txn

    @contextlib.contextmanager
    def reading(self) -> Iterator[tuple[Any, dict[str, Any], Freshness]]:
        """One read transaction, the tables by name and how fresh they are, for who reads all of them."""
        with self._read() as txn:
            position, confirmed, boot, _ = _state(txn, self._db)
            yield txn, self._db, Freshness(position, self._age_seconds(confirmed, boot))

    def _reopen(self) -> None:
        self.env.close()
        self._open()

    def look_up(self, sha256: bytes) -> tuple[Hit | None, Freshness]:
        """The token with this hash, and how fresh the view was when it was read. `sha256` is raw, 32 bytes."""
        hits, fresh = self.look_up_all((sha256,))
        return hits[0], fresh

    def look_up_all(self, hashes: Sequence[bytes]) -> tuple[list[Hit | None], Freshness]:
        """As `look_up` for each, all in one transaction."""
        # The transaction is opened and closed by hand: this is the hottest function of the service.
        txn = self.env.begin()
        try:
            state = txn.get(b"state", db=self._meta)
            position, confirmed, boot, retired = _STATE.unpack(state) if state is not None else _NO_STATE
            hits = [self._find(txn, sha256, position) for sha256 in hashes]
        finally:
            txn.abort()
        if retired:
            self._reopen()
            return self.look_up_all(hashes)
        return hits, Freshness(position, self._age_seconds(confirmed, boot))

    def _find(self, txn: Any, sha256: bytes, position: int) -> Hit | None:
        # Rows change with the position and not otherwise, so that what was decoded at this one still holds.
        recent = self._recent.get(sha256)
        if recent is not None and recent[0] == position:
            return recent[1]
        token_key = txn.get(sha256, db=self._hash)
        hit = self._hit(txn, token_key) if token_key is not None else None
        if hit is not None:
            if len(self._recent) >= _RECENT_MAX:
                self._recent.clear()
            self._recent[sha256] = (position, hit)
        return hit

    def _age_seconds(self, confirmed: int, boot: bytes) -> float:
        return (boot_time_ns() - confirmed) / 1e9 if boot == self._boot_id and confirmed else float("inf")

    def _hit(self, txn: Any, token_key: bytes) -> Hit | None:
        raw_token = txn.get(token_key, db=self._token)
        if raw_token is None:
            return None
        token = _decode_token(raw_token)
        raw_grant = txn.get(token.grant_id, db=self._grant)
        grant = _decode_grant(raw_grant)[1] if raw_grant is not None else NoGrant()
        known = facts(grant)
        client_cut = subject_cut = None
        if known is not None:
            if known.client_id is not None:
                raw = txn.get(bytes.fromhex(known.client_id[4:]), db=self._cut)
                client_cut = _decode_cut(raw) if raw is not None else None
            if known.subject == known.client_id:
                subject_cut = None
            else:
                raw = txn.get(bytes.fromhex(known.subject[4:]), db=self._cut)
                subject_cut = _decode_cut(raw) if raw is not None else None
        if token.kid is None:
            return Hit("tok_" + token_key.hex(), token, grant, client_cut, subject_cut)
        raw = txn.get(KID + token.kid.encode(), db=self._cut)
        key_cut = _decode_cut(raw) if raw is not None else None
        return Hit("tok_" + token_key.hex(), token, grant, client_cut, subject_cut, key_cut)

    def freshness(self) -> Freshness:
        """How fresh the view is now."""
        txn = self.env.begin()
        try:
            state = txn.get(b"state", db=self._meta)
        finally:
            txn.abort()
        position, confirmed, boot, retired = _STATE.unpack(state) if state is not None else _NO_STATE
        if retired:
            self._reopen()
            return self.freshness()
        return Freshness(position, self._age_seconds(confirmed, boot))

    def hit(self, token_id: str) -> Hit | None:
        """The token with this id. Raises: ValueError if it is not an id."""
        key = raw_id(token_id)
        with self._read() as txn:
            return self._hit(txn, key)

    def family(self, grant_id: str, token_ids: tuple[str, ...] | None = ()) -> Family:
        """The grant with those of its tokens that are named, or with all of them if None."""
        key = raw_id(grant_id)
        keys = [raw_id(token_id) for token_id in token_ids or ()]
        with self._read() as txn:
            raw = txn.get(key, db=self._grant)
            seq, grant = _decode_grant(raw) if raw else (0, NoGrant())
            if token_ids is None:
                keys = index_values(txn, self._db["grant_token"], key)
            rows = {("tok_" + k.hex()): txn.get(k, db=self._token) for k in keys}
        return Family(grant, {k: _decode_token(v) for k, v in rows.items() if v is not None}, seq)

    def grant_of_code(self, sha256: bytes) -> str | None:
        """The id of the grant that the authorization code with this hash, raw, belongs to."""
        with self._read() as txn:
            raw = txn.get(sha256, db=self._db["code"])
        return f"grt_{raw.hex()}" if raw else None

    def cut(self, owner: str) -> Cut | None:
        """The cut-off of a client or user, if there is one."""
        key = raw_id(owner)
        with self._read() as txn:
            raw = txn.get(key, db=self._cut)
        return _decode_cut(raw) if raw else None

    def row(self, table: str, key: bytes) -> Row | None:
        """One row of a registry table. The key is as in the module's table."""
        with self._read() as txn:
            raw = txn.get(key, db=self._db[table])
        return DECODERS[table](raw) if raw else None

    def rows(self, table: str, *, start: bytes = b"", after: bytes = b"", limit: int = 1000) -> list[tuple[bytes, Row]]:
        """Rows of a registry table in the order of their keys, from `start` or from behind `after`."""
        found: list[tuple[bytes, bytes]] = []
        with self._read() as txn, txn.cursor(db=self._db[table]) as cursor:
            start = after + b"\0" if after else start
            on_row = cursor.set_range(start) if start else cursor.first()
            while on_row and len(found) < limit:
                found.append(cursor.item())
                on_row = cursor.next()
        return [(key, DECODERS[table](raw)) for key, raw in found]

    def session(self, session_id: str) -> Session | None:
        """None too for what is not a session id."""
        row = self._by_id("session", session_id, "ses_")
        return row if isinstance(row, Session) else None

    def sessions_of(self, user_id: str, *, after: str | None = None, limit: int = 1000) -> list[Session]:
        """Those of a user that have not been dropped, oldest first, from behind the session `after`."""
        start = raw_id(after) if after else None
        with self._read() as txn:
            keys = index_values(txn, self._db["user_session"], raw_id(user_id), after=start, limit=limit)
            found = [txn.get(key, db=self._db["session"]) for key in keys]
        return [DECODERS["session"](raw) for raw in found if raw is not None]

    def unredeemed_of(self, user_id: str, *, limit: int = 10_000) -> list[str]:
        """Ids of a user's grants whose codes have not been redeemed, whatever became of them, oldest first."""
        with self._read() as txn:
            keys = index_values(txn, self._db["user_code"], raw_id(user_id), limit=limit)
        return ["grt_" + key.hex() for key in keys]

    def consent(self, user_id: str, client_id: str) -> Consent | None:
        """What the user allows the client, or once did. Raises: ValueError if either is not an id."""
        row = self.row("consent", consent_key(user_id, client_id))
        return row if isinstance(row, Consent) else None

    def consents_of(self, user_id: str, *, limit: int = 1000) -> list[Consent]:
        """All of a user, those that were withdrawn too."""
        key = raw_id(user_id)
        rows = self.rows("consent", after=key, limit=limit)
        return [row for at, row in rows if at.startswith(key) and isinstance(row, Consent)]

    def client(self, client_id: str) -> Client | None:
        """None too for what is not a client id."""
        row = self._by_id("client", client_id, "cli_")
        return row if isinstance(row, Client) else None

    def user(self, user_id: str) -> User | None:
        """None too for what is not a user id."""
        row = self._by_id("user", user_id, "usr_")
        return row if isinstance(row, User) else None

    def _by_id(self, table: str, identifier: str, prefix: str) -> Row | None:
        if not identifier.startswith(prefix):
            return None
        try:
            key = raw_id(identifier)
        except ValueError:
            return None
        # bytes.fromhex is lenient about case and blanks; identifiers are compared to the letter.
        return self.row(table, key) if prefix + key.hex() == identifier else None

    def token_ids(
        self,
        *,
        grant_id: str | None = None,
        client_id: str | None = None,
        subject: str | None = None,
        after: str | None = None,
        limit: int = 1000,
    ) -> list[str]:
        """Ids of tokens, oldest first, of one grant, one client or one user, or of all; from behind `after`.

        A client as `subject`: all of the client's, those too that people gave it.
        """
        table, owner = "token", None
        if grant_id is not None:
            table, owner = "grant_token", raw_id(grant_id)
        elif subject is not None and subject.startswith("usr_"):
            table, owner = "subject_token", raw_id(subject)
        elif client_id is not None or subject is not None:
            table, owner = "client_token", raw_id(client_id or subject or "")
        start = raw_id(after) if after else None
        with self._read() as txn:
            if owner is not None:
                keys = index_values(txn, self._db[table], owner, after=start, limit=limit)
            else:
                with txn.cursor(db=self._token) as cursor:
                    on_row = cursor.set_range(start + b"\0") if start else cursor.first()
                    keys = []
                    while on_row and len(keys) < limit:
                        keys.append(cursor.key())
                        on_row = cursor.next()
        return ["tok_" + key.hex() for key in keys]

    def token_ids_of_kind(
        self, user_id: str, kind: Kind, *, after: str | None = None, limit: int = 1000
    ) -> tuple[list[str], str | None]:
        """Those of a kind among the next `limit` tokens of a user, oldest first; where to go on, None at the end."""
        start = raw_id(after) if after else None
        with self._read() as txn:
            keys = index_values(txn, self._db["subject_token"], raw_id(user_id), after=start, limit=limit)
            rows = [(key, txn.get(key, db=self._token)) for key in keys]
        found = ["tok_" + key.hex() for key, raw in rows if raw is not None and _decode_token(raw).kind is kind]
        return found, "tok_" + keys[-1].hex() if len(keys) == limit else None

    def newest_of(self, user_id: str, *, limit: int) -> list[Hit]:
        """The last tokens that speak for a user, newest first."""
        with self._read() as txn:
            keys = newest_values(txn, self._db["subject_token"], raw_id(user_id), limit=limit)
            found = [self._hit(txn, key) for key in keys]
        return [hit for hit in found if hit is not None]

    def stats(self) -> dict[str, int]:
        """Rows by table, bytes in use, and the last sequence applied."""
        info, page = self.env.info(), self.env.stat()["psize"]
        with self._read() as txn:
            counts = {name: txn.stat(self._db[name])["entries"] for name in TABLES}
            used = sum(
                txn.stat(self._db[name])[kind] * page
                for name in TABLES
                for kind in ("branch_pages", "leaf_pages", "overflow_pages")
            )
        return counts | {"bytes_used": used, "bytes_file": (info["last_pgno"] + 1) * page}

    def close(self) -> None:
        self.env.close()


__all__ = ["CurrentReader", "CurrentWriter", "Freshness", "HeldView", "Hit", "ViewBusy", "raw_id", "view_path"]
