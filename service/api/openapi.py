"""The OpenAPI 3.1 document: management operations as they declare themselves, and the doors beside them."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from service.api.health import Live, Readiness
from service.api.problems import PROBLEM_JSON, Problem
from service.api.routing import OPERATIONS, Nothing, Operation
from service.doors import BatchAnswer, BatchRequest, ValidateAnswer, ValidateRequest
from service.grants import TokenAnswer

PATH = "/schema/openapi.json"
_FORM = "application/x-www-form-urlencoded"
_REF = "#/components/schemas/{name}"
_STATUS_TEXTS = {
    200: "Done",
    201: "Created",
    202: "Begun",
    303: "Go on there",
    400: "Malformed",
    401: "Not authenticated",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    408: "The body did not arrive in time",
    409: "It exists already, or has ended, or there are too many",
    410: "What was asked for is kept no longer",
    413: "Too large",
    415: "Unsupported content type",
    422: "The Idempotency-Key was used for another request",
    429: "Too many requests",
    500: "Internal error",
    503: "Cannot answer now",
}
_ALWAYS = (400, 401, 403, 429, 500, 503)
_WITH_BODY = (408, 413, 415)


class OAuthErrorBody(Struct, frozen=True):
    """RFC 6749 §5.2."""

    error: str
    error_description: str | UnsetType = UNSET


class TokenForm(Struct, frozen=True, kw_only=True):
    """RFC 6749 §4.4.2 and §6. `resource` (RFC 8707) may be repeated; other parameters are ignored."""

    grant_type: str
    scope: str | UnsetType = UNSET
    resource: str | list[str] | UnsetType = UNSET
    refresh_token: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    client_secret: str | UnsetType = UNSET


class TokenParameterForm(Struct, frozen=True, kw_only=True):
    """RFC 7662 §2.1, RFC 7009 §2.1."""

    token: str
    token_type_hint: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    client_secret: str | UnsetType = UNSET


class Introspection(Struct, frozen=True, kw_only=True):
    """RFC 7662 §2.2. Nothing but `active` when it is false."""

    active: bool
    scope: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    token_type: str | UnsetType = UNSET
    exp: int | UnsetType = UNSET
    iat: int | UnsetType = UNSET
    nbf: int | UnsetType = UNSET
    sub: str | UnsetType = UNSET
    aud: str | list[str] | UnsetType = UNSET
    iss: str | UnsetType = UNSET
    jti: str | UnsetType = UNSET
    grant_id: str | UnsetType = UNSET
    kind: str | UnsetType = UNSET


class KeySet(Struct, frozen=True):
    """RFC 7517 §5."""

    keys: list[dict[str, Any]]


class ServerMetadata(Struct, frozen=True, kw_only=True):
    """RFC 8414 §2, OpenID Connect Discovery §3, RFC 9126 §5, RFC 9207 §3."""

    issuer: str
    authorization_endpoint: str
    pushed_authorization_request_endpoint: str
    token_endpoint: str
    introspection_endpoint: str
    revocation_endpoint: str
    userinfo_endpoint: str
    end_session_endpoint: str
    jwks_uri: str
    scopes_supported: list[str]
    response_types_supported: list[str]
    response_modes_supported: list[str]
    grant_types_supported: list[str]
    code_challenge_methods_supported: list[str]
    authorization_response_iss_parameter_supported: bool
    prompt_values_supported: list[str]
    subject_types_supported: list[str]
    id_token_signing_alg_values_supported: list[str]
    claims_supported: list[str]
    claims_parameter_supported: bool
    request_parameter_supported: bool
    request_uri_parameter_supported: bool
    token_endpoint_auth_methods_supported: list[str]
    introspection_endpoint_auth_methods_supported: list[str]
    revocation_endpoint_auth_methods_supported: list[str]


class AuthorizationForm(Struct, frozen=True, kw_only=True):
    """RFC 6749 §4.1.1, RFC 7636 §4.3, RFC 8707 §2, OpenID Connect Core §3.1.2.1, §3.3.2.1.

    `resource` may be repeated, other parameters are ignored. A client that pushed its request sends `client_id` and
    `request_uri` only.
    """

    client_id: str
    redirect_uri: str | UnsetType = UNSET
    response_type: str | UnsetType = UNSET
    code_challenge: str | UnsetType = UNSET
    code_challenge_method: str | UnsetType = UNSET
    scope: str | UnsetType = UNSET
    state: str | UnsetType = UNSET
    nonce: str | UnsetType = UNSET
    response_mode: str | UnsetType = UNSET
    prompt: str | UnsetType = UNSET
    max_age: str | UnsetType = UNSET
    login_hint: str | UnsetType = UNSET
    id_token_hint: str | UnsetType = UNSET
    resource: str | list[str] | UnsetType = UNSET
    request_uri: str | UnsetType = UNSET


class PushedForm(Struct, frozen=True, kw_only=True):
    """RFC 9126 §2.1: the parameters of an authorization request, and the client's credentials as at the token
    endpoint."""

    redirect_uri: str
    response_type: str
    code_challenge: str
    code_challenge_method: str
    client_id: str | UnsetType = UNSET
    client_secret: str | UnsetType = UNSET
    scope: str | UnsetType = UNSET
    state: str | UnsetType = UNSET
    nonce: str | UnsetType = UNSET
    response_mode: str | UnsetType = UNSET
    prompt: str | UnsetType = UNSET
    max_age: str | UnsetType = UNSET
    login_hint: str | UnsetType = UNSET
    id_token_hint: str | UnsetType = UNSET
    resource: str | list[str] | UnsetType = UNSET


class PushedAnswer(Struct, frozen=True):
    """RFC 9126 §2.2."""

    request_uri: str
    expires_in: int


class UserInfo(Struct, frozen=True, kw_only=True):
    """OpenID Connect Core §5.3.2. What the token's scope holds: `profile`, `email`."""

    sub: str
    name: str | UnsetType = UNSET
    preferred_username: str | UnsetType = UNSET
    email: str | UnsetType = UNSET


