"""What validation says, and which word comes first when several hold."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.running import Service, problem, until

API, OTHER = "https://api.example", "https://other.example"
BOUND = {"allowed_ips": ["192.0.2.0/24", "2001:db8::/32"]}
INSIDE, OUTSIDE = {"ip": "192.0.2.9"}, {"ip": "198.51.100.9"}


@pytest.fixture(scope="module")
def scope(service: Service) -> str:
    return service.scope()


def test_unknown_and_malformed_tell_nothing_else(service: Service) -> None:
    for token in ("", "garbage", "tl_pat_" + "a" * 49, "eyJ.e30.x"):
        seen = service.validate(token)
        assert seen.keys() == {"valid", "code", "ledger_seq"}
        assert seen["valid"] is False
        assert seen["code"] in {"unknown", "malformed"}


@pytest.mark.parametrize(
    ("context", "code"),
    [
        ({"ip": "192.0.2.1"}, "valid"),
        ({"ip": "192.0.3.1"}, "ip_not_allowed"),
        ({"ip": "2001:db8::1"}, "valid"),
        ({"ip": "2001:db9::1"}, "ip_not_allowed"),
        ({"ip": "::ffff:192.0.2.1"}, "valid"),
        ({"ip": "::ffff:198.51.100.1"}, "ip_not_allowed"),
        ({"user_agent": "x"}, "ip_not_allowed"),
        (None, "ip_not_allowed"),
    ],
    ids=str,
)
def test_bound_token_is_valid_from_its_networks_only(
    service: Service, scope: str, context: dict[str, str] | None, code: str
) -> None:
    token = service.pat(scope, **BOUND)["token"]
    assert service.code(token, **({"context": context} if context else {})) == code


@pytest.mark.parametrize("address", ["not-an-address", "192.0.2.1/24", "192.0.2.01", "", "1.2.3"])
def test_context_that_is_no_address_is_refused(service: Service, scope: str, address: str) -> None:
    token = service.pat(scope)["token"]
    wanted = {"token": token, "context": {"ip": address}}
    problem(service.call("POST", "/v1/tokens/validate", json=wanted), 400)


def test_what_was_not_asked_is_not_checked(service: Service, scope: str) -> None:
    token = service.pat(scope, audience=[API])["token"]
    assert service.code(token) == "valid"
    assert service.code(token, audience=API) == "valid"
    assert service.code(token, audience=OTHER) == "wrong_audience"
    assert service.code(token, audience=[OTHER, API]) == "valid"
    assert service.code(token, scope=scope) == "valid"
    assert service.code(token, scope=f"{scope} more") == "insufficient_scope"
    assert service.code(token, scope="") == "valid"


def test_precedence_revoked_is_said_first(service: Service, scope: str) -> None:
    """Revoked, expired, from elsewhere, for others, without the scope: only `revoked` is said."""
    made = service.pat(scope, audience=[API], expires_in_seconds=1, **BOUND)
    until(lambda: service.code(made["token"]) == "expired", seconds=5)
    everything: dict[str, Any] = {"audience": OTHER, "scope": "more", "context": OUTSIDE}
    assert service.code(made["token"], **everything) == "expired"
    service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json={"reason": "admin"})
    assert service.code(made["token"], **everything) == "revoked"


def test_precedence_of_what_the_request_asks(service: Service, scope: str) -> None:
    token = service.pat(scope, audience=[API], **BOUND)["token"]
    assert service.code(token, audience=OTHER, scope="more", context=OUTSIDE) == "ip_not_allowed"
    assert service.code(token, audience=OTHER, scope="more", context=INSIDE) == "wrong_audience"
    assert service.code(token, audience=API, scope="more", context=INSIDE) == "insufficient_scope"
    assert service.code(token, audience=API, scope=scope, context=INSIDE) == "valid"


def test_precedence_disabled_after_revoked_before_expired(service: Service, scope: str) -> None:
    """Disabling also revokes: a token that lived then is `revoked` or names its subject, never `expired`."""
    user = service.user(scope=scope)
    short = service.issue(user["user_id"], scope, expires_in_seconds=1)
    service.done("DELETE", f"/v1/users/{user['user_id']}")
    first = service.code(short["token"])
    assert first in {"revoked", "subject_disabled"}
    shown = service.done("GET", f"/v1/tokens/{short['token_id']}")
    until(lambda: service.validate(short["token"])["code"] == first and shown, seconds=3)


def test_precedence_stale_is_said_before_anything(service: Service, scope: str) -> None:
    """Nothing is said about a token from a view that is older than the caller's knowledge."""
    made = service.pat(scope)
    ahead = made["ledger_seq"] + 1_000_000
    for token in (made["token"], "garbage"):
        seen = service.validate(token, min_seq=ahead)
        assert (seen["valid"], seen["code"]) == (False, "stale")
        assert seen["ledger_seq"] < ahead
    assert service.code(made["token"], min_seq=made["ledger_seq"]) == "valid"


@pytest.mark.parametrize("min_seq", [-1, "1", 1.5, 2**70, True], ids=str)
def test_wrong_min_seq_is_refused(service: Service, min_seq: Any) -> None:
    wanted = {"token": "x", "min_seq": min_seq}
    problem(service.call("POST", "/v1/tokens/validate", json=wanted), 400)


