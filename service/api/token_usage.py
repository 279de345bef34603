"""`/v1/audit/tokens` and `/v1/audit/scopes`: how much tokens are used, and how much of what they may do."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from projections.asking import UsageSql
from projections.asking_tokens import (
    ScopesAnswer,
    ScopesRequest,
    ScopesUsed,
    Sort,
    Status,
    TokensAnswer,
    TokensRequest,
    TokenUsage,
)
from service.api.analytics import ask_analytics
from service.api.audit import AUDIT
from service.api.routing import Call, operation
from service.api.tokens import KindName
from service.api.usage import Subject
from service.api.wire import Id, Page, ScopeName, Seq, cursor_of, position_of
from service.errors import InvalidRequest
from service.registry import subject_id
from service.runtime import Runtime
from service.tokens import now

_SMALLER = "ask for one client_id, subject or kind"
_CursorValue = datetime | int | None

Explain = Annotated[Literal["sql"], Meta(description="Also the query that counted.")]
Days = Annotated[int, Meta(ge=1, le=3650)]


class TokenUsageQuery(Page, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the filters all that are given must hold.

    A token that was never used counts as last used before all others. What changes while pages are asked for may be met
    twice or not at all.
    """

    client_id: Id | UnsetType = UNSET
    subject: Subject | UnsetType = UNSET
    kind: KindName | UnsetType = UNSET
    status: Annotated[Status, Meta(description="`spent`: a refresh token that was exchanged.")] | UnsetType = UNSET
    scope: Annotated[ScopeName, Meta(description="One that the token has.")] | UnsetType = UNSET
    sort: Sort = "last_used_at"
    order: Literal["desc", "asc"] = "desc"
    explain: Explain | UnsetType = UNSET


class DaysQuery(Page, frozen=True, kw_only=True, forbid_unknown_fields=True):
    days: Days = 30
    explain: Explain | UnsetType = UNSET


class TokenUsageList(Struct, frozen=True, kw_only=True):
    """True at `ledger_seq` of LEDGER and `usage_seq` of USAGE."""

    items: list[TokenUsage]
    next_cursor: str | UnsetType = UNSET
    ledger_seq: Seq
    usage_seq: int
    sql: UsageSql | UnsetType = UNSET


@operation("GET", "/v1/audit/tokens", tag="audit", needs=AUDIT, query=TokenUsageQuery, answer=TokenUsageList)
async def list_token_usage(call: Call[None, TokenUsageQuery]) -> TokenUsageList:
    """List tokens by how much they are used: last use, uses, refused uses, addresses, age.

    Tokens of all kinds, however long ago they ended. Uses count as far as they are kept.
    """
    asked = call.query
    subject = asked.subject or None
    request = TokensRequest(
        now=now(),
        client_id=asked.client_id or None,
        subject=subject and (subject_id(call.runtime, subject) or subject),
        kind=asked.kind or None,
        status=asked.status or None,
        scope=asked.scope or None,
        sort=asked.sort,
        descending=asked.order == "desc",
    )
    return await _listed(call.runtime, asked, f"token usage {asked.sort} {asked.order}", request)


@operation("GET", "/v1/audit/tokens/unused", tag="audit", needs=AUDIT, query=DaysQuery, answer=TokenUsageList)
async def list_unused_tokens(call: Call[None, DaysQuery]) -> TokenUsageList:
    """List good tokens that nobody has used for so many days, the oldest first.

    Tokens that were issued since are not among them.
    """
    present = now()
    since = present - timedelta(days=call.query.days)
    request = TokensRequest(now=present, status="active", unused_since=since, sort="issued_at", descending=False)
    return await _listed(call.runtime, call.query, "unused tokens", request)


@operation("GET", "/v1/audit/tokens/expiring", tag="audit", needs=AUDIT, query=DaysQuery, answer=TokenUsageList)
async def list_expiring_tokens(call: Call[None, DaysQuery]) -> TokenUsageList:
    """List good tokens that expire within so many days, the first to expire first, with how much they are used."""
    present = now()
    until = present + timedelta(days=call.query.days)
    request = TokensRequest(now=present, status="active", expiring_until=until, sort="expires_at", descending=False)
    return await _listed(call.runtime, call.query, "expiring tokens", request)