class LogoutForm(Struct, frozen=True, kw_only=True):
    """OpenID Connect RP-Initiated Logout 1.0 §2."""

    id_token_hint: str | UnsetType = UNSET
    client_id: str | UnsetType = UNSET
    post_logout_redirect_uri: str | UnsetType = UNSET
    state: str | UnsetType = UNSET


class SignInForm(Struct, frozen=True):
    """What the sign-in page sends."""

    request: str
    csrf: str
    username: str
    password: str


class ConsentForm(Struct, frozen=True):
    """What the consent page sends: `decision` is `allow` or `deny`."""

    request: str
    csrf: str
    decision: str


_STRUCTS = (
    Problem,
    OAuthErrorBody,
    TokenForm,
    TokenParameterForm,
    TokenAnswer,
    Introspection,
    KeySet,
    ServerMetadata,
    AuthorizationForm,
    PushedForm,
    PushedAnswer,
    UserInfo,
    LogoutForm,
    SignInForm,
    ConsentForm,
    ValidateRequest,
    ValidateAnswer,
    BatchRequest,
    BatchAnswer,
    Live,
    Readiness,
)


@functools.cache
def document() -> bytes:
    """The document as JSON, the same from every worker."""
    kinds = [kind for one in OPERATIONS for kind in (one.body, one.answer) if kind is not None]
    components = msgspec.json.schema_components([*_STRUCTS, *kinds], ref_template=_REF)[1]
    paths: dict[str, dict[str, Any]] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, {})[one.method.lower()] = _managed(one)
    for path, item in _doors().items():
        paths.setdefault(path, {}).update(item)
    whole = {
        "openapi": "3.1.0",
        "info": {"title": "Token ledger", "version": software_version()},
        "paths": {path: paths[path] for path in sorted(paths)},
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An access token, PAT or SAT of this ledger with the scope that the call needs.",
                },
                "client": {"type": "http", "scheme": "basic", "description": "Client id and secret: RFC 6749 §2.3.1."},
            },
        },
    }
    return msgspec.json.encode(whole)


