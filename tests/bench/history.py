"""A month of uses, as services write them: blocks for USAGE, and the events that issued the tokens.

Services ask from one or a few addresses with an agent whose version changes when they are deployed; people from an
office behind one address, from home, and from phones that change their address several times a day. Few tokens are used
much and many seldom, by day more than by night, and not every token lives for the whole time.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

from events import codec
from events.types import Context, Kind, LedgerEvent, MintedToken, TokenIssued, TokenUsed, UseBlock

END = datetime(2026, 10, 31, tzinfo=UTC)  # past: what was used after it was recorded is taken for used just then
_HOUR_US = 3_600_000_000
_VISITS = 8  # ways in which a token is used on one day: from which address, with which agent, for what
_OUTCOMES = ("valid", "expired", "insufficient_scope", "revoked")
_OUTCOME_SHARES = (0.965, 0.02, 0.01, 0.005)
_BROWSERS = tuple(
    f"Mozilla/5.0 ({system}) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/{version}.0.0.0 Safari/537.36"
    for system in ("Windows NT 10.0; Win64; x64", "Macintosh; Intel Mac OS X 10_15_7", "X11; Linux x86_64")
    for version in range(126, 134)
)
_PHONES = tuple(
    f"{app}/{version}.{patch} ({system})"
    for app in ("shop-ios", "shop-android")
    for system in ("iPhone; iOS 17.4", "Android 14; Pixel 8")
    for version in (7, 8)
    for patch in range(5)
)

Life = Literal["service", "office", "phone"]


@dataclass(frozen=True)
class _Client:
    client_id: str
    life: Life
    weight: float
    endpoint: str
    caller: str
    scopes: tuple[str, ...]
    paths: tuple[tuple[str, str], ...]
    product: str
    office: str


@dataclass
class _Token:
    token_id: str
    subject: str
    kind: Kind
    client: _Client
    weight: float
    first_day: int
    last_day: int
    home: str
    agent: str
    visits: list[tuple[str, Context]] = field(default_factory=list)


class Population:
    """Clients and tokens, the same for the same seed."""

    def __init__(self, *, seed: int, clients: int, tokens: int, days: int) -> None:
        self.days = days
        self.start = END - timedelta(days=days)
        self._rng = random.Random(seed)
        self._clients = [self._client(number) for number in range(clients)]
        weights = [client.weight for client in self._clients]
        owners = self._rng.choices(self._clients, weights, k=tokens)
        self.tokens = [self._token(number, client) for number, client in enumerate(owners)]

    def events(self) -> Iterator[LedgerEvent]:
        """The issue of every token, before the first use."""
        for number, token in enumerate(self.tokens):
            client_id = token.client.client_id if token.kind is Kind.ACCESS else None
            minted = MintedToken(
                token_id=token.token_id,
                sha256=f"{number:064x}",
                kind=token.kind,
                scope=" ".join(token.client.scopes),
                audience=("https://api.example",),
                expires_at=END + timedelta(days=30),
            )
            yield TokenIssued(
                id=f"evt_{number:032x}",
                occurred_at=self.start - timedelta(days=1),
                by=client_id or "system",
                grant_id=f"grt_{number:032x}",
                subject=token.subject,
                client_id=client_id,
                scope=minted.scope,
                audience=minted.audience,
                tokens=(minted,),
            )

    def blocks(self, uses: int, *, block_uses: tuple[int, int] = (1000, 2000)) -> Iterator[tuple[bytes, int]]:
        """So many uses, spread over all days, in blocks of so many at least and at most, each with its size."""
        rng = self._rng
        shares = [1.2 - math.cos((hour - 3) / 12 * math.pi) for hour in range(24)] * self.days
        ends = [round(uses * part / sum(shares)) for part in itertools.accumulate(shares)]
        begin = 0
        alive: list[_Token] = []
        for hour, end in enumerate(ends):
            if hour % 24 == 0:
                alive = self._wake(hour // 24)
                weights = list(itertools.accumulate(token.weight for token in alive))
            count = end - begin
            begin = end
            if not count:
                continue
            chosen = rng.choices(alive, cum_weights=weights, k=count)
            outcomes = rng.choices(_OUTCOMES, _OUTCOME_SHARES, k=count)
            yield from self._hour(hour, chosen, outcomes, block_uses)

    def _hour(
        self, hour: int, chosen: list[_Token], outcomes: list[str], block_uses: tuple[int, int]
    ) -> Iterator[tuple[bytes, int]]:
        rng = self._rng
        start_us, step = int(self.start.timestamp()) * 1_000_000 + hour * _HOUR_US, _HOUR_US // len(chosen)
        place = 0
        while place < len(chosen):
            end = min(place + rng.randint(*block_uses), len(chosen))
            uses = []
            for number in range(place, end):
                token = chosen[number]
                scope, context = token.visits[int(rng.random() * _VISITS)]
                client = token.client
                occurred_us = start_us + number * step + int(rng.random() * step)
                what = (outcomes[number], client.endpoint, client.caller, scope, "", context)
                uses.append(TokenUsed(occurred_us, token.token_id, None, *what))
            block = UseBlock(block_id=f"{rng.getrandbits(128):032x}", writer=f"w{rng.randrange(2)}", uses=tuple(uses))
            yield codec.encode_block(block), end - place
            place = end

    def _client(self, number: int) -> _Client:
        rng = self._rng
        life: Life = rng.choices(("service", "office", "phone"), (0.5, 0.3, 0.2))[0]
        things = [
            f"/v1/{rng.choice(('orders', 'items', 'people', 'reports'))}/{n}" for n in range(rng.randrange(3, 30))
        ]
        return _Client(
            client_id=f"cli_{rng.getrandbits(128):032x}",
            life=life,
            weight=1 / (number + 3),
            endpoint=rng.choices(("validate", "forward-auth", "introspect", "batch"), (0.6, 0.2, 0.15, 0.05))[0],
            caller=f"tok_{rng.randrange(30):032x}",
            scopes=tuple(
                f"area{rng.randrange(20)}:{verb}" for verb in ("read", "write", "admin")[: rng.randrange(1, 4)]
            ),
            paths=tuple((rng.choice(("GET", "GET", "POST")), path) for path in things),
            product=f"svc-{number}",
            office=f"198.51.{rng.randrange(100)}.{rng.randrange(256)}",
        )

    def _token(self, number: int, client: _Client) -> _Token:
        rng = self._rng
        personal = client.life != "service"
        first = 0 if rng.random() < 0.5 else rng.randrange(self.days)
        return _Token(
            token_id=f"tok_{rng.getrandbits(128):032x}",
            subject=f"usr_{number // 2:032x}" if personal else client.client_id,
            kind=Kind.PAT if personal and rng.random() < 0.2 else Kind.ACCESS,
            client=client,
            weight=rng.paretovariate(1.1),
            first_day=first,
            last_day=self.days if rng.random() < 0.5 else first + rng.randrange(1, 10),
            home=self._address(10 if client.life == "service" else 81),
            agent=rng.choice(_BROWSERS if client.life == "office" else _PHONES),
        )

    def _address(self, first: int) -> str:
        rng = self._rng
        return f"{first}.{rng.randrange(64)}.{rng.randrange(256)}.{rng.randrange(256)}"

    def _wake(self, day: int) -> list[_Token]:
        """Those that are used on the day, with how they are."""
        alive = [token for token in self.tokens if token.first_day <= day <= token.last_day] or self.tokens
        rng = self._rng
        for token in alive:
            client = token.client
            match client.life:
                case "service":
                    addresses, agent = (
                        [token.home],
                        f"{client.product}/{1 + day // 7}.{day % 7 // 3} python-httpx/0.28.1",
                    )
                case "office":
                    addresses, agent = [client.office, client.office, token.home], token.agent
                case "phone":
                    carrier = 20 + int(token.token_id[4:6], 16) % 3
                    addresses, agent = [token.home, *(self._address(carrier) for _ in range(4))], token.agent
            token.visits = []
            for _ in range(_VISITS):
                method, path = rng.choice(client.paths)
                scope = rng.choice(client.scopes)
                token.visits.append((scope, Context(rng.choice(addresses), agent, method, path)))
        return alive
