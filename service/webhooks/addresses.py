"""Which URLs a webhook may have, and which addresses may be called: nothing that is not public, unless it is allowed.

A name is resolved once for each request, every address that it has is looked at, and the request goes to one of
those, so that a name that means something else a moment later changes nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from msgspec import Struct

from service.settings import Network

URL_CHARS_MAX = 2_000
RESOLVE_SECONDS_MAX = 5.0
_RESOLVING_AT_ONCE_MAX = 64
_RESOLVING_OF_OWNER_MAX = 4
_ADDRESSES_MAX = 32
_DEFAULT_PORTS = {"https": 443, "http": 80}
_HOST = re.compile(r"(?=.{1,253}\Z)(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}")

# What is not meant for everybody. Source: the IANA IPv4 and IPv6 Special-Purpose Address Registries. Written out,
# since `ipaddress.is_global` differs between Python's versions.
_NOT_PUBLIC_4 = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# Whatever stands for an IPv4 address (mapped, compatible, NAT64, 6to4, Teredo) is outside of this or listed below.
_PUBLIC_6 = ipaddress.ip_network("2000::/3")
_NOT_PUBLIC_6 = tuple(
    ipaddress.ip_network(network)
    for network in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)

Resolve = Callable[[str, str], Awaitable[Sequence[str]]]  # host and owner


class NotCallable(Exception):
    """A URL that no webhook may have, or an address that is not called. `fix` says what would do."""

    def __init__(self, detail: str, fix: str) -> None:
        super().__init__(detail)
        self.fix = fix


class NotResolved(Exception):
    """The name has no address, or nobody said in time which."""


class Target(Struct, frozen=True):
    """A URL in its parts. `host` has no brackets, `path` is everything from the first slash on."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """As in the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """What may be shown: a path or query may hold a secret."""
        return f"{self.scheme}://{self.authority}"


def parse(url: str) -> Target:
    """The parts of a URL. Raises: NotCallable."""
    if len(url) > URL_CHARS_MAX or re.search(r"[^!-~]|[\\<>\"^`{|}]", url):
        raise NotCallable(
            f"url must have at most {URL_CHARS_MAX} characters, all of them visible ASCII that RFC 3986 allows",
            "percent-encode what is in the path, and write a host name as Punycode",
        )
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower().removesuffix("."), parts.port
    except ValueError:
        raise NotCallable("url cannot be read", "send a URL such as https://hooks.example.com/revocations") from None
    if parts.scheme not in _DEFAULT_PORTS or not host:
        raise NotCallable(
            "url must begin with https:// and name a host", "send a URL such as https://hooks.example.com/"
        )
    if "@" in parts.netloc:
        raise NotCallable(
            "url must not hold a user name or password",
            "leave them out: every request is signed, and a secret path serves as well",
        )
    if "#" in url:
        raise NotCallable("url must have no fragment", "leave out what begins with #")
    if not _HOST.fullmatch(host) and not _is_address(host):
        raise NotCallable(f"{host!r} is not a host name or an address", "correct the host in url")
    if port == 0:
        raise NotCallable("port 0 cannot be called", "leave the port out")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme], path)


def _is_address(host: str) -> bool:
    try:
        return "%" not in host and bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def is_public(address: str) -> bool:
    """Whether anybody may be meant by this address, IPv4 or IPv6."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv4Address):
        return not any(found in network for network in _NOT_PUBLIC_4)
    return found in _PUBLIC_6 and not any(found in network for network in _NOT_PUBLIC_6)


class Guard:
    """What may be called. `allowed`: networks that may be besides, at any port and without TLS; the operator's risk."""

    def __init__(self, allowed: Sequence[Network], ports: Sequence[int], resolve: Resolve | None = None) -> None:
        self._allowed = tuple(allowed)
        self._ports = frozenset(ports)
        self._resolve = resolve or Resolver().addresses

    async def addresses(self, target: Target, owner: str = "") -> list[str]:
        """Addresses of the target, each of which may be called. `owner`: for whom a name is looked up.

        Raises: NotCallable if one may not; NotResolved.
        """
        if _is_address(target.host):
            found: Sequence[str] = [target.host]
        else:
            try:
                async with asyncio.timeout(RESOLVE_SECONDS_MAX):
                    found = await self._resolve(target.host, owner)
            except TimeoutError:
                raise NotResolved(f"nobody said within {RESOLVE_SECONDS_MAX:g} s what {target.host} means") from None
            except OSError as error:
                raise NotResolved(f"{target.host} cannot be resolved: {error.strerror}") from None
        if not found:
            raise NotResolved(f"{target.host} has no address")
        for address in found[:_ADDRESSES_MAX]:
            self._check(target, address)
        return list(found[:_ADDRESSES_MAX])

    def _check(self, target: Target, address: str) -> None:
        found = ipaddress.ip_address(address)
        if any(found in network for network in self._allowed):
            return
        allow = "have the operator allow its network with TOKEN_LEDGER_WEBHOOK_ALLOWED_NETWORKS"
        if not is_public(address):
            # Which address it is would tell what stands in the name servers of the operator's network.
            said = "is not a public address" if target.host == address else "resolves to what is not a public address"
            raise NotCallable(
                f"{target.host} {said}", f"give a URL whose host is reachable from everywhere, or {allow}"
            )
        if target.scheme != "https":
            raise NotCallable("url must begin with https://", f"serve the receiver over TLS, or {allow}")
        if target.port not in self._ports:
            ports = ", ".join(map(str, sorted(self._ports)))
            raise NotCallable(
                f"port {target.port} is not called, only {ports}",
                "give a URL without a port, or have the operator add it to TOKEN_LEDGER_WEBHOOK_PORTS",
            )


class Resolver:
    """Names by the system's resolver, in threads of its own.

    A look-up cannot be ended, and a name server that never answers holds its thread for long after everybody has given
    up. So a name that is being looked up is not looked up a second time, and an owner has a few places only.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_RESOLVING_AT_ONCE_MAX, "resolve")
        self._running: dict[str, asyncio.Future[list[str]]] = {}
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def addresses(self, host: str, owner: str) -> Sequence[str]:
        """Raises: OSError."""
        if host not in self._running:
            places = self._places.setdefault(owner, asyncio.Semaphore(_RESOLVING_OF_OWNER_MAX))
            await places.acquire()
            if host in self._running:  # somebody else has begun meanwhile
                places.release()
            else:
                self._begin(host, places)
        return await asyncio.shield(self._running[host])

    def _begin(self, host: str, places: asyncio.Semaphore) -> None:
        running = asyncio.get_running_loop().run_in_executor(self._threads, _look_up, host)
        self._running[host] = running

        def end(done: asyncio.Future[list[str]]) -> None:
            self._running.pop(host, None)
            places.release()
            if not done.cancelled():
                done.exception()  # whoever waited may have given up

        running.add_done_callback(end)


def _look_up(host: str) -> list[str]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    # A scope stays at the address: what is local to a link is no public address anyway.
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
