"""What looks like abuse: findings, rules, and what rules would have found."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from service.cli import output as out
from service.cli.audit import audit
from service.cli.options import Session, asks_service, paged, segment

_POLL_SECONDS = 0.5
_COLUMNS = ("finding_id", "rule", "mode", "status", "detected_at", "token_id", "client_id", "subject")


@audit.group("findings")
def findings() -> None:
    """What looks like abuse, and what was made of it."""


@findings.command("list")
@click.option("--rule")
@click.option("--status", type=click.Choice(["open", "acknowledged", "dismissed"]))
@click.option("--client-id")
@click.option("--token-id")
@click.option("--subject", help="User id, username or client id.")
@click.option("--from", "from", metavar="TIME", help="RFC 3339, by detection, inclusive.")
@click.option("--to", "to", metavar="TIME", help="RFC 3339, by detection, exclusive.")
@paged
@asks_service
def findings_list(session: Session, paging: dict[str, Any], **query: Any) -> None:
    """The findings, the newest first."""
    session.show_list("/v1/audit/findings", query, _COLUMNS, paging)


@findings.command("show")
@click.argument("finding_id")
@asks_service
def findings_show(session: Session, finding_id: str) -> None:
    """One finding: its evidence, how it was judged, and the SQL that found it."""
    answer = session.call("GET", f"/v1/audit/findings/{segment(finding_id)}")
    if session.output == "json":
        out.print_json(answer)
        return
    apart = ("evidence", "judged", "sql", "counts", "parameters")
    out.print_object({name: value for name, value in answer.items() if name not in apart})
    for name in ("counts", "parameters"):
        click.echo(f"\n{name}: " + ", ".join(f"{key} {value:g}" for key, value in answer[name].items()))
    click.echo("\nevidence:")
    columns = ("source", "seq", "index", "kept", "occurred_at", "outcome", "endpoint", "network", "ip", "user_agent")
    out.print_table(answer["evidence"], columns)
    if answer["judged"]:
        click.echo("\njudged:")
        out.print_table(answer["judged"], ("status", "at", "by", "reason"))
    if "sql" in answer:
        click.echo("\nsql:\n" + out.printable(answer["sql"]["statement"], lines=True))


@findings.command("acknowledge")
@click.argument("finding_id")
@click.option("--reason", required=True, help="Kept sealed.")
@asks_service
def findings_acknowledge(session: Session, finding_id: str, reason: str) -> None:
    """Say that a finding is abuse."""
    path = f"/v1/audit/findings/{segment(finding_id)}/acknowledge"
    session.show(session.call("POST", path, {"reason": reason}))


@findings.command("dismiss")
@click.argument("finding_id")
@click.option("--reason", required=True, help="Kept sealed.")
@asks_service
def findings_dismiss(session: Session, finding_id: str, reason: str) -> None:
    """Say that a finding is no abuse. What it has revoked stays revoked."""
    path = f"/v1/audit/findings/{segment(finding_id)}/dismiss"
    session.show(session.call("POST", path, {"reason": reason}))


@audit.command("rules")
@asks_service
def audit_rules(session: Session) -> None:
    """The rules that look for abuse, with their parameters and modes."""
    answer = session.call("GET", "/v1/audit/rules")
    if session.output == "json":
        out.print_json(answer)
        return
    rows = [
        {**rule, "parameters": ", ".join(f"{one['name']}={one['value']:g}" for one in rule["parameters"])}
        for rule in answer["items"]
    ]
    out.print_table(rows, ("rule", "version", "mode", "parameters", "finds"))


@audit.command("backtest")
@click.argument("rule")
@click.option("--days", type=click.IntRange(1, 400), default=30, show_default=True)
@click.option("--to", metavar="TIME", help="RFC 3339: the last day. [default: today]")
@click.option(
    "--set", "changes", multiple=True, metavar="NAME=NUMBER", help="Another value of a parameter; repeatable."
)
@asks_service
def audit_backtest(session: Session, rule: str, days: int, to: str | None, changes: tuple[str, ...]) -> None:
    """What a rule would have found, and revoked, by client; nothing is recorded. Ctrl-C stops it.

    RULE is one of `audit rules`, or a file of your own, as `./burst.sql`: one that was changed, or a new one.
    """
    body = {"rule": rule, "days": days, "to": to, "set": _numbers(changes)}
    if rule.endswith(".sql"):
        try:
            body |= {"rule": Path(rule).stem, "sql": Path(rule).read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise click.BadParameter(f"{rule} cannot be read: {error}", param_hint="RULE") from None
    answer = session.call("POST", "/v1/audit/backtests", body)
    path = f"/v1/audit/backtests/{segment(answer['backtest_id'])}"
    from rich.progress import (  # noqa: PLC0415 - the other commands show no progress
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=out.console(stderr=True), disable=session.output == "json") as bar:
            task = bar.add_task(f"{rule}, days", total=days)
            while answer["state"] == "running":
                time.sleep(_POLL_SECONDS)
                answer = session.call("GET", path)
                bar.update(task, completed=answer["days_done"])
    except KeyboardInterrupt:
        answer = session.call("DELETE", path)
    if session.output == "json":
        out.print_json(answer)
    else:
        shown = ("rule", "rule_version", "state", "error", "from", "to", "days_done", "uses", "found", "revoked")
        out.print_object({name: answer[name] for name in shown if name in answer})
        columns_shown = ("client_id", "found", "revoked", "recorded", "also_recorded", "new", "missed")
        out.print_table(answer["clients"], columns_shown)
        out.print_position(answer)
    if answer["state"] == "failed":
        sys.exit(out.REFUSED)


def _numbers(changes: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for change in changes:
        name, _, value = change.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise click.BadParameter(f"{change!r} does not read name=number", param_hint="--set") from None
    return found
