"""Auditors' SQL in its own process: what it answers, what it refuses, and what it cannot do. Issue "Auditors", 2."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import ctypes
import io
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from events import types as t
from events.streams import LEDGER, USAGE
from projections import analytics
from projections.analytics.publication import Publication, Publisher
from projections.sandbox import process, views
from projections.sandbox.process import Job, QueryRefused
from tests import running
from tests.projections.test_analytics import block, blocks, recorded
from tests.projections.test_analytics_usage import FIRST, PAT, USES, issued

SECRET = "tl_sat_what-bootstrap-holds"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[analytics.Analytics]:
    """Three tokens, seven uses, one finding, and a file beside the store that nobody may read."""
    directory = tmp_path_factory.mktemp("data [x]*")
    (directory / "bootstrap.json").write_text(SECRET)
    opened = analytics.open_analytics(directory / "analytics")
    tokens = (issued(FIRST, t.Kind.ACCESS, "cli_shop", "cli_shop"), issued(PAT, t.Kind.PAT, "cli_till", "usr_anne"))
    opened.apply(LEDGER, recorded(*tokens))
    opened.apply(USAGE, blocks(block(*USES)))
    opened.flush()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def published(store: analytics.Analytics, tmp_path_factory: pytest.TempPathFactory) -> Publication:
    return Publisher(store, store.path.parent / "published").publish()


def job(publication: Publication, sql: str, **changes: Any) -> Job:
    files = {path for paths in publication.files.values() for path in paths}
    return Job(
        **{
            "sql": sql,
            "parameters": None,
            "format": "json",
            "directory": str(next(iter(files)).parent),
            "files": sorted(path.name for path in files),
            "views": views.statements(publication.files),
            "names": views.VIEWS,
            "limit": 1000,
            "bytes_max": 4 * 1024**2,
            "seconds_max": 2.0,
            "cpu_seconds_max": 30.0,
            "memory_bytes_max": 256 * 1024**2,
            "threads": 2,
        }
        | changes
    )


async def answer(one: Job) -> tuple[dict[str, Any], bytes, dict[str, Any]]:
    """How it begins, its bytes, and how it ends."""
    begun, data, ended = {}, b"", {}
    async with contextlib.aclosing(process.run(one)) as frames:
        async for frame in frames:
            if frame.kind == "D":
                data += frame.data
            elif frame.kind == "H":
                begun = json.loads(frame.data)
            else:
                ended = json.loads(frame.data)
    return begun, data, ended


async def rows(publication: Publication, sql: str, **changes: Any) -> list[Any]:
    _, data, _ = await answer(job(publication, sql, **changes))
    found: list[Any] = json.loads(b"[" + data + b"]")
    return found


async def refusal(publication: Publication, sql: str, **changes: Any) -> QueryRefused:
    with pytest.raises(QueryRefused) as raised:
        await answer(job(publication, sql, **changes))
    return raised.value


@pytest.mark.parametrize("view", views.VIEWS)
async def test_view_has_the_documented_columns(published: Publication, view: str) -> None:
    from projections import sandbox  # noqa: PLC0415 - its docstring is what is tested

    line = next(line for line in (sandbox.__doc__ or "").splitlines() if line.startswith(f"| `{view}`"))
    begun, _, _ = await answer(job(published, f"FROM {view}"))
    assert all(f"`{name}`" in line or view == "usage_days_v1" for name in begun["columns"]), (begun["columns"], line)
    assert view == "usage_days_v1" or line.count("`") // 2 - 1 >= len(begun["columns"])


async def test_uses_are_there_with_their_tokens(published: Publication) -> None:
    sql = "SELECT token_id, kind, client_id, ip, outcome FROM uses_v1 ORDER BY block_seq, use_index"
    found = await rows(published, sql)
    assert len(found) == len(USES)
    assert found[0] == [FIRST, "access", "cli_shop", "192.0.2.1", "valid"]


async def test_roll_ups_count_what_the_uses_do(published: Publication) -> None:
    for view in ("usage_minutes_v1", "usage_hours_v1", "usage_days_v1"):
        assert await rows(published, f"SELECT sum(uses)::BIGINT, count(*) > 1 FROM {view}") == [[len(USES), True]]


# What is not one SELECT over the views, or reaches for something else

SYSTEM_VIEWS = (
    "pg_settings",
    "duckdb_views",
    "duckdb_logs",
    "sqlite_master",
    "pragma_database_list",
    "pg_class",
)

ESCAPES: dict[str, tuple[str, str]] = {
    "nothing": ("", "sql_invalid"),
    "comment": ("-- SELECT 1", "sql_invalid"),
    "semicolons": (";;", "sql_invalid"),
    "no SQL": ("what did Anne do?", "sql_invalid"),
    "NUL": ("SELECT 1\0", "sql_invalid"),
    "unknown view": ("FROM uses_v9", "sql_not_allowed"),
    "unknown column": ("SELECT nothing FROM uses_v1", "sql_invalid"),
    "type error": ("SELECT 'x'::INTEGER", "sql_invalid"),
    "two statements": ("SELECT 1; SELECT 2", "sql_not_allowed"),
    "hidden second statement": ("SELECT 1; /* */ DROP VIEW uses_v1", "sql_not_allowed"),
    "closes the parenthesis": ("SELECT 1) UNION (SELECT 2", "sql_invalid"),
    "CREATE": ("CREATE TABLE t AS SELECT 1", "sql_not_allowed"),
    "INSERT": ("INSERT INTO uses_v1 VALUES (1)", "sql_not_allowed"),
    "INSERT in WITH": ("WITH x AS (INSERT INTO t VALUES (1) RETURNING a) FROM x", "sql_not_allowed"),
    "COPY in WITH": ("WITH x AS (COPY (SELECT 1) TO '/tmp/x') FROM x", "sql_not_allowed"),
    "SELECT INTO": ("SELECT * INTO x FROM uses_v1", "sql_invalid"),
    "COPY": ("COPY uses_v1 TO '{directory}/stolen.csv'", "sql_not_allowed"),
    "EXPORT": ("EXPORT DATABASE '{directory}/stolen'", "sql_not_allowed"),
    "IMPORT": ("IMPORT DATABASE '{directory}'", "sql_not_allowed"),
    "ATTACH": ("ATTACH '{store}' AS a", "sql_not_allowed"),
    "USE": ("USE memory", "sql_not_allowed"),
    "INSTALL": ("INSTALL httpfs", "sql_not_allowed"),
    "LOAD": ("LOAD httpfs", "sql_not_allowed"),
    "SET": ("SET lock_configuration = false", "sql_not_allowed"),
    "RESET": ("RESET enable_external_access", "sql_not_allowed"),
    "PRAGMA": ("PRAGMA enable_profiling", "sql_not_allowed"),
    "CALL": ("CALL pragma_version()", "sql_not_allowed"),
    "EXPLAIN": ("EXPLAIN ANALYZE SELECT 1", "sql_not_allowed"),
    "PREPARE": ("PREPARE p AS SELECT 1", "sql_not_allowed"),
    "PIVOT": ("PIVOT uses_v1 ON outcome", "sql_not_allowed"),
    "BEGIN": ("BEGIN", "sql_not_allowed"),
    "read_text": ("FROM read_text('/etc/passwd')", "sql_not_allowed"),
    "read_text of the secrets": ("FROM read_text('{directory}/../bootstrap.json')", "sql_not_allowed"),
    "read_blob of the environment": ("FROM read_blob('/proc/self/environ')", "sql_not_allowed"),
    "read_csv in a subquery": ("SELECT (SELECT a FROM read_csv('/etc/passwd') LIMIT 1)", "sql_not_allowed"),
    "read_json in EXISTS": ("SELECT 1 WHERE EXISTS (FROM read_json('/etc/passwd'))", "sql_not_allowed"),
    "read_parquet in a lateral join": ("FROM uses_v1, LATERAL (FROM read_parquet('x'))", "sql_not_allowed"),
    "read_duckdb": ("FROM read_duckdb('{store}')", "sql_not_allowed"),
    "sniff_csv": ("FROM sniff_csv('/etc/passwd')", "sql_not_allowed"),
    "glob": ("FROM glob('/etc/*')", "sql_not_allowed"),
    "file as a table": ("FROM '/etc/passwd'", "sql_not_allowed"),
    "file as a table in quotes": ('FROM "/etc/passwd"', "sql_not_allowed"),
    "file named like a common table": (
        "WITH \"/etc/passwd.csv\" AS (SELECT 1) FROM '/etc/passwd.csv'",
        "sql_not_allowed",
    ),
    "published file named so": (
        'FROM "{file}", (WITH "{file}" AS (SELECT 1 x) SELECT x FROM "{file}")',
        "sql_not_allowed",
    ),
    **{
        f"{name} under a name of another scope": (
            f"SELECT * FROM {name}, (WITH {name} AS (SELECT 1 x) SELECT x FROM {name})",
            "sql_not_allowed",
        )
        for name in SYSTEM_VIEWS
    },
    "name given after it is read": (
        "WITH a AS (FROM pg_settings), PG_Settings AS (SELECT 1) FROM a",
        "sql_not_allowed",
    ),
    "name given to itself": ("WITH pg_settings AS (FROM pg_settings) FROM pg_settings", "sql_not_allowed"),
    "name given by recursion": (
        "FROM pg_class, (WITH RECURSIVE pg_class AS (SELECT 1 x UNION SELECT x FROM pg_class) FROM pg_class)",
        "sql_not_allowed",
    ),
    "name out of its scope": ("SELECT * FROM mine, (WITH mine AS (SELECT 1 x) FROM mine)", "sql_invalid"),
    "quoted name that ends itself": ('WITH "a"" LIMIT 0; DROP VIEW uses_v1" AS (SELECT 1) SELECT 1', "sql_not_allowed"),
    "columns of what is behind the views": ("FROM information_schema.columns", "sql_not_allowed"),
    "SHOW of a setting": ("SHOW allowed_paths", "sql_not_allowed"),
    "SHOW of a system view": ("SHOW pg_settings", "sql_not_allowed"),
    "SHOW ALL TABLES": ("SHOW ALL TABLES", "sql_not_allowed"),
    "SHOW TABLES of a schema": ("SHOW TABLES FROM published", "sql_not_allowed"),
    "SHOW DATABASES": ("FROM (SHOW DATABASES)", "sql_not_allowed"),
    "DESCRIBE of what is behind the views": ("DESCRIBE published.events", "sql_not_allowed"),
    "URL": ("FROM 'https://127.0.0.1/x.parquet'", "sql_not_allowed"),
    "query()": ("FROM query('SELECT * FROM read_text(''/etc/passwd'')')", "sql_not_allowed"),
    "query_table()": ("FROM query_table('uses_v1')", "sql_not_allowed"),
    "arrow_scan": ("FROM arrow_scan(1::UBIGINT::POINTER, 2::POINTER, 3::POINTER)", "sql_not_allowed"),
    "pandas_scan": ("FROM pandas_scan(4711)", "sql_not_allowed"),
    "settings": ("FROM duckdb_settings()", "sql_not_allowed"),
    "secrets": ("FROM duckdb_secrets()", "sql_not_allowed"),
    "logging": ("FROM enable_logging(storage := 'file', storage_path := '/tmp')", "sql_not_allowed"),
    "getenv": ("SELECT getenv('TOKEN_LEDGER_MASTER_KEY')", "sql_invalid"),
    "current_setting": ("SELECT current_setting('allowed_paths')", "sql_not_allowed"),
    "internal function": ("SELECT __internal_decompress_string('x')", "sql_not_allowed"),
    "published files": ("FROM published.events", "sql_not_allowed"),
    "other catalogue": ("FROM memory.published.events", "sql_not_allowed"),
    "SQL of the views": ("FROM information_schema.views", "sql_not_allowed"),
    "SQL of the views by another name": ("FROM duckdb_views", "sql_not_allowed"),
    "sqlite_master": ("FROM sqlite_master", "sql_not_allowed"),
    "parameter missing": ("SELECT $x", "sql_invalid"),
    "a thousand parentheses": ("SELECT " + "(" * 5000 + "1" + ")" * 5000, "sql_invalid"),
    "a thousand subqueries": ("SELECT " + "(SELECT " * 3000 + "1" + ")" * 3000, "sql_invalid"),
    "ten thousand ANDs": ("SELECT " + "1=1 AND " * 10_000 + "true", ""),
    "more columns than allowed": ("SELECT " + ", ".join(["1"] * 1001), "query_too_heavy"),
}


@pytest.mark.parametrize("name", ESCAPES)
async def test_what_is_not_one_select_over_the_views_is_refused(
    published: Publication, store: analytics.Analytics, name: str
) -> None:
    sql, code = ESCAPES[name]
    text = sql.replace("{directory}", str(store.path.parent)).replace("{store}", str(store.path))
    text = text.replace("{file}", published.files["events"][0].name)
    before = sorted(store.path.parent.rglob("*"))
    if code:
        refused = await refusal(published, text)
        assert refused.code == code, refused
        assert SECRET not in str(refused)
        assert str(store.path.parent) not in str(refused).replace(text, "")
    else:
        await answer(job(published, text, seconds_max=30.0))
    assert sorted(store.path.parent.rglob("*")) == before


HEAVY = {
    "endless recursion": "WITH RECURSIVE a AS (SELECT 1 UNION ALL SELECT 1 FROM a) SELECT count(*) FROM a",
    "cross join": "SELECT count(*) FROM range(1000000) a, range(1000000) b, range(1000000) c",
    "sleep": "SELECT sleep_ms(100000)",
    "a string of 4 GB": "SELECT length(repeat('x', 4000000000))",
    "a string of 2 GB": "SELECT repeat('x', 2000000000)",
    "a string of 400 MB": "SELECT repeat('x', 400000000)",
    "a string of 400 MB in Python": "SELECT repeat('x', 100000000) FROM range(4)",
    "all in one list": "SELECT len(list(range)) FROM range(10000000000)",
    "sort of too much": "SELECT range, hash(range) h FROM range(1000000000) ORDER BY h",
    "regular expression": """SELECT sum(regexp_matches(repeat('a', 30000) || range, '(a?){1000}(a){1000}b')::INT)
        FROM range(100000)""",
    "levenshtein": "SELECT levenshtein(repeat('a', 200000), repeat('b', 200000))",
}
# Of these it is the time that is too much, and of some a core that is busy for as long.
SLOW = {"endless recursion", "cross join", "sleep", "regular expression", "levenshtein"}


@pytest.mark.parametrize("name", HEAVY)
async def test_too_heavy_query_is_ended_and_said_to_be(published: Publication, name: str) -> None:
    refused = await refusal(published, HEAVY[name], seconds_max=0.5 if name in SLOW else 2.0)
    assert refused.code == "query_too_heavy", refused
    assert refused.fix


async def test_value_of_2_gb_takes_no_more_memory_than_the_limit_and_a_little(published: Publication) -> None:
    """DuckDB does not count it, so its own limit does not hold it."""
    watched = job(published, "SELECT repeat('x', 2000000000)", memory_bytes_max=512 * 1024**2)
    answering = asyncio.create_task(answer(watched))
    child, most = await child_of_this_process(), 0
    while not answering.done():
        with contextlib.suppress(OSError, ValueError, IndexError):
            status = Path(f"/proc/{child}/status").read_text()  # noqa: ASYNC240 - no disk is read
            most = max(most, int(status.partition("VmHWM:")[2].split()[0]) * 1024)
        await asyncio.sleep(0.01)
    with pytest.raises(QueryRefused) as raised:
        await answering
    assert raised.value.code == "query_too_heavy"
    assert "512 MiB" in str(raised.value)
    assert 0 < most < 1024**3


async def test_query_that_sees_no_interruption_is_killed_soon_after_its_time(published: Publication) -> None:
    """One value that takes minutes to compute, in a process that may use the processor for as long."""
    sql = "SELECT levenshtein(repeat('a', 1000000), repeat('b', 1000000))"
    loop = asyncio.get_running_loop()
    began = loop.time()
    refused = await refusal(published, sql, cpu_seconds_max=600.0, seconds_max=0.5)
    assert refused.code == "query_too_heavy"
    assert "within the 0.5 s" in str(refused)
    # It would take minutes, or until the processor's limit; loading is not counted and has its own limit.
    assert loop.time() - began < 0.5 + process._STOP_SECONDS + process._START_SECONDS


async def test_killed_process_is_no_answer(published: Publication) -> None:
    answering = asyncio.create_task(answer(job(published, "SELECT sleep_ms(100000)", seconds_max=30.0)))
    child = await child_of_this_process()
    os.kill(child, signal.SIGKILL)
    with pytest.raises(QueryRefused) as raised:
        await answering
    assert raised.value.code == "unavailable"


async def child_of_this_process() -> int:
    while True:
        for one in running.processes():
            if one.parent == os.getpid() and "sandbox/child.py" in one.command_line:
                return one.pid
        await asyncio.sleep(0.01)


# The walls behind the first one: a statement that is not looked at, since it is said to be ours

BEHIND = {
    "read_text": "FROM read_text('/etc/passwd')",
    "glob": "FROM glob('/etc/*')",
    "secrets": "FROM read_text('../../bootstrap.json')",
    "store": "FROM read_duckdb('../analytics-2.duckdb')",
    "COPY": "COPY (SELECT 1) TO 'stolen.csv'",
    "COPY over a published file": "COPY (SELECT 1) TO '{file}'",
    "ATTACH": "ATTACH 'stolen.db'",
    "INSTALL": "INSTALL httpfs",
    "LOAD": "LOAD httpfs",
    "SET": "SET enable_external_access = true",
    "unlocked": "SET lock_configuration = false",
    "more files": "SET allowed_paths = ['/etc/passwd']",
    "URL": "FROM read_csv('https://127.0.0.1:1/x.csv')",
}


@pytest.mark.parametrize("name", BEHIND)
async def test_database_refuses_what_the_look_at_the_statement_would_have_let_through(
    published: Publication, name: str
) -> None:
    file = published.files["events"][0]
    before = {path: path.read_bytes() for path in file.parent.iterdir()}
    refused = await refusal(published, BEHIND[name].replace("{file}", file.name), trusted=True)
    assert refused.code in {"sql_not_allowed", "sql_invalid"}, refused
    assert {path: path.read_bytes() for path in file.parent.iterdir()} == before


CONFINED = """
import ctypes, json, os, socket, sys
sys.path.insert(0, sys.argv[1])
import child
os.chdir(sys.argv[2])
libc = ctypes.CDLL(None, use_errno=True)
child._confine(libc, {"files": [sys.argv[3]], "memory_bytes_max": 2**28, "cpu_seconds_max": 10})
found = {}
def attempt(name, action):
    try:
        action()
        found[name] = "done"
    except (OSError, MemoryError) as error:
        found[name] = type(error).__name__
