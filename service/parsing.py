"""Bodies and queries into Structs, strictly: what does not fit is refused, saying where and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from service.errors import InvalidRequest, UnsupportedMediaType
from service.incoming import Incoming, address_of, parse_form
from service.settings import Settings

T = TypeVar("T")
Q = TypeVar("Q", bound=Struct)

JSON = ("application/json",)
MERGE_PATCH = ("application/json", "application/merge-patch+json")  # RFC 7396 §4
_SCHEMAS = "the schemas are in /schema/openapi.json"


async def json_body(
    incoming: Incoming, settings: Settings, *, bytes_max: int | None = None, types: tuple[str, ...] = JSON
) -> bytes:
    """The body, if it says that it is JSON. Raises: UnsupportedMediaType, BodyTooLarge, RequestTimeout."""
    given = incoming.header("content-type") or ""
    if given not in types and not _is_one_of(given, types):
        raise UnsupportedMediaType(f"the body must be {types[0]} in UTF-8", fix=f"set Content-Type: {types[0]}")
    return await incoming.body(bytes_max or settings.request_body_bytes_max, settings.request_seconds_max)


def _is_one_of(given: str, types: tuple[str, ...]) -> bool:
    content_type, _, parameters = given.lower().partition(";")
    return content_type.strip() in types and parameters.strip().replace('"', "") in {"", "charset=utf-8"}


def decode_json(decode: Callable[[bytes], T], data: bytes) -> T:
    """`decode` is that of a msgspec decoder. Raises: InvalidRequest."""
    try:
        return decode(data)
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8") from None
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the body does not fit: {error}", fix=_SCHEMAS) from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def decode_json_strictly(decode: Callable[[bytes], T], data: bytes) -> T:
    """As `decode_json`; also refuses names that are repeated, which readers read differently (RFC 8259 §4)."""
    decoded = decode_json(decode, data)
    json.loads(data, object_pairs_hook=_without_repetition)
    return decoded


def _without_repetition(pairs: list[tuple[str, Any]]) -> None:
    names = {name for name, _ in pairs}
    if len(names) < len(pairs):
        repeated = next(name for name in names if sum(name == other for other, _ in pairs) > 1)
        raise InvalidRequest(f"the member {json.dumps(repeated[:64])} is repeated")


def query(data: bytes, kind: type[Q]) -> Q:
    """The query's parameters, each at most once, none that is not known. Raises: InvalidRequest."""
    values: dict[str, str] = {}
    for name, value in parse_form(data):
        if name in values:
            raise InvalidRequest(f"the query parameter {json.dumps(name[:64])} is repeated")
        values[name] = value
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        text = str(error).replace("Object contains unknown field", "there is no parameter").replace("$.", "")
        raise InvalidRequest(f"the query does not fit: {text}", fix=_SCHEMAS) from None


def ip_address(text: str, name: str) -> str:
    """The address as it is recorded, however it was written. Raises: InvalidRequest for what is none."""
    address = address_of(text)
    if address is None:
        raise InvalidRequest(f"{name} is not an IP address", fix="send it without port, brackets or prefix length")
    return address


def moment(text: str, name: str) -> datetime:
    """A time of a query. Source: RFC 3339. Raises: InvalidRequest."""
    try:
        found = msgspec.convert(text, datetime)
        if found.tzinfo is not None:
            return found.astimezone(UTC)
    except (msgspec.ValidationError, OverflowError):
        pass
    raise InvalidRequest(f"{name} must be a time as in RFC 3339", fix=f"for example {name}=2026-01-31T12:00:00Z")
