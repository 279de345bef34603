"""Commands about clients, users, scopes and signing keys."""

from __future__ import annotations

import sys
from typing import Any

import click

from service.cli.options import (
    Duration,
    Session,
    asks_service,
    confirm,
    confirmed,
    paged,
    repeatable,
    secret_argument,
    secret_input,
    segment,
    unasked,
)
from service.cli.output import Failed

CLIENT_COLUMNS = (
    "client_id",
    "client_name",
    "status",
    "grant_types",
    "scope",
    "token_endpoint_auth_method",
    "access_token_format",
    "created_at",
)
SESSION_COLUMNS = ("session_id", "auth_time", "expires_at", "browser", "ip")
CONSENT_COLUMNS = ("client_id", "client_name", "status", "scope", "changed_at")
USER_COLUMNS = ("user_id", "username", "display_name", "kind", "status", "scope", "created_at")
SCOPE_COLUMNS = ("name", "description", "status", "audience", "implies")
KEY_COLUMNS = (
    "kid",
    "purpose",
    "alg",
    "state",
    "introduced_at",
    "activated_at",
    "retired_at",
    "remove_at",
    "revoked_at",
)


@click.group()
def client() -> None:
    """Applications that get tokens."""


@client.command("create")
@click.argument("client_name")
@click.option("--grant-type", "grant_types", multiple=True, help="Repeatable. [default: client_credentials]")
@click.option("--response-type", "response_types", multiple=True, help="Repeatable.")
@click.option("--redirect-uri", "redirect_uris", multiple=True, help="Repeatable.")
@click.option("--scope", help="What the client may ask for, separated by spaces.")
@click.option(
    "--token-endpoint-auth-method",
    type=click.Choice(["client_secret_basic", "client_secret_post", "none"]),
    help="How the client proves who it is. [default: client_secret_basic]",
)
@click.option("--access-token-format", type=click.Choice(["jwt", "opaque"]), help="[default: jwt]")
@click.option("--access-token-ttl", "access_token_ttl_seconds", type=Duration(), help="[default: 1h]")
@click.option("--refresh-token-idle-ttl", "refresh_token_idle_ttl_seconds", type=Duration(), help="[default: 14d]")
@click.option("--refresh-token-max-ttl", "refresh_token_max_ttl_seconds", type=Duration(), help="[default: 90d]")
@click.option("--audience", multiple=True, help="Who the tokens are for; repeatable. [default: the issuer]")
@click.option("--may-introspect", is_flag=True, default=None, help="It may introspect tokens for its audience.")
@click.option("--post-logout-redirect-uri", "post_logout_redirect_uris", multiple=True, help="Repeatable.")
@click.option(
    "--require-pushed-authorization-requests", is_flag=True, default=None, help="It must push what it asks people for."
)
@click.option("--id-token-signed-response-alg", type=click.Choice(["RS256", "ES256", "EdDSA"]), help="[default: RS256]")
@click.option(
    "--refresh-token-rotation/--no-refresh-token-rotation",
    default=None,
    help="Whether each refresh gives a new refresh token. [default: it does]",
)
@repeatable
@asks_service
def client_create(session: Session, idempotency_key: str | None, **metadata: Any) -> None:
    """Register a client and print its secret, once."""
    answer = session.call("POST", "/v1/clients", metadata, idempotency_key=idempotency_key)
    session.show(answer, once="client_secret")


@client.command("list")
@paged
@asks_service
def client_list(session: Session, paging: dict[str, Any]) -> None:
    """All clients."""
    session.show_list("/v1/clients", {}, CLIENT_COLUMNS, paging)


@client.command("show")
@click.argument("client_id")
@asks_service
def client_show(session: Session, client_id: str) -> None:
    """One client."""
    session.show(session.call("GET", f"/v1/clients/{segment(client_id)}"))


@client.command("rotate-secret")
@click.argument("client_id")
@click.option("--overlap", "overlap_seconds", type=Duration(), help="How long the old secret still works.")
@repeatable
@asks_service
def client_rotate_secret(
    session: Session, client_id: str, overlap_seconds: int | None, idempotency_key: str | None
) -> None:
    """Give a client a new secret and print it, once."""
    answer = session.call(
        "POST",
        f"/v1/clients/{segment(client_id)}/secrets",
        {"overlap_seconds": overlap_seconds},
        idempotency_key=idempotency_key,
    )
    session.show(answer, once="client_secret")


@client.command("disable")
@click.argument("client_id")
@asks_service
@confirmed
def client_disable(session: Session, client_id: str) -> None:
    """End a client and every token of it, for good."""
    session.show(session.call("DELETE", f"/v1/clients/{segment(client_id)}"))


@click.group()
def user() -> None:
    """People and service users, whom tokens speak for.

    USER is a user id or a username.
    """


@user.command("create")
@click.argument("username")
@click.option("--kind", type=click.Choice(["person", "service"]), default="person", show_default=True)
@click.option("--scope", default="", help="What tokens may do in the user's name, separated by spaces.")
@click.option("--display-name")
@click.option("--email")
@click.option("--password", help="The password, or - to read it from stdin.")
@repeatable
@asks_service
def user_create(session: Session, idempotency_key: str | None, password: str | None, **fields: Any) -> None:
    """Register a person or a service user."""
    if password is not None:
        fields["password"] = secret_argument(password, "Password")
    session.show(session.call("POST", "/v1/users", fields, idempotency_key=idempotency_key))


