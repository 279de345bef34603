-- version: 1
-- finds: one address that tries the secrets of many clients, or of many client ids that do not exist: somebody has a list
--   of ids, or of leaked secrets (RFC 6749 §2.3.1). Failures are counted by the minute.
-- spares: a client that goes on with its old secret after a rotation, however often, and a few such clients behind one
--   address.
-- entity: address
-- quiet_seconds: 21600
-- parameter: clients = 4 (clients; different ones whose secret was wrong, at least)
-- parameter: requests = 60 (requests; that name no known client, at least)
-- parameter: long_seconds = 10800 (seconds; within which these are counted)
WITH counted AS (
    SELECT ip, minute, count(DISTINCT nullif(caller, '')) OVER recent AS clients,
        coalesce(sum(CASE WHEN caller = '' THEN requests END) OVER recent, 0)::BIGINT AS requests_unnamed,
        sum(requests) OVER recent::BIGINT AS requests, min(minute) OVER recent AS first_at
    FROM window_refused
    WHERE outcome = 'invalid_client' AND ip IS NOT NULL
    WINDOW recent AS (PARTITION BY ip ORDER BY minute RANGE BETWEEN to_seconds($long_seconds) PRECEDING AND CURRENT ROW)
)
SELECT DISTINCT minute AS occurred_at, 'address ' || ip AS entity, ip, first_at, false AS reported, clients, requests
FROM counted
WHERE minute >= $from AND minute < $until AND (clients >= $clients OR requests_unnamed >= $requests)
