"""What is sent to webhooks and where it may go: signatures, addresses, and receivers that do what they like."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
import ssl
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from service.webhooks import sender
from service.webhooks.addresses import Guard, NotCallable, NotResolved, is_public, parse
from service.webhooks.sender import Answer, Line
from service.webhooks.signatures import new_secret, signed_headers
from tests import receivers
from tests.receivers import Receiver, signed_by
from tests.running import NO_TLS, RECEIVERS_ADDRESS

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
PORTS = (443,)


def resolving(*answers: Sequence[str]) -> tuple[list[str], object]:
    """A resolver that gives one answer after the other, the last one for ever; and the names it was asked."""
    asked: list[str] = []

    async def resolve(host: str, owner: str) -> Sequence[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    return asked, resolve


async def post(receiver: Receiver, **more: object) -> Answer:
    line = Line(Guard(LOOPBACK, PORTS), NO_TLS)
    try:
        return await line.post(parse(receiver.url()), {"webhook-id": "a"}, b"{}")
    finally:
        line.close()


# Signatures


def test_signature_is_that_of_the_specification() -> None:
    """The test vector that implementations of Standard Webhooks share."""
    headers = signed_headers(
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    )
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_secret_is_thirty_two_random_bytes() -> None:
    first, second = new_secret(), new_secret()
    assert first.startswith("whsec_")
    assert len(base64.b64decode(first.removeprefix("whsec_"), validate=True)) == 32
    assert first != second


# Where a webhook may be (attacks 203, 204)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://hooks.example", "https://"),
        ("//hooks.example/a", "https://"),
        ("https://", "name a host"),
        ("https://user@hooks.example/", "user name"),
        ("https://user:password@hooks.example/", "user name"),
        ("https://hooks.example/#part", "fragment"),
        ("https://hooks.example:0/", "port 0"),
        ("https://hooks.example:99999/", "cannot be read"),
        ("https://hooks.example:port/", "cannot be read"),
        ("https://[::1/", "cannot be read"),
        ("https://[fe80::1%25eth0]/", "not a host name"),
        ("https://hooks..example/", "not a host name"),
        ("https://hooks.ex\u00e4mple/", "visible ASCII"),
        ("https://hooks.example/a b", "visible ASCII"),
        ("https://hooks.example\\@127.0.0.1/", "visible ASCII"),
        ("https://hooks.example/\r\nHost: other", "visible ASCII"),
        ("https://" + "a" * 2_000 + "/", "2000 characters"),
    ],
)
def test_url_that_no_webhook_may_have_is_refused(url: str, said: str) -> None:
    with pytest.raises(NotCallable, match=said) as refused:
        parse(url)
    assert refused.value.fix


@pytest.mark.parametrize(
    ("url", "origin", "path"),
    [
        ("https://Hooks.Example/a/b?c=d", "https://hooks.example", "/a/b?c=d"),
        ("https://hooks.example.:443", "https://hooks.example", "/"),
        ("https://hooks.example:8443/", "https://hooks.example:8443", "/"),
        ("http://[2606:4700::1111]?a", "http://[2606:4700::1111]", "/?a"),
    ],
)
def test_url_is_taken_apart(url: str, origin: str, path: str) -> None:
    target = parse(url)
    assert (target.origin, target.path) == (origin, path)


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254"),
        *("172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1"),
        *("198.51.100.7", "203.0.113.9", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b:1::1"),
        *("100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "3fff::1", "5f00::1", "fc00::1", "fd12::1"),
        *("fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1"),
    ],
)
async def test_address_that_is_not_public_is_refused_wherever_it_comes_from(address: str) -> None:
    assert not is_public(address)
    _, resolve = resolving([address])
    guard = Guard((), PORTS, resolve)
    with pytest.raises(NotCallable, match="not a public address"):
        await guard.addresses(parse("https://hooks.example/"))
    if "%" not in address:
        literal = f"[{address}]" if ":" in address else address
        with pytest.raises(NotCallable, match="not a public address"):
            await guard.addresses(parse(f"https://{literal}/"))


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"])
async def test_public_address_is_called(address: str) -> None:
    _, resolve = resolving([address])
    assert await Guard((), PORTS, resolve).addresses(parse("https://hooks.example/")) == [address]


@pytest.mark.parametrize("host", ["0", "0x7f000001", "017700000001", "127.1", "2130706433", "localhost"])
async def test_other_spellings_of_loopback_are_refused(host: str) -> None:
    """By the system's resolver, which understands them."""
    with pytest.raises((NotCallable, NotResolved)):
        await Guard((), PORTS).addresses(parse(f"https://{host}/"))


