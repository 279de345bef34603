"""The middleware, in Litestar and in a plain ASGI application. RFC 6750 §3."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from litestar import Litestar, Request, get
from litestar.middleware import DefineMiddleware

from service.client import SseFeed, TokenValidator, TokenValidatorMiddleware
from service.client.asgi import VERDICT
from tests.running import Service

AUDIENCE = "https://api.example"


@get("/orders")
async def orders(request: Request[Any, Any, Any]) -> dict[str, str]:
    return {"subject": request.scope[VERDICT].subject}  # type: ignore[typeddict-item]


@get("/health")
async def health() -> str:
    return "ok"


async def plain(scope: Any, receive: Any, send: Any) -> None:
    """As small as an application can be."""
    assert scope["type"] == "http"
    verdict = scope.get(VERDICT)
    body = json.dumps({"subject": verdict.subject}).encode() if verdict else b"ok"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


class Ground:
    def __init__(self, service: Service) -> None:
        self.service = service
        self.scope = service.scope()
        self.app = service.app(access_token_format="jwt", scope=self.scope, audience=[AUDIENCE])
        other = service.scope()
        self.narrow_app = service.app(access_token_format="jwt", scope=other, audience=[AUDIENCE])

    def token(self) -> str:
        token: str = self.service.grant(self.app)["access_token"]
        return token


@pytest.fixture(scope="module")
def ground(service: Service) -> Ground:
    return Ground(service)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def validator(ground: Ground) -> AsyncIterator[TokenValidator]:
    bearer = ground.service.bearer("ledger:validate ledger:subscribe")
    made = TokenValidator(ground.service.url, AUDIENCE, token=bearer, feed=SseFeed(), start_seconds_max=60)
    async with made:
        yield made


@pytest_asyncio.fixture(params=["litestar", "plain"])
async def client(
    request: pytest.FixtureRequest, ground: Ground, validator: TokenValidator
) -> AsyncIterator[httpx.AsyncClient]:
    options: dict[str, Any] = {"validator": validator, "needs": ground.scope, "open_paths": {"/health"}}
    app: Any
    if request.param == "litestar":
        app = Litestar([orders, health], middleware=[DefineMiddleware(TokenValidatorMiddleware, **options)])
    else:
        app = TokenValidatorMiddleware(plain, **options)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api.example") as made:
        yield made


async def test_good_token_is_let_in_with_its_verdict(ground: Ground, client: httpx.AsyncClient) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        answer = await client.get("/orders", headers={"Authorization": f"{scheme} {ground.token()}"})
        assert (answer.status_code, answer.json()) == (200, {"subject": ground.app.client_id})


async def test_request_with_an_unusual_agent_and_path_is_let_in(ground: Ground, client: httpx.AsyncClient) -> None:
    """Its reference token is validated by the ledger, which is told of both."""
    for agent in (b"a" * 5000, b"\xff\xfe", b"tl_pat_x"):
        pat = ground.service.pat(ground.scope)["token"]
        headers = [(b"authorization", b"Bearer " + pat.encode()), (b"user-agent", agent)]
        answer = await client.get("/orders", headers=headers, params={"q": "x" * 5000})
        assert answer.status_code == 200, answer.text


async def test_path_that_is_open_needs_no_token(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).status_code == 200


REFUSED: dict[str, tuple[list[str], int, str]] = {
    "no token": ([], 401, 'Bearer realm="token-ledger"'),
    "another scheme": (["Basic abc"], 401, 'Bearer realm="token-ledger"'),
    "no token behind the scheme": (["Bearer "], 400, 'error="invalid_request"'),
    "two words": (["Bearer a b"], 400, 'error="invalid_request"'),
    "two headers": (["Bearer a", "Bearer b"], 400, 'error="invalid_request"'),
    "garbage": (["Bearer garbage"], 401, 'error="invalid_token"'),
    "not ASCII": (["Bearer \xe9\xe9"], 401, 'error="invalid_token"'),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_request_without_a_good_token_is_refused(client: httpx.AsyncClient, name: str) -> None:
    values, status, challenge = REFUSED[name]
    headers = [(b"authorization", value.encode("latin-1")) for value in values]
    answer = await client.get("/orders", headers=headers)
    assert answer.status_code == status
    given = answer.headers["www-authenticate"]
    assert challenge in given
    # RFC 6750 §3.1: no error code where no token was sent.
    assert ("error" in given) == ("error" in challenge)
    assert answer.headers["cache-control"] == "no-store"
    assert set(answer.json()) == {"error", "error_description"}


async def test_token_in_the_query_is_not_taken(ground: Ground, client: httpx.AsyncClient) -> None:
    answer = await client.get("/orders", params={"access_token": ground.token()})
    assert answer.status_code == 401


async def test_token_without_the_scope_is_told_which_is_needed(ground: Ground, client: httpx.AsyncClient) -> None:
    token = ground.service.grant(ground.narrow_app)["access_token"]
    answer = await client.get("/orders", headers={"Authorization": f"Bearer {token}"})
    assert (answer.status_code, answer.json()["error"]) == (403, "insufficient_scope")
    assert 'error="insufficient_scope", ' in answer.headers["www-authenticate"]
    assert f'scope="{ground.scope}"' in answer.headers["www-authenticate"]


async def test_revoked_token_is_refused_without_saying_why(ground: Ground, client: httpx.AsyncClient) -> None:
    headers = {"Authorization": f"Bearer {ground.token()}"}
    assert (await client.get("/orders", headers=headers)).status_code == 200
    token = headers["Authorization"].removeprefix("Bearer ")
    ground.service.done("POST", "/v1/revocations", json={"token": token, "reason": "admin"})
    deadline = time.monotonic() + 60
    while (answer := await client.get("/orders", headers=headers)).status_code == 200:
        assert time.monotonic() < deadline
        await asyncio.sleep(0)  # the feed is followed in the same loop
    assert (answer.status_code, answer.json()["error"]) == (401, "invalid_token")
    assert "revoked" not in answer.text + answer.headers["www-authenticate"]


async def test_validator_that_is_stale_answers_503(ground: Ground, validator: TokenValidator) -> None:
    closed = TokenValidator("http://127.0.0.1:9", AUDIENCE, token="t", feed=SseFeed(), start_seconds_max=0)
    async with closed:
        app = TokenValidatorMiddleware(plain, closed)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api.example") as client:
            answer = await client.get("/", headers={"Authorization": f"Bearer {ground.token()}"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "www-authenticate" not in answer.headers
    assert validator.status().fresh


async def test_needs_may_differ_by_request(ground: Ground, validator: TokenValidator) -> None:
    app = TokenValidatorMiddleware(plain, validator, needs=lambda scope: "admin" if scope["path"] == "/admin" else "")
    headers = {"Authorization": f"Bearer {ground.token()}"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api.example") as client:
        assert (await client.get("/", headers=headers)).status_code == 200
        assert (await client.get("/admin", headers=headers)).status_code == 403


async def test_websocket_without_a_token_is_closed_and_lifespan_passes(validator: TokenValidator) -> None:
    seen: list[str] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    app = TokenValidatorMiddleware(inner, validator)
    await app({"type": "websocket", "path": "/", "headers": []}, receive, send)
    assert [(one["type"], one["code"]) for one in sent] == [("websocket.close", 1008)]
    await app({"type": "lifespan"}, receive, send)
    assert seen == ["lifespan"]
