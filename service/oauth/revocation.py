"""Token revocation: RFC 7009."""

from __future__ import annotations

from events.types import Reason
from projections.grants import facts
from service.errors import InvalidRequest, UnsupportedTokenType
from service.grants import revoke_token
from service.incoming import Incoming
from service.oauth.forms import authenticate_client, read_form
from service.outgoing import NO_STORE, Response
from service.runtime import Runtime
from service.tokens import sha256, well_formed


async def revoke(runtime: Runtime, incoming: Incoming) -> Response:
    """Revokes a token of the client that asks; an unknown token is revoked already: RFC 7009 §2.2.

    `token_type_hint` is not needed to find a token and is not looked at, which §2.1 allows.
    """
    form = await read_form(runtime, incoming)
    client = await authenticate_client(runtime, incoming, form, public=True)
    token = form.need("token")
    if token.startswith(("tl_cs_", "tl_ac_")):
        raise UnsupportedTokenType("client secrets and authorization codes cannot be revoked here")
    if not well_formed(token):
        return Response(200, b"", NO_STORE)
    digest = sha256(token)
    hit, _ = runtime.view.look_up(digest)
    if hit is None:
        await runtime.view_at_end()
        hit, _ = runtime.view.look_up(digest)
    if hit is None:
        return Response(200, b"", NO_STORE)
    known = facts(hit.grant)
    if known is None or known.client_id != client.client_id:
        raise InvalidRequest("the token was not issued to this client")
    await revoke_token(
        runtime, client.client_id, hit.token_id, Reason.CLIENT_REQUEST, None, request_id=incoming.request_id
    )
    return Response(200, b"", NO_STORE)
