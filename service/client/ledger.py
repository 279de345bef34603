"""The ledger over HTTP, on connections that are kept."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import httpx
import msgspec
from msgspec import Struct

from .errors import LedgerClientError, NotAllowed, Refused, Unreachable
from .knowledge import lines_of
from .verdicts import Code

_ANSWER_BYTES_MAX = 4 * 1024 * 1024
QUESTIONS_MAX = 64  # about tokens, at once
_CONNECTIONS_MAX = 16


class Answer(Struct, frozen=True, gc=False):
    """What `POST /v1/tokens/validate` answers."""

    valid: bool
    code: Code
    ledger_seq: int
    token_id: str | None = None
    grant_id: str | None = None
    kind: str | None = None
    subject: str | None = None
    client_id: str | None = None
    scope: str | None = None
    audience: tuple[str, ...] = ()
    issued_at: datetime | None = None
    expires_at: datetime | None = None


class _Problem(Struct, frozen=True):
    code: str = ""
    detail: str = ""
    fix: str = ""


class _Recorded(Struct, frozen=True):
    recorded: int | None = None


_decode_recorded = msgspec.json.Decoder(_Recorded).decode
_decode_answer = msgspec.json.Decoder(Answer).decode
_decode_problem = msgspec.json.Decoder(_Problem).decode


class Ledger:
    """`token`: a bearer token of the ledger. `url`: where its API is.

    Questions about tokens, of which anybody can cause any number, have connections of their own: the feed, the keys
    and what is reported do not wait for them.
    """

    def __init__(self, url: str, token: str, *, seconds_max: float) -> None:
        def client(connections_max: int) -> httpx.AsyncClient:
            return httpx.AsyncClient(
                base_url=url,
                headers={
                    "authorization": f"Bearer {token}",
                    "accept-encoding": "identity",
                    "user-agent": "token-ledger",
                },
                timeout=httpx.Timeout(seconds_max),
                limits=httpx.Limits(max_connections=connections_max, max_keepalive_connections=connections_max),
            )

        self._http, self._questions = client(_CONNECTIONS_MAX), client(QUESTIONS_MAX)

    async def close(self) -> None:
        await self._http.aclose()
        await self._questions.aclose()

    async def keys(self) -> Any:
        """The key set. Raises: Unreachable, Refused."""
        body = await self._ask("GET", "/oauth2/jwks")
        try:
            return msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unreachable(f"the ledger's key set cannot be read: {error}") from error

    async def validate(self, request: dict[str, Any]) -> Answer:
        """Raises: Unreachable, Refused, NotAllowed."""
        body = await self._ask("POST", "/v1/tokens/validate", msgspec.json.encode(request), self._questions)
        try:
            return _decode_answer(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unreachable(f"the ledger's answer cannot be read: {error}") from error

    async def report(self, body: bytes) -> int | None:
        """How many of the uses were recorded; None if the answer does not say.

        Raises: Unreachable, Refused, NotAllowed; NotSent if nothing can have been recorded.
        """
        answer = await self._ask("POST", "/v1/uses", body)
        try:
            return _decode_recorded(answer).recorded
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unreachable(f"the ledger's answer cannot be read: {error}") from error

    async def acknowledge(self, subscriber_id: str, ledger_seq: int, feed: str) -> None:
        """Raises: Unreachable, Refused, NotAllowed."""
        path = f"/v1/subscribers/{subscriber_id}/acknowledgements"
        await self._ask("POST", path, msgspec.json.encode({"ledger_seq": ledger_seq, "feed": feed}))

    @contextlib.asynccontextmanager
    async def lines(self, path: str, **request: Any) -> AsyncIterator[AsyncIterator[bytes]]:
        """The lines of an answer, as they come. Raises: Unreachable, Refused, NotAllowed."""
        try:
            async with self._http.stream("GET", path, **request) as response:
                if response.status_code != 200:
                    raise _refusal(response, await _limited(response))
                yield lines_of(response.aiter_bytes())
        except httpx.HTTPError as error:
            raise _unreachable(error) from error

    async def _ask(
        self, method: str, path: str, body: bytes | None = None, http: httpx.AsyncClient | None = None
    ) -> bytes:
        headers = {"content-type": "application/json"} if body is not None else {}
        try:
            async with (http or self._http).stream(method, path, content=body, headers=headers) as response:
                data = await _limited(response)
        except httpx.HTTPError as error:
            raise _unreachable(error) from error
        if not response.is_success:
            raise _refusal(response, data)
        return data


class NotSent(Unreachable):
    """There was no connection: the ledger has not seen the request."""


def _unreachable(error: httpx.HTTPError) -> Unreachable:
    kind = NotSent if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout) else Unreachable
    return kind(f"the ledger cannot be reached: {str(error) or type(error).__name__}")


async def _limited(response: httpx.Response) -> bytes:
    parts, size = [], 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > _ANSWER_BYTES_MAX:
            raise Unreachable("the ledger's answer is too long")
        parts.append(part)
    return b"".join(parts)


def _refusal(response: httpx.Response, body: bytes) -> LedgerClientError:
    try:
        problem = _decode_problem(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        problem = _Problem(detail="an answer that is not the ledger's; is the address right?")
    if response.status_code in {401, 403}:
        fix = problem.fix or "give a token of the ledger with the scopes ledger:validate and ledger:subscribe"
        return NotAllowed(f"{response.status_code} {problem.detail}", fix=fix)
    return Refused(response.status_code, problem.code, problem.detail, fix=problem.fix)
