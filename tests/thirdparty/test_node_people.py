"""openid-client and oauth4webapi, unmodified and strict, on every flow in which a person takes part.

What arrives at the redirect URI, the answer of the token endpoint, ID tokens with their signatures and hashes, userinfo
and refreshed tokens: the libraries check each and end the flow where anything is amiss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jwt
import pytest

from tests.nodejs import NodeClient
from tests.relying import OPENID, SIGNED_OUT, Person, web_app
from tests.running import App, Service, until

HYBRID: dict[str, Any] = {"hybrid": True}
PUSHED: dict[str, Any] = {"pushed": True}


@dataclass(frozen=True)
class Case:
    """How the application is registered, what the library is told, and what is asked for besides the scope."""

    registered: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)


PUBLIC = {"token_endpoint_auth_method": "none"}
FORM_POST = {"response_mode": "form_post"}
CASES = {
    "query": Case(),
    "form_post": Case(asked=FORM_POST),
    "pushed": Case(told=PUSHED),
    "pushed as it must be": Case({"require_pushed_authorization_requests": True}, PUSHED),
    "hybrid": Case(told=HYBRID),
    "hybrid, form_post": Case(told=HYBRID, asked=FORM_POST),
    "hybrid, pushed": Case(told=HYBRID | PUSHED),
    "client_secret_post": Case({"token_endpoint_auth_method": "client_secret_post"}, PUSHED),
    "public": Case(PUBLIC),
    "public, pushed": Case(PUBLIC, PUSHED),
    "ES256": Case({"id_token_signed_response_alg": "ES256"}, HYBRID),
    "EdDSA": Case({"id_token_signed_response_alg": "EdDSA"}, HYBRID),
    "opaque access token": Case({"access_token_format": "opaque"}),
    "prompt=login": Case(asked={"prompt": "login"}),
    "prompt=consent": Case(asked={"prompt": "consent"}),
    "max_age": Case(asked={"max_age": "600"}),
    "max_age=0": Case(asked={"max_age": "0"}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_person_signs_in(client: NodeClient, service: Service, person: Person, case: Case) -> None:
    app = web_app(service, **case.registered)
    found = client.run("signIn", service, app, person.visit, request={"scope": OPENID, **case.asked}, **case.told)
    assert found["claims"]["sub"] == found["userinfo"]["sub"] == person.user_id
    assert {name: found["userinfo"][name] for name in ("name", "email")} == {
        name: person.account[name] for name in ("name", "email")
    }
    known = service.validate(found["tokens"]["access_token"])
    assert (known["code"], known["subject"], known["client_id"]) == ("valid", person.user_id, app.client_id)
    assert "refresh_token" not in found["tokens"]


def test_person_who_is_signed_in_and_has_consented_is_asked_nothing(
    client: NodeClient, service: Service, person: Person
) -> None:
    app = web_app(service)
    first = client.run("signIn", service, app, person.visit, request={"scope": OPENID})
    asked = {"scope": OPENID, "prompt": "none", "max_age": "600"}
    again = client.run("signIn", service, app, person.visit, request=asked)
    assert again["claims"]["auth_time"] == first["claims"]["auth_time"]
    assert again["claims"]["sub"] == first["claims"]["sub"]


def test_resource_narrows_what_the_access_token_is_for(
    client: NodeClient, oauth4webapi: NodeClient, service: Service, person: Person
) -> None:
    """RFC 8707: what was granted for one of the client's audiences is renewed for no other."""
    one, two = "https://one.example", "https://two.example"
    app = web_app(service, audience=[one, two])
    asked = {"scope": "profile offline_access", "resource": one, "prompt": "consent"}
    first = client.run("authorizeOnly", service, app, person.visit, request=asked, token_request={"resource": one})
    claims = oauth4webapi.run("verify", service, app, token=first["access_token"], audience=one)
    assert claims["sub"] == person.user_id
    refused = client.run(
        "refusedRefresh", service, app, refresh_token=first["refresh_token"], request={"resource": two}
    )
    assert refused["error"] == "invalid_target"


@pytest.mark.parametrize("method", ["client_secret_basic", "none"], ids=["confidential", "public"])
def test_refresh_rotates_and_a_lost_answer_is_given_again(
    client: NodeClient, service: Service, person: Person, method: str
) -> None:
    app = web_app(service, token_endpoint_auth_method=method)
    asked = {"scope": f"{OPENID} offline_access", "prompt": "consent"}
    first = client.run("signIn", service, app, person.visit, request=asked)["tokens"]
    lost, again = (client.run("refresh", service, app, refresh_token=first["refresh_token"]) for _ in "12")
    assert lost["refresh_token"] == again["refresh_token"] != first["refresh_token"]
    next_one = client.run("refresh", service, app, refresh_token=again["refresh_token"], request={"scope": "openid"})
    assert service.validate(next_one["access_token"])["scope"] == "openid"
    spent = client.run("refusedRefresh", service, app, refresh_token=first["refresh_token"])
    assert spent["error"] == "invalid_grant"
    assert service.code(next_one["access_token"]) == "revoked"


def test_client_without_rotation_keeps_its_refresh_token(client: NodeClient, service: Service, person: Person) -> None:
    """FAPI 2.0: a confidential client is given the same one, or none, and uses it again."""
    app = web_app(service, refresh_token_rotation=False)
    asked = {"scope": f"{OPENID} offline_access", "prompt": "consent"}
    first = client.run("signIn", service, app, person.visit, request=asked)["tokens"]
    for _ in range(3):
        renewed = client.run("refresh", service, app, refresh_token=first["refresh_token"])
        assert renewed.get("refresh_token", first["refresh_token"]) == first["refresh_token"]
        assert service.code(renewed["access_token"]) == "valid"


