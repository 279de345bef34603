"""What auditors' queries read is the store, at one moment, in files that stay while they are read. Real DuckDB."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest

from events import types as t
from events.streams import LEDGER, USAGE
from projections import analytics
from projections.analytics.publication import Publication, Publisher
from projections.sandbox import views
from tests.making import START, cli, grt, head, minted, tok, usr
from tests.making import issued as issued_by
from tests.projections.test_analytics import block, blocks, recorded
from tests.projections.test_analytics_usage import FIRST, issued, use
from tests.projections.token_population import LATE, history


@pytest.fixture
def store(tmp_path: Path) -> Iterator[analytics.Analytics]:
    opened = analytics.open_analytics(tmp_path / "store")
    opened.apply(LEDGER, recorded(issued(FIRST, t.Kind.ACCESS, "cli_shop", "cli_shop")))
    opened.flush()
    yield opened
    opened.close()


@pytest.fixture
def publisher(store: analytics.Analytics, tmp_path: Path) -> Publisher:
    return Publisher(store, tmp_path / "published")


def used(store: analytics.Analytics, first: int, count: int, uses: int = 1) -> None:
    """So many blocks from this number on, one committed after another."""
    for number in range(first, first + count):
        store.apply(USAGE, blocks(block(*(use(number + i / 100, FIRST) for i in range(uses))), first=number))
        store.flush()


def asked(publication: Publication, sql: str) -> list[tuple[Any, ...]]:
    """By another database, over the files alone."""
    directory = next(path.parent for paths in publication.files.values() for path in paths)
    with duckdb.connect(":memory:") as database:
        for statement in views.statements(publication.files):
            made = statement
            for path in {path for paths in publication.files.values() for path in paths}:
                made = made.replace(f"'{path.name}'", f"'{directory / path.name}'")
            database.execute(made)
        return database.execute(sql).fetchall()


EVERYTHING = "SELECT count(*), count(DISTINCT block_seq), max(block_seq) FROM uses_v1"


def test_publication_has_what_is_committed_and_says_up_to_where(
    store: analytics.Analytics, publisher: Publisher
) -> None:
    used(store, 1, 5, 3)
    publication = publisher.publish()
    assert asked(publication, EVERYTHING) == [(15, 5, 5)]
    assert (publication.ledger_seq, publication.usage_seq) == (1, 5)
    used(store, 6, 1)
    assert asked(publication, EVERYTHING) == [(15, 5, 5)]
    assert asked(publisher.publish(), EVERYTHING) == [(16, 6, 6)]


def test_many_publications_leave_few_files(store: analytics.Analytics, publisher: Publisher, tmp_path: Path) -> None:
    for number in range(1, 41):
        used(store, number, 1)
        publisher.release(publisher.publish())
    assert asked(publisher.publish(), EVERYTHING) == [(40, 40, 40)]
    assert len(list((tmp_path / "published").glob("recent_uses-*"))) <= 7  # of 40 rows, about their logarithm
    assert len(list((tmp_path / "published").glob("events-*"))) == 1


def test_sealed_uses_are_counted_once(store: analytics.Analytics, publisher: Publisher) -> None:
    used(store, 1, 3)
    before = publisher.publish()
    assert store.seal() == 3
    used(store, 4, 2)
    after = publisher.publish()
    for publication, count in ((before, 3), (after, 5)):
        assert asked(publication, EVERYTHING) == [(count, count, count)]
        for view in ("usage_minutes_v1", "usage_hours_v1", "usage_days_v1"):
            assert asked(publication, f"SELECT sum(uses) FROM {view}") == [(count,)]


def test_files_stay_while_they_are_read_and_not_longer(
    store: analytics.Analytics, publisher: Publisher, tmp_path: Path
) -> None:
    used(store, 1, 2)
    store.seal()
    used(store, 3, 1)
    reading = publisher.publish()
    store.trim(datetime.now(UTC) + timedelta(days=36_500))  # everything leaves the store, the segment too
    store.trim(datetime.now(UTC) + timedelta(days=36_500))
    publisher.release(publisher.publish())
    assert asked(reading, EVERYTHING) == [(3, 3, 3)]
    publisher.release(reading)
    left = publisher.publish()
    assert asked(left, EVERYTHING) == [(0, 0, None)]
    held = {path for paths in left.files.values() for path in paths}
    assert {*(tmp_path / "published").iterdir()} == held


def test_publication_begins_anew_with_the_store(
    store: analytics.Analytics, publisher: Publisher, tmp_path: Path
) -> None:
    used(store, 1, 4)
    publisher.release(publisher.publish())
    store.reset()
    used(store, 1, 1)
    assert asked(publisher.publish(), EVERYTHING) == [(1, 1, 1)]
    assert asked(publisher.publish(), "SELECT count(*) FROM events_v1") == [(0,)]


def test_left_files_of_another_process_are_removed(store: analytics.Analytics, tmp_path: Path) -> None:
    directory = tmp_path / "published"
    directory.mkdir()
    (directory / "events-00000001.parquet").write_bytes(b"of another store")
    Publisher(store, directory).publish()
    assert b"of another store" not in {path.read_bytes() for path in directory.iterdir()}


def test_published_tokens_end_and_expire_as_those_of_the_store(tmp_path: Path) -> None:
    """By whatever ends them, or keeps a refresh token that stays: auditors' own SQL says what the API says."""
    log, later = history(), LATE + timedelta(days=30)
    kept, cut, disabled, signed = tok(21), tok(22), tok(23), tok(24)
    log.add(
        issued_by(grt(21), minted(tok(20)), minted(kept, t.Kind.REFRESH, expires_at=LATE)),
        t.AccessRenewed(
            **head(), grant_id=grt(21), refresh_token_id=kept, tokens=(minted(tok(25)),), refresh_expires_at=later
        ),
        issued_by(grt(22), minted(cut), client_id=cli(5), subject=usr(5)),
        t.SubjectRevoked(**head(), user_id=usr(5), reason=t.Reason.ADMIN),
        issued_by(grt(23), minted(disabled), client_id=cli(6)),
        t.ClientDisabled(**head(), client_id=cli(6), reason=t.Reason.DISABLED),
        t.ClientRevoked(**head(), client_id=cli(6), reason=t.Reason.ADMIN),
        issued_by(grt(24), minted(signed, kid="ed-1"), client_id=cli(7)),
        t.KeyRevoked(**head(), kid="ed-1", reason=t.Reason.COMPROMISED),
    )
    store = analytics.open_analytics(tmp_path / "store")
    try:
        store.apply(LEDGER, log.raw())
        store.flush()
        members = "ledger_seq, expires_at, spent_at, ended_at, reason, ended_seq"
        with store.cursor() as cursor:
            ours = cursor.execute(f"SELECT {members} FROM tokens ORDER BY ALL").fetchall()
        publication = Publisher(store, tmp_path / "published").publish()
        assert asked(publication, f"SELECT {members} FROM tokens_v1 ORDER BY ALL") == ours
        ended = "SELECT token_id, expires_at, reason FROM tokens_v1 WHERE ledger_seq > 15 ORDER BY token_id"
        day = (START + timedelta(days=1)).replace(tzinfo=None)
        assert asked(publication, ended) == [
            (tok(20), day, None),
            (kept, later.replace(tzinfo=None), None),
            (cut, day, "admin"),
            (disabled, day, "disabled"),
            (signed, day, "compromised"),
            (tok(25), day, None),
        ]
    finally:
        store.close()
