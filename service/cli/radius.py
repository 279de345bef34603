"""The report about a leaked token, grant or client, on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from service.cli.output import bar, print_object, print_table, worded

_TOKEN_COLUMNS = (
    *("relation", "token_id", "kind", "status", "would_end", "uses", "last_used_at", "issued_at", "expires_at"),
    *("issued_seq", "revoked_seq", "reason"),
)
_PLACE_COLUMNS = ("new", "value", "uses", "", "refused", "addresses", "first_seen_at", "last_seen_at")
_USE_COLUMNS = (
    *("usage_seq", "use_index", "occurred_at", "outcome", "endpoint", "token_id", "caller", "scope", "ip"),
    *("user_agent", "reported", "method", "path"),
)
_DEPENDENTS = {"callers": "Callers", "addresses": "Addresses", "agents": "Agents", "endpoints": "Endpoints"}


def print_radius(report: Mapping[str, Any]) -> None:
    """All of it; a page behind the first holds uses alone."""
    if "related" in report:
        if "token" in report:
            print_object(_without(report["token"], "relation", "would_end", "uses", "last_used_at"))
        _related(report["related"])
        _usage(report["usage"])
        for name, title in (("networks", "Networks"), ("agents", "Agents"), ("new_addresses", "New addresses")):
            _places(title, report[name], report["since"])
        _would_break(report["would_break"])
        _section("Done with it in the ledger", report["deeds"])
        _rows(report["deeds"], ("type", "events", "first_seq", "last_seq", "last_at"))
    _section("Uses, the newest in the log first", report["items"])
    _rows(report["items"], _USE_COLUMNS)


def _related(related: Mapping[str, Any]) -> None:
    _heading(
        f"Tokens: {related['tokens']} in {_number(related['grants'], 'grant')}, {related['active']} good; "
        f"{related['would_end']} would end if it were revoked now"
    )
    _rows(related["items"], _TOKEN_COLUMNS)
    _others(related["tokens"], related["items"])


def _usage(usage: Mapping[str, Any]) -> None:
    _heading(
        f"Uses: {usage['uses']}, {usage['refused']} refused, of {_number(usage['tokens'], 'token')} from "
        f"{_number(usage['addresses'], 'address')}; it asked for {_number(usage['validations'], 'validation')}"
    )
    _rows(
        [_barred(one, usage["outcomes"]) for one in usage["outcomes"]], ("outcome", "uses", "", "first_at", "last_at")
    )
    if usage["series"]:
        click.echo()
    _rows([_barred(one, usage["series"]) for one in usage["series"]], ("starts_at", "uses", "", "refused"))


def _places(title: str, places: Mapping[str, Any], since: str) -> None:
    _heading(f"{title}: {places['total']}, {places['new']} first seen since {worded(since)}")
    rows = [{**_barred(one, places["items"]), "new": "new" if one["new"] else ""} for one in places["items"]]
    _rows(rows, _PLACE_COLUMNS)
    _others(places["total"], places["items"])


def _would_break(broken: Mapping[str, Any]) -> None:
    last = f", the last at {worded(broken['last_used_at'])}" if "last_used_at" in broken else ""
    _heading(
        f"If it were revoked now, {_number(broken['tokens'], 'token')} would end. Since {worded(broken['since'])}: "
        f"{_number(broken['uses'], 'valid use')}{last}; {_number(broken['refreshes'], 'refresh')}; "
        f"{_number(broken['validations'], 'validation')} asked for"
    )
    for name, title in _DEPENDENTS.items():
        if broken[name]:
            click.echo(f"\n{title}:")
            rows = [_barred(one, broken[name]) for one in broken[name]]
            print_table(rows, ("value", "uses", "", "tokens", "last_used_at"))


def _heading(text: str) -> None:
    click.echo()
    click.secho(text, bold=True)


def _section(title: str, items: Sequence[Any]) -> None:
    _heading(f"{title}: {'none' if not items else len(items)}")


def _rows(items: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    if items:
        print_table(items, columns)


def _others(total: int, items: Sequence[Any]) -> None:
    if total > len(items):
        click.echo(f"and {_number(total - len(items), 'other')}")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith(('s', 'sh')) else 's'}"


def _barred(one: Mapping[str, Any], beside: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """With a bar, and a name for what has none."""
    named = {"value": one["value"] or "(none)"} if "value" in one else {}
    return {**one, **named, "": bar(one["uses"], max(other["uses"] for other in beside))}


def _without(members: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in members.items() if name not in names}
