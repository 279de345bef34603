"""Followers of the feed over HTTP, in the hands of a test."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from tests.running import Service, until

STREAM, POLL, SNAPSHOT = "/v1/revocations/stream", "/v1/revocations", "/v1/revocations/snapshot"
SEEN_SECONDS_MAX = 60.0

# What names a revocation, whatever transport told it.
Named = tuple[str, str, str]


def named(told: dict[str, Any]) -> Named:
    """What is revoked, by which name, and until which time of issue, if it says one."""
    what = next(name for name in ("token_id", "grant_id", "client_id", "subject", "kid") if name in told)
    return what, told[what], told.get("issued_before", "")


class Revoked:
    """What a follower takes for revoked: of a broad revocation the latest counts, and twice is once."""

    def __init__(self) -> None:
        self._until: dict[tuple[str, str], str] = {}

    def add(self, told: dict[str, Any]) -> None:
        what, name, issued_before = named(told)
        self._until[what, name] = max(issued_before, self._until.get((what, name), ""))

    def names(self) -> set[Named]:
        return {(*key, issued_before) for key, issued_before in self._until.items()}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def messages(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The fields of each message. Source: HTML standard §9.2.6."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif fields:
            yield fields
            fields = {}


class Follower:
    """A stream that is read in a thread of its own and, unless `once`, begun again where it ended."""

    def __init__(self, service: Service, token: str, *, once: bool = False, **query: Any) -> None:
        self.service = service
        self.events: list[dict[str, Any]] = []
        self.positions: list[dict[str, Any]] = []
        self.refused: httpx.Response | None = None
        self.connections = 0
        self.ended = False
        self.last_id: str | None = None
        self._token = token
        self._once = once
        self._query = query
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            with suppress(httpx.HTTPError):
                self._follow()
            if self._once or self.refused is not None:
                break
            self._stop.wait(0.1)
        self.ended = True

    def _follow(self) -> None:
        headers = bearer(self._token) | ({"Last-Event-ID": self.last_id} if self.last_id else {})
        with (
            self.service.caller(timeout_seconds=10) as http,
            http.stream("GET", STREAM, headers=headers, params=self._query) as answer,
        ):
            if not answer.is_success:
                answer.read()
                if answer.status_code != 503:
                    self.refused = answer
                return
            self.connections += 1
            for fields in messages(answer.iter_lines()):
                if self._stop.is_set():
                    return
                self._take(fields)

    def _take(self, fields: dict[str, str]) -> None:
        if "data" not in fields:
            self.last_id = fields.get("id", self.last_id)
            return
        data = json.loads(fields["data"])
        if fields.get("event") == "position":
            self.positions.append(data)
        else:
            assert fields["id"] == data["id"] == str(data["data"]["ledger_seq"])
            self.events.append(data)
        self.last_id = fields["id"]

    @property
    def seqs(self) -> list[int]:
        return [int(event["id"]) for event in self.events]

    @property
    def reached(self) -> int:
        return int(self.last_id or 0)

    def wait_begun(self) -> None:
        until(lambda: self.positions, seconds=SEEN_SECONDS_MAX, what="the stream says where it stands")

    def wait_for(self, seq: int) -> dict[str, Any]:
        """The event with this sequence, as soon as it was received."""
        return until(
            lambda: next((event for event in reversed(self.events) if event["id"] == str(seq)), None),  # type: ignore[arg-type, return-value]
            seconds=SEEN_SECONDS_MAX,
            what=f"event {seq}",
        )

    def wait_reached(self, seq: int) -> None:
        until(lambda: self.reached >= seq, seconds=SEEN_SECONDS_MAX, what=f"everything up to {seq}")

    def revoked(self) -> Revoked:
        found = Revoked()
        for event in self.events:
            found.add(event["data"])
        return found

    def close(self) -> None:
        self._stop.set()
        self._thread.join(15)


@contextmanager
def following(service: Service, token: str, **options: Any) -> Iterator[Follower]:
    """A follower that has begun."""
    follower = Follower(service, token, **options)
    try:
        follower.wait_begun()
        yield follower
    finally:
        follower.close()


def snapshot(service: Service, token: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Its first line and its revocations, after its last line was held to them."""
    answer = service.call("GET", SNAPSHOT, token=token)
    assert answer.status_code == 200, answer.text
    head, *lines, end = [json.loads(line) for line in answer.text.splitlines()]
    assert end == {"end": True, "revocations": len(lines)}
    assert answer.headers["x-ledger-seq"] == str(head["ledger_seq"])
    return head, lines


def poll(service: Service, token: str, **query: Any) -> dict[str, Any]:
    return service.done("GET", POLL, token=token, params=query)


def poll_all(service: Service, token: str, after: int, **query: Any) -> tuple[list[dict[str, Any]], int]:
    """Every announcement behind `after`, and where the last poll ended."""
    found: list[dict[str, Any]] = []
    for _ in range(10_000):
        page = poll(service, token, after=after, **query)
        found += page["items"]
        if page["ledger_seq"] == after and not page["items"]:
            return found, after
        after = page["ledger_seq"]
    raise AssertionError("polls never end")
