"""One request to a receiver, which may do what it likes: hang, redirect, answer without end, be somebody else.

The request goes to an address that was looked at, while TLS checks the name. No redirect is followed, no proxy asked,
no cookie kept, nothing decompressed, and little of the answer is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import ssl
import time
from collections.abc import Mapping
from typing import Literal

import h11
import httpx
from msgspec import Struct

from service.webhooks.addresses import Guard, NotCallable, NotResolved, Target

TOTAL_SECONDS_MAX = 15.0
CONNECT_SECONDS_MAX = 5.0
BODY_SECONDS_MAX = 1.0  # of the answer, once its status is known
HEAD_BYTES_MAX = 16 * 1024
ANSWER_BYTES_MAX = 32 * 1024  # with all that surrounds a body: chunks may have extensions, and answers come before it
RETRY_AFTER_SECONDS_MAX = 3_600.0
_READ_BYTES = 16 * 1024
_INTERIM_MAX = 8  # answers such as 103 before the one that counts
_IDLE_CONNECTIONS_MAX = 2
_IDLE_SECONDS_MAX = 20.0
_ADDRESSES_TRIED_MAX = 3

Outcome = Literal[
    "delivered",  # 2xx
    "gone",  # 410: it wants no more
    "throttled",  # 429
    "redirected",  # 3xx
    "refused",  # any other 4xx
    "failed",  # 5xx
    "timeout",
    "unreachable",  # no connection, or it broke
    "tls",
    "not_resolved",
    "not_allowed",  # an address that is not called
]


class Answer(Struct, frozen=True, kw_only=True):
    """What came of a request. `status` is None without an answer, and `error` then says why.

    `retry_after_seconds`: what the receiver asked for with 429 or 503, at most an hour.
    """

    outcome: Outcome
    seconds: float
    status: int | None = None
    error: str = ""
    retry_after_seconds: float = 0.0


class _Failed(Exception):
    def __init__(self, outcome: Outcome, why: str) -> None:
        super().__init__(why)
        self.outcome: Outcome = outcome


class _Connection:
    """HTTP/1.1 over one connection (RFC 9112), one request at a time."""

    def __init__(self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.address = address
        self.used_at = time.monotonic()
        self._answer_bytes = 0  # that came for the request which is under way
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)

    @property
    def usable(self) -> bool:
        """Whether another request may be sent over it: its server may have closed it meanwhile."""
        ended = self._reader.at_eof() or self._writer.is_closing()
        return not ended and time.monotonic() - self.used_at < _IDLE_SECONDS_MAX

    @property
    def answered(self) -> bool:
        return self._answer_bytes > 0

    async def post(self, path: str, headers: Mapping[str, str], body: bytes) -> h11.Response:
        """Returns the head of the answer. Raises: OSError; h11.RemoteProtocolError, h11.LocalProtocolError."""
        self._answer_bytes = 0
        head = h11.Request(method="POST", target=path, headers=list(headers.items()))
        parts = (self._http.send(event) for event in (head, h11.Data(data=body), h11.EndOfMessage()))
        self._writer.write(b"".join(part for part in parts if part))
        await self._writer.drain()
        for _ in range(_INTERIM_MAX):
            event = await self._event()
            if isinstance(event, h11.Response):
                return event
        raise h11.RemoteProtocolError("too many interim answers")

    async def finish(self) -> bool:
        """Reads a little of the answer's body, and says whether the connection can be used again."""
        try:
            async with asyncio.timeout(BODY_SECONDS_MAX):
                while isinstance(event := await self._event(), h11.Data):
                    pass
            if isinstance(event, h11.EndOfMessage):
                self._http.start_next_cycle()
                self.used_at = time.monotonic()
                return True
        except (OSError, TimeoutError, h11.RemoteProtocolError, h11.LocalProtocolError):
            pass  # the status is known: what fails here changes nothing
        return False

    async def _event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._answer_bytes > ANSWER_BYTES_MAX:
                raise h11.RemoteProtocolError("too long an answer")
            data = await self._reader.read(_READ_BYTES)
            self._answer_bytes += len(data)
            self._http.receive_data(data)
        return event

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._writer.transport.abort()


