"""`token-ledger user password`, against the running service. Requirement: issue 5, what was missing of "sessions"."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from service.cli import main
from tests import running
from tests.e2e.test_sign_in import Browser
from tests.running import CANARY_PASSWORD, Service, unique

DONE, REFUSED, WRONG_USE = 0, 1, 2


def run(service: Service, *arguments: str, stdin: str = "", token: str = "") -> Result:
    environ = {"TOKEN_LEDGER_URL": service.url, "TOKEN_LEDGER_TOKEN": token or service.admin_token}
    return CliRunner(env=environ).invoke(main, ["user", "password", *arguments], input=stdin)


def signs_in(service: Service, person: dict[str, Any], password: str) -> bool:
    return Browser(service).sign_in(person | {"password": password}).status_code == 303


def test_cli_password_from_stdin_replaces_the_old_one_and_ends_what_it_gave(service: Service) -> None:
    scope, old, new = service.scope(), unique(CANARY_PASSWORD), unique(CANARY_PASSWORD)
    person = service.user(scope=scope, password=old)
    token = service.issue(person["user_id"], scope)["token"]
    browser = Browser(service)
    browser.sign_in(person)
    result = run(service, person["user_id"], "-o", "json", stdin=f"{new}\n")
    assert (result.exit_code, result.stderr) == (DONE, "")
    assert json.loads(result.stdout)["user_id"] == person["user_id"]
    assert new not in result.output
    assert not browser.is_signed_in()
    assert service.validate(token)["code"] == "revoked"
    assert [signs_in(service, person, password) for password in (old, new)] == [False, True]


def test_cli_password_of_a_person_who_had_none_lets_them_sign_in(service: Service) -> None:
    person, new = service.user(), unique(CANARY_PASSWORD)
    assert run(service, person["user_id"], stdin=new).exit_code == DONE
    assert signs_in(service, person, new)


@pytest.mark.parametrize(
    ("stdin", "exit_code", "says"),
    [
        pytest.param("", WRONG_USE, "New password was to come on stdin, which is empty", id="empty"),
        pytest.param("\n", WRONG_USE, "New password was to come on stdin, which is empty", id="empty-line"),
        pytest.param("cnrypas", REFUSED, "password", id="too-short"),
    ],
)
def test_cli_password_that_is_none_is_refused_and_changes_nothing(
    service: Service, stdin: str, exit_code: int, says: str
) -> None:
    person = service.user(password=unique(CANARY_PASSWORD))
    result = run(service, person["user_id"], stdin=stdin)
    assert (result.exit_code, says in result.stderr) == (exit_code, True), result.output
    assert signs_in(service, person, person["password"])


def test_cli_password_as_an_argument_is_wrong_use_and_changes_nothing(service: Service) -> None:
    person, new = service.user(password=unique(CANARY_PASSWORD)), unique(CANARY_PASSWORD)
    assert run(service, person["user_id"], new, stdin=new).exit_code == WRONG_USE
    assert run(service, person["user_id"], "--password", new, stdin=new).exit_code == WRONG_USE
    assert signs_in(service, person, person["password"])


@pytest.mark.parametrize("kind", ["service user", "stronger person", "nobody"])
def test_cli_password_that_the_caller_cannot_give_is_refused_with_what_to_do(service: Service, kind: str) -> None:
    users = service.bearer("ledger:users")
    password = unique(CANARY_PASSWORD)
    user_id, detail = {
        "service user": lambda: (service.user(kind="service")["user_id"], "a service user has no password"),
        "stronger person": lambda: (service.user(scope="ledger:admin", password=password)["user_id"], "ledger:admin"),
        "nobody": lambda: (f"usr_{'0' * 32}", "there is no such user"),
    }[kind]()
    result = run(service, user_id, stdin=unique(CANARY_PASSWORD), token=users)
    assert result.exit_code == REFUSED
    assert detail in result.stderr


@contextlib.contextmanager
def at_a_terminal(service: Service, user_id: str) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    """The command at a terminal of its own, and what types there once it has been asked: `typing(prompt, text)`.

    Without `text` it answers all that is said until the command ends.
    """
    ours, theirs = os.openpty()
    environ = {"TERM": "xterm", "TOKEN_LEDGER_URL": service.url, "TOKEN_LEDGER_TOKEN": service.admin_token}
    process = subprocess.Popen(
        [*running.command(), "user", "password", user_id],
        cwd=running.ROOT,
        env={**os.environ, **environ},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,  # no terminal but the one it is given
    )
    os.close(theirs)

    def typing(prompt: str, text: str = "") -> str:
        seen = b""
        with contextlib.suppress(OSError):  # nobody holds the other end any more
            while (not prompt or prompt.encode() not in seen) and (piece := os.read(ours, 65_536)):
                seen += piece
        if text:
            os.write(ours, f"{text}\n".encode())
        return seen.decode()

    try:
        yield process, typing
    finally:
        os.close(ours)
        process.kill()
        process.wait()


def test_cli_password_is_asked_for_twice_at_a_terminal_and_never_shown(service: Service) -> None:
    person, new = service.user(), unique(CANARY_PASSWORD)
    with at_a_terminal(service, person["user_id"]) as (process, typing):
        seen = typing("New password: ", new)
        seen += typing("Repeat for confirmation: ", f"{new}x")
        seen += typing("New password: ", new)
        seen += typing("Repeat for confirmation: ", new)
        seen += typing("")
        assert process.wait(60) == DONE
    assert "do not match" in seen
    assert new not in seen
    assert signs_in(service, person, new)
