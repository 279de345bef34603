"""Why a token was good or not. Pure: given what is recorded, when it is asked about, then this is the explanation."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from msgspec.structs import replace

from events.types import (
    AccessRenewed,
    ClientDisabled,
    ClientRevoked,
    CodeReplayed,
    GrantRevoked,
    Kind,
    LedgerEvent,
    Reason,
    SubjectRevoked,
    TokenRevoked,
    TokenSuperseded,
    UserDisabled,
    UserPasswordChanged,
)
from service.explanation import Explanation, explain
from service.past import Past, fold
from service.validation import Asked, Code, evaluate
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
    joined,
    minted,
    redeemed,
    refreshed,
    registered,
    tok,
    usr,
)

NETWORKS = ("192.0.2.0/24",)
OK = Asked("a", ("https://api.example",), "192.0.2.9")
PRECEDENCE = [code for code in Code if code is not Code.VALID]


def begun(**changes: Any) -> LedgerEvent:
    return issued(grt(1), minted(tok(1)), subject=usr(1), client_id=cli(1), **changes)


def past(*events: LedgerEvent, token_id: str = tok(1), at: Any = None) -> Past:
    """What is recorded, a second apart; asked about one second after the last event unless a time is given."""
    recorded = History(*events).recorded
    hit = fold(token_id, recorded)
    assert hit is not None
    return Past(hit, tuple(recorded), len(recorded), at or after(len(recorded) + 1))


def failed(explanation: Explanation) -> list[Code]:
    return [check.name for check in explanation.checks if not check.passed]


def test_explain_of_a_good_token_passes_every_check_in_the_documented_order() -> None:
    then = explain(past(registered(cli(1)), joined(usr(1)), begun()), OK)
    assert [check.name for check in then.checks] == PRECEDENCE
    assert (then.valid, then.code, failed(then)) == (True, Code.VALID, [])
    assert (then.token_id, then.ledger_seq, then.at) == (tok(1), 3, after(4))
    assert [(one.type, one.ledger_seq, one.recorded_at) for one in then.because] == [("token.issued", 3, after(3))]
    assert then.because[0].sentence == (
        f"issued to {usr(1)} through client {cli(1)}, with the scope a b, to expire at 2126-02-01T12:00:00Z"
    )


ENDS: dict[str, tuple[LedgerEvent, Code, str]] = {
    "token": (
        TokenRevoked(**head(by="tok_x"), grant_id=grt(1), token_id=tok(1), reason=Reason.ABUSE),
        Code.REVOKED,
        "the token was revoked by tok_x: abuse",
    ),
    "grant": (
        GrantRevoked(**head(), grant_id=grt(1), reason=Reason.REUSE_DETECTED),
        Code.REVOKED,
        f"its grant {grt(1)} was revoked by system: reuse detected",
    ),
    "client": (
        ClientRevoked(**head(), client_id=cli(1), reason=Reason.ADMIN),
        Code.REVOKED,
        f"all of client {cli(1)} was revoked by system: admin",
    ),
    "user": (
        SubjectRevoked(**head(), user_id=usr(1), reason=Reason.ADMIN),
        Code.REVOKED,
        f"all of user {usr(1)} was revoked by system: admin",
    ),
    "password": (
        UserPasswordChanged(**head(), user_id=usr(1), password_hash=None),
        Code.REVOKED,
        f"the password of user {usr(1)} was changed by system, which revokes all",
    ),
    "disabled client": (
        ClientDisabled(**head(), client_id=cli(1), reason=Reason.DISABLED),
        Code.CLIENT_DISABLED,
        f"client {cli(1)} was disabled by system: disabled",
    ),
    "disabled user": (
        UserDisabled(**head(), user_id=usr(1), reason=Reason.DISABLED),
        Code.SUBJECT_DISABLED,
        f"user {usr(1)} was disabled by system: disabled",
    ),
    "superseded": (
        TokenSuperseded(**head(), grant_id=grt(1), token_id=tok(1), successor_id=tok(9), ends_at=START),
        Code.EXPIRED,
        f"superseded by {tok(9)}, so that it ends at 2126-01-31T12:00:00Z",
    ),
}


@pytest.mark.parametrize(("event", "code", "sentence"), ENDS.values(), ids=ENDS)
def test_explain_names_the_event_that_ended_the_token(event: LedgerEvent, code: Code, sentence: str) -> None:
    then = explain(past(begun(), event), OK)
    assert (then.valid, then.code, failed(then)) == (False, code, [code])
    assert [(one.ledger_seq, one.sentence) for one in then.because][1:] == [(2, sentence)]


def test_explain_gives_the_code_of_the_first_check_that_fails_whatever_holds() -> None:
    """Against the hot path's own judgement."""
    for count in range(4):
        for chosen in combinations(ENDS.values(), count):
            for networks in ((), NETWORKS):
                state = past(begun(allowed_ips=networks), *(event for event, _, _ in chosen))
                for asked in (OK, Asked(), Asked("c"), Asked("a c", ("https://other.example",), "192.0.3.1")):
                    for moment in (after(20), START + DAY):
                        then = explain(replace(state, moment=moment), asked)
                        assert then.code is evaluate(state.hit, asked, moment)
                        assert then.code is next(iter(failed(then)), Code.VALID)


