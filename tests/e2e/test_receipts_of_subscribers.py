"""Receipts of registered subscribers over every transport, and the alarm when one of them goes silent."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest
from click.testing import CliRunner
from nats.aio.client import Client

from service.cli import main
from service.client import SseFeed, SyncTokenValidator
from tests import running
from tests.receivers import Receiver
from tests.running import Service, StartService, problem, until

PATIENCE = 60.0
PLAIN = Path(running.__file__).with_name("plain_subscriber.py")


@contextlib.contextmanager
def subscriber(service: Service, transport: str = "http", **more: Any) -> Iterator[dict[str, Any]]:
    """Registered, and removed in the end, so that nobody later finds it silent."""
    told = service.done("POST", "/v1/subscribers", json={"name": "gate", "transport": transport, **more})
    try:
        yield told
    finally:
        service.done("DELETE", f"/v1/subscribers/{told['subscriber_id']}")


@contextlib.asynccontextmanager
async def following(told: dict[str, Any]) -> AsyncIterator[Client]:
    nc = await nats.connect(told["nats_url"], nkeys_seed_str=told["nats_seed"], inbox_prefix=told["inbox_prefix"])
    try:
        yield nc
    finally:
        await nc.close()


def revoke(service: Service) -> int:
    seq: int = service.done("POST", f"/v1/tokens/{service.pat()['token_id']}/revoke", json={"reason": "logout"})[
        "ledger_seq"
    ]
    until(lambda: service.done("GET", "/v1/revocations/position")["ledger_seq"] >= seq, seconds=PATIENCE)
    return seq


def state_of(service: Service, told: dict[str, Any], seq: int) -> dict[str, Any]:
    found = propagation_of(service, seq)
    (mine,) = [one for one in found["followers"] if one["id"] == told["subscriber_id"]]
    return mine


def until_applied(service: Service, told: dict[str, Any], seq: int) -> dict[str, Any]:
    return until(lambda: one if (one := state_of(service, told, seq))["state"] == "applied" else None, seconds=PATIENCE)


def acknowledge(service: Service, told: dict[str, Any], seq: Any, **more: Any) -> Any:
    path = f"/v1/subscribers/{told['subscriber_id']}/acknowledgements"
    return service.call("POST", path, json={"ledger_seq": seq}, **more)


# Over HTTP


def test_acknowledgement_over_http_is_a_receipt(service: Service) -> None:
    with subscriber(service) as told:
        first, second = revoke(service), revoke(service)
        assert acknowledge(service, told, first).json() == {"subscriber_id": told["subscriber_id"], "ledger_seq": first}
        assert until_applied(service, told, first)["acknowledged_seq"] == first
        assert state_of(service, told, second)["state"] == "pending"
        acknowledge(service, told, second)
        applied_at = until_applied(service, told, first)["applied_at"]
        assert applied_at <= until_applied(service, told, second)["applied_at"]
        assert acknowledge(service, told, 1).status_code == 200  # cumulative: it takes nothing back
        assert until_applied(service, told, second)["acknowledged_seq"] == second


def test_acknowledgement_of_what_was_not_announced_is_refused(service: Service) -> None:
    """A follower that acknowledges what it cannot have seen."""
    with subscriber(service) as told:
        seq = revoke(service)
        end = service.done("GET", "/v1/revocations/position")["ledger_seq"]
        for beyond in (end + 1_000, 2**53):
            body = problem(acknowledge(service, told, beyond), 400, "feed_changed")
            assert body["fix"]
        assert state_of(service, told, seq)["state"] == "pending"


def test_acknowledgement_of_another_feed_is_refused(service: Service) -> None:
    """A backup was restored: what the follower applied was of another log, with other sequences."""
    with subscriber(service) as told:
        seq = revoke(service)
        feed = service.done("GET", "/v1/revocations/position")["feed"]
        path = f"/v1/subscribers/{told['subscriber_id']}/acknowledgements"
        for body in ({"ledger_seq": seq, "feed": "0" * 16}, {"ledger_seq": 1, "feed": "x"}):
            assert "snapshot" in problem(service.call("POST", path, json=body), 400, "feed_changed")["fix"]
        query = {"after": seq, "subscriber": told["subscriber_id"], "feed": "0" * 16}
        problem(service.call("GET", "/v1/revocations", params=query), 400, "feed_changed")
        assert state_of(service, told, seq)["state"] == "pending"
        service.done("GET", "/v1/revocations", params={**query, "feed": feed})
        until_applied(service, told, seq)
        service.done("POST", path, json={"ledger_seq": seq, "feed": feed})


@pytest.mark.parametrize("seq", [-1, "7", None, 1.5, 2**60])
def test_acknowledgement_that_is_no_position_is_refused(service: Service, seq: Any) -> None:
    with subscriber(service) as told:
        problem(acknowledge(service, told, seq), 400, "invalid_request")


def test_acknowledgement_for_another_is_refused(service: Service) -> None:
    with subscriber(service) as told:
        seq = revoke(service)
        stranger = service.bearer("ledger:subscribe")
        problem(acknowledge(service, told, seq, token=stranger), 404, "not_found")
        path = f"/v1/revocations?after={seq}&subscriber={told['subscriber_id']}"
        problem(service.call("GET", path, token=stranger), 404, "not_found")
        problem(service.call("GET", path.replace("?", "/stream?"), token=stranger), 404, "not_found")
        assert state_of(service, told, seq)["state"] == "pending"
    problem(acknowledge(service, told, seq), 404, "not_found")


def test_poll_from_a_cursor_acknowledges_it(service: Service) -> None:
    with subscriber(service) as told:
        before = service.done("GET", "/v1/revocations/position")["ledger_seq"]
        seq = revoke(service)
        query = {"after": before, "subscriber": told["subscriber_id"]}
        page = service.done("GET", "/v1/revocations", params=query)
        assert [int(item["id"]) for item in page["items"]] == [seq]
        assert state_of(service, told, seq)["state"] == "pending"
        service.done("GET", "/v1/revocations", params={**query, "after": page["ledger_seq"]})
        assert until_applied(service, told, seq)["acknowledged_seq"] == page["ledger_seq"]


def test_poll_as_a_subscriber_over_nats_is_no_receipt(service: Service) -> None:
    """Its acknowledgements are those of what was delivered to it."""
    with subscriber(service, "nats") as told, subscriber(service) as other:
        seq = revoke(service)
        for one in (told, other):
            query = {"after": seq, "subscriber": one["subscriber_id"]}
            service.done("GET", "/v1/revocations", params=query)
        until_applied(service, other, seq)
        assert state_of(service, told, seq)["state"] == "pending"


def test_open_stream_is_a_sign_of_life_and_no_receipt(service: Service) -> None:
    with subscriber(service) as told, service.caller() as http:
        seq = revoke(service)
        path = f"/v1/subscribers/{told['subscriber_id']}"
        assert "last_seen_at" not in service.done("GET", path)
        query = {"after": seq - 1, "subscriber": told["subscriber_id"]}
        headers = {"Authorization": f"Bearer {service.admin_token}"}
        with http.stream("GET", "/v1/revocations/stream", params=query, headers=headers) as stream:
            assert any(line == f"id: {seq}" for line in stream.iter_lines())
            until(lambda: "last_seen_at" in service.done("GET", path), seconds=PATIENCE)
        shown = service.done("GET", path)
        assert (shown["pending"], shown["silent"], "acknowledged_seq" in shown) == (1, False, False)


# Over NATS, with the credentials that were given out


async def test_acknowledgement_over_nats_is_a_receipt(service: Service) -> None:
    with subscriber(service, "nats") as told:
        first, second, third = (revoke(service) for _ in range(3))
        async with following(told) as nc:
            js = nc.jetstream(prefix=told["api_prefix"])
            feed = await js.pull_subscribe_bind(told["consumer"], stream=told["stream"])
            messages = []
            while len(messages) < 3:
                messages += await feed.fetch(3, timeout=PATIENCE)
            assert [int(json.loads(one.data)["id"]) for one in messages] == [first, second, third]
            await messages[0].ack()
            await messages[2].ack_sync(timeout=PATIENCE)
            assert until_applied(service, told, first)["transport"] == "nats"
            assert state_of(service, told, second)["state"] == state_of(service, told, third)["state"] == "pending"
            # Made up: another's message, and one that is not there.
            await nc.publish(messages[1].reply.replace(".2.", ".99.", 1), b"")
            await messages[1].ack_sync(timeout=PATIENCE)
        found = until_applied(service, told, third)
        assert found["acknowledged_seq"] == third
        assert found["after_ms"] > 0
        problem(acknowledge(service, told, third), 400, "invalid_request")


@pytest.mark.slow
async def test_acknowledgements_over_nats_outlive_a_killed_projector(service: Service) -> None:
    """kill -9 at once after the acknowledgement: the server's floor says what nobody could write down."""
    with subscriber(service, "nats") as told:
        async with following(told) as nc:
            js = nc.jetstream(prefix=told["api_prefix"])
            feed = await js.pull_subscribe_bind(told["consumer"], stream=told["stream"])
            for _ in range(2):
                seqs = [revoke(service), revoke(service)]
                messages = []
                while len(messages) < 2:
                    messages += await feed.fetch(2, timeout=PATIENCE)
                await messages[0].ack_sync(timeout=PATIENCE)
                service.projector("receipts").kill(signal.SIGKILL)
                assert until_applied(service, told, seqs[0])["acknowledged_seq"] == seqs[0]
                assert state_of(service, told, seqs[1])["state"] == "pending"
                await messages[1].ack_sync(timeout=PATIENCE)
                assert until_applied(service, told, seqs[1])["acknowledged_seq"] == seqs[1]


