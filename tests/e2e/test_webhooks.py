"""Webhooks from end to end: registered over HTTP, delivered by their own process, to receivers of every kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.receivers import Receiver, signed_by
from tests.running import Service, StartService, unique, until

SECONDS = 60.0


@pytest.fixture(scope="module")
def hooked(service_with: StartService) -> Service:
    """A service that may call receivers on this machine."""
    return service_with(webhook_allowed_networks="127.0.0.0/8")


def create(service: Service, receiver: Receiver, **more: Any) -> dict[str, Any]:
    return service.done("POST", "/v1/webhooks", json={"url": receiver.url(f"/{unique('hook')}"), **more})


@contextlib.contextmanager
def registered(service: Service, receiver: Receiver, **more: Any) -> Iterator[dict[str, Any]]:
    """A webhook that is there for as long as a test needs it."""
    made = create(service, receiver, **more)
    try:
        yield made
    finally:
        service.call("DELETE", f"/v1/webhooks/{made['webhook_id']}")


def revoke(service: Service) -> int:
    """Revokes a token; the sequence of the event."""
    made = service.pat()
    seq: int = service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json={"reason": "admin"})["ledger_seq"]
    return seq


def attempts(service: Service, made: dict[str, Any]) -> list[dict[str, Any]]:
    return list(service.items(f"/v1/webhooks/{made['webhook_id']}/deliveries"))


def test_revocation_is_delivered_signed_and_to_the_byte(hooked: Service) -> None:
    with Receiver() as receiver, registered(hooked, receiver, webhook_name="mine") as made:
        seq = revoke(hooked)
        until(lambda: receiver.received, seconds=SECONDS)
        received = receiver.received[0]
        assert signed_by(received, made["secret"])
        assert received.headers["content-type"] == "application/cloudevents+json"
        assert received.path == made["url"].removeprefix(receiver.url(""))
        assert received.id.startswith("rev_")
        assert received.id.endswith(f"_{seq}")
        assert (received.event["id"], received.event["type"]) == (str(seq), "token-ledger.token.revoked.v1")
        assert received.event["data"]["ledger_seq"] == seq
        logged = until(lambda: attempts(hooked, made), seconds=SECONDS)
        assert len(logged) == 1
        assert logged[0] | {"at": "", "seconds": 0} == {
            "message_id": received.id,
            "ledger_seq": seq,
            "number": 1,
            "at": "",
            "outcome": "delivered",
            "status": 204,
            "seconds": 0,
        }
        seen = hooked.done("GET", f"/v1/webhooks/{made['webhook_id']}")
        assert (seen["url"], seen["pending"], seen["enabled"]) == (made["url"], 0, True)
        assert "secret" not in seen
