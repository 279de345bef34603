"""What was decided here, told to the ledger in blocks, so that its record of uses is whole."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import threading
from collections import deque
from datetime import UTC, datetime

import msgspec
from msgspec import Struct

from .clock import boot_seconds
from .errors import LedgerClientError, NotAllowed, Refused
from .ledger import Ledger, NotSent
from .verdicts import Context, address_of

log = logging.getLogger("token_ledger")

BLOCK_USES = 500
_BLOCK_SECONDS = 1.0
_PAUSE_SECONDS_MAX = 10.0
# The ledger knows a block again for two minutes. After that it might record the block twice.
_REPEATED_SECONDS_MAX = 100.0
_CLOSE_SECONDS_MAX = 3.0
_BODY_BYTES_MAX = 400_000
_AGENT_CHARS_MAX = _PATH_CHARS_MAX = 256
_METHOD_CHARS_MAX = 32
_SCOPE_CHARS_MAX = 1_000
_AUDIENCE_CHARS_MAX = 500
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*")  # RFC 6749 App. A.4

Use = tuple[str, float, str, str, str, Context | None]  # token id, time, outcome, scope, audience, context


class _Reported(Struct, frozen=True, omit_defaults=True):
    token_id: str
    occurred_at: datetime
    outcome: str
    scope: str = ""
    audience: str = ""
    context: Context | None = None


class _Block(Struct, frozen=True, omit_defaults=True):
    block_id: str
    uses: list[_Reported]
    lost: int = 0


class Uses:
    """Uses that wait to be told. `record` may be called from any thread and never waits.

    `lost`: how many had to be dropped so far, or are not on record. What was dropped is told with the next block.
    """

    def __init__(self, ledger: Ledger, *, waiting_max: int) -> None:
        self._ledger = ledger
        self._waiting: deque[Use] = deque()
        self._waiting_max = waiting_max
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._untold = 0
        self._blocks: deque[_Block] = deque()  # the first is on its way, and again until the ledger has it
        self._repeated_since: float | None = None
        self.lost = 0
        self.reported = 0
        self.problem = ""

    @property
    def waiting(self) -> int:
        return len(self._waiting) + sum(len(block.uses) for block in self._blocks)

    def record(self, use: Use) -> None:
        waiting = self._waiting
        count = len(waiting)
        if count >= self._waiting_max:
            self._drop(1)
            return
        # What waits is small, whatever a request held.
        token_id, moment, outcome, scope, audience, context = use
        context = context and sendable(context)
        waiting.append((token_id, moment, outcome, scope[:_SCOPE_CHARS_MAX], audience[:_AUDIENCE_CHARS_MAX], context))
        if count == BLOCK_USES:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._wake.set)

    def _drop(self, count: int) -> None:
        with self._lock:
            self.lost += count
            self._untold += count

    async def run(self) -> None:
        """Tells of them, every second or as soon as a block is full."""
        pause = _BLOCK_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            self._wake.clear()
            try:
                while await self._tell() and self.waiting:
                    pass
            except Exception as error:
                # Nothing that a request holds may stop the record of the others.
                log.exception("a block of uses cannot be reported")
                self._give_up(error)
                self.problem = f"uses cannot be reported: {type(error).__name__}: {error}"
            pause = min(_PAUSE_SECONDS_MAX, pause * 2) if self.problem else _BLOCK_SECONDS

    async def close(self) -> None:
        """Tells of what is left, within seconds."""
        try:
            async with asyncio.timeout(_CLOSE_SECONDS_MAX):
                while self.waiting and await self._tell():
                    pass
        except TimeoutError:
            self.problem = self.problem or "the ledger takes too long"
        except Exception as error:
            log.exception("uses cannot be reported")
            self.problem = f"{type(error).__name__}: {error}"
        if self.waiting:
            log.warning("%d uses are not on the ledger's record: %s", self.waiting, self.problem)
        self._drop(self.waiting)
        self._waiting.clear()
        self._blocks.clear()

    async def _tell(self) -> bool:
        """One block. Whether the ledger has it, or it was given up or cut in two."""
        if not self._blocks and (cut := self._cut()) is not None:
            self._blocks.append(cut)
        if not self._blocks:
            return True
        block = self._blocks[0]
        if self._repeated_since is not None and boot_seconds() - self._repeated_since > _REPEATED_SECONDS_MAX:
            self._give_up(self.problem)
            return True
        # From before it is sent: the ledger may have it though this process is stopped before the answer comes.
        since, self._repeated_since = self._repeated_since, self._repeated_since or boot_seconds()
        try:
            recorded = await self._ledger.report(msgspec.json.encode(block))
        except NotSent as error:
            self._repeated_since = since
            self.problem = str(error)  # surely not recorded, however long it takes
            return False
        except (NotAllowed, Refused) as error:
            self.problem = str(error)
            if isinstance(error, NotAllowed) or error.status >= 500 or error.status == 429:
                return False
            if len(block.uses) > 1:
                self._halve(block)
            else:
                self._give_up(error)
            return True
        except LedgerClientError as error:
            self.problem = str(error)
            return False
        self._next_block()
        self.problem = ""
        count = len(block.uses) if recorded is None else min(recorded, len(block.uses))
        self.reported += count
        if count < len(block.uses):
            log.warning("%d uses are not on the ledger's record: it refused them", len(block.uses) - count)
            self._drop(len(block.uses) - count)
        return True

    def _next_block(self) -> _Block | None:
        self._repeated_since = None
        return self._blocks.popleft() if self._blocks else None

    def _halve(self, block: _Block) -> None:
        """Something in it is refused: the rest is not lost for it."""
        self._next_block()
        half = len(block.uses) // 2
        self._blocks.appendleft(_Block(secrets.token_hex(16), block.uses[half:]))
        self._blocks.appendleft(_Block(secrets.token_hex(16), block.uses[:half], block.lost))

    def _give_up(self, why: object) -> None:
        block = self._next_block()
        if block is not None:
            log.warning("%d uses are not on the ledger's record: %s", len(block.uses), why)
            self._drop(len(block.uses))
            with self._lock:
                self._untold += block.lost

    def _cut(self) -> _Block | None:
        with self._lock:
            lost, self._untold = self._untold, 0
        uses: list[_Reported] = []
        size = 0
        while self._waiting and len(uses) < BLOCK_USES and size < _BODY_BYTES_MAX:
            try:
                use = _reported(self._waiting.popleft())
            except Exception:
                log.exception("a use cannot be reported")
                self._drop(1)
                continue
            uses.append(use)
            size += len(msgspec.json.encode(use))
        if not uses and not lost:
            return None
        return _Block(secrets.token_hex(16), uses, lost)


def _reported(use: Use) -> _Reported:
    """As the ledger takes it: what it would refuse is left out, so that the use itself is recorded."""
    token_id, moment, outcome, scope, audience, context = use
    scope = " ".join(scope.split())
    return _Reported(
        token_id,
        datetime.fromtimestamp(moment, UTC),
        outcome,
        scope if _SCOPE.fullmatch(scope) else "",
        _text(audience, _AUDIENCE_CHARS_MAX) or "",
        context,
    )


def sendable(context: Context) -> Context:
    """As the ledger takes it, whatever a request held."""
    return Context(
        address_of(str(context.ip)) if context.ip else None,
        _text(context.user_agent, _AGENT_CHARS_MAX),
        _text(context.method, _METHOD_CHARS_MAX),
        _text(context.path and context.path.partition("?")[0], _PATH_CHARS_MAX),
    )


def _text(text: str | None, chars_max: int) -> str | None:
    """Cut, and without what has no UTF-8."""
    return text and text[:chars_max].encode(errors="replace").decode()
