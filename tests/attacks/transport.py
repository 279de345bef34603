"""Transport and parsing: what all form endpoints do with requests that are not what they should be."""

from __future__ import annotations

import gzip
import socket
import time

from tests.attacks.table import CREDENTIALS, ODD, Stage, attack, basic, bearer, form, variants
from tests.running import CANARY_QUERY, FORM, oauth_error, raw_request, unique

FORM_ENDPOINTS = {
    "token": "/oauth2/token",
    "introspect": "/oauth2/introspect",
    "revoke": "/oauth2/revoke",
}


@variants("1", "RFC 6749 §3.2; RFC 9110 §15.5.6", **FORM_ENDPOINTS)
def get_is_refused(stage: Stage, path: str) -> None:
    """That the query is in no log is seen at the end of the session, when all files are searched."""
    answer = stage.service.raw_call("GET", f"{path}?{CREDENTIALS}&client_secret={CANARY_QUERY}")
    assert answer.status_code == 405
    assert "POST" in {method.strip() for method in answer.headers["allow"].split(",")}


@variants("2", "RFC 6749 §2.3.1: credentials MUST NOT be included in the request URI", **FORM_ENDPOINTS)
def secret_in_query_is_refused(stage: Stage, path: str) -> None:
    target = f"{path}?client_id={stage.app.client_id}&client_secret={CANARY_QUERY}"
    oauth_error(stage.post(target, f"{CREDENTIALS}&token=x"), 400, "invalid_request")


@variants("4", "P, RFC 6749 §4.4.2 (form encoding)", **FORM_ENDPOINTS)
def missing_content_type_is_refused(stage: Stage, path: str) -> None:
    answer = stage.post(path, f"{CREDENTIALS}&token=x", basic(*stage.app.basic), ("Content-Type", ""))
    oauth_error(answer, 400, "invalid_request")


@variants(
    "5",
    "P, RFC 6749 §4.4.2 (form encoding)",
    multipart="multipart/form-data; boundary=x",
    json="application/json",
    text="text/plain",
    prefix=f"{FORM}ish",
    empty=" ",
)
def other_content_type_is_refused(stage: Stage, content_type: str) -> None:
    answer = stage.token(stage.app, CREDENTIALS, ("Content-Type", content_type))
    oauth_error(answer, 400, "invalid_request")


@attack("5", "P, RFC 6749 §4.4.2 (form encoding)")
def multipart_body_is_refused(stage: Stage) -> None:
    body = '--x\r\nContent-Disposition: form-data; name="grant_type"\r\n\r\nclient_credentials\r\n--x--\r\n'
    answer = stage.token(stage.app, body, ("Content-Type", "multipart/form-data; boundary=x"))
    oauth_error(answer, 400, "invalid_request")


@variants(
    "7",
    "P, URL Standard §5 (forms are UTF-8)",
    utf_16=("utf-16", CREDENTIALS.encode("utf-16-le")),
    utf_16_label_only=("utf-16", CREDENTIALS.encode()),
    utf_7=("utf-7", CREDENTIALS.encode()),
    unknown=("no-such-charset", CREDENTIALS.encode()),
)
def other_charset_is_refused(stage: Stage, sent: tuple[str, bytes]) -> None:
    charset, body = sent
    answer = stage.token(stage.app, body, ("Content-Type", f"{FORM}; charset={charset}"))
    oauth_error(answer, 400, "invalid_request")


@variants("7", "P, URL Standard §5 (positive control)", plain="charset=utf-8", quoted='charset="UTF-8"')
def utf_8_is_accepted(stage: Stage, parameter: str) -> None:
    answer = stage.token(stage.app, CREDENTIALS, ("Content-Type", f"{FORM}; {parameter}"))
    assert answer.status_code == 200


@variants(
    "7",
    "P, URL Standard §5 (forms are UTF-8)",
    overlong=b"scope=%c0%af",
    lone_byte=b"scope=%ff",
    surrogate=b"scope=%ed%a0%80",
    raw_byte=b"scope=\xff",
)
def broken_utf_8_is_refused(stage: Stage, parameter: bytes) -> None:
    oauth_error(stage.token(stage.app, CREDENTIALS.encode() + b"&" + parameter), 400, "invalid_request")


