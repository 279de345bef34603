"""Parameters of the OAuth endpoints, and which client sent them. RFC 6749 §2.3, §3.2 and App. B."""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
from collections.abc import Mapping
from datetime import datetime
from urllib.parse import unquote_to_bytes

import msgspec

from events.errors import LedgerError
from events.types import ClientMetadata
from projections.registry import Client, Secret
from projections.tables import DECODERS
from service.commands import refused
from service.errors import InvalidClient, InvalidRequest, InvalidScope, ServiceError
from service.incoming import Incoming, parse_form
from service.runtime import Runtime
from service.tokens import now, sha256
from service.validation import SCOPE_SYNTAX

_REPEATABLE = frozenset({"resource"})  # RFC 8707 §2
_CLIENT_ID = re.compile(r"[\x20-\x7e]{1,256}")  # RFC 6749 App. A.1
FORM = "application/x-www-form-urlencoded"
_NOBODYS = (Secret(secrets.token_hex(32)),)  # a hash of no secret
# A row of the view, as those of clients are: so that a client that is unknown takes as long as another.
_NOBODY = msgspec.msgpack.encode(
    Client(
        client_id="cli_" + "0" * 32,
        metadata=ClientMetadata(
            client_name="Nobody's application",
            grant_types=("authorization_code", "refresh_token"),
            response_types=("code",),
            redirect_uris=("https://nobody.example/callback",),
            scope="openid profile email offline_access",
            token_endpoint_auth_method="client_secret_basic",
            access_token_format="jwt",
            access_token_ttl_seconds=3_600,
            refresh_token_idle_ttl_seconds=3_600,
            refresh_token_max_ttl_seconds=3_600,
            audience=(),
            may_introspect=False,
        ),
        secrets=_NOBODYS,
        registered_at=now(),
        seq=0,
    )
)


class Form:
    """The parameters of one request. Empty values count as absent: RFC 6749 §3.2."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self._values: dict[str, str] = {}
        self.resources: tuple[str, ...] = ()
        for name, value in pairs:
            if name in _REPEATABLE:
                self.resources += (value,) if value else ()
            elif name in self._values:
                raise InvalidRequest(f"the parameter {_printable(name)} is repeated")
            else:
                self._values[name] = value

    def get(self, name: str) -> str | None:
        return self._values.get(name) or None

    def need(self, name: str) -> str:
        """Raises: InvalidRequest."""
        value = self.get(name)
        if value is None:
            raise InvalidRequest(f"the parameter {name} is missing")
        return value

    def scope(self) -> str | None:
        """Raises: InvalidScope for characters that a scope cannot hold."""
        value = self.get("scope")
        if value is not None and not SCOPE_SYNTAX.fullmatch(value):
            raise InvalidScope("a scope is printable ASCII without quote and backslash, names separated by one space")
        return value


async def read_form(runtime: Runtime, incoming: Incoming) -> Form:
    """The body's parameters. Secrets are never taken from the query. Raises: InvalidRequest and its kin."""
    return Form(await read_pairs(runtime, incoming))


async def read_pairs(runtime: Runtime, incoming: Incoming) -> list[tuple[str, str]]:
    """The body's parameters as they came, in order. Raises: as `read_form`."""
    content_type = (incoming.header("content-type") or "").lower()
    kind, _, parameters = content_type.partition(";")
    charset = parameters.strip().replace('"', "")
    if kind.strip() != FORM or (charset and charset != "charset=utf-8"):
        raise InvalidRequest(f"send the parameters as {FORM} in UTF-8")
    if incoming.query_string:
        raise InvalidRequest("send the parameters in the body and none in the query")
    settings = runtime.settings
    return parse_form(await incoming.body(settings.request_body_bytes_max, settings.request_seconds_max))


