"""What is measured of refusals' times runs end to end, and the guesser is as good as told. Issue "People sign in".

No test here judges a time: a machine that runs tests is too busy for that.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests import running
from tests.bench.timing import HEADINGS, guess

SECONDS_MAX = 500
ENDPOINTS = {"/oauth2/token", "/oauth2/par", "/oauth2/introspect", "/oauth2/revoke", "/sign-in"}


@pytest.mark.slow
def test_bench_of_timing_compares_every_pair(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.bench.timing", "--quick", "--directory", str(tmp_path)],
        cwd=running.ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert not list(tmp_path.iterdir()), "the data stayed behind"
    heading, _, *rows = [line.strip("| ").split(" | ") for line in ended.stdout.splitlines() if line.startswith("|")]
    assert tuple(heading) == HEADINGS
    assert {row[0] for row in rows} == {
        "/oauth2/token",
        "/oauth2/par",
        "/oauth2/introspect",
        "/oauth2/revoke",
        "/sign-in",
    }
    for row in rows:
        low, high = map(float, row[8].split(" to "))
        assert 0 <= low <= float(row[7]) <= high <= 1, row
        assert all(float(row[number].replace(",", "")) > 0 for number in (4, 5)), row


@pytest.mark.parametrize(
    ("one", "other", "right"),
    [
        pytest.param([1, 2, 3], [4, 5, 6], 1.0, id="longer"),
        pytest.param([4, 5, 6], [1, 2, 3], 0.0, id="shorter"),
        pytest.param([1, 2, 3], [1, 2, 3], 0.5, id="the same"),
        pytest.param([2, 2], [2, 2, 2], 0.5, id="ties"),
        pytest.param([1, 3], [2, 4], 0.75, id="mostly longer"),
        pytest.param([1, 2], [2, 3, 1], 8 / 12, id="not as many"),
    ],
)
def test_guesser_is_right_as_often_as_the_other_is_longer(one: list[float], other: list[float], right: float) -> None:
    found = guess(one, other)
    pairs = list(itertools.product(one, other))
    assert sum((b > a) + (a == b) / 2 for a, b in pairs) / len(pairs) == pytest.approx(right)
    assert found.right == pytest.approx(right)
    assert 0 <= found.low <= found.right <= found.high <= 1


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Two normal distributions half a deviation apart: the area is 0.638."""
    dice = random.Random(7)
    held = 0
    for _ in range(400):
        found = guess([dice.gauss(0, 1) for _ in range(80)], [dice.gauss(0.5, 1) for _ in range(80)])
        held += found.low <= 0.6382 <= found.high
    assert 0.92 <= held / 400 <= 0.98
