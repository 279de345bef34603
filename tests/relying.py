"""Applications of other people's making and those who sign in to them: what their tests work with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests import people
from tests.people import Browser, Page
from tests.running import CANARY_NAME, App, Service, unique

BACK = people.CALLBACK
SIGNED_OUT = "https://app.example/signed-out"
OPENID = "openid profile email"


def web_app(service: Service, **metadata: Any) -> App:
    """Registers an application that people sign in to, with everything it may ask for."""
    wanted = {"post_logout_redirect_uris": [SIGNED_OUT], "access_token_format": "jwt", **metadata}
    return people.web_app(service, **wanted)


@dataclass(frozen=True)
class Person:
    """Somebody with an account and a browser of their own, who does what pages ask.

    What they answer is what arrives at the application in the end: the `url`, and the `form` if one was posted there.
    """

    browser: Browser
    account: dict[str, Any]

    @property
    def user_id(self) -> str:
        user_id: str = self.account["user_id"]
        return user_id

    def visit(self, url: str) -> dict[str, Any]:
        """Signs in where that is asked for, and allows what the application asks for."""
        return _arrived(self.browser.visit(url, self.account))

    def refuse(self, url: str) -> dict[str, Any]:
        """The same, but does not allow it."""
        return _arrived(self.browser.visit(url, self.account, allow=False))

    def sign_out(self, url: str) -> dict[str, Any]:
        """Confirms it, and goes back to the application."""
        page = self.browser.get(url)
        if page.left is None and page.forms:
            page = self.browser.submit(page)
        return _arrived(page if page.left is not None else self.browser.get(page.links[0]))


def _arrived(page: Page) -> dict[str, Any]:
    if page.left is not None:
        return {"url": page.left}
    return {"url": page.form.action, "form": page.answer}


def new_account(service: Service) -> dict[str, Any]:
    """Registers somebody. `name` and `email` are what applications may come to know."""
    known = {"name": unique(CANARY_NAME), "email": f"{unique(CANARY_NAME)}@example.com"}
    return {**people.person(service, display_name=known["name"], email=known["email"]), **known}
