"""Webhooks by the command line."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner

from service.cli import main
from tests.receivers import Receiver, signed_by
from tests.running import CANARY_HOOK, Service, unique, until

SECONDS = 60.0


def ask(service: Service, *arguments: str, expected: int = 0) -> Any:
    """The JSON that a command prints, or its error."""
    environment = {"TOKEN_LEDGER_DATA_DIR": str(service.data_dir)}
    result = CliRunner(env=environment).invoke(main, ["webhook", *arguments, "-o", "json"])
    assert result.exit_code == expected, result.output
    return json.loads(result.stderr if expected else result.stdout)


def test_webhook_commands_do_what_they_say(service: Service) -> None:
    with Receiver() as receiver:
        url = receiver.url(f"/{unique(CANARY_HOOK)}")
        made = ask(service, "create", url, "--name", "gateway")
        webhook_id = made["webhook_id"]
        try:
            assert ask(service, "test", webhook_id)["outcome"] == "delivered"
            assert signed_by(receiver.received[0], made["secret"])
            receiver.statuses.append(500)
            command = ["webhook", "test", webhook_id, "-o", "json"]
            failed = CliRunner(env={"TOKEN_LEDGER_DATA_DIR": str(service.data_dir)}).invoke(main, command)
            assert (failed.exit_code, json.loads(failed.stdout)["status"]) == (1, 500)
            assert ask(service, "rotate-secret", webhook_id, "--overlap", "1h")["secret"] != made["secret"]
            assert ask(service, "show", webhook_id)["url"] == url
            listed = next(one for one in ask(service, "list", "--all")["items"] if one["webhook_id"] == webhook_id)
            assert (listed["webhook_name"], "url" in listed) == ("gateway", False)
            assert ask(service, "disable", webhook_id)["disabled_reason"] == "asked"
            assert ask(service, "enable", webhook_id)["enabled"]
            token = service.pat()["token_id"]
            seq = service.done("POST", f"/v1/tokens/{token}/revoke", json={"reason": "admin"})["ledger_seq"]
            until(lambda: seq in receiver.seqs(), seconds=SECONDS)
            until(lambda: ask(service, "deliveries", webhook_id)["items"], seconds=SECONDS)
            assert not ask(service, "redeliver", webhook_id, "--after", str(seq - 1))["snapshot_required"]
            until(lambda: len(receiver.received) == 4, seconds=SECONDS)
        finally:
            assert ask(service, "delete", webhook_id, "--yes")["webhook_id"] == webhook_id
        assert ask(service, "show", webhook_id, expected=1)["code"] == "not_found"


def test_webhook_that_may_not_be_called_is_refused_with_what_to_do(service: Service) -> None:
    refused = ask(service, "create", "https://127.0.0.1/", expected=1)
    assert refused["detail"] == "127.0.0.1 is not a public address"
    assert "TOKEN_LEDGER_WEBHOOK_ALLOWED_NETWORKS" in refused["fix"]
