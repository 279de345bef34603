"""A process of `up` that ends and cannot be started again at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service import supervisor
from service.settings import Settings
from tests.logs import until


async def test_process_that_could_not_be_started_again_is_started_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the host has no process or file left for a moment: else nothing would ever start it again."""
    child = supervisor._Child("command line", ["--help"], Settings(data_dir=tmp_path), 1.0)
    python = sys.executable
    await child.start()
    first = child._process
    assert first is not None
    monkeypatch.setattr(sys, "executable", str(tmp_path / "not there"))
    try:
        with capture_logs() as logged:
            await until(lambda: [one for one in logged if one["event"] == "process_not_started"], seconds=60)
            monkeypatch.setattr(sys, "executable", python)
            await until(lambda: child._process is not first, seconds=60)
        assert "not there" in next(one["why"] for one in logged if one["event"] == "process_not_started")
    finally:
        await child.stop()
