"""Name and password: who is who, and that nobody learns more than yes or no."""

from __future__ import annotations

import asyncio
from typing import Any

import argon2
import pytest

from events.types import UserPasswordChanged
from service.errors import TooManyRequests, Unavailable
from service.hashing import Hashing, passwords
from service.registry import UserChange, change_user, disable_user
from service.rules.passwords import PASSWORD_CHARS_MAX
from service.signin.delays import Delays
from service.signin.passwords import Proof, WrongPassword, check
from tests.hosts import Host
from tests.making import head
from tests.signin.people import SYSTEM, Person, joined

IP = "192.0.2.1"


@pytest.fixture(autouse=True)
def nobody_waits(here: Host) -> None:
    """Nothing is remembered, and time stands still."""
    here.runtime.account_delays = Delays(5, 900, clock=lambda: 1e6)
    here.runtime.browser_delays = Delays(5, 900, clock=lambda: 1e6)
    here.runtime.address_delays = Delays(30, 900, clock=lambda: 1e6)


async def checked(here: Host, username: str, password: str, ip: str | None = IP) -> Proof:
    return await here.projecting(check(here.runtime, username, password, ip))


async def refusal(here: Host, username: str, password: str, ip: str | None = IP) -> WrongPassword:
    with pytest.raises(WrongPassword) as refused:
        await checked(here, username, password, ip)
    return refused.value


async def test_right_password_proves_who_one_is(here: Host) -> None:
    person = await joined(here)
    row = here.runtime.view.user(person.user_id)
    assert row is not None
    assert await checked(here, person.username, person.password) == Proof(person.user_id, row.seq, ("pwd",))


async def test_password_that_was_just_set_is_good_and_the_old_one_is_not(here: Host) -> None:
    """The view need not know of it yet: the hash is read from the log."""
    person = await joined(here)
    change = UserChange(names=frozenset({"password"}), profile={}, password="cnrypass-new")
    await here.projecting(change_user(here.runtime, SYSTEM, person.user_id, change))
    assert (await checked(here, person.username, "cnrypass-new")).user_id == person.user_id
    await refusal(here, person.username, person.password)


async def test_password_is_the_same_from_any_keyboard(here: Host) -> None:
    """RFC 8265 §4.2: of letters with accents, and of blanks."""
    person = await joined(here, password="cnrypass cafe\u0301")
    for written in ("cnrypass caf\u00e9", "cnrypass\u00a0cafe\u0301"):
        assert (await checked(here, person.username, written)).user_id == person.user_id
    await refusal(here, person.username, "cnrypass cafe")


async def unknown(here: Host) -> tuple[str, str]:
    return "cnryuser-nobody", "cnrypass-x"


async def wrong(here: Host) -> tuple[str, str]:
    return (await joined(here)).username, "cnrypass-wrong"


async def wrong_of_a_long_history(here: Host) -> tuple[str, str]:
    person = await joined(here)
    for number in range(5):
        change = UserChange(names=frozenset({"display_name"}), profile={"display_name": f"{number}" + "x" * 190})
        await here.projecting(change_user(here.runtime, SYSTEM, person.user_id, change))
    return person.username, "cnrypass-wrong"


async def too_long(here: Host) -> tuple[str, str]:
    """A name that nobody can have."""
    return (await joined(here)).username + "x" * 1_000, "cnrypass-x"


async def service_user(here: Host) -> tuple[str, str]:
    return (await joined(here, kind="service", password=None)).username, "cnrypass-x"


async def without_password(here: Host) -> tuple[str, str]:
    return (await joined(here, password=None)).username, "cnrypass-x"


async def disabled(here: Host) -> tuple[str, str]:
    person = await joined(here)
    await here.projecting(disable_user(here.runtime, SYSTEM, person.user_id, erase=False))
    return person.username, person.password


async def erased(here: Host) -> tuple[str, str]:
    person = await joined(here)
    await here.projecting(disable_user(here.runtime, SYSTEM, person.user_id, erase=True))
    return person.username, person.password


async def password_taken_away(here: Host) -> tuple[str, str]:
    person = await joined(here)
    change = UserChange(names=frozenset({"password"}), profile={}, password=None)
    await here.projecting(change_user(here.runtime, SYSTEM, person.user_id, change))
    return person.username, person.password


async def other_case(here: Host) -> tuple[str, str]:
    person = await joined(here)
    return person.username.upper(), person.password


async def by_id(here: Host) -> tuple[str, str]:
    person = await joined(here)
    return person.user_id, person.password


async def empty(here: Host) -> tuple[str, str]:
    return (await joined(here)).username, ""


