"""A token at a time, and why it was good or not. Requirement: issue "Point in time and explain"."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec import UNSET

from service import past
from service.api.tokens import find_past
from service.cli import main
from service.errors import Unavailable
from service.runtime import Runtime
from service.tokens import new_id, now
from tests.api.conftest import LongExpired
from tests.running import Service, problem, until

MICROSECOND = timedelta(microseconds=1)


def explained(service: Service, token_id: str, **query: Any) -> dict[str, Any]:
    return service.done("GET", f"/v1/tokens/{token_id}/explain", params=query)


def at(service: Service, token_id: str, moment: str) -> dict[str, Any]:
    return service.done("GET", f"/v1/tokens/{token_id}", params={"at": moment})


def times(service: Service, token_id: str) -> dict[str, str]:
    """When the events of a token's grant were recorded, by type."""
    return {one["type"]: one["recorded_at"] for one in service.history(token_id)}


def before(moment: str) -> str:
    return (datetime.fromisoformat(moment) - MICROSECOND).isoformat()


def because(answer: dict[str, Any]) -> list[str]:
    return [one["type"] for one in answer["because"]]


def disabled_at(service: Service, what: str, identifier: str) -> str:
    """Disables it and answers when that was recorded."""
    seq = service.done("DELETE", f"/v1/{what}s/{identifier}")["ledger_seq"]
    found = service.items("/v1/audit/events", type=f"{what}.disabled", after_seq=seq - 1)
    return str(next(iter(found))["recorded_at"])


def test_token_was_valid_before_its_revocation_and_revoked_from_then_on(service: Service) -> None:
    made = service.pat()
    token_id = made["token_id"]
    revoked = service.done("POST", f"/v1/tokens/{token_id}/revoke", json={"reason": "abuse"})
    when = times(service, token_id)["token.revoked"]
    then, since = explained(service, token_id, at=before(when)), explained(service, token_id, at=when)
    assert (then["valid"], then["code"], because(then)) == (True, "valid", ["token.issued"])
    assert made["ledger_seq"] <= then["ledger_seq"] < revoked["ledger_seq"]
    assert (since["valid"], since["code"]) == (False, "revoked")
    assert because(since) == ["token.issued", "token.revoked"]
    assert since["because"][1]["ledger_seq"] == since["ledger_seq"] == revoked["ledger_seq"]
    assert datetime.fromisoformat(since["at"]) == datetime.fromisoformat(when)
    assert at(service, token_id, before(when))["status"] == "active"
    seen = at(service, token_id, when)
    assert (seen["status"], seen["reason"], seen["ledger_seq"]) == ("revoked", "abuse", revoked["ledger_seq"])
    assert seen["issued_seq"] == made["ledger_seq"]


def test_explain_without_a_time_is_about_now(service: Service) -> None:
    token_id = service.pat()["token_id"]
    assert explained(service, token_id)["valid"]
    seq = service.done("POST", f"/v1/tokens/{token_id}/revoke", json={"reason": "admin"})["ledger_seq"]
    answer = explained(service, token_id)
    assert (answer["code"], answer["ledger_seq"] >= seq) == ("revoked", True)


def test_token_of_client_credentials_is_found_on_its_clients_subject(service: Service) -> None:
    app = service.app()
    token_id = service.validate(service.grant(app)["access_token"])["token_id"]
    service.grant(app)
    service.done("POST", f"/v1/tokens/{token_id}/revoke", json={"reason": "admin"})
    when = times(service, token_id)
    assert explained(service, token_id, at=when["token.issued"])["code"] == "valid"
    assert explained(service, token_id, at=before(when["token.revoked"]))["code"] == "valid"
    assert explained(service, token_id, at=when["token.revoked"])["code"] == "revoked"


def test_token_of_a_disabled_client_was_valid_until_then(service: Service) -> None:
    app = service.app()
    token_id = service.validate(service.grant(app)["access_token"])["token_id"]
    when = disabled_at(service, "client", app.client_id)
    assert explained(service, token_id, at=before(when))["code"] == "valid"
    answer = explained(service, token_id, at=when)
    assert (answer["code"], because(answer)) == ("client_disabled", ["token.issued", "client.disabled"])


def test_token_of_a_disabled_user_was_valid_until_then(service: Service) -> None:
    scope = service.scope()
    user_id = service.user(scope=scope)["user_id"]
    token_id = service.issue(user_id, scope)["token_id"]
    when = disabled_at(service, "user", user_id)
    assert explained(service, token_id, at=before(when))["code"] == "valid"
    answer = explained(service, token_id, at=when)
    assert (answer["code"], because(answer)) == ("subject_disabled", ["token.issued", "user.disabled"])


def test_rotated_token_was_valid_until_its_successor_came(service: Service) -> None:
    token_id = service.pat()["token_id"]
    successor = service.done("POST", f"/v1/tokens/{token_id}/rotate", json={})["token_id"]
    when = times(service, token_id)["token.superseded"]
    assert at(service, token_id, before(when))["status"] == "active"
    answer = explained(service, token_id)
    assert (answer["code"], because(answer)) == ("expired", ["token.issued", "token.superseded"])
    assert successor in answer["because"][1]["sentence"]


