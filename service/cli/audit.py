"""What auditors ask."""

from __future__ import annotations

import hashlib
from typing import Any

import click

from service.cli import output as out
from service.cli.connection import PAGE_ITEMS_MAX
from service.cli.options import Session, asks_service, one_of, paged, secret_argument, segment
from service.cli.radius import print_radius

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
@click.option("--to", "to", metavar="TIME", help="RFC 3339, exclusive.")
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


def _explained(command: Any) -> Any:
    return click.option("--explain", is_flag=True, help="Also the SQL that counted, and its parameters.")(command)


def _asked(query: dict[str, Any], explain: bool) -> dict[str, Any]:
    return {**query, "explain": "sql" if explain else None}


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
@click.option("--distinct", is_flag=True, help="Also how many tokens and addresses. It takes longer.")
@_explained
@asks_service
def audit_usage(session: Session, explain: bool, **query: Any) -> None:
    """Uses of tokens, counted: by whom, by what, by time."""
    answer = session.call("GET", "/v1/audit/usage", query=_asked(query, explain))
    if session.output == "json":
        out.print_json(answer)
    else:
        out.print_usage(answer)


def _show_list(session: Session, path: str, query: dict[str, Any], paging: dict[str, Any], columns: Any) -> None:
    """A list with the position that it is true at, and its SQL if that was asked for."""
    page = session.page(path, query, paging)
    if session.output == "json":
        out.print_json(page)
        return
    out.print_table([_row(item) for item in page["items"]], columns)
    out.print_position(page, f"{len(page['items'])} listed, ")
    out.print_sql(page)
    session.tell_more(page)


def _row(item: dict[str, Any]) -> dict[str, Any]:
    """A scope of a list by its name alone."""
    return {**item, "unused": [one["name"] for one in item["unused"]]} if "unused" in item else item


TOKEN_COLUMNS = (
    *("token_id", "kind", "status", "client_id", "subject", "uses", "refused", "validations", "addresses"),
    *("last_used_at", "age_days", "expires_at", "scope"),
)
SORTS = ["last_used_at", "uses", "addresses", "issued_at", "expires_at"]
SCOPE_COLUMNS = (
    *("token_id", "client_id", "kind", "subject", "tokens", "uses", "unscoped_uses", "last_used_at"),
    *("scope", "unused", "proposed_scope"),
)


@audit.command("tokens")
@click.option("--client-id")
@click.option("--subject", help="User id, username or client id.")
@click.option("--kind", type=click.Choice(["access", "refresh", "pat", "sat"]))
@click.option("--status", type=click.Choice(["active", "revoked", "expired", "spent"]))
@click.option("--scope", help="One that the token has.")
@click.option("--sort", type=click.Choice(SORTS), default="last_used_at", show_default=True)
@click.option("--order", type=click.Choice(["desc", "asc"]), default="desc", show_default=True)
@_explained
@paged
@asks_service
def audit_tokens(session: Session, explain: bool, paging: dict[str, Any], **query: Any) -> None:
    """Tokens by how much they are used: last use, uses, addresses, age."""
    _show_list(session, "/v1/audit/tokens", _asked(query, explain), paging, TOKEN_COLUMNS)


@audit.command("unused")
@click.option("--days", type=click.IntRange(1, 3650), default=30, show_default=True)
@_explained
@paged
@asks_service
def audit_unused(session: Session, explain: bool, paging: dict[str, Any], **query: Any) -> None:
    """Good tokens that nobody has used for so many days, the oldest first."""
    _show_list(session, "/v1/audit/tokens/unused", _asked(query, explain), paging, TOKEN_COLUMNS)


@audit.command("expiring")
@click.option("--days", type=click.IntRange(1, 3650), default=30, show_default=True)
@_explained
@paged
@asks_service
def audit_expiring(session: Session, explain: bool, paging: dict[str, Any], **query: Any) -> None:
    """Good tokens that expire within so many days, with how much they are used."""
    _show_list(session, "/v1/audit/tokens/expiring", _asked(query, explain), paging, TOKEN_COLUMNS)


@audit.command("scopes")
@click.option("--by", type=click.Choice(["token", "client"]), default="token", show_default=True)
@click.option("--days", type=click.IntRange(1, 3650), default=90, show_default=True, help="Whole days before today.")
@click.option("--include-used", is_flag=True, help="Also those of which every scope was used.")
@click.option("--client-id")
@click.option("--subject", help="User id, username or client id.")
@click.option("--token-id")
@click.option("--kind", type=click.Choice(["access", "pat", "sat"]))
@_explained
@paged
@asks_service
def audit_scopes(session: Session, explain: bool, paging: dict[str, Any], **query: Any) -> None:
    """Scopes that were granted and not used, and the narrower scope that would do.

    Uses that asked for no scope (unscoped_uses) prove nothing: whoever validates so may judge the scope by himself.
    """
    _show_list(session, "/v1/audit/scopes", _asked(query, explain), paging, SCOPE_COLUMNS)


@audit.command("blast-radius")
@click.argument("token_id", required=False)
@click.option(
    "--token", "token_string", metavar="TOKEN|-", help="The token itself, hashed here; - reads it from stdin."
)
@click.option("--token-sha256", help="SHA-256 of the token's string, as hex.")
@click.option("--grant-id")
@click.option("--client-id")
@click.option("--since", metavar="TIME", help="What was first seen from then on is new. [default: 24 hours ago]")
@click.option("--interval", type=click.Choice(["hour", "day"]), default="day", show_default=True)
@_explained
@paged
@asks_service
def audit_blast_radius(
    session: Session,
    *,
    token_id: str | None,
    token_string: str | None,
    explain: bool,
    paging: dict[str, Any],
    **query: Any,
) -> None:
    """What a leaked token, or all of a grant or client, reached, and what revoking it would break.

    The token itself never leaves this machine: the service is asked by its hash. --limit and --all are of single uses.
    """
    one_of(
        {
            "TOKEN_ID": token_id,
            "--token": token_string,
            "--token-sha256": query["token_sha256"],
            "--grant-id": query["grant_id"],
            "--client-id": query["client_id"],
        }
    )
    if token_id is not None:
        query["token_id"] = segment(token_id)
    if token_string is not None:
        query["token_sha256"] = hashlib.sha256(secret_argument(token_string, "Token").encode()).hexdigest()
    report = _radius(session, _asked(query, explain), paging)
    if session.output == "json":
        out.print_json(report)
        return
    print_radius(report)
    out.print_position(report)
    out.print_sql(report)
    session.tell_more(report)


def _radius(session: Session, query: dict[str, Any], paging: dict[str, Any]) -> dict[str, Any]:
    """The report, as the first page has it, with as many uses as were asked for."""
    path, limit = "/v1/audit/blast-radius", None if paging["all_items"] else paging["limit"]
    first = {**query, "limit": min(PAGE_ITEMS_MAX, limit or PAGE_ITEMS_MAX), "cursor": paging["cursor"]}
    report = session.call("GET", path, query=first)
    left = None if limit is None else limit - len(report["items"])
    if (cursor := report.pop("next_cursor", None)) and left != 0:
        rest = session.api.items(path, query, limit=left, cursor=cursor)
        report["items"] += rest["items"]
        cursor = rest.get("next_cursor")
    return report | ({"next_cursor": cursor} if cursor else {})
