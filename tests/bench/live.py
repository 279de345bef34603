"""The small scale: real clients, people and tokens, real requests over HTTP, and how soon a finding is in the ledger.

Only of rules that need no long past: nobody can wait for a token to sleep for two weeks. Addresses and agents come in
headers of a proxy that the service trusts, as behind a reverse proxy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec

from service.tokens import mint
from tests import running
from tests.bench import labels
from tests.bench.evaluation import NAMES
from tests.codes import authorize, outlast_the_race, redeem, verifier, web_app
from tests.e2e.test_sign_in import Browser
from tests.running import CANARY_PASSWORD, unique

SECONDS_MAX = 30.0
HOME, OFFICE, LAIR = "82.14.20.7", "64.88.3.10", "185.220.101.4"
AGENT = "okhttp/4.12.0"
THIEF = "python-requests/2.32.4"


class Drill(msgspec.Struct, frozen=True, kw_only=True):
    """One attack on the running service. `about`: what a finding must name one of; empty: it may name nothing."""

    rule: str
    requests: int
    about: frozenset[str]
    last_at: datetime


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds`: from the use that completed the finding until that was in the ledger; None: there was none.

    A count of refused requests says no more than its minute: from the last request then.
    """

    rule: str
    requests: int
    seconds: float | None


class Stage:
    """The service, and who asks it."""

    def __init__(self, service: running.Service) -> None:
        self.service = service
        self.requests = 0
        self.scopes = [service.scope() for _ in range(30)]

    def ask(self, token: str, ip: str, agent: str, **query: str) -> httpx.Response:
        """As a reverse proxy asks about a request that came from there."""
        self.requests += 1
        headers = {"Authorization": f"Bearer {token}", "X-Forwarded-For": ip, "User-Agent": agent}
        return self.service.http.get("/v1/forward-auth", params=query, headers=headers)

    def person(self) -> dict[str, Any]:
        """A PAT that was used from where its owner is."""
        user = self.service.user(scope=" ".join(self.scopes[:2]))
        issued = self.service.issue(user["user_id"], " ".join(self.scopes[:2]))
        for _ in range(5):
            assert self.ask(issued["token"], HOME, AGENT).status_code == 200
        return issued

    def app(self) -> tuple[running.App, dict[str, Any]]:
        """A client that refreshes, and its tokens."""
        app = self.service.app(grant_types=["client_credentials", "refresh_token"], scope=self.scopes[0])
        return app, self.service.grant(app)

    def web_app(self) -> running.App:
        """A client that people sign in to."""
        return web_app(self.service, self.scopes[0])

    def try_password(self, username: str, ip: str) -> None:
        """Nobody's password, from a browser of its own at that address."""
        answer = Browser(self.service).sign_in(
            {"username": username, "password": "not this one"}, headers={"X-Forwarded-For": ip}
        )
        assert answer.status_code == 400, answer.text
        self.requests += 1


def refresh_reuse(stage: Stage) -> set[str]:
    app, first = stage.app()
    assert stage.service.refresh(app, first["refresh_token"]).status_code == 200
    assert stage.service.refresh(app, first["refresh_token"]).status_code == 400
    stage.requests += 2
    grants = {item["grant_id"] for item in stage.service.items("/v1/tokens", client_id=app.client_id)}
    return {app.client_id, *grants}


def use_after_end(stage: Stage) -> set[str]:
    issued = stage.person()
    stage.service.done("POST", f"/v1/tokens/{issued['token_id']}/revoke", json={"reason": "compromised"})
    for _ in range(5):
        assert stage.ask(issued["token"], LAIR, THIEF).status_code == 401
    return {issued["token_id"]}


def many_addresses(stage: Stage) -> set[str]:
    issued = stage.person()
    for number in range(120):
        ip = f"{60 + number % 60}.{number}.{number * 7 % 250}.9"
        assert stage.ask(issued["token"], ip, AGENT).status_code == 200
    return {issued["token_id"]}


def scanning(stage: Stage) -> set[str]:
    for _ in range(300):
        assert stage.ask(mint("pat"), LAIR, THIEF).status_code in {401, 429}
    return set()


def scope_probing(stage: Stage) -> set[str]:
    issued = stage.person()
    for scope in stage.scopes[2:]:
        assert stage.ask(issued["token"], HOME, AGENT, scope=scope).status_code == 403
    return {issued["token_id"]}


def secret_spraying(stage: Stage) -> set[str]:
    apps = [stage.service.app() for _ in range(25)]
    for app in apps:
        answer = stage.service.form(
            "/oauth2/token",
            (app.client_id, mint("cs")),
            {"X-Forwarded-For": LAIR},
            grant_type="client_credentials",
        )
        assert answer.status_code == 401
        stage.requests += 1
    return set()


