"""Authorization server metadata (RFC 8414) and the key set (RFC 7517). Only what works is listed."""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec

from projections.registry import Scope
from service.incoming import Incoming
from service.oauth.token import GRANT_TYPES
from service.outgoing import JSON, Response
from service.runtime import Runtime

WELL_KNOWN = "/.well-known/oauth-authorization-server"
# Anybody may read these from any page, and caches may keep them for a short while.
_PUBLIC = (*JSON, ("access-control-allow-origin", "*"), ("cache-control", "public, max-age=300"))
_AUTH_METHODS = ["client_secret_basic", "client_secret_post"]


def well_known_paths(issuer: str) -> tuple[str, ...]:
    """Where the metadata is: RFC 8414 §3.1 puts an issuer's path behind the well-known one."""
    path = urlsplit(issuer).path.rstrip("/")
    return (WELL_KNOWN, WELL_KNOWN + path) if path else (WELL_KNOWN,)


async def metadata(runtime: Runtime, _: Incoming) -> Response:
    """RFC 8414 §2."""
    issuer = runtime.settings.issuer
    scopes = [row.name for _, row in runtime.view.rows("scope") if isinstance(row, Scope) and row.disabled_at is None]
    members = {
        "issuer": issuer,
        "token_endpoint": f"{issuer}/oauth2/token",
        "introspection_endpoint": f"{issuer}/oauth2/introspect",
        "revocation_endpoint": f"{issuer}/oauth2/revoke",
        "jwks_uri": f"{issuer}/oauth2/jwks",
        "scopes_supported": scopes,
        "response_types_supported": [],
        "grant_types_supported": list(GRANT_TYPES),
        "token_endpoint_auth_methods_supported": [*_AUTH_METHODS, "none"],
        "introspection_endpoint_auth_methods_supported": _AUTH_METHODS,
        "revocation_endpoint_auth_methods_supported": [*_AUTH_METHODS, "none"],
    }
    return Response(200, msgspec.json.encode(members), _PUBLIC)


async def jwks(runtime: Runtime, _: Incoming) -> Response:
    """RFC 7517 §5."""
    return Response(200, msgspec.json.encode(runtime.signing_keys.jwks()), _PUBLIC)
