"""A worker of the running service, in the test's own process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import NamedTuple

import pytest_asyncio

from events.ledger import Append
from events.types import Kind, MintedToken, TokenIssued
from projections.current import KEPT_AFTER_EXPIRY
from projections.grants import facts
from service.caller import Caller
from service.commands import subject
from service.runtime import Runtime
from service.settings import Settings
from service.tokens import mint_kind, new_id, now, sha256, uuid7_hex
from tests.running import Service, until


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


class LongExpired(NamedTuple):
    token_id: str
    grant_id: str
    seq: int


@pytest_asyncio.fixture
async def long_expired(service: Service, runtime: Runtime) -> LongExpired:
    """A token that the view has let go. Its event is real; it only happened long ago by the clock of its host."""
    issued_at = now() - KEPT_AFTER_EXPIRY - timedelta(days=30)
    minted = MintedToken(
        token_id=new_id("tok"),
        sha256=sha256(mint_kind(Kind.PAT)).hex(),
        kind=Kind.PAT,
        scope="a",
        audience=(),
        expires_at=issued_at + timedelta(days=1),
    )
    event = TokenIssued(
        id=uuid7_hex(),
        occurred_at=issued_at,
        by="system",
        grant_id=new_id("grt"),
        subject=service.user()["user_id"],
        client_id=None,
        scope="a",
        audience=(),
        tokens=(minted,),
    )
    (seq,) = await runtime.ledger.append(Append(subject("grant", event.grant_id), event, 0))
    await runtime.applied(seq)
    until(lambda: runtime.view.hit(minted.token_id) is None, what="the view has let it go")
    return LongExpired(minted.token_id, event.grant_id, seq)
