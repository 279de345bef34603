"""Where somebody signed in, as far as they may know it again: a browser, in a few words, and a network address.

Both are theirs, and the log is for ever: they stand in it sealed under the person's own key, and are gone with it.
"""

from __future__ import annotations

import re

import msgspec
from msgspec import Struct

from projections.registry import Session
from service.grants import seal_text
from service.incoming import Incoming
from service.registry import read_sealed
from service.runtime import Runtime

_CONTEXT = "place of a sign-in"
# The first that fits: most browsers name others too, which they want to be taken for.
_BROWSERS = (
    ("Edge", re.compile(r"\bEdg(?:e|A|iOS)?/")),
    ("Opera", re.compile(r"\b(?:OPR|OPT|OPiOS|Opera)/")),
    ("Samsung Internet", re.compile(r"\bSamsungBrowser/")),
    ("Firefox", re.compile(r"\b(?:Firefox|FxiOS)/")),
    ("Chrome", re.compile(r"\b(?:HeadlessChrome|Chrome|Chromium|CriOS)/")),
    ("Safari", re.compile(r"\bSafari/")),
)
_SYSTEMS = (
    ("Android", re.compile(r"\bAndroid\b")),
    ("iPhone", re.compile(r"\biPhone\b")),
    ("iPad", re.compile(r"\biPad\b")),
    ("Windows", re.compile(r"\bWindows\b")),
    ("ChromeOS", re.compile(r"\bCrOS\b")),
    ("macOS", re.compile(r"\bMac OS X\b|\bMacintosh\b")),
    ("Linux", re.compile(r"\bLinux\b")),
)


class Place(Struct, frozen=True, omit_defaults=True):
    """None for what is not known, or not any more."""

    browser: str | None = None
    ip: str | None = None


_decode = msgspec.json.Decoder(Place).decode


def browser_named(user_agent: str) -> str | None:
    """What a person calls the browser: `Firefox on Windows`. None for one that says nothing of the kind."""
    browser = next((name for name, pattern in _BROWSERS if pattern.search(user_agent)), None)
    system = next((name for name, pattern in _SYSTEMS if pattern.search(user_agent)), None)
    if system is None:
        return browser
    return f"{browser or 'A browser'} on {system}"


async def seal_place(runtime: Runtime, incoming: Incoming, user_id: str) -> bytes | None:
    """Where the request comes from, sealed. Raises: Unavailable."""
    place = Place(browser_named(incoming.header("user-agent") or ""), incoming.client_ip(runtime.settings))
    return await seal_text(runtime, user_id, msgspec.json.encode(place).decode(), _CONTEXT)


async def place_of(runtime: Runtime, session: Session) -> Place:
    """Where the session began. Raises: Unavailable."""
    text = await read_sealed(runtime, session.user_id, session.sealed_place, _CONTEXT)
    return _decode(text) if text is not None else Place()