async def longer(here: Host) -> tuple[str, str]:
    """Cut to what is looked at, it would not be the password."""
    person = await joined(here, password="cnrypass" + "x" * 1016)
    return person.username, person.password + "x"


REFUSED = [
    unknown,
    wrong,
    wrong_of_a_long_history,
    too_long,
    service_user,
    without_password,
    disabled,
    erased,
    password_taken_away,
    other_case,
    by_id,
    empty,
    longer,
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda one: one.__name__)
async def test_whoever_is_refused_learns_one_thing_and_it_costs_the_same(
    here: Host, monkeypatch: pytest.MonkeyPatch, case: Any
) -> None:
    """The work is counted, since a clock proves nothing: one look at the log's end, one event read, one hash."""
    username, password = await case(here)
    asked: list[str] = []

    def count(where: object, name: str) -> None:
        work = getattr(where, name)

        async def counted(*given: Any, **more: Any) -> Any:
            asked.append(name)
            return await work(*given, **more)

        monkeypatch.setattr(where, name, counted)

    count(here.runtime, "view_at_end")
    count(here.runtime.ledger, "read")
    count(here.runtime.ledger, "get")
    count(passwords, "matches")
    before = passwords.done
    refused = await refusal(here, username, password)
    assert passwords.done - before == 1
    assert asked == ["view_at_end", "get", "matches"]
    assert (refused.detail, refused.fix, refused.status, refused.headers, refused.private) == (
        "username or password is not right",
        "check both, and type them again",
        400,
        {},
        "",
    )


@pytest.mark.parametrize("password", ["cnrypass cafe\u0301", "cnrypass\u00a0caf\u00e9", "cnrypass\u3000abc"])
async def test_password_hashed_as_it_was_entered_by_an_earlier_version_lets_in(here: Host, password: str) -> None:
    person = await joined(here)
    raw = argon2.PasswordHasher().hash(password)
    await here.record(UserPasswordChanged(**head(), user_id=person.user_id, password_hash=raw))
    await here.project()
    proof = await checked(here, person.username, password)
    assert proof.user_id == person.user_id


