"""`POST /v1/uses`: what resource servers decided themselves."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.api.uses import BODY_BYTES_MAX, USES_MAX
from service.tokens import new_id
from tests.running import Service, problem, until


def ago(**parts: float) -> str:
    return (datetime.now(UTC) - timedelta(**parts)).isoformat()


def use(token_id: str, **changes: Any) -> dict[str, Any]:
    return {"token_id": token_id, "occurred_at": ago(seconds=1), "outcome": "valid"} | changes


def report(*uses: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"block_id": secrets.token_hex(16), "uses": list(uses)} | changes


def ask(service: Service, sql: str) -> list[list[Any]]:
    answer = service.done("POST", "/v1/audit/query", json={"sql": sql})
    return [list(row.values()) if isinstance(row, dict) else row for row in answer["rows"]]


def recorded(service: Service, token_id: str, columns: str) -> list[list[Any]]:
    """The token's uses, once a use that was reported after them is there as well."""
    marker = service.pat()["token_id"]
    service.done("POST", "/v1/uses", json=report(use(marker)))
    whose = f"token_id IN ('{marker}', '{token_id}')"
    sql = f"SELECT token_id, {columns} FROM uses_v1 WHERE {whose} ORDER BY block_seq, use_index"

    def found() -> list[list[Any]]:
        rows = ask(service, sql)
        return [row[1:] for row in rows if row[0] == token_id] if any(row[0] == marker for row in rows) else []

    return until(found, seconds=60, what="the uses are in the analytics store")


def test_reported_uses_are_one_block_with_the_caller_named(service: Service) -> None:
    token = service.pat()["token_id"]
    context = {"ip": "192.0.2.1", "user_agent": "a tl_pat_secret", "method": "GET", "path": "/x?secret=1"}
    full = use(token, scope="a b", audience=["https://a.example", "b"], context=context)
    lost = secrets.randbelow(10**6)
    caller = service.bearer("ledger:validate")
    sent = report(use(token, outcome="revoked"), full, lost=lost)
    answer = service.done("POST", "/v1/uses", json=sent, token=caller)
    assert (answer["recorded"], answer["unknown"]) == (2, [])
    columns = "outcome, endpoint, reported, scope, audience, ip, user_agent, path, caller, block_seq"
    first, second = recorded(service, token, columns)
    assert first[:8] == ["revoked", "reported", True, None, None, None, None, None]
    expected = ["valid", "reported", True, "a b", "https://a.example b", "192.0.2.1", "a tl_pat_…", "/x"]
    assert second[:8] == expected
    assert first[8:] == second[8:]
    assert first[8] == service.validate(caller)["token_id"]
    assert ask(service, f"SELECT lost FROM gaps_v1 WHERE block_seq = {first[9]}") == [[lost]]


def test_block_that_is_sent_again_is_recorded_once(service: Service) -> None:
    token = service.pat()["token_id"]
    sent = report(use(token))
    caller, other = (service.bearer("ledger:validate") for _ in range(2))
    # Another caller's block is another block, whatever it is called.
    for bearer in (caller, caller, caller, other):
        assert service.done("POST", "/v1/uses", json=sent, token=bearer)["recorded"] == 1
    another = sent | {"block_id": secrets.token_hex(16)}
    with ThreadPoolExecutor(5) as threads:
        sending = [threads.submit(service.call, "POST", "/v1/uses", json=another, token=caller) for _ in range(5)]
    assert [one.result().json()["recorded"] for one in sending] == [1] * 5
    assert len(recorded(service, token, "block_seq")) == 3


def test_token_that_is_not_known_is_named_and_the_others_are_recorded(service: Service) -> None:
    app = service.app(grant_types=["client_credentials", "refresh_token"])
    refresh = service.introspect(app, service.grant(app)["refresh_token"])["jti"]
    unknown = [new_id("tok"), refresh, "x" * 36]
    token = service.pat()["token_id"]
    answer = service.done("POST", "/v1/uses", json=report(use(token), *(use(one) for one in unknown)))
    assert (answer["recorded"], answer["unknown"]) == (1, sorted(unknown))


BAD: dict[str, Any] = {
    "in the future": {"occurred_at": (datetime.now(UTC) + timedelta(days=1)).isoformat()},
    "too old": {"occurred_at": ago(hours=7)},
    "before time": {"occurred_at": "0001-01-01T00:00:00Z"},
    "scope that is none": {"scope": 'a"b'},
    "long scope": {"scope": "a" * 5000},
    "address that is none": {"context": {"ip": "192.0.2.1:80"}},
    "long address": {"context": {"ip": "1" * 10_000}},
}


