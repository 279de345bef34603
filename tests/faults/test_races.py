"""Many at once: one refresh wins, and after a revocation is answered nobody says valid."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.running import App, Service, oauth_error

RACERS = 100
QUESTIONS = 24


@pytest.fixture(scope="module")
def app(service: Service) -> App:
    return service.app(grant_types=["client_credentials", "refresh_token"], scope=service.scope())


def at_once(count: int, ask: Callable[[httpx.Client], httpx.Response], service: Service) -> list[httpx.Response]:
    """`count` connections are open before the first request is sent."""
    barrier = threading.Barrier(count)

    def one(_: int) -> httpx.Response:
        with service.caller(timeout_seconds=30) as http:
            http.get("/health/live")
            barrier.wait(30)
            return ask(http)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def refresh(app: App, token: str) -> Callable[[httpx.Client], httpx.Response]:
    body = {"grant_type": "refresh_token", "refresh_token": token}
    return lambda http: http.post("/oauth2/token", data=body, auth=app.basic)


def chain(service: Service, access_token: str) -> list[dict[str, Any]]:
    """The refreshes in the ledger, in order."""
    token_id = service.validate(access_token)["token_id"]
    events = service.history(token_id)
    assert [event["ledger_seq"] for event in events] == sorted({event["ledger_seq"] for event in events})
    return [event for event in events if event["type"].startswith("token.refreshed")]


def test_hundred_refreshes_at_once_make_one_successor(service: Service, app: App) -> None:
    first = service.grant(app)
    answers = at_once(RACERS, refresh(app, first["refresh_token"]), service)
    assert {answer.status_code for answer in answers} == {200}
    pairs = {(answer.json()["access_token"], answer.json()["refresh_token"]) for answer in answers}
    assert len(pairs) == 1
    access_token, refresh_token = pairs.pop()
    assert len(chain(service, access_token)) == 1
    assert service.code(access_token) == "valid"
    second = service.refresh(app, refresh_token)
    assert second.status_code == 200
    refreshes = chain(service, second.json()["access_token"])
    assert len(refreshes) == 2
    assert len({event["spent_token_id"] for event in refreshes}) == 2
    live = list(service.items("/v1/tokens", grant_id=service.validate(access_token)["grant_id"]))
    assert len([one for one in live if one["kind"] == "refresh" and one["status"] == "active"]) == 1
    oauth_error(service.refresh(app, first["refresh_token"]), 400, "invalid_grant")
    for token in (access_token, second.json()["access_token"], first["access_token"]):
        assert service.code(token) == "revoked"
    oauth_error(service.refresh(app, second.json()["refresh_token"]), 400, "invalid_grant")


def test_refresh_and_revocation_at_once_leave_no_live_token(service: Service, app: App) -> None:
    """Whatever order they come in: when the revocation is answered, nothing of the grant is alive."""
    for _ in range(5):
        first = service.grant(app)
        with ThreadPoolExecutor(8) as pool:
            refreshes = [pool.submit(service.refresh, app, first["refresh_token"]) for _ in range(6)]
            revocation = pool.submit(service.revoke, app, first["refresh_token"])
        assert revocation.result().status_code == 200
        tokens = [first["access_token"]]
        for answer in (one.result() for one in refreshes):
            assert answer.status_code in {200, 400}
            if answer.status_code == 200:
                tokens.append(answer.json()["access_token"])
                oauth_error(service.refresh(app, answer.json()["refresh_token"]), 400, "invalid_grant")
        assert {service.code(token) for token in tokens} == {"revoked"}


def by_token(made: dict[str, Any]) -> dict[str, Any]:
    return {"token_id": made["token_id"]}


def by_grant(made: dict[str, Any]) -> dict[str, Any]:
    return {"grant_id": made["grant_id"]}


def by_client(made: dict[str, Any]) -> dict[str, Any]:
    return {"client_id": made["client_id"]}


def by_subject(made: dict[str, Any]) -> dict[str, Any]:
    return {"subject": made["subject"]}


@pytest.mark.parametrize("by", [by_token, by_grant, by_client, by_subject])
def test_nobody_says_valid_after_a_revocation_was_answered(service: Service, by: Any) -> None:
    """Fresh connections reach every worker; each is asked while others still hammer."""
    if by is by_subject:
        made = service.pat()
    else:
        token = service.grant(service.app())["access_token"]
        made = {"token": token, **service.validate(token)}
    headers = {"Authorization": f"Bearer {service.admin_token}"}
    revoked = threading.Event()
    late: list[str] = []
    before: set[str] = set()

    def hammer(_: int) -> None:
        for _ in range(QUESTIONS):
            with service.caller() as http:
                known = revoked.is_set()
                answer = http.post("/v1/tokens/validate", json={"token": made["token"]}, headers=headers)
                code = answer.json()["code"]
                (late.append if known else before.add)(code)

    with ThreadPoolExecutor(6) as pool:
        asked = pool.map(hammer, range(6))
        service.done("POST", "/v1/revocations", json={**by(made), "reason": "compromised"})
        revoked.set()
        list(asked)
    hammer(0)
    assert before <= {"valid", "revoked"}
    assert late
    assert set(late) == {"revoked"}
