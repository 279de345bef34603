"""Events to bytes and back. The only file that knows old shapes."""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

from events.errors import UndecodableEvent
from events.types import LedgerEvent, ReceiptBlock, UseBlock

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class _Decoder(Protocol[T_co]):
    def decode(self, data: bytes, /) -> T_co: ...


_json_encoder = msgspec.json.Encoder()
_json_decoder: msgspec.json.Decoder[LedgerEvent] = msgspec.json.Decoder(LedgerEvent)
_block_encoder = msgspec.msgpack.Encoder()
_block_decoder = msgspec.msgpack.Decoder(UseBlock)
_receipts_decoder = msgspec.msgpack.Decoder(ReceiptBlock)


def encode(event: LedgerEvent) -> bytes:
    """JSON of one event.

    The output is decoded and compared before it is returned, since msgspec's constructors validate nothing and
    what is published cannot be taken back.

    Raises: ValueError if the event does not survive the round trip.
    """
    data = _json_encoder.encode(event)
    try:
        survives = decode(data) == event
    except UndecodableEvent:
        survives = False
    if not survives:
        raise ValueError(f"{type(event).__name__} does not survive encoding")
    return data


def decode(data: bytes) -> LedgerEvent:
    """The event in `data`, in its current shape.

    Raises: UndecodableEvent
    """
    return _decoded(_json_decoder, data, "an event")


def encode_block(block: UseBlock) -> bytes:
    """MessagePack of one block of uses."""
    return _block_encoder.encode(block)


def decode_block(data: bytes) -> UseBlock:
    """The block in `data`.

    Raises: UndecodableEvent
    """
    return _decoded(_block_decoder, data, "a usage block")


def encode_receipts(block: ReceiptBlock) -> bytes:
    """MessagePack of one block of receipts."""
    return _block_encoder.encode(block)


def decode_receipts(data: bytes) -> ReceiptBlock:
    """The block in `data`.

    Raises: UndecodableEvent
    """
    return _decoded(_receipts_decoder, data, "a block of receipts")


def _decoded(decoder: _Decoder[T], data: bytes, what: str) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # Without the bytes: they may hold a password's hash, and the text goes to logs.
        raise UndecodableEvent(f"cannot read {what} of {len(data)} bytes: {error}") from error