@pytest.mark.parametrize("name", BAD)
def test_use_that_cannot_be_recorded_is_named_and_the_others_are_recorded(service: Service, name: str) -> None:
    """Who brings a token chooses what stands in its uses: the others must not be lost for it."""
    token, other = service.pat()["token_id"], service.pat()["token_id"]
    sent = report(use(new_id("tok")), use(other), use(token) | BAD[name], use(other))
    answer = service.done("POST", "/v1/uses", json=sent)
    assert answer["recorded"] == 2
    [refused] = answer["refused"]
    assert refused["index"] == 2
    assert refused["why"]


def test_use_that_is_long_is_cut_and_recorded(service: Service) -> None:
    token = service.pat()["token_id"]
    context = {"user_agent": "é" * 5000, "method": "X" * 100, "path": "/" + "😀" * 5000}
    sent = report(use(token, scope=" a  b ", audience=["x" * 5000] * 2, context=context))
    assert service.done("POST", "/v1/uses", json=sent)["recorded"] == 1
    [found] = recorded(service, token, "scope, length(audience), length(user_agent), method, length(path)")
    assert found == ["a b", 1024, 256, "X" * 32, 256]


WRONG: dict[str, Any] = {
    "without zone": {"occurred_at": "2026-01-01T00:00:00"},
    "no time": {"occurred_at": "yesterday"},
    "other outcome": {"outcome": "unknown"},
    "scope a list": {"scope": ["a"]},
    "member that is none": {"token": "x"},
    "token id cut": {"token_id": "tok_"},
}


@pytest.mark.parametrize("name", WRONG)
def test_report_that_is_no_report_is_refused(service: Service, name: str) -> None:
    token = service.pat()["token_id"]
    sent = report(use(token), use(token) | WRONG[name])
    problem(service.call("POST", "/v1/uses", json=sent), 400, "invalid_request")


def test_finding_about_reported_uses_rests_on_what_the_caller_says(service: Service) -> None:
    """Which alone never revokes anything."""
    token = service.pat()["token_id"]
    probes = [use(token, outcome="insufficient_scope", scope=f"admin:{number}") for number in range(8)]
    service.done("POST", "/v1/uses", json=report(*probes))

    def findings() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = service.done("GET", "/v1/audit/findings", params={"token_id": token})["items"]
        return found

    found = until(findings, seconds=60, what="the probing is found")
    assert {(one["rule"], one["self_reported"]) for one in found} == {("scope_probing", True)}


def test_clock_that_is_a_little_ahead_is_taken_for_now(service: Service) -> None:
    token = service.pat()["token_id"]
    ahead = report(use(token, occurred_at=ago(seconds=-30)))
    assert service.done("POST", "/v1/uses", json=ahead)["recorded"] == 1
    [found] = until(lambda: [one for one in service.history(token, uses="true") if one["type"] == "token.used"])
    assert datetime.fromisoformat(found["occurred_at"]) <= datetime.now(UTC)


def test_report_that_is_too_large_is_refused(service: Service) -> None:
    token = service.pat()["token_id"]
    most = [use(token)] * USES_MAX
    assert service.done("POST", "/v1/uses", json=report(*most))["recorded"] == USES_MAX
    problem(service.call("POST", "/v1/uses", json=report(*most, use(token))), 400, "invalid_request")
    for block_id in ("short", "x" * 65, ""):
        problem(service.call("POST", "/v1/uses", json=report(block_id=block_id)), 400, "invalid_request")
    for lost in (-1, 10**10, "1"):
        problem(service.call("POST", "/v1/uses", json=report(lost=lost)), 400, "invalid_request")
    body = b" " * (BODY_BYTES_MAX + 1)
    headers = {"content-type": "application/json"}
    problem(service.call("POST", "/v1/uses", content=body, headers=headers), 413, "body_too_large")


def test_largest_report_fits_into_one_block(service: Service) -> None:
    token = service.pat()["token_id"]
    context = {"ip": "2001:db8:1111:2222:3333:4444:5555:6666", "user_agent": "é" * 128, "method": "GET", "path": "/x"}
    fat = use(token, scope="a" * 200, context=context)
    count = (BODY_BYTES_MAX - 100) // (len(str(fat).encode()) + 10)
    answer = service.done("POST", "/v1/uses", json=report(*[fat] * min(USES_MAX, count)))
    assert answer["recorded"] == min(USES_MAX, count)


def test_caller_needs_the_scope_to_validate(service: Service) -> None:
    sent = report(use(service.pat()["token_id"]))
    problem(
        service.call("POST", "/v1/uses", json=sent, token=service.bearer("ledger:audit")), 403, "insufficient_scope"
    )
    problem(service.call("POST", "/v1/uses", json=sent, token=None), 401, "unauthorized")


def test_block_is_refused_while_the_log_is_down_and_recorded_once_it_is_back(service: Service) -> None:
    token = service.pat()["token_id"]
    sent = report(use(token))

    def send() -> int:
        return service.call("POST", "/v1/uses", json=sent).status_code

    with service.nats_server().stopped():
        assert send() == 503
    until(lambda: send() == 200, seconds=60, what="it is recorded")
    assert len(recorded(service, token, "block_seq")) == 1
