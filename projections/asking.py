"""What the analytics process can be asked over NATS, and how. Apart from it, so that who asks loads no database.

Requests and answers are JSON. Errors come in the headers of the micro protocol: 400 the request is not understood,
404 no such token, 503 what was asked for is not there yet or too much is asked at once, 504 the query took too long.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import nats.errors
from msgspec import UNSET, Meta, Struct, UnsetType
from nats.aio.client import Client

# Of nats.micro, which is not loaded for two names.
ERROR_HEADER = "Nats-Service-Error"
ERROR_CODE_HEADER = "Nats-Service-Error-Code"
SERVICE = "analytics"
QUERY_SECONDS_MAX = 10.0

Limit = Annotated[int, Meta(ge=1, le=1000)]
Seq = Annotated[int, Meta(ge=0, le=2**63 - 1)]
A = TypeVar("A", bound=Struct)


class EventsRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Recorded events in sequence order; all that is given must hold.

    `from_` ≤ recorded_at < `to`. `token_id`: events that name the token; `grant_id`: all events of the grant.
    `min_seq`: the answer waits until this sequence of LEDGER has been folded in.
    """

    type: str | None = None
    subject: str | None = None
    client_id: str | None = None
    token_id: str | None = None
    grant_id: str | None = None
    from_: datetime | None = msgspec.field(default=None, name="from")
    to: datetime | None = None
    after_seq: Seq = 0
    limit: Limit = 100
    min_seq: Seq = 0


class AuditEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`body` is the event as recorded, without password hashes and without what is sealed."""

    ledger_seq: int
    recorded_at: datetime
    occurred_at: datetime
    type: str
    by: str
    request_id: str | None = None
    subject: str | None = None
    client_id: str | None = None
    user_id: str | None = None
    grant_id: str | None = None
    token_ids: tuple[str, ...] = ()
    body: msgspec.Raw


class EventsAnswer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """True at LEDGER sequence `position`. `next_after_seq` is there if there is more."""

    items: list[AuditEvent] = msgspec.field(default_factory=list)
    next_after_seq: int | None = None
    position: int


class UsesRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The uses of one token by time. The answer has every use that was recorded when the request arrived."""

    token_id: str
    limit: Limit = 100
    cursor: str | None = None


