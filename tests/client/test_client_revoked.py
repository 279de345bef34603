"""What the client library knows of revocations: matching, time, snapshots, and how old its knowledge is."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.client import offline
from service.client.clock import boot_seconds
from service.client.errors import SnapshotNeeded, Unreachable
from service.client.knowledge import Knowledge, lines_of
from service.client.ledger import Answer
from service.client.revoked import _CutOffs, _Numbers
from service.client.verdicts import Asked
from service.tokens import mint, uuid7_hex
from tests.validators import Validator, announcement, claims, snapshot


def now() -> datetime:
    return datetime.now(UTC)


async def ready() -> Validator:
    made = Validator()
    await made.keys.fetch()
    return made


def test_numbers_are_a_set_however_many_there_are() -> None:
    source = random.Random(7)
    numbers, others = ({source.getrandbits(64) | 1 for _ in range(30_000)} for _ in range(2))
    found = _Numbers()
    for number in [*numbers, *numbers]:
        found.add(number)
    assert found.count == len(numbers)
    assert all(number in found for number in numbers)
    assert [number for number in others - numbers if number in found] == []


def test_cut_offs_keep_the_latest_of_each() -> None:
    source = random.Random(8)
    found, expected = _CutOffs(), {}
    for _ in range(30_000):
        number, seconds = source.randrange(1, 10_000), source.randrange(1, 2**31)
        found.add(number, seconds)
        expected[number] = max(expected.get(number, 0), seconds)
    assert found.count == len(expected)
    assert {number: found.get(number) for number in expected} == expected
    assert found.get(2**40) == 0


NAMES = {"token": ("token_id", "jti"), "grant": ("grant_id", "grant_id")}


@pytest.mark.parametrize("what", NAMES)
async def test_revoked_token_or_grant_is_refused_and_nothing_else(what: str) -> None:
    made = await ready()
    payload, other = claims(), made.token()
    token = made.signed(payload)
    assert made.check(token).valid
    name, claim = NAMES[what]
    # The feed names the grant, client and subject of a token as well, for its filters: they live on.
    also = {"client_id": payload["client_id"], "subject": payload["sub"]}
    event = announcement(5, what, now(), **also, **{name: payload[claim]})
    made.knowledge.apply(event)
    made.knowledge.apply(event)  # twice is as good as once
    assert (made.check(token).code, made.check(token).ledger_seq) == ("revoked", 5)
    sibling = claims(sub=payload["sub"], client_id=payload["client_id"])
    assert made.check(made.signed(sibling)).valid
    assert made.check(other).valid


OWNERS = {"client": ("client_id", "client_id"), "subject": ("subject", "sub")}


@pytest.mark.parametrize("what", OWNERS)
async def test_cut_off_ends_what_was_issued_before_and_asks_about_what_is_close(what: str) -> None:
    made = await ready()
    name, claim = OWNERS[what]
    owner = f"{claim}_x"
    cut = int(time.time()) - 100
    told = {name: owner, "issued_before": datetime.fromtimestamp(cut, UTC).isoformat()}

    def issued(after: int) -> str:
        return made.token(iat=cut + after, **{claim: owner})

    tokens = {after: issued(after) for after in (-3600, -6, -5, 0, 5, 7, 60)}
    for token in tokens.values():
        assert made.check(token).valid
    made.knowledge.apply(announcement(9, what, datetime.fromtimestamp(cut, UTC), **told))
    found = {after: made.offline.check(token, Asked()) for after, token in tokens.items()}
    codes = {after: verdict and verdict.code for after, verdict in found.items()}
    expected = {-3600: "revoked", -6: "revoked", -5: None, 0: None, 5: None, 7: "valid", 60: "valid"}
    assert codes == expected
    assert made.check(made.token(by="ES256")).valid


async def test_revoked_key_is_refused_whatever_it_signed_and_whenever() -> None:
    """Who stole it can date a token at will, also long after."""
    made = await ready()
    cut = int(time.time()) - 100
    tokens = [made.token(iat=cut + after) for after in (-3600, -6, -5, 0, 5, 7, 60)]
    for token in tokens[::2]:  # some are remembered, others are not known yet
        assert made.check(token).valid
    event = announcement(9, "key", datetime.fromtimestamp(cut, UTC), kid="EdDSA", issued_before=instant(cut))
    made.knowledge.apply(event)
    assert [made.check(token).code for token in tokens] == ["revoked"] * len(tokens)
    assert made.check(made.token(by="ES256")).valid
    # Also when it has long been told, and the key set could not be asked for since.
    made.knowledge.revoked.advance(boot_seconds() + 40 * 86_400)
    assert [made.check(token).code for token in tokens] == ["revoked"] * len(tokens)


def instant(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


async def test_successor_of_a_revoked_key_is_fetched_once_without_waiting_for_the_cool_down() -> None:
    made = Validator()
    made.document = {"keys": [made.public("EdDSA")]}
    await made.keys.fetch()
    token = made.token(by="ES256")
    assert made.check(token).code == "unknown"  # whoever makes up key ids has to wait
    made.knowledge.apply(announcement(9, "key", now(), kid="EdDSA"))
    assert made.offline.check(token, Asked()) is None
    made.document = {"keys": [made.public("ES256")]}
    await made.keys.fetch()
    assert made.check(token).valid
    assert made.check(made.signed(claims(), {"alg": "ES256", "kid": "made-up", "typ": "at+jwt"})).code == "unknown"
    assert made.asked == 2


async def test_token_by_a_revoked_key_that_is_new_here_is_not_believed_in_anything() -> None:
    made = await ready()
    made.knowledge.apply(announcement(9, "key", now(), kid="EdDSA"))
    verdict = made.check(made.token())
    assert (verdict.code, verdict.offline, verdict.token_id, verdict.subject) == ("revoked", True, None, None)


async def test_key_of_a_snapshot_is_refused_however_long_ago_it_was_revoked() -> None:
    made = await ready()
    token = made.token()
    assert made.check(token).valid
    long_ago = (now() - timedelta(days=400)).isoformat()
    assert await made.knowledge.replace(snapshot(3, {"what": "key", "kid": "EdDSA", "revoked_at": long_ago}))
    made.knowledge.complete_at = float("inf")
    assert made.check(token).code == "revoked"
    assert made.check(made.token(by="ES256")).valid


async def test_answer_about_a_token_close_to_a_cut_off_counts_until_something_is_revoked() -> None:
    made = await ready()
    payload = claims()
    token = made.signed(payload)
    made.knowledge.apply(announcement(1, "client", now(), client_id=payload["client_id"]))
    assert made.offline.check(token, Asked()) is None
    answer = Answer(True, "valid", 1, token_id=payload["jti"])
    made.offline.keep(token, Asked(), answer, made.offline.generation, boot_seconds())
    assert made.check(token).valid
    asked_at = made.offline.generation
    made.knowledge.apply(announcement(2, "token", now(), token_id="tok_other"))
    made.offline.keep(
        token, Asked(), answer, asked_at, boot_seconds()
    )  # it came too late: it may not know of the revocation
    assert made.offline.check(token, Asked()) is None


ANSWERS = {
    "revoked": "revoked",
    "client_disabled": "revoked",
    "subject_disabled": "revoked",
    "valid": "valid",
    "wrong_audience": "valid",  # that was another question
    "insufficient_scope": "valid",
    "expired": "valid",  # by the ledger's clock
    "not_yet_valid": "valid",
    "malformed": None,
    "unknown": None,
    "stale": None,
    "ip_not_allowed": None,
    "what comes in later versions": None,
}


@pytest.mark.parametrize("code", ANSWERS)
async def test_answer_about_a_token_close_to_a_cut_off_is_believed_only_as_far_as_it_goes(code: str) -> None:
    """A token of a client that is disabled must not be let in because the ledger was asked once."""
    made = await ready()
    payload = claims()
    token = made.signed(payload)
    made.knowledge.apply(announcement(1, "client", now(), client_id=payload["client_id"]))
    made.offline.check(token, Asked())
    made.offline.keep(token, Asked(), Answer(code == "valid", code, 1, token_id=payload["jti"]), 1, boot_seconds())
    verdict = made.offline.check(token, Asked())
    assert (verdict and verdict.code) == ANSWERS[code]


async def test_token_that_was_rotated_with_an_overlap_ends_after_it_whatever_the_clocks_say() -> None:
    made = await ready()
    for hours in (-3, 0, 3):  # by so much the ledger's clock is ahead
        payload = claims()
        token = made.signed(payload)
        at = now() + timedelta(hours=hours)
        ends = (at + timedelta(seconds=1)).isoformat()
        event = announcement(1, "token", at, reason="rotated", revoked_at=ends, token_id=payload["jti"])
        made.knowledge.apply(event)
        if hours >= 0:
            assert made.check(token).valid
        deadline = time.monotonic() + 60
        while made.check(token).valid:
            assert time.monotonic() < deadline
        made.knowledge.confirm(1, boot_seconds())
        assert made.check(token).code == "revoked"


async def test_revocation_is_in_force_at_once_though_the_ledgers_clock_is_ahead() -> None:
    made = await ready()
    payload = claims()
    token = made.signed(payload)
    made.knowledge.apply(announcement(1, "token", now() + timedelta(hours=5), token_id=payload["jti"]))
    assert made.check(token).code == "revoked"
    payload = claims()
    ahead = (now() + timedelta(minutes=5)).isoformat()
    one = {"what": "token", "token_id": payload["jti"], "revoked_at": ahead}
    assert await made.knowledge.replace(snapshot(2, one))
    made.knowledge.confirm(2, boot_seconds())
    assert made.check(made.signed(payload)).code == "revoked"


async def test_revocations_are_forgotten_when_every_jwt_of_their_time_has_expired() -> None:
    made = Validator()
    revoked, at = made.knowledge.revoked, now()
    for hours in range(0, 60, 3):
        when = (at - timedelta(hours=hours)).isoformat()
        made.knowledge.apply(announcement(hours, "token", at, revoked_at=when, token_id=f"tok_{hours}"))
        made.knowledge.apply(announcement(hours, "client", at, revoked_at=when, client_id=f"cli_{hours}"))
    assert len(revoked) == 40
    moment = boot_seconds()

    def known() -> list[int]:
        none = (None, None, None)
        return [hours for hours in range(0, 60, 3) if revoked.check(f"tok_{hours}", "", none, moment) == 0]

    revoked.advance(moment)
    kept = known()
    assert set(range(0, 26, 3)) <= set(kept)
    assert max(kept) < 25 + 12
    revoked.advance(moment + 26 * 3600 + 43_200)
    assert len(revoked) == 0


class WallClock:
    """Set off by so many seconds, as an operator or a bad time server does it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.off = 0.0
        right = time.time
        for place in (time, offline):
            monkeypatch.setattr(place, "time", lambda: right() + self.off)


