"""Commands about clients, users and scopes. What they append is decided in `rules/registry.py`.

Creates are prepared here and appended by `commands.commit` or `idempotency.once`; everything else is done when it
returns: durable, and in force on this host.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from events.errors import LedgerError
from events.ledger import Append
from events.types import ClientMetadata, LedgerEvent
from projections.registry import Client, Row, Scope, User, Username
from service.caller import Caller
from service.commands import Outcome, Prepared, execute, known_scopes, load_row, raw_id, refused, scope_subject, subject
from service.errors import NotFound
from service.grants import seal_text, stamp
from service.hashing import passwords
from service.rules.passwords import check_password
from service.rules.registry import (
    SCOPE_NAME_CHARS_MAX,
    ChangeClient,
    ChangeUser,
    Profile,
    RegisterClient,
    RegisterUser,
    RotateSecret,
    WriteScope,
    check_password_fits,
    check_profile,
    check_user_is_active,
    check_username_is_free,
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
)
from service.runtime import Runtime
from service.tokens import is_id, mint, new_id, sha256

R = TypeVar("R", Client, User, Scope, Username)
Load = Callable[[bool], Awaitable[R | None]]
Decide = Callable[[R | None], list[LedgerEvent]]


class Asker(Struct, frozen=True):
    """Who asks for a command, in which request. `caller` is None for the system itself."""

    caller: Caller | None
    request_id: str | None

    @property
    def by(self) -> str:
        return self.caller.token_id if self.caller else "system"


def _loader(runtime: Runtime, kind: type[R], table: str, key: bytes, of: str) -> Load[R]:
    async def load(fresh: bool) -> R | None:
        row: Row | None = await load_row(runtime, table, key, of, fresh=fresh)
        if row is None and not fresh:
            # It may have been registered a moment ago, perhaps on another host.
            await runtime.view_at_end()
            row = await load_row(runtime, table, key, of, fresh=False)
        return row if isinstance(row, kind) else None

    return load


async def _change(runtime: Runtime, of: str, load: Load[R], decide: Decide[R]) -> tuple[R, int]:
    """Executes, waits until it is in force here, and returns what now holds and its sequence."""

    def entries(row: R | None) -> list[Append]:
        events = decide(row)
        return [Append(of, event, row.seq if row is not None else 0) for event in events]

    outcome: Outcome[R | None] = await execute(runtime, load, entries)
    await runtime.applied(outcome.seq)
    row = await load(False)
    assert row is not None  # `decide` raises NotFound otherwise, and nothing registered ever goes
    return row, outcome.seq or row.seq


# Clients


def client_answer(client_id: str, metadata: ClientMetadata) -> dict[str, Any]:
    """A client's metadata as it is shown. Source: RFC 7591 §3.2.1."""
    return {"client_id": client_id, **msgspec.to_builtins(metadata)}


def _client(runtime: Runtime, client_id: str) -> tuple[str, Load[Client]]:
    if not is_id(client_id, "cli"):
        raise NotFound("there is no such client")
    of = subject("client", client_id)
    return of, _loader(runtime, Client, "client", raw_id(client_id), of)


async def find_client(runtime: Runtime, client_id: str) -> Client:
    """Raises: NotFound, Unavailable."""
    row = await _client(runtime, client_id)[1](False)
    if row is None:
        raise NotFound("there is no such client")
    return row


async def prepare_client(runtime: Runtime, asker: Asker, changes: Mapping[str, Any]) -> Prepared:
    """A new client, and the secret that is shown once. Raises: as `decide_register_client`."""
    secret = mint("cs")
    command = RegisterClient(
        stamp=stamp(asker.by, asker.request_id),
        caller=asker.caller,
        client_id=new_id("cli"),
        changes=changes,
        secret_sha256=sha256(secret).hex(),
        issuer=runtime.settings.issuer,
    )
    event = decide_register_client(command, known_scopes(runtime))
    await _key_for_id_tokens(runtime, event.metadata)
    answer = client_answer(event.client_id, event.metadata)
    answer["client_id_issued_at"] = int(event.occurred_at.timestamp())
    if event.secret_sha256 is not None:
        answer |= {"client_secret": secret, "client_secret_expires_at": 0}
    return Prepared((Append(subject("client", event.client_id), event, 0),), answer)


