"""The whole way of a person: sign in, consent, code, tokens, refresh, userinfo, as any client takes it."""

from __future__ import annotations

from tests.people import Browser, flow, person, redeem, web_app
from tests.running import Service


def test_person_signs_in_consents_and_the_client_has_tokens(service: Service) -> None:
    app, somebody, browser = web_app(service), person(service), Browser(service)
    made = flow(service, app, scope="openid offline_access")
    page = browser.get(made.url)
    assert page.title.startswith("Sign in")
    page = browser.sign_in(page, somebody)
    assert page.title.startswith("Allow")
    page = browser.consent(page)
    answer = page.answer
    assert answer["state"] == made.state
    assert answer["iss"] == service.issuer
    tokens = redeem(service, made, answer["code"])
    assert tokens.status_code == 200, tokens.text
    assert {"access_token", "refresh_token", "id_token"} <= tokens.json().keys()
