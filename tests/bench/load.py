"""The rows under load: what is asked, with what, and what came of it, beside the echo."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import httpx
import msgspec

from tests import running
from tests.bench import codes, wrk
from tests.bench.fill import Filled, Uses, usage_end, uses_between
from tests.bench.machine import cores
from tests.bench.processes import Echo, cpu_seconds, machine_cpu, settle

BATCH_TOKENS = 1000
CHECK_SECONDS = 1
REFRESH_TOKENS_PER_CONNECTION = 4


class BenchFailed(Exception):
    """The service did not do what was to be measured."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One row: a script of lua/ and what it needs.

    `expected`: the only answer that counts. `uses_per_request`: uses that a request leaves behind.
    `items`: what a request is counted as, for batches. `echo_script`: what the echo is asked, if not the same.
    """

    name: str
    script: str
    settings: dict[str, str]
    expected: str
    connections: int = 64
    items: int = 1
    uses_per_request: int = 0
    echo_script: str | None = None
    checks_itself: bool = False


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one row. `cpu_us`: CPU time of a request by role, `wrk` and `echo`, for one of its own, included.

    `cpu_of_others`: share of the machine's CPU that went to programs that have nothing to do with it.
    `cpu_stolen`: what a virtual machine was not given by its host although it had work for it.
    Above a few percent of either, the row says less about the service than about them.
    """

    name: str
    connections: int
    items: int
    run: wrk.Run
    echo_before: wrk.Run
    echo_after: wrk.Run
    cpu_us: dict[str, float]
    cpu_of_others: float
    cpu_stolen: float
    uses: Uses | None

    @property
    def echo_per_second(self) -> float:
        return (self.echo_before.per_second + self.echo_after.per_second) / 2

    @property
    def ratio(self) -> float:
        return self.run.per_second / self.echo_per_second

    @property
    def items_per_second(self) -> float:
        return self.run.per_second * self.items


class Durations(msgspec.Struct, frozen=True, kw_only=True):
    row_seconds: float
    echo_seconds: float


def validation(service: running.Service, filled: Filled, mode: str, connections: int) -> Load:
    """Validation of random tokens. `mode` is how uses are recorded."""
    return Load(
        name=f"validate, {mode}",
        script="validate",
        settings=_bearer(service, filled),
        expected="200 valid",
        connections=connections,
        uses_per_request=1,
    )


