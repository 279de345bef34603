"""What one tab shows when another has changed who is signed in, and forms that carry what was meant for others."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from events.types import SessionEnded
from projections.registry import Session
from service.errors import Forbidden, InvalidRequest
from service.oauth.authorize import Shown, consent
from service.oauth.codes import code_of_form
from service.signin import doors
from service.signin.browser import CSRF, browser_of, csrf_token, seal_request
from tests.hosts import Host
from tests.signin.people import Browser
from tests.signin.test_doors import CROSS, asked, current, opened, sent, signed_out_form, somebody

WAITS = "client_id=cli_x&state=a"


def consent_form(here: Host, browser: Browser, session: Session) -> dict[str, str]:
    """As the consent page of this session carries it."""
    own = browser_of(here.runtime, browser.get())
    assert own is not None
    shown = msgspec.json.encode(Shown(session.session_id, "openid", WAITS, code_of_form())).decode()
    return {
        doors.REQUEST: seal_request(here.runtime, own, shown, "consent"),
        CSRF: csrf_token(here.runtime, own, "consent"),
        "decision": "allow",
    }


async def test_consent_page_of_a_session_that_was_replaced_in_another_tab_begins_again(here: Host) -> None:
    """Not a refusal: whoever is signed in by now is asked, and nothing was granted."""
    person, browser, session = await somebody(here)
    form = consent_form(here, browser, session)
    own = browser_of(here.runtime, browser.get())
    assert own is not None
    page = await asked(here, Browser())
    page.hidden = {
        doors.REQUEST: seal_request(here.runtime, own, "", "sign-in"),
        CSRF: csrf_token(here.runtime, own, doors.SIGN_IN),
    }
    assert (await sent(here, browser, page, person.username, person.password)).status == 303
    before = await here.runtime.ledger.last_seq()
    answer = await opened(here, browser, consent, browser.post("/oauth2/consent", form))
    # By a page: a browser holds a redirect from a form to the pages that the form may go to.
    assert (answer.status, answer.onward) == (200, f"/oauth2/authorize?{WAITS}")
    assert await here.runtime.ledger.last_seq() == before


async def test_consent_page_of_a_session_that_was_ended_in_another_tab_begins_again(here: Host) -> None:
    _, browser, session = await somebody(here)
    form = consent_form(here, browser, session)
    await opened(here, browser, doors.sign_out, browser.post("/sign-out", await signed_out_form(here, browser)))
    answer = await opened(here, browser, consent, browser.post("/oauth2/consent", form))
    # By a page: a browser holds a redirect from a form to the pages that the form may go to.
    assert (answer.status, answer.onward) == (200, f"/oauth2/authorize?{WAITS}")


async def test_consent_from_elsewhere_or_without_its_token_is_refused(here: Host) -> None:
    _, browser, session = await somebody(here)
    form = consent_form(here, browser, session)
    for fields, headers in ((form, CROSS), (form | {CSRF: "x"}, ()), ({**form, CSRF: ""}, ())):
        with pytest.raises(Forbidden):
            await opened(here, browser, consent, browser.post("/oauth2/consent", fields, headers=headers))
    stranger = Browser()
    with pytest.raises(Forbidden):
        await opened(here, stranger, consent, stranger.post("/oauth2/consent", form))


async def test_what_one_form_carries_is_a_bad_request_in_another(here: Host) -> None:
    """It was opened and could not be read: an error of ours."""
    _, browser, session = await somebody(here)
    own = browser_of(here.runtime, browser.get())
    assert own is not None
    sign_in = seal_request(here.runtime, own, WAITS, "sign-in")
    sign_out = await signed_out_form(here, browser)
    form = consent_form(here, browser, session)
    for door, path, fields in (
        (consent, "/oauth2/consent", form | {doors.REQUEST: sign_in}),
        (consent, "/oauth2/consent", form | {doors.REQUEST: sign_out[doors.REQUEST]}),
        (doors.sign_out, "/sign-out", sign_out | {doors.REQUEST: sign_in}),
        (doors.sign_out, "/sign-out", sign_out | {doors.REQUEST: form[doors.REQUEST]}),
    ):
        with pytest.raises(InvalidRequest):
            await opened(here, browser, door, browser.post(path, fields))


async def ends_of(here: Host, session: Session) -> list[str]:
    events = [one.event for one in await here.runtime.ledger.read(f"ledger.main.session.{session.session_id}")]
    return [event.reason for event in events if isinstance(event, SessionEnded)]


async def test_two_tabs_that_sign_out_at_once_are_both_told_and_it_is_recorded_once(here: Host) -> None:
    _, browser, session = await somebody(here)
    form = await signed_out_form(here, browser)
    asked_for = [browser.post("/sign-out", form) for _ in range(2)]
    answers = await here.projecting(asyncio.gather(*(doors.sign_out(here.runtime, one) for one in asked_for)))
    assert [answer.status for answer in answers] == [200, 200]
    assert await ends_of(here, session) == ["signed_out"]


@pytest.mark.parametrize("last", [0, 1])
async def test_two_tabs_that_sign_in_at_once_leave_the_person_signed_in(here: Host, last: int) -> None:
    """Whichever answer comes last: its cookie is the one that the browser keeps."""
    person, browser, before = await somebody(here)
    own = browser_of(here.runtime, browser.get())
    assert own is not None
    form = {
        doors.REQUEST: seal_request(here.runtime, own, "", "sign-in"),
        CSRF: csrf_token(here.runtime, own, doors.SIGN_IN),
        "username": person.username,
        "password": person.password,
    }
    asked_for = [browser.post("/sign-in", form) for _ in range(2)]
    answers = await here.projecting(asyncio.gather(*(doors.sign_in(here.runtime, one) for one in asked_for)))
    assert [answer.status for answer in answers] == [303, 303]
    browser.keep(answers[1 - last].headers)
    browser.keep(answers[last].headers)
    assert await current(here, browser) is not None
    assert await ends_of(here, before) == ["replaced"]
