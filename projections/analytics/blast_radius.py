"""What somebody who held a token, a grant or a client could do and did: the SQL of `/v1/audit/blast-radius`.

A report is several queries in one transaction. The first makes a temporary table of the tokens that belong to it, which
the others join, so that each stays short and can be run again by whoever wants to see where a number comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
from msgspec import UNSET

from projections.analytics.rows import uuid_hex
from projections.analytics.tokens import STATUS, text, when, zoned
from projections.asking import UsagePoint
from projections.asking_tokens import (
    Deed,
    Dependent,
    NamedSql,
    Outcome,
    Place,
    Places,
    RadiusReport,
    RadiusRequest,
    RadiusUse,
    RadiusUses,
    Related,
    RelatedToken,
    WouldBreak,
)

LISTED_MAX = 50  # of each list of a report, series and uses apart
_DEPENDENTS_SINCE = timedelta(hours=24)

# A grant has one refresh token at a time, so that whatever was issued in it later than this one came out of it, and
# refresh tokens from before led to it. An access token has no descendants.
_ASKED_TOKEN = """
    SELECT other.token_id,
        CASE WHEN other.token_id = token.token_id THEN 'self'
            WHEN token.kind = 'refresh' AND other.ledger_seq > token.ledger_seq THEN 'descendant'
            WHEN other.kind = 'refresh' AND other.ledger_seq < token.ledger_seq THEN 'ancestor'
            ELSE 'sibling' END AS relation,
        other.token_id = token.token_id OR token.kind = 'refresh' AS in_breadth
    FROM issued_tokens AS token
    JOIN issued_tokens AS other ON other.grant_id = token.grant_id
    WHERE token.{column} = {value}"""
_ASKED_ALL = """
    SELECT token_id, 'self' AS relation, true AS in_breadth FROM issued_tokens WHERE {column} = {value}"""
_ASKED = {
    "token_id": _ASKED_TOKEN.format(column="token_id", value="$asked::UUID"),
    "token_sha256": _ASKED_TOKEN.format(column="sha256", value="unhex($asked)"),
    "grant_id": _ASKED_ALL.format(column="grant_id", value="$asked::UUID"),
    "client_id": _ASKED_ALL.format(column="client_id", value="$asked"),
}
_RELATED = """CREATE TEMPORARY TABLE related AS
WITH RECURSIVE asked AS MATERIALIZED ({asked}
), rotated AS MATERIALIZED (
    SELECT token_id, rotated_from FROM issued_tokens WHERE rotated_from IS NOT NULL
), successor AS (
    SELECT token_id FROM asked WHERE relation IN ('self', 'descendant')
    UNION
    SELECT rotated.token_id FROM successor JOIN rotated ON rotated.rotated_from = successor.token_id
), predecessor AS (
    SELECT token_id FROM asked WHERE relation = 'self'
    UNION
    SELECT rotated.rotated_from FROM predecessor JOIN rotated USING (token_id)
), related AS (
    FROM asked
    UNION ALL
    SELECT token_id, 'descendant', false FROM successor ANTI JOIN asked USING (token_id)
    UNION ALL
    SELECT token_id, 'ancestor', false FROM predecessor ANTI JOIN asked USING (token_id)
)
SELECT token.token_id, token.grant_id, token.kind, related.relation, {status} AS status,
    related.in_breadth AND token.ended_at IS NULL AND token.spent_at IS NULL
        AND token.expires_at > $now::TIMESTAMP AS would_end,
    token.client_id, token.subject, token.scope, token.issued_at, token.expires_at, token.ended_at, token.reason,
    token.rotated_from, token.ledger_seq, token.ended_seq, used_tokens.token_no,
    related.relation IN ('self', 'descendant') AS counted,
    'tok_' || replace(token.token_id::VARCHAR, '-', '') AS caller
FROM related JOIN tokens AS token USING (token_id) LEFT JOIN used_tokens USING (token_id)"""

_TOKENS = """WITH used AS (
    SELECT token_no, sum(uses)::BIGINT AS uses, max(last_at) AS last_used_at
    FROM all_usage_days SEMI JOIN related USING (token_no) GROUP BY token_no
)
SELECT related.* EXCLUDE (token_no, counted, caller), coalesce(used.uses, 0) AS uses, used.last_used_at,
    count(*) OVER () AS tokens, count(DISTINCT related.grant_id) OVER () AS grants,
    count(*) FILTER (status = 'active') OVER () AS active, count(*) FILTER (would_end) OVER () AS would_end_in_all
