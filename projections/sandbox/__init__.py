"""Auditors' SQL: what it may read (`views`), the process that it runs in (`child`), and how that is started (`process`).

| View | One row is | Columns |
|---|---|---|
| `uses_v1` | a use of a token | `occurred_at`, `recorded_at`, `block_seq` (its place in USAGE), `use_index` (in the block), `token_id` (NULL if unknown), `token_sha256` (hex, of an unknown token), `outcome`, `endpoint`, `caller`, `scope`, `audience` (asked for, NULL if nothing), `ip`, `network` (its /24 or /48), `user_agent`, `agent` (without its version), `method`, `path`, `reported` (true: where it came from was told by the caller itself), `kind`, `client_id`, `subject` (of the token) |
| `events_v1` | an event of LEDGER | `ledger_seq`, `recorded_at`, `occurred_at`, `type`, `done_by`, `request_id`, `subject`, `client_id`, `user_id`, `grant_id`, `token_ids`, `body` (JSON, without password hashes and what is sealed) |
| `tokens_v1` | a token ever issued | `token_id`, `grant_id`, `ledger_seq` (its issue), `grant_seq` (first event of the grant), `kind`, `client_id`, `subject`, `scope`, `audience`, `issued_at`, `expires_at`, `spent_at`, `ended_at`, `reason`, `ended_seq`, `sha256` (hex), `kid`, `rotated_from` |
| `findings_v1` | a finding of an abuse rule | `ledger_seq`, `recorded_at`, `detected_at`, `finding_id`, `rule`, `rule_version`, `mode`, `status` (`open`, or what was said of it last), `token_id`, `grant_id`, `client_id`, `subject`, `caller`, `self_reported`, `evidence` (JSON), `body` (JSON, as recorded) |
| `usage_minutes_v1` | uses of a minute | `minute`, `client_id`, `kind`, `outcome`, `endpoint`, `uses` |
| `usage_hours_v1` | uses of an hour | `hour`, `token_id`, `ip`, `network`, `user_agent`, `agent`, `outcome`, `endpoint`, `scope`, `uses`, `first_at`, `last_at` |
| `usage_days_v1` | uses of a day | `day`, and the other columns of `usage_hours_v1` |
| `refused_v1` | a count of requests that named no known token | `minute`, `recorded_at`, `block_seq`, `refused_index`, `caller`, `ip`, `network`, `outcome`, `endpoint`, `requests` |
| `gaps_v1` | uses that a writer knows it has lost | `block_seq`, `recorded_at`, `writer`, `lost` |
"""  # noqa: E501 - the table is the README's
