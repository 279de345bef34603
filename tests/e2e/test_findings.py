"""From a use to a finding, to the revocation that follows, to what auditors say of it. Issue "Auditors", item 4."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from click.testing import CliRunner

from service.cli import main
from tests.running import Service, StartService, problem, until

FINDINGS, RULES, BACKTESTS = "/v1/audit/findings", "/v1/audit/rules", "/v1/audit/backtests"
CHANGES = "scope_probing.mode=revoke,refresh_reuse.mode=revoke,scanning.requests=20"


@pytest.fixture(scope="module")
def guarded(service_with: StartService) -> Service:
    return service_with(abuse_rules=CHANGES)


def probe(service: Service, token: str, scopes: int = 6) -> None:
    for number in range(scopes):
        assert service.validate(token, scope=f"admin:{number}")["code"] == "insufficient_scope"


def found(service: Service, **query: Any) -> dict[str, Any]:
    """The finding, once there is one."""

    def probe() -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = service.done("GET", FINDINGS, params=query)["items"]
        return items

    [item] = until(probe, seconds=60, what=f"a finding with {query}")
    return item


def test_probing_is_found_and_its_token_revoked(guarded: Service) -> None:
    made = guarded.pat()
    probe(guarded, made["token"])
    item = found(guarded, token_id=made["token_id"])
    until(lambda: guarded.validate(made["token"])["code"] == "revoked", seconds=60, what="the token is revoked")
    assert (item["rule"], item["mode"], item["status"]) == ("scope_probing", "revoke", "open")
    assert (item["grant_id"], item["subject"]) == (made["grant_id"], made["subject"])
    assert item["counts"] == {"refusals": 4.0, "scopes": 4.0}
    assert not item["self_reported"]
    history = guarded.done("GET", f"/v1/tokens/{made['token_id']}/history")["items"]
    [revoked] = [one for one in history if one["type"] == "token.revoked"]
    assert (revoked["reason"], revoked["by"], revoked["request_id"]) == ("abuse", "system", item["finding_id"])
    shown = guarded.done("GET", f"{FINDINGS}/{item['finding_id']}")
    assert shown["revoked_seq"] == revoked["ledger_seq"]
    assert len(shown["evidence"]) == 4
    assert all(one["kept"] and one["outcome"] == "insufficient_scope" for one in shown["evidence"])
    assert {one["scope"] for one in shown["evidence"]} == {f"admin:{number}" for number in range(4)}
    assert shown["sql"]["statement"].startswith("WITH counted AS")
    parameters = {"scopes": 4.0, "foreign_scopes": 1.0, "long_seconds": 7200.0, "learning_hours": 24.0}
    assert shown["sql"]["parameters"] == parameters


def test_reuse_of_a_refresh_token_is_found_and_its_grant_has_ended(guarded: Service) -> None:
    app = guarded.app(grant_types=["client_credentials", "refresh_token"])
    first = guarded.grant(app)
    second = guarded.refresh(app, first["refresh_token"]).json()
    guarded.refresh(app, second["refresh_token"])
    assert guarded.refresh(app, first["refresh_token"]).status_code == 400
    item = found(guarded, client_id=app.client_id)
    assert (item["rule"], item["subject"]) == ("refresh_reuse", app.client_id)
    shown = guarded.done("GET", f"{FINDINGS}/{item['finding_id']}")
    [evidence] = shown["evidence"]
    assert (evidence["source"], evidence["type"]) == ("event", "refresh.replayed/1")


def test_finding_of_an_address_names_none(guarded: Service) -> None:
    for _ in range(30):
        guarded.validate("garbage", context={"ip": "203.0.113.99"})
    item = found(guarded, rule="scanning")
    assert {"token_id", "client_id", "subject", "caller"}.isdisjoint(item)
    # The evidence does, for as long as counts are kept.
    shown = guarded.done("GET", f"{FINDINGS}/{item['finding_id']}")
    assert {one["ip"] for one in shown["evidence"]} == {"203.0.113.99"}
    [event] = guarded.done("GET", "/v1/audit/events", params={"type": "abuse.detected", "from": item["recorded_at"]})[
        "items"
    ][:1]
    assert "203.0.113.99" not in str(event)


def test_finding_is_acknowledged_and_dismissed_with_a_reason(guarded: Service) -> None:
    made = guarded.pat()
    probe(guarded, made["token"])
    finding_id = found(guarded, token_id=made["token_id"])["finding_id"]
    for words, status in (("acknowledge", "acknowledged"), ("dismiss", "dismissed")):
        path = f"{FINDINGS}/{finding_id}/{words}"
        done = guarded.done("POST", path, json={"reason": f"we {words} it"})
        assert guarded.done("POST", path, json={"reason": "again"}) == done
        assert found(guarded, token_id=made["token_id"], status=status)["finding_id"] == finding_id
    shown = guarded.done("GET", f"{FINDINGS}/{finding_id}")
    assert [(one["status"], one["reason"]) for one in shown["judged"]] == [
        ("acknowledged", "we acknowledge it"),
        ("dismissed", "we dismiss it"),
    ]
    events = guarded.done("GET", "/v1/audit/events", params={"type": "finding.dismissed"})["items"]
    assert "we dismiss it" not in str(events)


@pytest.mark.parametrize("path", ["", "/acknowledge", "/dismiss"])
@pytest.mark.parametrize("name", ["fnd_" + "0" * 32, "nothing"])
def test_finding_that_is_not_there_is_404(guarded: Service, name: str, path: str) -> None:
    method = "POST" if path else "GET"
    body = {"json": {"reason": "none"}} if path else {}
    problem(guarded.call(method, f"{FINDINGS}/{name}{path}", **body), 404)


def test_findings_are_listed_page_by_page(guarded: Service) -> None:
    for _ in range(3):
        made = guarded.pat()
        probe(guarded, made["token"])
        found(guarded, token_id=made["token_id"])
    whole = guarded.done("GET", FINDINGS)["items"]
    pages, cursor = [], None
    while len(pages) < len(whole):
        page = guarded.done("GET", FINDINGS, params={"limit": 2} | ({"cursor": cursor} if cursor else {}))
        pages += page["items"]
        cursor = page.get("next_cursor")
        if cursor is None:
            break
    assert [one["finding_id"] for one in pages] == [one["finding_id"] for one in whole]
    later = datetime.now(UTC).isoformat()
    assert guarded.done("GET", FINDINGS, params={"from": later})["items"] == []


def test_rules_are_listed_as_settings_have_them(guarded: Service) -> None:
    rules = {one["rule"]: one for one in guarded.done("GET", RULES)["items"]}
    assert len(rules) == 11
    assert rules["scope_probing"]["mode"] == "revoke"
    [requests] = [one for one in rules["scanning"]["parameters"] if one["name"] == "requests"]
    assert (requests["value"], requests["default"]) == (20.0, 50.0)


def test_auditors_scope_is_needed(guarded: Service) -> None:
    weak = guarded.bearer("ledger:validate")
    assert guarded.call("GET", FINDINGS, token=weak).status_code == 403


def backtest(service: Service, **body: Any) -> dict[str, Any]:
    """A backtest of today, when it has ended."""
    begun = service.done("POST", BACKTESTS, json={"days": 1, **body})

    def ended() -> dict[str, Any] | None:
        answer = service.done("GET", f"{BACKTESTS}/{begun['backtest_id']}")
        return answer if answer["state"] != "running" else None

    return until(ended, seconds=30, what="the backtest has ended")


def test_backtest_tells_what_a_rule_would_have_found(guarded: Service) -> None:
    made = guarded.pat()
    probe(guarded, made["token"], scopes=9)
    found(guarded, token_id=made["token_id"])
    recorded = len(list(guarded.items(FINDINGS, rule="scope_probing")))
    same = backtest(guarded, rule="scope_probing")
    assert (same["state"], same["days_done"], same["found"]) == ("done", 1, recorded)
    [client] = same["clients"]
    assert client == {
        "client_id": None,
        "found": recorded,
        "revoked": recorded,
        "recorded": recorded,
        "also_recorded": recorded,
        "new": 0,
        "missed": 0,
    }
    strict = backtest(guarded, rule="scope_probing", set={"scopes": 9})
    assert strict["found"] == 1
    assert strict["parameters"] == {"scopes": 9.0, "long_seconds": 7200.0}
    assert strict["clients"][0]["missed"] == recorded - 1
    assert [one["token_id"] for one in strict["examples"]] == [made["token_id"]]
    # Nothing of it was recorded.
    assert len(list(guarded.items(FINDINGS, rule="scope_probing"))) == recorded


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"rule": "nonsense"}, "no such rule"),
        ({"rule": "burst", "set": {"speed": 1}}, "burst has no parameter 'speed'"),
        ({"rule": "burst", "set": {"factor": 0}}, "must be a number above 0"),
    ],
)
def test_backtest_of_what_is_no_rule_is_refused(guarded: Service, body: dict[str, Any], detail: str) -> None:
    assert detail in problem(guarded.call("POST", BACKTESTS, json=body), 400)["detail"]


def test_backtest_that_is_not_there_is_404(guarded: Service) -> None:
    for method in ("GET", "DELETE"):
        problem(guarded.call(method, f"{BACKTESTS}/nothing"), 404)


def command(service: Service, *words: str, code: int = 0) -> str:
    """What the command line says."""
    result = CliRunner().invoke(main, ["audit", *words, "--data-dir", str(service.data_dir)])
    assert result.exit_code == code, result.output
    return result.stdout


def test_command_line_lists_shows_and_judges(guarded: Service) -> None:
    made = guarded.pat()
    probe(guarded, made["token"])
    finding_id = found(guarded, token_id=made["token_id"])["finding_id"]
    listed = json.loads(command(guarded, "findings", "list", "--token-id", made["token_id"], "-o", "json"))
    assert [one["finding_id"] for one in listed["items"]] == [finding_id]
    assert finding_id in command(guarded, "findings", "list", "--token-id", made["token_id"])
    shown = command(guarded, "findings", "show", finding_id)
    assert "insufficient_scope" in shown
    assert "count(DISTINCT scope)" in shown
    command(guarded, "findings", "dismiss", finding_id, "--reason", "a test of ours")
    assert "a test of ours" in command(guarded, "findings", "show", finding_id)
    command(guarded, "findings", "acknowledge", "fnd_" + "0" * 32, "--reason", "none", code=1)


def test_command_line_lists_rules_and_backtests_one(guarded: Service) -> None:
    assert "scope_probing" in command(guarded, "rules")
    words = ("backtest", "scope_probing", "--days", "1", "--set", "scopes=500")
    assert json.loads(command(guarded, *words, "-o", "json"))["found"] == 0
    assert "done" in command(guarded, *words)
    command(guarded, "backtest", "scope_probing", "--set", "scopes", code=2)
    command(guarded, "backtest", "nonsense", code=1)


def test_metrics_count_findings_by_rule_and_mode(guarded: Service) -> None:
    made = guarded.pat()
    probe(guarded, made["token"])
    found(guarded, token_id=made["token_id"])
    text = guarded.http.get("/metrics").text
    assert 'token_ledger_findings_total{mode="revoke",rule="scope_probing"}' in text
    assert "token_ledger_abuse_rules_lag_messages" in text
    assert made["token_id"] not in text


def test_readiness_tells_of_the_rules(guarded: Service) -> None:
    def check() -> bool:
        check: dict[str, Any] = guarded.http.get("/health/ready").json()["checks"]["abuse_rules"]
        return bool(check["ok"]) and not check["needed"]

    until(check, seconds=60, what="the rules run")
