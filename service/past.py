"""A token as it stood: the same folds as the view's, over the events that the ledger held at an earlier time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from msgspec import Struct

from events.errors import LedgerError
from events.types import AuthorizationGranted, Recorded, TokenIssued
from projections import grants, registry
from projections.current import Hit
from projections.grants import EMPTY
from projections.registry import Cut
from service.commands import refused, subject
from service.errors import InvalidRequest, NotFound, Unavailable
from service.runtime import Runtime
from service.tokens import now

_EVENTS_MAX = 50_000  # of one subject: some seconds of reading


class Past(Struct, frozen=True):
    """A token as it stood at ledger sequence `position`, to be judged at `moment`.

    `events`: all up to there of its grant, its client, its user and the key that signed it, in the order of the ledger.
    """

    hit: Hit
    events: tuple[Recorded, ...]
    position: int
    moment: datetime


class Issue(Struct, frozen=True):
    """Where a token began: its grant, and the sequence of the event that issued it."""

    grant_id: str
    seq: int


def fold(token_id: str, events: Sequence[Recorded]) -> Hit | None:
    """Pure. What the view would know of the token after these events of its grant, client, user and key, in order."""
    family = EMPTY
    for recorded in events:
        family = grants.evolve(family, recorded)
    if token_id not in family.tokens:
        return None
    client_cut, user_cut = _cut(events, ".client."), _cut(events, ".user.")
    return Hit(token_id, family.tokens[token_id], family.grant, client_cut, user_cut, _cut(events, ".key."))


def _cut(events: Sequence[Recorded], kind: str) -> Cut | None:
    cut: Cut | None = None
    for recorded in events:
        found = registry.cut(cut, recorded) if kind in recorded.subject else None
        cut = found[1] if found is not None else cut
    return cut


async def past_of(runtime: Runtime, token_id: str, issue: Issue, at: datetime | None) -> Past:
    """The token at a time, inclusive and by `recorded_at`; None: now.

    Raises: InvalidRequest for a time to come; NotFound for one before the issue; Unavailable.
    """
    moment = now()
    if at is not None and at > moment:
        raise InvalidRequest("at lies in the future", fix="leave it out to ask about the present")
    try:
        position = await (runtime.ledger.last_seq() if at is None else runtime.ledger.position_at(at))
        if issue.seq > position:
            raise NotFound("the token had not been issued at that time")
        events = await _read(runtime, token_id, issue, position)
    except LedgerError as error:
        raise refused(error) from error
    hit = fold(token_id, events)
    if hit is None:
        raise Unavailable("the log does not show the issue of this token", private=f"seq {issue.seq}")
    return Past(hit, tuple(events), position, at or moment)


async def _read(runtime: Runtime, token_id: str, issue: Issue, position: int) -> list[Recorded]:
    """Raises: LedgerError, Unavailable."""
    events = await _subject(runtime, subject("grant", issue.grant_id), position)
    if all(one.seq != issue.seq for one in events):
        # The issue of an access-only token stands on its client's subject, among any number of others.
        first = await runtime.ledger.get(issue.seq)
        events += [first] if first is not None else []
    began = next((one.event for one in events if isinstance(one.event, TokenIssued | AuthorizationGranted)), None)
    if began is not None and began.client_id is not None:
        events += await _subject(runtime, subject("client", began.client_id), position)
    if began is not None and began.subject != began.client_id:
        events += await _subject(runtime, subject("user", began.subject), position)
    events.sort(key=lambda one: one.seq)
    hit = fold(token_id, events)
    if hit is not None and hit.token.kid is not None:
        events += await _subject(runtime, subject("key", hit.token.kid), position)
        events.sort(key=lambda one: one.seq)
    return events


async def _subject(runtime: Runtime, name: str, position: int) -> list[Recorded]:
    events = await runtime.ledger.read(name, until_seq=position, events_max=_EVENTS_MAX + 1)
    if len(events) > _EVENTS_MAX:
        raise Unavailable(f"more than {_EVENTS_MAX} events would have to be read", fix="ask for an earlier time")
    return events