REFUSED = ["query", "form_post", "pushed", "hybrid", "hybrid, form_post"]


@pytest.mark.parametrize("case", [CASES[name] for name in REFUSED], ids=REFUSED)
def test_person_who_refuses_is_taken_back_without_a_code(
    client: NodeClient, service: Service, person: Person, case: Case
) -> None:
    asked = {"scope": OPENID, **case.asked}
    found = client.run("refusedSignIn", service, web_app(service), person.refuse, request=asked, **case.told)
    assert found == {"kind": "AuthorizationResponseError", "error": "access_denied", "status": None}


@pytest.mark.parametrize("told", [{}, HYBRID], ids=["code", "hybrid"])
def test_client_that_may_show_nothing_learns_that_nobody_is_signed_in(
    client: NodeClient, service: Service, person: Person, told: dict[str, Any]
) -> None:
    asked = {"scope": OPENID, "prompt": "none"}
    found = client.run("refusedSignIn", service, web_app(service), person.visit, request=asked, **told)
    assert found["error"] == "login_required"


def test_client_that_may_show_nothing_learns_that_consent_is_wanting(
    client: NodeClient, service: Service, person: Person
) -> None:
    client.run("signIn", service, web_app(service), person.visit, request={"scope": OPENID})
    asked = {"scope": OPENID, "prompt": "none"}
    found = client.run("refusedSignIn", service, web_app(service), person.visit, request=asked)
    assert found["error"] == "consent_required"


def test_scope_that_the_client_does_not_have_is_refused(client: NodeClient, service: Service, person: Person) -> None:
    app = web_app(service)
    client.run("signIn", service, app, person.visit, request={"scope": OPENID})
    found = client.run("refusedSignIn", service, app, person.visit, request={"scope": "openid no:such"})
    assert found["error"] == "invalid_scope"
    pushed = client.run("refusedSignIn", service, app, person.visit, request={"scope": "openid no:such"}, pushed=True)
    assert pushed == {"kind": "ResponseBodyError", "error": "invalid_scope", "status": 400}


def test_request_that_was_not_pushed_is_refused_where_it_must_be(
    client: NodeClient, service: Service, person: Person
) -> None:
    """RFC 9126 §6."""
    app = web_app(service, require_pushed_authorization_requests=True)
    client.run("signIn", service, app, person.visit, request={"scope": OPENID}, **PUSHED)
    found = client.run("refusedSignIn", service, app, person.visit, request={"scope": OPENID})
    assert found == {"kind": "AuthorizationResponseError", "error": "invalid_request", "status": None}


def test_id_tokens_of_the_old_key_and_of_the_new_are_verified(
    client: NodeClient, service: Service, person: Person
) -> None:
    """A library that has never heard of either finds both in the key set."""
    app = web_app(service, id_token_signed_response_alg="ES256")
    asked = {"scope": f"{OPENID} offline_access", "prompt": "consent"}
    old = client.run("signIn", service, app, person.visit, request=asked)["tokens"]
    kid = service.done("POST", "/v1/keys/rotate", json={"purpose": "id", "alg": "ES256"})["kid"]
    assert jwt.get_unverified_header(old["id_token"])["kid"] != kid
    newest = old

    def signed_by_the_new_key() -> bool:
        nonlocal newest
        newest = client.run("refresh", service, app, refresh_token=newest["refresh_token"])
        found: bool = jwt.get_unverified_header(newest["id_token"])["kid"] == kid
        return found

    until(signed_by_the_new_key)
    found = client.run("signOut", service, app, person.sign_out, id_token=old["id_token"])
    assert found == {"arrived": SIGNED_OUT}


def test_userinfo_refuses_in_words_that_are_understood(client: NodeClient, service: Service, person: Person) -> None:
    """RFC 6750 §3.1: a revoked token and one without the scope, each with a challenge that the libraries parse."""
    app = web_app(service)
    revoked = client.run("signIn", service, app, person.visit, request={"scope": OPENID})["tokens"]["access_token"]
    client.run("revoke", service, app, token=revoked)
    narrow = client.run("authorizeOnly", service, app, person.visit, request={"scope": "profile"})["access_token"]
    expected = {revoked: ("invalid_token", 401), narrow: ("insufficient_scope", 403)}
    for token, (error, status) in expected.items():
        found = client.run("refusedUserinfo", service, app, token=token, subject=person.user_id)
        assert found == {"kind": "WWWAuthenticateChallengeError", "error": error, "status": status}


def test_app_that_is_installed_listens_at_a_port_of_its_own(
    client: NodeClient, service: Service, person: Person
) -> None:
    """RFC 8252 §7.3: registered without a port, used with whatever port was free."""
    app = web_app(service, token_endpoint_auth_method="none", redirect_uris=["http://127.0.0.1/callback"])
    listening = App(app.client_id, "", {**app.metadata, "redirect_uris": ["http://127.0.0.1:49152/callback"]})
    found = client.run("authorizeOnly", service, listening, person.visit, request={"scope": "profile"})
    assert service.validate(found["access_token"])["subject"] == person.user_id


def test_signing_out_comes_back_and_ends_what_the_session_gave(
    client: NodeClient, service: Service, person: Person
) -> None:
    """OpenID Connect RP-Initiated Logout 1.0 §2, §3."""
    app = web_app(service)
    tokens = client.run("signIn", service, app, person.visit, request={"scope": OPENID})["tokens"]
    found = client.run("signOut", service, app, person.sign_out, id_token=tokens["id_token"])
    assert found == {"arrived": SIGNED_OUT}
    assert service.code(tokens["access_token"]) == "revoked"
    asked = {"scope": OPENID, "prompt": "none"}
    refused = client.run("refusedSignIn", service, app, person.visit, request=asked)
    assert refused["error"] == "login_required"
