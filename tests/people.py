"""A person and their browser, without the browser: what one does with our pages over HTTP.

It keeps cookies, follows redirects, presses buttons and holds answers to what pages allow themselves (`form-action`).
It leaves the service for no other place: where it would go then is its `Page.left`.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit

import httpx

from tests.running import CANARY_PASSWORD, App, Service, unique

HOPS_MAX = 10
CALLBACK = "https://app.example/callback"
PROBLEMATIC = {"script", "iframe", "object", "embed", "base"}


@dataclass
class Form:
    """`fields`: what is sent whatever button is pressed. `buttons`: their names and values."""

    action: str
    method: str
    fields: dict[str, str] = field(default_factory=dict)
    buttons: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Page:
    """Where the browser is. `left`: the address outside of the service that it was sent to, where it did not go."""

    status: int
    url: str
    headers: httpx.Headers
    text: str
    forms: list[Form] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    title: str = ""
    refresh: str | None = None
    left: str | None = None

    @property
    def form(self) -> Form:
        """The only one."""
        assert len(self.forms) == 1, self.text
        return self.forms[0]

    @property
    def answer(self) -> dict[str, str]:
        """What the client is told: of where it was sent in the query or the fragment, or of the form that waits."""
        if self.left is None:
            assert self.form.action.startswith(("https://", "http://")), self.text
            return self.form.fields
        parts = urlsplit(self.left)
        pairs = parse_qsl(parts.fragment or parts.query, keep_blank_values=True, strict_parsing=True)
        assert len({name for name, _ in pairs}) == len(pairs), self.left
        return dict(pairs)


class _Reader(HTMLParser):
    def __init__(self, page: Page) -> None:
        super().__init__()
        self.page = page
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert tag not in PROBLEMATIC, tag
        assert not any(name.startswith("on") or name == "style" for name in given), given
        match tag:
            case "title":
                self._in_title = True
            case "form":
                self.page.forms.append(Form(given.get("action", ""), given.get("method", "get")))
            case "input" if self.page.forms:
                self.page.forms[-1].fields[given["name"]] = given.get("value", "")
            case "button" if self.page.forms and "name" in given:
                self.page.forms[-1].buttons.append((given["name"], given.get("value", "")))
            case "a":
                self.page.links.append(given.get("href", ""))
            case "meta" if given.get("http-equiv") == "refresh":
                self.page.refresh = given["content"].partition("url=")[2]

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.page.title += data

    def handle_endtag(self, tag: str) -> None:
        self._in_title = self._in_title and tag != "title"


class Browser:
    """One browser with its cookies."""

    def __init__(self, service: Service, *, source: str | None = None) -> None:
        self.service = service
        self.http = service.caller(source=source)
        # A proxy in front of the service would speak https: cookies that are meant for that go over http here.
        self.http.event_hooks = {"request": [self._send_cookies]}
        parts = urlsplit(service.issuer)
        self.origin = f"{parts.scheme}://{parts.netloc}"

    def _send_cookies(self, request: httpx.Request) -> None:
        if "cookie" not in request.headers and self.http.cookies:
            request.headers["cookie"] = "; ".join(f"{name}={value}" for name, value in self.http.cookies.items())

    def __del__(self) -> None:
        self.http.close()

    def get(self, url: str) -> Page:
        """A link is followed, or an address typed."""
        return self._follow("GET", url, {"Sec-Fetch-Site": "none"}, None, None)

    def submit(self, page: Page, form: Form | None = None, /, **fields: str) -> Page:
        """Presses the button of the page's form, with these fields filled in."""
        form = form or page.form
        headers = {"Sec-Fetch-Site": "same-origin", "Origin": self.origin}
        sent = {**form.fields, **fields}
        if form.method.lower() != "post":
            return self._follow("GET", f"{form.action}?{urlencode(sent)}", headers, None, page)
        return self._follow("POST", form.action, headers, sent, page)

    def sign_in(self, page: Page, person: Mapping[str, Any]) -> Page:
        """On the sign-in page."""
        assert "password" in page.form.fields, page.text
        return self.submit(page, username=person["username"], password=person["password"])

    def consent(self, page: Page, *, allow: bool = True) -> Page:
        """On the consent page."""
        assert ("decision", "allow") in page.form.buttons, page.text
        return self.submit(page, decision="allow" if allow else "deny")

    def visit(self, url: str, person: Mapping[str, Any], *, allow: bool = True) -> Page:
        """From a client's link to its answer, as a person does who agrees (or does not)."""
        page = self.get(url)
        if page.left is None and "password" in page.form.fields:
            page = self.sign_in(page, person)
        if page.left is None and page.form.buttons:
            page = self.consent(page, allow=allow)
        return page

    def _follow(
        self, method: str, url: str, headers: dict[str, str], data: dict[str, str] | None, before: Page | None
    ) -> Page:
        url = urljoin(before.url if before is not None else self.service.url, url)
        for _ in range(HOPS_MAX):
            if method == "POST":
                self._check_form_action(before, url)
            if not self._is_ours(url):
                return Page(0, url, httpx.Headers(), "", left=url)
            answer = self.http.request(method, self._here(url), headers=headers, data=data, follow_redirects=False)
            if answer.is_redirect:
                assert answer.status_code in {302, 303}, answer.status_code  # RFC 9700 §4.12
                url = urljoin(url, answer.headers["location"])
                if data is not None:
                    self._check_form_action(before, url)
                method, data = "GET", None
                continue
            page = self._read(url, answer)
            if page.refresh is None:
                return page
            url, before, method, data = urljoin(url, page.refresh), None, "GET", None
        raise AssertionError(f"more than {HOPS_MAX} redirects, at last to {url}")

    def _read(self, url: str, answer: httpx.Response) -> Page:
        page = Page(answer.status_code, url, answer.headers, answer.text)
        if answer.headers.get("content-type", "").startswith("text/html"):
            _Reader(page).feed(answer.text)
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["x-frame-options"] == "DENY"
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
            assert "script-src" not in answer.headers["content-security-policy"]
            assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        return page

    def _check_form_action(self, before: Page | None, url: str) -> None:
        """Chromium holds the redirects of what a form sends to the page's `form-action`, too."""
        policy = before.headers.get("content-security-policy", "") if before is not None else ""
        if "form-action" not in policy:
            return
        allowed = policy.partition("form-action ")[2].partition(";")[0].split()
        parts = urlsplit(url)
        sources = {f"{parts.scheme}://{parts.netloc}", f"{parts.scheme}:"}
        assert self._is_ours(url) or sources & set(allowed), f"{url} is not among {allowed}"

    def _is_ours(self, url: str) -> bool:
        return url.startswith((self.service.url + "/", self.service.issuer + "/"))

    def _here(self, url: str) -> str:
        """The service itself, in place of the proxy that would stand before it."""
        return self.service.url + url.removeprefix(self.service.issuer).removeprefix(self.service.url)


