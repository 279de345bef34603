"""Token strings, ids and hashes."""

from __future__ import annotations

import hashlib
import re
import time
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.types import Kind
from service import tokens

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PREFIXES = ["at", "rt", "pat", "sat", "ac", "cs"]


def base62(text: str) -> int:
    number = 0
    for digit in text:
        number = number * 62 + ALPHABET.index(digit)
    return number


@pytest.mark.parametrize("prefix", PREFIXES)
def test_minted_token_is_43_random_and_6_checking_digits(prefix: tokens.Prefix) -> None:
    """DESIGN "Service"."""
    token = tokens.mint(prefix)
    assert re.fullmatch(rf"tl_{prefix}_[0-9A-Za-z]{{49}}", token)
    assert base62(token[-6:]) == zlib.crc32(token[:-6].encode())
    assert base62(token[-49:-6]) < 2**256
    assert tokens.well_formed(token)


def test_every_kind_has_its_own_prefix() -> None:
    assert [tokens.mint_kind(kind).split("_")[1] for kind in Kind] == ["at", "rt", "pat", "sat", "ac"]


def test_minted_tokens_use_all_their_bits() -> None:
    """256 random bits: over a thousand of them, every bit is seen set and unset."""
    numbers = [base62(tokens.mint("at")[-49:-6]) for _ in range(1000)]
    assert len(set(numbers)) == 1000
    together, common = 0, 2**256 - 1
    for number in numbers:
        together |= number
        common &= number
    assert (together, common) == (2**256 - 1, 0)


@given(st.binary(max_size=80))
@settings(max_examples=100, deadline=None)
def test_checksum_is_the_crc_in_base62(body: bytes) -> None:
    text = body.hex()
    assert base62(tokens.checksum(text)) == zlib.crc32(text.encode())
    assert len(tokens.checksum(text)) == 6


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_changed_character_is_noticed(prefix: tokens.Prefix) -> None:
    token = tokens.mint(prefix)
    for position in range(len(token)):
        other = "x" if token[position] != "x" else "y"
        assert not tokens.well_formed(token[:position] + other + token[position + 1 :])


TOKEN = tokens.mint("pat")
MALFORMED = {
    "empty": "",
    "blank": " ",
    "cut": TOKEN[:-1],
    "longer": TOKEN + "0",
    "space before": " " + TOKEN,
    "newline after": TOKEN + "\n",
    "upper case": TOKEN.upper(),
    "not ASCII": TOKEN[:-1] + "\u0660",
    "NUL": TOKEN[:-1] + "\0",
    "only the prefix": "tl_pat_",
    "random text": "correct horse battery staple",
    "JWT of two parts": "eyJhbGciOiJub25lIn0.e30",
    "JWT of four parts": "eyJ.a.b.c",
    "JWT that is too long": "eyJ" + "a" * tokens.TOKEN_CHARS_MAX + ".b.c",
    "very long": "tl_pat_" + "0" * 1_000_000,
    "lone surrogate": "tl_pat_\ud800",
}


@pytest.mark.parametrize("token", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_token_is_refused_before_any_look_up(token: str) -> None:
    assert not tokens.well_formed(token)


def test_what_is_shaped_like_a_jwt_is_looked_up() -> None:
    assert tokens.well_formed("eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJhIn0.c2ln")


@given(st.text(max_size=100))
@settings(max_examples=200, deadline=None)
def test_well_formed_never_raises(token: str) -> None:
    assert tokens.well_formed(token) in {True, False}
    assert tokens.well_formed("tl_" + token) in {True, False}


def test_hash_is_of_the_whole_string() -> None:
    assert tokens.sha256(TOKEN) == hashlib.sha256(TOKEN.encode()).digest()


@pytest.mark.parametrize("prefix", ["tok", "grt", "cli", "usr"])
def test_ids_are_uuid7_and_told_to_the_letter(prefix: str) -> None:
    made = tokens.new_id(prefix)
    assert re.fullmatch(rf"{prefix}_[0-9a-f]{{12}}7[0-9a-f]{{3}}[89ab][0-9a-f]{{15}}", made)
    assert tokens.is_id(made, prefix)
    for wrong in (made.upper(), made[:-1], made + "0", made[4:], " " + made[1:], made[:-1] + " ", made[:-1] + "\n", ""):
        assert not tokens.is_id(wrong, prefix)
    for other in {"tok", "grt", "cli", "usr"} - {prefix}:
        assert not tokens.is_id(made, other)


def test_ids_tell_when_they_were_made_and_do_not_repeat() -> None:
    before = time.time_ns() // 1_000_000
    made = [tokens.uuid7_hex() for _ in range(2000)]
    after = time.time_ns() // 1_000_000
    assert len(set(made)) == 2000
    assert all(before <= int(one[:12], 16) <= after for one in made)