# Silence


def test_silent_subscriber_shows_in_metrics_doctor_and_lists_and_comes_back(service_with: StartService) -> None:
    service = service_with(follower_silent_seconds_max=2)

    def numbers() -> dict[str, float]:
        lines = service.http.get("/metrics").text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if "_followers" in line and not line.startswith("#"))
        return {name.removeprefix("token_ledger_"): float(value) for name, value in found.items()}

    def doctor() -> list[dict[str, Any]]:
        environment = {"TOKEN_LEDGER_FOLLOWER_SILENT_SECONDS_MAX": "2"}
        ended = CliRunner().invoke(main, ["doctor", "--data-dir", str(service.data_dir), "-o", "json"], env=environment)
        answer = json.loads(ended.stdout)
        return [one for one in answer["checks"] if one["name"] == "followers"]

    with subscriber(service) as told:
        path = f"/v1/subscribers/{told['subscriber_id']}"
        seq = revoke(service)
        until(lambda: numbers().get("silent_followers") == 1, seconds=PATIENCE, what="it is silent")
        # The alarm looks now and then, and tells who is back only of whom it has seen silent.
        until(lambda: "follower_silent" in service.log_path.read_text(), seconds=PATIENCE, what="the alarm")
        assert (numbers()["registered_followers"], numbers()["pending_followers"]) == (1, 1)
        shown = service.done("GET", path)
        assert (shown["silent"], shown["pending"]) == (True, 1)
        assert service.done("GET", "/v1/subscribers")["items"] == [shown]
        (finding,) = doctor()
        assert finding["state"] == "problem"
        assert told["subscriber_id"] in finding["found"]
        assert "1 revocation" in finding["found"]
        assert f"subscriber delete {told['subscriber_id']}" in finding["fix"]
        assert service.http.get("/health/ready").status_code == 200
        assert told["subscriber_id"] not in service.http.get("/metrics").text

        def back() -> bool:
            acknowledge(service, told, seq)  # a sign of life each time
            return numbers().get("silent_followers") == 0 and "follower_back" in service.log_path.read_text()

        until(back, seconds=PATIENCE, what="it is back")
    lines = [line for line in service.log_path.read_text().splitlines() if told["subscriber_id"] in line]
    told_events = [event for line in lines for event in ("follower_silent", "follower_back") if event in line]
    assert told_events[:2] == ["follower_silent", "follower_back"]
    until(lambda: numbers().get("registered_followers") == 0, seconds=PATIENCE)
    (finding,) = doctor()
    assert finding["state"] == "ok"


