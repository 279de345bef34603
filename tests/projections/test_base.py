"""The one loop that feeds a projection, from a real log: what it survives and what it must not pass over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from events import streams
from events.errors import LedgerUnavailable, UndecodableEvent
from events.ledger import Append, Ledger
from events.server import EmbeddedServer
from events.streams import LEDGER, Connection, RawMessage
from projections import base
from projections.base import Projection, SlowProjection, boot_time_ns
from projections.current import CurrentReader, CurrentWriter, view_path
from tests.logs import LIMITS, connected, event, first, kill, paused, server_with_streams, unique, until
from tests.making import everything, subject_of
from tests.other_process import Remote


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    async with server_with_streams(tmp_path_factory.mktemp("base")) as one:
        yield one


class Seen:
    """A projection that remembers what it was given."""

    name = "seen"
    version = 1

    def __init__(self) -> None:
        self.seqs: list[int] = []
        self.confirmed: list[tuple[int, int]] = []
        self.resets = 0
        self.created = ""
        self.on_confirm: Callable[[], None] = lambda: None
        self.on_apply: Callable[[list[RawMessage]], None] = lambda _: None

    def position(self, stream: str) -> int:
        return self.seqs[-1] if self.seqs else 0

    def apply(self, stream: str, batch: list[RawMessage]) -> None:
        self.on_apply(batch)
        self.seqs += [message.seq for message in batch]

    def confirm(self, stream: str, end: int, asked_at_ns: int) -> None:
        self.on_confirm()
        self.confirmed.append((end, asked_at_ns))

    def belongs_to(self, stream: str, created: str, end: int) -> bool:
        known, self.created = self.created, created
        return known in {"", created} and self.position(stream) <= end

    def reset(self) -> None:
        self.resets += 1
        self.seqs.clear()


class Slow(Seen):
    """One whose `apply` waits until it is told to go on, in a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.applying = threading.Event()
        self.go_on = threading.Event()
        self.room = True
        self.threads: set[threading.Thread] = set()

    def has_room(self, stream: str) -> bool:
        return self.room

    def apply(self, stream: str, batch: list[RawMessage]) -> None:
        self.threads.add(threading.current_thread())
        if batch:
            self.applying.set()
            assert self.go_on.wait(20)
        super().apply(stream, batch)


@contextlib.asynccontextmanager
async def running(nc: Connection, projection: Projection) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(base.run(nc, projection, (LEDGER,)))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def end_of(task: asyncio.Task[None]) -> BaseException | None:
    """How the task ended."""
    await asyncio.wait([task], timeout=20)
    assert task.done()
    return task.exception()


async def append(server: EmbeddedServer, count: int = 1) -> int:
    """The sequence of the last of that many events."""
    async with connected(server) as nc:
        return (await Ledger(nc).append(*(Append(unique(), event()) for _ in range(count))))[-1]


def test_projections_keep_the_protocol(tmp_path: Path) -> None:
    assert isinstance(Seen(), Projection)
    assert isinstance(Slow(), SlowProjection)
    writer = CurrentWriter(view_path(tmp_path))
    assert isinstance(writer, Projection)
    # It is on the way of every revocation, and a thread would cost it a tenth of a millisecond.
    assert not isinstance(writer, SlowProjection)
    writer.close()


async def test_events_are_applied_in_order_once_and_confirmed(server: EmbeddedServer) -> None:
    end, seen = await append(server, 5), Seen()
    async with connected(server, "projector") as nc, running(nc, seen):
        began = boot_time_ns()
        end = await append(server, 5)
        await until(lambda: seen.seqs and seen.seqs[-1] == end)
        await until(lambda: seen.confirmed and seen.confirmed[-1][0] == end)
        assert list(range(1, end + 1)) == seen.seqs
        assert began < seen.confirmed[-1][1] < boot_time_ns()
        confirmations = len(seen.confirmed)
        await until(lambda: len(seen.confirmed) > confirmations + 2, what="it goes on confirming when nothing comes")


async def test_messages_say_how_many_are_left(server: EmbeddedServer) -> None:
    end, left = await append(server, 5), []
    seen = Seen()
    seen.on_apply = lambda batch: left.extend(message.left for message in batch)
    async with connected(server, "projector") as nc:
        await base.run(nc, seen, (LEDGER,), until_caught_up=True)
    assert list(range(end - 1, -1, -1)) == left


