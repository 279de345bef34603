"""Who may do what at the nats-server: its accounts, its users and their permissions.

- MAIN has JetStream. `admin` makes streams and buckets, `service` appends and reads, `projector` follows.
- APPS has none. Registered subscribers ask there, each for its own durable consumer on REVOCATIONS, through imports:
  the server checks no reply subjects, and in MAIN the answer to a request with a crafted one would be stored in LEDGER.
  An account for each of them would part them even more, but one that a reload adds does not get its imports.
- SYS has no user. It exports VARZ, by which everyone in MAIN sees whether the server syncs before it acknowledges, and
  to `admin` the connections in APPS.

For the same reason the roles within MAIN guard against mistakes and keep configuration in one hand; they are no
wall between processes of which one is hostile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from events.streams import (
    DELIVERIES,
    LEDGER,
    RECEIPTS,
    REVOCATIONS,
    SIGNING_KEYS,
    SUBJECT_KEYS,
    USAGE,
    WEBHOOKS,
    StreamLimits,
    stream_configs,
)
from events.types import TENANT

ROLES = ("admin", "service", "projector")
SUBSCRIBERS_CHANGED = "subscribers.changed"  # asked of who runs the embedded server, once the ledger has the change
SUBSCRIBERS_CONNECTED = "subscribers.connected"  # asked of the server: the connections in APPS
SUBSCRIBER_CONNECTIONS_MAX = 512  # so that subscribers cannot take the places of API and projectors


def accounts(public_keys: Mapping[str, str], subscribers: Mapping[str, str]) -> dict[str, Any]:
    """The accounts with their users: `public_keys` by role, `subscribers` by id."""
    varz = "$SYS.REQ.SERVER.PING.VARZ"
    connections = "$SYS.REQ.ACCOUNT.APPS.CONNZ"
    info = f"$JS.API.CONSUMER.INFO.{REVOCATIONS}.*"
    fetch = f"$JS.API.CONSUMER.MSG.NEXT.{REVOCATIONS}.*"
    acknowledge = f"$JS.ACK.{REVOCATIONS}.>"
    # CONSUMER.CREATE is not exported: the body of such a request may name any deliver subject.
    exports = [
        {"service": info, "accounts": ["APPS"]},
        {"service": fetch, "response_type": "stream", "accounts": ["APPS"]},
        {"service": acknowledge, "accounts": ["APPS"]},
        # Not the subject of the process that announces, whom subscribers could keep from it by asking.
        {"service": "feed.asked", "accounts": ["APPS"]},
    ]
    main_users = [
        _user(public_keys["admin"], "admin", publish=_admin_publishes(), subscribe=[SUBSCRIBERS_CHANGED]),
        # `findings.act`: the analytics process asks it to act on findings, and it answers. `webhooks.status`: workers
        # ask those that deliver how they are getting on.
        _user(
            public_keys["service"],
            "service",
            publish=_service_publishes(),
            subscribe=["findings.act", "webhooks.status"],
        ),
        _user(
            public_keys["projector"],
            "projector",
            publish=_projector_publishes(),
            # What subscribers acknowledge and ask for passes here: that is how their receipts are known.
            subscribe=["analytics.>", "$SRV.>", "feed.>", f"$JS.ACK.{REVOCATIONS}.>", fetch],
        ),
    ]
    return {
        "MAIN": {
            "jetstream": "enabled",
            "users": main_users,
            "imports": [
                {"service": {"account": "SYS", "subject": varz}, "to": "sync.check"},
                {"service": {"account": "SYS", "subject": connections}, "to": SUBSCRIBERS_CONNECTED},
            ],
            "exports": exports,
        },
        "APPS": {
            "limits": {"max_connections": SUBSCRIBER_CONNECTIONS_MAX},
            "users": [
                _user(public_key, subscriber, publish=_subscriber_publishes(subscriber))
                for subscriber, public_key in sorted(subscribers.items())
            ],
            # Not under $JS.API itself, which the server refuses (10039): clients set the prefix L.API.
            "imports": [
                {"service": {"account": "MAIN", "subject": info}, "to": info.replace("$JS.", "L.")},
                {"service": {"account": "MAIN", "subject": fetch}, "to": fetch.replace("$JS.", "L.")},
                {"service": {"account": "MAIN", "subject": acknowledge}},
                {"service": {"account": "MAIN", "subject": "feed.asked"}, "to": "feed.position"},
            ],
        },
        # `stream`: every server of a cluster answers, not only the first.
        "SYS": {
            "exports": [
                {"service": subject, "response_type": "stream", "accounts": ["MAIN"]} for subject in (varz, connections)
            ]
        },
    }


def _user(public_key: str, name: str, *, publish: Iterable[str], subscribe: Iterable[str] = ()) -> dict[str, Any]:
    # Nobody hears the answers that another is given.
    return {
        "nkey": public_key,
        "permissions": {
            "publish": {"allow": list(publish)},
            "subscribe": {"allow": [f"_INBOX_{name}.>", *subscribe]},
        },
    }


def _all_streams() -> list[str]:
    return list(stream_configs(StreamLimits()))


def _reads_directly(stream: str) -> list[str]:
    """Single and batched direct gets, by sequence or subject, and gets that the stream's leader answers."""
    return [
        f"$JS.API.DIRECT.GET.{stream}",
        f"$JS.API.DIRECT.GET.{stream}.>",
        f"$JS.API.STREAM.MSG.GET.{stream}",
    ]


