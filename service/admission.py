"""Has the embedded nats-server let in the subscribers that the ledger has registered, and no others."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import msgspec
import nats.errors
import structlog
from msgspec import Struct
from nats.aio.msg import Msg

from events.accounts import SUBSCRIBER_CONNECTIONS_MAX, SUBSCRIBERS_CHANGED, SUBSCRIBERS_CONNECTED
from events.errors import LedgerError, LedgerUnavailable
from events.ledger import Ledger
from events.server import EmbeddedServer
from events.streams import Connection
from service import logs
from service.rules.subscribers import Subscriber
from service.subscribers import KEEP_SECONDS, ServerAnswer, all_states

log = structlog.get_logger()

CONNECTIONS_EACH_MAX = 64  # of one subscriber: the server limits only those of all together
SHUT_OUT_SECONDS = 300.0
_ANSWER_SECONDS_MAX = 5.0
_ASK_CONNECTIONS = b'{"auth":true,"limit":%d}' % (2 * SUBSCRIBER_CONNECTIONS_MAX)


class _Connection(Struct):
    authorized_user: str = ""


class _Connections(Struct):
    connections: list[_Connection] | None = None


class _Answer(Struct):
    """Of CONNZ, as far as it matters here."""

    data: _Connections


_decode_answer = msgspec.json.Decoder(_Answer).decode


class Admission:
    """Beside the embedded server, in the one process that may change it. `nc`: a connection of the role `admin`."""

    def __init__(self, server: EmbeddedServer, nc: Connection) -> None:
        self._server = server
        self._nc = nc
        self._ledger = Ledger(nc)
        self._admitted: dict[str, str] | None = None  # as the server has it; None before it was told once
        self._shut_out: dict[
            str, float
        ] = {}  # subscribers with too many connections, and the monotonic time until when
        self._one_at_a_time = asyncio.Lock()

    async def serve(self) -> None:
        """From now on it answers `subscribers.changed`. Returns once that is heard."""
        await self._nc.subscribe(SUBSCRIBERS_CHANGED, cb=self._answer)
        await self._nc.flush()

    async def keep(self) -> None:
        """For ever: looks by itself what the ledger has, for what could not be taken over when it was asked.

        Whoever takes so many connections that others could get none is shut out for a while.
        """
        told = ""
        while True:
            try:
                await self.admit()
                if await self._shut_out_greedy():
                    await self.admit()
                told = ""
            except LedgerError as error:
                if str(error) != told:
                    told = str(error)
                    logs.alarm("subscribers_not_admitted", error)
            except Exception:
                log.exception("subscribers_not_admitted", alarm=True)
            await asyncio.sleep(KEEP_SECONDS)

    async def admit(self) -> int:
        """Whoever is registered now is let in when this returns, and nobody else; how many. Raises: LedgerError."""
        async with self._one_at_a_time:
            wanted = {
                state.subscriber_id: state.public_key
                for state in await all_states(self._ledger)
                if isinstance(state, Subscriber)
                and state.public_key is not None
                and time.monotonic() >= self._shut_out.get(state.subscriber_id, 0.0)
            }
            if wanted != self._admitted:
                await self._server.admit(self._nc, wanted)
                self._admitted = wanted
                log.info("subscribers_admitted", subscribers=len(wanted))
            return len(wanted)

    async def _shut_out_greedy(self) -> bool:
        """Whether there is one more to be. Raises: LedgerUnavailable."""
        try:
            reply = await self._nc.request(SUBSCRIBERS_CONNECTED, _ASK_CONNECTIONS, timeout=_ANSWER_SECONDS_MAX)
            connections = _decode_answer(reply.data).data.connections or []
        except (nats.errors.Error, TimeoutError, OSError, msgspec.DecodeError) as error:
            raise LedgerUnavailable(f"the server does not say who is connected: {error}") from error
        now, counts = time.monotonic(), Counter(one.authorized_user for one in connections)
        greedy = {name for name, key in (self._admitted or {}).items() if counts[key] > CONNECTIONS_EACH_MAX}
        self._shut_out = {name: until for name, until in self._shut_out.items() if until > now}
        for name in greedy:
            self._shut_out[name] = now + SHUT_OUT_SECONDS
            log.error(
                "subscriber_shut_out",
                alarm=True,
                subscriber=name,
                why=f"it had more than {CONNECTIONS_EACH_MAX} connections",
                seconds=SHUT_OUT_SECONDS,
                fix="mend what opens them; `token-ledger subscriber delete` ends it for good",
            )
        return bool(greedy)

    async def _answer(self, message: Msg) -> None:
        try:
            answer = ServerAnswer(admitted=await self.admit())
        except LedgerError as error:
            logs.alarm("subscribers_not_admitted", error)
            answer = ServerAnswer(error=str(error))
        except Exception as error:
            log.exception("subscribers_not_admitted", alarm=True)
            answer = ServerAnswer(error=type(error).__name__)
        try:
            await message.respond(msgspec.json.encode(answer))
        except nats.errors.Error as error:
            log.warning("subscribers_change_unanswered", why=str(error))
