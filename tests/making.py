"""Histories for tests of folds and views: events with sequences, as the log would have recorded them."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from msgspec.structs import replace

from events import codec
from events.streams import RawMessage
from events.types import (
    AbuseDetected,
    AccessRenewed,
    AuditExported,
    AuditRead,
    AuthorizationGranted,
    ClientChanged,
    ClientDisabled,
    ClientMetadata,
    ClientRegistered,
    ClientRevoked,
    ClientSecretRotated,
    CodeRedeemed,
    CodeRefused,
    CodeReplayed,
    ConsentGiven,
    ConsentWithdrawn,
    Evidence,
    FindingAcknowledged,
    FindingDismissed,
    GrantRevoked,
    KeyActivated,
    KeyIntroduced,
    KeyRemoved,
    KeyRetired,
    KeyRevoked,
    Kind,
    LedgerEvent,
    MintedToken,
    Quantity,
    Reason,
    Recorded,
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
from service.tokens import new_id, now

START = datetime(2126, 1, 31, 12, tzinfo=UTC)  # so that no view takes anything for long expired
DAY = timedelta(days=1)
CODE_VERIFIER = "v" * 43
CODE_CHALLENGE = "7w_YNF9DSfIdPf_pRjSq646_kPr-2-o9NAl16JGghdM"
_numbers = count(1)


def after(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def grt(number: int) -> str:
    return f"grt_{number:032x}"


def tok(number: int) -> str:
    return f"tok_{number:032x}"


def cli(number: int) -> str:
    return f"cli_c{number:031x}"


def usr(number: int) -> str:
    return f"usr_d{number:031x}"


def sha256_of(token_id: str) -> bytes:
    return hashlib.sha256(token_id.encode()).digest()


def head(at: datetime = START, by: str = "system") -> dict[str, Any]:
    """What every event carries."""
    return {"id": f"{next(_numbers):032x}", "occurred_at": at, "by": by}


def minted(token_id: str, kind: Kind = Kind.ACCESS, **changes: Any) -> MintedToken:
    return MintedToken(
        **{
            "token_id": token_id,
            "sha256": sha256_of(token_id).hex(),
            "kind": kind,
            "scope": "a b",
            "audience": ("https://api.example",),
            "expires_at": START + DAY,
        }
        | changes
    )


def issued(grant_id: str, *tokens: MintedToken, **changes: Any) -> TokenIssued:
    """By client 1 for itself, unless said otherwise. With a refresh token if one is among `tokens`."""
    refreshable = any(token.kind is Kind.REFRESH for token in tokens)
    fields = head() | {
        "grant_id": grant_id,
        "subject": changes.get("client_id", cli(1)),
        "client_id": cli(1),
        "scope": "a b",
        "audience": ("https://api.example",),
        "tokens": tokens,
        "refresh_idle_ttl_seconds": 86_400 if refreshable else None,
        "refresh_ends_at": START + 10 * DAY if refreshable else None,
    }
    return TokenIssued(**fields | changes)


def authorized(grant_id: str, code_id: str, **changes: Any) -> AuthorizationGranted:
    """User 1 allowed client 1 what it asked for; the code is good for a minute."""
    return AuthorizationGranted(
        **head()
        | {
            "grant_id": grant_id,
            "subject": usr(1),
            "client_id": cli(1),
            "scope": "a b",
            "audience": ("https://api.example",),
            "session_id": "ses_" + "e" * 32,
            "code": minted(code_id, Kind.CODE, expires_at=START + timedelta(seconds=60)),
            "redirect_uri": "https://shop.example/back",
            "code_challenge": CODE_CHALLENGE,
            "sealed_nonce": b"nonce",
            "auth_time": START - timedelta(hours=1),
            "offline": False,
            "response_type": "code",
        }
        | changes
    )


def redeemed(grant_id: str, code_id: str, *tokens: MintedToken) -> CodeRedeemed:
    """With a refresh token if one is among `tokens`."""
    refreshable = any(token.kind is Kind.REFRESH for token in tokens)
    return CodeRedeemed(
        **head(),
        grant_id=grant_id,
        code_id=code_id,
        tokens=tokens,
        refresh_idle_ttl_seconds=86_400 if refreshable else None,
        refresh_ends_at=START + 10 * DAY if refreshable else None,
    )


def allowed(
    user_id: str, client_id: str, *, scope: str = "openid", token: str = "", seconds: float = 3600, **changes: Any
) -> tuple[AuthorizationGranted, CodeRedeemed]:
    """What a person allows a client now, and its code redeemed for `token`, or for one that nobody has.

    `changes`: of the first event, and the `kind` of the token.
    """
    kind, code_id, moment = changes.pop("kind", Kind.ACCESS), new_id("tok"), now()
    began = {
        **head(moment, by=user_id),
        "subject": user_id,
        "client_id": client_id,
        "scope": scope,
        "session_id": new_id("ses"),
        "code": minted(code_id, Kind.CODE, expires_at=moment + timedelta(seconds=60)),
        "sealed_nonce": None,
        "auth_time": moment,
    }
    grant = authorized(new_id("grt"), code_id, **began | changes)
    hashed = sha256_of(token or new_id("tok")).hex()
    given = minted(new_id("tok"), kind, sha256=hashed, expires_at=moment + timedelta(seconds=seconds), scope=scope)
    return grant, replace(redeemed(grant.grant_id, code_id, given), occurred_at=moment, by=client_id)


def refreshed(grant_id: str, spent: str, *tokens: MintedToken, answer_id: str = "answer") -> TokenRefreshed:
    return TokenRefreshed(**head(), grant_id=grant_id, spent_token_id=spent, answer_id=answer_id, tokens=tokens)


def metadata(**changes: Any) -> ClientMetadata:
    return ClientMetadata(
        **{
            "client_name": "shop",
            "grant_types": ("client_credentials", "refresh_token"),
            "response_types": (),
            "redirect_uris": (),
            "scope": "a b",
            "token_endpoint_auth_method": "client_secret_basic",
            "access_token_format": "opaque",
            "access_token_ttl_seconds": 3600,
            "refresh_token_idle_ttl_seconds": 86_400,
            "refresh_token_max_ttl_seconds": 864_000,
            "audience": ("https://api.example",),
            "may_introspect": False,
        }
        | changes
    )


def registered(client_id: str, secret: str | None = "0" * 64) -> ClientRegistered:
    return ClientRegistered(**head(), client_id=client_id, metadata=metadata(), secret_sha256=secret)


def joined(user_id: str, *, kind: Any = "person", password: str | None = None) -> UserRegistered:
    return UserRegistered(
        **head(),
        user_id=user_id,
        kind=kind,
        username_hash=sha256_of(user_id).hex(),
        sealed_profile=b"profile",
        scope="a b",
        password_hash=password,
    )


def ses(number: int) -> str:
    return f"ses_{number:032x}"


def signed_in(session_id: str, user_id: str, **changes: Any) -> SessionStarted:
    """For twelve hours, with a password, knowing all of the user's events, unless said otherwise."""
    fields = head() | {
        "session_id": session_id,
        "user_id": user_id,
        "auth_time": START,
        "expires_at": START + DAY / 2,
        "methods": ("pwd",),
        "user_seq": 1,
    }
    return SessionStarted(**fields | changes)


