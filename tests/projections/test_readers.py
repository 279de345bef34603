"""An answer of any size over a real nats-server: whole and in order, or an error, and never faster than it is read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from events import streams
from events.streams import LEDGER, USAGE
from projections import analytics, base
from projections.analytics.readers import ReadLimits, published_directory
from projections.reading import (
    AHEAD_MAX,
    MESSAGE_BYTES,
    SUBJECT,
    ExportRequest,
    ReadBegun,
    ReadEnded,
    ReadFailed,
    ReadRequest,
    read,
)
from tests import running
from tests.projections.test_analytics import Log, LogFactory, answering, block, start_log
from tests.projections.test_analytics_usage import FIRST, issued, t, use

__all__ = ["start_log"]  # a fixture

MANY = "SELECT repeat('x', 1000) FROM range({})"


@pytest.fixture(scope="module")
async def log(start_log: LogFactory, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Log]:
    """A log with one token and three uses, and the analytics that answers."""
    directory = tmp_path_factory.mktemp("readers")
    started = await start_log(directory / "log")
    await started.record(issued(FIRST, t.Kind.ACCESS, "cli_shop", "cli_shop"))
    await started.record_uses(block(use(0, FIRST), use(1, FIRST), use(2, FIRST)))
    opened = analytics.open_analytics(directory / "store")
    nc = await streams.connect(started.server.url, started.server.creds("projector"), name="analytics")
    limits = ReadLimits(seconds_max=20, answer_bytes_max=2**40, at_once_max=1)
    tasks = [
        asyncio.create_task(analytics_run(nc, opened)),
        asyncio.create_task(analytics.serve_queries(nc, opened, limits=limits)),
    ]
    await answering(started.nc)
    yield started
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await nc.close()
    opened.close()


async def analytics_run(nc: streams.Connection, opened: analytics.Analytics) -> None:
    await base.run(nc, opened, (LEDGER, USAGE))


def asked(sql: str = "", **more: Any) -> ReadRequest:
    members = {"read_id": running.unique("r").replace("-", ""), "format": "csv", "sql": sql or None, "limit": 10**9}
    return ReadRequest(**members | more)


async def whole(nc: streams.Connection, request: ReadRequest) -> tuple[ReadBegun, bytes, ReadEnded]:
    async with contextlib.aclosing(read(nc, request)) as answer:
        parts: list[Any] = [part async for part in answer]
    begun, *data, ended = parts
    assert isinstance(begun, ReadBegun)
    assert isinstance(ended, ReadEnded)
    return begun, b"".join(data), ended


async def place(log: Log) -> None:
    """Waits until the one place is free again: a little after the process of the query before has ended."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(ReadFailed):
                await whole(log.nc, asked("SELECT 1"))
                break
        while children():  # noqa: ASYNC110 - processes of the system's
            await asyncio.sleep(0.02)


def children() -> list[running.Process]:
    return [one for one in running.processes() if one.parent == os.getpid() and "sandbox/child.py" in one.command_line]


async def test_answer_larger_than_many_messages_comes_whole_and_in_order(log: Log) -> None:
    _, data, ended = await whole(log.nc, asked("SELECT range FROM range(1000000)"))
    assert data.count(b"\n") == 1_000_001
    assert [int(line.strip(b'"')) for line in data.split(b"\n")[1:-1]] == list(range(1_000_000))
    assert ended.rows == 1_000_000


async def test_answer_waits_for_who_reads_it(log: Log) -> None:
    """40 MB: unread, only a few messages of it are ever sent."""
    received = 0
    inbox = log.nc.new_inbox()

    async def count(message: Any) -> None:
        nonlocal received
        received += len(message.data)

    watching = await log.nc.subscribe(inbox.rpartition(".")[0] + ".>", cb=count)
    async with contextlib.aclosing(read(log.nc, asked(MANY.format(40_000)))) as answer:
        first = await anext(answer)
        assert isinstance(first, ReadBegun)
        await child_blocked()
        assert received <= (AHEAD_MAX + 2) * (MESSAGE_BYTES + 100)
        total = 0
        async for part in answer:
            total += len(part) if isinstance(part, bytes) else 0
    await watching.unsubscribe()
    assert total == 40_000 * 1003 + len("\"repeat('x', 1000)\"\n")


