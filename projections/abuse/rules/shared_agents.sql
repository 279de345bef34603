-- version: 1
-- finds: a token that several agents use in turns, from several networks, which it was not used by before: it is shared,
--   or its thieves use it beside its owner.
-- spares: an upgrade to another agent (the old one does not come back), services that always shared a token, a person
--   with several tools in one place, versions of one agent.
-- entity: token
-- quiet_seconds: 86400
-- parameter: agents = 3 (agents; product names without versions, at least)
-- parameter: new_agents = 2 (agents; of these, that were not seen a day ago)
-- parameter: networks = 2 (networks; at least)
-- parameter: turns = 4 (times; that the agent changes from one use to the next)
-- parameter: learning_hours = 24 (hours; so long must the token have been seen, and an agent is new)
-- parameter: seconds = 600 (seconds; within which these are counted)
WITH candidates AS (
    SELECT token_no FROM window_uses WHERE network <> '' GROUP BY token_no
    HAVING count(DISTINCT agent) >= $agents AND count(DISTINCT network) >= $networks
), ordered AS (
    SELECT u.*, a.first_at > u.occurred_at - to_hours($learning_hours::BIGINT) AS is_new,
        u.agent <> lag(u.agent) OVER one_by_one
            AND lag(u.occurred_at) OVER one_by_one >= u.occurred_at - to_seconds($seconds) AS is_turn
    FROM window_uses u
    SEMI JOIN candidates USING (token_no)
    LEFT JOIN token_agents a ON a.token_no = u.token_no AND a.agent = u.agent
    WHERE u.network <> ''
    WINDOW one_by_one AS (PARTITION BY u.token_no ORDER BY u.occurred_at, u.block_seq, u.use_index)
), counted AS (
    SELECT *, count(DISTINCT agent) OVER recent AS agents, count(DISTINCT network) OVER recent AS networks,
        count(DISTINCT CASE WHEN is_new IS NOT FALSE THEN agent END) OVER recent AS new_agents,
        count(CASE WHEN is_turn THEN 1 END) OVER recent AS turns,
        min(occurred_at) OVER recent AS first_at, bool_and(reported) OVER recent AS all_reported
    FROM ordered
    WINDOW recent AS (
        PARTITION BY token_no ORDER BY occurred_at RANGE BETWEEN to_seconds($seconds) PRECEDING AND CURRENT ROW
    )
)
SELECT c.occurred_at, c.token_no::VARCHAR AS entity, c.token_no, c.block_seq, c.use_index, c.first_at,
    c.all_reported AS reported, c.agents, c.new_agents, c.networks, c.turns
FROM counted c
JOIN (SELECT token_no, min(first_at) AS first_at FROM token_agents GROUP BY token_no) k
    ON k.token_no = c.token_no AND k.first_at <= c.occurred_at - to_hours($learning_hours::BIGINT)
WHERE c.occurred_at >= $from AND c.occurred_at < $until AND c.agents >= $agents AND c.new_agents >= $new_agents
    AND c.networks >= $networks AND c.turns >= $turns
