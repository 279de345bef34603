"""`/v1/scopes`: RFC 6749 §3.3. A scope need not be registered to be used; registered, it can imply others."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from projections.registry import Scope
from service.api.routing import Call, Nothing, operation
from service.api.wire import (
    AnyAudiences,
    Audience,
    Page,
    ScopeName,
    Seq,
    audiences,
    cursor_of,
    page,
    position_of,
)
from service.registry import ScopeFields, change_scope, disable_scope, prepare_scope
from service.rules.registry import LEDGER_SCOPES

NEEDS = ("ledger:admin",)
_LIST = "scopes"

Description = Annotated[str, Meta(max_length=1000)]
Implies = Annotated[list[ScopeName], Meta(max_length=64)]


class NewScope(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`audience`: the resource servers that the scope is for; none means any. `implies`: scopes that come with it."""

    name: ScopeName
    description: Description = ""
    audience: Audience | AnyAudiences | UnsetType = UNSET
    implies: Implies | UnsetType = UNSET


class ScopePatch(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A merge patch (RFC 7396): what is left out stays, null empties."""

    description: Description | UnsetType | None = UNSET
    audience: Audience | AnyAudiences | UnsetType | None = UNSET
    implies: Implies | UnsetType | None = UNSET


class ScopeView(Struct, frozen=True, kw_only=True):
    """A scope. `ledger_seq` is that of the last event about it."""

    name: str
    description: str
    audience: list[str]
    implies: list[str]
    status: Literal["active", "disabled"]
    disabled_at: datetime | UnsetType = UNSET
    ledger_seq: Seq


class ScopeList(Struct, frozen=True):
    items: list[ScopeView]
    next_cursor: str | UnsetType = UNSET


class ScopeCreated(Struct, frozen=True, kw_only=True):
    name: str
    description: str
    audience: list[str]
    implies: list[str]
    ledger_seq: Seq


def _view(scope: Scope, seq: int | None = None) -> ScopeView:
    return ScopeView(
        name=scope.name,
        description=scope.description,
        audience=list(scope.audience),
        implies=list(scope.implies),
        status="active" if scope.disabled_at is None else "disabled",
        disabled_at=scope.disabled_at or UNSET,
        ledger_seq=scope.seq if seq is None else seq,
    )


def _fields(body: NewScope | ScopePatch) -> ScopeFields:
    return ScopeFields(
        description=None if body.description is UNSET else body.description or "",
        audience=None if body.audience is UNSET else audiences(body.audience),
        implies=None if body.implies is UNSET else tuple(body.implies or ()),
    )


@operation(
    "POST",
    "/v1/scopes",
    tag="scopes",
    needs=NEEDS,
    body=NewScope,
    answer=ScopeCreated,
    status=201,
    creates=True,
    errors=(409,),
)
async def create_scope(call: Call[NewScope, Nothing]) -> dict[str, Any]:
    """Register a scope.

    What it implies is granted with it, now and to whoever gets it later; tokens that were issued stay as they are.
    Names with `ledger:` are reserved, and are never implied.
    """
    name, fields = call.body.name, _fields(call.body)
    return await call.create(lambda fresh: prepare_scope(call.runtime, call.asker, name, fields, fresh=fresh))


@operation("GET", "/v1/scopes", tag="scopes", needs=tuple(sorted(LEDGER_SCOPES)), query=Page, answer=ScopeList)
async def list_scopes(call: Call[None, Page]) -> dict[str, Any]:
    """List registered scopes by name."""
    after, limit = position_of(call.query.cursor, _LIST), call.query.limit
    rows = call.runtime.view.rows("scope", after=after, limit=limit + 1)
    items = [_view(row) for _, row in rows[:limit] if isinstance(row, Scope)]
    return page(items, cursor_of(_LIST, rows[limit - 1][0]) if len(rows) > limit else None)


@operation(
    "PATCH", "/v1/scopes/{name}", tag="scopes", needs=NEEDS, body=ScopePatch, answer=ScopeView, errors=(404, 409)
)
async def patch_scope(call: Call[ScopePatch, Nothing]) -> ScopeView:
    """Change what a scope says and implies, for tokens that are issued from now on."""
    return _view(*await change_scope(call.runtime, call.asker, call.name, _fields(call.body)))


@operation("DELETE", "/v1/scopes/{name}", tag="scopes", needs=NEEDS, answer=ScopeView, errors=(404,))
async def delete_scope(call: Call[None, Nothing]) -> ScopeView:
    """Disable a scope: nobody is granted it any more, and tokens that have it keep it."""
    return _view(*await disable_scope(call.runtime, call.asker, call.name))
