"""`/v1/audit/export`: whole datasets as files, and the manifests by which their completeness can be shown.

An export is written to a file of this host before its first byte is sent. So it is complete, recorded and hashed by
then, its length is announced, and what broke off on the way cannot be taken for all of it; and no process ever holds
more than some of it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from events.types import AuditExported, AuditRead, RuleMode
from projections.asking_findings import FindingStatus
from projections.reading import (
    Dataset,
    ExportFormat,
    ExportRequest,
    ReadBegun,
    ReadEnded,
    ReadFailed,
    ReadRequest,
    read,
)
from projections.sandbox.exports import DATASETS
from service.api.audit import AUDIT
from service.api.routing import Call, Nothing, operation
from service.api.sql import CSV, refuse
from service.api.usage import Endpoint, Outcome
from service.api.wire import Id, Seq
from service.auditing import Statement, bound, exported, record_exported, record_reading
from service.errors import InvalidRequest, QueryTooHeavy, Unavailable
from service.outgoing import NO_STORE, FileResponse
from service.parsing import moment
from service.registry import subject_id
from service.runtime import Runtime
from service.tokens import now, uuid7_hex

_MEDIA_TYPES = {"parquet": "application/vnd.apache.parquet", "csv": CSV, "ndjson": "application/x-ndjson"}
_OPENED_SECONDS = 60.0  # by when the server has opened the file, and its name may go
_LEFT_SECONDS = 7_200.0  # a file that no process of the API can be writing any more
_AsOf = Annotated[str, Meta(min_length=1, max_length=40, description="RFC 3339, by the dataset's own time.")]
_Seq = Annotated[int, Meta(ge=0, le=2**63 - 1, description="In LEDGER; for `uses`, `refused`, `gaps` in USAGE.")]
_Value = Annotated[str, Meta(min_length=1, max_length=200)]


class ExportQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"from_": "from"}):
    """`from` inclusive, `to` exclusive; numbers after `after_seq` up to `until_seq`. All that is given must hold."""

    dataset: Dataset
    format: ExportFormat = "parquet"
    from_: _AsOf | UnsetType = UNSET
    to: _AsOf | UnsetType = UNSET
    after_seq: _Seq | UnsetType = UNSET
    until_seq: _Seq | UnsetType = UNSET
    token_id: Id | UnsetType = UNSET
    grant_id: Id | UnsetType = UNSET
    client_id: Id | UnsetType = UNSET
    subject: _Value | UnsetType = UNSET
    kind: Literal["access", "refresh", "pat", "sat"] | UnsetType = UNSET
    type: Annotated[_Value, Meta(description="Of events, as in `token.issued/1`.")] | UnsetType = UNSET
    outcome: Outcome | UnsetType = UNSET
    endpoint: Endpoint | UnsetType = UNSET
    ip: _Value | UnsetType = UNSET
    caller: _Value | UnsetType = UNSET
    rule: _Value | UnsetType = UNSET
    mode: RuleMode | UnsetType = UNSET
    status: FindingStatus | UnsetType = UNSET
    writer: _Value | UnsetType = UNSET


class Range(Struct, frozen=True):
    """The numbers of the first and the last row in the stream."""

    first: int
    last: int


class Manifest(Struct, frozen=True, kw_only=True):
    """What was exported. `complete` false: not everything was handed out, and the file is worth nothing.

    It holds every row that LEDGER had up to `ledger_seq` and USAGE up to `usage_seq` and that `sql` selects, with
    `parameters` bound in it. `sha256` is of the file's `size` bytes. `read_seq` and `completed_seq` are the ledger's
    events that say so. `parameters` is left out when the one who asked was erased.
    """

    export_id: str
    complete: bool
    dataset: str
    format: str
    by: str
    subject: str
    requested_at: datetime
    read_seq: Seq
    completed_at: datetime | UnsetType = UNSET
    completed_seq: Seq | UnsetType = UNSET
    sql: str | UnsetType = UNSET
    parameters: dict[str, Any] | UnsetType = UNSET
    rows: int | UnsetType = UNSET
    size: int | UnsetType = UNSET
    sha256: str | UnsetType = UNSET
    ledger_seq: Seq | UnsetType = UNSET
    usage_seq: int | UnsetType = UNSET
    ledger_range: Range | UnsetType = UNSET
    usage_range: Range | UnsetType = UNSET
    software: str | UnsetType = UNSET


@operation(
    "GET",
    "/v1/audit/export",
    tag="audit",
    needs=AUDIT,
    query=ExportQuery,
    answer=None,
    media_types=tuple(kind.partition(";")[0] for kind in _MEDIA_TYPES.values()),
)
async def export_audit(call: Call[None, ExportQuery]) -> FileResponse:
    """Export a dataset as a file.

    `X-Export-Id` names it; its manifest is at `/v1/audit/exports/{export_id}`. `Repr-Digest` (RFC 9530) and
    `Content-Length` are those of the whole file, which is complete and recorded when its first byte is sent.
    """
    request = _request(call.runtime, call.query)
    form = call.query.format
    reading = await record_reading(call.runtime, call.asker, Statement(export=request), form)
    path = _spool(call.runtime, reading.read_id)
    try:
        asked = ReadRequest(read_id=reading.read_id.removeprefix("exp_"), format=form, export=request)
        begun, ended, size, digest = await call.incoming.while_connected(_written(call.runtime, asked, path))
        event = AuditExported(
            id=uuid7_hex(),
            occurred_at=now(),
            by=call.asker.by,
            request_id=call.request_id,
            read_id=reading.read_id,
            rows=ended.rows,
            size=size,
            sha256=digest.hex(),
            statement=begun.statement,
            ledger_seq=begun.ledger_seq,
            usage_seq=begun.usage_seq,
            first_ledger_seq=ended.ledger_range[0],
            last_ledger_seq=ended.ledger_range[1],
            first_usage_seq=ended.usage_range[0],
            last_usage_seq=ended.usage_range[1],
            software=software(),
        )
        seq = await record_exported(call.runtime, event)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    # Once it is open its name is of no use.
    asyncio.get_running_loop().call_later(_OPENED_SECONDS, lambda: path.unlink(missing_ok=True))
    kept = tuple(header for header in NO_STORE if header[0] != "content-type")
    headers = (
        *kept,
        ("content-type", _MEDIA_TYPES[form]),
        ("content-disposition", f'attachment; filename="{request.dataset}-{reading.seq}.{form}"'),
        ("repr-digest", f"sha-256=:{base64.b64encode(digest).decode()}:"),
        ("x-export-id", reading.read_id),
        ("x-row-count", str(ended.rows)),
        ("x-ledger-seq", str(begun.ledger_seq)),
        ("x-usage-seq", str(begun.usage_seq)),
        ("x-completed-seq", str(seq)),
    )
    return FileResponse(200, path, size, headers)


def software() -> str:
    """What made the export."""
    try:
        return f"token-ledger {metadata.version('token-ledger')}"
    except metadata.PackageNotFoundError:  # run from its sources, not installed
        return "token-ledger 0"


def _request(runtime: Runtime, query: ExportQuery) -> ExportRequest:
    """Raises: InvalidRequest for what the dataset does not have."""
    dataset = DATASETS[query.dataset]
    given = {
        name: value
        for name in ExportQuery.__struct_fields__
        if name not in {"dataset", "format", "from_", "to", "after_seq", "until_seq"}
        and not isinstance(value := getattr(query, name), UnsetType)
    }
    for name in given:
        if name not in dataset.filters:
            raise InvalidRequest(
                f"{query.dataset} cannot be filtered by {name}", fix=f"filter by {', '.join(dataset.filters)}"
            )
    since = None if isinstance(query.from_, UnsetType) else moment(query.from_, "from")
    until = None if isinstance(query.to, UnsetType) else moment(query.to, "to")
    if since is not None and until is not None and since >= until:
        raise InvalidRequest("from must be before to", fix="give an earlier from")
    after = None if isinstance(query.after_seq, UnsetType) else query.after_seq
    last = None if isinstance(query.until_seq, UnsetType) else query.until_seq
    if dataset.sequence is None and (after is not None or last is not None):
        raise InvalidRequest(f"{query.dataset} has no sequence", fix="give from and to")
    if after is not None and last is not None and after >= last:
        raise InvalidRequest("after_seq must be less than until_seq", fix="give a lower after_seq")
    if "subject" in given:
        given["subject"] = subject_id(runtime, given["subject"]) or given["subject"]
    return ExportRequest(dataset=query.dataset, from_=since, to=until, after_seq=after, until_seq=last, filters=given)


def _spool(runtime: Runtime, export_id: str) -> Path:
    """The file of an export. What a killed worker left is removed."""
    directory = runtime.settings.data_dir / "exports"
    directory.mkdir(mode=0o700, exist_ok=True)
    for left in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                left.unlink()
    return directory / export_id


async def _written(runtime: Runtime, asked: ReadRequest, path: Path) -> tuple[ReadBegun, ReadEnded, int, bytes]:
    """The export in the file; its size and SHA-256. Raises: QueryTooHeavy, TooManyRequests, Unavailable."""
    begun: ReadBegun | None = None
    size, digest = 0, hashlib.sha256()
    most = runtime.settings.audit_export_bytes_max
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb", buffering=0) as file:

        def put(part: bytes) -> None:
            digest.update(part)
            file.write(part)

        try:
            async with contextlib.aclosing(read(runtime.nc, asked)) as answer:
                async for part in answer:
                    match part:
                        case ReadBegun():
                            begun = part
                        case ReadEnded():
                            assert begun is not None
                            return begun, part, size, digest.digest()
                        case _:
                            size += len(part)
                            if size > most:
                                text = f"the export is larger than {most:,} bytes"
                                raise QueryTooHeavy(text, fix="export a shorter range, or several")
                            await asyncio.to_thread(put, part)
        except ReadFailed as error:
            refuse(error)
        except OSError as error:
            raise Unavailable("there is no room for the export", private=str(error)) from error
    raise Unavailable("the export broke off")


@operation(
    "GET",
    "/v1/audit/exports/{export_id}",
    tag="audit",
    needs=AUDIT,
    query=Nothing,
    answer=Manifest,
    errors=(404,),
)
async def show_export(call: Call[None, Nothing]) -> Manifest:
    """Show the manifest of an export: what was asked for, and whether and with what it was completed."""
    asked, statement, done = await exported(call.runtime, call.name)
    wanted = asked.event
    assert isinstance(wanted, AuditRead)
    completed: dict[str, Any] = {}
    if done is not None and isinstance(event := done.event, AuditExported):
        completed = {
            "completed_at": done.recorded_at,
            "completed_seq": done.seq,
            "sql": event.statement,
            "rows": event.rows,
            "size": event.size,
            "sha256": event.sha256,
            "ledger_seq": event.ledger_seq,
            "usage_seq": event.usage_seq,
            "ledger_range": _range(event.first_ledger_seq, event.last_ledger_seq),
            "usage_range": _range(event.first_usage_seq, event.last_usage_seq),
            "software": event.software,
        }
    return Manifest(
        export_id=wanted.read_id,
        complete=bool(completed),
        dataset=wanted.dataset or "",
        format=wanted.format,
        by=wanted.by,
        subject=wanted.subject,
        requested_at=asked.recorded_at,
        read_seq=asked.seq,
        parameters=bound(statement) if statement is not None else UNSET,
        **completed,
    )


def _range(first: int | None, last: int | None) -> Range | UnsetType:
    return Range(first, last) if first is not None and last is not None else UNSET
