"""Given a registered client, when it sends an authorization request, then it is understood so, or refused so."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st
from msgspec.structs import replace

from events.types import ClientMetadata
from projections.registry import Client
from service.rules.authorization import (
    NONCE_CHARS_MAX,
    STATE_CHARS_MAX,
    AuthorizationRequest,
    Parameters,
    Target,
    after_sign_in,
    is_of_native_app,
    location,
    matches,
    needs_sign_in,
    parse,
)
from service.rules.refusals import (
    InvalidParameter,
    PageError,
    RedirectError,
    RegistrationUnsupported,
    RequestUnsupported,
    RequestUriUnsupported,
    ResponseTypeNotAllowed,
    ResponseTypeUnsupported,
    ScopeNotAllowed,
    TargetNotAllowed,
    UnknownClient,
    UnreadableRequest,
    UnregisteredRedirectUri,
)
from tests.making import START, after, cli

ISSUER = "https://issuer.example"
CALLBACK = "https://app.example/callback"
CHALLENGE = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"  # RFC 7636 App. B
HELD = frozenset({"openid", "email", "offline_access", "orders:read"})

METADATA = ClientMetadata(
    client_name="An application",
    grant_types=("authorization_code", "refresh_token"),
    response_types=("code", "code id_token"),
    redirect_uris=(CALLBACK, "https://app.example/other?tenant=1"),
    scope=" ".join(sorted(HELD)),
    token_endpoint_auth_method="client_secret_basic",
    access_token_format="jwt",
    access_token_ttl_seconds=3600,
    refresh_token_idle_ttl_seconds=3600,
    refresh_token_max_ttl_seconds=3600,
    audience=("https://api.example", "https://other.example"),
    may_introspect=False,
)
CLIENT = Client(cli(1), METADATA, (), START, 1)
GOOD = {
    "client_id": CLIENT.client_id,
    "redirect_uri": CALLBACK,
    "response_type": "code",
    "scope": "openid orders:read",
    "state": "a state",
    "code_challenge": CHALLENGE,
    "code_challenge_method": "S256",
}
HYBRID = GOOD | {"response_type": "code id_token", "nonce": "n"}


def client(**changes: Any) -> Client:
    return replace(CLIENT, metadata=replace(METADATA, **changes))


def asked(
    parameters: dict[str, str | None] | list[tuple[str, str]], of: Client | None = CLIENT, **more: Any
) -> AuthorizationRequest:
    pairs = list(parameters.items()) if isinstance(parameters, dict) else parameters
    return parse(Parameters([(name, value) for name, value in pairs if value is not None]), of, HELD, ISSUER, **more)


def test_request_is_understood_as_a_whole() -> None:
    wanted = AuthorizationRequest(
        target=Target(CLIENT.client_id, CALLBACK, "query", "a state"),
        response_type="code",
        scope="openid orders:read",
        code_challenge=CHALLENGE,
        resources=("https://api.example",),
        nonce="n",
        prompts=frozenset({"login", "consent"}),
        max_age_seconds=0,
        login_hint="ann",
        id_token_hint="eyJ",
    )
    more = {
        "nonce": "n",
        "prompt": "login consent",
        "max_age": "0",
        "login_hint": "ann",
        "id_token_hint": "eyJ",
        "resource": "https://api.example",
    }
    assert asked(GOOD | more) == wanted


def test_request_with_the_least_asks_for_all_that_the_client_has() -> None:
    least = {name: value for name, value in GOOD.items() if name not in {"scope", "state"}}
    request = asked(least)
    assert request.scope is None
    assert request.target == Target(CLIENT.client_id, CALLBACK, "query", None)
    assert request.prompts == frozenset()
    assert not request.silent


@pytest.mark.parametrize(
    "more",
    [
        {"display": "popup"},
        {"ui_locales": "de en"},
        {"claims_locales": "de"},
        {"acr_values": "urn:x"},
        {"claims": '{"id_token":{"acr":{"essential":true}}}'},
        {"foo": "bar"},
        {"nonce": ""},
        {"prompt": ""},
        {"request": ""},
        {"response_mode": ""},
    ],
    ids=lambda more: next(iter(more)) + ("" if next(iter(more.values())) else " empty"),
)
def test_parameter_that_may_be_ignored_changes_nothing(more: dict[str, str]) -> None:
    assert asked(GOOD | more) == asked(GOOD)


@pytest.mark.parametrize(
    ("parameters", "mode"),
    [
        pytest.param(GOOD, "query", id="code"),
        pytest.param(GOOD | {"response_mode": "query"}, "query", id="code query"),
        pytest.param(GOOD | {"response_mode": "fragment"}, "fragment", id="code fragment"),
        pytest.param(GOOD | {"response_mode": "form_post"}, "form_post", id="code form_post"),
        pytest.param(HYBRID, "fragment", id="hybrid"),
        pytest.param(HYBRID | {"response_type": "id_token code"}, "fragment", id="hybrid in another order"),
        pytest.param(HYBRID | {"response_mode": "form_post"}, "form_post", id="hybrid form_post"),
    ],
)
def test_answer_goes_by_the_mode_that_was_asked_for_or_that_of_the_response_type(
    parameters: dict[str, str], mode: str
) -> None:
    assert asked(parameters).target.response_mode == mode


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        pytest.param({"client_id": "cli_unknown"}, UnknownClient, id="unknown client"),
        pytest.param({"redirect_uri": None}, UnregisteredRedirectUri, id="no redirect_uri"),
        pytest.param({"redirect_uri": ""}, UnregisteredRedirectUri, id="empty redirect_uri"),
        pytest.param({"redirect_uri": "https://evil.example/"}, UnregisteredRedirectUri, id="other redirect_uri"),
    ],
)
def test_request_whose_answer_could_go_astray_is_a_page(changes: dict[str, Any], error: type[PageError]) -> None:
    of = None if changes.get("client_id") == "cli_unknown" else CLIENT
    with pytest.raises(error):
        asked(GOOD | changes, of)


def test_disabled_client_is_unknown() -> None:
    with pytest.raises(UnknownClient):
        asked(GOOD, replace(CLIENT, disabled_at=START))


@pytest.mark.parametrize("name", ["client_id", "redirect_uri"])
def test_client_or_redirect_uri_given_twice_is_a_page(name: str) -> None:
    with pytest.raises(UnreadableRequest):
        asked([*GOOD.items(), (name, GOOD[name])])


NEAR_MISSES = {
    "trailing slash": CALLBACK + "/",
    "path case": "https://app.example/Callback",
    "host case": "https://App.example/callback",
    "query": CALLBACK + "?x",
    "empty query": CALLBACK + "?",
    "fragment": CALLBACK + "#f",
    "empty fragment": CALLBACK + "#",
    "user": "https://app.example@evil.example/callback",
    "good user": "https://good@app.example/callback",
    "subdomain": "https://app.example.evil.example/callback",
    "scheme relative": "//app.example/callback",
    "encoded dots": "https://app.example/%2e%2e/callback",
    "dots": "https://app.example/x/../callback",
    "semicolon": "https://app.example/..;/callback",
    "port": "https://app.example:443/callback",
    "http": "http://app.example/callback",
    "trailing dot": "https://app.example./callback",
    "IDN": "https://\u0430pp.example/callback",
    "tab in scheme": "ht\ttps://app.example/callback",
    "newline": CALLBACK + "\n",
    "blank": CALLBACK + " ",
    "backslash": "https://app.example\\@evil.example/callback",
    "encoded letter": "https://app.example/%63allback",
    "prefix": "https://app.example/",
    "nothing": "",
}


@pytest.mark.parametrize("uri", [pytest.param(uri, id=name) for name, uri in NEAR_MISSES.items()])
def test_redirect_uri_is_compared_to_the_letter(uri: str) -> None:
    assert not matches(CALLBACK, uri)


LOOPBACK = "http://127.0.0.1/callback?a=b"


@pytest.mark.parametrize(
    ("registered", "presented", "same"),
    [
        pytest.param(LOOPBACK, "http://127.0.0.1:49152/callback?a=b", True, id="a port"),
        pytest.param("http://127.0.0.1:80/x", "http://127.0.0.1:49152/x", True, id="another port"),
        pytest.param("http://127.0.0.1:80/x", "http://127.0.0.1/x", True, id="no port"),
        pytest.param("http://127.0.0.1", "http://127.0.0.1:1", True, id="no path"),
        pytest.param("http://[::1]/x", "http://[::1]:65535/x", True, id="IPv6"),
        pytest.param("http://localhost/x", "http://localhost:8080/x", True, id="localhost"),
        pytest.param(LOOPBACK, "http://127.0.0.1:65536/callback?a=b", False, id="no such port"),
        pytest.param(LOOPBACK, "http://127.0.0.1:0/callback?a=b", False, id="port 0"),
        pytest.param(LOOPBACK, "http://127.0.0.1:/callback?a=b", False, id="empty port"),
        pytest.param(LOOPBACK, "http://127.0.0.1:x/callback?a=b", False, id="port of letters"),
        pytest.param(LOOPBACK, "http://127.0.0.1:49152/callback", False, id="other query"),
        pytest.param(LOOPBACK, "http://127.0.0.1:49152/callback?a=b#f", False, id="fragment"),
        pytest.param(LOOPBACK, "http://127.0.0.1:49152@evil.example/callback?a=b", False, id="user"),
        pytest.param(LOOPBACK, "http://127.0.0.1.evil.example/callback?a=b", False, id="subdomain"),
        pytest.param(LOOPBACK, "http://127.0.0.2:49152/callback?a=b", False, id="another loopback address"),
        pytest.param(LOOPBACK, "http://localhost:49152/callback?a=b", False, id="another name for it"),
        pytest.param(LOOPBACK, "https://127.0.0.1:49152/callback?a=b", False, id="another scheme"),
        pytest.param("https://app.example/x", "https://app.example:8443/x", False, id="not loopback"),
        pytest.param("com.example.app:/x", "com.example.app:/x", True, id="private scheme"),
        pytest.param("com.example.app:/x", "com.example.app:/y", False, id="private scheme, other path"),
    ],
)
def test_only_the_port_of_a_loopback_address_may_differ(registered: str, presented: str, same: bool) -> None:
    assert matches(registered, presented) is same


REFUSED: dict[str, tuple[dict[str, Any], type[RedirectError], str]] = {
    "no response_type": ({"response_type": None}, InvalidParameter, "query"),
    "token": ({"response_type": "token"}, ResponseTypeUnsupported, "fragment"),
    "code token": ({"response_type": "code token"}, ResponseTypeUnsupported, "fragment"),
    "id_token": ({"response_type": "id_token"}, ResponseTypeUnsupported, "fragment"),
    "code code": ({"response_type": "code code"}, ResponseTypeUnsupported, "query"),
    "two blanks": ({"response_type": "code  id_token"}, ResponseTypeUnsupported, "fragment"),
    "none": ({"response_type": "none"}, ResponseTypeUnsupported, "query"),
    "Code": ({"response_type": "Code"}, ResponseTypeUnsupported, "query"),
    "response_mode": ({"response_mode": "web_message"}, InvalidParameter, "query"),
    "response_mode jwt": ({"response_mode": "jwt"}, InvalidParameter, "query"),
    "hybrid in a query": (HYBRID | {"response_mode": "query"}, InvalidParameter, "fragment"),
    "hybrid without nonce": (HYBRID | {"nonce": None}, InvalidParameter, "fragment"),
    "hybrid with empty nonce": (HYBRID | {"nonce": ""}, InvalidParameter, "fragment"),
    "hybrid without openid": (HYBRID | {"scope": "orders:read"}, InvalidParameter, "fragment"),
    "no challenge": ({"code_challenge": None}, InvalidParameter, "query"),
    "no challenge at all": ({"code_challenge": None, "code_challenge_method": None}, InvalidParameter, "query"),
    "no method": ({"code_challenge_method": None}, InvalidParameter, "query"),
    "plain": ({"code_challenge_method": "plain"}, InvalidParameter, "query"),
    "s256": ({"code_challenge_method": "s256"}, InvalidParameter, "query"),
    "challenge of 42": ({"code_challenge": CHALLENGE[:42]}, InvalidParameter, "query"),
    "challenge of 44": ({"code_challenge": CHALLENGE + "A"}, InvalidParameter, "query"),
    "padded challenge": ({"code_challenge": CHALLENGE[:42] + "="}, InvalidParameter, "query"),
    "padded whole challenge": ({"code_challenge": CHALLENGE + "="}, InvalidParameter, "query"),
    "challenge in base64": ({"code_challenge": CHALLENGE.replace("-", "+")}, InvalidParameter, "query"),
    "challenge of no hash": ({"code_challenge": CHALLENGE[:42] + "B"}, InvalidParameter, "query"),
    "challenge with newline": ({"code_challenge": CHALLENGE + "\n"}, InvalidParameter, "query"),
    "unknown scope": ({"scope": "openid orders:write"}, ScopeNotAllowed, "query"),
    "scope with quote": ({"scope": 'openid "'}, ScopeNotAllowed, "query"),
    "scope with newline": ({"scope": "openid\norders:read"}, ScopeNotAllowed, "query"),
    "scope with NUL": ({"scope": "openid\0"}, ScopeNotAllowed, "query"),
    "two blanks in scope": ({"scope": "openid  orders:read"}, ScopeNotAllowed, "query"),
    "unknown resource": ({"resource": "https://evil.example"}, TargetNotAllowed, "query"),
    "relative resource": ({"resource": "/api"}, TargetNotAllowed, "query"),
    "resource with fragment": ({"resource": "https://api.example#f"}, TargetNotAllowed, "query"),
    "request": ({"request": "eyJ"}, RequestUnsupported, "query"),
    "request_uri": ({"request_uri": "https://evil.example/r"}, RequestUriUnsupported, "query"),
    "request_uri of a file": ({"request_uri": "file:///etc/passwd"}, RequestUriUnsupported, "query"),
    "registration": ({"registration": "{}"}, RegistrationUnsupported, "query"),
    "none and login": ({"prompt": "none login"}, InvalidParameter, "query"),
    "unknown prompt": ({"prompt": "create"}, InvalidParameter, "query"),
    "negative max_age": ({"max_age": "-1"}, InvalidParameter, "query"),
    "max_age of letters": ({"max_age": "soon"}, InvalidParameter, "query"),
    "max_age in other digits": ({"max_age": "\u0663"}, InvalidParameter, "query"),
    "huge max_age": ({"max_age": "9" * 30}, InvalidParameter, "query"),
    "long nonce": ({"nonce": "n" * (NONCE_CHARS_MAX + 1)}, InvalidParameter, "query"),
    "long id_token_hint": ({"id_token_hint": "e" * 5000}, InvalidParameter, "query"),
}


@pytest.mark.parametrize(("changes", "error", "mode"), [pytest.param(*case, id=name) for name, case in REFUSED.items()])
def test_request_is_refused_at_the_redirect_uri(changes: dict[str, Any], error: type[RedirectError], mode: str) -> None:
    with pytest.raises(error) as refused:
        asked(GOOD | changes)
    assert refused.value.target == Target(CLIENT.client_id, CALLBACK, mode, "a state")


CODES = {
    InvalidParameter: "invalid_request",
    ResponseTypeUnsupported: "unsupported_response_type",
    ResponseTypeNotAllowed: "unauthorized_client",
    ScopeNotAllowed: "invalid_scope",
    TargetNotAllowed: "invalid_target",
    RequestUnsupported: "request_not_supported",
    RequestUriUnsupported: "request_uri_not_supported",
    RegistrationUnsupported: "registration_not_supported",
}


def test_errors_have_the_codes_of_the_specifications() -> None:
    assert {error: error.code for error in CODES} == CODES
    assert {error for _, error, _ in REFUSED.values()} <= CODES.keys()


@pytest.mark.parametrize("name", [name for name in GOOD if name not in {"client_id", "redirect_uri"}])
def test_repeated_parameter_is_refused(name: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        asked([*GOOD.items(), (name, GOOD[name])])
    assert refused.value.target is not None
    assert refused.value.target.state == (None if name == "state" else "a state")


def test_repeated_resource_is_the_one_that_may_be() -> None:
    both = METADATA.audience
    request = asked([*GOOD.items(), *(("resource", one) for one in (*both, both[0]))])
    assert request.resources == both


def test_client_without_audience_may_ask_for_the_issuer() -> None:
    assert asked(GOOD | {"resource": ISSUER}, client(audience=())).resources == (ISSUER,)


def test_long_state_is_kept_and_a_longer_one_is_not_given_back() -> None:
    assert asked(GOOD | {"state": "s" * STATE_CHARS_MAX}).target.state == "s" * STATE_CHARS_MAX
    with pytest.raises(InvalidParameter) as refused:
        asked(GOOD | {"state": "s" * (STATE_CHARS_MAX + 1)})
    assert refused.value.target == Target(CLIENT.client_id, CALLBACK, "query", None)


def test_response_type_that_the_client_has_not_registered_is_refused() -> None:
    with pytest.raises(ResponseTypeNotAllowed):
        asked(HYBRID, client(response_types=("code",)))


def test_client_that_pushes_its_requests_cannot_send_them_otherwise() -> None:
    pushing = client(require_pushed_authorization_requests=True)
    with pytest.raises(InvalidParameter):
        asked(GOOD, pushing)
    assert asked(GOOD, pushing, pushed=True) == asked(GOOD)


def test_offline_access_is_ignored_for_a_client_without_refresh_tokens() -> None:
    wanted = GOOD | {"scope": "openid offline_access"}
    assert asked(wanted).scope == "openid offline_access"
    assert asked(wanted, client(grant_types=("authorization_code",))).scope == "openid"


@pytest.mark.parametrize("hint", ["a" * 257, "ann\n", "\0", "\u202eann"], ids=["long", "newline", "NUL", "reversed"])
def test_strange_login_hint_is_ignored(hint: str) -> None:
    assert asked(GOOD | {"login_hint": hint}).login_hint is None


@pytest.mark.parametrize(
    ("changes", "signed_in_ago_seconds", "needed"),
    [
        pytest.param({}, 40_000, False, id="nothing asked"),
        pytest.param({"prompt": "login"}, 1, True, id="login"),
        pytest.param({"prompt": "select_account"}, 1, True, id="select_account"),
        pytest.param({"prompt": "consent"}, 1, False, id="consent"),
        pytest.param({"max_age": "0"}, 0, True, id="max_age 0"),
        pytest.param({"max_age": "10"}, 10, False, id="max_age not exceeded"),
        pytest.param({"max_age": "10"}, 11, True, id="max_age exceeded"),
    ],
)
def test_person_must_sign_in_again_when_the_client_says_so(
    changes: dict[str, str], signed_in_ago_seconds: int, needed: bool
) -> None:
    request = asked(GOOD | changes)
    signed_in_at = after(-signed_in_ago_seconds)
    assert needs_sign_in(request, signed_in_at, after(0)) is needed
    pushed_before = signed_in_at - timedelta(seconds=1)
    assert needs_sign_in(request, signed_in_at, after(0), pushed_at=pushed_before) is False
    assert needs_sign_in(request, signed_in_at, after(0), pushed_at=signed_in_at + timedelta(seconds=1)) is needed


@pytest.mark.parametrize(
    ("more", "left"),
    [
        pytest.param({"prompt": "login"}, {}, id="login"),
        pytest.param({"prompt": "login consent"}, {"prompt": "consent"}, id="login consent"),
        pytest.param({"prompt": "consent"}, {"prompt": "consent"}, id="consent"),
        pytest.param({"max_age": "0"}, {}, id="max_age"),
        pytest.param({"resource": "https://api.example"}, {"resource": "https://api.example"}, id="resource"),
    ],
)
def test_sign_in_is_not_asked_for_again_after_it(more: dict[str, str], left: dict[str, str]) -> None:
    query = after_sign_in(Parameters((GOOD | more).items()))
    assert dict(parse_qsl(query)) == GOOD | left
    assert needs_sign_in(asked(parse_qsl(query)), after(0), after(0)) is False


@pytest.mark.parametrize(
    ("method", "uri", "native"),
    [
        pytest.param("none", "http://127.0.0.1/x", True, id="public on loopback"),
        pytest.param("none", "com.example.app:/x", True, id="public with a private scheme"),
        pytest.param("none", CALLBACK, False, id="public with https"),
        pytest.param("client_secret_basic", "http://127.0.0.1/x", False, id="confidential on loopback"),
    ],
)
def test_app_that_others_could_pass_for_is_known(method: str, uri: str, native: bool) -> None:
    assert is_of_native_app(client(token_endpoint_auth_method=method), uri) is native


MEMBERS = {"code": "tl_ac_x", "state": 'a b+c&d="\r\nSet-Cookie: x\u00e4', "iss": ISSUER}


@pytest.mark.parametrize(
    ("uri", "mode", "before"),
    [
        pytest.param(CALLBACK, "query", CALLBACK + "?", id="query"),
        pytest.param(CALLBACK + "?", "query", CALLBACK + "?", id="after an empty query"),
        pytest.param(CALLBACK + "?tenant=1", "query", CALLBACK + "?tenant=1&", id="after another query"),
        pytest.param(CALLBACK + "?tenant=1", "fragment", CALLBACK + "?tenant=1#", id="fragment"),
        pytest.param("com.example.app:/x", "query", "com.example.app:/x?", id="private scheme"),
    ],
)
def test_answer_stands_behind_the_redirect_uri(uri: str, mode: str, before: str) -> None:
    url = location(Target(CLIENT.client_id, uri, mode), MEMBERS)
    assert url.startswith(before)
    answer = url.removeprefix(before)
    assert dict(parse_qsl(answer, strict_parsing=True)) == MEMBERS
    assert url.isascii()
    assert not set(url) & set(' \r\n"<>')


@drawn(st.dictionaries(st.sampled_from([*GOOD, "nonce", "prompt", "max_age", "resource", "request_uri"]), st.text()))
def test_whatever_is_asked_never_leads_elsewhere(changes: dict[str, str]) -> None:
    """Nothing but a refusal of ours, and every answer to a registered redirect URI."""
    target: Target | None
    try:
        target = asked(GOOD | changes).target
    except PageError:
        return
    except RedirectError as error:
        target = error.target
    assert target is not None
    assert target.redirect_uri in METADATA.redirect_uris
    assert urlsplit(location(target, {"state": target.state or ""})).netloc == "app.example"


def test_query_of_the_parameters_is_the_same_request() -> None:
    parameters = Parameters([*HYBRID.items(), ("resource", "a"), ("resource", "b"), ("state", "")])
    again = Parameters(parse_qsl(parameters.query()))
    assert again.query() == parameters.query()
    assert urlencode({"a": "b"}) not in parameters.query()
