"""Client authentication with secrets."""

from __future__ import annotations

import ast
import base64
import time
from pathlib import Path

import service as package
from tests.attacks.table import CREDENTIALS, Stage, attack, basic, form, variants
from tests.running import App, oauth_error, until

ENDPOINTS = {"token": "/oauth2/token", "introspect": "/oauth2/introspect", "revoke": "/oauth2/revoke"}
BODY = f"{CREDENTIALS}&token=x"


@variants("31", "RFC 6749 §5.2: invalid_client", **ENDPOINTS)
def client_id_alone_is_refused(stage: Stage, path: str) -> None:
    app = stage.new_app(token_endpoint_auth_method="client_secret_post")
    answer = stage.post(path, f"{BODY}&client_id={app.client_id}")
    oauth_error(answer, 401, "invalid_client")


@attack("31", "RFC 6749 §5.2: invalid_client")
def nothing_at_all_is_refused(stage: Stage) -> None:
    oauth_error(stage.token(None, CREDENTIALS), 401, "invalid_client")


@variants("32", "RFC 6749 §5.2: invalid_client with a matching WWW-Authenticate", **ENDPOINTS)
def wrong_basic_secret_is_refused(stage: Stage, path: str) -> None:
    answer = stage.post(path, BODY, basic(stage.new_app().client_id, "wrong"))
    oauth_error(answer, 401, "invalid_client")
    assert answer.headers["www-authenticate"].startswith("Basic ")


@variants("32", "RFC 6749 §5.2: invalid_client", **ENDPOINTS)
def wrong_body_secret_is_refused(stage: Stage, path: str) -> None:
    app = stage.new_app(token_endpoint_auth_method="client_secret_post")
    answer = stage.post(path, f"{BODY}&client_id={app.client_id}&client_secret=wrong")
    oauth_error(answer, 401, "invalid_client")


@variants(
    "32",
    "RFC 6749 §5.2: invalid_client",
    flipped=lambda secret: secret[:-1] + ("a" if secret[-1] != "a" else "b"),
    case=str.swapcase,
    truncated=lambda secret: secret[:-1],
    longer=lambda secret: secret + "a",
    empty=lambda secret: "",
    space=lambda secret: secret + " ",
)
def near_miss_of_secret_is_refused(stage: Stage, change) -> None:
    app = stage.new_app()
    answer = stage.token(None, CREDENTIALS, basic(app.client_id, change(app.client_secret)))
    oauth_error(answer, 401, "invalid_client")


@variants("34", "RFC 6749 §2.3: MUST NOT use more than one authentication method", **ENDPOINTS)
def two_methods_are_refused(stage: Stage, path: str) -> None:
    app = stage.app
    body = f"{BODY}&client_id={app.client_id}&client_secret={app.client_secret}"
    oauth_error(stage.post(path, body, basic(*app.basic)), 400, "invalid_request")


@attack("35", "P, RFC 6749 §2.3")
def two_clients_in_one_request_are_refused(stage: Stage) -> None:
    other = stage.new_app()
    answer = stage.token(stage.app, f"{CREDENTIALS}&client_id={other.client_id}")
    oauth_error(answer, 400, "invalid_request")


@attack("35", "P, RFC 6749 §2.3 (positive control)")
def same_client_id_in_body_is_accepted(stage: Stage) -> None:
    answer = stage.token(stage.app, f"{CREDENTIALS}&client_id={stage.app.client_id}")
    assert answer.status_code == 200


@attack("37", "RFC 6749 §4.4: MUST only be used by confidential clients")
def public_client_gets_no_client_credentials(stage: Stage) -> None:
    app = stage.new_app(token_endpoint_auth_method="none", grant_types=["refresh_token"])
    assert not app.client_secret
    answer = stage.token(None, f"{CREDENTIALS}&client_id={app.client_id}")
    oauth_error(answer, 400, "unauthorized_client")


@attack("37", "RFC 6749 §4.4; RFC 7591 §3.2.2")
def public_client_is_not_registered_for_client_credentials(stage: Stage) -> None:
    wanted = {
        "client_name": "public",
        "token_endpoint_auth_method": "none",
        "grant_types": ["client_credentials"],
    }
    assert stage.service.call("POST", "/v1/clients", json=wanted).status_code == 400