class Line:
    """The connections to one receiver. They are shared with no other: two names may have one address."""

    def __init__(self, guard: Guard, tls: ssl.SSLContext, owner: str = "") -> None:
        self._guard = guard
        self._tls = tls
        self._owner = owner
        self._idle: list[_Connection] = []

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Answer:
        """Sends, and says what came of it. Never raises but when it is cancelled."""
        started = time.perf_counter()
        try:
            async with asyncio.timeout(TOTAL_SECONDS_MAX):
                addresses = await self._guard.addresses(target, self._owner)
                status, retry_after = await self._first_that_answers(target, addresses, headers, body)
        except TimeoutError:
            return Answer(outcome="timeout", seconds=_since(started), error=f"no answer in {TOTAL_SECONDS_MAX:g} s")
        except NotResolved as error:
            return Answer(outcome="not_resolved", seconds=_since(started), error=str(error))
        except NotCallable as error:
            return Answer(outcome="not_allowed", seconds=_since(started), error=str(error))
        except _Failed as error:
            return Answer(outcome=error.outcome, seconds=_since(started), error=str(error))
        return Answer(
            outcome=outcome_of(status), seconds=_since(started), status=status, retry_after_seconds=retry_after
        )

    async def _first_that_answers(
        self, target: Target, addresses: list[str], headers: Mapping[str, str], body: bytes
    ) -> tuple[int, float]:
        """Over a connection that is open to one of the addresses, else over a new one."""
        while (kept := self._kept(addresses)) is not None:
            try:
                return await self._ask(kept, target, headers, body)
            except _Failed:
                if kept.answered:
                    raise
                # Its server closed it, as it may: whether it took the request, nobody knows.
        tried = addresses[:_ADDRESSES_TRIED_MAX]
        for number, address in enumerate(tried, 1):
            try:
                made = await self._connect(target, address)
            except _Failed as error:
                if number == len(tried) or error.outcome == "tls":
                    raise
                continue
            return await self._ask(made, target, headers, body)
        raise AssertionError("there is always an address")

    def _kept(self, addresses: list[str]) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.address in addresses:
                return connection
            connection.close()
        return None

    async def _connect(self, target: Target, address: str) -> _Connection:
        secure = target.scheme == "https"
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                # The certificate is checked for the name, whatever address it was resolved to.
                reader, writer = await asyncio.open_connection(
                    address,
                    target.port,
                    ssl=self._tls if secure else None,
                    server_hostname=target.host if secure else None,
                )
        except TimeoutError:
            raise _Failed("timeout", "no connection in time") from None
        except ssl.SSLError as error:
            raise _Failed("tls", _tls_said(error)) from None
        except OSError:
            raise _Failed("unreachable", "no connection") from None
        return _Connection(address, reader, writer)

    async def _ask(
        self, connection: _Connection, target: Target, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, float]:
        all_headers = {
            "host": target.authority,
            "accept": "*/*",
            "accept-encoding": "identity",
            "user-agent": "token-ledger-webhooks",
            "content-length": str(len(body)),
            **headers,
        }
        reusable = False
        try:
            head = await connection.post(target.path, all_headers, body)
            reusable = await connection.finish()
        except ssl.SSLError as error:
            raise _Failed("tls", _tls_said(error)) from None
        except TimeoutError:
            raise
        except OSError as error:
            raise _Failed("unreachable", f"the connection broke ({type(error).__name__})") from None
        except (h11.RemoteProtocolError, h11.LocalProtocolError):
            # Without its text, which may quote what the receiver sent.
            raise _Failed("unreachable", "the connection ended, or what came is not HTTP") from None
        finally:
            if reusable and len(self._idle) < _IDLE_CONNECTIONS_MAX:
                self._idle.append(connection)
            else:
                connection.close()
        throttles = head.status_code in {429, 503}
        asked = next((value for name, value in head.headers if name == b"retry-after"), b"")
        return head.status_code, _retry_after(asked.decode("latin-1")) if throttles else 0.0

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


def _since(started: float) -> float:
    return time.perf_counter() - started


def outcome_of(status: int) -> Outcome:
    match status:
        case 410:
            return "gone"
        case 429:
            return "throttled"
        case _ if 200 <= status < 300:
            return "delivered"
        case _ if 300 <= status < 400:
            return "redirected"
        case _ if 400 <= status < 500:
            return "refused"
        case _:
            return "failed"


def _tls_said(error: ssl.SSLError) -> str:
    return f"TLS failed: {getattr(error, 'verify_message', '') or error.reason or type(error).__name__}"


def _retry_after(value: str) -> float:
    """Seconds or a date (RFC 9110 §10.2.3), at most an hour; 0 if it is neither."""
    if len(value) > 64:
        return 0.0
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value), RETRY_AFTER_SECONDS_MAX)
    try:
        moment = email.utils.parsedate_to_datetime(value).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return 0.0
    return min(max(0.0, moment - time.time()), RETRY_AFTER_SECONDS_MAX)


def trusted_certificates() -> ssl.SSLContext:
    """Those of SSL_CERT_FILE or SSL_CERT_DIR, which an operator with authorities of their own sets; else certifi's."""
    return httpx.create_ssl_context(verify=True, trust_env=True)
