"""Bounded load that remembers what was acknowledged, so that it can be asked for after a fault."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

from tests.running import CANARY_NAME, Service, unique

CALLERS = 6
ROUNDS_MAX = 2_000
PAUSE_SECONDS = 0.02  # after a refusal, so that a service that is down is not flooded
# What a client sees while something is being restarted. Never a 500, and never a success that is not one.
PASSING = {503}


@dataclass
class Load:
    """Issues, validates and revokes PATs from several threads, from `with` to the end of the block.

    `issued`: acknowledged, token id to token. `revoked`: acknowledged. `unsure`: asked for and not acknowledged.
    `last_seq`: of the last acknowledged issue. `wrong`: answers that must never be given.
    """

    service: Service
    scope: str = ""
    subject: str = ""
    issued: dict[str, str] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    refused: int = 0
    last_seq: int = 0
    ended: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.scope = self.service.scope()
        self.subject = self.service.user(scope=self.scope)["user_id"]
        self.threads = [threading.Thread(target=self._call, daemon=True) for _ in range(CALLERS)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join(30)
        if kind is None:
            assert not any(thread.is_alive() for thread in self.threads)

    @property
    def acknowledged(self) -> int:
        return len(self.issued) + len(self.revoked)

    def _call(self) -> None:
        with self.service.caller(timeout_seconds=15) as http:
            http.headers["Authorization"] = f"Bearer {self.service.admin_token}"
            for number in range(ROUNDS_MAX):
                if self.ended.is_set():
                    return
                try:
                    self._round(http, number)
                except Exception as error:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                    raise

    def _post(self, http: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The body of a success; None if the service could not answer."""
        try:
            answer = http.post(path, json=body)
        except httpx.TransportError:
            answer = None
        if answer is not None and answer.is_success:
            seen: dict[str, Any] = answer.json()
            return seen
        if answer is not None and answer.status_code not in PASSING:
            self.wrong.append(f"{path}: {answer.status_code} {answer.text}")
        if answer is not None and answer.status_code == 503 and "retry-after" not in answer.headers:
            self.wrong.append(f"{path}: 503 without Retry-After")
        self.refused += 1
        self.ended.wait(PAUSE_SECONDS)
        return None

    def _round(self, http: httpx.Client, number: int) -> None:
        wanted = {"kind": "pat", "subject": self.subject, "name": unique(CANARY_NAME), "scope": self.scope}
        made = self._post(http, "/v1/tokens", wanted)
        if made is None:
            return
        token, token_id = made["token"], made["token_id"]
        self.issued[token_id] = token
        self.last_seq = max(self.last_seq, made["ledger_seq"])
        self._expect(http, token, {"valid"})
        if number % 2:
            return
        self.unsure.add(token_id)
        if self._post(http, f"/v1/tokens/{token_id}/revoke", {"reason": "unused"}) is None:
            return
        self.revoked.add(token_id)
        self.unsure.discard(token_id)
        self._expect(http, token, {"revoked"})

    def _expect(self, http: httpx.Client, token: str, codes: set[str]) -> None:
        seen = self._post(http, "/v1/tokens/validate", {"token": token})
        if seen is not None and seen["code"] not in codes:
            self.wrong.append(f"{seen} instead of {codes}")

    def check(self) -> None:
        """Everything acknowledged is as it was acknowledged. Raises: AssertionError"""
        assert self.wrong == []
        tokens = list(self.issued.items())
        for start in range(0, len(tokens), 1000):
            part = tokens[start : start + 1000]
            body = {"requests": [{"token": token} for _, token in part]}
            results = self.service.done("POST", "/v1/tokens/validate-batch", json=body)["results"]
            for (token_id, _), seen in zip(part, results, strict=True):
                if token_id in self.unsure:
                    assert seen["code"] in {"valid", "revoked"}
                else:
                    assert seen["code"] == ("revoked" if token_id in self.revoked else "valid"), token_id
        for token_id in list(self.revoked)[-5:]:
            types = [event["type"].partition("/")[0] for event in self.service.history(token_id)]
            assert types == ["token.issued", "token.revoked"]


def seconds_until_acknowledged(load: Load, more: int, seconds_max: float) -> float:
    """How long until `more` further writes were acknowledged. Raises: AssertionError when it takes too long."""
    started, goal = time.monotonic(), load.acknowledged + more
    while load.acknowledged < goal:
        passed = time.monotonic() - started
        assert load.wrong == []
        assert passed < seconds_max, f"{load.acknowledged} of {goal} after {passed:.1f} s\n{load.service.log_tail()}"
        load.ended.wait(PAUSE_SECONDS)
    return time.monotonic() - started
