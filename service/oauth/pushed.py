"""Pushed authorization requests: RFC 9126.

What was pushed is kept sealed under a key that only the request_uri yields, so that nothing at rest can be read. It is
spent by the code that it ends in, and what was spent stays known until it would have expired.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from events.errors import LedgerError
from projections.grants import AuthorizedGrant
from projections.registry import Client
from service.commands import expand, known_scopes, refused
from service.errors import OAuthInvalidRequest, UnauthorizedClient
from service.incoming import Incoming
from service.keys import derive, seal, unseal
from service.oauth.forms import Form, authenticate_client, read_pairs
from service.outgoing import NO_STORE, Response
from service.rules.authorization import PARAMETERS, REQUEST_CHARS_MAX, REQUEST_URI_PREFIX, Parameters, parse
from service.rules.refusals import UnknownRequestUri
from service.rules.registry import LEDGER_SCOPES
from service.runtime import Runtime
from service.tokens import now, random_base62, sha256

_ATTEMPTS_MAX = 12
_REPEATED_SECONDS_MAX = 10.0  # who clicks twice is answered twice
_UNKNOWN = "the request was never made here, was used already or has expired"


class Pushed(Struct, frozen=True):
    """What was pushed, since when it is spent, in which session, and for which codes (SHA-256, hex)."""

    client_id: str
    pushed_at: datetime
    pairs: list[tuple[str, str]]
    spent_at: datetime | None = None
    session_id: str | None = None
    codes: tuple[str, ...] = ()


class Loaded(Struct, frozen=True):
    """As it stood in the bucket at this revision."""

    pushed: Pushed
    request_uri: str
    revision: int


_decode = msgspec.json.Decoder(Pushed).decode


async def push(runtime: Runtime, incoming: Incoming) -> Response:
    """`POST /oauth2/par`. Refuses what the authorization endpoint would refuse. Raises: OAuthError and its kin."""
    pairs = await read_pairs(runtime, incoming)
    form = Form(pairs)
    client = await authenticate_client(runtime, incoming, form, public=True)
    if "authorization_code" not in client.metadata.grant_types:
        raise UnauthorizedClient("the client is not registered for authorization_code")
    runtime.pushes.take(client.client_id, incoming.client_network(runtime.settings))
    if client.metadata.token_endpoint_auth_method == "none":
        runtime.pushes_unproven.take(client.client_id)  # anybody can name it, from anywhere
    if form.get("request_uri") is not None:
        raise OAuthInvalidRequest("a pushed request holds no request_uri (RFC 9126, section 2.1)")
    kept = [(name, value) for name, value in pairs if name in PARAMETERS and name != "client_id"]
    kept.append(("client_id", client.client_id))
    parameters = Parameters(kept)
    if len(parameters.query()) > REQUEST_CHARS_MAX:
        raise OAuthInvalidRequest(f"the request is longer than {REQUEST_CHARS_MAX} characters")
    parse(parameters, client, held_by(runtime, client), runtime.settings.issuer, pushed=True)
    request_uri = REQUEST_URI_PREFIX + random_base62()
    name, key = _name_and_key(request_uri)
    try:
        await runtime.pushed.create(name, _sealed(key, Pushed(client.client_id, now(), kept), name))
    except LedgerError as error:
        raise refused(error) from error
    answer = {"request_uri": request_uri, "expires_in": runtime.settings.pushed_request_ttl_seconds}
    return Response(201, msgspec.json.encode(answer), NO_STORE)


def held_by(runtime: Runtime, client: Client) -> frozenset[str]:
    """The scope names that the client may ask people for: never the ledger's own, which only who manages it grants."""
    scopes = known_scopes(runtime)
    disabled = {name for name, row in scopes.items() if row.disabled_at is not None}
    return frozenset(expand(scopes, client.metadata.scope).split()) - disabled - LEDGER_SCOPES


async def load(runtime: Runtime, request_uri: str, client_id: str, *, begun: bool, session_id: str | None) -> Loaded:
    """What this client pushed. `begun`: the person was asked in time.

    One session may come again at once, as by a double click, until the client has used what it was answered.

    Raises: UnknownRequestUri, one error for all; Unavailable.
    """
    name, key = _name_and_key(request_uri)
    try:
        entry = await runtime.pushed.entry(name)
    except LedgerError as error:
        raise refused(error) from error
    opened = unseal(key, entry[0], name) if entry is not None else None
    if entry is None or opened is None:
        raise UnknownRequestUri(_UNKNOWN, private="unknown")
    pushed, moment = _decode(opened), now()
    lifetime = timedelta(seconds=runtime.settings.pushed_request_ttl_seconds)
    if pushed.client_id != client_id:
        raise UnknownRequestUri(_UNKNOWN, private="another client's")
    if not begun and moment >= pushed.pushed_at + lifetime:
        raise UnknownRequestUri(_UNKNOWN, private="expired")
    if pushed.spent_at is not None:
        again = session_id is not None and session_id == pushed.session_id and not await _is_used(runtime, pushed)
        if not again or moment - pushed.spent_at > timedelta(seconds=_REPEATED_SECONDS_MAX):
            raise UnknownRequestUri(_UNKNOWN, private="spent")
    return Loaded(pushed, request_uri, entry[1])


async def _is_used(runtime: Runtime, pushed: Pushed) -> bool:
    """Whether a code that it ended in was redeemed. Raises: Unavailable."""
    await runtime.view_at_end()
    grants = [runtime.view.grant_of_code(bytes.fromhex(digest)) for digest in pushed.codes]
    found = [runtime.view.family(grant_id).grant for grant_id in grants if grant_id is not None]
    return not all(isinstance(grant, AuthorizedGrant) for grant in found)


async def spend(runtime: Runtime, loaded: Loaded, session_id: str, code: str) -> None:
    """Before the code is told, so that of two sessions one is. Raises: UnknownRequestUri, Unavailable."""
    name, key = _name_and_key(loaded.request_uri)
    for _ in range(_ATTEMPTS_MAX):
        pushed = loaded.pushed
        codes = tuple(dict.fromkeys([*pushed.codes, sha256(code).hex()]))
        spent = replace(pushed, spent_at=pushed.spent_at or now(), session_id=session_id, codes=codes)
        try:
            won = await runtime.pushed.update(name, _sealed(key, spent, name), loaded.revision)
        except LedgerError as error:
            raise refused(error) from error
        if won:
            return
        loaded = await load(runtime, loaded.request_uri, pushed.client_id, begun=True, session_id=session_id)
    raise UnknownRequestUri(_UNKNOWN, private="raced too often")


def _name_and_key(request_uri: str) -> tuple[str, bytes]:
    secret = request_uri.removeprefix(REQUEST_URI_PREFIX).encode(errors="replace")
    return derive(secret, "pushed request name").hex(), derive(secret, "pushed request")


def _sealed(key: bytes, pushed: Pushed, name: str) -> bytes:
    return seal(key, msgspec.json.encode(pushed), name)
