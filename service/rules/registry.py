"""The rules of clients, users, usernames and scopes. Pure: ids, hashes and times come in, events or a refusal come out.

Two rules run through all of them. Nobody confers what they lack: whoever makes or changes something by which a
`ledger:*` scope could be gained must hold that scope. What was disabled or erased does not change any more.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from msgspec import Struct
from msgspec.structs import replace

from events.types import (
    ClientChanged,
    ClientDisabled,
    ClientMetadata,
    ClientRegistered,
    ClientSecretRotated,
    LedgerEvent,
    Reason,
    ScopeChanged,
    ScopeDisabled,
    ScopeRegistered,
    SubjectErased,
    UserChanged,
    UserDisabled,
    UsernameClaimed,
    UserPasswordChanged,
    UserRegistered,
)
from projections.registry import Client, Scope, User, Username
from service.caller import ADMIN, Caller
from service.commands import check_confers
from service.errors import (
    AlreadyExists,
    Gone,
    InvalidClientMetadata,
    InvalidRedirectUri,
    InvalidRequest,
    InvalidScope,
    NotFound,
)
from service.rules.grants import Stamp, head
from service.settings import is_loopback
from service.validation import SCOPE_SYNTAX

DAY_SECONDS = 86_400
ACCESS_TOKEN_TTL_SECONDS = 3_600
REFRESH_IDLE_TTL_SECONDS = 14 * DAY_SECONDS
REFRESH_MAX_TTL_SECONDS = 90 * DAY_SECONDS
SCOPE_NAMES_MAX = 100
SCOPE_NAME_CHARS_MAX = 200
JWT_SCOPE_AND_AUDIENCE_CHARS_MAX = 1_800  # a longer token would not fit into the 4,096 characters that are looked at
LEDGER_SCOPES = frozenset(
    f"ledger:{name}" for name in ("admin", "clients", "users", "issue", "validate", "revoke", "audit", "subscribe")
)
GRANT_TYPES = ("client_credentials", "refresh_token", "authorization_code")
OPENID_SCOPES = ("openid", "profile", "email", "offline_access")  # OIDC Core §5.4, §11: everybody has them

_PLAIN = "must have no control characters, and no blanks at its ends"
UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_URI_SYNTAX = re.compile(r"[!-~]+")  # printable ASCII without the blank
_URI = re.compile(r"(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+")  # RFC 3986 §2
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|[0-9a-fA-F:.]+")  # it will stand in headers
_URI_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")

Scopes = Mapping[str, Scope]


def check_scope(scope: str, scopes: Scopes, *, already: str = "") -> str:
    """The scope with each name once. A name need not be registered; what stands in `already` may be disabled.

    Raises: InvalidScope. Source: RFC 6749 §3.3, App. A.4.
    """
    if not scope:
        return ""
    if not SCOPE_SYNTAX.fullmatch(scope):
        raise InvalidScope(
            "a scope is printable ASCII without quote and backslash, its names separated by one space each",
            fix='send it like "orders:read orders:write"',
        )
    names = dict.fromkeys(scope.split(" "))
    if len(names) > SCOPE_NAMES_MAX:
        raise InvalidScope(f"the scope has {len(names)} names and may have {SCOPE_NAMES_MAX}")
    for name in names:
        _check_scope_name(name)
        known = scopes.get(name)
        if known is not None and known.disabled_at is not None and name not in already.split(" "):
            raise InvalidScope(f"the scope {name} is disabled", fix=f"leave {name} out")
    return " ".join(names)


def _check_scope_name(name: str) -> None:
    if len(name) > SCOPE_NAME_CHARS_MAX:
        raise InvalidScope(f"a scope name is longer than {SCOPE_NAME_CHARS_MAX} characters")
    if name.startswith("ledger:") and name not in LEDGER_SCOPES:
        raise InvalidScope(
            f"{name} is none of the ledger's scopes, and names with ledger: are reserved",
            fix=f"use one of {' '.join(sorted(LEDGER_SCOPES))}, or another name",
        )


# Clients


def default_metadata(client_id: str, issuer: str) -> ClientMetadata:
    """What holds where nothing was said. Source: RFC 7591 §2, where it leaves the choice to us."""
    return ClientMetadata(
        client_name=client_id,
        grant_types=("client_credentials",),
        response_types=(),
        redirect_uris=(),
        scope="",
        token_endpoint_auth_method="client_secret_basic",
        access_token_format="jwt",
        access_token_ttl_seconds=ACCESS_TOKEN_TTL_SECONDS,
        refresh_token_idle_ttl_seconds=REFRESH_IDLE_TTL_SECONDS,
        refresh_token_max_ttl_seconds=REFRESH_MAX_TTL_SECONDS,
        audience=(issuer,),
        may_introspect=False,
    )


def merge_metadata(old: ClientMetadata, changes: Mapping[str, Any], default: ClientMetadata) -> ClientMetadata:
    """`old` with the changes; None resets to the default. Source: RFC 7396.

    Response types follow the grant types, and the shorter lifetime the longer one, unless both are named.
    """
    values = {name: getattr(default, name) if value is None else value for name, value in changes.items()}
    for name in ("grant_types", "response_types", "redirect_uris", "audience", "post_logout_redirect_uris"):
        if name in values:
            values[name] = tuple(dict.fromkeys(values[name]))
    grant_types = values.get("grant_types", old.grant_types)
    if {"grant_types", "response_types"} & changes.keys() and changes.get("response_types") is None:
        kept = () if "response_types" in changes else old.response_types
        values["response_types"] = (kept or ("code",)) if "authorization_code" in grant_types else ()
    idle, longest = "refresh_token_idle_ttl_seconds", "refresh_token_max_ttl_seconds"
    if longest in values and changes.get(idle) is None:
        values[idle] = min(values.get(idle, getattr(old, idle)), values[longest])
    return replace(old, **values)


def check_metadata(metadata: ClientMetadata) -> None:
    """What the fields of a client must be together. Each alone was checked where it was read.

    Raises: InvalidClientMetadata, InvalidRedirectUri, InvalidRequest. Source: RFC 7591 §2, §3.2.2; RFC 6749 §4.4.
    """
    if not is_plain(metadata.client_name):
        raise InvalidClientMetadata(f"client_name {_PLAIN}")
    check_audience(metadata.audience)
    grants, public = metadata.grant_types, metadata.token_endpoint_auth_method == "none"
    if bool(metadata.response_types) != ("authorization_code" in grants):
        raise InvalidClientMetadata(
            "response types with a code and the grant type authorization_code go together",
            fix="name both or none; response_types may be left out",
        )
    for uri in (*metadata.redirect_uris, *metadata.post_logout_redirect_uris):
        check_redirect_uri(uri)
    if "authorization_code" in grants and not metadata.redirect_uris:
        raise InvalidRedirectUri("a client with authorization_code needs a redirect URI", fix="give redirect_uris")
    if public and "client_credentials" in grants:
        raise InvalidClientMetadata(
            "a public client cannot use client_credentials (RFC 6749 §4.4)",
            fix="choose another token_endpoint_auth_method, or other grant_types",
        )
    if public and not metadata.refresh_token_rotation:
        raise InvalidClientMetadata(
            "a public client's refresh tokens are rotated (RFC 9700 §2.2.2)",
            fix="choose another token_endpoint_auth_method, or leave refresh_token_rotation out",
        )
    if public and metadata.may_introspect:
        raise InvalidClientMetadata("a public client cannot introspect: it cannot prove who it is")
    if metadata.refresh_token_idle_ttl_seconds > metadata.refresh_token_max_ttl_seconds:
        raise InvalidClientMetadata("refresh_token_idle_ttl_seconds is more than refresh_token_max_ttl_seconds")
    carried = len(metadata.scope) + sum(map(len, metadata.audience))
    if metadata.access_token_format == "jwt" and carried > JWT_SCOPE_AND_AUDIENCE_CHARS_MAX:
        raise InvalidClientMetadata(
            f"scope and audience together have {carried} characters, and "
            f"{JWT_SCOPE_AND_AUDIENCE_CHARS_MAX} fit into a JWT",
            fix="use access_token_format opaque, or less scope or audience",
        )


def check_redirect_uri(uri: str) -> None:
    """An absolute URI without fragment: https, http to the host itself, or a private-use scheme with a dot.

    Raises: InvalidRedirectUri. Source: RFC 6749 §3.1.2, RFC 8252 §7, RFC 9700 §2.1.
    """
    wrong = None
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        parts, host = urlsplit(""), ""
    scheme = uri.partition(":")[0]
    if not _URI.fullmatch(uri) or not _URI_SCHEME.fullmatch(scheme) or ":" not in uri:
        wrong = "must be an absolute URI (RFC 3986), with its scheme in lower case"
    elif "#" in uri:
        wrong = "must have no fragment"
    elif scheme not in {"http", "https"}:
        # RFC 8252 §7.1: private-use schemes are reversed domain names; that also leaves out javascript: and data:.
        wrong = None if "." in scheme else f"must not use the scheme {scheme}:"
    elif not _HOST.fullmatch(host) or "@" in parts.netloc:
        wrong = "must name one host, without user name, password or wildcard"
    elif scheme == "http" and not is_loopback(host):
        wrong = "must use https; http is for 127.0.0.1, [::1] and localhost only"
    if wrong:
        raise InvalidRedirectUri(f"a redirect URI {wrong}")


def check_audience(names: tuple[str, ...]) -> None:
    """Names of resource servers are printable ASCII without blanks. Raises: InvalidRequest."""
    if not all(_URI_SYNTAX.fullmatch(name) for name in names):
        raise InvalidRequest(
            "an audience is printable ASCII without blanks", fix="use the URL of the resource server, for example"
        )


def _check_may_confer(caller: Caller | None, metadata: ClientMetadata, *, through: str) -> None:
    check_confers(caller, metadata.scope, through=through)
    if metadata.may_introspect:
        check_confers(caller, ADMIN, through=f"{through}, which may introspect what is not its own,")


class RegisterClient(Struct, frozen=True, kw_only=True):
    """`changes`: the metadata that was given. `secret_sha256` is of a secret that was made before, if one is needed."""

    stamp: Stamp
    caller: Caller | None
    client_id: str
    changes: Mapping[str, Any]
    secret_sha256: str
    issuer: str


def decide_register_client(command: RegisterClient, scopes: Scopes) -> ClientRegistered:
    """Raises: InvalidScope, InvalidClientMetadata, InvalidRedirectUri, InsufficientScope."""
    default = default_metadata(command.client_id, command.issuer)
    metadata = merge_metadata(default, command.changes, default)
    metadata = replace(metadata, scope=check_scope(metadata.scope, scopes))
    check_metadata(metadata)
    _check_may_confer(command.caller, metadata, through="the client")
    public = metadata.token_endpoint_auth_method == "none"
    return ClientRegistered(
        **head(command.stamp),
        client_id=command.client_id,
        metadata=metadata,
        secret_sha256=None if public else command.secret_sha256,
    )


class ChangeClient(Struct, frozen=True, kw_only=True):
    """`changes`: what is to be changed; None resets."""

    stamp: Stamp
    caller: Caller | None
    changes: Mapping[str, Any]
    issuer: str


def decide_change_client(command: ChangeClient, client: Client | None, scopes: Scopes) -> list[LedgerEvent]:
    """Nothing when nothing changes. Raises: as for registering; NotFound, Gone."""
    client = _active_client(client)
    old = client.metadata
    metadata = merge_metadata(old, command.changes, default_metadata(client.client_id, command.issuer))
    metadata = replace(metadata, scope=check_scope(metadata.scope, scopes, already=old.scope))
    if metadata == old:
        return []
    check_metadata(metadata)
    if replace(metadata, client_name=old.client_name) != old:
        # Other redirect URIs, no secret any more, another audience: each can bring the client's scope to its changer.
        _check_may_confer(command.caller, metadata, through="the changed client")
    return [ClientChanged(**head(command.stamp), client_id=client.client_id, metadata=metadata)]


class RotateSecret(Struct, frozen=True, kw_only=True):
    stamp: Stamp
    caller: Caller | None
    secret_sha256: str
    overlap: timedelta


def decide_rotate_secret(command: RotateSecret, client: Client | None) -> ClientSecretRotated:
    """Raises: NotFound, Gone; InvalidRequest for a public client; InsufficientScope."""
    client = _active_client(client)
    if client.metadata.token_endpoint_auth_method == "none":
        raise InvalidRequest(
            "a public client has no secret", fix="change token_endpoint_auth_method first, if it can keep one"
        )
    _check_may_confer(command.caller, client.metadata, through="the new secret")
    return ClientSecretRotated(
        **head(command.stamp),
        client_id=client.client_id,
        secret_sha256=command.secret_sha256,
        previous_ends_at=command.stamp.at + command.overlap,
    )


def decide_disable_client(stamp: Stamp, client: Client | None) -> list[LedgerEvent]:
    """Nothing when it is disabled already. Raises: NotFound."""
    if client is None:
        raise NotFound("there is no such client")
    if client.disabled_at is not None:
        return []
    return [ClientDisabled(**head(stamp), client_id=client.client_id, reason=Reason.DISABLED)]


def _active_client(client: Client | None) -> Client:
    if client is None:
        raise NotFound("there is no such client")
    if client.disabled_at is not None:
        raise Gone("the client is disabled, for good", fix="register a new one")
    return client


# Users


class Profile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is readable about a user. It is sealed as one under the user's own key."""

    username: str
    display_name: str | None = None
    email: str | None = None


