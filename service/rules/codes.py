"""The rules of authorization codes. Pure: ids, hashes and times come in, events or a refusal come out.

A code is good once, for 60 seconds, for the client that it was made for, with the redirect URI that it went to and the
verifier of the challenge that came before it. RFC 6749 §4.1.3, RFC 7636 §4.6, RFC 9700 §2.1.1 and §4.5.

A code that comes a second time with its verifier ends what it gave: of two who have both, nobody knows who was first
(RFC 6749 §4.1.2, §10.5). Without the verifier nobody could have spent it, and what it gave is the client's: then it is
refused and recorded. To end that grant as well would hand everybody who finds an old code, in a history or a log, the
means to sign the person out.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from datetime import datetime, timedelta
from typing import Literal

from msgspec import Struct

from events.types import (
    AuthorizationGranted,
    CodeRedeemed,
    CodeRefused,
    CodeReplayed,
    GrantRevoked,
    LedgerEvent,
    MintedToken,
    Reason,
)
from projections.grants import ActiveGrant, AuthorizedGrant, ByCode, Grant, NoGrant, RevokedGrant
from projections.registry import Cut
from service.errors import InvalidGrant, InvalidRequest
from service.rules.grants import NOBODY, Person, Stamp, head, is_cut_off, is_taken_back

CODE_TTL_SECONDS = 60
REFUSALS_MAX = 3  # the last of them ends the grant; of a spent code no more are recorded
# Who presents a spent code so soon, with all that belongs to it, is the client itself: a double click, two workers.
RACE = timedelta(seconds=0.9)

_CODE_VERIFIER = re.compile(r"[A-Za-z0-9._~-]{43,128}")  # RFC 7636 §4.1
_NOT_VALID = "the code is not valid, has expired, was used or revoked, or is not this client's"


def challenge_of(code_verifier: str) -> str:
    """Source: RFC 7636 §4.2, S256."""
    return base64.urlsafe_b64encode(hashlib.sha256(code_verifier.encode()).digest()).rstrip(b"=").decode()


def check_verifier(code_verifier: str) -> None:
    """Raises: InvalidRequest."""
    if not _CODE_VERIFIER.fullmatch(code_verifier):
        raise InvalidRequest("a code_verifier is 43 to 128 characters of A-Z a-z 0-9 - . _ ~ (RFC 7636 §4.1)")


class Authorize(Struct, frozen=True, kw_only=True):
    """A person has signed in and granted. The code was made before; of `offline` see AuthorizationGranted."""

    stamp: Stamp
    grant_id: str
    subject: str
    client_id: str
    session_id: str
    scope: str
    audience: tuple[str, ...]
    code: MintedToken
    redirect_uri: str
    code_challenge: str
    sealed_nonce: bytes | None
    auth_time: datetime
    offline: bool
    response_type: str
    consent_seq: int = 0
    client_seq: int = 0


def decide_authorize(command: Authorize) -> AuthorizationGranted:
    """The first event of the grant."""
    return AuthorizationGranted(
        **head(command.stamp),
        grant_id=command.grant_id,
        subject=command.subject,
        client_id=command.client_id,
        scope=command.scope,
        audience=command.audience,
        session_id=command.session_id,
        code=command.code,
        redirect_uri=command.redirect_uri,
        code_challenge=command.code_challenge,
        sealed_nonce=command.sealed_nonce,
        auth_time=command.auth_time,
        offline=command.offline,
        response_type=command.response_type,
        consent_seq=command.consent_seq,
        client_seq=command.client_seq,
    )


class Redeem(Struct, frozen=True, kw_only=True):
    """A code is presented. The stamp has two ids."""

    stamp: Stamp
    grant_id: str
    client_id: str
    redirect_uri: str
    code_verifier: str


class Fresh(Struct, frozen=True):
    """The code may be redeemed."""

    grant: AuthorizedGrant
    by_code: ByCode


class Refused(Struct, frozen=True):
    """A proof is wrong. `ends`: it was so too often, and the code had not been spent."""

    events: tuple[LedgerEvent, ...]
    ends: bool


class Spent(Struct, frozen=True):
    """The code was spent before, and who presents it has its verifier. `proven`: all that belongs to it."""

    by_code: ByCode
    proven: bool


class Replayed(Struct, frozen=True):
    """The code was spent before. `ends`: somebody else may have it, so that what it gave is revoked."""

    events: tuple[LedgerEvent, ...]
    ends: bool


def judge_code(
    command: Redeem,
    grant: Grant,
    *,
    client_cut: Cut | None = None,
    subject_cut: Cut | None = None,
    person: Person = NOBODY,
) -> Fresh | Refused | Spent:
    """What becomes of a presented code; of a spent one `judge_replay` says the rest.

    Another client's attempt changes nothing, nor does one that comes too late.

    Raises: InvalidGrant. One description for every cause.
    """
    known = _known(grant)
    by_code = known.by_code if known is not None else None
    if known is None or by_code is None:
        raise invalid_code("revoked" if isinstance(grant, RevokedGrant) else "no such grant")
    if known.client_id != command.client_id:
        raise invalid_code("issued to another client")
    if is_cut_off(known, client_cut, subject_cut) or is_taken_back(known, person) or _is_older(by_code, client_cut):
        raise invalid_code("client, subject, consent or session ended")
    wrong = _wrong_proof(command, by_code)
    refusals = grant.refusals if isinstance(grant, AuthorizedGrant) else by_code.refusals
    if not isinstance(grant, AuthorizedGrant):
        if wrong != "verifier":
            return Spent(by_code, proven=wrong is None)
        if refusals >= REFUSALS_MAX:
            raise invalid_code("spent, and without its verifier")
    elif command.stamp.at >= grant.expires_at:
        raise invalid_code("expired")
    elif wrong is None:
        return Fresh(grant, by_code)
    refused = CodeRefused(**head(command.stamp), grant_id=command.grant_id, code_id=by_code.code_id, cause=wrong)
    if refusals + 1 < REFUSALS_MAX or not isinstance(grant, AuthorizedGrant):
        return Refused((refused,), ends=False)
    return Refused((refused, _revoked(command, Reason.ABUSE)), ends=True)


def _is_older(by_code: ByCode, client_cut: Cut | None) -> bool:
    """Whether the client was looked at before it was cut off, wherever in the log the grant came to stand."""
    return client_cut is not None and 0 < by_code.client_seq < client_cut.seq


def _known(grant: Grant) -> ActiveGrant | None:
    match grant:
        case AuthorizedGrant(becomes=becomes):
            return becomes
        case ActiveGrant():
            return grant
        case NoGrant() | RevokedGrant():
            return None


def _wrong_proof(command: Redeem, by_code: ByCode) -> Literal["verifier", "redirect_uri"] | None:
    if not hmac.compare_digest(challenge_of(command.code_verifier), by_code.code_challenge):
        return "verifier"
    return None if command.redirect_uri == by_code.redirect_uri else "redirect_uri"


def judge_replay(command: Redeem, spent: Spent, came_at: datetime) -> Replayed:
    """`came_at`: when the code came again, by the clock that says when it was spent, which is the log's.

    Hosts' clocks differ from it, and by how much is nothing to sign anybody out by, or to let a thief pass.
    """
    by_code = spent.by_code
    raced = spent.proven and by_code.redeemed_at is not None and came_at < by_code.redeemed_at + RACE
    replayed = CodeReplayed(**head(command.stamp), grant_id=command.grant_id, code_id=by_code.code_id, raced=raced)
    if raced:
        return Replayed((replayed,), ends=False)
    return Replayed((replayed, _revoked(command, Reason.CODE_REPLAYED)), ends=True)


def _revoked(command: Redeem, reason: Reason) -> GrantRevoked:
    return GrantRevoked(
        **head(command.stamp, 1, by="system"),
        grant_id=command.grant_id,
        reason=reason,
    )


class Exchange(Struct, frozen=True, kw_only=True):
    """What a code is exchanged for, made before. `refresh_ends_at`: with a refresh token."""

    tokens: tuple[MintedToken, ...]
    refresh_idle_ttl_seconds: int | None = None
    refresh_ends_at: datetime | None = None


def decide_redeem(command: Redeem, fresh: Fresh, exchange: Exchange) -> CodeRedeemed:
    """Spends the code, if nothing else happened to its grant."""
    return CodeRedeemed(
        **head(command.stamp),
        grant_id=command.grant_id,
        code_id=fresh.by_code.code_id,
        tokens=exchange.tokens,
        refresh_idle_ttl_seconds=exchange.refresh_idle_ttl_seconds,
        refresh_ends_at=exchange.refresh_ends_at,
    )


def invalid_code(private: str) -> InvalidGrant:
    """What whoever presents a code is told, whatever is wrong: RFC 6749 §5.2."""
    return InvalidGrant(_NOT_VALID, private=private)
