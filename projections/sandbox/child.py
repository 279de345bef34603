"""The process in which an auditor's SQL runs, once, and then ends.

It is given a job on standard input, the files that it may read among it, and answers in frames on standard output. It
needs nothing of this project, has no secret, no network and no file but those, and can write none: the kernel holds it
to that (`_confine`), DuckDB's own locks do (`_database`), and a query is looked at before it runs (`_check`).

A frame is one letter, the length of what follows (4 bytes, big endian), and that: `S` that it has loaded and the
query's time begins, `H` the columns (JSON), `D` bytes of the answer, `E` that it is complete (JSON), `X` why there is
none, or no more of it (JSON).
"""

from __future__ import annotations

import ctypes
import importlib
import io
import json
import os
import re
import resource
import signal
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

FRAME_BYTES = 256 * 1024
# Beside DuckDB's memory, for rows on their way out. DuckDB does not count all that it takes: a value of 1 GB is none
# of its memory. So the limit is that of the kernel.
_ROOM_BYTES = 192 * 1024**2
_BATCH_ROWS = 8192
_ROW_GROUP_ROWS = 122_880
_POLL_SECONDS = 0.02
# While files can still be opened, and no more than the answer needs: Parquet takes as long to load as DuckDB.
_LOADED_BEFORE = {"csv": ("pyarrow.csv",), "parquet": ("pyarrow.parquet",)}
_DESCRIPTORS_MAX = 65_536
_MESSAGE_CHARS_MAX = 600
_KIND_CHARS_MAX = 40
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_LANDLOCK_CREATE, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_READ_FILE, _LANDLOCK_READ_DIR = 1 << 2, 1 << 3
# Rights that a version of Landlock knows: of files, of TCP ports, of abstract sockets and signals.
_LANDLOCK_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_LANDLOCK_FILES_NEWEST = (1 << 16) - 1

# What a query may read besides the views, none of which leaves this process.
_TABLE_FUNCTIONS = {"generate_series", "json_each", "json_tree", "range", "repeat", "repeat_row", "unnest"}
_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
# They tell of this process, or take what only the database itself may give them.
_NAME = re.compile(r"[^\W\d]\w*")  # no file's, which would have a dot
_FUNCTIONS_REFUSED = re.compile(r"current_setting|pg_get_viewdef|write_log|setval|nextval|currval|__internal_.*")
_REFUSED_FIX = 'read the documented views with one SELECT; the README lists them under "SQL for auditors"'
_FORMULA = "'^[=+@\\t\\r\\n-]'"
_NUMBER = re.compile(r"TINYINT|SMALLINT|INTEGER|BIGINT|HUGEINT|UTINYINT|USMALLINT|UINTEGER|UBIGINT|UHUGEINT|BIGNUM")
_WIDE = re.compile(r"U?HUGEINT")
_TOO_WIDE = "a HUGEINT has more than the 38 digits that Arrow can hold: cast it to VARCHAR"
_NESTED = re.compile(r"\]$|^(STRUCT|MAP|UNION|TUPLE)\b")
_NOT_IN_ARROW = re.compile(r"UHUGEINT|BIGNUM|BIT|GEOMETRY|VARIANT|TIME WITH TIME ZONE|UNION")


