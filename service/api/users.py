"""`/v1/users`: people and services, whom tokens speak for."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from projections.registry import User
from service.api.routing import Call, Nothing, operation
from service.api.wire import Page, ScopeText, Seq, concurrently, cursor_of, page, position_of
from service.registry import (
    NewUser,
    UserChange,
    change_user,
    disable_user,
    find_user_by_id,
    find_user_by_name,
    profile_of,
    user_registration,
)
from service.rules.passwords import PASSWORD_CHARS_MAX, PASSWORD_CHARS_MIN
from service.rules.registry import Profile
from service.runtime import Runtime

NEEDS = ("ledger:users",)
_LIST = "users"

Username = Annotated[str, Meta(min_length=1, max_length=200)]
DisplayName = Annotated[str, Meta(min_length=1, max_length=200)]
Email = Annotated[str, Meta(min_length=3, max_length=254)]
# Its length is refused by `check_password`, in words for a person.
Password = Annotated[
    str,
    Meta(
        description="Compared in Unicode's form NFC; without control characters, and not of blanks alone.",
        extra_json_schema={"minLength": PASSWORD_CHARS_MIN, "maxLength": PASSWORD_CHARS_MAX},
    ),
]
UserKind = Literal["person", "service"]


class UserQuery(Page, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The query of the list of users."""

    username: Annotated[str, Meta(description="Only who has this username, if anybody has.")] | UnsetType = UNSET


class UserRegistration(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A service user has no password."""

    username: Username
    kind: UserKind
    scope: ScopeText = ""
    password: Password | UnsetType = UNSET
    display_name: DisplayName | UnsetType = UNSET
    email: Email | UnsetType = UNSET


class UserPatch(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A merge patch (RFC 7396): what is left out stays, null takes away. A changed password revokes all tokens."""

    scope: ScopeText | UnsetType | None = UNSET
    password: Password | UnsetType | None = UNSET
    display_name: DisplayName | UnsetType | None = UNSET
    email: Email | UnsetType | None = UNSET


class UserDeletion(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    erase: Annotated[bool, Meta(description="Also make everything personal about the user unreadable.")] = False


class UserView(Struct, frozen=True, kw_only=True):
    """A user. What is personal is missing when the user was erased. `ledger_seq`: of the last event about them."""

    user_id: str
    kind: UserKind
    username: str | UnsetType = UNSET
    display_name: str | UnsetType = UNSET
    email: str | UnsetType = UNSET
    scope: str
    has_password: bool
    status: Literal["active", "disabled", "erased"]
    created_at: datetime
    disabled_at: datetime | UnsetType = UNSET
    erased_at: datetime | UnsetType = UNSET
    ledger_seq: Seq


class UserList(Struct, frozen=True):
    items: list[UserView]
    next_cursor: str | UnsetType = UNSET


class UserCreated(Struct, frozen=True, kw_only=True):
    user_id: str
    kind: UserKind
    username: str
    display_name: str | UnsetType = UNSET
    email: str | UnsetType = UNSET
    scope: str
    has_password: bool
    ledger_seq: Seq


async def _view(runtime: Runtime, user: User, seq: int | None = None) -> UserView:
    profile = await profile_of(runtime, user)
    return UserView(
        user_id=user.user_id,
        kind=user.kind,
        username=profile.username if profile else UNSET,
        display_name=profile.display_name or UNSET if profile else UNSET,
        email=profile.email or UNSET if profile else UNSET,
        scope=user.scope,
        has_password=user.has_password and user.erased_at is None,
        status="active" if user.disabled_at is None else "disabled" if user.erased_at is None else "erased",
        created_at=user.registered_at,
        disabled_at=user.disabled_at or UNSET,
        erased_at=user.erased_at or UNSET,
        ledger_seq=user.seq if seq is None else seq,
    )


def _named(value: str | UnsetType | None) -> str | None:
    return value if isinstance(value, str) else None


@operation(
    "POST",
    "/v1/users",
    tag="users",
    needs=NEEDS,
    body=UserRegistration,
    answer=UserCreated,
    status=201,
    creates=True,
    errors=(409,),
)
async def create_user(call: Call[UserRegistration, Nothing]) -> dict[str, Any]:
    """Register a person or a service user.

    A username is taken for good, also when its user is disabled or erased.
    """
    body = call.body
    profile = Profile(username=body.username, display_name=_named(body.display_name), email=_named(body.email))
    new = NewUser(kind=body.kind, profile=profile, scope=body.scope, password=_named(body.password))
    return await call.create(user_registration(call.runtime, call.asker, new))


@operation("GET", "/v1/users", tag="users", needs=NEEDS, query=UserQuery, answer=UserList)
async def list_users(call: Call[None, UserQuery]) -> dict[str, Any]:
    """List users, the oldest first."""
    if isinstance(call.query.username, str):
        named = await find_user_by_name(call.runtime, call.query.username)
        return page([await _view(call.runtime, named)] if named is not None else [], None)
    after, limit = position_of(call.query.cursor, _LIST), call.query.limit
    rows = call.runtime.view.rows("user", after=after, limit=limit + 1)
    items = await concurrently(_view(call.runtime, row) for _, row in rows[:limit] if isinstance(row, User))
    return page(items, cursor_of(_LIST, rows[limit - 1][0]) if len(rows) > limit else None)


@operation("GET", "/v1/users/{user_id}", tag="users", needs=NEEDS, answer=UserView, errors=(404,))
async def show_user(call: Call[None, Nothing]) -> UserView:
    """Show a user."""
    return await _view(call.runtime, await find_user_by_id(call.runtime, call.name))


@operation("PATCH", "/v1/users/{user_id}", tag="users", needs=NEEDS, body=UserPatch, answer=UserView, errors=(404, 409))
async def patch_user(call: Call[UserPatch, Nothing]) -> UserView:
    """Change a user.

    A `ledger:*` scope, and the password of a user who has one, need a token that holds it.
    """
    given = {name: value for name in UserPatch.__struct_fields__ if (value := getattr(call.body, name)) is not UNSET}
    change = UserChange(
        names=frozenset(given),
        profile={name: given[name] for name in ("display_name", "email") if name in given},
        scope=given.get("scope"),
        password=given.get("password"),
    )
    return await _view(call.runtime, *await change_user(call.runtime, call.asker, call.name, change))


@operation(
    "DELETE", "/v1/users/{user_id}", tag="users", needs=NEEDS, query=UserDeletion, answer=UserView, errors=(404,)
)
async def delete_user(call: Call[None, UserDeletion]) -> UserView:
    """Disable a user and revoke all their tokens, for good.

    With `erase=true` the key is destroyed under which everything personal about them is sealed: nobody can read it
    any more, here or in any copy of the log.
    """
    return await _view(call.runtime, *await disable_user(call.runtime, call.asker, call.name, erase=call.query.erase))