def encoded(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


@variants(
    "38",
    "P, RFC 7617",
    no_colon="Basic " + encoded("no-colon"),
    bad_alphabet="Basic !!!!",
    bad_length="Basic YWJ",
    empty="Basic ",
    bare="Basic",
    not_utf_8="Basic " + encoded(b"\xff\xfe:\xff"),
    control="Basic " + encoded("a\r\n:b"),
    bad_escape="Basic " + encoded("%zz:%"),
    nul="Basic " + encoded("\0:\0"),
    bearer="Bearer abc",
    unknown_scheme="Negotiate abc",
    long_name="Basic " + encoded("a" * 5_000 + ":b"),
)
def broken_basic_is_refused(stage: Stage, value: str) -> None:
    answer = stage.token(None, CREDENTIALS, ("Authorization", value))
    assert answer.status_code in {400, 401}
    oauth_error(answer, answer.status_code, {400: "invalid_request", 401: "invalid_client"}[answer.status_code])


@attack("38", "P, RFC 7617; RFC 6585 §5")
def huge_basic_is_refused(stage: Stage) -> None:
    """The server may hang up before it has read a megabyte of header."""
    answer = stage.token(None, CREDENTIALS, ("Authorization", "Basic " + "A" * 1_000_000))
    assert answer.status_code in {0, 400, 401, 431}
    assert stage.token(stage.app, CREDENTIALS).status_code == 200


@attack("40", "P, RFC 6819 §4.3.5")
def unknown_client_is_told_like_a_wrong_secret(stage: Stage) -> None:
    """Same status, same body. The work is counted in tests/service/test_client_authentication.py, and the time that it
    takes measured by `make bench-timing`."""
    bodies = set()
    for client_id in ("cli_" + "0" * 32, stage.new_app().client_id):
        answer = stage.token(None, CREDENTIALS, basic(client_id, "tl_cs_wrong"))
        oauth_error(answer, 401, "invalid_client")
        bodies.add(answer.content)
    assert len(bodies) == 1


def _wrong_until_limited(stage: Stage, app: App, path: str) -> None:
    """Workers count for themselves, so with two of them it may take twice as many."""
    for _ in range(100):
        answer = stage.post(path, BODY, basic(app.client_id, "wrong"))
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) > 0
            return
        oauth_error(answer, 401, "invalid_client")
    raise AssertionError("never limited")


@variants("41", "RFC 6749 §2.3.1: MUST protect against brute force", **ENDPOINTS)
def guessing_is_limited(stage: Stage, path: str) -> None:
    """The real client, from another address, is not locked out."""
    app = stage.new_app()
    _wrong_until_limited(stage, app, path)
    with stage.service.caller(source="127.0.0.2") as elsewhere:
        answer = elsewhere.post("/oauth2/token", data={"grant_type": "client_credentials"}, auth=app.basic)
    assert answer.status_code == 200


@attack("43", "P: rotation with overlap")
def rotated_secret_works_until_its_overlap_ends(stage: Stage) -> None:
    app = stage.new_app()
    path = f"/v1/clients/{app.client_id}/secrets"
    made = stage.service.done("POST", path, json={"overlap_seconds": 2})
    started = time.monotonic()
    new = App(app.client_id, made["client_secret"], made)
    assert stage.token(new, CREDENTIALS).status_code == 200
    old = stage.token(app, CREDENTIALS)
    assert old.status_code == 200 or time.monotonic() - started > 2
    until(lambda: stage.token(app, CREDENTIALS).status_code == 401, seconds=5, what="the old secret ends")
    assert stage.token(new, CREDENTIALS).status_code == 200


@attack("43", "P: rotation without overlap")
def rotated_secret_without_overlap_ends_at_once(stage: Stage) -> None:
    app = stage.new_app()
    stage.service.done("POST", f"/v1/clients/{app.client_id}/secrets", json={"overlap_seconds": 0})
    oauth_error(stage.token(app, CREDENTIALS), 401, "invalid_client")


@attack("44", "P, RFC 6819 §5.1.4.2")
def secrets_are_compared_in_constant_time(stage: Stage) -> None:
    """Over a socket, twenty wrong guesses a minute measure nothing; so the source itself is asked.

    Nothing in `service/` compares a secret, digest or hash by `==`, and `hmac.compare_digest` is used. The hash of a
    request's body proves nothing to anybody.
    """
    suspicious = ("secret", "digest", "sha256", "password_hash", "hmac")
    found, safe = [], 0
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("compare_digest"):
                safe += 1
            if isinstance(node, ast.Compare) and any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops):
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                names = [side for side in sides if side.isidentifier() or "." in side]
                if any("body_sha256" in side for side in names):
                    continue
                if len(names) == 2 and all(any(word in side for word in suspicious) for side in names):
                    found.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert found == []
    assert safe > 0


@variants("34", "RFC 6749 §2.3.1 (positive control)", basic="client_secret_basic", post="client_secret_post")
def either_way_of_sending_the_secret_works(stage: Stage, method: str) -> None:
    """Libraries choose for themselves how they send it, whatever was registered."""
    app = stage.new_app(token_endpoint_auth_method=method)
    body = form(grant_type="client_credentials", client_id=app.client_id, client_secret=app.client_secret)
    assert stage.token(None, body).status_code == 200
    assert stage.token(app, CREDENTIALS).status_code == 200
