"""What each rule finds, and what looks like it and is none: real stores, real SQL. Issue "Auditors", item 4."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from msgspec.structs import replace

from events.types import CodeRefused, CodeReplayed, Kind, RefreshReplayed, SessionStarted
from projections.abuse.rules import all_rules
from tests.abusing import AGENT, DAYS, HOME, HOUR, MINUTE, START, Story, look
from tests.making import authorized, cli, grt, head, minted, redeemed, tok, usr

NOON = START + timedelta(days=DAYS, hours=12)
Scene = Callable[[Story], None]


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


def day(number: int, hour: int = 9) -> datetime:
    return START + timedelta(days=number, hours=hour)


# Abuse: the token is 1 unless said otherwise


def reused(story: Story) -> None:
    story.record(RefreshReplayed(**head(NOON), grant_id=grt(1), token_id=tok(1), answered=False), at=NOON)


def revoked_from_elsewhere(story: Story) -> None:
    story.use(1, NOON, ip="203.0.113.5", agent="python-requests/2", outcome="revoked")


def expired_again_and_again(story: Story) -> None:
    for number in range(6):
        story.use(1, NOON + seconds(20 * number), ip="203.0.113.5", outcome="expired")


def stolen(story: Story) -> None:
    story.use(1, NOON, ip="203.0.113.5", agent="python-requests/2")


def stolen_young_token(story: Story) -> None:
    """The access token of an hour: its owner's history counts."""
    story.issue(7, Kind.ACCESS, cli(1), cli(1), at=NOON)
    for number in range(5):
        story.use(7, NOON + seconds(number))
    story.use(7, NOON + seconds(60), ip="203.0.113.5", agent="Go-http-client/2")


def published(story: Story) -> None:
    for number in range(10):
        story.use(1, NOON + seconds(5 * number), ip=f"203.0.{number}.5")


def scraped(story: Story) -> None:
    """A few networks are enough, if they are new and come within seconds."""
    for number in range(3):
        story.use(1, NOON + seconds(5 * number), ip=f"203.0.{number}.5")


def scraped_with_the_thiefs_tool(story: Story) -> None:
    for number in range(2):
        story.use(1, NOON + seconds(5 * number), ip=f"203.0.{number}.5", agent="python-requests/2")


def drained(story: Story) -> None:
    for number in range(300):
        story.use(4, NOON + seconds(number))


def hammered(story: Story) -> None:
    for number in range(200):
        story.use(1, NOON + seconds(number / 10))


def woken(story: Story) -> None:
    story.use(1, NOON + timedelta(days=20), ip="203.0.113.5")


def woken_by_a_stranger(story: Story) -> None:
    """Of the owner nothing is known but one day."""
    story.use(6, START + HOUR)
    story.use(6, NOON + timedelta(days=20), ip="203.0.113.5", agent="Wget/1.21")


def shared(story: Story) -> None:
    agents = ("okhttp/4", "Go-http-client/2", "Wget/1.21")
    for number in range(12):
        story.use(1, NOON + seconds(600 * number), ip=f"203.0.{number % 3}.5", agent=agents[number % 3])


def probing(story: Story) -> None:
    for number in range(6):
        story.use(1, NOON + seconds(number), outcome="insufficient_scope", scope=f"admin:{number}")


def probing_from_elsewhere(story: Story) -> None:
    story.use(1, NOON, ip="203.0.113.5", agent="python-requests/2", outcome="insufficient_scope", scope="admin:1")


def scanned(story: Story) -> None:
    story.refuse(NOON, "unknown", 80, ip="203.0.113.5")


def scanned_through_a_caller(story: Story) -> None:
    for number in range(20):
        story.refuse(NOON + number * seconds(5), "malformed", 20, ip=f"203.0.{number}.5", caller=tok(4))


def guessed(story: Story) -> None:
    for number in range(6):
        story.refuse(NOON + seconds(number), "invalid_client", 3, ip="203.0.113.5", caller=cli(number))


def guessed_ids(story: Story) -> None:
    story.refuse(NOON, "invalid_client", 70, ip="203.0.113.5")


def signed_in(story: Story, number: int, at: datetime) -> None:
    story.record(
        SessionStarted(
            **head(at), session_id=f"ses_{number:032x}", user_id=usr(number), auth_time=at,
            expires_at=at + 12 * HOUR, methods=("pwd",), user_seq=1,
        ),
        at=at,
    )  # fmt: skip


