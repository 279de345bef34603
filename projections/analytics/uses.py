"""Uses on their way from USAGE into the tables, as columns all the way: making rows of them would cost the most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from events.types import Context, UseBlock
from projections.analytics.origins import network
from projections.analytics.schema import ARROW_SCHEMAS

# As Python's objects a use takes about a kilobyte, as a row of Arrow's columns less than a tenth of that.
_CHUNK_USES = 20_000
_MINUTE_US = 60_000_000
_NOWHERE = Context()
# What these say of the address and the agent is what the caller wrote into its request; elsewhere we saw it.
_TOLD_BY_THE_CALLER = frozenset({"validate", "batch", "reported"})
_DECIDED_BY_THE_CALLER = "reported"  # that it happened at all is what the caller says
# Few different texts stand in these columns, again and again.
_REPEATED = pa.dictionary(pa.int32(), pa.string())
_SCHEMA = ARROW_SCHEMAS["recent_uses"]

Numbering = Callable[[Sequence[Any]], list[int | None]]


class _Places(dict[Any, int]):
    """The place of every key in the order in which they were first met."""

    def __missing__(self, key: object) -> int:
        place = self[key] = len(self)
        return place


class PendingUses:
    """What waits for one commit of USAGE. `left`: messages that the stream still had behind the last one.

    `reached`: sequence and recorded time of the last block, None if there is none.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.uses = 0
        self.blocks = 0
        self.left = 0
        self.reached: tuple[int, int] | None = None
        self.refused: list[tuple[int, int, int, int, str, str | None, str | None, str, str, int]] = []
        self.gaps: list[tuple[int, int, str, int]] = []
        self._first_recorded_us = 0
        # Tokens and origins get their numbers at the commit; until then their places among these stand for them.
        self._tokens = _Places()
        self._origins = _Places()
        self._columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
        self._chunks: list[pa.Table] = []

    def add(self, seq: int, recorded_us: int, block: UseBlock, left: int) -> None:
        if self.reached is None:
            self._first_recorded_us = recorded_us
        if block.uses:
            self._add_uses(seq, recorded_us, block)
            if len(self._columns["token_no"]) >= _CHUNK_USES:
                self._close_chunk()
        for index, one in enumerate(block.refused):
            where, what = (one.caller, one.ip, network(one.ip)), (one.outcome, one.endpoint, one.count)
            self.refused.append((one.minute * _MINUTE_US, recorded_us, seq, index, *where, *what))
        if block.lost:
            self.gaps.append((seq, recorded_us, block.writer, block.lost))
        self.reached, self.left = (seq, recorded_us), left
        self.blocks += 1
        self.uses += len(block.uses)
        # An empty block is a row too, so that its position is committed.
        self.rows += max(1, len(block.uses) + len(block.refused))

    def _add_uses(self, seq: int, recorded_us: int, block: UseBlock) -> None:
        uses, count, columns = block.uses, len(block.uses), self._columns
        tokens, origins = self._tokens, self._origins
        contexts = [use.context or _NOWHERE for use in uses]
        columns["occurred_at"] += [use.occurred_at_us for use in uses]
        columns["recorded_at"] += [recorded_us] * count
        columns["block_seq"] += [seq] * count
        columns["use_index"] += range(count)
        columns["token_no"] += [tokens[use.token_id] for use in uses]
        columns["origin_no"] += [origins[context.ip, context.user_agent] for context in contexts]
        columns["token_sha256"] += [use.token_sha256 for use in uses]
        columns["outcome"] += [use.outcome for use in uses]
        columns["endpoint"] += [use.endpoint for use in uses]
        columns["caller"] += [use.caller for use in uses]
        columns["scope"] += [use.scope or None for use in uses]
        columns["audience"] += [use.audience or None for use in uses]
        columns["method"] += [context.method for context in contexts]
        columns["path"] += [context.path for context in contexts]
        columns["reported"] += [
            use.endpoint in _TOLD_BY_THE_CALLER and (use.context is not None or use.endpoint == _DECIDED_BY_THE_CALLER)
            for use in uses
        ]

    def _close_chunk(self) -> None:
        columns, self._columns = self._columns, {name: [] for name in _SCHEMA.names}
        arrays = [
            pa.array(columns[field.name], _REPEATED if field.type == pa.string() else field.type) for field in _SCHEMA
        ]
        self._chunks.append(pa.table(arrays, _SCHEMA.names))

    def recorded_seconds(self) -> float:
        """Between the first and the last of it, by the log."""
        return (self.reached[1] - self._first_recorded_us) / 1e6 if self.reached else 0.0

    def uses_to_come(self) -> int:
        """With those that wait, if the blocks that are left are like the last ones."""
        return self.uses + self.left * self.uses // max(1, self.blocks)

    def origins(self) -> int:
        """How many there are."""
        return len(self._origins)

    def table(self, token_numbers: Numbering, origin_numbers: Numbering) -> pa.Table | None:
        """All uses as rows of `recent_uses`, None if there are none."""
        if self._columns["token_no"]:
            self._close_chunk()
        if not self._chunks:
            return None
        table = pa.concat_tables(self._chunks)
        numbered = (("token_no", token_numbers(list(self._tokens))), ("origin_no", origin_numbers(list(self._origins))))
        for name, numbers in numbered:
            at = _SCHEMA.get_field_index(name)
            table = table.set_column(at, name, pa.array(numbers, pa.uint32()).take(table.column(name)))
        return table
