"""Signing keys: what signs, who makes it, and what is left when it is revoked or when somebody is stopped half-way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import jwt
import pytest
from joserfc import jwt as joserfc_jwt
from joserfc.jwk import KeySet

from events.errors import Conflict
from events.types import Reason
from projections.registry import Client
from service import signing
from service.errors import Unavailable
from service.grants import AccessFor, mint_access
from service.oauth.id_tokens import IdTokenFor, mint_id_token, read_id_token_hint
from service.runtime import Runtime
from service.settings import Algorithm
from service.tokens import new_id, now
from tests.hosts import ISSUER, Host, host
from tests.logs import until
from tests.making import metadata

# RFC 9864 names it Ed25519; clients know EdDSA.
pytestmark = pytest.mark.filterwarnings("ignore:EdDSA is deprecated")


async def access_token(one: Host) -> str:
    whose = Client(new_id("cli"), metadata(access_token_format="jwt"), (), now(), 1)
    token, _ = await mint_access(one.runtime, whose, AccessFor(new_id("grt"), new_id("usr"), "a", (ISSUER,)), now())
    return token


def kid_of(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


def states(one: Host, purpose: str = "access") -> dict[str, str]:
    """By their places."""
    return {row.kid.rsplit("-", 2)[0]: row.state for row in one.runtime.signing_keys.rows() if row.purpose == purpose}


async def rotated(one: Host, **asked: Any) -> signing.Rotation:
    return await one.projecting(one.runtime.signing_keys.rotate("EdDSA", by="tok", **asked))


@pytest.mark.parametrize("alg", ["EdDSA", "ES256", "RS256"])
async def test_access_token_of_each_algorithm_is_verified_by_the_key_set(tmp_path: Path, alg: Algorithm) -> None:
    async with host(tmp_path, signing_algorithms=(alg,)) as one:
        token = await access_token(one)
        keys = KeySet.import_key_set(one.runtime.signing_keys.jwks())
        read = joserfc_jwt.decode(token, keys, algorithms=[alg])
        assert (read.header["alg"], read.header["typ"], read.claims["iss"]) == (alg, "at+jwt", ISSUER)
        # Of one algorithm, and still two keys.
        purposes = {row.purpose: row.kid for row in one.runtime.signing_keys.rows() if row.alg == alg}
        assert purposes["access"] == read.header["kid"]
        assert purposes.get("id") != read.header["kid"]


async def test_start_does_not_wait_for_the_key_of_id_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes its time, and nobody who gets access tokens needs it."""
    made, go_on = signing._generate, asyncio.Event()
    loop = asyncio.get_running_loop()

    def slowly(purpose: signing.Purpose, alg: str) -> Any:
        if purpose == "id":
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(60)
        return made(purpose, alg)

    monkeypatch.setattr(signing, "_generate", slowly)
    monkeypatch.setattr(signing, "ID_KEY_SECONDS_MAX", 0.05)
    monkeypatch.setattr(Host, "settle", _only_access)
    async with host(tmp_path) as one:
        await access_token(one)
        client = Client(new_id("cli"), metadata(), (), now(), 1)
        about = IdTokenFor(new_id("usr"), now())
        with pytest.raises(Unavailable):
            await one.projecting(mint_id_token(one.runtime, client, about))
        go_on.set()
        monkeypatch.setattr(signing, "ID_KEY_SECONDS_MAX", 60)
        assert kid_of(await one.projecting(mint_id_token(one.runtime, client, about))).startswith("id-rs-1-")


async def _only_access(one: Host) -> None:
    await one.projecting(until(lambda: one.runtime.signing_keys.active("EdDSA") is not None))


async def test_key_that_a_client_asks_for_is_made_in_the_background_and_kept(tmp_path: Path) -> None:
    async with host(tmp_path) as one:
        keys = one.runtime.signing_keys
        assert keys.active("ES256", "id") is None
        keys.want_for_id_tokens("ES256")
        await one.projecting(until(lambda: keys.active("ES256", "id") is not None))
        row = keys.active("ES256", "id")
        assert row is not None
        assert row.kid.startswith("id-es-1-")
        assert ("id", "ES256") in signing.SigningKeys(one.runtime).kept()  # by who never heard of the client


