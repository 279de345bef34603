"""What tests of other people's clients share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.nodejs import PACKAGES, NodeClient


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
