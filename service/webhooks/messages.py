"""What is sent to webhooks: what was announced, to the byte, and what only concerns webhooks."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec
from msgspec import Struct

from service.tokens import now, uuid7_hex

CONTENT_TYPE = "application/cloudevents+json"
SNAPSHOT_REQUIRED = "token-ledger.snapshot.required.v1"
TEST = "token-ledger.webhook.test.v1"


class Message(Struct, frozen=True):
    """`id` is the `webhook-id`, the same however often it is sent."""

    id: str
    body: bytes
    ledger_seq: int | None = None


class SnapshotRequired(Struct, frozen=True, kw_only=True):
    """Announcements before `ledger_seq` were dropped and can be delivered no more: take a snapshot."""

    ledger_seq: int
    snapshot: str


class Tested(Struct, frozen=True, kw_only=True):
    webhook_id: str


class _Event(Struct, frozen=True, kw_only=True):
    """Source: CloudEvents 1.0."""

    specversion: Literal["1.0"] = "1.0"
    id: str
    source: str
    type: str
    time: datetime
    datacontenttype: Literal["application/json"] = "application/json"


class SnapshotRequiredEvent(_Event, frozen=True, kw_only=True):
    data: SnapshotRequired


class WebhookTestEvent(_Event, frozen=True, kw_only=True):
    data: Tested


def announcement(feed: str, ledger_seq: int, body: bytes) -> Message:
    """What REVOCATIONS holds. The number alone would mean something else in another feed."""
    return Message(f"rev_{feed}_{ledger_seq}", body, ledger_seq)


def snapshot_required(feed: str, stream_seq: int, ledger_seq: int, issuer: str) -> Message:
    """That something is missing before what stands at `stream_seq` of REVOCATIONS."""
    data = SnapshotRequired(ledger_seq=ledger_seq, snapshot=f"{issuer}/v1/revocations/snapshot")
    identity = f"snapshot_{feed}_{stream_seq}"
    event = SnapshotRequiredEvent(id=identity, source=issuer, type=SNAPSHOT_REQUIRED, time=now(), data=data)
    return Message(identity, msgspec.json.encode(event))


def test_message(webhook_id: str, issuer: str) -> Message:
    """What is sent when somebody asks whether it arrives."""
    identity = f"test_{uuid7_hex()}"
    event = WebhookTestEvent(id=identity, source=issuer, type=TEST, time=now(), data=Tested(webhook_id=webhook_id))
    return Message(identity, msgspec.json.encode(event))
