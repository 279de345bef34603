"""A worker of the running service, in the test's own process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest_asyncio

from projections.grants import facts
from service.caller import Caller
from service.runtime import Runtime
from service.settings import Settings
from service.tokens import sha256
from tests.running import Service


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def runtime(service: Service) -> AsyncIterator[Runtime]:
    """Its view is the service's, kept by the service's own projector; a process may open that only once."""
    nats_url = json.loads((service.data_dir / "bootstrap.json").read_text())["nats_url"]
    settings = Settings(
        port=service.port,
        data_dir=service.data_dir,
        nats_url=nats_url,
        nats_creds=service.data_dir / "nats" / "service.nk",
    )
    started = await Runtime.start(settings)
    try:
        yield started
    finally:
        await started.stop()


@pytest_asyncio.fixture
async def admin(runtime: Runtime, service: Service) -> Caller:
    """The administrator, as if authenticated."""
    hit, _ = runtime.view.look_up(sha256(service.admin_token))
    assert hit is not None
    owner = facts(hit.grant)
    assert owner is not None
    return Caller(service.admin_token, hit.token_id, owner.subject, None, frozenset({"ledger:admin"}))
