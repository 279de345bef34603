"""A create that was cut off anywhere has one effect and one answer, however often it is repeated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from events.types import ClientSecretRotated
from service.caller import Caller
from service.commands import Prepared, subject
from service.errors import IdempotencyMismatch, InvalidRequest, InvalidScope, Unavailable
from service.idempotency import Repeatable, _Chain, idempotency_key, once
from service.registry import Asker, change_client, prepare_client, prepare_secret
from service.runtime import Runtime
from tests.running import unique


def asked(key: str, body: bytes = b"{}") -> Repeatable:
    return Repeatable(key, "/v1/clients", body)


async def new_client(runtime: Runtime, asker: Asker) -> str:
    answer, seq = await once(runtime, asker.caller, Repeatable(None, "", b""), client(runtime, asker))
    await runtime.applied(seq)
    return str(answer["client_id"])


def client(runtime: Runtime, asker: Asker) -> Callable[[bool], Awaitable[Prepared]]:
    return lambda _: prepare_client(runtime, asker, {"client_name": "once"})


def secret(runtime: Runtime, asker: Asker, client_id: str) -> Callable[[bool], Awaitable[Prepared]]:
    return lambda fresh: prepare_secret(runtime, asker, client_id, 60, fresh=fresh)


async def rotations(runtime: Runtime, client_id: str) -> list[str]:
    recorded = await runtime.ledger.read(subject("client", client_id))
    return [one.event.secret_sha256 for one in recorded if isinstance(one.event, ClientSecretRotated)]


async def test_cut_off_between_decision_and_append_is_completed_by_the_repetition(
    runtime: Runtime, admin: Caller
) -> None:
    asker, key = Asker(admin, None), unique("key")
    decided = await prepare_client(runtime, asker, {"client_name": "once"})
    await _Chain(runtime, admin, asked(key)).add(0, decided)
    answer, seq = await once(runtime, admin, asked(key), client(runtime, asker))
    assert answer == json.loads(json.dumps(decided.answer))
    recorded = await runtime.ledger.read(decided.entries[0].subject)
    assert [(one.seq, one.event) for one in recorded] == [(seq, decided.entries[0].event)]


async def test_cut_off_between_append_and_answer_is_answered_by_the_repetition(runtime: Runtime, admin: Caller) -> None:
    asker, key = Asker(admin, None), unique("key")
    first = await once(runtime, admin, asked(key), client(runtime, asker))
    for _ in range(3):
        assert await once(runtime, admin, asked(key), client(runtime, asker)) == first
    recorded = await runtime.ledger.read(subject("client", first[0]["client_id"]))
    assert [one.seq for one in recorded] == [first[1]]


async def test_decision_that_lost_is_replaced_once_for_all_who_repeat(runtime: Runtime, admin: Caller) -> None:
    """The stored decision can never be appended: another event came first. All find the same new one."""
    asker, key = Asker(admin, None), unique("key")
    client_id = await new_client(runtime, asker)
    stale = await secret(runtime, asker, client_id)(False)
    await _Chain(runtime, admin, asked(key)).add(0, stale)
    await change_client(runtime, asker, client_id, {"client_name": "changed meanwhile"})
    answers = await asyncio.gather(
        *(once(runtime, admin, asked(key), secret(runtime, asker, client_id)) for _ in range(10))
    )
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0]["client_secret"] != stale.answer["client_secret"]
    assert len(await rotations(runtime, client_id)) == 1


async def test_twenty_at_once_have_one_effect(runtime: Runtime, admin: Caller) -> None:
    asker, key = Asker(admin, None), unique("key")
    client_id = await new_client(runtime, asker)
    answers = await asyncio.gather(
        *(once(runtime, admin, asked(key), secret(runtime, asker, client_id)) for _ in range(20))
    )
    assert all(answer == answers[0] for answer in answers)
    assert len(await rotations(runtime, client_id)) == 1


async def test_refusal_is_not_remembered(runtime: Runtime, admin: Caller) -> None:
    asker, key = Asker(admin, None), unique("key")
    with pytest.raises(InvalidScope):
        await once(runtime, admin, asked(key), lambda _: prepare_client(runtime, asker, {"scope": 'a"'}))
    answer, _ = await once(runtime, admin, asked(key), client(runtime, asker))
    assert answer["client_name"] == "once"


async def test_other_body_is_refused(runtime: Runtime, admin: Caller) -> None:
    asker, key = Asker(admin, None), unique("key")
    await once(runtime, admin, asked(key), client(runtime, asker))
    with pytest.raises(IdempotencyMismatch):
        await once(runtime, admin, asked(key, b'{"client_name": "other"}'), client(runtime, asker))


async def test_what_is_stored_opens_for_nobody_but_the_caller(runtime: Runtime, admin: Caller) -> None:
    asker, key = Asker(admin, None), unique("key")
    answer, _ = await once(runtime, admin, asked(key), client(runtime, asker))
    chain = _Chain(runtime, admin, asked(key))
    stored = await runtime.idempotency.get(f"{chain._name}.0")
    assert stored is not None
    for word in (answer["client_secret"], answer["client_id"], key, admin.token):
        assert word.encode() not in stored
    # Somebody who knows id and key, and not the token.
    other = Caller("tl_sat_other", admin.token_id, admin.subject, None, admin.scope)
    with pytest.raises(Unavailable):
        await once(runtime, other, asked(key), client(runtime, asker))


@pytest.mark.parametrize("values", [[""], ["a b"], ["a\x7f"], ["\xe4"], ["a" * 256], ["a", "b"]], ids=str)
def test_key_that_is_none_is_refused(values: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        idempotency_key(values)


@pytest.mark.parametrize("values", [["a"], ["~" * 255], ["550e8400-e29b-41d4-a716-446655440000"], []], ids=str)
def test_key_is_taken(values: list[Any]) -> None:
    assert idempotency_key(values) == (values[0] if values else None)
