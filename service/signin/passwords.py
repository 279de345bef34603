"""Name and password: is this the person?

Whoever asks learns one thing only, yes or no. A name that nobody has, a wrong password, a service user, a user who was
disabled or has no password are told apart by nothing: same answer, same work, same delays.
"""

from __future__ import annotations

import ipaddress

from msgspec import Struct

from events.errors import LedgerError
from events.types import UserPasswordChanged, UserRegistered
from projections.registry import User, Username
from service.commands import refused
from service.errors import ServiceError
from service.hashing import passwords
from service.incoming import Incoming
from service.rules.passwords import PASSWORD_CHARS_MAX
from service.runtime import Runtime
from service.signin.acquainted import Acquaintance, acquaintance
from service.signin.delays import Counters, Delays

USERNAME_CHARS_MAX = 200
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


async def check(
    runtime: Runtime, username: str, password: str, ip: str | None, *, incoming: Incoming | None = None
) -> Proof:
    """The person with this name and password.

    An attempt counts as a failure until it has succeeded, so that many at once are no way around the delays. While an
    account or address is delayed nothing is looked at, and the right password is refused as any; but not to a browser
    that the person has signed in with since they have the password, which has delays of its own.

    Raises: WrongPassword, TooManyRequests, Unavailable.
    """
    name = name_hash(runtime, username)
    known = acquaintance(runtime, incoming, name) if incoming is not None else None
    counters = _counters(runtime, name, ip, known)
    counters.begin()
    try:
        state = await _known(runtime, name)
        if known is not None and known.user_seq < state.password_seq:
            # From before the password was changed: as any other browser.
            counters.undo()
            counters = _counters(runtime, name, ip, None)
            counters.begin()
        matches = await passwords.matches(state.password_hash, password[: PASSWORD_CHARS_MAX + 1])
    except BaseException:
        # Nothing was found out, whoever's fault it is.
        counters.undo()
        raise
    if not matches:
        counters.fail()
        named = state.user_id if state.user_id != _NOBODY else ""
        runtime.usage.count_refused(caller=named, ip=ip, outcome="invalid_password", endpoint="sign-in")
        raise WrongPassword("username or password is not right", fix="check both, and type them again")
    counters.undo()
    if known is None:
        runtime.account_delays.forgive(name)
    else:
        # Alone: what others guess elsewhere is none the better for it.
        runtime.browser_delays.forgive(_of_browser(name, known))
    return Proof(state.user_id, state.seq, (PASSWORD_METHOD,))


def name_hash(runtime: Runtime, username: str) -> str:
    """Of any length: nobody who was registered has a longer one."""
    return runtime.master.username_hash(username[: USERNAME_CHARS_MAX + 1])


def _counters(runtime: Runtime, name: str, ip: str | None, known: Acquaintance | None) -> Counters:
    if known is not None:
        return Counters([(runtime.browser_delays, _of_browser(name, known))])
    return Counters([(runtime.account_delays, name), *_of_address(runtime, ip)])


def _of_browser(name: str, known: Acquaintance) -> str:
    return f"{known.browser} {name}"


class _State(Struct, frozen=True):
    """`password_hash` is None for whoever cannot sign in, and was set at `password_seq`."""

    user_id: str
    seq: int
    password_hash: str | None
    password_seq: int


async def _known(runtime: Runtime, name_hash: str) -> _State:
    """Who has the name, and their hash, which stands in the log alone. The same steps for nobody as for somebody.

    One event is read, however many there are of the user. For nobody it is that of whoever comes next by the name's
    hash: as old as any user's, and asked for as often, so that what the log keeps at hand tells nothing.

    Raises: Unavailable.
    """
    # Registered, disabled or given a new password a moment ago, perhaps on another host.
    await runtime.view_at_end()
    name, user = _at_or_behind(runtime, name_hash.encode())
    try:
        recorded = await runtime.ledger.get(user.password_seq if user is not None else 1)
    except LedgerError as error:
        raise refused(error) from error
    if user is None or name != name_hash.encode():
        return _State(_NOBODY, 0, None, 0)
    event = recorded.event if recorded is not None else None
    hashed = event.password_hash if isinstance(event, UserRegistered | UserPasswordChanged) else None
    can_sign_in = user.kind == "person" and user.disabled_at is None
    return _State(user.user_id, user.seq, hashed if can_sign_in else None, user.password_seq)


def _at_or_behind(runtime: Runtime, name_hash: bytes) -> tuple[bytes, User | None]:
    """The first user whose name has this hash or a later one, beginning anew behind the last; None if there is none."""
    rows = runtime.view.rows("username", start=name_hash, limit=1) or runtime.view.rows("username", limit=1)
    for name, row in rows:
        if isinstance(row, Username):
            return name, runtime.view.user(row.user_id)
    return b"", None


def _of_address(runtime: Runtime, ip: str | None) -> list[tuple[Delays, str]]:
    """Of IPv6 by the first 64 bits, since one who has an address there has them all, and by those of their networks."""
    if ip is None or ":" not in ip:
        return [(runtime.address_delays, ip or "")]
    of_networks = [(delays, _network(ip, bits)) for bits, delays in runtime.network_delays.items()]
    return [(runtime.address_delays, _network(ip, 64)), *of_networks]


def _network(ip: str, bits: int) -> str:
    return str(ipaddress.ip_network(f"{ip}/{bits}", strict=False))
