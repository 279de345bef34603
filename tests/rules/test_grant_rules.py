"""Given what happened to a grant, when a command comes, then these events, or this refusal."""

from __future__ import annotations

import contextlib
from datetime import datetime, timedelta
from functools import reduce
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from msgspec.structs import replace

from events.types import (
    AccessRenewed,
    ClientDisabled,
    ClientRevoked,
    GrantRevoked,
    Kind,
    LedgerEvent,
    Reason,
    Recorded,
    RefreshReplayed,
    SubjectRevoked,
    TokenIssued,
    TokenRefreshed,
    TokenRevoked,
    TokenSuperseded,
    UserDisabled,
)
from projections import grants, registry
from projections.grants import EMPTY, Family
from projections.registry import Consent, Cut, Session
from service.errors import Gone, InvalidGrant, InvalidRequest, InvalidScope, NotFound, ServiceError
from service.rules.grants import (
    AnsweredAgain,
    Person,
    Refresh,
    ReuseDetected,
    RevokeGrant,
    RevokeToken,
    Rotated,
    RotateToken,
    Stamp,
    check_refreshable,
    decide_refresh,
    decide_renew,
    decide_revoke_grant,
    decide_revoke_token,
    decide_rotate,
    granted_scope,
)
from tests.making import (
    DAY,
    START,
    History,
    after,
    authorized,
    cli,
    grt,
    head,
    issued,
    minted,
    redeemed,
    refreshed,
    ses,
    tok,
    usr,
)

G = grt(1)
ACCESS, FIRST, SECOND, THIRD = tok(1), tok(2), tok(4), tok(6)
WINDOW = timedelta(seconds=10)
NOW = after(100)

ISSUED = issued(G, minted(ACCESS), minted(FIRST, Kind.REFRESH))
SPENT = refreshed(G, FIRST, minted(tok(3)), minted(SECOND, Kind.REFRESH), answer_id="answer 1")
SPENT_AGAIN = refreshed(G, SECOND, minted(tok(5)), minted(THIRD, Kind.REFRESH), answer_id="answer 2")
GRANT_REVOKED = GrantRevoked(**head(), grant_id=G, reason=Reason.ADMIN)


class Given:
    """The state after these events, a second apart."""

    def __init__(self, *events: LedgerEvent) -> None:
        history = History(*events)
        self.family: Family = reduce(grants.evolve, history.recorded, EMPTY)
        self.cuts: dict[str, Cut] = {}
        for recorded in history.recorded:
            for owner in (cli(1), usr(1)):
                found = registry.cut(self.cuts.get(owner), recorded)
                if found is not None and found[0] == owner:
                    self.cuts[owner] = found[1]

    def when_refreshed(
        self, token_id: str, at: datetime, *, client: str = cli(1), window: timedelta = WINDOW
    ) -> Rotated | AnsweredAgain | ReuseDetected:
        command = Refresh(
            stamp=stamp(at, client),
            grant_id=G,
            token_id=token_id,
            client_id=client,
            tokens=NEW,
            answer_id="new answer",
            retry_window=window,
        )
        cuts = {"client_cut": self.cuts.get(client), "subject_cut": self.cuts.get(usr(1))}
        _, chain = check_refreshable(command, self.family, **cuts)
        return decide_refresh(command, chain)


NEW = (minted(tok(8)), minted(tok(9), Kind.REFRESH))


def stamp(at: datetime = NOW, by: str = "tok_by") -> Stamp:
    return Stamp(("id1", "id2"), at, by, "req")


def fields(at: datetime, by: str, number: int = 1) -> dict[str, object]:
    return {"id": f"id{number}", "occurred_at": at, "by": by, "request_id": "req"}


# Refresh: rotation


def test_refresh_of_the_current_token_spends_it() -> None:
    decision = Given(ISSUED).when_refreshed(FIRST, NOW)
    assert decision == Rotated(
        (TokenRefreshed(**fields(NOW, cli(1)), grant_id=G, spent_token_id=FIRST, answer_id="new answer", tokens=NEW),)
    )


