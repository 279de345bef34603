-- version: 1
-- finds: one account whose password is tried from many networks: somebody guesses it through rented addresses, so that
--   none of them is delayed for long. `sign_ins` says how often somebody signed in to it meanwhile. Failures are counted
--   by the minute.
-- spares: a person who has forgotten the password, and tries at the desk, on the phone and at home.
-- entity: account
-- quiet_seconds: 86400
-- parameter: networks = 6 (networks; /24 or /48, at least)
-- parameter: long_seconds = 10800 (seconds; within which these are counted)
WITH counted AS (
    SELECT minute, caller, count(DISTINCT network) OVER recent AS networks, count(DISTINCT ip) OVER recent AS addresses,
        sum(requests) OVER recent::BIGINT AS requests, min(minute) OVER recent AS first_at
    FROM window_refused
    WHERE outcome = 'invalid_password' AND caller <> '' AND network <> ''
        AND caller IN (SELECT caller FROM window_refused WHERE minute >= $from AND minute < $until)
    WINDOW recent AS (
        PARTITION BY caller ORDER BY minute RANGE BETWEEN to_seconds($long_seconds) PRECEDING AND CURRENT ROW
    )
), found AS (
    SELECT DISTINCT * FROM counted WHERE minute >= $from AND minute < $until AND networks >= $networks
)
SELECT f.minute AS occurred_at, 'account ' || f.caller AS entity, f.caller AS subject, f.first_at, false AS reported,
    f.networks, f.addresses, f.requests,
    (
        SELECT count(*) FROM recent_events e
        WHERE e.type = 'session.started/1' AND e.subject = f.caller
            AND e.occurred_at BETWEEN f.first_at AND f.minute + INTERVAL 1 MINUTE
    ) AS sign_ins
FROM found f
