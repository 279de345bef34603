"""What tokens of a person's grant depend on and come with: consent and session, and the ID token."""

from __future__ import annotations

from projections.grants import ActiveGrant
from projections.registry import Client
from service.oauth.id_tokens import IdTokenFor, mint_id_token
from service.rules.grants import NOBODY, Person
from service.runtime import Runtime


async def id_token(
    runtime: Runtime, client: Client, grant: ActiveGrant, *, scope: str, access_token: str, nonce: str | None
) -> str | None:
    """For the token endpoint, if the scope has `openid`; without a nonce for a refresh. Raises: Unavailable.

    Source: OIDC Core §3.1.3.3, §12.2.
    """
    if "openid" not in scope.split() or grant.by_code is None:
        return None
    session = runtime.view.session(grant.by_code.session_id)  # gone some time after its end
    claims = {"amr": list(session.methods)} if session is not None else {}
    about = IdTokenFor(grant.subject, grant.by_code.auth_time, nonce=nonce, access_token=access_token, claims=claims)
    return await mint_id_token(runtime, client, about)


def person_behind(runtime: Runtime, grant: ActiveGrant | None) -> Person:
    """What this host's view knows of the person who gave the grant, if a person did."""
    if grant is None or grant.by_code is None or grant.client_id is None:
        return NOBODY
    consent = runtime.view.consent(grant.subject, grant.client_id)
    return Person(consent, runtime.view.session(grant.by_code.session_id), runtime.view.cut(grant.subject))
