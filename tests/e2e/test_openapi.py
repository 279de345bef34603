"""The whole HTTP surface against its own description: what is documented works as documented, and nothing else is.

Every operation is called with valid input, then with input broken in every way that its schema names: each answer
must have a documented status, a documented content type and a body that fits the schema.
"""

from __future__ import annotations

import copy
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import httpx
import jsonschema
import pytest

from tests.people import Browser, flow, person, redeem, web_app
from tests.running import CANARY_NAME, CANARY_USERNAME, RECEIVERS_ADDRESS, App, Service, unique, until

METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
# CONTRACT.md, "Management API" and "OAuth endpoints", as far as they are built.
SURFACE = {
    ("POST", "/v1/clients"),
    ("GET", "/v1/clients"),
    ("GET", "/v1/clients/{client_id}"),
    ("PATCH", "/v1/clients/{client_id}"),
    ("DELETE", "/v1/clients/{client_id}"),
    ("POST", "/v1/clients/{client_id}/secrets"),
    ("POST", "/v1/users"),
    ("GET", "/v1/users"),
    ("GET", "/v1/users/{user_id}"),
    ("PATCH", "/v1/users/{user_id}"),
    ("DELETE", "/v1/users/{user_id}"),
    ("GET", "/v1/users/{user_id}/sessions"),
    ("DELETE", "/v1/users/{user_id}/sessions"),
    ("GET", "/v1/users/{user_id}/consents"),
    ("DELETE", "/v1/users/{user_id}/consents"),
    ("POST", "/v1/scopes"),
    ("GET", "/v1/scopes"),
    ("PATCH", "/v1/scopes/{name}"),
    ("DELETE", "/v1/scopes/{name}"),
    ("POST", "/v1/tokens"),
    ("GET", "/v1/tokens"),
    ("GET", "/v1/tokens/{token_id}"),
    ("GET", "/v1/tokens/{token_id}/history"),
    ("GET", "/v1/tokens/{token_id}/explain"),
    ("POST", "/v1/tokens/{token_id}/rotate"),
    ("POST", "/v1/tokens/validate"),
    ("POST", "/v1/tokens/validate-batch"),
    ("GET", "/v1/forward-auth"),
    ("POST", "/v1/uses"),
    ("POST", "/v1/tokens/{token_id}/revoke"),
    ("POST", "/v1/revocations"),
    ("GET", "/v1/revocations"),
    ("GET", "/v1/revocations/position"),
    ("GET", "/v1/revocations/snapshot"),
    ("GET", "/v1/revocations/{ledger_seq}/propagation"),
    ("GET", "/v1/revocations/stream"),
    ("GET", "/v1/revocations/{ledger_seq}/propagation"),
    ("POST", "/v1/webhooks"),
    ("GET", "/v1/webhooks"),
    ("GET", "/v1/webhooks/{webhook_id}"),
    ("PATCH", "/v1/webhooks/{webhook_id}"),
    ("DELETE", "/v1/webhooks/{webhook_id}"),
    ("GET", "/v1/webhooks/{webhook_id}/deliveries"),
    ("POST", "/v1/webhooks/{webhook_id}/redeliveries"),
    ("POST", "/v1/webhooks/{webhook_id}/secrets"),
    ("POST", "/v1/webhooks/{webhook_id}/test"),
    ("GET", "/v1/audit/events"),
    ("GET", "/v1/audit/usage"),
    ("GET", "/v1/audit/tokens"),
    ("GET", "/v1/audit/tokens/unused"),
    ("GET", "/v1/audit/tokens/expiring"),
    ("GET", "/v1/audit/scopes"),
    ("GET", "/v1/audit/blast-radius"),
    ("POST", "/v1/audit/query"),
    ("GET", "/v1/audit/export"),
    ("GET", "/v1/audit/exports/{export_id}"),
    ("GET", "/v1/audit/findings"),
    ("GET", "/v1/audit/findings/{finding_id}"),
    ("POST", "/v1/audit/findings/{finding_id}/acknowledge"),
    ("POST", "/v1/audit/findings/{finding_id}/dismiss"),
    ("GET", "/v1/audit/rules"),
    ("POST", "/v1/audit/backtests"),
    ("GET", "/v1/audit/backtests/{backtest_id}"),
    ("DELETE", "/v1/audit/backtests/{backtest_id}"),
    ("GET", "/v1/keys"),
    ("POST", "/v1/keys/rotate"),
    ("POST", "/v1/subscribers"),
    ("GET", "/v1/subscribers"),
    ("GET", "/v1/subscribers/{subscriber_id}"),
    ("DELETE", "/v1/subscribers/{subscriber_id}"),
    ("POST", "/v1/subscribers/{subscriber_id}/acknowledgements"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
    ("GET", "/metrics"),
    ("POST", "/oauth2/token"),
    ("POST", "/oauth2/introspect"),
    ("POST", "/oauth2/revoke"),
    ("GET", "/oauth2/jwks"),
    ("GET", "/.well-known/oauth-authorization-server"),
    ("GET", "/.well-known/openid-configuration"),
    ("POST", "/oauth2/par"),
    ("GET", "/oauth2/authorize"),
    ("POST", "/oauth2/authorize"),
    ("POST", "/oauth2/consent"),
    ("GET", "/oauth2/userinfo"),
    ("POST", "/oauth2/userinfo"),
    ("GET", "/oauth2/logout"),
    ("POST", "/oauth2/logout"),
    ("GET", "/sign-in"),
    ("POST", "/sign-in"),
    ("GET", "/sign-out"),
    ("POST", "/sign-out"),
    ("GET", "/"),
    ("GET", "/account"),
    ("POST", "/account/tokens"),
    ("GET", "/account/tokens/issued"),
    ("POST", "/account/tokens/revoke"),
    ("POST", "/account/apps/withdraw"),
    ("POST", "/account/sessions/end"),
    ("POST", "/account/sign-out-everywhere"),
}
OPEN = {
    "/health/live",
    "/health/ready",
    "/metrics",
    "/oauth2/jwks",
    "/.well-known/oauth-authorization-server",
    "/.well-known/openid-configuration",
}
# What people's browsers are sent to: answered by pages and redirects, to whoever asks.
BROWSERS = {
    *("/oauth2/authorize", "/oauth2/consent", "/oauth2/logout", "/sign-in", "/sign-out", "/", "/account"),
    *("/account/tokens", "/account/tokens/issued", "/account/tokens/revoke", "/account/apps/withdraw"),
    *("/account/sessions/end", "/account/sign-out-everywhere"),
}


class Surface:
    """The OpenAPI document of a running service, and what may be answered by it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        answer = service.http.get("/schema/openapi.json")
        assert answer.status_code == 200
        self.document: dict[str, Any] = answer.json()

    @cached_property
    def operations(self) -> dict[tuple[str, str], dict[str, Any]]:
        """By (method, path with parameter names only)."""
        return {
            (method.upper(), path): {**operation, "parameters": self._parameters(item, operation)}
            for path, item in self.document["paths"].items()
            for method, operation in item.items()
            if method in METHODS
        }

    def _parameters(self, item: dict[str, Any], operation: dict[str, Any]) -> list[dict[str, Any]]:
        return [self.resolved(one) for one in (*item.get("parameters", []), *operation.get("parameters", []))]

    def resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Follows a reference, if it is one."""
        while "$ref" in schema:
            target: Any = self.document
            for part in schema["$ref"].removeprefix("#/").split("/"):
                target = target[part.replace("~1", "/").replace("~0", "~")]
            schema = target
        return schema

    def described_answer(self, operation: dict[str, Any], answer: httpx.Response) -> dict[str, Any]:
        responses = operation["responses"]
        status = str(answer.status_code)
        described = responses.get(status) or responses.get(status[0] + "XX") or responses.get("default")
        assert described, f"{status} is not documented, only {sorted(responses)}: {answer.text[:300]}"
        return self.resolved(described)

    def check(self, key: tuple[str, str], answer: httpx.Response) -> None:
        """Raises: AssertionError naming what the document does not say."""
        assert answer.status_code < 500, answer.text
        described = self.described_answer(self.operations[key], answer)
        content = described.get("content")
        if not answer.content or key[0] == "HEAD":
            return
        media_type = answer.headers["content-type"].partition(";")[0]
        assert content, f"{answer.status_code} is documented without a body: {answer.text[:200]}"
        assert media_type in content, f"{media_type} is not documented, only {sorted(content)}"
        if media_type.endswith(("/json", "+json")):
            self.fits(answer.json(), content[media_type]["schema"])
            # CONTRACT: absent values are left out, never null, but for the sequence of a use. A group is named by
            # its value, and by null if its uses have none.
            assert nulls(answer.json()) <= {"ledger_seq", "value"}, answer.text

    def fits(self, value: Any, schema: dict[str, Any]) -> None:
        """Raises: AssertionError with every place that does not fit."""
        whole = {**schema, "components": self.document.get("components", {})}
        validator = jsonschema.Draft202012Validator(whole)
        wrong = [f"{list(one.absolute_path)}: {one.message[:200]}" for one in validator.iter_errors(value)]
        assert wrong == [], wrong

    def body_schema(self, operation: dict[str, Any]) -> dict[str, Any] | None:
        body = self.resolved(operation.get("requestBody", {}))
        content = body.get("content", {})
        return next((self.resolved(media["schema"]) for media in content.values()), None)


def nulls(value: Any) -> set[str]:
    """Names of members, at any depth, that are null."""
    if isinstance(value, dict):
        inner = set().union(*(nulls(member) for member in value.values()))
        return inner | {name for name, member in value.items() if member is None}
    return set().union(*(nulls(member) for member in value)) if isinstance(value, list) else set()


@pytest.fixture(scope="module")
def surface(service: Service) -> Surface:
    return Surface(service)


UNHEARD = f"http://{RECEIVERS_ADDRESS}:9/"  # of webhooks: nobody listens there


@pytest.fixture(scope="module", autouse=True)
def _no_webhook_is_left(service: Service) -> Iterator[None]:
    """Other tests ask whether every follower has received what they revoke."""
    yield
    for one in list(service.items("/v1/webhooks")):
        service.done("DELETE", f"/v1/webhooks/{one['webhook_id']}")


@dataclass
class Ground:
    """Things that valid requests name. Each is made when it is first asked for."""

    service: Service

    @cached_property
    def scope(self) -> str:
        return self.service.scope()

    @cached_property
    def app(self) -> App:
        grants = ["client_credentials", "refresh_token"]
        return self.service.app(scope=self.scope, grant_types=grants)

    @cached_property
    def user(self) -> dict[str, Any]:
        return self.service.user(scope=self.scope)

    @cached_property
    def finding_id(self) -> str:
        """Of a token that was tried for many scopes."""
        made = self.token
        for number in range(6):
            self.service.validate(made["token"], scope=f"admin:{number}")
        query = {"token_id": made["token_id"]}
        [found] = until(
            lambda: self.service.done("GET", "/v1/audit/findings", params=query)["items"], seconds=20, what="a finding"
        )
        name: str = found["finding_id"]
        return name

    @cached_property
    def web_app(self) -> App:
        return web_app(self.service)

    @property
    def flow(self) -> dict[str, str]:
        return flow(self.service, self.web_app).parameters

    def at_sign_in(self) -> Call:
        """Of a person before the sign-in page."""
        browser, somebody = Browser(self.service), person(self.service)
        page = browser.get(flow(self.service, self.web_app).url)
        told = {"username": somebody["username"], "password": somebody["password"]}
        return Call(form={**page.form.fields, **told}, browser=browser)

    def at_consent(self, decision: str) -> Call:
        """Of a person before the consent page."""
        browser = Browser(self.service)
        page = browser.sign_in(browser.get(flow(self.service, self.web_app).url), person(self.service))
        return Call(form={**page.form.fields, "decision": decision}, browser=browser)

    def consenting(self) -> str:
        """The id of a person who allows our app something."""
        somebody = person(self.service)
        assert "code" in Browser(self.service).visit(flow(self.service, self.web_app).url, somebody).answer
        user_id: str = somebody["user_id"]
        return user_id

    def on(self, path: str, action: str, **fields: str) -> Call:
        """Of a person who looks at this page of ours and presses a button: with an app, a token and two browsers."""
        browser, somebody = Browser(self.service), person(self.service, scope=self.scope)
        assert "code" in browser.visit(flow(self.service, self.web_app).url, somebody).answer
        self.service.issue(somebody["user_id"], self.scope)
        other = Browser(self.service)
        other.sign_in(other.get("/account"), somebody)
        form = next(one for one in browser.get(path).forms if one.action == action)
        return Call(form={**form.fields, **fields}, browser=browser)

    @cached_property
    def access_token(self) -> str:
        """Of a person, for userinfo."""
        made = flow(self.service, self.web_app, scope="openid profile email")
        code = Browser(self.service).visit(made.url, person(self.service)).answer["code"]
        token: str = redeem(self.service, made, code).json()["access_token"]
        return token

    @property
    def token(self) -> dict[str, Any]:
        return self.service.issue(self.user["user_id"], self.scope)


@dataclass
class Call:
    """A valid request. `path` fills the parameters of the path; `form` is for OAuth endpoints and pages.

    `browser`: whose cookies go with it.
    """

    path: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    body: dict[str, Any] | None = None
    form: dict[str, str] | None = None
    auth: tuple[str, str] | None = None
    token: str | None = ""
    browser: Browser | None = None
    endless: bool = False  # an answer of which only the first part is waited for

    def send(self, service: Service, method: str, template: str) -> httpx.Response:
        path = template
        for name, value in self.path.items():
            path = path.replace("{" + name + "}", value)
        more: dict[str, Any] = {"params": dict(self.query)}
        if self.body is not None:
            more["json"] = self.body
        if self.form is not None:
            http = self.browser.http if self.browser is not None else service.http
            return http.request(method, path, data=self.form, params=more["params"], auth=self.auth)
        if self.endless and self.token is not None:
            headers = {"Authorization": f"Bearer {self.token or service.admin_token}"}
            with service.http.stream(method, path, headers=headers, **more) as answer:
                content = next(answer.iter_raw()) if answer.is_success else answer.read()
                return httpx.Response(answer.status_code, headers={**answer.headers}, content=content)
        return service.call(method, path, token=self.token, **more)


def valid_calls(ground: Ground) -> dict[tuple[str, str], Callable[[], list[Call]]]:
    """What is sent for each operation; each list is made when its turn has come."""
    service = ground.service

    def client() -> dict[str, str]:
        return {"client_id": service.app().client_id}

    def user() -> dict[str, str]:
        return {"user_id": service.user()["user_id"]}

    def token() -> dict[str, str]:
        return {"token_id": ground.token["token_id"]}

    def past_call(query: Mapping[str, str] = {}) -> Call:
        token_id = ground.token["token_id"]
        return Call({"token_id": token_id}, {"at": service.history(token_id)[0]["recorded_at"], **query})

    def used_token() -> dict[str, str]:
        made = ground.token
        service.validate(made["token"])
        return {"token_id": made["token_id"]}

    def exported() -> str:
        made = service.call("GET", "/v1/audit/export", params={"dataset": "gaps"})
        return str(made.headers["x-export-id"])

    def finding() -> dict[str, str]:
        return {"finding_id": ground.finding_id}

    def backtest() -> dict[str, str]:
        """One that has begun; another may still be running."""
        begun = until(
            lambda: (
                service.call("POST", "/v1/audit/backtests", json={"rule": "burst", "days": 1}).json().get("backtest_id")
            ),
            what="a backtest begins",
        )
        return {"backtest_id": begun}

    def subscriber(transport: str = "nats") -> dict[str, str]:
        made = service.done("POST", "/v1/subscribers", json={"name": "x", "transport": transport})
        return {"subscriber_id": made["subscriber_id"]}

    def webhook() -> dict[str, str]:
        made = service.done("POST", "/v1/webhooks", json={"url": UNHEARD})
        return {"webhook_id": made["webhook_id"]}

    def revoked() -> int:
        path = f"/v1/tokens/{token()['token_id']}/revoke"
        seq: int = service.done("POST", path, json={"reason": "admin"})["ledger_seq"]
        return seq

    def ended_backtest() -> dict[str, Any]:
        service.done("DELETE", f"/v1/audit/backtests/{backtest()['backtest_id']}")
        return {"rule": "burst", "days": 1, "set": {"factor": 3}}

    everywhere = [Call(), Call(query={"limit": "2"})]
    pat = {"kind": "pat", "subject": ground.user["user_id"], "name": unique(CANARY_NAME), "scope": ground.scope}
    asked = {"token": ground.token["token"], "scope": ground.scope, "context": {"ip": "192.0.2.1"}}
    used_at = datetime.now(UTC).isoformat()
    use = {"token_id": ground.token["token_id"], "occurred_at": used_at, "outcome": "valid", "audience": ["a"]}
    reported = {"block_id": secrets.token_hex(16), "uses": [use, {**use, "context": {"ip": "192.0.2.1"}}]}
    return {
        ("POST", "/v1/clients"): lambda: [
            Call(body={"client_name": "a"}),
            Call(body={"client_name": "b", "token_endpoint_auth_method": "none", "grant_types": ["refresh_token"]}),
        ],
        ("GET", "/v1/clients"): lambda: everywhere,
        ("GET", "/v1/clients/{client_id}"): lambda: [Call(client())],
        ("PATCH", "/v1/clients/{client_id}"): lambda: [Call(client(), body={"client_name": "c"})],
        ("DELETE", "/v1/clients/{client_id}"): lambda: [Call(client())],
        ("POST", "/v1/clients/{client_id}/secrets"): lambda: [Call(client(), body={"overlap_seconds": 1})],
        ("POST", "/v1/users"): lambda: [
            Call(body={"username": unique(CANARY_USERNAME), "kind": "person", "scope": ground.scope}),
            Call(body={"username": unique(CANARY_USERNAME), "kind": "service", "scope": ""}),
        ],
        ("GET", "/v1/users"): lambda: everywhere,
        ("GET", "/v1/users/{user_id}"): lambda: [Call(user())],
        ("PATCH", "/v1/users/{user_id}"): lambda: [Call(user(), body={"scope": ground.scope})],
        ("DELETE", "/v1/users/{user_id}"): lambda: [Call(user()), Call(user(), {"erase": "true"})],
        ("POST", "/v1/scopes"): lambda: [Call(body={"name": unique("scope"), "description": "x"})],
        ("GET", "/v1/scopes"): lambda: everywhere,
        ("PATCH", "/v1/scopes/{name}"): lambda: [Call({"name": service.scope()}, body={"description": "y"})],
        ("DELETE", "/v1/scopes/{name}"): lambda: [Call({"name": service.scope()})],
        ("POST", "/v1/tokens"): lambda: [
            Call(body=pat),
            Call(body={**pat, "audience": "https://a.example", "allowed_ips": ["192.0.2.0/24"]}),
        ],
        ("GET", "/v1/tokens"): lambda: [*everywhere, Call(query={"status": "active", "kind": "pat"})],
        ("GET", "/v1/tokens/{token_id}"): lambda: [Call(token()), past_call()],
        ("GET", "/v1/tokens/{token_id}/explain"): lambda: [
            Call(token()),
            past_call({"scope": ground.scope, "audience": "https://a.example", "ip": "192.0.2.1"}),
        ],
        ("GET", "/v1/tokens/{token_id}/history"): lambda: [Call(token()), Call(token(), {"uses": "true"})],
        ("POST", "/v1/tokens/{token_id}/rotate"): lambda: [Call(token(), body={"overlap_seconds": 1})],
        ("POST", "/v1/tokens/validate"): lambda: [
            Call(body=asked),
            Call(body={"token": "garbage"}),
            Call(body={"token": service.grant(ground.app)["access_token"]}),
        ],
        ("POST", "/v1/tokens/validate-batch"): lambda: [Call(body={"requests": [asked, {"token": "garbage"}]})],
        ("GET", "/v1/forward-auth"): lambda: [
            Call(token=ground.token["token"]),
            Call(token=ground.token["token"], query={"scope": "more"}),
        ],
        ("POST", "/v1/uses"): lambda: [Call(body=reported), Call(body={**reported, "uses": [], "lost": 3})],
        ("POST", "/v1/tokens/{token_id}/revoke"): lambda: [
            Call(token(), body={"reason": "admin"}),
            Call(token(), body={"reason": "admin", "wait_seconds": 0.1}),
        ],
        ("POST", "/v1/revocations"): lambda: [
            Call(body={"token_id": ground.token["token_id"], "reason": "admin", "dry_run": True}),
            Call(body={"token_id": ground.token["token_id"], "reason": "admin"}),
        ],
        ("GET", "/v1/revocations"): lambda: [*everywhere, Call(query={"client_id": ground.app.client_id})],
        ("GET", "/v1/revocations/position"): lambda: [Call()],
        ("GET", "/v1/revocations/snapshot"): lambda: [Call()],
        ("GET", "/v1/revocations/{ledger_seq}/propagation"): lambda: [Call({"ledger_seq": str(revoked())})],
        ("GET", "/v1/revocations/stream"): lambda: [
            Call(endless=True),
            Call(query={"after": "0", "subject": ground.user["user_id"]}, endless=True),
        ],
        ("GET", "/v1/audit/events"): lambda: [*everywhere, Call(query={"subject": ground.user["user_id"]})],
        ("GET", "/v1/audit/usage"): lambda: [
            Call(),
            Call(query={"group_by": "client_id", "interval": "hour", "limit": "1", "explain": "sql"}),
        ],
        ("GET", "/v1/audit/tokens"): lambda: [*everywhere, Call(query={"sort": "uses", "explain": "sql"})],
        ("GET", "/v1/audit/tokens/unused"): lambda: everywhere,
        ("GET", "/v1/audit/tokens/expiring"): lambda: [*everywhere, Call(query={"days": "366"})],
        ("GET", "/v1/audit/scopes"): lambda: [*everywhere, Call(query={"by": "client", "explain": "sql"})],
        ("GET", "/v1/audit/blast-radius"): lambda: [
            Call(query=used_token()),
            Call(query={"client_id": ground.app.client_id, "interval": "hour", "explain": "sql"}),
        ],
        ("POST", "/v1/audit/query"): lambda: [
            Call(body={"sql": "SELECT $n AS n, [1, NULL] AS l", "parameters": {"n": 1}, "limit": 1}),
            Call(body={"sql": "FROM gaps_v1", "format": "csv"}),
            Call(body={"sql": "FROM gaps_v1", "format": "arrow"}),
        ],
        ("GET", "/v1/audit/export"): lambda: [
            Call(query={"dataset": "gaps"}),
            Call(query={"dataset": "gaps", "format": "csv"}),
            Call(query={"dataset": "gaps", "format": "ndjson"}),
        ],
        ("GET", "/v1/audit/exports/{export_id}"): lambda: [Call({"export_id": exported()})],
        ("GET", "/v1/audit/findings"): lambda: [*everywhere, Call(query={"status": "open", "rule": "burst"})],
        ("GET", "/v1/audit/findings/{finding_id}"): lambda: [Call(finding())],
        ("POST", "/v1/audit/findings/{finding_id}/acknowledge"): lambda: [Call(finding(), body={"reason": "seen"})],
        ("POST", "/v1/audit/findings/{finding_id}/dismiss"): lambda: [Call(finding(), body={"reason": "a test"})],
        ("GET", "/v1/audit/rules"): lambda: [Call()],
        ("POST", "/v1/audit/backtests"): lambda: [Call(body=ended_backtest())],
        ("GET", "/v1/audit/backtests/{backtest_id}"): lambda: [Call(backtest())],
        ("DELETE", "/v1/audit/backtests/{backtest_id}"): lambda: [Call(backtest())],
        ("GET", "/v1/users/{user_id}/sessions"): lambda: [Call({"user_id": ground.user["user_id"]})],
        ("DELETE", "/v1/users/{user_id}/sessions"): lambda: [Call({"user_id": ground.user["user_id"]})],
        ("GET", "/v1/users/{user_id}/consents"): lambda: [Call({"user_id": ground.user["user_id"]})],
        ("DELETE", "/v1/users/{user_id}/consents"): lambda: [
            Call({"user_id": ground.consenting()}, {"client_id": ground.web_app.client_id})
        ],
        ("GET", "/v1/keys"): lambda: everywhere,
        ("POST", "/v1/keys/rotate"): lambda: [Call(body={})],
        ("POST", "/v1/subscribers"): lambda: [
            Call(body={"name": "a", "transport": "nats", "after": 0}),
            Call(body={"name": "b", "transport": "http", "owner": ground.app.client_id}),
        ],
        ("GET", "/v1/subscribers"): lambda: everywhere,
        ("POST", "/v1/webhooks"): lambda: [
            Call(body={"url": UNHEARD}),
            Call(body={"url": UNHEARD, "webhook_name": "a", "subject": ground.user["user_id"], "after": 1}),
        ],
        ("GET", "/v1/webhooks"): lambda: everywhere,
        ("GET", "/v1/webhooks/{webhook_id}"): lambda: [Call(webhook())],
        ("PATCH", "/v1/webhooks/{webhook_id}"): lambda: [Call(webhook(), body={"enabled": False})],
        ("DELETE", "/v1/webhooks/{webhook_id}"): lambda: [Call(webhook())],
        ("GET", "/v1/webhooks/{webhook_id}/deliveries"): lambda: [Call(webhook()), Call(webhook(), {"limit": "2"})],
        ("POST", "/v1/webhooks/{webhook_id}/redeliveries"): lambda: [Call(webhook(), body={"after": 1})],
        ("POST", "/v1/webhooks/{webhook_id}/secrets"): lambda: [Call(webhook(), body={"overlap_seconds": 1})],
        ("POST", "/v1/webhooks/{webhook_id}/test"): lambda: [Call(webhook())],
        ("GET", "/v1/subscribers/{subscriber_id}"): lambda: [Call(subscriber()), Call(subscriber("http"))],
        ("DELETE", "/v1/subscribers/{subscriber_id}"): lambda: [Call(subscriber()), Call(subscriber("http"))],
        ("POST", "/v1/subscribers/{subscriber_id}/acknowledgements"): lambda: [
            Call(subscriber("http"), body={"ledger_seq": 1})
        ],
        ("POST", "/oauth2/token"): lambda: [
            Call(form={"grant_type": "client_credentials"}, auth=ground.app.basic),
            Call(
                form={"grant_type": "refresh_token", "refresh_token": service.grant(ground.app)["refresh_token"]},
                auth=ground.app.basic,
            ),
        ],
        ("POST", "/oauth2/introspect"): lambda: [
            Call(form={"token": service.grant(ground.app)["access_token"]}, auth=ground.app.basic),
            Call(form={"token": "garbage"}, auth=ground.app.basic),
        ],
        ("POST", "/oauth2/par"): lambda: [Call(form=ground.flow, auth=ground.web_app.basic)],
        ("GET", "/oauth2/authorize"): lambda: [Call(query=ground.flow), Call(query={**ground.flow, "prompt": "none"})],
        ("POST", "/oauth2/authorize"): lambda: [Call(form=ground.flow)],
        ("POST", "/oauth2/consent"): lambda: [ground.at_consent("allow"), ground.at_consent("deny")],
        ("GET", "/oauth2/userinfo"): lambda: [Call(token=ground.access_token)],
        ("POST", "/oauth2/userinfo"): lambda: [Call(form={"access_token": ground.access_token})],
        ("GET", "/oauth2/logout"): lambda: [Call(), Call(query={"client_id": ground.web_app.client_id})],
        ("POST", "/oauth2/logout"): lambda: [Call(form={"client_id": ground.web_app.client_id})],
        ("GET", "/sign-in"): lambda: [Call()],
        ("POST", "/sign-in"): lambda: [ground.at_sign_in()],
        ("GET", "/sign-out"): lambda: [Call()],
        ("POST", "/sign-out"): lambda: [ground.on("/sign-out", "/sign-out")],
        ("GET", "/"): lambda: [Call()],
        ("GET", "/account"): lambda: [Call()],
        ("POST", "/account/tokens"): lambda: [
            ground.on("/account", "/account/tokens", name="x", days="30", **{f"scope {ground.scope}": "on"}),
        ],
        ("GET", "/account/tokens/issued"): lambda: [Call()],
        ("POST", "/account/tokens/revoke"): lambda: [ground.on("/account", "/account/tokens/revoke")],
        ("POST", "/account/apps/withdraw"): lambda: [ground.on("/account", "/account/apps/withdraw")],
        ("POST", "/account/sessions/end"): lambda: [ground.on("/account", "/account/sessions/end")],
        ("POST", "/account/sign-out-everywhere"): lambda: [ground.on("/account", "/account/sign-out-everywhere")],
        ("POST", "/oauth2/revoke"): lambda: [Call(form={"token": "garbage"}, auth=ground.app.basic)],
        **{("GET", path): lambda: [Call()] for path in OPEN},
    }


@pytest.fixture(scope="module")
def calls(service: Service) -> dict[tuple[str, str], Callable[[], list[Call]]]:
    return valid_calls(Ground(service))


def identity(key: tuple[str, str]) -> str:
    return " ".join(key)


def test_document_is_openapi_3_1_and_its_schemas_are_schemas(surface: Surface) -> None:
    assert surface.document["openapi"].startswith("3.1")
    assert surface.document["info"]["title"]
    for schema in surface.document.get("components", {}).get("schemas", {}).values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for key, operation in surface.operations.items():
        assert operation.get("summary") or operation.get("description"), key
    identities = [operation.get("operationId") for operation in surface.operations.values()]
    assert len(identities) == len(set(identities))


def test_document_names_the_whole_surface_and_no_more(surface: Surface) -> None:
    assert {key for key in surface.operations if not key[1].startswith("/schema")} == SURFACE


def test_document_says_which_operations_need_a_token(surface: Surface) -> None:
    for (_, path), operation in surface.operations.items():
        security = operation.get("security", surface.document.get("security", []))
        if path.startswith("/v1/"):
            assert security, path
        if path in OPEN:
            assert not security or {} in security, path


@pytest.mark.parametrize("key", sorted(SURFACE), ids=identity)
def test_valid_call_is_answered_as_documented(
    service: Service, surface: Surface, calls: dict[tuple[str, str], Any], key: tuple[str, str]
) -> None:
    for call in calls[key]():
        if call.body is not None:
            schema = surface.body_schema(surface.operations[key])
            assert schema is not None, "the body is not documented"
            surface.fits(call.body, schema)
        answer = call.send(service, *key)
        assert (
            answer.is_success or key[1] == "/v1/forward-auth" or (answer.has_redirect_location and key[1] in BROWSERS)
        ), answer.text
        surface.check(key, answer)


WRONG_VALUES: dict[str, Any] = {
    "null": None,
    "number": 7,
    "negative": -7,
    "fraction": 0.5,
    "string": '\u00e4\u0000\r\n"\\',
    "long": "a" * 20_000,
    "empty": "",
    "boolean": True,
    "list": ["a", 1, None],
    "deep list": [[[[[]]]]],
    "object": {"a": {"b": []}},
    "huge": 10**30,
}


def broken_bodies(surface: Surface, body: dict[str, Any], schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The valid body, broken at one place at a time."""
    for name in schema.get("required", []):
        yield f"without {name}", {key: value for key, value in body.items() if key != name}
    for name in schema.get("properties", {}):
        for kind, value in WRONG_VALUES.items():
            yield f"{name} = {kind}", {**copy.deepcopy(body), name: value}
    yield "unknown member", {**body, "no_such_member": 1}
    yield "list", [body]
    yield "nothing", None


@pytest.mark.parametrize("key", sorted(key for key in SURFACE if key[1].startswith("/v1/")), ids=identity)
def test_invalid_body_is_answered_as_documented(
    service: Service, surface: Surface, calls: dict[tuple[str, str], Any], key: tuple[str, str]
) -> None:
    """Some of it may be valid after all; what is answered must be documented, and what is broken refused."""
    operation = surface.operations[key]
    schema = surface.body_schema(operation)
    call = calls[key]()[0]
    if schema is None:
        assert call.body is None
        return
    for name, body in broken_bodies(surface, call.body or {}, schema):
        answer = Call(call.path, call.query, body if body is not None else None).send(service, *key)
        try:
            surface.check(key, answer)
            if name in {"unknown member", "list"} or name.startswith("without"):
                assert 400 <= answer.status_code < 500, answer.text
        except AssertionError as failure:
            raise AssertionError(f"{name}: {failure}") from failure


@pytest.mark.parametrize("key", sorted(SURFACE), ids=identity)
def test_invalid_parameters_are_answered_as_documented(
    service: Service, surface: Surface, calls: dict[tuple[str, str], Any], key: tuple[str, str]
) -> None:
    operation = surface.operations[key]
    call = calls[key]()[0]
    strange = ["", "-1", "x", "9" * 40, "a" * 3_000, "\u00e4\u0000", "2026-13-01T00:00:00Z", "' or 1=1"]
    for parameter in operation["parameters"]:
        for value in strange:
            changed = copy.copy(call)
            if parameter["in"] == "path":
                quoted = httpx.URL("http://x", params={"p": value}).query.decode().removeprefix("p=")
                changed.path = {**call.path, parameter["name"]: quoted or "%20"}
            elif parameter["in"] == "query":
                changed.query = {**call.query, parameter["name"]: value}
            else:
                continue
            surface.check(key, changed.send(service, *key))


@pytest.mark.parametrize("key", sorted(key for key in SURFACE if key[1].startswith("/v1/")), ids=identity)
def test_missing_rights_are_answered_as_documented(
    service: Service, surface: Surface, calls: dict[tuple[str, str], Any], key: tuple[str, str]
) -> None:
    call = calls[key]()[0]
    weak = service.pat()["token"]
    for token, statuses in ((None, {401}), ("garbage", {401}), (weak, {403, 200} if "forward" in key[1] else {403})):
        changed = copy.copy(call)
        changed.token = token
        answer = changed.send(service, *key)
        assert answer.status_code in statuses, answer.text
        surface.check(key, answer)


@pytest.mark.parametrize(
    "key", sorted(key for key in SURFACE if key[0] == "POST" and not key[1].startswith("/v1/")), ids=identity
)
def test_invalid_form_is_answered_as_documented(
    service: Service, surface: Surface, calls: dict[tuple[str, str], Any], key: tuple[str, str]
) -> None:
    call = calls[key]()[0]
    assert call.form is not None
    for form in ({}, dict.fromkeys(call.form, ""), dict.fromkeys(call.form, "ä\x00"), {"a": "b" * 200_000}):
        changed = copy.copy(call)
        changed.form = form
        surface.check(key, changed.send(service, *key))
    if key[1] in BROWSERS or key[1] == "/oauth2/userinfo":
        return
    changed = copy.copy(call)
    changed.auth = (call.auth[0] if call.auth else "", "wrong")
    try:
        answer = changed.send(service, *key)
    except httpx.RemoteProtocolError:
        # Who is answered before all was read loses the connection, and learns that from the next request.
        answer = changed.send(service, *key)
    assert answer.status_code == 401
    surface.check(key, answer)


def test_undocumented_methods_are_refused_everywhere(service: Service, surface: Surface) -> None:
    """Whatever is not in the document is 404 or 405, and 405 names what is."""
    for path in sorted({path for _, path in SURFACE}):
        documented = {method for method, known in surface.operations if known == path}
        target = path.replace("{", "").replace("}", "")
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "TRACE"):
            if method in documented:
                continue
            answer = service.call(method, target, json={} if method in {"POST", "PUT", "PATCH"} else None)
            assert answer.status_code in {404, 405}, f"{method} {path}: {answer.status_code}"
            if answer.status_code == 405:
                allowed = {one.strip() for one in answer.headers["allow"].split(",")}
                assert documented <= allowed


def test_check_itself_refuses_what_is_not_documented(surface: Surface) -> None:
    """The negative control: another status, another content type, another body."""
    key = ("POST", "/v1/tokens/validate")
    good = {"valid": True, "code": "valid", "ledger_seq": 1}
    surface.check(key, httpx.Response(200, json=good))
    wrong = [
        httpx.Response(201, json=good),
        httpx.Response(500, json=good),
        httpx.Response(200, text="valid"),
        httpx.Response(200, json={**good, "ledger_seq": "1"}),
        httpx.Response(200, json={"valid": True}),
        httpx.Response(400, json={"error": "invalid_request"}),
    ]
    for answer in wrong:
        with pytest.raises(AssertionError):
            surface.check(key, answer)


def test_document_is_the_same_from_every_worker(service: Service, surface: Surface) -> None:
    for _ in range(6):
        with service.caller() as http:
            seen = http.get("/schema/openapi.json").content
        assert json.loads(seen) == surface.document
