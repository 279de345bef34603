"""One request: headers, query, body, where it comes from, and its answer. Source: Granian's RSGI 1.5.

`Host` is never used, and `X-Forwarded-For` only from proxies that the settings trust.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import os
import re
import time
from collections.abc import Coroutine
from itertools import count
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

from granian.rsgi import ProtocolClosed, ProtocolError  # type: ignore[attr-defined]  # they have no stubs

from events.types import Context
from service import connections
from service.errors import BodyTooLarge, InvalidRequest, RequestTimeout, UnsupportedMediaType
from service.outgoing import FileResponse, Response, Sending, StreamResponse
from service.settings import Network, Settings
from service.tokens import redacted, uuid7_hex

T = TypeVar("T")

_numbers = count(1)
_SWEEP_SECONDS = 1.0
_UNREAD_SECONDS_MAX = 20.0  # how long a client may take nothing of a stream or a file
_LOOK_SECONDS = 0.1  # how often it is looked how much of a file it has
_FILE_BYTES_PER_SECOND_MIN = 256 * 1024  # that it must take of a file, on the whole
_STOPPING_SECONDS = (
    0.5  # for what was sent last, when the process is to stop; the least that `drain_seconds` may be is 1
)
_USER_AGENT_CHARS_MAX = 256
_PATH_CHARS_MAX = 256
_NOT_ASCII = "(not ASCII)"  # stands for such an agent, since the server does not pass it on
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


_process = [""]  # ids of requests count up behind what stands here


def _name_process() -> None:
    _process[0] = uuid7_hex()


_name_process()
os.register_at_fork(after_in_child=_name_process)  # workers are forked, and each needs a name of its own


class Incoming:
    """One request. Header names in lower case. Over RSGI a value that is not ASCII counts as empty, or as absent beside
    others of its name."""

    __slots__ = ("_protocol", "_scope", "headers", "method", "path", "request_id")

    def __init__(self, scope: Any, protocol: Any) -> None:
        self._scope = scope
        self._protocol = protocol
        self.method: str = scope.method
        self.path: str = scope.path  # decoded; what is not UTF-8 in it became U+FFFD
        self.headers: Any = scope.headers
        given = self.headers.get("x-request-id")
        # It stands in the log for ever, so it may be no token.
        fit = given is not None and _REQUEST_ID.fullmatch(given) and "tl_" not in given
        self.request_id: str = given if fit else f"{_process[0]}-{next(_numbers):x}"

    @property
    def query_string(self) -> bytes:
        query: str = self._scope.query_string
        return query.encode()

    def header_values(self, name: str) -> list[str]:
        """Every value of a header, in order."""
        values: list[str] = self.headers.get_all(name)
        return values or ([""] if name in self.headers else [])

    def header(self, name: str) -> str | None:
        """The first value of a header, or None."""
        value: str | None = self.headers.get(name)
        return "" if value is None and name in self.headers else value

    def answer(self, response: Response | FileResponse) -> None:
        """Sends the response."""
        headers = (*response.headers, ("x-request-id", self.request_id))
        if isinstance(response, FileResponse):
            # The length, so that nobody takes what broke off for all of it.
            headers = (*headers, ("content-length", str(response.size)))
            self._protocol.response_file(response.status, headers, str(response.path))
            return
        self._protocol.response_bytes(response.status, headers, response.body)

    async def send_file(self, response: FileResponse, sending: Sending) -> None:
        """Sends the response. Whoever takes too little of it is given up."""
        peer = self._scope.client
        try:
            await connections.find(peer)
            connections.limit_silence(peer, _UNREAD_SECONDS_MAX)
            before = connections.bytes_taken(peer)
            self.answer(response)
        except BaseException:
            sending.ended()
            raise
        _keep(self._taken(response.size, before, sending))

    async def _taken(self, size: int, before: int | None, sending: Sending) -> None:
        """Waits until the client has the file, or ends its connection. The server does not tell when it is sent."""
        peer = self._scope.client
        deadline = time.monotonic() + _UNREAD_SECONDS_MAX + size / _FILE_BYTES_PER_SECOND_MIN
        try:
            taken = before
            while before is not None and taken is not None and taken - before < size:
                if time.monotonic() > deadline or sending.stopping.is_set():
                    await asyncio.sleep(_STOPPING_SECONDS)
                    connections.cut(peer)
                    return
                await asyncio.sleep(_LOOK_SECONDS)
                taken = connections.bytes_taken(peer)
        finally:
            connections.limit_silence(peer, 0)  # it may be kept for other requests
            sending.ended()

    async def stream(self, response: StreamResponse) -> None:
        """Sends the response as its parts come. Raises: what `parts` raise; the answer ends there."""
        try:
            await self._stream(response)
        finally:
            await response.parts.aclose()
            _keep(self._flushed(response.sending))

    async def _stream(self, response: StreamResponse) -> None:
        _keep(self._limit_silence())
        headers = (*response.headers, ("x-request-id", self.request_id))
        # The server ends the response when nobody holds the transport any more.
        sending = asyncio.ensure_future(_send(response, self._protocol.response_stream(response.status, headers)))
        others = [asyncio.ensure_future(one) for one in (self._gone(), response.sending.stopping.wait())]
        try:
            await asyncio.wait({sending, *others}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, *others):
                task.cancel()
            sent, *_ = await asyncio.gather(sending, *others, return_exceptions=True)
        if isinstance(sent, Exception):
            raise sent

    async def _limit_silence(self) -> None:
        await connections.find(self._scope.client)
        connections.limit_silence(self._scope.client, _UNREAD_SECONDS_MAX)

    async def _flushed(self, sending: Sending) -> None:
        """Waits until the client has read what was sent, or ends its connection."""
        gone, stopping = (asyncio.ensure_future(one) for one in (self._gone(), sending.stopping.wait()))
        try:
            await asyncio.wait({gone, stopping}, timeout=_UNREAD_SECONDS_MAX, return_when=asyncio.FIRST_COMPLETED)
            if not gone.done() and stopping.done():
                await asyncio.wait({gone}, timeout=_STOPPING_SECONDS)
            if not gone.done():
                connections.cut(self._scope.client)
        finally:
            gone.cancel()
            stopping.cancel()
            connections.limit_silence(self._scope.client, 0)  # it may be kept for other requests
            sending.ended()

    def asgi_scope(self) -> dict[str, Any]:
        """The request as the ASGI specification has it, without its body, which is read here."""
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": self._scope.http_version,
            "method": self.method,
            "scheme": self._scope.scheme,
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": self.query_string,
            "headers": [(name.encode(), value.encode()) for name, value in self.headers.items()],
            "client": None,
            "server": None,
            "state": {},
            "incoming": self,
        }

    def client_network(self, settings: Settings) -> str:
        """Where the request comes from, as limits count it: of IPv6 64 bits, all of which one host has."""
        ip = self.client_ip(settings) or ""
        return str(ipaddress.ip_network(f"{ip}/64", strict=False)) if ":" in ip else ip

    def client_ip(self, settings: Settings) -> str | None:
        """The address the request comes from: of the peer, or what a trusted proxy says."""
        # `192.0.2.1:4711`, `[2001:db8::1]:4711`; a link-local one with this host's zone: `[fe80::1%2]:4711`
        ip = address_of(self._scope.client.rpartition(":")[0].strip("[]").partition("%")[0])
        if ip is None or not settings.trusted_proxies or not _within(ip, settings.trusted_proxies):
            return ip
        # From the right: each trusted proxy appends the address it saw; the first that is none of ours is the client.
        hops = [hop.strip() for value in self.header_values("x-forwarded-for") for hop in value.split(",")]
        for hop in reversed(hops):
            address = address_of(hop)
            if address is None:
                return ip
            ip = address
            if not _within(ip, settings.trusted_proxies):
                break
        return ip

    def context(self, settings: Settings) -> Context:
        """Where this request comes from, cut to lengths that a use may hold. No query string."""
        agent: str | None = self.headers.get("user-agent")
        if agent is None and "user-agent" in self.headers:
            agent = _NOT_ASCII
        return Context(
            self.client_ip(settings),
            redacted(agent)[:_USER_AGENT_CHARS_MAX] if agent else None,
            self.method,
            redacted(self.path)[:_PATH_CHARS_MAX],
        )

    async def body(self, bytes_max: int, seconds_max: float) -> bytes:
        """The whole body. Raises: BodyTooLarge, RequestTimeout, UnsupportedMediaType (Content-Encoding)."""
        headers = self.headers
        if "content-encoding" in headers and (headers.get("content-encoding") or "").lower() != "identity":
            raise UnsupportedMediaType("compressed bodies are not taken", fix="send the body without Content-Encoding")
        length: str = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > bytes_max:
            raise _too_large(bytes_max)
        whole = length and "transfer-encoding" not in headers
        with _reading.within(seconds_max):
            try:
                data: bytes = await self._protocol() if whole else await self._parts(bytes_max)
            except (ProtocolClosed, ProtocolError):
                raise InvalidRequest("the client went away before the body was complete") from None
        if len(data) > bytes_max:
            raise _too_large(bytes_max)
        return data

    async def while_connected(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives, after the body was read; it is ended when the client hangs up before that.

        Raises: what `work` raises; InvalidRequest when the client is gone, which only the log can tell.
        """
        working = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise InvalidRequest("the client went away before the answer was complete")
            return working.result()
        finally:
            gone.cancel()
            working.cancel()
            await asyncio.gather(working, gone, return_exceptions=True)

    async def _gone(self) -> None:
        await self._protocol.client_disconnect()

    async def _parts(self, bytes_max: int) -> bytes:
        """A body whose length was not announced, as far as it may be kept.

        The server gives an empty part at its end, and one more for what was cut off.
        """
        parts, total, empty = [], 0, 0
        async for part in self._protocol:
            parts.append(part)
            total += len(part)
            empty += not part
            if total > bytes_max:
                break
        if empty > 1:
            raise InvalidRequest(
                "the client went away before the body was complete, or sent trailers",
                fix="send Content-Length, or chunks without trailers",
            )
        return b"".join(parts)


