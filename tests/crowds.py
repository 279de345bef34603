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
from events.types import (
    LedgerEvent,
    SubscriberRegistered,
    SubscriberRemoved,
    WebhookChanged,
    WebhookMetadata,
    WebhookRegistered,
    WebhookRemoved,
)
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
                **_head(),
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

    async def hook(self, **about: Any) -> str:
        """Registers a webhook that is only an event: nothing is delivered to it."""
        webhook_id = new_id("whk")
        event = WebhookRegistered(**_head(), webhook_id=webhook_id, webhook=_metadata(**about))
        await self.ledger.append(Append(_subject(webhook_id), event, 0))
        self.ids.append(webhook_id)
        return webhook_id

    async def change(self, webhook_id: str, **about: Any) -> None:
        """The webhook is another one from now on."""
        event = WebhookChanged(**_head(), webhook_id=webhook_id, webhook=_metadata(**about))
        await self.ledger.append(Append(_subject(webhook_id), event))

    async def apply(self, ledger_seq: int, *followers: str) -> None:
        """These have applied everything up to there: it is on disk."""
        for follower in followers:
            self.receipts.record(follower, ledger_seq)
        await self.receipts.written()

    async def leave(self) -> None:
        """All of them, so that nobody later finds them silent."""
        gone: list[Append] = []
        for one in self.ids:
            event: LedgerEvent
            if one.startswith("whk_"):
                event = WebhookRemoved(**_head(), webhook_id=one)
            else:
                event = SubscriberRemoved(**_head(), subscriber_id=one)
            gone.append(Append(_subject(one), event))
        if gone:
            await self.ledger.append(*gone)
        self.ids.clear()


def _head() -> dict[str, Any]:
    return {"id": uuid7_hex(), "occurred_at": now(), "by": "system"}


def _metadata(**about: Any) -> WebhookMetadata:
    return WebhookMetadata(webhook_name="hook", owner="system", origin="https://example.com", **about)


def _subject(follower: str) -> str:
    return f"ledger.main.{'webhook' if follower.startswith('whk_') else 'subscriber'}.{follower}"


@contextlib.asynccontextmanager
async def crowd_of(service: Service) -> AsyncIterator[Crowd]:
    nats_url: Any = json.loads((service.data_dir / "bootstrap.json").read_text())["nats_url"]
    nc = await streams.connect(nats_url, service.data_dir / "nats" / "service.nk", name="test-crowd")
    crowd = Crowd(nc)
    try:
        yield crowd
    finally:
        await crowd.leave()
        await crowd.receipts.close()
        await nc.close()