def test_refresh_goes_on_from_the_successor() -> None:
    assert isinstance(Given(ISSUED, SPENT).when_refreshed(SECOND, NOW), Rotated)
    assert isinstance(Given(ISSUED, SPENT, SPENT_AGAIN).when_refreshed(THIRD, NOW), Rotated)


def test_refresh_does_not_depend_on_other_tokens_of_the_grant() -> None:
    revoked = TokenRevoked(**head(), grant_id=G, token_id=ACCESS, reason=Reason.LOGOUT)
    assert isinstance(Given(ISSUED, revoked).when_refreshed(FIRST, NOW), Rotated)


# Refresh without rotation


def renewed(given: Given, at: datetime) -> AccessRenewed:
    command = Refresh(
        stamp=stamp(at, cli(1)),
        grant_id=G,
        token_id=FIRST,
        client_id=cli(1),
        tokens=NEW[:1],
        answer_id="none",
        retry_window=WINDOW,
    )
    _, chain = check_refreshable(command, given.family, client_cut=None, subject_cut=None)
    return decide_renew(command, chain)


def test_renewal_leaves_the_refresh_token_and_lengthens_it_up_to_the_end_of_all() -> None:
    event = renewed(Given(ISSUED), NOW)
    assert event == AccessRenewed(
        **fields(NOW, cli(1)),
        grant_id=G,
        refresh_token_id=FIRST,
        tokens=NEW[:1],
        refresh_expires_at=NOW + timedelta(days=1),
    )
    long_used = Given(ISSUED, *(replace(event, refresh_expires_at=START + 10 * DAY) for _ in range(2)))
    assert renewed(long_used, START + 9.5 * DAY).refresh_expires_at == START + 10 * DAY
    with pytest.raises(InvalidGrant):
        renewed(Given(ISSUED), START + 1 * DAY)
    with pytest.raises(InvalidGrant):
        renewed(long_used, START + 10 * DAY)


# Refresh: a grant of a person


BY_PERSON = authorized(G, tok(9), session_id=ses(1), offline=True)
REDEEMED = redeemed(G, tok(9), minted(ACCESS), minted(FIRST, Kind.REFRESH))


@pytest.mark.parametrize(("withdrawn_seq", "refused"), [(0, False), (1, False), (2, True)])
def test_refresh_ends_with_the_consent_that_was_withdrawn_since(withdrawn_seq: int, refused: bool) -> None:
    consent = Consent(usr(1), cli(1), "a b", START, 2, withdrawn_seq)
    family = Given(BY_PERSON, REDEEMED).family
    command = Refresh(
        stamp=stamp(NOW, cli(1)),
        grant_id=G,
        token_id=FIRST,
        client_id=cli(1),
        tokens=NEW,
        answer_id="new answer",
        retry_window=WINDOW,
    )
    with pytest.raises(InvalidGrant) if refused else contextlib.nullcontext():
        check_refreshable(command, family, client_cut=None, subject_cut=None, person=Person(consent))


@pytest.mark.parametrize(
    ("session", "cut", "refused"),
    [
        ({}, None, False),
        ({}, 3, True),
        ({"user_seq": 3}, 3, False),
        ({"seq": 4, "ended_at": START, "reason": "signed_out"}, None, True),
        ({"seq": 4, "ended_at": START, "reason": "admin"}, None, True),
        ({"seq": 4, "ended_at": START, "reason": "replaced"}, None, False),
        ({"seq": 6, "ended_at": START, "reason": "signed_out"}, None, False),
    ],
    ids=[
        "nothing ended",
        "person cut off just before",
        "person cut off before they signed in",
        "signed out just before",
        "signed out by an administrator just before",
        "session replaced",
        "signed out since",
    ],
)
def test_offline_grant_that_began_just_behind_what_ended_its_session_is_not_refreshed(
    session: dict[str, Any], cut: int | None, refused: bool
) -> None:
    """The grant began at 5; the session at 2, when the person's subject stood at 1."""
    history = [
        Recorded(seq=5 + number, recorded_at=after(number), subject=f"ledger.main.grant.{G}", event=event)
        for number, event in enumerate((BY_PERSON, REDEEMED))
    ]
    family = reduce(grants.evolve, history, EMPTY)
    row = replace(Session(ses(1), usr(1), START, START + DAY, ("pwd",), user_seq=1, seq=2), **session)
    command = Refresh(
        stamp=stamp(NOW, cli(1)),
        grant_id=G,
        token_id=FIRST,
        client_id=cli(1),
        tokens=NEW,
        answer_id="new answer",
        retry_window=WINDOW,
    )
    subject_cut = Cut(cut, START, Reason.PASSWORD_CHANGED) if cut is not None else None
    with pytest.raises(InvalidGrant) if refused else contextlib.nullcontext():
        check_refreshable(
            command, family, client_cut=None, subject_cut=subject_cut, person=Person(None, row, subject_cut)
        )


