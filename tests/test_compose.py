"""compose.yaml, Dockerfile and the cluster's configuration, held against the code.

A container engine may be missing where the tests run: what the files say is compared with what the code knows, and the
cluster that they describe is run as three real nats-servers on the loopback interface.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
import pytest
import pytest_asyncio
import yaml
from click.testing import CliRunner

from events import server, streams
from events.errors import LedgerUnavailable
from events.server import Node, find_nats_server, new_nkey, write_cluster
from service.cli import main
from service.settings import Settings, known_names

ROOT = Path(__file__).resolve().parent.parent
SECONDS_MAX = 45
NODES = ("nats-1", "nats-2", "nats-3")
Service = dict[str, Any]


def _interpolated(text: str) -> str:
    """As Compose does it, with nothing set in the environment: `${NAME:-default}`, `$$` for a dollar sign."""
    return re.sub(r"\$(?:(\$)|\{\w+:-([^}]*)\})", lambda match: "$" if match[1] else match[2], text)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(_interpolated((ROOT / "compose.yaml").read_text()))
    return parsed


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, Service]:
    return dict(compose["services"])


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def _invocations(service: Service) -> list[list[str]]:
    """The arguments of each call of token-ledger that a service's command makes."""
    if "entrypoint" not in service:
        return [list(service["command"])]  # the image's entry point is token-ledger
    (script,) = service["command"]
    calls = re.findall(r"^token-ledger (.*?)(?: &.*)?$", script, re.MULTILINE)
    return [shlex.split(call) for call in calls]


def _ours(services: dict[str, Service]) -> dict[str, Service]:
    return {name: service for name, service in services.items() if service["image"] == "token-ledger"}


def _mounts(service: Service) -> dict[str, str]:
    """Volume by the path at which the service has it."""
    return {path: volume for volume, path, *_ in (mount.split(":") for mount in service.get("volumes", []))}


def _mount_of(service: Service, path: str) -> tuple[str, str]:
    """The volume that has the path, and the path within it."""
    for place, volume in sorted(_mounts(service).items(), reverse=True):
        if Path(path).is_relative_to(place):
            return volume, str(Path(path).relative_to(place))
    raise AssertionError(f"{path} is in no volume")


def _environment(service: Service, dockerfile: str) -> dict[str, str]:
    image = dict(re.findall(r"(TOKEN_LEDGER_\w+)=(\S+)", dockerfile))
    return image | service.get("environment", {})


def _option(arguments: list[str], name: str) -> list[str]:
    return [value for flag, value in itertools.pairwise(arguments) if flag == name]


# Commands, flags and settings.


def test_commands_of_compose_and_image_are_commands_of_the_cli(services: dict[str, Service], dockerfile: str) -> None:
    from service.cli import main  # noqa: PLC0415 - only what needs it waits for it

    calls = [(name, call) for name, service in _ours(services).items() for call in _invocations(service)]
    image_command = re.search(r'^ENTRYPOINT \["token-ledger"\]\nCMD (\[.*\])$', dockerfile, re.MULTILINE)
    assert image_command, "the image does not start token-ledger"
    calls.append(("Dockerfile", msgspec.json.decode(image_command[1], type=list[str])))
    assert {"nats-config", "provision", "project", "serve", "deliver", "up"} == {call[0] for _, call in calls}
    for name, call in calls:
        command = main.get_command(click.Context(main), call[0])
        assert command, f"{name}: no command {call[0]}"
        # Fails on flags, arguments and choices that the command does not take; runs nothing.
        command.make_context(call[0], call[1:])


def test_settings_of_compose_and_image_are_settings(services: dict[str, Service], dockerfile: str) -> None:
    used = set(re.findall(r"TOKEN_LEDGER_\w+", dockerfile))
    for service in services.values():
        used |= service.get("environment", {}).keys()
    assert {name for name in used if name.startswith("TOKEN_LEDGER_")} <= set(known_names())


