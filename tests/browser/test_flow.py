"""A person in a real browser: signs in, allows or refuses, is sent back, signs out, and looks after their account."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from playwright.sync_api import Locator, Page, expect

from service.outgoing import Response
from tests.browser.conftest import NewPage
from tests.browser.serving import serving
from tests.people import Flow, flow, person, redeem, web_app
from tests.running import App, Service, unique

HTML = (("content-type", "text/html; charset=utf-8"),)
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
CALLBACK = "/callback"

expect.set_options(timeout=60_000)


@dataclass
class Client:
    """An app on loopback. `told`: what it was told at its redirect URI, in order.

    It sends whoever comes back on to a page of another origin of its own, as apps do.
    """

    told: list[dict[str, str]] = field(default_factory=list)
    origin: str = ""

    @property
    def redirect_uri(self) -> str:
        return self.origin + CALLBACK

    def answer(self, method: str, path: str, body: str) -> Response:
        parts = urlsplit(path)
        if parts.path == "/home":
            return Response(200, b"<!doctype html><title>The app</title><h1>Welcome back</h1>", HTML)
        if parts.path != CALLBACK:
            return Response(404, b"", HTML)
        self.told.append(dict(parse_qsl(body if method == "POST" else parts.query)))
        return Response(303, b"", (("location", self.origin.replace("127.0.0.1", "localhost") + "/home"),))


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client()
    with serving(made.answer) as origin:
        made.origin = origin
        yield made


@pytest.fixture(scope="module")
def scopes(service: Service) -> tuple[str, str]:
    first = service.scope(unique("orders").replace("-", ":"), description="See your orders")
    second = service.scope(unique("orders").replace("-", ":"), description="Change your orders")
    return first, second


@pytest.fixture
def ada(service: Service, scopes: tuple[str, str]) -> dict[str, Any]:
    return person(service, scope=" ".join(scopes))


@pytest.fixture
def app(service: Service, client: Client, scopes: tuple[str, str]) -> App:
    return web_app(
        service,
        client_name="Order Desk",
        redirect_uris=[client.redirect_uri],
        scope=f"openid profile offline_access {' '.join(scopes)}",
    )


@pytest.fixture
def asked(service: Service, app: App, client: Client, scopes: tuple[str, str]) -> Flow:
    return flow(service, app, redirect_uri=client.redirect_uri, scope=f"openid {scopes[0]}")


def heading(page: Page, text: str) -> None:
    expect(page.get_by_role("heading", level=1)).to_have_text(text)


def sign_in(page: Page, who: dict[str, Any]) -> None:
    heading(page, "Sign in")
    page.get_by_label("Username").fill(who["username"])
    page.get_by_label("Password").fill(who["password"])
    page.get_by_role("button", name="Sign in").click()


def allow(page: Page) -> None:
    heading(page, "Allow access?")
    page.get_by_role("button", name="Allow").click()


def returned(page: Page) -> None:
    """To the app, and by it to its own page."""
    heading(page, "Welcome back")
    assert urlsplit(page.url).hostname == "localhost"


def allowed(page: Page, who: dict[str, Any], asked: Flow, client: Client, service: Service) -> str:
    """Signs in and allows; the access token that the app has then."""
    page.goto(asked.url)
    sign_in(page, who)
    allow(page)
    returned(page)
    token: str = redeem(service, asked, client.told.pop()["code"]).json()["access_token"]
    return token


def test_a_person_signs_in_and_allows_and_the_app_gets_tokens(
    *,
    service: Service,
    new_page: NewPage,
    ada: dict[str, Any],
    asked: Flow,
    client: Client,
    scopes: tuple[str, str],
) -> None:
    page = new_page()
    page.goto(asked.url)
    expect(page.get_by_text("to continue to Order Desk")).to_be_visible()
    assert page.title() == "Sign in \u2013 Token Ledger"
    sign_in(page, ada)
    expect(page.get_by_text("See your orders")).to_be_visible()
    expect(page.get_by_text(scopes[0])).to_be_visible()
    expect(page.get_by_text(ada["username"])).to_be_visible()
    allow(page)
    returned(page)
    told = client.told.pop()
    assert told["state"] == asked.state
    assert told["iss"] == service.issuer
    answer = redeem(service, asked, told["code"])
    assert answer.status_code == 200, answer.text
    assert service.code(answer.json()["access_token"]) == "valid"

    page.goto(asked.url)  # remembered, and still signed in
    returned(page)
    assert "code" in client.told.pop()


def test_who_allowed_before_only_signs_in(new_page: NewPage, ada: dict[str, Any], asked: Flow, client: Client) -> None:
    page = new_page()
    page.goto(asked.url)
    sign_in(page, ada)
    allow(page)
    returned(page)
    page = new_page()
    page.goto(asked.url)
    sign_in(page, ada)
    returned(page)
    assert [sorted(told) for told in client.told] == [["code", "iss", "state"]] * 2


def test_a_person_refuses_and_the_app_is_told(
    new_page: NewPage, ada: dict[str, Any], asked: Flow, client: Client
) -> None:
    """attacks 98."""
    page = new_page()
    page.goto(asked.url)
    sign_in(page, ada)
    heading(page, "Allow access?")
    page.get_by_role("button", name="Deny").click()
    returned(page)
    told = client.told.pop()
    assert told["error"] == "access_denied"
    assert "code" not in told


def test_a_wrong_password_is_said_at_the_form_and_the_name_stays(
    new_page: NewPage, ada: dict[str, Any], asked: Flow
) -> None:
    page = new_page()
    page.goto(asked.url)
    sign_in(page, ada | {"password": "no such password"})
    expect(page.get_by_role("alert")).to_be_visible()
    assert page.title() == "Error: Sign in \u2013 Token Ledger"
    expect(page.get_by_label("Username")).to_have_value(ada["username"])
    expect(page.get_by_label("Password")).to_have_value("")
    expect(page.get_by_label("Password")).to_be_focused()
    expect(page.get_by_text("to continue to Order Desk")).to_be_visible()
    sign_in(page, ada)
    heading(page, "Allow access?")


def test_form_post_waits_behind_a_button(
    service: Service, new_page: NewPage, ada: dict[str, Any], app: App, client: Client
) -> None:
    made = flow(service, app, redirect_uri=client.redirect_uri, response_mode="form_post")
    page = new_page()
    page.goto(made.url)
    sign_in(page, ada)
    allow(page)
    heading(page, "Go on")
    expect(page.get_by_role("button", name="Continue")).to_be_focused()
    page.keyboard.press("Enter")
    returned(page)
    assert redeem(service, made, client.told.pop()["code"]).status_code == 200


def tab_to(page: Page, wanted: Locator) -> None:
    """By the Tab key alone."""
    for _ in range(40):
        if wanted.evaluate("element => element === document.activeElement"):
            outline = wanted.evaluate("element => getComputedStyle(element).outlineStyle")
            assert outline == "solid"  # the focus is seen
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{wanted} cannot be reached with the Tab key")


def test_the_keyboard_is_enough(
    service: Service, new_page: NewPage, ada: dict[str, Any], asked: Flow, client: Client
) -> None:
    page = new_page()
    page.goto(asked.url)
    expect(page.get_by_label("Username")).to_be_focused()
    page.keyboard.type(ada["username"])
    page.keyboard.press("Tab")
    page.keyboard.type(ada["password"])
    page.keyboard.press("Enter")
    heading(page, "Allow access?")
    tab_to(page, page.get_by_role("button", name="Allow"))
    page.keyboard.press("Enter")
    returned(page)
    assert "code" in client.told.pop()

    page.goto(f"{service.url}/account")
    tab_to(page, page.get_by_label("Name", exact=True))
    page.keyboard.type("By keyboard")
    tab_to(page, page.get_by_label("See your orders"))
    page.keyboard.press("Space")
    tab_to(page, page.get_by_role("button", name="Issue token"))
    page.keyboard.press("Enter")
    heading(page, "Your new token")
    expect(page.get_by_label("Token", exact=True)).to_be_focused()
    tab_to(page, page.get_by_role("link", name="I have copied it"))
    page.keyboard.press("Enter")
    tab_to(page, page.locator("summary", has_text="Revoke the token By keyboard"))
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_role("button", name="Revoke token"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("The token was revoked. Whatever used it has stopped working.")


def test_a_person_issues_and_revokes_a_token_of_their_own(
    service: Service, new_page: NewPage, ada: dict[str, Any], scopes: tuple[str, str]
) -> None:
    page = new_page()
    page.goto(f"{service.url}/account")
    sign_in(page, ada)
    heading(page, "Your account")
    page.get_by_label("Name", exact=True).fill("Nightly backup")
    page.get_by_role("button", name="Issue token").click()
    expect(page.get_by_role("alert")).to_have_text("Choose at least one thing that the token may do.")
    expect(page.get_by_label("Name", exact=True)).to_have_value("Nightly backup")
    page.get_by_label("See your orders").check()
    page.get_by_label("Ends after").select_option("7")
    page.get_by_role("button", name="Issue token").click()
    heading(page, "Your new token")
    token = page.get_by_label("Token", exact=True).input_value()
    verdict = service.validate(token)
    assert (verdict["code"], verdict["scope"]) == ("valid", scopes[0])

    page.get_by_role("link", name="I have copied it").click()
    entry = page.get_by_role("listitem").filter(has_text="Nightly backup")
    expect(entry).to_contain_text(scopes[0])
    assert token not in page.content()
    entry.get_by_text("Revoke").first.click()
    entry.get_by_role("button", name="Revoke token").click()
    expect(page.get_by_role("status")).to_contain_text("The token was revoked")
    expect(page.get_by_text("Nightly backup")).to_have_count(0)
    assert service.code(token) == "revoked"


def test_a_person_withdraws_what_they_allowed(
    service: Service, new_page: NewPage, ada: dict[str, Any], asked: Flow, client: Client
) -> None:
    page = new_page()
    token = allowed(page, ada, asked, client, service)
    page.goto(f"{service.url}/account")
    entry = page.get_by_role("listitem").filter(has_text="Order Desk")
    entry.get_by_text("Withdraw").first.click()
    entry.get_by_role("button", name="Withdraw access").click()
    expect(page.get_by_role("status")).to_have_text("The app has no access any more.")
    expect(page.get_by_text("No app has access to your account.")).to_be_visible()
    assert service.code(token) == "revoked"
    page.goto(asked.url)
    heading(page, "Allow access?")


def test_a_person_signs_out(
    service: Service, new_page: NewPage, ada: dict[str, Any], asked: Flow, client: Client
) -> None:
    page = new_page()
    token = allowed(page, ada, asked, client, service)
    page.goto(f"{service.url}/account")
    page.get_by_role("link", name="Sign out").click()
    heading(page, "Sign out?")
    page.get_by_role("button", name="Sign out").click()
    heading(page, "You are signed out")
    assert service.code(token) == "revoked"
    page.get_by_role("link", name="Sign in again").click()
    heading(page, "Sign in")


def test_signing_out_everywhere_ends_every_browser(service: Service, new_page: NewPage, ada: dict[str, Any]) -> None:
    pages = [new_page(), new_page()]
    for page in pages:
        page.goto(f"{service.url}/account")
        sign_in(page, ada)
        heading(page, "Your account")
    first, second = pages
    first.reload()
    expect(first.get_by_role("heading", name="Chrome on Linux")).to_have_count(2)
    first.locator("summary", has_text="Sign out everywhere").click()
    first.get_by_role("button", name="Sign out everywhere").click()
    heading(first, "You are signed out")
    second.reload()
    heading(second, "Sign in")


def test_a_hostile_name_is_only_text(service: Service, new_page: NewPage, ada: dict[str, Any], client: Client) -> None:
    """attacks 95."""
    app = web_app(service, client_name=HOSTILE, redirect_uris=[client.redirect_uri])
    page = new_page()
    page.goto(flow(service, app, redirect_uri=client.redirect_uri).url)
    expect(page.get_by_text(HOSTILE)).to_be_visible()
    sign_in(page, ada)
    heading(page, "Allow access?")
    expect(page.get_by_text(HOSTILE)).to_be_visible()
    assert page.locator("img, script").count() == 0
    assert page.title() == "Allow access? \u2013 Token Ledger"
    allow(page)
    returned(page)
    page.goto(f"{service.url}/account")
    expect(page.get_by_role("heading", name=HOSTILE)).to_be_visible()
    assert page.locator("img, script").count() == 0


@pytest.mark.parametrize("path", ["", "/account"])
def test_no_other_page_can_frame_ours(
    chromium: Any, service: Service, ada: dict[str, Any], asked: Flow, path: str
) -> None:
    """attacks 91: not even for somebody who is signed in."""
    url = f"{service.url}{path}" if path else asked.url
    html = f'<!doctype html><title>Win</title><iframe src="{url.replace("&", "&amp;")}"></iframe>'.encode()
    context = chromium.new_context()
    try:
        page = context.new_page()
        page.goto(f"{service.url}/account")
        sign_in(page, ada)
        heading(page, "Your account")
        with serving(lambda *_: Response(200, html, HTML)) as origin:
            with page.expect_console_message(
                lambda message: "frame-ancestors 'none'" in message.text or "X-Frame-Options" in message.text,
                timeout=60_000,
            ):
                page.goto(origin)
            assert not any(frame.url.startswith(service.url) for frame in page.frames)
    finally:
        context.close()


@pytest.mark.parametrize("size", [(1280, 720), (1280, 800), (390, 844)], ids=["720", "800", "phone"])
@pytest.mark.parametrize("many", [False, True], ids=["some", "many"])
def test_consent_can_be_answered_without_scrolling(
    *, service: Service, new_page: NewPage, client: Client, size: tuple[int, int], many: bool
) -> None:
    """By a program of the device, of which most is said. On a wide screen some scopes leave room for themselves."""
    scopes = [service.scope(description=f"Do the thing number {number}") for number in range(20 if many else 2)]
    app = web_app(
        service,
        client_name="Order History",
        redirect_uris=["http://127.0.0.1/callback"],
        scope=f"openid profile {' '.join(scopes)}",
        token_endpoint_auth_method="none",
    )
    wanted = flow(service, app, redirect_uri=client.redirect_uri, scope=f"openid profile {' '.join(scopes)}")
    width, height = size
    page = new_page(viewport={"width": width, "height": height})
    page.goto(wanted.url)
    sign_in(page, person(service, scope=" ".join(scopes), display_name="Ada Lovelace"))
    heading(page, "Allow access?")
    for name in ("Allow", "Deny"):
        assert bottom(page.get_by_role("button", name=name)) <= height
    if width == 1280 and not many:
        button = page.get_by_role("button", name="Allow").bounding_box()
        assert button is not None
        assert bottom(page.get_by_text("Do the thing number 1")) < button["y"]
    page.keyboard.press("End")
    expect(page.get_by_role("link", name="Sign out")).to_be_in_viewport()
    allow(page)
    returned(page)


def bottom(element: Locator) -> float:
    box = element.bounding_box()
    assert box is not None
    return box["y"] + box["height"]


def test_a_double_click_on_allow_and_on_issue_leaves_one_grant_and_one_token(
    *, service: Service, new_page: NewPage, ada: dict[str, Any], asked: Flow, client: Client
) -> None:
    page = new_page()
    page.goto(asked.url)
    sign_in(page, ada)
    heading(page, "Allow access?")
    page.get_by_role("button", name="Allow").dblclick(no_wait_after=True)
    returned(page)
    codes = {told["code"] for told in client.told}
    assert len(codes) == 1
    assert redeem(service, asked, codes.pop()).status_code == 200
    page.goto(f"{service.url}/account")
    page.get_by_label("Name", exact=True).fill("Nightly backup")
    page.get_by_label("See your orders").check()
    page.get_by_role("button", name="Issue token").dblclick(no_wait_after=True)
    heading(page, "Your new token")
    assert service.code(page.get_by_label("Token", exact=True).input_value()) == "valid"
    assert len(list(service.items("/v1/tokens", subject=ada["user_id"], kind="pat"))) == 1
    page.reload()
    heading(page, "This token was sent already")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_their_width(
    *,
    service: Service,
    new_page: NewPage,
    ada: dict[str, Any],
    app: App,
    client: Client,
    scopes: tuple[str, str],
    shots: Path,
    scheme: str,
    width: int,
) -> None:
    """And are drawn, for whoever wants to see them."""
    page = new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)

    def shoot(name: str) -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        page.screenshot(path=str(shots / f"{name}-{scheme}-{width}.png"), full_page=True)

    made = flow(service, app, redirect_uri=client.redirect_uri, scope=f"openid offline_access {' '.join(scopes)}")
    page.goto(made.url)
    heading(page, "Sign in")
    shoot("sign-in")
    sign_in(page, ada | {"password": "no such password"})
    expect(page.get_by_role("alert")).to_be_visible()
    shoot("sign-in-again")
    sign_in(page, ada)
    heading(page, "Allow access?")
    shoot("consent")
    allow(page)
    returned(page)
    page.goto(f"{service.url}/account")
    page.get_by_label("Name", exact=True).fill("Nightly backup")
    page.get_by_label("See your orders").check()
    page.get_by_role("button", name="Issue token").click()
    heading(page, "Your new token")
    shoot("new-token")
    page.get_by_role("link", name="I have copied it").click()
    heading(page, "Your account")
    shoot("account")
    page.goto(f"{service.url}/oauth2/authorize?client_id=nobody")
    shoot("error")
