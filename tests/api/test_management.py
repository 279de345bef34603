"""What the management API does beyond issuing and revoking: merge patches, paging, keys, old tokens, numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.registry import profile_of, read_sealed
from service.runtime import Runtime
from service.tokens import new_id
from tests.api.conftest import LongExpired
from tests.running import CANARY_NAME, CANARY_USERNAME, Service, problem, unique, until


def patched(service: Service, path: str, **members: Any) -> dict[str, Any]:
    return service.done("PATCH", path, json=members)


# Merge patches


def test_patch_changes_what_it_names_and_null_resets(service: Service) -> None:
    app = service.app(scope="a", audience="https://api.example", access_token_ttl_seconds=60)
    path = f"/v1/clients/{app.client_id}"
    assert patched(service, path, scope="a b")["access_token_ttl_seconds"] == 60
    seen = patched(service, path, access_token_ttl_seconds=None, audience=None)
    assert (seen["access_token_ttl_seconds"], seen["audience"]) == (3600, [service.issuer])
    assert (seen["scope"], seen["access_token_format"]) == ("a b", "opaque")
    assert service.done("GET", path) == seen


def test_patch_of_nothing_is_no_event(service: Service) -> None:
    app = service.app()
    path = f"/v1/clients/{app.client_id}"
    assert patched(service, path)["ledger_seq"] == patched(service, path, scope="")["ledger_seq"]
    assert service.done("GET", path)["ledger_seq"] == app.metadata["ledger_seq"]


def test_patch_takes_the_media_type_of_merge_patches(service: Service) -> None:
    app = service.app()
    path = f"/v1/clients/{app.client_id}"
    headers = {"Content-Type": "application/merge-patch+json"}
    answer = service.call("PATCH", path, content=b'{"client_name": "b"}', headers=headers)
    assert (answer.status_code, answer.json()["client_name"]) == (200, "b")
    headers = {"Content-Type": "application/json-patch+json"}
    problem(service.call("PATCH", path, content=b"[]", headers=headers), 415)


def test_profile_is_changed_and_emptied(service: Service) -> None:
    user = service.user(display_name=unique(CANARY_NAME), email=f"{unique(CANARY_NAME)}@mail.example")
    path = f"/v1/users/{user['user_id']}"
    name = unique(CANARY_NAME)
    seen = patched(service, path, display_name=name)
    assert (seen["display_name"], seen["email"], seen["username"]) == (name, user["email"], user["username"])
    seen = patched(service, path, email=None)
    assert (seen["display_name"], "email" in seen) == (name, False)
    assert service.done("GET", path) == seen
    for change in ({"display_name": "a\u0000"}, {"email": "nobody"}, {"username": "other"}, {"kind": "service"}):
        problem(service.call("PATCH", path, json=change), 400)


def test_what_was_disabled_is_disabled_again_by_the_same_answer(service: Service) -> None:
    scope = service.scope()
    for path in (
        f"/v1/clients/{service.app().client_id}",
        f"/v1/users/{service.user()['user_id']}",
        f"/v1/scopes/{scope}",
    ):
        first = service.done("DELETE", path)
        assert first["status"] == "disabled"
        assert service.done("DELETE", path) == first
        problem(service.call("PATCH", path, json={}), 409, "ended")


def test_scope_with_slashes_is_changed_and_disabled(service: Service) -> None:
    name = service.scope(f"https://scope.example/{unique('s')}/read")
    path = "/v1/scopes/" + name.replace("%", "%25").replace("/", "%2F").replace(":", "%3A")
    assert patched(service, path, description="new", implies=["other"])["implies"] == ["other"]
    assert patched(service, path, implies=None)["implies"] == []
    user = service.user(scope=name)
    token = service.issue(user["user_id"], name)["token"]
    assert service.done("DELETE", path)["name"] == name
    assert service.code(token, scope=name) == "valid"
    wanted = {"kind": "pat", "subject": user["user_id"], "name": "x", "scope": name}
    problem(service.call("POST", "/v1/tokens", json=wanted), 400, "invalid_scope")
    problem(
        service.call("POST", "/v1/users", json={"username": unique(CANARY_USERNAME), "kind": "person", "scope": name}),
        400,
    )
    problem(service.call("DELETE", "/v1/scopes/no%2Fsuch"), 404)
    problem(service.call("DELETE", "/v1/scopes/" + "a" * 3_000), 404)


# Lists and histories


@pytest.mark.parametrize("path", ["/v1/clients", "/v1/users", "/v1/scopes", "/v1/tokens", "/v1/audit/events"])
def test_cursor_of_one_list_is_none_of_another(service: Service, path: str) -> None:
    service.pat()
    service.app()
    page = service.done("GET", "/v1/tokens", params={"limit": 1, "kind": "pat"})
    if path != "/v1/tokens":
        problem(service.call("GET", path, params={"cursor": page["next_cursor"]}), 400)
    problem(service.call("GET", path, params={"cursor": page["next_cursor"][:-1]}), 400)
    service.app()
    page = service.done("GET", "/v1/clients", params={"limit": 1})
    problem(service.call("GET", "/v1/tokens", params={"cursor": page["next_cursor"]}), 400)


@pytest.mark.parametrize("uses", ["true", "false"])
def test_history_in_pages_is_the_history_as_a_whole(service: Service, uses: str) -> None:
    made = service.pat()
    for number in range(4):
        service.validate(made["token"], context={"path": f"/{number}"})
    service.done("POST", f"/v1/tokens/{made['token_id']}/rotate", json={"overlap_seconds": 600})
    service.validate(made["token"])
    service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json={"reason": "logout", "comment": "gone"})
    service.validate(made["token"])
    wanted = 9 if uses == "true" else 3
    whole = until(
        lambda: found if len(found := service.history(made["token_id"], uses=uses)) == wanted else None,
        what="all uses are there",
    )
    for limit in (1, 2, 3, 4, 8, 9):
        assert service.history(made["token_id"], uses=uses, limit=limit) == whole
    events = [one for one in whole if one["ledger_seq"] is not None]
    assert [one["type"] for one in events] == ["token.issued", "token.superseded", "token.revoked"]
    assert events[-1]["comment"] == "gone"
    assert all(one.keys() >= {"occurred_at", "recorded_at", "by"} for one in whole)
    assert "sha256" not in str(whole)


def test_history_of_client_credentials_begins_with_the_issue(service: Service) -> None:
    """It stands on the client's subject, not on the grant's."""
    app = service.app()
    token = service.grant(app)["access_token"]
    token_id = service.validate(token)["token_id"]
    service.done("POST", f"/v1/tokens/{token_id}/revoke", json={"reason": "abuse"})
    events = service.history(token_id)
    assert [one["type"] for one in events] == ["token.issued", "token.revoked"]
    assert events[0]["client_id"] == app.client_id


def test_spent_refresh_token_is_neither_active_nor_revoked(service: Service) -> None:
    app = service.app(grant_types=["client_credentials", "refresh_token"])
    first = service.grant(app)
    refreshed = service.refresh(app, first["refresh_token"]).json()
    assert service.code(refreshed["access_token"]) == "valid"  # which waits until the view knows it
    tokens = list(service.items("/v1/tokens", client_id=app.client_id, kind="refresh"))
    assert sorted(one["status"] for one in tokens) == ["active", "spent"]
    dry = {"client_id": app.client_id, "reason": "admin", "dry_run": True}
    assert service.done("POST", "/v1/revocations", json=dry)["affected"] == {"grants": 1, "tokens": 3}


def test_second_broad_revocation_ends_nothing_more(service: Service) -> None:
    app = service.app()
    for _ in range(3):
        assert service.code(service.grant(app)["access_token"]) == "valid"
    wanted = {"client_id": app.client_id, "reason": "abuse"}
    first = service.done("POST", "/v1/revocations", json=wanted)
    assert first["affected"] == {"grants": 3, "tokens": 3}
    assert service.code(service.grant(app)["access_token"]) == "valid"
    assert service.done("POST", "/v1/revocations", json={**wanted, "dry_run": True})["affected"]["tokens"] == 1
    assert service.done("POST", "/v1/revocations", json=wanted)["affected"] == {"grants": 1, "tokens": 1}
    assert service.done("POST", "/v1/revocations", json=wanted)["affected"] == {"grants": 0, "tokens": 0}


def test_lists_take_a_username_where_they_take_a_user_id(service: Service) -> None:
    scope = service.scope()
    user = service.user(scope=scope)
    made = service.issue(user["user_id"], scope)
    assert [one["token_id"] for one in service.items("/v1/tokens", subject=user["username"])] == [made["token_id"]]
    until(lambda: len(list(service.items("/v1/audit/events", subject=user["username"]))) == 3)
    for path in ("/v1/tokens", "/v1/audit/events"):
        assert service.done("GET", path, params={"subject": unique(CANARY_USERNAME)})["items"] == []


# Tokens that have left the view


def test_token_that_has_left_the_view_is_shown_from_analytics(service: Service, long_expired: LongExpired) -> None:
    path = f"/v1/tokens/{long_expired.token_id}"
    seen = until(lambda: answer if (answer := service.call("GET", path)).status_code == 200 else None).json()
    assert (seen["status"], seen["grant_id"], seen["ledger_seq"]) == (
        "expired",
        long_expired.grant_id,
        long_expired.seq,
    )
    assert [(one["type"], one["ledger_seq"]) for one in service.history(long_expired.token_id)] == [
        ("token.issued", long_expired.seq)
    ]
    assert "sha256" not in json.dumps(service.history(long_expired.token_id))


def test_token_that_never_was_is_not_found(service: Service) -> None:
    for path in ("", "/history"):
        problem(service.call("GET", f"/v1/tokens/{new_id('tok')}{path}"), 404)


# Erasure


async def test_erasure_reaches_the_keys_that_other_workers_hold(service: Service, runtime: Runtime) -> None:
    """This process has read the profile, and so has the key in memory."""
    user_id = service.user(display_name=unique(CANARY_NAME))["user_id"]
    user = runtime.view.user(user_id)
    assert user is not None
    assert await profile_of(runtime, user) is not None
    sealed = await runtime.subject_keys.seal(user_id, "a name", "token name")
    assert await read_sealed(runtime, user_id, sealed, "token name") == "a name"
    seq = service.done("DELETE", f"/v1/users/{user_id}", params={"erase": "true"})["ledger_seq"]
    await runtime.applied(seq)
    assert await read_sealed(runtime, user_id, sealed, "token name") is None
    assert await runtime.subject_keys.unseal(user_id, sealed, "token name") is None
    assert await runtime.subject_keys._bucket.get(user_id) is None


# Keys


def test_rotated_key_signs_and_the_old_one_stays(service: Service) -> None:
    before = {key["kid"]: key for key in service.done("GET", "/v1/keys")["items"]}
    done = service.done("POST", "/v1/keys/rotate", json={"alg": "EdDSA"})
    after = {key["kid"]: key for key in service.done("GET", "/v1/keys")["items"]}
    assert before[done["retired_kid"]]["state"] == "active"
    assert (after[done["retired_kid"]]["state"], after[done["kid"]]["state"]) == ("retired", "active")
    assert after[done["retired_kid"]]["remove_at"] > after[done["kid"]]["activated_at"]
    kids = {key["kid"] for key in service.http.get("/oauth2/jwks").json()["keys"]}
    assert {done["kid"], done["retired_kid"]} <= kids
    problem(service.call("POST", "/v1/keys/rotate", json={"alg": "RS256"}), 400)
    problem(service.call("POST", "/v1/keys/rotate", token=service.bearer("ledger:audit")), 403)


# Queries


@pytest.mark.parametrize(
    "target",
    [
        "/v1/clients?no_such=1",
        "/v1/clients?limit=1&limit=2",
        "/v1/clients/cli_x?x=",
        "/v1/users?limit=%ff",
        "/v1/tokens?status=gone",
        "/v1/tokens?limit=+1",
        "/v1/audit/events?type=no.such",
        "/v1/audit/events?from=1700000000",
    ],
)
def test_query_that_does_not_fit_is_refused(service: Service, target: str) -> None:
    assert problem(service.call("GET", target), 400)["detail"]


def test_range_of_the_audit_begins_with_its_first_time_and_ends_before_its_last(service: Service) -> None:
    seq = service.app().metadata["ledger_seq"]
    found = until(lambda: list(service.items("/v1/audit/events", after_seq=seq - 1, type="client.registered")))[0]
    assert found["ledger_seq"] == seq
    for name, expected in (("from", [seq]), ("to", [])):
        span = {"type": "client.registered", "after_seq": seq - 1, name: found["recorded_at"]}
        assert [one["ledger_seq"] for one in service.items("/v1/audit/events", **span)][:1] == expected


# Numbers


def number(text: str, name: str, **labels: str) -> float:
    """The sum of the samples that have the labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    samples = (line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] == name)
    return sum(float(line.rpartition(" ")[2]) for line in samples if all(one in line for one in wanted))


