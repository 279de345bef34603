"""`/v1/audit/blast-radius`: what a leaked token, or everything of a grant or client, could do, did, and holds up."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from projections.asking_tokens import (
    Deed,
    NamedSql,
    Places,
    RadiusAnswer,
    RadiusRequest,
    RadiusUse,
    RadiusUses,
    Related,
    RelatedToken,
    WouldBreak,
)
from service.api.analytics import ask_analytics
from service.api.audit import AUDIT
from service.api.routing import Call, operation
from service.api.token_usage import Explain
from service.api.usage import Since
from service.api.wire import Id, Page, Seq, cursor_of, position_of
from service.errors import InvalidRequest
from service.parsing import moment
from service.tokens import now

_NEW_SINCE = timedelta(hours=24)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_TARGETS = ("token_id", "token_sha256", "grant_id", "client_id")


class RadiusQuery(Page, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of `token_id`, `token_sha256`, `grant_id` and `client_id`."""

    token_id: Id | UnsetType = UNSET
    token_sha256: (
        Annotated[str, Meta(min_length=64, max_length=64, description="SHA-256 of the token's string, as hex.")]
        | UnsetType
    ) = UNSET
    grant_id: Id | UnsetType = UNSET
    client_id: Id | UnsetType = UNSET
    since: (
        Annotated[
            Since, Meta(description="RFC 3339. What was first seen from then on is new. By default 24 hours ago.")
        ]
        | UnsetType
    ) = UNSET
    interval: Annotated[Literal["hour", "day"], Meta(description="Of the series of uses, UTC.")] = "day"
    explain: Explain | UnsetType = UNSET


class BlastRadius(Struct, frozen=True, kw_only=True):
    """The first page holds the report; every page holds uses in `items`, the newest in the log first.

    `token`: what was asked about, if it is one token. `related`: it, the tokens that came out of it or that it came out
    of, and the others of its grant. `usage`, `networks`, `agents`, `new_addresses`, `deeds` and `items` tell of it and
    of what came out of it. `new_addresses`: first seen since `since`. `would_break`: what would break if it were
    revoked now. `deeds`: events of the ledger that were done with these tokens. Of each list 50 are told.

    True at `ledger_seq` of LEDGER and `usage_seq` of USAGE.
    """

    since: datetime
    token: RelatedToken | UnsetType = UNSET
    related: Related | UnsetType = UNSET
    usage: RadiusUses | UnsetType = UNSET
    networks: Places | UnsetType = UNSET
    agents: Places | UnsetType = UNSET
    new_addresses: Places | UnsetType = UNSET
    would_break: WouldBreak | UnsetType = UNSET
    deeds: list[Deed] | UnsetType = UNSET
    items: list[RadiusUse]
    next_cursor: str | UnsetType = UNSET
    ledger_seq: Seq
    usage_seq: int
    sql: list[NamedSql] | UnsetType = UNSET


@operation(
    "GET",
    "/v1/audit/blast-radius",
    tag="audit",
    needs=AUDIT,
    query=RadiusQuery,
    answer=BlastRadius,
    errors=(404,),
)
async def show_blast_radius(call: Call[None, RadiusQuery]) -> BlastRadius:
    """Show what a token, grant or client reached: related tokens, uses, where from, and what revoking it would break.

    However long ago it ended. Uses count as far as they are kept. A revocation of a refresh token is one of its grant.
    """
    asked = call.query
    name, value = _target(asked)
    present = now()
    since = present - _NEW_SINCE if isinstance(asked.since, UnsetType) else moment(asked.since, "since")
    of = f"uses of {name} {value}"
    position = position_of(asked.cursor, of)
    request = RadiusRequest(
        **{name: value},
        now=present,
        since=since,
        interval=asked.interval,
        after=msgspec.json.decode(position, type=tuple[int, int]) if position else None,
        limit=asked.limit,
        explain=asked.explain == "sql",
    )
    answer = await ask_analytics(call.runtime, request, RadiusAnswer, smaller=_smaller(name))
    cursor: str | UnsetType = UNSET
    if answer.more:
        last = answer.items[-1]
        cursor = cursor_of(of, msgspec.json.encode((last.usage_seq, last.use_index)))
    report = {} if isinstance(answer.report, UnsetType) else msgspec.structs.asdict(answer.report)
    return BlastRadius(
        **report,
        since=since,
        items=answer.items,
        next_cursor=cursor,
        ledger_seq=answer.ledger_seq,
        usage_seq=answer.usage_seq,
        sql=answer.sql,
    )


def _target(asked: RadiusQuery) -> tuple[str, str]:
    """What is asked about, by the name of its parameter. Raises: InvalidRequest."""
    given = [(name, value) for name in _TARGETS if (value := getattr(asked, name))]
    if len(given) != 1:
        raise InvalidRequest(
            f"{len(given)} of {', '.join(_TARGETS)} were given",
            fix="give exactly one of them, of a token its id or hash",
        )
    name, value = given[0]
    if name == "token_sha256" and _SHA256.fullmatch(value) is None:
        raise InvalidRequest(
            "token_sha256 is not a SHA-256 in hex",
            fix='printf %s "$TOKEN" | sha256sum, or token-ledger audit blast-radius',
        )
    return name, value.lower() if name == "token_sha256" else value


def _smaller(name: str) -> str:
    return "ask for one of its grants or tokens" if name == "client_id" else "ask for one token, or try again later"
