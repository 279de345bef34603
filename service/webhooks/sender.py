"""One request to a receiver, which may do what it likes: hang, redirect, answer without end, be somebody else.

The request goes to an address that was looked at, while TLS checks the name. No redirect is followed, no proxy asked,
no cookie kept, nothing decompressed, and little of the answer is read.
"""

from __future__ import annotations

import asyncio
import email.utils
import ssl
import time
from collections.abc import Mapping
from typing import Literal

import httpx
from msgspec import Struct

from service.webhooks.addresses import Guard, NotCallable, NotResolved, Target

TOTAL_SECONDS_MAX = 15.0
CONNECT_SECONDS_MAX = 5.0
BODY_SECONDS_MAX = 1.0  # of the answer, once its status is known
BODY_BYTES_MAX = 16 * 1024
RETRY_AFTER_SECONDS_MAX = 3_600.0
CONNECTIONS_MAX = 8
_IDLE_CONNECTIONS_MAX = 2
_IDLE_SECONDS_MAX = 20.0
_ADDRESSES_TRIED_MAX = 3
_TIMEOUTS = {"connect": CONNECT_SECONDS_MAX, "read": TOTAL_SECONDS_MAX, "write": TOTAL_SECONDS_MAX, "pool": 5.0}

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


class Line:
    """The connections to one receiver. They are shared with no other: two names may have one address."""

    def __init__(self, guard: Guard, tls: ssl.SSLContext) -> None:
        self._guard = guard
        self._transport = httpx.AsyncHTTPTransport(
            verify=tls,
            trust_env=False,
            limits=httpx.Limits(
                max_connections=CONNECTIONS_MAX,
                max_keepalive_connections=_IDLE_CONNECTIONS_MAX,
                keepalive_expiry=_IDLE_SECONDS_MAX,
            ),
        )

    async def post(self, target: Target, headers: Mapping[str, str], body: bytes) -> Answer:
        """Sends, and says what came of it. Never raises but when it is cancelled."""
        started = time.perf_counter()
        try:
            async with asyncio.timeout(TOTAL_SECONDS_MAX):
                addresses = await self._guard.addresses(target)
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
        tried = addresses[:_ADDRESSES_TRIED_MAX]
        for number, address in enumerate(tried, 1):
            try:
                return await self._ask(target, address, headers, body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if number == len(tried):
                    raise _failure(error) from None
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
                raise _failure(error) from None
        raise AssertionError("there is always an address")

    async def _ask(self, target: Target, address: str, headers: Mapping[str, str], body: bytes) -> tuple[int, float]:
        literal = f"[{address}]" if ":" in address else address
        request = httpx.Request(
            "POST",
            f"{target.scheme}://{literal}:{target.port}{target.path}",
            headers={
                "host": target.authority,
                "accept": "*/*",
                "accept-encoding": "identity",
                "user-agent": "token-ledger-webhooks",
                **headers,
            },
            content=body,
            # The certificate is checked for the name, whatever address it was resolved to.
            extensions={"timeout": _TIMEOUTS, "sni_hostname": target.host},
        )
        response = await self._transport.handle_async_request(request)
        try:
            await _read_little(response)
        finally:
            await response.aclose()  # of an answer that was not read to its end, this closes the connection
        throttles = response.status_code in {429, 503}
        return response.status_code, _retry_after(response.headers.get("retry-after")) if throttles else 0.0

    async def close(self) -> None:
        await self._transport.aclose()


async def _read_little(response: httpx.Response) -> None:
    """What is read to the end leaves the connection usable. The status is known: what fails here changes nothing."""
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            async for part in response.stream:  # type: ignore[union-attr]  # of an asynchronous transport
                size += len(part)
                if size > BODY_BYTES_MAX:
                    return
    except (httpx.HTTPError, OSError, ValueError, TimeoutError):
        return


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


def _failure(error: Exception) -> _Failed:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            reason = getattr(cause, "verify_message", "") or cause.reason or type(cause).__name__
            return _Failed("tls", f"TLS failed: {reason}")
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.TimeoutException):
        return _Failed("timeout", "no connection in time" if isinstance(error, httpx.ConnectTimeout) else "no answer")
    if isinstance(error, httpx.ConnectError):
        return _Failed("unreachable", "no connection")
    if isinstance(error, httpx.RemoteProtocolError):
        # Without its text, which may quote what the receiver sent.
        return _Failed("unreachable", "the connection ended, or what came is not HTTP")
    return _Failed("unreachable", f"the connection broke ({type(error).__name__})")


def _retry_after(value: str | None) -> float:
    """Seconds or a date (RFC 9110 §10.2.3), at most an hour; 0 if it is neither."""
    if value is None or len(value) > 64:
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
