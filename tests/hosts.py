"""A host in the hands of a test: a real log, the state of one API worker, and a view that goes on only when told."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from events.ledger import Append
from events.server import EmbeddedServer
from events.streams import LEDGER
from events.types import Kind, LedgerEvent, MintedToken, TokenIssued
from projections.base import boot_time_ns
from projections.current import view_path
from service.incoming import Incoming
from service.runtime import Runtime
from service.settings import Settings
from service.streams import stream_limits
from service.tokens import mint_kind, new_id, now, sha256, uuid7_hex
from tests.logs import SECONDS_MAX, server_with_streams
from tests.making import raw, subject_of
from tests.other_process import Remote
from tests.rsgi import request

ISSUER = "https://issuer.example"
T = TypeVar("T")


class Host:
    """`record` appends, `project` brings the view to the end of the log and says that it is fresh."""

    def __init__(self, server: EmbeddedServer, runtime: Runtime, writer: Remote) -> None:
        self.server = server
        self.runtime = runtime
        self._writer = writer
        self.position = 0

    async def record(self, *events: LedgerEvent) -> int:
        """The sequence of the last."""
        return (await self.runtime.ledger.append(*(Append(subject_of(event), event) for event in events)))[-1]

    async def project(self, *, confirm: bool = True, seconds_ago: float = 0) -> None:
        asked = boot_time_ns() - int(seconds_ago * 1e9)
        end = await self.runtime.ledger.last_seq()
        found = [await self.runtime.ledger.get(seq) for seq in range(self.position + 1, end + 1)]
        messages = [raw(recorded) for recorded in found if recorded is not None]
        assert len(messages) == end - self.position
        if messages:
            self._writer.call("apply", LEDGER, messages)
        self.position = end
        if confirm:
            self._writer.call("confirm", LEDGER, end, asked)

    async def settle(self) -> None:
        """Until the worker has its signing keys and appends nothing more by itself."""
        keys = self.runtime.signing_keys
        deadline = time.monotonic() + SECONDS_MAX
        await self.project()
        while not all(keys.active(algorithm, purpose) for purpose, algorithm in keys.kept()):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
            await self.project()

    async def projecting(self, work: Coroutine[Any, Any, T]) -> T:
        """What this comes to, with a view that goes on meanwhile."""
        task = asyncio.ensure_future(work)
        while not task.done():
            await self.project()
            await asyncio.sleep(0.005)
        return await task

    async def issued(self, kind: Kind = Kind.PAT, **changes: Any) -> tuple[str, TokenIssued]:
        """A token, recorded and not yet projected, and its event."""
        token = mint_kind(kind)
        event = issue(token, kind, **changes)
        await self.record(event)
        return token, event


def issue(token: str, kind: Kind, **changes: Any) -> TokenIssued:
    """The first event of a grant with this token, valid for an hour."""
    moment = now()
    fields: dict[str, Any] = {
        "id": uuid7_hex(),
        "occurred_at": moment,
        "by": "system",
        "grant_id": new_id("grt"),
        "subject": new_id("usr"),
        "client_id": None,
        "scope": "a b",
        "audience": (),
    }
    expires_at = changes.pop("expires_at", moment + timedelta(hours=1))
    fields |= changes
    minted = MintedToken(
        token_id=new_id("tok"),
        sha256=sha256(token).hex(),
        kind=kind,
        scope=fields["scope"],
        audience=fields["audience"],
        expires_at=expires_at,
    )
    return TokenIssued(**fields, tokens=(minted,))


def asking(token: str | None = None, *headers: tuple[str, str], peer: str = "192.0.2.1") -> Incoming:
    """A request with this bearer token and no body."""
    given = [("authorization", f"Bearer {token}")] if token is not None else []
    return request(*given, *headers, method="GET", path="/v1/things", peer=peer)


def settings_of(server: EmbeddedServer, directory: Path, **changes: Any) -> Settings:
    return Settings(
        **{
            "data_dir": directory,
            "nats_url": server.url,
            "nats_creds": server.creds("service"),
            "issuer": ISSUER,
        }
        | changes
    )


@contextlib.asynccontextmanager
async def host(directory: Path, **changes: Any) -> AsyncIterator[Host]:
    """One host with its own nats-server; `changes` are settings."""
    limits = stream_limits(Settings(data_dir=directory, **changes))
    async with server_with_streams(directory / "log", limits) as server:
        with Remote("projections.current:CurrentWriter", view_path(directory), sync=False) as writer:
            runtime = await Runtime.start(settings_of(server, directory, **changes))
            try:
                made = Host(server, runtime, writer)
                await made.settle()
                yield made
            finally:
                await runtime.stop()