def signed_out(session_id: str, user_id: str, reason: Any = "signed_out") -> SessionEnded:
    return SessionEnded(**head(), session_id=session_id, user_id=user_id, reason=reason)


def consented(user_id: str, client_id: str, scope: str = "a b") -> ConsentGiven:
    return ConsentGiven(**head(), user_id=user_id, client_id=client_id, scope=scope)


def withdrawn(user_id: str, client_id: str) -> ConsentWithdrawn:
    return ConsentWithdrawn(**head(), user_id=user_id, client_id=client_id)


def scope(name: str, *, implies: tuple[str, ...] = ()) -> ScopeRegistered:
    return ScopeRegistered(**head(), name=name, description="", audience=(), implies=implies)


def subject_of(event: LedgerEvent) -> str:
    """Where the service puts it: DESIGN "Events"."""
    match event:
        case TokenIssued() if event.refresh_ends_at is None and event.subject == event.client_id:
            return f"ledger.main.access.{event.client_id}"
        case TokenIssued() | TokenRefreshed() | RefreshReplayed() | TokenRevoked() | TokenSuperseded() | GrantRevoked():
            return f"ledger.main.grant.{event.grant_id}"
        case AuthorizationGranted() | CodeRedeemed() | CodeRefused() | CodeReplayed() | AccessRenewed():
            return f"ledger.main.grant.{event.grant_id}"
        case ClientRegistered() | ClientChanged() | ClientSecretRotated() | ClientRevoked() | ClientDisabled():
            return f"ledger.main.client.{event.client_id}"
        case UsernameClaimed():
            return f"ledger.main.username.{event.username_hash}"
        case (
            UserRegistered()
            | UserChanged()
            | UserPasswordChanged()
            | SubjectRevoked()
            | UserDisabled()
            | SubjectErased()
        ):
            return f"ledger.main.user.{event.user_id}"
        case SessionStarted() | SessionEnded():
            return f"ledger.main.session.{event.session_id}"
        case ConsentGiven() | ConsentWithdrawn():
            return f"ledger.main.consent.{event.user_id}_{event.client_id}"
        case ScopeRegistered() | ScopeChanged() | ScopeDisabled():
            return f"ledger.main.scope.{event.name.encode().hex()}"
        case KeyIntroduced() | KeyActivated() | KeyRetired() | KeyRemoved() | KeyRevoked():
            return f"ledger.main.key.{event.kid}"
        case AbuseDetected() | FindingAcknowledged() | FindingDismissed():
            return f"ledger.main.finding.{event.finding_id}"
        case AuditRead(what="query"):
            return f"ledger.main.audit.{event.subject}"
        case AuditRead() | AuditExported():
            return f"ledger.main.export.{event.read_id}"
        case SubscriberRegistered() | SubscriberRemoved():
            return f"ledger.main.subscriber.{event.subscriber_id}"
        case WebhookRegistered() | WebhookChanged() | WebhookRemoved():
            return f"ledger.main.webhook.{event.webhook_id}"


