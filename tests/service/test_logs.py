"""What libraries log reads as what the service logs: a line of JSON each, for programs."""

from __future__ import annotations

import json
import subprocess
import sys

from tests import running

PROGRAM = """
import logging
from service import logs
from service.settings import Settings
logs.configure(Settings(log_format="json"))
logging.getLogger("token_ledger.nats").warning("nats-server ended with status %d", -9)
logs.log.warning("ours")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("library").exception("it failed")
"""


def test_lines_of_libraries_are_json_with_level_time_and_trace() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=running.ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    nats, ours, failed = (json.loads(line) for line in done.stderr.splitlines())
    assert (nats["event"], nats["level"], nats["logger"]) == (
        "nats-server ended with status -9",
        "warning",
        "token_ledger.nats",
    )
    assert (ours["event"], failed["event"], failed["level"]) == ("ours", "it failed", "error")
    assert "ZeroDivisionError" in failed["exception"]
    assert {"timestamp"} <= nats.keys() & ours.keys() & failed.keys()
