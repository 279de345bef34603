"""A create that is repeated with the same `Idempotency-Key` has one effect and one answer, for 24 hours.

What will be appended, with its event ids, and what will be answered are stored before the append, sealed under a key
that only the caller's token and idempotency key give. A repetition finds them and appends the very same events: the
ledger recognises its own ids and says where they stand. So a crash between any two steps leaves nothing done twice.

A decision that loses to a newer event of the ledger can never be appended any more. The next one is stored beside it,
under the next number, so that all who repeat the request walk the same chain and end at the same link.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from events import codec
from events.errors import Conflict, LedgerError
from events.ledger import Append
from service.caller import Caller
from service.commands import ATTEMPTS_MAX, Prepared, commit, refused
from service.errors import IdempotencyMismatch, InvalidRequest, Unavailable
from service.keys import derive, seal, unseal
from service.runtime import Runtime

KEY_CHARS_MAX = 255
_SYNTAX = re.compile(rf"[\x21-\x7e]{{1,{KEY_CHARS_MAX}}}")
_CONTEXT = "idempotency"


class Repeatable(Struct, frozen=True):
    """What makes two requests the same. `key` is None when the caller asked for no such thing."""

    key: str | None
    path: str
    body: bytes


class _StoredAppend(Struct, frozen=True, array_like=True):
    subject: str
    event: bytes
    expected: int | None


class _Intent(Struct, frozen=True, array_like=True):
    body_sha256: bytes
    entries: tuple[_StoredAppend, ...]
    answer: bytes


class _Stored(Struct, frozen=True):
    """As it stands in the bucket, at this revision."""

    intent: _Intent
    link: int
    revision: int


_encode_intent = msgspec.msgpack.Encoder().encode
_decode_intent = msgspec.msgpack.Decoder(_Intent).decode


def idempotency_key(values: list[str]) -> str | None:
    """The key in the values of the `Idempotency-Key` header. Raises: InvalidRequest."""
    if not values:
        return None
    if len(values) > 1 or not _SYNTAX.fullmatch(values[0]):
        raise InvalidRequest(
            f"Idempotency-Key must be one value of 1 to {KEY_CHARS_MAX} visible ASCII characters",
            fix="send a fresh random value, a UUID for example, with each new request",
        )
    return values[0]


async def once(
    runtime: Runtime, caller: Caller, asked: Repeatable, prepare: Callable[[bool], Awaitable[Prepared]]
) -> tuple[dict[str, Any], int]:
    """Prepares and appends, or finds what an earlier such request did. Returns answer and sequence.

    `prepare` is called as by `commands.commit`. A refusal is not remembered: nothing was done.

    Raises: what `prepare` raises; IdempotencyMismatch; Unavailable.
    """
    if asked.key is None:
        return await commit(runtime, prepare)
    chain = _Chain(runtime, caller, asked)
    for link in range(ATTEMPTS_MAX):
        try:
            intent = await chain.open(link) or await chain.add(link, await prepare(link > 0))
            seqs = await runtime.ledger.append(*map(_append, intent.entries))
            answer: dict[str, Any] = msgspec.json.decode(intent.answer)
            return answer, seqs[-1]
        except Conflict:
            continue
        except LedgerError as error:
            raise refused(error) from error
    raise Unavailable("too many writers change the same thing at this moment")


async def take(runtime: Runtime, caller: Caller, asked: Repeatable, secret: str) -> dict[str, Any] | None:
    """What such a request was answered, None if there was none; its member `secret` for who takes it first.

    To whoever repeats the request, or takes again, the answer lacks it, and so does what is stored.

    Raises: Unavailable.
    """
    chain = _Chain(runtime, caller, asked)
    try:
        for _ in range(ATTEMPTS_MAX):
            stored = await chain.last()
            if stored is None:
                return None
            answer: dict[str, Any] = msgspec.json.decode(stored.intent.answer)
            rest = {name: value for name, value in answer.items() if name != secret}
            if len(rest) == len(answer) or await chain.change(stored, rest):
                return answer
    except LedgerError as error:
        raise refused(error) from error
    raise Unavailable("too many ask for the same answer at this moment")


class _Chain:
    """The decisions that were stored for one request, by number."""

    def __init__(self, runtime: Runtime, caller: Caller, asked: Repeatable) -> None:
        assert asked.key is not None
        self._bucket = runtime.idempotency
        # The token is as secret as what is sealed; its id and the key alone open nothing.
        self._seal_key = derive(f"{caller.token}\0{asked.key}".encode(), _CONTEXT)
        self._body_sha256 = hashlib.sha256(asked.body).digest()
        self._name = hashlib.sha256(f"{caller.token_id}\0{asked.path}\0{asked.key}".encode()).hexdigest()

    async def open(self, link: int) -> _Intent | None:
        """Raises: IdempotencyMismatch if it was stored for another body; LedgerError."""
        stored = await self._stored(link)
        return stored.intent if stored is not None else None

    async def last(self) -> _Stored | None:
        """The decision that holds. Raises: as `open`."""
        found = None
        for link in range(ATTEMPTS_MAX):
            following = await self._stored(link)
            if following is None:
                break
            found = following
        return found

    async def change(self, stored: _Stored, answer: dict[str, Any]) -> bool:
        """Whether this call gave it another answer; not if it was changed meanwhile. Raises: LedgerError."""
        intent = replace(stored.intent, answer=msgspec.json.encode(answer))
        sealed = seal(self._seal_key, _encode_intent(intent), _CONTEXT)
        return await self._bucket.update(f"{self._name}.{stored.link}", sealed, stored.revision)

    async def _stored(self, link: int) -> _Stored | None:
        entry = await self._bucket.entry(f"{self._name}.{link}")
        if entry is None:
            return None
        opened = unseal(self._seal_key, entry[0], _CONTEXT)
        if opened is None:
            raise Unavailable("what was stored under this Idempotency-Key cannot be read", fix="use a new key")
        intent = _decode_intent(opened)
        if intent.body_sha256 != self._body_sha256:
            raise IdempotencyMismatch("this Idempotency-Key was used with another body")
        return _Stored(intent, link, entry[1])

    async def add(self, link: int, prepared: Prepared) -> _Intent:
        """Stores the decision, or finds the one that another request has just stored. Raises: as `open`."""
        entries = tuple(_StoredAppend(one.subject, codec.encode(one.event), one.expected) for one in prepared.entries)
        intent = _Intent(self._body_sha256, entries, msgspec.json.encode(prepared.answer))
        sealed = seal(self._seal_key, _encode_intent(intent), _CONTEXT)
        if await self._bucket.create(f"{self._name}.{link}", sealed):
            return intent
        stored = await self.open(link)
        if stored is None:
            raise Unavailable("what was stored under this Idempotency-Key is gone; repeat the request")
        return stored


def _append(stored: _StoredAppend) -> Append:
    return Append(stored.subject, codec.decode(stored.event), stored.expected)
