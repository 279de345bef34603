"""The processes: what each runs, and how one of them keeps the others running.

`up` starts the nats-server, the projectors and the HTTP API, starts again whatever dies, and stops all of them in the
order in which nothing acknowledged is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog
import uvloop
from msgspec.structs import replace

from events.errors import LedgerError, LedgerUnavailable, UnsafeServer
from events.server import EmbeddedServer, configured_url
from events.streams import (
    LEDGER,
    RECEIPTS,
    REVOCATIONS,
    Connection,
    begin_feed_anew,
    check,
    connect,
    stream_state,
)
from events.streams import provision as provision_streams
from projections import base
from projections.current import CurrentReader, CurrentWriter, HeldView, view_path
from projections.followers import Followers
from projections.revocations import Feed, FeedAhead, feed_id, serve_position
from service import logs
from service.feed import ask_position
from service.lifeline import SERVED_BY, SUPERVISED_BY, announce_stop, end_with_parent, prepare_stop
from service.settings import Settings, cpu_count
from service.streams import stream_limits, writer_name

if TYPE_CHECKING:
    from granian.server.common import AbstractServer

    from service.keys import MasterKey

log = structlog.get_logger()

HEADER_BYTES_MAX = 16_384
HEADER_SECONDS_MAX = 5
_RESTART_SECONDS_MIN = 0.1
_RESTART_SECONDS_MAX = 5.0
_HEALTHY_AFTER_SECONDS = 10.0
_STOP_PROJECTOR_SECONDS = 2.0
_HELD_SECONDS_MAX = 10.0
_ANALYTICS_COMMIT_SECONDS = 0.5  # a commit costs the same whatever it holds; who waits gets one at once
# Behind everything that somebody waits for, but with a tenth of a busy core: less would not keep up with 5,000 uses/s.
_ANALYTICS_NICENESS = 10
_FAR_BEHIND_MESSAGES = 1_000
_PROGRESS_SECONDS = 5.0
_ANNOUNCED_SECONDS_MAX = 30.0
_ROUND_SECONDS = 0.1
_READY_SECONDS_MAX = 2.0

Progress = Callable[[int, int], None]


class CannotListen(Exception):
    """The address of the HTTP API is taken, or none of this machine's."""

    fix = "end what listens there, or choose another --port or --host"


def up(settings: Settings) -> None:
    """Everything on this machine, until SIGTERM or SIGINT. Raises: CannotListen, LedgerError, OSError."""
    logs.configure(settings)
    _check_address(settings)
    uvloop.run(_up(settings))


def serve(settings: Settings) -> None:
    """The HTTP API: Granian with its workers, until SIGTERM or SIGINT. Raises: CannotListen, LedgerUnavailable."""
    logs.configure(settings)
    end_with_parent(SUPERVISED_BY)
    alone = SUPERVISED_BY not in os.environ
    if alone:
        _check_address(settings)
    settings = _located(settings, "service")
    if alone and not (settings.data_dir / "bootstrap.json").exists():
        asyncio.run(_bootstrap_alone(settings))
    metrics_dir = settings.data_dir / "metrics"
    shutil.rmtree(metrics_dir, ignore_errors=True)
    metrics_dir.mkdir(mode=0o700, parents=True)
    # The workers read the settings from the environment, where they replace those that this process was given.
    environment = settings.given_to(os.environ) | {
        "PROMETHEUS_MULTIPROC_DIR": str(metrics_dir),
        SERVED_BY: str(os.getpid()),
    }
    os.environ.clear()
    os.environ |= environment
    import service.worker  # noqa: F401, PLC0415 - once, before the workers are forked, who then share it

    interface = "asgi" if settings.trusted_proxies else "rsgi"  # why: service/asgi.py
    http_server("service.worker:create", settings, factory=True, interface=interface).serve()


