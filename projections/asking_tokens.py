"""What the analytics process can be asked about tokens: how much they are used, with which scopes, and by whom.

Beside `projections/asking.py`, which says how it is asked.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from projections.asking import SERVICE, SUBJECTS, Limit, UsagePoint, UsageSql

Status = Literal["active", "revoked", "expired", "spent"]
Sort = Literal["last_used_at", "uses", "addresses", "issued_at", "expires_at"]


class TokensRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Tokens with how much they are used; of the filters all that are given must hold.

    `now`: when their status is judged. `scope`: one that the token has. `unused_since`: issued and last used, if ever,
    before it. `expiring_until`: those that expire by then. `after`: the value that is sorted by and the id of the last
    token of the page before.
    """

    now: datetime
    client_id: str | None = None
    subject: str | None = None
    kind: str | None = None
    status: Status | None = None
    scope: str | None = None
    unused_since: datetime | None = None
    expiring_until: datetime | None = None
    sort: Sort = "last_used_at"
    descending: bool = True
    after: tuple[datetime | int | None, str] | None = None
    limit: Limit = 100
    explain: bool = False


class TokenUsage(Struct, frozen=True, kw_only=True):
    """A token and its uses, as far as these are kept.

    `uses` are all of them, `refused` those with another outcome than `valid`, `addresses` how many different ones they
    came from. `validations`: of other tokens, that were asked for with this one; `last_used_at` is the last of either.
    `age_days`: whole days since it was issued. `issued_seq`: position of its issue in the ledger.
    """

    token_id: str
    grant_id: str
    kind: str
    status: Status
    client_id: str | UnsetType = UNSET
    subject: str | UnsetType = UNSET
    scope: str
    issued_at: datetime
    expires_at: datetime
    issued_seq: int
    age_days: int
    uses: int
    refused: int
    addresses: int
    validations: int
    last_used_at: datetime | UnsetType = UNSET


class TokensAnswer(Struct, frozen=True, kw_only=True):
    """True at `ledger_seq` of LEDGER and `usage_seq` of USAGE. `more`: there are others behind the last."""

    items: list[TokenUsage]
    more: bool
    ledger_seq: int
    usage_seq: int
    sql: UsageSql | UnsetType = UNSET


class ScopesRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Scopes that were granted, and which of them were used since `since`, the beginning of a day (UTC).

    `by`: for every good token, or for every client. `include_used`: also where each scope was used. `after`: the token
    or client id of the last item of the page before.
    """

    now: datetime
    since: datetime
    by: Literal["token", "client"]
    client_id: str | None = None
    subject: str | None = None
    token_id: str | None = None
    kind: str | None = None
    include_used: bool = False
    after: str | None = None
    limit: Limit = 100
    explain: bool = False


class ScopeUses(Struct, frozen=True, kw_only=True):
    """Valid answers that asked for the scope, since the time that is looked at.

    `last_used_at` may lie before that time. `granted_as`: the scope that it came with, if it was not granted itself.
    """

    name: str
    uses: int
    last_used_at: datetime | UnsetType = UNSET
    granted_as: str | UnsetType = UNSET


class ScopesUsed(Struct, frozen=True, kw_only=True):
    """What a token or client was granted, and what of it was used.

    A scope counts as used if a validation asked for it and the answer was `valid`, or if it let a call of the ledger's
    own API through. `unscoped_uses` asked for none, and prove nothing about any. `scope`: of the token; of a client,
    what it is registered with and what those of its tokens had that were good within the time. `proposed_scope`: what
    of it was used; absent if nothing was.
    """

    token_id: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    subject: str | UnsetType = UNSET
    kind: str | UnsetType = UNSET
    scope: str
    proposed_scope: str | UnsetType = UNSET
    unused: list[ScopeUses]
    used: list[ScopeUses]
    tokens: int
    uses: int
    unscoped_uses: int
    last_used_at: datetime | UnsetType = UNSET


class ScopesAnswer(Struct, frozen=True, kw_only=True):
    """True at `ledger_seq` of LEDGER and `usage_seq` of USAGE. `more`: there are others behind the last."""

    items: list[ScopesUsed]
    more: bool
    ledger_seq: int
    usage_seq: int
    sql: UsageSql | UnsetType = UNSET


class RadiusRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything about a token, a grant or a client that leaked. One of the four is given.

    `token_sha256`: the SHA-256 of the token's string, as hex. `since`: addresses first seen from then on are told.
    `after`: position in USAGE of the last use of the page before; such a page holds uses alone.
    """

    now: datetime
    since: datetime
    token_id: str | None = None
    token_sha256: str | None = None
    grant_id: str | None = None
    client_id: str | None = None
    interval: Literal["hour", "day"] = "day"
    after: tuple[int, int] | None = None
    limit: Limit = 100
    explain: bool = False


Relation = Literal["self", "descendant", "ancestor", "sibling"]


