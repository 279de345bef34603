"""The command line, against the running service. Requirement: CONTRACT "Commands"; issue "The CLI"."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from service.cli import main
from service.cli.options import Duration
from service.cli.output import printable, worded
from tests import running
from tests.running import Service

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
        pytest.param(
            ["token", "revoke", "--subject", "usr_1", "--comment", "x"],
            "--comment goes with TOKEN_ID",
            id="comment-broad",
        ),
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
        pytest.param(["project", "revocations"], "'current', 'analytics'", id="projection-of-another-issue"),
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
    url = elsewhere(lambda path: (asked.append(path), (200, "application/json", b'{"items": []}'))[1])  # type: ignore[func-returns-value]
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
        pytest.param({"ip": "::1", "path": None}, "ip=::1 path=", id="object"),
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
    def commands(group: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
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
    assert not {("revocations", "tail"), ("audit", "sql"), ("audit", "usage")} & found.keys()


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
