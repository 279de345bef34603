"""Authorization codes: made for the authorization endpoint, redeemed at the token endpoint. RFC 6749 §4.1."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta

from msgspec import Struct

from events.errors import Conflict, LedgerError
from events.ledger import Append
from events.types import Kind, MintedToken
from projections.grants import ActiveGrant, AuthorizedGrant, facts
from projections.registry import Client
from service.commands import expand, known_scopes, load_family, refused, subject
from service.errors import InvalidTarget, Unavailable
from service.grants import AccessFor, check_stands, mint_access, minted_token, seal_text, stamp, whole_second
from service.oauth.identity import id_token, person_behind
from service.rules.codes import (
    CODE_TTL_SECONDS,
    Authorize,
    Exchange,
    Fresh,
    Redeem,
    Refused,
    Replayed,
    Spent,
    check_verifier,
    decide_authorize,
    decide_redeem,
    invalid_code,
    judge_code,
    judge_replay,
)
from service.rules.grants import granted_scope
from service.rules.registry import OPENID_SCOPES
from service.runtime import Runtime
from service.tokens import mint_kind, new_id, now, sha256, well_formed

ATTEMPTS_MAX = 12
NONCE = "nonce"  # what it is sealed as


class Authorization(Struct, frozen=True, kw_only=True):
    """What a person granted to a client, in a session. Everything was checked; implications of `scope` are expanded.

    `offline`: a refresh token is to come, and the grant outlives the session. `auth_time`: of the sign-in.
    `consent_seq`: of the last event of the consent when it was looked at.
    """

    client_id: str
    subject: str
    session_id: str
    scope: str
    audience: tuple[str, ...]
    redirect_uri: str
    code_challenge: str
    nonce: str | None
    auth_time: datetime
    offline: bool
    response_type: str
    consent_seq: int


class CodeOfForm(Struct, frozen=True):
    """What a form gives when it is allowed, made with it and sealed in it: sent twice, it gives one grant and one code.

    So whichever answer the browser follows, the app can redeem what it brings.
    """

    grant_id: str
    code: str


def code_of_form() -> CodeOfForm:
    return CodeOfForm(new_id("grt"), mint_kind(Kind.CODE))


class FormSpent(Exception):
    """The form's code was redeemed, revoked or has expired: it gives no other."""


async def grant_code(
    runtime: Runtime, client: Client, authorization: Authorization, request_id: str, given: CodeOfForm | None = None
) -> str:
    """Begins the grant, durably, and returns its code, which is good for 60 seconds.

    That of a form, if it was `given`, although it was sent before. Raises: FormSpent; Unavailable.
    """
    made = given or code_of_form()
    code, mark = made.code, stamp(authorization.subject, request_id)
    about = authorization
    expires_at = mark.at + timedelta(seconds=CODE_TTL_SECONDS)
    command = Authorize(
        stamp=mark,
        grant_id=made.grant_id,
        subject=about.subject,
        client_id=client.client_id,
        session_id=about.session_id,
        scope=about.scope,
        audience=about.audience,
        code=minted_token(code, Kind.CODE, about.scope, about.audience, expires_at),
        redirect_uri=about.redirect_uri,
        code_challenge=about.code_challenge,
        sealed_nonce=await seal_text(runtime, about.subject, about.nonce, NONCE),
        auth_time=about.auth_time,
        offline=about.offline,
        response_type=about.response_type,
        consent_seq=about.consent_seq,
        client_seq=client.seq,
    )
    event = decide_authorize(command)
    try:
        await runtime.ledger.append(Append(subject("grant", event.grant_id), event, 0))
    except Conflict:
        if not await _waits(runtime, made.grant_id):
            raise FormSpent from None
    except LedgerError as error:
        raise refused(error) from error
    return code


async def _waits(runtime: Runtime, grant_id: str) -> bool:
    """Whether the grant's code may yet be redeemed. Raises: Unavailable."""
    try:
        grant = (await load_family(runtime, grant_id, (), fresh=True)).grant
    except LedgerError as error:
        raise refused(error) from error
    return isinstance(grant, AuthorizedGrant) and grant.expires_at > now()


class Redemption(Struct, frozen=True, kw_only=True):
    """A code as a client presents it. `resources`: what is asked of the grant's audience (RFC 8707 §2.2)."""

    client: Client
    code: str
    redirect_uri: str
    code_verifier: str
    resources: tuple[str, ...]
    request_id: str


async def redeem(runtime: Runtime, presented: Redemption) -> bytes:
    """The JSON of the token response, RFC 6749 §5.1; with `id_token` where the scope has `openid`.

    Raises: InvalidGrant, InvalidRequest, InvalidTarget, Unavailable.
    """
    # Before anything is waited for: how soon a spent code came again is told by when it came.
    came = time.monotonic()
    mark = stamp(presented.client.client_id, presented.request_id, events=2)
    check_verifier(presented.code_verifier)
    grant_id = await _grant_of(runtime, presented.code)
    command = Redeem(
        stamp=mark,
        grant_id=grant_id,
        client_id=presented.client.client_id,
        redirect_uri=presented.redirect_uri,
        code_verifier=presented.code_verifier,
    )
    try:
        for attempt in range(ATTEMPTS_MAX):
            family = await load_family(runtime, grant_id, (), fresh=attempt > 0)
            known = facts(family.grant)
            judged = judge_code(
                command,
                family.grant,
                client_cut=runtime.view.cut(command.client_id),
                subject_cut=runtime.view.cut(known.subject) if known is not None else None,
                person=person_behind(runtime, known),
            )
            if isinstance(judged, Fresh):
                check_stands(runtime, presented.client)
                answer = await _exchange(runtime, presented, command, judged, family.seq)
                if answer is not None:
                    return answer
                continue
            verdict = (
                judge_replay(command, judged, await _by_the_log(runtime, came)) if isinstance(judged, Spent) else judged
            )
            if await _refuse(runtime, command, verdict, family.seq):
                raise invalid_code("replayed" if isinstance(verdict, Replayed) else "without its proofs")
    except LedgerError as error:
        raise refused(error) from error
    raise Unavailable("too many redemptions race for one grant at this moment")


