"""What can go wrong between a service and the ledger. `fix` says what to do."""

from __future__ import annotations


class LedgerClientError(Exception):
    """Base of them all."""

    fix = ""

    def __init__(self, detail: str, *, fix: str = "") -> None:
        super().__init__(f"{detail}; {fix}" if fix else detail)
        self.detail = detail
        self.fix = fix


class NotAllowed(LedgerClientError):
    """The ledger does not take the token that this client was given, or does not let it do this."""


class Refused(LedgerClientError):
    """The ledger answered with an error. `status` and `code` are those of its answer."""

    def __init__(self, status: int, code: str, detail: str, *, fix: str = "") -> None:
        super().__init__(f"{status} {code}: {detail}", fix=fix)
        self.status = status
        self.code = code


class Unreachable(LedgerClientError):
    """There is no answer, or none that can be read."""


class SnapshotNeeded(LedgerClientError):
    """What is known here cannot be brought up to date by what comes next."""
