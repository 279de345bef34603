"""The fold of one grant: a subject's gift to a client, and the tokens that belong to it.

Pure and total: `evolve` never raises, logs or reads a clock. The current-token view stores what this fold returns,
and commands decide on it, so that both always agree on what is true.
"""

from __future__ import annotations

from datetime import datetime
from typing import assert_never

from msgspec import Struct
from msgspec.structs import replace

from events.types import (
    AccessRenewed,
    AuthorizationGranted,
    CodeRedeemed,
    CodeRefused,
    CodeReplayed,
    GrantRevoked,
    Kind,
    Reason,
    Recorded,
    RefreshReplayed,
    TokenIssued,
    TokenRefreshed,
    TokenRevoked,
    TokenSuperseded,
)

GrantEvent = (
    TokenIssued
    | AuthorizationGranted
    | CodeRedeemed
    | CodeRefused
    | CodeReplayed
    | AccessRenewed
    | TokenRefreshed
    | RefreshReplayed
    | TokenRevoked
    | TokenSuperseded
    | GrantRevoked
)
Minting = TokenIssued | CodeRedeemed | AccessRenewed | TokenRefreshed


class Ended(Struct, frozen=True, array_like=True, gc=False):
    """How something was revoked. `seq` is the sequence of the event, `at` its recorded time."""

    seq: int
    at: datetime
    reason: Reason


class Token(Struct, frozen=True, array_like=True, gc=False):
    """One token. `scope` and `audience` are None where they are the grant's own; `sha256` is raw, 32 bytes."""

    grant_id: bytes
    kind: Kind
    sha256: bytes
    issued_at: datetime
    expires_at: datetime
    issued_seq: int
    kid: str | None = None
    scope: str | None = None
    audience: tuple[str, ...] | None = None
    ended: Ended | None = None


class Spent(Struct, frozen=True, array_like=True, gc=False):
    """The refresh token before the current one: who lost the response may still ask for the same answer."""

    token_id: str
    answer_id: str
    at: datetime


class RefreshChain(Struct, frozen=True, array_like=True, gc=False):
    """RFC 9700 §4.14.2. `current` is the only refresh token that may still be spent."""

    current: str
    idle_ttl_seconds: int
    ends_at: datetime
    previous: Spent | None = None


class ByCode(Struct, frozen=True, array_like=True, gc=False):
    """How a person gave the grant: RFC 6749 §4.1. `offline`: it outlives the session that it was given in.

    `redeemed_at`: when the code was spent, by the log's clock; None until then. `refusals`: how often it was presented
    without its verifier since. `consent_seq`, `client_seq`: of what it was given by, as it stood; 0 if not known.
    """

    code_id: str
    session_id: str
    auth_time: datetime
    offline: bool
    redirect_uri: str
    code_challenge: str
    redeemed_at: datetime | None = None
    refusals: int = 0
    consent_seq: int = 0
    client_seq: int = 0


class NoGrant(Struct, frozen=True, array_like=True, gc=False, tag=0):
    """Nothing is recorded."""


class ActiveGrant(Struct, frozen=True, array_like=True, gc=False, tag=1):
    """`first_seq` is the sequence of the grant's first event: cut-offs are compared with it, and with nothing later,
    so that a refresh cannot carry a family across one."""

    subject: str
    client_id: str | None
    scope: str
    audience: tuple[str, ...]
    first_seq: int
    allowed_ips: tuple[str, ...] = ()
    refresh: RefreshChain | None = None
    sealed_name: bytes | None = None
    rotated_from: str | None = None
    by_code: ByCode | None = None


class AuthorizedGrant(Struct, frozen=True, array_like=True, gc=False, tag=3):
    """A person has granted, and the code is not redeemed yet. `becomes`: the grant as it is then, without its tokens.

    `refusals`: how often the code was presented without its proofs.
    """

    becomes: ActiveGrant
    expires_at: datetime
    response_type: str
    sealed_nonce: bytes | None = None
    refusals: int = 0


class RevokedGrant(Struct, frozen=True, array_like=True, gc=False, tag=2):
    """Terminal: no later event revives it. `was` is None when the revocation is all that is known."""

    ended: Ended
    was: ActiveGrant | None


Grant = NoGrant | ActiveGrant | RevokedGrant | AuthorizedGrant


class Family(Struct, frozen=True, gc=False):
    """A grant and those of its tokens that were loaded, by token id.

    `seq`: the last sequence of the grant's own subject, 0 if it has none yet; what the next append there expects.
    """

    grant: Grant
    tokens: dict[str, Token]
    seq: int = 0


EMPTY = Family(NoGrant(), {})


def facts(grant: Grant) -> ActiveGrant | None:
    """What the grant is or was, whatever its state."""
    match grant:
        case ActiveGrant():
            return grant
        case AuthorizedGrant(becomes=becomes):
            return becomes
        case RevokedGrant(was=was):
            return was
        case NoGrant():
            return None
        case _:
            assert_never(grant)


