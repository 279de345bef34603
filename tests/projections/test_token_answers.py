"""Answers about tokens over NATS: their positions, and how they stay below what a message may hold."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from events import types as t
from projections import analytics
from projections.asking import AnalyticsRefused, ask
from projections.asking_tokens import (
    RadiusAnswer,
    RadiusRequest,
    ScopesAnswer,
    ScopesRequest,
    TokensAnswer,
    TokensRequest,
)
from tests.projections.test_analytics import (
    NOW,
    TOKEN,
    Log,
    a_log,
    block,
    common,
    issued,
    new_id,
    projecting,
    start_log,
    use,
)

__all__ = ["a_log", "start_log"]  # fixtures


async def radius(log: Log, **asked: Any) -> RadiusAnswer:
    request = RadiusRequest(**{"now": NOW, "since": NOW, "token_id": TOKEN, "limit": 1000} | asked)
    return await ask(log.nc, request, RadiusAnswer)


async def test_answers_about_tokens_have_what_is_recorded_and_say_where_they_are_true(
    a_log: Log, tmp_path: Path
) -> None:
    opened = analytics.open_analytics(tmp_path / "store")
    async with projecting(opened, a_log):
        for uses in (1, 2):
            ledger_seq = await a_log.record(issued(new_id("grt"), (TOKEN if uses == 1 else new_id("tok"),)))
            usage_seq = await a_log.record_uses(block(use(at=uses)))
            tokens = await ask(a_log.nc, TokensRequest(now=NOW), TokensAnswer)
            scopes = await ask(a_log.nc, ScopesRequest(now=NOW, since=NOW, by="token", include_used=True), ScopesAnswer)
            found = await radius(a_log)
            assert {(one.ledger_seq, one.usage_seq) for one in (tokens, scopes, found)} == {(ledger_seq, usage_seq)}
            assert len(found.items) == uses
            assert max(one.uses for one in tokens.items) == max(one.uses for one in scopes.items) == uses
    opened.close()


async def test_pages_about_tokens_stay_below_what_a_message_may_hold(a_log: Log, tmp_path: Path) -> None:
    opened = analytics.open_analytics(tmp_path / "store")
    agents = [t.Context("192.0.2.7", f"{number:04}" + "\U0001f916" * 252) for number in range(1000)]
    long = " ".join(f"{number:03}{'s' * 190}" for number in range(20))
    tokens = [new_id("tok") for _ in range(300)]
    async with projecting(opened, a_log):
        await a_log.record(issued(), *(scoped(token_id, long) for token_id in tokens))
        for start in range(0, 1000, 250):
            uses = [use(at=start + n, context=context) for n, context in enumerate(agents[start : start + 250])]
            await a_log.record_uses(block(*uses))
        first = await radius(a_log)
        assert first.more
        assert 0 < len(first.items) < 1000
        found = list(first.items)
        while len(found) < 1000:
            last = found[-1]
            page = await radius(a_log, after=(last.usage_seq, last.use_index))
            assert page.items
            found += page.items
        assert len({(one.usage_seq, one.use_index) for one in found}) == 1000
        seen: list[str] = []
        more = True
        while more:
            request = ScopesRequest(
                now=NOW, since=NOW, by="token", limit=1000, after=seen[-1] if seen else None, kind="pat"
            )
            answer = await ask(a_log.nc, request, ScopesAnswer)
            seen += [str(one.token_id) for one in answer.items]
            more = answer.more
        assert seen == sorted(tokens)
    opened.close()


def scoped(token_id: str, scope: str) -> t.TokenIssued:
    minted = t.MintedToken(
        token_id=token_id,
        sha256="ab" * 32,
        kind=t.Kind.PAT,
        scope=scope,
        audience=(),
        expires_at=NOW + timedelta(hours=1),
    )
    return t.TokenIssued(
        **common(grant_id=new_id("grt"), subject="usr_x", client_id=None, scope=scope, audience=()), tokens=(minted,)
    )


async def test_blast_radius_of_nothing_is_refused_with_404(a_log: Log, tmp_path: Path) -> None:
    opened = analytics.open_analytics(tmp_path / "store")
    async with projecting(opened, a_log):
        with pytest.raises(AnalyticsRefused) as refused:
            await radius(a_log, token_id=new_id("tok"))
    opened.close()
    assert refused.value.code == 404
