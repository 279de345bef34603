"""`/v1/audit/events`, and the history of one token."""

from __future__ import annotations

import typing
from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from events.errors import LedgerError
from events.types import LedgerEvent, Recorded
from projections.asking import (
    AuditEvent,
    AuditUse,
    EventsAnswer,
    EventsRequest,
    UsesAnswer,
    UsesRequest,
)
from projections.current import Hit
from projections.grants import facts
from service.api.analytics import ask_analytics, token_facts
from service.api.routing import Call, operation
from service.api.tokens import find_hit
from service.api.wire import EndTime, Id, Page, Seq, Time, cursor_of, page, position_of
from service.commands import refused, subject
from service.errors import InvalidRequest, Unavailable
from service.parsing import moment
from service.registry import read_sealed, subject_id
from service.runtime import Runtime

AUDIT = ("ledger:audit",)
_LIST = "audit events"
_OLD_EVENTS_MAX = 10_000

# The types of events without the version of their form, each with what it is now.
EVENT_TYPES = {
    tag.partition("/")[0]: tag for tag in (kind.__struct_config__.tag for kind in typing.get_args(LedgerEvent))
}


class EventQuery(Page, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """All that is given must hold."""

    type: Annotated[Id, Meta(description="As in `token.issued`.")] | UnsetType = UNSET
    subject: (
        Annotated[str, Meta(min_length=1, max_length=200, description="User id, username or client id.")] | UnsetType
    ) = UNSET
    client_id: Id | UnsetType = UNSET
    token_id: Id | UnsetType = UNSET
    from_: Time | UnsetType = UNSET
    to: EndTime | UnsetType = UNSET
    after_seq: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


class EventView(Struct, frozen=True, kw_only=True):
    """A recorded event. `body` is the event as recorded, without password hashes and what is sealed.

    `subject`: the user or client that it is about. `by`: a token id, a client id, a user or session id, or `system`.
    """

    type: str
    ledger_seq: Seq
    occurred_at: datetime
    recorded_at: datetime
    by: str
    request_id: str | UnsetType = UNSET
    subject: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    user_id: str | UnsetType = UNSET
    grant_id: str | UnsetType = UNSET
    token_ids: list[str] | UnsetType = UNSET
    body: dict[str, Any]


class EventList(Struct, frozen=True):
    """True at `ledger_seq`: what was recorded later is not in it."""

    items: list[EventView]
    next_cursor: str | UnsetType = UNSET
    ledger_seq: Seq | UnsetType = UNSET


class HistoryQuery(Page, frozen=True, kw_only=True, forbid_unknown_fields=True):
    uses: Annotated[bool, Meta(description="Also the uses of the token, among the events by time.")] = False


class HistoryItem(Struct, frozen=True, kw_only=True):
    """An event with its public facts, or a use (`type` is `token.used` and `ledger_seq` null)."""

    type: str
    ledger_seq: int | None
    occurred_at: datetime
    recorded_at: datetime
    by: str


class History(Struct, frozen=True):
    items: list[HistoryItem]
    next_cursor: str | UnsetType = UNSET


@operation("GET", "/v1/audit/events", tag="audit", needs=AUDIT, query=EventQuery, answer=EventList)
async def list_events(call: Call[None, EventQuery]) -> dict[str, Any]:
    """List recorded events in the order of the ledger."""
    asked = _events_asked(call.runtime, call.query)
    answer = await _fresh_events(call.runtime, asked)
    after = answer.next_after_seq
    items = [_event_view(item) for item in answer.items]
    return page(items, cursor_of(_LIST, str(after).encode()) if after is not None else None) | {
        "ledger_seq": answer.position
    }


def _events_asked(runtime: Runtime, asked: EventQuery) -> EventsRequest:
    position = position_of(asked.cursor, _LIST)
    until = None if isinstance(asked.to, UnsetType) else moment(asked.to, "to")
    tag = None
    if not isinstance(asked.type, UnsetType):
        tag = EVENT_TYPES.get(asked.type.partition("/")[0])
        if tag is None or asked.type not in {tag, tag.partition("/")[0]}:
            raise InvalidRequest("there are no events of this type", fix=f"one of {', '.join(sorted(EVENT_TYPES))}")
    return EventsRequest(
        type=tag,
        subject=None if isinstance(asked.subject, UnsetType) else subject_id(runtime, asked.subject) or asked.subject,
        client_id=asked.client_id or None,
        token_id=asked.token_id or None,
        from_=None if isinstance(asked.from_, UnsetType) else moment(asked.from_, "from"),
        to=until,
        after_seq=max(asked.after_seq, int(position or b"0")),
        limit=asked.limit,
    )


async def _fresh_events(runtime: Runtime, asked: EventsRequest) -> EventsAnswer:
    """With all that this host's view knows of, so that callers find what they have just written; else what is there."""
    wanted = msgspec.structs.replace(asked, min_seq=runtime.view.freshness().position)
    try:
        return await ask_analytics(runtime, wanted, EventsAnswer)
    except Unavailable:
        return await ask_analytics(runtime, asked, EventsAnswer)


def _event_view(item: AuditEvent) -> dict[str, Any]:
    # Not `to_builtins`, which refuses the raw JSON of the body.
    members: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(item))
    return members | {"type": item.type.partition("/")[0], "body": _without_nulls(members["body"])}


