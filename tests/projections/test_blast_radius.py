"""What a leaked token reached, by hand and by real DuckDB. Issue "Auditors": explain and point in time."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from events.streams import LEDGER
from events.types import AccessRenewed, Kind
from projections import analytics
from projections.analytics.blast_radius import LISTED_MAX, Radius
from projections.asking_tokens import NamedSql, Places, RadiusReport, RadiusRequest, RadiusUse
from tests.making import START, History, authorized, grt, head, minted, redeemed, sha256_of, tok
from tests.projections import token_population as p
from tests.projections.token_population import ADDRESSES, LATE, NOW, at

FIRST, SECOND, THIRD = ADDRESSES
NETWORK, OTHER_NETWORK = "192.0.2.0/24", "198.51.100.0/24"


@pytest.fixture(params=p.SEALED.values(), ids=p.SEALED.keys(), scope="module")
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[analytics.Analytics]:
    with p.stored(tmp_path_factory.mktemp("store"), request.param) as opened:
        yield opened


def asking(store: analytics.Analytics, **asked: Any) -> tuple[RadiusReport, list[RadiusUse], list[NamedSql]]:
    with store.cursor() as cursor:
        cursor.begin()
        radius = Radius(cursor, RadiusRequest(**{"now": NOW, "since": at(19)} | asked))
        assert radius.found()
        answer = radius.report(), radius.uses(), radius.ran
        cursor.rollback()
    return answer


def report(store: analytics.Analytics, **asked: Any) -> RadiusReport:
    return asking(store, **asked)[0]


def relations(of_it: RadiusReport) -> dict[str, tuple[str, str, bool]]:
    return {one.token_id: (one.relation, one.status, one.would_end) for one in of_it.related.items}


def places(of_it: Places) -> list[tuple[str | None, int, datetime, datetime, bool]]:
    return [(one.value, one.uses, one.first_seen_at, one.last_seen_at, one.new) for one in of_it.items]


def test_blast_radius_of_a_refresh_token_holds_what_came_out_of_it(store: analytics.Analytics) -> None:
    found = report(store, token_id=p.FIRST_REFRESH)
    assert relations(found) == {
        p.FIRST_REFRESH: ("self", "spent", False),
        p.SECOND_ACCESS: ("descendant", "active", True),
        p.SECOND_REFRESH: ("descendant", "active", True),
        # A revocation of the refresh token ends the grant, and this with it.
        p.FIRST_ACCESS: ("sibling", "active", True),
    }
    assert next(iter(found.related.items)) == found.token
    assert (found.related.tokens, found.related.grants, found.related.active, found.related.would_end) == (4, 1, 3, 3)
    assert (found.usage.uses, found.usage.tokens, found.usage.last_used_at) == (1, 1, at(19.8))


def test_blast_radius_of_a_later_refresh_token_has_ancestors(store: analytics.Analytics) -> None:
    assert relations(report(store, token_id=p.SECOND_REFRESH)) == {
        p.SECOND_REFRESH: ("self", "active", True),
        p.FIRST_REFRESH: ("ancestor", "spent", False),
        p.SECOND_ACCESS: ("sibling", "active", True),
        p.FIRST_ACCESS: ("sibling", "active", True),
    }


def test_blast_radius_of_an_access_token_ends_nothing_else(store: analytics.Analytics) -> None:
    found = relations(report(store, token_id=p.SECOND_ACCESS))
    assert found[p.SECOND_ACCESS] == ("self", "active", True)
    assert {one for one in found.values() if one[0] != "self"} == {
        ("ancestor", "spent", False),
        ("sibling", "active", False),
    }


def test_blast_radius_of_a_pat_goes_on_in_its_successor(store: analytics.Analytics) -> None:
    found = report(store, token_id=p.PAT)
    assert relations(found) == {p.PAT: ("self", "active", True), p.NEW_PAT: ("descendant", "active", False)}
    assert found.related.items[1].rotated_from == p.PAT
    assert relations(report(store, token_id=p.NEW_PAT)) == {
        p.NEW_PAT: ("self", "active", True),
        p.PAT: ("ancestor", "active", False),
    }


def test_blast_radius_by_hash_is_that_of_the_token(store: analytics.Analytics) -> None:
    by_hash = asking(store, token_sha256=sha256_of(p.PAT).hex())
    assert by_hash[:2] == asking(store, token_id=p.PAT)[:2]


@pytest.mark.parametrize(
    "asked",
    [{"token_id": f"tok_{99:032x}"}, {"token_sha256": "0" * 64}, {"grant_id": "grt_x"}, {"client_id": "cli_x"}],
    ids=str,
)
def test_blast_radius_of_nothing_known_is_not_found(store: analytics.Analytics, asked: dict[str, str]) -> None:
    with store.cursor() as cursor:
        cursor.begin()
        assert not Radius(cursor, RadiusRequest(now=NOW, since=at(19), **asked)).found()
        cursor.rollback()


def test_blast_radius_tells_where_uses_came_from_and_what_is_new(store: analytics.Analytics) -> None:
    found = report(store, client_id=p.SHOP)
    assert places(found.networks) == [
        (NETWORK, 4, at(1), at(19.8), False),
        (OTHER_NETWORK, 1, at(0.5), at(0.5), False),
    ]
    assert places(found.agents) == [("Chrome", 1, at(19.8), at(19.8), True), ("curl", 4, at(0.5), at(19.6), False)]
    assert places(found.new_addresses) == [(SECOND, 2, at(19.5), at(19.8), True)]
    assert (found.networks.total, found.agents.new, found.new_addresses.total) == (2, 1, 1)
    assert places(report(store, client_id=p.SHOP, since=at(19.6)).new_addresses) == []
    of_token = report(store, token_id=p.ACCESS)
    assert [(one.value, one.refused, one.addresses) for one in of_token.networks.items] == [(NETWORK, 1, 2)]


def test_blast_radius_counts_uses_and_their_series(store: analytics.Analytics) -> None:
    found = report(store, client_id=p.SHOP).usage
    assert (found.uses, found.refused, found.tokens, found.addresses) == (5, 1, 3, 3)
    assert (found.first_used_at, found.last_used_at) == (at(0.5), at(19.8))
    assert [(one.outcome, one.uses) for one in found.outcomes] == [("valid", 4), ("insufficient_scope", 1)]
    # The population begins at noon, and days at midnight.
    assert [(one.starts_at, one.uses, one.refused) for one in found.series] == [(at(0.5), 2, 0), (at(19.5), 3, 1)]
    by_hour = report(store, client_id=p.SHOP, interval="hour").usage
    assert sum(one.uses for one in by_hour.series) == 5
    assert all(one.starts_at.minute == 0 for one in by_hour.series)


def test_blast_radius_tells_what_would_break(store: analytics.Analytics) -> None:
    found = report(store, client_id=p.SHOP).would_break
    assert (found.since, found.tokens, found.uses, found.last_used_at) == (at(19), 4, 2, at(19.8))
    assert [(one.value, one.uses, one.tokens) for one in found.callers] == [(p.VALIDATOR, 1, 1), (p.SAT, 1, 1)]
    assert [(one.value, one.uses) for one in found.addresses] == [(SECOND, 2)]
    assert [(one.value, one.last_used_at) for one in found.agents] == [("Chrome", at(19.8)), ("curl", at(19.5))]
    assert [(one.value, one.uses) for one in found.endpoints] == [("validate", 2)]
    assert (found.refreshes, found.validations) == (0, 0)


def test_blast_radius_of_what_ended_breaks_nothing(store: analytics.Analytics) -> None:
    for token_id, uses in ((p.EXPIRED, 1), (p.REVOKED, 0), (p.FIRST_REFRESH, 1)):
        found = report(store, token_id=token_id)
        assert found.usage.uses == uses
        assert found.would_break.uses == (1 if token_id == p.FIRST_REFRESH else 0)
    gone = report(store, token_id=p.REVOKED).token
    assert gone is not UNSET
    assert (gone.status, gone.reason, gone.revoked_seq, gone.would_end) == ("revoked", "compromised", 15, False)


def test_blast_radius_of_a_caller_tells_its_deeds_and_validations(store: analytics.Analytics) -> None:
    found = report(store, token_id=p.SAT)
    assert [(one.type, one.events, one.first_seq, one.last_seq) for one in found.deeds] == [
        ("token.issued/1", 1, 11, 11),
        ("token.superseded/1", 1, 12, 12),
    ]
    assert (found.usage.uses, found.usage.validations) == (1, 4)
    assert (found.would_break.uses, found.would_break.validations) == (1, 4)


def test_blast_radius_counts_refreshes_of_the_last_day(store: analytics.Analytics) -> None:
    soon = NOW - timedelta(days=19, hours=13)
    assert report(store, grant_id=grt(3), now=soon).would_break.refreshes == 1
    assert report(store, grant_id=grt(3)).would_break.refreshes == 0
    assert report(store, token_id=p.FIRST_ACCESS, now=soon).would_break.refreshes == 0


def test_blast_radius_pages_hold_every_use_once_newest_first(store: analytics.Analytics) -> None:
    found: list[RadiusUse] = []
    after: tuple[int, int] | None = None
    for _ in range(10):
        with store.cursor() as cursor:
            cursor.begin()
            radius = Radius(cursor, RadiusRequest(now=NOW, since=at(19), client_id=p.SHOP, limit=2, after=after))
            assert radius.found()
            page = radius.uses()
            cursor.rollback()
        found += page[:2]
        if len(page) <= 2:
            break
        after = page[1].usage_seq, page[1].use_index
    assert [(one.usage_seq, one.use_index, one.token_id, one.ip) for one in found] == [
        (7, 0, p.SECOND_ACCESS, SECOND),
        (5, 0, p.ACCESS, FIRST),
        (4, 0, p.ACCESS, SECOND),
        (2, 0, p.ACCESS, FIRST),
        (1, 0, p.EXPIRED, THIRD),
    ]
    last = found[0]
    assert (last.outcome, last.caller, last.scope, last.network, last.user_agent) == (
        *("valid", p.VALIDATOR, "a", NETWORK),
        "Chrome/1",
    )


def test_blast_radius_of_a_client_without_tokens_is_empty(store: analytics.Analytics) -> None:
    found, uses, _ = asking(store, client_id=p.IDLE)
    assert (found.related.tokens, found.usage.uses, found.would_break.tokens, uses) == (0, 0, 0, [])


def test_blast_radius_queries_run_again_as_they_were_told(store: analytics.Analytics) -> None:
    """In their order, in one transaction, as an auditor would on a copy of the store."""
    found, uses, ran = asking(store, client_id=p.SHOP)
    told = msgspec.json.decode(msgspec.json.encode(ran), type=list[NamedSql])
    assert not any("cli_" in one.statement for one in told)
    with store.cursor() as cursor:
        cursor.begin()
        rows = {one.name: cursor.execute(one.statement, one.parameters).fetchall() for one in told}
        cursor.rollback()
    assert len(rows["uses"]) == len(uses) == found.usage.uses
    assert rows["validations"] == [(found.usage.validations,)]
    assert len(rows["tokens"]) == found.related.tokens <= LISTED_MAX


def test_blast_radius_of_a_refresh_token_that_stays_holds_what_it_was_used_for(tmp_path: Path) -> None:
    first = (minted(tok(2), expires_at=LATE), minted(tok(3), Kind.REFRESH, expires_at=LATE))
    renewed = AccessRenewed(
        **head(),
        grant_id=grt(1),
        refresh_token_id=tok(3),
        tokens=(minted(tok(4), expires_at=LATE),),
        refresh_expires_at=LATE + timedelta(days=1),
    )
    history = History(authorized(grt(1), tok(1), offline=True), redeemed(grt(1), tok(1), *first), renewed)
    store = analytics.open_analytics(tmp_path)
    try:
        store.apply(LEDGER, history.raw())
        store.flush()
        found = report(store, token_id=tok(3), now=START + timedelta(hours=1))
    finally:
        store.close()
    assert relations(found) == {
        tok(3): ("self", "active", True),
        tok(4): ("descendant", "active", True),
        tok(2): ("sibling", "active", True),
    }
    assert found.would_break.refreshes == 1
