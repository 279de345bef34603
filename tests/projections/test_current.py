"""The current-token view in LMDB: what it shows, and that nothing that happens to its processes makes it lie."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lmdb
import pytest

from events.errors import LedgerUnavailable, UndecodableEvent
from events.streams import LEDGER, RawMessage
from events.types import (
    AccessRenewed,
    ClientRevoked,
    GrantRevoked,
    Kind,
    Reason,
    RefreshReplayed,
    SubjectRevoked,
    TokenRevoked,
    TokenSuperseded,
)
from projections import current
from projections.base import boot_time_ns
from projections.current import CurrentReader, CurrentWriter, HeldView, raw_id, view_path
from projections.grants import EMPTY, ActiveGrant, RevokedGrant, evolve
from projections.registry import Client, Scope, SigningKey, User, Username
from tests.making import (
    DAY,
    START,
    History,
    after,
    authorized,
    cli,
    everything,
    grt,
    head,
    issued,
    minted,
    redeemed,
    refreshed,
    scope,
    sha256_of,
    tok,
    usr,
)
from tests.other_process import Remote

PAST = datetime(2020, 1, 1, tzinfo=UTC)
Rows = dict[str, list[tuple[bytes, bytes]]]
READER = "projections.current:CurrentReader"
WRITER = "projections.current:CurrentWriter"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return view_path(tmp_path)


@pytest.fixture
def projector(path: Path) -> Iterator[Remote]:
    """A writer in a process of its own, for tests that open the file in theirs."""
    with Remote(WRITER, path) as opened:
        yield opened


@pytest.fixture
def writer(path: Path) -> Iterator[CurrentWriter]:
    opened = CurrentWriter(path, sync=False)
    yield opened
    opened.close()


def written(path: Path, messages: list[RawMessage]) -> None:
    """A view of these events, confirmed and closed."""
    one = CurrentWriter(path, sync=False)
    if messages:
        one.apply(LEDGER, messages)
        one.confirm(LEDGER, messages[-1].seq, boot_time_ns())
    one.close()


def replayed(directory: Path, messages: list[RawMessage], *, trimmed_at: Any = None) -> Rows:
    """The rows of a new view of these events."""
    fresh = CurrentWriter(view_path(directory), sync=False)
    if messages:
        fresh.apply(LEDGER, messages)
    if trimmed_at is not None:
        while fresh.trim(trimmed_at):
            pass
    rows = fresh.dump()
    fresh.close()
    return rows


def rows_without_order(rows: Rows) -> dict[str, set[tuple[bytes, bytes]]]:
    return {name: set(pairs) for name, pairs in rows.items()}


# Rows and position


@pytest.mark.parametrize("seed", range(6))
def test_replay_from_zero_equals_the_live_view_row_for_row(tmp_path: Path, path: Path, seed: int) -> None:
    """The live one: in batches of any size, over restarts, with events delivered twice, trimmed as time goes by."""
    rng = random.Random(seed)
    messages = everything().raw()
    live = CurrentWriter(path, sync=False)
    position = 0
    while position < len(messages):
        end = min(position + rng.choice([1, 1, 2, 3, 10]), len(messages))
        live.apply(LEDGER, messages[max(0, position - rng.choice([0, 0, 1, 5])) : end])
        position = end
        assert live.position(LEDGER) == position
        if rng.random() < 0.1:
            live.close()
            live = CurrentWriter(path, sync=False)
            assert live.position(LEDGER) == position
    assert replayed(tmp_path / "0", messages) == live.dump()
    for number, days in enumerate((7.4, 7.6, 8.1, 30), 1):
        moment = START + days * DAY
        while live.trim(moment, rows_max=rng.choice([1, 3, 500])):
            pass
        assert replayed(tmp_path / str(number), messages, trimmed_at=moment) == live.dump()
    live.close()


def test_applying_twice_changes_nothing(writer: CurrentWriter) -> None:
    messages = everything().raw()
    writer.apply(LEDGER, messages)
    before = writer.dump()
    writer.apply(LEDGER, messages)
    writer.apply(LEDGER, messages[5:9])
    assert before == writer.dump()
    assert writer.position(LEDGER) == len(messages)


def test_restart_resumes_where_it_was(path: Path) -> None:
    messages = everything().raw()
    written(path, messages[:10])
    again = CurrentWriter(path)
    assert (again.position(LEDGER), again.position("OTHER")) == (10, 0)
    again.apply(LEDGER, messages[10:])
    again.close()
    again = CurrentWriter(path)
    assert again.position(LEDGER) == len(messages)
    again.close()


def test_every_index_row_leads_to_a_token_and_every_token_has_its_rows(writer: CurrentWriter) -> None:
    writer.apply(LEDGER, everything().raw())
    rows = writer.dump()
    tokens = {key for key, _ in rows["token"]}
    assert tokens
    for index in ("hash", "grant_token", "expiry"):
        assert tokens == {key for _, key in rows[index]}
        assert len(rows[index]) == len(tokens)
    assert tokens == {key for index in ("client_token", "subject_token") for _, key in rows[index]}


def test_undecodable_bytes_stop_it_with_nothing_applied(writer: CurrentWriter) -> None:
    messages = everything().raw()
    writer.apply(LEDGER, messages[:5])
    before = writer.dump()
    bad = RawMessage(8, 0, "ledger.main.grant.x", b'{"type":"grant.exploded/1"}')
    for _ in range(2):
        with pytest.raises(UndecodableEvent):
            writer.apply(LEDGER, [*messages[5:7], bad])
        assert (before, 5) == (writer.dump(), writer.position(LEDGER))
    writer.apply(LEDGER, messages[5:])
    assert writer.position(LEDGER) == len(messages)


def test_events_that_are_missing_stop_it_with_nothing_applied(writer: CurrentWriter) -> None:
    messages = everything().raw()
    writer.apply(LEDGER, messages[:5])
    before = writer.dump()
    with pytest.raises(LedgerUnavailable, match="event 6 is missing"):
        writer.apply(LEDGER, messages[6:])
    assert (before, 5) == (writer.dump(), writer.position(LEDGER))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_writer_leaves_rows_and_position_that_belong_together(tmp_path: Path, path: Path, seed: int) -> None:
    """kill -9 in mid-load, anywhere: what is found is what the events up to the position make."""
    rng = random.Random(seed)
    history = everything()
    for number in range(1000, 3000):
        history.add(issued(grt(number), minted(tok(number)), client_id=cli(1 + number % 2)))
        if number % 3 == 0:
            history.add(TokenRevoked(**head(), grant_id=grt(number), token_id=tok(number), reason=Reason.LOGOUT))
    messages = history.raw()
    batch = rng.choice([20, 100])
    position = 0
    for _ in range(2):
        writer = Remote(WRITER, path)
        try:
            position = writer.call("position", LEDGER)
            kill_at = time.monotonic() + rng.random() * 0.3
            starts = iter(range(position, len(messages), batch))
            while time.monotonic() < kill_at and (start := next(starts, None)) is not None:
                writer.start("apply", LEDGER, messages[start : start + batch])
        finally:
            writer.kill()
            writer.close()
        found = CurrentWriter(path)
        assert position <= found.position(LEDGER) <= len(messages)
        position = found.position(LEDGER)
        assert replayed(tmp_path / f"{seed}-{position}", messages[:position]) == found.dump()
        found.close()


def test_second_writer_is_refused_and_a_dead_one_leaves_its_place(path: Path) -> None:
    with Remote(WRITER, path) as first:
        with pytest.raises(RuntimeError, match="another projector"):
            CurrentWriter(path)
        first.kill()
        CurrentWriter(path).close()


def test_any_number_of_processes_may_be_first(path: Path) -> None:
    """The API may start before the projector, all at once, on a directory that is empty."""
    code = "import sys;from pathlib import Path;from projections.current import *;"
    code += "one=getattr(sys.modules['projections.current'],sys.argv[1])(Path(sys.argv[2]));"
    code += "print(one.freshness().position if sys.argv[1]=='CurrentReader' else one.position('LEDGER'));one.close()"
    kinds = ["CurrentReader", "CurrentReader", "CurrentWriter", "CurrentReader", "CurrentReader"]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, kind, str(path)], stdout=subprocess.PIPE) for kind in kinds
    ]
    assert [process.communicate(timeout=30)[0] for process in processes] == [b"0\n"] * 5
    left = {found.name for found in path.parent.iterdir()}
    assert left == {path.name, f"{path.name}-lock", f"{path.name}.naming", f"{path.name}.writer"}


# Another log, and replacement


def test_view_belongs_to_the_log_it_was_made_from(writer: CurrentWriter) -> None:
    assert writer.belongs_to(LEDGER, "2026-01-01T00:00:00Z", 0)
    writer.apply(LEDGER, everything().raw()[:10])
    assert writer.belongs_to(LEDGER, "2026-01-01T00:00:00Z", 10)
    assert not writer.belongs_to(LEDGER, "2026-01-01T00:00:00Z", 9)
    assert not writer.belongs_to(LEDGER, "2026-01-02T00:00:00Z", 10)


def test_reset_begins_anew_and_readers_follow(path: Path, writer: CurrentWriter) -> None:
    messages = everything().raw()
    writer.apply(LEDGER, messages)
    writer.confirm(LEDGER, len(messages), boot_time_ns())
    with Remote(READER, path) as reader, Remote(READER, path) as idle:
        assert reader.call("look_up", sha256_of(tok(10)))[0] is not None
        assert idle.call("freshness").position == len(messages)
        writer.reset()
        hit, fresh = reader.call("look_up", sha256_of(tok(10)))
        assert (hit, fresh.position, fresh.age_seconds) == (None, 0, float("inf"))
        assert writer.position(LEDGER) == 0
        assert all(rows == [] for rows in writer.dump().values())
        for end in range(1, 9):
            writer.apply(LEDGER, messages[end - 1 : end])
            assert reader.call("freshness").position == end
        # Whoever looks only now sees the mark all the same, however much was written since.
        assert idle.call("freshness").position == 8


@pytest.mark.parametrize("commits", range(2))
def test_replaced_view_is_answered_from_by_nobody(path: Path, projector: Remote, commits: int) -> None:
    """LMDB's readers find their root by a number in the lock file: with a shared one, every other commit to the new
    file would hide the mark in the old one."""
    history = everything()
    projector.call("apply", LEDGER, history.raw())
    projector.call("confirm", LEDGER, history.end, boot_time_ns())
    readers = [Remote(READER, path) for _ in range(2)]
    try:
        for reader in readers:
            assert reader.call("look_up", sha256_of(tok(50)))[0].token.ended is None
        built = path.with_name("built")
        written(built, history.raw())
        with HeldView(path) as held:
            held.replace_by(built)
        # Now one token is revoked, in the new file, and some more is committed.
        revoked = history.add(TokenRevoked(**head(), grant_id=grt(5), token_id=tok(50), reason=Reason.ADMIN))
        projector.call("apply", LEDGER, history.raw(revoked.seq - 1))
        for _ in range(commits):
            projector.call("confirm", LEDGER, history.end, boot_time_ns())
        for reader in readers:
            hit, fresh = reader.call("look_up", sha256_of(tok(50)))
            assert hit.token.ended is not None
            assert fresh.position == history.end
            assert reader.call("hit", tok(50)).token.ended is not None
    finally:
        for reader in readers:
            reader.close()


def test_rebuilt_view_that_is_behind_does_not_take_the_place(path: Path, projector: Remote) -> None:
    """What was in force would be taken back, a revocation for example."""
    messages = everything().raw()
    projector.call("apply", LEDGER, messages)
    built = path.with_name("built")
    written(built, messages[:-1])
    with HeldView(path) as held, pytest.raises(ValueError, match="is further"):
        held.replace_by(built)
    projector.call("apply", LEDGER, messages)
    written(built, messages)
    with HeldView(path) as held:
        held.replace_by(built)
    assert projector.call("position", LEDGER) == len(messages)


def test_writer_waits_while_the_view_is_held_and_goes_on_in_the_new_one(path: Path) -> None:
    history = everything()
    messages = history.raw()
    half = len(messages) // 2
    with Remote(WRITER, path) as writer, Remote(READER, path) as reader:
        writer.call("apply", LEDGER, messages[:half])
        built = path.with_name("built")
        written(built, messages[:half])
        with HeldView(path) as held:
            writer.start("apply", LEDGER, messages[half:])
            assert reader.call("freshness").position == half  # readers do not wait
            held.replace_by(built)
        writer.answer()
        assert reader.call("freshness").position == writer.call("position", LEDGER) == history.end
        # And when it was held in vain, in the old one.
        with HeldView(path):
            pass
        more = history.add(scope("more"))
        writer.call("apply", LEDGER, history.raw(more.seq - 1))
        assert reader.call("freshness").position == history.end


def test_two_replacements_at_once_do_not_undo_each_other(path: Path, projector: Remote) -> None:
    messages = everything().raw()
    projector.call("apply", LEDGER, messages)
    one, two = path.with_name("one"), path.with_name("two")
    written(one, messages)
    written(two, messages)
    with Remote(READER, path) as reader:
        with HeldView(path) as held, Remote.begun("projections.current:HeldView", path) as other:
            held.replace_by(one)
            held.close()
            other.answer()
            other.call("replace_by", two)
            other.call("close")
        projector.call("confirm", LEDGER, len(messages), boot_time_ns())
        assert reader.call("freshness").age_seconds < 60
        assert projector.call("position", LEDGER) == len(messages)


@pytest.mark.slow
def test_no_revocation_is_missed_while_views_are_replaced(path: Path) -> None:
    """A writer that goes on, readers in other processes, and five replacements in the midst of it: once a revocation
    is applied, no reader shows its token alive."""
    history = History(*(issued(grt(n), minted(tok(n))) for n in range(1, 200)))
    with Remote(WRITER, path) as writer, Remote(READER, path) as one, Remote(READER, path) as two:
        writer.call("apply", LEDGER, history.raw())
        for number in range(1, 150):
            revoked = history.add(GrantRevoked(**head(), grant_id=grt(number), reason=Reason.ADMIN))
            if number % 30 == 0:
                built = path.with_name(f"built{number}")
                with HeldView(path) as held:
                    writer.start("apply", LEDGER, history.raw(revoked.seq - 1))
                    written(built, history.raw()[:-1])
                    held.replace_by(built)
                writer.answer()
            else:
                writer.call("apply", LEDGER, history.raw(revoked.seq - 1))
            for reader in (one, two) if number % 3 else (one,):
                hit, fresh = reader.call("look_up", sha256_of(tok(number)))
                assert isinstance(hit.grant, RevokedGrant), number
                assert fresh.position == revoked.seq


# How fresh


def test_view_is_fresh_since_the_end_was_asked(path: Path, writer: CurrentWriter) -> None:
    messages = everything().raw()
    with Remote(READER, path) as reader:
        assert reader.call("freshness").age_seconds == float("inf")
        writer.apply(LEDGER, messages[:5])
        assert reader.call("freshness").age_seconds == float("inf")
        asked = boot_time_ns() - 7_000_000_000
        writer.confirm(LEDGER, 5, asked)
        assert 7 <= reader.call("freshness").age_seconds < 60
        writer.confirm(LEDGER, 6, boot_time_ns())  # the log is further than the view
        assert reader.call("freshness").age_seconds >= 7
        writer.apply(LEDGER, messages[5:8])
        fresh = reader.call("freshness")
        assert (fresh.position, fresh.age_seconds >= 7) == (8, True)
        writer.confirm(LEDGER, 6, boot_time_ns())  # or the view has gone on meanwhile
        assert reader.call("freshness").age_seconds < 5


def test_restarted_projector_does_not_make_an_old_view_fresh(path: Path) -> None:
    messages = everything().raw()
    first = CurrentWriter(path, sync=False)
    first.apply(LEDGER, messages[:5])
    first.confirm(LEDGER, 5, boot_time_ns() - 9_000_000_000)
    first.close()
    again = CurrentWriter(path, sync=False)
    again.apply(LEDGER, messages[5:8])
    with Remote(READER, path) as reader:
        assert reader.call("freshness").age_seconds >= 9
    again.close()


def test_confirmation_of_another_boot_is_none(path: Path) -> None:
    """Boot time begins anew: a large one of the last boot would lie in the future of this one."""
    messages = everything().raw()
    before = CurrentWriter(path, sync=False)
    before._boot_id = bytes(range(16))  # the host as it ran before
    before.apply(LEDGER, messages[:5])
    before.confirm(LEDGER, 5, boot_time_ns() + 10**15)
    before.close()
    with Remote(READER, path) as reader:
        assert reader.call("freshness").age_seconds == float("inf")
        now = CurrentWriter(path, sync=False)
        now.apply(LEDGER, messages[5:8])
        assert reader.call("freshness").age_seconds == float("inf")
        now.confirm(LEDGER, 8, boot_time_ns())
        assert 0 <= reader.call("freshness").age_seconds < 5
        now.close()


# Trim


def test_rows_stay_seven_days_and_leave_with_all_their_index_rows(path: Path, writer: CurrentWriter) -> None:
    history = History(
        issued(grt(1), minted(tok(1)), minted(tok(2), Kind.REFRESH, expires_at=START + 3 * DAY)),
        issued(grt(2), minted(tok(3), Kind.PAT), subject=usr(1), client_id=None),
        GrantRevoked(**head(), grant_id=grt(2), reason=Reason.ADMIN),
    )
    writer.apply(LEDGER, history.raw())
    assert writer.trim(START + 8 * DAY - timedelta(minutes=1)) == 0
    assert writer.trim(START + 8 * DAY, rows_max=1) == 1
    assert writer.trim(START + 8 * DAY) == 1
    rows = writer.dump()
    assert [raw_id(tok(2))] == [key for key, _ in rows["token"]]
    assert [raw_id(grt(1))] == [key for key, _ in rows["grant"]]
    assert rows["subject_token"] == []
    assert writer.trim(START + 10 * DAY) == 1
    assert all(found == [] for found in writer.dump().values())
    assert writer.trim(START + 99 * DAY) == 0


def test_trim_of_one_token_keeps_the_grant_for_the_others(writer: CurrentWriter) -> None:
    history = History(issued(grt(1), minted(tok(1)), minted(tok(2), Kind.REFRESH, expires_at=START + 9 * DAY)))
    writer.apply(LEDGER, history.raw())
    assert writer.trim(START + 8.5 * DAY) == 1
    more = history.add(refreshed(grt(1), tok(2), minted(tok(3), expires_at=START + 20 * DAY)))
    writer.apply(LEDGER, history.raw(more.seq - 1))
    rows = writer.dump()
    assert {raw_id(tok(2)), raw_id(tok(3))} == {key for key, _ in rows["token"]}
    assert {key for _, key in rows["client_token"]} == {raw_id(tok(2)), raw_id(tok(3))}


def test_superseded_token_leaves_at_its_new_end(writer: CurrentWriter) -> None:
    history = History(
        issued(grt(1), minted(tok(1), Kind.PAT, expires_at=START + 90 * DAY), subject=usr(1), client_id=None),
        TokenSuperseded(**head(), grant_id=grt(1), token_id=tok(1), successor_id=tok(2), ends_at=START + DAY),
    )
    writer.apply(LEDGER, history.raw())
    assert len(writer.dump()["expiry"]) == 1
    assert writer.trim(START + 8 * DAY) == 1


def codes() -> History:
    """One that was redeemed, and one that was not."""
    return History(
        authorized(grt(1), tok(1)),
        authorized(grt(2), tok(2)),
        redeemed(grt(2), tok(2), minted(tok(3), expires_at=START + 9 * DAY)),
    )


def test_code_leads_to_its_grant_and_is_no_token(path: Path) -> None:
    written(path, codes().raw())
    with contextlib.closing(CurrentReader(path)) as reader:
        assert [reader.grant_of_code(sha256_of(tok(number))) for number in (1, 2, 3)] == [grt(1), grt(2), None]
        assert reader.look_up(sha256_of(tok(1)))[0] is None
        assert (reader.hit(tok(1)), reader.token_ids(subject=usr(1))) == (None, [tok(3)])


def test_code_leaves_after_seven_days_with_a_grant_that_got_no_tokens(writer: CurrentWriter) -> None:
    writer.apply(LEDGER, codes().raw())
    assert writer.trim(START + 7 * DAY) == 0
    assert writer.trim(START + 7 * DAY + timedelta(minutes=1)) == 2
    assert (writer.dump()["code"], [key for key, _ in writer.dump()["grant"]]) == ([], [raw_id(grt(2))])
    assert writer.trim(START + 16 * DAY) == 1
    assert all(found == [] for found in writer.dump().values())


def test_renewed_refresh_token_stays_until_its_new_end(writer: CurrentWriter) -> None:
    history = History(
        issued(grt(1), minted(tok(1)), minted(tok(2), Kind.REFRESH)),
        AccessRenewed(
            **head(),
            grant_id=grt(1),
            refresh_token_id=tok(2),
            tokens=(minted(tok(3)),),
            refresh_expires_at=START + 2 * DAY,
        ),
    )
    writer.apply(LEDGER, history.raw())
    assert writer.trim(START + 8 * DAY) == 2
    assert [raw_id(tok(2))] == [key for key, _ in writer.dump()["token"]]
    assert writer.trim(START + 9 * DAY) == 1


@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "one by one"])
def test_refresh_token_that_is_renewed_to_the_same_end_leaves_all_the_same(
    writer: CurrentWriter, together: bool
) -> None:
    """Twice within a minute, or near the end of its chain: no row of it may be left over for ever."""
    ends = [START + DAY + timedelta(seconds=seconds) for seconds in (1, 2, 300, 301)]
    history = History(
        issued(grt(1), minted(tok(1)), minted(tok(2), Kind.REFRESH)),
        *(
            AccessRenewed(
                **head(),
                grant_id=grt(1),
                refresh_token_id=tok(2),
                tokens=(minted(tok(3 + number)),),
                refresh_expires_at=end,
            )
            for number, end in enumerate(ends)
        ),
    )
    for messages in [history.raw()] if together else [[message] for message in history.raw()]:
        writer.apply(LEDGER, messages)
    rows = writer.dump()
    assert sorted(token for _, token in rows["expiry"]) == sorted(token for token, _ in rows["token"])
    assert writer.trim(START + 9 * DAY) == 6
    assert all(found == [] for found in writer.dump().values())


def test_replay_of_an_old_log_is_not_trimmed_before_it_is_complete(writer: CurrentWriter) -> None:
    """A pause in the midst of a replay: what looks long expired there was refreshed by an event yet to come."""
    old = {"expires_at": PAST}
    history = History(issued(grt(1), minted(tok(1), **old), minted(tok(2), Kind.REFRESH, **old)))
    writer.apply(LEDGER, history.raw())
    writer.apply(LEDGER, [])
    assert len(writer.dump()["token"]) == 2
    later = history.add(refreshed(grt(1), tok(2), minted(tok(3)), minted(tok(4), Kind.REFRESH, **old)))
    writer.apply(LEDGER, history.raw(later.seq - 1))
    writer.confirm(LEDGER, history.end, boot_time_ns())
    writer.apply(LEDGER, [])
    rows = writer.dump()
    assert [raw_id(tok(3))] == [key for key, _ in rows["token"]]
    assert [raw_id(grt(1))] == [key for key, _ in rows["grant"]]


def test_steady_load_is_trimmed_too(writer: CurrentWriter) -> None:
    """Without a pause in which nothing arrives, since there may be none for months."""
    history = History(*(issued(grt(n), minted(tok(n), expires_at=PAST)) for n in range(1, 4)))
    writer.apply(LEDGER, history.raw())
    writer.confirm(LEDGER, history.end, boot_time_ns())
    writer._trimmed = 0.0  # a while ago
    more = history.add(scope("x"))
    writer.apply(LEDGER, history.raw(more.seq - 1))
    assert writer.dump()["token"] == []


# Reading


@pytest.fixture
def reader(path: Path) -> Iterator[CurrentReader]:
    written(path, everything().raw())
    opened = CurrentReader(path)
    yield opened
    opened.close()


def test_reader_of_a_view_that_was_never_written_knows_nothing(path: Path) -> None:
    reader = CurrentReader(path)
    assert reader.look_up(bytes(32)) == (None, current.Freshness(0, float("inf")))
    assert (reader.hit(tok(1)), reader.family(grt(1)), reader.cut(cli(1))) == (None, EMPTY, None)
    assert (reader.client(cli(1)), reader.user(usr(1)), reader.rows("scope")) == (None, None, [])
    assert reader.token_ids() == reader.token_ids(subject=usr(1)) == []
    reader.close()


def test_every_token_is_found_by_its_hash_and_its_id_as_the_fold_has_it(reader: CurrentReader) -> None:
    history = everything()
    families: dict[str, Any] = {}
    for recorded in history.recorded:
        grant_id = getattr(recorded.event, "grant_id", None)
        if grant_id is not None:
            families[grant_id] = evolve(families.get(grant_id, EMPTY), recorded)
    assert len(families) == 18
    for grant_id, family in families.items():
        assert family == reader.family(grant_id, None)
        assert family.tokens.keys() == set(reader.token_ids(grant_id=grant_id))
        for token_id, token in family.tokens.items():
            hit, fresh = reader.look_up(token.sha256)
            assert hit is not None
            assert hit == reader.hit(token_id)
            assert (hit.token_id, hit.token, hit.grant) == (token_id, token, family.grant)
            assert fresh.position == history.end
            assert reader.family(grant_id, (token_id,)).tokens == {token_id: token}


def test_unknown_hash_and_unknown_ids_are_none(reader: CurrentReader) -> None:
    assert reader.look_up(b"\1" * 32)[0] is None
    assert reader.hit(tok(999)) is None
    assert reader.family(grt(999), None) == EMPTY


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_a_users_tokens_of_one_kind_are_found_among_many_others(path: Path, limit: int) -> None:
    kinds = (Kind.ACCESS, Kind.PAT, Kind.ACCESS, Kind.ACCESS, Kind.PAT)
    tokens = [(grt(at), minted(tok(at), kind)) for at, kind in enumerate(kinds, start=1)]
    written(path, History(*(issued(grant_id, token, subject=usr(1)) for grant_id, token in tokens)).raw())
    with contextlib.closing(CurrentReader(path)) as reader:
        found: list[str] = []
        after: str | None = None
        for _ in range(len(kinds) + 1):
            some, after = reader.token_ids_of_kind(usr(1), Kind.PAT, after=after, limit=limit)
            found += some
            if after is None:
                break
        assert (found, after) == ([tok(2), tok(5)], None)
        assert reader.token_ids_of_kind(usr(2), Kind.PAT) == ([], None)
        numbers = [len(kinds) - at for at in range(len(kinds))]
        assert [hit.token_id for hit in reader.newest_of(usr(1), limit=99)] == [tok(one) for one in numbers]
        assert [hit.token_id for hit in reader.newest_of(usr(1), limit=2)] == [tok(one) for one in numbers[:2]]
        assert reader.newest_of(usr(2), limit=9) == []


def test_hit_carries_the_cuts_of_client_and_subject(reader: CurrentReader) -> None:
    def cuts(number: int) -> tuple[Any, Any]:
        hit = reader.hit(tok(number))
        assert hit is not None
        return hit.client_cut, hit.subject_cut

    assert cuts(200) == (None, None)
    revoked, _ = cuts(40)  # of client 2
    assert (revoked.disabled, revoked.seq > 0) == (False, True)
    disabled, _ = cuts(50)  # of client 3
    assert (disabled.disabled, disabled.seq) == (True, 0)
    _, subject = cuts(220)
    assert subject == reader.cut(usr(2))
    _, both = cuts(240)
    assert (both.disabled, both.reason) == (True, Reason.DISABLED)
    assert both.seq > 0


def test_cut_off_of_a_key_is_read_with_what_it_signed(reader: CurrentReader) -> None:
    """Also with what was recorded after it, and with nothing else."""
    for number in (350, 360):
        hit = reader.hit(tok(number))
        assert hit is not None
        assert hit.key_cut is not None
        assert (hit.token.kid, hit.key_cut.reason) == ("es-1", Reason.COMPROMISED)
    hits = [reader.hit(token_id) for token_id in reader.token_ids()]
    assert [hit.token_id for hit in hits if hit is not None and hit.key_cut is not None] == [tok(350), tok(360)]


def test_registered_things_are_found(reader: CurrentReader) -> None:
    assert isinstance(reader.client(cli(2)), Client)
    assert isinstance(reader.user(usr(1)), User)
    assert reader.row("username", sha256_of(usr(1)).hex().encode()) == Username(usr(1), 24)
    assert isinstance(reader.row("scope", b"b"), Scope)
    assert [key for key, row in reader.rows("key") if isinstance(row, SigningKey)] == [
        b"ed-1",
        b"ed-2",
        b"es-1",
        b"id-rs-1",
    ]


@pytest.mark.parametrize(
    "identifier",
    ["", "cli_", "usr_" + "0" * 31 + "1", "cli_" + "0" * 31, "cli_" + "0" * 33, "cli_" + "G" * 32, "cli_\u0660" * 8],
)
def test_what_is_no_client_id_is_no_client(reader: CurrentReader, identifier: str) -> None:
    assert reader.client(identifier) is None


@pytest.mark.parametrize(
    "identifier",
    ["tok_" + "0" * 30 + "0A", "tok_" + "0" * 30 + " 0", "tok_" + "0" * 31, "tok_" + "0" * 34, "tok_", "x" * 36],
)
def test_ids_are_taken_to_the_letter(identifier: str) -> None:
    """Otherwise one thing would have many names, and events would go to the wrong subjects."""
    with pytest.raises(ValueError):  # noqa: PT011 - two kinds of it
        raw_id(identifier)


def test_rows_are_listed_page_by_page(reader: CurrentReader) -> None:
    assert [key for key, _ in reader.rows("scope")] == [b"a", b"b", b"old"]
    assert [key for key, _ in reader.rows("scope", limit=2)] == [b"a", b"b"]
    assert [key for key, _ in reader.rows("scope", after=b"a")] == [b"b", b"old"]
    assert [key for key, _ in reader.rows("scope", after=b"aa", limit=1)] == [b"b"]
    assert reader.rows("scope", after=b"old") == []


OWNERS: dict[str, dict[str, str]] = {
    "grant": {"grant_id": grt(1)},
    "client": {"client_id": cli(2)},
    "client as a subject": {"subject": cli(2)},
    "user": {"subject": usr(1)},
    "all": {},
}


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS.keys())
def test_tokens_are_listed_by_owner_oldest_first_page_by_page(reader: CurrentReader, owner: dict[str, str]) -> None:
    wanted = []
    for recorded in everything().recorded:
        event: Any = recorded.event
        if not hasattr(event, "tokens"):
            continue
        grant = reader.family(event.grant_id).grant
        known = grant.was if isinstance(grant, RevokedGrant) else grant
        # What a client has for itself is not told apart from what people gave it.
        subject = known.client_id if owner == {"subject": known.client_id} else known.subject
        owns = {"grant_id": event.grant_id, "client_id": known.client_id, "subject": subject}
        if all(owns[name] == value for name, value in owner.items()):
            wanted += [token.token_id for token in event.tokens]
    wanted.sort()
    assert len(wanted) >= 2
    assert wanted == reader.token_ids(**owner)
    pages: list[str] = []
    while True:
        page = reader.token_ids(**owner, after=pages[-1] if pages else None, limit=2)
        pages += page
        if len(page) < 2:
            break
    assert wanted == pages


def test_tokens_behind_one_that_was_trimmed_are_still_listed(reader: CurrentReader) -> None:
    """A cursor may name what has gone meanwhile."""
    assert reader.token_ids(client_id=cli(2), after=tok(41)) == [
        t for t in reader.token_ids(client_id=cli(2)) if t > tok(41)
    ]
    assert reader.token_ids(client_id=cli(2), after=tok(999)) == []
    assert reader.token_ids(after=tok(25)) == [t for t in reader.token_ids() if t > tok(25)]


def test_stats_count_rows_and_bytes(reader: CurrentReader) -> None:
    stats = reader.stats()
    assert (stats["token"], stats["scope"], stats["key"]) == (len(reader.token_ids()), 3, 4)
    assert 0 < stats["bytes_used"] <= stats["bytes_file"]


def test_many_readers_see_what_the_writer_commits(path: Path, writer: CurrentWriter) -> None:
    messages = everything().raw()
    readers = [Remote(READER, path) for _ in range(4)]
    try:
        for end in (5, 30, len(messages)):
            writer.apply(LEDGER, messages[:end])
            assert [end] * 4 == [reader.call("freshness").position for reader in readers]
    finally:
        for reader in readers:
            reader.close()


def test_reader_that_was_killed_in_a_transaction_is_forgotten(path: Path, writer: CurrentWriter) -> None:
    """Its slot would keep every later page from reuse, and the file would grow for ever."""
    writer.apply(LEDGER, everything().raw()[:5])
    with Remote("tests.projections.test_current:holding_reader", path) as reader:
        reader.kill()
        assert str(reader.process.pid) in writer.env.readers()
        writer._readers_checked = 0.0  # a while ago
        writer.apply(LEDGER, [])
        assert str(reader.process.pid) not in writer.env.readers()


def holding_reader(path: Path) -> Any:
    """A reader in the midst of a transaction."""
    reader = CurrentReader(path)
    transaction = reader.env.begin()
    transaction.get(b"state", db=reader._meta)
    return reader, transaction


def test_exception_in_a_read_leaves_no_slot_behind(path: Path) -> None:
    written(path, everything().raw())
    reader = CurrentReader(path)
    for _ in range(600):  # there are 512 slots
        for wrong in (lambda: reader.look_up(b""), lambda: reader.row("scope", b""), lambda: reader.hit("tok_1")):
            with pytest.raises((ValueError, lmdb.Error)):
                wrong()
    assert reader.look_up(sha256_of(tok(10)))[0] is not None
    reader.close()


def test_view_lies_in_a_directory_of_its_own_that_is_private(path: Path, writer: CurrentWriter) -> None:
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


def test_cut_does_not_depend_on_what_came_later(reader: CurrentReader) -> None:
    """A refresh that races a cut-off cannot carry a family across: the grant keeps its first sequence."""
    history = everything()
    cut = history.add(ClientRevoked(**head(), client_id=cli(1), reason=Reason.ADMIN))
    before = history.end
    history.add(refreshed(grt(6), tok(61), minted(tok(62)), minted(tok(63), Kind.REFRESH)))
    history.add(RefreshReplayed(**head(), grant_id=grt(6), token_id=tok(61), answered=True))
    history.add(SubjectRevoked(**head(), user_id=usr(1), reason=Reason.ADMIN))
    assert history.end > before
    with Remote(WRITER, reader.path) as writer:
        writer.call("apply", LEDGER, history.raw(everything().end))
        hit = reader.hit(tok(62))
        assert hit is not None
        assert hit.client_cut is not None
        assert hit.client_cut.seq == cut.seq
        assert isinstance(hit.grant, ActiveGrant)
        assert hit.token.issued_seq > cut.seq > hit.grant.first_seq
        assert after(cut.seq) == hit.client_cut.at