attempt("published", lambda: open(sys.argv[3], "rb").read(4))
attempt("write", lambda: os.write(os.open(sys.argv[3], os.O_WRONLY), b"x"))
attempt("truncate", lambda: os.truncate(sys.argv[3], 0))
attempt("create", lambda: os.close(os.open("made", os.O_CREAT | os.O_WRONLY)))
attempt("unlink", lambda: os.unlink(sys.argv[3]))
attempt("passwd", lambda: open("/etc/passwd").read())
attempt("environ", lambda: open(f"/proc/{os.getppid()}/environ").read())
attempt("connect", lambda: socket.create_connection(("127.0.0.1", int(sys.argv[4])), 1))
attempt("memory", lambda: bytearray(2**40))
print(json.dumps(found))
"""


async def test_kernel_refuses_what_the_process_itself_would_do(published: Publication) -> None:
    """Landlock: without it only the limits are left, and this test has nothing to hold."""
    if ctypes.CDLL(None, use_errno=True).syscall(444, None, 0, 1) < 4:
        pytest.skip("this kernel has no Landlock that knows TCP")
    file = published.files["events"][0]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        arguments = (str(Path(process.__file__).parent), str(file.parent), file.name, str(port))
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-c", CONFINED, *arguments, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await child.communicate()
    found = json.loads(output)
    assert found.pop("published") == "done"
    assert found.pop("memory") == "MemoryError"
    assert set(found.values()) == {"PermissionError"}, found
    assert file.exists()


# Formats

VALUES = """SELECT 9007199254740993 AS big, 170141183460469231731687303715884105727::HUGEINT AS huge,
    1.10::DECIMAL(9, 2) AS exact, 'nan'::DOUBLE AS nan, '-inf'::DOUBLE AS inf, 1.5::DOUBLE AS real,
    TIMESTAMP '2026-01-31 12:00:00.5' AS at_, TIMESTAMP 'infinity' AS never, DATE '2026-01-31' AS day,
    INTERVAL 1 DAY AS span, '\\xAA'::BLOB AS blob, NULL AS none,
    [1, NULL] AS list, {'a': 'x', 'b': {'c': 1}} AS struct, MAP {'k': 1} AS map, ['nan'::DOUBLE] AS nans, true AS yes,
    chr(0) || chr(7) || '"' AS odd, '=1+1' AS formula, -1 AS negative, '-x' AS minus, chr(9) || 'x' AS tab, 'ok' AS ok,
    340282366920938463463374607431768211455::UHUGEINT AS widest, '10'::BIT AS bits, TIME '12:00' AS clock,
    union_value(n := 1) AS either, 'a'::ENUM('a') AS enum, 0.1::FLOAT AS small"""


async def test_json_has_every_type(published: Publication) -> None:
    begun, data, _ = await answer(job(published, VALUES))
    found = dict(zip(begun["columns"], json.loads(data), strict=True))
    assert {name: found[name] for name in ("big", "huge", "exact", "nan", "inf", "real", "widest")} == {
        "big": 9007199254740993,
        "huge": str(2**127 - 1),
        "exact": "1.10",
        "nan": "nan",
        "inf": "-inf",
        "real": 1.5,
        "widest": str(2**128 - 1),
    }
    assert found["at_"] == "2026-01-31T12:00:00.500000Z"
    assert (found["never"], found["day"], found["span"]) == ("infinity", "2026-01-31", "1 day")
    assert (found["list"], found["struct"], found["none"]) == ([1, None], {"a": "x", "b": {"c": 1}}, None)
    assert (found["nans"], found["odd"], found["blob"]) == ("[nan]", '\0\a"', "\\xAA")


async def test_csv_has_every_type_and_no_formula(published: Publication) -> None:
    begun, data, _ = await answer(job(published, VALUES.replace("AS ok", 'AS "@ok"'), format="csv"))
    header, values = csv.reader(io.StringIO(data.decode(), newline=""))
    found = dict(zip(header, values, strict=True))
    assert (found["formula"], found["negative"], found["minus"], found["tab"]) == ("'=1+1", "-1", "'-x", "'\tx")
    assert (found["'@ok"], found["exact"], found["inf"], found["none"]) == ("ok", "1.10", "'-inf", "")
    assert found["at_"] == "2026-01-31T12:00:00.500000Z"
    assert len(begun["columns"]) == len(header)


@pytest.mark.parametrize("form", ["arrow", "parquet"])
async def test_arrow_and_parquet_have_every_type(published: Publication, form: str) -> None:
    sql = VALUES.replace("170141183460469231731687303715884105727::HUGEINT", "sum(range)")
    sql = sql.replace("TIMESTAMP 'infinity'", "'x'")  # which Python has no value for
    sql = sql.replace("INTERVAL 1 DAY", "'x'") if form == "parquet" else sql
    begun, data, _ = await answer(job(published, f"{sql} FROM range(4)", format=form))
    table = pa.ipc.open_stream(data).read_all() if form == "arrow" else parquet.read_table(io.BytesIO(data))
    found = table.to_pylist()[0]
    assert table.column_names == begun["columns"]
    assert (found["big"], found["huge"], str(found["exact"]), found["widest"]) == (
        2**53 + 1,
        6,
        "1.10",
        str(2**128 - 1),
    )
    assert (found["list"], found["struct"]["b"], found["odd"]) == ([1, None], {"c": 1}, '\0\a"')


async def test_arrow_refuses_a_number_that_it_would_change(published: Publication) -> None:
    refused = await refusal(published, VALUES, format="arrow")
    assert refused.code == "sql_invalid"
    assert "cast it to VARCHAR" in str(refused)
    assert "LINE" not in str(refused)
    edge = (
        "SELECT (10::HUGEINT ** 0)::HUGEINT * 99999999999999999999999999999999999999::HUGEINT AS n, NULL::HUGEINT AS no"
    )
    _, data, _ = await answer(job(published, edge, format="arrow"))
    assert pa.ipc.open_stream(data).read_all().to_pylist() == [{"n": 10**38 - 1, "no": None}]


async def test_json_has_sums_as_numbers_and_what_is_wider_as_text(published: Publication) -> None:
    edges = "SELECT sum(range), sum(range) FILTER (range > 9), (2::HUGEINT ** 62)::HUGEINT * 2 - 1 FROM range(4)"
    assert await rows(published, edges) == [[6, None, 2**63 - 1]]
    assert await rows(published, f"SELECT {2**63}::HUGEINT, {-(2**63)}::HUGEINT") == [[str(2**63), -(2**63)]]


async def test_json_has_wide_integers_within_lists_as_text(published: Publication) -> None:
    assert await rows(published, "SELECT [9007199254740993::HUGEINT]") == [["[9007199254740993]"]]


@pytest.mark.parametrize("sql", ["SELECT " + "1+" * 5000 + "1", "SELECT " + "(" * 1500 + "1" + ")" * 1500])
async def test_too_deep_query_is_told_what_can_be_done(published: Publication, sql: str) -> None:
    refused = await refusal(published, sql)
    assert (refused.code, str(refused)) == ("sql_invalid", "the query is nested too deeply")
    assert "WITH" in refused.fix
    assert "SET" not in refused.fix


async def test_error_of_the_last_step_shows_no_sql_that_the_auditor_did_not_write(published: Publication) -> None:
    for form in ("json", "csv", "arrow"):
        refused = await refusal(
            published, "SELECT CASE WHEN range > 5 THEN 'x' ELSE '1' END::INT FROM range(9)", format=form
        )
        assert refused.code == "sql_invalid"
        assert "answer(c0" not in str(refused)
        assert "json_array" not in str(refused)


async def test_same_column_name_twice_is_kept(published: Publication) -> None:
    begun, data, _ = await answer(job(published, "SELECT 1 AS a, 2 AS a"))
    assert (begun["columns"], data) == (["a", "a"], b"[1,2]")


@pytest.mark.parametrize("given", [[FIRST], {"id": FIRST}], ids=["positional", "named"])
async def test_parameters_are_bound(published: Publication, given: Any) -> None:
    sql = f"SELECT count(*) FROM uses_v1 WHERE token_id = {'?' if isinstance(given, list) else '$id'}"
    assert await rows(published, sql, parameters=given) == [[2]]


async def test_answer_ends_at_the_limit_and_says_so(published: Publication) -> None:
    _, data, ended = await answer(job(published, "SELECT range FROM range(100000) ORDER BY range", limit=3))
    assert (data, ended["rows"], ended["truncated"]) == (b"[0],[1],[2]", 3, True)
    _, data, ended = await answer(job(published, "SELECT range FROM range(3)", limit=3))
    assert (ended["rows"], ended["truncated"]) == (3, False)


@pytest.mark.parametrize("form", ["json", "csv", "arrow"])
async def test_answer_ends_at_its_bytes_and_says_so(published: Publication, form: str) -> None:
    sql = "SELECT repeat('x', 1000) FROM range(100000)"
    _, data, ended = await answer(job(published, sql, format=form, limit=100_000, bytes_max=100_000))
    assert ended["truncated"]
    assert 0 < ended["rows"] < 200
    assert len(data) < 150_000


@pytest.mark.parametrize(
    ("sql", "first"),
    [
        ("DESCRIBE uses_v1", "occurred_at"),
        ("SHOW TABLES", "events_v1"),
        ("SUMMARIZE SELECT outcome FROM uses_v1", "outcome"),
        ("SHOW uses_v1", "occurred_at"),
        ("FROM (DESCRIBE uses_v1)", "occurred_at"),
        ("WITH Übersicht AS (FROM uses_v1) SELECT 'a' FROM Übersicht", "a"),
        ("WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 3) SELECT max(i) FROM n", 3),
        ("WITH uses_v1 AS (SELECT 'mine' AS a) FROM uses_v1", "mine"),
        ("WITH a AS (SELECT 'a' AS x), b AS (FROM a) SELECT x FROM b, (WITH c AS (FROM a) SELECT 1 FROM c)", "a"),
        ("WITH mine AS (FROM uses_v1) SELECT outcome FROM MINE ORDER BY 1 LIMIT 1", "expired"),
        ("FROM (VALUES ('a')) AS t(x) -- comment", "a"),
        ("SELECT 'a';  ", "a"),
        ("FROM (PIVOT uses_v1 ON outcome IN ('valid') GROUP BY endpoint) SELECT endpoint ORDER BY 1", "api"),
    ],
)
async def test_what_reads_only_is_answered(published: Publication, sql: str, first: Any) -> None:
    assert (await rows(published, sql))[0][0] == first


async def test_order_of_the_query_is_kept(published: Publication) -> None:
    found = await rows(published, "SELECT range FROM range(200000) ORDER BY range DESC", limit=1000)
    assert found == [[number] for number in range(199_999, 198_999, -1)]
