"""A million live tokens, written to the ledger as the service writes them.

A few tokens of each kind are issued through the service; the event of each is read back from the ledger and copied
with new ids, times and hashes. So the projectors meet nothing here that the service itself would not write.
"""

from __future__ import annotations

import array
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from events.codec import decode_block
from events.ledger import Append, Ledger
from events.streams import LEDGER, USAGE, Connection, RawMessage, connect, follow, stream_state
from events.types import Recorded, TokenIssued
from service.tokens import Prefix, mint, uuid7_hex
from tests import running

EVENTS_PER_APPEND = 1000
SUBJECTS_PER_KIND = 25  # clients, users: each issues its share of the tokens
SHARES = {"jwt": 0.60, "opaque": 0.25, "pat": 0.15}
REFERENCES: dict[str, Prefix] = {"opaque": "at", "pat": "pat"}
WORDS = {
    "jwt": "JWT access tokens and",
    "opaque": "opaque access tokens by client credentials,",
    "pat": "personal access tokens",
}
REVOCABLE = 400  # tokens kept aside to be revoked: no row under load asks about them
REVOCABLE_PER_APPEND = 20
SEED = 20


class Issued(msgspec.Struct, frozen=True):
    token: str
    token_id: str


class Filled(msgspec.Struct, frozen=True, kw_only=True):
    """`tokens_path` holds the token strings one after another, `<tokens_path>.index` where each begins."""

    count: int
    tokens_path: Path
    revocable: list[Issued]
    ledger_bytes_per_event: float
    append_seconds: float
    view_seconds: float  # until the view had them all, from the first append

    def describe(self) -> str:
        """The mix, in words."""
        parts = " ".join(f"{share:.0%} {WORDS[kind]}" for kind, share in SHARES.items())
        return f"{self.count:,} live tokens of {2 * SUBJECTS_PER_KIND} clients and {SUBJECTS_PER_KIND} users: {parts}"


class _Template:
    """One issued token and its event, from which any number of others are made."""

    def __init__(self, kind: str, token: str, recorded: Recorded) -> None:
        assert isinstance(recorded.event, TokenIssued)
        self.token = token
        self.subject = recorded.subject
        self.event = recorded.event
        self.minted = recorded.event.tokens[0]
        self.lifetime = self.minted.expires_at - self.event.occurred_at
        self.prefix: Prefix | None = REFERENCES.get(kind)
        if self.prefix is None:
            self.header, payload, signature = token.split(".")
            self.claims: dict[str, Any] = json.loads(_base64url_decoded(payload))
            self.signature_bytes = len(_base64url_decoded(signature))

    def copy(self, now: datetime) -> tuple[Append, Issued]:
        grant_id = _fresh(self.event.grant_id)
        token_id = _fresh(self.minted.token_id)
        expires_at = (now + self.lifetime).replace(microsecond=0)
        token = mint(self.prefix) if self.prefix else self._jwt(token_id, grant_id, now, expires_at)
        minted = msgspec.structs.replace(
            self.minted,
            token_id=token_id,
            sha256=hashlib.sha256(token.encode()).hexdigest(),
            expires_at=expires_at,
        )
        event = msgspec.structs.replace(
            self.event,
            id=_fresh(self.event.id),
            occurred_at=now,
            grant_id=grant_id,
            tokens=(minted,),
        )
        subject = self.subject.replace(self.event.grant_id, grant_id)
        return Append(subject, event), Issued(token, token_id)

    def _jwt(self, token_id: str, grant_id: str, now: datetime, expires_at: datetime) -> str:
        """A JWT like the template's, but for a signature of random bytes: who validates online checks none."""
        times = {"iat": int(now.timestamp()), "exp": int(expires_at.timestamp())}
        claims = self.claims | {name: value for name, value in times.items() if name in self.claims}
        claims |= {"jti": token_id, "grant_id": grant_id}
        payload = _base64url(json.dumps(claims, separators=(",", ":")).encode())
        return f"{self.header}.{payload}.{_base64url(os.urandom(self.signature_bytes))}"


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _base64url_decoded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _fresh(identifier: str) -> str:
    """Another identifier of the same kind."""
    return identifier[:-32] + uuid7_hex()


async def connected(service: running.Service, role: str, name: str) -> Connection:
    """A connection to the embedded server, with the credentials of a role of the service."""
    bootstrap = json.loads((service.data_dir / "bootstrap.json").read_text())
    return await connect(bootstrap["nats_url"], service.data_dir / "nats" / f"{role}.nk", name=name)


