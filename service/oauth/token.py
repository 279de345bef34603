"""The token endpoint: RFC 6749 §3.2, §4.1.3, §4.4, §6."""

from __future__ import annotations

import msgspec

from events.errors import LedgerError
from service.commands import refused
from service.errors import InvalidGrant, UnauthorizedClient, UnsupportedGrantType
from service.grants import client_credentials
from service.incoming import Incoming
from service.oauth.codes import Redemption, redeem
from service.oauth.forms import authenticate_client, read_form
from service.outgoing import NO_STORE, Response
from service.refresh import Presentation, refresh
from service.runtime import Runtime
from service.tokens import well_formed

GRANT_TYPES = ("authorization_code", "client_credentials", "refresh_token")


async def token(runtime: Runtime, incoming: Incoming) -> Response:
    """Issues or refreshes. Raises: OAuthError and its kin, rendered as RFC 6749 §5.2."""
    form = await read_form(runtime, incoming)
    grant_type = form.need("grant_type")
    client = await authenticate_client(runtime, incoming, form, public=True)
    if grant_type not in GRANT_TYPES:
        raise UnsupportedGrantType("the grant_type is not one of: " + " ".join(GRANT_TYPES))
    if grant_type not in client.metadata.grant_types:
        raise UnauthorizedClient(f"the client is not registered for {grant_type}")
    if grant_type == "authorization_code":
        redemption = Redemption(
            client=client,
            code=form.need("code"),
            redirect_uri=form.need("redirect_uri"),
            code_verifier=form.need("code_verifier"),
            resources=form.resources,
            request_id=incoming.request_id,
        )
        return Response(200, await redeem(runtime, redemption), NO_STORE)
    scope = form.scope()
    if grant_type == "client_credentials":
        if client.metadata.token_endpoint_auth_method == "none":
            raise UnauthorizedClient("a public client cannot use client_credentials")
        try:
            answer = await client_credentials(runtime, client, scope, form.resources, incoming.request_id)
        except LedgerError as error:
            raise refused(error) from error
        return Response(200, msgspec.json.encode(answer), NO_STORE)
    presented = form.need("refresh_token")
    if not well_formed(presented):
        raise InvalidGrant("the refresh token is malformed")
    presentation = Presentation(
        client=client, token=presented, scope=scope, resources=form.resources, request_id=incoming.request_id
    )
    return Response(200, await refresh(runtime, presentation), NO_STORE)