@user.command("list")
@paged
@asks_service
def user_list(session: Session, paging: dict[str, Any]) -> None:
    """All users."""
    session.show_list("/v1/users", {}, USER_COLUMNS, paging)


def _user_id(session: Session, user: str) -> str:
    """Of whom an id or a username names. No name stands in a path, which logs keep. Raises: Failed."""
    if user.startswith("usr_"):
        return segment(user)
    found = session.call("GET", "/v1/users", query={"username": user})["items"]
    if not found:
        raise Failed(f"there is no user with the id or username {user!r}", "look at `token-ledger user list`")
    return str(found[0]["user_id"])


@user.command("show")
@click.argument("user", metavar="USER")
@asks_service
def user_show(session: Session, user: str) -> None:
    """One user."""
    session.show(session.call("GET", f"/v1/users/{_user_id(session, user)}"))


@user.command("password")
@click.argument("user", metavar="USER")
@asks_service
def user_password(session: Session, user: str) -> None:
    """Give a user a new password, typed at a prompt or read from stdin.

    It ends every session and token of theirs at once.
    """
    path = f"/v1/users/{_user_id(session, user)}"
    if sys.stdin.isatty():
        click.echo(f"This ends every session and token of {user}. Ctrl-C leaves all as it is.", err=True)
    session.show(session.call("PATCH", path, {"password": secret_input("New password", twice=True)}))


@user.command("disable")
@click.argument("user", metavar="USER")
@click.option("--erase", is_flag=True, help="Also make everything personal about the user unreadable, for good.")
@asks_service
@confirmed
def user_disable(session: Session, user: str, erase: bool) -> None:
    """End a user and every token of theirs, for good."""
    query = {"erase": True} if erase else {}
    session.show(session.call("DELETE", f"/v1/users/{_user_id(session, user)}", query=query))


@user.command("sessions")
@click.argument("user", metavar="USER")
@paged
@asks_service
def user_sessions(session: Session, user: str, paging: dict[str, Any]) -> None:
    """Where a user is signed in."""
    session.show_list(f"/v1/users/{_user_id(session, user)}/sessions", {}, SESSION_COLUMNS, paging)


@user.command("sign-out")
@click.argument("user", metavar="USER")
@click.option("--session-id", help="Only there; else everywhere.")
@asks_service
@confirmed
def user_sign_out(session: Session, user: str, session_id: str | None) -> None:
    """Sign a user out, and end what apps were granted meanwhile."""
    query = {"session_id": session_id} if session_id is not None else {}
    session.show(session.call("DELETE", f"/v1/users/{_user_id(session, user)}/sessions", query=query))


@user.command("consents")
@click.argument("user", metavar="USER")
@paged
@asks_service
def user_consents(session: Session, user: str, paging: dict[str, Any]) -> None:
    """What a user allows clients."""
    session.show_list(f"/v1/users/{_user_id(session, user)}/consents", {}, CONSENT_COLUMNS, paging)


@user.command("withdraw-consent")
@click.argument("user", metavar="USER")
@click.argument("client_id")
@asks_service
@confirmed
def user_withdraw_consent(session: Session, user: str, client_id: str) -> None:
    """End what a user allows a client, and all that it was granted."""
    query = {"client_id": client_id}
    session.show(session.call("DELETE", f"/v1/users/{_user_id(session, user)}/consents", query=query))


@click.group()
def scope() -> None:
    """What tokens may be allowed to do."""


@scope.command("create")
@click.argument("name")
@click.option("--description", required=True, help="What it allows, as people will read it.")
@click.option("--audience", multiple=True, help="A resource server it is for; repeatable. [default: any]")
@click.option("--implies", multiple=True, help="A scope that comes with it; repeatable.")
@repeatable
@asks_service
def scope_create(session: Session, idempotency_key: str | None, **fields: Any) -> None:
    """Register a scope."""
    session.show(session.call("POST", "/v1/scopes", fields, idempotency_key=idempotency_key))


@scope.command("list")
@paged
@asks_service
def scope_list(session: Session, paging: dict[str, Any]) -> None:
    """All scopes."""
    session.show_list("/v1/scopes", {}, SCOPE_COLUMNS, paging)


@click.group()
def key() -> None:
    """Keys that sign access tokens (JWT) and ID tokens."""


@key.command("list")
@paged
@asks_service
def key_list(session: Session, paging: dict[str, Any]) -> None:
    """All signing keys, and what becomes of each when."""
    session.show_list("/v1/keys", {}, KEY_COLUMNS, paging)


@key.command("rotate")
@click.option("--purpose", type=click.Choice(["access", "id"]), help="What tokens it signs. [default: access]")
@click.option(
    "--alg",
    type=click.Choice(["EdDSA", "ES256", "RS256"]),
    help="[default: the first of the settings; for ID tokens RS256]",
)
@click.option("--now", is_flag=True, help="With a key made for it, not the announced one that verifiers know already.")
@click.option(
    "--revoke",
    is_flag=True,
    help="Refuse at once all that earlier keys signed, since one was stolen; goes with --now, said or not.",
)
@unasked
@asks_service
def key_rotate(session: Session, *, purpose: str | None, alg: str | None, now: bool, revoke: bool, yes: bool) -> None:
    """Sign with a new key from now on. Tokens that the old one signed stay valid, unless it is revoked."""
    if revoke:
        confirm(session, "This refuses all that earlier keys signed", yes=yes)
    asked = {"alg": alg, "purpose": purpose, "now": now or None, "revoke": revoke or None}
    session.show(session.call("POST", "/v1/keys/rotate", asked))
