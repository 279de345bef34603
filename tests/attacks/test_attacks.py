"""Every row of the table, against the running service. `-k 118` runs one row."""

from __future__ import annotations

import pytest

from tests.attacks import (
    access_tokens,
    authorization,
    client_authentication,
    codes,
    following,
    introspection,
    refresh,
    revocation,
    transport,
)
from tests.attacks.table import TABLE, Attack, Stage
from tests.running import Service, StartService

SECTIONS = (
    transport,
    client_authentication,
    authorization,
    codes,
    refresh,
    introspection,
    access_tokens,
    revocation,
    following,
)


@pytest.fixture(scope="session")
def stage(service: Service, service_with: StartService) -> Stage:
    return Stage(service, service_with)


@pytest.mark.parametrize("attack", TABLE, ids=[attack.identity for attack in TABLE])
def test_attack_is_answered_as_the_table_says(attack: Attack, stage: Stage) -> None:
    attack.run(stage)


def test_table_names_a_source_for_every_row_and_no_row_twice() -> None:
    assert len({attack.identity for attack in TABLE}) == len(TABLE)
    assert all(attack.source for attack in TABLE)
    assert {section.__name__ for section in SECTIONS} == {row.run.__module__ for row in TABLE}
