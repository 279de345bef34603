"""`python -m tests.bench.abuse`, which `make bench-abuse` runs: what the abuse rules find in a simulated history."""

from __future__ import annotations

import asyncio
import gc
import shutil
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console

from tests import running
from tests.bench import live, machine, scoring, simulated
from tests.bench.evaluation import WAIT_SECONDS, Evaluation
from tests.bench.people import PRESETS, TUNING_SEEDS, Size
from tests.bench.scoring import Score
from tests.bench.simulated import Appended, Query
from tests.bench.traffic import Traffic, midnight


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run found. Seconds of the wall clock, but for those of the score."""

    machine: machine.Machine
    seed: int
    preset: str
    days: int
    clients: int
    tokens: int
    written: Appended
    rows: dict[str, int]
    generation_seconds: float
    ingestion_seconds: float
    store_bytes: int
    queries: list[Query]
    evaluation_seconds: float
    lookalikes: dict[str, int]
    score: Score

    @property
    def ingested_per_second(self) -> float:
        return self.written.uses / self.ingestion_seconds

    @property
    def tuned(self) -> bool:
        return self.seed in TUNING_SEEDS or self.preset == "tuning"


class Run:
    """One simulation through one service."""

    def __init__(self, size: Size, directory: Path, messages: Console) -> None:
        self.size = size
        self.directory = directory
        self.messages = messages
        self.began = time.perf_counter()

    def say(self, text: str) -> None:
        self.messages.print(f"[{time.perf_counter() - self.began:5.0f} s] {text}", markup=False, highlight=False)

    def run(self) -> Report:
        described = machine.describe(self.directory)
        service = running.start(self.directory, workers=1)
        try:
            self.say("planning the population")
            began = time.perf_counter()
            traffic = Traffic(msgspec.structs.replace(self.size, kids=self._kids(service)))
            planned = time.perf_counter() - began
            written, ingestion_seconds = self._fill(service, traffic)
            self.say("asking usage queries")
            asked = simulated.queries(service, traffic, times=5)
        finally:
            service.stop()
        stored = simulated.store_bytes(service.data_dir)
        self.say("running the rules over the history")
        evaluation = Evaluation(service.data_dir, traffic, written)
        try:
            rows = evaluation.rows()
            self._check(rows, written)
            began = time.perf_counter()
            findings = evaluation.over_all(self._evaluated)
        finally:
            evaluation.close()
        kinds: dict[str, int] = {}
        for label in traffic.lookalikes:
            kinds[label.kind] = kinds.get(label.kind, 0) + 1
        return Report(
            machine=described,
            seed=self.size.seed,
            preset=self.size.preset.name,
            days=self.size.days,
            clients=self.size.clients,
            tokens=self.size.tokens,
            written=written,
            rows=rows,
            generation_seconds=planned + written.usage_seconds,
            ingestion_seconds=ingestion_seconds,
            store_bytes=stored,
            queries=asked,
            evaluation_seconds=time.perf_counter() - began,
            lookalikes=kinds,
            score=scoring.score(traffic.attacks, traffic.lookalikes, findings, WAIT_SECONDS),
        )

    def _kids(self, service: running.Service) -> tuple[str, ...]:
        """Signing keys of the service, which rotates twice: the simulated tokens are of one after another."""
        for _ in range(2):
            service.done("POST", "/v1/keys/rotate")
        return tuple(key["kid"] for key in service.items("/v1/keys"))

    def _fill(self, service: running.Service, traffic: Traffic) -> tuple[Appended, float]:
        """Appends the history while analytics stands still, so that taking it in is timed alone."""
        analytics = service.projector("analytics")
        self.say(f"writing {self.size.uses:,} uses")
        with analytics.stopped():
            written = asyncio.run(simulated.append(service, traffic, self._written))
        self.say(f"{written.usage_seconds:.0f} s; analytics takes them in")
        return written, simulated.ingested(service, traffic, written)

    def _written(self, uses: int) -> None:
        self.say(f"  {uses:,} of {self.size.uses:,} uses")

    def _evaluated(self, at: datetime) -> None:
        if at.day % 5 == 0:
            self.say(f"  {at:%Y-%m-%d}")

    def _check(self, rows: dict[str, int], written: Appended) -> None:
        """Counted where they are, not by who put them there."""
        for table, count in {"uses": written.uses, "refused": written.refused_rows}.items():
            assert rows[table] == count, f"{rows[table]:,} rows of {table}, {count:,} were written"


def to_markdown(report: Report) -> str:
    """The tables, for people and for the README."""
    score = report.score
    return "\n\n".join(
        [
            f"{report.machine.describe()} {_setting(report)}",
            _table(
                ("Rule", "Attacks", "Found", "Recall", "Findings", "Right", "Precision", "Detected, median", "p95"),
                [_row(row) for row in score.rows] + [_sum(score)],
            ),
            "False alarms: " + (_wrong(report) or "none") + ".",
            "Missed: "
            + ("; ".join(f"{row.rule}: {what}" for row in score.rows for what in row.missed) or "none")
            + ".",
            _table(("What", "Measured"), _figures(report)),
        ]
    )


def _setting(report: Report) -> str:
    words = (
        f"Seed {report.seed}, preset `{report.preset}`: {report.days} days, {report.clients} clients, "
        f"{report.tokens:,} tokens, {report.written.uses:,} uses, {report.written.refused:,} refused requests."
    )
    if report.tuned:
        return words + " A seed or population that thresholds may be tuned on: not to be reported."
    first, last = TUNING_SEEDS[0], TUNING_SEEDS[-1]
    return words + f" No threshold was tuned on it: that is done with seeds {first} to {last} and the preset `tuning`."


def _row(row: scoring.Row) -> list[str]:
    return [
        row.rule,
        str(row.attacks),
        str(row.found),
        f"{row.recall:.2f}",
        str(row.findings),
        str(row.right),
        f"{row.precision:.2f}" if row.findings else "",
        _seconds(row.median_seconds),
        _seconds(row.p95_seconds),
    ]


def _sum(score: Score) -> list[str]:
    rows = score.rows
    return [
        "all",
        str(sum(row.attacks for row in rows)),
        str(sum(row.found for row in rows)),
        f"{score.recall:.2f}",
        str(sum(row.findings for row in rows)),
        str(sum(row.right for row in rows)),
        f"{score.precision:.2f}",
        _seconds(score.median_seconds),
        "",
    ]


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f} s" if value < 600 else f"{value / 60:.0f} min"


def _wrong(report: Report) -> str:
    causes = [
        f"{row.rule}: {count} of {cause}" for row in report.score.rows for cause, count in sorted(row.wrong.items())
    ]
    return "; ".join(causes)


def _figures(report: Report) -> list[list[str]]:
    written = report.written
    medians = sorted(query.median_ms for query in report.queries)
    slowest = max(report.queries, key=lambda query: query.median_ms)
    failed = [query.name for query in report.queries if not query.answered]
    return [
        ["uses in the store, of those written", f"{report.rows['uses']:,} of {written.uses:,}"],
        ["made and appended", f"{report.generation_seconds:.0f} s"],
        ["ingestion", f"{report.ingested_per_second:,.0f} uses/s"],
        ["analytics on disk", f"{report.store_bytes / written.uses:.1f} bytes a use"],
        ["USAGE on disk", f"{written.usage_bytes / written.uses:.0f} bytes a use"],
        ["usage queries over all of it, median", f"{medians[len(medians) // 2]:.0f} ms"],
        [f"the slowest ({slowest.name}), median", f"{slowest.median_ms:.0f} ms"],
        ["usage queries that were not answered in time", "; ".join(failed) or "none"],
        ["all rules over all of it", f"{report.evaluation_seconds:.0f} s"],
    ]


def live_markdown(found: list[live.Latency]) -> str:
    """Of the attacks over HTTP."""
    rows = [
        [one.rule, f"{one.requests:,}", "not found" if one.seconds is None else f"{one.seconds:.1f} s"] for one in found
    ]
    return _table(("Rule", "Requests", "From the use to the finding"), rows)


def _table(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--days", type=click.IntRange(18), help="[default: 30]")
@click.option("--clients", type=click.IntRange(20), help="[default: 200]")
@click.option("--tokens", type=click.IntRange(600), help="[default: 20,000]")
@click.option("--uses", type=click.IntRange(40_000), help="[default: 50,000,000]")
@click.option("--attacks", type=click.IntRange(1), help="Of each kind. [default: 20]")
@click.option("--seed", type=int, default=101, show_default=True, help="1 to 9 are for tuning.")
@click.option("--preset", type=click.Choice(sorted(PRESETS)), default="reported", show_default=True)
@click.option("--quick", is_flag=True, help="21 days, 24 clients, 800 tokens, 60,000 uses: shows that it works.")
@click.option("--live", "over_http", is_flag=True, help="Attacks a running service over HTTP instead, in two minutes.")
@click.option("--directory", type=click.Path(file_okay=False, path_type=Path), help="Where the data goes meanwhile.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also writes JSON there.")
def main(
    *,
    quick: bool,
    over_http: bool,
    directory: Path | None,
    json_path: Path | None,
    preset: str,
    seed: int,
    **given: Any,
) -> None:
    """Makes a history with known attacks, has the service take it in, and says what the rules find. 20 GB of disk."""
    wanted = {"days": 30, "clients": 200, "tokens": 20_000, "uses": 50_000_000, "attacks": 20}
    if quick:
        wanted = {"days": 21, "clients": 24, "tokens": 800, "uses": 60_000, "attacks": 3}
    wanted |= {name: value for name, value in given.items() if value is not None}
    attacks = wanted.pop("attacks")
    start = midnight() - timedelta(days=wanted["days"])
    size = Size(seed=seed, start=start, preset=PRESETS[preset], attacks_per_rule=attacks, **wanted)
    messages = Console(stderr=True)
    work = Path(tempfile.mkdtemp(prefix="token-ledger-abuse-", dir=directory))
    gc.set_threshold(100_000, 50, 100)  # hardly anything that is made here is garbage
    content: list[live.Latency] | Report
    try:
        content = live.run(work) if over_http else Run(size, work, messages).run()
    except (RuntimeError, AssertionError, TimeoutError) as error:
        messages.print(f"\nmake bench-abuse failed: {error}", style="bold red", markup=False, highlight=False)
        sys.exit(1)
    finally:
        shutil.rmtree(work)
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(content, enc_hook=str), indent=2))
    click.echo(to_markdown(content) if isinstance(content, Report) else live_markdown(content))


if __name__ == "__main__":
    main()