def test_settings_of_every_service_are_accepted_together(
    services: dict[str, Service], dockerfile: str, tmp_path: Path
) -> None:
    seed, key = tmp_path / "role.nk", tmp_path / "master_key"
    seed.write_text("seed")
    key.write_text("MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=")
    for name in ("provision", "api", "deliver", "receipts", "analytics"):
        environment = _environment(services[name], dockerfile)
        if "TOKEN_LEDGER_MASTER_KEY_FILE" in environment:
            assert environment["TOKEN_LEDGER_MASTER_KEY_FILE"] == "/run/secrets/master_key"
            assert services[name]["secrets"] == ["master_key"]
            environment["TOKEN_LEDGER_MASTER_KEY_FILE"] = str(key)
        for call in _invocations(services[name]):
            flagged = _option(call, "--nats-creds")
            assert bool(flagged) != ("TOKEN_LEDGER_NATS_CREDS" in environment), f"{name}: credentials once, not twice"
            settings = Settings.load(environment | {"TOKEN_LEDGER_NATS_CREDS": str(seed)})
            assert settings.replicas == len(NODES)
            assert settings.nats_url == ",".join(f"nats://{node}:{server.CLIENT_PORT}" for node in NODES)
            assert settings.data_dir == Path("/data")


def test_every_host_and_volume_of_compose_is_defined(compose: dict[str, Any]) -> None:
    services, volumes = compose["services"], set(compose["volumes"])
    used = {volume for service in services.values() for volume in _mounts(service).values()}
    assert used == volumes
    for service in services.values():
        assert service.get("depends_on", {}).keys() <= services.keys()


# Containers.


def test_view_and_api_share_a_container_and_its_data(services: dict[str, Service]) -> None:
    """DESIGN: LMDB's lock table needs one process-id namespace."""
    running = {name: [call[:2] for call in _invocations(service)] for name, service in _ours(services).items()}
    (with_api,) = [name for name, calls in running.items() if any(call[0] == "serve" for call in calls)]
    (with_view,) = [name for name, calls in running.items() if ["project", "current"] in calls]
    (with_analytics,) = [name for name, calls in running.items() if ["project", "analytics"] in calls]
    assert with_api == with_view
    data = {name: _mount_of(services[name], "/data")[0] for name in (with_api, with_analytics)}
    assert len(set(data.values())) == 2, "two containers share a data directory"


@pytest.mark.parametrize("name", ["api", "analytics", *NODES])
def test_lasting_service_is_restarted_and_has_a_health_check(
    services: dict[str, Service], dockerfile: str, name: str
) -> None:
    service = services[name]
    assert service["restart"] == "unless-stopped"
    own = service.get("healthcheck")
    if own is None:
        assert service["image"] == "token-ledger"
        assert "\nHEALTHCHECK " in dockerfile
    else:
        assert own["test"][0] == "CMD"


@pytest.mark.parametrize("name", ["api", "analytics", "provision", *NODES])
def test_service_runs_without_root_and_privileges(services: dict[str, Service], dockerfile: str, name: str) -> None:
    service = services[name]
    (image_user,) = re.findall(r"^USER (\S+)$", dockerfile, re.MULTILINE)
    assert service.get("user", image_user) == image_user == "10001:10001"
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "no-new-privileges:true" in service["security_opt"]


def test_port_of_the_api_is_the_default_one_and_published_on_loopback(
    services: dict[str, Service], dockerfile: str
) -> None:
    port = Settings().port
    assert services["api"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert f"\nEXPOSE {port}\n" in dockerfile
    assert f"http://127.0.0.1:{port}/health/ready" in dockerfile
    published = [name for name, service in services.items() if "ports" in service]
    assert published == ["api"], "only the API is reachable from outside"


def test_image_has_a_python_that_the_project_supports_and_installs_by_hash(dockerfile: str) -> None:
    versions = set(re.findall(r"^FROM python:(\d+\.\d+)-slim", dockerfile, re.MULTILINE))
    assert versions == {"3.11"}, "build and run on the version that mypy and ruff check against"
    assert "--require-hashes -r requirements.lock" in dockerfile
    final = dockerfile.rsplit("\nFROM ", 1)[1]
    assert "pip install" not in final
    assert re.search(r"pip uninstall --yes .*wheel setuptools pip", final)


def test_image_is_made_of_nothing_but_code(dockerfile: str) -> None:
    copied = set(re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE))
    names = {name for line in copied for name in line.split()}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == names
    packages = {"events", "projections", "service"}
    assert packages <= names
    assert all((ROOT / name).is_dir() for name in packages)


