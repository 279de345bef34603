"""Given what happened to a grant, when its code is presented, then this becomes of it."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import reduce
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from msgspec.structs import replace

from events.types import (
    ClientDisabled,
    ClientRevoked,
    CodeRedeemed,
    CodeRefused,
    CodeReplayed,
    ConsentGiven,
    ConsentWithdrawn,
    GrantRevoked,
    Kind,
    LedgerEvent,
    Reason,
    Recorded,
    SessionEnded,
    SessionStarted,
    SubjectRevoked,
    UserDisabled,
    UserPasswordChanged,
)
from projections import grants, registry
from projections.grants import EMPTY, AuthorizedGrant, RevokedGrant
from projections.registry import Consent, Cut, Session
from service.errors import InvalidGrant, InvalidRequest
from service.rules.codes import (
    RACE,
    Authorize,
    Exchange,
    Fresh,
    Redeem,
    Refused,
    Replayed,
    Spent,
    challenge_of,
    check_verifier,
    decide_authorize,
    decide_redeem,
    judge_code,
    judge_replay,
)
from service.rules.grants import Person, Stamp
from tests.making import (
    CODE_CHALLENGE,
    CODE_VERIFIER,
    DAY,
    START,
    History,
    after,
    authorized,
    cli,
    grt,
    head,
    minted,
    redeemed,
    ses,
    tok,
    usr,
)

G, CODE = grt(1), tok(1)
REDIRECT_URI = "https://shop.example/back"
NOW = after(10)

GRANTED = authorized(G, CODE, session_id=ses(1))
OFFLINE = authorized(G, CODE, session_id=ses(1), offline=True)
REDEEMED = redeemed(G, CODE, minted(tok(2)))
WRONG = CodeRefused(**head(), grant_id=G, code_id=CODE, cause="verifier")
TOKENS = (minted(tok(3)), minted(tok(4), Kind.REFRESH))
SIGNED_IN = SessionStarted(
    **head(), session_id=ses(1), user_id=usr(1), auth_time=START, expires_at=START + DAY, methods=("pwd",), user_seq=0
)


class Given:
    """The state after these events, a second apart."""

    def __init__(self, *events: LedgerEvent) -> None:
        history = History(*events)
        self.grant = reduce(grants.evolve, history.recorded, EMPTY).grant
        self.cuts: dict[str, Cut] = {}
        consent = session = None
        for recorded in history.recorded:
            found = registry.cut(None, recorded)
            if found is not None:
                self.cuts[found[0]] = found[1]
            if ".consent." in recorded.subject:
                consent = registry.evolve(consent, recorded)
            if ".session." in recorded.subject:
                session = registry.evolve(session, recorded)
        assert consent is None or isinstance(consent, Consent)
        assert session is None or isinstance(session, Session)
        self.person = Person(consent, session, self.cuts.get(usr(1)))

    def when(self, at: datetime = NOW, *, clock: datetime | None = None, **changes: Any) -> Fresh | Refused | Replayed:
        """`at`: by the log's clock. `clock`: what the host's says then, the same unless given."""
        command = presented(clock or at, **changes)
        judged = judge_code(
            command,
            self.grant,
            client_cut=self.cuts.get(cli(1)),
            subject_cut=self.cuts.get(usr(1)),
            person=self.person,
        )
        return judge_replay(command, judged, at) if isinstance(judged, Spent) else judged


def presented(at: datetime = NOW, **changes: Any) -> Redeem:
    proofs = {"client_id": cli(1), "redirect_uri": REDIRECT_URI, "code_verifier": CODE_VERIFIER} | changes
    return Redeem(stamp=Stamp(("id1", "id2"), at, cli(1), "req"), grant_id=G, **proofs)


def fields(at: datetime = NOW, number: int = 1, by: str = cli(1)) -> dict[str, Any]:
    return {"id": f"id{number}", "occurred_at": at, "by": by, "request_id": "req"}


def revoked(reason: Reason, at: datetime = NOW) -> GrantRevoked:
    return GrantRevoked(**fields(at, 2, "system"), grant_id=G, reason=reason)


# The verifier


def test_challenge_is_that_of_the_rfc() -> None:
    """RFC 7636 App. B."""
    assert challenge_of("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk") == "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"
    assert challenge_of(CODE_VERIFIER) == CODE_CHALLENGE


@pytest.mark.parametrize("verifier", ["a" * 43, "a" * 128, "-._~" * 11])
def test_verifier_of_the_right_form_is_taken(verifier: str) -> None:
    check_verifier(verifier)


@pytest.mark.parametrize("verifier", ["", "a" * 42, "a" * 129, "a" * 42 + "+", "a" * 43 + "\n", "\u00e4" * 43])
def test_verifier_of_another_form_is_refused(verifier: str) -> None:
    with pytest.raises(InvalidRequest):
        check_verifier(verifier)


# A code that is good


def test_authorization_begins_a_grant_that_waits_for_its_code() -> None:
    event = decide_authorize(
        Authorize(
            stamp=Stamp(("id1",), NOW, usr(1), "req"),
            **{name: getattr(GRANTED, name) for name in Authorize.__struct_fields__ if name != "stamp"},
        )
    )
    assert {name: getattr(event, name) for name in ("by", "subject", "client_id")} == {
        "by": usr(1),
        "subject": usr(1),
        "client_id": cli(1),
    }
    assert isinstance(Given(event).grant, AuthorizedGrant)


@pytest.mark.parametrize(
    "at", [START, after(59.999), after(-30)], ids=["at once", "in the last moment", "clock behind"]
)
def test_code_with_its_proofs_may_be_redeemed(at: datetime) -> None:
    judged = Given(GRANTED).when(at)
    assert isinstance(judged, Fresh)
    assert (judged.by_code.code_id, judged.grant.becomes.subject) == (CODE, usr(1))


def test_redemption_spends_the_code_for_the_tokens() -> None:
    judged = Given(GRANTED).when()
    assert isinstance(judged, Fresh)
    exchange = Exchange(tokens=TOKENS, refresh_idle_ttl_seconds=60, refresh_ends_at=START + DAY)
    assert decide_redeem(presented(), judged, exchange) == CodeRedeemed(
        **fields(),
        grant_id=G,
        code_id=CODE,
        tokens=TOKENS,
        refresh_idle_ttl_seconds=60,
        refresh_ends_at=START + DAY,
    )


# One that is not


@pytest.mark.parametrize("at", [after(60), after(3600)], ids=["as it expires", "long after"])
def test_expired_code_is_refused_and_nothing_happens(at: datetime) -> None:
    with pytest.raises(InvalidGrant):
        Given(GRANTED).when(at)
    with pytest.raises(InvalidGrant):
        Given(GRANTED).when(at, code_verifier="w" * 43)


@pytest.mark.parametrize("events", [(GRANTED,), (GRANTED, REDEEMED)], ids=["fresh", "spent"])
def test_another_client_changes_nothing(events: tuple[LedgerEvent, ...]) -> None:
    for wrong in ({}, {"code_verifier": "w" * 43}, {"redirect_uri": "https://other.example"}):
        with pytest.raises(InvalidGrant):
            Given(*events).when(client_id=cli(2), **wrong)


WRONG_PROOFS = {
    "verifier": {"code_verifier": "w" * 43},
    "redirect_uri": {"redirect_uri": REDIRECT_URI + "/"},
}


@pytest.mark.parametrize(("cause", "wrong"), WRONG_PROOFS.items(), ids=WRONG_PROOFS.keys())
def test_wrong_proof_is_recorded_and_the_third_ends_the_grant(cause: Any, wrong: dict[str, str]) -> None:
    refused = CodeRefused(**fields(), grant_id=G, code_id=CODE, cause=cause)
    assert Given(GRANTED).when(**wrong) == Refused((refused,), ends=False)
    assert Given(GRANTED, WRONG).when(**wrong) == Refused((refused,), ends=False)
    assert Given(GRANTED, WRONG, WRONG).when(**wrong) == Refused((refused, revoked(Reason.ABUSE)), ends=True)
    assert isinstance(Given(GRANTED, WRONG, WRONG).when(), Fresh)


def test_code_of_a_revoked_grant_is_refused() -> None:
    ended = GrantRevoked(**head(), grant_id=G, reason=Reason.ADMIN)
    for events in ((GRANTED, ended), (GRANTED, REDEEMED, ended), (ended, GRANTED), ()):
        with pytest.raises(InvalidGrant):
            Given(*events).when()


SIGNED_OUT = SessionEnded(**head(), session_id=ses(1), user_id=usr(1), reason="signed_out")
REPLACED = SessionEnded(**head(), session_id=ses(1), user_id=usr(1), reason="replaced")
CONSENTED = ConsentGiven(**head(), user_id=usr(1), client_id=cli(1), scope="a b")
WITHDRAWN = ConsentWithdrawn(**head(), user_id=usr(1), client_id=cli(1))
CUTS: dict[str, tuple[LedgerEvent, ...]] = {
    "client revoked": (ClientRevoked(**head(), client_id=cli(1), reason=Reason.ADMIN),),
    "client disabled": (ClientDisabled(**head(), client_id=cli(1), reason=Reason.DISABLED),),
    "subject revoked": (SubjectRevoked(**head(), user_id=usr(1), reason=Reason.ADMIN),),
    "password changed": (UserPasswordChanged(**head(), user_id=usr(1), password_hash=None),),
    "user disabled": (UserDisabled(**head(), user_id=usr(1), reason=Reason.DISABLED),),
    "consent withdrawn": (WITHDRAWN,),
    "consent withdrawn and given again": (WITHDRAWN, CONSENTED),
    "signed out": (SIGNED_OUT,),
}


@pytest.mark.parametrize("events", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("spent", [False, True], ids=["fresh", "spent"])
def test_code_ends_with_whom_it_depends_on(events: tuple[LedgerEvent, ...], spent: bool) -> None:
    began = (CONSENTED, SIGNED_IN, GRANTED, *((REDEEMED,) if spent else ()))
    with pytest.raises(InvalidGrant):
        Given(*began, *events).when()


def test_what_ended_before_the_grant_began_does_not_end_it() -> None:
    before = [
        event for events in CUTS.values() for event in events if not isinstance(event, ClientDisabled | UserDisabled)
    ]
    before.remove(SIGNED_OUT)
    signed_in = replace(SIGNED_IN, user_seq=len(before) + 1)
    assert isinstance(Given(CONSENTED, *before, signed_in, GRANTED).when(), Fresh)


# What comes between the look at session and consent and the grant's place in the log
BEHIND: dict[str, tuple[LedgerEvent, ...]] = {
    "subject revoked": CUTS["subject revoked"],
    "password changed": CUTS["password changed"],
    "user disabled": CUTS["user disabled"],
    "consent withdrawn": (WITHDRAWN,),
    "consent withdrawn and less given": (
        WITHDRAWN,
        ConsentGiven(**head(), user_id=usr(1), client_id=cli(1), scope="a"),
    ),
    "signed out": (SIGNED_OUT,),
    "signed out by an administrator": (SessionEnded(**head(), session_id=ses(1), user_id=usr(1), reason="admin"),),
}


@pytest.mark.parametrize("granted", [GRANTED, OFFLINE], ids=["session", "offline"])
@pytest.mark.parametrize("events", BEHIND.values(), ids=BEHIND.keys())
def test_grant_that_comes_just_behind_what_ended_its_session_or_consent_is_not_redeemed(
    events: tuple[LedgerEvent, ...], granted: LedgerEvent
) -> None:
    with pytest.raises(InvalidGrant):
        Given(CONSENTED, SIGNED_IN, *events, granted).when()


@pytest.mark.parametrize(
    "events",
    [(REPLACED,), (WITHDRAWN, CONSENTED), CUTS["client revoked"]],
    ids=["session replaced", "consent given again", "client revoked"],
)
def test_grant_that_comes_behind_what_ended_something_else_is_redeemed(events: tuple[LedgerEvent, ...]) -> None:
    assert isinstance(Given(CONSENTED, SIGNED_IN, *events, GRANTED).when(), Fresh)


def test_consent_to_nothing_is_withdrawn_too() -> None:
    nothing = ConsentGiven(**head(), user_id=usr(1), client_id=cli(1), scope="")
    without = authorized(G, CODE, session_id=ses(1), scope="")
    assert isinstance(Given(nothing, SIGNED_IN, without).when(), Fresh)
    with pytest.raises(InvalidGrant):
        Given(nothing, SIGNED_IN, WITHDRAWN, without).when()


def test_offline_grant_outlives_the_session_and_others_its_replacement() -> None:
    assert isinstance(Given(SIGNED_IN, OFFLINE, SIGNED_OUT).when(), Fresh)
    assert isinstance(Given(SIGNED_IN, GRANTED, REPLACED).when(), Fresh)


# One that was spent. It was redeemed at after(2).

RACED = {
    "at once": after(2),
    "just within": after(2) + RACE - timedelta(microseconds=1),
    "before the other was done": after(1),
}
CLOCKS = {"right": 0.0, "ahead": 30.0, "behind": -60.0}


@pytest.mark.parametrize("off", CLOCKS.values(), ids=CLOCKS.keys())
@pytest.mark.parametrize("at", RACED.values(), ids=RACED.keys())
def test_spent_code_with_its_proofs_at_once_is_recorded_and_revokes_nothing(at: datetime, off: float) -> None:
    clock = at + timedelta(seconds=off)
    replayed = CodeReplayed(**fields(clock), grant_id=G, code_id=CODE, raced=True)
    assert Given(GRANTED, REDEEMED).when(at, clock=clock) == Replayed((replayed,), ends=False)


AGAIN: dict[str, tuple[datetime, dict[str, str]]] = {
    "a moment later": (after(2) + RACE, {}),
    "after it expired": (after(86_400), {}),
    "at once with another redirect URI": (after(2), WRONG_PROOFS["redirect_uri"]),
}


@pytest.mark.parametrize("off", CLOCKS.values(), ids=CLOCKS.keys())
@pytest.mark.parametrize(("at", "wrong"), AGAIN.values(), ids=AGAIN.keys())
def test_spent_code_that_comes_again_with_its_verifier_ends_the_grant(
    at: datetime, wrong: dict[str, str], off: float
) -> None:
    """RFC 6749 §4.1.2, §10.5."""
    clock = at + timedelta(seconds=off)
    replayed = CodeReplayed(**fields(clock), grant_id=G, code_id=CODE, raced=False)
    assert Given(GRANTED, REDEEMED).when(at, clock=clock, **wrong) == Replayed(
        (replayed, revoked(Reason.CODE_REPLAYED, clock)), ends=True
    )


@pytest.mark.parametrize("at", [after(2), after(30), after(86_400)], ids=["at once", "later", "long after"])
@pytest.mark.parametrize("more", [{}, WRONG_PROOFS["redirect_uri"]], ids=["alone", "with its redirect URI"])
def test_spent_code_without_its_verifier_is_recorded_three_times_and_ends_nothing(
    at: datetime, more: dict[str, str]
) -> None:
    """Who finds an old code cannot have spent it, and is not to sign the person out by it."""
    wrong = WRONG_PROOFS["verifier"] | more
    refused = CodeRefused(**fields(at), grant_id=G, code_id=CODE, cause="verifier")
    before = (GRANTED, WRONG, WRONG, REDEEMED)
    for count in range(3):
        assert Given(*before, *[WRONG] * count).when(at, **wrong) == Refused((refused,), ends=False)
    with pytest.raises(InvalidGrant):
        Given(*before, WRONG, WRONG, WRONG).when(at, **wrong)


def test_replay_after_refusals_still_ends_the_grant() -> None:
    judged = Given(GRANTED, REDEEMED, WRONG, WRONG, WRONG).when(after(5))
    assert isinstance(judged, Replayed)
    assert judged.ends


def test_replay_after_a_race_still_ends_the_grant() -> None:
    raced = CodeReplayed(**head(), grant_id=G, code_id=CODE, raced=True)
    judged = Given(GRANTED, REDEEMED, raced).when(after(5))
    assert isinstance(judged, Replayed)
    assert judged.ends


# Whatever comes in whatever order

ATTEMPTS = st.tuples(
    st.sampled_from(
        [{}, {}, {"code_verifier": "w" * 43}, {"redirect_uri": "https://other.example"}, {"client_id": cli(2)}]
    ),
    st.integers(0, 3),  # how many events its worker has not seen yet
    st.sampled_from([0.0, 0.3, 1.0, 70.0]),  # seconds since the attempt before
)


@settings(max_examples=300, deadline=None)
@drawn(attempts=st.lists(ATTEMPTS, max_size=12))
def test_whatever_attempts_come_there_is_one_set_of_tokens_and_no_way_back(attempts: list[Any]) -> None:
    """Workers that have seen less than there is append nothing: the log compares the sequence that they expect."""
    log: list[LedgerEvent] = [GRANTED]
    times, clock = [START], START
    for number, (proofs, unseen, seconds) in enumerate(attempts):
        clock += timedelta(seconds=seconds)
        for known in (max(1, len(log) - unseen), len(log)):  # as it looks to the worker, then from the log itself
            family = reduce(grants.evolve, recorded_at(log[:known], times), EMPTY)
            try:
                judged = judge_code(presented(clock, **proofs), family.grant)
            except InvalidGrant:
                break
            if isinstance(judged, Spent):
                judged = judge_replay(presented(clock, **proofs), judged, clock)
            events: tuple[LedgerEvent, ...]
            if isinstance(judged, Fresh):
                minted_now = Exchange(tokens=(minted(tok(100 + number)),))
                events = (decide_redeem(presented(clock, **proofs), judged, minted_now),)
            else:
                events = judged.events
            conditional = isinstance(judged, Fresh) or judged.ends or isinstance(judged, Refused)
            if known == len(log) or not conditional:
                log += events
                times += [clock] * len(events)
                break
    family = reduce(grants.evolve, recorded_at(log, times), EMPTY)
    spent = [event for event in log if isinstance(event, CodeRedeemed)]
    late = [event for event in log if isinstance(event, CodeReplayed) and not event.raced]
    assert len(spent) <= 1
    assert len(family.tokens) == len(spent)
    assert sum(isinstance(event, GrantRevoked) for event in log) <= 1
    assert isinstance(family.grant, RevokedGrant) == any(isinstance(event, GrantRevoked) for event in log)
    assert not late or isinstance(family.grant, RevokedGrant)


def recorded_at(events: list[LedgerEvent], times: list[datetime]) -> list[Recorded]:
    return [
        Recorded(seq=seq, recorded_at=times[seq - 1], subject=f"ledger.main.grant.{G}", event=event)
        for seq, event in enumerate(events, 1)
    ]
