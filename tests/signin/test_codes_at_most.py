"""An app's page in a loop cannot fill the log with codes that nobody has asked for."""

from __future__ import annotations

import time
from types import SimpleNamespace
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest

from service import runtime
from service.consents import give
from service.oauth.authorize import authorize
from service.runtime import CODES_PER_MINUTE_MAX
from tests.hosts import Host
from tests.people import challenge_of
from tests.signin.people import Browser
from tests.signin.test_doors import client, opened, somebody

BACK = "https://shop.example/back"


async def answer(here: Host, browser: Browser, client_id: str, prompt: str) -> dict[str, str]:
    """What the app is told at its redirect URI."""
    asked = {
        "client_id": client_id,
        "redirect_uri": BACK,
        "response_type": "code",
        "scope": "openid",
        "state": "s",
        "code_challenge": challenge_of("v" * 43),
        "code_challenge_method": "S256",
        "prompt": prompt,
    }
    asked = {name: value for name, value in asked.items() if value}
    page = await opened(here, browser, authorize, browser.get("/oauth2/authorize", urlencode(asked)))
    assert page.status == 303, page.text
    return dict(parse_qsl(urlsplit(page.headers["location"]).query))


@pytest.mark.parametrize("prompt", ["", "none"])
async def test_code_after_code_is_refused_until_the_minute_is_over(
    here: Host, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    clock = SimpleNamespace(time=lambda: 6e8, monotonic=time.monotonic)
    monkeypatch.setattr(runtime, "time", clock)
    web = {"grant_types": ("authorization_code",), "response_types": ("code",), "redirect_uris": (BACK,)}
    app, other = [await client(here, scope="openid", **web) for _ in range(2)]
    person, browser, _ = await somebody(here)
    for client_id in (app, other):
        await here.projecting(give(here.runtime, person.user_id, client_id, "openid", by=person.user_id))
    for _ in range(CODES_PER_MINUTE_MAX):
        assert "code" in await answer(here, browser, app, prompt)
    before = await here.runtime.ledger.last_seq()
    refused = await answer(here, browser, app, prompt)
    assert (refused["error"], refused["state"]) == ("temporarily_unavailable", "s")
    assert refused["error_description"] == (
        f"more than {CODES_PER_MINUTE_MAX} authorization codes for one session of this person within a minute: "
        "ask again in a minute"
    )
    assert await here.runtime.ledger.last_seq() == before
    # Who else asks, and who asks later, is not held up by it.
    assert "code" in await answer(here, browser, other, prompt)
    monkeypatch.setattr(clock, "time", lambda: 6e8 + 60)
    assert "code" in await answer(here, browser, app, prompt)


async def test_another_person_is_not_held_up(here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "time", SimpleNamespace(time=lambda: 7e8, monotonic=time.monotonic))
    web = {"grant_types": ("authorization_code",), "response_types": ("code",), "redirect_uris": (BACK,)}
    app = await client(here, scope="openid", **web)
    for _ in range(2):
        person, browser, _ = await somebody(here)
        await here.projecting(give(here.runtime, person.user_id, app, "openid", by=person.user_id))
        answers = [await answer(here, browser, app, "") for _ in range(CODES_PER_MINUTE_MAX + 1)]
        assert [one.get("error") for one in answers] == [None] * CODES_PER_MINUTE_MAX + ["temporarily_unavailable"]
