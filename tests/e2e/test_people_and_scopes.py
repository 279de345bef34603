"""Users, scopes and what they imply, idempotency keys, and the shape of every error."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.running import CANARY_NAME, CANARY_PASSWORD, CANARY_USERNAME, Service, problem, unique, until


def test_user_is_shown_as_registered_without_password(service: Service) -> None:
    scope = service.scope()
    wanted = {
        "username": unique(CANARY_USERNAME),
        "kind": "person",
        "password": unique(CANARY_PASSWORD),
        "display_name": unique(CANARY_NAME),
        "scope": scope,
    }
    made = service.done("POST", "/v1/users", json=wanted)
    assert made["user_id"].startswith("usr_")
    assert made["ledger_seq"] > 0
    seen = service.done("GET", f"/v1/users/{made['user_id']}")
    assert {name: seen[name] for name in ("username", "kind", "display_name", "scope")} == {
        name: wanted[name] for name in ("username", "kind", "display_name", "scope")
    }
    assert not {"password", "password_hash"} & (seen.keys() | made.keys())


@pytest.mark.parametrize(
    "wrong",
    [
        {"username": ""},
        {"username": "a" * 10_000},
        {"username": "a\0b"},
        {"username": "a\nb"},
        {"username": None},
        {"username": 1},
        {"kind": "robot"},
        {"scope": ["a"]},
        {"scope": 'a"b'},
        {"password": ""},
        {"password": "a" * 100_000},
        {"display_name": "a" * 10_000},
        {"admin": True},
    ],
    ids=lambda wrong: str(wrong)[:30],
)
def test_wrong_user_is_refused_precisely(service: Service, wrong: dict[str, Any]) -> None:
    wanted = {"username": unique(CANARY_USERNAME), "kind": "person", "scope": "", **wrong}
    answer = service.call("POST", "/v1/users", json=wanted)
    assert problem(answer, answer.status_code)["detail"]
    assert answer.status_code in {400, 413}


@pytest.mark.parametrize("method", ["POST", "PATCH"])
@pytest.mark.parametrize(
    ("password", "told"),
    [("cnrypas", "8 to 1024"), (" " * 12, "blanks alone"), ("cnrypass\0long", "control characters")],
    ids=["short", "blanks", "NUL"],
)
def test_password_that_is_none_is_refused_in_words(service: Service, method: str, password: str, told: str) -> None:
    path, fields = "/v1/users", {"username": unique(CANARY_USERNAME), "kind": "person"}
    if method == "PATCH":
        path, fields = f"/v1/users/{service.user()['user_id']}", {}
    refused = problem(service.call(method, path, json={**fields, "password": password}), 400, "invalid_request")
    assert told in refused["detail"]
    assert password not in str(refused)


def test_service_user_has_no_password(service: Service) -> None:
    wanted = {"username": unique(CANARY_USERNAME), "kind": "service", "scope": "", "password": "cnrypass-long-enough"}
    problem(service.call("POST", "/v1/users", json=wanted), 400)


def test_two_users_cannot_take_one_name(service: Service) -> None:
    """Twenty at once: one has it."""
    wanted = {"username": unique(CANARY_USERNAME), "kind": "person", "scope": ""}
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: service.call("POST", "/v1/users", json=wanted), range(20)))
    assert sorted(answer.status_code for answer in answers) == [201, *[409] * 19]
    problem(next(answer for answer in answers if answer.status_code == 409), 409)


def test_disabling_a_user_ends_its_tokens_for_good(service: Service) -> None:
    scope = service.scope()
    user = service.user(scope=scope)
    made = service.issue(user["user_id"], scope)
    assert service.done("DELETE", f"/v1/users/{user['user_id']}")["ledger_seq"] > made["ledger_seq"]
    assert service.code(made["token"]) in {"revoked", "subject_disabled"}
    wanted = {"kind": "pat", "subject": user["user_id"], "name": "x", "scope": scope}
    refused = service.call("POST", "/v1/tokens", json=wanted)
    assert 400 <= refused.status_code < 500
    problem(service.call("PATCH", f"/v1/users/{user['user_id']}", json={"display_name": "x"}), 409)


def test_changed_password_ends_the_users_tokens(service: Service) -> None:
    scope = service.scope()
    user = service.user(scope=scope, password=unique(CANARY_PASSWORD))
    old = service.issue(user["user_id"], scope)
    path = f"/v1/users/{user['user_id']}"
    service.done("PATCH", path, json={"display_name": unique(CANARY_NAME)})
    assert service.code(old["token"]) == "valid"
    service.done("PATCH", path, json={"password": unique(CANARY_PASSWORD)})
    assert service.code(old["token"]) == "revoked"
    assert service.code(service.issue(user["user_id"], scope)["token"]) == "valid"


def test_subject_cannot_be_given_more_than_it_has(service: Service) -> None:
    have, lack = service.scope(), service.scope()
    user = service.user(scope=have)
    wanted = {"kind": "pat", "subject": user["user_id"], "name": "x", "scope": lack}
    problem(service.call("POST", "/v1/tokens", json=wanted), 400, "invalid_scope")


def test_no_scope_asked_gives_all_that_the_subject_has(service: Service) -> None:
    scopes = {service.scope(), service.scope()}
    user = service.user(scope=" ".join(scopes))
    made = service.done("POST", "/v1/tokens", json={"kind": "pat", "subject": user["user_id"], "name": "x"})
    assert set(made["scope"].split()) == scopes


def test_implied_scopes_are_expanded_at_issue_and_recorded(service: Service) -> None:
    """What is implied later is not in a token issued before."""
    leaf = service.scope()
    middle = service.scope(implies=[leaf])
    root = service.scope(implies=[middle])
    made = service.pat(root)
    assert set(made["scope"].split()) == {root, middle, leaf}
    assert service.code(made["token"], scope=leaf) == "valid"
    late = service.scope()
    service.call("POST", "/v1/scopes", json={"name": root, "description": "x", "implies": [middle, late]})
    assert service.code(made["token"], scope=late) == "insufficient_scope"
    app = service.app(scope=root)
    assert leaf in service.grant(app)["scope"].split()
    assert service.grant(app, scope=leaf)["scope"] == leaf


def test_scopes_are_listed_as_registered(service: Service) -> None:
    leaf = service.scope()
    name = service.scope(implies=[leaf], audience=["https://api.example"])
    seen = next(one for one in service.items("/v1/scopes") if one["name"] == name)
    assert seen["implies"] == [leaf]
    assert seen["audience"] == ["https://api.example"]
    assert seen["description"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "a b"},
        {"name": ""},
        {"name": 'a"b'},
        {"name": "a\\b"},
        {"name": "\u00e4"},
        {"name": "a" * 10_000},
        {"name": "ledger:admin"},
        {"name": "ledger:mine"},
        {"implies": ["ledger:admin"]},
        {"implies": ["a b"]},
        {"description": 1},
    ],
    ids=str,
)
def test_wrong_scope_is_refused_precisely(service: Service, wrong: dict[str, Any]) -> None:
    """Source: RFC 6749 §3.3 for the letters. `ledger:*` is ours."""
    wanted = {"name": unique("scope"), "description": "x", **wrong}
    answer = service.call("POST", "/v1/scopes", json=wanted)
    assert answer.status_code in {400, 409}
    problem(answer, answer.status_code)


def test_circle_of_implications_ends(service: Service) -> None:
    one = service.scope()
    two = service.scope(implies=[one])
    answer = service.call("POST", "/v1/scopes", json={"name": one, "description": "x", "implies": [two]})
    if answer.is_success:
        assert set(service.pat(one)["scope"].split()) == {one, two}
    else:
        assert answer.status_code in {400, 409}


# Idempotency keys


def creations(service: Service) -> dict[str, tuple[str, dict[str, Any]]]:
    user = service.user(scope="")
    token = service.pat()
    app = service.app()
    return {
        "client": ("/v1/clients", {"client_name": "once"}),
        "user": ("/v1/users", {"username": unique(CANARY_USERNAME), "kind": "person", "scope": ""}),
        "scope": ("/v1/scopes", {"name": unique("scope"), "description": "x"}),
        "token": ("/v1/tokens", {"kind": "pat", "subject": user["user_id"], "name": "x", "scope": ""}),
        "secret": (f"/v1/clients/{app.client_id}/secrets", {"overlap_seconds": 60}),
        "rotate": (f"/v1/tokens/{token['token_id']}/rotate", {"overlap_seconds": 60}),
    }


CREATIONS = ["client", "user", "scope", "token", "secret", "rotate"]


def keyed(service: Service, what: str, body: dict[str, Any], key: str, path: str = "") -> Any:
    return service.call("POST", path or creations(service)[what][0], json=body, headers={"Idempotency-Key": key})


@pytest.mark.parametrize("what", CREATIONS)
def test_idempotency_key_gets_the_same_answer(service: Service, what: str) -> None:
    path, body = creations(service)[what]
    key = unique("key")
    first = keyed(service, what, body, key, path)
    assert first.status_code == 201
    second = keyed(service, what, body, key, path)
    assert (second.status_code, second.json()) == (201, first.json())


@pytest.mark.parametrize("what", CREATIONS)
def test_idempotency_key_with_another_body_is_refused(service: Service, what: str) -> None:
    path, body = creations(service)[what]
    key = unique("key")
    assert keyed(service, what, body, key, path).status_code == 201
    other = {**body, {"scope": "description", "token": "name"}.get(what, next(iter(body))): "other"}
    if what in {"secret", "rotate"}:
        other = {"overlap_seconds": 61}
    problem(keyed(service, what, other, key, path), 422)


def test_idempotency_key_is_the_callers_own(service: Service) -> None:
    key = unique("key")
    body = {"client_name": "mine"}
    ours = keyed(service, "client", body, key, "/v1/clients").json()
    headers = {"Idempotency-Key": key}
    other = service.bearer("ledger:clients")
    theirs = service.call("POST", "/v1/clients", token=other, json=body, headers=headers).json()
    assert ours["client_id"] != theirs["client_id"]


def test_idempotency_key_in_a_race_creates_once(service: Service) -> None:
    """A loser may be told to wait, but never gets another client."""
    key, name = unique("key"), unique("raced")

    def create(_: int) -> Any:
        return keyed(service, "client", {"client_name": name}, key, "/v1/clients")

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(create, range(20)))
    assert {answer.status_code for answer in answers} <= {201, 409, 503}
    made = {answer.json()["client_id"] for answer in answers if answer.status_code == 201}
    assert len(made) == 1
    assert keyed(service, "client", {"client_name": name}, key, "/v1/clients").json()["client_id"] in made
    assert len([one for one in service.items("/v1/clients", limit=1000) if one["client_name"] == name]) == 1


@pytest.mark.parametrize("key", ["", "a" * 1_000, "a\tb"], ids=["empty", "long", "tab"])
def test_wrong_idempotency_key_is_refused(service: Service, key: str) -> None:
    problem(keyed(service, "client", {"client_name": "x"}, key, "/v1/clients"), 400)


def test_refused_request_does_not_spend_its_key(service: Service) -> None:
    key = unique("key")
    problem(keyed(service, "client", {"grant_types": ["made-up"]}, key, "/v1/clients"), 400)
    answer = keyed(service, "client", {"client_name": "x"}, key, "/v1/clients")
    assert answer.status_code in {201, 422}


# Errors


BROKEN_BODIES = {
    "empty": b"",
    "not json": b"{",
    "array": b"[]",
    "null": b"null",
    "number": b"1",
    "not utf-8": b'{"a": "\xff"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 50_000 + b"]" * 50_000,
    "repeated key": b'{"name": "a", "name": "b"}',
    "lone surrogate": b'{"username": "\\ud800", "kind": "person", "scope": ""}',
    "huge number": b'{"expires_in_seconds": 1e400}',
    "nan": b'{"expires_in_seconds": NaN}',
    "trailing": b"{} {}",
}
JSON_POSTS = [
    "/v1/clients",
    "/v1/users",
    "/v1/scopes",
    "/v1/tokens",
    "/v1/tokens/validate",
    "/v1/tokens/validate-batch",
    "/v1/revocations",
]


@pytest.mark.parametrize("path", JSON_POSTS)
@pytest.mark.parametrize("body", BROKEN_BODIES.values(), ids=BROKEN_BODIES.keys())
def test_broken_body_is_refused_with_a_problem(service: Service, path: str, body: bytes) -> None:
    answer = service.call("POST", path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in {400, 413}, answer.text
    problem(answer, answer.status_code)


@pytest.mark.parametrize("path", JSON_POSTS)
def test_body_that_is_not_json_is_refused(service: Service, path: str) -> None:
    """A form from another site is never taken for JSON: it needs no preflight."""
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = service.call("POST", path, content=b"{}", headers={"Content-Type": content_type})
        assert answer.status_code in {400, 415}
        problem(answer, answer.status_code)


@pytest.mark.parametrize("path", JSON_POSTS)
def test_body_that_is_too_large_is_refused(service: Service, path: str) -> None:
    body = b'{"a": "' + b"a" * 5_000_000 + b'"}'
    answer = service.call("POST", path, content=body, headers={"Content-Type": "application/json"})
    problem(answer, 413)


def test_unknown_path_and_method_are_problems(service: Service) -> None:
    problem(service.call("GET", "/v1/nothing"), 404)
    answer = service.call("DELETE", "/v1/clients")
    problem(answer, 405)
    assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/tokens/%00",
        "/v1/tokens/..%2f..",
        "/v1/tokens/%ff",
        "/v1/tokens/" + "a" * 5_000,
        "/v1/users/*",
        "/v1/users/>",
    ],
    ids=lambda path: path[:20],
)
def test_strange_ids_are_not_found(service: Service, path: str) -> None:
    answer = service.raw_call("GET", path, [("Authorization", f"Bearer {service.admin_token}")])
    assert answer.status_code in {400, 404, 414}, answer.text


@pytest.mark.parametrize(
    "query",
    [
        "type=nonsense%00",
        "from=yesterday",
        "to=9999999999999",
        "after_seq=-1",
        "after_seq=x",
        "after_seq=" + "9" * 40,
        "from=2026-01-01",
        "unknown=1",
        "type=a&type=b",
    ],
)
def test_wrong_audit_filter_is_refused(service: Service, query: str) -> None:
    answer = service.call("GET", f"/v1/audit/events?{query}")
    problem(answer, 400)


def test_request_id_is_answered_and_a_forged_one_is_harmless(service: Service) -> None:
    body = problem(service.call("GET", "/v1/tokens/tok_x"), 404)
    assert body["request_id"]
    answer = service.call("GET", "/v1/tokens/tok_x", headers={"X-Request-Id": "a" * 5_000})
    assert len(problem(answer, 404)["request_id"]) < 200


def test_every_write_answers_its_sequence(service: Service) -> None:
    """`min_seq` of that answer is then enough to read one's own write."""
    app = service.app()
    scope = service.scope()
    user = service.user(scope=scope)
    token = service.issue(user["user_id"], scope)
    answers = [
        app.metadata,
        user,
        token,
        service.done("POST", "/v1/scopes", json={"name": unique("scope"), "description": "x"}),
        service.done("PATCH", f"/v1/clients/{app.client_id}", json={"client_name": "y"}),
        service.done("PATCH", f"/v1/users/{user['user_id']}", json={"display_name": unique(CANARY_NAME)}),
        service.done("POST", f"/v1/clients/{app.client_id}/secrets", json={}),
        service.done("POST", f"/v1/tokens/{token['token_id']}/rotate", json={}),
        service.done("POST", f"/v1/tokens/{token['token_id']}/revoke", json={"reason": "admin"}),
        service.done("POST", "/v1/revocations", json={"subject": user["user_id"], "reason": "admin"}),
        service.done("DELETE", f"/v1/clients/{app.client_id}"),
        service.done("DELETE", f"/v1/users/{user['user_id']}"),
    ]
    sequences = [answer["ledger_seq"] for answer in answers]
    assert all(isinstance(seq, int) and seq > 0 for seq in sequences)
    assert sequences[3:] == sorted(sequences[3:])
    known = service.validate(token["token"], min_seq=sequences[-1])
    assert known["ledger_seq"] >= sequences[-1]


