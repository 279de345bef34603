"""What can be exported, and the SQL of it. Nothing of the caller stands in its text: values are bound."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from msgspec import Struct

from events.streams import LEDGER, USAGE
from projections.reading import ExportRequest


class Exported(Struct, frozen=True, kw_only=True):
    """A view, its time, and its number in a stream, None for what is added up; `filters`: column to condition."""

    view: str
    time: str
    sequence: str | None = None
    stream: str | None = None
    filters: tuple[str, ...] = ()


_OF_TOKENS = ("token_id", "client_id", "subject", "kind")
_OF_USES = ("outcome", "endpoint")
DATASETS: dict[str, Exported] = {
    "uses": Exported(
        view="uses_v1",
        time="recorded_at",
        sequence="block_seq",
        stream=USAGE,
        filters=(*_OF_TOKENS, *_OF_USES, "ip", "caller"),
    ),
    "events": Exported(
        view="events_v1",
        time="recorded_at",
        sequence="ledger_seq",
        stream=LEDGER,
        filters=("type", "subject", "client_id", "grant_id", "token_id"),
    ),
    "tokens": Exported(
        view="tokens_v1",
        time="issued_at",
        sequence="ledger_seq",
        stream=LEDGER,
        filters=(*_OF_TOKENS, "grant_id"),
    ),
    "findings": Exported(
        view="findings_v1",
        time="recorded_at",
        sequence="ledger_seq",
        stream=LEDGER,
        filters=("rule", "mode", "status", "token_id", "client_id", "subject"),
    ),
    "usage_minutes": Exported(view="usage_minutes_v1", time="minute", filters=("client_id", "kind", *_OF_USES)),
    "usage_hours": Exported(view="usage_hours_v1", time="hour", filters=("token_id", *_OF_USES, "ip")),
    "usage_days": Exported(view="usage_days_v1", time="day", filters=("token_id", *_OF_USES, "ip")),
    "refused": Exported(
        view="refused_v1",
        time="recorded_at",
        sequence="block_seq",
        stream=USAGE,
        filters=("caller", "ip", *_OF_USES),
    ),
    "gaps": Exported(view="gaps_v1", time="recorded_at", sequence="block_seq", stream=USAGE, filters=("writer",)),
}
_IN_LISTS = {("events", "token_id"): "list_contains(token_ids, $token_id)"}


def export_sql(request: ExportRequest) -> tuple[str, dict[str, Any]]:
    """The query, and what is bound in it, as JSON shows it. Raises: KeyError for a filter that is not the dataset's."""
    dataset = DATASETS[request.dataset]
    given: list[tuple[str, str, Any]] = [
        (f"{dataset.time} >= $from::TIMESTAMP", "from", request.from_ and _text(request.from_)),
        (f"{dataset.time} < $to::TIMESTAMP", "to", request.to and _text(request.to)),
        (f"{dataset.sequence} > $after_seq", "after_seq", request.after_seq),
        (f"{dataset.sequence} <= $until_seq", "until_seq", request.until_seq),
    ]
    for name, value in request.filters.items():
        if name not in dataset.filters:
            raise KeyError(name)
        given.append((_IN_LISTS.get((request.dataset, name), f"{name} = ${name}"), name, value))
    held = [(condition, name, value) for condition, name, value in given if value is not None]
    where = " WHERE " + " AND ".join(condition for condition, _, _ in held) if held else ""
    return f"SELECT * FROM {dataset.view}{where}", {name: value for _, name, value in held}  # noqa: S608 - constants


def _text(moment: datetime) -> str:
    """As DuckDB's TIMESTAMP, which has no zone: UTC."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat()
