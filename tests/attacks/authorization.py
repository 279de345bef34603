"""Authorization endpoint, pushed requests, consent: where an answer may go, and who may be asked what."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from tests.attacks.table import Stage, attack, basic, variants
from tests.people import CALLBACK, Browser, Flow, Page, flow, person, push, pushed, redeem, web_app
from tests.running import FORM, oauth_error, problem, until

AUTHORIZE = "/oauth2/authorize"
EVIL = "https://evil.example/callback"


def is_page(page: Page, status: int = 400) -> None:
    """A page for the person: it leads nowhere by itself, and to no place but ours by hand."""
    assert page.left is None
    assert page.status == status, page.text
    assert "location" not in page.headers
    assert page.refresh is None
    assert not page.forms, page.text
    assert all(link.startswith("/") for link in page.links), page.links


def is_redirect(stage: Stage, made: Flow, page: Page, error: str) -> dict[str, str]:
    """At the client's own redirect URI: the error, `state`, `iss` and no code. RFC 6749 §4.1.2.1, RFC 9207 §2."""
    assert page.left is not None, page.text
    assert page.left.startswith(CALLBACK)
    answer = page.answer
    assert answer["error"] == error, answer
    assert answer["iss"] == stage.service.issuer
    assert answer.get("state") == made.parameters.get("state")
    assert answer.keys() <= {"error", "error_description", "state", "iss"}
    return answer


@attack("65", "RFC 6749 §4.1.2.1")
def unknown_client_is_a_page(stage: Stage) -> None:
    app = web_app(stage.service)
    for client_id in ("cli_" + "0" * 32, "unknown", "", app.client_id + " ", app.client_id.upper(), "\u0441li_x", "*"):
        is_page(Browser(stage.service).get(flow(stage.service, app, client_id=client_id).url))
    is_page(Browser(stage.service).get(flow(stage.service, app, client_id=None).url))


@attack("65", "P: a client that was disabled is known no more")
def disabled_client_is_a_page(stage: Stage) -> None:
    app = web_app(stage.service)
    stage.service.done("DELETE", f"/v1/clients/{app.client_id}")
    is_page(Browser(stage.service).get(flow(stage.service, app).url))


@attack("67", "RFC 9700 §2.1, §4.1.3")
def unregistered_redirect_uri_is_a_page(stage: Stage) -> None:
    app = web_app(stage.service)
    is_page(Browser(stage.service).get(flow(stage.service, app, redirect_uri=EVIL).url))
    is_page(Browser(stage.service).get(flow(stage.service, app, redirect_uri=None).url))
    is_page(Browser(stage.service).get(flow(stage.service, app, redirect_uri=EVIL, prompt="none").url))
    is_page(Browser(stage.service).get(flow(stage.service, app, redirect_uri=EVIL, response_type="token").url))


@variants(
    "68",
    "RFC 9700 §2.1: exact string matching",
    trailing_slash=CALLBACK + "/",
    path_case="https://app.example/Callback",
    host_case="https://APP.example/callback",
    query=CALLBACK + "?x",
    empty_query=CALLBACK + "?",
    fragment=CALLBACK + "#f",
    good_user="https://app.example@evil.example/callback",
    user="https://user@app.example/callback",
    subdomain="https://app.example.evil.example/callback",
    scheme_relative="//app.example/callback",
    encoded_dots="https://app.example/%2e%2e/callback",
    dots="https://app.example/a/../callback",
    semicolon="https://app.example/..;/callback",
    port="https://app.example:443/callback",
    http="http://app.example/callback",
    trailing_dot="https://app.example./callback",
    idn="https://\u0430pp.example/callback",
    tab_in_scheme="ht\ttps://app.example/callback",
    newline=CALLBACK + "\n",
    backslash="https://app.example\\@evil.example/callback",
    null=CALLBACK + "\0",
    javascript="javascript:alert(1)//" + CALLBACK,
    data="data:text/html," + CALLBACK,
)
def near_miss_of_a_redirect_uri_is_a_page(stage: Stage, uri: str) -> None:
    is_page(Browser(stage.service).get(flow(stage.service, web_app(stage.service), redirect_uri=uri).url))


