"""Commands about webhooks."""

from __future__ import annotations

import sys
from typing import Any

import click

from service.cli import output as out
from service.cli.options import Duration, Session, asks_service, confirmed, paged, repeatable, segment

COLUMNS = ("webhook_id", "webhook_name", "origin", "enabled", "disabled_reason", "owner", "created_at")
ATTEMPT_COLUMNS = ("at", "message_id", "number", "outcome", "status", "error", "seconds", "next_at")


@click.group()
def webhook() -> None:
    """Revocations sent to a URL."""


@webhook.command("create")
@click.argument("receiver", metavar="URL")
@click.option("--name", "webhook_name", help="As it is listed. [default: its id]")
@click.option("--client-id", help="Only what could concern this client.")
@click.option("--subject", help="Only what could concern this subject.")
@click.option("--grant-id", help="Only what could concern this grant.")
@click.option("--after", type=int, help="Deliver what was announced after this ledger_seq. [default: now]")
@repeatable
@asks_service
def webhook_create(session: Session, receiver: str, idempotency_key: str | None, **fields: Any) -> None:
    """Register a webhook and print the secret that signs what is sent, once."""
    answer = session.call("POST", "/v1/webhooks", {"url": receiver} | fields, idempotency_key=idempotency_key)
    session.show(answer, once="secret")


@webhook.command("list")
@paged
@asks_service
def webhook_list(session: Session, paging: dict[str, Any]) -> None:
    """All webhooks that the token may see."""
    session.show_list("/v1/webhooks", {}, COLUMNS, paging)


def _path(webhook_id: str, rest: str = "") -> str:
    return f"/v1/webhooks/{segment(webhook_id)}{rest}"


@webhook.command("show")
@click.argument("webhook_id")
@asks_service
def webhook_show(session: Session, webhook_id: str) -> None:
    """One webhook, and how much waits for it."""
    session.show(session.call("GET", _path(webhook_id)))


@webhook.command("rotate-secret")
@click.argument("webhook_id")
@click.option("--overlap", "overlap_seconds", type=Duration(), help="How long the old secret signs as well.")
@repeatable
@asks_service
def webhook_rotate_secret(
    session: Session, webhook_id: str, overlap_seconds: int | None, idempotency_key: str | None
) -> None:
    """Give a webhook a new secret and print it, once."""
    body = {"overlap_seconds": overlap_seconds}
    answer = session.call("POST", _path(webhook_id, "/secrets"), body, idempotency_key=idempotency_key)
    session.show(answer, once="secret")


@webhook.command("enable")
@click.argument("webhook_id")
@asks_service
def webhook_enable(session: Session, webhook_id: str) -> None:
    """Go on delivering where it stopped."""
    session.show(session.call("PATCH", _path(webhook_id), {"enabled": True}))


@webhook.command("disable")
@click.argument("webhook_id")
@asks_service
def webhook_disable(session: Session, webhook_id: str) -> None:
    """Deliver nothing until it is enabled again."""
    session.show(session.call("PATCH", _path(webhook_id), {"enabled": False}))


@webhook.command("delete")
@click.argument("webhook_id")
@asks_service
@confirmed
def webhook_delete(session: Session, webhook_id: str) -> None:
    """Remove a webhook, for good."""
    session.show(session.call("DELETE", _path(webhook_id)))


@webhook.command("deliveries")
@click.argument("webhook_id")
@paged
@asks_service
def webhook_deliveries(session: Session, webhook_id: str, paging: dict[str, Any]) -> None:
    """What was tried, the newest first."""
    session.show_list(_path(webhook_id, "/deliveries"), {}, ATTEMPT_COLUMNS, paging)


@webhook.command("redeliver")
@click.argument("webhook_id")
@click.option("--after", type=int, required=True, help="A ledger_seq: what was announced after it.")
@asks_service
def webhook_redeliver(session: Session, webhook_id: str, after: int) -> None:
    """Deliver again what was announced after a position of the ledger."""
    session.show(session.call("POST", _path(webhook_id, "/redeliveries"), {"after": after}))


@webhook.command("test")
@click.argument("webhook_id")
@asks_service
def webhook_test(session: Session, webhook_id: str) -> None:
    """Send a signed test message and show what came back."""
    answer = session.call("POST", _path(webhook_id, "/test"))
    session.show(answer)
    if answer["outcome"] != "delivered":
        sys.exit(out.REFUSED)
