"""Processes of the feed stand still: who notices, and who does not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests import running
from tests.running import Service, StartService, problem, until


def test_feed_that_stands_still_is_told_and_disturbs_no_validation_or_revocation(own_service: StartService) -> None:
    service = own_service()
    pat = service.pat()

    def feed() -> dict[str, Any]:
        check: dict[str, Any] = service.http.get("/health/ready").json()["checks"]["feed"]
        return check

    until(lambda: feed()["ok"], seconds=60)
    with service.projector("revocations").stopped():
        assert (feed()["ok"], feed()["needed"]) == (False, False)
        assert service.ready()
        assert metric(service, "token_ledger_feed_age_seconds") == "+Inf"
        assert service.code(pat["token"]) == "valid"
        revoked = service.done("POST", f"/v1/tokens/{pat['token_id']}/revoke", json={"reason": "admin"})
        assert service.code(pat["token"]) == "revoked"
    until(lambda: feed().get("position", 0) >= revoked["ledger_seq"], seconds=60, what="announced afterwards")
    assert feed()["ok"]
    assert float(metric(service, "token_ledger_feed_age_seconds")) < 5


def metric(service: Service, name: str) -> str:
    lines = service.http.get("/metrics").text.splitlines()
    (value,) = [line.split(" ")[1] for line in lines if line.startswith(f"{name} ")]
    return value


def test_followers_of_a_log_that_was_put_back_are_told_that_it_is_another(tmp_path: Path) -> None:
    """README "Back up": the streams are restored, the view beside them is not."""
    first = running.start(tmp_path)
    kept = first.pat()
    first.done("POST", f"/v1/tokens/{kept['token_id']}/revoke", json={"reason": "admin"})
    until(lambda: _position(first)["ledger_seq"] > kept["ledger_seq"], seconds=60, what="it is announced")
    first.stop()
    shutil.copytree(first.data_dir / "nats", tmp_path / "backup")

    second = running.start(tmp_path, port=first.port)
    before = _position(second)
    lost = [second.pat() for _ in range(5)]
    until(lambda: _position(second)["ledger_seq"] >= lost[-1]["ledger_seq"], seconds=60)
    cursor = _position(second)["ledger_seq"]
    second.stop()
    shutil.rmtree(second.data_dir / "nats")
    shutil.copytree(tmp_path / "backup", second.data_dir / "nats")

    third = running.start(tmp_path, port=first.port)
    try:
        after = _position(third)
        assert after["feed"] != before["feed"]
        assert after["ledger_seq"] < cursor
        assert "log_went_back" in third.log_path.read_text()
        events = third.done("GET", "/v1/revocations", params={"after": 0})["items"]
        assert [kept["token_id"]] == [event["data"].get("token_id") for event in events]
        # What an operator does where no view says that the log went back.
        rebuild = [*running.command(), "rebuild", "revocations", "--data-dir", str(third.data_dir)]
        subprocess.run(rebuild, cwd=running.ROOT, check=True, capture_output=True, timeout=120)
        until(lambda: third.call("GET", "/v1/revocations/position").is_success, seconds=60)
        until(lambda: _position(third)["feed"] != after["feed"], seconds=60)
        again = third.done("GET", "/v1/revocations", params={"after": 0})["items"]
        assert events == again
    finally:
        third.stop()


def _position(service: Service) -> dict[str, Any]:
    return service.done("GET", "/v1/revocations/position")


def test_follower_from_a_snapshot_that_is_ahead_of_the_announcements_is_served(own_service: StartService) -> None:
    service = own_service(workers=1)
    told = service.done("POST", "/v1/subscribers", json={"name": "gate", "transport": "http"})
    until(lambda: service.call("GET", "/v1/revocations/position").is_success, seconds=60)
    with service.projector("revocations").stopped():
        before = _position(service)["ledger_seq"]
        service.pat()
        after = int(service.call("GET", "/v1/revocations/snapshot").headers["x-ledger-seq"])
        assert after > before
        query = {"after": after, "subscriber": told["subscriber_id"]}
        assert service.done("GET", "/v1/revocations", params=query)["ledger_seq"] == after
        path = f"/v1/subscribers/{told['subscriber_id']}/acknowledgements"
        recorded = service.done("POST", path, json={"ledger_seq": after})["ledger_seq"]
        assert before <= recorded < after, "a receipt of what was not announced"
        problem(service.call("POST", path, json={"ledger_seq": after + 1_000}), 400, "feed_changed")
    until(lambda: _position(service)["ledger_seq"] >= after, seconds=60)
    assert service.done("POST", path, json={"ledger_seq": after})["ledger_seq"] == after


def test_receipts_that_stand_still_hold_up_no_announcement(own_service: StartService) -> None:
    """Nor could subscribers who drown in messages the process that hears them."""
    service = own_service()
    until(lambda: service.http.get("/health/ready").json()["checks"]["feed"]["ok"], seconds=60)
    with service.projector("receipts").stopped():
        for _ in range(3):
            token_id = service.pat()["token_id"]
            seq = service.done("POST", f"/v1/tokens/{token_id}/revoke", json={"reason": "admin"})["ledger_seq"]
            query = {"after": seq - 1, "wait_seconds": 30}
            found = service.done("GET", "/v1/revocations", params=query, timeout=60)
            assert [int(item["id"]) for item in found["items"]] == [seq]
        assert service.http.get("/health/ready").json()["checks"]["feed"]["ok"]
