"""Has the embedded nats-server let in the subscribers that the ledger has registered, and no others."""

from __future__ import annotations

import asyncio

import msgspec
import nats.errors
import structlog
from nats.aio.msg import Msg

from events.accounts import SUBSCRIBERS_CHANGED
from events.errors import LedgerError
from events.ledger import Ledger
from events.server import EmbeddedServer
from events.streams import Connection
from service.rules.subscribers import Subscriber
from service.subscribers import KEEP_SECONDS, ServerAnswer, all_states

log = structlog.get_logger()


class Admission:
    """Beside the embedded server, in the one process that may change it. `nc`: a connection of the role `admin`."""

    def __init__(self, server: EmbeddedServer, nc: Connection) -> None:
        self._server = server
        self._nc = nc
        self._ledger = Ledger(nc)
        self._admitted: dict[str, str] | None = None  # as the server has it; None before it was told once
        self._one_at_a_time = asyncio.Lock()

    async def serve(self) -> None:
        """From now on it answers `subscribers.changed`. Returns once that is heard."""
        await self._nc.subscribe(SUBSCRIBERS_CHANGED, cb=self._answer)
        await self._nc.flush()

    async def keep(self) -> None:
        """For ever: looks by itself what the ledger has, for what could not be taken over when it was asked."""
        told = ""
        while True:
            try:
                await self.admit()
                told = ""
            except LedgerError as error:
                if str(error) != told:
                    told = str(error)
                    log.error("subscribers_not_admitted", alarm=True, why=told, fix=error.fix)  # noqa: TRY400 - where it was raised says nothing
            except Exception:
                log.exception("subscribers_not_admitted", alarm=True)
            await asyncio.sleep(KEEP_SECONDS)

    async def admit(self) -> int:
        """Whoever is registered now is let in when this returns, and nobody else; how many. Raises: LedgerError."""
        async with self._one_at_a_time:
            wanted = {
                state.subscriber_id: state.public_key
                for state in await all_states(self._ledger)
                if isinstance(state, Subscriber) and state.public_key is not None
            }
            if wanted != self._admitted:
                await self._server.admit(self._nc, wanted)
                self._admitted = wanted
                log.info("subscribers_admitted", subscribers=len(wanted))
            return len(wanted)

    async def _answer(self, message: Msg) -> None:
        try:
            answer = ServerAnswer(admitted=await self.admit())
        except LedgerError as error:
            log.error("subscribers_not_admitted", alarm=True, why=str(error), fix=error.fix)  # noqa: TRY400 - as above
            answer = ServerAnswer(error=str(error))
        except Exception as error:
            log.exception("subscribers_not_admitted", alarm=True)
            answer = ServerAnswer(error=type(error).__name__)
        try:
            await message.respond(msgspec.json.encode(answer))
        except nats.errors.Error as error:
            log.warning("subscribers_change_unanswered", why=str(error))
