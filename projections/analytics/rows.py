"""From what is recorded to rows of the tables. Pure but for the buffers that it fills."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import Any, NamedTuple, assert_never

import msgspec

from events.types import (
    AbuseDetected,
    AccessRenewed,
    AuditExported,
    AuditRead,
    AuthorizationGranted,
    ClientChanged,
    ClientDisabled,
    ClientRegistered,
    ClientRevoked,
    ClientSecretRotated,
    CodeRedeemed,
    CodeRefused,
    CodeReplayed,
    ConsentGiven,
    ConsentWithdrawn,
    FindingAcknowledged,
    FindingDismissed,
    GrantRevoked,
    KeyActivated,
    KeyIntroduced,
    KeyRemoved,
    KeyRetired,
    KeyRevoked,
    LedgerEvent,
    MintedToken,
    Reason,
    RefreshReplayed,
    ScopeChanged,
    ScopeDisabled,
    ScopeRegistered,
    SessionEnded,
    SessionStarted,
    SubjectErased,
    SubjectRevoked,
    SubscriberRegistered,
    SubscriberRemoved,
    TokenIssued,
    TokenRefreshed,
    TokenRevoked,
    TokenSuperseded,
    UserChanged,
    UserDisabled,
    UsernameClaimed,
    UserPasswordChanged,
    UserRegistered,
    WebhookChanged,
    WebhookRegistered,
    WebhookRemoved,
)

FOR_GOOD = 2**63 - 1  # a cut-off that no later grant escapes
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WELL_FORMED = re.compile(r"(?:tok|grt)_([0-9a-f]{32})")


Origin = tuple[str | None, str | None]  # address and user agent
Minting = TokenIssued | CodeRedeemed | AccessRenewed | TokenRefreshed


class GrantRow(NamedTuple):
    grant_id: str
    ledger_seq: int
    subject: str
    client_id: str | None
    scope: str
    issued_at: int


class EventRow(NamedTuple):
    """`subject` None with a `grant_id`: the grant's owner has yet to be looked up."""

    ledger_seq: int
    recorded_at: int
    occurred_at: int
    type: str
    done_by: str
    request_id: str | None
    subject: str | None
    client_id: str | None
    user_id: str | None
    grant_id: str | None
    token_ids: list[str]
    body: str


class TokenRow(NamedTuple):
    """`grant_seq` None: the grant's owner has yet to be looked up."""

    token_id: str
    grant_id: str
    ledger_seq: int
    grant_seq: int | None
    kind: str
    client_id: str | None
    subject: str | None
    scope: str
    audience: list[str]
    issued_at: int
    expires_at: int
    sha256: bytes | None
    kid: str | None
    rotated_from: str | None


class EndRow(NamedTuple):
    ledger_seq: int
    what: str
    token_id: str | None
    grant_id: str | None
    client_id: str | None
    subject: str | None
    cuts_before_seq: int | None
    ended_at: int
    reason: str | None
    kid: str | None = None


class Named(NamedTuple):
    """Whom and what an event is about, as identifiers of the log."""

    subject: str | None = None
    client_id: str | None = None
    user_id: str | None = None
    grant_id: str | None = None
    token_ids: tuple[str, ...] = ()


def uuid_hex(identifier: str) -> str:
    """The 32 hex digits of a token or grant id.

    A recorded event is never refused: an id of another form is stored as its MD5, and looked up as such too. The
    event's body keeps what was written.
    """
    found = _WELL_FORMED.fullmatch(identifier)
    return found[1] if found else hashlib.md5(identifier.encode(), usedforsecurity=False).hexdigest()


def microseconds(moment: datetime) -> int:
    """Since 1970, UTC."""
    delta = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def user_of(subject: str | None, client_id: str | None) -> str | None:
    """The subject unless it is the client itself (RFC 6749 §4.4)."""
    return subject if subject != client_id else None


