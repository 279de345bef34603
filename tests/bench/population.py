"""Who there is: organisations, their clients, people and services, and every token that they are given.

The ledger's half of the simulation. All is planned before the first use: when each token is issued, renewed, rotated
or revoked. What the plan says happened is what the service would have written, with identifiers from the seed.
The service that is simulated opened on the first day: nobody had a token of it before.
"""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Iterator
from typing import Any

from events.ledger import Append
from events.types import (
    AuthorizationGranted,
    ClientMetadata,
    ClientRegistered,
    ClientSecretRotated,
    CodeRedeemed,
    GrantRevoked,
    Kind,
    LedgerEvent,
    MintedToken,
    Reason,
    RefreshReplayed,
    ScopeRegistered,
    SessionStarted,
    TokenIssued,
    TokenRefreshed,
    TokenRevoked,
    TokenSuperseded,
    UsernameClaimed,
    UserRegistered,
)
from tests.bench.people import (
    AREAS,
    DAY,
    HOUR,
    MINUTE,
    SCOPES,
    SECOND,
    VERBS,
    ZONES,
    Chain,
    Client,
    Gateway,
    Organisation,
    Person,
    Session,
    SignIn,
    Size,
    Token,
    is_workday,
    local_hour,
    moment,
)
from tests.bench.places import PHONES, Networks, Pool, World, browser, host, pick, product, world

_GATEWAYS = ("envoy/1.32.1", "kong/3.8.0", "nginx/1.27.3", "Go-http-client/2.0")
REDIRECT_URI = "https://app.example/callback"
_STALE = 0.03  # of an application's sessions begin with a token that has expired meanwhile
_ANSWERED_AGAIN = 0.01  # of refreshes whose response is lost and asked for again at once
_LATE_RETRY = 0.004  # of sign-ins end because the response was lost and asked for again too late


