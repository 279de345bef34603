"""The rules of findings: when one is acted on, and who judges it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from msgspec import Struct

from events.types import (
    AbuseDetected,
    FindingAcknowledged,
    FindingDismissed,
    LedgerEvent,
    Recorded,
)
from service.errors import NotFound
from service.rules.grants import Stamp, head

Judgement = Literal["acknowledged", "dismissed"]


class Judged(Struct, frozen=True):
    """How somebody judged a finding, the text sealed."""

    as_: Judgement
    at: datetime
    by: str
    seq: int
    sealed_reason: bytes | None


class Finding(Struct, frozen=True):
    """A finding and how it was judged, the last time last. `seq`: the last sequence of its subject."""

    found: AbuseDetected
    judged: tuple[Judged, ...]
    seq: int

    @property
    def status(self) -> Literal["open", "acknowledged", "dismissed"]:
        return self.judged[-1].as_ if self.judged else "open"


def finding_of(events: Sequence[Recorded]) -> Finding | None:
    """The fold of a finding's subject; None if there is no such finding."""
    found: AbuseDetected | None = None
    judged: list[Judged] = []
    for recorded in events:
        event = recorded.event
        match event:
            case AbuseDetected():
                found = found or event
            case FindingAcknowledged():
                judged.append(Judged("acknowledged", recorded.recorded_at, event.by, recorded.seq, event.sealed_reason))
            case FindingDismissed():
                judged.append(Judged("dismissed", recorded.recorded_at, event.by, recorded.seq, event.sealed_reason))
            case _:
                pass
    return Finding(found, tuple(judged), events[-1].seq) if found is not None else None


class Revoke(Struct, frozen=True):
    """End this token, or without one this grant."""

    grant_id: str
    token_id: str | None


class Nothing(Struct, frozen=True):
    """There is nothing to be done, and why."""

    why: str


def decide_act(finding: Finding | None) -> Revoke | Nothing:
    """What follows from a finding by itself. The mode that counts is the one that held when it was found."""
    if finding is None:
        return Nothing("there is no such finding")
    found = finding.found
    if found.mode != "revoke":
        return Nothing(f"the rule's mode was {found.mode}")
    if found.self_reported:
        # Whoever may validate could otherwise end anybody's token by telling stories about it.
        return Nothing("all of its evidence is what callers report themselves, which alone never revokes")
    if finding.status == "dismissed":
        return Nothing("it was dismissed")
    if found.grant_id is None:
        return Nothing("it is about no token")
    return Revoke(found.grant_id, found.token_id)


class Judge(Struct, frozen=True, kw_only=True):
    """Somebody takes a finding for abuse, or for none."""

    stamp: Stamp
    finding_id: str
    as_: Judgement
    sealed_reason: bytes | None


def decide_judge(command: Judge, finding: Finding | None) -> list[LedgerEvent]:
    """An event each time, since each has its own reason. Raises: NotFound."""
    if finding is None:
        raise NotFound("there is no such finding")
    kind = FindingAcknowledged if command.as_ == "acknowledged" else FindingDismissed
    return [
        kind(
            **head(command.stamp),
            finding_id=command.finding_id,
            sealed_reason=command.sealed_reason,
        )
    ]
