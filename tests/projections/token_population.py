"""A small history of tokens and uses, for tests of what auditors ask about tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from events import types as t
from events.streams import LEDGER, USAGE
from projections import analytics
from tests.making import START, History, cli, grt, head, issued, joined, metadata, minted, refreshed, tok, usr
from tests.projections.test_analytics import block, blocks

NOW = START + timedelta(days=20)
LATE = START + timedelta(days=90)
ACCESS, PAT, FIRST_ACCESS, FIRST_REFRESH, SECOND_ACCESS, SECOND_REFRESH, SAT, NEW_PAT, EXPIRED, REVOKED = (
    tok(number) for number in range(1, 11)
)
ADDRESSES = ("192.0.2.1", "192.0.2.2", "198.51.100.3")
SHOP, IDLE, CLOSED = cli(1), cli(2), cli(3)
ANNE, ROBOT = usr(1), usr(2)
VALIDATOR = cli(4)


def _client(client_id: str, scope: str) -> t.ClientRegistered:
    return t.ClientRegistered(**head(), client_id=client_id, metadata=metadata(scope=scope), secret_sha256=None)


def _pat(grant_id: str, token_id: str, **changes: Any) -> t.TokenIssued:
    of_it = minted(token_id, t.Kind.PAT, scope="a b c", expires_at=LATE)
    return issued(grant_id, of_it, subject=ANNE, client_id=None, **changes)


def history() -> History:
    """The shop has five tokens, two of them refresh tokens; Anne replaced her PAT; a robot administers."""
    of_robot = minted(SAT, t.Kind.SAT, scope="ledger:admin", expires_at=LATE)
    return History(
        _client(SHOP, "a b z"),
        _client(IDLE, "q"),
        _client(CLOSED, "q"),
        t.ClientDisabled(**head(), client_id=CLOSED, reason=t.Reason.DISABLED),
        joined(ANNE),
        issued(grt(1), minted(ACCESS, expires_at=LATE)),
        _pat(grt(2), PAT),
        issued(grt(3), minted(FIRST_ACCESS, expires_at=LATE), minted(FIRST_REFRESH, t.Kind.REFRESH, expires_at=LATE)),
        refreshed(
            grt(3),
            FIRST_REFRESH,
            minted(SECOND_ACCESS, expires_at=LATE),
            minted(SECOND_REFRESH, t.Kind.REFRESH, expires_at=LATE),
        ),
        issued(grt(4), of_robot, subject=ROBOT, client_id=None),
        _pat(grt(5), NEW_PAT, rotated_from=PAT, by=SAT),
        t.TokenSuperseded(
            **head(by=SAT), grant_id=grt(2), token_id=PAT, successor_id=NEW_PAT, ends_at=NOW + timedelta(days=1)
        ),
        issued(grt(6), minted(EXPIRED)),
        issued(grt(7), minted(REVOKED, t.Kind.PAT, scope="a", expires_at=LATE), subject=ANNE, client_id=None),
        t.TokenRevoked(**head(), grant_id=grt(7), token_id=REVOKED, reason=t.Reason.COMPROMISED),
    )


def at(days: float) -> datetime:
    return START + timedelta(days=days)


def use(
    days: float, token_id: str, scope: str, outcome: str = "valid", *, ip: str | None = None, **fields: Any
) -> t.TokenUsed:
    members = {"endpoint": "validate", "caller": VALIDATOR} | fields
    return t.TokenUsed(
        int(at(days).timestamp() * 1_000_000),
        token_id,
        None,
        outcome,
        members["endpoint"],
        members["caller"],
        scope,
        "",
        t.Context(ip, members.get("agent", "curl/8"), "GET", "/"),
    )


USES = (
    use(0.5, EXPIRED, "b", ip=ADDRESSES[2]),
    use(1, ACCESS, "a", ip=ADDRESSES[0]),
    use(1, PAT, "a c", ip=ADDRESSES[0]),
    use(19.5, ACCESS, "", ip=ADDRESSES[1], caller=SAT),
    use(19.6, ACCESS, "z", "insufficient_scope", ip=ADDRESSES[0]),
    use(19.7, PAT, "a"),
    use(19.8, SECOND_ACCESS, "a", ip=ADDRESSES[1], agent="Chrome/1"),
    use(19.9, SAT, "ledger:users", ip=ADDRESSES[0], endpoint="api", caller=SAT),
)
UNKNOWN = t.RefusedCount(int(at(19.95).timestamp()) // 60, SAT, ADDRESSES[0], "unknown", "validate", 3)
# How many of the blocks are sealed: the answers are the same.
SEALED = {"nothing sealed": 0, "partly sealed": 4, "all sealed": 8}


@contextmanager
def stored(directory: Path, sealed: int) -> Iterator[analytics.Analytics]:
    """The population in a store, each use in a block of its own."""
    store = analytics.open_analytics(directory)
    try:
        store.apply(LEDGER, history().raw())
        messages = blocks(*(block(one) for one in USES), block(refused=(UNKNOWN,)))
        store.apply(USAGE, messages[:sealed])
        store.flush()
        if sealed:
            assert store.seal() == sealed
        store.apply(USAGE, messages[sealed:])
        store.flush()
        yield store
    finally:
        store.close()
