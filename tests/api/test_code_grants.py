"""What the authorization endpoint calls, in the test's own process, and what the token endpoint makes of it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import jwt
import pytest

from events.ledger import Append
from events.types import ConsentGiven, ConsentWithdrawn, SessionEnded, SessionStarted
from service.commands import subject
from service.oauth.codes import Authorization, grant_code
from service.oauth.id_tokens import half_hash
from service.rules.codes import challenge_of
from service.runtime import Runtime
from service.tokens import new_id, now, uuid7_hex
from tests.codes import REDIRECT_URI, redeem, verifier, web_app
from tests.running import App, Service, oauth_error

NONCE = "cnryquery-n-0S6_WzA2Mj"


@pytest.fixture(scope="module")
def scope(service: Service) -> str:
    return service.scope()


@pytest.fixture(scope="module")
def app(service: Service, scope: str) -> App:
    return web_app(service, f"openid offline_access {scope}", id_token_signed_response_alg="ES256")


@pytest.fixture(scope="module")
def person(service: Service, scope: str) -> str:
    user_id: str = service.user(scope=scope)["user_id"]
    return user_id


async def code_of(runtime: Runtime, app: App, person: str, proof: str, **changes: Any) -> str:
    await runtime.view_at_end()
    client = runtime.view.client(app.client_id)
    assert client is not None
    wanted = {
        "client_id": app.client_id,
        "subject": person,
        "session_id": new_id("ses"),
        "scope": app.metadata["scope"],
        "audience": tuple(app.metadata["audience"]),
        "redirect_uri": REDIRECT_URI,
        "code_challenge": challenge_of(proof),
        "nonce": NONCE,
        "auth_time": now() - timedelta(minutes=5),
        "offline": True,
        "response_type": "code id_token",
        "consent_seq": 0,
    }
    return await grant_code(runtime, client, Authorization(**wanted | changes), "request-of-a-test")


def claims_of(token: str) -> dict[str, Any]:
    return jwt.decode(token, options={"verify_signature": False})


async def test_nonce_and_time_of_sign_in_reach_the_id_token_and_the_nonce_no_other(
    service: Service, runtime: Runtime, app: App, person: str
) -> None:
    """OIDC Core §3.1.3.7, §12.2."""
    proof, signed_in = verifier(), now() - timedelta(hours=1)
    code = await code_of(runtime, app, person, proof, auth_time=signed_in)
    tokens = redeem(service, app, code, proof).json()
    assert jwt.get_unverified_header(tokens["id_token"])["alg"] == "ES256"
    first = claims_of(tokens["id_token"])
    assert (first["nonce"], first["sub"], first["aud"]) == (NONCE, person, app.client_id)
    assert first["auth_time"] == int(signed_in.timestamp())
    assert first["at_hash"] == half_hash(tokens["access_token"], "ES256")
    second = claims_of(service.refresh(app, tokens["refresh_token"]).json()["id_token"])
    assert "nonce" not in second
    assert second["auth_time"] == first["auth_time"]


async def test_nonce_is_sealed_in_the_log(service: Service, runtime: Runtime, app: App, person: str) -> None:
    proof = verifier()
    code = await code_of(runtime, app, person, proof)
    token_id = service.validate(redeem(service, app, code, proof).json()["access_token"])["token_id"]
    granted = service.history(token_id)[0]
    assert granted["type"] == "authorization.granted"
    assert (granted["by"], granted["code"]["kind"]) == (person, "code")
    assert NONCE not in str(granted)
    assert code not in str(granted)


async def test_code_ends_with_the_consent_and_a_new_consent_gives_it_nothing_back(
    service: Service, runtime: Runtime, app: App, scope: str
) -> None:
    person, proof = service.user(scope=scope)["user_id"], verifier()
    of = subject("consent", f"{person}_{app.client_id}")
    about = {"by": person, "user_id": person, "client_id": app.client_id}
    head, allowed = {"occurred_at": now()} | about, f"openid offline_access {scope}"
    await runtime.ledger.append(Append(of, ConsentGiven(id=uuid7_hex(), scope=allowed, **head)))
    code = await code_of(runtime, app, person, proof)
    spent = await code_of(runtime, app, person, proof)
    tokens = redeem(service, app, spent, proof).json()
    await runtime.ledger.append(Append(of, ConsentWithdrawn(id=uuid7_hex(), **head)))
    (seq,) = await runtime.ledger.append(Append(of, ConsentGiven(id=uuid7_hex(), scope=allowed, **head)))
    await runtime.applied(seq)
    oauth_error(redeem(service, app, code, proof), 400, "invalid_grant")
    oauth_error(service.refresh(app, tokens["refresh_token"]), 400, "invalid_grant")
    assert redeem(service, app, await code_of(runtime, app, person, proof), proof).status_code == 200


async def test_code_ends_with_the_session_unless_it_is_for_offline_use(
    service: Service, runtime: Runtime, app: App, person: str
) -> None:
    session_id, proof = new_id("ses"), verifier()
    of = subject("session", session_id)
    head = {"occurred_at": now(), "by": person, "session_id": session_id, "user_id": person}
    started = SessionStarted(
        id=uuid7_hex(), **head, auth_time=now(), expires_at=now() + timedelta(hours=1), methods=("pwd",), user_seq=0
    )
    await runtime.ledger.append(Append(of, started, 0))
    codes = [
        await code_of(runtime, app, person, proof, session_id=session_id, offline=offline)
        for offline in (False, True, False)
    ]
    assert redeem(service, app, codes[0], proof).status_code == 200
    (seq,) = await runtime.ledger.append(Append(of, SessionEnded(id=uuid7_hex(), **head, reason="signed_out")))
    await runtime.applied(seq)
    assert redeem(service, app, codes[1], proof).status_code == 200
    oauth_error(redeem(service, app, codes[2], proof), 400, "invalid_grant")


# Without rotation


@pytest.fixture(scope="module")
def steady(service: Service, scope: str) -> App:
    return web_app(service, f"openid offline_access {scope}", refresh_token_rotation=False)


async def test_refresh_without_rotation_leaves_the_refresh_token(
    service: Service, runtime: Runtime, steady: App, person: str, scope: str
) -> None:
    """FAPI 2.0 §5.3.2.1; OIDC Core §12.2."""
    proof = verifier()
    tokens = redeem(service, steady, await code_of(runtime, steady, person, proof), proof).json()
    answers = [service.refresh(steady, tokens["refresh_token"]) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    bodies = [answer.json() for answer in answers]
    assert all("refresh_token" not in body for body in bodies)
    assert len({body["access_token"] for body in bodies}) == 3
    assert {claims_of(body["id_token"])["sub"] for body in bodies} == {person}
    assert {service.code(body["access_token"]) for body in (tokens, *bodies)} == {"valid"}
    narrow = service.refresh(steady, tokens["refresh_token"], scope=scope).json()
    assert narrow["scope"] == scope
    wide = service.refresh(steady, tokens["refresh_token"]).json()
    assert wide["scope"] == steady.metadata["scope"]
    oauth_error(service.refresh(steady, tokens["refresh_token"], scope="other"), 400, "invalid_scope")
    token_id = service.validate(wide["access_token"])["token_id"]
    types = [event["type"] for event in service.history(token_id)]
    assert types == ["authorization.granted", "code.redeemed", *["access.renewed"] * 5]
    assert service.revoke(steady, tokens["refresh_token"]).status_code == 200
    oauth_error(service.refresh(steady, tokens["refresh_token"]), 400, "invalid_grant")
    assert {service.code(body["access_token"]) for body in (tokens, *bodies)} == {"revoked"}


async def test_refresh_without_rotation_ends_when_it_is_not_used_and_with_its_longest_life(
    service: Service, runtime: Runtime, person: str, scope: str
) -> None:
    short = web_app(
        service,
        f"offline_access {scope}",
        refresh_token_rotation=False,
        refresh_token_idle_ttl_seconds=3600,
        refresh_token_max_ttl_seconds=3601,
    )
    proof = verifier()
    tokens = redeem(service, short, await code_of(runtime, short, person, proof), proof).json()
    seen = service.introspect(short, tokens["refresh_token"])
    for _ in range(2):
        service.refresh(short, tokens["refresh_token"])
    again = service.introspect(short, tokens["refresh_token"])
    assert seen["jti"] == again["jti"]
    assert 0 <= again["exp"] - seen["exp"] <= 1  # the longest life is a second longer than the idle one


async def test_client_that_rotates_again_spends_the_token_it_kept(
    service: Service, runtime: Runtime, person: str, scope: str
) -> None:
    changing, proof = web_app(service, f"offline_access {scope}", refresh_token_rotation=False), verifier()
    tokens = redeem(service, changing, await code_of(runtime, changing, person, proof), proof).json()
    service.refresh(changing, tokens["refresh_token"])
    service.done("PATCH", f"/v1/clients/{changing.client_id}", json={"refresh_token_rotation": True})
    rotated = service.refresh(changing, tokens["refresh_token"]).json()
    assert rotated["refresh_token"] != tokens["refresh_token"]
    assert service.refresh(changing, tokens["refresh_token"]).json() == rotated


# Registration


def test_client_shows_how_people_sign_in_to_it(service: Service) -> None:
    given = {
        "response_types": ["code", "code id_token"],
        "post_logout_redirect_uris": ["https://shop.example/out"],
        "require_pushed_authorization_requests": True,
        "id_token_signed_response_alg": "EdDSA",
        "refresh_token_rotation": False,
    }
    made = web_app(service, "openid", **given)
    shown = service.done("GET", f"/v1/clients/{made.client_id}")
    assert {name: made.metadata[name] for name in given} == {name: shown[name] for name in given} == given
    public = {"token_endpoint_auth_method": "none"}
    answer = service.call("PATCH", f"/v1/clients/{made.client_id}", json=public)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_client_metadata")
    changed = service.done("PATCH", f"/v1/clients/{made.client_id}", json=public | {"refresh_token_rotation": None})
    assert changed["refresh_token_rotation"] is True


@pytest.mark.parametrize(
    "wrong",
    [
        {"id_token_signed_response_alg": "none"},
        {"id_token_signed_response_alg": "HS256"},
        {"response_types": ["token"]},
        {"response_types": ["code token"]},
        {"refresh_token_rotation": "no"},
    ],
)
def test_client_cannot_sign_in_people_in_a_way_that_is_not_there(service: Service, wrong: dict[str, Any]) -> None:
    wanted = {"grant_types": ["authorization_code"], "redirect_uris": [REDIRECT_URI], **wrong}
    assert service.call("POST", "/v1/clients", json=wanted).status_code == 400
