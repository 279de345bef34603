"""Whether those who own webhooks were disabled meanwhile, which is for good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from events.ledger import Ledger
from events.types import ClientDisabled, UserDisabled
from service.commands import subject


class Owners:
    """What the log says of them. It is read on from where it was read to: a client's subject may be long."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._read_to: dict[str, int] = {}
        self._disabled: set[str] = set()

    async def disabled(self, owners: Iterable[str]) -> set[str]:
        """Those of them that were. Raises: LedgerUnavailable."""
        asked = set(owners)
        by_subject = {_subject(one): one for one in asked - self._disabled}
        if by_subject:
            for last in await self._ledger.last_of(*by_subject):
                await self._read(by_subject[last.subject], last.seq)
        return asked & self._disabled

    async def _read(self, owner: str, end: int) -> None:
        after = self._read_to.get(owner, 0)
        if after == end:
            return
        async with contextlib.aclosing(self._ledger.read_on(_subject(owner), after)) as events:
            async for recorded in events:
                if isinstance(recorded.event, ClientDisabled | UserDisabled):
                    self._disabled.add(owner)
                    return
                self._read_to[owner] = recorded.seq


def _subject(owner: str) -> str:
    return subject("client" if owner.startswith("cli_") else "user", owner)