async def _key_for_id_tokens(runtime: Runtime, metadata: ClientMetadata) -> None:
    """The first of its kind is there before the client is: strict ones fetch the keys once, at their start."""
    if "authorization_code" in metadata.grant_types:
        await runtime.signing_keys.first_for_id_tokens(metadata.id_token_signed_response_alg)
    else:
        runtime.signing_keys.want_for_id_tokens(metadata.id_token_signed_response_alg)


async def change_client(
    runtime: Runtime, asker: Asker, client_id: str, changes: Mapping[str, Any]
) -> tuple[Client, int]:
    """Raises: as `decide_change_client`; Unavailable."""
    command = ChangeClient(
        stamp=stamp(asker.by, asker.request_id),
        caller=asker.caller,
        changes=changes,
        issuer=runtime.settings.issuer,
    )
    changed, seq = await _change(
        runtime,
        *_client(runtime, client_id),
        lambda client: decide_change_client(command, client, known_scopes(runtime)),
    )
    await _key_for_id_tokens(runtime, changed.metadata)
    return changed, seq


async def disable_client(runtime: Runtime, asker: Asker, client_id: str) -> tuple[Client, int]:
    """Ends the client and every token of it. Raises: NotFound, Unavailable."""
    mark = stamp(asker.by, asker.request_id)
    return await _change(runtime, *_client(runtime, client_id), functools.partial(decide_disable_client, mark))


async def prepare_secret(
    runtime: Runtime, asker: Asker, client_id: str, overlap_seconds: int, *, fresh: bool
) -> Prepared:
    """A new secret for a client; the one before it ends after the overlap. Raises: as `decide_rotate_secret`."""
    of, load = _client(runtime, client_id)
    client = await load(fresh)
    secret = mint("cs")
    command = RotateSecret(
        stamp=stamp(asker.by, asker.request_id),
        caller=asker.caller,
        secret_sha256=sha256(secret).hex(),
        overlap=timedelta(seconds=overlap_seconds),
    )
    event = decide_rotate_secret(command, client)
    answer = {
        "client_id": client_id,
        "client_secret": secret,
        "client_secret_expires_at": 0,
        "previous_ends_at": event.previous_ends_at,
    }
    return Prepared((Append(of, event, client.seq if client else 0),), msgspec.to_builtins(answer))


# Users


class NewUser(Struct, frozen=True, kw_only=True):
    """Who is to be registered."""

    kind: Literal["person", "service"]
    profile: Profile
    scope: str
    password: str | None = None


def _user(runtime: Runtime, user_id: str) -> tuple[str, Load[User]]:
    if not is_id(user_id, "usr"):
        raise NotFound("there is no such user")
    of = subject("user", user_id)
    return of, _loader(runtime, User, "user", raw_id(user_id), of)


async def find_user_by_id(runtime: Runtime, user_id: str) -> User:
    """Raises: NotFound, Unavailable."""
    row = await _user(runtime, user_id)[1](False)
    if row is None:
        raise NotFound("there is no such user")
    return row


async def find_user_by_name(runtime: Runtime, username: str) -> User | None:
    """Whoever has the username and was not erased. Raises: Unavailable."""
    name_hash = runtime.master.username_hash(username)
    of = subject("username", name_hash)
    row = await _loader(runtime, Username, "username", name_hash.encode(), of)(False)
    user = runtime.view.user(row.user_id) if row is not None else None
    return user if user is not None and user.erased_at is None else None


def subject_id(runtime: Runtime, name: str) -> str | None:
    """The id of whom a filter names by user id, client id or username; None if the view knows no such username."""
    if is_id(name, "usr") or is_id(name, "cli"):
        return name
    row = runtime.view.row("username", runtime.master.username_hash(name).encode())
    return row.user_id if isinstance(row, Username) else None


