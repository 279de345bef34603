"""How long after the answer to a revocation each of many followers knows of it, by every way to follow.

Tokens are revoked one after another; the clock is read when the answer has arrived and when the announcement has, all
in this one process, which shares the machine with the service. A follower that knows it before the answer took 0 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import time
from collections.abc import Awaitable, Callable

import msgspec
import nats
import nats.errors

from tests import running
from tests.bench.fill import Issued
from tests.bench.machine import percentile
from tests.bench.processes import connection_to_each_worker
from tests.bench.revocation import Channel

SEEN_SECONDS_MAX = 10.0
WAYS = ("NATS", "SSE", "long poll", "webhook")


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """Times in ms over all of a way's followers and all revocations."""

    way: str
    followers: int
    revocations: int
    p50: float
    p99: float
    longest: float


Seen = Callable[[int, bytes], None]  # a follower's number and what came: called when it has come


class Followers:
    """Some of each kind, and when each saw what."""

    def __init__(self, service: running.Service, each: dict[str, int]) -> None:
        self.service = service
        self.ways = [way for way in WAYS for _ in range(each[way])]
        self.token_id = b""
        self.seen: dict[int, float] = {}
        self.all_seen = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self.closing = contextlib.AsyncExitStack()
        self.began: set[int] = set()

    def saw(self, number: int, data: bytes) -> None:
        if self.token_id and self.token_id in data and number not in self.seen:
            self.seen[number] = time.perf_counter()
            if len(self.seen) == len(self.ways):
                self.all_seen.set()

    async def begin(self) -> None:
        """Registers and connects all. What they see from now on counts."""
        after = self.service.done("GET", "/v1/revocations/position")["ledger_seq"]
        port = await self._receive()
        begin: dict[str, Callable[[int], Awaitable[None]]] = {
            "NATS": self._over_nats,
            "SSE": lambda number: self._over_sse(number, after),
            "long poll": lambda number: self._by_polls(number, after),
            "webhook": lambda number: self._by_webhook(number, port),
        }
        for number, way in enumerate(self.ways):
            await begin[way](number)

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.closing.aclose()

    async def _over_nats(self, number: int) -> None:
        made = self.service.done("POST", "/v1/subscribers", json={"name": f"bench-{number}", "transport": "nats"})
        nc = await nats.connect(
            made["nats_url"], nkeys_seed_str=made["nats_seed"], inbox_prefix=made["inbox_prefix"].encode()
        )
        self.closing.push_async_callback(nc.close)
        js = nc.jetstream(prefix=made["api_prefix"])
        subscription = await js.pull_subscribe_bind(consumer=made["consumer"], stream=made["stream"])

        async def follow() -> None:
            while True:
                try:
                    for message in await subscription.fetch(10, timeout=20):
                        self.saw(number, message.data)
                        await message.ack()
                except (nats.errors.TimeoutError, TimeoutError):
                    continue

        self.tasks.append(asyncio.create_task(follow()))

    async def _over_sse(self, number: int, after: int) -> None:
        reader, writer = await self._open(f"/v1/revocations/stream?after={after}")
        self.closing.callback(writer.close)

        async def follow() -> None:
            while line := await reader.readline():
                if line.startswith(b"data:"):
                    self.saw(number, line)
            raise RuntimeError("a stream ended")

        self.tasks.append(asyncio.create_task(follow()))

    async def _by_polls(self, number: int, after: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port)
        connection.connect()
        channel = await Channel.over(connection.sock, self.service)
        self.closing.push_async_callback(channel.close)

        async def follow() -> None:
            cursor = after
            while True:
                status, answer = await channel.get(f"/v1/revocations?after={cursor}&wait_seconds=20")
                if status != 200:
                    raise RuntimeError(f"a poll was answered {status}")
                self.saw(number, answer)
                cursor = json.loads(answer)["ledger_seq"]

        self.tasks.append(asyncio.create_task(follow()))

    async def _receive(self) -> int:
        """A receiver for all webhooks, told apart by their paths; answers its port."""

        async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    lines = head.split(b"\r\n")
                    length = next(int(line[15:]) for line in lines if line.lower().startswith(b"content-length:"))
                    body = await reader.readexactly(length)
                    self.saw(int(lines[0].split(b" ")[1].removeprefix(b"/")), body)
                    writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(receive, "127.0.0.1", 0)
        self.closing.callback(server.close)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def _by_webhook(self, number: int, port: int) -> None:
        made = self.service.done("POST", "/v1/webhooks", json={"url": f"http://127.0.0.1:{port}/{number}"})
        self.closing.callback(self.service.done, "DELETE", f"/v1/webhooks/{made['webhook_id']}")

    async def _open(self, target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.service.port)
        head = f"Host: 127.0.0.1:{self.service.port}\r\nAuthorization: Bearer {self.service.admin_token}\r\n"
        writer.write(f"GET {target} HTTP/1.1\r\n{head}\r\n".encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in answer.split(b"\r\n")[0]:
            raise RuntimeError(f"{target} was answered {answer!r}")
        return reader, writer


async def measure(service: running.Service, tokens: list[Issued], each: dict[str, int]) -> list[Way]:
    """Revokes each of `tokens` and waits until all followers saw it. Raises: RuntimeError, TimeoutError."""
    followers = Followers(service, each)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    revokers = [await Channel.over(one, service) for one in connection_to_each_worker(service).values()]
    try:
        await followers.begin()
        for issued, revoker in zip(tokens, itertools.cycle(revokers), strict=False):
            followers.token_id, followers.seen = issued.token_id.encode(), {}
            followers.all_seen.clear()
            status, answer = await revoker.post(f"/v1/tokens/{issued.token_id}/revoke", {"reason": "compromised"})
            answered_at = time.perf_counter()
            if status != 200:
                raise RuntimeError(f"revoke answered {status} {answer}")
            async with asyncio.timeout(SEEN_SECONDS_MAX):
                await followers.all_seen.wait()
            if issued is tokens[0]:
                continue  # the first connects whoever waited to be called
            for number, at in followers.seen.items():
                times[followers.ways[number]].append(max(0.0, at - answered_at) * 1e3)
        failed = [task.exception() for task in followers.tasks if task.done()]
        if failed:
            raise RuntimeError(f"followers ended: {failed}")
    finally:
        await followers.end()
        for revoker in revokers:
            await revoker.close()
    return [
        Way(
            way=way,
            followers=each[way],
            revocations=len(tokens) - 1,
            p50=percentile(found, 50),
            p99=percentile(found, 99),
            longest=max(found),
        )
        for way, found in times.items()
    ]
