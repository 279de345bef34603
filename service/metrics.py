"""What Prometheus is told. No label names a client, a subject or a token.

Workers are processes of their own: with PROMETHEUS_MULTIPROC_DIR set they share their numbers through files there, and
whichever worker is asked answers for all. What happens with every request is counted in plain numbers first and handed
over once a second, since handing over costs some five microseconds each time.
"""

from __future__ import annotations

import asyncio
import os
import re
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from projections.asking_findings import EngineAnswer
from projections.asking_receipts import ReceiptsAnswer
from projections.revocations import FeedPosition
from service.errors import ServiceError
from service.runtime import Runtime
from service.tokens import now
from service.webhooks.status import Status

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FLUSH_SECONDS = 1.0
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LIVE_FILE = re.compile(r"gauge_live[a-z]*_([0-9]+)\.db")

_registry = CollectorRegistry()
_seconds = Histogram(
    "token_ledger_request_seconds",
    "Time to answer requests, by route, method and status.",
    ("route", "method", "status"),
    buckets=_BUCKETS,
    registry=_registry,
)
_validations = Counter(
    "token_ledger_validations", "Tokens that were looked at, by the code of the answer.", ("code",), registry=_registry
)
_appended = Counter("token_ledger_appended_events", "Events appended to the ledger.", registry=_registry)
_conflicts = Counter(
    "token_ledger_append_conflicts", "Appends that met a newer event and were decided anew.", registry=_registry
)
_uses_lost = Counter("token_ledger_uses_lost", "Uses that could not be recorded.", registry=_registry)
_uses_waiting = Gauge(
    "token_ledger_uses_waiting", "Uses that wait to be written.", multiprocess_mode="livesum", registry=_registry
)
_followers = Gauge(
    "token_ledger_followers",
    "Followers of the feed that are served now, by streams and by polls.",
    multiprocess_mode="livesum",
    registry=_registry,
)


