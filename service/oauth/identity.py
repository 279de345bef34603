"""What tokens of a person's grant have besides: an ID token, and a consent that may be withdrawn."""

from __future__ import annotations

import importlib
from typing import Any

from projections.grants import ActiveGrant
from projections.registry import Client
from service.rules.grants import NOBODY, Person
from service.runtime import Runtime


async def id_token(
    runtime: Runtime, client: Client, grant: ActiveGrant, *, scope: str, access_token: str, nonce: str | None
) -> str | None:
    """For the token endpoint, if the scope has `openid`. Source: OIDC Core §3.1.3.3, §12.2.

    Raises: LedgerError.
    """
    if "openid" not in scope.split() or grant.by_code is None:
        return None
    try:
        module: Any = importlib.import_module("service.oauth.id_tokens")
    except ImportError:
        return None
    wanted = module.IdTokenFor(
        subject=grant.subject,
        auth_time=grant.by_code.auth_time,
        nonce=nonce,
        code=None,
        access_token=access_token,
        claims={},
    )
    token: str = await module.mint_id_token(runtime, client, wanted)
    return token


def person_behind(runtime: Runtime, grant: ActiveGrant | None) -> Person:
    """What this host's view knows of the person who gave the grant, if a person did."""
    if grant is None or grant.by_code is None or grant.client_id is None:
        return NOBODY
    consent = runtime.view.consent(grant.subject, grant.client_id)
    return Person(consent, None if grant.by_code.offline else runtime.view.session(grant.by_code.session_id))
