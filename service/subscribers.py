"""Subscribers: enforcement points that are registered to follow the feed, and what each of them needs for it.

One that follows over NATS has a durable consumer of REVOCATIONS that is named like it, and an nkey by which it may ask
for nothing else. The ledger says who is registered; consumers and the nats-server's users follow from that and are made
again where they are missing. A consumer that was lost begins again where the first one began: what its subscriber has
applied already comes a second time, and nothing is passed over.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import nats.errors
import structlog
from msgspec import Struct

from events.accounts import SUBSCRIBERS_CHANGED
from events.errors import LedgerError, LedgerUnavailable
from events.ledger import Append, Ledger
from events.server import new_nkey
from events.streams import REVOCATIONS, Connection
from projections.registry import Client, User
from service.caller import Caller
from service.commands import Outcome, Prepared, execute, refused, subject
from service.errors import NotFound, ServiceError, Unavailable
from service.feed import CursorTooOld
from service.grants import stamp
from service.registry import Asker, find_client, find_user_by_id
from service.rules.subscribers import (
    RegisterSubscriber,
    Removed,
    State,
    Subscriber,
    Transport,
    check_registration,
    decide_register,
    decide_remove,
    may_act_for,
    may_see,
    subscriber_of,
)
from service.runtime import Runtime
from service.tokens import is_id, new_id

log = structlog.get_logger()

ACK_WAIT_SECONDS = 10  # after that, what was fetched and not acknowledged comes again
ACK_PENDING_MAX = 1_000
REQUESTS_WAITING_MAX = 64
BATCH_MAX = 1_000
REQUEST_SECONDS_MAX = 300
API_PREFIX = "L.API"  # of what account APPS imports, instead of $JS.API
KEEP_SECONDS = 30.0
_OPERATORS_SERVERS = (
    "the nats-servers are not the service's own: write their configuration anew with `token-ledger subscriber list "
    "--all -o json` and `token-ledger nats-config --subscribers`, and have each server reload it"
)
_NEWS_MAX = 10_000
_KNOWN_SECONDS = 1.0
_KNOWN_MAX = 10_000
_API_SECONDS_MAX = 5.0
_IN_FORCE_SECONDS_MAX = 25.0  # what the server is given to check its new configuration and to take it
_NOBODY_ANSWERS_SECONDS = 4.0  # an embedded server's supervisor may be connecting again
_NS = 1_000_000_000
_CONSUMER_EXISTS, _CONSUMER_UNKNOWN = 10148, 10014


class NewSubscriber(Struct, frozen=True, kw_only=True):
    """Who is to be registered. `owner` None: who asks. `after` None: what is announced from now on."""

    name: str
    transport: Transport
    owner: str | None
    after: int | None


class Backlog(Struct, frozen=True, kw_only=True):
    """What a consumer still has for its subscriber: not delivered yet, and delivered but not acknowledged."""

    pending: int
    ack_pending: int


# Registering


async def prepare_subscriber(runtime: Runtime, asker: Asker, new: NewSubscriber) -> Prepared:
    """A new subscriber and, for NATS, the seed that is shown once.

    Raises: InvalidRequest, NotFound, Gone, LimitReached, CursorTooOld, Unavailable.
    """
    check_registration(new.name, new.transport, after=new.after)
    owner_id = new.owner or (asker.caller.subject if asker.caller is not None else "")
    owner = await _owner(runtime, owner_id)
    seed, public_key = new_nkey() if new.transport == "nats" else (None, None)
    command = RegisterSubscriber(
        stamp=stamp(asker.by, asker.request_id),
        subscriber_id=new_id("sub"),
        name=new.name,
        transport=new.transport,
        owner=owner_id,
        public_key=public_key,
        after=await _begins_after(runtime, new),
    )
    event = decide_register(command, owner, len(await registered(runtime)))
    answer: dict[str, Any] = {
        "subscriber_id": event.subscriber_id,
        "name": event.subscriber_name,
        "transport": event.transport,
        "owner": event.owner,
    }
    if public_key is not None:
        access = nats_access(runtime, event.subscriber_id)
        answer |= {"public_key": public_key, "after": event.after, "nats_seed": seed} | access
    return Prepared((Append(subject("subscriber", event.subscriber_id), event, 0),), answer)


def nats_access(runtime: Runtime, subscriber_id: str) -> dict[str, str]:
    """What a NATS client of the subscriber must be told besides its seed."""
    return {
        "nats_url": runtime.settings.subscriber_nats_url or runtime.settings.nats_url or "",
        "stream": REVOCATIONS,
        "consumer": subscriber_id,
        "api_prefix": API_PREFIX,
        "inbox_prefix": f"_INBOX_{subscriber_id}",
    }


async def _owner(runtime: Runtime, owner: str) -> User | Client | None:
    try:
        if is_id(owner, "cli"):
            return await find_client(runtime, owner)
        return await find_user_by_id(runtime, owner)
    except NotFound:
        return None


async def _begins_after(runtime: Runtime, new: NewSubscriber) -> int:
    """The ledger sequence that the subscriber's consumer begins after. Raises: CursorTooOld, FeedChanged."""
    if new.transport != "nats":
        return 0
    await runtime.feed.start()
    if new.after is None:
        # What has been announced since the position was last known.
        return (await runtime.feed.read(runtime.feed.position.ledger_seq, _NEWS_MAX)).reached
    await runtime.feed.read(new.after, 1)  # refuses what lies too far back, or beyond the log's end
    return new.after


