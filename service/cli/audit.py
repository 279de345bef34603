"""What auditors ask."""

from __future__ import annotations

from typing import Any

import click

from service.cli import output as out
from service.cli.options import Session, asks_service, paged

# As the service takes them; its own lists are not loaded here, nor what they stand beside.
GROUPS = ["client_id", "subject", "token_id", "kind", "outcome", "scope", "ip", "user_agent", "endpoint"]
INTERVALS = ["minute", "hour", "day"]


@click.group()
def audit() -> None:
    """What was recorded."""


@audit.command("events")
@click.option("--type", "type", help="As in token.issued.")
@click.option("--subject")
@click.option("--client-id")
@click.option("--token-id")
@click.option("--from", "from", metavar="TIME", help="RFC 3339, inclusive.")
@click.option("--to", "to", metavar="TIME", help="RFC 3339, inclusive.")
@click.option("--after-seq", type=click.IntRange(0), help="Events after this position of the ledger.")
@paged
@asks_service
def audit_events(session: Session, paging: dict[str, Any], **query: Any) -> None:
    """The recorded events, in order."""
    page = session.page("/v1/audit/events", query, paging)
    if session.output == "json":
        out.print_json(page)
    else:
        out.print_timeline(page["items"])
        session.tell_more(page)


@audit.command("usage")
@click.option("--group-by", type=click.Choice(GROUPS), help="Count by each of its values.")
@click.option("--interval", type=click.Choice(INTERVALS), help="A row for each, UTC.")
@click.option("--from", "from", metavar="TIME", help="RFC 3339, inclusive. [default: 24 hours ago]")
@click.option("--to", "to", metavar="TIME", help="RFC 3339, exclusive. [default: now]")
@click.option("--limit", type=click.IntRange(1, 1000), default=10, show_default=True, help="Groups told one by one.")
@click.option("--client-id")
@click.option("--subject", help="User id, username or client id.")
@click.option("--token-id")
@click.option("--kind", type=click.Choice(["access", "refresh", "pat", "sat"]))
@click.option("--outcome", help="As in valid or revoked.")
@click.option("--endpoint", help="As in validate or introspect.")
@click.option("--ip")
@click.option("--explain", is_flag=True, help="Also the SQL that counted, and its parameters.")
@asks_service
def audit_usage(session: Session, explain: bool, **query: Any) -> None:
    """Uses of tokens, counted: by whom, by what, by time."""
    answer = session.call("GET", "/v1/audit/usage", query={**query, "explain": "sql" if explain else None})
    if session.output == "json":
        out.print_json(answer)
    else:
        out.print_usage(answer)
