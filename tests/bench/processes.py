"""What the service's processes use, read from /proc, and the echo that they are compared with."""

from __future__ import annotations

import functools
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import msgspec

from tests import running

TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
PROBES = 32  # connections opened to reach every worker; the kernel spreads them by hash
QUIET_SHARE_MAX = 0.15  # of one core, by the whole service, to count as idle
VIEW_SUFFIX = ".mdb"


def role(process: running.Process) -> str:
    """What a process of the service is for, by its command line."""
    if "nats-server" in process.command_line.split(" ")[0]:
        return "nats-server"
    for name in ("current", "analytics"):
        if process.command_line.endswith(f"project {name}"):
            return f"project {name}"
    if process.command_line.endswith(("project revocations", "project receipts", " deliver")):
        return "feed"
    return "API"


def cpu_seconds(processes: list[running.Process]) -> dict[str, float]:
    """CPU time that the processes have used until now, by role."""
    used: dict[str, float] = {}
    for process in processes:
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        name = role(process)
        used[name] = used.get(name, 0.0) + (int(fields[11]) + int(fields[12])) * TICK_SECONDS
    return used


class Machine(msgspec.Struct, frozen=True):
    """CPU time of the whole machine until now: what ran on it, and what its host gave to other guests meanwhile."""

    busy_seconds: float
    stolen_seconds: float


def machine_cpu() -> Machine:
    """From /proc/stat."""
    fields = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    user, nice, system, _idle, _iowait, irq, softirq, stolen = fields
    return Machine((user + nice + system + irq + softirq) * TICK_SECONDS, stolen * TICK_SECONDS)


def settle(service: running.Service, *, seconds_max: float = 120.0) -> None:
    """Waits until the service has caught up with itself, so that what follows is not measured beside it."""
    deadline = time.monotonic() + seconds_max
    while time.monotonic() < deadline:
        before, began = sum(cpu_seconds(service.tree()).values()), time.monotonic()
        time.sleep(0.5)
        if (sum(cpu_seconds(service.tree()).values()) - before) / (time.monotonic() - began) < QUIET_SHARE_MAX:
            return


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """MiB of one process. `own` is what is resident without the view's pages, which are the page cache's."""

    resident: float
    proportional: float
    anonymous: float
    own: float


def memory(pid: int) -> Memory:
    """From /proc/<pid>/smaps."""
    kib = {"Rss": 0, "Pss": 0, "Anonymous": 0}
    view_kib = 0
    of_view = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if "-" in name.split(" ")[0]:  # first line of a mapping: `7f00-7f01 r--s 00000000 fe:00 1234 /path`
            of_view = line.endswith(VIEW_SUFFIX)
        elif name in kib:
            kib[name] += int(rest.split()[0])
            if of_view and name == "Rss":
                view_kib += int(rest.split()[0])
    return Memory(
        resident=kib["Rss"] / 1024,
        proportional=kib["Pss"] / 1024,
        anonymous=kib["Anonymous"] / 1024,
        own=(kib["Rss"] - view_kib) / 1024,
    )


def connection_to_each_worker(service: running.Service) -> dict[int, socket.socket]:
    """One open connection to each API worker, by its pid. Raises: RuntimeError when one cannot be reached."""
    workers = service.workers()
    chosen: dict[int, socket.socket] = {}
    for _ in range(PROBES * len(workers)):
        connection = socket.create_connection(("127.0.0.1", service.port), timeout=10)
        # Answered once, so that a worker has taken the connection from the listening socket.
        _says_ready(connection)
        inode = _server_side(service.port, connection.getsockname()[1])
        owner = next((worker.pid for worker in workers if inode in running._open_files(worker.pid)), None)
        if owner is None or owner in chosen:
            connection.close()
        else:
            chosen[owner] = connection
        if len(chosen) == len(workers):
            return chosen
    raise RuntimeError(f"reached {len(chosen)} of {len(workers)} workers by {PROBES * len(workers)} connections")


def wait_ready(service: running.Service, workers: int) -> None:
    """Waits until every worker says that it is ready: the answer to one connection is that of one worker."""
    running.until(lambda: len(service.workers()) == workers, seconds=20, what=f"{workers} workers")
    for pid, connection in connection_to_each_worker(service).items():
        with connection:
            running.until(functools.partial(_says_ready, connection), seconds=20, what=f"worker {pid} is ready")


def _says_ready(connection: socket.socket) -> bool:
    connection.sendall(b"GET /health/ready HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    with http.client.HTTPResponse(connection) as answer:
        answer.begin()
        answer.read()
        return answer.status == HTTPStatus.OK


def _server_side(port: int, client_port: int) -> str:
    """The open file `socket:[inode]` of the server's end of a loopback connection."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        columns = line.split()
        local, remote = (int(columns[number].rpartition(":")[2], 16) for number in (1, 2))
        if (local, remote) == (port, client_port):
            return f"socket:[{columns[9]}]"
    return ""


class Echo(msgspec.Struct, frozen=True):
    port: int
    pid: int

    def cpu_seconds(self) -> float:
        """CPU time of its workers until now."""
        return sum(cpu_seconds(running.descendants(self.pid)).values())


@contextmanager
def echo(workers: int, log_path: Path) -> Iterator[Echo]:
    """The bare ASGI echo; ended at the end."""
    port = running.free_port()
    command = [sys.executable, "-m", "tests.bench.echo", str(port), str(workers)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=running.ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        running.until(lambda: _answers(port), seconds=20, what=f"the echo answers; its log is {log_path}")
        yield Echo(port, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