@variants(
    "8",
    "RFC 6749 §3.2: parameters MUST NOT be included more than once",
    grant_type=f"{CREDENTIALS}&{CREDENTIALS}",
    encoded_name=f"{CREDENTIALS}&grant%5Ftype=client_credentials",
    scope=f"{CREDENTIALS}&scope=a&scope=a",
    empty_first=f"{CREDENTIALS}&scope=&scope=a",
    client_id=f"{CREDENTIALS}&client_id=a&client_id=a",
)
def repeated_parameter_is_refused(stage: Stage, body: str) -> None:
    oauth_error(stage.token(stage.app, body), 400, "invalid_request")


@attack("10", "RFC 8707 §2: resource may be repeated (positive control)")
def repeated_resource_is_accepted(stage: Stage) -> None:
    audience = ["https://one.example", "https://two.example"]
    app = stage.new_app(audience=audience)
    body = CREDENTIALS + "".join("&" + form(resource=one) for one in audience)
    assert stage.token(app, body).status_code == 200


@variants("11", "P, RFC 6749 §3.2", same="client_credentials", other="refresh_token")
def parameter_in_query_and_body_is_refused(stage: Stage, value: str) -> None:
    target = f"/oauth2/token?grant_type={value}"
    oauth_error(stage.post(target, CREDENTIALS, basic(*stage.app.basic)), 400, "invalid_request")


@attack("13", "RFC 6749 §3.2: MUST ignore unrecognized request parameters")
def unknown_parameter_is_ignored(stage: Stage) -> None:
    assert stage.token(stage.app, f"{CREDENTIALS}&foo=bar").status_code == 200


@attack("13", "RFC 6749 §3.2: parameters without a value MUST be treated as omitted")
def empty_parameter_is_omitted(stage: Stage) -> None:
    answer = stage.token(stage.app, f"{CREDENTIALS}&scope=")
    assert answer.status_code == 200
    assert set(answer.json()["scope"].split()) == {stage.read, stage.write}


@variants("14", "RFC 6749 §5.2", absent="scope=a", empty="grant_type=", nothing="")
def missing_grant_type_is_refused(stage: Stage, body: str) -> None:
    oauth_error(stage.token(stage.app, body), 400, "invalid_request")


@variants("16", "RFC 9700 §2.4: the password grant MUST NOT be used", password="password", unknown="made-up")
def other_grant_type_is_refused(stage: Stage, grant_type: str) -> None:
    body = form(grant_type=grant_type, username="a", password="b")
    oauth_error(stage.token(stage.app, body), 400, "unsupported_grant_type")


@attack("17", "RFC 6749 §5.2: unauthorized_client")
def grant_not_allowed_for_client_is_refused(stage: Stage) -> None:
    app = stage.new_app(grant_types=["client_credentials"])
    token = stage.refreshable()["refresh_token"]
    body = form(grant_type="refresh_token", refresh_token=token)
    oauth_error(stage.token(app, body), 400, "unauthorized_client")


@variants(
    "19",
    "P, CWE-407",
    names="&".join(f"p{number}=1" for number in range(10_000)),
    same_name="&".join(["p=1"] * 10_000),
    separators="&" * 60_000,
    escapes="p=" + "%41" * 20_000,
)
def ten_thousand_parameters_are_refused_fast(stage: Stage, body: str) -> None:
    """The fastest of five counts: the machine may be busy, the parser may not."""
    answers = [stage.token(stage.app, body) for _ in range(5)]
    assert {answer.status_code for answer in answers} <= {400, 413}
    assert min(answer.seconds for answer in answers) < 0.05


@attack("19", "P, CWE-400")
def huge_body_is_refused_unread(stage: Stage) -> None:
    head = raw_request(
        "POST",
        "/oauth2/token",
        [("Content-Type", FORM), basic(*stage.app.basic), ("Content-Length", str(10**12))],
        host="127.0.0.1",
    )
    assert stage.service.raw(head + CREDENTIALS.encode()).status_code == 413


