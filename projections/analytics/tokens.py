"""Tokens and how much they are used, and which of their scopes: the SQL of `/v1/audit/tokens` and `/v1/audit/scopes`.

Uses are read as the sums of days, which hold what is sealed and what is not, and never one by one: what this costs
grows with tokens and days, not with uses. Nothing of the caller stands in the text of a query.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from msgspec import UNSET, UnsetType

from projections.analytics.rows import uuid_hex
from projections.asking_tokens import ScopesRequest, ScopesUsed, ScopeUses, Sort, TokensRequest, TokenUsage

Query = tuple[str, dict[str, Any]]

# As a row of the view `tokens` stands at $now. The order is that of `service/revocations.py`.
STATUS = """CASE WHEN token.ended_at IS NOT NULL THEN 'revoked'
        WHEN token.spent_at IS NOT NULL THEN 'spent'
        WHEN token.expires_at <= $now::TIMESTAMP THEN 'expired' ELSE 'active' END"""

# An address may be that of several origins, so that these cannot be counted in its place.
_TOKENS = """WITH of_origin AS (
    SELECT token_no, origin_no, sum(uses) AS uses, sum(uses) FILTER (outcome <> 'valid') AS refused,
        max(last_at) AS last_at
    FROM all_usage_days WHERE token_no IS NOT NULL GROUP BY token_no, origin_no
), used AS (
    SELECT token_no, sum(uses)::BIGINT AS uses, coalesce(sum(refused), 0)::BIGINT AS refused,
        count(DISTINCT address_no) AS addresses, max(last_at) AS last_used_at
    FROM of_origin LEFT JOIN origins USING (origin_no) GROUP BY token_no
), called AS (
    SELECT try_cast(substr(caller, 5) AS UUID) AS token_id, sum(validations)::BIGINT AS validations,
        max(last_at) AS last_at
    FROM all_caller_days WHERE starts_with(caller, 'tok_') GROUP BY caller
), listed AS (
    SELECT token.token_id, token.grant_id, token.kind, {status} AS status,
        token.client_id, token.subject, token.scope, token.issued_at, token.expires_at, token.ledger_seq,
        greatest(date_sub('day', token.issued_at, $now::TIMESTAMP), 0) AS age_days,
        coalesce(used.uses, 0) AS uses, coalesce(used.refused, 0) AS refused, coalesce(used.addresses, 0) AS addresses,
        coalesce(called.validations, 0) AS validations, greatest(used.last_used_at, called.last_at) AS last_used_at
    FROM tokens AS token
    LEFT JOIN used_tokens USING (token_id)
    LEFT JOIN used USING (token_no)
    LEFT JOIN called USING (token_id)
)
SELECT * FROM listed WHERE {conditions}
ORDER BY {by} {order}, token_id {order} LIMIT $limit"""
_FILTERS = {
    "client_id": "client_id = $client_id",
    "subject": "subject = $subject",
    "kind": "kind = $kind",
    "status": "status = $status",
    "scope": "list_contains(string_split(scope, ' '), $scope)",
    "unused_since": "issued_at < $unused_since::TIMESTAMP"
    " AND (last_used_at IS NULL OR last_used_at < $unused_since::TIMESTAMP)",
    "expiring_until": "expires_at <= $expiring_until::TIMESTAMP",
}
# What was never used comes before what was used longest ago.
_NEVER = "TIMESTAMP '0001-01-01'"
_SORTED_BY: dict[Sort, tuple[str, str]] = {
    "last_used_at": (f"coalesce(last_used_at, {_NEVER})", f"coalesce($after_value::TIMESTAMP, {_NEVER})"),
    "uses": ("uses", "$after_value::BIGINT"),
    "addresses": ("addresses", "$after_value::BIGINT"),
    "issued_at": ("issued_at", "$after_value::TIMESTAMP"),
    "expires_at": ("expires_at", "$after_value::TIMESTAMP"),
}


def tokens_sql(request: TokensRequest) -> Query:
    """The query, and what is bound in it, as JSON shows it. A row more than is wanted tells that there are more."""
    by, after_value = _SORTED_BY[request.sort]
    given = {name: value for name in _FILTERS if (value := getattr(request, name)) is not None}
    conditions = [_FILTERS[name] for name in given]
    parameters: dict[str, Any] = {"now": text(request.now), "limit": request.limit + 1}
    parameters |= {name: bound(value) for name, value in given.items()}
    if request.after is not None:
        value, token_id = request.after
        conditions.append(f"({by}, token_id) {'<' if request.descending else '>'} ({after_value}, $after_id::UUID)")
        parameters |= {"after_value": bound(value), "after_id": uuid_hex(token_id)}
    sql = _TOKENS.format(
        status=STATUS,
        conditions="\n    AND ".join(conditions) or "true",
        by=by,
        order="DESC" if request.descending else "ASC",
    )
    return sql, parameters


def token_usage(row: Sequence[Any]) -> TokenUsage:
    token_id, grant_id, kind, status, client_id, subject, scope, issued_at, expires_at, seq, age, *counts = row
    uses, refused, addresses, validations, last_used_at = counts
    return TokenUsage(
        token_id=f"tok_{token_id.hex}",
        grant_id=f"grt_{grant_id.hex}",
        kind=kind,
        status=status,
        client_id=client_id or UNSET,
        subject=subject or UNSET,
        scope=scope,
        issued_at=zoned(issued_at),
        expires_at=zoned(expires_at),
        issued_seq=seq,
        age_days=age,
        uses=uses,
        refused=refused,
        addresses=addresses,
        validations=validations,
        last_used_at=when(last_used_at),
    )


# `holder` is a token and whose scopes it tells of: its own, or its client's. A refresh token is exchanged and never
# validated, so that it tells of none. `fresh`: its scopes count as granted.
_HOLDERS = {
    "token": """holder AS MATERIALIZED (
    SELECT token.token_id AS entity, token.token_id, token.scope, true AS fresh
    FROM tokens AS token
    WHERE token.ended_at IS NULL AND token.issued_at <= $now::TIMESTAMP AND token.expires_at > $now::TIMESTAMP
        AND token.kind <> 'refresh'{conditions}
), held AS (
    SELECT entity, scope FROM holder
)""",
    # A client may get whatever it is registered with, whether or not it ever asked for it.
    "client": """client AS (
    SELECT client_id, arg_max(body->>'$.metadata.scope', ledger_seq) AS scope
    FROM events AS token
    WHERE (starts_with(type, 'client.registered/') OR starts_with(type, 'client.changed/')){conditions}
        AND client_id NOT IN (SELECT client_id FROM events WHERE starts_with(type, 'client.disabled/'))
    GROUP BY client_id
), holder AS MATERIALIZED (
    SELECT token.client_id AS entity, token.token_id, token.scope, token.expires_at > $since::TIMESTAMP AS fresh
    FROM issued_tokens AS token SEMI JOIN client USING (client_id)
    WHERE token.kind <> 'refresh'
), held AS (
    SELECT DISTINCT entity, scope FROM holder WHERE fresh
    UNION ALL
    SELECT client_id, scope FROM client
)""",
}
# Who validates leaves no use of his own token, and needs `ledger:validate` nevertheless.
_SCOPES = """WITH {holders}, of_token AS (
    SELECT token_no, scope, sum(uses) FILTER (first_at >= $since::TIMESTAMP) AS uses, max(last_at) AS last_at
    FROM all_usage_days WHERE outcome = 'valid' AND token_no IS NOT NULL GROUP BY token_no, scope
), asked AS MATERIALIZED (
    SELECT holder.entity, of_token.scope, sum(of_token.uses) AS uses, max(of_token.last_at) AS last_at
    FROM of_token JOIN used_tokens USING (token_no) JOIN holder USING (token_id)
    GROUP BY holder.entity, of_token.scope
    UNION ALL
    SELECT holder.entity, 'ledger:validate', sum(validations) FILTER (first_at >= $since::TIMESTAMP), max(last_at)
    FROM (SELECT *, try_cast(substr(caller, 5) AS UUID) AS token_id FROM all_caller_days) AS calls
    JOIN holder USING (token_id)
    GROUP BY holder.entity
), used AS MATERIALIZED (
    SELECT entity, name, coalesce(sum(uses), 0)::BIGINT AS uses, max(last_at) AS last_used_at
    FROM (SELECT entity, unnest(string_split(scope, ' ')) AS name, uses, last_at FROM asked WHERE scope IS NOT NULL)
    GROUP BY entity, name
), recent AS (
    SELECT entity, list(name) AS names FROM used WHERE last_used_at >= $since::TIMESTAMP GROUP BY entity
), shown AS MATERIALIZED (
    SELECT DISTINCT entity FROM held LEFT JOIN recent USING (entity)
    WHERE scope <> '' AND entity > {after} AND {shown}
    ORDER BY entity LIMIT $limit
), granted AS (
    SELECT DISTINCT entity, name
    FROM (SELECT entity, unnest(string_split(scope, ' ')) AS name FROM held SEMI JOIN shown USING (entity))
    WHERE name <> ''
), judged AS (
    SELECT entity, name, granted.name IS NOT NULL AS granted, coalesce(used.uses, 0) AS uses, used.last_used_at,
        coalesce(used.last_used_at >= $since::TIMESTAMP, false) AS recent
    FROM granted FULL JOIN (FROM used SEMI JOIN shown USING (entity)) AS used USING (entity, name)
    WHERE granted.name IS NOT NULL OR used.last_used_at >= $since::TIMESTAMP
), total AS (
    SELECT entity, coalesce(sum(uses), 0)::BIGINT AS uses,
        coalesce(sum(uses) FILTER (scope IS NULL), 0)::BIGINT AS unscoped_uses, max(last_at) AS last_used_at
    FROM asked SEMI JOIN shown USING (entity) GROUP BY entity
), counted AS (
    SELECT entity, count(*) FILTER (fresh) AS tokens, any_value(token_id) AS token_id
    FROM holder SEMI JOIN shown USING (entity) GROUP BY entity
)
SELECT entity, counted.token_id, token.client_id, token.subject, token.kind, coalesce(counted.tokens, 0) AS tokens,
    coalesce(total.uses, 0) AS all_uses, coalesce(total.unscoped_uses, 0) AS unscoped_uses,
    total.last_used_at AS last_use_at, judged.name, judged.granted, judged.uses, judged.last_used_at, judged.recent
