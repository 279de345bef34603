-- version: 1
-- finds: a token that is suddenly used from a network and by an agent neither of which it was ever used from or by: a
--   stolen token in the thief's own tools.
-- spares: a deployment (same agent in new networks, or a new agent in known ones; versions do not count), roaming phones
--   and CI runners (the agent stays), a rotated token (what its owner's other tokens are used from is known), the first
--   use of a token (which nothing says where to expect), and owners who were not seen for long enough.
-- entity: token
-- quiet_seconds: 86400
-- parameter: learning_hours = 24 (hours; what was seen that long ago is usual, and so long must be looked before)
-- parameter: known_hours = 48 (hours; for so long must the owner have been seen)
-- parameter: uses = 8 (uses; of the owner's tokens on the days before)
WITH first_uses AS (
    SELECT u.token_no, u.network, u.agent, min(u.occurred_at) AS occurred_at,
        arg_min((u.block_seq, u.use_index, u.reported), (u.occurred_at, u.block_seq, u.use_index)) AS one
    FROM window_uses u
    WHERE u.occurred_at >= $from AND u.occurred_at < $until AND u.network <> ''
        AND u.outcome IN ('valid', 'insufficient_scope', 'wrong_audience', 'ip_not_allowed')
    GROUP BY ALL
), new_to_token AS (
    SELECT f.*, t.subject, t.first_at AS token_first_at
    FROM first_uses f
    JOIN (
        SELECT k.token_no, k.subject, min(n.first_at) AS first_at
        FROM window_tokens k JOIN token_networks n USING (token_no) GROUP BY ALL
    ) t USING (token_no)
    LEFT JOIN token_networks n
        ON n.token_no = f.token_no AND n.network = f.network AND n.first_at < f.occurred_at
    LEFT JOIN token_agents a ON a.token_no = f.token_no AND a.agent = f.agent AND a.first_at < f.occurred_at
    WHERE n.token_no IS NULL AND a.token_no IS NULL AND t.first_at < f.occurred_at
)
SELECT f.occurred_at, f.token_no::VARCHAR AS entity, f.token_no, f.one[1] AS block_seq, f.one[2] AS use_index,
    f.occurred_at AS first_at, f.one[3] AS reported, f.network, s.uses AS uses_before, s.days AS days_before
FROM new_to_token f
JOIN usual_subjects s ON s.subject = f.subject AND s.uses >= $uses
    AND s.first_at <= f.occurred_at - to_hours($known_hours::BIGINT)
LEFT JOIN subject_networks n ON n.subject = f.subject AND n.network = f.network
    AND n.first_at <= f.occurred_at - to_hours($learning_hours::BIGINT)
LEFT JOIN subject_agents a ON a.subject = f.subject AND a.agent = f.agent
    AND a.first_at <= f.occurred_at - to_hours($learning_hours::BIGINT)
WHERE n.subject IS NULL
    AND (a.subject IS NULL OR f.token_first_at <= f.occurred_at - to_hours($learning_hours::BIGINT))