async def authenticate_client(runtime: Runtime, incoming: Incoming, form: Form, *, public: bool) -> Client:
    """The client that sent the request, by Basic or by parameters; one without a secret only where `public`.

    Unknown client and wrong secret are told apart by nothing: same answer, same work.

    Raises: InvalidClient, InvalidRequest, TooManyRequests, Unavailable.
    """
    client_id, secret = _credentials(incoming, form)
    ip = incoming.client_ip(runtime.settings) or ""
    runtime.client_failures.check(client_id, ip)
    moment = now()
    # Whoever was disabled, or whose secret was replaced, while the view stood still gets nothing.
    runtime.check_fresh(runtime.view.freshness())
    client, refusal = _look(runtime, client_id, secret, moment, public=public)
    if refusal is not None:
        # Registered or given a new secret a moment ago, perhaps on another host.
        try:
            await runtime.view_at_end()
        except LedgerError as error:
            raise refused(error) from error
        client, refusal = _look(runtime, client_id, secret, moment, public=public)
    if client is None or refusal is not None:
        runtime.client_failures.count(client_id, ip)
        # Whose secret was tried: named, not proven. What is no client's id may be anything and is not recorded.
        named = client.client_id if client is not None else ""
        runtime.usage.count_refused(caller=named, ip=ip or None, outcome="invalid_client", endpoint="client")
        raise InvalidClient(private=f"client {_printable(client_id)}: {refusal if named else 'unknown'}")
    return client


def _look(
    runtime: Runtime, client_id: str, secret: str | None, moment: datetime, *, public: bool
) -> tuple[Client | None, str | None]:
    """The client of this name, and why it is refused. Nobody is read and compared as somebody is."""
    client = runtime.view.client(client_id)
    return client, _refusal(client or DECODERS["client"](_NOBODY), secret, moment, public=public)


def _credentials(incoming: Incoming, form: Form) -> tuple[str, str | None]:
    headers = incoming.header_values("authorization")
    body_id, body_secret = form.get("client_id"), form.get("client_secret")
    if body_id is not None and not _CLIENT_ID.fullmatch(body_id):
        raise InvalidClient(private="client_id with other characters than printable ASCII")
    if not headers:
        if body_id is None:
            raise InvalidClient("client authentication is missing")
        return body_id, body_secret
    if len(headers) > 1:
        raise InvalidRequest("send one Authorization header")
    client_id, secret = _basic(headers[0])
    if body_secret is not None:
        raise InvalidRequest("send the client's credentials in one way, not in two")
    if body_id is not None and body_id != client_id:
        raise InvalidRequest("client_id differs from the client of the Authorization header")
    return client_id, secret


def _basic(header: str) -> tuple[str, str]:
    """Source: RFC 7617 §2; id and secret are form-encoded inside: RFC 6749 §2.3.1. Raises: InvalidClient."""
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic" or len(encoded) > 4096:
        raise InvalidClient(private="no Basic credentials")
    try:
        decoded = base64.b64decode(encoded.strip(" "), validate=True)
        client_id, colon, secret = decoded.partition(b":")
        parts = [unquote_to_bytes(part.replace(b"+", b" ")).decode() for part in (client_id, secret)]
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise InvalidClient(private="malformed Basic credentials") from None
    if not colon or not _CLIENT_ID.fullmatch(parts[0]):
        raise InvalidClient(private="malformed Basic credentials")
    return parts[0], parts[1]


def _refusal(client: Client, secret: str | None, moment: datetime, *, public: bool) -> str | None:
    """Why the request is not this client's, for the log, or None."""
    presented = sha256(secret or "").hex()
    proven = False
    # Every secret is compared, in constant time, whether one has matched already or not; nobody's, if it has none.
    for kept in client.secrets or _NOBODYS:
        live = kept.ends_at is None or moment < kept.ends_at
        proven |= hmac.compare_digest(presented, kept.sha256) and live
    if client.disabled_at is not None:
        return "disabled"
    if client.metadata.token_endpoint_auth_method == "none":
        if secret is not None:
            return "a public client has no secret"
        return None if public else "a public client cannot authenticate"
    return None if proven and secret is not None else "wrong secret"


def _printable(text: str) -> str:
    return re.sub(r"[^\x21-\x7e]|[\"\\]", "?", text)[:64]


def oauth_error(error: ServiceError) -> Mapping[str, str]:
    """The members of RFC 6749 §5.2. A description holds only what §5.2 allows."""
    code = "temporarily_unavailable" if error.status == 503 else error.code
    members = {"error": code}
    description = re.sub(r"[^\x20\x21\x23-\x5b\x5d-\x7e]", "?", error.detail)
    if description:
        members["error_description"] = description
    return members
