"""The fold of one grant, by given/then: given these events, then this state."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import reduce
from itertools import permutations

import pytest
from msgspec.structs import replace

from events.types import (
    AccessRenewed,
    CodeRefused,
    CodeReplayed,
    GrantRevoked,
    Kind,
    LedgerEvent,
    Reason,
    Recorded,
    RefreshReplayed,
    TokenRevoked,
)
from projections import grants
from projections.grants import (
    EMPTY,
    ActiveGrant,
    AuthorizedGrant,
    ByCode,
    Ended,
    Family,
    NoGrant,
    RefreshChain,
    RevokedGrant,
    Spent,
    Token,
    facts,
)
from tests.making import (
    CODE_CHALLENGE,
    DAY,
    START,
    History,
    after,
    authorized,
    cli,
    everything,
    grt,
    head,
    issued,
    minted,
    redeemed,
    refreshed,
    scope,
    sha256_of,
    tok,
    usr,
)

G = grt(1)


def folded(recorded: Iterable[Recorded]) -> Family:
    return reduce(grants.evolve, recorded, EMPTY)


def given(*events: LedgerEvent) -> Family:
    return folded(History(*events).recorded)


BEGUN = issued(G, minted(tok(1)), minted(tok(2), Kind.REFRESH))


def test_issue_begins_an_active_grant_with_its_tokens() -> None:
    family = given(BEGUN)
    chain = RefreshChain(tok(2), 86_400, START + 10 * DAY)
    assert family.grant == ActiveGrant(cli(1), cli(1), "a b", ("https://api.example",), 1, (), chain)
    assert family.seq == 1
    assert family.tokens == {
        tok(1): Token(bytes.fromhex(G[4:]), Kind.ACCESS, sha256_of(tok(1)), START, START + DAY, 1),
        tok(2): Token(bytes.fromhex(G[4:]), Kind.REFRESH, sha256_of(tok(2)), START, START + DAY, 1),
    }


def test_token_keeps_scope_and_audience_where_they_are_not_the_grants() -> None:
    family = given(issued(G, minted(tok(1), scope="a"), minted(tok(2), audience=())))
    assert (family.tokens[tok(1)].scope, family.tokens[tok(1)].audience) == ("a", None)
    assert (family.tokens[tok(2)].scope, family.tokens[tok(2)].audience) == (None, ())


def test_issue_of_an_access_only_token_leaves_the_grants_own_subject_empty() -> None:
    """The next append there, a revocation, expects sequence 0."""
    assert given(scope("x"), issued(G, minted(tok(1)))).seq == 0
    assert given(scope("x"), issued(G, minted(tok(1), Kind.PAT), subject=usr(1), client_id=None)).seq == 2


def test_refresh_moves_the_chain_and_keeps_the_first_sequence() -> None:
    family = given(scope("x"), BEGUN, refreshed(G, tok(2), minted(tok(3)), minted(tok(4), Kind.REFRESH)))
    grant = family.grant
    assert isinstance(grant, ActiveGrant)
    assert grant.refresh == RefreshChain(tok(4), 86_400, START + 10 * DAY, Spent(tok(2), "answer", after(3)))
    assert grant.first_seq == 2
    assert family.seq == 3
    assert family.tokens.keys() == {tok(1), tok(2), tok(3), tok(4)}
    # A refreshed token always says for itself what it may do.
    assert (family.tokens[tok(3)].scope, family.tokens[tok(3)].audience) == ("a b", ("https://api.example",))


def test_replay_changes_nothing_but_the_sequence() -> None:
    before = given(BEGUN)
    after_it = given(BEGUN, RefreshReplayed(**head(), grant_id=G, token_id=tok(2), answered=True))
    assert (before.grant, before.tokens, 2) == (after_it.grant, after_it.tokens, after_it.seq)


def test_revocation_of_a_token_ends_it_alone() -> None:
    family = given(BEGUN, TokenRevoked(**head(), grant_id=G, token_id=tok(1), reason=Reason.LOGOUT))
    assert isinstance(family.grant, ActiveGrant)
    assert family.tokens[tok(1)].ended == Ended(2, after(2), Reason.LOGOUT)
    assert family.tokens[tok(2)].ended is None


def test_first_revocation_counts() -> None:
    def revoked(reason: Reason) -> TokenRevoked:
        return TokenRevoked(**head(), grant_id=G, token_id=tok(1), reason=reason)

    def all_revoked(reason: Reason) -> GrantRevoked:
        return GrantRevoked(**head(), grant_id=G, reason=reason)

    family = given(
        BEGUN, revoked(Reason.LOGOUT), revoked(Reason.ADMIN), all_revoked(Reason.ABUSE), all_revoked(Reason.UNUSED)
    )
    assert family.tokens[tok(1)].ended == Ended(2, after(2), Reason.LOGOUT)
    assert isinstance(family.grant, RevokedGrant)
    assert family.grant.ended == Ended(4, after(4), Reason.ABUSE)
    assert family.seq == 5


LATER_EVENTS: dict[str, LedgerEvent] = {
    "refresh": refreshed(G, tok(2), minted(tok(3)), minted(tok(4), Kind.REFRESH)),
    "issue": issued(G, minted(tok(5))),
    "replay": RefreshReplayed(**head(), grant_id=G, token_id=tok(2), answered=True),
    "revocation of a token": TokenRevoked(**head(), grant_id=G, token_id=tok(1), reason=Reason.LOGOUT),
}


@pytest.mark.parametrize("later", LATER_EVENTS.values(), ids=LATER_EVENTS.keys())
def test_revoked_grant_is_never_revived(later: LedgerEvent) -> None:
    revoked = GrantRevoked(**head(), grant_id=G, reason=Reason.ADMIN)
    before, family = given(BEGUN, revoked), given(BEGUN, revoked, later)
    assert before.grant == family.grant


def test_revocation_of_what_is_not_known_yet_leaves_a_mark() -> None:
    family = given(GrantRevoked(**head(), grant_id=G, reason=Reason.ADMIN))
    assert family.grant == RevokedGrant(Ended(1, after(1), Reason.ADMIN), None)
    begun = given(GrantRevoked(**head(), grant_id=G, reason=Reason.ADMIN), BEGUN)
    assert isinstance(begun.grant, RevokedGrant)
    assert facts(begun.grant) is not None


def test_supersession_shortens_and_never_lengthens() -> None:
    pat = issued(G, minted(tok(1), Kind.PAT), subject=usr(1), client_id=None)

    def superseded(ends_at: object) -> LedgerEvent:
        return grants.TokenSuperseded(**head(), grant_id=G, token_id=tok(1), successor_id=tok(9), ends_at=ends_at)

    assert given(pat, superseded(START + DAY / 2)).tokens[tok(1)].expires_at == START + DAY / 2
    assert given(pat, superseded(START + 2 * DAY)).tokens[tok(1)].expires_at == START + DAY
    assert given(pat, superseded(START + DAY / 2), superseded(START + DAY)).tokens[tok(1)].expires_at == START + DAY / 2


def test_facts_are_what_the_grant_is_or_was() -> None:
    family = given(BEGUN)
    assert facts(family.grant) == family.grant
    assert facts(NoGrant()) is None
    assert facts(given(BEGUN, GrantRevoked(**head(), grant_id=G, reason=Reason.ADMIN)).grant) == family.grant


def test_fold_is_total_in_any_order() -> None:
    """Never raises, whatever comes in whatever order: a projection may not refuse a recorded event."""
    events = [BEGUN, *LATER_EVENTS.values(), GrantRevoked(**head(), grant_id=G, reason=Reason.ADMIN)]
    for order in permutations(events, 4):
        family = given(*order)
        ended = [position for position, event in enumerate(order) if isinstance(event, GrantRevoked)]
        assert isinstance(family.grant, RevokedGrant) == bool(ended)


def test_events_of_other_things_change_nothing() -> None:
    for recorded in everything().recorded:
        if ".grant." not in recorded.subject and ".access." not in recorded.subject:
            before = given(BEGUN)
            found = grants.evolve(before, recorded)
            assert (before.grant, before.tokens, before.seq) == (found.grant, found.tokens, found.seq)


# What a person gave


def test_authorization_waits_for_its_code_and_says_already_whose_it_is() -> None:
    family = given(authorized(G, tok(1)))
    by_code = ByCode(
        tok(1), "ses_" + "e" * 32, START - timedelta(hours=1), False, "https://shop.example/back", CODE_CHALLENGE
    )
    becomes = ActiveGrant(usr(1), cli(1), "a b", ("https://api.example",), 1, by_code=by_code)
    assert family.grant == AuthorizedGrant(becomes, START + timedelta(seconds=60), "code", b"nonce")
    assert (family.tokens, family.seq) == ({}, 1)
    assert facts(family.grant) == becomes


def test_redemption_makes_an_active_grant_with_its_tokens_that_began_with_the_authorization() -> None:
    tokens = (minted(tok(2), scope="a"), minted(tok(3), Kind.REFRESH))
    before, family = given(authorized(G, tok(1))), given(authorized(G, tok(1)), redeemed(G, tok(1), *tokens))
    known = facts(before.grant)
    assert known is not None
    assert known.by_code is not None
    assert family.grant == replace(
        known,
        refresh=RefreshChain(tok(3), 86_400, START + 10 * DAY),
        by_code=replace(known.by_code, redeemed_at=after(2)),
    )
    assert family.tokens.keys() == {tok(2), tok(3)}
    assert (family.tokens[tok(2)].scope, family.tokens[tok(2)].audience) == ("a", None)
    assert (family.tokens[tok(3)].scope, family.tokens[tok(3)].issued_seq) == (None, 2)


def test_refused_proofs_are_counted_until_the_code_is_redeemed() -> None:
    wrong = CodeRefused(**head(), grant_id=G, code_id=tok(1), cause="verifier")
    waiting = given(authorized(G, tok(1)), wrong, wrong).grant
    assert isinstance(waiting, AuthorizedGrant)
    assert waiting.refusals == 2
    assert isinstance(given(authorized(G, tok(1)), wrong, redeemed(G, tok(1)), wrong).grant, ActiveGrant)


def test_second_redemption_and_second_authorization_change_nothing() -> None:
    once = given(authorized(G, tok(1)), redeemed(G, tok(1), minted(tok(2))))
    again = redeemed(G, tok(1), minted(tok(3)))
    twice = given(authorized(G, tok(1)), redeemed(G, tok(1), minted(tok(2))), again, authorized(G, tok(9)))
    assert once.grant == twice.grant


def test_renewal_lengthens_the_refresh_token_and_never_shortens_it() -> None:
    def renewed(until: datetime) -> LedgerEvent:
        return AccessRenewed(
            **head(), grant_id=G, refresh_token_id=tok(2), tokens=(minted(tok(5)),), refresh_expires_at=until
        )

    before = given(BEGUN)
    family = given(BEGUN, renewed(START + 2 * DAY), renewed(START + DAY))
    assert family.tokens[tok(2)].expires_at == START + 2 * DAY
    assert family.tokens[tok(5)].issued_seq == 3
    assert (family.grant, family.seq) == (before.grant, 3)


PEOPLES = [
    authorized(G, tok(1)),
    redeemed(G, tok(1), minted(tok(2)), minted(tok(3), Kind.REFRESH)),
    CodeReplayed(**head(), grant_id=G, code_id=tok(1), raced=False),
    refreshed(G, tok(3), minted(tok(4)), minted(tok(5), Kind.REFRESH)),
    GrantRevoked(**head(), grant_id=G, reason=Reason.CODE_REPLAYED),
]


def test_revoked_grant_of_a_person_is_never_revived_in_whatever_order() -> None:
    for order in permutations(PEOPLES):
        grant = given(*order).grant
        assert isinstance(grant, RevokedGrant)
        assert grant.was is not None
