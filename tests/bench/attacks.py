"""Attacks on tokens, as those who suffered or specified them describe them. Not as any rule looks for them.

Sources: RFC 9700 §4.14 (replayed refresh tokens); MITRE ATT&CK T1528, T1550.001 (stolen application tokens), T1110.003
and .004 (spraying, stuffing), T1595 (scanning); GitHub, April 2022 (tokens stolen from Heroku and Travis CI, used from
rented servers to clone everything); Salesloft Drift, August 2025 (scripts' agents, Tor exits); Cloudflare and Okta,
autumn 2023 (credentials that were thought unused); Microsoft, January 2024 (few attempts through residential
proxies, an application that nobody used any more); studies of keys leaked in public repositories (first use after
minutes, one request of a checking bot, then everything at once). Intensities are drawn log-uniformly between what
these reports call slow or small and what they call fast; no attack is repeated on one victim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from events.types import Reason
from tests.bench.behaviour import Entry, Habit, Machine, paths, use
from tests.bench.labels import (
    BURST,
    DORMANT,
    IMPOSSIBLE_RATE,
    MANY_ADDRESSES,
    NEW_NETWORK,
    REFRESH_REUSE,
    SCANNING,
    SCOPE_PROBING,
    SECRET_SPRAYING,
    SHARED,
    TOKEN_RULES,
    USE_AFTER_END,
    Ground,
    Label,
    entities,
)
from tests.bench.people import DAY, HOUR, MINUTE, SCOPES, SECOND, Organisation, Person, SignIn, Token
from tests.bench.places import ATTACKERS, PHONES, browser, family, host, network_of, other_agent
from tests.bench.population import place

_UNKNOWN_SCOPES = ("admin", "root", "*", "ledger:admin", "iam:write", "secrets:read", "keys:export", "users:sudo")
_ELSEWHERE = (NEW_NETWORK, SHARED, USE_AFTER_END, BURST, DORMANT)  # also seen in whoever uses another's token from afar


def attack(ground: Ground) -> None:
    """Plants every kind of attack, as often as the size says."""
    plant_all(ground, PLANTS)


def plant_all(ground: Ground, plants: Mapping[str, Callable[[Ground], bool]]) -> None:
    for rule, plant in plants.items():
        planted = 0
        # A history may be too short for some victims; then there are fewer, and the table says how many.
        for _ in range(ground.size.attacks_per_rule * 4):
            planted += plant(ground)
            if planted == ground.size.attacks_per_rule:
                break
        assert planted, f"no victim for {rule}: the population is too small"


def lair_of(ground: Ground) -> str:
    """Where an attacker works from."""
    rng, world = ground.rng, ground.world
    return rng.choices([world.servers, world.exits, world.proxies], [6, 2, 2])[0].address(rng)


def _agents(holder: Habit | Machine) -> set[str]:
    if isinstance(holder, Habit):
        return {*holder.agents, *([holder.person.laptop] if holder.person else [])}
    return {holder.fleet.agent, holder.product.library}


def _victim(ground: Ground, us: int, *, life_us: int = HOUR) -> tuple[Habit | Machine, Token] | None:
    """Somebody's PAT or SAT, or the access token of a service."""
    if ground.rng.random() < 0.6:
        return ground.habit(us, ("daily", "weekly"))
    return ground.machine(us, life_us=life_us)


def _raid(
    ground: Ground,
    label: Label,
    token: Token,
    organisation: Organisation,
    moves: Sequence[tuple[int, str, str]],
    *,
    scopes: Sequence[str] | None = None,
    inside: Habit | Machine | None = None,
) -> None:
    """Uses of one token at (time, address, agent), made when their hour comes.

    `scopes`: what each asks for. `inside`: a service that has been taken over, with whatever address and agent it
    has by then.
    """
    rng, gateway, number = ground.rng, ground.gateway(organisation), label.number
    possible = paths(token.scope, rng)
    chosen = [rng.choice(possible) for _ in range(min(64, len(moves)))]

    def make() -> list[Entry]:
        entries: list[Entry] = []
        fleet = inside.fleet if isinstance(inside, Machine) else None
        for index, (at, *seen) in enumerate(moves):
            ip, agent = (fleet.addresses[0], fleet.agent) if fleet is not None else seen
            method, path, scope = chosen[index % len(chosen)]
            asked = scopes[index % len(scopes)] if scopes else scope
            rest = use(token, at, gateway, ip, agent, path=path, scope=asked, method=method)
            entries.append((at, rest, number))
        return entries

    ground.behaviour.later(moves[0][0], make)