def authorized_by(story: Story, number: int, at: datetime, *, person: int, challenge: str = "") -> None:
    """Grant and code `number`, by a person, with a challenge of its own unless it is given."""
    event = authorized(
        grt(number), tok(10 * number), occurred_at=at, subject=usr(person), code_challenge=challenge or f"{number:043}"
    )
    story.record(event, at=at)


def redeemed_at(story: Story, number: int, at: datetime) -> None:
    event = redeemed(grt(number), tok(10 * number), minted(tok(10 * number + 1), expires_at=at + HOUR))
    story.record(replace(event, occurred_at=at), at=at)


def refused_at(story: Story, number: int, at: datetime) -> None:
    event = CodeRefused(**head(at), grant_id=grt(number), code_id=tok(10 * number), cause="verifier")
    story.record(event, at=at)


def replayed_at(story: Story, number: int, at: datetime, *, raced: bool = False) -> None:
    event = CodeReplayed(**head(at), grant_id=grt(number), code_id=tok(10 * number), raced=raced)
    story.record(event, at=at)


def code_replayed(story: Story) -> None:
    authorized_by(story, 20, NOON, person=1)
    redeemed_at(story, 20, NOON + seconds(1))
    replayed_at(story, 20, NOON + seconds(40))


def code_tried_with_verifiers(story: Story) -> None:
    authorized_by(story, 20, NOON, person=1)
    for number in range(3):
        refused_at(story, 20, NOON + seconds(number))


def codes_injected(story: Story) -> None:
    """One code of each of four people, in the thief's browser."""
    for number in range(4):
        authorized_by(story, 20 + number, NOON + seconds(600 * number), person=number)
        refused_at(story, 20 + number, NOON + seconds(600 * number + 30))


def prepared_link(story: Story) -> None:
    for number in range(3):
        authorized_by(story, 20 + number, NOON + number * HOUR, person=number, challenge="c" * 43)


def prepared_link_that_is_opened_at_once(story: Story) -> None:
    for number in range(5):
        authorized_by(story, 20 + number, NOON + number * MINUTE, person=number, challenge="c" * 43)


def challenge_of_the_user(story: Story) -> None:
    for number in range(5):
        authorized_by(story, 20 + number, NOON + number * 20 * HOUR, person=1, challenge="c" * 43)


def sprayed(story: Story) -> None:
    for number in range(9):
        story.refuse(NOON + number * MINUTE, "invalid_password", 1, ip="203.0.113.5", caller=usr(number))


def sprayed_at_nobody(story: Story) -> None:
    story.refuse(NOON, "invalid_password", 31, ip="203.0.113.5")


def sprayed_through_proxies(story: Story) -> None:
    for number in range(26):
        story.refuse(NOON + number * MINUTE, "invalid_password", 1, ip=f"203.0.{number}.5", caller=usr(number))


def sprayed_from_one_network(story: Story) -> None:
    """A rented /48: another address for each of 9 accounts."""
    for number in range(9):
        ip = f"2a01:4f8:1:{number:x}::{number + 1:x}"
        story.refuse(NOON + number * MINUTE, "invalid_password", 1, ip=ip, caller=usr(number))


def sprayed_with_hits(story: Story) -> None:
    """12 accounts, of which 5 have one of the passwords."""
    for number in range(12):
        at = NOON + number * MINUTE
        story.refuse(at, "invalid_password", 1, ip="203.0.113.5", caller=usr(number))
        if number < 5:
            signed_in(story, number, at + seconds(20))


def sprayed_behind_own_sign_ins(story: Story) -> None:
    """60 accounts through proxies, while the attacker signs in to one account of their own again and again."""
    for number in range(60):
        at = NOON + number * MINUTE
        story.refuse(at, "invalid_password", 1, ip=f"203.0.{number}.5", caller=usr(number))
        for more in range(20):
            signed_in(story, 999, at - seconds(20 + more))


def guessed_from_many_networks(story: Story) -> None:
    for number in range(7):
        story.refuse(NOON + number * MINUTE, "invalid_password", 1, ip=f"203.0.{number}.5", caller=usr(1))


