"""Runs the rules over what arrives, in a database of its own in memory, and groups what they trigger into incidents."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import pyarrow as pa
from msgspec import Struct

from events.types import AbuseDetected, Evidence, Quantity
from projections.abuse import relations
from projections.abuse.rules import LONG_SECONDS_MAX, Rule, RuleError

_SLACK = timedelta(minutes=10)  # what comes so much late still finds what happened just before it
_COMPACT_ROWS = 500_000
_COLUMNS = {"occurred_at": "TIMESTAMP", "first_at": "TIMESTAMP", "entity": "VARCHAR", "reported": "BOOLEAN"}
_TRIGGERS_MAX = 1_000_000  # of one rule, in one look: as many rows are in memory
_STANDARD = frozenset(
    {
        *("occurred_at", "entity", "first_at", "reported", "token_no", "block_seq", "use_index", "ip", "caller"),
        *("ledger_seq", "first_seq", "network", "outcome", "subject"),
        "client_id",
    }
)
_REFUSED_OUTCOMES = ("unknown", "malformed", "invalid_client", "invalid_password")
_INPUTS = ("uses", "refused", "events")
_TIME = pa.timestamp("us")
USES = pa.schema(
    [
        ("occurred_at", _TIME),
        ("block_seq", pa.int64()),
        ("use_index", pa.uint16()),
        ("token_no", pa.uint32()),
        ("origin_no", pa.uint32()),
        ("outcome", pa.string()),
        ("scope", pa.string()),
        ("reported", pa.bool_()),
    ]
)
REFUSED = pa.schema(
    [
        ("minute", _TIME),
        ("block_seq", pa.int64()),
        ("refused_index", pa.uint32()),
        ("caller", pa.string()),
        ("ip", pa.string()),
        ("network", pa.string()),
        ("outcome", pa.string()),
        ("endpoint", pa.string()),
        ("requests", pa.int64()),
        ("reported", pa.bool_()),
    ]
)
EVENTS = pa.schema(
    [
        ("ledger_seq", pa.int64()),
        ("occurred_at", _TIME),
        ("type", pa.string()),
        ("grant_id", pa.string()),
        ("token_id", pa.string()),
        ("client_id", pa.string()),
        ("subject", pa.string()),
        ("body", pa.string()),
    ]
)


class Fresh(Struct, frozen=True):
    """What was not looked at yet, in the columns of `USES`, `REFUSED` and `EVENTS`. None: nothing."""

    uses: Any = None
    refused: Any = None
    events: Any = None


class Incident(Struct):
    """An incident that is still going on: a later trigger of the same rule and entity belongs to it."""

    first_at: datetime
    last_at: datetime


class Found(Struct, frozen=True, kw_only=True):
    """A new incident. `about`: the ids that the event names; `at` is UTC without zone, as in DuckDB."""

    finding_id: str
    rule: Rule
    at: datetime
    first_at: datetime
    reported: bool
    counts: Mapping[str, float]
    evidence: tuple[Evidence, ...]
    about: Mapping[str, str | None]

    def event(self, now: datetime) -> AbuseDetected:
        """What is appended to LEDGER; the same finding always has the same id."""
        return AbuseDetected(
            id=self.finding_id.removeprefix("fnd_"),
            occurred_at=now,
            by="system",
            finding_id=self.finding_id,
            rule=self.rule.name,
            rule_version=self.rule.version,
            mode=self.rule.mode,
            detected_at=self.at.replace(tzinfo=UTC),
            first_at=self.first_at.replace(tzinfo=UTC),
            last_at=self.at.replace(tzinfo=UTC),
            self_reported=self.reported,
            counts=tuple(Quantity(quantity=name, value=value) for name, value in sorted(self.counts.items())),
            parameters=tuple(Quantity(quantity=name, value=value) for name, value in sorted(self.rule.values.items())),
            evidence=self.evidence,
            **self.about,
        )


class Detector:
    """Rules, what they need to remember, and the incidents that are going on.

    `salt` makes the ids of findings of addresses such that nobody can find the address by trying all that there are.
    Not for more than one thread.
    """

    def __init__(
        self,
        rules: Iterable[Rule],
        salt: bytes,
        *,
        incidents: Mapping[str, Incident] | None = None,
        memory_bytes_max: int = 512 * 1024**2,
        threads: int = 1,
    ) -> None:
        self.rules = tuple(rules)
        self.incidents: dict[str, Incident] = dict(incidents or {})  # by rule and entity
        self._salt = salt
        self.window = timedelta(seconds=max([60.0, *(rule.window_seconds for rule in self.rules)])) + _SLACK
        self.long_window = timedelta(seconds=LONG_SECONDS_MAX) + _SLACK
        self.challenge_window = timedelta(days=relations.CHALLENGE_DAYS) + _SLACK
        self._day: datetime | None = None
        self._newest = datetime.min  # noqa: DTZ901 - as DuckDB's TIMESTAMP
        self._compact_at = _COMPACT_ROWS
        self._database = duckdb.connect(
            ":memory:",
            config={
                "threads": threads,
                "memory_limit": f"{memory_bytes_max}B",
                "temp_directory": "",  # it may write none; so what is too much is told as that
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "python_enable_replacements": False,
            },
        )
        self._database.execute("SET enable_external_access = false")
        self._database.execute("SET lock_configuration = true")
        for statement in relations.TABLES:
            self._database.execute(statement)

    def close(self) -> None:
        self._database.close()

    def interrupt(self) -> None:
        """Ends what runs, from another thread; it raises duckdb.InterruptException there."""
        self._database.interrupt()

    def insert(self, table: str, rows: Any) -> None:
        """Adds rows of one of the tables of `relations.TABLES`."""
        if rows is not None and rows.num_rows:
            self._database.register("rows", rows)
            self._database.execute(f"INSERT INTO {table} BY NAME FROM rows")
            self._database.unregister("rows")

    def unknown(self, table: str, column: str, numbers: Any) -> list[int]:
        """Which of the numbers (an Arrow array) have no row in `table` yet."""
        self._database.register("numbers", pa.table({"no": numbers}))
        found = self._database.execute(
            f"SELECT DISTINCT no FROM numbers WHERE no IS NOT NULL AND no NOT IN (SELECT {column} FROM {table})"
        ).fetchall()
        self._database.unregister("numbers")
        return [number for (number,) in found]

    def remember(self, events: Any) -> None:
        """What rules look back at of events that were looked at before."""
        self.insert("arriving_events", events)
        self._database.execute("CREATE OR REPLACE TEMP TABLE fresh_events AS FROM arriving_events")
        for statement in relations.REMEMBER:
            self._database.execute(statement)
        self._database.execute("TRUNCATE arriving_events")

    def begin(self, day: datetime) -> None:
        """What was inserted before this day is history from now on: what is usual is worked out anew."""
        for statement in relations.CLOSE_DAYS:
            self._database.execute(statement, {"day": day} if "$day" in statement else None)
        self._day = day

    def look(self, fresh: Fresh) -> list[Found]:
        """Runs every rule on what is fresh, a day (UTC) at a time, remembers it, and returns the new incidents.

        Raises: RuleError if a rule's SQL does not run.
        """
        self.insert("arriving_uses", fresh.uses)
        self.insert("arriving_refused", fresh.refused)
        self.insert("arriving_events", fresh.events)
        days = self._database.execute(
            "SELECT DISTINCT date_trunc('day', moment) AS day FROM ("
            "SELECT occurred_at AS moment FROM arriving_uses UNION ALL "
            "SELECT minute FROM arriving_refused UNION ALL SELECT occurred_at FROM arriving_events) ORDER BY day"
        ).fetchall()
        found = [one for (day,) in days for one in self._look_at_day(day)]
        for table in ("arriving_uses", "arriving_refused", "arriving_events"):
            self._database.execute(f"TRUNCATE {table}")
        return found

    def _look_at_day(self, day: datetime) -> list[Found]:
        run = self._database.execute
        for what, column in (("uses", "occurred_at"), ("refused", "minute"), ("events", "occurred_at")):
            run(
                f"CREATE OR REPLACE TEMP TABLE fresh_{what} AS FROM arriving_{what} "
                f"WHERE {column} >= $day AND {column} < $day + INTERVAL 1 DAY",
                {"day": day},
            )
        ((since, last, used),) = run(
            "SELECT min(moment), max(moment), max(CASE WHEN is_use THEN moment END) FROM ("
            "SELECT occurred_at AS moment, true AS is_use FROM fresh_uses UNION ALL "
            "SELECT minute, true FROM fresh_refused UNION ALL SELECT occurred_at, false FROM fresh_events)"
        ).fetchall()
        # LEDGER may be far ahead of USAGE: its events say nothing of how far the uses are.
        if used is not None and (self._day is None or day > self._day):
            self.begin(day)
        run("INSERT INTO recent_uses FROM fresh_uses")
        run("INSERT INTO recent_refused FROM fresh_refused")
        for statement in (*relations.REMEMBER, *relations.STEP, *relations.VIEWS):
            run(statement)
        found = self._triggered(since, last + timedelta(microseconds=1))
        if used is not None:
            self._fold(used)
        return found

    def _fold(self, last: datetime) -> None:
        run = self._database.execute
        for statement in relations.FOLD:
            run(statement)
        self._newest = max(self._newest, last)
        run("DELETE FROM recent_uses WHERE occurred_at < ?", [self._newest - self.long_window])
        run(f"DELETE FROM recent_uses WHERE occurred_at < ? AND NOT {relations.RARE}", [self._newest - self.window])
        run("DELETE FROM recent_refused WHERE minute < ?", [self._newest - self.long_window])
        run("DELETE FROM recent_events WHERE occurred_at < ?", [self._newest - self.long_window])
        run("DELETE FROM challenges WHERE occurred_at < ?", [self._newest - self.challenge_window])
        ((rows,),) = run("SELECT (SELECT count(*) FROM seen) + (SELECT count(*) FROM tally)").fetchall()
        if rows > self._compact_at:
            for statement in relations.COMPACT:
                run(statement)
            ((rows,),) = run("SELECT (SELECT count(*) FROM seen) + (SELECT count(*) FROM tally)").fetchall()
            self._compact_at = 2 * rows + _COMPACT_ROWS
        quiet = {rule.name: timedelta(seconds=rule.quiet_seconds) for rule in self.rules}
        self.incidents = {
            key: incident
            for key, incident in self.incidents.items()
            if incident.last_at + quiet.get(key.partition(" ")[0], _SLACK) + _SLACK > self._newest
        }

    def _triggered(self, since: datetime, until: datetime) -> list[Found]:
        found = []
        present = {what for what in _INPUTS if self._database.execute(f"FROM fresh_{what} LIMIT 1").fetchall()}
        for rule in self.rules:
            if not any(f"window_{what}" in rule.sql for what in present):
                continue
            try:
                cursor = self._database.execute(rule.sql, {**rule.values, "from": since, "until": until})
                types = {column[0]: str(column[1]) for column in cursor.description or ()}
                wrong = [f"{name} {wanted}" for name, wanted in _COLUMNS.items() if types.get(name) != wanted]
                if "token_no" in types:
                    wrong += [name for name in ("block_seq", "use_index") if name not in types]
                if wrong:
                    raise RuleError(f"rule {rule.name} does not select {', '.join(wrong)}")
                rows = [dict(zip(types, row, strict=True)) for row in cursor.fetchmany(_TRIGGERS_MAX + 1)]
            except duckdb.InterruptException:
                raise
            except duckdb.Error as error:
                raise RuleError(f"rule {rule.name} does not run: {error}") from error
            if len(rows) > _TRIGGERS_MAX:
                raise RuleError(f"rule {rule.name} triggers more than {_TRIGGERS_MAX:,} times at once")
            self._name_tokens(rows)
            rows.sort(key=lambda row: (row["occurred_at"], row.get("block_seq") or 0, row.get("use_index") or 0))
            found += [self._found(rule, row) for row in rows if self._begins(rule, row)]
        return sorted(found, key=lambda one: (one.at, one.rule.name))

    def _name_tokens(self, rows: list[dict[str, Any]]) -> None:
        """Tokens by their ids: their numbers are those of the store's file, and others after it was rebuilt."""
        numbers = sorted({row["token_no"] for row in rows if row.get("token_no") is not None})
        if numbers:
            named = dict(
                self._database.execute(
                    "SELECT token_no, token_id FROM tokens WHERE token_no = ANY (?)", [numbers]
                ).fetchall()
            )
            for row in rows:
                row["entity"] = named.get(row.get("token_no"), row["entity"])

    def _begins(self, rule: Rule, row: Mapping[str, Any]) -> bool:
        """Whether the trigger begins an incident; otherwise the one that it belongs to goes on."""
        key, at, quiet = f"{rule.name} {row['entity']}", row["occurred_at"], timedelta(seconds=rule.quiet_seconds)
        present = self.incidents.get(key)
        if present is None or not present.first_at - quiet <= at <= present.last_at + quiet:
            self.incidents[key] = Incident(at, at)
            return True
        present.last_at = max(present.last_at, at)
        return False

    def _found(self, rule: Rule, row: Mapping[str, Any]) -> Found:
        named = f"{rule.name} {row['entity']} {row['occurred_at'].isoformat()}".encode()
        about, evidence = self._about(row), self._evidence(rule, row)
        return Found(
            finding_id="fnd_" + hashlib.sha256(self._salt + named).hexdigest()[:32],
            rule=rule,
            at=row["occurred_at"],
            first_at=row["first_at"],
            reported=row["reported"],
            counts={name: float(value) for name, value in row.items() if name not in _STANDARD and value is not None},
            evidence=evidence,
            about=about,
        )

    def _about(self, row: Mapping[str, Any]) -> dict[str, str | None]:
        names = ("token_id", "grant_id", "client_id", "subject")
        about: dict[str, str | None] = {}
        if row.get("client_id") is not None:
            return {"client_id": row["client_id"]}
        if row.get("token_no") is not None:
            found = self._database.execute(
                "SELECT token_id, grant_id, client_id, subject FROM tokens WHERE token_no = ?", [row["token_no"]]
            ).fetchall()
            about = dict(zip(names, found[0], strict=True)) if found else {}
        elif row.get("ledger_seq") is not None:
            found = self._database.execute(
                "SELECT token_id, grant_id, client_id, subject FROM window_events WHERE ledger_seq = ?",
                [row["ledger_seq"]],
            ).fetchall()
            about = dict(zip(names, found[0], strict=True)) if found else {}
        about |= {name: row[name] for name in ("caller", "subject") if row.get(name)}
        return about

    def _evidence(self, rule: Rule, row: Mapping[str, Any]) -> tuple[Evidence, ...]:
        if row.get("ledger_seq") is not None:
            seqs = sorted({row.get("first_seq") or row["ledger_seq"], row["ledger_seq"]})
            return tuple(Evidence(source="event", seq=seq) for seq in seqs)
        most = relations.EVIDENCE_MAX
        within = {"first_at": row["first_at"], "occurred_at": row["occurred_at"]}
        if row.get("token_no") is None:
            outcomes = [one for one in _REFUSED_OUTCOMES if f"'{one}'" in rule.sql]
            who = row.get("caller") or row.get("subject")
            found = self._database.execute(
                relations.REFUSED_EVIDENCE,
                {
                    **within,
                    "ip": row.get("ip"),
                    "network": row.get("network"),
                    "caller": who,
                    "outcomes": outcomes,
                    "most": most,
                },
            ).fetchall()
            return tuple(Evidence(source="refused", seq=seq, index=index) for seq, index in found)
        crossing = (row["block_seq"], row["use_index"])
        found = self._database.execute(
            relations.USE_EVIDENCE,
            {
                **within,
                "token_no": row["token_no"],
                "network": row.get("network"),
                "outcome": row.get("outcome"),
                "most": most,
            },
        ).fetchall()
        places = [place for place in found if place != crossing][: most - 1]
        return tuple(Evidence(source="use", seq=seq, index=index) for seq, index in (*places, crossing))


def sql_with_values(rule: Rule) -> str:
    """The rule's SQL with its parameters in place, for people to read."""
    return re.sub(r"\$(\w+)", lambda found: _worded(rule, found[1]), rule.sql)


def _worded(rule: Rule, name: str) -> str:
    value = rule.values.get(name)
    return f"${name}" if value is None else f"{value:g}"
