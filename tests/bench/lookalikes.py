"""What looks like an attack and is none: each is labelled, so that a false alarm can be told by its cause."""

from __future__ import annotations

from collections.abc import Callable

from events.types import Kind, Reason
from tests.bench.behaviour import Entry, Machine, paths, use
from tests.bench.encoding import Skew
from tests.bench.labels import Ground, entities
from tests.bench.people import DAY, HOUR, MINUTE, SCOPES, SECOND, Person, Token
from tests.bench.places import LIBRARIES, family

_LOAD_TESTS = ("k6/0.55.0", "Apache-HttpClient/4.5.14 (Java/17.0.13)", "Gatling/3.12.0", "hey/0.0.1")


def plant(ground: Ground) -> list[Skew]:
    """Every look-alike, half as often as an attack of one kind; those that are everywhere are only labelled."""
    for _ in range(max(1, ground.size.attacks_per_rule // 2)):
        for make in PLANTS.values():
            make(ground)
    for _ in range(ground.size.attacks_per_rule // 8):
        _migration(ground, moved=True)
    _ordinary(ground)
    return _skews(ground)


def _any_machine(ground: Ground, us: int, *, sat: bool = False) -> tuple[Machine, Token] | None:
    """A service that nothing else happens to; `sat`: one with a long-lived token."""
    machines = ground.behaviour.machines
    for machine in ground.rng.sample(machines, len(machines)):
        token = machine.chain.token_at(us)
        if token is None or token.token_id in ground.taken or (sat and token.kind is not Kind.SAT):
            continue
        if us - token.issued_us > HOUR and token.outcome(us + HOUR) == "valid":
            ground.taken.add(token.token_id)
            return machine, token
    return None


def _tokens(machine: Machine) -> list[Token]:
    return [token for _, token in machine.chain.steps]


def deployment(ground: Ground) -> None:
    """Another library in the next release, from where the service always was."""
    _migration(ground, moved=False)


def _migration(ground: Ground, *, moved: bool) -> None:
    """A release with another library; `moved`: into another region at the same time."""
    us = ground.moment()
    found = _any_machine(ground, us, sat=True)
    if found is None:
        return
    machine, _ = found
    others = [agent for agent in LIBRARIES if family(agent) != family(machine.product.library)]
    machine.product.library, machine.product.named = ground.rng.choice(others), False
    fleet = machine.deploy(us, ground.rng)
    if moved:
        region = ground.rng.choice(ground.world.clouds)
        fleet.addresses = [region.address(ground.rng) for _ in range(machine.instances)]
    ground.label(
        "deployment" if not moved else "deployment into another region",
        entities=entities(*_tokens(machine)),
        start_us=us,
        end_us=us + 7 * DAY,
        about=f"now {machine.product.library}",
    )


def proxy_change(ground: Ground) -> None:
    """An organisation's traffic goes out another way from now on: NAT, CDN or proxy of another operator."""
    us, rng = ground.moment(), ground.rng
    organisation = rng.choice(ground.population.organisations)
    network = ground.population.networks.v4(140, 160)
    egress = [f"{network}.{rng.randrange(1, 255)}" for _ in organisation.egress]
    machines = [
        machine
        for machine in ground.behaviour.machines
        if machine.organisation is organisation and not machine.autoscaled and not machine.coming
    ]
    for machine in machines:
        fleet = machine.deploy(us, rng)
        fleet.addresses = list(egress)
        machine.egress = egress
    tokens = [token for machine in machines for token in _tokens(machine)]
    ground.label(
        "proxy change",
        entities=entities(*tokens, addresses=egress),
        start_us=us,
        end_us=us + 7 * DAY,
        about=f"{len(machines)} services appear from another network",
    )


def load_test(ground: Ground) -> None:
    """Twenty to fifty times a service's load for up to an hour, by the service itself or by a tool beside it."""
    us, rng, size = ground.moment(), ground.rng, ground.size
    found = _any_machine(ground, us)
    if found is None:
        return
    machine, token = found
    hourly = machine.weight * size.uses / size.days / 24 / sum(one.weight for one in ground.behaviour.machines)
    length_us = int(ground.between(10, 60) * MINUTE)
    count = int(min(60_000, size.uses / 200, max(300, hourly * length_us / HOUR * ground.between(20, 50))))
    own = rng.random() < 0.5
    agent = machine.fleet.agent if own else rng.choice(_LOAD_TESTS)
    gateway, possible = rng.choice(machine.gateways), paths(token.scope, rng)
    label = ground.label(
        "load test",
        entities=entities(token),
        start_us=us,
        end_us=us + length_us,
        about=f"{count} uses within {length_us // MINUTE} minutes by {family(agent)}",
    )

    def make() -> list[Entry]:
        entries: list[Entry] = []
        for at in ground.times(us, length_us, count):
            method, path, scope = rng.choice(possible)
            ip, name = rng.choice(machine.fleet.addresses), machine.fleet.agent if own else agent
            rest = use(token, at, gateway, ip, name, path=path, scope=scope, method=method)
            entries.append((at, rest, label.number))
        return entries

    ground.behaviour.later(us, make)


def office(ground: Ground) -> None:
    """All of a team paste a token of the system that was there before, or half of one, behind one address."""
    us, rng = ground.moment(after=0.05), ground.rng
    organisation = rng.choice(ground.population.organisations)
    ip, length_us = rng.choice(organisation.office), int(ground.between(20, 120) * MINUTE)
    gateway = rng.choice(organisation.gateways)
    seen = gateway.own[0] if gateway.endpoint == "introspect" else ip
    people = rng.randint(8, 30)
    label = ground.label(
        "office behind one address",
        entities=entities(addresses=[seen], more=[gateway.caller] if gateway.caller else []),
        start_us=us,
        end_us=us + length_us,
        about=f"{people} people",
    )
    for at in ground.times(us, length_us, people):
        outcome, tries = rng.choice(("malformed", "unknown")), rng.randint(1, 3)
        ground.behaviour.refuse(
            (at + number * 20 * SECOND, gateway.caller, seen, outcome, gateway.endpoint, label.number)
            for number in range(tries)
        )


def wrong_secret(ground: Ground) -> None:
    """After a rotation one service, or a few of one organisation, go on with the old secret."""
    us, rng = ground.moment(after=0.05), ground.rng
    organisation = rng.choice(ground.population.organisations)
    ours = [client.client_id for client in ground.population.clients if client.organisation is organisation]
    chosen = rng.sample(ours, min(len(ours), rng.choice((1, 1, 1, 2, 3))))
    ip, length_us = organisation.egress[0], int(ground.between(5, 8 * 60) * MINUTE)
    label = ground.label(
        "old client secret",
        entities=entities(addresses=[ip], more=chosen),
        start_us=us,
        end_us=us + length_us,
        about=f"{len(chosen)} clients",
    )
    for client in chosen:
        count = max(2, length_us // (rng.randint(5, 60) * SECOND))
        ground.behaviour.refuse(
            (at, client, ip, "invalid_client", "client", label.number) for at in ground.times(us, length_us, count)
        )


def misconfigured(ground: Ground) -> None:
    """A deployment sends the name of a variable instead of a token, or asks for a scope that it was never given."""
    us, rng = ground.moment(), ground.rng
    found = _any_machine(ground, us)
    if found is None:
        return
    machine, token = found
    gateway, length_us = machine.gateways[0], int(ground.between(10, 6 * 60) * MINUTE)
    ip = rng.choice(machine.organisation.egress)
    times = ground.times(us, length_us, max(2, length_us // (rng.randint(10, 60) * SECOND)))
    if rng.random() < 0.5:
        seen = gateway.own[0] if gateway.endpoint == "introspect" else ip
        named = entities(addresses=[seen], more=[gateway.caller] if gateway.caller else [])
        label = ground.label("placeholder for a token", entities=named, start_us=us, end_us=us + length_us, about=ip)
        ground.behaviour.refuse((at, gateway.caller, seen, "malformed", gateway.endpoint, label.number) for at in times)
        return
    wrong = rng.choice([scope for scope in SCOPES if scope not in token.scope])
    label = ground.label("wrong scope", entities=entities(token), start_us=us, end_us=us + length_us, about=wrong)

    def make() -> list[Entry]:
        where, agent = machine.fleet.addresses[0], machine.fleet.agent
        return [
            (at, use(token, at, gateway, where, agent, path="/v1/sync", scope=wrong, method="POST"), label.number)
            for at in times
        ]

    ground.behaviour.later(us, make)


def retries(ground: Ground) -> None:
    """An administrator revokes a token that is in use; the service goes on with it until somebody gives it another."""
    us = ground.moment(before=0.9)
    found = _any_machine(ground, us, sat=True)
    if found is None:
        return
    machine, token = found
    ground.population.revoke(us, token, Reason.ADMIN)
    later_us = us + int(ground.between(5, 600) * MINUTE)
    machine.stubborn_us = max(machine.stubborn_us, later_us - us)
    new = ground.population.issue(
        later_us, token.kind, 90 * DAY,
        client_id=None, subject=token.subject, scope=token.scope, audience=token.audience,
    )  # fmt: skip
    machine.chain.steps.append((later_us + SECOND, new))
    ground.label(
        "retries after a revocation",
        entities=entities(token),
        start_us=us,
        end_us=us + machine.stubborn_us,
        about="from where it always was",
    )


def holiday(ground: Ground) -> None:
    """Somebody is away for weeks and comes back to the same desk."""
    rng, size = ground.rng, ground.size
    habits = [habit for habit in ground.behaviour.habits if habit.kind == "daily" and not habit.silent[1]]
    for habit in rng.sample(habits, len(habits)):
        token = habit.chain.steps[0][1]
        begins = (token.issued_us - size.start_us) // DAY + rng.randint(4, 6)
        if token.token_id in ground.taken or begins + 15 > size.days or token.expires_us < size.end_us:
            continue
        ground.taken.add(token.token_id)
        habit.silent = (begins, min(size.days - 1, begins + rng.randint(14, 21)))
        start_us = size.start_us + habit.silent[1] * DAY
        ground.label("holiday", entities=entities(token), start_us=start_us, end_us=start_us + 3 * DAY, about="is back")
        return


def _ordinary(ground: Ground) -> None:
    """What every day of the population holds, named so that a false alarm about it is counted under its name."""
    size = ground.size
    span = {"start_us": size.start_us, "end_us": size.end_us}
    for habit in ground.behaviour.habits:
        tokens = [token for _, token in habit.chain.steps]
        if habit.kind == "runner":
            ground.label("CI", entities=entities(*tokens), about="another address for every job", **span)
        elif habit.kind == "job" and habit.every_days > 7:
            ground.label("monthly job", entities=entities(*tokens), about=f"every {habit.every_days} days", **span)
        elif isinstance(habit.chain.owner, Person) and habit.chain.owner.away is not None:
            begins = size.start_us + habit.chain.owner.away[0] * DAY
            ends = size.start_us + habit.chain.owner.away[1] * DAY
            ground.label("journey", entities=entities(*tokens), about="hotel", start_us=begins, end_us=ends)
        if habit.kind in {"daily", "weekly", "rarely"}:
            ground.label("person at a desk", entities=entities(*tokens), about=habit.kind, **span)
    for sign_in in ground.population.sign_ins:
        kind = "mobile network" if sign_in.phone else "application of a person"
        tokens = [*{session.token.token_id: session.token for session in sign_in.sessions}.values()]
        named = entities(*tokens, more=[sign_in.grant_id, *sign_in.spent])
        ground.label(kind, entities=named, about="", **span)
    for machine in ground.behaviour.machines:
        kind = "autoscaling" if machine.autoscaled else "steady service"
        ground.label(kind, entities=entities(*_tokens(machine)), about=machine.product.name, **span)


def _skews(ground: Ground) -> list[Skew]:
    """One writer's clock is ahead for some hours, and behind for some others."""
    skews = []
    for by_us in (int(ground.between(5, 120) * SECOND), -int(ground.between(5, 120) * SECOND)):
        us, length_us = ground.moment(before=0.9), int(ground.between(1, 12) * HOUR)
        skews.append(Skew(1, us, us + length_us, by_us))
        ground.label(
            "clock of a writer",
            entities=frozenset(),
            start_us=us,
            end_us=us + length_us,
            about=f"{by_us / SECOND:+.0f} s",
        )
    return skews


PLANTS: dict[str, Callable[[Ground], None]] = {
    make.__name__: make
    for make in (deployment, proxy_change, load_test, office, wrong_secret, misconfigured, retries, holiday)
}
