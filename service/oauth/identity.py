"""What tokens of a person's grant have besides: an ID token, and a consent that may be withdrawn."""

from __future__ import annotations

import importlib
from typing import Any

from projections.grants import ActiveGrant
from projections.registry import Client
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


def consent_withdrawn_seq(_: Runtime, grant: ActiveGrant | None) -> int:  # noqa: ARG001 - until consents can be asked
    """When the person last took back what they allow this client: grants that began before have ended. 0: never."""
    return 0
