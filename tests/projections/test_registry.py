"""The folds of clients, users, names, scopes and keys, and the cut-offs, by given/then."""

from __future__ import annotations

from functools import reduce

import msgspec
import pytest
from msgspec.structs import replace

from events.types import (
    ClientChanged,
    ClientDisabled,
    ClientRevoked,
    ClientSecretRotated,
    KeyActivated,
    KeyIntroduced,
    KeyRemoved,
    KeyRetired,
    KeyRevoked,
    LedgerEvent,
    Reason,
    ScopeChanged,
    ScopeDisabled,
    SubjectErased,
    SubjectRevoked,
    UserChanged,
    UserDisabled,
    UsernameClaimed,
    UserPasswordChanged,
)
from projections import registry
from projections.registry import Client, Consent, Cut, Row, Scope, Secret, Session, SigningKey, User, Username
from tests.making import (
    DAY,
    START,
    History,
    after,
    cli,
    consented,
    everything,
    head,
    joined,
    metadata,
    registered,
    scope,
    ses,
    signed_in,
    signed_out,
    usr,
    withdrawn,
)


def given(*events: LedgerEvent) -> Row | None:
    row: Row | None = None
    for recorded in History(*events).recorded:
        row = registry.evolve(row, recorded)
    return row


def cut_by(*events: LedgerEvent) -> Cut | None:
    def step(cut: Cut | None, found: tuple[str, Cut] | None) -> Cut | None:
        return found[1] if found else cut

    return reduce(lambda cut, recorded: step(cut, registry.cut(cut, recorded)), History(*events).recorded, None)


def test_client_is_registered_with_its_secret() -> None:
    assert given(registered(cli(1))) == Client(cli(1), metadata(), (Secret("0" * 64),), after(1), 1)
    public = given(registered(cli(1), secret=None))
    assert isinstance(public, Client)
    assert public.secrets == ()


def test_client_change_replaces_the_metadata() -> None:
    row = given(registered(cli(1)), ClientChanged(**head(), client_id=cli(1), metadata=metadata(scope="c")))
    assert row == Client(cli(1), metadata(scope="c"), (Secret("0" * 64),), after(1), 2)


def rotated(digit: str, ends_at: object = START + DAY) -> ClientSecretRotated:
    return ClientSecretRotated(**head(), client_id=cli(1), secret_sha256=digit * 64, previous_ends_at=ends_at)


def test_rotated_secret_ends_and_the_one_before_it_is_forgotten() -> None:
    row = given(registered(cli(1)), rotated("1"))
    assert isinstance(row, Client)
    assert row.secrets == (Secret("1" * 64), Secret("0" * 64, START + DAY))
    row = given(registered(cli(1)), rotated("1"), rotated("2", START + 2 * DAY))
    assert isinstance(row, Client)
    assert row.secrets == (Secret("2" * 64), Secret("1" * 64, START + 2 * DAY))


def test_disabled_client_has_no_secret_and_stays_disabled() -> None:
    disabled = ClientDisabled(**head(), client_id=cli(1), reason=Reason.ADMIN)
    row = given(registered(cli(1)), disabled, disabled)
    assert isinstance(row, Client)
    assert (row.secrets, row.disabled_at, row.seq) == ((), after(2), 3)
    changed = given(
        registered(cli(1)), disabled, ClientChanged(**head(), client_id=cli(1), metadata=metadata()), rotated("1")
    )
    assert isinstance(changed, Client)
    assert changed.disabled_at == after(2)


def test_user_follows_its_changes() -> None:
    row = given(
        joined(usr(1), password="$argon2id$x"),
        UserChanged(**head(), user_id=usr(1), sealed_profile=b"new", scope="c"),
        UserPasswordChanged(**head(), user_id=usr(1), password_hash=None),
    )
    assert isinstance(row, User)
    assert (row.sealed_profile, row.scope, row.has_password, row.seq) == (b"new", "c", False, 3)


def test_row_of_a_user_holds_no_password_hash() -> None:
    row = given(joined(usr(1), password="$argon2id$x"))
    assert "argon2" not in repr(row)


