"""What the log says of a projection that is far behind. Requirement: issue "Auditors", a rebuild shows its progress."""

from __future__ import annotations

from typing import Any

import structlog.testing

from service.supervisor import CatchingUp


def said(*places: tuple[str, int, int]) -> list[tuple[Any, ...]]:
    told = CatchingUp("analytics")
    with structlog.testing.capture_logs() as logs:
        for place in places:
            told(*place)
    return [(one["event"], one["stream"], one["position"], one.get("percent")) for one in logs]


def test_projection_a_little_behind_is_not_told() -> None:
    assert said(("USAGE", 1, 1000), ("USAGE", 999, 1000), ("USAGE", 1000, 1000)) == []


def test_projection_far_behind_is_told_once_in_a_while_and_when_it_arrives() -> None:
    assert said(
        ("USAGE", 1000, 4000),
        ("USAGE", 2000, 4000),
        ("USAGE", 3999, 4000),
        ("USAGE", 4000, 4000),
        ("USAGE", 4001, 4001),
    ) == [("projector_catching_up", "USAGE", 1000, 25), ("projector_caught_up", "USAGE", 4000, None)]


def test_projection_is_told_of_each_stream() -> None:
    told = said(("LEDGER", 0, 1000), ("USAGE", 500, 2000), ("LEDGER", 1000, 1000))
    assert told == [
        ("projector_catching_up", "LEDGER", 0, 0),
        ("projector_catching_up", "USAGE", 500, 25),
        ("projector_caught_up", "LEDGER", 1000, None),
    ]
