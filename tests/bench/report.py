"""The numbers as tables for people, as Markdown for the README, as JSON for programs."""

from __future__ import annotations

from typing import Literal

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tests.bench.fill import Filled
from tests.bench.followers import Way
from tests.bench.load import Row
from tests.bench.machine import Machine
from tests.bench.processes import Memory
from tests.bench.revocation import Revocations
from tests.bench.upkeep import Replay, Restart, View

Verdict = Literal["met", "missed", ""]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One number. `target` None: for information. `at_least`: the target is a lower bound, else an upper one."""

    what: str
    value: float
    unit: str = ""
    target: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        if self.target is None:
            return ""
        reached = self.value >= self.target if self.at_least else self.value <= self.target
        return "met" if reached else "missed"

    def target_worded(self) -> str:
        if self.target is None:
            return ""
        return f"{'≥' if self.at_least else '≤'} {_number(self.target)} {self.unit}".strip()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run found."""

    quick: bool
    seconds: float
    machine: Machine
    workers: int
    mix: str
    filled: Filled
    rows: list[Row]
    revocations: Revocations
    followers: list[Way]
    view: View
    memory: list[Memory]
    restart: Restart
    replay: Replay


PLAIN_COLUMNS = 150  # where there is no terminal, whose width would hold
LOAD_HEADINGS = ("row", "conn.", "requests/s", "echo/s", "ratio", "p50 ms", "p99 ms", "failed", "uses kept")
FIGURE_HEADINGS = ("what", "measured", "target", "")
CPU_ROLES = ("API", "nats-server", "project current", "project analytics", "feed", "wrk", "echo")
CPU_HEADINGS = ("CPU, µs a request", *CPU_ROLES, "others", "stolen")
OTHERS_SHARE_MAX = 0.05


def load_cells(row: Row) -> tuple[str, ...]:
    """One line of the table of rows, in the order of LOAD_HEADINGS."""
    kept = f"{row.uses.uses / (row.run.requests * row.items):.3f}" if row.uses is not None else "-"
    return (
        row.name,
        str(row.connections),
        _number(row.run.per_second),
        _number(row.echo_per_second),
        f"{row.ratio:.3f}",
        f"{row.run.p50:.1f}",
        f"{row.run.p99:.1f}",
        str(row.run.failed),
        kept,
    )


def cpu_cells(row: Row) -> tuple[str, ...]:
    """One line of the table of CPU time, in the order of CPU_HEADINGS."""
    used = (_number(row.cpu_us.get(role, 0.0)) for role in CPU_ROLES)
    return (row.name, *used, f"{row.cpu_of_others:.0%}", f"{row.cpu_stolen:.0%}")


def figure_cells(figure: Figure) -> tuple[str, ...]:
    """One line of the table of figures, in the order of FIGURE_HEADINGS."""
    what = f"{figure.what} ({figure.note})" if figure.note else figure.what
    return (what, f"{_number(figure.value)} {figure.unit}".strip(), figure.target_worded(), figure.verdict)


def figures(report: Report) -> list[Figure]:
    """Every number that the table of rows does not show, and every target."""
    revoked = [*_of_revocations(report.revocations), *_of_followers(report.followers)]
    return [*_of_load(report), *revoked, *_of_upkeep(report), *_of_size(report)]


def _of_load(report: Report) -> list[Figure]:
    durable, buffered = (_row(report, f"validate, {mode}") for mode in ("durable", "buffered"))
    batch = _row(report, "validate-batch")
    issue = _row(report, "issue by client credentials, JWT")
    opaque = _row(report, "issue by client credentials, opaque")
    refresh, redeem = _row(report, "refresh"), _row(report, "redemption")
    public = [_row(report, name) for name in ("JWKS", "metadata")]
    return [
        Figure(what="validate, durable: share of echo", value=durable.ratio, target=0.45, at_least=True),
        Figure(what="validate, durable: p99", value=durable.run.p99, unit="ms", target=40),
        Figure(what="validate, buffered: share of echo", value=buffered.ratio, target=0.6, at_least=True),
        Figure(what="batch validation", value=batch.items_per_second, unit="tokens/s", target=60_000, at_least=True),
        Figure(what="issue of a JWT, durable", value=issue.run.per_second, unit="/s", target=1500, at_least=True),
        Figure(what="issue of an opaque token", value=opaque.run.per_second, unit="/s", target=2000, at_least=True),
        Figure(what="refresh, with rotation", value=refresh.run.per_second, unit="/s", target=800, at_least=True),
        Figure(what="redemption of a code", value=redeem.run.per_second, unit="/s", target=700, at_least=True),
        *(Figure(what=f"{row.name}: share of echo", value=row.ratio, target=0.7, at_least=True) for row in public),
    ]


def _of_revocations(found: Revocations) -> list[Figure]:
    return [
        Figure(
            what="revoked to refused on every worker: p99",
            value=found.refused_p99,
            unit="ms",
            target=20,
            note=f"{found.count} revocations",
        ),
        Figure(what="the same: p50", value=found.refused_p50, unit="ms"),
        Figure(what="revocation answered: p50", value=found.answered_p50, unit="ms"),
        Figure(what="revocation answered: p99", value=found.answered_p99, unit="ms"),
        Figure(what="questions sent after that answer and still answered `valid`", value=found.late, target=0),
    ]


def _of_followers(ways: list[Way]) -> list[Figure]:
    count = sum(way.followers for way in ways)
    return [
        Figure(
            what=f"revocation answered to known by {way.followers} of {count} followers, {way.way}: p99",
            value=way.p99,
            unit="ms",
            target=500 if way.way == "webhook" else 50,
            note=f"{way.revocations} revocations, p50 {way.p50:.1f} ms, longest {way.longest:.1f}",
        )
        for way in ways
    ]