def test_explain_names_the_first_of_several_revocations() -> None:
    again = [TokenRevoked(**head(), grant_id=grt(1), token_id=tok(1), reason=Reason.ADMIN) for _ in range(2)]
    broad = ClientRevoked(**head(), client_id=cli(1), reason=Reason.ADMIN)
    then = explain(past(begun(), *again, broad), OK)
    assert [one.ledger_seq for one in then.because] == [1, 2]


def test_explain_takes_no_notice_of_what_was_revoked_before_the_grant_began() -> None:
    then = explain(past(ClientRevoked(**head(), client_id=cli(1), reason=Reason.ADMIN), begun()), OK)
    assert (then.valid, [one.type for one in then.because]) == (True, ["token.issued"])


def test_explain_takes_no_notice_of_what_became_of_another_token_of_the_grant() -> None:
    other = TokenRevoked(**head(), grant_id=grt(1), token_id=tok(2), reason=Reason.ADMIN)
    then = explain(past(issued(grt(1), minted(tok(1)), minted(tok(2))), other), OK)
    assert (then.valid, len(then.because)) == (True, 1)


def test_explain_of_a_narrowed_token_says_what_it_has_and_lacks() -> None:
    pair = (minted(tok(1)), minted(tok(2), Kind.REFRESH))
    narrowed = refreshed(grt(1), tok(2), minted(tok(3), scope="a"), minted(tok(4), Kind.REFRESH))
    state = past(issued(grt(1), *pair), narrowed, token_id=tok(3))
    assert explain(state, Asked("a")).valid
    then = explain(state, Asked("a b"))
    assert (then.code, then.checks[-1].detail) == (Code.INSUFFICIENT_SCOPE, "it has a and lacks b")
    assert then.because[0].sentence == (
        f"issued to {cli(1)} in exchange for refresh token {tok(2)}, with the scope a, "
        "to expire at 2126-02-01T12:00:00Z"
    )


def test_explain_of_a_refresh_token_is_unknown_as_for_validation_and_tells_that_it_was_spent() -> None:
    pair = (minted(tok(1)), minted(tok(2), Kind.REFRESH))
    spent = refreshed(grt(1), tok(2), minted(tok(3)), minted(tok(4), Kind.REFRESH))
    then = explain(past(issued(grt(1), *pair), spent, token_id=tok(2)), Asked())
    assert (then.valid, then.code, failed(then)) == (False, Code.UNKNOWN, [Code.UNKNOWN])
    assert [one.ledger_seq for one in then.because] == [1, 2]
    assert then.because[1].sentence == f"the refresh token was spent: {tok(4)} took its place"


def test_explain_of_a_persons_grant_names_sign_in_and_code_and_what_ended_it() -> None:
    pair = (minted(tok(2)), minted(tok(3), Kind.REFRESH))
    renewed = AccessRenewed(
        **head(), grant_id=grt(1), refresh_token_id=tok(3), tokens=(minted(tok(4)),), refresh_expires_at=START + DAY
    )
    raced = CodeReplayed(**head(), grant_id=grt(1), code_id=tok(1), raced=True)
    replayed = CodeReplayed(**head(by=cli(1)), grant_id=grt(1), code_id=tok(1), raced=False)
    ended = GrantRevoked(**head(), grant_id=grt(1), reason=Reason.CODE_REPLAYED)
    events = (authorized(grt(1), tok(1)), redeemed(grt(1), tok(1), *pair), renewed, raced, replayed, ended)
    then = explain(past(*events[:4], token_id=tok(4)), OK)
    assert then.valid
    assert [one.sentence for one in then.because] == [
        f"user {usr(1)} signed in at 2126-01-31T11:00:00Z and allowed it",
        (
            f"issued to {usr(1)} through client {cli(1)} for refresh token {tok(3)}, which stays, with the scope a b, "
            "to expire at 2126-02-01T12:00:00Z"
        ),
    ]
    then = explain(past(*events, token_id=tok(2)), OK)
    assert (then.valid, then.code) == (False, Code.REVOKED)
    assert [one.ledger_seq for one in then.because] == [1, 2, 5, 6]
    assert [one.sentence for one in then.because][1:] == [
        (
            f"issued to {usr(1)} through client {cli(1)} in exchange for an authorization code, with the scope a b, "
            "to expire at 2126-02-01T12:00:00Z"
        ),
        f"the authorization code was presented again by {cli(1)}, after it had been redeemed",
        f"its grant {grt(1)} was revoked by system: code replayed",
    ]


def test_fold_without_the_issue_is_none() -> None:
    assert fold(tok(1), History(registered(cli(1))).recorded) is None
