"""The DuckDB file: opened or set aside, filled exactly once, read beside that."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import structlog

from events import codec
from events.errors import UndecodableEvent
from events.streams import LEDGER, USAGE, Connection, RawMessage
from projections.analytics.rows import EventRow, Pending, TokenRow, user_of, uuid_hex
from projections.analytics.schema import ARROW_SCHEMAS, DDL, SCHEMA_VERSION, TABLES, USAGE_TABLES
from projections.base import run

log = structlog.get_logger()

STREAMS = (LEDGER, USAGE)
SET_ASIDE_FILES_MAX = 2
_NUMBERS_MAX = 200_000  # token numbers kept in memory, some 25 MB; the others are looked up
_TRIM_SECONDS = 3600.0
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - DuckDB's TIMESTAMP has no zone; all of ours are UTC
_CORRUPT = ("corrupt", "checksum", "not a valid duckdb", "could not read enough bytes", "deserialize")
_ENVIRONMENT = (
    "permission denied",
    "no space left",
    "is a directory",
    "out of memory",
    "cannot open file",
    "read-only",
)


class AnalyticsError(Exception):
    """The store cannot be used. `str()` is fit for a person; `fix` says what to do."""

    fix = "look at the log of the analytics process"


class AnalyticsBusy(AnalyticsError):
    """Another process owns the file."""

    fix = "stop the service, or the other `token-ledger project analytics`, first"


class AnalyticsCorrupt(AnalyticsError):
    """The file was found damaged while in use, and has been set aside."""

    fix = "start the process again: it rebuilds the store from the log"


def store_file(directory: Path) -> Path:
    """The file of this version's tables. Older versions' files stay beside it until somebody deletes them."""
    return directory / f"analytics-{SCHEMA_VERSION}.duckdb"


def wal(path: Path) -> Path:
    """What DuckDB has committed to and not yet moved into the file."""
    return path.with_name(path.name + ".wal")


def open_analytics(
    directory: Path,
    *,
    memory_bytes_max: int = 512 * 1024**2,
    threads: int = 1,
    niceness: int = 0,
    commit_seconds: float = 0.25,
    batch_rows_max: int = 50_000,
    usage_age_seconds_max: int | None = None,
) -> Analytics:
    """Opens the store in `directory`, which is made if it is missing.

    `memory_bytes_max` and `threads` limit DuckDB; `niceness` is added to the whole process's own, so that it leaves
    the cores to validation. `usage_age_seconds_max`: uses recorded longer ago leave the store, as they leave USAGE.

    Raises: AnalyticsBusy; AnalyticsError if the directory or the disk does not allow it.
    """
    if niceness:
        os.nice(niceness)
    return Analytics(
        directory,
        memory_bytes_max=memory_bytes_max,
        threads=threads,
        commit_seconds=commit_seconds,
        batch_rows_max=batch_rows_max,
        usage_age_seconds_max=usage_age_seconds_max,
    )


async def rebuild(
    nc: Connection,
    directory: Path,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> None:
    """Replays the log into a new file, which then takes the place of the old; if interrupted, the old one stays.

    `progress` is called with stream, position and end; `options` are those of `open_analytics`.

    Raises: AnalyticsBusy while the analytics process runs; AnalyticsError; what `projections.base.run` raises.
    """
    path = store_file(directory)
    scratch = directory / "rebuild"
    with _owned(path):
        shutil.rmtree(scratch, ignore_errors=True)
        built = open_analytics(scratch, **options)
        try:
            await run(nc, built, STREAMS, progress=progress, until_caught_up=True)
            built.flush()
        finally:
            built.close()
    # The old file's remaining log must go first: it would be taken for the new file's.
    wal(path).unlink(missing_ok=True)
    built.path.replace(path)
    if wal(built.path).exists():
        wal(built.path).replace(wal(path))
    shutil.rmtree(scratch)


@contextlib.contextmanager
def _owned(path: Path) -> Iterator[None]:
    """Keeps other processes from opening the file, if it can be opened at all."""
    database = None
    if path.exists():
        try:
            database = duckdb.connect(str(path))
        except duckdb.Error as error:
            if _is_locked(error):
                raise AnalyticsBusy(f"{path} is in use: {error}") from error
    try:
        yield
    finally:
        if database is not None:
            database.close()


class Analytics:
    """The projection of LEDGER and USAGE into DuckDB.

    `apply` decodes and collects; a thread of its own commits what has been collected, at most every
    `commit_seconds` unless `batch_rows_max` rows wait, and then `apply` waits too. `position` is what is committed.
    """

    name = "analytics"
    version = SCHEMA_VERSION

    def __init__(
        self,
        directory: Path,
        *,
        memory_bytes_max: int,
        threads: int,
        commit_seconds: float,
        batch_rows_max: int,
        usage_age_seconds_max: int | None,
    ) -> None:
        self.path = store_file(directory)
        self.listeners: list[Callable[[], None]] = []  # called after every commit and failure, from another thread
        self.confirmed: dict[str, int] = {}
        self._options: dict[str, str | bool | int | float | list[str]] = {
            "threads": threads,
            "memory_limit": f"{memory_bytes_max}B",
            "checkpoint_threshold": "64MiB",
            "enable_external_access": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
        }
        self._commit_seconds = commit_seconds
        self._batch_rows_max = batch_rows_max
        self._usage_age_seconds_max = usage_age_seconds_max
        self._changed = threading.Condition()
        self._writing = threading.Lock()  # held for a transaction that writes
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for older in sorted(directory.glob("analytics-*.duckdb")):
            if older != self.path:
                log.warning("analytics_file_of_another_version", file=str(older), action="delete it when you like")
        self._start()

    # Opening, closing, setting aside

    def _start(self) -> None:
        self._pending = Pending()
        self._wanted: dict[str, int] = {}
        self._failure: Exception | None = None
        self._closing = False
        self._numbers: dict[str, int] = {}
        try:
            self._open()
        except duckdb.Error as error:
            if _is_locked(error):
                raise AnalyticsBusy(f"{self.path} is in use: {error}") from error
            if any(part in str(error).lower() for part in _ENVIRONMENT):
                raise AnalyticsError(f"{self.path} cannot be opened: {error}") from error
            self._set_aside("corrupt", str(error))
            self._open()
        self._seen = dict(self._committed)
        self._thread = threading.Thread(target=self._write_for_ever, name="analytics-writer", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        self._database = duckdb.connect(str(self.path), config=self._options)
        try:
            found = self._database.execute("SELECT table_name FROM duckdb_tables()").fetchall()
            if not found:
                self._database.begin()
                for statement in DDL:
                    self._database.execute(statement)
                rows = [(stream, SCHEMA_VERSION) for stream in STREAMS]
                self._database.executemany("INSERT INTO positions VALUES (?, 0, NULL, NULL, ?)", rows)
                self._database.commit()
            elif {name for (name,) in found} != set(TABLES):
                raise duckdb.CatalogException("the tables are not those of this version")
            positions = self._database.execute("SELECT stream, seq, created FROM positions").fetchall()
            self._committed: dict[str, int] = {stream: seq for stream, seq, _ in positions}
            self._created: dict[str, str | None] = {stream: created for stream, _, created in positions}
            # All rows, always: a result that is not read to its end keeps a transaction open, and so no checkpoint.
            ((highest,),) = self._database.execute("SELECT coalesce(max(token_no), 0) FROM used_tokens").fetchall()
            self._last_number: int = highest
        except duckdb.Error:
            self._database.close()
            raise

    def _set_aside(self, why: str, detail: str) -> None:
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        aside = self.path.with_name(f"{self.path.name}.{why}-{moment}")
        log.error("analytics_set_aside", alarm=True, file=str(self.path), kept_as=str(aside), why=why, detail=detail)
        for part, kept in ((self.path, aside), (wal(self.path), wal(aside))):
            if part.exists():
                part.rename(kept)
        for file in set_aside_files(self.path)[SET_ASIDE_FILES_MAX:]:
            file.unlink(missing_ok=True)
            wal(file).unlink(missing_ok=True)

    def close(self) -> None:
        """Commits what waits and closes the file. Does nothing when it is closed.

        To be called before the process ends: DuckDB complains on standard error about what is still open then.
        """
        self._stop(discard=False)

    def _stop(self, *, discard: bool) -> None:
        with self._changed:
            self._closing = True
            if discard:
                self._pending = Pending()
            self._changed.notify_all()
        self._thread.join()
        with self._writing:
            self._database.close()

    def reset(self) -> None:
        """Begins an empty file. The old one is set aside: what it knows may exist nowhere else any more."""
        self._stop(discard=True)
        self._set_aside("replaced", "the store is rebuilt from the log")
        self._start()

    # Projection

    def position(self, stream: str) -> int:
        return self._committed[stream]

    def belongs_to(self, stream: str, created: str, end: int) -> bool:
        if self._created[stream] is None:
            with self._writing, self.cursor() as cursor:
                cursor.execute("UPDATE positions SET created = ? WHERE stream = ?", [created, stream])
            self._created[stream] = created
        return self._created[stream] == created and self._committed[stream] <= end

    def confirm(self, stream: str, end: int, asked_at_ns: int) -> None:
        self.confirmed[stream] = end

    def apply(self, stream: str, batch: list[RawMessage]) -> None:
        """Collects what the batch holds; waits while `batch_rows_max` rows wait to be written.

        May be called from several threads, one a stream. Raises: UndecodableEvent; whatever stopped the writer.
        """
        self.check()
        for message in batch:
            if message.seq <= self._seen[stream]:
                continue
            recorded_us = message.recorded_at_ns // 1000
            try:
                decoded = codec.decode(message.data) if stream == LEDGER else codec.decode_block(message.data)
            except UndecodableEvent as error:
                # Without the error's text: it quotes the bytes.
                log.error("undecodable", alarm=True, projection=self.name, stream=stream, seq=message.seq)  # noqa: TRY400
                raise UndecodableEvent(f"{stream} sequence {message.seq}: {error}") from error
            with self._changed:
                self._changed.wait_for(self._has_room)
                self.check()
                first = not self._pending.rows
                if stream == LEDGER:
                    self._pending.add_event(message.seq, recorded_us, decoded)  # type: ignore[arg-type]
                else:
                    self._pending.add_block(message.seq, recorded_us, decoded)  # type: ignore[arg-type]
                self._pending.positions[stream] = (message.seq, recorded_us)
                self._seen[stream] = message.seq
                if first or self._is_due():  # a wake-up for every message would cost more than the message
                    self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._pending.rows < self._batch_rows_max or self._failure is not None or self._closing

    def check(self) -> None:
        """Raises what stopped the writer, if anything did."""
        if self._failure is not None:
            raise self._failure
        if self._closing:
            raise AnalyticsError("the analytics store is closed")

    def hasten(self, stream: str, seq: int) -> None:
        """Somebody waits for `seq`: it is committed as soon as it is there."""
        with self._changed:
            self._wanted[stream] = max(seq, self._wanted.get(stream, 0))
            self._changed.notify_all()

    def flush(self) -> None:
        """Waits until all that was applied is committed. Raises: whatever stopped the writer."""
        with self._changed:
            target = dict(self._seen)
            self._wanted |= target
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._failure or all(self._committed[stream] >= seq for stream, seq in target.items())
            )
            self.check()

    # The writer's thread

    def _write_for_ever(self) -> None:
        next_trim = 0.0
        last_commit = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending.rows or self._closing, timeout=_TRIM_SECONDS)
                self._changed.wait_for(self._is_due, timeout=last_commit + self._commit_seconds - time.monotonic())
                taken, self._pending = self._pending, Pending()
                self._changed.notify_all()
                if self._closing and not taken.rows:
                    return
            last_commit = time.monotonic()
            try:
                if taken.rows:
                    self._commit(taken)
                if self._usage_age_seconds_max is not None and time.monotonic() >= next_trim:
                    self.trim(datetime.now(UTC) - timedelta(seconds=self._usage_age_seconds_max))
                    next_trim = time.monotonic() + _TRIM_SECONDS
            except Exception as error:
                self._fail(error)
                return
            with self._changed:
                for stream, (seq, _) in taken.positions.items():
                    self._committed[stream] = seq
                self._changed.notify_all()
            self._tell()

    def _is_due(self) -> bool:
        return (
            self._closing
            or self._pending.rows >= self._batch_rows_max
            or any(
                self._committed[stream] < self._wanted.get(stream, 0) <= seq
                for stream, (seq, _) in self._pending.positions.items()
            )
        )

    def _tell(self) -> None:
        for listener in list(self.listeners):
            listener()

    def report(self, error: Exception) -> None:
        """A query failed: if the file is damaged, it is set aside and `check` raises from now on."""
        if _is_damage(error):
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        failure = error
        if _is_damage(error):
            # Renamed while it is open: the process ends now, and the next one finds no file.
            self._set_aside("corrupt", str(error))
            failure = AnalyticsCorrupt(f"{self.path} is damaged and has been set aside: {error}")
        else:
            log.error("analytics_cannot_write", alarm=True, file=str(self.path), error=str(error))
        with self._changed:
            self._failure = failure
            self._changed.notify_all()
        self._tell()

    def _commit(self, pending: Pending) -> None:
        with self._writing, self.cursor() as cursor:
            cursor.begin()
            tokens, events = _with_owners(cursor, pending)
            _insert(cursor, "grants", pending.grants)
            _insert(cursor, "issued_tokens", tokens)
            _insert(cursor, "events", events)
            _insert(cursor, "ends", pending.ends)
            if pending.use_token_ids:
                self._number_tokens(cursor, set(pending.use_token_ids))
                numbers = self._numbers
                columns = pending.uses | {"token_no": [numbers.get(one) for one in pending.use_token_ids]}  # type: ignore[arg-type]
                _insert_columns(cursor, "uses", columns)
            _insert(cursor, "refused", pending.refused)
            _insert(cursor, "gaps", pending.gaps)
            for stream, (seq, recorded_us) in pending.positions.items():
                moment = _EPOCH + timedelta(microseconds=recorded_us)
                cursor.execute("UPDATE positions SET seq = ?, recorded_at = ? WHERE stream = ?", [seq, moment, stream])
            cursor.commit()

    def _number_tokens(self, cursor: duckdb.DuckDBPyConnection, token_ids: set[str | None]) -> None:
        token_ids.discard(None)
        wanted: list[str] = [one for one in token_ids if one is not None and one not in self._numbers]
        if not wanted:
            return
        if len(self._numbers) + len(wanted) > _NUMBERS_MAX:
            self._numbers.clear()
            wanted = [one for one in token_ids if one is not None]
        hexes = [uuid_hex(one) for one in wanted]
        cursor.register("wanted", pa.table({"i": range(len(wanted)), "id": hexes}))
        known = cursor.execute(
            "SELECT w.i, t.token_no FROM used_tokens t "
            "JOIN (SELECT i, id::UUID AS id FROM wanted) w ON t.token_id = w.id"
        ).fetchall()
        cursor.unregister("wanted")
        for index, number in known:
            self._numbers[wanted[index]] = number
        new = []
        for token_id, as_hex in zip(wanted, hexes, strict=True):
            if token_id not in self._numbers:
                self._last_number += 1
                self._numbers[token_id] = self._last_number
                new.append((self._last_number, as_hex))
        _insert(cursor, "used_tokens", new)

    def trim(self, before: datetime) -> None:
        """Forgets uses that were recorded before. Their space is given back as whole row groups become empty."""
        with self._writing, self.cursor() as cursor:
            cursor.begin()
            for table in USAGE_TABLES:
                cursor.execute(
                    f"DELETE FROM {table} WHERE recorded_at < ?",  # noqa: S608
                    [before.astimezone(UTC).replace(tzinfo=None)],
                )
            cursor.commit()

    # Reading

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection of its own to the same database, for one thread. The caller closes it."""
        return self._database.cursor()

    def file_bytes(self) -> int:
        return sum(file.stat().st_size for file in (self.path, wal(self.path)) if file.exists())


