"""The AsyncAPI 3.0 document: what the service tells of its own accord, and by which ways. OpenAPI has the requests."""

from __future__ import annotations

import functools
from typing import Any

import msgspec

from events.types import TENANT
from projections.revocations import POSITION_SUBJECT, CloudEvent, FeedPosition, What
from service.api.openapi import software_version
from service.following import Told
from service.webhooks.messages import CONTENT_TYPE, SNAPSHOT_REQUIRED, TEST, SnapshotRequiredEvent, WebhookTestEvent

PATH = "/schema/asyncapi.json"
_PAYLOADS = (CloudEvent, SnapshotRequiredEvent, WebhookTestEvent, Told, FeedPosition)
_REF = "#/components/schemas/{name}"
_ENDED: dict[What, str] = {
    "token": "One token ended.",
    "grant": "A grant ended, with every token of it.",
    "client": "Everything that a client was given until `issued_before` ended.",
    "subject": "Everything that a user was given until `issued_before` ended.",
    "key": "Everything that a key signed ended, whenever it says that it was issued.",
}


@functools.cache
def document() -> bytes:
    """The document as JSON, the same from every worker."""
    schemas = msgspec.json.schema_components(_PAYLOADS, ref_template=_REF)[1]
    whole = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Token ledger: the feed of revocations",
            "version": software_version(),
            "description": "The same CloudEvents, byte for byte and in the order of the ledger, by every way. `id` is "
            "the ledger sequence, and the cursor from which a follower goes on.",
        },
        "defaultContentType": "application/json",
        "channels": _channels(),
        "operations": _operations(),
        "components": {
            "schemas": schemas,
            "messages": {f"{what}Revoked": _revoked(what) for what in _ENDED}
            | {
                "snapshotRequired": _event(
                    "SnapshotRequired",
                    "Something was dropped and is not delivered.",
                    SnapshotRequiredEvent,
                    SNAPSHOT_REQUIRED,
                ),
                "webhookTest": _event("WebhookTest", "Somebody asked whether it arrives.", WebhookTestEvent, TEST),
                "streamPosition": _message("StreamPosition", "How far a stream is complete, every second.", Told),
                "positionRequest": {"name": "PositionRequest", "summary": "Empty.", "payload": {}},
                "position": _message("Position", "How far the announcements are.", FeedPosition),
            },
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An access token, PAT or SAT of this ledger with `ledger:subscribe`.",
                },
                "nkey": {
                    "type": "asymmetricEncryption",
                    "description": "The nkey seed that `subscriber create` prints once.",
                },
            },
        },
    }
    return msgspec.json.encode(whole)


def _message(name: str, summary: str, payload: type) -> dict[str, Any]:
    return {"name": name, "summary": summary, "payload": {"$ref": _REF.format(name=payload.__name__)}}


def _revoked(what: What) -> dict[str, Any]:
    return _event(f"{what.capitalize()}Revoked", _ENDED[what], CloudEvent, f"token-ledger.{what}.revoked.v1")


def _event(name: str, summary: str, payload: type, kind: str) -> dict[str, Any]:
    """A CloudEvent of one type."""
    own = {"type": "object", "properties": {"type": {"const": kind}}}
    message = _message(name, summary, payload)
    return message | {"contentType": CONTENT_TYPE, "payload": {"allOf": [message["payload"], own]}}


def _messages(*more: str) -> dict[str, Any]:
    names = [f"{what}Revoked" for what in _ENDED]
    return {name: {"$ref": f"#/components/messages/{name}"} for name in (*names, *more)}


def _channels() -> dict[str, Any]:
    return {
        "feed": {
            "address": f"revocations.{TENANT}.{{what}}",
            "description": "JetStream stream REVOCATIONS. A subscriber fetches from the durable consumer that was made "
            "for it, under the API prefix L.API, and acknowledges.",
            "parameters": {"what": {"description": "What ended.", "enum": list(_ENDED)}},
            "messages": _messages(),
            "bindings": {"nats": {}},
        },
        "stream": {
            "address": "/v1/revocations/stream",
            "description": "Server-sent events. Revocations have no event name; `position` comes every second.",
            "messages": _messages("streamPosition"),
            "bindings": {"http": {}},
        },
        "webhook": {
            "address": None,
            "description": "The URL that was registered at /v1/webhooks. Signed as Standard Webhooks has it.",
            "messages": _messages("snapshotRequired", "webhookTest"),
            "bindings": {"http": {}},
        },
        "position": {
            "address": POSITION_SUBJECT,
            "description": "Core NATS: a follower that has applied up to `stream_seq` was complete `age_ms` before it "
            "asked.",
            "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in ("positionRequest", "position")},
            "bindings": {"nats": {}},
        },
    }


def _operations() -> dict[str, Any]:
    bearer = {"security": [{"$ref": "#/components/securitySchemes/bearer"}]}
    nkey = {"security": [{"$ref": "#/components/securitySchemes/nkey"}]}
    return {
        "announce": {"action": "send", "channel": {"$ref": "#/channels/feed"}, "bindings": {"nats": {}}} | nkey,
        "streamRevocations": {
            "action": "send",
            "channel": {"$ref": "#/channels/stream"},
            "bindings": {"http": {"method": "GET"}},
        }
        | bearer,
        "deliverWebhook": {
            "action": "send",
            "channel": {"$ref": "#/channels/webhook"},
            "bindings": {"http": {"method": "POST"}},
        },
        "answerPosition": {
            "action": "receive",
            "channel": {"$ref": "#/channels/position"},
            "messages": [{"$ref": "#/channels/position/messages/positionRequest"}],
            "reply": {
                "channel": {"$ref": "#/channels/position"},
                "messages": [{"$ref": "#/channels/position/messages/position"}],
            },
        }
        | nkey,
    }