# Refresh: a spent token comes again. It was spent at after(2).

AGAIN = [
    pytest.param(after(2), id="at once"),
    pytest.param(after(11.999), id="within the window"),
    pytest.param(after(-30), id="by a clock that is behind the log's"),
]
TOO_LATE = [
    pytest.param(after(12), WINDOW, id="as the window ends"),
    pytest.param(after(3600), WINDOW, id="long after"),
    pytest.param(after(2), timedelta(0), id="strict"),
    pytest.param(after(-30), timedelta(0), id="strict, by a clock that is behind the log's"),
]


def replayed(at: datetime, token_id: str = FIRST, *, answered: bool) -> RefreshReplayed:
    return RefreshReplayed(**fields(at, cli(1)), grant_id=G, token_id=token_id, answered=answered)


@pytest.mark.parametrize("at", AGAIN)
def test_replay_within_the_window_is_answered_again_and_recorded(at: datetime) -> None:
    decision = Given(ISSUED, SPENT).when_refreshed(FIRST, at)
    assert decision == AnsweredAgain("answer 1", (replayed(at, answered=True),))


def reuse(at: datetime, token_id: str = FIRST) -> ReuseDetected:
    ended = GrantRevoked(**fields(at, "system", 2), grant_id=G, reason=Reason.REUSE_DETECTED)
    return ReuseDetected((replayed(at, token_id, answered=False), ended))


@pytest.mark.parametrize(("at", "window"), TOO_LATE)
def test_replay_outside_the_window_ends_the_grant(at: datetime, window: timedelta) -> None:
    assert reuse(at) == Given(ISSUED, SPENT).when_refreshed(FIRST, at, window=window)


def test_replay_after_the_successor_was_used_ends_the_grant_even_within_the_window() -> None:
    assert reuse(after(4)) == Given(ISSUED, SPENT, SPENT_AGAIN).when_refreshed(FIRST, after(4))


def test_replay_of_the_token_spent_last_is_answered_with_its_own_answer() -> None:
    decision = Given(ISSUED, SPENT, SPENT_AGAIN).when_refreshed(SECOND, after(4))
    assert decision == AnsweredAgain("answer 2", (replayed(after(4), SECOND, answered=True),))


def test_replays_do_not_prolong_the_window() -> None:
    many = [RefreshReplayed(**head(), grant_id=G, token_id=FIRST, answered=True) for _ in range(20)]
    assert reuse(after(12)) == Given(ISSUED, SPENT, *many).when_refreshed(FIRST, after(12))


def test_replay_of_a_token_that_would_have_expired_still_ends_the_grant() -> None:
    """Somebody else has it; when it would have ended changes nothing."""
    assert reuse(START + 2 * DAY) == Given(ISSUED, SPENT).when_refreshed(FIRST, START + 2 * DAY)


def test_replay_within_the_window_is_answered_though_the_token_has_expired_meanwhile() -> None:
    short = issued(G, minted(ACCESS), minted(FIRST, Kind.REFRESH, expires_at=after(5)))
    assert isinstance(Given(short, SPENT).when_refreshed(FIRST, after(6)), AnsweredAgain)


# Refresh: refused. Every refusal reads the same to the client.


def refused(case: Given, token_id: str, at: datetime = NOW, **more: Any) -> str:
    with pytest.raises(InvalidGrant) as caught:
        case.when_refreshed(token_id, at, **more)
    assert caught.value.detail == ("the refresh token is not valid, has expired, was revoked or is not this client's")
    return caught.value.private


