"""What was decided here, told to the ledger in blocks, so that its record of uses is whole."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections import deque
from datetime import UTC, datetime

import msgspec
from msgspec import Struct

from .clock import boot_seconds
from .errors import LedgerClientError, NotAllowed, Refused
from .ledger import Ledger, NotSent
from .verdicts import Context

BLOCK_USES = 500
_BLOCK_SECONDS = 1.0
_PAUSE_SECONDS_MAX = 10.0
# The ledger knows a block again for two minutes. After that it might record the block twice.
_REPEATED_SECONDS_MAX = 100.0
_CLOSE_SECONDS_MAX = 3.0
_BODY_BYTES_MAX = 400_000
_TEXT_CHARS_MAX = {"user_agent": 256, "path": 256, "method": 32, "ip": 45}
_SCOPE_CHARS_MAX = 1_000

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

    `lost`: how many had to be dropped so far. What was dropped is told with the next block.
    """

    def __init__(self, ledger: Ledger, *, waiting_max: int) -> None:
        self._ledger = ledger
        self._waiting: deque[Use] = deque()
        self._waiting_max = waiting_max
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._untold = 0
        self._block: _Block | None = None  # on its way, and again until the ledger has it
        self._repeated_since: float | None = None
        self.lost = 0
        self.reported = 0
        self.problem = ""

    @property
    def waiting(self) -> int:
        return len(self._waiting) + (len(self._block.uses) if self._block else 0)

    def record(self, use: Use) -> None:
        waiting = self._waiting
        count = len(waiting)
        if count >= self._waiting_max:
            self._drop(1)
            return
        waiting.append(use)
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
            while await self._tell():
                if not self.waiting:
                    break
            pause = min(_PAUSE_SECONDS_MAX, pause * 2) if self.problem else _BLOCK_SECONDS
            if self.problem:
                await asyncio.sleep(pause)

    async def close(self) -> None:
        """Tells of what is left, within seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS_MAX):
                while self.waiting and await self._tell():
                    pass
        self._drop(self.waiting)

    async def _tell(self) -> bool:
        """One block. Whether the ledger has it, or it was given up."""
        block = self._block = self._block or self._cut()
        if block is None:
            return True
        if self._repeated_since is not None and boot_seconds() - self._repeated_since > _REPEATED_SECONDS_MAX:
            self._give_up(block)
            return True
        try:
            await self._ledger.report(msgspec.json.encode(block))
        except NotSent as error:
            self.problem = str(error)  # surely not recorded, however long it takes
            return False
        except (NotAllowed, Refused) as error:
            self.problem = str(error)
            if isinstance(error, NotAllowed) or error.status >= 500 or error.status == 429:
                self._repeated_since = self._repeated_since or boot_seconds()
                return False
            self._give_up(block)
            return True
        except LedgerClientError as error:
            self.problem = str(error)
            self._repeated_since = self._repeated_since or boot_seconds()
            return False
        self.reported += len(block.uses)
        self._block, self._repeated_since, self.problem = None, None, ""
        return True

    def _give_up(self, block: _Block) -> None:
        self._drop(len(block.uses))
        with self._lock:
            self._untold += block.lost
        self._block, self._repeated_since = None, None

    def _cut(self) -> _Block | None:
        with self._lock:
            lost, self._untold = self._untold, 0
        uses: list[_Reported] = []
        size = 0
        while self._waiting and len(uses) < BLOCK_USES and size < _BODY_BYTES_MAX:
            use = _reported(self._waiting.popleft())
            uses.append(use)
            size += 400 + len(use.scope) + len(use.audience) + (600 if use.context else 0)
        if not uses and not lost:
            return None
        return _Block(secrets.token_hex(16), uses, lost)


def _reported(use: Use) -> _Reported:
    token_id, moment, outcome, scope, audience, context = use
    if context is not None:
        members = {
            name: value[:most]
            for name, most in _TEXT_CHARS_MAX.items()
            if (value := getattr(context, name)) is not None
        }
        context = Context(**members)
    occurred_at = datetime.fromtimestamp(moment, UTC)
    return _Reported(token_id, occurred_at, outcome, scope[:_SCOPE_CHARS_MAX], audience[:_SCOPE_CHARS_MAX], context)
