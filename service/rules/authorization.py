"""What an authorization request must be. Pure: parameters and what is registered come in, a request or a refusal out.

Sources: RFC 6749 §4.1.1, RFC 7636, RFC 8252 §7.3, RFC 8707, RFC 9126, RFC 9207, RFC 9700 §2.1, OpenID Connect Core
§3.1.2.1 and §3.3.2. `display`, `ui_locales`, `claims_locales`, `acr_values` and `claims` may be ignored by their
specification, and are.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime, timedelta
from urllib.parse import quote, urlencode, urlsplit

from msgspec import Struct

from projections.registry import Client
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
    Target,
    TargetNotAllowed,
    UnknownClient,
    UnreadableRequest,
    UnregisteredRedirectUri,
)
from service.validation import SCOPE_SYNTAX

RESPONSE_TYPES = ("code", "code id_token")
RESPONSE_MODES = ("query", "fragment", "form_post")
CODE_CHALLENGE_METHODS = ("S256",)
PROMPTS = ("none", "login", "consent", "select_account")
REQUEST_URI_PREFIX = "urn:ietf:params:oauth:request_uri:"
OFFLINE_ACCESS = "offline_access"

# What is read of a request; of one that is pushed nothing else is kept.
PARAMETERS = frozenset(
    {
        *("client_id", "redirect_uri", "response_type", "response_mode", "scope", "state", "nonce", "resource"),
        *("code_challenge", "code_challenge_method", "prompt", "max_age", "login_hint", "id_token_hint"),
        *("request", "request_uri", "registration"),
    }
)

REQUEST_CHARS_MAX = 8_192  # as a query, which must fit with all headers into what the server reads of them
STATE_CHARS_MAX = 4_096
NONCE_CHARS_MAX = 512
HINT_CHARS_MAX = 256
ID_TOKEN_CHARS_MAX = 4_096

# 32 bytes in base64url are 43 characters, of which the last holds four bits: RFC 7636 §4.2, App. A.
_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")
_LOOPBACK = re.compile(r"http://(127\.0\.0\.1|\[::1\]|localhost)(?::([0-9]{1,5}))?((?:[/?].*)?)", re.DOTALL)
_REPEATABLE = "resource"


class Parameters:
    """The parameters of one request by name. Empty values count as absent: RFC 6749 §3.1."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._values: dict[str, str] = {}
        self.repeated: set[str] = set()
        self.resources: tuple[str, ...] = ()
        for name, value in pairs:
            if name == _REPEATABLE:
                self.resources += (value,) if value else ()
            elif name in self._values:
                self.repeated.add(name)
            else:
                self._values[name] = value

    def get(self, name: str) -> str | None:
        """None as well for one that came twice."""
        return None if name in self.repeated else self._values.get(name) or None

    def query(self, without: Collection[str] = ()) -> str:
        """All of them, as a query."""
        pairs = [(name, value) for name, value in self._values.items() if name not in without]
        return urlencode([*pairs, *((_REPEATABLE, one) for one in self.resources)], quote_via=quote)


class AuthorizationRequest(Struct, frozen=True, kw_only=True):
    """A request that may be put before a person.

    `scope`: what is asked for of what the client has; None asks for all. `max_age_seconds`: how long ago the person may
    have signed in at most.
    """

    target: Target
    response_type: str
    scope: str | None
    code_challenge: str
    resources: tuple[str, ...] = ()
    nonce: str | None = None
    prompts: frozenset[str] = frozenset()
    max_age_seconds: int | None = None
    login_hint: str | None = None
    id_token_hint: str | None = None

    @property
    def silent(self) -> bool:
        """The person may not be asked anything."""
        return "none" in self.prompts


def parse(
    parameters: Parameters, client: Client | None, held: Collection[str], issuer: str, *, pushed: bool = False
) -> AuthorizationRequest:
    """The request. `held`: the scope names that the client has. `pushed`: it came by RFC 9126.

    Raises: PageError; RedirectError, with its target.
    """
    client, target = target_of(parameters, client)
    try:
        _refuse_unsupported(parameters, client, pushed=pushed)
        response_type = _response_type(parameters, client)
        _check_response_mode(parameters, response_type)
        challenge = _challenge(parameters)
        scope = _scope(parameters, client, held)
        nonce = _short(parameters, "nonce", NONCE_CHARS_MAX)
        _check_openid(response_type, scope, nonce, held)
        return AuthorizationRequest(
            target=target,
            response_type=response_type,
            scope=scope,
            code_challenge=challenge,
            resources=_resources(parameters, client, issuer),
            nonce=nonce,
            prompts=_prompts(parameters),
            max_age_seconds=_max_age(parameters),
            login_hint=_hint(parameters),
            id_token_hint=_short(parameters, "id_token_hint", ID_TOKEN_CHARS_MAX),
        )
    except RedirectError as error:
        error.target = target
        raise


