"""What people allow apps: given, added to, withdrawn, and withdrawn to the end whoever is killed meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from events.types import ClientRegistered
from projections.registry import Consent, Session
from service import consents
from service.endings import finish
from service.rules.grants import Stamp
from service.rules.sessions import decide_give, decide_withdraw
from service.signin import sessions
from service.signin.passwords import Proof
from service.tokens import new_id
from tests.hosts import Host
from tests.making import START, cli, consented, head, metadata, usr, withdrawn
from tests.signin.people import joined
from tests.signin.test_doors import Person, current, granted, somebody, state

STAMP = Stamp(("0" * 32,), START, usr(1), None)


def consent(scope: str, *, seq: int = 5, withdrawn_seq: int = 0) -> Consent:
    return Consent(usr(1), cli(1), scope, START, seq, withdrawn_seq)


# Rules


@pytest.mark.parametrize(
    ("before", "scope", "after"),
    [
        (None, "a b", "a b"),
        (None, "", ""),
        (consent("a"), "b", "a b"),
        (consent("a b"), "b a", None),
        (consent("a b"), "", None),
        (consent("a b", withdrawn_seq=2), "a", None),
        (consent("", withdrawn_seq=5), "a", "a"),
        (consent("", withdrawn_seq=5), "", ""),
    ],
    ids=["first", "of nothing", "more", "the same", "less", "again", "after withdrawal", "nothing after withdrawal"],
)
def test_consent_is_what_was_given_before_and_now(before: Consent | None, scope: str, after: str | None) -> None:
    events = decide_give(STAMP, before, usr(1), cli(1), scope)
    assert [event.scope for event in events] == ([] if after is None else [after])


@pytest.mark.parametrize(
    ("before", "count"), [(None, 0), (consent("a"), 1), (consent(""), 1), (consent("", withdrawn_seq=5), 0)]
)
def test_consent_is_withdrawn_once(before: Consent | None, count: int) -> None:
    assert len(decide_withdraw(STAMP, before)) == count


# Commands


async def client(here: Host) -> str:
    client_id = new_id("cli")
    await here.record(ClientRegistered(**head(), client_id=client_id, metadata=metadata(), secret_sha256="0" * 64))
    await here.project()
    return client_id


def allowed(here: Host, user_id: str, client_id: str) -> str:
    """The scope that the client may be granted without asking the person."""
    consent = here.runtime.view.consent(user_id, client_id)
    return consent.scope if consent is not None else ""


async def give(here: Host, user_id: str, client_id: str, scope: str) -> int:
    return await here.projecting(consents.give(here.runtime, user_id, client_id, scope, by=user_id))


async def withdraw(here: Host, user_id: str, client_id: str) -> consents.Withdrawn:
    return await here.projecting(consents.withdraw(here.runtime, user_id, client_id, by=user_id))


async def test_consent_is_remembered_and_grows(here: Host) -> None:
    user, app = (await joined(here)).user_id, await client(here)
    assert allowed(here, user, app) == ""
    await give(here, user, app, "a b")
    seq = await give(here, user, app, "b c")
    assert allowed(here, user, app) == "a b c"
    assert await give(here, user, app, "a") == seq
    assert allowed(here, (await joined(here)).user_id, app) == ""


async def test_two_consents_at_once_are_both_kept(here: Host) -> None:
    """Two tabs, two workers: whoever comes second adds to the first."""
    user, app = (await joined(here)).user_id, await client(here)

    async def both() -> None:
        await asyncio.gather(
            *(consents.give(here.runtime, user, app, scope, by=user) for scope in ("a", "b", "c", "d"))
        )

    await here.projecting(both())
    assert set(allowed(here, user, app).split()) == {"a", "b", "c", "d"}


async def test_withdrawal_of_what_was_never_given_is_nothing(here: Host) -> None:
    user, app = (await joined(here)).user_id, await client(here)
    assert await withdraw(here, user, app) == consents.Withdrawn(0, 0)
    assert await here.runtime.ledger.read(f"ledger.main.consent.{user}_{app}") == []


async def app_of(here: Host, grant_id: str) -> str:
    grant = here.runtime.view.family(grant_id).grant
    known = getattr(grant, "becomes", grant)
    client_id: str = known.client_id
    return client_id


async def with_grants(here: Host) -> tuple[Person, Session, str, list[str]]:
    """A person with grants to one client: redeemed, offline, not redeemed yet."""
    person, _, session = await somebody(here)
    first = await granted(here, session, offline=False)
    app = await app_of(here, first)
    grants = [first]
    for offline, redeemed in ((True, True), (True, False), (False, False)):
        grants.append(await granted(here, session, offline=offline, redeemed=redeemed, client_id=app))
    await give(here, person.user_id, app, "openid")
    return person, session, app, grants


async def test_withdrawal_ends_whatever_the_client_was_granted(here: Host) -> None:
    person, session, app, grants = await with_grants(here)
    other = await granted(here, session, offline=False)
    done = await withdraw(here, person.user_id, app)
    assert done.grants == 4
    assert [state(here, grant_id) for grant_id in grants] == ["RevokedGrant"] * 4
    assert state(here, other) == "ActiveGrant"
    for grant_id in grants:
        (last,) = (await here.runtime.ledger.read(f"ledger.main.grant.{grant_id}"))[-1:]
        assert last.event.reason == "consent_withdrawn"  # type: ignore[union-attr]
    assert allowed(here, person.user_id, app) == ""
    again = await withdraw(here, person.user_id, app)
    assert (again.grants, again.seq) == (0, done.seq)


async def test_withdrawal_is_done_where_the_view_does_not_know_yet_that_it_was_given_again(here: Host) -> None:
    """On another host, a moment ago: here it looks as if there were nothing to withdraw."""
    user, app = (await joined(here)).user_id, await client(here)
    await here.record(consented(user, app, "openid"), withdrawn(user, app))
    await here.project()
    await here.record(consented(user, app, "openid"))
    seq = await here.runtime.ledger.last_seq()
    assert (await withdraw(here, user, app)).seq > seq
    assert allowed(here, user, app) == ""


async def test_consent_is_given_where_the_view_does_not_know_yet_that_it_was_withdrawn(here: Host) -> None:
    user, app = (await joined(here)).user_id, await client(here)
    await give(here, user, app, "openid")
    await here.record(withdrawn(user, app))
    seq = await here.runtime.ledger.last_seq()
    assert await give(here, user, app, "openid") > seq
    assert allowed(here, user, app) == "openid"


async def test_grants_after_the_withdrawal_go_on_when_it_is_repeated(here: Host) -> None:
    person, session, app, _ = await with_grants(here)
    await withdraw(here, person.user_id, app)
    await give(here, person.user_id, app, "openid")
    later = await granted(here, session, offline=False, client_id=app)
    assert await looked_at(here, f"ledger.main.consent.{person.user_id}_{app}") == 0
    assert state(here, later) == "ActiveGrant"
    assert (await withdraw(here, person.user_id, app)).grants == 1
    assert state(here, later) == "RevokedGrant"


# Killed between the steps


def proof(person: Person) -> Proof:
    return Proof(person.user_id, 2**40, ("pwd",))


async def killed_while_the_view_stands(here: Host, work: Any) -> None:
    """The event is recorded and the view does not follow, so that the worker waits; then it is no more."""
    before = await here.runtime.ledger.last_seq()
    task = asyncio.ensure_future(work)
    while await here.runtime.ledger.last_seq() == before:  # noqa: ASYNC110 - the log does not tell
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await here.project()


async def looked_at(here: Host, subject: str) -> int:
    """How many grants another worker ended, who looked at the last event of a session or consent."""
    (end,) = (await here.runtime.ledger.read(subject))[-1:]
    return await here.projecting(finish(here.runtime, end))


async def test_withdrawal_that_was_cut_off_is_completed_by_the_next_call(here: Host) -> None:
    person, _, app, grants = await with_grants(here)
    await killed_while_the_view_stands(here, consents.withdraw(here.runtime, person.user_id, app, by=person.user_id))
    assert allowed(here, person.user_id, app) == ""
    assert state(here, grants[0]) == "ActiveGrant"
    assert (await withdraw(here, person.user_id, app)).grants == 4
    assert [state(here, grant_id) for grant_id in grants] == ["RevokedGrant"] * 4


async def test_withdrawal_that_was_cut_off_is_completed_by_another_worker(here: Host) -> None:
    person, _, app, grants = await with_grants(here)
    await killed_while_the_view_stands(here, consents.withdraw(here.runtime, person.user_id, app, by=person.user_id))
    assert await looked_at(here, f"ledger.main.consent.{person.user_id}_{app}") == 4
    assert [state(here, grant_id) for grant_id in grants] == ["RevokedGrant"] * 4
    assert await looked_at(here, f"ledger.main.consent.{person.user_id}_{app}") == 0


async def test_sign_out_that_was_cut_off_is_completed_by_another_worker(here: Host) -> None:
    person, _, session = await somebody(here)
    grants = [await granted(here, session, offline=offline) for offline in (False, True)]
    work = sessions.end(here.runtime, session, "signed_out", by=person.user_id)
    await killed_while_the_view_stands(here, work)
    assert state(here, grants[0]) == "ActiveGrant"
    assert await looked_at(here, f"ledger.main.session.{session.session_id}") == 1
    assert [state(here, grant_id) for grant_id in grants] == ["RevokedGrant", "ActiveGrant"]


async def test_replaced_session_takes_nothing_with_it(here: Host) -> None:
    """Whoever signs in anew in the same browser is not signed out of their apps."""
    person, browser, session = await somebody(here)
    grant_id = await granted(here, session, offline=False)
    await here.projecting(sessions.begin(here.runtime, browser.get(), proof(person)))
    row = here.runtime.view.session(session.session_id)
    assert row is not None
    assert row.reason == "replaced"
    assert await looked_at(here, f"ledger.main.session.{session.session_id}") == 0
    assert state(here, grant_id) == "ActiveGrant"


async def test_sign_in_that_was_cut_off_leaves_nobody_signed_in_and_is_done_again(here: Host) -> None:
    """The session is on record and its cookie never was told: nobody can be in it."""
    person, browser, _ = await somebody(here)
    work = sessions.begin(here.runtime, browser.get(), proof(person))
    await killed_while_the_view_stands(here, work)
    assert await current(here, browser) is None
    again, cookie = await here.projecting(sessions.begin(here.runtime, browser.get(), proof(person)))
    browser.keep([cookie])
    assert await current(here, browser) == again
