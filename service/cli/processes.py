"""Commands that run or look after the service's own processes.

What they call is imported when they run: a client command must not wait for LMDB, DuckDB and NATS to load.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
from click.core import ParameterSource

from service.cli import output as out
from service.cli.options import output_option, runs_here, show
from service.cli.output import WRONG_USE, Failed
from service.settings import (
    CLIENT_NAMES,
    Settings,
    SettingsError,
    default_worded,
    described,
    environment_name,
    flag_name,
    worded,
)

LOG = ("nats_url", "nats_creds", "replicas")
SPEAKING = ("log_level", "log_format")
SERVING = ("host", "port", "data_dir", "workers", "use_recording", "issuer")
NODES = ("nats-1", "nats-2", "nats-3")


@click.command()
@runs_here(*SERVING, *LOG, "nats_port", *SPEAKING)
def up(settings: Settings, _: str) -> None:
    """Run everything on this machine: nats-server, projectors and HTTP API. Ctrl-C stops it."""
    from service import supervisor

    supervisor.up(settings)


@click.command()
@runs_here(*SERVING, *LOG, *SPEAKING)
def serve(settings: Settings, _: str) -> None:
    """Run the HTTP API alone, beside a `project current` on the same data directory."""
    from service import supervisor

    supervisor.serve(settings)


@click.command()
@click.argument("name", type=click.Choice(["current", "analytics", "revocations", "receipts"]))
@runs_here("data_dir", "issuer", *LOG, *SPEAKING)
def project(settings: Settings, _: str, name: str) -> None:
    """Run one projector alone: it follows the log and keeps its view up to date."""
    from service import supervisor

    supervisor.project(settings, name)


@click.command()
@runs_here("data_dir", "issuer", *LOG, *SPEAKING)
def deliver(settings: Settings, _: str) -> None:
    """Deliver webhooks alone. Several such processes share the work."""
    from service import supervisor

    supervisor.deliver(settings)


@click.command()
@click.argument("name", type=click.Choice(["current", "analytics", "revocations"]))
@runs_here("data_dir", *LOG, *SPEAKING)
def rebuild(settings: Settings, output: str, name: str) -> None:
    """Throw a projection away and replay it from the log."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from service import supervisor

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out.console(stderr=True), disable=output == "json") as bar:
        task = bar.add_task(f"Rebuilding {name}", total=None)
        events = 0

        def progress(done: int, total: int) -> None:
            nonlocal events
            events = done
            bar.update(task, completed=done, total=total)

        supervisor.rebuild(settings, name, progress)
    show({"projection": name, "replayed": events}, output)


@click.command()
@runs_here("data_dir", *LOG)
def provision(settings: Settings, output: str) -> None:
    """Make the streams and buckets on your own nats-servers. Needs the credentials of the role admin."""
    from service import supervisor

    supervisor.provision(settings)
    show({"provisioned": settings.nats_url or "the embedded nats-server"}, output)


@click.command("nats-config")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--node", "nodes", multiple=True, default=NODES, show_default=True, help="Its name; repeatable.")
@click.option("--cluster-name", default="token-ledger", show_default=True)
@click.option("--store-dir", default="/data", show_default=True, help="Where each node keeps its streams.")
@click.option(
    "--subscribers",
    "subscribers_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Who is let in: what `subscriber list --all -o json` printed. [default: those of the last time]",
)
@output_option
def nats_config(
    directory: Path,
    *,
    nodes: tuple[str, ...],
    cluster_name: str,
    store_dir: str,
    subscribers_file: Path | None,
    output: str,
) -> None:
    """Write configuration and credentials for a JetStream cluster of your own.

    A node is reached by its name. Secrets and subscribers that are in DIRECTORY already stay.
    """
    from events import server

    try:
        peers = [server.Node(name=node, host=node, store_dir=store_dir) for node in nodes]
        subscribers = None if subscribers_file is None else _public_keys(subscribers_file)
        server.write_cluster(directory, peers, cluster_name=cluster_name, subscribers=subscribers)
    except ValueError as error:
        out.fail(Failed(str(error), "see `token-ledger nats-config --help`", exit_code=WRONG_USE), output)
    except OSError as error:
        out.fail(Failed(f"{directory} cannot be written: {error}", "choose a directory of your own"), output)
    files = sorted(str(path) for path in directory.rglob("*") if path.is_file())
    show({"nodes": list(nodes), "files": files}, output)


