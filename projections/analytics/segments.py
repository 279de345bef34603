"""Uses in files that never change: how the tail of the uses becomes one, and how they leave again.

A segment is a Parquet file with a range of USAGE. Its row in `segments`, what it adds to the roll-ups, and the end of
its uses in `recent_uses` are one transaction, and its file is on disk before that. A file without a row is what a
killed process left behind; a row without its file, as it was, is damage.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from projections.analytics.schema import ARROW_SCHEMAS, CALLS, ROLL_UPS

ROW_GROUP_USES = 100_000
_PARQUET = f"FORMAT parquet, COMPRESSION zstd, PARQUET_VERSION v2, ROW_GROUP_SIZE {ROW_GROUP_USES}"
_COLUMNS = ", ".join(ARROW_SCHEMAS["recent_uses"].names)
_GLOB = str.maketrans({"[": "[[]", "*": "[*]"})

# What has come since is sealed together with what is in the file already, and never written to it.
WITH_HELD = f"(SELECT {_COLUMNS} FROM recent_uses UNION ALL SELECT {_COLUMNS} FROM held)"  # noqa: S608 - constants
_ROLL_UP = {
    "usage_hours": """
INSERT INTO usage_hours
SELECT $segment_no, date_trunc('hour', occurred_at), token_no, origin_no, outcome, endpoint, scope,
    count(*), min(occurred_at), max(occurred_at)
FROM {uses} GROUP BY ALL ORDER BY 2, token_no, origin_no""",
    "usage_days": """
INSERT INTO usage_days
SELECT $segment_no, date_trunc('day', hour), token_no, origin_no, outcome, endpoint, scope,
    sum(uses), min(first_at), max(last_at)
FROM usage_hours WHERE segment_no = $segment_no GROUP BY ALL ORDER BY 2, token_no, origin_no""",
    "usage_minutes": """
INSERT INTO usage_minutes
WITH token AS (SELECT token_no, client_id, kind FROM used_tokens JOIN issued_tokens USING (token_id))
SELECT $segment_no, date_trunc('minute', occurred_at) AS minute, token.client_id, token.kind, outcome, endpoint,
    count(*), CASE WHEN token.token_no IS NULL THEN used.token_no END AS unknown_no
FROM {uses} AS used LEFT JOIN token ON token.token_no = used.token_no
GROUP BY ALL ORDER BY minute, client_id""",
    "caller_days": f"""
INSERT INTO caller_days
SELECT $segment_no, day, caller, validations, first_at, last_at FROM ({CALLS}) ORDER BY day, caller""",  # noqa: S608 - names of ours
}


class SegmentDamaged(Exception):
    """A file of a segment is missing or not as it was written."""


def directory_of(database: Path) -> Path:
    """Where the segments of this database file are."""
    return database.with_name(database.name + ".segments")


def enclose(connection: duckdb.DuckDBPyConnection, directory: Path) -> None:
    """From now on the database reads and writes no file but its own and the segments."""
    # DuckDB compares the text of a path, and takes those that it reads for patterns.
    allowed = ", ".join(_text(f"{path}/") for path in (directory, str(directory).translate(_GLOB)))
    connection.execute(f"SET allowed_directories = [{allowed}]")
    connection.execute("SET enable_external_access = false")
    # Segments never change, and every question about uses looks at all of them.
    connection.execute("SET GLOBAL parquet_metadata_cache = true")


def prepare(cursor: duckdb.DuckDBPyConnection, directory: Path) -> None:
    """Makes the view `uses`, removes what a killed process left, and looks at every file.

    Raises: SegmentDamaged
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    known = dict(cursor.execute("SELECT file, file_bytes FROM segments").fetchall())
    for file in directory.iterdir():
        if file.name not in known:
            file.unlink()
    for name, size in known.items():
        file = directory / name
        if not file.exists() or file.stat().st_size != size:
            raise SegmentDamaged(f"{file} is missing or has another size than {size} bytes")
    _show(cursor, directory)


def verify(cursor: duckdb.DuckDBPyConnection, directory: Path, stop: Callable[[], bool]) -> None:
    """Reads every file, until `stop`. Raises: SegmentDamaged."""
    for name, sha256 in cursor.execute("SELECT file, sha256 FROM segments ORDER BY segment_no").fetchall():
        if stop():
            return
        try:
            intact = _sha256(directory / name) == sha256
        except FileNotFoundError:
            intact = False
        if not intact:
            raise SegmentDamaged(f"{directory / name} is missing or not what was written")


