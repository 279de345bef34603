"""What each stored version of an event means: its file beside this one decodes to this. Entries are never changed.

A new version is a new tag, a new file and a new entry. When a tag is superseded, its entry holds what its upcaster
makes of it, in the current shape, and its tag joins `SUPERSEDED`. When a tag gets a field, the file that it has stays,
and its entry shows the field's default; the tag joins `GROWN`, with a file and an entry under the name given there.
"""

from __future__ import annotations

from datetime import UTC, datetime

from msgspec.structs import replace

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
    Context,
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
    Receipt,
    ReceiptBlock,
    RefreshReplayed,
    RefusedCount,
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
    TokenUsed,
    UseBlock,
    UserChanged,
    UserDisabled,
    UsernameClaimed,
    UserPasswordChanged,
    UserRegistered,
    WebhookChanged,
    WebhookMetadata,
    WebhookRegistered,
    WebhookRemoved,
)

SUPERSEDED: frozenset[str] = frozenset()
# Tags that got fields since, and under which name the newest bytes are kept.
GROWN = {
    "client.registered/1": "client.registered/1.2",
    "client.changed/1": "client.changed/1.2",
    "key.introduced/1": "key.introduced/1.2",
    "session.started/1": "session.started/1.2",
    "authorization.granted/1": "authorization.granted/1.2",
}

AT = datetime(2026, 1, 31, 12, 0, 0, 123456, tzinfo=UTC)
LATER = datetime(2026, 4, 30, 12, 0, tzinfo=UTC)
CLIENT = "cli_0198f0a0c0de7000800000000000000c"
SESSION = "ses_0198f0a0c0de7000800000000000001d"
USER = "usr_0198f0a0c0de7000800000000000000d"
GRANT = "grt_0198f0a0c0de7000800000000000000e"
SESSION = "ses_0198f0a0c0de7000800000000000001d"
CODE = "tok_0198f0a0c0de7000800000000000001e"
ACCESS = "tok_0198f0a0c0de70008000000000000001"
REFRESH = "tok_0198f0a0c0de70008000000000000002"
NEXT_ACCESS = "tok_0198f0a0c0de70008000000000000003"
NEXT_REFRESH = "tok_0198f0a0c0de70008000000000000004"
ADMIN = "tok_0198f0a0c0de7000800000000000000f"
SUBSCRIBER = "sub_0198f0a0c0de7000800000000000001b"
WEBHOOK = "whk_0198f0a0c0de7000800000000000001c"
FINDING = "fnd_0198f0a0c0de70008000000000000001"
SESSION = "ses_0198f0a0c0de7000800000000000001d"
NAME_HASH = "5e" * 32

METADATA = ClientMetadata(
    client_name="shop",
    grant_types=("client_credentials", "refresh_token"),
    response_types=(),
    redirect_uris=("https://shop.example/back",),
    scope="orders:read orders:write",
    token_endpoint_auth_method="client_secret_basic",
    access_token_format="jwt",
    access_token_ttl_seconds=3600,
    refresh_token_idle_ttl_seconds=1_209_600,
    refresh_token_max_ttl_seconds=7_776_000,
    audience=("https://api.example",),
    may_introspect=False,
)
GROWN_METADATA = replace(
    METADATA,
    post_logout_redirect_uris=("https://shop.example/out",),
    require_pushed_authorization_requests=True,
    id_token_signed_response_alg="ES256",
    refresh_token_rotation=False,
)


def _event(number: int, by: str = ADMIN) -> dict[str, object]:
    return {
        "id": f"0198f0a0c0de70009{number:015x}",
        "occurred_at": AT,
        "by": by,
        "request_id": f"0198f0a0c0de700091{number:02x}-a",
    }


def _minted(token_id: str, digit: str, kind: Kind, scope: str, kid: str | None = None) -> MintedToken:
    return MintedToken(
        token_id=token_id,
        sha256=digit * 64,
        kind=kind,
        scope=scope,
        audience=("https://api.example",),
        expires_at=LATER,
        kid=kid,
    )


