"""Events to bytes and back: every stored version, exact bytes, and what no event may ever hold."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect
from msgspec.structs import replace

from events import codec
from events.errors import UndecodableEvent
from events.types import LedgerEvent, ReceiptBlock, RefusedCount, TokenUsed, UseBlock
from tests.golden.expected import AT, BLOCKS, EVENTS, GROWN, SUPERSEDED

GOLDEN = Path(__file__).parent.parent / "golden"


def stored(tag: str, ending: str = "json") -> bytes:
    return (GOLDEN / f"{tag.replace('/', '-')}.{ending}").read_bytes()


def tag_of(kind: Any) -> str:
    return str(kind.__struct_config__.tag)


CURRENT = {tag_of(kind) for kind in get_args(LedgerEvent)}


# Golden files


def test_tags_and_files_and_expectations_are_the_same_set() -> None:
    files = {file.stem for file in GOLDEN.glob("*.json")}
    assert {tag.replace("/", "-") for tag in EVENTS} == files
    assert EVENTS.keys() == CURRENT | SUPERSEDED | set(GROWN.values())
    assert not CURRENT & SUPERSEDED


def test_block_tags_and_files_and_expectations_are_the_same_set() -> None:
    files = {file.stem for file in GOLDEN.glob("*.msgpack")}
    assert {tag.replace("/", "-") for tag in BLOCKS} == files
    assert {tag_of(UseBlock), tag_of(ReceiptBlock)} <= BLOCKS.keys()


@pytest.mark.parametrize("tag", sorted(EVENTS))
def test_stored_event_decodes_to_what_it_always_meant(tag: str) -> None:
    assert EVENTS[tag] == codec.decode(stored(tag))


@pytest.mark.parametrize("tag", sorted(CURRENT))
def test_current_event_encodes_to_the_same_bytes(tag: str) -> None:
    newest = GROWN.get(tag, tag)
    assert stored(newest) == codec.encode(EVENTS[newest])


@pytest.mark.parametrize("tag", sorted(GROWN))
def test_field_that_a_tag_got_is_added_to_what_it_had(tag: str) -> None:
    """STYLE "Changing an event": old bytes keep their meaning, and old readers find in the new ones what they know."""
    old, new = json.loads(stored(tag)), json.loads(codec.encode(EVENTS[tag]))
    assert old != new
    assert old == _within(new, old)


def _within(new: Any, old: Any) -> Any:
    return {name: _within(new[name], value) for name, value in old.items()} if isinstance(old, dict) else new


@pytest.mark.parametrize("tag", sorted(EVENTS))
def test_tag_is_the_first_member_and_reads_noun_verb_version(tag: str) -> None:
    named = next((name for name, newest in GROWN.items() if newest == tag), tag)
    assert re.fullmatch(r"[a-z]+\.[a-z_]+/[1-9][0-9]*", named)
    assert stored(tag).startswith(b'{"type":"%s",' % named.encode())


@pytest.mark.parametrize("tag", sorted(BLOCKS))
def test_stored_block_decodes_to_what_it_always_meant_and_back(tag: str) -> None:
    block, data = BLOCKS[tag], stored(tag, "msgpack")
    if isinstance(block, UseBlock):
        assert (block, data) == (codec.decode_block(data), codec.encode_block(block))
    else:
        assert (block, data) == (codec.decode_receipts(data), codec.encode_receipts(block))


def test_older_block_without_appended_fields_decodes_with_their_defaults() -> None:
    """STYLE "Changing an event": blocks are positional, fields are only appended, with a default."""
    use: list[Any] = [1, None, None, "valid", "validate", "caller"]
    data = msgspec.msgpack.encode({"type": "uses/1", "block_id": "b", "writer": "w", "uses": [use]})
    assert UseBlock(block_id="b", writer="w", uses=(TokenUsed(1, None, None, "valid", "validate", "caller"),)) == (
        codec.decode_block(data)
    )


# What an event may hold

ID = r"(tok|grt|cli|usr|ses|fnd|sub|whk)_[0-9a-f]{32}"
SCOPE = r"([\x21\x23-\x5b\x5d-\x7e]+( [\x21\x23-\x5b\x5d-\x7e]+)*)?"
HASH = r"[0-9a-f]{64}"
SEALED = "sealed"
# Every text that an event can hold, by the name of its field: an id, a hash, something sealed, a word of a fixed
# vocabulary, or what is public by nature. A new field must be named here, which is the moment to ask whether it
# could hold a secret or something readable about a person.
TEXTS = {
    "id": r"[0-9a-f]{32}",
    "by": rf"{ID}|system",
    "request_id": r"(?!tl_)[A-Za-z0-9._-]{1,64}",
    "grant_id": ID,
    "token_id": ID,
    "spent_token_id": ID,
    "successor_id": ID,
    "rotated_from": ID,
    "client_id": ID,
    "session_id": ID,
    "code_id": ID,
    "refresh_token_id": ID,
    "code_challenge": r"[A-Za-z0-9_-]{43}",
    "redirect_uri": r"[\x21-\x7e]+",  # one that the client registered
    "post_logout_redirect_uris": r"[\x21-\x7e]+",
    "response_type": r"[a-z_ ]+",
    "sealed_nonce": SEALED,
    "user_id": ID,
    "subject": ID,
    "answer_id": r"[0-9a-f]{32}",
    "sha256": HASH,
    "secret_sha256": HASH,
    "username_hash": HASH,
    "password_hash": r"\$argon2id\$.+",
    "scope": SCOPE,
    "name": SCOPE,
    "implies": SCOPE,
    "description": r".{0,1000}",
    "audience": r"[\x21-\x7e]+",
    "allowed_ips": r"[0-9a-f.:/]+",
    "kid": r"(id-)?[a-z]{2}-[0-9]+-[0-9a-f]{8}(-[0-9a-f]{8})?",
    "public_jwk": r"\{.*\}",
    "client_name": r".{1,200}",
    "redirect_uris": r"[\x21-\x7e]+",
    "grant_types": r"[a-z_]+",
    "response_types": r"[a-z_ ]+",
    "sealed_name": SEALED,
    "sealed_profile": SEALED,
    "sealed_comment": SEALED,
    "finding_id": ID,
    "rule": r"[a-z_]+",
    "quantity": r"[a-z_]+",
    "caller": ID,
    "sealed_reason": SEALED,
    "sealed_statement": SEALED,
    "sealed_place": SEALED,
    "statement_sha256": HASH,
    "read_id": r"(qry|exp)_[0-9a-f]{32}",
    "dataset": r"[a-z_]+",
    "statement": r"SELECT [^']+",  # our own, of an export: what was asked for is bound in it
    "subscriber_id": ID,
    "subscriber_name": r".{1,200}",  # of a machine
    "public_key": r"U[A-Z2-7]{55}",
    "webhook_id": ID,
    "methods": r"[a-z]+",
    "webhook_name": r".{1,200}",
    "owner": ID,
    "origin": r"https?://[^/@?#]+:[0-9]+",
    "software": r"token-ledger [0-9a-z.+]+",
}
PRIVATE_JWK_MEMBERS = {"d", "p", "q", "dp", "dq", "qi", "oth", "k"}


def text_fields(kind: inspect.Type, name: str = "") -> set[tuple[str, bool]]:
    """Names of the fields that hold text, and whether it is bytes, however deep."""
    match kind:
        case inspect.UnionType(types=types):
            return {found for one in types for found in text_fields(one, name)}
        case inspect.StructType(fields=fields):
            return {found for field in fields for found in text_fields(field.type, field.name)}
        case inspect.VarTupleType(item_type=item):
            return text_fields(item, name)
        case inspect.StrType():
            return {(name, False)}
        case inspect.BytesType():
            return {(name, True)}
        case inspect.IntType() | inspect.FloatType() | inspect.BoolType() | inspect.DateTimeType() | inspect.NoneType():
            return set()
        case inspect.EnumType() | inspect.LiteralType():
            return set()
        case _:
            raise AssertionError(f"{name}: {kind} is not expected in an event")


def test_every_text_of_an_event_is_an_id_a_hash_sealed_or_public() -> None:
    found = text_fields(inspect.type_info(LedgerEvent))
    assert {name for name, _ in found} == TEXTS.keys()
    assert {name for name, is_bytes in found if is_bytes} == {k for k, v in TEXTS.items() if v == SEALED}


def values(node: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(node, dict):
        return [pair for key, value in node.items() for pair in values(value, key)]
    if isinstance(node, list):
        return [pair for value in node for pair in values(value, name)]
    return [(name, node)] if isinstance(node, str) else []


@pytest.mark.parametrize("tag", sorted(CURRENT))
def test_no_member_of_the_json_has_the_form_of_a_secret(tag: str) -> None:
    for name, value in values(json.loads(stored(tag))):
        assert not re.search(r"tl_[a-z]+_|eyJ", value), name
        wanted = TEXTS.get(name, "")
        if wanted and wanted != SEALED:
            assert re.fullmatch(wanted, value), (name, value)
        if name == "public_jwk":
            assert not PRIVATE_JWK_MEMBERS & json.loads(value).keys()


# Bytes that are not what they should be

BROKEN = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"type":"scope.disabled/1","id":"\xff"}',
    "no tag": b"{}",
    "unknown tag": stored("scope.disabled/1").replace(b"scope.disabled/1", b"scope.exploded/1"),
    "newer version": stored("scope.disabled/1").replace(b"scope.disabled/1", b"scope.disabled/2"),
    "field missing": b'{"type":"scope.disabled/1","id":"a","occurred_at":"2026-01-31T12:00:00Z"}',
    "wrong type": stored("scope.disabled/1").replace(b'"name":"orders:write"', b'"name":7'),
    "unknown reason": stored("grant.revoked/1").replace(b"reuse_detected", b"whim"),
    "time without zone": stored("scope.disabled/1").replace(b"12:00:00.123456Z", b"12:00:00.123456"),
    "MessagePack": stored("uses/1", "msgpack"),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_unreadable_event_is_refused(data: bytes) -> None:
    with pytest.raises(UndecodableEvent):
        codec.decode(data)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"{}", stored("scope.disabled/1"), stored("uses/1", "msgpack")[:-1]])
def test_unreadable_block_is_refused(data: bytes) -> None:
    with pytest.raises(UndecodableEvent):
        codec.decode_block(data)


def test_error_quotes_nothing_of_the_event() -> None:
    """A password's hash stands in events, and errors stand in logs."""
    data = stored("user.registered/1").replace(b'"kind":"person"', b'"kind":"robot"')
    with pytest.raises(UndecodableEvent) as caught:
        codec.decode(data)
    assert "argon2" not in str(caught.value)


