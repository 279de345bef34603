"""What is true of a simulated history: which of its uses are attacks, and which only look like one."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable

from msgspec import Struct

from tests.bench.behaviour import Behaviour, Habit, Machine
from tests.bench.people import DAY, Gateway, Organisation, Token
from tests.bench.places import network_of
from tests.bench.population import Population

# The rules of issue 3, about tokens, and of issue 5, about signing in, by short names of ours.
REFRESH_REUSE = "refresh reuse"
USE_AFTER_END = "use after end"
NEW_NETWORK = "new network"
MANY_ADDRESSES = "many addresses"
BURST = "burst"
SCANNING = "scanning"
SCOPE_PROBING = "scope probing"
SECRET_SPRAYING = "secret spraying"
DORMANT = "dormant token"
SHARED = "shared token"
IMPOSSIBLE_RATE = "impossible rate"
CODE_REPLAY = "code replay"
CONSTANT_CHALLENGE = "constant challenge"
PASSWORD_SPRAYING = "password spraying"
ACCOUNT_GUESSING = "account guessing"
TOKEN_RULES = (
    *(REFRESH_REUSE, USE_AFTER_END, NEW_NETWORK, MANY_ADDRESSES, BURST, SCANNING),
    *(SCOPE_PROBING, SECRET_SPRAYING, DORMANT, SHARED, IMPOSSIBLE_RATE),
)
SIGN_IN_RULES = (CODE_REPLAY, CONSTANT_CHALLENGE, PASSWORD_SPRAYING, ACCOUNT_GUESSING)
RULES = (*TOKEN_RULES, *SIGN_IN_RULES)


class Label(Struct, kw_only=True):
    """One attack, or one thing that looks like one.

    `rule`: which rule must find it; empty for a look-alike. `also`: rules whose finding on one of the entities in that
    time is right too. `entities`: token, grant and client ids, addresses and networks that a finding may name.
    `first_us`: the first hostile act. `start_us`: from when on the rule's own condition can be seen; for a replayed
    refresh token that is the replay, however long before it was stolen. `uses`, `refused`: what belongs to it,
    known when the traffic has been generated.
    """

    number: int
    kind: str
    rule: str
    also: tuple[str, ...]
    entities: frozenset[str]
    first_us: int
    start_us: int
    end_us: int
    about: str
    uses: int = 0
    refused: int = 0


class Ground:
    """Where things are planted: the population, its behaviour, a source of chance, and the labels so far.

    A victim is taken once, so that no two attacks share one.
    """

    def __init__(self, population: Population, behaviour: Behaviour, purpose: str) -> None:
        self.population = population
        self.behaviour = behaviour
        self.size = population.size
        self.world = population.world
        self.rng = random.Random(f"{self.size.seed}/{purpose}/{self.size.preset.name}")
        self.labels: list[Label] = []
        self.taken: set[str] = set()
        self._number = 0

    def label(self, kind: str, *, rule: str = "", also: Iterable[str] = (), **fields: object) -> Label:
        self._number += 1
        times = {"first_us": fields.get("start_us")} | fields
        made = Label(number=self._number, kind=kind, rule=rule, also=tuple(also), **times)
        self.labels.append(made)
        return made

    def numbers_after(self, other: Ground) -> None:
        """No number is that of two labels."""
        self._number = other._number

    # Chance

    def between(self, low: float, high: float) -> float:
        """Log-uniform: as often between 1 and 10 as between 10 and 100."""
        return math.exp(self.rng.uniform(math.log(low), math.log(high)))

    def count(self, low: float, high: float) -> int:
        """How many uses. A small history would consist of little else than attacks, so that there they are small."""
        most = max(low + 1, self.size.uses / 60)
        return int(min(most, self.between(low, high)))

    def moment(self, *, after: float = 0.15, before: float = 0.92) -> int:
        """Some time in this part of the history. Not at once: who has no past has nothing to differ from."""
        size = self.size
        return size.start_us + int(self.rng.uniform(max(after, 2 / size.days), before) * size.days * DAY)

    def times(self, start_us: int, length_us: int, count: int) -> list[int]:
        """Ascending times, the first at the start and the last at the end."""
        rng = self.rng
        inner = sorted(rng.randrange(max(1, length_us)) for _ in range(count - 2))
        return [start_us, *(start_us + at for at in inner), start_us + length_us][:count]

    # Victims

    def habit(self, us: int, kinds: tuple[str, ...], *, valid: bool = True) -> tuple[Habit, Token] | None:
        """A token of somebody who was seen using it, valid at that time."""
        behaviour = self.behaviour
        for habit in self.rng.sample(behaviour.habits, len(behaviour.habits)):
            token = habit.chain.token_at(us)
            if habit.kind not in kinds or token is None or token.token_id in self.taken or not _seen([habit.gateway]):
                continue
            if us - token.issued_us < (5 if habit.kind == "daily" else 9) * DAY or habit.silent[1]:
                continue
            if valid and token.outcome(us + DAY) != "valid":
                continue
            self.taken.add(token.token_id)
            return habit, token
        return None

    def machine(self, us: int, *, hourly_max: float = 1e9, life_us: int = 0) -> tuple[Machine, Token] | None:
        """A service whose present token is at least six hours old and good for a while."""
        machines = self.behaviour.machines
        hourly = self.size.uses / self.size.days / 24 / sum(machine.weight for machine in machines)
        for machine in self.rng.sample(machines, len(machines)):
            token = machine.chain.token_at(us)
            if token is None or token.token_id in self.taken or not _seen(machine.gateways):
                continue
            if machine.weight * hourly > hourly_max or us - token.issued_us < DAY // 4:
                continue
            if token.outcome(us + life_us) == "valid":
                self.taken.add(token.token_id)
                return machine, token
        return None

    def gateway(self, organisation: Organisation) -> Gateway:
        """A resource server that says where the bearer is: what it does not say nobody can see."""
        return self.rng.choice([one for one in organisation.gateways if one.endpoint != "introspect"])


def _seen(gateways: list[Gateway]) -> bool:
    """Whether they all say where a token is used from."""
    return all(gateway.endpoint != "introspect" for gateway in gateways)


def entities(*tokens: Token, addresses: Iterable[str] = (), more: Iterable[str] = ()) -> frozenset[str]:
    """What a finding about these may name."""
    found = {*more, *addresses, *(network_of(ip) for ip in addresses)}
    for token in tokens:
        found |= {token.token_id, token.grant_id}
    return frozenset(found)
