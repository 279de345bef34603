"""Everything that can happen. Facts only: past tense, absolute times, no methods, no secrets.

Rules for changing an event stand in the README under "Changing an event". In short: a field may be added with
a default that means "not recorded"; anything else is a new tag, with an upcaster in `codec.py`.

Identifiers are a prefix and the 32 hex digits of a UUIDv7: `tok_` token, `grt_` grant, `cli_` client, `usr_` user.
`fnd_` and 32 hex digits name a finding; they follow from what was found, so that finding it again changes nothing.
`sealed_*` fields are AES-256-GCM under the key of the person or client they are about (`service/keys.py`).
`sub_` and `whk_` name a subscriber and a webhook, `ses_` a person's session in a browser.
`by` is who did it: the caller's token id, a client id, the id of a person or of their session, or `system`.

`gc=False`: these hold no cycles, so that the collector need not walk the millions that a replay makes.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from msgspec import Meta, Struct

TENANT = "main"

# A time without its zone cannot be compared with others: recorded once, it would stop every projection for good.
Moment = Annotated[datetime, Meta(tz=True)]
Natural = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Kind(StrEnum):
    """Kinds of token, RFC 6749 §1.4 and §1.5 for the first two; and the authorization code (§4.1), which is none."""

    ACCESS = "access"
    REFRESH = "refresh"
    PAT = "pat"
    SAT = "sat"
    CODE = "code"


class Reason(StrEnum):
    """Why something was revoked. The first six may be given by callers, the rest only the service writes."""

    COMPROMISED = "compromised"
    LOGOUT = "logout"
    ROTATED = "rotated"
    ADMIN = "admin"
    ABUSE = "abuse"
    UNUSED = "unused"
    REUSE_DETECTED = "reuse_detected"
    DISABLED = "disabled"
    PASSWORD_CHANGED = "password_changed"
    CLIENT_REQUEST = "client_request"
    CODE_REPLAYED = "code_replayed"
    CONSENT_WITHDRAWN = "consent_withdrawn"
    OWNER_REQUEST = "owner_request"


class Event(Struct, frozen=True, kw_only=True, tag_field="type", gc=False):
    """What all events carry. `id` is also the `Nats-Msg-Id`; `occurred_at` is UTC, by the writing host's clock."""

    id: str
    occurred_at: Moment
    by: str
    request_id: str | None = None


class MintedToken(Struct, frozen=True, kw_only=True, gc=False):
    """One token of a grant. `sha256` is of the token string, hex. `kid` is set for JWTs. Expiry in whole seconds."""

    token_id: str
    sha256: str
    kind: Kind
    scope: str
    audience: tuple[str, ...]
    expires_at: Moment
    kid: str | None = None


# Grants and their tokens: ledger.<tenant>.grant.<grant_id>, or ledger.<tenant>.access.<client_id> for the issue of
# access-only tokens by client credentials.


class TokenIssued(Event, frozen=True, kw_only=True, tag="token.issued/1"):
    """The first event of a grant, with the tokens that it began with.

    `subject` is a user id, or the client id for client credentials (RFC 6749 §4.4). `scope` is what was granted,
    implications expanded. `refresh_idle_ttl_seconds` and `refresh_ends_at` are set exactly if a refresh token is
    among `tokens`. `rotated_from` names the PAT or SAT that this one replaces.
    """

    grant_id: str
    subject: str
    client_id: str | None
    scope: str
    audience: tuple[str, ...]
    tokens: tuple[MintedToken, ...]
    refresh_idle_ttl_seconds: int | None = None
    refresh_ends_at: Moment | None = None
    allowed_ips: tuple[str, ...] = ()
    sealed_name: bytes | None = None
    rotated_from: str | None = None


