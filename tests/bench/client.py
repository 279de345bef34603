"""How fast and how small the client library is: `python -m tests.bench.client`. One thread, time of the processor.

Tokens are signed here, with a key of the same kind as the ledger's, and revocations are read from a snapshot in the
ledger's format, which is made up: a million of them would take a ledger some minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import jwt
from cryptography.hazmat.primitives.asymmetric import ed25519
from jwt.algorithms import OKPAlgorithm

from service.client.keys import PublicKeys
from service.client.knowledge import Knowledge
from service.client.ledger import Ledger
from service.client.offline import Offline
from service.client.sse import SseFeed
from service.client.uses import Uses
from service.client.validator import TokenValidator

ISSUER, AUDIENCE, KID = "https://ledger.example", "https://api.example", "ed-1-bench"
TOKENS = 5_000
NEW_TOKENS = 1_000
ROUNDS = 25


def memory_mib(name: str) -> float:
    """`VmRSS`: now; `VmHWM`: the most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) / 1024


def claims() -> dict[str, Any]:
    now = int(time.time())
    return {
        "iss": ISSUER,
        "sub": f"usr_{uuid4().hex}",
        "aud": AUDIENCE,
        "exp": now + 3600,
        "iat": now,
        "jti": f"tok_{uuid4().hex}",
        "client_id": f"cli_{uuid4().hex}",
        "scope": "orders:read orders:write",
        "grant_id": f"grt_{uuid4().hex}",
    }


async def snapshot(count: int) -> AsyncIterator[bytes]:
    """Of tokens, as `GET /v1/revocations/snapshot` has them."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    yield json.dumps({"feed": "bench", "ledger_seq": count, "taken_at": now}).encode()
    for seq in range(1, count + 1):
        told = {"token_id": f"tok_{uuid4().hex}", "grant_id": f"grt_{uuid4().hex}"}
        more = {"reason": "admin", "revoked_at": now, "ledger_seq": seq}
        yield json.dumps({"what": "token", **told, **more}).encode()
    yield json.dumps({"end": True, "revocations": count}, separators=(",", ":")).encode()


class Bench:
    """A validator's inside, fresh for as long as it runs, without a ledger."""

    def __init__(self, revocations: int) -> None:
        self.private = ed25519.Ed25519PrivateKey.generate()
        self.revocations = revocations
        self.knowledge = Knowledge()

    async def start(self) -> None:
        public = OKPAlgorithm.to_jwk(self.private.public_key(), as_dict=True)
        document = {"keys": [{**public, "kid": KID, "alg": "EdDSA", "use": "sig"}]}

        async def keys() -> Any:
            return document

        self.keys = PublicKeys(keys, cool_down_seconds=10)
        await self.keys.fetch()
        self.ledger = Ledger("http://127.0.0.1:9", "none", seconds_max=1)
        self.uses = Uses(self.ledger, waiting_max=20_000)
        await self.knowledge.replace(snapshot(self.revocations))
        self.knowledge.complete_at = float("inf")

    def validator(self, *, recording: bool) -> TokenValidator:
        """One that knows what this knows, and follows no feed."""
        made = TokenValidator(ISSUER, AUDIENCE, token="none", feed=SseFeed())
        made._offline = Offline(
            self.knowledge,
            self.keys,
            self.uses if recording else None,
            issuer=ISSUER,
            audience=(AUDIENCE,),
            stale_seconds_max=5,
            tokens_max=4 * TOKENS,
            reference_seconds_max=10,
        )
        return made

    def token(self) -> str:
        return jwt.encode(claims(), self.private, algorithm="EdDSA", headers={"kid": KID, "typ": "at+jwt"})


async def rate(work: Callable[[], Awaitable[int]]) -> float:
    """The best of several rounds, per second of the processor: others use it too, and only ever slow it down."""
    best = 0.0
    for _ in range(ROUNDS):
        gc.collect()
        began = time.process_time()
        done = await work()
        best = max(best, done / (time.process_time() - began))
    return best


async def check_all(validator: TokenValidator, tokens: list[str], rounds: int = 1) -> int:
    for _ in range(rounds):
        for token in tokens:
            verdict = await validator.validate(token, scope="orders:read")
            assert verdict.valid
            assert verdict.offline
    return rounds * len(tokens)


async def measure(revocations: int) -> list[tuple[str, str, str]]:
    at_start = memory_mib("VmRSS")
    bench = Bench(revocations)
    began = time.process_time()
    await bench.start()
    loaded = time.process_time() - began
    known = memory_mib("VmRSS")
    tokens = [bench.token() for _ in range(TOKENS)]

    async def unseen() -> int:
        return await check_all(bench.validator(recording=False), tokens[:NEW_TOKENS])

    new = await rate(unseen)
    validator = bench.validator(recording=False)
    await check_all(validator, tokens)
    seen = await rate(lambda: check_all(validator, tokens))
    recording = bench.validator(recording=True)
    await check_all(recording, tokens)

    async def recorded() -> int:
        bench.uses._waiting.clear()
        return await check_all(recording, tokens)

    told = await rate(recorded)

    async def after_revocations() -> int:
        bench.knowledge.revoked.generation += 1
        return await check_all(validator, tokens)

    again = await rate(after_revocations)
    await bench.ledger.close()
    return [
        ("checks of tokens seen before", f"{seen:,.0f}/s", "≥ 200,000/s"),
        ("the same, each recorded to be reported", f"{told:,.0f}/s", ""),
        ("the same, each after a new revocation", f"{again:,.0f}/s", ""),
        ("checks of new tokens, Ed25519", f"{new:,.0f}/s", "≥ 5,000/s"),
        (f"memory of the process with {len(bench.knowledge.revoked):,} revocations", f"{known:.0f} MiB", "< 100 MB"),
        (f"the same, with {TOKENS:,} tokens remembered, at most so far", f"{memory_mib('VmHWM'):.0f} MiB", "< 100 MB"),
        ("the process before it began", f"{at_start:.0f} MiB", ""),
        ("snapshot: made up and read in", f"{loaded:.1f} s", ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--revocations", type=int, default=1_000_000)
    rows = asyncio.run(measure(parser.parse_args().revocations))
    print("| What | Measured | Aim |\n| --- | ---: | ---: |")
    for what, measured, aim in rows:
        print(f"| {what} | {measured} | {aim} |")


if __name__ == "__main__":
    main()
