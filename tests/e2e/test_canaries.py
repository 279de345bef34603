"""No token, secret, password, username or display name stands readable in any file, log, stream or table.

The same search runs over what the whole session's service left behind, when it has been stopped (conftest.py).
"""

from __future__ import annotations

import base64
import stat
import zlib
from pathlib import Path
from typing import Any

import duckdb
import pytest

from tests import leaks, running
from tests.running import CANARY_NAME, CANARY_PASSWORD, CANARY_QUERY, CANARY_USERNAME, Service, unique, until

SPECIAL = "\u00e4 /+&?%"


def plant(service: Service) -> list[str]:
    """Everything secret or personal that a caller can hand over or get. Answers the secrets among it."""
    scope = service.scope()
    secrets: list[str] = [service.admin_token]
    password = unique(CANARY_PASSWORD) + SPECIAL
    user = service.user(
        username=unique(CANARY_USERNAME),
        display_name=unique(CANARY_NAME) + SPECIAL,
        email=unique(CANARY_NAME) + "@mail.example",
        password=password,
        scope=scope,
    )
    secrets.append(password)
    made = service.issue(user["user_id"], scope)
    rotated = service.done("POST", f"/v1/tokens/{made['token_id']}/rotate", json={"overlap_seconds": 60})
    app = service.app(grant_types=["client_credentials", "refresh_token"], access_token_format="jwt", scope=scope)
    new_secret = service.done("POST", f"/v1/clients/{app.client_id}/secrets", json={"overlap_seconds": 600})[
        "client_secret"
    ]
    first = service.grant(app)
    second = service.refresh(app, first["refresh_token"]).json()
    again = service.refresh(app, first["refresh_token"]).json()
    opaque = service.grant(service.app(scope=scope))
    secrets += [made["token"], rotated["token"], app.client_secret, new_secret]
    for answer in (first, second, again, opaque):
        secrets += [answer["access_token"], *([answer["refresh_token"]] if "refresh_token" in answer else [])]
    use(service, app, user, made, second)
    misuse(service, app, [made["token"], second["refresh_token"], first["access_token"], new_secret])
    service.done("POST", "/v1/tokens", json=token_request(user, scope), headers={"Idempotency-Key": unique("key")})
    subscriber = {"name": unique("subscriber"), "transport": "nats"}
    keyed = {"Idempotency-Key": unique("key")}
    secrets.append(service.done("POST", "/v1/subscribers", json=subscriber, headers=keyed)["nats_seed"])
    comment = {"reason": "compromised", "comment": unique(CANARY_NAME)}
    service.done("POST", f"/v1/tokens/{made['token_id']}/revoke", json=comment)
    service.done("PATCH", f"/v1/users/{user['user_id']}", json={"password": unique(CANARY_PASSWORD)})
    return secrets


def token_request(user: dict[str, Any], scope: str) -> dict[str, Any]:
    return {"kind": "pat", "subject": user["username"], "name": unique(CANARY_NAME), "scope": scope}


def use(service: Service, app: running.App, user: dict[str, Any], made: dict[str, Any], answer: dict[str, Any]) -> None:
    """Every way in which a token is presented as it should be."""
    service.validate(made["token"])
    service.done("POST", "/v1/tokens/validate-batch", json={"requests": [{"token": made["token"]}]})
    service.call("GET", "/v1/forward-auth", token=made["token"])
    service.introspect(app, answer["access_token"])
    service.introspect(app, answer["refresh_token"])
    service.done("GET", f"/v1/users/{user['user_id']}")
    service.done("POST", "/v1/revocations", json={"token": answer["access_token"], "reason": "admin"})
    service.done("POST", "/v1/revocations", json={"subject": user["username"], "reason": "admin", "dry_run": True})


def misuse(service: Service, app: running.App, secrets: list[str]) -> None:
    """And every way in which it is put where it should not be: query, path, wrong field, broken body."""
    for secret in secrets:
        service.call("GET", f"/v1/clients?access_token={secret}", token=None)
        service.call("GET", f"/v1/tokens/{secret}")
        service.call("GET", f"/v1/tokens/{secret}/history")
        service.validate(secret, context={"path": f"/a/{secret}?b={secret}", "user_agent": secret})
        service.call("GET", "/v1/tokens", params={"subject": secret})
        service.call("POST", "/v1/tokens", json={"kind": secret, "subject": secret, "name": "x", "scope": secret})
        service.call("POST", "/v1/scopes", json={"name": secret + " ", "description": "x"})
        service.call("POST", "/v1/tokens/validate", content=b'{"token": "' + secret.encode())
        service.call("GET", "/v1/clients", token=secret + "x")
        service.http.post("/oauth2/token", data={"grant_type": secret}, auth=app.basic)
        service.http.post("/oauth2/token", data={"grant_type": "client_credentials"}, auth=(secret, secret))
        service.http.post(f"/oauth2/token?client_secret={secret}", data={"grant_type": "client_credentials"})
        service.http.get(f"/oauth2/introspect?token={secret}")
        service.http.get(f"/{secret}", headers={"User-Agent": CANARY_QUERY, "Referer": f"http://x/?{secret}"})
        service.raw(b"GET /" + secret.encode() + b"\xff HTTP/1.1\r\nHost: x\r\n\r\n")
        service.raw(b"BROKEN " + secret.encode() + b"\r\n\r\n")


