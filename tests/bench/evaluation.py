"""The one place where the rules are run over a simulated history."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from events.types import Evidence
from projections.abuse import feed
from projections.abuse.detector import Detector, Found
from projections.abuse.rules import all_rules
from projections.analytics.rows import microseconds
from projections.analytics.store import open_analytics
from tests.bench import labels
from tests.bench.people import moment
from tests.bench.places import network_of
from tests.bench.scoring import Finding
from tests.bench.simulated import Appended
from tests.bench.traffic import Traffic

# Rules of the repository by the names that the labels have for them.
NAMES = {
    "refresh_reuse": labels.REFRESH_REUSE,
    "use_after_end": labels.USE_AFTER_END,
    "new_network": labels.NEW_NETWORK,
    "many_addresses": labels.MANY_ADDRESSES,
    "burst": labels.BURST,
    "scanning": labels.SCANNING,
    "scope_probing": labels.SCOPE_PROBING,
    "client_secret_guessing": labels.SECRET_SPRAYING,
    "dormant_wakes": labels.DORMANT,
    "shared_agents": labels.SHARED,
    "impossible_rate": labels.IMPOSSIBLE_RATE,
    "code_replay": labels.CODE_REPLAY,
    "constant_challenge": labels.CONSTANT_CHALLENGE,
    "password_spraying": labels.PASSWORD_SPRAYING,
    "account_guessing": labels.ACCOUNT_GUESSING,
}
WAIT_SECONDS = 1.0  # between two runs of the rules while uses arrive
_DAY = timedelta(days=1)
_USES_PER_STEP_MAX = 200_000


class Evaluation:
    """All rules, with their defaults, over an analytics store that no process has open."""

    def __init__(self, data_dir: Path, traffic: Traffic, written: Appended) -> None:
        self._traffic = traffic
        self._written = written
        self._store = open_analytics(data_dir / "analytics", threads=2)
        self._cursor = self._store.cursor()

    def close(self) -> None:
        self._cursor.close()
        self._store.close()

    def rows(self) -> dict[str, int]:
        """How many rows the store has of the blocks that were written. Asking the service is a use too: not those."""
        written = self._written
        return {
            table: int(
                self._cursor.execute(
                    f"SELECT count(*) FROM {table} WHERE block_seq BETWEEN ? AND ?",
                    [written.first_block, written.last_block],
                ).fetchall()[0][0]
            )
            for table in ("uses", "refused")
        }

    def evaluate(self, since: datetime, days: int, progress: Callable[[datetime], None]) -> list[Finding]:
        """What the rules find within so many days, by the steps of a backtest (`projections.abuse.backtest`).

        But all rules at once, each with what the others need to know too. `progress` is told how far it is.
        """
        detector = Detector(all_rules().values(), b"simulated", threads=2)
        findings: list[Finding] = []
        try:
            for number in range(days):
                day = since + number * _DAY
                bounds = [day, day + _DAY]
                of_day = "SELECT count(*) FROM uses WHERE occurred_at >= ? AND occurred_at < ?"
                ((count,),) = self._cursor.execute(of_day, bounds).fetchall()
                hours = max(1, 24 // (1 + count // _USES_PER_STEP_MAX))
                for hour in range(0, 24, hours):
                    start = day + timedelta(hours=hour)
                    end = min(start + timedelta(hours=hours), day + _DAY)
                    fresh = feed.occurred(self._cursor, detector, start, end)
                    findings += [self._finding(one) for one in detector.look(fresh)]
                progress(day.replace(tzinfo=UTC))
        finally:
            detector.close()
        return findings

    def over_all(self, progress: Callable[[datetime], None]) -> list[Finding]:
        """Over the whole history, and the days before and after it, where a wrong clock may have put some uses."""
        begins = moment(self._traffic.size.start_us).astimezone(UTC).replace(tzinfo=None)
        return self.evaluate(begins - _DAY, self._traffic.size.days + 2, progress)

    def _finding(self, found: Found) -> Finding:
        at_us = seen_us = microseconds(found.at)
        named = {name for name in found.about.values() if name}
        refused = [place for place in found.evidence if place.source == "refused"]
        for place in refused:
            named |= self._refused(place)
        if refused:
            seen_us = max([at_us, *(self._flushed_us(place) for place in refused)])
        return Finding(rule=NAMES[found.rule.name], at_us=at_us, seen_us=seen_us, entities=frozenset(named))

    def _refused(self, place: Evidence) -> set[str]:
        """The address of a count of refused requests. No finding names one."""
        rows: list[Any] = self._cursor.execute(
            "SELECT ip FROM refused WHERE block_seq = ? AND refused_index = ?", [place.seq, place.index]
        ).fetchall()
        return {name for (ip,) in rows if ip for name in (ip, network_of(ip))}

    def _flushed_us(self, place: Evidence) -> int:
        number = place.seq - self._written.first_block
        return self._traffic.writers.flushed.get((number, place.index), 0)
