"""The code of an authorization, at the token endpoint: RFC 6749 §4.1.3, RFC 7636 §4.5, RFC 8707 §2.2.

The codes are made by the test; how a person comes to one is another story.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jwt
import pytest
from joserfc import jwk as joserfc_jwk
from joserfc import jwt as joserfc_jwt

from tests.codes import authorize, outlast_the_race, redeem, verifier, web_app
from tests.running import App, Service, oauth_error

PRESENTED_AT_ONCE = 50


@pytest.fixture(scope="module")
def scopes(service: Service) -> tuple[str, str]:
    return service.scope(), service.scope()


@pytest.fixture(scope="module")
def person(service: Service, scopes: tuple[str, str]) -> str:
    user_id: str = service.user(scope=" ".join(scopes))["user_id"]
    return user_id


@pytest.fixture(scope="module")
def app(service: Service, scopes: tuple[str, str]) -> App:
    return web_app(service, f"openid offline_access {' '.join(scopes)}")


@pytest.fixture(scope="module")
def checker(service: Service) -> App:
    return service.app(may_introspect=True, audience=["*"])


class Flow:
    """One authorization of a client by a person, and its code."""

    def __init__(self, service: Service, app: App, person: str, **changes: Any) -> None:
        self.service, self.app, self.verifier = service, app, verifier()
        self.code = authorize(service, app, person, self.verifier, **changes)

    def redeem(self, **parameters: Any) -> httpx.Response:
        return redeem(self.service, self.app, self.code, self.verifier, **parameters)

    def tokens(self, **parameters: Any) -> dict[str, Any]:
        answer = self.redeem(**parameters)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def refused(self, error: str = "invalid_grant", **parameters: Any) -> None:
        oauth_error(self.redeem(**parameters), 400, error)


Begin = Callable[..., Flow]


@pytest.fixture
def begin(service: Service, app: App, person: str) -> Begin:
    return lambda **changes: Flow(service, changes.pop("app", app), changes.pop("person", person), **changes)


def active(service: Service, checker: App, token: str) -> bool:
    return bool(service.introspect(checker, token)["active"])


# What a code is exchanged for


def test_code_is_exchanged_for_tokens_of_the_person(
    service: Service, begin: Begin, app: App, person: str, checker: App
) -> None:
    answer = begin().redeem()
    assert answer.headers["cache-control"] == "no-store"
    tokens = answer.json()
    assert (tokens["token_type"], tokens["expires_in"], tokens["scope"]) == ("Bearer", 3600, app.metadata["scope"])
    assert tokens["access_token"].startswith("tl_at_")
    seen = service.introspect(checker, tokens["access_token"])
    assert (seen["active"], seen["sub"], seen["client_id"], seen["kind"]) == (True, person, app.client_id, "access")
    assert service.introspect(checker, tokens["refresh_token"])["kind"] == "refresh"


def test_jwt_for_a_person_has_their_id_as_subject(
    service: Service, begin: Begin, scopes: tuple[str, str], person: str
) -> None:
    tokens = begin(app=web_app(service, scopes[0], access_token_format="jwt")).tokens()
    claims = jwt.decode(tokens["access_token"], options={"verify_signature": False})
    assert (claims["sub"], claims["scope"]) == (person, scopes[0])
    assert service.code(tokens["access_token"]) == "valid"


def test_public_client_proves_itself_by_the_verifier_alone(
    service: Service, begin: Begin, scopes: tuple[str, str]
) -> None:
    public = web_app(service, scopes[0], token_endpoint_auth_method="none")
    flow = begin(app=public)
    tokens = flow.tokens()
    renewed = service.form(
        "/oauth2/token",
        None,
        grant_type="refresh_token",
        refresh_token=tokens["refresh_token"],
        client_id=public.client_id,
    )
    assert renewed.status_code == 200
    assert renewed.json()["refresh_token"] != tokens["refresh_token"]


@pytest.mark.parametrize(
    ("offline", "grant_types", "comes"),
    [
        pytest.param(True, ["authorization_code", "refresh_token"], True, id="offline and registered for it"),
        pytest.param(False, ["authorization_code", "refresh_token"], False, id="not offline"),
        pytest.param(True, ["authorization_code"], False, id="not registered for it"),
    ],
)
def test_refresh_token_comes_exactly_if_granted_and_registered(
    service: Service, begin: Begin, offline: bool, grant_types: list[str], comes: bool
) -> None:
    tokens = begin(app=web_app(service, "offline_access", grant_types=grant_types), offline=offline).tokens()
    assert ("refresh_token" in tokens) == comes


def test_resource_narrows_the_audience_and_a_wrong_one_leaves_the_code_good(
    service: Service, begin: Begin, scopes: tuple[str, str], checker: App
) -> None:
    wide = web_app(service, scopes[0], audience=["https://one.example", "https://two.example"])
    flow = begin(app=wide)
    flow.refused("invalid_target", resource="https://three.example")
    tokens = flow.tokens(resource="https://two.example")
    assert service.introspect(checker, tokens["access_token"])["aud"] == "https://two.example"
    renewed = service.refresh(wide, tokens["refresh_token"], resource="https://one.example").json()
    assert service.introspect(checker, renewed["access_token"])["aud"] == "https://one.example"


def test_what_client_or_person_may_no_longer_have_is_not_given(
    service: Service, scopes: tuple[str, str], begin: Begin
) -> None:
    person = service.user(scope=" ".join(scopes))["user_id"]
    both = web_app(service, f"openid offline_access {' '.join(scopes)}")
    flow = begin(app=both, person=person)
    service.done("PATCH", f"/v1/users/{person}", json={"scope": scopes[1]})
    tokens = flow.tokens()
    assert tokens["scope"] == f"openid offline_access {scopes[1]}"
    service.done("PATCH", f"/v1/clients/{both.client_id}", json={"scope": f"offline_access {scopes[0]}"})
    answer = service.refresh(both, tokens["refresh_token"])
    assert answer.json()["scope"] == "offline_access"


# ID tokens


def id_claims(service: Service, token: str) -> dict[str, Any]:
    keys = joserfc_jwk.KeySet.import_key_set(service.http.get("/oauth2/jwks").json())
    return dict(joserfc_jwt.decode(token, keys, algorithms=["RS256"]).claims)


def test_id_token_comes_with_openid_alone_and_again_with_a_refresh(
    service: Service, begin: Begin, app: App, person: str, scopes: tuple[str, str]
) -> None:
    assert "id_token" not in begin(scope=scopes[0]).tokens()
    tokens = begin().tokens()
    first = id_claims(service, tokens["id_token"])
    assert (first["iss"], first["sub"], first["aud"]) == (service.issuer, person, app.client_id)
    renewed = service.refresh(app, tokens["refresh_token"]).json()
    second = id_claims(service, renewed["id_token"])
    same = ("iss", "sub", "aud", "auth_time")
    assert [first[name] for name in same] == [second[name] for name in same]
    assert first["at_hash"] != second["at_hash"]
    assert "nonce" not in second
    narrowed = service.refresh(app, renewed["refresh_token"], scope=scopes[0]).json()
    assert (narrowed["scope"], "id_token" in narrowed) == (scopes[0], False)


# What does not belong to the code


@pytest.mark.parametrize("name", ["code", "redirect_uri", "code_verifier"])
def test_what_is_missing_is_named_and_leaves_the_code_good(begin: Begin, name: str) -> None:
    flow = begin()
    flow.refused("invalid_request", **{name: ""})
    flow.tokens()


@pytest.mark.parametrize("wrong", [{"code_verifier": "w" * 43}, {"redirect_uri": "https://shop.example/back/"}])
def test_code_without_its_proofs_ends_at_the_third_attempt(begin: Begin, wrong: dict[str, str]) -> None:
    patient, hasty = begin(), begin()
    for _ in range(2):
        patient.refused(**wrong)
    patient.tokens()
    for _ in range(3):
        hasty.refused(**wrong)
    hasty.refused()


def test_another_client_gets_nothing_and_changes_nothing(
    service: Service, begin: Begin, scopes: tuple[str, str]
) -> None:
    flow, other = begin(), web_app(service, scopes[0])
    for _ in range(4):
        oauth_error(redeem(service, other, flow.code, flow.verifier), 400, "invalid_grant")
    flow.tokens()
    oauth_error(redeem(service, other, flow.code, flow.verifier), 400, "invalid_grant")


def test_code_is_good_for_a_minute(begin: Begin) -> None:
    begin(seconds=-0.001).refused()


ENDS: dict[str, Callable[[Service, App, str], object]] = {
    "client revoked": lambda service, app, _: service.done(
        "POST", "/v1/revocations", json={"client_id": app.client_id, "reason": "admin"}
    ),
    "subject revoked": lambda service, _, person: service.done(
        "POST", "/v1/revocations", json={"subject": person, "reason": "admin"}
    ),
    "password changed": lambda service, _, person: service.done(
        "PATCH", f"/v1/users/{person}", json={"password": "another cnrypass of some length"}
    ),
    "user disabled": lambda service, _, person: service.done("DELETE", f"/v1/users/{person}"),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_code_and_refresh_token_end_with_client_and_person(
    service: Service, begin: Begin, scopes: tuple[str, str], end: Callable[[Service, App, str], object]
) -> None:
    person, own = service.user(scope=scopes[0])["user_id"], web_app(service, scopes[0])
    waiting, used = begin(app=own, person=person), begin(app=own, person=person)
    tokens = used.tokens()
    end(service, own, person)
    waiting.refused()
    oauth_error(service.refresh(own, tokens["refresh_token"]), 400, "invalid_grant")


# Presented again


def test_spent_code_that_comes_again_later_revokes_what_it_gave(service: Service, begin: Begin, checker: App) -> None:
    flow = begin()
    tokens = flow.tokens()
    outlast_the_race()
    flow.refused()
    for name in ("access_token", "refresh_token"):
        assert not active(service, checker, tokens[name])
    flow.refused()


def test_spent_code_without_its_verifier_is_refused_and_revokes_nothing(
    service: Service, begin: Begin, checker: App
) -> None:
    flow = begin()
    tokens = flow.tokens()
    for _ in range(5):
        flow.refused(code_verifier="w" * 43)
    seen = service.introspect(checker, tokens["access_token"])
    assert seen["active"]
    types = [one["type"] for one in service.history(seen["jti"])]
    assert types == ["authorization.granted", "code.redeemed", *["code.refused"] * 3]


def test_fifty_at_once_leave_one_set_of_tokens(service: Service, begin: Begin, checker: App) -> None:
    flow = begin()
    barrier = threading.Barrier(PRESENTED_AT_ONCE)

    def present(_: int) -> httpx.Response:
        with service.caller() as http:
            http.get("/health/live")  # the connection is open
            barrier.wait()
            return redeem(service, flow.app, flow.code, flow.verifier, http)

    with ThreadPoolExecutor(PRESENTED_AT_ONCE) as pool:
        answers = list(pool.map(present, range(PRESENTED_AT_ONCE)))
    good = [answer for answer in answers if answer.status_code == 200]
    assert len(good) == 1, [answer.text for answer in answers]
    for answer in answers:
        if answer is not good[0]:
            oauth_error(answer, 400, "invalid_grant")
    tokens = good[0].json()
    seen = service.introspect(checker, tokens["access_token"])
    listed = list(service.items("/v1/tokens", grant_id=seen["grant_id"], status="active"))
    assert sorted(one["kind"] for one in listed) in (["access", "refresh"], [])
    # Whoever came too late, on a busy machine, was taken for somebody else: then all of it has ended.
    assert active(service, checker, tokens["access_token"]) == bool(listed)


# No other door takes a code


def test_code_is_unknown_everywhere_else(service: Service, begin: Begin, checker: App) -> None:
    flow = begin()
    assert service.introspect(checker, flow.code) == {"active": False}
    assert service.validate(flow.code)["code"] == "unknown"
    answer = service.http.get("/v1/forward-auth", headers={"Authorization": f"Bearer {flow.code}"})
    assert answer.status_code == 401
    oauth_error(service.revoke(flow.app, flow.code), 400, "unsupported_token_type")
    oauth_error(service.refresh(flow.app, flow.code), 400, "invalid_grant")
    assert service.call("POST", "/v1/revocations", json={"token": flow.code, "reason": "admin"}).status_code == 404
    tokens = flow.tokens()
    for other in (tokens["refresh_token"], tokens["access_token"], service.pat()["token"]):
        flow.refused(code=other)


@pytest.mark.parametrize("change", [lambda code: code + " ", lambda code: code.swapcase(), lambda code: code[:-1]])
def test_code_is_taken_to_the_letter(begin: Begin, change: Callable[[str], str]) -> None:
    flow = begin()
    flow.refused(code=change(flow.code))
    flow.tokens()


# Afterwards


def test_tokens_are_listed_explained_and_have_a_history(
    service: Service, begin: Begin, app: App, person: str, checker: App
) -> None:
    flow = begin()
    tokens = flow.tokens()
    seen = service.introspect(checker, tokens["access_token"])
    renewed = service.refresh(app, tokens["refresh_token"]).json()
    listed = list(service.items("/v1/tokens", grant_id=seen["grant_id"]))
    assert sorted(one["kind"] for one in listed) == ["access", "access", "refresh", "refresh"]
    assert {(one["subject"], one["client_id"]) for one in listed} == {(person, app.client_id)}
    history = service.history(seen["jti"])
    assert [one["type"] for one in history] == ["authorization.granted", "code.redeemed", "token.refreshed"]
    told = service.done("GET", f"/v1/tokens/{seen['jti']}/explain")
    assert told["valid"] is True
    sentences = [one["sentence"] for one in told["because"]]
    assert sentences[0].startswith(f"user {person} signed in at ")
    assert "in exchange for an authorization code" in sentences[1]
    outlast_the_race()
    flow.refused()
    assert service.code(renewed["access_token"]) == "revoked"
    told = service.done("GET", f"/v1/tokens/{seen['jti']}/explain")
    assert (told["valid"], told["code"]) == (False, "revoked")
    assert [one["type"] for one in told["because"]] == [
        "authorization.granted",
        "code.redeemed",
        "code.replayed",
        "grant.revoked",
    ]
    before = service.done("GET", f"/v1/tokens/{seen['jti']}", params={"at": history[1]["recorded_at"]})
    assert before["status"] == "active"
