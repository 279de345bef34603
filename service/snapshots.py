"""Snapshots of what is revoked, as files: read from the view in small steps, sent by the HTTP server.

However many ask, a worker makes one at a time, and hands one on for a short while: longer if it took longer to make, or
if so many are being sent that no other may be made. An older one is as good, since the feed goes on from it. Its feed
is named by who asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import lmdb
import msgspec
from msgspec import Struct

from projections.current import CurrentReader, Freshness
from projections.revoked import Revoked, revoked
from service.errors import Unavailable
from service.tokens import now

_HANDED_ON_SECONDS_MIN = 2.0
_HANDED_ON_TIMES = 4  # as long as it took to make it, so that a worker reads the view for others at most of its time
_FILES_MAX = 6  # that there are at once
_LEFT_SECONDS = 3_600.0  # a file that no worker can be writing any more
_TURN_SECONDS = 0.001  # after which whoever else is to be answered has a turn
_ATTEMPTS_MAX = 3
_BUFFER_BYTES = 256 * 1024

_encode = msgspec.json.Encoder().encode


class Head(Struct, frozen=True):
    """The first line. All revocations up to `ledger_seq` are in it: go on from there."""

    feed: str
    ledger_seq: int
    taken_at: datetime


class End(Struct, frozen=True):
    """The last line: without it the snapshot broke off."""

    end: bool
    revocations: int


class Snapshot(Struct, frozen=True, gc=False):
    """A whole file, or what is to be one."""

    path: Path
    size: int
    feed: str
    ledger_seq: int
    good_until: float  # monotonic


class Snapshots:
    """The snapshots of one worker."""

    def __init__(self, view: CurrentReader, directory: Path) -> None:
        self._view = view
        self._directory = directory
        self._numbers = itertools.count(1)
        self._kept: dict[Snapshot, int] = {}  # the newest last, and to how many each is being sent
        self._making: asyncio.Task[Snapshot] | None = None
        self._making_feed = ""

    async def get(self, feed: str) -> Snapshot:
        """One that is at most as old as it may be, to be held at once. Raises: Unavailable."""
        last = next((one for one in reversed(self._kept) if one.feed == feed), None)
        if last is not None and time.monotonic() < last.good_until:
            return last
        if self._making is None or self._making.done() or self._making_feed != feed:
            self._sweep()
            if len(self._kept) >= _FILES_MAX:
                if last is not None:
                    return last
                raise Unavailable("too many snapshots are being sent", retry_after_seconds=2)
            self._making, self._making_feed = asyncio.create_task(self._make(feed)), feed
        # Whoever hangs up leaves it to the others who wait for it.
        return await asyncio.shield(self._making)

    def hold(self, made: Snapshot) -> None:
        """It stays until `let_go`. Raises: Unavailable if it is gone already."""
        if made not in self._kept:
            raise Unavailable("the snapshot was removed before it could be sent", retry_after_seconds=1)
        self._kept[made] += 1

    def let_go(self, made: Snapshot) -> None:
        """Whoever has held it does not need it any more."""
        if made in self._kept:
            self._kept[made] -= 1
            self._sweep()

    def close(self) -> None:
        """Removes what is there."""
        if self._making is not None:
            self._making.cancel()
        for made in self._kept:
            made.path.unlink(missing_ok=True)
        self._kept.clear()

    async def _make(self, feed: str) -> Snapshot:
        try:
            for _ in range(_ATTEMPTS_MAX):
                with contextlib.suppress(lmdb.Error):  # the view was rebuilt meanwhile, and this one is another
                    return self._keep(await self._write(feed))
        except OSError as error:
            raise Unavailable("there is no room for the snapshot", private=str(error)) from error
        raise Unavailable("the view was rebuilt again and again while it was read")

    def _keep(self, made: Snapshot) -> Snapshot:
        self._kept[made] = 0
        asyncio.get_running_loop().call_later(made.good_until - time.monotonic() + 1, self._sweep)
        return made

    def _sweep(self) -> None:
        """Removes what nobody is sent and nobody is handed any more."""
        for made in [one for one, holders in self._kept.items() if not holders]:
            if time.monotonic() >= made.good_until:
                del self._kept[made]
                made.path.unlink(missing_ok=True)

    async def _write(self, feed: str) -> Snapshot:
        path, begun = self._new_path(), time.monotonic()
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", _BUFFER_BYTES) as file:
                fresh = await self._write_lines(file, feed)
                size = file.tell()
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        ended = time.monotonic()
        good_until = ended + max(_HANDED_ON_SECONDS_MIN, _HANDED_ON_TIMES * (ended - begun))
        return Snapshot(path, size, feed, fresh.position, good_until)

    async def _write_lines(self, file: BinaryIO, feed: str) -> Freshness:
        moment, count, begun = now(), 0, time.monotonic()
        with revoked(self._view, moment) as found:
            file.write(_encode(Head(feed, found.fresh.position, moment)) + b"\n")
            for batch in found.batches:
                count += len(batch)
                if batch:
                    file.write(_lines(batch))
                if time.monotonic() - begun > _TURN_SECONDS:
                    await asyncio.sleep(0)
                    begun = time.monotonic()
            file.write(_encode(End(True, count)) + b"\n")
            return found.fresh

    def _new_path(self) -> Path:
        """What a killed worker left is removed."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        for left in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                    left.unlink()
        return self._directory / f"{os.getpid()}-{next(self._numbers)}.ndjson"


def _lines(batch: list[Revoked]) -> bytes:
    return b"".join(line for one in batch for line in (_encode(one), b"\n"))
