"""The tables of the detector and the relations that rules read. What they mean stands in the package's docstring."""

from __future__ import annotations

BASELINE_DAYS = 28
AUTHORIZED = "authorization.granted/1"
CHALLENGE_DAYS = 7  # for so long a PKCE challenge is remembered, as a number of 16 bytes

# Uses that are few enough to be kept for longer than the others.
RARE = "(outcome = 'insufficient_scope' OR token_no IN (SELECT token_no FROM tokens WHERE kind = 'pat'))"

LIVE = "outcome IN ('valid', 'insufficient_scope', 'wrong_audience')"

TABLES = (
    "CREATE TABLE origins (origin_no UINTEGER, ip VARCHAR, user_agent VARCHAR, network VARCHAR, agent VARCHAR)",
    """CREATE TABLE tokens (token_no UINTEGER, token_id VARCHAR, grant_id VARCHAR, kind VARCHAR, client_id VARCHAR,
        subject VARCHAR, scope VARCHAR, issued_at TIMESTAMP, expires_at TIMESTAMP)""",
    # What arrives, and what of it the rules may still look at one by one.
    """CREATE TABLE arriving_uses (occurred_at TIMESTAMP, block_seq BIGINT, use_index USMALLINT, token_no UINTEGER,
        origin_no UINTEGER, outcome VARCHAR, scope VARCHAR, reported BOOLEAN)""",
    """CREATE TABLE recent_uses (occurred_at TIMESTAMP, block_seq BIGINT, use_index USMALLINT, token_no UINTEGER,
        origin_no UINTEGER, outcome VARCHAR, scope VARCHAR, reported BOOLEAN)""",
    """CREATE TABLE arriving_refused (minute TIMESTAMP, block_seq BIGINT, refused_index UINTEGER, caller VARCHAR,
        ip VARCHAR, network VARCHAR, outcome VARCHAR, endpoint VARCHAR, requests BIGINT, reported BOOLEAN)""",
    """CREATE TABLE recent_refused (minute TIMESTAMP, block_seq BIGINT, refused_index UINTEGER, caller VARCHAR,
        ip VARCHAR, network VARCHAR, outcome VARCHAR, endpoint VARCHAR, requests BIGINT, reported BOOLEAN)""",
    """CREATE TABLE arriving_events (ledger_seq BIGINT, occurred_at TIMESTAMP, type VARCHAR, grant_id VARCHAR,
        token_id VARCHAR, client_id VARCHAR, subject VARCHAR, body JSON)""",
    """CREATE TABLE recent_events (ledger_seq BIGINT, occurred_at TIMESTAMP, type VARCHAR, grant_id VARCHAR,
        token_id VARCHAR, client_id VARCHAR, subject VARCHAR)""",
    # One row for each authorization.
    "CREATE TABLE challenges (challenge UHUGEINT, ledger_seq BIGINT, occurred_at TIMESTAMP, person UHUGEINT)",
    # Folds. Rows are partial: several may be of one key, and all that rules do with them is min, max and sum.
    """CREATE TABLE seen (token_no UINTEGER, network VARCHAR, agent VARCHAR, live BOOLEAN, first_at TIMESTAMP,
        last_at TIMESTAMP, uses BIGINT)""",
    "CREATE TABLE tally (token_no UINTEGER, slot TIMESTAMP, network VARCHAR, uses BIGINT)",
    "CREATE TABLE tally_refused (caller VARCHAR, slot TIMESTAMP, requests BIGINT)",
    # Closed days, one row each, and what is usual by them.
    """CREATE TABLE daily (token_no UINTEGER, day TIMESTAMP, uses BIGINT, ten_minutes_uses_max BIGINT,
        hour_networks_max BIGINT)""",
    "CREATE TABLE daily_refused (caller VARCHAR, day TIMESTAMP, ten_minutes_requests_max BIGINT)",
    """CREATE TABLE usual (token_no UINTEGER, days BIGINT, uses BIGINT, ten_minutes_uses_max BIGINT,
        hour_networks_max BIGINT)""",
    """CREATE TABLE usual_subjects (subject VARCHAR, days BIGINT, uses BIGINT, ten_minutes_uses_max BIGINT,
        hour_networks_max BIGINT, first_at TIMESTAMP)""",
    "CREATE TABLE usual_callers (caller VARCHAR, days BIGINT, ten_minutes_requests_max BIGINT)",
)

