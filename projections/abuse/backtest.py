"""What a rule, as it is or changed, would have found in history, and how that compares with what was found.

It runs day by day in a thread of the lowest priority with a detector of its own, so that ingestion does not notice it,
and can be stopped at any moment. Nothing of it is kept: after a restart of the process it is begun again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import msgspec
import structlog
from msgspec import UNSET, Struct
from nats.micro.request import ServiceError

from events.streams import LEDGER, USAGE
from events.types import Quantity
from projections.abuse import feed
from projections.abuse.detector import Detector, Found
from projections.abuse.rules import REVOCABLE, Rule, RuleError, all_rules, changed, parse
from projections.analytics.store import Analytics
from projections.asking_findings import BacktestAnswer, BacktestClient, BacktestRequest

log = structlog.get_logger()

_DAY = timedelta(days=1)
_KEPT_MAX = 10
_EXAMPLES_MAX = 20
_FOUND_MAX = 100_000
_CHUNK_USES_MAX = 200_000  # about as many are looked at at once
_NICENESS_MAX = 19
_RECORDED = """
SELECT client_id, 'tok_' || replace(token_id::VARCHAR, '-', '') AS token_id,
    'grt_' || replace(grant_id::VARCHAR, '-', '') AS grant_id, detected_at, evidence
