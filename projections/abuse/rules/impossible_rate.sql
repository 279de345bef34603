-- version: 1
-- finds: a person's access token (PAT) that is used at a rate that neither a person nor the scripts that it is usually
--   used by can reach.
-- spares: scripts and editors that ask some times a second, people whose scripts always ask that often, and scripts that
--   ask again and again with a token that was refused.
-- entity: token
-- quiet_seconds: 21600
-- parameter: uses = 60 (uses; at least: more than one after another, each waiting for the one before)
-- parameter: factor = 4 (times; as often as in the busiest ten minutes on the days before)
-- parameter: seconds = 8 (seconds; within which the uses are counted)
WITH candidates AS (
    SELECT u.token_no, greatest($uses, $factor * $seconds / 600 * coalesce(o.ten_minutes_uses_max, 0)) AS uses_max,
        coalesce(o.ten_minutes_uses_max, 0) AS uses_usual
    FROM (SELECT token_no, count(*) AS uses FROM window_uses WHERE outcome = 'valid' GROUP BY token_no) u
    JOIN window_tokens t USING (token_no)
    LEFT JOIN usual o USING (token_no)
    WHERE t.kind = 'pat' AND u.uses >= greatest($uses, $factor * $seconds / 600 * coalesce(o.ten_minutes_uses_max, 0))
), counted AS (
    SELECT u.*, c.uses_max, c.uses_usual, count(*) OVER recent AS uses, min(occurred_at) OVER recent AS first_at,
        bool_and(reported) OVER recent AS all_reported
    FROM window_uses u JOIN candidates c USING (token_no)
    WHERE u.outcome = 'valid'
    WINDOW recent AS (
        PARTITION BY token_no ORDER BY occurred_at RANGE BETWEEN to_seconds($seconds) PRECEDING AND CURRENT ROW
    )
)
SELECT occurred_at, token_no::VARCHAR AS entity, token_no, block_seq, use_index, first_at, all_reported AS reported,
    uses, uses_usual
FROM counted
WHERE occurred_at >= $from AND occurred_at < $until AND uses >= uses_max