def software_version() -> str:
    """Of this program, 0 if it is not installed."""
    try:
        return metadata.version("token-ledger")
    except metadata.PackageNotFoundError:  # run from its sources, not installed
        return "0"


def _ref(kind: Any) -> dict[str, Any]:
    return {"$ref": _REF.format(name=kind.__name__)}


def _response(status: int, kind: Any = None, media_type: str = "application/json") -> dict[str, Any]:
    response: dict[str, Any] = {"description": _STATUS_TEXTS[status]}
    if kind is not None:
        response["content"] = {media_type: {"schema": _ref(kind)}}
    if status in {429, 503}:
        response["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return response


def _problems(*statuses: int) -> dict[str, Any]:
    return {str(status): _response(status, Problem, PROBLEM_JSON) for status in sorted(set(statuses))}


def _managed(one: Operation) -> dict[str, Any]:
    assert one.needs is not None
    statuses = {*_ALWAYS, *one.errors, *(_WITH_BODY if one.body is not None else ()), *((422,) if one.creates else ())}
    scopes = " or ".join(f"`{scope}`" for scope in one.needs)
    members: dict[str, Any] = {
        "operationId": one.handler.__name__,
        "tags": [one.tag],
        "summary": one.summary,
        "description": f"{one.description}\n\nNeeds {scopes}.".strip(),
        "security": [{"bearer": list(one.needs)}],
        "parameters": _parameters(one),
        "responses": {str(one.status): _response(one.status, one.answer)} | _problems(*statuses),
    }
    if one.media_types:
        binary = {"schema": {"type": "string", "format": "binary"}}
        content = members["responses"][str(one.status)].setdefault("content", {})
        content |= dict.fromkeys(one.media_types, binary)
    if one.body is not None:
        types = ("application/json", "application/merge-patch+json") if one.method == "PATCH" else ("application/json",)
        content = {media_type: {"schema": _ref(one.body)} for media_type in types}
        members["requestBody"] = {"required": not one.body_optional, "content": content}
    return members


def _parameters(one: Operation) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    if one.in_path is not None:
        parameters.append({"name": one.in_path, "in": "path", "required": True, "schema": {"type": "string"}})
    if one.query is not Nothing:
        schema = msgspec.json.schema_components([one.query], ref_template=_REF)[1][one.query.__name__]
        for name, member in schema["properties"].items():
            parameter = {"name": name, "in": "query", "required": name in schema.get("required", ()), "schema": member}
            if "description" in member:
                parameter["description"] = member["description"]
            parameters.append(parameter)
    for name, meaning in one.headers:
        schema = {"type": "string"}
        parameters.append({"name": name, "in": "header", "required": False, "description": meaning, "schema": schema})
    if one.creates:
        parameters.append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "description": "For 24 hours the same caller, key and body get the same answer, and nothing is "
                "created again.",
                "schema": {"type": "string", "minLength": 1, "maxLength": 255},
            }
        )
    return parameters


def _door(identity: str, tag: str, summary: str, responses: dict[str, Any], **more: Any) -> dict[str, Any]:
    members = {"operationId": identity, "tags": [tag], "summary": summary, "parameters": [], "security": []}
    return members | more | {"responses": responses}