def test_erased_user_keeps_nothing_sealed_and_stays_erased() -> None:
    erased = SubjectErased(**head(), user_id=usr(1))
    row = given(joined(usr(1)), UserDisabled(**head(), user_id=usr(1), reason=Reason.ADMIN), erased, erased)
    assert isinstance(row, User)
    assert (row.sealed_profile, row.disabled_at, row.erased_at) == (b"", after(2), after(3))


def test_username_belongs_to_who_claimed_it_first() -> None:
    def claimed(user: str) -> UsernameClaimed:
        return UsernameClaimed(**head(), username_hash="5e" * 32, user_id=user)

    assert given(claimed(usr(1)), claimed(usr(2))) == Username(usr(1), 1)


def test_scope_follows_its_changes_and_stays_disabled() -> None:
    row = given(
        scope("b", implies=("a",)),
        ScopeDisabled(**head(), name="b"),
        ScopeChanged(**head(), name="b", description="d", audience=("x",), implies=()),
        ScopeDisabled(**head(), name="b"),
    )
    assert row == Scope("b", "d", ("x",), (), 4, after(2))


def test_session_lasts_until_it_is_ended_and_the_first_ending_counts() -> None:
    begun = Session(ses(1), usr(1), START, START + DAY / 2, ("pwd",), 1, 1)
    assert given(signed_in(ses(1), usr(1))) == begun
    ended = given(signed_in(ses(1), usr(1)), signed_out(ses(1), usr(1)), signed_out(ses(1), usr(1), "admin"))
    assert ended == replace(begun, seq=3, ended_at=after(2), reason="signed_out")


def test_consent_is_what_was_given_last() -> None:
    row = given(consented(usr(1), cli(1), "a"), consented(usr(1), cli(1), "a b"))
    assert row == Consent(usr(1), cli(1), "a b", after(2), 2)


def test_withdrawn_consent_is_empty_and_remembers_when_although_it_is_given_again() -> None:
    row = given(consented(usr(1), cli(1)), withdrawn(usr(1), cli(1)))
    assert row == Consent(usr(1), cli(1), "", after(2), 2, withdrawn_seq=2)
    row = given(consented(usr(1), cli(1)), withdrawn(usr(1), cli(1)), consented(usr(1), cli(1), "a"))
    assert row == Consent(usr(1), cli(1), "a", after(3), 3, withdrawn_seq=2)


KEY = KeyIntroduced(**head(), kid="ed-1", alg="EdDSA", public_jwk="{}")
ACTIVATED = KeyActivated(**head(), kid="ed-1")
RETIRED = KeyRetired(**head(), kid="ed-1", remove_at=START + DAY)
REVOKED = KeyRevoked(**head(), kid="ed-1", reason=Reason.COMPROMISED)
REMOVED = KeyRemoved(**head(), kid="ed-1")


def test_key_is_announced_then_active_then_retired_then_gone() -> None:
    announced = SigningKey("ed-1", "EdDSA", "{}", "announced", after(1), 1)
    assert given(KEY) == announced
    active = given(KEY, ACTIVATED)
    assert isinstance(active, SigningKey)
    assert (active.state, active.activated_at, active.seq) == ("active", after(2), 2)
    retired = given(KEY, ACTIVATED, RETIRED)
    assert isinstance(retired, SigningKey)
    assert (retired.state, retired.retired_at, retired.remove_at) == ("retired", after(3), START + DAY)
    assert given(KEY, ACTIVATED, RETIRED, REMOVED) is None


def test_key_keeps_its_purpose() -> None:
    row = given(msgspec.structs.replace(KEY, purpose="id"), ACTIVATED, RETIRED)
    assert isinstance(row, SigningKey)
    assert row.purpose == "id"


BEFORE_REVOKED: dict[str, tuple[LedgerEvent, ...]] = {
    "announced": (KEY,),
    "active": (KEY, ACTIVATED),
    "retired": (KEY, ACTIVATED, RETIRED),
}


