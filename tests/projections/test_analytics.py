"""The analytics store: real DuckDB, real nats-server, killed processes. Issue 2, items 3 and 4."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import typing
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pytest
import structlog.testing

from events import codec, streams
from events import types as t
from events.errors import UndecodableEvent
from events.server import EmbeddedServer
from events.streams import LEDGER, USAGE, RawMessage
from projections import analytics, base
from projections.analytics import schema, store
from projections.analytics.readers import published_directory
from tests import running

NOW = datetime(2026, 11, 22, 10, tzinfo=UTC)
SECRET = "plantedsecretplantedsecret"
SHA = "ab" * 32


def new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


TOKEN, REFRESH, SUCCESSOR, GRANT = new_id("tok"), new_id("tok"), new_id("tok"), new_id("grt")
CLIENT, USER = new_id("cli"), new_id("usr")


def minted(token_id: str, kind: t.Kind = t.Kind.ACCESS) -> t.MintedToken:
    return t.MintedToken(
        token_id=token_id,
        sha256=SHA,
        kind=kind,
        scope="orders:read",
        audience=("https://api.example",),
        expires_at=NOW + timedelta(hours=1),
        kid="k1",
    )


def common(**fields: Any) -> dict[str, Any]:
    return {"id": new_id("evt"), "occurred_at": NOW, "by": "system", "request_id": "req_1"} | fields


def issued(grant_id: str = GRANT, token_ids: tuple[str, ...] = (TOKEN,), **fields: Any) -> t.TokenIssued:
    return t.TokenIssued(
        **common(
            grant_id=grant_id,
            subject=USER,
            client_id=CLIENT,
            scope="orders:read",
            audience=("https://api.example",),
            tokens=tuple(minted(token_id) for token_id in token_ids),
            sealed_name=SECRET.encode(),
        )
        | fields
    )


def refreshed(grant_id: str, spent: str, new: tuple[str, ...]) -> t.TokenRefreshed:
    return t.TokenRefreshed(
        **common(
            grant_id=grant_id,
            spent_token_id=spent,
            answer_id="ans_1",
            tokens=tuple(minted(token_id, t.Kind.REFRESH) for token_id in new),
        )
    )


METADATA = t.ClientMetadata(
    client_name="Shop",
    grant_types=("client_credentials",),
    response_types=(),
    redirect_uris=("https://shop.example/back",),
    scope="orders:read",
    token_endpoint_auth_method="client_secret_basic",
    access_token_format="jwt",
    access_token_ttl_seconds=3600,
    refresh_token_idle_ttl_seconds=3600,
    refresh_token_max_ttl_seconds=3600,
    audience=("https://api.example",),
    may_introspect=False,
)
SCOPE = {"name": "orders:read", "description": "Reads", "audience": ("https://api.example",), "implies": ()}
SEALED = SECRET.encode()

# One example of every event, and the columns subject, client_id, user_id, grant_id, token_ids that it must get.
READ = {
    "read_id": "exp_1",
    "subject": USER,
    "client_id": None,
    "what": "export",
    "dataset": "uses",
    "format": "csv",
    "statement_sha256": "0" * 64,
    "sealed_statement": b"sealed",
}
WEBHOOK = t.WebhookMetadata(webhook_name="w", owner=USER, origin="https://hooks.example:443")
EXPORTED = {
    "read_id": "exp_1",
    "rows": 1,
    "size": 2,
    "sha256": "1" * 64,
    "statement": "SELECT",
    "ledger_seq": 1,
    "usage_seq": 1,
    "first_ledger_seq": None,
    "last_ledger_seq": None,
    "first_usage_seq": 1,
    "last_usage_seq": 1,
    "software": "token-ledger 0",
}
EXAMPLES: list[tuple[t.LedgerEvent, tuple[str | None, str | None, str | None, str | None, list[str]]]] = [
    (issued(rotated_from=SUCCESSOR), (USER, CLIENT, USER, GRANT, [TOKEN, SUCCESSOR])),
    (
        t.AuthorizationGranted(
            **common(
                grant_id=GRANT,
                subject=USER,
                client_id=CLIENT,
                scope="orders:read",
                audience=(),
                session_id="ses_1",
                code=minted(SUCCESSOR, t.Kind.CODE),
                redirect_uri="https://shop.example/back",
                code_challenge="c",
                sealed_nonce=SEALED,
                auth_time=NOW,
                offline=True,
                response_type="code",
            )
        ),
        (USER, CLIENT, USER, GRANT, [SUCCESSOR]),
    ),
    (
        t.CodeRedeemed(
            **common(
                grant_id=GRANT,
                code_id=SUCCESSOR,
                tokens=(minted(TOKEN),),
                refresh_idle_ttl_seconds=None,
                refresh_ends_at=None,
            )
        ),
        (USER, CLIENT, USER, GRANT, [SUCCESSOR, TOKEN]),
    ),
    (
        t.CodeRefused(**common(grant_id=GRANT, code_id=SUCCESSOR, cause="verifier")),
        (USER, CLIENT, USER, GRANT, [SUCCESSOR]),
    ),
    (
        t.CodeReplayed(**common(grant_id=GRANT, code_id=SUCCESSOR, raced=False)),
        (USER, CLIENT, USER, GRANT, [SUCCESSOR]),
    ),
    (
        t.AccessRenewed(
            **common(grant_id=GRANT, refresh_token_id=REFRESH, tokens=(minted(TOKEN),), refresh_expires_at=NOW)
        ),
        (USER, CLIENT, USER, GRANT, [REFRESH, TOKEN]),
    ),
    (refreshed(GRANT, REFRESH, (SUCCESSOR,)), (USER, CLIENT, USER, GRANT, [REFRESH, SUCCESSOR])),
    (
        t.RefreshReplayed(**common(grant_id=GRANT, token_id=REFRESH, answered=True)),
        (USER, CLIENT, USER, GRANT, [REFRESH]),
    ),
    (
        t.TokenRevoked(**common(grant_id=GRANT, token_id=TOKEN, reason=t.Reason.ADMIN, sealed_comment=SEALED)),
        (USER, CLIENT, USER, GRANT, [TOKEN]),
    ),
    (
        t.TokenSuperseded(**common(grant_id=GRANT, token_id=TOKEN, successor_id=SUCCESSOR, ends_at=NOW)),
        (USER, CLIENT, USER, GRANT, [TOKEN, SUCCESSOR]),
    ),
    (
        t.GrantRevoked(**common(grant_id=GRANT, reason=t.Reason.LOGOUT, sealed_comment=SEALED)),
        (USER, CLIENT, USER, GRANT, []),
    ),
    (
        t.ClientRegistered(**common(client_id=CLIENT, metadata=METADATA, secret_sha256=SHA)),
        (CLIENT, CLIENT, None, None, []),
    ),
    (t.ClientChanged(**common(client_id=CLIENT, metadata=METADATA)), (CLIENT, CLIENT, None, None, [])),
    (
        t.ClientSecretRotated(**common(client_id=CLIENT, secret_sha256=SHA, previous_ends_at=NOW)),
        (CLIENT, CLIENT, None, None, []),
    ),
    (
        t.ClientRevoked(**common(client_id=CLIENT, reason=t.Reason.ADMIN, sealed_comment=SEALED)),
        (CLIENT, CLIENT, None, None, []),
    ),
    (t.ClientDisabled(**common(client_id=CLIENT, reason=t.Reason.DISABLED)), (CLIENT, CLIENT, None, None, [])),
    (
        t.UserRegistered(
            **common(
                user_id=USER,
                kind="person",
                username_hash="h",
                sealed_profile=SEALED,
                scope="",
                password_hash=f"$argon2id${SECRET}",
            )
        ),
        (USER, None, USER, None, []),
    ),
    (t.UserChanged(**common(user_id=USER, sealed_profile=SEALED, scope="")), (USER, None, USER, None, [])),
    (
        t.UserPasswordChanged(**common(user_id=USER, password_hash=f"$argon2id${SECRET}")),
        (USER, None, USER, None, []),
    ),
    (
        t.SubjectRevoked(**common(user_id=USER, reason=t.Reason.ABUSE, sealed_comment=SEALED)),
        (USER, None, USER, None, []),
    ),
    (t.UserDisabled(**common(user_id=USER, reason=t.Reason.DISABLED)), (USER, None, USER, None, [])),
    (t.SubjectErased(**common(user_id=USER)), (USER, None, USER, None, [])),
    (t.UsernameClaimed(**common(username_hash="h", user_id=USER)), (USER, None, USER, None, [])),
    (
        t.SessionStarted(
            **common(session_id="ses_1", user_id=USER, auth_time=NOW, expires_at=NOW, methods=("pwd",), user_seq=1)
        ),
        (USER, None, USER, None, []),
    ),
    (t.SessionEnded(**common(session_id="ses_1", user_id=USER, reason="signed_out")), (USER, None, USER, None, [])),
    (t.ConsentGiven(**common(user_id=USER, client_id=CLIENT, scope="a")), (USER, CLIENT, USER, None, [])),
    (t.ConsentWithdrawn(**common(user_id=USER, client_id=CLIENT)), (USER, CLIENT, USER, None, [])),
    (t.ScopeRegistered(**common(**SCOPE)), (None, None, None, None, [])),
    (t.ScopeChanged(**common(**SCOPE)), (None, None, None, None, [])),
    (t.ScopeDisabled(**common(name="orders:read")), (None, None, None, None, [])),
    (t.KeyIntroduced(**common(kid="k1", alg="EdDSA", public_jwk="{}")), (None, None, None, None, [])),
    (t.KeyActivated(**common(kid="k1")), (None, None, None, None, [])),
    (t.KeyRetired(**common(kid="k1", remove_at=NOW)), (None, None, None, None, [])),
    (t.KeyRevoked(**common(kid="k1", reason=t.Reason.COMPROMISED)), (None, None, None, None, [])),
    (t.KeyRemoved(**common(kid="k1")), (None, None, None, None, [])),
    (
        t.AbuseDetected(
            **common(
                finding_id=new_id("fnd"),
                rule="burst",
                rule_version=1,
                mode="observe",
                detected_at=NOW,
                first_at=NOW,
                last_at=NOW,
                self_reported=False,
                counts=(t.Quantity(quantity="uses", value=7),),
                parameters=(),
                evidence=(t.Evidence(source="use", seq=1),),
                token_id=TOKEN,
                grant_id=GRANT,
                client_id=CLIENT,
                subject=USER,
            )
        ),
        (USER, CLIENT, USER, GRANT, [TOKEN]),
    ),
    (t.FindingAcknowledged(**common(finding_id=new_id("fnd"))), (None, None, None, None, [])),
    (t.FindingDismissed(**common(finding_id=new_id("fnd"), sealed_reason=SEALED)), (None, None, None, None, [])),
    (t.AuditRead(**common(**READ)), (USER, None, USER, None, [])),
    (t.AuditExported(**common(**EXPORTED)), (None, None, None, None, [])),
    (
        t.SubscriberRegistered(
            **common(subscriber_id=new_id("sub"), subscriber_name="s", transport="http", owner=USER)
        ),
        (USER, None, USER, None, []),
    ),
    (t.SubscriberRemoved(**common(subscriber_id=new_id("sub"))), (None, None, None, None, [])),
    (t.WebhookRegistered(**common(webhook_id=new_id("whk"), webhook=WEBHOOK)), (USER, None, USER, None, [])),
    (t.WebhookChanged(**common(webhook_id=new_id("whk"), webhook=WEBHOOK)), (USER, None, USER, None, [])),
    (t.WebhookRemoved(**common(webhook_id=new_id("whk"))), (None, None, None, None, [])),
]


def tag(event: t.LedgerEvent) -> str:
    return str(msgspec.to_builtins(event)["type"])


def recorded(*events: t.LedgerEvent, first: int = 1) -> list[RawMessage]:
    """The messages of LEDGER, a second apart."""
    start = int(NOW.timestamp())
    return [
        RawMessage(seq, (start + seq) * 10**9, "ledger.main.x", codec.encode(event))
        for seq, event in enumerate(events, first)
    ]


def use(token_id: str | None = TOKEN, at: int = 0, **fields: Any) -> t.TokenUsed:
    context = t.Context("192.0.2.7", "curl/8", "GET", "/orders")
    values = {"scope": "orders:read", "audience": "", "context": context} | fields
    unknown = None if token_id else bytes.fromhex(SHA)
    occurred = int(NOW.timestamp()) * 1_000_000 + at
    return t.TokenUsed(occurred, token_id, unknown, "valid", "validate", CLIENT, **values)


def block(*uses: t.TokenUsed, **fields: Any) -> t.UseBlock:
    return t.UseBlock(block_id=uuid.uuid4().hex, writer="w1", uses=uses, **fields)


def blocks(*of_uses: t.UseBlock, first: int = 1) -> list[RawMessage]:
    start = int(NOW.timestamp())
    return [
        RawMessage(seq, (start + seq) * 10**9, "usage.main.w1", codec.encode_block(one))
        for seq, one in enumerate(of_uses, first)
    ]


def rows(opened: analytics.Analytics, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
    opened.flush()
    with opened.cursor() as cursor:
        return cursor.execute(sql, parameters).fetchall()


# What is the same after every replay; the numbers of tokens and origins are not, so uses are read with what they name.
COMPARED = {
    table: f"SELECT * FROM {table} ORDER BY ALL"
    for table in ("events", "grants", "issued_tokens", "ends", "gaps", "tokens")
} | {
    "refused": "SELECT * EXCLUDE (origin_no) FROM refused ORDER BY ALL",
    "uses": (
        "SELECT t.token_id, u.* EXCLUDE (token_no, origin_no), o.* EXCLUDE (origin_no, address_no) "
        "FROM uses u LEFT JOIN used_tokens t USING (token_no) JOIN origins o USING (origin_no) "
        "ORDER BY block_seq, use_index"
    ),
    "positions": "SELECT stream, seq, recorded_at FROM positions ORDER BY stream",
}


def dump(opened: analytics.Analytics) -> dict[str, list[tuple[Any, ...]]]:
    return {name: rows(opened, sql) for name, sql in COMPARED.items()}


def dump_file(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    with duckdb.connect(str(path), read_only=True) as database:
        return {name: database.execute(sql).fetchall() for name, sql in COMPARED.items()}


Open = Callable[..., analytics.Analytics]


@pytest.fixture
def opening(tmp_path: Path) -> Iterator[Open]:
    """Opens the store of this test, as often as wanted; closes it at the end."""
    opened: list[analytics.Analytics] = []

    def get(**options: Any) -> analytics.Analytics:
        opened.append(analytics.open_analytics(tmp_path / "store", **options))
        return opened[-1]

    yield get
    for one in opened:
        one.close()


# What is recorded becomes rows


def test_every_event_type_has_an_example() -> None:
    assert {type(event) for event, _ in EXAMPLES} == set(typing.get_args(t.LedgerEvent))


@pytest.mark.parametrize(("event", "about"), EXAMPLES, ids=[tag(event) for event, _ in EXAMPLES])
def test_event_of_every_type_becomes_a_row(opening: Open, event: t.LedgerEvent, about: tuple[Any, ...]) -> None:
    opened = opening()
    opened.apply(LEDGER, recorded(issued()))  # names the owner of the grant
    opened.apply(LEDGER, recorded(event, first=2))
    [row] = rows(opened, "SELECT * FROM events WHERE ledger_seq = 2")
    subject, client_id, user_id, grant_id, token_ids = about
    assert row[:6] == (2, naive(2), NOW.replace(tzinfo=None), tag(event), "system", "req_1")
    assert row[6:9] == (subject, client_id, user_id)
    assert row[9] == (uuid.UUID(grant_id[4:]) if grant_id else None)
    assert row[10] == [uuid.UUID(token_id[4:]) for token_id in token_ids]
    whole = json.loads(codec.encode(event))
    assert json.loads(row[11]) == {
        key: value for key, value in whole.items() if key != "password_hash" and not key.startswith("sealed_")
    }


def naive(seq: int) -> datetime:
    return (NOW + timedelta(seconds=seq)).replace(tzinfo=None)


def test_owner_of_a_grant_is_found_in_the_same_batch_and_in_an_earlier_one(opening: Open) -> None:
    opened = opening()
    other = new_id("grt")
    opened.apply(LEDGER, recorded(issued(), issued(other, (SUCCESSOR,), subject=CLIENT)))
    opened.flush()
    revoke = [t.GrantRevoked(**common(grant_id=grant_id, reason=t.Reason.ADMIN)) for grant_id in (GRANT, other)]
    opened.apply(LEDGER, recorded(*revoke, refreshed(GRANT, TOKEN, (REFRESH,)), first=3))
    assert rows(opened, "SELECT subject, client_id, user_id FROM events WHERE ledger_seq > 2 ORDER BY ledger_seq") == [
        (USER, CLIENT, USER),
        (CLIENT, CLIENT, None),
        (USER, CLIENT, USER),
    ]
    assert rows(opened, "SELECT subject, client_id, grant_seq FROM tokens WHERE ledger_seq = 5") == [(USER, CLIENT, 1)]


def test_owner_named_only_later_is_left_out_wherever_batches_end(opening: Open) -> None:
    messages = recorded(grant_of(), issued())
    opened = opening()
    opened.apply(LEDGER, messages)
    found = dump(opened)
    opened.reset()
    for message in messages:
        opened.apply(LEDGER, [message])
        opened.flush()
    assert dump(opened) == found
    assert rows(opened, "SELECT subject FROM events WHERE type = 'grant.revoked/1'") == [(None,)]
    assert rows(opened, "SELECT ended_seq FROM tokens") == [(1,)]


def test_ids_of_another_form_are_recorded_and_found(opening: Open) -> None:
    opened = opening()
    opened.apply(LEDGER, recorded(issued("grant-1", ("token-1",))))
    opened.apply(USAGE, blocks(block(use("token-1"))))
    [(token_id, issued_id)] = rows(
        opened, "SELECT u.token_id, t.token_id FROM uses JOIN used_tokens u USING (token_no), issued_tokens t"
    )
    assert token_id == issued_id


def test_block_becomes_uses_refusals_and_gaps(opening: Open) -> None:
    opened = opening()
    minute = int(NOW.timestamp()) // 60
    opened.apply(
        USAGE,
        blocks(
            block(
                use(at=5),
                use(None, context=None, scope=""),
                refused=(t.RefusedCount(minute, CLIENT, "192.0.2.9", "unknown", "validate", 17),),
                lost=3,
            ),
            block(),
            block(use()),
        ),
    )
    found = rows(opened, COMPARED["uses"])
    start = NOW.replace(tzinfo=None)
    token = uuid.UUID(TOKEN[4:])
    where = ("GET", "/orders", True, "192.0.2.7", "curl/8", "192.0.2.0/24", "curl")
    asked = ("valid", "validate", CLIENT)
    assert found == [
        (token, start + timedelta(microseconds=5), naive(1), 1, 0, None, *asked, "orders:read", None, *where),
        (None, start, naive(1), 1, 1, bytes.fromhex(SHA), *asked, None, None, None, None, False, *[None] * 4),
        (token, start, naive(3), 3, 0, None, *asked, "orders:read", None, *where),
    ]
    assert rows(opened, "SELECT * EXCLUDE (origin_no) FROM refused") == [
        (start, naive(1), 1, 0, CLIENT, "192.0.2.9", "192.0.2.0/24", "unknown", "validate", 17)
    ]
    assert rows(opened, "SELECT * FROM gaps") == [(1, naive(1), "w1", 3)]
    assert opened.position(USAGE) == 3


def grant_of(grant_id: str = GRANT, reason: t.Reason = t.Reason.ADMIN) -> t.GrantRevoked:
    return t.GrantRevoked(**common(grant_id=grant_id, reason=reason))


ADMIN = {"reason": t.Reason.ADMIN}
# What follows the issue of TOKEN (sequence 1), and what the view says then: ended_seq, reason.
ENDS: dict[str, tuple[list[t.LedgerEvent], tuple[int | None, str | None]]] = {
    "nothing": ([], (None, None)),
    "token": ([t.TokenRevoked(**common(grant_id=GRANT, token_id=TOKEN, **ADMIN))], (2, "admin")),
    "another token": ([t.TokenRevoked(**common(grant_id=GRANT, token_id=REFRESH, **ADMIN))], (None, None)),
    "grant": ([grant_of()], (2, "admin")),
    "another grant": ([grant_of(new_id("grt"))], (None, None)),
    "client": ([t.ClientRevoked(**common(client_id=CLIENT, **ADMIN))], (2, "admin")),
    "another client": ([t.ClientRevoked(**common(client_id=new_id("cli"), **ADMIN))], (None, None)),
    "client disabled": ([t.ClientDisabled(**common(client_id=CLIENT, reason=t.Reason.DISABLED))], (2, "disabled")),
    "subject": ([t.SubjectRevoked(**common(user_id=USER, **ADMIN))], (2, "admin")),
    "user disabled": ([t.UserDisabled(**common(user_id=USER, reason=t.Reason.DISABLED))], (2, "disabled")),
    "password": ([t.UserPasswordChanged(**common(user_id=USER, password_hash=None))], (2, "password_changed")),
    "the first of several counts": (
        [
            t.SubjectRevoked(**common(user_id=USER, reason=t.Reason.ABUSE)),
            grant_of(),
            t.ClientRevoked(**common(client_id=CLIENT, **ADMIN)),
            t.SubjectRevoked(**common(user_id=USER, **ADMIN)),
        ],
        (2, "abuse"),
    ),
}


@pytest.mark.parametrize(("events", "ended"), ENDS.values(), ids=ENDS)
def test_tokens_say_what_ended_them(opening: Open, events: list[t.LedgerEvent], ended: tuple[Any, ...]) -> None:
    opened = opening()
    opened.apply(LEDGER, recorded(issued(), *events))
    [(seq, reason, ended_at)] = rows(opened, "SELECT ended_seq, reason, ended_at FROM tokens")
    assert (seq, reason) == ended
    assert ended_at == (naive(seq) if seq else None)


@pytest.mark.parametrize(
    ("cut", "ended"),
    [
        (t.ClientRevoked(**common(client_id=CLIENT, **ADMIN)), None),
        (t.SubjectRevoked(**common(user_id=USER, **ADMIN)), None),
        (t.ClientDisabled(**common(client_id=CLIENT, **ADMIN)), 1),
        (t.UserDisabled(**common(user_id=USER, **ADMIN)), 1),
    ],
    ids=["client revoked", "subject revoked", "client disabled", "user disabled"],
)
def test_grant_that_began_after_a_cut_off_lives_unless_its_owner_is_disabled(
    opening: Open, cut: t.LedgerEvent, ended: int | None
) -> None:
    opened = opening()
    opened.apply(LEDGER, recorded(cut, issued()))
    assert rows(opened, "SELECT ended_seq FROM tokens") == [(ended,)]


def test_refresh_does_not_carry_a_grant_across_a_cut_off(opening: Open) -> None:
    opened = opening()
    cut = t.SubjectRevoked(**common(user_id=USER, reason=t.Reason.ABUSE))
    opened.apply(LEDGER, recorded(issued(token_ids=(REFRESH,)), cut, refreshed(GRANT, REFRESH, (SUCCESSOR,))))
    found = rows(opened, "SELECT token_id, ended_seq, spent_at FROM tokens ORDER BY ledger_seq")
    assert found == [(uuid.UUID(REFRESH[4:]), 2, naive(3)), (uuid.UUID(SUCCESSOR[4:]), 2, None)]


def test_rotated_token_expires_when_its_overlap_ends(opening: Open) -> None:
    opened = opening()
    ends_at = NOW + timedelta(minutes=5)
    superseded = t.TokenSuperseded(**common(grant_id=GRANT, token_id=TOKEN, successor_id=SUCCESSOR, ends_at=ends_at))
    opened.apply(LEDGER, recorded(issued(), superseded))
    assert rows(opened, "SELECT expires_at, ended_at FROM tokens") == [(ends_at.replace(tzinfo=None), None)]


def test_refresh_token_that_stays_expires_later_each_time_it_is_used(opening: Open) -> None:
    opened = opening()
    first = issued(token_ids=(REFRESH,))

    def renewed(until: datetime) -> t.AccessRenewed:
        return t.AccessRenewed(
            **common(
                grant_id=GRANT, refresh_token_id=REFRESH, tokens=(minted(new_id("tok")),), refresh_expires_at=until
            )
        )

    later = first.tokens[0].expires_at + timedelta(days=3)
    opened.apply(LEDGER, recorded(first, renewed(later), renewed(later - timedelta(days=1))))
    found = rows(opened, f"SELECT expires_at, ended_at FROM tokens WHERE token_id = '{REFRESH[4:]}'")
    assert found == [(later.replace(tzinfo=None), None)]


def test_code_is_no_row_of_tokens_and_its_events_are_found_by_it(opening: Open) -> None:
    opened = opening()
    granted, given = (event for event, _ in EXAMPLES if isinstance(event, t.AuthorizationGranted | t.CodeRedeemed))
    opened.apply(LEDGER, recorded(granted, given))
    columns = "kind, subject, client_id, grant_seq"
    assert rows(opened, f"SELECT {columns} FROM tokens") == [(given.tokens[0].kind, USER, CLIENT, 1)]
    by_code = f"SELECT count(*) FROM events WHERE list_contains(token_ids, '{SUCCESSOR[4:]}'::UUID)"
    assert rows(opened, by_code) == [(2,)]
    assert rows(opened, "SELECT subject, client_id, ledger_seq FROM grants") == [(USER, CLIENT, 1)]


def test_nothing_secret_reaches_any_file(opening: Open, tmp_path: Path) -> None:
    opened = opening()
    opened.apply(LEDGER, recorded(*(event for event, _ in EXAMPLES)))
    text = str(dump(opened))

    def in_files() -> bytes:
        return b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())

    before = in_files()
    opened.close()
    everything = text.encode() + before + in_files()
    assert b"client.registered/1" in everything  # what is there at all can be found
    planted = SECRET.encode()
    encoded = [msgspec.to_builtins(planted[skip:]).rstrip("=").encode()[1:-3] for skip in range(3)]
    assert [one for one in (planted, b"argon2", *encoded) if one in everything] == []
    assert "password_hash" not in text
    assert "sealed_" not in text


# Exactly once


def some_log() -> tuple[list[RawMessage], list[RawMessage]]:
    events = [event for event, _ in EXAMPLES]
    uses = [
        block(*(use(random.choice([TOKEN, REFRESH, None]), at) for at in range(5)), lost=number % 2)
        for number in range(20)
    ]
    return recorded(*events), blocks(*uses)


def test_batch_applied_twice_changes_nothing(opening: Open) -> None:
    opened = opening()
    ledger, usage = some_log()
    opened.apply(LEDGER, ledger)
    opened.apply(USAGE, usage)
    before = dump(opened)
    opened.apply(LEDGER, ledger)
    opened.apply(USAGE, usage[10:])
    opened.apply(USAGE, [])
    assert dump(opened) == before


def test_restart_resumes_and_skips_what_was_committed(opening: Open) -> None:
    ledger, usage = some_log()
    first = opening()
    first.apply(LEDGER, ledger[:10])
    first.apply(USAGE, usage[:7])
    first.close()
    again = opening()
    assert (again.position(LEDGER), again.position(USAGE)) == (10, 7)
    again.apply(LEDGER, ledger)
    again.apply(USAGE, usage)
    found = dump(again)
    again.reset()
    assert (again.position(LEDGER), again.position(USAGE)) == (0, 0)
    again.apply(LEDGER, ledger)
    again.apply(USAGE, usage)
    assert dump(again) == found


def test_many_small_batches_share_commits_and_are_visible_soon(opening: Open) -> None:
    opened = opening()
    commits = []
    opened.listeners.append(lambda: commits.append(None))
    _, usage = some_log()
    for message in usage:
        opened.apply(USAGE, [message])
    running.until(lambda: opened.position(USAGE) == len(usage), seconds=5)
    assert len(commits) <= 3


def test_rows_beyond_the_limit_are_committed_before_more_is_taken(opening: Open) -> None:
    opened = opening(batch_rows_max=10, commit_seconds=3600)
    _, usage = some_log()
    opened.apply(USAGE, usage)
    assert opened.position(USAGE) >= len(usage) - 4  # 5 uses a block: one batch waits, one may be on its way
    assert rows(opened, "SELECT count(*) FROM uses") == [(100,)]


@pytest.mark.parametrize(
    ("stream", "before", "bad"),
    [(LEDGER, recorded(issued()), b'{"type":"token.minted/9"}'), (USAGE, blocks(block(use())), b"\xc1\xff")],
    ids=["ledger", "usage"],
)
def test_unreadable_bytes_stop_it_and_what_came_before_stays(
    opening: Open, stream: str, before: list[RawMessage], bad: bytes
) -> None:
    opened = opening()
    with structlog.testing.capture_logs() as logs, pytest.raises(UndecodableEvent, match=f"{stream} sequence 2"):
        opened.apply(stream, [*before, RawMessage(2, 0, "x", bad), *before])
    assert [(entry["event"], entry["alarm"], entry["seq"]) for entry in logs] == [("undecodable", True, 2)]
    opened.flush()
    assert opened.position(stream) == 1


def test_uses_older_than_their_retention_leave(opening: Open) -> None:
    opened = opening(usage_age_seconds_max=400 * 86_400)
    _, usage = some_log()
    opened.apply(USAGE, usage)
    opened.flush()
    opened.trim(NOW + timedelta(seconds=11))
    assert rows(opened, "SELECT min(block_seq), count(*) FROM uses") == [(11, 50)]
    assert rows(opened, "SELECT min(block_seq) FROM gaps") == [(12,)]


@pytest.mark.slow
def test_a_use_takes_at_most_40_bytes(opening: Open) -> None:
    opened = opening()
    rng = random.Random(7)
    tokens = [new_id("tok") for _ in range(2000)]
    agents = [f"Mozilla/5.0 (X11; Linux x86_64; rv:{n}.0) Gecko/20100101 Firefox/{n}.0 shop/{n}" for n in range(300)]
    uses = 200_000
    for seq in range(1, uses // 400 + 1):
        one = block(
            *(
                use(
                    rng.choice(tokens),
                    seq * 10_000 + rng.randrange(20_000),
                    scope=f"scope:{rng.randrange(40)}",
                    audience=f"https://api{rng.randrange(10)}.example",
                    context=t.Context(
                        f"10.{rng.randrange(8)}.{rng.randrange(16)}.{rng.randrange(64)}",
                        rng.choice(agents),
                        rng.choice(["GET", "POST"]),
                        f"/v1/things/{rng.randrange(300)}",
                    ),
                )
                for _ in range(400)
            )
        )
        opened.apply(USAGE, blocks(one, first=seq))
    opened.close()
    assert opened.path.stat().st_size / uses <= 40


# Files


def damage_header(path: Path) -> None:
    path.write_bytes(b"garbage!" * 4096)


def damage_length(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_all(path: Path) -> None:
    path.write_bytes(b"")


def damage_tables(path: Path) -> None:
    with duckdb.connect(str(path)) as database:
        database.execute("DROP TABLE gaps")


@pytest.mark.parametrize("damage", [damage_header, damage_length, damage_all, damage_tables])
def test_damaged_file_is_set_aside_and_a_new_one_begun(opening: Open, damage: Callable[[Path], None]) -> None:
    ledger, usage = some_log()
    first = opening()
    first.apply(LEDGER, ledger)
    first.apply(USAGE, usage)
    whole = dump(first)
    first.close()
    damage(first.path)
    with structlog.testing.capture_logs() as logs:
        again = opening()
    assert [(entry["event"], entry["alarm"], entry["why"]) for entry in logs] == [
        ("analytics_set_aside", True, "corrupt")
    ]
    assert [file.name.startswith(f"{first.path.name}.corrupt-") for file in store.set_aside_files(first.path)] == [True]
    assert again.position(LEDGER) == 0
    again.apply(LEDGER, ledger)
    again.apply(USAGE, usage)
    assert dump(again) == whole


def test_damage_found_while_in_use_sets_the_file_aside_and_stops_the_process(opening: Open) -> None:
    first = opening()
    _, usage = some_log()
    first.apply(USAGE, usage)
    [(block_id,)] = rows(first, "CHECKPOINT; SELECT max(block_id) FROM pragma_storage_info('recent_uses')")
    first.close()
    with first.path.open("r+b") as file:
        file.seek(12_288 + block_id * 262_144 + 64)
        file.write(b"\xff" * 512)
    again = opening()
    with pytest.raises(duckdb.Error) as found:
        rows(again, "SELECT * FROM uses")
    again.report(found.value)
    with pytest.raises(analytics.AnalyticsCorrupt):
        again.apply(USAGE, [])
    assert len(store.set_aside_files(again.path)) == 1
    again.close()
    assert opening().position(USAGE) == 0


def test_error_that_is_no_damage_sets_nothing_aside(opening: Open) -> None:
    opened = opening()
    with pytest.raises(duckdb.Error) as found:
        rows(opened, "SELECT * FROM nothing_of_that_name")
    opened.report(found.value)
    opened.apply(USAGE, [])
    assert store.set_aside_files(opened.path) == []


def test_only_the_newest_files_set_aside_are_kept(opening: Open) -> None:
    opened = opening()
    for _ in range(store.SET_ASIDE_FILES_MAX + 2):
        opened.reset()
    assert len(store.set_aside_files(opened.path)) == store.SET_ASIDE_FILES_MAX


def test_other_tables_take_another_file_and_leave_the_old_one(
    opening: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, _ = some_log()
    old = opening()
    old.apply(LEDGER, ledger)
    old.close()
    monkeypatch.setattr(store, "SCHEMA_VERSION", schema.SCHEMA_VERSION + 1)
    new = opening()
    assert (new.path.name, new.position(LEDGER)) == (f"analytics-{schema.SCHEMA_VERSION + 1}.duckdb", 0)
    assert old.path.exists()


def test_duckdb_is_kept_within_its_limits_and_cannot_reach_outside(opening: Open, tmp_path: Path) -> None:
    opened = opening(threads=1, memory_bytes_max=256 * 1024**2)
    assert rows(opened, "SELECT current_setting('threads'), current_setting('memory_limit')") == [(1, "256.0 MiB")]
    (tmp_path / "outside.csv").write_text("a\n1\n")
    with pytest.raises(duckdb.PermissionException):
        rows(opened, f"SELECT * FROM read_csv('{tmp_path / 'outside.csv'}')")
    assert opened.path.parent.stat().st_mode & 0o777 == 0o700


OPEN_IN_PROCESS = """
import sys
from pathlib import Path
from projections import analytics
try:
    analytics.open_analytics(Path(sys.argv[1]), niceness=7)
