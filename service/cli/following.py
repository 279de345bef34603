"""Server-sent events as the command line reads them, over as many connections as it takes.

Source: HTML standard §9.2 (server-sent events).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from service.cli import output as out
from service.cli.connection import Api
from service.cli.output import Failed

STREAM = "/v1/revocations/stream"
_AGAIN_SECONDS = 0.25
_AGAIN_SECONDS_MAX = 5.0


def follow(api: Api, query: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Revocations as CloudEvents, for ever: a connection that is lost is opened again where it ended.

    Raises: Failed when the service refuses, or cannot be reached at all.
    """
    last_id: str | None = None
    pause, told = _AGAIN_SECONDS, False
    while True:
        try:
            with api.stream(STREAM, query, {"Last-Event-ID": last_id} if last_id else {}) as lines:
                for kind, seen, data in _messages(lines):
                    last_id = seen or last_id
                    pause, told = _AGAIN_SECONDS, False
                    if kind == "message":
                        yield json.loads(data)
        except Failed as failure:
            refused = failure.status is not None and failure.status not in {429, 503}
            if refused or last_id is None:
                raise
            if not told:
                click.echo(f"{out.printable(failure.detail)}; trying again", err=True)
            told = True
        time.sleep(pause)
        pause = min(pause * 2, _AGAIN_SECONDS_MAX)


def _messages(lines: Iterable[str]) -> Iterator[tuple[str, str | None, str]]:
    """Kind, last id and data of each message, and each id that comes alone. One that is cut off is none."""
    kind, last_id = "message", None
    data: list[str] = []
    for line in lines:
        if not line:
            if data or last_id is not None:
                yield kind if data else "id", last_id, "\n".join(data)
            kind, data = "message", []
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "event":
                kind = value
            case "data":
                data.append(value)
            case "id":
                last_id = value
