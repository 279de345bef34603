-- version: 1
-- finds: one address (of IPv6, one /48) that tries passwords of many accounts, or of many names that nobody has, or many
--   accounts that are tried from all addresses together: somebody tries common passwords, or a list of leaked ones.
--   `signed_in` says into how many of the accounts somebody signed in since. Failures are counted by the minute.
-- spares: an office in which many mistype on one morning (of accounts into which somebody then signs in, at most half as
--   many count as of the others), a person who has forgotten name or password, and failures that are few beside the
--   people who sign in.
-- entity: address
-- quiet_seconds: 21600
-- parameter: accounts = 8 (accounts; tried from one address, at least)
-- parameter: names = 30 (requests; from one address with names that nobody has, at least, or a part of each)
-- parameter: all_accounts = 20 (accounts; tried from anywhere, at least)
-- parameter: share = 0.1 (times; as many as people signed in)
-- parameter: long_seconds = 10800 (seconds; within which all these are counted)
WITH signed_in AS (
    SELECT subject, occurred_at FROM recent_events WHERE type = 'session.started/1'
), failed AS ( -- by minute and caller, of each source and of all together
    SELECT minute, caller, CASE WHEN GROUPING(source) = 0 THEN source ELSE 'everywhere' END AS source,
        sum(requests)::BIGINT AS requests
    FROM (
        SELECT minute, caller, requests, CASE WHEN contains(network, ':') THEN network ELSE coalesce(ip, '') END AS source
        FROM window_refused WHERE outcome = 'invalid_password'
    )
    GROUP BY GROUPING SETS ((minute, caller, source), (minute, caller))
), moments AS (
    SELECT DISTINCT minute, source FROM failed WHERE minute >= $from AND minute < $until AND source <> ''
), tried AS (
    SELECT f.*, s.occurred_at AS signed_in_at
    FROM (FROM failed WHERE source IN (SELECT source FROM moments)) f
    ASOF LEFT JOIN signed_in s ON s.subject = f.caller AND s.occurred_at >= f.minute
), by_caller AS (
    SELECT m.minute, m.source, t.caller, sum(t.requests) AS requests, min(t.minute) AS first_at,
        coalesce(bool_and(t.signed_in_at < m.minute + INTERVAL 1 MINUTE), false) AS is_signed_in
    FROM moments m
    JOIN tried t ON t.source = m.source AND t.minute BETWEEN m.minute - to_seconds($long_seconds) AND m.minute
    GROUP BY ALL
), counted AS (
    SELECT minute, source, min(first_at) AS first_at, sum(requests)::BIGINT AS requests,
        coalesce(sum(requests) FILTER (caller = ''), 0)::BIGINT AS names,
        count(*) FILTER (caller <> '' AND is_signed_in) AS signed_in,
        count(*) FILTER (caller <> '' AND NOT is_signed_in) AS others,
        others + least(signed_in, others // 2) AS accounts
    FROM by_caller GROUP BY ALL
), found AS MATERIALIZED (
    SELECT * EXCLUDE others FROM counted
    WHERE CASE WHEN source = 'everywhere' THEN accounts >= $all_accounts
        ELSE accounts / $accounts + names / $names >= 1 END
)
SELECT minute AS occurred_at, CASE WHEN source = 'everywhere' THEN source ELSE 'address ' || source END AS entity,
    CASE WHEN source <> 'everywhere' AND NOT contains(source, '/') THEN source END AS ip,
    CASE WHEN contains(source, '/') THEN source END AS network, first_at, false AS reported,
    accounts, names, requests, signed_in
FROM found
WHERE source <> 'everywhere' OR accounts >= $share * (
    SELECT count(DISTINCT s.subject) FROM signed_in s
    WHERE s.occurred_at BETWEEN minute - to_seconds($long_seconds) AND minute + INTERVAL 1 MINUTE
)
