"""What the command line prints: tables for people, JSON for programs.

Names that people chose come from the service and may hold anything, escape sequences of terminals too, so that
nothing reaches a terminal before `printable`.

Rich is imported when it prints: many commands, and all processes of the service, print no table.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from rich.console import Console

OUTPUTS = ("table", "json")
DONE, REFUSED, WRONG_USE = 0, 1, 2
EMPTY: tuple[object, ...] = (None, "", [], {}, ())


class Failed(Exception):
    """A command that did not do what was asked. `detail` says what happened, `fix` what to do."""

    def __init__(
        self,
        detail: str,
        fix: str = "",
        *,
        code: str = "",
        status: int | None = None,
        request_id: str = "",
        exit_code: int = REFUSED,
    ) -> None:
        super().__init__(detail)
        self.request_id = request_id
        self.detail = detail
        self.fix = fix
        self.code = code
        self.status = status
        self.exit_code = exit_code


def fail(failure: Failed, output: str) -> NoReturn:
    """Prints the failure on stderr and ends with its exit code."""
    if output == "json":
        members = {
            "status": failure.status,
            "code": failure.code,
            "detail": failure.detail,
            "fix": failure.fix,
            "request_id": failure.request_id,
        }
        click.echo(json.dumps({name: value for name, value in members.items() if value}), err=True)
    else:
        click.echo(f"Error: {printable(failure.detail, lines=True)}", err=True)
        if failure.fix:
            click.echo(f"To do: {printable(failure.fix, lines=True)}", err=True)
        if failure.request_id and failure.status and failure.status >= 500:
            click.echo(f"The log knows it as request_id {printable(failure.request_id)}.", err=True)
    sys.exit(failure.exit_code)


def printable(text: str, *, lines: bool = False) -> str:
    """`text` without characters that move the cursor, change colours or reorder what stands beside them."""
    return "".join(
        character if character.isprintable() or (lines and character == "\n") else repr(character)[1:-1]
        for character in text
    )


def worded(value: object) -> str:
    """One value of an answer, for people."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case str():
            return printable(_time(value) or value)
        case Mapping():
            return " ".join(f"{printable(str(name))}={_nested(one)}" for name, one in value.items() if one not in EMPTY)
        case Sequence():
            return " ".join(map(_nested, value))
        case _:
            return printable(str(value))


def _nested(value: object) -> str:
    return f"({worded(value)})" if isinstance(value, Mapping) else worded(value)


def _time(value: str) -> str | None:
    """RFC 3339 as people read it: UTC, whole seconds. None for any other string."""
    if len(value) < 20 or value[4:5] != "-" or value[10:11] != "T":
        return None
    moment = moment_of(value)
    return None if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"


def moment_of(value: object) -> datetime | None:
    """The time that an RFC 3339 string names, with its zone; None for anything else."""
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return moment if moment is not None and moment.tzinfo else None


def print_json(value: object) -> None:
    # ASCII only: control characters of any kind reach no terminal.
    click.echo(json.dumps(value, indent=2))


def print_object(answer: Mapping[str, Any]) -> None:
    """One name and value a line, never folded, so that they can be copied."""
    shown = {name: value for name, value in answer.items() if value is not None and value != []}
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        click.echo(f"{printable(name):<{width}}  {worded(value)}".rstrip())


