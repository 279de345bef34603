"""`python -m tests.bench.analytics`, which `make bench-analytics` runs: the analytics store with a month of uses.

The uses are made by `tests.bench.history` and appended to a real nats-server, in blocks as the service's. Then the
service's own analytics process folds them in, and is asked for counts as the API asks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import typing
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import click
import msgspec
from rich.console import Console

from events import codec
from events.server import EmbeddedServer
from events.streams import USAGE, Connection, connect, provision
from projections.analytics.store import store_file
from projections.asking import (
    AnalyticsRefused,
    GroupBy,
    Interval,
    StatusAnswer,
    StatusRequest,
    UsageAnswer,
    UsageRequest,
    ask,
)
from service.settings import Settings
from service.streams import stream_limits
from tests import running
from tests.bench import machine, report
from tests.bench.history import Population
from tests.bench.processes import TICK_SECONDS, machine_cpu
from tests.bench.report import Figure

SEED = 11
USES = 50_000_000
PUBLISHED_AT_ONCE = 64
LAG_USES_PER_SECOND = 5_000
LAG_BLOCK_USES = 25
STATUS_SECONDS = 0.05
CATCH_UP_SECONDS_MAX = 3600.0
GROUPINGS: tuple[GroupBy, ...] = typing.get_args(GroupBy)
INTERVALS: tuple[Interval | None, ...] = (None, "day", "hour")
SHAPES = (*((interval, False) for interval in INTERVALS), (None, True))  # interval, and whether distinct
HEADINGS = (
    *("group_by", "p50 ms", "p99 ms", "by day p50", "by day p99", "by hour p50", "by hour p99"),
    *("distinct p50", "distinct p99"),
)


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """How long the answers to one question took, in milliseconds."""

    group_by: str
    interval: str | None
    distinct: bool
    p50: float
    p99: float
    uses: int


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What one run found. `..._share`: of the time that all cores could have given."""

    machine: machine.Machine
    uses: int
    days: int
    tokens: int
    clients: int
    segments: int
    block_bytes_per_use: float
    ingest_seconds: float
    ingest_cpu_seconds: float
    ingest_others_share: float
    ingest_stolen_share: float
    resident_mib: float
    store_bytes: int
    lag_seconds: float
    lag_segments: int
    query_stolen_share: float
    asked: list[Asked]


