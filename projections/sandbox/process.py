"""Starts the process that runs a query, reads what it answers, and ends it when it is late."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Literal

import msgspec
import structlog
from msgspec import Struct

log = structlog.get_logger()

Format = Literal["json", "csv", "arrow", "parquet", "ndjson"]

COLUMNS_MAX = 1_000
_CHILD = Path(__file__).with_name("child.py")
_START_SECONDS = 20.0  # loading DuckDB, with the least priority on a machine that has other things to do
_STOP_SECONDS = 2.0  # between the interruption, which nothing sees that works at one value, and the end
_FRAME_BYTES_MAX = 4 * 1024**2
# What a process gets from the environment of the service: nothing. Threads of its own libraries obey DuckDB's limit,
# and allocators reserve no more address space than is used, since that is what the kernel limits.
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "HOME": "/nonexistent",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
_TOO_HEAVY = {signal.SIGXCPU}
_BROKEN = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS}


class QueryRefused(Exception):
    """There is no answer, or no more of it.

    `code`: `sql_invalid`, `sql_not_allowed`, `query_too_heavy`, `unavailable`.
    """

    def __init__(self, code: str, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.fix = fix


class Limits(Struct, frozen=True, kw_only=True):
    """`seconds_max`: of running, without the time that the reader of the answer takes."""

    seconds_max: float = 20.0
    memory_bytes_max: int = 512 * 1024**2
    threads: int = 2


class Job(Struct, frozen=True, kw_only=True):
    """What the process is told. `files` are names in `directory`, `names` those of the views that `views` make.

    `trusted`: our own statement, which is not looked at. `sequence`: its column whose least and greatest are told.
    """

    sql: str
    parameters: list[Any] | dict[str, Any] | None
    format: Format
    directory: str
    files: list[str]
    views: list[str]
    names: tuple[str, ...]
    limit: int | None
    bytes_max: int | None
    seconds_max: float
    cpu_seconds_max: float
    memory_bytes_max: int
    threads: int
    trusted: bool = False
    sequence: str | None = None
    columns_max: int = COLUMNS_MAX


class Frame(Struct, frozen=True):
    """`kind` as in `child`: H, D or E."""

    kind: str
    data: bytes


async def run(job: Job) -> AsyncGenerator[Frame]:
    """The frames of the answer, the last of which is E. The process runs on only as fast as they are taken.

    To be closed (`contextlib.aclosing`), which ends the process if it still runs. Raises: QueryRefused.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(_CHILD),
        str(os.getpid()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,  # what DuckDB says there may hold what was asked
        env=_ENVIRONMENT,
        cwd="/",
        close_fds=True,
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it may have ended; why is found out below
            process.stdin.write(msgspec.json.encode(job))
            await process.stdin.drain()
            process.stdin.close()
        left = _START_SECONDS
        while True:
            began = time.monotonic()
            frame = await _frame(process, job, left)
            # What the reader of the answer takes does not count.
            left -= time.monotonic() - began
            if frame.kind == "X":
                raise _refusal(frame.data)
            if frame.kind == "S":
                left = job.seconds_max + _STOP_SECONDS
                continue
            yield frame
            if frame.kind == "E":
                return
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # Read to its end: what is left in the pipe would keep it open, and the process unwaited for.
        assert process.stdout is not None
        while await process.stdout.read(_FRAME_BYTES_MAX):
            pass
        await process.wait()


async def _frame(process: asyncio.subprocess.Process, job: Job, seconds: float) -> Frame:
    reader = process.stdout
    assert reader is not None
    try:
        async with asyncio.timeout(seconds):
            head = await reader.readexactly(5)
            (size,) = struct.unpack(">I", head[1:])
            if size > _FRAME_BYTES_MAX:
                raise QueryRefused("unavailable", "the process that ran the query spoke nonsense")
            return Frame(head[:1].decode("latin-1"), await reader.readexactly(size))
    except TimeoutError:
        raise _too_slow(job) from None
    except asyncio.IncompleteReadError:
        raise _ended(await process.wait(), job) from None


def _too_slow(job: Job) -> QueryRefused:
    return QueryRefused(
        "query_too_heavy", f"the query did not end within the {job.seconds_max:g} s that it may take", LESS
    )


LESS = "ask for less: a shorter time, fewer columns or groups, or the views of usage by minute, hour and day"


def _ended(code: int, job: Job) -> QueryRefused:
    """What it means that the process ended without a word."""
    number = -code
    if number in _TOO_HEAVY:
        return _too_slow(job)
    if number == signal.SIGXFSZ:
        return QueryRefused("sql_not_allowed", "the query tried to write a file")
    if number in _BROKEN:
        log.warning("query_process_crashed", signal=signal.Signals(number).name)
        return QueryRefused(
            "query_too_heavy", "the query broke the process that ran it", "write it another way, or ask for less"
        )
    log.warning("query_process_ended", code=code)
    return QueryRefused("unavailable", "the process that ran the query was ended from outside")


def _refusal(data: bytes) -> QueryRefused:
    told = msgspec.json.decode(data, type=dict[str, str])
    if told["code"] != "failed":
        return QueryRefused(told["code"], told["message"], told["fix"])
    log.error("query_process_failed", why=told["message"] if " at line " in told["message"] else "the database failed")
    return QueryRefused("query_too_heavy", f"the database could not answer: {told['message']}", "write it another way")