@attack("68", "RFC 8252 §7.3 (positive control): the port of a loopback address")
def any_port_of_a_loopback_address_is_taken(stage: Stage) -> None:
    app = web_app(stage.service, redirect_uris=["http://127.0.0.1/cb"])
    here = Browser(stage.service).get(flow(stage.service, app, redirect_uri="http://127.0.0.1:49152/cb").url)
    assert here.status == 200
    is_page(Browser(stage.service).get(flow(stage.service, app, redirect_uri="http://127.0.0.1:49152/other").url))
    is_page(Browser(stage.service).get(flow(stage.service, app, redirect_uri="http://127.0.0.2:49152/cb").url))


@variants(
    "70",
    "RFC 6749 §3.1.2, RFC 7591 §3.2.2",
    fragment=CALLBACK + "#f",
    javascript="javascript:alert(1)",
    data="data:text/html,x",
    file="file:///etc/passwd",
    http="http://app.example/callback",
    relative="/callback",
    user="https://a@app.example/",
    wildcard="https://*.app.example/",
)
def redirect_uri_that_is_none_cannot_be_registered(stage: Stage, uri: str) -> None:
    wanted = {"client_name": "x", "grant_types": ["authorization_code"], "redirect_uris": [uri]}
    problem(stage.service.call("POST", "/v1/clients", json=wanted), 400, "invalid_redirect_uri")


@variants("71", "RFC 6749 §3.1", client_id="client_id", redirect_uri="redirect_uri")
def client_or_redirect_uri_given_twice_is_a_page(stage: Stage, name: str) -> None:
    made = flow(stage.service, web_app(stage.service))
    for value in (made.parameters[name], EVIL):
        is_page(Browser(stage.service).get(f"{made.url}&{urlencode({name: value})}"))


@variants(
    "73",
    "RFC 6749 §3.1.1, RFC 9700 §2.1.2",
    missing=({"response_type": None}, "invalid_request"),
    empty=({"response_type": ""}, "invalid_request"),
    token=({"response_type": "token"}, "unsupported_response_type"),
    code_token=({"response_type": "code token"}, "unsupported_response_type"),
    id_token=({"response_type": "id_token"}, "unsupported_response_type"),
    garbage=({"response_type": "x" * 500}, "unsupported_response_type"),
    in_a_query=({"response_type": "code id_token", "response_mode": "query"}, "invalid_request"),
    no_nonce=({"response_type": "code id_token", "nonce": None}, "invalid_request"),
)
def other_response_types_are_refused(stage: Stage, case: tuple[dict[str, str | None], str]) -> None:
    refused_at_the_client(stage, *case)


def refused_at_the_client(stage: Stage, changes: dict[str, str | None], error: str) -> None:
    """Who is signed in, or may not be asked, is led back; who is not sees first where."""
    made = flow(stage.service, web_app(stage.service), **changes)
    somebody = Browser(stage.service)
    page = somebody.get(made.url)
    assert page.left is None, "an open redirector"
    assert page.status == 400
    assert any(link.startswith(CALLBACK) for link in page.links), page.links
    is_redirect(stage, made, signed_in(stage).get(made.url), error)


def signed_in(stage: Stage) -> Browser:
    """A browser in which somebody is signed in, the same for all that change nothing."""
    known = stage.__dict__.setdefault("_signed_in", None)
    if known is None:
        known = stage.__dict__["_signed_in"] = new_signed_in(stage)[0]
    return known


def new_signed_in(stage: Stage, **fields: Any) -> tuple[Browser, dict[str, Any]]:
    """A browser and the person in it, who has consented to something."""
    browser, somebody = Browser(stage.service), person(stage.service, **fields)
    page = browser.visit(flow(stage.service, web_app(stage.service)).url, somebody)
    assert "code" in page.answer
    return browser, somebody


@variants(
    "74",
    "RFC 7636 §4.4.1, RFC 9700 §2.1.1",
    nothing={"code_challenge": None, "code_challenge_method": None},
    empty={"code_challenge": ""},
    no_challenge={"code_challenge": None},
    no_method={"code_challenge_method": None},
    plain={"code_challenge_method": "plain"},
    case={"code_challenge_method": "s256"},
)
def request_without_pkce_is_refused(stage: Stage, changes: dict[str, str | None]) -> None:
    refused_at_the_client(stage, changes, "invalid_request")


