"""Processes of the feed stand still: who notices, and who does not."""

from __future__ import annotations

from typing import Any

from tests.running import StartService, until


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
        assert service.code(pat["token"]) == "valid"
        revoked = service.done("POST", f"/v1/tokens/{pat['token_id']}/revoke", json={"reason": "admin"})
        assert service.code(pat["token"]) == "revoked"
    until(lambda: feed().get("position", 0) >= revoked["ledger_seq"], seconds=60, what="announced afterwards")
    assert feed()["ok"]


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