def named(event: LedgerEvent) -> Named:
    """Whom and what the event names. Events of a grant other than its first do not name its owner."""
    match event:
        case TokenIssued():
            minted = tuple(token.token_id for token in event.tokens)
            before = (event.rotated_from,) if event.rotated_from else ()
            user = user_of(event.subject, event.client_id)
            return Named(event.subject, event.client_id, user, event.grant_id, (*minted, *before))
        case AuthorizationGranted():
            code = (event.code.token_id,)
            return Named(event.subject, event.client_id, event.subject, event.grant_id, code)
        case CodeRedeemed(code_id=used) | AccessRenewed(refresh_token_id=used) | TokenRefreshed(spent_token_id=used):
            minted = tuple(token.token_id for token in event.tokens)
            return Named(grant_id=event.grant_id, token_ids=(used, *minted))
        case CodeRefused() | CodeReplayed():
            return Named(grant_id=event.grant_id, token_ids=(event.code_id,))
        case RefreshReplayed() | TokenRevoked():
            return Named(grant_id=event.grant_id, token_ids=(event.token_id,))
        case TokenSuperseded():
            return Named(grant_id=event.grant_id, token_ids=(event.token_id, event.successor_id))
        case GrantRevoked():
            return Named(grant_id=event.grant_id)
        case ClientRegistered() | ClientChanged() | ClientSecretRotated() | ClientRevoked() | ClientDisabled():
            return Named(subject=event.client_id, client_id=event.client_id)
        case UserRegistered() | UserChanged() | UserPasswordChanged() | SubjectRevoked() | UserDisabled():
            return Named(subject=event.user_id, user_id=event.user_id)
        case SubjectErased() | UsernameClaimed() | SessionStarted() | SessionEnded():
            return Named(subject=event.user_id, user_id=event.user_id)
        case ConsentGiven() | ConsentWithdrawn():
            return Named(event.user_id, event.client_id, event.user_id)
        case ScopeRegistered() | ScopeChanged() | ScopeDisabled():
            return Named()
        case KeyIntroduced() | KeyActivated() | KeyRetired() | KeyRemoved() | KeyRevoked():
            return Named()
        case AbuseDetected():
            found = (event.token_id,) if event.token_id else ()
            user = user_of(event.subject, event.client_id)
            return Named(event.subject, event.client_id, user, event.grant_id, found)
        case FindingAcknowledged() | FindingDismissed():
            return Named()
        case AuditRead():
            return Named(event.subject, event.client_id, user_of(event.subject, event.client_id))
        case AuditExported():
            return Named()
        case SubscriberRegistered(owner=owner):
            return _owned(owner)
        case WebhookRegistered(webhook=webhook) | WebhookChanged(webhook=webhook):
            return _owned(webhook.owner)
        case SubscriberRemoved() | WebhookRemoved():
            return Named()
        case _:
            assert_never(event)


def _owned(owner: str) -> Named:
    """By a user, or by a client, which is its own subject."""
    client_id = owner if owner.startswith("cli_") else None
    return Named(owner, client_id, user_of(owner, client_id))


