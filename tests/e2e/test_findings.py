"""From a use to a finding, to the revocation that follows, to what auditors say of it. Issue "Auditors", item 4."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from service.cli import main
from tests.codes import authorize, outlast_the_race, redeem, verifier, web_app
from tests.e2e.test_sign_in import Browser
from tests.running import CANARY_PASSWORD, Service, StartService, problem, unique, until

FINDINGS, RULES, BACKTESTS = "/v1/audit/findings", "/v1/audit/rules", "/v1/audit/backtests"
CHANGES = "scope_probing.mode=revoke,refresh_reuse.mode=revoke,scanning.requests=20"
PARAMETERS = {"scopes": 4.0, "foreign_scopes": 1.0, "long_seconds": 7200.0, "learning_hours": 24.0}
HEAD = """-- version: 7
-- finds: a token that was refused.
-- spares: nobody.
-- entity: token
-- quiet_seconds: 86400
"""
WITHIN = "WHERE occurred_at >= $from AND occurred_at < $until"
REFUSALS = """-- parameter: refusals = 3 (uses; so many)
WITH counted AS (
    SELECT *, count(*) OVER (PARTITION BY token_no ORDER BY occurred_at) AS refusals FROM window_uses
    WHERE outcome = 'insufficient_scope'
)
SELECT occurred_at, token_no::VARCHAR AS entity, token_no, block_seq, use_index, occurred_at AS first_at, reported
FROM counted WHERE occurred_at >= $from AND occurred_at < $until AND refusals >= $refusals
"""


@pytest.fixture(scope="module")
def guarded(service_with: StartService) -> Service:
    return service_with(abuse_rules=CHANGES, trusted_proxies="127.0.0.0/8", sign_in_failures_free=20)


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


def used_and_found(service: Service) -> None:
    """The store has uses of today."""
    made = service.pat()
    probe(service, made["token"])
    found(service, token_id=made["token_id"])


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
    assert shown["sql"]["parameters"] == PARAMETERS


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


def test_code_that_is_replayed_is_found_with_the_event_that_says_so(guarded: Service) -> None:
    app, user_id, proof = web_app(guarded, guarded.scope()), guarded.user()["user_id"], verifier()
    code = authorize(guarded, app, user_id, proof, scope="")
    assert redeem(guarded, app, code, proof).status_code == 200
    outlast_the_race()
    assert redeem(guarded, app, code, proof).status_code == 400
    item = found(guarded, client_id=app.client_id)
    assert (item["rule"], item["mode"], item["subject"]) == ("code_replay", "notify", user_id)
    [evidence] = guarded.done("GET", f"{FINDINGS}/{item['finding_id']}")["evidence"]
    assert (evidence["source"], evidence["type"]) == ("event", "code.replayed/1")
    told = backtest(guarded, rule="code_replay")
    assert (told["found"], told["revoked"], told["clients"][0]["client_id"]) == (1, 0, app.client_id)


def test_challenge_of_several_people_is_found_and_names_the_client_alone(guarded: Service) -> None:
    app, proof = web_app(guarded, guarded.scope()), verifier()
    for _ in range(5):
        authorize(guarded, app, guarded.user()["user_id"], proof, scope="")
    item = found(guarded, client_id=app.client_id)
    assert (item["rule"], item["mode"]) == ("constant_challenge", "observe")
    assert item["counts"] == {"authorizations": 5.0, "people": 5.0}
    assert {"subject", "grant_id", "token_id"}.isdisjoint(item)
    evidence = guarded.done("GET", f"{FINDINGS}/{item['finding_id']}")["evidence"]
    assert [one["type"] for one in evidence] == ["authorization.granted/1"] * 2


def test_passwords_that_are_tried_for_many_accounts_and_for_one_from_many_networks_are_found(guarded: Service) -> None:
    names = [guarded.user(password=unique(CANARY_PASSWORD)) for _ in range(8)]
    tried = [(one, "203.0.113.9") for one in names] + [(names[0], f"198.51.{n}.7") for n in range(7)]
    for user, ip in tried:
        headers = {"X-Forwarded-For": ip}
        wrong = {"username": user["username"], "password": "not this one"}
        assert Browser(guarded).sign_in(wrong, headers=headers).status_code == 400
    guessing = found(guarded, subject=names[0]["user_id"])
    assert (guessing["rule"], guessing["mode"]) == ("account_guessing", "observe")
    assert guessing["counts"]["sign_ins"] == 0
    item = found(guarded, rule="password_spraying")
    assert {"token_id", "client_id", "subject", "caller"}.isdisjoint(item)
    shown = guarded.done("GET", f"{FINDINGS}/{item['finding_id']}")
    assert {one["ip"] for one in shown["evidence"]} == {"203.0.113.9"}
    assert {one["outcome"] for one in shown["evidence"]} == {"invalid_password"}


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
        guarded.done("POST", path, json={"reason": f"we {words} it"})
        assert found(guarded, token_id=made["token_id"], status=status)["finding_id"] == finding_id
    shown = guarded.done("GET", f"{FINDINGS}/{finding_id}")
    assert [(one["status"], one["reason"]) for one in shown["judged"]] == [
        ("acknowledged", "we acknowledge it"),
        ("dismissed", "we dismiss it"),
    ]
    guarded.done("POST", f"{FINDINGS}/{finding_id}/dismiss", json={"reason": "so do I"})
    assert guarded.done("GET", f"{FINDINGS}/{finding_id}")["judged"][2]["reason"] == "so do I"
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
    assert len(rules) == 15
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
    assert strict["parameters"] == PARAMETERS | {"scopes": 9.0}
    assert strict["clients"][0]["missed"] == recorded - 1
    assert [one["token_id"] for one in strict["examples"]] == [made["token_id"]]
    # Nothing of it was recorded.
    assert len(list(guarded.items(FINDINGS, rule="scope_probing"))) == recorded


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"rule": "nonsense"}, "there is no rule 'nonsense'"),
        ({"rule": "burst", "to": "2999-01-01T00:00:00Z"}, "in the future"),
        ({"rule": "mine", "sql": "SELECT 1"}, "its head has no line `-- version: …`"),
        ({"rule": "mine", "sql": HEAD + "SELECT $from; SELECT $until"}, "not one SELECT"),
        ({"rule": "mine", "sql": HEAD + "DELETE FROM tokens WHERE $from < $until"}, "not one SELECT"),
        ({"rule": "mine", "sql": HEAD + "SELEC $from, $until"}, "syntax error"),
        ({"rule": "mine", "sql": HEAD + "SELECT $from, $until, $factor"}, "the same parameters: factor"),
        ({"rule": "burst", "set": {"speed": 1}}, "burst has no parameter 'speed'"),
        ({"rule": "burst", "set": {"factor": 0}}, "must be a number above 0"),
    ],
)
def test_backtest_of_what_is_no_rule_is_refused(guarded: Service, body: dict[str, Any], detail: str) -> None:
    assert detail in problem(guarded.call("POST", BACKTESTS, json=body), 400)["detail"]


def test_backtest_of_ones_own_rule_tells_what_it_would_have_found(guarded: Service, tmp_path: Path) -> None:
    made = guarded.pat()
    probe(guarded, made["token"], scopes=5)
    found(guarded, token_id=made["token_id"])
    sql = HEAD + REFUSALS
    own = until(
        lambda: answer if (answer := backtest(guarded, rule="mine", sql=sql))["found"] else None, what="it is found"
    )
    assert (own["state"], own["rule"], own["rule_version"]) == ("done", "mine", 7)
    assert made["token_id"] in {one["token_id"] for one in own["examples"]}
    assert backtest(guarded, rule="mine", sql=sql, set={"refusals": 1000})["found"] == 0
    file = tmp_path / "mine.sql"
    file.write_text(sql)
    words = ("backtest", str(file), "--days", "1", "-o", "json")
    assert json.loads(command(guarded, *words))["found"] == own["found"]
    command(guarded, "backtest", str(tmp_path / "none.sql"), code=2)
    # It is not switched on by that.
    assert "mine" not in {one["rule"] for one in guarded.done("GET", RULES)["items"]}


@pytest.mark.parametrize(
    ("select", "error"),
    [
        (f"FROM window_uses {WITHIN}", "does not select first_at TIMESTAMP"),
        (
            f"SELECT * EXCLUDE use_index, occurred_at AS first_at, 'x' AS entity FROM window_uses {WITHIN}",
            "does not select use_index",
        ),
        ("FROM no_such_table WHERE now() BETWEEN $from AND $until -- window_uses", "no_such_table"),
        ("SELECT $from, $until FROM read_csv('/etc/passwd') -- window_uses", "disabled"),
    ],
)
def test_backtest_of_a_rule_that_does_not_run_says_why(guarded: Service, select: str, error: str) -> None:
    used_and_found(guarded)
    failed = backtest(guarded, rule="mine", sql=HEAD + select)
    assert failed["state"] == "failed"
    assert error in failed["error"]


def test_backtest_that_would_take_for_ever_can_be_stopped(guarded: Service) -> None:
    used_and_found(guarded)
    for_ever = "SELECT $from, $until, sum(a.range * b.range) FROM range(10000000) a, range(10000000) b, window_uses"
    begun = guarded.done("POST", BACKTESTS, json={"rule": "mine", "sql": HEAD + for_ever, "days": 1})
    path = f"{BACKTESTS}/{begun['backtest_id']}"
    problem(guarded.call("POST", BACKTESTS, json={"rule": "burst"}), 400)
    assert guarded.done("DELETE", path)["state"] == "stopped"
    assert backtest(guarded, rule="burst")["state"] == "done"


def test_backtest_of_ones_own_rule_needs_an_administrator(guarded: Service) -> None:
    auditor = guarded.bearer("ledger:audit")
    body = {"rule": "mine", "sql": HEAD + REFUSALS}
    told = problem(guarded.call("POST", BACKTESTS, json=body, token=auditor), 403)
    assert (told["code"], told["scope"]) == ("insufficient_scope", "ledger:admin")


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
