"""Authorization server metadata (RFC 8414, OpenID Connect Discovery) and the key set (RFC 7517).

Only what works is listed.
"""

from __future__ import annotations

from typing import Any, get_args
from urllib.parse import urlsplit

import msgspec

from projections.registry import Scope
from service.incoming import Incoming
from service.oauth.token import GRANT_TYPES
from service.outgoing import JSON, Response
from service.rules.authorization import CODE_CHALLENGE_METHODS, PROMPTS, RESPONSE_MODES, RESPONSE_TYPES
from service.rules.registry import OPENID_SCOPES
from service.runtime import Runtime
from service.settings import Algorithm

WELL_KNOWN = "/.well-known/oauth-authorization-server"
OPENID_CONFIGURATION = "/.well-known/openid-configuration"
# Caches may keep these for a short while.
_PUBLIC = (*JSON, ("cache-control", "public, max-age=300"))
_AUTH_METHODS = ["client_secret_basic", "client_secret_post"]
_CLAIMS = (
    *("iss", "sub", "aud", "exp", "iat", "auth_time", "nonce", "amr", "at_hash", "c_hash"),
    *("name", "preferred_username", "email"),
)
_SCOPES_MAX = 10_000

_rendered: dict[str, tuple[int, bytes]] = {}  # by issuer, at this position of the view


def well_known_paths(issuer: str) -> tuple[str, ...]:
    """Where the metadata is.

    RFC 8414 §3.1 and §5 put an issuer's path behind the well-known one, OpenID Connect Discovery §4.1 before it.
    """
    path = urlsplit(issuer).path.rstrip("/")
    paths = (WELL_KNOWN, OPENID_CONFIGURATION)
    beside = (WELL_KNOWN + path, OPENID_CONFIGURATION + path, path + OPENID_CONFIGURATION) if path else ()
    return (*paths, *beside)


async def metadata(runtime: Runtime, _: Incoming) -> Response:
    """RFC 8414 §2, OpenID Connect Discovery §3: one document for both."""
    issuer, position = runtime.settings.issuer, runtime.view.freshness().position
    known = _rendered.get(issuer)
    if known is None or known[0] != position:
        known = _rendered[issuer] = (position, msgspec.json.encode(_members(runtime)))
    return Response(200, known[1], _PUBLIC)


def _members(runtime: Runtime) -> dict[str, Any]:
    issuer = runtime.settings.issuer
    rows = [row for _, row in runtime.view.rows("scope", limit=_SCOPES_MAX) if isinstance(row, Scope)]
    known = {row.name: row.disabled_at is None for row in rows}
    scopes = [name for name in OPENID_SCOPES if known.get(name, True)]
    scopes += [name for name, usable in known.items() if usable and name not in OPENID_SCOPES]
    return {
        "issuer": issuer,
        "authorization_endpoint": f"{issuer}/oauth2/authorize",
        "pushed_authorization_request_endpoint": f"{issuer}/oauth2/par",
        "token_endpoint": f"{issuer}/oauth2/token",
        "introspection_endpoint": f"{issuer}/oauth2/introspect",
        "revocation_endpoint": f"{issuer}/oauth2/revoke",
        "userinfo_endpoint": f"{issuer}/oauth2/userinfo",
        "end_session_endpoint": f"{issuer}/oauth2/logout",
        "jwks_uri": f"{issuer}/oauth2/jwks",
        "scopes_supported": scopes,
        "response_types_supported": list(RESPONSE_TYPES),
        "response_modes_supported": list(RESPONSE_MODES),
        "grant_types_supported": list(GRANT_TYPES),
        "code_challenge_methods_supported": list(CODE_CHALLENGE_METHODS),
        "authorization_response_iss_parameter_supported": True,
        "prompt_values_supported": list(PROMPTS),
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": sorted(get_args(Algorithm), key="RS256".__ne__),
        "claims_supported": [*_CLAIMS],
        "claims_parameter_supported": False,
        "request_parameter_supported": False,
        "request_uri_parameter_supported": False,
        "token_endpoint_auth_methods_supported": [*_AUTH_METHODS, "none"],
        "introspection_endpoint_auth_methods_supported": _AUTH_METHODS,
        "revocation_endpoint_auth_methods_supported": [*_AUTH_METHODS, "none"],
    }


async def jwks(runtime: Runtime, _: Incoming) -> Response:
    """RFC 7517 §5."""
    return Response(200, runtime.signing_keys.document(), _PUBLIC)
