"""Snapshots of what is revoked as files of one worker: made once for all who ask, whole, and gone afterwards."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from events.streams import LEDGER
from events.types import Reason, TokenRevoked
from projections.base import boot_time_ns
from projections.current import CurrentReader, CurrentWriter, view_path
from service import snapshots as snapshots_module
from service.errors import Unavailable
from service.snapshots import Snapshot, Snapshots
from tests.making import History, grt, head, issued, minted, tok
from tests.other_process import Remote

TOKENS = 2_000


def revoked_tokens(count: int) -> History:
    history = History()
    for number in range(count):
        history.add(
            issued(grt(number), minted(tok(number))),
            TokenRevoked(**head(), grant_id=grt(number), token_id=tok(number), reason=Reason.ADMIN),
        )
    return history


@pytest_asyncio.fixture
async def snapshots(tmp_path: Path) -> AsyncIterator[Snapshots]:
    path, history = view_path(tmp_path), revoked_tokens(TOKENS)
    writer = CurrentWriter(path, sync=False)
    writer.apply(LEDGER, history.raw())
    writer.confirm(LEDGER, history.end, boot_time_ns())
    writer.close()
    view = CurrentReader(path)
    made = Snapshots(view, tmp_path / "snapshots")
    yield made
    made.close()
    view.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_snapshot_is_made_once_for_all_who_ask_and_is_whole(snapshots: Snapshots) -> None:
    made = await asyncio.gather(*(snapshots.get("feed") for _ in range(10)))
    assert len({one.path for one in made}) == 1
    [first, *revoked, last] = lines(made[0].path)
    assert made[0].size == made[0].path.stat().st_size
    assert made[0].path.stat().st_mode & 0o777 == 0o600
    assert (first["feed"], first["ledger_seq"]) == ("feed", 2 * TOKENS)
    assert last == {"end": True, "revocations": TOKENS}
    assert {one["token_id"] for one in revoked} == {tok(number) for number in range(TOKENS)}


async def test_snapshot_of_another_feed_is_another(snapshots: Snapshots) -> None:
    one, other = await snapshots.get("one"), await snapshots.get("other")
    assert lines(one.path)[0]["feed"] == "one"
    assert lines(other.path)[0]["feed"] == "other"


async def test_others_have_their_turn_while_a_snapshot_is_made(snapshots: Snapshots) -> None:
    making = asyncio.create_task(snapshots.get("feed"))
    turns = 0
    while not making.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 3


async def test_whoever_hangs_up_leaves_the_snapshot_to_the_others(snapshots: Snapshots) -> None:
    impatient, patient = asyncio.create_task(snapshots.get("feed")), asyncio.create_task(snapshots.get("feed"))
    await asyncio.sleep(0)
    impatient.cancel()
    made = await patient
    assert lines(made.path)[-1]["end"] is True


async def test_snapshot_of_a_view_that_is_replaced_meanwhile_is_begun_again(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    with Remote("projections.current:CurrentWriter", view_path(tmp_path), sync=False) as writer:
        making = asyncio.create_task(snapshots.get("feed"))
        while not list((tmp_path / "snapshots").glob("*")):  # noqa: ASYNC110 - another task makes the file
            await asyncio.sleep(0)
        writer.call("reset")
        writer.call("apply", LEDGER, revoked_tokens(3).raw())
        snapshots._view.freshness()  # as any request of the worker would
        made = await making
    # What was read of the old view alone, or of the new one alone: never of both.
    assert lines(made.path)[-1] == {"end": True, "revocations": 3}
    assert len(list((tmp_path / "snapshots").iterdir())) == 1


async def test_files_are_removed_in_the_end_and_those_of_a_killed_worker_later(
    snapshots: Snapshots, tmp_path: Path
) -> None:
    directory = tmp_path / "snapshots"
    directory.mkdir()
    left, recent = directory / "4711-1.ndjson", directory / "4712-1.ndjson"
    for path in (left, recent):
        path.touch()
    os.utime(left, (0, 0))
    made = await snapshots.get("feed")
    assert not left.exists()
    assert recent.exists()
    snapshots.close()
    assert not made.path.exists()


async def test_snapshot_without_room_is_unavailable(snapshots: Snapshots, tmp_path: Path) -> None:
    (tmp_path / "snapshots").write_text("no directory")
    with pytest.raises(Unavailable, match="no room"):
        await snapshots.get("feed")


def files(directory: Path) -> int:
    return len(list((directory / "snapshots").iterdir()))


async def test_snapshots_that_are_being_sent_are_so_many_at_most(
    snapshots: Snapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever does not read would else have a new file each made for them, and the disk full."""
    monkeypatch.setattr(snapshots_module, "_HANDED_ON_SECONDS_MIN", 0.0)
    monkeypatch.setattr(snapshots_module, "_HANDED_ON_TIMES", 0)
    most, sent = snapshots_module._FILES_MAX, list[Snapshot]()
    for _ in range(3 * most):
        made = await snapshots.get("feed")
        snapshots.hold(made)
        sent.append(made)
        assert made.path.exists()
    assert files(tmp_path) == len(set(sent)) == most
    assert set(sent[most:]) == {sent[most - 1]}  # the newest
    with pytest.raises(Unavailable, match="too many"):
        await snapshots.get("another feed")
    for made in sent:
        snapshots.let_go(made)
    assert files(tmp_path) == 0
    with pytest.raises(Unavailable, match="removed"):
        snapshots.hold(made)
    assert await snapshots.get("feed") not in sent


async def test_snapshot_that_takes_long_is_handed_on_for_longer(
    snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One who asks again and again would else keep the worker reading the view."""
    monkeypatch.setattr(snapshots_module, "_HANDED_ON_SECONDS_MIN", 0.0)
    monkeypatch.setattr(snapshots_module, "_HANDED_ON_TIMES", 10**6)
    assert await snapshots.get("feed") == await snapshots.get("feed")
