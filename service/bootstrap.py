"""The first administrator: a service user whose SAT holds `ledger:admin`.

The file with the token is on disk before its event is appended, and every id is derived from the token, so that a
start that was interrupted anywhere is completed by the next.
"""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import structlog

from events.ledger import Append, Ledger
from events.streams import LEDGER, Connection, stream_state
from events.types import Kind, MintedToken, TokenIssued, UsernameClaimed, UserRegistered
from service.caller import ADMIN
from service.commands import subject
from service.grants import PERSONAL_TTL_SECONDS, timestamp, whole_second
from service.keys import MasterKey, SubjectKeys, write_private
from service.settings import Settings
from service.tokens import mint, now, sha256

log = structlog.get_logger()


def bootstrap_file(data_dir: Path) -> Path:
    """Where the command line finds the service and its administrator's token; mode 0600."""
    return data_dir / "bootstrap.json"


async def bootstrap(nc: Connection, settings: Settings, master: MasterKey) -> None:
    """Makes the administrator at the first start; later only brings the addresses in the file up to date.

    A ledger that holds events and whose file is gone gets no new administrator by itself: `token-ledger admin-token`
    is for that.
    """
    path = bootstrap_file(settings.data_dir)
    known = json.loads(path.read_bytes()) if path.exists() else None
    if known is None:
        if int((await stream_state(nc, LEDGER))["last_seq"]) > 0:
            log.warning("bootstrap_file_is_gone", path=str(path), fix="run `token-ledger admin-token` for a new one")
            return
        known = {"admin_token": mint("sat")}
    _write(settings, known["admin_token"])
    await _append_administrator(nc, master, known["admin_token"])


async def new_administrator(nc: Connection, settings: Settings, master: MasterKey) -> dict[str, Any]:
    """Another administrator, for who lost the token of the first; its token takes its place in the file."""
    token = mint("sat")
    path = bootstrap_file(settings.data_dir)
    if path.exists():
        # The running service knows its addresses better: flags of its own start are not known here.
        known = json.loads(path.read_bytes()) | {"admin_token": token}
        write_private(path, msgspec.json.format(msgspec.json.encode(known), indent=2) + b"\n")
    else:
        _write(settings, token)
    event = await _append_administrator(nc, master, token)
    return {
        "token": token,
        "token_id": event.tokens[0].token_id,
        "user_id": event.subject,
        "scope": event.scope,
        "expires_at": timestamp(event.tokens[0].expires_at),
    }


def _write(settings: Settings, token: str) -> None:
    host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host  # noqa: S104 - what is listened on
    host = f"[{host}]" if ":" in host else host
    content = {
        "issuer": settings.issuer,
        "api_url": f"http://{host}:{settings.port}",
        "nats_url": settings.nats_url,
        "admin_token": token,
    }
    path = bootstrap_file(settings.data_dir)
    data = msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"
    if not path.exists() or path.read_bytes() != data:
        write_private(path, data)


async def _append_administrator(nc: Connection, master: MasterKey, token: str) -> TokenIssued:
    def derived(what: str) -> str:
        # Behind the time 0, so that it sorts before all other ids: the view's tables grow at their end, and pages that
        # are written to in the middle stay half empty.
        return "0" * 12 + hashlib.sha256(f"{what} {sha256(token).hex()}".encode()).hexdigest()[:20]

    moment = now()
    user_id, grant_id, username = "usr_" + derived("user"), "grt_" + derived("grant"), "admin-" + derived("name")[12:20]
    issued = TokenIssued(
        id=derived("issued"),
        occurred_at=moment,
        by="system",
        grant_id=grant_id,
        subject=user_id,
        client_id=None,
        scope=ADMIN,
        audience=(),
        tokens=(
            MintedToken(
                token_id="tok_" + derived("token"),
                sha256=sha256(token).hex(),
                kind=Kind.SAT,
                scope=ADMIN,
                audience=(),
                expires_at=whole_second(moment + timedelta(seconds=PERSONAL_TTL_SECONDS)),
            ),
        ),
    )
    ledger = Ledger(nc)
    recorded = await ledger.read(subject("grant", grant_id))
    if recorded and isinstance(recorded[0].event, TokenIssued):
        return recorded[0].event
    profile = msgspec.json.encode({"username": username}).decode()
    registered = UserRegistered(
        id=derived("registered"),
        occurred_at=moment,
        by="system",
        user_id=user_id,
        kind="service",
        username_hash=master.username_hash(username),
        sealed_profile=await SubjectKeys(nc, master).seal(user_id, profile, "profile"),
        scope=ADMIN,
        password_hash=None,
    )
    claimed = UsernameClaimed(
        id=derived("claimed"),
        occurred_at=moment,
        by="system",
        username_hash=registered.username_hash,
        user_id=user_id,
    )
    await ledger.append(
        Append(subject("username", registered.username_hash), claimed, 0),
        Append(subject("user", user_id), registered, 0),
        Append(subject("grant", grant_id), issued, 0),
    )
    return issued
