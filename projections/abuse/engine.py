"""Looks at what the analytics store has committed, appends what it finds, and asks the service to act on it.

Where it has got to is kept in a small file of its own, written after what was found is on the log: if it is killed in
between, it finds the same once more, under the same id, which the log has already. So a rebuild of the store runs no
rule, and nothing is skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import msgspec
import nats.errors
import structlog
from msgspec import Struct

from events.errors import Conflict, LedgerError
from events.ledger import Append, Ledger
from events.streams import LEDGER, USAGE, Connection, stream_state
from events.types import TENANT, RuleMode
from projections.abuse import feed
from projections.abuse.acting import ActAnswer, ActRequest, act_on
from projections.abuse.detector import Detector, Found, Incident
from projections.abuse.rules import Rule
from projections.analytics.store import Analytics
from projections.asking_findings import EngineAnswer, EngineRequest, FindingCount
from projections.base import end_all

log = structlog.get_logger()

STATE_FILE = "abuse.json"
_CHUNK_USES_MAX = 200_000
_CHUNK_BLOCKS = 100  # so few hold no more uses than that
_PAUSE_SHARE = 3.0  # of the processor's time that it takes to look: at most a quarter of a core
_PAUSE_SHARE_BEHIND = 19.0  # while the store has many uses to take in: a twentieth, so that it gets there sooner
_IDLE_SECONDS_MAX = 5.0
_SAVE_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_ACT_SECONDS = 2.0
_ACT_WITHIN = timedelta(days=7)
_CATCH_UP_SECONDS = 0.2

_FOUND = """
SELECT body ->> 'finding_id', recorded_at, body ->> 'rule', body ->> 'mode', (body ->> 'self_reported')::BOOLEAN
FROM events WHERE ledger_seq > ? AND ledger_seq <= ? AND type = 'abuse.detected/1' ORDER BY ledger_seq
"""
# What was revoked because of a finding names it.
_ACTED = "SELECT DISTINCT request_id FROM events WHERE request_id = ANY (?)"

_UNNOTED = """
SELECT body ->> 'rule', coalesce(body ->> 'token_id', body ->> 'grant_id'), (body ->> 'detected_at')::TIMESTAMP
FROM events
WHERE ledger_seq > ? AND type = 'abuse.detected/1' AND coalesce(body ->> 'token_id', body ->> 'grant_id') IS NOT NULL
"""

T = TypeVar("T")


class State(Struct, frozen=True, kw_only=True):
    """Where the rules have got to: everything recorded up to these sequences was looked at."""

    usage: int
    ledger: int
    salt: str
    incidents: dict[str, tuple[datetime, datetime]] = msgspec.field(default_factory=dict)


def load_state(directory: Path) -> State | None:
    """None if there is none, or none that can be read."""
    path = directory / STATE_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.error("abuse_state_unreadable", alarm=True, file=str(path), error=str(error))  # noqa: TRY400 - a trace says no more
        return None


def save_state(directory: Path, state: State) -> None:
    """Whole or not at all, and on disk before it returns."""
    path = directory / STATE_FILE
    temporary = path.with_suffix(".new")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(msgspec.json.encode(state))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pause_seconds(busy: float, far_behind: bool) -> float:
    """For how long nothing is looked at after so many seconds of the processor's time."""
    return busy * (_PAUSE_SHARE_BEHIND if far_behind else _PAUSE_SHARE)


