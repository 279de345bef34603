"""A stolen signing key: from one call on nothing that it signed is good, wherever one asks.

Requirement: issue "People sign in", compromised keys.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import jwt
import pytest
from joserfc.jwk import KeySet

from tests.people import Browser, flow, person, redeem, web_app
from tests.running import App, Service, StartService, problem, until

MICROSECOND = timedelta(microseconds=1)


@pytest.fixture(scope="module")
def service(service_with: StartService) -> Service:
    """Of its own: whoever else has a JWT would lose it."""
    made = service_with(signing_algorithms="EdDSA,ES256")
    until(lambda: len(keys_of(made, "id")) > 0, what="the key for ID tokens is made in the background")
    return made


def keys_of(service: Service, purpose: str = "access", alg: str = "", state: str = "active") -> list[str]:
    return [
        key["kid"]
        for key in service.done("GET", "/v1/keys")["items"]
        if (key["purpose"], key["state"]) == (purpose, state) and alg in key["alg"]
    ]


def listed(service: Service) -> set[str]:
    return {key["kid"] for key in service.http.get("/oauth2/jwks").json()["keys"]}


def kid_of(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


def revoke(service: Service, **asked: Any) -> dict[str, Any]:
    return service.done("POST", "/v1/keys/rotate", json={"now": True, "revoke": True, **asked})


def jwt_app(service: Service, **metadata: Any) -> App:
    granted = ["client_credentials", "refresh_token"]
    return service.app(access_token_format="jwt", grant_types=granted, **metadata)


def status_of(service: Service, token: str, path: str) -> int:
    return service.raw_call("GET", path, [("Authorization", f"Bearer {token}")]).status_code


def test_all_that_a_revoked_key_signed_is_refused_everywhere_at_once(service: Service) -> None:
    app = jwt_app(service, scope="ledger:audit")
    first, opaque = service.grant(app), service.grant(service.app())["access_token"]
    token = first["access_token"]
    checker = service.app(may_introspect=True)
    known = service.validate(token)
    assert known["valid"]
    assert status_of(service, token, "/v1/keys") == 200
    [old] = keys_of(service, alg="EdDSA")
    assert kid_of(token) == old
    done = revoke(service)
    assert (done["retired_kid"], done["revoked_kids"]) == (old, [old])
    assert old not in listed(service)
    assert done["kid"] in listed(service)
    for _ in range(8):  # fresh connections reach every worker
        with service.caller() as http:
            answer = http.post(
                "/v1/tokens/validate",
                json={"token": token},
                headers={"Authorization": f"Bearer {service.admin_token}"},
            )
        assert answer.json()["code"] == "revoked"
    assert service.introspect(checker, token) == {"active": False}
    for path in ("/v1/keys", "/v1/forward-auth"):
        assert status_of(service, token, path) == 401
    shown = service.done("GET", f"/v1/tokens/{known['token_id']}")
    assert (shown["status"], shown["reason"]) == ("revoked", "compromised")
    # What it did not sign lives on, and so does the chain that its tokens belong to.
    assert service.code(opaque) == "valid"
    successor = service.refresh(app, first["refresh_token"]).json()
    assert kid_of(successor["access_token"]) == done["kid"]
    assert service.code(successor["access_token"]) == "valid"
    KeySet.import_key_set(service.http.get("/oauth2/jwks").json())


def test_revoked_key_is_explained_and_was_good_until_then(service: Service) -> None:
    token = service.grant(jwt_app(service))["access_token"]
    token_id = service.validate(token)["token_id"]
    seq = revoke(service)["ledger_seq"]
    now = service.done("GET", f"/v1/tokens/{token_id}/explain")
    assert (now["valid"], now["code"]) == (False, "revoked")
    assert [one["type"] for one in now["because"]] == ["token.issued", "key.revoked"]
    cut = now["because"][-1]
    assert cut["ledger_seq"] <= seq
    assert kid_of(token) in cut["sentence"]
    before = (datetime.fromisoformat(cut["recorded_at"]) - MICROSECOND).isoformat()
    then = service.done("GET", f"/v1/tokens/{token_id}/explain", params={"at": before})
    assert (then["valid"], [one["type"] for one in then["because"]]) == (True, ["token.issued"])


def test_revoked_key_is_announced_to_every_follower_and_stands_in_snapshots(service: Service) -> None:
    token = service.grant(jwt_app(service))["access_token"]
    after = service.done("GET", "/v1/tokens/" + service.validate(token)["token_id"])["ledger_seq"]
    kid, seq = kid_of(token), revoke(service)["ledger_seq"]
    other = service.app()  # who follows only this client must hear of it too
    for query in ({}, {"client_id": other.client_id}, {"subject": other.client_id}):

        def heard(query: dict[str, str] = query) -> dict[str, Any] | None:
            answer = service.done("GET", "/v1/revocations", params={"after": after, **query})
            return next((one for one in answer["items"] if one["data"].get("kid") == kid), None)

        event = until(heard, what="the announcement")
        assert event["type"] == "token-ledger.key.revoked.v1"
        data = event["data"]
        assert data.keys() == {"kid", "reason", "issued_before", "revoked_at", "ledger_seq"}
        assert (data["reason"], data["ledger_seq"] <= seq) == ("compromised", True)

    def in_snapshot() -> dict[str, Any] | None:
        lines = service.call("GET", "/v1/revocations/snapshot").text.splitlines()
        return next((found for line in lines if (found := json.loads(line)).get("kid") == kid), None)

    told = until(in_snapshot, what="a snapshot that has it")
    assert told == data | {"what": "key"}


def test_revoked_key_ends_its_tokens_for_auditors(service: Service) -> None:
    token = service.grant(jwt_app(service))["access_token"]
    kid = kid_of(token)
    revoke(service)
    sql = f"SELECT count(*), count(ended_at), min(reason) FROM tokens_v1 WHERE kid = '{kid}'"

    def ended() -> list[Any] | None:
        rows = service.done("POST", "/v1/audit/query", json={"sql": sql})["rows"]
        return rows[0] if rows[0][0] and rows[0][0] == rows[0][1] else None

    assert until(ended, seconds=30, what="the store has it")[2] == "compromised"


def test_keys_for_id_tokens_and_access_tokens_rotate_apart(service: Service) -> None:
    access, id_keys = keys_of(service), keys_of(service, "id")
    done = service.done("POST", "/v1/keys/rotate", json={"purpose": "id"})
    assert done["retired_kid"] in id_keys
    assert done["kid"].startswith("id-rs-")
    assert keys_of(service) == access
    done = revoke(service, purpose="id", alg="RS256")
    assert all(kid.startswith("id-rs-") for kid in done["revoked_kids"])
    assert len(done["revoked_kids"]) == 2  # the one that was retired a moment ago too
    assert not listed(service) & set(done["revoked_kids"])
    assert keys_of(service) == access
    kept = keys_of(service, "id")
    done = revoke(service, alg="ES256")
    assert done["kid"].startswith("es-")
    assert keys_of(service, "id") == kept
    assert keys_of(service, alg="EdDSA") == [kid for kid in access if kid.startswith("ed-")]


def test_app_whose_id_tokens_key_was_revoked_goes_on_with_its_hint(service: Service) -> None:
    """Whoever stole the key can write hints: one says nothing any more about who is meant, and is no mistake."""
    app, somebody, browser = web_app(service), person(service), Browser(service)
    made = flow(service, app)
    hint = redeem(service, made, browser.visit(made.url, somebody).answer["code"]).json()["id_token"]
    assert "code" in browser.get(flow(service, app, prompt="none", id_token_hint=hint).url).answer
    revoke(service, purpose="id", alg="RS256")
    silent = browser.get(flow(service, app, prompt="none", id_token_hint=hint).url)
    assert silent.answer["error"] == "login_required"
    assert "code" in browser.get(flow(service, app, id_token_hint=hint).url).answer


def test_client_that_asks_for_an_algorithm_has_its_key_from_its_registration_on(service: Service) -> None:
    """Whoever verifies fetches the key set before the first ID token comes."""
    assert keys_of(service, "id", "EdDSA") == []
    app = service.app(id_token_signed_response_alg="EdDSA")
    [kid] = until(lambda: keys_of(service, "id", "EdDSA"), what="it is made")
    assert (kid.startswith("id-ed-1-"), kid in listed(service)) == (True, True)
    service.done("PATCH", f"/v1/clients/{app.client_id}", json={"id_token_signed_response_alg": "ES256"})
    until(lambda: keys_of(service, "id", "ES256"), what="it is made")


def test_announced_key_is_left_where_a_new_one_is_wanted(service: Service) -> None:
    [old] = keys_of(service, alg="ES256")
    done = service.done("POST", "/v1/keys/rotate", json={"alg": "ES256", "now": True})
    assert (done["retired_kid"], "revoked_kids" in done) == (old, False)
    assert {old, done["kid"]} <= listed(service)


@pytest.mark.parametrize(
    "body",
    [{"purpose": "other"}, {"purpose": "access", "alg": "RS256"}, {"alg": "none"}, {"revoke": "yes"}, {"kid": "ed-1"}],
    ids=str,
)
def test_rotation_that_is_none_is_refused(service: Service, body: dict[str, Any]) -> None:
    problem(service.call("POST", "/v1/keys/rotate", json=body), 400)


def test_many_who_revoke_at_once_leave_one_key_that_signs(service: Service) -> None:
    """Two workers, and a call that comes a moment later: each answer names a key that was active, and one still is."""
    token = service.grant(jwt_app(service))["access_token"]

    def ask(_: int) -> int:
        with service.caller() as http:
            headers = {"Authorization": f"Bearer {service.admin_token}"}
            answer = http.post("/v1/keys/rotate", json={"revoke": True}, headers=headers)
            assert answer.status_code in {200, 503}, answer.text
            return answer.status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(ask, range(8)))
    assert 200 in statuses
    assert len(keys_of(service, alg="EdDSA")) == 1
    assert service.code(token) == "revoked"
    assert service.code(service.grant(jwt_app(service))["access_token"]) == "valid"