class Population:
    """Everybody and everything, and the ledger's events about them."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self._rng = random.Random(f"{size.seed}/population/{size.preset.name}")
        # Of its own, so that what people do with their tokens does not depend on how they come by them.
        self.signing_in = random.Random(f"{size.seed}/signing in/{size.preset.name}")
        self.networks = Networks(self._rng)
        self.world: World = world(self.networks, self._rng)
        self.organisations: list[Organisation] = []
        self.clients: list[Client] = []
        self.renewals: list[Chain] = []
        self.pats: list[Chain] = []
        self.sats: list[Chain] = []
        self.sign_ins: list[SignIn] = []
        self.tokens: list[Token] = []
        self._events: list[tuple[int, int, str, LedgerEvent]] = []
        self._make()

    # What stands in the ledger

    def ledger(self) -> Iterator[Append]:
        """Every event, in the order of its time."""
        for _, _, subject, event in sorted(self._events, key=lambda entry: entry[:2]):
            yield Append(f"ledger.main.{subject}", event)

    @property
    def events(self) -> int:
        return len(self._events)

    def identifier(self, prefix: str, us: int, rng: random.Random | None = None) -> str:
        """As `service.tokens.new_id` makes them: a UUIDv7 of that time."""
        rng = rng or self._rng
        digits = f"{us // 1000:012x}7{rng.getrandbits(12):03x}{8 | rng.getrandbits(2):x}"
        return prefix + digits + f"{rng.getrandbits(60):015x}"

    def record(self, us: int, subject: str, of: Any, /, **fields: Any) -> None:
        """Notes one event of the ledger; its id comes from `rng` if that is given."""
        by = fields.pop("by", "system")
        event = of(id=self.identifier("", us, fields.pop("rng", None)), occurred_at=moment(us), by=by, **fields)
        self._events.append((us, len(self._events), subject, event))

    def _mint(self, us: int, grant_id: str, ttl_us: int, **fields: Any) -> Token:
        expires_us = (us + ttl_us) // SECOND * SECOND
        token = Token(self.identifier("tok_", us), grant_id, issued_us=us, expires_us=expires_us, **fields)
        self.tokens.append(token)
        return token

    def _minted(self, token: Token, *, jwt: bool = False) -> MintedToken:
        size = self.size
        share = (token.issued_us - size.start_us) / (size.days * DAY)
        return MintedToken(
            token_id=token.token_id,
            sha256=hashlib.sha256(token.token_id.encode()).hexdigest(),
            kind=token.kind,
            scope=" ".join(token.scope),
            audience=(token.audience,),
            expires_at=moment(token.expires_us),
            kid=size.kids[max(0, min(int(share * len(size.kids)), len(size.kids) - 1))] if jwt else None,
        )

    def issue(self, us: int, kind: Kind, ttl_us: int, **fields: Any) -> Token:
        """One token with a grant of its own."""
        rotated_from = fields.pop("rotated_from", None)
        token = self._mint(us, self.identifier("grt_", us), ttl_us, kind=kind, **fields)
        access = kind is Kind.ACCESS
        self.record(
            us,
            f"access.{token.client_id}" if access else f"grant.{token.grant_id}",
            TokenIssued,
            by=token.client_id if access else "system",
            grant_id=token.grant_id,
            subject=token.subject,
            client_id=token.client_id,
            scope=" ".join(token.scope),
            audience=(token.audience,),
            tokens=(self._minted(token, jwt=access and len(self.tokens) % 3 > 0),),
            rotated_from=rotated_from,
        )
        return token

    def rotate(self, us: int, old: Token, overlap_us: int) -> Token:
        """A PAT or SAT like the old one, which ends after the overlap."""
        new = self.issue(
            us,
            old.kind,
            90 * DAY,
            client_id=None,
            subject=old.subject,
            scope=old.scope,
            audience=old.audience,
            rotated_from=old.token_id,
        )
        ends_us = (us + overlap_us) // SECOND * SECOND
        self.record(
            us,
            f"grant.{old.grant_id}",
            TokenSuperseded,
            grant_id=old.grant_id,
            token_id=old.token_id,
            successor_id=new.token_id,
            ends_at=moment(ends_us),
        )
        old.expires_us = min(old.expires_us, ends_us)
        return new

    def revoke(self, us: int, token: Token, reason: Reason = Reason.ADMIN) -> None:
        self.record(
            us,
            f"grant.{token.grant_id}",
            TokenRevoked,
            grant_id=token.grant_id,
            token_id=token.token_id,
            reason=reason,
        )
        token.ended_us = us

    def replay(self, us: int, sign_in: SignIn, spent: str, *, answered: bool) -> None:
        """A spent refresh token is presented again; unless it is answered, that ends the grant: RFC 9700 §4.14.2."""
        grant = {"grant_id": sign_in.grant_id}
        subject = f"grant.{sign_in.grant_id}"
        by = sign_in.client.client_id
        self.record(us, subject, RefreshReplayed, by=by, token_id=spent, answered=answered, **grant)
        if not answered:
            self.record(us, subject, GrantRevoked, reason=Reason.REUSE_DETECTED, **grant)
            sign_in.ended_us = us
            for token in self.tokens:
                if token.grant_id == sign_in.grant_id:
                    token.ended_us = us

    # How it comes to be

    def _make(self) -> None:
        size, preset = self.size, self.size.preset
        for name in SCOPES:
            self.record(
                size.start_us, f"scope.{name.encode().hex()}", ScopeRegistered,
                name=name, description=f"{name} of the simulation", audience=(), implies=(),
            )  # fmt: skip
        for number in range(max(2, size.clients // 4)):
            self._organisation(number)
        for number in range(size.clients):
            self._client(number)
        for organisation in self.organisations:
            self._gateways(organisation)
        # Some tokens are left for what happens to the others: attackers refresh, administrators replace.
        spare = 4 * size.attacks_per_rule + size.clients // 10
        self._renewals(int(size.tokens * preset.renewed))
        self._sign_ins(len(self.tokens) + int(size.tokens * preset.signed_in))
        self._sats(len(self.tokens) + int(size.tokens * preset.services))
        self._pats(size.tokens - spare)

    def _organisation(self, number: int) -> None:
        rng = self._rng
        office = self.networks.v4(62, 77)
        region = Pool(f"region-{number}", rng.sample(rng.choice(self.world.clouds).networks, 6))
        self.organisations.append(
            Organisation(
                number=number,
                zone=pick(rng, ZONES),
                office=[f"{office}.{rng.randrange(1, 255)}" for _ in range(rng.randint(1, 3))],
                egress=[region.address(rng, 2) for _ in range(rng.randint(1, 3))],
                region=region,
                audience=f"https://api-{number}.example",
                areas=rng.sample(AREAS, 5),
                people=[],
                gateways=[],
            )
        )

    def _first_us(self) -> int:
        """When somebody begins: most moved here in the first two days, the others come later."""
        size, rng = self.size, self._rng
        days = rng.random() * 2 if rng.random() < 0.6 else rng.random() * size.days * 0.8
        return size.start_us + int(min(days, size.days * 0.8) * DAY) + MINUTE

    def _awake(self, us: int, zone: float) -> int:
        """On the same day, at an hour at which somebody sits at a desk."""
        local = self._rng.triangular(7.5, 21, 12)
        return max(us // DAY * DAY + int((local - zone) % 24 * HOUR), self.size.start_us + MINUTE)

    def _client(self, number: int) -> None:
        rng, us = self._rng, self.size.start_us + number * SECOND // 100
        organisation = self.organisations[number % len(self.organisations)]
        client_id = self.identifier("cli_", us)
        app = rng.random() < self.size.preset.apps
        areas = rng.sample(organisation.areas, 2)
        scope = tuple(f"{area}:{verb}" for area in areas for verb in VERBS[: rng.randint(1, 3)])
        ttl_us = rng.choice((4, 8, 12)) * HOUR
        made = Client(client_id, organisation, app, scope, ttl_us, product(rng, f"{rng.choice(AREAS)}-{number}"))
        metadata = ClientMetadata(
            client_name=made.product.name,
            grant_types=("authorization_code", "refresh_token") if app else ("client_credentials",),
            response_types=("code",) if app else (),
            redirect_uris=(REDIRECT_URI,) if app else (),
            scope=" ".join(scope),
            token_endpoint_auth_method="client_secret_basic",
            access_token_format="jwt",
            access_token_ttl_seconds=3600,
            refresh_token_idle_ttl_seconds=14 * 86_400,
            refresh_token_max_ttl_seconds=90 * 86_400,
            audience=(organisation.audience,),
            may_introspect=False,
        )
        self.record(
            us, f"client.{client_id}", ClientRegistered,
            client_id=client_id, metadata=metadata, secret_sha256=hashlib.sha256(client_id.encode()).hexdigest(),
        )  # fmt: skip
        self.clients.append(made)
        if rng.random() < 0.1:
            later, secret = us + rng.randrange(2 * DAY, self.size.days * DAY), f"{client_id} 2"
            self.record(
                later, f"client.{client_id}", ClientSecretRotated, client_id=client_id,
                secret_sha256=hashlib.sha256(secret.encode()).hexdigest(), previous_ends_at=moment(later + DAY),
            )  # fmt: skip

    def user(self, us: int, kind: str, scope: tuple[str, ...]) -> str:
        """Registers a user, whose profile is sealed under a key that nobody has, as after an erasure."""
        user_id, username = self.identifier("usr_", us), f"{self._rng.getrandbits(256):064x}"
        self.record(us, f"username.{username}", UsernameClaimed, username_hash=username, user_id=user_id)
        self.record(
            us, f"user.{user_id}", UserRegistered,
            user_id=user_id, kind=kind, username_hash=username, sealed_profile=self._rng.randbytes(96),
            scope=" ".join(scope), password_hash=None,
        )  # fmt: skip
        return user_id

    def person(self, us: int) -> Person:
        """Somebody of some organisation; every other call answers with somebody who is there already."""
        rng = self._rng
        organisation = rng.choice(self.organisations)
        present = [person for person in organisation.people if person.since_us <= us]
        if present and rng.random() < 0.4:
            return rng.choice(present)
        provider = rng.choice(self.world.providers)
        networks = rng.sample(provider.networks, 8)
        moves = rng.random() < 0.2  # a new address after each reconnection, every week or so
        first = host(networks[0], rng)
        weeks = self.size.days // 7 + 1
        homes = [first] + [host(rng.choice(networks), rng) if moves else first for _ in range(weeks)]
        person = Person(self.user(us, "person", ()), organisation, rng.random() < 0.6, homes, browser(rng), us)
        if rng.random() < self.size.preset.roaming / 4:
            day = rng.randrange(self.size.days)
            person.away = (day, day + rng.randint(2, 5), self.world.hotels.address(rng))
        organisation.people.append(person)
        return person

    def _scope(self, organisation: Organisation) -> tuple[str, ...]:
        rng = self._rng
        areas = rng.sample(organisation.areas, rng.randint(1, 2))
        return tuple(f"{area}:{verb}" for area in areas for verb in VERBS[: rng.randint(1, 2)])

    def _gateways(self, organisation: Organisation) -> None:
        """Its resource servers, each with a SAT of its own to ask with."""
        rng = self._rng
        for _ in range(rng.randint(1, 3)):
            us = self.size.start_us + MINUTE
            endpoint = pick(rng, {"validate": 0.55, "forward-auth": 0.3, "introspect": 0.1, "batch": 0.05})
            caller = ""
            if endpoint != "forward-auth":
                user = self.user(us, "service", ("ledger:validate",))
                token = self.issue(
                    us, Kind.SAT, 366 * DAY,
                    client_id=None, subject=user, scope=("ledger:validate",), audience=organisation.audience,
                )  # fmt: skip
                caller = token.token_id
            own = [organisation.region.address(rng, 1) for _ in range(2)]
            organisation.gateways.append(Gateway(endpoint, caller, own, rng.choice(_GATEWAYS)))

    def _renewals(self, count: int) -> None:
        """Access tokens of services. Each lives so long that the count is about right."""
        size, rng = self.size, self._rng
        services = [client for client in self.clients if not client.app] or self.clients[:1]
        mean_us = size.days * DAY * len(services) // max(1, count)
        for client in services:
            client.ttl_us = max(5 * MINUTE, min(7 * DAY, int(mean_us * rng.choice((0.5, 0.8, 1.2, 2.5)))))
            since = size.start_us + MINUTE + rng.randrange(10 * MINUTE)
            steps: list[tuple[int, Token]] = []
            while since < size.end_us and len(self.tokens) < size.tokens * 0.6:
                token = self.issue(
                    since, Kind.ACCESS, client.ttl_us, client_id=client.client_id, subject=client.client_id,
                    scope=client.scope, audience=client.organisation.audience,
                )  # fmt: skip
                steps.append((since + SECOND, token))
                # Renewed shortly before the end, as libraries do.
                since = token.expires_us - rng.randrange(20 * SECOND, 120 * SECOND)
            self.renewals.append(Chain(client, steps))

    def _sign_ins(self, until: int) -> None:
        apps = [client for client in self.clients if client.app] or self.clients[-1:]
        while len(self.tokens) < until - 1:
            self._sign_in(self._rng.choice(apps), self._first_us(), until)

    def _sign_in(self, client: Client, us: int, until: int) -> None:
        """One grant, from signing in to the last session of some days."""
        rng, size = self._rng, self.size
        person, phone = self.person(us), rng.random() < 0.6
        agent = f"{client.product.name}/{rng.randint(3, 6)}.{rng.randrange(20)}.0 ({rng.choice(PHONES)})"
        carrier = rng.choice(self.world.carriers)
        grant_id = self.identifier("grt_", us)
        access, refresh = self.mint_pair(us, grant_id, person, client)
        self._granted(us, grant_id, access, refresh)
        made = SignIn(grant_id, client, person, phone, [], [], access, refresh)
        self.sign_ins.append(made)
        days = rng.lognormvariate(1.6, 0.8)
        end_us = min(us + int(days * DAY), size.end_us - HOUR)
        for start_us in self._session_starts(us + MINUTE, end_us, person.organisation.zone):
            stale = None
            length_us = int(min(40, rng.lognormvariate(1.5, 0.9)) * MINUTE)
            if start_us + length_us >= made.access.expires_us:
                if len(self.tokens) + 2 > until:
                    break
                if start_us > made.access.expires_us and rng.random() < _STALE:
                    stale = made.access
                self.refresh(start_us, made)
                if rng.random() < _ANSWERED_AGAIN:
                    self.replay(start_us + rng.randint(2, 8) * SECOND, made, made.spent[-1], answered=True)
            uses = max(1, int(rng.lognormvariate(2.0, 0.9)))
            where = self._session_places(person, start_us, carrier if phone else None)
            mobile = agent if phone else person.laptop
            made.sessions.append(Session(start_us, length_us, uses, made.access, where, mobile, stale))
        if made.spent and rng.random() < _LATE_RETRY * 2:
            self.replay(made.sessions[-1].start_us + rng.randint(15, 90) * SECOND, made, made.spent[-1], answered=False)

    def _session_starts(self, us: int, end_us: int, zone: float) -> list[int]:
        """When an application is opened: mostly in waking hours, two to four times a day."""
        rng, starts = self._rng, [us]
        day_us = us // DAY * DAY
        while day_us < end_us:
            for _ in range(rng.choice((1, 2, 3, 3, 4))):
                local = rng.triangular(6.5, 23.5, 18 if not is_workday(day_us, zone) else 13)
                at = day_us + int((local - zone) % 24 * HOUR)
                if starts[0] + HOUR < at < end_us:
                    starts.append(at)
            day_us += DAY
        starts.sort()
        # An application is not opened again while it is open.
        return [at for at, before in zip(starts, [0, *starts], strict=False) if at - before > 45 * MINUTE]

    def _session_places(self, person: Person, us: int, carrier: Pool | None) -> list[str]:
        """The addresses of one session: a phone is on its carrier's or somebody's network, and may change over."""
        rng = self._rng
        at = place(person, us, self.size.start_us)
        if carrier is None:
            return [at]
        if rng.random() < 0.45:
            return [at] if rng.random() < 0.85 else [at, carrier.address(rng)]
        return [carrier.address(rng)] if rng.random() < 0.9 else [carrier.address(rng), carrier.address(rng)]

    def _sats(self, until: int) -> None:
        while len(self.tokens) < until:
            organisation, us = self._rng.choice(self.organisations), self._first_us()
            scope = self._scope(organisation)
            user = self.user(us, "service", scope)
            self.sats.append(self._long_lived(organisation, us, user, scope))

    def _pats(self, until: int) -> None:
        while len(self.tokens) < until:
            day_us = max(self._first_us() // DAY * DAY, self.size.start_us + MINUTE)
            person = self.person(day_us)
            us = self._awake(day_us, person.organisation.zone)
            scope = self._scope(person.organisation)
            self.pats.append(self._long_lived(person, us, person.user_id, scope))

    def _long_lived(self, owner: Person | Organisation, us: int, subject: str, scope: tuple[str, ...]) -> Chain:
        """A PAT or a SAT, which some rotate once."""
        rng, size = self._rng, self.size
        organisation = owner.organisation if isinstance(owner, Person) else owner
        kind = Kind.PAT if isinstance(owner, Person) else Kind.SAT
        ttl_us = pick(rng, {7 * DAY: 0.08, 30 * DAY: 0.22, 90 * DAY: 0.6, 366 * DAY: 0.1})
        audience = organisation.audience
        token = self.issue(us, kind, ttl_us, client_id=None, subject=subject, scope=scope, audience=audience)
        steps = [(us + MINUTE, token)]
        left = size.end_us - us
        if rng.random() < 0.04 and left > 3 * DAY:
            at = us + rng.randrange(DAY, min(left, ttl_us) - DAY)
            overlap_us = rng.choice((0, HOUR, DAY))
            steps.append((at + overlap_us // 2, self.rotate(at, token, overlap_us)))
        return Chain(owner, steps)

    # Refreshing, which attackers do too

    def refresh(self, us: int, sign_in: SignIn) -> Token:
        """Spends the grant's refresh token for new ones; answers with the access token."""
        spent = sign_in.refresh.token_id
        access, successor = self.mint_pair(us, sign_in.grant_id, sign_in.person, sign_in.client)
        self.record(
            us, f"grant.{sign_in.grant_id}", TokenRefreshed, by=sign_in.client.client_id,
            grant_id=sign_in.grant_id, spent_token_id=spent, answer_id=self.identifier("", us),
            tokens=(self._minted(access), self._minted(successor)),
        )  # fmt: skip
        sign_in.spent.append(spent)
        sign_in.access, sign_in.refresh = access, successor
        return access

    def _granted(self, us: int, grant_id: str, access: Token, refresh: Token) -> None:
        """Signing in, allowing and redeeming the code: the first events of a sign-in."""
        rng = self.signing_in
        session_id = self.session(us, access.subject)
        assert access.client_id is not None
        code_id = self.authorize(us + SECOND, grant_id, access, session_id, challenge=challenge(rng))
        self.redeem(
            us + SECOND + rng.randrange(SECOND // 10, 2 * SECOND), grant_id, code_id, access=access, refresh=refresh
        )

    def session(self, us: int, user_id: str) -> str:
        """Somebody has signed in."""
        rng, session_id = self.signing_in, self.identifier("ses_", us, self.signing_in)
        self.record(
            us, f"session.{session_id}", SessionStarted, rng=rng, by=user_id,
            session_id=session_id, user_id=user_id, auth_time=moment(us), expires_at=moment(us + 12 * HOUR),
            methods=("pwd",), user_seq=1,
        )  # fmt: skip
        return session_id

    def authorize(self, us: int, grant_id: str, about: Token, session_id: str, *, challenge: str) -> str:
        """The first event of a grant, whose code it answers with. `about`: the access token that is to come."""
        rng, code_id = self.signing_in, self.identifier("tok_", us, self.signing_in)
        scope, audience = " ".join(about.scope), (about.audience,)
        code = MintedToken(
            token_id=code_id, sha256=hashlib.sha256(code_id.encode()).hexdigest(), kind=Kind.CODE,
            scope=scope, audience=audience, expires_at=moment(us + MINUTE), kid=None,
        )  # fmt: skip
        self.record(
            us, f"grant.{grant_id}", AuthorizationGranted, rng=rng, by=about.subject,
            grant_id=grant_id, subject=about.subject, client_id=about.client_id, scope=scope, audience=audience,
            session_id=session_id, code=code, redirect_uri=REDIRECT_URI, code_challenge=challenge, sealed_nonce=None,
            auth_time=moment(us), offline=True, response_type="code",
        )  # fmt: skip
        return code_id

    def redeem(
        self, us: int, grant_id: str, code_id: str, *, access: Token, refresh: Token, rng: random.Random | None = None
    ) -> None:
        self.record(
            us, f"grant.{grant_id}", CodeRedeemed, rng=rng, by=str(access.client_id),
            grant_id=grant_id, code_id=code_id, tokens=(self._minted(access), self._minted(refresh)),
            refresh_idle_ttl_seconds=14 * 86_400, refresh_ends_at=moment(us + 90 * DAY),
        )  # fmt: skip

    def mint_pair(self, us: int, grant_id: str, person: Person, client: Client) -> tuple[Token, Token]:
        """An access and a refresh token."""
        fields: dict[str, Any] = {
            "client_id": client.client_id,
            "subject": person.user_id,
            "scope": client.scope,
            "audience": client.organisation.audience,
        }
        access = self._mint(us, grant_id, client.ttl_us, kind=Kind.ACCESS, **fields)
        return access, self._mint(us, grant_id, 14 * DAY, kind=Kind.REFRESH, **fields)

    def fill_up(self) -> None:
        """Makes the number of tokens what was asked for, by PATs of the last days that nobody uses."""
        rng, size = self._rng, self.size
        while len(self.tokens) < size.tokens:
            us = size.end_us - rng.randrange(HOUR, DAY)
            person = self.person(us)
            scope = self._scope(person.organisation)
            self.issue(
                us, Kind.PAT, 90 * DAY,
                client_id=None, subject=person.user_id, scope=scope, audience=person.organisation.audience,
            )  # fmt: skip


def challenge(rng: random.Random) -> str:
    """RFC 7636 §4.2: 43 characters of base64url."""
    return base64.urlsafe_b64encode(rng.randbytes(32)).rstrip(b"=").decode()


def place(person: Person, us: int, start_us: int) -> str:
    """The address that a person's computer is seen under at that time."""
    day = (us - start_us) // DAY
    if person.away is not None and person.away[0] <= day < person.away[1]:
        return person.away[2]
    zone = person.organisation.zone
    if person.offices and is_workday(us, zone) and 8.5 <= local_hour(us, zone) < 18.5:
        offices = person.organisation.office
        return offices[day % len(offices)]
    return person.homes[min(day // 7, len(person.homes) - 1)]