FOUND: list[tuple[str, Scene]] = [
    ("code_replay", code_replayed),
    ("code_replay", code_tried_with_verifiers),
    ("code_replay", codes_injected),
    ("constant_challenge", prepared_link),
    ("constant_challenge", prepared_link_that_is_opened_at_once),
    ("constant_challenge", challenge_of_the_user),
    ("password_spraying", sprayed),
    ("password_spraying", sprayed_at_nobody),
    ("password_spraying", sprayed_through_proxies),
    ("password_spraying", sprayed_from_one_network),
    ("password_spraying", sprayed_with_hits),
    ("password_spraying", sprayed_behind_own_sign_ins),
    ("account_guessing", guessed_from_many_networks),
    ("refresh_reuse", reused),
    ("use_after_end", revoked_from_elsewhere),
    ("use_after_end", expired_again_and_again),
    ("new_network", stolen),
    ("new_network", stolen_young_token),
    ("many_addresses", published),
    ("many_addresses", scraped),
    ("many_addresses", scraped_with_the_thiefs_tool),
    ("burst", drained),
    ("impossible_rate", hammered),
    ("dormant_wakes", woken),
    ("dormant_wakes", woken_by_a_stranger),
    ("shared_agents", shared),
    ("scope_probing", probing),
    ("scope_probing", probing_from_elsewhere),
    ("scanning", scanned),
    ("scanning", scanned_through_a_caller),
    ("client_secret_guessing", guessed),
    ("client_secret_guessing", guessed_ids),
]


@pytest.mark.parametrize(("rule", "scene"), FOUND, ids=[f"{rule}-{scene.__name__}" for rule, scene in FOUND])
def test_rule_finds(tmp_path: Path, rule: str, scene: Scene) -> None:
    story = Story()
    scene(story)
    store = story.store(tmp_path)
    try:
        found = look(store, [all_rules()[rule]])
        assert len(found) == 1
        [one] = found
        assert one.evidence
        assert one.first_at <= one.at
        places = {(evidence.seq, evidence.index) for evidence in one.evidence}
        table, index = {"use": ("uses", "use_index"), "refused": ("refused", "refused_index")}.get(
            one.evidence[0].source, ("events", "0")
        )
        column = "ledger_seq" if table == "events" else "block_seq"
        with store.cursor() as cursor:
            rows = cursor.execute(f"SELECT {column}, {index} FROM {table}").fetchall()
        assert places <= set(rows)
    finally:
        store.close()


def test_finding_of_an_ipv6_network_has_evidence_of_that_network_only(tmp_path: Path) -> None:
    story = Story()
    sprayed_from_one_network(story)
    story.refuse(NOON + MINUTE, "invalid_password", 100, ip="2a01:4f8:2::1", caller=usr(1))
    story.use(1, NOON + HOUR)
    store = story.store(tmp_path)
    try:
        [one] = look(store, [all_rules()["password_spraying"]])
        with store.cursor() as cursor:
            rows = cursor.execute("SELECT block_seq, refused_index, network FROM refused").fetchall()
        networks = {(seq, index): network for seq, index, network in rows}
        # The eighth account was one too many.
        assert [networks[place.seq, place.index or 0] for place in one.evidence] == ["2a01:4f8:1::/48"] * 8
    finally:
        store.close()


# What is none


def replay_within_the_window(story: Story) -> None:
    story.record(RefreshReplayed(**head(NOON), grant_id=grt(1), token_id=tok(1), answered=True), at=NOON)


def old_token_at_home(story: Story) -> None:
    for number in range(50):
        story.use(1, NOON + seconds(number), ip="198.51.100.90", outcome="revoked")


def phone_wakes_up_elsewhere(story: Story) -> None:
    """Two attempts with an expired token in another network, then a new one."""
    story.use(5, NOON, ip="203.0.113.5", outcome="expired")
    story.use(5, NOON + seconds(1), ip="203.0.113.5", outcome="expired")
    story.issue(7, Kind.ACCESS, cli(1), cli(1), at=NOON)
    story.use(7, NOON + seconds(3), ip="203.0.113.5")


def first_use_comes_too_late(story: Story) -> None:
    """Somebody tries out a token that they have just revoked: nobody knows yet where they are."""
    story.issue(8, Kind.PAT, usr(8), at=NOON)
    for number in range(6):
        story.use(8, NOON + seconds(number), ip="203.0.113.5", agent="curl/8", outcome="revoked")


def deployment(story: Story) -> None:
    """All tokens at once: a new version of the agent on new machines of the same network, then another agent there."""
    for number in range(1, 6):
        for count in range(20):
            story.use(number, NOON + seconds(count), ip=f"198.51.100.{100 + count}", agent="shop/2.0")
        story.use(number, NOON + HOUR, agent="till/1.0")


