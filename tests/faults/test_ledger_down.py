"""The ledger does not answer: nothing is claimed that is not on disk, and all recovers by itself.

A nats-server that is killed is back in a moment; one that is stopped (SIGSTOP) is there and silent for as long as
the test wants, which is also the harder case: the connection stays open.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests import running
from tests.running import App, Service, until

RECOVERY_SECONDS_MAX = 20.0
ANSWER_SECONDS_MAX = 12.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def durable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = running.start(tmp_path_factory.mktemp("durable"))
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="module")
def buffered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Its view may be 4 s old, so that a test can wait for the end of that."""
    directory = tmp_path_factory.mktemp("buffered")
    service = running.start(directory, use_recording="buffered", view_staleness_seconds_max=4)
    try:
        yield service
    finally:
        service.stop()


def is_unavailable(answer: httpx.Response) -> None:
    assert answer.status_code == 503, f"{answer.status_code} {answer.text}"
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["cache-control"] == "no-store"
    assert answer.elapsed.total_seconds() < ANSWER_SECONDS_MAX


def recovered(service: Service) -> None:
    until(service.ready, seconds=RECOVERY_SECONDS_MAX, what="readiness comes back")


def test_durable_service_claims_nothing_while_the_ledger_is_silent(durable: Service) -> None:
    """Source: RFC 7009 §2.2.1 for the 503 of revocation."""
    scope = durable.scope()
    user = durable.user(scope=scope)
    app = durable.app(grant_types=["client_credentials", "refresh_token"], scope=scope)
    made, tokens = durable.issue(user["user_id"], scope), durable.grant(app)
    with durable.nats_server().stopped():
        wanted = {"kind": "pat", "subject": user["user_id"], "name": "x", "scope": scope}
        is_unavailable(durable.call("POST", "/v1/tokens", json=wanted))
        is_unavailable(durable.form("/oauth2/token", app.basic, grant_type="client_credentials"))
        is_unavailable(durable.refresh(app, tokens["refresh_token"]))
        is_unavailable(durable.revoke(app, tokens["access_token"]))
        revoked = {"reason": "compromised"}
        is_unavailable(durable.call("POST", f"/v1/tokens/{made['token_id']}/revoke", json=revoked))
        is_unavailable(durable.call("POST", "/v1/tokens/validate", json={"token": made["token"]}))
        is_unavailable(durable.form("/oauth2/introspect", app.basic, token=tokens["access_token"]))
        assert durable.http.get("/health/live").status_code == 200
        ready = until(lambda: readiness(durable, 503), what="readiness tells of it")
        assert ready["checks"]
    recovered(durable)
    # What was refused may have been written all the same; asking again is safe and settles it.
    path = f"/v1/tokens/{made['token_id']}/revoke"
    done = until(lambda: accepted(durable.call("POST", path, json=revoked)), seconds=RECOVERY_SECONDS_MAX)
    assert done["ledger_seq"] > made["ledger_seq"]
    assert durable.code(made["token"]) == "revoked"
    assert durable.revoke(app, tokens["access_token"]).status_code == 200
    assert durable.code(tokens["access_token"]) == "revoked"
    refreshed = durable.refresh(app, tokens["refresh_token"])
    assert refreshed.status_code == 200, "a refresh that was answered 503 signs nobody out"


def accepted(answer: httpx.Response) -> dict[str, Any] | None:
    """The answer, or None while there cannot be one."""
    assert answer.is_success or answer.status_code == 503
    return answer.json() if answer.is_success else None


def readiness(service: Service, status: int) -> dict[str, object] | None:
    answer = service.http.get("/health/ready")
    return answer.json() if answer.status_code == status else None