def refresh_reuse(ground: Ground) -> bool:
    """RFC 9700 §4.14: a stolen refresh token is spent by one of two and then presented by the other."""
    rng, size = ground.rng, ground.size
    for sign_in in rng.sample(ground.population.sign_ins, len(ground.population.sign_ins)):
        if not sign_in.spent or sign_in.grant_id in ground.taken or sign_in.ended_us < size.end_us:
            continue
        last_us = sign_in.access.issued_us
        if not size.start_us + 2 * DAY < last_us < size.end_us - DAY:
            continue
        ground.taken.add(sign_in.grant_id)
        if rng.random() < 0.6:
            _thief_is_late(ground, sign_in, last_us)
        else:
            _thief_is_first(ground, sign_in, last_us)
        return True
    return False


def _thief_is_late(ground: Ground, sign_in: SignIn, last_us: int) -> None:
    us = last_us + int(ground.between(15, 6 * 3600) * SECOND)
    spent = ground.rng.choice(sign_in.spent[-3:])
    ground.population.replay(us, sign_in, spent, answered=False)
    ground.label(
        "replayed by the thief",
        rule=REFRESH_REUSE,
        also=(USE_AFTER_END,),
        entities=entities(sign_in.access, more=[spent]),
        start_us=us,
        end_us=us + MINUTE,
        about=f"spent {(us - last_us) // SECOND} s before",
    )


def _thief_is_first(ground: Ground, sign_in: SignIn, last_us: int) -> None:
    """The thief has the current token, so that nothing shows until the application comes with the same."""
    rng, population, before = ground.rng, ground.population, sign_in.access
    stolen_us = last_us + int(ground.between(5, 240) * MINUTE)
    access = population.refresh(stolen_us, sign_in)
    noticed_us = max(stolen_us + 10 * MINUTE, min(before.expires_us, ground.size.end_us - 4 * HOUR))
    noticed_us += rng.randrange(MINUTE, 2 * HOUR)
    population.replay(noticed_us, sign_in, sign_in.spent[-1], answered=False)
    lair, agent = lair_of(ground), rng.choice(ATTACKERS)
    length_us = int(ground.between(1, 60) * MINUTE)
    moves = [(at, lair, agent) for at in ground.times(stolen_us + SECOND, length_us, int(ground.between(5, 300)))]
    label = ground.label(
        "replayed by its owner",
        rule=REFRESH_REUSE,
        also=_ELSEWHERE,
        entities=entities(access, before, addresses=[lair], more=[sign_in.spent[-1]]),
        first_us=stolen_us,
        start_us=noticed_us,
        end_us=max(noticed_us, stolen_us + length_us) + MINUTE,
        about=f"stolen {(noticed_us - stolen_us) // MINUTE} minutes before",
    )
    if any(gateway.endpoint != "introspect" for gateway in sign_in.client.organisation.gateways):
        _raid(ground, label, access, sign_in.client.organisation, moves)


def use_after_end(ground: Ground) -> bool:
    """Someone tries a token that was found in a leak, after it was revoked or has expired. Often one bot, once."""
    rng, size, us = ground.rng, ground.size, ground.moment(before=0.7)
    found = _victim(ground, us, life_us=0)
    if found is None:
        return False
    holder, token = found
    if token.expires_us > size.end_us - 2 * DAY or rng.random() < 0.5:
        us = min(us + rng.randrange(HOUR), token.expires_us - MINUTE)
        ground.population.revoke(us, token, Reason.COMPROMISED)
        ended, words = us, "revoked"
        if isinstance(holder, Machine):
            _replace(ground, holder, token, us + rng.randrange(MINUTE, 30 * MINUTE))
    else:
        ended, words = token.expires_us, "expired"
    tried_us = ended + int(ground.between(5, 5 * 24 * 60) * MINUTE)
    tried_us = min(tried_us, size.end_us - 3 * HOUR)
    if tried_us <= ended:
        return False
    count = int(ground.between(1, 40.9))
    length_us = int(ground.between(0.2, 180) * MINUTE) if count > 1 else 0
    lair, agent = lair_of(ground), other_agent(rng, _agents(holder))
    label = ground.label(
        f"tried when {words}",
        rule=USE_AFTER_END,
        also=(NEW_NETWORK, SHARED),
        entities=entities(token, addresses=[lair]),
        start_us=tried_us,
        end_us=tried_us + length_us,
        about=f"{count} uses, {(tried_us - ended) // MINUTE} minutes after it was {words}",
    )
    moves = [(at, lair, agent) for at in ground.times(tried_us, length_us, count)]
    _raid(ground, label, token, holder.organisation, moves)
    return True


