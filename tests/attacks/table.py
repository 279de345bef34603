"""The table of attacks: each row a request that a hostile or broken client sends, and what a strict service says.

A row's number is kept from the project's list of attacks, which also holds rows for features that other parts of
the project bring; its source says which sentence decides the answer. `P` in front of a source marks our own policy.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlencode

from tests.running import FORM, App, RawResponse, Service, StartService

# Three services with settings of their own: every start takes seconds.
ODD_ISSUER = "https://auth.example/tenant/one"
ODD: dict[str, Any] = {
    "issuer": ODD_ISSUER,
    "refresh_retry_window_seconds": 1,
    "request_seconds_max": 2,
    "unknown_tokens_per_minute_max": 20,
    "trusted_proxies": "127.0.0.1",
}
# Pushed requests expire while a test waits, and there may be few of them.
HASTY = {"pushed_request_ttl_seconds": 5, "pushed_requests_per_minute_max": 20}
STRICT = {"refresh_retry_window_seconds": 0}


@dataclass
class Stage:
    """What an attack plays on. `service_with` gives services with other settings."""

    service: Service
    service_with: StartService

    @cached_property
    def odd(self) -> Stage:
        return Stage(self.service_with(**ODD), self.service_with)

    @cached_property
    def strict(self) -> Stage:
        """Where every reuse of a refresh token is an attack."""
        return Stage(self.service_with(**STRICT), self.service_with)

    @cached_property
    def hasty(self) -> Stage:
        return Stage(self.service_with(**HASTY), self.service_with)

    @cached_property
    def read(self) -> str:
        return self.service.scope()

    @cached_property
    def write(self) -> str:
        return self.service.scope()

    @cached_property
    def app(self) -> App:
        """A client that never fails to authenticate, so that no limit ever meets it."""
        return self.new_app()

    @cached_property
    def checker(self) -> App:
        """A resource server that may introspect everything."""
        return self.service.app(may_introspect=True, audience=["*"])

    def new_app(self, **metadata: object) -> App:
        """A client of its own: failures are counted per client."""
        wanted: dict[str, object] = {
            "grant_types": ["client_credentials", "refresh_token"],
            "scope": f"{self.read} {self.write}",
        }
        return self.service.app(**(wanted | metadata))

    def post(self, path: str, body: str | bytes, *headers: tuple[str, str | bytes]) -> RawResponse:
        """A form, sent byte for byte; a Content-Type among `headers` replaces ours, an empty one leaves it out."""
        given = {name.lower() for name, _ in headers}
        more = [] if "content-type" in given else [("Content-Type", FORM)]
        data = body.encode() if isinstance(body, str) else body
        return self.service.raw_call("POST", path, [*(one for one in headers if one[1] != ""), *more], data)

    def token(self, app: App | None, body: str | bytes, *headers: tuple[str, str | bytes]) -> RawResponse:
        """A token request with Basic authentication, if `app` is given."""
        return self.post("/oauth2/token", body, *([basic(*app.basic)] if app else []), *headers)

    def introspected(self, token: str) -> object:
        """What the resource server learns of `token`."""
        return self.service.introspect(self.checker, token)

    def refreshable(self, app: App | None = None) -> dict[str, str]:
        """A fresh answer with `access_token` and `refresh_token`."""
        answer: dict[str, str] = self.service.grant(app or self.app)
        return answer


def basic(name: str, password: str) -> tuple[str, str]:
    """An Authorization header. RFC 7617 §2."""
    return ("Authorization", "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode())


def bearer(token: str) -> tuple[str, str]:
    return ("Authorization", f"Bearer {token}")


def form(**parameters: str) -> str:
    return urlencode(parameters)


CREDENTIALS = "grant_type=client_credentials"


@dataclass(frozen=True)
class Attack:
    """One row of the table. `run` sends it and asserts the answer."""

    row: str
    source: str
    run: Callable[[Stage], None]

    @property
    def identity(self) -> str:
        return f"{self.row}-{self.run.__name__}"


TABLE: list[Attack] = []
Run = Callable[[Stage], None]


def attack(row: str, source: str) -> Callable[[Run], Run]:
    """Enters the decorated function in the table."""

    def enter(run: Run) -> Run:
        TABLE.append(Attack(row, source, run))
        return run

    return enter


def variants(row: str, source: str, **choices: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Enters one row for each of `choices`, named by its key and given to the function as its second argument."""

    def enter(run: Callable[..., None]) -> Callable[..., None]:
        for name, choice in choices.items():

            def one(stage: Stage, choice: object = choice) -> None:
                run(stage, choice)

            one.__name__ = f"{run.__name__}[{name}]"
            one.__module__ = run.__module__
            TABLE.append(Attack(row, source, one))
        return run

    return enter
