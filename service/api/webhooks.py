"""`/v1/webhooks`: revocations sent to a URL, signed as Standard Webhooks has it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from events.errors import LedgerError
from service.api.routing import Call, Nothing, operation
from service.api.wire import Id, Overlap, Page, Seq, cursor_of, page, position_of
from service.commands import refused
from service.rules.webhooks import DisabledReason, may_manage
from service.webhooks import commands
from service.webhooks.addresses import URL_CHARS_MAX
from service.webhooks.attempts import Attempt, attempts
from service.webhooks.sender import Outcome
from service.webhooks.store import Webhook

NEEDS = ("ledger:subscribe", "ledger:admin")
_LIST = "webhooks"

Name = Annotated[str, Meta(min_length=1, max_length=200)]
Url = Annotated[str, Meta(min_length=1, max_length=URL_CHARS_MAX, description="https://; shown to its owner only.")]
After = Annotated[int, Meta(ge=0, le=2**62, description="A ledger_seq: what was announced after it is delivered.")]


class NewWebhook(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`client_id`, `subject`, `grant_id`: only what could concern these. `after` left out: from now on."""

    url: Url
    webhook_name: Name | UnsetType = UNSET
    client_id: Id | UnsetType = UNSET
    subject: Id | UnsetType = UNSET
    grant_id: Id | UnsetType = UNSET
    after: After | UnsetType = UNSET


