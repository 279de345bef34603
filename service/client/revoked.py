"""What is revoked, in little memory: a million revocations take some 20 MB.

An id stands for itself as 64 bits of its hash, which Python keys anew in every process. Two ids that have the same are
one in 10^13 among a million, and the wrong one would be refused, never let in.
"""

from __future__ import annotations

from array import array
from datetime import datetime
from typing import Literal

from msgspec import Struct

# A JWT lives for a day at most (the ledger gives none longer, and none longer is taken here), so that what was revoked
# before that concerns none that is still alive. The hour is for the ledger's hosts, whose clocks may differ.
JWT_SECONDS_MAX = 86_400
_KEPT_SECONDS = JWT_SECONDS_MAX + 3_600
# Revocations are forgotten a period at a time: a few tables to look into, and none that must be swept.
_PERIOD_SECONDS = 43_200
# Hosts' clocks may differ by so much: a JWT that was issued so close to a cut-off is asked about.
CLOSE_SECONDS = 5

_SLOTS_MIN = 1 << 10
_FULL_SHARE = 0.6
_BITS = (1 << 64) - 1

REVOKED = 0.0
ASK = -1.0
NEVER = float("inf")

What = Literal["token", "grant", "client", "subject", "key"]


class Revocation(Struct, frozen=True, gc=False):
    """One entry of the feed. `what` says how far it reaches; the other names are told so that followers can filter."""

    revoked_at: datetime
    ledger_seq: int
    reason: str = ""
    what: What | None = None
    token_id: str | None = None
    token_sha256: str | None = None
    grant_id: str | None = None
    client_id: str | None = None
    subject: str | None = None
    kid: str | None = None
    issued_before: datetime | None = None


def _number(name: str) -> int:
    return hash(name) & _BITS or 1


