"""The views that auditors query, over published files. A column of a view is never renamed, retyped or taken away:
that would be another version of it, beside this one. What they mean stands in the package's docstring.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from projections.analytics.schema import TOKENS

_NAMES = ("uses", "events", "tokens", "findings", "usage_minutes", "usage_hours", "usage_days", "refused", "gaps")
VIEWS = tuple(f"{name}_v1" for name in _NAMES)

# The tables behind the views, in a schema of their own, so that `SHOW TABLES` lists the views alone.
_SCHEMA = "published"

_USES = """
CREATE VIEW uses_v1 AS
SELECT u.occurred_at, u.recorded_at, u.block_seq, u.use_index, t.token_id, lower(hex(u.token_sha256)) AS token_sha256,
    u.outcome, u.endpoint, u.caller, u.scope, u.audience, o.ip, o.network, o.user_agent, o.agent, u.method, u.path,
    u.reported, i.kind, i.client_id, i.subject
FROM published.uses u
LEFT JOIN published.used_tokens t ON t.token_no = u.token_no
LEFT JOIN published.issued_tokens i ON i.token_id = t.token_id
LEFT JOIN published.origins o ON o.origin_no = u.origin_no
"""

_EVENTS = """
CREATE VIEW events_v1 AS
SELECT ledger_seq, recorded_at, occurred_at, type, done_by, request_id, subject, client_id, user_id, grant_id,
    token_ids, body::JSON AS body
FROM published.events
"""

_TOKENS = f"CREATE VIEW tokens_v1 AS {TOKENS.format(schema='published.')}"

# The last that was said of a finding tells its status.
_FINDINGS = """
CREATE VIEW findings_v1 AS
WITH judged AS (
    SELECT body ->> 'finding_id' AS finding_id,
        arg_max(regexp_extract(type, '^finding\\.([a-z_]+)', 1), ledger_seq) AS status
    FROM published.events WHERE type LIKE 'finding.%' GROUP BY ALL
)
SELECT e.ledger_seq, e.recorded_at, (e.body ->> 'detected_at')::TIMESTAMPTZ::TIMESTAMP AS detected_at,
    e.body ->> 'finding_id' AS finding_id, e.body ->> 'rule' AS rule,
    (e.body ->> 'rule_version')::BIGINT AS rule_version, e.body ->> 'mode' AS mode,
    coalesce(j.status, 'open') AS status, e.body ->> 'token_id' AS token_id, e.body ->> 'grant_id' AS grant_id,
    e.body ->> 'client_id' AS client_id, e.body ->> 'subject' AS subject, e.body ->> 'caller' AS caller,
    (e.body ->> 'self_reported')::BOOLEAN AS self_reported, e.body::JSON -> 'evidence' AS evidence,
    e.body::JSON AS body
FROM published.events e LEFT JOIN judged j ON j.finding_id = e.body ->> 'finding_id'
WHERE e.type LIKE 'abuse.detected/%'
"""

_MINUTES = """
CREATE VIEW usage_minutes_v1 AS
WITH counted AS (
    SELECT minute, client_id, kind, outcome, endpoint, uses, token_no FROM published.usage_minutes
    UNION ALL
    SELECT date_trunc('minute', occurred_at), NULL, NULL, outcome, endpoint, count(*), token_no
    FROM published.recent_uses GROUP BY ALL
)
SELECT c.minute, coalesce(c.client_id, i.client_id) AS client_id, coalesce(c.kind, i.kind) AS kind, c.outcome,
    c.endpoint, sum(c.uses)::BIGINT AS uses
FROM counted c
LEFT JOIN published.used_tokens t ON t.token_no = c.token_no
LEFT JOIN published.issued_tokens i ON i.token_id = t.token_id
GROUP BY ALL
"""

_SPANS = """
CREATE VIEW usage_{span}s_v1 AS
WITH counted AS (
    SELECT {span}, token_no, origin_no, outcome, endpoint, scope, uses, first_at, last_at FROM published.usage_{span}s
    UNION ALL
    SELECT date_trunc('{span}', occurred_at), token_no, origin_no, outcome, endpoint, scope, count(*),
        min(occurred_at), max(occurred_at)
    FROM published.recent_uses GROUP BY ALL
), summed AS (
    SELECT {span}, token_no, origin_no, outcome, endpoint, scope, sum(uses)::BIGINT AS uses,
        min(first_at) AS first_at, max(last_at) AS last_at
    FROM counted GROUP BY ALL
)
SELECT s.{span}, t.token_id, o.ip, o.network, o.user_agent, o.agent, s.outcome, s.endpoint, s.scope, s.uses,
    s.first_at, s.last_at
FROM summed s
LEFT JOIN published.used_tokens t ON t.token_no = s.token_no
LEFT JOIN published.origins o ON o.origin_no = s.origin_no
"""

_REFUSED = """
CREATE VIEW refused_v1 AS
SELECT minute, recorded_at, block_seq, refused_index, caller, ip, network, outcome, endpoint, requests
FROM published.refused
"""

_GAPS = "CREATE VIEW gaps_v1 AS SELECT block_seq, recorded_at, writer, lost FROM published.gaps"


def statements(files: Mapping[str, Iterable[Path]]) -> list[str]:
    """What makes the views, over the files of a publication by table."""
    tables = {name: list(paths) for name, paths in files.items()}
    # In the order of USAGE: the newest uses are in no segment yet.
    tables["uses"] = [*tables.pop("segments"), *tables["recent_uses"]]
    made = [f"CREATE VIEW {_SCHEMA}.{name} AS FROM {_read(paths)}" for name, paths in tables.items()]
    spans = [_SPANS.format(span=span) for span in ("hour", "day")]
    return [
        f"CREATE SCHEMA {_SCHEMA}",
        *made,
        *(_USES, _EVENTS, _TOKENS, _FINDINGS, _MINUTES),
        *spans,
        *(_REFUSED, _GAPS),
    ]


def _read(paths: Iterable[Path]) -> str:
    # Names alone: a path may hold what DuckDB takes for a pattern.
    named = ", ".join(f"'{path.name}'" for path in paths)
    return f"read_parquet([{named}], hive_partitioning = false)"
