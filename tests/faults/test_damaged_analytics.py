"""A damaged analytics file: noticed, set aside, rebuilt, while tokens are validated. Issue "Auditors"."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from projections.analytics import SCHEMA_VERSION
from tests import running
from tests.running import Service, until

pytestmark = pytest.mark.slow

TOKENS = 1_200  # more than one block of the file, and enough that progress is told
REBUILD_SECONDS_MAX = 60.0
QUESTIONS = 20
HEADERS_BYTES = 3 * 4096  # of a DuckDB file
SPAN = {"from": "2026-01-01T00:00:00Z", "to": "2126-01-01T00:00:00Z"}


def store_file(service: Service) -> Path:
    return service.data_dir / "analytics" / f"analytics-{SCHEMA_VERSION}.duckdb"


def aside(service: Service) -> list[Path]:
    found = store_file(service).parent.glob("*.corrupt-*")
    return [file for file in found if file.suffix not in {".wal", ".segments"}]


def damage(file: Path) -> None:
    """Every block, in place: a process that has the file open meets it too."""
    size = file.stat().st_size
    assert size > 2 * 256 * 1024
    with file.open("r+b") as content:
        content.seek(HEADERS_BYTES)
        content.write(os.urandom(size - HEADERS_BYTES))
        content.flush()
        os.fsync(content.fileno())


def totals(service: Service) -> dict[str, Any]:
    """All that auditors can ask about PATs, which the questions themselves do not change."""
    usage = service.done("GET", "/v1/audit/usage", params={**SPAN, "kind": "pat", "group_by": "outcome"})
    tokens = list(service.items("/v1/audit/tokens", kind="pat", sort="issued_at", limit=1000))
    events = list(service.items("/v1/audit/events", limit=1000))
    # What the caller of these questions did is recorded too, but in USAGE.
    return {"usage": [usage["totals"], usage["groups"]], "tokens": tokens, "events": events}


def logged(service: Service, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in service.log_path.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line.get("event") == event]


def populated(service: Service) -> str:
    """A PAT with uses, among many tokens."""
    made = service.pat()
    for code in ("valid", "valid", "insufficient_scope"):
        scope = {"scope": "no:such"} if code == "insufficient_scope" else {}
        assert service.code(made["token"], **scope, context={"ip": "192.0.2.1"}) == code
    app = service.app()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: service.grant(app), range(TOKENS)))
    return str(made["token"])


def answering(service: Service) -> bool:
    """Whether analytics answers, and has all that was recorded but for what is on its way."""
    answer = service.http.get("/health/ready", timeout=5)
    check = answer.json()["checks"]["analytics"]
    return bool(check["ok"]) and check.get("lag", TOKENS) < TOKENS // 10


def test_analytics_file_damaged_while_stopped_is_rebuilt_from_the_log(
    own_service: Callable[..., Service], tmp_path: Path
) -> None:
    first = own_service(directory=tmp_path / "service")
    token = populated(first)
    before = totals(first)
    first.stop()
    damage(store_file(first))
    second = own_service(directory=tmp_path / "service", port=first.port)
    assert second.code(token) == "valid"
    until(lambda: answering(second), seconds=REBUILD_SECONDS_MAX, what="analytics is rebuilt")
    assert logged(second, "analytics_set_aside")[0]["alarm"] is True
    assert len(aside(second)) == 1
    compared(second, before, uses=1)
    told_by_doctor(second)


def test_analytics_file_damaged_in_use_is_rebuilt_while_validation_goes_on(
    own_service: Callable[..., Service], tmp_path: Path
) -> None:
    first = own_service(directory=tmp_path / "service")
    token = populated(first)
    before = totals(first)
    first.stop()  # which moves all into the file
    service = own_service(directory=tmp_path / "service", port=first.port)
    until(lambda: answering(service), seconds=REBUILD_SECONDS_MAX)
    damaged = service.projector("analytics")
    damage(store_file(service))
    answers = []
    validations = 0
    for _ in range(QUESTIONS):
        assert service.code(token) == "valid"
        validations += 1
        answers.append(service.call("GET", "/v1/audit/events", params={"limit": 1000}).status_code)
        if not damaged.alive():
            break
    assert set(answers) <= {200, 503}
    if damaged.alive():
        damaged.kill()  # all that was asked for was in its memory; whoever comes next reads the file

    def rebuilt() -> bool:
        nonlocal validations
        assert service.code(token) == "valid"
        validations += 1
        return bool(aside(service)) and answering(service)

    until(rebuilt, seconds=REBUILD_SECONDS_MAX, what="analytics is rebuilt")
    assert len(aside(service)) == 1
    progress = logged(service, "projector_catching_up")
    assert progress
    assert all(0 <= one["percent"] <= 100 and one["projector"] == "analytics" for one in progress)
    until(lambda: logged(service, "projector_caught_up"), seconds=60, what="it says that it has arrived")
    compared(service, before, uses=validations)
    told_by_doctor(service)


def compared(service: Service, before: dict[str, Any], *, uses: int) -> None:
    """What was there before is there again, and the uses since, once each."""
    after = totals(service)
    assert after["events"] == before["events"]
    [of_all_before, groups_before], [of_all, groups] = before["usage"], after["usage"]
    counted = {one["value"]: one["uses"] for one in groups}
    assert counted == {one["value"]: one["uses"] + uses * (one["value"] == "valid") for one in groups_before}
    assert of_all["uses"] == of_all_before["uses"] + uses
    changed = {"uses", "last_used_at", "addresses"}
    assert [{name: value for name, value in one.items() if name not in changed} for one in after["tokens"]] == [
        {name: value for name, value in one.items() if name not in changed} for one in before["tokens"]
    ]


def told_by_doctor(service: Service) -> None:
    environment = os.environ | {"TOKEN_LEDGER_DATA_DIR": str(service.data_dir)}
    done = subprocess.run(
        [*running.command(), "doctor", "-o", "json"], env=environment, capture_output=True, text=True, check=False
    )
    checks = json.loads(done.stdout)["checks"]
    [finding] = [one for one in checks if one["name"] == "analytics store"]
    assert (finding["state"], aside(service)[0].name in finding["found"]) == ("warning", True)
