"""Options that many commands share, and what surrounds every command: output, errors, exit codes."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from service.cli import output as out
from service.cli.connection import ANSWER_SECONDS_MAX, Api, locate
from service.cli.output import WRONG_USE, Failed
from service.settings import Settings, SettingsError, default_worded, described, environment_name, flag_name

Command = Callable[..., Any]
LIST_ITEMS = 100


class Session:
    """The service, found when it is first asked, and how its answers are to be shown."""

    def __init__(self, data_dir: Path | None, url: str | None, output: str) -> None:
        self.output = output
        self._where = (data_dir, url)
        self._api: Api | None = None

    @property
    def api(self) -> Api:
        """Raises: Failed if it is not known where the service is."""
        if self._api is None:
            self._api = Api(*locate(*self._where))
        return self._api

    def call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        query: dict[str, Any] | None = None,
        idempotency_key: str | None = None,
        wait_seconds: int = 0,
    ) -> dict[str, Any]:
        """The answer to one request, which may wait for so long on purpose. Raises: Failed."""
        seconds = ANSWER_SECONDS_MAX + wait_seconds
        return self.api.call(method, path, body, query=query, idempotency_key=idempotency_key, seconds_max=seconds)

    def close(self) -> None:
        if self._api is not None:
            self._api.close()

    def show(self, answer: dict[str, Any], *, once: str = "") -> None:
        """An object. `once` names its member that the service will never tell again."""
        show(answer, self.output, once=once)

    def show_list(self, path: str, query: dict[str, Any], columns: tuple[str, ...], paging: dict[str, Any]) -> None:
        """A list: as many items as were asked for, and how to get the rest."""
        page = self.page(path, query, paging)
        if self.output == "json":
            out.print_json(page)
        else:
            out.print_table(page["items"], columns)
            self.tell_more(page)

    def page(self, path: str, query: dict[str, Any], paging: dict[str, Any]) -> dict[str, Any]:
        limit = None if paging["all_items"] else paging["limit"]
        return self.api.items(path, query, limit=limit, cursor=paging["cursor"])

    def tell_more(self, page: dict[str, Any]) -> None:
        if cursor := page.get("next_cursor"):
            click.echo(f"There are more: add --all, or --cursor {out.printable(str(cursor))}", err=True)


def show(answer: dict[str, Any], output: str, *, once: str = "") -> None:
    """An object. `once` names its member that will never be told again."""
    if output == "json":
        out.print_json(answer)
        return
    out.print_object(answer)
    if once and once in answer:
        # For people; what reads this output takes its lines for members.
        told = f"\n{once} is shown this once and never again: store it now, where only its owner can read it."
        click.echo(told, err=True)


def output_option(command: Command, *, help_text: str = "A table for people or JSON for programs.") -> Command:
    return click.option(
        "-o",
        "--output",
        type=click.Choice(out.OUTPUTS),
        default="table",
        show_default=True,
        help=help_text,
    )(command)


def asks_service(command: Command) -> Command:
    """A command that is a request to a running service; it gets a `Session` first."""

    @output_option
    @click.option(
        "--data-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Directory of the service, whose bootstrap.json says where it is and holds a token. "
        "[env: TOKEN_LEDGER_DATA_DIR, else TOKEN_LEDGER_URL and TOKEN_LEDGER_TOKEN]",
    )
    @click.option("--url", help="Address of the service. [env: TOKEN_LEDGER_URL]")
    @functools.wraps(command)
    def run(*args: Any, output: str, data_dir: Path | None, url: str | None, **options: Any) -> None:
        session = Session(data_dir, url, output)
        try:
            command(session, *args, **options)
        except Failed as failure:
            out.fail(failure, output)
        finally:
            session.close()

    return run


def runs_here(*names: str) -> Callable[[Command], Command]:
    """A command that does its work in this process, by `Settings`, of which `names` are its flags.

    It gets the settings and the output first.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(*args: Any, output: str, **options: Any) -> None:
            flags = {name: options.pop(name) for name in names}
            if output == "json" and flags.get("log_format") is None and "log_format" in names:
                flags["log_format"] = "json"
            try:
                command(Settings.load(overrides=flags), output, *args, **options)
            except Failed as failure:
                out.fail(failure, output)
            except SettingsError as error:
                out.fail(Failed(str(error), error.fix, code="settings", exit_code=WRONG_USE), output)
            except Exception as error:
                # Errors that are meant for people say what to do; any other is a defect and shows where it is.
                fix = getattr(error, "fix", None)
                if fix is None and not isinstance(error, OSError):
                    raise
                out.fail(Failed(str(error), fix or ""), output)

        if names[-1] == "log_format" and command.__name__ != "rebuild":
            wrapped = output_option(run, help_text="json: log lines as JSON.")
        else:
            wrapped = output_option(run)
        for name in reversed(names):
            wrapped = _setting_option(name)(wrapped)
        return wrapped

    return decorate


