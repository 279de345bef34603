"""Sessions: a person who has signed in, in one browser. What the browser holds is an id and our signature of it."""

from __future__ import annotations

import asyncio
import hmac
from datetime import timedelta
from typing import Literal

from msgspec import Struct

from events.ledger import Append
from events.types import Reason
from projections.registry import Row, Session
from service.commands import execute, load_row, raw_id, subject
from service.endings import end_grants, left_behind
from service.grants import stamp
from service.incoming import Incoming
from service.rules.grants import Stamp
from service.rules.sessions import StartSession, decide_end, decide_leave, decide_start, is_live
from service.runtime import Runtime
from service.signin.browser import Cookie, drop_cookie, read_cookie, set_cookie
from service.signin.passwords import Proof
from service.signin.places import seal_place
from service.tokens import is_id, new_id, now

_COOKIE = "session"
Ended = Literal["signed_out", "admin"]

_SLICE = 256
_SLICES_MAX = 100_000
_AT_ONCE = 16
_ROUNDS_MAX = 20
_EVER = 2**63


async def session_of(runtime: Runtime, incoming: Incoming) -> Session | None:
    """The session that the browser is in, if it is one of ours and has not ended.

    Raises: Unavailable when the view is staler than its bound.
    """
    session_id = _opened(runtime, read_cookie(runtime, incoming, _COOKIE))
    if session_id is None:
        return None
    session = runtime.view.session(session_id)
    if session is None:
        # Begun a moment ago, perhaps on another host: we have signed it.
        await runtime.view_at_end()
        session = runtime.view.session(session_id)
    runtime.check_fresh(runtime.view.freshness())
    if session is None or not is_live(session, runtime.view.cut(session.user_id), now()):
        return None
    return session


async def begin(runtime: Runtime, incoming: Incoming, proof: Proof) -> tuple[Session, Cookie]:
    """A new session, in force on this host, in place of the one that the browser was in.

    Whoever else was signed in there is signed out by it, with all that ends by that. Of the same person, what was
    granted in the session before goes on until they sign out.

    Raises: Unavailable.
    """
    before = _opened(runtime, read_cookie(runtime, incoming, _COOKIE))
    mark = stamp(proof.user_id, incoming.request_id, events=2)
    command = StartSession(
        stamp=mark,
        session_id=new_id("ses"),
        user_id=proof.user_id,
        user_seq=proof.user_seq,
        methods=proof.methods,
        ttl=timedelta(seconds=runtime.settings.session_ttl_seconds),
        sealed_place=await seal_place(runtime, incoming, proof.user_id),
    )
    started = decide_start(command)
    ending = Stamp(mark.ids[1:], mark.at, mark.by, mark.request_id)

    async def load(fresh: bool) -> Session | None:
        if before is None:
            return None
        # The view keeps none for long that has expired.
        return await _load(runtime, before, fresh=fresh or runtime.view.session(before) is None)

    def entries(old: Session | None) -> list[Append]:
        new = Append(subject("session", started.session_id), started, 0)
        if old is None or old.user_id == proof.user_id:
            ended = decide_end(ending, old, "replaced")
        else:
            ended = decide_leave(ending, old)
        return [new, *(Append(subject("session", event.session_id), event, old.seq) for event in ended if old)]

    outcome = await execute(runtime, load, entries)
    await runtime.applied(outcome.seq)
    left = outcome.state
    if left is not None and left.user_id != proof.user_id and len(outcome.entries) > 1:
        belongs = left_behind(runtime, {left.session_id}, mark.at, outcome.seq)
        await end_grants(
            runtime, left.user_id, belongs, Reason.LOGOUT, by=proof.user_id, request_id=incoming.request_id
        )
    session = Session(
        started.session_id,
        started.user_id,
        started.auth_time,
        started.expires_at,
        started.methods,
        started.user_seq,
        outcome.seqs[0],
        sealed_place=started.sealed_place,
    )
    return session, set_cookie(runtime, _COOKIE, _signed(runtime, session.session_id))


async def end(runtime: Runtime, session: Session, reason: Ended, *, by: str, request_id: str | None = None) -> Cookie:
    """As `end_session`, and has the browser drop its cookie. Raises: Unavailable."""
    await end_session(runtime, session, reason, by=by, request_id=request_id)
    return drop_session(runtime)


def drop_session(runtime: Runtime) -> Cookie:
    """Has the browser forget which session it is in."""
    return drop_cookie(runtime, _COOKIE)


