"""Is this token good, now, for this? The hot path: every validation, introspection and bearer call comes through here.

Nothing is signed or verified here. A hit in the view proves that the token is ours, since the view knows only hashes
of tokens that were issued.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import time
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum

from msgspec import Struct

from events.errors import LedgerError
from events.types import Context, Kind, TokenUsed
from projections.current import Freshness, Hit
from projections.grants import ActiveGrant, facts
from projections.registry import Cut
from service.caller import Caller
from service.errors import InsufficientScope, InvalidToken, Unauthorized, Unavailable
from service.incoming import Incoming
from service.runtime import RememberedCaller, Runtime
from service.tokens import now, sha256, well_formed

MIN_SEQ_SECONDS_MAX = 2.0
_CALLERS_REMEMBERED_MAX = 1024

BEARER_KINDS = frozenset({Kind.ACCESS, Kind.PAT, Kind.SAT})
ALL_KINDS = frozenset(Kind)

SCOPE_SYNTAX = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*")  # RFC 6749 App. A.4


class Code(StrEnum):
    """The answer to "is it valid?". When several hold, the first in this order, `valid` being none of the others."""

    STALE = "stale"
    MALFORMED = "malformed"
    UNKNOWN = "unknown"
    REVOKED = "revoked"
    CLIENT_DISABLED = "client_disabled"
    SUBJECT_DISABLED = "subject_disabled"
    NOT_YET_VALID = "not_yet_valid"
    EXPIRED = "expired"
    IP_NOT_ALLOWED = "ip_not_allowed"
    WRONG_AUDIENCE = "wrong_audience"
    INSUFFICIENT_SCOPE = "insufficient_scope"
    VALID = "valid"


class Asked(Struct, frozen=True, gc=False):
    """What a token is asked to be good for. Empty scope and audience are not checked.

    `audience`: names of the resource server that asks; the token must be for one of them. `ip`: of the token's bearer.
    """

    scope: str = ""
    audience: tuple[str, ...] = ()
    ip: str | None = None
    min_seq: int = 0


class Verdict(Struct, frozen=True, gc=False):
    """`hit` is None unless the token is known here; `position` is the ledger sequence the verdict is true at."""

    code: Code
    hit: Hit | None
    position: int


def _cut_code(grant: ActiveGrant, cut: Cut | None, disabled: Code) -> Code | None:
    if cut is None:
        return None
    if cut.seq > grant.first_seq:
        return Code.REVOKED
    return disabled if cut.disabled else None


def evaluate(hit: Hit, asked: Asked, moment: datetime) -> Code:
    """Pure. The code for a token that is known, fresh and of a kind that may be presented here."""
    token, grant = hit.token, hit.grant
    if token.ended is not None or not isinstance(grant, ActiveGrant):
        return Code.REVOKED
    if token.kind is Kind.REFRESH and grant.refresh is not None and grant.refresh.current != hit.token_id:
        return Code.REVOKED  # spent
    if hit.key_cut is not None:
        return Code.REVOKED
    if hit.client_cut is not None or hit.subject_cut is not None:
        by_client = _cut_code(grant, hit.client_cut, Code.CLIENT_DISABLED)
        by_subject = _cut_code(grant, hit.subject_cut, Code.SUBJECT_DISABLED)
        if Code.REVOKED in {by_client, by_subject}:
            return Code.REVOKED
        if by_client or by_subject:
            return by_client or by_subject or Code.REVOKED
    if moment >= token.expires_at:
        return Code.EXPIRED
    if grant.allowed_ips and not ip_allowed(asked.ip, grant.allowed_ips):
        return Code.IP_NOT_ALLOWED
    if asked.audience:
        audience = grant.audience if token.audience is None else token.audience
        if audience and not any(name in audience for name in asked.audience):
            return Code.WRONG_AUDIENCE
    if asked.scope:
        scope = grant.scope if token.scope is None else token.scope
        granted = scope.split(" ")
        if not all(name in granted for name in asked.scope.split()):
            return Code.INSUFFICIENT_SCOPE
    return Code.VALID


def ip_allowed(ip: str | None, networks: Sequence[str]) -> bool:
    """Whether the address lies in one of the CIDR networks. No address, or none that can be read: no."""
    if ip is None:
        return False
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    return any(address in ipaddress.ip_network(network) for network in networks)


def scope_of(hit: Hit) -> str:
    """The token's own scope, else its grant's."""
    known = facts(hit.grant)
    return hit.token.scope if hit.token.scope is not None else known.scope if known else ""


def audience_of(hit: Hit) -> tuple[str, ...]:
    """The token's own audience, else its grant's."""
    known = facts(hit.grant)
    return hit.token.audience if hit.token.audience is not None else known.audience if known else ()


def decide(runtime: Runtime, token: str, asked: Asked, kinds: frozenset[Kind], moment: datetime) -> Verdict | None:
    """The verdict if the view alone can give it, else None: then `resolve` must be asked.

    Raises: Unavailable when the view is staler than its bound.
    """
    if not well_formed(token):
        return _malformed(runtime.view.freshness(), asked)
    hit, fresh = runtime.view.look_up(sha256(token))
    runtime.check_fresh(fresh)
    return _judged(hit, fresh, asked, kinds, moment)


def decide_all(
    runtime: Runtime, tokens: list[str], asked: list[Asked], kinds: frozenset[Kind], moment: datetime
) -> list[Verdict | None]:
    """As `decide` for each, all at one position of the view. Raises: Unavailable."""
    formed = [well_formed(token) for token in tokens]
    hits, fresh = runtime.view.look_up_all([sha256(token) for token, fit in zip(tokens, formed, strict=True) if fit])
    runtime.check_fresh(fresh)
    found = iter(hits)
    return [
        _judged(next(found), fresh, what, kinds, moment) if fit else _malformed(fresh, what)
        for fit, what in zip(formed, asked, strict=True)
    ]


def _malformed(fresh: Freshness, asked: Asked) -> Verdict | None:
    return Verdict(Code.MALFORMED, None, fresh.position) if fresh.position >= asked.min_seq else None


def _judged(
    hit: Hit | None, fresh: Freshness, asked: Asked, kinds: frozenset[Kind], moment: datetime
) -> Verdict | None:
    if hit is None or fresh.position < asked.min_seq:
        return None
    if hit.token.kind not in kinds:
        return Verdict(Code.UNKNOWN, None, fresh.position)
    return Verdict(evaluate(hit, asked, moment), hit, fresh.position)


async def resolve(runtime: Runtime, token: str, asked: Asked, kinds: frozenset[Kind]) -> Verdict:
    """As `decide`, waiting where it must: for `min_seq`, and for the log's end before a token is called unknown.

    Raises: Unavailable.
    """
    if asked.min_seq and not await runtime.waiter.applied(asked.min_seq, MIN_SEQ_SECONDS_MAX):
        return Verdict(Code.STALE, None, runtime.view.freshness().position)
    verdict = decide(runtime, token, asked, kinds, now())
    if verdict is None:
        await runtime.view_at_end()
        verdict = decide(runtime, token, asked, kinds, now())
    return verdict or Verdict(Code.UNKNOWN, None, runtime.view.freshness().position)


async def resolve_all(
    runtime: Runtime, tokens: list[str], asked: list[Asked], verdicts: list[Verdict | None]
) -> list[Verdict]:
    """As `resolve` for every None in `verdicts`, with one wait for all of them. Raises: Unavailable."""
    open_ones = [index for index, verdict in enumerate(verdicts) if verdict is None]
    if not open_ones:
        return [verdict for verdict in verdicts if verdict is not None]
    wanted = max(asked[index].min_seq for index in open_ones)
    if wanted:
        await runtime.waiter.applied(wanted, MIN_SEQ_SECONDS_MAX)
    await runtime.view_at_end()
    position, moment = runtime.view.freshness().position, now()
    resolved = []
    for index, verdict in enumerate(verdicts):
        final = verdict or decide(runtime, tokens[index], asked[index], BEARER_KINDS, moment)
        code = Code.STALE if position < asked[index].min_seq else Code.UNKNOWN
        resolved.append(final or Verdict(code, None, position))
    return resolved


def use_of(
    verdict: Verdict, asked: Asked, *, endpoint: str, caller: str, context: Context | None, moment: datetime
) -> TokenUsed | None:
    """The use to record, or None for a token that is not known: those are counted."""
    if verdict.hit is None:
        return None
    return TokenUsed(
        int(moment.timestamp() * 1_000_000),
        verdict.hit.token_id,
        None,
        verdict.code,
        endpoint,
        caller,
        asked.scope,
        " ".join(asked.audience),
        context,
    )


async def recorded(future: asyncio.Future[None] | None) -> None:
    """Waits until a use is on disk; at once in `buffered` mode. Raises: Unavailable."""
    if future is None:
        return
    try:
        await future
    except LedgerError as error:
        raise Unavailable("the use cannot be recorded, so nothing is said", private=str(error)) from error


def bearer(values: list[str]) -> str:
    """The token of the `Authorization` headers. Source: RFC 6750 §2.1, RFC 9110 §11.1 (case of the scheme).

    Raises: Unauthorized without a bearer token; InvalidToken if there are several headers or the syntax is wrong.
    """
    if not values:
        raise Unauthorized("no access token was sent", headers={"WWW-Authenticate": 'Bearer realm="token-ledger"'})
    scheme, _, token = values[0].partition(" ")
    if len(values) == 1 and scheme.lower() != "bearer":
        raise Unauthorized("no bearer token was sent", headers={"WWW-Authenticate": 'Bearer realm="token-ledger"'})
    token = token.strip(" ")
    if len(values) > 1 or not token or " " in token or "," in token:
        raise MalformedAuthorization("send exactly one header `Authorization: Bearer <token>`")
    return token


class MalformedAuthorization(InvalidToken):
    """Source: RFC 6750 §3.1, invalid_request."""

    status, code, title = 400, "invalid_request", "The Authorization header is malformed"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"WWW-Authenticate": 'Bearer realm="token-ledger", error="invalid_request"'})


async def authenticate(
    runtime: Runtime,
    incoming: Incoming,
    needs: tuple[str, ...],
    *,
    endpoint: str = "api",
    record: bool = True,
) -> Caller:
    """The caller of a management call, whose token must hold one of the scopes in `needs`.

    The call is a use of the caller's own token and is recorded as one, allowed or refused, unless `record` is False
    because the call is recorded otherwise.

    Raises: Unauthorized, InvalidToken, InsufficientScope, TooManyRequests, Unavailable.
    """
    headers = incoming.header_values("authorization")
    token = bearer(headers)
    if not record:
        remembered = _remembered(runtime, headers[0], needs)
        if remembered is not None:
            return remembered
    ip = incoming.client_ip(runtime.settings)
    # The management API takes tokens whose audience is the issuer or absent.
    asked = Asked(audience=(runtime.settings.issuer,), ip=ip)
    moment = now()
    verdict = decide(runtime, token, asked, BEARER_KINDS, moment) or await resolve(runtime, token, asked, BEARER_KINDS)
    hit = verdict.hit
    if hit is None:
        # Only now: many may come from one address, and what is known is taken from all of them.
        runtime.unknown_tokens.take("bearer", ip or "")
        runtime.usage.count_refused(caller="", ip=ip, outcome=verdict.code.value, endpoint=endpoint)
        raise invalid_token(verdict.code)
    known = facts(hit.grant)
    scope = frozenset(scope_of(hit).split())
    caller = Caller(token, hit.token_id, known.subject if known else "", known.client_id if known else None, scope)
    missing = bool(needs) and not any(caller.holds(name) for name in needs)
    code = Code.INSUFFICIENT_SCOPE if verdict.code is Code.VALID and missing else verdict.code
    if record or code is not Code.VALID:
        # The scope that let it through, where several would have done: auditors ask which scopes are used.
        granted = [name for name in needs if name in caller.scope] or needs
        wanted = Asked(scope=" ".join(granted[:1]), audience=asked.audience, ip=asked.ip)
        use = use_of(
            Verdict(code, hit, verdict.position),
            wanted,
            endpoint=endpoint,
            caller=hit.token_id,
            context=incoming.context(runtime.settings),
            moment=moment,
        )
        if use is not None:
            await recorded(runtime.usage.record(use))
    if verdict.code is not Code.VALID:
        raise invalid_token(verdict.code)
    if missing:
        raise InsufficientScope(f"this call needs the scope {needs[0]}", scope=needs[0])
    if not record and known is not None and not known.allowed_ips:
        if len(runtime.callers) >= _CALLERS_REMEMBERED_MAX:
            runtime.callers.clear()
        runtime.callers[headers[0]] = RememberedCaller(
            verdict.position, hit.token.expires_at.timestamp(), needs, caller
        )
    return caller


def _remembered(runtime: Runtime, header: str, needs: tuple[str, ...]) -> Caller | None:
    """The caller, if nothing at all has happened since its token was last found good, and the view is fresh."""
    known = runtime.callers.get(header)
    if known is None or known.needs != needs or time.time() >= known.expires_at:
        return None
    fresh = runtime.view.freshness()
    if fresh.position != known.position or fresh.age_seconds > runtime.settings.view_staleness_seconds_max:
        return None
    return known.caller


def invalid_token(code: Code) -> InvalidToken:
    """The refusal of a token that is known or not, RFC 6750 §3.1."""
    # One text for every cause: whoever holds a bad token learns nothing about it.
    return InvalidToken(
        "the access token is unknown, expired, revoked or not for this service",
        private=code.value,
        headers={
            "WWW-Authenticate": 'Bearer realm="token-ledger", error="invalid_token", '
            'error_description="the access token is not valid"'
        },
    )
