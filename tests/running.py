"""The service as other programs meet it: real processes, real ports. How tests start, ask and stop it."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS_MAX = 40.0
STOP_SECONDS_MAX = 10.0  # CONTRACT: "SIGTERM stops everything within 10 s"
LOG_TAIL_LINES = 60
MARK = "LEDGER_TEST_MARK"  # every process of a service inherits it, so that none can be lost

RECEIVERS_ADDRESS = "127.0.0.7"  # where receivers of webhooks listen

# Everything personal or secret that a test plants begins with one of these, so that one search at the end of
# the session finds whatever leaked from any test (test_canaries.py).
CANARY_USERNAME = "cnryuser"
CANARY_PASSWORD = "cnrypass"
CANARY_NAME = "cnryname"
CANARY_QUERY = "cnryquery"
CANARY_HOOK = "cnryhook"
CANARIES = (CANARY_USERNAME, CANARY_PASSWORD, CANARY_NAME, CANARY_QUERY, CANARY_HOOK)

# Loading certificates would cost each client 30 ms.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

FORM = "application/x-www-form-urlencoded"
PROBLEM = "application/problem+json"
POLL_SECONDS = 0.02


def unique(prefix: str) -> str:
    """A name that no other test uses."""
    return f"{prefix}-{secrets.token_hex(6)}"


T = TypeVar("T")


def until(probe: Callable[[], T], *, seconds: float = 10.0, what: str = "") -> T:
    """The first truthy answer of `probe`. Raises: AssertionError when none came in time."""
    deadline = time.monotonic() + seconds
    while True:
        answer = probe()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or probe}; last answer: {answer!r}")
        time.sleep(POLL_SECONDS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def command() -> list[str]:
    """The command line of the project, installed or not."""
    script = Path(sys.executable).with_name("token-ledger")
    return [str(script)] if script.exists() else [sys.executable, "-m", "service.cli"]


# Processes, read from /proc


@dataclass(frozen=True)
class Process:
    """One living process. `command_line` is its arguments, joined by spaces."""

    pid: int
    parent: int
    command_line: str

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def alive(self) -> bool:
        return _read_process(self.pid) is not None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """SIGSTOP now, SIGCONT at the end: the process is there and does nothing."""
        self.kill(signal.SIGSTOP)
        try:
            yield
        finally:
            if self.alive():
                self.kill(signal.SIGCONT)


def _read_process(pid: int) -> Process | None:
    """None when it is gone or a zombie that its parent has not fetched yet."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    state, parent = status.rpartition(")")[2].split()[:2]
    if state in "ZX":
        return None
    return Process(pid, int(parent), arguments.replace(b"\0", b" ").decode(errors="replace").strip())


