"""Commands for auditors: SQL, exports and whether these are complete."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from service.cli import output as out
from service.cli.audit import audit
from service.cli.connection import DOWNLOAD_SECONDS_MAX, answer_of
from service.cli.options import Session, asks_service, segment
from service.cli.output import WRONG_USE, Failed

__all__ = ["audit"]

# As the service takes them; its own lists are not loaded here.
DATASETS = ["uses", "events", "tokens", "findings", "usage_minutes", "usage_hours", "usage_days", "refused", "gaps"]
FORMATS = ["parquet", "csv", "ndjson"]
KINDS = ["access", "refresh", "pat", "sat"]
_MANIFEST = ".manifest.json"
_PART_BYTES = 1024 * 1024


@audit.command("sql")
@click.argument("sql", metavar="SQL|-", required=False)
@click.option("--file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Read the SQL from it.")
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="What $NAME in it stands for; repeatable.")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="Rows.")
@click.option("--format", "form", type=click.Choice(["csv", "arrow"]), help="Instead of a table.")
@click.option("--to", type=click.Path(path_type=Path, dir_okay=False), help="Write what --format gives to this file.")
@asks_service
def audit_sql(
    session: Session,
    *,
    sql: str | None,
    file: Path | None,
    params: tuple[str, ...],
    limit: int,
    form: str | None,
    to: Path | None,
) -> None:
    """Run one SELECT over the views of the audit trail. `-` reads it from stdin."""
    body: dict[str, Any] = {"sql": _statement(sql, file), "limit": limit, "format": form, "parameters": _bound(params)}
    if to is not None and form is None:
        raise Failed("--to needs --format", "add --format csv or --format arrow", exit_code=WRONG_USE)
    if form == "arrow" and to is None and sys.stdout.isatty():
        raise Failed("Arrow is not for a terminal", "add --to FILE", exit_code=WRONG_USE)
    response = session.api.ask("POST", "/v1/audit/query", body, seconds_max=DOWNLOAD_SECONDS_MAX)
    if form is None or not response.is_success:
        answer = answer_of(response)
        if session.output == "json":
            out.print_json(answer)
        else:
            _print_rows(answer)
        return
    if to is not None:
        _write(to, response.content)
    else:
        sys.stdout.buffer.write(response.content)
    headers = response.headers
    if headers["x-truncated"] == "true":
        click.echo("There are more rows: add --limit, or use `token-ledger audit export`", err=True)
    click.echo(f"as of ledger_seq {headers['x-ledger-seq']}, usage_seq {headers['x-usage-seq']}", err=True)


def _statement(sql: str | None, file: Path | None) -> str:
    if (sql is None) == (file is None):
        raise Failed("give the SQL, or --file", "or - to read it from stdin", exit_code=WRONG_USE)
    try:
        if file is not None:
            return file.read_text(encoding="utf-8")
        return sys.stdin.read() if sql == "-" else sql or ""
    except (OSError, UnicodeDecodeError) as error:
        raise Failed(f"the SQL cannot be read: {error}", "it must be text in UTF-8", exit_code=WRONG_USE) from None


def _bound(params: tuple[str, ...]) -> dict[str, str] | None:
    bound = {}
    for one in params:
        name, equals, value = one.partition("=")
        if not equals or not name:
            raise Failed(f"{one!r} is not NAME=VALUE", "for example --param client=cli_…", exit_code=WRONG_USE)
        bound[name.removeprefix("$")] = value
    return bound or None


def _print_rows(answer: dict[str, Any]) -> None:
    columns: list[str] = []
    for name in answer["columns"]:
        columns.append(name if name not in columns else f"{name} ({columns.count(name) + len(columns)})")
    items = [dict(zip(columns, row, strict=True)) for row in answer["rows"]]
    out.print_table(items, [out.printable(name) for name in columns] if not items else columns)
    rows = "1 row" if answer["row_count"] == 1 else f"{answer['row_count']:,} rows"
    more = "; there are more: add --limit" if answer["truncated"] else ""
    click.echo(f"\n{rows}{more}, as of ledger_seq {answer['ledger_seq']}, usage_seq {answer['usage_seq']}")


@audit.command("export")
@click.argument("dataset", type=click.Choice(DATASETS))
@click.option("--to", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File that is written.")
@click.option("--format", type=click.Choice(FORMATS), default="parquet", show_default=True)
@click.option("--from", "from", metavar="TIME", help="RFC 3339, inclusive.")
@click.option("--to-time", "to_time", metavar="TIME", help="RFC 3339, exclusive.")
@click.option("--after-seq", type=click.IntRange(0), help="Rows after this position of LEDGER, of uses in USAGE.")
@click.option("--until-seq", type=click.IntRange(0), help="Rows up to this position.")
@click.option("--token-id")
@click.option("--grant-id")
@click.option("--client-id")
@click.option("--subject", help="User id, username or client id.")
@click.option("--kind", type=click.Choice(KINDS))
@click.option("--type", "type", help="Of events, as in token.issued/1.")
@click.option("--outcome", help="As in valid or revoked.")
@click.option("--endpoint", help="As in validate or introspect.")
@click.option("--ip")
@click.option("--caller")
@click.option("--rule")
@click.option("--mode")
@click.option("--status")
@click.option("--writer")
@asks_service
def audit_export(session: Session, to: Path, to_time: str | None, **query: Any) -> None:
    """Export a dataset to a file, with its manifest beside it."""
    part = to.with_name(to.name + ".part")
    digest, size = hashlib.sha256(), 0
    try:
        with part.open("wb") as file:

            def take(data: bytes) -> None:
                nonlocal size
                digest.update(data)
                size += file.write(data)

            headers = session.api.download("/v1/audit/export", {**query, "to": to_time}, take)
        manifest = session.call("GET", f"/v1/audit/exports/{segment(headers['x-export-id'])}")
        _check(manifest, size, digest.hexdigest())
        _write(to.with_name(to.name + _MANIFEST), (json.dumps(manifest, indent=2) + "\n").encode())
        part.replace(to)
    except OSError as error:
        raise Failed(f"{to} cannot be written: {error.strerror}", "choose another file") from None
    finally:
        part.unlink(missing_ok=True)
    session.show(manifest)


def _check(manifest: dict[str, Any], size: int, sha256: str) -> None:
    """Raises: Failed unless these are all the bytes of the export."""
    if not manifest["complete"]:
        raise Failed("the export was not completed", "export again")
    if (manifest["size"], manifest["sha256"]) != (size, sha256):
        raise Failed(
            f"the file is not what was exported: {size:,} bytes with SHA-256 {sha256}, not {manifest['size']:,} bytes "
            f"with {manifest['sha256']}",
            "export again",
        )


@audit.command("verify")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--offline", is_flag=True, help="Trust the manifest beside the file, and ask no ledger.")
@asks_service
def audit_verify(session: Session, file: Path, offline: bool) -> None:
    """Say whether an exported file is whole and what the ledger recorded: exit code 0 if it is, 1 if not."""
    manifest = _manifest(file.with_name(file.name + _MANIFEST))
    if not offline:
        recorded = session.call("GET", f"/v1/audit/exports/{segment(str(manifest['export_id']))}")
        differing = [name for name in sorted({*manifest, *recorded}) if manifest.get(name) != recorded.get(name)]
        if differing:
            raise Failed(f"the manifest differs from the ledger's in {', '.join(differing)}", "do not trust it")
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as content:
        while data := content.read(_PART_BYTES):
            digest.update(data)
            size += len(data)
    _check(manifest, size, digest.hexdigest())
    session.show({"verified": True, "against": "its manifest" if offline else "the ledger", **manifest})


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Failed(f"there is no {path}", "the manifest must stand beside the file, under this name") from None
    except (OSError, ValueError) as error:
        raise Failed(f"{path} cannot be read: {error}", "export again") from None
    if not isinstance(manifest, dict) or not {"export_id", "complete", "size", "sha256"} <= manifest.keys():
        raise Failed(f"{path} is no manifest", "export again")
    return manifest


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise Failed(f"{path} cannot be written: {error.strerror}", "choose another file") from None
