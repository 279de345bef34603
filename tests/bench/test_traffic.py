"""Issue 3, item 7: the simulated history is one that the service could have recorded, and its labels are true."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace

from events import codec
from events.types import (
    AuthorizationGranted,
    ClientRegistered,
    CodeRedeemed,
    CodeRefused,
    CodeReplayed,
    GrantRevoked,
    LedgerEvent,
    Reason,
    RefreshReplayed,
    TokenIssued,
    TokenRefreshed,
    TokenRevoked,
    TokenSuperseded,
    UserRegistered,
)
from projections.current import Hit
from projections.grants import ActiveGrant, Ended, Token
from service.rules.codes import RACE, REFUSALS_MAX
from service.validation import Asked, evaluate
from tests import running
from tests.bench.behaviour import Entry, Refusal
from tests.bench.labels import DORMANT, NEW_NETWORK, RULES, Label
from tests.bench.people import DAY, HOUR, PRESETS, SECOND, Size, is_workday, local_hour, moment
from tests.bench.places import family, network_of
from tests.bench.traffic import Traffic

START = datetime(2026, 3, 2, tzinfo=UTC)  # a Monday
SMALL = Size(seed=11, start=START, days=21, clients=24, tokens=800, uses=60_000, attacks_per_rule=3)


class Made:
    """One history, kept whole."""

    def __init__(self, size: Size) -> None:
        self.traffic = Traffic(size)
        self.entries: list[Entry] = []
        self.refusals: list[Refusal] = []
        self.held_max = 0
        for _, entries, refusals in self.traffic.hours():
            self.entries += entries
            self.refusals += refusals
            self.held_max = max(self.held_max, self.traffic.behaviour.held)
        self.entries.sort(key=lambda entry: entry[0])

    def of(self, label: Label) -> list[Entry]:
        return [entry for entry in self.entries if entry[2] == label.number]


@pytest.fixture(scope="module")
def made() -> Made:
    return Made(SMALL)


def digest_of(size: Size) -> str:
    """Of all its bytes."""
    traffic, digest = Traffic(size), hashlib.sha256()
    for append in traffic.ledger():
        digest.update(append.subject.encode() + codec.encode(append.event))
    for block in traffic.blocks():
        digest.update(codec.encode_block(block))
    return digest.hexdigest()


def test_history_of_the_same_size_is_the_same_bytes_and_of_another_seed_is_not() -> None:
    tiny = replace(SMALL, uses=40_000, tokens=600, attacks_per_rule=1)
    assert digest_of(tiny) == digest_of(tiny)
    others = [replace(tiny, seed=12), replace(tiny, preset=PRESETS["tuning"])]
    assert len({digest_of(size) for size in [tiny, *others]}) == 3


_PRINT_DIGEST = """
from tests.bench.test_traffic import SMALL, digest_of
from msgspec.structs import replace
print(digest_of(replace(SMALL, uses=40_000, tokens=600, attacks_per_rule=1)))
"""


def test_history_is_the_same_in_every_process() -> None:
    """Python orders sets of strings anew in each."""
    printed = {
        subprocess.run(
            [sys.executable, "-c", _PRINT_DIGEST],
            cwd=running.ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def test_blocks_hold_exactly_what_was_asked_for_and_survive_the_codec() -> None:
    traffic = Traffic(SMALL)
    blocks = list(traffic.blocks())
    assert all(codec.decode_block(codec.encode_block(block)) == block for block in blocks)
    assert sum(len(block.uses) for block in blocks) == SMALL.uses == traffic.writers.uses
    assert len(traffic.population.tokens) == SMALL.tokens
    assert traffic.writers.blocks == len(blocks)
    counts = [count for block in blocks for count in block.refused]
    assert (sum(count.count for count in counts), len(counts)) == (
        traffic.writers.refused_requests,
        traffic.writers.refused_rows,
    )
    assert {block.writer for block in blocks} == {"sim-a-1", "sim-a-2", "sim-b-1"}


def test_uses_come_in_the_order_of_their_time_but_for_the_writer_whose_clock_is_wrong() -> None:
    traffic, late = Traffic(SMALL), Counter[str]()
    newest: dict[str, int] = defaultdict(int)
    for block in traffic.blocks():
        for use in block.uses:
            late[block.writer] += use.occurred_at_us < newest[block.writer]
            newest[block.writer] = max(newest[block.writer], use.occurred_at_us)
    assert (late["sim-a-1"], late["sim-b-1"]) == (0, 0)
    assert traffic.writers.skewed > 0


def test_nobody_is_given_a_token_before_being_registered(made: Made) -> None:
    known: dict[str, datetime] = {}
    grants: set[str] = set()
    for append in made.traffic.ledger():
        event = append.event
        match event:
            case UserRegistered():
                known[event.user_id] = event.occurred_at
            case ClientRegistered():
                known[event.client_id] = event.occurred_at
            case TokenIssued() | AuthorizationGranted():
                assert known[event.subject] <= event.occurred_at
                assert event.client_id is None or known[event.client_id] <= event.occurred_at
                grants.add(event.grant_id)
            case (
                TokenRefreshed() | RefreshReplayed() | TokenRevoked() | TokenSuperseded() | GrantRevoked()
                | CodeRedeemed() | CodeRefused() | CodeReplayed()
            ):  # fmt: skip
                assert event.grant_id in grants


class Known:
    """Tokens as their events tell of them: what `evaluate` is asked about."""

    def __init__(self, traffic: Traffic) -> None:
        self.tokens: dict[str, tuple[Token, str]] = {}
        self.issued: dict[str, datetime] = {}
        self.ends: list[tuple[datetime, str, str]] = []  # when, token or grant, its id
        self.superseded: dict[str, tuple[datetime, datetime]] = {}
        for append in traffic.ledger():
            event = append.event
            match event:
                case TokenIssued() | CodeRedeemed() | TokenRefreshed():
                    for minted in event.tokens:
                        row = Token(
                            b"", minted.kind, b"", event.occurred_at, minted.expires_at, 1,
                            None, minted.scope, minted.audience,
                        )  # fmt: skip
                        self.tokens[minted.token_id] = (row, event.grant_id)
                case TokenRevoked():
                    self.ends.append((event.occurred_at, "token", event.token_id))
                case GrantRevoked():
                    self.ends.append((event.occurred_at, "grant", event.grant_id))
                case TokenSuperseded():
                    self.superseded[event.token_id] = (event.occurred_at, event.ends_at)
        self.ended_at = {name: at for at, _, name in reversed(self.ends)}

    def code(self, token_id: str, at: datetime, scope: str, audience: str) -> str:
        token, grant_id = self.tokens[token_id]
        assert token.issued_at <= at, "used before it was issued"
        ended = min((self.ended_at[name] for name in (token_id, grant_id) if name in self.ended_at), default=None)
        if ended is not None and ended <= at:
            token = replace(token, ended=Ended(1, ended, Reason.ADMIN))
        since, ends_at = self.superseded.get(token_id, (None, None))
        if since is not None and ends_at is not None and since <= at:
            token = replace(token, expires_at=min(token.expires_at, ends_at))
        grant = ActiveGrant("usr", None, "", (), 1)
        asked = Asked(scope, (audience,) if audience else ())
        return evaluate(Hit(token_id, token, grant, None, None), asked, at).value


def test_outcomes_are_those_that_validation_gives(made: Made) -> None:
    known, outcomes = Known(made.traffic), Counter[str]()
    for us, rest, _ in made.entries:
        token_id, _, outcome, endpoint, caller, scope, audience, context = rest
        assert outcome == known.code(token_id, moment(us), scope, audience), (us, rest)
        assert (endpoint == "forward-auth") == (caller == ""), rest
        assert context.ip is not None
        outcomes[outcome] += 1
    assert {"valid", "expired", "revoked", "insufficient_scope"} <= outcomes.keys()
    assert outcomes["valid"] > 0.9 * len(made.entries)


def test_days_and_weeks_have_their_shape(made: Made) -> None:
    """Of the people alone: services run at night as well."""
    zones = {
        token.token_id: chain.owner.organisation.zone
        for chain in made.traffic.population.pats
        for _, token in chain.steps
        if hasattr(chain.owner, "organisation")
    }
    workdays, weekends, night = 0, 0, 0
    for us, rest, label in made.entries:
        if label or rest[0] not in zones:
            continue
        zone = zones[rest[0]]
        workday = is_workday(us, zone)
        workdays += workday
        weekends += not workday
        night += local_hour(us, zone) < 5
    assert workdays / 5 > 2 * weekends / 2
    assert night < 0.1 * (workdays + weekends)


def test_few_tokens_make_most_of_the_uses(made: Made) -> None:
    by_token = Counter(rest[0] for _, rest, label in made.entries if not label)
    most = sum(count for _, count in by_token.most_common(len(by_token) // 10))
    assert most > 0.5 * sum(by_token.values())


def test_generation_holds_a_day_and_never_the_history(made: Made) -> None:
    per_day = Counter(us // DAY for us, _, _ in made.entries)
    assert 0 < made.held_max <= 2 * max(per_day.values())


# Labels


def test_every_rule_has_its_attacks_and_no_two_labels_have_one_number(made: Made) -> None:
    assert Counter(label.rule for label in made.traffic.attacks) == dict.fromkeys(RULES, SMALL.attacks_per_rule)
    numbers = [label.number for label in made.traffic.labels]
    assert len(numbers) == len(set(numbers))
    assert all(not label.rule for label in made.traffic.lookalikes)
    assert {
        *("deployment", "proxy change", "load test", "office behind one address", "old client secret", "holiday"),
        *("retries after a revocation", "CI", "monthly job", "mobile network", "clock of a writer"),
    } <= {label.kind for label in made.traffic.lookalikes}


def test_labelled_uses_lie_within_their_label_and_belong_to_its_entities(made: Made) -> None:
    acts = [(one.event.occurred_at, one.event) for one in made.traffic.ledger()]
    for label in made.traffic.attacks:
        uses = made.of(label)
        times = moment(label.first_us), moment(label.end_us)
        of_codes = [
            event
            for at, event in acts
            if isinstance(event, AuthorizationGranted | CodeRefused | CodeReplayed)
            and times[0] <= at <= times[1]
            and event.grant_id in label.entities
        ]
        refusals = [refusal for refusal in made.refusals if refusal[5] == label.number]
        assert label.first_us <= label.start_us <= label.end_us
        assert all(label.first_us <= us <= label.end_us and rest[0] in label.entities for us, rest, _ in uses), label
        assert all(label.first_us <= at <= label.end_us and ip in label.entities for at, _, ip, *_ in refusals), label
        replayed = label.kind == "replayed by the thief"
        assert replayed or label.kind == "replayed by its owner" or uses or refusals or of_codes, label
        if uses and label.first_us == label.start_us:
            assert uses[0][0] == label.start_us


def test_what_becomes_of_codes_is_what_the_service_does_with_them(made: Made) -> None:
    by_grant: dict[str, list[LedgerEvent]] = defaultdict(list)
    for append in made.traffic.ledger():
        event = append.event
        if isinstance(event, AuthorizationGranted | CodeRedeemed | CodeRefused | CodeReplayed | GrantRevoked):
            by_grant[event.grant_id].append(event)
    seen = Counter[str]()
    for events in by_grant.values():
        if not isinstance(events[0], AuthorizationGranted):
            continue
        spent, refused, ended = None, 0, False
        for event in events[1:]:
            assert not ended, events
            match event:
                case CodeRedeemed():
                    assert spent is None
                    assert event.occurred_at < events[0].code.expires_at
                    spent = event.occurred_at
                case CodeReplayed():
                    assert spent is not None
                    assert event.raced == (event.occurred_at < spent + RACE)
                    seen["raced" if event.raced else "replayed"] += 1
                case CodeRefused():
                    refused += 1
                    assert refused <= REFUSALS_MAX
                    assert spent is not None or event.occurred_at < events[0].code.expires_at
                    seen["refused"] += 1
                case GrantRevoked():
                    ended = True
                case _:
                    pass
    assert seen["refused"] > 0


def test_counts_of_labels_are_those_of_their_uses(made: Made) -> None:
    traffic = Traffic(SMALL)
    for _ in traffic.blocks():
        pass
    uses = Counter(label for _, _, label in made.entries)
    assert {label.number: label.uses for label in traffic.labels if label.uses} == {
        number: count for number, count in uses.items() if number
    }


def test_victims_of_two_attacks_are_two(made: Made) -> None:
    tokens = [name for label in made.traffic.attacks for name in label.entities if name.startswith("tok_")]
    callers = {
        gateway.caller for organisation in made.traffic.population.organisations for gateway in organisation.gateways
    }
    taken = [name for name in tokens if name not in callers]
    assert len(taken) == len(set(taken))


def _seen_before(made: Made, label: Label) -> Iterator[Entry]:
    token_ids = {rest[0] for _, rest, _ in made.of(label)}
    return (entry for entry in made.entries if entry[1][0] in token_ids and entry[0] < label.start_us)


def test_stolen_token_comes_from_a_network_and_an_agent_that_it_was_never_seen_with(made: Made) -> None:
    for label in made.traffic.attacks:
        if label.rule == NEW_NETWORK:
            before = [rest[7] for _, rest, _ in _seen_before(made, label)]
            theirs = [rest[7] for _, rest, _ in made.of(label)]
            assert not {network_of(at.ip or "") for at in before} & {network_of(at.ip or "") for at in theirs}
            assert not {family(at.user_agent or "") for at in before} & {family(at.user_agent or "") for at in theirs}


def test_dormant_token_was_used_and_then_slept_for_two_weeks(made: Made) -> None:
    for label in made.traffic.attacks:
        if label.rule == DORMANT:
            last = max((us for us, *_ in _seen_before(made, label)), default=None)
            assert last is None or label.start_us - last >= 13 * DAY, label


def test_look_alikes_share_no_token_with_an_attack(made: Made) -> None:
    attacked = {rest[0] for label in made.traffic.attacks for _, rest, _ in made.of(label)}
    innocent = {rest[0] for label in made.traffic.lookalikes for _, rest, _ in made.of(label)}
    assert not attacked & innocent


def test_history_begins_and_ends_where_it_should(made: Made) -> None:
    first, last = made.entries[0][0], made.entries[-1][0]
    assert SMALL.start_us <= first
    assert last < SMALL.end_us + SECOND
    assert last > SMALL.end_us - HOUR
    assert moment(SMALL.end_us) == START + timedelta(days=SMALL.days)
