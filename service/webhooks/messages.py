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


class WebhookEvent(Struct, frozen=True, kw_only=True):
    """What is sent to webhooks only. Source: CloudEvents 1.0."""

    specversion: Literal["1.0"] = "1.0"
    id: str
    source: str
    type: str
    time: datetime
    datacontenttype: Literal["application/json"] = "application/json"
    data: SnapshotRequired | Tested


def announcement(feed: str, ledger_seq: int, body: bytes) -> Message:
    """What REVOCATIONS holds. The number alone would mean something else in another feed."""
    return Message(f"rev_{feed}_{ledger_seq}", body, ledger_seq)


def snapshot_required(feed: str, stream_seq: int, ledger_seq: int, issuer: str) -> Message:
    """That something is missing before what stands at `stream_seq` of REVOCATIONS."""
    data = SnapshotRequired(ledger_seq=ledger_seq, snapshot=f"{issuer}/v1/revocations/snapshot")
    return _message(f"snapshot_{feed}_{stream_seq}", SNAPSHOT_REQUIRED, issuer, data)


def test_message(webhook_id: str, issuer: str) -> Message:
    return _message(f"test_{uuid7_hex()}", TEST, issuer, Tested(webhook_id=webhook_id))


def _message(message_id: str, kind: str, issuer: str, data: SnapshotRequired | Tested) -> Message:
    event = WebhookEvent(id=message_id, source=issuer, type=kind, time=now(), data=data)
    return Message(message_id, msgspec.json.encode(event))
