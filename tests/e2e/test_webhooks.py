"""Webhooks from end to end: registered over HTTP, delivered by their own process, to receivers of every kind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from events import streams
from events.streams import WEBHOOKS
from service.cli import main
from service.rules.webhooks import WEBHOOKS_OF_OWNER_MAX
from tests import receivers
from tests.receivers import Receiver, signed_by
from tests.running import (
    CANARY_HOOK,
    RECEIVERS_ADDRESS,
    ROOT,
    Process,
    Service,
    command,
    problem,
    unique,
    until,
)

SECONDS = 60.0
ALLOWED = f"{RECEIVERS_ADDRESS}/32"  # as the shared service has it


@contextlib.contextmanager
def registered(service: Service, receiver: Receiver, **more: Any) -> Iterator[dict[str, Any]]:
    """A webhook that is there for as long as a test needs it."""
    wanted = {"url": receiver.url(f"/{unique(CANARY_HOOK)}"), **more}
    made = service.done("POST", "/v1/webhooks", json=wanted)
    try:
        yield made
    finally:
        service.call("DELETE", path(made))


def path(made: dict[str, Any], rest: str = "") -> str:
    return f"/v1/webhooks/{made['webhook_id']}{rest}"


def revoke(service: Service, made: dict[str, Any] | None = None) -> int:
    """Revokes a token; the sequence of the event."""
    token_id = (made or service.pat())["token_id"]
    seq: int = service.done("POST", f"/v1/tokens/{token_id}/revoke", json={"reason": "admin"})["ledger_seq"]
    return seq


def attempts(service: Service, made: dict[str, Any]) -> list[dict[str, Any]]:
    return list(service.items(path(made, "/deliveries")))


def shown(service: Service, made: dict[str, Any]) -> dict[str, Any]:
    return service.done("GET", path(made))


def arrived(receiver: Receiver, seqs: set[int]) -> None:
    until(lambda: seqs <= receiver.seqs(), seconds=SECONDS, what=f"{seqs} arrived")


def deliverer(service: Service) -> Process:
    return service._child(lambda line: line.endswith(" deliver"))


# Delivery


def test_revocation_is_delivered_signed_and_to_the_byte(service: Service) -> None:
    with Receiver() as receiver, registered(service, receiver, webhook_name="mine") as made:
        seq = revoke(service)
        arrived(receiver, {seq})
        received = receiver.received[0]
        assert signed_by(received, made["secret"])
        assert received.headers["content-type"] == "application/cloudevents+json"
        assert received.path == made["url"].removeprefix(receiver.url(""))
        assert received.id.startswith("rev_")
        assert received.id.endswith(f"_{seq}")
        page = service.http.get(
            "/v1/revocations", params={"after": seq - 1}, headers={"Authorization": f"Bearer {service.admin_token}"}
        )
        assert received.body in page.content
        assert received.event["data"]["ledger_seq"] == seq
        logged = until(lambda: attempts(service, made), seconds=SECONDS)
        assert len(logged) == 1
        assert logged[0] | {"at": "", "seconds": 0} == {
            "message_id": received.id,
            "ledger_seq": seq,
            "number": 1,
            "at": "",
            "outcome": "delivered",
            "status": 204,
            "seconds": 0,
        }
        until(lambda: shown(service, made)["pending"] == 0, seconds=SECONDS)
        seen = shown(service, made)
        assert (seen["url"], seen["enabled"], seen["webhook_name"]) == (made["url"], True, "mine")
        assert "secret" not in seen


def test_delivery_is_a_receipt(service: Service) -> None:
    with Receiver() as receiver, registered(service, receiver) as made:
        receiver.statuses = [500]
        seq = revoke(service)

        def reached() -> dict[str, Any]:
            told = service.done("GET", f"/v1/revocations/{seq}/propagation")
            return next(one for one in told["followers"] if one["id"] == made["webhook_id"])

        found = until(lambda: (one := reached())["state"] == "applied" and one, seconds=SECONDS)
        assert (found["transport"], found["acknowledged_seq"] >= seq) == ("webhook", True)
        assert len(receiver.received) == 2


def test_delivery_that_fails_is_tried_again_with_the_same_id(service: Service) -> None:
    with Receiver() as receiver, registered(service, receiver) as made:
        receiver.statuses = [500]
        seq = revoke(service)
        until(lambda: len(receiver.received) == 2, seconds=SECONDS)
        first, second = receiver.received
        assert first.id == second.id
        assert first.body == second.body
        assert signed_by(second, made["secret"])
        assert second.at - first.at > 0.7
        logged = until(lambda: (found := attempts(service, made))[1:] and found, seconds=SECONDS)
        assert [(one["number"], one["outcome"], one["status"]) for one in logged] == [
            (2, "delivered", 204),
            (1, "failed", 500),
        ]
        assert logged[1]["next_at"] > logged[1]["at"]
        assert {one["ledger_seq"] for one in logged} == {seq}
        assert logged[1]["failing_since"] == logged[1]["at"]
        assert "failing_since" not in logged[0]


def test_only_what_could_concern_is_delivered(service: Service) -> None:
    mine, other = service.user(scope=(scope := service.scope())), service.user(scope=scope)
    with Receiver() as receiver, registered(service, receiver, subject=mine["user_id"]) as made:
        unwanted = revoke(service, service.issue(other["user_id"], scope))
        wanted = revoke(service, service.issue(mine["user_id"], scope))
        arrived(receiver, {wanted})
        until(lambda: shown(service, made)["pending"] == 0, seconds=SECONDS)
        assert receiver.seqs() == {wanted}
        assert unwanted < wanted
        assert shown(service, made)["subject"] == mine["user_id"]
        changed = service.done("PATCH", path(made), json={"subject": None})
        assert "subject" not in changed
        until(lambda: revoke(service, service.issue(other["user_id"], scope)) in receiver.seqs(), seconds=SECONDS)


def test_receiver_that_says_gone_is_disabled_and_loses_nothing(service: Service) -> None:
    with Receiver() as receiver, registered(service, receiver) as made:
        receiver.statuses = [410]
        first = revoke(service)
        until(lambda: not shown(service, made)["enabled"], seconds=SECONDS)
        assert shown(service, made)["disabled_reason"] == "gone"
        until(lambda: '"webhook_disabled"' in service.log_path.read_text(), seconds=SECONDS)  # told behind its event
        doctor = CliRunner().invoke(main, ["doctor", "--data-dir", str(service.data_dir), "-o", "json"])
        (found,) = [one for one in json.loads(doctor.stdout)["checks"] if made["webhook_id"] in one["found"]]
        assert found["found"].endswith("disabled, gone")
        second = revoke(service)
        assert len(receiver.received) == 1
        assert service.done("PATCH", path(made), json={"enabled": True})["enabled"]
        arrived(receiver, {first, second})
        assert len(set(receiver.ids())) == 2


def test_disabled_webhook_gets_nothing_until_it_is_enabled(service: Service) -> None:
    with (
        Receiver() as receiver,
        Receiver() as other,
        registered(service, other),
        registered(service, receiver) as made,
    ):
        arrived(receiver, {revoke(service)})
        seen = service.done("PATCH", path(made), json={"enabled": False})
        assert (seen["enabled"], seen["disabled_reason"]) == (False, "asked")
        # The deliverer looks twice a second: what it has not stopped yet is delivered.
        until(lambda: revoke(service) and shown(service, made)["pending"] > 2, seconds=SECONDS)
        before = receiver.seqs()
        missed = {revoke(service) for _ in range(3)}
        arrived(other, missed)
        assert receiver.seqs() == before
        service.done("PATCH", path(made), json={"enabled": True})
        arrived(receiver, missed)


def test_rotated_secrets_both_sign_until_the_overlap_ends(service: Service) -> None:
    with Receiver() as receiver, registered(service, receiver) as made:
        new = service.done("POST", path(made, "/secrets"), json={"overlap_seconds": 600})
        assert new["secret"] != made["secret"]
        assert "secret_rotated_at" in shown(service, made)

        def both_sign() -> bool:
            arrived(receiver, {revoke(service)})
            return signed_by(receiver.received[-1], new["secret"])

        until(both_sign, seconds=SECONDS)
        assert signed_by(receiver.received[-1], made["secret"])
        assert receiver.received[-1].headers["webhook-signature"].count("v1,") == 2
        last = service.done("POST", path(made, "/secrets"))

        def one_signs() -> bool:
            arrived(receiver, {revoke(service)})
            return signed_by(receiver.received[-1], last["secret"])

        until(one_signs, seconds=SECONDS)
        assert receiver.received[-1].headers["webhook-signature"].count("v1,") == 1


def test_webhook_goes_on_at_another_url(service: Service) -> None:
    with Receiver() as before, Receiver() as after, registered(service, before) as made:
        arrived(before, {revoke(service)})
        seen = service.done("PATCH", path(made), json={"url": after.url("/b")})
        assert (seen["url"], seen["origin"]) == (after.url("/b"), after.url(""))
        until(lambda: revoke(service) in after.seqs(), seconds=SECONDS)


def test_redelivery_brings_everything_from_a_cursor_again(service: Service) -> None:
    with Receiver() as receiver, registered(service, receiver) as made:
        seqs = sorted(revoke(service) for _ in range(4))
        arrived(receiver, set(seqs))
        again = service.done("POST", path(made, "/redeliveries"), json={"after": seqs[1]})
        assert (again["after"], again["snapshot_required"]) == (seqs[1], False)
        until(lambda: len(receiver.received) == 6, seconds=SECONDS)
        ids = receiver.ids()
        assert sorted(ids[4:]) == sorted(one for one in ids[:4] if int(one.rpartition("_")[2]) > seqs[1])
        problem(service.call("POST", path(made, "/redeliveries"), json={"after": 10**9}), 400, "invalid_request")


def test_webhook_registered_with_a_cursor_gets_what_came_before(service: Service) -> None:
    seqs = [revoke(service) for _ in range(2)]
    with Receiver() as receiver, registered(service, receiver, after=seqs[0]):
        arrived(receiver, {seqs[1]})
        assert seqs[0] not in receiver.seqs()


def test_removed_webhook_gets_nothing_and_is_nowhere(service: Service) -> None:
    with Receiver() as receiver, Receiver() as other, registered(service, other):
        with registered(service, receiver) as made:
            arrived(receiver, {revoke(service)})
        problem(service.call("GET", path(made)), 404, "not_found")
        problem(service.call("DELETE", path(made)), 404, "not_found")
        assert made["webhook_id"] not in {one["webhook_id"] for one in service.items("/v1/webhooks")}
        count = len(receiver.received)
        arrived(other, {revoke(service)})
        assert len(receiver.received) == count


def test_test_message_is_signed_and_says_what_came_back(service: Service) -> None:
    with Receiver() as receiver, registered(service, receiver) as made:
        answer = service.done("POST", path(made, "/test"))
        assert (answer["outcome"], answer["status"]) == ("delivered", 204)
        received = receiver.received[0]
        assert received.event["type"] == "token-ledger.webhook.test.v1"
        assert signed_by(received, made["secret"])
        receiver.statuses = [302]
        assert service.done("POST", path(made, "/test"))["outcome"] == "redirected"
        receiver.close()
        answer = service.done("POST", path(made, "/test"))
        assert (answer["outcome"], answer["error"], "status" in answer) == ("unreachable", "no connection", False)


def test_one_callers_tests_take_one_place(service: Service) -> None:
    token = service.bearer("ledger:subscribe")
    with receivers.hanging() as slow, Receiver() as fast, registered(service, fast) as other:
        made = service.done("POST", "/v1/webhooks", token=token, json={"url": slow.url()})
        try:
            with ThreadPoolExecutor(8) as pool:
                waiting = [pool.submit(service.call, "POST", path(made, "/test"), token=token) for _ in range(8)]
                most = 8 - service.worker_count
                until(lambda: slow.received and sum(one.done() for one in waiting) >= most, seconds=SECONDS)
                assert service.done("POST", path(other, "/test"))["outcome"] == "delivered"
                slow.close()
                answers = [one.result() for one in waiting]
            refused = [one for one in answers if one.status_code == 429]
            assert len(refused) >= most
            assert all("Retry-After" in one.headers for one in refused)
        finally:
            service.done("DELETE", path(made), token=token)


def test_deliveries_are_listed_page_by_page_newest_first(service: Service) -> None:
    with Receiver() as receiver, registered(service, receiver) as made:
        for _ in range(5):
            arrived(receiver, {revoke(service)})
        all_of_them = until(lambda: (found := attempts(service, made))[4:] and found, seconds=SECONDS)
        pages = list(service.items(path(made, "/deliveries"), limit=2))
        assert pages == all_of_them
        assert [one["at"] for one in pages] == sorted((one["at"] for one in pages), reverse=True)
        bad = service.call("GET", path(made, "/deliveries"), params={"cursor": "AAAA"})
        problem(bad, 400, "invalid_request")


def sealed(service: Service, webhook_id: str = "*") -> int:
    """How many records there are of URLs and secrets."""

    async def count() -> int:
        url = json.loads((service.data_dir / "bootstrap.json").read_text())["nats_url"]
        nc = await streams.connect(url, service.data_dir / "nats" / "service.nk", name="test")
        try:
            query = {"next_by_subj": f"$KV.{WEBHOOKS}.{webhook_id}.*", "seq": 1, "batch": 10_000}
            return len([one async for one in streams.direct(nc, f"KV_{WEBHOOKS}", query)])
        finally:
            await nc.close()

    return asyncio.run(count())


def at_once(count: int, call: Callable[[int], httpx.Response]) -> list[int]:
    """The statuses of calls that race."""
    with ThreadPoolExecutor(8) as pool:
        return [answer.status_code for answer in pool.map(call, range(count))]


def test_changes_that_race_leave_one_sealed_record(service: Service) -> None:
    """What was in force before, and what lost, can be opened by nobody any more."""
    with Receiver() as receiver, registered(service, receiver) as made:
        for _ in range(3):
            service.done("POST", path(made, "/secrets"))
        assert sealed(service, made["webhook_id"]) == 1
        at_once(24, lambda number: service.call("PATCH", path(made), json={"webhook_name": f"n{number}"}))
        at_once(16, lambda _: service.call("POST", path(made, "/secrets"), json={"overlap_seconds": 60}))
        service.done("PATCH", path(made), json={"webhook_name": "last"})
        assert sealed(service, made["webhook_id"]) == 1
        assert service.done("POST", path(made, "/test"))["outcome"] == "delivered"
        service.done("DELETE", path(made))
        assert sealed(service, made["webhook_id"]) == 0


def test_registrations_that_race_for_a_key_leave_one_sealed_record(service: Service) -> None:
    before = sealed(service)
    with Receiver() as receiver:
        for number in range(4):
            headers = {"Idempotency-Key": unique("key")}
            # Some ask for the same, some for something else, which is refused.
            statuses = at_once(
                16,
                lambda caller, headers=headers: service.call(
                    "POST", "/v1/webhooks", json={"url": receiver.url(f"/{caller % 2}")}, headers=headers
                ),
            )
            assert {201} <= set(statuses) <= {201, 422}
            assert sealed(service) == before + number + 1
        for one in service.items("/v1/webhooks"):
            if one["origin"] == receiver.url(""):
                service.done("DELETE", path(one))
    assert sealed(service) == before


# Who may


def test_webhooks_are_their_owners_own(service: Service) -> None:
    mine, other = service.bearer("ledger:subscribe"), service.bearer("ledger:subscribe")
    with Receiver() as receiver:
        made = service.done("POST", "/v1/webhooks", token=mine, json={"url": receiver.url()})
        try:
            for method, rest, body in [
                ("GET", "", None),
                ("PATCH", "", {"enabled": False}),
                ("DELETE", "", None),
                ("POST", "/secrets", {}),
                ("POST", "/redeliveries", {"after": 0}),
                ("POST", "/test", None),
                ("GET", "/deliveries", None),
            ]:
                request = {"json": body} if body is not None else {}
                problem(service.call(method, path(made, rest), token=other, **request), 404, "not_found")
            assert [one["webhook_id"] for one in service.done("GET", "/v1/webhooks", token=mine)["items"]] == [
                made["webhook_id"]
            ]
            assert service.done("GET", "/v1/webhooks", token=other)["items"] == []
            assert made["webhook_id"] in {one["webhook_id"] for one in service.items("/v1/webhooks")}
            refused = service.call("GET", "/v1/webhooks", token=service.bearer("ledger:validate"))
            problem(refused, 403, "insufficient_scope")
        finally:
            service.done("DELETE", path(made), token=mine)


@pytest.mark.parametrize("kind", ["user", "client"])
def test_webhook_ends_with_its_owner(service: Service, kind: str) -> None:
    """Nobody else would ever end it, and it tells of everybody's revocations."""
    if kind == "user":
        owner = service.user(kind="service", scope="ledger:subscribe")["user_id"]
        token = service.issue(owner, "ledger:subscribe", kind="sat")["token"]
    else:
        app = service.app(scope="ledger:subscribe")
        owner = app.client_id
        token = service.grant(app)["access_token"]
    with Receiver() as receiver, Receiver() as other, registered(service, other):
        made = service.done("POST", "/v1/webhooks", token=token, json={"url": receiver.url()})
        assert made["owner"] == owner
        arrived(receiver, {revoke(service)})
        service.done("DELETE", f"/v1/{kind}s/{owner}")
        until(lambda: not shown(service, made)["enabled"], seconds=SECONDS)
        assert shown(service, made)["disabled_reason"] == "owner_disabled"
        service.done("DELETE", path(made))


