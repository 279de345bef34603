"""How the analytics process is asked, and what its refusals mean to a caller of the API."""

from __future__ import annotations

from typing import TypeVar

from msgspec import Struct

from projections.asking import AnalyticsRefused, TokenAnswer, TokenFacts, TokenRequest, ask
from service.errors import InvalidRequest, NotFound, ServiceError, Unavailable
from service.runtime import Runtime

A = TypeVar("A", bound=Struct)


async def ask_analytics(runtime: Runtime, request: Struct, answer: type[A]) -> A:
    """Raises: InvalidRequest, NotFound, Unavailable."""
    try:
        return await ask(runtime.nc, request, answer)
    except AnalyticsRefused as error:
        raise _refusal(error) from error


def _refusal(error: AnalyticsRefused) -> ServiceError:
    match error.code:
        case 400:
            return InvalidRequest(str(error))
        case 404:
            return NotFound("there is nothing like it, now or in the past")
        case 504:
            return Unavailable(
                "the query took too much time or memory", fix="ask for less: a shorter time, or another filter"
            )
        case _:
            return Unavailable("analytics cannot answer at the moment", private=str(error))


async def token_facts(runtime: Runtime, token_id: str) -> TokenFacts:
    """What is known of a token that the view does not have (any more). Raises: NotFound, Unavailable."""
    return (await ask_analytics(runtime, TokenRequest(token_id=token_id), TokenAnswer)).token
