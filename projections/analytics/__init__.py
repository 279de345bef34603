"""The analytics store: every event and every use in DuckDB, for auditors.

One process owns the file. It follows LEDGER and USAGE, and commits rows together with the position that they reach:
each event and each use is there exactly once, whatever was killed when. Everything in it can be thrown away and
rebuilt from the log, but for uses that the stream USAGE has dropped since: those are not there any more after a
rebuild. Uses also leave the store by age, as they leave USAGE.

Times are UTC. Token and grant ids are stored as UUIDs, their 32 hex digits without the prefix `tok_` or `grt_`;
users (`usr_…`), clients (`cli_…`) and whoever did or asked something (`done_by`, `caller`) as they are. No table has
password hashes or anything sealed.

| Table | One row is | Columns |
|---|---|---|
| `events` | an event of LEDGER | `ledger_seq`, `recorded_at` (by JetStream), `occurred_at` (by the host that wrote it), `type`, `done_by` (the caller's token id, a client id or `system`), `request_id`, `subject` (the user or client that it is about; of the grant for events of grants and tokens), `client_id`, `user_id`, `grant_id`, `token_ids` (all that it names), `body` (JSON, as recorded, without password hashes and what is sealed) |
| `tokens` (view) | a token ever issued | `token_id`, `grant_id`, `ledger_seq` (its issue), `grant_seq` (first event of the grant), `kind`, `client_id`, `subject`, `scope`, `audience`, `issued_at`, `expires_at` (earlier than issued if it was rotated), `spent_at` (refresh token exchanged), `ended_at`, `reason`, `ended_seq` (first revocation that applies to it), `sha256`, `kid`, `rotated_from` |
| `issued_tokens` | a token ever issued, as issued | as `tokens`, without what ended it |
| `grants` | a grant, by its first event | `grant_id`, `ledger_seq`, `subject`, `client_id`, `scope`, `issued_at` |
| `ends` | something that ends tokens | `ledger_seq`, `what` (`revoked`, `spent`, `superseded`; `renewed`: it ends later than it was to), one of `token_id`, `grant_id`, `client_id`, `subject`, `kid`; `cuts_before_seq` (of a client or subject: grants that began before), `ended_at`, `reason` |
| `uses` (view) | a use of a token: `recent_uses` and the sealed segments | `occurred_at`, `recorded_at`, `block_seq` (sequence in USAGE), `use_index` (in the block), `token_no` (join `used_tokens`; NULL if unknown), `origin_no` (join `origins`), `token_sha256` (of an unknown token), `outcome`, `endpoint`, `caller`, `scope`, `audience` (asked for, NULL if nothing), `method`, `path`, `reported` (whether the caller itself told where it came from) |
| `recent_uses` | a use that is not sealed yet | as `uses` |
| `segments` | a file of sealed uses | `segment_no` (its first `block_seq`), `last_seq`, `file`, `uses`, `first_recorded_at`, `last_recorded_at`, `file_bytes`, `sha256`, `sealed_at` |
| `used_tokens` | a token that was used | `token_no`, `token_id`; numbers are this file's own and differ after a rebuild |
| `origins` | where uses came from | `origin_no` (this file's own too), `ip`, `user_agent`, `network` (/24 of IPv4, /48 of IPv6), `agent` (the product without its version, as `curl`, `Firefox`), `address_no` (the same for the same `ip`) |
| `usage_days`, `usage_hours` | sealed uses of a day or hour (UTC) that are the same in all of this | `segment_no`, `day` or `hour`, `token_no`, `origin_no`, `outcome`, `endpoint`, `scope`; `uses`, `first_at`, `last_at` |
| `usage_minutes` | sealed uses of a minute | `segment_no`, `minute`, `client_id`, `kind`, `outcome`, `endpoint`, `uses`; `token_no` instead of client and kind if its issue was not known yet |
| `caller_days` | sealed validations that somebody asked for on a day; calls of the management API are uses of the caller's own token and not among them | `segment_no`, `day`, `caller` (token or client), `validations`, `first_at`, `last_at` |
| `all_usage_days`, `all_usage_hours`, `all_usage_minutes` (views) | uses of a day, hour or minute, sealed or not; add up what several rows say of the same | as above without `segment_no`, and `all_usage_minutes` without `token_no` |
| `all_caller_days` (view) | validations that somebody asked for on a day, of known tokens or not | as above without `segment_no` |
| `refused` | a count of requests that named no known token | `minute`, `recorded_at`, `block_seq`, `refused_index`, `caller`, `ip`, `network`, `origin_no` (without an agent), `outcome`, `endpoint`, `requests` |
| `gaps` | uses that a writer knows it has lost | `block_seq`, `recorded_at` (of the block that said so), `writer`, `lost` |
| `findings` (view) | a finding of abuse, by its events | `finding_id`, `ledger_seq`, `recorded_at`, `rule`, `rule_version`, `mode`, `detected_at`, `first_at`, `last_at`, `self_reported`, `token_id`, `grant_id`, `client_id`, `subject`, `caller`, `counts`, `parameters`, `evidence` (JSON), `status` (`open`, `acknowledged`, `dismissed`), `status_at`, `status_by`, `status_seq` |
| `positions` | a stream | `stream`, `seq` (all up to it is in the tables), `recorded_at` (of that message), `created` (the stream), `version` (of the tables) |

The newest uses, at most some million or those of a day, are in `recent_uses`. Then they are sealed, while others are
written: they become a segment, a Parquet file that never changes, and are added up in the roll-ups. A segment has all
uses of its range of USAGE, in their order; it, its rows in the roll-ups and the end of its rows in
`recent_uses` are one transaction. While so many uses are left in USAGE that they make a segment, they become one without
having been in `recent_uses`, and the position is of the same transaction. Retention drops whole segments with their rows. So at any time `uses` and
`all_usage_…` count the same. Sealing changes nothing that a reader of these views can see.

The file is `analytics-<version>.duckdb`, and its segments are beside it in `….duckdb.segments/`. Other tables take
another version and so another file, filled by replay. A file that cannot be read, or that lacks a segment, is set aside
with its segments as `….corrupt-<time>`, one that comes from another log as `….replaced-<time>`, and the store is
rebuilt; the newest two of these are kept.

To read: `Analytics.cursor()` is a connection to the open database, and one transaction of it is one state of all tables
and views: `positions` says which. `Analytics.listeners` are told of every commit. To hand segments to another process:
`segment_files` in such a transaction; link the files (`os.link`) before it ends. They stay for an hour at least after
retention has dropped them, and a link stays as long as one wants it. All tables but `recent_uses` and `positions` only
grow, but for what retention drops: `events`, `ends`, `grants` and `issued_tokens` by `ledger_seq`, `used_tokens` and
`origins` by their numbers, `segments` and the roll-ups by `segment_no`, `refused` and `gaps` by `block_seq`. The rest
of the uses is `recent_uses`.
"""  # noqa: E501 - the table is the README's

