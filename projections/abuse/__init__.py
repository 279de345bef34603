"""Abuse of tokens: rules in SQL, what they found, and what that would have been with other rules.

`rules.py` reads `rules/*.sql`; `detector.py` runs them over uses in a database of its own in memory, and knows neither
the log nor the store; `engine.py` feeds it behind ingestion and appends what it finds; `backtest.py` feeds it history.

A rule returns *triggers*: every use (or refused count, or event) within [`$from`, `$until)` of `occurred_at` at which its
condition holds, so that running it every second gives the same triggers as running it over a day at once. Triggers of one
rule and entity that follow each other within the rule's `quiet_seconds` are one incident and one finding.

A rule reads these relations and no other:

| Relation | Columns |
|---|---|
| `window_uses` | uses of the tokens that are looked at, from the rules' longest window before `$from` on: `occurred_at, block_seq, use_index, token_no, ip, network, user_agent, agent, outcome, endpoint, scope, reported, live`. `network` and `agent` are empty where they are not the bearer's (introspection). `live`: the token was good, whatever it was asked for. `scope`: of refusals for want of scope |
| `window_tokens` | these tokens and all others of their subjects: `token_no, token_id, grant_id, kind, client_id, subject, scope, issued_at, expires_at` |
| `history` | what these were used from, before what is new: `token_no, network, agent, live, first_at, last_at, uses` |
| `token_networks`, `token_agents`, `subject_networks`, `subject_agents` | when a token or a subject was first used from a network or by an agent, while good: `token_no` or `subject`, `network` or `agent`, `first_at`. What is in the window counts too, so compare times |
| `usual`, `usual_subjects` | of the days (UTC) before the one of `$from`, at most 28: `token_no` or `subject`, `days` (with uses), `uses`, `ten_minutes_uses_max` (of one token), `hour_networks_max`; of subjects also `first_at` |
| `usual_callers` | the same for who asks about tokens that nobody knows: `caller, days, ten_minutes_requests_max` |
| `window_refused` | counts of requests that named no known token, of the addresses and callers that are looked at; of wrong passwords all: `minute, block_seq, refused_index, caller, ip, network, outcome, endpoint, requests, reported` |
| `window_allowed` | uses of good tokens from the same addresses: `minute, ip, uses` |
| `window_events` | events of LEDGER that are new, of the types that rules name: `ledger_seq, occurred_at, type, grant_id, token_id, client_id, subject, body` |
| `recent_events` | these and those of the three hours before, without bodies, but no authorizations |
| `window_challenges` | authorizations of at most seven days with a challenge that a new one has too: `challenge` (a number, of the client's own), `ledger_seq, occurred_at, person` (a number) |

It must return `occurred_at`, `entity` (what makes it another incident), `first_at` (of what led to it), `reported`, and of
these what applies: `token_no, block_seq, use_index`; `ip`; `caller`; `subject`; `ledger_seq`, and `first_seq` of the event that it began
with; `client_id` where the finding is to name the client and nobody else; and `network`, `outcome` to say which uses
or counts are evidence. Every other column is a number that is told with the finding.
"""  # noqa: E501 - tables
