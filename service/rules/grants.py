"""The rules of tokens and grants. Pure: ids, hashes and times come in, events or a refusal come out."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from msgspec import Struct

from events.types import (
    AccessRenewed,
    GrantRevoked,
    Kind,
    LedgerEvent,
    MintedToken,
    Reason,
    RefreshReplayed,
    TokenIssued,
    TokenRefreshed,
    TokenRevoked,
    TokenSuperseded,
)
from projections.grants import ActiveGrant, Family, RefreshChain, RevokedGrant, Token, facts
from projections.registry import Consent, Cut, Session
from service.errors import Gone, InvalidGrant, InvalidRequest, InvalidScope, NotFound


class Stamp(Struct, frozen=True):
    """What every event of one command carries. `ids`: fresh event ids, as many as the command may need."""

    ids: tuple[str, ...]
    at: datetime
    by: str
    request_id: str | None


def head(stamp: Stamp, number: int = 0, *, by: str = "") -> dict[str, Any]:
    """The fields that every event has, of the command's first one if no number is given."""
    return {"id": stamp.ids[number], "occurred_at": stamp.at, "by": by or stamp.by, "request_id": stamp.request_id}


def is_cut_off(grant: ActiveGrant, *cuts: Cut | None) -> bool:
    """Whether a client or user that the grant depends on was disabled, or revoked after the grant began."""
    return any(cut is not None and (cut.disabled or cut.seq > grant.first_seq) for cut in cuts)


class Person(Struct, frozen=True):
    """What is known of the person behind a grant: what they allow its client, the session that it was given in, and
    what cut them off last.

    None where there is none, or none any more.
    """

    consent: Consent | None = None
    session: Session | None = None
    cut: Cut | None = None


NOBODY = Person()


def is_taken_back(grant: ActiveGrant, person: Person) -> bool:
    """Whether what the grant was given by was taken back: the consent, or the session, which an offline grant outlives.

    Also where that was done just before the grant began: between the look at session and consent and the grant's place
    in the log there is room for others. A view that has the grant has everything before it. A consent that was given
    again since does not bring back what was granted by the one before.
    """
    consent, session, cut = person.consent, person.session, person.cut
    if consent is not None and (was_withdrawn(consent.withdrawn_seq, grant) or not _covers(consent, grant)):
        return True
    if grant.by_code is None or session is None:
        return False
    if cut is not None and (cut.disabled or cut.seq > session.user_seq):
        return True
    ended = session.reason in {"signed_out", "admin"}
    return ended and (session.seq < grant.first_seq or not grant.by_code.offline)


def was_withdrawn(withdrawn_seq: int, grant: ActiveGrant) -> bool:
    """Whether that withdrawal is of the consent that gave the grant, wherever in the log the grant came to stand."""
    given_by = grant.by_code.consent_seq if grant.by_code is not None else 0
    return withdrawn_seq > (given_by or grant.first_seq)


def _covers(consent: Consent, grant: ActiveGrant) -> bool:
    withdrawn = consent.withdrawn_seq == consent.seq
    return not withdrawn and set(grant.scope.split()) <= set(consent.scope.split())


def granted_scope(requested: str | None, *held: str, disabled: frozenset[str] = frozenset()) -> str:
    """What is granted of `requested`, given what client and subject hold (each already expanded).

    Nothing requested means all that every holder has. Source: RFC 6749 §3.3.

    Raises: InvalidScope naming what cannot be granted.
    """
    holdings = [set(scope.split()) - disabled for scope in held]
    if not requested:
        first = held[0].split() if held else []
        return " ".join(name for name in first if all(name in holding for holding in holdings))
    missing = [name for name in requested.split() if not all(name in holding for holding in holdings)]
    if missing:
        raise InvalidScope(f"these scopes cannot be granted: {' '.join(missing)}", fix="ask for less, or for nothing")
    return requested


