"""`/v1/uses`: what resource servers decided by themselves and tell afterwards, so that the record of uses is whole."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from events.errors import LedgerError
from events.types import TokenUsed
from service.api.routing import Call, operation
from service.api.wire import Seq
from service.caller import Caller
from service.doors import RequestContext, context_of
from service.errors import InvalidRequest, Unavailable
from service.runtime import Runtime
from service.tokens import is_id, now
from service.validation import BEARER_KINDS, SCOPE_SYNTAX

NEEDS = ("ledger:validate",)
USES_MAX = 1000
# A block is one message of the log: with what is added it stays below 900,000 bytes.
BODY_BYTES_MAX = 768 * 1024
AHEAD_MAX = timedelta(seconds=60)  # by so much a caller's clock may be ahead
AGE_MAX = timedelta(hours=6)
_SLICE = 200
_SCOPE_CHARS_MAX = 4096
_AUDIENCES_CHARS_MAX = 1024
_METHOD_CHARS_MAX = 32
_TEXT_CHARS_MAX = 2048  # of which less is kept

Outcome = Literal[
    "valid",
    "stale",
    "revoked",
    "client_disabled",
    "subject_disabled",
    "not_yet_valid",
    "expired",
    "ip_not_allowed",
    "wrong_audience",
    "insufficient_scope",
]


class ReportedContext(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Where a token came from. Whoever brought it chose what stands here."""

    ip: str | None = None
    user_agent: str | None = None
    method: str | None = None
    path: str | None = None


class ReportedUse(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """A use that was decided without asking. `scope`, `audience`: what was asked for.

    `occurred_at`: at most six hours ago; up to a minute ahead counts as now. What is long is cut:
    256 characters of agent and path are kept.
    """

    token_id: Annotated[str, Meta(min_length=36, max_length=36)]
    occurred_at: Annotated[datetime, Meta(tz=True)]
    outcome: Outcome
    scope: str = ""
    audience: str | list[str] = ""
    context: ReportedContext | None = None


class UseReport(Struct, frozen=True, forbid_unknown_fields=True):
    """A block of uses. Sent again with the same `block_id` within two minutes, it is recorded once.

    `lost`: uses that the caller could not report, since its block before.
    """

    block_id: Annotated[str, Meta(min_length=16, max_length=64)]
    uses: Annotated[list[ReportedUse], Meta(max_length=USES_MAX)]
    lost: Annotated[int, Meta(ge=0, le=10**9)] = 0


class RefusedUse(Struct, frozen=True):
    """A use that was not recorded. `index`: its place in the report; `why`: what is wrong with it."""

    index: int
    why: str


class UsesRecorded(Struct, frozen=True):
    """`unknown`: ids that are of no token here, or of none that can be presented; their uses were not recorded.

    `refused`: uses that hold what no use can hold; the others were recorded. `ledger_seq`: the position of the ledger
    at which the tokens were looked up.
    """

    recorded: int
    unknown: list[str]
    refused: list[RefusedUse]
    ledger_seq: Seq


@operation(
    "POST",
    "/v1/uses",
    tag="tokens",
    needs=NEEDS,
    body=UseReport,
    answer=UsesRecorded,
    body_bytes_max=BODY_BYTES_MAX,
)
async def report_uses(call: Call[UseReport, Any]) -> UsesRecorded:
    """Record uses that the caller decided itself.

    The body may have 768 KiB. Answered when they are on disk. They count as told by the caller.
    """
    body, runtime = call.body, call.runtime
    unknown = await _unknown(runtime, {use.token_id for use in body.uses})
    moment = now()
    uses, refused = [], []
    for index, use in enumerate(body.uses):
        if use.token_id in unknown:
            continue
        try:
            uses.append(_use(use, call.caller, moment))
        except InvalidRequest as error:
            refused.append(RefusedUse(index, str(error)))
    if uses or body.lost:
        try:
            await runtime.usage.record_block(_block_id(call.caller, body.block_id), uses, lost=body.lost)
        except LedgerError as error:
            raise Unavailable("the uses cannot be recorded at the moment", private=str(error)) from error
    return UsesRecorded(len(uses), sorted(unknown), refused, runtime.view.freshness().position)


def _block_id(caller: Caller, block_id: str) -> str:
    """The same for every token of the caller, and nobody else's block has it."""
    return hashlib.sha256(f"{caller.subject} {block_id}".encode()).hexdigest()[:32]


async def _unknown(runtime: Runtime, token_ids: set[str]) -> set[str]:
    """Those that are of no token that can be presented. Raises: Unavailable."""
    unknown = await _missing(runtime, token_ids)
    if unknown:
        await runtime.view_at_end()
        unknown = await _missing(runtime, unknown)
    return unknown


async def _missing(runtime: Runtime, token_ids: Iterable[str]) -> set[str]:
    missing = set()
    for number, token_id in enumerate(token_ids, 1):
        hit = runtime.view.hit(token_id) if is_id(token_id, "tok") else None
        if hit is None or hit.token.kind not in BEARER_KINDS:
            missing.add(token_id)
        if number % _SLICE == 0:
            await asyncio.sleep(0)  # others may have their turn
    return missing


def _use(use: ReportedUse, caller: Caller, moment: datetime) -> TokenUsed:
    """Raises: InvalidRequest."""
    if use.occurred_at > moment + AHEAD_MAX:
        raise InvalidRequest("occurred_at lies in the future", fix="set the clock of the host that reports")
    if use.occurred_at < moment - AGE_MAX:
        raise InvalidRequest("occurred_at lies more than six hours back", fix="report uses within seconds")
    scope = " ".join(use.scope.split())
    if scope and (len(scope) > _SCOPE_CHARS_MAX or not SCOPE_SYNTAX.fullmatch(scope)):
        raise InvalidRequest("scope is too long, or holds characters that no scope can hold")
    audience = use.audience if isinstance(use.audience, str) else " ".join(use.audience)
    return TokenUsed(
        int(min(use.occurred_at, moment).timestamp() * 1_000_000),
        use.token_id,
        None,
        use.outcome,
        "reported",
        caller.token_id,
        scope,
        audience[:_AUDIENCES_CHARS_MAX],
        context_of(_context(use.context)) if use.context is not None else None,
    )


def _context(given: ReportedContext) -> RequestContext:
    return RequestContext(
        given.ip,
        given.user_agent and given.user_agent[:_TEXT_CHARS_MAX],
        given.method and given.method[:_METHOD_CHARS_MAX],
        given.path and given.path[:_TEXT_CHARS_MAX],
    )
