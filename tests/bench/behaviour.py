"""How tokens are used from hour to hour: services, scheduled jobs, CI, people at their desks and on their phones.

Few services make most of the uses; everybody else is there because an abuse rule must leave them alone.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable

from msgspec import Struct

from events.types import Context
from tests.bench.people import (
    AREAS,
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    Chain,
    Client,
    Gateway,
    Organisation,
    Person,
    Session,
    Token,
    is_workday,
    local_hour,
)
from tests.bench.places import RUNNER_AGENTS, TOOLS, Product, pick, product
from tests.bench.population import Population, place

# What follows the time in a `TokenUsed`, field by field; the time, that, and the number of the label or 0.
Rest = tuple[str, None, str, str, str, str, str, Context]
Entry = tuple[int, Rest, int]
# When, caller, address, outcome, endpoint, label.
Refusal = tuple[int, str, str | None, str, str, int]

_TEMPLATES = 32  # kinds of request that one deployment of a service makes
_EVENT_SHARE_MAX = 0.5  # of all uses; the rest are steady services
_OFFICE_HOURS = (1, 1, 1, 1, 1, 2, 4, 8, 14, 19, 20, 19, 16, 18, 20, 19, 17, 13, 8, 6, 5, 4, 3, 2)
_WAKING_HOURS = (4, 2, 1, 1, 1, 2, 5, 9, 11, 12, 12, 13, 14, 13, 12, 12, 13, 15, 17, 19, 20, 18, 13, 8)
_NIGHT_HOURS = (9, 20, 20, 16, 9, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4, 6)
_EVEN_HOURS = (10,) * 24


class Profile(Struct, frozen=True):
    """Load by local hour, and what of it is left at weekends."""

    hours: tuple[int, ...]
    weekend: float

    def load(self, us: int, zone: float) -> float:
        """Relative to the mean of a working day."""
        share = self.hours[int(local_hour(us, zone))] * 24 / sum(self.hours)
        return share if is_workday(us, zone) else share * self.weekend


PROFILES = {
    Profile(_OFFICE_HOURS, 0.25): 0.45,
    Profile(_WAKING_HOURS, 1.1): 0.3,
    Profile(_EVEN_HOURS, 1.0): 0.2,
    Profile(_NIGHT_HOURS, 0.9): 0.05,
}


def use(
    token: Token, us: int, gateway: Gateway, ip: str, agent: str, *, path: str, scope: str = "", method: str = "GET"
) -> Rest:
    """A use as this resource server makes the service record it. An introspecting one tells nothing of the bearer."""
    endpoint = gateway.endpoint
    if endpoint == "introspect":
        context = Context(gateway.own[us // MINUTE % 2], gateway.agent, "POST", "/oauth2/introspect")
        return (token.token_id, None, token.outcome(us), endpoint, gateway.caller, "", "", context)
    if endpoint == "forward-auth":
        method, path = "GET", "/v1/forward-auth"
    outcome = token.outcome(us, scope, token.audience)
    context = Context(ip, agent, method, path)
    return (token.token_id, None, outcome, endpoint, gateway.caller, scope, token.audience, context)


def shown(organisation: Organisation, rng: random.Random) -> Gateway:
    """A resource server of the organisation that sees, and says, where the bearer is; any if there is none."""
    seeing = [gateway for gateway in organisation.gateways if gateway.endpoint != "introspect"]
    return rng.choice(seeing or organisation.gateways)


def paths(scopes: Iterable[str], rng: random.Random) -> list[tuple[str, str, str]]:
    """Some requests that these scopes allow: method, path, scope."""
    made = []
    for scope in scopes:
        area, verb = scope.split(":")
        method = {"read": "GET", "write": "POST", "delete": "DELETE"}.get(verb, "PUT")
        made += [(method, f"/v1/{area}", scope), (method, f"/v1/{area}/{rng.randrange(1, 5000)}", scope)]
    return made or [("GET", "/v1/status", "")]


class Fleet(Struct):
    """What one deployment of a service runs as. `number`: of all that the service has had."""

    number: int
    addresses: list[str]
    agent: str


class Machine:
    """A service that uses its token steadily."""

    def __init__(
        self, chain: Chain, organisation: Organisation, made: Product, rng: random.Random, *, autoscaled: bool
    ):
        self.chain = chain
        self._steps = list(chain.steps)
        self.organisation = organisation
        self.product = made
        self.weight = 1.0
        self.profile: Profile = pick(rng, PROFILES)
        self.gateways = rng.sample(organisation.gateways, min(len(organisation.gateways), rng.randint(1, 2)))
        self.release = rng.randrange(4, 60)
        self.egress = organisation.egress
        self.autoscaled = autoscaled
        self.instances = rng.randint(2, 10)
        self._fleets_made = 0
        self.fleet = self.new_fleet(rng)
        self.coming: list[tuple[int, int, Fleet]] = []  # deployments: from when, how long it rolls, what comes
        self.stubborn_us = int(rng.lognormvariate(4, 1.2) * MINUTE)  # how long it goes on with a token that has ended
        self.wrong_scope = ""
        self._templates: tuple[tuple[str | int, ...], list[Rest]] | None = None

    def load(self, us: int) -> float:
        """How much it wants to do in the hour that begins then."""
        token = self._token_at(us + HOUR - SECOND)
        if token is None or us > min(token.ended_us, token.expires_us) + self.stubborn_us:
            return 0.0
        return self.weight * self.profile.load(us, self.organisation.zone)

    def deploy(self, us: int, rng: random.Random) -> Fleet:
        """The next release, with addresses of its own if its instances have such."""
        self.release += 1
        fleet = self.new_fleet(rng)
        self.coming.append((us, rng.randrange(5 * MINUTE, 40 * MINUTE), fleet))
        return fleet

    def new_fleet(self, rng: random.Random) -> Fleet:
        """Of the present release; instances that are seen for themselves have other addresses every time."""
        self._fleets_made += 1
        addresses = list(self.egress)
        if self.autoscaled:
            addresses = [self.organisation.region.address(rng, 3) for _ in range(self.instances)]
        return Fleet(self._fleets_made, addresses, self.product.agent(self.release))

    def _token_at(self, us: int) -> Token | None:
        """As `chain.token_at`, for times that never go back by more than an hour."""
        while len(self._steps) > 1 and self._steps[1][0] <= us - HOUR:
            self._steps.pop(0)
        found = None
        for since, token in self._steps:
            if since > us:
                break
            found = token
        return found

    def begin(self) -> None:
        """After everything was planned: what has been changed in the chain meanwhile counts."""
        self._steps = sorted(self.chain.steps, key=lambda step: step[0])

    def hour(self, us: int, count: int, rng: random.Random) -> list[Entry]:
        """About `count` uses within the hour, in no order."""
        edges = {us, us + HOUR}
        for since, token in self._steps[:16]:
            edges |= {at for at in (since, token.expires_us, token.ended_us) if us < at < us + HOUR}
        while self.coming and self.coming[0][0] + self.coming[0][1] <= us:
            self.fleet = self.coming.pop(0)[2]
        for since, rolls_us, _ in self.coming:
            edges |= {at for at in (since, since + rolls_us) if us < at < us + HOUR}
        entries: list[Entry] = []
        ordered = sorted(edges)
        for begins, ends in itertools.pairwise(ordered):
            entries += self._stretch(begins, ends, count * (ends - begins) / HOUR, rng)
        return entries

    def _stretch(self, begins: int, ends: int, mean: float, rng: random.Random) -> list[Entry]:
        token = self._token_at(begins)
        if token is None:
            return []
        over_us = begins - min(token.ended_us, token.expires_us)
        if over_us >= 0:
            if over_us > self.stubborn_us:
                return []
            mean = min(mean * 0.1, (ends - begins) / (20 * SECOND))  # refused, it waits longer between attempts
        count = int(mean + rng.random())
        if not count:
            return []
        templates = self._requests(token, begins, self._fleets(begins), rng)
        length, chance = ends - begins, rng.random
        chosen = rng.choices(templates, k=count)
        if templates[0][3] == "batch":  # asked about together
            step = 2 * SECOND
            return [(begins + int(chance() * length) // step * step, rest, 0) for rest in chosen]
        return [(begins + int(chance() * length), rest, 0) for rest in chosen]

    def _fleets(self, us: int) -> list[Fleet]:
        fleets = [self.fleet]
        for since, rolls_us, fleet in self.coming:
            if since <= us:
                fleets = [fleet] if since + rolls_us <= us else [*fleets[-1:], fleet]
        return fleets

    def _requests(self, token: Token, us: int, fleets: list[Fleet], rng: random.Random) -> list[Rest]:
        key = (token.token_id, token.outcome(us), self.wrong_scope, *(fleet.number for fleet in fleets))
        if self._templates is not None and self._templates[0] == key:
            return self._templates[1]
        possible = paths(token.scope, rng)
        gateway = rng.choice(self.gateways)
        made = []
        for number in range(_TEMPLATES):
            fleet = fleets[number % len(fleets)]
            method, path, scope = rng.choice(possible)
            if self.wrong_scope and number % 8 == 0:
                scope = self.wrong_scope
            ip = rng.choice(fleet.addresses)
            made.append(use(token, us, gateway, ip, fleet.agent, path=path, scope=scope, method=method))
        self._templates = (key, made)
        return made


class Habit(Struct):
    """A PAT or SAT that is not used steadily: by whom, with what, how often."""

    chain: Chain
    organisation: Organisation
    gateway: Gateway
    kind: str  # daily, weekly, rarely, scripted; runner; job
    agents: list[str]
    addresses: list[str]  # of a job
    every_days: int = 1
    at_hour: float = 2.0
    first_day: int = 0
    silent: tuple[int, int] = (0, 0)  # from day, until day: nobody uses it
    refused: int = 0  # times that it found its token ended

    @property
    def person(self) -> Person | None:
        owner = self.chain.owner
        return owner if isinstance(owner, Person) else None


class Behaviour:
    """Everybody's uses, hour by hour, all in one order that the seed decides."""

    def __init__(self, population: Population) -> None:
        self.population = population
        self.size = population.size
        self._rng = random.Random(f"{self.size.seed}/behaviour/{self.size.preset.name}")
        self._pending: dict[int, list[Entry]] = defaultdict(list)
        self._later: dict[int, list[Callable[[], Iterable[Entry]]]] = defaultdict(list)
        self._refused: dict[int, list[Refusal]] = defaultdict(list)
        self._sessions: dict[int, list[tuple[Session, Gateway]]] = defaultdict(list)
        self.machines: list[Machine] = []
        self.habits: list[Habit] = []
        self._people()
        self._services()
        self._scale = self._session_scale()

    # Who does what

    def _services(self) -> None:
        rng, population = self._rng, self.population
        owners = [
            (chain, chain.owner.organisation, chain.owner.product)
            for chain in population.renewals
            if isinstance(chain.owner, Client)
        ]
        for number, chain in enumerate(population.sats):
            assert isinstance(chain.owner, Organisation)
            habit = pick(rng, {"steady": 0.6, "job": 0.15, "runner": 0.1, "never": 0.15})
            if habit == "steady":
                name = f"{rng.choice(AREAS)}-agent-{number}"
                owners.append((chain, chain.owner, product(rng, name)))
            elif habit != "never":
                self.habits.append(self._habit(chain, chain.owner, habit))
        rng.shuffle(owners)
        for rank, (chain, organisation, made) in enumerate(owners, 1):
            machine = Machine(chain, organisation, made, rng, autoscaled=rng.random() < self.size.preset.autoscaled)
            machine.weight = rank**-self.size.preset.sizes
            self.machines.append(machine)

    def _people(self) -> None:
        rng, population = self._rng, self.population
        for chain in population.pats:
            assert isinstance(chain.owner, Person)
            kind = pick(rng, {"daily": 0.3, "weekly": 0.35, "rarely": 0.2, "runner": 0.06, "job": 0.03, "never": 0.06})
            if kind != "never":
                self.habits.append(self._habit(chain, chain.owner.organisation, kind))
        for sign_in in population.sign_ins:
            gateway = rng.choice(sign_in.client.organisation.gateways)
            for session in sign_in.sessions:
                self._sessions[session.start_us // HOUR].append((session, gateway))

    def _habit(self, chain: Chain, organisation: Organisation, kind: str) -> Habit:
        rng = self._rng
        agents = rng.sample(TOOLS, pick(rng, {1: 0.5, 2: 0.35, 3: 0.15}))
        if kind == "runner":
            agents = [rng.choice(RUNNER_AGENTS)]
        if kind == "job":
            agents = agents[:1]
        return Habit(
            chain=chain,
            organisation=organisation,
            gateway=rng.choice(organisation.gateways),
            kind=kind,
            agents=agents,
            addresses=[organisation.region.address(rng, 2)],
            every_days=pick(rng, {1: 0.5, 7: 0.3, 14: 0.1, 28: 0.1}),
            at_hour=rng.uniform(0, 6),
            first_day=rng.randrange(2),
        )

    def _session_scale(self) -> float:
        """What sessions are shortened by, so that in a small simulation too most uses are of services."""
        size = self.size
        per_day = {"daily": 35, "weekly": 8, "rarely": 1, "runner": 250, "job": 15}
        expected = sum(per_day[habit.kind] * (5 / 7) for habit in self.habits) * size.days
        expected += sum(session.uses for sessions in self._sessions.values() for session, _ in sessions)
        return min(1.0, size.uses * _EVENT_SHARE_MAX / max(1.0, expected))

    # Adding what is planned elsewhere

    def later(self, us: int, make: Callable[[], Iterable[Entry]]) -> None:
        """Uses that somebody else makes up when their hour has come, so that few are held at a time."""
        self._later[us // HOUR].append(make)

    def refuse(self, refusals: Iterable[Refusal]) -> None:
        for refusal in refusals:
            self._refused[refusal[0] // HOUR].append(refusal)

    # Hour by hour

    @property
    def held(self) -> int:
        """Uses that wait for their hour."""
        return sum(map(len, self._pending.values()))

    @property
    def chance(self) -> random.Random:
        return self._rng

    def day(self, us: int) -> None:
        """Plans what people and jobs do on the day that begins then."""
        rng = self._rng
        for machine in self.machines:
            if machine.autoscaled and not machine.coming:
                machine.fleet = machine.new_fleet(rng)
            if rng.random() < 0.2:  # a working team deploys about every week
                machine.deploy(us + rng.randrange(7 * HOUR, 20 * HOUR), rng)
        day = (us - self.size.start_us) // DAY
        for habit in self.habits:
            if habit.silent[0] <= day < habit.silent[1]:
                continue
            first_us = habit.chain.steps[0][0]
            if us <= first_us < us + DAY:
                self._tried_out(habit, first_us + rng.randrange(10 * MINUTE))
            if habit.kind == "job":
                if day % habit.every_days == habit.first_day % habit.every_days:
                    start = us + int((habit.at_hour - habit.organisation.zone) % 24 * HOUR) + rng.randrange(2 * MINUTE)
                    self._job(habit, start, habit.addresses[0])
            elif habit.kind == "runner":
                self._runs(habit, us)
            else:
                self._desk(habit, us)

    def hour(self, us: int, wanted: int) -> tuple[list[Entry], list[Refusal]]:
        """All of the hour that begins then: as many uses as wanted, if what is planned is not more already."""
        number = us // HOUR
        for session, gateway in self._sessions.pop(number, []):
            self._session(session, gateway)
        for make in self._later.pop(number, []):
            for entry in make():
                if entry[0] < self.size.end_us:
                    self._pending[entry[0] // HOUR].append(entry)
        entries, refusals = self._pending.pop(number, []), self._refused.pop(number, [])
        left = wanted - len(entries)
        if left > 0:
            entries += self._steady(us, left)
        return entries, refusals

    def _steady(self, us: int, wanted: int) -> list[Entry]:
        """Every service's share of the hour, each with a little luck."""
        rng = self._rng
        loads = [machine.load(us) * rng.lognormvariate(0, 0.2) for machine in self.machines]
        total = sum(loads)
        if not total:
            return []
        entries: list[Entry] = []
        for machine, load in zip(self.machines, loads, strict=True):
            count = int(wanted * load / total + rng.random())
            if count:
                entries += machine.hour(us, count, rng)
        return entries

    def load(self, us: int) -> float:
        """How busy the hour is, all services together."""
        return sum(machine.weight * machine.profile.load(us, machine.organisation.zone) for machine in self.machines)

    def _put(self, us: int, length_us: int, rests: list[Rest], count: int) -> None:
        """Uses spread over a session, somewhat crowded, as work is."""
        rng, at = self._rng, us
        mean = length_us / max(1, count)
        for rest in rng.choices(rests, k=count):
            if at >= self.size.end_us:
                return
            self._pending[at // HOUR].append((at, rest, 0))
            at += int(rng.expovariate(1.0) * mean) + 1000

    def _scaled(self, count: float) -> int:
        return max(1, int(count * self._scale + self._rng.random()))

    def _session(self, session: Session, gateway: Gateway) -> None:
        rng, token, at = self._rng, session.token, session.start_us
        if session.stale is not None:
            stale = use(session.stale, at - SECOND, gateway, session.addresses[0], session.agent, path="/v1/me")
            self._pending[at // HOUR].append((at - SECOND if at % HOUR >= SECOND else at, stale, 0))
        if token.ended_us <= at:
            # Signed out meanwhile: the application tries once and asks to sign in; later sessions are another grant's.
            if at - token.ended_us < DAY and rng.random() < 0.5:
                rest = use(token, at, gateway, session.addresses[0], session.agent, path="/v1/me")
                self._pending[at // HOUR].append((at, rest, 0))
            return
        half = session.length_us // len(session.addresses)
        count = max(1, self._scaled(session.uses) // len(session.addresses))
        for number, ip in enumerate(session.addresses):
            begins = at + number * half
            length = min(half, token.ended_us - begins)
            if length > 0:
                rests = self._rests(token, begins, gateway, ip, session.agent)
                self._put_while_valid(begins, length, token, rests, count)

    def _put_while_valid(self, us: int, length_us: int, token: Token, rests: list[Rest], count: int) -> None:
        """An application stops when its token ends."""
        rng, until = self._rng, min(token.expires_us, token.ended_us, self.size.end_us)
        for rest in rng.choices(rests, k=count):
            at = us + int(rng.random() * length_us)
            if at < until:
                self._pending[at // HOUR].append((at, rest, 0))

    def _rests(self, token: Token, us: int, gateway: Gateway, ip: str, agent: str) -> list[Rest]:
        rng = self._rng
        possible = paths(token.scope, rng)
        chosen = rng.choices(possible, k=3)
        return [use(token, us, gateway, ip, agent, path=path, scope=scope, method=how) for how, path, scope in chosen]

    def _work(  # noqa: PLR0917 - what, when, how long, how much, where from and with what
        self, habit: Habit, us: int, length_us: int, count: int, ip: str, agents: list[str]
    ) -> None:
        """One stretch of work with the habit's token, or a few vain attempts if that has ended."""
        rng, token = self._rng, habit.chain.token_at(us)
        if token is None:
            return
        until = min(token.ended_us, token.expires_us)
        if until <= us:
            habit.refused += 1
            if habit.refused > 3 and habit.kind != "job":
                return  # they have another token by now
            count, length_us = rng.randint(1, 3), 2 * MINUTE
        elif until < us + length_us:
            length_us = until - us
        for agent in agents:
            rests = self._rests(token, us, habit.gateway, ip, agent)
            share = max(1, count // len(agents))
            if until <= us:
                self._put(us, length_us, rests, share)
            else:
                self._put_while_valid(us, length_us, token, rests, share)

    def _tried_out(self, habit: Habit, us: int) -> None:
        """Who makes a token has a use for it, and sees at once whether it works."""
        rng = self._rng
        ip = habit.addresses[0]
        if habit.kind == "runner":
            ip = self.population.world.runners.address(rng)
        elif habit.kind != "job" and habit.person is not None:
            ip = place(habit.person, us, self.size.start_us)
        self._work(habit, us, 10 * MINUTE, len(habit.agents) * rng.randint(1, 4), ip, habit.agents)

    def _job(self, habit: Habit, us: int, ip: str) -> None:
        rng = self._rng
        count = self._scaled(rng.lognormvariate(3, 1))
        self._work(habit, us, rng.randrange(MINUTE, 12 * MINUTE), count, ip, habit.agents)

    def _runs(self, habit: Habit, us: int) -> None:
        """CI: each job on a machine of its own, which nobody has seen before."""
        rng, zone = self._rng, habit.organisation.zone
        for _ in range(rng.randint(4, 30) if is_workday(us, zone) else rng.randint(0, 4)):
            at = us + int((rng.triangular(7, 22, 14) - zone) % 24 * HOUR)
            ip = self.population.world.runners.address(rng)
            count = self._scaled(rng.randint(3, 25))
            self._work(habit, at, rng.randrange(20 * SECOND, 6 * MINUTE), count, ip, habit.agents)

    def _desk(self, habit: Habit, us: int) -> None:
        """A person with tools and scripts of their own."""
        rng, person = self._rng, habit.person
        if person is None:
            return
        zone = person.organisation.zone
        chance = {"daily": 0.92, "weekly": 0.3, "rarely": 0.05}[habit.kind] * (1 if is_workday(us, zone) else 0.12)
        if rng.random() >= chance:
            return
        for _ in range(rng.randint(1, 5) if habit.kind == "daily" else rng.randint(1, 2)):
            at = us + int((rng.triangular(7.5, 22, 13) - zone) % 24 * HOUR)
            ip = place(person, at, self.size.start_us)
            if rng.random() < 0.015:  # a script over everything, one request after the other
                count = self._scaled(rng.randint(80, 350))
                self._work(habit, at, int(count / rng.uniform(0.5, 4) * SECOND), count, ip, habit.agents[:1])
                continue
            used = rng.sample(habit.agents, rng.randint(1, len(habit.agents)))
            count = self._scaled(rng.lognormvariate(2, 1))
            self._work(habit, at, rng.randrange(MINUTE, 90 * MINUTE), count, ip, used)
            if rng.random() < 0.004:  # half a token in the clipboard
                outcome, caller = rng.choice(("malformed", "unknown")), habit.gateway.caller
                where = habit.gateway.own[0] if habit.gateway.endpoint == "introspect" else ip
                self.refuse([(at, caller, where, outcome, habit.gateway.endpoint, 0)] * rng.randint(1, 3))
