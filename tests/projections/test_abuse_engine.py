"""The engine behind a real store and a real log: what it appends, once, whatever is killed when. Issue item 4."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from events import codec
from events.ledger import Append, Ledger
from events.server import EmbeddedServer
from events.streams import LEDGER, USAGE, Connection, stream_state
from events.types import AbuseDetected, Kind, LedgerEvent, TokenUsed, UseBlock
from projections import analytics, base
from projections.abuse.engine import STATE_FILE, Engine, load_state, pause_seconds
from projections.abuse.rules import configured
from tests.abusing import block
from tests.logs import connected, server_with_streams, until
from tests.making import grt, issued, minted, subject_of, tok, usr
from tests.running import ROOT

THEN = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=3)
MANY_SCOPES = 6


def use(number: int, at: datetime, *, outcome: str = "valid", scope: str = "") -> TokenUsed:
    micros = int(at.timestamp()) * 1_000_000 + at.microsecond
    return TokenUsed(micros, tok(number), None, outcome, "validate", "", scope)


def probing(number: int, at: datetime) -> UseBlock:
    """One incident of the rule scope_probing."""
    refused = [
        use(number, at + timedelta(seconds=step), outcome="insufficient_scope", scope=f"admin:{step}")
        for step in range(MANY_SCOPES)
    ]
    return block(refused)


async def append(nc: Connection, *events: LedgerEvent) -> None:
    await Ledger(nc).append(*(Append(subject_of(event), event) for event in events))


async def publish(nc: Connection, *blocks: UseBlock) -> None:
    for one in blocks:
        await nc.jetstream().publish("usage.main.w", codec.encode_block(one))


async def last_seq(nc: Connection) -> int:
    return int((await stream_state(nc, LEDGER))["last_seq"])


async def findings(nc: Connection) -> list[AbuseDetected]:
    """All that stand in LEDGER."""
    ledger = Ledger(nc)
    events = [await ledger.get(seq) for seq in range(1, await last_seq(nc) + 1)]
    return [one.event for one in events if one is not None and isinstance(one.event, AbuseDetected)]


@contextlib.asynccontextmanager
async def running(server: EmbeddedServer, directory: Path, *changes: str) -> AsyncIterator[Engine]:
    """The analytics process's work, in this one."""
    store = analytics.open_analytics(directory, commit_seconds=0.01)
    async with connected(server, "projector") as nc, connected(server, "projector") as writing:
        engine = Engine(writing, store, configured(changes).values(), idle_seconds=0.02)
        tasks = [asyncio.create_task(base.run(nc, store, analytics.STREAMS)), asyncio.create_task(engine.run())]
        try:
            await until(lambda: engine.state is not None, what="the engine has begun")
            yield engine
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            store.close()


async def looked_at_all(nc: Connection, engine: Engine) -> None:
    """Until the rules have seen the end of both streams as of now."""
    ends = {stream: int((await stream_state(nc, stream))["last_seq"]) for stream in (USAGE, LEDGER)}
    await until(
        lambda: engine.state is not None and engine.state.usage >= ends[USAGE] and engine.state.ledger >= ends[LEDGER],
        what=f"the rules looked at {ends}",
    )


async def test_finding_is_appended_once_with_what_it_rests_on(tmp_path: Path) -> None:
    async with server_with_streams(tmp_path / "log") as server, connected(server) as nc:
        async with running(server, tmp_path / "store", "scope_probing.mode=notify") as engine:
            await append(nc, issued(grt(1), minted(tok(1), Kind.PAT), subject=usr(1), client_id=None))
            await publish(nc, block([use(1, THEN)]), probing(1, THEN + timedelta(hours=1)))
            await looked_at_all(nc, engine)
            # The incident goes on, and ends; a day later there is another one.
            await publish(nc, probing(1, THEN + timedelta(hours=2)), probing(1, THEN + timedelta(hours=40)))
            await looked_at_all(nc, engine)
            [first, second] = await findings(nc)
        assert (first.rule, first.mode, first.rule_version) == ("scope_probing", "notify", 1)
        assert (first.token_id, first.grant_id, first.subject, first.client_id) == (tok(1), grt(1), usr(1), None)
        assert first.first_at == THEN + timedelta(hours=1)
        assert first.detected_at == THEN + timedelta(hours=1, seconds=3)
        assert [(one.source, one.seq, one.index) for one in first.evidence] == [("use", 2, step) for step in range(4)]
        assert second.first_at == THEN + timedelta(hours=40)


