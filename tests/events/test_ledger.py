"""The ledger on a real nats-server: nothing acknowledged is lost, every caller gets its own outcome."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from msgspec.structs import replace

from events import codec
from events.errors import Conflict, LedgerError, LedgerUnavailable, MessageTooLarge, OutcomeUnknown, StreamFull
from events.ledger import APPEND_SECONDS_MAX, WAITING_EVENTS_MAX, Append, Ledger
from events.server import EmbeddedServer
from events.streams import LEDGER, RawMessage, StreamLimits, stream_state
from tests.golden.expected import EVENTS
from tests.logs import connected, event, first, ids_of, kill, paused, server_with_streams, unique, until

# An attempt may begin just before the deadline and has two seconds of its own; the machine may be busy.
OUTCOME_SECONDS_MAX = APPEND_SECONDS_MAX + 2 + 5


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    async with server_with_streams(tmp_path_factory.mktemp("ledger")) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="session")
async def ledger(server: EmbeddedServer) -> AsyncIterator[Ledger]:
    async with connected(server) as nc:
        yield Ledger(nc)


async def settled(*appends: asyncio.Future[list[int]] | asyncio.Task[list[int]]) -> list[list[int] | BaseException]:
    """What became of each."""
    return list(await asyncio.gather(*appends, return_exceptions=True))


# Append, read, get


async def test_append_returns_the_sequence_and_read_returns_the_event(ledger: Ledger) -> None:
    subject, one, two = unique(), event(1), event(2)
    before = datetime.now(UTC)
    [seq] = await ledger.append(Append(subject, one, 0))
    [next_seq] = await ledger.append(Append(subject, two, seq))
    recorded = await ledger.read(subject)
    assert [(seq, subject, one), (next_seq, subject, two)] == [(r.seq, r.subject, r.event) for r in recorded]
    assert next_seq > seq
    for found in recorded:
        assert abs(found.recorded_at - before) < timedelta(seconds=60)
        assert found == await ledger.get(found.seq)


async def test_recorded_time_is_the_same_however_it_is_read(ledger: Ledger) -> None:
    [seq] = await ledger.append(first(unique()))
    found = await ledger.get(seq)
    async with contextlib.aclosing(ledger.follow(seq - 1)) as batches:
        batch = await next_with_messages(batches)
    assert found is not None
    assert batch[0].recorded_at == found.recorded_at


async def test_clock_is_the_one_that_events_are_stamped_with(ledger: Ledger) -> None:
    times = []
    for _ in range(3):
        [seq] = await ledger.append(first(unique()))
        found = await ledger.get(seq)
        assert found is not None
        times += [found.recorded_at, await ledger.clock()]
    assert sorted(times) == times


async def test_read_ends_where_it_is_told_to(ledger: Ledger) -> None:
    subject = unique()
    seqs = [(await ledger.append(Append(subject, event(number))))[0] for number in range(3)]
    assert seqs[:2] == [one.seq for one in await ledger.read(subject, until_seq=seqs[2] - 1)]
    assert seqs[:2] == [one.seq for one in await ledger.read(subject, events_max=2)]
    assert seqs == [one.seq for one in await ledger.read(subject, until_seq=seqs[2], events_max=3)]
    assert await ledger.read(subject, until_seq=seqs[0] - 1) == []


async def test_position_at_a_time_is_that_of_the_last_event_recorded_by_then(ledger: Ledger) -> None:
    seqs = [(await ledger.append(first(unique())))[0] for _ in range(3)]
    times = [found.recorded_at for seq in seqs if (found := await ledger.get(seq))]
    microsecond = timedelta(microseconds=1)
    assert seqs == [await ledger.position_at(moment) for moment in times]
    assert seqs[0] == await ledger.position_at(times[1] - microsecond)
    assert seqs[2] == await ledger.position_at(times[2] + timedelta(days=1))
    for early in (datetime(1, 1, 1, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=UTC)):
        assert await ledger.position_at(early) == 0


async def test_events_of_one_append_stand_together_and_in_order(ledger: Ledger) -> None:
    one, two, three = unique(), unique(), unique()
    entries = [first(one), first(two), Append(one, event()), Append(three, event())]
    seqs = await ledger.append(*entries)
    assert list(range(seqs[0], seqs[0] + 4)) == seqs
    assert [(e.subject, e.event.id) for e in entries] == [
        (found.subject, found.event.id) for seq in seqs if (found := await ledger.get(seq))
    ]


async def test_unknown_subject_is_empty_and_unknown_sequence_is_none(ledger: Ledger) -> None:
    assert await ledger.read(unique()) == []
    assert await ledger.get(await ledger.last_seq() + 1) is None


async def test_read_returns_every_event_of_a_long_subject(ledger: Ledger) -> None:
    subject, other = unique(), unique()
    wanted = []
    for _ in range(3):
        entries = [Append(subject if number % 4 else other, event()) for number in range(1000)]
        await ledger.append(*entries)
        wanted += [entry.event.id for entry in entries if entry.subject == subject]
    assert wanted == await ids_of(ledger, subject)


async def test_end_is_at_or_behind_every_event_acknowledged_before(ledger: Ledger) -> None:
    """Also for callers that come while a question is on its way."""

    async def append_and_ask() -> tuple[int, int]:
        [seq] = await ledger.append(first(unique()))
        return seq, await ledger.last_seq()

    for seq, end in await asyncio.gather(*(append_and_ask() for _ in range(100))):
        assert end >= seq


async def test_many_who_ask_for_the_end_share_two_questions(ledger: Ledger) -> None:
    before = ledger.nc.stats["out_msgs"]
    await asyncio.gather(*(ledger.last_seq() for _ in range(200)))
    assert ledger.nc.stats["out_msgs"] - before <= 2


# Compare and set


async def test_wrong_expectation_is_a_conflict_and_nothing_is_written(ledger: Ledger) -> None:
    subject = unique()
    [seq] = await ledger.append(first(subject))
    for expected in (0, seq + 1, seq - 1):
        with pytest.raises(Conflict):
            await ledger.append(Append(subject, event(), expected))
    assert len(await ledger.read(subject)) == 1


async def test_expectation_on_one_subject_fails_the_whole_append(ledger: Ledger) -> None:
    taken, fresh = unique(), unique()
    await ledger.append(first(taken))
    with pytest.raises(Conflict):
        await ledger.append(first(fresh), first(taken))
    assert await ledger.read(fresh) == []


async def test_fifty_races_have_one_winner_each(server: EmbeddedServer) -> None:
    """Fifty callers on five connections, as on five hosts, several times."""
    async with contextlib.AsyncExitStack() as stack:
        ledgers = [Ledger(await stack.enter_async_context(connected(server))) for _ in range(5)]
        for _ in range(5):
            subject = unique()
            entries = [first(subject) for _ in range(50)]
            outcomes = await settled(
                *(asyncio.ensure_future(ledgers[n % 5].append(entry)) for n, entry in enumerate(entries))
            )
            winners = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, list)]
            assert [Conflict] * 49 == [type(outcome) for outcome in outcomes if not isinstance(outcome, list)]
            assert [entries[n].event.id for n in winners] == await ids_of(ledgers[0], subject)


# Groups


async def test_conflict_in_a_group_fails_nobody_else(ledger: Ledger) -> None:
    taken = unique()
    await ledger.append(first(taken))
    good = [first(unique()) for _ in range(40)]
    outcomes = await settled(
        *(asyncio.ensure_future(ledger.append(entry)) for entry in (*good[:20], first(taken), *good[20:]))
    )
    assert [isinstance(outcome, Conflict) for outcome in outcomes] == [False] * 20 + [True] + [False] * 20
    for entry in good:
        assert [entry.event.id] == await ids_of(ledger, entry.subject)


@pytest.mark.parametrize("seed", range(4))
async def test_crowd_of_all_sorts_meets_its_own_outcomes(ledger: Ledger, seed: int) -> None:
    """Units of one and of many events, conditioned and free, on subjects of their own and on contested ones."""
    rng = random.Random(seed)
    contested = [unique("c") for _ in range(6)]
    shared = unique("s")
    units: list[list[Append]] = []
    for _ in range(120):
        unit = []
        for _ in range(rng.choice([1, 1, 1, 2, 3, 15])):
            kind = rng.random()
            if kind < 0.2:
                unit.append(first(rng.choice(contested)))
            elif kind < 0.4:
                unit.append(Append(shared, event()))
            else:
                unit.append(first(unique("o")))
        units.append(unit)
    outcomes = await settled(*(asyncio.ensure_future(ledger.append(*unit)) for unit in units))
    stored = {
        recorded.event.id: recorded.seq
        for subject in {entry.subject for unit in units for entry in unit}
        for recorded in await ledger.read(subject)
    }
    for unit, outcome in zip(units, outcomes, strict=True):
        found = [stored.get(entry.event.id) for entry in unit]
        if isinstance(outcome, list):
            assert found == outcome
        else:
            assert isinstance(outcome, Conflict)
            assert set(found) == {None}
            assert any(entry.subject in contested for entry in unit)
    for subject in contested:
        began = [entry.event.id for unit in units for entry in unit if entry.subject == subject]
        taken = sum(identifier in stored for identifier in began)
        winners = [unit for unit in units if any(entry.subject == subject for entry in unit)]
        assert taken == 0 or sum(any(e.event.id in stored for e in unit) for unit in winners) == 1


async def test_caller_that_goes_away_harms_nobody(ledger: Ledger) -> None:
    tasks = [asyncio.create_task(ledger.append(first(unique()))) for _ in range(60)]
    await asyncio.sleep(0)
    for task in tasks[::3]:
        task.cancel()
    outcomes = await settled(*tasks)
    assert all(isinstance(outcome, list) for number, outcome in enumerate(outcomes) if number % 3)


# Unknown outcomes


@pytest.mark.parametrize("events", [1, 2, 20], ids="{} events".format)
async def test_same_append_again_finds_its_own_events(ledger: Ledger, events: int) -> None:
    entries = [first(unique()) for _ in range(events)]
    seqs = await ledger.append(*entries)
    assert seqs == await ledger.append(*entries)
    free = [Append(unique(), event()) for _ in range(events)]
    assert await ledger.append(*free) == await ledger.append(*free)


async def test_same_append_again_in_a_group_finds_its_own_events(ledger: Ledger) -> None:
    units = [[first(unique()) for _ in range(1 + number % 3)] for number in range(40)]
    seqs = await asyncio.gather(*(ledger.append(*unit) for unit in units))
    more = [[first(unique())] for _ in range(20)]
    again = await asyncio.gather(*(ledger.append(*unit) for unit in units + more))
    assert seqs == again[:40]
    for [entry] in more:
        assert [entry.event.id] == await ids_of(ledger, entry.subject)


async def test_own_event_is_found_though_others_followed_it(ledger: Ledger) -> None:
    subject = unique()
    mine = first(subject)
    [seq] = await ledger.append(mine)
    await ledger.append(Append(subject, event(), seq))
    assert [seq] == await ledger.append(mine)


@pytest.mark.parametrize("units", [1, 40], ids=["single", "group"])
async def test_late_acknowledgement_is_one_event_and_a_success(
    server: EmbeddedServer, ledger: Ledger, units: int
) -> None:
    """The server holds the write until a second attempt was sent: the second is refused, and the first counts."""
    entries = [(first(unique()), Append(unique(), event())) for _ in range(units)]
    await ledger.last_seq()
    before = ledger.nc.stats["out_msgs"]
    with paused(server):
        tasks = [asyncio.ensure_future(ledger.append(*entry)) for entry in entries]
        # The first attempt is 2 messages a unit, as one batch or alone; then each goes alone.
        await until(lambda: ledger.nc.stats["out_msgs"] - before > 2 * units, what="a second attempt")
    outcomes = await settled(*tasks)
    for (conditioned, free), outcome in zip(entries, outcomes, strict=True):
        assert isinstance(outcome, list), outcome
        assert [conditioned.event.id] == await ids_of(ledger, conditioned.subject)
        assert [free.event.id] == await ids_of(ledger, free.subject)


async def test_silent_server_is_an_unknown_outcome_within_the_deadline(server: EmbeddedServer, ledger: Ledger) -> None:
    await ledger.last_seq()
    single, many = first(unique()), [first(unique()) for _ in range(30)]
    began = time.monotonic()
    with paused(server):
        outcomes = await settled(*(asyncio.ensure_future(ledger.append(entry)) for entry in (single, *many)))
        seconds = time.monotonic() - began
    assert seconds < OUTCOME_SECONDS_MAX
    assert {OutcomeUnknown} == {type(outcome) for outcome in outcomes}
    # A retry of the same events is safe, whatever became of them.
    for entry in (single, *many):
        await ledger.append(entry)
        assert [entry.event.id] == await ids_of(ledger, entry.subject)


async def test_reading_from_a_silent_server_fails_in_time(server: EmbeddedServer, ledger: Ledger) -> None:
    await ledger.last_seq()
    with paused(server):
        began = time.monotonic()
        asked = ledger.read(unique()), ledger.get(1), ledger.last_seq()
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [LedgerUnavailable] * 3 == [type(outcome) for outcome in outcomes]
        assert time.monotonic() - began < OUTCOME_SECONDS_MAX


# Errors


async def test_server_that_is_gone_is_unavailable_and_comes_back(tmp_path: Path) -> None:
    async with server_with_streams(tmp_path) as server, connected(server) as nc:
        ledger = Ledger(nc)
        kept = first(unique())
        await ledger.append(kept)
        await server.stop()
        await until(lambda: not nc.is_connected, what="the client has noticed")
        began = time.monotonic()
        for ask in (ledger.append(first(unique())), ledger.read(kept.subject), ledger.get(1), ledger.last_seq()):
            with pytest.raises(LedgerUnavailable):
                await ask
        assert time.monotonic() - began < 2
        await server.start()
        await until(lambda: nc.is_connected, what="the client is back")
        assert [kept.event.id] == await ids_of(ledger, kept.subject)
        await ledger.append(first(unique()))


async def test_event_that_is_too_large_is_refused_alone(ledger: Ledger) -> None:
    large = replace(EVENTS["scope.registered/1"], id="large", description="x" * 300_000)
    good = [first(unique()) for _ in range(20)]
    outcomes = await settled(
        *(asyncio.ensure_future(ledger.append(entry)) for entry in (*good, Append(unique(), large)))
    )
    assert [MessageTooLarge] == [type(outcome) for outcome in outcomes if not isinstance(outcome, list)]


async def test_largest_event_fits_and_more_events_than_a_batch_takes_do_not(ledger: Ledger) -> None:
    large = replace(EVENTS["scope.registered/1"], id="largest", description="")
    large = replace(large, description="x" * (256 * 1024 - 1024 - len(codec.encode(large))))
    await ledger.append(first(unique()), Append(unique(), large, 0))
    with pytest.raises(MessageTooLarge):
        await ledger.append(*(Append(unique(), event()) for _ in range(1001)))


async def test_full_stream_is_told_and_what_is_in_it_can_be_read(tmp_path: Path) -> None:
    limits = StreamLimits(ledger_bytes_max=64 * 1024)
    async with server_with_streams(tmp_path, limits) as server, connected(server) as nc:
        ledger = Ledger(nc)
        kept: list[Append] = []
        refused: list[BaseException] = []
        for _ in range(10):
            entries = [first(unique()) for _ in range(50)]
            outcomes = await settled(*(asyncio.ensure_future(ledger.append(entry)) for entry in entries))
            kept += [e for e, outcome in zip(entries, outcomes, strict=True) if isinstance(outcome, list)]
            refused += [outcome for outcome in outcomes if not isinstance(outcome, list)]
        assert {StreamFull} == {type(error) for error in refused}
        with pytest.raises(StreamFull):
            await ledger.append(first(unique()))
        with pytest.raises(StreamFull):
            await ledger.append(first(unique()), first(unique()))
        for entry in kept:
            assert [entry.event.id] == await ids_of(ledger, entry.subject)
        # What is in the log already is found in it, though there is no room for it again.
        assert await ledger.append(kept[0]) == [(await ledger.read(kept[0].subject))[0].seq]


async def test_queue_is_bounded(server: EmbeddedServer, ledger: Ledger) -> None:
    await ledger.last_seq()
    units = WAITING_EVENTS_MAX // 1000 + 4
    with paused(server):
        tasks = [
            asyncio.ensure_future(ledger.append(*(Append(unique(), event()) for _ in range(1000))))
            for _ in range(units)
        ]
        done, waiting = await asyncio.wait(tasks, timeout=0.2)
        assert len(done) == 4  # twenty wait
        assert {LedgerUnavailable} == {type(task.exception()) for task in done}
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
    await ledger.append(first(unique()))


# kill -9


@pytest.mark.slow
async def test_acknowledged_events_survive_kill_in_mid_load(tmp_path: Path) -> None:
    """Three kills under load from forty callers. What was acknowledged is there once, what was refused is not."""
    async with server_with_streams(tmp_path) as server, connected(server) as nc:
        ledger, ended = Ledger(nc), asyncio.Event()
        acknowledged: dict[str, list[int]] = {}
        unknown: dict[str, str] = {}
        refused: dict[str, str] = {}

        async def call(number: int) -> None:
            while not ended.is_set():
                entries = [first(unique()) for _ in range(1 + number % 3)]
                ids = {entry.event.id: entry.subject for entry in entries}
                try:
                    seqs = await ledger.append(*entries)
                except OutcomeUnknown:
                    unknown.update(ids)
                except LedgerUnavailable:
                    refused.update(ids)
                    await asyncio.sleep(0.01)
                else:
                    for entry, seq in zip(entries, seqs, strict=True):
                        acknowledged[entry.event.id] = [seq]

        async with asyncio.TaskGroup() as group:
            for number in range(40):
                group.create_task(call(number))
            for _ in range(3):
                goal = len(acknowledged) + 150
                await until(lambda goal=goal: len(acknowledged) > goal, what="load")
                await kill(server)
            goal = len(acknowledged) + 150
            await until(lambda: len(acknowledged) > goal, what="load after the last kill")
            ended.set()

        stored: dict[str, list[int]] = {}
        async for message in everything(ledger):
            stored.setdefault(codec.decode(message.data).id, []).append(message.seq)
        assert acknowledged == {identifier: stored.get(identifier) for identifier in acknowledged}
        assert not stored.keys() & refused.keys()
        assert all(len(seqs) == 1 for seqs in stored.values())
        assert stored.keys() <= acknowledged.keys() | unknown.keys()


async def everything(ledger: Ledger) -> AsyncIterator[RawMessage]:
    end = int((await stream_state(ledger.nc, LEDGER))["last_seq"])
    async with contextlib.aclosing(ledger.follow(0)) as batches:
        async for batch in batches:
            for message in batch:
                yield message
            if batch and batch[-1].seq >= end:
                return


# Follow


async def next_with_messages(batches: AsyncIterator[list[RawMessage]]) -> list[RawMessage]:
    async for batch in batches:
        if batch:
            return batch
    raise AssertionError("ended")


async def test_follow_begins_behind_a_sequence_and_goes_on(ledger: Ledger) -> None:
    subject = unique()
    seqs = await ledger.append(*(Append(subject, event()) for _ in range(10)))
    async with contextlib.aclosing(ledger.follow(seqs[4])) as batches:
        batch = await next_with_messages(batches)
        assert seqs[5] == batch[0].seq
        later = first(unique())
        await ledger.append(later)
        while batch[-1].subject != later.subject:
            batch = await next_with_messages(batches)
        assert later.event == codec.decode(batch[-1].data)


async def test_follow_of_a_quiet_log_says_so(ledger: Ledger) -> None:
    end = await ledger.last_seq()
    async with contextlib.aclosing(ledger.follow(end)) as batches:
        assert await asyncio.wait_for(anext(batches), 5) == []


@pytest.mark.slow
async def test_follow_survives_kill_without_gap_or_duplicate(tmp_path: Path) -> None:
    async with server_with_streams(tmp_path) as server, connected(server) as nc, connected(server) as other:
        ledger, follower = Ledger(nc), Ledger(other)
        seen: list[int] = []

        async def follow() -> None:
            async with contextlib.aclosing(follower.follow(0)) as batches:
                async for batch in batches:
                    seen.extend(message.seq for message in batch)

        following = asyncio.create_task(follow())
        try:
            for _ in range(3):
                for _ in range(5):
                    with contextlib.suppress(LedgerError):
                        await ledger.append(*(Append(unique(), event()) for _ in range(40)))
                goal = len(seen)
                await kill(server)
                await until(lambda: nc.is_connected, what="the writer is back")
                await ledger.append(*(Append(unique(), event()) for _ in range(40)))
                await until(lambda goal=goal: len(seen) > goal, what="the follower goes on")
            end = await ledger.last_seq()
            await until(lambda: seen and seen[-1] >= end, what="the follower has reached the end")
        finally:
            following.cancel()
            await asyncio.wait([following])
    assert list(range(1, end + 1)) == seen
    assert Counter(seen).most_common(1)[0][1] == 1
