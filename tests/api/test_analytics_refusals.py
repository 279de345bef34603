"""What a caller of the API is told when analytics refuses: what happened, and what to do."""

from __future__ import annotations

import pytest

from projections.asking import AnalyticsRefused
from service.api.analytics import _refusal
from service.errors import InvalidRequest, NotFound, ServiceError, Unavailable


@pytest.mark.parametrize(
    ("error", "kind", "detail", "fix"),
    [
        (
            AnalyticsRefused(504, "the query took over 10 s; ask for less"),
            *(Unavailable, "the query took over 10 s", "ask for one client_id"),
        ),
        (
            AnalyticsRefused(504, "the query took too much memory; ask for less"),
            *(Unavailable, "the query took too much memory", "ask for one client_id"),
        ),
        (
            AnalyticsRefused(400, "the answer is larger than a message may be; ask for interval=day"),
            *(InvalidRequest, "the answer is larger than a message may be", "ask for interval=day"),
        ),
        (AnalyticsRefused(400, "no cursor"), InvalidRequest, "no cursor", ""),
        (
            AnalyticsRefused(503, "64 queries are already being answered"),
            *(Unavailable, "analytics cannot answer at the moment", Unavailable.fix),
        ),
    ],
    ids=str,
)
def test_refusal_of_analytics_says_what_happened_and_what_to_do(
    error: AnalyticsRefused, kind: type[ServiceError], detail: str, fix: str
) -> None:
    refused = _refusal(error, "ask for one client_id")
    assert (type(refused), refused.detail, refused.fix) == (kind, detail, fix)


def test_refusal_of_what_is_unknown_is_not_found() -> None:
    assert isinstance(_refusal(AnalyticsRefused(404, "no token"), ""), NotFound)