FROM related LEFT JOIN used USING (token_no)
ORDER BY list_position(['self', 'descendant', 'ancestor', 'sibling'], relation), ledger_seq DESC, token_id
LIMIT $listed"""
# Totals, outcomes and the series are sums of the same rows, and cannot differ.
_USAGE = """SELECT grouping(outcome) = 0 AS of_outcome, grouping(starts_at) = 0 AS of_interval, outcome, starts_at,
    coalesce(sum(uses), 0)::BIGINT AS uses, coalesce(sum(uses) FILTER (outcome <> 'valid'), 0)::BIGINT AS refused,
    count(DISTINCT token_no) AS tokens, count(DISTINCT address_no) AS addresses,
    min(first_at) AS first_at, max(last_at) AS last_at
FROM (
    SELECT outcome, date_trunc($interval, first_at) AS starts_at, uses, token_no, address_no, first_at, last_at
    FROM {table} LEFT JOIN origins USING (origin_no)
    WHERE token_no IN (SELECT token_no FROM related WHERE counted)
)
GROUP BY GROUPING SETS ((), (outcome), (starts_at))
ORDER BY of_interval, of_outcome, starts_at, uses DESC, outcome"""
_PLACES = """SELECT {column} AS value, sum(uses)::BIGINT AS uses,
    coalesce(sum(uses) FILTER (outcome <> 'valid'), 0)::BIGINT AS refused, count(DISTINCT address_no) AS addresses,
    min(first_at) AS first_seen_at, max(last_at) AS last_seen_at, min(first_at) >= $since::TIMESTAMP AS new,
    count(*) OVER () AS total, count(*) FILTER (min(first_at) >= $since::TIMESTAMP) OVER () AS total_new
FROM all_usage_days LEFT JOIN origins USING (origin_no)
WHERE token_no IN (SELECT token_no FROM related WHERE counted)
GROUP BY {column}{having}
ORDER BY first_seen_at DESC, value LIMIT $listed"""
_NEW = "\nHAVING {column} IS NOT NULL AND min(first_at) >= $since::TIMESTAMP"
# Who validated is in no roll-up.
_DEPENDENTS = """WITH depending AS (
    SELECT recent.token_no, recent.occurred_at, recent.caller, origins.ip, origins.agent, recent.endpoint
    FROM uses AS recent
    LEFT JOIN origins USING (origin_no)
    WHERE recent.token_no IN (SELECT token_no FROM related WHERE would_end)
        AND recent.occurred_at >= $day_ago::TIMESTAMP AND recent.outcome = 'valid'
), counted AS (
    SELECT CASE WHEN grouping(caller) = 0 THEN 'callers' WHEN grouping(ip) = 0 THEN 'addresses'
            WHEN grouping(agent) = 0 THEN 'agents' WHEN grouping(endpoint) = 0 THEN 'endpoints' ELSE 'all' END AS kind,
        coalesce(caller, ip, agent, endpoint) AS value,
        count(*) AS uses, count(DISTINCT token_no) AS tokens, max(occurred_at) AS last_used_at
    FROM depending
    GROUP BY GROUPING SETS ((), (caller), (ip), (agent), (endpoint))
)
FROM counted
QUALIFY row_number() OVER (PARTITION BY kind ORDER BY uses DESC, value) <= $listed
ORDER BY kind, uses DESC, value"""
# A call of the management API is a use of the caller's own token, and told as such.
_VALIDATIONS = """SELECT coalesce(sum(validations), 0)::BIGINT AS validations FROM (
    SELECT count(*) AS validations
    FROM uses AS recent LEFT JOIN related AS own USING (token_no)
    WHERE recent.occurred_at >= $day_ago::TIMESTAMP AND own.caller IS DISTINCT FROM recent.caller
        AND recent.caller IN (SELECT caller FROM related WHERE would_end)
    UNION ALL
    SELECT sum(requests) FROM refused
    WHERE minute >= $day_ago::TIMESTAMP AND caller IN (SELECT caller FROM related WHERE would_end)
)"""
_CALLS = """SELECT coalesce(sum(validations), 0)::BIGINT AS validations FROM all_caller_days
WHERE caller IN (SELECT caller FROM related WHERE counted)"""
_REFRESHES = """SELECT count(*) AS refreshes
FROM ends JOIN issued_tokens AS used USING (token_id) JOIN events ON events.ledger_seq = ends.ledger_seq
WHERE what IN ('spent', 'renewed') AND events.recorded_at >= $day_ago::TIMESTAMP
    AND used.grant_id IN (SELECT grant_id FROM related WHERE would_end AND kind = 'refresh')"""
_DEEDS = """SELECT type, count(*) AS events, min(ledger_seq) AS first_seq, max(ledger_seq) AS last_seq,
    max(recorded_at) AS last_at
