"""What a snapshot takes from the view: as much as was ever announced, as long as it could matter."""

from __future__ import annotations

import random
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import lmdb
import pytest
from msgspec import UNSET

from events.streams import LEDGER
from events.types import (
    ClientDisabled,
    ClientRevoked,
    GrantRevoked,
    KeyIntroduced,
    KeyRemoved,
    KeyRevoked,
    Kind,
    LedgerEvent,
    Reason,
    SubjectRevoked,
    TokenRevoked,
    TokenSuperseded,
    UserDisabled,
    UserPasswordChanged,
)
from projections.base import boot_time_ns
from projections.current import CurrentReader, CurrentWriter, view_path
from projections.revocations import Known, Revocation, revocation
from projections.revoked import SKEW, Revoked, revoked
from tests.making import (
    DAY,
    START,
    History,
    cli,
    grt,
    head,
    issued,
    joined,
    minted,
    refreshed,
    registered,
    tok,
    usr,
)
from tests.other_process import Remote

Names = dict[tuple[str, str], datetime | None]
NAMES = ("token_id", "grant_id", "client_id", "subject", "kid")


def view_of(directory: Path, history: History) -> CurrentReader:
    path = view_path(directory)
    writer = CurrentWriter(path, sync=False)
    writer.apply(LEDGER, history.raw())
    writer.confirm(LEDGER, history.end, boot_time_ns())
    writer.close()
    return CurrentReader(path)


def snapshot(view: CurrentReader, moment: datetime) -> list[Revoked]:
    with revoked(view, moment) as found:
        return [one for batch in found.batches for one in batch]


def names(told: Iterable[Revocation]) -> Names:
    """What is revoked, and what was issued until when; the latest counts."""
    found: Names = {}
    for one in told:
        name = next(name for name in NAMES if getattr(one, name) is not UNSET)
        until = None if one.issued_before is UNSET else one.issued_before
        before = found.get((name, getattr(one, name)))
        found[name, getattr(one, name)] = max(until, before) if until and before else until
    return found


def announced(history: History) -> list[Revocation]:
    found = (revocation(recorded, Known()) for recorded in history.recorded)
    return [one[1] for one in found if one is not None]


