"""Who is behind an access token: claims by scope, errors by RFC 6750, and pages of other sites."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlencode

import pytest

from events.types import Kind, Reason, SubjectRevoked
from service.api.problems import render
from service.commands import commit
from service.errors import ServiceError
from service.oauth.forms import FORM
from service.oauth.userinfo import userinfo
from service.outgoing import Response
from service.registry import NewUser, disable_user, user_registration
from service.rules.registry import Profile
from service.tokens import mint, mint_kind
from tests.hosts import Host
from tests.making import allowed, cli, head
from tests.rsgi import END, request
from tests.running import CANARY_NAME, CANARY_USERNAME, unique
from tests.signin.people import SYSTEM


async def person(here: Host, **profile: Any) -> tuple[str, Profile]:
    made = Profile(username=unique(CANARY_USERNAME), **profile)
    new = NewUser(kind="person", profile=made, scope="")
    answer, _ = await commit(here.runtime, user_registration(here.runtime, SYSTEM, new))
    await here.project()
    return answer["user_id"], made


async def access(here: Host, user_id: str, scope: str, *, kind: Kind = Kind.ACCESS, seconds: int = 3600) -> str:
    """A token that the person gave, whose audience is somebody else."""
    token = mint_kind(kind)
    await here.record(*allowed(user_id, cli(7), scope=scope, token=token, kind=kind, seconds=seconds))
    await here.project()
    return token


async def asked(here: Host, *authorization: str, method: str = "GET", form: dict[str, str] | None = None) -> Response:
    body = urlencode(form or {}).encode()
    posted = (("content-type", FORM), ("content-length", str(len(body)))) if form is not None else ()
    headers = (*(("authorization", one) for one in authorization), *posted, ("origin", "https://spa.example"))
    incoming = request(*headers, body=(body, END), method=method, path="/oauth2/userinfo")
    try:
        return await here.projecting(userinfo(here.runtime, incoming))
    except ServiceError as error:
        return render(error, incoming)


def claims(answer: Response) -> dict[str, Any]:
    assert answer.status == 200, answer.body
    headers = dict(answer.headers)
    assert headers["content-type"] == "application/json"
    assert headers["cache-control"] == "no-store"
    found: dict[str, Any] = json.loads(answer.body)
    return found


async def test_claims_are_those_of_the_scope(here: Host) -> None:
    email, name = f"{unique(CANARY_NAME)}@example.com", unique(CANARY_NAME)
    user_id, profile = await person(here, display_name=name, email=email)
    named = {"name": name, "preferred_username": profile.username}
    for scope, more in {
        "openid": {},
        "openid profile": named,
        "email openid": {"email": email},
        "openid profile email orders:read": named | {"email": email},
    }.items():
        token = await access(here, user_id, scope)
        assert claims(await asked(here, f"Bearer {token}")) == {"sub": user_id} | more


async def test_what_is_not_known_is_left_out(here: Host) -> None:
    user_id, profile = await person(here)
    token = await access(here, user_id, "openid profile email")
    expected = {"sub": user_id, "preferred_username": profile.username}
    assert claims(await asked(here, f"Bearer {token}")) == expected


async def test_token_may_be_posted(here: Host) -> None:
    user_id, _ = await person(here)
    token = await access(here, user_id, "openid")
    assert claims(await asked(here, f"Bearer {token}", method="POST")) == {"sub": user_id}
    assert claims(await asked(here, method="POST", form={"access_token": token})) == {"sub": user_id}


def refused(answer: Response, status: int, error: str | None) -> None:
    headers = dict(answer.headers)
    assert answer.status == status, answer.body
    challenge = headers.get("www-authenticate", "")
    if error is None:
        assert challenge == 'Bearer realm="token-ledger"'
    elif status != 400:
        assert f'error="{error}"' in challenge
        assert json.loads(answer.body)["error"] == error


async def test_errors_are_those_of_rfc_6750(here: Host) -> None:
    user_id, _ = await person(here)
    token = await access(here, user_id, "openid")
    refused(await asked(here), 401, None)
    refused(await asked(here, "Basic YTpi"), 401, None)
    refused(await asked(here, "Bearer a b"), 400, "invalid_request")
    refused(await asked(here, f"Bearer {token}", f"Bearer {token}"), 400, "invalid_request")
    both = await asked(here, f"Bearer {token}", method="POST", form={"access_token": token})
    refused(both, 400, "invalid_request")
    for wrong in ("tl_at_x", mint_kind(Kind.ACCESS), mint("ac"), "eyJhbGciOiJub25lIn0.e30."):
        refused(await asked(here, f"Bearer {wrong}"), 401, "invalid_token")
    refused(await asked(here, f"Bearer {await access(here, user_id, 'openid', seconds=-5)}"), 401, "invalid_token")
    without = await access(here, user_id, "profile")
    refused(await asked(here, f"Bearer {without}"), 403, "insufficient_scope")


@pytest.mark.parametrize("kind", [Kind.PAT, Kind.SAT, Kind.REFRESH])
async def test_other_kinds_of_token_are_unknown(here: Host, kind: Kind) -> None:
    user_id, _ = await person(here)
    token, _ = await here.issued(kind, subject=user_id, scope="openid")
    refused(await asked(here, f"Bearer {token}"), 401, "invalid_token")


async def test_token_that_a_client_has_for_itself_speaks_for_nobody(here: Host) -> None:
    token, _ = await here.issued(Kind.ACCESS, subject=cli(7), client_id=cli(7), scope="openid")
    refused(await asked(here, f"Bearer {token}"), 403, "insufficient_scope")


async def test_nothing_is_told_of_whoever_was_disabled_or_cut_off(here: Host) -> None:
    user_id, _ = await person(here)
    token = await access(here, user_id, "openid")
    await here.record(SubjectRevoked(**head(), user_id=user_id, reason=Reason.ADMIN))
    await here.project()
    refused(await asked(here, f"Bearer {token}"), 401, "invalid_token")
    other, _ = await person(here)
    token = await access(here, other, "openid")
    await here.projecting(disable_user(here.runtime, SYSTEM, other, erase=True))
    refused(await asked(here, f"Bearer {token}"), 401, "invalid_token")


async def test_request_is_a_use_of_the_token(here: Host) -> None:
    recorded: list[Any] = []
    record = here.runtime.usage.record

    def kept(*uses: Any) -> Any:
        recorded.extend(uses)
        return record(*uses)

    user_id, _ = await person(here)
    token = await access(here, user_id, "openid")
    here.runtime.usage.record = kept  # type: ignore[method-assign]
    try:
        await asked(here, f"Bearer {token}")
    finally:
        here.runtime.usage.record = record  # type: ignore[method-assign]
    (use,) = recorded
    assert (use.endpoint, use.outcome, use.scope, use.caller) == ("userinfo", "valid", "openid", use.token_id)