# All kinds together


@contextlib.contextmanager
def plain_client(told: dict[str, Any], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A subscriber over NATS in a process of its own, with nothing of this project."""
    registration = directory / "registration.json"
    registration.write_text(json.dumps(told))
    process = subprocess.Popen([sys.executable, str(PLAIN), str(registration), str(directory / "applied.ndjson")])
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE)


@contextlib.contextmanager
def poller(service: Service, subscriber_id: str, token: str) -> Iterator[None]:
    """A follower that polls, and comes for more when it has applied what it got."""
    ended = threading.Event()
    headers = {"Authorization": f"Bearer {token}"}
    after: int = service.done("GET", "/v1/revocations/position")["ledger_seq"]

    def run() -> None:
        query = {"after": after, "wait_seconds": 1, "subscriber": subscriber_id}
        with service.caller(timeout_seconds=PATIENCE) as http:
            while not ended.is_set():
                answer = http.get("/v1/revocations", params=query, headers=headers)
                if answer.is_success:
                    query["after"] = answer.json()["ledger_seq"]

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(PATIENCE)


def test_revocation_is_complete_when_followers_of_every_kind_have_applied_it(
    service_with: StartService, tmp_path: Path
) -> None:
    """A plain NATS client, our library by server-sent events, one that polls, and a webhook."""
    service = service_with(webhook_allowed_networks="127.0.0.0/8")
    scope = "ledger:subscribe ledger:validate"
    user = service.user(kind="service", scope=scope)
    bearer = service.issue(user["user_id"], scope, kind="sat")["token"]
    with contextlib.ExitStack() as ends:
        plain = ends.enter_context(subscriber(service, "nats"))
        sse = ends.enter_context(subscriber(service, owner=user["user_id"]))
        polling = ends.enter_context(subscriber(service, owner=user["user_id"]))
        receiver = ends.enter_context(Receiver())
        hook = service.done("POST", "/v1/webhooks", json={"url": receiver.url()})
        ends.callback(service.done, "DELETE", f"/v1/webhooks/{hook['webhook_id']}")
        process = ends.enter_context(plain_client(plain, tmp_path))
        ends.enter_context(poller(service, polling["subscriber_id"], bearer))
        feed = SseFeed(subscriber_id=sse["subscriber_id"])
        options = {"token": bearer, "feed": feed, "start_seconds_max": PATIENCE}
        ends.enter_context(SyncTokenValidator(service.issuer, "https://api.example", **options))

        path = f"/v1/tokens/{service.pat()['token_id']}/revoke"
        done = service.done("POST", path, json={"reason": "compromised", "wait_seconds": 30}, timeout=PATIENCE)
        found = done["propagation"]
        assert found["complete"], found
        kinds = {one["id"]: (one["transport"], one["state"]) for one in found["followers"]}
        assert kinds == {
            plain["subscriber_id"]: ("nats", "applied"),
            sse["subscriber_id"]: ("http", "applied"),
            polling["subscriber_id"]: ("http", "applied"),
            hook["webhook_id"]: ("webhook", "applied"),
        }
        times = [one["applied_at"] for one in found["followers"]]
        assert found["last_applied_at"] == max(times)
        assert all(one["after_ms"] > 0 for one in found["followers"])

        process.kill()
        process.wait(PATIENCE)
        path = f"/v1/tokens/{service.pat()['token_id']}/revoke"
        seq = service.done("POST", path, json={"reason": "compromised"})["ledger_seq"]
        found = until(
            lambda: found if (found := propagation_of(service, seq))["applied"] == 3 else None, seconds=PATIENCE
        )
        assert [one["id"] for one in found["followers"] if one["state"] == "pending"] == [plain["subscriber_id"]]


def propagation_of(service: Service, seq: int) -> dict[str, Any]:
    return service.done("GET", f"/v1/revocations/{seq}/propagation")