async def test_one_address_that_may_not_be_called_is_enough() -> None:
    _, resolve = resolving(["1.1.1.1", "10.0.0.1"])
    with pytest.raises(NotCallable, match=r"hooks\.example resolves to what is not a public address") as refused:
        await Guard((), PORTS, resolve).addresses(parse("https://hooks.example/"))
    assert "10.0.0.1" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://hooks.example/", "https://hooks.example:22/", "https://hooks.example:8443/"])
async def test_public_receivers_are_called_with_tls_and_at_the_port_of_https(url: str) -> None:
    _, resolve = resolving(["1.1.1.1"])
    with pytest.raises(NotCallable, match=r"https://|only 443") as refused:
        await Guard((), PORTS, resolve).addresses(parse(url))
    assert "TOKEN_LEDGER_WEBHOOK_" in refused.value.fix
    allowing = Guard((ipaddress.ip_network("1.1.1.0/24"),), PORTS, resolve)
    assert await allowing.addresses(parse(url)) == ["1.1.1.1"]


async def test_name_without_an_address_is_refused() -> None:
    _, resolve = resolving([])
    with pytest.raises(NotResolved, match="no address"):
        await Guard((), PORTS, resolve).addresses(parse("https://hooks.example/"))
    with pytest.raises(NotResolved, match="cannot be resolved"):
        await Guard((), PORTS).addresses(parse("https://nowhere.invalid/"))


async def test_name_that_is_bound_anew_is_refused_when_it_is_called() -> None:
    """DNS rebinding: registered while it was public, it now means this machine. Nothing is connected."""
    asked, resolve = resolving(["1.1.1.1"], [RECEIVERS_ADDRESS])
    guard = Guard((), PORTS, resolve)
    with Receiver() as receiver:
        target = parse(f"https://hooks.example:{receiver.port}/")
        target = type(target)(target.scheme, target.host, 443, target.path)
        assert await guard.addresses(target) == ["1.1.1.1"]
        line = Line(guard, NO_TLS)
        answer = await line.post(target, {}, b"{}")
        line.close()
        assert (answer.outcome, answer.status) == ("not_allowed", None)
        assert "not a public address" in answer.error
        assert receiver.connections == 0
    assert asked == ["hooks.example"] * 2


async def test_name_is_resolved_once_for_each_request() -> None:
    """What was looked at is what is called: there is no second look-up that could say something else."""
    asked, resolve = resolving([RECEIVERS_ADDRESS], ["127.0.0.99"])
    with Receiver() as receiver:
        line = Line(Guard((ipaddress.ip_network(RECEIVERS_ADDRESS),), PORTS, resolve), NO_TLS)
        target = parse(receiver.url(host="hooks.example"))
        assert (await line.post(target, {}, b"{}")).outcome == "delivered"
        assert (await line.post(target, {}, b"{}")).outcome == "not_allowed"
        line.close()
        assert [one.headers["host"] for one in receiver.received] == [f"hooks.example:{receiver.port}"]
    assert asked == ["hooks.example"] * 2


async def test_names_that_nobody_answers_for_hold_up_their_owner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, asked = threading.Event(), []

    def look_up(host: str, *_: object, **__: object) -> list[Any]:
        asked.append(host)
        if host.startswith("slow"):
            answer.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.1.1.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    guard = Guard((), PORTS)
    slow = [asyncio.create_task(guard.addresses(parse(f"https://slow-{n}.example/"), "usr_a")) for n in range(100)]
    try:
        await asyncio.sleep(0)
        assert await guard.addresses(parse("https://other.example/"), "usr_b") == ["1.1.1.1"]
        assert len(asked) <= 5
        answer.set()
        assert await asyncio.gather(*slow) == [["1.1.1.1"]] * 100
    finally:
        answer.set()
        await asyncio.gather(*slow, return_exceptions=True)


