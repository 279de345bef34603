"""Token introspection: RFC 7662."""

from __future__ import annotations

from typing import Any

import msgspec

from events.types import Kind
from projections.current import Hit
from projections.grants import facts
from projections.registry import Client
from service.incoming import Incoming
from service.oauth.forms import authenticate_client, read_form
from service.outgoing import NO_STORE, Response
from service.runtime import Runtime
from service.tokens import now
from service.validation import (
    ALL_KINDS,
    Asked,
    Code,
    audience_of,
    authenticate,
    decide,
    recorded,
    resolve,
    scope_of,
    use_of,
)

_INACTIVE = b'{"active":false}'


async def introspect(runtime: Runtime, incoming: Incoming) -> Response:
    """Says whether a token is active. Whoever may not ask about it learns nothing: RFC 7662 §2.2."""
    form = await read_form(runtime, incoming)
    context = incoming.context(runtime.settings)
    header = incoming.header("authorization") or ""
    client: Client | None = None
    if header[:7].lower() == "bearer ":
        caller = (await authenticate(runtime, incoming, ("ledger:validate",), record=False)).token_id
    else:
        client = await authenticate_client(runtime, incoming, form, public=False)
        caller = client.client_id
    token = form.need("token")
    asked, moment = Asked(), now()
    verdict = decide(runtime, token, asked, ALL_KINDS, moment) or await resolve(runtime, token, asked, ALL_KINDS)
    hit = verdict.hit
    if hit is None or (client is not None and not _may_see(client, hit)):
        # A resource server passes on what it is sent: tokens that are known are answered all the same.
        runtime.unknown_tokens.take("introspect", caller)
        outcome = verdict.code.value if hit is None else "not_permitted"
        runtime.usage.count_refused(caller=caller, ip=context.ip, outcome=outcome, endpoint="introspect")
        return Response(200, _INACTIVE, NO_STORE)
    # The bearer's address is not known here, so that a token bound to addresses is not active for anybody.
    use = use_of(verdict, asked, endpoint="introspect", caller=caller, context=context, moment=moment)
    if use is not None:
        await recorded(runtime.usage.record(use))
    if verdict.code is not Code.VALID:
        return Response(200, _INACTIVE, NO_STORE)
    return Response(200, msgspec.json.encode(_active(runtime, hit)), NO_STORE)


def _may_see(client: Client, hit: Hit) -> bool:
    known = facts(hit.grant)
    if known is not None and known.client_id == client.client_id:
        return True
    if not client.metadata.may_introspect:
        return False
    audience = client.metadata.audience
    return "*" in audience or any(name in audience for name in audience_of(hit))


def _active(runtime: Runtime, hit: Hit) -> dict[str, Any]:
    known, token = facts(hit.grant), hit.token
    audience = audience_of(hit)
    members = {
        "active": True,
        "scope": scope_of(hit),
        "client_id": known.client_id if known else None,
        "token_type": None if token.kind is Kind.REFRESH else "Bearer",
        "exp": int(token.expires_at.timestamp()),
        "iat": int(token.issued_at.timestamp()),
        "nbf": int(token.issued_at.timestamp()),
        "sub": known.subject if known else None,
        "aud": (audience[0] if len(audience) == 1 else list(audience)) if audience else None,
        "iss": runtime.settings.issuer,
        "jti": hit.token_id,
        "grant_id": "grt_" + token.grant_id.hex(),
        "kind": token.kind.value,
    }
    return {name: value for name, value in members.items() if value is not None}
