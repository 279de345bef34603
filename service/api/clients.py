"""`/v1/clients`: RFC 7591 metadata and the ledger's own."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from projections.registry import Client
from service.api.routing import Call, Nothing, operation
from service.api.wire import (
    DAY_SECONDS,
    Audience,
    Audiences,
    Overlap,
    Page,
    ScopeText,
    Seq,
    cursor_of,
    page,
    position_of,
)
from service.registry import (
    change_client,
    client_answer,
    disable_client,
    find_client,
    prepare_client,
    prepare_secret,
)
from service.signing import ACCESS_TOKEN_TTL_SECONDS_MAX

NEEDS = ("ledger:clients",)
_LIST = "clients"

Name = Annotated[str, Meta(min_length=1, max_length=200)]
GrantType = Literal["client_credentials", "refresh_token", "authorization_code"]
GrantTypes = Annotated[list[GrantType], Meta(max_length=8)]
ResponseTypes = Annotated[list[Literal["code", "code id_token"]], Meta(max_length=2)]
RedirectUris = Annotated[list[Annotated[str, Meta(min_length=1, max_length=2000)]], Meta(max_length=64)]
AuthMethod = Literal["client_secret_basic", "client_secret_post", "none"]
Format = Literal["jwt", "opaque"]
AccessTtl = Annotated[int, Meta(ge=1, le=ACCESS_TOKEN_TTL_SECONDS_MAX)]
IdTokenAlg = Literal["RS256", "ES256", "EdDSA"]
RefreshTtl = Annotated[int, Meta(ge=1, le=366 * DAY_SECONDS)]


class NewClient(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is left out gets its default; `client_name` that is the client id.

    `refresh_token_rotation`: false leaves a confidential client the refresh token that it has.
    """

    client_name: Name | UnsetType = UNSET
    grant_types: GrantTypes | UnsetType = UNSET
    response_types: ResponseTypes | UnsetType = UNSET
    redirect_uris: RedirectUris | UnsetType = UNSET
    scope: ScopeText | UnsetType = UNSET
    token_endpoint_auth_method: AuthMethod | UnsetType = UNSET
    access_token_format: Format | UnsetType = UNSET
    access_token_ttl_seconds: AccessTtl | UnsetType = UNSET
    refresh_token_idle_ttl_seconds: RefreshTtl | UnsetType = UNSET
    refresh_token_max_ttl_seconds: RefreshTtl | UnsetType = UNSET
    audience: Audience | Audiences | UnsetType = UNSET
    may_introspect: bool | UnsetType = UNSET
    post_logout_redirect_uris: RedirectUris | UnsetType = UNSET
    require_pushed_authorization_requests: bool | UnsetType = UNSET
    id_token_signed_response_alg: IdTokenAlg | UnsetType = UNSET
    refresh_token_rotation: bool | UnsetType = UNSET