def test_metrics_count_over_all_workers_and_name_nobody(service: Service) -> None:
    made = service.pat()
    before = service.http.get("/metrics").text
    for _ in range(10):
        with service.caller() as http:
            headers = {"Authorization": f"Bearer {service.admin_token}"}
            assert http.post("/v1/tokens/validate", json={"token": made["token"]}, headers=headers).status_code == 200
            assert http.get(f"/v1/tokens/{made['token_id']}", headers=headers).status_code == 200
    route = {"route": "/v1/tokens/{token_id}", "method": "GET", "status": "200"}
    counted = (
        ("token_ledger_validations_total", {"code": "valid"}),
        ("token_ledger_request_seconds_count", route),
    )

    def grown() -> bool:
        text = service.http.get("/metrics").text
        return all(number(text, name, **labels) - number(before, name, **labels) >= 10 for name, labels in counted)

    until(grown, what="every worker has handed its numbers over")
    text = service.http.get("/metrics").text
    bucket = {**route, "le": "+Inf"}
    assert number(text, "token_ledger_request_seconds_bucket", **bucket) == number(text, *counted[1][:1], **route)
    assert number(text, "token_ledger_view_position") >= made["ledger_seq"]
    assert number(text, "token_ledger_signing_key_age_seconds", alg="EdDSA") > 0
    for name in ("appended_events_total", "append_conflicts_total", "uses_lost_total", "uses_waiting"):
        assert f"\ntoken_ledger_{name}" in text
    for secret in (made["token"], made["token_id"], made["subject"], "usr_", "cli_", "tok_", "grt_", "127.0.0.1"):
        assert secret not in text


def test_readiness_says_what_it_looked_at(service: Service) -> None:
    body = service.http.get("/health/ready").json()
    assert body["status"] == "ready"
    assert {"nats", "view", "signing_key", "analytics"} <= body["checks"].keys()
    assert all(check["ok"] for check in body["checks"].values())
    assert body["checks"]["view"]["age_seconds"] < 5