def test_own_write_is_read_at_once_by_every_worker(service: Service, scope: str) -> None:
    """Fifty issues, each validated at once over connections of their own: never `unknown`."""
    user = service.user(scope=scope)

    def issue_and_ask(_: int) -> str:
        made = service.issue(user["user_id"], scope)
        with service.caller() as other:
            headers = {"Authorization": f"Bearer {service.admin_token}"}
            answer = other.post("/v1/tokens/validate", json={"token": made["token"]}, headers=headers)
        return answer.json()["code"]

    with ThreadPoolExecutor(5) as pool:
        assert set(pool.map(issue_and_ask, range(50))) == {"valid"}


def test_kinds_that_are_no_bearer_tokens_are_unknown(service: Service, scope: str) -> None:
    app = service.app(grant_types=["client_credentials", "refresh_token"], scope=scope)
    answer = service.grant(app)
    assert service.code(answer["access_token"]) == "valid"
    seen = service.validate(answer["refresh_token"])
    assert seen["code"] == "unknown"
    assert seen.keys() == {"valid", "code", "ledger_seq"}


def test_management_api_takes_tokens_for_the_issuer_only(service: Service) -> None:
    user = service.user(kind="service", scope="ledger:clients")

    def status(**more: Any) -> int:
        token = service.issue(user["user_id"], "ledger:clients", kind="sat", **more)["token"]
        return service.call("GET", "/v1/clients", token=token, params={"limit": 1}).status_code

    assert status() == 200
    assert status(audience=[service.issuer]) == 200
    assert status(audience=[OTHER, service.issuer]) == 200
    assert status(audience=[OTHER]) == 401
    assert status(allowed_ips=["127.0.0.0/8"]) == 200
    assert status(allowed_ips=["192.0.2.0/24"]) == 401


def test_management_api_takes_access_tokens_of_clients(service: Service) -> None:
    for token_format in ("jwt", "opaque"):
        app = service.app(scope="ledger:clients", access_token_format=token_format)
        token = service.grant(app)["access_token"]
        assert service.call("GET", "/v1/clients", token=token, params={"limit": 1}).status_code == 200
        assert service.call("GET", "/v1/users", token=token, params={"limit": 1}).status_code == 403
        service.revoke(app, token)
        assert service.call("GET", "/v1/clients", token=token).status_code == 401


SCOPES_NEEDED = {
    ("GET", "/v1/clients"): "ledger:clients",
    ("POST", "/v1/clients"): "ledger:clients",
    ("GET", "/v1/clients/cli_x"): "ledger:clients",
    ("PATCH", "/v1/clients/cli_x"): "ledger:clients",
    ("DELETE", "/v1/clients/cli_x"): "ledger:clients",
    ("POST", "/v1/clients/cli_x/secrets"): "ledger:clients",
    ("GET", "/v1/users"): "ledger:users",
    ("POST", "/v1/users"): "ledger:users",
    ("GET", "/v1/users/usr_x"): "ledger:users",
    ("PATCH", "/v1/users/usr_x"): "ledger:users",
    ("DELETE", "/v1/users/usr_x"): "ledger:users",
    ("POST", "/v1/tokens"): "ledger:issue",
    ("POST", "/v1/tokens/tok_x/rotate"): "ledger:issue",
    ("POST", "/v1/tokens/validate"): "ledger:validate",
    ("POST", "/v1/tokens/validate-batch"): "ledger:validate",
    ("POST", "/v1/tokens/tok_x/revoke"): "ledger:revoke",
    ("POST", "/v1/revocations"): "ledger:revoke",
    ("GET", "/v1/audit/events"): "ledger:audit",
    ("GET", "/v1/audit/usage"): "ledger:audit",
    ("GET", "/v1/audit/tokens/unused"): "ledger:audit",
    ("GET", "/v1/audit/tokens/expiring"): "ledger:audit",
    ("POST", "/v1/audit/query"): "ledger:audit",
    ("GET", "/v1/audit/export"): "ledger:audit",
    ("GET", "/v1/audit/exports/exp_x"): "ledger:audit",
    ("POST", "/v1/keys/rotate"): "ledger:admin",
}
ALL_SCOPES = ("admin", "clients", "users", "issue", "validate", "revoke", "audit", "subscribe")


@pytest.fixture(scope="module")
def callers(service: Service) -> dict[str, str]:
    return {f"ledger:{name}": service.bearer(f"ledger:{name}") for name in ALL_SCOPES}


@pytest.mark.parametrize(("request_line", "scope_needed"), SCOPES_NEEDED.items(), ids=str)
def test_each_call_needs_its_scope(
    service: Service, callers: dict[str, str], request_line: tuple[str, str], scope_needed: str
) -> None:
    """Whatever else is wrong with the request, who lacks the scope hears only that."""
    method, path = request_line
    body = {"json": {}} if method in {"POST", "PATCH"} else {}
    for scope, token in sorted(callers.items(), reverse=True):
        answer = service.call(method, path, token=token, **body)
        if scope in {scope_needed, "ledger:admin"}:
            assert answer.status_code != 403, answer.text
        else:
            problem(answer, 403, "insufficient_scope")
    assert service.call(method, path, token=None, **body).status_code == 401