FROM events
WHERE done_by IN (SELECT caller FROM related WHERE counted)
GROUP BY type ORDER BY first_seq"""
# When the tokens were used bounds where their uses can lie, so that most of what is sealed is left unread.
_SPAN = """SELECT min(first_at) AS first_at, max(last_at) AS last_at FROM all_usage_days
WHERE token_no IN (SELECT token_no FROM related WHERE counted)"""
# In two steps: the tokens' uses lie in many places, and whole rows are read only of those that the page shows.
_USES_FROM = """SELECT min(block_seq) AS from_seq FROM (
    SELECT block_seq FROM uses
    WHERE token_no IN (SELECT token_no FROM related WHERE counted)
        AND block_seq <= $block_seq AND (block_seq, use_index) < ($block_seq, $use_index)
        AND occurred_at BETWEEN $first_at::TIMESTAMP AND $last_at::TIMESTAMP
    ORDER BY block_seq DESC LIMIT $limit
)"""
_USES = """SELECT block_seq, use_index, occurred_at, recorded_at, related.token_id, outcome, endpoint, shown.caller,
    shown.scope, audience, ip, network, user_agent, method, path, reported
FROM uses AS shown JOIN related USING (token_no) LEFT JOIN origins USING (origin_no)
WHERE related.counted AND block_seq BETWEEN $from_seq AND $block_seq
    AND (block_seq, use_index) < ($block_seq, $use_index)