def is_plain(text: str) -> bool:
    """Whether all letters can be seen or are blanks, and none of these is at the ends."""
    return text == text.strip() and not any(unicodedata.category(letter) in UNSEEN for letter in text)


def check_plain(text: str | None, what: str) -> None:
    """Raises: InvalidRequest."""
    if text is not None and not is_plain(text):
        raise InvalidRequest(f"{what} {_PLAIN}")


def check_profile(profile: Profile) -> None:
    """Raises: InvalidRequest."""
    check_plain(profile.username, "username")
    check_plain(profile.display_name, "display_name")
    check_plain(profile.email, "email")
    if profile.username.startswith(("usr_", "cli_")):
        raise InvalidRequest("username must not begin as an id does", fix="choose a name without usr_ or cli_")
    if profile.email is not None and not re.fullmatch(r"[^@\s]+@[^@\s]+", profile.email):
        raise InvalidRequest("email must be an address such as ann@example.com")


class RegisterUser(Struct, frozen=True, kw_only=True):
    """The profile was checked and sealed before, and the password hashed. The stamp has two ids."""

    stamp: Stamp
    caller: Caller | None
    user_id: str
    kind: str
    username_hash: str
    sealed_profile: bytes
    scope: str
    password_hash: str | None


def check_password_fits(kind: str, *, given: bool) -> None:
    """Raises: InvalidRequest."""
    if given and kind != "person":
        raise InvalidRequest("a service user has no password", fix="leave password out and issue it a SAT")


