"""What is measured between the rows: size of the view, memory, restart, replay."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec

from projections.current import CurrentReader, view_path
from tests import running
from tests.bench.processes import Memory, memory, wait_ready

REBUILD_SECONDS_MAX = 600


class View(msgspec.Struct, frozen=True, kw_only=True):
    """The view's file. `bytes_used`: pages of all tables; `bytes_file`: free ones included."""

    tokens: int
    bytes_used: int
    bytes_file: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes_used / self.tokens


def view(data_dir: Path) -> View:
    """The view as it is on disk."""
    reader = CurrentReader(view_path(data_dir))
    try:
        stats = reader.stats()
    finally:
        reader.close()
    return View(tokens=stats["token"], bytes_used=stats["bytes_used"], bytes_file=stats["bytes_file"])


def workers_memory(service: running.Service) -> list[Memory]:
    """Of every API worker."""
    return [memory(worker.pid) for worker in service.workers()]


class Restart(msgspec.Struct, frozen=True, kw_only=True):
    stop_seconds: float
    ready_seconds: float


def restart(service: running.Service, directory: Path, **settings: Any) -> tuple[running.Service, Restart]:
    """SIGTERM, wait, start again on the same data: until every worker says that it is ready."""
    workers, port = len(service.workers()), service.port
    began = time.perf_counter()
    service.stop()
    stopped = time.perf_counter()
    again = running.start(directory, workers=workers, port=port, **settings)
    wait_ready(again, workers)
    return again, Restart(stop_seconds=stopped - began, ready_seconds=time.perf_counter() - stopped)


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` is of the whole command, its start included."""

    events: int
    seconds: float

    @property
    def per_second(self) -> float:
        return self.events / self.seconds


def rebuild(service: running.Service) -> Replay:
    """`token-ledger rebuild current` beside the running service."""
    began = time.perf_counter()
    ended = subprocess.run(
        [*running.command(), "rebuild", "current", "--data-dir", str(service.data_dir), "-o", "json"],
        cwd=running.ROOT,
        capture_output=True,
        text=True,
        timeout=REBUILD_SECONDS_MAX,
        check=False,
    )
    seconds = time.perf_counter() - began
    if ended.returncode != 0:
        raise RuntimeError(f"rebuild current ended with {ended.returncode}: {ended.stdout}{ended.stderr}")
    return Replay(events=int(json.loads(ended.stdout)["replayed"]), seconds=seconds)