async def end_session(
    runtime: Runtime, session: Session, reason: Ended, *, by: str, request_id: str | None = None
) -> int:
    """Ends a session and what was granted in it, but for what is to last while the person is away.

    So it does with what is left of sessions of theirs that expired or were replaced. Returns the sequence of its end.
    A call that was cut off is completed by the next, or by `service/endings.py`.

    Raises: Unavailable.
    """
    seq = await _record_end(runtime, session.session_id, reason, by, request_id)
    await runtime.applied(seq)
    row = runtime.view.session(session.session_id) or session
    belongs = left_behind(runtime, {row.session_id}, row.ended_at or row.expires_at, row.seq)
    await end_grants(runtime, session.user_id, belongs, Reason.LOGOUT, by=by, request_id=request_id)
    return row.seq


class Everywhere(Struct, frozen=True):
    """How many sessions ended, and the sequence of the last end, 0 if there was none."""

    ended: int
    seq: int


async def end_everywhere(
    runtime: Runtime, user_id: str, reason: Ended, *, by: str, last: str | None = None, request_id: str | None = None
) -> Everywhere:
    """The same for all sessions of a user, those too that others began a moment ago or begin meanwhile.

    That with the id `last` comes last: who asks from it and is cut off can ask again. Raises: Unavailable.
    """
    ended = seq = 0
    for _ in range(_ROUNDS_MAX):
        await runtime.view_at_end()
        ids = [one.session_id for one in await standing(runtime, user_id) if one.session_id != last]
        if not ids:
            break
        ended, seq = ended + len(ids), max(seq, await _record_ends(runtime, ids, reason, by, request_id))
        await runtime.applied(seq)
    belongs = left_behind(runtime, {last} if last is not None else (), now(), _EVER)
    await end_grants(runtime, user_id, belongs, Reason.LOGOUT, by=by, request_id=request_id)
    if last is not None:
        ended, seq = ended + 1, max(seq, await _record_end(runtime, last, reason, by, request_id))
        await runtime.applied(seq)
        await end_grants(runtime, user_id, belongs, Reason.LOGOUT, by=by, request_id=request_id)
    return Everywhere(ended, seq)


async def standing(runtime: Runtime, user_id: str) -> list[Session]:
    """All sessions of a user that stand, as this host's view has them, oldest first. Others have their turn."""
    cut, moment = runtime.view.cut(user_id), now()
    found: list[Session] = []
    after: str | None = None
    for _ in range(_SLICES_MAX):
        rows = runtime.view.sessions_of(user_id, after=after, limit=_SLICE)
        found += [one for one in rows if is_live(one, cut, moment)]
        if len(rows) < _SLICE:
            break
        after = rows[-1].session_id
        await asyncio.sleep(0)
    return found


async def _record_ends(runtime: Runtime, ids: list[str], reason: Ended, by: str, request_id: str | None) -> int:
    seq = 0
    for start in range(0, len(ids), _AT_ONCE):
        some = ids[start : start + _AT_ONCE]
        seqs = await asyncio.gather(*(_record_end(runtime, one, reason, by, request_id) for one in some))
        seq = max(seq, *seqs)
    return seq


async def _record_end(runtime: Runtime, session_id: str, reason: Ended, by: str, request_id: str | None) -> int:
    mark = stamp(by, request_id)

    async def load(fresh: bool) -> Session | None:
        return await _load(runtime, session_id, fresh=fresh)

    def entries(row: Session | None) -> list[Append]:
        events = decide_end(mark, row, reason)
        return [Append(subject("session", event.session_id), event, row.seq) for event in events if row is not None]

    return (await execute(runtime, load, entries)).seq


async def _load(runtime: Runtime, session_id: str, *, fresh: bool) -> Session | None:
    row: Row | None = await load_row(
        runtime, "session", raw_id(session_id), subject("session", session_id), fresh=fresh
    )
    return row if isinstance(row, Session) else None


def _signed(runtime: Runtime, session_id: str) -> str:
    return f"{session_id}.{hmac.digest(runtime.master.sessions, session_id.encode(), 'sha256').hex()}"


def _opened(runtime: Runtime, value: str | None) -> str | None:
    """The session's id, if we have signed it."""
    session_id = (value or "").partition(".")[0]
    if value is None or not is_id(session_id, "ses"):
        return None
    return session_id if hmac.compare_digest(value.encode(), _signed(runtime, session_id).encode()) else None
