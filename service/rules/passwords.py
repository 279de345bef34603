"""What a password may be. Pure. Source: RFC 8265 §4.2 (OpaqueString), NIST SP 800-63B §3.1.1.2."""

from __future__ import annotations

import unicodedata

from service.errors import InvalidRequest
from service.rules.registry import UNSEEN

PASSWORD_CHARS_MIN = 8
PASSWORD_CHARS_MAX = 1_024


def prepared(password: str) -> str:
    """As it is hashed and compared: keyboards write the same letters and blanks as different code points."""
    spaced = "".join(" " if unicodedata.category(letter) == "Zs" else letter for letter in password)
    return unicodedata.normalize("NFC", spaced)


def check_password(password: str) -> None:
    """Raises: InvalidRequest, which says why in words for a person."""
    # As it is entered, for that is cut when somebody signs in: to compose long runs of marks takes their square.
    meant = prepared(password[: PASSWORD_CHARS_MAX + 1])
    if len(meant) < PASSWORD_CHARS_MIN or len(password) > PASSWORD_CHARS_MAX:
        raise InvalidRequest(
            f"a password has {PASSWORD_CHARS_MIN} to {PASSWORD_CHARS_MAX} characters: shorter ones are soon guessed",
            fix="choose a longer one; a few words that do not belong together are easy to remember",
        )
    if not meant.strip(" "):
        raise InvalidRequest("a password of blanks alone is soon guessed", fix="choose one with letters in it")
    if any(unicodedata.category(letter) in UNSEEN for letter in meant):
        raise InvalidRequest(
            "the password has control characters or invisible ones in it, which not every keyboard and form can enter",
            fix="choose one of letters, digits, signs and blanks",
        )
