"""Signing keys: made, announced, used, retired, removed, or revoked. RFC 7517, RFC 8037, RFC 9068 §2.1.

The public half of a key is in the log, and so in the view; the private half is sealed under the master key in a bucket
that all hosts share. Keys have places that count up, so that two hosts that rotate at once make one key and not two.
The id of a key is its place and the beginning of its thumbprint (RFC 7638): a log that was restored gives a place
again, and who knows the key that had it before must not take it for the new one.

A key signs either access tokens or ID tokens, and the two rotate apart. The ids of those for ID tokens begin with
`id-`, so that who verifies access tokens can tell from the id alone that a key is not for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

import jwt
import msgspec
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from msgspec import Struct

from events.errors import Conflict, LedgerError
from events.ledger import Append
from events.streams import SIGNING_KEYS
from events.types import TENANT, KeyActivated, KeyIntroduced, KeyRemoved, KeyRetired, KeyRevoked, Reason
from projections.registry import SigningKey
from service.errors import ServiceError, Unavailable
from service.keys import Bucket
from service.settings import Algorithm
from service.tokens import now, uuid7_hex

if TYPE_CHECKING:
    from service.runtime import Runtime

log = structlog.get_logger()

Purpose = Literal["access", "id"]

ACCESS_TOKEN_TTL_SECONDS_MAX = 86_400  # a retired key stays in the JWKS this long
ID_KEY_SECONDS_MAX = 3.0  # an ID token waits so long for the first key of its kind
_CHECK_SECONDS = 60
_POLL_SECONDS = 0.02
_FRESH = timedelta(seconds=30)  # a key that another worker has made for the same call is as good as one's own
# ID tokens live for minutes, and each sign-in makes one: with 3072 bits a signature takes more than twice as long.
_RSA_BITS: dict[Purpose, int] = {"access": 3072, "id": 2048}
_PREFIXES = {"EdDSA": "ed", "ES256": "es", "RS256": "rs"}
_ID_PREFIX = "id-"
_PLACE_PARTS = 3  # algorithm, number, deployment
_THUMBPRINT_DIGITS = 8
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
ID_ALGORITHM: Algorithm = "RS256"  # OpenID Connect Core §15.1: every client can read it


class KeyGone(LedgerError):
    """The private half of a key is not there (any more)."""


class Rotation(Struct, frozen=True):
    """What a rotation did. `retired_kid` signed until now, and may be among those that were revoked."""

    kid: str
    retired_kid: str | None
    revoked_kids: tuple[str, ...]
    ledger_seq: int


def _generate(purpose: Purpose, alg: str) -> Any:
    match alg:
        case "EdDSA":
            return ed25519.Ed25519PrivateKey.generate()
        case "ES256":
            return ec.generate_private_key(ec.SECP256R1())
        case _:
            return rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS[purpose])


def _jwk(alg: str, private: Any) -> dict[str, Any]:
    algorithms: dict[str, Any] = {"EdDSA": OKPAlgorithm, "ES256": ECAlgorithm, "RS256": RSAAlgorithm}
    jwk: dict[str, Any] = algorithms[alg].to_jwk(private.public_key(), as_dict=True)
    jwk.pop("key_ops", None)
    return jwk


def _public_jwk(alg: str, kid: str, private: Any) -> str:
    members = _jwk(alg, private) | {"kid": kid, "alg": alg, "use": "sig"}
    return json.dumps(members, separators=(",", ":"), sort_keys=True)


def _thumbprint(alg: str, private: Any) -> str:
    """In hexadecimal digits. Source: RFC 7638 §3, RFC 8037 §2."""
    members = json.dumps(_jwk(alg, private), separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(members.encode()).hexdigest()


def _number(kid: str) -> int:
    return int(kid.removeprefix(_ID_PREFIX).split("-")[1])


def _kid(place: str, alg: str, private: Any) -> str:
    return f"{place}-{_thumbprint(alg, private)[:_THUMBPRINT_DIGITS]}"


def _place(kid: str) -> str:
    """Where the private half of a key lies in the bucket. The ids of the oldest keys are their places."""
    return kid if len(kid.removeprefix(_ID_PREFIX).split("-")) == _PLACE_PARTS else kid.rpartition("-")[0]


def _alg(kid: str) -> str:
    prefix = kid.removeprefix(_ID_PREFIX).partition("-")[0]
    return next(alg for alg, known in _PREFIXES.items() if known == prefix)


def _context(place: str) -> str:
    """What the private half is sealed for."""
    return f"signing key {place}"


class SigningKeys:
    """The signing keys as this process sees them."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._bucket = Bucket(runtime.nc, SIGNING_KEYS)
        self._private: dict[str, Any] = {}
        self._rows: list[SigningKey] = []
        self._rows_at = -1
        self._document: bytes | None = None  # of these rows
        self._task: asyncio.Task[None] | None = None
        self._wanted: set[Algorithm] = {ID_ALGORITHM}  # for ID tokens
        self._wake = asyncio.Event()

    def rows(self) -> list[SigningKey]:
        """Every key that is not removed, revoked ones too, oldest first."""
        position = self._runtime.view.freshness().position
        if position != self._rows_at:
            found = [row for _, row in self._runtime.view.rows("key") if isinstance(row, SigningKey)]
            rows = sorted(found, key=lambda row: row.introduced_at)
            if rows != self._rows:
                self._rows, self._document = rows, None
            self._rows_at = position
        return self._rows

    def jwks(self) -> dict[str, list[dict[str, Any]]]:
        """The public keys, announced, active and retired. RFC 7517 §5."""
        return {"keys": [json.loads(row.public_jwk) for row in self.rows() if row.state != "revoked"]}

    def document(self) -> bytes:
        """The same as JSON."""
        self.rows()
        if self._document is None:
            self._document = msgspec.json.encode(self.jwks())
        return self._document

    def active(self, alg: str, purpose: Purpose = "access") -> SigningKey | None:
        """The key that signs with this algorithm: the one activated last, should two hosts have raced."""
        found = [row for row in self._of(purpose, alg) if row.state == "active"]
        return max(found, key=lambda row: row.activated_at or row.introduced_at, default=None)

    def _of(self, purpose: Purpose, alg: str) -> list[SigningKey]:
        return [row for row in self.rows() if row.alg == alg and row.purpose == purpose]

    def _announced(self, purpose: Purpose, alg: str) -> SigningKey | None:
        return next((row for row in self._of(purpose, alg) if row.state == "announced"), None)

    def kept(self) -> list[tuple[Purpose, Algorithm]]:
        """What there is always to be a key for: access tokens as the settings say, and ID tokens as clients want."""
        wanted = self._wanted | {row.alg for row in self.rows() if row.purpose == "id"}
        for_access: list[tuple[Purpose, Algorithm]] = [
            ("access", alg) for alg in self._runtime.settings.signing_algorithms
        ]
        return for_access + [("id", alg) for alg in get_args(Algorithm) if alg in wanted]

    def want_for_id_tokens(self, alg: Algorithm) -> None:
        """A client wants its ID tokens signed so: a key is made in the background if there is none."""
        if alg not in self._wanted:
            self._wanted.add(alg)
            self._wake.set()

    async def sign(self, claims: dict[str, Any]) -> tuple[str, str]:
        """An access token and the id of the key. Raises: LedgerError if there is no key yet or it cannot be fetched."""
        row = self.active(self._runtime.settings.signing_algorithms[0])
        if row is None:
            raise LedgerError("there is no active signing key yet")
        return await self._signed(row, claims, "at+jwt"), row.kid

    async def sign_id_token(self, claims: dict[str, Any], alg: Algorithm) -> str:
        """Waits for the first key of its kind. Raises: Unavailable, LedgerError."""
        row = await self.first_for_id_tokens(alg)
        if row is None:
            raise Unavailable(f"the {alg} key for ID tokens is still being made", fix="repeat the request")
        return await self._signed(row, claims, "JWT")

    async def first_for_id_tokens(self, alg: Algorithm) -> SigningKey | None:
        """The key that signs ID tokens so. It is made if there is none, which is waited for, but not for ever."""
        self.want_for_id_tokens(alg)
        deadline = time.monotonic() + ID_KEY_SECONDS_MAX
        while (row := self.active(alg, "id")) is None and time.monotonic() < deadline:  # noqa: ASYNC110 - as the view
            await asyncio.sleep(_POLL_SECONDS)
        return row

    async def _signed(self, row: SigningKey, claims: dict[str, Any], typ: str) -> str:
        private = self._private.get(row.kid) or await self._load(row.kid)
        return jwt.encode(claims, private, algorithm=row.alg, headers={"kid": row.kid, "typ": typ})

    async def _load(self, kid: str) -> Any:
        place = _place(kid)
        sealed = await self._bucket.get(place)
        private = self._opened(place, sealed) if sealed is not None else None
        if private is None or kid not in {place, _kid(place, _alg(kid), private)}:
            raise KeyGone(f"the private half of signing key {kid} is gone; run `token-ledger key rotate`")
        self._private[kid] = private
        return private

    async def start(self) -> None:
        """Proves that the master key opens the keys. Raises: MasterKeyMismatch, LedgerError."""
        for row in self.rows():
            if row.state == "active" and row.purpose == "access":
                with contextlib.suppress(KeyGone):  # it was revoked, and this view does not show it yet
                    await self._load(row.kid)
        self._task = asyncio.create_task(self._keep())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _keep(self) -> None:
        """Announces, activates and removes keys when it is time; any number of processes may do this at once."""
        while True:
            try:
                await self._runtime.view_at_end()
                for purpose, alg in self.kept():
                    await self._keep_algorithm(purpose, alg)
                await self._remove_old()
            except (LedgerError, ServiceError) as error:
                log.debug("signing_keys_wait", why=str(error))  # the log or the view is not there at the moment
            except Exception:
                log.exception("signing_keys_cannot_be_kept")
            first = not all(self.active(alg, purpose) for purpose, alg in self.kept())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), 0.5 if first else _CHECK_SECONDS)
            self._wake.clear()

    async def _keep_algorithm(self, purpose: Purpose, alg: Algorithm) -> None:
        settings = self._runtime.settings
        active, announced = self.active(alg, purpose), self._announced(purpose, alg)
        if active is None:
            await self.rotate(alg, by="system", purpose=purpose)
            return
        ends_at = (active.activated_at or active.introduced_at) + timedelta(days=settings.key_rotation_days)
        announce_at = ends_at - timedelta(hours=settings.key_announce_hours)
        if announced is None and now() >= announce_at:
            await self._introduce(purpose, alg, by="system")
        elif announced is not None and now() >= max(
            ends_at, announced.introduced_at + timedelta(hours=settings.key_announce_hours)
        ):
            await self.rotate(alg, by="system", purpose=purpose)

    async def _introduce(self, purpose: Purpose, alg: Algorithm, *, by: str) -> SigningKey:
        """Makes and announces the next key, or finds the one another host has just made."""
        runtime = self._runtime
        number = max((_number(row.kid) for row in self._of(purpose, alg)), default=0) + 1
        prefix = (_ID_PREFIX if purpose == "id" else "") + _PREFIXES[alg]
        while True:
            kid = await self._made(f"{prefix}-{number}-{runtime.master.deployment}", purpose, alg)
            recorded = await runtime.ledger.read(f"ledger.{TENANT}.key.{kid}")
            if not recorded:
                break
            if not isinstance(recorded[-1].event, KeyRemoved):  # another host has just made it; this view lags behind
                await runtime.applied(recorded[-1].seq)
                self._rows_at = -1
                return next(row for row in self.rows() if row.kid == kid)
            number += 1
        private = await self._load(kid)
        event = KeyIntroduced(
            id=uuid7_hex(),
            occurred_at=now(),
            by=by,
            kid=kid,
            alg=alg,
            public_jwk=_public_jwk(alg, kid, private),
            purpose=purpose,
        )
        with contextlib.suppress(Conflict):
            await runtime.ledger.append(Append(f"ledger.{TENANT}.key.{kid}", event, 0))
        await runtime.applied(await runtime.ledger.last_seq())
        self._rows_at = -1
        return next(row for row in self.rows() if row.kid == kid)

    async def _made(self, place: str, purpose: Purpose, alg: Algorithm) -> str:
        """The id of the key that has the place. It is made if there is none: the bucket decides whose it is."""
        sealed = await self._bucket.get(place)
        if sealed is None:
            # Off the event loop: an RSA key takes a second.
            private = await asyncio.to_thread(_generate, purpose, alg)
            pem = private.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            await self._bucket.create(place, self._runtime.master.seal(pem, _context(place)))
            sealed = await self._bucket.get(place)
        if sealed is None:
            raise KeyGone(f"the signing key that was just made at {place} is gone; run `token-ledger key rotate`")
        return _kid(place, alg, self._opened(place, sealed))

    def _opened(self, place: str, sealed: bytes) -> Any:
        return serialization.load_pem_private_key(self._runtime.master.unseal(sealed, _context(place)), password=None)

    async def rotate(
        self,
        alg: Algorithm,
        *,
        by: str,
        purpose: Purpose = "access",
        fresh: bool = False,
        revoke: Reason | None = None,
    ) -> Rotation:
        """Puts the announced key, or a new one, in the place of the active one.

        The retired key stays in the JWKS until the last token that it signed has expired. `fresh`: a new key in any
        case. `revoke`: why every other key for the same is revoked instead; then the new one is fresh too. The one that
        was announced lay beside the active one, and whoever knows of a stolen key may have rotated it already.
        Raises: LedgerError, Conflict if another host rotated at the same moment.
        """
        runtime = self._runtime
        began = now()
        old, new = self.active(alg, purpose), self._announced(purpose, alg)
        if new is not None and (fresh or revoke is not None) and new.introduced_at < began - _FRESH:
            new = None
        if new is None:
            new = await self._introduce(purpose, alg, by=by)
            if new.state != "announced":  # another worker was faster, and has activated it by now
                raise Conflict(f"signing key {new.kid} has just been activated")
        moment = now()
        entries = [
            Append(
                f"ledger.{TENANT}.key.{new.kid}",
                KeyActivated(id=uuid7_hex(), occurred_at=moment, by=by, kid=new.kid),
                new.seq,
            )
        ]
        revoked: list[SigningKey] = []
        if revoke is not None:
            revoked = [row for row in self._of(purpose, alg) if row.kid != new.kid and row.state != "revoked"]
            entries += [_revoked(row, revoke, by) for row in revoked]
        elif old is not None:
            remove_at = moment + timedelta(seconds=ACCESS_TOKEN_TTL_SECONDS_MAX)
            retired = KeyRetired(id=uuid7_hex(), occurred_at=moment, by=by, kid=old.kid, remove_at=remove_at)
            entries.append(Append(f"ledger.{TENANT}.key.{old.kid}", retired, old.seq))
        await self._load(new.kid)
        seqs = await runtime.ledger.append(*entries)
        await runtime.applied(max(seqs))
        self._rows_at = -1
        for row in revoked:
            await self._destroy(row.kid)
        done = Rotation(
            new.kid,
            old.kid if old is not None else None,
            tuple(row.kid for row in revoked),
            max(seqs),
        )
        log.info(
            "signing_key_rotated", kid=new.kid, retired_kid=done.retired_kid, revoked_kids=done.revoked_kids, by=by
        )
        return done

    async def _remove_old(self) -> None:
        for row in self.rows():
            if row.state == "revoked":
                await self._destroy(row.kid)  # whoever revoked it may have been stopped before he had done so
            remove_at = row.remove_at if row.state == "retired" else _forgotten_at(row)
            if remove_at is not None and now() >= remove_at:
                # First, since an interrupted removal is repeated only while the key is still listed.
                await self._destroy(row.kid)
                event = KeyRemoved(id=uuid7_hex(), occurred_at=now(), by="system", kid=row.kid)
                await self._runtime.ledger.append(Append(f"ledger.{TENANT}.key.{row.kid}", event, row.seq))

    async def _destroy(self, kid: str) -> None:
        """The private half."""
        with contextlib.suppress(KeyGone):  # another key may have its place
            await self._load(kid)
            await self._bucket.destroy(_place(kid))
        self._private.pop(kid, None)


def _revoked(row: SigningKey, reason: Reason, by: str) -> Append:
    event = KeyRevoked(id=uuid7_hex(), occurred_at=now(), by=by, kid=row.kid, reason=reason)
    return Append(f"ledger.{TENANT}.key.{row.kid}", event, row.seq)


def _forgotten_at(row: SigningKey) -> datetime | None:
    """When a revoked key need not be listed any more: its tokens have expired, and stay revoked."""
    return row.revoked_at and row.revoked_at + timedelta(seconds=ACCESS_TOKEN_TTL_SECONDS_MAX)