async def child_blocked() -> None:
    """Until the process sleeps because nobody takes what it writes."""
    still = 0
    while still < 20:
        (child,) = children()
        state = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0]  # noqa: ASYNC240 - no disk is behind it
        still = still + 1 if state == "S" else 0
        await asyncio.sleep(0.02)


async def test_query_ends_when_nobody_reads_its_answer_any_more(log: Log) -> None:
    async with contextlib.aclosing(read(log.nc, asked(MANY.format(400_000)))) as answer:
        await anext(answer)
        await anext(answer)
    await place(log)


async def test_query_that_is_given_up_before_its_first_row_ends(log: Log) -> None:
    await place(log)
    answer = read(log.nc, asked("SELECT sleep_ms(20000)"))
    waiting = asyncio.ensure_future(anext(answer))
    while not children():  # noqa: ASYNC110 - a process of the system's
        await asyncio.sleep(0.02)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await answer.aclose()
    await place(log)


async def test_error_in_the_middle_is_told_after_what_was_there(log: Log) -> None:
    parts = []
    # One source, of which no more is held than is asked for: the halves of a UNION run at once.
    row = "CASE WHEN range < 30_000 THEN repeat('x', 1_000 + range % 9) ELSE error('stop') END"
    failing = asked(f"SELECT {row} FROM range(30_001)")
    answer = read(log.nc, failing)
    failure = None
    try:
        async for part in answer:
            parts.append(part)  # noqa: PERF401 - what came before the error is wanted
    except ReadFailed as error:
        failure = error
    assert failure is not None
    assert (failure.code, "stop" in str(failure)) == ("sql_invalid", True)
    assert len(parts) > 1
    assert not any(isinstance(part, ReadEnded) for part in parts)


async def test_second_query_is_told_that_one_is_running(log: Log) -> None:
    await place(log)
    async with contextlib.aclosing(read(log.nc, asked(MANY.format(400_000)))) as answer:
        await anext(answer)
        with pytest.raises(ReadFailed) as raised:
            await whole(log.nc, asked("SELECT 1"))
        assert raised.value.code == "busy"
        # An export has a place of its own.
        exported = asked("", export=ExportRequest(dataset="uses"), format="ndjson", limit=None)
        begun, data, ended = await whole(log.nc, exported)
        assert [json.loads(line)["token_id"] for line in data.splitlines()] == [FIRST] * 3
        assert (ended.rows, ended.usage_range, ended.ledger_range) == (3, (1, 1), (None, None))
        assert (begun.statement, begun.usage_seq) == ("SELECT * FROM uses_v1", 1)


async def test_request_that_is_none_is_refused(log: Log) -> None:
    await place(log)
    for data in (b"", b"{", b'{"read_id": "../x", "format": "csv", "sql": "SELECT 1"}'):
        reply = await log.nc.request(SUBJECT, data, timeout=10)
        assert b"sql_invalid" in reply.data


def test_published_copies_are_found_from_any_directory() -> None:
    """The data directory may be given relative to where the service was started, as it is by default."""
    assert published_directory(Path("data/analytics.duckdb")) == Path.cwd() / "data" / "analytics.duckdb.published"


async def test_nobody_there_is_said_at_once(start_log: LogFactory, tmp_path: Path) -> None:
    alone = await start_log(tmp_path / "log")
    with pytest.raises(ReadFailed) as raised:
        await whole(alone.nc, asked("SELECT 1"))
    assert (raised.value.code, str(raised.value)) == ("unavailable", "the analytics process does not run")
