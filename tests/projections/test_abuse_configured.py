"""The rules' heads, what settings change of them, and what no rule may do, whatever its SQL."""

from __future__ import annotations

from collections.abc import Iterator

import duckdb
import pytest

from projections.abuse import backtest, detector
from projections.abuse.detector import Detector
from projections.abuse.rules import Rule, RuleError, all_rules, changed, configured, parse
from projections.analytics import Analytics
from service.settings import Settings, SettingsError
from tests.abusing import DAYS, START, Story, look

ISSUES = {
    *("refresh_reuse", "use_after_end", "new_network", "many_addresses", "burst", "scanning", "scope_probing"),
    *("client_secret_guessing", "dormant_wakes", "shared_agents", "impossible_rate"),
    *("code_replay", "constant_challenge", "password_spraying", "account_guessing"),
}
HEAD = "-- version: 1\n-- finds: x\n-- spares: y\n-- entity: token\n-- quiet_seconds: 60\n"
BODY = "SELECT $from, $until"
USE = "SELECT occurred_at, occurred_at AS first_at, 'x' AS entity, reported, token_no, block_seq, use_index"
WITHIN = "FROM window_uses WHERE occurred_at >= $from AND occurred_at < $until"
EVERY_USE = f"{USE} {WITHIN}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Analytics]:
    """With uses of some days."""
    opened = Story().store(tmp_path_factory.mktemp("store"))
    yield opened
    opened.close()


def mine(sql: str) -> Rule:
    return parse("mine", HEAD + sql)


def test_every_rule_of_the_issues_is_there_and_none_revokes_by_itself() -> None:
    assert all_rules().keys() == ISSUES
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
        ("scanning.mode=revoke", "finds an address, and no token"),
        ("account_guessing.mode=revoke", "finds an account, and no token"),
        ("constant_challenge.mode=revoke", "finds a client, and no token"),
        ("code_replay.mode=revoke", "finds a code, and no token"),
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
    opened = Detector(all_rules().values(), b"salt")
    try:
        with pytest.raises(duckdb.Error):
            opened._database.execute(statement)
    finally:
        opened.close()


@pytest.mark.parametrize(
    "statement",
    [
        "SET memory_limit = '100GB'",
        "RESET memory_limit",
        "SET threads = 64",
        "SET temp_directory = '/tmp/x'",
        "SET enable_external_access = true",
        "SET autoload_known_extensions = true",
        "SET TimeZone = 'Asia/Tokyo'",
        "PRAGMA enable_profiling",
        "SET lock_configuration = false",
    ],
)
def test_rule_cannot_change_the_configuration(store: Analytics, statement: str) -> None:
    with pytest.raises(RuleError, match=r"rule mine does not run: .*the configuration has been locked"):
        look(store, [mine(f"{statement}; {EVERY_USE}")])


def test_rule_that_takes_more_memory_than_it_may_is_told_so(store: Analytics) -> None:
    """It would fit onto a disk, but nothing is written to one."""
    sorted_ = "SELECT max(n) FROM (FROM range(3_000_000) AS t(n) ORDER BY hash(n) OFFSET 1)"
    with pytest.raises(RuleError, match="rule mine does not run: Out of Memory"):
        look(store, [mine(f"{USE}, ({sorted_}) AS n {WITHIN}")], memory_bytes_max=32 * 1024**2)


def test_rule_that_triggers_too_often_at_once_is_refused(store: Analytics, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day is looked at at once."""
    uses_of_a_day = len(Story().uses) // DAYS
    monkeypatch.setattr(detector, "_TRIGGERS_MAX", uses_of_a_day)
    assert len(look(store, [mine(EVERY_USE)])) == DAYS * uses_of_a_day
    monkeypatch.setattr(detector, "_TRIGGERS_MAX", uses_of_a_day - 1)
    with pytest.raises(RuleError, match=f"rule mine triggers more than {uses_of_a_day - 1} times at once"):
        look(store, [mine(EVERY_USE)])


def test_backtest_that_finds_too_much_is_refused(store: Analytics, monkeypatch: pytest.MonkeyPatch) -> None:
    uses = len(Story().uses)

    def run() -> backtest.Report:
        report = backtest.Report(days=DAYS)
        with store.cursor() as cursor:
            backtest.run(cursor, mine(EVERY_USE), START.replace(tzinfo=None), report, lambda: False)
        return report

    monkeypatch.setattr(backtest, "_FOUND_MAX", uses)
    report = run()
    assert (len(report.found), report.days_done) == (uses, DAYS)
    monkeypatch.setattr(backtest, "_FOUND_MAX", uses - 1)
    with pytest.raises(RuleError, match=f"rule mine finds more than {uses - 1} incidents: it is too wide"):
        run()


def test_value_is_changed_and_the_rule_of_the_repository_is_not() -> None:
    before = all_rules()["burst"].values
    assert changed(all_rules()["burst"], "factor", "9").values != before
    assert all_rules()["burst"].values == before
