"""Revocation, metadata and key set."""

from __future__ import annotations

import httpx

from service.tokens import mint
from tests.attacks.table import ODD_ISSUER, Stage, attack, basic, bearer, form, variants
from tests.running import CANARY_QUERY, oauth_error

METADATA = "/.well-known/oauth-authorization-server"
PRIVATE = {"d", "p", "q", "dp", "dq", "qi", "k", "oth"}


@attack("191", "RFC 7009 §2.1")
def revocation_without_authentication_is_refused(stage: Stage) -> None:
    token = stage.refreshable()["access_token"]
    oauth_error(stage.post("/oauth2/revoke", form(token=token)), 401, "invalid_client")
    body = form(token=token, client_id=stage.app.client_id)
    oauth_error(stage.post("/oauth2/revoke", body), 401, "invalid_client")
    assert stage.service.code(token) == "valid"


@variants("193", "RFC 7009 §2.1", access="access_token", refresh="refresh_token")
def token_of_another_client_stays(stage: Stage, name: str) -> None:
    token = stage.refreshable()[name]
    answer = stage.post("/oauth2/revoke", form(token=token), basic(*stage.new_app().basic))
    oauth_error(answer, 400, "invalid_request")
    assert stage.service.introspect(stage.app, token)["active"] is True


@attack("193", "P, RFC 7009 §2.1")
def pat_is_not_revoked_by_a_client(stage: Stage) -> None:
    token = stage.service.pat(stage.read)["token"]
    answer = stage.post("/oauth2/revoke", form(token=token), basic(*stage.app.basic))
    oauth_error(answer, 400, "invalid_request")
    assert stage.service.code(token) == "valid"


@variants("193", "RFC 7009 §2.2: unknown tokens cause no error", garbage="garbage", pat=mint("pat"), space=" ")
def unknown_token_is_no_error(stage: Stage, token: str) -> None:
    answer = stage.post("/oauth2/revoke", form(token=token), basic(*stage.app.basic))
    assert answer.status_code == 200


@variants("193", "RFC 7009 §2.1: token is REQUIRED", absent="token_type_hint=access_token", empty="token=", nothing="")
def missing_token_is_refused(stage: Stage, body: str) -> None:
    oauth_error(stage.post("/oauth2/revoke", body, basic(*stage.app.basic)), 400, "invalid_request")


@attack("193", "RFC 7009 §2.1: revoking twice is no error")
def second_revocation_is_no_error(stage: Stage) -> None:
    token = stage.refreshable()["access_token"]
    for _ in range(2):
        assert stage.service.revoke(stage.app, token).status_code == 200
    assert stage.service.code(token) == "revoked"


@variants(
    "194",
    "RFC 7009 §2.1: a wrong hint does not stop the search",
    access=("access_token", "refresh_token"),
    refresh=("refresh_token", "access_token"),
    unknown=("access_token", "made-up"),
)
def wrong_hint_revokes_all_the_same(stage: Stage, case: tuple[str, str]) -> None:
    name, hint = case
    token = stage.refreshable()[name]
    assert stage.service.revoke(stage.app, token, token_type_hint=hint).status_code == 200
    assert stage.introspected(token) == {"active": False}


@attack("194", "RFC 7009 §2.1: with a refresh token its access tokens end")
def refresh_token_takes_its_grant_with_it(stage: Stage) -> None:
    answer = stage.refreshable()
    assert stage.service.revoke(stage.app, answer["refresh_token"]).status_code == 200
    assert stage.service.code(answer["access_token"]) == "revoked"


@attack("194", "P: with an access token only that token ends")
def access_token_leaves_its_grant(stage: Stage) -> None:
    answer = stage.refreshable()
    assert stage.service.revoke(stage.app, answer["access_token"]).status_code == 200
    assert stage.service.refresh(stage.app, answer["refresh_token"]).status_code == 200


@attack("196", "RFC 7009 §2.2.1: unsupported_token_type")
def client_secret_is_no_token(stage: Stage) -> None:
    """A client's secret looks like our tokens and is none: rotation ends it."""
    answer = stage.post("/oauth2/revoke", form(token=stage.app.client_secret), basic(*stage.app.basic))
    oauth_error(answer, 400, "unsupported_token_type")


@attack("134", "RFC 7009 §2.1: POST")
def revocation_by_get_is_refused(stage: Stage) -> None:
    target = f"/oauth2/revoke?token={CANARY_QUERY}"
    assert stage.service.raw_call("GET", target, [basic(*stage.app.basic)]).status_code == 405


@attack("199", "RFC 8414 §3.3: identical to the configured string")
def metadata_names_the_issuer(stage: Stage) -> None:
    metadata = stage.service.http.get(METADATA).json()
    assert metadata["issuer"] == stage.service.issuer
    for name, value in metadata.items():
        if name.endswith(("_endpoint", "_uri")):
            assert value.startswith(stage.service.issuer + "/"), name


@attack("199", "RFC 8414 §3: the path of the issuer follows the well-known part")
def metadata_of_an_issuer_with_path(stage: Stage) -> None:
    """OpenID Connect Discovery §4.1 has it before the well-known part, RFC 8414 §5 behind."""
    openid = "/.well-known/openid-configuration"
    for path in (f"{METADATA}/tenant/one", f"{openid}/tenant/one", f"/tenant/one{openid}"):
        answer = stage.odd.service.http.get(path)
        assert answer.status_code == 200
        metadata = answer.json()
        assert metadata["issuer"] == ODD_ISSUER
        assert metadata["token_endpoint"].startswith(ODD_ISSUER + "/")


@attack("200", "RFC 7517 §4, §9.2")
def key_set_holds_no_private_part(stage: Stage) -> None:
    answer = stage.service.http.get("/oauth2/jwks")
    assert answer.status_code == 200
    assert "max-age=" in answer.headers["cache-control"]
    keys = answer.json()["keys"]
    assert keys
    for key in keys:
        assert not PRIVATE & key.keys()
        assert key["kty"] != "oct"
        assert key["use"] == "sig"
        assert key["alg"] in {"EdDSA", "Ed25519", "ES256", "RS256"}
    assert len({key["kid"] for key in keys}) == len(keys)


@variants("202", "RFC 9700 §2.6", metadata=METADATA, jwks="/oauth2/jwks")
def cors_is_never_with_credentials(stage: Stage, path: str) -> None:
    answer = stage.service.http.get(path, headers={"Origin": "https://evil.example"})
    _no_credentials(answer)


def _no_credentials(answer: httpx.Response) -> None:
    assert answer.headers.get("access-control-allow-origin", "*") == "*"
    assert "access-control-allow-credentials" not in answer.headers


@variants("202", "RFC 9700 §2.6", token="/oauth2/token", api="/v1/clients", introspect="/oauth2/introspect")
def preflight_allows_no_credentials(stage: Stage, path: str) -> None:
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    _no_credentials(stage.service.http.options(path, headers=headers))


@attack("217", "P, OWASP API1: an id that is not there is 404, and needs the right all the same")
def unknown_ids_are_not_found(stage: Stage) -> None:
    weak = stage.service.bearer("ledger:validate")
    for path in ("/v1/clients/cli_x", "/v1/users/usr_x", "/v1/tokens/tok_x", "/v1/tokens/tok_x/history"):
        assert stage.service.call("GET", path).status_code == 404
        assert stage.service.call("GET", path, token=weak).status_code == 403
        assert stage.service.raw_call("GET", path, [bearer("x")]).status_code == 401