class Refresh(Struct, frozen=True, kw_only=True):
    """A refresh token is presented (RFC 6749 §6). Tokens and the sealed answer were made before the decision."""

    stamp: Stamp
    grant_id: str
    token_id: str
    client_id: str
    tokens: tuple[MintedToken, ...]
    answer_id: str
    retry_window: timedelta


class Rotated(Struct, frozen=True):
    """The presented token is the current one: these events spend it."""

    events: tuple[LedgerEvent, ...]


class AnsweredAgain(Struct, frozen=True):
    """The presented token was spent a moment ago, and its successor is unused: the same answer is given again."""

    answer_id: str
    events: tuple[LedgerEvent, ...]


class ReuseDetected(Struct, frozen=True):
    """A token that was spent long ago, or whose successor is in use: somebody else has it. The grant ends."""

    events: tuple[LedgerEvent, ...]


def check_refreshable(
    command: Refresh,
    family: Family,
    *,
    client_cut: Cut | None,
    subject_cut: Cut | None,
    person: Person = NOBODY,
) -> tuple[ActiveGrant, RefreshChain]:
    """The grant and its chain, if the presented token may be looked at at all.

    Raises: InvalidGrant. One description for every cause: RFC 6749 §5.2 tells the client no more.
    """
    now = command.stamp.at
    token = family.tokens.get(command.token_id)
    grant = family.grant
    if not isinstance(grant, ActiveGrant) or grant.refresh is None or token is None:
        raise _invalid_grant("revoked" if isinstance(grant, RevokedGrant) else "no such grant")
    if grant.client_id != command.client_id:
        raise _invalid_grant("issued to another client")
    if is_cut_off(grant, client_cut, subject_cut):
        raise _invalid_grant("client or subject revoked")
    if is_taken_back(grant, person):
        raise _invalid_grant("taken back by the person")
    if token.ended is not None:
        raise _invalid_grant("token revoked")
    # When a spent token would have expired does not matter: it is answered again, or gives away who has it.
    if now >= grant.refresh.ends_at or (grant.refresh.current == command.token_id and now >= token.expires_at):
        raise _invalid_grant("expired")
    return grant, grant.refresh


def decide_refresh(command: Refresh, chain: RefreshChain) -> Rotated | AnsweredAgain | ReuseDetected:
    """What happens to a presented refresh token. RFC 9700 §4.14.2, with a bounded window for lost responses."""
    stamp, now = command.stamp, command.stamp.at
    if chain.current == command.token_id:
        event = TokenRefreshed(
            **head(stamp),
            grant_id=command.grant_id,
            spent_token_id=command.token_id,
            answer_id=command.answer_id,
            tokens=command.tokens,
        )
        return Rotated((event,))
    previous = chain.previous
    # Only the token just before the current one: once the successor was spent, it is known to have arrived.
    # Strict is strict even if the log's clock is ahead of this host's.
    again = (
        previous is not None
        and previous.token_id == command.token_id
        and command.retry_window > timedelta(0)
        and now < previous.at + command.retry_window
    )
    replayed = RefreshReplayed(
        **head(stamp),
        grant_id=command.grant_id,
        token_id=command.token_id,
        answered=again,
    )
    if again and previous is not None:
        return AnsweredAgain(previous.answer_id, (replayed,))
    revoked = GrantRevoked(
        **head(stamp, 1, by="system"),
        grant_id=command.grant_id,
        reason=Reason.REUSE_DETECTED,
    )
    return ReuseDetected((replayed, revoked))


def decide_renew(command: Refresh, chain: RefreshChain) -> AccessRenewed:
    """New tokens for a refresh token that stays the one that it is, and is good for its idle lifetime from now on.

    For confidential clients that asked for it: what only they can use need not be rotated. Source: RFC 9700 §2.2.2.
    """
    idle = command.stamp.at.replace(microsecond=0) + timedelta(seconds=chain.idle_ttl_seconds)
    return AccessRenewed(
        **head(command.stamp),
        grant_id=command.grant_id,
        refresh_token_id=command.token_id,
        tokens=command.tokens,
        refresh_expires_at=min(idle, chain.ends_at),
    )


