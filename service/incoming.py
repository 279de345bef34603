"""What a request says about itself: headers, query, body and where it comes from.

`Host` is never used, and `X-Forwarded-For` only from proxies that the settings trust.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
from typing import Any
from urllib.parse import unquote_to_bytes

from events.types import Context
from service.errors import BodyTooLarge, InvalidRequest, RequestTimeout, UnsupportedMediaType
from service.settings import Network, Settings
from service.tokens import uuid7_hex

_USER_AGENT_CHARS_MAX = 256
_PATH_CHARS_MAX = 256
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Incoming:
    """One request, over ASGI. Header names in lower case; values as Latin-1, as RFC 9110 §5.5 has them."""

    __slots__ = ("_headers", "_receive", "method", "path", "query_string", "request_id", "scope")

    def __init__(self, scope: Any, receive: Any) -> None:
        self.scope = scope
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query_string: bytes = scope["query_string"]
        self._receive = receive
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        given = self.header("x-request-id")
        self.request_id = given if given and _REQUEST_ID.fullmatch(given) else uuid7_hex()

    def header_values(self, name: str) -> list[str]:
        """Every value of a header, in order."""
        wanted = name.encode()
        return [value.decode("latin-1") for key, value in self._headers if key == wanted]

    def header(self, name: str) -> str | None:
        """The first value of a header, or None."""
        wanted = name.encode()
        for key, value in self._headers:
            if key == wanted:
                return value.decode("latin-1")
        return None

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
            ip = hop
            if not _within(hop, settings.trusted_proxies):
                break
        return ip

    def context(self, settings: Settings) -> Context:
        """Where this request comes from, cut to lengths that a use may hold. No query string."""
        agent = self.header("user-agent")
        return Context(
            self.client_ip(settings),
            agent[:_USER_AGENT_CHARS_MAX] if agent else None,
            self.method,
            self.path[:_PATH_CHARS_MAX],
        )

    async def body(self, bytes_max: int, seconds_max: float) -> bytes:
        """The whole body. Raises: BodyTooLarge, RequestTimeout, UnsupportedMediaType (Content-Encoding)."""
        encoding = self.header("content-encoding")
        if encoding is not None and encoding.lower() != "identity":
            raise UnsupportedMediaType("compressed bodies are not taken", fix="send the body without Content-Encoding")
        length = self.header("content-length")
        if length is not None and length.isdigit() and int(length) > bytes_max:
            raise BodyTooLarge(f"the body is larger than {bytes_max} bytes", fix="send less; the README lists limits")
        message = await self._receive_within(seconds_max)
        if message["type"] == "http.request" and not message.get("more_body"):
            data: bytes = message["body"]
        else:
            data = await self._rest(message, bytes_max, seconds_max)
        if len(data) > bytes_max:
            raise BodyTooLarge(f"the body is larger than {bytes_max} bytes", fix="send less; the README lists limits")
        return data

    async def _receive_within(self, seconds: float) -> Any:
        try:
            async with asyncio.timeout(seconds):
                return await self._receive()
        except TimeoutError as error:
            raise RequestTimeout(f"the body did not arrive within {seconds} s") from error

    async def _rest(self, message: Any, bytes_max: int, seconds_max: float) -> bytes:
        parts, total = [], 0
        try:
            async with asyncio.timeout(seconds_max):
                while message["type"] == "http.request":
                    parts.append(message["body"])
                    total += len(message["body"])
                    if total > bytes_max:
                        raise BodyTooLarge(f"the body is larger than {bytes_max} bytes", fix="send less")
                    if not message.get("more_body"):
                        return b"".join(parts)
                    message = await self._receive()
        except TimeoutError as error:
            raise RequestTimeout(f"the body did not arrive within {seconds_max} s") from error
        raise InvalidRequest("the client went away before the body was complete")


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
