"""Streams of followers that are far behind, as a worker writes them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from events.ledger import Ledger
from events.server import EmbeddedServer
from service import following
from service.errors import Unavailable
from service.feed import Feed, Filters
from service.following import events
from tests.logs import connected, server_with_streams, until
from tests.making import grt
from tests.projections.test_feed import append, feeding, reached

ANNOUNCED = 3_000  # before the worker began, so that it reads them from the stream
PAGES = ANNOUNCED // following._READ_MAX
NOTHING_FITS = Filters(grant_id=grt(10**6))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    async with server_with_streams(tmp_path_factory.mktemp("behind") / "nats") as one:
        yield one


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def feed(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Feed]:
    """One that has begun after all that was announced."""
    directory: Path = tmp_path_factory.mktemp("feed")
    async with connected(server) as nc, connected(server) as reading, feeding(server, directory) as announcing:
        seqs = await append(Ledger(nc), 1, ANNOUNCED)
        await reached(announcing, seqs[-1])
        one = Feed(reading)
        await one.start()
        await until(lambda: one.position.ledger_seq >= seqs[-1])
        yield one
        one.stop()


async def may() -> bool:
    return True


async def nobody_knows() -> bool:
    raise Unavailable("the view stands still")


def id_of(part: bytes) -> int:
    return int(re.findall(rb"^id: (\d+)$", part, re.MULTILINE)[-1])


async def test_stream_far_behind_says_where_it_is_and_asks_whether_it_may_go_on(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A follower that nothing fits would else have no byte, and no cursor, until all was read for it."""
    monkeypatch.setattr(following, "_POSITION_SECONDS", 0.0)
    asked = 0

    async def may_for_a_while() -> bool:
        nonlocal asked
        asked += 1
        return asked < PAGES

    async with asyncio.timeout(60):
        retry, *parts = [part async for part in events(feed, 0, NOTHING_FITS, may_for_a_while)]
    assert retry.startswith(b"retry:")
    assert asked == PAGES
    assert len(parts) == PAGES - 1
    ids = [id_of(part) for part in parts]
    assert ids == sorted(set(ids))
    assert all(part == b"id: %d\n\n" % one for part, one in zip(parts, ids, strict=True))


async def test_stream_far_behind_looks_for_its_place_once(feed: Feed) -> None:
    """Each page after the first begins where the one before has ended."""
    before = feed._nc.stats["out_msgs"]
    async with asyncio.timeout(60):
        async for part in events(feed, 0, NOTHING_FITS, may):
            if b"event: position" in part:
                break
    searching = ANNOUNCED.bit_length() + 2
    beside = 10  # positions that are asked for meanwhile
    assert feed._nc.stats["out_msgs"] - before <= searching + PAGES + 1 + beside


async def test_place_is_taken_only_if_the_cursor_stands_there(feed: Feed) -> None:
    """Of a feed that was begun anew, an old place could lie far behind the cursor."""
    expected = (await feed.read(0, 10)).entries
    for place in (expected[8].stream_seq, 7, ANNOUNCED, ANNOUNCED + 5):
        assert (await feed.read(expected[8].ledger_seq, 1, place)).entries == [expected[9]], place


async def test_stream_whose_follower_cannot_be_checked_for_too_long_ends(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_POSITION_SECONDS", 0.0)
    stream = events(feed, 0, NOTHING_FITS, nobody_knows)
    async with asyncio.timeout(60):
        for _ in range(3):  # for a moment it goes on
            await anext(stream)
        monkeypatch.setattr(following, "_UNCHECKED_SECONDS_MAX", 0.0)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
