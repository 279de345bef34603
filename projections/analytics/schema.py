"""The tables of the analytics store. What they mean stands in the package's docstring.

Any change here takes a new SCHEMA_VERSION: the store then begins a new file and fills it by replay, beside the old.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from projections.analytics.findings import FINDINGS_VIEW

SCHEMA_VERSION = 3

_TIME = pa.timestamp("us")
_TEXTS = pa.list_(pa.string())
_UUID = pa.string()  # 32 hex digits; DuckDB casts on insert

# Columns of every table that is filled in batches: name, DuckDB type, Arrow type of the batch.
_COLUMNS: dict[str, list[tuple[str, str, Any]]] = {
    "events": [
        ("ledger_seq", "BIGINT", pa.int64()),
        ("recorded_at", "TIMESTAMP", _TIME),
        ("occurred_at", "TIMESTAMP", _TIME),
        ("type", "VARCHAR", pa.string()),
        ("done_by", "VARCHAR", pa.string()),
        ("request_id", "VARCHAR", pa.string()),
        ("subject", "VARCHAR", pa.string()),
        ("client_id", "VARCHAR", pa.string()),
        ("user_id", "VARCHAR", pa.string()),
        ("grant_id", "UUID", _UUID),
        ("token_ids", "UUID[]", _TEXTS),
        ("body", "JSON", pa.string()),
    ],
    "grants": [
        ("grant_id", "UUID", _UUID),
        ("ledger_seq", "BIGINT", pa.int64()),
        ("subject", "VARCHAR", pa.string()),
        ("client_id", "VARCHAR", pa.string()),
        ("scope", "VARCHAR", pa.string()),
        ("issued_at", "TIMESTAMP", _TIME),
    ],
    "issued_tokens": [
        ("token_id", "UUID", _UUID),
        ("grant_id", "UUID", _UUID),
        ("ledger_seq", "BIGINT", pa.int64()),
        ("grant_seq", "BIGINT", pa.int64()),
        ("kind", "VARCHAR", pa.string()),
        ("client_id", "VARCHAR", pa.string()),
        ("subject", "VARCHAR", pa.string()),
        ("scope", "VARCHAR", pa.string()),
        ("audience", "VARCHAR[]", _TEXTS),
        ("issued_at", "TIMESTAMP", _TIME),
        ("expires_at", "TIMESTAMP", _TIME),
        ("sha256", "BLOB", pa.binary()),
        ("kid", "VARCHAR", pa.string()),
        ("rotated_from", "UUID", _UUID),
    ],
    "ends": [
        ("ledger_seq", "BIGINT", pa.int64()),
        ("what", "VARCHAR", pa.string()),
        ("token_id", "UUID", _UUID),
        ("grant_id", "UUID", _UUID),
        ("client_id", "VARCHAR", pa.string()),
        ("subject", "VARCHAR", pa.string()),
        ("cuts_before_seq", "BIGINT", pa.int64()),
        ("ended_at", "TIMESTAMP", _TIME),
        ("reason", "VARCHAR", pa.string()),
        ("kid", "VARCHAR", pa.string()),
    ],
    "used_tokens": [
        ("token_no", "UINTEGER", pa.uint32()),
        ("token_id", "UUID", _UUID),
    ],
    "origins": [
        ("origin_no", "UINTEGER", pa.uint32()),
        ("ip", "VARCHAR", pa.string()),
        ("user_agent", "VARCHAR", pa.string()),
        ("network", "VARCHAR", pa.string()),
        ("agent", "VARCHAR", pa.string()),
        ("address_no", "UINTEGER", pa.uint32()),
    ],
    "recent_uses": [
        ("occurred_at", "TIMESTAMP", _TIME),
        ("recorded_at", "TIMESTAMP", _TIME),
        ("block_seq", "BIGINT", pa.int64()),
        ("use_index", "USMALLINT", pa.uint16()),
        ("token_no", "UINTEGER", pa.uint32()),
        ("origin_no", "UINTEGER", pa.uint32()),
        ("token_sha256", "BLOB", pa.binary()),
        ("outcome", "VARCHAR", pa.string()),
        ("endpoint", "VARCHAR", pa.string()),
        ("caller", "VARCHAR", pa.string()),
        ("scope", "VARCHAR", pa.string()),
        ("audience", "VARCHAR", pa.string()),
        ("method", "VARCHAR", pa.string()),
        ("path", "VARCHAR", pa.string()),
        ("reported", "BOOLEAN", pa.bool_()),
    ],
    "refused": [
        ("minute", "TIMESTAMP", _TIME),
        ("recorded_at", "TIMESTAMP", _TIME),
        ("block_seq", "BIGINT", pa.int64()),
        ("refused_index", "UINTEGER", pa.uint32()),
        ("caller", "VARCHAR", pa.string()),
        ("ip", "VARCHAR", pa.string()),
        ("network", "VARCHAR", pa.string()),
        ("origin_no", "UINTEGER", pa.uint32()),
        ("outcome", "VARCHAR", pa.string()),
        ("endpoint", "VARCHAR", pa.string()),
        ("requests", "BIGINT", pa.int64()),
    ],
    "gaps": [
        ("block_seq", "BIGINT", pa.int64()),
        ("recorded_at", "TIMESTAMP", _TIME),
        ("writer", "VARCHAR", pa.string()),
        ("lost", "BIGINT", pa.int64()),
    ],
}
# Filled when a segment is sealed. A row counts uses of one segment, so that it leaves the store with its segment, and
# uses of one hour may be counted by several rows.
ROLL_UPS = {
    "usage_days": """segment_no BIGINT, day TIMESTAMP, token_no UINTEGER, origin_no UINTEGER, outcome VARCHAR,
        endpoint VARCHAR, scope VARCHAR, uses BIGINT, first_at TIMESTAMP, last_at TIMESTAMP""",
    "usage_hours": """segment_no BIGINT, hour TIMESTAMP, token_no UINTEGER, origin_no UINTEGER, outcome VARCHAR,
        endpoint VARCHAR, scope VARCHAR, uses BIGINT, first_at TIMESTAMP, last_at TIMESTAMP""",
    # `token_no`: of a token whose issue was not yet known when the segment was sealed, else NULL.
    "usage_minutes": """segment_no BIGINT, minute TIMESTAMP, client_id VARCHAR, kind VARCHAR, outcome VARCHAR,
        endpoint VARCHAR, uses BIGINT, token_no UINTEGER""",
    # Who validates leaves no use of his own token behind.
    "caller_days": """segment_no BIGINT, day TIMESTAMP, caller VARCHAR, validations BIGINT, first_at TIMESTAMP,
        last_at TIMESTAMP""",
}
_OTHERS = {
    "segments": """segment_no BIGINT, last_seq BIGINT, file VARCHAR, uses BIGINT, first_recorded_at TIMESTAMP,
        last_recorded_at TIMESTAMP, file_bytes BIGINT, sha256 BLOB, sealed_at TIMESTAMP""",
    "positions": "stream VARCHAR, seq BIGINT, recorded_at TIMESTAMP, created VARCHAR, version INTEGER",
}
TABLES = (*_COLUMNS, *ROLL_UPS, *_OTHERS)

# Calls of the management API are uses of the caller's own token, and no validations.
CALLS = """
WITH called AS (
    SELECT date_trunc('day', occurred_at) AS day, caller, token_no, count(*) AS uses, min(occurred_at) AS first_at,
        max(occurred_at) AS last_at
    FROM {uses} WHERE caller <> '' GROUP BY ALL
)
SELECT day, caller, sum(uses)::BIGINT AS validations, min(first_at) AS first_at, max(last_at) AS last_at
FROM called LEFT JOIN used_tokens USING (token_no)
WHERE caller IS DISTINCT FROM 'tok_' || replace(token_id::VARCHAR, '-', '')
GROUP BY day, caller
"""

# What is sealed and what is not. Uses of one day may be counted by several rows here too.
_ALL_VIEWS = (
    *(
        f"""