def _doors() -> dict[str, dict[str, Any]]:
    """The endpoints that are answered before Litestar is asked, and those that anybody may ask."""
    validate_errors = _problems(*_ALWAYS, *_WITH_BODY)
    needs = {"security": [{"bearer": ["ledger:validate"]}]}
    text = {"200": {"description": "Done", "content": {"text/plain": {"schema": {"type": "string"}}}}}
    return {
        "/v1/tokens/validate": {
            "post": _door(
                "validate_token",
                "validation",
                "Say whether a token is good, now, for this",
                {"200": _response(200, ValidateAnswer)} | validate_errors,
                **needs,
                requestBody=_body(ValidateRequest),
            )
        },
        "/v1/tokens/validate-batch": {
            "post": _door(
                "validate_tokens",
                "validation",
                "Say it of up to 1,000 tokens, in the same order",
                {"200": _response(200, BatchAnswer)} | validate_errors,
                **needs,
                requestBody=_body(BatchRequest),
            )
        },
        "/v1/forward-auth": {"get": _forward_auth()},
        "/oauth2/jwks": {
            "get": _door("key_set", "oauth", "The public keys: RFC 7517", {"200": _response(200, KeySet)} | _open())
        },
        "/.well-known/oauth-authorization-server": {
            "get": _door(
                "server_metadata",
                "oauth",
                "What this server can: RFC 8414",
                {"200": _response(200, ServerMetadata)} | _open(),
            )
        },
        "/.well-known/openid-configuration": {
            "get": _door(
                "openid_configuration",
                "oauth",
                "The same, where OpenID Connect Discovery has it",
                {"200": _response(200, ServerMetadata)} | _open(),
            )
        },
        "/health/live": {"get": _door("live", "health", "Say that the process answers", {"200": _response(200, Live)})},
        "/health/ready": {
            "get": _door(
                "ready",
                "health",
                "Say whether validation is answered, and what stands in its way",
                {"200": _response(200, Readiness), "503": _response(503, Readiness)},
            )
        },
        "/metrics": {"get": _door("metrics", "health", "Numbers for Prometheus", text)},
        **_oauth(),
        **_browsers(),
    }


def _open() -> dict[str, Any]:
    return {"503": _response(503, Problem, PROBLEM_JSON)}


def _body(kind: Any, media_type: str = "application/json") -> dict[str, Any]:
    return {"required": True, "content": {media_type: {"schema": _ref(kind)}}}


def _forward_auth() -> dict[str, Any]:
    told = ("X-Token-Subject", "X-Token-Client", "X-Token-Scope", "X-Token-Id")
    headers = {name: {"schema": {"type": "string"}} for name in told}
    return _door(
        "forward_auth",
        "validation",
        "Answer a proxy: let through or not",
        {
            "200": {"description": "Let it through", "headers": headers},
            **_problems(400, 401, 403, 429, 500, 503),
        },
        description="For nginx `auth_request`, Traefik and Envoy. The token is the one of the `Authorization` header. "
        "`audience` is required unless the token has none.",
        security=[{"bearer": []}],
        parameters=[
            {"name": "scope", "in": "query", "required": False, "schema": {"type": "string"}},
            {
                "name": "audience",
                "in": "query",
                "required": False,
                "schema": {"type": "array", "items": {"type": "string"}},
            },
        ],
    )


def _oauth() -> dict[str, dict[str, Any]]:
    errors = {str(status): _response(status, OAuthErrorBody) for status in sorted({*_ALWAYS, *_WITH_BODY})}
    client: dict[str, Any] = {"security": [{"client": []}, {}]}
    openid: dict[str, Any] = {"security": [{"bearer": ["openid"]}]}
    told = {"200": _response(200, UserInfo)} | {name: errors[name] for name in map(str, _ALWAYS)}
    introspect: dict[str, Any] = {"security": [{"client": []}, {"bearer": ["ledger:validate"]}]}

    def post(name: str, title: str, answer: dict[str, Any], form: type, who: dict[str, Any]) -> dict[str, Any]:
        return {"post": _door(name, "oauth", title, answer | errors, **who, requestBody=_body(form, _FORM))}

    return {
        "/oauth2/token": post(
            "issue_access_token",
            "Issue or refresh: RFC 6749 §4.4, §6",
            {"200": _response(200, TokenAnswer)},
            TokenForm,
            client,
        ),
        "/oauth2/par": post(
            "push_authorization_request",
            "Push an authorization request: RFC 9126",
            {"201": _response(201, PushedAnswer)},
            PushedForm,
            client,
        ),
        "/oauth2/userinfo": {
            "get": _door("userinfo", "oauth", "Say who the person is: OpenID Connect Core §5.3", told, **openid),
            "post": _door("userinfo_by_post", "oauth", "The same by POST", told | errors, **openid),
        },
        "/oauth2/introspect": post(
            "introspect",
            "Say what a token is: RFC 7662",
            {"200": _response(200, Introspection)},
            TokenParameterForm,
            introspect,
        ),
        "/oauth2/revoke": post(
            "revoke_access_token",
            "Revoke a token of the client that asks: RFC 7009",
            {"200": _response(200)},
            TokenParameterForm,
            client,
        ),
    }