@variants(
    "76",
    "RFC 7636 §4.2",
    short="A" * 42,
    long="A" * 44,
    padded="A" * 43 + "=",
    padding="A" * 42 + "=",
    plus="+" + "A" * 42,
    null="A" * 42 + "\0",
    umlaut="A" * 42 + "\u00e4",
    no_hash="A" * 42 + "B",
)
def challenge_that_is_none_is_refused(stage: Stage, challenge: str) -> None:
    refused_at_the_client(stage, {"code_challenge": challenge}, "invalid_request")


@variants(
    "22",
    "RFC 6749 App. A.4",
    null="openid\0",
    newline="openid\r\nX: y",
    tab="openid\t",
    quote='openid "',
    backslash="openid \\",
    unknown="openid no:such:scope",
    of_the_ledger="openid ledger:admin",
)
def scope_that_is_none_is_refused(stage: Stage, scope: str) -> None:
    refused_at_the_client(stage, {"scope": scope}, "invalid_scope")


@variants(
    "77",
    "RFC 8707 §2",
    unknown="https://evil.example",
    fragment="https://api.example#f",
    relative="/api",
    garbage="\0",
)
def resource_of_others_is_refused(stage: Stage, resource: str) -> None:
    refused_at_the_client(stage, {"resource": resource}, "invalid_target")


@attack("77", "P, RFC 9700 §2.1.1: a constant challenge is answered; abuse rules look for it")
def constant_challenge_is_answered(stage: Stage) -> None:
    browser, _ = new_signed_in(stage)
    app = web_app(stage.service)
    first = flow(stage.service, app)
    codes = {browser.visit(first.url, {}).answer["code"] for _ in range(5)}
    assert len(codes) == 5


@variants(
    "79",
    "RFC 6749 §4.1.2: the exact value",
    long="s" * 2_000,
    line_break="a\r\nSet-Cookie: evil=1\r\n\r\n<script>",
    null="\0",
    percent="%0d%0a&code=stolen#x?y",
    quotes="\"'<>\\",
    unicode="\u00e4\u20ac\U0001f600",
    json='{"a": [1, "b"]}',
)
def state_comes_back_as_it_was(stage: Stage, state: str) -> None:
    browser = signed_in(stage)
    for changes in ({}, {"response_type": "code id_token"}, {"response_type": "token"}):
        made = flow(stage.service, web_app(stage.service), state=state, **changes)
        page = browser.visit(made.url, {})
        assert page.answer["state"] == state
        raw = stage.service.raw_call("GET", made.url.removeprefix(stage.service.issuer))
        assert "evil" not in str(raw.headers)


@variants("80", "RFC 9207 §2", code="code", hybrid="code id_token")
def issuer_is_named_in_every_answer(stage: Stage, response_type: str) -> None:
    browser = signed_in(stage)
    for mode in (None, "fragment", "form_post"):
        made = flow(stage.service, web_app(stage.service), response_type=response_type, response_mode=mode)
        answer = browser.visit(made.url, {}).answer
        assert answer["iss"] == stage.service.issuer
        assert answer["state"] == made.state
        wanted = {"code", "state", "iss"} | ({"id_token"} if response_type != "code" else set())
        assert answer.keys() == wanted


@attack("82", "RFC 9700 §4.11.2: nobody who is not signed in is led on at once")
def error_for_a_stranger_is_a_page_with_a_button(stage: Stage) -> None:
    for changes in ({"response_type": "token"}, {"scope": "no:such"}, {"response_type": "token", "state": "x"}):
        page = Browser(stage.service).get(flow(stage.service, web_app(stage.service), **changes).url)
        assert (page.left, page.refresh, page.status) == (None, None, 400)


@attack("82", "OpenID Connect Core §3.1.2.6 (positive control): prompt=none is answered at the client")
def silent_request_of_a_stranger_is_answered(stage: Stage) -> None:
    made = flow(stage.service, web_app(stage.service), prompt="none")
    is_redirect(stage, made, Browser(stage.service).get(made.url), "login_required")
    browser, _ = new_signed_in(stage)
    is_redirect(stage, made, browser.get(made.url), "consent_required")


@variants(
    "83",
    "OpenID Connect Core §3.1.2.6, RFC 9101 §6",
    request=({"request": "eyJhbGciOiJub25lIn0.e30."}, "request_not_supported"),
    https=({"request_uri": "https://evil.example/r"}, "request_uri_not_supported"),
    file=({"request_uri": "file:///etc/passwd"}, "request_uri_not_supported"),
    internal=({"request_uri": "http://169.254.169.254/"}, "request_uri_not_supported"),
    other_urn=({"request_uri": "urn:example:x"}, "request_uri_not_supported"),
    registration=({"registration": "{}"}, "registration_not_supported"),
)
def request_objects_are_refused_and_nothing_is_fetched(stage: Stage, case: tuple[dict[str, str], str]) -> None:
    refused_at_the_client(stage, {**case[0]}, case[1])


