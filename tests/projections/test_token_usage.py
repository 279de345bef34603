"""Tokens by their uses and scopes, counted by hand and by real DuckDB. Issue "Auditors": usage."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pytest
from msgspec import UNSET

from events.streams import USAGE
from projections import analytics
from projections.analytics.tokens import scopes_sql, scopes_used, token_usage, tokens_sql
from projections.asking_tokens import ScopesRequest, ScopesUsed, Sort, TokensRequest, TokenUsage
from tests.projections import token_population as p
from tests.projections.test_analytics import block, blocks
from tests.projections.token_population import NOW, START, at


@pytest.fixture(params=p.SEALED.values(), ids=p.SEALED.keys(), scope="module")
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[analytics.Analytics]:
    with p.stored(tmp_path_factory.mktemp("store"), request.param) as opened:
        yield opened


def run(store: analytics.Analytics, query: tuple[str, dict[str, Any]]) -> list[tuple[Any, ...]]:
    with store.cursor() as cursor:
        # As JSON has the parameters, for whoever runs the query again.
        return cursor.execute(query[0], msgspec.json.decode(msgspec.json.encode(query[1]))).fetchall()


def tokens(store: analytics.Analytics, **asked: Any) -> list[TokenUsage]:
    return [token_usage(row) for row in run(store, tokens_sql(TokensRequest(now=NOW, **asked)))]


def pages(store: analytics.Analytics, sort: Sort, *, descending: bool) -> list[TokenUsage]:
    found: list[TokenUsage] = []
    after: tuple[Any, str] | None = None
    for _ in range(len(p.USES) + 10):
        page = tokens(store, sort=sort, descending=descending, limit=3, after=after)
        found += page[:3]
        if len(page) <= 3:
            return found
        value = getattr(page[2], sort)
        after = (None if value is UNSET else value, page[2].token_id)
    raise AssertionError("the pages never end")


COUNTED = {
    p.ACCESS: (3, 1, 2, 0, at(19.6)),
    p.PAT: (2, 0, 1, 0, at(19.7)),
    p.FIRST_ACCESS: (0, 0, 0, 0, UNSET),
    p.FIRST_REFRESH: (0, 0, 0, 0, UNSET),
    p.SECOND_ACCESS: (1, 0, 1, 0, at(19.8)),
    p.SECOND_REFRESH: (0, 0, 0, 0, UNSET),
    # It validated one known token and three unknown ones after its last own use.
    p.SAT: (1, 0, 1, 4, at(19.95)),
    p.NEW_PAT: (0, 0, 0, 0, UNSET),
    p.EXPIRED: (1, 0, 1, 0, at(0.5)),
    p.REVOKED: (0, 0, 0, 0, UNSET),
}


def test_token_usage_counts_uses_addresses_and_validations(store: analytics.Analytics) -> None:
    found = {
        one.token_id: (one.uses, one.refused, one.addresses, one.validations, one.last_used_at) for one in tokens(store)
    }
    assert found == COUNTED


def test_token_usage_tells_what_a_token_is(store: analytics.Analytics) -> None:
    [access] = tokens(store, client_id=p.SHOP, scope="a", status="active", sort="uses", limit=1)[:1]
    assert (access.token_id, access.kind, access.scope) == (p.ACCESS, "access", "a b")
    assert (access.age_days, access.issued_at, access.expires_at) == (20, START, p.LATE)
    assert (access.client_id, access.subject, access.issued_seq) == (p.SHOP, p.SHOP, 6)
    [robot] = tokens(store, kind="sat")
    assert (robot.client_id, robot.subject) == (UNSET, p.ROBOT)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"status": "spent"}, {p.FIRST_REFRESH}),
        ({"status": "revoked"}, {p.REVOKED}),
        ({"status": "expired"}, {p.EXPIRED}),
        ({"subject": p.ANNE, "status": "active"}, {p.PAT, p.NEW_PAT}),
        ({"client_id": p.SHOP, "kind": "refresh"}, {p.FIRST_REFRESH, p.SECOND_REFRESH}),
        ({"scope": "c"}, {p.PAT, p.NEW_PAT}),
        ({"scope": "a b"}, set()),
        ({"client_id": "' OR true --"}, set()),
        ({"status": "active", "unused_since": at(0)}, set()),
        ({"status": "active", "unused_since": at(1), "kind": "access"}, {p.FIRST_ACCESS}),
        ({"status": "active", "unused_since": at(19.7)}, {p.FIRST_ACCESS, p.SECOND_REFRESH, p.NEW_PAT, p.ACCESS}),
        # The robot validated later.
        ({"status": "active", "unused_since": at(19.92), "kind": "sat"}, set()),
        ({"status": "active", "unused_since": at(19.96), "kind": "sat"}, {p.SAT}),
        ({"status": "active", "expiring_until": NOW + timedelta(days=1)}, {p.PAT}),
        ({"status": "active", "expiring_until": NOW}, set()),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # in one order, whatever the process
)
def test_token_usage_filters_all_hold(store: analytics.Analytics, asked: dict[str, Any], found: set[str]) -> None:
    assert {one.token_id for one in tokens(store, **asked)} == found


@pytest.mark.parametrize("sort", typing.get_args(Sort))
@pytest.mark.parametrize("descending", [True, False], ids=["descending", "ascending"])
def test_token_usage_pages_hold_every_token_once_in_order(
    store: analytics.Analytics, sort: Sort, descending: bool
) -> None:
    found = pages(store, sort, descending=descending)
    assert len(found) == len({one.token_id for one in found}) == len(COUNTED)
    never = START - timedelta(days=1)
    keys = [never if (value := getattr(one, sort)) is UNSET else value for one in found]
    assert keys == sorted(keys, reverse=descending)


def test_token_usage_sql_holds_no_value(store: analytics.Analytics) -> None:
    planted: dict[str, Any] = dict.fromkeys(("client_id", "subject", "kind", "scope"), "planted")
    sql, parameters = tokens_sql(TokensRequest(now=NOW, **planted, after=(1, p.PAT), sort="uses"))
    assert "planted" not in sql
    assert parameters.items() >= {"client_id": "planted", "after_value": 1}.items()
    assert run(store, (sql, parameters)) == []


# Scopes


def scopes(store: analytics.Analytics, *, days: float = 10, **asked: Any) -> dict[str, ScopesUsed]:
    since = (NOW - timedelta(days=days)).replace(hour=0, minute=0)
    request = ScopesRequest(**{"now": NOW, "since": since, "by": "token"} | asked)
    found = scopes_used(request, run(store, scopes_sql(request)))
    return {str(one.token_id or one.client_id): one for one in found}


def names(of_it: ScopesUsed) -> tuple[str, list[str], list[str], Any]:
    return of_it.scope, [one.name for one in of_it.used], [one.name for one in of_it.unused], of_it.proposed_scope


def test_scopes_of_good_tokens_are_used_or_not(store: analytics.Analytics) -> None:
    assert {token_id: names(one) for token_id, one in scopes(store).items()} == {
        p.ACCESS: ("a b", [], ["a", "b"], UNSET),  # `a` was used before, and `z` was refused
        p.PAT: ("a b c", ["a"], ["b", "c"], "a"),
        p.FIRST_ACCESS: ("a b", [], ["a", "b"], UNSET),
        p.SECOND_ACCESS: ("a b", ["a"], ["b"], "a"),
        p.SAT: ("ledger:admin", ["ledger:users", "ledger:validate"], ["ledger:admin"], "ledger:users ledger:validate"),
        p.NEW_PAT: ("a b c", [], ["a", "b", "c"], UNSET),
    }


def test_scopes_uses_that_asked_for_none_are_counted_apart(store: analytics.Analytics) -> None:
    found = scopes(store)
    assert (found[p.ACCESS].uses, found[p.ACCESS].unscoped_uses) == (1, 1)
    assert (found[p.PAT].uses, found[p.PAT].unscoped_uses) == (1, 0)
    assert [(one.name, one.uses, one.last_used_at) for one in found[p.PAT].unused] == [("b", 0, UNSET), ("c", 0, at(1))]
    assert [(one.name, one.uses, one.granted_as) for one in found[p.SAT].used] == [
        ("ledger:users", 1, "ledger:admin"),
        ("ledger:validate", 4, "ledger:admin"),
    ]


def test_scopes_over_a_longer_time_are_used(store: analytics.Analytics) -> None:
    found = scopes(store, days=20, include_used=True)
    assert names(found[p.ACCESS]) == ("a b", ["a"], ["b"], "a")
    assert names(found[p.PAT]) == ("a b c", ["a", "c"], ["b"], "a c")
    assert found[p.PAT].uses == 2


def test_scopes_of_clients_are_those_registered_and_those_of_their_tokens(store: analytics.Analytics) -> None:
    found = scopes(store, by="client")
    assert {client_id: names(one) for client_id, one in found.items()} == {
        p.SHOP: ("a b z", ["a"], ["b", "z"], "a"),
        p.IDLE: ("q", [], ["q"], UNSET),
    }
    assert (found[p.SHOP].tokens, found[p.SHOP].uses, found[p.SHOP].unscoped_uses) == (3, 2, 1)
    # Until its token expired it used the other one too.
    assert names(scopes(store, by="client", days=20)[p.SHOP]) == ("a b z", ["a", "b"], ["z"], "a b")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"token_id": p.PAT}, [p.PAT]),
        ({"subject": p.ROBOT}, [p.SAT]),
        ({"client_id": p.SHOP, "kind": "access"}, [p.ACCESS, p.FIRST_ACCESS, p.SECOND_ACCESS]),
        ({"limit": 1, "after": p.SECOND_ACCESS}, [p.SAT, p.NEW_PAT]),
        ({"by": "client", "client_id": p.IDLE}, [p.IDLE]),
        ({"by": "client", "after": p.SHOP}, [p.IDLE]),
        ({"token_id": "tok_x"}, []),
    ],
    ids=str,
)
def test_scopes_filters_and_pages(store: analytics.Analytics, asked: dict[str, Any], found: list[str]) -> None:
    assert list(scopes(store, **asked)) == found


def test_scopes_of_a_token_that_used_all_are_left_out(tmp_path: Path) -> None:
    with p.stored(tmp_path / "store", 0) as store:
        later = [p.use(19.9, p.SECOND_ACCESS, "b a")]
        store.apply(USAGE, blocks(block(*later), first=len(p.USES) + 2))
        store.flush()
        assert p.SECOND_ACCESS not in scopes(store)
        assert names(scopes(store, include_used=True)[p.SECOND_ACCESS]) == ("a b", ["a", "b"], [], "a b")


def test_token_queries_give_the_numbers_elsewhere(tmp_path: Path) -> None:
    """An auditor can run them as they were told, on a copy of the store."""
    with p.stored(tmp_path / "store", 0) as store:
        queries = [
            tokens_sql(TokensRequest(now=NOW, sort="uses")),
            scopes_sql(ScopesRequest(now=NOW, since=START, by="client")),
        ]
        before = [run(store, query) for query in queries]
    with duckdb.connect(str(store.path), read_only=True) as database:
        assert [database.execute(*query).fetchall() for query in queries] == before
