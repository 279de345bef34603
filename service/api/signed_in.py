"""`/v1/users/{user_id}/sessions` and `…/consents`: where people are signed in, and what they allow apps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType

from projections.registry import Session
from service.api.routing import Call, operation
from service.api.wire import Id, Page, Seq, concurrently, cursor_of, page, position_of
from service.commands import raw_id
from service.consents import withdraw
from service.errors import NotFound
from service.registry import find_user_by_id
from service.rules.sessions import is_live
from service.runtime import Runtime
from service.signin.places import place_of
from service.signin.sessions import end_everywhere, end_session, standing
from service.tokens import is_id, now

T = TypeVar("T")

NEEDS = ("ledger:users",)
_LISTED_MAX = 100_000


class SessionView(Struct, frozen=True, kw_only=True):
    """A browser that the user is signed in with. `methods`: how they proved who they are (RFC 8176).

    `browser` (in words) and `ip`: as they were then; missing where that is not known, or the user was erased.
    """

    session_id: str
    user_id: str
    auth_time: datetime
    expires_at: datetime
    methods: tuple[str, ...]
    browser: str | UnsetType = UNSET
    ip: str | UnsetType = UNSET
    ledger_seq: Seq


class SessionList(Struct, frozen=True):
    items: list[SessionView]
    next_cursor: str | UnsetType = UNSET


class SessionChoice(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    session_id: Annotated[str, Meta(max_length=64, description="One; all if it is left out.")] | UnsetType = UNSET


class SessionsEnded(Struct, frozen=True):
    """`ledger_seq` is left out when there was none."""

    ended: int
    ledger_seq: Seq | UnsetType = UNSET


class ConsentView(Struct, frozen=True, kw_only=True):
    """What a client may be granted without asking the user again; `scope` is empty once that was withdrawn."""

    client_id: str
    client_name: str | UnsetType = UNSET
    scope: str
    status: Literal["given", "withdrawn"]
    changed_at: datetime
    ledger_seq: Seq


class ConsentList(Struct, frozen=True):
    items: list[ConsentView]
    next_cursor: str | UnsetType = UNSET


class ConsentChoice(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    client_id: Id


class ConsentWithdrawal(Struct, frozen=True):
    """`grants`: how many were revoked by this call."""

    grants: int
    ledger_seq: Seq


def _page(asked: Page, of: str, items: Sequence[T], key: Callable[[T], bytes]) -> dict[str, Any]:
    """Of items in the order of their keys, those from behind the cursor."""
    after = position_of(asked.cursor, of)
    rest = [item for item in items if key(item) > after]
    more = len(rest) > asked.limit
    return page(rest[: asked.limit], cursor_of(of, key(rest[asked.limit - 1])) if more else None)


async def _session(runtime: Runtime, session: Session) -> SessionView:
    place = await place_of(runtime, session)
    return SessionView(
        session_id=session.session_id,
        user_id=session.user_id,
        auth_time=session.auth_time,
        expires_at=session.expires_at,
        methods=session.methods,
        browser=place.browser or UNSET,
        ip=place.ip or UNSET,
        ledger_seq=session.seq,
    )


@operation(
    "GET", "/v1/users/{user_id}/sessions", tag="users", needs=NEEDS, query=Page, answer=SessionList, errors=(404,)
)
async def list_sessions(call: Call[None, Page]) -> dict[str, Any]:
    """List the browsers that a user is signed in with, the oldest first."""
    user = await find_user_by_id(call.runtime, call.name)
    standing_now = await standing(call.runtime, user.user_id)
    shown = _page(call.query, f"sessions {user.user_id}", standing_now, lambda one: raw_id(one.session_id))
    return shown | {"items": await concurrently(_session(call.runtime, one) for one in shown["items"])}


@operation(
    "DELETE",
    "/v1/users/{user_id}/sessions",
    tag="users",
    needs=NEEDS,
    query=SessionChoice,
    answer=SessionsEnded,
    errors=(404,),
)
async def end_sessions(call: Call[None, SessionChoice]) -> SessionsEnded:
    """Sign a user out: of one browser or of all.

    What apps were granted there ends too, but for what is to last while the user is away.
    """
    user = await find_user_by_id(call.runtime, call.name)
    await call.runtime.view_at_end()
    wanted, by = call.query.session_id, call.caller.token_id
    if not isinstance(wanted, str):
        done = await end_everywhere(call.runtime, user.user_id, "admin", by=by, request_id=call.request_id)
        return SessionsEnded(done.ended, done.seq or UNSET)
    known = call.runtime.view.session(wanted)
    if known is None or known.user_id != user.user_id:
        raise NotFound("the user has no such session")
    stands = is_live(known, call.runtime.view.cut(user.user_id), now())
    seq = await end_session(call.runtime, known, "admin", by=by, request_id=call.request_id)
    return SessionsEnded(int(stands), seq)


@operation(
    "GET", "/v1/users/{user_id}/consents", tag="users", needs=NEEDS, query=Page, answer=ConsentList, errors=(404,)
)
async def list_consents(call: Call[None, Page]) -> dict[str, Any]:
    """List what a user allows clients, or once did."""
    user = await find_user_by_id(call.runtime, call.name)
    view = call.runtime.view
    items = []
    for one in view.consents_of(user.user_id, limit=_LISTED_MAX):
        client = view.client(one.client_id)
        items.append(
            ConsentView(
                client_id=one.client_id,
                client_name=client.metadata.client_name if client is not None else UNSET,
                scope=one.scope,
                status="withdrawn" if one.withdrawn_seq == one.seq else "given",
                changed_at=one.changed_at,
                ledger_seq=one.seq,
            )
        )
    return _page(call.query, f"consents {user.user_id}", items, lambda one: raw_id(one.client_id))


@operation(
    "DELETE",
    "/v1/users/{user_id}/consents",
    tag="users",
    needs=NEEDS,
    query=ConsentChoice,
    answer=ConsentWithdrawal,
    errors=(404,),
)
async def withdraw_consent(call: Call[None, ConsentChoice]) -> ConsentWithdrawal:
    """Withdraw what a user allows a client, and revoke all that it was granted."""
    user = await find_user_by_id(call.runtime, call.name)
    await call.runtime.view_at_end()
    client_id = call.query.client_id
    if not is_id(client_id, "cli") or call.runtime.view.consent(user.user_id, client_id) is None:
        raise NotFound("the user allows no such client anything")
    done = await withdraw(call.runtime, user.user_id, client_id, by=call.caller.token_id, request_id=call.request_id)
    return ConsentWithdrawal(done.grants, done.seq)
