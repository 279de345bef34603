-- version: 1
-- finds: one address that tries passwords of many accounts, or of many names that nobody has, or many accounts that are
--   tried from all addresses together: somebody tries common passwords, or a list of leaked ones. `signed_in` says into
--   how many of the accounts somebody signed in since. Failures are counted by the minute.
-- spares: an office in which many mistype on one morning (whoever then signs in does not count), a person who has
--   forgotten name or password, and failures that are few beside those who sign in.
-- entity: address
-- quiet_seconds: 21600
-- parameter: accounts = 8 (accounts; tried from one address, into which nobody has signed in since, at least)
-- parameter: names = 30 (requests; from one address with names that nobody has, at least, or a part of each)
-- parameter: all_accounts = 20 (accounts; tried from anywhere, into which nobody has signed in since, at least)
-- parameter: share = 0.1 (times; as many as there were sign-ins)
-- parameter: long_seconds = 10800 (seconds; within which all these are counted)
WITH signed_in AS (
    SELECT subject, occurred_at FROM recent_events WHERE type = 'session.started/1'
), failed AS (
    SELECT f.*, s.occurred_at AS signed_in_at
    FROM (FROM window_refused WHERE outcome = 'invalid_password') f
    ASOF LEFT JOIN signed_in s ON s.subject = f.caller AND s.occurred_at >= f.minute
), moments AS (
    SELECT DISTINCT minute, unnest([ip, NULL]) AS ip FROM failed WHERE minute >= $from AND minute < $until
), counted AS (
    SELECT m.minute, m.ip, f.caller, sum(f.requests) AS requests, min(f.minute) AS first_at,
        coalesce(bool_and(f.signed_in_at < m.minute + INTERVAL 1 MINUTE), false) AS is_signed_in
    FROM moments m
    JOIN failed f ON f.ip = coalesce(m.ip, f.ip)
        AND f.minute BETWEEN m.minute - to_seconds($long_seconds) AND m.minute
    GROUP BY ALL
), totals AS (
    SELECT minute, ip, min(first_at) AS first_at, sum(requests)::BIGINT AS requests,
        count(*) FILTER (caller <> '' AND NOT is_signed_in) AS accounts,
        coalesce(sum(requests) FILTER (caller = ''), 0)::BIGINT AS names,
        count(*) FILTER (caller <> '' AND is_signed_in) AS signed_in
    FROM counted GROUP BY ALL
), sign_ins AS (
    SELECT m.minute, count(*) AS sign_ins
    FROM (SELECT DISTINCT minute FROM moments) m
    JOIN signed_in s ON s.occurred_at BETWEEN m.minute - to_seconds($long_seconds) AND m.minute + INTERVAL 1 MINUTE
    GROUP BY ALL
)
SELECT minute AS occurred_at, coalesce('address ' || ip, 'everywhere') AS entity, ip, first_at, false AS reported,
    accounts, names, requests, signed_in
FROM totals LEFT JOIN sign_ins USING (minute)
WHERE CASE WHEN ip IS NULL THEN accounts >= greatest($all_accounts, $share * coalesce(sign_ins, 0))
    ELSE accounts / $accounts + names / $names >= 1 END
