"""What tests of other people's clients share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.nodejs import PACKAGES, NodeClient
from tests.people import Browser
from tests.relying import Person, new_account
from tests.running import Service

ADDRESS = "127.0.0.33"  # from where nobody types wrong passwords, for which one has to wait


@pytest.fixture(scope="session", params=PACKAGES)
def client(request: pytest.FixtureRequest) -> Iterator[NodeClient]:
    """Each of the two, since they check different things."""
    started = NodeClient(request.param)
    yield started
    started.close()


@pytest.fixture(scope="session")
def oauth4webapi() -> Iterator[NodeClient]:
    """The one that also verifies access tokens, for resource servers."""
    started = NodeClient("oauth4webapi")
    yield started
    started.close()


@pytest.fixture(scope="session")
def account(service: Service) -> dict[str, Any]:
    """One for all: what an application gets and how a browser is signed in is of that application and browser."""
    return new_account(service)


@pytest.fixture
def person(service: Service, account: dict[str, Any]) -> Iterator[Person]:
    """With a new browser, which is signed in nowhere."""
    browser = Browser(service, source=ADDRESS)
    yield Person(browser, account)
    browser.http.close()
