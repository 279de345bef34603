"""`/v1/keys`: the keys that sign access tokens and ID tokens."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from events.errors import Conflict
from events.types import Reason
from projections.registry import SigningKey
from service.api.routing import Call, Nothing, operation
from service.api.wire import Page, Seq, cursor_of, page, position_of
from service.errors import InvalidRequest, Unavailable
from service.runtime import Runtime
from service.settings import Algorithm
from service.signing import ID_ALGORITHM, Purpose, Rotation

_LIST = "keys"


class KeyView(Struct, frozen=True, kw_only=True):
    """A signing key. `purpose`: what tokens it signs.

    `remove_at`: when it leaves the key set, since all that it signed has expired. A revoked key has left it.
    """

    kid: str
    purpose: Purpose
    alg: str
    state: Literal["announced", "active", "retired", "revoked"]
    introduced_at: datetime
    activated_at: datetime | UnsetType = UNSET
    retired_at: datetime | UnsetType = UNSET
    remove_at: datetime | UnsetType = UNSET
    revoked_at: datetime | UnsetType = UNSET
    ledger_seq: Seq


class KeyList(Struct, frozen=True):
    items: list[KeyView]
    next_cursor: str | UnsetType = UNSET


class KeyRotation(Struct, frozen=True, forbid_unknown_fields=True):
    """`purpose`: `access` (the default) or `id`.

    `alg`: for access tokens one of the settings' `signing_algorithms`, the first of them if it is left out; for ID
    tokens RS256 if it is left out. `now`: with a key that is made for it, although nobody has fetched it yet. `revoke`:
    every other key for the same is refused at once, with all that it signed; `now` goes without saying then.
    """

    alg: Algorithm | UnsetType = UNSET
    purpose: Purpose = "access"
    now: bool = False
    revoke: bool = False


class KeyRotated(Struct, frozen=True, kw_only=True):
    """`kid` signs from now on; `retired_kid` signed until now. What `revoked_kids` signed is valid no more."""

    kid: str
    retired_kid: str | UnsetType = UNSET
    revoked_kids: list[str] | UnsetType = UNSET
    ledger_seq: Seq


def _view(key: SigningKey) -> KeyView:
    return KeyView(
        kid=key.kid,
        purpose=key.purpose,
        alg=key.alg,
        state=key.state,
        introduced_at=key.introduced_at,
        activated_at=key.activated_at or UNSET,
        retired_at=key.retired_at or UNSET,
        remove_at=key.remove_at or UNSET,
        revoked_at=key.revoked_at or UNSET,
        ledger_seq=key.seq,
    )


@operation("GET", "/v1/keys", tag="keys", needs=("ledger:admin", "ledger:audit"), query=Page, answer=KeyList)
async def list_keys(call: Call[None, Page]) -> dict[str, Any]:
    """List signing keys that are not removed."""
    after, limit = position_of(call.query.cursor, _LIST), call.query.limit
    rows = call.runtime.view.rows("key", after=after, limit=limit + 1)
    items = [_view(row) for _, row in rows[:limit] if isinstance(row, SigningKey)]
    return page(items, cursor_of(_LIST, rows[limit - 1][0]) if len(rows) > limit else None)


@operation(
    "POST",
    "/v1/keys/rotate",
    tag="keys",
    needs=("ledger:admin",),
    body=KeyRotation,
    body_optional=True,
    answer=KeyRotated,
)
async def rotate_key(call: Call[KeyRotation, Nothing]) -> KeyRotated:
    """Sign with a new key from now on.

    Tokens that the old key signed stay valid; it stays in the key set until the last of them has expired. With
    `revoke` it leaves the key set at once, and all that it signed is refused.
    """
    body = call.body
    alg = _algorithm(call.runtime, body.purpose, None if isinstance(body.alg, UnsetType) else body.alg)
    done = await _rotate(call.runtime, alg, body, call.caller.token_id)
    return KeyRotated(
        kid=done.kid,
        retired_kid=done.retired_kid or UNSET,
        revoked_kids=list(done.revoked_kids) if body.revoke else UNSET,
        ledger_seq=done.ledger_seq,
    )


def _algorithm(runtime: Runtime, purpose: Purpose, asked: Algorithm | None) -> Algorithm:
    """Raises: InvalidRequest."""
    if purpose == "id":
        return asked or ID_ALGORITHM
    algorithms = runtime.settings.signing_algorithms
    if asked is not None and asked not in algorithms:
        raise InvalidRequest(f"no keys are kept for {asked}", fix=f"choose one of {', '.join(algorithms)}")
    return asked or algorithms[0]


async def _rotate(runtime: Runtime, alg: Algorithm, asked: KeyRotation, by: str) -> Rotation:
    revoke = Reason.COMPROMISED if asked.revoke else None
    try:
        return await runtime.signing_keys.rotate(alg, by=by, purpose=asked.purpose, fresh=asked.now, revoke=revoke)
    except Conflict as error:
        raise Unavailable("the key is being rotated by somebody else at this moment") from error
