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


def consent_withdrawn_seq(runtime: Runtime, grant: ActiveGrant | None) -> int:
    """When the person last took back what they allow this client: grants that began before have ended. 0: never."""
    if grant is None or grant.by_code is None or grant.client_id is None:
        return 0
    consent = runtime.view.consent(grant.subject, grant.client_id)
    return consent.withdrawn_seq if consent is not None else 0


def has_signed_out(runtime: Runtime, grant: ActiveGrant) -> bool:
    """Whether the session that a code was made in was ended, or was none at all.

    What was granted in it has been revoked by then, but for a code that was made at that very moment.
    """
    session = runtime.view.session(grant.by_code.session_id) if grant.by_code is not None else None
    if session is None:
        return False
    cut = runtime.view.cut(grant.subject)
    if cut is not None and cut.seq > session.user_seq:
        return True
    return session.reason in {"signed_out", "admin"} and not (grant.by_code is not None and grant.by_code.offline)
