"""The command line, against the running service. Requirement: CONTRACT "Commands"; issue "The CLI"."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import struct
import subprocess
import termios
import threading
import typing
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from projections import asking, asking_tokens
from service.cli import audit, main
from service.cli.options import Duration
from service.cli.output import printable, worded
from tests import running
from tests.running import CANARY_NAME, CANARY_PASSWORD, CANARY_USERNAME, Service, unique

DONE, REFUSED, WRONG_USE = 0, 1, 2
Run = Callable[..., Result]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command in an empty directory, with nothing in the environment."""
    for name in ("DATA_DIR", "URL", "TOKEN"):
        monkeypatch.delenv(f"TOKEN_LEDGER_{name}", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: str = "", environ: dict[str, str] | None = None) -> Result:
        return CliRunner(env=environ or {}).invoke(main, arguments, input=stdin)

    return run


@pytest.fixture
def run(bare: Run, service: Service) -> Run:
    """Runs a command on the running service's data directory."""

    def run(*arguments: str, stdin: str = "") -> Result:
        return bare(*arguments, stdin=stdin, environ={"TOKEN_LEDGER_DATA_DIR": str(service.data_dir)})

    return run


@pytest.fixture
def done(run: Run) -> Callable[..., Any]:
    """The JSON of a command that must succeed."""

    def done(*arguments: str, stdin: str = "") -> Any:
        result = run(*arguments, "-o", "json", stdin=stdin)
        assert result.exit_code == DONE, result.output
        assert result.stderr == ""
        return json.loads(result.stdout)

    return done


Answer = tuple[int, str, bytes]


@pytest.fixture
def elsewhere() -> Iterator[Callable[[Callable[[str], Answer]], str]]:
    """Some other HTTP server: status, content type and body by path. The address is answered."""
    servers: list[ThreadingHTTPServer] = []

    def serve(answer: Callable[[str], Answer]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_DELETE(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                status, content_type, body = answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


# Wrong use


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["tokne"], "No such command", id="unknown-command"),
        pytest.param(["token", "revoke"], "give exactly one of TOKEN_ID, --token", id="revoke-nothing"),
        pytest.param(["token", "revoke", "tok_1", "--subject", "usr_1"], "give exactly one of", id="revoke-two"),
        pytest.param(["token", "revoke", "tok_1", "--reason", "bored"], "--reason", id="unknown-reason"),
        pytest.param(["token", "revoke", "--token", "-"], "on stdin, which is empty", id="empty-stdin"),
        pytest.param(["token", "validate", "-"], "on stdin, which is empty", id="validate-empty-stdin"),
        pytest.param(["token", "show", "../clients"], "is not an id", id="path-in-id"),
        pytest.param(["token", "show", ""], "is not an id", id="empty-id"),
        pytest.param(["token", "issue", "--kind", "pat"], "--subject", id="missing-option"),
        pytest.param(["token", "issue", "--kind", "access"], "--kind", id="kind-not-issued-here"),
        pytest.param(["token", "list", "--limit", "0"], "--limit", id="limit-zero"),
        pytest.param(["token", "list", "-o", "yaml"], "--output", id="unknown-output"),
        pytest.param(["client", "create", "x", "--access-token-ttl", "3w"], "is not a duration", id="duration"),
        pytest.param(["project", "everything"], "'current', 'analytics', 'revocations'", id="projection-unknown"),
        pytest.param(["rebuild", "everything"], "'current', 'analytics'", id="rebuild-unknown"),
        pytest.param(["up", "--port", "http"], "--port is 'http' and must be a whole number", id="setting"),
        pytest.param(["up", "--replicas", "3"], "replicas is more than 1 without nats_url", id="settings-contradict"),
        pytest.param(["serve", "--issuer", "http://a.example"], "must begin with https://", id="issuer"),
        pytest.param(["nats-config", "out", "--node", "a b"], "cannot name a node", id="node-name"),
    ],
)
def test_cli_wrong_use_is_refused_with_what_is_wrong_and_exit_code_2(
    bare: Run, arguments: list[str], says: str
) -> None:
    result = bare(*arguments)
    assert result.exit_code == WRONG_USE, result.output
    assert result.stdout == ""
    assert says in result.stderr


@pytest.mark.parametrize("token", ["tl_pat_secret", "eyJ.eyJ.sig"], ids=["reference", "jwt"])
def test_cli_token_where_an_id_belongs_is_refused_and_not_repeated(bare: Run, token: str) -> None:
    result = bare("token", "revoke", token)
    assert result.exit_code == WRONG_USE
    assert "that is a token, not an id" in result.stderr
    assert token not in result.output