def user_registration(runtime: Runtime, asker: Asker, new: NewUser) -> Callable[[bool], Awaitable[Prepared]]:
    """What prepares a new user; the password is hashed once, however often it is called.

    It raises: as `decide_register_user`; Unavailable.
    """
    hashed: list[str] = []

    async def prepare(fresh: bool) -> Prepared:
        check_profile(new.profile)
        check_password_fits(new.kind, given=new.password is not None)
        if new.password is not None:
            check_password(new.password)
        name_hash = runtime.master.username_hash(new.profile.username)
        taken = await load_row(runtime, "username", name_hash.encode(), subject("username", name_hash), fresh=fresh)
        claimed = taken if isinstance(taken, Username) else None
        # A name that is taken makes no key for somebody who will never be.
        check_username_is_free(claimed)
        if new.password is not None and not hashed:
            hashed.append(await passwords.make(new.password))
        user_id = new_id("usr")
        command = RegisterUser(
            stamp=stamp(asker.by, asker.request_id, events=2),
            caller=asker.caller,
            user_id=user_id,
            kind=new.kind,
            username_hash=name_hash,
            sealed_profile=await _sealed(runtime, user_id, new.profile),
            scope=new.scope,
            password_hash=hashed[0] if hashed else None,
        )
        user, username = decide_register_user(command, claimed, known_scopes(runtime))
        entries = (
            Append(subject("username", name_hash), username, 0),
            Append(subject("user", user_id), user, 0),
        )
        answer = {
            "user_id": user_id,
            "kind": user.kind,
            **msgspec.to_builtins(new.profile),
            "scope": user.scope,
            "has_password": user.password_hash is not None,
        }
        return Prepared(entries, answer)

    return prepare


async def _sealed(runtime: Runtime, user_id: str, profile: Profile) -> bytes:
    sealed = await seal_text(runtime, user_id, msgspec.json.encode(profile).decode(), "profile")
    assert sealed is not None
    return sealed


async def read_sealed(runtime: Runtime, owner: str, sealed: bytes | None, context: str) -> str | None:
    """What was sealed about a person or client, or None if there is nothing or the person was erased.

    Raises: Unavailable.
    """
    if not sealed:
        return None
    user = runtime.view.user(owner)
    if user is not None and user.erased_at is not None:
        # The key may have been destroyed by another worker, and must not live on in this one's memory.
        runtime.subject_keys.forget(owner)
        return None
    try:
        return await runtime.subject_keys.unseal(owner, sealed, context)
    except LedgerError as error:
        raise refused(error) from error


async def profile_of(runtime: Runtime, user: User) -> Profile | None:
    """None for a user who was erased. Raises: Unavailable."""
    text = await read_sealed(runtime, user.user_id, user.sealed_profile, "profile")
    return msgspec.json.decode(text, type=Profile) if text is not None else None


class UserChange(Struct, frozen=True, kw_only=True):
    """`profile`: members to set, None to take away. `password` None takes it away, if it is among `names`."""

    names: frozenset[str]
    profile: Mapping[str, str | None]
    scope: str | None = None
    password: str | None = None


async def change_user(runtime: Runtime, asker: Asker, user_id: str, change: UserChange) -> tuple[User, int]:
    """Raises: as `decide_change_user`; Unavailable."""
    of, load = _user(runtime, user_id)
    # Before anything is hashed or sealed for somebody who is not there, or not any more.
    user = check_user_is_active(await load(False))
    check_password_fits(user.kind, given=change.password is not None)
    if change.password is not None:
        check_password(change.password)
    command = ChangeUser(
        stamp=stamp(asker.by, asker.request_id, events=2),
        caller=asker.caller,
        scope=(change.scope or "") if "scope" in change.names else None,
        sets_password="password" in change.names,
        password_hash=await passwords.make(change.password) if change.password is not None else None,
    )
    profiles: dict[int, bytes | None] = {}

    async def load_and_seal(fresh: bool) -> User | None:
        row = await load(fresh)
        if row is not None and row.disabled_at is None and row.seq not in profiles:
            profiles[row.seq] = await _changed_profile(runtime, row, change.profile)
        return row

    def decide(row: User | None) -> list[LedgerEvent]:
        sealed = profiles.get(row.seq) if row is not None else None
        return decide_change_user(replace(command, sealed_profile=sealed), row, known_scopes(runtime))

    return await _change(runtime, of, load_and_seal, decide)