@attack("85", "RFC 9126 §2.2, §4: bound to the client")
def pushed_request_of_another_client_is_a_page(stage: Stage) -> None:
    app, other = web_app(stage.service), web_app(stage.service)
    url = pushed(stage.service, flow(stage.service, app))
    for browser in (Browser(stage.service), signed_in(stage)):
        is_page(browser.get(url.replace(app.client_id, other.client_id)))
    assert Browser(stage.service).get(url).status == 200


@attack("86", "RFC 9126 §7.3: one-time use")
def pushed_request_that_was_answered_is_a_page(stage: Stage) -> None:
    browser, somebody = new_signed_in(stage)
    app = web_app(stage.service)
    made = flow(stage.service, app)
    for _ in range(2):  # the second time nobody is asked for consent
        url = pushed(stage.service, made)
        code = browser.visit(url, somebody).answer["code"]
        is_page(Browser(stage.service).get(url))
        assert redeem(stage.service, made, code).status_code == 200
        is_page(browser.get(url))


@variants(
    "86",
    "RFC 9126 §4",
    unknown="urn:ietf:params:oauth:request_uri:" + "A" * 43,
    empty="urn:ietf:params:oauth:request_uri:",
    wildcard="urn:ietf:params:oauth:request_uri:*",
    dots="urn:ietf:params:oauth:request_uri:a.b.>",
    long="urn:ietf:params:oauth:request_uri:" + "A" * 5_000,
    unicode="urn:ietf:params:oauth:request_uri:\u00e4\0",
)
def request_uri_that_was_never_pushed_is_a_page(stage: Stage, request_uri: str) -> None:
    app = web_app(stage.service)
    query = urlencode({"client_id": app.client_id, "request_uri": request_uri})
    is_page(Browser(stage.service).get(f"{AUTHORIZE}?{query}"))


@attack("86", "RFC 9126 §2.2: expires_in")
def pushed_request_that_expired_is_a_page(stage: Stage) -> None:
    hasty = stage.hasty
    url = pushed(hasty.service, flow(hasty.service, web_app(hasty.service)))
    assert Browser(hasty.service).get(url).status == 200
    until(lambda: Browser(hasty.service).get(url).status == 400, seconds=15, what="it expires")
    is_page(Browser(hasty.service).get(url))


@attack("86", "P (positive control): who has begun in time may take longer to type a password")
def pushed_request_taken_up_in_time_is_answered_later(stage: Stage) -> None:
    hasty = stage.hasty
    url = pushed(hasty.service, flow(hasty.service, web_app(hasty.service)))
    browser, somebody = Browser(hasty.service), person(hasty.service)
    page = browser.get(url)
    until(lambda: Browser(hasty.service).get(url).status == 400, seconds=15, what="it expires")
    page = browser.consent(browser.sign_in(page, somebody))
    assert "code" in page.answer
    is_page(Browser(hasty.service).get(url))


@attack("86", "P, RFC 9126 §7.4: what says that it was begun in time is one browser's")
def pushed_request_cannot_be_handed_on_to_another_browser(stage: Stage) -> None:
    hasty = stage.hasty
    made = flow(hasty.service, web_app(hasty.service))
    url = pushed(hasty.service, made)
    attacker, victim = Browser(hasty.service), Browser(hasty.service)
    own = person(hasty.service)
    assert "password" in victim.get(flow(hasty.service, made.app).url).form.fields
    waiting = attacker.sign_in(attacker.get(url), own)
    assert ("decision", "allow") in waiting.form.buttons
    begun = waiting.url
    assert "begun=" in begun
    until(lambda: Browser(hasty.service).get(url).status == 400, seconds=15, what="it expires")
    is_page(victim.get(begun))
    assert "code" in attacker.consent(waiting).answer


