"""Redemption of authorization codes: RFC 6749 §4.1.3, RFC 7636 §4.6, RFC 9700 §2.1.1 and §4.5."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from service.rules.codes import RACE
from tests.attacks.table import Stage, attack, variants
from tests.codes import authorize, outlast_the_race, redeem, verifier, web_app
from tests.running import App, oauth_error

AT_ONCE = 50


class Code:
    """One that a person has just given a client."""

    def __init__(self, stage: Stage, app: App | None = None) -> None:
        self.stage = stage
        self.app = app or web_app(stage.service, stage.read)
        self.verifier = verifier()
        person = stage.service.user(scope=stage.read)["user_id"]
        self.text = authorize(stage.service, self.app, person, self.verifier)

    def presented(self, http: httpx.Client | None = None, /, **changes: str) -> httpx.Response:
        return redeem(self.stage.service, self.app, self.text, self.verifier, http, **changes)

    def is_refused(self, **changes: str) -> None:
        oauth_error(self.presented(**changes), 400, "invalid_grant")

    def tokens(self) -> dict[str, str]:
        answer = self.presented()
        assert answer.status_code == 200, answer.text
        body: dict[str, str] = answer.json()
        return body


@attack("100", "RFC 6749 §4.1.2: the tokens that the code gave are revoked")
def code_used_twice_revokes_what_it_gave(stage: Stage) -> None:
    code = Code(stage)
    tokens = code.tokens()
    token_id = stage.service.validate(tokens["access_token"])["token_id"]
    outlast_the_race()
    code.is_refused()
    for name in ("access_token", "refresh_token"):
        assert stage.introspected(tokens[name]) == {"active": False}
    types = [event["type"] for event in stage.service.history(token_id)]
    assert types[-2:] == ["code.replayed", "grant.revoked"]


@attack("100", "P: a double click signs nobody out")
def code_used_twice_at_once_is_refused_and_revokes_nothing(stage: Stage) -> None:
    """How soon it came is told by clocks: on a machine that is too busy it counts as late, and all of it ends."""
    code = Code(stage)
    began = time.monotonic()
    tokens = code.tokens()
    code.is_refused()
    soon = time.monotonic() - began < RACE.total_seconds() / 2
    assert stage.service.code(tokens["access_token"]) == "valid" or not soon


@attack("101", "RFC 6749 §4.1.2")
def code_presented_fifty_times_at_once_is_good_once(stage: Stage) -> None:
    code, barrier = Code(stage), threading.Barrier(AT_ONCE)

    def present(_: int) -> httpx.Response:
        with stage.service.caller(timeout_seconds=30) as http:
            http.get("/health/live")
            barrier.wait(30)
            return code.presented(http)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(present, range(AT_ONCE)))
    assert sorted(answer.status_code for answer in answers) == [200] + [400] * (AT_ONCE - 1)


@attack("103", "RFC 6749 §4.1.3; P: the code stays bound, and good")
def code_of_another_client_is_refused_and_stays_good(stage: Stage) -> None:
    code, other = Code(stage), web_app(stage.service, stage.read)
    oauth_error(redeem(stage.service, other, code.text, code.verifier), 400, "invalid_grant")
    tokens = code.tokens()
    outlast_the_race()
    oauth_error(redeem(stage.service, other, code.text, code.verifier), 400, "invalid_grant")
    assert stage.service.code(tokens["access_token"]) == "valid"


@variants(
    "104",
    "RFC 6749 §4.1.3",
    slash="https://shop.example/back/",
    case="https://shop.example/Back",
    query="https://shop.example/back?x",
    port="https://shop.example:443/back",
    other="https://evil.example/back",
)
def other_redirect_uri_is_refused(stage: Stage, redirect_uri: str) -> None:
    Code(stage).is_refused(redirect_uri=redirect_uri)


@attack("106", "RFC 7636 §4.6; P: the code ends at the third")
def wrong_verifier_is_refused_and_the_third_ends_the_code(stage: Stage) -> None:
    code = Code(stage)
    for _ in range(3):
        code.is_refused(code_verifier=verifier())
    code.is_refused()


@attack("107", "RFC 9700 §2.1.1, §4.8.2: every code has a challenge, and none is good without its verifier")
def code_without_a_verifier_is_refused(stage: Stage) -> None:
    code = Code(stage)
    oauth_error(code.presented(code_verifier=""), 400, "invalid_request")
    code.tokens()


@variants(
    "109",
    "RFC 7636 §4.1",
    short="a" * 42,
    long="a" * 129,
    plus="a" * 42 + "+",
    padding="a" * 43 + "=",
    blank="a" * 43 + " ",
    unicode="\u00e4" * 43,
)
def verifier_of_another_form_is_refused(stage: Stage, wrong: str) -> None:
    code = Code(stage)
    oauth_error(code.presented(code_verifier=wrong), 400, "invalid_request")
    code.tokens()


ALTERED: dict[str, Callable[[str], str]] = {
    "blank": lambda code: code + " ",
    "case": str.swapcase,
    "cut": lambda code: code[:-1],
    "longer": lambda code: code + "0",
    "no prefix": lambda code: code[6:],
    "line end": lambda code: code + "\n",
}


@variants("110", "P", **ALTERED)
def altered_code_is_refused(stage: Stage, alter: Callable[[str], str]) -> None:
    code = Code(stage)
    code.is_refused(code=alter(code.text))
    code.tokens()


@attack("112", "RFC 8725 §3.12, in spirit: each kind of token for its own purpose")
def code_is_no_refresh_token_and_no_token_is_a_code(stage: Stage) -> None:
    code = Code(stage)
    oauth_error(stage.service.refresh(code.app, code.text), 400, "invalid_grant")
    tokens = code.tokens()
    for other in (tokens["refresh_token"], tokens["access_token"], stage.service.pat()["token"]):
        code.is_refused(code=other)
    assert stage.service.code(tokens["access_token"]) == "valid"


@attack("112", "RFC 6750 §2.1")
def code_is_no_bearer_token(stage: Stage) -> None:
    code = Code(stage)
    assert stage.service.code(code.text) == "unknown"
    assert stage.introspected(code.text) == {"active": False}
    assert stage.service.call("GET", "/v1/clients", token=code.text).status_code == 401


@variants("112", "RFC 6749 §3.2: what is repeated", code="code", verifier="code_verifier", redirect="redirect_uri")
def repeated_parameter_is_refused(stage: Stage, name: str) -> None:
    code = Code(stage)
    form = [
        ("grant_type", "authorization_code"),
        ("code", code.text),
        ("redirect_uri", "https://shop.example/back"),
        ("code_verifier", code.verifier),
    ]
    repeated = [*form, *(pair for pair in form if pair[0] == name)]
    body = str(httpx.QueryParams(repeated))
    oauth_error(stage.token(code.app, body), 400, "invalid_request")
    code.tokens()


@attack("17", "RFC 6749 §5.2: unauthorized_client")
def client_without_the_grant_type_cannot_redeem(stage: Stage) -> None:
    code = Code(stage)
    oauth_error(redeem(stage.service, stage.app, code.text, code.verifier), 400, "unauthorized_client")
    code.tokens()


@attack("31", "RFC 6749 §4.1.3, §5.2: a confidential client authenticates, whatever the verifier")
def confidential_client_with_its_id_alone_cannot_redeem(stage: Stage) -> None:
    code = Code(stage)
    nameless = App(code.app.client_id, "", {})
    oauth_error(redeem(stage.service, nameless, code.text, code.verifier), 401, "invalid_client")
    code.tokens()


REGISTRATIONS = {
    "fragment": "https://shop.example/back#x",
    "javascript": "javascript:alert(1)",
    "data": "data:text/html,x",
    "http": "http://shop.example/back",
    "header": "https://shop.example;script-src/back",
}


@variants("70", "RFC 6749 §3.1.2; RFC 7591 §3.2.2", **REGISTRATIONS)
def redirect_uri_that_leads_astray_is_not_registered(stage: Stage, uri: str) -> None:
    for name in ("redirect_uris", "post_logout_redirect_uris"):
        wanted = {"grant_types": ["authorization_code"], "redirect_uris": ["https://shop.example/back"], name: [uri]}
        answer = stage.service.call("POST", "/v1/clients", json=wanted)
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_redirect_uri")