def target_of(parameters: Parameters, client: Client | None) -> tuple[Client, Target]:
    """Where every answer goes, success or error. Raises: PageError."""
    for name in ("client_id", "redirect_uri"):
        if name in parameters.repeated:
            raise UnreadableRequest(f"the parameter {name} may be given once only")
    if client is None or client.disabled_at is not None:
        named = parameters.get("client_id") is not None
        missing = "the application does not say which one it is: client_id is missing"
        raise UnknownClient("no application is registered under this client_id" if named else missing)
    uri = parameters.get("redirect_uri")
    if uri is None:
        raise UnregisteredRedirectUri("the application does not say where to go afterwards: redirect_uri is missing")
    if not any(matches(registered, uri) for registered in client.metadata.redirect_uris):
        raise UnregisteredRedirectUri("the redirect_uri is not one that the application has registered")
    state = parameters.get("state")
    if state is not None and len(state) > STATE_CHARS_MAX:
        state = None
    return client, Target(client.client_id, uri, _mode_of_answer(parameters), state)


def matches(registered: str, presented: str) -> bool:
    """Whether the redirect URI is the registered one, to the letter, but for the port of a loopback address.

    Source: RFC 9700 §2.1, §4.1.3; RFC 8252 §7.3.
    """
    if registered == presented:
        return True
    ours, theirs = _LOOPBACK.fullmatch(registered), _LOOPBACK.fullmatch(presented)
    if ours is None or theirs is None or (theirs[2] and not 0 < int(theirs[2]) < 65_536):
        return False
    return (ours[1], ours[3]) == (theirs[1], theirs[3])


def is_of_native_app(client: Client, redirect_uri: str) -> bool:
    """Whether any program of the person's device might receive the answer in the client's name.

    It cannot prove who it is, so that consent once given to the client says nothing about it. Source: RFC 8252 §8.6.
    """
    public = client.metadata.token_endpoint_auth_method == "none"
    return public and not redirect_uri.startswith("https:")


def _mode_of_answer(parameters: Parameters) -> str:
    """As asked, if it can be; else as the response type has it. Source: OAuth Multiple Response Types §2.1, §5."""
    kinds = (parameters.get("response_type") or "").split(" ")
    in_front = "token" in kinds or "id_token" in kinds
    asked = parameters.get("response_mode")
    if asked in RESPONSE_MODES and not (asked == "query" and in_front):
        return asked
    return "fragment" if in_front else "query"


def _refuse_unsupported(parameters: Parameters, client: Client, *, pushed: bool) -> None:
    if parameters.repeated:
        raise InvalidParameter(f"repeated: {_printable(min(parameters.repeated))}")
    if parameters.get("request") is not None:
        raise RequestUnsupported("request objects are not read; push the request instead (RFC 9126)")
    if parameters.get("request_uri") is not None:
        raise RequestUriUnsupported("only a request_uri that was pushed here is known (RFC 9126)")
    if parameters.get("registration") is not None:
        raise RegistrationUnsupported("register the client first")
    if client.metadata.require_pushed_authorization_requests and not pushed:
        raise InvalidParameter("the client has registered that it pushes its requests (RFC 9126)")
    if len(parameters.get("state") or "") > STATE_CHARS_MAX:
        raise InvalidParameter(f"state is longer than {STATE_CHARS_MAX} characters, and is not given back")


def _response_type(parameters: Parameters, client: Client) -> str:
    given = parameters.get("response_type")
    if given is None:
        raise InvalidParameter("response_type is missing")
    kinds = given.split(" ")
    found = next((one for one in RESPONSE_TYPES if sorted(one.split()) == sorted(kinds)), None)  # RFC 6749 §3.1.1
    if found is None:
        raise ResponseTypeUnsupported(f"the response types are: {', '.join(RESPONSE_TYPES)}")
    if found not in client.metadata.response_types:
        raise ResponseTypeNotAllowed("the client is not registered for this response type")
    return found


def _check_response_mode(parameters: Parameters, response_type: str) -> None:
    asked = parameters.get("response_mode")
    if asked is not None and asked not in RESPONSE_MODES:
        raise InvalidParameter(f"the response modes are: {', '.join(RESPONSE_MODES)}")
    if asked == "query" and response_type != "code":
        raise InvalidParameter("an ID token is never given back in a query")


def _challenge(parameters: Parameters) -> str:
    """Source: RFC 7636 §4.3, §4.4.1; without a method it would be `plain`, which is not taken."""
    challenge = parameters.get("code_challenge")
    if challenge is None:
        raise InvalidParameter("code_challenge is missing: PKCE (RFC 7636) is required")
    if parameters.get("code_challenge_method") not in CODE_CHALLENGE_METHODS:
        raise InvalidParameter("code_challenge_method must be S256")
    if not _CHALLENGE.fullmatch(challenge):
        raise InvalidParameter(
            "code_challenge is no SHA-256 in base64url without padding: 43 characters, the last of them for 4 bits"
        )
    return challenge


