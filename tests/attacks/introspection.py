"""Introspection, validation and routes that a bearer token protects."""

from __future__ import annotations

import time
from statistics import median

from service.tokens import mint
from tests.attacks.table import Stage, attack, basic, bearer, form, variants
from tests.running import CANARY_QUERY, App, oauth_error, problem

INACTIVE = {"active": False}
UNKNOWN_PAT = mint("pat")  # well formed, so that it is looked up


@attack("131", "RFC 7662 §2.1, §2.3")
def introspection_without_authorization_is_refused(stage: Stage) -> None:
    token = stage.refreshable()["access_token"]
    oauth_error(stage.post("/oauth2/introspect", form(token=token)), 401, "invalid_client")


@variants("133", "P, RFC 7662 §4", opaque="opaque", jwt="jwt")
def token_may_not_introspect_itself(stage: Stage, token_format: str) -> None:
    token = stage.service.grant(stage.new_app(access_token_format=token_format))["access_token"]
    answer = stage.post("/oauth2/introspect", form(token=token), bearer(token))
    assert answer.status_code in {401, 403}
    assert "active" not in answer.json()


@attack("133", "RFC 7662 §2.1 (positive control)")
def bearer_that_may_validate_may_introspect(stage: Stage) -> None:
    token = stage.refreshable()["access_token"]
    caller = stage.service.bearer("ledger:validate")
    answer = stage.post("/oauth2/introspect", form(token=token), bearer(caller))
    assert answer.status_code == 200
    assert answer.json()["active"] is True


@attack("133", "RFC 7662 §2.2: active is what can be used")
def spent_refresh_token_is_inactive(stage: Stage) -> None:
    spent = stage.refreshable()["refresh_token"]
    assert stage.introspected(spent) != INACTIVE
    successor = stage.token(stage.app, form(grant_type="refresh_token", refresh_token=spent)).json()["refresh_token"]
    # A token that the view does not know yet is waited for, and the spent one is so by then.
    assert stage.introspected(successor) != INACTIVE
    assert stage.introspected(spent) == INACTIVE


@attack("134", "RFC 7662 §2.1: POST")
def introspection_by_get_is_refused(stage: Stage) -> None:
    target = f"/oauth2/introspect?token={CANARY_QUERY}"
    answer = stage.service.raw_call("GET", target, [basic(*stage.app.basic)])
    assert answer.status_code == 405
    assert "POST" in answer.headers["allow"]


@variants(
    "136",
    "RFC 7662 §2.2: only that it is not active",
    garbage="garbage",
    unknown=UNKNOWN_PAT,
    control="a\0\r\n\tb",
    quote='"\\',
    dots="a.b.c",
    jwt_like="eyJhbGciOiJub25lIn0.e30.",
    space=" ",
    unicode="\u00e4\u20ac\U0001f600",
    long="a" * 8_000,
)
def garbage_is_inactive_and_nothing_else(stage: Stage, token: str) -> None:
    answer = stage.post("/oauth2/introspect", form(token=token), basic(*stage.checker.basic))
    assert (answer.status_code, answer.json()) == (200, INACTIVE)
    assert answer.headers["cache-control"] == "no-store"


@variants("136", "RFC 7662 §2.1: token is REQUIRED", absent="token_type_hint=access_token", empty="token=")
def missing_token_is_refused(stage: Stage, body: str) -> None:
    answer = stage.post("/oauth2/introspect", body, basic(*stage.checker.basic))
    oauth_error(answer, 400, "invalid_request")


@attack("137", "P, CWE-400")
def megabyte_token_is_refused(stage: Stage) -> None:
    answer = stage.post("/oauth2/introspect", "token=" + "a" * 1_000_000, basic(*stage.checker.basic))
    assert answer.status_code == 413 or answer.json() == INACTIVE
    assert answer.headers["cache-control"] == "no-store"


@attack("137", "P, CWE-400")
def megabyte_token_is_refused_by_validate(stage: Stage) -> None:
    answer = stage.service.call("POST", "/v1/tokens/validate", json={"token": "a" * 1_000_000})
    assert answer.status_code == 413 or answer.json()["code"] == "malformed"


def _server_for(stage: Stage, audience: str) -> App:
    return stage.service.app(may_introspect=True, audience=[audience])


@attack("139", "RFC 7662 §2.2, §4")
def token_for_another_resource_server_is_inactive(stage: Stage) -> None:
    ours, theirs = "https://ours.example", "https://theirs.example"
    token = stage.service.grant(stage.new_app(audience=[theirs]))["access_token"]
    assert stage.service.introspect(_server_for(stage, ours), token) == INACTIVE
    assert stage.service.introspect(_server_for(stage, theirs), token)["active"] is True


