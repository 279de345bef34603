"""Who the person behind an access token is: OpenID Connect Core §5.3, with the errors of RFC 6750 §3.1."""

from __future__ import annotations

import msgspec

from events.types import Kind
from projections.grants import ActiveGrant
from projections.registry import User
from service.errors import InsufficientScope, InvalidRequest
from service.incoming import Incoming
from service.oauth.forms import FORM, read_form
from service.outgoing import NO_STORE, Response
from service.registry import profile_of
from service.runtime import Runtime
from service.tokens import now
from service.validation import (
    Asked,
    Code,
    Verdict,
    bearer,
    decide,
    invalid_token,
    recorded,
    resolve,
    scope_of,
    use_of,
)

_ENDPOINT = "userinfo"
_KINDS = frozenset({Kind.ACCESS})


async def userinfo(runtime: Runtime, incoming: Incoming) -> Response:
    """`GET` and `POST /oauth2/userinfo`.

    Raises: Unauthorized, InvalidToken, InsufficientScope, InvalidRequest, TooManyRequests, Unavailable.
    """
    user, scope = await _person(runtime, incoming, await _token(runtime, incoming))
    claims: dict[str, str | None] = {"sub": user.user_id}
    profile = await profile_of(runtime, user)
    if profile is not None and "profile" in scope:
        claims |= {"name": profile.display_name, "preferred_username": profile.username}
    if profile is not None and "email" in scope:
        claims["email"] = profile.email
    body = {name: value for name, value in claims.items() if value is not None}
    return Response(200, msgspec.json.encode(body), NO_STORE)


async def _token(runtime: Runtime, incoming: Incoming) -> str:
    """Of the header, or of a form that is posted: RFC 6750 §2.1, §2.2."""
    headers = incoming.header_values("authorization")
    content_type = (incoming.header("content-type") or "").partition(";")[0].strip().lower()
    if incoming.method != "POST" or content_type != FORM:
        return bearer(headers)
    in_form = (await read_form(runtime, incoming)).get("access_token")
    if in_form is None:
        return bearer(headers)
    if headers:
        raise InvalidRequest("send the access token in one way, not in two")
    return in_form


async def _person(runtime: Runtime, incoming: Incoming, token: str) -> tuple[User, list[str]]:
    """Whom the token speaks for, and its scope. The request is a use of the token, and recorded as one."""
    asked, context, moment = Asked(scope="openid"), incoming.context(runtime.settings), now()
    verdict = decide(runtime, token, asked, _KINDS, moment) or await resolve(runtime, token, asked, _KINDS)
    hit = verdict.hit
    if hit is None:
        runtime.unknown_tokens.take(_ENDPOINT, context.ip or "")
        runtime.usage.count_refused(caller="", ip=context.ip, outcome=verdict.code.value, endpoint=_ENDPOINT)
        raise invalid_token(verdict.code)
    grant = hit.grant
    user = runtime.view.user(grant.subject) if isinstance(grant, ActiveGrant) and grant.by_code is not None else None
    code = Code.INSUFFICIENT_SCOPE if verdict.code is Code.VALID and user is None else verdict.code
    use = use_of(
        Verdict(code, hit, verdict.position),
        asked,
        endpoint=_ENDPOINT,
        caller=hit.token_id,
        context=context,
        moment=moment,
    )
    if use is not None:
        await recorded(runtime.usage.record(use))
    if code is Code.INSUFFICIENT_SCOPE:
        raise InsufficientScope("this needs a token that a person gave, with the scope openid", scope="openid")
    if code is not Code.VALID or user is None:
        raise invalid_token(code)
    return user, scope_of(hit).split()
