"""Pages as they are answered: what they say, what strangers' texts can do in them, what they are sent with."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any, get_args, get_type_hints

import pytest
from jinja2 import meta

from service.errors import ForeignOrigin, TooManyRequests
from service.outgoing import Response
from service.pages import render, values
from service.pages.render import ANYWHERE, Template, destination_of, error_page, form_post, onward, page

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    '"><script>alert(1)</script>',
    "' autofocus onfocus='alert(1)",
    "</title><script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "\u202egnp.exe\u202c",
    "javascript:alert(1)",
)
HIDDEN = (("csrf", "a-token"), ("request", "a-sealed-request"))
LINK = {"href": "https://app.example/back?error=access_denied&state=1", "label": "Go back to the app"}
SOME_DAY = datetime(2026, 11, 22, 17, 40, tzinfo=UTC)
SCOPES = [{"name": "orders:read", "description": "See your orders", "keeps": False}]

VALUES: dict[str, dict[str, Any]] = {
    "sign_in": {
        "app": "Shop",
        "username": "ada",
        "problem": "The username or the password is wrong.",
        "hidden": HIDDEN,
    },
    "consent": {
        "app": "Shop",
        "person": "ada",
        "scopes": SCOPES,
        "destination": "https://app.example",
        "native": True,
        "known": False,
        "hidden": HIDDEN,
    },
    "sign_out": {"app": "Shop", "person": "ada", "action": "/sign-out", "hidden": HIDDEN},
    "signed_out": {"onward": LINK},
    "error": {"title": "Not found", "what": "It is gone.", "fix": "Go back.", "request_id": "r-1", "onward": LINK},
    "continue": {
        "title": "Go on",
        "what": "You are done here.",
        "label": "Continue",
        "method": "post",
        "href": "https://app.example/back",
        "hidden": HIDDEN,
    },
    "onward": {"href": "https://app.example/back?code=1&state=2"},
    "account": {
        "person": "ada",
        "said": "The token was revoked.",
        "problem": "Choose what the token may do.",
        "apps": [{"client_id": "cli_1", "name": "Shop", "scopes": SCOPES, "since": SOME_DAY, "active": SOME_DAY}],
        "tokens": [
            {
                "token_id": "tok_1",
                "name": "Backup of the orders",
                "scope": "orders:read orders:write",
                "issued_at": SOME_DAY,
                "expires_at": SOME_DAY,
            }
        ],
        "more": True,
        "offered": [*SCOPES, {"name": "orders:write", "description": "Change your orders", "keeps": False}],
        "lifetimes": [7, 30, 90, 365],
        "draft": {"name": "Backup", "ticked": {"orders:read"}, "days": 30},
        "sessions": [
            {
                "session_id": f"ses_{number}",
                "browser": "Firefox on Windows",
                "ip": "192.0.2.1",
                "since": SOME_DAY,
                "current": number == 1,
            }
            for number in (1, 2)
        ],
        "hidden": HIDDEN,
    },
    "issued": {
        "person": "ada",
        "token": "tl_pat_0123456789012345678901234567890123456789012345678",
        "label": "Backup",
        "scope": "orders:read",
        "expires_at": SOME_DAY,
    },
    "shown_before": {
        "person": "ada",
        "token_id": "tok_1",
        "label": "Backup",
        "expires_at": SOME_DAY,
        "works": True,
        "hidden": HIDDEN,
    },
}
STRICT = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; frame-ancestors 'none'"


class Reader(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def find(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [given for name, given in self.tags if name == tag and wanted.items() <= given.items()]


def soiled(value: Any, name: str, text: str) -> Any:
    """The same with `text` in place of every text that a stranger may have chosen."""
    match value:
        case str() if name == "scope":
            return " ".join(text.replace(" ", "-") for _ in value.split())
        case str() if name not in {"method", "href"}:
            return text
        case dict():
            return {key: soiled(one, key, text) for key, one in value.items()}
        case list() | tuple():
            return [soiled(one, name, text) for one in value]
        case _:
            return value


def read(answer: Response) -> Reader:
    return Reader(answer.body.decode())


def headers(answer: Response) -> dict[str, str]:
    return dict(answer.headers)


def test_every_template_has_its_class_and_uses_all_of_it() -> None:
    environment = render._environment
    assert environment.loader is not None
    assert set(get_args(Template)) == set(VALUES)
    shared = environment.globals.keys() | set(dir(environment.get_template("parts.html").module))
    for template, given in VALUES.items():
        source, _, _ = environment.loader.get_source(environment, f"{template}.html")
        free = meta.find_undeclared_variables(environment.parse(source)) - shared
        named = getattr(values, template.title().replace("_", ""))
        assert free == get_type_hints(named).keys() == given.keys(), template
        assert not given.keys() & environment.globals.keys(), template


@pytest.mark.parametrize("template", VALUES)
def test_a_page_is_one_document_with_title_heading_language_and_no_script(template: Template) -> None:
    found = read(page(template, VALUES[template]))
    assert found.find("html", lang="en")
    assert [len(found.find(tag)) for tag in ("title", "h1", "main")] == [1, 1, 1]
    assert not {"script", "style", "iframe", "object", "base"} & {tag for tag, _ in found.tags}
    given = [name for _, attributes in found.tags for name in attributes]
    assert not [name for name in given if name == "style" or name.startswith("on")]
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in found.tags:
        for name in ("aria-describedby", "aria-labelledby", "for"):
            assert set((attributes.get(name) or "").split()) <= set(ids)


@pytest.mark.parametrize("template", VALUES)
def test_a_page_is_sent_with_a_strict_policy_unframed_and_unkept(template: Template) -> None:
    """attacks 91: nobody frames the consent page, or any other."""
    sent = headers(page(template, VALUES[template]))
    assert sent["content-security-policy"] == f"{STRICT}; form-action 'self'"
    assert sent["x-frame-options"] == "DENY"
    assert sent["cache-control"] == "no-store"
    assert sent["x-content-type-options"] == "nosniff"
    assert sent["referrer-policy"] == "same-origin"
    assert sent["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("template", [name for name in VALUES if name != "onward"])
def test_a_strangers_text_stays_text(template: Template, text: str) -> None:
    """attacks 95."""
    clean = VALUES[template]
    known = read(page(template, clean))
    dirty = {name: soiled(value, name, text) for name, value in clean.items()}
    found = read(page(template, dirty))
    assert len(found.tags) == len(known.tags)
    # What was chosen before may be chosen no more, and the focus may be elsewhere; no other attribute comes or goes.
    free = {"autofocus", "checked", "selected"}
    assert [{*given} - free for _, given in found.tags] == [{*given} - free for _, given in known.tags]
    shown = "".join(found.texts) + "".join(str(attributes.get("value")) for _, attributes in found.tags)
    assert text in shown


def test_a_client_name_that_turns_the_line_around_is_isolated() -> None:
    body = page("consent", VALUES["consent"] | {"app": HOSTILE[5]}).body.decode()
    assert f"<bdi>{HOSTILE[5]}</bdi>" in body


@pytest.mark.parametrize(
    ("uri", "source"),
    [
        ("https://app.example/back?x=1", "https://app.example"),
        ("https://app.example:8443/back", "https://app.example:8443"),
        ("http://127.0.0.1:49152/back", "http://127.0.0.1:49152"),
        ("http://[::1]:49152/back", "http:"),  # the grammar of a host source has no such address
        ("com.example.app:/back", "com.example.app:"),
        ("https://app.example; script-src *", "https:"),
        ("https://app.example' 'unsafe-inline", "https:"),
        ("no uri", "'none'"),
        (ANYWHERE, None),
    ],
)
def test_a_form_may_lead_where_its_answer_redirects_and_nowhere_else(uri: str, source: str | None) -> None:
    policy = headers(page("consent", VALUES["consent"], redirects_to=uri))["content-security-policy"]
    assert policy == (STRICT if source is None else f"{STRICT}; form-action 'self' {source}")


def test_signing_in_names_who_asks_and_what_was_wrong() -> None:
    found = read(page("sign_in", VALUES["sign_in"]))
    assert "Shop" in found.texts
    username, password = found.find("input", name="username")[0], found.find("input", name="password")[0]
    assert username["autocomplete"] == "username"
    assert password["autocomplete"] == "current-password"
    assert "autofocus" in password  # since the username stands there already
    assert "autofocus" not in username
    assert [one["aria-describedby"] for one in (username, password)] == ["problem", "problem"]
    assert found.find("div", id="problem", role="alert")
    assert {(one["name"], one["value"]) for one in found.find("input", type="hidden")} == set(HIDDEN)


def test_a_password_is_never_shown_again() -> None:
    assert "value" not in read(page("sign_in", VALUES["sign_in"])).find("input", name="password")[0]


def test_consent_shows_descriptions_the_person_and_where_one_goes() -> None:
    found = read(page("consent", VALUES["consent"]))
    for text in ("Shop", "See your orders", "orders:read", "ada", "https://app.example"):
        assert text in found.texts
    assert [one["value"] for one in found.find("button", name="decision")] == ["allow", "deny"]
    assert found.find("a", href="/account")


def test_an_error_says_what_to_do_and_the_number_to_ask_by() -> None:
    answer = error_page(TooManyRequests("too many attempts", headers={"Retry-After": "7"}), "r-17")
    assert answer.status == 429
    assert headers(answer)["retry-after"] == "7"
    texts = read(answer).texts
    assert "Too many attempts." in texts
    assert "Wait as long as Retry-After says." in texts
    assert "r-17" in texts
    assert error_page(ForeignOrigin("x"), "r-1").status == 403


def test_form_post_is_a_button_and_goes_to_the_client_with_every_field() -> None:
    answer = form_post("https://app.example/back?a=1&b=2", "Shop", (("code", "c"), ("state", '"<s>')))
    found = read(answer)
    assert found.find("form", method="post", action="https://app.example/back?a=1&b=2")
    assert {(one["name"], one["value"]) for one in found.find("input", type="hidden")} == {
        ("code", "c"),
        ("state", '"<s>'),
    }
    assert "form-action" not in headers(answer)["content-security-policy"]


def test_leading_on_needs_no_click_and_no_redirect() -> None:
    found = read(onward('https://app.example/back?code=1&state="><script>'))
    refresh = found.find("meta", **{"http-equiv": "refresh"})[0]
    assert refresh["content"] == '0; url=https://app.example/back?code=1&state="><script>'
    assert "script" not in {tag for tag, _ in found.tags}


def test_cookies_are_sent_with_a_page() -> None:
    cookie = ("set-cookie", "browser=1; HttpOnly")
    assert cookie in page("signed_out", {"onward": None}, cookies=(cookie,)).headers


@pytest.mark.parametrize(
    ("uri", "native", "words"),
    [
        ("https://app.example:8443/back?secret=1", False, "https://app.example:8443"),
        ("http://127.0.0.1:4711/back", True, "a program on this device (127.0.0.1:4711)"),
        ("http://[::1]:4711/back", True, "a program on this device ([::1]:4711)"),
        ("http://localhost:4711/back", False, "http://localhost:4711"),
        ("com.example.app:/back", True, "the app on your device that opens com.example.app: links"),
    ],
    ids=["web", "native", "native, IPv6", "web, on loopback", "private scheme"],
)
def test_where_one_goes_back_to_is_said_in_words(uri: str, words: str, *, native: bool) -> None:
    assert destination_of(uri, native=native) == words


def test_files_are_kept_for_ever_under_names_of_their_content() -> None:
    for path, answer in render._assets.values():
        assert re.fullmatch(r"/assets/[0-9a-f]{20}\.(css|svg)", path)
        assert headers(answer)["cache-control"] == "public, max-age=31536000, immutable"
        assert b"http" not in answer.body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"url(" not in answer.body
    assert render.assets().keys() == {path for path, _ in render._assets.values()} | {"/favicon.ico"}


def test_an_issuer_with_a_path_has_its_pages_below_it() -> None:
    try:
        render.begin("https://example.org/auth")
        found = read(page("sign_in", VALUES["sign_in"]))
        assert found.find("form", action="/auth/sign-in")
        assert (found.find("link", rel="stylesheet")[0]["href"] or "").startswith("/auth/assets/")
        assert "example.org" in found.texts
    finally:
        render.begin("")


def colours(css: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", css))


def luminance(colour: str) -> float:
    """Source: WCAG 2.2, relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


CONTRASTS = [
    *[(text, ground, 4.5) for text in ("text", "muted", "accent", "accent-strong") for ground in ("card", "ground")],
    ("text", "quiet", 4.5),
    ("on-accent", "accent", 4.5),
    ("on-accent", "accent-strong", 4.5),
    ("danger", "danger-ground", 4.5),
    ("danger", "card", 4.5),
    ("note", "note-ground", 4.5),
    ("good", "good-ground", 4.5),
    ("edge", "card", 3.0),
    ("focus", "card", 3.0),
    ("focus", "ground", 3.0),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("front", "back", "least"), CONTRASTS, ids=str)
def test_contrast_is_enough(scheme: str, front: str, back: str, least: float) -> None:
    """WCAG 2.2 §1.4.3 and §1.4.11, level AA."""
    light, _, dark = render._assets["pages.css"][1].body.decode().partition("@media (prefers-color-scheme: dark)")
    known = colours(light) | (colours(dark) if scheme == "dark" else {})
    bright, dim = sorted((luminance(known[front]), luminance(known[back])), reverse=True)
    assert (bright + 0.05) / (dim + 0.05) >= least
