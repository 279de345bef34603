"""Who there can be in a simulation, and what each of them holds. Plain data; `population` makes it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from msgspec import Struct

from events.types import Kind
from tests.bench.places import Pool, Product

SECOND, MINUTE, HOUR, DAY = 1_000_000, 60_000_000, 3_600_000_000, 86_400_000_000  # in microseconds
NEVER = 2**62
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

AREAS = (
    *("orders", "invoices", "payments", "customers", "catalog", "stock", "shipping", "returns", "reports", "search"),
    *("messages", "files", "builds", "repos", "issues", "metrics", "alerts", "users", "teams", "billing"),
)
VERBS = ("read", "write", "delete", "admin")
SCOPES = tuple(f"{area}:{verb}" for area in AREAS for verb in VERBS)
ZONES = {-8: 0.12, -5: 0.22, 0: 0.14, 1: 0.26, 2: 0.06, 5.5: 0.08, 8: 0.06, 9: 0.06}  # hours east of UTC, by share


class Preset(Struct, frozen=True):
    """What the population is made of. Shares of the tokens; PATs are the rest.

    `sizes`: how unequal the services are (exponent of Zipf's law). `roaming`: people who often change networks.
    """

    name: str
    renewed: float = 0.40  # access tokens by client credentials, one after another
    signed_in: float = 0.35  # access and refresh tokens of people's applications
    services: float = 0.05  # SATs
    apps: float = 0.4  # of the clients: applications of people; the others are services
    sizes: float = 1.1
    roaming: float = 0.2
    autoscaled: float = 0.4  # services whose instances have public addresses of their own


PRESETS = {
    "reported": Preset("reported"),
    "tuning": Preset(
        "tuning", renewed=0.3, signed_in=0.3, services=0.08, apps=0.3, sizes=0.9, roaming=0.3, autoscaled=0.5
    ),
}
TUNING_SEEDS = range(1, 10)  # thresholds may be set by what these show, and by no other


class Token(Struct):
    """A token and all that validation asks of it. Times in microseconds since 1970; `ended_us`: when it was revoked."""

    token_id: str
    grant_id: str
    kind: Kind
    client_id: str | None
    subject: str
    scope: tuple[str, ...]
    audience: str
    issued_us: int
    expires_us: int
    ended_us: int = NEVER

    def outcome(self, us: int, scope: str = "", audience: str = "") -> str:
        """What `service.validation.evaluate` says of it, in the same order."""
        if us >= self.ended_us:
            return "revoked"
        if us >= self.expires_us:
            return "expired"
        if audience and audience != self.audience:
            return "wrong_audience"
        if scope and not set(scope.split(" ")) <= set(self.scope):
            return "insufficient_scope"
        return "valid"


class Organisation(Struct):
    """`office`, `egress`: the addresses that its people, and its services, appear under."""

    number: int
    zone: float
    office: list[str]
    egress: list[str]
    region: Pool  # of its cloud, where instances with addresses of their own appear
    audience: str
    areas: list[str]
    people: list[Person]
    gateways: list[Gateway]


class Gateway(Struct):
    """A resource server that asks about tokens. `caller` is its token or client; empty for `forward-auth`.

    `own`: the addresses that an introspecting one is seen under, since a form has no room for the bearer's.
    """

    endpoint: str
    caller: str
    own: list[str]
    agent: str


class Person(Struct):
    """`offices`: works at the office; else at home. `homes`: one address for each week or so."""

    user_id: str
    organisation: Organisation
    offices: bool
    homes: list[str]
    laptop: str
    since_us: int
    away: tuple[int, int, str] | None = None  # from day, until day, address


class Client(Struct):
    client_id: str
    organisation: Organisation
    app: bool
    scope: tuple[str, ...]
    ttl_us: int
    product: Product


class Chain(Struct):
    """Access tokens of one client, or versions of one PAT or SAT, one after another: (from, token)."""

    owner: Client | Person | Organisation
    steps: list[tuple[int, Token]]

    def token_at(self, us: int) -> Token | None:
        """The one in use."""
        found = None
        for since, token in self.steps:
            if since > us:
                break
            found = token
        return found


class Session(Struct):
    """A person's application in use. `stale`: an expired token that was sent first, before it was renewed."""

    start_us: int
    length_us: int
    uses: int
    token: Token
    addresses: list[str]
    agent: str
    stale: Token | None = None


class SignIn(Struct):
    """A grant of a person to an application. `spent`: its refresh tokens but the last, which is `refresh`."""

    grant_id: str
    client: Client
    person: Person
    phone: bool
    sessions: list[Session]
    spent: list[str]
    access: Token
    refresh: Token
    ended_us: int = NEVER


class Size(Struct, frozen=True):
    """How much to simulate. `start` is midnight UTC. `kids`: signing keys, one after another in equal stretches."""

    seed: int
    start: datetime
    days: int = 30
    clients: int = 200
    tokens: int = 20_000
    uses: int = 50_000_000
    attacks_per_rule: int = 20
    preset: Preset = PRESETS["reported"]
    kids: tuple[str, ...] = ("kid-1", "kid-2")

    @property
    def start_us(self) -> int:
        return int((self.start - _EPOCH).total_seconds()) * SECOND

    @property
    def end_us(self) -> int:
        return self.start_us + self.days * DAY


def moment(us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=us)


def local_hour(us: int, zone: float) -> float:
    return (us + int(zone * HOUR)) % DAY / HOUR


def is_workday(us: int, zone: float) -> bool:
    # 1970-01-01 was a Thursday.
    return ((us + int(zone * HOUR)) // DAY + 3) % 7 < 5
