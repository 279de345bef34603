"""Ends what a client was given behind its own cut-off.

Its credentials are proven by a view that may not know yet that the client was revoked or disabled, and the token may
come to stand in the log behind that. The answer does not wait until a view can tell: this does, in the background, and
a token that should not be is good for some milliseconds.
"""

from __future__ import annotations

import asyncio

import structlog

from service.errors import ServiceError
from service.grants import revoke_grant
from service.runtime import Given, Runtime

log = structlog.get_logger()

_GATHER_SECONDS = 0.02  # so that many are looked at together
_RETRY_SECONDS = 0.5


async def keep_ending_given(runtime: Runtime) -> None:
    """For ever."""
    while True:
        given = [await runtime.given.get()]
        await asyncio.sleep(_GATHER_SECONDS)
        while not runtime.given.empty():
            given.append(runtime.given.get_nowait())
        try:
            await end_behind_cut_offs(runtime, given)
        except Exception:
            log.exception("given_not_looked_at", alarm=True)


async def end_behind_cut_offs(runtime: Runtime, given: list[Given]) -> int:
    """Looks at these, once the view has them, and returns how many were ended."""
    while not await runtime.waiter.applied(max(one.seq for one in given)):
        pass  # nothing is said from a view that is so far behind
    cuts = {client_id: runtime.view.cut(client_id) for client_id in {one.client_id for one in given}}
    ended = 0
    for one in given:
        cut = cuts[one.client_id]
        if cut is not None and (cut.disabled or cut.seq > one.client_seq):
            while True:
                try:
                    await revoke_grant(runtime, "system", one.grant_id, cut.reason, None, request_id=one.request_id)
                    break
                except ServiceError as error:
                    log.warning("token_behind_a_cut_off_not_ended", grant_id=one.grant_id, why=str(error))
                    await asyncio.sleep(_RETRY_SECONDS)
            ended += 1
    return ended
