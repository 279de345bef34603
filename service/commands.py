"""How a command becomes events: read, fold, decide, append with the expected sequence; on a conflict start over.

The rules themselves are pure and live in `service/rules`; here is what they share and what feeds them. No HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, TypeVar

from msgspec import Struct

from events.errors import Conflict, LedgerError, LedgerUnavailable, MessageTooLarge, OutcomeUnknown, StreamFull
from events.ledger import Append
from events.types import TENANT
from projections import grants, registry
from projections.current import raw_id
from projections.grants import EMPTY, Family
from projections.registry import Row, Scope
from service.caller import ADMIN, Caller
from service.errors import BodyTooLarge, InsufficientScope, ServiceError, Unavailable
from service.runtime import Runtime

S = TypeVar("S")

ATTEMPTS_MAX = 12


class Outcome(Struct, Generic[S], frozen=True):
    """What was appended, and the state it was decided on. `seq` is that of the last event, 0 for none."""

    state: S
    entries: tuple[Append, ...]
    seqs: tuple[int, ...]

    @property
    def seq(self) -> int:
        return self.seqs[-1] if self.seqs else 0


class Prepared(Struct, frozen=True):
    """A create that is decided and not yet appended: its events, and the answer without `ledger_seq`.

    It can be stored, sealed, before it is appended, so that a retry has the same effect and answer. An answer may
    hold a secret that is shown once.
    """

    entries: tuple[Append, ...]
    answer: dict[str, Any]


async def commit(runtime: Runtime, prepare: Callable[[bool], Awaitable[Prepared]]) -> tuple[dict[str, Any], int]:
    """Prepares and appends; prepares anew from the log itself (`fresh`) on a conflict. Returns answer and sequence.

    Raises: what `prepare` raises; Unavailable.
    """

    async def load(fresh: bool) -> Prepared:
        return await prepare(fresh)

    outcome = await execute(runtime, load, lambda prepared: list(prepared.entries))
    return outcome.state.answer, outcome.seq


async def execute(
    runtime: Runtime, load: Callable[[bool], Awaitable[S]], decide: Callable[[S], list[Append]]
) -> Outcome[S]:
    """Appends what `decide` returns, which is nothing when the wanted state already holds.

    `load(fresh)` gives the state: from the view, or, when `fresh`, folded from the log itself. `decide` is called
    again on every conflict and must be pure: ids, hashes and times are made before.

    Raises: what `decide` raises; Unavailable.
    """
    for attempt in range(ATTEMPTS_MAX):
        try:
            state = await load(attempt > 0)
            entries = tuple(decide(state))
            if not entries:
                return Outcome(state, (), ())
            return Outcome(state, entries, tuple(await runtime.ledger.append(*entries)))
        except Conflict:
            # Somebody else was first. The pause spreads out many who race for one subject.
            await asyncio.sleep(random.random() * 0.005 * attempt)  # noqa: S311 - no secret
        except LedgerError as error:
            raise refused(error) from error
    raise Unavailable("too many writers change the same thing at this moment")


def refused(error: LedgerError) -> ServiceError:
    """What a caller is told about an error of the log."""
    match error:
        case MessageTooLarge():
            return BodyTooLarge(str(error), fix=error.fix)
        case OutcomeUnknown():
            return Unavailable("the log did not confirm the write in time; repeat the request", private=str(error))
        case StreamFull():
            return Unavailable("the log is full", retry_after_seconds=30, private=str(error))
        case LedgerUnavailable():
            return Unavailable("the log cannot be reached; nothing was recorded", private=str(error))
        case _:
            return Unavailable("the log cannot take this now", private=str(error))


def subject(kind: str, identifier: str) -> str:
    """The ledger subject of one thing: `ledger.<tenant>.<kind>.<id>`. The id must not be what a person chose."""
    return f"ledger.{TENANT}.{kind}.{identifier}"


def scope_subject(name: str) -> str:
    """Scope names may hold characters that subjects may not: RFC 6749 App. A.4."""
    return subject("scope", base64.b32encode(name.encode()).decode().rstrip("="))


async def load_row(runtime: Runtime, table: str, key: bytes, of: str, *, fresh: bool) -> Row | None:
    """One registered thing, from the view or from its subject `of` in the log. Raises: LedgerError."""
    if not fresh:
        return runtime.view.row(table, key)
    row: Row | None = None
    for recorded in await runtime.ledger.read(of):
        row = registry.evolve(row, recorded)
    return row


async def load_family(runtime: Runtime, grant_id: str, token_ids: tuple[str, ...], *, fresh: bool) -> Family:
    """One grant, with at least those of its tokens that are named. Raises: LedgerError."""
    seen = runtime.view.family(grant_id, token_ids)
    if not fresh:
        return seen
    family = EMPTY
    # The issue of an access-only token stands on its client's subject, and is found through the view's row.
    issued = {token.issued_seq for token in seen.tokens.values()}
    events = await runtime.ledger.read(subject("grant", grant_id))
    for seq in issued - {recorded.seq for recorded in events}:
        recorded = await runtime.ledger.get(seq)
        if recorded is not None:
            events = [recorded, *events]
    for recorded in events:
        family = grants.evolve(family, recorded)
    return family


def check_confers(caller: Caller | None, scope: str, *, through: str) -> None:
    """Nobody confers what they lack: refuses a `ledger:*` scope that the caller does not hold. None is the system.

    Raises: InsufficientScope.
    """
    if caller is None:
        return
    for name in scope.split():
        if name.startswith("ledger:") and not caller.holds(name):
            raise InsufficientScope(
                f"{through} would confer {name}, which your token does not hold",
                scope=name,
                fix=f"use a token with {name} or {ADMIN}, or leave {name} out",
            )


def expand(scopes: Mapping[str, Scope], scope: str) -> str:
    """The scope with everything that it implies, in order, each name once. `ledger:*` is never implied."""
    found: dict[str, None] = {}
    waiting = scope.split()
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found[name] = None
            known = scopes.get(name)
            if known is not None:
                waiting += [implied for implied in known.implies if not implied.startswith("ledger:")]
    return " ".join(found)


def known_scopes(runtime: Runtime) -> dict[str, Scope]:
    """Every registered scope by name."""
    return {row.name: row for _, row in runtime.view.rows("scope", limit=10_000) if isinstance(row, Scope)}


__all__ = [
    "Outcome",
    "Prepared",
    "check_confers",
    "commit",
    "execute",
    "expand",
    "known_scopes",
    "load_family",
    "load_row",
    "raw_id",
    "refused",
    "scope_subject",
    "subject",
]