async def fill(service: running.Service, count: int, directory: Path, progress: Callable[[int], None]) -> Filled:
    """Issues `count` tokens, and waits until the view has them. `progress` is told how many are written."""
    nc = await connected(service, "service", "bench fill")
    try:
        ledger = Ledger(nc)
        templates = await _templates(service, ledger)
        before = await stream_state(nc, LEDGER)
        path = directory / "tokens"
        revocable: list[Issued] = []
        begins = array.array("q", [0])
        began = time.perf_counter()
        with path.open("wb") as file:
            last: Issued | None = None
            for chunk in _chunks(templates, count):
                await ledger.append(*(append for append, _ in chunk))
                for number, (_, issued) in enumerate(chunk):
                    if number < REVOCABLE_PER_APPEND and len(revocable) < REVOCABLE:
                        revocable.append(issued)
                    else:
                        begins.append(begins[-1] + file.write(issued.token.encode()))
                    last = issued
                progress(len(begins) - 1 + len(revocable))
        path.with_name("tokens.index").write_bytes(begins.tobytes())
        appended = time.perf_counter()
        after = await stream_state(nc, LEDGER)
    finally:
        await nc.close()
    assert last is not None
    running.until(
        lambda: _is_valid(service, last.token, after["last_seq"]),
        seconds=600,
        what="the view has all tokens",
    )
    return Filled(
        count=count,
        tokens_path=path,
        revocable=revocable,
        ledger_bytes_per_event=(after["bytes"] - before["bytes"]) / (after["messages"] - before["messages"]),
        append_seconds=appended - began,
        view_seconds=time.perf_counter() - began,
    )


def _is_valid(service: running.Service, token: str, seq: int) -> bool:
    """Whether a view that has applied `seq` says so; one that is far behind answers 503 or `stale`."""
    answer = service.call("POST", "/v1/tokens/validate", json={"token": token, "min_seq": seq})
    return answer.status_code == 200 and answer.json()["code"] == "valid"


async def _templates(service: running.Service, ledger: Ledger) -> dict[str, list[_Template]]:
    """Tokens of each kind as the service issues them."""
    made: dict[str, list[_Template]] = {kind: [] for kind in SHARES}
    scopes = [service.scope() for _ in range(3)]
    for _ in range(SUBJECTS_PER_KIND):
        for kind in ("jwt", "opaque"):
            app = service.app(access_token_format=kind, scope=" ".join(scopes))
            token = service.grant(app)["access_token"]
            events = await ledger.read(f"ledger.main.access.{app.client_id}")
            made[kind].append(_Template(kind, token, events[-1]))
        user = service.user(scope=" ".join(scopes))
        pat = service.issue(user["user_id"], " ".join(scopes))
        recorded = await ledger.get(pat["ledger_seq"])
        assert recorded is not None
        made["pat"].append(_Template("pat", pat["token"], recorded))
    return made


def _chunks(templates: dict[str, list[_Template]], count: int) -> Iterator[list[tuple[Append, Issued]]]:
    """`count` events in chunks of what the ledger takes at once, kinds and owners drawn at random."""
    choice = random.Random(SEED)
    kinds, weights = list(SHARES), list(SHARES.values())
    while count > 0:
        now = datetime.now(UTC)
        drawn = choice.choices(kinds, weights, k=min(count, EVENTS_PER_APPEND))
        yield [choice.choice(templates[kind]).copy(now) for kind in drawn]
        count -= len(drawn)


async def _blocks(nc: Connection, after: int) -> AsyncGenerator[list[RawMessage], None]:
    async for batch in follow(nc, USAGE, after):
        yield batch


class Uses(msgspec.Struct, frozen=True, kw_only=True):
    """What USAGE holds of a stretch of time."""

    uses: int
    blocks: int
    bytes: int
    outcomes: dict[str, int]


async def usage_end(service: running.Service) -> int:
    """The last sequence of USAGE."""
    nc = await connected(service, "projector", "bench usage")
    try:
        return int((await stream_state(nc, USAGE))["last_seq"])
    finally:
        await nc.close()


async def uses_between(service: running.Service, after: int, until: int) -> Uses:
    """The uses recorded after one sequence of USAGE up to another."""
    outcomes: dict[str, int] = {}
    uses = blocks = size = 0
    if until > after:
        nc = await connected(service, "projector", "bench usage")
        try:
            async with asyncio.timeout(120), contextlib.aclosing(_blocks(nc, after)) as batches:
                async for batch in batches:
                    for message in batch:
                        block = decode_block(message.data)
                        blocks += 1
                        size += len(message.data)
                        uses += len(block.uses)
                        for use in block.uses:
                            outcomes[use.outcome] = outcomes.get(use.outcome, 0) + 1
                    if batch and batch[-1].seq >= until:
                        break
        finally:
            await nc.close()
    return Uses(uses=uses, blocks=blocks, bytes=size, outcomes=outcomes)