@attack("19", "P, CWE-400")
def chunked_body_without_end_is_cut(stage: Stage) -> None:
    head = raw_request(
        "POST",
        "/oauth2/token",
        [("Content-Type", FORM), basic(*stage.app.basic), ("Transfer-Encoding", "chunked")],
        host="127.0.0.1",
    )
    chunk = b"ffff\r\n" + b"a" * 0xFFFF + b"\r\n"
    assert stage.service.raw(head + chunk * 8).status_code in {400, 413}


@attack("19", "P, CWE-400")
def chunked_body_that_is_cut_off_has_no_effect(stage: Stage) -> None:
    """All parameters have arrived, and whether more would have come nobody knows."""
    headers = [("Content-Type", FORM), basic(*stage.app.basic), ("Transfer-Encoding", "chunked")]
    head = raw_request("POST", "/oauth2/token", headers, host="127.0.0.1")
    chunk = f"{len(CREDENTIALS):x}\r\n{CREDENTIALS}\r\n".encode()
    assert stage.service.raw(head + chunk + b"0\r\n\r\n").status_code == 200
    with socket.create_connection(("127.0.0.1", stage.service.port), timeout=10) as cut:
        cut.sendall(head + chunk)
        cut.shutdown(socket.SHUT_WR)
        answer = cut.recv(65_536)
    assert b" 200 " not in answer.split(b"\r\n")[0]
    assert b"access_token" not in answer


@variants(
    "24",
    "P, RFC 9110 §5.5",
    beside=["10.1.1.1", b"\xff, 192.0.2.9"],
    before=[b"\xff, 192.0.2.9", "10.1.1.1, 192.0.2.9"],
    alone=[b"\xff, 192.0.2.9"],
    two=["10.1.1.1", "192.0.2.9"],
)
def address_that_a_proxy_appended_cannot_be_hidden(stage: Stage, forwarded: list[str | bytes]) -> None:
    service = stage.odd.service  # trusts the proxy at 127.0.0.1
    token = service.pat(allowed_ips=["10.0.0.0/8", "127.0.0.0/8"])["token"]

    def asked(values: list[str | bytes]) -> int:
        lines = [("X-Forwarded-For", value) for value in values]
        return service.raw_call("GET", "/v1/forward-auth", [bearer(token), *lines]).status_code

    assert asked(["192.0.2.9, 10.1.1.1"]) == 200
    assert asked(forwarded) == 401


@attack("20", "P, CWE-400")
def slow_body_is_cut_and_harms_nobody(stage: Stage) -> None:
    """One byte a second. The other requests are made between two bytes."""
    seconds_max = ODD["request_seconds_max"]
    service = stage.odd.service
    head = raw_request("POST", "/oauth2/token", [("Content-Type", FORM), ("Content-Length", "60")], host="x")
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", service.port), timeout=1.0) as slow:
        slow.sendall(head)
        answer = None
        while answer is None and time.monotonic() - started < seconds_max + 5:
            assert service.http.get("/health/live").elapsed.total_seconds() < 1
            try:
                slow.sendall(b"a")
                answer = slow.recv(65_536)
            except TimeoutError:
                continue
            except ConnectionError:
                answer = b""
    assert answer is not None, "still open"
    assert answer == b"" or answer.startswith((b"HTTP/1.1 408", b"HTTP/1.1 400")), answer
    assert time.monotonic() - started < seconds_max + 3


CONTROLS = {
    "nul": "%00",
    "cr": "%0d",
    "lf": "%0a",
    "tab": "%09",
    "quote": "%22",
    "backslash": "%5c",
    "delete": "%7f",
    "non_ascii": "%c3%a4",
}


@variants("22", "RFC 6749 Appendix A.4, §5.2", **CONTROLS)
def control_character_in_scope_is_refused(stage: Stage, character: str) -> None:
    oauth_error(stage.token(stage.app, f"{CREDENTIALS}&scope=a{character}b"), 400, "invalid_scope")


@variants("22", "RFC 6749 Appendix A.1, §5.2", **CONTROLS)
def control_character_in_client_id_is_refused(stage: Stage, character: str) -> None:
    """VSCHAR allows the quote and the backslash: such a client is merely unknown."""
    answer = stage.token(None, f"{CREDENTIALS}&client_id=a{character}b&client_secret=x")
    assert answer.status_code in {400, 401}
    oauth_error(answer, answer.status_code, {400: "invalid_request", 401: "invalid_client"}[answer.status_code])