def http_server(target: str, settings: Settings, *, factory: bool, interface: str) -> AbstractServer[Any]:
    """Granian as the API is served. The benchmark's echo, an ASGI application, is served by it too.

    RSGI, Granian's own interface, hands over a request for less than ASGI does.
    """
    from granian.constants import HTTPModes, Interfaces, Loops  # noqa: PLC0415 - the other processes need no server
    from granian.http import HTTP1Settings  # noqa: PLC0415 - as above
    from granian.server.mp import MPServer  # noqa: PLC0415 - as above

    class ServerThatTells(MPServer):
        def signal_handler_interrupt(self, *args: Any, **kwargs: Any) -> None:
            announce_stop()
            super().signal_handler_interrupt(*args, **kwargs)  # type: ignore[no-untyped-call]

        def _respawn_workers(self, workers: list[int], *args: Any, **kwargs: Any) -> None:
            for index in workers:  # Granian's own logs are off
                ended = self.wrks[index].inner
                if ended.exitcode is not None:  # else it is asked to go
                    action = "another one takes its place"
                    log.error("api_worker_ended", pid=ended.pid, code=ended.exitcode, action=action)
            super()._respawn_workers(workers, *args, **kwargs)

    prepare_stop()
    return ServerThatTells(
        target,
        factory=factory,
        address=settings.host,
        port=settings.port,
        interface=Interfaces(interface),
        loop=Loops.uvloop,
        http=HTTPModes.http1,
        websockets=False,
        workers=settings.workers,
        backlog=2048,
        http1_settings=HTTP1Settings(header_read_timeout=HEADER_SECONDS_MAX * 1000, max_buffer_size=HEADER_BYTES_MAX),
        respawn_failed_workers=True,
        respawn_interval=0.5,
        # An unfinished body would otherwise hold the server open until its client leaves.
        workers_kill_timeout=settings.drain_seconds,
        log_access=False,
        log_enabled=False,
    )


def project(settings: Settings, name: str) -> None:
    """One projector, until SIGTERM or SIGINT. Raises: UndecodableEvent; ViewBusy, AnalyticsBusy."""
    logs.configure(settings)
    end_with_parent(SUPERVISED_BY)
    run = {
        "current": _project_current,
        "analytics": _project_analytics,
        "revocations": _project_revocations,
        "receipts": _project_receipts,
    }[name]
    uvloop.run(_until_signalled(run(_located(settings, "projector"))))


def deliver(settings: Settings) -> None:
    """Delivers webhooks, until SIGTERM or SIGINT. Raises: MasterKeyMismatch."""
    logs.configure(settings)
    end_with_parent(SUPERVISED_BY)
    uvloop.run(_deliver(_located(settings, "service")))


def rebuild(settings: Settings, name: str, progress: Progress) -> None:
    """Replays a projection from the log beside the one in force, and then puts it in its place.

    `progress` is called with position and end. Raises: LedgerError, AnalyticsBusy.
    """
    rebuild_one = {"current": _rebuild_current, "analytics": _rebuild_analytics, "revocations": _rebuild_revocations}

    async def run() -> None:
        async with _running_server(settings, "admin" if name == "revocations" else "projector") as located:
            await rebuild_one[name](located, progress)

    uvloop.run(run())


def provision(settings: Settings) -> None:
    """Makes streams and buckets. Needs the admin credentials. Raises: LedgerUnavailable, UnsafeServer."""

    async def run() -> None:
        async with _running_server(settings, "admin") as located, _connection(located, "provision") as nc:
            await provision_streams(nc, stream_limits(settings))

    uvloop.run(run())


def admin_token(settings: Settings) -> dict[str, Any]:
    """A new administrator's SAT: `token`, `token_id`, `user_id`, `scope`, `expires_at`. Raises: LedgerError."""

    from service.bootstrap import new_administrator  # noqa: PLC0415 - the projectors make no tokens
    from service.keys import MasterKey  # noqa: PLC0415 - as above

    async def run() -> dict[str, Any]:
        async with _running_server(settings, "service") as located, _connection(located, "admin-token") as nc:
            master = MasterKey.load(located.master_key, located.data_dir)
            return await new_administrator(nc, located, master)

    return uvloop.run(run())


def _located(settings: Settings, role: str) -> Settings:
    """Settings that name the server: the one given, else the embedded one of the data directory."""
    if settings.nats_url is not None:
        return settings
    path = settings.data_dir / "bootstrap.json"
    url = json.loads(path.read_bytes()).get("nats_url") if path.exists() else configured_url(settings.data_dir)
    creds = settings.data_dir / "nats" / f"{role}.nk"
    if url is None or not creds.exists():
        raise LedgerUnavailable(f"no nats-server is known: {settings.data_dir} holds none, and nats_url is not set")
    return replace(settings, nats_url=url, nats_creds=creds)


