"""The refresh of a grant: RFC 6749 §6 with rotation, RFC 9700 §4.14.2, that signs nobody out by accident.

A confidential client may do without rotation: then its refresh token stays, and only an access token is new.

The answer is sealed under a key derived from the presented token and stored before the append that names it. Whoever
presents the same token again within the window gets the same answer; a crash between the two steps changes nothing;
and nothing at rest can be opened by the service.
"""

from __future__ import annotations

import json
from datetime import timedelta

from msgspec import Struct
from msgspec.structs import replace

from events.errors import Conflict, LedgerError
from events.ledger import Append
from events.types import Kind, MintedToken
from projections.grants import ActiveGrant, Family, RefreshChain, facts
from projections.registry import Client
from service.commands import load_family, refused, subject
from service.errors import InvalidGrant, Unavailable
from service.grants import AccessFor, check_stands, mint_access, minted_token, stamp, whole_second
from service.keys import derive, seal, unseal
from service.oauth.codes import narrowed_audience, remaining_scope
from service.oauth.identity import id_token, person_behind
from service.rules.grants import (
    AnsweredAgain,
    Refresh,
    check_refreshable,
    decide_refresh,
    decide_renew,
)
from service.runtime import Runtime
from service.tokens import mint_kind, sha256, uuid7_hex

ATTEMPTS_MAX = 12
_NOT_VALID = "the refresh token is not valid, has expired, was revoked or is not this client's"
_PURPOSE = "refresh answer"


class Presentation(Struct, frozen=True, kw_only=True):
    """A refresh token as a client presents it. `scope`, `resources`: what is asked of the grant, empty for all."""

    client: Client
    token: str
    scope: str | None
    resources: tuple[str, ...]
    request_id: str


async def refresh(runtime: Runtime, presented: Presentation) -> bytes:
    """The JSON of the token response, RFC 6749 §5.1.

    Raises: InvalidGrant, InvalidScope, InvalidTarget, Unavailable.
    """
    digest = sha256(presented.token)
    hit, _ = runtime.view.look_up(digest)
    if hit is None:
        await runtime.view_at_end()
        hit, _ = runtime.view.look_up(digest)
    if hit is None or hit.token.kind is not Kind.REFRESH:
        raise InvalidGrant(_NOT_VALID, private="unknown")
    grant_id, token_id = "grt_" + hit.token.grant_id.hex(), hit.token_id
    try:
        for attempt in range(ATTEMPTS_MAX):
            family = await load_family(runtime, grant_id, (token_id,), fresh=attempt > 0)
            command = Refresh(
                stamp=stamp(presented.client.client_id, presented.request_id, events=2),
                grant_id=grant_id,
                token_id=token_id,
                client_id=presented.client.client_id,
                tokens=(),
                answer_id=uuid7_hex(),
                retry_window=timedelta(seconds=runtime.settings.refresh_retry_window_seconds),
            )
            grant, chain = _check(runtime, command, family)
            check_stands(runtime, presented.client)
            if chain.current == token_id and not _rotates(presented.client):
                return await _renew(runtime, presented, command, grant, chain)
            if chain.current == token_id:
                answer = await _spend(runtime, presented, command, grant, chain, family.seq)
            elif attempt > 0:
                answer = await _repeat(runtime, presented, command, chain, family.seq)
            else:
                continue  # whether the successor is still unused, only the log itself can say
            if answer is not None:
                return answer
    except LedgerError as error:
        raise refused(error) from error
    raise Unavailable("too many refreshes race for one grant at this moment")


def _check(runtime: Runtime, command: Refresh, family: Family) -> tuple[ActiveGrant, RefreshChain]:
    known = facts(family.grant)
    of_subject = known is not None and known.subject != command.client_id
    return check_refreshable(
        command,
        family,
        client_cut=runtime.view.cut(command.client_id),
        subject_cut=runtime.view.cut(known.subject) if known is not None and of_subject else None,
        person=person_behind(runtime, known),
    )