@variants("22", "RFC 6749 §5.2", **CONTROLS)
def control_character_in_grant_type_is_not_echoed(stage: Stage, character: str) -> None:
    answer = stage.token(stage.app, f"grant_type=a{character}b")
    assert answer.status_code == 400
    oauth_error(answer, 400, answer.json()["error"])


@variants(
    "23",
    "RFC 6749 Appendix A.1; no normalisation",
    cyrillic=lambda name: name.replace("c", "\u0441", 1),
    full_width=lambda name: name.replace("c", "\uff43", 1),
    upper_case=str.upper,
    trailing_space=lambda name: name + " ",
    leading_space=lambda name: " " + name,
    zero_width=lambda name: name + "\u200b",
)
def look_alike_client_id_is_unknown(stage: Stage, alike) -> None:
    app = stage.new_app(token_endpoint_auth_method="client_secret_post")
    parameters = {"grant_type": "client_credentials", "client_secret": app.client_secret}
    right = stage.token(None, form(client_id=app.client_id, **parameters))
    assert right.status_code == 200
    wrong = stage.token(None, form(client_id=alike(app.client_id), **parameters))
    oauth_error(wrong, 401, "invalid_client")


@variants("25", "P, CWE-409", gzip="gzip", deflate="deflate", identity_list="identity, gzip")
def compressed_body_is_not_inflated(stage: Stage, encoding: str) -> None:
    body = gzip.compress(CREDENTIALS.encode() + b"&p=" + b"a" * 20_000_000)
    answer = stage.token(stage.app, body, ("Content-Encoding", encoding))
    assert answer.status_code in {400, 415}
    assert answer.seconds < 1


@variants(
    "26",
    "RFC 9700 §4.13; RFC 8414 §3.3",
    host=[("Host", "evil.example")],
    host_with_port=[("Host", "evil.example:8080")],
    forwarded_host=[("X-Forwarded-Host", "evil.example")],
    forwarded=[("Forwarded", "host=evil.example;proto=https")],
    forwarded_proto=[("X-Forwarded-Proto", "https"), ("X-Forwarded-Port", "1")],
)
def forged_host_changes_no_issuer(stage: Stage, headers: list[tuple[str, str]]) -> None:
    """The list allows a 400 for a forged Host; a service that never reads it need not refuse."""
    answer = stage.service.raw_call("GET", "/.well-known/oauth-authorization-server", headers)
    if answer.status_code == 400:
        return
    assert answer.status_code == 200
    assert b"evil" not in answer.content
    assert answer.json()["issuer"] == stage.service.issuer
    assert all("evil" not in value for value in answer.headers.values())


FORGED_IDENTITY = [
    ("X-SSL-Client-Cert", "MIIB"),
    ("X-Client-Cert", ":MIIB:"),
    ("Client-Cert", ":MIIB:"),
    ("X-Forwarded-User", "admin"),
    ("Remote-User", "admin"),
    ("X-Token-Subject", "admin"),
    ("X-Token-Scope", "ledger:admin"),
    ("X-SSL-Client-Verify", "SUCCESS"),
]


@variants("28", "RFC 9700 §4.13", **{name: (name, value) for name, value in FORGED_IDENTITY})
def forged_identity_header_is_ignored(stage: Stage, header: tuple[str, str]) -> None:
    assert stage.service.raw_call("GET", "/v1/clients", [header]).status_code == 401
    assert stage.service.raw_call("GET", "/v1/forward-auth", [header]).status_code == 401


@variants("28", "RFC 9700 §4.13", x_forwarded_for="X-Forwarded-For", x_real_ip="X-Real-IP", forwarded="Forwarded")
def forged_address_is_ignored(stage: Stage, header: str) -> None:
    """A token that is bound to a network may not be used from here by a header that says so."""
    user = stage.service.user(kind="service", scope="ledger:clients")
    more = {"kind": "sat", "allowed_ips": ["192.0.2.0/24"]}
    token = stage.service.issue(user["user_id"], "ledger:clients", **more)["token"]
    value = "for=192.0.2.1" if header == "Forwarded" else "192.0.2.1"
    answer = stage.service.raw_call("GET", "/v1/clients", [bearer(token), (header, value)])
    assert answer.status_code == 401


