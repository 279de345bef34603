"""Where simulated requests come from: networks, addresses and user agents.

All of them are drawn from a seed, none is ever contacted. A network is a /24 (IPv4) or a /48 (IPv6).
"""

from __future__ import annotations

import ipaddress
import random
from typing import Any

from msgspec import Struct

VERSIONS_A_YEAR = 26  # an application that is deployed every other week


class Pool(Struct):
    """Networks of one operator, each given by its first three octets or its first three groups."""

    name: str
    networks: list[str]

    def address(self, rng: random.Random, networks_max: int | None = None) -> str:
        """Any address of the pool, or of its first networks."""
        return host(rng.choice(self.networks[:networks_max]), rng)


def host(network: str, rng: random.Random) -> str:
    """Some address of a network."""
    if ":" in network:
        # The second half is the device's own: privacy extensions, RFC 8981.
        return str(ipaddress.IPv6Address(f"{network}:{rng.randrange(16):x}:" + ":".join(_group(rng) for _ in range(4))))
    return f"{network}.{rng.randrange(1, 255)}"


def _group(rng: random.Random) -> str:
    return f"{rng.randrange(1, 0x10000):x}"


def network_of(ip: str) -> str:
    """The /24 or /48 of an address, as text."""
    if ":" in ip:
        return str(ipaddress.ip_network(f"{ip}/48", strict=False))
    return ip.rpartition(".")[0] + ".0/24"


class World(Struct):
    """The operators that everybody shares."""

    carriers: list[Pool]
    providers: list[Pool]  # home networks
    clouds: list[Pool]
    runners: Pool  # of a hosted CI
    servers: Pool  # rented by the hour, the attackers' favourite
    exits: Pool  # Tor
    proxies: Pool  # residential, among the homes of the providers
    hotels: Pool


class Networks:
    """Hands out networks, each of them once."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._taken: set[str] = set()

    def v4(self, first: int, last: int) -> str:
        """A /24 with a first octet in this range."""
        while True:
            octets = self._rng.randint(first, last), self._rng.randrange(256), self._rng.randrange(256)
            network = ".".join(map(str, octets))
            if octets[0] not in {10, 127, 169, 172, 192} and network not in self._taken:
                self._taken.add(network)
                return network

    def v6(self) -> str:
        """A /48."""
        while True:
            network = (
                f"2a{self._rng.randrange(16):x}{self._rng.randrange(16):x}:{_group(self._rng)}:{_group(self._rng)}"
            )
            if network not in self._taken:
                self._taken.add(network)
                return network

    def pool(self, name: str, first: int, last: int, count: int, *, v6: int = 0) -> Pool:
        return Pool(name, [self.v4(first, last) for _ in range(count)] + [self.v6() for _ in range(v6)])


def world(networks: Networks, rng: random.Random) -> World:
    """The operators. A carrier has few public networks for many phones (RFC 6598), a provider has many."""
    providers = [networks.pool(f"provider-{n}", 78, 99, 120, v6=60) for n in range(5)]
    homes = [network for pool in providers for network in rng.sample(pool.networks, 40) if ":" not in network]
    return World(
        carriers=[networks.pool(f"carrier-{n}", 100, 107, 10, v6=8) for n in range(4)],
        providers=providers,
        clouds=[networks.pool(f"cloud-{n}", 13, 54, 80) for n in range(4)],
        runners=networks.pool("runners", 4, 20, 240),
        servers=networks.pool("servers", 134, 167, 160),
        exits=networks.pool("exits", 185, 185, 60),
        proxies=Pool("proxies", [networks.v4(60, 190) for _ in range(900)] + homes),
        hotels=networks.pool("hotels", 193, 203, 120),
    )


# Agents. A product with its version, then what it runs on, as RFC 9110 §10.1.5 has it.

LIBRARIES = (
    "python-requests/2.32.3",
    "Go-http-client/2.0",
    "okhttp/4.12.0",
    "axios/1.7.9",
    "Apache-HttpClient/5.4.1 (Java/21.0.5)",
    "node-fetch/1.0",
    "reqwest/0.12.9",
    "GuzzleHttp/7",
    "Faraday v2.12.0",
)
TOOLS = ("git/2.47.1", "curl/8.11.0", "gh/2.63.2", "Terraform/1.10.2", "VSCode/1.95.3", "python-requests/2.32.3")
RUNNER_AGENTS = ("git/2.47.0", "actions-runner/2.321.0", "gitlab-runner/17.6.0", "Jenkins/2.479.2")
LAPTOPS = (
    ("Windows NT 10.0; Win64; x64", "Chrome/131.0.0.0 Safari/537.36"),
    ("Windows NT 10.0; Win64; x64", "Chrome/131.0.0.0 Safari/537.36 Edg/131.0.2903.86"),
    ("Macintosh; Intel Mac OS X 10_15_7", "Chrome/131.0.0.0 Safari/537.36"),
    ("X11; Linux x86_64", "Chrome/130.0.0.0 Safari/537.36"),
)
PHONES = (
    "iPhone; iOS 18.1.1; Scale/3.00",
    "iPhone; iOS 17.6; Scale/2.00",
    "Linux; Android 15; Pixel 8",
    "Android 14; SM-S921B",
)
# What reports of stolen tokens name: scripts' libraries, command-line tools, the browser of Tor.
ATTACKERS = (
    "python-requests/2.32.4",
    "Python/3.11 aiohttp/3.12.15",
    "curl/7.88.1",
    "Go-http-client/1.1",
    "axios/1.6.0",
    "HTTPie/3.2.4",
    "Mozilla/5.0 (Windows NT 10.0; rv:128.0) Gecko/20100101 Firefox/128.0",
    "libwww-perl/6.77",
    "Wget/1.21.4",
    "PostmanRuntime/7.43.0",
)


def browser(rng: random.Random) -> str:
    """A browser on some laptop."""
    system, product = rng.choice(LAPTOPS)
    return f"Mozilla/5.0 ({system}) AppleWebKit/537.36 (KHTML, like Gecko) {product}"


def family(agent: str) -> str:
    """The product, without its version."""
    return agent.partition("/")[0].partition(" ")[0]


def other_agent(rng: random.Random, known: set[str]) -> str:
    """An agent of an attacker, of a family that the victim does not use."""
    families = {family(agent) for agent in known}
    return rng.choice([agent for agent in ATTACKERS if family(agent) not in families])


class Product(Struct):
    """Software that calls with a token. Its agent changes with every deployment, or never."""

    name: str
    library: str
    named: bool  # says its own name and version, not only its library's

    def agent(self, release: int) -> str:
        if not self.named:
            return self.library
        return f"{self.name}/{1 + release // VERSIONS_A_YEAR}.{release % VERSIONS_A_YEAR}.0 {self.library}"


def product(rng: random.Random, name: str) -> Product:
    return Product(name, rng.choice(LIBRARIES), rng.random() < 0.6)


def pick(rng: random.Random, table: dict[Any, float]) -> Any:
    """One of the keys, by weight."""
    return rng.choices(list(table), list(table.values()))[0]