def check_username_is_free(row: Username | None) -> None:
    """Raises: AlreadyExists."""
    if row is not None:
        raise AlreadyExists("another user has this username, or had it", fix="choose another username")


def decide_register_user(
    command: RegisterUser, username: Username | None, scopes: Scopes
) -> tuple[UserRegistered, UsernameClaimed]:
    """To be appended together, each as the first event of its subject.

    Raises: AlreadyExists, InvalidScope, InvalidRequest, InsufficientScope.
    """
    check_username_is_free(username)
    check_password_fits(command.kind, given=command.password_hash is not None)
    scope = check_scope(command.scope, scopes)
    check_confers(command.caller, scope, through="the user")
    registered = UserRegistered(
        **head(command.stamp),
        user_id=command.user_id,
        kind="person" if command.kind == "person" else "service",
        username_hash=command.username_hash,
        sealed_profile=command.sealed_profile,
        scope=scope,
        password_hash=command.password_hash,
    )
    claimed = UsernameClaimed(**head(command.stamp, 1), username_hash=command.username_hash, user_id=command.user_id)
    return registered, claimed


class ChangeUser(Struct, frozen=True, kw_only=True):
    """`scope` and `sealed_profile` are None to stay. With `sets_password`, a hash of None takes the password away.

    The stamp has two ids.
    """

    stamp: Stamp
    caller: Caller | None
    scope: str | None = None
    sealed_profile: bytes | None = None
    sets_password: bool = False
    password_hash: str | None = None