def _scope(parameters: Parameters, client: Client, held: Collection[str]) -> str | None:
    scope = parameters.get("scope")
    if scope is None:
        return None
    if not SCOPE_SYNTAX.fullmatch(scope):
        raise ScopeNotAllowed("a scope is printable ASCII, its names separated by one space each")
    names = dict.fromkeys(scope.split(" "))
    missing = [name for name in names if name not in held]
    if missing:
        raise ScopeNotAllowed(f"the client may not ask for: {' '.join(missing)[:200]}")
    if "refresh_token" not in client.metadata.grant_types:
        names.pop(OFFLINE_ACCESS, None)  # OpenID Connect Core §11: ignored where it means nothing
    return " ".join(names)


def _check_openid(response_type: str, scope: str | None, nonce: str | None, held: Collection[str]) -> None:
    """Source: OpenID Connect Core §3.3.2.1, §3.3.2.11."""
    if response_type == "code":
        return
    if "openid" not in (held if scope is None else scope.split()):
        raise InvalidParameter("an ID token needs the scope openid")
    if nonce is None:
        raise InvalidParameter("an ID token in the answer needs a nonce")


def _resources(parameters: Parameters, client: Client, issuer: str) -> tuple[str, ...]:
    allowed = client.metadata.audience or (issuer,)
    if any(name not in allowed for name in parameters.resources):
        raise TargetNotAllowed("the client may not ask for tokens for this resource")
    return tuple(dict.fromkeys(parameters.resources))


def _prompts(parameters: Parameters) -> frozenset[str]:
    """Source: OpenID Connect Core §3.1.2.1; unknown ones: Initiating User Registration §4.1."""
    given = frozenset((parameters.get("prompt") or "").split())
    if not given <= set(PROMPTS):
        raise InvalidParameter(f"prompt may be: {', '.join(PROMPTS)}")
    if "none" in given and len(given) > 1:
        raise InvalidParameter("prompt=none stands alone")
    return given


def _max_age(parameters: Parameters) -> int | None:
    given = parameters.get("max_age")
    if given is None:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", given):
        raise InvalidParameter("max_age is a number of seconds")
    return int(given)


def _hint(parameters: Parameters) -> str | None:
    hint = parameters.get("login_hint")
    return hint if hint is not None and len(hint) <= HINT_CHARS_MAX and hint.isprintable() else None


def _short(parameters: Parameters, name: str, chars_max: int) -> str | None:
    value = parameters.get(name)
    if value is not None and len(value) > chars_max:
        raise InvalidParameter(f"{name} is longer than {chars_max} characters")
    return value


def _printable(text: str) -> str:
    return re.sub(r"[^\x21-\x7e]|[\"\\]", "?", text)[:64]


def needs_sign_in(
    request: AuthorizationRequest, auth_time: datetime, now: datetime, *, pushed_at: datetime | None = None
) -> bool:
    """Whether a person who signed in at `auth_time` must do so again. Source: OpenID Connect Core §3.1.2.1.

    Who signed in since the request was pushed has done so for it.
    """
    if pushed_at is not None and auth_time >= pushed_at:
        return False
    if request.prompts & {"login", "select_account"} or request.max_age_seconds == 0:
        return True
    return request.max_age_seconds is not None and now - auth_time > timedelta(seconds=request.max_age_seconds)


def after_sign_in(query: Parameters) -> str:
    """The request as it goes on once the person has signed in for it, as a query: that is not asked for again."""
    prompts = [one for one in (query.get("prompt") or "").split() if one not in {"login", "select_account"}]
    rest = query.query(without={"prompt", "max_age"})
    return f"{rest}&{urlencode({'prompt': ' '.join(prompts)}, quote_via=quote)}" if prompts else rest


def location(target: Target, members: Mapping[str, str]) -> str:
    """The redirect URI with the answer, in its query or its fragment. Source: RFC 6749 §4.1.2."""
    answer = urlencode(members, quote_via=quote)
    if target.response_mode == "fragment":
        return f"{target.redirect_uri}#{answer}"
    separator = "" if target.redirect_uri.endswith("?") else "&" if urlsplit(target.redirect_uri).query else "?"
    return f"{target.redirect_uri}{separator}{answer}"


__all__ = [
    "CODE_CHALLENGE_METHODS",
    "PROMPTS",
    "REQUEST_URI_PREFIX",
    "RESPONSE_MODES",
    "RESPONSE_TYPES",
    "AuthorizationRequest",
    "PageError",
    "Parameters",
    "RedirectError",
    "Target",
    "after_sign_in",
    "is_of_native_app",
    "location",
    "matches",
    "needs_sign_in",
    "parse",
    "target_of",
]