@attack("86", "P, RFC 9126 §4: the query beside a request_uri changes nothing")
def parameters_beside_a_pushed_request_are_ignored(stage: Stage) -> None:
    made = flow(stage.service, web_app(stage.service))
    url = pushed(stage.service, made)
    browser = signed_in(stage)
    more = {"redirect_uri": EVIL, "response_type": "token", "state": "evil", "scope": "ledger:admin"}
    answer = browser.visit(f"{url}&{urlencode(more)}", {}).answer
    assert answer["state"] == made.state
    assert redeem(stage.service, made, answer["code"]).status_code == 200


@attack("88", "RFC 9126 §2.1: MUST NOT")
def request_uri_within_a_pushed_request_is_refused(stage: Stage) -> None:
    made = flow(stage.service, web_app(stage.service))
    first = push(stage.service, made).json()["request_uri"]
    for request_uri in (first, "https://evil.example/r"):
        oauth_error(push(stage.service, made, request_uri=request_uri), 400, "invalid_request")


@variants(
    "88",
    "RFC 9126 §2.3: what the authorization endpoint refuses",
    redirect_uri=({"redirect_uri": EVIL}, "invalid_request"),
    response_type=({"response_type": "token"}, "unsupported_response_type"),
    challenge=({"code_challenge": "x"}, "invalid_request"),
    scope=({"scope": "no:such"}, "invalid_scope"),
    resource=({"resource": "https://evil.example"}, "invalid_target"),
    request=({"request": "eyJ"}, "request_not_supported"),
    prompt=({"prompt": "none login"}, "invalid_request"),
)
def pushed_request_is_checked_when_it_is_pushed(stage: Stage, case: tuple[dict[str, str], str]) -> None:
    oauth_error(push(stage.service, flow(stage.service, web_app(stage.service)), **case[0]), 400, case[1])


@attack("89", "RFC 9126 §2.3: 405")
def pushing_by_get_is_refused(stage: Stage) -> None:
    made = flow(stage.service, web_app(stage.service))
    answer = stage.service.http.get("/oauth2/par", params=made.parameters)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST, OPTIONS"


@attack("89", "RFC 9126 §2.3: 413")
def pushing_too_much_is_refused(stage: Stage) -> None:
    app = web_app(stage.service)
    body = urlencode({**flow(stage.service, app).parameters, "foo": "a" * 200_000})
    assert stage.post("/oauth2/par", body, basic(*app.basic)).status_code in {400, 413}
    long = flow(stage.service, app, state="s" * 4_000, nonce="n" * 500, login_hint="l" * 5_000)
    oauth_error(push(stage.service, long), 400, "invalid_request")


@attack("89", "RFC 9126 §2.3: 429")
def pushing_too_often_is_refused(stage: Stage) -> None:
    hasty = stage.hasty
    app, other = web_app(hasty.service), web_app(hasty.service)

    def refused() -> bool:
        answer = push(hasty.service, flow(hasty.service, app))
        assert answer.status_code in {201, 429}, answer.text
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) > 0
        return answer.status_code == 429

    until(refused, seconds=20, what="too many")
    assert push(hasty.service, flow(hasty.service, other)).status_code == 201


@variants("89", "RFC 9126 §2: as at the token endpoint", nobody=None, wrong=("", "wrong"))
def pushing_without_the_clients_secret_is_refused(stage: Stage, auth: tuple[str, str] | None) -> None:
    app = web_app(stage.service)
    given = (app.client_id, auth[1]) if auth else None
    answer = stage.service.form("/oauth2/par", given, **flow(stage.service, app).parameters)
    oauth_error(answer, 401, "invalid_client")


@attack("89", "RFC 9126 §2: the client that authenticates is the one that asks")
def pushing_for_another_client_is_refused(stage: Stage) -> None:
    app, other = web_app(stage.service), web_app(stage.service)
    answer = stage.service.form("/oauth2/par", app.basic, **flow(stage.service, other).parameters)
    assert answer.status_code in {400, 401}


@attack("89", "RFC 9126 §5: a client may be held to pushing")
def client_that_pushes_cannot_be_asked_for_otherwise(stage: Stage) -> None:
    app = web_app(stage.service, require_pushed_authorization_requests=True)
    made = flow(stage.service, app)
    browser = signed_in(stage)
    is_redirect(stage, made, browser.get(made.url), "invalid_request")
    assert "code" in browser.visit(pushed(stage.service, made), {}).answer


