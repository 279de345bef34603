-- version: 1
-- finds: a token that is used far more often within minutes than it, or its owner's other tokens, ever was: somebody
--   fetches all there is.
-- spares: jobs that run every hour or day in one go, retries after a failure (a few times as many, or refused), and
--   tokens whose owner has no history of some days, such as those made for a load test.
-- entity: token
-- quiet_seconds: 21600
-- parameter: uses = 100 (uses; at least)
-- parameter: factor = 4 (times; as many as the most within ten minutes on the days before)
-- parameter: days = 3 (days; with uses before that day)
-- parameter: seconds = 600 (seconds; within which the uses are counted)
WITH candidates AS (
    SELECT u.token_no, greatest($uses, $factor * coalesce(o.ten_minutes_uses_max, s.ten_minutes_uses_max)) AS uses_max,
        coalesce(o.ten_minutes_uses_max, s.ten_minutes_uses_max) AS uses_usual
    FROM (SELECT token_no, count(*) AS uses FROM window_uses WHERE outcome = 'valid' GROUP BY token_no) u
    JOIN window_tokens t USING (token_no)
    LEFT JOIN usual o ON o.token_no = u.token_no AND o.days >= $days
    LEFT JOIN usual_subjects s ON s.subject = t.subject AND s.days >= $days
    WHERE u.uses >= greatest($uses, $factor * coalesce(o.ten_minutes_uses_max, s.ten_minutes_uses_max))
        AND coalesce(o.days, s.days) IS NOT NULL
), counted AS (
    SELECT u.*, c.uses_max, c.uses_usual, count(*) OVER recent AS uses, min(occurred_at) OVER recent AS first_at
    FROM window_uses u JOIN candidates c USING (token_no)
    WHERE u.outcome = 'valid'
    WINDOW recent AS (
        PARTITION BY token_no ORDER BY occurred_at RANGE BETWEEN to_seconds($seconds) PRECEDING AND CURRENT ROW
    )
)
SELECT occurred_at, token_no::VARCHAR AS entity, token_no, block_seq, use_index, first_at, false AS reported,
    uses, uses_usual
FROM counted
WHERE occurred_at >= $from AND occurred_at < $until AND uses >= uses_max
