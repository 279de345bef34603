-- version: 1
-- finds: a token that is used far more often within minutes than it, or its owner's other tokens, ever was: somebody
--   fetches all there is.
-- spares: jobs that run every hour or day in one go (sometimes they have more to do), retries after a failure (a few times
--   as many, or refused), a person's script that asks for some hundred things, and tokens whose owner has no history of
--   some days, such as those made for a load test.
-- entity: token
-- quiet_seconds: 21600
-- parameter: uses = 125 (uses; at least)
-- parameter: factor = 4 (times; as many as the most within ten minutes on the days before)
-- parameter: days = 7 (days; on which the owner's tokens were used before; with fewer, the factors are so much larger and
--   `uses` up to twice)
-- parameter: job_share = 0.5 (days; what an average day has, within ten minutes: a job, whose factor and `uses` are twice
--   as large, since it does at times what has piled up)
-- parameter: seconds = 600 (seconds; within which the uses are counted)
-- parameter: person_uses = 450 (uses; of a person's PAT, at least)
-- parameter: person_factor = 1.2 (times; as many as the most within ten minutes on the days before)
-- parameter: long_seconds = 2400 (seconds; within which a PAT's uses are counted)
WITH expected AS (
    SELECT t.token_no, t.kind = 'pat' AS is_person, s.ten_minutes_uses_max AS uses_usual,
        greatest(1, $days / s.days) AS doubt,
        doubt * CASE WHEN uses_usual * s.days >= $job_share * s.uses THEN 2 ELSE 1 END AS service_doubt,
        CASE WHEN is_person THEN greatest($person_uses, doubt * $person_factor * uses_usual)
            ELSE greatest(least(2, service_doubt) * $uses, service_doubt * $factor * uses_usual) END AS uses_max,
        to_seconds(CASE WHEN is_person THEN $long_seconds ELSE $seconds END) AS within
    FROM window_tokens t JOIN usual_subjects s USING (subject)
), candidates AS (
    SELECT token_no FROM window_uses JOIN expected USING (token_no) WHERE outcome = 'valid'
    GROUP BY token_no, uses_max HAVING count(*) >= uses_max
), counted AS (
    SELECT u.*, e.uses_max, e.uses_usual, count(*) OVER recent AS uses, min(u.occurred_at) OVER recent AS first_at,
        bool_and(u.reported) OVER recent AS all_reported
    FROM window_uses u SEMI JOIN candidates USING (token_no) JOIN expected e USING (token_no)
    WHERE u.outcome = 'valid'
    WINDOW recent AS (
        PARTITION BY token_no ORDER BY occurred_at RANGE BETWEEN within PRECEDING AND CURRENT ROW
    )
)
SELECT occurred_at, token_no::VARCHAR AS entity, token_no, block_seq, use_index, first_at, all_reported AS reported,
    uses, uses_usual
FROM counted
WHERE occurred_at >= $from AND occurred_at < $until AND uses >= uses_max
