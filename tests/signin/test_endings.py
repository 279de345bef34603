"""What ends with a session: all of it, by whatever the session ended, and no more work for it than needs be."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from events.types import SessionStarted
from projections.registry import Session
from service import endings
from service.endings import keep_finishing
from service.pages.account import sign_out_everywhere
from service.signin import doors, sessions
from service.signin.browser import CSRF, browser_of, csrf_token, seal_request, set_cookie
from service.signin.passwords import Proof
from service.tokens import new_id, now
from tests.hosts import Host, host
from tests.making import head, signed_out, withdrawn
from tests.signin.people import Browser, Person
from tests.signin.test_consents import killed_while_the_view_stands, looked_at, with_grants
from tests.signin.test_doors import asked, current, granted, opened, sent, signed_out_form, somebody, state

SECONDS_MAX = 60.0


async def signed_in_again(here: Host, browser: Browser, person: Person) -> Session:
    """In a browser that somebody is in: the app wanted them to sign in, whoever they are."""
    own = browser_of(here.runtime, browser.get())
    assert own is not None
    page = await asked(here, Browser())
    page.hidden = {
        doors.REQUEST: seal_request(here.runtime, own, "", "sign-in"),
        CSRF: csrf_token(here.runtime, own, doors.SIGN_IN),
    }
    await sent(here, browser, page, person.username, person.password)
    session = await current(here, browser)
    assert session is not None
    return session


async def sign_out(here: Host, browser: Browser) -> None:
    await opened(here, browser, doors.sign_out, browser.post("/sign-out", await signed_out_form(here, browser)))


def started(user_id: str, *, hours: float) -> SessionStarted:
    """Which ends in so many hours, or did."""
    at = now() + timedelta(hours=hours - 12)
    return SessionStarted(
        **head(at),
        session_id=new_id("ses"),
        user_id=user_id,
        auth_time=at,
        expires_at=at + timedelta(hours=12),
        methods=("pwd",),
        user_seq=2**40,
    )


async def began(here: Host, user_id: str, *, hours: float = 12) -> Session:
    event = started(user_id, hours=hours)
    await here.record(event)
    await here.project()
    session = here.runtime.view.session(event.session_id)
    assert session is not None
    return session


# What one can no longer sign out of


async def test_what_a_replaced_session_left_ends_with_the_next_sign_out(here: Host) -> None:
    person, browser, first = await somebody(here)
    grants = [await granted(here, first, offline=offline) for offline in (False, True)]
    await signed_in_again(here, browser, person)
    assert [state(here, one) for one in grants] == ["ActiveGrant", "ActiveGrant"]
    await sign_out(here, browser)
    assert [state(here, one) for one in grants] == ["RevokedGrant", "ActiveGrant"]


async def test_what_an_expired_session_left_ends_with_the_next_sign_out(here: Host) -> None:
    person, browser, _ = await somebody(here)
    expired, elsewhere = await began(here, person.user_id, hours=-0.5), await began(here, person.user_id)
    grants = [
        await granted(here, expired, offline=False),
        await granted(here, expired, offline=True),
        await granted(here, elsewhere, offline=False),
    ]
    await sign_out(here, browser)
    assert [state(here, one) for one in grants] == ["RevokedGrant", "ActiveGrant", "ActiveGrant"]


async def test_sign_out_that_was_completed_late_ends_what_it_would_have_then(here: Host) -> None:
    """What expired or was granted since is not its own."""
    person, browser, session = await somebody(here)
    replaced = await granted(here, session, offline=False)
    again = await signed_in_again(here, browser, person)
    await sign_out(here, browser)
    expired = await began(here, person.user_id, hours=-0.5)
    later = await granted(here, expired, offline=False)
    assert await looked_at(here, f"ledger.main.session.{again.session_id}") == 0
    assert (state(here, replaced), state(here, later)) == ("RevokedGrant", "ActiveGrant")


def drop_expired(here: Host, *, hours: float) -> None:
    """As the view does by itself in so many hours, while workers are stopped or the log is away."""
    here._writer.call("trim", now() + timedelta(hours=hours))


async def test_sign_out_that_was_completed_late_spares_a_session_that_stood_then_and_is_dropped_now(here: Host) -> None:
    person, browser, session = await somebody(here)
    elsewhere = await began(here, person.user_id)
    grant_id = await granted(here, elsewhere, offline=False)
    await sign_out(here, browser)
    drop_expired(here, hours=14)
    assert here.runtime.view.session(elsewhere.session_id) is None
    assert await looked_at(here, f"ledger.main.session.{session.session_id}") == 0
    assert state(here, grant_id) == "ActiveGrant"


async def test_sign_out_that_was_completed_late_ends_what_was_left_by_a_session_that_is_dropped_now(
    here: Host,
) -> None:
    person, _, session = await somebody(here)
    expired, replaced = await began(here, person.user_id, hours=-0.5), await began(here, person.user_id)
    grants = [await granted(here, one, offline=False) for one in (session, expired, replaced)]
    await here.record(signed_out(replaced.session_id, person.user_id, "replaced"))
    await here.record(signed_out(session.session_id, person.user_id))
    await here.project()
    drop_expired(here, hours=14)
    assert here.runtime.view.session(replaced.session_id) is None
    assert await looked_at(here, f"ledger.main.session.{session.session_id}") == 3
    assert [state(here, one) for one in grants] == ["RevokedGrant"] * 3


async def test_sign_out_spares_what_was_granted_in_a_session_that_the_log_does_not_have(here: Host) -> None:
    _, browser, session = await somebody(here)
    grant_id = await granted(here, replace(session, session_id=new_id("ses")), offline=False)
    await sign_out(here, browser)
    assert state(here, grant_id) == "ActiveGrant"


async def test_another_person_who_signs_in_signs_the_first_one_out(here: Host) -> None:
    _, browser, first = await somebody(here)
    grants = [await granted(here, first, offline=offline) for offline in (False, True)]
    other, _, _ = await somebody(here)
    assert (await signed_in_again(here, browser, other)).user_id == other.user_id
    assert [state(here, one) for one in grants] == ["RevokedGrant", "ActiveGrant"]
    row = here.runtime.view.session(first.session_id)
    assert row is not None
    assert row.reason == "signed_out"


async def test_another_person_who_signs_in_ends_what_was_left_there_by_an_expired_session(here: Host) -> None:
    person, browser, _ = await somebody(here)
    expired = await began(here, person.user_id, hours=-0.5)
    browser.keep([set_cookie(here.runtime, "session", sessions._signed(here.runtime, expired.session_id))])
    grant_id = await granted(here, expired, offline=False)
    other, _, _ = await somebody(here)
    await signed_in_again(here, browser, other)
    assert state(here, grant_id) == "RevokedGrant"


# Everywhere


async def everywhere(here: Host, browser: Browser, session: Session) -> Any:
    own = browser_of(here.runtime, browser.get())
    assert own is not None
    fields = {CSRF: csrf_token(here.runtime, own, f"account {session.session_id}")}
    return await opened(here, browser, sign_out_everywhere, browser.post("/account/sign-out-everywhere", fields))


async def test_everywhere_is_in_every_session_however_many_there_are(
    here: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever knows the password may begin as many as they like: the newest must not survive."""
    person, browser, session = await somebody(here)
    monkeypatch.setattr(sessions, "_SLICE", 3)
    await here.record(*[started(person.user_id, hours=12) for _ in range(10)])
    await here.project()
    assert len(await sessions.standing(here.runtime, person.user_id)) == 11
    assert (await everywhere(here, browser, session)).heading == "You are signed out"
    assert await sessions.standing(here.runtime, person.user_id) == []


