"""Validation over HTTP: one token, a batch, and the question of a reverse proxy.

These do without Litestar, since they are called for every request of every application.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from events.types import Context, TokenUsed
from projections.grants import facts
from service import metrics
from service.caller import Caller
from service.errors import InsufficientScope, InvalidRequest, InvalidToken
from service.incoming import Incoming, parse_form
from service.outgoing import NO_STORE, Response
from service.parsing import decode_json, ip_address, json_body
from service.runtime import Runtime
from service.tokens import now, redacted
from service.validation import (
    BEARER_KINDS,
    SCOPE_SYNTAX,
    Asked,
    Code,
    Verdict,
    audience_of,
    authenticate,
    bearer,
    decide,
    decide_all,
    recorded,
    resolve,
    resolve_all,
    scope_of,
    use_of,
)

BATCH_REQUESTS_MAX = 1000
NEEDS = ("ledger:validate",)

Text = Annotated[str, Meta(max_length=256)]
Scope = Annotated[str, Meta(max_length=4096)]
Audience = Annotated[str, Meta(max_length=500)]


class RequestContext(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """Where the token's bearer is, as the caller saw it."""

    ip: Annotated[str, Meta(max_length=45)] | None = None
    user_agent: Annotated[str, Meta(max_length=1024)] | None = None
    method: Annotated[str, Meta(max_length=32)] | None = None
    path: Annotated[str, Meta(max_length=2048)] | None = None