class AuthorizationGranted(Event, frozen=True, kw_only=True, tag="authorization.granted/1"):
    """The first event of a grant that a person gave (RFC 6749 §4.1): a code, and what it will be worth.

    `scope` is what was granted, implications expanded. `sealed_nonce`: what the client chose, under the person's key.
    `auth_time`: when the person signed in. `offline`: a refresh token will come, and the grant outlives the session.
    `consent_seq`, `client_seq`: of the last events of the consent and of the client when they were looked at; 0: not
    recorded.
    """

    grant_id: str
    subject: str
    client_id: str
    scope: str
    audience: tuple[str, ...]
    session_id: str
    code: MintedToken
    redirect_uri: str
    code_challenge: str
    sealed_nonce: bytes | None
    auth_time: Moment
    offline: bool
    response_type: str
    consent_seq: int = 0
    client_seq: int = 0


class CodeRedeemed(Event, frozen=True, kw_only=True, tag="code.redeemed/1"):
    """The code was exchanged for these tokens (RFC 6749 §4.1.3), once: its grant expected no other event before.

    `refresh_idle_ttl_seconds` and `refresh_ends_at` are set exactly if a refresh token is among `tokens`.
    """

    grant_id: str
    code_id: str
    tokens: tuple[MintedToken, ...]
    refresh_idle_ttl_seconds: int | None
    refresh_ends_at: Moment | None


class CodeRefused(Event, frozen=True, kw_only=True, tag="code.refused/1"):
    """The client presented the code with another verifier (RFC 7636 §4.6) or redirect URI. The code lives on.

    Of a code that was spent before: with another verifier. What it gave lives on.
    """

    grant_id: str
    code_id: str
    cause: Literal["verifier", "redirect_uri"]


class CodeReplayed(Event, frozen=True, kw_only=True, tag="code.replayed/1"):
    """A spent code was presented again, with its verifier. `raced`: at once and with all proofs, by a client that asks
    twice."""

    grant_id: str
    code_id: str
    raced: bool


class AccessRenewed(Event, frozen=True, kw_only=True, tag="access.renewed/1"):
    """A refresh token was used and stays, for a client whose refresh tokens are not rotated.

    `refresh_expires_at`: when it ends if it is not used again, from now on.
    """

    grant_id: str
    refresh_token_id: str
    tokens: tuple[MintedToken, ...]
    refresh_expires_at: Moment


class TokenRefreshed(Event, frozen=True, kw_only=True, tag="token.refreshed/1"):
    """A refresh token was spent (RFC 6749 §6). `answer_id` names the sealed answer that won the race."""

    grant_id: str
    spent_token_id: str
    answer_id: str
    tokens: tuple[MintedToken, ...]


class RefreshReplayed(Event, frozen=True, kw_only=True, tag="refresh.replayed/1"):
    """A spent refresh token was presented again. `answered`: within the retry window, with the same successor."""

    grant_id: str
    token_id: str
    answered: bool


class TokenRevoked(Event, frozen=True, kw_only=True, tag="token.revoked/1"):
    """One token ended; the rest of its grant lives on."""

    grant_id: str
    token_id: str
    reason: Reason
    sealed_comment: bytes | None = None


class TokenSuperseded(Event, frozen=True, kw_only=True, tag="token.superseded/1"):
    """A PAT or SAT was rotated: it ends at `ends_at` if it does not expire before."""

    grant_id: str
    token_id: str
    successor_id: str
    ends_at: Moment


class GrantRevoked(Event, frozen=True, kw_only=True, tag="grant.revoked/1"):
    """The grant and every token of it ended."""

    grant_id: str
    reason: Reason
    sealed_comment: bytes | None = None


# Clients: ledger.<tenant>.client.<client_id>


class ClientMetadata(Struct, frozen=True, kw_only=True):
    """RFC 7591 §2 and the ledger's own settings of a client. `secret_sha256` lives outside of it.

    The last four were added later. Their defaults are what holds for a client that was registered before.
    """

    client_name: str
    grant_types: tuple[str, ...]
    response_types: tuple[str, ...]
    redirect_uris: tuple[str, ...]
    scope: str
    token_endpoint_auth_method: Literal["client_secret_basic", "client_secret_post", "none"]
    access_token_format: Literal["jwt", "opaque"]
    access_token_ttl_seconds: int
    refresh_token_idle_ttl_seconds: int
    refresh_token_max_ttl_seconds: int
    audience: tuple[str, ...]
    may_introspect: bool
    post_logout_redirect_uris: tuple[str, ...] = ()
    require_pushed_authorization_requests: bool = False
    id_token_signed_response_alg: Literal["RS256", "ES256", "EdDSA"] = "RS256"
    refresh_token_rotation: bool = True


