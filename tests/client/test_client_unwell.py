"""The client library against a ledger that is not well, or none at all: nothing is let in that should not be."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest

from service.client import Context, SseFeed, TokenValidator
from service.client.knowledge import Knowledge
from service.client.ledger import Ledger as LedgerOfClient
from service.tokens import mint
from tests.scripted import Asked, Scripted, body_of, head, message, position
from tests.validators import AUDIENCE, ISSUER, Validator, announcement, claims, snapshot

SECONDS_MAX = 60.0


class Ledger:
    """A scripted one with keys of its own. `stream` yields what it says, then holds the connection."""

    def __init__(self, server: Scripted) -> None:
        self.server = server
        self.keys = Validator()
        self.snapshots: list[list[dict[str, Any]]] = [[]]
        self.feed, self.seq, self.behind_seconds = "feed", 10, 0.0
        self.events: list[bytes] = []
        server.answers |= {
            "/oauth2/jwks": self.keys.document,
            "/v1/revocations/snapshot": body_of(self._snapshot),
            "/v1/revocations/stream": body_of(self._stream),
            "/v1/uses": {"unknown": [], "ledger_seq": 1},
        }

    def _snapshot(self) -> AsyncIterator[bytes]:
        return snapshot(self.seq, *self.snapshots[-1], feed=self.feed)

    async def _stream(self) -> AsyncIterator[bytes]:
        sent = 0
        while True:
            for event in self.events[sent:]:
                yield message(event)
            sent = len(self.events)
            yield position(self.seq, feed=self.feed, behind_seconds=self.behind_seconds)
            await asyncio.sleep(0.02)

    def validator(self, **more: Any) -> TokenValidator:
        wanted = {"token": "t", "feed": SseFeed(), "api_url": self.server.url, "start_seconds_max": SECONDS_MAX, **more}
        return TokenValidator(ISSUER, AUDIENCE, **wanted)


@pytest.fixture
async def ledger() -> AsyncIterator[Ledger]:
    async with Scripted() as server:
        yield Ledger(server)


async def soon(probe: Callable[[], bool | Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while True:
        answer = probe()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


class _HardOfHearing(SseFeed):
    """Loses the first cancellation, as whoever waits by `asyncio.wait_for` of Python 3.11 does now and then."""

    async def follow(self, knowledge: Knowledge, ledger: LedgerOfClient) -> None:
        with suppress(asyncio.CancelledError):
            await super().follow(knowledge, ledger)
        await super().follow(knowledge, ledger)


async def test_validator_ends_though_a_cancellation_is_lost(ledger: Ledger) -> None:
    async with asyncio.timeout(SECONDS_MAX), ledger.validator(feed=_HardOfHearing()) as validator:
        assert (await validator.validate(ledger.keys.token())).valid


async def test_knowledge_is_as_old_as_the_ledger_says_however_late_it_comes(ledger: Ledger) -> None:
    """As what lay in a buffer: positions keep coming, and what they say was true long ago."""
    async with ledger.validator(stale_seconds_max=3) as validator:
        token = ledger.keys.token()
        assert (await validator.validate(token)).valid
        ledger.behind_seconds = 100.0
        streams = len(ledger.server.requests("/v1/revocations/stream"))

        async def stale() -> bool:
            return (await validator.validate(token)).code == "stale"

        await soon(stale, "it goes stale though it hears positions")
        assert len(ledger.server.requests("/v1/revocations/stream")) == streams
        told = (await validator.validate(token)).detail
        for text in (validator.status().problem, told):
            assert re.fullmatch(
                r"what is known of revocations is \d+\.\d s old; 3 s are allowed: "
                r"the ledger announces nothing newer; `token-ledger doctor` there says why",
                text,
            ), text
        ledger.behind_seconds = 0.0
        await soon(lambda: validator.status().fresh, "it is fresh again")
        assert validator.status().problem == ""
    ledger.behind_seconds = 100.0
    async with ledger.validator(start_seconds_max=0.3) as validator:
        assert (await validator.validate(token)).code == "stale"


async def test_position_of_the_future_ends_the_stream(ledger: Ledger) -> None:
    """As after a pause of the virtual machine, in which its clock stood still: ages would be told too small."""
    async with ledger.validator(stale_seconds_max=1) as validator:
        token = ledger.keys.token()
        assert (await validator.validate(token)).valid
        streams = len(ledger.server.requests("/v1/revocations/stream"))
        ledger.behind_seconds = -100.0
        await soon(lambda: len(ledger.server.requests("/v1/revocations/stream")) > streams, "it asks again")
        await soon(lambda: not validator.status().fresh, "it goes stale")
        assert "stood still" in validator.status().problem
        ledger.behind_seconds = 0.0

        async def good() -> bool:
            return (await validator.validate(token)).valid

        await soon(good, "it goes on with the next stream")


async def test_another_feed_makes_it_start_over(ledger: Ledger) -> None:
    payload = claims()
    token = ledger.keys.signed(payload)
    ledger.snapshots = [[{"what": "token", "token_id": payload["jti"]}]]
    async with ledger.validator() as validator:
        assert (await validator.validate(token)).code == "revoked"
        ledger.snapshots.append([])
        ledger.feed, ledger.seq = "another", 3

        async def good() -> bool:
            return (await validator.validate(token)).valid

        await soon(good, "it knows what the other ledger knows")
        status = validator.status()
        assert (status.snapshots, status.ledger_seq) == (2, 3)


@pytest.mark.parametrize(("status", "code"), [(400, "feed_changed"), (410, "cursor_too_old")])
async def test_cursor_that_is_refused_makes_it_take_a_snapshot(ledger: Ledger, status: int, code: str) -> None:
    payload = claims()
    token = ledger.keys.signed(payload)
    async with ledger.validator() as validator:
        assert (await validator.validate(token)).valid
        serve = ledger.server.answers["/v1/revocations/stream"]
        ledger.snapshots.append([{"what": "token", "token_id": payload["jti"]}])
        refused = 0

        async def refuse(asked: Asked, writer: asyncio.StreamWriter) -> None:
            nonlocal refused
            refused += 1
            ledger.server.answers["/v1/revocations/stream"] = serve
            body = json.dumps({"code": code, "detail": "x", "fix": "y"}).encode()
            writer.write(head(status, f"Content-Length: {len(body)}\r\n") + body)

        ledger.server.answers["/v1/revocations/stream"] = refuse
        ledger.events.append(b"{}")  # cannot be read, so that it comes again
        await soon(lambda: refused == 1, "it came again")
        ledger.events.clear()
        ledger.seq = 11

        async def known() -> bool:
            verdict = await validator.validate(token)
            return verdict.code == "revoked" and validator.status().fresh

        await soon(known, "it knows what it had missed")
        assert validator.status().snapshots == 2


async def test_event_that_cannot_be_read_is_never_passed_over(ledger: Ledger) -> None:
    payload = claims()
    token = ledger.keys.signed(payload)
    async with ledger.validator(stale_seconds_max=1) as validator:
        assert (await validator.validate(token)).valid
        good = announcement(12, "token", datetime.now(UTC), token_id=payload["jti"])
        ledger.events += [b'{"specversion":"2.0"}', good]

        async def stale() -> bool:
            return (await validator.validate(token)).code == "stale"

        await soon(stale, "it does not go on behind it")
        assert "cannot be read" in validator.status().problem
        ledger.events[:] = [good]

        async def revoked() -> bool:
            return (await validator.validate(token)).code == "revoked"

        await soon(revoked, "it goes on once it can be read")


def raw(data: bytes) -> Any:
    async def answer(_: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(data)

    return answer


async def _endless() -> AsyncIterator[bytes]:
    yield b"x" * 60_000_000


async def _repeated() -> AsyncIterator[bytes]:
    while True:
        yield b"data: " + b"x" * 60_000


async def hang(_: Asked, writer: asyncio.StreamWriter) -> None:
    writer.write(head(200))
    await asyncio.Event().wait()


UNWELL: dict[str, Any] = {
    "nothing": raw(b""),
    "garbage": raw(b"\0\1\2 garbage\r\n\r\n"),
    "500": 500,
    "503": 503,
    "404": 404,
    "redirect": raw(head(302, "Location: http://127.0.0.1:9/\r\nContent-Length: 0\r\n")),
    "HTML": raw(head(200, "Content-Length: 6\r\n") + b"<html>"),
    "endless line": body_of(_endless),
    "endless message": body_of(_repeated),
    "cut": raw(head(200, "Content-Length: 100000\r\n") + b'{"feed":"feed"'),
}


@pytest.mark.parametrize("path", ["/v1/revocations/snapshot", "/v1/revocations/stream", "/oauth2/jwks"])
@pytest.mark.parametrize("kind", UNWELL)
async def test_ledger_that_is_unwell_lets_nothing_in_and_is_asked_again(ledger: Ledger, path: str, kind: str) -> None:
    well, ledger.server.answers[path] = ledger.server.answers[path], UNWELL[kind]
    token = ledger.keys.token()
    async with ledger.validator(start_seconds_max=0.2) as validator:
        await soon(lambda: bool(ledger.server.requests(path)), "it is asked")
        assert (await validator.validate(token)).code == "stale"
        ledger.server.answers[path] = well

        async def good() -> bool:
            return (await validator.validate(token)).valid

        await soon(good, "it goes on when the ledger is well")


async def test_ledger_that_hangs_is_given_up(ledger: Ledger) -> None:
    ledger.server.answers["/v1/tokens/validate"] = hang
    async with ledger.validator(ask_seconds_max=0.2) as validator:
        verdict = await validator.validate(mint("pat"))
        assert (verdict.code, verdict.offline) == ("stale", False)
        assert "only the ledger can tell" in verdict.detail
        assert (await validator.validate(ledger.keys.token())).valid


async def test_ledger_that_is_not_there_is_told() -> None:
    validator = TokenValidator("http://127.0.0.1:9", AUDIENCE, token="t", feed=SseFeed(), start_seconds_max=0.2)
    async with validator:
        for token in (mint("pat"), Validator().token()):
            verdict = await validator.validate(token)
            assert (verdict.valid, verdict.code) == (False, "stale")
            assert "cannot be reached" in verdict.detail
        assert not validator.status().fresh


# Uses


def blocks(ledger: Ledger) -> list[dict[str, Any]]:
    return [json.loads(one.body) for one in ledger.server.requests("/v1/uses")]


async def test_block_that_was_not_acknowledged_is_sent_again_as_the_same(ledger: Ledger) -> None:
    taken, ledger.server.answers["/v1/uses"] = ledger.server.answers["/v1/uses"], raw(b"")
    async with ledger.validator() as validator:
        for _ in range(3):
            await validator.validate(ledger.keys.token())
        await soon(lambda: len(blocks(ledger)) >= 2, "it is sent again")
        await validator.validate(ledger.keys.token())
        ledger.server.answers["/v1/uses"] = taken
        await soon(lambda: validator.status().uses_reported == 4, "all are reported")
    sent = blocks(ledger)
    first = [one for one in sent if one["block_id"] == sent[0]["block_id"]]
    assert len(first) >= 2
    assert all(one == first[0] for one in first)
    assert [len(first[0]["uses"]), len(sent[-1]["uses"])] == [3, 1]
    assert validator.status().uses_lost == 0


async def test_uses_that_do_not_fit_are_counted_and_told(ledger: Ledger) -> None:
    ledger.server.answers["/v1/uses"] = 503
    async with ledger.validator(uses_waiting_max=5) as validator:
        token = ledger.keys.token()
        for _ in range(12):
            await validator.validate(token)
        assert validator.status().uses_lost == 7
        ledger.server.answers["/v1/uses"] = {}
        await soon(lambda: validator.status().uses_reported == 5, "the others are reported")
        await validator.validate(token)
        await soon(lambda: validator.status().uses_reported == 6, "and those that come later")
    assert sum(one.get("lost", 0) for one in {one["block_id"]: one for one in blocks(ledger)}.values()) == 7


async def test_block_that_the_ledger_refuses_is_given_up_and_counted(ledger: Ledger) -> None:
    ledger.server.answers["/v1/uses"] = 400
    async with ledger.validator() as validator:
        await validator.validate(ledger.keys.token())
        await soon(lambda: validator.status().uses_lost == 1, "it is given up")
        ledger.server.answers["/v1/uses"] = {}
        await validator.validate(ledger.keys.token())
        await soon(lambda: validator.status().uses_reported == 1, "others are reported")
    assert blocks(ledger)[-1]["lost"] == 1


async def test_use_that_the_ledger_does_not_take_costs_no_other(ledger: Ledger) -> None:
    """One that refuses blocks whole, as it did once."""

    async def picky(asked: Asked, writer: asyncio.StreamWriter) -> None:
        bad = any(one.get("scope") == "bad" for one in json.loads(asked.body)["uses"])
        writer.write(head(400 if bad else 200, "Content-Length: 2\r\n") + b"{}")

    ledger.server.answers["/v1/uses"] = picky
    async with ledger.validator() as validator:
        token = ledger.keys.token()
        for number in range(100):
            await validator.validate(token, scope="bad" if number in {0, 57} else "good")
        await soon(lambda: validator.status().uses_reported == 98, "the others are reported")
        assert validator.status().uses_lost == 2
        await validator.validate(token)
        await soon(lambda: validator.status().uses_reported == 99, "it is told what was lost")
    told = [one for one in blocks(ledger) if not any(use.get("scope") == "bad" for use in one["uses"])]
    assert sum(one.get("lost", 0) for one in told) == 2


async def test_use_that_the_ledger_did_not_record_counts_as_lost(ledger: Ledger) -> None:
    refused = [{"index": 0, "why": "x"}]
    ledger.server.answers["/v1/uses"] = {"recorded": 2, "unknown": [], "refused": refused, "ledger_seq": 1}
    async with ledger.validator() as validator:
        for _ in range(3):
            await validator.validate(ledger.keys.token())
        await soon(lambda: validator.status().uses_reported == 2, "it says what it has")
        assert validator.status().uses_lost == 1


async def test_what_cannot_be_told_at_the_end_is_told_to_the_log(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.server.answers["/v1/uses"] = 503
    async with ledger.validator() as validator:
        for _ in range(3):
            await validator.validate(ledger.keys.token())
    assert (validator.status().uses_lost, validator.status().uses_waiting) == (3, 0)
    assert "3 uses are not on the ledger's record: 503" in caplog.text


async def test_use_that_nothing_can_be_made_of_is_counted_and_stops_no_other(ledger: Ledger) -> None:
    odd: Any = ipaddress.ip_address("192.0.2.1")
    async with ledger.validator() as validator:
        uses = validator._uses
        for moment in (time.time(), float("nan"), time.time()):
            uses.record(("tok_x", moment, "valid", "", "", Context(odd, "a", "GET", "/")))
        await soon(lambda: validator.status().uses_reported == 2, "the others are reported")
        assert validator.status().uses_lost == 1
        assert not any(task.done() for task in validator._tasks)
    assert {use["context"]["ip"] for block in blocks(ledger) for use in block["uses"]} == {"192.0.2.1"}


async def test_uses_that_wait_are_small(ledger: Ledger) -> None:
    ledger.server.answers["/v1/uses"] = 503
    async with ledger.validator() as validator:
        token, long = ledger.keys.token(), "x" * 1_000_000
        context = Context("192.0.2.1", long, long, "/" + long)
        for number in range(100):
            await validator.validate(token, scope=long[number:], audience=long, context=context)
        waiting = validator._uses._waiting
        uses = [*waiting]
        assert uses
        for use in uses:
            assert use[5] is not None
            parts = [use[3], use[4], *(part for part in (use[5].user_agent, use[5].method, use[5].path) if part)]
            assert sum(map(len, parts)) < 2_500


async def test_block_that_lay_about_too_long_is_not_sent_again(ledger: Ledger) -> None:
    """The ledger may have it though its answer never came, and does not know it again after two minutes."""
    async with ledger.validator() as validator:
        await validator.validate(ledger.keys.token())
        uses = validator._uses

        async def stopped(_: Asked, writer: asyncio.StreamWriter) -> None:
            assert uses._repeated_since is not None
            uses._repeated_since -= 600  # as when this process is stopped while it waits for the answer
            writer.close()

        ledger.server.answers["/v1/uses"] = stopped
        await soon(lambda: uses.lost == 1, "it is given up")
    assert len({one["block_id"] for one in blocks(ledger) if one["uses"]}) == 1
    assert sum(bool(one["uses"]) for one in blocks(ledger)) == 1


async def test_full_block_is_sent_at_once(ledger: Ledger) -> None:
    async with ledger.validator() as validator:
        token = ledger.keys.token()
        for _ in range(1200):
            await validator.validate(token)
        await soon(lambda: validator.status().uses_reported == 1200, "all are reported")
    assert [len(one["uses"]) for one in blocks(ledger)] == [500, 500, 200]


async def test_what_a_request_holds_does_not_stop_the_record(ledger: Ledger) -> None:
    """Whatever comes in as agent, path or address: the use is reported, in a form that the ledger takes."""
    contexts = [
        Context("testclient", "\ud800 a", "GET", "/\udcff?secret=1"),
        Context("fe80::1%eth0", "é" * 5000, "X" * 100, "/" * 5000),
        Context("192.0.2.1", "\0\1", "", ""),
    ]
    async with ledger.validator() as validator:
        for context in contexts:
            await validator.validate(ledger.keys.token(), scope="a  b", context=context, audience="x" * 2000)
        assert (await validator.validate(ledger.keys.token(), scope='a"b', context=contexts[0])).code
    told = [one["context"] for block in blocks(ledger) for one in block["uses"]]
    assert told[0] == {"user_agent": "? a", "method": "GET", "path": "/?"}
    assert (len(told[1]["user_agent"]), len(told[1]["method"]), len(told[1]["path"])) == (256, 32, 256)
    assert "ip" not in told[1]
    assert told[2]["ip"] == "192.0.2.1"
    uses = [one for block in blocks(ledger) for one in block["uses"]]
    assert [one.get("scope") for one in uses] == ["a b"] * 3 + [None]
    assert len(uses[0]["audience"]) == 500


async def test_what_a_request_holds_does_not_stop_a_question(ledger: Ledger) -> None:
    """The ledger refuses what is too long, or no address: a token would not be checked for what came with it."""
    ledger.server.answers["/v1/tokens/validate"] = {"valid": False, "code": "unknown", "ledger_seq": 1}
    contexts = [
        Context("testclient", "\ud800 a", "GET", "/\udcff?secret=1"),
        Context("fe80::1%eth0", "a" * 5000, "X" * 100, "/" * 5000),
        Context("192.0.2.1", "é", "GET", "/"),
    ]
    async with ledger.validator() as validator:
        for context in contexts:
            assert (await validator.validate(mint("pat"), context=context, ip=context.ip)).code == "unknown"
    asked = [json.loads(one.body)["context"] for one in ledger.server.requests("/v1/tokens/validate")]
    assert asked[0] == {"user_agent": "? a", "method": "GET", "path": "/?"}
    assert {name: len(value) for name, value in asked[1].items()} == {"user_agent": 256, "method": 32, "path": 256}
    assert asked[2] == {"ip": "192.0.2.1", "user_agent": "é", "method": "GET", "path": "/"}


async def test_key_that_is_new_is_fetched_by_who_asks(ledger: Ledger) -> None:
    whole = ledger.server.answers["/oauth2/jwks"]
    ledger.server.answers["/oauth2/jwks"] = {"keys": [ledger.keys.public("ES256")]}
    async with ledger.validator(key_cool_down_seconds=0.05) as validator:
        assert (await validator.validate(ledger.keys.token(by="ES256"))).valid
        assert (await validator.validate(ledger.keys.token())).code == "unknown"
        ledger.server.answers["/oauth2/jwks"] = whole

        async def good() -> bool:
            return (await validator.validate(ledger.keys.token())).valid

        await soon(good, "the new key is known")


def answered(token_id: str) -> dict[str, Any]:
    times = {"issued_at": "2026-01-01T00:00:00Z", "expires_at": "2100-01-01T00:00:00Z"}
    return {"valid": True, "code": "valid", "ledger_seq": 1, "token_id": token_id, "grant_id": "grt_x", **times}


async def test_flood_of_made_up_tokens_leaves_room_for_those_that_are_some(ledger: Ledger) -> None:
    """Anybody can make up a reference token with a right checksum, and only the ledger can tell."""
    ledger.server.answers["/v1/tokens/validate"] = answered("tok_x")
    whole = ledger.server.answers["/oauth2/jwks"]
    ledger.server.answers["/oauth2/jwks"] = {"keys": [ledger.keys.public("ES256")]}
    async with ledger.validator(
        key_cool_down_seconds=0, ask_seconds_max=SECONDS_MAX, reference_seconds_max=0.001
    ) as validator:
        token = mint("pat")
        assert (await validator.validate(token)).valid
        ledger.server.answers["/v1/tokens/validate"] = hang
        flood = [asyncio.create_task(validator.validate(mint("pat"))) for _ in range(500)]

        def asked() -> int:
            return len(ledger.server.requests("/v1/tokens/validate"))

        await soon(lambda: asked() >= 33, "they are asked about")
        await soon(lambda: sum(one.done() for one in flood) == 468, "and no more than that")
        assert {one.result().code for one in flood if one.done()} == {"stale"}
        assert asked() == 33
        # What is the ledger's goes on: JWTs, new keys, the feed, and reference tokens that were seen before.
        assert (await validator.validate(ledger.keys.token(by="ES256"))).valid
        ledger.server.answers["/oauth2/jwks"] = whole
        assert (await validator.validate(ledger.keys.token())).valid
        ledger.server.answers["/v1/tokens/validate"] = answered("tok_x")
        assert (await validator.validate(token)).valid
        for one in flood:
            one.cancel()


async def test_same_question_is_asked_once_at_a_time(ledger: Ledger) -> None:
    """Each use is on record all the same."""
    waiting = asyncio.Event()

    async def later(_: Asked, writer: asyncio.StreamWriter) -> None:
        await waiting.wait()
        body = json.dumps(answered("tok_x")).encode()
        writer.write(head(200, f"Content-Length: {len(body)}\r\n") + body)

    ledger.server.answers["/v1/tokens/validate"] = later
    async with ledger.validator(ask_seconds_max=SECONDS_MAX) as validator:
        token = mint("pat")
        asking = [asyncio.create_task(validator.validate(token)) for _ in range(100)]
        await soon(lambda: bool(ledger.server.requests("/v1/tokens/validate")), "it is asked")
        asking[0].cancel()  # whoever asked first may give up
        waiting.set()
        verdicts = await asyncio.gather(*asking[1:])
        assert {one.code for one in verdicts} == {"valid"}
        made_up = mint("pat")
        unknown = {"valid": False, "code": "unknown", "ledger_seq": 1}
        ledger.server.answers["/v1/tokens/validate"] = unknown
        before = len(ledger.server.requests("/v1/tokens/validate"))
        verdicts = await asyncio.gather(*(validator.validate(made_up) for _ in range(100)))
        assert {one.code for one in verdicts} == {"unknown"}
        assert (await validator.validate(made_up)).code == "unknown"
        assert len(ledger.server.requests("/v1/tokens/validate")) == before + 1


@pytest.mark.parametrize("audience", ["", [], (), ["", AUDIENCE], [AUDIENCE, ""]], ids=repr)
async def test_audience_that_names_nobody_is_refused(ledger: Ledger, audience: Any) -> None:
    """It must not mean that a token for anybody will do."""
    async with ledger.validator() as validator:
        for token in (ledger.keys.token(aud="https://other.example"), mint("pat")):
            with pytest.raises(ValueError, match="audience"):
                await validator.validate(token, audience=audience)
            with pytest.raises(ValueError, match="audience"):
                validator.check(token, audience=audience)
    with pytest.raises(ValueError, match="audience"):
        TokenValidator(ISSUER, audience, token="t", feed=SseFeed())


async def test_key_that_is_being_fetched_is_waited_for_by_all(ledger: Ledger) -> None:
    """A token is not unknown because another one of the same new key came first."""
    whole = ledger.server.answers["/oauth2/jwks"]
    ledger.server.answers["/oauth2/jwks"] = {"keys": [ledger.keys.public("ES256")]}
    waiting = asyncio.Event()

    async def later(_: Asked, writer: asyncio.StreamWriter) -> None:
        await waiting.wait()
        body = json.dumps(whole).encode()
        writer.write(head(200, f"Content-Length: {len(body)}\r\n") + body)

    async with ledger.validator(key_cool_down_seconds=3600, ask_seconds_max=SECONDS_MAX) as validator:
        assert (await validator.validate(ledger.keys.token(by="ES256"))).valid
        validator._keys._asked_at = -float("inf")  # the cool-down is over
        ledger.server.answers["/oauth2/jwks"] = later
        asking = [asyncio.create_task(validator.validate(ledger.keys.token())) for _ in range(20)]
        await soon(lambda: len(ledger.server.requests("/oauth2/jwks")) == 2, "the key is asked for")
        waiting.set()
        assert {one.code for one in await asyncio.gather(*asking)} == {"valid"}
        assert len(ledger.server.requests("/oauth2/jwks")) == 2


async def test_key_that_could_not_be_fetched_leaves_open_what_a_token_is(ledger: Ledger) -> None:
    ledger.server.answers["/oauth2/jwks"] = {"keys": [ledger.keys.public("ES256")]}
    async with ledger.validator(key_cool_down_seconds=3600) as validator:
        assert (await validator.validate(ledger.keys.token(by="ES256"))).valid
        validator._keys._asked_at = -float("inf")
        ledger.server.answers["/oauth2/jwks"] = 503
        for _ in range(3):
            assert (await validator.validate(ledger.keys.token())).code == "stale"
        assert (await validator.validate(ledger.keys.token(by="ES256"))).valid
        assert len(ledger.server.requests("/oauth2/jwks")) == 2


ENDLESS: list[dict[str, float]] = [
    *({"stale_seconds_max": value} for value in (float("nan"), float("inf"), 0.0, -1.0)),
    *({"reference_seconds_max": value} for value in (float("nan"), float("inf"), 3601.0, -1.0)),
]


@pytest.mark.parametrize("given", ENDLESS, ids=str)
async def test_answer_that_would_count_for_ever_is_refused(ledger: Ledger, given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="seconds_max"):
        ledger.validator(**given)


async def test_flood_of_unknown_keys_asks_once_in_a_cool_down(ledger: Ledger) -> None:
    async with ledger.validator(key_cool_down_seconds=3600) as validator:
        header = {"alg": "EdDSA", "typ": "at+jwt"}
        tokens = [ledger.keys.signed(claims(), {**header, "kid": f"k{number}"}) for number in range(300)]
        verdicts = await asyncio.gather(*(validator.validate(token) for token in tokens))
        assert {one.code for one in verdicts} == {"unknown"}
        assert len(ledger.server.requests("/oauth2/jwks")) == 1