def test_cli_unknown_setting_in_the_environment_is_refused(bare: Run) -> None:
    result = bare("up", environ={"TOKEN_LEDGER_PROT": "1"})
    assert result.exit_code == WRONG_USE
    assert "did you mean TOKEN_LEDGER_PORT?" in result.stderr
    assert "To do: " in result.stderr


def test_cli_without_a_service_says_how_to_start_one(bare: Run) -> None:
    result = bare("token", "list")
    assert result.exit_code == WRONG_USE
    assert "there is no data/bootstrap.json" in result.stderr
    assert "`token-ledger up`" in result.stderr


def test_cli_service_that_does_not_answer_says_how_to_start_it(bare: Run) -> None:
    environ = {"TOKEN_LEDGER_URL": f"http://127.0.0.1:{running.free_port()}", "TOKEN_LEDGER_TOKEN": "tl_sat_x"}
    result = bare("token", "list", environ=environ)
    assert result.exit_code == REFUSED
    assert "no service answers at http://127.0.0.1:" in result.stderr
    assert "`token-ledger up`" in result.stderr
    told = json.loads(bare("token", "list", "-o", "json", environ=environ).stderr)
    assert told["code"] == "unreachable"
    assert told.keys() == {"code", "detail", "fix"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"{", "cannot be read", id="not-json"),
        pytest.param(b"[]", "holds no api_url and admin_token", id="not-an-object"),
        pytest.param(b'{"api_url": "http://x"}', "holds no api_url and admin_token", id="no-token"),
    ],
)
def test_cli_broken_bootstrap_is_refused(bare: Run, content: bytes, says: str) -> None:
    Path("data").mkdir()
    Path("data/bootstrap.json").write_bytes(content)
    result = bare("token", "list")
    assert result.exit_code == REFUSED
    assert says in result.stderr


def test_cli_sends_the_bootstrap_token_to_no_other_address(bare: Run, elsewhere: Any) -> None:
    asked: list[str] = []
    url = elsewhere(lambda path: (asked.append(path), (200, "application/json", b'{"items": []}'))[1])
    Path("data").mkdir()
    Path("data/bootstrap.json").write_text(json.dumps({"api_url": "http://127.0.0.1:1", "admin_token": "tl_sat_x"}))
    for result in (bare("token", "list", "--url", url), bare("token", "list", environ={"TOKEN_LEDGER_URL": url})):
        assert result.exit_code == WRONG_USE
        assert "bootstrap.json's is for http://127.0.0.1:1" in result.stderr
    assert asked == []


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://x", "file:///etc"], ids=["no-scheme", "ftp", "file"])
def test_cli_address_that_is_none_is_refused(bare: Run, url: str) -> None:
    result = bare("token", "list", environ={"TOKEN_LEDGER_URL": url, "TOKEN_LEDGER_TOKEN": "x"})
    assert result.exit_code == WRONG_USE
    assert "is not the address of a service" in result.stderr


# What other servers answer


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param((502, "text/html", b"<h1>Bad gateway</h1>"), id="proxy-error"),
        pytest.param((200, "text/html", b"<h1>Welcome</h1>"), id="another-site"),
        pytest.param((200, "application/json", b"[]"), id="another-api"),
        pytest.param((302, "text/plain", b""), id="redirect"),
    ],
)
def test_cli_answer_that_is_not_the_ledgers_is_told_as_such(bare: Run, elsewhere: Any, answer: Answer) -> None:
    url = elsewhere(lambda _: answer)
    result = bare("token", "show", "tok_1", environ={"TOKEN_LEDGER_URL": url, "TOKEN_LEDGER_TOKEN": "x"})
    assert result.exit_code == REFUSED
    assert f"answered {answer[0]} without saying why as the token ledger does" in result.stderr
    assert "Traceback" not in result.output


def test_cli_escape_sequences_in_answers_reach_no_terminal(bare: Run, elsewhere: Any) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b2J\u202e\r\n[red]x"
    page = {"items": [{"client_id": "cli_1", "client_name": evil}]}
    refusal = {"detail": evil, "fix": evil}
    url = elsewhere(
        lambda path: (
            (200, "application/json", json.dumps(page).encode())
            if path.startswith("/v1/clients?")
            else (400, "application/problem+json", json.dumps(refusal).encode())
        )
    )
    environ = {"TOKEN_LEDGER_URL": url, "TOKEN_LEDGER_TOKEN": "x"}
    for arguments in (["client", "list"], ["client", "list", "-o", "json"], ["client", "show", "cli_1"]):
        output = bare(*arguments, environ=environ).output
        assert "owned" in output
        assert "[red]x" in output
        assert not set(output) & set("\x1b\x07\x9b\u202e\r")