async def test_others_go_on_while_a_slow_projection_applies(server: EmbeddedServer) -> None:
    end, slow = await append(server, 5), Slow()
    async with connected(server, "projector") as nc, running(nc, slow):
        await until(slow.applying.is_set)
        await nc.flush()  # the loop is free: it would wait for itself
        assert slow.seqs == slow.confirmed == []
        slow.go_on.set()
        await until(lambda: slow.confirmed and slow.confirmed[-1][0] == end)
    assert list(range(1, end + 1)) == slow.seqs
    assert threading.current_thread() not in slow.threads


async def test_slow_projection_gets_nothing_before_there_is_room(server: EmbeddedServer) -> None:
    end, slow = await append(server, 5), Slow()
    slow.room = False
    slow.go_on.set()
    async with connected(server, "projector") as nc, running(nc, slow):
        await nc.flush()
        await until(lambda: slow.resets == 0 and slow.created)
        assert not slow.applying.is_set()
        slow.room = True
        await until(lambda: slow.position(LEDGER) == end)


async def test_run_that_is_cancelled_ends_behind_what_is_being_applied(server: EmbeddedServer) -> None:
    """Else the next run would apply the same at the same time."""
    end, slow = await append(server, 5), Slow()
    async with connected(server, "projector") as nc:
        task = asyncio.create_task(base.run(nc, slow, (LEDGER,)))
        await until(slow.applying.is_set)
        task.cancel()
        await asyncio.wait([task], timeout=0.2)
        assert not task.done()
        slow.go_on.set()
        await asyncio.wait([task], timeout=20)
        assert task.cancelled()
        await base.run(nc, slow, (LEDGER,), until_caught_up=True)
    assert list(range(1, end + 1)) == slow.seqs


async def test_failure_in_the_thread_ends_the_run(server: EmbeddedServer) -> None:
    await append(server)
    slow = Slow()
    slow.go_on.set()

    def fail(_: list[RawMessage]) -> None:
        raise UndecodableEvent("as is")

    slow.on_apply = fail
    async with connected(server, "projector") as nc, running(nc, slow) as task:
        assert isinstance(await end_of(task), UndecodableEvent)


async def test_confirmation_is_as_old_as_the_question(server: EmbeddedServer) -> None:
    """Not as the answer: between the two something may have been revoked."""
    await append(server)
    seen = Seen()
    async with connected(server, "projector") as nc, running(nc, seen):
        await until(lambda: seen.confirmed)
        with paused(server):
            paused_at = boot_time_ns()
            before = len(seen.confirmed)
            await until(lambda: boot_time_ns() > paused_at + 300_000_000)
            assert all(asked < paused_at for _, asked in seen.confirmed[before:])
        await until(lambda: seen.confirmed[-1][1] > paused_at, what="confirmed again")


async def test_run_until_caught_up_ends_at_the_end(server: EmbeddedServer) -> None:
    end = await append(server, 20)
    seen, steps = Seen(), []
    async with connected(server, "projector") as nc:
        await base.run(nc, seen, (LEDGER,), until_caught_up=True, progress=lambda *step: steps.append(step))
        assert end == seen.position(LEDGER)
        before = list(seen.seqs)
        await asyncio.wait_for(base.run(nc, seen, (LEDGER,), until_caught_up=True), 5)
        assert before == seen.seqs
    assert all(stream == LEDGER and 0 <= at <= last <= end for stream, at, last in steps)


async def test_run_until_caught_up_with_an_empty_log_ends_at_once(tmp_path: Path) -> None:
    async with server_with_streams(tmp_path) as server, connected(server, "projector") as nc:
        await asyncio.wait_for(base.run(nc, Seen(), streams_of_all(), until_caught_up=True), 10)


def streams_of_all() -> tuple[str, ...]:
    return (LEDGER, streams.USAGE)


@pytest.mark.slow
async def test_kill_of_the_server_is_survived_without_gap(tmp_path: Path) -> None:
    async with server_with_streams(tmp_path) as server, connected(server, "projector") as nc:
        seen = Seen()
        async with running(nc, seen) as task:
            for _ in range(2):
                await append(server, 30)
                await kill(server)
                end = await append(server, 30)
                await until(lambda end=end: seen.seqs and seen.seqs[-1] == end, what="caught up after the kill")
            await until(lambda: seen.confirmed[-1][0] == end)
            assert not task.done()
        assert list(range(1, end + 1)) == seen.seqs


