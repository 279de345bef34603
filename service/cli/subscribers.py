"""Commands about subscribers: enforcement points that follow the feed of revocations."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from service.cli.options import Session, asks_service, confirmed, paged, repeatable, segment
from service.cli.output import WRONG_USE, Failed

COLUMNS = (
    "subscriber_id",
    "name",
    "transport",
    "owner",
    "created_at",
    "after",
    "acknowledged_seq",
    "pending",
    "last_seen_at",
    "silent",
)


@click.group()
def subscriber() -> None:
    """Enforcement points that follow revocations."""


@subscriber.command("create")
@click.argument("name")
@click.option("--transport", type=click.Choice(["nats", "http"]), default="nats", show_default=True)
@click.option("--owner", help="The user or client whose tokens speak for it. [default: who asks]")
@click.option(
    "--after", type=click.IntRange(0), help="nats: begin behind this ledger_seq. [default: with what comes from now on]"
)
@click.option(
    "--creds-file",
    type=click.Path(path_type=Path),
    help="nats: write the seed here, for its owner only, and do not print it. A directory: <subscriber_id>.nk in it.",
)
@repeatable
@asks_service
def subscriber_create(session: Session, creds_file: Path | None, idempotency_key: str | None, **fields: Any) -> None:
    """Register a subscriber and print its NATS seed, once."""
    if creds_file is not None and fields["transport"] != "nats":
        raise click.UsageError("--creds-file is for --transport nats: over HTTP a subscriber uses tokens of its owner")
    with _seed_file(creds_file) as write:
        answer = session.call("POST", "/v1/subscribers", fields, idempotency_key=idempotency_key)
        if write is not None:
            answer["creds_file"] = write(answer.pop("nats_seed"), answer["subscriber_id"])
    session.show(answer, once="nats_seed")


@contextlib.contextmanager
def _seed_file(path: Path | None) -> Iterator[Any]:
    """What writes the seed, once there is one: that it can be written is found out before anything is registered."""
    if path is None:
        yield None
        return
    into = path if path.is_dir() else None
    pending = path / f".subscriber-{os.getpid()}.nk" if into else path
    try:
        descriptor = os.open(pending, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise Failed(f"{pending} is there already", "name another file", exit_code=WRONG_USE) from None
    except OSError as error:
        raise Failed(
            f"{pending} cannot be written: {error.strerror}", "name another file", exit_code=WRONG_USE
        ) from None
    written = False

    def write(seed: str, subscriber_id: str) -> str:
        nonlocal written
        # Without a newline: clients take the whole file for the seed.
        os.write(descriptor, seed.encode())
        os.fsync(descriptor)
        written = True
        return str(pending.rename(into / f"{subscriber_id}.nk") if into else pending)

    try:
        yield write
    finally:
        os.close(descriptor)
        if not written:
            pending.unlink(missing_ok=True)


@subscriber.command("list")
@paged
@asks_service
def subscriber_list(session: Session, paging: dict[str, Any]) -> None:
    """All subscribers that you may see."""
    session.show_list("/v1/subscribers", {}, COLUMNS, paging)


@subscriber.command("show")
@click.argument("subscriber_id")
@asks_service
def subscriber_show(session: Session, subscriber_id: str) -> None:
    """One subscriber, and how much it has not applied yet."""
    session.show(session.call("GET", f"/v1/subscribers/{segment(subscriber_id)}"))


@subscriber.command("delete")
@click.argument("subscriber_id")
@asks_service
@confirmed
def subscriber_delete(session: Session, subscriber_id: str) -> None:
    """Remove a subscriber, end its connections and refuse its credentials, for good."""
    session.show(session.call("DELETE", f"/v1/subscribers/{segment(subscriber_id)}"))
