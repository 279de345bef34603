"""Auditors' SQL and exports of a running service. Issue "Auditors", 2 and 3."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests import running
from tests.running import Process, Service, problem, until

QUERY_SECONDS_MAX = 4


@pytest.fixture(scope="module")
def service(service_with: Callable[..., Service]) -> Service:
    """Queries may take 4 s, so that too heavy ones are found out soon."""
    return service_with(audit_query_seconds_max=QUERY_SECONDS_MAX, audit_query_bytes_max=1024**2)


@pytest.fixture(scope="module")
def used(service: Service) -> dict[str, Any]:
    """A PAT that was used three times."""
    pat = service.pat()
    for _ in range(3):
        assert service.code(pat["token"]) == "valid"
    return pat


def query(service: Service, sql: str, **more: Any) -> httpx.Response:
    return service.call("POST", "/v1/audit/query", json={"sql": sql, **more}, token=more.pop("token", ""))


def rows(service: Service, sql: str, **more: Any) -> list[list[Any]]:
    response = query(service, sql, **more)
    assert response.status_code == 200, response.text
    found: list[list[Any]] = response.json()["rows"]
    return found


def reads(service: Service) -> list[dict[str, Any]]:
    return list(service.items("/v1/audit/events", type="audit.read"))


# Queries


def test_answer_has_what_was_recorded_when_the_request_came(service: Service, used: dict[str, Any]) -> None:
    for _ in range(3):
        assert service.code(used["token"]) == "valid"
        answer = query(
            service, "SELECT count(*) FROM uses_v1 WHERE token_id = $id", parameters={"id": used["token_id"]}
        )
        counted = answer.json()["rows"][0][0]
        listed = [one for one in service.history(used["token_id"], uses=True) if one["type"] == "token.used"]
        assert counted == len(listed)
        # The event that this was asked is in it too.
        assert answer.json()["ledger_seq"] >= answer.json()["read_seq"]


def test_csv_and_arrow_hold_the_same_as_json_and_say_where_they_are_true(
    service: Service, used: dict[str, Any]
) -> None:
    sql = "SELECT ledger_seq, type FROM events_v1 WHERE ledger_seq <= 5 ORDER BY ledger_seq"
    expected = rows(service, sql)
    as_csv, as_arrow = query(service, sql, format="csv"), query(service, sql, format="arrow")
    assert [[int(seq), kind] for seq, kind in list(csv.reader(io.StringIO(as_csv.text)))[1:]] == expected
    table = pa.ipc.open_stream(as_arrow.content).read_all()
    assert [list(one.values()) for one in table.to_pylist()] == expected
    assert as_csv.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    assert as_arrow.headers["content-type"] == "application/vnd.apache.arrow.stream"
    for answer in (as_csv, as_arrow):
        assert (answer.headers["x-row-count"], answer.headers["x-truncated"]) == ("5", "false")
        assert int(answer.headers["x-ledger-seq"]) >= int(answer.headers["x-read-seq"])
        assert answer.headers["cache-control"] == "no-store"


def test_spreadsheet_takes_no_cell_of_an_export_or_answer_for_a_formula(service: Service) -> None:
    """Attack 214."""
    pat = service.pat()
    agent = {"user_agent": "=cmd|' /C calc'!A0"}
    assert service.validate(pat["token"], context=agent)["valid"]
    sql = "SELECT user_agent AS \"@agent\" FROM uses_v1 WHERE token_id = ? AND endpoint = 'validate'"
    answer = query(service, sql, parameters=[pat["token_id"]], format="csv")
    assert answer.text == "\"'@agent\"\n\"'=cmd|' /C calc'!A0\"\n"
    exported = service.call(
        "GET", "/v1/audit/export", params={"dataset": "uses", "format": "csv", "token_id": pat["token_id"]}
    )
    assert "\"'=cmd|' /C calc'!A0\"" in exported.text


def test_more_rows_than_asked_for_are_left_out_and_said_to_be(service: Service) -> None:
    answer = query(service, "SELECT range FROM range(100) ORDER BY range", limit=2).json()
    assert (answer["rows"], answer["row_count"], answer["truncated"]) == ([[0], [1]], 2, True)
    answer = query(service, "SELECT repeat('x', 10000) FROM range(1000)").json()
    assert answer["truncated"]
    assert 0 < answer["row_count"] < 110


REFUSED = {
    "not SELECT": ({"sql": "DROP VIEW uses_v1"}, "sql_not_allowed"),
    "file": ({"sql": "FROM read_text('/etc/passwd')"}, "sql_not_allowed"),
    "ATTACH": ({"sql": "ATTACH 'analytics-2.duckdb'"}, "sql_not_allowed"),
    "syntax": ({"sql": "SELEKT 1"}, "sql_invalid"),
    "NUL": ({"sql": "SELECT '\0'"}, "sql_invalid"),
    "runtime error": ({"sql": "SELECT error('stop') FROM uses_v1"}, "sql_invalid"),
    "error in the last row": ({"sql": "SELECT (10 - range)::UTINYINT FROM range(12)"}, "sql_invalid"),
    "late": ({"sql": "SELECT count(*) FROM range(1000000) a, range(1000000) b"}, "query_too_heavy"),
    "memory": ({"sql": "SELECT list(range) FROM range(1000000000)"}, "query_too_heavy"),
    "empty": ({"sql": ""}, "invalid_request"),
    "no SQL": ({}, "invalid_request"),
    "limit": ({"sql": "SELECT 1", "limit": 10**9}, "invalid_request"),
    "no rows": ({"sql": "SELECT 1", "limit": 0}, "invalid_request"),
    "format": ({"sql": "SELECT 1", "format": "xlsx"}, "invalid_request"),
    "parameters": ({"sql": "SELECT ?", "parameters": [1, 2]}, "sql_invalid"),
    "parameters of another kind": ({"sql": "SELECT ?", "parameters": {"a": 1}}, "sql_invalid"),
    "nested parameter": ({"sql": "SELECT ?", "parameters": [{"a": [{}]}]}, ""),
    "number without end": ({"sql": "SELECT ?", "parameters": [10**400]}, "sql_invalid"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_refused_precisely(service: Service, name: str) -> None:
    body, code = REFUSED[name]
    response = service.call("POST", "/v1/audit/query", json=body)
    if code:
        told = problem(response, 400, code)
        assert "/data" not in told["detail"]
    else:
        assert response.status_code in {200, 400}, response.text


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b'{"sql": "SELECT \xff"}', 400, "invalid_request"),
        (b'{"sql": "\\ud800"}', 400, "invalid_request"),
        (b'{"sql": "SELECT ' + b"1" * 10_000_000 + b'"}', 413, "body_too_large"),
        (b"[" * 10_000, 400, "invalid_request"),
    ],
    ids=["not UTF-8", "half a character", "10 MB", "nested"],
)
def test_body_that_is_none_is_refused(service: Service, data: bytes, status: int, code: str) -> None:
    response = service.call("POST", "/v1/audit/query", content=data, headers={"Content-Type": "application/json"})
    problem(response, status, code)


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/audit/query"), ("GET", "/v1/audit/export?dataset=uses"), ("GET", "/v1/audit/exports/exp_1")],
)
def test_only_auditors_may_ask(service: Service, method: str, path: str) -> None:
    other = service.bearer("ledger:validate ledger:issue")
    body = {"json": {"sql": "SELECT 1"}} if method == "POST" else {}
    problem(service.call(method, path, token=other, **body), 403, "insufficient_scope")
    problem(service.call(method, path, token=None, **body), 401, "unauthorized")


def test_hosts_files_and_secrets_are_out_of_reach(service: Service) -> None:
    """Attack 215."""
    for path in (service.data_dir / "bootstrap.json", service.data_dir / "master.key", Path("/etc/passwd")):
        for sql in (f"FROM read_text('{path}')", f"FROM '{path}'", f"FROM read_csv('{path}')", f"FROM glob('{path}')"):
            told = problem(query(service, sql), 400, "sql_not_allowed")
            assert service.admin_token not in json.dumps(told)


def test_process_of_a_query_has_no_secret_and_no_other_file(service: Service) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(query, service, "SELECT sleep_ms(100000)")
        child = until(lambda: sandbox(service), seconds=60, what="the query runs")
        # Not readable even by its own user, since it may not be dumped; by root it is.
        try:
            environment = Path(f"/proc/{child.pid}/environ").read_bytes()
        except PermissionError:
            environment = b""
        assert b"TOKEN_LEDGER" not in environment
        until(lambda: not _foreign(child), seconds=60, what="it has nothing open but what it needs")
        problem(asked.result(), 400, "query_too_heavy")


def _foreign(process: Process) -> list[str]:
    """What it has open and does not need."""
    try:
        links = [str(one.readlink()) for one in Path(f"/proc/{process.pid}/fd").iterdir()]
    except (PermissionError, FileNotFoundError):
        return []
    fit = ("pipe:", "socket:", "/dev/null", "anon_inode:")
    return [link for link in links if not link.startswith(fit) and ".published/" not in link]


def sandbox(service: Service) -> Process | None:
    found = [one for one in service.tree() if one.command_line.endswith(str(service.projector("analytics").pid))]
    return next((one for one in found if "sandbox/child.py" in one.command_line), None)


def hung_up(service: Service, method: str, path: str, body: bytes) -> None:
    """Asks, and hangs up as soon as the query runs."""
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {service.admin_token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    address = httpx.URL(service.url)
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(request.encode() + body)
        until(lambda: sandbox(service), seconds=60, what="the query runs")


@pytest.mark.parametrize("proxies", [None, "192.0.2.1/32"], ids=["RSGI", "ASGI, behind a proxy"])
def test_query_ends_when_its_client_hangs_up(own_service: Callable[..., Service], proxies: str | None) -> None:
    """Its time is longer than this waits."""
    more = {"trusted_proxies": proxies} if proxies else {}
    service = own_service(audit_query_seconds_max=300, **more)
    body = json.dumps({"sql": "SELECT count(*) FROM range(1000000) a, range(1000000) b, range(1000000) c"}).encode()
    for _ in range(3):  # more than have a place at once
        hung_up(service, "POST", "/v1/audit/query", body)
        until(lambda: sandbox(service) is None, seconds=60, what="the query ended")
    assert rows(service, "SELECT 1") == [[1]]


def test_killed_query_is_said_to_be_and_disturbs_nothing(service: Service, used: dict[str, Any]) -> None:
    before = service.projector("analytics").pid
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(query, service, "SELECT sleep_ms(100000)")
        until(lambda: sandbox(service), seconds=60, what="the query runs").kill(signal.SIGKILL)
        told = problem(asked.result(), 503, "unavailable")
    assert "ended from outside" in told["detail"]
    assert service.code(used["token"]) == "valid"
    assert rows(service, "SELECT 1") == [[1]]
    assert service.projector("analytics").pid == before


def test_killed_analytics_takes_its_queries_along(service: Service, used: dict[str, Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(query, service, "SELECT sleep_ms(3000)")
        child = until(lambda: sandbox(service), seconds=60, what="the query runs")
        service.projector("analytics").kill(signal.SIGKILL)
        until(lambda: not child.alive(), seconds=60, what="the query ended with it")
        with pytest.raises(AssertionError):
            assert asked.result(timeout=40).status_code == 200
    until(lambda: query(service, "SELECT 1").status_code == 200, seconds=40)
    assert service.code(used["token"]) == "valid"


def test_heavy_queries_hold_up_neither_validation_nor_recording(service: Service, used: dict[str, Any]) -> None:
    heavy = "SELECT count(*) FROM range(1000000) a, range(1000000) b"
    counting = "SELECT count(*) FROM uses_v1 WHERE token_id = ?"
    ((before,),) = rows(service, counting, parameters=[used["token_id"]])
    over = threading.Event()
    codes: list[str] = []

    def validate() -> None:
        while not over.is_set():
            codes.append(service.code(used["token"]))

    with ThreadPoolExecutor(3) as pool:
        validating = pool.submit(validate)
        answers = [pool.submit(query, service, heavy) for _ in range(2)]
        for one in answers:
            problem(one.result(), 400, "query_too_heavy")
        over.set()
        validating.result()
    assert set(codes) == {"valid"}
    assert rows(service, counting, parameters=[used["token_id"]]) == [[before + len(codes)]]


def test_more_queries_than_may_run_at_once_are_told_to_come_back(service: Service) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [one.result() for one in [pool.submit(query, service, "SELECT sleep_ms(100000)") for _ in range(4)]]
    codes = sorted(one.status_code for one in answers)
    assert codes == [400, 400, 429, 429], codes
    assert all("retry-after" in one.headers for one in answers if one.status_code == 429)


# Reading is an event


def test_every_query_is_an_event_with_its_statement_sealed(service: Service) -> None:
    marker = running.unique("marker")
    before = len(reads(service))
    answer = query(service, f"SELECT '{marker}'").json()
    problem(query(service, f"SELEKT '{marker}'"), 400, "sql_invalid")
    made = reads(service)[before:]
    assert [one["body"]["what"] for one in made] == ["query", "query"]
    assert made[0]["ledger_seq"] == answer["read_seq"]
    assert made[0]["body"]["format"] == "json"
    assert len(made[0]["body"]["statement_sha256"]) == 64
    assert made[0]["subject"].startswith("usr_")
    ((bodies,),) = rows(service, "SELECT string_agg(body::VARCHAR) FROM events_v1")
    assert marker not in bodies
    assert "sealed" not in bodies
    assert marker not in json.dumps(reads(service))


def test_query_and_export_are_answered_from_a_relative_data_directory(own_service: Callable[..., Service]) -> None:
    """As it is by default. The process that answers queries works in another directory than the service."""
    service = own_service(relative=True, workers=1)
    given = service.process.args
    assert isinstance(given, list)
    assert given[given.index("--data-dir") + 1] == "data"
    pat = service.pat()
    assert service.code(pat["token"]) == "valid"
    sql = "SELECT outcome FROM uses_v1 WHERE token_id = ?"
    assert rows(service, sql, parameters=[pat["token_id"]]) == [["valid"]]
    assert pat["token_id"] in export(service, dataset="uses", format="ndjson").text


def test_nothing_is_read_that_cannot_be_recorded(own_service: Callable[..., Service]) -> None:
    service = own_service()
    with service.nats_server().stopped():
        for response in (
            query(service, "SELECT 1"),
            service.call("GET", "/v1/audit/export", params={"dataset": "events", "format": "ndjson"}),
        ):
            assert response.status_code == 503, response.text
            assert "token.issued" not in response.text


# Exports


def export(service: Service, **params: Any) -> httpx.Response:
    response = service.call("GET", "/v1/audit/export", params=params)
    assert response.status_code == 200, response.text
    return response


def manifest_of(service: Service, response: httpx.Response) -> dict[str, Any]:
    return service.done("GET", f"/v1/audit/exports/{response.headers['x-export-id']}")


@pytest.mark.parametrize("form", ["parquet", "csv", "ndjson"])
def test_export_holds_all_and_its_manifest_shows_it(service: Service, used: dict[str, Any], form: str) -> None:
    response = export(service, dataset="events", format=form)
    manifest = manifest_of(service, response)
    digest = hashlib.sha256(response.content)
    assert (manifest["complete"], manifest["sha256"], manifest["size"]) == (
        True,
        digest.hexdigest(),
        len(response.content),
    )
    assert response.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    seqs = _seqs(response.content, form)
    # Every position up to the one that it is true at, in order: so it is complete.
    assert seqs == list(range(1, manifest["ledger_seq"] + 1))
    assert manifest["ledger_range"] == {"first": 1, "last": manifest["ledger_seq"]}
    assert manifest["rows"] == len(seqs) == int(response.headers["x-row-count"])
    assert manifest["sql"] == "SELECT * FROM events_v1"
    assert manifest["software"].startswith("token-ledger")
    assert manifest["read_seq"] <= manifest["ledger_seq"] < manifest["completed_seq"]


def _seqs(content: bytes, form: str) -> list[int]:
    match form:
        case "parquet":
            return [int(one) for one in parquet.read_table(io.BytesIO(content))["ledger_seq"].to_pylist()]
        case "csv":
            return [int(row["ledger_seq"]) for row in csv.DictReader(io.StringIO(content.decode()))]
        case _:
            return [json.loads(line)["ledger_seq"] for line in content.splitlines()]


def test_adjoining_exports_add_up(service: Service, used: dict[str, Any]) -> None:
    whole = _uses(export(service, dataset="uses", format="ndjson", until_seq=6))
    parts = [
        *_uses(export(service, dataset="uses", format="ndjson", until_seq=3)),
        *_uses(export(service, dataset="uses", format="ndjson", after_seq=3, until_seq=6)),
    ]
    assert whole == parts
    assert [one["block_seq"] for one in whole] == sorted(one["block_seq"] for one in whole)
    middle = whole[len(whole) // 2]["recorded_at"]
    before = _uses(export(service, dataset="uses", format="ndjson", until_seq=6, to=middle))
    after = _uses(export(service, dataset="uses", format="ndjson", until_seq=6, **{"from": middle}))
    assert [*before, *after] == whole


def _uses(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.content.splitlines()]


def test_export_can_be_filtered(service: Service, used: dict[str, Any]) -> None:
    found = _uses(export(service, dataset="uses", format="ndjson", token_id=used["token_id"], endpoint="validate"))
    assert {one["token_id"] for one in found} == {used["token_id"]}
    events = export(service, dataset="events", format="ndjson", token_id=used["token_id"])
    types = [one["type"] for one in _uses(events)]
    # So many uses at once may have been found to be abuse meanwhile.
    assert [kind for kind in types if not kind.startswith("abuse.")] == ["token.issued/1"]
    assert manifest_of(service, events)["parameters"] == {"token_id": used["token_id"]}


@pytest.mark.parametrize(
    "dataset", ["tokens", "findings", "usage_minutes", "usage_hours", "usage_days", "refused", "gaps"]
)
def test_every_dataset_can_be_exported(service: Service, used: dict[str, Any], dataset: str) -> None:
    response = export(service, dataset=dataset, format="ndjson")
    assert len(response.content.splitlines()) == manifest_of(service, response)["rows"]


WRONG_EXPORTS = {
    "no dataset": {},
    "unknown dataset": {"dataset": "passwords"},
    "unknown format": {"dataset": "uses", "format": "xlsx"},
    "filter of another dataset": {"dataset": "gaps", "token_id": "tok_1"},
    "sequence of what has none": {"dataset": "usage_days", "after_seq": 1},
    "backwards": {"dataset": "uses", "from": "2026-02-01T00:00:00Z", "to": "2026-01-01T00:00:00Z"},
    "backwards by sequence": {"dataset": "uses", "after_seq": 5, "until_seq": 5},
    "no time": {"dataset": "uses", "from": "yesterday"},
    "unknown parameter": {"dataset": "uses", "columns": "ip"},
}


@pytest.mark.parametrize("name", WRONG_EXPORTS)
def test_export_that_makes_no_sense_is_refused(service: Service, name: str) -> None:
    before = len(reads(service))
    told = problem(service.call("GET", "/v1/audit/export", params=WRONG_EXPORTS[name]), 400, "invalid_request")
    assert told["fix"]
    assert len(reads(service)) == before


def test_broken_export_has_a_manifest_that_says_so(service: Service) -> None:
    """Ended while it was being made: nothing was handed out, and the event of the attempt stays."""
    before = len(reads(service))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(service.call, "GET", "/v1/audit/export", params={"dataset": "uses", "format": "csv"})
        killed = until(lambda: sandbox(service), seconds=60, what="the export runs")
        killed.kill(signal.SIGKILL)
        response = asked.result()
    if response.status_code == 200:
        pytest.skip("the export was complete before it could be killed")
    problem(response, 503, "unavailable")
    event = reads(service)[before]
    manifest = service.done("GET", f"/v1/audit/exports/{event['body']['read_id']}")
    assert manifest["complete"] is False
    assert "sha256" not in manifest


@pytest.mark.parametrize("name", ["exp_1", "exp_" + "0" * 32, "qry_" + "0" * 32, "%2e%2e", "exp_*"])
def test_unknown_export_is_not_found(service: Service, name: str) -> None:
    problem(service.call("GET", f"/v1/audit/exports/{name}"), 404, "not_found")


def test_download_that_breaks_off_is_shorter_than_announced(service: Service, used: dict[str, Any]) -> None:
    with service.http.stream(
        "GET",
        "/v1/audit/export",
        params={"dataset": "events", "format": "ndjson"},
        headers={"Authorization": f"Bearer {service.admin_token}"},
    ) as response:
        length = int(response.headers["content-length"])
        assert "transfer-encoding" not in response.headers
        assert len(response.read()) == length


# The command line


@pytest.fixture
def cli(service: Service) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*words: str, given: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "service.cli", *words, "--data-dir", str(service.data_dir)]
        return subprocess.run(command, capture_output=True, text=True, input=given, check=False, cwd=running.ROOT)

    return run


def test_command_line_shows_rows_and_where_they_are_true(cli: Callable[..., Any]) -> None:
    done = cli("audit", "sql", "SELECT 'a' AS x, $n AS y", "--param", "n=7")
    assert (done.returncode, done.stdout.splitlines()[:2]) == (0, ["x  y", "a  7"]), done.stderr
    assert "as of ledger_seq" in done.stdout
    done = cli("audit", "sql", "-", "--format", "csv", given="SELECT 1 AS a")
    assert (done.returncode, done.stdout) == (0, '"a"\n"1"\n')
    done = cli("audit", "sql", "-", "-o", "json", given="SELECT 1 AS a")
    assert json.loads(done.stdout)["rows"] == [[1]]
    done = cli("audit", "sql", "DROP VIEW uses_v1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "DROP is not SELECT" in done.stderr
    assert cli("audit", "sql").returncode == 2


def test_command_line_exports_and_verifies(cli: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "events.parquet"
    done = cli("audit", "export", "events", "--to", str(file), "-o", "json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "events.parquet.manifest.json").read_text())
    assert manifest == json.loads(done.stdout)
    assert parquet.read_metadata(file).num_rows == manifest["rows"]
    assert cli("audit", "verify", str(file)).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.parquet", "events.parquet.manifest.json"]
    changed = file.read_bytes()[:-1] + b"x"
    file.write_bytes(changed)
    done = cli("audit", "verify", str(file))
    assert done.returncode == 1
    assert "is not what was exported" in done.stderr
    # Somebody who changes file and manifest alike is contradicted by the ledger.
    forged = manifest | {"sha256": hashlib.sha256(changed).hexdigest()}
    (tmp_path / "events.parquet.manifest.json").write_text(json.dumps(forged))
    assert cli("audit", "verify", str(file), "--offline").returncode == 0
    done = cli("audit", "verify", str(file))
    assert done.returncode == 1
    assert "differs from the ledger's in sha256" in done.stderr
