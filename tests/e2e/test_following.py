"""Revocations as enforcement points hear of them over HTTP: streams, polls, snapshots, the command line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.following import (
    POLL,
    SNAPSHOT,
    STREAM,
    Follower,
    Revoked,
    bearer,
    following,
    poll,
    poll_all,
    snapshot,
)
from tests.running import CANARY_PASSWORD, ROOT, Service, command, problem, unique, until

SEED = 20261122


@pytest.fixture(scope="module")
def token(service: Service) -> str:
    return service.bearer("ledger:subscribe")


@pytest.fixture(scope="module")
def follower(service: Service, token: str) -> Iterator[Follower]:
    """One that was there all the time."""
    with following(service, token) as one:
        yield one


def seq_of(answer: dict[str, Any]) -> int:
    return int(answer["ledger_seq"])


# What is revoked, and what is announced of it: the call that does it, the kind, and what must stand in it


def revoke_token(service: Service) -> tuple[int, dict[str, Any]]:
    made = service.pat()
    done = service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json={"reason": "compromised"})
    names = {name: made[name] for name in ("token_id", "grant_id", "subject")}
    return seq_of(done), {"what": "token", "reason": "compromised", **names}


def revoke_grant(service: Service) -> tuple[int, dict[str, Any]]:
    made = service.pat()
    done = service.done("POST", POLL, json={"grant_id": made["grant_id"], "reason": "logout"})
    return seq_of(done), {"what": "grant", "reason": "logout", "grant_id": made["grant_id"], "subject": made["subject"]}


def revoke_client(service: Service) -> tuple[int, dict[str, Any]]:
    app = service.app()
    done = service.done("POST", POLL, json={"client_id": app.client_id, "reason": "abuse"})
    return seq_of(done), {"what": "client", "reason": "abuse", "client_id": app.client_id}


def disable_client(service: Service) -> tuple[int, dict[str, Any]]:
    app = service.app()
    done = service.done("DELETE", f"/v1/clients/{app.client_id}")
    return seq_of(done), {"what": "client", "reason": "disabled", "client_id": app.client_id}


def disable_user(service: Service) -> tuple[int, dict[str, Any]]:
    user_id = service.user()["user_id"]
    return seq_of(service.done("DELETE", f"/v1/users/{user_id}")), {
        "what": "subject",
        "reason": "disabled",
        "subject": user_id,
    }


def change_password(service: Service) -> tuple[int, dict[str, Any]]:
    user_id = service.user(password=unique(CANARY_PASSWORD))["user_id"]
    done = service.done("PATCH", f"/v1/users/{user_id}", json={"password": unique(CANARY_PASSWORD)})
    return seq_of(done), {"what": "subject", "reason": "password_changed", "subject": user_id}


def rotate_token(service: Service) -> tuple[int, dict[str, Any]]:
    made = service.pat()
    service.done("POST", f"/v1/tokens/{made['token_id']}/rotate", json={"overlap_seconds": 3600})
    [superseded] = [event for event in service.history(made["token_id"]) if event["type"] == "token.superseded"]
    return seq_of(superseded), {"what": "token", "reason": "rotated", "token_id": made["token_id"]}


def reuse_refresh_token(service: Service) -> tuple[int, dict[str, Any]]:
    app = service.app(grant_types=["client_credentials", "refresh_token"])
    first = service.grant(app)
    second = service.refresh(app, first["refresh_token"]).json()
    service.refresh(app, second["refresh_token"])
    assert service.refresh(app, first["refresh_token"]).status_code == 400
    [event] = service.done("GET", "/v1/audit/events", params={"client_id": app.client_id, "type": "grant.revoked"})[
        "items"
    ]
    return seq_of(event), {"what": "grant", "reason": "reuse_detected", "client_id": app.client_id}


REVOCATIONS: dict[str, Callable[[Service], tuple[int, dict[str, Any]]]] = {
    "token": revoke_token,
    "rotated token": rotate_token,
    "grant": revoke_grant,
    "reuse of a refresh token": reuse_refresh_token,
    "client": revoke_client,
    "client disabled": disable_client,
    "user disabled": disable_user,
    "password changed": change_password,
}


@pytest.mark.parametrize("revoke", REVOCATIONS.values(), ids=REVOCATIONS.keys())
def test_revocation_is_heard_on_the_stream_by_polls_and_in_snapshots(
    service: Service, token: str, follower: Follower, revoke: Callable[[Service], tuple[int, dict[str, Any]]]
) -> None:
    seq, expected = revoke(service)
    event = follower.wait_for(seq)
    what = expected.pop("what")
    assert event["type"] == f"token-ledger.{what}.revoked.v1"
    assert event["source"] == service.issuer
    assert event["data"].items() >= expected.items()
    found = poll(service, token, after=seq - 1, wait_seconds=30)
    assert found["items"][0] == event
    head, revoked = until(lambda: taken_after(service, token, seq), seconds=30, what="a snapshot that is new enough")
    assert head["feed"] == found["feed"]
    [line] = [one for one in revoked if one.items() >= expected.items() and one["what"] == what]
    told = {name: value for name, value in line.items() if name != "what"}
    # The end of a rotated token stands in the view to the second; a mark of a disabled owner names its last event.
    assert told.keys() == event["data"].keys()
    assert told["ledger_seq"] >= seq
    assert told.get("token_sha256") == event["data"].get("token_sha256")


def taken_after(service: Service, token: str, seq: int) -> Any:
    head, revoked = snapshot(service, token)
    return (head, revoked) if head["ledger_seq"] >= seq else None


def test_stream_says_every_second_up_to_where_and_as_of_when(follower: Follower) -> None:
    begun = len(follower.positions)
    until(lambda: len(follower.positions) >= begun + 3, seconds=30)
    positions = follower.positions[-3:]
    assert all(one.keys() == {"ledger_seq", "feed", "as_of_ms", "now_ms"} for one in positions)
    assert [one["as_of_ms"] for one in positions] == sorted({one["as_of_ms"] for one in positions})
    assert all(one["now_ms"] - one["as_of_ms"] >= 0 for one in positions)
    assert len({one["feed"] for one in positions}) == 1


def test_stream_tells_an_announcement_before_the_position_that_covers_it(service: Service, token: str) -> None:
    """Whoever has position N has everything up to N."""
    order: list[tuple[str, int]] = []

    class Noting(Follower):
        def _take(self, fields: dict[str, str]) -> None:
            super()._take(fields)
            order.append((fields.get("event", "message"), self.reached))

    one = Noting(service, token)
    one.wait_begun()
    seqs = [revoke_token(service)[0] for _ in range(5)]
    one.wait_reached(seqs[-1])
    one.close()
    assert [seq for _, seq in order] == sorted(seq for _, seq in order)
    assert seqs == [seq for kind, seq in order if kind == "message" and seq in seqs]


def test_stream_resumes_from_any_cursor_without_gap_or_repetition(service: Service, token: str) -> None:
    seqs = [revoke_token(service)[0] for _ in range(4)]
    for after in (seqs[0] - 1, seqs[0], seqs[1] + 1, seqs[3]):
        with following(service, token, after=after) as one:
            one.wait_reached(seqs[3])
            assert [seq for seq in one.seqs if seq in seqs] == [seq for seq in seqs if seq > after]
    # Last-Event-ID wins over `after`.
    headers = bearer(token) | {"Last-Event-ID": str(seqs[2])}
    with service.http.stream("GET", f"{STREAM}?after=0", headers=headers) as answer:
        first = next(line for line in answer.iter_lines() if line.startswith("id: "))
    assert first == f"id: {seqs[3]}"


def test_stream_without_a_cursor_begins_with_what_comes_next(service: Service, token: str) -> None:
    before, _ = revoke_token(service)
    poll(service, token, after=before - 1, wait_seconds=30)
    with following(service, token) as one:
        seq, _ = revoke_token(service)
        one.wait_for(seq)
        assert before not in one.seqs


@pytest.mark.parametrize("name", ["client_id", "subject", "grant_id"])
def test_filter_leaves_out_what_names_another(service: Service, token: str, name: str) -> None:
    app, other = (service.app(grant_types=["client_credentials", "refresh_token"]) for _ in range(2))
    first, second = service.grant(app), service.grant(other)
    begun = poll(service, token, after=0, limit=1)["ledger_seq"]
    mine = [token_of(service, tokens["access_token"]) for tokens in (first, second)]
    wanted = mine[0][name]
    with following(service, token, **{name: wanted}) as one:
        seqs = [
            seq_of(service.done("POST", f"/v1/tokens/{known['token_id']}/revoke", json={"reason": "admin"}))
            for known in mine
        ]
        client_seq, _ = disable_client(service)
        one.wait_reached(client_seq)
        assert seqs[0] in one.seqs
        assert seqs[1] not in one.seqs
        # The end of a client names no subject and no grant, so that it could concern anybody's.
        assert (client_seq in one.seqs) == (name != "client_id")
        polled, _ = poll_all(service, token, begun, **{name: wanted})
        assert [int(item["id"]) for item in polled if int(item["id"]) in {*seqs, client_seq}] == one.seqs


def token_of(service: Service, token: str) -> dict[str, Any]:
    return service.validate(token)


def test_poll_that_waits_is_answered_when_something_is_revoked(service: Service, token: str) -> None:
    start = snapshot(service, token)[0]["ledger_seq"]
    found: list[dict[str, Any]] = []
    with service.caller(timeout_seconds=60) as http:

        def wait() -> None:
            # Whatever other tests revoked before is let pass.
            after = start
            while not found:
                answer = http.get(
                    POLL, params={"after": after, "wait_seconds": 30, "client_id": app.client_id}, headers=bearer(token)
                ).json()
                after = answer["ledger_seq"]
                found.extend(item for item in answer["items"] if item["data"].get("client_id") == app.client_id)

        app = service.app()
        waiting = threading.Thread(target=wait)
        waiting.start()
        seq = seq_of(service.done("POST", POLL, json={"client_id": app.client_id, "reason": "admin"}))
        waiting.join(60)
    assert [item["id"] for item in found] == [str(seq)]


def test_poll_without_news_waits_as_long_as_asked_and_says_where_to_go_on(service: Service, token: str) -> None:
    end = until(lambda: quiet_end(service, token), seconds=60, what="nothing new is announced")
    started = time.monotonic()
    answer = poll(service, token, after=end, wait_seconds=1)
    assert answer["items"] or time.monotonic() - started >= 1
    assert answer["ledger_seq"] >= end
    assert answer["age_ms"] >= 0


def quiet_end(service: Service, token: str) -> int:
    """Where the feed ends, once all that was asked for before is in it."""
    return poll_all(service, token, snapshot(service, token)[0]["ledger_seq"])[1]


def test_polls_page_through_everything(service: Service, token: str) -> None:
    seqs = [revoke_token(service)[0] for _ in range(3)]
    poll(service, token, after=seqs[-1] - 1, wait_seconds=30)
    one_by_one, _ = poll_all(service, token, seqs[0] - 1, limit=1)
    at_once, _ = poll_all(service, token, seqs[0] - 1, limit=1000)
    assert one_by_one == at_once[: len(one_by_one)]
    assert [int(item["id"]) for item in one_by_one if int(item["id"]) in seqs] == seqs
    page = poll(service, token, after=seqs[0] - 1, limit=1)
    assert page["ledger_seq"] == int(page["items"][0]["id"])


# Refusals

WRONG: dict[str, tuple[str, dict[str, str], dict[str, str], str]] = {  # path, query, headers, what is said
    "negative cursor": (STREAM, {"after": "-1"}, {}, "after"),
    "cursor that is no number": (STREAM, {"after": "x"}, {}, "after"),
    "huge cursor": (STREAM, {"after": "9" * 30}, {}, "after"),
    "Last-Event-ID that is no number": (STREAM, {}, {"Last-Event-ID": "abc"}, "Last-Event-ID"),
    "Last-Event-ID that is empty": (STREAM, {}, {"Last-Event-ID": ""}, "Last-Event-ID"),
    "Last-Event-ID that is negative": (STREAM, {}, {"Last-Event-ID": "-1"}, "Last-Event-ID"),
    "huge Last-Event-ID": (STREAM, {}, {"Last-Event-ID": "9" * 4000}, "Last-Event-ID"),
    "poll for no announcements": (POLL, {"limit": "0"}, {}, "limit"),
    "poll for too many": (POLL, {"limit": "1001"}, {}, "limit"),
    "poll that waits too long": (POLL, {"wait_seconds": "31"}, {}, "wait_seconds"),
    "poll that waits backwards": (POLL, {"wait_seconds": "-1"}, {}, "wait_seconds"),
    "token as client": (POLL, {"client_id": "tok_" + "0" * 32}, {}, "client_id is not an id"),
    "username as subject": (POLL, {"subject": "alice"}, {}, "subject is not an id"),
    "grant in capitals": (STREAM, {"grant_id": "grt_" + "A" * 32}, {}, "grant_id is not an id"),
    "parameter that is not there": (STREAM, {"since": "1"}, {}, "there is no parameter"),
    "parameter twice": (POLL, {"after": "1&after=2"}, {}, "repeated"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_malformed_request_is_refused_before_the_first_byte(service: Service, token: str, wrong: Any) -> None:
    path, query, headers, said = wrong
    target = path + ("?" + "&".join(f"{name}={value}" for name, value in query.items()) if query else "")
    answer = service.call("GET", target, token=token, headers=headers)
    body = problem(answer, 400, "invalid_request")
    assert said in body["detail"]


@pytest.mark.parametrize(
    ("path", "query", "headers"),
    [
        (STREAM, {"after": str(2**50)}, {}),
        (STREAM, {}, {"Last-Event-ID": str(2**50)}),
        (POLL, {"after": str(2**50)}, {}),
        (POLL, {"after": "1", "feed": "0" * 16}, {}),
    ],
    ids=["stream", "stream-last-event-id", "poll", "poll-of-another-feed"],
)
def test_cursor_of_another_log_is_told_apart(
    service: Service, token: str, path: str, query: dict[str, str], headers: dict[str, str]
) -> None:
    answer = service.call("GET", path, token=token, params=query, headers=headers)
    assert "snapshot" in problem(answer, 400, "feed_changed")["fix"]


def test_last_event_id_twice_is_refused(service: Service, token: str) -> None:
    headers = [("Authorization", f"Bearer {token}"), ("Last-Event-ID", "1"), ("Last-Event-ID", "2")]
    answer = service.raw_call("GET", STREAM, headers)
    assert answer.status_code == 400
    assert "Last-Event-ID" in answer.json()["detail"]


@pytest.mark.parametrize("path", [STREAM, POLL, SNAPSHOT, "/v1/revocations/position"])
def test_feed_is_only_for_subscribers(service: Service, path: str) -> None:
    problem(service.call("GET", path, token=None), 401, "unauthorized")
    problem(service.call("GET", path, token=service.bearer("ledger:validate")), 403, "insufficient_scope")


def test_stream_of_a_follower_whose_token_ends_is_ended(service: Service) -> None:
    user = service.user(kind="service", scope="ledger:subscribe")
    made = service.issue(user["user_id"], "ledger:subscribe", kind="sat")
    with following(service, made["token"]) as one:
        service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json={"reason": "compromised"})
        until(lambda: one.ended, seconds=60, what="it is told no more")
        assert one.refused is not None
        problem(one.refused, 401, "invalid_token")


def test_poll_of_a_follower_whose_token_ends_meanwhile_says_nothing(service: Service) -> None:
    user = service.user(kind="service", scope="ledger:subscribe")
    made = service.issue(user["user_id"], "ledger:subscribe", kind="sat")
    query = {"after": snapshot(service, made["token"])[0]["ledger_seq"], "wait_seconds": 30}
    answers: list[httpx.Response] = []
    with service.caller(timeout_seconds=60) as http:

        def wait() -> None:
            while not answers or answers[-1].is_success:
                answers.append(http.get(POLL, params=query, headers=bearer(made["token"])))
                if answers[-1].is_success:
                    query["after"] = answers[-1].json()["ledger_seq"]

        waiting = threading.Thread(target=wait)
        waiting.start()
        service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json={"reason": "compromised"})
        waiting.join(60)
    assert answers[-1].status_code == 401
    told = [item for answer in answers[:-1] for item in answer.json()["items"]]
    assert made["token_id"] not in {item["data"].get("token_id") for item in told}


# Snapshots


def test_snapshot_and_what_follows_it_are_what_the_log_holds(service: Service, token: str) -> None:
    """Whatever is revoked in whatever order: a follower that begins anywhere ends with the same set."""
    choices = random.Random(SEED)
    from_the_start, heads = Revoked(), []
    acts = [choices.choice(list(REVOCATIONS.values())) for _ in range(24)]
    for number, act in enumerate(acts):
        seq, _ = act(service)
        if number % 8 == 3:
            heads.append(until(lambda: taken_after(service, token, seq), seconds=30))  # noqa: B023 - asked at once
    polled, end = until(lambda: all_up_to(service, token, seq), seconds=60, what="all is announced")
    for item in polled:
        from_the_start.add(item["data"])
    head, lines = until(lambda: taken_after(service, token, end), seconds=30)
    whole = from_the_start.names()
    for begun, revoked in [*heads, (head, lines)]:
        found = Revoked()
        for line in revoked:
            found.add(line)
        for item in polled:
            if int(item["id"]) > begun["ledger_seq"]:
                found.add(item["data"])
        # Tokens of a session's other tests may have expired since: those matter to nobody.
        assert found.names() <= whole, SEED
        missing = {name for name in whole - found.names() if is_good(service, name)}
        assert missing == set(), SEED


def all_up_to(service: Service, token: str, seq: int) -> Any:
    polled, end = poll_all(service, token, 0, limit=1000)
    return (polled, end) if end >= seq else None


def is_good(service: Service, name: tuple[str, str, str]) -> bool:
    """Whether anything could be accepted by it: not an expired token, nor a grant whose code was never redeemed."""
    match name[0]:
        case "token_id":
            shown: dict[str, Any] = service.done("GET", f"/v1/tokens/{name[1]}")
            return bool(shown["status"] != "expired")
        case "grant_id":
            tokens = service.done("GET", "/v1/tokens", params={"grant_id": name[1]})["items"]
            return any(one["status"] != "expired" for one in tokens)
        case _:
            return True


def test_snapshots_that_are_asked_at_once_are_one(service: Service, token: str) -> None:
    answers: list[bytes] = []

    def ask() -> None:
        with service.caller() as http:
            answers.append(http.get(SNAPSHOT, headers=bearer(token)).content)

    asking = [threading.Thread(target=ask) for _ in range(8)]
    for one in asking:
        one.start()
    for one in asking:
        one.join(60)
    # Each of the two workers makes its own.
    assert len(answers) == 8
    assert len({json.loads(answer.splitlines()[0])["taken_at"] for answer in answers}) <= 4


def test_duplicates_are_harmless(service: Service, token: str) -> None:
    seqs = [revoke_token(service)[0] for _ in range(3)]
    poll(service, token, after=seqs[-1] - 1, wait_seconds=30)
    once, twice = Revoked(), Revoked()
    for item in poll_all(service, token, seqs[0] - 1)[0]:
        once.add(item["data"])
        for _ in range(2):
            twice.add(item["data"])
    assert once.names() == twice.names()


# The command line


def test_tail_prints_a_line_for_each_and_ends_quietly_at_ctrl_c(service: Service, token: str) -> None:
    environment = {**os.environ, "TOKEN_LEDGER_URL": service.url, "TOKEN_LEDGER_TOKEN": token}
    seq, expected = revoke_token(service)
    options: list[list[str]] = [[], ["-o", "json"], ["--subject", expected["subject"]]]
    tails = [
        subprocess.Popen(
            [*command(), "revocations", "tail", "--after", str(seq - 1), *words],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words in options
    ]
    for tail, words in zip(tails, options, strict=True):
        assert tail.stdout is not None
        line = tail.stdout.readline()
        tail.send_signal(signal.SIGINT)
        _, complaint = tail.communicate(timeout=60)
        assert (tail.returncode, complaint) == (0, "")
        if "json" in words:
            assert json.loads(line)["data"].items() >= {"token_id": expected["token_id"], "ledger_seq": seq}.items()
        else:
            assert line.split()[0] == str(seq)
            assert f"token_id={expected['token_id']}" in line


def test_tail_of_who_may_not_says_why(service: Service) -> None:
    weak = service.bearer("ledger:validate")
    environment = {**os.environ, "TOKEN_LEDGER_URL": service.url, "TOKEN_LEDGER_TOKEN": weak}
    done = subprocess.run(
        [*command(), "revocations", "tail"],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "ledger:subscribe" in done.stderr
