"""Followers of the revocations, as tests register them and let them speak."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from events import streams
from events.ledger import Append, Ledger
from events.receipts import ReceiptLog
from events.streams import Connection
from events.types import SubscriberRegistered, SubscriberRemoved
from service.tokens import new_id, now, uuid7_hex
from tests.running import Service


class Crowd:
    """Subscribers over HTTP that are registered in the log of a running service, and their receipts."""

    def __init__(self, nc: Connection) -> None:
        self.ledger = Ledger(nc)
        self.receipts = ReceiptLog(nc, f"test-{new_id('tok')}")
        self.ids: list[str] = []

    async def join(self, count: int = 1) -> list[str]:
        """Registers so many and answers their ids."""
        ids = [new_id("sub") for _ in range(count)]
        events = [
            SubscriberRegistered(
                id=uuid7_hex(),
                occurred_at=now(),
                by="system",
                subscriber_id=one,
                subscriber_name=f"gate {number}",
                transport="http",
                owner="system",
            )
            for number, one in enumerate(ids)
        ]
        await self.ledger.append(*(Append(_subject(one.subscriber_id), one, 0) for one in events))
        self.ids += ids
        return ids

    async def apply(self, ledger_seq: int, *followers: str) -> None:
        """These have applied everything up to there: it is on disk."""
        for follower in followers:
            self.receipts.record(follower, ledger_seq)
        await self.receipts.written()

    async def leave(self) -> None:
        """All of them, so that nobody later finds them silent."""
        events = [
            SubscriberRemoved(id=uuid7_hex(), occurred_at=now(), by="system", subscriber_id=one) for one in self.ids
        ]
        if events:
            await self.ledger.append(*(Append(_subject(one.subscriber_id), one) for one in events))
        self.ids.clear()


def _subject(subscriber_id: str) -> str:
    return f"ledger.main.subscriber.{subscriber_id}"


@contextlib.asynccontextmanager
async def crowd_of(service: Service) -> AsyncIterator[Crowd]:
    nats_url: Any = json.loads((service.data_dir / "bootstrap.json").read_text())["nats_url"]
    nc = await streams.connect(nats_url, service.data_dir / "nats" / "service.nk", name="test-crowd")
    crowd = Crowd(nc)
    try:
        yield crowd
        await crowd.leave()
    finally:
        await crowd.receipts.close()
        await nc.close()