@pytest.mark.parametrize("before", BEFORE_REVOKED.values(), ids=BEFORE_REVOKED.keys())
def test_revoked_key_stays_revoked(before: tuple[LedgerEvent, ...]) -> None:
    row = given(*before, REVOKED)
    assert isinstance(row, SigningKey)
    assert (row.state, row.revoked_at, row.remove_at) == ("revoked", after(len(before) + 1), None)
    later = given(*before, REVOKED, ACTIVATED, RETIRED, REVOKED)
    assert isinstance(later, SigningKey)
    assert (later.state, later.revoked_at, later.remove_at) == ("revoked", row.revoked_at, None)
    assert given(*before, REVOKED, REMOVED) is None


@pytest.mark.parametrize("later", [ACTIVATED, RETIRED], ids=["activated", "retired"])
def test_retired_key_is_never_active_again(later: LedgerEvent) -> None:
    before, row = given(KEY, ACTIVATED, RETIRED), given(KEY, ACTIVATED, RETIRED, later)
    assert isinstance(before, SigningKey)
    assert isinstance(row, SigningKey)
    assert (before.state, before.retired_at, before.remove_at) == (row.state, row.retired_at, row.remove_at)


def test_fold_is_total_for_what_was_never_registered() -> None:
    """Events whose first one this log does not have make no row and raise nothing."""
    creating = {"ClientRegistered", "UserRegistered", "UsernameClaimed", "ScopeRegistered", "KeyIntroduced"}
    creating |= {"SessionStarted", "ConsentGiven"}
    for recorded in everything().recorded:
        made = registry.evolve(None, recorded)
        assert (made is not None) == (type(recorded.event).__name__ in creating)


# Cut-offs


def revoked_client() -> ClientRevoked:
    return ClientRevoked(**head(), client_id=cli(1), reason=Reason.ADMIN)


def disabled_client() -> ClientDisabled:
    return ClientDisabled(**head(), client_id=cli(1), reason=Reason.DISABLED)


def test_revocation_cuts_off_at_its_own_sequence() -> None:
    assert cut_by(scope("x"), revoked_client()) == Cut(2, after(2), Reason.ADMIN)
    subject = SubjectRevoked(**head(), user_id=usr(1), reason=Reason.ABUSE)
    assert cut_by(subject) == Cut(1, after(1), Reason.ABUSE)
    password = UserPasswordChanged(**head(), user_id=usr(1), password_hash=None)
    assert cut_by(subject, password) == Cut(2, after(2), Reason.PASSWORD_CHANGED)


def test_later_revocation_cuts_off_more() -> None:
    assert cut_by(revoked_client(), scope("x"), revoked_client()) == Cut(3, after(3), Reason.ADMIN)


def test_revoked_key_is_cut_off_once() -> None:
    assert cut_by(REVOKED, scope("x"), REVOKED) == Cut(1, after(1), Reason.COMPROMISED)


def test_disabling_marks_and_does_not_cut() -> None:
    """So that the answer can tell a disabled owner from a revocation."""
    assert cut_by(disabled_client()) == Cut(0, after(1), Reason.DISABLED, disabled=True)
    assert cut_by(UserDisabled(**head(), user_id=usr(1), reason=Reason.ADMIN)) == (
        Cut(0, after(1), Reason.ADMIN, disabled=True)
    )


def test_disabled_owner_stays_disabled_and_revoked_stays_revoked() -> None:
    after_both = cut_by(revoked_client(), disabled_client())
    assert after_both is not None
    assert (after_both.seq, after_both.disabled) == (1, True)
    after_both = cut_by(disabled_client(), revoked_client())
    assert after_both is not None
    assert (after_both.seq, after_both.disabled) == (2, True)


def test_other_events_cut_nothing_off() -> None:
    cutting = {ClientRevoked, ClientDisabled, SubjectRevoked, UserPasswordChanged, UserDisabled, KeyRevoked}
    for recorded in everything().recorded:
        assert (registry.cut(None, recorded) is not None) == (type(recorded.event) in cutting)