class ClientRegistered(Event, frozen=True, kw_only=True, tag="client.registered/1"):
    client_id: str
    metadata: ClientMetadata
    secret_sha256: str | None


class ClientChanged(Event, frozen=True, kw_only=True, tag="client.changed/1"):
    """The metadata as a whole, as it stands from now on."""

    client_id: str
    metadata: ClientMetadata


class ClientSecretRotated(Event, frozen=True, kw_only=True, tag="client.secret_rotated/1"):
    """A new secret; the one before it works until `previous_ends_at`."""

    client_id: str
    secret_sha256: str
    previous_ends_at: Moment


class ClientRevoked(Event, frozen=True, kw_only=True, tag="client.revoked/1"):
    """Every token of the client whose grant began before this event ended. The client itself stays."""

    client_id: str
    reason: Reason
    sealed_comment: bytes | None = None


class ClientDisabled(Event, frozen=True, kw_only=True, tag="client.disabled/1"):
    """The client and every token of it ended, for good."""

    client_id: str
    reason: Reason


# Users: ledger.<tenant>.user.<user_id>; ledger.<tenant>.username.<keyed hash>


class UserRegistered(Event, frozen=True, kw_only=True, tag="user.registered/1"):
    """`username_hash` is keyed (HMAC under the master key), so that a name can be looked up and not read."""

    user_id: str
    kind: Literal["person", "service"]
    username_hash: str
    sealed_profile: bytes
    scope: str
    password_hash: str | None


class UserChanged(Event, frozen=True, kw_only=True, tag="user.changed/1"):
    """Scope and sealed profile as they stand from now on."""

    user_id: str
    sealed_profile: bytes
    scope: str


class UserPasswordChanged(Event, frozen=True, kw_only=True, tag="user.password_changed/1"):
    """A new password; every token of the user issued before ended."""

    user_id: str
    password_hash: str | None


class SubjectRevoked(Event, frozen=True, kw_only=True, tag="subject.revoked/1"):
    """Every token of the subject whose grant began before this event ended. The user stays."""

    user_id: str
    reason: Reason
    sealed_comment: bytes | None = None


class UserDisabled(Event, frozen=True, kw_only=True, tag="user.disabled/1"):
    """The user and every token of it ended, for good."""

    user_id: str
    reason: Reason


class SubjectErased(Event, frozen=True, kw_only=True, tag="subject.erased/1"):
    """The subject's key was destroyed: whatever was sealed under it can be read by nobody any more."""

    user_id: str


class UsernameClaimed(Event, frozen=True, kw_only=True, tag="username.claimed/1"):
    """Appended with expected sequence 0, so that two users cannot take one name."""

    username_hash: str
    user_id: str


# Sessions of people in browsers: ledger.<tenant>.session.<session_id>. The cookie is no part of it.


class SessionStarted(Event, frozen=True, kw_only=True, tag="session.started/1"):
    """A person signed in. `methods`: how, by names of RFC 8176. It ends at `expires_at` if not before.

    `user_seq`: the last event of the user that was known when they proved who they are. Whatever cuts off the user
    later than that ends the session, even if it came before this event. `sealed_place`: browser and network address, by
    which they may know it again; None where nothing was recorded.
    """

    session_id: str
    user_id: str
    auth_time: Moment
    expires_at: Moment
    methods: tuple[str, ...]
    user_seq: Natural
    sealed_place: bytes | None = None


class SessionEnded(Event, frozen=True, kw_only=True, tag="session.ended/1"):
    """Signed out, there or (`by`) from another session of theirs; `replaced`: somebody signed in anew in the same
    browser; `admin`: ended by others."""

    session_id: str
    user_id: str
    reason: Literal["signed_out", "replaced", "admin"]


# What people allowed clients: ledger.<tenant>.consent.<user_id>_<client_id>


