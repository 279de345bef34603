"""Browsers that somebody has signed in with before: guesses made elsewhere do not keep that person out of them.

Such a browser holds a random id and, for each of a few people, the sequence of the user's event that was known when
they signed in, with our signature of all that and their name's hash. It proves nothing but that: who has one has a
counter of failures of their own, for that person alone, until the password changes.
"""

from __future__ import annotations

import hmac
import re
import secrets

from msgspec import Struct

from service.incoming import Incoming
from service.runtime import Runtime
from service.signin.browser import Cookie, read_cookie, set_cookie

_COOKIE = "acquainted"
_ID = re.compile(r"[A-Za-z0-9_-]{22}")
_ENTRY = re.compile(r"([0-9]{1,16})-([0-9a-f]{64})")
_PEOPLE_MAX = 5
_SECONDS = 180 * 86_400


class Acquaintance(Struct, frozen=True):
    """`user_seq`: the user's last event when the person signed in with the browser."""

    browser: str
    user_seq: int


def acquaintance(runtime: Runtime, incoming: Incoming, name_hash: str) -> Acquaintance | None:
    """With the person of this name, if they have signed in with the browser."""
    browser, entries = _read(runtime, incoming)
    for seq, signature in entries:
        if hmac.compare_digest(signature, _signed(runtime, browser, seq, name_hash)):
            return Acquaintance(browser, int(seq))
    return None


def acquaint(runtime: Runtime, incoming: Incoming, name_hash: str, user_seq: int) -> Cookie:
    """Has the browser remember that the person signed in with it, and a few others before them."""
    browser, entries = _read(runtime, incoming)
    browser = browser or secrets.token_urlsafe(16)
    mine = (str(user_seq), _signed(runtime, browser, str(user_seq), name_hash))
    others = [one for one in entries if not hmac.compare_digest(one[1], _signed(runtime, browser, one[0], name_hash))]
    kept = [mine, *others][:_PEOPLE_MAX]
    value = ".".join([browser, *(f"{seq}-{signature}" for seq, signature in kept)])
    return set_cookie(runtime, _COOKIE, value, seconds=_SECONDS)


def _read(runtime: Runtime, incoming: Incoming) -> tuple[str, list[tuple[str, str]]]:
    """The browser's id, empty if it has none, and sequences with signatures, not looked at yet."""
    browser, *parts = (read_cookie(runtime, incoming, _COOKIE) or "").split(".")[: _PEOPLE_MAX + 1]
    if not _ID.fullmatch(browser):
        return "", []
    return browser, [(found[1], found[2]) for part in parts if (found := _ENTRY.fullmatch(part))]


def _signed(runtime: Runtime, browser: str, seq: str, name_hash: str) -> str:
    text = f"{browser} {seq} {name_hash}"
    return hmac.digest(runtime.master.acquaintances, text.encode(), "sha256").hex()