_PAGE = {"text/html": {"schema": {"type": "string"}}}


def _pages(*statuses: int) -> dict[str, Any]:
    """Answers of doors that people's browsers ask: pages, and redirects."""
    answers = {str(status): _response(status) | ({"content": _PAGE} if status != 303 else {}) for status in statuses}
    if "303" in answers:
        answers["303"]["headers"] = {"Location": {"schema": {"type": "string"}}}
    return answers


def _seen(identity: str, summary: str, *statuses: int, **more: Any) -> dict[str, Any]:
    """A page that is looked at."""
    return _door(identity, "people", summary, _pages(*statuses, 400, 429, 500, 503), **more)


def _sent(identity: str, summary: str, *statuses: int, form: Any = None) -> dict[str, Any]:
    """What a page's form sends, which carries what that page was shown with."""
    body = _body(form, _FORM) if form is not None else {"content": {_FORM: {"schema": {"type": "object"}}}}
    return _seen(identity, summary, *statuses, 403, 408, 413, 415, requestBody=body)


def _in_query(form: Any) -> list[dict[str, Any]]:
    schema = msgspec.json.schema_components([form], ref_template=_REF)[1][form.__name__]
    return [
        {"name": name, "in": "query", "required": name in schema.get("required", ()), "schema": member}
        for name, member in schema["properties"].items()
    ]


def _browsers() -> dict[str, dict[str, Any]]:
    authorize = _seen(
        "authorize",
        "Ask a person to grant access: RFC 6749 §4.1.1",
        200,
        303,
        description="A page for signing in or consenting, or the redirect back to the client.",
        parameters=_in_query(AuthorizationForm),
    )
    by_form = "The same by a form: OpenID Connect Core §3.1.2.1"
    log_out = "Sign out for an app: RP-Initiated Logout 1.0"
    return {
        "/oauth2/authorize": {
            "get": authorize,
            "post": _sent("authorize_by_form", by_form, 303, form=AuthorizationForm),
        },
        "/oauth2/consent": {
            "post": _sent("consent", "Take what a person decided, from the page that asked", 200, 303, form=ConsentForm)
        },
        "/oauth2/logout": {
            "get": _seen("log_out", log_out, 200, 303, parameters=_in_query(LogoutForm)),
            "post": _sent("log_out_by_form", "The same by a form", 303, form=LogoutForm),
        },
        "/sign-in": {
            "get": _seen("sign_in_page", "Show the page for signing in", 200, 303),
            "post": _sent("sign_in", "Take name and password, from the page that asked", 200, 303, form=SignInForm),
        },
        "/sign-out": {
            "get": _seen("sign_out_page", "Show the page for signing out", 200),
            "post": _sent("sign_out", "End the session, from the page that asked", 200, 303),
        },
        "/": {"get": _seen("home", "Go on to the account page", 303)},
        "/account": {
            "get": _seen("account", "Show a person what they allow, their tokens and where they are signed in", 200)
        },
        "/account/tokens": {"post": _sent("issue_own_token", "Issue a personal access token", 303)},
        "/account/tokens/issued": {
            "get": _seen("own_token", "Show the token that was just issued, once", 200, 303, 410)
        },
        "/account/tokens/revoke": {"post": _sent("revoke_own_token", "Revoke one's own token", 303, 404)},
        "/account/apps/withdraw": {"post": _sent("withdraw_own_consent", "Withdraw what an app was allowed", 303, 404)},
        "/account/sessions/end": {"post": _sent("end_own_session", "Sign out of another browser", 303, 404)},
        "/account/sign-out-everywhere": {
            "post": _sent("sign_out_everywhere", "End every session of one's own", 200, 303)
        },
    }