async def _changed_profile(runtime: Runtime, user: User, members: Mapping[str, str | None]) -> bytes | None:
    old = await profile_of(runtime, user) if members else None
    if old is None:
        return None
    new = replace(old, **members)
    check_profile(new)
    return await _sealed(runtime, user.user_id, new) if new != old else None


async def disable_user(runtime: Runtime, asker: Asker, user_id: str, *, erase: bool) -> tuple[User, int]:
    """Ends the user and every token of theirs; with `erase`, also makes what is known of them unreadable.

    The key is destroyed before the erasure is recorded: what the log says is then true, and a call that was cut off
    is completed by the next. Raises: NotFound, Unavailable.
    """
    of, load = _user(runtime, user_id)
    mark = stamp(asker.by, asker.request_id, events=2)
    user, seq = await _change(runtime, of, load, functools.partial(decide_disable_user, mark))
    if not erase:
        return user, seq
    await _destroy_key(runtime, user_id)
    erasure = replace(mark, ids=mark.ids[1:])
    user, seq = await _change(runtime, of, load, functools.partial(decide_erase_user, erasure))
    # Somebody may have sealed something for the user in between, and so made a new key.
    await _destroy_key(runtime, user_id)
    return user, seq


async def _destroy_key(runtime: Runtime, owner: str) -> None:
    try:
        await runtime.subject_keys.destroy(owner)
    except LedgerError as error:
        raise refused(error) from error


# Scopes


class ScopeFields(Struct, frozen=True, kw_only=True):
    """None for what was not given."""

    description: str | None = None
    audience: tuple[str, ...] | None = None
    implies: tuple[str, ...] | None = None


def scope_answer(name: str, description: str, audience: tuple[str, ...], implies: tuple[str, ...]) -> dict[str, Any]:
    """A scope as it is shown."""
    return {"name": name, "description": description, "audience": list(audience), "implies": list(implies)}


def _scope(runtime: Runtime, name: str) -> tuple[str, Load[Scope]]:
    if not name.isascii() or not 0 < len(name) <= SCOPE_NAME_CHARS_MAX:
        raise NotFound("there is no such scope")
    return scope_subject(name), _loader(runtime, Scope, "scope", name.encode(), scope_subject(name))


def _write_scope(asker: Asker, name: str, fields: ScopeFields) -> WriteScope:
    mark = stamp(asker.by, asker.request_id)
    return WriteScope(
        stamp=mark, name=name, description=fields.description, audience=fields.audience, implies=fields.implies
    )


async def prepare_scope(runtime: Runtime, asker: Asker, name: str, fields: ScopeFields, *, fresh: bool) -> Prepared:
    """A new scope. Raises: as `decide_register_scope`."""
    of = scope_subject(name)
    row = await load_row(runtime, "scope", name.encode(), of, fresh=fresh)
    scope = row if isinstance(row, Scope) else None
    event = decide_register_scope(_write_scope(asker, name, fields), scope, known_scopes(runtime))
    return Prepared((Append(of, event, 0),), scope_answer(name, event.description, event.audience, event.implies))


async def change_scope(runtime: Runtime, asker: Asker, name: str, fields: ScopeFields) -> tuple[Scope, int]:
    """Raises: as `decide_change_scope`; Unavailable."""
    command = _write_scope(asker, name, fields)
    return await _change(
        runtime, *_scope(runtime, name), lambda scope: decide_change_scope(command, scope, known_scopes(runtime))
    )


async def disable_scope(runtime: Runtime, asker: Asker, name: str) -> tuple[Scope, int]:
    """Nobody is granted the scope any more. Raises: NotFound, Unavailable."""
    mark = stamp(asker.by, asker.request_id)
    return await _change(runtime, *_scope(runtime, name), functools.partial(decide_disable_scope, mark))
