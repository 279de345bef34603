"""Tokens of the ledger checked in the process that needs to know, without asking the ledger for each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Coroutine, Sequence
from typing import Any, NoReturn, Protocol, Self

import msgspec
from msgspec import Struct

from .clock import boot_seconds
from .errors import LedgerClientError, NotAllowed, Refused
from .keys import COOL_DOWN_SECONDS, PublicKeys
from .knowledge import Knowledge
from .ledger import QUESTIONS_MAX, Answer, Ledger
from .offline import Offline, question_key
from .uses import Uses, sendable
from .verdicts import Asked, Context, Verdict

log = logging.getLogger("token_ledger")

_PAUSE_SECONDS = 0.05
_PAUSE_SECONDS_MAX = 1.0
_HEALTHY_SECONDS = 2.0
_ACKNOWLEDGED_SECONDS_MAX = 10.0
_START_POLL_SECONDS = 0.01
_CANCEL_AGAIN_SECONDS = 0.2
_REFERENCE_SECONDS_MAX = 3_600  # revocations are kept for longer than any answer counts
# Anybody can make up tokens that only the ledger can tell are none. They must leave room for those that are some.
_STRANGERS_MAX = QUESTIONS_MAX // 2
_UNKNOWN_SECONDS = 1.0
_UNKNOWN_MAX = 10_000


class Feed(Protocol):
    """A way to follow the revocations: `SseFeed` or `NatsFeed`."""

    @property
    def subscriber_id(self) -> str | None: ...

    async def follow(self, knowledge: Knowledge, ledger: Ledger) -> None:
        """Brings `knowledge` up to date and keeps it so, until something is wrong. Raises: LedgerClientError."""


class Status(Struct, frozen=True, kw_only=True):
    """How the validator stands. `age_seconds`: of what is known of revocations; `problem`: what is wrong, if anything.

    `uses_lost`: uses that were decided here and could not be told to the ledger.
    """

    fresh: bool
    age_seconds: float
    ledger_seq: int
    revocations: int
    snapshots: int
    key_fetches: int
    uses_waiting: int
    uses_reported: int
    uses_lost: int
    problem: str


class TokenValidator:
    """Checks tokens of one ledger for one resource server. An asynchronous context manager.

    `issuer`: the ledger's, exactly. `audience`: the names of this resource server; a token must be for one of them.
    `token`: a bearer token of the ledger with the scopes `ledger:validate` and `ledger:subscribe`.
    `stale_seconds_max`: a JWT is refused with the code `stale` while what is known of revocations is older than this.
    `reference_seconds_max`: how long an answer about a reference token counts unless the feed revokes it; 0: never.
    `tokens_max`: tokens that are remembered, of each kind. `api_url`: where the ledger is, if not at its issuer's URL.
    """

    def __init__(
        self,
        issuer: str,
        audience: str | Sequence[str],
        *,
        token: str,
        feed: Feed,
        api_url: str | None = None,
        stale_seconds_max: float = 5.0,
        reference_seconds_max: float = 10.0,
        tokens_max: int = 10_000,
        report_uses: bool = True,
        uses_waiting_max: int = 20_000,
        ask_seconds_max: float = 2.5,
        start_seconds_max: float = 10.0,
        key_cool_down_seconds: float = COOL_DOWN_SECONDS,
    ) -> None:
        self._audience = _names(audience)
        if not 0 < stale_seconds_max < float("inf"):
            raise ValueError("stale_seconds_max must be more than 0, and an end")
        if not 0 <= reference_seconds_max <= _REFERENCE_SECONDS_MAX:
            raise ValueError(f"reference_seconds_max must be between 0 and {_REFERENCE_SECONDS_MAX}")
        self._issuer = issuer
        self._url = api_url or issuer
        self._token = token
        self._feed = feed
        self._stale_seconds_max = stale_seconds_max
        self._reference_seconds_max = reference_seconds_max
        self._tokens_max = tokens_max
        self._report_uses = report_uses
        self._uses_waiting_max = uses_waiting_max
        self._ask_seconds_max = ask_seconds_max
        self._start_seconds_max = start_seconds_max
        self._key_cool_down_seconds = key_cool_down_seconds
        self._denied: NotAllowed | None = None
        self._asking = 0
        self._questions: dict[object, asyncio.Future[Verdict | None]] = {}
        self._unknown: dict[object, float] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def __getattr__(self, name: str) -> NoReturn:
        """Asked for only where there is no such attribute, as before the start."""
        if name in ("_offline", "_knowledge", "_uses"):
            raise LedgerClientError("the validator was not started", fix="use it inside `async with`")
        raise AttributeError(name)

    async def __aenter__(self) -> Self:
        """Waits until it can answer, `start_seconds_max` at most: then it answers `stale` until it can.

        Raises: NotAllowed if the ledger does not take the bearer token.
        """
        self._ledger = Ledger(self._url, self._token, seconds_max=self._ask_seconds_max)
        self._knowledge = Knowledge()
        self._keys = PublicKeys(self._ledger.keys, cool_down_seconds=self._key_cool_down_seconds)
        self._uses = Uses(self._ledger, waiting_max=self._uses_waiting_max)
        self._offline = Offline(
            self._knowledge,
            self._keys,
            self._uses if self._report_uses else None,
            issuer=self._issuer,
            audience=self._audience,
            stale_seconds_max=self._stale_seconds_max,
            tokens_max=self._tokens_max,
            reference_seconds_max=self._reference_seconds_max,
        )
        self._start(self._follow())
        self._start(self._keys.keep())
        self._start(self._uses.run())
        if self._feed.subscriber_id and not getattr(self._feed, "acknowledges", False):
            self._start(self._acknowledge(self._feed.subscriber_id))
        try:
            await self._ready()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work))

    async def _ready(self) -> None:
        deadline = boot_seconds() + self._start_seconds_max
        while (self._offline.stale or not self._keys.known) and boot_seconds() < deadline:
            if self._denied is not None:
                raise self._denied
            await asyncio.sleep(_START_POLL_SECONDS)

    async def _stop(self) -> None:
        running, self._tasks = set(self._tasks), []
        while running:
            # Again and again: `asyncio.wait_for` of Python 3.11, which the NATS client uses, swallows a cancellation
            # that meets the answer it waits for, and what follows the feed would follow it for ever.
            for task in running:
                task.cancel()
            _, running = await asyncio.wait(running, timeout=_CANCEL_AGAIN_SECONDS)
        try:
            await self._uses.close()
        finally:
            await self._ledger.close()

    async def validate(
        self,
        token: str,
        *,
        scope: str = "",
        audience: str | Sequence[str] | None = None,
        ip: str | None = None,
        context: Context | None = None,
    ) -> Verdict:
        """Whether the token is good here, now, for all of `scope`.

        `audience`: instead of the validator's own. `ip`: of who sent the token, for tokens that are bound to
        addresses; it may stand in `context`, too, which is kept for the record. Never raises for a bad token.

        Raises: ValueError for an audience that names nobody.
        """
        plain = audience is None and ip is None
        asked = Asked(scope, None, context) if plain else _asked(scope, audience, ip, context)
        return self._offline.check(token, asked) or await self._resolve(token, asked)

    def check(
        self,
        token: str,
        *,
        scope: str = "",
        audience: str | Sequence[str] | None = None,
        ip: str | None = None,
        context: Context | None = None,
    ) -> Verdict | None:
        """As `validate`, without waiting and from any thread: None if the ledger would have to be asked."""
        return self._offline.check(token, _asked(scope, audience, ip, context))

    async def _resolve(self, token: str, asked: Asked) -> Verdict:
        """What needs the ledger: a key that is not known, a reference token, a JWT close to a cut-off."""
        offline = self._offline
        if not token.startswith("tl_") and offline.lacks_key(token):
            try:
                await self._keys.fetch()
            except LedgerClientError as error:
                return self._unanswered(f"the ledger's keys cannot be fetched: {error}")
            verdict = offline.check(token, asked)
            if verdict is not None:
                return verdict
            if self._keys.failed or not self._keys.known:
                return self._unanswered("the ledger's keys could not be fetched")
        return await self._ask_once(token, asked)

    async def _ask_once(self, token: str, asked: Asked) -> Verdict:
        """Who asks what is being asked already waits for that answer."""
        key = question_key(token, asked)
        if self._unknown.get(key, 0.0) > boot_seconds():
            return Verdict(False, "unknown", self._knowledge.ledger_seq, True)
        asking = self._questions.get(key)
        if asking is None:
            asking = self._questions[key] = asyncio.get_running_loop().create_future()
            answer = None
            try:
                answer = await self._ask(token, asked)
            finally:
                del self._questions[key]
                asking.set_result(answer)
            if answer.code == "unknown":
                self._remember_unknown(key)
            return answer
        answer = await asyncio.shield(asking)
        if answer is None:  # whoever asked gave up
            return await self._ask_once(token, asked)
        # A use of its own, which is recorded here if the answer was kept, and by the ledger if not.
        verdict = self._offline.check(token, asked)
        if verdict is None and answer.code in {"unknown", "stale"}:
            verdict = answer
        return verdict or await self._ask(token, asked)

    def _remember_unknown(self, key: object) -> None:
        if len(self._unknown) >= _UNKNOWN_MAX:
            self._unknown.clear()
        self._unknown[key] = boot_seconds() + _UNKNOWN_SECONDS

    async def _ask(self, token: str, asked: Asked) -> Verdict:
        if self._asking >= (QUESTIONS_MAX if self._offline.seen(token, asked) else _STRANGERS_MAX):
            return self._unanswered("it is asked too much at once")
        self._asking += 1
        try:
            return await self._answer(token, asked)
        finally:
            self._asking -= 1

    async def _answer(self, token: str, asked: Asked) -> Verdict:
        offline = self._offline
        audience = self._audience if asked.audience is None else asked.audience
        request: dict[str, Any] = {"token": token, "min_seq": self._knowledge.ledger_seq, "audience": audience}
        if asked.scope:
            request["scope"] = asked.scope
        if asked.context is not None:
            request["context"] = sendable(asked.context)
        generation, asked_at = offline.generation, boot_seconds()
        try:
            answer = await self._ledger.validate(request)
        except Refused as error:
            if error.code == "too_many_requests":  # which the ledger says of tokens only that it does not know
                return Verdict(False, "unknown", self._knowledge.ledger_seq, False)
            return self._unanswered(str(error))
        except LedgerClientError as error:
            return self._unanswered(str(error))
        offline.keep(token, asked, answer, generation, asked_at)
        return _as_verdict(answer)

    def _unanswered(self, why: str) -> Verdict:
        return Verdict(False, "stale", self._knowledge.ledger_seq, False, detail=f"only the ledger can tell: {why}")

    def status(self) -> Status:
        """How it stands, for health checks and metrics."""
        knowledge, uses, stale = self._knowledge, self._uses, self._offline.stale
        return Status(
            fresh=not stale,
            age_seconds=knowledge.age_seconds,
            ledger_seq=knowledge.ledger_seq,
            revocations=len(knowledge.revoked),
            snapshots=knowledge.snapshots,
            key_fetches=self._keys.fetches,
            uses_waiting=uses.waiting,
            uses_reported=uses.reported,
            uses_lost=uses.lost,
            problem=self._offline.why_stale() if stale else knowledge.problem or uses.problem,
        )

    async def _follow(self) -> None:
        """Follows the feed again whenever it ends, as long as there is somebody who asks."""
        pause = _PAUSE_SECONDS
        while True:
            began = boot_seconds()
            try:
                await self._feed.follow(self._knowledge, self._ledger)
            except LedgerClientError as error:
                self._denied = error if isinstance(error, NotAllowed) else None
                self._failing(str(error))
            except Exception as error:
                log.exception("the feed of revocations cannot be followed")
                self._failing(f"{type(error).__name__}: {error}")
            # One that worked for a while is followed again at once.
            pause = _PAUSE_SECONDS if boot_seconds() - began > _HEALTHY_SECONDS else min(pause * 2, _PAUSE_SECONDS_MAX)
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - so that not all come at once

    def _failing(self, problem: str) -> None:
        if problem != self._knowledge.problem:
            log.warning("the feed of revocations is interrupted: %s", problem)
        self._knowledge.problem = problem

    async def _acknowledge(self, subscriber_id: str) -> None:
        """Tells the ledger what was applied, at once, and now and then that somebody is still there."""
        knowledge = self._knowledge
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ACKNOWLEDGED_SECONDS_MAX):
                    await knowledge.applied.wait()
            knowledge.applied.clear()
            if not knowledge.ledger_seq or knowledge.feed is None:
                continue
            try:
                await self._ledger.acknowledge(subscriber_id, knowledge.ledger_seq, knowledge.feed)
            except LedgerClientError as error:
                log.warning("the ledger does not take the acknowledgement of %s: %s", subscriber_id, error)
                await asyncio.sleep(_PAUSE_SECONDS_MAX)
            except Exception:
                log.exception("what was applied cannot be acknowledged")
                await asyncio.sleep(_PAUSE_SECONDS_MAX)


def _asked(scope: str, audience: str | Sequence[str] | None, ip: str | None, context: Context | None) -> Asked:
    if ip is not None:
        context = msgspec.structs.replace(context, ip=ip) if context else Context(ip)
    return Asked(scope, None if audience is None else _names(audience), context)


def _names(audience: str | Sequence[str]) -> tuple[str, ...]:
    """Raises: ValueError; if it named nobody, a token for anybody would do."""
    names = (audience,) if isinstance(audience, str) else tuple(audience)
    if not names or not all(names):
        raise ValueError("audience must name a resource server")
    return names


def _as_verdict(answer: Answer) -> Verdict:
    return Verdict(
        answer.valid,
        answer.code,
        answer.ledger_seq,
        False,
        answer.token_id,
        answer.grant_id,
        answer.kind,
        answer.subject,
        answer.client_id,
        answer.scope,
        answer.audience,
        answer.issued_at,
        answer.expires_at,
    )
