"""Where somebody signed in: told to them in a few words, and readable by nobody once they are erased."""

from __future__ import annotations

import pytest
from msgspec.structs import asdict

from service.commands import subject
from service.registry import disable_user
from service.signin import sessions
from service.signin.passwords import Proof
from service.signin.places import Place, browser_named, place_of
from tests.hosts import Host
from tests.making import DAY, START, ses
from tests.rsgi import request
from tests.signin.people import SYSTEM, joined

WEBKIT = "AppleWebKit/537.36 (KHTML, like Gecko)"
MOBILE_WEBKIT = "AppleWebKit/605.1.15 (KHTML, like Gecko)"
WINDOWS = "Mozilla/5.0 (Windows NT 10.0; Win64; x64)"
ANDROID = "Mozilla/5.0 (Linux; Android 10; K)"
IPHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X)"
AGENTS = {
    f"{WINDOWS[:-1]}; rv:132.0) Gecko/20100101 Firefox/132.0": "Firefox on Windows",
    f"{WINDOWS} {WEBKIT} Chrome/130.0.0.0 Safari/537.36": "Chrome on Windows",
    f"{WINDOWS} {WEBKIT} Chrome/130.0.0.0 Safari/537.36 Edg/130.0.0.0": "Edge on Windows",
    f"{WINDOWS} {WEBKIT} Chrome/130.0.0.0 Safari/537.36 OPR/114.0.0.0": "Opera on Windows",
    f"Mozilla/5.0 (X11; Linux x86_64) {WEBKIT} HeadlessChrome/130.0.0.0 Safari/537.36": "Chrome on Linux",
    f"Mozilla/5.0 (X11; CrOS x86_64 14541.0.0) {WEBKIT} Chrome/130.0.0.0 Safari/537.36": "Chrome on ChromeOS",
    f"Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) {MOBILE_WEBKIT} Version/17.5 Safari/605.1.15": "Safari on macOS",
    f"{ANDROID} {WEBKIT} Chrome/130.0.0.0 Mobile Safari/537.36": "Chrome on Android",
    f"{ANDROID} {WEBKIT} SamsungBrowser/26.0 Chrome/122.0.0.0 Mobile Safari/537.36": "Samsung Internet on Android",
    "Mozilla/5.0 (Android 14; Mobile; rv:132.0) Gecko/132.0 Firefox/132.0": "Firefox on Android",
    f"{IPHONE} {MOBILE_WEBKIT} Version/17.5 Mobile/15E148 Safari/604.1": "Safari on iPhone",
    f"{IPHONE} {MOBILE_WEBKIT} CriOS/130.0 Mobile/15E148 Safari/604.1": "Chrome on iPhone",
    f"{IPHONE} {MOBILE_WEBKIT} FxiOS/132.0 Mobile/15E148 Safari/605.1.15": "Firefox on iPhone",
    f"Mozilla/5.0 (iPad; CPU OS 12_5 like Mac OS X) {MOBILE_WEBKIT} Version/12.1 Safari/604.1": "Safari on iPad",
    "Mozilla/5.0 (compatible; Linux)": "A browser on Linux",
    "Firefox/1": "Firefox",
    "python-httpx/0.28.1": None,
    "<script>alert(1)</script>": None,
    "": None,
}


@pytest.mark.parametrize(("agent", "name"), AGENTS.items(), ids=[name or f"none {i}" for i, name in enumerate(AGENTS)])
def test_browser_is_named_as_a_person_calls_it(agent: str, name: str | None) -> None:
    assert browser_named(agent) == name


async def test_place_of_a_sign_in_is_sealed_for_the_person_and_gone_with_them(here: Host) -> None:
    person = await joined(here)
    user = here.runtime.view.user(person.user_id)
    assert user is not None
    agent = next(iter(AGENTS))
    incoming = request(("user-agent", agent), method="POST", path="/sign-in", peer="192.0.2.77")
    proof = Proof(person.user_id, user.seq, ("pwd",))
    session, _ = await here.projecting(sessions.begin(here.runtime, incoming, proof))
    assert await place_of(here.runtime, session) == Place("Firefox on Windows", "192.0.2.77")
    (recorded,) = await here.runtime.ledger.read(subject("session", session.session_id))
    assert not {"Firefox", "192.0.2.77"} & {str(value) for value in asdict(recorded.event).values()}
    await here.projecting(disable_user(here.runtime, SYSTEM, person.user_id, erase=True))
    assert await place_of(here.runtime, session) == Place()


async def test_place_of_a_session_that_was_begun_before_places_were_recorded_is_not_known(here: Host) -> None:
    person = await joined(here)
    session = sessions.Session(ses(1), person.user_id, START, START + DAY, ("pwd",), 1, 1)
    assert await place_of(here.runtime, session) == Place()
