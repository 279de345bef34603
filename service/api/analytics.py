"""How the analytics process is asked, and what its refusals mean to a caller of the API."""

from __future__ import annotations

from typing import TypeVar

from msgspec import Struct

from projections.asking import AnalyticsRefused, TokenAnswer, TokenFacts, TokenRequest, ask
from service.errors import InvalidRequest, NotFound, ServiceError, Unavailable
from service.runtime import Runtime

A = TypeVar("A", bound=Struct)


async def ask_analytics(
    runtime: Runtime, request: Struct, answer: type[A], *, smaller: str = "ask for a shorter time, or another filter"
) -> A:
    """`smaller` says how less can be asked for, when it was too much. Raises: InvalidRequest, NotFound, Unavailable."""
    try:
        return await ask(runtime.nc, request, answer)
    except AnalyticsRefused as error:
        raise _refusal(error, smaller) from error


def _refusal(error: AnalyticsRefused, smaller: str) -> ServiceError:
    # What to do about it stands behind what happened.
    happened, _, fix = str(error).partition("; ")
    match error.code:
        case 400:
            return InvalidRequest(happened, fix=fix or None)
        case 404:
            return NotFound("there is nothing like it, now or in the past")
        case 504:
            return Unavailable(happened, fix=smaller)
        case _:
            return Unavailable("analytics cannot answer at the moment", private=str(error))


async def token_facts(runtime: Runtime, token_id: str) -> TokenFacts:
    """What is known of a token that the view does not have (any more). Raises: NotFound, Unavailable."""
    return (await ask_analytics(runtime, TokenRequest(token_id=token_id), TokenAnswer)).token
