"""A subscriber as somebody else would write it: the plain NATS client, and nothing of this project.

    python plain_subscriber.py REGISTRATION.json APPLIED.ndjson

REGISTRATION.json is what the service answered when it was registered. Every event that it gets is appended to
APPLIED.ndjson, one a line, before it is acknowledged.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import BinaryIO

import nats
import nats.errors
import nats.js.errors


async def follow(told: dict[str, str], applied: BinaryIO) -> None:
    nc = await nats.connect(
        told["nats_url"],
        nkeys_seed_str=told["nats_seed"],
        inbox_prefix=told["inbox_prefix"],
        max_reconnect_attempts=-1,
        reconnect_time_wait=0.2,
    )
    feed = await nc.jetstream(prefix=told["api_prefix"]).pull_subscribe_bind(told["consumer"], stream=told["stream"])
    while True:
        try:
            messages = await feed.fetch(100, timeout=2)
        except (nats.errors.Error, nats.js.errors.Error, TimeoutError):
            await asyncio.sleep(0.05)
            continue
        for message in messages:
            applied.write(message.data + b"\n")
            await message.ack()


if __name__ == "__main__":
    with Path(sys.argv[2]).open("ab", buffering=0) as file:
        asyncio.run(follow(json.loads(Path(sys.argv[1]).read_text()), file))
