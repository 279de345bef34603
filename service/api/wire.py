"""What several operations share of what goes over the wire: limited texts, pages and their cursors."""

from __future__ import annotations

import asyncio
import base64
import binascii
import zlib
from collections.abc import Awaitable, Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType

from service.errors import InvalidRequest

T = TypeVar("T")

LIMIT = 100
_AT_ONCE_MAX = 32
DAY_SECONDS = 86_400
OVERLAP_SECONDS_MAX = 7 * DAY_SECONDS

Limit = Annotated[int, Meta(ge=1, le=1000, description="Items on a page.")]
Cursor = Annotated[str, Meta(min_length=1, max_length=1000, description="`next_cursor` of the page before.")]
Overlap = Annotated[int, Meta(ge=0, le=OVERLAP_SECONDS_MAX, description="How long the old one still works.")]
Seq = Annotated[int, Meta(description="Position in the ledger.")]
ScopeText = Annotated[str, Meta(max_length=4000, description="Names separated by one space (RFC 6749 §3.3).")]
# Patterns are only documented here and checked by the rules: msgspec's own crash the interpreter when it ends, about
# one time in five (its issue 717).
ScopeName = Annotated[
    str, Meta(min_length=1, max_length=200, extra_json_schema={"pattern": r"^[\x21\x23-\x5B\x5D-\x7E]+$"})
]
Audience = Annotated[str, Meta(min_length=1, max_length=500, extra_json_schema={"pattern": r"^[\x21-\x7E]+$"})]
Audiences = Annotated[list[Audience], Meta(min_length=1, max_length=32)]
AnyAudiences = Annotated[list[Audience], Meta(max_length=32)]
Comment = Annotated[str, Meta(min_length=1, max_length=1000, description="Sealed under the key of whom it is about.")]
Id = Annotated[str, Meta(min_length=1, max_length=64)]
Time = Annotated[str, Meta(min_length=1, max_length=40, description="RFC 3339; by `recorded_at`, inclusive.")]
EndTime = Annotated[str, Meta(min_length=1, max_length=40, description="RFC 3339; by `recorded_at`, exclusive.")]
FeedId = Annotated[str, Meta(min_length=1, max_length=64, description="Names the log and its feed.")]
WaitSeconds = Annotated[
    float, Meta(ge=0, le=30, description="For how long the answer may wait until every follower has applied it.")
]
CallersReason = Literal["compromised", "logout", "rotated", "admin", "abuse", "unused"]


class Page(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The query of a list."""

    limit: Limit = LIMIT
    cursor: Cursor | UnsetType = UNSET


class Done(Struct, frozen=True):
    """A write that answers nothing but its sequence."""

    ledger_seq: Seq


def audiences(given: str | Sequence[str] | UnsetType | None) -> tuple[str, ...]:
    """An audience may be one string or several; nothing is none."""
    if given is None or given is UNSET or isinstance(given, UnsetType):
        return ()
    return (given,) if isinstance(given, str) else tuple(given)


def cursor_of(of: str, position: bytes) -> str:
    """A cursor for the list `of`. It is checked when it comes back, so that a typo is refused and not misread."""
    check = zlib.crc32(of.encode() + position).to_bytes(4, "big")
    return base64.urlsafe_b64encode(check + position).rstrip(b"=").decode()


def position_of(cursor: str | UnsetType, of: str) -> bytes:
    """Where the cursor stands, empty for the beginning. Raises: InvalidRequest if it is not one of the list `of`."""
    if isinstance(cursor, UnsetType):
        return b""
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) < 4 or zlib.crc32(of.encode() + raw[4:]).to_bytes(4, "big") != raw[:4]:
        raise InvalidRequest("cursor is not one that this list gave", fix="take next_cursor of the page before")
    return raw[4:]


def page(items: Sequence[Any], next_cursor: str | None) -> dict[str, Any]:
    """A list's answer; `next_cursor` is left out on the last page."""
    return {"items": items} | ({"next_cursor": next_cursor} if next_cursor is not None else {})


def given(**members: Any) -> dict[str, Any]:
    """Without what is None: absent values are left out."""
    return {name: value for name, value in members.items() if value is not None}


async def concurrently(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """All results in order, a few at a time: names are unsealed with keys that may have to be fetched first."""
    gate = asyncio.Semaphore(_AT_ONCE_MAX)

    async def one(awaitable: Awaitable[T]) -> T:
        async with gate:
            return await awaitable

    return await asyncio.gather(*(one(awaitable) for awaitable in awaitables))