class _Numbers:
    """A set of 64-bit numbers that are not 0. Open addressing; 8 bytes a slot.

    One thread adds while others look: slots are written before they are counted, and tables are replaced whole.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * _SLOTS_MIN))
        self.count = 0

    def __contains__(self, number: int) -> bool:
        slots = self._slots
        mask = len(slots) - 1
        place = number & mask
        while found := slots[place]:
            if found == number:
                return True
            place = (place + 1) & mask
        return False

    def add(self, number: int) -> None:
        slots = self._slots
        if self.count >= len(slots) * _FULL_SHARE:
            slots = self._grown()
        mask = len(slots) - 1
        place = number & mask
        while found := slots[place]:
            if found == number:
                return
            place = (place + 1) & mask
        slots[place] = number
        self.count += 1

    def _grown(self) -> array[int]:
        slots = array("Q", bytes(16 * len(self._slots)))
        mask = len(slots) - 1
        for number in self._slots:
            if number:
                place = number & mask
                while slots[place]:
                    place = (place + 1) & mask
                slots[place] = number
        self._slots = slots
        return slots


class _CutOffs:
    """By a number, the latest time before which everything issued is revoked, in whole seconds since 1970."""

    def __init__(self) -> None:
        self._table = (array("Q", bytes(8 * _SLOTS_MIN)), array("I", bytes(4 * _SLOTS_MIN)))
        self.count = 0

    def get(self, number: int) -> int:
        """0 if there is none."""
        slots, times = self._table
        mask = len(slots) - 1
        place = number & mask
        while found := slots[place]:
            if found == number:
                return times[place]
            place = (place + 1) & mask
        return 0

    def add(self, number: int, seconds: int) -> None:
        slots, times = self._table
        if self.count >= len(slots) * _FULL_SHARE:
            self._table = slots, times = self._grown()
        self.count += _put(slots, times, number, seconds)

    def _grown(self) -> tuple[array[int], array[int]]:
        old_slots, old_times = self._table
        slots, times = array("Q", bytes(16 * len(old_slots))), array("I", bytes(8 * len(old_slots)))
        for number, seconds in zip(old_slots, old_times, strict=True):
            if number:
                _put(slots, times, number, seconds)
        return slots, times


def _put(slots: array[int], times: array[int], number: int, seconds: int) -> int:
    mask = len(slots) - 1
    place = number & mask
    while (found := slots[place]) and found != number:
        place = (place + 1) & mask
    times[place] = max(times[place], seconds)
    slots[place] = number
    return not found


class RevokedSet:
    """Everything that is revoked and can still matter. `generation` grows with each revocation that is new to it.

    `now` is by this host's boot clock everywhere: only differences of two times of the ledger, and what has passed here
    since, say what is over. The clock on the wall may be set to any time and back, which must not make it forget.
    `check` may be called from any thread, `add` and `advance` from one.
    """

    def __init__(self, generation: int = 0) -> None:
        self.generation = generation
        self._periods: dict[int, tuple[_Numbers, _CutOffs]] = {}
        self._tables: tuple[tuple[_Numbers, _CutOffs], ...] = ()
        self._to_come: dict[int, float] = {}
        self._keys: set[str] = set()  # kept for ever: who stole one can sign with it at any time, and date it so

    def __len__(self) -> int:
        return len(self._keys) + len(self._to_come) + sum(ids.count + cuts.count for ids, cuts in self._tables)

    def add(self, one: Revocation, announced_at: float, now: float, *, late_seconds: float = 0.0) -> None:
        """`announced_at`: the time of its announcement by the clock that `revoked_at` is of, so long before `now`.

        A token that was replaced with an overlap is announced before it ends. Whatever else is announced is in force,
        whatever the clocks say.
        """
        at = one.revoked_at.timestamp()
        begins = now - late_seconds + at - announced_at if one.reason == "rotated" and at > announced_at else 0.0
        ids, cuts = self._period(now - max(0.0, announced_at - at))
        if one.what == "key":
            self._keys.add(one.kid or "")
        elif one.what in {"client", "subject"}:
            name = one.client_id if one.what == "client" else one.subject
            before = one.issued_before.timestamp() if one.issued_before else at
            if name is not None:
                cuts.add(_number(f"{one.what} {name}"), max(1, int(before)))
        else:
            name = one.grant_id if one.what == "grant" else one.token_id or one.token_sha256
            if name is not None and begins > now:
                self._to_come[_number(name)] = begins
            elif name is not None:
                ids.add(_number(name))
        self.generation += 1  # last: who sees the new one also sees what it counts

    def _period(self, at: float) -> tuple[_Numbers, _CutOffs]:
        number = int(at // _PERIOD_SECONDS)
        found = self._periods.get(number)
        if found is None:
            found = self._periods[number] = (_Numbers(), _CutOffs())
            self._tables = tuple(self._periods.values())
        return found

    def advance(self, now: float) -> None:
        """Puts into force what has come due, and forgets what no longer matters."""
        due = [number for number, begins in self._to_come.items() if begins <= now]
        for number in due:
            self._period(now)[0].add(number)
            del self._to_come[number]
        self.generation += bool(due)
        old = [number for number in self._periods if (number + 1) * _PERIOD_SECONDS < now - _KEPT_SECONDS]
        for number in old:
            del self._periods[number]
        if old:
            self._tables = tuple(self._periods.values())

    def matters(self, one: Revocation, now: float) -> bool:
        """Whether a revocation can concern a JWT that is still alive. `now` is by the ledger's clock."""
        return one.what == "key" or one.revoked_at.timestamp() >= now - _KEPT_SECONDS

    @property
    def keys(self) -> int:
        """How many keys are revoked."""
        return len(self._keys)

    def has_key(self, kid: str) -> bool:
        """Whether the key is revoked, and with it whatever it signs."""
        return kid in self._keys

    def check(
        self, token_id: str, grant_id: str, owners: tuple[str | None, str | None, str | None], issued_at: float
    ) -> float:
        """`owners`: client, subject and the signing key's id.

        REVOKED, ASK if only the ledger can tell, or the boot time from which the token is revoked: mostly NEVER.
        """
        if owners[2] in self._keys:
            return REVOKED
        token, grant = _number(token_id), _number(grant_id)
        ask = False
        for ids, cuts in self._tables:
            if token in ids or grant in ids:
                return REVOKED
            if cuts.count:
                for kind, name in zip(("client", "subject"), owners, strict=False):
                    before = cuts.get(_number(f"{kind} {name}"))
                    if before and issued_at < before - CLOSE_SECONDS:
                        return REVOKED
                    ask = ask or bool(before and issued_at <= before + 1 + CLOSE_SECONDS)
        if ask:
            return ASK
        return self._to_come.get(token, NEVER) if self._to_come else NEVER