class Refused(Exception):
    """The query gets no answer. `code` is what programs go by."""

    def __init__(self, code: str, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.fix = fix


class Frames(io.RawIOBase):
    """Standard output. `blocked_seconds`: how long nobody took what was written, which is not the query's fault."""

    def __init__(self) -> None:
        self.written = 0
        self.blocked_seconds = 0.0
        self.blocked_since: float | None = None
        self._waiting = bytearray()

    def frame(self, kind: bytes, payload: bytes | bytearray | memoryview) -> None:
        self.blocked_since = time.monotonic()
        rest = memoryview(kind + struct.pack(">I", len(payload)) + payload)
        while rest:
            rest = rest[os.write(1, rest) :]
        self.blocked_seconds += time.monotonic() - self.blocked_since
        self.blocked_since = None

    def tell_json(self, kind: bytes, value: object) -> None:
        if self._waiting and kind == b"E":
            self.frame(b"D", self._waiting)
        self.frame(kind, json.dumps(value).encode())

    # As a file of Arrow

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.written

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._waiting += view
        self.written += len(view)
        while len(self._waiting) >= FRAME_BYTES:
            self.frame(b"D", self._waiting[:FRAME_BYTES])
            del self._waiting[:FRAME_BYTES]
        return len(view)


def main() -> None:
    parent = int(sys.argv[1])
    os.closerange(3, _DESCRIPTORS_MAX)  # whoever started it may have left some open
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    os.nice(19)
    import duckdb

    job = json.loads(sys.stdin.buffer.read())
    sequences = ("pyarrow.compute",) if job["sequence"] else ()
    for name in ("pyarrow", *sequences, *_LOADED_BEFORE.get(job["format"], ())):
        importlib.import_module(name)
    os.chdir(job["directory"])
    out = Frames()
    try:
        database = _database(job)
        parser = duckdb.connect(":memory:", config={"threads": 1})
        out.frame(b"S", b"")
        threading.Thread(target=_interrupt_late, args=(database, job, out), daemon=True).start()
        _confine(libc, job)
        sql = job["sql"] if job["trusted"] else _check(parser, database, job["sql"], set(job["names"]))
        _answer(database, sql, job, out)
    except Refused as error:
        out.tell_json(b"X", {"code": error.code, "message": str(error), "fix": error.fix})
    except MemoryError:
        out.tell_json(b"X", {"code": "query_too_heavy", "message": _too_much_memory(job), "fix": _LESS})
    except RecursionError:
        out.tell_json(b"X", {"code": "sql_invalid", "message": _TOO_DEEP, "fix": _FLATTER})
    except Exception as error:
        out.tell_json(b"X", _told(error, job) or {"code": "failed", "message": _where(error), "fix": ""})
    # DuckDB's threads may still be at work, and there is nothing to keep.
    os._exit(0)


_LESS = "ask for less: a shorter time, fewer columns or groups, or the views of usage by minute, hour and day"


_TOO_DEEP = "the query is nested too deeply"
_FLATTER = "nest fewer expressions and subqueries: name parts of it in WITH, and use IN (…) for many values"


def _too_much_memory(job: dict[str, Any]) -> str:
    return f"the query needs more than the {job['memory_bytes_max'] // 1024**2} MiB of memory that it may take"


def _where(error: Exception) -> str:
    """Without its text, which may quote the query."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{type(error).__name__} at line {trace.tb_lineno if trace else 0}"


def _told(error: Exception, job: dict[str, Any]) -> dict[str, str] | None:
    """What is said of DuckDB's refusal; None for another error.

    By how its text begins: what is raised after the first rows comes through Arrow, as OSError.
    """
    text = str(error).replace(job["directory"], "…")
    kind, is_duckdb, _ = text.partition(" Error: ")
    if not is_duckdb or len(kind) > _KIND_CHARS_MAX:
        return None
    if "max_expression_depth" in text:  # DuckDB's own advice is to set what is locked
        return {"code": "sql_invalid", "message": _TOO_DEEP, "fix": _FLATTER}
    if kind in {"INTERNAL", "FATAL"} and "alloc" in text:
        return {"code": "query_too_heavy", "message": _too_much_memory(job), "fix": _LESS}
    if job.get("wrapped"):  # the line that it shows is of our making
        text = text.partition("\n\nLINE ")[0]
    text = text if len(text) <= _MESSAGE_CHARS_MAX else text[:_MESSAGE_CHARS_MAX] + "…"
    match kind:
        case "INTERRUPT":
            return {"code": "query_too_heavy", "message": _too_slow(job), "fix": _LESS}
        case "Out of Memory":
            return {"code": "query_too_heavy", "message": _too_much_memory(job), "fix": _LESS}
        case "Permission":
            return {"code": "sql_not_allowed", "message": text, "fix": _REFUSED_FIX}
        case "INTERNAL" | "FATAL" | "IO":
            return {"code": "failed", "message": text, "fix": ""}
        case _:
            return {"code": "sql_invalid", "message": text, "fix": ""}


def _too_slow(job: dict[str, Any]) -> str:
    return f"the query did not end within the {job['seconds_max']:g} s that it may take"


# Walls


def _database(job: dict[str, Any]) -> Any:
    """An empty database in memory whose views read the given files, and which can reach nothing else."""
    import duckdb

    database = duckdb.connect(
        ":memory:",
        config={
            "threads": job["threads"],
            "memory_limit": f"{job['memory_bytes_max']}B",
            "temp_directory": "",
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
            "allow_community_extensions": False,
            "python_enable_replacements": False,
            "enable_external_file_cache": False,
        },
    )
    database.execute("SET TimeZone = 'UTC'")
    database.execute(f"SET allowed_paths = {_literal(job['files'])}")
    database.execute("SET enable_external_access = false")
    for statement in job["views"]:
        database.execute(statement)
    database.execute("SET lock_configuration = true")
    return database


def _literal(texts: list[str]) -> str:
    return "[" + ", ".join("'" + text.replace("'", "''") + "'" for text in texts) + "]"


def _confine(libc: Any, job: dict[str, Any]) -> None:
    """What the kernel refuses from here on, whatever this process tries."""
    limits = {
        resource.RLIMIT_FSIZE: 0,  # a byte written to any file ends the process
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 256 + len(job["files"]),
        resource.RLIMIT_AS: _address_space() + job["memory_bytes_max"] + _ROOM_BYTES,
        resource.RLIMIT_NPROC: 0,  # the threads are there
    }
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (least, least))
    # SIGXCPU ends it, so that the one who started it knows why; SIGKILL comes after.
    seconds = int(job["cpu_seconds_max"])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _landlock(libc, job["files"])


def _address_space() -> int:
    """Bytes that are mapped now: libraries, and stacks of threads that are there already."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("ports", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _Rule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def _landlock(libc: Any, files: list[str]) -> None:
    """Only these files can be opened from now on, to be read, and no port. Does nothing where there is no Landlock.

    Source: Documentation/userspace-api/landlock.rst of Linux.
    """
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return
    rights = _LANDLOCK_FILES.get(version, _LANDLOCK_FILES_NEWEST)
    ruleset = _Ruleset(rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    handle = libc.syscall(_LANDLOCK_CREATE, ctypes.byref(ruleset), size, 0)
    if handle < 0:
        return
    for file in files:
        opened = os.open(file, os.O_PATH | os.O_CLOEXEC)
        rule = _Rule(_LANDLOCK_READ_FILE, opened)
        libc.syscall(_LANDLOCK_ADD_RULE, handle, 1, ctypes.byref(rule), 0)
        os.close(opened)
    libc.syscall(_LANDLOCK_RESTRICT, handle, 0)
    os.close(handle)


# The query


def _check(parser: Any, database: Any, sql: str, views: set[str]) -> str:
    """The one SELECT that the text is, without what ends it. Raises: Refused."""
    import duckdb

    if "\0" in sql:
        raise Refused("sql_invalid", "there is a NUL in it", "leave it out; chr(0) is one")
    statements = parser.extract_statements(sql)
    if not statements:
        raise Refused("sql_invalid", "there is no statement in it", "send one SELECT")
    if len(statements) > 1:
        raise Refused("sql_not_allowed", f"these are {len(statements)} statements", "send one SELECT at a time")
    kind = statements[0].type
    if kind is not duckdb.StatementType.SELECT:
        if kind is duckdb.StatementType.MULTI:
            raise Refused("sql_not_allowed", "it becomes several statements", "name the values: PIVOT … ON … IN (…)")
        raise Refused("sql_not_allowed", f"{kind.name} is not SELECT", _REFUSED_FIX)
    ((text,),) = parser.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()
    tree = json.loads(text)
    if tree["error"]:
        why = tree.get("error_message", "the statement cannot be parsed")
        if "max_expression_depth" in why:
            raise Refused("sql_invalid", _TOO_DEEP, _FLATTER)
        raise Refused("sql_invalid", why)
    nodes = list(_nodes(tree))
    given = {entry["key"].lower() for node in nodes for entry in (node.get("cte_map") or {}).get("map", ())}
    given |= {node[key].lower() for node in nodes for key in ("cte_name", "ctename") if isinstance(node.get(key), str)}
    for name in sorted(given - views):
        _check_given_name(database, name)
    for node in nodes:
        _check_node(node, views, given)
    return re.sub(r"[\s;]+\Z", "", sql)


def _nodes(value: Any) -> Any:
    """Every object within, without recursion: a tree may be deep."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _check_given_name(database: Any, name: str) -> None:
    """A name in WITH must mean nothing where it is not in force: whether it is there, only the database knows.

    So it is asked what it would read by that name.
    """
    import duckdb

    if _NAME.fullmatch(name):
        try:
            database.execute(f'SELECT 1 FROM "{name}" LIMIT 0').fetchall()  # noqa: S608 - it is a word
        except duckdb.CatalogException:
            return
    fix = "call it by letters, digits and _, and not as something that the database has"
    raise Refused("sql_not_allowed", f"{name[:100]} cannot be a name in WITH", fix)


def _check_node(node: dict[str, Any], views: set[str], given: set[str]) -> None:
    kind = node.get("type")
    if isinstance(kind, str) and kind.endswith("_NODE") and kind not in _NODES:
        raise Refused("sql_not_allowed", f"{kind.removesuffix('_QUERY_NODE')} is not SELECT", _REFUSED_FIX)
    name = str(node.get("function_name") or "").lower()
    if name and _FUNCTIONS_REFUSED.fullmatch(name):
        raise Refused("sql_not_allowed", f"the function {name} cannot be called here", _REFUSED_FIX)
    if kind == "TABLE_FUNCTION":
        name = str((node.get("function") or {}).get("function_name") or "").lower()
        if name not in _TABLE_FUNCTIONS:
            raise Refused("sql_not_allowed", f"the table function {name} cannot be called here", _REFUSED_FIX)
    elif kind == "BASE_TABLE":
        _check_table(node, views, views | given)
    elif kind == "SHOW_REF" and not node.get("query"):
        _check_table(node, views, views | {"tables"})


def _check_table(node: dict[str, Any], views: set[str], known: set[str]) -> None:
    path = [str(part).lower() for part in (node.get("qualified_name") or {}).get("path", [node.get("table_name")])]
    if len(path) == 1 and (path[0].strip('"') if node["type"] == "SHOW_REF" else path[0]) in known:
        return
    names = ", ".join(sorted(views))
    fix = f"the views are {names}; DESCRIBE tells their columns"
    raise Refused("sql_not_allowed", f"there is no view {'.'.join(path)[:100]}", fix)


def _answer(database: Any, sql: str, job: dict[str, Any], out: Frames) -> None:
    asked = database.sql(sql, params=job["parameters"]) if job["parameters"] else database.sql(sql)
    if asked is None:
        raise Refused("sql_not_allowed", "it gives no rows", _REFUSED_FIX)
    columns, types = list(asked.columns), [str(one).replace('"NULL"', "NULL") for one in asked.types]
    del asked
    if len(columns) > job["columns_max"]:
        raise Refused("query_too_heavy", f"the answer has {len(columns)} columns, more than {job['columns_max']}", "")
    form = job["format"]
    names = [f"c{number}" for number in range(len(columns))]
    extra = f", {names[columns.index(job['sequence'])]} AS sequence" if job["sequence"] else ""
    wrapped = f"SELECT {_projected(form, names, columns, types)}{extra} FROM (\n{sql}\n) AS answer({', '.join(names)})"  # noqa: S608 - names of ours, and the query that was looked at
    if job["limit"] is not None:
        wrapped += f" LIMIT {job['limit'] + 1}"
    job["wrapped"] = True
    parameters = {"params": job["parameters"]} if job["parameters"] else {}
    reader = database.sql(wrapped, **parameters).to_arrow_reader(_BATCH_ROWS)
    out.tell_json(b"H", {"columns": columns, "types": types})
    told = _write(form, reader, columns, job, out)
    out.tell_json(b"E", told)


def _interrupt_late(database: Any, job: dict[str, Any], out: Frames) -> None:
    """Interrupts the query when it has had its time. What it waited for its reader is not counted."""
    began = time.monotonic()
    while True:
        time.sleep(_POLL_SECONDS)
        since = out.blocked_since
        waited = out.blocked_seconds + (time.monotonic() - since if since is not None else 0.0)
        if time.monotonic() - began - waited > job["seconds_max"]:
            database.interrupt()


def _projected(form: str, names: list[str], columns: list[str], types: list[str]) -> str:
    """The columns as the format has them; for JSON one text a row."""
    match form:
        case "json":
            return f"json_array({', '.join(map(_json, names, types))})::VARCHAR AS line"
        case "ndjson":
            members = (
                f"{_quoted(column)}, {_json(name, one)}"
                for column, name, one in zip(columns, names, types, strict=True)
            )
            return f"json_object({', '.join(members)})::VARCHAR || chr(10) AS line"
        case "csv":
            return ", ".join(map(_cell, names, types))
        case _:
            return ", ".join(map(_in_arrow, names, types))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _text(name: str, kind: str) -> str:
    """Times as RFC 3339: those without zone are UTC, as all times of the ledger."""
    if kind.startswith("TIMESTAMP"):
        moment = f"{name}::TIMESTAMP" if kind in {"TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS"} else name
        return f"CASE WHEN isfinite({moment}) THEN strftime({moment}, '%Y-%m-%dT%H:%M:%S.%fZ') ELSE {name}::VARCHAR END"
    return f"{name}::VARCHAR"


def _json(name: str, kind: str) -> str:
    """JSON knows no NaN and no infinity, and many of its readers no exact decimals."""
    if kind in {"DOUBLE", "FLOAT"}:
        return f"CASE WHEN isfinite({name}) THEN to_json({name}) ELSE to_json({name}::VARCHAR) END"
    if kind.startswith(("TIMESTAMP", "DECIMAL")) and not _NESTED.search(kind):
        return _text(name, kind)
    if _WIDE.fullmatch(kind):
        # What `sum` gives is a HUGEINT, and hardly ever wider than what readers of JSON know as a number.
        return f"coalesce(to_json(TRY_CAST({name} AS BIGINT)), to_json({name}::VARCHAR))"
    if kind == "BIGNUM" or (_NESTED.search(kind) and re.search(r"DOUBLE|FLOAT|DECIMAL|HUGEINT|BIGNUM", kind)):
        return f"{name}::VARCHAR"
    return name


def _cell(name: str, kind: str) -> str:
    """A cell that no spreadsheet takes for a formula (CWE-1236)."""
    text = _text(name, kind)
    if _NUMBER.fullmatch(kind) or (kind.startswith(("DECIMAL", "DATE", "TIMESTAMP")) and not _NESTED.search(kind)):
        return f"{text} AS {name}"
    if kind in {"DOUBLE", "FLOAT"}:
        return f"CASE WHEN {name} = '-inf' THEN '''-inf' ELSE {text} END AS {name}"
    return f"CASE WHEN regexp_matches({text}, {_FORMULA}) THEN '''' || {text} ELSE {text} END AS {name}"


def _in_arrow(name: str, kind: str) -> str:
    if kind == "HUGEINT":
        # Refuses what does not fit, where Arrow would change it.
        return (
            f"CASE WHEN {name} NOT BETWEEN {1 - 10**38} AND {10**38 - 1} THEN error('{_TOO_WIDE}') "
            f"ELSE {name}::DECIMAL(38, 0) END AS {name}"
        )
    if _NOT_IN_ARROW.search(kind) or (_NESTED.search(kind) and "HUGEINT" in kind):
        return f"{name}::VARCHAR AS {name}"
    return f"{name}::VARCHAR AS {name}" if kind == "NULL" else name


def _write(form: str, reader: Any, columns: list[str], job: dict[str, Any], out: Frames) -> dict[str, Any]:
    """How many rows were written, whether there are more than `limit` and `bytes_max` allow, and which sequences."""
    sequenced = bool(job["sequence"])
    sink = _sink(form, list(reader.schema)[:-1] if sequenced else reader.schema, columns, out)
    rows, limit, bytes_max = 0, job["limit"], job["bytes_max"]
    truncated = False
    first = last = None
    for read in reader:
        batch = read
        if sequenced and batch.num_rows:
            import pyarrow.compute as pc

            ends = pc.min_max(batch.column(batch.num_columns - 1)).as_py()
            first = ends["min"] if first is None else min(first, ends["min"])
            last = ends["max"] if last is None else max(last, ends["max"])
            batch = batch.select(range(batch.num_columns - 1))
        if limit is not None and rows + batch.num_rows > limit:
            batch, truncated = batch.slice(0, limit - rows), True
        if bytes_max is not None and batch.num_rows and out.written + batch.get_total_buffer_size() > bytes_max:
            room = max(0, bytes_max - out.written)
            fitting = batch.num_rows * room // max(1, batch.get_total_buffer_size())
            batch, truncated = batch.slice(0, fitting), True
        if batch.num_rows:
            sink.write(batch, rows)
            rows += batch.num_rows
        if truncated:
            break
    sink.close()
    return {"rows": rows, "truncated": truncated, "first": first, "last": last}


class _Lines:
    """Texts that are rows of JSON: one a line, or separated by commas."""

    def __init__(self, out: Frames, separator: str) -> None:
        self._out = out
        self._separator = separator

    def write(self, batch: Any, before: int) -> None:
        lines = self._separator.join(batch.column(0).to_pylist())
        self._out.write(((self._separator if before else "") + lines).encode())

    def close(self) -> None:
        pass


class _Arrow:
    """An Arrow or Parquet writer. `make` is given the schema with the columns' own names."""

    def __init__(self, writer: Any, schema: Any) -> None:
        self._writer = writer
        self._schema = schema

    def write(self, batch: Any, before: int) -> None:
        import pyarrow as pa

        self._writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


class _Rows(_Arrow):
    """Parquet: row groups of a useful size, of many batches."""

    def __init__(self, writer: Any, schema: Any) -> None:
        super().__init__(writer, schema)
        self._waiting: list[Any] = []
        self._count = 0

    def write(self, batch: Any, before: int) -> None:
        self._waiting.append(batch)
        self._count += batch.num_rows
        if self._count >= _ROW_GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        batches = [pa.RecordBatch.from_arrays(batch.columns, schema=self._schema) for batch in self._waiting]
        self._writer.write_table(pa.Table.from_batches(batches, self._schema))
        self._waiting, self._count = [], 0

    def close(self) -> None:
        if self._waiting:
            self._flush()
        super().close()


def _sink(form: str, schema: Any, columns: list[str], out: Frames) -> Any:
    if form in {"json", "ndjson"}:
        return _Lines(out, "," if form == "json" else "")
    import pyarrow as pa

    if form == "csv":
        columns = ["'" + name if re.match(r"[=+@\t\r\n-]", name) else name for name in columns]
    named = pa.schema([field.with_name(name) for field, name in zip(schema, columns, strict=True)])
    file = pa.PythonFile(out, mode="w")
    match form:
        case "csv":
            from pyarrow import csv

            return _Arrow(csv.CSVWriter(file, named), named)
        case "arrow":
            return _Arrow(pa.ipc.new_stream(file, named), named)
        case _:
            from pyarrow import parquet

            return _Rows(parquet.ParquetWriter(file, named, compression="zstd"), named)


if __name__ == "__main__":
    main()
