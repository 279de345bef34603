"""What a browser holds and sends: cookies, CSRF tokens, and the request that waits behind the sign-in page.

Before somebody has signed in nothing is kept here: all of it is in the browser, sealed or bound to its own random id.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
import time
from collections.abc import Callable
from typing import Literal, TypeVar
from urllib.parse import urlsplit

import msgspec

from service.errors import Forbidden, InvalidRequest
from service.incoming import Incoming, parse_form
from service.keys import seal, unseal
from service.oauth.forms import FORM, Form
from service.runtime import Runtime

T = TypeVar("T")

Cookie = tuple[str, str]  # a header
Carried = Literal["sign-in", "consent", "sign-out", "begun"]  # what something is sealed for: it opens as nothing else

REQUEST_SECONDS_MAX = 3_600
CSRF = "csrf"
_BROWSER = re.compile(r"[A-Za-z0-9_-]{43}")
_VALUE_CHARS_MAX = 32_768  # a sealed request is longer than what a parameter may have elsewhere
_DEFAULT_PORTS = {"http": 80, "https": 443}
_BEGIN_AGAIN = "begin again, from the app if one sent you here"


# Cookies. Source: RFC 6265, and RFC 6265bis §4.1.3.2 for the prefix.


def cookie_name(runtime: Runtime, what: str) -> str:
    """With https no other host, such as a neighbour under the same domain, can set a cookie of this name.

    Cookies know no ports, so that ledgers that share a host need names of their own.
    """
    prefix = "__Host-" if _is_secure(runtime) else ""
    return f"{prefix}tl_{what}_{runtime.master.deployment}"


def _is_secure(runtime: Runtime) -> bool:
    return runtime.settings.issuer.startswith("https:")


def set_cookie(runtime: Runtime, what: str, value: str, *, seconds: int | None = None) -> Cookie:
    """For nobody but us, and not with what pages of other sites post. None: until the browser is closed."""
    secure = "; Secure" if _is_secure(runtime) else ""
    lasts = "" if seconds is None else f"; Max-Age={seconds}"
    return "set-cookie", f"{cookie_name(runtime, what)}={value}; Path=/; HttpOnly; SameSite=Lax{secure}{lasts}"


def drop_cookie(runtime: Runtime, what: str) -> Cookie:
    return set_cookie(runtime, what, "", seconds=0)


def read_cookie(runtime: Runtime, incoming: Incoming, what: str) -> str | None:
    """None too if there are several with different values: somebody else has set one."""
    name = cookie_name(runtime, what)
    found = set()
    for header in incoming.header_values("cookie"):
        for pair in header.split(";"):
            key, _, value = pair.strip().partition("=")
            if key == name:
                found.add(value)
    return found.pop() if len(found) == 1 else None


# The browser itself


def browser_of(runtime: Runtime, incoming: Incoming) -> str | None:
    """The random id that it was given with its first page."""
    value = read_cookie(runtime, incoming, "browser")
    return value if value is not None and _BROWSER.fullmatch(value) else None


def new_browser(runtime: Runtime) -> tuple[str, Cookie]:
    """An id, and the cookie that tells it."""
    browser = secrets.token_urlsafe(32)
    return browser, set_cookie(runtime, "browser", browser)


def known_browser(runtime: Runtime, incoming: Incoming) -> tuple[str, tuple[Cookie, ...]]:
    """The browser's id, and what is to be set if it had none."""
    browser = browser_of(runtime, incoming)
    if browser is not None:
        return browser, ()
    browser, cookie = new_browser(runtime)
    return browser, (cookie,)


# Forms. Source: RFC 9700 §4.7, RFC 6749 §10.12.


def csrf_token(runtime: Runtime, browser: str, purpose: str) -> str:
    """What the form for this purpose must carry. Where somebody is signed in, let `purpose` name their session."""
    return _base64(hmac.digest(runtime.master.forms, f"{browser} {purpose}".encode(), "sha256"))


