"""Commands about tokens."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from service.cli import output as out
from service.cli.options import (
    Duration,
    Session,
    asks_service,
    one_of,
    paged,
    repeatable,
    secret_argument,
    segment,
)

TOKEN_COLUMNS = (
    "token_id",
    "kind",
    "status",
    "name",
    "subject",
    "client_id",
    "scope",
    "audience",
    "issued_at",
    "expires_at",
)
REASONS = ["compromised", "logout", "rotated", "admin", "abuse", "unused"]


@click.group()
def token() -> None:
    """Issue, look at, check, revoke and rotate tokens."""


@token.command("issue")
@click.option(
    "--kind", type=click.Choice(["pat", "sat"]), required=True, help="pat: a person's; sat: a service user's."
)
@click.option("--subject", required=True, help="User id or username.")
@click.option("--name", required=True, help="What the token is for.")
@click.option("--scope", required=True, help="What it may do, separated by spaces.")
@click.option("--expires-in", "expires_in_seconds", type=Duration(), help="At most 366d. [default: 90d]")
@click.option("--audience", multiple=True, help="Who the token is for; repeatable.")
@click.option("--allowed-ip", "allowed_ips", multiple=True, help="Address or CIDR network; repeatable. [default: any]")
@repeatable
@asks_service
def token_issue(session: Session, idempotency_key: str | None, **fields: Any) -> None:
    """Issue a personal (pat) or service (sat) access token and print it, once."""
    session.show(session.call("POST", "/v1/tokens", fields, idempotency_key=idempotency_key), once="token")


@token.command("list")
@click.option("--subject", help="User id, or client id for client credentials.")
@click.option("--client-id")
@click.option("--grant-id")
@click.option("--kind", type=click.Choice(["access", "refresh", "pat", "sat"]))
@click.option("--status", type=click.Choice(["active", "revoked", "expired"]))
@paged
@asks_service
def token_list(session: Session, paging: dict[str, Any], **query: Any) -> None:
    """Tokens, never their strings."""
    session.show_list("/v1/tokens", query, TOKEN_COLUMNS, paging)


@token.command("show")
@click.argument("token_id")
@click.option("--at", metavar="TIME", help="RFC 3339, inclusive. [default: now]")
@asks_service
def token_show(session: Session, token_id: str, at: str | None) -> None:
    """One token as it stands now, or stood at a time."""
    session.show(session.call("GET", f"/v1/tokens/{segment(token_id)}", query={"at": at}))


@token.command("explain")
@click.argument("token_id")
@click.option("--at", metavar="TIME", help="RFC 3339, inclusive. [default: now]")
@click.option("--scope", help="Scopes that the token must have, separated by spaces.")
@click.option("--audience", help="Who the token must be for.")
@click.option("--ip", help="Address that the token is used from.")
@asks_service
def token_explain(session: Session, token_id: str, **asked: str | None) -> None:
    """Say whether a token was good at a time, and which events decided it."""
    answer = session.call("GET", f"/v1/tokens/{segment(token_id)}/explain", query=asked)
    if session.output == "json":
        out.print_json(answer)
        return
    out.print_table(answer["checks"], ("name", "passed", "detail"))
    click.echo()
    out.print_table(answer["because"], ("ledger_seq", "recorded_at", "type", "sentence"))
    failed = next((one["detail"] for one in answer["checks"] if not one["passed"]), "every check passed")
    word = "valid" if answer["valid"] else f"not valid ({answer['code']})"
    when = f"At {out.worded(answer['at'])}, ledger position {answer['ledger_seq']},"
    click.echo(f"\n{when} the token was {out.printable(word)}: {out.printable(failed)}.")


_ENDINGS = ("token.revoked", "token.superseded", "grant.revoked")


def _is_revoked(session: Session, token_id: str) -> bool:
    with contextlib.suppress(out.Failed):
        return bool(session.call("GET", f"/v1/tokens/{segment(token_id)}").get("status") == "revoked")
    return False


@token.command("history")
@click.argument("token_id")
@click.option("--uses", is_flag=True, help="Also every use of the token.")
@paged
@asks_service
def token_history(session: Session, token_id: str, uses: bool, paging: dict[str, Any]) -> None:
    """Everything that happened to a token and its grant, in order."""
    query = {"uses": True} if uses else {}
    page = session.page(f"/v1/tokens/{segment(token_id)}/history", query, paging)
    if session.output == "json":
        out.print_json(page)
    else:
        out.print_timeline(page["items"])
        session.tell_more(page)
        whole = not page.get("next_cursor") and not paging.get("cursor")
        told = any(one["type"].startswith(_ENDINGS) for one in page["items"])
        if whole and not told and _is_revoked(session, token_id):
            click.echo(
                f"Ended with more than this token: `token-ledger token explain {token_id}` says by what.", err=True
            )


@token.command("validate")
@click.argument("token_string", metavar="TOKEN|-")
@click.option("--scope", help="Scopes that the token must have, separated by spaces.")
@click.option("--audience", help="Who the token must be for.")
@click.option("--min-seq", type=click.IntRange(0), help="Answer by no older state of the ledger than this.")
@click.option("--ip", help="Address that the token was presented from.")
@click.option("--user-agent")
@click.option("--method")
@click.option("--path")
@asks_service
def token_validate(session: Session, token_string: str, **asked: Any) -> None:
    """Say whether a token is valid: exit code 0 if it is, 1 if not. `-` reads it from stdin."""
    context = {name: asked.pop(name) for name in ("ip", "user_agent", "method", "path")}
    context = {name: value for name, value in context.items() if value is not None}
    body = {"token": secret_argument(token_string, "Token"), **asked, "context": context or None}
    answer = session.call("POST", "/v1/tokens/validate", body)
    session.show(answer)
    if not answer["valid"]:
        sys.exit(out.REFUSED)


@token.command("revoke")
@click.argument("token_id", required=False)
@click.option("--token", "token_string", metavar="TOKEN|-", help="The token itself; - reads it from stdin.")
@click.option("--grant-id", help="Every token of a grant.")
@click.option("--client-id", help="Every token of a client.")
@click.option("--subject", help="Every token of a user.")
@click.option("--reason", type=click.Choice(REASONS), default="admin", show_default=True)
@click.option("--comment", help="For the audit trail; kept sealed.")
@click.option("--dry-run", is_flag=True, help="Say how many tokens it would end, and end none.")
@click.option(
    "--wait",
    "wait_seconds",
    type=Duration(),
    help="Wait until every follower of the revocations has applied it, at most 30s, and say who has. Exit code 1: "
    "somebody has not; the token is revoked all the same.",
)
@asks_service
def token_revoke(
    session: Session,
    *,
    token_id: str | None,
    token_string: str | None,
    reason: str,
    comment: str | None,
    dry_run: bool,
    wait_seconds: int | None,
    **breadth: str | None,
) -> None:
    """End a token, or all of a grant, client or user. It holds on this host when the command returns."""
    one_of(
        {
            "TOKEN_ID": token_id,
            "--token": token_string,
            "--grant-id": breadth["grant_id"],
            "--client-id": breadth["client_id"],
            "--subject": breadth["subject"],
        }
    )
    if dry_run and wait_seconds is not None:
        raise click.UsageError("a dry run revokes nothing that could be waited for: give one of --dry-run and --wait")
    why = {"reason": reason, "comment": comment, "wait_seconds": wait_seconds}
    if token_id is not None and not dry_run:
        path = f"/v1/tokens/{segment(token_id)}/revoke"
        _show_revoked(session, session.call("POST", path, why, wait_seconds=wait_seconds or 0))
        return
    wanted: dict[str, Any] = {"token_id": token_id, **breadth, **why, "dry_run": dry_run or None}
    if token_string is not None:
        wanted["token"] = secret_argument(token_string, "Token")
    _show_revoked(session, session.call("POST", "/v1/revocations", wanted, wait_seconds=wait_seconds or 0))


def _show_revoked(session: Session, answer: dict[str, Any]) -> None:
    """Exit code 1 if it was waited for, and somebody has not applied it."""
    propagation = answer.get("propagation")
    if propagation is None or session.output == "json":
        session.show(answer)
    else:
        session.show({name: value for name, value in answer.items() if name != "propagation"})
        click.echo()
        out.print_propagation(propagation)
    if propagation is not None and not propagation["complete"]:
        if session.output == "table":
            click.echo("It is revoked all the same.", err=True)
        sys.exit(out.REFUSED)


@token.command("rotate")
@click.argument("token_id")
@click.option("--overlap", "overlap_seconds", type=Duration(), help="How long the old token still works, at most 7d.")
@repeatable
@asks_service
def token_rotate(session: Session, token_id: str, overlap_seconds: int | None, idempotency_key: str | None) -> None:
    """Replace a PAT or SAT by a new one like it and print that, once."""
    answer = session.call(
        "POST",
        f"/v1/tokens/{segment(token_id)}/rotate",
        {"overlap_seconds": overlap_seconds},
        idempotency_key=idempotency_key,
    )
    session.show(answer, once="token")