def shared_token(stage: Stage) -> set[str]:
    issued = stage.person()
    agents = ["curl/8.11.0", "Shop/5.1.0 (iPhone; iOS 18.1)", "Mozilla/5.0 (Windows NT 10.0) Chrome/131.0.0.0", THIEF]
    for number in range(120):
        user = number % 4
        assert stage.ask(issued["token"], f"{84 + user}.7.{user}.9", agents[user]).status_code == 200
    return {issued["token_id"]}


def impossible_rate(stage: Stage) -> set[str]:
    issued = stage.person()
    for _ in range(2500):
        assert stage.ask(issued["token"], HOME, AGENT).status_code == 200
    return {issued["token_id"]}


def code_replay(stage: Stage) -> set[str]:
    service, app = stage.service, stage.web_app()
    proof = verifier()
    code = authorize(service, app, service.user(scope=stage.scopes[0])["user_id"], proof)
    assert redeem(service, app, code, proof).status_code == 200
    outlast_the_race()
    assert redeem(service, app, code, proof).status_code == 400
    stage.requests += 2
    return {app.client_id}


def constant_challenge(stage: Stage) -> set[str]:
    service, app = stage.service, stage.web_app()
    proof = verifier()
    for _ in range(8):
        code = authorize(service, app, service.user(scope=stage.scopes[0])["user_id"], proof)
        assert redeem(service, app, code, proof).status_code == 200
        stage.requests += 1
    return {app.client_id}


def password_spraying(stage: Stage) -> set[str]:
    for _ in range(12):
        stage.try_password(stage.service.user(password=unique(CANARY_PASSWORD))["username"], LAIR)
    return set()


def account_guessing(stage: Stage) -> set[str]:
    user = stage.service.user(password=unique(CANARY_PASSWORD))
    for number in range(12):
        stage.try_password(user["username"], f"{60 + number}.7.{number}.9")
    return {user["user_id"]}


DRILLS: dict[str, Callable[[Stage], set[str]]] = {
    labels.REFRESH_REUSE: refresh_reuse,
    labels.USE_AFTER_END: use_after_end,
    labels.MANY_ADDRESSES: many_addresses,
    labels.SCANNING: scanning,
    labels.SCOPE_PROBING: scope_probing,
    labels.SECRET_SPRAYING: secret_spraying,
    labels.SHARED: shared_token,
    labels.IMPOSSIBLE_RATE: impossible_rate,
    labels.CODE_REPLAY: code_replay,
    labels.CONSTANT_CHALLENGE: constant_challenge,
    labels.PASSWORD_SPRAYING: password_spraying,
    labels.ACCOUNT_GUESSING: account_guessing,
}
_COUNTED = {labels.SCANNING, labels.SECRET_SPRAYING, labels.PASSWORD_SPRAYING, labels.ACCOUNT_GUESSING}


def run(directory: Path) -> list[Latency]:
    """Starts a service, attacks it, and waits for what it finds."""
    service = running.start(
        directory,
        workers=1,
        trusted_proxies="127.0.0.0/8",
        refresh_retry_window_seconds=0,
        sign_in_failures_free=20,
    )
    try:
        stage = Stage(service)
        drills = []
        for rule, attack in DRILLS.items():
            before = stage.requests
            about = attack(stage)
            drills.append(
                Drill(
                    rule=rule,
                    requests=stage.requests - before,
                    about=frozenset(about),
                    last_at=datetime.now(UTC),
                )
            )
        return _latencies(service, drills)
    finally:
        service.stop()


def _latencies(service: running.Service, drills: list[Drill]) -> list[Latency]:
    """As soon as each drill has its finding, or when the time is over."""
    deadline = time.monotonic() + SECONDS_MAX
    while True:
        events = list(service.items("/v1/audit/events", type="abuse.detected", limit="1000"))
        found = [Latency(rule=one.rule, requests=one.requests, seconds=_seconds(one, events)) for one in drills]
        if all(one.seconds is not None for one in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def _seconds(drill: Drill, events: list[dict[str, Any]]) -> float | None:
    for event in events:
        body = event["body"]
        names = {body.get(name) for name in ("token_id", "grant_id", "client_id", "subject", "caller")}
        if NAMES[body["rule"]] == drill.rule and (not drill.about or drill.about & names):
            since = drill.last_at if drill.rule in _COUNTED else datetime.fromisoformat(body["detected_at"])
            return max(0.0, (datetime.fromisoformat(event["recorded_at"]) - since).total_seconds())
    return None
