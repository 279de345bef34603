"""Who used what, counted by hand and by real DuckDB. Issue "Auditors": usage."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pytest

from events import types as t
from events.streams import LEDGER, USAGE
from projections import analytics
from projections.analytics.usage import _FILTERS, _GROUPS, usage_answer, usage_sql
from projections.asking import GroupBy, UsageRequest
from tests.projections.test_analytics import block, blocks, common, minted, new_id, recorded

START = datetime(2026, 11, 22, 10, tzinfo=UTC)
SHOP, TILL, ANNE = "cli_shop", "cli_till", "usr_anne"
FIRST, SECOND, PAT = (f"tok_{number:032x}" for number in (1, 2, 3))
UNISSUED = f"tok_{4:032x}"


def issued(token_id: str, kind: t.Kind, client_id: str | None, subject: str) -> t.TokenIssued:
    members = common(grant_id=new_id("grt"), subject=subject, client_id=client_id, scope="", audience=())
    return t.TokenIssued(**members, tokens=(minted(token_id, kind),))


def use(minutes: float, token_id: str | None, outcome: str = "valid", **fields: Any) -> t.TokenUsed:
    context = t.Context(fields.pop("ip", "192.0.2.1"), fields.pop("agent", "curl/8"), "GET", "/")
    occurred = int((START + timedelta(minutes=minutes)).timestamp() * 1_000_000)
    endpoint = fields.pop("endpoint", "validate")
    unknown = None if token_id else b"x" * 32
    return t.TokenUsed(occurred, token_id, unknown, outcome, endpoint, "c", context=context, **fields)


# Shop 4 uses by 2 tokens, till 2 by 1 (kind pat), a token that LEDGER does not tell of yet 1, unknown tokens 3.
USES = (
    use(0, FIRST, scope="a"),
    use(10, FIRST, scope="a b", ip="192.0.2.2"),
    use(70, SECOND, "revoked", agent="agent"),
    use(70.5, SECOND, "expired", endpoint="introspect"),
    use(75, PAT),
    use(125, PAT, "revoked", ip="192.0.2.3"),
    use(130, UNISSUED, endpoint="api"),
)
MINUTE = int(START.timestamp()) // 60
REFUSED = (t.RefusedCount(MINUTE + 65, "c", "192.0.2.9", "unknown", "validate", 3),)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[analytics.Analytics]:
    """The uses above, in the store."""
    store = analytics.open_analytics(tmp_path / "store")
    store.apply(
        LEDGER,
        recorded(
            issued(FIRST, t.Kind.ACCESS, SHOP, SHOP),
            issued(SECOND, t.Kind.ACCESS, SHOP, SHOP),
            issued(PAT, t.Kind.PAT, TILL, ANNE),
        ),
    )
    store.apply(USAGE, blocks(block(*USES[:4]), block(*USES[4:], refused=REFUSED)))
    store.flush()
    yield store
    store.close()


def request(**fields: Any) -> UsageRequest:
    return UsageRequest(**{"from_": START, "to": START + timedelta(hours=3)} | fields)


def counted(store: analytics.Analytics, **fields: Any) -> dict[str, Any]:
    """What the answer counts, as JSON has it."""
    asked = request(**fields)
    with store.cursor() as cursor:
        rows = cursor.execute(*usage_sql(asked)).fetchall()
    answer = usage_answer(asked, rows, ledger_seq=3, usage_seq=2)
    members: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(answer))
    return {name: members[name] for name in ("totals", "groups", "other") if name in members}


def at(hours: int, uses: int, refused: int) -> dict[str, Any]:
    return {"starts_at": f"2026-11-22T{10 + hours}:00:00Z", "uses": uses, "refused": refused}


def test_everything_is_counted_with_the_unknown_tokens(opened: analytics.Analytics) -> None:
    assert counted(opened, distinct=True) == {
        "totals": {
            "uses": 10,
            "refused": 6,
            "tokens": 4,
            "addresses": 4,
            "first_used_at": "2026-11-22T10:00:00Z",
            "last_used_at": "2026-11-22T12:10:00Z",
        }
    }


def test_intervals_without_uses_are_left_out(opened: analytics.Analytics) -> None:
    found = counted(opened, interval="hour", to=START + timedelta(days=2))["totals"]
    assert found["series"] == [at(0, 2, 0), at(1, 6, 5), at(2, 2, 1)]
    assert found["uses"] == 10
    by_minute = counted(opened, interval="minute")["totals"]["series"]
    assert [(one["starts_at"][11:16], one["uses"]) for one in by_minute] == [
        *(("10:00", 1), ("10:10", 1), ("11:05", 3), ("11:10", 2), ("11:15", 1), ("12:05", 1), ("12:10", 1)),
    ]
    by_day = counted(opened, interval="day")["totals"]["series"]
    assert by_day == [{"starts_at": "2026-11-22T00:00:00Z", "uses": 10, "refused": 6}]


GROUPED: dict[GroupBy, list[tuple[str | None, int, int]]] = {
    "client_id": [(SHOP, 4, 2), (None, 4, 3), (TILL, 2, 1)],
    "subject": [(SHOP, 4, 2), (None, 4, 3), (ANNE, 2, 1)],
    "token_id": [(None, 3, 3), (FIRST, 2, 0), (SECOND, 2, 2), (PAT, 2, 1), (UNISSUED, 1, 0)],
    "kind": [("access", 4, 2), (None, 4, 3), ("pat", 2, 1)],
    "outcome": [("valid", 4, 0), ("unknown", 3, 3), ("revoked", 2, 2), ("expired", 1, 1)],
    "scope": [(None, 8, 6), ("a", 1, 0), ("a b", 1, 0)],
    "ip": [("192.0.2.1", 5, 2), ("192.0.2.9", 3, 3), ("192.0.2.2", 1, 0), ("192.0.2.3", 1, 1)],
    "user_agent": [("curl/8", 6, 2), (None, 3, 3), ("agent", 1, 1)],
    "endpoint": [("validate", 8, 5), ("api", 1, 0), ("introspect", 1, 1)],
}


def test_every_group_and_filter_has_its_column() -> None:
    assert list(GROUPED) == list(_GROUPS) == list(typing.get_args(GroupBy))
    assert set(_FILTERS) == set(UsageRequest.__struct_fields__) - {
        *("group_by", "interval", "from_", "to", "limit", "distinct", "explain"),
    }


@pytest.mark.parametrize(("name", "groups"), GROUPED.items(), ids=GROUPED)
def test_groups_come_by_uses(opened: analytics.Analytics, name: str, groups: list[Any]) -> None:
    found = counted(opened, group_by=name)
    assert [(one["value"], one["uses"], one["refused"]) for one in found["groups"]] == groups
    assert "other" not in found
    assert found["totals"] == counted(opened)["totals"]


def test_groups_beyond_the_limit_are_other(opened: analytics.Analytics) -> None:
    found = counted(opened, group_by="token_id", interval="hour", limit=2, distinct=True)
    assert [one["value"] for one in found["groups"]] == [None, FIRST]
    assert [one["series"] for one in found["groups"]] == [[at(1, 3, 3)], [at(0, 2, 0)]]
    assert found["other"] == {
        "groups": 3,
        "uses": 5,
        "refused": 3,
        "tokens": 3,
        "addresses": 2,
        "first_used_at": "2026-11-22T11:10:00Z",
        "last_used_at": "2026-11-22T12:10:00Z",
        "series": [at(1, 3, 2), at(2, 2, 1)],
    }
    # Those without a value may be among the others, and are one group then.
    assert counted(opened, group_by="client_id", limit=1)["other"]["groups"] == 2


@pytest.mark.parametrize(
    ("filters", "uses"),
    [
        ({"client_id": SHOP}, 4),
        ({"subject": ANNE}, 2),
        ({"token_id": SECOND}, 2),
        ({"token_id": "tok_x"}, 0),
        ({"kind": "pat"}, 2),
        ({"outcome": "unknown"}, 3),
        ({"endpoint": "introspect"}, 1),
        ({"ip": "192.0.2.1"}, 5),
        ({"client_id": SHOP, "outcome": "valid"}, 2),
        ({"client_id": "' OR true --"}, 0),
        ({"from_": START + timedelta(minutes=10), "to": START + timedelta(minutes=75)}, 6),
        ({"from_": START + timedelta(days=1), "to": START + timedelta(days=2)}, 0),
    ],
    ids=str,
)
def test_filters_all_hold_and_the_range_is_half_open(
    opened: analytics.Analytics, filters: dict[str, Any], uses: int
) -> None:
    assert counted(opened, **filters)["totals"]["uses"] == uses
    grouped = counted(opened, group_by="outcome", interval="hour", **filters)
    assert sum(one["uses"] for one in grouped["groups"]) == uses
    assert sum(point["uses"] for one in grouped["groups"] for point in one["series"]) == uses


def test_zone_of_the_range_is_heeded(opened: analytics.Analytics) -> None:
    since = datetime.fromisoformat("2026-11-22T13:05:00+02:00")
    assert counted(opened, from_=since)["totals"]["uses"] == 8


def test_sql_holds_no_value_and_gives_the_numbers_elsewhere(opened: analytics.Analytics) -> None:
    """An auditor can run it as it was told, on a copy of the store."""
    filters = dict.fromkeys(_FILTERS, "planted")
    sql, parameters = usage_sql(request(group_by="ip", interval="hour", **filters))
    assert "planted" not in sql
    assert parameters.keys() == set(re.findall(r"\$(\w+)", sql))
    sql, parameters = usage_sql(request(group_by="kind", token_id=PAT))
    told = msgspec.json.decode(msgspec.json.encode(parameters))
    path = opened.path
    opened.close()
    with duckdb.connect(str(path), read_only=True) as database:
        rows = database.execute(sql, told).fetchall()
    assert [row[6] for row in rows] == [2, 2]
