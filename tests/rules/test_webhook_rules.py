"""The rules of webhooks: who may, what a change makes of them, which secrets sign when."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from events.types import WebhookMetadata
from service.caller import Caller
from service.errors import AlreadyExists, InvalidRequest, NotFound
from service.rules.webhooks import (
    WEBHOOKS_MAX,
    WEBHOOKS_OF_OWNER_MAX,
    Sealed,
    State,
    WebhookSecret,
    changed,
    check_cursor,
    check_filters,
    check_owned,
    check_room,
    disabled,
    redelivering,
    rotated,
)
from tests.making import START, cli, grt, usr

METADATA = WebhookMetadata(webhook_name="a", owner=usr(1), origin="https://a.example")
SEALED = Sealed(url="https://a.example/1", secrets=(WebhookSecret("first"),), after=5, cursor="c")
STATE = State(METADATA, SEALED)


def caller(subject: str, *scope: str) -> Caller:
    return Caller("t", "tok_1", subject, None, frozenset(scope))


def test_webhook_is_its_owners_and_administrators() -> None:
    check_owned(caller(usr(1), "ledger:subscribe"), METADATA)
    check_owned(caller(usr(2), "ledger:admin"), METADATA)
    for who, metadata in ((caller(usr(2), "ledger:subscribe"), METADATA), (caller(usr(1), "ledger:admin"), None)):
        with pytest.raises(NotFound):
            check_owned(who, metadata)


def test_room_is_bounded_for_an_owner_and_in_all() -> None:
    others = [replace(METADATA, owner=usr(2))] * (WEBHOOKS_MAX - WEBHOOKS_OF_OWNER_MAX)
    own = [METADATA] * (WEBHOOKS_OF_OWNER_MAX - 1)
    check_room(usr(1), others + own)
    with pytest.raises(AlreadyExists, match="50 webhooks of this owner"):
        check_room(usr(1), [*own, METADATA])
    with pytest.raises(AlreadyExists, match="500 in all"):
        check_room(usr(3), [replace(METADATA, owner=usr(2))] * WEBHOOKS_MAX)


@pytest.mark.parametrize(
    ("filters", "fits"),
    [
        ({"client_id": cli(1), "subject": usr(1), "grant_id": grt(1)}, True),
        ({"subject": cli(1)}, True),
        ({"client_id": None}, True),
        ({}, True),
        ({"client_id": usr(1)}, False),
        ({"subject": "somebody"}, False),
        ({"grant_id": grt(1).upper()}, False),
    ],
)
def test_filters_are_ids_of_their_kind(filters: dict[str, Any], fits: bool) -> None:
    if fits:
        check_filters(filters)
    else:
        with pytest.raises(InvalidRequest, match=f"{next(iter(filters))} must be an id"):
            check_filters(filters)


def test_cursor_lies_within_the_log() -> None:
    check_cursor(7, 7)
    with pytest.raises(InvalidRequest, match="ends at 7, before 8"):
        check_cursor(8, 7)


def test_change_of_nothing_is_no_change() -> None:
    assert changed(STATE, {}, None) == STATE
    assert changed(STATE, {"webhook_name": "a", "enabled": True, "url": SEALED.url}, "https://a.example") == STATE


def test_change_of_the_url_changes_what_is_sealed_and_the_origin() -> None:
    after = changed(STATE, {"url": "https://b.example/2"}, "https://b.example")
    assert after == State(replace(METADATA, origin="https://b.example"), replace(SEALED, url="https://b.example/2"))


def test_change_sets_filters_and_null_takes_them_away() -> None:
    filtered = changed(STATE, {"subject": usr(3), "client_id": cli(1)}, None)
    assert (filtered.metadata.subject, filtered.metadata.client_id) == (usr(3), cli(1))
    assert changed(filtered, {"subject": None, "client_id": None}, None) == STATE
    with pytest.raises(InvalidRequest):
        changed(STATE, {"grant_id": "x"}, None)


@pytest.mark.parametrize("reason", ["gone", "failing", "asked"])
def test_disabled_webhook_says_why_until_it_is_enabled(reason: Any) -> None:
    ended = disabled(STATE, reason)
    assert ended.metadata.disabled_reason == reason
    assert changed(ended, {"enabled": False}, None) == ended
    assert changed(ended, {"enabled": True}, None) == STATE
    assert changed(STATE, {"enabled": False}, None).metadata.disabled_reason == "asked"


def test_rotated_secret_signs_beside_the_one_before_until_the_overlap_ends() -> None:
    after = rotated(STATE, "second", 60, START).sealed
    assert after.signing(START + timedelta(seconds=59)) == ("second", "first")
    assert after.signing(START + timedelta(seconds=60)) == ("second",)
    assert rotated(STATE, "second", 0, START).sealed.signing(START) == ("second",)
    assert rotated(STATE, "second", 60, START).metadata.secret_rotated_at == START


def test_secret_that_was_rotated_again_never_lives_longer_than_it_was_given() -> None:
    first = rotated(STATE, "second", 60, START)
    second = rotated(first, "third", 3_600, START + timedelta(seconds=1)).sealed
    assert second.signing(START + timedelta(seconds=30)) == ("third", "second", "first")
    assert second.signing(START + timedelta(seconds=61)) == ("third", "second")
    third = rotated(State(METADATA, second), "fourth", 3_600, START + timedelta(seconds=2)).sealed
    assert third.signing(START + timedelta(seconds=3)) == ("fourth", "third", "second")
    later = rotated(State(METADATA, second), "fourth", 3_600, START + timedelta(seconds=62)).sealed
    assert [one.secret for one in later.secrets] == ["fourth", "third", "second"]


def test_redelivery_is_another_cursor_and_nothing_else() -> None:
    assert redelivering(STATE, 2, "d") == State(METADATA, replace(SEALED, after=2, cursor="d"))
