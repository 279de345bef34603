"""The rules of sessions and consents. Pure: ids and times come in, events come out."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Literal

from msgspec import Struct

from events.types import ConsentGiven, ConsentWithdrawn, SessionEnded, SessionStarted
from projections.registry import Consent, Cut, Session
from service.rules.grants import Stamp, head

Reason = Literal["signed_out", "replaced", "admin"]


def is_live(session: Session, cut: Cut | None, now: datetime) -> bool:
    """Whether the session still stands for its user, given what cut the user off, if anything did."""
    if session.ended_at is not None or now >= session.expires_at:
        return False
    return cut is None or not (cut.disabled or cut.seq > session.user_seq)


class StartSession(Struct, frozen=True, kw_only=True):
    """The stamp has two ids. `user_seq`: see SessionStarted."""

    stamp: Stamp
    session_id: str
    user_id: str
    user_seq: int
    methods: tuple[str, ...]
    ttl: timedelta
    sealed_place: bytes | None


def decide_start(command: StartSession) -> SessionStarted:
    """A session that begins now."""
    at = command.stamp.at
    return SessionStarted(
        **head(command.stamp),
        session_id=command.session_id,
        user_id=command.user_id,
        auth_time=at,
        expires_at=at + command.ttl,
        methods=command.methods,
        user_seq=command.user_seq,
        sealed_place=command.sealed_place,
    )


def decide_end(stamp: Stamp, session: Session | None, reason: Reason) -> list[SessionEnded]:
    """Nothing when there is none, or it has ended already."""
    if session is None or session.ended_at is not None or stamp.at >= session.expires_at:
        return []
    return [
        SessionEnded(**head(stamp), session_id=session.session_id, user_id=session.user_id, reason=reason),
    ]


def decide_leave(stamp: Stamp, session: Session) -> list[SessionEnded]:
    """Somebody else signs in where this person was: what they left there ends, though it had expired or was replaced.

    Nothing when they had signed out.
    """
    if session.reason in {"signed_out", "admin"}:
        return []
    return [
        SessionEnded(**head(stamp), session_id=session.session_id, user_id=session.user_id, reason="signed_out"),
    ]


def decide_give(stamp: Stamp, consent: Consent | None, user_id: str, client_id: str, scope: str) -> list[ConsentGiven]:
    """What was consented before and now, together. Nothing when all of it was."""
    before = consent.scope if consent is not None else ""
    both = " ".join(dict.fromkeys([*before.split(), *scope.split()]))
    if consent is not None and consent.scope == both and not _is_withdrawn(consent):
        return []
    return [ConsentGiven(**head(stamp), user_id=user_id, client_id=client_id, scope=both)]


def decide_withdraw(stamp: Stamp, consent: Consent | None) -> list[ConsentWithdrawn]:
    """Nothing when there is none, or it is withdrawn already."""
    if consent is None or _is_withdrawn(consent):
        return []
    return [ConsentWithdrawn(**head(stamp), user_id=consent.user_id, client_id=consent.client_id)]


def _is_withdrawn(consent: Consent) -> bool:
    return consent.withdrawn_seq == consent.seq