@contextlib.asynccontextmanager
async def _running_server(settings: Settings, role: str) -> AsyncIterator[Settings]:
    """Settings that name a server that runs: the given one, the running service's, else its own, run meanwhile."""
    located = _located(settings, role)
    server: EmbeddedServer | None = None
    if settings.nats_url is None:
        try:
            await (await connect(located.nats_url or "", located.nats_creds, name="probe", seconds_max=1)).close()
        except LedgerUnavailable:
            # Refused if the service runs after all: then it alone may start the server.
            server = EmbeddedServer(settings.data_dir, settings.nats_port)
            await server.start()
            located = replace(located, nats_url=server.url)
    try:
        yield located
    finally:
        if server is not None:
            await server.stop()


@contextlib.asynccontextmanager
async def _connection(settings: Settings, name: str, *, reads_headers: bool = True) -> Any:
    nc = await connect(settings.nats_url or "", settings.nats_creds, name=name, reads_headers=reads_headers)
    try:
        yield nc
    finally:
        await nc.close()


async def _patiently(settings: Settings, name: str, *, reads_headers: bool = False) -> Connection:
    """A connection to a server that was checked, waited for as long as it takes."""
    told = ""
    while True:
        nc = None
        try:
            nc = await connect(settings.nats_url or "", settings.nats_creds, name=name, reads_headers=reads_headers)
            await check(nc, stream_limits(settings))
            return nc
        except LedgerError as error:
            if nc is not None:
                await nc.close()
            if str(error) != told:
                told = str(error)
                level = log.error if isinstance(error, UnsafeServer) else log.warning
                level("waits_for_the_log", process=name, why=told, fix=error.fix)
        await asyncio.sleep(0.3)


async def _project_current(settings: Settings) -> None:
    writer = CurrentWriter(view_path(settings.data_dir))
    nc = await _patiently(settings, "project-current")
    log.info("projector_started", projector="current", position=writer.position(LEDGER))
    try:
        await _run_projection(nc, writer, (LEDGER,))
    finally:
        writer.close()
        await nc.close()


async def _run_projection(nc: Connection, projection: base.Projection, streams: tuple[str, ...]) -> None:
    told = CatchingUp(projection.name)
    while True:
        try:
            await base.run(nc, projection, streams, progress=told)
        except LedgerUnavailable as error:
            log.warning("projector_waits", projector=projection.name, why=str(error))
            await asyncio.sleep(0.3)