def move_to_another_cloud(story: Story) -> None:
    for number in range(1, 6):
        for count in range(3):
            story.use(number, NOON + seconds(100 * count), ip=f"192.0.{count}.8")


def roaming_phone(story: Story) -> None:
    for number in range(12):
        story.use(1, NOON + number * 3 * MINUTE, ip=f"203.0.{number}.5")


def office(story: Story) -> None:
    """One address, many tokens, and a few that somebody mistyped."""
    for number in range(1, 6):
        for count in range(40):
            story.use(number, NOON + seconds(count), ip="203.0.113.80", agent=AGENT)
    story.refuse(NOON, "malformed", 30, ip="203.0.113.80")
    story.refuse(NOON, "unknown", 40, ip="203.0.113.80")


def runners(story: Story) -> None:
    """A token that is always used from many networks."""
    for number in range(DAYS + 1):
        for count in range(9):
            story.use(4, day(number) + seconds(30 * count), ip=f"203.{number}.{count}.5", agent="runner/2")


def first_runners(story: Story) -> None:
    """A new token's first jobs, all at once: nothing says where to expect them."""
    story.issue(7, Kind.PAT, usr(1), at=NOON)
    for number in range(5):
        story.use(7, NOON + seconds(number), ip=f"203.0.{number}.5", agent="runner/2")


def one_phone_on_two_networks(story: Story) -> None:
    """From the wireless network at home to the carrier's."""
    for number in range(10):
        story.use(1, NOON + seconds(number), ip=f"203.0.{number % 2}.5")


def hourly_job(story: Story) -> None:
    for number in range(DAYS + 1):
        for hour in range(24):
            for count in range(80):
                story.use(4, day(number, hour) + seconds(count / 4))


def nightly_job_with_more_to_do(story: Story) -> None:
    story.issue(7, Kind.SAT, usr(7))
    for number in range(DAYS + 1):
        for count in range(200 if number == DAYS else 20):
            story.use(7, day(number, 2) + seconds(count))


def many_at_once(story: Story) -> None:
    """An editor asks for all it shows."""
    for number in range(50):
        story.use(1, NOON + seconds(number / 100))


def load_test(story: Story) -> None:
    """With a token that was made for it."""
    story.issue(7, Kind.SAT, usr(7), at=NOON)
    for number in range(3000):
        story.use(7, NOON + seconds(number / 50), agent="k6/0.5")


def retries(story: Story) -> None:
    for number in range(60):
        story.use(1, NOON + seconds(number / 2))
        story.use(2, NOON + seconds(number / 2), outcome="expired")


def rotation(story: Story) -> None:
    """The successor is used at once from where the old one was, the old one to its end and a little longer."""
    story.issue(7, Kind.PAT, usr(1), at=NOON)
    for number in range(30):
        story.use(7, NOON + seconds(number))
        story.use(1, NOON + seconds(number), outcome="expired" if number > 20 else "valid")


def monthly_job(story: Story) -> None:
    for count in range(50):
        story.use(1, NOON + timedelta(days=30) + seconds(count))


def seldom_used(story: Story) -> None:
    """By somebody who uses it once in weeks, now from a journey."""
    story.use(6, START + HOUR)
    story.use(6, NOON + timedelta(days=20), ip="203.0.113.5")


def first_use_ever(story: Story) -> None:
    story.use(6, NOON + timedelta(days=20), ip="203.0.113.5")


def upgrade_of_the_agent(story: Story) -> None:
    for number in range(20):
        story.use(1, NOON + seconds(number), agent="shop/1.4" if number < 10 else "shop-ng/1")


def tools_of_one_person(story: Story) -> None:
    for number in range(20):
        story.use(1, NOON + seconds(10 * number), agent=("curl/8", "python-requests/2", "shop/1")[number % 3])


def missing_scope(story: Story) -> None:
    for number in range(100):
        story.use(1, NOON + seconds(number), outcome="insufficient_scope", scope=f"orders:{number % 2}")


def missing_scope_on_new_machines(story: Story) -> None:
    for number in range(20):
        story.use(1, NOON + seconds(number), ip="203.0.113.5", outcome="insufficient_scope", scope="orders:write")
        story.use(3, NOON + seconds(number), agent="till/1.0", outcome="insufficient_scope", scope="orders:write")


