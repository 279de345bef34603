-- version: 1
-- finds: a client's PKCE challenge that is used in authorizations of several people, or of one again and again over
--   hours: the client does not make a new one each time, so that PKCE protects nothing (RFC 9700 §2.1.1), or one
--   prepared link was sent to many, whose codes somebody waits for.
-- spares: a page for signing in that is loaded again, kept as a bookmark, or used once more with the right account.
-- entity: client
-- quiet_seconds: 86400
-- parameter: people = 5 (people; who authorized the client with one challenge, at least)
-- parameter: hours = 1 (hours; between the first and the last; then fewer are enough:)
-- parameter: people_apart = 3 (people; so far apart, at least)
-- parameter: authorizations = 5 (authorizations; so far apart, of one person too, at least)
-- parameter: days = 7 (days; within which these are counted, at most 7)
WITH counted AS (
    SELECT *, count(*) OVER recent AS authorizations, count(DISTINCT person) OVER recent AS people,
        min(occurred_at) OVER recent AS first_at, first_value(ledger_seq) OVER recent AS first_seq
    FROM window_challenges
    WINDOW recent AS (
        PARTITION BY challenge ORDER BY occurred_at RANGE BETWEEN to_days($days::INTEGER) PRECEDING AND CURRENT ROW
    )
)
SELECT e.occurred_at, e.client_id || ' ' || c.challenge AS entity, ledger_seq, c.first_seq, c.first_at,
    false AS reported, c.authorizations, c.people, e.client_id
FROM window_events e JOIN counted c USING (ledger_seq)
WHERE e.type = 'authorization.granted/1' AND e.occurred_at >= $from AND e.occurred_at < $until
    AND (
        c.people >= $people
        OR (c.people >= $people_apart OR c.authorizations >= $authorizations)
            AND c.first_at <= e.occurred_at - to_hours($hours::BIGINT)
    )