class ConsentGiven(Event, frozen=True, kw_only=True, tag="consent.given/1"):
    """`scope`: all that the client may be granted without asking the person, as it stands from now on."""

    user_id: str
    client_id: str
    scope: str


class ConsentWithdrawn(Event, frozen=True, kw_only=True, tag="consent.withdrawn/1"):
    """The client is to ask again, and whatever the person granted it before ends."""

    user_id: str
    client_id: str


# Scopes: ledger.<tenant>.scope.<base32 of the name>


class ScopeRegistered(Event, frozen=True, kw_only=True, tag="scope.registered/1"):
    """RFC 6749 §3.3. `audience`: the resource servers that the scope is for; empty means any."""

    name: str
    description: str
    audience: tuple[str, ...]
    implies: tuple[str, ...]


class ScopeChanged(Event, frozen=True, kw_only=True, tag="scope.changed/1"):
    name: str
    description: str
    audience: tuple[str, ...]
    implies: tuple[str, ...]


class ScopeDisabled(Event, frozen=True, kw_only=True, tag="scope.disabled/1"):
    """Nobody is granted the scope from now on; tokens that have it keep it."""

    name: str


# Signing keys: ledger.<tenant>.key.<kid>. The private half lives sealed in a key-value bucket.


class KeyIntroduced(Event, frozen=True, kw_only=True, tag="key.introduced/1"):
    """The key is announced in the JWKS (RFC 7517) and signs nothing yet. `public_jwk` is JSON of public members.

    `purpose`: of the tokens that it is to sign, access tokens or ID tokens.
    """

    kid: str
    alg: Literal["EdDSA", "ES256", "RS256"]
    public_jwk: str
    purpose: Literal["access", "id"] = "access"


class KeyActivated(Event, frozen=True, kw_only=True, tag="key.activated/1"):
    """The key signs from now on."""

    kid: str


class KeyRetired(Event, frozen=True, kw_only=True, tag="key.retired/1"):
    """The key signs no more; it stays in the JWKS until `remove_at`, when the last token it signed has expired."""

    kid: str
    remove_at: Moment


class KeyRemoved(Event, frozen=True, kw_only=True, tag="key.removed/1"):
    """The key left the JWKS and its private half was destroyed."""

    kid: str


class KeyRevoked(Event, frozen=True, kw_only=True, tag="key.revoked/1"):
    """The key left the JWKS at once, and every token that it signed, or will ever be found to have signed, ended."""

    kid: str
    reason: Reason


# Findings of abuse: ledger.<tenant>.finding.<finding_id>, the first event with expected sequence 0. They are kept for
# ever, so no address or user agent stands in them: the evidence points at uses, which are kept for a limited time.

RuleMode = Literal["observe", "notify", "revoke"]


class Evidence(Struct, frozen=True, kw_only=True, gc=False):
    """Where a piece of evidence is recorded.

    A `use` or a count of `refused` requests: `seq` in USAGE and `index` in that block; an `event`: `seq` in LEDGER.
    """

    source: Literal["use", "refused", "event"]
    seq: int
    index: int = 0


class Quantity(Struct, frozen=True, kw_only=True, gc=False):
    """What was counted or measured, or the value that a parameter had."""

    quantity: str
    value: float


class AbuseDetected(Event, frozen=True, kw_only=True, tag="abuse.detected/1"):
    """A rule found an incident. `detected_at`: when the use occurred that crossed the threshold.

    `first_at`, `last_at`: of the evidence; there may be more than is listed. `mode` and `parameters` are what held
    when it was found. `self_reported`: all of it rests on what callers say of their own callers; that alone never
    revokes. Of the ids those are there that apply.
    """

    finding_id: str
    rule: str
    rule_version: int
    mode: RuleMode
    detected_at: Moment
    first_at: Moment
    last_at: Moment
    self_reported: bool
    counts: tuple[Quantity, ...]
    parameters: tuple[Quantity, ...]
    evidence: tuple[Evidence, ...]
    token_id: str | None = None
    grant_id: str | None = None
    client_id: str | None = None
    subject: str | None = None
    caller: str | None = None