@pytest.fixture
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> WallClock:
    return WallClock(monkeypatch)


DAYS = [-3000, -30, -3, 2, 30]


@pytest.mark.parametrize("days", DAYS)
async def test_clock_that_is_set_wrong_and_right_again_makes_nothing_forgotten(
    wall_clock: WallClock, days: int
) -> None:
    made = await ready()
    by_snapshot, by_event, other = claims(), claims(), claims()
    tokens = [made.signed(payload) for payload in (by_snapshot, by_event, other)]
    for off in (days * 86_400, 0):
        made.knowledge.feed = None
        wall_clock.off = off
        one = {"what": "token", "token_id": by_snapshot["jti"]}
        assert await made.knowledge.replace(snapshot(2, one))
        made.knowledge.apply(announcement(3, "token", now(), token_id=by_event["jti"]))
        for then in (0, days * 86_400, 0):
            wall_clock.off = then
            made.knowledge.confirm(3, boot_seconds())
        assert [made.check(token).code for token in tokens] == ["revoked", "revoked", "valid"]


async def test_clock_that_is_far_from_the_ledgers_makes_it_stale(wall_clock: WallClock) -> None:
    """When a JWT ends could not be told."""
    made = await ready()
    token = made.token()
    assert await made.knowledge.replace(snapshot(2))
    made.knowledge.confirm(2, boot_seconds())
    for off, code in ((55, "valid"), (65, "stale"), (-55, "valid"), (-65, "stale"), (0, "valid")):
        wall_clock.off = off
        assert made.check(token).code == code
        assert made.offline.stale == (code == "stale")
    wall_clock.off = -3600
    assert "clock is -3600 s off" in made.check(token).detail
    assert made.offline.check(mint("pat"), Asked()) is None
    # It may be the ledger's clock that was wrong: a snapshot says what it is now, but not every second.
    made.knowledge.confirm(2, boot_seconds())
    made.knowledge._clock_asked_at -= 100
    with pytest.raises(SnapshotNeeded):
        made.knowledge.confirm(2, boot_seconds())
    assert made.knowledge.needs_snapshot