class Engine:
    """The rules, behind the ingestion of one analytics store, which they look at every `idle_seconds` at the most.

    `lag`: messages of the two streams that are in the store and were not looked at; `looked_at`: when it last looked.
    """

    def __init__(self, nc: Connection, store: Analytics, rules: Iterable[Rule], *, idle_seconds: float = 1.0) -> None:
        self._nc = nc
        self._ledger = Ledger(nc)
        self._store = store
        self._rules = tuple(rules)
        self._directory = store.path.parent
        self._idle_seconds = min(idle_seconds, _IDLE_SECONDS_MAX)
        self._thread = ThreadPoolExecutor(1, "abuse")
        self._saved_at = 0.0
        self._preparing_since: float | None = None
        self._counted = 0  # findings up to this position of LEDGER are in what follows
        self._counts: Counter[tuple[str, RuleMode]] = Counter()
        self._to_act_on: list[str] = []  # findings that are to revoke and on which the service has not said it acted
        self._cursor: duckdb.DuckDBPyConnection | None = None
        self._detector: Detector | None = None
        self.state: State | None = None

    async def run(self) -> None:
        """Until it is cancelled. A failure is told and does not end it: it begins again from where it had got to."""
        while True:
            tasks = [asyncio.create_task(self._look_for_ever()), asyncio.create_task(self._act_for_ever())]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            except Exception as error:
                # Ingestion must go on whatever a rule does.
                log.exception("abuse_engine_failed", alarm=True, error=str(error))
                self._store.report(error)
            finally:
                await end_all(tasks)
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._release()
            # What failed before it could begin, as of too little memory, may fail again, and takes long.
            spent = 0.0 if self._preparing_since is None else time.monotonic() - self._preparing_since
            await asyncio.sleep(max(_RETRY_SECONDS, _PAUSE_SHARE * spent))

    def lag(self) -> int:
        """Messages that are in the store and were not looked at yet."""
        if self.state is None:
            return 0
        return max(0, self._store.position(USAGE) - self.state.usage) + max(
            0, self._store.position(LEDGER) - self.state.ledger
        )

    async def status(self, _: EngineRequest) -> EngineAnswer:
        """What is told about the engine to who asks over NATS."""
        counts = [
            FindingCount(rule=rule, mode=mode, findings=count) for (rule, mode), count in sorted(self._counts.items())
        ]
        lag = self.lag() if self.state is not None else None
        return EngineAnswer(lag=lag, waiting=len(self._to_act_on), counts=counts)

    async def _release(self) -> None:
        """Ends what the thread does before its cursor and its database go."""
        cursor, detector = self._cursor, self._detector
        self._cursor = self._detector = None
        for one in (cursor, detector):
            if one is not None:
                with contextlib.suppress(duckdb.Error):
                    one.interrupt()

        def close() -> None:
            for one in (cursor, detector):
                if one is not None:
                    with contextlib.suppress(duckdb.Error):
                        one.close()

        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, close))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # Looking

    async def _look_for_ever(self) -> None:
        self._preparing_since = None
        state, ledger_end = await self._begin()
        await self._reached(state.usage, ledger_end)
        cursor = self._cursor = self._store.cursor()
        started = self._preparing_since = time.monotonic()

        def prepared() -> Detector:
            detector = self._detector = self._detector_of(state, cursor)
            feed.seed(cursor, detector, until=state.usage, ledger=state.ledger)
            return detector

        await self._in_thread(lambda: self._transaction(prepared))
        self.state, self._preparing_since = state, None
        log.info("abuse_engine_started", rules=len(self._rules), seconds=round(time.monotonic() - started, 1))
        while True:
            busy, ended = await self._look(), time.monotonic()
            await asyncio.sleep(self._idle_seconds)
            # Asked again and again: another thread may have caught up meanwhile.
            while busy is not None and time.monotonic() < ended + pause_seconds(busy, self._store.far_behind):  # noqa: ASYNC110 - another thread sets `far_behind`
                await asyncio.sleep(self._idle_seconds)

    async def _begin(self) -> tuple[State, int]:
        """Where it had got to, and where LEDGER ends now.

        At the first start these are the same, since history is for backtests.
        """
        ends = {}
        for stream in (USAGE, LEDGER):
            found = await stream_state(self._nc, stream)
            ends[stream] = int(found["last_seq"])
        state = load_state(self._directory)
        if state is not None and state.usage <= ends[USAGE] and state.ledger <= ends[LEDGER]:
            return state, ends[LEDGER]
        if state is not None:
            log.error("abuse_state_is_ahead_of_the_log", alarm=True, action="rules begin at the log's present end")
        state = State(usage=ends[USAGE], ledger=ends[LEDGER], salt=secrets.token_hex(16))
        save_state(self._directory, state)
        return state, ends[LEDGER]

    async def _reached(self, usage: int, ledger: int) -> None:
        """Waits while the store is being rebuilt: what it does not know yet was looked at before."""
        while self._store.position(USAGE) < usage or self._store.position(LEDGER) < ledger:  # noqa: ASYNC110 - another thread commits
            await asyncio.sleep(_CATCH_UP_SECONDS)

    def _detector_of(self, state: State, cursor: duckdb.DuckDBPyConnection) -> Detector:
        incidents = {key: Incident(*times) for key, times in state.incidents.items()}
        # Found and not noted any more. Their ids would tell, but not if the rules were changed meanwhile.
        for rule, entity, at in cursor.execute(_UNNOTED, [state.ledger]).fetchall():
            incidents.setdefault(f"{rule} {entity}", Incident(at, at))
        return Detector(self._rules, bytes.fromhex(state.salt), incidents=incidents)

    def _transaction(self, work: Callable[[], T]) -> T:
        """So that all that is read is of one moment."""
        assert self._cursor is not None
        self._cursor.begin()
        try:
            return work()
        finally:
            with contextlib.suppress(duckdb.Error):
                self._cursor.rollback()

    async def _look(self) -> float | None:
        """For how many seconds it was busy, of the processor's time; None if there was nothing new."""
        state, cursor, detector = self.state, self._cursor, self._detector
        assert state is not None
        assert cursor is not None
        assert detector is not None
        usage, ledger = self._store.position(USAGE), self._store.position(LEDGER)
        if usage <= state.usage and ledger <= state.ledger:
            return None

        def look() -> tuple[list[Found], int, float]:
            began = time.thread_time()

            def read() -> tuple[Any, int]:
                end = usage
                if usage - state.usage > _CHUNK_BLOCKS:
                    end = feed.chunk_end(cursor, state.usage, usage, _CHUNK_USES_MAX)
                fresh = feed.recorded(cursor, detector, usage=(state.usage, end), ledger=(state.ledger, ledger))
                return fresh, end

            fresh, end = self._transaction(read)
            return detector.look(fresh), end, time.thread_time() - began

        found, end, busy = await self._in_thread(look)
        for one in found:
            await self._append(one)
        incidents = {key: (one.first_at, one.last_at) for key, one in detector.incidents.items()}
        self.state = State(usage=end, ledger=ledger, salt=state.salt, incidents=incidents)
        if found or time.monotonic() - self._saved_at > _SAVE_SECONDS:
            await self._in_thread(functools.partial(save_state, self._directory, self.state))
            self._saved_at = time.monotonic()
        return busy

    async def _append(self, found: Found) -> None:
        """Once, however often it is found; waits for as long as the log is away."""
        event = found.event(datetime.now(UTC))
        entry = Append(f"ledger.{TENANT}.finding.{found.finding_id}", event, 0)
        while True:
            try:
                (seq,) = await self._ledger.append(entry)
            except Conflict:
                return  # found before, and killed before that was noted
            except LedgerError as error:
                log.warning("abuse_finding_waits", finding=found.finding_id, why=str(error))
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                break
        told = log.warning if event.mode != "observe" else log.info
        told(
            "abuse_detected",
            alarm=event.mode != "observe",
            finding=event.finding_id,
            ledger_seq=seq,
            rule=event.rule,
            mode=event.mode,
            self_reported=event.self_reported,
            token_id=event.token_id,
            client_id=event.client_id,
        )

    # Acting

    async def _act_for_ever(self) -> None:
        """Asks the service to act on findings until it has; after a restart again, since it does nothing twice."""
        while True:
            if self._store.position(LEDGER) > self._counted:
                await asyncio.to_thread(self._count)
            for finding_id in list(self._to_act_on):
                try:
                    answer = await act_on(self._nc, ActRequest(finding_id=finding_id))
                except (nats.errors.Error, TimeoutError, OSError, msgspec.DecodeError) as error:
                    log.warning("abuse_action_waits", finding=finding_id, why=str(error) or type(error).__name__)
                    break
                self._note(finding_id, answer)
            await asyncio.sleep(_ACT_SECONDS)

    def _note(self, finding_id: str, answer: ActAnswer) -> None:
        if answer.done:
            self._to_act_on.remove(finding_id)
            log.info("abuse_acted", finding=finding_id, outcome=answer.outcome, ledger_seq=answer.ledger_seq)
        else:
            log.warning("abuse_action_waits", finding=finding_id, why=answer.outcome)

    def _count(self) -> None:
        """Takes note of the findings that have come into the store since."""
        until = self._store.position(LEDGER)
        oldest = datetime.now(UTC).replace(tzinfo=None) - _ACT_WITHIN
        with self._store.cursor() as cursor:
            found = cursor.execute(_FOUND, [self._counted, until]).fetchall()
            named = [finding_id for finding_id, _, _, mode, _ in found if mode == "revoke"]
            acted = {one for (one,) in cursor.execute(_ACTED, [named]).fetchall()} if named else set()
        for finding_id, recorded_at, rule, mode, self_reported in found:
            self._counts[rule, mode] += 1
            if mode == "revoke" and not self_reported and recorded_at > oldest and finding_id not in acted:
                self._to_act_on.append(finding_id)
        self._counted = until
