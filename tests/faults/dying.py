"""A worker beside those of the service, which dies by `kill -9` between what it records and what it answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from events.ledger import Append
from service.app import App
from service.runtime import Runtime
from service.settings import Settings
from tests.rsgi import END, request
from tests.running import ROOT, Service


class DyingWorker(httpx.BaseTransport):
    """Whatever is sent here is done by such a worker: as soon as an event of this kind is on disk, it is no more."""

    def __init__(self, service: Service, event: str) -> None:
        self.service = service
        self.event = event

    def handle_request(self, asked: httpx.Request) -> httpx.Response:
        told = {
            "data_dir": str(self.service.data_dir),
            "issuer": self.service.issuer,
            "event": self.event,
            "method": asked.method,
            "path": asked.url.path,
            "query": asked.url.query.decode(),
            "headers": [(name.lower(), value) for name, value in asked.headers.items()],
            "body": base64.b64encode(asked.read()).decode(),
        }
        command = [sys.executable, "-m", "tests.faults.dying", json.dumps(told)]
        done = subprocess.run(command, cwd=ROOT, timeout=120, check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, (done.returncode, done.stdout, done.stderr)
        raise httpx.RemoteProtocolError("the worker was killed")


@contextlib.contextmanager
def dying(http: httpx.Client, service: Service, event: str) -> Iterator[None]:
    """What the client asks in here meets a worker that dies; the answer is lost, and the client knows no more."""
    alive = http._transport
    http._transport = DyingWorker(service, event)
    try:
        yield
    except httpx.RemoteProtocolError:
        return
    finally:
        http._transport = alive
    raise AssertionError("nothing was asked")


async def _serve_one(told: dict[str, Any]) -> None:
    data_dir = Path(told["data_dir"])
    settings = Settings(
        data_dir=data_dir,
        nats_url=json.loads((data_dir / "bootstrap.json").read_text())["nats_url"],
        nats_creds=data_dir / "nats" / "service.nk",
        issuer=told["issuer"],
    )
    runtime = await Runtime.start(settings)
    append = runtime.ledger.append

    async def append_and_die(*entries: Append) -> list[int]:
        seqs = await append(*entries)
        if told["event"] in {type(entry.event).__name__ for entry in entries}:
            os.kill(os.getpid(), signal.SIGKILL)
        return seqs

    runtime.ledger.append = append_and_die
    door = App(settings)._doors[told["path"]][told["method"]]
    headers = [(name, value) for name, value in told["headers"]]
    body = (base64.b64decode(told["body"]), END)
    asked = request(
        *headers, body=body, method=told["method"], path=told["path"], query=told["query"], peer="127.0.0.1"
    )
    print(await door(runtime, asked))  # only if it did not die


if __name__ == "__main__":
    asyncio.run(_serve_one(json.loads(sys.argv[1])))