@attack("91", "RFC 9700 §4.16")
def no_page_can_be_framed(stage: Stage) -> None:
    browser = signed_in(stage)
    pages = [
        Browser(stage.service).get(flow(stage.service, web_app(stage.service)).url),
        browser.get(flow(stage.service, web_app(stage.service)).url),
        browser.get(flow(stage.service, web_app(stage.service), redirect_uri=EVIL).url),
    ]
    for page in pages:
        assert page.headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in page.headers["content-security-policy"]


def at_consent(stage: Stage) -> tuple[Browser, dict[str, Any], Flow, Page]:
    """A person before the consent page of an app that is new to them."""
    browser, somebody = new_signed_in(stage)
    made = flow(stage.service, web_app(stage.service))
    return browser, somebody, made, browser.get(made.url)


@variants(
    "92",
    "RFC 6749 §10.12, RFC 9700 §4.7",
    no_token=({"csrf": ""}, {}),
    wrong_token=({"csrf": "A" * 43}, {}),
    evil_origin=({}, {"Origin": "https://evil.example"}),
    cross_site=({}, {"Sec-Fetch-Site": "cross-site"}),
    same_site=({}, {"Sec-Fetch-Site": "same-site"}),
    no_cookie=({}, {"Cookie": ""}),
)
def consent_from_elsewhere_is_refused(stage: Stage, case: tuple[dict[str, str], dict[str, str]]) -> None:
    fields, headers = case
    browser, _, made, page = at_consent(stage)
    sent = {**page.form.fields, "decision": "allow", **fields}
    given = {"Origin": stage.service.issuer, "Sec-Fetch-Site": "same-origin", **headers}
    answer = browser.http.post(page.form.action, data=sent, headers=given)
    assert answer.status_code == 403
    assert "code=" not in answer.text + str(answer.headers)
    # Nothing was consented to.
    is_redirect(stage, made, browser.get(f"{made.url}&prompt=none"), "consent_required")


@attack("92", "RFC 9700 §4.7: the form of one browser is no other's, nor that of one session another's")
def consent_form_of_another_browser_is_refused(stage: Stage) -> None:
    _, _, _, page = at_consent(stage)
    thief, _ = new_signed_in(stage)
    sent = thief.submit(page, decision="allow")
    assert (sent.status, sent.left) == (403, None)


@attack("92", "P: what one page carries is no other's")
def sealed_request_of_another_page_is_refused(stage: Stage) -> None:
    browser, _, made, page = at_consent(stage)
    first = browser.get(flow(stage.service, made.app, prompt="login").url)
    for sealed in (first.form.fields["request"], "A" * 100, "", "\u00e4", page.form.fields["request"][:-1]):
        sent = browser.submit(page, decision="allow", request=sealed)
        assert (sent.status, sent.left) == (400, None)
    wrong = browser.submit(page, decision="perhaps")
    assert (wrong.status, wrong.left) == (400, None)
    assert "code" in browser.consent(page).answer


@attack("94", "RFC 9700 §4.7: the pending request is bound to the browser")
def sign_in_form_of_another_browser_is_refused(stage: Stage) -> None:
    attacker, victim = Browser(stage.service), Browser(stage.service)
    page = attacker.get(flow(stage.service, web_app(stage.service)).url)
    sent = victim.sign_in(page, person(stage.service))
    assert (sent.status, sent.left) == (403, None)


@attack("94", "RFC 9700 §4.7 (session fixation): a new session id at every sign-in")
def session_id_is_new_after_every_sign_in(stage: Stage) -> None:
    browser, somebody = new_signed_in(stage)
    before = dict(browser.http.cookies)
    made = flow(stage.service, web_app(stage.service), prompt="login")
    assert "code" in browser.visit(made.url, somebody).answer
    after = dict(browser.http.cookies)
    changed = {name for name in after if after[name] != before.get(name)}
    assert len(changed) == 1
    old = Browser(stage.service)
    for name, value in before.items():
        old.http.cookies.set(name, value)
    assert "password" in old.get(flow(stage.service, web_app(stage.service)).url).form.fields


