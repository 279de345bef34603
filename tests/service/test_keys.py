"""Keys: what is sealed opens with the right key and context only, and is gone when it is destroyed."""

from __future__ import annotations

import asyncio
import base64
import hmac
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from events.errors import LedgerUnavailable
from events.server import EmbeddedServer
from events.streams import ANSWERS, PUSHED, SIGNING_KEYS, SUBJECT_KEYS, Connection
from service.keys import Bucket, MasterKey, MasterKeyMismatch, SubjectKeys, derive, seal, unseal, write_private
from tests.logs import connected, server_with_streams, until
from tests.making import cli, usr
from tests.running import unique

KEY = bytes(range(32))
CANARY = "cnryname of a person"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    async with server_with_streams(tmp_path_factory.mktemp("keys")) as one:
        yield one


@pytest_asyncio.fixture(loop_scope="session")
async def nc(server: EmbeddedServer) -> AsyncIterator[Connection]:
    async with connected(server) as connection:
        yield connection


# Seals


def test_sealed_opens_with_the_same_key_and_context_only() -> None:
    sealed = seal(KEY, b"text", "context")
    assert unseal(KEY, sealed, "context") == b"text"
    assert unseal(bytes(32), sealed, "context") is None
    assert unseal(KEY, sealed, "other context") is None
    for position in range(len(sealed)):
        changed = sealed[:position] + bytes([sealed[position] ^ 1]) + sealed[position + 1 :]
        assert unseal(KEY, changed, "context") is None


@pytest.mark.parametrize("cut", [b"", b"short", bytes(12), bytes(27)], ids=len)
def test_what_was_never_sealed_opens_not(cut: bytes) -> None:
    assert unseal(KEY, cut, "context") is None


def test_sealing_twice_gives_two_texts() -> None:
    """A nonce that came again would give away both."""
    assert len({seal(KEY, b"text", "context")[:12] for _ in range(1000)}) == 1000


def test_derived_keys_differ_by_secret_and_purpose() -> None:
    assert len({derive(b"a", "x"), derive(b"a", "y"), derive(b"b", "x")}) == 3
    # A change here would lock everybody out of what is sealed.
    wanted = "8320e274a75550a4996421bd81a705578e704bb80a859b9245bd5816e981f012"
    assert derive(KEY, "seal").hex() == wanted == hkdf(KEY, b"token-ledger seal").hex()


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 §2.2 and §2.3, without salt, one block."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


# The master key


def test_master_key_is_made_once_and_kept_private(tmp_path: Path) -> None:
    made = MasterKey.load(None, tmp_path)
    path = tmp_path / "master.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(base64.b64decode(path.read_text().strip())) == 32
    sealed = made.seal(b"text", "x")
    assert MasterKey.load(None, tmp_path).unseal(sealed, "x") == b"text"
    assert [file.name for file in tmp_path.iterdir()] == ["master.key"]


