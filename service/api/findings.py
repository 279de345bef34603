"""`/v1/audit/findings` and `/v1/audit/rules`: what looks like abuse, by which rules, and what was made of it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from events.types import RuleMode
from projections.abuse.rules import Entity, Rule, all_rules, configured
from projections.asking_findings import (
    EvidenceAnswer,
    EvidenceFacts,
    EvidenceRequest,
    FindingFacts,
    FindingsAnswer,
    FindingsRequest,
    FindingStatus,
)
from service.api.analytics import ask_analytics
from service.api.audit import AUDIT
from service.api.routing import Call, operation
from service.api.wire import Done, Id, Page, Seq, cursor_of, given, position_of
from service.errors import NotFound, Unavailable
from service.findings import judge, load_finding, owner_of
from service.parsing import moment
from service.registry import read_sealed, subject_id
from service.rules.findings import Judgement
from service.runtime import Runtime

_LIST = "findings"

DetectedSince = Annotated[str, Meta(min_length=1, max_length=40, description="RFC 3339; by `detected_at`, inclusive.")]
DetectedUntil = Annotated[str, Meta(min_length=1, max_length=40, description="RFC 3339; by `detected_at`, exclusive.")]


class FindingQuery(Page, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """All that is given must hold."""

    rule: Id | UnsetType = UNSET
    status: FindingStatus | UnsetType = UNSET
    client_id: Id | UnsetType = UNSET
    token_id: Id | UnsetType = UNSET
    subject: (
        Annotated[str, Meta(min_length=1, max_length=200, description="User id, username or client id.")] | UnsetType
    ) = UNSET
    from_: DetectedSince | UnsetType = UNSET
    to: DetectedUntil | UnsetType = UNSET


class FindingView(Struct, frozen=True, kw_only=True):
    """An incident that a rule found. `mode` and `parameters` are those that held then.

    `detected_at`: when the use occurred that crossed the threshold. `self_reported`: all of its evidence is what
    callers report themselves, which alone never revokes. `revoked_seq`: the revocation that names the finding.
    """

    finding_id: str
    rule: str
    rule_version: int
    mode: RuleMode
    status: FindingStatus
    detected_at: datetime
    first_at: datetime
    last_at: datetime
    recorded_at: datetime
    ledger_seq: Seq
    self_reported: bool
    token_id: str | UnsetType = UNSET
    grant_id: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    subject: str | UnsetType = UNSET
    caller: str | UnsetType = UNSET
    counts: dict[str, float]
    parameters: dict[str, float]
    revoked_seq: Seq | UnsetType = UNSET
    status_at: datetime | UnsetType = UNSET
    status_by: str | UnsetType = UNSET


class FindingList(Struct, frozen=True, kw_only=True):
    """True at `ledger_seq`: what was recorded later is not in it."""

    items: list[FindingView]
    next_cursor: str | UnsetType = UNSET
    ledger_seq: Seq


class JudgementView(Struct, frozen=True, kw_only=True):
    """How somebody judged the finding. `reason` is left out if whom it is about was erased."""

    status: Judgement
    at: datetime
    by: str
    reason: str | UnsetType = UNSET
    ledger_seq: Seq


class RuleSql(Struct, frozen=True, kw_only=True):
    """What the rule runs, with `$from` and `$until` for the time that it looks at, and the values that it ran with."""

    statement: str
    parameters: dict[str, float]


class FindingDetail(FindingView, frozen=True, kw_only=True):
    """`evidence`: at most 20 of its uses, counts or events, as far as they are kept.

    True at `ledger_position` of LEDGER and `usage_seq` of USAGE. `sql` is left out if this version of the software has
    another version of the rule.
    """

    evidence: list[EvidenceFacts]
    judged: list[JudgementView]
    sql: RuleSql | UnsetType = UNSET
    ledger_position: Seq
    usage_seq: int


class JudgeRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    reason: Annotated[
        str, Meta(min_length=1, max_length=1000, description="Sealed under the key of whom the finding is about.")
    ]


class RuleParameter(Struct, frozen=True, kw_only=True):
    name: str
    value: float
    default: float
    unit: str
    meaning: str


class RuleView(Struct, frozen=True, kw_only=True):
    """A rule as this host's settings have it. `finds`: what; `spares`: what looks like it and is none."""

    rule: str
    version: int
    mode: RuleMode
    entity: Entity
    finds: str
    spares: str
    quiet_seconds: int
    parameters: list[RuleParameter]
    sql: str


class RuleList(Struct, frozen=True):
    items: list[RuleView]


