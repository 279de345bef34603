-- version: 1
-- finds: a token that is tried for one scope after another that it was not granted, or for any such scope from a network
--   and by an agent that its owner is not known by: somebody finds out what it can do.
-- spares: a client that was deployed without the one or two scopes that it needs and tries these again and again, from
--   where it always was or by the usual agent.
-- entity: token
-- quiet_seconds: 86400
-- parameter: scopes = 4 (scopes; different ones that were refused, at least)
-- parameter: foreign_scopes = 1 (scopes; at least, if the owner is known neither by the network nor by the agent)
-- parameter: long_seconds = 7200 (seconds; within which these are counted)
-- parameter: learning_hours = 24 (hours; what the owner's tokens were used from and by that long ago is known)
WITH counted AS (
    SELECT *, count(DISTINCT scope) OVER recent AS scopes, count(*) OVER recent AS refusals,
        min(occurred_at) OVER recent AS first_at, bool_and(reported) OVER recent AS all_reported
    FROM window_uses
    WHERE outcome = 'insufficient_scope' AND scope IS NOT NULL
    WINDOW recent AS (
        PARTITION BY token_no ORDER BY occurred_at RANGE BETWEEN to_seconds($long_seconds) PRECEDING AND CURRENT ROW
    )
), known AS (
    SELECT subject, min(first_at) AS first_at FROM subject_networks GROUP BY subject
)
SELECT c.occurred_at, c.token_no::VARCHAR AS entity, c.token_no, c.block_seq, c.use_index, c.first_at,
    c.all_reported AS reported, c.outcome, c.scopes, c.refusals
FROM counted c
JOIN window_tokens t USING (token_no)
LEFT JOIN known k ON k.subject = t.subject AND k.first_at <= c.occurred_at - to_hours($learning_hours::BIGINT)
LEFT JOIN subject_networks n ON n.subject = t.subject AND n.network = c.network
    AND n.first_at <= c.occurred_at - to_hours($learning_hours::BIGINT)
LEFT JOIN subject_agents a ON a.subject = t.subject AND a.agent = c.agent
    AND a.first_at <= c.occurred_at - to_hours($learning_hours::BIGINT)
WHERE c.occurred_at >= $from AND c.occurred_at < $until AND (
    c.scopes >= $scopes
    OR c.scopes >= $foreign_scopes AND c.network <> '' AND k.subject IS NOT NULL
        AND n.subject IS NULL AND a.subject IS NULL
)
