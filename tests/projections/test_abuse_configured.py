"""The rules' heads, and what settings change of them."""

from __future__ import annotations

import duckdb
import pytest

from projections.abuse.detector import Detector
from projections.abuse.rules import RuleError, all_rules, changed, configured, parse
from service.settings import Settings, SettingsError

ISSUE = {
    *("refresh_reuse", "use_after_end", "new_network", "many_addresses", "burst", "scanning", "scope_probing"),
    *("client_secret_guessing", "dormant_wakes", "shared_agents", "impossible_rate"),
}
HEAD = "-- version: 1\n-- finds: x\n-- spares: y\n-- entity: token\n-- quiet_seconds: 60\n"
BODY = "SELECT $from, $until"


def test_every_rule_of_the_issue_is_there_and_none_revokes_by_itself() -> None:
    assert all_rules().keys() == ISSUE
    assert {rule.mode for rule in all_rules().values()} == {"observe", "notify"}


def test_changes_of_settings_are_applied() -> None:
    rules = configured(["burst.mode=revoke", "burst.factor=2.5", "scanning.seconds=60"])
    assert rules["burst"].mode == "revoke"
    assert rules["burst"].values == all_rules()["burst"].values | {"factor": 2.5}
    assert rules["scanning"].window_seconds == 60
    assert rules["new_network"] == all_rules()["new_network"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("burst", "does not read rule.parameter=value"),
        ("brst.factor=2", "there is no rule 'brst'.*did you mean burst"),
        ("burst.facto=2", "has no parameter 'facto'.*did you mean factor"),
        ("burst.factor=0", "must be a number above 0"),
        ("burst.factor=nan", "must be a number above 0"),
        ("burst.factor=1e12", "must be a number above 0"),
        ("burst.seconds=7200", "at most 3600"),
        ("burst.mode=kill", "must be one of observe, notify, revoke"),
        ("scanning.mode=revoke", "an address and no token"),
    ],
)
def test_change_that_makes_no_sense_refuses_the_start(change: str, why: str) -> None:
    with pytest.raises(RuleError, match=why):
        configured([change])
    with pytest.raises(SettingsError, match=why):
        Settings.load({"TOKEN_LEDGER_ABUSE_RULES": change})


def test_change_that_is_given_twice_is_refused() -> None:
    with pytest.raises(RuleError, match="given twice"):
        configured(["burst.factor=2", "burst.factor=3"])


def test_settings_carry_the_changes_to_other_processes() -> None:
    settings = Settings.load({"TOKEN_LEDGER_ABUSE_RULES": "burst.mode=notify, burst.factor=2"})
    assert settings.abuse_rules == ("burst.mode=notify", "burst.factor=2")
    assert Settings.load(settings.environment()) == settings


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (HEAD.replace("-- finds: x\n", "") + BODY, "finds"),
        (HEAD.replace("token", "planet") + BODY, "planet"),
        (HEAD + "-- parameter: many\n" + BODY, "many"),
        (HEAD + "-- parameter: uses = 3 (uses; at least)\n" + BODY, "uses"),
        (HEAD + BODY + ", $uses", "uses"),
    ],
)
def test_rule_whose_head_does_not_fit_is_refused(text: str, why: str) -> None:
    with pytest.raises(RuleError, match=why):
        parse("mine", text)


@pytest.mark.parametrize("statement", ["COPY (SELECT 1) TO '/tmp/x'", "FROM read_csv('/etc/passwd')", "LOAD httpfs"])
def test_detector_reads_and_writes_no_file(statement: str) -> None:
    detector = Detector(all_rules().values(), b"salt")
    try:
        with pytest.raises(duckdb.Error):
            detector._database.execute(statement)
    finally:
        detector.close()


def test_value_is_changed_and_the_rule_of_the_repository_is_not() -> None:
    before = all_rules()["burst"].values
    assert changed(all_rules()["burst"], "factor", "9").values != before
    assert all_rules()["burst"].values == before
