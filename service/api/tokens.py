"""`/v1/tokens` and `/v1/revocations`: PATs and SATs are issued here, tokens of all kinds looked at and revoked."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import replace

from events.types import Kind, Reason
from projections.asking import TokenFacts
from projections.current import Hit
from projections.grants import facts
from service.api.analytics import token_facts
from service.api.routing import Call, Nothing, operation
from service.api.wire import (
    AnyAudiences,
    Audience,
    CallersReason,
    Comment,
    Id,
    Overlap,
    Page,
    ScopeText,
    Seq,
    Time,
    WaitSeconds,
    audiences,
    concurrently,
    cursor_of,
    page,
    position_of,
)
from service.errors import InvalidRequest, NotFound
from service.grants import (
    PERSONAL_TTL_SECONDS,
    PERSONAL_TTL_SECONDS_MAX,
    IssueToken,
    end_behind_cut_off,
    prepare_issue,
    prepare_rotate,
    revoke_token,
)
from service.parsing import moment
from service.past import Issue, Past, past_of
from service.propagation import Propagation, propagation_after
from service.registry import read_sealed, subject_id
from service.revocations import Ending, Target, ending_of, revoke_broadly
from service.rules.registry import check_audience, check_networks, check_plain, check_scope
from service.runtime import Runtime
from service.tokens import is_id
from service.validation import Code, audience_of, invalid_token, scope_of

ISSUE = ("ledger:issue",)
LOOK = ("ledger:issue", "ledger:audit")
REVOKE = ("ledger:revoke",)
_SCANNED_MAX = 20_000
_SLICE = 500

KindName = Literal["access", "refresh", "pat", "sat"]
_KIND_NAMES: dict[Kind, KindName] = {
    Kind.ACCESS: "access",
    Kind.REFRESH: "refresh",
    Kind.PAT: "pat",
    Kind.SAT: "sat",
}
Status = Literal["active", "revoked", "expired", "spent"]
Subject = Annotated[str, Meta(min_length=1, max_length=200)]


class NewToken(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`subject`: user id or username; a PAT for a person, a SAT for a service user.

    `scope` that is left out is all that the subject has. `audience` that is left out: the token is for anybody.
    `allowed_ips`: addresses and CIDR networks that it may be used from; none means any.
    """

    kind: Literal["pat", "sat"]
    subject: Subject
    name: Annotated[str, Meta(min_length=1, max_length=200)]
    scope: ScopeText = ""
    expires_in_seconds: Annotated[int, Meta(ge=1, le=PERSONAL_TTL_SECONDS_MAX)] = PERSONAL_TTL_SECONDS
    audience: Audience | AnyAudiences | UnsetType = UNSET
    allowed_ips: Annotated[list[Annotated[str, Meta(min_length=2, max_length=49)]], Meta(max_length=64)] | UnsetType = (
        UNSET
    )


class TokenCreated(Struct, frozen=True, kw_only=True):
    """`token` is never shown again."""

    token: str
    token_id: str
    grant_id: str
    kind: Literal["pat", "sat"]
    subject: str
    name: str | UnsetType = UNSET
    scope: str
    audience: list[str] | UnsetType = UNSET
    allowed_ips: list[str] | UnsetType = UNSET
    issued_at: datetime
    expires_at: datetime
    rotated_from: str | UnsetType = UNSET
    ledger_seq: Seq


class TokenView(Struct, frozen=True, kw_only=True):
    """A token as it stands now, or stood `at` a time. `spent`: a refresh token that was exchanged.

    `issued_seq`: of its issue. `ledger_seq`: the same; with `at`, the position of the ledger that it is true at.
    """

    token_id: str
    grant_id: str
    kind: KindName
    status: Status
    name: str | UnsetType = UNSET
    subject: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    scope: str
    audience: list[str] | UnsetType = UNSET
    allowed_ips: list[str] | UnsetType = UNSET
    issued_at: datetime
    expires_at: datetime
    revoked_at: datetime | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    rotated_from: str | UnsetType = UNSET
    kid: str | UnsetType = UNSET
    issued_seq: Seq
    at: datetime | UnsetType = UNSET
    ledger_seq: Seq


class TokenList(Struct, frozen=True):
    """A page may hold fewer items than asked for and still not be the last: go on while there is a `next_cursor`."""

    items: list[TokenView]
    next_cursor: str | UnsetType = UNSET


