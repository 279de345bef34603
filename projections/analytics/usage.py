"""Who used what, counted: the SQL of `/v1/audit/usage`, and its rows as an answer.

Nothing of the caller stands in the text of a query: names come from the tables below, values are bound.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
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

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# What can be grouped by: the column of a count that tells it, and what it is where it is not that column itself.
_GROUPS = {
    "client_id": ("token_no", "token.client_id"),
    "subject": ("token_no", "token.subject"),
    "token_id": ("token_no", "used_token.token_id"),
    "kind": ("token_no", "token.kind"),
    "outcome": ("outcome", "cell.key"),
    "scope": ("scope", "cell.key"),
    "ip": ("origin_no", "origin.ip"),
    "user_agent": ("origin_no", "origin.user_agent"),
    "endpoint": ("endpoint", "cell.key"),
}
_OF_TOKENS = """token_no IN (
        SELECT token_no FROM used_tokens JOIN issued_tokens USING (token_id) WHERE {column} = ${column})"""
_FILTERS = {
    "client_id": _OF_TOKENS.format(column="client_id"),
    "subject": _OF_TOKENS.format(column="subject"),
    "token_id": "token_no = (SELECT token_no FROM used_tokens WHERE token_id = $token_id::UUID)",
    "kind": _OF_TOKENS.format(column="kind"),
    "outcome": "outcome = $outcome",
    "endpoint": "endpoint = $endpoint",
    "ip": "origin_no IN (SELECT origin_no FROM origins WHERE ip = $ip)",
}
_NAMED = {
    "token_no": """
    LEFT JOIN used_tokens AS used_token ON used_token.token_no = cell.key
    LEFT JOIN issued_tokens AS token ON token.token_id = used_token.token_id""",
    "origin_no": """
    LEFT JOIN origins AS origin ON origin.origin_no = cell.key""",
}

# The range is cut at the first and last whole hour and day in it: from < hours_from < days_from < days_to < hours_to
# < to, all of which may be the same. What is added up is read from the roll-ups; one by one are read the uses at the
# ends and those that are not sealed yet. A request that named no known token is no use: `refused` counts such
# requests by the minute.
_SINGLY = "occurred_at AS first_at, occurred_at AS last_at, token_no, origin_no, outcome, endpoint, scope, 1 AS uses"
_ADDED_UP = "first_at, last_at, token_no, origin_no, outcome, endpoint, scope, uses"
_REFUSED = """
    SELECT minute AS first_at, minute AS last_at, NULL AS token_no, origin_no, outcome, endpoint, NULL AS scope,
        requests AS uses
    FROM refused WHERE minute >= $from::TIMESTAMP AND minute < $to::TIMESTAMP"""
_ENDS = f"""
    SELECT {_SINGLY} FROM uses
    WHERE occurred_at >= $from::TIMESTAMP AND occurred_at < $hours_from::TIMESTAMP
    UNION ALL
    SELECT {_SINGLY} FROM uses
    WHERE occurred_at >= $hours_to::TIMESTAMP AND occurred_at < $to::TIMESTAMP
    UNION ALL
    SELECT {_SINGLY} FROM recent_uses
    WHERE occurred_at >= $hours_from::TIMESTAMP AND occurred_at < $hours_to::TIMESTAMP
    UNION ALL{_REFUSED}"""  # noqa: S608 - constants
_DAYS = f"""
    SELECT {_ADDED_UP} FROM usage_days WHERE day >= $days_from::TIMESTAMP AND day < $days_to::TIMESTAMP
    UNION ALL
    SELECT {_ADDED_UP} FROM usage_hours WHERE hour >= $hours_from::TIMESTAMP AND hour < $days_from::TIMESTAMP
    UNION ALL
    SELECT {_ADDED_UP} FROM usage_hours WHERE hour >= $days_to::TIMESTAMP AND hour < $hours_to::TIMESTAMP
    UNION ALL{_ENDS}"""  # noqa: S608 - constants
_HOURS = f"""
    SELECT {_ADDED_UP} FROM usage_hours WHERE hour >= $hours_from::TIMESTAMP AND hour < $hours_to::TIMESTAMP
    UNION ALL{_ENDS}"""  # noqa: S608 - constants
_USES = f"""
    SELECT {_SINGLY} FROM uses WHERE occurred_at >= $from::TIMESTAMP AND occurred_at < $to::TIMESTAMP
    UNION ALL{_REFUSED}"""  # noqa: S608 - constants
# With these alone minutes need not be counted one use by one.
_MINUTE_COLUMNS = {"client_id", "kind", "outcome", "endpoint"}
_OF_A_MINUTE = """
    SELECT occurred_at AS first_at, client_id, kind, outcome, endpoint, 1 AS uses
    FROM uses LEFT JOIN used_tokens USING (token_no) LEFT JOIN issued_tokens USING (token_id)"""
_MINUTES = f"""
    SELECT minute AS first_at, client_id, kind, outcome, endpoint, uses FROM all_usage_minutes
    WHERE minute >= $minutes_from::TIMESTAMP AND minute < $minutes_to::TIMESTAMP
    UNION ALL{_OF_A_MINUTE}
    WHERE occurred_at >= $from::TIMESTAMP AND occurred_at < $minutes_from::TIMESTAMP
    UNION ALL{_OF_A_MINUTE}
    WHERE occurred_at >= $minutes_to::TIMESTAMP AND occurred_at < $to::TIMESTAMP
    UNION ALL
    SELECT minute AS first_at, NULL AS client_id, NULL AS kind, outcome, endpoint, requests AS uses
    FROM refused WHERE minute >= $from::TIMESTAMP AND minute < $to::TIMESTAMP"""  # noqa: S608 - constants

# First together what can be told of the same key: all that follows has few rows to go over.
_COUNTED = """WITH recorded AS NOT MATERIALIZED ({recorded}
), cells AS (
    SELECT {key} AS key, sum(uses)::BIGINT AS uses,
        coalesce(sum(uses) FILTER (outcome <> 'valid'), 0)::BIGINT AS refused,
        min(first_at) AS first_at, max(last_at) AS last_at
    FROM recorded WHERE {conditions} GROUP BY ALL
), counted AS (
    SELECT {value} AS value, cell.* FROM cells AS cell{join}
)"""
# A group beyond the limit has no place.
_PLACED = """, sized AS (
    SELECT value, sum(uses) AS uses FROM counted GROUP BY value
), first AS (
    SELECT value, uses FROM sized ORDER BY uses DESC, value LIMIT $limit
), top AS (
    SELECT value, row_number() OVER (ORDER BY uses DESC, value) AS place FROM first
), placed AS (
    SELECT counted.*, top.place FROM counted LEFT JOIN top ON top.value IS NOT DISTINCT FROM counted.value
)"""
_UNPLACED = """, placed AS (
    SELECT *, NULL AS place FROM counted
)"""
# One row for everything and one for each place.
_SUMS = """, sums AS (
    SELECT {of_a_group} AS of_a_group, {place}, any_value(value) AS value, {beyond} AS groups_beyond,
        coalesce(sum(uses), 0)::BIGINT AS uses, coalesce(sum(refused), 0)::BIGINT AS refused,
        min(first_at) AS first_used_at, max(last_at) AS last_used_at
    FROM placed GROUP BY GROUPING SETS ({sets})
)"""
# How many tokens and addresses there are takes longest: each is looked at with each key that it was met with.
_DISTINCT = """, met AS (
    SELECT DISTINCT {key} AS key, token_no, origin_no FROM recorded WHERE {conditions}
), met_places AS (
    SELECT DISTINCT placed.place, met.token_no, origin.address_no
    FROM met JOIN placed ON placed.key IS NOT DISTINCT FROM met.key
    LEFT JOIN origins AS origin ON origin.origin_no = met.origin_no
), kinds AS (
    SELECT {of_a_group} AS of_a_group, {place}, count(DISTINCT token_no) AS tokens,
        count(DISTINCT address_no) AS addresses
    FROM met_places GROUP BY GROUPING SETS ({sets})
)"""
_ANSWER = """
SELECT sums.of_a_group, false AS of_an_interval, sums.place, NULL AS starts_at, value, groups_beyond, uses, refused,
    first_used_at, last_used_at