def _without_nulls(value: Any) -> Any:
    """What is absent is left out. Events keep it as null, which says the same."""
    if isinstance(value, dict):
        return {name: _without_nulls(member) for name, member in value.items() if member is not None}
    return [_without_nulls(member) for member in value] if isinstance(value, list) else value


@operation(
    "GET",
    "/v1/tokens/{token_id}/history",
    tag="tokens",
    needs=("ledger:issue", "ledger:audit"),
    query=HistoryQuery,
    answer=History,
    errors=(404,),
)
async def show_history(call: Call[None, HistoryQuery]) -> dict[str, Any]:
    """Show what happened to a token and its grant, in order.

    The events come from the ledger itself, the uses from analytics.
    """
    name = f"history {call.name} {call.query.uses}"
    place = _Place.parse(position_of(call.query.cursor, name))
    events = await _events(call.runtime, call.name, place.after_seq)
    if not call.query.uses:
        shown = events[: call.query.limit]
        rest = _Place(shown[-1]["ledger_seq"]) if len(events) > len(shown) else None
    else:
        shown, rest = await _with_uses(call.runtime, call.name, events, place, call.query.limit)
    return page(shown, cursor_of(name, rest.encode()) if rest else None)


class _Place(Struct, frozen=True, array_like=True):
    """Where a page of a history ended: after an event, and `skip` uses behind a cursor of analytics."""

    after_seq: int = 0
    uses_cursor: str | None = None
    skip: int = 0

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @staticmethod
    def parse(position: bytes) -> _Place:
        return msgspec.msgpack.decode(position, type=_Place) if position else _Place()


async def _with_uses(
    runtime: Runtime, token_id: str, events: list[dict[str, Any]], place: _Place, limit: int
) -> tuple[list[dict[str, Any]], _Place | None]:
    """The next `limit` events and uses by time, and where the next page begins, None after the last."""
    wanted = min(1000, limit + place.skip)
    asked = UsesRequest(token_id=token_id, limit=wanted, cursor=place.uses_cursor)
    answer = await ask_analytics(runtime, asked, UsesAnswer)
    uses = [_use_item(use) for use in answer.items[place.skip :]]
    shown: list[dict[str, Any]] = []
    event_index = use_index = 0
    while len(shown) < limit:
        use = uses[use_index] if use_index < len(uses) else None
        event = events[event_index] if event_index < len(events) else None
        if use is None and answer.next_cursor is not None:
            break  # the next use may be older than the next event
        if use is not None and (event is None or use["occurred_at"] < event["occurred_at"]):
            shown.append(use)
            use_index += 1
        elif event is not None:
            shown.append(event)
            event_index += 1
        else:
            return shown, None
    after_seq = events[event_index - 1]["ledger_seq"] if event_index else place.after_seq
    if use_index == len(uses) and answer.next_cursor is None and event_index == len(events):
        return shown, None
    if use_index == len(uses) and answer.next_cursor is not None:
        return shown, _Place(after_seq, answer.next_cursor)
    return shown, _Place(after_seq, place.uses_cursor, place.skip + use_index)