except analytics.AnalyticsBusy as error:
    print("busy", error.fix)
else:
    import os
    print("open", os.nice(0))
"""


async def run_python(script: str, *arguments: object) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, *map(str, arguments), stdout=asyncio.subprocess.PIPE, cwd=running.ROOT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    return output.decode().strip()


async def test_second_process_is_told_that_the_file_is_in_use(opening: Open, tmp_path: Path) -> None:
    opening()
    assert (await run_python(OPEN_IN_PROCESS, tmp_path / "store")).startswith("busy stop the service")


async def test_process_lowers_its_own_priority(tmp_path: Path) -> None:
    assert await run_python(OPEN_IN_PROCESS, tmp_path / "store") == f"open {os.nice(0) + 7}"


# On a real log


class Log:
    """A running nats-server with the streams, and a connection that may write to them."""

    def __init__(self, server: EmbeddedServer, nc: streams.Connection) -> None:
        self.server = server
        self.nc = nc
        self.js = nc.jetstream()

    async def record(self, *events: t.LedgerEvent) -> int:
        for event in events:
            seq = (await self.js.publish("ledger.main.grant.x", codec.encode(event))).seq
        return seq

    async def record_uses(self, *of_uses: t.UseBlock) -> int:
        acknowledged = [await self.js.publish_async("usage.main.w1", codec.encode_block(one)) for one in of_uses]
        return max([(await one).seq for one in acknowledged])


LogFactory = Callable[[Path], Awaitable[Log]]


@pytest.fixture(scope="module")
async def start_log() -> AsyncIterator[LogFactory]:
    """Starts servers with the streams. They are stopped at the end of the module."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(directory: Path) -> Log:
            server = EmbeddedServer(directory, 0)
            server.prepare()
            await server.start()
            stack.push_async_callback(server.stop)
            await server.wait_ready()
            admin = await streams.connect(server.url, server.creds("admin"), name="admin")
            await streams.provision(admin, streams.StreamLimits())
            await admin.close()
            nc = await streams.connect(server.url, server.creds("service"), name="test")
            stack.push_async_callback(nc.close)
            return Log(server, nc)

        yield start


