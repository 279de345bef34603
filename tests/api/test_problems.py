"""Whatever goes wrong is answered in one form, and tells nothing of the request."""

from __future__ import annotations

import json
from typing import Any

import pytest
import structlog.testing

from service.api import litestar_app, manage
from service.errors import Unavailable
from service.runtime import NotYetApplied, Runtime
from tests.rsgi import answer_to, request

SECRET = "tl_sat_something_secret"


async def ask(raised: Exception, method: str = "GET", path: str = "/v1/clients") -> tuple[int, dict[str, str], Any]:
    """What the API answers when its runtime raises."""

    def get_runtime() -> Runtime:
        raise raised

    incoming = request(("authorization", f"Bearer {SECRET}"), ("x-request-id", "my-request"), method=method, path=path)
    await manage(litestar_app(get_runtime), incoming)
    answer = answer_to(incoming)
    return answer.status, answer.headers, json.loads(answer.body)


async def test_unexpected_error_is_logged_by_its_request_and_tells_nothing() -> None:
    with structlog.testing.capture_logs() as logs:
        status, headers, body = await ask(RuntimeError(f"cannot read {SECRET}"))
    assert (status, body["code"], body["request_id"]) == (500, "internal_error", "my-request")
    assert headers["content-type"] == "application/problem+json"
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-request-id"] == "my-request"
    (line,) = logs
    assert (line["event"], line["request_id"], line["error"]) == ("request_failed", "my-request", "RuntimeError")
    assert SECRET not in f"{body}{headers}{logs}"
    assert any("test_problems.py" in place for place in line["where"])


async def test_what_is_recorded_although_the_answer_is_an_error_is_named() -> None:
    status, headers, body = await ask(NotYetApplied(77))
    assert (status, body["ledger_seq"], headers["retry-after"]) == (503, 77, "1")


async def test_start_that_is_not_over_is_unavailable() -> None:
    status, headers, body = await ask(Unavailable("the service is starting"))
    assert (status, body["detail"], body["fix"] != "") == (503, "the service is starting", True)
    assert int(headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("PUT", "/v1/clients", 405), ("GET", "/v1/keys/rotate", 405)],
)
async def test_what_is_not_there_is_a_problem_too(method: str, path: str, status: int) -> None:
    answered, headers, body = await ask(Unavailable(""), method, path)
    assert (answered, body["status"], headers["content-type"]) == (status, status, "application/problem+json")
    assert headers["x-request-id"] == "my-request"
    assert (status == 405) == ("allow" in headers)