def test_cli_list_that_never_ends_is_noticed(bare: Run, elsewhere: Any) -> None:
    page = {"items": [], "next_cursor": "again"}
    url = elsewhere(lambda _: (200, "application/json", json.dumps(page).encode()))
    result = bare("token", "list", "--all", environ={"TOKEN_LEDGER_URL": url, "TOKEN_LEDGER_TOKEN": "x"})
    assert result.exit_code == REFUSED
    assert "the same page again and again" in result.stderr


# Words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param(None, "", id="absent"),
        pytest.param(True, "yes", id="yes"),
        pytest.param(7, "7", id="number"),
        pytest.param(["a", "b"], "a b", id="list"),
        pytest.param("2026-11-22T00:48:11.123456Z", "2026-11-22 00:48:11Z", id="time"),
        pytest.param("2026-11-22T01:48:11+01:00", "2026-11-22 00:48:11Z", id="time-elsewhere"),
        pytest.param("2026-99-22T01:48:11Z", "2026-99-22T01:48:11Z", id="no-time"),
        pytest.param("a\x1bb", "a\\x1bb", id="escape"),
        pytest.param({"ip": "::1", "path": None, "by": {"a": 1}}, "ip=::1 by=(a=1)", id="object"),
    ],
)
def test_output_value_is_worded(value: object, words: str) -> None:
    assert worded(value) == words


def test_output_printable_keeps_letters_of_all_languages() -> None:
    assert printable("Zoë 太郎 🙂") == "Zoë 太郎 🙂"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3600", 3600), ("90s", 90), ("15m", 900), ("12h", 43_200), ("90d", 7_776_000)],
    ids=["plain", "seconds", "minutes", "hours", "days"],
)
def test_duration_is_read_in_any_unit(text: str, seconds: int) -> None:
    assert Duration().convert(text, None, None) == seconds


# Commands that need no service


def test_settings_command_lists_every_setting_with_its_meaning(bare: Run) -> None:
    listed = json.loads(bare("settings", "-o", "json", environ={"TOKEN_LEDGER_PORT": "9000"}).stdout)
    by_name = {item["setting"]: item for item in listed["items"]}
    assert by_name["TOKEN_LEDGER_PORT"]["value"] == "9000"
    assert by_name["TOKEN_LEDGER_PORT"]["default"] == "8080"
    assert by_name["TOKEN_LEDGER_PORT"]["flag"] == "--port"
    assert by_name["TOKEN_LEDGER_MASTER_KEY"]["file"] == "TOKEN_LEDGER_MASTER_KEY_FILE"
    assert listed["client"].keys() == {"TOKEN_LEDGER_URL", "TOKEN_LEDGER_TOKEN"}


def test_settings_command_with_wrong_settings_still_lists_them(bare: Run) -> None:
    result = bare("settings", environ={"TOKEN_LEDGER_PORT": "x", "TOKEN_LEDGER_MASTER_KEY": "canary"})
    assert result.exit_code == WRONG_USE
    assert "TOKEN_LEDGER_WORKERS" in result.stdout
    assert "TOKEN_LEDGER_PORT is 'x' and must be" in result.stderr
    assert "canary" not in result.output


def test_settings_command_shows_no_secret(bare: Run) -> None:
    key = "ab" * 32
    result = bare("settings", environ={"TOKEN_LEDGER_MASTER_KEY": key})
    assert result.exit_code == DONE
    assert key not in result.output
    assert re.search(r"TOKEN_LEDGER_MASTER_KEY +set", result.stdout)


def test_nats_config_writes_a_cluster_readable_by_its_owner_only(bare: Run, tmp_path: Path) -> None:
    result = bare("nats-config", "out", "-o", "json")
    assert result.exit_code == DONE, result.output
    answer = json.loads(result.stdout)
    assert answer["nodes"] == ["nats-1", "nats-2", "nats-3"]
    files = [tmp_path / file for file in answer["files"]]
    assert {"service.nk", "projector.nk", "admin.nk", "nats.conf"} <= {file.name for file in files}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_cli_every_command_explains_itself_and_takes_output_json(bare: Run) -> None:
    def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
        for name in group.list_commands(click.Context(group)):
            command: Any = group.get_command(click.Context(group), name)
            if isinstance(command, click.Group):
                yield from commands(command, *path, name)
            else:
                yield (*path, name), command

    found = dict(commands(main))
    assert len(found) > 25
    for path, command in found.items():
        assert "-o" in [option for parameter in command.params for option in parameter.opts], path
        assert command.help, path
        assert command.help[0].isupper(), path
        assert bare(*path, "--help").exit_code == DONE


def test_cli_as_a_process_ends_with_the_documented_exit_codes(tmp_path: Path) -> None:
    def code(*arguments: str) -> int:
        return subprocess.run(
            [*running.command(), *arguments], cwd=running.ROOT, capture_output=True, check=False
        ).returncode

    assert code("--help") == DONE
    assert code("token", "list", "--data-dir", str(tmp_path)) == WRONG_USE
    assert code("token", "list", "--limit", "x") == WRONG_USE
    (tmp_path / "bootstrap.json").write_text("{")
    assert code("token", "list", "--data-dir", str(tmp_path)) == REFUSED