def decide_change_user(command: ChangeUser, user: User | None, scopes: Scopes) -> list[LedgerEvent]:
    """Nothing when nothing changes. Raises: NotFound, Gone, InvalidScope, InvalidRequest, InsufficientScope."""
    user = check_user_is_active(user)
    scope = user.scope if command.scope is None else check_scope(command.scope, scopes, already=user.scope)
    gained = " ".join(name for name in scope.split() if name not in user.scope.split())
    check_confers(command.caller, gained, through="the user's new scope")
    events: list[LedgerEvent] = []
    if scope != user.scope or command.sealed_profile is not None:
        profile = user.sealed_profile if command.sealed_profile is None else command.sealed_profile
        events.append(UserChanged(**head(command.stamp), user_id=user.user_id, sealed_profile=profile, scope=scope))
    if command.sets_password:
        check_password_fits(user.kind, given=command.password_hash is not None)
        if command.password_hash is not None or user.has_password:
            check_confers(command.caller, scope, through="the new password")
            events.append(
                UserPasswordChanged(**head(command.stamp, 1), user_id=user.user_id, password_hash=command.password_hash)
            )
    return events


def decide_disable_user(stamp: Stamp, user: User | None) -> list[LedgerEvent]:
    """Nothing when it is disabled already. Raises: NotFound."""
    if user is None:
        raise NotFound("there is no such user")
    if user.disabled_at is not None:
        return []
    return [UserDisabled(**head(stamp), user_id=user.user_id, reason=Reason.DISABLED)]