@attack("139", "RFC 7662 §2.2, §4")
def token_of_another_client_is_inactive_without_permission(stage: Stage) -> None:
    answer = stage.refreshable()
    other = stage.new_app()
    for token in (answer["access_token"], answer["refresh_token"], stage.service.pat()["token"]):
        assert stage.service.introspect(other, token) == INACTIVE
    assert stage.service.introspect(stage.app, answer["access_token"])["active"] is True
    assert stage.service.introspect(stage.app, answer["refresh_token"])["active"] is True


@attack("139", "P: only ledger:admin sets may_introspect")
def introspection_right_is_not_self_service(stage: Stage) -> None:
    caller = stage.service.bearer("ledger:clients")
    wanted = {"client_name": "sly", "may_introspect": True}
    refused = stage.service.call("POST", "/v1/clients", token=caller, json=wanted)
    problem(refused, 403, "insufficient_scope")


@variants("140", "RFC 7662 §2.1: MUST extend its search", wrong="refresh_token", unknown="made-up", pat="pat")
def wrong_hint_finds_the_token(stage: Stage, hint: str) -> None:
    token = stage.refreshable()["access_token"]
    assert stage.service.introspect(stage.app, token, token_type_hint=hint)["active"] is True


def _scan(stage: Stage, path: str, headers: list[tuple[str, str]], seconds_max: float = 10) -> None:
    deadline = time.monotonic() + seconds_max
    while time.monotonic() < deadline:
        answer = stage.post(path, form(token=UNKNOWN_PAT), *headers)
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) > 0
            return
        assert answer.json() == INACTIVE
    raise AssertionError("never limited")


@attack("142", "RFC 7662 §4: token scanning")
def scanning_is_limited(stage: Stage) -> None:
    """A resource server that passes on what its users send it must not be cut off by one of them: a token that is
    known is answered all the same."""
    limited = stage.odd
    _scan(limited, "/oauth2/introspect", [basic(*limited.checker.basic)])
    token = limited.refreshable()["access_token"]
    for _ in range(4):
        answer = limited.post("/oauth2/introspect", form(token=token), basic(*limited.checker.basic))
        assert (answer.status_code, answer.json()["active"]) == (200, True)


@attack("142", "RFC 7662 §4: token scanning")
def scanning_with_bearer_tokens_is_limited(stage: Stage) -> None:
    """Nobody is known who could be limited but the address. Behind a proxy it is everybody's: a token that is known
    is taken all the same."""
    service = stage.odd.service
    with service.caller(source="127.0.0.3") as scanner:
        for _ in range(100):
            answer = scanner.get("/v1/clients", headers={"Authorization": f"Bearer {UNKNOWN_PAT}"})
            if answer.status_code == 429:
                break
            assert answer.status_code == 401
        else:
            raise AssertionError("never limited")
        good = {"Authorization": f"Bearer {service.admin_token}"}
        for _ in range(4):
            assert scanner.get("/v1/clients", params={"limit": 1}, headers=good).status_code == 200
    assert int(answer.headers["retry-after"]) > 0


@attack("142", "RFC 7662 §4: hit and miss take alike")
def hit_and_miss_take_alike(stage: Stage) -> None:
    """A miss may look once at the end of the stream, which costs a round trip to the log, as recording does."""
    token = stage.refreshable()["access_token"]
    seconds: dict[str, list[float]] = {token: [], UNKNOWN_PAT: []}
    for _ in range(15):
        for one, measured in seconds.items():
            answer = stage.post("/oauth2/introspect", form(token=one), basic(*stage.checker.basic))
            measured.append(answer.seconds)
    assert median(seconds[UNKNOWN_PAT]) < 5 * median(seconds[token]) + 0.005


@attack("143", "P, RFC 7662 §4")
def revoked_token_is_inactive_at_once(stage: Stage) -> None:
    """`no-store`, so that nothing in between answers for us."""
    token = stage.refreshable()["access_token"]
    before = stage.post("/oauth2/introspect", form(token=token), basic(*stage.checker.basic))
    assert before.json()["active"] is True
    assert before.headers["cache-control"] == "no-store"
    assert stage.service.revoke(stage.app, token).status_code == 200
    for _ in range(20):
        assert stage.introspected(token) == INACTIVE
        assert stage.service.code(token) == "revoked"


PROTECTED = {
    "list": ("GET", "/v1/clients"),
    "validate": ("POST", "/v1/tokens/validate"),
    "batch": ("POST", "/v1/tokens/validate-batch"),
    "forward_auth": ("GET", "/v1/forward-auth"),
}


@variants("145", "RFC 6750 §3.1: no error code without authentication", **PROTECTED)
def missing_bearer_is_asked_for(stage: Stage, request: tuple[str, str]) -> None:
    answer = stage.service.raw_call(*request)
    assert answer.status_code == 401
    challenge = answer.headers["www-authenticate"]
    assert challenge.startswith("Bearer")
    assert "error" not in challenge
    assert answer.headers["cache-control"] == "no-store"


