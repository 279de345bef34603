"""Counts from roll-ups are those of the single uses, whatever was sealed when. Issue "Auditors": usage.

Random histories, sealed at random places, are asked random questions; the answers are held to a count in Python over
all that was recorded.
"""

from __future__ import annotations

import random
import typing
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from events import types as t
from events.streams import LEDGER, USAGE
from projections import analytics
from projections.analytics.usage import _FILTERS, usage_answer, usage_sql
from projections.asking import GroupBy, Interval, UsageRequest
from tests.projections.test_analytics import block, blocks, recorded
from tests.projections.test_analytics_usage import issued

START = datetime(2026, 3, 27, 22, 30, tzinfo=UTC)  # over the end of a day, a month's end and a clock change
MINUTES = 4 * 24 * 60
TOKENS = [f"tok_{number:032x}" for number in range(1, 13)]
FACTS: dict[str | None, dict[str, str | None]] = {
    token: {
        "client_id": None if number % 4 == 3 else f"cli_{number % 3}",
        "subject": f"usr_{number % 5}",
        "kind": "pat" if number % 4 == 3 else "access",
        "token_id": token,
    }
    for number, token in enumerate(TOKENS[:-2])
}
ADDRESSES = [None, *(f"192.0.2.{number}" for number in range(6))]
AGENTS = [None, "curl/8", "shop/1", "shop/2"]
OUTCOMES = ["valid", "valid", "valid", "expired", "revoked"]
ENDPOINTS = ["validate", "api", "introspect"]
Count = dict[str, Any]


def facts(token: str | None) -> dict[str, str | None]:
    """Two of the tokens were never issued: only their ids are known."""
    return FACTS.get(token, {"client_id": None, "subject": None, "kind": None, "token_id": token})


