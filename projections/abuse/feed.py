"""From the analytics store to the detector: what it needs to know, as Arrow tables of one transaction of a cursor.

`until` is a sequence of USAGE: nothing that was recorded later is in what is read, so that a detector that begins again
knows what it knew before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

import duckdb

from projections.abuse.detector import Detector, Fresh
from projections.abuse.relations import AUTHORIZED, BASELINE_DAYS, LIVE
from projections.abuse.rules import Rule

# With introspection it is the resource server whose address is seen, and nobody says the bearer's.
_ORIGIN = "CASE WHEN endpoint = 'introspect' THEN 0 ELSE origin_no END AS origin_no"

# Nothing occurs after it was recorded: a clock that is ahead must not make all others look late.
_OCCURRED = "least(occurred_at, recorded_at)"

_USES = f"""
SELECT {_OCCURRED} AS occurred_at, block_seq, use_index, token_no, {_ORIGIN}, outcome,
    CASE WHEN outcome = 'insufficient_scope' THEN scope END AS scope, coalesce(reported, false) AS reported
FROM uses WHERE token_no IS NOT NULL
"""
_REFUSED = """
SELECT least(minute, recorded_at) AS minute, block_seq, refused_index, caller, ip, network, outcome, endpoint, requests,
    endpoint IN ('validate', 'batch') AS reported
FROM refused
"""
_EVENTS = """
SELECT ledger_seq, occurred_at, type, 'grt_' || replace(grant_id::VARCHAR, '-', '') AS grant_id,
    'tok_' || replace(token_ids[1]::VARCHAR, '-', '') AS token_id, client_id, subject, body
FROM events WHERE ledger_seq > $after AND ledger_seq <= $until AND type = ANY ($types)
"""
# LEDGER may be far ahead of USAGE: its events count where there is nothing else.
_NEWEST = f"""
SELECT (
    SELECT max(moment) FROM (
        SELECT max({_OCCURRED}) AS moment FROM uses WHERE block_seq <= $until AND occurred_at < $to
        UNION ALL
        SELECT max(least(minute, recorded_at)) FROM refused WHERE block_seq <= $until AND minute < $to
    )
), (SELECT max(occurred_at) FROM events WHERE ledger_seq <= $ledger AND occurred_at < $to)
"""
_TOKENS = """
SELECT u.token_no, 'tok_' || replace(t.token_id::VARCHAR, '-', '') AS token_id,
    'grt_' || replace(t.grant_id::VARCHAR, '-', '') AS grant_id, t.kind, t.client_id, t.subject, t.scope, t.issued_at,
    t.expires_at
FROM used_tokens u JOIN issued_tokens t USING (token_id)
"""
# As `relations.RARE`, of the store's own tables.
_RARE = """(outcome = 'insufficient_scope' OR token_no IN (
    SELECT token_no FROM used_tokens JOIN issued_tokens USING (token_id) WHERE kind = 'pat'
))"""
_ORIGINS = "SELECT origin_no, ip, user_agent, network, agent FROM origins"

# Of whole days that are long over, from the roll-up; of the last two use by use, up to `until`.
_SEEN = f"""
SELECT s.token_no, coalesce(o.network, '') AS network, coalesce(o.agent, '') AS agent, s.live,
    min(s.first_at) AS first_at, max(s.last_at) AS last_at, sum(s.uses)::BIGINT AS uses
FROM (
    SELECT token_no, {_ORIGIN}, {LIVE} AS live, first_at, last_at, uses
    FROM all_usage_days WHERE day < $raw_from AND token_no IS NOT NULL
    UNION ALL
    SELECT token_no, {_ORIGIN}, {LIVE}, min(occurred_at), max(occurred_at), count(*)
    FROM uses WHERE occurred_at >= $raw_from AND block_seq <= $until AND token_no IS NOT NULL GROUP BY ALL
) s
LEFT JOIN (SELECT * FROM origins WHERE origin_no > 0) o USING (origin_no)
GROUP BY ALL
"""
_SLOTS = f"""
SELECT u.token_no, time_bucket(INTERVAL 10 MINUTE, u.occurred_at) AS slot, coalesce(o.network, '') AS network,
    count(*) AS uses