def _public_keys(file: Path) -> dict[str, str]:
    """Of the subscribers over NATS in a list. Raises: ValueError if it is none, or not the whole."""
    try:
        listed = json.loads(file.read_bytes())
        public_keys = {one["subscriber_id"]: one["public_key"] for one in listed["items"] if one["transport"] == "nats"}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file} is not what `token-ledger subscriber list --all -o json` prints") from None
    if listed.get("next_cursor"):
        raise ValueError(f"{file} is only a part of the list: print it with --all")
    return public_keys


@click.command("admin-token")
@runs_here("data_dir", *LOG)
def admin_token(settings: Settings, output: str) -> None:
    """Make a new token for administrators, for who lost it. Needs the data directory, no token."""
    from service import supervisor

    knows_where = (settings.data_dir / "bootstrap.json").exists()
    answer = supervisor.admin_token(settings)
    show(answer, output, once="token" if "token" in answer else "admin_token")
    if output == "table":
        others = "Earlier administrators' tokens go on: look at `token-ledger token list --kind sat --status active`,"
        click.echo(f"{others} and revoke what is lost.", err=True)
        if not knows_where:
            where = "bootstrap.json has the default address of the service until it is started again"
            click.echo(f"{where}; say --url to commands if it runs elsewhere.", err=True)


@click.command()
@click.option("--url", help="Address of the service. [env: TOKEN_LEDGER_URL; default: bootstrap.json's]")
@runs_here("data_dir", *LOG)
def doctor(settings: Settings, output: str, url: str | None) -> None:
    """Check the service, the nats-server and the files, and say what to do. Exit code 1 if something is wrong."""
    from service import doctor as examination

    given = click.get_current_context().get_parameter_source("data_dir") is ParameterSource.COMMANDLINE
    findings = asyncio.run(examination.examine(settings, settings.data_dir if given else None, url))
    status = examination.worst(findings)
    if output == "json":
        out.print_json({"status": status, "checks": msgspec.to_builtins(findings)})
    else:
        for finding in findings:
            click.echo(f"{click.style(f'{finding.state:<8}', fg=_COLOURS[finding.state])} {finding.name}: ", nl=False)
            click.echo(out.printable(finding.found))
            if finding.fix:
                click.echo(f"         → {out.printable(finding.fix)}")
    if status == "problem":
        sys.exit(out.REFUSED)


_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command("settings")
@output_option
def settings_command(output: str) -> None:
    """Every setting: its value here, its default, and what it does."""
    problem: SettingsError | None = None
    try:
        current = Settings.load()
    except SettingsError as error:
        # The table is what helps to correct them.
        problem, current = error, Settings()
    rows = [_row(name, current) for name in described()]
    if output == "json":
        out.print_json({"items": rows, "client": CLIENT_NAMES})
    else:
        out.print_table(rows, ("setting", "value", "default", "unit", "meaning"))
    if problem is not None:
        out.fail(Failed(f"{problem}", "correct what is named; the values above are the defaults", exit_code=2), output)


def _row(name: str, current: Settings) -> dict[str, Any]:
    about = described()[name]
    value = getattr(current, name)
    row = {
        "setting": environment_name(name),
        "value": ("set" if value else "not set") if about.secret else worded(value),
        "default": default_worded(name),
        "unit": about.unit,
        "meaning": about.text,
    }
    if about.flag:
        row["flag"] = flag_name(name)
    if about.secret:
        row["file"] = f"{environment_name(name)}_FILE"
    return row