FORWARDED = {
    "one": ("192.0.2.1", 200),
    "forged_first": ("198.51.100.1, 192.0.2.1", 200),
    "forged_bound": ("192.0.2.1, 198.51.100.1", 401),
    "through_two_of_ours": ("192.0.2.1, 127.0.0.1", 200),
    "garbage": ("garbage", 401),
    "garbage_last": ("192.0.2.1, garbage", 401),
    "with_port": ("192.0.2.1:80", 401),
    "empty": ("", 401),
    "nothing_between": ("192.0.2.1,,", 401),
    "mapped": ("::ffff:192.0.2.1", 200),
    "long": ("1.1.1.1, " * 500 + "198.51.100.1", 401),
}


@variants("28", "P, RFC 9700 §4.13: from a trusted proxy, the last address that is not ours", **FORWARDED)
def forwarded_address_is_read_from_the_right(stage: Stage, case: tuple[str, int]) -> None:
    value, status = case
    service = stage.odd.service
    user = service.user(kind="service", scope="ledger:clients")
    token = service.issue(user["user_id"], "ledger:clients", kind="sat", allowed_ips=["192.0.2.0/24"])["token"]
    answer = service.raw_call("GET", "/v1/clients?limit=1", [bearer(token), ("X-Forwarded-For", value)])
    assert answer.status_code == status


NOISE = {
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "http_2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "nul": b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n",
    "folded": b"GET /v1/clients HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a\r\n b\r\nConnection: close\r\n\r\n",
    "no_name": b"GET / HTTP/1.1\r\n: x\r\n\r\n",
    "space_in_name": b"GET / HTTP/1.1\r\nHo st: x\r\n\r\n",
    "bare_line_feed": b"GET /v1/clients HTTP/1.1\nHost: x\nConnection: close\n\n",
    "many_headers": b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 2_000 + b"\r\n",
    "version": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "method": b"A" * 5_000 + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
    "negative_length": b"POST /oauth2/token HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "huge_length": b"POST /oauth2/token HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n",
    "bad_chunk": b"POST /oauth2/token HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "absolute": b"GET http://evil.example/v1/clients HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "authority": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "star": b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "dots": b"GET /v1/../v1/clients HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "double_slash": b"GET //v1//clients HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
}


@variants("29", "P, RFC 9112 §3, §5", **NOISE)
def noise_is_refused_or_hung_up_on(stage: Stage, data: bytes) -> None:
    answer = stage.service.raw(data)
    assert answer.status_code == 0 or 400 <= answer.status_code < 500 or answer.status_code in {501, 505}
    assert stage.service.http.get("/health/live").status_code == 200


@attack("29", "P, RFC 9110 §5.3")
def two_authorization_headers_are_refused_by_forms(stage: Stage) -> None:
    credentials = basic(*stage.app.basic)
    oauth_error(stage.token(None, CREDENTIALS, credentials, credentials), 400, "invalid_request")


@attack("29", "P, RFC 9110 §5.3")
def two_authorization_headers_are_refused_by_the_api(stage: Stage) -> None:
    header = bearer(stage.service.admin_token)
    assert stage.service.raw_call("GET", "/v1/clients", [header, header]).status_code == 400


@variants(
    "29",
    "RFC 9112 §6.1: framing that two readers read differently",
    both=[("Content-Length", "5"), ("Transfer-Encoding", "chunked")],
    two_lengths=[("Content-Length", "29"), ("Content-Length", "5")],
    obscured=[("Transfer-Encoding", "xchunked")],
)
def ambiguous_framing_smuggles_nothing(stage: Stage, headers: list[tuple[str, str]]) -> None:
    """Whatever the answer, a second request hidden behind the first is never answered as one of its own."""
    hidden = unique("/hidden")
    body = f"0\r\n\r\nGET {hidden} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    data = raw_request("POST", "/oauth2/token", [("Content-Type", FORM), *headers], body, host="x")
    answer = stage.service.raw(data)
    assert answer.status_code in {0, 400, 401, 411, 501}