def _replace(ground: Ground, machine: Machine, token: Token, us: int) -> None:
    """A service is given another token, or gets one itself, and goes on."""
    steps = machine.chain.steps
    if any(since >= us - HOUR and other.issued_us > token.issued_us for since, other in steps if since < us + HOUR):
        return  # it is renewed about then anyway
    new = ground.population.issue(
        us, token.kind, token.expires_us - token.issued_us,
        client_id=token.client_id, subject=token.subject, scope=token.scope, audience=token.audience,
    )  # fmt: skip
    steps.append((us + SECOND, new))
    steps.sort(key=lambda step: step[0])


def new_network(ground: Ground) -> bool:
    """T1550.001: a stolen token is used from a rented server or an exit, by a script."""
    us = ground.moment()
    length_us = int(ground.between(2, 8 * 60) * MINUTE)
    found = _victim(ground, us, life_us=min(length_us, HOUR))
    if found is None:
        return False
    holder, token = found
    lair, agent = lair_of(ground), other_agent(ground.rng, _agents(holder))
    lairs = [lair] if ground.rng.random() < 0.7 else [lair, host(_short(lair), ground.rng)]
    count = ground.count(3, 1500)
    label = ground.label(
        "stolen, used from elsewhere",
        rule=NEW_NETWORK,
        also=(*_ELSEWHERE, IMPOSSIBLE_RATE),
        entities=entities(token, addresses=lairs),
        start_us=us,
        end_us=us + length_us,
        about=f"{count} uses within {length_us // MINUTE} minutes by {family(agent)}",
    )
    times = ground.times(us, length_us, count)
    _raid(ground, label, token, holder.organisation, [(at, ground.rng.choice(lairs), agent) for at in times])
    return True


def _short(ip: str) -> str:
    """The network of an address, as `places.host` takes it."""
    return ":".join(network_of(ip).split(":")[:3]) if ":" in ip else ip.rpartition(".")[0]


def many_addresses(ground: Ground) -> bool:
    """Scraping with one token through residential proxies, a few requests from each."""
    rng, us = ground.rng, ground.moment()
    length_us = int(ground.between(5, 60) * MINUTE)
    found = _victim(ground, us, life_us=length_us)
    if found is None:
        return False
    holder, token = found
    addresses = [ground.world.proxies.address(rng) for _ in range(int(ground.between(20, 400)))]
    imitated = rng.random() < 0.5
    agent = rng.choice(sorted(_agents(holder))) if imitated else other_agent(rng, _agents(holder))
    count = max(len(addresses), ground.count(len(addresses), 6 * len(addresses)))
    times = ground.times(us, length_us, count)
    label = ground.label(
        "scraped through proxies",
        rule=MANY_ADDRESSES,
        also=(*_ELSEWHERE, IMPOSSIBLE_RATE),
        entities=entities(token, addresses=addresses),
        start_us=us,
        end_us=us + length_us,
        about=f"{count} uses from {len(addresses)} addresses within {length_us // MINUTE} minutes",
    )
    used = [*addresses, *rng.choices(addresses, k=count - len(addresses))]
    moves = [(at, ip, agent) for at, ip in zip(times, used, strict=True)]
    _raid(ground, label, token, holder.organisation, moves)
    return True


def burst(ground: Ground) -> bool:
    """Malware or an insider in the right place takes all there is: same address, same agent, far more of it."""
    rng, size, us = ground.rng, ground.size, ground.moment(after=0.25)
    length_us, machine = int(ground.between(4, 40) * MINUTE), None
    if rng.random() < 0.35:
        found = ground.habit(us, ("daily",))
        if found is None:
            return False
        habit, token = found
        assert habit.person is not None
        ip, agent = place(habit.person, us, size.start_us), habit.agents[0]
        count, organisation = ground.count(500, 6000), habit.organisation
    else:
        by_machine = ground.machine(us, hourly_max=400, life_us=length_us)
        if by_machine is None:
            return False
        machine, token = by_machine
        hourly = machine.weight * size.uses / size.days / 24 / sum(one.weight for one in ground.behaviour.machines)
        ip, agent = machine.fleet.addresses[0], machine.fleet.agent
        count, organisation = ground.count(max(400, hourly * 10), max(800, hourly * 80)), machine.organisation
    label = ground.label(
        "everything at once",
        rule=BURST,
        also=(IMPOSSIBLE_RATE,),
        entities=entities(token, addresses=[ip]),
        start_us=us,
        end_us=us + length_us,
        about=f"{count} uses within {length_us // MINUTE} minutes",
    )
    moves = [(at, ip, agent) for at in ground.times(us, length_us, count)]
    _raid(ground, label, token, organisation, moves, inside=machine)
    return True


