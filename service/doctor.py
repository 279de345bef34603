"""`token-ledger doctor`: looks at everything that the service stands on, and says what to do about it.

Nothing is changed. Every check stands alone: what cannot be reached is a finding, and the rest is still looked at.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import lmdb
from msgspec import Struct

from events.errors import LedgerError
from events.ledger import Ledger
from events.server import configured_url
from events.streams import (
    LEDGER,
    MIN_SERVER_VERSION,
    USAGE,
    Connection,
    check,
    connect,
    server_reports,
    stream_state,
)
from events.types import WebhookMetadata
from projections.asking_receipts import (
    Follower,
    FollowerStanding,
    ReceiptsRequest,
    ReceiptsUnavailable,
    Registered,
    ask_receipts,
)
from projections.current import CurrentReader, view_path
from service.cli.connection import Api, locate
from service.cli.output import Failed, moment_of
from service.keys import MasterKey
from service.settings import Settings, SettingsError, is_loopback
from service.signing import ID_ALGORITHM
from service.streams import stream_limits

State = Literal["ok", "warning", "problem"]

DISK_FREE_SHARE_WARNING, DISK_FREE_SHARE_PROBLEM = 0.10, 0.03
DISK_FREE_BYTES_WARNING, DISK_FREE_BYTES_PROBLEM = 2 * 1024**3, 512 * 1024**2
STREAM_FULL_SHARE_WARNING, STREAM_FULL_SHARE_PROBLEM = 0.8, 0.95
CLOCK_SKEW_SECONDS_WARNING, CLOCK_SKEW_SECONDS_PROBLEM = 1.0, 5.0
TOKEN_DAYS_WARNING = 14
CONNECT_SECONDS_MAX = 3.0
_BESIDE = {".wal", ".segments"}  # what belongs to a file of analytics
_UP = "start it with `token-ledger up`"


class Finding(Struct, frozen=True):
    """What one check found. `fix` says what to do, and is empty if there is nothing to do."""

    name: str
    state: State
    found: str
    fix: str = ""


def worst(findings: list[Finding]) -> State:
    """The state of the whole."""
    states = {finding.state for finding in findings}
    return "problem" if "problem" in states else "warning" if "warning" in states else "ok"


async def examine(settings: Settings, data_dir: Path | None, url: str | None) -> list[Finding]:
    """All findings, in the order in which they are best read.

    `data_dir`, `url`: the flags that say which service is meant, None if they were not given.
    """
    bootstrap = _bootstrap(settings.data_dir)
    findings = [*_files(settings), _disk(settings.data_dir), *_set_aside(settings.data_dir), *_addresses(settings)]
    findings += _api(settings, data_dir, url)
    nats_url = settings.nats_url or bootstrap.get("nats_url") or configured_url(settings.data_dir)
    if not isinstance(nats_url, str):
        findings.append(Finding("nats-server", "problem", "it is not known where it is", _UP + " or set nats_url"))
        findings += _view(settings, None)
        return findings
    creds = settings.nats_creds or settings.data_dir / "nats" / "service.nk"
    findings += await _nats(settings, nats_url, creds if creds.exists() else None)
    return findings


# Files of the data directory


def _bootstrap(data_dir: Path) -> dict[str, Any]:
    try:
        bootstrap = json.loads((data_dir / "bootstrap.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return bootstrap if isinstance(bootstrap, dict) else {}


def _files(settings: Settings) -> Iterator[Finding]:
    data_dir = settings.data_dir
    if not data_dir.is_dir():
        yield Finding("data directory", "problem", f"{data_dir} does not exist", _UP + ", or name it with --data-dir")
        return
    yield _bootstrap_file(data_dir)
    yield _master_key(settings)
    secrets = [data_dir / "bootstrap.json", data_dir / "master.key", *sorted((data_dir / "nats").glob("*.nk"))]
    if settings.nats_creds is not None:
        secrets.append(settings.nats_creds)
    present = [path for path in secrets if path.exists()]
    readable = [path for path in present if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if readable:
        names = " ".join(map(str, readable))
        yield Finding("secret files", "problem", f"others than the owner may use {names}", f"chmod 600 {names}")
    else:
        yield Finding("secret files", "ok", f"{len(present)} files, for their owner only")
    mode = stat.S_IMODE(data_dir.stat().st_mode)
    if mode & 0o022:
        yield Finding(
            "data directory",
            "problem",
            f"{data_dir} has mode {mode:o}: others may replace files",
            f"chmod 700 {data_dir}",
        )
    else:
        yield Finding("data directory", "ok", str(data_dir))


def _bootstrap_file(data_dir: Path) -> Finding:
    path = data_dir / "bootstrap.json"
    missing = {"issuer", "api_url", "nats_url", "admin_token"} - _bootstrap(data_dir).keys()
    if not path.exists():
        # Hosts of a cluster that did not start first have none, and are told by the environment.
        given = "TOKEN_LEDGER_URL" in os.environ and "TOKEN_LEDGER_TOKEN" in os.environ
        return Finding(
            "bootstrap.json",
            "ok" if given else "warning",
            f"there is no {path}" + ("; the environment says what it would" if given else ""),
            "" if given else _UP + "; a new token: `token-ledger admin-token`",
        )
    if missing:
        return Finding(
            "bootstrap.json",
            "problem",
            f"{path} cannot be read as this user, or lacks {', '.join(sorted(missing))}",
            "run this as the user who runs the service; if the file is damaged, `token-ledger admin-token`",
        )
    return Finding("bootstrap.json", "ok", str(path))


def _master_key(settings: Settings) -> Finding:
    path = settings.data_dir / "master.key"
    if settings.master_key is not None:
        return Finding("master key", "ok", "given by the settings")
    if not path.exists():
        return Finding(
            "master key",
            "problem",
            f"there is no {path} and none in the settings: nothing that was sealed can be read",
            "restore the file from a backup, or set TOKEN_LEDGER_MASTER_KEY_FILE",
        )
    try:
        MasterKey.load(None, settings.data_dir)
    except (OSError, SettingsError) as error:
        return Finding("master key", "problem", str(error), "restore it from a backup; it cannot be made again")
    return Finding("master key", "ok", f"{path}; without a copy elsewhere, losing it loses all signing keys")


def _disk(data_dir: Path) -> Finding:
    place = next(path for path in (data_dir, *data_dir.absolute().parents) if path.exists())
    usage = shutil.disk_usage(place)
    found = f"{_size(usage.free)} of {_size(usage.total)} free at {place}"
    fix = "free space: when the disk is full nothing can be issued or revoked"
    if usage.free < min(DISK_FREE_BYTES_PROBLEM, usage.total * DISK_FREE_SHARE_PROBLEM):
        return Finding("disk", "problem", found, fix)
    if usage.free < min(DISK_FREE_BYTES_WARNING, usage.total * DISK_FREE_SHARE_WARNING):
        return Finding("disk", "warning", found, fix)
    return Finding("disk", "ok", found)


def _set_aside(data_dir: Path) -> Iterator[Finding]:
    """Analytics files that were found damaged: the store was rebuilt, and somebody should ask why it had to be."""
    damaged = sorted(file for file in (data_dir / "analytics").glob("*.corrupt-*") if file.suffix not in _BESIDE)
    if damaged:
        found = f"was damaged, was set aside and is rebuilt from the log: {' '.join(map(str, damaged))}"
        yield Finding(
            "analytics store", "warning", found, "look at the disk and the kernel's log; delete the files then"
        )


def _addresses(settings: Settings) -> Iterator[Finding]:
    if not is_loopback(settings.host) and settings.issuer.startswith("http://"):
        yield Finding(
            "issuer",
            "warning",
            f"the API listens on {settings.host}; other machines cannot reach the issuer {settings.issuer}",
            "set the issuer to the https:// address that clients use",
        )


# The HTTP API


def _api(settings: Settings, data_dir: Path | None, url: str | None) -> Iterator[Finding]:
    try:
        api = Api(*locate(data_dir, url))
    except Failed as failure:
        yield Finding("API", "problem", failure.detail, failure.fix)
        return
    try:
        yield from _readiness(api)
        yield _own_token(api)
        yield from _signing_keys(api, settings)
    except Failed as failure:
        yield Finding("API", "problem", failure.detail, failure.fix)
    finally:
        api.close()


def _readiness(api: Api) -> Iterator[Finding]:
    started = datetime.now(UTC)
    response = api.ask("GET", "/health/live")
    milliseconds = (datetime.now(UTC) - started) / timedelta(milliseconds=1)
    if response.status_code != 200:
        yield Finding("API", "problem", f"{api.url}/health/live answered {response.status_code}", "look at its log")
        return
    yield Finding("API", "ok", f"{api.url} answers, in {milliseconds:.0f} ms")
    response = api.ask("GET", "/health/ready")
    try:
        answer = response.json()
        status, checks = str(answer["status"]), dict(answer["checks"])
    except (ValueError, KeyError, TypeError):
        yield Finding("readiness", "problem", f"/health/ready answered {response.status_code} and no checks", "")
        return
    state: State = "ok" if status == "ready" else "warning" if status == "degraded" else "problem"
    yield Finding("readiness", state, status, "" if state == "ok" else "see the checks that follow")
    for name, one in checks.items():
        found = str(one["detail"]) + (f"; {one['lag']} behind" if one.get("lag") else "")
        if one["ok"]:
            yield Finding(f"readiness: {name}", "ok", found)
        else:
            bad: State = "problem" if one["needed"] else "warning"
            yield Finding(f"readiness: {name}", bad, found, _READY.get(name, ""))


# What to do about a check of readiness that fails.
_READY = {
    "start": "look at the log of the service",
    "nats": "start the nats-server; the service connects by itself",
    "view": "`token-ledger project current` must run on the service's host",
    "signing_key": "`token-ledger key rotate`",
    "feed": "`token-ledger project revocations` must run beside the view on one host; its log says what holds it up",
    "analytics": "`token-ledger project analytics` must run on one host; validation goes on without",
    "abuse_rules": "they run with `token-ledger project analytics`; its log says what holds them up",
}


def _own_token(api: Api) -> Finding:
    """The token that this command uses: whether it still works, and for how long."""
    try:
        answer = api.call("POST", "/v1/tokens/validate", {"token": api.token})
    except Failed as failure:
        return Finding(
            "administrator's token",
            "problem",
            f"the service refuses it: {failure.detail}",
            "make a new one with `token-ledger admin-token`",
        )
    ends = moment_of(answer.get("expires_at"))
    if not answer["valid"] or ends is None:
        return Finding("administrator's token", "problem", str(answer["code"]), "`token-ledger admin-token`")
    days = (ends - datetime.now(UTC)) / timedelta(days=1)
    found = f"valid until {ends:%Y-%m-%d}"
    if days < TOKEN_DAYS_WARNING:
        fix = f"`token-ledger token rotate {answer['token_id']}` or `token-ledger admin-token`, and store the new one"
        return Finding("administrator's token", "warning", f"{found}, {days:.0f} days from now", fix)
    return Finding("administrator's token", "ok", found)


def _signing_keys(api: Api, settings: Settings) -> Iterator[Finding]:
    keys = api.items("/v1/keys", {}, limit=1000)["items"]
    rotation = timedelta(days=settings.key_rotation_days)
    for_id_tokens = {ID_ALGORITHM} | {key["alg"] for key in keys if key["purpose"] == "id"}
    kept = [("access", alg) for alg in settings.signing_algorithms] + [("id", alg) for alg in sorted(for_id_tokens)]
    for purpose, algorithm in kept:
        rotate = f"`token-ledger key rotate --purpose {purpose} --alg {algorithm}`"
        active = [key for key in keys if (key["purpose"], key["alg"], key["state"]) == (purpose, algorithm, "active")]
        if not active:
            what = f"no {algorithm} key for {'ID' if purpose == 'id' else 'access'} tokens is in use"
            yield Finding("signing keys", "problem", what, rotate)
        for key in active:
            since = moment_of(key.get("activated_at"))
            if since is None:
                continue
            due = since + rotation
            found = f"{key['kid']} ({algorithm}) signs since {since:%Y-%m-%d}; its rotation is due {due:%Y-%m-%d}"
            # The rotation is looked at from time to time, so a little late is not late.
            if datetime.now(UTC) > due + timedelta(days=1):
                fix = f"{rotate}, and look in the log why it did not rotate"
                yield Finding("signing keys", "warning", found, fix)
            else:
                yield Finding("signing keys", "ok", found)


# The nats-server, the streams and the view


async def _nats(settings: Settings, url: str, creds: Path | None) -> list[Finding]:
    try:
        nc = await connect(url, creds, name="doctor", seconds_max=CONNECT_SECONDS_MAX)
    except (LedgerError, OSError, ValueError) as error:
        fix = _UP if settings.nats_url is None else "check nats_url, nats_creds and that the servers run"
        return [Finding("nats-server", "problem", str(error), fix), *_view(settings, None)]
    findings = []
    try:
        findings.append(Finding("nats-server", "ok", f"{url} accepts {creds or 'a connection without credentials'}"))
        findings += await _servers(nc)
        findings += await _streams(nc, settings)
        findings += await _followers(nc, settings)
    except LedgerError as error:
        findings.append(Finding("nats-server", "problem", str(error), "look at the nats-server's log"))
    finally:
        await nc.close()
    return findings


async def _servers(nc: Connection) -> list[Finding]:
    findings = []
    asked = datetime.now(UTC)
    reports = await server_reports(nc)
    answered = datetime.now(UTC)
    wanted = ".".join(map(str, MIN_SERVER_VERSION))
    for report in reports:
        name = f"nats-server {report.get('server_name')}"
        version = str(report.get("version"))
        numbers = tuple(int(part) for part in re.findall(r"[0-9]+", version)[:3])
        if numbers < MIN_SERVER_VERSION:
            findings.append(Finding(name, "problem", f"version {version}", f"install {wanted} or newer"))
        else:
            findings.append(Finding(name, "ok", f"version {version}"))
        jetstream = report.get("jetstream", {})
        if jetstream.get("config", {}).get("sync_always"):
            findings.append(Finding(name, "ok", "syncs before it acknowledges"))
        else:
            findings.append(
                Finding(
                    name,
                    "problem",
                    "sync_interval is not `always`: a power failure would lose acknowledged events",
                    "set `jetstream { sync_interval: always }` and restart it",
                )
            )
        findings += _clock(name, moment_of(report.get("now")), asked, answered)
    return findings


def _clock(name: str, theirs: datetime | None, asked: datetime, answered: datetime) -> Iterator[Finding]:
    if theirs is None:
        return
    skew = max((asked - theirs).total_seconds(), (theirs - answered).total_seconds(), 0.0)
    found = f"its clock and this host's differ by {skew:.1f} s" if skew else "its clock agrees with this host's"
    state: State = "ok"
    if skew >= CLOCK_SKEW_SECONDS_PROBLEM:
        state = "problem"
    elif skew >= CLOCK_SKEW_SECONDS_WARNING:
        state = "warning"
    yield Finding(name, state, found, "" if state == "ok" else "run a time service (NTP) on both: expiry depends on it")


async def _streams(nc: Connection, settings: Settings) -> list[Finding]:
    findings = []
    try:
        await check(nc, stream_limits(settings))
        findings.append(Finding("streams", "ok", "configured as they must be"))
    except LedgerError as error:
        fix = (
            "put the named settings back; `token-ledger provision`, with the credentials of the role admin, makes "
            "what is missing and follows the limits of the settings"
        )
        findings.append(Finding("streams", "problem", str(error), fix))
    try:
        ledger, usage = await stream_state(nc, LEDGER), await stream_state(nc, USAGE)
    except LedgerError:  # a missing stream was named above
        return [*findings, *_view(settings, None)]
    findings.append(_ledger_size(ledger, settings))
    findings.append(_usage_size(usage, settings))
    findings += _view(settings, int(ledger["last_seq"]))
    return findings


async def _followers(nc: Connection, settings: Settings) -> list[Finding]:
    """Who follows the revocations, and who should and is not heard of."""
    try:
        registered = await Registered(Ledger(nc)).followers()
        answer = await ask_receipts(nc, ReceiptsRequest())
    except ReceiptsUnavailable as error:
        return [Finding("followers", "problem", str(error), error.fix)]
    names = {one.id: one for one in registered}
    silent = [one for one in answer.followers if one.silent_since_us is not None and one.follower in names]
    if not answer.complete:
        return [Finding("followers", "warning", "receipts are still being read", "look again in a minute")]
    found = [_silent(names[one.follower], one) for one in silent]
    found += [
        _disabled(one.id, one.webhook) for one in registered if one.webhook is not None and _was_ended(one.webhook)
    ]
    if found:
        return found
    behind = sum(1 for one in answer.followers if one.pending)
    said = f"{len(registered)} registered, all heard of within {settings.follower_silent_seconds_max} s"
    return [Finding("followers", "ok", said + (f"; {behind} have not applied everything yet" if behind else ""))]


def _was_ended(webhook: WebhookMetadata) -> bool:
    """Whether it was disabled by others than its owner."""
    return webhook.disabled_reason not in {None, "asked"}


def _disabled(webhook_id: str, webhook: WebhookMetadata) -> Finding:
    found = f"{webhook_id} (webhook, {webhook.webhook_name!r}) hears of nothing: disabled, {webhook.disabled_reason}"
    fix = f"`token-ledger webhook enable {webhook_id}` when its receiver is there, else `token-ledger webhook delete`"
    return Finding("followers", "warning", found, fix)


def _silent(follower: Follower, standing: FollowerStanding) -> Finding:
    since = datetime.fromtimestamp((standing.silent_since_us or 0) // 1_000_000, UTC)
    found = f"{follower.id} ({follower.transport}, {follower.name!r}) is silent since {since:%Y-%m-%d %H:%M:%S}Z"
    if standing.pending:
        found += f" and has not applied {standing.pending} revocation{'s' if standing.pending > 1 else ''}"
    what = "webhook" if follower.transport == "webhook" else "subscriber"
    fix = (
        "see that it runs and reaches this service: what is revoked, it may still accept; "
        f"if it is gone for good, `token-ledger {what} delete {follower.id}`"
    )
    return Finding("followers", "problem" if standing.pending else "warning", found, fix)


def _ledger_size(state: dict[str, Any], settings: Settings) -> Finding:
    found = f"{state['messages']} events, {_size(state['bytes'])}"
    if settings.ledger_bytes_max is None:
        return Finding("LEDGER", "ok", found)
    share = state["bytes"] / settings.ledger_bytes_max
    found += f", {share:.0%} of ledger_bytes_max"
    fix = "raise ledger_bytes_max: a full ledger refuses to issue and to revoke"
    if share >= STREAM_FULL_SHARE_PROBLEM:
        return Finding("LEDGER", "problem", found, fix)
    if share >= STREAM_FULL_SHARE_WARNING:
        return Finding("LEDGER", "warning", found, fix)
    return Finding("LEDGER", "ok", found)


def _usage_size(state: dict[str, Any], settings: Settings) -> Finding:
    found = f"{state['messages']} blocks, {_size(state['bytes'])} of at most {_size(settings.usage_bytes_max)}"
    if settings.nats_url is None and settings.data_dir.is_dir():
        room = shutil.disk_usage(settings.data_dir).free + state["bytes"]
        if settings.usage_bytes_max > room:
            return Finding(
                "USAGE",
                "warning",
                f"{found}; the disk has room for {_size(room)} only, so that uses could fill it",
                "set usage_bytes_max lower, or give the data directory a larger disk",
            )
    return Finding("USAGE", "ok", found)


def _view(settings: Settings, ledger_end: int | None) -> Iterator[Finding]:
    path = view_path(settings.data_dir)
    start = "start `token-ledger up`, or on a host of its own `token-ledger project current`"
    # Opening it would make it.
    if not path.exists():
        yield Finding("current-token view", "problem", f"there is no {path}", start)
        return
    try:
        reader = CurrentReader(path)
        try:
            fresh, stats = reader.freshness(), reader.stats()
        finally:
            reader.close()
    except (OSError, lmdb.Error) as error:
        fix = "run this as the user who runs the service; if it is damaged, `token-ledger rebuild current`"
        yield Finding("current-token view", "problem", f"{path} cannot be read: {error}", fix)
        return
    found = f"at {fresh.position}" + ("" if ledger_end is None else f" of {ledger_end}")
    found += f", {stats['token']} tokens, {_size(stats['bytes_file'])}"
    if ledger_end is not None and fresh.position > ledger_end:
        yield Finding(
            "current-token view",
            "problem",
            f"{found}: ahead of the ledger, as after a backup was restored",
            "`token-ledger rebuild current`",
        )
    elif fresh.age_seconds > settings.view_staleness_seconds_max:
        since = "since the host started" if fresh.age_seconds == float("inf") else f"for {fresh.age_seconds:.0f} s"
        yield Finding("current-token view", "problem", f"{found}; not known to be complete {since}", start)
    else:
        yield Finding("current-token view", "ok", f"{found}; complete {fresh.age_seconds:.1f} s ago")


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
