"""Pages of other sites, broken cursors and hidden tokens at the feed of revocations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.attacks.table import Stage, attack, bearer, variants
from tests.following import POLL, STREAM
from tests.running import RawResponse, Service

NOT_ASCII = "\u00e4".encode()


def subscriber(stage: Stage) -> str:
    return stage.service.bearer("ledger:subscribe")


def asked(stage: Stage, path: str, *headers: tuple[str, str | bytes]) -> RawResponse:
    return stage.service.raw_call("GET", path, [bearer(subscriber(stage)), *headers])


def refused(answer: RawResponse, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert (body["status"], body["code"]) == (status, code)
    assert body["detail"]
    assert answer.headers["content-type"] == "application/problem+json"


@contextmanager
def begun(service: Service, token: str, **headers: str) -> Iterator[httpx.Response]:
    """A stream's answer, whose end is not waited for."""
    given = {"Authorization": f"Bearer {token}", **headers}
    with service.caller() as http, http.stream("GET", STREAM, headers=given) as answer:
        yield answer


@variants(
    "218",
    "CSWSH; RFC 6454 §7.3",
    another_site="https://evil.example",
    the_same_host_with_another_port="http://127.0.0.1:1",
    no_origin_of_its_own="null",
    empty="",
    not_ascii=NOT_ASCII,
    several="http://127.0.0.1 https://evil.example",
)
def stream_for_a_page_of_another_origin(stage: Stage, origin: object) -> None:
    assert isinstance(origin, str | bytes)
    refused(asked(stage, STREAM, ("Origin", origin)), 403, "foreign_origin")


@attack("218", "CSWSH; RFC 6454 §7.3")
def stream_for_a_page_of_another_origin_over_asgi(stage: Stage) -> None:
    refused(asked(stage.odd, STREAM, ("Origin", "https://evil.example")), 403, "foreign_origin")


@attack("218", "P")
def stream_for_a_page_of_the_issuer(stage: Stage) -> None:
    with begun(stage.service, subscriber(stage), Origin=stage.service.issuer) as answer:
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers


@attack("218", "RFC 6750 §2.3, which RFC 9700 §4.3.2 forbids")
def stream_with_the_token_in_its_address(stage: Stage) -> None:
    """EventSource of browsers can send no header, and so tempts to."""
    token = subscriber(stage)
    answer = stage.service.raw_call("GET", f"{STREAM}?access_token={token}")
    refused(answer, 401, "unauthorized")
    assert token not in answer.text


@variants(
    "218",
    "P",
    another_number="1.5",
    digits_of_another_script="\u0661".encode(),
    signed="+1",
    with_a_blank="1 2",
    not_ascii=NOT_ASCII,
    long="9" * 8000,
)
def stream_with_a_broken_last_event_id(stage: Stage, value: object) -> None:
    assert isinstance(value, str | bytes)
    refused(asked(stage, STREAM, ("Last-Event-ID", value)), 400, "invalid_request")


@attack("218", "P")
def stream_over_asgi_is_a_stream(stage: Stage) -> None:
    """Where proxies are trusted another interface to the server is used."""
    with begun(stage.odd.service, subscriber(stage.odd)) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        lines = answer.iter_lines()
        assert any(line.startswith("event: position") for line in lines)


@variants("218", "RFC 9110 §15.5.6", stream=STREAM, snapshot="/v1/revocations/snapshot")
def feed_asked_to_be_written(stage: Stage, path: object) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        answer = stage.service.raw_call(method, str(path), [bearer(subscriber(stage))])
        refused(answer, 405, "method_not_allowed")
        assert "GET" in answer.headers["allow"]


@variants("218", "P", stream=STREAM, poll=POLL)
def cursor_of_another_log(stage: Stage, path: object) -> None:
    answer = asked(stage, f"{path}?after={2**53}")
    refused(answer, 400, "feed_changed")
    assert "snapshot" in answer.json()["fix"]