def others(service: running.Service, filled: Filled, connections: int, row_seconds: float) -> list[Load]:
    """Every other row, in the order of the table."""
    bearer = _bearer(service, filled)
    audience = {"AUDIENCE": quote(service.issuer, safe="")}
    return [
        Load(
            name=f"validate-batch, {BATCH_TOKENS} tokens a request",
            script="batch",
            settings=bearer | {"BATCH": str(BATCH_TOKENS)},
            expected="200 all valid",
            connections=max(2, connections // 8),
            items=BATCH_TOKENS,
            uses_per_request=BATCH_TOKENS,
        ),
        _issue(service, "jwt", "JWT", connections),
        _issue(service, "opaque", "opaque token", connections),
        Load(
            name="introspect",
            script="introspect",
            settings=bearer,
            expected="200 active",
            connections=connections,
            uses_per_request=1,
        ),
        Load(
            name="forward-auth",
            script="forward_auth",
            settings=bearer | audience,
            expected="200",
            connections=connections,
            uses_per_request=1,
        ),
        _refresh(service, filled.tokens_path.with_name("refresh-tokens"), connections),
        _redeem(service, filled.tokens_path.with_name("codes"), connections, row_seconds),
        _read("JWKS", "/oauth2/jwks", connections),
        _read("metadata", "/.well-known/oauth-authorization-server", connections),
    ]


def _bearer(service: running.Service, filled: Filled) -> dict[str, str]:
    token = service.bearer("ledger:validate")
    return {"AUTHORIZATION": f"Bearer {token}", "TOKENS": str(filled.tokens_path)}


def _basic(app: running.App) -> dict[str, str]:
    # The client of httpx knows how a client id and secret become a header (RFC 7617).
    request = httpx.Request("POST", "http://localhost")
    flow = httpx.BasicAuth(*app.basic).auth_flow(request)
    return {"AUTHORIZATION": next(flow).headers["Authorization"]}


def _issue(service: running.Service, token_format: str, words: str, connections: int) -> Load:
    app = service.app(access_token_format=token_format, scope=service.scope())
    return Load(
        name=f"issue by client credentials, {words}",
        script="issue",
        settings=_basic(app),
        expected="200 issued",
        connections=connections,
    )


def _refresh(service: running.Service, path: Path, connections: int) -> Load:
    app = service.app(grant_types=["client_credentials", "refresh_token"], scope=service.scope())
    tokens = [service.grant(app)["refresh_token"] for _ in range(REFRESH_TOKENS_PER_CONNECTION * connections)]
    path.write_text("".join(f"{token}\n" for token in tokens))
    return Load(
        name="refresh, with rotation",
        script="refresh",
        settings=_basic(app) | {"TOKENS": str(path)},
        expected="200 refreshed",
        connections=connections,
        echo_script="issue",
        checks_itself=True,
    )


def _redeem(service: running.Service, path: Path, connections: int, row_seconds: float) -> Load:
    app = codes.app_of(service)
    return Load(
        name="redemption of a code",
        script="redeem",
        settings=_basic(app) | {"TOKENS": str(path), "PARAMETERS": codes.write(service, app, path, row_seconds)},
        expected="200 redeemed",
        connections=connections,
        echo_script="issue",
        checks_itself=True,
    )


def _read(name: str, path: str, connections: int) -> Load:
    return Load(name=name, script="read", settings={"PATH_READ": path}, expected="200", connections=connections)


def measure(service: running.Service, echo: Echo, load: Load, durations: Durations, say: Callable[[str], None]) -> Row:
    """Echo, service, echo. Before, every answer is looked at for a second, and afterwards the uses are counted.

    Raises: BenchFailed, wrk.WrkFailed
    """
    say(load.name)

    def echoed() -> wrk.Run:
        script = load.echo_script or load.script
        return wrk.run(script, echo.port, load.settings, connections=load.connections, seconds=durations.echo_seconds)

    def asked(seconds: float, *, check: bool) -> wrk.Run:
        return wrk.run(
            load.script, service.port, load.settings, connections=load.connections, seconds=seconds, check=check
        )

    if not load.checks_itself:
        _hold(load, asked(CHECK_SECONDS, check=True))
    settle(service)
    echo_cpu_before = echo.cpu_seconds()
    echo_before = echoed()
    echo_cpu = (echo.cpu_seconds() - echo_cpu_before) / echo_before.requests
    usage_before = asyncio.run(usage_end(service))
    machine_before, began = machine_cpu(), time.monotonic()
    cpu_before, generator_before = cpu_seconds(service.tree()), _children_cpu_seconds()
    run = asked(durations.row_seconds, check=False)
    cpu = {name: used - cpu_before.get(name, 0.0) for name, used in cpu_seconds(service.tree()).items()}
    cpu["wrk"] = _children_cpu_seconds() - generator_before
    given = (time.monotonic() - began) * cores()
    machine = machine_cpu()
    of_others = max(0.0, machine.busy_seconds - machine_before.busy_seconds - sum(cpu.values())) / given
    stolen = (machine.stolen_seconds - machine_before.stolen_seconds) / given
    settle(service)
    echo_after = echoed()
    if load.checks_itself:
        _hold(load, run)
    uses = None
    if load.uses_per_request:
        uses = asyncio.run(uses_between(service, usage_before, asyncio.run(usage_end(service))))
    return Row(
        name=load.name,
        connections=load.connections,
        items=load.items,
        run=run,
        echo_before=echo_before,
        echo_after=echo_after,
        cpu_us={name: used / run.requests * 1e6 for name, used in cpu.items()} | {"echo": echo_cpu * 1e6},
        cpu_of_others=of_others,
        cpu_stolen=stolen,
        uses=uses,
    )


def _hold(load: Load, run: wrk.Run) -> None:
    found = {label.strip(): count for label, count in run.answers.items()}
    if found.keys() != {load.expected}:
        raise BenchFailed(f"{load.name}: every answer must be `{load.expected}`, and these came: {found}")


def _children_cpu_seconds() -> float:
    """CPU time of the programs that this one started and that have ended: wrk."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
