"""Templates into answers: what every page is sent with, and the files that pages use.

The policy allows nothing but our own style sheet and images: no script, no frame, no other origin.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from service.errors import ServiceError
from service.incoming import Incoming
from service.outgoing import Headers, Response
from service.pages.values import Continue, Error, Hidden, Link, Onward
from service.runtime import Runtime

Template = Literal[
    "sign_in",
    "consent",
    "sign_out",
    "signed_out",
    "error",
    "continue",
    "onward",
    "account",
    "issued",
    "shown_before",
]
Cookie = tuple[str, str]

NAME = "Token Ledger"
ANYWHERE = "*"

_HERE = Path(__file__).parent
_HOST = re.compile(r"[a-z0-9.-]+(?::[0-9]{1,5})?")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_HEADERS: Headers = (
    ("content-type", "text/html; charset=utf-8"),
    ("cache-control", "no-store"),
    ("pragma", "no-cache"),
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    # Not `no-referrer`: under that a browser sends `Origin: null` with the forms of these very pages.
    ("referrer-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
)
_POLICY = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; frame-ancestors 'none'"
_FILES = {"pages.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml"}


def _file(name: str, cached: str) -> Response:
    headers: Headers = (
        ("content-type", _FILES[name]),
        ("cache-control", cached),
        ("x-content-type-options", "nosniff"),
        ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
        ("cross-origin-resource-policy", "same-origin"),
    )
    return Response(200, (_HERE / "assets" / name).read_bytes(), headers)


def _read(name: str) -> tuple[str, Response]:
    # What is at this path never changes: another content has another path.
    answer = _file(name, "public, max-age=31536000, immutable")
    return f"/assets/{hashlib.sha256(answer.body).hexdigest()[:20]}{Path(name).suffix}", answer


_assets = {name: _read(name) for name in _FILES}
_FAVICON = "/favicon.ico"  # where browsers look without being told, as for what is no page
_environment = Environment(
    loader=FileSystemLoader(_HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)
_environment.globals |= {
    "product": NAME,
    "base": "",
    "site": "",
    "assets": {name: path for name, (path, _) in _assets.items()},
}


def begin(issuer: str) -> None:
    """Says where the pages are: the issuer's path stands before all of ours, and its host is shown to people."""
    parts = urlsplit(issuer)
    _environment.globals |= {"base": parts.path.rstrip("/"), "site": parts.netloc}


def page(
    template: Template,
    values: Mapping[str, object],
    *,
    status: int = 200,
    redirects_to: str | None = None,
    cookies: tuple[Cookie, ...] = (),
) -> Response:
    """A page. `values` is the class of `service/pages/values.py` that is named as the template.

    `redirects_to`: a URI that the answer to the page's form may redirect to, since Chromium holds those to
    `form-action` too, each hop of them; ANYWHERE leaves that out.
    """
    html = _environment.get_template(f"{template}.html").render(values)
    policy = ("content-security-policy", _POLICY + _form_action(redirects_to))
    return Response(status, html.encode(errors="replace"), (*_HEADERS, policy, *cookies))


def onward(href: str, *, cookies: tuple[Cookie, ...] = ()) -> Response:
    """Leads a browser to `href` from the answer to a form, as a redirect would.

    A redirect would be held to the form's `form-action`, and so would all that the app redirects to in turn, which
    nobody here can know.
    """
    return page("onward", Onward(href=href), cookies=cookies)


def ours(path: str) -> str:
    """The path of a page of ours as browsers need it: with the issuer's own before it."""
    return f"{_environment.globals['base']}{path}"


def see_other(path: str, *, cookies: tuple[Cookie, ...] = ()) -> Response:
    """303 to a page of ours, whose path has not the issuer's own in it yet."""
    location = ("location", ours(path))
    return Response(303, b"", (("cache-control", "no-store"), location, *cookies))


def form_post(href: str, app: str, hidden: Hidden, *, cookies: tuple[Cookie, ...] = ()) -> Response:
    """`response_mode=form_post` without script: a button. Source: OAuth 2.0 Form Post Response Mode §2."""
    values = Continue(
        title="Go on",
        what=f"You are done here. Go on to {app}.",
        label="Continue",
        method="post",
        href=href,
        hidden=hidden,
    )
    return page("continue", values, redirects_to=ANYWHERE, cookies=cookies)


def error_page(error: ServiceError, request_id: str, *, link: Link | None = None) -> Response:
    """What a refusal looks like to a person."""
    what, fix = _sentence(error.detail), _sentence(error.fix or "go back and try again")
    values = Error(title=error.title, what=what, fix=fix, request_id=request_id, onward=link)
    own = tuple((name.lower(), value) for name, value in error.headers.items())
    answer = page("error", values, status=error.status)
    return Response(answer.status, answer.body, (*answer.headers, *own))


def destination_of(redirect_uri: str, *, native: bool) -> str:
    """Where a redirect URI leads, in words that a person can check: never its path or query.

    `native`: it is of an app on the person's device, which cannot prove who it is (`is_of_native_app`).
    """
    parts = urlsplit(redirect_uri)
    if parts.scheme not in {"http", "https"}:
        return f"the app on your device that opens {parts.scheme}: links"
    if native:
        return f"a program on this device ({parts.netloc})"
    return f"{parts.scheme}://{parts.netloc}"


def assets() -> dict[str, Callable[[Runtime, Incoming], Awaitable[Response]]]:
    """The doors of the files, by path."""
    icon = _file("icon.svg", "public, max-age=86400")
    return {path: _door(answer) for path, answer in (*_assets.values(), (_FAVICON, icon))}


def _door(answer: Response) -> Callable[[Runtime, Incoming], Awaitable[Response]]:
    async def serve(_: Runtime, __: Incoming) -> Response:
        return answer

    return serve


def _form_action(redirects_to: str | None) -> str:
    if redirects_to == ANYWHERE:
        return ""
    source = "" if redirects_to is None else f" {_source(redirects_to)}"
    return f"; form-action 'self'{source}"


def _source(uri: str) -> str:
    """The narrowest CSP source that a URI fits; for what its grammar cannot say, the scheme. Source: CSP 3 §2.3.1."""
    parts = urlsplit(uri)
    scheme = parts.scheme.lower()
    if not _SCHEME.fullmatch(scheme):
        return "'none'"
    host = parts.netloc.lower()
    return f"{scheme}://{host}" if scheme in {"http", "https"} and _HOST.fullmatch(host) else f"{scheme}:"


def _sentence(text: str) -> str:
    """Errors are written as parts of sentences."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".") if text else ""
