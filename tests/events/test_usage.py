"""The log of uses: durable means on disk, buffered means bounded, and what is lost is counted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import pytest
import pytest_asyncio

from events import codec
from events.errors import LedgerUnavailable
from events.server import EmbeddedServer
from events.streams import USAGE, Connection, RawMessage, follow, stream_state
from events.types import Context, RefusedCount, TokenUsed, UseBlock
from events.usage import UsageLog, UseRecording
from tests.logs import connected, kill, paused, server_with_streams, until

BLOCK_BYTES_MAX = 900_000
BLOCK_ITEMS_MAX = 2000
REFUSED_KEYS_MAX = 10_000
# Two seconds from when it comes; the machine may be busy.
FAILED_SECONDS_MAX = 2 + 6

_numbers = count(1)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    async with server_with_streams(tmp_path_factory.mktemp("usage")) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="session")
async def nc(server: EmbeddedServer) -> AsyncIterator[Connection]:
    async with connected(server) as connection:
        yield connection


def use(caller: str = "tok", *, size: int = 10) -> TokenUsed:
    """A use that no other is equal to."""
    return TokenUsed(next(_numbers), "tok_1", None, "valid", "validate", caller, "", "", Context("::1", "a" * size))


def log_of(nc: Connection, mode: UseRecording = "durable", **options: int) -> UsageLog:
    """With a writer that no other test has."""
    return UsageLog(nc, f"w{next(_numbers)}", mode, **options)


async def blocks_of(log: UsageLog, server: EmbeddedServer) -> list[UseBlock]:
    """What the stream holds of this writer."""
    found: list[UseBlock] = []
    async with connected(server, "projector") as reader:  # the role that may read uses
        state = await stream_state(reader, USAGE)
        if not state["messages"]:
            return found
        async with contextlib.aclosing(follow(reader, USAGE, 0)) as batches:
            async for batch in batches:
                found += [block for message in batch if (block := _block(message)).writer == log._writer]
                if batch and batch[-1].seq >= int(state["last_seq"]):
                    return found
    raise AssertionError("ended")


def _block(message: RawMessage) -> UseBlock:
    assert len(message.data) <= BLOCK_BYTES_MAX
    block = codec.decode_block(message.data)
    assert message.subject == f"usage.main.{block.writer}"
    assert len(block.uses) <= BLOCK_ITEMS_MAX
    return block


async def uses_of(log: UsageLog, server: EmbeddedServer) -> list[TokenUsed]:
    return [found for block in await blocks_of(log, server) for found in block.uses]


# Durable


async def test_durable_use_is_in_the_stream_when_its_future_resolves(server: EmbeddedServer, nc: Connection) -> None:
    log = log_of(nc)
    wanted = [use() for _ in range(5)]
    for one in wanted:
        future = log.record(one)
        assert future is not None
        await future
        assert one in await uses_of(log, server)
    assert wanted == await uses_of(log, server)


async def test_uses_of_one_turn_share_blocks(server: EmbeddedServer, nc: Connection) -> None:
    log = log_of(nc)
    wanted = [use() for _ in range(500)]
    await asyncio.gather(*filter(None, (log.record(one) for one in wanted)))
    blocks = await blocks_of(log, server)
    assert len(blocks) == 1
    assert wanted == await uses_of(log, server)


async def test_many_callers_lose_and_repeat_nothing(server: EmbeddedServer, nc: Connection) -> None:
    log = log_of(nc)
    wanted: list[TokenUsed] = []

    async def call() -> None:
        for _ in range(20):
            mine = [use(), use()]
            future = log.record(*mine)
            assert future is not None
            await future
            wanted.extend(mine)

    await asyncio.gather(*(call() for _ in range(50)))
    assert Counter(wanted) == Counter(await uses_of(log, server))


@pytest.mark.parametrize(("uses", "size"), [(4500, 10), (2000, 1000), (3, 400_000)], ids=["many", "long", "huge"])
async def test_large_crowd_is_cut_into_blocks_of_the_right_size(
    server: EmbeddedServer, nc: Connection, uses: int, size: int
) -> None:
    log = log_of(nc)
    wanted = [use(size=size) for _ in range(uses)]
    future = log.record(*wanted)
    assert future is not None
    await future
    assert wanted == await uses_of(log, server)
    assert len(await blocks_of(log, server)) > 1


async def test_durable_uses_fail_in_time_when_the_log_is_silent_and_go_on_when_it_is_back(
    server: EmbeddedServer, nc: Connection
) -> None:
    log = log_of(nc)
    await asyncio.gather(*filter(None, [log.record(use())]))
    began = time.monotonic()
    with paused(server):
        futures = [log.record(use())]
        await until(lambda: log.waiting == 0, what="the first block is on its way")
        futures += [log.record(use()) for _ in range(300)]
        outcomes = await asyncio.gather(*filter(None, futures), return_exceptions=True)
        assert time.monotonic() - began < FAILED_SECONDS_MAX
        assert {LedgerUnavailable} == {type(outcome) for outcome in outcomes}
    one = use()
    future = log.record(one)
    assert future is not None
    await future
    # What was refused may have been written all the same, and then once.
    assert set(Counter(await uses_of(log, server)).values()) == {1}


async def test_durable_use_fails_at_once_without_a_connection_and_takes_no_other_with_it(tmp_path: Path) -> None:
    async with server_with_streams(tmp_path) as server, connected(server) as nc:
        log = log_of(nc)
        await server.stop()
        await until(lambda: not nc.is_connected, what="the client has noticed")
        for uses in ([use()], []):
            future = log.record(*uses)
            assert future is not None
            with pytest.raises(LedgerUnavailable):
                await future
        assert log.waiting == 0
        await server.start()
        await until(lambda: nc.is_connected, what="the client is back")
        one = use()
        future = log.record(one)
        assert future is not None
        await future
        assert await uses_of(log, server) == [one]


async def test_durable_queue_is_bounded(server: EmbeddedServer, nc: Connection) -> None:
    log = log_of(nc)
    with paused(server):
        futures = [log.record(*(use() for _ in range(1000))) for _ in range(60)]
        refused = [future for future in futures if future is not None and future.done()]
        assert len(refused) == 10
        assert log.waiting == 50_000
        await asyncio.gather(*filter(None, futures), return_exceptions=True)
    assert log.waiting == 0


async def test_use_that_cannot_be_written_fails_those_beside_it_and_nothing_after_it(
    server: EmbeddedServer, nc: Connection
) -> None:
    """A lone surrogate has no UTF-8. It comes from no parser of ours; nobody may wait for ever, should it come."""
    log = log_of(nc)
    futures = [log.record(use()), log.record(use("\ud800"))]
    outcomes = await asyncio.wait_for(asyncio.gather(*filter(None, futures), return_exceptions=True), 5)
    assert [LedgerUnavailable] * 2 == [type(outcome) for outcome in outcomes]
    later = use()
    future = log.record(later)
    assert future is not None
    await asyncio.wait_for(future, 5)
    assert await uses_of(log, server) == [later]


async def test_block_whose_acknowledgement_was_lost_is_stored_once(server: EmbeddedServer, nc: Connection) -> None:
    """The server holds the block until it was sent again: both arrive, one counts."""
    log = log_of(nc)
    one = use()
    before = nc.stats["out_msgs"]
    with paused(server):
        future = log.record(one)
        assert future is not None
        await until(lambda: nc.stats["out_msgs"] - before >= 2, what="a second attempt")
    await asyncio.gather(future, return_exceptions=True)
    assert await uses_of(log, server) == [one]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["durable", "buffered"])
async def test_kill_in_mid_load_loses_nothing_acknowledged_and_repeats_nothing(
    tmp_path: Path, mode: UseRecording
) -> None:
    async with server_with_streams(tmp_path) as server, connected(server) as nc:
        log, ended = log_of(nc, mode), asyncio.Event()
        acknowledged: list[TokenUsed] = []

        async def call() -> None:
            while not ended.is_set():
                one = use()
                try:
                    future = log.record(one)
                    if future is not None:
                        await future
                except LedgerUnavailable:
                    await asyncio.sleep(0.01)
                else:
                    acknowledged.append(one)
                    await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(call())
            for _ in range(2):
                goal = len(acknowledged) + 500
                await until(lambda goal=goal: len(acknowledged) > goal, what="load")
                await kill(server)
            goal = len(acknowledged) + 500
            await until(lambda: len(acknowledged) > goal, what="load after the last kill")
            ended.set()
        await until(lambda: nc.is_connected)
        await log.close()
        stored = Counter(await uses_of(log, server))
        assert set(stored.values()) == {1}
        lost = set(acknowledged) - set(stored)
        assert len(lost) == log.lost == sum(block.lost for block in await blocks_of(log, server))
        assert mode == "buffered" or not lost


# Buffered


async def test_buffered_use_does_not_wait_and_arrives(server: EmbeddedServer, nc: Connection) -> None:
    log = log_of(nc, "buffered")
    wanted = [use() for _ in range(100)]
    assert [log.record(one) for one in wanted] == [None] * 100
    await log.close()
    assert wanted == await uses_of(log, server)


async def test_buffer_is_bounded_and_what_is_lost_is_counted_and_written(
    server: EmbeddedServer, nc: Connection
) -> None:
    log = log_of(nc, "buffered", buffered_uses_max=100)
    with paused(server):
        kept = use()
        log.record(kept)
        await until(lambda: log.waiting == 0, what="the first block is on its way")
        for _ in range(250):
            log.record(use())
        log.record(use(), use())  # two that do not fit are lost as two
        assert log.waiting == 100
        assert log.lost == 152
    await until(lambda: log.waiting == 0, what="the buffer is written")
    await log.close()
    blocks = await blocks_of(log, server)
    assert sum(block.lost for block in blocks) == 152
    assert len([found for block in blocks for found in block.uses]) == 101
    assert log.lost == 152


async def test_buffered_uses_outlive_a_server_that_is_away(tmp_path: Path) -> None:
    async with server_with_streams(tmp_path) as server, connected(server) as nc:
        log = log_of(nc, "buffered")
        await server.stop()
        await until(lambda: not nc.is_connected, what="the client has noticed")
        wanted = [use() for _ in range(50)]
        for one in wanted:
            log.record(one)
        await server.start()
        await until(lambda: nc.is_connected, what="the client is back")
        await log.close()
        assert wanted == await uses_of(log, server)
        assert log.lost == 0


@pytest.mark.parametrize("mode", ["durable", "buffered"])
async def test_close_is_bounded_while_the_log_is_silent_and_counts_what_is_lost(
    server: EmbeddedServer, nc: Connection, mode: UseRecording
) -> None:
    log = log_of(nc, mode)
    with paused(server):
        futures = [log.record(use())]
        await until(lambda: log.waiting == 0)
        futures += [log.record(use()) for _ in range(10)]
        log.count_refused(caller="", ip=None, outcome="unknown", endpoint="api")
        began = time.monotonic()
        await log.close()
        assert time.monotonic() - began < 8
    await asyncio.gather(*filter(None, futures), return_exceptions=True)
    assert log.lost == (11 if mode == "buffered" else 0)


# Refused


def counted(blocks: list[UseBlock]) -> Counter[tuple[str, str | None, str, str]]:
    found: Counter[tuple[str, str | None, str, str]] = Counter()
    for block in blocks:
        for one in block.refused:
            found[one.caller, one.ip, one.outcome, one.endpoint] += one.count
    return found


async def test_refused_requests_are_counted_by_caller_address_outcome_and_endpoint(
    server: EmbeddedServer, nc: Connection
) -> None:
    log = log_of(nc)
    minute = int(time.time()) // 60
    for _ in range(3):
        log.count_refused(caller="tok_1", ip="192.0.2.1", outcome="unknown", endpoint="validate")
    log.count_refused(caller="", ip=None, outcome="malformed", endpoint="api")
    await log.close()
    blocks = await blocks_of(log, server)
    wanted = {("tok_1", "192.0.2.1", "unknown", "validate"): 3, ("", None, "malformed", "api"): 1}
    assert wanted == counted(blocks)
    assert all(minute <= one.minute <= minute + 1 for block in blocks for one in block.refused)


async def test_counts_go_with_the_next_block(server: EmbeddedServer, nc: Connection) -> None:
    log = log_of(nc)
    log.count_refused(caller="", ip=None, outcome="unknown", endpoint="api")
    future = log.record(use())
    assert future is not None
    await future
    [block] = await blocks_of(log, server)
    assert len(block.refused) == len(block.uses) == 1
    await log.close()
    assert len(await blocks_of(log, server)) == 1


async def test_counts_are_bounded_and_complete_and_fit_into_blocks(server: EmbeddedServer, nc: Connection) -> None:
    """As many callers as a flood can name, each as long as it can be: uses must still get through."""
    log = log_of(nc)
    for number in range(REFUSED_KEYS_MAX + 500):
        log.count_refused(
            caller=f"tok_{number:032x}",
            ip=f"2001:db8:ffff:ffff:ffff:ffff:{number % 65536:04x}:ffff",
            outcome="insufficient_scope",
            endpoint="forward-auth",
        )
    one = use()
    future = log.record(one)
    assert future is not None
    await future
    await log.close()
    found = counted(await blocks_of(log, server))
    assert sum(found.values()) == REFUSED_KEYS_MAX + 500
    assert found["", None, "insufficient_scope", "forward-auth"] == 500
    assert await uses_of(log, server) == [one]


async def test_counts_outlive_a_failure_and_are_counted_once(server: EmbeddedServer, nc: Connection) -> None:
    log = log_of(nc)
    with paused(server):
        for _ in range(2):
            for number in range(REFUSED_KEYS_MAX):
                log.count_refused(caller=f"tok_{number}", ip=None, outcome="unknown", endpoint="api")
            future = log.record(use())
            assert future is not None
            with pytest.raises(LedgerUnavailable):
                await future
    await log.close()
    found = counted(await blocks_of(log, server))
    # The attempts that failed for us may have been stored all the same: at most one block of counts each.
    total = sum(found.values())
    assert 2 * REFUSED_KEYS_MAX <= total <= 2 * REFUSED_KEYS_MAX + 2 * BLOCK_ITEMS_MAX * 2


async def test_counts_that_cannot_be_written_are_not_tried_again_at_once(tmp_path: Path) -> None:
    """A try costs the worker, and an outage may last."""
    async with server_with_streams(tmp_path) as server, connected(server) as nc:
        tries = 0

        class Counting(UsageLog):
            async def _send(self) -> None:
                nonlocal tries
                tries += 1
                await super()._send()

        log = Counting(nc, "counting")
        await server.stop()
        await until(lambda: not nc.is_connected)
        log.count_refused(caller="", ip=None, outcome="unknown", endpoint="api")
        log._flush_refused()
        await until(lambda: tries == 1 and not log._in_flight)
        for _ in range(1000):
            await asyncio.sleep(0)
        assert tries == 1
        assert log._refused
        assert log._refused_timer is not None
        await log.close()


async def test_time_of_a_use_begins_when_it_comes_and_not_when_it_is_sent(
    server: EmbeddedServer, nc: Connection
) -> None:
    deadlines: list[float] = []

    class Noting(UsageLog):
        async def _send_block(
            self, uses: list[TokenUsed], counts: tuple[RefusedCount, ...], lost: int, deadline: float
        ) -> None:
            deadlines.append(deadline)
            await super()._send_block(uses, counts, lost, deadline)

    log = Noting(nc, f"w{next(_numbers)}")
    with paused(server):
        first = log.record(use())
        await until(lambda: len(deadlines) == 1)
        second = log.record(use())
        came_before = time.monotonic()
        assert first is not None
        assert second is not None
        outcomes = await asyncio.gather(first, second, return_exceptions=True)
        assert [LedgerUnavailable] * 2 == [type(outcome) for outcome in outcomes]
    assert deadlines[0] <= deadlines[1] <= came_before + 2.0  # although the first block took two seconds
    await log.close()


async def test_lone_caller_waits_for_nobody_after_a_crowd(server: EmbeddedServer, nc: Connection) -> None:
    log = log_of(nc)
    await asyncio.gather(*(future for _ in range(50) if (future := log.record(use())) is not None))
    for _ in range(2):
        batch = log.record(*(use() for _ in range(100)))
        assert batch is not None
        await batch
    log._together_at -= 1  # a second later
    alone = log.record(use())
    assert alone is not None
    assert log._in_flight
    assert log._linger is None
    await alone
    await log.close()


def test_count_of_the_codec_is_what_is_counted() -> None:
    assert RefusedCount.__struct_fields__ == ("minute", "caller", "ip", "outcome", "endpoint", "count")
