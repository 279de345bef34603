-- version: 1
-- finds: a token that several agents begin to use within a day, each from a network of its own, which it was not used by or
--   from before: it is shared or sold, or its thieves use it beside its owner.
-- spares: an upgrade to another agent or a move to other networks (one of them is as before), services that always shared
--   a token, a person with new tools in one place, versions of one agent.
-- entity: token
-- quiet_seconds: 86400
-- parameter: agents = 3 (agents; product names without versions, at least)
-- parameter: networks = 3 (networks; at least)
-- parameter: hours = 24 (hours; within which these were first seen with the token)
-- parameter: learning_hours = 24 (hours; so long must its owner have been seen; what was seen then is usual)
WITH pairs AS (
    SELECT token_no, agent, network, first_at, NULL::BIGINT AS block_seq, NULL::USMALLINT AS use_index, true AS reported
    FROM history WHERE live AND network <> ''
    UNION ALL
    SELECT token_no, agent, network, occurred_at, block_seq, use_index, reported
    FROM window_uses WHERE live AND network <> ''
), agents AS (
    SELECT token_no, agent, min(first_at) AS first_at,
        arg_min((network, block_seq, use_index, reported), (first_at, block_seq, use_index)) AS one
    FROM pairs GROUP BY ALL
), known AS (
    SELECT subject, min(first_at) AS first_at FROM subject_agents GROUP BY ALL
), arrivals AS (
    SELECT a.token_no, a.agent, a.first_at AS occurred_at, a.one[1] AS network, a.one[2] AS block_seq,
        a.one[3] AS use_index, a.one[4] AS reported
    FROM agents a
    JOIN window_tokens t USING (token_no)
    JOIN known k ON k.subject = t.subject AND k.first_at <= a.first_at - to_hours($learning_hours::BIGINT)
    LEFT JOIN subject_agents s ON s.subject = t.subject AND s.agent = a.agent
        AND s.first_at <= a.first_at - to_hours($learning_hours::BIGINT)
    LEFT JOIN subject_networks n ON n.subject = t.subject AND n.network = a.one[1]
        AND n.first_at <= a.first_at - to_hours($learning_hours::BIGINT)
    WHERE s.subject IS NULL AND n.subject IS NULL
), counted AS (
    SELECT *, count(DISTINCT agent) OVER recent AS agents, count(DISTINCT network) OVER recent AS networks,
        min(occurred_at) OVER recent AS first_at, bool_and(reported) OVER recent AS all_reported
    FROM arrivals
    WINDOW recent AS (
        PARTITION BY token_no ORDER BY occurred_at RANGE BETWEEN to_hours($hours::BIGINT) PRECEDING AND CURRENT ROW
    )
)
SELECT occurred_at, token_no::VARCHAR AS entity, token_no, block_seq, use_index, first_at, all_reported AS reported,
    agents, networks
FROM counted
WHERE occurred_at >= $from AND occurred_at < $until AND agents >= $agents AND networks >= $networks