def test_given_master_key_writes_no_file(tmp_path: Path) -> None:
    MasterKey.load(KEY, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_wrong_master_key_is_told(tmp_path: Path) -> None:
    sealed = MasterKey(KEY).seal(b"text", "signing key ed-1")
    with pytest.raises(MasterKeyMismatch, match="signing key ed-1"):
        MasterKey(bytes(32)).unseal(sealed, "signing key ed-1")


@pytest.mark.parametrize("content", ["", "\n", "short", "A" * 42, "\u00e4" * 44], ids=len)
def test_damaged_master_key_file_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    """Taken for a key it could be guessed; made anew, it would lock everybody out."""
    path = tmp_path / "master.key"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(MasterKeyMismatch, match="damaged"):
        MasterKey.load(None, tmp_path)
    assert path.read_text(encoding="utf-8") == content


def test_names_are_hashed_by_a_key_of_their_own() -> None:
    one, other = MasterKey(KEY), MasterKey(bytes(32))
    assert one.username_hash("anna") == MasterKey(KEY).username_hash("anna")
    assert len({one.username_hash("anna"), one.username_hash("Anna"), other.username_hash("anna")}) == 3
    assert one.username_hash("") != one.username_hash(" ")


def test_private_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    write_private(path, b"one")
    write_private(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["secret"]


def test_private_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on the system
        write_private(tmp_path / "secret", b"one")
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]


# Buckets


async def test_key_is_made_once_however_many_race(nc: Connection) -> None:
    bucket, key = Bucket(nc, SUBJECT_KEYS), unique("k")
    made = await asyncio.gather(*(bucket.create(key, f"{n}".encode()) for n in range(50)))
    assert sum(made) == 1
    assert await bucket.get(key) == f"{made.index(True)}".encode()


async def test_value_is_put_and_got_and_missing_is_none(nc: Connection) -> None:
    bucket, key = Bucket(nc, ANSWERS), unique("k")
    assert await bucket.get(key) is None
    await bucket.put(key, b"one")
    await bucket.put(key, b"two")
    assert await bucket.get(key) == b"two"


async def test_value_is_changed_by_one_of_many_who_know_its_revision(nc: Connection) -> None:
    bucket, key = Bucket(nc, PUSHED), unique("k")
    assert await bucket.entry(key) is None
    assert await bucket.create(key, b"first")
    entry = await bucket.entry(key)
    assert entry is not None
    value, revision = entry
    assert value == b"first"
    changed = await asyncio.gather(*(bucket.update(key, f"{n}".encode(), revision) for n in range(20)))
    assert sum(changed) == 1
    assert await bucket.get(key) == f"{changed.index(True)}".encode()
    assert not await bucket.update(key, b"late", revision)


@pytest.mark.parametrize("name", [SUBJECT_KEYS, SIGNING_KEYS])
async def test_destroyed_value_is_gone_from_the_bucket_and_from_disk(
    server: EmbeddedServer, nc: Connection, name: str
) -> None:
    bucket, key, value = Bucket(nc, name), unique("k"), os.urandom(40).hex().encode()
    await bucket.put(key, value)
    assert value in stored_bytes(server)
    await bucket.destroy(key)
    assert await bucket.get(key) is None
    assert value not in stored_bytes(server)
    await bucket.destroy(key)
    assert await bucket.create(key, b"new")


def stored_bytes(server: EmbeddedServer) -> bytes:
    return b"".join(file.read_bytes() for file in server.store_directory.rglob("*") if file.is_file())


async def test_bucket_without_a_server_is_unavailable(tmp_path: Path) -> None:
    async with server_with_streams(tmp_path) as server, connected(server) as nc:
        bucket = Bucket(nc, ANSWERS)
        await server.stop()
        await until(lambda: not nc.is_connected)
        for ask in (bucket.get("k"), bucket.put("k", b""), bucket.create("k", b""), bucket.destroy("k")):
            with pytest.raises(LedgerUnavailable):
                await ask
        await server.start()
        await until(lambda: nc.is_connected)
        await bucket.put("k", b"back")
        assert await bucket.get("k") == b"back"


# Keys of people and clients


async def test_text_about_a_person_is_sealed_and_read_on_any_host(server: EmbeddedServer, nc: Connection) -> None:
    one, owner = SubjectKeys(nc, MasterKey(KEY)), usr(1)
    sealed = await one.seal(owner, CANARY, "profile")
    assert CANARY.encode() not in sealed
    async with connected(server) as elsewhere:
        other = SubjectKeys(elsewhere, MasterKey(KEY))
        assert await other.unseal(owner, sealed, "profile") == CANARY
        assert await other.unseal(owner, sealed, "token name") is None
        assert await other.unseal(cli(1), sealed, "profile") is None
        assert await other.unseal(owner, None, "profile") is None
        assert await other.unseal(owner, b"", "profile") is None
    assert CANARY.encode() not in stored_bytes(server)


async def test_many_who_seal_first_use_one_key(server: EmbeddedServer, nc: Connection) -> None:
    owner = usr(2)
    async with connected(server) as elsewhere:
        hosts = [SubjectKeys(connection, MasterKey(KEY)) for connection in (nc, elsewhere) for _ in range(5)]
        sealed = await asyncio.gather(*(host.seal(owner, f"{n}", "x") for n, host in enumerate(hosts)))
        reader = SubjectKeys(nc, MasterKey(KEY))
        assert [await reader.unseal(owner, one, "x") for one in sealed] == [f"{n}" for n in range(10)]


async def test_erased_person_can_be_read_by_nobody(nc: Connection) -> None:
    keys, other, owner = SubjectKeys(nc, MasterKey(KEY)), SubjectKeys(nc, MasterKey(KEY)), usr(3)
    sealed = await keys.seal(owner, CANARY, "profile")
    assert await other.unseal(owner, sealed, "profile") == CANARY
    await keys.destroy(owner)
    assert await keys.unseal(owner, sealed, "profile") is None
    other.forget(owner)  # as it does when it sees the erasure in its view
    assert await other.unseal(owner, sealed, "profile") is None
    # What is said later is sealed under another key, which does not open what was said before.
    again = await keys.seal(owner, "later", "comment")
    assert await keys.unseal(owner, again, "comment") == "later"
    assert await keys.unseal(owner, sealed, "profile") is None


async def test_keys_of_another_ledger_are_told(nc: Connection) -> None:
    sealed = await SubjectKeys(nc, MasterKey(KEY)).seal(usr(4), CANARY, "profile")
    with pytest.raises(MasterKeyMismatch):
        await SubjectKeys(nc, MasterKey(bytes(32))).unseal(usr(4), sealed, "profile")


async def test_cache_of_keys_is_bounded(nc: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.keys._SUBJECT_KEYS_CACHED_MAX", 3)
    keys = SubjectKeys(nc, MasterKey(KEY))
    sealed = [await keys.seal(usr(100 + n), f"{n}", "x") for n in range(6)]
    assert len(keys._cached) == 3
    assert [await keys.unseal(usr(100 + n), one, "x") for n, one in enumerate(sealed)] == [f"{n}" for n in range(6)]
