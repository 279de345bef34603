"""Which passwords may be set, and what counts as the same one."""

from __future__ import annotations

import pytest

from service.errors import InvalidRequest
from service.rules.passwords import check_password, prepared


@pytest.mark.parametrize(
    "password",
    ["12345678", "four words with blanks", " blank at its ends ", "пароль-длинный", "caf\u00e9-noir", "\U0001f600" * 8],
    ids=["eight characters", "blanks within", "blanks around", "letters of any script", "accents", "pictures"],
)
def test_password_of_what_a_keyboard_can_enter_is_taken(password: str) -> None:
    check_password(password)


@pytest.mark.parametrize(
    ("password", "told"),
    [
        ("", "8 to 1024 characters"),
        ("1234567", "8 to 1024 characters"),
        ("e\u0301" * 4, "8 to 1024 characters"),
        ("x" * 1025, "8 to 1024 characters"),
        ("e\u0301" * 513, "8 to 1024 characters"),
        (" " * 12, "blanks alone"),
        ("\u00a0\u3000" * 6, "blanks alone"),
        ("long enough\0", "control characters"),
        ("long\tenough", "control characters"),
        ("long enough\x1b[A", "control characters"),
        ("long enough\x7f", "control characters"),
        ("long\u202eenough", "control characters or invisible ones"),
        ("long\u200benough", "control characters or invisible ones"),
    ],
    ids=[
        *(
            "none",
            "seven",
            "four letters with their accents beside them",
            "too long",
            "too long as it is entered",
            "blanks",
            "blanks of other widths",
        ),
        *("NUL", "tab", "escape", "delete", "turned around", "no width"),
    ],
)
def test_password_that_is_soon_guessed_or_cannot_be_entered_again_is_refused_in_words(password: str, told: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        check_password(password)
    assert told in refused.value.detail
    assert refused.value.fix
    assert not password.strip() or password not in refused.value.detail


@pytest.mark.parametrize(
    ("one", "other"),
    [("cafe\u0301", "caf\u00e9"), ("a\u00a0b", "a b"), ("\u212bngstrom", "\u00c5ngstrom")],
    ids=["accents beside their letters", "no-break space", "signs that are letters"],
)
def test_the_same_letters_are_the_same_password_whatever_keyboard_wrote_them(one: str, other: str) -> None:
    """RFC 8265 §4.2.2."""
    assert prepared(one) == prepared(other) == prepared(prepared(one))


def test_case_and_width_tell_passwords_apart() -> None:
    """RFC 8265 §4.2.2, steps 1 and 3."""
    assert len({prepared(one) for one in ("abc", "ABC", "\uff41\uff42\uff43")}) == 3
