"""Nobody confers what they lack: no call gives a `ledger:*` scope that its caller does not hold.

Every way is tried that a caller with one small right has to come by a larger one: to make it, to change what is
there, to take over what is stronger than itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
import pytest

from tests.running import CANARY_PASSWORD, CANARY_USERNAME, App, Service, unique

LEDGER_SCOPES = tuple(
    f"ledger:{name}" for name in ("admin", "clients", "users", "issue", "validate", "revoke", "audit", "subscribe")
)


@dataclass
class Strong:
    """What stands in the ledger already and holds ledger:admin. Made anew for whoever wants to break it."""

    service: Service

    @cached_property
    def app(self) -> App:
        grants = ["client_credentials", "refresh_token"]
        return self.service.app(scope="ledger:admin", grant_types=grants)

    @cached_property
    def user(self) -> dict[str, Any]:
        return self.service.user(kind="service", scope="ledger:admin")

    @cached_property
    def person(self) -> dict[str, Any]:
        return self.service.user(scope="ledger:admin", password=unique(CANARY_PASSWORD))

    @cached_property
    def token(self) -> dict[str, Any]:
        return self.service.issue(self.user["user_id"], "ledger:admin", kind="sat")


@pytest.fixture
def strong(service: Service) -> Strong:
    return Strong(service)


@dataclass(frozen=True)
class Try:
    """One way. `holds` is the caller's only scope; `send` must be refused with 4xx."""

    name: str
    holds: str
    send: Callable[[Service, Strong, str], httpx.Response]


def post(path: str | Callable[[Strong], str], **body: Any) -> Callable[[Service, Strong, str], httpx.Response]:
    return _sending("POST", path, body)


def patch(path: Callable[[Strong], str], **body: Any) -> Callable[[Service, Strong, str], httpx.Response]:
    return _sending("PATCH", path, body)


def _sending(method: str, path: Any, body: dict[str, Any]) -> Callable[[Service, Strong, str], httpx.Response]:
    def send(service: Service, strong: Strong, token: str) -> httpx.Response:
        filled = {name: value(strong) if callable(value) else value for name, value in body.items()}
        target = path(strong) if callable(path) else path
        return service.call(method, target, token=token, json=filled)

    return send


def registered_first(method: str, kind: str, change: dict[str, Any]) -> Callable[..., httpx.Response]:
    """The caller makes something weak of its own, which works, and then changes it."""

    def send(service: Service, strong: Strong, token: str) -> httpx.Response:
        if kind == "clients":
            made = service.done("POST", "/v1/clients", token=token, json={"client_name": "weak"})
            return service.call(method, f"/v1/clients/{made['client_id']}", token=token, json=change)
        wanted = {"username": unique(CANARY_USERNAME), "kind": "service", "scope": ""}
        made = service.done("POST", "/v1/users", token=token, json=wanted)
        return service.call(method, f"/v1/users/{made['user_id']}", token=token, json=change)

    return send


def user_name(_: Strong) -> str:
    return unique(CANARY_USERNAME)