class History:
    """A store with random uses, and these as plain counts."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.store = analytics.open_analytics(directory)
        self.counts: list[Count] = []
        late = self.rng.random() < 0.5
        if not late:
            self.issue()
        for seq in range(1, 31):
            self.record(seq)
            if self.rng.random() < 0.2:
                self.store.flush()
                self.store.seal()
        if late:
            self.issue()
        self.store.flush()

    def issue(self) -> None:
        tokens = [(token, told) for token, told in FACTS.items() if token is not None]
        kinds = {"pat": t.Kind.PAT, "access": t.Kind.ACCESS}
        self.store.apply(
            LEDGER,
            recorded(
                *(
                    issued(token, kinds[str(one["kind"])], one["client_id"], str(one["subject"]))
                    for token, one in tokens
                )
            ),
        )

    def moment(self) -> datetime:
        """Often at the very beginning of a minute, an hour or a day."""
        whole = self.rng.choice([1, 1, 60_000_000, 3_600_000_000, 86_400_000_000])
        microseconds = int(START.timestamp()) * 1_000_000 + self.rng.randrange(MINUTES * 60_000_000)
        return datetime.fromtimestamp(0, UTC) + timedelta(microseconds=microseconds // whole * whole)

    def record(self, seq: int) -> None:
        rng = self.rng
        uses, refused = [], []
        for _ in range(rng.randrange(40)):
            token, outcome, endpoint = rng.choice([*TOKENS, None]), rng.choice(OUTCOMES), rng.choice(ENDPOINTS)
            ip, agent, scope, at = (
                rng.choice(ADDRESSES),
                rng.choice(AGENTS),
                rng.choice(["", "a", "a b"]),
                self.moment(),
            )
            told = {"outcome": outcome, "endpoint": endpoint, "ip": ip, "user_agent": agent, "scope": scope or None}
            self.counts.append({"at": at, "token": token, "uses": 1} | told | facts(token))
            occurred = round(at.timestamp() * 1e6)
            context = t.Context(ip, agent) if ip or agent else None
            hidden = None if token else b"x" * 32
            uses.append(t.TokenUsed(occurred, token, hidden, outcome, endpoint, "c", scope, context=context))
        for _ in range(rng.randrange(3)):
            minute, ip, requests = int(self.moment().timestamp()) // 60, rng.choice(ADDRESSES), rng.randrange(1, 9)
            refused.append(t.RefusedCount(minute, "c", ip, "unknown", "validate", requests))
            told = {"outcome": "unknown", "endpoint": "validate", "ip": ip, "user_agent": None, "scope": None}
            at = datetime.fromtimestamp(60 * minute, UTC)
            self.counts.append({"at": at, "token": None, "uses": requests} | told | facts(None))
        self.store.apply(USAGE, blocks(block(*uses, refused=tuple(refused)), first=seq))

    def request(self) -> UsageRequest:
        rng = self.rng
        from_, to = sorted((self.moment(), self.moment() + timedelta(microseconds=1)))
        filters = {name: rng.choice(self.counts)[name] for name in _FILTERS if rng.random() < 0.12}
        return UsageRequest(
            group_by=rng.choice([None, *typing.get_args(GroupBy)]),
            interval=rng.choice([None, *typing.get_args(Interval)]),
            from_=from_,
            to=to,
            limit=rng.choice([1, 3, 100]),
            distinct=rng.random() < 0.5,
            **{name: value for name, value in filters.items() if value is not None},
        )

    def answer(self, request: UsageRequest) -> dict[str, Any]:
        with self.store.cursor() as cursor:
            rows = cursor.execute(*usage_sql(request)).fetchall()
        answer = usage_answer(request, rows, ledger_seq=1, usage_seq=1)
        members: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(answer))
        return {name: members[name] for name in ("totals", "groups", "other") if name in members}


def by_hand(counts: Iterable[Count], request: UsageRequest) -> dict[str, Any]:
    """What the answer must be."""
    chosen = [
        one
        for one in counts
        if request.from_ <= one["at"] < request.to
        and all(getattr(request, name) in (None, one[name]) for name in _FILTERS)
    ]
    if request.group_by is None:
        return {"totals": added_up(chosen, request, timed=request.interval is not None)}
    groups: dict[str | None, list[Count]] = defaultdict(list)
    for one in chosen:
        groups[one[request.group_by]].append(one)
    ordered = sorted(groups, key=lambda value: (-sum(one["uses"] for one in groups[value]), value is None, value))
    timed = request.interval is not None
    found: dict[str, Any] = {
        "totals": added_up(chosen, request, timed=False),
        "groups": [
            {"value": value} | added_up(groups[value], request, timed=timed) for value in ordered[: request.limit]
        ],
    }
    beyond = ordered[request.limit :]
    if beyond:
        others = [one for value in beyond for one in groups[value]]
        found["other"] = {"groups": len(beyond)} | added_up(others, request, timed=timed)
    return found


def added_up(counts: list[Count], request: UsageRequest, *, timed: bool) -> dict[str, Any]:
    refused = [one for one in counts if one["outcome"] != "valid"]
    found: dict[str, Any] = {
        "uses": sum(one["uses"] for one in counts),
        "refused": sum(one["uses"] for one in refused),
    }
    if request.distinct:
        found["tokens"] = len({one["token"] for one in counts} - {None})
        found["addresses"] = len({one["ip"] for one in counts} - {None})
    if counts:
        times = sorted(one["at"] for one in counts)
        found |= {"first_used_at": text(times[0]), "last_used_at": text(times[-1])}
    if timed:
        points: dict[datetime, list[int]] = defaultdict(lambda: [0, 0])
        for one in counts:
            cut = {"minute": {}, "hour": {"minute": 0}, "day": {"minute": 0, "hour": 0}}[str(request.interval)]
            point = points[one["at"].replace(second=0, microsecond=0, **cut)]
            point[0] += one["uses"]
            point[1] += one["uses"] if one["outcome"] != "valid" else 0
        found["series"] = [{"starts_at": text(at), "uses": n, "refused": r} for at, (n, r) in sorted(points.items())]
    return found


def text(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_those_of_the_single_uses(tmp_path: Path, seed: int) -> None:
    history = History(tmp_path / "store", seed)
    for _ in range(30):
        request = history.request()
        assert history.answer(request) == by_hand(history.counts, request), request
    history.store.seal()
    for _ in range(15):
        request = history.request()
        assert history.answer(request) == by_hand(history.counts, request), request
    history.store.close()


def test_range_to_the_end_of_time_is_counted(tmp_path: Path) -> None:
    history = History(tmp_path / "store", 7)
    end = datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    for from_ in (datetime(1, 1, 1, tzinfo=UTC), START, end - timedelta(minutes=3)):
        request = UsageRequest(from_=from_, to=end, distinct=True)
        assert history.answer(request) == by_hand(history.counts, request)
    history.store.close()