async def test_overlap_that_is_heard_of_late_ends_when_it_ends() -> None:
    made = await ready()
    over, running = claims(), claims()
    assert await made.knowledge.replace(snapshot(2))
    made.knowledge.confirm(2, boot_seconds())
    at = now() - timedelta(minutes=10)
    for payload, minutes, code in ((over, 9, "revoked"), (running, 11, "valid")):
        ends = (at + timedelta(minutes=minutes)).isoformat()
        event = announcement(3, "token", at, reason="rotated", revoked_at=ends, token_id=payload["jti"])
        made.knowledge.apply(event)
        assert made.check(made.signed(payload)).code == code


async def test_snapshot_takes_the_place_of_what_was_known() -> None:
    made = await ready()
    first, second = claims(), claims()
    tokens = made.signed(first), made.signed(second)
    made.knowledge.feed = "old"
    made.knowledge.apply(announcement(70, "token", now(), token_id=first["jti"]))
    assert [made.check(token).code for token in tokens] == ["revoked", "valid"]
    one = {"what": "token", "token_id": second["jti"]}
    assert await made.knowledge.replace(snapshot(3, one, feed="new"))
    assert made.knowledge.ledger_seq == 3
    # It is of another ledger, and nobody has said yet that this is all of it.
    assert made.check(tokens[0]).code == "stale"
    made.knowledge.confirm(3, boot_seconds())
    assert [made.check(token).code for token in tokens] == ["valid", "revoked"]