# One step: from `fresh_uses` and its kin (what arrived of one day) to what the rules read.
STEP = (
    """CREATE OR REPLACE TEMP TABLE window_tokens AS
    WITH touched AS (SELECT DISTINCT token_no FROM fresh_uses)
    SELECT * FROM tokens
    WHERE token_no IN (FROM touched)
        OR subject IN (SELECT subject FROM tokens WHERE token_no IN (FROM touched))""",
    """CREATE OR REPLACE TEMP TABLE history AS
    SELECT token_no, network, agent, live, min(first_at) AS first_at, max(last_at) AS last_at, sum(uses)::BIGINT AS uses
    FROM seen SEMI JOIN window_tokens USING (token_no) GROUP BY ALL""",
    f"""CREATE OR REPLACE TEMP TABLE window_uses AS
    SELECT r.occurred_at, r.block_seq, r.use_index, r.token_no, o.ip, coalesce(o.network, '') AS network, o.user_agent,
        coalesce(o.agent, '') AS agent, r.outcome, r.scope, r.reported, r.{LIVE} AS live
    FROM recent_uses r LEFT JOIN origins o USING (origin_no)
    WHERE r.token_no IN (SELECT token_no FROM fresh_uses)""",
    """CREATE OR REPLACE TEMP TABLE window_refused AS
    SELECT * FROM recent_refused
    WHERE ip IN (SELECT ip FROM fresh_refused) OR caller IN (SELECT caller FROM fresh_refused)
        OR outcome = 'invalid_password' AND outcome IN (SELECT outcome FROM fresh_refused)""",
    f"""CREATE OR REPLACE TEMP TABLE window_allowed AS
    SELECT date_trunc('minute', r.occurred_at) AS minute, o.ip, count(*) AS uses
    FROM recent_uses r JOIN origins o USING (origin_no)
    WHERE r.{LIVE} AND o.ip IN (SELECT ip FROM fresh_refused) GROUP BY ALL""",
    "CREATE OR REPLACE TEMP TABLE window_events AS FROM fresh_events",
    """CREATE OR REPLACE TEMP TABLE window_challenges AS
    FROM challenges
    WHERE challenge IN (SELECT challenge FROM challenges WHERE ledger_seq IN (SELECT ledger_seq FROM fresh_events))""",
)

# Before a step: what rules may look back at beside uses.
REMEMBER = (
    f"INSERT INTO recent_events SELECT * EXCLUDE body FROM fresh_events WHERE type <> '{AUTHORIZED}'",
    f"""INSERT INTO challenges
    SELECT md5_number(concat(client_id, ' ', body ->> 'code_challenge')), ledger_seq, occurred_at, md5_number(subject)
    FROM fresh_events WHERE type = '{AUTHORIZED}'""",
)

VIEWS = tuple(
    f"""CREATE OR REPLACE TEMP VIEW {of}_{what}s AS
    SELECT {key}, {what}, min(first_at) AS first_at
    FROM (
        SELECT token_no, {what}, first_at FROM history WHERE live AND network <> ''
        UNION ALL
        SELECT token_no, {what}, min(occurred_at) FROM window_uses WHERE live AND network <> '' GROUP BY ALL
    ) {join} GROUP BY ALL"""
    for of, key, join in (
        ("token", "token_no", ""),
        ("subject", "subject", "JOIN window_tokens USING (token_no)"),
    )
    for what in ("network", "agent")
)

FOLD = (
    f"""INSERT INTO seen
    SELECT f.token_no, coalesce(o.network, ''), coalesce(o.agent, ''), f.{LIVE}, min(f.occurred_at), max(f.occurred_at),
        count(*)
    FROM fresh_uses f LEFT JOIN origins o USING (origin_no) GROUP BY ALL""",
    """INSERT INTO tally
    SELECT f.token_no, time_bucket(INTERVAL 10 MINUTE, f.occurred_at), coalesce(o.network, ''), count(*)
    FROM fresh_uses f LEFT JOIN origins o USING (origin_no) GROUP BY ALL""",
    """INSERT INTO tally_refused
    SELECT caller, time_bucket(INTERVAL 10 MINUTE, minute), sum(requests) FROM fresh_refused
    WHERE outcome IN ('unknown', 'malformed') AND caller <> '' GROUP BY ALL""",
)