def test_registrations_that_race_find_no_more_places_than_there_are(service: Service) -> None:
    token = service.bearer("ledger:subscribe")
    full, made = WEBHOOKS_OF_OWNER_MAX, []

    def register(_: int) -> httpx.Response:
        answer = service.call("POST", "/v1/webhooks", token=token, json={"url": "https://1.1.1.1/"})
        if answer.status_code == 201:
            made.append(answer.json())
        return answer

    try:
        statuses = at_once(full - 2, register) + at_once(24, register)
        # One worker counts after the other; of two that count at the same time, each may find the last place.
        assert full <= statuses.count(201) < full + service.worker_count
        assert set(statuses) == {201, 409}
    finally:
        for one in made:
            service.done("DELETE", path(one))


def test_same_idempotency_key_registers_one_webhook(service: Service) -> None:
    with Receiver() as receiver:
        request = {"json": {"url": receiver.url()}, "headers": {"Idempotency-Key": unique("key")}}
        first, second = (service.done("POST", "/v1/webhooks", **request) for _ in range(2))
        assert first == second
        service.done("DELETE", path(first))


def test_same_idempotency_key_makes_one_secret(service: Service) -> None:
    with Receiver() as receiver, registered(service, receiver) as made:
        request = {"json": {"overlap_seconds": 60}, "headers": {"Idempotency-Key": unique("key")}}
        first, second = (service.done("POST", path(made, "/secrets"), **request) for _ in range(2))
        assert first == second
        assert service.done("POST", path(made, "/test"))["outcome"] == "delivered"
        assert signed_by(receiver.received[0], first["secret"])


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://127.0.0.1/", "127.0.0.1 is not a public address"),
        ("https://[::ffff:127.0.0.1]/", "not a public address"),
        ("https://0/", "0 resolves to what is not a public address"),
        ("https://169.254.169.254/latest/meta-data", "not a public address"),
        ("https://[fd00:ec2::254]/", "not a public address"),
        ("https://10.0.0.1/", "not a public address"),
        ("https://localhost/", "not a public address"),
        ("https://1.1.1.1:22/", "port 22 is not called"),
        ("http://1.1.1.1/", "must begin with https://"),
        ("https://user:password@1.1.1.1/", "must not hold a user name or password"),
        ("gopher://1.1.1.1/", "must begin with https://"),
        ("https://nowhere.invalid/", "nowhere.invalid"),
        ("https://1.1.1.1/#a", "no fragment"),
    ],
)
def test_url_that_must_not_be_called_is_refused_at_registration(service: Service, url: str, said: str) -> None:
    """Attacks 203 and 204, where the operator has allowed nothing."""
    refused = problem(service.call("POST", "/v1/webhooks", json={"url": url}), 400, "invalid_request")
    assert said in refused["detail"]
    assert refused["fix"]


