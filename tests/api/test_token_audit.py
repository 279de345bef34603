"""`/v1/audit/tokens`, `…/scopes` and `…/blast-radius` against the running service.

What is counted: tests/projections/test_token_usage.py and test_blast_radius.py.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from tests.running import Service, problem

TOKENS, SCOPES, RADIUS = "/v1/audit/tokens", "/v1/audit/scopes", "/v1/audit/blast-radius"


def context(ip: str, agent: str = "curl/8.5") -> dict[str, Any]:
    return {"context": {"ip": ip, "user_agent": agent, "method": "GET", "path": "/orders"}}


def test_tokens_of_a_person_are_listed_by_use(service: Service) -> None:
    user = service.user(scope=service.scope())
    rarely, often = (service.issue(user["user_id"], user["scope"]) for _ in range(2))
    service.validate(rarely["token"], **context("192.0.2.1"))
    for ip in ("192.0.2.1", "192.0.2.2"):
        service.validate(often["token"], **context(ip))
    for name in (user["username"], user["user_id"]):
        seen = service.done("GET", TOKENS, params={"subject": name, "sort": "uses"})
        assert [(one["token_id"], one["uses"], one["addresses"]) for one in seen["items"]] == [
            (often["token_id"], 2, 2),
            (rarely["token_id"], 1, 1),
        ]
        assert seen["ledger_seq"] >= often["ledger_seq"]
        assert seen["usage_seq"] > 0
    paged = list(service.items(TOKENS, subject=user["user_id"], sort="uses", order="asc", limit=1))
    assert [one["token_id"] for one in paged] == [rarely["token_id"], often["token_id"]]
    assert paged[0]["age_days"] == 0


def test_tokens_are_told_with_their_status_and_what_they_validated(service: Service) -> None:
    user = service.user(kind="service", scope="ledger:validate")
    made = service.issue(user["user_id"], "ledger:validate", kind="sat")
    never, asked = (service.issue(user["user_id"], "ledger:validate", kind="sat") for _ in range(2))
    for token in (asked["token"], "garbage"):
        body = {"token": token, "scope": "ledger:validate"}
        assert service.call("POST", "/v1/tokens/validate", token=made["token"], json=body).is_success
    service.done("POST", f"/v1/tokens/{never['token_id']}/revoke", json={"reason": "unused"})
    seen = {one["token_id"]: one for one in service.items(TOKENS, subject=user["user_id"])}
    caller = seen[made["token_id"]]
    # The unknown token is counted to the minute, and some seconds late.
    assert (caller["uses"], caller["validations"] >= 1, "last_used_at" in caller) == (0, True, True)
    assert (seen[never["token_id"]]["status"], "last_used_at" in seen[never["token_id"]]) == ("revoked", False)
    assert [one["token_id"] for one in service.items(TOKENS, subject=user["user_id"], status="revoked")] == [
        never["token_id"]
    ]
    [item] = service.done("GET", SCOPES, params={"token_id": made["token_id"], "include_used": True})["items"]
    assert (item["scope"], item["proposed_scope"], item["unused"]) == ("ledger:validate", "ledger:validate", [])


def test_expiring_tokens_are_listed_in_pages_with_their_uses(service: Service) -> None:
    made = service.pat(expires_in_seconds=3600)
    service.validate(made["token"], **context("192.0.2.1"))
    found = list(service.items(f"{TOKENS}/expiring", days=1, limit=2))
    [mine] = [one for one in found if one["token_id"] == made["token_id"]]
    assert (mine["uses"], mine["addresses"], mine["expires_at"]) == (1, 1, made["expires_at"])
    assert [one["expires_at"] for one in found] == sorted(one["expires_at"] for one in found)
    service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json={"reason": "unused"})
    assert made["token_id"] not in [one["token_id"] for one in service.items(f"{TOKENS}/expiring", days=1)]


def test_tokens_of_today_are_not_unused(service: Service) -> None:
    service.pat()
    seen = service.done("GET", f"{TOKENS}/unused", params={"days": 1})
    assert (seen["items"], seen["ledger_seq"] > 0) == ([], True)


def test_scopes_that_were_not_asked_for_are_unused(service: Service) -> None:
    used, unused = sorted(service.scope() for _ in range(2))
    user = service.user(scope=f"{used} {unused}")
    made = service.issue(user["user_id"], f"{used} {unused}")
    service.validate(made["token"], scope=used)
    service.validate(made["token"])
    seen = service.done("GET", SCOPES, params={"token_id": made["token_id"]})
    [item] = seen["items"]
    assert (item["scope"], item["proposed_scope"]) == (f"{used} {unused}", used)
    assert [one["name"] for one in item["unused"]] == [unused]
    assert [(one["name"], one["uses"]) for one in item["used"]] == [(used, 1)]
    assert (item["uses"], item["unscoped_uses"], item["tokens"]) == (2, 1, 1)
    assert seen["from"].endswith("T00:00:00Z")
    service.validate(made["token"], scope=unused)
    assert service.done("GET", SCOPES, params={"token_id": made["token_id"]})["items"] == []


def test_scopes_of_a_client_are_compared_with_what_it_may_ask_for(service: Service) -> None:
    used, unused = sorted(service.scope() for _ in range(2))
    app = service.app(scope=f"{used} {unused}")
    service.validate(service.grant(app, scope=used)["access_token"], scope=used)
    [item] = service.done("GET", SCOPES, params={"by": "client", "client_id": app.client_id})["items"]
    assert (item["client_id"], item["scope"], item["proposed_scope"]) == (app.client_id, f"{used} {unused}", used)
    assert "token_id" not in item
    found = [one["client_id"] for one in service.items(SCOPES, by="client", limit=1, include_used=True)]
    assert found == sorted(set(found))
    assert app.client_id in found


def test_scopes_of_management_calls_are_the_ones_that_let_them_through(service: Service) -> None:
    """Several scopes would do for a list of tokens: the use names the one that the token has."""
    user = service.user(kind="service", scope="ledger:audit")
    made = service.issue(user["user_id"], "ledger:audit", kind="sat")
    assert service.call("GET", "/v1/tokens", token=made["token"]).is_success
    [item] = service.done("GET", SCOPES, params={"token_id": made["token_id"], "include_used": True})["items"]
    assert (item["proposed_scope"], item["unused"]) == ("ledger:audit", [])


def test_blast_radius_of_a_leaked_refresh_token_is_its_chain(service: Service) -> None:
    app = service.app(grant_types=["client_credentials", "refresh_token"], scope=service.scope())
    first = service.grant(app)
    second = service.refresh(app, first["refresh_token"]).json()
    for ip in ("192.0.2.1", "198.51.100.7"):
        service.validate(second["access_token"], **context(ip))
    digest = hashlib.sha256(first["refresh_token"].encode()).hexdigest()
    seen = service.done("GET", RADIUS, params={"token_sha256": digest.upper(), "limit": 1})
    assert (seen["token"]["kind"], seen["token"]["status"], seen["token"]["client_id"]) == (
        *("refresh", "spent"),
        app.client_id,
    )
    assert [one["relation"] for one in seen["related"]["items"]] == ["self", "descendant", "descendant", "sibling"]
    assert (seen["usage"]["uses"], seen["related"]["would_end"]) == (2, 3)
    assert {one["value"] for one in seen["networks"]["items"]} == {"192.0.2.0/24", "198.51.100.0/24"}
    assert [one["value"] for one in seen["agents"]["items"]] == ["curl"]
    assert seen["new_addresses"]["total"] == 2
    assert (seen["would_break"]["uses"], seen["would_break"]["refreshes"]) == (2, 1)
    assert [one["value"] for one in seen["would_break"]["endpoints"]] == ["validate"]
    assert seen["ledger_seq"] >= seen["related"]["items"][1]["issued_seq"]
    [use] = seen["items"]
    assert (use["ip"], use["path"], use["usage_seq"] <= seen["usage_seq"]) == ("198.51.100.7", "/orders", True)
    rest = service.done("GET", RADIUS, params={"token_sha256": digest, "cursor": seen["next_cursor"]})
    assert [one["ip"] for one in rest["items"]] == ["192.0.2.1"]
    assert {"related", "next_cursor"}.isdisjoint(rest)
    by_grant = service.done("GET", RADIUS, params={"grant_id": seen["token"]["grant_id"]})
    assert (by_grant["related"]["tokens"], "token" in by_grant) == (4, False)


def test_blast_radius_ends_with_a_revocation_and_stays_to_be_read(service: Service) -> None:
    made = service.pat()
    service.validate(made["token"], **context("192.0.2.1"))
    of_it = {"token_id": made["token_id"]}
    assert service.done("GET", RADIUS, params=of_it)["would_break"]["uses"] == 1
    service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json={"reason": "compromised"})
    service.validate(made["token"], **context("198.51.100.7"))
    seen = service.done("GET", RADIUS, params=of_it)
    assert (seen["would_break"]["uses"], seen["would_break"]["tokens"]) == (0, 0)
    assert (seen["token"]["status"], seen["token"]["reason"]) == ("revoked", "compromised")
    assert [(one["outcome"], one["uses"]) for one in seen["usage"]["outcomes"]] == [("revoked", 1), ("valid", 1)]
    later = service.done("GET", RADIUS, params=of_it | {"since": seen["items"][0]["occurred_at"]})
    assert [one["value"] for one in later["new_addresses"]["items"]] == ["198.51.100.7"]


def test_answers_about_tokens_tell_their_sql(service: Service) -> None:
    token_id = service.pat()["token_id"]
    for path in (TOKENS, f"{TOKENS}/unused", f"{TOKENS}/expiring", SCOPES):
        seen = service.done("GET", path, params={"explain": "sql", "limit": 1})
        assert seen["sql"]["statement"].startswith("WITH ")
        assert seen["sql"]["parameters"]["limit"] == 2
        assert "sql" not in service.done("GET", path, params={"limit": 1})
    told = service.done("GET", RADIUS, params={"explain": "sql", "token_id": token_id})["sql"]
    assert told[0]["name"] == "related"
    assert told[0]["parameters"]["asked"] == token_id.removeprefix("tok_")
    assert {"usage", "networks", "dependents", "deeds"} <= {one["name"] for one in told}


@pytest.mark.parametrize(
    ("path", "query", "says"),
    [
        (TOKENS, {"sort": "name"}, "sort"),
        (TOKENS, {"order": "up"}, "order"),
        (TOKENS, {"status": "good"}, "status"),
        (TOKENS, {"cursor": "x"}, "cursor is not one"),
        (f"{TOKENS}/unused", {"days": 0}, "days"),
        (f"{TOKENS}/expiring", {"days": "x"}, "days"),
        (SCOPES, {"by": "person"}, "by"),
        (SCOPES, {"kind": "refresh"}, "kind"),
        (SCOPES, {"by": "client", "subject": "usr_x"}, "subject cannot narrow down"),
        (RADIUS, {}, "0 of token_id, token_sha256, grant_id, client_id were given"),
        (RADIUS, {"token_id": "tok_x", "client_id": "cli_x"}, "2 of"),
        (RADIUS, {"token_sha256": "x" * 64}, "not a SHA-256"),
        (RADIUS, {"token_sha256": "ab"}, "token_sha256"),
        (RADIUS, {"token_id": "tok_x", "since": "yesterday"}, "since must be a time"),
        (RADIUS, {"token_id": "tok_x", "interval": "minute"}, "interval"),
    ],
    ids=str,
)
def test_questions_about_tokens_that_cannot_be_answered_are_refused(
    service: Service, path: str, query: dict[str, Any], says: str
) -> None:
    body = problem(service.call("GET", path, params=query), 400, "invalid_request")
    assert says in body["detail"]
    assert body["fix"]


@pytest.mark.parametrize("name", ["token_id", "grant_id", "client_id"])
def test_blast_radius_of_nothing_is_not_found(service: Service, name: str) -> None:
    problem(service.call("GET", RADIUS, params={name: "tok_" + "0" * 32}), 404, "not_found")
    problem(service.call("GET", RADIUS, params={"token_sha256": "0" * 64}), 404, "not_found")


def test_cursor_of_another_order_is_refused(service: Service) -> None:
    service.pat()
    service.pat()
    cursor = service.done("GET", TOKENS, params={"limit": 1, "sort": "issued_at"})["next_cursor"]
    problem(service.call("GET", TOKENS, params={"limit": 1, "sort": "uses", "cursor": cursor}), 400)


def test_questions_about_tokens_need_the_scope_of_auditors(service: Service) -> None:
    for path in (TOKENS, SCOPES, RADIUS):
        problem(service.call("GET", path, token=service.bearer("ledger:users")), 403, "insufficient_scope")
        problem(service.call("GET", path, token=None), 401)