def processes() -> list[Process]:
    """Every process of the machine."""
    found = (_read_process(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [process for process in found if process is not None]


def descendants(root: int) -> list[Process]:
    """Children of `root`, theirs, and so on."""
    everyone = processes()
    wanted = {root}
    grown = True
    while grown:
        more = {process.pid for process in everyone if process.parent in wanted} - wanted
        grown = bool(more)
        wanted |= more
    return [process for process in everyone if process.pid in wanted and process.pid != root]


def marked(mark: str) -> list[Process]:
    """Processes that inherited `mark`, whoever their parent is by now."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for process in processes():
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if wanted in environment.split(b"\0"):
            found.append(process)
    return found


def listeners(port: int, among: Iterable[Process]) -> list[Process]:
    """Those that hold a listening TCP socket on `port`."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{columns[9]}]")
    return [process for process in among if inodes & _open_files(process.pid)]


def _open_files(pid: int) -> set[str]:
    targets = set()
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                targets.add(os.readlink(entry))  # noqa: PTH115 - the target is no path
            except OSError:
                continue
    except OSError:
        return targets
    return targets


# Answers


def problem(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """The body, after it was held to RFC 9457 and to CONTRACT's members."""
    assert response.status_code == status, f"{response.status_code} {response.text}"
    assert response.headers["content-type"].split(";")[0] == PROBLEM
    body: dict[str, Any] = response.json()
    missing = {"type", "title", "status", "detail", "code", "request_id"} - body.keys()
    assert not missing, body
    assert body["status"] == status
    assert all(isinstance(body[name], str) and body[name] for name in ("type", "title", "code", "request_id"))
    assert response.headers.get("cache-control") == "no-store", response.headers
    if code is not None:
        assert body["code"] == code, body
    return body


# RFC 6749 §5.2: %x20-21 / %x23-5B / %x5D-7E
DESCRIPTION_CHARACTERS = frozenset(map(chr, {*range(0x20, 0x7F)} - {0x22, 0x5C}))


def oauth_error(response: httpx.Response | RawResponse, status: int, error: str) -> dict[str, Any]:
    """The body, after it was held to RFC 6749 §5.2."""
    assert response.status_code == status, f"{response.status_code} {response.text}"
    assert response.headers["content-type"].split(";")[0] == "application/json"
    assert response.headers.get("cache-control") == "no-store"
    body: dict[str, Any] = response.json()
    assert body["error"] == error, body
    assert body.keys() <= {"error", "error_description", "error_uri"}, body
    assert set(body.get("error_description", "")) <= DESCRIPTION_CHARACTERS, body
    if status == 401:
        assert "www-authenticate" in response.headers
    return body


@dataclass(frozen=True)
class RawResponse:
    """An answer read off the socket. `status_code` 0: the server closed the connection without one."""

    status_code: int
    headers: httpx.Headers
    content: bytes
    seconds: float

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")

    def json(self) -> Any:
        return json.loads(self.content)


def raw_request(
    method: str, target: str, headers: Iterable[tuple[str, str | bytes]] = (), body: bytes = b"", *, host: str
) -> bytes:
    """The bytes of one HTTP/1.1 request, exactly as given: nothing is checked, escaped or left out."""
    lines = [f"{method} {target} HTTP/1.1".encode()]
    names = {name.lower() for name, _ in headers}
    if "host" not in names:
        lines.append(f"Host: {host}".encode())
    if body and "content-length" not in names and "transfer-encoding" not in names:
        lines.append(f"Content-Length: {len(body)}".encode())
    for name, value in headers:
        lines.append(name.encode() + b": " + (value if isinstance(value, bytes) else value.encode()))
    lines.append(b"Connection: close")
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def read_raw(connection: socket.socket, started: float) -> RawResponse:
    """The answer that waits on `connection`."""
    answer = http.client.HTTPResponse(connection)
    try:
        answer.begin()
        content = answer.read()
    except (http.client.HTTPException, ConnectionError):
        return RawResponse(0, httpx.Headers(), b"", time.perf_counter() - started)
    finally:
        answer.close()
    return RawResponse(answer.status, httpx.Headers(answer.getheaders()), content, time.perf_counter() - started)


# Clients and tokens, as tests hold them


@dataclass(frozen=True)
class App:
    """A registered OAuth client and, for a confidential one, its secret."""

    client_id: str
    client_secret: str
    metadata: Mapping[str, Any]

    @property
    def basic(self) -> tuple[str, str]:
        return (self.client_id, self.client_secret)


@dataclass
class Service:
    """A running `token-ledger up`. `log_path` is its stdout and stderr."""

    url: str
    port: int
    data_dir: Path
    log_path: Path
    process: subprocess.Popen[bytes]
    mark: str
    issuer: str
    worker_count: int
    admin_token: str = ""
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = self.caller()

    # asking

    def caller(self, *, source: str | None = None, timeout_seconds: float = 20.0) -> httpx.Client:
        """An HTTP client of its own, from another loopback address if `source` is given."""
        transport = httpx.HTTPTransport(verify=NO_TLS, local_address=source)
        return httpx.Client(base_url=self.url, timeout=timeout_seconds, trust_env=False, transport=transport)

    def call(self, method: str, path: str, *, token: str | None = "", **request: Any) -> httpx.Response:
        """One management call; as the administrator unless `token` is given, anonymous if it is None."""
        headers = dict(request.pop("headers", {}))
        if token is not None:
            headers["Authorization"] = f"Bearer {token or self.admin_token}"
        return self.http.request(method, path, headers=headers, **request)

    def done(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """The body of a management call that must succeed."""
        response = self.call(method, path, **request)
        assert response.is_success, f"{method} {path}: {response.status_code} {response.text}"
        body: dict[str, Any] = response.json()
        return body

    def raw(self, data: bytes, *, seconds: float = 20.0) -> RawResponse:
        """Sends bytes as they are and reads one answer."""
        started = time.perf_counter()
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            # The server need not read what it refuses, and its answer may be here already.
            with suppress(ConnectionError):
                connection.sendall(data)
            return read_raw(connection, started)

    def raw_call(
        self, method: str, target: str, headers: Iterable[tuple[str, str | bytes]] = (), body: bytes = b""
    ) -> RawResponse:
        return self.raw(raw_request(method, target, list(headers), body, host=f"127.0.0.1:{self.port}"))

    # making things

    def scope(self, name: str = "", **more: Any) -> str:
        """Registers a scope and answers its name."""
        name = name or unique("scope").replace("-", ":")
        self.done("POST", "/v1/scopes", json={"name": name, "description": "for a test", **more})
        return name

    def app(self, **metadata: Any) -> App:
        """Registers a client: client credentials, opaque tokens unless said otherwise."""
        wanted = {
            "client_name": unique("app"),
            "grant_types": ["client_credentials"],
            "access_token_format": "opaque",
            **metadata,
        }
        made = self.done("POST", "/v1/clients", json=wanted)
        return App(made["client_id"], made.get("client_secret", ""), made)

    def user(self, **fields: Any) -> dict[str, Any]:
        """Registers a person, or a service user with kind="service"."""
        wanted = {"username": unique(CANARY_USERNAME), "kind": "person", "scope": "", **fields}
        return {**wanted, **self.done("POST", "/v1/users", json=wanted)}

    def issue(self, subject: str, scope: str, *, kind: str = "pat", **more: Any) -> dict[str, Any]:
        """Issues a PAT or SAT."""
        wanted = {"kind": kind, "subject": subject, "name": unique(CANARY_NAME), "scope": scope, **more}
        return self.done("POST", "/v1/tokens", json=wanted)

    def pat(self, scope: str = "", **more: Any) -> dict[str, Any]:
        """A PAT of a new person; `scope` is registered already, a new one if empty."""
        scope = scope or self.scope()
        return self.issue(self.user(scope=scope)["user_id"], scope, **more)

    def bearer(self, scope: str, **more: Any) -> str:
        """A token of a new service user with these ledger scopes: a caller with limited rights."""
        user = self.user(kind="service", scope=scope)
        token: str = self.issue(user["user_id"], scope, kind="sat", **more)["token"]
        return token

    def forget_followers(self) -> None:
        """Removes those that tests left behind: nobody hears of them any more, which is an alarm."""
        for one in list(self.items("/v1/subscribers")):
            self.done("DELETE", f"/v1/subscribers/{one['subscriber_id']}")
        for one in list(self.items("/v1/webhooks")):
            self.done("DELETE", f"/v1/webhooks/{one['webhook_id']}")

    # OAuth

    def form(
        self, path: str, auth: tuple[str, str] | None, headers: Mapping[str, str] = {}, **parameters: Any
    ) -> httpx.Response:
        options: dict[str, Any] = {"auth": auth} if auth else {}
        return self.http.post(path, data=parameters, headers=dict(headers), **options)

    def grant(self, app: App, **parameters: Any) -> dict[str, Any]:
        """Tokens by client credentials."""
        response = self.form("/oauth2/token", app.basic, grant_type="client_credentials", **parameters)
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body

    def refresh(self, app: App, refresh_token: str, **parameters: Any) -> httpx.Response:
        return self.form(
            "/oauth2/token", app.basic, grant_type="refresh_token", refresh_token=refresh_token, **parameters
        )

    def introspect(self, app: App, token: str, **parameters: Any) -> dict[str, Any]:
        response = self.form("/oauth2/introspect", app.basic, token=token, **parameters)
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body

    def revoke(self, app: App, token: str, **parameters: Any) -> httpx.Response:
        return self.form("/oauth2/revoke", app.basic, token=token, **parameters)

    def validate(self, token: str, **more: Any) -> dict[str, Any]:
        return self.done("POST", "/v1/tokens/validate", json={"token": token, **more})

    def code(self, token: str, **more: Any) -> str:
        """What validation says of a token, in one word."""
        code: str = self.validate(token, **more)["code"]
        return code

    def history(self, token_id: str, **query: Any) -> list[dict[str, Any]]:
        """All pages of it."""
        return list(self.items(f"/v1/tokens/{token_id}/history", **query))

    def items(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """Every item of a list, page by page."""
        cursor: str | None = None
        for _ in range(1000):
            page = self.done("GET", path, params={**query, **({"cursor": cursor} if cursor else {})})
            yield from page["items"]
            cursor = page.get("next_cursor")
            if not cursor:
                return
        raise AssertionError(f"{path} never ends")

    # its processes

    def tree(self) -> list[Process]:
        return descendants(self.process.pid)

    def nats_server(self) -> Process:
        return self._child(lambda command: "nats-server" in command.split(" ")[0])

    def projector(self, name: str) -> Process:
        """`current`, `analytics`, `revocations` or `receipts`."""
        return self._child(lambda command: command.endswith(f"project {name}"))

    def api_server(self) -> Process:
        """The parent of the API workers."""
        return self._child(lambda command: command.endswith(" serve"))

    def _child(self, is_it: Callable[[str], bool]) -> Process:
        """The one that the service itself started: what that forks has its command line until it executes another."""
        found = [one for one in self.tree() if one.parent == self.process.pid and is_it(one.command_line)]
        assert len(found) == 1, self.tree()
        return found[0]

    def workers(self) -> list[Process]:
        """The API processes that answer requests: they hold the port, and no child of theirs does."""
        holders = listeners(self.port, self.tree())
        parents = {process.parent for process in holders}
        return [process for process in holders if process.pid not in parents]

    def ready(self) -> bool:
        try:
            return self.http.get("/health/ready", timeout=2.0).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_ready(self, seconds: float = START_SECONDS_MAX) -> Self:
        deadline = time.monotonic() + seconds
        while not self.ready():
            if self.process.poll() is not None:
                raise AssertionError(f"the service ended with {self.process.returncode}\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"the service was not ready within {seconds} s\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)
        return self

    def log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def stop(self) -> None:
        """SIGTERM. Raises: AssertionError unless all ends with 0, in time, with no process left."""
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        late = False
        try:
            self.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            late = True
        left = marked(self.mark)
        for process in left:
            try:
                process.kill()
            except ProcessLookupError:
                continue
        self.process.wait(5)
        assert not late, f"not stopped within {STOP_SECONDS_MAX} s: {left}\n{self.log_tail()}"
        assert self.process.returncode == 0, f"ended with {self.process.returncode}\n{self.log_tail()}"
        assert not left, f"left behind: {left}\n{self.log_tail()}"


_numbers = itertools.count(1)


StartService = Callable[..., Service]  # with settings of its own; ends with the module's tests


def start(directory: Path, *, workers: int = 2, port: int = 0, relative: bool = False, **settings: Any) -> Service:
    """Starts `token-ledger up` under `directory` and waits until it is ready.

    `settings` become `TOKEN_LEDGER_<NAME>`. A directory that was used before is continued. `relative`: it is started in
    `directory` and told a data directory that is relative to it, as the default is.
    """
    directory.mkdir(parents=True, exist_ok=True)
    data_dir = directory / "data"
    port = port or free_port()
    mark = f"{os.getpid()}-{next(_numbers)}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TOKEN_LEDGER_")}
    environment |= {f"TOKEN_LEDGER_{name.upper()}": str(value) for name, value in settings.items()}
    environment |= {MARK: mark}
    if relative:  # elsewhere than where the project is, which may not be installed
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    told = data_dir.relative_to(directory) if relative else data_dir
    log_path = directory / f"service-{next(_numbers)}.log"
    arguments = ["up", "--port", str(port), "--data-dir", str(told), "--workers", str(workers)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*command(), *arguments],
            cwd=directory if relative else ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    service = Service(url, port, data_dir, log_path, process, mark, settings.get("issuer", url), workers)
    try:
        service.wait_ready()
        until(lambda: len(service.workers()) == workers, seconds=START_SECONDS_MAX, what="every worker listens")
        service.admin_token = json.loads((data_dir / "bootstrap.json").read_text())["admin_token"]
    except BaseException:
        service.http.close()
        process.kill()
        process.wait(5)
        for left in marked(mark):
            left.kill()
        raise
    return service