def test_unknown_member_is_ignored() -> None:
    """A fact that old readers may ignore is added under the same tag."""
    data = stored("scope.disabled/1").replace(b'"name":', b'"added_later":{"x":[1]},"name":')
    assert EVENTS["scope.disabled/1"] == codec.decode(data)


def test_event_that_does_not_survive_is_not_encoded() -> None:
    """msgspec's constructors validate nothing, and what is published cannot be taken back."""
    good = EVENTS["key.retired/1"]
    for broken in (
        replace(good, kid=7),
        replace(good, remove_at="soon"),
        replace(good, remove_at=AT.replace(tzinfo=None)),
        replace(good, occurred_at=None),
        replace(EVENTS["token.issued/1"], audience=["a list"]),
    ):
        with pytest.raises(ValueError, match="does not survive"):
            codec.encode(broken)


@settings(max_examples=100, deadline=None)
@given(
    name=st.text(st.characters(codec="utf-8"), max_size=50),
    sealed=st.binary(max_size=50),
    at=st.datetimes(timezones=st.just(UTC)),
)
def test_any_event_survives(name: str, sealed: bytes, at: datetime) -> None:
    changed = replace(EVENTS["scope.changed/1"], description=name, occurred_at=at)
    assert changed == codec.decode(codec.encode(changed))
    commented = replace(EVENTS["grant.revoked/1"], sealed_comment=sealed)
    assert commented == codec.decode(codec.encode(commented))


@settings(max_examples=100, deadline=None)
@given(
    use=st.builds(
        TokenUsed,
        st.integers(0, 2**62),
        st.none() | st.text(max_size=40),
        st.none() | st.binary(min_size=32, max_size=32),
        *(st.text(st.characters(codec="utf-8"), max_size=40) for _ in range(5)),
    ),
    lost=st.integers(0, 2**40),
)
def test_any_block_survives(use: TokenUsed, lost: int) -> None:
    counts = (RefusedCount(1, "", None, "unknown", "api", lost),)
    block = UseBlock(block_id="b", writer="w", uses=(use, use), refused=counts, lost=lost)
    assert block == codec.decode_block(codec.encode_block(block))