async def _grant_of(runtime: Runtime, code: str) -> str:
    """Raises: InvalidGrant, Unavailable."""
    if not code.startswith("tl_ac_") or not well_formed(code):
        raise invalid_code("malformed")
    digest = sha256(code)
    grant_id = runtime.view.grant_of_code(digest)
    if grant_id is None:
        await runtime.view_at_end()
        grant_id = runtime.view.grant_of_code(digest)
    if grant_id is None:
        raise invalid_code("unknown")
    return grant_id


async def _by_the_log(runtime: Runtime, monotonic: float) -> datetime:
    """When that was by the log's clock, or a moment later: as much as the question takes to get there.

    Raises: LedgerUnavailable.
    """
    ago = time.monotonic() - monotonic
    return await runtime.ledger.clock() - timedelta(seconds=ago)


async def _exchange(
    runtime: Runtime, presented: Redemption, command: Redeem, fresh: Fresh, expected: int
) -> bytes | None:
    """Spends the code; None when something else happened to its grant."""
    grant, client, at = fresh.grant.becomes, presented.client, command.stamp.at
    scope = remaining_scope(runtime, client, grant, None)
    audience = narrowed_audience(grant, presented.resources)
    about = AccessFor(command.grant_id, grant.subject, scope, audience)
    access, minted = await mint_access(runtime, client, about, at)
    answer = {
        "access_token": access,
        "token_type": "Bearer",
        "expires_in": client.metadata.access_token_ttl_seconds,
        "scope": scope,
    }
    exchange = Exchange(tokens=(minted,))
    if fresh.by_code.offline and "refresh_token" in client.metadata.grant_types:
        answer["refresh_token"], exchange = _with_refresh(client, grant, minted, at)
    nonce = await runtime.subject_keys.unseal(grant.subject, fresh.grant.sealed_nonce, NONCE)
    identity = await id_token(runtime, client, grant, scope=scope, access_token=access, nonce=nonce)
    if identity is not None:
        answer["id_token"] = identity
    event = decide_redeem(command, fresh, exchange)
    try:
        await runtime.ledger.append(Append(subject("grant", command.grant_id), event, expected))
    except Conflict:
        return None
    return json.dumps(answer, separators=(",", ":")).encode()


def _with_refresh(client: Client, grant: ActiveGrant, access: MintedToken, at: datetime) -> tuple[str, Exchange]:
    token, metadata, second = mint_kind(Kind.REFRESH), client.metadata, whole_second(at)
    ends_at = second + timedelta(seconds=metadata.refresh_token_max_ttl_seconds)
    idle = second + timedelta(seconds=metadata.refresh_token_idle_ttl_seconds)
    minted = minted_token(token, Kind.REFRESH, grant.scope, grant.audience, min(idle, ends_at))
    return token, Exchange(
        tokens=(access, minted),
        refresh_idle_ttl_seconds=metadata.refresh_token_idle_ttl_seconds,
        refresh_ends_at=ends_at,
    )


async def _refuse(runtime: Runtime, command: Redeem, judged: Refused | Replayed, expected: int) -> bool:
    """Records why the code was refused; False when something else happened to its grant."""
    of = subject("grant", command.grant_id)
    # Of the replays that race, any number may come at once, and none of them changes the state: no expectation.
    wanted = None if isinstance(judged, Replayed) and not judged.ends else expected
    try:
        seqs = await runtime.ledger.append(*(Append(of, event, wanted) for event in judged.events))
    except Conflict:
        return False
    if judged.ends:
        await runtime.applied(seqs[-1])
    return True


def remaining_scope(runtime: Runtime, client: Client, grant: ActiveGrant, asked: str | None) -> str:
    """Of the grant's scope what is asked for, without what client or person may no longer have, or nobody may.

    Raises: InvalidScope.
    """
    scopes = known_scopes(runtime)
    disabled = frozenset(name for name, row in scopes.items() if row.disabled_at is not None)
    held = [grant.scope, expand(scopes, client.metadata.scope)]
    if grant.subject != grant.client_id:
        user = runtime.view.user(grant.subject)
        held.append(" ".join([expand(scopes, user.scope if user else ""), *OPENID_SCOPES]))
    return granted_scope(asked, *held, disabled=disabled)


def narrowed_audience(grant: ActiveGrant, resources: tuple[str, ...]) -> tuple[str, ...]:
    """Source: RFC 8707 §2.2. Raises: InvalidTarget."""
    if any(name not in grant.audience for name in resources):
        raise InvalidTarget("the grant is not for this resource")
    return tuple(dict.fromkeys(resources)) or grant.audience