async def test_projection_of_another_log_is_thrown_away(server: EmbeddedServer) -> None:
    await append(server)
    seen = Seen()
    seen.created, seen.seqs = "2020-01-01T00:00:00Z", [1]
    async with connected(server, "projector") as nc:
        await base.run(nc, seen, (LEDGER,), until_caught_up=True)
    assert (seen.resets, seen.seqs[0]) == (1, 1)


async def test_projection_that_is_further_than_its_log_is_thrown_away(server: EmbeddedServer) -> None:
    """A backup was restored. What is appended now would be taken for seen."""
    end = await append(server)
    seen = Seen()
    seen.seqs = [end + 1]
    async with connected(server, "projector") as nc:
        await base.run(nc, seen, (LEDGER,), until_caught_up=True)
    assert (seen.resets, list(range(1, end + 1))) == (1, seen.seqs)


@pytest.mark.parametrize("more", [0, 30], ids=["shorter", "longer"])
async def test_log_that_is_replaced_under_a_running_projector_is_noticed(tmp_path: Path, more: int) -> None:
    """The new one is shorter than the old, or already longer: nothing of it may be taken for seen."""
    async with server_with_streams(tmp_path) as server, connected(server, "projector") as nc:
        end, seen = await append(server, 10), Seen()
        async with running(nc, seen) as task:
            await until(lambda: seen.confirmed and seen.confirmed[-1][0] == end)
            confirmed = len(seen.confirmed)
            async with connected(server, "admin") as admin:
                await admin.request("$JS.API.STREAM.DELETE.LEDGER", b"", timeout=5)
                config = streams.stream_configs(LIMITS)[LEDGER]
                made = await admin.request("$JS.API.STREAM.CREATE.LEDGER", json.dumps(config).encode(), timeout=5)
                assert b'"error"' not in made.data
            end = await append(server, 5 + more)
            assert isinstance(await end_of(task), LedgerUnavailable)
            assert len(seen.confirmed) <= confirmed + 1  # at most one whose question came before
        async with running(nc, seen):
            await until(lambda: seen.confirmed[-1][0] == end)
        assert (seen.resets, list(range(1, end + 1))) == (1, seen.seqs)


async def test_bytes_that_cannot_be_read_stop_it_and_nothing_is_confirmed(tmp_path: Path) -> None:
    """Skipping them could lose a revocation."""
    async with server_with_streams(tmp_path / "log") as server:
        end = await append(server, 3)
        async with connected(server) as nc:
            await nc.request("ledger.main.grant.x", b'{"type":"grant.exploded/1"}', timeout=5)
        await append(server, 3)
        writer = CurrentWriter(view_path(tmp_path))
        async with connected(server, "projector") as nc:
            for _ in range(2):
                async with running(nc, writer) as task:
                    assert isinstance(await end_of(task), UndecodableEvent)
        assert writer.position(LEDGER) <= end
        writer.close()
        reader = CurrentReader(view_path(tmp_path))
        assert reader.freshness().age_seconds == float("inf")
        reader.close()


async def test_failing_confirmation_ends_it(server: EmbeddedServer) -> None:
    """A projection that is fed and never confirmed again would be stale for ever, with nobody to notice."""
    await append(server)
    seen = Seen()

    def fail() -> None:
        raise OSError("no space left on device")

    seen.on_confirm = fail
    async with connected(server, "projector") as nc, running(nc, seen) as task:
        assert isinstance(await end_of(task), OSError)


async def test_failing_application_ends_it_and_it_can_go_on(server: EmbeddedServer) -> None:
    end, seen = await append(server, 10), Seen()

    def fail(batch: list[RawMessage]) -> None:
        raise LedgerUnavailable("missing")

    seen.on_apply = fail
    async with connected(server, "projector") as nc:
        async with running(nc, seen) as task:
            assert isinstance(await end_of(task), LedgerUnavailable)
        seen.on_apply = lambda _: None
        await base.run(nc, seen, (LEDGER,), until_caught_up=True)
    assert list(range(1, end + 1)) == seen.seqs