def _of_upkeep(report: Report) -> list[Figure]:
    replay, restart, filled = report.replay, report.restart, report.filled
    return [
        Figure(
            what="replay into the view",
            value=replay.per_second,
            unit="events/s",
            target=30_000,
            at_least=True,
            note=f"`rebuild current`, {replay.events:,} events",
        ),
        Figure(what="restart: until ready", value=restart.ready_seconds, unit="s", target=3),
        Figure(what="restart: SIGTERM to the end", value=restart.stop_seconds, unit="s"),
        Figure(
            what="ledger filled",
            value=filled.count / filled.append_seconds,
            unit="events/s",
            note="beside both projectors",
        ),
        Figure(what="fill in the view", value=filled.count / filled.view_seconds, unit="events/s"),
    ]


def _of_size(report: Report) -> list[Figure]:
    memory, view = report.memory, report.view
    uses = _row(report, "validate, durable").uses
    assert uses is not None
    return [
        Figure(
            what="memory of the largest API worker",
            value=max(one.own for one in memory),
            unit="MiB",
            target=150,
            note="view's pages apart",
        ),
        Figure(what="the same: resident with them", value=max(one.resident for one in memory), unit="MiB"),
        Figure(what="the same: proportional", value=max(one.proportional for one in memory), unit="MiB"),
        Figure(what="the same: anonymous", value=max(one.anonymous for one in memory), unit="MiB"),
        Figure(what="view", value=view.bytes_per_token, unit="bytes a token", target=700, note="pages of all tables"),
        Figure(what="view's file", value=view.bytes_file / view.tokens, unit="bytes a token"),
        Figure(what="LEDGER", value=report.filled.ledger_bytes_per_event, unit="bytes an event"),
        Figure(
            what="USAGE",
            value=uses.bytes / max(1, uses.uses),
            unit="bytes a use",
            note=f"{uses.uses / max(1, uses.blocks):.0f} uses a block",
        ),
    ]


def to_people(report: Report, console: Console) -> None:
    """Tables."""
    console.print(f"\nmake bench{' --quick: too short to judge by' if report.quick else ''}", style="bold")
    console.print(f"{report.machine.describe()} {_setting(report)}\n")
    if warning(report):
        console.print(warning(report), style="bold red")
    _table(console, LOAD_HEADINGS, [load_cells(row) for row in report.rows])
    _table(console, FIGURE_HEADINGS, [figure_cells(figure) for figure in figures(report)])
    _table(console, CPU_HEADINGS, [cpu_cells(row) for row in report.rows])


def to_markdown(report: Report) -> str:
    """The same for the README."""
    return "\n\n".join(
        [
            f"{report.machine.describe()} {_setting(report)} {warning(report)}".rstrip(),
            markdown_table(LOAD_HEADINGS, [load_cells(row) for row in report.rows]),
            markdown_table(FIGURE_HEADINGS, [figure_cells(figure) for figure in figures(report)]),
            markdown_table(CPU_HEADINGS, [cpu_cells(row) for row in report.rows]),
        ]
    )


def to_json(report: Report) -> bytes:
    """Everything, with what is computed from it."""
    content = msgspec.to_builtins(report, enc_hook=str)
    for shown, row in zip(content["rows"], report.rows, strict=True):
        shown |= {
            "requests_per_second": row.run.per_second,
            "items_per_second": row.items_per_second,
            "echo_per_second": row.echo_per_second,
            "ratio": row.ratio,
        }
    content["warning"] = warning(report)
    content["figures"] = [msgspec.to_builtins(figure) | {"verdict": figure.verdict} for figure in figures(report)]
    # They were random tokens of a ledger that is gone, yet no token is written to a file without need.
    content["filled"].pop("revocable")
    return msgspec.json.format(msgspec.json.encode(content), indent=2)


def _setting(report: Report) -> str:
    return (
        f"{report.mix}. {report.workers} API workers; wrk on the same machine. The echo is a bare ASGI application "
        "behind the same server with the same options, asked the same with as many connections before and after each "
        "row. `uses kept`: uses found in USAGE afterwards, for each token that was answered; those of wrk's last "
        "requests, whose answers it did not wait for, come on top. Revoked to refused: from sending the revocation to "
        "the first refusal by the last of the workers, each of which is asked without pause by a connection of its "
        "own. Replay: the whole command, beside the running service. Memory: what is resident without the pages of "
        "the view's file, which belong to the page cache and are shared. CPU: of all processes of the same kind "
        "together, `feed` being what announces revocations and delivers webhooks; `echo` is the echo's, for one of its "
        "own requests; `others` is what programs that have nothing to do with it took of the machine, `stolen` what "
        "the machine's host did not give it although it had work for it. Followers share the machine too."
    )


def warning(report: Report) -> str:
    """What makes the numbers doubtful, or an empty string."""
    others = max(row.cpu_of_others + row.cpu_stolen for row in report.rows)
    if others <= OTHERS_SHARE_MAX:
        return ""
    return (
        f"Other programs, or other guests of the machine's host, took up to {others:.0%} of the CPU meanwhile: run it "
        "again on a quiet machine to judge."
    )


def _row(report: Report, name: str) -> Row:
    return next(row for row in report.rows if row.name.startswith(name))


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _table(console: Console, headings: tuple[str, ...], lines: list[tuple[str, ...]]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line, style={"missed": "bold red", "met": "green"}.get(line[-1], ""))
    console.print(table)


def markdown_table(headings: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """The first column to the left, the others to the right."""
    rule = ["---", *("---:" for _ in headings[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [headings, rule, *lines])
