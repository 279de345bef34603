"""The client library against a running service: what is revoked is refused, by both feeds, through whatever happens."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest

from service.client import Context, NatsFeed, NotAllowed, SseFeed, SyncTokenValidator, TokenValidator
from tests.relay import Relay
from tests.running import ROOT, App, Service, StartService, unique, until

AUDIENCE = "https://api.example"
FEEDS = ["sse", "nats"]
SECONDS_MAX = 60.0


async def soon(probe: Callable[[], Awaitable[Any]], what: str) -> Any:
    """The first truthy answer, without holding up the loop."""
    deadline = time.monotonic() + SECONDS_MAX
    while not (answer := await probe()):
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)
    return answer


class Ground:
    """A running service, a client of it that gets JWTs, and a resource server's own token."""

    def __init__(self, service: Service, directory: Path) -> None:
        self.service = service
        self.directory = directory
        self.scope = service.scope()
        self.bearer = service.bearer("ledger:validate ledger:subscribe")
        self.app = self.new_app()

    def new_app(self) -> App:
        return self.service.app(access_token_format="jwt", scope=self.scope, audience=[AUDIENCE])

    def jwt(self, app: App | None = None) -> str:
        token: str = self.service.grant(app or self.app)["access_token"]
        return token

    def subscriber(self) -> dict[str, Any]:
        """What a `NatsFeed` of a new subscriber is made of."""
        made = self.service.done("POST", "/v1/subscribers", json={"name": unique("edge"), "transport": "nats"})
        seed_file = self.directory / made["subscriber_id"]
        seed_file.touch(mode=0o600)
        seed_file.write_text(made["nats_seed"])
        return {"url": made["nats_url"], "seed_file": str(seed_file), "subscriber_id": made["subscriber_id"]}

    def feed(self, kind: str, **changes: Any) -> SseFeed | NatsFeed:
        return SseFeed() if kind == "sse" else NatsFeed(**{**self.subscriber(), **changes})

    def validator(self, feed: SseFeed | NatsFeed, **more: Any) -> TokenValidator:
        wanted = {"token": self.bearer, "feed": feed, "start_seconds_max": SECONDS_MAX, **more}
        return TokenValidator(self.service.url, AUDIENCE, **wanted)

    async def revoke(self, **target: str) -> int:
        """Broadly or one token; answers the sequence."""
        body = {"reason": "compromised", **target}
        answer = await asyncio.to_thread(self.service.done, "POST", "/v1/revocations", json=body)
        seq: int = answer["ledger_seq"]
        return seq

    def announced(self, seq: int) -> None:
        """Waits until the feed is complete up to there: what says that it is fresh from now on knows of it."""

        def reached() -> bool:
            told = self.service.done("GET", "/v1/revocations/position")
            return bool(told["ledger_seq"] >= seq)

        until(reached, seconds=SECONDS_MAX, what="it is announced")


