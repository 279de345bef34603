"""Personal and service access tokens: issue, validate, use, rotate, look back, revoke."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.running import Service, problem, unique, until

DAY_SECONDS = 86_400


def moment(text: str) -> datetime:
    """RFC 3339, UTC."""
    assert text.endswith("Z"), text
    return datetime.fromisoformat(text)


def lifetime(made: dict[str, Any]) -> timedelta:
    """Expiries are whole seconds, rounded down."""
    exact = moment(made["expires_at"]) - moment(made["issued_at"])
    return timedelta(seconds=math.ceil(exact.total_seconds()))


def forward(service: Service, token: str, **query: str) -> httpx.Response:
    return service.call("GET", "/v1/forward-auth", token=token, params=query)


@pytest.fixture(scope="module")
def scope(service: Service) -> str:
    return service.scope()


def test_issue_answers_what_the_contract_names(service: Service, scope: str) -> None:
    user = service.user(scope=scope)
    made = service.issue(user["user_id"], scope)
    assert made["token"].startswith("tl_pat_")
    assert made["kind"] == "pat"
    assert made["subject"] == user["user_id"]
    assert made["scope"] == scope
    assert lifetime(made) == timedelta(days=90)
    assert made["ledger_seq"] > 0
    assert made["token_id"].startswith("tok_")
    assert made["grant_id"].startswith("grt_")
    assert None not in made.values()


def test_subject_may_be_named_by_username(service: Service, scope: str) -> None:
    user = service.user(scope=scope, kind="service")
    made = service.issue(user["username"], scope, kind="sat")
    assert made["subject"] == user["user_id"]
    assert made["token"].startswith("tl_sat_")


@pytest.mark.parametrize(("kind", "of"), [("pat", "service"), ("sat", "person")])
def test_kind_must_fit_the_subject(service: Service, scope: str, kind: str, of: str) -> None:
    user = service.user(scope=scope, kind=of)
    wanted = {"kind": kind, "subject": user["user_id"], "name": "x", "scope": scope}
    problem(service.call("POST", "/v1/tokens", json=wanted), 400)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"kind": "access"}, id="kind"),
        pytest.param({"subject": "usr_nobody"}, id="subject"),
        pytest.param({"scope": "no:such:scope"}, id="scope"),
        pytest.param({"expires_in_seconds": 0}, id="at once"),
        pytest.param({"expires_in_seconds": -1}, id="past"),
        pytest.param({"expires_in_seconds": 366 * DAY_SECONDS + 1}, id="too long"),
        pytest.param({"expires_in_seconds": 10**30}, id="endless"),
        pytest.param({"expires_in_seconds": 1.5}, id="fraction"),
        pytest.param({"expires_in_seconds": True}, id="boolean"),
        pytest.param({"allowed_ips": ["not an address"]}, id="address"),
        pytest.param({"allowed_ips": ["10.0.0.1/8"]}, id="host bits"),
        pytest.param({"allowed_ips": "10.0.0.0/8"}, id="not a list"),
        pytest.param({"name": "a" * 10_000}, id="long name"),
        pytest.param({"name": "a\0b"}, id="nul in name"),
        pytest.param({"audience": ["a"] * 10_000}, id="audiences"),
        pytest.param({"unknown": 1}, id="unknown member"),
        pytest.param({"scope": None}, id="null scope"),
    ],
)
def test_wrong_issue_is_refused_precisely(service: Service, scope: str, wrong: dict[str, Any]) -> None:
    user = service.user(scope=scope)
    wanted = {"kind": "pat", "subject": user["user_id"], "name": "x", "scope": scope, **wrong}
    body = problem(service.call("POST", "/v1/tokens", json=wanted), 404 if "subject" in wrong else 400)
    assert body["detail"]


def test_longest_life_is_366_days(service: Service, scope: str) -> None:
    made = service.pat(scope, expires_in_seconds=366 * DAY_SECONDS)
    assert lifetime(made) == timedelta(days=366)


def test_validate_tells_a_known_token(service: Service, scope: str) -> None:
    made = service.pat(scope, audience="https://api.example")
    seen = service.validate(made["token"])
    assert (seen["valid"], seen["code"]) == (True, "valid")
    for name in ("token_id", "grant_id", "kind", "subject", "scope", "issued_at", "expires_at"):
        assert seen[name] == made[name], name
    assert seen["audience"] == ["https://api.example"]
    assert seen["ledger_seq"] >= made["ledger_seq"]
    assert "client_id" not in seen
    assert None not in seen.values()


def test_batch_answers_in_order(service: Service, scope: str) -> None:
    good, gone = service.pat(scope), service.pat(scope)
    service.done("POST", f"/v1/tokens/{gone['token_id']}/revoke", json={"reason": "unused"})
    requests = [
        {"token": good["token"]},
        {"token": "garbage"},
        {"token": gone["token"]},
        {"token": good["token"], "scope": "other:scope"},
        {"token": good["token"]},
    ]
    results = service.done("POST", "/v1/tokens/validate-batch", json={"requests": requests})["results"]
    assert [one["code"] for one in results] == ["valid", "malformed", "revoked", "insufficient_scope", "valid"]
    assert results[0]["token_id"] == good["token_id"]
    assert [one["valid"] for one in results] == [True, False, False, False, True]


def test_batch_takes_a_thousand_and_no_more(service: Service, scope: str) -> None:
    token = service.pat(scope)["token"]
    answer = service.done("POST", "/v1/tokens/validate-batch", json={"requests": [{"token": token}] * 1000})
    assert {one["code"] for one in answer["results"]} == {"valid"}
    assert len(answer["results"]) == 1000
    many = {"requests": [{"token": token}] * 1001}
    problem(service.call("POST", "/v1/tokens/validate-batch", json=many), 400)
    problem(service.call("POST", "/v1/tokens/validate-batch", json={"requests": []}), 400)


def test_forward_auth_tells_who_it_is(service: Service, scope: str) -> None:
    made = service.pat(scope)
    answer = forward(service, made["token"], scope=scope)
    assert answer.status_code == 200
    assert answer.headers["x-token-subject"] == made["subject"]
    assert answer.headers["x-token-scope"] == scope
    assert answer.headers["cache-control"] == "no-store"


def test_forward_auth_names_the_client(service: Service, scope: str) -> None:
    app = service.app(scope=scope, audience=["https://api.example"])
    token = service.grant(app)["access_token"]
    answer = forward(service, token, audience="https://api.example")
    assert answer.status_code == 200
    assert answer.headers["x-token-client"] == app.client_id
    assert answer.headers["x-token-subject"] == app.client_id


def test_forward_auth_wants_the_audience_of_a_token_that_has_one(service: Service, scope: str) -> None:
    token = service.pat(scope, audience=["https://api.example"])["token"]
    assert forward(service, token).status_code == 401
    assert forward(service, token, audience="https://other.example").status_code == 401
    assert forward(service, token, audience="https://api.example").status_code == 200


def test_forward_auth_refuses_revoked_and_foreign(service: Service, scope: str) -> None:
    made = service.pat(scope)
    problem(forward(service, made["token"], scope="other:scope"), 403, "insufficient_scope")
    service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json={"reason": "admin"})
    refused = forward(service, made["token"])
    problem(refused, 401, "invalid_token")
    assert 'error="invalid_token"' in refused.headers["www-authenticate"]


def test_rotation_overlaps_and_then_ends_the_old_token(service: Service, scope: str) -> None:
    old = service.pat(scope, audience=["https://api.example"], allowed_ips=["127.0.0.0/8"])
    path = f"/v1/tokens/{old['token_id']}/rotate"
    new = service.done("POST", path, json={"overlap_seconds": 2})
    assert new["token"] != old["token"]
    for name in ("kind", "subject", "scope"):
        assert new[name] == old[name]
    context = {"ip": "127.0.0.1"}
    assert service.code(new["token"], context=context, audience="https://api.example") == "valid"
    assert service.code(new["token"]) == "ip_not_allowed"
    until(lambda: service.code(old["token"], context=context) != "valid", seconds=5)
    assert service.code(old["token"], context=context) in {"expired", "revoked"}
    assert service.code(new["token"], context=context) == "valid"
    assert abs(lifetime(new) - lifetime(old)) <= timedelta(seconds=1)


def test_rotation_without_overlap_ends_the_old_token_at_once(service: Service, scope: str) -> None:
    old = service.pat(scope)
    service.done("POST", f"/v1/tokens/{old['token_id']}/rotate", json={"overlap_seconds": 0})
    assert service.code(old["token"]) in {"expired", "revoked"}


def test_rotation_twice_gives_whole_lives(service: Service, scope: str) -> None:
    """Who lost the answer of a rotation rotates again: the old token is there until its overlap ends. What comes of
    it lives as long as a first successor, not as long as what is left of the old one."""
    old = service.pat(scope)
    path = f"/v1/tokens/{old['token_id']}/rotate"
    for made in [service.done("POST", path, json={"overlap_seconds": 600}) for _ in range(2)]:
        assert abs(lifetime(made) - lifetime(old)) <= timedelta(seconds=1)
        again = service.done("POST", f"/v1/tokens/{made['token_id']}/rotate", json={})
        assert service.code(made["token"]) != "valid"
        assert service.code(again["token"]) == "valid"
    problem(service.call("POST", f"/v1/tokens/{made['token_id']}/rotate", json={}), 409)


@pytest.mark.parametrize("overlap", [-1, 7 * DAY_SECONDS + 1, "1", 0.5, None], ids=str)
def test_rotation_with_a_wrong_overlap_is_refused(service: Service, scope: str, overlap: Any) -> None:
    made = service.pat(scope)
    path = f"/v1/tokens/{made['token_id']}/rotate"
    problem(service.call("POST", path, json={"overlap_seconds": overlap}), 400)
    assert service.code(made["token"]) == "valid"


def test_rotation_is_for_pat_and_sat_only(service: Service) -> None:
    app = service.app()
    token_id = service.validate(service.grant(app)["access_token"])["token_id"]
    problem(service.call("POST", f"/v1/tokens/{token_id}/rotate", json={}), 400)


def test_history_holds_the_events_and_with_uses_the_uses(service: Service, scope: str) -> None:
    made = service.pat(scope)
    context = {"ip": "192.0.2.7", "user_agent": "probe/1", "method": "GET", "path": "/orders"}
    service.validate(made["token"], context=context)
    service.code(made["token"], scope="other:scope")
    service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json={"reason": "compromised"})
    service.code(made["token"])
    events = service.history(made["token_id"])
    assert [event["type"].partition("/")[0] for event in events] == ["token.issued", "token.revoked"]
    assert [event["ledger_seq"] for event in events] == sorted(event["ledger_seq"] for event in events)
    assert events[0]["ledger_seq"] == made["ledger_seq"]

    def three_uses() -> list[dict[str, Any]]:
        uses = [one for one in service.history(made["token_id"], uses="true") if one["ledger_seq"] is None]
        return uses if len(uses) >= 3 else []

    uses = until(three_uses, seconds=10, what="the uses are in the analytics store")
    assert len(uses) == 3
    times = [moment(one["occurred_at"]) for one in service.history(made["token_id"], uses="true")]
    assert times == sorted(times)
    assert "192.0.2.7" in str(uses[0])
    assert [one["ledger_seq"] for one in service.history(made["token_id"], uses="true") if one["ledger_seq"]] == [
        event["ledger_seq"] for event in events
    ]


def test_history_shows_no_secret(service: Service, scope: str) -> None:
    made = service.pat(scope)
    service.done("POST", f"/v1/tokens/{made['token_id']}/rotate", json={"overlap_seconds": 0})
    text = str(service.history(made["token_id"], uses="true"))
    assert made["token"] not in text
    assert "sealed" not in text


def test_revocation_is_answered_alike_however_often(service: Service, scope: str) -> None:
    made = service.pat(scope)
    path = f"/v1/tokens/{made['token_id']}/revoke"
    first = service.done("POST", path, json={"reason": "logout", "comment": unique("cnryname")})
    second = service.done("POST", path, json={"reason": "abuse"})
    assert first == second
    assert {"revoked_at", "ledger_seq"} <= first.keys()
    assert len(service.history(made["token_id"])) == 2


def test_twenty_concurrent_revocations_write_one_event(service: Service, scope: str) -> None:
    made = service.pat(scope)

    def revoke(_: int) -> dict[str, Any]:
        path = f"/v1/tokens/{made['token_id']}/revoke"
        return service.done("POST", path, json={"reason": "logout"})

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(revoke, range(20)))
    assert all(answer == answers[0] for answer in answers)
    assert len(service.history(made["token_id"])) == 2


@pytest.mark.parametrize("reason", ["compromised", "logout", "rotated", "admin", "abuse", "unused"])
def test_reasons_of_callers_are_taken(service: Service, scope: str, reason: str) -> None:
    made = service.pat(scope)
    service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json={"reason": reason})
    assert service.history(made["token_id"])[-1]["reason"] == reason


@pytest.mark.parametrize("reason", ["reuse_detected", "disabled", "password_changed", "client_request", "", None])
def test_reasons_of_the_service_are_refused(service: Service, scope: str, reason: str | None) -> None:
    made = service.pat(scope)
    path = f"/v1/tokens/{made['token_id']}/revoke"
    problem(service.call("POST", path, json={"reason": reason}), 400)
    assert service.code(made["token"]) == "valid"


def by_token(made: dict[str, Any]) -> dict[str, str]:
    return {"token": made["token"]}


def by_token_id(made: dict[str, Any]) -> dict[str, str]:
    return {"token_id": made["token_id"]}


def by_grant(made: dict[str, Any]) -> dict[str, str]:
    return {"grant_id": made["grant_id"]}


def by_subject(made: dict[str, Any]) -> dict[str, str]:
    return {"subject": made["subject"]}


@pytest.mark.parametrize("by", [by_token, by_token_id, by_grant, by_subject])
def test_revocations_take_each_way_to_name_it(service: Service, scope: str, by: Any) -> None:
    made = service.pat(scope)
    wanted = {**by(made), "reason": "admin"}
    dry = service.done("POST", "/v1/revocations", json={**wanted, "dry_run": True})
    assert dry["affected"] == {"grants": 1, "tokens": 1}
    assert service.code(made["token"]) == "valid"
    assert len(service.history(made["token_id"])) == 1
    done = service.done("POST", "/v1/revocations", json=wanted)
    assert done["affected"] == {"grants": 1, "tokens": 1}
    assert done["ledger_seq"] > made["ledger_seq"]
    assert service.code(made["token"]) == "revoked"


@pytest.mark.parametrize("count", [0, 2])
def test_revocations_want_exactly_one_name(service: Service, scope: str, count: int) -> None:
    made = service.pat(scope)
    names = {"token_id": made["token_id"], "grant_id": made["grant_id"]} if count else {}
    problem(service.call("POST", "/v1/revocations", json={**names, "reason": "admin"}), 400)


def test_subject_revocation_spares_what_comes_after(service: Service, scope: str) -> None:
    user = service.user(scope=scope)
    old = service.issue(user["user_id"], scope)
    service.done("POST", "/v1/revocations", json={"subject": user["username"], "reason": "admin"})
    new = service.issue(user["user_id"], scope)
    assert service.code(old["token"]) == "revoked"
    assert service.code(new["token"]) == "valid"


def test_current_state_is_shown_without_the_token(service: Service, scope: str) -> None:
    made = service.pat(scope)
    seen = service.done("GET", f"/v1/tokens/{made['token_id']}")
    assert "token" not in seen
    for name in ("token_id", "grant_id", "kind", "subject", "scope", "issued_at", "expires_at"):
        assert seen[name] == made[name]
    assert seen["status"] == "active"
    service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json={"reason": "admin"})
    assert service.done("GET", f"/v1/tokens/{made['token_id']}")["status"] == "revoked"


def test_name_of_a_token_is_shown_to_who_may_see_it(service: Service, scope: str) -> None:
    user = service.user(scope=scope)
    name = unique("cnryname")
    wanted = {"kind": "pat", "subject": user["user_id"], "name": name, "scope": scope}
    made = service.done("POST", "/v1/tokens", json=wanted)
    assert service.done("GET", f"/v1/tokens/{made['token_id']}")["name"] == name


def test_expired_token_says_so(service: Service, scope: str) -> None:
    made = service.pat(scope, expires_in_seconds=1)
    until(lambda: service.code(made["token"]) == "expired", seconds=5)
    assert service.done("GET", f"/v1/tokens/{made['token_id']}")["status"] == "expired"


def test_token_list_is_filtered_by_every_field(service: Service, scope: str) -> None:
    user = service.user(scope=scope)
    tokens = [service.issue(user["user_id"], scope) for _ in range(5)]
    service.done("POST", f"/v1/tokens/{tokens[0]['token_id']}/revoke", json={"reason": "admin"})

    def ids(**query: Any) -> set[str]:
        return {one["token_id"] for one in service.items("/v1/tokens", **query)}

    all_ids = {one["token_id"] for one in tokens}
    assert ids(subject=user["user_id"]) == all_ids
    assert ids(subject=user["user_id"], limit=2) == all_ids
    assert ids(subject=user["user_id"], status="active") == all_ids - {tokens[0]["token_id"]}
    assert ids(subject=user["user_id"], status="revoked") == {tokens[0]["token_id"]}
    assert ids(subject=user["user_id"], status="expired") == set()
    assert ids(subject=user["user_id"], kind="sat") == set()
    assert ids(grant_id=tokens[1]["grant_id"]) == {tokens[1]["token_id"]}
    app = service.app(grant_types=["client_credentials", "refresh_token"])
    service.grant(app)
    assert {one["kind"] for one in service.items("/v1/tokens", client_id=app.client_id)} == {"access", "refresh"}


def test_lists_show_each_item_once_while_others_are_added(service: Service, scope: str) -> None:
    user = service.user(scope=scope)
    before = {service.issue(user["user_id"], scope)["token_id"] for _ in range(6)}
    seen: list[str] = []
    cursor = None
    while True:
        query = {"subject": user["user_id"], "limit": 2, **({"cursor": cursor} if cursor else {})}
        page = service.done("GET", "/v1/tokens", params=query)
        assert len(page["items"]) <= 2
        seen += [one["token_id"] for one in page["items"]]
        if len(seen) <= 6:
            service.issue(user["user_id"], scope)
        cursor = page.get("next_cursor")
        if not cursor:
            break
    assert before <= set(seen)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("path", ["/v1/tokens", "/v1/clients", "/v1/users", "/v1/scopes", "/v1/audit/events"])
@pytest.mark.parametrize(
    "query",
    [{"limit": "0"}, {"limit": "1001"}, {"limit": "x"}, {"limit": ""}, {"cursor": "garbage"}, {"cursor": "a" * 5_000}],
    ids=str,
)
def test_wrong_paging_is_refused(service: Service, path: str, query: dict[str, str]) -> None:
    problem(service.call("GET", path, params=query), 400)


@pytest.mark.parametrize("path", ["/v1/tokens", "/v1/clients", "/v1/users", "/v1/audit/events"])
def test_pages_hold_as_many_as_asked(service: Service, scope: str, path: str) -> None:
    for _ in range(2):
        service.pat(scope)
        service.app()
    page = service.done("GET", path, params={"limit": 1})
    assert len(page["items"]) == 1
    assert page["next_cursor"]


def test_audit_events_are_filtered(service: Service, scope: str) -> None:
    made = service.pat(scope)
    service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json={"reason": "abuse"})

    def types(**query: Any) -> list[str]:
        return [one["type"].partition("/")[0] for one in service.items("/v1/audit/events", **query)]

    events = until(lambda: types(token_id=made["token_id"]), what="the events arrive")
    until(lambda: len(types(token_id=made["token_id"])) == 2, what="both events arrive")
    assert events[0] == "token.issued"
    assert "user.registered" in types(subject=made["subject"])
    after = list(service.items("/v1/audit/events", token_id=made["token_id"], after_seq=made["ledger_seq"]))
    assert [one["type"].partition("/")[0] for one in after] == ["token.revoked"]
    span = {"from": made["issued_at"], "to": made["issued_at"]}
    assert all(one["ledger_seq"] for one in service.items("/v1/audit/events", **span))
