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
), looked_at AS (
    FROM failed WHERE source IN (SELECT source FROM failed WHERE minute >= $from AND minute < $until)
), tried AS ( -- from each failure of an account to its next, or until it is too long ago
    SELECT f.source, f.minute AS since, s.occurred_at - INTERVAL 1 MINUTE + INTERVAL 1 MICROSECOND AS signed_in_since,
        least(
            lead(f.minute) OVER (PARTITION BY f.source, f.caller ORDER BY f.minute),
            f.minute + to_seconds($long_seconds) + INTERVAL 1 MICROSECOND
        ) AS until
    FROM (FROM looked_at WHERE caller <> '') f
    ASOF LEFT JOIN signed_in s ON s.subject = f.caller AND s.occurred_at >= f.minute
), changes AS (
    SELECT source, minute AS moment, requests, CASE WHEN caller = '' THEN requests ELSE 0 END AS names, 0 AS tried,
        0 AS signed_in
    FROM looked_at
    UNION ALL
    SELECT source, unnest([since, until]), 0, 0, unnest([1, -1]), 0 FROM tried
    UNION ALL
    SELECT source, unnest([greatest(since, signed_in_since), until]), 0, 0, 0, unnest([1, -1])
    FROM tried WHERE signed_in_since < until
), counted AS (
    SELECT source, moment, requests > 0 AS is_failure, min(moment) FILTER (requests > 0) OVER recent AS first_at,
        sum(requests) OVER recent AS requests, sum(names) OVER recent AS names,
        sum(tried) OVER ever AS tried, sum(signed_in) OVER ever AS signed_in
    FROM changes
    WINDOW ever AS (PARTITION BY source ORDER BY moment RANGE BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW),
        recent AS (
            PARTITION BY source ORDER BY moment RANGE BETWEEN to_seconds($long_seconds) PRECEDING AND CURRENT ROW
        )
), found AS MATERIALIZED (
    SELECT DISTINCT * EXCLUDE tried, tried - signed_in + least(signed_in, (tried - signed_in) // 2) AS accounts
    FROM counted
    WHERE is_failure AND moment >= $from AND moment < $until AND CASE source
        WHEN 'everywhere' THEN accounts >= $all_accounts
        WHEN '' THEN false
        ELSE accounts / $accounts + names / $names >= 1 END
)
SELECT moment AS occurred_at, CASE WHEN source = 'everywhere' THEN source ELSE 'address ' || source END AS entity,
    CASE WHEN source <> 'everywhere' AND NOT contains(source, '/') THEN source END AS ip,
    CASE WHEN contains(source, '/') THEN source END AS network, first_at, false AS reported,
    accounts, names, requests, signed_in
FROM found
WHERE source <> 'everywhere' OR accounts >= $share * (
    SELECT count(DISTINCT s.subject) FROM signed_in s
    WHERE s.occurred_at BETWEEN moment - to_seconds($long_seconds) AND moment + INTERVAL 1 MINUTE
)