def _rotates(client: Client) -> bool:
    """Whoever cannot prove who they are must take a new token every time: RFC 9700 §2.2.2."""
    return client.metadata.refresh_token_rotation or client.metadata.token_endpoint_auth_method == "none"


async def _access(
    runtime: Runtime, presented: Presentation, command: Refresh, grant: ActiveGrant
) -> tuple[dict[str, object], MintedToken]:
    """The answer without a refresh token, and its access token as the ledger keeps it.

    Raises: InvalidScope, InvalidTarget, LedgerError.
    """
    # What the client may no longer have, or nobody may, a refresh gives no more; the grant itself stays as it was.
    client, at = presented.client, command.stamp.at
    scope = remaining_scope(runtime, client, grant, presented.scope)
    about = AccessFor(command.grant_id, grant.subject, scope, narrowed_audience(grant, presented.resources))
    access, minted = await mint_access(runtime, client, about, at)
    answer: dict[str, object] = {
        "access_token": access,
        "token_type": "Bearer",
        "expires_in": client.metadata.access_token_ttl_seconds,
        "scope": scope,
    }
    identity = await id_token(runtime, client, grant, scope=scope, access_token=access, nonce=None)
    return (answer if identity is None else answer | {"id_token": identity}), minted


async def _renew(
    runtime: Runtime, presented: Presentation, command: Refresh, grant: ActiveGrant, chain: RefreshChain
) -> bytes:
    """The refresh token stays. Any number may come at once; what is behind a revocation in the log is revoked."""
    answer, minted = await _access(runtime, presented, command, grant)
    event = decide_renew(replace(command, tokens=(minted,)), chain)
    await runtime.ledger.append(Append(subject("grant", command.grant_id), event))
    return json.dumps(answer, separators=(",", ":")).encode()


async def _spend(  # noqa: PLR0917 - one step of `refresh`
    runtime: Runtime,
    presented: Presentation,
    command: Refresh,
    grant: ActiveGrant,
    chain: RefreshChain,
    expected: int,
) -> bytes | None:
    """Rotates; None when another presentation was first."""
    answer, minted = await _access(runtime, presented, command, grant)
    token = mint_kind(Kind.REFRESH)
    idle = whole_second(command.stamp.at) + timedelta(seconds=chain.idle_ttl_seconds)
    successor = minted_token(token, Kind.REFRESH, grant.scope, grant.audience, min(idle, chain.ends_at))
    body = json.dumps(answer | {"refresh_token": token}, separators=(",", ":")).encode()
    sealed = seal(derive(presented.token.encode(), _PURPOSE), body, command.grant_id)
    await runtime.answers.put(command.answer_id, sealed)
    decision = decide_refresh(replace(command, tokens=(minted, successor)), chain)
    try:
        of = subject("grant", command.grant_id)
        await runtime.ledger.append(*(Append(of, event, expected) for event in decision.events))
    except Conflict:
        return None
    return body


async def _repeat(
    runtime: Runtime, presented: Presentation, command: Refresh, chain: RefreshChain, expected: int
) -> bytes | None:
    """Answers a spent token again, or ends its grant; None when the log has moved on. Raises: InvalidGrant."""
    decision = decide_refresh(command, chain)
    of = subject("grant", command.grant_id)
    if isinstance(decision, AnsweredAgain):
        sealed = await runtime.answers.get(decision.answer_id)
        opened = unseal(derive(presented.token.encode(), _PURPOSE), sealed or b"", command.grant_id)
        if opened is None:
            raise InvalidGrant(_NOT_VALID, private="the sealed answer is gone")
        # Any number may come at once, and none of them changes the state: no expectation.
        await runtime.ledger.append(*(Append(of, event) for event in decision.events))
        return opened
    try:
        seqs = await runtime.ledger.append(*(Append(of, event, expected) for event in decision.events))
    except Conflict:
        return None
    await runtime.applied(seqs[-1])
    raise InvalidGrant(_NOT_VALID, private="reused")
