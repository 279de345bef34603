"""Reading the audit trail is an event: recorded before a row of it is handed out, or there are no rows."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec
from msgspec import Struct

from events.errors import LedgerError
from events.ledger import Append
from events.types import AuditExported, AuditRead, Recorded
from projections.reading import ExportRequest
from projections.sandbox.exports import export_sql
from service.commands import refused, subject
from service.errors import NotFound
from service.registry import Asker, read_sealed
from service.runtime import Runtime
from service.tokens import now, uuid7_hex

_STATEMENT = "statement"
_EXPORT_ID = re.compile(r"exp_[0-9a-f]{32}")


class Statement(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was asked for: SQL, or an export. Sealed, since addresses and names may stand in it."""

    sql: str | None = None
    parameters: list[Any] | dict[str, Any] | None = None
    limit: int | None = None
    export: ExportRequest | None = None


class Reading(Struct, frozen=True):
    """A reading that stands in the ledger at `seq`."""

    read_id: str
    seq: int


async def record_reading(runtime: Runtime, asker: Asker, statement: Statement, form: Any) -> Reading:
    """Records that somebody asks for this. Raises: Unavailable; then nothing may be read."""
    caller = asker.caller
    assert caller is not None
    export = statement.export
    read_id = f"{'qry' if export is None else 'exp'}_{uuid7_hex()}"
    text = msgspec.json.encode(statement)
    try:
        event = AuditRead(
            id=uuid7_hex(),
            occurred_at=now(),
            by=asker.by,
            request_id=asker.request_id,
            read_id=read_id,
            subject=caller.subject,
            client_id=caller.client_id,
            what="query" if export is None else "export",
            dataset=export.dataset if export is not None else None,
            format=form,
            statement_sha256=hashlib.sha256(text).hexdigest(),
            sealed_statement=await runtime.subject_keys.seal(caller.subject, text.decode(), _STATEMENT),
        )
        of = subject("audit", caller.subject) if export is None else subject("export", read_id)
        (seq,) = await runtime.ledger.append(Append(of, event))
    except LedgerError as error:
        raise refused(error) from error
    return Reading(read_id, seq)


async def record_exported(runtime: Runtime, event: AuditExported) -> int:
    """Records that an export is complete. Raises: Unavailable."""
    try:
        (seq,) = await runtime.ledger.append(Append(subject("export", event.read_id), event))
    except LedgerError as error:
        raise refused(error) from error
    return seq


async def exported(runtime: Runtime, export_id: str) -> tuple[Recorded, Statement | None, Recorded | None]:
    """An export as it was asked for, what for (None once the one who asked was erased), and as it was completed.

    Raises: NotFound, Unavailable.
    """
    if not _EXPORT_ID.fullmatch(export_id):
        raise NotFound("there is no such export")
    try:
        events = await runtime.ledger.read(subject("export", export_id))
    except LedgerError as error:
        raise refused(error) from error
    asked = next((one for one in events if isinstance(one.event, AuditRead)), None)
    if asked is None:
        raise NotFound("there is no such export")
    assert isinstance(asked.event, AuditRead)
    text = await read_sealed(runtime, asked.event.subject, asked.event.sealed_statement, _STATEMENT)
    statement = msgspec.json.decode(text, type=Statement) if text is not None else None
    done = next((one for one in events if isinstance(one.event, AuditExported)), None)
    return asked, statement, done


def bound(statement: Statement) -> dict[str, Any]:
    """What was bound in the SQL of an export."""
    assert statement.export is not None
    return export_sql(statement.export)[1]
