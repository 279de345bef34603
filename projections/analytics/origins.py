"""Where uses come from: what of an address and a user agent stays the same while the rest changes."""

from __future__ import annotations

import functools
import ipaddress
import re

_IPV6_BITS = 48
_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(rf"((?:{_OCTET}\.){{3}}){_OCTET}")
_COMMENT = re.compile(r"\([^()]*\)")
# What all browsers say of themselves, for the sake of servers long gone.
_SAID_BY_ALL = frozenset({"Mozilla", "AppleWebKit", "Gecko", "KHTML", "Version", "Mobile", "Safari"})


@functools.lru_cache(10_000)
def network(ip: str | None) -> str | None:
    """The /24 of an IPv4 address, the /48 of another, as text; None if it is no address."""
    if ip is None:
        return None
    # As `ipaddress` says it, which takes ten times as long; there are many addresses.
    found = _IPV4.fullmatch(ip)
    if found:
        return f"{found[1]}0/24"
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.IPv6Network((int(address), _IPV6_BITS), strict=False))
        address = address.ipv4_mapped
    return f"{str(address).rpartition('.')[0]}.0/24"


@functools.lru_cache(10_000)
def agent(user_agent: str | None) -> str | None:
    """The product that a user agent names (RFC 9110 §10.1.5), without its version; of a browser its own name.

    `curl/8.5.0` is `curl`, `Mozilla/5.0 (…) Gecko/20100101 Firefox/128.0` is `Firefox`.
    """
    if user_agent is None:
        return None
    words = _COMMENT.sub(" ", user_agent).split()
    products = [word.partition("/")[0] for word in words if "/" in word]
    if products and products[0] == "Mozilla":
        # The last one is the most particular: Edge says that it is Chrome, and Chrome that it is Safari.
        own = [product for product in products if product not in _SAID_BY_ALL]
        return own[-1] if own else "Safari" if "Safari" in products else "Mozilla"
    # Many write a space where the slash belongs: `My App 2.1`.
    name = [word for word in " ".join(words).partition("/")[0].split(" ") if not word.removeprefix("v")[:1].isdigit()]
    return " ".join(name) or user_agent