FROM findings WHERE rule = ? AND detected_at >= ? AND detected_at < ?
"""


class Report(Struct):
    """What was found so far."""

    days: int
    days_done: int = 0
    uses: int = 0
    found: list[Found] = msgspec.field(default_factory=list)
    recorded: list[tuple[Any, ...]] = msgspec.field(default_factory=list)
    detector: Detector | None = None  # while it runs


def run(
    cursor: duckdb.DuckDBPyConnection, rule: Rule, since: datetime, report: Report, stops: Callable[[], bool]
) -> None:
    """Runs the rule over `report.days` days from `since` on (a midnight, UTC, without zone), filling the report.

    Raises: RuleError; duckdb.InterruptException when it is interrupted.
    """
    detector = Detector((rule,), secrets.token_bytes(16))
    report.detector = detector
    try:
        with _reading(cursor):
            feed.seed(cursor, detector, until=2**62, ledger=2**62, before=since)
        for number in range(report.days):
            day = since + number * _DAY
            with _reading(cursor):
                ((count,),) = cursor.execute(
                    "SELECT count(*) FROM uses WHERE occurred_at >= ? AND occurred_at < ?", [day, day + _DAY]
                ).fetchall()
                # Whole hours, so few that their uses fit into memory.
                hours = max(1, 24 // (1 + count // _CHUNK_USES_MAX))
                for hour in range(0, 24, hours):
                    if stops():
                        return
                    start = day + timedelta(hours=hour)
                    end = min(start + timedelta(hours=hours), day + _DAY)
                    report.found += detector.look(feed.occurred(cursor, detector, start, end))
                    if len(report.found) > _FOUND_MAX:
                        raise RuleError(f"rule {rule.name} finds more than {_FOUND_MAX:,} incidents: it is too wide")
            report.uses += count
            report.days_done = number + 1
        with _reading(cursor):
            until = since + report.days * _DAY
            report.recorded = cursor.execute(_RECORDED, [rule.name, since, until]).fetchall()
    finally:
        report.detector = None
        detector.close()


@contextlib.contextmanager
def _reading(cursor: duckdb.DuckDBPyConnection) -> Any:
    """One state of the store; short enough that segments which are dropped meanwhile are still there."""
    cursor.begin()
    try:
        yield
    finally:
        with contextlib.suppress(duckdb.Error):
            cursor.rollback()


def revocable(rule: Rule, found: Found) -> str | None:
    """The token or grant that mode `revoke` would have ended."""
    if rule.entity not in REVOCABLE or found.reported:
        return None
    return found.about.get("token_id") or found.about.get("grant_id")


def by_client(rule: Rule, report: Report) -> list[BacktestClient]:
    """The report by client, those with the most findings first."""
    quiet = timedelta(seconds=rule.quiet_seconds)
    found: Counter[str | None] = Counter()
    ends: dict[str | None, set[str]] = {}
    again: Counter[str | None] = Counter()
    recorded: Counter[str | None] = Counter(row[0] for row in report.recorded)
    left = [_Recorded(*row) for row in report.recorded]
    for one in report.found:
        client_id = one.about.get("client_id")
        found[client_id] += 1
        target = revocable(rule, one)
        if target is not None:
            ends.setdefault(client_id, set()).add(target)
        same = next((row for row in left if row.is_same(one, quiet)), None)
        if same is not None:
            left.remove(same)
            again[client_id] += 1
    return [
        BacktestClient(
            client_id=client_id,
            found=found[client_id],
            revoked=len(ends.get(client_id, ())),
            recorded=recorded[client_id],
            also_recorded=again[client_id],
            new=found[client_id] - again[client_id],
            missed=recorded[client_id] - again[client_id],
        )
        for client_id in sorted(found.keys() | recorded.keys(), key=lambda name: (-found[name], name or ""))
    ]


class _Recorded:
    """A finding that LEDGER has."""

    def __init__(
        self, client_id: str | None, token_id: str | None, grant_id: str | None, at: datetime, evidence: str
    ) -> None:
        self._of = {"client_id": client_id, "token_id": token_id, "grant_id": grant_id}
        self._at = at
        self._places = {(one["source"], one["seq"], one["index"]) for one in msgspec.json.decode(evidence)}

    def is_same(self, found: Found, quiet: timedelta) -> bool:
        """Of the same token or grant about that time, or by the same evidence."""
        about = [name for name in ("token_id", "grant_id") if found.about.get(name)]
        if about and abs(found.at - self._at) <= quiet:
            return all(found.about[name] == self._of[name] for name in about)
        return bool(self._places & {(one.source, one.seq, one.index) for one in found.evidence})


class _Job:
    """One backtest, in a thread of its own."""

    def __init__(self, store: Analytics, rule: Rule, since: datetime, days: int) -> None:
        self.backtest_id = secrets.token_hex(8)
        self.rule, self.since = rule, since
        self.report = Report(days=days)
        self.error: str | None = None
        self.positions = (store.position(LEDGER), store.position(USAGE))
        self._stopping = threading.Event()
        self._store = store
        self._cursor = store.cursor()
        self.thread = threading.Thread(target=self._run, name="abuse-backtest", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # of the thread alone, as Linux has it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS_MAX)
        try:
            run(self._cursor, self.rule, self.since, self.report, self._stopping.is_set)
        except duckdb.InterruptException:
            self._stopping.set()
        except (RuleError, duckdb.Error) as error:
            self.error = str(error)
            log.warning("backtest_failed", rule=self.rule.name, error=str(error))
            self._store.report(error)
        except Exception as error:
            self.error = f"{type(error).__name__}; the analytics process logged why"
            log.exception("backtest_failed", rule=self.rule.name)
        finally:
            with contextlib.suppress(duckdb.Error):
                self._cursor.close()

    def stop(self) -> None:
        self._stopping.set()
        detector = self.report.detector
        with contextlib.suppress(duckdb.Error):
            self._cursor.interrupt()
            if detector is not None:
                detector.interrupt()

    def answer(self) -> BacktestAnswer:
        report, rule = self.report, self.rule
        found = list(report.found)
        clients = by_client(rule, Report(days=report.days, found=found, recorded=list(report.recorded)))
        running = self.thread.is_alive()
        state = "running" if running else "failed" if self.error else "done"
        if not running and not self.error and report.days_done < report.days:
            state = "stopped"
        return BacktestAnswer(
            backtest_id=self.backtest_id,
            rule=rule.name,
            rule_version=rule.version,
            parameters=[Quantity(quantity=name, value=value) for name, value in rule.values.items()],
            state=state,  # type: ignore[arg-type]  # one of these
            from_=self.since.replace(tzinfo=UTC),
            to=(self.since + report.days * _DAY).replace(tzinfo=UTC),
            days=report.days,
            days_done=report.days_done,
            uses=report.uses,
            found=len(found),
            revoked=sum(one.revoked for one in clients),
            clients=clients,
            examples=[_example(one) for one in found[-_EXAMPLES_MAX:]],
            error=self.error or UNSET,
            ledger_seq=self.positions[0],
            usage_seq=self.positions[1],
        )


def _example(found: Found) -> dict[str, Any]:
    members: dict[str, Any] = {
        "detected_at": found.at.replace(tzinfo=UTC).isoformat().replace("+00:00", "Z"),
        **found.about,
    }
    members |= {"counts": dict(found.counts), "self_reported": found.reported}
    return {name: value for name, value in members.items() if value is not None}


def _rule_of(request: BacktestRequest) -> Rule:
    """Raises: RuleError."""
    if request.sql is not None:
        rule = parse(request.rule, request.sql)
        try:
            kinds = [statement.type for statement in duckdb.extract_statements(rule.sql)]
        except duckdb.Error as error:
            raise RuleError(f"rule {rule.name} cannot be read: {error}") from error
        if kinds != [duckdb.StatementType.SELECT]:
            raise RuleError(f"rule {rule.name} is not one SELECT")
    elif request.rule in all_rules():
        rule = all_rules()[request.rule]
    else:
        raise RuleError(f"there is no rule {request.rule!r}; there are {', '.join(all_rules())}")
    for change in request.changes:
        name, _, value = change.partition("=")
        rule = changed(rule, name, value)
    return rule


class Backtests:
    """Backtests of this process: one at a time, and the last few."""

    def __init__(self, store: Analytics) -> None:
        self._store = store
        self._jobs: deque[_Job] = deque(maxlen=_KEPT_MAX)

    async def answer(self, request: BacktestRequest) -> BacktestAnswer:
        """Begins one, or tells of one. Raises: nats.micro's ServiceError."""
        if request.backtest_id is None:
            return self._begun(request).answer()
        job = next((one for one in self._jobs if one.backtest_id == request.backtest_id), None)
        if job is None:
            raise ServiceError("404", "there is no such backtest, or the analytics process was started since")
        if request.stop:
            job.stop()
            await asyncio.to_thread(job.thread.join, 5)
        return await asyncio.to_thread(job.answer)

    def _begun(self, request: BacktestRequest) -> _Job:
        if any(one.thread.is_alive() for one in self._jobs):
            raise ServiceError("400", "a backtest is already running; wait for it, or stop it")
        try:
            rule = _rule_of(request)
        except RuleError as error:
            raise ServiceError("400", str(error)) from error
        now = datetime.now(UTC)
        until = request.until or now
        if until > now + _DAY:
            raise ServiceError("400", "`to` lies in the future")
        midnight = until.astimezone(UTC).replace(tzinfo=None, hour=0, minute=0, second=0, microsecond=0)
        if midnight < until.astimezone(UTC).replace(tzinfo=None):
            midnight += _DAY  # the day that has begun counts too
        job = _Job(self._store, rule, midnight - request.days * _DAY, request.days)
        self._jobs.append(job)
        return job

    def close(self) -> None:
        """Stops what runs; before the store is closed."""
        for job in self._jobs:
            if job.thread.is_alive():
                job.stop()
                job.thread.join()