# Receivers (attacks 205 to 207)


async def test_request_is_as_it_is_described() -> None:
    secret = new_secret()
    with Receiver() as receiver:
        line = Line(Guard(LOOPBACK, PORTS), NO_TLS)
        body = b'{"a":1}'
        headers = {"content-type": "application/cloudevents+json", **signed_headers([secret], "rev_1", 1, body)}
        answer = await line.post(parse(receiver.url("/a/secret?b=c")), headers, body)
        again = await line.post(parse(receiver.url("/a/secret?b=c")), headers, body)
        line.close()
        assert (answer.outcome, answer.status, again.outcome) == ("delivered", 204, "delivered")
        received, _ = receiver.received
        assert receiver.connections == 1
    assert (received.path, received.body) == ("/a/secret?b=c", body)
    assert received.headers["content-type"] == "application/cloudevents+json"
    assert received.headers["host"] == f"{RECEIVERS_ADDRESS}:{receiver.port}"
    assert not received.headers.keys() & {"authorization", "cookie"}
    assert signed_by(received, secret)
    assert not signed_by(received, new_secret())


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (200, "delivered"),
        (299, "delivered"),
        (304, "redirected"),
        (400, "refused"),
        (404, "refused"),
        (410, "gone"),
        (429, "throttled"),
        (500, "failed"),
        (503, "failed"),
    ],
)
async def test_status_says_what_came_of_it(code: int, outcome: str) -> None:
    with Receiver(receivers.answering(receivers.status(code))) as receiver:
        answer = await post(receiver)
    assert (answer.outcome, answer.status) == (outcome, code)


async def test_redirect_is_not_followed() -> None:
    with Receiver() as inner:
        moved = receivers.status(307, f"Location: {inner.url()}", "Set-Cookie: a=b")
        with Receiver(receivers.answering(moved)) as receiver:
            line = Line(Guard(LOOPBACK, PORTS), NO_TLS)
            answers = [await line.post(parse(receiver.url()), {}, b"{}") for _ in range(2)]
            line.close()
            assert [(one.outcome, one.status) for one in answers] == [("redirected", 307)] * 2
            assert not any("cookie" in one.headers for one in receiver.received)
        assert inner.connections == 0


async def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with Receiver() as proxy, Receiver() as receiver:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert (await post(receiver)).outcome == "delivered"
        assert proxy.connections == 0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("100000", 3600.0),
        ("-1", 0.0),
        ("soon", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("9" * 99, 0.0),
    ],
)
async def test_retry_after_is_honoured_within_bounds(value: str, seconds: float) -> None:
    for code in (429, 503):
        with Receiver(receivers.answering(receivers.status(code, f"Retry-After: {value}"))) as receiver:
            assert (await post(receiver)).retry_after_seconds == seconds
    with Receiver(receivers.answering(receivers.status(500, f"Retry-After: {value}"))) as receiver:
        assert (await post(receiver)).retry_after_seconds == 0.0


async def test_receiver_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "TOTAL_SECONDS_MAX", 0.5)
    with receivers.hanging() as receiver:
        assert (await post(receiver)).outcome == "timeout"