def end(event: LedgerEvent, seq: int, recorded_us: int) -> EndRow | None:
    """What the event ends, if anything. Times are those of the current-token view: `recorded_at`."""
    match event:
        case TokenRevoked(token_id=token_id, reason=reason):
            return EndRow(seq, "revoked", uuid_hex(token_id), None, None, None, None, recorded_us, reason)
        case GrantRevoked(grant_id=grant_id, reason=reason):
            return EndRow(seq, "revoked", None, uuid_hex(grant_id), None, None, None, recorded_us, reason)
        case ClientRevoked(client_id=client_id, reason=reason):
            return EndRow(seq, "revoked", None, None, client_id, None, seq, recorded_us, reason)
        case ClientDisabled(client_id=client_id, reason=reason):
            return EndRow(seq, "revoked", None, None, client_id, None, FOR_GOOD, recorded_us, reason)
        case SubjectRevoked(user_id=user_id, reason=reason):
            return EndRow(seq, "revoked", None, None, None, user_id, seq, recorded_us, reason)
        case UserPasswordChanged(user_id=user_id):
            return EndRow(seq, "revoked", None, None, None, user_id, seq, recorded_us, Reason.PASSWORD_CHANGED)
        case UserDisabled(user_id=user_id, reason=reason):
            return EndRow(seq, "revoked", None, None, None, user_id, FOR_GOOD, recorded_us, reason)
        case KeyRevoked(kid=kid, reason=reason):
            return EndRow(seq, "revoked", None, None, None, None, None, recorded_us, reason, kid)
        case TokenRefreshed(spent_token_id=token_id):
            return EndRow(seq, "spent", uuid_hex(token_id), None, None, None, None, recorded_us, None)
        case TokenSuperseded(token_id=token_id, ends_at=ends_at):
            return EndRow(seq, "superseded", uuid_hex(token_id), None, None, None, None, microseconds(ends_at), None)
        case AccessRenewed(refresh_token_id=token_id, refresh_expires_at=ends_at):
            return EndRow(seq, "renewed", uuid_hex(token_id), None, None, None, None, microseconds(ends_at), None)
        case _:
            return None


def body(event: LedgerEvent) -> tuple[str, str]:
    """The event's tag, and the event as JSON without password hashes and without what is sealed."""
    fields: dict[str, Any] = msgspec.to_builtins(event)
    return fields["type"], msgspec.json.encode(_without_secrets(fields)).decode()


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_secrets(item)
            for key, item in value.items()
            if key != "password_hash" and not key.startswith("sealed_")
        }
    if isinstance(value, list | tuple):
        return [_without_secrets(item) for item in value]
    return value


class PendingEvents:
    """Rows of LEDGER that wait for one commit. `reached`: sequence and recorded time of the last event, if any."""

    def __init__(self) -> None:
        self.rows = 0
        self.reached: tuple[int, int] | None = None
        self.events: list[EventRow] = []
        self.grants: list[GrantRow] = []
        self.tokens: list[TokenRow] = []
        self.ends: list[EndRow] = []

    def add(self, seq: int, recorded_us: int, event: LedgerEvent) -> None:
        about = named(event)
        occurred_us = microseconds(event.occurred_at)
        tag, text = body(event)
        grant_id = uuid_hex(about.grant_id) if about.grant_id else None
        self.events.append(
            EventRow(
                seq,
                recorded_us,
                occurred_us,
                tag,
                event.by,
                event.request_id,
                about.subject,
                about.client_id,
                about.user_id,
                grant_id,
                [uuid_hex(token_id) for token_id in about.token_ids],
                text,
            )
        )
        self.rows += 1
        ended = end(event, seq, recorded_us)
        if ended is not None:
            self.ends.append(ended)
        if isinstance(event, TokenIssued | AuthorizationGranted):
            assert grant_id is not None
            self.grants.append(GrantRow(grant_id, seq, event.subject, event.client_id, event.scope, occurred_us))
        if isinstance(event, Minting):
            self.tokens += [_token_row(token, event, seq, occurred_us) for token in event.tokens]
            self.rows += len(event.tokens)
        self.reached = (seq, recorded_us)


def _raw_hash(sha256: str) -> bytes | None:
    try:
        return bytes.fromhex(sha256)
    except ValueError:
        return None


def _token_row(token: MintedToken, event: Minting, seq: int, occurred_us: int) -> TokenRow:
    first = event if isinstance(event, TokenIssued) else None
    return TokenRow(
        uuid_hex(token.token_id),
        uuid_hex(event.grant_id),
        seq,
        seq if first else None,
        token.kind,
        first.client_id if first else None,
        first.subject if first else None,
        token.scope,
        list(token.audience),
        occurred_us,
        microseconds(token.expires_at),
        _raw_hash(token.sha256),
        token.kid,
        uuid_hex(first.rotated_from) if first and first.rotated_from else None,
    )
