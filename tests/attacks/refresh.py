"""Refresh tokens: theft, replay, races, widening, ends."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests.attacks.table import ODD, Stage, attack, form, variants
from tests.running import oauth_error, until


def refresh_body(token: str, **more: str) -> str:
    return form(grant_type="refresh_token", refresh_token=token, **more)


@attack("112", "P, RFC 8725 §3.12: one kind of token is not another")
def other_kinds_are_no_refresh_tokens(stage: Stage) -> None:
    tokens = [
        stage.refreshable()["access_token"],
        stage.service.pat(stage.read)["token"],
        stage.service.grant(stage.service.app(access_token_format="jwt"))["access_token"],
        stage.app.client_secret,
    ]
    for token in tokens:
        oauth_error(stage.token(stage.app, refresh_body(token)), 400, "invalid_grant")


@variants(
    "112",
    "P, RFC 6749 §5.2: invalid_grant",
    trailing_space=lambda token: token + " ",
    case=str.swapcase,
    truncated=lambda token: token[:-1],
    longer=lambda token: token + "0",
    nul=lambda token: token + "\0",
    garbage=lambda token: "garbage",
    huge=lambda token: "a" * 20_000,
)
def near_miss_of_refresh_token_is_refused(stage: Stage, change) -> None:
    tokens = stage.refreshable()
    answer = stage.token(stage.app, refresh_body(change(tokens["refresh_token"])))
    assert answer.status_code == 400
    assert answer.json()["error"] in {"invalid_grant", "invalid_request"}
    assert stage.token(stage.app, refresh_body(tokens["refresh_token"])).status_code == 200


@variants("112", "RFC 6749 §5.2", absent="grant_type=refresh_token", empty="grant_type=refresh_token&refresh_token=")
def missing_refresh_token_is_refused(stage: Stage, body: str) -> None:
    oauth_error(stage.token(stage.app, body), 400, "invalid_request")


@attack("103", "RFC 6749 §6: the refresh token is bound to the client")
def refresh_token_of_another_client_is_refused(stage: Stage) -> None:
    """The thief learns nothing and breaks nothing: the owner goes on."""
    token = stage.refreshable()["refresh_token"]
    oauth_error(stage.token(stage.new_app(), refresh_body(token)), 400, "invalid_grant")
    assert stage.token(stage.app, refresh_body(token)).status_code == 200


@attack("116", "RFC 6749 §6: a confidential client MUST authenticate")
def refresh_without_authentication_is_refused(stage: Stage) -> None:
    token = stage.refreshable()["refresh_token"]
    oauth_error(stage.token(None, refresh_body(token)), 401, "invalid_client")
    oauth_error(stage.token(None, refresh_body(token, client_id=stage.app.client_id)), 401, "invalid_client")
    assert stage.token(stage.app, refresh_body(token)).status_code == 200


@attack("118", "RFC 9700 §4.14.2")
def replay_after_the_successor_was_used_revokes_the_family(stage: Stage) -> None:
    first = stage.refreshable()
    second = stage.token(stage.app, refresh_body(first["refresh_token"])).json()
    third = stage.token(stage.app, refresh_body(second["refresh_token"])).json()
    oauth_error(stage.token(stage.app, refresh_body(first["refresh_token"])), 400, "invalid_grant")
    oauth_error(stage.token(stage.app, refresh_body(third["refresh_token"])), 400, "invalid_grant")
    for answer in (first, second, third):
        assert stage.introspected(answer["access_token"]) == {"active": False}
        assert stage.introspected(answer["refresh_token"]) == {"active": False}
        assert stage.service.code(answer["access_token"]) == "revoked"
    known = stage.service.validate(third["access_token"])
    types = [event["type"].partition("/")[0] for event in stage.service.history(known["token_id"])]
    assert "refresh.replayed" in types
    assert types[-1] == "grant.revoked" or types[-1] == "refresh.replayed"


@attack("118", "RFC 9700 §4.14.2 (strict mode)")
def replay_in_strict_mode_revokes_the_family(stage: Stage) -> None:
    strict, app = stage.strict, stage.strict.app
    first = strict.refreshable(app)
    second = strict.token(app, refresh_body(first["refresh_token"])).json()
    oauth_error(strict.token(app, refresh_body(first["refresh_token"])), 400, "invalid_grant")
    oauth_error(strict.token(app, refresh_body(second["refresh_token"])), 400, "invalid_grant")
    assert strict.service.code(second["access_token"]) == "revoked"


@attack("119", "P, RFC 9700 §4.14.2 (strict mode)")
def two_concurrent_refreshes_in_strict_mode_end_the_family(stage: Stage) -> None:
    strict, app = stage.strict, stage.strict.app
    token = strict.refreshable(app)["refresh_token"]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda body: strict.token(app, body), [refresh_body(token)] * 2))
    assert sorted(answer.status_code for answer in answers) == [200, 400]
    winner = next(answer.json() for answer in answers if answer.status_code == 200)
    oauth_error(strict.token(app, refresh_body(winner["refresh_token"])), 400, "invalid_grant")
    assert strict.service.code(winner["access_token"]) == "revoked"


@attack("121", "P, RFC 9700 §4.14.2")
def race_gives_every_winner_the_same_tokens(stage: Stage) -> None:
    """The race of a hundred, with the chain in the ledger, is among the fault tests."""
    token = stage.refreshable()["refresh_token"]
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda body: stage.token(stage.app, body), [refresh_body(token)] * 20))
    assert {answer.status_code for answer in answers} == {200}
    assert len({(answer.json()["access_token"], answer.json()["refresh_token"]) for answer in answers}) == 1


@variants("122", "RFC 6749 §6: MUST NOT include any scope not originally granted", more=True, other=False)
def wider_scope_is_refused(stage: Stage, keep: bool) -> None:
    answer = stage.token(stage.app, form(grant_type="client_credentials", scope=stage.read)).json()
    scope = f"{stage.read} {stage.write}" if keep else stage.write
    body = refresh_body(answer["refresh_token"], scope=scope)
    oauth_error(stage.token(stage.app, body), 400, "invalid_scope")
    assert stage.token(stage.app, refresh_body(answer["refresh_token"])).status_code == 200


@attack("122", "RFC 6749 §6 (positive control): a narrower scope, and the whole again")
def narrower_scope_does_not_narrow_the_grant(stage: Stage) -> None:
    token = stage.refreshable()["refresh_token"]
    narrow = stage.token(stage.app, refresh_body(token, scope=stage.read)).json()
    assert narrow["scope"] == stage.read
    wide = stage.token(stage.app, refresh_body(narrow["refresh_token"])).json()
    assert set(wide["scope"].split()) == {stage.read, stage.write}


@variants(
    "124",
    "RFC 9700 §4.14.2",
    idle={"refresh_token_idle_ttl_seconds": 1},
    absolute={"refresh_token_max_ttl_seconds": 1, "refresh_token_idle_ttl_seconds": 1},
)
def expired_refresh_token_is_refused(stage: Stage, lifetimes: dict[str, int]) -> None:
    app = stage.new_app(**lifetimes)
    answer = stage.refreshable(app)
    until(lambda: stage.introspected(answer["refresh_token"]) == {"active": False}, seconds=5)
    oauth_error(stage.token(app, refresh_body(answer["refresh_token"])), 400, "invalid_grant")


@attack("124", "RFC 9700 §4.14.2: rotation does not prolong the family beyond its end")
def absolute_end_survives_rotation(stage: Stage) -> None:
    app = stage.new_app(refresh_token_max_ttl_seconds=2, refresh_token_idle_ttl_seconds=2)
    token = stage.refreshable(app)["refresh_token"]

    def refused() -> bool:
        nonlocal token
        answer = stage.token(app, refresh_body(token))
        if answer.status_code == 400:
            oauth_error(answer, 400, "invalid_grant")
            return True
        token = answer.json()["refresh_token"]
        return False

    until(refused, seconds=6, what="the family ends")


@attack("125", "RFC 9700 §4.14.2")
def refresh_after_grant_revocation_is_refused(stage: Stage) -> None:
    answer = stage.refreshable()
    grant_id = stage.service.validate(answer["access_token"])["grant_id"]
    stage.service.done("POST", "/v1/revocations", json={"grant_id": grant_id, "reason": "compromised"})
    oauth_error(stage.token(stage.app, refresh_body(answer["refresh_token"])), 400, "invalid_grant")


@attack("125", "RFC 9700 §4.14.2")
def refresh_after_client_revocation_is_refused(stage: Stage) -> None:
    """The client itself lives on and gets new tokens."""
    app = stage.new_app()
    answer = stage.refreshable(app)
    wanted = {"client_id": app.client_id, "reason": "compromised"}
    stage.service.done("POST", "/v1/revocations", json=wanted)
    oauth_error(stage.token(app, refresh_body(answer["refresh_token"])), 400, "invalid_grant")
    again = stage.refreshable(app)
    assert stage.token(app, refresh_body(again["refresh_token"])).status_code == 200


@attack("125", "RFC 6749 §5.2: invalid_client")
def refresh_of_a_disabled_client_is_refused(stage: Stage) -> None:
    app = stage.new_app()
    answer = stage.refreshable(app)
    stage.service.done("DELETE", f"/v1/clients/{app.client_id}")
    oauth_error(stage.token(app, refresh_body(answer["refresh_token"])), 401, "invalid_client")
    assert stage.service.code(answer["access_token"]) in {"revoked", "client_disabled"}


@attack("130", "P: a lost response signs nobody out")
def retry_within_the_window_gets_the_same_answer(stage: Stage) -> None:
    token = stage.refreshable()["refresh_token"]
    first = stage.token(stage.app, refresh_body(token)).json()
    second = stage.token(stage.app, refresh_body(token)).json()
    for name in ("access_token", "refresh_token", "scope"):
        assert first[name] == second[name]
    assert stage.token(stage.app, refresh_body(first["refresh_token"])).status_code == 200


@attack("130", "P: the window ends")
def retry_after_the_window_revokes_the_family(stage: Stage) -> None:
    short = stage.odd
    first = short.refreshable()
    second = short.token(short.app, refresh_body(first["refresh_token"])).json()

    def refused() -> bool:
        return short.token(short.app, refresh_body(first["refresh_token"])).status_code == 400

    until(refused, seconds=ODD["refresh_retry_window_seconds"] + 3)
    assert short.service.code(second["access_token"]) == "revoked"