COMPACT = (
    """CREATE OR REPLACE TABLE seen AS
    SELECT token_no, network, agent, live, min(first_at) AS first_at, max(last_at) AS last_at, sum(uses)::BIGINT AS uses
    FROM seen GROUP BY ALL""",
    """CREATE OR REPLACE TABLE tally AS
    SELECT token_no, slot, network, sum(uses)::BIGINT AS uses FROM tally GROUP BY ALL""",
    """CREATE OR REPLACE TABLE tally_refused AS
    SELECT caller, slot, sum(requests)::BIGINT AS requests FROM tally_refused GROUP BY ALL""",
)

# `$day` begins: what was counted of the days before it becomes what is usual.
CLOSE_DAYS = (
    """INSERT INTO daily
    WITH slots AS (
        SELECT token_no, slot, sum(uses) AS uses FROM tally WHERE slot < $day GROUP BY ALL
    ), hours AS (
        SELECT token_no, date_trunc('hour', slot) AS hour, count(DISTINCT nullif(network, '')) AS networks
        FROM tally WHERE slot < $day GROUP BY ALL
    )
    SELECT token_no, day, s.uses, s.ten_minutes, h.networks
    FROM (
        SELECT token_no, date_trunc('day', slot) AS day, sum(uses) AS uses, max(uses) AS ten_minutes
        FROM slots GROUP BY ALL
    ) s
    JOIN (
        SELECT token_no, date_trunc('day', hour) AS day, max(networks) AS networks FROM hours GROUP BY ALL
    ) h USING (token_no, day)""",
    """INSERT INTO daily_refused
    SELECT caller, date_trunc('day', slot), max(requests)
    FROM (SELECT caller, slot, sum(requests) AS requests FROM tally_refused WHERE slot < $day GROUP BY ALL)
    GROUP BY ALL""",
    "DELETE FROM tally WHERE slot < $day",
    "DELETE FROM tally_refused WHERE slot < $day",
    f"DELETE FROM daily WHERE day < $day - INTERVAL {BASELINE_DAYS} DAY",
    f"DELETE FROM daily_refused WHERE day < $day - INTERVAL {BASELINE_DAYS} DAY",
    """CREATE OR REPLACE TABLE usual AS
    SELECT token_no, count(DISTINCT day) AS days, sum(uses)::BIGINT AS uses,
        max(ten_minutes_uses_max) AS ten_minutes_uses_max, max(hour_networks_max) AS hour_networks_max
    FROM daily WHERE day < $day GROUP BY ALL""",
    """CREATE OR REPLACE TABLE usual_callers AS
    SELECT caller, count(DISTINCT day) AS days, max(ten_minutes_requests_max) AS ten_minutes_requests_max
    FROM daily_refused WHERE day < $day GROUP BY ALL""",
    """CREATE OR REPLACE TABLE usual_subjects AS
    SELECT t.subject, count(DISTINCT d.day) AS days, sum(d.uses)::BIGINT AS uses,
        max(d.ten_minutes_uses_max) AS ten_minutes_uses_max, max(d.hour_networks_max) AS hour_networks_max,
        min(s.first_at) AS first_at
    FROM daily d
    JOIN tokens t USING (token_no)
    JOIN (SELECT token_no, min(first_at) AS first_at FROM seen GROUP BY ALL) s USING (token_no)
    WHERE d.day < $day AND t.subject IS NOT NULL GROUP BY ALL""",
)

# At most so many different kinds of use, the first of each, and the one that crossed the threshold.
EVIDENCE_MAX = 20
USE_EVIDENCE = """
SELECT block_seq, use_index FROM (
    SELECT block_seq, use_index, occurred_at FROM window_uses
    WHERE token_no = $token_no AND occurred_at BETWEEN $first_at AND $occurred_at
        AND coalesce(network = $network, true) AND coalesce(outcome = $outcome, true)
    QUALIFY row_number() OVER (
        PARTITION BY network, agent, outcome, scope ORDER BY occurred_at, block_seq, use_index
    ) = 1
    ORDER BY occurred_at, block_seq, use_index LIMIT $most
)
"""
REFUSED_EVIDENCE = """
SELECT block_seq, refused_index FROM window_refused
WHERE minute BETWEEN $first_at AND $occurred_at
    AND coalesce(ip = $ip, true) AND coalesce(network = $network, true) AND coalesce(caller = $caller, true)
    AND outcome = ANY ($outcomes)
ORDER BY requests DESC, block_seq, refused_index LIMIT $most
"""