class CatchingUp:
    """Says in the log how far a projection is while it is far behind, as in a rebuild, and that it has arrived."""

    def __init__(self, projector: str) -> None:
        self._projector = projector
        self._next_seconds: dict[str, float] = {}

    def __call__(self, stream: str, position: int, end: int) -> None:
        where = {"projector": self._projector, "stream": stream, "position": position, "end": end}
        if end - position >= _FAR_BEHIND_MESSAGES:
            if time.monotonic() >= self._next_seconds.get(stream, 0.0):
                log.info("projector_catching_up", **where, percent=100 * position // end)
                self._next_seconds[stream] = time.monotonic() + _PROGRESS_SECONDS
        elif position >= end and self._next_seconds.pop(stream, None) is not None:
            log.info("projector_caught_up", **where)


async def _project_analytics(settings: Settings) -> None:
    from projections import analytics  # noqa: PLC0415 - the other processes need no DuckDB
    from projections.abuse.backtest import Backtests  # noqa: PLC0415 - as above
    from projections.abuse.engine import Engine  # noqa: PLC0415 - as above
    from projections.abuse.rules import configured  # noqa: PLC0415 - as above
    from projections.asking_findings import BacktestRequest, EngineRequest  # noqa: PLC0415 - as above

    store = analytics.open_analytics(
        settings.data_dir / "analytics",
        niceness=_ANALYTICS_NICENESS,
        commit_seconds=_ANALYTICS_COMMIT_SECONDS,
        usage_age_seconds_max=settings.usage_retention_days * 86_400,
    )
    nc = await _patiently(settings, "project-analytics")
    # Findings are appended and read back with headers, which the other connection does without.
    writing = await connect(settings.nats_url or "", settings.nats_creds, name="abuse")
    engine = Engine(writing, store, configured(settings.abuse_rules).values())
    backtests = Backtests(store)
    log.info("projector_started", projector="analytics")
    try:
        await asyncio.gather(
            _run_projection(nc, store, analytics.STREAMS),
            analytics.serve_queries(
                nc,
                store,
                {EngineRequest: engine.status, BacktestRequest: backtests.answer},
                _read_limits(settings),
            ),
            engine.run(),
        )
    finally:
        backtests.close()
        store.close()
        await nc.close()
        await writing.close()


def _read_limits(settings: Settings) -> Any:
    from projections.analytics.readers import ReadLimits  # noqa: PLC0415 - as above

    return ReadLimits(
        seconds_max=settings.audit_query_seconds_max,
        memory_bytes_max=settings.audit_query_memory_bytes_max,
        answer_bytes_max=settings.audit_query_bytes_max,
        at_once_max=settings.audit_queries_at_once_max,
        threads=min(2, cpu_count()),
    )


async def _project_revocations(settings: Settings) -> None:
    nc = await _patiently(settings, "project-revocations", reads_headers=True)
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    view = CurrentReader(view_path(settings.data_dir))
    feed = Feed(nc, view, settings.issuer, settings.data_dir / "feed.json")
    await serve_position(nc, feed)
    try:
        await _announce_revocations(feed)
    finally:
        feed.save()
        view.close()
        await nc.close()


async def _announce_revocations(feed: Feed) -> None:
    told = CatchingUp(feed.name)
    while True:
        try:
            await feed.run(told)
        except LedgerUnavailable as error:
            log.warning("projector_waits", projector=feed.name, why=str(error))
        except FeedAhead as error:
            logs.alarm("feed_is_ahead", error)
            await asyncio.sleep(_PROGRESS_SECONDS)
        await asyncio.sleep(0.3)


async def _project_receipts(settings: Settings) -> None:
    """Apart from what announces: subscribers say as much as they like to this process, and to that one nothing."""
    nc = await _patiently(settings, "project-receipts", reads_headers=True)
    followers = Followers(nc, writer_name(), silent_seconds_max=settings.follower_silent_seconds_max)
    log.info("projector_started", projector=followers.fold.name)
    try:
        await asyncio.gather(_run_projection(nc, followers.fold, (RECEIPTS, REVOCATIONS)), followers.run())
    finally:
        await followers.close()
        await nc.close()


async def _deliver(settings: Settings) -> None:
    from service.keys import MasterKey  # noqa: PLC0415 - the projectors unseal nothing
    from service.webhooks.delivery import Deliverer  # noqa: PLC0415 - the other processes send nothing

    # Hundreds of receivers that hang hold eight connections each.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    starting = asyncio.create_task(_patiently(settings, "deliver", reads_headers=True))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        await base.end_all([starting])
        return
    nc = starting.result()
    try:
        await Deliverer(nc, settings, MasterKey.load(settings.master_key, settings.data_dir)).run(stop)
    finally:
        stopped.cancel()
        await nc.close()


async def _rebuild_current(settings: Settings, progress: Progress) -> None:
    path = view_path(settings.data_dir)
    built = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.rebuild")
    async with _connection(settings, "rebuild-current", reads_headers=False) as nc:
        # Not synced while it is built: a rebuild that is interrupted is begun again.
        writer = CurrentWriter(built, sync=False)
        try:
            await base.run(nc, writer, (LEDGER,), progress=lambda _, at, end: progress(at, end), until_caught_up=True)
            # The projector has gone on meanwhile. It waits for as long as the new view needs to overtake it.
            with HeldView(path) as old:
                async with asyncio.timeout(_HELD_SECONDS_MAX):
                    await base.run(nc, writer, (LEDGER,), until_caught_up=True)
                end = writer.position(LEDGER)
                writer.close()
                old.replace_by(built)
            progress(end, end)
        except TimeoutError:
            raise LedgerUnavailable("the log was too slow for the last events; the view stays as it was") from None
        finally:
            for left in path.parent.glob(f"{built.name}*"):
                left.unlink(missing_ok=True)


async def _rebuild_revocations(settings: Settings, progress: Progress) -> None:
    async with _connection(settings, "rebuild-revocations") as nc:
        await begin_feed_anew(nc, stream_limits(settings))
        ledger, feed = await stream_state(nc, LEDGER), await stream_state(nc, REVOCATIONS)
        end, anew = int(ledger["last_seq"]), feed_id(ledger["created"], feed["created"])
        deadline = time.monotonic() + _ANNOUNCED_SECONDS_MAX
        while time.monotonic() < deadline:
            with contextlib.suppress(LedgerUnavailable):
                told = await ask_position(nc)
                if told.feed == anew and told.ledger_seq >= end:
                    progress(end, end)
                    return
            await asyncio.sleep(_ROUND_SECONDS)
        log.warning("feed_is_empty", action="the revocations are announced by `token-ledger project revocations`")


async def _rebuild_analytics(settings: Settings, progress: Progress) -> None:
    from projections import analytics  # noqa: PLC0415 - as above

    positions: dict[str, tuple[int, int]] = {}

    def both(stream: str, at: int, end: int) -> None:
        positions[stream] = (at, end)
        progress(sum(p[0] for p in positions.values()), sum(p[1] for p in positions.values()))

    async with _connection(settings, "rebuild-analytics", reads_headers=False) as nc:
        await analytics.rebuild(nc, settings.data_dir / "analytics", progress=both)


def _check_address(settings: Settings) -> None:
    """Says at once what the HTTP server would find out again and again. Raises: CannotListen."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise CannotListen(f"cannot listen on {settings.host} port {settings.port}: {error.strerror}") from None


async def _until_signalled(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


class _Child:
    """A process that is started again whenever it ends, more slowly the sooner it does."""

    def __init__(self, name: str, arguments: list[str], settings: Settings, stop_seconds: float) -> None:
        self.name = name
        self._arguments = arguments
        self._settings = settings
        self._stop_seconds = stop_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep())

    async def _spawn(self) -> None:
        environment = self._settings.given_to(os.environ) | {SUPERVISED_BY: str(os.getpid())}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "service.cli", *self._arguments, env=environment, start_new_session=True
        )

    async def _keep(self) -> None:
        pause = _RESTART_SECONDS_MIN
        while True:
            assert self._process is not None
            started = time.monotonic()
            code = await self._process.wait()
            if time.monotonic() - started > _HEALTHY_AFTER_SECONDS:
                pause = _RESTART_SECONDS_MIN
            log.error("process_ended", process=self.name, code=code, action=f"starting it again in {pause:g} s")
            await asyncio.sleep(pause)
            pause = await self._spawn_patiently(min(pause * 2, _RESTART_SECONDS_MAX))

    async def _spawn_patiently(self, pause: float) -> float:
        """Until it is started, with pauses that grow; answers the next. A host may have no room for it for a while."""
        while True:
            try:
                await self._spawn()
            except OSError as error:
                log.error(  # noqa: TRY400 - where it was raised says nothing
                    "process_not_started", process=self.name, why=str(error), action=f"trying again in {pause:g} s"
                )
                await asyncio.sleep(pause)
                pause = min(pause * 2, _RESTART_SECONDS_MAX)
            else:
                return pause

    async def stop(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(self._stop_seconds):
                await process.wait()
        except TimeoutError:
            log.warning("process_killed", process=self.name, after_seconds=self._stop_seconds)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _up(settings: Settings) -> None:
    from service.keys import MasterKey  # noqa: PLC0415 - the projectors unseal nothing

    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server: EmbeddedServer | None = None
    stops: list[Callable[[], Awaitable[None]]] = []
    try:
        if settings.nats_url is None:
            server = EmbeddedServer(settings.data_dir, settings.nats_port)
            await server.start()
            stops.append(server.stop)
            settings = replace(settings, nats_url=server.url)
        master = MasterKey.load(settings.master_key, settings.data_dir)
        await _prepare(settings, server, master)
        if server is not None:
            stops.append(await _admitting(settings, server))
        service, *others = (_child(settings, server, *words) for words in _CHILDREN)
        for child in (*others, service):
            await child.start()

        async def stop_others() -> None:
            await asyncio.gather(*(other.stop() for other in others))

        stops += [stop_others, service.stop]
        waiting = asyncio.create_task(_announce(settings))
        await stop.wait()
        waiting.cancel()
        log.info("stopping")
    finally:
        # The API first, so that what it has promised is projected and the log takes it; the log last.
        for stop_one in reversed(stops):
            await stop_one()


_CHILDREN: tuple[tuple[str, list[str]], ...] = (
    ("service", ["serve"]),
    ("projector", ["project", "current"]),
    ("projector", ["project", "analytics"]),
    ("projector", ["project", "revocations"]),
    ("projector", ["project", "receipts"]),
    ("service", ["deliver"]),
)


def _child(settings: Settings, server: EmbeddedServer | None, role: str, arguments: list[str]) -> _Child:
    creds = server.creds(role) if server is not None else settings.nats_creds
    seconds = settings.drain_seconds + 1 if arguments == ["serve"] else _STOP_PROJECTOR_SECONDS
    return _Child(" ".join(arguments), arguments, replace(settings, nats_creds=creds), seconds)


async def _admitting(settings: Settings, server: EmbeddedServer) -> Callable[[], Awaitable[None]]:
    """Lets registered subscribers in from now on; returns what ends that. Raises: LedgerError."""
    from service.admission import Admission  # noqa: PLC0415 - the other processes let nobody in

    nc = await connect(settings.nats_url or "", server.creds("admin"), name="admission")
    admission = Admission(server, nc)
    await admission.serve()
    keeping = asyncio.create_task(admission.keep())

    async def stop() -> None:
        keeping.cancel()
        await nc.close()

    return stop


async def _prepare(settings: Settings, server: EmbeddedServer | None, master: MasterKey) -> None:
    """Streams and the first administrator. Raises: LedgerError."""
    from service.bootstrap import bootstrap  # noqa: PLC0415 - the other processes make no tokens

    creds = server.creds("admin") if server is not None else settings.nats_creds
    async with _connection(replace(settings, nats_creds=creds), "provision") as nc:
        await provision_streams(nc, stream_limits(settings))
        if await _log_went_back(nc, settings):
            log.error("log_went_back", alarm=True, action="beginning the feed anew; was a backup restored?")
            await begin_feed_anew(nc, stream_limits(settings))
    creds = server.creds("service") if server is not None else settings.nats_creds
    async with _connection(replace(settings, nats_creds=creds), "bootstrap") as nc:
        await bootstrap(nc, settings, master)


async def _log_went_back(nc: Connection, settings: Settings) -> bool:
    """Whether this host's view has seen events that the log no longer holds: their sequences will be given again."""
    path = view_path(settings.data_dir)
    if not path.exists():
        return False
    view = CurrentReader(path)
    seen = view.freshness().position
    view.close()
    return seen > int((await stream_state(nc, LEDGER))["last_seq"])


async def _bootstrap_alone(settings: Settings) -> None:
    """The first administrator, where the API runs without `up`."""
    from service.bootstrap import bootstrap  # noqa: PLC0415 - where there is one already, none is made
    from service.keys import MasterKey  # noqa: PLC0415 - as above

    nc = await _patiently(settings, "bootstrap")
    try:
        await bootstrap(nc, settings, MasterKey.load(settings.master_key, settings.data_dir))
    finally:
        await nc.close()


async def _announce(settings: Settings) -> None:
    """Says on standard output when the service is ready, and where."""
    host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host  # noqa: S104 - what is listened on
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    while not await _is_ready(host, settings.port):  # noqa: ASYNC110 - nothing tells it
        await asyncio.sleep(_ROUND_SECONDS)
    path = settings.data_dir.absolute() / "bootstrap.json"
    where = f"is in {path}" if path.exists() else "is not on this host (`token-ledger admin-token` makes another)"
    print(f"token-ledger is ready at {url}; the administrator's token {where}", flush=True)  # noqa: T201 - for a person, not for the log


async def _is_ready(host: str, port: int) -> bool:
    """Asked by hand: a client would take longer to load than the one answer, and stay for as long as the service."""
    try:
        async with asyncio.timeout(_READY_SECONDS_MAX):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(b"GET /health/ready HTTP/1.1\r\nHost: token-ledger\r\nConnection: close\r\n\r\n")
                return (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            finally:
                writer.close()
    except OSError:  # TimeoutError is one
        return False