def _follows(stream: str, subjects: str) -> list[str]:
    """Named consumers on the subjects of a stream or some of them, pushed with flow control or pulled."""
    return [
        f"$JS.API.CONSUMER.CREATE.{stream}.*.{subjects}",
        f"$JS.API.CONSUMER.INFO.{stream}.*",
        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.*",
        f"$JS.FC.{stream}.>",
    ]


def _admin_publishes() -> list[str]:
    return ["$JS.API.>", "sync.check", SUBSCRIBERS_CONNECTED, "analytics.>", "feed.>", "$SRV.>", "_INBOX_service.>"]


def _service_publishes() -> list[str]:
    buckets = [name for name in _all_streams() if name.startswith("KV_")]
    allowed = ["ledger.>", "usage.>", "sync.check", "analytics.>", "$SRV.>", "$JS.API.INFO"]
    # Answers to the analytics process, and those of the process that delivers webhooks to workers.
    allowed += ["_INBOX_projector.>", "_INBOX_service.>"]
    allowed += [f"$JS.API.STREAM.INFO.{name}" for name in _all_streams()]
    allowed += _reads_directly(LEDGER) + _follows(LEDGER, "ledger.>")
    # Ends of sessions and consents are looked at by one worker of all.
    allowed += [f"$JS.API.CONSUMER.DURABLE.CREATE.{LEDGER}.endings", f"$JS.ACK.{LEDGER}.endings.>"]
    # The feed is handed on over HTTP and to webhooks, whose consumers, as those of subscribers, are made here.
    allowed += _reads_directly(REVOCATIONS) + _follows(REVOCATIONS, "revocations.>")
    allowed += [
        f"$JS.API.CONSUMER.CREATE.{REVOCATIONS}.*",
        f"$JS.API.CONSUMER.DURABLE.CREATE.{REVOCATIONS}.*",
        f"$JS.API.CONSUMER.DELETE.{REVOCATIONS}.*",
        f"$JS.API.CONSUMER.NAMES.{REVOCATIONS}",
        f"$JS.API.CONSUMER.LIST.{REVOCATIONS}",
        f"$JS.ACK.{REVOCATIONS}.>",
        "feed.>",
        SUBSCRIBERS_CHANGED,
        "receipts.>",
        "deliveries.>",
        "webhooks.status",
        *_reads_directly(DELIVERIES),
    ]
    for bucket in buckets:
        keys = f"$KV.{bucket.removeprefix('KV_')}.>"
        allowed += [keys, *_reads_directly(bucket), *_follows(bucket, keys)]
    # A deleted message is overwritten on disk: that is how the key of an erased subject goes, and one that
    # signed.
    allowed += [f"$JS.API.STREAM.MSG.DELETE.KV_{bucket}" for bucket in (SUBJECT_KEYS, SIGNING_KEYS, WEBHOOKS)]
    return allowed


def _projector_publishes() -> list[str]:
    allowed = [f"ledger.{TENANT}.finding.>", "revocations.>", "receipts.>", "sync.check", "$JS.API.INFO"]
    allowed += [f"$JS.API.STREAM.INFO.{name}" for name in _all_streams()]
    allowed += _follows(LEDGER, "ledger.>") + _follows(USAGE, "usage.>") + _follows(RECEIPTS, "receipts.>")
    # The feed asks what it published last. `allow_responses` instead of the inboxes would make the server remember
    # every message that it delivers with a reply subject, and those of a consumer all have one.
    allowed += _reads_directly(REVOCATIONS) + _follows(REVOCATIONS, "revocations.>")
    # Questions of subscribers come with a reply subject of the import's own, `_R_.`.
    allowed += ["_INBOX_service.>", "_INBOX_admin.>", "_R_.>", "feed.position"]
    # A finding that is appended again is looked up; what it could read so, it follows anyway.
    allowed += [f"$JS.API.DIRECT.GET.{LEDGER}", "findings.act"]
    # A health check asks the analytics process with the credentials that its container has.
    allowed += ["analytics.status", "_INBOX_projector.>"]
    return allowed


def _subscriber_publishes(subscriber: str) -> list[str]:
    return [
        f"L.API.CONSUMER.INFO.{REVOCATIONS}.{subscriber}",
        f"L.API.CONSUMER.MSG.NEXT.{REVOCATIONS}.{subscriber}",
        f"$JS.ACK.{REVOCATIONS}.{subscriber}.>",
        "feed.position",
    ]