async def test_everywhere_is_in_sessions_too_that_the_view_does_not_have_yet(here: Host) -> None:
    person, browser, session = await somebody(here)
    event = started(person.user_id, hours=12)
    own = browser_of(here.runtime, browser.get())
    assert own is not None
    fields = {CSRF: csrf_token(here.runtime, own, f"account {session.session_id}")}
    incoming = browser.post("/account/sign-out-everywhere", fields)
    await here.record(event)
    assert here.runtime.view.session(event.session_id) is None
    await here.projecting(sign_out_everywhere(here.runtime, incoming))
    assert await sessions.standing(here.runtime, person.user_id) == []


async def test_everywhere_ends_what_was_granted_in_any_of_them(here: Host) -> None:
    person, browser, session = await somebody(here)
    elsewhere, expired = await began(here, person.user_id), await began(here, person.user_id, hours=-0.5)
    _, _, others = await somebody(here)
    grants = [await granted(here, one, offline=False) for one in (session, elsewhere, expired, others)]
    offline = await granted(here, elsewhere, offline=True)
    await everywhere(here, browser, session)
    assert [state(here, one) for one in grants] == [*["RevokedGrant"] * 3, "ActiveGrant"]
    assert state(here, offline) == "ActiveGrant"


async def left_with(here: Host, browser: Browser, first: Session, other: Person) -> None:
    """Another person signs in there, and the worker is killed as soon as that is recorded."""
    proof = Proof(other.user_id, 2**40, ("pwd",))
    before = await here.runtime.ledger.last_seq()
    await killed_while_the_view_stands(here, sessions.begin(here.runtime, browser.get(), proof))
    recorded = [await here.runtime.ledger.get(seq) for seq in (before + 1, before + 2)]
    assert [type(one.event).__name__ for one in recorded if one is not None] == ["SessionStarted", "SessionEnded"]
    assert first.user_id != other.user_id