async def test_receiver_that_drips_its_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte comes in time; the whole does not."""
    monkeypatch.setattr(sender, "TOTAL_SECONDS_MAX", 1.0)
    with receivers.dripping(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 10_000) as receiver:
        assert (await post(receiver)).outcome == "timeout"


async def test_receiver_that_drips_its_body_has_taken_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "BODY_SECONDS_MAX", 0.2)
    with Receiver() as receiver:

        def behave(connection, received):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\na")
            while receiver.pause(0.05):
                connection.sendall(b"a")

        receiver.behave = behave
        assert (await post(receiver)).outcome == "delivered"


@pytest.mark.parametrize(
    ("head", "outcome"),
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n", "delivered", id="gigabyte"),
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n", "delivered", id="endless"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1073741824\r\n\r\n\x1f\x8b",
            "delivered",
            id="gzip",
        ),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: ", "unreachable", id="endless header"),
        pytest.param(b"HTTP/1.1 ", "unreachable", id="endless status line"),
        pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n", "unreachable", id="not http"),
    ],
)
async def test_receiver_that_floods_is_read_a_little(head: bytes, outcome: str) -> None:
    taken = 0

    def flood(connection, received):
        nonlocal taken
        connection.sendall(head)
        for _ in range(4096):
            connection.sendall(bytes(256 * 1024))
            taken += 256 * 1024

    with Receiver(flood) as receiver:
        assert (await post(receiver)).outcome == outcome
    assert taken < 32 * 1024**2  # what fits into the sockets' buffers


async def test_receiver_that_never_comes_to_its_answer_is_given_up() -> None:
    """Endless interim answers, all of them allowed."""

    def flood(connection, received):
        while True:
            connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1024)

    with Receiver(flood) as receiver:
        assert (await post(receiver)).outcome == "unreachable"


async def test_answer_of_which_little_is_body_counts_as_a_whole() -> None:
    """Chunks may have extensions, which are nowhere to be seen in a body: 100 bytes in 400 kB here."""
    chunks = (b"1;" + b"a" * 4_000 + b"\r\nx\r\n") * 100 + b"0\r\n\r\n"
    long = receivers.answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    with Receiver(long) as receiver:
        line = Line(Guard(LOOPBACK, PORTS), NO_TLS)
        outcomes = [(await line.post(parse(receiver.url()), {}, b"{}")).outcome for _ in range(2)]
        line.close()
        assert outcomes == ["delivered"] * 2
        assert receiver.connections == 2  # one that is given up is not used again


async def test_receiver_that_is_not_there_or_closes_is_said_to_be() -> None:
    with Receiver(receivers.closing) as receiver:
        assert (await post(receiver)).outcome == "unreachable"
    assert (await post(receiver)).error == "no connection"


async def test_connection_that_was_closed_meanwhile_costs_no_delivery() -> None:
    """A server may close what is idle at any time, also while the next request is on its way."""

    def once(connection, received):
        connection.sendall(receivers.OK)
        connection.shutdown(socket.SHUT_RDWR)

    with Receiver(once) as receiver:
        line = Line(Guard(LOOPBACK, PORTS), NO_TLS)
        outcomes = [(await line.post(parse(receiver.url()), {}, b"{}")).outcome for _ in range(20)]
        line.close()
    assert outcomes == ["delivered"] * 20


# TLS


def certificate(directory: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server with this name, and of a client that trusts it alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    at = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - timedelta(days=1))
        .not_valid_after(at + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = serialization.PrivateFormat.PKCS8
    pem = key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption())
    path = directory / "server.pem"
    path.write_bytes(pem + made.public_bytes(serialization.Encoding.PEM))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cadata=made.public_bytes(serialization.Encoding.PEM).decode())


async def test_tls_is_checked_for_the_name_and_not_for_the_address(tmp_path: Path) -> None:
    server, client = certificate(tmp_path, "hooks.example")
    _, resolve = resolving([RECEIVERS_ADDRESS])
    with Receiver(tls=server) as receiver:
        line = Line(Guard(LOOPBACK, PORTS, resolve), client)
        good = await line.post(parse(receiver.url(host="hooks.example", scheme="https")), {}, b"{}")
        line.close()
        other = Line(Guard(LOOPBACK, PORTS, resolve), client)
        wrong = await other.post(parse(receiver.url(host="other.example", scheme="https")), {}, b"{}")
        other.close()
        trusting = Line(Guard(LOOPBACK, PORTS, resolve), sender.trusted_certificates())
        unknown = await trusting.post(parse(receiver.url(host="hooks.example", scheme="https")), {}, b"{}")
        trusting.close()
        assert [one.headers["host"] for one in receiver.received] == [f"hooks.example:{receiver.port}"]
    assert good.outcome == "delivered"
    assert (wrong.outcome, unknown.outcome) == ("tls", "tls")
    assert "other.example" in wrong.error
