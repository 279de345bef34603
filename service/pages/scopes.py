"""What scopes are called where people read of them."""

from __future__ import annotations

from service.commands import known_scopes
from service.pages.values import ScopeShown
from service.runtime import Runtime

_OFFLINE_ACCESS = "offline_access"
# OIDC Core §5.4, §11: built in, and so not registered.
_DESCRIPTIONS = {
    "openid": "Know who you are, by an id that says nothing else",
    "profile": "See your name",
    "email": "See your e-mail address",
    _OFFLINE_ACCESS: "Keep this access while you are away",
}


def scopes_shown(runtime: Runtime, scope: str) -> list[ScopeShown]:
    """Each with its description, in the order of the scope."""
    registered = known_scopes(runtime)

    def words(name: str) -> str:
        described = registered[name].description if name in registered else _DESCRIPTIONS.get(name, "")
        return described or "The app's own name for something: nobody has described it here"

    return [ScopeShown(name=name, description=words(name), keeps=name == _OFFLINE_ACCESS) for name in scope.split()]