FROM sums"""
_ANSWER_DISTINCT = """
SELECT sums.of_a_group, false AS of_an_interval, sums.place, NULL AS starts_at, value, groups_beyond, uses, refused,
    first_used_at, last_used_at, tokens, addresses
FROM sums JOIN kinds ON kinds.of_a_group = sums.of_a_group AND kinds.place IS NOT DISTINCT FROM sums.place"""
# And of the narrower of these, one for each interval, without what would take long to count so often.
_SERIES = """
UNION ALL BY NAME
SELECT {in_a_group} AS of_a_group, true AS of_an_interval, {place},
    date_trunc($interval, timed.first_at)::TIMESTAMP AS starts_at,
    sum(timed.uses)::BIGINT AS uses,
    coalesce(sum(timed.uses) FILTER (timed.outcome <> 'valid'), 0)::BIGINT AS refused
FROM ({timed}
) AS timed{join}
WHERE {conditions} GROUP BY ALL"""
_ORDER = """
ORDER BY of_a_group, place NULLS LAST, of_an_interval, starts_at"""
_GROUPED = {
    "of_a_group": "grouping(place) = 0",
    "beyond": "(SELECT count(*) FROM sized) - (SELECT count(*) FROM top)",
    "sets": "(), (place)",
    "place": "place",
}
_UNGROUPED = {"of_a_group": "false", "beyond": "0", "sets": "()", "place": "NULL AS place"}


def usage_sql(request: UsageRequest) -> tuple[str, dict[str, Any]]:
    """The query, and what is bound in it, as JSON shows it."""
    filters = {name: value for name in _FILTERS if (value := getattr(request, name)) is not None}
    key, value = _GROUPS[request.group_by] if request.group_by else ("NULL", "NULL")
    grouped = request.group_by is not None
    conditions = " AND ".join(_FILTERS[name] for name in filters) or "true"
    shape = _GROUPED if grouped else _UNGROUPED
    sql = _COUNTED.format(recorded=_DAYS, key=key, conditions=conditions, value=value, join=_NAMED.get(key, ""))
    sql += (_PLACED if grouped else _UNPLACED) + _SUMS.format(**shape)
    if request.distinct:
        sql += _DISTINCT.format(key=key, conditions=conditions, **shape) + _ANSWER_DISTINCT
    else:
        sql += _ANSWER
    if request.interval is not None:
        sql += _series(request, key, set(filters))
    sql += _ORDER
    bound: dict[str, Any] = filters | _cuts(request) | {"limit": request.limit, "interval": request.interval}
    if "token_id" in filters:
        bound["token_id"] = uuid_hex(filters["token_id"])
    used = set(re.findall(r"\$(\w+)", sql))
    return sql, {name: value for name, value in bound.items() if name in used}


def _series(request: UsageRequest, key: str, filters: set[str]) -> str:
    grouped = request.group_by is not None
    of_minutes = request.interval == "minute" and {*filters, request.group_by or "outcome"} <= _MINUTE_COLUMNS
    conditions = (f"{name} = ${name}" if of_minutes else _FILTERS[name] for name in sorted(filters))
    if of_minutes:
        join = f"\nLEFT JOIN top ON top.value IS NOT DISTINCT FROM timed.{request.group_by}"
    else:
        # Which values of the key have a place is known by now; those without are the others.
        keys = "(SELECT key, place FROM placed WHERE place IS NOT NULL)"
        join = f"\nLEFT JOIN {keys} AS known ON known.key IS NOT DISTINCT FROM timed.{key}"
    return _SERIES.format(
        in_a_group="true" if grouped else "false",
        place="place" if grouped else "NULL AS place",
        timed=_MINUTES if of_minutes else {"day": _DAYS, "hour": _HOURS, "minute": _USES}[str(request.interval)],
        join=join if grouped else "",
        conditions=" AND ".join(conditions) or "true",
    )


def _cuts(request: UsageRequest) -> dict[str, str]:
    """Where the range is cut; what has no whole hour is all one end, and what has no whole day all hours."""
    cuts = {"from": request.from_, "to": request.to}
    for name, seconds in (("minutes", 60), ("hours", 3600), ("days", 86_400)):
        first, last = _whole(request.from_, request.to, seconds)
        if first >= last:
            # Beyond the last end of what is longer, so that nothing is left to it.
            first = last = cuts.get("hours_to", request.to)
        cuts |= {f"{name}_from": first, f"{name}_to": last}
    return {name: _text(moment) for name, moment in cuts.items()}


def _whole(since: datetime, until: datetime, seconds: int) -> tuple[datetime, datetime]:
    """The first and the last beginning of so many seconds (UTC) that lie in the range."""
    span = timedelta(seconds=seconds)
    try:
        first = _EPOCH - (_EPOCH - since) // span * span
    except OverflowError:  # the last day that there is
        return until, until
    return first, _EPOCH + (until - _EPOCH) // span * span


def usage_answer(
    request: UsageRequest, rows: Sequence[tuple[Any, ...]], *, ledger_seq: int, usage_seq: int
) -> UsageAnswer:
    """The answer from the rows of `usage_sql`, which are true at these positions."""
    totals, groups = UsageCounts(), []
    other: UsageOther | UnsetType = UNSET
    series: dict[int | None, list[UsagePoint]] = {}
    for of_a_group, of_an_interval, place, starts_at, value, beyond, *counts in rows:
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
            other = UsageOther(groups=beyond, **members)
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