_kept: set[asyncio.Task[None]] = set()  # until they are done


def _keep(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    _kept.add(task)
    task.add_done_callback(_kept.discard)


async def _send(response: StreamResponse, transport: Any) -> None:
    # A client that hangs up is noticed by who waits for that.
    with contextlib.suppress(ProtocolClosed, ProtocolError):
        async for part in response.parts:
            await transport.send_bytes(part)


def _too_large(bytes_max: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {bytes_max} bytes", fix="send less; the README lists limits")


class _Deadlines:
    """Ends tasks that take too long. One timer for all: a timer for each would cost more than reading a body does."""

    def __init__(self) -> None:
        self._deadlines: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def within(self, seconds: float) -> _Within:
        """A context for the current task. Raises: RequestTimeout from inside, up to a second late."""
        return _Within(self, seconds)

    def begin(self, task: asyncio.Task[Any], seconds: float) -> None:
        self._deadlines[task] = time.monotonic() + seconds
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)

    def end(self, task: asyncio.Task[Any]) -> bool:
        """Whether the task was ended because it was late."""
        self._deadlines.pop(task, None)
        if task in self._late:
            self._late.discard(task)
            return True
        return False

    def _sweep(self) -> None:
        clock = time.monotonic()
        for task, deadline in list(self._deadlines.items()):
            if clock > deadline:
                del self._deadlines[task]
                self._late.add(task)
                task.cancel()
        self._timer = None
        if self._deadlines:
            self._timer = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)