def set_aside_files(path: Path) -> list[Path]:
    """Files that were set aside, the newest first."""
    files = [file for file in path.parent.glob(f"{path.name}.*-*") if file.suffix != ".wal"]
    return sorted(files, key=lambda file: file.name.rpartition("-")[2], reverse=True)


def _is_locked(error: duckdb.Error) -> bool:
    return "could not set lock" in str(error).lower()


def _is_damage(error: Exception) -> bool:
    return isinstance(error, duckdb.Error) and any(part in str(error).lower() for part in _CORRUPT)


def _with_owners(cursor: duckdb.DuckDBPyConnection, pending: Pending) -> tuple[list[TokenRow], list[EventRow]]:
    """Tokens and events with the owner of their grant, which only the grant's first event names.

    Only an earlier event may name it, or the rows would depend on where batches end.
    """
    wanted = {row.grant_id for row in pending.tokens if row.grant_seq is None}
    wanted |= {row.grant_id for row in pending.events if row.grant_id is not None and row.subject is None}
    owners = {row.grant_id: (row.subject, row.client_id, row.ledger_seq) for row in reversed(pending.grants)}
    if wanted:
        cursor.register("wanted", pa.table({"id": list(wanted)}))
        found = cursor.execute(
            "SELECT g.grant_id, g.subject, g.client_id, g.ledger_seq FROM grants g "
            "JOIN (SELECT id::UUID AS id FROM wanted) w ON g.grant_id = w.id ORDER BY g.ledger_seq DESC"
        ).fetchall()
        cursor.unregister("wanted")
        owners |= {grant_id.hex: (subject, client_id, seq) for grant_id, subject, client_id, seq in found}

    def owner(row: TokenRow | EventRow) -> tuple[str, str | None, int] | None:
        named = owners.get(row.grant_id) if row.grant_id is not None and row.subject is None else None
        return named if named is not None and named[2] < row.ledger_seq else None

    tokens, events = [], []
    for token in pending.tokens:
        named = owner(token)
        tokens.append(token._replace(subject=named[0], client_id=named[1], grant_seq=named[2]) if named else token)
    for event in pending.events:
        named = owner(event)
        user_id = user_of(named[0], named[1]) if named else None
        events.append(event._replace(subject=named[0], client_id=named[1], user_id=user_id) if named else event)
    return tokens, events


def _insert(cursor: duckdb.DuckDBPyConnection, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
    columns = list(zip(*rows, strict=True))
    if columns:
        names = ARROW_SCHEMAS[table].names
        _insert_columns(cursor, table, dict(zip(names, columns, strict=True)))


def _insert_columns(cursor: duckdb.DuckDBPyConnection, table: str, columns: dict[str, Any]) -> None:
    schema = ARROW_SCHEMAS[table]
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    cursor.register("batch", pa.Table.from_arrays(arrays, schema=schema))
    cursor.execute(f"INSERT INTO {table} SELECT * FROM batch")  # noqa: S608 - the names are the schema's own
    cursor.unregister("batch")