@operation("GET", "/v1/audit/findings", tag="audit", needs=AUDIT, query=FindingQuery, answer=FindingList)
async def list_findings(call: Call[None, FindingQuery]) -> FindingList:
    """List what looks like abuse, the newest first."""
    query, runtime = call.query, call.runtime
    position = position_of(query.cursor, _LIST)
    subject = query.subject or None
    asked = FindingsRequest(
        rule=query.rule or None,
        status=query.status or None,
        client_id=query.client_id or None,
        token_id=query.token_id or None,
        subject=subject and (subject_id(runtime, subject) or subject),
        from_=None if isinstance(query.from_, UnsetType) else moment(query.from_, "from"),
        to=None if isinstance(query.to, UnsetType) else moment(query.to, "to"),
        before_seq=int(position) if position else 2**63 - 1,
        limit=query.limit,
    )
    answer = await _fresh(runtime, asked)
    cursor = cursor_of(_LIST, str(answer.items[-1].ledger_seq).encode()) if answer.more else UNSET
    return FindingList(items=[_view(item) for item in answer.items], next_cursor=cursor, ledger_seq=answer.ledger_seq)


async def _fresh(runtime: Runtime, asked: FindingsRequest) -> FindingsAnswer:
    """With all that this host's view knows of, so that callers find what they have just written; else what is there."""
    wanted = msgspec.structs.replace(asked, min_seq=runtime.view.freshness().position)
    try:
        return await ask_analytics(runtime, wanted, FindingsAnswer)
    except Unavailable:
        return await ask_analytics(runtime, asked, FindingsAnswer)


def _view(item: FindingFacts) -> FindingView:
    return FindingView(**_members(item))


def _members(item: FindingFacts) -> dict[str, Any]:
    members = {name: getattr(item, name) for name in FindingView.__struct_fields__}
    for name in ("counts", "parameters"):
        members[name] = {one.quantity: one.value for one in members[name]}
    return members


@operation("GET", "/v1/audit/findings/{finding_id}", tag="audit", needs=AUDIT, answer=FindingDetail, errors=(404,))
async def show_finding(call: Call[None, Any]) -> FindingDetail:
    """Show a finding with its evidence, how it was judged, and the SQL that found it."""
    answer = await _fresh(call.runtime, FindingsRequest(finding_id=call.name))
    if not answer.items:
        raise NotFound("there is no such finding")
    [item] = answer.items
    kept = await ask_analytics(call.runtime, EvidenceRequest(places=item.evidence), EvidenceAnswer)
    rule = all_rules().get(item.rule)
    same = rule is not None and rule.version == item.rule_version
    members = _members(item)
    return FindingDetail(
        **members,
        evidence=kept.items,
        judged=await _judged(call.runtime, item.finding_id),
        sql=RuleSql(statement=rule.sql, parameters=members["parameters"]) if rule is not None and same else UNSET,
        ledger_position=answer.ledger_seq,
        usage_seq=kept.usage_seq,
    )


async def _judged(runtime: Runtime, finding_id: str) -> list[JudgementView]:
    finding = await load_finding(runtime, finding_id)
    if finding is None:
        return []
    owner = owner_of(finding.found)
    return [
        JudgementView(
            **given(
                status=one.as_,
                at=one.at,
                by=one.by,
                ledger_seq=one.seq,
                reason=await read_sealed(runtime, owner, one.sealed_reason, "finding"),
            )
        )
        for one in finding.judged
    ]


@operation(
    "POST",
    "/v1/audit/findings/{finding_id}/acknowledge",
    tag="audit",
    needs=AUDIT,
    body=JudgeRequest,
    answer=Done,
    errors=(404,),
)
async def acknowledge_finding(call: Call[JudgeRequest, Any]) -> Done:
    """Take a finding for abuse, with a reason."""
    return Done(await judge(call.runtime, call.asker, call.name, "acknowledged", call.body.reason))


@operation(
    "POST",
    "/v1/audit/findings/{finding_id}/dismiss",
    tag="audit",
    needs=AUDIT,
    body=JudgeRequest,
    answer=Done,
    errors=(404,),
)
async def dismiss_finding(call: Call[JudgeRequest, Any]) -> Done:
    """Take a finding for no abuse, with a reason. What it has revoked stays revoked."""
    return Done(await judge(call.runtime, call.asker, call.name, "dismissed", call.body.reason))


@operation("GET", "/v1/audit/rules", tag="audit", needs=AUDIT, answer=RuleList)
async def list_rules(call: Call[None, Any]) -> RuleList:
    """List the rules that look for abuse, with their parameters, their modes and their SQL."""
    return RuleList([_rule_view(rule) for rule in configured(call.runtime.settings.abuse_rules).values()])


def _rule_view(rule: Rule) -> RuleView:
    defaults = all_rules()[rule.name].values
    return RuleView(
        rule=rule.name,
        version=rule.version,
        mode=rule.mode,
        entity=rule.entity,
        finds=rule.finds,
        spares=rule.spares,
        quiet_seconds=rule.quiet_seconds,
        parameters=[
            RuleParameter(name=one.name, value=one.value, default=defaults[one.name], unit=one.unit, meaning=one.text)
            for one in rule.parameters
        ],
        sql=rule.sql,
    )
