"""What each page shows, one class a template. Every member must be given; None means that there is none.

Texts may be what a stranger chose: templates escape them. `hidden` goes into the page's form as it is: the sealed
request, the CSRF token. `problem` is said at the form, where the reason is that it was sent before and refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Literal, TypedDict

Hidden = Sequence[tuple[str, str]]


class Link(TypedDict):
    """`href` is a URL of ours, a path without the issuer's own, or a redirect URI that its client registered."""

    href: str
    label: str


class SignIn(TypedDict):
    """Posts `username`, `password` and `hidden` to `/sign-in`. `app`: the name of the one that asks."""

    app: str | None
    username: str
    problem: str | None
    hidden: Hidden


class ScopeShown(TypedDict):
    """`keeps`: lets the app go on while the person is away, until they withdraw it."""

    name: str
    description: str
    keeps: bool


class Consent(TypedDict):
    """Posts `decision` (allow or deny) and `hidden` to `/oauth2/consent`.

    `destination`: where one is sent back to, in words (`destination_of`). `native`: any program of the person's device
    could ask under this name. `known`: this app has some consent already, and `scopes` is the whole of it from now.
    """

    app: str
    person: str
    scopes: Sequence[ScopeShown]
    destination: str
    native: bool
    known: bool
    hidden: Hidden


class SignOut(TypedDict):
    """Posts `hidden` to `action`. `app`: the name of the one that asks to sign out, if one does."""

    app: str | None
    person: str
    action: str
    hidden: Hidden


class SignedOut(TypedDict):
    """`onward`: back to the app."""

    onward: Link | None


class Error(TypedDict):
    """`what` happened and what to do (`fix`), each a sentence. `onward`: back to the app, or to begin again."""

    title: str
    what: str
    fix: str
    request_id: str
    onward: Link | None


class Continue(TypedDict):
    """One button that leads on. `method` link: to `href`; post: posts `hidden` there, for `response_mode=form_post`."""

    title: str
    what: str
    label: str
    method: Literal["link", "post"]
    href: str
    hidden: Hidden


class Onward(TypedDict):
    """Leads to `href` at once and without a click; see `onward`."""

    href: str


class AppShown(TypedDict):
    """An app that the person allows something. `active`: when it last got a token for them, where that is known."""

    client_id: str
    name: str
    scopes: Sequence[ScopeShown]
    since: datetime
    active: datetime | None


class TokenShown(TypedDict):
    """A personal access token, never its string. `name` is None where it cannot be read any more."""

    token_id: str
    name: str | None
    scope: str
    issued_at: datetime
    expires_at: datetime


class SessionShown(TypedDict):
    """A browser in which the person is signed in. `current`: this one. `browser` and `ip`: as they were then."""

    session_id: str
    browser: str | None
    ip: str | None
    since: datetime
    current: bool


class Draft(TypedDict):
    """The form for a new token, as it was sent or as it begins. `days`: of its life."""

    name: str
    ticked: Collection[str]
    days: int


class Account(TypedDict):
    """Posts to paths below `/account`; see `service/pages/account.py`.

    `said`: what was just done. `problem`: why no token was issued. `offered`: scopes that a new token may have.
    `more`: there are more tokens than are listed.
    """

    person: str
    said: str | None
    problem: str | None
    apps: Sequence[AppShown]
    tokens: Sequence[TokenShown]
    more: bool
    offered: Sequence[ScopeShown]
    lifetimes: Sequence[int]
    draft: Draft
    sessions: Sequence[SessionShown]
    hidden: Hidden


class Issued(TypedDict):
    """`token` is the string itself, which no other page shows."""

    person: str
    token: str
    label: str
    scope: str
    expires_at: datetime


class ShownBefore(TypedDict):
    """Posts `token_id` and `hidden` to `/account/tokens/revoke` while the token `works`. It itself is not here."""

    person: str
    token_id: str
    label: str
    expires_at: datetime
    works: bool
    hidden: Hidden
