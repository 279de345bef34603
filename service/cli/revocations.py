"""The feed of revocations on the command line."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from service.cli import output as out
from service.cli.following import follow
from service.cli.options import Session, asks_service


@click.group()
def revocations() -> None:
    """What is revoked, as it happens."""


@revocations.command("tail")
@click.option("--after", type=click.IntRange(0), help="From behind this ledger_seq. [default: what comes next]")
@click.option("--client-id", help="Only what could concern this client.")
@click.option("--subject", help="Only what could concern this user or client, by id.")
@click.option("--grant-id", help="Only what could concern this grant.")
@asks_service
def tail(session: Session, **query: Any) -> None:
    """Follow revocations, a line each, until Ctrl-C. With -o json a CloudEvent a line."""
    try:
        for event in follow(session.api, query):
            click.echo(json.dumps(event) if session.output == "json" else _line(event))
    except (KeyboardInterrupt, BrokenPipeError):
        return  # that is how it ends


@revocations.command("propagation")
@click.argument("ledger_seq", type=click.IntRange(1))
@asks_service
def propagation(session: Session, ledger_seq: int) -> None:
    """Who has applied a revocation, and when: exit code 1 while somebody has not."""
    answer = session.call("GET", f"/v1/revocations/{ledger_seq}/propagation")
    if session.output == "json":
        out.print_json(answer)
    else:
        out.print_propagation(answer)
    if not answer["complete"]:
        sys.exit(out.REFUSED)


_OWN_COLUMNS = {"reason", "revoked_at", "ledger_seq", "token_sha256"}


def _line(event: dict[str, Any]) -> str:
    """The sequence, when, what and why, and then whatever names it."""
    told = event["data"]
    what = event["type"].split(".")[1]
    names = " ".join(f"{name}={out.worded(value)}" for name, value in told.items() if name not in _OWN_COLUMNS)
    return out.printable(
        f"{told['ledger_seq']:>8}  {out.worded(told['revoked_at'])}  {what:<7}  {told['reason']:<16}  {names}"
    )