def scanning(ground: Ground) -> bool:
    """T1595: somebody tries strings that may be tokens, at one door, from one address."""
    rng, us = ground.rng, ground.moment(after=0.05)
    organisation, lair = rng.choice(ground.population.organisations), lair_of(ground)
    gateway = rng.choice(organisation.gateways)
    door = rng.choice((gateway.endpoint, "api", "forward-auth"))
    caller = gateway.caller if door == gateway.endpoint else ""
    ip = gateway.own[0] if door == "introspect" else lair
    count = int(ground.between(80, 20_000))
    length_us = int(min(ground.between(2, 180), count / 6) * MINUTE)
    malformed = rng.random() ** 2
    label = ground.label(
        "strings are tried",
        rule=SCANNING,
        entities=entities(addresses=[ip], more=[caller] if caller else []),
        start_us=us,
        end_us=us + length_us,
        about=f"{count} requests within {length_us // MINUTE} minutes at {door}",
    )
    ground.behaviour.refuse(
        (at, caller, ip, "malformed" if rng.random() < malformed else "unknown", door, label.number)
        for at in ground.times(us, length_us, count)
    )
    return True


def scope_probing(ground: Ground) -> bool:
    """The holder of a token, rightful or not, finds out what it is good for."""
    rng, us = ground.rng, ground.moment()
    length_us = int(ground.between(1, 120) * MINUTE)
    found = _victim(ground, us, life_us=length_us)
    if found is None:
        return False
    holder, token = found
    others = [scope for scope in (*SCOPES, *_UNKNOWN_SCOPES) if scope not in token.scope]
    scopes = rng.sample(others, int(ground.between(5, 60)))
    asked = [scope for scope in scopes for _ in range(rng.choice((1, 1, 2, 3)))]
    rng.shuffle(asked)
    inside = rng.random() < 0.5
    if not inside:
        ip, agent = lair_of(ground), other_agent(rng, _agents(holder))
    elif isinstance(holder, Habit):
        assert isinstance(holder.chain.owner, Person)
        ip, agent = place(holder.chain.owner, us, ground.size.start_us), holder.agents[0]
    else:
        ip, agent = rng.choice(holder.fleet.addresses), holder.fleet.agent
    label = ground.label(
        "scopes are tried",
        rule=SCOPE_PROBING,
        also=() if inside else _ELSEWHERE,
        entities=entities(token, addresses=[ip]),
        start_us=us,
        end_us=us + length_us,
        about=f"{len(scopes)} scopes within {length_us // MINUTE} minutes, from {'inside' if inside else 'elsewhere'}",
    )
    moves = [(at, ip, agent) for at in ground.times(us, length_us, len(asked))]
    _raid(ground, label, token, holder.organisation, moves, scopes=asked, inside=holder if inside else None)
    return True


def secret_spraying(ground: Ground) -> bool:
    """T1110.003: one address tries secrets of many clients, few of each, so that none of them is locked."""
    rng, us = ground.rng, ground.moment(after=0.05)
    clients = [client.client_id for client in ground.population.clients]
    chosen = rng.sample(clients, int(ground.between(min(10, len(clients)), min(150, len(clients)))))
    tries = [client for client in chosen for _ in range(rng.choice((1, 1, 2, 3)))]
    rng.shuffle(tries)
    lair, length_us = lair_of(ground), int(ground.between(1, 6 * 60) * MINUTE)
    label = ground.label(
        "secrets are tried",
        rule=SECRET_SPRAYING,
        entities=entities(addresses=[lair]),
        start_us=us,
        end_us=us + length_us,
        about=f"{len(tries)} secrets of {len(chosen)} clients within {length_us // MINUTE} minutes",
    )
    ground.behaviour.refuse(
        (at, client, lair, "invalid_client", "client", label.number)
        for at, client in zip(ground.times(us, length_us, len(tries)), tries, strict=True)
    )
    return True


