"""How long after a revocation each worker still says valid.

For every revocation, one connection to each worker asks about the token again and again, the next question as soon
as the answer is there, while another connection revokes it on one of the workers in turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time

import msgspec

from tests import running
from tests.bench.fill import Issued
from tests.bench.machine import percentile
from tests.bench.processes import connection_to_each_worker

ANSWER_SECONDS_MAX = 10.0
ASKED_BEFORE = 3  # answers `valid` from each worker before the token is revoked


class Revocations(msgspec.Struct, frozen=True, kw_only=True):
    """Times in ms, over `count` revocations.

    `refused`: from sending the revocation to the first answer `revoked` of the worker that gave it last. `answered`:
    from sending it to its own answer. `late`: questions sent after that answer that still got `valid`.
    """

    count: int
    workers: int
    refused_p50: float
    refused_p99: float
    answered_p50: float
    answered_p99: float
    late: int


class Channel:
    """A kept-alive connection to one worker, and HTTP by hand: nothing between the bytes and the clock."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: str) -> None:
        self.reader = reader
        self.writer = writer
        self.head = head

    @classmethod
    async def over(cls, connection: socket.socket, service: running.Service) -> Channel:
        connection.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=connection)
        head = (
            f"Host: 127.0.0.1:{service.port}\r\nAuthorization: Bearer {service.admin_token}\r\n"
            "Content-Type: application/json\r\n"
        )
        return cls(reader, writer, head)

    async def post(self, path: str, content: dict[str, str]) -> tuple[int, dict[str, object]]:
        body = json.dumps(content)
        self.writer.write(f"POST {path} HTTP/1.1\r\n{self.head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            status, answer = await self._answer()
        return status, json.loads(answer)

    async def get(self, target: str) -> tuple[int, bytes]:
        """However long the answer takes."""
        self.writer.write(f"GET {target} HTTP/1.1\r\n{self.head}\r\n".encode())
        return await self._answer()

    async def _answer(self) -> tuple[int, bytes]:
        answer = await self.reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.partition(b":")[2])
            for line in answer.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        return int(answer.split(b" ", 2)[1]), await self.reader.readexactly(length)

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


class _Watch:
    """One worker's answers about one token."""

    def __init__(self, channel: Channel, token: str) -> None:
        self.channel = channel
        self.token = token
        self.valid = 0
        self.valid_asked_at = 0.0  # when the last question that got `valid` was sent
        self.refused_at = 0.0
        self.ready = asyncio.Event()

    async def ask_until_refused(self) -> None:
        deadline = time.perf_counter() + ANSWER_SECONDS_MAX
        while (asked_at := time.perf_counter()) < deadline:
            status, answer = await self.channel.post("/v1/tokens/validate", {"token": self.token})
            if status == 200 and answer["code"] == "revoked":
                self.refused_at = time.perf_counter()
                return
            if status == 200 and answer["valid"]:
                self.valid += 1
                self.valid_asked_at = asked_at
                if self.valid == ASKED_BEFORE:
                    self.ready.set()
            elif status != 503:
                raise RuntimeError(f"validate answered {status} {answer}")
        raise RuntimeError(f"a worker did not refuse within {ANSWER_SECONDS_MAX} s")


async def measure(service: running.Service, tokens: list[Issued]) -> Revocations:
    """Revokes each of `tokens` and watches every worker. Raises: RuntimeError, TimeoutError."""
    watching = connection_to_each_worker(service)
    revoking = connection_to_each_worker(service)
    channels = {pid: await Channel.over(connection, service) for pid, connection in watching.items()}
    revokers = [await Channel.over(connection, service) for connection in revoking.values()]
    refused: list[float] = []
    answered: list[float] = []
    late = 0
    try:
        for number, issued in enumerate(tokens):
            watches = [_Watch(channel, issued.token) for channel in channels.values()]
            async with asyncio.timeout(2 * ANSWER_SECONDS_MAX), asyncio.TaskGroup() as group:
                for watch in watches:
                    group.create_task(watch.ask_until_refused())
                for watch in watches:
                    await watch.ready.wait()
                sent_at = time.perf_counter()
                status, answer = await revokers[number % len(revokers)].post(
                    f"/v1/tokens/{issued.token_id}/revoke", {"reason": "compromised"}
                )
                answered_at = time.perf_counter()
                if status != 200:
                    raise RuntimeError(f"revoke answered {status} {answer}")
            refused.append((max(watch.refused_at for watch in watches) - sent_at) * 1e3)
            answered.append((answered_at - sent_at) * 1e3)
            late += sum(watch.valid_asked_at > answered_at for watch in watches)
    finally:
        for channel in [*channels.values(), *revokers]:
            await channel.close()
    return Revocations(
        count=len(tokens),
        workers=len(channels),
        refused_p50=percentile(refused, 50),
        refused_p99=percentile(refused, 99),
        answered_p50=percentile(answered, 50),
        answered_p99=percentile(answered, 99),
        late=late,
    )
