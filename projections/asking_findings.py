"""What the analytics process can be asked about findings of abuse, and about what rules would have found.

Beside `projections/asking.py`, which says how it is asked.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from events.types import Quantity, RuleMode
from projections.asking import SERVICE, SUBJECTS, Limit, Seq

FindingStatus = Literal["open", "acknowledged", "dismissed"]


class FindingsRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Findings, the newest first; all that is given must hold.

    `from_` ≤ detected_at < `to`. `before_seq`: those that were recorded before this position of LEDGER. `min_seq`: the
    answer waits until this position has been folded in.
    """

    finding_id: str | None = None
    rule: str | None = None
    status: FindingStatus | None = None
    client_id: str | None = None
    token_id: str | None = None
    subject: str | None = None
    from_: datetime | None = msgspec.field(default=None, name="from")
    to: datetime | None = None
    before_seq: Seq = 2**63 - 1
    limit: Limit = 100
    min_seq: Seq = 0


class EvidencePlace(Struct, frozen=True, kw_only=True):
    """As recorded with the finding: see `events.types.Evidence`."""

    source: Literal["use", "refused", "event"]
    seq: int
    index: int


class FindingFacts(Struct, frozen=True, kw_only=True):
    """An incident that a rule found. `mode` and `parameters`: as they were then; `detected_at`: when the use occurred
    that crossed the threshold; `self_reported`: all of its evidence is what callers report themselves.

    `revoked_seq`: where LEDGER has the revocation that names the finding. `status_at`, `status_by`: since when it is
    not open any more, and who said so.
    """

    finding_id: str
    ledger_seq: int
    recorded_at: datetime
    rule: str
    rule_version: int
    mode: RuleMode
    detected_at: datetime
    first_at: datetime
    last_at: datetime
    self_reported: bool
    token_id: str | UnsetType = UNSET
    grant_id: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    subject: str | UnsetType = UNSET
    caller: str | UnsetType = UNSET
    counts: list[Quantity]
    parameters: list[Quantity]
    evidence: list[EvidencePlace]
    status: FindingStatus
    status_at: datetime | UnsetType = UNSET
    status_by: str | UnsetType = UNSET
    revoked_seq: int | UnsetType = UNSET


class FindingsAnswer(Struct, frozen=True, kw_only=True):
    """True at LEDGER sequence `ledger_seq`. `more`: there are older ones."""

    items: list[FindingFacts]
    more: bool
    ledger_seq: int


class EvidenceRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept of the uses, counts and events at these places."""

    places: list[EvidencePlace]


class EvidenceFacts(Struct, frozen=True, kw_only=True):
    """A use, a count of refused requests or an event. `kept`: false if it has left the store by age."""

    source: Literal["use", "refused", "event"]
    seq: int
    index: int
    kept: bool
    occurred_at: datetime | UnsetType = UNSET
    type: str | UnsetType = UNSET
    outcome: str | UnsetType = UNSET
    endpoint: str | UnsetType = UNSET
    caller: str | UnsetType = UNSET
    scope: str | UnsetType = UNSET
    ip: str | UnsetType = UNSET
    network: str | UnsetType = UNSET
    user_agent: str | UnsetType = UNSET
    requests: int | UnsetType = UNSET
    reported: bool | UnsetType = UNSET


class EvidenceAnswer(Struct, frozen=True, kw_only=True):
    """In the order that was asked for. True at `ledger_seq` of LEDGER and `usage_seq` of USAGE."""

    items: list[EvidenceFacts]
    ledger_seq: int
    usage_seq: int


class EngineRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the rules are getting on, and how much they have found."""


class FindingCount(Struct, frozen=True, kw_only=True):
    rule: str
    mode: RuleMode
    findings: int


class EngineAnswer(Struct, frozen=True, kw_only=True):
    """`lag`: messages that are in the store and were not looked at yet; None while the engine has not begun.

    `waiting`: findings that are to revoke and on which the service has not acted yet.
    """

    lag: int | None
    waiting: int
    counts: list[FindingCount]


class BacktestRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Begins a backtest, or tells how far the one with this id is. `stop`: ends it.

    `sql`: the text of a rule's file, to be run instead of the repository's. `changes`: as in settings, `factor=4`.
    `until`: the end of the last day, a midnight in UTC.
    """

    backtest_id: str | None = None
    stop: bool = False
    rule: str = ""
    sql: str | None = None
    changes: list[str] = msgspec.field(default_factory=list)
    until: datetime | None = None
    days: int = 30


class BacktestClient(Struct, frozen=True, kw_only=True):
    """`client_id` null: tokens of no client, as PATs and SATs are, and addresses.

    `found`: incidents; `revoked`: tokens and grants that would have been revoked. `recorded`: findings of the rule that
    LEDGER has of that time; `also_recorded`: those among what was found; the rest of either is `new` and `missed`.
    """

    client_id: str | None
    found: int
    revoked: int
    recorded: int
    also_recorded: int
    new: int
    missed: int


class BacktestAnswer(Struct, frozen=True, kw_only=True):
    """`days_done` of `days`; what was found so far. `examples`: the newest, some of them."""

    backtest_id: str
    rule: str
    rule_version: int
    parameters: list[Quantity]
    state: Literal["running", "done", "stopped", "failed"]
    from_: datetime = msgspec.field(name="from")
    to: datetime
    days: int
    days_done: int
    uses: int
    found: int
    revoked: int
    clients: list[BacktestClient]
    examples: list[dict[str, Any]]
    error: str | UnsetType = UNSET
    ledger_seq: int
    usage_seq: int


SUBJECTS.update(
    {
        FindingsRequest: f"{SERVICE}.findings",
        EvidenceRequest: f"{SERVICE}.evidence",
        EngineRequest: f"{SERVICE}.engine",
        BacktestRequest: f"{SERVICE}.backtest",
    }
)
