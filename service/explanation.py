"""Why a token was good or not: every check in the order of precedence, and the events that decided it. Pure."""

from __future__ import annotations

from datetime import datetime

from msgspec import Struct

from events.types import (
    AccessRenewed,
    AuthorizationGranted,
    ClientDisabled,
    ClientRevoked,
    CodeRedeemed,
    CodeReplayed,
    GrantRevoked,
    KeyRevoked,
    Kind,
    Reason,
    Recorded,
    SubjectRevoked,
    TokenIssued,
    TokenRefreshed,
    TokenRevoked,
    TokenSuperseded,
    UserDisabled,
    UserPasswordChanged,
)
from projections.current import Hit
from projections.grants import ActiveGrant, Minting, facts
from projections.registry import Cut
from service.past import Past
from service.validation import BEARER_KINDS, Asked, Code, audience_of, evaluate, ip_allowed, scope_of

# These have no check of their own. A refresh token fails `unknown` before it is spent and after.
_SPENT, _GRANTED, _REPLAYED = "spent", "granted", "replayed"


class Deciding(Struct, frozen=True):
    """An event that decided the answer, and in one sentence what it did."""

    type: str
    ledger_seq: int
    recorded_at: datetime
    sentence: str


class Check(Struct, frozen=True):
    """One check. `name` is the code of the answer when it is the first that did not pass."""

    name: Code
    passed: bool
    detail: str


class Explanation(Struct, frozen=True):
    """What POST /v1/tokens/validate would have said at `at`. `ledger_seq`: the position of the ledger it is true at."""

    token_id: str
    at: datetime
    ledger_seq: int
    valid: bool
    code: Code
    because: list[Deciding]
    checks: list[Check]


def explain(past: Past, asked: Asked) -> Explanation:
    """Whether the token was good for what is asked, and why."""
    hit = past.hit
    code = evaluate(hit, asked, past.moment) if hit.token.kind in BEARER_KINDS else Code.UNKNOWN
    decided = _deciding(past)
    because = sorted(decided.values(), key=lambda one: one.ledger_seq)
    checks = [*_checks_of_the_question(past, decided), *_checks_of_ends(past, decided), *_checks_of_use(past, asked)]
    return Explanation(hit.token_id, past.moment, past.position, code is Code.VALID, code, because, checks)


def _deciding(past: Past) -> dict[str, Deciding]:
    """By what they decided: the issue, and the first event that ended the token in each of the ways there are."""
    decided: dict[str, Deciding] = {}
    for recorded in past.events:
        found = _decided_by(recorded, past.hit)
        if found is not None and found[0] not in decided:
            name = type(recorded.event).__struct_config__.tag
            assert isinstance(name, str)
            kind = name.partition("/")[0]
            decided[found[0]] = Deciding(kind, recorded.seq, recorded.recorded_at, found[1])
    return decided


def _decided_by(recorded: Recorded, hit: Hit) -> tuple[str, str] | None:
    """What the event decided about the token, and a sentence; None for the events that changed nothing for it."""
    event, known, token = recorded.event, facts(hit.grant), hit.token
    # Revocations of a client or user end only grants that began before them.
    later = known is not None and recorded.seq > known.first_seq
    match event:
        case TokenIssued() | CodeRedeemed() | AccessRenewed() | TokenRefreshed() if recorded.seq == token.issued_seq:
            return "issued", _issue(event, hit)
        case AuthorizationGranted():
            return (
                _GRANTED,
                f"user {event.subject} signed in at {_worded(event.auth_time)} and allowed it",
            )
        case CodeReplayed(raced=False):
            return _REPLAYED, f"the authorization code was presented again by {event.by}, after it had been redeemed"
        case TokenRefreshed(spent_token_id=hit.token_id):
            return _SPENT, f"the refresh token was spent: {_ids(event)} took its place"
        case TokenSuperseded(token_id=hit.token_id) if event.ends_at == token.expires_at:
            return Code.EXPIRED, f"superseded by {event.successor_id}, so that it ends at {_worded(event.ends_at)}"
        case TokenRevoked(token_id=hit.token_id):
            return Code.REVOKED, f"the token was revoked by {event.by}: {_why(event.reason)}"
        case GrantRevoked():
            return Code.REVOKED, f"its grant {event.grant_id} was revoked by {event.by}: {_why(event.reason)}"
        case ClientRevoked() if later:
            return Code.REVOKED, f"all of client {event.client_id} was revoked by {event.by}: {_why(event.reason)}"
        case SubjectRevoked() if later:
            return Code.REVOKED, f"all of user {event.user_id} was revoked by {event.by}: {_why(event.reason)}"
        case UserPasswordChanged() if later:
            return Code.REVOKED, f"the password of user {event.user_id} was changed by {event.by}, which revokes all"
        case KeyRevoked():
            return Code.REVOKED, f"key {event.kid}, which signed it, was revoked by {event.by}: {_why(event.reason)}"
        case ClientDisabled():
            return Code.CLIENT_DISABLED, f"client {event.client_id} was disabled by {event.by}: {_why(event.reason)}"
        case UserDisabled():
            return Code.SUBJECT_DISABLED, f"user {event.user_id} was disabled by {event.by}: {_why(event.reason)}"
        case _:
            return None


