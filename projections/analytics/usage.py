"""Who used what, counted: the SQL of `/v1/audit/usage`, and its rows as an answer.

Nothing of the caller stands in the text of a query: names come from the tables below, values are bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from msgspec import UNSET, UnsetType

from projections.analytics.rows import uuid_hex
from projections.asking import (
    UsageAnswer,
    UsageCounts,
    UsageGroup,
    UsageOther,
    UsagePoint,
    UsageRequest,
    UsageSql,
)

# What can be grouped by, and where it stands.
_GROUPS = {
    "client_id": "token.client_id",
    "subject": "token.subject",
    "token_id": "used_token.token_id",
    "kind": "token.kind",
    "outcome": "recorded.outcome",
    "scope": "recorded.scope",
    "ip": "recorded.ip",
    "user_agent": "recorded.user_agent",
    "endpoint": "recorded.endpoint",
}
_FILTERS = {
    "client_id": "token.client_id = $client_id",
    "subject": "token.subject = $subject",
    "token_id": "used_token.token_id = $token_id::UUID",
    "kind": "token.kind = $kind",
    "outcome": "recorded.outcome = $outcome",
    "endpoint": "recorded.endpoint = $endpoint",
    "ip": "recorded.ip = $ip",
}
# A fact of the token and not of the use needs the join. Not the view `tokens`: what ended a token is not asked.
_OF_TOKENS = {"client_id", "subject", "token_id", "kind"}
_JOIN = """
    LEFT JOIN used_tokens AS used_token ON used_token.token_no = recorded.token_no
    LEFT JOIN issued_tokens AS token ON token.token_id = used_token.token_id"""

# A request that named no known token is no row of `uses`: `refused` counts such requests by the minute.
_COUNTED = """WITH recorded AS (
    SELECT occurred_at, token_no, outcome, endpoint, scope, ip, user_agent, 1 AS uses
    FROM uses JOIN origins USING (origin_no) WHERE occurred_at >= $from::TIMESTAMP AND occurred_at < $to::TIMESTAMP
    UNION ALL
    SELECT minute, NULL, outcome, endpoint, NULL, ip, NULL, requests
    FROM refused WHERE minute >= $from::TIMESTAMP AND minute < $to::TIMESTAMP
), counted AS (
    SELECT {value} AS value, {starts_at} AS starts_at,
        recorded.occurred_at, recorded.token_no, recorded.outcome, recorded.ip, recorded.uses
    FROM recorded{join}
    WHERE {conditions}
)"""
# A group beyond the limit has no place.
_PLACED = """, top AS (
    SELECT value, row_number() OVER (ORDER BY sum(uses) DESC, value) AS place
    FROM counted GROUP BY value ORDER BY place LIMIT $limit
), placed AS (
    SELECT counted.*, top.place FROM counted LEFT JOIN top ON top.value IS NOT DISTINCT FROM counted.value
)"""
# One row for everything and one for each place.
_SUMS = """
SELECT {of_a_group} AS of_a_group, false AS of_an_interval, {place}, NULL AS starts_at,
    any_value(value) AS value,
    count(DISTINCT value) + least(1, count(*) FILTER (value IS NULL)) AS values,
    coalesce(sum(uses), 0)::BIGINT AS uses,
    coalesce(sum(uses) FILTER (outcome <> 'valid'), 0)::BIGINT AS refused,
    count(DISTINCT token_no) AS tokens,
    count(DISTINCT ip) AS addresses,
    min(occurred_at) AS first_used_at,
    max(occurred_at) AS last_used_at
FROM {source} GROUP BY GROUPING SETS ({sets})"""
# And of the narrower of these, one for each interval, without what would take long to count so often.
_SERIES = """
UNION ALL BY NAME
SELECT {in_a_group} AS of_a_group, true AS of_an_interval, {place}, starts_at,
    sum(uses)::BIGINT AS uses, coalesce(sum(uses) FILTER (outcome <> 'valid'), 0)::BIGINT AS refused
FROM {source} GROUP BY ALL"""
_ORDER = """
ORDER BY of_a_group, place NULLS LAST, of_an_interval, starts_at"""
_GROUPED = {
    "of_a_group": "grouping(place) = 0",
    "in_a_group": "true",
    "place": "place",
    "source": "placed",
    "sets": "(), (place)",
}
_UNGROUPED = {
    "of_a_group": "false",
    "in_a_group": "false",
    "place": "NULL AS place",
    "source": "counted",
    "sets": "()",
}


def usage_sql(request: UsageRequest) -> tuple[str, dict[str, Any]]:
    """The query, and what is bound in it, as JSON shows it."""
    grouped, timed = request.group_by is not None, request.interval is not None
    filters = {name: value for name in _FILTERS if (value := getattr(request, name)) is not None}
    counted = _COUNTED.format(
        value=_GROUPS[request.group_by] if request.group_by else "NULL",
        starts_at="date_trunc($interval, recorded.occurred_at)" if timed else "NULL",
        join=_JOIN if _OF_TOKENS & {*filters, request.group_by} else "",
        conditions=" AND ".join(_FILTERS[name] for name in filters) or "true",
    )
    pieces = _GROUPED if grouped else _UNGROUPED
    sums = _SUMS.format(**pieces) + (_SERIES.format(**pieces) if timed else "") + _ORDER
    parameters: dict[str, Any] = {"from": _text(request.from_), "to": _text(request.to)} | filters
    if "token_id" in filters:
        parameters["token_id"] = uuid_hex(filters["token_id"])
    if grouped:
        parameters["limit"] = request.limit
    if timed:
        parameters["interval"] = request.interval
    return counted + (_PLACED if grouped else "") + sums, parameters


def usage_answer(
    request: UsageRequest, rows: Sequence[tuple[Any, ...]], *, ledger_seq: int, usage_seq: int
) -> UsageAnswer:
    """The answer from the rows of `usage_sql`, which are true at these positions."""
    totals, groups = UsageCounts(), []
    other: UsageOther | UnsetType = UNSET
    series: dict[int | None, list[UsagePoint]] = {}
    for of_a_group, of_an_interval, place, starts_at, value, values, *counts in rows:
        if of_an_interval:
            point = UsagePoint(starts_at=starts_at.replace(tzinfo=UTC), uses=counts[0], refused=counts[1])
            series.setdefault(place, []).append(point)
            continue
        members = _counts(counts)
        if request.interval is not None and (of_a_group or request.group_by is None):
            members["series"] = series.setdefault(place, [])
        if not of_a_group:
            totals = UsageCounts(**members)
        elif place is None:
            other = UsageOther(groups=values, **members)
        else:
            groups.append(UsageGroup(value=f"tok_{value.hex}" if isinstance(value, UUID) else value, **members))
    return UsageAnswer(
        from_=request.from_,
        to=request.to,
        group_by=request.group_by or UNSET,
        interval=request.interval or UNSET,
        totals=totals,
        groups=groups if request.group_by else UNSET,
        other=other,
        ledger_seq=ledger_seq,
        usage_seq=usage_seq,
        sql=UsageSql(*usage_sql(request)) if request.explain else UNSET,
    )


def _counts(counts: Sequence[Any]) -> dict[str, Any]:
    members = dict(zip(UsageCounts.__struct_fields__, counts, strict=False))
    for name in ("first_used_at", "last_used_at"):
        members[name] = UNSET if members[name] is None else members[name].replace(tzinfo=UTC)
    return members


def _text(moment: datetime) -> str:
    """As DuckDB's TIMESTAMP, which has no zone: UTC."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat()
