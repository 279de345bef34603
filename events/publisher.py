"""One acknowledged publish to JetStream. Shared by the ledger and the usage log.

A reply is matched to its request through one wildcard inbox, so that a publish costs no subscription of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from itertools import count
from typing import Any
from uuid import uuid4

import nats.errors
from nats.aio.msg import Msg

from events.errors import LedgerError, LedgerUnavailable, MessageTooLarge, StreamFull
from events.streams import Connection

WRONG_LAST_SEQUENCE = {10071, 10164}
DUPLICATE = 10201  # an atomic batch that holds a known id
_FULL = {10077, 10023, 10047, 10028}
_TOO_LARGE = {10054}


class NotAcknowledged(Exception):
    """The message went out and no answer came: it may or may not be stored."""


class Refused(Exception):
    """The server answered with an error: nothing was stored."""

    def __init__(self, err_code: int, description: str) -> None:
        super().__init__(f"{description} ({err_code})")
        self.err_code = err_code

    def as_ledger_error(self) -> LedgerError:
        """The error a caller can act on."""
        if self.err_code in _FULL:
            return StreamFull(f"the log has no room: {self}")
        if self.err_code in _TOO_LARGE:
            return MessageTooLarge(f"the event is too large for the log: {self}")
        return LedgerUnavailable(f"the log refused the event: {self}")


Outgoing = tuple[str, bytes, dict[str, str]]  # subject, data, headers


class Publisher:
    """Publishes and hands out the acknowledgement. One for each connection and user."""

    def __init__(self, nc: Connection) -> None:
        self.nc = nc
        self._pending: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._numbers = count(1)
        self._inbox = ""
        self._starting = asyncio.Lock()
        nc.lost_listeners.append(self._connection_lost)

    async def publish(self, subject: str, data: bytes, headers: dict[str, str]) -> asyncio.Future[dict[str, Any]]:
        """Sends the message; the future resolves to JetStream's acknowledgement, `{"seq": …}`.

        The future fails with Refused or NotAcknowledged.

        Raises: LedgerUnavailable if nothing was sent; MessageTooLarge.
        """
        self._check_connected()
        if not self._inbox:
            await self._start()
        token = str(next(self._numbers))
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[token] = future
        future.add_done_callback(lambda _: self._pending.pop(token, None))
        try:
            await self._send(subject, data, headers, reply=f"{self._inbox}.{token}")
        except BaseException:
            future.cancel()
            raise
        return future

    async def _send(self, subject: str, data: bytes, headers: dict[str, str], *, reply: str = "") -> None:
        self._check_connected()
        try:
            await self.nc.publish(subject, data, reply=reply, headers=headers)
        except nats.errors.MaxPayloadError as error:
            raise MessageTooLarge(f"the message of {len(data)} bytes is larger than the server allows") from error
        except (nats.errors.Error, OSError) as error:
            raise LedgerUnavailable(f"the connection to the nats-server is down: {error}") from error

    async def publish_together(self, messages: Sequence[Outgoing]) -> asyncio.Future[dict[str, Any]]:
        """Sends the messages as one atomic batch (ADR-50): all of them are stored, or none.

        The future resolves to the acknowledgement of the last one, which has the last of their sequences: between them
        there is no gap. It fails with Refused or NotAcknowledged. Raises: LedgerUnavailable if the batch was not sent
        whole, so that nothing is stored; MessageTooLarge.
        """
        batch_id = uuid4().hex
        *inner, (subject, data, headers) = messages
        for number, (of, content, more) in enumerate(inner, 1):
            numbered = more | {"Nats-Batch-Id": batch_id, "Nats-Batch-Sequence": str(number)}
            await self._send(of, content, numbered)
        committing = {"Nats-Batch-Id": batch_id, "Nats-Batch-Sequence": str(len(messages)), "Nats-Batch-Commit": "1"}
        return await self.publish(subject, data, headers | committing)

    def _check_connected(self) -> None:
        if not self.nc.is_connected:
            raise LedgerUnavailable("the connection to the nats-server is down")

    async def _start(self) -> None:
        async with self._starting:
            if not self._inbox:
                inbox = self.nc.new_inbox()
                await self.nc.subscribe(f"{inbox}.*", cb=self._answered)
                self._inbox = inbox

    async def _answered(self, message: Msg) -> None:
        future = self._pending.get(message.subject.rpartition(".")[2])
        if future is None or future.done():
            return
        if not message.data:  # no responders: the stream has no leader, or JetStream is off
            future.set_exception(Refused(503, "no stream takes this subject at the moment"))
            return
        answer = json.loads(message.data)
        error = answer.get("error")
        if error:
            future.set_exception(Refused(error.get("err_code", 0), error.get("description", "")))
        else:
            future.set_result(answer)

    def _connection_lost(self) -> None:
        for future in list(self._pending.values()):
            if not future.done():
                future.set_exception(NotAcknowledged("the connection was lost"))


async def outcome(future: asyncio.Future[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Waits for an acknowledgement. Raises: Refused, NotAcknowledged."""
    try:
        async with asyncio.timeout(seconds):
            return await future
    except TimeoutError as error:
        raise NotAcknowledged(f"no answer within {seconds} s") from error