@pytest.fixture
async def a_log(start_log: LogFactory, tmp_path: Path) -> Log:
    return await start_log(tmp_path / "log")


@contextlib.asynccontextmanager
async def projecting(opened: analytics.Analytics, log: Log) -> AsyncIterator[None]:
    """What the analytics process does, in this one. An error in it is the test's."""
    nc = await streams.connect(log.server.url, log.server.creds("projector"), name="analytics")
    tasks = [
        asyncio.create_task(base.run(nc, opened, analytics.STREAMS)),
        asyncio.create_task(analytics.serve_queries(nc, opened)),
    ]
    try:
        await answering(log.nc)
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await nc.close()
    assert [error for error in results if not isinstance(error, asyncio.CancelledError)] == []


async def answering(nc: streams.Connection) -> None:
    deadline = asyncio.get_running_loop().time() + 10
    while True:
        try:
            await analytics.ask(nc, analytics.StatusRequest(), analytics.StatusAnswer, seconds=1)
            return
        except analytics.AnalyticsRefused:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.02)


PROJECT = """
import asyncio, sys
from pathlib import Path
from events import streams
from projections import analytics, base

async def main():
    url, creds, directory = sys.argv[1:]
    opened = analytics.open_analytics(Path(directory), commit_seconds=0.01, batch_rows_max=500, segment_uses=7000)
    opened.listeners.append(lambda: print(opened.position("LEDGER") + opened.position("USAGE"), flush=True))
    nc = await streams.connect(url, Path(creds), name="analytics")
    await base.run(nc, opened, analytics.STREAMS)

asyncio.run(main())
"""