async def read_page_form(runtime: Runtime, incoming: Incoming) -> Form:
    """The fields of a form of ours. Raises: InvalidRequest and its kin."""
    content_type = (incoming.header("content-type") or "").partition(";")[0].strip().lower()
    if content_type != FORM:
        raise InvalidRequest("the form was not sent as forms are", fix=_BEGIN_AGAIN)
    settings = runtime.settings
    body = await incoming.body(settings.request_body_bytes_max, settings.request_seconds_max)
    return Form(parse_form(body, value_chars_max=_VALUE_CHARS_MAX))


def check_csrf(runtime: Runtime, incoming: Incoming, form: Form, purpose: str) -> str:
    """The browser that sent the form, which is one of ours that this very browser was shown.

    Raises: Forbidden.
    """
    browser = browser_of(runtime, incoming)
    problem = _foreign(runtime, incoming)
    if problem is not None or browser is None:
        raise _forbidden(problem or "no browser id")
    token = form.get(CSRF) or ""
    if not hmac.compare_digest(token.encode(), csrf_token(runtime, browser, purpose).encode()):
        raise _forbidden("wrong token")
    return browser


def _forbidden(private: str) -> Forbidden:
    return Forbidden(
        "the form did not come from a page that this browser was shown here, or your browser keeps no cookies",
        fix="allow cookies for this site, and " + _BEGIN_AGAIN,
        private=private,
    )


def _foreign(runtime: Runtime, incoming: Incoming) -> str | None:
    """What the browser itself says of where a form comes from. Source: Fetch Metadata §2.4, RFC 6454 §7."""
    site = incoming.header("sec-fetch-site")
    if site is not None and site not in {"same-origin", "none"}:
        return f"Sec-Fetch-Site {site[:20]}"
    origins = incoming.header_values("origin")
    # Some browsers say `null` where they say nothing of referrers; those tell the site as well.
    if not origins or (origins == ["null"] and site is not None):
        return None
    return None if origins == [origin_of(runtime.settings.issuer)] else "Origin"


def origin_of(url: str) -> str:
    """Scheme, host and port as browsers write them. Source: RFC 6454 §6.2."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port in (None, _DEFAULT_PORTS.get(parts.scheme)) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


# The request that waits until somebody has signed in or consented


def seal_request(runtime: Runtime, browser: str, carried: str, purpose: Carried) -> str:
    """For a hidden field: only this browser can send it back, unchanged, in such a form, within the hour."""
    text = f"{int(time.time())} {carried}".encode()
    return _base64(seal(runtime.master.requests, text, f"{purpose} {browser}"))


def open_request(runtime: Runtime, browser: str, sealed: str, purpose: Carried) -> str:
    """What was sealed. Raises: InvalidRequest if it was for another browser or form, or too long ago."""
    try:
        raw = base64.urlsafe_b64decode(sealed.encode() + b"=" * (-len(sealed) % 4))
    except (binascii.Error, ValueError):
        raw = b""
    opened = unseal(runtime.master.requests, raw, f"{purpose} {browser}")
    if opened is None:
        raise _not_as_shown()
    at, _, carried = opened.decode().partition(" ")
    if time.time() - int(at) > REQUEST_SECONDS_MAX:
        raise InvalidRequest("the page was open for too long", fix=_BEGIN_AGAIN)
    return carried


def open_carried(runtime: Runtime, browser: str, sealed: str, purpose: Carried, decode: Callable[[str], T]) -> T:
    """The same, decoded. Raises: InvalidRequest, too for what another version of this service has sealed."""
    try:
        return decode(open_request(runtime, browser, sealed, purpose))
    except msgspec.MsgspecError:
        raise _not_as_shown() from None


def _not_as_shown() -> InvalidRequest:
    return InvalidRequest("what the page carried is not as it was shown in this browser", fix=_BEGIN_AGAIN)


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