async def test_server_that_is_not_there_at_the_start_is_told(tmp_path: Path) -> None:
    async with server_with_streams(tmp_path) as server, connected(server, "projector") as nc:
        await server.stop()
        await until(lambda: not nc.is_connected)
        with pytest.raises(LedgerUnavailable):
            await base.run(nc, Seen(), (LEDGER,))
        await server.start()


async def test_view_is_fed_and_goes_stale_while_the_log_is_silent(tmp_path: Path) -> None:
    """End to end: what is appended shows in another process' reader, and its age says when nobody vouches for it."""
    path = view_path(tmp_path)
    async with server_with_streams(tmp_path / "log") as server, connected(server, "projector") as nc:
        writer = CurrentWriter(path, sync=False)
        with Remote("projections.current:CurrentReader", path) as reader:
            async with running(nc, writer):
                history = everything()
                async with connected(server) as service:
                    ledger = Ledger(service)
                    for recorded in history.recorded:
                        await ledger.append(Append(subject_of(recorded.event), recorded.event))
                    end = await ledger.last_seq()
                await until(lambda: reader.call("freshness").position == end)
                await until(lambda: reader.call("freshness").age_seconds < 5)
                with paused(server):
                    await until(lambda: reader.call("freshness").age_seconds > 1)
                await until(lambda: reader.call("freshness").age_seconds < 1)
        live = writer.dump()
        writer.close()
        again = CurrentWriter(view_path(tmp_path / "again"), sync=False)
        await base.run(nc, again, (LEDGER,), until_caught_up=True)
        assert live == again.dump()
        again.close()


async def test_restart_does_not_read_again_what_was_applied(server: EmbeddedServer, tmp_path: Path) -> None:
    await append(server, 50)
    path, read = view_path(tmp_path), Seen()
    async with connected(server, "projector") as nc:
        await base.run(nc, read, (LEDGER,), until_caught_up=True)
        writer = CurrentWriter(path, sync=False)
        await base.run(nc, writer, (LEDGER,), until_caught_up=True)
        writer.close()
        async with connected(server) as service:
            [end] = await Ledger(service).append(first(unique()))
        batches: list[list[RawMessage]] = []

        class Noting(CurrentWriter):
            def apply(self, stream: str, batch: list[RawMessage]) -> None:
                batches.append(batch)
                super().apply(stream, batch)

        again = Noting(path, sync=False)
        await base.run(nc, again, (LEDGER,), until_caught_up=True)
        again.close()
    assert [[end]] == [[message.seq for message in batch] for batch in batches if batch]


async def test_run_that_has_caught_up_always_ends(server: EmbeddedServer, tmp_path: Path) -> None:
    """Its end may meet the answer to a question about the stream's end, which must not keep it alive."""
    await append(server, 1)
    read = Seen()
    async with connected(server, "projector") as nc:
        await base.run(nc, read, (LEDGER,), until_caught_up=True)
        async with asyncio.timeout(60):
            for _ in range(300):
                await base.run(nc, read, (LEDGER,), until_caught_up=True)


async def test_long_stream_waits_at_the_server_for_who_takes_it(tmp_path: Path) -> None:
    """Not in the memory of the follower."""
    size, count = 800_000, 150
    async with (
        server_with_streams(tmp_path) as server,
        connected(server) as service,
        connected(server, "projector") as nc,
    ):
        for _ in range(count):
            await service.jetstream().publish("usage.main.w", bytes(size))
        before = nc.stats["in_bytes"]
        async with contextlib.aclosing(streams.follow(nc, streams.USAGE, 0)) as batches:
            seen = [message.seq for message in await anext(batches)]
            # Heartbeats of the stalled consumer must not let more of it come.
            heartbeats = 0
            while heartbeats < 3:
                known = dict(nc.stats)
                await until(lambda known=known: nc.stats["in_msgs"] > known["in_msgs"])
                heartbeats += nc.stats["in_bytes"] - known["in_bytes"] < size
                assert nc.stats["in_bytes"] - before < 80 * 1024**2
            while len(seen) < count:
                seen += [message.seq for message in await anext(batches)]
    assert list(range(1, count + 1)) == seen
