"""Folds of receipts: what was applied when, whatever order they come in, and in bounded memory."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest
import structlog.testing

from events import codec
from events.errors import UndecodableEvent
from events.streams import RECEIPTS, REVOCATIONS, RawMessage
from events.types import Receipt, ReceiptBlock
from projections.receipts import Acknowledged, Announcements, ReceiptsFold, Steps, moment_us

CREATED = "2026-01-01T00:00:00.5Z"
CREATED_NS = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp()) * 10**9 + 5 * 10**8
STEPS_MAX = 4_096


def block(seq: int, *receipts: tuple[str, int, int], at_ns: int = CREATED_NS) -> RawMessage:
    data = codec.encode_receipts(ReceiptBlock(writer="w", receipts=tuple(Receipt(*one) for one in receipts)))
    return RawMessage(seq, at_ns, "receipts.main.w", data)


def huge(member: str) -> bytes:
    numbers = {"ledger_seq": 1, "applied_at_us": 1} | {member: 2**63}
    return codec.encode_receipts(ReceiptBlock(writer="w", receipts=(Receipt("sub_a", **numbers),)))


def announced(seq: int, ledger_seq: int, at_ns: int = CREATED_NS) -> RawMessage:
    return RawMessage(seq, at_ns, "revocations.main.token", b'{"id":"%d","data":{}}' % ledger_seq)


def fold_of(*messages: RawMessage) -> ReceiptsFold:
    fold = ReceiptsFold()
    assert fold.belongs_to(RECEIPTS, CREATED, len(messages))
    assert fold.belongs_to(REVOCATIONS, CREATED, 0)
    fold.apply(RECEIPTS, list(messages))
    return fold


def test_steps_say_when_each_revocation_was_applied_first():
    steps = Steps()
    for seq, at in ((3, 30), (7, 70), (9, 90)):
        assert steps.add(seq, at)
    assert [steps.applied_at_us(seq) for seq in (1, 3, 4, 7, 8, 9, 10)] == [30, 30, 70, 70, 90, 90, None]
    assert (steps.acknowledged, steps.last_at_us) == (9, 90)


@pytest.mark.parametrize("seed", range(20))
def test_steps_in_any_order_and_twice_are_the_same(seed):
    chance = random.Random(seed)
    receipts = [(chance.randrange(50), chance.randrange(50)) for _ in range(40)]
    steps = Steps()
    for receipt in receipts + chance.sample(receipts, 20):
        steps.add(*receipt)
    for seq in range(52):
        reached = [at for reached, at in receipts if reached >= seq]
        assert steps.applied_at_us(seq) == min(reached, default=None), seq
    assert steps.acknowledged == max(seq for seq, _ in receipts)


def test_duplicate_receipt_says_nothing_new():
    steps = Steps()
    assert steps.add(5, 50)
    assert not steps.add(5, 60)
    assert not steps.add(4, 50)
    assert steps.applied_at_us(4) == 50


def test_steps_that_are_too_many_forget_the_oldest_times_and_not_that_it_was_applied():
    steps = Steps()
    for seq in range(10_000):
        steps.add(seq, seq * 10)
    assert steps.acknowledged == 9_999
    assert steps.applied_at_us(9_000) == 90_000
    assert steps.applied_at_us(10) is None
    assert 10 <= steps.forgotten < 9_000
    assert len(steps._seqs) <= STEPS_MAX


def test_acknowledged_counts_only_without_a_gap():
    consumer = Acknowledged()
    consumer.raise_to(3)
    assert not consumer.acknowledge(6)
    assert not consumer.acknowledge(5)
    assert not consumer.acknowledge(5)
    assert consumer.floor == 3
    assert consumer.acknowledge(4)
    assert (consumer.floor, consumer.above) == (6, set())
    assert not consumer.acknowledge(2)


def test_acknowledged_before_the_floor_is_known_counts_when_it_is():
    consumer = Acknowledged()
    assert not consumer.acknowledge(5)
    assert consumer.raise_to(4)
    assert consumer.floor == 5


def test_refused_for_good_is_never_passed():
    consumer = Acknowledged()
    consumer.raise_to(0)
    consumer.refuse(2)
    consumer.acknowledge(1)
    consumer.acknowledge(3)
    assert consumer.floor == 1
    consumer.raise_to(3)  # the server's floor passes it
    assert consumer.floor == 1


def test_acknowledgements_beyond_a_gap_are_bounded():
    consumer = Acknowledged()
    consumer.raise_to(0)
    for seq in range(2, 30_000):
        consumer.acknowledge(seq)
    assert len(consumer.above) == 10_000


def test_announcements_are_found_by_both_sequences():
    found = Announcements()
    for stream_seq, ledger_seq in ((4, 40), (5, 55), (6, 60)):
        found.add(stream_seq, ledger_seq, ledger_seq * 1000)
    assert (found.first, found.end, found.last_ledger_seq) == (4, 6, 60)
    assert [found.ledger_seq(seq) for seq in (3, 4, 6, 7)] == [None, 40, 60, None]
    assert [found.announced_at_us(seq) for seq in (40, 41, 60)] == [40, None, 60]
    assert [found.after(seq) for seq in (0, 40, 54, 60)] == [(3, 40), (2, 55), (2, 55), (0, None)]


def test_announcements_hold_the_newest_only():
    found = Announcements()
    for seq in range(1, 250_001):
        found.add(seq, seq * 2, seq)
    assert found.end == 250_000
    assert found.end - found.first < 200_000
    assert found.ledger_seq(found.first) == found.first * 2


def test_fold_skips_what_it_has_seen():
    fold = fold_of(block(1, ("sub_a", 5, CREATED_NS // 1000)))
    fold.apply(RECEIPTS, [block(1, ("sub_a", 9, 1)), block(2, ("sub_a", 6, CREATED_NS))])
    assert fold.followers["sub_a"].acknowledged == 6
    assert fold.position(RECEIPTS) == 2


def test_fold_takes_no_receipt_from_before_the_feed_began():
    """They are about the feed of another log: a backup was restored, and its sequences mean something else."""
    fold = fold_of(block(1, ("sub_a", 900, 1), at_ns=CREATED_NS - 1), block(2, ("sub_a", 5, 2)))
    assert fold.followers["sub_a"].acknowledged == 5


def test_fold_knows_no_times_of_receipts_that_left_the_stream():
    fold = fold_of(block(41, ("sub_a", 500, 7)))
    steps = fold.followers["sub_a"]
    assert (steps.applied_at_us(499), steps.applied_at_us(500), steps.acknowledged) == (None, 7, 500)


def test_fold_of_another_feed_begins_anew():
    fold = fold_of(block(1, ("sub_a", 5, 1)))
    fold.apply(REVOCATIONS, [announced(1, 5)])
    other = "2026-02-01T00:00:00Z"
    assert not fold.belongs_to(REVOCATIONS, other, 9)
    fold.reset()
    assert fold.belongs_to(REVOCATIONS, other, 9)
    assert (fold.feed, fold.followers, fold.announced.end, fold.position(RECEIPTS)) == (other, {}, 0, 0)


def test_fold_is_complete_when_both_streams_were_read():
    fold = fold_of()
    for stream in (RECEIPTS, REVOCATIONS):
        assert not fold.complete
        fold.confirm(stream, 0, 0)
    assert fold.complete


@pytest.mark.parametrize("data", [b"", b"\x93\xa8receipts", b"\xff", huge("ledger_seq"), huge("applied_at_us")])
def test_fold_leaves_out_receipts_that_it_cannot_read_and_says_so_once(data):
    unreadable = [RawMessage(seq, CREATED_NS, "receipts.main.newer", data) for seq in (2, 3)]
    with structlog.testing.capture_logs() as logs:
        fold = fold_of(block(1, ("sub_a", 5, 1)), *unreadable, block(4, ("sub_a", 6, 2)))
    assert [(one["event"], one["alarm"], one["seq"]) for one in logs] == [("receipts_unreadable", True, 2)]
    assert (fold.position(RECEIPTS), fold.followers["sub_a"].acknowledged, fold.unreadable) == (4, 6, 2)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"id":"x"}', b'{"id":7}', b"\xff"])
def test_fold_stops_at_an_announcement_that_it_cannot_read(data):
    with pytest.raises(UndecodableEvent):
        fold_of().apply(REVOCATIONS, [RawMessage(1, CREATED_NS, "revocations.main.token", data)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-01T00:00:00Z", timedelta()),
        ("2026-01-01T00:00:00.5Z", timedelta(seconds=0.5)),
        ("2026-01-01T00:00:01.123456789Z", timedelta(seconds=1, microseconds=123456)),
    ],
)
def test_moment_is_read_with_microseconds(text, expected):
    assert moment_us(text) == (datetime(2026, 1, 1, tzinfo=UTC) + expected - datetime(1970, 1, 1, tzinfo=UTC)) // (
        timedelta(microseconds=1)
    )