async def test_snapshot_that_is_older_than_what_is_known_changes_nothing() -> None:
    made = await ready()
    payload = claims()
    assert await made.knowledge.replace(snapshot(3))
    made.knowledge.confirm(3, boot_seconds())
    made.knowledge.apply(announcement(7, "token", now(), token_id=payload["jti"]))
    assert not await made.knowledge.replace(snapshot(6))
    assert made.check(made.signed(payload)).code == "revoked"
    assert not await made.knowledge.replace(snapshot(8), ledger_seq_min=9)
    assert made.knowledge.ledger_seq == 7


async def lines(*given: bytes) -> AsyncIterator[bytes]:
    for one in given:
        yield one


async def whole(source: AsyncIterator[bytes]) -> list[bytes]:
    return [one async for one in source]


@pytest.mark.parametrize("kind", ["cut", "empty", "miscounted", "no head", "garbage"])
async def test_snapshot_that_is_not_whole_is_refused(kind: str) -> None:
    made = Knowledge()
    one = {"what": "token", "token_id": "tok_x"}
    text = await whole(snapshot(3, one, one, count=5 if kind == "miscounted" else -1))
    given = {"cut": text[:-1], "empty": [], "no head": text[1:], "garbage": [text[0], b"{", text[-1]]}.get(kind, text)
    with pytest.raises(Unreachable):
        await made.replace(lines(*given))
    assert (len(made.revoked), made.feed, made.snapshots) == (0, None, 0)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", announcement(1, "x.y", now()).replace(b".v1", b".v2")])
async def test_event_that_cannot_be_read_stops_the_feed(data: bytes) -> None:
    """To skip it could lose a revocation."""
    with pytest.raises(Unreachable):
        Knowledge().apply(data)


NAMELESS = {"tenant": {"client_id": "cli_x"}, "client": {"subject": "usr_x"}, "key": {}, "token": {"token_id": ""}}


@pytest.mark.parametrize("what", NAMELESS)
async def test_revocation_of_what_is_not_known_here_stops_the_feed(what: str) -> None:
    """As a later version of the ledger may announce it."""
    made = Knowledge()
    with pytest.raises(Unreachable):
        made.apply(announcement(3, what, now(), **NAMELESS[what]))
    with pytest.raises(Unreachable):
        await made.replace(snapshot(3, {"what": what, **NAMELESS[what]}))
    assert (made.ledger_seq, len(made.revoked)) == (0, 0)


async def test_lines_are_found_wherever_the_parts_begin() -> None:
    text = b"one\r\ntwo\n\nthree"
    for size in range(1, len(text)):
        parts = [text[at : at + size] for at in range(0, len(text), size)]
        assert await whole(lines_of(lines(*parts))) == [b"one", b"two", b"", b"three"]
    with pytest.raises(Unreachable):
        await whole(lines_of(lines(*[b"a" * 10_000] * 100)))


async def test_reference_answer_counts_for_seconds_unless_it_is_revoked() -> None:
    made = await ready()
    ids: dict[str, Any] = {
        "token_id": f"tok_{uuid7_hex()}",
        "grant_id": f"grt_{uuid7_hex()}",
        "subject": f"usr_{uuid7_hex()}",
        "issued_at": now() - timedelta(days=30),
        "expires_at": now() + timedelta(days=30),
    }
    answer, asked = Answer(True, "valid", 1, kind="pat", scope="a", **ids), Asked("a")

    def kept() -> str:
        token = mint("pat")
        made.offline.keep(token, asked, answer, made.offline.generation, boot_seconds())
        assert made.check(token, asked).code == "valid"
        assert made.offline.check(token, Asked("b")) is None  # another question
        return token

    token = kept()
    made.knowledge.apply(announcement(1, "token", now(), token_id="tok_other"))
    assert made.check(token, asked).valid
    made.knowledge.apply(announcement(2, "subject", now(), subject=ids["subject"], issued_before=now().isoformat()))
    assert (made.check(token, asked).code, made.check(token, asked).offline) == ("revoked", True)
    made.knowledge.complete_at = -float("inf")
    assert made.offline.check(token, asked) is None  # nothing is known, so that the ledger is asked
    made.knowledge.complete_at = float("inf")
    token = mint("pat")
    made.offline.keep(token, asked, answer, made.offline.generation, boot_seconds() - 11)
    assert made.offline.check(token, asked) is None  # the answer came late
    made.offline._reference_seconds_max = 0
    token = mint("pat")
    made.offline.keep(token, asked, answer, made.offline.generation, boot_seconds())
    assert made.offline.check(token, asked) is None