CLIENT = {"client_name": "sly"}
WAYS = [
    # to make it
    Try("register a client", "ledger:clients", post("/v1/clients", **CLIENT, scope="ledger:admin")),
    Try("register a client with a neighbour", "ledger:clients", post("/v1/clients", **CLIENT, scope="ledger:users")),
    Try("register an introspector", "ledger:clients", post("/v1/clients", **CLIENT, may_introspect=True)),
    Try(
        "register a user",
        "ledger:users",
        post("/v1/users", username=user_name, kind="service", scope="ledger:admin"),
    ),
    Try(
        "register a user with a neighbour",
        "ledger:users",
        post("/v1/users", username=user_name, kind="service", scope="ledger:clients"),
    ),
    Try(
        "register a user with its own and more",
        "ledger:users",
        post("/v1/users", username=user_name, kind="service", scope="ledger:users ledger:issue"),
    ),
    # to change what is there
    Try("widen an own client", "ledger:clients", registered_first("PATCH", "clients", {"scope": "ledger:admin"})),
    Try(
        "let an own client introspect", "ledger:clients", registered_first("PATCH", "clients", {"may_introspect": True})
    ),
    Try("widen an own user", "ledger:users", registered_first("PATCH", "users", {"scope": "ledger:admin"})),
    # to issue it
    Try(
        "issue for a strong user",
        "ledger:issue",
        post("/v1/tokens", kind="sat", subject=lambda s: s.user["user_id"], name="x", scope="ledger:admin"),
    ),
    Try(
        "issue for a strong user by name",
        "ledger:issue",
        post("/v1/tokens", kind="sat", subject=lambda s: s.user["username"], name="x", scope="ledger:admin"),
    ),
    Try(
        "issue for a strong user without naming the scope",
        "ledger:issue",
        post("/v1/tokens", kind="sat", subject=lambda s: s.user["user_id"], name="x"),
    ),
    Try(
        "issue a PAT for a strong person",
        "ledger:issue",
        post("/v1/tokens", kind="pat", subject=lambda s: s.person["user_id"], name="x", scope="ledger:admin"),
    ),
    Try("rotate a strong token", "ledger:issue", post(lambda s: f"/v1/tokens/{s.token['token_id']}/rotate")),
    # to take over what is stronger
    Try(
        "rotate the secret of a strong client",
        "ledger:clients",
        post(lambda s: f"/v1/clients/{s.app.client_id}/secrets", overlap_seconds=60),
    ),
    Try(
        "turn a strong client into a public one",
        "ledger:clients",
        patch(lambda s: f"/v1/clients/{s.app.client_id}", token_endpoint_auth_method="none"),
    ),
    Try(
        "send a strong client's codes elsewhere",
        "ledger:clients",
        patch(lambda s: f"/v1/clients/{s.app.client_id}", redirect_uris=["https://evil.example/callback"]),
    ),
    Try(
        "change the password of a strong person",
        "ledger:users",
        patch(lambda s: f"/v1/users/{s.person['user_id']}", password=unique(CANARY_PASSWORD)),
    ),
    # by implication
    Try("imply it", "ledger:clients", post("/v1/scopes", name="sly:a", description="x", implies=["ledger:admin"])),
    Try("register its name", "ledger:clients", post("/v1/scopes", name="ledger:sly", description="x")),
]


@pytest.mark.parametrize("way", WAYS, ids=[way.name for way in WAYS])
def test_weak_caller_cannot(service: Service, strong: Strong, way: Try) -> None:
    caller = service.bearer(way.holds)
    answer = way.send(service, strong, caller)
    assert answer.status_code in {400, 403, 409}, answer.text
    assert not {"token", "client_secret", "client_id", "user_id"} & answer.json().keys()


@pytest.mark.parametrize("way", [way for way in WAYS if "strong" in way.name], ids=lambda way: way.name)
def test_refused_way_changed_nothing(service: Service, strong: Strong, way: Try) -> None:
    """What was strong still works as before, with its old secret and token."""
    before = service.grant(strong.app)["access_token"]
    token = strong.token["token"]
    way.send(service, strong, service.bearer(way.holds))
    assert service.grant(strong.app)["scope"] == "ledger:admin"
    for one in (before, token):
        assert service.call("GET", "/v1/users", token=one, params={"limit": 1}).status_code == 200


@pytest.mark.parametrize("scope", LEDGER_SCOPES)
def test_administrator_can_give_each_scope(service: Service, scope: str) -> None:
    """The positive control: what is refused above is refused for the caller's sake."""
    user = service.user(kind="service", scope=scope)
    assert service.issue(user["user_id"], scope, kind="sat")["scope"] == scope
    assert service.grant(service.app(scope=scope))["scope"] == scope


@pytest.mark.parametrize("scope", ["ledger:clients", "ledger:users"])
def test_caller_can_give_what_it_holds(service: Service, scope: str) -> None:
    caller = service.bearer(scope)
    if scope == "ledger:clients":
        wanted = {"client_name": "equal", "scope": scope}
        assert service.done("POST", "/v1/clients", token=caller, json=wanted)["client_id"]
    else:
        wanted = {"username": unique(CANARY_USERNAME), "kind": "service", "scope": scope}
        assert service.done("POST", "/v1/users", token=caller, json=wanted)["user_id"]


@pytest.mark.parametrize("scope", ["ledger:admin", "ledger:users", "ledger:validate"])
def test_client_cannot_ask_for_what_it_was_not_given(service: Service, scope: str) -> None:
    app = service.app(scope="ledger:clients", grant_types=["client_credentials", "refresh_token"])
    asked = service.form("/oauth2/token", app.basic, grant_type="client_credentials", scope=scope)
    assert (asked.status_code, asked.json()["error"]) == (400, "invalid_scope")
    answer = service.grant(app)
    assert answer["scope"] == "ledger:clients"
    refreshed = service.refresh(app, answer["refresh_token"], scope=f"ledger:clients {scope}")
    assert (refreshed.status_code, refreshed.json()["error"]) == (400, "invalid_scope")


