-- version: 1
-- finds: one token that is used from many networks within minutes, or within a minute from a few that its owner was never
--   seen in, fewer still if the agent is new to its owner too: it was published, or is used through a pool of rented
--   addresses.
-- spares: autoscaling and CI runners (as many networks as their owner usually has within an hour), a phone on a train (one
--   new network after another, minutes apart), an office behind one address, many addresses of one network, the first
--   minute of a token, and owners of whom nothing is known yet.
-- entity: token
-- quiet_seconds: 86400
-- parameter: networks = 6 (networks; /24 or /48, at least)
-- parameter: factor = 2 (times; as many as the owner ever had within an hour on the days before)
-- parameter: seconds = 600 (seconds; within which these are counted)
-- parameter: new_networks = 3 (networks; that the owner was never seen in, at least; the factor counts here too)
-- parameter: foreign_networks = 2 (networks; of these by an agent that the owner was never seen with, at least)
-- parameter: new_seconds = 60 (seconds; within which these two are counted)
WITH candidates AS (
    SELECT token_no FROM window_uses WHERE network <> '' GROUP BY token_no
    HAVING count(DISTINCT network) >= least($networks, $new_networks, $foreign_networks)
), first_uses AS (
    SELECT token_no, min(first_at) AS first_at FROM token_networks GROUP BY token_no
), uses AS (
    SELECT u.*, s.hour_networks_max AS networks_usual,
        greatest(u.occurred_at - to_seconds($new_seconds), f.first_at + to_seconds($new_seconds)) AS since,
        CASE WHEN n.first_at > since THEN u.network END AS new_network,
        CASE WHEN a.first_at > since THEN new_network END AS foreign_network
    FROM window_uses u
    SEMI JOIN candidates USING (token_no)
    JOIN window_tokens t USING (token_no)
    JOIN usual_subjects s ON s.subject = t.subject AND s.hour_networks_max > 0
    LEFT JOIN first_uses f USING (token_no)
    LEFT JOIN subject_networks n ON n.subject = t.subject AND n.network = u.network
    LEFT JOIN subject_agents a ON a.subject = t.subject AND a.agent = u.agent
    WHERE u.network <> ''
), counted AS (
    SELECT *, count(DISTINCT network) OVER recent AS networks, count(DISTINCT ip) OVER recent AS addresses,
        count(DISTINCT new_network) OVER minute AS new_networks,
        count(DISTINCT foreign_network) OVER minute AS foreign_networks,
        min(occurred_at) OVER recent AS first_at, bool_and(reported) OVER recent AS all_reported
    FROM uses
    WINDOW recent AS (
        PARTITION BY token_no ORDER BY occurred_at RANGE BETWEEN to_seconds($seconds) PRECEDING AND CURRENT ROW
    ), minute AS (
        PARTITION BY token_no ORDER BY occurred_at RANGE BETWEEN to_seconds($new_seconds) PRECEDING AND CURRENT ROW
    )
)
SELECT occurred_at, token_no::VARCHAR AS entity, token_no, block_seq, use_index, first_at, all_reported AS reported,
    networks, addresses, networks_usual, new_networks
FROM counted
WHERE occurred_at >= $from AND occurred_at < $until AND (
    networks >= greatest($networks, $factor * networks_usual)
    OR new_networks >= greatest($new_networks, $factor * networks_usual)
    OR foreign_networks >= $foreign_networks
)
