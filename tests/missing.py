"""Programs that some tests need and no machine must have: where one is missing, its tests are skipped and say why."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

# Set by `.ci/run`, which installs them all: there a missing program is a failure.
NOTHING_MISSING = "TESTS_NOTHING_MISSING"


def missing(reason: str) -> NoReturn:
    """Ends the test that asks. `reason` names what is missing and what would bring it."""
    if os.environ.get(NOTHING_MISSING):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