def read_back(service: Service) -> None:
    """Lists and metrics are asked for, so that caches hold what they will hold."""
    for path in ("/v1/clients", "/v1/users", "/v1/scopes", "/v1/tokens", "/v1/audit/events"):
        list(service.items(path))


def test_planted_canaries_are_readable_nowhere(tmp_path: Path) -> None:
    service = running.start(tmp_path)
    try:
        secrets = plant(service)
        read_back(service)
        metrics = service.http.get("/metrics").text
        log_before_stop = service.log_path.read_text()
        for process in service.tree():
            assert not any(secret in process.command_line for secret in secrets)
        events = "".join(str(one) for one in service.items("/v1/audit/events", limit=1000))
    finally:
        service.stop()
    assert not any(secret in text for secret in secrets for text in (metrics, log_before_stop, events))
    assert "password_hash" not in events
    assert "$argon2" not in events
    assert not any(prefix in metrics for prefix in ("cli_", "usr_", "tok_", "grt_"))
    assert leaks.search_service(service, *secrets) == []
    key = (service.data_dir / "master.key").read_bytes().strip()
    for form in {key, key.rstrip(b"=")}:
        holders = [path.name for path in files(service.data_dir) if form in path.read_bytes()]
        assert holders == ["master.key"]


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def test_files_with_secrets_are_the_owners_alone(service: Service) -> None:
    private = [
        path
        for path in files(service.data_dir)
        if path.name in {"bootstrap.json", "master.key"} or path.suffix in {".nk", ".creds", ".key"}
    ]
    assert {"bootstrap.json", "master.key"} <= {path.name for path in private}
    assert any(path.suffix == ".nk" for path in private)
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in private}
    assert set(modes.values()) == {0o600}, modes
    others = [str(path) for path in files(service.data_dir) if path.stat().st_mode & 0o007]
    readable = stat.S_IMODE(service.data_dir.stat().st_mode) & 0o077
    assert not others or not readable, others[:10]


def test_metrics_name_no_client_subject_or_token(service: Service) -> None:
    service.validate(service.pat()["token"])
    text = service.http.get("/metrics").text
    assert text.startswith("# HELP")
    for prefix in ("cli_", "usr_", "tok_", "grt_", "tl_"):
        assert f'"{prefix}' not in text


def encodings(word: str) -> dict[str, bytes]:
    raw = word.encode()
    return {
        "raw": b"x" + raw + b"y",
        "hex": raw.hex().encode(),
        "upper hex": raw.hex().upper().encode(),
        "base64": base64.b64encode(raw),
        "base64, one byte in": base64.b64encode(b"1" + raw + b"tail"),
        "base64, two bytes in": base64.urlsafe_b64encode(b"12" + raw + b"tail"),
        "percent": "".join(f"%{byte:02X}" for byte in raw).encode(),
        "utf-16": word.encode("utf-16-le"),
    }


@pytest.mark.parametrize("word", [*running.CANARIES, "tl_pat_" + "a" * 49, "tl_cs_" + "9" * 49])
def test_search_finds_what_is_hidden(tmp_path: Path, word: str) -> None:
    """The search itself: each encoding of each canary, and a row of a compressed table."""
    for name, data in encodings(word).items():
        directory = tmp_path / name
        directory.mkdir()
        (directory / "file").write_bytes(bytes(10_000) + data)
        assert leaks.search_files(directory), name
    with duckdb.connect(str(tmp_path / "store.duckdb")) as database:
        database.execute("create table t as select 'harmless ' || range::varchar as a from range(10000)")
        database.execute("insert into t select ? from range(1000)", [f"x{word}y"])
    assert any("(rows)" in found for found in leaks.search_files(tmp_path) if "store.duckdb" in found)
    assert leaks.search_bytes(zlib.compress(b"harmless"), "", leaks._pattern()) == []


def test_history_becomes_readable_to_auditors_without_secrets(service: Service) -> None:
    made = service.pat()
    service.validate(made["token"])
    events = until(lambda: service.history(made["token_id"], uses="true"))
    assert made["token"] not in str(events)