async def test_what_an_expired_session_left_ends_though_the_worker_of_the_other_person_was_killed(here: Host) -> None:
    person, browser, _ = await somebody(here)
    expired = await began(here, person.user_id, hours=-0.5)
    browser.keep([set_cookie(here.runtime, "session", sessions._signed(here.runtime, expired.session_id))])
    grants = [await granted(here, expired, offline=offline) for offline in (False, True)]
    other, _, _ = await somebody(here)
    await left_with(here, browser, expired, other)
    assert state(here, grants[0]) == "ActiveGrant"
    assert await looked_at(here, f"ledger.main.session.{expired.session_id}") == 1
    assert [state(here, one) for one in grants] == ["RevokedGrant", "ActiveGrant"]


async def test_what_a_replaced_session_left_ends_though_the_worker_of_the_other_person_was_killed(here: Host) -> None:
    """The answer with the cookie of the second session never came, and then another person signs in."""
    person, browser, first = await somebody(here)
    grant_id = await granted(here, first, offline=False)
    await here.projecting(sessions.begin(here.runtime, browser.get(), Proof(person.user_id, 2**40, ("pwd",))))
    other, _, _ = await somebody(here)
    await left_with(here, browser, first, other)
    row = here.runtime.view.session(first.session_id)
    assert row is not None
    assert row.reason == "signed_out"
    assert await looked_at(here, f"ledger.main.session.{first.session_id}") == 1
    assert state(here, grant_id) == "RevokedGrant"


async def test_end_of_a_session_that_the_view_has_dropped_is_recorded_by_whoever_comes_next(here: Host) -> None:
    person, browser, _ = await somebody(here)
    gone = started(person.user_id, hours=-24)
    await here.record(gone)
    browser.keep([set_cookie(here.runtime, "session", sessions._signed(here.runtime, gone.session_id))])
    await here.project()
    here._writer.call("trim", now())
    assert here.runtime.view.session(gone.session_id) is None
    other, _, _ = await somebody(here)
    assert (await signed_in_again(here, browser, other)).user_id == other.user_id
    events = [one.event for one in await here.runtime.ledger.read(f"ledger.main.session.{gone.session_id}")]
    assert [type(event).__name__ for event in events] == ["SessionStarted", "SessionEnded"]


# What is made up for