class History:
    """A log in memory. Events are recorded a second apart unless a time is given."""

    def __init__(self, *events: LedgerEvent) -> None:
        self.recorded: list[Recorded] = []
        if events:
            self.add(*events)

    def add(self, *events: LedgerEvent, at: datetime | None = None) -> Recorded:
        """Records the events and answers the last."""
        for event in events:
            seq = len(self.recorded) + 1
            self.recorded.append(
                Recorded(seq=seq, recorded_at=at or after(seq), subject=subject_of(event), event=event)
            )
        return self.recorded[-1]

    @property
    def end(self) -> int:
        return len(self.recorded)

    def raw(self, after_seq: int = 0) -> list[RawMessage]:
        return [raw(recorded) for recorded in self.recorded[after_seq:]]


def raw(recorded: Recorded) -> RawMessage:
    """As the stream would deliver it."""
    nanoseconds = (recorded.recorded_at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000
    return RawMessage(recorded.seq, nanoseconds, recorded.subject, codec.encode(recorded.event))


def fnd(number: int) -> str:
    return f"fnd_{number:032x}"


def found(finding_id: str, at: datetime = START, **changes: Any) -> AbuseDetected:
    """A finding about client 1 itself, unless said otherwise."""
    fields = head() | {
        "finding_id": finding_id,
        "rule": "burst",
        "rule_version": 1,
        "mode": "observe",
        "detected_at": at,
        "first_at": at,
        "last_at": at,
        "self_reported": False,
        "counts": (Quantity(quantity="uses", value=900),),
        "parameters": (Quantity(quantity="uses", value=300),),
        "evidence": (Evidence(source="use", seq=1, index=0),),
        "client_id": cli(1),
        "subject": cli(1),
    }
    return AbuseDetected(**fields | changes)


# One of every kind of event, each of which changes something.
def everything() -> History:
    """Clients, users, names, scopes, keys and grants in every state."""
    history = History(
        scope("a"),
        scope("b", implies=("a",)),
        ScopeChanged(**head(), name="b", description="changed", audience=("x",), implies=()),
        scope("old"),
        ScopeDisabled(**head(), name="old"),
        KeyIntroduced(**head(), kid="ed-1", alg="EdDSA", public_jwk="{}"),
        KeyActivated(**head(), kid="ed-1"),
        KeyIntroduced(**head(), kid="ed-2", alg="EdDSA", public_jwk="{}"),
        KeyActivated(**head(), kid="ed-2"),
        KeyRetired(**head(), kid="ed-1", remove_at=START + DAY),
        KeyIntroduced(**head(), kid="ed-3", alg="EdDSA", public_jwk="{}"),
        KeyRemoved(**head(), kid="ed-3"),
        KeyIntroduced(**head(), kid="id-rs-1", alg="RS256", public_jwk="{}", purpose="id"),
        KeyIntroduced(**head(), kid="es-1", alg="ES256", public_jwk="{}"),
        KeyActivated(**head(), kid="es-1"),
        registered(cli(1)),
        registered(cli(2)),
        registered(cli(3)),
        ClientChanged(**head(), client_id=cli(2), metadata=metadata(scope="a")),
        ClientSecretRotated(**head(), client_id=cli(2), secret_sha256="1" * 64, previous_ends_at=START + DAY),
        joined(usr(1)),
        joined(usr(2), kind="service"),
        joined(usr(3), password="$argon2id$x"),
        UsernameClaimed(**head(), username_hash=sha256_of(usr(1)).hex(), user_id=usr(1)),
        UserChanged(**head(), user_id=usr(1), sealed_profile=b"other", scope="a"),
    )
    for number in range(1, 9):
        history.add(
            issued(
                grt(number),
                minted(tok(number * 10)),
                minted(tok(number * 10 + 1), Kind.REFRESH),
                client_id=cli(1 + number % 3),
            )
        )
    history.add(
        refreshed(grt(1), tok(11), minted(tok(12), scope="a"), minted(tok(13), Kind.REFRESH)),
        refreshed(grt(1), tok(13), minted(tok(14)), minted(tok(15), Kind.REFRESH), answer_id="second"),
        RefreshReplayed(**head(), grant_id=grt(1), token_id=tok(13), answered=True),
        TokenRevoked(**head(), grant_id=grt(2), token_id=tok(20), reason=Reason.LOGOUT),
        GrantRevoked(**head(), grant_id=grt(3), reason=Reason.ADMIN),
        issued(grt(20), minted(tok(200)), client_id=cli(1)),
        issued(grt(21), minted(tok(210), Kind.PAT), subject=usr(1), client_id=None, audience=()),
        issued(
            grt(22),
            minted(tok(220), Kind.SAT),
            subject=usr(2),
            client_id=None,
            allowed_ips=("192.0.2.0/24",),
            sealed_name=b"name",
        ),
        issued(grt(23), minted(tok(230), Kind.PAT), subject=usr(1), client_id=None, rotated_from=tok(210)),
        TokenSuperseded(**head(), grant_id=grt(21), token_id=tok(210), successor_id=tok(230), ends_at=START + DAY / 2),
        issued(grt(24), minted(tok(240), Kind.PAT), subject=usr(3), client_id=None),
        authorized(grt(25), tok(250)),
        CodeRefused(**head(), grant_id=grt(25), code_id=tok(250), cause="verifier"),
        authorized(grt(26), tok(260), offline=True, client_id=cli(2)),
        redeemed(grt(26), tok(260), minted(tok(261), scope="a"), minted(tok(262), Kind.REFRESH)),
        CodeReplayed(**head(), grant_id=grt(26), code_id=tok(260), raced=True),
        AccessRenewed(
            **head(),
            grant_id=grt(26),
            refresh_token_id=tok(262),
            tokens=(minted(tok(263)),),
            refresh_expires_at=START + 2 * DAY,
        ),
        authorized(grt(27), tok(270)),
        redeemed(grt(27), tok(270), minted(tok(271))),
        CodeReplayed(**head(), grant_id=grt(27), code_id=tok(270), raced=False),
        GrantRevoked(**head(), grant_id=grt(27), reason=Reason.CODE_REPLAYED),
        TokenRevoked(**head(), grant_id=grt(20), token_id=tok(200), reason=Reason.COMPROMISED),
        issued(grt(35), minted(tok(350), kid="es-1"), subject=cli(1), client_id=cli(1)),
        KeyRevoked(**head(), kid="es-1", reason=Reason.COMPROMISED),
        issued(grt(36), minted(tok(360), kid="es-1"), subject=cli(1), client_id=cli(1)),
        ClientRevoked(**head(), client_id=cli(2), reason=Reason.ADMIN),
        ClientDisabled(**head(), client_id=cli(3), reason=Reason.DISABLED),
        SubjectRevoked(**head(), user_id=usr(2), reason=Reason.ABUSE),
        UserPasswordChanged(**head(), user_id=usr(3), password_hash="$argon2id$y"),
        UserDisabled(**head(), user_id=usr(3), reason=Reason.DISABLED),
        SubjectErased(**head(), user_id=usr(3)),
        found(fnd(1)),
        FindingAcknowledged(**head(), finding_id=fnd(1), sealed_reason=b"reason"),
        found(fnd(2), token_id=tok(12), grant_id=grt(1)),
        FindingDismissed(**head(), finding_id=fnd(2)),
        signed_in(ses(1), usr(1)),
        signed_in(ses(2), usr(1)),
        signed_out(ses(2), usr(1)),
        consented(usr(1), cli(1)),
        consented(usr(1), cli(2)),
        withdrawn(usr(1), cli(2)),
    )
    return history
