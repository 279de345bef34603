"""Findings and their evidence as the store has them: from rows to answers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import duckdb
import msgspec
from msgspec import UNSET

from events.types import Quantity
from projections.analytics.rows import uuid_hex
from projections.asking_findings import (
    EvidenceFacts,
    EvidencePlace,
    FindingFacts,
    FindingsRequest,
)

_COLUMNS = """
f.finding_id, f.ledger_seq, f.recorded_at, f.rule, f.rule_version, f.mode, f.detected_at, f.first_at, f.last_at,
f.self_reported, f.token_id, f.grant_id, f.client_id, f.subject, f.caller, f.counts, f.parameters, f.evidence, f.status,
f.status_at, f.status_by,
(SELECT min(e.ledger_seq) FROM events e WHERE e.request_id = f.finding_id AND e.type LIKE '%.revoked/%') AS revoked_seq
"""
_EVIDENCE = {
    "use": """
SELECT u.block_seq, u.use_index, u.occurred_at, u.outcome, u.endpoint, u.caller, u.scope, o.ip, o.network, o.user_agent,
    u.reported
FROM uses u LEFT JOIN origins o USING (origin_no)
WHERE u.block_seq = ANY ($seqs)
""",
    "refused": """
SELECT block_seq, refused_index, minute AS occurred_at, outcome, endpoint, caller, ip, network, requests
FROM refused WHERE block_seq = ANY ($seqs)
""",
    "event": """
SELECT ledger_seq AS block_seq, 0 AS use_index, occurred_at, type, done_by AS caller
FROM events WHERE ledger_seq = ANY ($seqs)
""",
}


def findings_sql(request: FindingsRequest) -> tuple[str, list[Any]]:
    """One more than was asked for, if there are more."""
    conditions, parameters = ["f.ledger_seq < ?"], [request.before_seq]
    given: list[tuple[str, Any]] = [
        ("f.finding_id = ?", request.finding_id),
        ("f.rule = ?", request.rule),
        ("f.status = ?", request.status),
        ("f.client_id = ?", request.client_id),
        ("f.subject = ?", request.subject),
        ("f.token_id = ?::UUID", request.token_id and uuid_hex(request.token_id)),
        ("f.detected_at >= ?", request.from_ and _naive(request.from_)),
        ("f.detected_at < ?", request.to and _naive(request.to)),
    ]
    for condition, value in given:
        if value is not None:
            conditions.append(condition)
            parameters.append(value)
    sql = f"SELECT {_COLUMNS} FROM findings f WHERE {' AND '.join(conditions)} ORDER BY f.ledger_seq DESC LIMIT ?"  # noqa: S608 - constants
    return sql, [*parameters, request.limit + 1]


def finding_facts(row: tuple[Any, ...]) -> FindingFacts:
    """A row of `findings_sql`."""
    fields: dict[str, Any] = dict(zip(FindingFacts.__struct_fields__, row, strict=True))
    for name in ("recorded_at", "detected_at", "first_at", "last_at", "status_at"):
        fields[name] = fields[name] and fields[name].replace(tzinfo=UTC)
    fields["token_id"] = fields["token_id"] and f"tok_{fields['token_id'].hex}"
    fields["grant_id"] = fields["grant_id"] and f"grt_{fields['grant_id'].hex}"
    for name, kind in (("counts", list[Quantity]), ("parameters", list[Quantity]), ("evidence", list[EvidencePlace])):
        fields[name] = msgspec.json.decode(fields[name], type=kind)
    absent: Any = UNSET
    return FindingFacts(**{name: absent if value is None else value for name, value in fields.items()})


def evidence(cursor: duckdb.DuckDBPyConnection, places: list[EvidencePlace]) -> list[EvidenceFacts]:
    """What the store has at each place."""
    known: dict[tuple[str, int, int], dict[str, Any]] = {}
    for source, sql in _EVIDENCE.items():
        seqs = sorted({place.seq for place in places if place.source == source})
        if seqs:
            found = cursor.execute(sql, {"seqs": seqs})
            names = [column[0] for column in found.description or ()]
            for row in found.fetchall():
                known[source, row[0], row[1]] = dict(zip(names[2:], row[2:], strict=True))
    return [_facts(place, known.get((place.source, place.seq, place.index))) for place in places]


def _facts(place: EvidencePlace, row: dict[str, Any] | None) -> EvidenceFacts:
    members: dict[str, Any] = {name: value for name, value in (row or {}).items() if value not in {None, ""}}
    if "occurred_at" in members:
        members["occurred_at"] = members["occurred_at"].replace(tzinfo=UTC)
    return EvidenceFacts(source=place.source, seq=place.seq, index=place.index, kept=row is not None, **members)


def _naive(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
