"""What the service refuses, and why. One class an error; `service/api/problems.py` turns them into responses.

`detail` is public, for the person who reads the answer; `fix` says what to do. `private` is for the log only.
"""

from __future__ import annotations


class ServiceError(Exception):
    """Base of all refusals. Subclasses fix `status`, `code` and `title`."""

    status = 500
    code = "internal_error"
    title = "Internal error"
    fix = ""

    def __init__(
        self, detail: str, *, fix: str | None = None, private: str = "", headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.private = private
        self.headers = headers or {}
        if fix is not None:
            self.fix = fix


class InvalidRequest(ServiceError):
    status, code, title = 400, "invalid_request", "The request is malformed"


class SqlInvalid(ServiceError):
    status, code, title = 400, "sql_invalid", "The SQL cannot be run"


class SqlNotAllowed(ServiceError):
    """It is not one SELECT over the documented views."""

    status, code, title = 400, "sql_not_allowed", "The SQL is not allowed here"


class QueryTooHeavy(ServiceError):
    """It took too much time or memory."""

    status, code, title = 400, "query_too_heavy", "The query is too heavy"


class InvalidScope(ServiceError):
    status, code, title = 400, "invalid_scope", "The scope cannot be granted"


class InvalidClientMetadata(ServiceError):
    """Source: RFC 7591 §3.2.2."""

    status, code, title = 400, "invalid_client_metadata", "The client metadata is not acceptable"


class InvalidRedirectUri(ServiceError):
    """Source: RFC 7591 §3.2.2."""

    status, code, title = 400, "invalid_redirect_uri", "A redirect URI is not acceptable"


class Unauthorized(ServiceError):
    """No credentials at all: RFC 6750 §3.1 wants a challenge without an error code."""

    status, code, title = 401, "unauthorized", "Authentication is required"
    fix = "send `Authorization: Bearer <token>` with a token of this ledger"


class InvalidToken(ServiceError):
    """Source: RFC 6750 §3.1."""

    status, code, title = 401, "invalid_token", "The access token is not valid"
    fix = "get a new token"


class InsufficientScope(ServiceError):
    """Source: RFC 6750 §3.1. `scope` is what the call needs."""

    status, code, title = 403, "insufficient_scope", "The token lacks a scope"

    def __init__(self, detail: str, *, scope: str, fix: str | None = None) -> None:
        super().__init__(detail, fix=fix or f"use a token with the scope {scope}")
        self.scope = scope


class ForeignOrigin(ServiceError):
    """A page of another site asks, in the browser of somebody who did not."""

    status, code, title = 403, "foreign_origin", "Pages of other sites may not ask this"
    fix = "follow the feed from a program of your own; one that is no page sends no Origin"


class Forbidden(ServiceError):
    """A form that was not sent from one of our pages, or a decision that is not theirs to make."""

    status, code, title = 403, "forbidden", "This is not allowed"


class NotFound(ServiceError):
    status, code, title = 404, "not_found", "Not found"


class MethodNotAllowed(ServiceError):
    status, code, title = 405, "method_not_allowed", "The method is not allowed here"


class AlreadyExists(ServiceError):
    status, code, title = 409, "already_exists", "It exists already"


class Gone(ServiceError):
    """What was disabled or revoked cannot be changed any more."""

    status, code, title = 409, "ended", "It has ended and cannot be changed"


class LimitReached(ServiceError):
    """There are as many as there may be."""

    status, code, title = 409, "limit_reached", "There are as many as there may be"


class BodyTooLarge(ServiceError):
    status, code, title = 413, "body_too_large", "The request body is too large"


class UnsupportedMediaType(ServiceError):
    status, code, title = 415, "unsupported_media_type", "The content type is not supported"


class IdempotencyMismatch(ServiceError):
    status, code, title = 422, "idempotency_key_reused", "The Idempotency-Key was used for another request"
    fix = "use a new key for a new request"


class TooManyRequests(ServiceError):
    """`Retry-After` is set by whoever raises it."""

    status, code, title = 429, "too_many_requests", "Too many requests"
    fix = "wait as long as Retry-After says"


class RequestTimeout(ServiceError):
    status, code, title = 408, "request_timeout", "The request took too long to arrive"


class Unavailable(ServiceError):
    """The log or the view cannot answer now. Nothing is said rather than something untrue."""

    status, code, title = 503, "unavailable", "The service cannot answer at the moment"
    fix = "retry after the time in Retry-After; the request is safe to repeat"

    def __init__(self, detail: str, *, retry_after_seconds: int = 1, fix: str | None = None, private: str = "") -> None:
        super().__init__(detail, fix=fix, private=private, headers={"Retry-After": str(retry_after_seconds)})


class OAuthError(ServiceError):
    """An error of the OAuth endpoints, answered as RFC 6749 §5.2 says: `error` is `code`."""


class OAuthInvalidRequest(OAuthError):
    status, code = 400, "invalid_request"


class InvalidClient(OAuthError):
    """401 with a challenge: RFC 6749 §5.2."""

    status, code = 401, "invalid_client"

    def __init__(self, detail: str = "client authentication failed", *, private: str = "") -> None:
        super().__init__(detail, private=private, headers={"WWW-Authenticate": 'Basic realm="token-ledger"'})


class InvalidGrant(OAuthError):
    status, code = 400, "invalid_grant"


class UnauthorizedClient(OAuthError):
    status, code = 400, "unauthorized_client"


class UnsupportedGrantType(OAuthError):
    status, code = 400, "unsupported_grant_type"


class OAuthInvalidScope(OAuthError):
    status, code = 400, "invalid_scope"


class InvalidTarget(OAuthError):
    """Source: RFC 8707 §2."""

    status, code = 400, "invalid_target"


class UnsupportedTokenType(OAuthError):
    """Source: RFC 7009 §2.2.1."""

    status, code = 400, "unsupported_token_type"
