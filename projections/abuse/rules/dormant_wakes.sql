-- version: 1
-- finds: a token that nobody used for long and that is then used from a network that its owner is not known by: an old
--   token that was found in a backup, a log or a repository.
-- spares: jobs that run once a month and people back from their holidays (from where they were before), owners of whom
--   nothing is known yet, and tokens used once in weeks by owners of whom little is known, if by a tool of theirs.
-- entity: token
-- quiet_seconds: 86400
-- parameter: days = 14 (days; without a use, or since the issue of a token that was never used)
-- parameter: known_days = 5 (days; on which the owner's tokens were used, at least, or else:)
-- parameter: factor = 7 (times; as long as between two days with uses before, on average; if neither, the agent must be
--   one that the owner is not known by)
WITH ordered AS (
    SELECT *, lag(occurred_at) OVER (PARTITION BY token_no ORDER BY occurred_at, block_seq, use_index) AS used_before
    FROM window_uses
), last_uses AS (
    SELECT h.token_no, max(h.last_at) AS last_at,
        CASE WHEN any_value(o.days) > 1 THEN (max(h.last_at) - min(h.first_at)) / (any_value(o.days) - 1) END AS gap
    FROM history h LEFT JOIN usual o USING (token_no) GROUP BY h.token_no
), woken AS (
    SELECT o.*, t.subject, l.gap, coalesce(o.used_before, l.last_at, t.issued_at) AS dormant_since
    FROM ordered o
    JOIN window_tokens t USING (token_no)
    LEFT JOIN last_uses l USING (token_no)
    WHERE o.occurred_at >= $from AND o.occurred_at < $until AND o.network <> ''
        AND o.outcome IN ('valid', 'insufficient_scope', 'wrong_audience', 'ip_not_allowed')
        AND dormant_since <= o.occurred_at - to_days($days::INTEGER)
), known AS (
    SELECT subject, min(first_at) AS first_at FROM subject_networks GROUP BY subject
)
SELECT w.occurred_at, w.token_no::VARCHAR AS entity, w.token_no, w.block_seq, w.use_index, w.occurred_at AS first_at,
    w.reported, w.network, date_diff('day', w.dormant_since, w.occurred_at) AS days_dormant
FROM woken w
JOIN known k ON k.subject = w.subject AND k.first_at < w.occurred_at
LEFT JOIN usual_subjects s ON s.subject = w.subject
LEFT JOIN subject_networks n ON n.subject = w.subject AND n.network = w.network AND n.first_at < w.occurred_at
LEFT JOIN subject_agents a ON a.subject = w.subject AND a.agent = w.agent AND a.first_at < w.occurred_at
WHERE n.subject IS NULL
    AND (a.subject IS NULL OR s.days >= $known_days OR w.dormant_since <= w.occurred_at - $factor * w.gap)
