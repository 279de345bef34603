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
| `ends` | something that ends tokens | `ledger_seq`, `what` (`revoked`, `spent`, `superseded`), one of `token_id`, `grant_id`, `client_id`, `subject`; `cuts_before_seq` (of a client or subject: grants that began before), `ended_at`, `reason` |
| `uses` | a use of a token | `occurred_at`, `recorded_at`, `block_seq` (sequence in USAGE), `use_index` (in the block), `token_no` (join `used_tokens`; NULL if unknown), `token_sha256` (of an unknown token), `outcome`, `endpoint`, `caller`, `scope`, `audience` (asked for, NULL if nothing), `ip`, `user_agent`, `method`, `path` |
| `used_tokens` | a token that was used | `token_no`, `token_id`; numbers are this file's own and differ after a rebuild |
| `refused` | a count of requests that named no known token | `minute`, `recorded_at`, `block_seq`, `refused_index`, `caller`, `ip`, `outcome`, `endpoint`, `requests` |
| `gaps` | uses that a writer knows it has lost | `block_seq`, `recorded_at` (of the block that said so), `writer`, `lost` |
| `positions` | a stream | `stream`, `seq` (all up to it is in the tables), `recorded_at` (of that message), `created` (the stream), `version` (of the tables) |

The file is `analytics-<version>.duckdb`. Other tables take another version and so another file, filled by replay. A
file that cannot be read is set aside as `….corrupt-<time>`, one that comes from another log as `….replaced-<time>`,
and the store is rebuilt; the newest two of these are kept.
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