def evolve(family: Family, recorded: Recorded) -> Family:
    """The family after one more event. Events of other families are the caller's mistake and change nothing."""
    event = recorded.event
    seq = recorded.seq if ".grant." in recorded.subject else family.seq
    match event:
        case TokenIssued():
            return Family(_begun(family.grant, event, recorded), family.tokens | _minted(family, recorded, event), seq)
        case AuthorizationGranted():
            return Family(_authorized(family.grant, event, recorded), family.tokens, seq)
        case CodeRedeemed():
            grant = _redeemed(family.grant, event, recorded)
            return Family(grant, family.tokens | _minted(family, recorded, event), seq)
        case CodeRefused():
            return Family(_refused(family.grant), family.tokens, seq)
        case AccessRenewed():
            tokens = family.tokens | _minted(family, recorded, event)
            token = tokens.get(event.refresh_token_id)
            if token is not None and event.refresh_expires_at > token.expires_at:
                tokens[event.refresh_token_id] = replace(token, expires_at=event.refresh_expires_at)
            return Family(family.grant, tokens, seq)
        case TokenRefreshed():
            grant = _refreshed(family.grant, event, recorded)
            return Family(grant, family.tokens | _minted(family, recorded, event), seq)
        case TokenRevoked():
            token = family.tokens.get(event.token_id)
            tokens = family.tokens
            if token is not None and token.ended is None:
                ended = Ended(recorded.seq, recorded.recorded_at, event.reason)
                tokens = tokens | {event.token_id: replace(token, ended=ended)}
            return Family(family.grant, tokens, seq)
        case TokenSuperseded():
            token = family.tokens.get(event.token_id)
            tokens = family.tokens
            if token is not None and event.ends_at < token.expires_at:
                tokens = tokens | {event.token_id: replace(token, expires_at=event.ends_at)}
            return Family(family.grant, tokens, seq)
        case GrantRevoked():
            if isinstance(family.grant, RevokedGrant):
                return Family(family.grant, family.tokens, seq)
            ended = Ended(recorded.seq, recorded.recorded_at, event.reason)
            return Family(RevokedGrant(ended, facts(family.grant)), family.tokens, seq)
        case _:  # a replay is on record; the revocation that may follow is an event of its own
            return Family(family.grant, family.tokens, seq)


def _chain(event: TokenIssued | CodeRedeemed) -> RefreshChain | None:
    refresh = None
    for minted in event.tokens:
        if minted.kind is Kind.REFRESH and event.refresh_ends_at is not None:
            refresh = RefreshChain(minted.token_id, event.refresh_idle_ttl_seconds or 0, event.refresh_ends_at)
    return refresh


def _begun(grant: Grant, event: TokenIssued, recorded: Recorded) -> Grant:
    active = ActiveGrant(
        event.subject,
        event.client_id,
        event.scope,
        event.audience,
        recorded.seq,
        event.allowed_ips,
        _chain(event),
        event.sealed_name,
        event.rotated_from,
    )
    match grant:
        case NoGrant():
            return active
        case RevokedGrant(was=None):
            return RevokedGrant(grant.ended, active)
        case _:
            return grant


def _authorized(grant: Grant, event: AuthorizationGranted, recorded: Recorded) -> Grant:
    by_code = ByCode(
        event.code.token_id,
        event.session_id,
        event.auth_time,
        event.offline,
        event.redirect_uri,
        event.code_challenge,
        consent_seq=event.consent_seq,
        client_seq=event.client_seq,
    )
    becomes = ActiveGrant(event.subject, event.client_id, event.scope, event.audience, recorded.seq, by_code=by_code)
    match grant:
        case NoGrant():
            return AuthorizedGrant(becomes, event.code.expires_at, event.response_type, event.sealed_nonce)
        case RevokedGrant(was=None):
            return RevokedGrant(grant.ended, becomes)
        case _:
            return grant


def _redeemed(grant: Grant, event: CodeRedeemed, recorded: Recorded) -> Grant:
    match grant:
        case AuthorizedGrant(becomes=ActiveGrant(by_code=ByCode() as by_code) as becomes):
            by_code = replace(by_code, redeemed_at=recorded.recorded_at)
            return replace(becomes, refresh=_chain(event), by_code=by_code)
        case _:
            return grant


def _refused(grant: Grant) -> Grant:
    match grant:
        case AuthorizedGrant():
            return replace(grant, refusals=grant.refusals + 1)
        case ActiveGrant(by_code=ByCode() as by_code):
            return replace(grant, by_code=replace(by_code, refusals=by_code.refusals + 1))
        case _:
            return grant


def _refreshed(grant: Grant, event: TokenRefreshed, recorded: Recorded) -> Grant:
    match grant:
        case ActiveGrant(refresh=RefreshChain() as chain):
            current = next((token.token_id for token in event.tokens if token.kind is Kind.REFRESH), chain.current)
            spent = Spent(event.spent_token_id, event.answer_id, recorded.recorded_at)
            return replace(grant, refresh=replace(chain, current=current, previous=spent))
        case _:
            return grant


def _minted(family: Family, recorded: Recorded, event: Minting) -> dict[str, Token]:
    grant_id = bytes.fromhex(event.grant_id[4:])
    # A token that has the grant's scope and audience does not repeat them.
    same: tuple[str | None, tuple[str, ...] | None] = (None, None)
    if isinstance(event, TokenIssued):
        same = (event.scope, event.audience)
    elif isinstance(event, CodeRedeemed | AccessRenewed) and (known := facts(family.grant)) is not None:
        same = (known.scope, known.audience)
    return {
        minted.token_id: Token(
            grant_id,
            minted.kind,
            bytes.fromhex(minted.sha256),
            event.occurred_at,
            minted.expires_at,
            recorded.seq,
            minted.kid,
            None if minted.scope == same[0] else minted.scope,
            None if minted.audience == same[1] else minted.audience,
        )
        for minted in event.tokens
    }