FROM shown
JOIN judged USING (entity)
LEFT JOIN counted USING (entity)
LEFT JOIN issued_tokens AS token USING (token_id)
LEFT JOIN total USING (entity)
ORDER BY entity, judged.granted DESC, judged.name"""
_HOLDER_FILTERS = {
    "client_id": " AND token.client_id = $client_id",
    "subject": " AND token.subject = $subject",
    "token_id": " AND token.token_id = $token_id::UUID",
    "kind": " AND token.kind = $kind",
}
_NOT_ALL_USED = "NOT coalesce(list_has_all(names, string_split(scope, ' ')), false)"
_FIRST = "tok_" + "0" * 32
_ADMIN, _LEDGER = "ledger:admin", "ledger:"


def scopes_sql(request: ScopesRequest) -> Query:
    """The query, and what is bound in it, as JSON shows it. It answers a row for each scope of an item."""
    filters = _HOLDER_FILTERS if request.by == "token" else ("client_id",)
    given = {name: value for name in filters if (value := getattr(request, name)) is not None}
    sql = _SCOPES.format(
        holders=_HOLDERS[request.by].format(conditions="".join(_HOLDER_FILTERS[name] for name in given)),
        after="$after::UUID" if request.by == "token" else "$after",
        shown="true" if request.include_used else _NOT_ALL_USED,
    )
    parameters: dict[str, Any] = given | {
        "since": text(request.since),
        "limit": request.limit + 1,
        "after": uuid_hex(request.after or _FIRST) if request.by == "token" else request.after or "",
    }
    if request.by == "token":
        parameters["now"] = text(request.now)
    if "token_id" in given:
        parameters["token_id"] = uuid_hex(given["token_id"])
    return sql, parameters


def scopes_used(request: ScopesRequest, rows: Iterable[Sequence[Any]]) -> list[ScopesUsed]:
    """The items, from the rows of `scopes_sql`."""
    return [_item(request.by, entity, list(of_it)) for entity, of_it in groupby(rows, key=lambda row: row[0])]


def _item(by: str, entity: Any, rows: list[Sequence[Any]]) -> ScopesUsed:
    token_id, client_id, subject, kind, tokens, uses, unscoped, last_used_at = rows[0][1:9]
    names = [_Name(*row[9:]) for row in rows]
    granted = [one.name for one in names if one.granted]
    # `ledger:admin` holds every other scope of the ledger.
    kept = [one for one in names if one.recent and (one.granted or one.of_admin(granted))]
    of_token = {"token_id": f"tok_{token_id.hex}", "subject": subject or UNSET, "kind": kind} if by == "token" else {}
    return ScopesUsed(
        **of_token,
        client_id=(client_id or UNSET) if by == "token" else entity,
        scope=" ".join(granted),
        proposed_scope=" ".join(one.name for one in kept) or UNSET,
        unused=[one.told() for one in names if one.granted and not one.recent],
        used=[one.told(UNSET if one.granted else _ADMIN) for one in kept],
        tokens=tokens,
        uses=uses,
        unscoped_uses=unscoped,
        last_used_at=when(last_used_at),
    )


class _Name:
    """One scope of an item."""

    def __init__(self, name: str, granted: bool, uses: int, last_used_at: datetime | None, recent: bool) -> None:
        self.name, self.granted, self.recent = name, granted, recent
        self._uses, self._last_used_at = uses, last_used_at

    def of_admin(self, granted: list[str]) -> bool:
        return self.name.startswith(_LEDGER) and _ADMIN in granted

    def told(self, granted_as: str | UnsetType = UNSET) -> ScopeUses:
        return ScopeUses(name=self.name, uses=self._uses, last_used_at=when(self._last_used_at), granted_as=granted_as)


def text(moment: datetime) -> str:
    """As DuckDB's TIMESTAMP, which has no zone: UTC."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat()


def bound(value: Any) -> Any:
    return text(value) if isinstance(value, datetime) else value


def zoned(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC)


def when(moment: datetime | None) -> datetime | UnsetType:
    return UNSET if moment is None else zoned(moment)
