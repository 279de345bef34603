"""Name and password: is this the person?

Whoever asks learns one thing only, yes or no. A name that nobody has, a wrong password, a service user, a user who was
disabled or has no password are told apart by nothing: same answer, same work, same delays.
"""

from __future__ import annotations

import ipaddress

from msgspec import Struct

from events.errors import LedgerError
from events.types import LedgerEvent, UserDisabled, UserPasswordChanged, UserRegistered
from projections.registry import Username
from service.commands import refused, subject
from service.errors import ServiceError
from service.hashing import passwords
from service.runtime import Runtime
from service.signin.delays import check_delays

USERNAME_CHARS_MAX = 200
PASSWORD_CHARS_MAX = 1_024
PASSWORD_METHOD = "pwd"  # RFC 8176 §2
_NOBODY = "usr_" + "0" * 32


class WrongPassword(ServiceError):
    """One error for every cause."""

    status, code, title = 400, "wrong_password", "That is not right"


class Proof(Struct, frozen=True):
    """Who proved to be whom, how (RFC 8176), and the last event of the user that was known then."""

    user_id: str
    user_seq: int
    methods: tuple[str, ...]


async def check(runtime: Runtime, username: str, password: str, ip: str | None) -> Proof:
    """The person with this name and password.

    An attempt counts as a failure until it has succeeded, so that many at once are no way around the delays. While an
    account or address is delayed nothing is looked at, and the right password is refused as any.

    Raises: WrongPassword, TooManyRequests, Unavailable.
    """
    # Of any length: nobody who was registered has a longer one.
    name = runtime.master.username_hash(username[: USERNAME_CHARS_MAX + 1])
    place = _place(ip)
    check_delays(runtime.account_delays.seconds(name), runtime.address_delays.seconds(place))
    runtime.account_delays.fail(name)
    runtime.address_delays.fail(place)
    try:
        user_id, state = await _known(runtime, name)
        matches = await passwords.matches(state.password_hash, password[: PASSWORD_CHARS_MAX + 1])
    except BaseException:
        # Nothing was found out, whoever's fault it is.
        runtime.account_delays.undo(name)
        runtime.address_delays.undo(place)
        raise
    if not matches:
        named = user_id if user_id != _NOBODY else ""
        runtime.usage.count_refused(caller=named, ip=ip, outcome="invalid_password", endpoint="sign-in")
        raise WrongPassword("username or password is not right", fix="check both, and type them again")
    runtime.account_delays.forgive(name)
    runtime.address_delays.undo(place)
    return Proof(user_id, state.seq, (PASSWORD_METHOD,))


class _State(Struct, frozen=True):
    """`password_hash` is None for whoever cannot sign in."""

    seq: int
    password_hash: str | None


async def _known(runtime: Runtime, name_hash: str) -> tuple[str, _State]:
    """Who has the name, and their hash, which stands in the log alone. The same steps for nobody as for somebody.

    Raises: Unavailable.
    """
    # Registered, disabled or given a new password a moment ago, perhaps on another host.
    await runtime.view_at_end()
    row = runtime.view.row("username", name_hash.encode())
    user_id = row.user_id if isinstance(row, Username) else _NOBODY
    try:
        history = await runtime.ledger.read(subject("user", user_id))
    except LedgerError as error:
        raise refused(error) from error
    state = _State(0, None)
    for recorded in history:
        state = _evolve(state, recorded.event, recorded.seq)
    if any(isinstance(recorded.event, UserDisabled) for recorded in history):
        state = _State(state.seq, None)
    return user_id, state


def _evolve(state: _State, event: LedgerEvent, seq: int) -> _State:
    match event:
        case UserRegistered():
            return _State(seq, event.password_hash if event.kind == "person" else None)
        case UserPasswordChanged():
            return _State(seq, event.password_hash)
        case _:
            return _State(seq, state.password_hash)


def _place(ip: str | None) -> str:
    """Of IPv6 the first 64 bits: one who has an address there has them all."""
    if ip is None or ":" not in ip:
        return ip or ""
    return str(ipaddress.ip_network(f"{ip}/64", strict=False))