ORDER BY block_seq DESC, use_index DESC LIMIT $limit"""
_END = (2**63 - 1, 0)  # behind every use
_KNOWN_CLIENT = "SELECT count(*) AS events FROM events WHERE client_id = $asked"


class Radius:
    """Runs the queries of one request in the cursor's transaction, and keeps what it ran."""

    def __init__(self, cursor: duckdb.DuckDBPyConnection, request: RadiusRequest) -> None:
        self._cursor = cursor
        self._request = request
        self._by, self._asked = next((name, value) for name in _ASKED if (value := getattr(request, name)) is not None)
        self._day_ago = text(request.now - _DEPENDENTS_SINCE)
        self.ran: list[NamedSql] = []

    def found(self) -> bool:
        """Makes the table of tokens. False if there is nothing like what was asked about."""
        asked = uuid_hex(self._asked) if self._by in {"token_id", "grant_id"} else self._asked
        statement = _RELATED.format(asked=_ASKED[self._by], status=STATUS)
        [(tokens,)] = self._run("related", statement, asked=asked, now=text(self._request.now))
        if tokens or self._by != "client_id":
            return bool(tokens)
        [(events,)] = self._run("client", _KNOWN_CLIENT, asked=asked)
        return bool(events)

    def report(self) -> RadiusReport:
        related, counts = self._related()
        new = _NEW.format(column="ip")
        own = [token for token in related if token.relation == "self"]
        return RadiusReport(
            token=own[0] if self._by.startswith("token") else UNSET,
            related=Related(**counts, items=related),
            usage=self._usage(),
            networks=self._places("networks", column="network", having=""),
            agents=self._places("agents", column="agent", having=""),
            new_addresses=self._places("new_addresses", column="ip", having=new),
            would_break=self._would_break(counts["would_end"]),
            deeds=[
                Deed(type=kind, events=count, first_seq=first, last_seq=last, last_at=zoned(last_at))
                for kind, count, first, last, last_at in self._run("deeds", _DEEDS)
            ],
        )

    def uses(self) -> list[RadiusUse]:
        """One more than is wanted, if there are more."""
        block_seq, use_index = self._request.after or _END
        [(first_at, last_at)] = self._run("span", _SPAN)
        if first_at is None:
            return []
        page = {"block_seq": block_seq, "use_index": use_index, "limit": self._request.limit + 1}
        span = {"first_at": first_at.isoformat(), "last_at": last_at.isoformat()}
        [(from_seq,)] = self._run("uses_from", _USES_FROM, **page, **span)
        if from_seq is None:
            return []
        rows = self._run("uses", _USES, **page, from_seq=from_seq)
        return [_use(row) for row in rows]

    def _run(self, name: str, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
        self.ran.append(NamedSql(name, statement, parameters))
        return self._cursor.execute(statement, parameters).fetchall()

    def _related(self) -> tuple[list[RelatedToken], dict[str, int]]:
        rows = self._run("tokens", _TOKENS, listed=LISTED_MAX)
        counts = rows[0][-4:] if rows else (0, 0, 0, 0)
        names = ("tokens", "grants", "active", "would_end")
        return [_token(row[:-4]) for row in rows], dict(zip(names, counts, strict=True))

    def _usage(self) -> RadiusUses:
        interval = self._request.interval
        statement = _USAGE.format(table=f"all_usage_{interval}s")
        members: dict[str, Any] = {}
        outcomes, series = [], []
        for of_outcome, of_interval, outcome, starts_at, uses, refused, *more in self._run(
            "usage", statement, interval=interval
        ):
            tokens, addresses, first_at, last_at = more
            if of_interval:
                series.append(UsagePoint(starts_at=zoned(starts_at), uses=uses, refused=refused))
            elif of_outcome:
                outcomes.append(Outcome(outcome=outcome, uses=uses, first_at=zoned(first_at), last_at=zoned(last_at)))
            else:
                members = {"uses": uses, "refused": refused, "tokens": tokens, "addresses": addresses}
                members |= {"first_used_at": when(first_at), "last_used_at": when(last_at)}
        [(validations,)] = self._run("validations", _CALLS)
        return RadiusUses(**members, validations=validations, outcomes=outcomes, series=series)

    def _places(self, name: str, *, column: str, having: str) -> Places:
        statement = _PLACES.format(column=column, having=having)
        rows = self._run(name, statement, since=text(self._request.since), listed=LISTED_MAX)
        total, new = rows[0][-2:] if rows else (0, 0)
        return Places(total=total, new=new, items=[_place(row) for row in rows])

    def _would_break(self, tokens: int) -> WouldBreak:
        rows = self._run("dependents", _DEPENDENTS, day_ago=self._day_ago, listed=LISTED_MAX)
        [(refreshes,)] = self._run("refreshes", _REFRESHES, day_ago=self._day_ago)
        [(validations,)] = self._run("recent_validations", _VALIDATIONS, day_ago=self._day_ago)
        of_kind: dict[str, list[Dependent]] = {"callers": [], "addresses": [], "agents": [], "endpoints": []}
        uses, last_used_at = 0, None
        for kind, value, count, tokens_used, last in rows:
            if kind == "all":
                uses, last_used_at = count, last
            else:
                of_kind[kind].append(Dependent(value=value, uses=count, tokens=tokens_used, last_used_at=zoned(last)))
        return WouldBreak(
            since=datetime.fromisoformat(self._day_ago).replace(tzinfo=UTC),
            tokens=tokens,
            uses=uses,
            last_used_at=when(last_used_at),
            refreshes=refreshes,
            validations=validations,
            **of_kind,
        )


def _token(row: Sequence[Any]) -> RelatedToken:
    token_id, grant_id, kind, relation, status, would_end, client_id, subject, scope, *more = row
    issued_at, expires_at, ended_at, reason, rotated_from, issued_seq, revoked_seq, uses, last_used_at = more
    return RelatedToken(
        token_id=f"tok_{token_id.hex}",
        grant_id=f"grt_{grant_id.hex}",
        kind=kind,
        relation=relation,
        status=status,
        would_end=would_end,
        client_id=client_id or UNSET,
        subject=subject or UNSET,
        scope=scope,
        issued_at=zoned(issued_at),
        expires_at=zoned(expires_at),
        revoked_at=when(ended_at),
        reason=reason or UNSET,
        rotated_from=f"tok_{rotated_from.hex}" if rotated_from else UNSET,
        issued_seq=issued_seq,
        revoked_seq=revoked_seq or UNSET,
        uses=uses,
        last_used_at=when(last_used_at),
    )


def _place(row: Sequence[Any]) -> Place:
    value, uses, refused, addresses, first_seen_at, last_seen_at, new, *_ = row
    return Place(
        value=value,
        uses=uses,
        refused=refused,
        addresses=addresses,
        first_seen_at=zoned(first_seen_at),
        last_seen_at=zoned(last_seen_at),
        new=new,
    )


def _use(row: Sequence[Any]) -> RadiusUse:
    fields: Mapping[str, Any] = dict(zip(RadiusUse.__struct_fields__, row, strict=True))
    times = {name: zoned(fields[name]) for name in ("occurred_at", "recorded_at")}
    return RadiusUse(**{**fields, **times, "token_id": f"tok_{fields['token_id'].hex}"})
