"""Delays that grow with failures, by a clock in the test's hands."""

from __future__ import annotations

import pytest

from service.errors import TooManyRequests
from service.settings import Settings
from service.signin import delays
from service.signin.delays import Counters, Delays, address_delays, check_delays


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


def test_success_forgives_all(clock: Clock) -> None:
    kept = Delays(1, 900, clock=clock)
    for _ in range(3):
        kept.fail("a")
    assert kept.seconds("a") == 4
    kept.forgive("a")
    assert kept.seconds("a") == 0
    kept.undo("a")
    assert kept.seconds("a") == 0


def test_attempt_counts_while_it_is_underway_and_leaves_no_trace_if_it_is_none(clock: Clock) -> None:
    """Else each success would make all others at the address wait anew."""
    kept = Delays(2, 900, clock=clock)
    for _ in range(4):
        kept.fail("a")
    clock.now += 3
    assert kept.seconds("a") == 1
    clock.now += 1
    assert kept.seconds("a") == 0
    kept.begin("a")
    kept.begin("a")
    assert kept.seconds("a") == 16
    clock.now += 2
    kept.undo("a")
    assert kept.seconds("a") == 6
    kept.undo("a")
    assert kept.seconds("a") == 0


def test_attempt_that_fails_is_one_failure(clock: Clock) -> None:
    kept = Delays(1, 900, clock=clock)
    for _ in range(3):
        kept.begin("a")
        kept.fail("a")
    assert kept.seconds("a") == 4


def test_failures_pass_one_by_one(clock: Clock) -> None:
    kept = Delays(3, 30, passes_seconds=60, clock=clock)
    for _ in range(9):
        kept.fail("a")
    clock.now += 60 * 5 + 59
    assert kept.seconds("a") == 0
    kept.fail("a")  # the fifth
    assert kept.seconds("a") == 4
    clock.now += 1
    assert kept.seconds("a") == 1
    clock.now += 60 * 10
    kept.fail("a")
    assert kept.seconds("a") == 0


def test_delays_of_addresses_are_short_and_pass() -> None:
    """However many failed there: whoever else is behind the address waits half a minute at most."""
    settings = Settings.load({})
    of_address = address_delays(settings, of=1)
    for _ in range(10_000):
        of_address.fail("a")
    assert 29 < of_address.seconds("a") <= 30
    assert (of_address._free, of_address._passes_seconds) == (30, 60)
    of_network = address_delays(settings, of=16)
    assert (of_network._free, of_network._passes_seconds) == (480, 3.75)


def test_what_could_not_begin_is_not_taken_back(clock: Clock) -> None:
    """Another attempt is underway there, and goes on counting."""
    kept = Delays(1, 900, clock=clock)
    first, second = Counters([(kept, "a")]), Counters([(kept, "a")])
    first.begin()
    with pytest.raises(TooManyRequests):
        second.begin()
    second.undo()
    assert kept.seconds("a") == 1
    first.undo()
    assert kept.seconds("a") == 0


def test_memory_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delays, "_KEYS_MAX", 3)
    kept = Delays(1, 900, clock=clock)
    for name in "abcda":
        kept.fail(name)
    assert [kept.seconds(name) for name in "abcd"] == [1, 0, 1, 1]
    assert len(kept._kept) == 3


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
