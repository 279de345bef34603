"""Findings held against labels: what was found, how soon, and what was found that is none."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable

import msgspec

from tests.bench.labels import RULES, Label
from tests.bench.people import MINUTE, SECOND

# A count of refused requests says no more than its minute, and a writer's clock may be two minutes off.
_TOLERANCE_US = 2 * MINUTE + 10 * SECOND
RECALL_MIN = 0.95
PRECISION_MIN = 0.9
DETECTION_SECONDS_MAX = 10.0


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What a rule found. `rule`: by our name. `at_us`: the time of the use that completed it. `seen_us`: when that
    was written: a count of refused requests is some seconds behind. `entities`: all that it names, or points at.
    """

    rule: str
    at_us: int
    seen_us: int
    entities: frozenset[str]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One rule. Seconds from the start of the attack, in the time of the simulation."""

    rule: str
    attacks: int
    found: int
    findings: int
    right: int
    median_seconds: float | None
    p95_seconds: float | None
    wrong: dict[str, int]  # by what it was about
    missed: list[str]

    @property
    def recall(self) -> float:
        return self.found / self.attacks if self.attacks else 1.0

    @property
    def precision(self) -> float:
        return self.right / self.findings if self.findings else 1.0


class Score(msgspec.Struct, frozen=True, kw_only=True):
    rows: list[Row]
    seconds: list[float]

    @property
    def recall(self) -> float:
        return sum(row.found for row in self.rows) / max(1, sum(row.attacks for row in self.rows))

    @property
    def precision(self) -> float:
        return sum(row.right for row in self.rows) / max(1, sum(row.findings for row in self.rows))

    @property
    def median_seconds(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def score(attacks: Iterable[Label], lookalikes: Iterable[Label], findings: Iterable[Finding], wait: float) -> Score:
    """`wait`: how many seconds a finding may come after its last use, since the rules run so often."""
    by_entity = _indexed(attacks)
    innocent = _indexed(lookalikes)
    found: dict[int, list[float]] = defaultdict(list)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    wrong: dict[str, Counter[str]] = defaultdict(Counter)
    for one in findings:
        total[one.rule] += 1
        matching = [label for label in _near(by_entity, one) if one.rule in {label.rule, *label.also}]
        for label in matching:
            if label.rule == one.rule:
                found[label.number].append(max(0, one.seen_us - label.start_us) / SECOND + wait)
        if matching:
            right[one.rule] += 1
        else:
            wrong[one.rule][_cause(_near(by_entity, one), _near(innocent, one))] += 1
    rows, seconds = [], []
    for rule in RULES:
        of_rule = [label for label in attacks if label.rule == rule]
        times = sorted(min(found[label.number]) for label in of_rule if label.number in found)
        seconds += times
        rows.append(
            Row(
                rule=rule,
                attacks=len(of_rule),
                found=len(times),
                findings=total[rule],
                right=right[rule],
                median_seconds=statistics.median(times) if times else None,
                p95_seconds=times[min(len(times) - 1, int(len(times) * 0.95))] if times else None,
                wrong=dict(wrong[rule].most_common()),
                missed=[f"{label.kind}: {label.about}" for label in of_rule if label.number not in found],
            )
        )
    return Score(rows=rows, seconds=seconds)


def _indexed(labels: Iterable[Label]) -> dict[str, list[Label]]:
    index: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        for name in label.entities:
            index[name].append(label)
    return index


def _near(index: dict[str, list[Label]], finding: Finding) -> list[Label]:
    """Labels of something that the finding names, at that time."""
    labels = {label.number: label for name in finding.entities for label in index.get(name, [])}
    return [
        label
        for label in labels.values()
        if label.first_us - _TOLERANCE_US <= finding.at_us <= label.end_us + _TOLERANCE_US
    ]


def _cause(attacks: list[Label], lookalikes: list[Label]) -> str:
    """What a false alarm was about. One about an attack is of a rule that has nothing to say of it."""
    if attacks:
        return f"another attack ({attacks[0].rule})"
    # What happened on purpose says more than what the token is like every day.
    chosen = min(lookalikes, key=lambda label: label.end_us - label.start_us, default=None)
    return chosen.kind if chosen else "ordinary use"