async def put_in_force(runtime: Runtime, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Makes what a subscriber just registered needs, by the answer to that, and says whether all of it is there.

    It is registered whatever happens here, and its seed is told only once: so nothing is raised.
    """
    name = answer["subscriber_id"]
    try:
        # A registration that is repeated may be about one that was removed since.
        if isinstance(await _load(runtime, name), Removed):
            return {"in_force": False, "to_do": "it was removed since; register another"}
        if answer["transport"] == "nats":
            await make_consumer(runtime, name, answer["after"])
            return in_force(await _tell_server(runtime))
    except ServiceError as error:
        log.warning("subscriber_not_in_force", subscriber=name, why=error.detail, private=error.private)
        return {"in_force": False, "to_do": f"{error.detail}; it is tried again every {KEEP_SECONDS:.0f} s"}
    return in_force(True)


def in_force(done: bool) -> dict[str, Any]:
    """What an answer says of it: not done where the nats-servers are not the service's own."""
    return {"in_force": True} if done else {"in_force": False, "to_do": _OPERATORS_SERVERS}


async def remove_subscriber(runtime: Runtime, asker: Asker, subscriber_id: str) -> dict[str, Any]:
    """Ends the subscriber, its credentials and its consumer.

    Raises: NotFound; Unavailable, after which it may be repeated.
    """
    of = subject("subscriber", _checked(subscriber_id))
    mark = stamp(asker.by, asker.request_id)

    async def load(_: bool) -> State | None:
        return await _load(runtime, subscriber_id)

    def decide(state: State | None) -> list[Append]:
        return [Append(of, event, state.seq) for event in decide_remove(mark, state) if state is not None]

    outcome: Outcome[State | None] = await execute(runtime, load, decide)
    assert outcome.state is not None  # `decide_remove` raises NotFound otherwise
    seq = outcome.seq or outcome.state.seq
    await runtime.applied(seq)
    runtime.subscribers.pop(subscriber_id, None)
    answer: dict[str, Any] = {"subscriber_id": subscriber_id, "ledger_seq": seq}
    if isinstance(outcome.state, Subscriber) and outcome.state.transport == "http":
        return answer | in_force(True)
    done = await _tell_server(runtime)
    await _delete_consumer(runtime.nc, subscriber_id)
    return answer | in_force(done)


# Looking


def _checked(subscriber_id: str) -> str:
    if not is_id(subscriber_id, "sub"):
        raise NotFound("there is no such subscriber")
    return subscriber_id


async def _load(runtime: Runtime, subscriber_id: str) -> State | None:
    """Raises: Unavailable."""
    try:
        return subscriber_of(await runtime.ledger.read(subject("subscriber", subscriber_id)))
    except LedgerError as error:
        raise refused(error) from error


async def find_subscriber(runtime: Runtime, subscriber_id: str) -> Subscriber:
    """Raises: NotFound, Unavailable."""
    match await _load(runtime, _checked(subscriber_id)):
        case Subscriber() as subscriber:
            return subscriber
        case Removed():
            raise NotFound("the subscriber was removed")
        case None:
            raise NotFound("there is no such subscriber")


async def all_states(ledger: Ledger) -> list[State]:
    """What became of everyone who was ever registered. Raises: LedgerError."""
    states = [subscriber_of([recorded]) for recorded in await ledger.last_of(subject("subscriber", "*"))]
    return [state for state in states if state is not None]


async def registered(runtime: Runtime) -> list[Subscriber]:
    """All subscribers that were not removed, the oldest first. Raises: Unavailable."""
    try:
        found = [state for state in await all_states(runtime.ledger) if isinstance(state, Subscriber)]
    except LedgerError as error:
        raise refused(error) from error
    return sorted(found, key=lambda subscriber: subscriber.subscriber_id)


async def seen_by(runtime: Runtime, caller: Caller) -> list[Subscriber]:
    """Those that the caller may see. Raises: Unavailable."""
    return [subscriber for subscriber in await registered(runtime) if may_see(caller, subscriber)]


async def shown_to(runtime: Runtime, caller: Caller, subscriber_id: str) -> Subscriber:
    """Raises: NotFound, also for what the caller may not see; Unavailable."""
    subscriber = await find_subscriber(runtime, subscriber_id)
    if not may_see(caller, subscriber):
        raise NotFound("there is no such subscriber")
    return subscriber


async def acting_subscriber(runtime: Runtime, caller: Caller, subscriber_id: str) -> Subscriber:
    """The subscriber that the caller speaks for: its owner does, and who holds `ledger:admin`.

    What was read within the last second is not read again. Raises: NotFound, also for another's; Unavailable.
    """
    read_at, subscriber = runtime.subscribers.get(subscriber_id, (0.0, None))
    if subscriber is None or time.monotonic() - read_at > _KNOWN_SECONDS:
        runtime.subscribers.pop(subscriber_id, None)
        subscriber = await find_subscriber(runtime, subscriber_id)
        if len(runtime.subscribers) >= _KNOWN_MAX:
            runtime.subscribers.clear()
        runtime.subscribers[subscriber_id] = (time.monotonic(), subscriber)
    if not may_act_for(caller, subscriber):
        raise NotFound(
            "there is no such subscriber that you may act for",
            fix="use a token of the subscriber's owner, whom `token-ledger subscriber show` names",
        )
    return subscriber


# What the nats-server must have


async def make_consumer(runtime: Runtime, name: str, after: int) -> None:
    """Makes a subscriber's consumer, which begins after this sequence, if it is not there. Raises: Unavailable."""
    try:
        start = await runtime.feed.stream_seq_after(after)
    except CursorTooOld:
        log.warning("subscriber_consumer_begins_late", subscriber=name, after=after)
        start = 1  # the server begins with the oldest that it has; what is missing shows by the first sequence
    except LedgerUnavailable as error:
        raise Unavailable("the feed of revocations cannot be read", private=str(error)) from error
    config = {
        "name": name,
        "durable_name": name,
        "deliver_policy": "by_start_sequence",
        "opt_start_seq": start,
        "ack_policy": "explicit",
        "ack_wait": ACK_WAIT_SECONDS * _NS,
        "max_deliver": -1,
        "max_ack_pending": ACK_PENDING_MAX,
        "max_waiting": REQUESTS_WAITING_MAX,
        "max_batch": BATCH_MAX,
        "max_expires": REQUEST_SECONDS_MAX * _NS,
    }
    body = {"stream_name": REVOCATIONS, "action": "create", "config": config}
    await _api(runtime.nc, f"CREATE.{REVOCATIONS}.{name}", body, known=(_CONSUMER_EXISTS,))


async def backlog(runtime: Runtime, subscriber: Subscriber) -> Backlog:
    """Of a subscriber over NATS; its consumer is made again if it is missing. Raises: Unavailable."""
    info = f"INFO.{REVOCATIONS}.{subscriber.subscriber_id}"
    answer = await _api(runtime.nc, info, known=(_CONSUMER_UNKNOWN,))
    if "error" in answer:
        await make_consumer(runtime, subscriber.subscriber_id, subscriber.after)
        answer = await _api(runtime.nc, info)
    return Backlog(pending=answer["num_pending"], ack_pending=answer["num_ack_pending"])


async def keep_consumers(runtime: Runtime) -> None:
    """For ever: makes consumers that are missing, and ends those of who was removed.

    A stream that was made anew has none, and a process may have died between two steps.
    """
    while True:
        try:
            await _check_consumers(runtime)
        except (ServiceError, LedgerError) as error:
            log.warning("subscriber_consumers_not_checked", why=str(error))
        await asyncio.sleep(KEEP_SECONDS)


async def _check_consumers(runtime: Runtime) -> None:
    states = await all_states(runtime.ledger)
    there = await _consumer_names(runtime.nc) if states else set()
    for state in states:
        name = state.subscriber_id
        if isinstance(state, Removed):
            if name in there:
                await _delete_consumer(runtime.nc, name)
        elif state.transport == "nats" and name not in there:
            log.warning("subscriber_consumer_made_again", subscriber=name)
            await make_consumer(runtime, name, state.after)


async def _delete_consumer(nc: Connection, name: str) -> None:
    await _api(nc, f"DELETE.{REVOCATIONS}.{name}", known=(_CONSUMER_UNKNOWN,))


async def _consumer_names(nc: Connection) -> set[str]:
    names: set[str] = set()
    while True:
        answer = await _api(nc, f"NAMES.{REVOCATIONS}", {"offset": len(names)})
        names.update(answer["consumers"] or ())
        if not answer["consumers"] or len(names) >= answer["total"]:
            return names


async def _api(
    nc: Connection, what: str, body: dict[str, Any] | None = None, *, known: tuple[int, ...] = ()
) -> dict[str, Any]:
    """The answer of `$JS.API.CONSUMER.<what>`; an error of the kinds that are `known` is one. Raises: Unavailable."""
    data = json.dumps(body).encode() if body is not None else b""
    try:
        reply = await nc.request(f"$JS.API.CONSUMER.{what}", data, timeout=_API_SECONDS_MAX)
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise Unavailable("the nats-server does not answer", private=f"{what}: {error!r}") from error
    answer: dict[str, Any] = json.loads(reply.data)
    if "error" in answer and answer["error"].get("err_code") not in known:
        raise Unavailable("the nats-server refuses the consumer", private=f"{what}: {answer['error']}")
    return answer


class ServerAnswer(Struct, frozen=True, kw_only=True):
    """What whoever runs the embedded server says: how many it lets in, or what went wrong."""

    admitted: int = 0
    error: str | None = None


async def _tell_server(runtime: Runtime) -> bool:
    """Has the embedded nats-server let in who is registered, and nobody else. False: it is not ours to change.

    Raises: Unavailable.
    """
    deadline = time.monotonic() + _NOBODY_ANSWERS_SECONDS
    while True:
        try:
            reply = await runtime.nc.request(SUBSCRIBERS_CHANGED, b"", timeout=_IN_FORCE_SECONDS_MAX)
            break
        except nats.errors.NoRespondersError:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.1)
        except (nats.errors.Error, TimeoutError, OSError) as error:
            raise _not_in_force(repr(error)) from error
    answer = msgspec.json.decode(reply.data, type=ServerAnswer)
    if answer.error is not None:
        raise _not_in_force(answer.error)
    return True


def _not_in_force(why: str) -> Unavailable:
    return Unavailable("it is recorded, and the nats-server has not taken it over yet", private=why)
