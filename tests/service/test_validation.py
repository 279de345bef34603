"""Is this token good? The codes and their order; and nothing is said from a view that may have missed something."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from itertools import combinations
from typing import Any

import pytest
import pytest_asyncio
from msgspec.structs import replace

from events.types import (
    ClientDisabled,
    ClientRevoked,
    GrantRevoked,
    KeyRevoked,
    Kind,
    LedgerEvent,
    Reason,
    SubjectRevoked,
    TokenRevoked,
    UserDisabled,
    UserPasswordChanged,
)
from projections import grants, registry
from projections.current import Hit
from projections.grants import EMPTY
from projections.registry import Cut
from service.errors import InsufficientScope, InvalidToken, TooManyRequests, Unauthorized, Unavailable
from service.tokens import mint, new_id, now
from service.validation import (
    ALL_KINDS,
    BEARER_KINDS,
    Asked,
    Code,
    MalformedAuthorization,
    Verdict,
    authenticate,
    bearer,
    decide,
    evaluate,
    ip_allowed,
    resolve,
    resolve_all,
    use_of,
)
from tests.hosts import ISSUER, Host, asking, host
from tests.logs import paused
from tests.making import DAY, START, History, cli, grt, head, issued, minted, refreshed, tok, usr

# One answer, whatever holds: pure.

NETWORKS = ("192.0.2.0/24", "2001:db8::/32")
OK = Asked("a", ("https://api.example",), "192.0.2.9")


def hit_after(*events: LedgerEvent, token_id: str = tok(1)) -> Hit:
    """What the view would know of a token of client 1 for user 1."""
    family, cuts = EMPTY, {}
    for recorded in History(*events).recorded:
        family = grants.evolve(family, recorded)
        for owner in (cli(1), usr(1)):
            found = registry.cut(cuts.get(owner), recorded)
            if found is not None and found[0] == owner:
                cuts[owner] = found[1]
    return Hit(token_id, family.tokens[token_id], family.grant, cuts.get(cli(1)), cuts.get(usr(1)))


def begun(**changes: Any) -> LedgerEvent:
    return issued(grt(1), minted(tok(1)), subject=usr(1), client_id=cli(1), allowed_ips=NETWORKS, **changes)


REVOKED: dict[str, LedgerEvent] = {
    "token": TokenRevoked(**head(), grant_id=grt(1), token_id=tok(1), reason=Reason.ADMIN),
    "grant": GrantRevoked(**head(), grant_id=grt(1), reason=Reason.ADMIN),
    "client": ClientRevoked(**head(), client_id=cli(1), reason=Reason.ADMIN),
    "subject": SubjectRevoked(**head(), user_id=usr(1), reason=Reason.ADMIN),
    "password": UserPasswordChanged(**head(), user_id=usr(1), password_hash=None),
}
CLIENT_DISABLED = ClientDisabled(**head(), client_id=cli(1), reason=Reason.ADMIN)
SUBJECT_DISABLED = UserDisabled(**head(), user_id=usr(1), reason=Reason.ADMIN)


def signed(kid: str | None, *events: LedgerEvent) -> Hit:
    """A token that this key signed, and the cut-off of the key, as the view would know them."""
    hit = hit_after(begun())
    cut = next((found[1] for one in History(*events).recorded if (found := registry.cut(None, one))), None)
    return replace(hit, token=replace(hit.token, kid=kid), key_cut=cut)


KEY_REVOKED = KeyRevoked(**head(), kid="ed-1", reason=Reason.COMPROMISED)


def test_token_by_a_revoked_key_is_revoked_though_it_began_later() -> None:
    """Its cut is of no sequence: who has the key can go on with it."""
    assert evaluate(signed("ed-1"), OK, START) is Code.VALID
    hit = signed("ed-1", KEY_REVOKED)
    assert hit.key_cut is not None
    assert evaluate(hit, OK, START) is Code.REVOKED
    later = replace(hit, grant=replace(hit.grant, first_seq=hit.key_cut.seq + 1))
    assert evaluate(later, OK, START) is Code.REVOKED
    assert evaluate(later, OK, START + DAY) is Code.REVOKED


# CONTRACT "What the words mean": when several hold, the first of these.
ORDER = ["revoked", "client_disabled", "subject_disabled", "expired", "ip_not_allowed", "wrong_audience"]
ORDER += ["insufficient_scope"]


@pytest.mark.parametrize("revocation", REVOKED.values(), ids=REVOKED.keys())
def test_first_code_in_order_is_the_answer_whatever_else_holds(revocation: LedgerEvent) -> None:
    """All combinations of all conditions."""
    for count in range(len(ORDER) + 1):
        for holding in combinations(ORDER, count):
            events = [begun()]
            events += [CLIENT_DISABLED] if "client_disabled" in holding else []
            events += [SUBJECT_DISABLED] if "subject_disabled" in holding else []
            events += [revocation] if "revoked" in holding else []
            asked = Asked(
                "z" if "insufficient_scope" in holding else "a",
                ("https://other.example",) if "wrong_audience" in holding else OK.audience,
                "198.51.100.1" if "ip_not_allowed" in holding else OK.ip,
            )
            moment = START + DAY if "expired" in holding else START
            wanted = next(iter(holding), "valid")
            assert wanted == evaluate(hit_after(*events), asked, moment), holding


def test_contract_orders_the_codes_as_the_service_does() -> None:
    assert [code.value for code in Code] == [
        *("stale", "malformed", "unknown", "revoked", "client_disabled", "subject_disabled", "not_yet_valid"),
        *("expired", "ip_not_allowed", "wrong_audience", "insufficient_scope", "valid"),
    ]


@pytest.mark.parametrize("cut", ["client", "subject", "password"])
def test_grant_that_began_after_a_revocation_is_not_revoked(cut: str) -> None:
    assert evaluate(hit_after(REVOKED[cut], begun()), OK, START) is Code.VALID


@pytest.mark.parametrize("cut", ["client", "subject", "password"])
def test_refresh_carries_no_token_across_a_revocation(cut: str) -> None:
    """The grant's first event counts, not the token's own."""
    first = issued(grt(1), minted(tok(1)), minted(tok(2), Kind.REFRESH), subject=usr(1), client_id=cli(1))
    later = refreshed(grt(1), tok(2), minted(tok(3)), minted(tok(4), Kind.REFRESH))
    assert evaluate(hit_after(first, REVOKED[cut], later, token_id=tok(3)), OK, START) is Code.REVOKED
    assert evaluate(hit_after(REVOKED[cut], first, later, token_id=tok(3)), OK, START) is Code.VALID


@pytest.mark.parametrize(
    ("disabled", "code"), [(CLIENT_DISABLED, Code.CLIENT_DISABLED), (SUBJECT_DISABLED, Code.SUBJECT_DISABLED)]
)
def test_disabled_owner_ends_later_grants_too(disabled: LedgerEvent, code: Code) -> None:
    assert evaluate(hit_after(begun(), disabled), OK, START) is code
    assert evaluate(hit_after(disabled, begun()), OK, START) is code


def test_token_ends_with_its_last_second() -> None:
    hit = hit_after(begun())
    assert evaluate(hit, OK, START + DAY - timedelta(microseconds=1)) is Code.VALID
    assert evaluate(hit, OK, START + DAY) is Code.EXPIRED


def test_what_was_not_asked_is_not_checked() -> None:
    assert evaluate(hit_after(begun()), Asked(ip=OK.ip), START) is Code.VALID


ASKED = [
    pytest.param({}, Asked("a b", ip=OK.ip), Code.VALID, id="all of its scopes"),
    pytest.param({}, Asked("a c", ip=OK.ip), Code.INSUFFICIENT_SCOPE, id="one scope too many"),
    pytest.param({}, Asked("A", ip=OK.ip), Code.INSUFFICIENT_SCOPE, id="scopes have case"),
    pytest.param({}, Asked("  a  b ", ip=OK.ip), Code.VALID, id="blanks around scopes"),
    pytest.param({"audience": ()}, Asked("", ("any",), OK.ip), Code.VALID, id="no audience is every audience"),
    pytest.param({}, Asked("", ("x", "https://api.example"), OK.ip), Code.VALID, id="one of its audiences"),
    pytest.param({}, Asked("", ("https://api.example/",), OK.ip), Code.WRONG_AUDIENCE, id="to the letter"),
    pytest.param({}, Asked("", ("https://api",), OK.ip), Code.WRONG_AUDIENCE, id="a part of it"),
    pytest.param({}, Asked(), Code.IP_NOT_ALLOWED, id="bound to addresses and none is known"),
]


@pytest.mark.parametrize(("changes", "asked", "code"), ASKED)
def test_scope_audience_and_address_are_compared(changes: dict[str, Any], asked: Asked, code: Code) -> None:
    fields: dict[str, Any] = {"subject": usr(1), "client_id": cli(1), "allowed_ips": NETWORKS} | changes
    audience = fields.get("audience", ("https://api.example",))
    assert evaluate(hit_after(issued(grt(1), minted(tok(1), audience=audience), **fields)), asked, START) is code


def test_token_that_is_narrower_than_its_grant_stays_narrow() -> None:
    narrow = minted(tok(1), scope="a", audience=("https://one.example",))
    hit = hit_after(issued(grt(1), narrow, subject=usr(1), client_id=cli(1)))
    assert evaluate(hit, Asked("b"), START) is Code.INSUFFICIENT_SCOPE
    assert evaluate(hit, Asked("", ("https://api.example",)), START) is Code.WRONG_AUDIENCE
    assert evaluate(hit, Asked("a", ("https://one.example",)), START) is Code.VALID


def test_grant_that_is_not_known_is_no_reason_to_trust_its_token() -> None:
    hit = replace(hit_after(begun()), grant=grants.NoGrant())
    assert evaluate(hit, OK, START) is Code.REVOKED


IPS = [
    ("192.0.2.1", True),
    ("192.0.3.1", False),
    ("::ffff:192.0.2.1", True),
    ("2001:db8::1", True),
    ("2001:db9::1", False),
    ("2001:db8::1%eth0", True),
    (None, False),
    ("", False),
    ("192.0.2", False),
    ("192.0.2.1 ", False),
    ("192.0.2.01", False),
    ("3221225985", False),
    ("localhost", False),
    ("\u0661.1.1.1", False),
    ("192.0.2.1/32", False),
]


@pytest.mark.parametrize(("ip", "allowed"), IPS, ids=[str(ip) for ip, _ in IPS])
def test_address_is_in_a_network_or_not(ip: str | None, *, allowed: bool) -> None:
    assert ip_allowed(ip, NETWORKS) is allowed


def test_cut_at_the_same_sequence_does_not_hold() -> None:
    """A cut's own sequence is never that of a grant's first event; if it were, the grant would not be before it."""
    hit = hit_after(begun())
    assert evaluate(replace(hit, client_cut=Cut(1, START, Reason.ADMIN)), OK, START) is Code.VALID
    assert evaluate(replace(hit, client_cut=Cut(2, START, Reason.ADMIN)), OK, START) is Code.REVOKED


# The Authorization header

BEARERS: list[tuple[list[str], str | type[Exception]]] = [
    (["Bearer abc"], "abc"),
    (["bearer abc"], "abc"),
    (["BEARER   abc  "], "abc"),
    ([], Unauthorized),
    (["Basic abc"], Unauthorized),
    (["abc"], Unauthorized),
    ([""], Unauthorized),
    (["Bearer"], MalformedAuthorization),
    (["Bearer "], MalformedAuthorization),
    (["Bearer a b"], MalformedAuthorization),
    (["Bearer a,b"], MalformedAuthorization),
    (["Bearer a", "Bearer a"], MalformedAuthorization),
    (["Basic a", "Bearer a"], MalformedAuthorization),
]


@pytest.mark.parametrize(("values", "wanted"), BEARERS, ids=[repr(values) for values, _ in BEARERS])
def test_bearer_token_is_taken_from_exactly_one_header(values: list[str], wanted: str | type[Exception]) -> None:
    if isinstance(wanted, str):
        assert bearer(values) == wanted
        return
    with pytest.raises(wanted) as caught:
        bearer(values)
    challenge = caught.value.headers["WWW-Authenticate"]
    assert challenge.startswith('Bearer realm="token-ledger"')
    assert ("error=" in challenge) == (wanted is MalformedAuthorization)  # RFC 6750 §3.1


# With a log and a view


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def one(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    async with host(tmp_path_factory.mktemp("host"), unknown_tokens_per_minute_max=3) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="session")
async def here(one: Host) -> Host:
    """The host with a fresh view."""
    await one.project()
    return one


NOTHING = Asked()


def at_once(here: Host, token: str, asked: Asked = NOTHING, kinds: frozenset[Kind] = BEARER_KINDS) -> Verdict | None:
    return decide(here.runtime, token, asked, kinds, now())


async def test_known_token_is_answered_at_once_with_the_position(here: Host) -> None:
    token, event = await here.issued()
    await here.project()
    verdict = at_once(here, token)
    assert verdict is not None
    assert verdict.hit is not None
    assert (verdict.code, verdict.hit.token_id, verdict.position) == (
        Code.VALID,
        event.tokens[0].token_id,
        here.position,
    )


async def test_token_of_another_kind_is_unknown_at_this_door(here: Host) -> None:
    token, _ = await here.issued(Kind.REFRESH, client_id=new_id("cli"))
    await here.project()
    assert at_once(here, token) == Verdict(Code.UNKNOWN, None, here.position)
    seen = at_once(here, token, kinds=ALL_KINDS)
    assert seen is not None
    assert seen.code is Code.VALID


async def test_view_that_is_too_old_says_nothing_of_any_token(here: Host) -> None:
    token, _ = await here.issued()
    await here.project()
    bound = here.runtime.settings.view_staleness_seconds_max
    await here.project(seconds_ago=bound - 2)
    assert at_once(here, token) is not None
    await here.project(seconds_ago=bound + 1)
    for asked_for in (token, mint("pat")):
        with pytest.raises(Unavailable):
            at_once(here, asked_for)
        with pytest.raises(Unavailable):
            await resolve(here.runtime, asked_for, Asked(), BEARER_KINDS)
        with pytest.raises(Unavailable):
            await authenticate(here.runtime, asking(asked_for), ())
    malformed = at_once(here, "nonsense")  # which no view is needed for
    assert malformed is not None
    assert malformed.code is Code.MALFORMED


async def test_unknown_token_is_unknown_once_the_view_has_reached_the_end(here: Host) -> None:
    assert at_once(here, mint("pat")) is None
    assert await resolve(here.runtime, mint("pat"), Asked(), BEARER_KINDS) == Verdict(Code.UNKNOWN, None, here.position)


async def test_token_that_was_issued_elsewhere_a_moment_ago_is_waited_for(here: Host) -> None:
    token, _ = await here.issued()
    assert at_once(here, token) is None
    waiting = asyncio.create_task(resolve(here.runtime, token, Asked(), BEARER_KINDS))
    await here.project()
    assert (await waiting).code is Code.VALID


async def test_token_is_not_unknown_to_a_view_that_is_behind(here: Host) -> None:
    await here.issued()
    began = time.monotonic()
    with pytest.raises(Unavailable, match="behind"):
        await resolve(here.runtime, mint("pat"), Asked(), BEARER_KINDS)
    assert time.monotonic() - began < 10
    await here.project()


async def test_log_that_does_not_answer_leaves_unknown_tokens_open(here: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    token, _ = await here.issued()
    await here.project()
    with paused(here.server):
        known = at_once(here, token)
        assert known is not None
        assert known.code is Code.VALID  # whether its use can be recorded is asked next
        with pytest.raises(Unavailable, match="cannot be asked"):
            await resolve(here.runtime, mint("pat"), Asked(), BEARER_KINDS)
        buffered = replace(here.runtime.settings, use_recording="buffered", view_staleness_seconds_max=300)
        monkeypatch.setattr(here.runtime, "settings", buffered)
        assert (await resolve(here.runtime, mint("pat"), Asked(), BEARER_KINDS)).code is Code.UNKNOWN


async def test_min_seq_is_waited_for_and_else_stale(here: Host) -> None:
    """Read your writes on another host: a revocation that was answered elsewhere is known before the answer."""
    token, event = await here.issued()
    await here.project()
    revoked = TokenRevoked(**_head(), grant_id=event.grant_id, token_id=event.tokens[0].token_id, reason=Reason.ADMIN)
    seq = await here.record(revoked)
    asked = Asked(min_seq=seq)
    assert at_once(here, token, asked) is None
    waiting = asyncio.create_task(resolve(here.runtime, token, asked, BEARER_KINDS))
    await here.project()
    assert (await waiting).code is Code.REVOKED
    far = Asked(min_seq=seq + 10)
    began = time.monotonic()
    outcomes = await asyncio.gather(
        *(resolve(here.runtime, one, far, BEARER_KINDS) for one in (token, mint("pat"), "nonsense"))
    )
    assert [Verdict(Code.STALE, None, here.position)] * 3 == outcomes
    assert time.monotonic() - began < 10


def _head() -> dict[str, Any]:
    return {"id": new_id("tok")[4:], "occurred_at": now(), "by": "system"}


async def test_batch_is_answered_in_order_with_one_wait(here: Host) -> None:
    known, _ = await here.issued()
    await here.project()
    late, _ = await here.issued()
    tokens = [known, late, mint("pat"), "nonsense", known]
    asked = [Asked("a"), Asked(), Asked(), Asked(), Asked("z")]
    verdicts = [decide(here.runtime, t, a, BEARER_KINDS, now()) for t, a in zip(tokens, asked, strict=True)]
    assert [verdict is None for verdict in verdicts] == [False, True, True, False, False]
    waiting = asyncio.create_task(resolve_all(here.runtime, tokens, asked, verdicts))
    await here.project()
    assert [verdict.code for verdict in await waiting] == [
        Code.VALID,
        Code.VALID,
        Code.UNKNOWN,
        Code.MALFORMED,
        Code.INSUFFICIENT_SCOPE,
    ]


async def test_batch_tells_stale_one_by_one(here: Host) -> None:
    known, _ = await here.issued()
    await here.project()
    far = here.position + 10
    tokens, asked = [known, known, mint("pat"), "nonsense"], [Asked(), *[Asked(min_seq=far)] * 3]
    verdicts = [decide(here.runtime, t, a, BEARER_KINDS, now()) for t, a in zip(tokens, asked, strict=True)]
    resolved = await resolve_all(here.runtime, tokens, asked, verdicts)
    assert [verdict.code for verdict in resolved] == [Code.VALID, Code.STALE, Code.STALE, Code.STALE]


async def test_use_names_the_token_what_was_asked_and_who_asked(here: Host) -> None:
    token, event = await here.issued()
    await here.project()
    verdict = at_once(here, token, Asked("z"))
    assert verdict is not None
    moment = datetime.fromisoformat("2026-01-31T12:00:00.123456+00:00")
    use = use_of(verdict, Asked("z", ("x", "y")), endpoint="validate", caller="tok", context=None, moment=moment)
    assert use is not None
    assert (use.token_id, use.outcome, use.caller) == (event.tokens[0].token_id, "insufficient_scope", "tok")
    assert (use.scope, use.audience, use.occurred_at_us) == ("z", "x y", 1_769_860_800_123_456)
    unknown = Verdict(Code.UNKNOWN, None, 1)
    assert use_of(unknown, Asked(), endpoint="validate", caller="tok", context=None, moment=moment) is None


# Who calls the management API


async def test_caller_is_known_by_its_token(here: Host) -> None:
    token, event = await here.issued(Kind.SAT, scope="ledger:issue a", audience=(ISSUER,))
    await here.project()
    caller = await authenticate(here.runtime, asking(token), ("ledger:issue",))
    assert (caller.token_id, caller.subject, caller.scope) == (
        event.tokens[0].token_id,
        event.subject,
        frozenset({"ledger:issue", "a"}),
    )
    assert token not in repr(caller)


async def test_admin_holds_every_ledger_scope_and_no_other(here: Host) -> None:
    token, _ = await here.issued(Kind.SAT, scope="ledger:admin")
    await here.project()
    caller = await authenticate(here.runtime, asking(token), ("ledger:users",))
    assert caller.holds("ledger:anything")
    assert not caller.holds("orders:write")
    for asked_for in ("orders:write", "ledgers:x"):
        with pytest.raises(InsufficientScope):
            await authenticate(here.runtime, asking(token), (asked_for,))


async def test_one_of_the_scopes_is_enough_and_none_is_not(here: Host) -> None:
    token, _ = await here.issued(Kind.PAT, scope="ledger:audit")
    await here.project()
    await authenticate(here.runtime, asking(token), ("ledger:users", "ledger:audit"))
    with pytest.raises(InsufficientScope) as caught:
        await authenticate(here.runtime, asking(token), ("ledger:users",))
    assert caught.value.scope == "ledger:users"


REFUSED = {
    "for another service": {"audience": ("https://elsewhere.example",)},
    "from another address": {"allowed_ips": ("198.51.100.0/24",)},
    "expired": {"expires_at": datetime.fromisoformat("2026-01-01T00:00:00+00:00")},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED.keys())
async def test_token_that_is_not_good_here_is_refused_with_one_text_for_every_cause(
    here: Host, changes: dict[str, Any]
) -> None:
    token, _ = await here.issued(Kind.SAT, scope="ledger:admin", **changes)
    await here.project()
    texts = set()
    for asked_for in (token, mint("sat")):
        with pytest.raises(InvalidToken) as caught:
            await authenticate(here.runtime, asking(asked_for, peer="192.0.2.200"), ())
        texts.add((caught.value.detail, str(caught.value.headers), caught.value.status))
        assert asked_for not in caught.value.private
    assert len(texts) == 1
    here.runtime.unknown_tokens._counts.clear()


async def test_refresh_token_is_no_bearer_token(here: Host) -> None:
    token, _ = await here.issued(Kind.REFRESH, client_id=new_id("cli"), scope="ledger:admin")
    await here.project()
    with pytest.raises(InvalidToken):
        await authenticate(here.runtime, asking(token), ())
    here.runtime.unknown_tokens._counts.clear()


async def test_guessing_is_limited_and_who_is_known_goes_on(here: Host) -> None:
    """Behind a proxy, the address is everybody's."""
    token, _ = await here.issued(Kind.SAT, scope="ledger:admin")
    await here.project()
    seen = []
    for _ in range(5):
        with pytest.raises((InvalidToken, TooManyRequests)) as caught:
            await authenticate(here.runtime, asking(mint("sat"), peer="192.0.2.66"), ())
        seen.append(type(caught.value))
        await authenticate(here.runtime, asking(token, peer="192.0.2.66"), ())
    assert seen == [InvalidToken] * 3 + [TooManyRequests] * 2
    assert int(caught.value.headers["Retry-After"]) > 0
    with pytest.raises(InvalidToken):
        await authenticate(here.runtime, asking(mint("sat"), peer="192.0.2.67"), ())


async def test_call_that_cannot_be_recorded_is_not_answered(here: Host) -> None:
    token, _ = await here.issued(Kind.SAT, scope="ledger:admin")
    await here.project()
    with paused(here.server), pytest.raises(Unavailable, match="use cannot be recorded"):
        await authenticate(here.runtime, asking(token), ())
    await authenticate(here.runtime, asking(token), ())


def test_every_reason_can_revoke() -> None:
    """A reason that the fold did not know would be a revocation lost."""
    for reason in Reason:
        event = GrantRevoked(**head(), grant_id=grt(1), reason=reason)
        assert evaluate(hit_after(begun(), event), OK, START) is Code.REVOKED
