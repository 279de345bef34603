"""Does the time that a refusal takes tell why it was refused? `make bench-timing` runs this and prints a table.

Two kinds of requests are sent to a running service over one connection, in pairs whose order is random, each from an
address of its own. Somebody who knows how long both took guesses which is which: how often they would be right is the
area under the ROC curve. 0.5 is a coin's.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import random
import secrets
import shutil
import socket
import statistics
import sys
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import click
import msgspec
from rich.console import Console

from service.tokens import new_id
from tests import people, running
from tests.bench import machine, processes, report

HEADINGS = (
    *("where", "one kind", "the other", "requests of each", "median of one, µs", "of the other", "difference"),
    *("guessed right", "95 % interval"),
)
ASKED_OF_ONE_NAME = 4  # one less than what is free of delay
CHANGES = 30
_WARM_UP_SHARE = 10  # one of so many, before what is measured
# Before each wrong password for an account: what must be waited, and a little more. Then it is delayed for 16 s.
_WAITS_SECONDS = (0, 0, 0, 0, 0, 1.1, 2.1, 4.1, 8.1)
_PAIRS_MIN = 2
_SECONDS_MAX = 60.0
_NORMAL_95 = 1.96
_WHO = itertools.count(1)

Request = Callable[[], bytes]


class Guess(msgspec.Struct, frozen=True):
    """How often it is right to say of two times, one of each kind, that the longer is the other's. Ties count half."""

    right: float
    low: float
    high: float


