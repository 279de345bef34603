"""The folds of what is registered: clients, users, usernames, scopes, signing keys; of sessions and consents.

Pure and total.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from events.types import (
    ClientChanged,
    ClientDisabled,
    ClientMetadata,
    ClientRegistered,
    ClientRevoked,
    ClientSecretRotated,
    ConsentGiven,
    ConsentWithdrawn,
    KeyActivated,
    KeyIntroduced,
    KeyRemoved,
    KeyRetired,
    KeyRevoked,
    LedgerEvent,
    Reason,
    Recorded,
    ScopeChanged,
    ScopeDisabled,
    ScopeRegistered,
    SessionEnded,
    SessionStarted,
    SubjectErased,
    SubjectRevoked,
    UserChanged,
    UserDisabled,
    UsernameClaimed,
    UserPasswordChanged,
    UserRegistered,
)


class Secret(Struct, frozen=True, array_like=True, gc=False):
    """SHA-256 of a client secret, hex. `ends_at` is None while it is the current one."""

    sha256: str
    ends_at: datetime | None = None


class Client(Struct, frozen=True, array_like=True, gc=False):
    """RFC 6749 §2. `seq` is the last sequence of the client's subject. Disabled is for good."""

    client_id: str
    metadata: ClientMetadata
    secrets: tuple[Secret, ...]
    registered_at: datetime
    seq: int
    disabled_at: datetime | None = None


class User(Struct, frozen=True, array_like=True, gc=False):
    """A person or a service. The profile is sealed; the password hash stays in the log.

    `password_seq`: of the event that last said what the password is, or that there is none.
    """

    user_id: str
    kind: Literal["person", "service"]
    username_hash: str
    sealed_profile: bytes
    scope: str
    registered_at: datetime
    seq: int
    has_password: bool
    disabled_at: datetime | None = None
    erased_at: datetime | None = None
    password_seq: int = 0


class Username(Struct, frozen=True, array_like=True, gc=False):
    user_id: str
    seq: int


class Scope(Struct, frozen=True, array_like=True, gc=False):
    """RFC 6749 §3.3."""

    name: str
    description: str
    audience: tuple[str, ...]
    implies: tuple[str, ...]
    seq: int
    disabled_at: datetime | None = None


class SigningKey(Struct, frozen=True, array_like=True, gc=False):
    """`state` goes announced, active, retired, and revoked from any of them; a removed key has no row.

    `purpose`: what tokens it signs.
    """

    kid: str
    alg: str
    public_jwk: str
    state: Literal["announced", "active", "retired", "revoked"]
    introduced_at: datetime
    seq: int
    activated_at: datetime | None = None
    retired_at: datetime | None = None
    remove_at: datetime | None = None
    purpose: Literal["access", "id"] = "access"
    revoked_at: datetime | None = None


class Session(Struct, frozen=True, array_like=True, gc=False):
    """A person's session in a browser. `seq` is the last sequence of its subject, `sealed_place` as in SessionStarted.

    A cut-off of the user that is later than `user_seq` ends it.
    """

    session_id: str
    user_id: str
    auth_time: datetime
    expires_at: datetime
    methods: tuple[str, ...]
    user_seq: int
    seq: int
    ended_at: datetime | None = None
    reason: Literal["signed_out", "replaced", "admin"] | None = None
    sealed_place: bytes | None = None


class Consent(Struct, frozen=True, array_like=True, gc=False):
    """What a person allows a client; `scope` is empty since it was withdrawn.

    What was granted by the consent as it stood before `withdrawn_seq`, the last withdrawal, is revoked.
    """

    user_id: str
    client_id: str
    scope: str
    changed_at: datetime
    seq: int
    withdrawn_seq: int = 0


Row = Client | User | Username | Scope | SigningKey | Session | Consent


class Cut(Struct, frozen=True, array_like=True, gc=False):
    """Every grant of a client or subject that began before `seq` is revoked. `disabled`: the owner itself ended.

    Of a key: whatever it signed is revoked, before `seq` or after it.
    """

    seq: int
    at: datetime
    reason: Reason
    disabled: bool = False


def evolve(row: Row | None, recorded: Recorded) -> Row | None:
    """The row after one more event of its subject; None when there is none (any more)."""
    event = recorded.event
    if row is None:
        return _created(event, recorded)
    match row:
        case Client():
            return _client(row, event, recorded)
        case User():
            return _user(row, event, recorded)
        case Scope():
            return _scope(row, event, recorded)
        case SigningKey():
            return _key(row, event, recorded)
        case Session():
            return _session(row, event, recorded)
        case Consent():
            return _consent(row, event, recorded)
        case Username():
            return row