def person(service: Service, **fields: Any) -> dict[str, Any]:
    """Somebody who can sign in: `username`, `password`, `user_id`."""
    return service.user(password=unique(CANARY_PASSWORD), **fields)


def web_app(service: Service, **metadata: Any) -> App:
    """A client of people, with all that there is unless said otherwise."""
    wanted: dict[str, Any] = {
        "grant_types": ["authorization_code", "refresh_token"],
        "response_types": ["code", "code id_token"],
        "redirect_uris": [CALLBACK],
        "scope": "openid profile email offline_access",
    }
    return service.app(**(wanted | metadata))


@dataclass
class Flow:
    """One authorization: what the client made for it. `url` is where it sends the person."""

    app: App
    parameters: dict[str, str]
    verifier: str
    issuer: str

    @property
    def url(self) -> str:
        return f"{self.issuer}/oauth2/authorize?{urlencode(self.parameters)}"

    @property
    def state(self) -> str:
        return self.parameters["state"]


def flow(service: Service, app: App, **changes: str | None) -> Flow:
    """A good request, with these changes; None leaves a parameter out."""
    verifier = secrets.token_urlsafe(48)
    parameters: dict[str, str | None] = {
        "client_id": app.client_id,
        "redirect_uri": CALLBACK,
        "response_type": "code",
        "scope": "openid",
        "state": secrets.token_urlsafe(16),
        "nonce": secrets.token_urlsafe(16),
        "code_challenge": challenge_of(verifier),
        "code_challenge_method": "S256",
        **changes,
    }
    return Flow(app, {name: value for name, value in parameters.items() if value is not None}, verifier, service.issuer)


def challenge_of(verifier: str) -> str:
    """RFC 7636 §4.2."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")


def redeem(service: Service, made: Flow, code: str, **changes: str) -> httpx.Response:
    """RFC 6749 §4.1.3."""
    wanted = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": made.parameters["redirect_uri"],
        "code_verifier": made.verifier,
        **changes,
    }
    if not made.app.client_secret:
        return service.form("/oauth2/token", None, client_id=made.app.client_id, **wanted)
    return service.form("/oauth2/token", made.app.basic, **wanted)


def push(service: Service, made: Flow, **changes: str) -> httpx.Response:
    """RFC 9126 §2.1."""
    wanted = {**made.parameters, **changes}
    return service.form("/oauth2/par", made.app.basic if made.app.client_secret else None, **wanted)


def pushed(service: Service, made: Flow) -> str:
    """The link after the request was pushed."""
    answer = push(service, made)
    assert answer.status_code == 201, answer.text
    query = {"client_id": made.app.client_id, "request_uri": answer.json()["request_uri"]}
    return f"{service.issuer}/oauth2/authorize?{urlencode(query)}"
