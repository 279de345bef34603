"""People who sign in, and the browsers that they use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import urlencode

from service.commands import commit
from service.incoming import Incoming
from service.oauth.forms import FORM
from service.registry import Asker, NewUser, user_registration
from service.rules.registry import Profile
from service.signin.browser import Cookie
from tests.hosts import ISSUER, Host
from tests.rsgi import END, request
from tests.running import CANARY_PASSWORD, CANARY_USERNAME, unique

SYSTEM = Asker(None, None)
SAME_ORIGIN = (("origin", ISSUER), ("sec-fetch-site", "same-origin"))


class Person:
    """Somebody with a name and a password."""

    def __init__(self, user_id: str, username: str, password: str) -> None:
        self.user_id = user_id
        self.username = username
        self.password = password


async def joined(host: Host, *, kind: Any = "person", password: str | None = "", scope: str = "") -> Person:
    """A new user. No password if it is None."""
    username, secret = unique(CANARY_USERNAME), unique(CANARY_PASSWORD) if password == "" else password
    new = NewUser(kind=kind, profile=Profile(username=username), scope=scope, password=secret)
    answer, seq = await commit(host.runtime, user_registration(host.runtime, SYSTEM, new))
    await host.project()
    assert host.position >= seq
    return Person(answer["user_id"], username, secret or "")


class Browser:
    """Keeps cookies and sends them, as browsers do with requests of the same site."""

    def __init__(self) -> None:
        self.cookies: dict[str, str] = {}

    def keep(self, cookies: Iterable[Cookie]) -> None:
        for header, text in cookies:
            if header != "set-cookie":
                continue
            name, _, value = text.partition(";")[0].partition("=")
            if "Max-Age=0" in text:
                self.cookies.pop(name, None)
            else:
                self.cookies[name] = value

    def header(self) -> tuple[tuple[str, str], ...]:
        text = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        return (("cookie", text),) if text else ()

    def get(self, path: str = "/account", query: str = "") -> Incoming:
        return request(*self.header(), ("sec-fetch-site", "none"), method="GET", path=path, query=query)

    def post(
        self, path: str, fields: dict[str, str], *, headers: Iterable[tuple[str, str]] = SAME_ORIGIN, peer: str = ""
    ) -> Incoming:
        body = urlencode(fields).encode()
        sent = (*self.header(), *headers, ("content-type", FORM), ("content-length", str(len(body))))
        return request(*sent, body=(body, END), path=path, peer=peer or "198.51.100.7")