def test_narrowed_token_lacks_what_its_grant_has(service: Service) -> None:
    app = service.app(scope="a b", grant_types=["client_credentials", "refresh_token"])
    refreshed = service.refresh(app, service.grant(app)["refresh_token"], scope="a").json()
    token_id = service.validate(refreshed["access_token"])["token_id"]
    assert explained(service, token_id, scope="a", audience=service.issuer)["code"] == "valid"
    answer = explained(service, token_id, scope="a b", audience=service.issuer)
    assert (answer["code"], because(answer)) == ("insufficient_scope", ["token.refreshed"])
    assert answer["checks"][-1] == {
        "name": "insufficient_scope",
        "passed": False,
        "detail": "it has a and lacks b",
    }
    assert explained(service, token_id, audience="https://other.example")["code"] == "wrong_audience"


def test_token_that_is_bound_to_addresses_is_judged_by_the_one_that_is_given(service: Service) -> None:
    token_id = service.pat(allowed_ips=["192.0.2.0/24"])["token_id"]
    assert explained(service, token_id)["code"] == "ip_not_allowed"
    assert explained(service, token_id, ip="192.0.2.7")["code"] == "valid"


@pytest.mark.parametrize("path", ["", "/explain"])
def test_time_that_cannot_be_answered_is_refused(service: Service, path: str) -> None:
    token_id = service.pat()["token_id"]
    issued_at = times(service, token_id)["token.issued"]
    target = f"/v1/tokens/{token_id}{path}"
    assert service.call("GET", target, params={"at": issued_at}).status_code == 200
    for early in (before(issued_at), "1970-01-01T00:00:00Z", "0001-01-01T00:00:00Z"):
        problem(service.call("GET", target, params={"at": early}), 404, "not_found")
    future = (now() + timedelta(minutes=1)).isoformat()
    for wrong in (future, "9999-12-31T23:59:59Z", "yesterday", "2026-01-31", "2026-01-31T12:00:00", ""):
        problem(service.call("GET", target, params={"at": wrong}), 400, "invalid_request")
    for unknown in (new_id("tok"), "tok_1"):
        answer = service.call("GET", f"/v1/tokens/{unknown}{path}", params={"at": issued_at})
        problem(answer, 404, "not_found")


def test_explain_needs_the_right_of_auditors(service: Service) -> None:
    token_id = service.pat()["token_id"]
    path = f"/v1/tokens/{token_id}"
    auditor, issuer = service.bearer("ledger:audit"), service.bearer("ledger:issue")
    for token, status in ((auditor, 200), (issuer, 403)):
        assert service.call("GET", f"{path}/explain", token=token).status_code == status
        assert service.call("GET", path, token=token, params={"at": now().isoformat()}).status_code == 200


@pytest.mark.parametrize("query", [{"scope": 'a"'}, {"audience": "a b"}, {"ip": "192.0.2.1:80"}, {"kind": "pat"}])
def test_question_that_is_none_is_refused(service: Service, query: dict[str, str]) -> None:
    path = f"/v1/tokens/{service.pat()['token_id']}/explain"
    problem(service.call("GET", path, params=query), 400)


def test_token_that_has_left_the_view_is_explained_from_the_log(service: Service, long_expired: LongExpired) -> None:
    path = f"/v1/tokens/{long_expired.token_id}/explain"
    seen = until(lambda: answer if (answer := service.call("GET", path)).status_code == 200 else None).json()
    assert (seen["code"], because(seen), seen["because"][0]["ledger_seq"]) == (
        "expired",
        ["token.issued"],
        long_expired.seq,
    )


async def test_token_with_more_events_than_are_read_is_not_answered(
    service: Service, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_id = service.pat()["token_id"]
    service.done("POST", f"/v1/tokens/{token_id}/revoke", json={"reason": "admin"})
    when = times(service, token_id)
    monkeypatch.setattr(past, "_EVENTS_MAX", 1)
    with pytest.raises(Unavailable):
        await find_past(runtime, token_id, UNSET)
    assert (await find_past(runtime, token_id, when["token.issued"])).hit.token.ended is None


# The command line


def test_command_explains_in_a_table_and_a_sentence(service: Service) -> None:
    token_id = service.pat()["token_id"]
    service.done("POST", f"/v1/tokens/{token_id}/revoke", json={"reason": "abuse"})
    when = times(service, token_id)["token.revoked"]
    runner = CliRunner(env={"TOKEN_LEDGER_DATA_DIR": str(service.data_dir)})
    then = runner.invoke(main, ["token", "explain", token_id, "--at", before(when)])
    assert then.exit_code == 0, then.output
    assert then.stdout.splitlines()[-1].endswith("the token was valid: every check passed.")
    since = runner.invoke(main, ["token", "explain", token_id, "--at", when]).stdout.splitlines()
    assert since[0].split() == ["name", "passed", "detail"]
    assert since[4].startswith("revoked")
    assert "the token was not valid (revoked): the token was revoked by" in since[-1]
    shown = runner.invoke(main, ["token", "show", token_id, "--at", before(when), "-o", "json"])
    assert '"status": "active"' in shown.stdout
    arguments = ["token", "explain", token_id, "--scope", "none", "--audience", "https://a.example", "-o", "json"]
    asked = {"scope": "none", "audience": "https://a.example"}
    answer, expected = runner.invoke(main, arguments), explained(service, token_id, **asked)
    assert [f'"{name}"' in answer.stdout for name in expected] == [True] * len(expected)
    assert runner.invoke(main, ["token", "explain", new_id("tok")]).exit_code == 1