# Erasure


def everything_readable(service: Service, user_id: str, token_id: str) -> str:
    """What the API says about a user anywhere, in one string."""
    said = [
        service.call("GET", f"/v1/users/{user_id}").text,
        service.call("GET", f"/v1/tokens/{token_id}").text,
        json.dumps(list(service.items("/v1/users", limit=1000))),
        json.dumps(list(service.items("/v1/tokens", subject=user_id))),
        json.dumps(service.history(token_id, uses="true")),
        json.dumps(list(service.items("/v1/audit/events", subject=user_id))),
    ]
    return "\n".join(said)


def test_erased_user_is_readable_nowhere(service: Service) -> None:
    scope = service.scope()
    canary = {
        "username": unique(CANARY_USERNAME),
        "display_name": unique(CANARY_NAME),
        "email": unique(CANARY_NAME) + "@mail.example",
        "password": unique(CANARY_PASSWORD),
    }
    user = service.user(scope=scope, **canary)
    token_name, comment = unique(CANARY_NAME), unique(CANARY_NAME)
    wanted = {"kind": "pat", "subject": user["user_id"], "name": token_name, "scope": scope}
    made = service.done("POST", "/v1/tokens", json=wanted)
    revoked = {"reason": "admin", "comment": comment}
    service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json=revoked)
    before = everything_readable(service, user["user_id"], made["token_id"])
    assert canary["username"] in before
    assert canary["display_name"] in before
    assert canary["email"] in before
    done = service.done("DELETE", f"/v1/users/{user['user_id']}", params={"erase": "true"})
    assert done["ledger_seq"] > 0
    assert (done["status"], done["has_password"]) == ("erased", False)
    everything = [canary["username"], canary["display_name"], canary["email"], token_name, comment]

    def gone() -> bool:
        after = everything_readable(service, user["user_id"], made["token_id"])
        return not any(word in after or base64.b64encode(word.encode()).decode() in after for word in everything)

    until(gone, seconds=5, what="nothing personal is readable")
    types = [one["type"].partition("/")[0] for one in service.items("/v1/audit/events", subject=user["user_id"])]
    assert "user.registered" in types
    until(
        lambda: (
            "subject.erased"
            in [one["type"].partition("/")[0] for one in service.items("/v1/audit/events", subject=user["user_id"])]
        ),
        what="the erasure itself is in the log",
    )


def test_username_of_an_erased_user_is_found_no_more(service: Service) -> None:
    scope = service.scope()
    user = service.user(scope=scope)
    service.done("DELETE", f"/v1/users/{user['user_id']}", params={"erase": "true"})
    wanted = {"kind": "pat", "subject": user["username"], "name": "x", "scope": scope}
    refused = service.call("POST", "/v1/tokens", json=wanted)
    assert 400 <= refused.status_code < 500
    assert user["username"] not in refused.text


def test_disabled_user_can_be_erased_later(service: Service) -> None:
    user = service.user(display_name=unique(CANARY_NAME))
    service.done("DELETE", f"/v1/users/{user['user_id']}")
    service.done("DELETE", f"/v1/users/{user['user_id']}", params={"erase": "true"})
    assert user["display_name"] not in service.call("GET", f"/v1/users/{user['user_id']}").text
