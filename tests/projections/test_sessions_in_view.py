"""Sessions and consents in the current-token view."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from events.streams import LEDGER
from projections.base import boot_time_ns
from projections.current import CurrentReader, CurrentWriter, view_path
from projections.registry import Consent, Session
from tests.making import (
    DAY,
    START,
    History,
    cli,
    consented,
    everything,
    ses,
    signed_in,
    signed_out,
    usr,
)

HOUR = timedelta(hours=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return view_path(tmp_path)


@pytest.fixture
def writer(path: Path) -> Iterator[CurrentWriter]:
    opened = CurrentWriter(path, sync=False)
    yield opened
    opened.close()


@pytest.fixture
def reader(path: Path) -> Iterator[CurrentReader]:
    """Of everything there is. LMDB opens a file once in a process."""
    one = CurrentWriter(path, sync=False)
    one.apply(LEDGER, everything().raw())
    one.confirm(LEDGER, everything().end, boot_time_ns())
    one.close()
    opened = CurrentReader(path)
    yield opened
    opened.close()


def test_session_is_found_by_its_id_to_the_letter(reader: CurrentReader) -> None:
    found = reader.session(ses(1))
    assert isinstance(found, Session)
    assert (found.session_id, found.user_id, found.ended_at) == (ses(1), usr(1), None)
    ended = reader.session(ses(2))
    assert ended is not None
    assert ended.reason == "signed_out"
    assert [reader.session(one) for one in (ses(9), ses(1).upper(), usr(1), "", "ses_1")] == [None] * 5


def test_sessions_of_a_user_are_listed_oldest_first(reader: CurrentReader) -> None:
    assert [one.session_id for one in reader.sessions_of(usr(1))] == [ses(1), ses(2)]
    assert [one.session_id for one in reader.sessions_of(usr(1), limit=1)] == [ses(1)]
    assert reader.sessions_of(usr(2)) == []


def test_consents_of_a_user_are_those_of_no_other(reader: CurrentReader) -> None:
    assert [(one.client_id, one.scope) for one in reader.consents_of(usr(1))] == [(cli(1), "a b"), (cli(2), "")]
    assert reader.consents_of(usr(2)) == reader.consents_of("usr_" + "0" * 32) == []
    assert isinstance(reader.consent(usr(1), cli(2)), Consent)
    assert reader.consent(usr(2), cli(2)) is None


def test_session_leaves_an_hour_after_its_expiry_with_its_index_rows(writer: CurrentWriter) -> None:
    history = History(
        signed_in(ses(1), usr(1), expires_at=START + HOUR),
        signed_in(ses(2), usr(1), expires_at=START + DAY),
        signed_out(ses(2), usr(1)),
        consented(usr(1), cli(1)),
    )
    writer.apply(LEDGER, history.raw())
    assert writer.trim(START + 2 * HOUR - timedelta(minutes=1)) == 0
    assert writer.trim(START + 2 * HOUR) == 1
    assert len(writer.dump()["session"]) == len(writer.dump()["user_session"]) == 1
    assert writer.trim(START + DAY + HOUR) == 1
    rows = writer.dump()
    assert rows["session"] == rows["user_session"] == rows["session_expiry"] == []
    assert len(rows["consent"]) == 1


def test_ending_of_a_session_that_has_left_changes_nothing(writer: CurrentWriter) -> None:
    history = History(signed_in(ses(1), usr(1), expires_at=START + HOUR))
    writer.apply(LEDGER, history.raw())
    assert writer.trim(START + DAY) == 1
    before = writer.dump()
    writer.apply(LEDGER, [history.raw()[0], *History(*[signed_in(ses(1), usr(1)), signed_out(ses(1), usr(1))]).raw(1)])
    assert before == writer.dump()
