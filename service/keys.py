"""Keys: the master key, the keys of people and clients, and the signing keys.

Nothing secret is at rest outside a seal. The master key seals signing keys and subject keys in key-value buckets that
all hosts share; a subject key seals what is readable about one person or client, and erasure destroys it.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import os
import secrets
from collections import OrderedDict
from pathlib import Path
from typing import Any

import nats.errors
import nats.js.errors
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from nats.js.kv import KeyValue

from events.errors import LedgerUnavailable
from events.streams import SUBJECT_KEYS, Connection, direct
from service.settings import SettingsError, parse_key

_SUBJECT_KEYS_CACHED_MAX = 10_000
_BUCKET_SECONDS = 2.0
_LISTED_MAX = 100_000


class MasterKeyMismatch(SettingsError):
    """The master key does not open what this ledger holds: another key was used when it was made."""


def derive(secret: bytes, purpose: str) -> bytes:
    """A 32-byte key for one purpose. Source: RFC 5869 (HKDF-SHA256)."""
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=f"token-ledger {purpose}".encode()).derive(secret)


def seal(key: bytes, plaintext: bytes, context: str) -> bytes:
    """AES-256-GCM: nonce, ciphertext and tag. `context` must be the same when it is opened."""
    nonce = secrets.token_bytes(12)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, context.encode())


def unseal(key: bytes, sealed: bytes, context: str) -> bytes | None:
    """The plaintext, or None if it was sealed under another key, for another context, or was changed."""
    try:
        return AESGCM(key).decrypt(sealed[:12], sealed[12:], context.encode())
    except (InvalidTag, ValueError):
        return None


class MasterKey:
    """Seals what all hosts share. One purpose, one derived key."""

    def __init__(self, secret: bytes) -> None:
        self._sealing = derive(secret, "seal")
        self._usernames = derive(secret, "usernames")
        self.sessions = derive(secret, "session cookies")
        self.acquaintances = derive(secret, "browsers that somebody has signed in with")
        self.forms = derive(secret, "forms")
        self.requests = derive(secret, "requests that wait for a sign-in")
        self.deployment = derive(secret, "deployment")[:4].hex()

    @classmethod
    def load(cls, given: bytes | None, data_dir: Path) -> MasterKey:
        """The given key, or the one in `<data_dir>/master.key`, made there at the first start with mode 0600.

        Raises: MasterKeyMismatch if the file holds no key.
        """
        if given is not None:
            return cls(given)
        path = data_dir / "master.key"
        if not path.exists():
            write_private(path, base64.b64encode(secrets.token_bytes(32)) + b"\n")
        try:
            return cls(parse_key(path.read_text(encoding="ascii")))
        except ValueError as error:
            # An empty or cut file would be taken for a key that anyone can guess.
            raise MasterKeyMismatch(f"{path} is damaged: it {error}; restore it from a backup") from None

    def seal(self, plaintext: bytes, context: str) -> bytes:
        return seal(self._sealing, plaintext, context)

    def unseal(self, sealed: bytes, context: str) -> bytes:
        """Raises: MasterKeyMismatch."""
        opened = unseal(self._sealing, sealed, context)
        if opened is None:
            raise MasterKeyMismatch(f"the master key does not open {context}; use the key this ledger was made with")
        return opened

    def username_hash(self, username: str) -> str:
        """Names are kept so that they can be looked up, and not read. Compared exactly: RFC 8265 is not applied."""
        return hmac.digest(self._usernames, username.encode(), "sha256").hex()


def write_private(path: Path, data: bytes) -> None:
    """Writes a file with mode 0600 that is either whole or not there, whatever is interrupted when."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class Bucket:
    """A key-value bucket with errors that callers of the ledger know."""

    def __init__(self, nc: Connection, name: str) -> None:
        self._nc = nc
        self._name = name
        self._js = nc.jetstream(timeout=_BUCKET_SECONDS)
        self._kv = KeyValue(name=name, stream=f"KV_{name}", pre=f"$KV.{name}.", js=self._js, direct=False)

    @contextlib.contextmanager
    def _errors(self) -> Any:
        if not self._nc.is_connected:
            raise LedgerUnavailable("the connection to the nats-server is down")
        try:
            yield
        except (nats.js.errors.KeyNotFoundError, nats.js.errors.KeyWrongLastSequenceError):
            raise
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise LedgerUnavailable(f"bucket {self._name}: {error}") from error

    async def get(self, key: str) -> bytes | None:
        """Raises: LedgerUnavailable."""
        with self._errors():
            try:
                return (await self._kv.get(key)).value
            except nats.js.errors.KeyNotFoundError:
                return None

    async def create(self, key: str, value: bytes) -> bool:
        """Whether this call made the key: of several at once, one wins. Raises: LedgerUnavailable."""
        with self._errors():
            try:
                await self._kv.create(key, value)
            except nats.js.errors.KeyWrongLastSequenceError:
                return False
            return True

    async def entry(self, key: str) -> tuple[bytes, int] | None:
        """The value and its revision. Raises: LedgerUnavailable."""
        with self._errors():
            try:
                found = await self._kv.get(key)
            except nats.js.errors.KeyNotFoundError:
                return None
            return found.value or b"", found.revision or 0

    async def update(self, key: str, value: bytes, revision: int) -> bool:
        """Whether this call changed what had this revision: of several at once, one does. Raises: LedgerUnavailable."""
        with self._errors():
            try:
                await self._kv.update(key, value, last=revision)
            except nats.js.errors.KeyWrongLastSequenceError:
                return False
            return True

    async def put(self, key: str, value: bytes) -> None:
        """Raises: LedgerUnavailable."""
        with self._errors():
            await self._kv.put(key, value)

    async def revisions(self, beginning: str) -> dict[str, int]:
        """Keys `<beginning>.<name>`, and when each was written, counted in writes. Raises: LedgerUnavailable."""
        prefix = f"$KV.{self._name}."
        query = {"next_by_subj": f"{prefix}{beginning}.*", "seq": 1, "batch": _LISTED_MAX}
        found = [one.headers or {} async for one in direct(self._nc, f"KV_{self._name}", query)]
        return {one["Nats-Subject"].removeprefix(prefix): int(one["Nats-Sequence"]) for one in found}

    async def destroy(self, key: str) -> None:
        """Overwrites the stored bytes and removes the key; nothing if there is none. Raises: LedgerUnavailable."""
        with self._errors():
            try:
                entry = await self._kv.get(key)
            except nats.js.errors.KeyNotFoundError:
                return
            # Without no_erase the server overwrites the message with random bytes.
            await self._js.delete_msg(f"KV_{self._name}", entry.revision or 0)