async def _listed(
    runtime: Runtime, asked: TokenUsageQuery | DaysQuery, of: str, request: TokensRequest
) -> TokenUsageList:
    position = position_of(asked.cursor, of)
    after = msgspec.json.decode(position, type=tuple[_CursorValue, str]) if position else None
    request = msgspec.structs.replace(request, limit=asked.limit, after=after, explain=asked.explain == "sql")
    answer = await ask_analytics(runtime, request, TokensAnswer, smaller=_SMALLER)
    cursor: str | UnsetType = UNSET
    if answer.more:
        last = answer.items[-1]
        value = getattr(last, request.sort)
        cursor = cursor_of(of, msgspec.json.encode((None if value is UNSET else value, last.token_id)))
    return TokenUsageList(
        items=answer.items,
        next_cursor=cursor,
        ledger_seq=answer.ledger_seq,
        usage_seq=answer.usage_seq,
        sql=answer.sql,
    )


class ScopesQuery(Page, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the filters all that are given must hold."""

    by: Annotated[Literal["token", "client"], Meta(description="An item for each good token, or each client.")] = (
        "token"
    )
    days: Annotated[Days, Meta(description="Whole days, UTC, before today; today is looked at too.")] = 90
    include_used: Annotated[bool, Meta(description="Also items of which every scope was used.")] = False
    client_id: Id | UnsetType = UNSET
    subject: Subject | UnsetType = UNSET
    token_id: Id | UnsetType = UNSET
    kind: Literal["access", "pat", "sat"] | UnsetType = UNSET
    explain: Explain | UnsetType = UNSET


class ScopesUsedList(Struct, frozen=True, kw_only=True):
    """Uses are counted from `from`, the beginning of a day. True at `ledger_seq` of LEDGER and `usage_seq` of USAGE."""

    items: list[ScopesUsed]
    next_cursor: str | UnsetType = UNSET
    from_: datetime = msgspec.field(name="from")
    ledger_seq: Seq
    usage_seq: int
    sql: UsageSql | UnsetType = UNSET


@operation("GET", "/v1/audit/scopes", tag="audit", needs=AUDIT, query=ScopesQuery, answer=ScopesUsedList)
async def list_unused_scopes(call: Call[None, ScopesQuery]) -> ScopesUsedList:
    """List scopes that were granted and not used for so many days, and the narrower scope that would do.

    A scope counts as used if a validation asked for it and the answer was `valid`. Validations that asked for no scope
    prove nothing, and are counted apart as `unscoped_uses`: whoever asks so may judge the scope by himself.
    JWTs that are verified offline leave no use. A refresh token has no uses of its own; its client's tell.
    """
    asked = call.query
    _check_filters(asked)
    present = now()
    since = datetime.combine(present.date() - timedelta(days=asked.days), time(), UTC)
    of = f"scopes by {asked.by} since {since:%Y-%m-%d}"
    subject = asked.subject or None
    request = ScopesRequest(
        now=present,
        since=since,
        by=asked.by,
        client_id=asked.client_id or None,
        subject=subject and (subject_id(call.runtime, subject) or subject),
        token_id=asked.token_id or None,
        kind=asked.kind or None,
        include_used=asked.include_used,
        after=position_of(asked.cursor, of).decode() or None,
        limit=asked.limit,
        explain=asked.explain == "sql",
    )
    answer = await ask_analytics(call.runtime, request, ScopesAnswer, smaller="ask for one client_id or fewer days")
    cursor: str | UnsetType = UNSET
    if answer.more:
        last = answer.items[-1]
        cursor = cursor_of(of, str(last.token_id or last.client_id).encode())
    return ScopesUsedList(
        items=answer.items,
        next_cursor=cursor,
        from_=since,
        ledger_seq=answer.ledger_seq,
        usage_seq=answer.usage_seq,
        sql=answer.sql,
    )


def _check_filters(asked: ScopesQuery) -> None:
    """Raises: InvalidRequest."""
    of_tokens: dict[str, Any] = {"subject": asked.subject, "token_id": asked.token_id, "kind": asked.kind}
    wrong = [name for name, value in of_tokens.items() if value]
    if asked.by == "client" and wrong:
        raise InvalidRequest(f"{', '.join(wrong)} cannot narrow down what is asked by client", fix="add by=token")