class WebhookPatch(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A merge patch (RFC 7396): what is left out stays, null takes a filter away."""

    url: Url | UnsetType = UNSET
    webhook_name: Name | UnsetType = UNSET
    client_id: Id | UnsetType | None = UNSET
    subject: Id | UnsetType | None = UNSET
    grant_id: Id | UnsetType | None = UNSET
    enabled: bool | UnsetType = UNSET


class WebhookView(Struct, frozen=True, kw_only=True):
    """A webhook. `url` and `pending`, the announcements that are not delivered yet, are told of a single one.

    `disabled_reason`: `asked` for, the receiver said that it is `gone`, it was `failing` for too long, or
    `owner_disabled`.
    """

    webhook_id: str
    webhook_name: str
    owner: str
    origin: str
    url: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    subject: str | UnsetType = UNSET
    grant_id: str | UnsetType = UNSET
    enabled: bool
    disabled_reason: DisabledReason | UnsetType = UNSET
    secret_rotated_at: datetime | UnsetType = UNSET
    created_at: datetime
    changed_at: datetime
    pending: int | UnsetType = UNSET
    ledger_seq: Seq


class WebhookList(Struct, frozen=True):
    items: list[WebhookView]
    next_cursor: str | UnsetType = UNSET


class WebhookCreated(Struct, frozen=True, kw_only=True):
    """`secret` signs what is sent, and is never shown again."""

    webhook_id: str
    url: str
    secret: str
    webhook_name: str
    owner: str
    origin: str
    client_id: str | UnsetType = UNSET
    subject: str | UnsetType = UNSET
    grant_id: str | UnsetType = UNSET
    enabled: bool
    ledger_seq: Seq


class NewWebhookSecret(Struct, frozen=True, forbid_unknown_fields=True):
    overlap_seconds: Overlap = 0


class WebhookSecretCreated(Struct, frozen=True, kw_only=True):
    """`secret` is never shown again. Until `previous_ends_at` the one before signs as well."""

    webhook_id: str
    secret: str
    previous_ends_at: datetime
    ledger_seq: Seq


class WebhookRemoved(Struct, frozen=True, kw_only=True):
    webhook_id: str
    ledger_seq: Seq


class Redelivery(Struct, frozen=True, forbid_unknown_fields=True):
    after: After


class RedeliveryBegun(Struct, frozen=True, kw_only=True):
    """`snapshot_required`: some of what was asked for was dropped; the receiver is told so first."""

    webhook_id: str
    after: int
    snapshot_required: bool
    ledger_seq: Seq


class Tried(Struct, frozen=True, kw_only=True):
    """What came of a test message. `status` is absent when there was no answer; `error` says why."""

    outcome: Outcome
    status: int | UnsetType = UNSET
    error: str | UnsetType = UNSET
    seconds: float


class AttemptView(Struct, frozen=True, kw_only=True):
    """One attempt. `message_id` was sent as `webhook-id`; `next_at`: when it was to be tried again."""

    message_id: str
    ledger_seq: int | UnsetType = UNSET
    number: int
    at: datetime
    outcome: Outcome
    status: int | UnsetType = UNSET
    error: str | UnsetType = UNSET
    seconds: float
    next_at: datetime | UnsetType = UNSET
    failing_since: datetime | UnsetType = UNSET


class AttemptList(Struct, frozen=True):
    items: list[AttemptView]
    next_cursor: str | UnsetType = UNSET


def _view(webhook: Webhook, **more: Any) -> WebhookView:
    return msgspec.convert(
        {
            "webhook_id": webhook.webhook_id,
            **commands.shown(webhook.metadata),
            "created_at": webhook.created_at,
            "changed_at": webhook.changed_at,
            "ledger_seq": webhook.seq,
            **{name: value for name, value in more.items() if value is not None},
        },
        WebhookView,
    )


async def _one(call: Call[Any, Any], webhook: Webhook) -> WebhookView:
    url = await commands.url_of(call.runtime, webhook)
    return _view(webhook, url=url, pending=await commands.pending(call.runtime, webhook.webhook_id))


@operation(
    "POST",
    "/v1/webhooks",
    tag="webhooks",
    needs=NEEDS,
    body=NewWebhook,
    answer=WebhookCreated,
    status=201,
    creates=True,
    errors=(409,),
)
async def create_webhook(call: Call[NewWebhook, Nothing]) -> dict[str, Any]:
    """Register a webhook.

    Revocations are sent to `url` by POST as CloudEvents, signed with the secret that is answered here once. The URL
    must be https and its host public.
    """
    body = call.body
    filters = {name: getattr(body, name) or None for name in ("client_id", "subject", "grant_id")}
    new = commands.NewWebhook(
        url=body.url,
        webhook_name=body.webhook_name or None,
        after=None if isinstance(body.after, UnsetType) else body.after,
        **filters,
    )
    sealing = commands.Sealing()
    async with commands.registering(call.caller.subject):
        create = call.create(lambda _: commands.prepare(call.runtime, call.asker, new, sealing))
        return await commands.settled(call.runtime, sealing, create)


@operation("GET", "/v1/webhooks", tag="webhooks", needs=NEEDS, query=Page, answer=WebhookList)
async def list_webhooks(call: Call[None, Page]) -> dict[str, Any]:
    """List webhooks, the oldest first: the caller's own, or all for `ledger:admin`."""
    after, limit = position_of(call.query.cursor, _LIST).decode(), call.query.limit
    try:
        found = await commands.store_of(call.runtime).all()
    except LedgerError as error:
        raise refused(error) from error
    shown = [one for one in found if one.webhook_id > after and may_manage(call.caller, one.metadata)]
    items = [_view(one) for one in shown[:limit]]
    return page(items, cursor_of(_LIST, items[-1].webhook_id.encode()) if len(shown) > limit else None)


@operation("GET", "/v1/webhooks/{webhook_id}", tag="webhooks", needs=NEEDS, answer=WebhookView, errors=(404,))
async def show_webhook(call: Call[None, Nothing]) -> WebhookView:
    """Show a webhook, and how much waits for it."""
    return await _one(call, await commands.find(call.runtime, call.caller, call.name))


@operation(
    "PATCH",
    "/v1/webhooks/{webhook_id}",
    tag="webhooks",
    needs=NEEDS,
    body=WebhookPatch,
    answer=WebhookView,
    errors=(404,),
)
async def patch_webhook(call: Call[WebhookPatch, Nothing]) -> WebhookView:
    """Change a webhook.

    Disabled, it loses nothing: enabled again, it goes on where it stopped.
    """
    body = call.body
    members = {name: getattr(body, name) for name in body.__struct_fields__}
    changes = {name: value for name, value in members.items() if value is not UNSET}
    webhook, _ = await commands.change(call.runtime, call.asker, call.name, changes)
    return await _one(call, webhook)


@operation("DELETE", "/v1/webhooks/{webhook_id}", tag="webhooks", needs=NEEDS, answer=WebhookRemoved, errors=(404,))
async def delete_webhook(call: Call[None, Nothing]) -> WebhookRemoved:
    """Remove a webhook, for good."""
    return WebhookRemoved(webhook_id=call.name, ledger_seq=await commands.remove(call.runtime, call.asker, call.name))


@operation(
    "POST",
    "/v1/webhooks/{webhook_id}/secrets",
    tag="webhooks",
    needs=NEEDS,
    body=NewWebhookSecret,
    body_optional=True,
    answer=WebhookSecretCreated,
    status=201,
    creates=True,
    errors=(404,),
)
async def create_webhook_secret(call: Call[NewWebhookSecret, Nothing]) -> dict[str, Any]:
    """Give a webhook a new secret.

    Until the overlap ends the one before signs as well, so that the receiver can change over.
    """
    overlap, sealing = call.body.overlap_seconds, commands.Sealing()
    create = call.create(lambda _: commands.prepare_secret(call.runtime, call.asker, call.name, overlap, sealing))
    return await commands.settled(call.runtime, sealing, create)


@operation(
    "POST",
    "/v1/webhooks/{webhook_id}/redeliveries",
    tag="webhooks",
    needs=NEEDS,
    body=Redelivery,
    answer=RedeliveryBegun,
    errors=(404,),
)
async def redeliver(call: Call[Redelivery, Nothing]) -> RedeliveryBegun:
    """Deliver again what was announced after a position of the ledger."""
    after = call.body.after
    complete, seq = await commands.redeliver(call.runtime, call.asker, call.name, after)
    return RedeliveryBegun(webhook_id=call.name, after=after, snapshot_required=not complete, ledger_seq=seq)


@operation(
    "POST",
    "/v1/webhooks/{webhook_id}/test",
    tag="webhooks",
    needs=NEEDS,
    answer=Tried,
    errors=(404, 429),
)
async def test_webhook(call: Call[None, Nothing]) -> Tried:
    """Send a signed test message and say what came back."""
    answer = await commands.try_out(call.runtime, call.caller, call.name)
    return Tried(
        outcome=answer.outcome,
        status=answer.status if answer.status is not None else UNSET,
        error=answer.error or UNSET,
        seconds=round(answer.seconds, 4),
    )


@operation(
    "GET",
    "/v1/webhooks/{webhook_id}/deliveries",
    tag="webhooks",
    needs=NEEDS,
    query=Page,
    answer=AttemptList,
    errors=(404,),
)
async def list_deliveries(call: Call[None, Page]) -> dict[str, Any]:
    """List what was tried for a webhook, the newest first."""
    await commands.find(call.runtime, call.caller, call.name)
    of, limit = f"deliveries {call.name}", call.query.limit
    before = int.from_bytes(position_of(call.query.cursor, of), "big") or None
    try:
        found = await attempts(call.runtime.nc, call.name, before=before, limit=limit + 1)
    except LedgerError as error:
        raise refused(error) from error
    items = [_attempt(one) for _, one in found[:limit]]
    return page(items, cursor_of(of, found[limit - 1][0].to_bytes(8, "big")) if len(found) > limit else None)


def _attempt(one: Attempt) -> AttemptView:
    members = {name: getattr(one, name) for name in one.__struct_fields__}
    return AttemptView(**{name: value for name, value in members.items() if value not in (None, "")})