def decide_erase_user(stamp: Stamp, user: User | None) -> list[LedgerEvent]:
    """For a user who is disabled and whose key has been destroyed. Nothing when it is on record already.

    Raises: NotFound.
    """
    if user is None:
        raise NotFound("there is no such user")
    return [] if user.erased_at is not None else [SubjectErased(**head(stamp), user_id=user.user_id)]


def check_user_is_active(user: User | None) -> User:
    """Raises: NotFound, Gone."""
    if user is None:
        raise NotFound("there is no such user")
    if user.disabled_at is not None:
        raise Gone("the user is disabled, for good", fix="register a new one")
    return user


# Scopes


class WriteScope(Struct, frozen=True, kw_only=True):
    """A scope as it is to stand. None stays as it is, or is nothing for a new scope."""

    stamp: Stamp
    name: str
    description: str | None = None
    audience: tuple[str, ...] | None = None
    implies: tuple[str, ...] | None = None


def decide_register_scope(command: WriteScope, scope: Scope | None, scopes: Scopes) -> ScopeRegistered:
    """Raises: AlreadyExists, InvalidScope."""
    if command.name.startswith("ledger:"):
        raise InvalidScope("names with ledger: are reserved", fix="choose another name")
    if scope is not None:
        state = "was disabled, for good" if scope.disabled_at is not None else "is registered"
        raise AlreadyExists(f"the scope {command.name} {state}", fix="change it with PATCH, or choose another name")
    if not SCOPE_SYNTAX.fullmatch(command.name) or " " in command.name:
        raise InvalidScope("a scope name is printable ASCII without blank, quote and backslash")
    _check_scope_name(command.name)
    implies = tuple(dict.fromkeys(command.implies or ()))
    _check_implies(command.name, implies, (), scopes)
    check_plain(command.description, "description")
    check_audience(command.audience or ())
    return ScopeRegistered(
        **head(command.stamp),
        name=command.name,
        description=command.description or "",
        audience=tuple(dict.fromkeys(command.audience or ())),
        implies=implies,
    )


def decide_change_scope(command: WriteScope, scope: Scope | None, scopes: Scopes) -> list[LedgerEvent]:
    """Nothing when nothing changes. Raises: NotFound, Gone, InvalidScope."""
    if scope is None:
        raise NotFound("there is no such scope")
    if scope.disabled_at is not None:
        raise Gone("the scope is disabled, for good", fix="register another one")
    description = scope.description if command.description is None else command.description
    audience = scope.audience if command.audience is None else tuple(dict.fromkeys(command.audience))
    implies = scope.implies if command.implies is None else tuple(dict.fromkeys(command.implies))
    _check_implies(scope.name, implies, scope.implies, scopes)
    check_plain(command.description, "description")
    check_audience(audience)
    if (description, audience, implies) == (scope.description, scope.audience, scope.implies):
        return []
    changed = ScopeChanged(
        **head(command.stamp), name=scope.name, description=description, audience=audience, implies=implies
    )
    return [changed]


def _check_implies(name: str, implies: tuple[str, ...], already: tuple[str, ...], scopes: Scopes) -> None:
    for implied in implies:
        if implied.startswith("ledger:"):
            raise InvalidScope("ledger:* scopes are never implied", fix=f"leave {implied} out and grant it by itself")
        if implied == name:
            raise InvalidScope("a scope does not imply itself")
        if " " in implied:
            raise InvalidScope("each member of implies is one scope name")
    check_scope(" ".join(implies), scopes, already=" ".join(already))


def decide_disable_scope(stamp: Stamp, scope: Scope | None) -> list[LedgerEvent]:
    """Nothing when it is disabled already. Raises: NotFound."""
    if scope is None:
        raise NotFound("there is no such scope")
    return [] if scope.disabled_at is not None else [ScopeDisabled(**head(stamp), name=scope.name)]


def check_networks(networks: tuple[str, ...]) -> None:
    """Raises: InvalidRequest unless each is an address or a network without host bits."""
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError:
            raise InvalidRequest(
                "allowed_ips must be addresses or CIDR networks without host bits", fix="for example 192.0.2.0/24"
            ) from None
