"""Commands about webhooks: register, change, remove, try. What may be is decided in `rules/webhooks.py`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any
from weakref import WeakValueDictionary

from msgspec import Struct
from msgspec.structs import replace

from events.errors import Conflict, LedgerError
from events.ledger import Append, Ledger
from events.types import WebhookChanged, WebhookMetadata, WebhookRegistered, WebhookRemoved
from service.caller import Caller
from service.commands import Prepared, execute, refused, subject
from service.errors import InvalidRequest, NotFound, ServiceError, TooManyRequests, Unavailable
from service.feed import CursorTooOld
from service.grants import stamp
from service.registry import Asker
from service.rules.grants import Stamp, head
from service.rules.webhooks import (
    DisabledReason,
    Sealed,
    State,
    WebhookSecret,
    changed,
    check_cursor,
    check_filters,
    check_owned,
    check_room,
    disabled,
    redelivering,
    rotated,
)
from service.runtime import Runtime
from service.settings import Settings
from service.tokens import is_id, new_id, now
from service.webhooks import consumers
from service.webhooks.addresses import Guard, NotCallable, NotResolved, Target, parse
from service.webhooks.messages import CONTENT_TYPE, test_message
from service.webhooks.sender import Answer, Line, trusted_certificates
from service.webhooks.signatures import new_secret, signed_headers
from service.webhooks.store import Webhook, WebhookStore, webhook_of

_TESTS_AT_ONCE_MAX = 4
_registering: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
_testing: set[str] = set()  # whose tests are running


class Sealing(Struct, frozen=True):
    """What one command has sealed, as webhook and event: of all its attempts at most one comes into force."""

    keys: list[tuple[str, str]] = []


class NewWebhook(Struct, frozen=True, kw_only=True):
    """`after`: deliver what was announced after this position of the ledger; None for what comes from now on."""

    url: str
    webhook_name: str | None
    client_id: str | None
    subject: str | None
    grant_id: str | None
    after: int | None


@functools.lru_cache(maxsize=4)
def _guard(settings: Settings) -> Guard:
    return Guard(settings.webhook_allowed_networks, settings.webhook_ports)


_tls = functools.lru_cache(maxsize=1)(trusted_certificates)


def store_of(runtime: Runtime) -> WebhookStore:
    return WebhookStore(runtime.nc, runtime.ledger, runtime.master)


async def check_url(runtime: Runtime, url: str, owner: str) -> Target:
    """The target, if it may be called now, and it is looked at again with every call. Raises: InvalidRequest."""
    try:
        target = parse(url)
        await _guard(runtime.settings).addresses(target, owner)
    except NotCallable as error:
        raise InvalidRequest(str(error), fix=error.fix) from None
    except NotResolved as error:
        raise InvalidRequest(str(error), fix="correct the host in url, or register it when its name is known") from None
    return target


async def find(runtime: Runtime, caller: Caller, webhook_id: str) -> Webhook:
    """Raises: NotFound, Unavailable."""
    found = None
    if is_id(webhook_id, "whk"):
        try:
            found = await store_of(runtime).get(webhook_id)
        except LedgerError as error:
            raise refused(error) from error
    check_owned(caller, found.metadata if found is not None else None)
    if found is None:
        raise NotFound("there is no such webhook")
    return found


async def url_of(runtime: Runtime, webhook: Webhook) -> str:
    """Raises: Unavailable."""
    try:
        return (await store_of(runtime).open(webhook)).url
    except LedgerError as error:
        raise refused(error) from error


async def pending(runtime: Runtime, webhook_id: str) -> int | None:
    """How many announcements are not delivered yet, None if it is not known. Raises: Unavailable."""
    try:
        progress = await consumers.progress(runtime.nc, webhook_id)
    except LedgerError as error:
        raise refused(error) from error
    return progress.pending if progress is not None else None


def registering(owner: str) -> asyncio.Lock:
    """Held while one is registered, so that an owner's are counted one after the other.

    Workers do not wait for each other: two that count at the same time may both find the last place free.
    """
    return _registering.setdefault(owner, asyncio.Lock())


async def prepare(runtime: Runtime, asker: Asker, new: NewWebhook, sealing: Sealing) -> Prepared:
    """A new webhook, and the secret that is shown once. Raises: InvalidRequest, AlreadyExists, LedgerError."""
    assert asker.caller is not None
    filters = {"client_id": new.client_id, "subject": new.subject, "grant_id": new.grant_id}
    check_filters(filters)
    target = await check_url(runtime, new.url, asker.caller.subject)
    store = store_of(runtime)
    check_room(asker.caller.subject, [one.metadata for one in await store.all()])
    end = await runtime.ledger.last_seq()
    if new.after is not None:
        check_cursor(new.after, end)
    mark, webhook_id, secret = stamp(asker.by, asker.request_id), new_id("whk"), new_secret()
    metadata = WebhookMetadata(
        webhook_name=new.webhook_name or webhook_id, owner=asker.caller.subject, origin=target.origin
    )
    metadata = replace(metadata, client_id=new.client_id, subject=new.subject, grant_id=new.grant_id)
    after = end if new.after is None else new.after
    sealed = Sealed(url=new.url, secrets=(WebhookSecret(secret),), after=after, cursor=mark.ids[0])
    await _seal(store, sealing, webhook_id, mark, sealed)
    event = WebhookRegistered(**head(mark), webhook_id=webhook_id, webhook=metadata)
    answer = {"webhook_id": webhook_id, "url": new.url, "secret": secret, **shown(metadata)}
    return Prepared((Append(subject("webhook", webhook_id), event, 0),), answer)


def shown(metadata: WebhookMetadata) -> dict[str, Any]:
    """What is shown of the metadata; absent values are left out."""
    told = {
        "webhook_name": metadata.webhook_name,
        "owner": metadata.owner,
        "origin": metadata.origin,
        "client_id": metadata.client_id,
        "subject": metadata.subject,
        "grant_id": metadata.grant_id,
        "enabled": metadata.disabled_reason is None,
        "disabled_reason": metadata.disabled_reason,
        "secret_rotated_at": metadata.secret_rotated_at,
    }
    return {name: value for name, value in told.items() if value is not None}


async def _seal(store: WebhookStore, sealing: Sealing, webhook_id: str, mark: Stamp, sealed: Sealed) -> None:
    sealing.keys.append((webhook_id, mark.ids[0]))
    await store.seal(webhook_id, mark.ids[0], sealed)


async def _next(
    store: WebhookStore, sealing: Sealing, webhook: Webhook, mark: Stamp, edit: Callable[[State], State]
) -> list[Append]:
    """Seals what `edit` makes of the webhook, and returns the event that puts it into force, if it changes anything.

    Raises: LedgerError; what `edit` raises.
    """
    before = State(webhook.metadata, await store.open(webhook))
    after = edit(before)
    if after == before:
        return []
    await _seal(store, sealing, webhook.webhook_id, mark, after.sealed)
    event = WebhookChanged(**head(mark), webhook_id=webhook.webhook_id, webhook=after.metadata)
    return [Append(subject("webhook", webhook.webhook_id), event, webhook.seq)]


async def _change(
    runtime: Runtime, asker: Asker, webhook_id: str, edit: Callable[[State, Stamp], State]
) -> tuple[Webhook, int]:
    """Executes; returns what then holds and the sequence of its last event. Raises: NotFound, Unavailable."""
    assert asker.caller is not None
    caller, store, sealing = asker.caller, store_of(runtime), Sealing()

    async def load(_: bool) -> tuple[Webhook, list[Append]]:
        await _discard(store, sealing)
        webhook, mark = await find(runtime, caller, webhook_id), stamp(asker.by, asker.request_id)
        return webhook, await _next(store, sealing, webhook, mark, lambda state: edit(state, mark))

    outcome = await execute(runtime, load, lambda loaded: loaded[1])
    before = outcome.state[0]
    if not outcome.seqs:
        return before, before.seq
    await _settle(store, sealing, webhook_id, outcome.entries[-1].event.id)
    await runtime.applied(outcome.seq)
    return await find(runtime, caller, webhook_id), outcome.seq


async def change(runtime: Runtime, asker: Asker, webhook_id: str, changes: Mapping[str, Any]) -> tuple[Webhook, int]:
    """Raises: NotFound, InvalidRequest, Unavailable."""
    assert asker.caller is not None
    await find(runtime, asker.caller, webhook_id)  # who has no webhook learns nothing of names
    url = changes.get("url")
    origin = (await check_url(runtime, url, asker.caller.subject)).origin if url is not None else None
    return await _change(runtime, asker, webhook_id, lambda state, _: changed(state, changes, origin))


async def prepare_secret(
    runtime: Runtime, asker: Asker, webhook_id: str, overlap_seconds: int, sealing: Sealing
) -> Prepared:
    """A new secret, shown once. Raises: NotFound, LedgerError."""
    assert asker.caller is not None
    store = store_of(runtime)
    await _discard(store, sealing)
    webhook = await find(runtime, asker.caller, webhook_id)
    mark, secret = stamp(asker.by, asker.request_id), new_secret()
    entries = await _next(store, sealing, webhook, mark, lambda state: rotated(state, secret, overlap_seconds, mark.at))
    ends_at = mark.at + timedelta(seconds=overlap_seconds)
    return Prepared(tuple(entries), {"webhook_id": webhook_id, "secret": secret, "previous_ends_at": ends_at})


async def settled(runtime: Runtime, sealing: Sealing, create: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    """The answer of what was prepared; what it put out of force, or what never came into force, is then destroyed.

    Raises: what `create` raises.
    """
    store = store_of(runtime)
    try:
        answer = await create
    except Unavailable:  # whether it was recorded, or will be when it is repeated, is not known
        raise
    except ServiceError:
        with contextlib.suppress(LedgerError):
            await _discard(store, sealing)
        raise
    with contextlib.suppress(LedgerError):  # as in _settle
        recorded = await runtime.ledger.get(answer["ledger_seq"])
        webhook = webhook_of(recorded) if recorded is not None else None
        if webhook is not None:
            await _settle(store, sealing, webhook.webhook_id, webhook.event_id)
    return answer


async def _settle(store: WebhookStore, sealing: Sealing, webhook_id: str, event_id: str) -> None:
    """Destroys what this event has put out of force, and what the command sealed besides."""
    with contextlib.suppress(LedgerError):  # what is left goes with the next change
        await _discard(store, sealing, (webhook_id, event_id))
        await store.destroy_before(webhook_id, event_id)


async def _discard(store: WebhookStore, sealing: Sealing, in_force: tuple[str, str] | None = None) -> None:
    """Destroys what a command sealed for events that lost against others. Raises: LedgerUnavailable."""
    for key in sealing.keys:
        if key != in_force:
            await store.destroy(*key)
    sealing.keys.clear()


async def redeliver(runtime: Runtime, asker: Asker, webhook_id: str, after: int) -> tuple[bool, int]:
    """Delivers again what was announced after a position of the ledger.

    Returns whether some of that was dropped already, which the webhook is told first, and the event's sequence.

    Raises: NotFound, InvalidRequest, Unavailable.
    """
    try:
        check_cursor(after, await runtime.ledger.last_seq())
        await runtime.feed.stream_seq_after(after)
        complete = True
    except CursorTooOld:
        complete = False
    except LedgerError as error:
        raise refused(error) from error
    _, seq = await _change(
        runtime, asker, webhook_id, lambda state, mark: redelivering(state, after, cursor=mark.ids[0])
    )
    return complete, seq


async def remove(runtime: Runtime, asker: Asker, webhook_id: str) -> int:
    """For good; what it was is still in the ledger, its URL and secrets are nowhere. Raises: NotFound, Unavailable."""
    assert asker.caller is not None
    caller, store = asker.caller, store_of(runtime)
    mark = stamp(asker.by, asker.request_id)
    event = WebhookRemoved(**head(mark), webhook_id=webhook_id)

    async def load(_: bool) -> Webhook:
        return await find(runtime, caller, webhook_id)

    outcome = await execute(runtime, load, lambda webhook: [Append(subject("webhook", webhook_id), event, webhook.seq)])
    try:
        await store.destroy_all(webhook_id)
        await consumers.delete(runtime.nc, webhook_id)
    except LedgerError as error:
        raise refused(error) from error
    await runtime.applied(outcome.seq)
    return outcome.seq


async def try_out(runtime: Runtime, caller: Caller, webhook_id: str) -> Answer:
    """Sends a signed test message, once, whether the webhook is enabled or not.

    Raises: NotFound, TooManyRequests, Unavailable.
    """
    webhook = await find(runtime, caller, webhook_id)
    if caller.subject in _testing:
        raise TooManyRequests("another test of yours is running", headers={"Retry-After": "15"})
    if len(_testing) >= _TESTS_AT_ONCE_MAX:
        raise TooManyRequests(f"{len(_testing)} tests of webhooks are running", headers={"Retry-After": "15"})
    _testing.add(caller.subject)
    try:
        try:
            sealed = await store_of(runtime).open(webhook)
        except LedgerError as error:
            raise refused(error) from error
        at = now()
        message = test_message(webhook_id, runtime.settings.issuer)
        headers = {
            "content-type": CONTENT_TYPE,
            **signed_headers(sealed.signing(at), message.id, int(at.timestamp()), message.body),
        }
        line = Line(_guard(runtime.settings), _tls(), webhook.metadata.owner)
        try:
            return await line.post(parse(sealed.url), headers, message.body)
        finally:
            line.close()
    finally:
        _testing.discard(caller.subject)


async def disable(ledger: Ledger, store: WebhookStore, webhook: Webhook, reason: DisabledReason) -> bool:
    """By the service itself. False if somebody has changed the webhook meanwhile. Raises: LedgerError."""
    mark, sealing = stamp("system", None), Sealing()
    entries = await _next(store, sealing, webhook, mark, lambda state: disabled(state, reason))
    try:
        await ledger.append(*entries)
    except Conflict:
        await _discard(store, sealing)
        return False
    await _settle(store, sealing, webhook.webhook_id, mark.ids[0])
    return True
