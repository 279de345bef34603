"""Whether a revocation has reached everybody who follows the feed: who applied it, when, and who has not.

The ledger says who was registered when it was recorded, `project receipts` who has acknowledged it since. Whoever
was registered later began with what was revoked already, and is not concerned; nor is who was removed since, or whose
webhook is about something else.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import structlog
from msgspec import UNSET, Struct, UnsetType

from events.errors import LedgerError
from events.types import Recorded, WebhookMetadata
from projections.asking_receipts import (
    WAIT_SECONDS_MAX,
    Follower,
    FollowerStanding,
    ReceiptsAnswer,
    ReceiptsRequest,
    ReceiptsUnavailable,
    ask_receipts,
)
from projections.revocations import Known, revocation
from service.caller import Caller
from service.commands import refused
from service.errors import NotFound, ServiceError
from service.feed import Filters, matches
from service.runtime import Runtime

log = structlog.get_logger()

_ASK_AGAIN_SECONDS = 0.1
_ANNOUNCED_SECONDS_MAX = 1.0
_STANDINGS_SECONDS_MAX = 1.0
_NO_FILTERS = Filters()
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class FollowerReached(Struct, frozen=True, kw_only=True):
    """A follower of the feed and a revocation. `applied_at`: when it said so; left out when that is long ago.

    `after_ms`: from when the revocation was recorded until then, by the clocks of the hosts that noted the two.
    `silent`: nothing was heard of it for longer than `follower_silent_seconds_max`.
    """

    id: str
    name: str
    transport: Literal["nats", "http", "webhook"]
    state: Literal["applied", "pending"]
    applied_at: datetime | UnsetType = UNSET
    after_ms: float | UnsetType = UNSET
    acknowledged_seq: int | UnsetType = UNSET
    last_seen_at: datetime | UnsetType = UNSET
    silent: bool = False


class Propagation(Struct, frozen=True, kw_only=True):
    """Who has applied a revocation, of those who were registered when it was recorded and still are.

    `announced_at` is left out when that is long ago.
    `complete`: it was announced, and nobody is `pending`. `unknown` says why nothing is known of the followers, if so:
    then nobody is counted as having applied it. The revocation holds in any case.
    """

    ledger_seq: int
    revoked_at: datetime | UnsetType = UNSET
    announced_at: datetime | UnsetType = UNSET
    followers: list[FollowerReached]
    applied: int
    pending: int
    last_applied_at: datetime | UnsetType = UNSET
    complete: bool
    unknown: str | UnsetType = UNSET


async def propagation_of(
    runtime: Runtime, caller: Caller, ledger_seq: int, *, wait_seconds: float = 0.0
) -> Propagation:
    """As it stands; with `wait_seconds` as soon as it is complete, or after that time.

    Who neither revokes nor audits is told of its own followers.

    Raises: NotFound if no revocation is recorded at `ledger_seq`; Unavailable if the ledger cannot be asked.
    """
    deadline = time.monotonic() + wait_seconds
    try:
        recorded = await runtime.ledger.get(ledger_seq) if ledger_seq > 0 else None
        registered = await runtime.registered.followers()
    except LedgerError as error:
        raise refused(error) from error
    told = revocation(recorded, Known()) if recorded is not None else None
    if recorded is None or told is None:
        raise NotFound(
            f"no revocation is recorded at ledger_seq {ledger_seq}",
            fix="a revocation's answer names its ledger_seq; `token-ledger audit events` lists what is recorded",
        )
    revoked = _Revocation(recorded, told[1].revoked_at)
    concerned = [one for one in registered if one.registered_seq < ledger_seq and one.followed]
    if not (caller.holds("ledger:revoke") or caller.holds("ledger:audit")):
        concerned = [one for one in concerned if one.owner in (caller.subject, caller.client_id)]
    concerned = await _concerned(runtime, ledger_seq, concerned)
    while True:
        left = max(0.0, deadline - time.monotonic())
        try:
            found = _found(revoked, concerned, await _ask(runtime, ledger_seq, concerned, left))
        except ReceiptsUnavailable as error:
            found = _found(revoked, concerned, None, f"{error}; {error.fix}")
        if found.complete or not left or runtime.stopping.is_set():
            return found
        # Who keeps the receipts lets only so many wait, and answers the others at once.
        await asyncio.sleep(min(left, _ASK_AGAIN_SECONDS))


class _Revocation(Struct, frozen=True):
    recorded: Recorded
    revoked_at: datetime


async def _ask(runtime: Runtime, ledger_seq: int, concerned: list[Follower], seconds: float) -> ReceiptsAnswer:
    """Raises: ReceiptsUnavailable."""
    awaited = tuple(follower.id for follower in concerned)
    wait = min(seconds, WAIT_SECONDS_MAX)
    answer = await ask_receipts(
        runtime.nc, ReceiptsRequest(ledger_seq=ledger_seq, followers=awaited, wait_seconds=wait)
    )
    if not answer.complete:
        raise ReceiptsUnavailable("the process that keeps the receipts is still reading them")
    return answer


async def _concerned(runtime: Runtime, ledger_seq: int, followers: list[Follower]) -> list[Follower]:
    """Without webhooks that are about something else than what the announcement names."""
    filters = {one.id: _filters(one.webhook) for one in followers if one.webhook is not None}
    if all(one == _NO_FILTERS for one in filters.values()):
        return followers
    try:
        await runtime.feed.start()
        await runtime.feed.wait(ledger_seq - 1, _ANNOUNCED_SECONDS_MAX)
        page = await runtime.feed.read(ledger_seq - 1, 1)
    except ServiceError:  # it could concern anybody
        return followers
    if not page.entries or page.entries[0].ledger_seq != ledger_seq:
        return followers
    told = page.entries[0].revocation
    return [one for one in followers if matches(told, filters.get(one.id, _NO_FILTERS))]


def _filters(webhook: WebhookMetadata) -> Filters:
    return Filters(
        client_id=webhook.client_id or UNSET,
        subject=webhook.subject or UNSET,
        grant_id=webhook.grant_id or UNSET,
    )


def _found(
    revoked: _Revocation, concerned: list[Follower], answer: ReceiptsAnswer | None, unknown: str = ""
) -> Propagation:
    standings = {standing.follower: standing for standing in answer.followers} if answer is not None else {}
    recorded = revoked.recorded
    followers = [_reached(recorded.recorded_at, follower, standings.get(follower.id)) for follower in concerned]
    applied = [follower for follower in followers if follower.state == "applied"]
    times = [follower.applied_at for follower in applied if not isinstance(follower.applied_at, UnsetType)]
    announced = answer is not None and recorded.seq <= answer.announced_seq
    return Propagation(
        ledger_seq=recorded.seq,
        revoked_at=revoked.revoked_at,
        announced_at=_moment(answer.announced_at_us if answer is not None else None),
        followers=followers,
        applied=len(applied),
        pending=len(followers) - len(applied),
        last_applied_at=max(times, default=UNSET),
        complete=announced and len(applied) == len(followers),
        unknown=unknown or UNSET,
    )


def _reached(recorded_at: datetime, follower: Follower, standing: FollowerStanding | None) -> FollowerReached:
    if standing is None:
        standing = FollowerStanding(follower=follower.id)
    applied_at = _moment(standing.applied_at_us)
    after = UNSET if isinstance(applied_at, UnsetType) else (applied_at - recorded_at) / timedelta(milliseconds=1)
    return FollowerReached(
        id=follower.id,
        name=follower.name,
        transport=follower.transport,
        state="applied" if standing.applied else "pending",
        applied_at=applied_at,
        after_ms=after,
        acknowledged_seq=UNSET if standing.acknowledged_seq is None else standing.acknowledged_seq,
        last_seen_at=_moment(standing.last_seen_at_us),
        silent=standing.silent_since_us is not None,
    )


def _moment(us: int | None) -> datetime | UnsetType:
    return UNSET if us is None else _EPOCH + timedelta(microseconds=us)


async def propagation_after(runtime: Runtime, caller: Caller, ledger_seq: int, wait_seconds: float) -> Propagation:
    """The same for a revocation that was made just now, which no failure to tell may hide."""
    try:
        return await propagation_of(runtime, caller, ledger_seq, wait_seconds=wait_seconds)
    except ServiceError as error:
        return Propagation(
            ledger_seq=ledger_seq,
            followers=[],
            applied=0,
            pending=0,
            complete=False,
            unknown=error.detail,
        )


async def acknowledge(runtime: Runtime, follower: str, ledger_seq: int, feed: str | UnsetType = UNSET) -> int:
    """A follower over HTTP has applied everything up to `ledger_seq`. Waits for no disk.

    Answers up to where that is recorded: as far as it is announced.

    Raises: FeedChanged if the log does not reach as far, or `feed` is another one; Unavailable.
    """
    await runtime.feed.check_feed(feed)
    announced = await runtime.feed.announced_of(ledger_seq)
    runtime.signs_of_life.heard(follower)
    runtime.receipts.record(follower, announced, feed=runtime.feed.position.feed)
    return announced


def standing_told(standing: FollowerStanding) -> dict[str, Any]:
    """What a follower's view says of where it stands: members of `SubscriberView`."""
    acknowledged = UNSET if standing.acknowledged_seq is None else standing.acknowledged_seq
    return {
        "acknowledged_seq": acknowledged,
        "pending": standing.pending,
        "last_seen_at": _moment(standing.last_seen_at_us),
        "silent": standing.silent_since_us is not None,
    }


async def standings(runtime: Runtime) -> dict[str, FollowerStanding]:
    """Where each follower stands; empty if nobody says, which the log does then."""
    try:
        answer = await ask_receipts(runtime.nc, ReceiptsRequest(), seconds=_STANDINGS_SECONDS_MAX)
    except ReceiptsUnavailable as error:
        log.warning("receipts_not_known", why=str(error))
        return {}
    return {one.follower: one for one in answer.followers} if answer.complete else {}
