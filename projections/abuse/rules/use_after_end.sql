-- version: 1
-- finds: a revoked or expired token that is used from a network in which nobody has used a token of the same owner:
--   a copy of it is in other hands, which may not know yet that it has ended.
-- spares: clients that go on with an old token from where they always were, old tokens on new machines of an owner whose
--   other tokens are used there, phones that wake up in another network with an expired token and the usual agent (these
--   give up after a few attempts and fetch another one), and owners of whom nobody knows yet where they are.
-- entity: token
-- quiet_seconds: 86400
-- parameter: attempts = 5 (uses; from one network, if the agent is one that the owner is known by)
-- parameter: seconds = 600 (seconds; within which these are counted)
WITH ended AS (
    SELECT u.*, t.subject FROM window_uses u JOIN window_tokens t USING (token_no)
    WHERE u.outcome IN ('revoked', 'expired') AND u.network <> ''
), counted AS (
    SELECT *, count(*) OVER recent AS attempts, min(occurred_at) OVER recent AS first_at,
        bool_and(reported) OVER recent AS all_reported
    FROM ended
    WINDOW recent AS (
        PARTITION BY token_no, network ORDER BY occurred_at RANGE BETWEEN to_seconds($seconds) PRECEDING AND CURRENT ROW
    )
)
SELECT c.occurred_at, c.token_no::VARCHAR AS entity, c.token_no, c.block_seq, c.use_index, c.first_at,
    c.all_reported AS reported, c.network, c.outcome, c.attempts
FROM counted c
JOIN (SELECT subject, min(first_at) AS first_at FROM subject_networks GROUP BY subject) known
    ON known.subject = c.subject AND known.first_at <= c.occurred_at
LEFT JOIN subject_networks n ON n.subject = c.subject AND n.network = c.network AND n.first_at <= c.occurred_at
LEFT JOIN subject_agents a ON a.subject = c.subject AND a.agent = c.agent AND a.first_at <= c.occurred_at
WHERE c.occurred_at >= $from AND c.occurred_at < $until AND n.subject IS NULL
    AND (a.subject IS NULL OR c.attempts >= $attempts)