@attack("94", "RFC 6265bis §4.1.3.2, RFC 9700 §4.7: no neighbour can set these cookies, and no script read them")
def cookies_of_an_https_issuer_are_locked(stage: Stage) -> None:
    """The issuer has a path, which a proxy takes away: whatever leads to ourselves has it."""
    odd = stage.odd.service
    browser, somebody = Browser(odd), person(odd)
    made = flow(odd, web_app(odd))
    page = browser.get(made.url)
    assert page.form.action == "/tenant/one/sign-in"
    seen = [browser.http.get(AUTHORIZE, params=made.parameters).headers]
    sent = browser.http.post(
        "/sign-in",
        data={**page.form.fields, "username": somebody["username"], "password": somebody["password"]},
        headers={"Origin": "https://auth.example", "Sec-Fetch-Site": "same-origin"},
    )
    assert sent.status_code == 200
    seen.append(sent.headers)
    cookies = [one for headers in [*seen, page.headers] for one in headers.get_list("set-cookie")]
    assert len({one.partition("=")[0] for one in cookies}) == 3
    for cookie in cookies:
        name, *attributes = cookie.split("; ")
        assert name.startswith("__Host-")
        assert {"HttpOnly", "Secure", "SameSite=Lax", "Path=/"} <= set(attributes)
        assert not any(one.startswith("Domain") for one in attributes)
    answer = browser.visit(made.url, somebody).answer
    assert answer["iss"] == odd.issuer
    assert redeem(odd, made, answer["code"]).status_code == 200
    posted = browser.http.post(AUTHORIZE, data=made.parameters)
    assert posted.headers["location"].startswith("/tenant/one/oauth2/authorize?")


@attack("95", "RFC 6749 §10.14")
def name_of_a_client_is_text(stage: Stage) -> None:
    name = "<img src=x onerror=alert(1)>\"'&{{7*7}}"
    app = web_app(stage.service, client_name=name)
    browser = signed_in(stage)
    for page in (Browser(stage.service).get(flow(stage.service, app).url), browser.get(flow(stage.service, app).url)):
        assert page.status == 200
        assert "<img" not in page.text
        assert "&lt;img src=x onerror" in page.text
        assert "49" not in page.title
        assert "unsafe" not in page.headers["content-security-policy"]
    hinted = Browser(stage.service).get(flow(stage.service, app, login_hint='"><script>alert(1)</script>').url)
    assert "<script" not in hinted.text


@attack("97", "RFC 9700 §2.6: MUST NOT support CORS")
def authorization_endpoint_has_no_cors(stage: Stage) -> None:
    made = flow(stage.service, web_app(stage.service))
    asks = {"Origin": "https://app.example", "Access-Control-Request-Method": "GET"}
    preflight = stage.service.http.options(AUTHORIZE, headers=asks)
    answer = stage.service.http.get(made.url, headers={"Origin": "https://app.example"})
    for one in (preflight, answer):
        assert not [name for name in one.headers if name.startswith("access-control-")]
    assert preflight.status_code == 405


@attack("98", "RFC 6749 §4.1.2.1")
def refusal_is_told_to_the_client(stage: Stage) -> None:
    browser, somebody, made, page = at_consent(stage)
    is_redirect(stage, made, browser.consent(page, allow=False), "access_denied")
    # It is not remembered as consent, and the person may change their mind.
    assert "code" in browser.visit(made.url, somebody).answer


@attack("98", "P: an authorization code is no token")
def code_is_no_token(stage: Stage) -> None:
    browser, somebody = new_signed_in(stage)
    code = browser.visit(flow(stage.service, web_app(stage.service)).url, somebody).answer["code"]
    assert stage.service.code(code) in {"unknown", "malformed"}
    assert stage.introspected(code) == {"active": False}


@variants(
    "65",
    "P: bad input never reaches a 500",
    not_utf8="client_id=%ff",
    bare_percent="client_id=%",
    many="&".join(f"a{number}=b" for number in range(500)),
    long="a=" + "b" * 9_000,
    nothing="",
    equals="=&=&=",
)
def unreadable_request_is_a_page(stage: Stage, query: str) -> None:
    is_page(Browser(stage.service).get(f"{AUTHORIZE}?{query}"))
    answer = stage.service.raw_call("POST", AUTHORIZE, [("Content-Type", FORM)], query.encode())
    assert answer.status_code in {303, 400}
    if answer.status_code == 303:
        assert answer.headers["location"].startswith(AUTHORIZE)


@attack("65", "P: other methods")
def other_methods_are_refused(stage: Stage) -> None:
    for path, allowed in ((AUTHORIZE, {"GET", "POST"}), ("/oauth2/consent", {"POST"})):
        answer = stage.service.http.put(path, content=b"x")
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == allowed