@variants("145", "RFC 6750 §3.1: invalid_token", **PROTECTED)
def unknown_bearer_is_refused(stage: Stage, request: tuple[str, str]) -> None:
    answer = stage.service.raw_call(*request, [bearer(UNKNOWN_PAT)])
    assert answer.status_code == 401
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


@variants("146", "RFC 9700 §4.3.2; OAuth 2.1 §5.1.1", **PROTECTED)
def token_in_query_is_not_accepted(stage: Stage, request: tuple[str, str]) -> None:
    """Not with the administrator's own token: it would stand in a log if there were one."""
    method, path = request
    answer = stage.service.raw_call(method, f"{path}?access_token={CANARY_QUERY}")
    assert answer.status_code in {400, 401}


@attack("146", "RFC 9700 §4.3.2: a token that would do stands in the query")
def valid_token_in_query_is_not_accepted(stage: Stage) -> None:
    token = stage.service.bearer("ledger:clients")
    answer = stage.service.raw_call("GET", f"/v1/clients?access_token={token}")
    assert answer.status_code in {400, 401}


@variants("148", "RFC 9110 §11.1: the scheme is case-insensitive", lower="bearer", upper="BEARER", mixed="bEaReR")
def scheme_in_any_case_is_accepted(stage: Stage, scheme: str) -> None:
    header = ("Authorization", f"{scheme} {stage.service.admin_token}")
    assert stage.service.raw_call("GET", "/v1/clients?limit=1", [header]).status_code == 200


@variants(
    "148",
    "RFC 6750 §2.1, §3.1",
    bare="Bearer",
    blank="Bearer ",
    two_tokens="Bearer a b",
    comma="Bearer a,b",
    basic="Basic YTpi",
    unknown="Token abc",
    control=b"Bearer a\x01b",
    high=b"Bearer \xff\xfe",
    tab="Bearer\tabc",
    garbage="Bearer garbage",
    empty_parameters='Bearer token=""',
)
def malformed_bearer_is_refused(stage: Stage, value: str | bytes) -> None:
    answer = stage.service.raw_call("GET", "/v1/clients", [("Authorization", value)])
    assert answer.status_code in {400, 401}


@attack("148", "RFC 9110 §11.4: one or more spaces")
def double_space_is_one_or_malformed(stage: Stage) -> None:
    header = ("Authorization", f"Bearer  {stage.service.admin_token}")
    assert stage.service.raw_call("GET", "/v1/clients?limit=1", [header]).status_code in {200, 400}


@attack("149", "RFC 6750 §3.1: insufficient_scope")
def missing_scope_is_named(stage: Stage) -> None:
    token = stage.service.bearer("ledger:validate")
    answer = stage.service.call("GET", "/v1/clients", token=token)
    problem(answer, 403, "insufficient_scope")
    challenge = answer.headers["www-authenticate"]
    assert 'error="insufficient_scope"' in challenge
    assert 'scope="' in challenge
    assert "ledger:clients" in challenge


@attack("149", "RFC 6750 §3.1: insufficient_scope")
def missing_scope_is_named_by_forward_auth(stage: Stage) -> None:
    token = stage.service.pat(stage.read)["token"]
    target = f"/v1/forward-auth?scope={stage.write}"
    answer = stage.service.raw_call("GET", target, [bearer(token)])
    assert answer.status_code == 403
    assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]
    assert stage.write in answer.headers["www-authenticate"]


@variants(
    "151",
    "P: a checksum refuses before any look-up",
    last=lambda token: token[:-1] + ("a" if token[-1] != "a" else "b"),
    first=lambda token: token[:7] + ("a" if token[7] != "a" else "b") + token[8:],
    kind=lambda token: token.replace("_pat_", "_sat_"),
    short=lambda token: token[:-1],
    prefix=lambda token: "xx" + token[2:],
)
def broken_pat_is_told_like_an_unknown_one(stage: Stage, change) -> None:
    token = change(stage.service.pat(stage.read)["token"])
    assert stage.introspected(token) == INACTIVE
    assert stage.service.code(token) in {"malformed", "unknown"}
    broken = stage.service.raw_call("GET", "/v1/clients", [bearer(token)])
    unknown = stage.service.raw_call("GET", "/v1/clients", [bearer(UNKNOWN_PAT)])
    assert broken.status_code == unknown.status_code == 401
    assert broken.headers["www-authenticate"] == unknown.headers["www-authenticate"]
    ours, theirs = broken.json(), unknown.json()
    assert {**ours, "request_id": ""} == {**theirs, "request_id": ""}


@variants("151", "P: a door takes the kinds it names", refresh="refresh_token", secret="client_secret")
def other_secrets_are_no_bearer_tokens(stage: Stage, which: str) -> None:
    token = stage.refreshable()["refresh_token"] if which == "refresh_token" else stage.new_app().client_secret
    assert stage.service.code(token) in {"unknown", "malformed"}
    for path in ("/v1/clients", "/v1/forward-auth"):
        assert stage.service.raw_call("GET", path, [bearer(token)]).status_code == 401