class Random:
    """A history of clients, users, grants and tokens, of which now and then something is revoked."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.history = History(*(registered(cli(n)) for n in range(4)), *(joined(usr(n)) for n in range(4)))
        self.tokens: list[tuple[str, str]] = []  # token and grant, as long as the token was not rotated
        self.chains: dict[str, str] = {}  # grant to its refresh token
        self.keys = 0
        self._next = 0

    def token(self, kind: Kind, **changes: Any) -> tuple[str, Any]:
        self._next += 1
        return tok(self._next), minted(tok(self._next), kind, **changes)

    def step(self) -> None:
        choices = [self.issue] * 4 + [
            self.refresh,
            self.rotate,
            self.revoke_token,
            self.revoke_grant,
            self.revoke_owner,
            self.revoke_key,
        ]
        self.rng.choice(choices)()

    def issue(self) -> None:
        grant_id = grt(len(self.history.recorded))
        lives = timedelta(days=self.rng.choice([1, 1, 90]))
        token_id, first = self.token(Kind.ACCESS, expires_at=START + lives)
        owners: dict[str, Any] = {"subject": usr(self.rng.randrange(4)), "client_id": cli(self.rng.randrange(4))}
        if self.rng.random() < 0.3:
            refresh_id, second = self.token(Kind.REFRESH, expires_at=START + lives)
            self.chains[grant_id] = refresh_id
            self.history.add(issued(grant_id, first, second, **owners))
        else:
            self.history.add(issued(grant_id, first, **owners))
        self.tokens.append((token_id, grant_id))

    def refresh(self) -> None:
        if self.chains:
            grant_id = self.rng.choice(sorted(self.chains))
            token_id, access = self.token(Kind.ACCESS)
            refresh_id, second = self.token(Kind.REFRESH)
            self.history.add(refreshed(grant_id, self.chains[grant_id], access, second))
            self.chains[grant_id] = refresh_id
            self.tokens.append((token_id, grant_id))

    def rotate(self) -> None:
        if self.tokens:
            old, grant_id = self.tokens.pop(self.rng.randrange(len(self.tokens)))
            token_id, successor = self.token(Kind.PAT)
            given = issued(grt(10_000 + len(self.history.recorded)), successor, subject=usr(1), rotated_from=old)
            ends_at = START + timedelta(hours=self.rng.choice([0, 12]))
            superseded = TokenSuperseded(
                **head(), grant_id=grant_id, token_id=old, successor_id=token_id, ends_at=ends_at
            )
            self.history.add(given, superseded)
            self.tokens.append((token_id, given.grant_id))

    def revoke_token(self) -> None:
        if self.tokens:
            token_id, grant_id = self.rng.choice(self.tokens)
            self.history.add(TokenRevoked(**head(), grant_id=grant_id, token_id=token_id, reason=Reason.LOGOUT))

    def revoke_grant(self) -> None:
        if self.tokens:
            _, grant_id = self.rng.choice(self.tokens)
            self.history.add(GrantRevoked(**head(), grant_id=grant_id, reason=Reason.ADMIN))

    def revoke_owner(self) -> None:
        number = self.rng.randrange(4)
        choices: list[LedgerEvent] = [
            ClientRevoked(**head(), client_id=cli(number), reason=Reason.ADMIN),
            ClientDisabled(**head(), client_id=cli(number), reason=Reason.DISABLED),
            SubjectRevoked(**head(), user_id=usr(number), reason=Reason.ABUSE),
            UserDisabled(**head(), user_id=usr(number), reason=Reason.DISABLED),
            UserPasswordChanged(**head(), user_id=usr(number), password_hash=None),
        ]
        self.history.add(self.rng.choice(choices))

    def revoke_key(self) -> None:
        self.keys += 1
        kid = f"ed-{self.keys}"
        introduced = KeyIntroduced(**head(), kid=kid, alg="EdDSA", public_jwk="{}")
        later: list[LedgerEvent] = [KeyRemoved(**head(), kid=kid)] if self.rng.random() < 0.5 else []
        self.history.add(introduced, KeyRevoked(**head(), kid=kid, reason=Reason.COMPROMISED), *later)


@pytest.mark.parametrize("seed", range(8))
def test_snapshot_names_what_was_announced_as_long_as_nothing_has_expired(tmp_path: Path, seed: int) -> None:
    made = Random(seed)
    for _ in range(400):
        made.step()
    view = view_of(tmp_path, made.history)
    found = snapshot(view, START)
    view.close()
    assert names(found) == names(announced(made.history))
    assert all(1 <= one.ledger_seq <= made.history.end for one in found)


@pytest.mark.parametrize("seed", range(8))
def test_snapshot_leaves_out_only_what_has_expired(tmp_path: Path, seed: int) -> None:
    made = Random(seed)
    for _ in range(400):
        made.step()
    view = view_of(tmp_path, made.history)
    moment = START + 2 * DAY
    found, everything = names(snapshot(view, moment)), names(announced(made.history))
    assert found.items() <= everything.items()
    lives = {token_id for token_id, _ in all_tokens(view) if expiry(view, token_id) >= moment}
    gone = everything.keys() - found.keys()
    assert gone
    assert not any(view.hit(name).token.expires_at >= moment for kind, name in gone if kind == "token_id")  # type: ignore[union-attr]
    of_grants = {name for kind, name in gone if kind == "grant_id"}
    assert not {grant_id for token_id, grant_id in all_tokens(view) if token_id in lives} & of_grants
    assert not {kind for kind, _ in gone} & {"client_id", "subject", "kid"}
    view.close()


def all_tokens(view: CurrentReader) -> list[tuple[str, str]]:
    hits = [view.hit(token_id) for token_id in view.token_ids(limit=100_000)]
    return [(hit.token_id, "grt_" + hit.token.grant_id.hex()) for hit in hits if hit is not None]


def expiry(view: CurrentReader, token_id: str) -> datetime:
    hit = view.hit(token_id)
    assert hit is not None
    return hit.token.expires_at


def test_token_stays_until_a_late_clock_takes_it_for_expired(tmp_path: Path) -> None:
    ends = TokenRevoked(**head(), grant_id=grt(1), token_id=tok(1), reason=Reason.LOGOUT)
    view = view_of(tmp_path, History(issued(grt(1), minted(tok(1))), ends))
    expires_at = expiry(view, tok(1))
    assert len(snapshot(view, expires_at + SKEW)) == 1
    assert snapshot(view, expires_at + SKEW + timedelta(seconds=1)) == []
    view.close()


def test_line_says_what_an_announcement_says(tmp_path: Path) -> None:
    token = TokenRevoked(**head(), grant_id=grt(1), token_id=tok(1), reason=Reason.COMPROMISED)
    history = History(
        registered(cli(1)), issued(grt(1), minted(tok(1))), token, issued(grt(2), minted(tok(2)), subject=usr(1))
    )
    grant = history.add(GrantRevoked(**head(), grant_id=grt(2), reason=Reason.ABUSE))
    client = history.add(ClientDisabled(**head(), client_id=cli(1), reason=Reason.DISABLED))
    view = view_of(tmp_path, history)
    hit = view.hit(tok(1))
    assert hit is not None
    known = {
        3: Known(hit.token.sha256.hex(), grt(1), cli(1), cli(1)),
        grant.seq: Known(None, grt(2), cli(1), usr(1)),
        client.seq: Known(),
    }
    told = {one.ledger_seq: one for one in snapshot(view, START)}
    for recorded in history.recorded:
        if recorded.seq in known:
            found = revocation(recorded, known[recorded.seq])
            assert found is not None
            what, expected = found
            line = told.pop(recorded.seq)
            assert line.what == what
            assert {n: getattr(line, n) for n in expected.__struct_fields__} == {
                n: getattr(expected, n) for n in expected.__struct_fields__
            }
    assert told == {}
    view.close()


def test_view_that_is_replaced_while_it_is_read_ends_the_reading(tmp_path: Path) -> None:
    """Whoever reads begins again with the new one; nothing of two views is ever mixed."""
    made = Random(1)
    for _ in range(2000):
        made.step()
    view = view_of(tmp_path, made.history)
    with Remote("projections.current:CurrentWriter", view_path(tmp_path), sync=False) as writer:
        with revoked(view, START) as found:
            next(found.batches)
            writer.call("reset")
            view.freshness()  # any other reading of this process moves over to the new file
            with pytest.raises(lmdb.Error):
                list(found.batches)
        assert snapshot(view, START) == []
    view.close()


def test_reading_sees_one_moment_of_the_view_while_it_goes_on(tmp_path: Path) -> None:
    made = Random(2)
    for _ in range(1500):
        made.step()
    view = view_of(tmp_path, made.history)
    before, end = names(announced(made.history)), made.history.end
    with Remote("projections.current:CurrentWriter", view_path(tmp_path), sync=False) as writer:
        with revoked(view, START) as found:
            read = list(next(found.batches))
            for _ in range(200):
                made.step()
            writer.call("apply", LEDGER, made.history.raw(end))
            assert view.freshness().position == made.history.end
            read += [one for batch in found.batches for one in batch]
        assert found.fresh.position == end
    assert names(read) == before
    view.close()
