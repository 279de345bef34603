-- version: 1
-- finds: a spent refresh token that is presented again after its successor is in use or the retry window has passed:
--   two parties hold the same family (RFC 9700 §4.14.2). The service has revoked the grant by then.
-- spares: a client that lost the answer and asks again within the retry window; it gets the same successor.
-- entity: grant
-- mode: notify
-- quiet_seconds: 86400
SELECT occurred_at, grant_id AS entity, ledger_seq, occurred_at AS first_at, false AS reported, 1 AS replays
FROM window_events
WHERE type = 'refresh.replayed/1' AND NOT (body ->> 'answered')::BOOLEAN
    AND occurred_at >= $from AND occurred_at < $until