def seal(cursor: duckdb.DuckDBPyConnection, directory: Path) -> int:
    """Moves all of `recent_uses` into a segment, in one transaction of the cursor, beside others that write.

    Answers the number of uses, 0 for none. Raises: duckdb.Error, OSError; then nothing has changed.
    """
    cursor.begin()
    try:
        uses = cut(cursor, directory)
        cursor.commit()
    except BaseException:
        with contextlib.suppress(duckdb.Error):
            cursor.rollback()
        raise
    return uses


def cut(cursor: duckdb.DuckDBPyConnection, directory: Path, source: str = "recent_uses") -> int:
    """Makes a segment of the uses of `source`, within the cursor's transaction; `recent_uses` is empty then.

    `source` has all of `recent_uses`, and may have more: `WITH_HELD`. Answers the number of uses, 0 for none.
    """
    row = cursor.execute(
        f"SELECT count(*), min(block_seq), max(block_seq), min(recorded_at), max(recorded_at) FROM {source}"  # noqa: S608 - names of ours
    ).fetchall()[0]
    uses, first_seq, last_seq, *recorded = row
    if not uses:
        return 0
    # A name that was never used: no file is ever written over.
    file = directory / f"uses-{first_seq:012}-{last_seq:012}-{secrets.token_hex(4)}.parquet"
    size, sha256 = _write(cursor, file, source)
    for statement in _ROLL_UP.values():
        cursor.execute(statement.format(uses=source), {"segment_no": first_seq})
    cursor.execute("DELETE FROM recent_uses")
    now = datetime.now(UTC).replace(tzinfo=None)
    values = [first_seq, last_seq, file.name, uses, *recorded, size, sha256, now]
    cursor.execute("INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
    _show(cursor, directory)
    return int(uses)


def drop(cursor: duckdb.DuckDBPyConnection, directory: Path, before: datetime) -> list[Path]:
    """Takes segments out of the store, within the cursor's transaction, all of whose uses were recorded before.

    Answers their files, which a query may still be reading.
    """
    dropped = cursor.execute(
        "SELECT segment_no, file FROM segments WHERE last_recorded_at < ?",
        [before.astimezone(UTC).replace(tzinfo=None)],
    ).fetchall()
    if dropped:
        numbers = [number for number, _ in dropped]
        for table in ("segments", *ROLL_UPS):
            cursor.execute(f"DELETE FROM {table} WHERE segment_no IN (SELECT unnest(?))", [numbers])  # noqa: S608 - names of ours
        _show(cursor, directory)
    return [directory / name for _, name in dropped]


def files(cursor: duckdb.DuckDBPyConnection, directory: Path) -> list[Path]:
    """The segments of the state that the cursor's transaction sees, by their place in USAGE."""
    names = cursor.execute("SELECT file FROM segments ORDER BY segment_no").fetchall()
    return [directory / name for (name,) in names]


def _show(cursor: duckdb.DuckDBPyConnection, directory: Path) -> None:
    named = ", ".join(_text(str(file).translate(_GLOB)) for file in files(cursor, directory))
    sealed = f"SELECT {_COLUMNS} FROM read_parquet([{named}], hive_partitioning = false) UNION ALL " if named else ""  # noqa: S608 - names of ours
    cursor.execute(f"CREATE OR REPLACE VIEW uses AS {sealed}SELECT {_COLUMNS} FROM recent_uses")  # noqa: S608 - names of ours


def _write(cursor: duckdb.DuckDBPyConnection, file: Path, source: str) -> tuple[int, bytes]:
    """Size and SHA-256 of the file, which is on disk under its name then."""
    unfinished = file.with_suffix(".unfinished")
    # In the order in which they were inserted, that is by block_seq.
    cursor.execute(f"COPY (SELECT {_COLUMNS} FROM {source}) TO {_text(unfinished)} ({_PARQUET})")  # noqa: S608 - names of ours
    _sync(unfinished)
    size, sha256 = unfinished.stat().st_size, _sha256(unfinished)
    unfinished.rename(file)
    _sync(file.parent)
    return size, sha256


def _text(value: object) -> str:
    """As a literal, where DuckDB takes no parameter."""
    return "'" + str(value).replace("'", "''") + "'"


def _sha256(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Puts the segments of a rebuilt store beside those of the store in force, whose files are never named so."""
    target.mkdir(mode=0o700, exist_ok=True)
    for file in source.iterdir():
        file.rename(target / file.name)
    _sync(target)


def file_bytes(directory: Path) -> int:
    sizes = 0
    for file in directory.iterdir() if directory.exists() else ():
        with contextlib.suppress(FileNotFoundError):
            sizes += file.stat().st_size
    return sizes


def remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