def print_table(items: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> None:
    """One row an item. A column that no item has is left out."""
    from rich.cells import cell_len

    shown = [name for name in columns if not items or any(item.get(name) not in EMPTY for item in items)]
    rows = [[worded(item.get(name)) for name in shown] for item in items]
    widths = [max(map(cell_len, column)) for column in zip(shown, *rows, strict=True)]
    if not sys.stdout.isatty():
        # For other programs and files: one line an item, nothing folded.
        for row in [shown, *rows]:
            click.echo("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    if sum(widths) + 3 * len(widths) > console().width:
        # Nothing is folded that is to be copied into the next command.
        for number, item in enumerate(items):
            if number:
                click.echo()
            print_object({name: item.get(name) for name in shown if item.get(name) not in EMPTY})
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in shown:
        table.add_column(Text(name), no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table)


def print_timeline(items: Sequence[Mapping[str, Any]]) -> None:
    """Events, and uses among them, in order: when, how long after the one before, what, and its facts.

    On a terminal each fact has a line of its own.
    """
    rows: list[dict[str, Any]] = []
    before: datetime | None = None
    for item in items:
        when = moment_of(item.get("occurred_at"))
        seq = item.get("ledger_seq")
        rows.append(
            {
                "ledger_seq": "use" if seq is None else seq,
                "occurred_at": item.get("occurred_at"),
                "after": _elapsed(before, when),
                "what": item.get("type"),
                "facts": _facts(item),
            }
        )
        before = when or before
    if not sys.stdout.isatty():
        print_table(rows, ("ledger_seq", "occurred_at", "after", "what", "facts"))
        return
    for row in rows:
        head = "  ".join(worded(row[name]) for name in ("ledger_seq", "occurred_at", "what", "after") if row[name])
        click.secho(head, bold=True)
        for name, value in row["facts"].items():
            click.echo(f"    {printable(name):<12} {worded(value)}")


_REACHED_COLUMNS = ("id", "name", "transport", "state", "applied_at", "after", "last_seen_at", "silent")


def print_propagation(answer: Mapping[str, Any]) -> None:
    """Who has applied a revocation, a row each, and then in a sentence whether all have."""
    rows = [
        {**one, "after": f"{one['after_ms']:.1f} ms" if "after_ms" in one else "", "silent": one["silent"] or ""}
        for one in answer["followers"]
    ]
    if rows:
        print_table(rows, _REACHED_COLUMNS)
        click.echo()
    everyone = answer["applied"] + answer["pending"]
    if "unknown" in answer:
        said = f"Who has applied it is not known: {answer['unknown']}."
    elif not rows:
        said = "Nobody was registered to follow the revocations." if answer["complete"] else "It is not announced yet."
    elif answer["complete"]:
        said = f"All {everyone} have applied it."
    else:
        have = "has" if answer["pending"] == 1 else "have"
        said = f"{answer['applied']} of {everyone} have applied it; {answer['pending']} {have} not."
    click.echo(printable(said))


_BAR_WIDTH = 24
_USAGE_COLUMNS = ("starts_at", "value", "uses", "", "refused", "tokens", "addresses", "first_used_at", "last_used_at")


def print_usage(answer: Mapping[str, Any]) -> None:
    """What was counted, a row for each group or for each interval of it, with bars; and where the log was then."""
    rows = [row for name, counts in _counted(answer) for row in _usage_rows(name, counts)]
    most = max((row["uses"] for row in rows), default=0)
    for row in rows:
        row[""] = bar(row["uses"], most)
    if "groups" in answer or "interval" in answer:
        rows.append({**answer["totals"], "starts_at" if "interval" in answer else "value": "(all)"})
    print_table(rows, _USAGE_COLUMNS)
    print_position(answer, f"{worded(answer['from'])} to {worded(answer['to'])}, ")
    print_sql(answer)


def bar(count: int, most: int) -> str:
    """As long as its share of the most, and never nothing for something."""
    return "#" * -(-_BAR_WIDTH * count // most) if most else ""


def print_position(answer: Mapping[str, Any], before: str = "") -> None:
    """Where in the log the answer is true."""
    click.echo(f"\n{before}as of ledger_seq {answer['ledger_seq']}, usage_seq {answer['usage_seq']}")


def print_sql(answer: Mapping[str, Any]) -> None:
    """The queries behind the answer and what was bound in them, if they were asked for."""
    told = answer.get("sql") or []
    for one in told if isinstance(told, list) else [told]:
        name = f"-- {one['name']}\n" if "name" in one else ""
        click.echo(f"\n{name}{printable(one['statement'], lines=True)}\n")
        print_object(one["parameters"])


def _counted(answer: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What has a row of its own, by its name."""
    if "groups" not in answer:
        return [("", answer["totals"])]
    found = [("(none)" if one["value"] is None else one["value"], one) for one in answer["groups"]]
    other = answer.get("other")
    return [*found, (f"({other['groups']} others)", other)] if other else found


def _usage_rows(name: str, counts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**one, "value": name} for one in counts.get("series", [counts])]


# Said by the other columns, or of no use to a person.
_NO_FACTS = {"ledger_seq", "occurred_at", "recorded_at", "type", "id", "request_id", "body", "token_ids"}
_NO_FACTS |= {"sha256", "username_hash", "secret_sha256"}


def _facts(item: Mapping[str, Any]) -> dict[str, Any]:
    """What an event says besides when and what; `body`, if it has one, is the event as it was recorded."""
    members = {**item, **(item.get("body") or {})}
    facts = {name: value for name, value in members.items() if name not in _NO_FACTS and value not in EMPTY}
    if facts.get("user_id") == facts.get("subject"):
        facts.pop("user_id", None)
    if isinstance(facts.get("tokens"), list):
        facts["tokens"] = [_facts(token) if isinstance(token, Mapping) else token for token in facts["tokens"]]
    return facts


def _elapsed(before: datetime | None, after: datetime | None) -> str:
    if before is None or after is None:
        return ""
    seconds = (after - before).total_seconds()
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if abs(seconds) >= size:
            return f"{seconds / size:+.1f} {unit}"
    return f"{seconds:+.3f} s"


def console(*, stderr: bool = False) -> Console:
    """Rich, told to take no text for markup."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)
