-- version: 1
-- finds: one address, or one caller, from which many unknown or malformed tokens come: somebody guesses tokens, or tries
--   a list of them. Requests that name no known token are counted by the minute, so that times are of that minute.
-- spares: an office or a proxy from which more good tokens come than bad ones, and resource servers that always pass on
--   some garbage (the factor; on the very first day nobody knows which these are).
-- entity: address
-- quiet_seconds: 21600
-- parameter: requests = 50 (requests; from one address, at least)
-- parameter: long_requests = 60 (requests; from one address that no good token comes from, at least)
-- parameter: caller_requests = 300 (requests; passed on by one caller, whatever their addresses, at least)
-- parameter: factor = 3 (times; as many as the caller's most within ten minutes on the days before)
-- parameter: seconds = 300 (seconds; within which these are counted)
-- parameter: long_seconds = 1200 (seconds; within which `long_requests` are counted)
WITH bad AS (
    SELECT * FROM window_refused WHERE outcome IN ('unknown', 'malformed')
), addresses AS (
    SELECT ip, minute, sum(bad)::BIGINT AS bad, sum(good)::BIGINT AS good, bool_and(reported) AS reported
    FROM (
        SELECT ip, minute, requests AS bad, 0 AS good, reported FROM bad WHERE ip IS NOT NULL
        UNION ALL
        SELECT ip, minute, 0, uses, true FROM window_allowed
    )
    GROUP BY ip, minute
), by_address AS (
    SELECT ip, minute, bad AS bad_now, sum(bad) OVER recent AS bad, sum(good) OVER recent AS good,
        sum(bad) OVER long AS long_bad, min(minute) OVER long AS first_at, bool_and(reported) OVER long AS all_reported
    FROM addresses
    WINDOW recent AS (PARTITION BY ip ORDER BY minute RANGE BETWEEN to_seconds($seconds) PRECEDING AND CURRENT ROW),
        long AS (PARTITION BY ip ORDER BY minute RANGE BETWEEN to_seconds($long_seconds) PRECEDING AND CURRENT ROW)
), by_caller AS (
    SELECT caller, minute, sum(requests) OVER recent AS bad, min(minute) OVER recent AS first_at
    FROM (SELECT caller, minute, sum(requests)::BIGINT AS requests FROM bad WHERE caller <> '' GROUP BY ALL)
    WINDOW recent AS (PARTITION BY caller ORDER BY minute RANGE BETWEEN to_seconds($seconds) PRECEDING AND CURRENT ROW)
)
SELECT minute AS occurred_at, 'address ' || ip AS entity, ip, NULL AS caller, first_at, all_reported AS reported,
    long_bad::BIGINT AS requests, good::BIGINT AS good_requests
FROM by_address
WHERE minute >= $from AND minute < $until AND bad_now > 0
    AND (bad >= $requests AND bad > good OR long_bad >= $long_requests AND good = 0)
UNION ALL
SELECT c.minute, 'caller ' || c.caller, NULL, c.caller, c.first_at, false, c.bad::BIGINT, 0
FROM by_caller c
LEFT JOIN usual_callers o USING (caller)
WHERE c.minute >= $from AND c.minute < $until
    AND c.bad >= greatest($caller_requests, $factor * coalesce(o.ten_minutes_requests_max, 0))
    AND EXISTS (FROM usual)
