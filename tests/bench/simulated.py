"""A simulated history in a running service: appended to its streams, taken in by its analytics process."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from events import codec
from events.ledger import Ledger
from events.publisher import Publisher, outcome
from events.streams import LEDGER, USAGE, stream_state
from events.types import TENANT, UseBlock
from tests import running
from tests.bench.fill import connected
from tests.bench.people import moment
from tests.bench.traffic import Traffic

EVENTS_PER_APPEND = 1000
BLOCKS_ON_THEIR_WAY_MAX = 24
ACKNOWLEDGED_SECONDS_MAX = 60.0
INGESTED_USES_PER_SECOND_MIN = 5_000  # below this the wait is given up


class Appended(msgspec.Struct, frozen=True, kw_only=True):
    """`first_block`: the sequence in USAGE of the first block; the others follow it without a gap."""

    ledger_events: int
    ledger_seconds: float
    uses: int
    refused: int
    refused_rows: int
    blocks: int
    usage_seconds: float
    usage_bytes: int
    first_block: int
    last_block: int
    last_event: int


async def append(service: running.Service, traffic: Traffic, progress: Callable[[int], None]) -> Appended:
    """Writes the whole history, the ledger first. `progress` is told how many uses are written."""
    nc = await connected(service, "service", "bench history")
    try:
        ledger, publisher = Ledger(nc), Publisher(nc)
        began = time.perf_counter()
        waiting = []
        for one in traffic.ledger():
            waiting.append(one)
            if len(waiting) == EVENTS_PER_APPEND:
                await ledger.append(*waiting)
                waiting.clear()
        if waiting:
            await ledger.append(*waiting)
        events_done = time.perf_counter()
        before = await stream_state(nc, USAGE)
        on_their_way: deque[asyncio.Future[dict[str, Any]] | None] = deque()
        for block in traffic.blocks(progress):
            on_their_way.append(await _publish(publisher, block))
            if len(on_their_way) >= BLOCKS_ON_THEIR_WAY_MAX:
                await outcome(on_their_way.popleft(), ACKNOWLEDGED_SECONDS_MAX)
        for future in on_their_way:
            await outcome(future, ACKNOWLEDGED_SECONDS_MAX)
        after = await stream_state(nc, USAGE)
        events = await stream_state(nc, LEDGER)
    finally:
        await nc.close()
    made = traffic.writers
    assert after["last_seq"] - before["last_seq"] == made.blocks, "somebody else wrote uses meanwhile"
    return Appended(
        ledger_events=traffic.population.events,
        ledger_seconds=events_done - began,
        uses=made.uses,
        refused=made.refused_requests,
        refused_rows=made.refused_rows,
        blocks=made.blocks,
        usage_seconds=time.perf_counter() - events_done,
        usage_bytes=after["bytes"] - before["bytes"],
        first_block=before["last_seq"] + 1,
        last_block=after["last_seq"],
        last_event=events["last_seq"],
    )


async def _publish(publisher: Publisher, block: UseBlock) -> asyncio.Future[dict[str, Any]] | None:
    headers = {"Nats-Msg-Id": block.block_id}
    return await publisher.publish(f"usage.{TENANT}.{block.writer}", codec.encode_block(block), headers)


def _bounds(traffic: Traffic) -> dict[str, str]:
    """All of the history, and what a writer's wrong clock has put beside it."""
    begins, ends = moment(traffic.size.start_us), moment(traffic.size.end_us)
    return {"from": _worded(begins - timedelta(days=1)), "to": _worded(ends + timedelta(hours=1))}


def _worded(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def ingested(service: running.Service, traffic: Traffic, written: Appended) -> float:
    """Waits until analytics has taken in the last block. Answers with the seconds that it took.

    Raises: AssertionError when it does not come to an end, or when what it counts is not what was written. A count
    that takes too long is not an error here: the rows are counted again where they are.
    """
    wanted = written.uses + written.refused
    began = time.perf_counter()
    deadline = began + 120 + wanted / INGESTED_USES_PER_SECOND_MIN
    nothing = {"from": "2000-01-01T00:00:00Z", "to": "2000-01-01T00:01:00Z"}
    while True:
        answer = service.call("GET", "/v1/audit/usage", params=nothing)
        if answer.status_code == 200 and answer.json()["usage_seq"] >= written.last_block:
            break
        assert time.perf_counter() < deadline, f"analytics is not there yet: {answer.text[:300]}"
        time.sleep(0.2)
    taken = time.perf_counter() - began
    answer = service.call("GET", "/v1/audit/usage", params=_bounds(traffic))
    if answer.status_code == 200:
        counted = answer.json()["totals"]["uses"]
        assert counted == wanted, f"{counted:,} uses and refused requests are counted, {wanted:,} were written"
    return taken


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """One usage query over the whole history, several times; not `answered`: it took too long once."""

    name: str
    median_ms: float
    slowest_ms: float
    answered: bool


GROUPINGS = ("client_id", "subject", "token_id", "kind", "outcome", "scope", "ip", "user_agent", "endpoint")


def queries(service: running.Service, traffic: Traffic, times: int) -> list[Query]:
    """Totals by every grouping over all of the history, a series by hour and by day, and distinct tokens."""
    asked = [{"group_by": name} for name in GROUPINGS]
    asked += [{"interval": "hour"}, {"interval": "day", "group_by": "outcome"}]
    asked += [{"group_by": "client_id", "distinct": "true"}]
    found = []
    for parameters in asked:
        taken, answered = [], True
        for _ in range(times):
            began = time.perf_counter()
            answer = service.call("GET", "/v1/audit/usage", params=_bounds(traffic) | parameters)
            taken.append((time.perf_counter() - began) * 1000)
            answered = answer.status_code == 200
            if not answered:  # it took too long, and would again
                break
        taken.sort()
        name = ", ".join(one if one != "true" else name for name, one in parameters.items())
        found.append(Query(name=name, median_ms=taken[len(taken) // 2], slowest_ms=taken[-1], answered=answered))
    return found


def store_bytes(data_dir: Path) -> int:
    """What analytics has on disk."""
    return sum(path.stat().st_size for path in (data_dir / "analytics").rglob("*") if path.is_file())
