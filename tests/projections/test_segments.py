"""Uses that are sealed: nothing is lost, doubled or seen to change, whatever is killed or damaged. Issue "Auditors"."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pyarrow.parquet
import pytest
import structlog.testing

from events import codec
from events import types as t
from events.streams import LEDGER, USAGE, RawMessage
from projections import analytics
from projections.analytics import origins, segments, store
from projections.base import SlowProjection
from tests import running
from tests.projections.test_analytics import NOW, block, blocks, dump, issued, new_id, opening, recorded, rows, use

__all__ = ["opening"]  # the fixture

Open = Callable[..., analytics.Analytics]
TOKENS = [f"tok_{number:032x}" for number in range(1, 8)]


def some_blocks(seed: int, count: int, *, first: int = 1) -> list[RawMessage]:
    """Blocks of up to 8 uses, within a few days around NOW, not in the order of their time."""
    rng = random.Random(seed)

    def one() -> t.TokenUsed:
        context = t.Context(
            rng.choice([None, "192.0.2.1", "192.0.2.2", "2001:db8:1::7"]), rng.choice([None, "curl/8", "shop 1"])
        )
        return t.TokenUsed(
            int(NOW.timestamp() * 1e6) + rng.randrange(3 * 86_400) * 1_000_000 + rng.randrange(1_000_000),
            token := rng.choice([*TOKENS, None]),
            None if token else b"x" * 32,
            rng.choice(["valid", "valid", "expired"]),
            rng.choice(["validate", "api"]),
            "c",
            rng.choice(["", "a", "a b"]),
            context=rng.choice([None, context]),
        )

    return blocks(*(block(*(one() for _ in range(rng.randrange(8)))) for _ in range(count)), first=first)


def issues() -> list[RawMessage]:
    return recorded(*(issued(new_id("grt"), (token,)) for token in TOKENS))


ORDER = ["block_seq", "use_index"]

# What the roll-ups must say, by plain SQL over the uses; and what they say.
COUNTED = {
    "all_usage_days": "date_trunc('day', occurred_at), token_no, origin_no, outcome, endpoint, scope",
    "all_usage_hours": "date_trunc('hour', occurred_at), token_no, origin_no, outcome, endpoint, scope",
}


def check(opened: analytics.Analytics) -> None:
    """Everything that is added up is what the uses say."""
    for view, keys in COUNTED.items():
        by_hand = rows(opened, f"SELECT {keys}, count(*), min(occurred_at), max(occurred_at) FROM uses GROUP BY ALL")
        told = rows(
            opened,
            f"SELECT * EXCLUDE (uses, first_at, last_at), sum(uses)::BIGINT, min(first_at), max(last_at) "
            f"FROM {view} GROUP BY ALL",
        )
        assert sorted(told, key=str) == sorted(by_hand, key=str)
    by_hand = rows(
        opened,
        "SELECT date_trunc('minute', occurred_at), t.client_id, t.kind, outcome, endpoint, count(*) FROM uses "
        "LEFT JOIN used_tokens USING (token_no) LEFT JOIN issued_tokens t USING (token_id) GROUP BY ALL",
    )
    told = rows(opened, "SELECT * FROM all_usage_minutes")
    assert sorted(told, key=str) == sorted(by_hand, key=str)


def test_sealing_changes_nothing_that_can_be_read(opening: Open) -> None:
    opened = opening()
    opened.apply(LEDGER, issues())
    opened.apply(USAGE, some_blocks(1, 60))
    before = dump(opened)
    check(opened)
    total = len(before["uses"])
    assert opened.seal() == total
    assert rows(opened, "SELECT count(*) FROM recent_uses") == [(0,)]
    assert dump(opened) == before
    check(opened)
    opened.apply(USAGE, some_blocks(2, 40, first=61))
    opened.flush()
    opened.seal()
    opened.apply(USAGE, some_blocks(3, 10, first=101))
    whole = dump(opened)
    check(opened)
    [(first, last), (next_first, next_last)] = rows(opened, "SELECT segment_no, last_seq FROM segments ORDER BY ALL")
    assert 1 <= first <= last <= 60 < next_first <= next_last <= 100
    opened.close()
    assert dump(opening()) == whole


def test_segment_is_in_the_order_of_the_stream(opening: Open) -> None:
    opened = opening()
    for number in range(1, 30):
        opened.apply(USAGE, some_blocks(number, 1, first=number))
        opened.flush()
    opened.seal()
    [file] = list(opened.segments.iterdir())
    table = pyarrow.parquet.read_table(file, columns=["block_seq", "use_index"])
    order = list(zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True))
    assert order == sorted(order)


def test_full_tail_is_sealed_while_others_are_written(opening: Open) -> None:
    opened = opening(segment_uses=100, batch_rows_max=50, commit_seconds=0.0)
    opened.apply(LEDGER, issues())
    counts: list[tuple[int, int]] = []
    stop = threading.Event()

    def read() -> None:
        with opened.cursor() as cursor:
            while not stop.is_set():
                cursor.begin()
                ((seen,),) = cursor.execute("SELECT count(*) FROM uses").fetchall()
                ((rolled,),) = cursor.execute("SELECT coalesce(sum(uses), 0)::BIGINT FROM all_usage_days").fetchall()
                ((minutes,),) = cursor.execute("SELECT coalesce(sum(uses), 0) FROM all_usage_minutes").fetchall()
                cursor.rollback()
                assert seen == rolled == minutes
                counts.append((seen, rolled))

    reader = threading.Thread(target=read)
    reader.start()
    total = 0
    for number in range(1, 200):
        messages = some_blocks(number, 5, first=5 * number - 4)
        opened.apply(USAGE, messages)
        total += sum(len(codec.decode_block(message.data).uses) for message in messages)
    opened.flush()
    stop.set()
    reader.join()
    check(opened)
    assert counts == sorted(counts)  # nothing ever disappears
    assert len(set(counts)) > 1
    running.until(lambda: len(rows(opened, "SELECT * FROM segments")) > 3, seconds=20)
    assert rows(
        opened, "SELECT count(DISTINCT block_seq) > 600, count(*) = count(DISTINCT (block_seq, use_index)) FROM uses"
    ) == [(True, True)]


FAR = 10**6  # messages left


def left_behind(messages: list[RawMessage], *, left: int = 0) -> list[RawMessage]:
    """As they come from a long stream, of which so many are left after the last of these."""
    return [msgspec.structs.replace(one, left=FAR) for one in messages[:-1]] + [
        msgspec.structs.replace(messages[-1], left=left)
    ]


def without_ledger(dumped: dict[str, Any]) -> dict[str, Any]:
    return {name: dumped[name] for name in ("uses", "refused", "gaps")}


@pytest.mark.parametrize("tail", [0, 60], ids=["alone", "with the newest"])
def test_uses_of_a_long_stream_become_segments_at_once(opening: Open, tmp_path: Path, tail: int) -> None:
    messages = some_blocks(1, 1000)
    plain = analytics.open_analytics(tmp_path / "plain")
    plain.apply(LEDGER, issues())
    plain.apply(USAGE, messages)
    expected = dump(plain)
    assert rows(plain, "SELECT * FROM segments") == []
    plain.close()
    opened = opening(batch_rows_max=50, segment_uses=1000)
    opened.apply(LEDGER, issues())
    opened.apply(USAGE, messages[:tail])
    opened.flush()
    for at in range(tail, 1000, 7):
        opened.apply(USAGE, left_behind(messages[at : at + 7], left=max(0, 993 - at)))
    running.until(lambda: opened.position(USAGE) == 1000, seconds=20)
    assert rows(opened, "SELECT count(*) FROM recent_uses") == [(0,)]
    assert without_ledger(dump(opened)) == without_ledger(expected)
    check(opened)
    cut = rows(opened, "SELECT segment_no, last_seq, uses FROM segments ORDER BY 1")
    assert len(cut) >= 3
    assert all(last < following for (_, last, _), (following, *_) in itertools.pairwise(cut))
    assert sum(uses for *_, uses in cut) == len(expected["uses"])
    for file in opened.segments.iterdir():
        order = [tuple(row.values()) for row in pyarrow.parquet.read_table(file, columns=ORDER).to_pylist()]
        assert order == sorted(order)


def test_loop_that_feeds_the_store_does_not_wait_for_it(opening: Open) -> None:
    """So queries are answered while it catches up; `test_base` says how."""
    assert isinstance(opening(), SlowProjection)


def test_who_waits_for_a_use_of_a_long_stream_gets_it_without_a_segment(opening: Open) -> None:
    opened = opening(batch_rows_max=50, segment_uses=100_000)
    opened.apply(USAGE, left_behind(some_blocks(1, 100), left=FAR))
    assert opened.position(USAGE) == 0
    opened.hasten(USAGE, 90)
    running.until(lambda: opened.position(USAGE) == 100, seconds=10)
    assert rows(opened, "SELECT * FROM segments") == []


def test_events_are_committed_while_uses_are_collected(opening: Open) -> None:
    opened = opening(batch_rows_max=50, segment_uses=100_000)
    opened.apply(USAGE, left_behind(some_blocks(1, 100), left=FAR))
    opened.apply(LEDGER, issues())
    running.until(lambda: opened.position(LEDGER) == len(TOKENS), seconds=10)
    assert opened.position(USAGE) == 0


def test_uses_are_committed_behind_the_events_that_came_before(opening: Open) -> None:
    opened = opening(commit_seconds=3600)
    opened.apply(LEDGER, issues())
    opened.flush()  # the next commit is an hour later
    again = [msgspec.structs.replace(one, seq=one.seq + len(TOKENS)) for one in issues()]
    opened.apply(LEDGER, again)
    assert opened.position(LEDGER) == len(TOKENS)
    opened.apply(USAGE, some_blocks(1, 5))
    opened.hasten(USAGE, 5)
    running.until(lambda: opened.position(USAGE) == 5, seconds=10)
    assert opened.position(LEDGER) == 2 * len(TOKENS)


def test_uses_that_are_collected_while_a_segment_is_made_are_as_many_at_most(opening: Open) -> None:
    opened = opening(batch_rows_max=10, segment_uses=100)
    messages = left_behind(some_blocks(1, 200), left=FAR)
    sizes = list(itertools.accumulate(max(1, len(codec.decode_block(one.data).uses)) for one in messages))
    applying = threading.Thread(target=opened.apply, args=(USAGE, messages))
    with opened._sealing:  # no segment is made for so long
        applying.start()
        running.until(lambda: sizes[opened._seen[USAGE] - 1] >= 200 if opened._seen[USAGE] else False, seconds=10)
        assert opened.position(USAGE) == 0
        assert sizes[opened._seen[USAGE] - 1] < 200 + 2 * 8
    applying.join()
    opened.flush()
    check(opened)
    assert opened.position(USAGE) == 200


def test_close_leaves_in_the_stream_what_was_collected(opening: Open) -> None:
    messages = some_blocks(1, 100)
    first = opening(batch_rows_max=50, segment_uses=100_000)
    first.apply(USAGE, left_behind(messages, left=FAR))
    first.close()
    again = opening(batch_rows_max=50)
    assert again.position(USAGE) == 0
    again.apply(USAGE, messages)
    assert len(dump(again)["uses"]) == sum(len(codec.decode_block(one.data).uses) for one in messages)


def test_uses_of_a_day_are_sealed_however_few(opening: Open) -> None:
    opened = opening()
    opened.apply(USAGE, blocks(block(use())))
    opened.apply(USAGE, blocks(block(use()), first=86_402))
    opened.flush()
    running.until(lambda: rows(opened, "SELECT segment_no, last_seq FROM segments") == [(1, 86_402)], seconds=10)


def test_use_of_a_token_that_is_issued_later_is_counted_for_its_client(opening: Open) -> None:
    opened = opening()
    opened.apply(USAGE, blocks(block(use(TOKENS[0]), use(None))))
    opened.flush()
    opened.seal()
    assert rows(opened, "SELECT client_id, kind, uses FROM all_usage_minutes ORDER BY uses") == [(None, None, 2)]
    opened.apply(LEDGER, issues())
    check(opened)
    assert len(rows(opened, "SELECT client_id, kind, uses FROM all_usage_minutes")) == 2


def test_sealing_nothing_makes_no_segment(opening: Open) -> None:
    opened = opening()
    assert opened.seal() == 0
    assert list(opened.segments.iterdir()) == []


def test_retention_drops_whole_segments_with_all_that_counts_them(opening: Open) -> None:
    opened = opening()
    opened.apply(USAGE, blocks(*(block(use(context=t.Context(f"192.0.2.{n}"))) for n in range(1, 11))))
    opened.flush()
    opened.seal()
    opened.apply(USAGE, blocks(*(block(use(context=t.Context(f"198.51.100.{n}"))) for n in range(11, 21)), first=11))
    opened.flush()
    opened.seal()
    opened.apply(USAGE, blocks(*(block(use()) for _ in range(10)), first=21))
    opened.flush()
    opened.trim(NOW + timedelta(seconds=10))
    assert rows(opened, "SELECT min(block_seq), count(*) FROM uses") == [(1, 30)]  # the last one is not old enough
    opened.trim(NOW + timedelta(seconds=15))
    assert rows(opened, "SELECT min(block_seq), count(*) FROM uses") == [(11, 20)]
    assert rows(opened, "SELECT min(origin_no), count(*) FROM origins") == [(11, 11)]
    check(opened)
    assert len(list(opened.segments.iterdir())) == 2  # somebody may still be reading it
    opened.trim(NOW + timedelta(seconds=25))
    assert len(list(opened.segments.iterdir())) == 1
    assert rows(opened, "SELECT min(block_seq), count(*) FROM uses") == [(25, 6)]
    check(opened)
    opened.close()
    again = opening()
    assert list(again.segments.iterdir()) == []
    # A number is never given twice.
    again.apply(USAGE, blocks(block(use(context=t.Context("203.0.113.9"))), first=31))
    assert rows(again, "SELECT origin_no FROM origins ORDER BY 1") == [(21,), (22,)]


def test_directory_with_any_name_can_hold_it(tmp_path: Path) -> None:
    directory = tmp_path / "year=2026 [a-z]*'x" / "store"
    opened = analytics.open_analytics(directory)
    opened.apply(USAGE, some_blocks(1, 9))
    before = dump(opened)
    opened.seal()
    assert dump(opened) == before
    opened.close()
    moved = tmp_path / "moved"
    directory.rename(moved)
    again = analytics.open_analytics(moved)
    assert dump(again) == before
    again.close()


# Killed


# Kills itself before each line that writes, from the last to the first. Each time is a process of its own, forked
# from one that has loaded everything, which takes longer than all that is done. The first counts the lines.
WATCH = """
import linecache, os, signal, sys, threading, time, traceback
from pathlib import Path
from tests.projections.test_segments import issues, left_behind, some_blocks
from events.streams import LEDGER, USAGE
from projections import analytics
from projections.analytics import segments, store

