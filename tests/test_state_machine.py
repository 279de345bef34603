"""Issue, refresh, revoke, disable, validate and trim in any order, against a model too simple to be wrong.

What is under test: the rules, the folds, the bytes, and the view in real LMDB, its writer in another process. The log
is a list with compare-and-set. Hypothesis prints the steps that fail, and a blob that repeats them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from events.streams import LEDGER
from events.types import (
    ClientDisabled,
    ClientRevoked,
    Kind,
    LedgerEvent,
    Reason,
    SubjectRevoked,
    TokenIssued,
    TokenRefreshed,
    UserDisabled,
)
from projections import grants
from projections.base import boot_time_ns
from projections.current import CurrentReader, HeldView, view_path
from projections.grants import EMPTY, Family, facts
from service.errors import Gone, InvalidGrant, InvalidRequest, NotFound
from service.rules.grants import (
    AnsweredAgain,
    Refresh,
    ReuseDetected,
    RevokeGrant,
    RevokeToken,
    Rotated,
    RotateToken,
    Stamp,
    check_refreshable,
    decide_refresh,
    decide_revoke_grant,
    decide_revoke_token,
    decide_rotate,
)
from service.validation import Asked, evaluate
from tests.making import START, History, cli, grt, head, issued, minted, sha256_of, subject_of, tok, usr
from tests.other_process import Remote

WINDOW = timedelta(seconds=10)
IDLE = timedelta(days=2)
LIFE = timedelta(days=6)
ACCESS_TTL = timedelta(hours=1)
PAT_TTL = timedelta(days=4)
KEPT = timedelta(days=7)

# Files in memory where there are any: an example makes three, and whether they survive a power cut is not asked here.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
OWNERS_MAX = 4
OWNERS = st.integers(1, OWNERS_MAX)
RARELY = st.sampled_from([False] * 7 + [True])
MOMENTS = st.sampled_from([0, 1, 9, 10, 11, 60, 1800, 3600, 43_200, 86_400, 3 * 86_400, 8 * 86_400]).map(
    lambda seconds: timedelta(seconds=seconds)
)
# (which link from the end, how many at once, how long after it) one after the other
PRESENTATIONS = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 1, 9.999, 10, 11])), min_size=1, max_size=4
)


# The model: sets and lists, and the sentences of the contract.


@dataclass
class ModelGrant:
    client: str | None
    subject: str
    began: int
    ends_at: datetime | None = None
    chain: list[str] = field(default_factory=list)
    answers: list[tuple[str, ...]] = field(default_factory=list)  # what each spent link was answered with
    spent_at: datetime | None = None
    revoked: bool = False
    tokens: list[str] = field(default_factory=list)


@dataclass
class ModelToken:
    grant: str
    kind: Kind
    expires_at: datetime
    revoked: bool = False
    trimmed: bool = False


class Model:
    def __init__(self) -> None:
        self.grants: dict[str, ModelGrant] = {}
        self.tokens: dict[str, ModelToken] = {}
        self.revoked_at: dict[str, int] = {}
        self.disabled: set[str] = set()

    def is_revoked(self, grant: ModelGrant) -> bool:
        owners = {grant.client, grant.subject} - {None}
        return grant.revoked or any(self.revoked_at.get(owner or "", 0) > grant.began for owner in owners)

    def code(self, token_id: str, now: datetime) -> str:
        token = self.tokens[token_id]
        grant = self.grants[token.grant]
        if token.trimmed:
            return "unknown"
        spent = token.kind is Kind.REFRESH and token_id in grant.chain[:-1]
        if token.revoked or self.is_revoked(grant) or spent:
            return "revoked"
        if grant.client in self.disabled:
            return "client_disabled"
        if grant.subject in self.disabled:
            return "subject_disabled"
        return "expired" if now >= token.expires_at else "valid"

    def refresh(self, token_id: str, now: datetime) -> str:
        """What becomes of a presented refresh token."""
        token = self.tokens[token_id]
        grant = self.grants[token.grant]
        if token.trimmed or self.is_revoked(grant) or {grant.client, grant.subject} & self.disabled:
            return "refused"
        if grant.ends_at is None or now >= grant.ends_at:
            return "refused"
        if grant.chain[-1] == token_id:
            return "rotated" if now < token.expires_at else "refused"
        if grant.chain[-2] == token_id and grant.spent_at is not None and now < grant.spent_at + WINDOW:
            return "again"
        return "reuse"

    def trim(self, now: datetime) -> None:
        for token in self.tokens.values():
            if _minute(token.expires_at + KEPT) <= _minute(now):
                token.trimmed = True

    def forgotten(self, grant_id: str) -> bool:
        return all(self.tokens[token_id].trimmed for token_id in self.grants[grant_id].tokens)


def _minute(moment: datetime) -> int:
    return int(moment.timestamp()) // 60


# The log: a list with compare-and-set.


class Conflict(Exception):
    """Another event came first on the subject."""


class Log(History):
    def append(self, events: tuple[LedgerEvent, ...], expected: int | None, at: datetime) -> None:
        subject = subject_of(events[0])
        last = max((found.seq for found in self.recorded if found.subject == subject), default=0)
        if expected is not None and expected != last:
            raise Conflict
        self.add(*events, at=at)

    def family(self, grant_id: str) -> Family:
        family = EMPTY
        for recorded in self.recorded:
            if getattr(recorded.event, "grant_id", None) == grant_id:
                family = grants.evolve(family, recorded)
        return family


@pytest.fixture(scope="module")
def processes() -> Iterator[None]:
    """One process for the writers of all examples: a process a step would take minutes."""
    directory = Path(tempfile.mkdtemp(dir=MEMORY))
    with Remote("projections.current:CurrentWriter", directory / "first" / "view.mdb") as writer:
        LedgerMachine.writer = writer
        yield
    shutil.rmtree(directory)


class LedgerMachine(RuleBasedStateMachine):
    """After every step the view is at the end of the log, as it is on the host that answered."""

    writer: Remote
    tokens = Bundle("tokens")
    refreshables = Bundle("refreshables")
    personal = Bundle("personal")

    @initialize(target=refreshables, user=st.integers(0, 2))
    def start(self, user: int) -> str:
        """An empty log, and one grant to begin with."""
        self.directory = Path(tempfile.mkdtemp(dir=MEMORY))
        self.path = view_path(self.directory)
        self.writer.call("close")
        self.writer.call("__init__", self.path, sync=False)
        self.reader = CurrentReader(self.path)
        self.now = START
        self.log = Log()
        self.model = Model()
        self.projected = 0
        self.numbers = 0
        self.was_revoked: set[str] = set()
        self.handed_out: dict[str, tuple[str, ...]] = {}  # answer id → tokens, as sealed in the bucket
        return self.begin_family(1, user)

    def teardown(self) -> None:
        if not hasattr(self, "reader"):
            return
        try:
            self.replay_equals_live()
        finally:
            self.reader.close()
            shutil.rmtree(self.directory)

    # Helpers

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def stamp(self) -> Stamp:
        return Stamp(tuple(f"{self.number():032x}" for _ in range(2)), self.now, "system", None)

    def project(self) -> None:
        messages = self.log.raw(self.projected)
        if messages:
            self.writer.call("apply", LEDGER, messages)
            self.projected = self.log.end

    def new_token(self, grant_id: str, kind: Kind, ends: datetime, number: int) -> str:
        token_id = tok(number)
        self.model.tokens[token_id] = ModelToken(grant_id, kind, ends)
        self.model.grants[grant_id].tokens.append(token_id)
        return token_id

    # Issue

    @rule(target=tokens, owner=OWNERS)
    def issue_access_token(self, owner: int) -> str:
        """By client credentials, on the client's own subject."""
        grant_id = grt(self.number())
        self.model.grants[grant_id] = ModelGrant(cli(owner), cli(owner), self.log.end + 1)
        ends = self.now + ACCESS_TTL
        token_id = self.new_token(grant_id, Kind.ACCESS, ends, self.number())
        event = issued(grant_id, minted(token_id, expires_at=ends), client_id=cli(owner), occurred_at=self.now)
        self.log.append((event,), None, self.now)
        self.project()
        return token_id

    @rule(target=refreshables, owners=st.lists(st.tuples(OWNERS, st.integers(0, 2)), min_size=1, max_size=3))
    def issue_with_refresh_token(self, owners: list[tuple[int, int]]) -> Any:
        """By a client for itself or for a user."""
        return multiple(*(self.begin_family(owner, user) for owner, user in owners))

    def begin_family(self, owner: int, user: int) -> str:
        grant_id, subject = grt(self.number()), usr(user) if user else cli(owner)
        grant = ModelGrant(cli(owner), subject, self.log.end + 1, self.now + LIFE)
        self.model.grants[grant_id] = grant
        access = self.new_token(grant_id, Kind.ACCESS, self.now + ACCESS_TTL, self.number())
        refresh = self.new_token(grant_id, Kind.REFRESH, self.now + IDLE, self.number())
        grant.chain.append(refresh)
        event = issued(
            grant_id,
            minted(access, expires_at=self.now + ACCESS_TTL),
            minted(refresh, Kind.REFRESH, expires_at=self.now + IDLE),
            client_id=cli(owner),
            subject=subject,
            refresh_ends_at=grant.ends_at,
            occurred_at=self.now,
        )
        self.log.append((event,), 0, self.now)
        self.project()
        return refresh

    @rule(target=personal, user=OWNERS)
    def issue_personal_token(self, user: int) -> str:
        grant_id = grt(self.number())
        self.model.grants[grant_id] = ModelGrant(None, usr(user), self.log.end + 1)
        ends = self.now + PAT_TTL
        token_id = self.new_token(grant_id, Kind.PAT, ends, self.number())
        event = issued(
            grant_id,
            minted(token_id, Kind.PAT, expires_at=ends),
            client_id=None,
            subject=usr(user),
            occurred_at=self.now,
        )
        self.log.append((event,), 0, self.now)
        self.project()
        return token_id

    # Refresh, as service/refresh.py does it

    def present(self, token_id: str, seen: Family, client: str) -> tuple[str, tuple[str, ...]]:
        """How it ended, and the tokens that were handed out."""
        grant_id = self.model.tokens[token_id].grant
        for attempt in range(4):
            family = seen if attempt == 0 else self.log.family(grant_id)
            access, refresh = tok(self.number()), tok(self.number())
            answer_id = f"{self.number():032x}"
            ends_at = self.model.grants[grant_id].ends_at or self.now
            command = Refresh(
                stamp=self.stamp(),
                grant_id=grant_id,
                token_id=token_id,
                client_id=client,
                tokens=(
                    minted(access, expires_at=self.now + ACCESS_TTL),
                    minted(refresh, Kind.REFRESH, expires_at=min(self.now + IDLE, ends_at)),
                ),
                answer_id=answer_id,
                retry_window=WINDOW,
            )
            known = facts(family.grant)
            subject_cut = self.reader.cut(known.subject) if known is not None and known.subject != client else None
            try:
                _, chain = check_refreshable(
                    command, family, client_cut=self.reader.cut(client), subject_cut=subject_cut
                )
            except InvalidGrant:
                return "refused", ()
            if attempt == 0 and chain.current != token_id:
                continue
            decision = decide_refresh(command, chain)
            expected = None if isinstance(decision, AnsweredAgain) else family.seq
            try:
                self.log.append(decision.events, expected, self.now)
            except Conflict:
                continue
            match decision:
                case Rotated():
                    self.handed_out[answer_id] = (access, refresh)
                    return "rotated", (access, refresh)
                case AnsweredAgain():
                    return "again", self.handed_out[decision.answer_id]
                case ReuseDetected():
                    return "reuse", ()
        raise AssertionError("four conflicts in a row")

    def seen(self, token_id: str) -> Family:
        return self.reader.family(self.model.tokens[token_id].grant, (token_id,))

    def took_place(self, token_id: str, outcome: str, handed: tuple[str, ...]) -> None:
        """Brings the model up to date with one presentation."""
        grant_id = self.model.tokens[token_id].grant
        grant = self.model.grants[grant_id]
        if outcome == "rotated":
            access, refresh = handed
            self.model.tokens[access] = ModelToken(grant_id, Kind.ACCESS, self.now + ACCESS_TTL)
            ends = min(self.now + IDLE, grant.ends_at or self.now)
            self.model.tokens[refresh] = ModelToken(grant_id, Kind.REFRESH, ends)
            grant.tokens += [access, refresh]
            grant.chain.append(refresh)
            grant.answers.append(handed)
            grant.spent_at = self.now
        elif outcome == "again":
            assert handed == grant.answers[-1]
        elif outcome == "reuse":
            grant.revoked = True

    @rule(target=refreshables, number=st.integers(0, 9), presentations=PRESENTATIONS)
    def refresh(self, number: int, presentations: list[tuple[int, int, float]]) -> Any:
        """Links of one chain, the last or one before it, one after the other. Of a live grant, if any."""
        families = [grant for grant in self.model.grants.values() if grant.chain]
        living = [grant for grant in families if self.model.refresh(grant.chain[-1], self.now) != "refused"]
        chain = (living or families)[number % len(living or families)].chain
        new = []
        for link, callers, seconds in presentations:
            new += self.present_at_once(chain[-min(link, len(chain))], callers)
            self.now += timedelta(seconds=seconds)
        return multiple(*new)

    def present_at_once(self, token_id: str, callers: int) -> list[str]:
        """One token, by several who all saw the same view; the refresh tokens that came of it, at most one."""
        client = self.model.grants[self.model.tokens[token_id].grant].client
        assert client is not None
        seen = self.seen(token_id)
        new = []
        for _ in range(callers):
            wanted = self.model.refresh(token_id, self.now)
            outcome, handed = self.present(token_id, seen, client)
            assert outcome == wanted
            self.took_place(token_id, outcome, handed)
            if outcome == "rotated":
                new.append(handed[1])
        assert len(new) <= 1
        self.project()
        return new

    @rule(token_id=refreshables)
    def refresh_by_another_client(self, token_id: str) -> None:
        client = self.model.grants[self.model.tokens[token_id].grant].client
        before = self.log.end
        other = next(cli(number) for number in range(1, OWNERS_MAX + 1) if cli(number) != client)
        assert self.present(token_id, self.seen(token_id), other) == ("refused", ())
        assert self.log.end == before

    @rule(token_id=refreshables, of=st.sampled_from(["client", "subject"]), disables=RARELY)
    def refresh_races_a_cut(self, token_id: str, of: str, *, disables: bool) -> None:
        """The cut is in the log and this host's view does not show it yet: the refresh carries nothing across."""
        grant = self.model.grants[self.model.tokens[token_id].grant]
        owner = grant.client if of == "client" else grant.subject
        assert owner is not None
        wanted = self.model.refresh(token_id, self.now)
        seen = self.seen(token_id)
        self.cut(owner, disables=disables)
        outcome, handed = self.present(token_id, seen, grant.client or "")
        assert outcome == wanted
        self.took_place(token_id, outcome, handed)
        self.project()
        assert all(self.view_code(one) != "valid" for one in handed)

    # Revoke and disable

    @rule(token_id=st.one_of(tokens, refreshables, personal))
    def revoke_token(self, token_id: str) -> None:
        token = self.model.tokens[token_id]
        grant = self.model.grants[token.grant]
        family = self.seen(token_id)
        command = RevokeToken(stamp=self.stamp(), grant_id=token.grant, token_id=token_id, reason=Reason.ADMIN)
        if token.trimmed:
            with pytest.raises(NotFound):
                decide_revoke_token(command, family)
            return
        events = decide_revoke_token(command, family)
        assert len(events) == (not token.revoked and not grant.revoked)
        if events:
            self.log.append(tuple(events), family.seq, self.now)
        if token.kind is Kind.REFRESH:
            grant.revoked = True
        elif not grant.revoked:
            token.revoked = True
        self.project()
        assert self.view_code(token_id) == "revoked"

    @rule(token_id=st.one_of(tokens, refreshables, personal))
    def revoke_grant(self, token_id: str) -> None:
        grant_id = self.model.tokens[token_id].grant
        grant = self.model.grants[grant_id]
        family = self.reader.family(grant_id)
        command = RevokeGrant(stamp=self.stamp(), grant_id=grant_id, reason=Reason.ABUSE)
        if self.model.forgotten(grant_id):
            with pytest.raises(NotFound):
                decide_revoke_grant(command, family)
            return
        events = decide_revoke_grant(command, family)
        assert len(events) == (not grant.revoked)
        if events:
            self.log.append(tuple(events), family.seq, self.now)
        grant.revoked = True
        self.project()

    def cut(self, owner: str, *, disables: bool) -> None:
        event: LedgerEvent
        if owner.startswith("cli_"):
            kind: Any = ClientDisabled if disables else ClientRevoked
            event = kind(**head(self.now), client_id=owner, reason=Reason.ADMIN)
        else:
            kind = UserDisabled if disables else SubjectRevoked
            event = kind(**head(self.now), user_id=owner, reason=Reason.ADMIN)
        self.log.append((event,), None, self.now)
        if disables:
            self.model.disabled.add(owner)
        else:
            self.model.revoked_at[owner] = self.log.end

    @rule(owner=OWNERS, of=st.sampled_from([cli, usr]))
    def revoke_owner(self, owner: int, of: Any) -> None:
        self.cut(of(owner), disables=False)
        self.project()

    @rule(owner=OWNERS, of=st.sampled_from([cli, usr]), sure=RARELY)
    def disable_owner(self, owner: int, of: Any, *, sure: bool) -> None:
        """For good, so not too often."""
        if sure:
            self.cut(of(owner), disables=True)
            self.project()

    # Rotate

    @rule(target=personal, token_id=consumes(personal), overlap=MOMENTS)
    def rotate(self, token_id: str, overlap: timedelta) -> Any:
        token = self.model.tokens[token_id]
        family = self.seen(token_id)
        grant_id, number = grt(self.number()), self.number()
        successor = minted(tok(number), Kind.PAT, expires_at=self.now + PAT_TTL)
        command = RotateToken(
            stamp=self.stamp(),
            grant_id=token.grant,
            token_id=token_id,
            successor_grant_id=grant_id,
            successor=successor,
            overlap=overlap,
            sealed_name=None,
        )
        grant = self.model.grants[token.grant]
        over = token.trimmed or token.revoked or grant.revoked or self.now >= token.expires_at
        try:
            begun, superseded = decide_rotate(command, family, now=self.now)
        except (Gone, NotFound, InvalidRequest):
            assert over
            return multiple()
        assert not over
        self.log.append((begun,), 0, self.now)
        self.log.append((superseded,), family.seq, self.now)
        token.expires_at = min(token.expires_at, self.now + overlap)
        self.model.grants[grant_id] = ModelGrant(None, grant.subject, self.log.end - 1)
        self.new_token(grant_id, Kind.PAT, self.now + PAT_TTL, number)
        self.project()
        return tok(number)

    # Time, and what happens to the view

    @rule(by=MOMENTS)
    def time_passes(self, by: timedelta) -> None:
        self.now += by

    @rule(rows_max=st.sampled_from([1, 2, 500]))
    def trim(self, rows_max: int) -> None:
        while self.writer.call("trim", self.now, rows_max=rows_max):
            pass
        self.model.trim(self.now)

    @rule()
    def restart_the_writer(self) -> None:
        self.writer.call("close")
        self.writer.call("__init__", self.path, sync=False)
        assert self.writer.call("position", LEDGER) == self.projected

    @rule(back=st.integers(1, 20))
    def apply_again(self, back: int) -> None:
        before = self.writer.call("dump")
        self.writer.call("apply", LEDGER, self.log.raw(max(0, self.log.end - back)))
        assert before == self.writer.call("dump")

    @rule()
    def rebuild(self) -> None:
        """Replayed into another file, which takes the place of this one under its writer and its reader."""
        built = self.path.with_name(f"built{self.number()}")
        self.writer.call("close")
        self.writer.call("__init__", built, sync=False)
        self.writer.call("apply", LEDGER, self.log.raw())
        while self.writer.call("trim", self.now):
            pass
        self.model.trim(self.now)
        self.writer.call("close")
        self.reader.close()
        with HeldView(self.path) as held:
            held.replace_by(built)
        self.reader = CurrentReader(self.path)
        self.writer.call("__init__", self.path, sync=False)

    # What must hold after every step

    def view_code(self, token_id: str) -> str:
        hit, _ = self.reader.look_up(sha256_of(token_id))
        return "unknown" if hit is None else evaluate(hit, Asked(), self.now).value

    @invariant()
    def view_says_what_the_model_says(self) -> None:
        if not hasattr(self, "model"):
            return
        codes = {token_id: self.view_code(token_id) for token_id in self.model.tokens}
        for token_id, token in self.model.tokens.items():
            remembered = token.trimmed and codes[token_id] != "valid"  # by the reader, until the next event
            assert remembered or codes[token_id] == self.model.code(token_id, self.now)
        # What was revoked once is never anything else again, until it is forgotten.
        for token_id in self.was_revoked:
            assert codes[token_id] in {"revoked", "unknown"}
        self.was_revoked |= {token_id for token_id, code in codes.items() if code == "revoked"}

    @invariant()
    def every_family_is_one_linear_chain(self) -> None:
        if not hasattr(self, "log"):
            return
        spent: Counter[str] = Counter()
        current: dict[str, str] = {}
        for recorded in self.log.recorded:
            event = recorded.event
            if isinstance(event, TokenIssued | TokenRefreshed):
                if isinstance(event, TokenRefreshed):
                    assert current[event.grant_id] == event.spent_token_id
                    spent[event.spent_token_id] += 1
                for token in event.tokens:
                    if token.kind is Kind.REFRESH:
                        current[event.grant_id] = token.token_id
        assert all(count == 1 for count in spent.values())
        assert all(grant.chain[-1] == current[name] for name, grant in self.model.grants.items() if grant.chain)

    @invariant()
    def tokens_are_listed_under_their_owners(self) -> None:
        if not hasattr(self, "model"):
            return
        for number in range(1, OWNERS_MAX + 1):
            wanted = sorted(
                token_id
                for token_id, token in self.model.tokens.items()
                if not token.trimmed and self.model.grants[token.grant].client == cli(number)
            )
            assert wanted == self.reader.token_ids(client_id=cli(number))

    def replay_equals_live(self) -> None:
        """Row for row, both trimmed at the same time; and a view that nobody confirms is not fresh."""
        self.project()
        while self.writer.call("trim", self.now):
            pass
        live = self.writer.call("dump")
        self.writer.call("close")
        self.writer.call("__init__", self.directory / "replay" / "view.mdb", sync=False)
        if self.log.end:
            self.writer.call("apply", LEDGER, self.log.raw())
            while self.writer.call("trim", self.now):
                pass
        assert live == self.writer.call("dump")
        assert self.reader.freshness().age_seconds == float("inf")
        assert boot_time_ns() > 0


@pytest.mark.usefixtures("processes")
class TestLedger(LedgerMachine.TestCase):
    settings = settings(
        max_examples=80,
        stateful_step_count=35,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
