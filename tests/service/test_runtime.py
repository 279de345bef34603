"""The state of one API worker: how it starts, waits, limits and stops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path

import pytest

from events import streams
from events.errors import Conflict, LedgerUnavailable, UnsafeServer
from events.server import EmbeddedServer
from events.streams import LEDGER, Connection
from projections.current import CurrentReader, Freshness, view_path
from service.errors import InvalidClient, TooManyRequests, Unavailable
from service.keys import MasterKeyMismatch
from service.oauth.forms import Form, authenticate_client
from service.runtime import RateLimiter, Runtime, ViewWaiter
from service.settings import Settings
from service.streams import stream_limits
from tests.hosts import Host, asking, host, settings_of
from tests.logs import connected, paused, server_with_streams, until
from tests.making import cli, everything
from tests.other_process import Remote


async def connections(server: EmbeddedServer) -> int:
    """How many clients the server has, by its own account; the one that asks among them."""
    async with connected(server, "admin") as nc:
        [report] = await streams.server_reports(nc)
        return int(report["connections"])


# Start


async def test_start_that_fails_leaves_nothing_open_and_the_next_succeeds(tmp_path: Path) -> None:
    """A worker tries again and again until the log can be used: what it left open each time would pile up."""
    server = EmbeddedServer(tmp_path / "log", 0)
    await server.start()
    settings = settings_of(server, tmp_path)
    try:
        for _ in range(3):
            with pytest.raises(UnsafeServer):  # there is no stream yet
                await Runtime.start(settings)
        async with connected(server, "admin") as admin:
            await streams.provision(admin, stream_limits(settings))
        assert await connections(server) == 1
        runtime = await Runtime.start(settings)
        assert await connections(server) == 2
        await runtime.stop()
        assert await connections(server) == 1
    finally:
        await server.stop()


async def test_start_that_fails_behind_the_view_does_too(tmp_path: Path) -> None:
    """LMDB opens a file only once in a process."""
    async with host(tmp_path) as one:
        settings = one.runtime.settings
        await one.runtime.stop()
        (tmp_path / "master.key").rename(tmp_path / "kept")
        for _ in range(2):
            with pytest.raises(MasterKeyMismatch):
                await Runtime.start(settings)
        (tmp_path / "kept").replace(tmp_path / "master.key")
        one.runtime = await Runtime.start(settings)
        assert await connections(one.server) == 2
        await one.runtime.stop()


async def test_key_that_another_worker_has_activated_is_not_activated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers make the first key together, and one may be through before another has read what it made."""
    async with host(tmp_path) as one:
        keys = one.runtime.signing_keys
        active = keys.active("EdDSA")
        assert active is not None

        async def found(*_: object, **__: object) -> object:
            return active

        monkeypatch.setattr(keys, "_introduce", found)
        before = await one.runtime.ledger.read(f"ledger.main.key.{active.kid}")
        with pytest.raises(Conflict):
            await keys.rotate("EdDSA", by="system")
        assert before == await one.runtime.ledger.read(f"ledger.main.key.{active.kid}")


async def test_start_without_a_server_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable):
        await Runtime.start(Settings(data_dir=tmp_path))


# Waiting for the view


@pytest.fixture
def view(tmp_path: Path) -> object:
    with Remote("projections.current:CurrentWriter", view_path(tmp_path), sync=False) as writer:
        reader = CurrentReader(view_path(tmp_path))
        yield writer, reader
        reader.close()


async def test_waiters_are_told_when_their_own_sequence_is_applied(view: tuple[Remote, CurrentReader]) -> None:
    writer, reader = view
    waiter, messages = ViewWaiter(reader), everything().raw()
    first = [asyncio.create_task(waiter.applied(5, 30)) for _ in range(20)]
    second = asyncio.create_task(waiter.applied(6, 30))
    late = asyncio.create_task(waiter.applied(7, 0.05))
    gone = asyncio.create_task(waiter.applied(5, 30))
    await asyncio.sleep(0)
    gone.cancel()
    writer.call("apply", LEDGER, messages[:5])
    assert await asyncio.gather(*first) == [True] * 20
    assert not second.done()
    assert await late is False
    writer.call("apply", LEDGER, messages[5:6])
    assert await second is True
    assert await waiter.applied(6, 0) is True


async def test_nobody_who_waits_is_nobody_who_polls(view: tuple[Remote, CurrentReader]) -> None:
    _, reader = view
    waiter = ViewWaiter(reader)
    assert await waiter.applied(1, 0.01) is False
    await until(lambda: waiter._task is not None and waiter._task.done())