# The NATS image and configuration.


def test_image_of_nats_is_the_version_that_the_tests_run_on(services: dict[str, Service]) -> None:
    images = {services[name]["image"] for name in NODES}
    (image,) = images
    match = re.fullmatch(r"nats:(\d+)\.(\d+)\.(\d+)-alpine", image)
    assert match, image
    version = tuple(map(int, match.groups()))
    assert version >= streams.MIN_SERVER_VERSION
    printed = subprocess.run([find_nats_server(), "--version"], capture_output=True, text=True, check=True).stdout
    assert f"v{'.'.join(match.groups())}" in printed


@pytest.fixture(scope="module")
def written(services: dict[str, Service], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory that compose's own call of `nats-config` writes, and where it stands in the container."""
    (call,) = _invocations(services["init"])
    directory = tmp_path_factory.mktemp("cluster")
    place = call[1]
    result = CliRunner().invoke(main, [str(directory) if word == place else word for word in call])
    assert result.exit_code == 0, result.output
    return directory, place


def test_what_each_container_reads_is_what_init_wrote_for_it(
    services: dict[str, Service], dockerfile: str, written: tuple[Path, str]
) -> None:
    directory, place = written
    init = {volume: Path(path) for path, volume in _mounts(services["init"]).items()}

    def host_path(service: Service, path: str) -> Path:
        volume, within = _mount_of(service, path)
        return directory / (init[volume] / within).relative_to(place)

    roles = {}
    for name in ("provision", "api", "deliver", "receipts", "analytics"):
        environment = _environment(services[name], dockerfile)
        for call in _invocations(services[name]):
            creds = (_option(call, "--nats-creds") or [environment.get("TOKEN_LEDGER_NATS_CREDS", "")])[0]
            assert host_path(services[name], creds).is_file(), f"{name}: nobody writes {creds}"
            # events/streams.py takes the inbox of a role from the name of its seed file.
            roles[" ".join(call[:2] if call[0] == "project" else call[:1])] = Path(creds).stem
    assert roles == {
        "provision": "admin",
        "serve": "service",
        "project current": "projector",
        "project revocations": "projector",
        "deliver": "service",
        "project receipts": "projector",
        "project analytics": "projector",
    }
    for node in NODES:
        program, flag, config = services[node]["command"]
        assert (program, flag) == ("nats-server", "-c")
        found = msgspec.json.decode(host_path(services[node], config).read_bytes())
        assert found["server_name"] == node
        assert _mounts(services[node])[found["jetstream"]["store_dir"]] == f"{node}-store"


def test_admin_credentials_are_given_to_provision_only(services: dict[str, Service]) -> None:
    holders = {name for name, service in services.items() if "admin-credentials" in _mounts(service).values()}
    assert holders == {"init", "provision"}
    for name, service in services.items():
        if name != "init":
            assert "cluster" not in _mounts(service).values()
            assert all(
                mount.endswith(":ro") for mount in service["volumes"] if "credentials" in mount or "config" in mount
            )


def test_configuration_of_every_node_syncs_and_authenticates(
    services: dict[str, Service], written: tuple[Path, str]
) -> None:
    directory, _ = written
    for node in NODES:
        config = msgspec.json.decode((directory / "nodes" / node / "nats.conf").read_bytes())
        assert config["jetstream"]["sync_interval"] == "always"
        assert "no_auth_user" not in config
        users = [user for account in config["accounts"].values() for user in account.get("users", [])]
        assert len(users) == len(server.ROLES)
        assert all(re.fullmatch("U[A-Z2-7]{55}", user["nkey"]) and user["permissions"] for user in users)
        assert config["listen"] == f"0.0.0.0:{server.CLIENT_PORT}"
        assert config["http"].startswith("127.0.0.1:")
        assert services[node]["healthcheck"]["test"][-1].startswith(f"http://{config['http']}/healthz")
        cluster = config["cluster"]
        assert len(cluster["authorization"]["password"]) == 64
        assert [route.rpartition("@")[2] for route in cluster["routes"]] == [
            f"{peer}:{server.ROUTE_PORT}" for peer in NODES
        ]


def test_store_volumes_are_prepared_for_the_user_of_the_nodes(services: dict[str, Service]) -> None:
    (script,) = services["init"]["command"]
    owned = re.search(r"^chown -R (\S+) (.*)$", script, re.MULTILINE)
    assert owned
    assert owned[1] == services["nats-1"]["user"]
    places = [Path(place) for place in owned[2].split()]
    for path in _mounts(services["init"]):
        assert any(Path(path).is_relative_to(place) for place in places), f"{path} stays root's"


# The script that runs the API, its view and the feed.


class _Trio:
    """The script of the container `api`, with a token-ledger that only says what becomes of it."""

    PROGRAM = """#!/bin/bash
name=$1; [ "$1" = project ] && name=$2
trap 'echo "$name stops" >> "$LOG"; exit 0' TERM
echo "$name $$" >> "$LOG"
while :; do read -r -t 1 < <(:) || :; sleep 0.02; done
"""

    def __init__(self, service: Service, directory: Path) -> None:
        program = directory / "token-ledger"
        program.write_text(self.PROGRAM)
        program.chmod(stat.S_IRWXU)
        self.log = directory / "log"
        self.log.touch()
        environment = {"PATH": f"{directory}:{os.environ['PATH']}", "LOG": str(self.log)}
        self.process = subprocess.Popen([*service["entrypoint"], *service["command"]], env=environment)

    def pids(self) -> dict[str, int]:
        return {name: int(pid) for name, pid in re.findall(r"^(\w+) (\d+)$", self.log.read_text(), re.MULTILINE)}

    def until_all_run(self) -> dict[str, int]:
        deadline = time.monotonic() + SECONDS_MAX
        while len(self.pids()) < 3 or "sleep" not in self._children():
            assert time.monotonic() < deadline
            assert self.process.poll() is None
        return self.pids()

    def _children(self) -> list[str]:
        """Names of what the script runs; `sleep` once it only watches."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        names = []
        for child in children:
            with contextlib.suppress(OSError):
                names.append(Path(f"/proc/{child}/comm").read_text().strip())
        return names

    def stops(self) -> list[str]:
        return re.findall(r"^(\w+) stops$", self.log.read_text(), re.MULTILINE)


@pytest.fixture
def trio(services: dict[str, Service], tmp_path: Path) -> Iterator[_Trio]:
    one = _Trio(services["api"], tmp_path)
    yield one
    for pid in [one.process.pid, *one.pids().values()]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    one.process.wait()


def test_stopped_api_container_ends_the_api_and_then_the_view(trio: _Trio) -> None:
    trio.until_all_run()
    trio.process.terminate()
    assert trio.process.wait(SECONDS_MAX) == 0
    assert trio.stops() == ["serve", "revocations", "current"]


@pytest.mark.parametrize("dies", ["serve", "revocations", "current"])
def test_api_container_ends_when_any_process_dies(trio: _Trio, dies: str) -> None:
    os.kill(trio.until_all_run()[dies], signal.SIGKILL)
    assert trio.process.wait(SECONDS_MAX) == 1, "Docker restarts what failed"
    assert trio.stops() == [name for name in ("serve", "revocations", "current") if name != dies]


# Three real servers.


class _Cluster:
    """Three nats-servers on the loopback interface, with the configuration that compose's nodes get but for ports."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ports = iter(_free_ports(3 * len(NODES)))
        self.nodes = [
            Node(
                name=name,
                host=server.LOOPBACK,
                listen_host=server.LOOPBACK,
                port=next(ports),
                route_port=next(ports),
                monitor_port=next(ports),
                store_dir=str(directory / "store" / name),
            )
            for name in NODES
        ]
        write_cluster(directory, self.nodes)
        self.url = ",".join(f"nats://{node.host}:{node.port}" for node in self.nodes)
        self.processes: dict[str, asyncio.subprocess.Process] = {}

    def creds(self, role: str) -> Path:
        return self.directory / "credentials" / role / f"{role}.nk"

    async def start(self, node: Node) -> None:
        log = (self.directory / f"{node.name}.log").open("ab")
        with log:
            self.processes[node.name] = await asyncio.create_subprocess_exec(
                find_nats_server(),
                "-c",
                str(self.directory / "nodes" / node.name / "nats.conf"),
                stdout=log,
                stderr=log,
            )

    async def until_healthy(self, path: str) -> None:
        """What the health check of compose.yaml asks, on every node."""
        deadline = time.monotonic() + SECONDS_MAX
        async with httpx.AsyncClient(trust_env=False) as client:
            for node in self.nodes:
                while True:
                    with contextlib.suppress(httpx.TransportError):
                        if (await client.get(f"http://127.0.0.1:{node.monitor_port}{path}")).status_code == 200:
                            break
                    assert time.monotonic() < deadline, (self.directory / f"{node.name}.log").read_text()[-2000:]
                    await asyncio.sleep(0.05)

    async def stop(self) -> None:
        for process in self.processes.values():
            if process.returncode is None:
                process.kill()
        for process in self.processes.values():
            await process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((server.LOOPBACK, 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def cluster(services: dict[str, Service], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[_Cluster]:
    one = _Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        for node in one.nodes:
            await one.start(node)
        await one.until_healthy("/healthz" + services["nats-1"]["healthcheck"]["test"][-1].partition("/healthz")[2])
        await _provision(one, attempts_max=1 + int(services["provision"]["restart"].removeprefix("on-failure:")))
        yield one
    finally:
        await one.stop()


async def _provision(cluster: _Cluster, *, attempts_max: int) -> None:
    """As often as compose starts it: a cluster that has just found its leader may lose a request."""
    for attempt in range(1, attempts_max + 1):
        admin = await streams.connect(cluster.url, cluster.creds("admin"), name="test")
        try:
            await streams.provision(admin, streams.StreamLimits(replicas=3))
        except LedgerUnavailable:
            assert attempt < attempts_max
        else:
            return
        finally:
            await admin.close()


async def test_cluster_provisioned_by_admin_has_three_replicas_and_syncs(cluster: _Cluster) -> None:
    limits = streams.StreamLimits(replicas=3)
    admin = await streams.connect(cluster.url, cluster.creds("admin"), name="test")
    try:
        await streams.provision(admin, limits)  # again, as at every start of compose
        info = msgspec.json.decode((await admin.request("$JS.API.STREAM.INFO.LEDGER", timeout=SECONDS_MAX)).data)
        assert info["config"]["num_replicas"] == 3
        assert {info["cluster"]["leader"], *(peer["name"] for peer in info["cluster"]["replicas"])} == set(NODES)
        reports = await streams.server_reports(admin)
        assert dict.fromkeys(NODES, True) == {
            report["server_name"]: report["jetstream"]["config"]["sync_always"] for report in reports
        }
    finally:
        await admin.close()


@pytest.mark.parametrize("role", ["service", "projector"])
async def test_cluster_refuses_streams_of_other_roles(cluster: _Cluster, role: str) -> None:
    refusals: asyncio.Queue[str] = asyncio.Queue()

    async def note(error: Exception) -> None:
        refusals.put_nowait(str(error))

    nc = await streams.connect(cluster.url, cluster.creds(role), name="test", on_error=note)
    try:
        body = b'{"name": "OTHER", "subjects": ["other.>"], "num_replicas": 3}'
        await nc.publish("$JS.API.STREAM.CREATE.OTHER", body, reply=nc.new_inbox())
        refusal = await asyncio.wait_for(refusals.get(), SECONDS_MAX)
        assert 'permissions violation for publish to "$js.api.stream.create.other"' in refusal.lower()
    finally:
        await nc.close()


async def test_cluster_reloaded_lets_in_a_subscriber_at_every_node(cluster: _Cluster) -> None:
    """As the README says: write the configuration anew with who is registered, and have each node reload it."""
    name = "sub_" + "1" * 32
    seed, public_key = new_nkey()
    seed_file = cluster.directory / f"{name}.nk"
    seed_file.write_text(seed)
    admin = await streams.connect(cluster.url, cluster.creds("admin"), name="test")
    projector = await streams.connect(cluster.url, cluster.creds("projector"), name="test")
    lost: list[bool] = []
    try:
        admin.lost_listeners.append(lambda: lost.append(True))
        write_cluster(cluster.directory, cluster.nodes, subscribers={name: public_key})
        for process in cluster.processes.values():
            process.send_signal(signal.SIGHUP)
        config = {"name": name, "durable_name": name, "ack_policy": "explicit", "deliver_policy": "all"}
        body = msgspec.json.encode({"stream_name": "REVOCATIONS", "action": "create", "config": config})
        made = await admin.request(f"$JS.API.CONSUMER.CREATE.REVOCATIONS.{name}", body, timeout=SECONDS_MAX)
        assert "error" not in msgspec.json.decode(made.data)
        for number, node in enumerate(cluster.nodes):
            data = str(number).encode()
            await projector.jetstream(timeout=SECONDS_MAX).publish("revocations.main.grant", data)
            nc = await _admitted(f"nats://{node.host}:{node.port}", seed_file)
            feed = await nc.jetstream(prefix="L.API").pull_subscribe_bind(name, stream="REVOCATIONS")
            [message] = await feed.fetch(1, timeout=SECONDS_MAX)
            await message.ack_sync(timeout=SECONDS_MAX)
            assert message.data == data
            await nc.close()
        assert lost == []
    finally:
        await admin.close()
        await projector.close()


async def _admitted(url: str, seed_file: Path) -> streams.Connection:
    """A connection, once the node has reloaded."""
    deadline = time.monotonic() + SECONDS_MAX
    while True:
        try:
            return await streams.connect(url, seed_file, name="test")
        except LedgerUnavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_cluster_without_one_node_still_takes_events(cluster: _Cluster) -> None:
    service = await streams.connect(cluster.url, cluster.creds("service"), name="test")
    try:
        js = service.jetstream(timeout=SECONDS_MAX)
        first = await js.publish("ledger.main.grant.cluster", b"1")
        lost = cluster.nodes[0]
        cluster.processes[lost.name].kill()
        await cluster.processes[lost.name].wait()
        acknowledged = await _append(service, b"2")
        await cluster.start(lost)
        await cluster.until_healthy("/healthz")
        stored = await js.get_msg("LEDGER", seq=acknowledged)
        assert stored.data == b"2"
        assert acknowledged > first.seq
    finally:
        await service.close()


async def _append(nc: streams.Connection, data: bytes) -> int:
    """Appends once a leader takes it: the id makes repetitions harmless."""
    deadline = time.monotonic() + SECONDS_MAX
    while True:
        try:
            acknowledgement = await nc.jetstream(timeout=1).publish(
                "ledger.main.grant.cluster", data, headers={"Nats-Msg-Id": "after-the-loss"}
            )
        except Exception:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        else:
            return acknowledgement.seq


def test_health_check_of_analytics_is_python(services: dict[str, Service]) -> None:
    *_, flag, program = services["analytics"]["healthcheck"]["test"]
    assert flag == "-c"
    compile(program, "healthcheck", "exec")


async def test_health_check_of_analytics_asks_the_analytics_process(
    services: dict[str, Service], cluster: _Cluster
) -> None:
    *_, program = services["analytics"]["healthcheck"]["test"]
    environment = os.environ | {
        "TOKEN_LEDGER_NATS_URL": cluster.url,
        "TOKEN_LEDGER_NATS_CREDS": str(cluster.creds("projector")),
        "PYTHONPATH": str(ROOT),
    }

    async def status() -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, env=environment, stderr=asyncio.subprocess.PIPE
        )
        await asyncio.wait_for(process.communicate(), SECONDS_MAX)
        assert process.returncode is not None
        return process.returncode

    assert await status() != 0, "healthy without an analytics process"
    projector = await streams.connect(cluster.url, cluster.creds("projector"), name="test")
    try:

        async def answer(message: Any) -> None:
            await message.respond(b"{}")

        await projector.subscribe("analytics.status", cb=answer)
        await projector.flush()
        assert await status() == 0
    finally:
        await projector.close()
