"""Issue 3, item 7: the simulation runs end to end, through the real streams and the real analytics process.

Neither times nor shares are judged here: a small history is no measure of the rules, and a machine that runs tests is
too busy for times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from projections.abuse.rules import all_rules
from tests import running
from tests.bench import live, scoring
from tests.bench.evaluation import NAMES
from tests.bench.labels import BURST, NEW_NETWORK, RULES, SCANNING, Label
from tests.bench.people import MINUTE, SECOND
from tests.bench.scoring import Finding

QUICK_SECONDS_MAX = 400


@pytest.mark.slow
def test_bench_abuse_quick_takes_in_every_use_and_finds_attacks_of_most_rules(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    arguments = ["--quick", "--seed", "1", "--preset", "tuning", "--json", str(numbers), "--directory", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.bench.abuse", *arguments],
        cwd=running.ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=QUICK_SECONDS_MAX,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["numbers.json"], "the data directory stayed behind"
    found = json.loads(numbers.read_bytes())
    assert found["rows"]["uses"] == found["written"]["uses"] == 60_000
    assert found["rows"]["refused"] == found["written"]["refused_rows"] > 0
    rows = found["score"]["rows"]
    assert [row["rule"] for row in rows] == list(RULES)
    assert all(row["attacks"] == 3 for row in rows)
    assert sum(row["found"] > 0 for row in rows) >= len(RULES) - 3
    assert {"deployment", "load test", "mobile network", "office behind one address"} <= found["lookalikes"].keys()
    assert "not to be reported" in ended.stdout
    assert all(f"| {rule} |" in ended.stdout for rule in RULES)


def test_every_rule_of_the_repository_has_attacks() -> None:
    assert (set(NAMES), set(NAMES.values())) == (set(all_rules()), set(RULES))


# Scoring, on labels and findings of its own


def _label(number: int, rule: str, *names: str, also: tuple[str, ...] = (), kind: str = "") -> Label:
    return Label(
        number=number,
        kind=kind or rule,
        rule=rule,
        also=also,
        entities=frozenset(names),
        first_us=10 * MINUTE,
        start_us=10 * MINUTE,
        end_us=20 * MINUTE,
        about="made for a test",
    )


def _finding(rule: str, name: str, minutes: float, *, seen_seconds: float = 0) -> Finding:
    at_us = int(minutes * MINUTE)
    return Finding(rule=rule, at_us=at_us, seen_us=at_us + int(seen_seconds * SECOND), entities=frozenset({name}))


def _row(findings: list[Finding], rule: str = NEW_NETWORK) -> scoring.Row:
    attacks = [
        _label(1, NEW_NETWORK, "tok_1", also=(BURST,)),
        _label(2, NEW_NETWORK, "tok_2"),
        _label(3, SCANNING, "ip"),
    ]
    lookalikes = [_label(4, "", "tok_4", kind="journey")]
    scored = scoring.score(attacks, lookalikes, findings, wait=1.0)
    return next(row for row in scored.rows if row.rule == rule)


def test_attack_is_found_by_its_own_rule_in_its_own_time() -> None:
    row = _row([_finding(NEW_NETWORK, "tok_1", 11), _finding(NEW_NETWORK, "tok_1", 12)])
    assert (row.attacks, row.found, row.findings, row.right) == (2, 1, 2, 2)
    assert row.median_seconds == 61.0
    assert (row.recall, row.precision) == (0.5, 1.0)
    assert row.missed == [f"{NEW_NETWORK}: made for a test"]


def test_finding_of_another_rule_is_right_where_the_label_says_so_and_finds_nothing() -> None:
    row = _row([_finding(BURST, "tok_1", 11)], BURST)
    assert (row.attacks, row.found, row.findings, row.right) == (0, 0, 1, 1)
    assert _row([_finding(BURST, "tok_2", 11)], BURST).wrong == {f"another attack ({NEW_NETWORK})": 1}


@pytest.mark.parametrize("minutes", [pytest.param(7, id="before"), pytest.param(23, id="after")])
def test_finding_outside_of_the_attack_is_wrong(minutes: float) -> None:
    row = _row([_finding(NEW_NETWORK, "tok_1", minutes)])
    assert (row.found, row.right, row.wrong) == (0, 0, {"ordinary use": 1})


def test_false_alarm_is_counted_under_the_look_alike_that_it_is_about() -> None:
    assert _row([_finding(NEW_NETWORK, "tok_4", 11)]).wrong == {"journey": 1}


def test_count_that_was_written_late_was_detected_late() -> None:
    assert _row([_finding(SCANNING, "ip", 10, seen_seconds=25)], SCANNING).median_seconds == 26.0


@pytest.mark.slow
def test_attacks_over_http_are_found_in_the_ledger(tmp_path: Path) -> None:
    found = live.run(tmp_path)
    assert [one.rule for one in found] == list(live.DRILLS)
    assert all(one.requests > 0 for one in found)
    assert sum(one.seconds is not None for one in found) >= 5