def test_refresh_of_nothing_is_refused() -> None:
    assert refused(Given(), FIRST) == "no such grant"
    assert refused(Given(ISSUED), tok(99)) == "no such grant"


def test_refresh_of_a_grant_without_refresh_is_refused() -> None:
    assert refused(Given(issued(G, minted(ACCESS))), ACCESS) == "no such grant"


def test_refresh_by_another_client_is_refused_and_ends_nothing() -> None:
    for case in (Given(ISSUED), Given(ISSUED, SPENT)):
        assert refused(case, FIRST, client=cli(2)) == "issued to another client"


def test_refresh_at_and_after_the_end_of_the_token_is_refused() -> None:
    assert isinstance(Given(ISSUED).when_refreshed(FIRST, START + DAY - timedelta(seconds=1)), Rotated)
    assert refused(Given(ISSUED), FIRST, START + DAY) == "expired"


def test_refresh_at_and_after_the_end_of_the_grant_is_refused_even_for_replays() -> None:
    ends = issued(G, minted(ACCESS), minted(FIRST, Kind.REFRESH), refresh_ends_at=after(50))
    assert isinstance(Given(ends).when_refreshed(FIRST, after(49)), Rotated)
    assert refused(Given(ends), FIRST, after(50)) == "expired"
    assert refused(Given(ends, SPENT), FIRST, after(51)) == "expired"


def test_refresh_of_a_revoked_grant_is_refused_at_every_link() -> None:
    for token_id in (FIRST, SECOND):
        assert refused(Given(ISSUED, SPENT, GRANT_REVOKED), token_id, after(4)) == "revoked"


def test_refresh_of_a_revoked_token_is_refused() -> None:
    revoked = TokenRevoked(**head(), grant_id=G, token_id=FIRST, reason=Reason.LOGOUT)
    assert refused(Given(ISSUED, revoked), FIRST) == "token revoked"