class _Meter:
    """The numbers of this process since they were last handed over."""

    def __init__(self) -> None:
        self.runtime: Callable[[], Runtime] | None = None
        self.requests: dict[tuple[str, str, int], list[float]] = {}  # sum of seconds, then the count in each bucket
        self.codes: Tally[str] = Tally()
        self._handed_over: Tally[str] = Tally()
        self._timer: asyncio.TimerHandle | None = None

    def schedule(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        self._timer = None
        requests, self.requests = self.requests, {}
        for (route, method, status), numbers in requests.items():
            child = _seconds.labels(route, method, str(status))
            # A histogram's own numbers, added to as `observe` does, without calling it for every request.
            child._sum.inc(numbers[0])  # noqa: SLF001
            for bucket, count in zip(child._buckets, numbers[1:], strict=True):  # noqa: SLF001
                if count:
                    bucket.inc(count)
        codes, self.codes = self.codes, Tally()
        for code, count in codes.items():
            _validations.labels(code).inc(count)
        self._flush_runtime()

    def _flush_runtime(self) -> None:
        runtime = running(self.runtime)
        if runtime is None:
            return
        ledger, usage = runtime.ledger, runtime.usage
        totals = ((_appended, ledger.appended), (_conflicts, ledger.conflicts), (_uses_lost, usage.lost))
        for counter, total in totals:
            name = counter._name  # noqa: SLF001 - what tells it apart
            counter.inc(total - self._handed_over[name])
            self._handed_over[name] = total
        _uses_waiting.set(usage.waiting)
        if usage.waiting:
            self.schedule()


_meter = _Meter()


def bind(runtime: Callable[[], Runtime]) -> None:
    """Where this process's runtime is found."""
    _meter.runtime = runtime


def running(runtime: Callable[[], Runtime] | None) -> Runtime | None:
    """The runtime, or None while there is none yet."""
    try:
        return runtime() if runtime is not None else None
    except ServiceError:
        return None


def request_done(route: str, method: str, status: int, seconds: float) -> None:
    """One request was answered. `route` is the template of the path, never the path itself."""
    key = (route, method if method in _METHODS else "other", status)
    numbers = _meter.requests.get(key)
    if numbers is None:
        numbers = _meter.requests[key] = [0.0] * (len(_BUCKETS) + 2)
        _meter.schedule()
    numbers[0] += seconds
    numbers[bisect_left(_BUCKETS, seconds) + 1] += 1


def validated(code: str, count: int = 1) -> None:
    """Tokens were looked at, with this code as the answer."""
    _meter.codes[code] += count
    _meter.schedule()


def following(count: int) -> None:
    """So many followers are served by this process."""
    _followers.set(count)


class _AtScrape(Collector):
    """What is looked up when it is asked for: the view belongs to the host, so that any worker may say it.

    `engine`: what the analytics process says of the abuse rules, None if it says nothing. `receipts`: what the process
    that keeps the receipts says of the followers, likewise. `deliverers`: what those say that deliver webhooks. `feed`:
    how far revocations are announced, None if nobody says.
    """

    def __init__(
        self,
        runtime: Runtime,
        engine: EngineAnswer | None,
        receipts: ReceiptsAnswer | None,
        deliverers: Sequence[Status],
        feed: FeedPosition | None,
    ) -> None:
        self._feed = feed
        self._deliverers = deliverers
        self._runtime = runtime
        self._engine = engine
        self._receipts = receipts

    def collect(self) -> Iterable[Metric]:
        fresh = self._runtime.view.freshness()
        yield GaugeMetricFamily(
            "token_ledger_view_position", "Last ledger sequence in the current-token view.", fresh.position
        )
        yield GaugeMetricFamily(
            "token_ledger_view_age_seconds", "Time since the view was last known to be complete.", fresh.age_seconds
        )
        ages = GaugeMetricFamily(
            "token_ledger_signing_key_age_seconds",
            "Time since the signing key was activated.",
            labels=("alg", "purpose"),
        )
        for purpose, alg in self._runtime.signing_keys.kept():
            key = self._runtime.signing_keys.active(alg, purpose)
            if key is not None:
                ages.add_metric([alg, purpose], (now() - (key.activated_at or key.introduced_at)).total_seconds())
        yield ages
        yield GaugeMetricFamily(
            "token_ledger_feed_age_seconds",
            "Time since the feed of revocations was last known to be complete; +Inf while nobody says.",
            self._feed.age_ms / 1000 if self._feed is not None else float("inf"),
        )
        if self._engine is not None:
            yield from _abuse(self._engine)
        if self._receipts is not None:
            yield from _receipts(self._receipts)
        if self._deliverers:
            yield from _webhooks(self._deliverers)


def _abuse(engine: EngineAnswer) -> Iterable[Metric]:
    found = CounterMetricFamily(
        "token_ledger_findings", "Findings of abuse, by rule and the mode that it had.", labels=("rule", "mode")
    )
    for one in engine.counts:
        found.add_metric([one.rule, one.mode], one.findings)
    yield found
    yield GaugeMetricFamily(
        "token_ledger_findings_waiting", "Findings that are to revoke and have not yet.", engine.waiting
    )
    if engine.lag is not None:
        yield GaugeMetricFamily(
            "token_ledger_abuse_rules_lag_messages", "Messages in analytics that no rule has looked at.", engine.lag
        )


def _webhooks(deliverers: Sequence[Status]) -> Iterable[Metric]:
    """Of all processes that deliver, on whatever host: they share the work."""
    attempts = CounterMetricFamily(
        "token_ledger_webhook_attempts", "Attempts to deliver webhooks, by what came of them.", labels=("outcome",)
    )
    totals: Tally[str] = Tally()
    for one in deliverers:
        totals.update(one.attempts)
    for outcome, count in sorted(totals.items()):
        attempts.add_metric([outcome], count)
    yield attempts
    yield CounterMetricFamily(
        "token_ledger_webhooks_disabled",
        "Webhooks that were disabled since they were gone or failed for too long.",
        sum(one.disabled for one in deliverers),
    )
    yield GaugeMetricFamily(
        "token_ledger_webhooks_failing",
        "Webhooks whose last attempts all failed.",
        max(one.failing for one in deliverers),
    )


def _receipts(answer: ReceiptsAnswer) -> Iterable[Metric]:
    yield GaugeMetricFamily("token_ledger_registered_followers", "Subscribers and webhooks.", answer.registered)
    silent = [one for one in answer.followers if one.silent_since_us is not None]
    yield GaugeMetricFamily(
        "token_ledger_silent_followers",
        "Subscribers and webhooks that were not heard of for too long, or have not applied a revocation for too long.",
        len(silent),
    )
    yield GaugeMetricFamily(
        "token_ledger_pending_followers",
        "Subscribers and webhooks that have not applied everything that was announced.",
        sum(1 for one in answer.followers if one.pending),
    )


def exposition(
    runtime: Runtime | None,
    engine: EngineAnswer | None = None,
    receipts: ReceiptsAnswer | None = None,
    deliverers: Sequence[Status] = (),
    feed: FeedPosition | None = None,
) -> bytes:
    """All metrics of all workers, in Prometheus' text format."""
    _meter.flush()
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    registry = CollectorRegistry() if directory else _registry
    parts = []
    if directory:
        _forget_dead(Path(directory))
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    if runtime is not None:
        at_scrape = CollectorRegistry()
        at_scrape.register(_AtScrape(runtime, engine, receipts, deliverers, feed))
        parts.append(generate_latest(at_scrape))
    return b"".join([generate_latest(registry), *parts])


def _forget_dead(directory: Path) -> None:
    """A killed worker leaves its gauges behind."""
    for file in directory.glob("gauge_live*.db"):
        found = _LIVE_FILE.fullmatch(file.name)
        if found and not Path(f"/proc/{found[1]}").exists():
            mark_process_dead(int(found[1]), str(directory))  # type: ignore[no-untyped-call]
