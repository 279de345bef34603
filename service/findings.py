"""Commands about findings of abuse: act on one, judge one. What is decided stands in `rules/findings.py`."""

from __future__ import annotations

import msgspec
import nats.errors
import structlog
from nats.aio.msg import Msg

from events.errors import LedgerError
from events.ledger import Append
from events.types import AbuseDetected, Reason
from projections.abuse.acting import ACT_SUBJECT, QUEUE, ActAnswer, ActRequest
from service.commands import execute, refused, subject
from service.errors import NotFound, ServiceError
from service.grants import revoke_grant, revoke_token, seal_text, stamp
from service.registry import Asker
from service.rules.findings import Finding, Judge, Judgement, Nothing, decide_act, decide_judge, finding_of
from service.runtime import Runtime
from service.tokens import is_id

log = structlog.get_logger()


def owner_of(found: AbuseDetected) -> str:
    """Under whose key what is said about the finding is sealed: whom it is about, else its own."""
    return found.subject or found.client_id or found.finding_id


async def load_finding(runtime: Runtime, finding_id: str) -> Finding | None:
    """The finding by the log itself. Raises: Unavailable."""
    if not is_id(finding_id, "fnd"):
        return None
    try:
        return finding_of(await runtime.ledger.read(subject("finding", finding_id)))
    except LedgerError as error:
        raise refused(error) from error


async def judge(runtime: Runtime, asker: Asker, finding_id: str, as_: Judgement, reason: str) -> int:
    """Acknowledges or dismisses; returns the sequence of the event. Raises: NotFound, Unavailable."""
    known = await load_finding(runtime, finding_id)
    if known is None:
        raise NotFound("there is no such finding")
    command = Judge(
        stamp=stamp(asker.by, asker.request_id),
        finding_id=finding_id,
        as_=as_,
        sealed_reason=await seal_text(runtime, owner_of(known.found), reason, "finding"),
    )

    async def load(_: bool) -> Finding | None:
        return await load_finding(runtime, finding_id)

    def decide(finding: Finding | None) -> list[Append]:
        events = decide_judge(command, finding)
        return [Append(subject("finding", finding_id), event, finding.seq) for event in events if finding]

    outcome = await execute(runtime, load, decide)
    await runtime.applied(outcome.seq)
    return outcome.seq


async def act(runtime: Runtime, finding_id: str) -> ActAnswer:
    """Does what follows from the finding, as the log has it. Repeated, it does nothing more. Raises: ServiceError."""
    what = decide_act(await load_finding(runtime, finding_id))
    if isinstance(what, Nothing):
        return ActAnswer(done=True, outcome=f"nothing to do: {what.why}")
    try:
        # The revocation names the finding in the place of the request that caused it.
        if what.token_id is not None:
            done = await revoke_token(runtime, "system", what.token_id, Reason.ABUSE, None, request_id=finding_id)
        else:
            done = await revoke_grant(runtime, "system", what.grant_id, Reason.ABUSE, None, request_id=finding_id)
    except NotFound:
        return ActAnswer(done=True, outcome="nothing to do: the token ended long ago")
    return ActAnswer(done=True, outcome="revoked", ledger_seq=done.seq)


async def serve_actions(runtime: Runtime) -> None:
    """From now on this worker does its part of what the analytics process asks for."""

    async def answer(message: Msg) -> None:
        try:
            request = msgspec.json.decode(message.data, type=ActRequest)
            reply = await act(runtime, request.finding_id)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            reply = ActAnswer(done=True, outcome=f"not understood: {error}")
        except ServiceError as error:
            reply = ActAnswer(done=False, outcome=error.detail)
        except Exception as error:
            log.exception("finding_not_acted_on", alarm=True)
            reply = ActAnswer(done=False, outcome=f"failed: {type(error).__name__}")
        try:
            await message.respond(msgspec.json.encode(reply))
        except nats.errors.Error as error:
            log.warning("finding_action_unanswered", error=str(error))

    await runtime.nc.subscribe(ACT_SUBJECT, queue=QUEUE, cb=answer)
