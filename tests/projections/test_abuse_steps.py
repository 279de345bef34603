"""Looking every moment finds what looking once finds, whatever the history and wherever the steps end."""

from __future__ import annotations

import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from events.streams import LEDGER, USAGE
from events.types import CodeRefused, CodeReplayed, RefreshReplayed, SessionStarted
from projections.abuse import feed
from projections.abuse.detector import Detector, Found, Fresh, Incident
from projections.abuse.rules import all_rules
from projections.analytics import Analytics
from tests.abusing import AGENT, DAYS, HOME, START, Story, block, facts, look
from tests.making import authorized, cli, grt, head, tok, usr

DAY = timedelta(days=DAYS)
AGENTS = (AGENT, AGENT, AGENT, "curl/8", "okhttp/4", "Go-http-client/2")
OUTCOMES = ("valid", "valid", "valid", "revoked", "expired", "insufficient_scope")


def wild(seed: int) -> Story:
    """Usual days, then one on which all kinds of things happen at once, many of them in the same microsecond."""
    chance = random.Random(seed)
    story = Story()
    moments = [START + DAY + timedelta(seconds=chance.randrange(86_400)) for _ in range(12)]
    for moment in moments:
        number = chance.randint(1, 6)
        spread = chance.choice((0, 0, 1, 30, 600))
        networks = chance.choice((1, 2, 12))
        outcome = chance.choice(OUTCOMES)
        for count in range(chance.choice((1, 8, 140))):
            story.use(
                number,
                moment + timedelta(seconds=round(chance.random() * spread, 2)),
                ip=chance.choice((HOME, f"203.0.{chance.randrange(networks)}.5")),
                agent=chance.choice(AGENTS),
                outcome=outcome,
                scope=f"admin:{count % 7}" if outcome == "insufficient_scope" else "",
                endpoint=chance.choice(("validate", "forward-auth", "introspect")),
            )
        kind = chance.choice(("unknown", "malformed", "invalid_client"))
        caller = cli(chance.randrange(9)) if kind == "invalid_client" else chance.choice(("", tok(4)))
        story.refuse(moment, kind, chance.choice((1, 40, 90)), ip=f"203.0.{networks}.9", caller=caller)
    signing_in(story, chance)
    # Counts come when their minute is over, and a last use lets them come.
    story.use(1, START + DAY + timedelta(hours=24, minutes=5))
    story.record(RefreshReplayed(**head(moments[0]), grant_id=grt(5), token_id=tok(5), answered=False), at=moments[0])
    return story


def signing_in(story: Story, chance: random.Random) -> None:
    """Wrong passwords, sessions, authorizations with one challenge or another, and what becomes of their codes."""
    for at in sorted(START + DAY + timedelta(seconds=chance.randrange(8 * 3600)) for _ in range(60)):
        number, person = 100 + chance.randrange(20), chance.randrange(12)
        event = chance.choice(
            (
                SessionStarted(
                    **head(at), session_id=f"ses_{number:032x}", user_id=usr(person), auth_time=at,
                    expires_at=at + DAY, methods=("pwd",), user_seq=1,
                ),
                authorized(
                    grt(number), tok(10 * number), occurred_at=at, subject=usr(person),
                    code_challenge=chance.choice("abc") * 43,
                ),
                CodeRefused(**head(at), grant_id=grt(number), code_id=tok(10 * number), cause="verifier"),
                CodeReplayed(**head(at), grant_id=grt(number), code_id=tok(10 * number), raced=False),
            )
        )  # fmt: skip
        story.record(event, at=at)
        for _ in range(3):
            who = chance.choice(("", usr(chance.randrange(30)), usr(1)))
            story.refuse(at, "invalid_password", chance.choice((1, 3)), ip=f"203.0.{chance.randrange(9)}.7", caller=who)


def identity(found: Found) -> tuple[str, ...]:
    return found.finding_id, found.rule.name, str(found.at), str(found.about.get("token_id"))


@pytest.mark.parametrize("seed", range(3))
def test_small_steps_find_what_one_pass_finds(tmp_path: Path, seed: int) -> None:
    story = wild(seed)
    store = story.store(tmp_path, story.blocks(most=random.Random(seed).choice((7, 40))))
    try:
        chance = random.Random(seed)
        end = store.position(USAGE)
        steps = sorted({chance.randint(1, end) for _ in range(8)})
        once, stepwise = look(store), look(store, steps=steps)
        # A step may end among uses of one microsecond; then the counts are of those that were known.
        assert sorted(map(identity, once)) == sorted(map(identity, stepwise))
        assert {"code_replay", "constant_challenge", "password_spraying", "account_guessing"} <= {
            one.rule.name for one in once
        }
    finally:
        store.close()


