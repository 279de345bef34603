"""Who is registered as a subscriber, who may see it and act for it: given events, when a command, then events. Pure."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from events.types import LedgerEvent, SubscriberRegistered, SubscriberRemoved
from projections.registry import Client, User
from service.caller import Caller
from service.errors import Gone, InvalidRequest, LimitReached, NotFound
from service.rules.grants import Stamp
from service.rules.subscribers import (
    SUBSCRIBERS_MAX,
    RegisterSubscriber,
    Removed,
    State,
    Subscriber,
    check_registration,
    decide_register,
    decide_remove,
    may_act_for,
    may_see,
    subscriber_of,
)
from tests.making import START, History, cli, head, metadata, tok, usr

SUBSCRIBER = "sub_" + "a" * 32
OWNER = User(usr(1), "service", "h", b"", "", START, 1, has_password=False)
COMMAND = RegisterSubscriber(
    stamp=Stamp(("b" * 32,), START, tok(9), "request"),
    subscriber_id=SUBSCRIBER,
    name="orders-api",
    transport="nats",
    owner=usr(1),
    public_key="U" + "A" * 55,
    after=41,
)


def registration(**changes: Any) -> SubscriberRegistered:
    fields = {
        "subscriber_id": SUBSCRIBER,
        "subscriber_name": "orders-api",
        "transport": "nats",
        "owner": usr(1),
        "public_key": "U" + "A" * 55,
        "after": 41,
    }
    return SubscriberRegistered(**head(), **fields | changes)


def folded(*events: LedgerEvent) -> State | None:
    return subscriber_of(History(*events).recorded)


def known(**changes: Any) -> Subscriber:
    state = folded(registration(**changes))
    assert isinstance(state, Subscriber)
    return state


def caller(*scope: str, subject: str = usr(7), client_id: str | None = None) -> Caller:
    return Caller("tl_sat_x", tok(1), subject, client_id, frozenset(scope))


def test_registered_subscriber_is_what_its_event_says() -> None:
    state = known()
    assert (state.subscriber_id, state.name, state.transport, state.owner) == (SUBSCRIBER, "orders-api", "nats", usr(1))
    assert (state.public_key, state.after, state.seq) == ("U" + "A" * 55, 41, 1)


def test_removed_subscriber_is_none_any_more() -> None:
    assert folded() is None
    assert folded(registration(), SubscriberRemoved(**head(), subscriber_id=SUBSCRIBER)) == Removed(SUBSCRIBER, 2)


def test_register_records_what_was_asked() -> None:
    event = decide_register(COMMAND, OWNER, 0)
    assert (event.subscriber_id, event.subscriber_name, event.transport) == (SUBSCRIBER, "orders-api", "nats")
    assert (event.owner, event.public_key, event.after) == (usr(1), "U" + "A" * 55, 41)
    assert (event.id, event.by, event.request_id) == ("b" * 32, tok(9), "request")


def test_register_for_a_client_is_allowed() -> None:
    client = Client(cli(1), metadata(), (), START, 1)
    assert decide_register(replace(COMMAND, owner=cli(1)), client, 0).owner == cli(1)


@pytest.mark.parametrize(
    ("owner", "registered", "refusal"),
    [
        pytest.param(None, 0, NotFound, id="nobody"),
        pytest.param(replace(OWNER, disabled_at=START), 0, Gone, id="disabled-user"),
        pytest.param(Client(cli(1), metadata(), (), START, 1, START), 0, Gone, id="disabled-client"),
        pytest.param(OWNER, SUBSCRIBERS_MAX, LimitReached, id="too-many"),
    ],
)
def test_register_is_refused(owner: Any, registered: int, refusal: type[Exception]) -> None:
    with pytest.raises(refusal):
        decide_register(COMMAND, owner, registered)


@pytest.mark.parametrize(
    ("name", "transport", "after"),
    [("a\nb", "nats", None), (" a", "nats", None), ("a", "http", 0)],
    ids=["line", "blank", "after-over-http"],
)
def test_registration_that_makes_no_sense_is_refused(name: str, transport: Any, after: int | None) -> None:
    with pytest.raises(InvalidRequest):
        check_registration(name, transport, after=after)


def test_remove_ends_it_once() -> None:
    stamp = COMMAND.stamp
    [event] = decide_remove(stamp, known())
    assert isinstance(event, SubscriberRemoved)
    assert (event.subscriber_id, event.by) == (SUBSCRIBER, tok(9))
    assert decide_remove(stamp, Removed(SUBSCRIBER, 2)) == []
    with pytest.raises(NotFound):
        decide_remove(stamp, None)


@pytest.mark.parametrize(
    ("who", "acts", "sees"),
    [
        pytest.param(caller("ledger:subscribe", subject=usr(1)), True, True, id="owner"),
        pytest.param(caller("ledger:admin"), True, True, id="administrator"),
        pytest.param(caller("ledger:audit"), False, True, id="auditor"),
        pytest.param(caller("ledger:subscribe"), False, False, id="another"),
        pytest.param(caller("ledger:subscribe", subject=usr(2), client_id=usr(1)), True, True, id="by-client-id"),
        pytest.param(caller("ledger:clients", "ledger:users", "ledger:revoke"), False, False, id="other-rights"),
    ],
)
def test_owner_and_administrators_act_for_a_subscriber_and_auditors_see_it(who: Caller, acts: bool, sees: bool) -> None:
    assert (acts, sees) == (may_act_for(who, known()), may_see(who, known()))


def test_subscriber_of_a_client_is_acted_for_by_the_clients_tokens() -> None:
    mine = known(owner=cli(1))
    assert may_act_for(caller(subject=cli(1), client_id=cli(1)), mine)
    assert may_act_for(caller(subject=usr(1), client_id=cli(1)), mine)
    assert not may_act_for(caller(subject=usr(1), client_id=cli(2)), mine)
    assert not may_act_for(caller(subject=usr(1)), mine)
