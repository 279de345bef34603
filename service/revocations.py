"""Broad revocations: what one target names, and how much of it was still alive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from events.types import Kind, Reason
from projections.current import Hit
from projections.grants import ActiveGrant, RevokedGrant, facts
from projections.registry import Cut
from service.errors import InvalidRequest, NotFound
from service.grants import find_user, revoke_grant, revoke_owner, revoke_token
from service.registry import Asker
from service.runtime import Runtime
from service.tokens import is_id, now, sha256, well_formed

_SLICE = 256
_COUNTED_MAX = 5_000_000

By = Literal["token", "token_id", "grant_id", "client_id", "subject"]


class Ending(Struct, frozen=True):
    """Whether and how a token ended. `spent`: a refresh token that was exchanged for its successor."""

    status: Literal["active", "revoked", "expired", "spent"]
    at: datetime | None = None
    reason: str | None = None
    seq: int = 0


def ending_of(hit: Hit, *, moment: datetime | None = None) -> Ending:
    """How the token stands. A revocation counts before its expiry."""
    token, grant = hit.token, hit.grant
    ends: list[tuple[int, datetime, Reason]] = []
    if token.ended is not None:
        ends.append((token.ended.seq, token.ended.at, token.ended.reason))
    if isinstance(grant, RevokedGrant):
        ends.append((grant.ended.seq, grant.ended.at, grant.ended.reason))
    first_seq = grant.first_seq if isinstance(grant, ActiveGrant) else None
    ends += [
        (cut.seq, cut.at, cut.reason)
        for cut in (hit.client_cut, hit.subject_cut)
        if cut is not None and (cut.disabled or (first_seq is not None and cut.seq > first_seq))
    ]
    if hit.key_cut is not None:
        ends.append((hit.key_cut.seq, hit.key_cut.at, hit.key_cut.reason))
    if ends:
        seq, at, reason = min(ends, key=lambda end: end[1])
        return Ending("revoked", at, reason.value, seq)
    chain = grant.refresh if isinstance(grant, ActiveGrant) and token.kind is Kind.REFRESH else None
    if chain is not None and chain.current != hit.token_id:
        return Ending("spent")
    if (moment or now()) >= token.expires_at:
        return Ending("expired")
    return Ending("active")


class Target(Struct, frozen=True, array_like=True):
    """What is to be revoked: by what it is named, and its name."""

    by: By
    name: str

    def __repr__(self) -> str:
        return f"Target({self.by})"  # a token is a secret


class Done(Struct, frozen=True):
    """`seq`: of the revocation, or of the state that was looked at by a dry run."""

    grants: int
    tokens: int
    seq: int


class _Scope(Struct, frozen=True):
    """Which tokens a target covers: one token, a grant's, or an owner's (a client or user)."""

    token_id: str | None = None
    grant_id: str | None = None
    owner: str | None = None


async def revoke_broadly(
    runtime: Runtime, asker: Asker, target: Target, reason: Reason, comment: str | None, *, dry_run: bool
) -> Done:
    """Revokes what the target names, durably and on this host, and counts what it ended.

    Raises: NotFound, InvalidRequest, Unavailable.
    """
    scope = await _resolve(runtime, target)
    if dry_run:
        await runtime.view_at_end()
        grants, tokens = await _count(runtime, scope)
        return Done(grants, tokens, runtime.view.freshness().position)
    by, request_id = asker.by, asker.request_id
    if scope.owner is not None:
        # The revocation first: what an owner has may be a million tokens, and counting them takes its time.
        before = runtime.view.cut(scope.owner)
        seq = await revoke_owner(runtime, by, scope.owner, reason, comment, request_id=request_id)
        return Done(*await _count(runtime, scope, before=before, until_seq=seq), seq)
    await runtime.view_at_end()
    grants, tokens = await _count(runtime, scope)
    if scope.token_id is not None:
        done = await revoke_token(runtime, by, scope.token_id, reason, comment, request_id=request_id)
    else:
        assert scope.grant_id is not None
        done = await revoke_grant(runtime, by, scope.grant_id, reason, comment, request_id=request_id)
    return Done(grants, tokens, done.seq)


async def _resolve(runtime: Runtime, target: Target) -> _Scope:
    match target.by:
        case "token":
            return _of_hit(await _by_string(runtime, target.name))
        case "token_id":
            return _of_hit(await _by_id(runtime, target.name))
        case "grant_id":
            if not is_id(target.name, "grt"):
                raise NotFound("there is no such grant")
            return _Scope(grant_id=target.name)
        case "client_id":
            return _Scope(owner=await _known_client(runtime, target.name))
        case "subject":
            if target.name.startswith("cli_"):
                return _Scope(owner=await _known_client(runtime, target.name))
            return _Scope(owner=(await find_user(runtime, target.name)).user_id)


def _of_hit(hit: Hit | None) -> _Scope:
    if hit is None:
        raise NotFound("there is no such token")
    if hit.token.kind is Kind.REFRESH:  # it takes its grant with it
        return _Scope(grant_id="grt_" + hit.token.grant_id.hex())
    return _Scope(token_id=hit.token_id)


async def _by_string(runtime: Runtime, token: str) -> Hit | None:
    if not well_formed(token):
        raise InvalidRequest("token is not a token of this ledger", fix="send it whole, without blanks")
    digest = sha256(token)
    hit, _ = runtime.view.look_up(digest)
    if hit is None:
        await runtime.view_at_end()
        hit, _ = runtime.view.look_up(digest)
    return hit


async def _by_id(runtime: Runtime, token_id: str) -> Hit | None:
    if not is_id(token_id, "tok"):
        return None
    hit = runtime.view.hit(token_id)
    if hit is None:
        await runtime.view_at_end()
        hit = runtime.view.hit(token_id)
    return hit


async def _known_client(runtime: Runtime, client_id: str) -> str:
    if runtime.view.client(client_id) is None:
        await runtime.view_at_end()
        if runtime.view.client(client_id) is None:
            raise NotFound("there is no such client")
    return client_id


async def _count(
    runtime: Runtime, scope: _Scope, *, before: Cut | None = None, until_seq: int | None = None
) -> tuple[int, int]:
    """Grants and tokens that are good now; with `until_seq`, those that the owner's cut-off at it has ended.

    `before`: the owner's cut-off that was in force until then.
    """
    moment = now()
    grants: set[bytes] = set()
    tokens = 0
    async for hit in _hits(runtime, scope):
        if until_seq is not None:
            known = facts(hit.grant)
            if known is None or known.first_seq > until_seq:
                continue
            hit = _with_cut(hit, scope.owner or "", before)  # noqa: PLW2901
        if ending_of(hit, moment=moment).status == "active":
            tokens += 1
            grants.add(hit.token.grant_id)
    return len(grants), tokens


def _with_cut(hit: Hit, owner: str, cut: Cut | None) -> Hit:
    return replace(hit, client_cut=cut) if owner.startswith("cli_") else replace(hit, subject_cut=cut)


async def _hits(runtime: Runtime, scope: _Scope) -> AsyncIterator[Hit]:
    """Every token of the scope. Others may have their turn in between."""
    if scope.token_id is not None:
        hit = runtime.view.hit(scope.token_id)
        if hit is not None:
            yield hit
        return
    index: dict[str, str] = {}
    if scope.grant_id is not None:
        index["grant_id"] = scope.grant_id
    elif scope.owner is not None:
        index["client_id" if scope.owner.startswith("cli_") else "subject"] = scope.owner
    after: str | None = None
    for _ in range(_COUNTED_MAX // _SLICE):
        token_ids = runtime.view.token_ids(after=after, limit=_SLICE, **index)
        for token_id in token_ids:
            hit = runtime.view.hit(token_id)
            if hit is not None:
                yield hit
        if len(token_ids) < _SLICE:
            return
        after = token_ids[-1]
        await asyncio.sleep(0)
