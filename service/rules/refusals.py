"""What the authorization endpoint refuses, one class an error, and how each is told.

An error whose redirect URI cannot be trusted is a page (RFC 6749 §4.1.2.1, first paragraph): a `PageError`. Every other
is told to the client at its redirect URI: a `RedirectError`. Pushed requests (RFC 9126 §2.3) get both as JSON.
"""

from __future__ import annotations

from msgspec import Struct

from service.errors import OAuthError


class Target(Struct, frozen=True):
    """Where the answer to an authorization request goes, and how. `state` is the client's own, None if it gave none."""

    client_id: str
    redirect_uri: str
    response_mode: str
    state: str | None = None


class PageError(OAuthError):
    """Told to the person only: there is nowhere that the browser could be sent to safely."""

    status, code, title = 400, "invalid_request", "This application's request cannot be answered"
    fix = "go back to the application and begin again; if it lasts, its makers have to correct it"


class UnreadableRequest(PageError):
    """The request cannot be read, or names its client or its redirect URI twice: RFC 6749 §3.1."""


class UnknownClient(PageError):
    """No client has this id, or it was disabled."""

    code = "invalid_client"


class UnregisteredRedirectUri(PageError):
    """Source: RFC 9700 §2.1, §4.1.3."""


class UnknownRequestUri(PageError):
    """It was never pushed, not by this client, was used or has expired. Source: RFC 9126 §4, §7.3."""

    code = "invalid_request_uri"


class RedirectError(OAuthError):
    """Told to the client at its redirect URI: RFC 6749 §4.1.2.1. `target` is set by who knows it."""

    status, code, title = 400, "invalid_request", "This application's request cannot be answered"
    target: Target | None = None


class InvalidParameter(RedirectError):
    """A parameter is missing, repeated or malformed, or two contradict each other."""


class ResponseTypeUnsupported(RedirectError):
    code = "unsupported_response_type"


class ResponseTypeNotAllowed(RedirectError):
    """The client is not registered for it."""

    code = "unauthorized_client"


class ScopeNotAllowed(RedirectError):
    code = "invalid_scope"


class TargetNotAllowed(RedirectError):
    """Source: RFC 8707 §2."""

    code = "invalid_target"


class RequestUnsupported(RedirectError):
    """Request objects are not read. Source: OpenID Connect Core §3.1.2.6."""

    code = "request_not_supported"


class RequestUriUnsupported(RedirectError):
    """Only those of pushed requests are known; nothing is ever fetched. Source: OpenID Connect Core §3.1.2.6."""

    code = "request_uri_not_supported"


class RegistrationUnsupported(RedirectError):
    """Source: OpenID Connect Core §3.1.2.6."""

    code = "registration_not_supported"


class LoginRequired(RedirectError):
    """Nobody is signed in, and `prompt=none` forbids to ask. Source: OpenID Connect Core §3.1.2.6."""

    code = "login_required"


class ConsentRequired(RedirectError):
    """The person has not consented, and `prompt=none` forbids to ask. Source: OpenID Connect Core §3.1.2.6."""

    code = "consent_required"


class AccessDenied(RedirectError):
    """The person said no."""

    code = "access_denied"


class TooManyCodes(RedirectError):
    """It asks for codes faster than a person can need them, as a page that is caught in a loop does."""

    code = "temporarily_unavailable"
