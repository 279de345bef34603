"""The analytics process alone, for tests that kill it: `python -m tests.abuse_process URL CREDENTIALS DIRECTORY`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from events import streams
from projections import analytics, base
from projections.abuse.engine import Engine
from projections.abuse.rules import all_rules


async def main(url: str, credentials: str, directory: str) -> None:
    store = analytics.open_analytics(Path(directory), commit_seconds=0.01)
    nc = await streams.connect(url, Path(credentials), name="killed")
    writing = await streams.connect(url, Path(credentials), name="killed-abuse")
    engine = Engine(writing, store, all_rules().values(), idle_seconds=0.02)
    print("looking", flush=True)
    await asyncio.gather(base.run(nc, store, analytics.STREAMS), engine.run())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