async def test_longest_password_lets_in_as_it_was_entered(here: Host) -> None:
    """With accents beside their letters it is twice as long as what it is hashed as."""
    password = "cnrypass" + "e\u0301" * ((PASSWORD_CHARS_MAX - 8) // 2)
    person = await joined(here, password=password)
    proof = await checked(here, person.username, password)
    assert proof.user_id == person.user_id


def test_nobodys_hash_costs_what_everybodys_does() -> None:
    hashing = Hashing(argon2.PasswordHasher())
    mine = argon2.extract_parameters(argon2.PasswordHasher().hash("x"))
    assert argon2.extract_parameters(hashing._nobodys) == mine


async def test_nobodys_hash_has_no_password() -> None:
    assert await passwords.matches(None, "") is False
    assert await passwords.matches("not a hash", "") is False
    made = await passwords.make("cnrypass-x")
    assert await passwords.matches(made, "cnrypass-x") is True


async def test_hashes_are_computed_one_at_a_time_and_few_wait() -> None:
    hashing = Hashing(argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
    done = await asyncio.gather(*(hashing.matches(None, "x") for _ in range(70)), return_exceptions=True)
    assert done.count(False) == hashing.done == 64
    assert sum(isinstance(one, Unavailable) for one in done) == 6
    assert await hashing.matches(None, "x") is False


async def test_crowd_of_sign_ins_leaves_places_for_passwords_that_are_set() -> None:
    """Users are registered and changed while others guess."""
    hashing = Hashing(argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
    guesses = [asyncio.ensure_future(hashing.matches(None, "x")) for _ in range(64)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await hashing.matches(None, "x")
    assert await hashing.matches(await hashing.make("cnrypass-x"), "cnrypass-x") is True
    assert await asyncio.gather(*guesses) == [False] * 64


async def test_failures_are_counted_in_usage_by_user_and_address(here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    person = await joined(here)
    counted: list[dict[str, Any]] = []
    monkeypatch.setattr(here.runtime.usage, "count_refused", lambda **of: counted.append(of))
    await refusal(here, person.username, "cnrypass-wrong", "192.0.2.77")
    await refusal(here, "cnryuser-nobody", "cnrypass-wrong", "192.0.2.77")
    failed = {"ip": "192.0.2.77", "outcome": "invalid_password", "endpoint": "sign-in"}
    assert counted == [{"caller": person.user_id, **failed}, {"caller": "", **failed}]


# Delays


async def delayed(here: Host, username: str, password: str, ip: str | None) -> int:
    """How long one is told to wait, 0 if one is not."""
    try:
        await checked(here, username, password, ip)
    except WrongPassword:
        return 0
    except TooManyRequests as refused:
        return int(refused.headers["Retry-After"])
    return 0


@pytest.mark.parametrize("known", [True, False], ids=["somebody", "nobody"])
async def test_account_is_delayed_from_every_address_whether_it_exists_or_not(here: Host, known: bool) -> None:
    person = await joined(here) if known else Person("", "cnryuser-nobody-at-all", "cnrypass-x")
    waits = [await delayed(here, person.username, "cnrypass-wrong", f"192.0.2.{number}") for number in range(5)]
    assert waits == [0] * 5
    before = passwords.done
    # The right one too: else delays would hide nothing from whoever guesses it.
    assert await delayed(here, person.username, person.password, "192.0.2.99") == 1
    assert passwords.done == before
    assert await delayed(here, (await joined(here)).username, "cnrypass-wrong", "192.0.2.99") == 0


async def test_success_forgives_the_account(here: Host) -> None:
    person = await joined(here)
    for _ in range(2):
        for _ in range(4):
            await refusal(here, person.username, "cnrypass-wrong")
        assert (await checked(here, person.username, person.password)).user_id == person.user_id


async def test_address_is_delayed_for_every_account(here: Host) -> None:
    here.runtime.address_delays = Delays(3, 900, clock=lambda: 1e6)
    for number, ip in enumerate(("2001:db8::1", "2001:db8::2", "2001:db8::ffff:1")):
        assert await delayed(here, f"cnryuser-{number}", "cnrypass-x", ip) == 0
    assert await delayed(here, "cnryuser-9", "cnrypass-x", "2001:db8::3") == 1
    assert await delayed(here, "cnryuser-9", "cnrypass-x", "2001:db8:0:1::1") == 0
    assert await delayed(here, "cnryuser-9", "cnrypass-x", None) == 0


@pytest.mark.parametrize(
    ("bits", "inside", "outside"),
    [
        (56, "2001:db8:0:{:x}::1", "2001:db8:0:1ff::1"),
        (48, "2001:db8:0:{:x}00::1", "2001:db8:1:ff00::1"),
    ],
)
async def test_ipv6_networks_are_delayed_as_a_whole(here: Host, bits: int, inside: str, outside: str) -> None:
    """A tunnel broker gives everybody 65,536 networks of 64 bits."""
    here.runtime.network_delays = {bits: Delays(4, 30, clock=lambda: 1e6)}
    for number in range(4):
        assert await delayed(here, f"cnryuser-{number}", "cnrypass-x", inside.format(number)) == 0
    assert await delayed(here, "cnryuser-9", "cnrypass-x", inside.format(9)) == 1
    assert await delayed(here, "cnryuser-9", "cnrypass-x", outside) == 0


async def test_success_makes_nobody_else_at_the_address_wait(here: Host) -> None:
    """An office behind one address, where many have mistyped: whoever succeeds does not begin the delay anew."""

    class Clock:
        now = 1e6

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    here.runtime.address_delays = Delays(3, 30, passes_seconds=60, clock=clock)
    person = await joined(here)
    for _ in range(9):
        here.runtime.address_delays.fail(IP)
    assert await delayed(here, person.username, person.password, IP) == 30
    clock.now += 30
    assert (await checked(here, person.username, person.password)).user_id == person.user_id
    assert (await checked(here, person.username, person.password)).user_id == person.user_id


async def test_many_at_once_are_no_way_around_the_delay(here: Host) -> None:
    person = await joined(here)
    before = passwords.done
    work = asyncio.gather(
        *(check(here.runtime, person.username, f"cnrypass-{number}", IP) for number in range(12)),
        return_exceptions=True,
    )

    async def all_of_them() -> list[Any]:
        return list(await work)

    answers = await here.projecting(all_of_them())
    assert passwords.done - before == 5
    assert sum(isinstance(one, TooManyRequests) for one in answers) == 7


async def test_attempt_that_could_not_be_looked_at_is_no_failure(here: Host) -> None:
    person = await joined(here)

    async def down(*_: object, **__: object) -> None:
        raise Unavailable("the log is away")

    at_end = here.runtime.view_at_end
    here.runtime.view_at_end = down  # type: ignore[method-assign]
    try:
        for _ in range(20):
            with pytest.raises(Unavailable):
                await check(here.runtime, person.username, person.password, IP)
    finally:
        here.runtime.view_at_end = at_end  # type: ignore[method-assign]
    assert (await checked(here, person.username, person.password)).user_id == person.user_id
