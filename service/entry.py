"""The command `token-ledger`, as it is installed: with the extra `client` alone there is no command line."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Runs the command line if what it needs is installed, else says what to install."""
    if importlib.util.find_spec("click") is None:
        sys.exit('The command line needs the server\'s packages: pip install "token-ledger[server]"')
    from service.cli import main as command_line  # noqa: PLC0415 - only now is it known that it can be loaded

    command_line()