class ClientPatch(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A merge patch (RFC 7396): what is left out stays, null resets to the default."""

    client_name: Name | UnsetType | None = UNSET
    grant_types: GrantTypes | UnsetType | None = UNSET
    response_types: ResponseTypes | UnsetType | None = UNSET
    redirect_uris: RedirectUris | UnsetType | None = UNSET
    scope: ScopeText | UnsetType | None = UNSET
    token_endpoint_auth_method: AuthMethod | UnsetType | None = UNSET
    access_token_format: Format | UnsetType | None = UNSET
    access_token_ttl_seconds: AccessTtl | UnsetType | None = UNSET
    refresh_token_idle_ttl_seconds: RefreshTtl | UnsetType | None = UNSET
    refresh_token_max_ttl_seconds: RefreshTtl | UnsetType | None = UNSET
    audience: Audience | Audiences | UnsetType | None = UNSET
    may_introspect: bool | UnsetType | None = UNSET
    post_logout_redirect_uris: RedirectUris | UnsetType | None = UNSET
    require_pushed_authorization_requests: bool | UnsetType | None = UNSET
    id_token_signed_response_alg: IdTokenAlg | UnsetType | None = UNSET
    refresh_token_rotation: bool | UnsetType | None = UNSET


class ClientView(Struct, frozen=True, kw_only=True):
    """A client. `ledger_seq` is that of the last event about it."""

    client_id: str
    client_name: str
    grant_types: list[str]
    response_types: list[str]
    redirect_uris: list[str]
    scope: str
    token_endpoint_auth_method: str
    access_token_format: str
    access_token_ttl_seconds: int
    refresh_token_idle_ttl_seconds: int
    refresh_token_max_ttl_seconds: int
    audience: list[str]
    may_introspect: bool
    post_logout_redirect_uris: list[str]
    require_pushed_authorization_requests: bool
    id_token_signed_response_alg: str
    refresh_token_rotation: bool
    status: Literal["active", "disabled"]
    created_at: datetime
    disabled_at: datetime | UnsetType = UNSET
    ledger_seq: Seq


class ClientList(Struct, frozen=True):
    items: list[ClientView]
    next_cursor: str | UnsetType = UNSET


class ClientCreated(Struct, frozen=True, kw_only=True):
    """RFC 7591 §3.2.1. `client_secret` is never shown again; a public client has none. 0: it does not expire."""

    client_id: str
    client_id_issued_at: int
    client_secret: str | UnsetType = UNSET
    client_secret_expires_at: int | UnsetType = UNSET
    client_name: str
    grant_types: list[str]
    response_types: list[str]
    redirect_uris: list[str]
    scope: str
    token_endpoint_auth_method: str
    access_token_format: str
    access_token_ttl_seconds: int
    refresh_token_idle_ttl_seconds: int
    refresh_token_max_ttl_seconds: int
    audience: list[str]
    may_introspect: bool
    post_logout_redirect_uris: list[str]
    require_pushed_authorization_requests: bool
    id_token_signed_response_alg: str
    refresh_token_rotation: bool
    ledger_seq: Seq


class NewSecret(Struct, frozen=True, forbid_unknown_fields=True):
    overlap_seconds: Overlap = 0


class SecretCreated(Struct, frozen=True, kw_only=True):
    """`client_secret` is never shown again. `previous_ends_at`: when the one before it stops working."""

    client_id: str
    client_secret: str
    client_secret_expires_at: int
    previous_ends_at: datetime
    ledger_seq: Seq


def _changes(body: NewClient | ClientPatch) -> dict[str, Any]:
    changes = {name: getattr(body, name) for name in body.__struct_fields__}
    if isinstance(changes["audience"], str):
        changes["audience"] = [changes["audience"]]
    return {name: value for name, value in changes.items() if value is not UNSET}


def _view(client: Client, seq: int | None = None) -> ClientView:
    return msgspec.convert(
        client_answer(client.client_id, client.metadata)
        | {
            "status": "active" if client.disabled_at is None else "disabled",
            "created_at": client.registered_at,
            "ledger_seq": client.seq if seq is None else seq,
        }
        | ({"disabled_at": client.disabled_at} if client.disabled_at is not None else {}),
        ClientView,
    )


@operation(
    "POST",
    "/v1/clients",
    tag="clients",
    needs=NEEDS,
    body=NewClient,
    answer=ClientCreated,
    status=201,
    creates=True,
)
async def create_client(call: Call[NewClient, Nothing]) -> dict[str, Any]:
    """Register a client.

    A `ledger:*` scope needs a token that holds it, `may_introspect` one with `ledger:admin`.
    """
    changes = _changes(call.body)
    return await call.create(lambda _: prepare_client(call.runtime, call.asker, changes))


@operation("GET", "/v1/clients", tag="clients", needs=NEEDS, query=Page, answer=ClientList)
async def list_clients(call: Call[None, Page]) -> dict[str, Any]:
    """List clients, the oldest first."""
    after, limit = position_of(call.query.cursor, _LIST), call.query.limit
    rows = call.runtime.view.rows("client", after=after, limit=limit + 1)
    items = [_view(row) for _, row in rows[:limit] if isinstance(row, Client)]
    return page(items, cursor_of(_LIST, rows[limit - 1][0]) if len(rows) > limit else None)


@operation("GET", "/v1/clients/{client_id}", tag="clients", needs=NEEDS, answer=ClientView, errors=(404,))
async def show_client(call: Call[None, Nothing]) -> ClientView:
    """Show a client."""
    return _view(await find_client(call.runtime, call.name))


@operation(
    "PATCH",
    "/v1/clients/{client_id}",
    tag="clients",
    needs=NEEDS,
    body=ClientPatch,
    answer=ClientView,
    errors=(404, 409),
)
async def patch_client(call: Call[ClientPatch, Nothing]) -> ClientView:
    """Change a client's metadata.

    Tokens that were issued keep what they have. Whatever but the name changes, the caller must hold every `ledger:*`
    scope that the client has afterwards.
    """
    return _view(*await change_client(call.runtime, call.asker, call.name, _changes(call.body)))


@operation("DELETE", "/v1/clients/{client_id}", tag="clients", needs=NEEDS, answer=ClientView, errors=(404,))
async def delete_client(call: Call[None, Nothing]) -> ClientView:
    """Disable a client and revoke all its tokens, for good."""
    return _view(*await disable_client(call.runtime, call.asker, call.name))


@operation(
    "POST",
    "/v1/clients/{client_id}/secrets",
    tag="clients",
    needs=NEEDS,
    body=NewSecret,
    body_optional=True,
    answer=SecretCreated,
    status=201,
    creates=True,
    errors=(404, 409),
)
async def create_secret(call: Call[NewSecret, Nothing]) -> dict[str, Any]:
    """Give a client a new secret.

    The one before it works until the overlap ends; without one it ends at once.
    """
    overlap = call.body.overlap_seconds
    return await call.create(lambda fresh: prepare_secret(call.runtime, call.asker, call.name, overlap, fresh=fresh))
