"""What was found, by the events that say so. Nothing is folded: findings are few, and the events are there anyway."""

from __future__ import annotations

FINDINGS_VIEW = """
CREATE VIEW findings AS
WITH judged AS (
    SELECT body ->> 'finding_id' AS finding_id, max(ledger_seq) AS seq
    FROM events WHERE type IN ('finding.acknowledged/1', 'finding.dismissed/1') GROUP BY ALL
)
SELECT f.body ->> 'finding_id' AS finding_id, f.ledger_seq, f.recorded_at, f.body ->> 'rule' AS rule,
    (f.body ->> 'rule_version')::INTEGER AS rule_version, f.body ->> 'mode' AS mode,
    (f.body ->> 'detected_at')::TIMESTAMP AS detected_at, (f.body ->> 'first_at')::TIMESTAMP AS first_at,
    (f.body ->> 'last_at')::TIMESTAMP AS last_at, (f.body ->> 'self_reported')::BOOLEAN AS self_reported,
    f.token_ids[1] AS token_id, f.grant_id, f.client_id, f.subject, f.body ->> 'caller' AS caller,
    f.body -> 'counts' AS counts, f.body -> 'parameters' AS parameters, f.body -> 'evidence' AS evidence,
    CASE j.type WHEN 'finding.acknowledged/1' THEN 'acknowledged' WHEN 'finding.dismissed/1' THEN 'dismissed'
        ELSE 'open' END AS status,
    j.recorded_at AS status_at, j.done_by AS status_by, j.ledger_seq AS status_seq
FROM events f
LEFT JOIN judged ON judged.finding_id = f.body ->> 'finding_id'
LEFT JOIN events j ON j.ledger_seq = judged.seq
WHERE f.type = 'abuse.detected/1'
"""