def test_names_are_looked_up_for_nobody_who_has_no_webhook(service: Service) -> None:
    nobody = f"/v1/webhooks/whk_{'0' * 32}"
    token = service.bearer("ledger:subscribe")
    answers = [
        problem(service.call("PATCH", nobody, token=token, json={"url": f"https://{host}/"}), 404, "not_found")
        for host in ("localhost", "nowhere.invalid", "127.0.0.1")
    ]
    assert len({one["detail"] for one in answers}) == 1


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({}, "url"),
        ({"url": 7}, "url"),
        ({"url": ""}, "url"),
        ({"url": "https://1.1.1.1/", "subject": "somebody"}, "subject must be an id"),
        ({"url": "https://1.1.1.1/", "client_id": "usr_" + "0" * 32}, "client_id must be an id"),
        ({"url": "https://1.1.1.1/", "after": -1}, "after"),
        ({"url": "https://1.1.1.1/", "after": 10**12}, "the log ends at"),
        ({"url": "https://1.1.1.1/", "secret": "mine"}, "secret"),
    ],
)
def test_registration_that_does_not_fit_is_refused(service: Service, members: dict[str, Any], said: str) -> None:
    assert said in problem(service.call("POST", "/v1/webhooks", json=members), 400, "invalid_request")["detail"]


