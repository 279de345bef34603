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
from events.types import LedgerEvent, UseBlock
from projections.analytics import segments
from projections.analytics.numbers import origin_numbers, token_numbers
from projections.analytics.rows import EventRow, PendingEvents, TokenRow, user_of
from projections.analytics.schema import ARROW_SCHEMAS, DDL, SCHEMA_VERSION, TABLES, arrow_table
from projections.analytics.uses import PendingUses
from projections.base import run

log = structlog.get_logger()

STREAMS = (LEDGER, USAGE)
SET_ASIDE_FILES_MAX = 2
SEGMENT_USES = 1_000_000
SEGMENT_SECONDS = 86_400.0  # between the first and the last use of a segment
_HELD_SECONDS_MAX = 30.0
_ORIGINS_MAX = 200_000  # of the uses that are held: some 50 MB, more than all else of them
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


# The highest number stays, so that none is ever given to another origin.
_FORGET_ORIGINS = """
DELETE FROM origins WHERE origin_no < (SELECT max(origin_no) FROM origins) AND origin_no NOT IN (
    SELECT origin_no FROM usage_days
    UNION ALL SELECT origin_no FROM recent_uses
    UNION ALL SELECT origin_no FROM refused
)"""


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
    threads: int = 2,
    niceness: int = 0,
    commit_seconds: float = 0.25,
    batch_rows_max: int = 50_000,
    usage_age_seconds_max: int | None = None,
    segment_uses: int = SEGMENT_USES,
) -> Analytics:
    """Opens the store in `directory`, which is made if it is missing.

    `memory_bytes_max` and `threads` limit DuckDB; `niceness` is added to the whole process's own, so that it leaves
    the cores to validation. `usage_age_seconds_max`: uses recorded longer ago leave the store, as they leave USAGE.
    `segment_uses`: as many of the newest uses, or those of a day, are kept in the file before they become a segment.

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
        segment_uses=segment_uses,
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
    segments.move(segments.directory_of(built.path), segments.directory_of(path))
    # The old file's remaining log must go first: it would be taken for the new file's.
    wal(path).unlink(missing_ok=True)
    built.path.replace(path)
    if wal(built.path).exists():
        wal(built.path).replace(wal(path))
    shutil.rmtree(scratch)
    open_analytics(directory, **options | {"niceness": 0}).close()  # finds its segments, removes those of the old


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

    `apply` decodes and collects; a thread for each stream commits what has been collected, at most every
    `commit_seconds` unless `batch_rows_max` rows wait, and then `apply` waits too. `position` is what is committed.

    While so many uses are left in USAGE that they make a segment, they do not go through the table of the newest: they
    are collected until they are as many as a segment has, for half a minute at most, and become one while the next
    are collected. Who waits for one of them gets it at once, by way of the table.
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
        segment_uses: int,
    ) -> None:
        self.path = store_file(directory)
        self.segments = segments.directory_of(self.path.absolute())
        self.listeners: list[Callable[[], None]] = []  # called after every commit and failure, from another thread
        self.confirmed: dict[str, int] = {}
        self.opened = 0  # how often a file was: after another time it may be another one
        self._options: dict[str, str | bool | int | float | list[str]] = {
            "threads": threads,
            "memory_limit": f"{memory_bytes_max}B",
            # More than the tail: what is in it is written to the file only if it is still there when it is sealed.
            "checkpoint_threshold": "256MiB",
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "python_enable_replacements": False,
        }
        self._commit_seconds = commit_seconds
        self._batch_rows_max = batch_rows_max
        self._usage_age_seconds_max = usage_age_seconds_max
        self._segment_uses = segment_uses
        self._tokens = token_numbers()
        self._origins = origin_numbers()
        self._dropped: list[Path] = []
        self._changed = threading.Condition()
        self._writing = threading.Lock()  # held for a transaction that writes, but for sealing
        self._sealing = threading.Lock()  # held for what changes segments; taken before `_writing`
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for older in sorted(directory.glob("analytics-*.duckdb")):
            if older != self.path:
                log.warning("analytics_file_of_another_version", file=str(older), action="delete it when you like")
        self._start()

    # Opening, closing, setting aside

    def _start(self) -> None:
        self._pending: dict[str, PendingEvents | PendingUses] = {LEDGER: PendingEvents(), USAGE: PendingUses()}
        self.far_behind = False  # whether the uses that are left make a segment
        self._wanted: dict[str, int] = {}
        self._failure: Exception | None = None
        self._closing = False
        self._sealer: duckdb.DuckDBPyConnection | None = None
        self._suspected = True  # whether the segments are to be read: once after the start, and when a query failed
        try:
            self._open()
        except (duckdb.Error, segments.SegmentDamaged) as error:
            if _is_locked(error):
                raise AnalyticsBusy(f"{self.path} is in use: {error}") from error
            if any(part in str(error).lower() for part in _ENVIRONMENT):
                raise AnalyticsError(f"{self.path} cannot be opened: {error}") from error
            self._set_aside("corrupt", str(error))
            self._open()
        self._seen = dict(self._committed)
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (
                ("analytics-ledger", lambda: self._write_for_ever(LEDGER, self._commit_events)),
                ("analytics-uses", lambda: self._write_for_ever(USAGE, self._commit_uses)),
                ("analytics-sealer", self._seal_for_ever),
            )
        ]
        for thread in self._threads:
            thread.start()

    def _open(self) -> None:
        self.opened += 1
        self._database = duckdb.connect(str(self.path), config=self._options)
        try:
            segments.enclose(self._database, self.segments)
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
            self._tokens.start(self._database)
            self._origins.start(self._database)
            segments.prepare(self._database, self.segments)
            self._measure_tail(self._database)
        except (duckdb.Error, segments.SegmentDamaged):
            self._database.close()
            raise

    def _set_aside(self, why: str, detail: str) -> None:
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        aside = self.path.with_name(f"{self.path.name}.{why}-{moment}")
        log.error("analytics_set_aside", alarm=True, file=str(self.path), kept_as=str(aside), why=why, detail=detail)
        # The segments first: whatever interrupts this, no new file takes them for leavings of its own.
        for part, kept in (
            (self.segments, segments.directory_of(aside)),
            (self.path, aside),
            (wal(self.path), wal(aside)),
        ):
            if part.exists():
                part.rename(kept)
        for file in set_aside_files(self.path)[SET_ASIDE_FILES_MAX:]:
            file.unlink(missing_ok=True)
            wal(file).unlink(missing_ok=True)
        kept_beside = {segments.directory_of(file) for file in set_aside_files(self.path)}
        for left in self.path.parent.glob(f"{self.path.name}.*-*{self.segments.suffix}"):
            if left not in kept_beside:
                shutil.rmtree(left, ignore_errors=True)

    def close(self) -> None:
        """Commits what waits and closes the file. Does nothing when it is closed.

        To be called before the process ends: DuckDB complains on standard error about what is still open then.
        """
        self._stop(discard=False)

    def _stop(self, *, discard: bool) -> None:
        with self._changed:
            self._closing = True
            if discard or self.far_behind:  # they are still in USAGE
                self._pending[USAGE] = PendingUses()
            if discard:
                self._pending[LEDGER] = PendingEvents()
            self._changed.notify_all()
        sealer = self._sealer
        if sealer is not None:
            with contextlib.suppress(duckdb.Error):
                sealer.interrupt()
        for thread in self._threads:
            thread.join()
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
        """Collects what the batch holds; waits while there is no room for it.

        May be called from several threads, one a stream. Raises: UndecodableEvent; whatever stopped the writer.
        """
        self.check()
        for message in batch:
            if message.seq <= self._seen[stream]:
                continue
            recorded_us = message.recorded_at_ns // 1000
            decoded: LedgerEvent | UseBlock
            try:
                decoded = codec.decode(message.data) if stream == LEDGER else codec.decode_block(message.data)
            except UndecodableEvent as error:
                # Without the error's text: it quotes the bytes.
                log.error("undecodable", alarm=True, projection=self.name, stream=stream, seq=message.seq)  # noqa: TRY400 - a trace quotes them too
                raise UndecodableEvent(f"{stream} sequence {message.seq}: {error}") from error
            with self._changed:
                self._changed.wait_for(lambda: self.has_room(stream))
                self.check()
                pending, was_far_behind = self._pending[stream], self.far_behind
                first = not pending.rows
                if isinstance(pending, PendingUses):
                    assert isinstance(decoded, UseBlock)
                    pending.add(message.seq, recorded_us, decoded, message.left)
                    self.far_behind = self._is_far_behind(pending)
                else:
                    assert not isinstance(decoded, UseBlock)
                    pending.add(message.seq, recorded_us, decoded)
                self._seen[stream] = message.seq
                # A wake-up for every message would cost more than the message.
                if first or self._is_due(stream) or was_far_behind != self.far_behind:
                    self._changed.notify_all()

    def has_room(self, stream: str) -> bool:
        return self._pending[stream].rows < self._rows_max(stream) or self._stops()

    def _rows_max(self, stream: str) -> int:
        return max(self._batch_rows_max, self._segment_uses if stream == USAGE and self.far_behind else 0)

    def _is_far_behind(self, pending: PendingUses) -> bool:
        # So few are left to the sealer, or the roll-ups would have many rows of the same.
        enough = max(self._segment_uses // 4, self._batch_rows_max + 1)
        return (
            pending.left > 0
            and pending.uses_to_come() >= enough
            and pending.recorded_seconds() < SEGMENT_SECONDS
            and pending.origins() < _ORIGINS_MAX
        )

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

    # The writers' threads

    def _write_for_ever(self, stream: str, commit: Callable[[Any], None]) -> None:
        last_commit = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending[stream].rows or self._stops())
                pause = last_commit + self._commit_seconds - time.monotonic()
                self._changed.wait_for(lambda: self._is_due(stream), timeout=pause)
                if stream == USAGE:
                    self._changed.wait_for(lambda: not self.far_behind or self._is_due(USAGE), _HELD_SECONDS_MAX)
                    # Were uses to come faster than they are sealed, they would pile up.
                    self._changed.wait_for(lambda: self._tail_uses < 3 * self._segment_uses or self._stops())
                taken = self._pending[stream]
                self._pending[stream] = type(taken)()
                self._changed.notify_all()
                if self._failure is not None or (self._closing and taken.reached is None):
                    return
                if stream == USAGE:
                    self._await_events()
            last_commit = time.monotonic()
            try:
                commit(taken)
            except Exception as error:
                if not (self._closing and isinstance(error, duckdb.InterruptException)):
                    self._fail(error)
                return
            with self._changed:
                assert taken.reached is not None
                self._committed[stream] = taken.reached[0]
                self._changed.notify_all()
            self._tell()

    def _await_events(self) -> None:
        """Waits for the events that came before: uses of tokens of whose issue the store knows nothing look odd."""
        seq = self._seen[LEDGER]
        self._wanted[LEDGER] = max(seq, self._wanted.get(LEDGER, 0))
        self._changed.notify_all()
        self._changed.wait_for(lambda: self._committed[LEDGER] >= seq or self._stops())

    def _stops(self) -> bool:
        return self._closing or self._failure is not None

    def _is_due(self, stream: str) -> bool:
        pending = self._pending[stream]
        return self._stops() or pending.rows >= self._rows_max(stream) or self._is_wanted(stream, pending)

    def _is_wanted(self, stream: str, pending: PendingEvents | PendingUses) -> bool:
        return (
            pending.reached is not None and self._committed[stream] < self._wanted.get(stream, 0) <= pending.reached[0]
        )

    def _tell(self) -> None:
        for listener in list(self.listeners):
            listener()

    def report(self, error: Exception) -> None:
        """A query failed: if a file is damaged, all are set aside and `check` raises from now on, if not at once."""
        if _is_damage(error):
            self._fail(error)
        elif isinstance(error, duckdb.Error):
            # DuckDB does not always say which file it could not read.
            with self._changed:
                self._suspected = True
                self._changed.notify_all()

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

    def _commit_events(self, pending: PendingEvents) -> None:
        with self._writing, self.cursor() as cursor:
            cursor.begin()
            tokens, events = _with_owners(cursor, pending)
            _insert(cursor, "grants", pending.grants)
            _insert(cursor, "issued_tokens", tokens)
            _insert(cursor, "events", events)
            _insert(cursor, "ends", pending.ends)
            _note_position(cursor, LEDGER, pending.reached)
            cursor.commit()

    def _commit_uses(self, pending: PendingUses) -> None:
        is_segment = pending.uses >= max(self._segment_uses // 4, self._batch_rows_max + 1)
        if is_segment and not self._is_wanted(USAGE, pending):
            self._cut(pending)
            return
        with self._writing, self.cursor() as cursor:
            cursor.begin()
            if self._register(cursor, pending):
                cursor.execute("INSERT INTO recent_uses SELECT * FROM held")
            self._insert_others(cursor, pending)
            cursor.commit()
            if pending.uses:
                self._measure_tail(cursor)

    def _cut(self, pending: PendingUses) -> None:
        """Commits them as a segment, together with those that are in the file already, beside others that write."""
        with self._sealing, self.cursor() as cursor:
            self._sealer = cursor
            try:
                cursor.begin()
                self._register(cursor, pending)
                segments.cut(cursor, self.segments, segments.WITH_HELD)
                self._insert_others(cursor, pending)
                cursor.commit()
            finally:
                self._sealer = None
            with self._writing:
                self._measure_tail(cursor)
                self._checkpoint(cursor)

    def _checkpoint(self, cursor: duckdb.DuckDBPyConnection) -> None:
        """After each segment: of many at once it would take seconds, in which nothing is committed.

        `_writing` is held. Nothing is lost if a reader is in the way.
        """
        with contextlib.suppress(duckdb.TransactionException):
            cursor.execute("CHECKPOINT")

    def _register(self, cursor: duckdb.DuckDBPyConnection, pending: PendingUses) -> bool:
        """Shows the uses to the cursor as `held`, if there are any; their tokens and origins have numbers then."""
        uses = pending.table(
            lambda tokens: self._tokens.number(cursor, tokens), lambda origins: self._origins.number(cursor, origins)
        )
        if uses is not None:
            cursor.register("held", uses)
        return uses is not None

    def _insert_others(self, cursor: duckdb.DuckDBPyConnection, pending: PendingUses) -> None:
        if pending.refused:
            numbers = self._origins.number(cursor, [(row[5], None) for row in pending.refused])
            refused = ((*row[:7], number, *row[7:]) for row, number in zip(pending.refused, numbers, strict=True))
            _insert(cursor, "refused", refused)
        _insert(cursor, "gaps", pending.gaps)
        _note_position(cursor, USAGE, pending.reached)

    # The sealer's thread

    def _seal_for_ever(self) -> None:
        next_trim = 0.0
        try:
            while not self._stops():
                if self._suspected:
                    self._suspected = False
                    with self._sealing, self.cursor() as cursor:
                        segments.verify(cursor, self.segments, self._stops)
                if self._usage_age_seconds_max is not None and time.monotonic() >= next_trim:
                    self.trim(datetime.now(UTC) - timedelta(seconds=self._usage_age_seconds_max))
                    next_trim = time.monotonic() + _TRIM_SECONDS
                if self._tail_is_full():
                    self.seal()
                with self._changed:
                    self._changed.wait_for(self._has_upkeep, timeout=_TRIM_SECONDS)
        except Exception as error:
            if not self._closing:
                self._fail(error)

    def _has_upkeep(self) -> bool:
        return self._suspected or self._tail_is_full() or self._stops()

    def _measure_tail(self, cursor: duckdb.DuckDBPyConnection) -> None:
        sql = "SELECT count(*), epoch(max(recorded_at) - min(recorded_at)) FROM recent_uses"
        ((uses, seconds),) = cursor.execute(sql).fetchall()
        self._tail_uses: int = uses
        self._tail_seconds: float = seconds or 0.0

    def _tail_is_full(self) -> bool:
        return self._tail_uses >= self._segment_uses or self._tail_seconds >= SEGMENT_SECONDS

    def seal(self) -> int:
        """Makes a segment of the uses that are committed, while others are written. Answers how many these are."""
        with self._sealing, self.cursor() as cursor:
            self._sealer = cursor
            try:
                uses = segments.seal(cursor, self.segments)
            finally:
                self._sealer = None
            with self._writing:
                self._measure_tail(cursor)
                if uses:
                    self._checkpoint(cursor)
        with self._changed:
            self._changed.notify_all()
        return uses

    def trim(self, before: datetime) -> None:
        """Forgets uses that were recorded before: of the sealed ones whole segments only, and where they came from."""
        with self._sealing:
            # What the last trim took out is read by no query any more.
            segments.remove(self._dropped)
            moment = before.astimezone(UTC).replace(tzinfo=None)
            with self._writing, self.cursor() as cursor:
                cursor.begin()
                self._dropped = segments.drop(cursor, self.segments, before)
                for table in ("recent_uses", "refused", "gaps"):
                    cursor.execute(f"DELETE FROM {table} WHERE recorded_at < ?", [moment])  # noqa: S608 - one of these
                if self._dropped:
                    cursor.execute(_FORGET_ORIGINS)
                cursor.commit()
                self._origins.forget()
                self._measure_tail(cursor)

    # Reading

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection of its own to the same database, for one thread. The caller closes it."""
        return self._database.cursor()

    def segment_files(self, cursor: duckdb.DuckDBPyConnection) -> list[Path]:
        """The files with the sealed uses of the state that the cursor's transaction sees."""
        return segments.files(cursor, self.segments)

    def file_bytes(self) -> int:
        """Of everything that belongs to the store."""
        own = sum(file.stat().st_size for file in (self.path, wal(self.path)) if file.exists())
        return own + segments.file_bytes(self.segments)