class FindingAcknowledged(Event, frozen=True, kw_only=True, tag="finding.acknowledged/1"):
    """Somebody saw the finding and takes it for abuse. The reason is sealed for whom the finding is about."""

    finding_id: str
    sealed_reason: bytes | None = None


class FindingDismissed(Event, frozen=True, kw_only=True, tag="finding.dismissed/1"):
    """Somebody saw the finding and takes it for no abuse."""

    finding_id: str
    sealed_reason: bytes | None = None


# Reading of the audit trail: ledger.<tenant>.audit.<id of who asks>, exports ledger.<tenant>.export.<export_id>


class AuditRead(Event, frozen=True, kw_only=True, tag="audit.read/1"):
    """Somebody asked for the audit trail, by SQL or for an export. Recorded before a row is handed out.

    `subject`, `client_id`: as of the token that asked. `read_id` is an export's id. `dataset`: of an export.
    `sealed_statement`: JSON of the statement or of the export's filters, sealed under the key of `subject`, since
    addresses and names may stand in it; `statement_sha256` is of that JSON, hex.
    """

    read_id: str
    subject: str
    client_id: str | None
    what: Literal["query", "export"]
    dataset: str | None
    format: Literal["json", "csv", "arrow", "parquet", "ndjson"]
    statement_sha256: str
    sealed_statement: bytes


class AuditExported(Event, frozen=True, kw_only=True, tag="audit.exported/1"):
    """The last byte of an export was handed out. One without this event is not complete.

    `sha256` is of its `size` bytes, hex. It holds all `rows` that LEDGER has up to `ledger_seq` and USAGE up to
    `usage_seq`, of which the numbers of the first and last are told. `statement`: its SQL, without parameters.
    """

    read_id: str
    rows: int
    size: int
    sha256: str
    statement: str
    ledger_seq: int
    usage_seq: int
    first_ledger_seq: int | None
    last_ledger_seq: int | None
    first_usage_seq: int | None
    last_usage_seq: int | None
    software: str


# Followers of the feed of revocations: ledger.<tenant>.subscriber.<subscriber_id> and
# ledger.<tenant>.webhook.<webhook_id>. Each event carries all that is known, so that the last one of a subject is its
# present state.


class SubscriberRegistered(Event, frozen=True, kw_only=True, tag="subscriber.registered/1"):
    """An enforcement point that follows the feed. `owner`: the user or client whose tokens may act for it.

    `nats`: it fetches from a durable consumer that is named like it, with the nkey whose public half is `public_key`.
    The consumer began after the sequence `after`, and would begin there again if it were lost.
    `http`: it follows by server-sent events or by polling, from where it says itself.
    """

    subscriber_id: str
    subscriber_name: str
    transport: Literal["nats", "http"]
    owner: str
    public_key: str | None = None
    after: int = 0


class SubscriberRemoved(Event, frozen=True, kw_only=True, tag="subscriber.removed/1"):
    subscriber_id: str


class WebhookMetadata(Struct, frozen=True, kw_only=True, gc=False):
    """`origin`: scheme, host and port of the URL. The whole of it may be a secret, and stands sealed elsewhere.

    `client_id`, `subject`, `grant_id`: only what could concern these is delivered. `disabled_reason` is None while it
    is enabled. `secret_rotated_at`: when the present secret was made, if it is not the first.
    """

    webhook_name: str
    owner: str
    origin: str
    client_id: str | None = None
    subject: str | None = None
    grant_id: str | None = None
    disabled_reason: Literal["asked", "gone", "failing", "owner_disabled"] | None = None
    secret_rotated_at: Moment | None = None


class WebhookRegistered(Event, frozen=True, kw_only=True, tag="webhook.registered/1"):
    webhook_id: str
    webhook: WebhookMetadata


class WebhookChanged(Event, frozen=True, kw_only=True, tag="webhook.changed/1"):
    """The webhook as it stands from now on: changed, disabled or enabled, with a new secret."""

    webhook_id: str
    webhook: WebhookMetadata


class WebhookRemoved(Event, frozen=True, kw_only=True, tag="webhook.removed/1"):
    webhook_id: str