lines = []

def watch(frame, event, _):
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    if event == "line" and any(call in text for call in ("execute(", "commit()", "rename(", "fsync(")):
        lines.append(frame.f_lineno)
        if len(lines) == at:
            os.kill(os.getpid(), signal.SIGKILL)
    return watch

def attempt():
    child = os.fork()
    if not child:
        try:
            act(root / str(at))
            (root / "lines").write_text(str(len(lines)))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(at, code, flush=True)
    return code
"""
ATTEMPTS = """
root, at = Path(sys.argv[1]), 0
if attempt() == 0:
    for at in range(int((root / "lines").read_text()), 0, -1):
        if attempt() != -signal.SIGKILL:
            break
"""

SEAL = """
def enter(frame, *_):
    return watch if frame.f_code.co_filename == segments.__file__ else None

def act(directory):
    opened = analytics.open_analytics(directory)
    opened.apply(LEDGER, issues())
    opened.apply(USAGE, some_blocks(1, 30))
    opened.flush()
    opened.seal()
    opened.apply(USAGE, some_blocks(2, 30, first=31))
    opened.flush()
    sys.settrace(enter)
    opened.seal()
    sys.settrace(None)
"""


def killed_at_each_step(directory: Path, act: str) -> list[Path]:
    """What each left behind that was killed: before the last line that writes, the one before it, and so on."""
    ran = subprocess.run(
        [sys.executable, "-c", WATCH + act + ATTEMPTS, str(directory)],
        cwd=running.ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    (counted, fine), *killed = [tuple(map(int, line.split())) for line in ran.stdout.splitlines()]
    assert (ran.returncode, counted, fine) == (0, 0, 0), ran.stderr
    assert len(killed) > 10
    assert killed == [(at, -signal.SIGKILL) for at in range(len(killed), 0, -1)], ran.stderr
    assert len(killed) == int((directory / "lines").read_text())
    return [directory / str(at) for at, _ in killed]


@pytest.mark.slow
def test_kill_at_any_step_of_sealing_loses_and_doubles_nothing(tmp_path: Path) -> None:
    expected: Any = None
    for directory in killed_at_each_step(tmp_path, SEAL):
        opened = analytics.open_analytics(directory)
        found = {
            name: value
            for name, value in dump(opened).items()
            if name not in ("tokens", "issued_tokens", "grants", "events")
        }
        expected = expected or found
        assert found == expected, directory.name
        check(opened)
        files = {file.name for file in opened.segments.iterdir()}
        assert files == {name for (name,) in rows(opened, "SELECT file FROM segments")}
        opened.seal()
        assert opened.position(USAGE) == 60
        opened.close()


CUT = """
counting = threading.Event()