@pytest.fixture(scope="module")
def ground(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(service, tmp_path_factory.mktemp("client"))


@pytest.mark.parametrize("kind", FEEDS)
async def test_what_is_revoked_is_refused_offline(ground: Ground, kind: str) -> None:
    async with ground.validator(ground.feed(kind)) as validator:
        first, second, other = ground.jwt(), ground.jwt(), ground.jwt()
        verdicts = [await validator.validate(token, scope=ground.scope) for token in (first, second, other)]
        assert [(one.code, one.offline) for one in verdicts] == [("valid", True)] * 3
        targets = ({"token_id": verdicts[0].token_id}, {"grant_id": verdicts[1].grant_id})
        for token, target in zip((first, second), targets, strict=True):
            seq = await ground.revoke(**{name: str(value) for name, value in target.items()})

            async def refused(token: str = token, seq: int = seq) -> bool:
                verdict = await validator.validate(token)
                return verdict.code == "revoked" and verdict.offline and verdict.ledger_seq >= seq

            await soon(refused, f"{target} is refused")
        assert (await validator.validate(other)).code == "valid"
        assert validator.status().snapshots == 1


@pytest.mark.parametrize("kind", FEEDS)
async def test_revoked_key_is_refused_offline(service_with: StartService, tmp_path: Path, kind: str) -> None:
    """On a service of its own, since every other JWT would end with it."""
    ground = Ground(await asyncio.to_thread(service_with, signing_algorithms="EdDSA,RS256"), tmp_path)
    async with ground.validator(ground.feed(kind)) as validator:
        known, fresh = ground.jwt(), ground.jwt()
        assert (await validator.validate(known)).code == "valid"
        body = {"now": True, "revoke": True}
        done = await asyncio.to_thread(ground.service.done, "POST", "/v1/keys/rotate", json=body)
        later = ground.jwt()

        async def refused() -> bool:
            return (await validator.validate(known)).code == "revoked"

        await soon(refused, "what the key signed is refused")
        verdict = await validator.validate(fresh)  # heard of for the first time
        assert (verdict.code, verdict.offline, verdict.ledger_seq >= done["ledger_seq"] - 1) == ("revoked", True, True)
        assert (await validator.validate(later)).code == "valid"
    async with ground.validator(ground.feed(kind)) as validator:  # by the snapshot
        verdict = await validator.validate(known)
        assert (verdict.code, verdict.offline) == ("revoked", True)


@pytest.mark.parametrize("what", ["client_id", "subject"])
async def test_token_issued_close_to_a_cut_off_is_asked_about(ground: Ground, what: str) -> None:
    app = ground.new_app()
    async with ground.validator(ground.feed("sse")) as validator:
        before = ground.jwt(app)
        assert (await validator.validate(before)).code == "valid"
        # With client credentials the subject is the client.
        seq = await ground.revoke(**{what: app.client_id})

        async def refused() -> bool:
            return (await validator.validate(before)).code == "revoked"

        await soon(refused, "what was issued before is refused")
        after = ground.jwt(app)
        verdict = await validator.validate(after)
        assert (verdict.code, verdict.offline, verdict.ledger_seq >= seq) == ("valid", False, True)


async def test_reference_token_is_answered_from_memory_until_it_is_revoked(ground: Ground) -> None:
    pat = ground.service.pat(ground.scope)
    async with ground.validator(ground.feed("sse"), reference_seconds_max=3600) as validator:
        first = await validator.validate(pat["token"], scope=ground.scope)
        again = await validator.validate(pat["token"], scope=ground.scope)
        assert [(one.code, one.offline) for one in (first, again)] == [("valid", False), ("valid", True)]
        assert (await validator.validate(pat["token"], scope="other")).code == "insufficient_scope"
        await ground.revoke(token=pat["token"])

        async def refused() -> bool:
            verdict = await validator.validate(pat["token"], scope=ground.scope)
            return verdict.code == "revoked" and verdict.offline

        await soon(refused, "it is refused from memory")
        unknown = await validator.validate("tl_pat_" + "a" * 49)
        assert (unknown.code, unknown.offline) == ("malformed", True)


async def test_reference_token_bound_to_addresses_is_good_only_from_there(ground: Ground) -> None:
    pat = ground.service.pat(ground.scope, allowed_ips=["192.0.2.0/24"])
    async with ground.validator(ground.feed("sse")) as validator:
        for _ in range(2):
            assert (await validator.validate(pat["token"], ip="192.0.2.7")).code == "valid"
            assert (await validator.validate(pat["token"], ip="198.51.100.7")).code == "ip_not_allowed"
            assert (await validator.validate(pat["token"])).code == "ip_not_allowed"


async def test_rotated_token_is_good_until_its_overlap_ends(ground: Ground) -> None:
    pat = ground.service.pat(ground.scope)
    async with ground.validator(ground.feed("sse"), reference_seconds_max=3600) as validator:
        assert (await validator.validate(pat["token"])).valid
        path = f"/v1/tokens/{pat['token_id']}/rotate"
        rotated = await asyncio.to_thread(ground.service.done, "POST", path, json={"overlap_seconds": 2})

        async def known() -> bool:
            return validator.status().ledger_seq >= rotated["ledger_seq"]

        await soon(known, "the rotation is announced")

        async def refused() -> bool:
            return (await validator.validate(pat["token"])).code == "revoked"

        await soon(refused, "the old one ends")
        assert (await validator.validate(rotated["token"])).valid


async def test_uses_are_recorded_by_the_ledger_as_reported(ground: Ground) -> None:
    token = ground.jwt()
    context = Context("192.0.2.9", "curl/8", "GET", "/orders?q=1")
    async with ground.validator(ground.feed("sse")) as validator:
        token_id = (await validator.validate(token, scope=ground.scope, context=context)).token_id
        assert (await validator.validate(token, scope="admin")).code == "insufficient_scope"
    status = validator.status()
    assert (status.uses_reported, status.uses_waiting, status.uses_lost) == (2, 0, 0)

    def uses() -> list[dict[str, Any]]:
        found = ground.service.history(str(token_id), uses="true")
        return [one for one in found if one["type"] == "token.used"]

    found = until(lambda: uses() if len(uses()) == 2 else [], seconds=SECONDS_MAX, what="both uses")
    assert {one["endpoint"] for one in found} == {"reported"}
    assert sorted((one["outcome"], one.get("scope")) for one in found) == sorted(
        [("valid", ground.scope), ("insufficient_scope", "admin")]
    )


async def test_token_of_a_client_that_is_disabled_is_never_let_in_again(ground: Ground) -> None:
    """Issued just before: its cut-off is too close to tell, so that the ledger is asked, and believed later as well."""
    app = ground.new_app()
    token = ground.jwt(app)
    async with ground.validator(SseFeed()) as validator:
        assert (await validator.validate(token)).valid
        await asyncio.to_thread(ground.service.done, "DELETE", f"/v1/clients/{app.client_id}")

        async def refused() -> bool:
            return not (await validator.validate(token)).valid

        await soon(refused, "it is refused")
        codes = {(await validator.validate(token)).code for _ in range(20)}
        assert codes <= {"client_disabled", "revoked"}


async def test_bearer_that_is_not_allowed_is_told_at_the_start(ground: Ground) -> None:
    for token in ("tl_sat_nonsense", ground.service.bearer("ledger:validate")):
        with pytest.raises(NotAllowed, match=r"ledger:subscribe|401"):
            async with ground.validator(SseFeed(), token=token):
                pass


@pytest.mark.parametrize("kind", FEEDS)
async def test_validator_cut_off_goes_stale_and_catches_up(ground: Ground, kind: str) -> None:
    service = ground.service
    nats_port = int(json.loads((service.data_dir / "bootstrap.json").read_text())["nats_url"].rpartition(":")[2])
    async with Relay(service.port) as relay, Relay(nats_port) as nats_relay:
        feed = ground.feed(kind, url=f"nats://127.0.0.1:{nats_relay.port}")
        url = f"http://127.0.0.1:{relay.port}"
        async with ground.validator(feed, api_url=url, stale_seconds_max=1.5) as validator:
            tokens = [ground.jwt() for _ in range(4)]
            ids = [(await validator.validate(token)).token_id for token in tokens]
            pat = service.pat(ground.scope)["token"]
            assert (await validator.validate(pat)).valid

            async def codes() -> list[str]:
                return [(await validator.validate(token)).code for token in tokens]

            for number, (break_off, mend) in enumerate(
                [(relay.cut, relay.mend), (relay.hold, relay.release), (relay.cut, relay.mend)]
            ):
                for one in (break_off, getattr(nats_relay, break_off.__name__)):
                    if (waiting := one()) is not None:
                        await waiting

                async def stale() -> bool:
                    return set(await codes()) == {"stale"}

                await soon(stale, "it does not trust what it knows")
                refused = await validator.validate(pat)
                assert (refused.code, refused.valid) == ("stale", False)
                await asyncio.to_thread(ground.announced, await ground.revoke(token_id=str(ids[number])))
                assert set(await codes()) == {"stale"}
                mend()
                getattr(nats_relay, mend.__name__)()

                async def caught_up(number: int = number) -> bool:
                    found = await codes()
                    assert set(found) <= {"stale", "revoked", "valid"}
                    assert "valid" not in found[: number + 1]
                    return found == ["revoked"] * (number + 1) + ["valid"] * (3 - number)

                await soon(caught_up, "it knows what was revoked meanwhile")
            assert (await validator.validate(pat)).valid


async def test_two_processes_that_share_a_subscriber_both_know_everything(ground: Ground) -> None:
    subscriber = ground.subscriber()
    async with (
        ground.validator(NatsFeed(**subscriber)) as one,
        ground.validator(NatsFeed(**subscriber)) as other,
    ):
        tokens = [ground.jwt() for _ in range(10)]
        for token in tokens:
            await ground.revoke(token=token)

        async def known() -> bool:
            verdicts = [(await each.validate(token)).code for each in (one, other) for token in tokens]
            assert set(verdicts) <= {"revoked", "stale", "valid"}
            return set(verdicts) == {"revoked"}

        await soon(known, "each of both refuses all")


async def test_what_was_applied_is_acknowledged(ground: Ground) -> None:
    service, name = ground.service, unique("edge")
    body = {"name": name, "transport": "http", "owner": service.validate(ground.bearer)["subject"]}
    http_id = service.done("POST", "/v1/subscribers", json=body)["subscriber_id"]
    nats_feed = NatsFeed(**ground.subscriber())
    wanted = {http_id, nats_feed.subscriber_id}
    async with ground.validator(SseFeed(http_id)), ground.validator(nats_feed):
        seq = await ground.revoke(token=ground.jwt())

        async def applied() -> bool:
            path = f"/v1/revocations/{seq}/propagation"
            told = await asyncio.to_thread(service.done, "GET", path)
            return wanted <= {one["id"] for one in told["followers"] if one["state"] == "applied"}

        await soon(applied, "both have said so")


class Child:
    """A resource server in a process of its own."""

    def __init__(self, ground: Ground, feed: dict[str, Any] | None) -> None:
        told = {"issuer": ground.service.url, "audience": AUDIENCE, "token": ground.bearer, "feed": feed}
        more = {"start_seconds_max": SECONDS_MAX, "stale_seconds_max": 2.0}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.client_process", json.dumps({**told, **more})],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        assert self.read() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.communicate(timeout=SECONDS_MAX)

    def ask(self, token: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(token + "\n")
        self.process.stdin.flush()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def code(self, token: str) -> str:
        self.ask(token)
        return self.read()


@pytest.mark.parametrize("kind", FEEDS)
def test_process_that_was_stopped_or_killed_lets_nothing_in_that_was_revoked(ground: Ground, kind: str) -> None:
    """What lay in its buffers when it goes on is as old as it is; what it had acknowledged it gets from a snapshot."""
    feed = ground.subscriber() if kind == "nats" else None
    first, second, other = ground.jwt(), ground.jwt(), ground.jwt()
    service = ground.service
    with Child(ground, feed) as child:
        assert [child.code(token) for token in (first, second, other)] == ["valid"] * 3
        child.process.send_signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        service.done("POST", "/v1/revocations", json={"token": first, "reason": "admin"})
        until(lambda: time.monotonic() - stopped_at > 4, what="longer than it may be stale")
        child.ask(first)
        child.process.send_signal(signal.SIGCONT)
        assert child.read() in {"stale", "revoked"}
        until(lambda: child.code(first) == "revoked", seconds=SECONDS_MAX)
        until(lambda: child.code(other) == "valid", seconds=SECONDS_MAX)
        child.process.kill()
    service.done("POST", "/v1/revocations", json={"token": second, "reason": "admin"})
    with Child(ground, feed) as child:
        assert [child.code(token) for token in (first, second, other)] == ["revoked", "revoked", "valid"]


@pytest.fixture
def synchronous(ground: Ground) -> Iterator[SyncTokenValidator]:
    wanted: dict[str, Any] = {"token": ground.bearer, "feed": SseFeed(), "start_seconds_max": SECONDS_MAX}
    with SyncTokenValidator(ground.service.url, AUDIENCE, **wanted) as validator:
        yield validator


def test_threads_ask_at_once_and_see_the_same(ground: Ground, synchronous: SyncTokenValidator) -> None:
    tokens = [ground.jwt() for _ in range(8)]
    pats = [ground.service.pat(ground.scope)["token"] for _ in range(4)]
    found: dict[int, list[str]] = {}

    def ask(number: int) -> None:
        found[number] = [synchronous.validate(token).code for _ in range(50) for token in (*tokens, *pats)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS_MAX)
    assert found == {number: ["valid"] * 600 for number in range(6)}
    for token in (tokens[0], pats[0]):
        ground.service.done("POST", "/v1/revocations", json={"token": token, "reason": "admin"})
        until(lambda token=token: synchronous.validate(token).code == "revoked", seconds=SECONDS_MAX)  # type: ignore[misc]
    assert synchronous.validate(tokens[1]).valid