class TokenQuery(Page, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that is given must hold."""

    subject: (
        Annotated[Subject, Meta(description="User id or username; client id for client credentials.")] | UnsetType
    ) = UNSET
    client_id: Id | UnsetType = UNSET
    grant_id: Id | UnsetType = UNSET
    kind: KindName | UnsetType = UNSET
    status: Status | UnsetType = UNSET


class AtQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    at: Time | UnsetType = UNSET


class Rotation(Struct, frozen=True, forbid_unknown_fields=True):
    overlap_seconds: Overlap = 0


class TokenRevocation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    reason: CallersReason
    comment: Comment | UnsetType = UNSET
    wait_seconds: WaitSeconds | UnsetType = UNSET


class TokenRevoked(Struct, frozen=True, kw_only=True):
    """The same however often it is asked: the first revocation counts. `propagation`: if `wait_seconds` was given."""

    revoked_at: datetime
    ledger_seq: Seq
    propagation: Propagation | UnsetType = UNSET


class BroadRevocation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Exactly one of `token`, `token_id`, `grant_id`, `client_id` and `subject` (user id, username or client id)."""

    token: Annotated[str, Meta(min_length=1, max_length=4096)] | UnsetType = UNSET
    token_id: Id | UnsetType = UNSET
    grant_id: Id | UnsetType = UNSET
    client_id: Id | UnsetType = UNSET
    subject: Subject | UnsetType = UNSET
    reason: CallersReason
    comment: Comment | UnsetType = UNSET
    dry_run: bool = False
    wait_seconds: WaitSeconds | UnsetType = UNSET


class Affected(Struct, frozen=True):
    """What this revocation ended, or would end: tokens that were good until then, and their grants."""

    grants: int
    tokens: int


class RevocationDone(Struct, frozen=True, kw_only=True):
    """`ledger_seq` is that of the revocation; of the present state for a dry run.

    `propagation`: if `wait_seconds` was given.
    """

    affected: Affected
    ledger_seq: Seq
    propagation: Propagation | UnsetType = UNSET


def _view(hit: Hit, ending: Ending, name: str | None) -> TokenView:
    known, token = facts(hit.grant), hit.token
    return TokenView(
        token_id=hit.token_id,
        grant_id="grt_" + token.grant_id.hex(),
        kind=_KIND_NAMES[token.kind],
        status=ending.status,
        name=name or UNSET,
        subject=known.subject if known else UNSET,
        client_id=(known.client_id if known else None) or UNSET,
        scope=scope_of(hit),
        audience=list(audience_of(hit)) or UNSET,
        allowed_ips=(list(known.allowed_ips) if known else None) or UNSET,
        issued_at=token.issued_at,
        expires_at=token.expires_at,
        revoked_at=ending.at or UNSET,
        reason=ending.reason or UNSET,
        rotated_from=(known.rotated_from if known else None) or UNSET,
        kid=token.kid or UNSET,
        issued_seq=token.issued_seq,
        ledger_seq=token.issued_seq,
    )


def _view_of_old(old: TokenFacts) -> TokenView:
    """A token that expired so long ago that only analytics knows it."""
    status: Status = "revoked" if old.ended_at else "spent" if old.spent_at else "expired"
    members = {name: value for name, value in msgspec.structs.asdict(old).items() if value is not None}
    more: dict[str, Any] = {"status": status, "audience": list(old.audience) or UNSET, "issued_seq": old.ledger_seq}
    if old.ended_at is not None:
        more["revoked_at"] = old.ended_at
    kept = {name: members[name] for name in members.keys() & set(TokenView.__struct_fields__)}
    return TokenView(**kept | more)


async def _named_view(runtime: Runtime, hit: Hit, judged_at: datetime | None = None) -> TokenView:
    known = facts(hit.grant)
    name = await read_sealed(runtime, known.subject, known.sealed_name, "token name") if known else None
    return _view(hit, ending_of(hit, moment=judged_at), name)


async def find_hit(runtime: Runtime, token_id: str) -> Hit | None:
    """The token in the view, None if it is not there (any more). Raises: NotFound for what is no id."""
    if not is_id(token_id, "tok"):
        raise NotFound("there is no such token")
    hit = runtime.view.hit(token_id)
    if hit is None:
        await runtime.view_at_end()
        hit = runtime.view.hit(token_id)
    return hit


async def find_past(runtime: Runtime, token_id: str, at: str | UnsetType) -> Past:
    """The token as it stood at a time, now if it is left out. Raises: NotFound, InvalidRequest, Unavailable."""
    until = None if isinstance(at, UnsetType) else moment(at, "at")
    hit = await find_hit(runtime, token_id)
    if hit is not None:
        issue = Issue("grt_" + hit.token.grant_id.hex(), hit.token.issued_seq)
    else:
        old = await token_facts(runtime, token_id)
        issue = Issue(old.grant_id, old.ledger_seq)
    return await past_of(runtime, token_id, issue, until)


@operation(
    "POST",
    "/v1/tokens",
    tag="tokens",
    needs=ISSUE,
    body=NewToken,
    answer=TokenCreated,
    status=201,
    creates=True,
    errors=(404, 409),
)
async def create_token(call: Call[NewToken, Nothing]) -> dict[str, Any]:
    """Issue a personal (PAT) or service (SAT) access token.

    A `ledger:*` scope needs a token that holds it.
    """
    body = call.body
    request = IssueToken(
        kind=Kind(body.kind),
        user=body.subject,
        name=body.name,
        scope=check_scope(body.scope, {}) or None,
        expires_in_seconds=body.expires_in_seconds,
        audience=audiences(body.audience),
        allowed_ips=() if isinstance(body.allowed_ips, UnsetType) else tuple(body.allowed_ips),
    )
    check_plain(request.name, "name")
    check_audience(request.audience)
    check_networks(request.allowed_ips)
    answer = await call.create(lambda _: prepare_issue(call.runtime, call.caller, request, request_id=call.request_id))
    await _end_behind_caller(call, answer)
    return answer


@operation("GET", "/v1/tokens", tag="tokens", needs=LOOK, query=TokenQuery, answer=TokenList)
async def list_tokens(call: Call[None, TokenQuery]) -> dict[str, Any]:
    """List tokens of all kinds, the oldest first, never their strings.

    Tokens that expired more than seven days ago are not listed; each can still be shown.
    """
    after = position_of(call.query.cursor, _list_name(call.query)).decode()
    await call.runtime.view_at_end()  # the token endpoint answers before this view has what it issued
    hits, position = await _search(call.runtime, _with_id(call.runtime, call.query), after)
    items = await concurrently(_named_view(call.runtime, hit) for hit in hits)
    return page(items, cursor_of(_list_name(call.query), position.encode()) if position else None)


def _list_name(asked: TokenQuery) -> str:
    """A cursor belongs to the filters that it was given for: behind another index it would skip at random."""
    return f"tokens {asked.subject} {asked.client_id} {asked.grant_id}"


def _with_id(runtime: Runtime, asked: TokenQuery) -> TokenQuery:
    """The same with the id of a subject that was named by username; what names nobody stays, and fits nothing."""
    if isinstance(asked.subject, UnsetType):
        return asked
    return replace(asked, subject=subject_id(runtime, asked.subject) or asked.subject)


async def _search(runtime: Runtime, asked: TokenQuery, after: str) -> tuple[list[Hit], str]:
    """The hits, and the id to go on behind, empty at the end. Looks at a bounded number of rows."""
    index = _index(asked)
    if index is None:
        return [], ""
    found: list[Hit] = []
    for _ in range(_SCANNED_MAX // _SLICE):
        token_ids = runtime.view.token_ids(**index, after=after or None, limit=_SLICE)
        for token_id in token_ids:
            if len(found) == asked.limit:
                return found, after
            after = token_id
            hit = runtime.view.hit(token_id)
            if hit is not None and _fits(hit, asked):
                found.append(hit)
        if len(token_ids) < _SLICE:
            return found, ""
        # Others may have their turn.
        await asyncio.sleep(0)
    return found, after


def _index(asked: TokenQuery) -> dict[str, str] | None:
    """The narrowest index that serves. None if what is named is no id: then nothing fits."""
    prefixes: dict[str, tuple[Literal["grt", "usr", "cli"], ...]] = {
        "grant_id": ("grt",),
        "subject": ("usr", "cli"),
        "client_id": ("cli",),
    }
    chosen: dict[str, str] = {}
    for name, allowed in prefixes.items():
        value = getattr(asked, name)
        if not isinstance(value, str):
            continue
        if not any(is_id(value, prefix) for prefix in allowed):
            return None
        chosen = chosen or {name: value}
    return chosen


def _fits(hit: Hit, asked: TokenQuery) -> bool:
    known = facts(hit.grant)
    wanted = {
        asked.subject: known.subject if known else None,
        asked.client_id: known.client_id if known else None,
        asked.grant_id: "grt_" + hit.token.grant_id.hex(),
        asked.kind: hit.token.kind.value,
    }
    if any(not isinstance(value, UnsetType) and value != has for value, has in wanted.items()):
        return False
    return isinstance(asked.status, UnsetType) or ending_of(hit).status == asked.status


@operation("GET", "/v1/tokens/{token_id}", tag="tokens", needs=LOOK, query=AtQuery, answer=TokenView, errors=(404,))
async def show_token(call: Call[None, AtQuery]) -> TokenView:
    """Show a token as it stands now or stood at a time, however long ago it expired.

    With `at` the answer comes from the events that the ledger held then; before the issue it is 404.
    """
    if not isinstance(call.query.at, UnsetType):
        past = await find_past(call.runtime, call.name, call.query.at)
        return replace(await _named_view(call.runtime, past.hit, past.moment), at=past.moment, ledger_seq=past.position)
    hit = await find_hit(call.runtime, call.name)
    if hit is None:
        return _view_of_old(await token_facts(call.runtime, call.name))
    return await _named_view(call.runtime, hit)


@operation(
    "POST",
    "/v1/tokens/{token_id}/rotate",
    tag="tokens",
    needs=ISSUE,
    body=Rotation,
    body_optional=True,
    answer=TokenCreated,
    status=201,
    creates=True,
    errors=(404, 409),
)
async def rotate_token(call: Call[Rotation, Nothing]) -> dict[str, Any]:
    """Replace a PAT or SAT by a new one like it.

    The old one works until the overlap ends; without one it ends at once.
    """
    if not is_id(call.name, "tok"):
        raise NotFound("there is no such token")
    overlap = call.body.overlap_seconds
    answer = await call.create(
        lambda fresh: prepare_rotate(
            call.runtime, call.caller, call.name, overlap, fresh=fresh, request_id=call.request_id
        )
    )
    await end_behind_cut_off(call.runtime, call.caller.token_id, answer, call.request_id)
    await _end_behind_caller(call, answer)
    return answer


async def _end_behind_caller(call: Call[Any, Nothing], answer: dict[str, Any]) -> None:
    """Ends a token that stands behind the revocation of the caller's own, which nobody here could know of yet.

    Raises: InvalidToken, Unavailable.
    """
    own = call.runtime.view.hit(call.caller.token_id)
    ending = ending_of(own) if own is not None else None
    if ending is not None and ending.reason is not None and ending.seq < answer["ledger_seq"]:
        reason, request_id = Reason(ending.reason), call.request_id
        await revoke_token(call.runtime, "system", answer["token_id"], reason, None, request_id=request_id)
        raise invalid_token(Code.REVOKED)


@operation(
    "POST",
    "/v1/tokens/{token_id}/revoke",
    tag="tokens",
    needs=REVOKE,
    body=TokenRevocation,
    answer=TokenRevoked,
    errors=(404,),
)
async def revoke(call: Call[TokenRevocation, Nothing]) -> TokenRevoked:
    """Revoke a token; a refresh token takes its whole grant with it.

    It holds on this host when the answer comes, and everywhere within the bound on the views' staleness. With
    `wait_seconds` the answer comes when every follower has applied it, or after that time, and says who has.
    """
    if not is_id(call.name, "tok"):
        raise NotFound("there is no such token")
    reason, comment = Reason(call.body.reason), call.body.comment or None
    done = await revoke_token(
        call.runtime, call.caller.token_id, call.name, reason, comment, request_id=call.request_id
    )
    propagation = await _propagation(call, done.seq)
    return TokenRevoked(revoked_at=done.at, ledger_seq=done.seq, propagation=propagation)


async def _propagation(call: Call[Any, Nothing], ledger_seq: int) -> Propagation | UnsetType:
    """What was revoked stays so when the client does not wait for this."""
    wait_seconds = call.body.wait_seconds
    if isinstance(wait_seconds, UnsetType):
        return UNSET
    return await call.incoming.while_connected(propagation_after(call.runtime, call.caller, ledger_seq, wait_seconds))


@operation(
    "POST",
    "/v1/revocations",
    tag="tokens",
    needs=REVOKE,
    body=BroadRevocation,
    answer=RevocationDone,
    errors=(404,),
)
async def create_revocation(call: Call[BroadRevocation, Nothing]) -> RevocationDone:
    """Revoke a token, a grant, or everything that a client or user has.

    What is issued afterwards is not touched by it. A dry run says what would end, and ends nothing. `wait_seconds`: as
    for one token.
    """
    body = call.body
    names = ("token", "token_id", "grant_id", "client_id", "subject")
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not UNSET}
    if len(given) != 1:
        raise InvalidRequest(f"{len(given)} targets are named", fix=f"name exactly one of {', '.join(names)}")
    if body.dry_run and body.wait_seconds is not UNSET:
        raise InvalidRequest("a dry run revokes nothing that could be waited for", fix="leave out wait_seconds")
    done = await revoke_broadly(
        call.runtime,
        call.asker,
        msgspec.convert(given.popitem(), Target),
        Reason(body.reason),
        body.comment or None,
        dry_run=body.dry_run,
    )
    propagation = await _propagation(call, done.seq)
    return RevocationDone(affected=Affected(done.grants, done.tokens), ledger_seq=done.seq, propagation=propagation)