def dormant_token(ground: Ground) -> bool:
    """A token that its owner has forgotten wakes up in other hands: Okta's and Microsoft's autumn of 2023."""
    rng, size, behaviour = ground.rng, ground.size, ground.behaviour
    for habit in rng.sample(behaviour.habits, len(behaviour.habits)):
        token = habit.chain.token_at(size.start_us + 4 * DAY)
        if habit.kind not in {"daily", "weekly"} or token is None or len(habit.chain.steps) > 1 or habit.silent[1]:
            continue
        if token.token_id in ground.taken or token.expires_us < size.end_us:
            continue
        if habit.gateway.endpoint == "introspect":
            continue
        begun = (token.issued_us - size.start_us) // DAY
        quiet = begun + rng.randint(5, 7)
        asleep = rng.uniform(14, 26)
        us = size.start_us + int((quiet + asleep) * DAY)
        if us > size.end_us - 4 * HOUR:
            continue
        ground.taken.add(token.token_id)
        habit.silent = (quiet, size.days + 1)
        lair = lair_of(ground)
        agent = rng.choice(habit.agents) if rng.random() < 0.3 else other_agent(rng, _agents(habit))
        count = ground.count(1, 300)
        length_us = int(ground.between(1, 180) * MINUTE) if count > 1 else 0
        label = ground.label(
            "woken by a thief",
            rule=DORMANT,
            also=(*_ELSEWHERE, IMPOSSIBLE_RATE),
            entities=entities(token, addresses=[lair]),
            start_us=us,
            end_us=us + length_us,
            about=f"asleep for about {asleep:.0f} days, then {count} uses by {family(agent)}",
        )
        moves = [(at, lair, agent) for at in ground.times(us, length_us, count)]
        _raid(ground, label, token, habit.organisation, moves)
        return True
    return False


def shared_token(ground: Ground) -> bool:
    """A token is passed around or sold: browsers, telephones and scripts use it side by side."""
    rng, us = ground.rng, ground.moment()
    length_us = int(ground.between(20, 24 * 60) * MINUTE)
    found = _victim(ground, us, life_us=min(length_us, 2 * HOUR))
    if found is None:
        return False
    holder, token = found
    length_us = min(length_us, token.expires_us - us, ground.size.end_us - us - HOUR)
    if length_us < 10 * MINUTE:
        return False
    # A browser, a telephone and scripts, each somewhere else.
    agents = [browser(rng), f"Shop/5.{rng.randrange(9)}.0 ({rng.choice(PHONES)})"]
    agents += rng.sample(ATTACKERS, rng.randint(1, 6))
    users = [(_home(ground), agent) for agent in agents]
    count = max(len(users) * 4, int(ground.between(30, 600)))
    times = ground.times(us, length_us, count)
    moves = [(at, *(users[index] if index < len(users) else rng.choice(users))) for index, at in enumerate(times)]
    label = ground.label(
        "used by many",
        rule=SHARED,
        also=(*_ELSEWHERE, MANY_ADDRESSES, IMPOSSIBLE_RATE),
        entities=entities(token, addresses=[ip for ip, _ in users]),
        start_us=us,
        end_us=us + length_us,
        about=f"{len(users)} agents, {count} uses within {length_us // MINUTE} minutes",
    )
    _raid(ground, label, token, holder.organisation, moves)
    return True


def _home(ground: Ground) -> str:
    return ground.rng.choice(ground.world.providers).address(ground.rng)


def impossible_rate(ground: Ground) -> bool:
    """A person's PAT, leaked, is driven by a program: all that the API gives, for as long as it lasts.

    Many requests at a time: one after the other, as in anybody's loop, gives a few a second.
    """
    rng, us = ground.rng, ground.moment()
    found = ground.habit(us, ("daily", "weekly"))
    if found is None:
        return False
    habit, token = found
    assert habit.person is not None
    count, per_second = ground.count(300, 30_000), ground.between(6, 60)
    seconds = max(20.0, count / per_second)
    length_us = int(seconds * SECOND)
    inside = rng.random() < 0.5
    ip = place(habit.person, us, ground.size.start_us) if inside else lair_of(ground)
    agent = rng.choice(habit.agents) if inside else other_agent(rng, _agents(habit))
    label = ground.label(
        "driven by a program",
        rule=IMPOSSIBLE_RATE,
        also=(BURST,) if inside else _ELSEWHERE,
        entities=entities(token, addresses=[ip]),
        start_us=us,
        end_us=us + length_us,
        about=f"{count} uses within {seconds:.0f} s, from {'inside' if inside else 'elsewhere'}",
    )
    _raid(ground, label, token, habit.organisation, [(at, ip, agent) for at in ground.times(us, length_us, count)])
    return True


PLANTS: dict[str, Callable[[Ground], bool]] = dict(
    zip(
        TOKEN_RULES,
        (
            *(refresh_reuse, use_after_end, new_network, many_addresses, burst, scanning),
            *(scope_probing, secret_spraying, dormant_token, shared_token, impossible_rate),
        ),
        strict=True,
    )
)
