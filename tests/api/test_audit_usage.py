"""`/v1/audit/usage` against the running service. What is counted: tests/projections/test_analytics_usage.py."""

from __future__ import annotations

import typing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.api.usage import ROWS_MAX, Outcome
from service.validation import Code
from tests.running import Service, problem, until

USAGE = "/v1/audit/usage"


def usage(service: Service, **query: Any) -> dict[str, Any]:
    return service.done("GET", USAGE, params=query)


def sums(groups: list[dict[str, Any]]) -> dict[str | None, tuple[int, int]]:
    return {one["value"]: (one["uses"], one["refused"]) for one in groups}


def test_usage_counts_what_was_just_used(service: Service) -> None:
    made = service.pat()
    for ip in ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"):
        service.validate(made["token"], context={"ip": ip})
    service.validate(made["token"], scope="no:such")
    of_it = {"token_id": made["token_id"]}
    seen = usage(service, **of_it, group_by="outcome", interval="hour")
    assert sums(seen["groups"]) == {"valid": (3, 0), "insufficient_scope": (1, 1)}
    totals = seen["totals"]
    assert [totals.get(name) for name in ("uses", "refused", "tokens", "addresses")] == [4, 1, None, None]
    totals = usage(service, **of_it, distinct=True)["totals"]
    assert [totals[name] for name in ("uses", "refused", "tokens", "addresses")] == [4, 1, 1, 2]
    assert all(sum(point["uses"] for point in one["series"]) == one["uses"] for one in seen["groups"])
    assert seen["ledger_seq"] >= made["ledger_seq"]
    assert seen["usage_seq"] > 0
    assert datetime.fromisoformat(seen["to"]) - datetime.fromisoformat(seen["from"]) == timedelta(hours=24)
    assert {"sql", "other"}.isdisjoint(seen)
    first = usage(service, **of_it, group_by="ip", limit=1)
    assert (sums(first["groups"]), first["other"]["uses"]) == ({"192.0.2.1": (2, 0)}, 2)
    assert usage(service, **of_it, ip="::ffff:c000:201")["totals"]["uses"] == 2


def test_usage_of_a_client_is_found_by_client_subject_and_kind(service: Service) -> None:
    app = service.app()
    token = service.grant(app)["access_token"]
    for _ in range(2):
        assert service.introspect(app, token)["active"]
    for query in ({"client_id": app.client_id}, {"subject": app.client_id}):
        seen = usage(service, **query, group_by="kind")
        assert sums(seen["groups"]) == {"access": (2, 0)}
        assert usage(service, **query, endpoint="validate")["totals"]["uses"] == 0
        assert usage(service, **query, kind="pat")["totals"]["uses"] == 0


def test_usage_of_a_person_is_found_by_username(service: Service) -> None:
    user = service.user(scope=service.scope())
    service.validate(service.issue(user["user_id"], user["scope"])["token"])
    for name in (user["username"], user["user_id"]):
        assert sums(usage(service, subject=name, group_by="subject")["groups"]) == {user["user_id"]: (1, 0)}


def test_usage_of_unknown_tokens_has_no_client(service: Service) -> None:
    """Such requests are counted, and the counts written once in a few seconds."""
    for _ in range(3):
        service.validate("garbage", context={"ip": "192.0.2.77"})

    def found() -> dict[str, Any] | None:
        seen = usage(service, outcome="malformed", ip="192.0.2.77", group_by="client_id")
        return seen if seen["totals"]["uses"] == 3 else None

    assert sums(until(found)["groups"]) == {None: (3, 3)}


def test_usage_tells_its_sql_with_parameters(service: Service) -> None:
    seen = usage(service, group_by="endpoint", kind="sat", explain="sql", **{"from": "2026-01-01T00:00:00+01:00"})
    assert seen["sql"]["statement"].startswith("WITH recorded AS")
    assert seen["sql"]["parameters"].items() >= {"from": "2025-12-31T23:00:00", "kind": "sat", "limit": 10}.items()
    assert seen["from"] == "2025-12-31T23:00:00Z"


def test_outcomes_that_can_be_asked_for_are_those_that_are_recorded() -> None:
    assert set(typing.get_args(Outcome)) == {*Code, "invalid_client", "not_permitted", "invalid_password"}


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"group_by": "password"}, "group_by"),
        ({"group_by": "client_id, ip"}, "group_by"),
        ({"interval": "week"}, "interval"),
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"kind": "cookie"}, "kind"),
        ({"outcome": "no"}, "outcome"),
        ({"endpoint": "/"}, "endpoint"),
        ({"explain": "plan"}, "explain"),
        ({"ip": "192.0.2.0/24"}, "ip is not an IP address"),
        ({"from": "yesterday"}, "from must be a time"),
        ({"to": "2026-01-01"}, "to must be a time"),
        ({"to": "2001-01-01T00:00:00Z"}, "from must be before to"),
        ({"from": "2026-01-02T00:00:00Z", "to": "2026-01-02T00:00:00Z"}, "from must be before to"),
        ({"client": "cli_x"}, "client"),
    ],
    ids=str,
)
def test_usage_refuses_what_it_cannot_answer(service: Service, query: dict[str, Any], says: str) -> None:
    body = problem(service.call("GET", USAGE, params=query), 400, "invalid_request")
    assert says in body["detail"]
    assert body.get("fix")


RANGE = {"from": "2026-01-01T00:00:30Z", "to": "2026-01-08T00:00:00Z"}


@pytest.mark.parametrize(
    ("query", "detail", "fix"),
    [
        (
            {"interval": "minute"},
            "10,080 intervals of one minute for one group are 10,080 numbers, more than 10,000",
            "interval=hour or at most 9,999 minutes between from and to",
        ),
        (
            {"interval": "hour", "group_by": "ip", "limit": 99},
            "168 intervals of one hour for 99 groups and the others are 16,800 numbers, more than 10,000",
            "interval=day or at most 99 hours between from and to or limit=58",
        ),
        (
            {"interval": "day", "from": "0001-01-01T00:00:00Z"},
            "739,623 intervals of one day for one group are 739,623 numbers, more than 10,000",
            "at most 9,999 days between from and to",
        ),
    ],
    ids=str,
)
def test_usage_refuses_too_many_numbers_and_says_what_to_ask(
    service: Service, query: dict[str, Any], detail: str, fix: str
) -> None:
    body = problem(service.call("GET", USAGE, params=RANGE | query), 400)
    assert (body["detail"], body["fix"]) == (detail, fix)


def test_usage_follows_its_own_advice(service: Service) -> None:
    assert ROWS_MAX == 10_000
    for query in ({"interval": "hour"}, {"interval": "hour", "group_by": "ip", "limit": 58}):
        assert usage(service, **RANGE | query)["interval"] == "hour"
    now = datetime.now(UTC)
    most = {"from": (now - timedelta(minutes=9_999)).isoformat(), "to": now.isoformat()}
    assert usage(service, interval="minute", **most)["interval"] == "minute"


def test_usage_needs_the_scope_of_auditors(service: Service) -> None:
    problem(service.call("GET", USAGE, token=service.bearer("ledger:users")), 403, "insufficient_scope")
    problem(service.call("GET", USAGE, token=None), 401)
    assert service.call("GET", USAGE, token=service.bearer("ledger:audit")).status_code == 200