async def project_until_killed(log: Log, directory: Path, target: int) -> None:
    """Runs the projector in a process, kills it as soon as it says that it has committed `target` messages."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROJECT, log.server.url, str(log.server.creds("projector")), str(directory)),
        stdout=asyncio.subprocess.PIPE,
        cwd=running.ROOT,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            while int(await process.stdout.readline()) < target:
                pass
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()


@pytest.mark.slow
async def test_kill_in_mid_ingestion_loses_and_doubles_nothing(a_log: Log, tmp_path: Path) -> None:
    tokens = [new_id("tok") for _ in range(300)]
    grants = [new_id("grt") for _ in tokens]
    events: list[t.LedgerEvent] = []
    for grant_id, token_id in zip(grants, tokens, strict=True):
        events.append(issued(grant_id, (token_id,)))
        events.append(grant_of(random.choice(grants)))
    await a_log.record(*events)
    uses = 0
    for _ in range(5):
        filled = [block(*(use(random.choice(tokens), n) for n in range(60)), lost=1) for _ in range(200)]
        uses += sum(len(one.uses) for one in filled)
        last = await a_log.record_uses(*filled)
    total = last + len(events)
    directory = tmp_path / "store"
    for target in (1, total // 5, total // 3, total // 2, total * 4 // 5, total):
        await project_until_killed(a_log, directory, target)
    replayed = tmp_path / "replayed"
    nc = await streams.connect(a_log.server.url, a_log.server.creds("projector"), name="rebuild")
    await analytics.rebuild(nc, replayed, segment_uses=20_000)
    await nc.close()
    found = dump_file(analytics.store_file(replayed))
    assert (len(found["events"]), len(found["uses"]), len(found["gaps"])) == (len(events), uses, 1000)
    with duckdb.connect(str(analytics.store_file(directory))) as survivor:  # takes its write-ahead log in
        survivor.execute("CHECKPOINT")
        assert survivor.execute("SELECT count(*) > 3 FROM segments").fetchall() == [(True,)]
    assert dump_file(analytics.store_file(directory)) == found


async def test_rebuild_equals_the_live_store_and_reports_its_progress(
    a_log: Log, opening: Open, tmp_path: Path
) -> None:
    live = opening()
    async with projecting(live, a_log):
        seq = await a_log.record(*(event for event, _ in EXAMPLES))
        await a_log.record_uses(*[block(use(at=n)) for n in range(50)])
        await reached(live, {LEDGER: seq, USAGE: 50})
    whole = dump(live)
    live.close()
    progress: dict[str, tuple[int, int]] = {}

    def note(stream: str, position: int, end: int) -> None:
        progress[stream] = (position, end)

    nc = await streams.connect(a_log.server.url, a_log.server.creds("projector"), name="rebuild")
    await analytics.rebuild(nc, tmp_path / "store", progress=note, commit_seconds=0.01)
    await nc.close()
    assert dump_file(live.path) == whole
    assert progress.keys() <= {LEDGER, USAGE}
    # The copies for auditors' queries were made by the process that served them.
    left = [live.path.name, published_directory(live.path).name, live.segments.name]
    assert sorted(file.name for file in live.path.parent.iterdir()) == left


async def reached(opened: analytics.Analytics, positions: dict[str, int]) -> None:
    committed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def tell() -> None:
        loop.call_soon_threadsafe(committed.set)

    opened.listeners.append(tell)
    try:
        async with asyncio.timeout(20):
            while any(opened.position(stream) < seq for stream, seq in positions.items()):
                await committed.wait()
                committed.clear()
    finally:
        opened.listeners.remove(tell)


async def test_rebuild_is_refused_while_another_process_owns_the_file(
    a_log: Log, opening: Open, tmp_path: Path
) -> None:
    opening()
    script = """