CREATE VIEW all_{table} AS
SELECT {column}, token_no, origin_no, outcome, endpoint, scope, uses, first_at, last_at FROM {table}
UNION ALL
SELECT date_trunc('{column}', occurred_at), token_no, origin_no, outcome, endpoint, scope,
    count(*), min(occurred_at), max(occurred_at)
FROM recent_uses GROUP BY ALL
"""  # noqa: S608 - constants
        for table, column in (("usage_days", "day"), ("usage_hours", "hour"))
    ),
    """
CREATE VIEW all_usage_minutes AS
WITH counted AS (
    SELECT minute, client_id, kind, outcome, endpoint, uses, token_no FROM usage_minutes
    UNION ALL
    SELECT date_trunc('minute', occurred_at), NULL, NULL, outcome, endpoint, count(*), token_no
    FROM recent_uses GROUP BY ALL
)
SELECT c.minute, coalesce(c.client_id, t.client_id) AS client_id, coalesce(c.kind, t.kind) AS kind, c.outcome,
    c.endpoint, sum(c.uses)::BIGINT AS uses
FROM counted c
LEFT JOIN used_tokens u ON u.token_no = c.token_no
LEFT JOIN issued_tokens t ON t.token_id = u.token_id
GROUP BY ALL
""",
    f"CREATE VIEW recent_calls AS {CALLS.format(uses='recent_uses')}",
    """
