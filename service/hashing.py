"""People's passwords: Argon2id (RFC 9106), beside the event loop and few at once, since one hash takes 64 MiB.

However they were entered, they are hashed and compared as `prepared` has them; but for those that were hashed before
there was such a thing, which are compared as they were entered.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from typing import Any

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from service.errors import Unavailable
from service.rules.passwords import prepared

_CHECKED_WAITING_MAX = 64
_PREPARED = "prepared:"  # before the hash of a password that was
_MADE_WAITING_MAX = 16  # places of their own, so that no crowd of sign-ins keeps users from being managed


class _Places:
    def __init__(self, number: int) -> None:
        self.number = number
        self.taken = 0


class Hashing:
    """`done`: hashes that were computed, to be made or to be compared."""

    def __init__(self, hasher: PasswordHasher) -> None:
        self.done = 0
        self._hasher = hasher
        self._nobodys = _nobodys(hasher)
        self._one_at_a_time = asyncio.Semaphore(1)
        self._checked = _Places(_CHECKED_WAITING_MAX)
        self._made = _Places(_MADE_WAITING_MAX)

    async def make(self, password: str) -> str:
        """Raises: Unavailable when too many wait."""
        hashed: str = await self._beside(self._made, self._hasher.hash, prepared(password))
        return _PREPARED + hashed

    async def matches(self, hashed: str | None, password: str) -> bool:
        """Whether it is the password of this hash. None is nobody's, and takes as much work as another's.

        Raises: Unavailable when too many wait.
        """
        entered = password if hashed is not None and not hashed.startswith(_PREPARED) else prepared(password)
        known = hashed.removeprefix(_PREPARED) if hashed is not None else self._nobodys
        matches: bool = await self._beside(self._checked, self._verify, known, entered)
        return matches and hashed is not None

    def _verify(self, hashed: str, password: str) -> bool:
        try:
            return self._hasher.verify(hashed, password)
        except (VerificationError, InvalidHashError):
            return False

    async def _beside(self, places: _Places, work: Any, *arguments: str) -> Any:
        if places.taken >= places.number:
            raise Unavailable("too many passwords are being checked at this moment", retry_after_seconds=5)
        places.taken += 1
        try:
            async with self._one_at_a_time:
                # Whoever asks may go away: the thread works on, and nobody else may begin meanwhile.
                working = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
                try:
                    return await asyncio.shield(working)
                except asyncio.CancelledError:
                    await asyncio.wait({working})
                    raise
                finally:
                    self.done += 1
        finally:
            places.taken -= 1


def _nobodys(hasher: PasswordHasher) -> str:
    """A hash of no password, with the hasher's parameters: to compare with it costs what comparing always costs."""
    salt, tag = (
        base64.b64encode(secrets.token_bytes(length)).decode().rstrip("=")
        for length in (hasher.salt_len, hasher.hash_len)
    )
    parameters = f"m={hasher.memory_cost},t={hasher.time_cost},p={hasher.parallelism}"
    return f"$argon2id$v=19${parameters}${salt}${tag}"


passwords = Hashing(PasswordHasher())
