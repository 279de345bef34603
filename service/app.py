"""The application of one API worker: the hot endpoints first, everything else by Litestar."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from events.errors import LedgerError, UnsafeServer
from service import asgi, metrics
from service.api import litestar_app, manage
from service.api.problems import render
from service.doors import forward_auth, validate, validate_batch
from service.endings import keep_finishing
from service.errors import MethodNotAllowed, Unavailable
from service.findings import serve_actions
from service.given import keep_ending_given
from service.incoming import Incoming
from service.keys import MasterKeyMismatch
from service.lifeline import on_stop
from service.oauth.authorize import authorize, authorize_by_post, consent
from service.oauth.cors import preflight, readable
from service.oauth.introspection import introspect
from service.oauth.metadata import jwks, metadata, well_known_paths
from service.oauth.pushed import push
from service.oauth.revocation import revoke
from service.oauth.token import token
from service.oauth.userinfo import userinfo
from service.outgoing import Response
from service.pages import account
from service.pages.render import assets, begin
from service.runtime import Runtime
from service.settings import Settings
from service.signin.doors import log_out, log_out_by_post, sign_in, sign_in_page, sign_out, sign_out_page
from service.subscribers import keep_consumers

log = structlog.get_logger()

Handler = Callable[[Runtime, Incoming], Awaitable[Response]]
Doors = dict[str, dict[str, Handler]]

_HEALTH = ("/health/live", "/health/ready", "/metrics")
_RETRY_SECONDS = 0.2
_START_SECONDS_MAX = 5.0


def _doors() -> Doors:
    """What is answered before Litestar is asked: handlers by path and method."""
    doors: Doors = {
        "/v1/tokens/validate": {"POST": validate},
        "/v1/tokens/validate-batch": {"POST": validate_batch},
        "/v1/forward-auth": {"GET": forward_auth},
        "/oauth2/introspect": {"POST": introspect},
        "/oauth2/authorize": {"GET": authorize, "POST": authorize_by_post},
        "/oauth2/consent": {"POST": consent},
        "/oauth2/logout": {"GET": log_out, "POST": log_out_by_post},
        "/sign-in": {"GET": sign_in_page, "POST": sign_in},
        "/sign-out": {"GET": sign_out_page, "POST": sign_out},
        "/": {"GET": account.home},
        "/account": {"GET": account.show},
        "/account/tokens": {"POST": account.issue},
        account.ISSUED: {"GET": account.show_issued},
        "/account/tokens/revoke": {"POST": account.revoke},
        "/account/apps/withdraw": {"POST": account.withdraw},
        "/account/sessions/end": {"POST": account.end_other_session},
        "/account/sign-out-everywhere": {"POST": account.sign_out_everywhere},
    }
    return doors | {path: {"GET": asset} for path, asset in assets().items()}


def _doors_for_apps(issuer: str) -> Doors:
    """The same for those that pages of any origin may ask and read; see `service/oauth/cors.py`."""
    doors: Doors = {
        "/oauth2/token": {"POST": token},
        "/oauth2/revoke": {"POST": revoke},
        "/oauth2/par": {"POST": push},
        "/oauth2/jwks": {"GET": jwks},
        "/oauth2/userinfo": {"GET": userinfo, "POST": userinfo},
    }
    return doors | {path: {"GET": metadata} for path in well_known_paths(issuer)}


class App:
    """Starts the runtime with the worker, and answers 503 until it stands, saying why."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._runtime: Runtime | None = None
        self._why_not = "the service is starting"
        self._starting: asyncio.Task[None] | None = None
        self._keeping: list[asyncio.Task[None]] = []
        metrics.bind(self.runtime)
        begin(settings.issuer)
        self._litestar = litestar_app(self.runtime)
        self._doors_for_apps = _doors_for_apps(settings.issuer)
        self._doors = _doors() | self._doors_for_apps
        # What is the same for everybody; other doors record who came, or show something once.
        self._for_anybody = {"/", "/oauth2/jwks", *well_known_paths(settings.issuer), *assets(), *_HEALTH}

    def runtime(self) -> Runtime:
        """What handlers work with. Raises: Unavailable until the worker has started."""
        if self._runtime is None:
            raise Unavailable(self._why_not)
        return self._runtime

    async def __rsgi__(self, scope: Any, protocol: Any) -> None:
        started = time.perf_counter()
        incoming = Incoming(scope, protocol)
        if incoming.method == "HEAD" and incoming.path in self._for_anybody:
            incoming.method = "GET"  # Granian sends no body then (RFC 9110 §9.3.2)
        door = self._doors.get(incoming.path)
        if door is None:
            await manage(self._litestar, incoming)
            return
        response = await self._answer(door, incoming)
        incoming.answer(response)
        metrics.request_done(incoming.path, incoming.method, response.status, time.perf_counter() - started)

    async def _answer(self, door: dict[str, Handler], incoming: Incoming) -> Response:
        for_apps = incoming.path in self._doors_for_apps
        methods = (*door, "OPTIONS") if for_apps else tuple(door)
        try:
            handler = door.get(incoming.method)
            if handler is not None:
                response = await handler(self.runtime(), incoming)
            elif incoming.method in methods:
                response = preflight(door)  # while the worker starts too: without it no page could read why it waits
            else:
                raise MethodNotAllowed(f"use {' or '.join(methods)}", headers={"Allow": ", ".join(methods)})
        except Exception as error:
            response = render(error, incoming)
        return readable(response) if for_apps else response

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The same over ASGI; see service/asgi.py."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            protocol = asgi.Protocol(receive, send)
            await self.__rsgi__(asgi.Scope(scope), protocol)
            await protocol.send_answer()

    async def _live(self, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.begin()
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.end()
                await send({"type": "lifespan.shutdown.complete"})
                return

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.run_until_complete(self.begin())

    def __rsgi_del__(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.run_until_complete(self.end())

    async def begin(self) -> None:
        """Until this ends the worker takes no connections, so that those which are ready get them.

        When the log is away for long it takes them all the same, and says why it cannot answer.
        """
        self._starting = asyncio.create_task(self._start())
        await asyncio.wait({self._starting}, timeout=_START_SECONDS_MAX)

    async def end(self) -> None:
        """Writes what is held and closes."""
        for task in (self._starting, *self._keeping):
            if task is not None:
                task.cancel()
        if self._runtime is not None:
            with contextlib.suppress(Exception):
                await self._runtime.stop()

    async def _start(self) -> None:
        """Tries until the log can be reached and is safe: a worker that comes up first waits for it."""
        told = ""
        while True:
            try:
                runtime = await Runtime.start(self.settings)
                await serve_actions(runtime)
                self._runtime = runtime
                on_stop(asyncio.get_running_loop(), runtime.stopping.set)
                self._keeping = [
                    asyncio.create_task(one(runtime)) for one in (keep_consumers, keep_finishing, keep_ending_given)
                ]
            except (LedgerError, MasterKeyMismatch) as error:
                self._why_not = f"the log cannot be used: {error}"
                if self._why_not != told:
                    told = self._why_not
                    level = log.error if isinstance(error, UnsafeServer | MasterKeyMismatch) else log.warning
                    level("api_worker_waits", pid=os.getpid(), why=str(error), fix=getattr(error, "fix", ""))
            except Exception:
                log.exception("api_worker_cannot_start", pid=os.getpid())
                raise
            else:
                log.info("api_worker_started", pid=os.getpid())
                return
            await asyncio.sleep(_RETRY_SECONDS)
