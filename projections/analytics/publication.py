"""What auditors' queries read: the store's tables as Parquet files that never change.

The store itself is open in one process only, and no query of theirs may slow that one down. So it publishes copies: of
the tables' new rows since the last time, and the segments of uses as they are, by a second name. All files of one
publication are of one transaction, whose positions in LEDGER and USAGE every answer names. A file that later ones
replace stays until the last query that may read it has ended.

Nothing of it is kept over a restart: it can be made again from the store, and old files of another store cannot be
taken for this one's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections import Counter
from itertools import count
from pathlib import Path

import duckdb
import pyarrow as pa
import structlog
from msgspec import Struct
from pyarrow import parquet

from events.streams import LEDGER, USAGE
from projections.analytics.store import Analytics

log = structlog.get_logger()

_ROW_GROUP_ROWS = 122_880
_CLOSED_ROWS = 1_000_000  # a file of so many rows is never written anew with what came later
_ID = "'{prefix}_' || replace({column}::VARCHAR, '-', '') AS {column}"


def _id(column: str, prefix: str) -> str:
    return _ID.format(column=column, prefix=prefix)


# Tables that rows are only added to, by the column that says in which order, and what is copied. Rows with the same
# number are committed together.
_TOKEN_IDS = "list_transform(token_ids, lambda one: 'tok_' || replace(one::VARCHAR, '-', '')) AS token_ids"
_EVENTS = f"""ledger_seq, recorded_at, occurred_at, type, done_by, request_id, subject, client_id, user_id,
    {_id("grant_id", "grt")}, {_TOKEN_IDS}, body::VARCHAR AS body"""
_ISSUED = f"""{_id("token_id", "tok")}, {_id("grant_id", "grt")}, ledger_seq, grant_seq, kind, client_id, subject,
    scope, audience, issued_at, expires_at, lower(hex(sha256)) AS sha256, kid, {_id("rotated_from", "tok")}"""
_ENDS = f"""ledger_seq, what, {_id("token_id", "tok")}, {_id("grant_id", "grt")}, client_id, subject, cuts_before_seq,
    ended_at, reason, kid"""
_TABLES: dict[str, tuple[str, str]] = {
    "events": ("ledger_seq", _EVENTS),
    "issued_tokens": ("ledger_seq", _ISSUED),
    "ends": ("ledger_seq", _ENDS),
    "used_tokens": ("token_no", f"token_no, {_id('token_id', 'tok')}"),
    "origins": ("origin_no", "*"),
    "recent_uses": ("block_seq", "*"),
    "refused": ("block_seq", "*"),
    "gaps": ("block_seq", "*"),
    "usage_minutes": ("segment_no", "*"),
    "usage_hours": ("segment_no", "*"),
    "usage_days": ("segment_no", "*"),
}
SEGMENTS = "segments"  # the name of the sealed uses among the tables of a publication


class _File(Struct, frozen=True):
    """Rows whose number is in (`after`, `last`]."""

    path: Path
    after: int
    last: int
    rows: int


class Publication(Struct, frozen=True):
    """Files by table, and the positions that they are true at. To be given back with `Publisher.release`."""

    files: dict[str, tuple[Path, ...]]
    ledger_seq: int
    usage_seq: int


class Publisher:
    """Publishes when asked, from any thread, one publication at a time."""

    def __init__(self, analytics: Analytics, directory: Path) -> None:
        self._analytics = analytics
        self._directory = directory
        self._publishing = threading.Lock()
        self._bookkeeping = threading.Lock()
        self._tables: dict[str, list[_File]] = {}
        self._segments: dict[str, Path] = {}
        self._opened = 0
        self._stale: set[Path] = set()
        self._readers: Counter[Path] = Counter()
        self._numbers = count(1)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700, parents=True)

    def publish(self) -> Publication:
        """Everything that is committed now. Raises: duckdb.Error, OSError."""
        with self._publishing:
            cursor = self._analytics.cursor()
            try:
                cursor.begin()
                return self._publish(cursor)
            finally:
                with contextlib.suppress(duckdb.Error):
                    cursor.rollback()
                cursor.close()

    def release(self, publication: Publication) -> None:
        """Nobody reads it any more. Files that later ones have replaced go with their last reader."""
        with self._bookkeeping:
            self._readers.subtract(path for paths in publication.files.values() for path in paths)
        self._clear()

    def _publish(self, cursor: duckdb.DuckDBPyConnection) -> Publication:
        positions = dict(cursor.execute("SELECT stream, seq FROM positions").fetchall())
        if self._opened != self._analytics.opened:
            # The store was begun anew, and its numbers with it.
            with self._bookkeeping:
                self._replaced({}, {})
            self._opened = self._analytics.opened
        tables = {name: self._table(cursor, name) for name in _TABLES}
        segments = {file.name: self._segment(file) for file in self._analytics.segment_files(cursor)}
        files = {name: tuple(file.path for file in kept) for name, kept in tables.items()}
        files[SEGMENTS] = tuple(segments.values())
        with self._bookkeeping:
            self._replaced(tables, segments)
            self._readers.update(path for paths in files.values() for path in paths)
        self._clear()
        return Publication(files, positions[LEDGER], positions[USAGE])

    def _table(self, cursor: duckdb.DuckDBPyConnection, name: str) -> list[_File]:
        """The files of a table: those there are, and one with what is new."""
        order, _ = _TABLES[name]
        files = list(self._tables.get(name, ()))
        last = files[-1].last if files else -1
        ((known, new, end),) = cursor.execute(
            f"SELECT count(*) FILTER ({order} <= $last), count(*) FILTER ({order} > $last), max({order}) FROM {name}",  # noqa: S608 - names of ours
            {"last": last},
        ).fetchall()
        if known != sum(file.rows for file in files):
            # Rows have gone, by age or into a segment.
            files, new = [], known + new
        if files and not new:
            return files
        # As many of the last files are written anew with it as keeps their number at the logarithm of the rows'.
        rows = new
        while files and files[-1].rows <= min(2 * rows, _CLOSED_ROWS):
            rows += files.pop().rows
        after = files[-1].last if files else -1
        return [*files, self._write(cursor, name, after, end if end is not None else -1)]

    def _write(self, cursor: duckdb.DuckDBPyConnection, name: str, after: int, last: int) -> _File:
        order, columns = _TABLES[name]
        path = self._directory / f"{name}-{next(self._numbers):08}.parquet"
        rows = 0
        asked = cursor.sql(f"SELECT {columns} FROM {name} WHERE {order} > {after:d} AND {order} <= {last:d}")  # noqa: S608 - names of ours
        reader = asked.to_arrow_reader(_ROW_GROUP_ROWS)
        schema = reader.schema
        with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_table(pa.Table.from_batches([batch], schema))
                rows += batch.num_rows
        return _File(path, after, last, rows)

    def _segment(self, file: Path) -> Path:
        """A second name of the segment's file, so that the store may drop its own whenever it likes."""
        name = f"segment-{file.name}"
        path = self._directory / name
        if file.name not in self._segments:
            path.unlink(missing_ok=True)
            os.link(file, path)
        return path

    def _replaced(self, tables: dict[str, list[_File]], segments: dict[str, Path]) -> None:
        """Puts a publication in the place of the one before."""
        before = {file.path for files in self._tables.values() for file in files} | {*self._segments.values()}
        after = {file.path for files in tables.values() for file in files} | {*segments.values()}
        self._tables, self._segments = tables, segments
        self._stale |= before - after

    def _clear(self) -> None:
        """Removes what is no more published and not being read."""
        with self._bookkeeping:
            self._readers = +self._readers
            gone = {path for path in self._stale if path not in self._readers}
            self._stale -= gone
        for path in gone:
            path.unlink(missing_ok=True)