def _invalid_grant(private: str) -> InvalidGrant:
    return InvalidGrant(
        "the refresh token is not valid, has expired, was revoked or is not this client's", private=private
    )


class RevokeToken(Struct, frozen=True, kw_only=True):
    """Ends one token; a refresh token ends its grant (RFC 7009 §2.1)."""

    stamp: Stamp
    grant_id: str
    token_id: str
    reason: Reason
    sealed_comment: bytes | None = None


def decide_revoke_token(command: RevokeToken, family: Family) -> list[LedgerEvent]:
    """Nothing when the token has ended already: a second revocation is no second event. Raises: NotFound."""
    token = family.tokens.get(command.token_id)
    if token is None:
        raise NotFound("there is no such token")
    if token.ended is not None or isinstance(family.grant, RevokedGrant):
        return []
    if token.kind is Kind.REFRESH:
        return [_grant_revoked(command)]
    return [
        TokenRevoked(
            **head(command.stamp),
            grant_id=command.grant_id,
            token_id=command.token_id,
            reason=command.reason,
            sealed_comment=command.sealed_comment,
        )
    ]


class RevokeGrant(Struct, frozen=True, kw_only=True):
    """Ends a grant and every token of it."""

    stamp: Stamp
    grant_id: str
    reason: Reason
    sealed_comment: bytes | None = None


def decide_revoke_grant(command: RevokeGrant, family: Family) -> list[LedgerEvent]:
    """Nothing when the grant has ended already. Raises: NotFound."""
    if facts(family.grant) is None:
        raise NotFound("there is no such grant")
    if isinstance(family.grant, RevokedGrant):
        return []
    return [_grant_revoked(command)]


def _grant_revoked(command: RevokeToken | RevokeGrant) -> GrantRevoked:
    return GrantRevoked(
        **head(command.stamp), grant_id=command.grant_id, reason=command.reason, sealed_comment=command.sealed_comment
    )


class RotateToken(Struct, frozen=True, kw_only=True):
    """A PAT or SAT is replaced by one like it and ends after an overlap. The successor was minted before."""

    stamp: Stamp
    grant_id: str
    token_id: str
    successor_grant_id: str
    successor: MintedToken
    overlap: timedelta
    sealed_name: bytes | None


def check_may_rotate(token: Token) -> None:
    """Raises: InvalidRequest."""
    if token.kind not in {Kind.PAT, Kind.SAT}:
        raise InvalidRequest("only a PAT or a SAT can be rotated", fix="refresh or request access tokens instead")


def decide_rotate(command: RotateToken, family: Family, *, now: datetime) -> tuple[TokenIssued, TokenSuperseded]:
    """The successor's first event and the old token's end, to be appended together.

    Raises: NotFound; InvalidRequest for other kinds of token; Gone if the token has ended.
    """
    token = family.tokens.get(command.token_id)
    known = facts(family.grant)
    if token is None or known is None:
        raise NotFound("there is no such token")
    check_may_rotate(token)
    if token.ended is not None or isinstance(family.grant, RevokedGrant) or now >= token.expires_at:
        raise Gone("the token has ended", fix="issue a new one")
    issued = TokenIssued(
        **head(command.stamp),
        grant_id=command.successor_grant_id,
        subject=known.subject,
        client_id=known.client_id,
        scope=command.successor.scope,
        audience=known.audience,
        tokens=(command.successor,),
        allowed_ips=known.allowed_ips,
        sealed_name=command.sealed_name,
        rotated_from=command.token_id,
    )
    superseded = TokenSuperseded(
        **head(command.stamp, 1),
        grant_id=command.grant_id,
        token_id=command.token_id,
        successor_id=command.successor.token_id,
        ends_at=command.stamp.at + command.overlap,
    )
    return issued, superseded
