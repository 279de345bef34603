"""When a finding is acted on, and how it is judged: given events, when a command, then events. Pure."""

from __future__ import annotations

from typing import Any

import pytest

from events.types import FindingAcknowledged, FindingDismissed, LedgerEvent
from service.errors import NotFound
from service.rules.findings import Finding, Judge, Nothing, Revoke, decide_act, decide_judge, finding_of
from service.rules.grants import Stamp
from tests.making import START, History, fnd, found, grt, head, tok

ABOUT_TOKEN = {"token_id": tok(1), "grant_id": grt(1), "mode": "revoke"}


def folded(*events: LedgerEvent) -> Finding | None:
    return finding_of(History(*events).recorded)


def judged(as_: str) -> LedgerEvent:
    kind = FindingAcknowledged if as_ == "acknowledged" else FindingDismissed
    return kind(**head(), finding_id=fnd(1))


def test_finding_in_mode_revoke_ends_its_token() -> None:
    assert decide_act(folded(found(fnd(1), **ABOUT_TOKEN))) == Revoke(grt(1), tok(1))
    assert decide_act(folded(found(fnd(1), grant_id=grt(1), mode="revoke"))) == Revoke(grt(1), None)


@pytest.mark.parametrize("mode", ["observe", "notify"])
def test_finding_in_another_mode_ends_nothing(mode: Any) -> None:
    assert decide_act(folded(found(fnd(1), **ABOUT_TOKEN | {"mode": mode}))) == Nothing(f"the rule's mode was {mode}")


def test_what_callers_report_themselves_alone_never_revokes() -> None:
    """Issue item 4: whoever may validate could otherwise end anybody's token."""
    what = decide_act(folded(found(fnd(1), **ABOUT_TOKEN, self_reported=True)))
    assert isinstance(what, Nothing)
    assert "alone never revokes" in what.why


def test_dismissed_finding_ends_nothing_and_acknowledged_one_does() -> None:
    finding = found(fnd(1), **ABOUT_TOKEN)
    assert decide_act(folded(finding, judged("dismissed"))) == Nothing("it was dismissed")
    assert decide_act(folded(finding, judged("acknowledged"))) == Revoke(grt(1), tok(1))
    assert decide_act(folded(finding, judged("dismissed"), judged("acknowledged"))) == Revoke(grt(1), tok(1))


def test_finding_that_is_not_there_or_of_no_token_ends_nothing() -> None:
    assert decide_act(None) == Nothing("there is no such finding")
    assert decide_act(folded(found(fnd(1), mode="revoke"))) == Nothing("it is about no token")


def judging(as_: Any) -> Judge:
    return Judge(
        stamp=Stamp(("a" * 32,), START, tok(9), "request"), finding_id=fnd(1), as_=as_, sealed_reason=b"sealed"
    )


@pytest.mark.parametrize(("as_", "kind"), [("acknowledged", FindingAcknowledged), ("dismissed", FindingDismissed)])
def test_judgement_is_an_event(as_: str, kind: Any) -> None:
    finding = found(fnd(1))
    [event] = decide_judge(judging(as_), folded(finding))
    assert isinstance(event, kind)
    assert (event.finding_id, event.by, event.sealed_reason) == (fnd(1), tok(9), b"sealed")
    # Somebody else has another reason.
    assert len(decide_judge(judging(as_), folded(finding, event))) == 1


def test_judgement_can_change() -> None:
    finding = folded(found(fnd(1)), judged("dismissed"))
    assert finding is not None
    assert finding.status == "dismissed"
    assert len(decide_judge(judging("acknowledged"), finding)) == 1


def test_judgement_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(NotFound):
        decide_judge(judging("dismissed"), folded(judged("dismissed")))
