"""Delays that grow with failures, by a clock in the test's hands."""

from __future__ import annotations

import pytest

from service.errors import TooManyRequests
from service.signin import delays
from service.signin.delays import Delays, check_delays


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_delay_doubles_after_those_that_are_free_up_to_the_longest(clock: Clock) -> None:
    kept = Delays(3, 10, clock=clock)
    seen = []
    for _ in range(9):
        kept.fail("a")
        seen.append(kept.seconds("a"))
        clock.now += kept.seconds("a")
    assert seen == [0, 0, 1, 2, 4, 8, 10, 10, 10]
    assert kept.seconds("b") == 0


def test_delay_passes_and_asking_does_not_lengthen_it(clock: Clock) -> None:
    kept = Delays(1, 100, clock=clock)
    for _ in range(4):
        kept.fail("a")
    for waited in range(8):
        assert kept.seconds("a") == 8 - waited
        clock.now += 1
    assert kept.seconds("a") == 0


def test_failures_are_forgotten_after_an_hour_without_one(clock: Clock) -> None:
    kept = Delays(1, 900, clock=clock)
    for _ in range(20):
        kept.fail("a")
    clock.now += 3_601
    assert kept.seconds("a") == 0
    kept.fail("a")
    assert kept.seconds("a") == 1


def test_success_forgives_all_and_undoing_takes_back_one(clock: Clock) -> None:
    kept = Delays(1, 900, clock=clock)
    for _ in range(3):
        kept.fail("a")
    kept.undo("a")
    assert kept.seconds("a") == 2
    kept.forgive("a")
    assert kept.seconds("a") == 0
    kept.undo("a")
    assert kept.seconds("a") == 0


def test_memory_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delays, "_KEYS_MAX", 3)
    kept = Delays(1, 900, clock=clock)
    for name in "abcda":
        kept.fail(name)
    assert [kept.seconds(name) for name in "abcd"] == [1, 0, 1, 1]
    assert len(kept._failures) == 3


def test_years_of_failures_are_no_overflow(clock: Clock) -> None:
    kept = Delays(1, 86_400, clock=clock)
    for _ in range(5_000):
        kept.fail("a")
    assert kept.seconds("a") == 86_400


def test_whoever_must_wait_is_told_for_how_long() -> None:
    check_delays(0.0, 0.0)
    with pytest.raises(TooManyRequests) as refused:
        check_delays(0.2, 119.5)
    assert refused.value.headers == {"Retry-After": "120"}
    assert "2 minutes" in refused.value.fix
    with pytest.raises(TooManyRequests) as refused:
        check_delays(0.2, 0.0)
    assert refused.value.headers == {"Retry-After": "1"}