def _created(event: LedgerEvent, recorded: Recorded) -> Row | None:
    seq, at = recorded.seq, recorded.recorded_at
    match event:
        case ClientRegistered():
            secrets = (Secret(event.secret_sha256),) if event.secret_sha256 else ()
            return Client(event.client_id, event.metadata, secrets, at, seq)
        case UserRegistered():
            return User(
                event.user_id,
                event.kind,
                event.username_hash,
                event.sealed_profile,
                event.scope,
                at,
                seq,
                event.password_hash is not None,
                password_seq=seq,
            )
        case UsernameClaimed():
            return Username(event.user_id, seq)
        case ScopeRegistered():
            return Scope(event.name, event.description, event.audience, event.implies, seq)
        case KeyIntroduced():
            return SigningKey(event.kid, event.alg, event.public_jwk, "announced", at, seq, purpose=event.purpose)
        case SessionStarted():
            return Session(
                event.session_id,
                event.user_id,
                event.auth_time,
                event.expires_at,
                event.methods,
                event.user_seq,
                seq,
                sealed_place=event.sealed_place,
            )
        case ConsentGiven():
            return Consent(event.user_id, event.client_id, event.scope, at, seq)
        case _:
            return None


def _client(row: Client, event: LedgerEvent, recorded: Recorded) -> Client:
    row = replace(row, seq=recorded.seq)
    match event:
        case ClientChanged():
            return replace(row, metadata=event.metadata)
        case ClientSecretRotated():
            kept = tuple(
                Secret(secret.sha256, event.previous_ends_at) for secret in row.secrets if secret.ends_at is None
            )
            return replace(row, secrets=(Secret(event.secret_sha256), *kept))
        case ClientDisabled():
            return replace(row, secrets=(), disabled_at=row.disabled_at or recorded.recorded_at)
        case _:
            return row


def _user(row: User, event: LedgerEvent, recorded: Recorded) -> User:
    row = replace(row, seq=recorded.seq)
    match event:
        case UserChanged():
            return replace(row, sealed_profile=event.sealed_profile, scope=event.scope)
        case UserPasswordChanged():
            return replace(row, has_password=event.password_hash is not None, password_seq=recorded.seq)
        case UserDisabled():
            return replace(row, disabled_at=row.disabled_at or recorded.recorded_at)
        case SubjectErased():
            return replace(row, sealed_profile=b"", erased_at=row.erased_at or recorded.recorded_at)
        case _:
            return row


def _scope(row: Scope, event: LedgerEvent, recorded: Recorded) -> Scope:
    row = replace(row, seq=recorded.seq)
    match event:
        case ScopeChanged():
            return replace(row, description=event.description, audience=event.audience, implies=event.implies)
        case ScopeDisabled():
            return replace(row, disabled_at=row.disabled_at or recorded.recorded_at)
        case _:
            return row


def _key(row: SigningKey, event: LedgerEvent, recorded: Recorded) -> SigningKey | None:
    row = replace(row, seq=recorded.seq)
    match event:
        case KeyActivated() if row.state == "announced":
            return replace(row, state="active", activated_at=recorded.recorded_at)
        case KeyRetired() if row.state in {"announced", "active"}:
            return replace(row, state="retired", retired_at=recorded.recorded_at, remove_at=event.remove_at)
        case KeyRevoked() if row.state != "revoked":
            return replace(row, state="revoked", revoked_at=recorded.recorded_at, remove_at=None)
        case KeyRemoved():
            return None
        case _:
            return row


def _session(row: Session, event: LedgerEvent, recorded: Recorded) -> Session:
    row = replace(row, seq=recorded.seq)
    match event:
        case SessionEnded() if row.ended_at is None or row.reason == "replaced":
            return replace(row, ended_at=row.ended_at or recorded.recorded_at, reason=event.reason)
        case _:
            return row


def _consent(row: Consent, event: LedgerEvent, recorded: Recorded) -> Consent:
    row = replace(row, seq=recorded.seq, changed_at=recorded.recorded_at)
    match event:
        case ConsentGiven():
            return replace(row, scope=event.scope)
        case ConsentWithdrawn():
            return replace(row, scope="", withdrawn_seq=recorded.seq)
        case _:
            return row


def cut(old: Cut | None, recorded: Recorded) -> tuple[str, Cut] | None:
    """The client, user or key that an event cuts off, and its cut from then on; None for events that cut nothing off.

    A disabled owner stays disabled. Its tokens end through the mark and not through `seq`, so that the answer can
    tell a disabled owner from a revocation.
    """
    seq, disabled = (old.seq, old.disabled) if old else (0, False)
    at = recorded.recorded_at
    match recorded.event:
        case ClientRevoked(client_id=owner, reason=reason) | SubjectRevoked(user_id=owner, reason=reason):
            return owner, Cut(recorded.seq, at, reason, disabled)
        case UserPasswordChanged(user_id=owner):
            return owner, Cut(recorded.seq, at, Reason.PASSWORD_CHANGED, disabled)
        case ClientDisabled(client_id=owner, reason=reason) | UserDisabled(user_id=owner, reason=reason):
            return owner, Cut(seq, at, reason, disabled=True)
        case KeyRevoked(kid=kid, reason=reason):
            return kid, old or Cut(recorded.seq, at, reason)
        case _:
            return None