@contextlib.asynccontextmanager
async def worker(here: Host) -> AsyncIterator[asyncio.Task[None]]:
    """One that does nothing but this; killed at the end."""
    task = asyncio.ensure_future(keep_finishing(here.runtime))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def cut_off(here: Host) -> list[str]:
    """Grants that a sign-out and a withdrawal were to end, whose worker was killed behind the event."""
    person, session, app, grants = await with_grants(here)
    grants.append(await granted(here, session, offline=False))
    await here.record(withdrawn(person.user_id, app), signed_out(session.session_id, person.user_id))
    await here.project()
    return grants


async def wait_for(here: Host, grants: list[str]) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while [state(here, one) for one in grants] != ["RevokedGrant"] * len(grants):
        assert time.monotonic() < deadline, "they are not ended"
        await here.project()
        await asyncio.sleep(0.01)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "_LATER_SECONDS", 0.0)


async def test_worker_that_goes_on_ends_what_another_left(here: Host, soon: None) -> None:
    async with worker(here), asyncio.timeout(60):
        grants = await cut_off(here)
        await wait_for(here, grants)


async def test_worker_that_was_killed_over_it_leaves_it_to_another(
    here: Host, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = asyncio.Event()

    async def never(*_: Any) -> int:
        taken.set()
        await asyncio.Event().wait()
        return 0

    grants = await cut_off(here)
    with monkeypatch.context() as patched:
        patched.setattr(endings, "finish", never)
        async with worker(here), asyncio.timeout(60):
            await taken.wait()
    async with worker(here), asyncio.timeout(120):  # when the lease is over
        await wait_for(here, grants)


async def test_each_end_is_looked_at_once_by_one_of_all_workers(
    here: Host, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    finish = endings.finish

    async def noted(runtime: Any, end: Any) -> int:
        seen.append(end.seq)
        return await finish(runtime, end)

    monkeypatch.setattr(endings, "finish", noted)
    async with worker(here), worker(here), asyncio.timeout(60):
        grants = await cut_off(here)
        await wait_for(here, grants)
    assert len(seen) == len(set(seen))
    async with worker(here), worker(here), asyncio.timeout(60):
        before = len(seen)
        grants = await cut_off(here)
        await wait_for(here, grants)
    assert len(seen) == before + 2


async def test_log_that_nobody_has_looked_at_is_looked_at_from_shortly_before_its_end(
    tmp_path: Path, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Restored, or of an earlier release: what was cut off last is completed, and no old sign-out is done over."""
    async with host(tmp_path) as one:
        old = await cut_off(one)
        last = await cut_off(one)
        recorded = await one.runtime.ledger.last_of("ledger.main.session.*", "ledger.main.consent.*")
        monkeypatch.setattr(endings, "_BEFORE", recorded[-1].recorded_at - recorded[-2].recorded_at)
        async with worker(one), asyncio.timeout(60):
            await wait_for(one, last)
        assert "RevokedGrant" not in [state(one, grant_id) for grant_id in old]


async def test_end_behind_very_many_events_that_are_none_is_soon_looked_at(
    tmp_path: Path, soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are fetched many at a time, and nobody waits for the answer to each."""
    async with host(tmp_path) as one:
        user_id = new_id("usr")
        for _ in range(10):
            await one.record(*[started(user_id, hours=12) for _ in range(100)])
        grants = await cut_off(one)
        requests: list[str] = []
        publish = one.runtime.nc.publish

        async def noted(subject: str, payload: bytes = b"", reply: str = "", **more: Any) -> None:
            if reply:
                requests.append(subject)
            await publish(subject, payload, reply=reply, **more)

        monkeypatch.setattr(one.runtime.nc, "publish", noted)
        async with worker(one), asyncio.timeout(60):
            await wait_for(one, grants)
        fetches = [name for name in requests if name.startswith("$JS.API.CONSUMER.MSG.NEXT.")]
        answered = [name for name in requests if name.startswith("$JS.ACK.")]
        assert 1 <= len(fetches) <= 20
        assert 1 <= len(answered) <= 2