async def test_engine_begins_where_it_had_got_to_and_a_rebuilt_store_runs_no_rule(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    async with server_with_streams(tmp_path / "log") as server, connected(server) as nc:
        async with running(server, directory) as engine:
            await append(nc, issued(grt(1), minted(tok(1), Kind.PAT), subject=usr(1), client_id=None))
            await publish(nc, probing(1, THEN))
            await looked_at_all(nc, engine)
        before = await findings(nc)
        assert len(before) == 1
        for file in directory.glob("analytics-*.duckdb"):
            file.unlink()
        # What came while nothing ran is looked at; the rest is not looked at again, although the rules changed.
        await publish(nc, probing(1, THEN + timedelta(hours=1)), probing(1, THEN + timedelta(hours=30)))
        async with running(server, directory, "scope_probing.scopes=3") as engine:
            await looked_at_all(nc, engine)
        after = await findings(nc)
        assert [one.first_at for one in after] == [THEN, THEN + timedelta(hours=30)]
        assert after[0] == before[0]


async def test_first_start_begins_at_the_end_of_the_log(tmp_path: Path) -> None:
    async with server_with_streams(tmp_path / "log") as server, connected(server) as nc:
        await append(nc, issued(grt(1), minted(tok(1), Kind.PAT), subject=usr(1), client_id=None))
        await publish(nc, probing(1, THEN))
        async with running(server, tmp_path / "store") as engine:
            await looked_at_all(nc, engine)
        assert await findings(nc) == []
        state = load_state(tmp_path / "store")
        assert state is not None
        assert (state.usage, state.ledger) == (1, 1)


async def test_state_that_cannot_be_read_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(b"{")
    assert load_state(tmp_path) is None


@pytest.mark.slow
async def test_killed_at_any_moment_loses_and_doubles_no_finding(tmp_path: Path) -> None:
    """As many incidents as tokens; the process that looks for them is killed again and again meanwhile."""
    tokens, kills = 40, 8
    async with server_with_streams(tmp_path / "log") as server, connected(server) as nc:
        for number in range(1, tokens + 1):
            await append(nc, issued(grt(number), minted(tok(number), Kind.PAT), subject=usr(number), client_id=None))
        async with running(server, tmp_path / "store") as engine:
            await looked_at_all(nc, engine)
        command = [sys.executable, "-m", "tests.abuse_process", server.url, str(server.creds("projector"))]
        command.append(str(tmp_path / "store"))
        number = 0
        for kill in range(kills):
            process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
            assert process.stdout is not None
            await process.stdout.readline()  # it looks
            have = await last_seq(nc)
            for _ in range(tokens // kills):
                number += 1
                await publish(nc, probing(number, THEN + timedelta(minutes=number)))
            # Before it is seen or found, or once the first is appended, and perhaps noted.
            if kill % 2:
                async with asyncio.timeout(30):
                    while await last_seq(nc) == have:  # noqa: ASYNC110 - others append
                        await asyncio.sleep(0.001)
            os.kill(process.pid, signal.SIGKILL)
            await process.wait()
        async with running(server, tmp_path / "store") as engine:
            await looked_at_all(nc, engine)
        got = [one.token_id for one in await findings(nc)]
        assert sorted(got) == [tok(number) for number in range(1, tokens + 1)]


def test_engine_leaves_the_cores_to_a_store_that_is_far_behind_but_never_stops() -> None:
    """A quarter of a core at most, and a twentieth meanwhile."""
    assert (pause_seconds(1.0, far_behind=False), pause_seconds(1.0, far_behind=True)) == (3.0, 19.0)
