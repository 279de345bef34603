"""What a request says about itself, as the HTTP server hands it over."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import BodyTooLarge, InvalidRequest, RequestTimeout, UnsupportedMediaType
from service.incoming import parse_form
from service.settings import Settings
from service.tokens import mint
from tests.logs import until
from tests.rsgi import END, GONE
from tests.rsgi import request as incoming

PROXIES = ("10.0.0.0/8", "2001:db8:ff::/48", "fe80::9/128")


@pytest.fixture(scope="module")
def behind_proxies() -> Settings:
    return Settings(data_dir=Path("unused"), trusted_proxies=tuple(ipaddress.ip_network(one) for one in PROXIES))


@pytest.fixture(scope="module")
def direct() -> Settings:
    return Settings(data_dir=Path("unused"))


# Where it comes from

ADDRESSES = [
    pytest.param("198.51.100.7", ["192.0.2.1"], "198.51.100.7", id="a peer that is no proxy is not believed"),
    pytest.param("10.0.0.1", [], "10.0.0.1", id="a proxy that says nothing"),
    pytest.param("10.0.0.1", ["192.0.2.1"], "192.0.2.1", id="one proxy"),
    pytest.param("10.0.0.1", ["203.0.113.9, 192.0.2.1"], "192.0.2.1", id="the client lies about the rest"),
    pytest.param("10.0.0.1", ["192.0.2.1, 10.0.0.2"], "192.0.2.1", id="two proxies"),
    pytest.param("10.0.0.1", ["203.0.113.9", "192.0.2.1,10.0.0.2"], "192.0.2.1", id="two headers are one list"),
    pytest.param("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3", id="from inside"),
    pytest.param("10.0.0.1", ["192.0.2.1, unknown"], "10.0.0.1", id="what is no address ends the chain"),
    pytest.param("10.0.0.1", ["192.0.2.1:4711"], "10.0.0.1", id="an address with a port is none"),
    pytest.param("10.0.0.1", [""], "10.0.0.1", id="empty"),
    pytest.param("10.0.0.1", ["fe80::1%" + "x" * 9000], "10.0.0.1", id="a zone of any length"),
    pytest.param("2001:db8:ff::1", ["2001:db8::7"], "2001:db8::7", id="IPv6"),
    pytest.param("fe80::1%eth0", ["192.0.2.1"], "fe80::1", id="a link-local peer is recorded without its zone"),
    pytest.param("fe80::9%2", ["2001:db8::7"], "2001:db8::7", id="a link-local proxy, in any zone"),
    pytest.param("fe80::9%2", ["2001:db8::7, fe80::1%eth0"], "fe80::9", id="a forwarded zone ends the chain"),
    pytest.param("10.0.0.1", ["\u0661.1.1.1"], "10.0.0.1", id="other digits"),
]


@pytest.mark.parametrize(("peer", "forwarded", "wanted"), ADDRESSES)
def test_address_is_the_first_from_the_right_that_is_no_proxy(
    behind_proxies: Settings, peer: str, forwarded: list[str], wanted: str
) -> None:
    request = incoming(*(("x-forwarded-for", value) for value in forwarded), peer=peer)
    assert wanted == request.client_ip(behind_proxies)


def test_without_trusted_proxies_nobody_is_believed(direct: Settings) -> None:
    headers = [("x-forwarded-for", "192.0.2.1"), ("x-real-ip", "192.0.2.1"), ("forwarded", "for=192.0.2.1")]
    assert incoming(*headers, ("host", "192.0.2.1"), peer="10.0.0.1").client_ip(direct) == "10.0.0.1"
    assert incoming(*headers, peer=None).client_ip(direct) is None


@given(st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30), max_size=5))
@settings(max_examples=200, deadline=None)
def test_whatever_is_forwarded_gives_an_address_or_the_peer(forwarded: list[str]) -> None:
    trusting = Settings(data_dir=Path("unused"), trusted_proxies=tuple(ipaddress.ip_network(one) for one in PROXIES))
    headers = [("x-forwarded-for", value.encode("latin-1")) for value in forwarded]
    found = incoming(*headers, peer="10.0.0.1").client_ip(trusting)
    assert found is not None
    ipaddress.ip_address(found)


def test_context_is_cut_and_holds_no_query_and_no_token(direct: Settings) -> None:
    token = mint("pat")
    request = incoming(
        ("user-agent", f"{token} " + "a" * 9000), path=f"/v1/tokens/{token}/" + "p" * 9000, query="token=secret"
    )
    context = request.context(direct)
    assert (context.ip, context.method) == ("198.51.100.7", "POST")
    assert context.user_agent is not None
    assert context.path is not None
    assert len(context.user_agent) == len(context.path) == 256
    assert token not in f"{context}"
    assert "secret" not in f"{context}"


def test_header_that_is_not_ascii_is_there_and_empty(direct: Settings) -> None:
    request = incoming(("user-agent", b"caf\xe9"), ("authorization", b"Bearer \xe9"))
    assert (request.header("user-agent"), request.header_values("authorization")) == ("", [""])
    assert request.context(direct).user_agent == "(not ASCII)"
    assert incoming().context(direct).user_agent is None


def test_headers_are_found_by_name() -> None:
    request = incoming(("a", "1"), ("b", "2"), ("a", "3"))
    assert (request.header_values("a"), request.header("b"), request.header("c")) == (["1", "3"], "2", None)


REQUEST_IDS = {
    "kept": ("abc-123.X_y", True),
    "longest": ("a" * 64, True),
    "too long": ("a" * 65, False),
    "empty": ("", False),
    "space": ("a b", False),
    "line break": ("a\r\nset-cookie: x=y", False),
    "newline at its end": ("abc\n", False),
    "quote": ('a"', False),
    "not ASCII": ("\u00e9", False),
    "a token": (mint("pat"), False),
    "a token in it": ("id." + mint("at"), False),
}


@pytest.mark.parametrize(("given_id", "is_kept"), REQUEST_IDS.values(), ids=REQUEST_IDS.keys())
def test_request_id_is_kept_if_it_is_fit_for_a_header_and_the_log(given_id: str, *, is_kept: bool) -> None:
    """It stands in events for ever and goes back in a header."""
    found = incoming(("x-request-id", given_id.encode())).request_id
    assert (found == given_id) == is_kept
    assert found
    assert found.isascii()


def test_request_ids_differ() -> None:
    assert len({incoming().request_id for _ in range(1000)}) == 1000


# Body

ANNOUNCED = ("content-length", "10")
BODIES: dict[str, list[Any]] = {
    "whole": [b"0123456789", END],
    "in parts": [b"01234", b"56789", END],
}


@pytest.mark.parametrize("headers", [[ANNOUNCED], [], [ANNOUNCED, ("transfer-encoding", "chunked")]])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
async def test_body_is_read_however_it_comes(headers: list[tuple[str, str]], body: list[Any]) -> None:
    assert await incoming(*headers, body=body).body(10, 5) == b"0123456789"


async def test_request_without_a_body_is_empty() -> None:
    assert await incoming().body(10, 5) == b""
    assert await incoming(("content-length", "0")).body(10, 5) == b""


TOO_LARGE: dict[str, tuple[list[tuple[str, str]], list[Any]]] = {
    "it says so": ([("content-length", "11")], []),
    "it says so, absurdly": ([("content-length", "9" * 5000)], []),
    "it does not say so": ([], [b"01234567890", END]),
    "in parts": ([], [b"0123456789", b"0", END]),
    "it lies": ([("content-length", "1")], [b"01234567890", END]),
    "without end": ([], [b"0"] * 12),
}


@pytest.mark.parametrize(("headers", "body"), TOO_LARGE.values(), ids=TOO_LARGE.keys())
async def test_body_that_is_too_large_is_refused_without_waiting_for_the_rest(
    headers: list[tuple[str, str]], body: list[Any]
) -> None:
    with pytest.raises(BodyTooLarge, match="10 bytes"):
        await asyncio.wait_for(incoming(*headers, body=body).body(10, 60), 5)


@pytest.mark.parametrize("length", ["", "-1", "1e3", "0x10", " 5"])
async def test_nonsense_for_a_length_is_no_error_of_ours(length: str) -> None:
    assert await incoming(("content-length", length), body=[b"ok", END]).body(10, 5) == b"ok"


@pytest.mark.parametrize("headers", [[ANNOUNCED], []], ids=["announced", "in parts"])
@pytest.mark.parametrize("body", [[GONE], [b"0", GONE]], ids=["at once", "in the midst"])
async def test_client_that_goes_away_is_told_from_an_empty_body(
    headers: list[tuple[str, str]], body: list[Any]
) -> None:
    with pytest.raises(InvalidRequest, match="went away"):
        await incoming(*headers, body=body).body(10, 5)


@pytest.mark.parametrize("headers", [[ANNOUNCED], []], ids=["announced", "in parts"])
@pytest.mark.parametrize("body", [[], [b"0"]], ids=["nothing comes", "the rest does not come"])
async def test_body_that_does_not_come_ends_in_time_and_leaves_the_task_usable(
    headers: list[tuple[str, str]], body: list[Any]
) -> None:
    request = incoming(*headers, body=body)
    with pytest.raises(RequestTimeout):
        await asyncio.wait_for(request.body(10, 0.1), 10)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert await incoming(body=[b"next", END]).body(10, 5) == b"next"


async def test_slow_bodies_end_each_and_fast_ones_do_not() -> None:
    slow = [asyncio.create_task(incoming(body=[]).body(10, 0.1)) for _ in range(20)]
    fast = [asyncio.create_task(incoming(body=[b"x", END]).body(10, 0.1)) for _ in range(20)]
    patient = asyncio.create_task(incoming(body=[]).body(10, 60))
    assert [await task for task in fast] == [b"x"] * 20
    outcomes = await asyncio.gather(*slow, return_exceptions=True)
    assert {RequestTimeout} == {type(outcome) for outcome in outcomes}
    assert not patient.done()
    patient.cancel()
    await asyncio.wait([patient])
    assert patient.cancelled()  # by us, so that it is no timeout


async def test_cancelled_request_is_cancelled_and_forgotten() -> None:
    task = asyncio.create_task(incoming(body=[]).body(10, 60))
    await until(lambda: task._fut_waiter is not None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "identity, gzip", ""])
async def test_compressed_body_is_refused(encoding: str) -> None:
    """A small body could become a large one."""
    with pytest.raises(UnsupportedMediaType):
        await incoming(("content-encoding", encoding), body=[b"x", END]).body(10, 5)
    assert await incoming(("content-encoding", "Identity"), body=[b"x", END]).body(10, 5) == b"x"


# Forms

FORMS = [
    pytest.param(b"", [], id="empty"),
    pytest.param(b"a=1&b=2", [("a", "1"), ("b", "2")], id="pairs"),
    pytest.param(b"a=1&a=2", [("a", "1"), ("a", "2")], id="repeated, for the caller to judge"),
    pytest.param(b"a", [("a", "")], id="without a value"),
    pytest.param(b"a=", [("a", "")], id="empty value"),
    pytest.param(b"=1", [("", "1")], id="without a name"),
    pytest.param(b"&&a=1&", [("a", "1")], id="empty parts"),
    pytest.param(b"a=b=c", [("a", "b=c")], id="equals sign in a value"),
    pytest.param(b"a=%20b+c%2B", [("a", " b c+")], id="escapes"),
    pytest.param(b"a=%c3%A4", [("a", "\u00e4")], id="UTF-8"),
    pytest.param("a=\u00e4".encode(), [("a", "\u00e4")], id="UTF-8, not escaped"),
    pytest.param(b"a=1;b=2", [("a", "1;b=2")], id="a semicolon separates nothing"),
    pytest.param(b"a=%00", [("a", "\0")], id="NUL"),
]


@pytest.mark.parametrize(("data", "wanted"), FORMS)
def test_form_is_read(data: bytes, wanted: list[tuple[str, str]]) -> None:
    assert wanted == parse_form(data)


BAD_FORMS = [
    pytest.param(b"a=%ff", "UTF-8", id="not UTF-8"),
    pytest.param(b"a=\xff", "UTF-8", id="not UTF-8, not escaped"),
    pytest.param(b"%ff=a", "UTF-8", id="name not UTF-8"),
    pytest.param(b"a=%ed%a0%80", "UTF-8", id="surrogate"),
    pytest.param(b"a=%c0%af", "UTF-8", id="overlong"),
    pytest.param(b"a=%", "percent", id="percent at the end"),
    pytest.param(b"a=%4", "percent", id="half an escape"),
    pytest.param(b"a=%zz", "percent", id="no hex"),
    pytest.param(b"a=" + b"x" * 8193, "8192", id="long value"),
    pytest.param(b"a=" + b"%20" * 8193, "8192", id="long value, escaped"),
    pytest.param(b"&".join([b"a=1"] * 101), "100", id="many"),
    pytest.param(b"&" * 100_000, "100", id="many empty ones"),
]


@pytest.mark.parametrize(("data", "why"), BAD_FORMS)
def test_bad_form_is_refused_saying_why(data: bytes, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        parse_form(data)


def test_limits_are_inclusive() -> None:
    assert len(parse_form(b"&".join([b"a=1"] * 100))) == 100
    assert len(parse_form(b"a=" + b"x" * 8192)[0][1]) == 8192


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        pairs = parse_form(data)
    except InvalidRequest:
        return
    for name, value in pairs:
        (name + value).encode()


def test_request_id_of_a_forked_worker_is_never_that_of_another():
    def ids() -> list[str]:
        return [incoming().request_id for _ in range(3)]

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, " ".join(ids()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 4096).decode().split()
    os.close(reading)
    os.close(writing)
    assert set(theirs).isdisjoint(ids())
