-- version: 1
-- finds: a token that is tried for one scope after another that it was not granted: somebody finds out what it can do.
-- spares: a client that was deployed without the one or two scopes that it needs and tries these again and again.
-- entity: token
-- quiet_seconds: 86400
-- parameter: scopes = 4 (scopes; different ones that were refused, at least)
-- parameter: long_seconds = 7200 (seconds; within which these are counted)
WITH counted AS (
    SELECT *, count(DISTINCT scope) OVER recent AS scopes, count(*) OVER recent AS refusals,
        min(occurred_at) OVER recent AS first_at, bool_and(reported) OVER recent AS all_reported
    FROM window_uses
    WHERE outcome = 'insufficient_scope' AND scope IS NOT NULL
    WINDOW recent AS (
        PARTITION BY token_no ORDER BY occurred_at RANGE BETWEEN to_seconds($long_seconds) PRECEDING AND CURRENT ROW
    )
)
SELECT occurred_at, token_no::VARCHAR AS entity, token_no, block_seq, use_index, first_at, all_reported AS reported, outcome,
    scopes, refusals
FROM counted
WHERE occurred_at >= $from AND occurred_at < $until AND scopes >= $scopes
