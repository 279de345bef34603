"""Which client asks: whoever is refused learns one thing, at every endpoint, and it costs the same."""

from __future__ import annotations

import base64
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode

import pytest
import pytest_asyncio

from events.types import ClientDisabled, ClientRegistered, ClientSecretRotated, Reason
from projections.tables import DECODERS
from service.errors import InvalidClient
from service.incoming import Incoming
from service.oauth import forms
from service.oauth.introspection import introspect
from service.oauth.pushed import push
from service.oauth.revocation import revoke
from service.oauth.token import token
from service.outgoing import Response
from service.runtime import RateLimiter, Runtime
from service.tokens import mint, new_id, now, sha256
from tests.hosts import Host, host
from tests.making import head, metadata
from tests.rsgi import END, request

Credentials = tuple[str, str | None]
Endpoint = Callable[[Runtime, Incoming], Awaitable[Response]]

ENDPOINTS: list[Endpoint] = [token, introspect, revoke, push]
CODE = ("authorization_code",)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def here(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    async with host(tmp_path_factory.mktemp("host")) as made:
        yield made


async def registered(here: Host, **changes: Any) -> tuple[str, str]:
    """A client's id and secret."""
    client_id, secret = new_id("cli"), mint("cs")
    hashed = None if changes.get("token_endpoint_auth_method") == "none" else sha256(secret).hex()
    event = ClientRegistered(**head(), client_id=client_id, metadata=metadata(**changes), secret_sha256=hashed)
    await here.record(event)
    await here.project()
    return client_id, secret


async def unknown(_: Host) -> Credentials:
    return new_id("cli"), mint("cs")


async def unknown_without_secret(_: Host) -> Credentials:
    return new_id("cli"), None


async def no_id(_: Host) -> Credentials:
    return "nobody", mint("cs")


async def long_name(_: Host) -> Credentials:
    return "cli_" + "0" * 252, mint("cs")


async def wrong(here: Host) -> Credentials:
    return (await registered(here))[0], mint("cs")


async def wrong_of_a_long_registration(here: Host) -> Credentials:
    uris = tuple(f"https://app.example/{number}/" + "x" * 1_900 for number in range(25))
    return (await registered(here, grant_types=CODE, redirect_uris=uris))[0], mint("cs")


async def without_secret(here: Host) -> Credentials:
    return (await registered(here))[0], None


async def empty(here: Host) -> Credentials:
    return (await registered(here))[0], ""


async def public_with_a_secret(here: Host) -> Credentials:
    return (await registered(here, token_endpoint_auth_method="none", grant_types=CODE))[0], mint("cs")


async def disabled(here: Host) -> Credentials:
    client_id, secret = await registered(here)
    await here.record(ClientDisabled(**head(), client_id=client_id, reason=Reason.DISABLED))
    await here.project()
    return client_id, secret


async def disabled_public(here: Host) -> Credentials:
    client_id, _ = await registered(here, token_endpoint_auth_method="none", grant_types=CODE)
    await here.record(ClientDisabled(**head(), client_id=client_id, reason=Reason.DISABLED))
    await here.project()
    return client_id, None


async def rotated_away(here: Host) -> Credentials:
    client_id, secret = await registered(here)
    new, ended = sha256(mint("cs")).hex(), now() - timedelta(seconds=1)
    await here.record(ClientSecretRotated(**head(), client_id=client_id, secret_sha256=new, previous_ends_at=ended))
    await here.project()
    return client_id, secret


REFUSED = [
    unknown,
    unknown_without_secret,
    no_id,
    long_name,
    wrong,
    wrong_of_a_long_registration,
    without_secret,
    empty,
    public_with_a_secret,
    disabled,
    disabled_public,
    rotated_away,
]


class Work:
    """What is done for a request, counted, since a clock proves nothing."""

    def __init__(self, here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows_read = self.secrets_hashed = self.ends_asked = 0
        self._compared: set[str] = set()
        decode, hashed, compare, at_end = (
            DECODERS["client"],
            forms.sha256,
            hmac.compare_digest,
            here.runtime.view_at_end,
        )

        def read(row: bytes) -> Any:
            self.rows_read += 1
            return decode(row)

        def hashing(text: str) -> bytes:
            self.secrets_hashed += 1
            return hashed(text)

        def comparing(presented: str, kept: str) -> bool:
            self._compared.add(presented)
            return compare(presented, kept)

        async def asked() -> None:
            self.ends_asked += 1
            await at_end()

        monkeypatch.setitem(DECODERS, "client", read)
        monkeypatch.setattr(forms, "sha256", hashing)
        monkeypatch.setattr(hmac, "compare_digest", comparing)
        monkeypatch.setattr(here.runtime, "view_at_end", asked)

    def done(self) -> dict[str, int]:
        return {
            "rows read": self.rows_read,
            "secrets hashed": self.secrets_hashed,
            "secrets compared": len(self._compared),
            "log's end asked": self.ends_asked,
        }


def asking(client_id: str, secret: str | None, **more: str) -> Incoming:
    fields = {"token": "x", "grant_type": "client_credentials", "client_id": client_id, **more}
    headers = [("content-type", forms.FORM)]
    if secret is not None:
        del fields["client_id"]
        basic = base64.b64encode(f"{client_id}:{secret}".encode()).decode()
        headers.append(("authorization", f"Basic {basic}"))
    body = urlencode(fields).encode()
    return request(*headers, ("content-length", str(len(body))), body=(body, END))


async def refusal(here: Host, endpoint: Endpoint, credentials: Credentials) -> InvalidClient:
    with pytest.raises(InvalidClient) as refused:
        await here.projecting(endpoint(here.runtime, asking(*credentials)))
    return refused.value


def told(refused: InvalidClient) -> tuple[Any, ...]:
    return refused.status, refused.code, refused.detail, refused.fix, refused.headers


ONCE = {"rows read": 2, "secrets hashed": 2, "secrets compared": 1, "log's end asked": 1}
TOLD = (401, "invalid_client", "client authentication failed", "", {"WWW-Authenticate": 'Basic realm="token-ledger"'})


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("case", REFUSED, ids=lambda one: one.__name__)
async def test_refused_client_learns_one_thing_and_it_costs_the_same(
    here: Host, monkeypatch: pytest.MonkeyPatch, endpoint: Endpoint, case: Any
) -> None:
    """Before and after one look at the log's end: a row read, a secret hashed and compared, there or not."""
    credentials = await case(here)
    work = Work(here, monkeypatch)
    refused = await refusal(here, endpoint, credentials)
    assert (told(refused), work.done()) == (TOLD, ONCE)


async def test_public_client_is_refused_where_a_secret_is_needed_as_an_unknown_one(
    here: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    client_id, _ = await registered(here, token_endpoint_auth_method="none", grant_types=CODE)
    work = Work(here, monkeypatch)
    refused = await refusal(here, introspect, (client_id, None))
    assert (told(refused), work.done()) == (TOLD, ONCE)


@pytest.mark.parametrize("case", REFUSED, ids=lambda one: one.__name__)
async def test_refused_clients_are_counted_alike(here: Host, case: Any) -> None:
    credentials = await case(here)
    here.runtime.client_failures = RateLimiter(20)
    await refusal(here, token, credentials)
    assert [count for _, count in here.runtime.client_failures._counts.values()] == [1]


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (unknown, "unknown"),
        (wrong, "wrong secret"),
        (without_secret, "wrong secret"),
        (disabled, "disabled"),
        (public_with_a_secret, "a public client has no secret"),
    ],
    ids=["unknown", "wrong", "without secret", "disabled", "public"],
)
async def test_log_says_why_a_client_was_refused(here: Host, case: Any, why: str) -> None:
    credentials = await case(here)
    assert (await refusal(here, token, credentials)).private == f"client {credentials[0]}: {why}"


async def test_right_secret_asks_nobody_else(here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = await registered(here)
    work = Work(here, monkeypatch)
    answer = await revoke(here.runtime, asking(*credentials))
    assert (answer.status, work.ends_asked, work.rows_read) == (200, 0, 1)
