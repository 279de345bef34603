"""`/v1/audit/backtests`: what a rule would have found, before it is switched on."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from projections.asking_findings import BacktestAnswer, BacktestClient, BacktestRequest
from service.api.analytics import ask_analytics
from service.api.audit import AUDIT
from service.api.routing import Call, operation
from service.api.wire import Id, Seq
from service.caller import ADMIN
from service.errors import InsufficientScope
from service.parsing import moment

DAYS_MAX = 400
SQL_CHARS_MAX = 20_000


class BacktestBody(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`set`: other values of parameters than the rule's defaults."""

    rule: Id
    sql: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=SQL_CHARS_MAX,
                description="A rule's whole file, head and SELECT, to be run instead. Needs ledger:admin.",
            ),
        ]
        | UnsetType
    ) = UNSET
    days: Annotated[int, Meta(ge=1, le=DAYS_MAX)] = 30
    to: (
        Annotated[str, Meta(min_length=1, max_length=40, description="RFC 3339; the last day, by default today.")]
        | UnsetType
    ) = UNSET
    set: Annotated[dict[str, float], Meta(max_length=32)] = {}


class BacktestView(Struct, frozen=True, kw_only=True, rename={"from_": "from"}):
    """A backtest. `found`: incidents; `revoked`: tokens and grants that mode `revoke` would have ended.

    `clients`: the same by client (`client_id` null: of none), compared with the findings that the ledger has of that
    time. True at `ledger_seq` of LEDGER and `usage_seq` of USAGE.
    """

    backtest_id: str
    rule: str
    rule_version: int
    parameters: dict[str, float]
    state: Literal["running", "done", "stopped", "failed"]
    from_: datetime
    to: datetime
    days: int
    days_done: int
    uses: int
    found: int
    revoked: int
    clients: list[BacktestClient]
    examples: list[dict[str, Any]]
    error: str | UnsetType = UNSET
    ledger_seq: Seq
    usage_seq: int


@operation("POST", "/v1/audit/backtests", tag="audit", needs=AUDIT, body=BacktestBody, answer=BacktestView, status=202)
async def begin_backtest(call: Call[BacktestBody, Any]) -> BacktestView:
    """Begin to run a rule over history, as it is or changed; nothing is recorded or revoked.

    One runs at a time. How far it is, and what it found, the backtest itself tells.
    """
    body = call.body
    if body.sql and not call.caller.holds(ADMIN):
        # It runs in the process that keeps the store, as the repository's own rules do.
        raise InsufficientScope("only an administrator may run a rule of their own", scope=ADMIN)
    asked = BacktestRequest(
        rule=body.rule,
        sql=body.sql or None,
        changes=[f"{name}={value:g}" for name, value in body.set.items()],
        days=body.days,
        until=None if isinstance(body.to, UnsetType) else moment(body.to, "to"),
    )
    return _view(await ask_analytics(call.runtime, asked, BacktestAnswer))


@operation("GET", "/v1/audit/backtests/{backtest_id}", tag="audit", needs=AUDIT, answer=BacktestView, errors=(404,))
async def show_backtest(call: Call[None, Any]) -> BacktestView:
    """Show how far a backtest is, and what it found."""
    return _view(await ask_analytics(call.runtime, BacktestRequest(backtest_id=call.name), BacktestAnswer))


@operation("DELETE", "/v1/audit/backtests/{backtest_id}", tag="audit", needs=AUDIT, answer=BacktestView, errors=(404,))
async def stop_backtest(call: Call[None, Any]) -> BacktestView:
    """Stop a backtest."""
    asked = BacktestRequest(backtest_id=call.name, stop=True)
    return _view(await ask_analytics(call.runtime, asked, BacktestAnswer))


def _view(answer: BacktestAnswer) -> BacktestView:
    members = {name: getattr(answer, name) for name in BacktestView.__struct_fields__}
    return BacktestView(**members | {"parameters": {one.quantity: one.value for one in answer.parameters}})