CUTS: dict[str, LedgerEvent] = {
    "client revoked": ClientRevoked(**head(), client_id=cli(1), reason=Reason.ADMIN),
    "client disabled": ClientDisabled(**head(), client_id=cli(1), reason=Reason.ADMIN),
    "subject revoked": SubjectRevoked(**head(), user_id=usr(1), reason=Reason.ADMIN),
    "subject disabled": UserDisabled(**head(), user_id=usr(1), reason=Reason.ADMIN),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_refresh_of_a_grant_that_began_before_the_cut_is_refused(cut: LedgerEvent) -> None:
    assert refused(Given(ISSUED, cut), FIRST) == "client or subject revoked"


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_refresh_that_races_a_cut_carries_no_family_across(cut: LedgerEvent) -> None:
    """The grant's first event counts, not the refresh that came after the cut."""
    assert refused(Given(ISSUED, cut, SPENT), SECOND) == "client or subject revoked"


def test_refresh_of_a_grant_that_began_after_a_revocation_goes_on_and_after_a_disabling_does_not() -> None:
    for name, cut in CUTS.items():
        case = Given(cut, ISSUED)
        if "revoked" in name:
            assert isinstance(case.when_refreshed(FIRST, NOW), Rotated)
        else:
            assert refused(case, FIRST) == "client or subject revoked"


@settings(max_examples=100, deadline=None)
@drawn(spends=st.integers(0, 5), presented=st.integers(0, 5), seconds=st.integers(0, 30))
def test_at_most_one_link_of_a_chain_can_be_spent(spends: int, presented: int, seconds: int) -> None:
    """Whatever is presented whenever: only the last link rotates, only the one before it is answered again."""
    links = [tok(100 + number) for number in range(7)]
    events: list[LedgerEvent] = [issued(G, minted(ACCESS), minted(links[0], Kind.REFRESH))]
    events += [refreshed(G, links[n], minted(links[n + 1], Kind.REFRESH)) for n in range(spends)]
    presented = min(presented, spends)
    spent_at = spends + 1
    decision = Given(*events).when_refreshed(links[presented], after(spent_at + seconds))
    if presented == spends:
        assert isinstance(decision, Rotated)
    elif presented == spends - 1 and seconds < 10:
        assert isinstance(decision, AnsweredAgain)
    else:
        assert isinstance(decision, ReuseDetected)


# Revoke


def revoke(case: Given, token_id: str) -> list[LedgerEvent]:
    command = RevokeToken(
        stamp=stamp(), grant_id=G, token_id=token_id, reason=Reason.COMPROMISED, sealed_comment=b"sealed"
    )
    return decide_revoke_token(command, case.family)


BY = fields(NOW, "tok_by")


def test_revocation_of_an_access_token_ends_only_that_token() -> None:
    wanted = TokenRevoked(**BY, grant_id=G, token_id=ACCESS, reason=Reason.COMPROMISED, sealed_comment=b"sealed")
    assert revoke(Given(ISSUED), ACCESS) == [wanted]


@pytest.mark.parametrize("token_id", [FIRST, SECOND], ids=["spent", "current"])
def test_revocation_of_a_refresh_token_ends_its_grant(token_id: str) -> None:
    """RFC 7009 §2.1; also when the token is spent already."""
    wanted = GrantRevoked(**BY, grant_id=G, reason=Reason.COMPROMISED, sealed_comment=b"sealed")
    assert revoke(Given(ISSUED, SPENT), token_id) == [wanted]


def test_revocation_of_what_has_ended_is_no_second_event() -> None:
    revoked = TokenRevoked(**head(), grant_id=G, token_id=ACCESS, reason=Reason.LOGOUT)
    assert revoke(Given(ISSUED, revoked), ACCESS) == []
    for token_id in (ACCESS, FIRST):
        assert revoke(Given(ISSUED, GRANT_REVOKED), token_id) == []


def test_revocation_of_an_unknown_token_is_refused() -> None:
    for case in (Given(), Given(ISSUED), Given(GRANT_REVOKED)):
        with pytest.raises(NotFound):
            revoke(case, tok(99))


def test_revocation_of_an_expired_token_is_recorded() -> None:
    """It says what should not be trusted, whenever it ends."""
    old = issued(G, minted(ACCESS, expires_at=START))
    assert len(revoke(Given(old), ACCESS)) == 1


def revoke_grant(case: Given) -> list[LedgerEvent]:
    return decide_revoke_grant(RevokeGrant(stamp=stamp(), grant_id=G, reason=Reason.ADMIN), case.family)


def test_revocation_of_a_grant_ends_it_once() -> None:
    assert revoke_grant(Given(ISSUED)) == [GrantRevoked(**BY, grant_id=G, reason=Reason.ADMIN)]
    assert revoke_grant(Given(ISSUED, GRANT_REVOKED)) == []


def test_revocation_of_an_unknown_grant_is_refused() -> None:
    for case in (Given(), Given(GRANT_REVOKED)):
        with pytest.raises(NotFound):
            revoke_grant(case)


# Rotate

PAT = issued(
    G,
    minted(ACCESS, Kind.PAT, audience=()),
    subject=usr(1),
    client_id=None,
    audience=(),
    allowed_ips=("192.0.2.0/24",),
    sealed_name=b"old name",
)
SUCCESSOR = minted(tok(7), Kind.PAT, audience=(), scope="a")


def rotate(case: Given, at: datetime = NOW) -> tuple[TokenIssued, TokenSuperseded]:
    command = RotateToken(
        stamp=stamp(at),
        grant_id=G,
        token_id=ACCESS,
        successor_grant_id=grt(2),
        successor=SUCCESSOR,
        overlap=timedelta(hours=1),
        sealed_name=b"new name",
    )
    return decide_rotate(command, case.family, now=at)


def test_rotation_issues_one_like_the_old_and_ends_the_old_after_the_overlap() -> None:
    begun, superseded = rotate(Given(PAT))
    assert begun == TokenIssued(
        **BY,
        grant_id=grt(2),
        subject=usr(1),
        client_id=None,
        scope="a",
        audience=(),
        tokens=(SUCCESSOR,),
        allowed_ips=("192.0.2.0/24",),
        sealed_name=b"new name",
        rotated_from=ACCESS,
    )
    assert superseded == TokenSuperseded(
        **fields(NOW, "tok_by", 2),
        grant_id=G,
        token_id=ACCESS,
        successor_id=tok(7),
        ends_at=NOW + timedelta(hours=1),
    )


def test_rotated_token_keeps_what_narrows_it() -> None:
    """An address list or an audience that was lost on the way would let the successor do more."""
    begun, superseded = rotate(Given(PAT))
    family = Given(PAT, superseded, begun).family
    assert family.tokens[ACCESS].expires_at == NOW + timedelta(hours=1)
    assert begun.allowed_ips == PAT.allowed_ips
    assert begun.audience == PAT.audience


ENDED: dict[str, tuple[tuple[LedgerEvent, ...], datetime, type[ServiceError]]] = {
    "nothing there": ((), NOW, NotFound),
    "token revoked": (
        (PAT, TokenRevoked(**head(), grant_id=G, token_id=ACCESS, reason=Reason.LOGOUT)),
        NOW,
        Gone,
    ),
    "grant revoked": ((PAT, GRANT_REVOKED), NOW, Gone),
    "expired": ((PAT,), START + DAY, Gone),
    "access token": ((ISSUED,), NOW, InvalidRequest),
}


@pytest.mark.parametrize(("events", "at", "refusal"), ENDED.values(), ids=ENDED.keys())
def test_rotation_of_what_cannot_be_rotated_is_refused(
    events: tuple[LedgerEvent, ...], at: datetime, refusal: type[ServiceError]
) -> None:
    with pytest.raises(refusal):
        rotate(Given(*events), at)


# Scopes

GRANTED = [
    pytest.param("a b", ("a b c", "b a"), (), "a b", id="what both have"),
    pytest.param(None, ("a b c", "c b"), (), "b c", id="nothing asked: all that both have, in order"),
    pytest.param("", ("a b", "b"), (), "b", id="empty is nothing asked"),
    pytest.param(None, ("a b c",), ("b",), "a c", id="disabled scopes are not given"),
    pytest.param(None, ("a",), ("a",), "", id="nothing is left"),
    pytest.param(None, ("",), (), "", id="nothing is held"),
    pytest.param("b a", ("a b",), (), "b a", id="as it was asked"),
]


@pytest.mark.parametrize(("asked", "held", "disabled", "wanted"), GRANTED)
def test_granted_scope_is_what_all_hold(
    asked: str | None, held: tuple[str, ...], disabled: tuple[str, ...], wanted: str
) -> None:
    assert wanted == granted_scope(asked, *held, disabled=frozenset(disabled))


REFUSED_SCOPES = [
    pytest.param("a d", ("a b", "a"), (), "d", id="nobody has it"),
    pytest.param("b", ("a b", "a"), (), "b", id="one lacks it"),
    pytest.param("a b", ("a b",), ("b",), "b", id="disabled"),
    pytest.param("A", ("a",), (), "A", id="another case"),
]


@pytest.mark.parametrize(("asked", "held", "disabled", "missing"), REFUSED_SCOPES)
def test_scope_that_somebody_lacks_is_refused_by_name(
    asked: str, held: tuple[str, ...], disabled: tuple[str, ...], missing: str
) -> None:
    with pytest.raises(InvalidScope, match=f": {missing}$"):
        granted_scope(asked, *held, disabled=frozenset(disabled))


@settings(max_examples=100, deadline=None)
@drawn(
    asked=st.none() | st.lists(st.sampled_from("abcd"), max_size=4),
    held=st.lists(st.lists(st.sampled_from("abcd"), max_size=4), min_size=1, max_size=3),
    disabled=st.sets(st.sampled_from("abcd")),
)
def test_nothing_is_ever_granted_that_somebody_lacks(
    asked: list[str] | None, held: list[list[str]], disabled: set[str]
) -> None:
    try:
        scope = granted_scope(
            None if asked is None else " ".join(asked), *(" ".join(one) for one in held), disabled=frozenset(disabled)
        )
    except InvalidScope:
        assert asked
        return
    assert all(name in one and name not in disabled for name in scope.split() for one in held)
    assert not asked or scope.split() == asked