def test_scope_of_the_token_counts_not_that_of_its_owner(service: Service) -> None:
    """A user with all rights holds a token for one: only that one is conferred."""
    user = service.user(kind="service", scope="ledger:admin ledger:clients ledger:issue")
    narrow = service.issue(user["user_id"], "ledger:clients ledger:issue", kind="sat")["token"]
    wanted = {"client_name": "sly", "scope": "ledger:admin"}
    assert service.call("POST", "/v1/clients", token=narrow, json=wanted).status_code in {400, 403}
    for scope in ("ledger:admin", None):
        more = {"scope": scope} if scope else {}
        token = {"kind": "sat", "subject": user["user_id"], "name": "x", **more}
        answer = service.call("POST", "/v1/tokens", token=narrow, json=token)
        assert answer.status_code in {400, 403} or "ledger:admin" not in answer.json()["scope"].split()


def test_refresh_keeps_no_right_that_the_client_lost(service: Service) -> None:
    app = service.app(scope="ledger:admin ledger:clients", grant_types=["client_credentials", "refresh_token"])
    answer = service.grant(app)
    service.done("PATCH", f"/v1/clients/{app.client_id}", json={"scope": "ledger:clients"})
    refreshed = service.refresh(app, answer["refresh_token"])
    if refreshed.status_code == 200:
        assert refreshed.json()["scope"] == "ledger:clients"
    else:
        assert refreshed.json()["error"] == "invalid_grant"


def test_rotation_keeps_no_right_that_the_user_lost(service: Service) -> None:
    user = service.user(kind="service", scope="ledger:admin ledger:clients")
    made = service.issue(user["user_id"], "ledger:admin ledger:clients", kind="sat")
    service.done("PATCH", f"/v1/users/{user['user_id']}", json={"scope": "ledger:clients"})
    rotated = service.call("POST", f"/v1/tokens/{made['token_id']}/rotate", json={})
    if rotated.status_code == 201:
        assert "ledger:admin" not in rotated.json()["scope"].split()
    else:
        assert 400 <= rotated.status_code < 500


def test_implication_that_comes_later_confers_nothing(service: Service) -> None:
    """A harmless scope that a strong one implies is no way up, and `ledger:*` implies nothing but by the code."""
    name = service.scope()
    caller = service.bearer("ledger:clients")
    wanted = {"name": name, "description": "x", "implies": ["ledger:clients"]}
    answer = service.call("POST", "/v1/scopes", token=caller, json=wanted)
    assert answer.status_code in {400, 403, 409}


def test_idempotent_answer_is_not_handed_to_another(service: Service) -> None:
    """The same key by a weaker caller gets the weaker caller's refusal, not the stored secret."""
    headers = {"Idempotency-Key": unique("key")}
    wanted = {"client_name": "strong", "scope": "ledger:admin"}
    assert service.call("POST", "/v1/clients", json=wanted, headers=headers).status_code == 201
    weak = service.bearer("ledger:clients")
    answer = service.call("POST", "/v1/clients", token=weak, json=wanted, headers=headers)
    assert answer.status_code in {400, 403}
    assert "client_secret" not in answer.text


def test_revoked_callers_idempotent_answer_is_closed(service: Service) -> None:
    user = service.user(kind="service", scope="ledger:clients")
    caller = service.issue(user["user_id"], "ledger:clients", kind="sat")
    headers = {"Idempotency-Key": unique("key")}
    wanted = {"client_name": "once"}
    assert service.call("POST", "/v1/clients", token=caller["token"], json=wanted, headers=headers).is_success
    service.done("POST", f"/v1/tokens/{caller['token_id']}/revoke", json={"reason": "compromised"})
    answer = service.call("POST", "/v1/clients", token=caller["token"], json=wanted, headers=headers)
    assert answer.status_code == 401


def test_batch_validation_needs_no_less_than_a_single_one(service: Service) -> None:
    caller = service.bearer("ledger:clients")
    answer = service.call("POST", "/v1/tokens/validate-batch", token=caller, json={"requests": []})
    assert answer.status_code == 403
