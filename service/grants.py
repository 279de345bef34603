"""Commands about tokens and grants: issue, rotate, revoke. What they append is decided in `rules/grants.py`."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Any

from msgspec import Struct

from events.errors import LedgerError
from events.ledger import Append
from events.types import (
    TENANT,
    ClientRevoked,
    Kind,
    LedgerEvent,
    MintedToken,
    Reason,
    SubjectRevoked,
    TokenIssued,
)
from projections.grants import ActiveGrant, Family, Token, facts
from projections.registry import Client, User
from service.caller import Caller
from service.commands import (
    Prepared,
    check_confers,
    execute,
    expand,
    known_scopes,
    load_family,
    load_row,
    raw_id,
    refused,
    subject,
)
from service.errors import Gone, InvalidRequest, InvalidScope, InvalidTarget, NotFound, Unavailable
from service.rules.grants import (
    RevokeGrant,
    RevokeToken,
    RotateToken,
    Stamp,
    check_may_rotate,
    decide_revoke_grant,
    decide_revoke_token,
    decide_rotate,
    granted_scope,
    head,
)
from service.runtime import Runtime
from service.tokens import TOKEN_CHARS_MAX, mint_kind, new_id, now, sha256, uuid7_hex

PERSONAL_TTL_SECONDS = 90 * 86_400
PERSONAL_TTL_SECONDS_MAX = 366 * 86_400


def whole_second(moment: datetime) -> datetime:
    """Expiries are whole seconds, so that `exp` of a JWT and the ledger agree."""
    return moment.replace(microsecond=0)


def stamp(by: str, request_id: str | None, *, events: int = 1) -> Stamp:
    """Fresh event ids and the time, for one command."""
    return Stamp(tuple(uuid7_hex() for _ in range(events)), now(), by, request_id)


class IssueToken(Struct, frozen=True, kw_only=True):
    """A PAT for a person or a SAT for a service user. `user` is a user id or a username; empty audience means any."""

    kind: Kind
    user: str
    name: str
    scope: str | None = None
    expires_in_seconds: int = PERSONAL_TTL_SECONDS
    audience: tuple[str, ...] = ()
    allowed_ips: tuple[str, ...] = ()


async def find_user(runtime: Runtime, user: str) -> User:
    """The user with this id or username. Raises: NotFound, Unavailable."""
    for attempt in range(2):
        found = runtime.view.user(user)
        if found is None:
            row = runtime.view.row("username", runtime.master.username_hash(user).encode())
            found = runtime.view.user(row.user_id) if row is not None and hasattr(row, "user_id") else None
        if found is not None:
            return found
        if attempt == 0:
            await runtime.view_at_end()
    raise NotFound("there is no user with this id or username")


async def prepare_issue(
    runtime: Runtime, caller: Caller | None, request: IssueToken, *, request_id: str | None = None
) -> Prepared:
    """A new PAT or SAT. Raises: NotFound, Gone, InvalidRequest, InvalidScope, InsufficientScope, Unavailable."""
    user = await find_user(runtime, request.user)
    if user.disabled_at is not None:
        raise Gone("the user is disabled", fix="issue tokens for an active user")
    wanted = "person" if request.kind is Kind.PAT else "service"
    if user.kind != wanted:
        raise InvalidRequest(f"a {request.kind.value} is for a {wanted} user and this is a {user.kind} user")
    scopes = known_scopes(runtime)
    disabled = frozenset(name for name, row in scopes.items() if row.disabled_at is not None)
    asked = expand(scopes, request.scope) if request.scope else None
    scope = granted_scope(asked, expand(scopes, user.scope), disabled=disabled)
    check_confers(caller, scope, through="the token")
    token = mint_kind(request.kind)
    mark = stamp(caller.token_id if caller else "system", request_id)
    expires_at = whole_second(mark.at + timedelta(seconds=request.expires_in_seconds))
    minted = minted_token(token, request.kind, scope, request.audience, expires_at)
    event = TokenIssued(
        **head(mark),
        grant_id=new_id("grt"),
        subject=user.user_id,
        client_id=None,
        scope=scope,
        audience=request.audience,
        tokens=(minted,),
        allowed_ips=request.allowed_ips,
        sealed_name=await seal_text(runtime, user.user_id, request.name, "token name"),
    )
    return Prepared((Append(subject("grant", event.grant_id), event, 0),), _shown_once(event, token, request.name))


def minted_token(token: str, kind: Kind, scope: str, audience: tuple[str, ...], expires_at: datetime) -> MintedToken:
    """What the ledger keeps of a reference token."""
    return MintedToken(
        token_id=new_id("tok"),
        sha256=sha256(token).hex(),
        kind=kind,
        scope=scope,
        audience=audience,
        expires_at=expires_at,
    )


def _shown_once(event: TokenIssued, token: str, name: str | None) -> dict[str, Any]:
    minted = event.tokens[0]
    answer = {
        "token": token,
        "token_id": minted.token_id,
        "grant_id": event.grant_id,
        "kind": minted.kind.value,
        "subject": event.subject,
        "name": name,
        "scope": event.scope,
        "audience": list(event.audience) or None,
        "allowed_ips": list(event.allowed_ips) or None,
        "issued_at": timestamp(event.occurred_at),
        "expires_at": timestamp(minted.expires_at),
        "rotated_from": event.rotated_from,
    }
    return {key: value for key, value in answer.items() if value is not None}


def timestamp(moment: datetime) -> str:
    """RFC 3339, UTC, with a Z."""
    return moment.isoformat().replace("+00:00", "Z")


async def seal_text(runtime: Runtime, owner: str, text: str | None, context: str) -> bytes | None:
    """Seals text about a person or client under their own key; None for an erased one. Raises: Unavailable."""
    user = runtime.view.user(owner)
    if text is None or (user is not None and user.erased_at is not None):
        return None
    try:
        return await runtime.subject_keys.seal(owner, text, context)
    except LedgerError as error:
        raise refused(error) from error


async def prepare_rotate(
    runtime: Runtime,
    caller: Caller,
    token_id: str,
    overlap_seconds: int,
    *,
    fresh: bool,
    request_id: str | None = None,
) -> Prepared:
    """A successor for a PAT or SAT, which ends after the overlap.

    The successor lives as long as the old one was to live, and has of its scope what the user still has.

    Raises: NotFound, Gone, InvalidRequest, InsufficientScope, Unavailable.
    """
    hit = runtime.view.hit(token_id)
    if hit is None:
        await runtime.view_at_end()
        hit = runtime.view.hit(token_id)
    if hit is None:
        raise NotFound("there is no such token")
    grant_id = "grt_" + hit.token.grant_id.hex()
    try:
        family = await load_family(runtime, grant_id, (token_id,), fresh=fresh)
    except LedgerError as error:
        raise refused(error) from error
    known = facts(family.grant)
    old = family.tokens.get(token_id)
    if known is None or old is None:
        raise NotFound("there is no such token")
    check_may_rotate(old)
    _check_owner_is_active(runtime, known)
    scopes = known_scopes(runtime)
    disabled = frozenset(name for name, row in scopes.items() if row.disabled_at is not None)
    held = expand(scopes, (await find_user(runtime, known.subject)).scope)
    scope = granted_scope(None, known.scope, held, disabled=disabled)
    check_confers(caller, scope, through="the successor")
    token = mint_kind(old.kind)
    mark = stamp(caller.token_id, request_id, events=2)
    name = await runtime.subject_keys.unseal(known.subject, known.sealed_name, "token name")
    lifetime = await _lifetime(runtime, token_id, old)
    successor = minted_token(token, old.kind, scope, known.audience, whole_second(mark.at + lifetime))
    command = RotateToken(
        stamp=mark,
        grant_id=grant_id,
        token_id=token_id,
        successor_grant_id=new_id("grt"),
        successor=successor,
        overlap=timedelta(seconds=overlap_seconds),
        sealed_name=await seal_text(runtime, known.subject, name, "token name"),
    )
    issued, superseded = decide_rotate(command, family, now=mark.at)
    entries = (
        Append(subject("grant", issued.grant_id), issued, 0),
        Append(subject("grant", grant_id), superseded, family.seq),
    )
    return Prepared(entries, _shown_once(issued, token, name))


async def _lifetime(runtime: Runtime, token_id: str, token: Token) -> timedelta:
    """How long the token was to live when it was issued: one that was rotated before ends sooner than that."""
    try:
        issued = await runtime.ledger.get(token.issued_seq)
    except LedgerError as error:
        raise refused(error) from error
    if issued is not None and isinstance(issued.event, TokenIssued):
        for minted in issued.event.tokens:
            if minted.token_id == token_id:
                return minted.expires_at - whole_second(issued.event.occurred_at)
    return token.expires_at - token.issued_at


def _check_owner_is_active(runtime: Runtime, grant: ActiveGrant) -> None:
    cut = runtime.view.cut(grant.subject)
    if cut is not None and (cut.disabled or cut.seq > grant.first_seq):
        raise Gone("the token has ended", fix="issue a new one")


async def end_behind_cut_off(runtime: Runtime, by: str, answer: dict[str, Any], request_id: str) -> None:
    """Ends a successor that stands behind a cut-off of its owner, which `prepare_rotate` could not know of yet.

    The view has both by now. Raises: Gone; Unavailable.
    """
    old = runtime.view.hit(answer["rotated_from"])
    known = facts(old.grant) if old is not None else None
    if known is None:
        return
    try:
        _check_owner_is_active(runtime, known)
    except Gone:
        cut = runtime.view.cut(known.subject)
        assert cut is not None
        await revoke_token(runtime, by, answer["token_id"], cut.reason, None, request_id=request_id)
        raise


class TokenAnswer(Struct, frozen=True, omit_defaults=True):
    """RFC 6749 §5.1."""

    access_token: str
    token_type: str
    expires_in: int
    scope: str
    refresh_token: str | None = None


def check_resources(client: Client, resources: tuple[str, ...], issuer: str) -> tuple[str, ...]:
    """The audience of an access token: what was asked for with `resource` (RFC 8707), else all of the client's.

    Raises: InvalidTarget.
    """
    allowed = client.metadata.audience or (issuer,)
    wrong = [name for name in resources if name not in allowed]
    if wrong:
        raise InvalidTarget("the client may not ask for tokens for this resource")
    return tuple(dict.fromkeys(resources)) or allowed


class AccessFor(Struct, frozen=True):
    """What an access token is about. `audience` is not empty."""

    grant_id: str
    subject: str
    scope: str
    audience: tuple[str, ...]


async def mint_access(runtime: Runtime, client: Client, grant: AccessFor, at: datetime) -> tuple[str, MintedToken]:
    """A new access token, opaque or a JWT (RFC 9068 §2.2), and what the ledger keeps of it. Raises: LedgerError."""
    expires_at = whole_second(at) + timedelta(seconds=client.metadata.access_token_ttl_seconds)
    if client.metadata.access_token_format != "jwt":
        token = mint_kind(Kind.ACCESS)
        return token, minted_token(token, Kind.ACCESS, grant.scope, grant.audience, expires_at)
    token_id = new_id("tok")
    claims = {
        "iss": runtime.settings.issuer,
        "sub": grant.subject,
        "aud": grant.audience[0] if len(grant.audience) == 1 else list(grant.audience),
        "exp": int(expires_at.timestamp()),
        "iat": int(at.timestamp()),
        "jti": token_id,
        "client_id": client.client_id,
        "scope": grant.scope,
        "grant_id": grant.grant_id,
    }
    token, kid = await runtime.signing_keys.sign(claims)
    if len(token) > TOKEN_CHARS_MAX:
        raise InvalidScope(f"the token would be longer than {TOKEN_CHARS_MAX} characters", fix="ask for fewer scopes")
    minted = MintedToken(
        token_id=token_id,
        sha256=hashlib.sha256(token.encode()).hexdigest(),
        kind=Kind.ACCESS,
        scope=grant.scope,
        audience=grant.audience,
        expires_at=expires_at,
        kid=kid,
    )
    return token, minted


def check_stands(runtime: Runtime, client: Client) -> None:
    """Whether the client has not been cut off since it proved who it is, as far as this host's view knows by now.

    Raises: Unavailable.
    """
    cut = runtime.view.cut(client.client_id)
    if cut is not None and cut.seq > client.seq:
        raise _cut_off_meanwhile()


def _cut_off_meanwhile() -> Unavailable:
    return Unavailable("what the client had was revoked at this moment", fix="repeat the request")


async def client_credentials(
    runtime: Runtime, client: Client, requested: str | None, resources: tuple[str, ...], request_id: str
) -> TokenAnswer:
    """RFC 6749 §4.4. A refresh token comes with it exactly if the client's grant_types name `refresh_token`.

    Raises: InvalidScope, InvalidTarget, Unavailable.
    """
    metadata = client.metadata
    scopes = known_scopes(runtime)
    disabled = frozenset(name for name, row in scopes.items() if row.disabled_at is not None)
    asked = expand(scopes, requested) if requested else None
    scope = granted_scope(asked, expand(scopes, metadata.scope), disabled=disabled)
    audience = check_resources(client, resources, runtime.settings.issuer)
    mark = stamp(client.client_id, request_id)
    grant_id = new_id("grt")
    try:
        about = AccessFor(grant_id, client.client_id, scope, audience)
        access, minted = await mint_access(runtime, client, about, mark.at)
        tokens: tuple[MintedToken, ...] = (minted,)
        refresh, ends_at = None, None
        if "refresh_token" in metadata.grant_types:
            refresh = mint_kind(Kind.REFRESH)
            ends_at = whole_second(mark.at) + timedelta(seconds=metadata.refresh_token_max_ttl_seconds)
            idle = whole_second(mark.at) + timedelta(seconds=metadata.refresh_token_idle_ttl_seconds)
            tokens = (minted, minted_token(refresh, Kind.REFRESH, scope, audience, min(idle, ends_at)))
        event = TokenIssued(
            **head(mark),
            grant_id=grant_id,
            subject=client.client_id,
            client_id=client.client_id,
            scope=scope,
            audience=audience,
            tokens=tokens,
            refresh_idle_ttl_seconds=metadata.refresh_token_idle_ttl_seconds if refresh else None,
            refresh_ends_at=ends_at,
        )
        entry = (
            Append(subject("grant", grant_id), event, 0)
            if refresh
            # Access-only grants need no compare-and-set, and a subject each would cost the server memory for ever.
            else Append(f"ledger.{TENANT}.access.{client.client_id}", event)
        )
        (seq,) = await runtime.ledger.append(entry)
    except LedgerError as error:
        raise refused(error) from error
    await runtime.applied(seq, hurry=False)
    cut = runtime.view.cut(client.client_id)
    if cut is not None and (cut.disabled or cut.seq > client.seq):
        await revoke_grant(runtime, "system", grant_id, cut.reason, None, request_id=request_id)
        raise _cut_off_meanwhile()
    return TokenAnswer(access, "Bearer", metadata.access_token_ttl_seconds, scope, refresh)


class Revoked(Struct, frozen=True):
    """What a revocation did. `at` and `seq` are those of the first one, should there have been one before."""

    at: datetime
    seq: int
    grants: int = 0
    tokens: int = 0


async def revoke_token(
    runtime: Runtime, by: str, token_id: str, reason: Reason, comment: str | None, *, request_id: str | None = None
) -> Revoked:
    """Ends one token (a refresh token: its grant), durably and on this host, before it returns.

    Raises: NotFound, Unavailable; NotYetApplied, an Unavailable that names the sequence.
    """
    hit = runtime.view.hit(token_id)
    if hit is None:
        await runtime.view_at_end()
        hit = runtime.view.hit(token_id)
    if hit is None:
        raise NotFound("there is no such token")
    grant_id = "grt_" + hit.token.grant_id.hex()
    known = facts(hit.grant)
    owner = known.subject if known else ""
    command = RevokeToken(
        stamp=stamp(by, request_id),
        grant_id=grant_id,
        token_id=token_id,
        reason=reason,
        sealed_comment=await seal_text(runtime, owner, comment, "comment"),
    )
    return await _end(
        runtime, grant_id, (token_id,), lambda family: decide_revoke_token(command, family), token_id=token_id
    )


async def revoke_grant(
    runtime: Runtime, by: str, grant_id: str, reason: Reason, comment: str | None, *, request_id: str | None = None
) -> Revoked:
    """Ends a grant and every token of it. Raises: NotFound, Unavailable."""
    known = facts(runtime.view.family(grant_id).grant)
    if known is None:
        await runtime.view_at_end()
        known = facts(runtime.view.family(grant_id).grant)
    if known is None:
        raise NotFound("there is no such grant")
    command = RevokeGrant(
        stamp=stamp(by, request_id),
        grant_id=grant_id,
        reason=reason,
        sealed_comment=await seal_text(runtime, known.subject, comment, "comment"),
    )
    return await _end(runtime, grant_id, (), lambda family: decide_revoke_grant(command, family))


async def _end(
    runtime: Runtime, grant_id: str, token_ids: tuple[str, ...], decide: Any, *, token_id: str | None = None
) -> Revoked:
    async def load(fresh: bool) -> Family:
        return await load_family(runtime, grant_id, token_ids, fresh=fresh)

    def entries(family: Family) -> list[Append]:
        return [Append(subject("grant", grant_id), event, family.seq) for event in decide(family)]

    outcome = await execute(runtime, load, entries)
    await runtime.applied(outcome.seq)
    family = runtime.view.family(grant_id, token_ids)
    token = family.tokens.get(token_id) if token_id else None
    ended = (token.ended if token else None) or getattr(family.grant, "ended", None)
    if ended is None:  # the state that was decided on is not in this host's view yet
        raise Unavailable("the revocation is recorded and not yet in force on this host; repeat the request")
    return Revoked(ended.at, ended.seq)


async def revoke_owner(
    runtime: Runtime,
    by: str,
    owner: str,
    reason: Reason,
    comment: str | None,
    *,
    request_id: str | None = None,
) -> int:
    """Ends every token of a client or user whose grant began before; returns the sequence.

    Raises: NotFound, Unavailable.
    """
    client = owner.startswith("cli_")
    table, of = ("client", subject("client", owner)) if client else ("user", subject("user", owner))
    if (runtime.view.client(owner) if client else runtime.view.user(owner)) is None:
        raise NotFound("there is no such client" if client else "there is no such user")
    mark = stamp(by, request_id)
    sealed = await seal_text(runtime, owner, comment, "comment")

    async def load(fresh: bool) -> Client | User | None:
        row = await load_row(runtime, table, raw_id(owner), of, fresh=fresh)
        return row if isinstance(row, Client | User) else None

    def decide(row: Client | User | None) -> list[Append]:
        if row is None:
            raise NotFound("it is not there")
        event: LedgerEvent
        if client:
            event = ClientRevoked(**head(mark), client_id=owner, reason=reason, sealed_comment=sealed)
        else:
            event = SubjectRevoked(**head(mark), user_id=owner, reason=reason, sealed_comment=sealed)
        return [Append(of, event, row.seq)]

    outcome = await execute(runtime, load, decide)
    await runtime.applied(outcome.seq)
    return outcome.seq


__all__ = [
    "IssueToken",
    "Revoked",
    "TokenAnswer",
    "client_credentials",
    "find_user",
    "prepare_issue",
    "prepare_rotate",
    "revoke_grant",
    "revoke_owner",
    "revoke_token",
    "timestamp",
]
