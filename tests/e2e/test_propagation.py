"""Whether a revocation reached everybody: asked afterwards, waited for, and on the command line."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import pytest
import pytest_asyncio

from tests.crowds import Crowd, crowd_of
from tests.running import ROOT, Service, command, problem, until

PATIENCE = 60.0


@pytest_asyncio.fixture
async def crowd(service: Service) -> AsyncIterator[Crowd]:
    service.forget_followers()
    async with crowd_of(service) as made:
        yield made


def revoked(service: Service, **body: Any) -> dict[str, Any]:
    token = service.pat()
    return service.done("POST", f"/v1/tokens/{token['token_id']}/revoke", json={"reason": "compromised", **body})


def propagation(service: Service, ledger_seq: int) -> dict[str, Any]:
    return service.done("GET", f"/v1/revocations/{ledger_seq}/propagation")


def until_complete(service: Service, ledger_seq: int) -> dict[str, Any]:
    return until(lambda: found if (found := propagation(service, ledger_seq))["complete"] else None, seconds=PATIENCE)


def cli(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TOKEN_LEDGER_")}
    return subprocess.run(
        [*command(), *arguments, "--data-dir", str(service.data_dir)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


async def _revoked_at(service: Service, crowd: Crowd, token: dict[str, Any]) -> int:
    """Where it was revoked, as soon as it is: whoever revokes it waits for more."""
    await asyncio.to_thread(until, lambda: service.code(token["token"]) == "revoked", seconds=PATIENCE)
    return (await crowd.ledger.last_of(f"ledger.main.grant.{token['grant_id']}"))[0].seq


async def test_propagation_names_who_applied_it_and_who_has_not(service: Service, crowd: Crowd) -> None:
    first, second = await crowd.join(2)
    done = revoked(service)
    seq = done["ledger_seq"]
    until(lambda: "announced_at" in propagation(service, seq), seconds=PATIENCE)
    await crowd.apply(seq, first)
    found = until(lambda: found if (found := propagation(service, seq))["applied"] else None, seconds=PATIENCE)
    assert (found["ledger_seq"], found["revoked_at"], found["complete"]) == (seq, done["revoked_at"], False)
    assert (found["applied"], found["pending"]) == (1, 1)
    states = {one["id"]: one for one in found["followers"]}
    assert states.keys() == {first, second}
    applied, pending = states[first], states[second]
    assert (applied["state"], applied["name"], applied["transport"]) == ("applied", "gate 0", "http")
    assert applied["acknowledged_seq"] == seq
    assert found["last_applied_at"] == applied["applied_at"] == applied["last_seen_at"]
    assert datetime.fromisoformat(applied["applied_at"]) >= datetime.fromisoformat(found["announced_at"])
    assert applied["after_ms"] > 0
    assert (pending["state"], "applied_at" in pending, "after_ms" in pending) == ("pending", False, False)
    await crowd.apply(seq + 5, second)  # cumulative: behind it is as good
    found = until_complete(service, seq)
    assert (found["applied"], found["pending"]) == (2, 0)


async def test_follower_that_came_later_is_not_concerned(service: Service, crowd: Crowd) -> None:
    seq = revoked(service)["ledger_seq"]
    await crowd.join()
    found = until_complete(service, seq)
    assert (found["followers"], found["complete"]) == ([], True)


async def test_follower_that_left_is_not_waited_for(service: Service, crowd: Crowd) -> None:
    await crowd.join()
    seq = revoked(service)["ledger_seq"]
    assert propagation(service, seq)["pending"] == 1
    await crowd.leave()
    assert until_complete(service, seq)["followers"] == []


async def test_webhook_is_concerned_by_what_it_is_about_since_it_was_registered(service: Service, crowd: Crowd) -> None:
    app, other = service.app(), service.app()
    mine = await crowd.hook(client_id=app.client_id)
    everything = await crowd.hook()
    asked = await crowd.hook(disabled_reason="asked")
    await crowd.hook(client_id=other.client_id)
    await crowd.hook(disabled_reason="gone")
    failing = await crowd.hook(disabled_reason="failing")
    body = {"client_id": app.client_id, "reason": "admin", "wait_seconds": 0}
    seq = service.done("POST", "/v1/revocations", json=body)["ledger_seq"]
    await crowd.change(everything)  # it was registered before all the same
    await crowd.change(asked)
    found = propagation(service, seq)
    told = {one["id"]: one["transport"] for one in found["followers"]}
    assert told == dict.fromkeys((mine, everything, asked, failing), "webhook")
    await crowd.apply(seq, *told)
    assert until_complete(service, seq)["applied"] == 4


async def test_follower_is_told_of_its_own_propagation_only(service: Service, crowd: Crowd) -> None:
    await crowd.join()
    user = service.user(kind="service", scope="ledger:subscribe")
    token = service.issue(user["user_id"], "ledger:subscribe", kind="sat")["token"]
    told = {"name": "own", "transport": "http", "owner": user["user_id"]}
    own = service.done("POST", "/v1/subscribers", json=told)["subscriber_id"]
    try:
        seq = revoked(service)["ledger_seq"]
        found = service.done("GET", f"/v1/revocations/{seq}/propagation", token=token)
        assert [one["id"] for one in found["followers"]] == [own]
        assert len(propagation(service, seq)["followers"]) == 2
    finally:
        service.done("DELETE", f"/v1/subscribers/{own}")


@pytest.mark.parametrize("which", ["0", "1", "999999999", "-1", "x", "%C2%B2", "9" * 40, "1.0"])
def test_propagation_of_what_is_no_revocation_is_not_found(service: Service, which: str) -> None:
    body = problem(service.call("GET", f"/v1/revocations/{which}/propagation"), 404)
    assert body["fix"]


def test_propagation_is_for_whoever_revokes_follows_or_audits(service: Service) -> None:
    seq = revoked(service)["ledger_seq"]
    for scope in ("ledger:revoke", "ledger:audit", "ledger:subscribe"):
        path = f"/v1/revocations/{seq}/propagation"
        assert service.call("GET", path, token=service.bearer(scope)).status_code == 200
    problem(service.call("GET", path, token=service.bearer("ledger:issue")), 403, "insufficient_scope")


async def test_revoke_that_waits_answers_when_all_fifty_have_applied_it(service: Service, crowd: Crowd) -> None:
    gates = await crowd.join(50)
    token = service.pat()
    loop = asyncio.get_running_loop()
    body = {"reason": "compromised", "wait_seconds": 30}
    path = f"/v1/tokens/{token['token_id']}/revoke"
    waiting = loop.run_in_executor(None, lambda: service.done("POST", path, json=body, timeout=PATIENCE))
    seq = await _revoked_at(service, crowd, token)
    await crowd.apply(seq, *gates)
    done = await waiting
    found = done["propagation"]
    assert (done["ledger_seq"], found["ledger_seq"], found["complete"], found["applied"]) == (seq, seq, True, 50)
    assert [one["id"] for one in found["followers"]] == gates


async def test_revoke_that_waited_in_vain_says_who_is_missing_and_holds(service: Service, crowd: Crowd) -> None:
    (gate,) = await crowd.join()
    token = service.pat()
    path = f"/v1/tokens/{token['token_id']}/revoke"
    done = service.done("POST", path, json={"reason": "admin", "wait_seconds": 0.3})
    found = done["propagation"]
    assert (found["complete"], found["pending"], found["followers"][0]["id"]) == (False, 1, gate)
    assert service.code(token["token"]) == "revoked"
    again = service.done("POST", path, json={"reason": "admin", "wait_seconds": 0})
    assert (again["ledger_seq"], again["propagation"]["pending"]) == (done["ledger_seq"], 1)


def test_revoke_that_does_not_wait_says_nothing_of_followers(service: Service) -> None:
    assert "propagation" not in revoked(service)


async def test_broad_revocation_waits_too(service: Service, crowd: Crowd) -> None:
    await crowd.join()
    user = service.pat()["subject"]
    body = {"subject": user, "reason": "admin", "wait_seconds": 0.1}
    done = service.done("POST", "/v1/revocations", json=body)
    assert (done["propagation"]["ledger_seq"], done["propagation"]["pending"]) == (done["ledger_seq"], 1)
    refused = problem(service.call("POST", "/v1/revocations", json={**body, "dry_run": True}), 400, "invalid_request")
    assert "wait_seconds" in refused["fix"]


@pytest.mark.parametrize("wait", [-1, 31, "2", None, 1e300])
def test_waiting_for_longer_than_may_be_is_refused_and_revokes_nothing(service: Service, wait: Any) -> None:
    token = service.pat()
    path = f"/v1/tokens/{token['token_id']}/revoke"
    problem(service.call("POST", path, json={"reason": "admin", "wait_seconds": wait}), 400, "invalid_request")
    assert service.code(token["token"]) == "valid"


async def test_command_that_waits_prints_who_applied_it_and_ends_with_0(service: Service, crowd: Crowd) -> None:
    (gate,) = await crowd.join()
    token = service.pat()
    loop = asyncio.get_running_loop()
    running = loop.run_in_executor(None, cli, service, "token", "revoke", token["token_id"], "--wait", "30s")
    seq = await _revoked_at(service, crowd, token)
    await crowd.apply(seq, gate)
    ended = await running
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "All 1 have applied it." in ended.stdout
    (row,) = [line for line in ended.stdout.splitlines() if line.startswith(gate)]
    assert "applied" in row
    assert " ms" in row
    shown = cli(service, "revocations", "propagation", str(seq), "-o", "json")
    assert (shown.returncode, json.loads(shown.stdout)["applied"]) == (0, 1)


async def test_command_that_waited_in_vain_ends_with_1_and_says_that_it_is_revoked(
    service: Service, crowd: Crowd
) -> None:
    (gate,) = await crowd.join()
    token = service.pat()
    ended = cli(service, "token", "revoke", "--grant-id", token["grant_id"], "--wait", "0s")
    assert ended.returncode == 1
    assert "0 of 1 have applied it; 1 has not." in ended.stdout or "It is not announced yet." in ended.stdout
    assert gate in ended.stdout
    assert ended.stderr == "It is revoked all the same.\n"
    assert service.code(token["token"]) == "revoked"


def test_command_that_waits_for_a_dry_run_is_wrong_use(service: Service) -> None:
    token = service.pat()
    ended = cli(service, "token", "revoke", token["token_id"], "--dry-run", "--wait", "2s")
    assert ended.returncode == 2
    assert service.code(token["token"]) == "valid"


async def test_receipts_that_nobody_keeps_hide_no_revocation(service: Service, crowd: Crowd) -> None:
    """The process stands still: the token is revoked, and the answer says that more is not known."""
    (gate,) = await crowd.join()
    token = service.pat()
    with service.projector("receipts").stopped():
        path = f"/v1/tokens/{token['token_id']}/revoke"
        done = service.done("POST", path, json={"reason": "admin", "wait_seconds": 0}, timeout=PATIENCE)
        found = done["propagation"]
        assert (found["complete"], found["applied"], found["followers"][0]["id"]) == (False, 0, gate)
        assert "project receipts" in found["unknown"]
        assert service.code(token["token"]) == "revoked"
        assert "token_ledger_silent_followers " not in service.http.get("/metrics").text
    await crowd.apply(done["ledger_seq"], gate)
    assert until_complete(service, done["ledger_seq"])["applied"] == 1


@pytest.mark.slow
async def test_receipts_outlive_the_process_that_keeps_them(service: Service, crowd: Crowd) -> None:
    gates = await crowd.join(3)
    seq = revoked(service)["ledger_seq"]
    await crowd.apply(seq, *gates[:2])
    before = until(lambda: found if (found := propagation(service, seq))["applied"] == 2 else None, seconds=PATIENCE)
    service.projector("receipts").kill(signal.SIGKILL)
    await crowd.apply(seq, gates[2])
    after = until(lambda: _complete_or_none(service, seq), seconds=PATIENCE)
    assert after["applied"] == 3
    kept = {one["id"]: one["applied_at"] for one in after["followers"]}
    assert all(kept[one["id"]] == one["applied_at"] for one in before["followers"] if one["state"] == "applied")


def _complete_or_none(service: Service, seq: int) -> dict[str, Any] | None:
    found = propagation(service, seq)
    return found if found["complete"] else None