class ValidateRequest(Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """`scope` and `audience` are checked if they are given; `min_seq` is a `ledger_seq` the answer must know of."""

    token: Annotated[str, Meta(max_length=16_384)]
    scope: Scope = ""
    audience: Audience | Annotated[list[Audience], Meta(max_length=32)] = ""
    min_seq: Annotated[int, Meta(ge=0, le=2**53)] = 0
    context: RequestContext | None = None


class BatchRequest(Struct, frozen=True, forbid_unknown_fields=True):
    requests: Annotated[list[ValidateRequest], Meta(min_length=1, max_length=BATCH_REQUESTS_MAX)]


class ValidateAnswer(Struct, frozen=True, gc=False, omit_defaults=True):
    """What is known of the token comes with it, valid or not. `ledger_seq`: the sequence the answer is true at."""

    valid: bool
    code: str
    ledger_seq: int
    token_id: str | None = None
    grant_id: str | None = None
    kind: str | None = None
    subject: str | None = None
    client_id: str | None = None
    scope: str | None = None
    audience: tuple[str, ...] = ()
    issued_at: datetime | None = None
    expires_at: datetime | None = None


class BatchAnswer(Struct, frozen=True):
    results: list[ValidateAnswer]


_decode_one = msgspec.json.Decoder(ValidateRequest).decode
_decode_batch = msgspec.json.Decoder(BatchRequest).decode
_encode = msgspec.json.Encoder().encode


def _asked(request: ValidateRequest) -> Asked:
    """Raises: InvalidRequest."""
    audience = request.audience
    names = (audience,) if isinstance(audience, str) and audience else tuple(audience)
    return Asked(request.scope, names, _ip(request), request.min_seq)


def _ip(request: ValidateRequest) -> str | None:
    """Of whom the token came from. Raises: InvalidRequest."""
    if request.context is None or request.context.ip is None:
        return None
    return ip_address(request.context.ip, "context.ip")


def context_of(given: RequestContext | None) -> Context | None:
    """As it is recorded. Raises: InvalidRequest."""
    if given is None:
        return None
    agent, path = given.user_agent, given.path
    # No query string is kept: it may hold secrets of the application.
    return Context(
        ip_address(given.ip, "context.ip") if given.ip is not None else None,
        redacted(agent)[:256] if agent else None,
        given.method,
        redacted(path.partition("?")[0])[:256] if path else None,
    )


def _answer(verdict: Verdict) -> ValidateAnswer:
    hit = verdict.hit
    if hit is None:
        return ValidateAnswer(False, verdict.code.value, verdict.position)
    known, token = facts(hit.grant), hit.token
    return ValidateAnswer(
        verdict.code is Code.VALID,
        verdict.code,
        verdict.position,
        hit.token_id,
        "grt_" + token.grant_id.hex(),
        token.kind,
        known.subject if known else None,
        known.client_id if known else None,
        scope_of(hit),
        audience_of(hit),
        token.issued_at,
        token.expires_at,
    )


async def validate(runtime: Runtime, incoming: Incoming) -> Response:
    """`POST /v1/tokens/validate`."""
    caller = await authenticate(runtime, incoming, NEEDS, endpoint="validate", record=False)
    request = decode_json(_decode_one, await json_body(incoming, runtime.settings))
    asked, moment = _asked(request), now()
    verdict = decide(runtime, request.token, asked, BEARER_KINDS, moment)
    if verdict is None:
        verdict = await resolve(runtime, request.token, asked, BEARER_KINDS)
    if verdict.hit is None:
        _limit(runtime, caller, [verdict])
    metrics.validated(verdict.code)
    use = use_of(
        verdict, asked, endpoint="validate", caller=caller.token_id, context=context_of(request.context), moment=moment
    )
    if use is not None:
        await recorded(runtime.usage.record(use))
    else:
        _refused(runtime, caller, request, verdict.code, "validate")
    return Response(200, _encode(_answer(verdict)), NO_STORE)


def _limit(runtime: Runtime, caller: Caller, verdicts: list[Verdict]) -> None:
    """Raises: TooManyRequests for who asks about too many unknown tokens; those that are known are always answered."""
    unknown = sum(verdict.code in {Code.UNKNOWN, Code.MALFORMED} for verdict in verdicts if verdict.hit is None)
    if unknown:
        runtime.unknown_tokens.take("validate", caller.token_id, times=unknown)


def _refused(runtime: Runtime, caller: Caller, request: ValidateRequest, code: Code, endpoint: str) -> None:
    runtime.usage.count_refused(caller=caller.token_id, ip=_ip(request), outcome=code.value, endpoint=endpoint)


async def validate_batch(runtime: Runtime, incoming: Incoming) -> Response:
    """`POST /v1/tokens/validate-batch`: up to 1,000 at once, answered in the same order."""
    caller = await authenticate(runtime, incoming, NEEDS, endpoint="batch", record=False)
    body = await json_body(incoming, runtime.settings, bytes_max=runtime.settings.batch_body_bytes_max)
    requests = decode_json(_decode_batch, body).requests
    moment = now()
    asked = [_asked(request) for request in requests]
    tokens = [request.token for request in requests]
    verdicts = decide_all(runtime, tokens, asked, BEARER_KINDS, moment)
    resolved = await resolve_all(runtime, tokens, asked, verdicts)
    _limit(runtime, caller, resolved)
    uses: list[TokenUsed] = []
    answers = []
    for code, count in Counter(verdict.code for verdict in resolved).items():
        metrics.validated(code, count)
    for request, what, verdict in zip(requests, asked, resolved, strict=True):
        use = use_of(
            verdict, what, endpoint="batch", caller=caller.token_id, context=context_of(request.context), moment=moment
        )
        if use is not None:
            uses.append(use)
        else:
            _refused(runtime, caller, request, verdict.code, "batch")
        answers.append(_answer(verdict))
    if uses:
        await recorded(runtime.usage.record(*uses))
    return Response(200, _encode(BatchAnswer(answers)), NO_STORE)


async def forward_auth(runtime: Runtime, incoming: Incoming) -> Response:
    """`GET /v1/forward-auth`, for nginx `auth_request`, Traefik and Envoy: 200, 401 or 403 (RFC 6750 §3.1).

    Raises: InvalidToken, InsufficientScope, InvalidRequest, TooManyRequests, Unavailable.
    """
    token = bearer(incoming.header_values("authorization"))
    asked = _forward_asked(runtime, incoming)
    here, moment = incoming.context(runtime.settings), now()
    verdict = decide(runtime, token, asked, BEARER_KINDS, moment) or await resolve(runtime, token, asked, BEARER_KINDS)
    code, hit = verdict.code, verdict.hit
    # A proxy that does not say for which audience it asks would let in tokens for anybody.
    if hit is not None and code is Code.VALID and not asked.audience and audience_of(hit):
        code = Code.WRONG_AUDIENCE
    metrics.validated(code)
    use = use_of(
        Verdict(code, hit, verdict.position), asked, endpoint="forward-auth", caller="", context=here, moment=moment
    )
    if use is not None:
        await recorded(runtime.usage.record(use))
    else:
        runtime.unknown_tokens.take("forward-auth", here.ip or "")
        runtime.usage.count_refused(caller="", ip=here.ip, outcome=code.value, endpoint="forward-auth")
    return _forward_answer(code, verdict, asked)


def _forward_asked(runtime: Runtime, incoming: Incoming) -> Asked:
    scope, audience = "", []
    for name, value in parse_form(incoming.query_string):
        if name == "scope" and not scope:
            scope = value
        elif name == "audience":
            audience.append(value)
        else:
            raise InvalidRequest("the query may hold scope, once, and audience", fix="?scope=…&audience=…")
    if scope and not SCOPE_SYNTAX.fullmatch(scope):
        raise InvalidRequest("the scope holds characters that no scope can hold")
    return Asked(scope, tuple(audience), incoming.client_ip(runtime.settings))


def _forward_answer(code: Code, verdict: Verdict, asked: Asked) -> Response:
    hit = verdict.hit
    if code is Code.VALID and hit is not None:
        known = facts(hit.grant)
        headers = [
            ("x-token-subject", known.subject if known else ""),
            ("x-token-client", (known.client_id or "") if known else ""),
            ("x-token-scope", scope_of(hit)),
            ("x-token-id", hit.token_id),
        ]
        return Response(200, b"", (*NO_STORE, *headers))
    if code is Code.INSUFFICIENT_SCOPE:
        raise InsufficientScope("the token lacks a scope that is needed here", scope=asked.scope)
    # One answer for every cause: whoever holds a bad token learns nothing about it.
    raise InvalidToken(
        "the access token is unknown, expired, revoked or not for this audience or address",
        private=code.value,
        headers={"WWW-Authenticate": 'Bearer realm="token-ledger", error="invalid_token"'},
    )
