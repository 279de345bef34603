"""What is known of webhooks: the ledger has their state, a bucket their URLs and secrets, sealed.

Every event of a webhook has a sealed record of its own, under the event's id, which is written before the event is
appended. So the two cannot disagree, whatever is interrupted when; the records of events before are then destroyed,
and so is one whose event lost against another.
"""

from __future__ import annotations

from datetime import datetime

import msgspec
from msgspec import Struct

from events.errors import LedgerUnavailable
from events.ledger import Ledger
from events.streams import WEBHOOKS, Connection
from events.types import Recorded, WebhookChanged, WebhookMetadata, WebhookRegistered
from service.commands import subject
from service.keys import Bucket, MasterKey
from service.rules.webhooks import Sealed

ALL = subject("webhook", "*")


class Webhook(Struct, frozen=True, kw_only=True):
    """A webhook as its last event left it, which has `event_id`, `seq` and `changed_at`."""

    webhook_id: str
    metadata: WebhookMetadata
    event_id: str
    seq: int
    changed_at: datetime

    @property
    def enabled(self) -> bool:
        return self.metadata.disabled_reason is None

    @property
    def created_at(self) -> datetime:
        """Its id is a UUIDv7, which begins with milliseconds since 1970."""
        return datetime.fromtimestamp(int(self.webhook_id[4:16], 16) / 1000, self.changed_at.tzinfo)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Sealed).decode


def webhook_of(recorded: Recorded) -> Webhook | None:
    """The webhook that an event leaves, None for a removed one."""
    event = recorded.event
    if not isinstance(event, WebhookRegistered | WebhookChanged):
        return None
    return Webhook(
        webhook_id=event.webhook_id,
        metadata=event.webhook,
        event_id=event.id,
        seq=recorded.seq,
        changed_at=recorded.recorded_at,
    )


class WebhookStore:
    """Reads the state of webhooks, reads and writes what is sealed."""

    def __init__(self, nc: Connection, ledger: Ledger, master: MasterKey) -> None:
        self._ledger = ledger
        self._bucket = Bucket(nc, WEBHOOKS)
        self._master = master

    async def last_seq(self) -> int:
        """The position of the last event about any webhook, 0 if there is none. Raises: LedgerUnavailable."""
        return await self._ledger.last_seq_of(ALL)

    async def all(self) -> list[Webhook]:
        """Those that were not removed, the oldest first. Raises: LedgerUnavailable."""
        found = map(webhook_of, await self._ledger.last_of(ALL))
        return sorted((one for one in found if one is not None), key=lambda one: one.webhook_id)

    async def get(self, webhook_id: str) -> Webhook | None:
        """Raises: LedgerUnavailable."""
        found = await self._ledger.last_of(subject("webhook", webhook_id))
        return webhook_of(found[-1]) if found else None

    async def open(self, webhook: Webhook) -> Sealed:
        """Raises: LedgerUnavailable, also when the webhook has changed since; MasterKeyMismatch."""
        key = _key(webhook.webhook_id, webhook.event_id)
        sealed = await self._bucket.get(key)
        if sealed is None:
            raise LedgerUnavailable(f"webhook {webhook.webhook_id} has just changed")
        return _decode(self._master.unseal(sealed, f"webhook {key}"))

    async def seal(self, webhook_id: str, event_id: str, record: Sealed) -> None:
        """Writes what the event with this id, which is about to be appended, leaves. Raises: LedgerUnavailable."""
        key = _key(webhook_id, event_id)
        await self._bucket.put(key, self._master.seal(_encode(record), f"webhook {key}"))

    async def destroy(self, webhook_id: str, event_id: str) -> None:
        """What was sealed for an event can be read by nobody any more. Raises: LedgerUnavailable."""
        await self._bucket.destroy(_key(webhook_id, event_id))

    async def destroy_before(self, webhook_id: str, event_id: str) -> None:
        """Whatever was sealed before what this event left, which is in the ledger. Raises: LedgerUnavailable.

        None of that can come into force: its event was decided before this one was known, and so loses against it.
        """
        revisions = await self._bucket.revisions(webhook_id)
        end = revisions.get(_key(webhook_id, event_id), 0)
        for key in [key for key, revision in revisions.items() if revision < end]:
            await self._bucket.destroy(key)

    async def destroy_all(self, webhook_id: str) -> None:
        """Of a webhook that was removed. Raises: LedgerUnavailable."""
        for key in await self._bucket.revisions(webhook_id):
            await self._bucket.destroy(key)


def _key(webhook_id: str, event_id: str) -> str:
    return f"{webhook_id}.{event_id}"
