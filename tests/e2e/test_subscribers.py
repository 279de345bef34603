"""Registered subscribers over NATS, as their operators and their clients meet them. Requirement: issue 4 item 1, 2.

CONTRACT "Events for subscribers": what each event says. The client here is the plain NATS client, not ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest
from click.testing import CliRunner
from nats.aio.client import Client

from events import streams
from events.errors import LedgerUnavailable
from service.cli import main
from tests import running
from tests.running import Service, StartService, until

SECONDS_MAX = 60.0
PLAIN = Path(running.__file__).with_name("plain_subscriber.py")


def register(service: Service, **more: Any) -> dict[str, Any]:
    made = service.done("POST", "/v1/subscribers", json={"name": "orders-api", "transport": "nats", **more})
    assert made["in_force"], made
    return made


@contextlib.asynccontextmanager
async def following(told: dict[str, Any], **options: Any) -> AsyncIterator[Client]:
    nc = await nats.connect(
        told["nats_url"], nkeys_seed_str=told["nats_seed"], inbox_prefix=told["inbox_prefix"], **options
    )
    try:
        yield nc
    finally:
        await nc.close()


async def received(told: dict[str, Any], *ids: int) -> dict[int, bytes]:
    """What a client with these credentials gets, until it has had all of `ids`; each is acknowledged."""
    found: dict[int, bytes] = {}
    async with asyncio.timeout(SECONDS_MAX), following(told) as nc:
        js = nc.jetstream(prefix=told["api_prefix"])
        feed = await js.pull_subscribe_bind(told["consumer"], stream=told["stream"])
        while not set(ids) <= found.keys():
            with contextlib.suppress(nats.errors.TimeoutError):
                for message in await feed.fetch(50, timeout=1):
                    found[int(json.loads(message.data)["id"])] = message.data
                    await message.ack_sync(timeout=SECONDS_MAX)
    return found


def revoke(service: Service, **what: str) -> int:
    seq: int = service.done("POST", "/v1/revocations", json={"reason": "compromised", **what})["ledger_seq"]
    return seq


# What is got


async def test_subscriber_gets_each_revocation_as_the_cloud_event_of_the_contract(service: Service) -> None:
    pat, app, user = service.pat(), service.app(), service.user()
    grant = service.pat()
    jwt = service.grant(service.app(access_token_format="jwt"))
    told = register(service)
    seqs = {
        "token": service.done("POST", f"/v1/tokens/{pat['token_id']}/revoke", json={"reason": "logout"})["ledger_seq"],
        "grant": revoke(service, grant_id=grant["grant_id"]),
        "client": revoke(service, client_id=app.client_id),
        "subject": revoke(service, subject=user["user_id"]),
        "jwt": revoke(service, token=jwt["access_token"]),
    }
    found = await received(told, *seqs.values())
    events = {what: json.loads(found[seq]) for what, seq in seqs.items()}
    for what, event in events.items():
        seq, kind = seqs[what], "token" if what == "jwt" else what
        data = event.pop("data")
        assert event == {
            "specversion": "1.0",
            "id": str(seq),
            "source": service.issuer,
            "type": f"token-ledger.{kind}.revoked.v1",
            "time": event["time"],
            "datacontenttype": "application/json",
        }
        assert (data["ledger_seq"], None in data.values()) == (seq, False)
        assert datetime.fromisoformat(data["revoked_at"]).tzinfo is not None
        events[what] = data
    assert (events["token"]["token_id"], events["token"]["reason"]) == (pat["token_id"], "logout")
    assert events["token"]["grant_id"] == pat["grant_id"]
    assert events["grant"]["grant_id"] == grant["grant_id"]
    assert (events["client"]["client_id"], "issued_before" in events["client"]) == (app.client_id, True)
    assert (events["subject"]["subject"], "issued_before" in events["subject"]) == (user["user_id"], True)
    shown = service.done("GET", f"/v1/subscribers/{told['subscriber_id']}")
    assert (shown["pending"], shown["ack_pending"]) == (0, 0)


async def test_subscriber_from_a_cursor_gets_what_came_before_it_was_registered(service: Service) -> None:
    first, second = (revoke(service, token_id=service.pat()["token_id"]) for _ in range(2))
    found = await received(register(service, after=first), second)
    assert (first in found, second in found) == (False, True)
    assert first in await received(register(service, after=first - 1), first, second)


async def test_subscriber_without_a_cursor_gets_what_comes_from_now_on(service: Service) -> None:
    before = revoke(service, token_id=service.pat()["token_id"])
    # What is announced already is not announced again.
    until(lambda: service.done("GET", "/v1/revocations", params={"after": before - 1})["items"], what="announced")
    told = register(service)
    after = revoke(service, token_id=service.pat()["token_id"])
    assert await received(told, after) == {after: (await received(register(service, after=after - 1), after))[after]}


async def test_subscriber_may_ask_how_far_the_feed_is(service: Service) -> None:
    told = register(service)
    async with following(told) as nc:
        position = json.loads((await nc.request("feed.position", b"", timeout=SECONDS_MAX)).data)
    assert position.keys() == {"feed", "ledger_seq", "stream_seq", "age_ms"}


@pytest.mark.parametrize(
    ("wanted", "status", "code"),
    [
        pytest.param({"after": 2**52}, 400, "feed_changed", id="after-beyond-the-end"),
        pytest.param({"after": -1}, 400, "invalid_request", id="after-negative"),
        pytest.param({"transport": "smtp"}, 400, "invalid_request", id="transport"),
        pytest.param({"transport": "http", "after": 1}, 400, "invalid_request", id="after-over-http"),
        pytest.param({"name": ""}, 400, "invalid_request", id="no-name"),
        pytest.param({"name": "a\nb"}, 400, "invalid_request", id="two-lines"),
        pytest.param({"owner": "usr_" + "0" * 32}, 404, "not_found", id="unknown-owner"),
        pytest.param({"owner": "cli_" + "0" * 32}, 404, "not_found", id="unknown-client"),
        pytest.param({"owner": "somebody"}, 404, "not_found", id="owner-is-no-id"),
        pytest.param({"filter": "x"}, 400, "invalid_request", id="unknown-member"),
    ],
)
def test_registration_that_cannot_be_is_refused(
    service: Service, wanted: dict[str, Any], status: int, code: str
) -> None:
    count = len(list(service.items("/v1/subscribers")))
    body = {"name": "x", "transport": "nats", **wanted}
    running.problem(service.call("POST", "/v1/subscribers", json=body), status, code)
    assert count == len(list(service.items("/v1/subscribers")))


def test_registration_for_a_disabled_owner_is_refused(service: Service) -> None:
    app = service.app()
    service.done("DELETE", f"/v1/clients/{app.client_id}")
    body = {"name": "x", "transport": "http", "owner": app.client_id}
    running.problem(service.call("POST", "/v1/subscribers", json=body), 409, "ended")


def test_repeated_registration_gives_the_same_seed_and_one_subscriber(service: Service) -> None:
    count = len(list(service.items("/v1/subscribers")))
    body, headers = {"name": "x", "transport": "nats"}, {"Idempotency-Key": running.unique("key")}
    first, again = (service.done("POST", "/v1/subscribers", json=body, headers=headers) for _ in range(2))
    assert first == again
    assert len(list(service.items("/v1/subscribers"))) == count + 1


def test_seed_stands_in_no_file_of_the_service(service: Service) -> None:
    told = register(service)
    seed = told["nats_seed"].encode()
    held = [
        path
        for path in (*service.data_dir.rglob("*"), service.log_path)
        if path.is_file() and seed in path.read_bytes()
    ]
    assert held == []


# Who may


def test_subscribers_are_seen_by_their_owner_auditors_and_administrators(service: Service) -> None:
    owner = service.user(kind="service", scope="ledger:subscribe")
    token = service.issue(owner["user_id"], "ledger:subscribe", kind="sat")["token"]
    other, auditor = service.bearer("ledger:subscribe"), service.bearer("ledger:audit")
    made = register(service, transport="http", owner=owner["user_id"])
    path = f"/v1/subscribers/{made['subscriber_id']}"

    def listed(bearer: str) -> list[str]:
        page = service.done("GET", "/v1/subscribers", token=bearer, params={"limit": 1000})
        return [one["subscriber_id"] for one in page["items"]]

    assert listed(token) == [made["subscriber_id"]]
    assert service.done("GET", path, token=token)["owner"] == owner["user_id"]
    assert listed(other) == []
    running.problem(service.call("GET", path, token=other), 404, "not_found")
    assert made["subscriber_id"] in listed(auditor)
    for bearer in (token, auditor):
        running.problem(service.call("DELETE", path, token=bearer), 403, "insufficient_scope")
        body = {"name": "x", "transport": "http"}
        running.problem(service.call("POST", "/v1/subscribers", token=bearer, json=body), 403, "insufficient_scope")


def test_list_of_subscribers_goes_on_from_its_cursor(service: Service) -> None:
    made = [register(service, transport="http")["subscriber_id"] for _ in range(3)]
    seen = [one["subscriber_id"] for one in service.items("/v1/subscribers", limit=1)]
    assert [one for one in seen if one in made] == made
    assert len(seen) == len(set(seen))


def test_registration_and_removal_stand_in_the_audit_trail(service: Service) -> None:
    made = register(service)
    removed = service.done("DELETE", f"/v1/subscribers/{made['subscriber_id']}")
    seqs = {"subscriber.registered": made["ledger_seq"], "subscriber.removed": removed["ledger_seq"]}
    for kind, seq in seqs.items():
        found = service.done("GET", "/v1/audit/events", params={"type": kind, "after_seq": seq - 1, "limit": 1})
        [event] = found["items"]
        assert (event["ledger_seq"], event["type"].partition("/")[0]) == (seq, kind)
        assert made["subscriber_id"] in json.dumps(event)


# Ending one, and losing its consumer


async def test_removed_subscriber_is_disconnected_refused_and_forgotten(service: Service, tmp_path: Path) -> None:
    told, stays = register(service), register(service)
    path = f"/v1/subscribers/{told['subscriber_id']}"
    lost, stayed = asyncio.Event(), asyncio.Event()

    async def tell_lost() -> None:
        lost.set()

    async def tell_stayed() -> None:
        stayed.set()

    options: dict[str, Any] = {"allow_reconnect": False}
    async with (
        following(told, closed_cb=tell_lost, error_cb=_ignored, **options),
        following(stays, disconnected_cb=tell_stayed) as kept,
    ):
        done = await asyncio.to_thread(service.done, "DELETE", path)
        await asyncio.wait_for(lost.wait(), SECONDS_MAX)
        await kept.flush()
        assert not stayed.is_set()
    seed_file = tmp_path / f"{told['subscriber_id']}.nk"
    seed_file.write_text(told["nats_seed"])
    with pytest.raises(LedgerUnavailable, match="Authorization Violation"):
        await streams.connect(told["nats_url"], seed_file, name="test")
    assert (done["in_force"], done["subscriber_id"]) == (True, told["subscriber_id"])
    assert done == service.done("DELETE", path)
    running.problem(service.call("GET", path), 404, "not_found")
    assert told["subscriber_id"] not in [one["subscriber_id"] for one in service.items("/v1/subscribers")]
    admin = await streams.connect(told["nats_url"], service.data_dir / "nats" / "admin.nk", name="test")
    try:
        info = await admin.request(f"$JS.API.CONSUMER.INFO.REVOCATIONS.{told['consumer']}", timeout=SECONDS_MAX)
        assert json.loads(info.data)["error"]["err_code"] == 10014
    finally:
        await admin.close()


async def _ignored(_: Exception) -> None:
    """The plain client would log it."""


def test_removal_of_who_is_none_is_refused(service: Service) -> None:
    for name in ("sub_" + "0" * 32, "sub_x", "whk_" + "0" * 32):
        running.problem(service.call("DELETE", f"/v1/subscribers/{name}"), 404, "not_found")


async def test_lost_consumer_is_made_again_and_passes_nothing_over(service: Service) -> None:
    told = register(service)
    first = revoke(service, token_id=service.pat()["token_id"])
    await received(told, first)
    admin = await streams.connect(told["nats_url"], service.data_dir / "nats" / "admin.nk", name="test")
    try:
        deleted = await admin.request(f"$JS.API.CONSUMER.DELETE.REVOCATIONS.{told['consumer']}", timeout=SECONDS_MAX)
        assert json.loads(deleted.data)["success"]
    finally:
        await admin.close()
    second = revoke(service, token_id=service.pat()["token_id"])
    service.done("GET", f"/v1/subscribers/{told['subscriber_id']}")
    assert {first, second} <= (await received(told, first, second)).keys()


# Killed, restarted, cut off


class Plain:
    """A subscriber in a process of its own, which can be killed and started again."""

    def __init__(self, told: dict[str, Any], directory: Path) -> None:
        self._registration = directory / f"{told['subscriber_id']}.json"
        self._registration.write_text(json.dumps(told))
        self._applied = directory / f"{told['subscriber_id']}.ndjson"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = [sys.executable, str(PLAIN), str(self._registration), str(self._applied)]
        self._process = subprocess.Popen(words, cwd=self._registration.parent, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(SECONDS_MAX)

    def applied(self) -> set[int]:
        if not self._applied.exists():
            return set()
        # Killed while it wrote, it may have left half a line, which was not acknowledged.
        return {int(json.loads(line)["id"]) for line in self._applied.read_bytes().split(b"\n") if line.endswith(b"}}")}


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Any]:
    started: list[Plain] = []

    def make(told: dict[str, Any]) -> Plain:
        started.append(Plain(told, tmp_path))
        started[-1].start()
        return started[-1]

    yield make
    for one in started:
        one.kill()


@pytest.mark.slow
def test_subscriber_killed_and_cut_off_ends_with_what_the_ledger_revoked(
    own_service: StartService, plain: Any, tmp_path: Path
) -> None:
    """Followers that were killed, a killed nats-server and a restarted service lose nothing."""
    settings = {"directory": tmp_path / "kept", "workers": 1, "nats_port": running.free_port()}
    service = own_service(**settings)
    steady, killed = plain(register(service)), plain(register(service))
    revoked = {revoke(service, token_id=service.pat()["token_id"]) for _ in range(20)}
    until(killed.applied, seconds=SECONDS_MAX, what="it follows")
    killed.kill()
    revoked |= {revoke(service, token_id=service.pat()["token_id"]) for _ in range(20)}
    nats_server = service.nats_server()
    nats_server.kill()
    until(lambda: not nats_server.alive(), what="it is dead")
    until(service.ready, seconds=SECONDS_MAX, what="the log is back")
    killed.start()
    late = register(service, after=0)
    revoked |= {revoke(service, token_id=service.pat()["token_id"]) for _ in range(20)}
    service.stop()
    service = own_service(**settings)
    revoked |= {revoke(service, token_id=service.pat()["token_id"]) for _ in range(5)}
    begun_late = plain(late)
    for follower in (steady, killed, begun_late):
        until(lambda one=follower: revoked <= one.applied(), seconds=SECONDS_MAX, what="all that was revoked")
        assert revoked == follower.applied()


# The command line


def run(service: Service, *arguments: str) -> Any:
    environ = {"TOKEN_LEDGER_DATA_DIR": str(service.data_dir)}
    return CliRunner(env=environ).invoke(main, ["subscriber", *arguments])


async def test_command_writes_a_seed_file_that_clients_take_as_it_is(service: Service, tmp_path: Path) -> None:
    result = run(service, "create", "cli", "--creds-file", str(tmp_path), "-o", "json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    seed_file = Path(told["creds_file"])
    assert "nats_seed" not in told
    assert seed_file == tmp_path / f"{told['subscriber_id']}.nk"
    assert {seed_file: 0o600} == modes(tmp_path)
    theirs = await nats.connect(told["nats_url"], nkeys_seed=str(seed_file), inbox_prefix=told["inbox_prefix"])
    ours = await streams.connect(told["nats_url"], seed_file, name="test")
    for nc in (theirs, ours):
        answer = await nc.request(f"L.API.CONSUMER.INFO.REVOCATIONS.{told['consumer']}", timeout=SECONDS_MAX)
        assert json.loads(answer.data)["name"] == told["consumer"]
        await nc.close()


def modes(directory: Path) -> dict[Path, int]:
    return {path: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


def test_command_refuses_a_seed_file_that_is_there_before_it_registers(service: Service, tmp_path: Path) -> None:
    count = len(list(service.items("/v1/subscribers")))
    there = tmp_path / "there.nk"
    there.write_text("mine")
    for words in (["--creds-file", str(there)], ["--creds-file", str(tmp_path / "no" / "such")]):
        assert run(service, "create", "cli", *words).exit_code == 2
    assert run(service, "create", "cli", "--transport", "http", "--creds-file", str(tmp_path / "x")).exit_code == 2
    assert run(service, "create", "cli", "--after", str(2**52), "--creds-file", str(tmp_path / "x")).exit_code == 1
    assert there.read_text() == "mine"
    assert [there] == list(tmp_path.iterdir())
    assert count == len(list(service.items("/v1/subscribers")))


def test_command_registers_lists_shows_and_deletes(service: Service) -> None:
    made = json.loads(run(service, "create", "cli", "--transport", "http", "-o", "json").stdout)
    name = made["subscriber_id"]
    assert name in run(service, "list", "--all").stdout
    assert json.loads(run(service, "show", name, "-o", "json").stdout)["name"] == "cli"
    assert json.loads(run(service, "delete", name, "-o", "json").stdout)["in_force"]
    assert run(service, "show", name).exit_code == 1


def test_list_of_subscribers_goes_into_the_configuration_of_a_cluster(service: Service, tmp_path: Path) -> None:
    told = register(service)
    listed = tmp_path / "subscribers.json"
    listed.write_text(run(service, "list", "--all", "-o", "json").stdout)
    words = ["nats-config", str(tmp_path / "cluster"), "--node", "n1", "--subscribers", str(listed), "-o", "json"]
    assert CliRunner().invoke(main, words).exit_code == 0
    config = json.loads((tmp_path / "cluster/nodes/n1/nats.conf").read_bytes())
    assert told["public_key"] in [user["nkey"] for user in config["accounts"]["APPS"]["users"]]
    listed.write_text('{"items": [], "next_cursor": "x"}')
    assert CliRunner().invoke(main, words).exit_code == 2
    listed.write_text("[]")
    assert CliRunner().invoke(main, words).exit_code == 2
