"""Whether the process lives, whether it can answer, and what it counts."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from events.errors import LedgerUnavailable
from projections.asking import AnalyticsRefused, StatusAnswer, StatusRequest, ask
from projections.asking_findings import EngineAnswer, EngineRequest
from projections.asking_receipts import ReceiptsAnswer, ReceiptsRequest, ReceiptsUnavailable, ask_receipts
from projections.revocations import FeedPosition
from service import metrics
from service.api.routing import GetRuntime
from service.errors import ServiceError
from service.feed import ask_position
from service.incoming import Incoming
from service.outgoing import NO_STORE, Response
from service.runtime import Runtime
from service.webhooks.status import ask_all

_ANALYTICS_SECONDS_MAX = 0.5
_FEED_SECONDS_MAX = 0.5
_FAR_BEHIND = 1_000  # messages; less is on its way


class Live(Struct, frozen=True):
    """The process answers."""

    status: Literal["alive"] = "alive"


class Check(Struct, frozen=True, kw_only=True):
    """One thing that readiness looks at. `needed`: it is not ready without."""

    ok: bool
    needed: bool
    detail: str
    age_seconds: float | UnsetType = UNSET
    position: int | UnsetType = UNSET
    lag: int | UnsetType = UNSET


class Readiness(Struct, frozen=True, kw_only=True):
    """`degraded`: the log is down and validation is still served, in `buffered` mode, until the view is too old."""

    status: Literal["ready", "degraded", "unready"]
    checks: dict[str, Check]


async def live() -> Response:
    """Say that the process answers."""
    return Response(200, msgspec.json.encode(Live()), NO_STORE)


async def ready(get_runtime: GetRuntime) -> Response:
    """Say whether validation is answered, and what stands in its way."""
    try:
        runtime = get_runtime()
    except ServiceError as error:
        starting = Check(ok=False, needed=True, detail=error.detail)
        return _answer(Readiness(status="unready", checks={"start": starting}))
    feed, analytics, abuse_rules = await asyncio.gather(_feed(runtime), _analytics(runtime), _abuse_rules(runtime))
    checks = {
        "nats": _nats(runtime),
        "view": _view(runtime),
        "signing_key": _signing_key(runtime),
        "feed": feed,
        "analytics": analytics,
        "abuse_rules": abuse_rules,
    }
    missing = {name for name, check in checks.items() if check.needed and not check.ok}
    degraded = missing == {"nats"} and runtime.settings.use_recording == "buffered"
    return _answer(Readiness(status="degraded" if degraded else "unready" if missing else "ready", checks=checks))


def _answer(readiness: Readiness) -> Response:
    return Response(503 if readiness.status == "unready" else 200, msgspec.json.encode(readiness), NO_STORE)


def _nats(runtime: Runtime) -> Check:
    connected = runtime.nc.is_connected
    said = "connected; sync_always was reported at the start" if connected else "the connection is down"
    return Check(ok=connected, needed=True, detail=said)


def _view(runtime: Runtime) -> Check:
    fresh, bound = runtime.view.freshness(), runtime.settings.view_staleness_seconds_max
    said = f"known to be complete {fresh.age_seconds:.1f} s ago; {bound} s are allowed"
    if fresh.age_seconds == float("inf"):
        return Check(ok=False, needed=True, detail="not known to be complete yet", position=fresh.position)
    age = round(fresh.age_seconds, 3)
    return Check(ok=fresh.age_seconds <= bound, needed=True, detail=said, age_seconds=age, position=fresh.position)


def _signing_key(runtime: Runtime) -> Check:
    missing = [alg for alg in runtime.settings.signing_algorithms if runtime.signing_keys.active(alg) is None]
    said = f"there is no active key for {', '.join(missing)}" if missing else "active"
    return Check(ok=not missing, needed=True, detail=said)


async def _feed(runtime: Runtime) -> Check:
    """For information: validation does not need it. Followers see by themselves that it stands still."""
    try:
        told = await ask_position(runtime.nc, _FEED_SECONDS_MAX)
    except LedgerUnavailable as error:
        return Check(ok=False, needed=False, detail=str(error))
    age, bound = told.age_ms / 1000, runtime.settings.view_staleness_seconds_max
    said = f"revocations are announced; known to be complete {age:.1f} s ago"
    return Check(ok=age <= bound, needed=False, detail=said, age_seconds=round(age, 3), position=told.ledger_seq)


async def _analytics(runtime: Runtime) -> Check:
    """For information: validation does not need it."""
    try:
        answer = await ask(runtime.nc, StatusRequest(), StatusAnswer, seconds=_ANALYTICS_SECONDS_MAX)
    except AnalyticsRefused as error:
        return Check(ok=False, needed=False, detail=str(error))
    known = [(stream.position, stream.end) for stream in answer.streams if stream.end is not None]
    behind = [f"{position:,} of {end:,}" for position, end in known if end - position >= _FAR_BEHIND]
    detail = f"answers; it is still reading the log and has {' and '.join(behind)}" if behind else "answers"
    lag = sum(max(0, end - position) for position, end in known) if known else UNSET
    return Check(ok=True, needed=False, detail=detail, lag=lag)


async def _abuse_rules(runtime: Runtime) -> Check:
    """For information too."""
    engine = await _engine(runtime)
    if isinstance(engine, str):
        return Check(ok=False, needed=False, detail=engine)
    if engine.lag is None:
        return Check(ok=False, needed=False, detail="have not begun yet")
    waiting = f"; {engine.waiting} findings wait for a revocation" if engine.waiting else ""
    return Check(ok=not engine.waiting, needed=False, detail=f"run{waiting}", lag=engine.lag)


async def _engine(runtime: Runtime) -> EngineAnswer | str:
    """How the rules are getting on, or why nobody says."""
    try:
        return await ask(runtime.nc, EngineRequest(), EngineAnswer, seconds=_ANALYTICS_SECONDS_MAX)
    except AnalyticsRefused as error:
        return str(error)


async def metric_text(get_runtime: GetRuntime, _: Incoming) -> Response:
    """Tell Prometheus what was counted, in its text format."""
    headers = (("content-type", metrics.CONTENT_TYPE), ("x-content-type-options", "nosniff"))
    runtime = metrics.running(get_runtime)
    if runtime is None:
        return Response(200, metrics.exposition(None), headers)
    engine, receipts, deliverers, feed = await asyncio.gather(
        _engine(runtime), _receipts(runtime), ask_all(runtime.nc), _position(runtime)
    )
    found = engine if isinstance(engine, EngineAnswer) else None
    return Response(200, metrics.exposition(runtime, found, receipts, deliverers, feed), headers)


async def _position(runtime: Runtime) -> FeedPosition | None:
    try:
        return await ask_position(runtime.nc, _FEED_SECONDS_MAX)
    except LedgerUnavailable:
        return None


async def _receipts(runtime: Runtime) -> ReceiptsAnswer | None:
    """None if nobody says, or not yet: no number is better than a wrong one."""
    try:
        answer = await ask_receipts(runtime.nc, ReceiptsRequest(), seconds=_FEED_SECONDS_MAX)
    except ReceiptsUnavailable:
        return None
    return answer if answer.complete else None
