"""What happens where people sign in and codes are redeemed: every day, by attackers, and what only looks like them.

As those who suffered or specified the attacks describe them, not as any rule looks for them. Sources: MITRE ATT&CK
T1110.001, .003 and .004 (guessing, spraying, stuffing); Microsoft, January 2024 (few tries for each account, through
residential proxies, for weeks); CISA AA24-057A (the same, and guessing from what the mobile networks of others give);
RFC 7636 §1 (an application on the same phone gets the code, and has no verifier); RFC 9700 §4.5 (stolen codes are
injected into the client in the thief's own browser) and §4.2 (codes leak through referrers, histories and logs);
RFC 6749 §4.1.2, §10.5 (a code that comes twice); RFC 9700 §2.1.1 (a challenge that is always the same); Volexity, April
2025, and Push Security, December 2025 (one prepared link for many victims, who hand over the code themselves).

What the service does is kept to: whoever fails too often must wait, by name and by address and in each worker, and
what is asked meanwhile is not recorded; the third code without its verifier ends the grant; one that was spent and
comes again with its verifier does so too, unless that is within 0.9 s.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from events.types import CodeRefused, CodeReplayed, GrantRevoked, Kind, Reason
from tests.bench.attacks import lair_of, plant_all
from tests.bench.labels import (
    ACCOUNT_GUESSING,
    CODE_REPLAY,
    CONSTANT_CHALLENGE,
    PASSWORD_SPRAYING,
    SIGN_IN_RULES,
    Ground,
    Label,
    entities,
)
from tests.bench.people import DAY, HOUR, MINUTE, SECOND, Client, Person, Token, is_workday
from tests.bench.places import network_of
from tests.bench.population import challenge, place

_WORKERS = 3  # each counts failures by itself
_RACE_US = int(0.9 * SECOND)
_REFUSALS_MAX = 3


class Given(Struct):
    """What a person has allowed a client, and the code that came of it. `redeemed_us` 0: not yet."""

    grant_id: str
    code_id: str
    access: Token
    us: int
    redeemed_us: int = 0


# What is done


def people_of(ground: Ground, us: int) -> list[Person]:
    """Those who are there by then."""
    every = [person for organisation in ground.population.organisations for person in organisation.people]
    return [person for person in every if person.since_us + MINUTE < us]


def allow(ground: Ground, us: int, person: Person, client: Client, *, fixed: str | None = None) -> Given:
    """Somebody allows a client something. The tokens that come of it are used by nobody."""
    population = ground.population
    grant_id = population.identifier("grt_", us, population.signing_in)
    access = Token(
        population.identifier("tok_", us, population.signing_in), grant_id, Kind.ACCESS, client.client_id,
        person.user_id, client.scope, client.organisation.audience, us, us + client.ttl_us,
    )  # fmt: skip
    session_id = population.session(us - 20 * SECOND, person.user_id)
    code_id = population.authorize(
        us, grant_id, access, session_id, challenge=fixed or challenge(population.signing_in)
    )
    return Given(grant_id, code_id, access, us)


def redeem(ground: Ground, us: int, given: Given) -> None:
    population = ground.population
    refresh = Token(
        population.identifier("tok_", us, population.signing_in), given.grant_id, Kind.REFRESH, given.access.client_id,
        given.access.subject, given.access.scope, given.access.audience, us, us + 14 * DAY,
    )  # fmt: skip
    population.redeem(
        us, given.grant_id, given.code_id, access=given.access, refresh=refresh, rng=population.signing_in
    )
    given.redeemed_us = us


def _end(ground: Ground, us: int, given: Given, reason: Reason) -> None:
    population = ground.population
    population.record(
        us, f"grant.{given.grant_id}", GrantRevoked, rng=population.signing_in, grant_id=given.grant_id, reason=reason
    )


def replay(ground: Ground, us: int, given: Given) -> None:
    """The spent code with its verifier. All is over for the grant, unless it comes at once."""
    population, raced = ground.population, us < given.redeemed_us + _RACE_US
    population.record(
        us, f"grant.{given.grant_id}", CodeReplayed, rng=population.signing_in, by=str(given.access.client_id),
        grant_id=given.grant_id, code_id=given.code_id, raced=raced,
    )  # fmt: skip
    if not raced:
        _end(ground, us, given, Reason.CODE_REPLAYED)


def present(ground: Ground, us: int, given: Given, times: int, every_us: int) -> None:
    """The code with another verifier. No more than three of these are recorded."""
    population = ground.population
    for number in range(min(times, _REFUSALS_MAX)):
        population.record(
            us + number * every_us, f"grant.{given.grant_id}", CodeRefused, rng=population.signing_in,
            by=str(given.access.client_id), grant_id=given.grant_id, code_id=given.code_id, cause="verifier",
        )  # fmt: skip
    if times >= _REFUSALS_MAX and not given.redeemed_us:
        _end(ground, us + (_REFUSALS_MAX - 1) * every_us, given, Reason.ABUSE)


def fail(ground: Ground, us: int, user_id: str, ip: str, label: Label | None) -> None:
    """A wrong password; of a name that nobody has if `user_id` is empty."""
    ground.behaviour.refuse([(us, user_id, ip, "invalid_password", "sign-in", label.number if label else 0)])


def _app(ground: Ground) -> Client:
    apps = [client for client in ground.population.clients if client.app] or ground.population.clients[-1:]
    return ground.rng.choice(apps)


# Attacks


def code_replay(ground: Ground) -> bool:
    """Codes in the wrong hands: with their verifiers, or without, at the token endpoint or in the client itself."""
    rng, us, client = ground.rng, ground.moment(), _app(ground)
    how = rng.choices(["replayed with its verifier", "intercepted by another application", "injected"], [3, 3, 4])[0]
    victims = rng.sample(people_of(ground, us), int(ground.between(1, 5) if how[0] == "r" else ground.between(3, 20)))
    length_us = int(ground.between(5, 24 * 60) * MINUTE) if len(victims) > 1 else 0
    grants, last_us, first_us = [], us, 0
    for at, person in zip(ground.times(us, length_us, len(victims)), victims, strict=False):
        given = allow(ground, at, person, client)
        if how == "replayed with its verifier":
            redeem(ground, at + rng.randrange(SECOND // 5, 2 * SECOND), given)
            then = given.redeemed_us + int(ground.between(0.5, 6 * 3600) * SECOND)
            replay(ground, then, given)
        elif how == "injected":
            if rng.random() < 0.5:  # the victim's browser was sooner
                redeem(ground, at + rng.randrange(SECOND // 5, 2 * SECOND), given)
            then = at + int(ground.between(3, 50) * SECOND)
            present(ground, then, given, rng.choice((1, 1, 1, 2)), 5 * SECOND)
        else:
            then = at + rng.randrange(SECOND // 10, 2 * SECOND)
            present(ground, then, given, int(ground.between(1, 8)), SECOND)
        grants += [given.grant_id, given.code_id]
        first_us, last_us = min(first_us or then, then), max(last_us, then + MINUTE)
    ground.label(
        f"code {how}",
        rule=CODE_REPLAY,
        entities=entities(more=[client.client_id, *grants]),
        start_us=first_us,
        end_us=last_us,
        about=f"{len(victims)} codes of one client within {length_us // MINUTE} minutes",
    )
    return True


def constant_challenge(ground: Ground) -> bool:
    """One prepared link for many; a client that was released with the verifier of an example; one made of the user."""
    rng, size, client = ground.rng, ground.size, _app(ground)
    how = rng.choices(["of a prepared link", "of a release", "of the user"], [5, 3, 2])[0]
    us = ground.moment(before=0.7)
    present_then = people_of(ground, us)
    if how == "of a prepared link":
        count, length_us = int(ground.between(3, 60)), int(ground.between(10, 3 * 24 * 60) * MINUTE)
        people = rng.sample(present_then, min(count, len(present_then)))
    elif how == "of a release":
        count, length_us = int(ground.between(4, 200)), int(ground.between(1, 8) * DAY)
        people = rng.choices(present_then, k=count)
    else:
        count, length_us = int(ground.between(4, 30)), int(ground.between(1, 8) * DAY)
        people = [rng.choice(present_then)] * count
    length_us = min(length_us, size.end_us - us - 2 * HOUR)
    fixed, named, times = challenge(rng), [], ground.times(us, length_us, len(people))
    for at, person in zip(times, people, strict=True):
        given = allow(ground, at, person, client, fixed=fixed)
        if rng.random() < 0.9:
            redeem(ground, at + rng.randrange(SECOND // 5, 40 * SECOND), given)
        named += [given.grant_id, given.code_id]
    ground.label(
        f"challenge {how}",
        rule=CONSTANT_CHALLENGE,
        entities=entities(more=[client.client_id, *named]),
        start_us=us,
        end_us=times[-1],
        about=f"{len(people)} authorizations of {len(set(map(id, people)))} people within {length_us // MINUTE} min",
    )
    return True


def password_spraying(ground: Ground) -> bool:
    """T1110.003 and .004: one or two passwords for each of many names, of which some are nobody's."""
    rng, us = ground.rng, ground.moment(after=0.05)
    present_then = people_of(ground, us)
    organisation = rng.choice(ground.population.organisations)
    theirs = [person for person in present_then if person.organisation is organisation]
    wanted = int(ground.between(15, 400))
    known = rng.uniform(0.3, 1)
    source = theirs if len(theirs) >= 20 and rng.random() < 0.5 else present_then
    people = rng.sample(source, min(len(source), max(5, int(wanted * known))))
    names = [person.user_id for person in people] + [""] * int(len(people) * (1 - known) / known)
    length_us = int(ground.between(1, 8 * 60) * MINUTE)
    how = rng.choices(["one address", "some servers", "residential proxies"], [45, 25, 30])[0]
    tries = [name for name in names for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    rng.shuffle(tries)
    if how == "residential proxies":
        lairs = [ground.world.proxies.address(rng) for _ in range(max(2, len(tries) // rng.randint(1, 4)))]
    else:
        lairs = [lair_of(ground) for _ in range(1 if how == "one address" else rng.randint(2, 8))]
    tries = tries[: len(lairs) * _of_address_max(length_us)]
    label = ground.label(
        f"passwords sprayed from {how}",
        rule=PASSWORD_SPRAYING,
        also=(ACCOUNT_GUESSING,),
        entities=entities(addresses=lairs, more=[person.user_id for person in people]),
        start_us=us,
        end_us=us + length_us,
        about=f"{len(tries)} tries for {len(set(tries))} names within {length_us // MINUTE} minutes",
    )
    for at, user_id in zip(ground.times(us, length_us, len(tries)), tries, strict=True):
        fail(ground, at, user_id, rng.choice(lairs), label)
    if rng.random() < 0.3:
        ground.population.session(us + length_us, rng.choice(people).user_id)
    return True


def account_guessing(ground: Ground) -> bool:
    """T1110.001: many machines, few tries each, one account that is worth it."""
    rng, us = ground.rng, ground.moment(after=0.05)
    person, length_us = rng.choice(people_of(ground, us)), int(ground.between(5, 12 * 60) * MINUTE)
    most = _WORKERS * 15 + 12 * length_us // HOUR
    count = int(min(most, ground.between(12, 2000)))
    lairs = [ground.world.proxies.address(rng) for _ in range(int(min(count, ground.between(6, 400))))]
    label = ground.label(
        "one account is guessed at",
        rule=ACCOUNT_GUESSING,
        entities=entities(addresses=lairs, more=[person.user_id]),
        start_us=us,
        end_us=us + length_us,
        about=f"{count} tries from {len(set(map(network_of, lairs)))} networks within {length_us // MINUTE} minutes",
    )
    for at in ground.times(us, length_us, count):
        fail(ground, at, person.user_id, rng.choice(lairs), label)
    return True


def _of_address_max(length_us: int) -> int:
    """So many tries of one address are let through: 30 are free in each worker, then one in half a minute."""
    return _WORKERS * (30 + 2 * length_us // MINUTE)


ATTACKS: dict[str, Callable[[Ground], bool]] = dict(
    zip(SIGN_IN_RULES, (code_replay, constant_challenge, password_spraying, account_guessing), strict=True)
)


# What looks like it and is none


def office_on_monday(ground: Ground) -> None:
    """Passwords had to be changed, or it was a long weekend: several people of an office mistype theirs."""
    rng, size = ground.rng, ground.size
    mondays = [day for day in range(1, size.days) if (size.start_us // DAY + day + 3) % 7 == 0]
    organisation = rng.choice(ground.population.organisations)
    us = size.start_us + rng.choice(mondays) * DAY + int((8.3 - organisation.zone) % 24 * HOUR)
    people = [one for one in people_of(ground, us) if one.organisation is organisation]
    people = rng.sample(people, min(len(people), int(ground.between(4, 40))))
    ip, length_us = rng.choice(organisation.office), int(ground.between(20, 100) * MINUTE)
    label = _benign(ground, "office on a Monday", (us, length_us + HOUR), f"{len(people)} people", addresses=[ip])
    for at, person in zip(ground.times(us, length_us, len(people)), people, strict=False):
        _mistype(ground, at, person, ip, label)


def _mistype(ground: Ground, us: int, person: Person, ip: str, label: Label | None) -> None:
    """Some attempts, seldom with a wrong name, and then the right password, or another day."""
    rng, at = ground.rng, us
    for _ in range(rng.randint(1, 4)):
        fail(ground, at, "" if rng.random() < 0.05 else person.user_id, ip, label)
        at += rng.randrange(4 * SECOND, 60 * SECOND)
    if rng.random() < 0.93:
        ground.population.session(at, person.user_id)


def forgotten(ground: Ground) -> None:
    """Somebody has forgotten the password, and tries at the desk, on the phone, on the way and at home."""
    rng, us = ground.rng, ground.moment(after=0.05)
    person = rng.choice(people_of(ground, us))
    carrier = rng.choice(ground.world.carriers)
    places = [place(person, us, ground.size.start_us), *(carrier.address(rng) for _ in range(rng.randint(1, 3)))]
    places.append(person.homes[0])
    count, length_us = int(ground.between(4, 25)), int(ground.between(3, 150) * MINUTE)
    label = _benign(
        ground, "forgotten password", (us, length_us), f"{count} tries", addresses=places, more=[person.user_id]
    )
    for at in ground.times(us, length_us, count):
        fail(ground, at, person.user_id, rng.choice(places), label)
    if rng.random() < 0.5:
        ground.population.session(us + length_us + MINUTE, person.user_id)


def callback_again(ground: Ground) -> None:
    """A double click, a reload of the callback, or a client that asks again since it had no answer."""
    rng, us = ground.rng, ground.moment()
    given = allow(ground, us, rng.choice(people_of(ground, us)), _app(ground))
    redeem(ground, us + rng.randrange(SECOND // 5, 2 * SECOND), given)
    named = [given.grant_id, given.code_id]
    how = rng.choices(["double click", "client's retry", "reload of the callback"], [5, 3, 2])[0]
    _benign(ground, how, (us, 20 * MINUTE), "code comes twice", more=named)
    if how == "double click":
        replay(ground, given.redeemed_us + rng.randrange(SECOND // 50, _RACE_US), given)
    elif how == "client's retry":
        replay(ground, given.redeemed_us + int(ground.between(0.3, 10) * SECOND), given)
    elif rng.random() < 0.8:  # the client has another verifier by then, or none, which is not recorded
        present(ground, given.redeemed_us + int(ground.between(2, 600) * SECOND), given, rng.randint(1, 2), 4 * SECOND)
    else:
        replay(ground, given.redeemed_us + int(ground.between(2, 600) * SECOND), given)


def two_tabs(ground: Ground) -> None:
    """The second tab's verifier has taken the place of the first one's; the person signs in once more."""
    rng, us, client = ground.rng, ground.moment(), _app(ground)
    person = rng.choice(people_of(ground, us))
    first, second = allow(ground, us, person, client), allow(ground, us + 20 * SECOND, person, client)
    present(ground, us + 2 * SECOND, first, rng.randint(1, 2), SECOND)
    redeem(ground, us + 22 * SECOND, second)
    _benign(ground, "two tabs", (us, MINUTE), "one verifier is lost", more=[first.grant_id, first.code_id])


def broken_release(ground: Ground) -> None:
    """A release does not find the verifiers that the one before had put away; people try again, then it is mended."""
    rng, us, client, named = ground.rng, ground.moment(), _app(ground), list[str]()
    named.append(client.client_id)
    people = rng.sample(people_of(ground, us), int(ground.between(1, 8)))
    length_us = int(ground.between(5, 120) * MINUTE)
    for at, person in zip(ground.times(us, length_us, len(people)), people, strict=False):
        for number in range(rng.randint(1, 3)):
            given = allow(ground, at + number * 40 * SECOND, person, client)
            present(ground, given.us + SECOND, given, 1, SECOND)
            named += [given.grant_id, given.code_id]
    _benign(ground, "release without verifiers", (us, length_us + 5 * MINUTE), f"{len(people)} people", more=named)


def page_again(ground: Ground) -> None:
    """The page for signing in is reloaded, kept as a bookmark, or used once more with the right account."""
    rng, us, client = ground.rng, ground.moment(), _app(ground)
    fixed, person = challenge(rng), rng.choice(people_of(ground, us))
    how = rng.choice(["reload of the page for signing in", "bookmark of the page for signing in", "another account"])
    count = rng.randint(1, 3)
    length_us = int(ground.between(1, 4) * DAY) if how.startswith("bookmark") else int(ground.between(1, 20) * MINUTE)
    length_us = min(length_us, ground.size.end_us - us - HOUR)
    others = [rng.choice(people_of(ground, us)) if how == "another account" else person for _ in range(count)]
    named = [client.client_id]
    for at, one in zip(ground.times(us, length_us, count + 1), [person, *others], strict=True):
        given = allow(ground, at, one, client, fixed=fixed)
        named += [given.grant_id, given.code_id]
    redeem(ground, us + length_us + SECOND, given)
    _benign(ground, how, (us, length_us), f"{count + 1} authorizations", more=named)


def _benign(ground: Ground, kind: str, times: tuple[int, int], about: str, **named: list[str]) -> Label:
    """`times`: when it began and how long it lasted."""
    us, length_us = times
    return ground.label(kind, entities=entities(**named), start_us=us, end_us=us + length_us, about=about)


LOOKALIKES = (office_on_monday, forgotten, callback_again, two_tabs, broken_release, page_again)


def every_day(ground: Ground) -> None:
    """People sign in on some days, and one in ten mistypes before."""
    size = ground.size
    people = people_of(ground, size.end_us)
    for day_us in range(size.start_us, size.end_us, DAY):
        for person in people:
            zone = person.organisation.zone
            local = ground.rng.triangular(7, 22, 9.5)
            at = day_us + int((local - zone) % 24 * HOUR)
            if ground.rng.random() > (0.35 if is_workday(at, zone) else 0.08):
                continue
            if at < person.since_us + HOUR or at > size.end_us - HOUR:
                continue
            if ground.rng.random() < 0.1:
                _mistype(ground, at, person, place(person, at, size.start_us), None)
            else:
                ground.population.session(at, person.user_id)


def plant(hostile: Ground, benign: Ground) -> None:
    """Every day's, every attack, and every look-alike half as often."""
    plant_all(hostile, ATTACKS)
    benign.numbers_after(hostile)
    for _ in range(max(1, benign.size.attacks_per_rule // 2)):
        for make in LOOKALIKES:
            make(benign)
    every_day(benign)