class _Within:
    __slots__ = ("_deadlines", "_seconds", "_task")

    def __init__(self, deadlines: _Deadlines, seconds: float) -> None:
        self._deadlines = deadlines
        self._seconds = seconds
        self._task: asyncio.Task[Any] | None = None

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        if self._task is not None:
            self._deadlines.begin(self._task, self._seconds)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        task = self._task
        if task is not None and self._deadlines.end(task) and isinstance(error, asyncio.CancelledError):
            task.uncancel()
            raise RequestTimeout(f"the body did not arrive within {self._seconds} s")


_reading = _Deadlines()


@functools.lru_cache(maxsize=10_000)
def address_of(text: str) -> str | None:
    """An IP address in the one form in which it is compared and recorded; None for what is none.

    A zone (RFC 4007 §11) is refused: one that somebody wrote means nothing here, and may be any text of any length.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if "%" in text:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _within(ip: str, networks: tuple[Network, ...]) -> bool:
    address = ipaddress.ip_address(ip)
    return any(address in network for network in networks)


def parse_form(data: bytes, *, fields_max: int = 100, value_chars_max: int = 8192) -> list[tuple[str, str]]:
    """Names and values of `application/x-www-form-urlencoded`, strictly: UTF-8 or nothing.

    Litestar's own parser is not used for secrets: it caches what it parsed for the whole process and replaces bytes
    that are not UTF-8. Source: RFC 6749 App. B.

    Raises: InvalidRequest.
    """
    if not data:
        return []
    parts = data.split(b"&", fields_max)
    if len(parts) > fields_max:
        raise InvalidRequest(f"more than {fields_max} parameters", fix="send fewer")
    pairs = []
    for part in parts:
        if not part:
            continue
        name, _, value = part.partition(b"=")
        pairs.append((_form_text(name), _form_text(value)))
        if len(pairs[-1][1]) > value_chars_max:
            raise InvalidRequest(f"a parameter is longer than {value_chars_max} characters", fix="send less")
    return pairs


def _form_text(raw: bytes) -> str:
    if b"%" in raw or b"+" in raw:
        if re.search(rb"%(?![0-9A-Fa-f]{2})", raw):
            raise InvalidRequest("a percent sign is not followed by two hex digits")
        raw = unquote_to_bytes(raw.replace(b"+", b" "))
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("a parameter is not UTF-8") from None
