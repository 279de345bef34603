"""Authorization codes to redeem, written to the ledger as the authorization endpoint writes them."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlencode

import httpx

from events.ledger import Append, Ledger
from events.types import AuthorizationGranted, Kind, MintedToken
from service.rules.codes import challenge_of
from service.tokens import mint, new_id, now, uuid7_hex
from tests import running
from tests.bench.fill import EVENTS_PER_APPEND, connected

PER_SECOND_MAX = 2_500  # more than can be redeemed
_REDIRECT = "https://app.example/back"
_VERIFIER = "v" * 43
_TTL = timedelta(minutes=10)  # they are made before the row begins, and it takes longer than a code lives


def write(service: running.Service, app: running.App, path: Path, seconds: float) -> str:
    """Codes for so many seconds, one a line of `path`; answers the parameters to send with each.

    Each is a grant of a person to `app`, with a refresh token to come.
    """
    written, seq = asyncio.run(_write(service, app, int(seconds * PER_SECOND_MAX)))
    path.write_text("".join(f"{code}\n" for code in written))
    running.until(lambda: _view_has(service, seq), seconds=600, what="the view has all codes")
    return urlencode({"redirect_uri": _REDIRECT, "code_verifier": _VERIFIER})


def app_of(service: running.Service) -> running.App:
    """A confidential client of people, with opaque tokens."""
    return service.app(
        grant_types=["authorization_code", "refresh_token"], redirect_uris=[_REDIRECT], scope=service.scope()
    )


async def _write(service: running.Service, app: running.App, count: int) -> tuple[list[str], int]:
    """The codes, and the sequence of the last."""
    user_id, scope = service.user()["user_id"], app.metadata["scope"]
    nc = await connected(service, "service", "bench codes")
    try:
        ledger, codes, seq = Ledger(nc), [], 0
        for start in range(0, count, EVENTS_PER_APPEND):
            made = [mint("ac") for _ in range(min(EVENTS_PER_APPEND, count - start))]
            events = [_event(app.client_id, user_id, scope, code, service.issuer) for code in made]
            seq = max(await ledger.append(*(Append(f"ledger.main.grant.{one.grant_id}", one, 0) for one in events)))
            codes += made
    finally:
        await nc.close()
    return codes, seq


def _view_has(service: running.Service, seq: int) -> bool:
    response: httpx.Response = service.call(
        "POST", "/v1/tokens/validate", json={"token": service.admin_token, "min_seq": seq}
    )
    return response.status_code == 200 and response.json()["code"] == "valid"


def _event(client_id: str, user_id: str, scope: str, code: str, audience: str) -> AuthorizationGranted:
    at = now()
    return AuthorizationGranted(
        id=uuid7_hex(),
        occurred_at=at,
        by=user_id,
        grant_id=new_id("grt"),
        subject=user_id,
        client_id=client_id,
        scope=scope,
        audience=(audience,),
        session_id=new_id("ses"),
        code=MintedToken(
            token_id=new_id("tok"),
            sha256=hashlib.sha256(code.encode()).hexdigest(),
            kind=Kind.CODE,
            scope=scope,
            audience=(audience,),
            expires_at=(at + _TTL).replace(microsecond=0),
        ),
        redirect_uri=_REDIRECT,
        code_challenge=challenge_of(_VERIFIER),
        sealed_nonce=None,
        auth_time=at,
        offline=True,
        response_type="code",
    )