class AuditUse(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One use. `block_seq` and `use_index` say where it stands in USAGE; `caller` is the token or client that asked."""

    occurred_at: datetime
    recorded_at: datetime
    block_seq: int
    use_index: int
    outcome: str
    endpoint: str
    caller: str
    scope: str | None = None
    audience: str | None = None
    ip: str | None = None
    user_agent: str | None = None
    method: str | None = None
    path: str | None = None


class UsesAnswer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """True at USAGE sequence `usage_position`. `next_cursor` is there if there is more."""

    items: list[AuditUse] = msgspec.field(default_factory=list)
    next_cursor: str | None = None
    usage_position: int


class TokenRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    token_id: str
    min_seq: Seq = 0


class TokenFacts(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A token, however long ago it expired.

    `expires_at` includes the end of a PAT or SAT that was rotated. `spent_at`: a refresh token was exchanged.
    `ended_at`, `reason`, `ended_seq`: the first revocation that applies to it, of the token, its grant, client or
    subject.
    """

    token_id: str
    grant_id: str
    ledger_seq: int
    grant_seq: int | None = None
    kind: str
    client_id: str | None = None
    subject: str | None = None
    scope: str
    audience: tuple[str, ...]
    issued_at: datetime
    expires_at: datetime
    spent_at: datetime | None = None
    ended_at: datetime | None = None
    reason: str | None = None
    ended_seq: int | None = None
    kid: str | None = None
    rotated_from: str | None = None


class TokenAnswer(Struct, frozen=True, kw_only=True):
    """True at LEDGER sequence `position`."""

    token: TokenFacts
    position: int


GroupBy = Literal["client_id", "subject", "token_id", "kind", "outcome", "scope", "ip", "user_agent", "endpoint"]
Interval = Literal["minute", "hour", "day"]


class UsageRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Uses with `from_` ≤ occurred_at < `to`, counted; of the filters all that are given must hold.

    The `limit` groups with the most uses are told one by one, the others together. `distinct`: with the number of
    tokens and addresses. `explain`: with the SQL.
    """

    group_by: GroupBy | None = None
    interval: Interval | None = None
    from_: datetime = msgspec.field(name="from")
    to: datetime
    limit: Limit = 10
    distinct: bool = False
    explain: bool = False
    client_id: str | None = None
    subject: str | None = None
    token_id: str | None = None
    kind: str | None = None
    outcome: str | None = None
    endpoint: str | None = None
    ip: str | None = None


class UsagePoint(Struct, frozen=True, kw_only=True):
    """The uses of one minute, hour or day (UTC) that begins at `starts_at`."""

    starts_at: datetime
    uses: int
    refused: int


class UsageCounts(Struct, frozen=True, kw_only=True):
    """`refused`: the uses with another outcome than `valid`.

    `tokens`, `addresses`: how many different ones, if `distinct` was
    asked for. `series` is there if an interval was asked for; it has no points without uses.
    """

    uses: int = 0
    refused: int = 0
    first_used_at: datetime | UnsetType = UNSET
    last_used_at: datetime | UnsetType = UNSET
    tokens: int | UnsetType = UNSET
    addresses: int | UnsetType = UNSET
    series: list[UsagePoint] | UnsetType = UNSET


class UsageGroup(UsageCounts, frozen=True, kw_only=True):
    """The uses that have `value` in what was grouped by; null: those that have none."""

    value: str | None


class UsageOther(UsageCounts, frozen=True, kw_only=True):
    """The uses of all groups that are not told one by one, and how many groups these are."""

    groups: int


class UsageSql(Struct, frozen=True):
    """The query that counted, in DuckDB's SQL, and what was bound in it."""

    statement: str
    parameters: dict[str, Any]


class UsageAnswer(Struct, frozen=True, kw_only=True, rename={"from_": "from"}):
    """True at `ledger_seq` of LEDGER and `usage_seq` of USAGE: what was recorded later is not in it.

    `groups`, those with the most uses first, is there if `group_by` was asked for; `other` if there are more groups.
    """

    from_: datetime
    to: datetime
    group_by: GroupBy | UnsetType = UNSET
    interval: Interval | UnsetType = UNSET
    totals: UsageCounts
    groups: list[UsageGroup] | UnsetType = UNSET
    other: UsageOther | UnsetType = UNSET
    ledger_seq: int
    usage_seq: int
    sql: UsageSql | UnsetType = UNSET


class StatusRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class StreamStatus(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`end` and `lag` (messages not yet folded in) are left out when the server cannot be asked."""

    stream: str
    position: int
    recorded_at: datetime | None = None
    end: int | None = None
    lag: int | None = None


class StatusAnswer(Struct, frozen=True, kw_only=True):
    """`set_aside`: names of files that were damaged or replaced and are kept for a look, the newest first."""

    version: int
    streams: list[StreamStatus]
    file_bytes: int
    set_aside: list[str]


# Where each is answered; `projections/asking_tokens.py` adds its own.
SUBJECTS: dict[type[Struct], str] = {
    EventsRequest: f"{SERVICE}.events",
    UsesRequest: f"{SERVICE}.uses",
    TokenRequest: f"{SERVICE}.tokens",
    UsageRequest: f"{SERVICE}.usage",
    StatusRequest: f"{SERVICE}.status",
}


class AnalyticsRefused(Exception):
    """The analytics process answered with an error, or (503) did not answer. `code` is that of HTTP."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(description)
        self.code = code


async def ask(nc: Client, request: Struct, answer: type[A], *, seconds: float = QUERY_SECONDS_MAX + 5) -> A:
    """Asks the analytics process; `answer` is the Struct that belongs to the request. Raises: AnalyticsRefused."""
    try:
        reply = await nc.request(SUBJECTS[type(request)], msgspec.json.encode(request), timeout=seconds)
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise AnalyticsRefused(
            503, f"the analytics process does not answer: {error or type(error).__name__}"
        ) from error
    if reply.headers and ERROR_CODE_HEADER in reply.headers:
        raise AnalyticsRefused(int(reply.headers[ERROR_CODE_HEADER]), reply.headers.get(ERROR_HEADER, ""))
    return msgspec.json.decode(reply.data, type=answer)
