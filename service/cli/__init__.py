"""The command line, `token-ledger`. Exit codes: 0 done, 1 refused or not found, 2 wrong use."""

from __future__ import annotations

import click

from service.cli import (
    audit,
    auditing,  # noqa: F401 - adds to audit
    findings,  # noqa: F401 - adds to audit
    processes,
    registry,
    revocations,
    subscribers,
    tokens,
    webhooks,
)

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=_CONTEXT)
@click.version_option(package_name="token-ledger")
def main() -> None:
    """A token service whose only source of truth is a log.

    `token-ledger up` runs it. The other commands ask it: they find it, and a token, through the data directory
    (--data-dir, TOKEN_LEDGER_DATA_DIR, by default ./data) or through TOKEN_LEDGER_URL and TOKEN_LEDGER_TOKEN.
    """


for command in (
    processes.up,
    processes.serve,
    processes.project,
    processes.deliver,
    processes.rebuild,
    processes.provision,
    processes.nats_config,
    processes.admin_token,
    processes.doctor,
    processes.settings_command,
    registry.client,
    registry.user,
    registry.scope,
    registry.key,
    subscribers.subscriber,
    tokens.token,
    revocations.revocations,
    webhooks.webhook,
    audit.audit,  # and what auditing.py and findings.py add to it
):
    main.add_command(command)