class Projector:
    """`token-ledger project analytics`, on the streams of the given server."""

    def __init__(self, server: EmbeddedServer, data_dir: Path, log: Path) -> None:
        self._log = log
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("TOKEN_LEDGER_")}
        self._environment |= {
            "TOKEN_LEDGER_DATA_DIR": str(data_dir),
            "TOKEN_LEDGER_NATS_URL": server.url,
            "TOKEN_LEDGER_NATS_CREDS": str(server.creds("projector")),
        }
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        command = [*running.command(), "project", "analytics"]
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, cwd=running.ROOT, env=self._environment, stdout=log, stderr=log
            )

    @property
    def _proc(self) -> Path:
        assert self._process is not None
        if self._process.returncode is not None:
            raise RuntimeError(f"the analytics process ended with {self._process.returncode}; see {self._log}")
        return Path(f"/proc/{self._process.pid}")

    def cpu_seconds(self) -> float:
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * TICK_SECONDS

    def resident_mib_max(self) -> float:
        lines = (self._proc / "status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            await self._process.wait()


class Bench:
    """One run in a directory of its own."""

    def __init__(
        self, directory: Path, messages: Console, *, uses: int, days: int, tokens: int, clients: int, rounds: int
    ) -> None:
        self._directory = directory
        self._messages = messages
        self._uses = uses
        self._rounds = rounds
        self._clients = clients
        self._population = Population(seed=SEED, clients=clients, tokens=tokens, days=days)
        self._began = time.perf_counter()
        self._bytes = 0
        self._segments = store_file(directory / "data" / "analytics")
        self._segments = self._segments.with_name(self._segments.name + ".segments")

    def say(self, text: str) -> None:
        self._messages.print(f"[{time.perf_counter() - self._began:5.0f} s] {text}", markup=False, highlight=False)

    async def run(self, lag_seconds: float) -> Found:
        described = machine.describe(self._directory)
        async with self._server() as (server, nc):
            self.say(f"recording {self._uses:,} uses of {len(self._population.tokens):,} tokens")
            last = await self._record(nc)
            projector = Projector(server, self._directory / "data", self._directory / "analytics.log")
            self.say("folding them in")
            cpu, began = machine_cpu(), time.monotonic()
            await projector.start()
            try:
                await self._reached(nc, projector, last)
                seconds, used = time.monotonic() - began, projector.cpu_seconds()
                given, after = seconds * machine.cores(), machine_cpu()
                self.say(f"asking for counts, {self._rounds} times each")
                asked, query_stolen = await self._ask_all(nc)
                self.say(f"recording {LAG_USES_PER_SECOND:,} uses a second for {lag_seconds:g} s")
                segments = self._files()
                store_bytes = sum(file.stat().st_size for file in (self._directory / "data" / "analytics").rglob("*.*"))
                lag = await self._lag(nc, lag_seconds)
                return Found(
                    machine=described,
                    uses=self._uses,
                    days=self._population.days,
                    tokens=len(self._population.tokens),
                    clients=self._clients,
                    segments=segments,
                    block_bytes_per_use=self._bytes / self._uses,
                    ingest_seconds=seconds,
                    ingest_cpu_seconds=used,
                    ingest_others_share=max(0.0, after.busy_seconds - cpu.busy_seconds - used) / given,
                    ingest_stolen_share=(after.stolen_seconds - cpu.stolen_seconds) / given,
                    resident_mib=projector.resident_mib_max(),
                    store_bytes=store_bytes,
                    lag_seconds=lag,
                    lag_segments=self._files() - segments,
                    query_stolen_share=query_stolen,
                    asked=asked,
                )
            finally:
                await projector.stop()

    def _files(self) -> int:
        return len(list(self._segments.glob("*.parquet")))

    @contextlib.asynccontextmanager
    async def _server(self) -> AsyncIterator[tuple[EmbeddedServer, Connection]]:
        server = EmbeddedServer(self._directory / "data", 0)
        server.prepare()
        await server.start()
        try:
            await server.wait_ready()
            admin = await connect(server.url, server.creds("admin"), name="bench-admin")
            await provision(admin, stream_limits(Settings()))
            await admin.close()
            nc = await connect(server.url, server.creds("service"), name="bench")
            try:
                yield server, nc
            finally:
                await nc.close()
        finally:
            await server.stop()

    async def _record(self, nc: Connection) -> int:
        """The sequence of the last block."""
        events = ((f"ledger.main.grant.{number}", codec.encode(event), 0) for number, event in self._issues())
        await self._publish(nc, events)
        return await self._publish(nc, (("usage.main.w1", data, size) for data, size in self._blocks()))

    def _issues(self) -> Iterator[tuple[int, typing.Any]]:
        return enumerate(self._population.events())

    def _blocks(self) -> Iterator[tuple[bytes, int]]:
        for data, size in self._population.blocks(self._uses):
            self._bytes += len(data)
            yield data, size

    async def _publish(self, nc: Connection, messages: Iterable[tuple[str, bytes, int]]) -> int:
        js = nc.jetstream()
        waiting: deque[asyncio.Future[typing.Any]] = deque()
        recorded = last = told = 0
        for subject, data, size in messages:
            waiting.append(await js.publish_async(subject, data))
            recorded += size
            if recorded - told >= self._uses / 10:
                told = recorded
                self.say(f"  {recorded:,} of {self._uses:,}")
            if len(waiting) >= PUBLISHED_AT_ONCE:
                last = (await waiting.popleft()).seq
        for one in waiting:
            last = (await one).seq
        return last

    async def _position(self, nc: Connection) -> int:
        answer = await ask(nc, StatusRequest(), StatusAnswer, seconds=30)
        return next(one.position for one in answer.streams if one.stream == USAGE)

    async def _reached(self, nc: Connection, projector: Projector, last: int) -> None:
        async with asyncio.timeout(CATCH_UP_SECONDS_MAX):
            while True:
                projector.cpu_seconds()  # raises if it has ended
                with contextlib.suppress(AnalyticsRefused):
                    if await self._position(nc) >= last:
                        return
                await asyncio.sleep(STATUS_SECONDS)

    async def _ask_all(self, nc: Connection) -> tuple[list[Asked], float]:
        before, began = machine_cpu(), time.monotonic()
        found = []
        for group_by in GROUPINGS:
            for interval, distinct in SHAPES:
                # A series by hour of more days has more points than an answer may.
                days = min(30, self._population.days) if interval == "hour" else self._population.days
                taken = []
                for number in range(self._rounds + 1):
                    # Neither on whole hours nor twice the same.
                    since = self._population.start + timedelta(minutes=7, seconds=number)
                    request = UsageRequest(
                        group_by=group_by,
                        interval=interval,
                        distinct=distinct,
                        from_=since,
                        to=since + timedelta(days=days, hours=-3),
                    )
                    asked_at = time.perf_counter()
                    answer = await ask(nc, request, UsageAnswer)
                    if number:  # the first one is for warming up
                        taken.append((time.perf_counter() - asked_at) * 1e3)
                p50, p99 = (machine.percentile(taken, percent) for percent in (50, 99))
                counted = answer.totals.uses
                found.append(
                    Asked(group_by=group_by, interval=interval, distinct=distinct, p50=p50, p99=p99, uses=counted)
                )
        stolen = machine_cpu().stolen_seconds - before.stolen_seconds
        return found, stolen / ((time.monotonic() - began) * machine.cores())

    async def _lag(self, nc: Connection, seconds: float) -> float:
        """The longest time that an acknowledged use was not in the store yet, with uses coming steadily."""
        blocks = self._population.blocks(int(LAG_USES_PER_SECOND * seconds), block_uses=(LAG_BLOCK_USES,) * 2)
        js = nc.jetstream()
        missing: deque[tuple[int, float]] = deque()
        longest = 0.0
        done = asyncio.Event()

        async def watch() -> None:
            nonlocal longest
            while missing or not done.is_set():
                position, now = await self._position(nc), time.monotonic()
                while missing and missing[0][0] <= position:
                    missing.popleft()
                if missing:
                    longest = max(longest, now - missing[0][1])
                await asyncio.sleep(STATUS_SECONDS)

        watching = asyncio.create_task(watch())
        began, recorded = time.monotonic(), 0
        for data, size in blocks:
            acknowledged = await js.publish("usage.main.w1", data)
            missing.append((acknowledged.seq, time.monotonic()))
            recorded += size
            await asyncio.sleep(max(0.0, began + recorded / LAG_USES_PER_SECOND - time.monotonic()))
        done.set()
        async with asyncio.timeout(60):
            await watching
        return longest


def figures(found: Found) -> list[Figure]:
    sums = [one for one in found.asked if not one.distinct]
    return [
        Figure(
            what="uses folded in",
            value=found.uses / found.ingest_seconds,
            unit="uses/s",
            target=100_000,
            at_least=True,
            note="from the start of the process to the commit of the last",
        ),
        Figure(what="the same: CPU of the process", value=found.ingest_cpu_seconds / found.uses * 1e6, unit="µs a use"),
        Figure(what="the same: CPU of everything else", value=found.ingest_others_share * 100, unit="%"),
        Figure(what="the same: stolen by the machine's host", value=found.ingest_stolen_share * 100, unit="%"),
        Figure(what="the same: memory of the process at most", value=found.resident_mib, unit="MiB"),
        Figure(what="store on disk, everything", value=found.store_bytes / found.uses, unit="bytes a use", target=40),
        Figure(what="USAGE, blocks", value=found.block_bytes_per_use, unit="bytes a use"),
        Figure(
            what="usage queries: median of p50", value=statistics.median(one.p50 for one in sums), unit="ms", target=300
        ),
        Figure(what="slowest grouping: p50", value=max(one.p50 for one in sums if not one.interval), unit="ms"),
        Figure(what="slowest with an interval: p50", value=max(one.p50 for one in sums), unit="ms"),
        Figure(
            what="slowest with `distinct`: p50", value=max(one.p50 for one in found.asked if one.distinct), unit="ms"
        ),
        Figure(what="the same: stolen by the machine's host", value=found.query_stolen_share * 100, unit="%"),
        Figure(
            what=f"lag at {LAG_USES_PER_SECOND:,} uses/s, longest",
            value=found.lag_seconds,
            unit="s",
            target=2,
            note=f"{found.lag_segments} segments were sealed meanwhile",
        ),
    ]


def setting(found: Found) -> str:
    return (
        f"{found.machine.describe()} {found.uses:,} uses of {found.tokens:,} tokens of {found.clients} clients over "
        f"{found.days} days, {found.segments} segments. Each grouping is asked for nearly all of it, from and to the "
        "middle of an hour, over NATS as the API asks."
    )


def lines(found: Found) -> list[tuple[str, ...]]:
    by_name = {(one.group_by, one.interval, one.distinct): one for one in found.asked}
    cells = []
    for name in GROUPINGS:
        times = [by_name[name, *shape] for shape in SHAPES]
        cells.append((name, *(f"{value:.0f}" for one in times for value in (one.p50, one.p99))))
    return cells


def to_markdown(found: Found) -> str:
    return "\n\n".join(
        [
            setting(found),
            report.markdown_table(report.FIGURE_HEADINGS, [report.figure_cells(one) for one in figures(found)]),
            report.markdown_table(HEADINGS, lines(found)),
        ]
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--uses", type=click.IntRange(1000), default=USES, show_default=True)
@click.option("--days", type=click.IntRange(2), default=30, show_default=True)
@click.option("--tokens", type=click.IntRange(10), default=20_000, show_default=True)
@click.option("--clients", type=click.IntRange(1), default=200, show_default=True)
@click.option(
    "--rounds", type=click.IntRange(2), default=20, show_default=True, help="How often each grouping is asked for."
)
@click.option("--lag-seconds", type=click.FloatRange(0.1), default=60, show_default=True)
@click.option("--directory", type=click.Path(file_okay=False, path_type=Path), help="Where the data goes meanwhile.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also writes JSON there.")
def main(
    *,
    uses: int,
    days: int,
    tokens: int,
    clients: int,
    rounds: int,
    lag_seconds: float,
    directory: Path | None,
    json_path: Path | None,
) -> None:
    """Measures the analytics store and prints Markdown. 50 million uses take some 20 minutes and 14 GB of disk."""
    messages = Console(stderr=True)
    work = Path(tempfile.mkdtemp(prefix="token-ledger-bench-analytics-", dir=directory))
    bench = Bench(work, messages, uses=uses, days=days, tokens=tokens, clients=clients, rounds=rounds)
    try:
        found = asyncio.run(bench.run(lag_seconds))
    except (RuntimeError, TimeoutError, AnalyticsRefused) as error:
        messages.print(f"\nmake bench-analytics failed: {error}", style="bold red", markup=False, highlight=False)
        log = work / "analytics.log"
        messages.print(log.read_text()[-2000:] if log.exists() else "", markup=False, highlight=False)
        sys.exit(1)
    finally:
        shutil.rmtree(work)
    if json_path is not None:
        shown = msgspec.to_builtins(found) | {"figures": [msgspec.to_builtins(one) for one in figures(found)]}
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(shown), indent=2))
    click.echo(to_markdown(found))


if __name__ == "__main__":
    main()