def test_revocations_refused_while_down_are_never_claimed(durable: Service) -> None:
    """Every revocation that was answered 200 holds; one answered 503 is told nowhere as done."""
    made = [durable.pat() for _ in range(3)]
    with durable.nats_server().stopped():
        for one in made:
            body = {"token_id": one["token_id"], "reason": "admin"}
            is_unavailable(durable.call("POST", "/v1/revocations", json=body))
    recovered(durable)
    for one in made:
        body = {"token_id": one["token_id"], "reason": "admin"}
        until(lambda body=body: accepted(durable.call("POST", "/v1/revocations", json=body)), seconds=10)
        assert durable.code(one["token"]) == "revoked"
        types = [event["type"].partition("/")[0] for event in durable.history(one["token_id"])]
        assert types == ["token.issued", "token.revoked"]


def test_buffered_service_validates_from_the_view_until_it_is_too_old(buffered: Service) -> None:
    made = buffered.pat()
    gone = buffered.pat()
    buffered.done("POST", f"/v1/tokens/{gone['token_id']}/revoke", json={"reason": "admin"})
    with buffered.nats_server().stopped():
        assert buffered.code(made["token"]) == "valid"
        assert buffered.code(gone["token"]) == "revoked"
        answer = buffered.http.get("/health/ready")
        assert answer.status_code == 200
        until(lambda: (readiness(buffered, 200) or {}).get("status") == "degraded" or too_old(buffered, made["token"]))
        revoked = {"reason": "admin"}
        is_unavailable(buffered.call("POST", f"/v1/tokens/{made['token_id']}/revoke", json=revoked))
        until(lambda: too_old(buffered, made["token"]), seconds=10, what="the view is too old to answer from")
        until(lambda: readiness(buffered, 503), what="readiness tells of it")
    recovered(buffered)
    until(lambda: not too_old(buffered, made["token"]), seconds=RECOVERY_SECONDS_MAX)

    def uses() -> int:
        told = accepted(buffered.call("GET", f"/v1/tokens/{made['token_id']}/history", params={"uses": "true"}))
        return sum(one["ledger_seq"] is None for one in told["items"]) if told else 0

    until(lambda: uses() >= 2, seconds=RECOVERY_SECONDS_MAX, what="uses that waited in memory are recorded")


def too_old(service: Service, token: str) -> bool:
    answer = service.call("POST", "/v1/tokens/validate", json={"token": token})
    assert answer.status_code in {200, 503}
    return answer.status_code == 503


def test_view_that_cannot_be_confirmed_says_nothing(durable: Service) -> None:
    """The projector stands still: within `view_staleness_seconds_max` (5) every validation ends in 503."""
    made = durable.pat()
    app: App = durable.app()
    token = durable.grant(app)["access_token"]
    with durable.projector("current").stopped():
        until(lambda: too_old(durable, made["token"]), seconds=5 + 3, what="validation refuses")
        for _ in range(20):
            is_unavailable(durable.call("POST", "/v1/tokens/validate", json={"token": made["token"]}))
        is_unavailable(durable.form("/oauth2/introspect", app.basic, token=token))
        body = {"requests": [{"token": made["token"]}]}
        is_unavailable(durable.call("POST", "/v1/tokens/validate-batch", json=body))
        assert durable.call("GET", "/v1/forward-auth", token=made["token"]).status_code == 503
        assert durable.call("GET", "/v1/clients").status_code == 503
        assert readiness(durable, 503)
    recovered(durable)
    assert durable.code(made["token"]) == "valid"


def test_revocation_that_the_view_has_not_seen_is_not_answered_as_done(durable: Service) -> None:
    """The event is in the ledger and the view stands still: 503 with the sequence, and a retry is safe."""
    made = durable.pat()
    path = f"/v1/tokens/{made['token_id']}/revoke"
    with durable.projector("current").stopped():
        answer = durable.call("POST", path, json={"reason": "compromised"})
        is_unavailable(answer)
    recovered(durable)
    done = until(lambda: accepted(durable.call("POST", path, json={"reason": "compromised"})), seconds=10)
    if "ledger_seq" in answer.json():
        assert done["ledger_seq"] == answer.json()["ledger_seq"]
    assert durable.code(made["token"]) == "revoked"
    types = [event["type"].partition("/")[0] for event in durable.history(made["token_id"])]
    assert types == ["token.issued", "token.revoked"]