def _issue(event: Minting, hit: Hit) -> str:
    known = facts(hit.grant)
    owner = known.subject if known else "nobody"
    through = f" through client {known.client_id}" if known and known.client_id not in {None, owner} else ""
    expiry = next((one.expires_at for one in event.tokens if one.token_id == hit.token_id), hit.token.expires_at)
    how = ""
    match event:
        case TokenRefreshed():
            how = f" in exchange for refresh token {event.spent_token_id}"
        case AccessRenewed():
            how = f" for refresh token {event.refresh_token_id}, which stays"
        case CodeRedeemed():
            how = " in exchange for an authorization code"
        case TokenIssued(rotated_from=str()):
            how = f" in place of {event.rotated_from}"
    scope = f"with the scope {scope_of(hit)}" if scope_of(hit) else "without any scope"
    return f"issued to {owner}{through}{how}, {scope}, to expire at {_worded(expiry)}"


def _ids(event: TokenRefreshed) -> str:
    successor = next((one.token_id for one in event.tokens if one.kind is Kind.REFRESH), None)
    return successor or "an access token"


def _checks_of_the_question(past: Past, decided: dict[str, Deciding]) -> list[Check]:
    """What can be wrong before the token itself is looked at. Asked by id and of the ledger, most of it cannot."""
    bearer = past.hit.token.kind in BEARER_KINDS
    issued = decided.get("issued")
    seen = f"it had been issued at {_worded(issued.recorded_at)}" if issued else "it had been issued"
    if not bearer:
        spent = decided.get(_SPENT)
        seen = "it is a refresh token, which only the token endpoint takes" + (f"; {spent.sentence}" if spent else "")
    return [
        Check(Code.STALE, True, f"read from the ledger itself, up to position {past.position}"),
        Check(Code.MALFORMED, True, "asked for by its id, so its string was not looked at"),
        Check(Code.UNKNOWN, bearer, seen),
    ]


def _checks_of_ends(past: Past, decided: dict[str, Deciding]) -> list[Check]:
    hit, known = past.hit, facts(past.hit.grant)
    first_seq = known.first_seq if known else 0
    revoked = (
        hit.token.ended is not None
        or not isinstance(hit.grant, ActiveGrant)
        or hit.key_cut is not None
        or any(cut is not None and cut.seq > first_seq for cut in (hit.client_cut, hit.subject_cut))
    )
    client = known.client_id if known else None
    own = known is not None and known.subject == client

    def check(name: Code, failed: bool, otherwise: str) -> Check:
        event = decided.get(name)
        said = f"{event.sentence} (ledger_seq {event.ledger_seq})" if event is not None else name.replace("_", " ")
        return Check(name, not failed, said if failed else otherwise)

    no_client, no_user = "it has no client", "its subject is its client"
    of_client = f"client {client} was not disabled" if client else no_client
    of_user = no_user if own else f"user {known.subject if known else ''} was not disabled"
    return [
        check(Code.REVOKED, revoked, "neither it nor its grant, client, subject or key had been revoked"),
        check(Code.CLIENT_DISABLED, _disabled(hit.client_cut), of_client),
        check(Code.SUBJECT_DISABLED, _disabled(hit.subject_cut), of_user),
    ]


def _disabled(cut: Cut | None) -> bool:
    return cut is not None and cut.disabled


def _checks_of_use(past: Past, asked: Asked) -> list[Check]:
    """What depends on the time, and on who uses the token for what."""
    hit, known = past.hit, facts(past.hit.grant)
    alive = past.moment < hit.token.expires_at
    return [
        Check(Code.NOT_YET_VALID, True, "a token is valid from its issue on"),
        Check(Code.EXPIRED, alive, f"{'it was to end' if alive else 'it ended'} at {_worded(hit.token.expires_at)}"),
        _check_of_ip(asked.ip, known.allowed_ips if known else ()),
        _check_of_audience(asked.audience, audience_of(hit)),
        _check_of_scope(asked.scope.split(), scope_of(hit).split(" ")),
    ]


def _check_of_ip(ip: str | None, networks: tuple[str, ...]) -> Check:
    name, only = Code.IP_NOT_ALLOWED, f"it may be used only from {', '.join(networks)}"
    if not networks:
        return Check(name, True, "it may be used from any address")
    if ip is None:
        return Check(name, False, f"{only}, and no address was given")
    return Check(name, ip_allowed(ip, networks), f"{only}; asked for {ip}")


def _check_of_audience(wanted: tuple[str, ...], has: tuple[str, ...]) -> Check:
    name = Code.WRONG_AUDIENCE
    if not wanted:
        return Check(name, True, "no audience was asked for")
    if not has:
        return Check(name, True, "it is for any audience")
    passed = any(one in has for one in wanted)
    return Check(name, passed, f"it is for {', '.join(has)}; asked for {', '.join(wanted)}")


def _check_of_scope(wanted: list[str], has: list[str]) -> Check:
    name = Code.INSUFFICIENT_SCOPE
    if not wanted:
        return Check(name, True, "no scope was asked for")
    missing = [one for one in wanted if one not in has]
    held = " ".join(has) or "no scope"
    return Check(name, not missing, f"it has {held}" + (f" and lacks {' '.join(missing)}" if missing else ""))


def _why(reason: Reason) -> str:
    return reason.value.replace("_", " ")


def _worded(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")