def _setting_option(name: str) -> Callable[[Command], Command]:
    about = described()[name]
    help_text = f"{about.text} [env: {environment_name(name)}; default: {default_worded(name)}]"
    # Settings reads and checks the value, as it does in the environment.
    return click.option(flag_name(name), name, metavar=_metavar(name), help=help_text)


def _metavar(name: str) -> str:
    if name.endswith(("_dir", "_creds")):
        return "PATH"
    return {"issuer": "URL", "nats_url": "URL"}.get(name, name.rsplit("_", 1)[-1].upper())


def paged(command: Command) -> Command:
    """A command that lists: the wrapped function gets `paging`."""

    @click.option(
        "--limit", type=click.IntRange(1, 1_000_000), default=LIST_ITEMS, show_default=True, help="Items at most."
    )
    @click.option("--all", "all_items", is_flag=True, help="Every item, however many.")
    @click.option("--cursor", help="Go on where an earlier list ended.")
    @functools.wraps(command)
    def run(*args: Any, limit: int, all_items: bool, cursor: str | None, **options: Any) -> None:
        command(*args, paging={"limit": limit, "all_items": all_items, "cursor": cursor}, **options)

    return run


def repeatable(command: Command) -> Command:
    """A command that creates: with a key, the service answers a repetition as it did the first time."""
    return click.option(
        "--idempotency-key",
        help="Any string of your own: for 24 hours the same key gets the same answer and creates nothing again.",
    )(command)


unasked = click.option(
    "-y", "--yes", is_flag=True, help="Do not ask. Programs are never asked: only a person on a terminal is."
)


def confirm(session: Session, what: str, *, yes: bool) -> None:
    """Asks a person, and no program, before what cannot be undone."""
    if not yes and session.output == "table" and sys.stdin.isatty() and sys.stdout.isatty():
        click.confirm(f"{what}. This cannot be undone. Go on?", abort=True)


def confirmed(command: Command) -> Command:
    """A command that cannot be undone, whatever its options. The question names what it is given."""

    @unasked
    @functools.wraps(command)
    def run(session: Session, *args: Any, yes: bool, **options: Any) -> None:
        context = click.get_current_context()
        names = [one.name or "" for one in context.command.params if isinstance(one, click.Argument)]
        given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value and name not in names]
        of_whom = " ".join([*(str(options[name]) for name in names), *given])
        confirm(session, f"{context.command.get_short_help_str(200).rstrip('.')}: {of_whom}", yes=yes)
        command(session, *args, **options)

    return run


_DURATION_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}


class Duration(click.ParamType[int]):
    """Seconds, or a number with s, m, h or d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", value)
        if match is None:
            self.fail(
                f"{value!r} is not a duration: give seconds, or a number with s, m, h or d, as in 90d", param, ctx
            )
        return int(match[1]) * _DURATION_SECONDS[match[2]]


def secret_argument(value: str, what: str) -> str:
    """`value`, or for `-` the first line of stdin, so that no secret need stand in a shell's history."""
    return value if value != "-" else secret_input(what)


def secret_input(what: str, *, twice: bool = False) -> str:
    """What is typed at a prompt, unseen, and for a new secret `twice`; without a terminal the first line of stdin."""
    if sys.stdin.isatty():
        return str(click.prompt(what, hide_input=True, err=True, confirmation_prompt=twice))
    line = sys.stdin.readline().rstrip("\r\n")
    if not line:
        raise click.UsageError(f"{what} was to come on stdin, which is empty")
    return line


def one_of(given: dict[str, Any]) -> None:
    """Raises: UsageError unless exactly one of `given` was given."""
    if sum(value is not None for value in given.values()) != 1:
        raise click.UsageError(f"give exactly one of {', '.join(given)}")


def segment(value: str) -> str:
    """An id as one segment of a path. Raises: UsageError for what is none, above all for a token."""
    if value.startswith("tl_") or re.match(r"ey[A-Za-z0-9_-]*\.", value):
        # It would be written into logs on the way, and must not be repeated here either.
        raise click.UsageError("that is a token, not an id; where a command takes a token, give it on stdin with `-`")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,200}", value):
        raise click.UsageError(f"{value!r} is not an id")
    return value
