"""What a worker that cannot answer yet says, and that apps in browsers can read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.app import App
from service.settings import Settings
from tests.rsgi import Answer, answer_to, request

ORIGIN = ("origin", "https://app.example")


async def ask(directory: Path, method: str, path: str) -> Answer:
    incoming = request(ORIGIN, method=method, path=path)
    await App(Settings(data_dir=directory)).__rsgi__(incoming._scope, incoming._protocol)
    return answer_to(incoming)


@pytest.mark.parametrize(("method", "path"), [("POST", "/oauth2/token"), ("GET", "/oauth2/userinfo")])
async def test_an_app_in_a_browser_can_read_how_long_it_is_to_wait(tmp_path: Path, method: str, path: str) -> None:
    asked = await ask(tmp_path, "OPTIONS", path)
    assert (asked.status, asked.headers["access-control-allow-origin"]) == (204, "*")
    assert method in asked.headers["access-control-allow-methods"]
    answer = await ask(tmp_path, method, path)
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (503, "*")
    assert "retry-after" in answer.headers["access-control-expose-headers"]
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(("method", "path"), [("POST", "/oauth2/introspect"), ("GET", "/account")])
async def test_other_doors_stay_closed_to_other_origins_then_too(tmp_path: Path, method: str, path: str) -> None:
    answer = await ask(tmp_path, method, path)
    assert answer.status == 503
    assert not [name for name in answer.headers if name.startswith("access-control-")]