class RelatedToken(Struct, frozen=True, kw_only=True):
    """A token of the report.

    `relation`: `self` is what was asked about, or a token of the grant or client that was asked about; a `descendant`
    came out of it by refresh or rotation, and it came out of an `ancestor`; a `sibling` is of the same grant and
    neither. Uses are counted of the first two. `would_end`: good now, and ended if what was asked about were revoked.
    """

    token_id: str
    grant_id: str
    kind: str
    relation: Relation
    status: Status
    would_end: bool
    client_id: str | UnsetType = UNSET
    subject: str | UnsetType = UNSET
    scope: str
    issued_at: datetime
    expires_at: datetime
    revoked_at: datetime | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    rotated_from: str | UnsetType = UNSET
    issued_seq: int
    revoked_seq: int | UnsetType = UNSET
    uses: int
    last_used_at: datetime | UnsetType = UNSET


class Related(Struct, frozen=True, kw_only=True):
    """All tokens of the report, counted; `items` are the nearest and newest of them."""

    tokens: int
    grants: int
    active: int
    would_end: int
    items: list[RelatedToken]


class Place(Struct, frozen=True, kw_only=True):
    """A network, address or agent that uses came from. `new`: first seen since the time that was asked about."""

    value: str | None
    uses: int
    refused: int
    addresses: int
    first_seen_at: datetime
    last_seen_at: datetime
    new: bool


class Places(Struct, frozen=True, kw_only=True):
    """How many there are in all, how many of these are new, and those seen first most recently."""

    total: int
    new: int
    items: list[Place]


class Outcome(Struct, frozen=True, kw_only=True):
    outcome: str
    uses: int
    first_at: datetime
    last_at: datetime


class RadiusUses(Struct, frozen=True, kw_only=True):
    """The uses of the token, grant or client and of what came out of it, as far as they are kept.

    `validations`: of other tokens, that were asked for with these.
    """

    uses: int
    refused: int
    tokens: int
    addresses: int
    validations: int
    first_used_at: datetime | UnsetType = UNSET
    last_used_at: datetime | UnsetType = UNSET
    outcomes: list[Outcome]
    series: list[UsagePoint]


class Dependent(Struct, frozen=True, kw_only=True):
    """Who or what had valid answers in the last 24 hours and would have none any more."""

    value: str | None
    uses: int
    tokens: int
    last_used_at: datetime


class WouldBreak(Struct, frozen=True, kw_only=True):
    """What would break if what was asked about were revoked now: its valid uses since `since`, 24 hours ago.

    Of each kind of dependents the most frequent are told, `callers` being who validated. `refreshes`: how often a
    refresh token of an ended grant was exchanged since. `validations`: of other tokens, that were asked for with the
    ended ones since.
    """

    since: datetime
    tokens: int
    uses: int
    last_used_at: datetime | UnsetType = UNSET
    refreshes: int
    validations: int
    callers: list[Dependent]
    addresses: list[Dependent]
    agents: list[Dependent]
    endpoints: list[Dependent]


class Deed(Struct, frozen=True, kw_only=True):
    """Events of one type in the ledger that were done with the tokens whose uses are counted."""

    type: str
    events: int
    first_seq: int
    last_seq: int
    last_at: datetime


class RadiusUse(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One use. `usage_seq` and `use_index` say where it stands in USAGE; `caller` is the token or client that asked.

    `reported`: the caller told where the use came from, and it was not seen by the service itself.
    """

    usage_seq: int
    use_index: int
    occurred_at: datetime
    recorded_at: datetime
    token_id: str
    outcome: str
    endpoint: str
    caller: str
    scope: str | None = None
    audience: str | None = None
    ip: str | None = None
    network: str | None = None
    user_agent: str | None = None
    method: str | None = None
    path: str | None = None
    reported: bool | None = None


class NamedSql(Struct, frozen=True):
    """One query of several, in their order: later ones read the table `related` that an earlier one makes."""

    name: str
    statement: str
    parameters: dict[str, Any]


class RadiusReport(Struct, frozen=True, kw_only=True):
    """What the first page tells besides uses."""

    token: RelatedToken | UnsetType = UNSET
    related: Related
    usage: RadiusUses
    networks: Places
    agents: Places
    new_addresses: Places
    would_break: WouldBreak
    deeds: list[Deed]


class RadiusAnswer(Struct, frozen=True, kw_only=True):
    """True at `ledger_seq` of LEDGER and `usage_seq` of USAGE. `items`: uses, the newest in the log first."""

    report: RadiusReport | UnsetType = UNSET
    items: list[RadiusUse] = msgspec.field(default_factory=list)
    more: bool
    ledger_seq: int
    usage_seq: int
    sql: list[NamedSql] | UnsetType = UNSET


SUBJECTS.update(
    {
        TokensRequest: f"{SERVICE}.token_usage",
        ScopesRequest: f"{SERVICE}.scopes",
        RadiusRequest: f"{SERVICE}.blast_radius",
    }
)
