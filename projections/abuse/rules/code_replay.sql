-- version: 1
-- finds: an authorization code that is presented again after it was spent, with its verifier (RFC 6749 §4.1.2; the
--   service has revoked what it gave by then), one that is presented again and again with a wrong verifier or redirect
--   URI, or the codes of several people, each with a wrong verifier, at one client: codes have leaked, and somebody
--   tries them (RFC 9700 §4.2, §4.5).
-- spares: a double click and a client that asks again at once (`raced`), a reload of the callback, the second of two
--   tabs (few beside all that is redeemed), and a release that loses verifiers, after which people try again.
-- entity: code
-- mode: notify
-- quiet_seconds: 86400
-- parameter: refusals = 3 (presentations; of one code with a wrong proof, at least)
-- parameter: people = 4 (people; whose one code was refused by the same client, at least)
-- parameter: share = 0.05 (times; as many as the codes that this client redeemed meanwhile)
-- parameter: long_seconds = 10800 (seconds; within which these people are counted)
WITH presented AS (
    SELECT e.*, e.type = 'code.replayed/1' AND NOT (w.body ->> 'raced')::BOOLEAN AS replayed,
        count(*) FILTER (e.type = 'code.refused/1') OVER of_code AS refusals,
        first_value(e.ledger_seq) OVER of_code AS first_seq, min(e.occurred_at) OVER of_code AS first_at
    FROM recent_events e LEFT JOIN window_events w USING (ledger_seq)
    WHERE e.type IN ('code.refused/1', 'code.replayed/1')
    WINDOW of_code AS (PARTITION BY e.grant_id ORDER BY e.occurred_at, e.ledger_seq)
), by_person AS (
    SELECT e.ledger_seq, e.occurred_at, e.client_id, r.subject, count(DISTINCT r.grant_id) AS codes,
        min(r.ledger_seq) AS first_seq, min(r.occurred_at) AS first_at
    FROM window_events e
    JOIN recent_events r ON r.client_id = e.client_id AND r.type = 'code.refused/1'
        AND r.occurred_at BETWEEN e.occurred_at - to_seconds($long_seconds) AND e.occurred_at
    WHERE e.type = 'code.refused/1' GROUP BY ALL
)
SELECT occurred_at, token_id AS entity, ledger_seq, first_seq, first_at, false AS reported, refusals, 1 AS people,
    NULL AS client_id
FROM presented
WHERE occurred_at >= $from AND occurred_at < $until
    AND (replayed OR type = 'code.refused/1' AND refusals >= $refusals)
UNION ALL
SELECT occurred_at, 'client ' || client_id, ledger_seq, min(first_seq), min(first_at), false, sum(codes)::BIGINT,
    count(*) FILTER (codes = 1), client_id
FROM by_person
WHERE occurred_at >= $from AND occurred_at < $until
GROUP BY ledger_seq, occurred_at, client_id
HAVING count(*) FILTER (codes = 1) >= greatest($people, $share * (
    SELECT count(*) FROM recent_events r
    WHERE r.type = 'code.redeemed/1' AND r.client_id = by_person.client_id
        AND r.occurred_at BETWEEN by_person.occurred_at - to_seconds($long_seconds) AND by_person.occurred_at
))