async def test_rotation_for_one_purpose_leaves_the_other(tmp_path: Path) -> None:
    async with host(tmp_path, signing_algorithms=("RS256",)) as one:
        keys = one.runtime.signing_keys
        await one.projecting(keys.rotate("RS256", by="tok", purpose="id"))
        assert states(one) == {"rs-1": "active"}
        assert states(one, "id") == {"id-rs-1": "retired", "id-rs-2": "active"}
        await one.projecting(keys.rotate("RS256", by="tok"))
        assert states(one) == {"rs-1": "retired", "rs-2": "active"}
        assert states(one, "id") == {"id-rs-1": "retired", "id-rs-2": "active"}


# Revoked


async def test_revoked_keys_leave_the_key_set_and_their_private_halves_are_destroyed(tmp_path: Path) -> None:
    async with host(tmp_path) as one:
        keys = one.runtime.signing_keys
        await rotated(one)
        old = {row.kid for row in keys.rows() if row.purpose == "access"}
        done = await rotated(one, revoke=Reason.COMPROMISED)
        assert set(done.revoked_kids) == old
        assert states(one) == {"ed-1": "revoked", "ed-2": "revoked", "ed-3": "active"}
        listed = [key["kid"] for key in keys.jwks()["keys"]]
        assert (done.kid in listed, set(listed) & old) == (True, set())
        assert kid_of(await access_token(one)) == done.kid
        for kid in old:
            assert await keys._bucket.get(signing._place(kid)) is None


async def test_announced_key_is_revoked_with_the_one_that_it_lay_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host(tmp_path) as one:
        keys = one.runtime.signing_keys
        await one.projecting(keys._introduce("access", "EdDSA", by="system"))
        assert states(one) == {"ed-1": "active", "ed-2": "announced"}
        monkeypatch.setattr(signing, "_FRESH", -signing._FRESH)  # it was announced long ago
        await rotated(one, revoke=Reason.COMPROMISED)
        assert states(one) == {"ed-1": "revoked", "ed-2": "revoked", "ed-3": "active"}


async def test_fresh_key_leaves_the_announced_one_to_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with host(tmp_path) as one:
        await one.projecting(one.runtime.signing_keys._introduce("access", "EdDSA", by="system"))
        monkeypatch.setattr(signing, "_FRESH", -signing._FRESH)
        await rotated(one, fresh=True)
        assert states(one) == {"ed-1": "retired", "ed-2": "announced", "ed-3": "active"}
        await rotated(one)
        assert states(one) == {"ed-1": "retired", "ed-2": "active", "ed-3": "retired"}


async def test_hint_by_a_revoked_key_is_none(tmp_path: Path) -> None:
    async with host(tmp_path) as one:
        client = Client(new_id("cli"), metadata(), (), now(), 1)
        token = await mint_id_token(one.runtime, client, IdTokenFor(new_id("usr"), now()))
        assert read_id_token_hint(one.runtime, token) is not None
        keys = one.runtime.signing_keys
        await one.projecting(keys.rotate("RS256", by="tok", purpose="id", revoke=Reason.COMPROMISED))
        assert read_id_token_hint(one.runtime, token) is None


async def test_two_workers_that_revoke_at_once_make_one_key(tmp_path: Path) -> None:
    async with host(tmp_path) as one:
        other = signing.SigningKeys(one.runtime)  # a worker has its own
        work = [
            keys.rotate("EdDSA", by="tok", revoke=Reason.COMPROMISED) for keys in (one.runtime.signing_keys, other) * 3
        ]
        done = await one.projecting(asyncio.gather(*work, return_exceptions=True))  # type: ignore[arg-type]
        assert all(isinstance(one, signing.Rotation | Conflict) for one in done)
        [winner] = [one for one in done if isinstance(one, signing.Rotation)]
        assert states(one) == {"ed-1": "revoked", "ed-2": "active"}
        assert winner.kid.startswith("ed-2-")