def resumed(store: Analytics, until: int) -> list[Found]:
    """What is found if the process ends after `until` and another one goes on from there."""
    rules = all_rules().values()
    first = Detector(rules, b"salt")
    end = store.position(LEDGER)
    with store.cursor() as cursor:
        found = first.look(feed.recorded(cursor, first, usage=(0, until), ledger=(0, end)))
        incidents = {key: Incident(one.first_at, one.last_at) for key, one in first.incidents.items()}
        first.close()
        second = Detector(rules, b"salt", incidents=incidents)
        feed.seed(cursor, second, until=until, ledger=end)
        found += second.look(feed.recorded(cursor, second, usage=(until, store.position(USAGE)), ledger=(end, end)))
        second.close()
    return found


@pytest.mark.parametrize(
    ("seed", "sealed"), [(0, False), (1, True), (2, False), (3, True)], ids=["0-tail", "1-sealed", "2-tail", "3-sealed"]
)
def test_who_goes_on_finds_what_who_never_stopped_finds(tmp_path: Path, seed: int, sealed: bool) -> None:
    story = wild(seed)
    store = story.store(tmp_path, story.blocks(most=20))
    try:
        if sealed:
            store.seal()
        until = random.Random(seed).randint(1, store.position(USAGE))
        assert facts(look(store)) == facts(resumed(store, until))
    finally:
        store.close()


def test_who_goes_on_where_nothing_was_used_knows_the_failures_before(tmp_path: Path) -> None:
    story, noon = Story(), START + DAY
    story.uses.clear()
    for number in range(8):
        at = noon + timedelta(minutes=number)
        story.refuse(at, "invalid_password", 1, ip="203.0.113.5", caller=usr(number))
    blocks = [block([], [count]) for count in story.refused]
    store = story.store(tmp_path, blocks)
    try:
        # When it was recorded is the time of the writer's last use, of which there is none.
        once = look(store)
        assert [one.rule.name for one in once] == ["password_spraying"]
        assert facts(once) == facts(resumed(store, 5))
    finally:
        store.close()


def test_who_goes_on_where_nothing_was_used_reads_events_of_the_last_hours_only(tmp_path: Path) -> None:
    """All that people ever did would not fit into memory, at each start again."""

    class Counting(Detector):
        told = 0

        def remember(self, events: Any) -> None:
            self.told += events.num_rows
            super().remember(events)

    story = Story()
    story.uses.clear()
    for day in range(30):
        at = START + timedelta(days=day)
        story.record(CodeReplayed(**head(at), grant_id=grt(1), code_id=tok(1), raced=True), at=at)
        event = authorized(grt(100 + day), tok(1000 + day), occurred_at=at, subject=usr(1), code_challenge="c" * 43)
        story.record(event, at=at)
    store = story.store(tmp_path, [])
    detector = Counting(all_rules().values(), b"salt")
    try:
        with store.cursor() as cursor:
            feed.seed(cursor, detector, until=0, ledger=store.position(LEDGER))
        assert detector.told == 1 + 8  # the last hours, and the authorizations of seven days
    finally:
        detector.close()
        store.close()


def test_late_use_finds_no_incident_a_second_time(tmp_path: Path) -> None:
    """Blocks of several writers arrive out of order; what belongs to an incident that is known begins no other."""
    story = Story()
    moment = START + DAY + timedelta(hours=12)
    for number in range(20):
        story.use(1, moment + timedelta(seconds=10 * number), outcome="insufficient_scope", scope=f"admin:{number}")
    blocks = story.blocks(most=3)
    late = [*blocks[:-6], blocks[-1], blocks[-3], blocks[-2], blocks[-5], blocks[-4], blocks[-6]]
    store = story.store(tmp_path, late)
    try:
        # What comes before are usual days. Each block with a use of the day is a step.
        found = look(store, steps=list(range(len(late) - 8, store.position(USAGE))))
        assert [(one.rule.name, one.about["token_id"]) for one in found] == [("scope_probing", tok(1))]
    finally:
        store.close()


def test_nothing_fresh_is_nothing_found() -> None:
    detector = Detector(all_rules().values(), b"salt")
    try:
        assert detector.look(Fresh()) == []
    finally:
        detector.close()
