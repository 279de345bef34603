"""Histories of uses for tests of abuse: written as blocks, read from a real analytics store, looked at by the rules."""

from __future__ import annotations

import random
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from events import codec
from events.streams import LEDGER, USAGE, RawMessage
from events.types import Context, Kind, LedgerEvent, RefusedCount, TokenUsed, UseBlock
from projections.abuse import feed
from projections.abuse.detector import Detector, Found
from projections.abuse.rules import Rule, all_rules
from projections.analytics import Analytics, open_analytics
from tests.making import History, cli, grt, issued, minted, tok, usr

START = datetime(2026, 10, 1, tzinfo=UTC)
HOUR, MINUTE = timedelta(hours=1), timedelta(minutes=1)
DAYS = 5  # of usual uses before the one that a test is about
HOME, AGENT = "198.51.100.7", "shop/1.4"


def micros(moment: datetime) -> int:
    return int((moment - START) / timedelta(microseconds=1)) + int(START.timestamp()) * 1_000_000


class Story:
    """Tokens of two people, a service and a client, all used some times a day from home; then what a test adds.

    1, 2: PATs of person 1; 3: PAT of person 2; 4: SAT of service 4; 5: access token of client 1; 6: a PAT of person 6
    that nobody has used.
    """

    def __init__(self) -> None:
        self.ledger = History()
        self.uses: list[TokenUsed] = []
        self.refused: list[RefusedCount] = []
        for number, kind, owner in (
            (1, Kind.PAT, usr(1)),
            (2, Kind.PAT, usr(1)),
            (3, Kind.PAT, usr(2)),
            (4, Kind.SAT, usr(4)),
            (5, Kind.ACCESS, cli(1)),
            (6, Kind.PAT, usr(6)),
        ):
            client = cli(1) if kind is Kind.ACCESS else None
            self.issue(number, kind, owner, client)
        for day in range(DAYS):
            for number in range(1, 6):
                for hour in range(8, 18):
                    self.use(number, START + timedelta(days=day, hours=hour, seconds=number))

    def issue(self, number: int, kind: Kind, subject: str, client_id: str | None = None, at: datetime = START) -> None:
        event = issued(
            grt(number),
            minted(tok(number), kind, expires_at=START + timedelta(days=90)),
            subject=subject,
            client_id=client_id,
            occurred_at=at,
        )
        self.ledger.add(event, at=at)

    def use(
        self,
        number: int,
        at: datetime,
        *,
        ip: str | None = HOME,
        agent: str | None = AGENT,
        outcome: str = "valid",
        endpoint: str = "forward-auth",
        scope: str = "",
    ) -> None:
        context = Context(ip, agent, "GET", "/")
        self.uses.append(TokenUsed(micros(at), tok(number), None, outcome, endpoint, "", scope, "", context))

    def refuse(self, at: datetime, outcome: str, requests: int, *, ip: str | None = None, caller: str = "") -> None:
        endpoint = "validate" if caller else "forward-auth"
        endpoint = {"invalid_client": "client", "invalid_password": "sign-in"}.get(outcome, endpoint)
        self.refused.append(RefusedCount(micros(at) // 60_000_000, caller, ip, outcome, endpoint, requests))

    def record(self, *events: LedgerEvent, at: datetime) -> None:
        self.ledger.add(*events, at=at)

    def blocks(self, *, most: int = 500) -> list[UseBlock]:
        """The uses in the order of their times; counts come with the first block after their minute is over."""
        uses = sorted(self.uses, key=lambda use: use.occurred_at_us)
        refused = sorted(self.refused, key=lambda count: count.minute)
        made = []
        for index in range(0, len(uses), most):
            part = uses[index : index + most]
            due = [count for count in refused if (count.minute + 1) * 60_000_000 <= part[-1].occurred_at_us]
            refused = refused[len(due) :]
            made.append(block(part, due))
        return [*made, block([], refused)] if refused else made

    def store(self, directory: Path, blocks: Iterable[UseBlock] | None = None) -> Analytics:
        """A store with all of it. The caller closes it."""
        opened = open_analytics(directory)
        opened.apply(LEDGER, self.ledger.raw())
        opened.apply(USAGE, messages(self.blocks() if blocks is None else blocks))
        opened.flush()
        return opened


def block(uses: Iterable[TokenUsed], refused: Iterable[RefusedCount] = ()) -> UseBlock:
    return UseBlock(block_id=f"{random.getrandbits(64):x}", writer="w", uses=tuple(uses), refused=tuple(refused))


def messages(blocks: Iterable[UseBlock]) -> list[RawMessage]:
    """As the stream has them: recorded when the last use of the block occurred."""
    made, at_us = [], micros(START)
    for seq, one in enumerate(blocks, 1):
        at_us = max([at_us, *(use.occurred_at_us for use in one.uses)])
        made.append(RawMessage(seq, at_us * 1000, "usage.main.w", codec.encode_block(one)))
    return made


def look(
    store: Analytics, rules: Iterable[Rule] | None = None, *, steps: list[int] | None = None, **limits: int
) -> list[Found]:
    """What the rules find in all of the store; `steps`: positions of USAGE at which they look; `limits` of Detector."""
    detector = Detector(all_rules().values() if rules is None else rules, b"salt", **limits)
    found, usage, ledger = [], 0, 0
    end = store.position(LEDGER)
    try:
        with store.cursor() as cursor:
            for until in [*(steps or []), store.position(USAGE)]:
                fresh = feed.recorded(cursor, detector, usage=(usage, until), ledger=(ledger, end))
                found += detector.look(fresh)
                usage, ledger = until, end
    finally:
        detector.close()
    return found


def named(found: Iterable[Found]) -> set[tuple[str, str | None]]:
    """Rule and token of each."""
    return {(one.rule.name, one.about.get("token_id")) for one in found}


def facts(found: Iterable[Found]) -> list[str]:
    """All that the findings say, to be compared."""
    return sorted(f"{one.at} {one.rule.name} {codec.encode(one.event(START)).decode()}" for one in found)
