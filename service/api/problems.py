"""The one place that turns exceptions into responses.

RFC 9457 for the management API, RFC 6749 §5.2 for OAuth, and a page where the one who asks is a person with a browser.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import structlog
from litestar.exceptions import HTTPException
from msgspec import UNSET, Struct, UnsetType

from events.errors import LedgerError
from service.commands import refused
from service.errors import (
    InsufficientScope,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    OAuthError,
    ServiceError,
)
from service.incoming import Incoming
from service.oauth.forms import oauth_error
from service.outgoing import NO_STORE, Headers, Response
from service.pages.render import error_page, ours
from service.pages.values import Link
from service.runtime import NotYetApplied

log = structlog.get_logger()

PROBLEM_JSON = "application/problem+json"
_OAUTH = "/oauth2/"
_MANAGEMENT = "/v1/"
_PAGES = re.compile(r"/oauth2/(authorize|consent|logout)|/(sign-in|sign-out|account)(/.*)?")
_WEIGHT = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")
_AUTHORIZE = "/oauth2/authorize"
_ACCOUNT = "/account"
_AGAIN = ("/sign-in", "/sign-out")
_HEADERS: Headers = (
    ("content-type", PROBLEM_JSON),
    *(header for header in NO_STORE if header[0] != "content-type"),
)


class Problem(Struct, frozen=True, kw_only=True):
    """RFC 9457 §3. `code` is what programs go by, `fix` what the caller can do, `request_id` what the log knows it by.

    `scope`: the scope that is missing. `ledger_seq`: what was recorded although this answer is an error.
    """

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    fix: str | UnsetType = UNSET
    scope: str | UnsetType = UNSET
    ledger_seq: int | UnsetType = UNSET


class InternalError(ServiceError):
    """Something that should not happen. The log knows what; the caller gets the number to ask by."""

    fix = "repeat the request; if it lasts, give the request_id to the operator, who finds it in the log"


def render(error: BaseException, incoming: Incoming) -> Response:
    """The response that an exception means. Nothing of the request but its path's template is ever logged."""
    known = _known(error)
    if known is None:
        # Without the exception's text: it may quote the request.
        log.error(
            "request_failed",
            request_id=incoming.request_id,
            error=type(error).__name__,
            where=_where(error),
        )
        known = InternalError("the service failed to answer this request")
    elif known.private:
        log.debug("request_refused", request_id=incoming.request_id, code=known.code, private=known.private)
    if _PAGES.fullmatch(incoming.path):
        return error_page(known, incoming.request_id, link=_way_on(incoming.path))
    if isinstance(error, HTTPException) and known.status == 404 and not incoming.path.startswith(_MANAGEMENT):
        answer = _nowhere(incoming) if _prefers_page(incoming) else _for_program(known, incoming)
        return Response(answer.status, answer.body, (*answer.headers, ("vary", "accept")))
    return _for_program(known, incoming)


def _for_program(known: ServiceError, incoming: Incoming) -> Response:
    if isinstance(known, OAuthError) or incoming.path.startswith(_OAUTH):
        return _oauth(known)
    return _problem(known, incoming.request_id)


def _nowhere(incoming: Incoming) -> Response:
    nothing = NotFound("there is nothing at this address", fix="check how it is written, or open your account")
    return error_page(nothing, incoming.request_id, link=_way_on(_ACCOUNT))


def _prefers_page(incoming: Incoming) -> bool:
    """Whether it is a browser, which names HTML and would rather have it than JSON. Source: RFC 9110 §12.5.1."""
    weights: dict[str, float] = {}
    for one in ",".join(incoming.header_values("accept")).split(","):
        media_range, *parameters = (part.strip().lower() for part in one.split(";"))
        given = next((value[2:] for value in parameters if value.startswith("q=")), "1")
        weights[media_range] = float(given) if _WEIGHT.fullmatch(given) else 0.0
    json = max(_weight_of(name, weights) for name in ("application/json", PROBLEM_JSON))
    return weights.get("text/html", 0.0) > json


def _weight_of(media_type: str, weights: dict[str, float]) -> float:
    """By the range that fits the type best."""
    ranges = (media_type, media_type.partition("/")[0] + "/*", "*/*")
    return next((weights[one] for one in ranges if one in weights), 0.0)


def _way_on(path: str) -> Link | None:
    """From the error page of a path to where one begins again. From an app's request back to the app: none here."""
    if path.startswith(_AUTHORIZE):
        return None
    if path in _AGAIN:
        return Link(href=ours(path), label="Begin again")
    return Link(href=ours(_ACCOUNT), label="Open your account")


def broke_off(error: BaseException, incoming: Incoming) -> None:
    """Notes what ended a stream before its end, where nothing can be answered any more."""
    log.error("stream_failed", request_id=incoming.request_id, error=type(error).__name__, where=_where(error))


def _known(error: BaseException) -> ServiceError | None:
    match error:
        case ServiceError():
            return error
        case LedgerError():
            return refused(error)
        case HTTPException():
            return _of_litestar(error)
        case _:
            return None


def _of_litestar(error: HTTPException) -> ServiceError:
    match error.status_code:
        case 404:
            return NotFound("there is nothing at this path", fix="/schema/openapi.json lists all paths")
        case 405:
            allowed = (error.headers or {}).get("allow", "")
            return MethodNotAllowed(f"use {allowed}", headers={"Allow": allowed})
        case status if 400 <= status < 500:
            return InvalidRequest("the request is malformed", private=str(error.detail))
        case _:
            return InternalError("the service failed to answer this request", private=str(error.detail))


def _problem(error: ServiceError, request_id: str) -> Response:
    body = Problem(
        type=f"urn:token-ledger:problem:{error.code}",
        title=error.title,
        status=error.status,
        detail=error.detail,
        code=error.code,
        request_id=request_id,
        fix=error.fix or UNSET,
        scope=error.scope if isinstance(error, InsufficientScope) else UNSET,
        ledger_seq=error.ledger_seq if isinstance(error, NotYetApplied) else UNSET,
    )
    return Response(error.status, msgspec.json.encode(body), (*_HEADERS, *_own_headers(error)))


def _oauth(error: ServiceError) -> Response:
    return Response(error.status, msgspec.json.encode(oauth_error(error)), (*NO_STORE, *_own_headers(error)))


def _own_headers(error: ServiceError) -> Headers:
    headers = dict(error.headers)
    if isinstance(error, InsufficientScope):
        headers.setdefault(
            "WWW-Authenticate",
            f'Bearer realm="token-ledger", error="insufficient_scope", scope="{error.scope}"',
        )
    return tuple((name.lower(), value) for name, value in headers.items())


def _where(error: BaseException) -> list[str]:
    """Files and lines of the innermost calls."""
    frames: list[str] = []
    trace: Any = error.__traceback__
    while trace is not None:
        frames.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    return frames[-12:]
