"""Runs wrk and reads its numbers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import msgspec

LUA = Path(__file__).parent / "lua"
SEED = 20
MISSING = (
    "make bench needs wrk, and there is none on the PATH. To install it:\n"
    "    Debian, Ubuntu:  apt-get install wrk\n"
    "    Fedora:          dnf install wrk\n"
    "    Alpine:          apk add wrk\n"
    "    macOS:           brew install wrk"
)


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of wrk found. Times in ms.

    `answers`: how many answers of each kind, `<status> <what the script's check said>`, only if they were looked
    at. `failed`: answers of 400 and above, and connections that failed or timed out.
    """

    requests: int
    seconds: float
    bytes_read: int
    failed: int
    p50: float
    p90: float
    p99: float
    longest: float
    answers: dict[str, int]

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds


class WrkFailed(Exception):
    """wrk ended with an error or without numbers; holds its output."""


def find() -> str | None:
    """Path of wrk, None if it is not installed."""
    return shutil.which("wrk")


def parse(output: str) -> Run:
    """The numbers in the output of a run with one of our scripts.

    Raises: WrkFailed
    """
    line = re.search(r"^BENCH (\{.*\})$", output, re.MULTILINE)
    if line is None:
        raise WrkFailed(f"wrk printed no numbers:\n{output}")
    found = msgspec.json.decode(line[1], type=dict[str, dict[str, float]])
    numbers = found["numbers"]
    if not numbers["requests"]:
        raise WrkFailed(f"no request was answered:\n{output}")
    errors = ("refused", "connect_errors", "read_errors", "write_errors", "timeouts")
    return Run(
        requests=int(numbers["requests"]),
        seconds=numbers["duration_us"] / 1e6,
        bytes_read=int(numbers["bytes"]),
        failed=int(sum(numbers[name] for name in errors)),
        p50=numbers["p50_us"] / 1e3,
        p90=numbers["p90_us"] / 1e3,
        p99=numbers["p99_us"] / 1e3,
        longest=numbers["max_us"] / 1e3,
        answers={label: int(count) for label, count in found["answers"].items()},
    )


def run(
    script: str, port: int, settings: dict[str, str], *, connections: int, seconds: float, check: bool = False
) -> Run:
    """One run of `lua/<script>.lua` against 127.0.0.1:`port`.

    One thread for each two cores, since the service needs the others. `settings`: BENCH_* for the script, without
    the prefix. `check`: looks at every answer, which slows wrk; without, only failures are counted.

    Raises: WrkFailed
    """
    threads = max(1, (os.cpu_count() or 1) // 2)
    program = find()
    if program is None:
        raise WrkFailed(MISSING)
    environment = {f"BENCH_{name}": value for name, value in settings.items()} | {
        "BENCH_LUA": str(LUA),
        "BENCH_HOST": f"127.0.0.1:{port}",
        "BENCH_SEED": str(SEED),
        "BENCH_THREADS": str(threads),
        "BENCH_CHECK": "1" if check else "0",
        "PATH": os.environ["PATH"],
    }
    ended = subprocess.run(
        [
            program,
            *("-t", str(threads), "-c", str(max(connections, threads)), "-d", f"{max(1, round(seconds))}s"),
            *("--timeout", "10s", "-s", str(LUA / f"{script}.lua"), f"http://127.0.0.1:{port}/"),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if ended.returncode != 0:
        raise WrkFailed(f"wrk ended with {ended.returncode}:\n{ended.stdout}")
    return parse(ended.stdout)
