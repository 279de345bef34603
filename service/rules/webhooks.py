"""The rules of webhooks. Pure: what is asked and what holds come in, what then holds or a refusal comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from events.types import WebhookMetadata
from service.caller import ADMIN, Caller
from service.errors import AlreadyExists, InvalidRequest, NotFound
from service.tokens import is_id

WEBHOOKS_MAX = 500
WEBHOOKS_OF_OWNER_MAX = 50
SECRETS_MAX = 3

DisabledReason = Literal["asked", "gone", "failing", "owner_disabled"]
_PREFIXES: tuple[tuple[str, tuple[Literal["cli", "usr", "grt"], ...]], ...] = (
    ("client_id", ("cli",)),
    ("subject", ("usr", "cli")),  # with client credentials the subject is the client
    ("grant_id", ("grt",)),
)


class WebhookSecret(Struct, frozen=True):
    """`ends_at`: when it stops signing; None for the present one."""

    secret: str
    ends_at: datetime | None = None


class Sealed(Struct, frozen=True, kw_only=True):
    """What is not for the ledger.

    `after`: the webhook gets what was announced after this position of the ledger, since its consumer was last made
    anew; `cursor` names that time, so that a consumer of another one is recognised.
    """

    url: str
    secrets: tuple[WebhookSecret, ...]
    after: int
    cursor: str

    def signing(self, at: datetime) -> tuple[str, ...]:
        """The secrets that sign at this time, the present one first."""
        return tuple(one.secret for one in self.secrets if one.ends_at is None or one.ends_at > at)


class State(Struct, frozen=True):
    """A webhook as a command finds it, and as it leaves it."""

    metadata: WebhookMetadata
    sealed: Sealed


def may_manage(caller: Caller, metadata: WebhookMetadata) -> bool:
    """Its owner may, and administrators."""
    return caller.holds(ADMIN) or caller.subject == metadata.owner


def check_owned(caller: Caller, metadata: WebhookMetadata | None) -> None:
    """Others' webhooks are as if they were not there. Raises: NotFound."""
    if metadata is None or not may_manage(caller, metadata):
        raise NotFound("there is no such webhook")


def check_room(owner: str, existing: Sequence[WebhookMetadata]) -> None:
    """Raises: AlreadyExists."""
    own = sum(one.owner == owner for one in existing)
    if len(existing) >= WEBHOOKS_MAX or own >= WEBHOOKS_OF_OWNER_MAX:
        raise AlreadyExists(
            f"there are {own} webhooks of this owner and {len(existing)} in all; at most {WEBHOOKS_OF_OWNER_MAX} and "
            f"{WEBHOOKS_MAX} may be",
            fix="delete one that is not needed any more, or have one receiver take the events of several",
        )


def check_filters(filters: Mapping[str, str | None]) -> None:
    """Raises: InvalidRequest."""
    for name, prefixes in _PREFIXES:
        value = filters.get(name)
        if value is not None and not any(is_id(value, prefix) for prefix in prefixes):
            wanted = " or ".join(f"{prefix}_" for prefix in prefixes)
            raise InvalidRequest(f"{name} must be an id that begins with {wanted}", fix="send the id, not a name")


def check_cursor(after: int, end: int) -> None:
    """Raises: InvalidRequest."""
    if after > end:
        raise InvalidRequest(
            f"the log ends at {end}, before {after}", fix="give a ledger_seq that an event or an answer has named"
        )


def changed(state: State, changes: Mapping[str, Any], origin: str | None) -> State:
    """The webhook with what a merge patch names, None being the default; `origin` is that of a new URL.

    Enabled again, it goes on where it stopped. Raises: InvalidRequest.
    """
    filters = {name: changes[name] for name, _ in _PREFIXES if name in changes}
    check_filters(filters)
    metadata, sealed = replace(state.metadata, **filters), state.sealed
    if changes.get("webhook_name"):
        metadata = replace(metadata, webhook_name=changes["webhook_name"])
    if origin is not None and changes["url"] != sealed.url:
        metadata, sealed = replace(metadata, origin=origin), replace(sealed, url=changes["url"])
    if "enabled" in changes:
        was: DisabledReason = metadata.disabled_reason or "asked"
        metadata = replace(metadata, disabled_reason=None if changes["enabled"] else was)
    return State(metadata, sealed)


def rotated(state: State, secret: str, overlap_seconds: int, at: datetime) -> State:
    """With a new secret; the one before signs too until the overlap ends.

    Of earlier ones only the newest are kept, so that a header does not grow without bound.
    """
    ends_at = at + timedelta(seconds=overlap_seconds)
    before = [
        WebhookSecret(one.secret, ends_at if one.ends_at is None else min(one.ends_at, ends_at))
        for one in state.sealed.secrets
        if one.ends_at is None or one.ends_at > at
    ]
    secrets = (WebhookSecret(secret), *(before if overlap_seconds else ()))[:SECRETS_MAX]
    metadata = replace(state.metadata, secret_rotated_at=at)
    return State(metadata, replace(state.sealed, secrets=secrets))


def disabled(state: State, reason: DisabledReason) -> State:
    """Nothing is delivered any more until somebody enables it; nothing of what comes meanwhile is lost."""
    return State(replace(state.metadata, disabled_reason=reason), state.sealed)


def redelivering(state: State, after: int, cursor: str) -> State:
    """Everything after a position of the ledger is delivered again."""
    return State(state.metadata, replace(state.sealed, after=after, cursor=cursor))
