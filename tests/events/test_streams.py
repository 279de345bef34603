"""Streams: made as they must be, refused when they are not, naming what is wrong; followed whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec.structs import replace

from events import streams
from events.errors import LedgerUnavailable, UnsafeServer
from events.ledger import Ledger
from events.server import EmbeddedServer
from events.streams import LEDGER, USAGE, Connection, StreamLimits, stream_configs
from events.types import TokenUsed
from events.usage import UsageLog
from tests.logs import LIMITS, connected, first, server_with_streams, unique
from tests.running import free_port

HOUR_NS = 3600 * 1_000_000_000


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    async with server_with_streams(tmp_path_factory.mktemp("streams")) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="session")
async def admin(server: EmbeddedServer) -> AsyncIterator[Connection]:
    """Whatever a test did to the streams, the next finds them as they should be."""
    async with connected(server, "admin") as nc:
        yield nc
        for name, config in stream_configs(LIMITS).items():
            found = await ask(nc, f"$JS.API.STREAM.INFO.{name}")
            if "error" in found or streams._differences(found["config"], config):
                await remake(nc, name, {})


async def ask(nc: Connection, subject: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((await nc.request(subject, json.dumps(body or {}).encode(), timeout=10)).data)
    return answer


async def remake(nc: Connection, name: str, changes: dict[str, Any]) -> None:
    """The stream anew, with another configuration."""
    await ask(nc, f"$JS.API.STREAM.DELETE.{name}")
    made = await ask(nc, f"$JS.API.STREAM.CREATE.{name}", stream_configs(LIMITS)[name] | changes)
    assert "error" not in made, made


async def config_of(nc: Connection, name: str) -> dict[str, Any]:
    found: dict[str, Any] = (await ask(nc, f"$JS.API.STREAM.INFO.{name}"))["config"]
    return found


# What is safe


@pytest.mark.parametrize("role", ["admin", "service", "projector"])
async def test_provisioned_streams_are_safe_for_every_role(server: EmbeddedServer, role: str) -> None:
    async with connected(server, role) as nc:
        await streams.check(nc, LIMITS)


async def test_provision_again_changes_nothing(admin: Connection) -> None:
    before = [await ask(admin, f"$JS.API.STREAM.INFO.{name}") for name in stream_configs(LIMITS)]
    await streams.provision(admin, LIMITS)
    after = [await ask(admin, f"$JS.API.STREAM.INFO.{name}") for name in stream_configs(LIMITS)]
    assert [(info["created"], info["config"]) for info in before] == [
        (info["created"], info["config"]) for info in after
    ]


async def test_log_has_no_age_and_refuses_to_forget() -> None:
    """DESIGN "The ledger"."""
    ledger = stream_configs(LIMITS)[LEDGER]
    wanted = {"storage": "file", "discard": "new", "max_age": 0, "max_msgs": -1, "max_msgs_per_subject": -1}
    wanted |= {"deny_delete": True, "deny_purge": True, "allow_atomic": True, "allow_direct": True}
    assert wanted == {key: ledger[key] for key in wanted}
    assert "allow_msg_ttl" not in ledger


# What is not

UNSAFE: dict[str, tuple[str, dict[str, Any]]] = {
    "LEDGER max_msgs_per_subject": (LEDGER, {"max_msgs_per_subject": 1}),
    "LEDGER max_msgs": (LEDGER, {"max_msgs": 1_000_000}),
    "LEDGER max_age": (LEDGER, {"max_age": HOUR_NS}),
    "LEDGER max_bytes": (LEDGER, {"max_bytes": 1024**3}),
    "LEDGER max_msg_size": (LEDGER, {"max_msg_size": 1024}),
    "LEDGER discard": (LEDGER, {"discard": "old"}),
    "LEDGER storage": (LEDGER, {"storage": "memory"}),
    "LEDGER retention": (LEDGER, {"retention": "interest", "discard": "old"}),
    "LEDGER subjects": (LEDGER, {"subjects": ["ledger.>", "more.>"]}),
    "LEDGER deny_delete": (LEDGER, {"deny_delete": False}),
    "LEDGER deny_purge": (LEDGER, {"deny_purge": False}),
    "LEDGER allow_rollup_hdrs": (LEDGER, {"deny_purge": False, "allow_rollup_hdrs": True}),
    "LEDGER allow_msg_ttl": (LEDGER, {"allow_msg_ttl": True}),
    "LEDGER allow_direct": (LEDGER, {"allow_direct": False}),
    "LEDGER allow_atomic": (LEDGER, {"allow_atomic": False}),
    "LEDGER duplicate_window": (LEDGER, {"duplicate_window": 1_000_000_000}),
    "LEDGER compression": (LEDGER, {"compression": "s2"}),
    "LEDGER no_ack": (LEDGER, {"no_ack": True, "allow_atomic": False}),
    "LEDGER republish": (LEDGER, {"republish": {"src": "ledger.>", "dest": "copy.>"}}),
    "LEDGER subject_transform": (LEDGER, {"subject_transform": {"src": "ledger.>", "dest": "ledger.x.>"}}),
    "LEDGER max_consumers": (LEDGER, {"max_consumers": 1}),
    "LEDGER metadata": (LEDGER, {"metadata": {"who": "me"}}),
    "USAGE max_age": (USAGE, {"max_age": HOUR_NS}),
    "USAGE discard": (USAGE, {"discard": "new"}),
    "USAGE deny_purge": (USAGE, {"deny_purge": False}),
    "REVOCATIONS max_msgs_per_subject": (streams.REVOCATIONS, {"max_msgs_per_subject": 1}),
    "KV_subject_keys max_msgs_per_subject": ("KV_subject_keys", {"max_msgs_per_subject": 5}),
    "KV_subject_keys max_age": ("KV_subject_keys", {"max_age": HOUR_NS, "duplicate_window": 1_000_000_000}),
    "KV_signing_keys storage": ("KV_signing_keys", {"storage": "memory"}),
    "KV_answers max_age": ("KV_answers", {"max_age": 0}),
    "KV_pushed max_age": ("KV_pushed", {"max_age": 0}),
}


@pytest.mark.parametrize(("name", "changes"), UNSAFE.values(), ids=UNSAFE.keys())
async def test_changed_stream_is_refused_naming_every_setting(
    admin: Connection, name: str, changes: dict[str, Any]
) -> None:
    await remake(admin, name, changes)
    with pytest.raises(UnsafeServer) as caught:
        await streams.check(admin, LIMITS)
    lines = [line for line in str(caught.value).split("; ") if line.startswith(f"stream {name}: ")]
    assert changes.keys() <= {line.removeprefix(f"stream {name}: ").split(" ")[0] for line in lines}
    assert len(lines) == len(str(caught.value).split("; "))
    assert caught.value.fix


async def test_change_that_erases_is_refused_after_an_update_too(admin: Connection) -> None:
    """FACTS §1: `deny_delete` stops no update."""
    changed = stream_configs(LIMITS)[LEDGER] | {"max_msgs_per_subject": 1}
    assert "error" not in await ask(admin, "$JS.API.STREAM.UPDATE.LEDGER", changed)
    with pytest.raises(UnsafeServer, match="LEDGER: max_msgs_per_subject is 1 and must be -1"):
        await streams.check(admin, LIMITS)


async def test_missing_stream_is_refused(admin: Connection) -> None:
    await ask(admin, "$JS.API.STREAM.DELETE.USAGE")
    with pytest.raises(UnsafeServer, match="USAGE"):
        await streams.check(admin, LIMITS)


async def test_fewer_replicas_than_wanted_are_refused(admin: Connection) -> None:
    with pytest.raises(UnsafeServer, match="num_replicas is 1 and must be 3"):
        await streams.check(admin, replace(LIMITS, replicas=3))


async def test_provision_adapts_what_an_operator_may_choose(admin: Connection) -> None:
    wanted = StreamLimits(
        usage_age_seconds_max=7200,
        usage_bytes_max=1024**3,
        ledger_bytes_max=8 * 1024**3,
        answers_ttl_seconds=90,
    )
    await streams.provision(admin, wanted)
    await streams.check(admin, wanted)
    assert (await config_of(admin, USAGE))["max_age"] == 2 * HOUR_NS
    with pytest.raises(UnsafeServer, match="max_bytes"):
        await streams.check(admin, LIMITS)


@pytest.mark.parametrize("key", ["LEDGER max_msgs_per_subject", "LEDGER deny_delete", "USAGE discard"])
async def test_provision_mends_nothing_that_somebody_else_changed(admin: Connection, key: str) -> None:
    """Whoever did it should be asked, and may have erased events already."""
    name, changes = UNSAFE[key]
    await remake(admin, name, changes)
    before = await config_of(admin, name)
    with pytest.raises(UnsafeServer):
        await streams.provision(admin, LIMITS)
    assert before == await config_of(admin, name)


# The server


async def changed_server(directory: Path, change: str) -> EmbeddedServer:
    server = EmbeddedServer(directory, 0)
    server.prepare()
    config = json.loads(server.config_file.read_text())
    if change == "sync":
        del config["jetstream"]["sync_interval"]
    elif change == "interval":
        config["jetstream"]["sync_interval"] = "1s"
    else:
        del config["accounts"]["MAIN"]["imports"]
    server.config_file.write_text(json.dumps(config))
    await server.start()
    return server


@pytest.mark.parametrize("change", ["sync", "interval", "import"])
async def test_server_that_may_acknowledge_before_it_syncs_is_refused(tmp_path: Path, change: str) -> None:
    server = await changed_server(tmp_path, change)
    try:
        async with connected(server, "admin") as nc:
            for refuse in (streams.check(nc, LIMITS), streams.provision(nc, LIMITS)):
                with pytest.raises(UnsafeServer, match=r"sync_interval.*always"):
                    await refuse
            assert (await ask(nc, "$JS.API.STREAM.INFO.LEDGER"))["error"]["err_code"] == 10059  # nothing was made
    finally:
        await server.stop()


@pytest.mark.parametrize(
    ("version", "is_taken"), [("2.14.9", False), ("2.15.0", True), ("2.15.0-beta.1", True), ("2.9.25", False)]
)
async def test_old_server_is_refused(server: EmbeddedServer, version: str, *, is_taken: bool) -> None:
    async with connected(server) as nc:
        nc._server_info["version"] = version  # a real older server is not at hand
        with contextlib.nullcontext() if is_taken else pytest.raises(UnsafeServer, match=f"{version} is too old"):
            await streams.check_server(nc)


async def test_server_that_is_not_there_is_unavailable_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(LedgerUnavailable, match="cannot reach"):
        await streams.connect(f"nats://127.0.0.1:{free_port()}", None, name="test", seconds_max=0.5)
    assert time.monotonic() - began < 5


async def test_connection_closes_whether_the_server_is_there_or_not(tmp_path: Path) -> None:
    async with server_with_streams(tmp_path) as server:
        nc = await streams.connect(server.url, server.creds("service"), name="test")
        await server.stop()
        ledger = Ledger(nc)
        with contextlib.suppress(LedgerUnavailable):
            await ledger.read(unique())
        await asyncio.wait_for(nc.close(), 5)
        assert nc.is_closed
        await server.start()


# Follow


async def test_follow_of_a_stream_that_forgot_begins_at_what_is_left(tmp_path: Path) -> None:
    """USAGE drops the oldest blocks; a follower that was away meanwhile goes on."""
    async with server_with_streams(tmp_path, StreamLimits(usage_bytes_max=200_000)) as server:
        async with connected(server) as nc:
            log = UsageLog(nc, "w")
            for number in range(100):
                future = log.record(TokenUsed(number, None, None, "valid", "api", "x" * 10_000))
                assert future is not None
                await future
        async with connected(server, "projector") as nc:
            state = await streams.stream_state(nc, USAGE)
            assert 1 < state["first_seq"] < state["last_seq"] == 100
            seen: list[int] = []
            async with contextlib.aclosing(streams.follow(nc, USAGE, 3, batch_max=5)) as batches:
                async for batch in batches:
                    assert len(batch) <= 5
                    seen += [message.seq for message in batch]
                    if seen and seen[-1] == 100:
                        break
            assert list(range(state["first_seq"], 101)) == seen


async def test_follower_that_takes_long_holds_bounded_bytes_and_misses_nothing(tmp_path: Path) -> None:
    """Sixty blocks of nearly a megabyte, and a reader that takes one at a time."""
    async with server_with_streams(tmp_path) as server:
        async with connected(server) as nc:
            log = UsageLog(nc, "w")
            for number in range(60):
                future = log.record(TokenUsed(number, None, None, "valid", "api", "x" * 800_000))
                assert future is not None
                await future
        async with connected(server, "projector") as nc:
            seen: list[int] = []
            async with contextlib.aclosing(streams.follow(nc, USAGE, 0, batch_max=1)) as batches:
                async for batch in batches:
                    seen += [message.seq for message in batch]
                    if seen and seen[-1] == 60:
                        break
            assert list(range(1, 61)) == seen


async def test_stream_keeps_its_time_of_creation_over_restarts(tmp_path: Path) -> None:
    """By it a projection knows whether it belongs to this log."""
    async with server_with_streams(tmp_path) as server:
        async with connected(server) as nc:
            await Ledger(nc).append(first(unique()))
            before = await streams.stream_state(nc, LEDGER)
        await server.stop()
        await server.start()
        async with connected(server) as nc:
            after = await streams.stream_state(nc, LEDGER)
        assert (before["created"], before["last_seq"]) == (after["created"], after["last_seq"])
