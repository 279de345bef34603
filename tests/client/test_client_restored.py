"""A ledger that was restored from a backup, and says that it is the same: what it announces now is not passed over."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from service.client.clock import boot_seconds
from service.client.errors import SnapshotNeeded, Unreachable
from service.client.knowledge import Knowledge
from service.client.nats_feed import NatsFeed, _Follower, _Position
from tests.validators import announcement, snapshot


class Connection:
    """What a follower needs of one to be given messages."""

    def new_inbox(self) -> str:
        return "inbox"

    async def publish(self, *_: Any, **__: Any) -> None:
        """Acknowledgements go nowhere."""


@dataclass
class Message:
    stream: int
    data: bytes
    reply: str = "ack"

    @property
    def metadata(self) -> Any:
        return SimpleNamespace(sequence=SimpleNamespace(stream=self.stream))


def event(seq: int) -> bytes:
    return announcement(seq, "token", datetime.now(UTC), token_id=f"tok_{seq}")


async def follower(ledger_seq: int, stream_seq: int) -> tuple[Knowledge, _Follower]:
    """One that knows the feed that far, and that this is all of it."""
    knowledge = Knowledge()
    assert await knowledge.replace(snapshot(ledger_seq))
    knowledge.stream_seq = stream_seq
    made = _Follower(Connection(), NatsFeed("url", "file", "sub"), knowledge, None)  # type: ignore[arg-type]
    made._applied = stream_seq
    made._judge(_Position("feed", ledger_seq, stream_seq, 0.0), boot_seconds())
    assert knowledge.age_seconds < 60
    return knowledge, made


def begins_anew(knowledge: Knowledge) -> bool:
    return knowledge.needs_snapshot and knowledge.feed is None and knowledge.age_seconds == float("inf")


@pytest.mark.parametrize(("ledger_seq", "stream_seq"), [(905, 91), (999, 100), (1005, 99)])
async def test_position_before_what_is_known_makes_a_follower_begin_anew(ledger_seq: int, stream_seq: int) -> None:
    knowledge, made = await follower(1000, 100)
    with pytest.raises(SnapshotNeeded, match="before what is known"):
        made._judge(_Position("feed", ledger_seq, stream_seq, 0.0), boot_seconds())
    assert begins_anew(knowledge)


async def test_position_of_a_time_before_what_is_known_is_only_late() -> None:
    knowledge, made = await follower(1000, 100)
    asked_at = boot_seconds()
    await made._apply(Message(101, event(1001)))  # type: ignore[arg-type]
    made._judge(_Position("feed", 1000, 100, 0.0), asked_at)
    made._judge(_Position("feed", 1000, 100, 5000.0), boot_seconds())
    assert (knowledge.needs_snapshot, knowledge.ledger_seq) == (False, 1001)


async def test_message_again_that_is_another_one_makes_a_follower_begin_anew() -> None:
    knowledge, made = await follower(1000, 100)
    for stream_seq, seq in ((91, 905), (100, 1000)):
        await made._apply(Message(stream_seq, event(seq)))  # type: ignore[arg-type]
    with pytest.raises(Unreachable):
        await made._apply(Message(91, b"{}"))  # type: ignore[arg-type]
    with pytest.raises(SnapshotNeeded, match="something else"):
        await made._apply(Message(91, event(1001)))  # type: ignore[arg-type]
    assert begins_anew(knowledge)