import asyncio, sys
from pathlib import Path
from events import streams
from projections import analytics

async def main():
    nc = await streams.connect(sys.argv[1], Path(sys.argv[2]), name="rebuild")
    try:
        await analytics.rebuild(nc, Path(sys.argv[3]))
    except analytics.AnalyticsBusy:
        print("busy")
    await nc.close()

asyncio.run(main())
"""
    arguments = (a_log.server.url, a_log.server.creds("projector"), tmp_path / "store")
    assert await run_python(script, *arguments) == "busy"


@pytest.mark.parametrize("events_of_the_new_log", [0, 30], ids=["shorter", "longer"])
async def test_store_of_another_log_is_replaced(
    start_log: LogFactory, opening: Open, tmp_path: Path, events_of_the_new_log: int
) -> None:
    opened = opening()
    first = await start_log(tmp_path / "first")
    async with projecting(opened, first):
        await reached(opened, {LEDGER: await first.record(*(event for event, _ in EXAMPLES))})
    second = await start_log(tmp_path / "second")
    seq = await second.record(issued(), *[grant_of()] * events_of_the_new_log)
    with structlog.testing.capture_logs() as logs:
        async with projecting(opened, second):
            await reached(opened, {LEDGER: seq})
    assert {"projection_is_from_another_log", "analytics_set_aside"} <= {entry["event"] for entry in logs}
    assert rows(opened, "SELECT count(*) FROM events") == [(seq,)]
    assert len(store.set_aside_files(opened.path)) == 1


# Questions over NATS


@pytest.fixture(scope="module")
async def answered(start_log: LogFactory, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Log]:
    """An empty log with its store, for tests that write nothing."""
    directory = tmp_path_factory.mktemp("answered")
    opened = analytics.open_analytics(directory / "store")
    log = await start_log(directory)
    async with projecting(opened, log):
        yield log
    opened.close()


async def events_of(log: Log, **request: Any) -> analytics.EventsAnswer:
    return await analytics.ask(log.nc, analytics.EventsRequest(**request), analytics.EventsAnswer)


async def uses_of(log: Log, **request: Any) -> analytics.UsesAnswer:
    return await analytics.ask(log.nc, analytics.UsesRequest(**request), analytics.UsesAnswer)


async def token_of(log: Log, token_id: str, **request: Any) -> analytics.TokenAnswer:
    return await analytics.ask(log.nc, analytics.TokenRequest(token_id=token_id, **request), analytics.TokenAnswer)


async def test_events_can_be_asked_for_by_every_filter(a_log: Log, opening: Open) -> None:
    other_user, other_client, other_grant, other_token = (new_id(p) for p in ("usr", "cli", "grt", "tok"))
    async with projecting(opening(), a_log):
        await a_log.record(
            issued(),
            issued(other_grant, (other_token,), subject=other_user, client_id=other_client),
            t.TokenRevoked(**common(grant_id=GRANT, token_id=TOKEN, **ADMIN)),
            t.ClientDisabled(**common(client_id=other_client, **ADMIN)),
        )
        seq = await a_log.record(grant_of())

        async def seqs(**request: Any) -> list[int]:
            answer = await events_of(a_log, min_seq=seq, **request)
            assert answer.position >= seq
            return [event.ledger_seq for event in answer.items]

        everything = (await events_of(a_log, min_seq=seq)).items
        third = everything[2].recorded_at
        assert await seqs() == [1, 2, 3, 4, 5]
        assert await seqs(type="token.issued/1") == [1, 2]
        assert await seqs(subject=USER) == [1, 3, 5]
        assert await seqs(client_id=other_client) == [2, 4]
        assert await seqs(token_id=TOKEN) == [1, 3]
        assert await seqs(grant_id=GRANT) == [1, 3, 5]
        assert await seqs(from_=third) == [3, 4, 5]
        assert await seqs(to=third) == [1, 2]
        assert await seqs(after_seq=3, subject=USER) == [5]
        assert await seqs(type="token.issued/1", subject=other_user) == [2]
        assert await seqs(subject="nobody") == []
    first = everything[0]
    assert (first.type, first.by, first.subject, first.client_id, first.user_id, first.grant_id, first.token_ids) == (
        *("token.issued/1", "system", USER, CLIENT, USER, GRANT),
        (TOKEN,),
    )
    assert first.occurred_at == NOW
    assert "sealed_name" not in json.loads(bytes(first.body))


async def test_events_are_paged_by_limit(a_log: Log, opening: Open) -> None:
    async with projecting(opening(), a_log):
        seq = await a_log.record(issued(), *[grant_of()] * 4)
        pages, after = [], 0
        for _ in range(4):
            answer = await events_of(a_log, limit=2, after_seq=after, min_seq=seq)
            pages.append([event.ledger_seq for event in answer.items])
            if answer.next_after_seq is None:
                break
            after = answer.next_after_seq
    assert pages == [[1, 2], [3, 4], [5]]


async def test_answer_stays_below_what_a_message_may_hold(a_log: Log, opening: Open) -> None:
    long = t.ScopeChanged(**common(**SCOPE | {"description": "x" * 200_000}))
    async with projecting(opening(), a_log):
        seq = await a_log.record(*[long] * 8)
        found: list[int] = []
        after: int | None = 0
        while after is not None:
            answer = await events_of(a_log, limit=1000, after_seq=after, min_seq=seq)
            found += [event.ledger_seq for event in answer.items]
            after = answer.next_after_seq
    assert found == list(range(1, 9))


async def test_usage_has_what_is_recorded_and_says_where_it_is_true(a_log: Log, opening: Open) -> None:
    span = {"from_": NOW, "to": NOW + timedelta(hours=1)}
    async with projecting(opening(), a_log):
        for number in range(1, 4):
            ledger_seq = await a_log.record(issued(new_id("grt"), (new_id("tok"),)))
            usage_seq = await a_log.record_uses(block(use(), use(at=5)))
            answer = await analytics.ask(a_log.nc, analytics.UsageRequest(**span, group_by="ip"), analytics.UsageAnswer)
            assert (answer.ledger_seq, answer.usage_seq) == (ledger_seq, usage_seq)
            assert answer.totals.uses == 2 * number
            assert (answer.from_, answer.to) == (span["from_"], span["to"])


async def test_usage_that_no_message_holds_is_refused(a_log: Log, opening: Open) -> None:
    agents = [t.Context("192.0.2.7", f"{number:04}" + "\U0001f916" * 252) for number in range(1000)]
    asked = {"from_": NOW, "to": NOW + timedelta(hours=1), "group_by": "user_agent"}
    async with projecting(opening(), a_log):
        for start in range(0, 1000, 250):
            await a_log.record_uses(block(*[use(context=context) for context in agents[start : start + 250]]))
        async with asyncio.timeout(60):  # on a busy machine an answer may say that it is true at an earlier position
            one = analytics.UsageRequest(**asked, limit=1)
            while (await analytics.ask(a_log.nc, one, analytics.UsageAnswer)).totals.uses < 1000:
                pass
        with pytest.raises(analytics.AnalyticsRefused, match="larger than a message") as refused:
            await analytics.ask(a_log.nc, analytics.UsageRequest(**asked, limit=1000), analytics.UsageAnswer)
        assert refused.value.code == 400
        answer = await analytics.ask(a_log.nc, analytics.UsageRequest(**asked, limit=500), analytics.UsageAnswer)
    assert not isinstance(answer.other, msgspec.UnsetType)
    assert (answer.other.groups, answer.other.uses, answer.totals.uses) == (500, 500, 1000)


async def test_uses_of_a_token_are_complete_in_order_and_paged(a_log: Log, opening: Open) -> None:
    async with projecting(opening(), a_log):
        await a_log.record(issued())
        for start in range(0, 90, 30):
            order = random.sample(range(start, start + 30), 30)
            await a_log.record_uses(*[block(use(at=n), use(REFRESH, n)) for n in order])
            answer = await uses_of(a_log, token_id=TOKEN, limit=1000)  # at once: nothing that is recorded is missing
            assert len(answer.items) == start + 30
        found: list[analytics.AuditUse] = []
        cursor = None
        while True:
            page = await uses_of(a_log, token_id=TOKEN, limit=40, cursor=cursor)
            found += page.items
            cursor = page.next_cursor
            if cursor is None:
                break
        assert (await uses_of(a_log, token_id=new_id("tok"))).items == []
    assert [one.occurred_at for one in found] == [NOW + timedelta(microseconds=n) for n in range(90)]
    assert {(one.outcome, one.endpoint, one.caller, one.scope, one.audience, one.ip, one.path) for one in found} == {
        ("valid", "validate", CLIENT, "orders:read", None, "192.0.2.7", "/orders")
    }


async def test_token_is_answered_however_long_ago_it_ended(a_log: Log, opening: Open) -> None:
    async with projecting(opening(), a_log):
        seq = await a_log.record(issued(), grant_of(reason=t.Reason.LOGOUT))
        answer = await token_of(a_log, TOKEN, min_seq=seq)
        recorded_at = (await events_of(a_log)).items[1].recorded_at
        with pytest.raises(analytics.AnalyticsRefused) as refused:
            await token_of(a_log, new_id("tok"))
    assert refused.value.code == 404
    assert answer.position == seq
    assert answer.token == analytics.TokenFacts(
        token_id=TOKEN,
        grant_id=GRANT,
        ledger_seq=1,
        grant_seq=1,
        kind="access",
        client_id=CLIENT,
        subject=USER,
        scope="orders:read",
        audience=("https://api.example",),
        issued_at=NOW,
        expires_at=NOW + timedelta(hours=1),
        ended_at=recorded_at,
        reason="logout",
        ended_seq=2,
        kid="k1",
    )


async def test_status_has_positions_lags_and_size(a_log: Log, opening: Open) -> None:
    opened = opening()
    async with projecting(opened, a_log):
        seq = await a_log.record(issued())
        await reached(opened, {LEDGER: seq})
        answer = await analytics.ask(a_log.nc, analytics.StatusRequest(), analytics.StatusAnswer)
    by_stream = {one.stream: (one.position, one.end, one.lag) for one in answer.streams}
    assert by_stream == {LEDGER: (1, 1, 0), USAGE: (0, 0, 0)}
    assert answer.version == analytics.SCHEMA_VERSION
    assert answer.file_bytes > 0
    assert answer.set_aside == []


async def test_sequence_that_does_not_come_in_time_is_refused(
    a_log: Log, opening: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("projections.analytics.api._WAIT_SECONDS_MAX", 0.1)
    async with projecting(opening(), a_log):
        with pytest.raises(analytics.AnalyticsRefused, match="not yet 99; retry") as refused:
            await events_of(a_log, min_seq=99)
    assert refused.value.code == 503


@pytest.mark.parametrize(
    ("endpoint", "body", "says"),
    [
        ("events", b"{", "truncated"),
        ("events", b'{"limit":0}', "$.limit"),
        ("events", b'{"limit":1001}', "$.limit"),
        ("events", b'{"from":"yesterday"}', "$.from"),
        ("events", b'{"nonsense":1}', "nonsense"),
        ("events", b'{"subject":"\xff"}', ""),
        ("uses", b"{}", "token_id"),
        ("uses", b'{"token_id":"x","cursor":"abc"}', "cursor"),
        ("tokens", b"[]", "object"),
        ("status", b'{"x":1}', "x"),
    ],
)
async def test_request_that_is_not_understood_is_refused(answered: Log, endpoint: str, body: bytes, says: str) -> None:
    reply = await answered.nc.request(f"analytics.{endpoint}", body, timeout=5)
    assert reply.headers is not None
    assert reply.headers["Nats-Service-Error-Code"] == "400"
    assert says in reply.headers["Nats-Service-Error"]


async def test_no_analytics_process_is_said_so(a_log: Log) -> None:
    with pytest.raises(analytics.AnalyticsRefused) as refused:
        await token_of(a_log, TOKEN)
    assert refused.value.code == 503


async def test_writer_that_stops_ends_the_service_too(a_log: Log, opening: Open) -> None:
    opened = opening()
    nc = await streams.connect(a_log.server.url, a_log.server.creds("projector"), name="analytics")
    serving = asyncio.create_task(analytics.serve_queries(nc, opened))
    await answering(a_log.nc)
    with opened.cursor() as cursor:
        cursor.execute("DROP TABLE gaps")
    opened.apply(USAGE, blocks(block(use(), lost=1)))
    with pytest.raises(duckdb.CatalogException):
        await asyncio.wait_for(serving, 5)
    with pytest.raises(duckdb.CatalogException):
        opened.apply(USAGE, [])
    await nc.close()
