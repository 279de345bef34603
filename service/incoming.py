"""What a request says about itself: headers, query, body and where it comes from.

`Host` is never used, and `X-Forwarded-For` only from proxies that the settings trust.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import time
from itertools import count
from typing import Any
from urllib.parse import unquote_to_bytes

from events.types import Context
from service.errors import BodyTooLarge, InvalidRequest, RequestTimeout, UnsupportedMediaType
from service.settings import Network, Settings
from service.tokens import redacted, uuid7_hex

_numbers = count(1)
_SWEEP_SECONDS = 1.0
_USER_AGENT_CHARS_MAX = 256
_PATH_CHARS_MAX = 256
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


_process = [""]  # ids of requests count up behind what stands here


def _name_process() -> None:
    _process[0] = uuid7_hex()


_name_process()
os.register_at_fork(after_in_child=_name_process)  # workers are forked, and each needs a name of its own


class Incoming:
    """One request, over ASGI. Header names in lower case; values as Latin-1, as RFC 9110 §5.5 has them."""

    __slots__ = ("_by_name", "_headers", "_receive", "method", "path", "query_string", "request_id", "scope")

    def __init__(self, scope: Any, receive: Any) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query_string: bytes = scope["query_string"]
        self._receive = receive
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self._by_name = dict(self._headers)
        given = self.header("x-request-id")
        # It stands in the log for ever, so it may be no token.
        fit = given is not None and _REQUEST_ID.fullmatch(given) and "tl_" not in given
        self.request_id = given if given and fit else f"{_process[0]}-{next(_numbers):x}"

    def header_values(self, name: str) -> list[str]:
        """Every value of a header, in order."""
        wanted = name.encode()
        return [value.decode("latin-1") for key, value in self._headers if key == wanted]

    def header(self, name: str) -> str | None:
        """A value of a header, or None; of several, any."""
        value = self._by_name.get(name.encode())
        return value.decode("latin-1") if value is not None else None

    def client_ip(self, settings: Settings) -> str | None:
        """The address the request comes from: of the peer, or what a trusted proxy says."""
        client = self.scope.get("client")
        ip: str | None = client[0] if client else None
        if ip is None or not settings.trusted_proxies or not _within(ip, settings.trusted_proxies):
            return ip
        # From the right: each trusted proxy appends the address it saw; the first that is none of ours is the client.
        hops = [hop.strip() for value in self.header_values("x-forwarded-for") for hop in value.split(",")]
        for hop in reversed(hops):
            try:
                ipaddress.ip_address(hop)
            except ValueError:
                return ip
            if "%" in hop:  # a zone means nothing here, and may be any text of any length
                return ip
            ip = hop
            if not _within(hop, settings.trusted_proxies):
                break
        return ip

    def context(self, settings: Settings) -> Context:
        """Where this request comes from, cut to lengths that a use may hold. No query string."""
        agent = self.header("user-agent")
        return Context(
            self.client_ip(settings),
            redacted(agent)[:_USER_AGENT_CHARS_MAX] if agent else None,
            self.method,
            redacted(self.path)[:_PATH_CHARS_MAX],
        )

    async def body(self, bytes_max: int, seconds_max: float) -> bytes:
        """The whole body. Raises: BodyTooLarge, RequestTimeout, UnsupportedMediaType (Content-Encoding)."""
        encoding = self.header("content-encoding")
        if encoding is not None and encoding.lower() != "identity":
            raise UnsupportedMediaType("compressed bodies are not taken", fix="send the body without Content-Encoding")
        length = self.header("content-length")
        if length is not None and length.isascii() and length.isdigit() and int(length[:20]) > bytes_max:
            raise _too_large(bytes_max)
        with _reading.within(seconds_max):
            message = await self._receive()
            data: bytes = message.get("body", b"")
            if message.get("more_body"):
                parts, total = [data], len(data)
                while message.get("more_body") and total <= bytes_max:
                    message = await self._receive()
                    parts.append(message.get("body", b""))
                    total += len(parts[-1])
                data = b"".join(parts)
        if message["type"] != "http.request":
            raise InvalidRequest("the client went away before the body was complete")
        if len(data) > bytes_max:
            raise _too_large(bytes_max)
        return data


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


def _within(ip: str, networks: tuple[Network, ...]) -> bool:
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return False
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