# On a terminal


def on_terminal(*arguments: str, columns: int, environ: dict[str, str], typed: str = "") -> str:
    """What a person sees: the output of a command on a real pseudo-terminal."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    clean = {
        name: text for name, text in os.environ.items() if not name.startswith(("TOKEN_LEDGER_", "COLUMNS", "LINES"))
    }
    process = subprocess.Popen(
        [*running.command(), *arguments],
        cwd=running.ROOT,
        env={**clean, "TERM": "xterm", **environ},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    os.write(ours, typed.encode())
    seen = b""
    # The terminal reports an error once nobody holds its other end.
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 65_536):
            seen += piece
    os.close(ours)
    process.wait(10)
    return re.sub(r"\x1b\[[0-9;]*m", "", seen.decode()).replace("\r\n", "\n")


@pytest.fixture
def two_clients(elsewhere: Any) -> dict[str, str]:
    items = [{"client_id": f"cli_{n * 32}", "client_name": "shop", "scope": "orders:read"} for n in "01"]
    url = elsewhere(lambda _: (200, "application/json", json.dumps({"items": items}).encode()))
    return {"TOKEN_LEDGER_URL": url, "TOKEN_LEDGER_TOKEN": "x"}


def test_cli_table_on_a_wide_terminal_has_a_row_an_item(two_clients: dict[str, str]) -> None:
    seen = on_terminal("client", "list", columns=120, environ=two_clients)
    assert re.search(r"^ *client_id +client_name +scope *$", seen, re.MULTILINE)
    assert re.search(rf"^ *cli_{'0' * 32} +shop +orders:read *$", seen, re.MULTILINE)


def test_cli_table_on_a_narrow_terminal_keeps_ids_whole(two_clients: dict[str, str]) -> None:
    seen = on_terminal("client", "list", columns=40, environ=two_clients)
    assert re.findall(r"^client_id +(\S+)$", seen, re.MULTILINE) == [f"cli_{n * 32}" for n in "01"]


def test_cli_timeline_on_a_terminal_has_a_line_a_fact(elsewhere: Any) -> None:
    items = [
        {"ledger_seq": 4, "type": "token.issued", "occurred_at": "2026-11-22T10:00:00Z", "by": "tok_1"},
        {"ledger_seq": None, "type": "token.used", "occurred_at": "2026-11-22T10:01:30Z", "outcome": "valid"},
    ]
    url = elsewhere(lambda _: (200, "application/json", json.dumps({"items": items}).encode()))
    environ = {"TOKEN_LEDGER_URL": url, "TOKEN_LEDGER_TOKEN": "x"}
    assert on_terminal("token", "history", "tok_2", columns=80, environ=environ).splitlines() == [
        "4  2026-11-22 10:00:00Z  token.issued",
        "    by           tok_1",
        "use  2026-11-22 10:01:30Z  token.used  +1.5 min",
        "    outcome      valid",
    ]


def test_cli_what_cannot_be_undone_asks_a_person_and_no_program(elsewhere: Any) -> None:
    url = elsewhere(lambda _: (200, "application/json", b'{"ledger_seq": 7}'))
    environ = {"TOKEN_LEDGER_URL": url, "TOKEN_LEDGER_TOKEN": "x"}
    command = ("client", "disable", "cli_1")
    refused = on_terminal(*command, columns=80, environ=environ, typed="n\n")
    assert "This cannot be undone. Go on?" in refused
    assert "ledger_seq" not in refused
    assert "ledger_seq  7" in on_terminal(*command, columns=80, environ=environ, typed="y\n")
    assert CliRunner(env=environ).invoke(main, command).output.strip() == "ledger_seq  7"


# With the running service


def scope_named(done: Callable[..., Any]) -> str:
    name = unique("cli").replace("-", ":")
    done("scope", "create", name, "--description", "for a test")
    return name


def person(done: Callable[..., Any], scope: str) -> str:
    made = done("user", "create", unique(CANARY_USERNAME), "--scope", scope, "--display-name", unique(CANARY_NAME))
    user_id: str = made["user_id"]
    return user_id


def pat(done: Callable[..., Any], *more: str) -> dict[str, Any]:
    """A PAT of a new person with a new scope."""
    scope = scope_named(done)
    issued: dict[str, Any] = done(
        "token", "issue", "--kind", "pat", "--subject", person(done, scope), "--name", "cli", "--scope", scope, *more
    )
    return issued


def test_cli_token_lives_and_dies(run: Run, done: Callable[..., Any]) -> None:
    issued = pat(done, "--expires-in", "1d")
    token, token_id = issued["token"], issued["token_id"]
    asked = ("--scope", issued["scope"])

    assert done("token", "show", token_id)["status"] == "active"
    assert [token_id] == [item["token_id"] for item in done("token", "list", "--subject", issued["subject"])["items"]]
    valid = run("token", "validate", "-", *asked, "--ip", "192.0.2.1", "--path", "/orders", stdin=token + "\n")
    assert valid.exit_code == DONE
    assert re.search(r"^valid +yes$", valid.stdout, re.MULTILINE)

    revoked = done("token", "revoke", token_id, "--reason", "compromised", "--comment", "seen in a chat")
    assert revoked["ledger_seq"] > issued["ledger_seq"]
    assert done("token", "revoke", token_id, "--reason", "admin") == revoked

    refused = run("token", "validate", "-", "-o", "json", stdin=token)
    assert refused.exit_code == REFUSED
    assert json.loads(refused.stdout)["code"] == "revoked"
    assert refused.stderr == ""


def test_cli_history_is_a_timeline_of_events_and_uses(run: Run, done: Callable[..., Any]) -> None:
    issued = pat(done)
    token_id = issued["token_id"]
    run("token", "validate", "-", stdin=issued["token"])
    done("token", "revoke", token_id)
    events = done("token", "history", token_id)["items"]
    assert [event["type"].partition("/")[0] for event in events] == ["token.issued", "token.revoked"]

    def timeline() -> list[str]:
        return run("token", "history", token_id, "--uses").stdout.splitlines()

    lines = running.until(lambda: len(timeline()) == 4 and timeline(), what="the use to be in the history")
    assert lines[0].split() == ["ledger_seq", "occurred_at", "after", "what", "facts"]
    assert str(issued["ledger_seq"]) == lines[1].split()[0]
    assert lines[2].split()[0] == "use"
    assert "token.revoked" in lines[3]
    assert issued["token"] not in "".join(lines)


def test_cli_secrets_are_shown_once_and_said_to_be(run: Run, done: Callable[..., Any]) -> None:
    scope = scope_named(done)
    created = run("client", "create", unique("app"), "--scope", scope, "--access-token-format", "opaque")
    assert created.exit_code == DONE, created.output
    client_id, secret = (
        re.search(rf"^{name} +(\S+)$", created.stdout, re.MULTILINE)[1] for name in ("client_id", "client_secret")
    )
    assert "client_secret is shown this once and never again" in created.stderr
    rotated = run("client", "rotate-secret", client_id, "--overlap", "1h")
    assert "client_secret is shown this once and never again" in rotated.stderr
    shown = run("client", "show", client_id)
    assert secret not in shown.stdout
    assert "client_secret " not in shown.stdout
    issued = run("token", "issue", "--kind", "pat", "--subject", person(done, scope), "--name", "x", "--scope", scope)
    assert "token is shown this once and never again" in issued.stderr


def test_cli_client_is_made_as_asked_listed_and_disabled(run: Run, done: Callable[..., Any]) -> None:
    scope, name = scope_named(done), unique("app")
    options = ["--scope", scope, "--grant-type", "client_credentials", "--grant-type", "refresh_token"]
    options += ["--access-token-ttl", "10m", "--audience", "https://api.example", "--may-introspect"]
    made = done("client", "create", name, *options)
    shown = done("client", "show", made["client_id"])
    assert shown["client_name"] == name
    assert shown["grant_types"] == ["client_credentials", "refresh_token"]
    assert shown["access_token_ttl_seconds"] == 600
    assert shown["audience"] == ["https://api.example"]
    assert shown["may_introspect"] is True
    listed = run("client", "list", "--all")
    assert made["client_id"] in listed.stdout
    assert "ledger_seq" in done("client", "disable", made["client_id"])
    assert done("client", "show", made["client_id"])["status"] == "disabled"


def test_cli_client_that_people_sign_in_to_is_made_as_asked(done: Callable[..., Any]) -> None:
    options = ["--grant-type", "authorization_code", "--grant-type", "refresh_token", "--scope", "openid"]
    options += ["--redirect-uri", "https://shop.example/back", "--post-logout-redirect-uri", "https://shop.example/"]
    options += ["--response-type", "code", "--response-type", "code id_token", "--no-refresh-token-rotation"]
    options += ["--require-pushed-authorization-requests", "--id-token-signed-response-alg", "EdDSA"]
    made = done("client", "create", unique("app"), *options)
    assert made["response_types"] == ["code", "code id_token"]
    assert made["post_logout_redirect_uris"] == ["https://shop.example/"]
    assert (made["require_pushed_authorization_requests"], made["refresh_token_rotation"]) == (True, False)
    assert made["id_token_signed_response_alg"] == "EdDSA"


def test_cli_user_is_made_with_a_password_from_stdin_and_disabled(run: Run, done: Callable[..., Any]) -> None:
    username, password = unique(CANARY_USERNAME), unique(CANARY_PASSWORD)
    made = done("user", "create", username, "--kind", "person", "--password", "-", stdin=password)
    assert done("user", "show", made["user_id"]) == done("user", "show", username)
    assert username in run("user", "list", "--all").stdout
    assert "ledger_seq" in done("user", "disable", username, "--erase")
    shown = run("user", "show", made["user_id"])
    assert username not in shown.output
    again = run("user", "show", username)
    assert (again.exit_code, "there is no user" in again.stderr) == (REFUSED, True)


def test_cli_user_is_shown_where_they_are_signed_in_and_signed_out(done: Callable[..., Any]) -> None:
    made = done("user", "create", unique(CANARY_USERNAME), "--password", "-", stdin=unique(CANARY_PASSWORD))
    assert done("user", "sessions", made["username"])["items"] == []
    assert done("user", "consents", made["user_id"])["items"] == []
    assert done("user", "sign-out", made["user_id"])["ended"] == 0


def test_cli_token_rotation_gives_a_successor_and_an_overlap(run: Run, done: Callable[..., Any]) -> None:
    issued = pat(done)
    successor = done("token", "rotate", issued["token_id"], "--overlap", "1h")
    assert successor["token_id"] != issued["token_id"]
    for token in (issued["token"], successor["token"]):
        assert run("token", "validate", "-", stdin=token).exit_code == DONE


def test_cli_revoking_by_the_token_itself_and_by_breadth(run: Run, done: Callable[..., Any]) -> None:
    issued = pat(done)
    dry = done("token", "revoke", "--subject", issued["subject"], "--dry-run")
    assert dry["affected"] == {"grants": 1, "tokens": 1}
    assert run("token", "validate", "-", stdin=issued["token"]).exit_code == DONE
    done("token", "revoke", "--token", "-", stdin=issued["token"])
    assert run("token", "validate", "-", stdin=issued["token"]).exit_code == REFUSED


def test_cli_list_pages_to_its_limit_and_says_how_to_go_on(run: Run, done: Callable[..., Any]) -> None:
    names = sorted(scope_named(done) for _ in range(3))
    first = run("scope", "list", "--limit", "2")
    assert len(first.stdout.splitlines()) == 3
    cursor = re.search(r"--cursor (\S+)", first.stderr)
    assert cursor is not None
    page = done("scope", "list", "--limit", "2")
    assert page["next_cursor"] == cursor[1]
    rest = done("scope", "list", "--all", "--cursor", cursor[1])
    assert "next_cursor" not in rest
    everything = [item["name"] for item in done("scope", "list", "--all")["items"]]
    assert everything == [item["name"] for item in page["items"] + rest["items"]]
    assert set(names) <= set(everything)


def test_cli_repeated_create_with_the_same_key_creates_once(run: Run, done: Callable[..., Any]) -> None:
    arguments = ("client", "create", unique("app"), "--idempotency-key", unique("key"))
    assert done(*arguments) == done(*arguments)
    other = run("client", "create", unique("app"), *arguments[3:])
    assert other.exit_code == REFUSED


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["token", "show", "tok_" + "0" * 32], id="token"),
        pytest.param(["client", "show", "cli_" + "0" * 32], id="client"),
        pytest.param(["user", "show", "usr_" + "0" * 32], id="user"),
        pytest.param(["token", "revoke", "tok_" + "0" * 32], id="revoke"),
    ],
)
def test_cli_what_is_not_there_is_told_with_exit_code_1(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == REFUSED
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    told = json.loads(run(*arguments, "-o", "json").stderr)
    assert told["code"] == "not_found"
    assert told["status"] == 404


def test_cli_refusal_is_told_in_the_services_words_with_what_to_do(bare: Run, service: Service) -> None:
    token = service.bearer("ledger:validate")
    result = bare("client", "list", environ={"TOKEN_LEDGER_URL": service.url, "TOKEN_LEDGER_TOKEN": token})
    assert result.exit_code == REFUSED
    assert "ledger:clients" in result.stderr
    assert "To do: " in result.stderr
    assert token not in result.output


def test_cli_data_dir_flag_wins_over_the_environment(bare: Run, service: Service) -> None:
    environ = {"TOKEN_LEDGER_URL": "http://127.0.0.1:1", "TOKEN_LEDGER_TOKEN": "tl_sat_x"}
    assert bare("key", "list", "--data-dir", str(service.data_dir), environ=environ).exit_code == DONE


def test_cli_keys_are_listed_with_what_becomes_of_them(done: Callable[..., Any]) -> None:
    keys = done("key", "list")["items"]
    assert "active" in [key["state"] for key in keys]
    assert {"kid", "alg", "introduced_at"} <= keys[0].keys()


def test_cli_audit_events_are_in_order_and_filtered(run: Run, done: Callable[..., Any]) -> None:
    issued = pat(done)
    done("token", "revoke", issued["token_id"])
    found = done("audit", "events", "--token-id", issued["token_id"])["items"]
    assert [event["type"].partition("/")[0] for event in found] == ["token.issued", "token.revoked"]
    after = done("audit", "events", "--after-seq", str(issued["ledger_seq"]), "--token-id", issued["token_id"])["items"]
    assert after == found[1:]
    timeline = run("audit", "events", "--after-seq", str(issued["ledger_seq"] - 1), "--limit", "1").stdout.splitlines()
    assert timeline[1].split()[0] == str(issued["ledger_seq"])


def test_cli_usage_is_a_table_with_bars_and_json_for_programs(run: Run, done: Callable[..., Any]) -> None:
    issued = pat(done)
    for scope in ("", "", "no:such"):
        run("token", "validate", issued["token"], *(["--scope", scope] if scope else []))
    asked = ("audit", "usage", "--token-id", issued["token_id"])
    answer = done(*asked, "--group-by", "outcome", "--interval", "day", "--explain")
    assert {one["value"]: one["uses"] for one in answer["groups"]} == {"valid": 2, "insufficient_scope": 1}
    assert (answer["totals"]["uses"], answer["totals"]["refused"]) == (3, 1)
    assert done(*asked, "--distinct")["totals"]["tokens"] == 1
    assert answer["sql"]["parameters"]["token_id"] == issued["token_id"].removeprefix("tok_")
    lines = run(*asked, "--group-by", "outcome").stdout.splitlines()
    assert [line.split()[:3] for line in lines[:3]] == [
        ["value", "uses", "refused"],
        ["valid", "2", "#" * 24],
        ["insufficient_scope", "1", "#" * 12],
    ]
    assert lines[3].split()[:2] == ["(all)", "3"]
    assert re.search(r", as of ledger_seq \d+, usage_seq \d+$", lines[-1])
    assert "GROUPING SETS" in run(*asked, "--explain").stdout


def test_cli_usage_offers_what_the_service_takes(run: Run) -> None:
    assert list(typing.get_args(asking.GroupBy)) == audit.GROUPS
    assert list(typing.get_args(asking.Interval)) == audit.INTERVALS
    assert list(typing.get_args(asking_tokens.Sort)) == audit.SORTS
    assert run("audit", "usage", "--group-by", "password").exit_code == WRONG_USE
    refused = run("audit", "usage", "--from", "yesterday")
    assert refused.exit_code == REFUSED
    assert "from must be a time" in refused.stderr


def test_cli_audit_tokens_lists_how_much_they_are_used(run: Run, done: Callable[..., Any]) -> None:
    issued = pat(done)
    run("token", "validate", issued["token"])
    asked = ("audit", "tokens", "--subject", issued["subject"])
    [item] = done(*asked)["items"]
    assert (item["token_id"], item["uses"], item["status"]) == (issued["token_id"], 1, "active")
    lines = run(*asked, "--explain").stdout.splitlines()
    assert lines[1].split()[:3] == [issued["token_id"], "pat", "active"]
    assert re.fullmatch(r"1 listed, as of ledger_seq \d+, usage_seq \d+", lines[3])
    assert lines[5].startswith("WITH ")
    for command in ("unused", "expiring"):
        assert "as of ledger_seq" in run("audit", command, "--days", "1").stdout
    assert issued["token_id"] in run("audit", "expiring", "--days", "366", "--all").stdout


def test_cli_audit_scopes_proposes_a_narrower_one(run: Run, done: Callable[..., Any]) -> None:
    used, unused = sorted((scope_named(done), scope_named(done)))
    subject = person(done, f"{used} {unused}")
    issued = done(
        *("token", "issue", "--kind", "pat", "--subject", subject),
        *("--name", unique(CANARY_NAME), "--scope", f"{used} {unused}"),
    )
    run("token", "validate", issued["token"], "--scope", used)
    asked = ("audit", "scopes", "--token-id", issued["token_id"])
    [item] = done(*asked)["items"]
    assert (item["proposed_scope"], [one["name"] for one in item["unused"]]) == (used, [unused])
    head, row = run(*asked).stdout.splitlines()[:2]
    assert head.split()[-3:] == ["scope", "unused", "proposed_scope"]
    assert row.split()[-4:] == [used, unused, unused, used]
    wrong = run("audit", "scopes", "--by", "client", "--kind", "pat")
    assert (wrong.exit_code, "add by=token" in wrong.stderr) == (REFUSED, True)


def test_cli_blast_radius_of_a_token_from_stdin_sends_its_hash_alone(run: Run, done: Callable[..., Any]) -> None:
    issued = pat(done)
    for address in ("192.0.2.1", "192.0.2.1", "198.51.100.7"):
        run("token", "validate", issued["token"], "--ip", address, "--user-agent", "curl/8")
    report = done("audit", "blast-radius", "--token", "-", stdin=issued["token"] + "\n")
    assert report["token"]["token_id"] == issued["token_id"]
    assert (report["usage"]["uses"], report["would_break"]["uses"], len(report["items"])) == (3, 3, 3)
    shown = run("audit", "blast-radius", issued["token_id"], "--limit", "2", "--explain")
    for words in ("Networks: 2, 2 first seen since", "would end if it were revoked now", "as of ledger_seq"):
        assert words in shown.stdout
    assert "-- dependents" in shown.stdout
    cursor = shown.stderr.split()[-1]
    rest = run("audit", "blast-radius", issued["token_id"], "--cursor", cursor).stdout
    assert "Uses, the newest in the log first: 1" in rest
    assert "Networks" not in rest
    assert len(done("audit", "blast-radius", issued["token_id"], "--all")["items"]) == 3


def test_cli_blast_radius_is_of_one_thing(run: Run) -> None:
    assert run("audit", "blast-radius").exit_code == WRONG_USE
    assert run("audit", "blast-radius", "tok_x", "--client-id", "cli_x").exit_code == WRONG_USE
    assert run("audit", "blast-radius", "tl_pat_x").exit_code == WRONG_USE
    unknown = run("audit", "blast-radius", "--token", "-", stdin="tl_pat_unknown\n")
    assert unknown.exit_code == REFUSED


def test_doctor_finds_nothing_wrong_with_a_running_service(run: Run, service: Service) -> None:
    service.forget_followers()
    result = run("doctor", "-o", "json")
    answer = json.loads(result.stdout)
    assert [check for check in answer["checks"] if check["state"] == "problem"] == []
    assert result.exit_code == DONE
    names = {check["name"] for check in answer["checks"]}
    assert {"API", "readiness", "administrator's token", "signing keys", "nats-server", "streams"} <= names
    assert {"LEDGER", "USAGE", "current-token view", "disk", "master key", "secret files"} <= names
    assert run("doctor").stdout.startswith(("ok ", "warning "))


def test_cli_key_rotation_admin_token_and_rebuild_on_a_service_of_their_own(own_service: Any, bare: Run) -> None:
    service = own_service(workers=1)
    environ = {"TOKEN_LEDGER_DATA_DIR": str(service.data_dir)}

    def done(*arguments: str) -> dict[str, Any]:
        result = bare(*arguments, "-o", "json", environ=environ)
        assert result.exit_code == DONE, result.output
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    before = {key["kid"] for key in done("key", "list")["items"] if key["state"] == "active"}
    rotated = done("key", "rotate")
    assert {rotated["retired_kid"]} <= before
    states = {key["kid"]: key["state"] for key in done("key", "list")["items"]}
    assert (states[rotated["kid"]], states[rotated["retired_kid"]]) == ("active", "retired")

    again = done("key", "rotate", "--now", "--revoke")
    assert again["revoked_kids"] == [rotated["retired_kid"], rotated["kid"]]
    states = {key["kid"]: key["state"] for key in done("key", "list")["items"]}
    assert [states[kid] for kid in (*again["revoked_kids"], again["kid"])] == ["revoked", "revoked", "active"]
    assert done("key", "rotate", "--purpose", "id", "--alg", "ES256")["kid"].startswith("id-es-1-")
    purposes = {key["kid"].startswith("id-"): key["purpose"] for key in done("key", "list")["items"]}
    assert purposes == {True: "id", False: "access"}
    assert bare("key", "rotate", "--purpose", "other", environ=environ).exit_code == WRONG_USE

    new = done("admin-token")
    token = new.get("token") or new["admin_token"]
    assert token != service.admin_token
    assert (
        bare("client", "list", environ={"TOKEN_LEDGER_URL": service.url, "TOKEN_LEDGER_TOKEN": token}).exit_code == DONE
    )

    assert done("rebuild", "current")["replayed"] >= rotated["ledger_seq"]
    assert bare("key", "list", environ=environ).exit_code == DONE
    refused = bare("rebuild", "analytics", environ=environ)
    assert refused.exit_code == REFUSED
    assert "is in use" in refused.stderr
    assert "To do: stop the service" in refused.stderr


def test_cli_second_projector_on_a_directory_is_refused(service: Service) -> None:
    command = [*running.command(), "project", "current", "--data-dir", str(service.data_dir)]
    ended = subprocess.run(command, cwd=running.ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == REFUSED
    assert "another projector writes" in ended.stderr
    assert "To do: stop the service" in ended.stderr
    assert "Traceback" not in ended.stderr
