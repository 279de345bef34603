"""The same for programs that are not asynchronous."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Sequence
from typing import Any, Self

from .errors import LedgerClientError
from .validator import Status, TokenValidator
from .verdicts import Context, Verdict

_ANSWER_SECONDS_MAX = 10.0


class SyncTokenValidator:
    """A `TokenValidator` with a thread of its own; takes the same arguments. A context manager, for any thread.

    What can be decided without the ledger is decided in the thread that asks. Start it after a fork, not before.
    """

    def __init__(self, issuer: str, audience: str | Sequence[str], **options: Any) -> None:
        self._validator = TokenValidator(issuer, audience, **options)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """As `TokenValidator.__aenter__`. Raises: NotAllowed."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name="token-ledger", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._validator.__aenter__(), self._loop).result()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._loop is not None:
                asyncio.run_coroutine_threadsafe(self._validator.__aexit__(), self._loop).result()
        finally:
            self._end()

    @staticmethod
    def _run(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def _end(self) -> None:
        loop, thread = self._loop, self._thread
        self._loop = self._thread = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def validate(
        self,
        token: str,
        *,
        scope: str = "",
        audience: str | Sequence[str] | None = None,
        ip: str | None = None,
        context: Context | None = None,
    ) -> Verdict:
        """As `TokenValidator.validate`. Raises: LedgerClientError if the validator is not running."""
        if self._loop is None:
            raise LedgerClientError("the validator is not running", fix="use it inside `with`")
        verdict = self._validator.check(token, scope=scope, audience=audience, ip=ip, context=context)
        if verdict is not None:
            return verdict
        asked = self._validator.validate(token, scope=scope, audience=audience, ip=ip, context=context)
        future = asyncio.run_coroutine_threadsafe(asked, self._loop)
        try:
            return future.result(_ANSWER_SECONDS_MAX)
        except concurrent.futures.TimeoutError:
            future.cancel()
            seq = self._validator.status().ledger_seq
            return Verdict(False, "stale", seq, False, detail="only the ledger can tell, and it took too long")

    def status(self) -> Status:
        """How it stands."""
        return self._validator.status()
