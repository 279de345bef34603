"""Authorization codes for tests: made as the service makes them, without a person in front of its pages."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx

from events.ledger import Append, Ledger
from events.streams import connect
from events.types import AuthorizationGranted, Kind
from service.commands import subject
from service.grants import minted_token, stamp
from service.rules.codes import RACE, Authorize, challenge_of, decide_authorize
from service.tokens import mint, new_id, now
from tests.running import App, Service

REDIRECT_URI = "https://shop.example/back"


def outlast_the_race() -> None:
    """Until who sends a code that was spent just now replays it: the log's clock says so, which no test can set."""
    time.sleep(RACE.total_seconds() + 0.1)


def verifier() -> str:
    return secrets.token_urlsafe(32)


def web_app(service: Service, scope: str, **metadata: Any) -> App:
    """A confidential client that people sign in to; a public one by `token_endpoint_auth_method="none"`."""
    return service.app(
        **{
            "grant_types": ["authorization_code", "refresh_token"],
            "redirect_uris": [REDIRECT_URI],
            "scope": scope,
        }
        | metadata
    )


def authorized(
    app: App, user_id: str, code_verifier: str, *, seconds: float = 60, **changes: Any
) -> tuple[str, AuthorizationGranted]:
    """A code that is good for so many seconds more, and the first event of its grant."""
    code, mark = mint("ac"), stamp(user_id, None)
    scope, audience = changes.get("scope", app.metadata["scope"]), tuple(app.metadata["audience"])
    fields: dict[str, Any] = {
        "grant_id": new_id("grt"),
        "subject": user_id,
        "client_id": app.client_id,
        "session_id": new_id("ses"),
        "scope": scope,
        "audience": audience,
        "code": minted_token(code, Kind.CODE, scope, audience, mark.at + timedelta(seconds=seconds)),
        "redirect_uri": REDIRECT_URI,
        "code_challenge": challenge_of(code_verifier),
        "sealed_nonce": None,
        "auth_time": now() - timedelta(minutes=5),
        "offline": True,
        "response_type": "code",
    }
    return code, decide_authorize(Authorize(stamp=mark, **fields | changes))


def authorize(service: Service, app: App, user_id: str, code_verifier: str, **changes: Any) -> str:
    """As `authorized`, recorded."""
    code, event = authorized(app, user_id, code_verifier, **changes)
    asyncio.run(_append(service.data_dir, event))
    return code


async def _append(data_dir: Path, event: AuthorizationGranted) -> None:
    nats_url = json.loads((data_dir / "bootstrap.json").read_text())["nats_url"]
    nc = await connect(nats_url, data_dir / "nats" / "service.nk", name="codes")
    try:
        await Ledger(nc).append(Append(subject("grant", event.grant_id), event, 0))
    finally:
        await nc.close()


def redeem(
    service: Service, app: App, code: str, code_verifier: str, http: httpx.Client | None = None, /, **parameters: Any
) -> httpx.Response:
    """The client presents the code; other `parameters` take the place of what belongs to it."""
    form = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": REDIRECT_URI,
        "code_verifier": code_verifier,
    }
    options: dict[str, Any] = {"auth": app.basic} if app.client_secret else {}
    if not app.client_secret:
        form["client_id"] = app.client_id
    return (http or service.http).post("/oauth2/token", data=form | parameters, **options)
