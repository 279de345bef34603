-- version: 1
-- finds: one token that is used from many networks within minutes: it was published, or is used through a pool of
--   rented addresses.
-- spares: autoscaling and CI runners (as many networks as their owner usually has within an hour), a phone on a train (a
--   few networks), an office behind one address, many addresses of one network, and owners of whom nothing is known yet.
-- entity: token
-- quiet_seconds: 86400
-- parameter: networks = 6 (networks; /24 or /48, at least)
-- parameter: factor = 2 (times; as many as the owner ever had within an hour on the days before)
-- parameter: seconds = 600 (seconds; within which these are counted)
WITH candidates AS (
    SELECT token_no FROM window_uses WHERE network <> '' GROUP BY token_no
    HAVING count(DISTINCT network) >= $networks
), counted AS (
    SELECT *, count(DISTINCT network) OVER recent AS networks, count(DISTINCT ip) OVER recent AS addresses,
        min(occurred_at) OVER recent AS first_at, bool_and(reported) OVER recent AS all_reported
    FROM window_uses SEMI JOIN candidates USING (token_no)
    WHERE network <> ''
    WINDOW recent AS (
        PARTITION BY token_no ORDER BY occurred_at RANGE BETWEEN to_seconds($seconds) PRECEDING AND CURRENT ROW
    )
)
SELECT c.occurred_at, c.token_no::VARCHAR AS entity, c.token_no, c.block_seq, c.use_index, c.first_at,
    c.all_reported AS reported, c.networks, c.addresses, s.hour_networks_max AS networks_usual
FROM counted c
JOIN window_tokens t USING (token_no)
JOIN usual_subjects s ON s.subject = t.subject
WHERE c.occurred_at >= $from AND c.occurred_at < $until
    AND c.networks >= greatest($networks, $factor * s.hour_networks_max)
