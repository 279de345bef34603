"""The command line, `token-ledger`. Exit codes: 0 done, 1 refused or not found, 2 wrong use."""

from __future__ import annotations

from importlib import import_module

import click

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

# Where each is: the module, and others that add to it.
_COMMANDS: dict[str, tuple[str, ...]] = {
    "up": ("processes.up",),
    "serve": ("processes.serve",),
    "project": ("processes.project",),
    "deliver": ("processes.deliver",),
    "rebuild": ("processes.rebuild",),
    "provision": ("processes.provision",),
    "nats-config": ("processes.nats_config",),
    "admin-token": ("processes.admin_token",),
    "doctor": ("processes.doctor",),
    "settings": ("processes.settings_command",),
    "client": ("registry.client",),
    "user": ("registry.user",),
    "scope": ("registry.scope",),
    "key": ("registry.key",),
    "subscriber": ("subscribers.subscriber",),
    "token": ("tokens.token",),
    "revocations": ("revocations.revocations",),
    "webhook": ("webhooks.webhook",),
    "audit": ("audit.audit", "auditing", "findings"),
}


class _Commands(click.Group):
    """Loads a command when it is called: `up` starts six processes, none of which needs the other commands."""

    def list_commands(self, _: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands and cmd_name in _COMMANDS:
            where, *others = _COMMANDS[cmd_name]
            module, _, name = where.partition(".")
            self.add_command(getattr(import_module(f"service.cli.{module}"), name))
            for other in others:
                import_module(f"service.cli.{other}")
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings=_CONTEXT)
@click.version_option(package_name="token-ledger")
def main() -> None:
    """A token service whose only source of truth is a log.

    `token-ledger up` runs it. The other commands ask it: they find it, and a token, through the data directory
    (--data-dir, TOKEN_LEDGER_DATA_DIR, by default ./data) or through TOKEN_LEDGER_URL and TOKEN_LEDGER_TOKEN.
    """
