"""Numbers that stand for tokens and origins in the rows of uses. A file's own: another one gives others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import duckdb
import pyarrow as pa

from projections.analytics import origins
from projections.analytics.rows import Origin, uuid_hex
from projections.analytics.schema import ARROW_SCHEMAS

_KEPT_MAX = 200_000  # kept in memory, some 25 MB of tokens and 50 MB of origins; the others are looked up

K = TypeVar("K")

# An address has the number of the first origin with it.
_WITH_ADDRESSES = """
SELECT n.* REPLACE (
    CASE WHEN n.ip IS NOT NULL THEN coalesce(k.address_no, min(n.origin_no) OVER (PARTITION BY n.ip)) END AS address_no
)
FROM numbered AS n LEFT JOIN (
    SELECT ip, min(address_no) AS address_no FROM origins WHERE ip IN (SELECT ip FROM numbered) GROUP BY ip
) AS k ON k.ip = n.ip"""


class Numbers(Generic[K]):
    """`row` makes the columns of the table behind the number, the first `looked_up` of which tell the key."""

    def __init__(
        self, table: str, row: Callable[[K], tuple[Any, ...]], looked_up: int, insert: str = "SELECT * FROM numbered"
    ) -> None:
        names = ARROW_SCHEMAS[table].names
        self._table = table
        self._number = names[0]
        self._row = row
        self._insert = f"INSERT INTO {table} {insert}"
        self._keys = names[1 : 1 + looked_up]
        self._kept: dict[K | None, int] = {}  # never None's
        self._last = 0

    def start(self, cursor: duckdb.DuckDBPyConnection) -> None:
        """Goes on behind the highest number of the table."""
        self._kept.clear()
        # All rows, always: a result that is not read to its end keeps a transaction open, and so no checkpoint.
        ((self._last,),) = cursor.execute(f"SELECT coalesce(max({self._number}), 0) FROM {self._table}").fetchall()  # noqa: S608 - names of ours

    def forget(self) -> None:
        """Rows have left the table."""
        self._kept.clear()

    def number(self, cursor: duckdb.DuckDBPyConnection, keys: Sequence[K | None]) -> list[int | None]:
        """The number of every key, None of None. Those that had none get one within the cursor's transaction."""
        # No loop of ours over all keys: most of them are known, and there are as many as uses.
        distinct = dict.fromkeys(keys)
        wanted = [key for key in distinct if key is not None and key not in self._kept]
        if wanted and len(self._kept) + len(wanted) > _KEPT_MAX:
            self._kept.clear()
            wanted = [key for key in distinct if key is not None]
        if wanted:
            rows = [self._row(key) for key in wanted]
            for index, number in self._known(cursor, rows):
                self._kept[wanted[index]] = number
            self._add(cursor, [(key, row) for key, row in zip(wanted, rows, strict=True) if key not in self._kept])
        return list(map(self._kept.get, keys))

    def _known(self, cursor: duckdb.DuckDBPyConnection, rows: list[tuple[Any, ...]]) -> list[tuple[int, int]]:
        columns = {name: pa.array([row[at] for row in rows], pa.string()) for at, name in enumerate(self._keys)}
        cursor.register("wanted", pa.table({"i": pa.array(range(len(rows)), pa.int64())} | columns))
        same = " AND ".join(f"t.{name}::VARCHAR IS NOT DISTINCT FROM w.{name}" for name in self._keys)
        if self._keys == ["token_id"]:
            same = "t.token_id = w.token_id::UUID"
        found = cursor.execute(f"SELECT w.i, t.{self._number} FROM wanted w JOIN {self._table} t ON {same}").fetchall()  # noqa: S608 - names of ours
        cursor.unregister("wanted")
        return found

    def _add(self, cursor: duckdb.DuckDBPyConnection, new: list[tuple[K, tuple[Any, ...]]]) -> None:
        if not new:
            return
        schema = ARROW_SCHEMAS[self._table]
        numbered = [(self._last + index, *row) for index, (_, row) in enumerate(new, 1)]
        arrays = [
            pa.array(values, field.type) for values, field in zip(zip(*numbered, strict=True), schema, strict=True)
        ]
        cursor.register("numbered", pa.Table.from_arrays(arrays, schema=schema))
        cursor.execute(self._insert)
        cursor.unregister("numbered")
        for index, (key, _) in enumerate(new, 1):
            self._kept[key] = self._last + index
        self._last += len(new)


def token_numbers() -> Numbers[str]:
    return Numbers("used_tokens", lambda token_id: (uuid_hex(token_id),), 1)


def origin_numbers() -> Numbers[Origin]:
    def row(origin: Origin) -> tuple[Any, ...]:
        return (*origin, origins.network(origin[0]), origins.agent(origin[1]), None)

    return Numbers("origins", row, 2, _WITH_ADDRESSES)
