"""A worker is killed after it has spent a code and before it has answered: no second set of tokens ever comes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.codes import REDIRECT_URI, authorize, outlast_the_race, redeem, verifier, web_app
from tests.running import ROOT, Service, oauth_error

# A worker beside those of the service, which dies as soon as its append has been acknowledged.
KILLED = """
import asyncio, json, os, signal, sys
from pathlib import Path
from service.oauth.codes import Redemption, redeem
from service.runtime import Runtime
from service.settings import Settings

async def main():
    told = json.loads(sys.argv[1])
    data_dir = Path(told["data_dir"])
    runtime = await Runtime.start(
        Settings(data_dir=data_dir, nats_url=told["nats_url"], nats_creds=data_dir / "nats" / "service.nk")
    )
    append = runtime.ledger.append

    async def append_and_die(*entries):
        await append(*entries)
        os.kill(os.getpid(), signal.SIGKILL)

    runtime.ledger.append = append_and_die
    client = runtime.view.client(told["client_id"])
    await redeem(
        runtime,
        Redemption(
            client=client,
            code=told["code"],
            redirect_uri=told["redirect_uri"],
            code_verifier=told["code_verifier"],
            resources=(),
            request_id="killed",
        ),
    )

asyncio.run(main())
"""


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_killed_between_append_and_answer_leaves_at_most_the_tokens_nobody_got(service: Service, later: bool) -> None:
    scope = service.scope()
    person, app, proof = service.user(scope=scope)["user_id"], web_app(service, scope), verifier()
    code = authorize(service, app, person, proof)
    told = {
        "data_dir": str(service.data_dir),
        "nats_url": json.loads((service.data_dir / "bootstrap.json").read_text())["nats_url"],
        "client_id": app.client_id,
        "code": code,
        "redirect_uri": REDIRECT_URI,
        "code_verifier": proof,
    }
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(told)], cwd=ROOT, timeout=60, check=False, capture_output=True
    )
    assert killed.returncode == -9, killed.stderr
    if later:
        outlast_the_race()
    oauth_error(redeem(service, app, code, proof), 400, "invalid_grant")
    made = list(service.items("/v1/tokens", client_id=app.client_id))
    assert sorted(one["kind"] for one in made) == ["access", "refresh"]
    if later:
        assert {one["status"] for one in made} == {"revoked"}
    outlast_the_race()
    oauth_error(redeem(service, app, code, proof), 400, "invalid_grant")
    assert {status(one) for one in service.items("/v1/tokens", client_id=app.client_id)} == {
        ("revoked", "code_replayed")
    }


def status(token: dict[str, Any]) -> tuple[str, str]:
    return token["status"], token["reason"]