LedgerEvent = (
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
    | ClientRegistered
    | ClientChanged
    | ClientSecretRotated
    | ClientRevoked
    | ClientDisabled
    | UserRegistered
    | UserChanged
    | UserPasswordChanged
    | SubjectRevoked
    | UserDisabled
    | SubjectErased
    | UsernameClaimed
    | SessionStarted
    | SessionEnded
    | ConsentGiven
    | ConsentWithdrawn
    | ScopeRegistered
    | ScopeChanged
    | ScopeDisabled
    | KeyIntroduced
    | KeyActivated
    | KeyRetired
    | KeyRemoved
    | KeyRevoked
    | AbuseDetected
    | FindingAcknowledged
    | FindingDismissed
    | AuditRead
    | AuditExported
    | SubscriberRegistered
    | SubscriberRemoved
    | WebhookRegistered
    | WebhookChanged
    | WebhookRemoved
)


# After these every token is as good as before: findings, which may be followed by a revocation of its own, who read the
# audit trail, and who follows the feed.
CHANGING_NO_TOKEN = (
    AbuseDetected,
    FindingAcknowledged,
    FindingDismissed,
    AuditRead,
    AuditExported,
    SubscriberRegistered,
    SubscriberRemoved,
    WebhookRegistered,
    WebhookChanged,
    WebhookRemoved,
)


class Recorded(Struct, frozen=True, kw_only=True, gc=False):
    """An event as it stands in the log. `seq` is its position in LEDGER, `recorded_at` JetStream's own time."""

    seq: int
    recorded_at: Moment
    subject: str
    event: LedgerEvent


# Uses: usage.<tenant>.<writer>, MessagePack blocks. Positional: fields may only be appended, with a default.


class Context(Struct, frozen=True, array_like=True, gc=False):
    """Where a use came from. Nowhere else in the log can addresses and agents be read; kept for a limited time."""

    ip: str | None = None
    user_agent: str | None = None
    method: str | None = None
    path: str | None = None


class TokenUsed(Struct, frozen=True, array_like=True, gc=False):
    """One validation or introspection of a token, allowed or refused.

    `occurred_at_us`: microseconds since 1970, UTC. `token_id` is None when the token is unknown; `token_sha256` is
    then the hash of what was presented, and None otherwise. `caller`: the token or client id that asked.
    `scope`, `audience`: what was asked for, empty if nothing. `endpoint`: `validate`, `batch`, `introspect`,
    `forward-auth`, `api`, `userinfo`, or `reported` for what the caller decided by itself and told afterwards.
    """

    occurred_at_us: int
    token_id: str | None
    token_sha256: bytes | None
    outcome: str
    endpoint: str
    caller: str
    scope: str = ""
    audience: str = ""
    context: Context | None = None


class RefusedCount(Struct, frozen=True, array_like=True):
    """Requests that named no known token, counted per caller, address, outcome and minute.

    `minute`: minutes since 1970, UTC. For `invalid_client`, `caller` is the client whose secret was not the right one;
    for `invalid_password` the user whose password was not, if there is one.
    """

    minute: int
    caller: str
    ip: str | None
    outcome: str
    endpoint: str
    count: int


class UseBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="uses/1"):
    """Many uses in one message. `lost`: uses that this writer is known to have dropped before this block."""

    block_id: str
    writer: str
    uses: tuple[TokenUsed, ...]
    refused: tuple[RefusedCount, ...] = ()
    lost: int = 0


# Receipts: receipts.<tenant>.<writer>, MessagePack blocks, positional as uses are.


class Receipt(Struct, frozen=True, array_like=True, gc=False):
    """A follower applied everything that was announced up to `ledger_seq`.

    `follower`: a subscriber's or webhook's id. `applied_at_us`: microseconds since 1970, UTC, by the clock of the host
    that heard of it.
    """

    follower: str
    ledger_seq: Natural
    applied_at_us: Natural


class ReceiptBlock(Struct, frozen=True, kw_only=True, tag_field="type", tag="receipts/1"):
    """Many receipts in one message."""

    writer: str
    receipts: tuple[Receipt, ...]
