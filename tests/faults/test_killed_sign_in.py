"""Workers that are killed between what they record and what they do next: while people sign in and take back."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
import pytest

from events.ledger import Append, Ledger
from events.streams import connect
from events.types import ConsentGiven, Kind, LedgerEvent
from service.tokens import mint_kind, now
from tests.e2e.test_sign_in import Browser, person, sessions
from tests.making import allowed, head, subject_of
from tests.running import App, Service, StartService, until

pytestmark = pytest.mark.slow

RECOVERY_SECONDS_MAX = 60.0
T = TypeVar("T")


def in_log(service: Service, work: Callable[[Ledger], Coroutine[Any, Any, T]]) -> T:
    """What this comes to, with the service's own rights."""

    async def connected() -> T:
        url = json.loads((service.data_dir / "bootstrap.json").read_text())["nats_url"]
        nc = await connect(url, service.data_dir / "nats" / "service.nk", name="test")
        try:
            return await work(Ledger(nc))
        finally:
            await nc.close()

    return asyncio.run(connected())


def recorded(service: Service, *events: LedgerEvent) -> None:
    async def append(ledger: Ledger) -> None:
        await ledger.append(*(Append(subject_of(event), event) for event in events))

    in_log(service, append)


def last_tag(service: Service, subjects: str) -> str:
    async def last(ledger: Ledger) -> str:
        found = await ledger.last_of(subjects)
        return type(found[-1].event).__name__ if found else ""

    return in_log(service, last)


def granted(service: Service, user_id: str, app: App) -> str:
    """An access token that the person gave the client, which they consented to."""
    token = mint_kind(Kind.ACCESS)
    consent = ConsentGiven(**head(now(), by=user_id), user_id=user_id, client_id=app.client_id, scope="openid")
    recorded(service, consent, *allowed(user_id, app.client_id, token=token, offline=True))
    until(lambda: service.code(token) == "valid", what="the token is good")
    return token


def killed_behind(service: Service, ask: Callable[[], httpx.Response], subjects: str, tag: str) -> None:
    """The view stands still, so that whoever has recorded the event waits for it; then every worker is killed."""
    workers = service.workers()
    with ThreadPoolExecutor(1) as thread:
        with service.projector("current").stopped():
            asked = thread.submit(ask)
            until(lambda: last_tag(service, subjects) == tag, seconds=20, what=f"{tag} is recorded")
            for worker in workers:
                worker.kill()
            until(lambda: not any(worker.alive() for worker in workers), what="they are dead")
        error = asked.exception(timeout=30)
        assert isinstance(error, httpx.TransportError) or asked.result().status_code == 503
    until(service.ready, seconds=RECOVERY_SECONDS_MAX, what="the service is back")


def test_withdrawal_is_completed_when_its_worker_was_killed(own_service: StartService) -> None:
    service = own_service()
    user, app = person(service), service.app()
    token = granted(service, user["user_id"], app)
    path = f"/v1/users/{user['user_id']}/consents"

    def withdraw() -> httpx.Response:
        with service.caller() as http:
            headers = {"Authorization": f"Bearer {service.admin_token}"}
            return http.delete(path, params={"client_id": app.client_id}, headers=headers)

    killed_behind(service, withdraw, f"ledger.main.consent.{user['user_id']}_{app.client_id}", "ConsentWithdrawn")
    until(lambda: service.code(token) == "revoked", seconds=RECOVERY_SECONDS_MAX, what="somebody has completed it")
    assert service.done("GET", path)["items"][0]["status"] == "withdrawn"
    done = service.done("DELETE", path, params={"client_id": app.client_id})
    assert done["grants"] == 0
    ended = [line for line in service.log_path.read_text().splitlines() if "api_worker_ended" in line]
    assert {json.loads(line)["code"] for line in ended} == {-signal.SIGKILL}


def test_sign_in_whose_worker_was_killed_is_done_again(own_service: StartService) -> None:
    service = own_service()
    user, browser = person(service), Browser(service)
    killed_behind(service, lambda: browser.sign_in(user), "ledger.main.session.*", "SessionStarted")
    assert not browser.is_signed_in()
    assert browser.sign_in(user).status_code == 303
    assert browser.is_signed_in()
    # One that nobody can be in, and that ends by itself.
    assert len(sessions(service, user)) == 2