FROM (
    SELECT token_no, occurred_at, {_ORIGIN} FROM uses
    WHERE occurred_at >= $from AND occurred_at < $to AND block_seq <= $until AND token_no IS NOT NULL
) u
LEFT JOIN (SELECT * FROM origins WHERE origin_no > 0) o USING (origin_no)
GROUP BY ALL
"""
_SLOTS_REFUSED = """
SELECT caller, time_bucket(INTERVAL 10 MINUTE, minute) AS slot, sum(requests)::BIGINT AS requests
FROM refused
WHERE minute >= $from AND minute < $to AND block_seq <= $until AND outcome IN ('unknown', 'malformed') AND caller <> ''
GROUP BY ALL
"""


def _table(cursor: duckdb.DuckDBPyConnection, sql: str, parameters: object = None) -> Any:
    return cursor.sql(sql, params=parameters).to_arrow_table()


def event_types(rules: Iterable[Rule]) -> list[str]:
    """The types of events that the rules look at."""
    return sorted({found for rule in rules for found in re.findall(r"'([a-z]+\.[a-z_]+/[0-9]+)'", rule.sql)})


def seed(
    cursor: duckdb.DuckDBPyConnection, detector: Detector, *, until: int, ledger: int, before: datetime | None = None
) -> None:
    """Tells a new detector what came until then, or what occurred before the day `before`, as if it had seen it.

    `ledger` is to LEDGER what `until` is to USAGE. Days are told one by one, since all of them may be more than fits
    into memory.
    """
    limit = before or datetime.max  # noqa: DTZ901 - as DuckDB's TIMESTAMP
    ((last, newest_event),) = cursor.execute(_NEWEST, {"until": until, "ledger": ledger, "to": limit}).fetchall()
    types = event_types(detector.rules)
    for kinds, span in (
        ([one for one in types if one == AUTHORIZED], detector.challenge_window),
        ([one for one in types if one != AUTHORIZED], detector.long_window),
    ):
        since = (last or newest_event or limit) - span
        known: dict[str, Any] = {"after": 0, "until": ledger, "types": kinds, "from": since, "to": limit}
        detector.remember(_table(cursor, f"{_EVENTS} AND occurred_at >= $from AND occurred_at < $to", known))
    if last is None:
        return
    today = (before or last).replace(hour=0, minute=0, second=0, microsecond=0)
    detector.insert("origins", _table(cursor, _ORIGINS))
    detector.insert("tokens", _table(cursor, _TOKENS))
    raw_from = today - timedelta(days=1)
    # Before a whole day, the roll-up alone says what was.
    seen = _table(cursor, _SEEN, {"raw_from": before or raw_from, "until": until if before is None else -1})
    detector.insert("seen", seen)
    for number in range(BASELINE_DAYS, -1, -1):
        day = today - timedelta(days=number)
        bounds = {"from": day, "to": min(day + timedelta(days=1), limit), "until": until}
        used, refused = _table(cursor, _SLOTS, bounds), _table(cursor, _SLOTS_REFUSED, bounds)
        detector.insert("tally", used)
        detector.insert("tally_refused", refused)
        # After a day of which there is nothing to tell, the days before can wait for the next.
        if used.num_rows or refused.num_rows or day == today:
            detector.begin(day)
    window = {"from": last - detector.long_window, "to": limit, "until": until}
    within = "occurred_at >= $from AND occurred_at < $to AND block_seq <= $until"
    kept = f"{_USES} AND {within} AND (occurred_at >= $all_from OR {_RARE})"
    detector.insert("recent_uses", _table(cursor, kept, window | {"all_from": last - detector.window}))
    within = within.replace("occurred_at", "minute")
    detector.insert("recent_refused", _table(cursor, f"{_REFUSED} WHERE {within}", window))


def recorded(
    cursor: duckdb.DuckDBPyConnection, detector: Detector, *, usage: tuple[int, int], ledger: tuple[int, int]
) -> Fresh:
    """What was recorded after the first and up to the second sequence of each stream, by that order."""
    bounds = {"after": usage[0], "until": usage[1]}
    within = "block_seq > $after AND block_seq <= $until"
    uses = _table(cursor, f"{_USES} AND {within}", bounds)
    refused = _table(cursor, f"{_REFUSED} WHERE {within}", bounds)
    events = _table(cursor, _EVENTS, {"after": ledger[0], "until": ledger[1], "types": event_types(detector.rules)})
    acquaint(cursor, detector, uses)
    return Fresh(uses, refused, events)


def occurred(cursor: duckdb.DuckDBPyConnection, detector: Detector, since: datetime, until: datetime) -> Fresh:
    """What occurred within a time, whenever it was recorded: for history."""
    bounds = {"from": since, "to": until}
    within = "occurred_at >= $from AND occurred_at < $to"
    uses = _table(cursor, f"{_USES} AND {within}", bounds)
    refused = _table(cursor, f"{_REFUSED} WHERE {within.replace('occurred_at', 'minute')}", bounds)
    events = _table(
        cursor, f"{_EVENTS} AND {within}", bounds | {"after": 0, "until": 2**62, "types": event_types(detector.rules)}
    )
    acquaint(cursor, detector, uses)
    return Fresh(uses, refused, events)


def acquaint(cursor: duckdb.DuckDBPyConnection, detector: Detector, uses: Any) -> None:
    """Tells the detector of the tokens and origins that it meets for the first time."""
    origins = detector.unknown("origins", "origin_no", uses["origin_no"])
    if origins:
        detector.insert("origins", _table(cursor, f"{_ORIGINS} WHERE origin_no = ANY (?)", [origins]))
    tokens = detector.unknown("tokens", "token_no", uses["token_no"])
    if tokens:
        detector.insert("tokens", _table(cursor, f"{_TOKENS} WHERE u.token_no = ANY (?)", [tokens]))


def chunk_end(cursor: duckdb.DuckDBPyConnection, after: int, until: int, uses_max: int) -> int:
    """The last block, at most `until`, such that the blocks after `after` up to it hold some `uses_max` uses."""
    ((end,),) = cursor.execute(
        "SELECT min(block_seq) FROM (SELECT block_seq, sum(count(*)) OVER (ORDER BY block_seq) AS uses FROM uses "
        "WHERE block_seq > ? AND block_seq <= ? GROUP BY block_seq) WHERE uses >= ?",
        [after, until, uses_max],
    ).fetchall()
    return until if end is None else int(end)
