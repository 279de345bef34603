"""What tests share: a running service, a running nats-server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

pytest.register_assert_rewrite("tests.running", "tests.leaks", "tests.attacks", "tests.faults.load")

from tests import leaks, running  # noqa: E402 - once they are registered

if TYPE_CHECKING:
    from events.server import EmbeddedServer


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[running.Service]:
    """One `token-ledger up` for the whole session: two workers, defaults. Tests leave it as it was.

    It may call receivers of webhooks at one address of this machine, which the tests' listen at; no other.
    """
    started = running.start(
        tmp_path_factory.mktemp("service"), webhook_allowed_networks=f"{running.RECEIVERS_ADDRESS}/32"
    )
    try:
        yield started
    finally:
        started.stop()
    # Whatever the tests planted, and whatever they forgot that they planted.
    assert leaks.search_service(started) == []


@pytest.fixture(scope="session")
def service_with(tmp_path_factory: pytest.TempPathFactory) -> Iterator[running.StartService]:
    """Services with other settings, `service_with(use_recording="buffered")`: one for each set of them."""
    started: dict[tuple[tuple[str, Any], ...], running.Service] = {}

    def get(**settings: Any) -> running.Service:
        key = tuple(sorted(settings.items()))
        if key not in started:
            started[key] = running.start(tmp_path_factory.mktemp("service"), **settings)
        return started[key]

    try:
        yield get
    finally:
        failures = []
        for one in started.values():
            try:
                one.stop()
            except AssertionError as failure:
                failures.append(failure)
        if failures:
            raise failures[0]


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[running.StartService]:
    """Services that a test may break: stopped at the end of the test, if it did not stop them itself."""
    started: list[running.Service] = []

    def get(**settings: Any) -> running.Service:
        directory = settings.pop("directory", tmp_path / f"service-{len(started)}")
        started.append(running.start(directory, **settings))
        return started[-1]

    yield get
    for one in started:
        if one.process.returncode is None:
            one.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nats_server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    """A real nats-server with the service's own configuration, on a free port, without streams."""
    from events.server import EmbeddedServer  # noqa: PLC0415 - tests of pure rules start no server

    server = EmbeddedServer(tmp_path_factory.mktemp("nats"), running.free_port())
    server.prepare()
    await server.start()
    try:
        await server.wait_ready()
        yield server
    finally:
        await server.stop()