# Receivers and processes that fail


def test_receiver_that_hangs_delays_no_other(service: Service) -> None:
    with receivers.hanging() as slow, Receiver() as fast, registered(service, slow), registered(service, fast):
        seqs = {revoke(service) for _ in range(20)}
        arrived(fast, seqs)
        until(lambda: slow.received, seconds=SECONDS)
        # Those that were sent before a first one was answered; nothing of the others waits in memory.
        assert len(slow.received) <= 8


def test_killed_deliverer_loses_nothing(service: Service) -> None:
    with Receiver() as receiver, registered(service, receiver):
        seqs = set()
        for _ in range(3):
            seqs |= {revoke(service) for _ in range(10)}
            until(receiver.seqs, seconds=SECONDS)
            killed = deliverer(service)
            killed.kill(signal.SIGKILL)
            until(lambda gone=killed: not gone.alive(), seconds=SECONDS)
            seqs |= {revoke(service) for _ in range(5)}
        arrived(receiver, seqs)
        assert receiver.seqs() == seqs
        by_id = {one.id: one.body for one in receiver.received}
        assert len(by_id) == len(seqs)


def test_two_deliverers_share_the_work(service: Service) -> None:
    arguments = [*command(), "deliver", "--data-dir", str(service.data_dir)]
    environment = {"TOKEN_LEDGER_WEBHOOK_ALLOWED_NETWORKS": ALLOWED, "PATH": "/usr/bin:/bin"}
    log_path = service.log_path.with_name("second-deliverer.log")
    with log_path.open("wb") as log, Receiver() as receiver, registered(service, receiver) as made:
        second = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            until(lambda: "deliverer_started" in log_path.read_text(), seconds=SECONDS)
            seqs = {revoke(service) for _ in range(10)}
            arrived(receiver, seqs)
            until(lambda: shown(service, made)["pending"] == 0, seconds=SECONDS)
            assert len(receiver.received) == len(seqs)
            with deliverer(service).stopped():
                seqs |= {revoke(service) for _ in range(10)}
                arrived(receiver, seqs)
            assert receiver.seqs() == seqs
        finally:
            second.terminate()
            assert second.wait(10) == 0


