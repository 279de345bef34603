"""ASGI middleware, for Litestar, Starlette and whatever else speaks ASGI. Source: RFC 6750 §2.1 and §3."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from .validator import TokenValidator
from .verdicts import Context, Verdict, address_of

Scope = Any  # frameworks have types of their own for these three
Receive = Any
Send = Any
_Asgi = tuple[Scope, Receive, Send]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
VERDICT = "token_ledger"  # where the verdict stands in the ASGI scope

_SCHEME = "bearer"
_POLICY_VIOLATION = 1008


class TokenValidatorMiddleware:
    """Lets in whose token is good; the verdict stands in `scope["token_ledger"]`.

    `needs`: the scope that is needed, or what says it for an ASGI scope. `open_paths`: paths that need no token.

        Litestar(..., middleware=[DefineMiddleware(TokenValidatorMiddleware, validator=validator)])
        Starlette(..., middleware=[Middleware(TokenValidatorMiddleware, validator=validator)])
    """

    def __init__(
        self,
        app: App,
        validator: TokenValidator,
        *,
        needs: str | Callable[[Scope], str] = "",
        open_paths: Collection[str] = (),
        realm: str = "token-ledger",
    ) -> None:
        if '"' in realm or "\\" in realm:
            raise ValueError("the realm may hold no quotes and backslashes")
        self._app = app
        self._validator = validator
        self._needs = needs
        self._open_paths = frozenset(open_paths)
        self._realm = realm

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in {"http", "websocket"} or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        to = (scope, receive, send)
        values = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if not values:
            await self._refuse(to, 401, "", "a bearer token is needed")
            return
        scheme, _, token = values[0].decode("latin-1").partition(" ")
        token = token.strip(" ")
        if len(values) > 1 or (scheme.lower() == _SCHEME and (not token or " " in token)):
            await self._refuse(to, 400, "invalid_request", "send one bearer token")
            return
        if scheme.lower() != _SCHEME:
            await self._refuse(to, 401, "", "a bearer token is needed")
            return
        needs = self._needs if isinstance(self._needs, str) else self._needs(scope)
        verdict = await self._validator.validate(token, scope=needs, context=_context(scope))
        if verdict.valid:
            scope[VERDICT] = verdict
            await self._app(scope, receive, send)
            return
        await self._refuse_for(verdict, needs, to)

    async def _refuse_for(self, verdict: Verdict, needs: str, to: _Asgi) -> None:
        if verdict.code == "stale":
            await self._refuse(to, 503, "", "tokens cannot be checked at the moment")
        elif verdict.code == "insufficient_scope":
            await self._refuse(to, 403, "insufficient_scope", "the token lacks a scope", needs)
        else:
            # One text for every cause: whoever holds a bad token learns nothing about it.
            await self._refuse(to, 401, "invalid_token", "the access token is not valid")

    async def _refuse(self, to: _Asgi, status: int, error: str, text: str, needs: str = "") -> None:
        scope, receive, send = to
        if scope["type"] == "websocket":
            await receive()  # the request to connect; a close before it is accepted is a 403
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": text})
            return
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        else:
            challenge = f'Bearer realm="{self._realm}"'
            if error:
                challenge += f', error="{error}", error_description="{text}"'
            if needs:
                challenge += f', scope="{needs}"'
            headers.append((b"www-authenticate", challenge.encode()))
        code = "temporarily_unavailable" if status == 503 else error or "unauthorized"
        body = json.dumps({"error": code, "error_description": text}).encode()
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _context(scope: Scope) -> Context:
    client = scope.get("client")
    agent = next((value for name, value in scope["headers"] if name.lower() == b"user-agent"), None)
    return Context(
        address_of(client[0]) if client else None,
        agent.decode("latin-1") if agent else None,
        scope.get("method"),
        scope["path"],
    )