async def test_worker_whose_view_lags_behind_makes_no_second_first_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has read that there is none before another one has made and activated it."""
    async with host(tmp_path) as one:
        assert states(one) == {"ed-1": "active"}
        late = signing.SigningKeys(one.runtime)
        monkeypatch.setattr(late, "_of", lambda *_: [])
        with pytest.raises(Conflict):
            await one.projecting(late.rotate("EdDSA", by="system"))
        assert states(one) == {"ed-1": "active"}


# Stopped half-way


async def test_new_key_of_a_rotation_that_was_cut_off_is_taken_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host(tmp_path) as one:
        keys, ledger = one.runtime.signing_keys, one.runtime.ledger
        with monkeypatch.context() as patched:
            made = ledger.append

            async def killed(*entries: Any) -> list[int]:
                if len(entries) > 1:
                    raise asyncio.CancelledError
                return await made(*entries)

            patched.setattr(ledger, "append", killed)
            with pytest.raises(asyncio.CancelledError):
                await rotated(one, revoke=Reason.COMPROMISED)
        assert states(one) == {"ed-1": "active", "ed-2": "announced"}
        assert kid_of(await access_token(one)) in {row.kid for row in keys.rows() if row.state == "active"}
        await rotated(one, revoke=Reason.COMPROMISED)
        assert states(one) == {"ed-1": "revoked", "ed-2": "active"}


async def test_private_half_that_was_left_is_destroyed_by_whoever_keeps_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a restart, for which nothing but the private half's absence is no reason to fail."""
    async with host(tmp_path) as one:
        keys = one.runtime.signing_keys
        old = keys.active("EdDSA")
        assert old is not None
        with monkeypatch.context() as patched:

            async def killed(kid: str) -> None:
                raise asyncio.CancelledError

            patched.setattr(keys, "_destroy", killed)
            with pytest.raises(asyncio.CancelledError):
                await rotated(one, revoke=Reason.COMPROMISED)
        assert await keys._bucket.get(signing._place(old.kid)) is not None
        settings = one.runtime.settings
        await one.runtime.stop()
        gone, made = asyncio.Event(), signing.SigningKeys._destroy

        async def destroyed(keys: signing.SigningKeys, kid: str) -> None:
            await made(keys, kid)
            gone.set()

        monkeypatch.setattr(signing.SigningKeys, "_destroy", destroyed)
        one.runtime = await Runtime.start(settings)
        await one.projecting(asyncio.wait_for(gone.wait(), 60))
        assert await one.runtime.signing_keys._bucket.get(signing._place(old.kid)) is None
        assert states(one) == {"ed-1": "revoked", "ed-2": "active"}


async def test_start_with_a_view_that_does_not_show_the_revocation_yet(tmp_path: Path) -> None:
    async with host(tmp_path) as one:
        active = one.runtime.signing_keys.active("EdDSA")
        assert active is not None
        await one.runtime.signing_keys._bucket.destroy(signing._place(active.kid))
        settings = one.runtime.settings
        await one.runtime.stop()
        one.runtime = await Runtime.start(settings)
        with pytest.raises(signing.KeyGone):
            await access_token(one)


async def test_revoked_key_is_forgotten_when_its_tokens_have_expired_and_they_stay_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with host(tmp_path) as one:
        old = one.runtime.signing_keys.active("EdDSA")
        assert old is not None
        await rotated(one, revoke=Reason.COMPROMISED)
        monkeypatch.setattr(signing, "ACCESS_TOKEN_TTL_SECONDS_MAX", -1)
        await one.projecting(one.runtime.signing_keys._remove_old())
        await one.project()
        await until(lambda: "ed-1" not in states(one))
        recorded = await one.runtime.ledger.read(f"ledger.main.key.{old.kid}")
        assert [type(event.event).__name__ for event in recorded][-2:] == ["KeyRevoked", "KeyRemoved"]
        await rotated(one)
        assert states(one) == {"ed-2": "retired", "ed-3": "active"}  # its number is not used again