def noisy_gateway(story: Story) -> None:
    for number in range(DAYS + 1):
        for count in range(5):
            story.refuse(day(number) + count * MINUTE, "unknown", 70, caller=tok(4))


def old_secret(story: Story) -> None:
    for number in range(10):
        story.refuse(NOON + number * MINUTE, "invalid_client", 20, ip="203.0.113.5", caller=cli(1))


def resource_server_moves(story: Story) -> None:
    """With introspection it is the resource server whose address is seen."""
    for number in range(1, 6):
        story.use(number, NOON, ip="203.0.113.5", agent="gateway/9", endpoint="introspect")


def office_on_a_monday(story: Story) -> None:
    """Many mistype behind one address, each then signs in."""
    for number in range(30):
        at = NOON + number * 2 * MINUTE
        story.refuse(at, "invalid_password", 2, ip="203.0.113.5", caller=usr(number))
        signed_in(story, number, at + seconds(30))
    story.use(1, NOON + 2 * HOUR)  # by then the counts are recorded


def forgotten_password(story: Story) -> None:
    for number in range(20):
        ip = (HOME, "203.0.113.5", "203.0.114.6", "2a01:4f8:1::7")[number % 4]
        story.refuse(NOON + number * MINUTE, "invalid_password", 1, ip=ip, caller=usr(1))


def forgotten_name(story: Story) -> None:
    story.refuse(NOON, "invalid_password", 15, ip=HOME)


def failures_beside_many_sign_ins(story: Story) -> None:
    """Twelve people sign in for each who fails and gives up."""
    for number in range(30):
        at = NOON + number * MINUTE
        story.refuse(at, "invalid_password", 1, ip=f"203.0.{number}.5", caller=usr(number))
        for other in range(12):
            signed_in(story, 100 + 12 * number + other, at - seconds(60))
    story.use(1, NOON + 2 * HOUR)


def double_click(story: Story) -> None:
    authorized_by(story, 20, NOON, person=1)
    redeemed_at(story, 20, NOON + seconds(1))
    replayed_at(story, 20, NOON + seconds(1.1), raced=True)


def second_tab(story: Story) -> None:
    authorized_by(story, 20, NOON, person=1)
    refused_at(story, 20, NOON + seconds(2))
    refused_at(story, 20, NOON + seconds(3))


def release_that_loses_verifiers(story: Story) -> None:
    """Everybody tries twice."""
    for number in range(12):
        authorized_by(story, 20 + number, NOON + seconds(60 * number), person=number // 2)
        refused_at(story, 20 + number, NOON + seconds(60 * number + 1))


def second_tabs_of_a_busy_client(story: Story) -> None:
    for number in range(150):
        at = NOON + seconds(60 * number)
        authorized_by(story, 20 + number, at, person=number)
        if number % 30:
            redeemed_at(story, 20 + number, at + seconds(1))
        else:
            refused_at(story, 20 + number, at + seconds(1))


def page_loaded_again(story: Story) -> None:
    for number in range(4):
        authorized_by(story, 20 + number, NOON + number * MINUTE, person=1, challenge="c" * 43)
    for number in (2, 3):
        authorized_by(story, 30 + number, NOON + 5 * MINUTE, person=number, challenge="c" * 43)


NOT_FOUND = [
    *(office_on_a_monday, forgotten_password, forgotten_name, failures_beside_many_sign_ins),
    *(double_click, second_tab, second_tabs_of_a_busy_client, release_that_loses_verifiers, page_loaded_again),
    *(replay_within_the_window, old_token_at_home, phone_wakes_up_elsewhere, deployment, move_to_another_cloud),
    *(roaming_phone, one_phone_on_two_networks, office, runners, first_runners, hourly_job, many_at_once),
    first_use_comes_too_late,
    *(nightly_job_with_more_to_do, load_test),
    *(retries, rotation, monthly_job, seldom_used, first_use_ever, upgrade_of_the_agent, tools_of_one_person),
    *(missing_scope, missing_scope_on_new_machines, noisy_gateway, old_secret, resource_server_moves),
]


@pytest.mark.parametrize("scene", NOT_FOUND, ids=[scene.__name__ for scene in NOT_FOUND])
def test_look_alike_is_not_found(tmp_path: Path, scene: Scene) -> None:
    story = Story()
    scene(story)
    store = story.store(tmp_path)
    try:
        assert [(one.rule.name, one.at, dict(one.counts)) for one in look(store)] == []
    finally:
        store.close()