def _use_item(use: AuditUse) -> dict[str, Any]:
    context = {name: getattr(use, name) for name in ("ip", "user_agent", "method", "path") if getattr(use, name)}
    members = {
        "type": "token.used",
        "ledger_seq": None,
        "occurred_at": use.occurred_at,
        "recorded_at": use.recorded_at,
        "by": use.caller,
        "outcome": use.outcome,
        "endpoint": use.endpoint,
    }
    more = {"scope": use.scope, "audience": use.audience, "context": context}
    return members | {name: value for name, value in more.items() if value}


async def _events(runtime: Runtime, token_id: str, after_seq: int) -> list[dict[str, Any]]:
    """The events of the token's grant after a sequence, with their public facts."""
    hit = await find_hit(runtime, token_id)
    if hit is None:
        return await _old_events(runtime, token_id, after_seq)
    known = facts(hit.grant)
    owner = known.subject if known else ""
    recorded = [one for one in await _recorded(runtime, hit) if one.seq > after_seq]
    return [await _event_item(runtime, one, owner) for one in recorded]


async def _recorded(runtime: Runtime, hit: Hit) -> list[Recorded]:
    try:
        events = await runtime.ledger.read(subject("grant", "grt_" + hit.token.grant_id.hex()))
        if all(one.seq != hit.token.issued_seq for one in events):
            # The issue of an access-only token stands on its client's subject.
            issue = await runtime.ledger.get(hit.token.issued_seq)
            events = [issue, *events] if issue is not None else events
    except LedgerError as error:
        raise refused(error) from error
    return events


async def _event_item(runtime: Runtime, recorded: Recorded, owner: str) -> dict[str, Any]:
    event = recorded.event
    # The times stay what they are, to be compared.
    fields: dict[str, Any] = msgspec.to_builtins(event, builtin_types=(datetime,))
    item = {
        "type": fields.pop("type").partition("/")[0],
        "ledger_seq": recorded.seq,
        "occurred_at": fields.pop("occurred_at"),
        "recorded_at": recorded.recorded_at,
        "by": fields.pop("by"),
    }
    fields.pop("id")
    comment = await read_sealed(runtime, owner, getattr(event, "sealed_comment", None), "comment")
    return item | public_facts(fields) | ({"comment": comment} if comment is not None else {})


async def _old_events(runtime: Runtime, token_id: str, after_seq: int) -> list[dict[str, Any]]:
    """The same for a token that has left the view, from analytics."""
    grant_id = (await token_facts(runtime, token_id)).grant_id
    items: list[dict[str, Any]] = []
    while len(items) < _OLD_EVENTS_MAX:
        asked = EventsRequest(grant_id=grant_id, after_seq=after_seq, limit=1000)
        answer = await ask_analytics(runtime, asked, EventsAnswer)
        items += [_old_item(one) for one in answer.items]
        if answer.next_after_seq is None:
            break
        after_seq = answer.next_after_seq
    return items


def _old_item(event: AuditEvent) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.json.decode(event.body)
    for name in ("id", "type", "occurred_at", "by"):
        fields.pop(name, None)
    return {
        "type": event.type.partition("/")[0],
        "ledger_seq": event.ledger_seq,
        "occurred_at": event.occurred_at,
        "recorded_at": event.recorded_at,
        "by": event.by,
    } | public_facts(fields)


def public_facts(fields: dict[str, Any]) -> dict[str, Any]:
    """An event's fields without hashes, without what is sealed and without what is absent."""
    return {
        name: _public(value)
        for name, value in fields.items()
        if value is not None and not name.endswith(("sha256", "_hash")) and not name.startswith("sealed_")
    }


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return public_facts(value)
    return [_public(member) for member in value] if isinstance(value, list | tuple) else value