def set_aside_files(path: Path) -> list[Path]:
    """Files that were set aside, the newest first."""
    files = [file for file in path.parent.glob(f"{path.name}.*-*") if file.suffix not in (".wal", ".segments")]
    return sorted(files, key=lambda file: file.name.rpartition("-")[2], reverse=True)


def _is_locked(error: Exception) -> bool:
    return "could not set lock" in str(error).lower()


def _is_damage(error: Exception) -> bool:
    if isinstance(error, segments.SegmentDamaged):
        return True
    text = str(error).lower()
    if not isinstance(error, duckdb.Error) or any(part in text for part in _ENVIRONMENT):
        return False
    # Whatever DuckDB says of a segment that it cannot read: nobody else names one.
    return any(part in text for part in _CORRUPT) or ".segments/" in text


def _with_owners(cursor: duckdb.DuckDBPyConnection, pending: PendingEvents) -> tuple[list[TokenRow], list[EventRow]]:
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
        cursor.register("batch", arrow_table(table, dict(zip(names, columns, strict=True))))
        cursor.execute(f"INSERT INTO {table} SELECT * FROM batch")  # noqa: S608 - the names are the schema's own
        cursor.unregister("batch")


def _note_position(cursor: duckdb.DuckDBPyConnection, stream: str, reached: tuple[int, int] | None) -> None:
    assert reached is not None
    seq, recorded_us = reached
    moment = _EPOCH + timedelta(microseconds=recorded_us)
    cursor.execute("UPDATE positions SET seq = ?, recorded_at = ? WHERE stream = ?", [seq, moment, stream])