# Nothing from a stale view


async def test_client_is_not_authenticated_from_a_stale_view(tmp_path: Path) -> None:
    """It may have been disabled meanwhile, or its secret replaced."""
    async with host(tmp_path) as one:
        form = Form([("client_id", cli(1)), ("client_secret", "x")])
        with pytest.raises(InvalidClient):
            await authenticate_client(one.runtime, asking(), form, public=False)
        await one.project(seconds_ago=one.runtime.settings.view_staleness_seconds_max + 1)
        with pytest.raises(Unavailable):
            await authenticate_client(one.runtime, asking(), form, public=False)


async def test_freshness_has_a_bound(tmp_path: Path) -> None:
    async with host(tmp_path, view_staleness_seconds_max=7) as one:
        one.runtime.check_fresh(Freshness(1, 7.0))
        for age in (7.1, float("inf")):
            with pytest.raises(Unavailable) as caught:
                one.runtime.check_fresh(Freshness(1, age))
            assert caught.value.headers["Retry-After"] == "1"


# Signing keys keep themselves


async def test_signing_keys_are_made_though_the_view_comes_late(tmp_path: Path) -> None:
    """The API starts first, and for a while nothing that it waits for comes."""
    limits = stream_limits(Settings(data_dir=tmp_path))
    async with server_with_streams(tmp_path / "log", limits) as server:
        runtime = await Runtime.start(settings_of(server, tmp_path))
        try:
            async with connected(server) as nc:
                await asyncio.wait_for(_first_event(nc), 20)  # the key is announced, and the view does not show it
            await until(lambda: len(_waits(runtime)) > 0, what="it waits for the view")
            await until(lambda: len(_waits(runtime)) == 0, what="it has given up once")
            with Remote("projections.current:CurrentWriter", view_path(tmp_path), sync=False) as writer:
                one = Host(server, runtime, writer)
                await one.settle()
                keys = runtime.signing_keys
                assert [key["kid"] for key in keys.jwks()["keys"]] == [
                    keys.active("EdDSA").kid,
                    keys.active("RS256", "id").kid,
                ]
        finally:
            await runtime.stop()


def _waits(runtime: Runtime) -> list[object]:
    return list(runtime.waiter._waiting)


async def _first_event(nc: Connection) -> None:
    async with contextlib.aclosing(streams.follow(nc, LEDGER, 0)) as batches:
        async for batch in batches:
            if batch:
                return


async def test_rotated_key_signs_and_the_old_one_stays_to_be_verified_by(tmp_path: Path) -> None:
    async with host(tmp_path) as one:
        rows = one.runtime.signing_keys.rows()
        assert [(row.purpose, row.alg, row.state) for row in rows] == [
            ("access", "EdDSA", "active"),
            ("id", "RS256", "active"),
        ]
        rotation = await one.projecting(one.runtime.signing_keys.rotate("EdDSA", by="tok"))
        states = {row.kid: row.state for row in one.runtime.signing_keys.rows()}
        assert states == {rows[0].kid: "retired", rotation.kid: "active", rows[1].kid: "active"}
        public = json.dumps(one.runtime.signing_keys.jwks())
        assert '"d"' not in public
        assert len(one.runtime.signing_keys.jwks()["keys"]) == 3


# Stop


async def test_stop_is_bounded_while_the_log_is_silent(tmp_path: Path) -> None:
    async with host(tmp_path) as one:
        one.runtime.usage.count_refused(caller="", ip=None, outcome="unknown", endpoint="api")
        began = time.monotonic()
        with paused(one.server):
            await one.runtime.stop()
        assert time.monotonic() - began < 9
        one.runtime = await Runtime.start(one.runtime.settings)
        await one.runtime.stop()


# Limits


def test_limit_counts_by_key_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.runtime._LIMITER_KEYS_MAX", 3)
    limiter = RateLimiter(2)
    for _ in range(2):
        limiter.check("a", "1")
        limiter.count("a", "1")
    with pytest.raises(TooManyRequests) as caught:
        limiter.check("a", "1")
    assert 0 < int(caught.value.headers["Retry-After"]) <= 60
    limiter.check("a", "2")
    limiter.check("a")
    for number in range(3):
        limiter.count("b", str(number))
    limiter.check("a", "1")
    assert len(limiter._counts) == 3
