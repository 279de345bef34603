"""The service as the command line reaches it: where it is, as whom, and what its refusals say.

httpx is imported when it is first asked: the processes that `up` starts load this file and ask nothing.
"""
# ruff: noqa: PLC0415

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from service.cli.output import WRONG_USE, Failed
from service.settings import is_loopback

if TYPE_CHECKING:
    import httpx

PAGE_ITEMS_MAX = 1000
ANSWER_SECONDS_MAX = 30.0
SILENCE_SECONDS_MAX = 10.0  # of a stream that says something every second
DOWNLOAD_SECONDS_MAX = 3_900.0  # an export is made before its first byte is sent
START = "start it with `token-ledger up`, or say where it runs with --data-dir or TOKEN_LEDGER_URL"


def locate(data_dir: Path | None, url: str | None) -> tuple[str, str]:
    """Address and token. A flag wins over TOKEN_LEDGER_URL and TOKEN_LEDGER_TOKEN, which win over bootstrap.json.

    bootstrap.json's token is for its own service: it is sent to no other address.

    Raises: Failed
    """
    token = None if data_dir else os.environ.get("TOKEN_LEDGER_TOKEN")
    url = url or (None if data_dir else os.environ.get("TOKEN_LEDGER_URL"))
    if url and urlsplit(url).scheme not in ("http", "https"):
        raise Failed(f"{url!r} is not the address of a service", "give http://… or https://…", exit_code=WRONG_USE)
    if url and token:
        return url.rstrip("/"), token
    bootstrap = read_bootstrap(data_dir or Path(os.environ.get("TOKEN_LEDGER_DATA_DIR") or "data"))
    own_url = str(bootstrap["api_url"]).rstrip("/")
    url = (url or own_url).rstrip("/")
    if not token and url != own_url:
        raise Failed(
            f"there is no token for {url}: bootstrap.json's is for {own_url}",
            "set TOKEN_LEDGER_TOKEN",
            exit_code=WRONG_USE,
        )
    return url, token or str(bootstrap["admin_token"])


def read_bootstrap(data_dir: Path) -> dict[str, Any]:
    """What the service wrote on its first start. Raises: Failed."""
    path = data_dir / "bootstrap.json"
    try:
        bootstrap = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Failed(
            f"there is no {path}",
            f"{START} and TOKEN_LEDGER_TOKEN; `token-ledger admin-token` makes a file that was lost",
            exit_code=WRONG_USE,
        ) from None
    except (OSError, ValueError) as error:
        raise Failed(f"{path} cannot be read: {error}", "run this as the user who runs the service") from None
    if not isinstance(bootstrap, dict) or not {"api_url", "admin_token"} <= bootstrap.keys():
        raise Failed(f"{path} holds no api_url and admin_token", "make a token with `token-ledger admin-token`")
    return bootstrap


class Api:
    """The HTTP API. Every refusal is raised as `Failed`, with the service's own words."""

    def __init__(self, url: str, token: str) -> None:
        import httpx

        self.url = url
        self.token = token
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}", "User-Agent": "token-ledger-cli"},
            timeout=ANSWER_SECONDS_MAX,
            # A proxy of the environment must not see tokens that are for this machine.
            trust_env=not is_loopback(urlsplit(url).hostname or ""),
            follow_redirects=False,
        )

    def close(self) -> None:
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        seconds_max: float = ANSWER_SECONDS_MAX,
    ) -> dict[str, Any]:
        """The answer to one request. Members of `body` and `query` that are None or empty were not given."""
        response = self.ask(method, path, body, query=query, idempotency_key=idempotency_key, seconds_max=seconds_max)
        return answer_of(response)

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        query: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        seconds_max: float = ANSWER_SECONDS_MAX,
    ) -> httpx.Response:
        """The response as it is. Raises: Failed if there is none."""
        with self._told():
            return self._http.request(
                method,
                path,
                timeout=seconds_max,
                json=given(body) if body is not None else None,
                params={name: _parameter(value) for name, value in given(query or {}).items()},
                headers={"Idempotency-Key": idempotency_key} if idempotency_key else {},
            )

    def download(self, path: str, query: Mapping[str, Any], take: Callable[[bytes], object]) -> httpx.Headers:
        """Hands over the bytes of an answer as they come. Raises: Failed, also when they end too early."""
        asked = {name: _parameter(value) for name, value in given(query).items()}
        with self._told(), self._http.stream("GET", path, params=asked, timeout=DOWNLOAD_SECONDS_MAX) as response:
            if not response.is_success:
                response.read()
                answer_of(response)
            for part in response.iter_raw():
                take(part)
            return response.headers

    @contextlib.contextmanager
    def stream(self, path: str, query: Mapping[str, Any], headers: Mapping[str, str]) -> Iterator[Iterator[str]]:
        """The lines of an answer as they come. Raises: Failed, also when none comes for long."""
        asked = {name: _parameter(value) for name, value in given(query).items()}
        accepted = {"Accept": "text/event-stream", **headers}
        with (
            self._told(),
            self._http.stream("GET", path, params=asked, headers=accepted, timeout=SILENCE_SECONDS_MAX) as response,
        ):
            if not response.is_success:
                response.read()
                answer_of(response)
            yield response.iter_lines()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Raises: Failed for what went wrong on the way."""
        import httpx

        try:
            yield
        except httpx.ConnectError as error:
            raise Failed(f"no service answers at {self.url}: {error}", START, code="unreachable") from None
        except httpx.TimeoutException:
            raise Failed(
                f"{self.url} did not answer in time",
                "look with `token-ledger doctor`; whether a write was done, `token-ledger audit events` tells",
                code="timeout",
            ) from None
        except httpx.HTTPError as error:
            raise Failed(f"{self.url} did not answer as HTTP does: {error}", START, code="unreachable") from None

    def items(
        self, path: str, query: Mapping[str, Any], *, limit: int | None, cursor: str | None = None
    ) -> dict[str, Any]:
        """A list's items, page after page, up to `limit` (None: all), and `next_cursor` if there are more."""
        items: list[Any] = []
        while True:
            wanted = PAGE_ITEMS_MAX if limit is None else min(PAGE_ITEMS_MAX, limit - len(items))
            page = self.call("GET", path, query={**query, "limit": wanted, "cursor": cursor})
            items += page["items"]
            before, cursor = cursor, page.get("next_cursor")
            if not cursor or (limit is not None and len(items) >= limit):
                return {**page, "items": items}
            if cursor == before:
                raise Failed(f"{path} answers the same page again and again", "report this: it is a defect")


def given(members: Mapping[str, Any]) -> dict[str, Any]:
    """Without what was not given."""
    return {name: value for name, value in members.items() if value is not None and value != ()}


def _parameter(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def answer_of(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.is_success and isinstance(answer, dict):
        return answer
    if isinstance(answer, dict) and "detail" in answer:
        raise Failed(
            str(answer["detail"]),
            str(answer.get("fix") or ""),
            code=str(answer.get("code") or ""),
            status=response.status_code,
            request_id=str(answer.get("request_id") or ""),
        )
    raise Failed(
        f"{response.request.url.copy_with(query=None)} answered {response.status_code} "
        "without saying why as the token ledger does",
        "check that the address is the token ledger's: --url, TOKEN_LEDGER_URL",
        status=response.status_code,
    )