def _expected() -> dict[str, LedgerEvent]:
    issued = TokenIssued(
        **_event(1),
        grant_id=GRANT,
        subject=CLIENT,
        client_id=CLIENT,
        scope="orders:read orders:write",
        audience=("https://api.example",),
        tokens=(
            _minted(ACCESS, "a", Kind.ACCESS, "orders:read", kid="ed-1-0a1b2c3d"),
            _minted(REFRESH, "b", Kind.REFRESH, "orders:read orders:write"),
        ),
        refresh_idle_ttl_seconds=1_209_600,
        refresh_ends_at=LATER,
        allowed_ips=("192.0.2.0/24", "2001:db8::/32"),
        sealed_name=b"\x00sealed\xff",
        rotated_from=NEXT_ACCESS,
    )
    tokens = (
        _minted(NEXT_ACCESS, "c", Kind.ACCESS, "orders:read"),
        _minted(NEXT_REFRESH, "d", Kind.REFRESH, "orders:read orders:write"),
    )
    jwk = '{"alg":"EdDSA","crv":"Ed25519","kid":"ed-1-0a1b2c3d","kty":"OKP","use":"sig","x":"' + "A" * 43 + '"}'
    sealed = b"\x01sealed\xfe"
    granted = AuthorizationGranted(
        **_event(36, USER),
        grant_id=GRANT,
        subject=USER,
        client_id=CLIENT,
        scope="openid orders:read",
        audience=("https://api.example",),
        session_id=SESSION,
        code=_minted(CODE, "9", Kind.CODE, "openid orders:read"),
        redirect_uri="http://127.0.0.1:51004/back",
        code_challenge="E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM",
        sealed_nonce=sealed,
        auth_time=AT,
        offline=True,
        response_type="code id_token",
    )
    return {
        "token.issued/1": issued,
        "token.refreshed/1": TokenRefreshed(
            **_event(2, CLIENT), grant_id=GRANT, spent_token_id=REFRESH, answer_id="7a" * 16, tokens=tokens
        ),
        "refresh.replayed/1": RefreshReplayed(**_event(3, CLIENT), grant_id=GRANT, token_id=REFRESH, answered=True),
        "token.revoked/1": TokenRevoked(
            **_event(4), grant_id=GRANT, token_id=ACCESS, reason=Reason.COMPROMISED, sealed_comment=sealed
        ),
        "token.superseded/1": TokenSuperseded(
            **_event(5), grant_id=GRANT, token_id=ACCESS, successor_id=NEXT_ACCESS, ends_at=LATER
        ),
        "grant.revoked/1": GrantRevoked(
            **_event(6, "system"), grant_id=GRANT, reason=Reason.REUSE_DETECTED, sealed_comment=sealed
        ),
        "client.registered/1": ClientRegistered(
            **_event(7), client_id=CLIENT, metadata=METADATA, secret_sha256="e" * 64
        ),
        "client.changed/1": ClientChanged(**_event(8), client_id=CLIENT, metadata=METADATA),
        "client.secret_rotated/1": ClientSecretRotated(
            **_event(9), client_id=CLIENT, secret_sha256="f" * 64, previous_ends_at=LATER
        ),
        "client.revoked/1": ClientRevoked(**_event(10), client_id=CLIENT, reason=Reason.ADMIN, sealed_comment=sealed),
        "client.disabled/1": ClientDisabled(**_event(11), client_id=CLIENT, reason=Reason.UNUSED),
        "user.registered/1": UserRegistered(
            **_event(12),
            user_id=USER,
            kind="person",
            username_hash=NAME_HASH,
            sealed_profile=sealed,
            scope="orders:read",
            password_hash="$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHRzYWx0$" + "h" * 43,
        ),
        "user.changed/1": UserChanged(**_event(13), user_id=USER, sealed_profile=sealed, scope=""),
        "user.password_changed/1": UserPasswordChanged(**_event(14), user_id=USER, password_hash=None),
        "subject.revoked/1": SubjectRevoked(**_event(15), user_id=USER, reason=Reason.ABUSE, sealed_comment=sealed),
        "user.disabled/1": UserDisabled(**_event(16), user_id=USER, reason=Reason.DISABLED),
        "subject.erased/1": SubjectErased(**_event(17), user_id=USER),
        "username.claimed/1": UsernameClaimed(**_event(18), username_hash=NAME_HASH, user_id=USER),
        "scope.registered/1": ScopeRegistered(
            **_event(19),
            name="orders:write",
            description="change orders",
            audience=("https://api.example",),
            implies=("orders:read",),
        ),
        "scope.changed/1": ScopeChanged(
            **_event(20), name="orders:write", description="Bestellungen \u00e4ndern", audience=(), implies=()
        ),
        "scope.disabled/1": ScopeDisabled(**_event(21), name="orders:write"),
        "key.introduced/1": KeyIntroduced(**_event(22, "system"), kid="ed-1-0a1b2c3d", alg="EdDSA", public_jwk=jwk),
        "key.introduced/1.2": KeyIntroduced(
            **_event(36, "system"), kid="id-ed-1-0a1b2c3d", alg="EdDSA", public_jwk=jwk, purpose="id"
        ),
        "key.activated/1": KeyActivated(**_event(23, "system"), kid="ed-1-0a1b2c3d"),
        "key.retired/1": KeyRetired(**_event(24, "system"), kid="ed-1-0a1b2c3d", remove_at=LATER),
        "key.revoked/1": KeyRevoked(**_event(37, "system"), kid="ed-1-0a1b2c3d", reason=Reason.COMPROMISED),
        "key.removed/1": KeyRemoved(**_event(25, "system"), kid="ed-1-0a1b2c3d"),
        "abuse.detected/1": AbuseDetected(
            **_event(26, "system"),
            finding_id=FINDING,
            rule="many_addresses",
            rule_version=2,
            mode="revoke",
            detected_at=AT,
            first_at=AT,
            last_at=LATER,
            self_reported=True,
            counts=(Quantity(quantity="networks", value=7),),
            parameters=(Quantity(quantity="networks", value=6), Quantity(quantity="factor", value=2.5)),
            evidence=(Evidence(source="use", seq=7, index=3), Evidence(source="event", seq=9)),
            token_id=ACCESS,
            grant_id=GRANT,
            client_id=CLIENT,
            subject=CLIENT,
            caller=ADMIN,
        ),
        "finding.acknowledged/1": FindingAcknowledged(**_event(27), finding_id=FINDING, sealed_reason=sealed),
        "finding.dismissed/1": FindingDismissed(**_event(28), finding_id=FINDING, sealed_reason=sealed),
        "audit.read/1": AuditRead(
            **_event(26),
            read_id="exp_0198f0a0c0de7000800000000000001a",
            subject=USER,
            client_id=None,
            what="export",
            dataset="uses",
            format="parquet",
            statement_sha256="6f" * 32,
            sealed_statement=sealed,
        ),
        "audit.exported/1": AuditExported(
            **_event(27),
            read_id="exp_0198f0a0c0de7000800000000000001a",
            rows=1000,
            size=65_536,
            sha256="7e" * 32,
            statement="SELECT * FROM uses_v1",
            ledger_seq=25,
            usage_seq=12,
            first_ledger_seq=None,
            last_ledger_seq=None,
            first_usage_seq=1,
            last_usage_seq=12,
            software="token-ledger 0.1.0",
        ),
        "subscriber.registered/1": SubscriberRegistered(
            **_event(29),
            subscriber_id=SUBSCRIBER,
            subscriber_name="orders-api",
            transport="nats",
            owner=USER,
            public_key="U" + "A" * 55,
            after=41,
        ),
        "subscriber.removed/1": SubscriberRemoved(**_event(30), subscriber_id=SUBSCRIBER),
        "webhook.registered/1": WebhookRegistered(
            **_event(31),
            webhook_id=WEBHOOK,
            webhook=WebhookMetadata(
                webhook_name="billing", owner=CLIENT, origin="https://billing.example:443", client_id=CLIENT
            ),
        ),
        "webhook.changed/1": WebhookChanged(
            **_event(32),
            webhook_id=WEBHOOK,
            webhook=WebhookMetadata(
                webhook_name="billing",
                owner=CLIENT,
                origin="https://billing.example:443",
                client_id=CLIENT,
                subject=USER,
                grant_id=GRANT,
                disabled_reason="failing",
                secret_rotated_at=AT,
            ),
        ),
        "webhook.removed/1": WebhookRemoved(**_event(33), webhook_id=WEBHOOK),
        "client.registered/1.2": ClientRegistered(
            **_event(34), client_id=CLIENT, metadata=GROWN_METADATA, secret_sha256="e" * 64
        ),
        "client.changed/1.2": ClientChanged(**_event(35), client_id=CLIENT, metadata=GROWN_METADATA),
        "authorization.granted/1": granted,
        "code.redeemed/1": CodeRedeemed(
            **_event(37, CLIENT),
            grant_id=GRANT,
            code_id=CODE,
            tokens=tokens,
            refresh_idle_ttl_seconds=1_209_600,
            refresh_ends_at=LATER,
        ),
        "code.refused/1": CodeRefused(**_event(38, CLIENT), grant_id=GRANT, code_id=CODE, cause="redirect_uri"),
        "code.replayed/1": CodeReplayed(**_event(39, CLIENT), grant_id=GRANT, code_id=CODE, raced=True),
        "access.renewed/1": AccessRenewed(
            **_event(40, CLIENT),
            grant_id=GRANT,
            refresh_token_id=REFRESH,
            tokens=tokens[:1],
            refresh_expires_at=LATER,
        ),
        "session.started/1": SessionStarted(
            **_event(34, USER),
            session_id=SESSION,
            user_id=USER,
            auth_time=AT,
            expires_at=LATER,
            methods=("pwd",),
            user_seq=12,
        ),
        "session.started/1.2": SessionStarted(
            **_event(42, USER),
            session_id=SESSION,
            user_id=USER,
            auth_time=AT,
            expires_at=LATER,
            methods=("pwd",),
            user_seq=12,
            sealed_place=sealed,
        ),
        "session.ended/1": SessionEnded(**_event(35, USER), session_id=SESSION, user_id=USER, reason="signed_out"),
        "consent.given/1": ConsentGiven(**_event(36, USER), user_id=USER, client_id=CLIENT, scope="openid orders:read"),
        "consent.withdrawn/1": ConsentWithdrawn(**_event(37, USER), user_id=USER, client_id=CLIENT),
        "authorization.granted/1.2": replace(granted, **_event(41, USER), consent_seq=1234, client_seq=123),
    }


EVENTS = _expected()

BLOCKS = {
    "uses/1": UseBlock(
        block_id="9b" * 16,
        writer="host-4711",
        uses=(
            TokenUsed(
                1_769_860_800_123_456,
                ACCESS,
                None,
                "valid",
                "validate",
                ADMIN,
                "orders:read",
                "https://api.example",
                Context("192.0.2.7", "curl/8.0", "GET", "/orders"),
            ),
            TokenUsed(1_769_860_800_223_456, None, bytes(range(32)), "unknown", "introspect", CLIENT),
        ),
        refused=(RefusedCount(29_497_680, "", "192.0.2.9", "malformed", "api", 17),),
        lost=3,
    ),
    "receipts/1": ReceiptBlock(
        writer="host-4711",
        receipts=(Receipt(SUBSCRIBER, 41, 1_769_860_800_123_456), Receipt(WEBHOOK, 40, 1_769_860_800_223_456)),
    ),
}
