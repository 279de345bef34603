"""Given what is registered, when a command comes, then these events, or this refusal."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from msgspec.structs import replace

from events.types import (
    ClientChanged,
    ClientDisabled,
    ClientRegistered,
    ClientSecretRotated,
    LedgerEvent,
    Recorded,
    ScopeChanged,
    ScopeDisabled,
    ScopeRegistered,
    SubjectErased,
    UserChanged,
    UserDisabled,
    UsernameClaimed,
    UserPasswordChanged,
    UserRegistered,
)
from projections import registry
from projections.registry import Client, Row, Scope, User, Username
from service.caller import Caller
from service.errors import (
    AlreadyExists,
    Gone,
    InsufficientScope,
    InvalidClientMetadata,
    InvalidRedirectUri,
    InvalidRequest,
    InvalidScope,
    NotFound,
    ServiceError,
)
from service.rules.grants import Stamp
from service.rules.registry import (
    LEDGER_SCOPES,
    ChangeClient,
    ChangeUser,
    Profile,
    RegisterClient,
    RegisterUser,
    RotateSecret,
    WriteScope,
    check_networks,
    check_profile,
    check_redirect_uri,
    check_scope,
    decide_change_client,
    decide_change_scope,
    decide_change_user,
    decide_disable_client,
    decide_disable_scope,
    decide_disable_user,
    decide_erase_user,
    decide_register_client,
    decide_register_scope,
    decide_register_user,
    decide_rotate_secret,
    default_metadata,
    merge_metadata,
)

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
STAMP = Stamp(("event-1", "event-2"), NOW, "tok_caller", "request-1")
CLIENT_ID, USER_ID, ISSUER = "cli_" + "0" * 32, "usr_" + "0" * 32, "https://auth.example"


def caller(*scopes: str) -> Caller:
    return Caller("", "tok_caller", USER_ID, None, frozenset(scopes))


ADMIN, CLIENTS, USERS = caller("ledger:admin"), caller("ledger:clients"), caller("ledger:users")


def fold(*events: LedgerEvent) -> Row | None:
    """Given: what these events make of one subject."""
    row: Row | None = None
    for seq, event in enumerate(events, 1):
        row = registry.evolve(row, Recorded(seq=seq, recorded_at=NOW, subject="", event=event))
    return row


# Clients


def registering(changes: Mapping[str, Any], by: Caller | None = ADMIN) -> RegisterClient:
    return RegisterClient(
        stamp=STAMP, caller=by, client_id=CLIENT_ID, changes=changes, secret_sha256="aa", issuer=ISSUER
    )


def a_client(**changes: Any) -> Client:
    client = fold(decide_register_client(registering(changes), {}))
    assert isinstance(client, Client)
    return client


def changing(client: Client | None, changes: Mapping[str, Any], by: Caller | None = ADMIN) -> list[LedgerEvent]:
    command = ChangeClient(stamp=STAMP, caller=by, changes=changes, issuer=ISSUER)
    return decide_change_client(command, client, {})


def disabled(client: Client) -> Client:
    return replace(client, disabled_at=NOW)


def test_client_that_names_nothing_gets_the_defaults() -> None:
    event = decide_register_client(registering({}), {})
    expected = ClientRegistered(
        id="event-1",
        occurred_at=NOW,
        by="tok_caller",
        request_id="request-1",
        client_id=CLIENT_ID,
        metadata=default_metadata(CLIENT_ID, ISSUER),
        secret_sha256="aa",
    )
    assert expected == event
    assert event.metadata.client_name == CLIENT_ID
    assert event.metadata.audience == (ISSUER,)


def test_public_client_has_no_secret() -> None:
    changes = {"token_endpoint_auth_method": "none", "grant_types": ["refresh_token"]}
    assert decide_register_client(registering(changes), {}).secret_sha256 is None


CODE = {"grant_types": ["authorization_code"], "redirect_uris": ["https://app.example/callback"]}
WRONG_METADATA: dict[str, tuple[dict[str, Any], type[ServiceError]]] = {
    "public with client_credentials": ({"token_endpoint_auth_method": "none"}, InvalidClientMetadata),
    "public introspector": (
        {"token_endpoint_auth_method": "none", "grant_types": [], "may_introspect": True},
        InvalidClientMetadata,
    ),
    "code without its grant": ({"response_types": ["code"]}, InvalidClientMetadata),
    "grant without code": ({**CODE, "response_types": []}, InvalidClientMetadata),
    "code without redirect": ({"grant_types": ["authorization_code"]}, InvalidRedirectUri),
    "idle longer than all": (
        {"refresh_token_idle_ttl_seconds": 100, "refresh_token_max_ttl_seconds": 99},
        InvalidClientMetadata,
    ),
    "scope with a quote": ({"scope": 'a"b'}, InvalidScope),
    "scope with two blanks": ({"scope": "a  b"}, InvalidScope),
    "scope with a tab": ({"scope": "a\tb"}, InvalidScope),
    "scope of the ledger that is none": ({"scope": "ledger:everything"}, InvalidScope),
    "control character in the name": ({"client_name": "a\x00b"}, InvalidClientMetadata),
    "blank at the end of the name": ({"client_name": "a "}, InvalidClientMetadata),
    "turned text in the name": ({"client_name": "a\u202eb"}, InvalidClientMetadata),
    "public without rotation": (
        {"token_endpoint_auth_method": "none", "grant_types": ["refresh_token"], "refresh_token_rotation": False},
        InvalidClientMetadata,
    ),
    "hybrid without its grant": ({"response_types": ["code id_token"]}, InvalidClientMetadata),
    "redirect after logout with a fragment": (
        {"post_logout_redirect_uris": ["https://app.example/#out"]},
        InvalidRedirectUri,
    ),
    "audience with a blank": ({"audience": ["a b"]}, InvalidRequest),
    "more than a JWT can hold": (
        {"scope": " ".join(f"scope{n:04}" for n in range(99)) + " " + "a" * 200, "audience": ["b" * 500, "c" * 500]},
        InvalidClientMetadata,
    ),
}


@pytest.mark.parametrize(("changes", "refusal"), WRONG_METADATA.values(), ids=WRONG_METADATA.keys())
def test_wrong_metadata_is_refused(changes: dict[str, Any], refusal: type[ServiceError]) -> None:
    with pytest.raises(refusal):
        decide_register_client(registering(changes), {})


def test_long_audience_fits_into_what_is_no_jwt() -> None:
    changes = {"access_token_format": "opaque", "audience": [letter * 500 for letter in "abcdef"]}
    assert len(decide_register_client(registering(changes), {}).metadata.audience) == 6


def test_code_flow_brings_its_response_type() -> None:
    assert decide_register_client(registering(CODE), {}).metadata.response_types == ("code",)


def test_response_types_stay_while_there_is_a_code() -> None:
    default = default_metadata(CLIENT_ID, ISSUER)
    hybrid = merge_metadata(default, CODE | {"response_types": ["code", "code id_token"]}, default)
    more = {"grant_types": ["authorization_code", "refresh_token"]}
    assert merge_metadata(hybrid, more, default).response_types == ("code", "code id_token")
    assert merge_metadata(hybrid, more | {"response_types": None}, default).response_types == ("code",)
    assert merge_metadata(hybrid, {"grant_types": ["refresh_token"]}, default).response_types == ()


def test_settings_of_sign_in_are_kept_and_have_defaults() -> None:
    given = {
        "post_logout_redirect_uris": ["https://app.example/out", "https://app.example/out"],
        "require_pushed_authorization_requests": True,
        "id_token_signed_response_alg": "EdDSA",
        "refresh_token_rotation": False,
    }
    made = decide_register_client(registering(CODE | given), {}).metadata
    assert made.post_logout_redirect_uris == ("https://app.example/out",)
    assert (made.require_pushed_authorization_requests, made.refresh_token_rotation) == (True, False)
    assert made.id_token_signed_response_alg == "EdDSA"
    plain = decide_register_client(registering(CODE), {}).metadata
    assert plain.post_logout_redirect_uris == ()
    assert (plain.require_pushed_authorization_requests, plain.refresh_token_rotation) == (False, True)
    assert plain.id_token_signed_response_alg == "RS256"


def test_what_is_named_twice_counts_once() -> None:
    changes = {"scope": "a b a", "grant_types": ["refresh_token", "refresh_token"], "audience": ["x", "x"]}
    metadata = decide_register_client(registering(changes), {}).metadata
    assert (metadata.scope, metadata.grant_types, metadata.audience) == ("a b", ("refresh_token",), ("x",))


@pytest.mark.parametrize(
    ("changes", "merged"),
    [
        pytest.param({"client_name": None}, {"client_name": CLIENT_ID}, id="name"),
        pytest.param({"audience": None}, {"audience": (ISSUER,)}, id="audience"),
        pytest.param({"scope": None}, {"scope": ""}, id="scope"),
        pytest.param(
            {"grant_types": None}, {"grant_types": ("client_credentials",), "response_types": ()}, id="grants"
        ),
        pytest.param({"access_token_ttl_seconds": None}, {"access_token_ttl_seconds": 3600}, id="lifetime"),
    ],
)
def test_null_resets_to_the_default(changes: dict[str, Any], merged: dict[str, Any]) -> None:
    default = default_metadata(CLIENT_ID, ISSUER)
    old = merge_metadata(
        default, {"client_name": "a", "audience": ["x"], "scope": "s", "access_token_ttl_seconds": 60, **CODE}, default
    )
    assert merge_metadata(old, changes, default) == replace(old, **merged)


def test_shorter_whole_lifetime_shortens_the_idle_one() -> None:
    default = default_metadata(CLIENT_ID, ISSUER)
    merged = merge_metadata(default, {"refresh_token_max_ttl_seconds": 3600}, default)
    assert merged.refresh_token_idle_ttl_seconds == 3600


GOOD_URIS = [
    "https://app.example/callback?x=1",
    "http://127.0.0.1:8000/callback",
    "http://[::1]/callback",
    "http://localhost/callback",
    "http://127.0.0.1/callback",
    "com.example.app:/callback",
    "com.example.app://callback?x=%20",
]
BAD_URIS = [
    "https://app.example/#fragment",
    "https://app.example/#",
    "http://app.example/callback",
    "javascript:alert(1)",
    "data:text/html,x",
    "HTTPS://app.example",
    "//app.example",
    "/callback",
    "app.example",
    "https://",
    "https://user@app.example/",
    "https://*.app.example/",
    "https://app.example/a b",
    "https://app.example/\\evil",
    "https://app.ex\u00e4mple/",
    "https://app.example:99999/",
    "https://[::1/",
    "file:///etc/passwd",
    "urn:ietf:wg:oauth:2.0:oob",
    "https://app.example;script-src/",
    "https://app.example,evil.example/",
    "https://'self'/",
    "https://app.example./",
    "https://app.example/<img>",
    'https://app.example/"',
    "https://app.example/%zz",
    "https://app.example/%0",
    "http://127.0.0.1.evil.example/callback",
    "http://localhost.evil.example/callback",
    "http://0x7f000001/callback",
    "myapp:/callback",
    "vbscript:x",
    "",
]


@pytest.mark.parametrize("uri", GOOD_URIS)
def test_redirect_uri_is_taken(uri: str) -> None:
    check_redirect_uri(uri)


@pytest.mark.parametrize("uri", BAD_URIS)
def test_redirect_uri_is_refused(uri: str) -> None:
    """Source: RFC 6749 §3.1.2, RFC 8252 §7, RFC 9700 §2.1."""
    with pytest.raises(InvalidRedirectUri):
        check_redirect_uri(uri)


@pytest.mark.parametrize("scope", sorted(LEDGER_SCOPES))
def test_client_is_given_no_scope_that_its_maker_lacks(scope: str) -> None:
    holder = caller(scope)
    assert decide_register_client(registering({"scope": scope}, holder), {}).metadata.scope == scope
    lacking = caller("ledger:clients" if scope != "ledger:clients" else "ledger:users")
    with pytest.raises(InsufficientScope):
        decide_register_client(registering({"scope": f"other {scope}"}, lacking), {})


def test_only_an_administrator_makes_an_introspector() -> None:
    with pytest.raises(InsufficientScope):
        decide_register_client(registering({"may_introspect": True}, CLIENTS), {})
    with pytest.raises(InsufficientScope):
        changing(a_client(), {"may_introspect": True}, CLIENTS)
    assert changing(a_client(), {"may_introspect": True})


STRONG = {"scope": "ledger:admin other"}
INTROSPECTOR = {"may_introspect": True, "audience": ["https://api.example"]}
TAKE_OVERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no secret": (STRONG, {"token_endpoint_auth_method": "none", "grant_types": ["refresh_token"]}),
    "redirects": (STRONG, {"redirect_uris": ["https://evil.example"]}),
    "grants": (STRONG, {"grant_types": ["client_credentials", "refresh_token"]}),
    "audience": (STRONG, {"audience": ["https://evil.example"]}),
    "lifetime": (STRONG, {"access_token_ttl_seconds": 86_400}),
    "format": (STRONG, {"access_token_format": "opaque"}),
    "more scope": (STRONG, {"scope": "ledger:admin ledger:users"}),
    "audience of an introspector": (INTROSPECTOR, {"audience": ["*"]}),
}


@pytest.mark.parametrize(("is_now", "changes"), TAKE_OVERS.values(), ids=TAKE_OVERS.keys())
def test_weak_caller_takes_no_strong_client_over(is_now: dict[str, Any], changes: dict[str, Any]) -> None:
    with pytest.raises(InsufficientScope):
        changing(a_client(**is_now), changes, CLIENTS)
    assert changing(a_client(**is_now), changes)


@pytest.mark.parametrize("changes", [{"client_name": "b"}, {"scope": "other"}, {"scope": None}], ids=str)
def test_weak_caller_may_rename_and_narrow_a_strong_client(changes: dict[str, Any]) -> None:
    assert changing(a_client(**STRONG), changes, CLIENTS)


def test_change_records_the_metadata_as_a_whole() -> None:
    client = a_client(scope="a")
    (event,) = changing(client, {"client_name": "b"})
    assert isinstance(event, ClientChanged)
    assert event.metadata == replace(client.metadata, client_name="b")


def test_change_to_what_is_there_is_no_event() -> None:
    assert changing(a_client(scope="a b"), {"scope": "a b", "client_name": None}) == []


def test_disabled_scope_is_kept_and_not_gained() -> None:
    scopes = {"old": Scope("old", "", (), (), 1, NOW)}
    client = a_client(scope="old")
    command = ChangeClient(stamp=STAMP, caller=ADMIN, changes={"scope": "old new"}, issuer=ISSUER)
    assert decide_change_client(command, client, scopes)
    with pytest.raises(InvalidScope):
        decide_change_client(command, a_client(scope="new"), scopes)


@pytest.mark.parametrize(
    ("client", "refusal"), [(None, NotFound), (disabled(a_client()), Gone)], ids=["unknown", "disabled"]
)
def test_client_that_is_not_there_does_not_change(client: Client | None, refusal: type[ServiceError]) -> None:
    with pytest.raises(refusal):
        changing(client, {"client_name": "b"})
    with pytest.raises(refusal):
        decide_rotate_secret(rotating(ADMIN), client)


def rotating(by: Caller) -> RotateSecret:
    return RotateSecret(stamp=STAMP, caller=by, secret_sha256="bb", overlap=timedelta(seconds=60))


def test_new_secret_ends_the_old_one_after_the_overlap() -> None:
    client = a_client()
    event = decide_rotate_secret(rotating(CLIENTS), client)
    assert isinstance(event, ClientSecretRotated)
    assert event.previous_ends_at == NOW + timedelta(seconds=60)
    after = registry.evolve(client, Recorded(seq=2, recorded_at=NOW, subject="", event=event))
    assert isinstance(after, Client)
    assert [(secret.sha256, secret.ends_at) for secret in after.secrets] == [
        ("bb", None),
        ("aa", NOW + timedelta(seconds=60)),
    ]


@pytest.mark.parametrize("is_now", [STRONG, INTROSPECTOR], ids=["strong", "introspector"])
def test_secret_of_a_strong_client_is_not_for_a_weak_caller(is_now: dict[str, Any]) -> None:
    with pytest.raises(InsufficientScope):
        decide_rotate_secret(rotating(CLIENTS), a_client(**is_now))
    assert decide_rotate_secret(rotating(ADMIN), a_client(**is_now))


def test_public_client_gets_no_secret() -> None:
    public = a_client(token_endpoint_auth_method="none", grant_types=["refresh_token"])
    with pytest.raises(InvalidRequest):
        decide_rotate_secret(rotating(ADMIN), public)


def test_client_is_disabled_once() -> None:
    client = a_client()
    (event,) = decide_disable_client(STAMP, client)
    assert isinstance(event, ClientDisabled)
    assert decide_disable_client(STAMP, disabled(client)) == []
    with pytest.raises(NotFound):
        decide_disable_client(STAMP, None)


# Users


def registering_user(by: Caller | None = ADMIN, **fields: Any) -> RegisterUser:
    known = {"kind": "person", "scope": "", "password_hash": None}
    return RegisterUser(
        stamp=STAMP, caller=by, user_id=USER_ID, username_hash="cc", sealed_profile=b"sealed", **(known | fields)
    )


def a_user(**fields: Any) -> User:
    user = fold(decide_register_user(registering_user(**fields), None, {})[0])
    assert isinstance(user, User)
    return user


def changing_user(user: User | None, by: Caller | None = ADMIN, **fields: Any) -> list[LedgerEvent]:
    return decide_change_user(ChangeUser(stamp=STAMP, caller=by, **fields), user, {})


def test_user_and_name_are_registered_together() -> None:
    user, name = decide_register_user(registering_user(scope="a"), None, {})
    assert isinstance(user, UserRegistered)
    assert (name, user.id) == (
        UsernameClaimed(
            id="event-2",
            occurred_at=NOW,
            by="tok_caller",
            request_id="request-1",
            username_hash="cc",
            user_id=USER_ID,
        ),
        "event-1",
    )


def test_name_that_is_taken_is_refused() -> None:
    with pytest.raises(AlreadyExists):
        decide_register_user(registering_user(), Username("usr_other", 1), {})


def test_service_user_has_no_password() -> None:
    with pytest.raises(InvalidRequest):
        decide_register_user(registering_user(kind="service", password_hash="hash"), None, {})
    with pytest.raises(InvalidRequest):
        changing_user(a_user(kind="service"), sets_password=True, password_hash="hash")


def test_user_is_given_no_scope_that_its_maker_lacks() -> None:
    with pytest.raises(InsufficientScope):
        decide_register_user(registering_user(USERS, scope="ledger:issue"), None, {})
    with pytest.raises(InsufficientScope):
        changing_user(a_user(), USERS, scope="ledger:issue")
    assert changing_user(a_user(), USERS, scope="ledger:users")


def test_strong_users_password_is_not_for_a_weak_caller() -> None:
    """Whoever sets it can act as the user."""
    strong = a_user(scope="ledger:admin")
    with pytest.raises(InsufficientScope):
        changing_user(strong, USERS, sets_password=True, password_hash="hash")
    assert changing_user(strong, sets_password=True, password_hash="hash")


@pytest.mark.parametrize(
    "fields", [{"sealed_profile": b"other"}, {"scope": "other"}, {"scope": "ledger:admin other"}], ids=str
)
def test_weak_caller_may_change_what_confers_nothing(fields: dict[str, Any]) -> None:
    assert changing_user(a_user(scope="ledger:admin"), USERS, **fields)


def test_user_change_records_scope_and_profile_as_they_stand() -> None:
    (event,) = changing_user(a_user(scope="a"), sealed_profile=b"other")
    assert isinstance(event, UserChanged)
    assert (event.scope, event.sealed_profile) == ("a", b"other")


def test_password_and_scope_change_by_two_events() -> None:
    events = changing_user(a_user(), scope="a", sets_password=True, password_hash="hash")
    assert [(type(event), event.id) for event in events] == [
        (UserChanged, "event-1"),
        (UserPasswordChanged, "event-2"),
    ]


def test_password_that_is_not_there_is_not_taken_away() -> None:
    assert changing_user(a_user(), sets_password=True) == []
    (event,) = changing_user(a_user(password_hash="hash"), sets_password=True)
    assert isinstance(event, UserPasswordChanged)
    assert event.password_hash is None


def test_user_change_to_what_is_there_is_no_event() -> None:
    assert changing_user(a_user(scope="a"), scope="a") == []


def test_user_is_disabled_and_erased_once() -> None:
    user = a_user()
    (event,) = decide_disable_user(STAMP, user)
    assert isinstance(event, UserDisabled)
    gone = replace(user, disabled_at=NOW)
    assert decide_disable_user(STAMP, gone) == []
    (event,) = decide_erase_user(STAMP, gone)
    assert isinstance(event, SubjectErased)
    assert decide_erase_user(STAMP, replace(gone, erased_at=NOW)) == []


@pytest.mark.parametrize(
    ("user", "refusal"),
    [(None, NotFound), (replace(a_user(), disabled_at=NOW), Gone)],
    ids=["unknown", "disabled"],
)
def test_user_who_is_not_there_does_not_change(user: User | None, refusal: type[ServiceError]) -> None:
    with pytest.raises(refusal):
        changing_user(user, scope="a")


def test_unknown_user_is_neither_disabled_nor_erased() -> None:
    for decide in (decide_disable_user, decide_erase_user):
        with pytest.raises(NotFound):
            decide(STAMP, None)


@pytest.mark.parametrize(
    "profile",
    [
        {"username": "a\x00b"},
        {"username": "a\nb"},
        {"username": " a"},
        {"username": "a\u200bb"},
        {"username": "usr_1"},
        {"username": "cli_1"},
        {"username": "a", "display_name": "b\x7f"},
        {"username": "a", "email": "nobody"},
        {"username": "a", "email": "a@b@c"},
        {"username": "a", "email": "a b@c"},
    ],
    ids=str,
)
def test_wrong_profile_is_refused(profile: dict[str, str]) -> None:
    with pytest.raises(InvalidRequest):
        check_profile(Profile(**profile))


def test_names_of_all_peoples_are_taken() -> None:
    check_profile(Profile(username="\u0142ukasz", display_name="\u738b \u5c0f\u660e", email="ann@example.com"))


# Scopes


def writing(name: str = "orders:read", **fields: Any) -> WriteScope:
    return WriteScope(stamp=STAMP, name=name, **fields)


def a_scope(name: str = "orders:read", **fields: Any) -> Scope:
    scope = fold(decide_register_scope(writing(name, **fields), None, {}))
    assert isinstance(scope, Scope)
    return scope


def test_scope_is_registered_once() -> None:
    event = decide_register_scope(writing(description="d", implies=("a", "a")), None, {})
    assert isinstance(event, ScopeRegistered)
    assert (event.description, event.audience, event.implies) == ("d", (), ("a",))
    for there in (a_scope(), replace(a_scope(), disabled_at=NOW)):
        with pytest.raises(AlreadyExists):
            decide_register_scope(writing(), there, {})


@pytest.mark.parametrize("name", ["", "a b", 'a"', "a\\", "\u00e4", "a" * 201, "ledger:admin", "ledger:new"])
def test_name_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(InvalidScope):
        decide_register_scope(writing(name), None, {})


@pytest.mark.parametrize("implied", [*sorted(LEDGER_SCOPES), "ledger:new", "orders:read", "a b", 'a"', "off"])
def test_implication_that_cannot_be_is_refused(implied: str) -> None:
    """`ledger:*` is never implied: nobody, not even an administrator, can hide it in another scope."""
    scopes = {"off": Scope("off", "", (), (), 1, NOW)}
    with pytest.raises(InvalidScope):
        decide_register_scope(writing(implies=(implied,)), None, scopes)
    with pytest.raises(InvalidScope):
        decide_change_scope(writing(implies=(implied,)), a_scope(), scopes)


def test_scope_keeps_what_is_not_named() -> None:
    (event,) = decide_change_scope(writing(description="new"), a_scope(implies=("a",), audience=("x",)), {})
    assert isinstance(event, ScopeChanged)
    assert (event.description, event.implies, event.audience) == ("new", ("a",), ("x",))


def test_scope_change_to_what_is_there_is_no_event() -> None:
    assert decide_change_scope(writing(implies=("a",)), a_scope(implies=("a",)), {}) == []


def test_scope_is_disabled_once_and_does_not_change_then() -> None:
    scope = a_scope()
    (event,) = decide_disable_scope(STAMP, scope)
    assert isinstance(event, ScopeDisabled)
    gone = replace(scope, disabled_at=NOW)
    assert decide_disable_scope(STAMP, gone) == []
    with pytest.raises(Gone):
        decide_change_scope(writing(description="x"), gone, {})
    for decide in (lambda: decide_disable_scope(STAMP, None), lambda: decide_change_scope(writing(), None, {})):
        with pytest.raises(NotFound):
            decide()


def test_scope_of_too_many_names_is_refused() -> None:
    with pytest.raises(InvalidScope):
        check_scope(" ".join(f"a{number}" for number in range(101)), {})


@pytest.mark.parametrize("network", ["192.0.2.1/24", "192.0.2.256", "", "a", "2001:db8::1/32", "192.0.2.0/33"])
def test_network_that_is_none_is_refused(network: str) -> None:
    with pytest.raises(InvalidRequest):
        check_networks((network,))


def test_networks_and_addresses_are_taken() -> None:
    check_networks(("192.0.2.0/24", "192.0.2.1", "2001:db8::/32", "::1"))
