"""`/v1/audit/usage`: who used what, counted."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from projections.asking import (
    GroupBy,
    Interval,
    UsageAnswer,
    UsageRequest,
)
from service.api.analytics import ask_analytics
from service.api.audit import AUDIT
from service.api.routing import Call, operation
from service.api.wire import Id
from service.errors import InvalidRequest
from service.parsing import ip_address, moment
from service.registry import subject_id
from service.runtime import Runtime
from service.tokens import now

ROWS_MAX = 10_000  # of an answer: intervals in its range, for each group
_FROM_DEFAULT = timedelta(hours=24)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LENGTHS = {"minute": timedelta(minutes=1), "hour": timedelta(hours=1), "day": timedelta(days=1)}
_LONGER = {"minute": "hour", "hour": "day"}

Since = Annotated[str, Meta(min_length=1, max_length=40, description="RFC 3339; inclusive. By default 24 hours ago.")]
Until = Annotated[str, Meta(min_length=1, max_length=40, description="RFC 3339; exclusive. By default now.")]
Endpoint = Literal[
    "validate", "batch", "introspect", "forward-auth", "api", "client", "reported", "userinfo", "sign-in"
]
Outcome = Literal[
    "valid",
    "malformed",
    "unknown",
    "stale",
    "revoked",
    "client_disabled",
    "subject_disabled",
    "not_yet_valid",
    "expired",
    "ip_not_allowed",
    "wrong_audience",
    "insufficient_scope",
    "invalid_client",
    "not_permitted",
    "invalid_password",
]
Subject = Annotated[str, Meta(min_length=1, max_length=200, description="User id, username or client id.")]
Groups = Annotated[int, Meta(ge=1, le=1000, description="Groups told one by one; smaller ones are summed as `other`.")]


class UsageQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """Of the filters all that are given must hold."""

    group_by: GroupBy | UnsetType = UNSET
    interval: Annotated[Interval, Meta(description="A series: uses by minute, hour or day, UTC.")] | UnsetType = UNSET
    from_: Since | UnsetType = UNSET
    to: Until | UnsetType = UNSET
    limit: Groups = 10
    client_id: Id | UnsetType = UNSET
    subject: Subject | UnsetType = UNSET
    token_id: Id | UnsetType = UNSET
    kind: Literal["access", "refresh", "pat", "sat"] | UnsetType = UNSET
    outcome: Outcome | UnsetType = UNSET
    endpoint: Endpoint | UnsetType = UNSET
    ip: Annotated[str, Meta(min_length=2, max_length=45)] | UnsetType = UNSET
    distinct: Annotated[bool, Meta(description="Also how many tokens and addresses. It takes longer.")] = False
    explain: Annotated[Literal["sql"], Meta(description="Also the query that counted.")] | UnsetType = UNSET


@operation("GET", "/v1/audit/usage", tag="audit", needs=AUDIT, query=UsageQuery, answer=UsageAnswer)
async def show_usage(call: Call[None, UsageQuery]) -> UsageAnswer:
    """Count uses of tokens, by whom, by what and by time.

    By the time at which they occurred, `from` inclusive and `to` exclusive, so that adjoining ranges add up. Requests
    that named no known token are among them, to the minute and some seconds late.
    """
    return await ask_analytics(
        call.runtime,
        _asked(call.runtime, call.query),
        UsageAnswer,
        smaller="ask for a shorter time or a longer interval",
    )


def _asked(runtime: Runtime, query: UsageQuery) -> UsageRequest:
    present = now()
    until = present if isinstance(query.to, UnsetType) else moment(query.to, "to")
    since = present - _FROM_DEFAULT if isinstance(query.from_, UnsetType) else moment(query.from_, "from")
    _check_range(query, since, until)
    subject = query.subject or None
    return UsageRequest(
        group_by=query.group_by or None,
        interval=query.interval or None,
        from_=since,
        to=until,
        limit=query.limit,
        distinct=query.distinct,
        explain=query.explain == "sql",
        client_id=query.client_id or None,
        subject=subject and (subject_id(runtime, subject) or subject),
        token_id=query.token_id or None,
        kind=query.kind or None,
        outcome=query.outcome or None,
        endpoint=query.endpoint or None,
        ip=None if isinstance(query.ip, UnsetType) else ip_address(query.ip, "ip"),
    )


def _check_range(query: UsageQuery, since: datetime, until: datetime) -> None:
    """Raises: InvalidRequest."""
    if since >= until:
        fix = "give from too: it is 24 hours ago" if isinstance(query.from_, UnsetType) else "give an earlier from"
        raise InvalidRequest("from must be before to", fix=fix)
    if isinstance(query.interval, UnsetType):
        return
    length = _LENGTHS[query.interval]
    count = -((_EPOCH - until) // length) - (since - _EPOCH) // length
    groups = 1 if isinstance(query.group_by, UnsetType) else query.limit + 1  # and `other`
    if count * groups > ROWS_MAX:
        raise InvalidRequest(
            f"{count:,} intervals of one {query.interval} for {_named(groups)} are {count * groups:,} numbers, "
            f"more than {ROWS_MAX:,}",
            fix=_narrower(query.interval, count, groups),
        )


def _named(groups: int) -> str:
    return "one group" if groups == 1 else f"{groups - 1:,} groups and the others"


def _narrower(interval: str, count: int, groups: int) -> str:
    """What can be asked instead."""
    ways = []
    if interval in _LONGER:
        ways.append(f"interval={_LONGER[interval]}")
    ways.append(f"at most {ROWS_MAX // groups - 1:,} {interval}s between from and to")
    if groups > 1 and (limit := ROWS_MAX // count - 1) >= 1:
        ways.append(f"limit={limit}")
    return " or ".join(ways)
