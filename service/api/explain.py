"""`/v1/tokens/{token_id}/explain`: was this token good then, for this, and which events decided it?"""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, UnsetType

from service.api.routing import Call, operation
from service.api.tokens import AtQuery, find_past
from service.api.wire import Audience, ScopeText, audiences
from service.explanation import Explanation, explain
from service.parsing import ip_address
from service.rules.registry import check_audience, check_scope
from service.validation import Asked


class ExplainQuery(AtQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is left out is not checked; `at` that is left out is now. `ip`: where the token is used from."""

    scope: ScopeText = ""
    audience: Audience | UnsetType = UNSET
    ip: Annotated[str, Meta(min_length=2, max_length=45)] | UnsetType = UNSET


@operation(
    "GET",
    "/v1/tokens/{token_id}/explain",
    tag="tokens",
    needs=("ledger:audit",),
    query=ExplainQuery,
    answer=Explanation,
    errors=(404,),
)
async def explain_token(call: Call[None, ExplainQuery]) -> Explanation:
    """Explain whether a token was good at a time, for a scope and an audience, and which events decided it.

    The answer comes from the events that the ledger held then; `code` is what a validation would have said. All checks
    are listed in their order, and the first that did not pass gives the code. Before the issue it is 404.
    """
    asked = _asked(call.query)
    return explain(await find_past(call.runtime, call.name, call.query.at), asked)


def _asked(query: ExplainQuery) -> Asked:
    """Raises: InvalidRequest, InvalidScope."""
    ip = None if isinstance(query.ip, UnsetType) else ip_address(query.ip, "ip")
    audience = audiences(query.audience)
    check_audience(audience)
    return Asked(check_scope(query.scope, {}), audience, ip)