def guess(one: Sequence[float], other: Sequence[float]) -> Guess:
    """By ranks, with DeLong's variance (Biometrics 44, 1988), for at least two times of each."""
    below, above = sorted(one), sorted(other)
    of_one = [1 - (bisect_left(above, value) + bisect_right(above, value)) / 2 / len(above) for value in below]
    of_other = [(bisect_left(below, value) + bisect_right(below, value)) / 2 / len(below) for value in above]
    right = statistics.fmean(of_other)
    spread = statistics.variance(of_one) / len(of_one) + statistics.variance(of_other) / len(of_other)
    half: float = _NORMAL_95 * spread**0.5
    return Guess(right, max(0.0, right - half), min(1.0, right + half))


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds."""

    where: str
    one: str
    other: str
    times_of_one: list[float]
    times_of_other: list[float]

    def cells(self) -> tuple[str, ...]:
        """One line of the table, in the order of HEADINGS."""
        first, second = (statistics.median(times) * 1e6 for times in (self.times_of_one, self.times_of_other))
        found = guess(self.times_of_one, self.times_of_other)
        return (
            *(self.where, self.one, self.other, f"{len(self.times_of_one):,}"),
            *(f"{first:,.0f}", f"{second:,.0f}", f"{second - first:+,.0f}"),
            *(f"{found.right:.3f}", f"{found.low:.3f} to {found.high:.3f}"),
        )


class Unlike(Exception):
    """Two kinds that are to be told apart by nothing were answered differently."""


class Line:
    """One connection to the service, and HTTP by hand: nothing between the bytes and the clock."""

    def __init__(self, service: running.Service) -> None:
        self._socket = socket.create_connection(("127.0.0.1", service.port), timeout=_SECONDS_MAX)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: bytes) -> tuple[float, int, int]:
        """Seconds until the answer began, its status and its length."""
        began = time.perf_counter()
        self._socket.sendall(request)
        data = self._socket.recv(65_536)
        took = time.perf_counter() - began
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        while len(body) < length:
            body += self._more()
        return took, int(head.split(b" ", 2)[1]), length

    def close(self) -> None:
        self._socket.close()

    def _more(self) -> bytes:
        data = self._socket.recv(65_536)
        if not data:
            raise ConnectionError("the service ended the connection")
        return data


class Timing:
    """`say` tells what is being done."""

    def __init__(self, service: running.Service, say: Callable[[str], None]) -> None:
        self._service = service
        self._say = say
        self._host = f"127.0.0.1:{service.port}"

    def row(self, where: str, one: tuple[str, Request], other: tuple[str, Request], pairs: int, **how: Any) -> Row:
        """Raises: Unlike."""
        warm_up = pairs // _WARM_UP_SHARE
        times = list(itertools.islice(self._pairs(one[1], other[1], **how), warm_up + pairs))[warm_up:]
        of_one, of_other = ([pair[index] for pair in times] for index in (0, 1))
        return Row(where=where, one=one[0], other=other[0], times_of_one=of_one, times_of_other=of_other)

    def _pairs(self, one: Request, other: Request, *, alike: bool = True) -> Iterator[tuple[float, float]]:
        """For ever."""
        answers = set()
        with contextlib.closing(Line(self._service)) as line:
            while True:
                both = [(0, one()), (1, other())]
                random.shuffle(both)
                took = [0.0, 0.0]
                for index, request in both:
                    took[index], status, length = line.ask(request)
                    answers.add((status, length))
                    if alike and len(answers) > 1:
                        raise Unlike(f"they are answered differently: {sorted(answers)} (status, bytes)")
                yield took[0], took[1]

    def request(self, path: str, headers: Sequence[str] = (), **fields: str) -> bytes:
        """A form, from an address that nothing came from before."""
        body = urlencode(fields)
        number = next(_WHO)
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {self._host}",
            f"X-Forwarded-For: 10.{number >> 16}.{number >> 8 & 255}.{number & 255}",
            f"Content-Type: {running.FORM}",
            f"Content-Length: {len(body)}",
            *headers,
        ]
        return ("\r\n".join(lines) + f"\r\n\r\n{body}").encode()

    # Clients

    def clients(self, pairs: int) -> Iterator[Row]:
        """What authenticates a client, at every endpoint that does. Raises: Unlike."""
        app = self._service.app()
        long = self._service.app(
            grant_types=["authorization_code"],
            redirect_uris=[f"https://app.example/{number}/" + "x" * 80 for number in range(10)],
        )
        public = self._service.app(
            token_endpoint_auth_method="none", grant_types=["authorization_code"], redirect_uris=[people.CALLBACK]
        )
        gone = self._service.app()
        self._service.done("DELETE", f"/v1/clients/{gone.client_id}")
        token, introspect = "/oauth2/token", "/oauth2/introspect"
        unknown = "unknown client"
        for path in (token, "/oauth2/par", introspect, "/oauth2/revoke"):
            yield self.row(
                path, (unknown, self._by_secret(path, None)), ("wrong secret", self._by_secret(path, app)), pairs
            )
        others = [
            ("wrong secret, ten redirect URIs", self._by_secret(token, long)),
            ("public client with a secret", self._by_secret(token, public)),
            ("disabled client, wrong secret", self._by_secret(token, gone)),
            ("disabled client, right secret", self._by_secret(token, gone, gone.client_secret)),
        ]
        for other in others:
            yield self.row(token, (unknown, self._by_secret(token, None)), other, pairs)
        alone = (f"{unknown}, no secret", self._by_name(introspect, None))
        yield self.row(introspect, alone, ("no secret", self._by_name(introspect, app)), pairs)
        yield self.row(introspect, alone, ("public client", self._by_name(introspect, public)), pairs)

    def controls(self, pairs: int) -> Iterator[Row]:
        """No difference, and one that is there. Raises: Unlike."""
        path, app = "/oauth2/revoke", self._service.app()
        unknown = ("unknown client", self._by_secret("/oauth2/token", None))
        yield self.row("/oauth2/token", unknown, unknown, pairs)
        right, wrong = self._by_secret(path, app, app.client_secret), self._by_secret(path, app)
        yield self.row(path, ("right secret", right), ("wrong secret", wrong), pairs, alike=False)

    def _by_secret(self, path: str, app: running.App | None, secret: str | None = None) -> Request:
        """None: a client, or a secret, that nobody has; another each time."""

        def make() -> bytes:
            name = app.client_id if app is not None else new_id("cli")
            pair = f"{name}:{secret or 'tl_cs_' + secrets.token_hex(24)[:43]}"
            basic = base64.b64encode(pair.encode()).decode()
            return self.request(path, [f"Authorization: Basic {basic}"], grant_type="client_credentials", token="x")

        return make

    def _by_name(self, path: str, app: running.App | None) -> Request:
        def make() -> bytes:
            return self.request(path, client_id=app.client_id if app is not None else new_id("cli"), token="x")

        return make

    # People

    def people(self, pairs: int, pairs_delayed: int) -> Iterator[Row]:
        """What authenticates a person. Raises: Unlike."""
        names = -(-(pairs + pairs // _WARM_UP_SHARE) // ASKED_OF_ONE_NAME)
        signing_in = SigningIn(self, self._service)
        kinds: dict[str, dict[str, Any]] = {
            "wrong password": {},
            f"wrong password, {CHANGES} changes": {"changes": CHANGES},
            "no password": {"password": False},
            "service user": {"password": False, "kind": "service"},
            "disabled user": {"ended": "false"},
            "erased user": {"ended": "true"},
        }
        for kind, wanted in kinds.items():
            self._say(f"registering {names} users: {kind}")
            somebody = signing_in.fails([self._register(**wanted) for _ in range(names)])
            nobody = signing_in.fails([_name() for _ in range(names)])
            yield self.row("/sign-in", ("unknown user", nobody), (kind, somebody), pairs)
        yield self._delayed(signing_in, pairs_delayed)

    def _register(self, *, password: bool = True, changes: int = 0, ended: str = "", **fields: str) -> str:
        """The name of somebody new."""
        name = _name()
        if password:
            fields["password"] = running.unique(running.CANARY_PASSWORD)
        made = self._service.user(username=name, **fields)
        path = f"/v1/users/{made['user_id']}"
        for number in range(changes):
            self._service.done("PATCH", path, json={"display_name": f"{number:03}" + "x" * 190})
        if ended:
            self._service.done("DELETE", path, params={"erase": ended})
        return name

    def _delayed(self, signing_in: SigningIn, pairs: int) -> Row:
        """Accounts that one must wait for: nobody's, and somebody's. Raises: Unlike."""
        names = (_name(), self._register())
        for seconds in _WAITS_SECONDS:
            time.sleep(seconds)  # the next failure counts once the delay of the last one is over
            with contextlib.closing(Line(self._service)) as line:  # none stays open for so long
                for name in names:
                    line.ask(signing_in.request(name))
        with contextlib.closing(Line(self._service)) as line:
            times = list(_while_delayed(line, signing_in, names, pairs))
        if len(times) < _PAIRS_MIN:
            raise Unlike("the delay of an account ended before it could be measured: the machine is too busy")
        of_one, of_other = ([pair[index] for pair in times] for index in (0, 1))
        one, other = "unknown user, delayed", "known user, delayed"
        return Row(where="/sign-in", one=one, other=other, times_of_one=of_one, times_of_other=of_other)


def _while_delayed(
    line: Line, signing_in: SigningIn, names: tuple[str, str], most: int
) -> Iterator[tuple[float, float]]:
    for _ in range(most):
        both = list(enumerate(names))
        random.shuffle(both)
        took = [0.0, 0.0]
        for index, name in both:
            took[index], status, _ = line.ask(signing_in.request(name))
            if status != HTTPStatus.TOO_MANY_REQUESTS:
                return
        yield took[0], took[1]


class SigningIn:
    """A browser on the sign-in page."""

    def __init__(self, timing: Timing, service: running.Service) -> None:
        self._timing = timing
        browser = people.Browser(service)
        self._fields = browser.get("/sign-in").form.fields
        self._headers = [f"Cookie: {name}={value}" for name, value in browser.http.cookies.items()]

    def request(self, name: str) -> bytes:
        fields = self._fields | {"username": name, "password": running.unique(running.CANARY_PASSWORD)}
        return self._timing.request("/sign-in", self._headers, **fields)

    def fails(self, names: list[str]) -> Request:
        """Each of the names in turn, none so often that it is delayed."""
        left = iter(names * ASKED_OF_ONE_NAME)
        return lambda: self.request(next(left))


def _name() -> str:
    return running.unique(running.CANARY_USERNAME)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="A few requests of each kind: shows that it works, and nothing else.")
@click.option("--clients", type=click.IntRange(2), help="Pairs of requests by clients. [default: 3,000]")
@click.option("--people", "persons", type=click.IntRange(2), help="Pairs of attempts to sign in. [default: 400]")
@click.option("--directory", type=click.Path(file_okay=False, path_type=Path), help="Where the data goes meanwhile.")
def main(*, quick: bool, clients: int | None, persons: int | None, directory: Path | None) -> None:
    """Measures whether the time of a refusal tells its cause, and prints Markdown. About ten minutes."""
    messages, began = Console(stderr=True), time.perf_counter()
    work = Path(tempfile.mkdtemp(prefix="token-ledger-bench-timing-", dir=directory))

    def say(text: str) -> None:
        messages.print(f"[{time.perf_counter() - began:5.0f} s] {text}", markup=False, highlight=False)

    described = machine.describe(work)
    by_clients, by_people = clients or (20 if quick else 3_000), persons or (4 if quick else 400)
    service = running.start(work, workers=1, trusted_proxies="127.0.0.1")
    try:
        processes.settle(service)
        timing = Timing(service, say)
        rows = []
        of_people = timing.people(by_people, by_clients)
        for row in itertools.chain(timing.clients(by_clients), of_people, timing.controls(by_clients)):
            rows.append(row)
            say(" | ".join(row.cells()))
    except (Unlike, OSError, AssertionError) as error:
        messages.print(f"\nmake bench-timing failed: {error}", style="bold red", markup=False, highlight=False)
        sys.exit(1)
    finally:
        try:
            service.stop()
        finally:
            shutil.rmtree(work)
    click.echo(f"{described.describe()} One API worker.\n")
    click.echo(report.markdown_table(HEADINGS, [row.cells() for row in rows]))


if __name__ == "__main__":
    main()
