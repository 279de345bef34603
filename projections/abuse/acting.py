"""How the analytics process asks the service to act on a finding, and what it is told. Both are JSON over NATS.

The request names a finding and no more: what is to be done, the service reads from the log itself.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct
from nats.aio.client import Client

ACT_SUBJECT = "findings.act"
QUEUE = "findings"  # one worker of all gets it
_SECONDS = 10.0


class ActRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    finding_id: str


class ActAnswer(Struct, frozen=True, kw_only=True):
    """`done`: there is nothing (more) to do; else it is to be asked again. `outcome` is for people."""

    done: bool
    outcome: str
    ledger_seq: int | None = None


async def act_on(nc: Client, request: ActRequest) -> ActAnswer:
    """Asks any worker. Raises: nats.errors.Error or TimeoutError if none answers."""
    reply = await nc.request(ACT_SUBJECT, msgspec.json.encode(request), timeout=_SECONDS)
    return msgspec.json.decode(reply.data, type=ActAnswer)
