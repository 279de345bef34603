"""`python -m tests.bench`, which `make bench` runs."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from tests import running
from tests.bench import followers, load, machine, report, revocation, upkeep, wrk
from tests.bench.fill import Filled, fill
from tests.bench.processes import Echo, Memory, echo, settle, wait_ready
from tests.bench.revocation import Revocations

_RECEIVERS = {"webhook_allowed_networks": "127.0.0.1/32"}
_FOLLOWERS = {"NATS": 13, "SSE": 13, "long poll": 12, "webhook": 12}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how much."""

    tokens: int
    connections: int
    row_seconds: float
    echo_seconds: float
    revocations: int
    followers: dict[str, int]
    workers: int


class Bench:
    """One run: a service on a directory of its own, and what was found so far."""

    def __init__(self, plan: Plan, directory: Path, messages: Console) -> None:
        self.plan = plan
        self.directory = directory
        self.messages = messages
        self.began = time.perf_counter()
        self.port = running.free_port()  # the same for every start: the issuer, and so the audience, holds it
        self.service: running.Service | None = None

    def say(self, text: str) -> None:
        self.messages.print(f"[{time.perf_counter() - self.began:5.0f} s] {text}", markup=False, highlight=False)

    def start(self, **settings: Any) -> running.Service:
        workers = self.plan.workers
        self.service = running.start(self.directory, workers=workers, port=self.port, **_RECEIVERS, **settings)
        wait_ready(self.service, workers)
        return self.service

    def stop(self) -> None:
        """Whatever happened: ends the service."""
        if self.service is not None and self.service.process.returncode is None:
            self.service.stop()

    def run(self, *, quick: bool) -> report.Report:
        plan = self.plan
        described = machine.describe(self.directory)
        self.say(f"starting the service with {plan.workers} workers")
        service = self.start()
        self.say(f"filling the ledger with {plan.tokens:,} tokens")
        filled = asyncio.run(fill(service, plan.tokens, self.directory, self._written))
        settle(service)
        view = upkeep.view(service.data_dir)
        self.say("stopping and starting again")
        service, restarted = upkeep.restart(service, self.directory, **_RECEIVERS)
        self.service = service
        self.say("rebuilding the view")
        settle(service)
        replayed = upkeep.rebuild(service)
        settle(service)
        with echo(plan.workers, self.directory / "echo.log") as bare:
            rows, memory, revoked = self._rows(service, bare, filled)
            told = self._told(service, filled)
            rows.insert(1, self._buffered(bare, filled))
        return report.Report(
            quick=quick,
            seconds=time.perf_counter() - self.began,
            machine=described,
            workers=plan.workers,
            mix=filled.describe(),
            filled=filled,
            rows=rows,
            revocations=revoked,
            followers=told,
            view=view,
            memory=memory,
            restart=restarted,
            replay=replayed,
        )

    def _written(self, count: int) -> None:
        if count % max(1, self.plan.tokens // 10) == 0:
            self.say(f"  {count:,} of {self.plan.tokens:,} events")

    def _durations(self) -> load.Durations:
        return load.Durations(row_seconds=self.plan.row_seconds, echo_seconds=self.plan.echo_seconds)

    def _rows(
        self, service: running.Service, bare: Echo, filled: Filled
    ) -> tuple[list[load.Row], list[Memory], Revocations]:
        """All rows in `durable` mode, then the memory that they left the workers with, and the revocations."""
        connections = self.plan.connections
        loads = [
            load.validation(service, filled, "durable", connections),
            *load.others(service, filled, connections, self.plan.row_seconds),
        ]
        rows = [load.measure(service, bare, one, self._durations(), self.say) for one in loads]
        memory = upkeep.workers_memory(service)
        self.say(f"revoking {self.plan.revocations} tokens, one after another")
        settle(service)
        revoked = asyncio.run(revocation.measure(service, filled.revocable[: self.plan.revocations]))
        return rows, memory, revoked

    def _told(self, service: running.Service, filled: Filled) -> list[followers.Way]:
        count = self.plan.revocations
        self.say(f"revoking {count} more, with {sum(self.plan.followers.values())} followers")
        settle(service)
        return asyncio.run(followers.measure(service, filled.revocable[count : 2 * count], self.plan.followers))

    def _buffered(self, bare: Echo, filled: Filled) -> load.Row:
        """The same service started again, with the other way of recording uses."""
        assert self.service is not None
        self.service.stop()
        self.say("starting the service with use_recording=buffered")
        service = self.start(use_recording="buffered")
        one = load.validation(service, filled, "buffered", self.plan.connections)
        return load.measure(service, bare, one, self._durations(), self.say)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="10,000 tokens and rows of 3 seconds: shows that it works, not how fast.")
@click.option("--tokens", type=click.IntRange(1000), help="Live tokens. [default: 1,000,000]")
@click.option("--seconds", type=click.FloatRange(1), help="Length of each row. [default: 10]")
@click.option("--connections", type=click.IntRange(2), default=64, show_default=True)
@click.option("--workers", type=click.IntRange(1), help="API workers. [default: one a core]")
@click.option("--directory", type=click.Path(file_okay=False, path_type=Path), help="Where the data goes meanwhile.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also writes JSON there.")
@click.option("--markdown", is_flag=True, help="Prints Markdown for the README instead of tables.")
def main(
    *,
    quick: bool,
    tokens: int | None,
    seconds: float | None,
    connections: int,
    workers: int | None,
    directory: Path | None,
    json_path: Path | None,
    markdown: bool,
) -> None:
    """Measures the service beside a bare ASGI echo, with load from wrk. About eight minutes."""
    if wrk.find() is None:
        click.echo(wrk.MISSING, err=True)
        sys.exit(2)
    plan = Plan(
        tokens=tokens or (10_000 if quick else 1_000_000),
        connections=connections,
        row_seconds=seconds or (3 if quick else 10),
        echo_seconds=1 if quick else 4,
        revocations=20 if quick else 200,
        followers=dict.fromkeys(followers.WAYS, 2) if quick else _FOLLOWERS,
        workers=workers or machine.cores(),
    )
    messages = Console(stderr=True)
    work = Path(tempfile.mkdtemp(prefix="token-ledger-bench-", dir=directory))
    bench = Bench(plan, work, messages)
    try:
        found = bench.run(quick=quick)
    except (load.BenchFailed, wrk.WrkFailed, RuntimeError, AssertionError, TimeoutError) as error:
        messages.print(f"\nmake bench failed: {error}", style="bold red", markup=False, highlight=False)
        sys.exit(1)
    finally:
        try:
            bench.stop()
        finally:
            shutil.rmtree(work)
    if json_path is not None:
        json_path.write_bytes(report.to_json(found))
    if markdown:
        click.echo(report.to_markdown(found))
    else:
        report.to_people(found, Console(width=None if sys.stdout.isatty() else report.PLAIN_COLUMNS))


if __name__ == "__main__":
    main()