def test_paths_and_secrets_of_webhooks_are_told_to_nobody_else(service: Service) -> None:
    """That they stand readable in no file is looked up when the service has been stopped (conftest.py)."""
    with Receiver() as receiver, registered(service, receiver) as made:
        secret = service.done("POST", path(made, "/secrets"), json={"overlap_seconds": 600})["secret"]
        receiver.statuses = [500, 301]
        arrived(receiver, {revoke(service)})
        service.done("POST", path(made, "/test"))
        service.done("PATCH", path(made), json={"url": receiver.url(f"/{unique(CANARY_HOOK)}?{CANARY_HOOK}")})
        problem(service.call("PATCH", path(made), json={"url": f"https://10.0.0.1/{CANARY_HOOK}"}), 400)
        receiver.close()
        service.done("POST", path(made, "/test"))
        revoke(service)
        until(lambda: any(one["outcome"] == "unreachable" for one in attempts(service, made)), seconds=SECONDS)
        told = [
            str(list(service.items("/v1/audit/events", limit=1000))),
            service.http.get("/metrics").text,
            str(list(service.items("/v1/webhooks"))),
            str(attempts(service, made)),
            service.log_path.read_text(),
        ]
        for text in told:
            for word in (CANARY_HOOK, made["secret"], secret):
                assert word not in text
        assert 'token_ledger_webhook_attempts_total{outcome="failed"}' in told[1]
        assert "whk_" not in told[1]
