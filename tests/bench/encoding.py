"""From simulated uses to blocks as several writers would have appended them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

from events.types import RefusedCount, TokenUsed, UseBlock
from tests.bench.behaviour import Entry, Refusal
from tests.bench.people import HOUR, MINUTE, SECOND

USES_PER_BLOCK = 500
SPAN_US_MAX = 15 * MINUTE  # of one block: real ones hold milliseconds, and fifty million would be as many messages
FLUSH_US = 2 * SECOND  # how often the service writes its counts of refused requests
REFUSED_PER_MINUTE_MAX = 600  # TOKEN_LEDGER_UNKNOWN_TOKENS_PER_MINUTE_MAX: what is above gets 429, and is not counted


class Skew:
    """A host whose clock is wrong for a while."""

    def __init__(self, writer: int, begins_us: int, ends_us: int, by_us: int) -> None:
        self.writer, self.begins_us, self.ends_us, self.by_us = writer, begins_us, ends_us, by_us

    def of(self, writer: int, us: int) -> int:
        """What must be added to the true time."""
        return self.by_us if writer == self.writer and self.begins_us <= us < self.ends_us else 0


class Writers:
    """API workers that share the requests among them; each cuts its own blocks.

    Every use carries the number of the label that it belongs to, or 0. The blocks do not.
    """

    def __init__(self, seed: int, names: list[str], skews: list[Skew] | None = None) -> None:
        self._rng = random.Random(f"{seed}/writers")
        self._names = names
        self._skews = skews or []
        self._uses: list[list[TokenUsed]] = [[] for _ in names]
        self._since: list[int] = [0 for _ in names]
        self._refused: list[Counter[tuple[int, int, str, str | None, str, str]]] = [Counter() for _ in names]
        self._taken: Counter[tuple[int, str, str | None, str]] = Counter()
        self.uses = 0
        self.refused_requests = 0
        self.refused_rows = 0
        self.blocks = 0
        self.skewed = 0
        self.by_label: Counter[int] = Counter()
        self.refused_by_label: Counter[int] = Counter()
        self.flushed: dict[tuple[int, int], int] = {}  # when a count was written, by number of block and index

    def hour(self, us: int, entries: list[Entry], refusals: list[Refusal]) -> Iterator[UseBlock]:
        """Takes one hour and answers with the blocks that are full."""
        rng, count = self._rng, len(self._names)
        for at, caller, ip, outcome, endpoint, label in sorted(refusals, key=lambda refusal: refusal[0]):
            self._refuse(rng.randrange(count), at, (caller, ip, outcome, endpoint), label)
        self.by_label.update(entry[2] for entry in entries if entry[2])
        skews = [one for one in self._skews if one.begins_us < us + HOUR and us < one.ends_us]
        uses, since, chance = self._uses, self._since, rng.random
        # Sorted by time as numbers, in which the place in the list stands last: half of the time that tuples take.
        for key in sorted([(entry[0] - us) << 24 | index for index, entry in enumerate(entries)]):
            at, rest, _ = entries[key & 0xFFFFFF]
            writer = int(chance() * count)
            mine = uses[writer]
            if not mine:
                since[writer] = at
            elif len(mine) >= USES_PER_BLOCK or at - since[writer] >= SPAN_US_MAX:
                yield self._cut(writer, at)
                mine, since[writer] = uses[writer], at
            if skews:
                skew = sum(one.of(writer, at) for one in skews)
                self.skewed += bool(skew)
                at += skew
            mine.append(TokenUsed(at, *rest))
        self.uses += len(entries)
        self._taken.clear()

    def _refuse(self, writer: int, at: int, what: tuple[str, str | None, str, str], label: int) -> None:
        caller, ip, outcome, endpoint = what
        limited = (at // MINUTE, caller, ip if not caller else "", endpoint)
        if outcome in {"unknown", "malformed"}:
            self._taken[limited] += 1
            if self._taken[limited] > REFUSED_PER_MINUTE_MAX * len(self._names):
                return
        at += sum(one.of(writer, at) for one in self._skews)
        self._refused[writer][at // MINUTE, at // FLUSH_US, caller, ip, outcome, endpoint] += 1
        self.refused_requests += 1
        self.refused_by_label[label] += 1

    def rest(self, us: int) -> Iterator[UseBlock]:
        """What is left at the end."""
        for writer in range(len(self._names)):
            if self._uses[writer] or self._refused[writer]:
                yield self._cut(writer, us)

    def _cut(self, writer: int, us: int) -> UseBlock:
        """The block, with the counts that were due by then."""
        waiting, uses = self._refused[writer], self._uses[writer]
        due = [key for key in waiting if (key[1] + 1) * FLUSH_US <= us]
        counts = tuple(RefusedCount(key[0], *key[2:], waiting.pop(key)) for key in due)
        for index, key in enumerate(due):
            self.flushed[self.blocks, index] = (key[1] + 1) * FLUSH_US
        self.blocks += 1
        self.refused_rows += len(counts)
        self._uses[writer] = []
        return UseBlock(
            block_id=f"{self._rng.getrandbits(128):032x}",
            writer=self._names[writer],
            uses=tuple(uses),
            refused=counts,
        )
