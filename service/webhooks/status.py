"""What the processes that deliver webhooks tell of themselves."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import nats.errors
from msgspec import Struct

from events.streams import Connection

STATUS_SUBJECT = "webhooks.status"
_FIRST_SECONDS_MAX = 0.3
_FURTHER_SECONDS_MAX = 0.05


class Status(Struct, frozen=True, kw_only=True):
    """What one process has done since it started: attempts by their outcome, webhooks that it `disabled`.

    `failing`: webhooks of whose last attempts here none succeeded.
    """

    attempts: dict[str, int]
    disabled: int
    failing: int


_decode = msgspec.json.Decoder(Status).decode


async def ask_all(nc: Connection) -> list[Status]:
    """Of every such process that answers in time."""
    answers: list[Status] = []
    inbox = nc.new_inbox()
    with contextlib.suppress(nats.errors.Error, TimeoutError, OSError, msgspec.DecodeError):
        subscription = await nc.subscribe(inbox)
        try:
            await nc.publish(STATUS_SUBJECT, b"", reply=inbox)
            seconds = _FIRST_SECONDS_MAX
            while True:
                async with asyncio.timeout(seconds):
                    message = await subscription.next_msg(timeout=seconds + 1)
                if not message.data:  # there is none
                    break
                answers.append(_decode(message.data))
                seconds = _FURTHER_SECONDS_MAX
        finally:
            await subscription.unsubscribe()
    return answers