from projections.analytics.api import serve_queries
from projections.analytics.schema import SCHEMA_VERSION
from projections.analytics.store import (
    STREAMS,
    Analytics,
    AnalyticsBusy,
    AnalyticsCorrupt,
    AnalyticsError,
    open_analytics,
    rebuild,
    store_file,
)
from projections.asking import (
    AnalyticsRefused,
    AuditEvent,
    AuditUse,
    EventsAnswer,
    EventsRequest,
    StatusAnswer,
    StatusRequest,
    StreamStatus,
    TokenAnswer,
    TokenFacts,
    TokenRequest,
    UsageAnswer,
    UsageRequest,
    UsesAnswer,
    UsesRequest,
    ask,
)

__all__ = [
    "SCHEMA_VERSION",
    "STREAMS",
    "Analytics",
    "AnalyticsBusy",
    "AnalyticsCorrupt",
    "AnalyticsError",
    "AnalyticsRefused",
    "AuditEvent",
    "AuditUse",
    "EventsAnswer",
    "EventsRequest",
    "StatusAnswer",
    "StatusRequest",
    "StreamStatus",
    "TokenAnswer",
    "TokenFacts",
    "TokenRequest",
    "UsageAnswer",
    "UsageRequest",
    "UsesAnswer",
    "UsesRequest",
    "ask",
    "open_analytics",
    "rebuild",
    "serve_queries",
    "store_file",
]
