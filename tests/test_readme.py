"""The README says what is there, and all of it: settings, endpoints, commands, abuse rules, analytics tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest

from projections import analytics, sandbox
from projections.abuse.rules import all_rules
from projections.sandbox.views import VIEWS
from service.api.openapi import document
from service.cli import main
from service.settings import default_worded, described, environment_name, flag_name

README = (Path(__file__).parent.parent / "README.md").read_text()


def settings_table() -> str:
    """The table of the README, from the settings themselves."""
    lines = ["| Variable | Flag | Default | What it is |", "|---|---|---|---|"]
    for name, about in described().items():
        flag = f"`{flag_name(name)}`" if about.flag else ""
        unit = f" ({about.unit})" if about.unit and about.unit not in default_worded(name) else ""
        secret = f" Also `{environment_name(name)}_FILE`." if about.secret else ""
        lines.append(f"| `{environment_name(name)}` | {flag} | {default_worded(name)}{unit} | {about.text}{secret} |")
    return "\n".join(lines)


def endpoints_table() -> str:
    """The table of the README, from the OpenAPI document."""
    lines = ["| Request | Needs | What it does |", "|---|---|---|"]
    for path, operations in json.loads(document())["paths"].items():
        for method, operation in operations.items():
            scopes = dict.fromkeys(
                scope for way in operation.get("security", []) for scopes in way.values() for scope in scopes
            )
            needs = "any of the ledger's" if len(scopes) > 4 else " or ".join(f"`{scope}`" for scope in scopes)
            if any("client" in way for way in operation.get("security", [])):
                needs = " or ".join(filter(None, ["the client's credentials", needs]))
            lines.append(f"| `{method.upper()} {path}` | {needs} | {operation['summary']} |")
    return "\n".join(lines)


def commands_table() -> str:
    """The table of the README, from the command line itself."""
    lines = ["| Command | What it does |", "|---|---|"]
    for name, command in _commands(main):
        for words, leaf in _leaves(name, command):
            lines.append(f"| `token-ledger {words}` | {leaf.get_short_help_str(200)} |")
    return "\n".join(lines)


def rules_table() -> str:
    """The table of the README, from the heads of the abuse rules."""
    lines = ["| Rule | Finds | Spares | Parameters |", "|---|---|---|---|"]
    for rule in all_rules().values():
        parameters = "; ".join(f"`{one.name}` {one.value:g} {one.unit}" for one in rule.parameters) or "none"
        lines.append(f"| `{rule.name}` | {rule.finds} | {rule.spares} | {parameters} |")
    return "\n".join(lines)


def _commands(group: click.Group) -> list[tuple[str, click.Command]]:
    context = click.Context(group)
    found = [(name, group.get_command(context, name)) for name in group.list_commands(context)]
    return [(name, command) for name, command in found if command is not None]


def _leaves(words: str, command: click.Command) -> list[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        return [leaf for name, one in _commands(command) for leaf in _leaves(f"{words} {name}", one)]
    return [(words, command)]


@pytest.mark.parametrize("table", [settings_table, endpoints_table, commands_table, rules_table])
def test_readme_table_is_what_the_code_says(table):
    assert table() in README, f"put this into the README:\n{table()}"


def test_readme_documents_the_analytics_tables():
    documented = re.search(r"\| Table \|.*?\n\n", analytics.__doc__ or "", re.DOTALL)
    assert documented is not None
    assert documented[0].strip() in README


def test_readme_documents_the_views_of_auditors_sql():
    documented = re.search(r"\| View \|.*", sandbox.__doc__ or "", re.DOTALL)
    assert documented is not None
    assert documented[0].strip() in README
    assert set(re.findall(r"^\| `(\w+)`", documented[0], re.MULTILINE)) == set(VIEWS)


def test_readme_names_no_command_that_is_not_there():
    words = set(re.findall(r"token-ledger ([a-z]+(?:-[a-z]+)*)", README)) - {"is", "settings"}
    assert words <= set(main.list_commands(click.Context(main)))