class SubjectKeys:
    """One key for each person and client, made when first needed, destroyed by erasure."""

    def __init__(self, nc: Connection, master: MasterKey) -> None:
        self._bucket = Bucket(nc, SUBJECT_KEYS)
        self._master = master
        self._cached: OrderedDict[str, bytes] = OrderedDict()

    async def seal(self, owner: str, text: str, context: str) -> bytes:
        """Seals text about `owner`. Raises: LedgerUnavailable."""
        key = await self._key(owner, make=True)
        assert key is not None
        return seal(key, text.encode(), f"{owner} {context}")

    async def unseal(self, owner: str, sealed: bytes | None, context: str) -> str | None:
        """The text, or None if there is none or the owner was erased. Raises: LedgerUnavailable."""
        if not sealed:
            return None
        key = await self._key(owner, make=False)
        opened = unseal(key, sealed, f"{owner} {context}") if key is not None else None
        return opened.decode() if opened is not None else None

    async def _key(self, owner: str, *, make: bool) -> bytes | None:
        key = self._cached.get(owner)
        if key is not None:
            return key
        sealed = await self._bucket.get(owner)
        if sealed is None:
            if not make:
                return None
            made = self._master.seal(secrets.token_bytes(32), f"subject key {owner}")
            sealed = made if await self._bucket.create(owner, made) else await self._bucket.get(owner)
            if sealed is None:
                raise LedgerUnavailable("the key of the subject was made and is gone")
        key = self._master.unseal(sealed, f"subject key {owner}")
        self._cached[owner] = key
        if len(self._cached) > _SUBJECT_KEYS_CACHED_MAX:
            self._cached.popitem(last=False)
        return key

    async def destroy(self, owner: str) -> None:
        """What was sealed for the owner can be read by nobody any more. Raises: LedgerUnavailable."""
        await self._bucket.destroy(owner)
        self.forget(owner)

    def forget(self, owner: str) -> None:
        """Drops the cached key, as every worker does when it sees the erasure in the view."""
        self._cached.pop(owner, None)
