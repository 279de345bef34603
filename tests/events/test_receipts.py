"""The log of receipts: recording waits for nothing, what was heard is kept with its time, and nothing grows."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from itertools import count

import pytest
import pytest_asyncio

from events import codec
from events.errors import LedgerUnavailable
from events.receipts import ReceiptLog, now_us
from events.server import EmbeddedServer
from events.streams import RECEIPTS, Connection, follow, stream_state
from events.types import Receipt
from tests.logs import connected, kill, paused, server_with_streams, until

STEPS_MAX = 16
FOLLOWERS_MAX = 5_000

_numbers = count(1)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    async with server_with_streams(tmp_path_factory.mktemp("receipts")) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="session")
async def nc(server: EmbeddedServer) -> AsyncIterator[Connection]:
    async with connected(server) as connection:
        yield connection


def log_of(nc: Connection) -> ReceiptLog:
    """With a writer that no other test has."""
    return ReceiptLog(nc, f"w{next(_numbers)}")


async def blocks_of(log: ReceiptLog, server: EmbeddedServer) -> list[tuple[Receipt, ...]]:
    """What the stream holds of this writer."""
    found: list[tuple[Receipt, ...]] = []
    async with connected(server, "projector") as reader:
        end = int((await stream_state(reader, RECEIPTS))["last_seq"])
        async with contextlib.aclosing(follow(reader, RECEIPTS, 0)) as batches:
            async for batch in batches:
                for message in batch:
                    block = codec.decode_receipts(message.data)
                    assert message.subject == f"receipts.main.{block.writer}"
                    if block.writer == log._writer:
                        found.append(block.receipts)
                if batch and batch[-1].seq >= end:
                    return found
    raise AssertionError("ended")


async def test_receipts_of_a_moment_are_one_block_and_keep_their_times(nc, server):
    log, before = log_of(nc), now_us()
    for follower in ("sub_a", "sub_b"):
        for seq in (1, 2):
            log.record(follower, seq)
    await log.written()
    (receipts,) = await blocks_of(log, server)
    assert [(one.follower, one.ledger_seq) for one in receipts] == [
        ("sub_a", 1),
        ("sub_a", 2),
        ("sub_b", 1),
        ("sub_b", 2),
    ]
    assert all(before <= one.applied_at_us <= now_us() for one in receipts)


async def test_receipt_with_a_time_is_written_with_it(nc, server):
    log = log_of(nc)
    log.record("sub_a", 7, 1_000)
    log.record("sub_a", 7, 1_000)
    await log.written()
    assert await blocks_of(log, server) == [(Receipt("sub_a", 7, 1_000), Receipt("sub_a", 7, 1_000))]


async def test_same_receipt_again_is_not_written_again(nc, server):
    log = log_of(nc)
    for _ in range(3):
        log.record("sub_a", 7)
        await log.written()
    assert len(await blocks_of(log, server)) == 1


async def test_receipt_before_the_last_one_is_written_only_of_another_feed(nc, server):
    """A follower that goes back and forth would push everybody's receipts out of the stream."""
    log = log_of(nc)
    for seq in (7, 1, 7, 2, 9, 3):
        log.record("sub_a", seq, feed="one")
    log.record("sub_a", 3, feed="another")
    await log.written()
    (receipts,) = await blocks_of(log, server)
    assert [one.ledger_seq for one in receipts] == [7, 9, 3]


async def test_receipt_that_could_not_be_written_is_written_when_it_comes_again(nc, server):
    log = log_of(nc)
    with paused(server):
        log.record("sub_a", 7)
        await log.close()
        await until(lambda: log.lost == 1, what="it was given up")
    log.record("sub_a", 7)
    assert log._waiting.keys() == {"sub_a"}
    await log.close()


async def test_too_many_receipts_of_a_follower_become_the_last_and_never_an_earlier_time(nc, server):
    log = log_of(nc)
    heard = {}
    for seq in range(1, 101):
        log.record("sub_a", seq)
        heard[seq] = now_us()
    await log.written()
    (receipts,) = await blocks_of(log, server)
    assert len(receipts) == STEPS_MAX
    assert receipts[-1].ledger_seq == 100
    assert all(one.applied_at_us <= heard[one.ledger_seq] for one in receipts)
    for seq in heard:  # the first receipt that reaches it came no earlier than the one before it was heard
        told = next(one.applied_at_us for one in receipts if one.ledger_seq >= seq)
        assert told >= heard.get(seq - 1, 0)


async def test_receipts_of_too_many_followers_are_lost_and_counted(nc, server):
    log = log_of(nc)
    for number in range(FOLLOWERS_MAX + 10):
        log.record(f"sub_{number}", 1)
    assert log.lost == 10
    await log.written()
    assert sum(len(block) for block in await blocks_of(log, server)) == FOLLOWERS_MAX


async def test_receipts_outlive_a_killed_server(nc, server):
    log = log_of(nc)
    log.record("sub_a", 1)
    await kill(server)
    log.record("sub_a", 2)
    while True:
        with contextlib.suppress(LedgerUnavailable):  # a busy machine may need longer than one wait
            await log.written()
            break
    found = [(one.follower, one.ledger_seq) for block in await blocks_of(log, server) for one in block]
    assert sorted(set(found)) == [("sub_a", 1), ("sub_a", 2)]


async def test_written_is_refused_while_the_server_does_not_answer(nc, server):
    log = log_of(nc)
    with paused(server):
        log.record("sub_a", 1)
        with pytest.raises(LedgerUnavailable, match="in time"):
            await log.written()
    while True:
        with contextlib.suppress(LedgerUnavailable):
            await log.written()
            break
    assert [len(block) for block in await blocks_of(log, server)] == [1]


async def test_close_writes_what_waits(nc, server):
    log = log_of(nc)
    log.record("sub_a", 1)
    await log.close()
    assert len(await blocks_of(log, server)) == 1