def enter(frame, *_):
    return watch if counting.is_set() and frame.f_code.co_filename in (segments.__file__, store.__file__) else None

def act(directory):
    threading.settrace(enter)
    opened = analytics.open_analytics(directory, batch_rows_max=10, segment_uses=300)
    opened.apply(LEDGER, issues())
    opened.apply(USAGE, some_blocks(1, 10))
    opened.flush()
    counting.set()
    opened.apply(USAGE, left_behind(some_blocks(2, 50, first=11)))
    while opened.position(USAGE) < 60:
        opened.check()
        time.sleep(0.001)
"""


@pytest.mark.slow
def test_kill_at_any_step_of_a_segment_made_at_once_loses_and_doubles_nothing(tmp_path: Path) -> None:
    positions = []
    expected: Any = None
    for directory in killed_at_each_step(tmp_path, CUT):
        opened = analytics.open_analytics(directory)
        positions.append(opened.position(USAGE))
        files = {file.name for file in opened.segments.iterdir()}
        assert files == {name for (name,) in rows(opened, "SELECT file FROM segments")}
        assert (len(files), *rows(opened, "SELECT max(block_seq) FROM uses")[0]) in [(0, 10), (1, 60)]
        opened.apply(USAGE, [*some_blocks(1, 10), *some_blocks(2, 50, first=11)])
        found = without_ledger(dump(opened))
        expected = expected or found
        assert found == expected, directory.name
        check(opened)
        opened.close()
    assert set(positions) == {10, 60}


# Damaged


def lose(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def spoil(file: Path) -> None:
    file.write_bytes(b"\xff" * file.stat().st_size)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [lose, cut])
def test_segment_that_is_not_there_or_too_short_is_noticed_at_the_start(
    opening: Open, damage: Callable[[Path], None]
) -> None:
    first = opening()
    first.apply(USAGE, some_blocks(1, 30))
    whole = dump(first)
    first.seal()
    first.close()
    [file] = list(first.segments.iterdir())
    damage(file)
    with structlog.testing.capture_logs() as logs:
        again = opening()
    assert [(entry["event"], entry["why"]) for entry in logs] == [("analytics_set_aside", "corrupt")]
    [aside] = store.set_aside_files(again.path)
    assert segments.directory_of(aside).is_dir()
    assert again.position(USAGE) == 0
    again.apply(USAGE, some_blocks(1, 30))
    assert [one[1:] for one in dump(again)["uses"]] == [one[1:] for one in whole["uses"]]


def test_changed_bit_of_a_segment_is_noticed_soon_after_the_start(opening: Open) -> None:
    first = opening()
    first.apply(USAGE, some_blocks(1, 30))
    first.flush()
    first.seal()
    first.close()
    [file] = list(first.segments.iterdir())
    flip(file)
    again = opening()
    with pytest.raises(analytics.AnalyticsCorrupt):
        running.until(again.check, seconds=10)
    again.close()
    assert opening().position(USAGE) == 0


@pytest.mark.parametrize("damage", [lose, spoil])
def test_damage_of_a_segment_found_while_in_use_stops_the_process(
    opening: Open, damage: Callable[[Path], None]
) -> None:
    opened = opening()
    opened.apply(USAGE, some_blocks(1, 30))
    opened.flush()
    opened.seal()
    [file] = list(opened.segments.iterdir())
    damage(file)
    with pytest.raises(duckdb.Error) as found:
        rows(opened, "SELECT * FROM uses")
    opened.report(found.value)
    with pytest.raises(analytics.AnalyticsCorrupt):
        running.until(opened.check, seconds=10)
    assert not opened.segments.exists()


def test_segments_of_files_set_aside_leave_with_them(opening: Open) -> None:
    opened = opening()
    for number in range(store.SET_ASIDE_FILES_MAX + 2):
        opened.apply(USAGE, some_blocks(number, 9))
        opened.flush()
        opened.seal()
        opened.reset()
    kept = store.set_aside_files(opened.path)
    assert len(kept) == store.SET_ASIDE_FILES_MAX
    found = sorted(opened.path.parent.glob("*.segments"))
    assert found == sorted([opened.segments, *map(segments.directory_of, kept)])


def test_file_set_aside_can_be_read_with_its_segments(opening: Open) -> None:
    opened = opening()
    opened.apply(USAGE, some_blocks(1, 9))
    opened.flush()
    uses = opened.seal()
    opened.reset()
    [aside] = store.set_aside_files(opened.path)
    found = duckdb.sql(f"SELECT count(*) FROM '{segments.directory_of(aside)}/*.parquet'").fetchall()
    assert found == [(uses,)]


# Where uses come from


AGENTS = {
    "curl/8.5.0": "curl",
    "python-requests/2.31.0": "python-requests",
    "okhttp/4.12.0 shop/3": "okhttp",
    "My App 2.1": "My App",
    "My App/2.1 (iPhone; iOS 17.4)": "My App",
    "Shop v3.2": "Shop",
    "7": "7",
    "": "",
    "(only a comment)": "(only a comment)",
    "Mozilla/5.0": "Mozilla",
    "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0": "Firefox",
    "Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0 Safari/537.36": "Chrome",
    "Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0 Safari/537.36 Edg/120.0": "Edg",
    "Mozilla/5.0 (iPhone) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.4 Mobile/15E148 Safari/604.1": "Safari",
}


@pytest.mark.parametrize(("user_agent", "product"), AGENTS.items(), ids=AGENTS.values())
def test_agent_is_the_product_without_its_version(user_agent: str, product: str) -> None:
    assert origins.agent(user_agent) == product


NETWORKS = {
    "192.0.2.77": "192.0.2.0/24",
    "2001:db8:1:2::3": "2001:db8:1::/48",
    "::ffff:192.0.2.77": "192.0.2.0/24",
    "fe80::1%eth0": "fe80::/48",
    "nowhere": None,
}


@pytest.mark.parametrize(("ip", "network"), NETWORKS.items())
def test_network_is_what_an_address_shares_with_its_neighbours(ip: str, network: str | None) -> None:
    assert origins.network(ip) == network
    assert origins.network(None) is None
    assert origins.agent(None) is None