CREATE VIEW all_caller_days AS
SELECT day, caller, validations, first_at, last_at FROM caller_days
UNION ALL
FROM recent_calls
UNION ALL
SELECT date_trunc('day', minute), caller, sum(requests)::BIGINT, min(minute), max(minute)
FROM refused WHERE caller <> '' GROUP BY ALL
""",
)

# Nothing is ever updated: what ends a token is a row of its own, however many tokens it ends, and this view says
# which end applies: the first, by sequence. A cut-off by client or subject ends the grants that began before it; a
# disabled client or user has ended all, and a revoked key all that it signed. Few tokens end so, and those are found
# first: an ASOF join would sort all tokens, whichever are asked for. `schema`: where the tables are; auditors' queries
# ask the same of published copies.
TOKENS = """
WITH revoked AS (
    SELECT * FROM {schema}ends WHERE what = 'revoked'
), revoked_token AS (
    SELECT token_id, min(ledger_seq) AS seq FROM revoked WHERE token_id IS NOT NULL GROUP BY token_id
), revoked_grant AS (
    SELECT grant_id, min(ledger_seq) AS seq FROM revoked WHERE grant_id IS NOT NULL GROUP BY grant_id
), cut_client AS (
    SELECT t.token_id, min(r.ledger_seq) AS seq
    FROM {schema}issued_tokens t JOIN revoked r ON r.client_id = t.client_id AND t.grant_seq < r.cuts_before_seq
    GROUP BY t.token_id
), cut_subject AS (
    SELECT t.token_id, min(r.ledger_seq) AS seq
    FROM {schema}issued_tokens t JOIN revoked r ON r.subject = t.subject AND t.grant_seq < r.cuts_before_seq
    GROUP BY t.token_id
), cut_key AS (
    SELECT kid, min(ledger_seq) AS seq FROM revoked WHERE kid IS NOT NULL GROUP BY kid
), spent AS (
    SELECT token_id, min(ended_at) AS spent_at FROM {schema}ends WHERE what = 'spent' GROUP BY token_id
), superseded AS (
    SELECT token_id, min(ended_at) AS ends_at FROM {schema}ends WHERE what = 'superseded' GROUP BY token_id
), renewed AS (
    SELECT token_id, max(ended_at) AS ends_at FROM {schema}ends WHERE what = 'renewed' GROUP BY token_id
), joined AS (
    SELECT t.*, spent.spent_at, superseded.ends_at, renewed.ends_at AS renewed_until,
        least(revoked_token.seq, revoked_grant.seq, cut_client.seq, cut_subject.seq, cut_key.seq) AS ended_seq
    FROM {schema}issued_tokens t
    LEFT JOIN revoked_token ON revoked_token.token_id = t.token_id
    LEFT JOIN revoked_grant ON revoked_grant.grant_id = t.grant_id
    LEFT JOIN spent ON spent.token_id = t.token_id
    LEFT JOIN superseded ON superseded.token_id = t.token_id
    LEFT JOIN renewed ON renewed.token_id = t.token_id
    LEFT JOIN cut_client ON cut_client.token_id = t.token_id
    LEFT JOIN cut_subject ON cut_subject.token_id = t.token_id
    LEFT JOIN cut_key ON cut_key.kid = t.kid
)
SELECT j.token_id, j.grant_id, j.ledger_seq, j.grant_seq, j.kind, j.client_id, j.subject, j.scope, j.audience,
    j.issued_at, least(greatest(j.expires_at, j.renewed_until), j.ends_at) AS expires_at, j.spent_at, e.ended_at,
    e.reason, j.ended_seq, j.sha256, j.kid, j.rotated_from
FROM joined j LEFT JOIN revoked e ON e.ledger_seq = j.ended_seq
"""

DDL = (
    *(
        f"CREATE TABLE {table} ({', '.join(f'{name} {sql_type}' for name, sql_type, _ in columns)})"
        for table, columns in _COLUMNS.items()
    ),
    *(f"CREATE TABLE {table} ({columns})" for table, columns in (ROLL_UPS | _OTHERS).items()),
    f"CREATE VIEW tokens AS {TOKENS.format(schema='')}",
    *_ALL_VIEWS,
    FINDINGS_VIEW,
)

ARROW_SCHEMAS: dict[str, Any] = {
    table: pa.schema([(name, arrow_type) for name, _, arrow_type in columns]) for table, columns in _COLUMNS.items()
}


def arrow_table(table: str, columns: dict[str, Any]) -> pa.Table:
    """A batch for the table, of columns by their names."""
    schema = ARROW_SCHEMAS[table]
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)
