"""The AsyncAPI document: whole in itself, and what is really sent fits it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest

from service.webhooks import messages
from tests.running import Service

PATH = "/schema/asyncapi.json"


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    answer = service.http.get(PATH)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    document: dict[str, Any] = answer.json()
    return document


def nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from nodes(value)


def resolved(document: dict[str, Any], ref: str) -> Any:
    """What a reference within the document points to (RFC 6901)."""
    assert ref.startswith("#/"), ref
    found: Any = document
    for part in ref.removeprefix("#/").split("/"):
        found = found[part]
    return found


def test_asyncapi_document_has_what_version_3_requires(document: dict[str, Any]) -> None:
    """AsyncAPI 3.0.0: Root, Info, Channel, Operation, Reply and Message Objects."""
    assert document["asyncapi"] == "3.0.0"
    assert {"title", "version"} <= document["info"].keys()
    assert document.keys() <= {"asyncapi", "info", "defaultContentType", "channels", "operations", "components"}
    for channel in document["channels"].values():
        assert channel.keys() <= {"address", "description", "parameters", "messages", "bindings"}
        named = {part[1:-1] for part in (channel["address"] or "").split(".") if part.startswith("{")}
        assert named == channel.get("parameters", {}).keys()
    for name, operation in document["operations"].items():
        assert operation["action"] in {"send", "receive"}, name
        channel = operation["channel"]["$ref"]
        assert channel.removeprefix("#/channels/") in document["channels"]
        for message in (*operation.get("messages", ()), *operation.get("reply", {}).get("messages", ())):
            assert message["$ref"].startswith(f"{channel}/messages/"), "a message of the operation's own channel"


def test_asyncapi_every_reference_leads_somewhere_and_everything_is_used(document: dict[str, Any]) -> None:
    refs = {node["$ref"] for node in nodes(document) if "$ref" in node}
    for ref in refs:
        assert isinstance(resolved(document, ref), dict), ref
    made = {f"#/components/{kind}/{name}" for kind, named in document["components"].items() for name in named}
    assert made == {ref for ref in refs if ref.startswith("#/components/")}


def fits(document: dict[str, Any], message: str, value: Any) -> None:
    schema = document["components"]["messages"][message]["payload"] | {"components": document["components"]}
    jsonschema.validate(value, schema)


def revoked(service: Service) -> dict[str, int]:
    """One revocation of each kind; the sequences by message."""
    pat, app = service.pat(), service.app(grant_types=["client_credentials", "refresh_token"])
    answer = service.grant(app)
    seqs = {
        "tokenRevoked": service.done("POST", f"/v1/tokens/{pat['token_id']}/revoke", json={"reason": "admin"}),
        "subjectRevoked": service.done("POST", "/v1/revocations", json={"subject": pat["subject"], "reason": "admin"}),
        "grantRevoked": service.done(
            "POST", "/v1/revocations", json={"token": answer["refresh_token"], "reason": "logout"}
        ),
        "clientRevoked": service.done("POST", "/v1/revocations", json={"client_id": app.client_id, "reason": "unused"}),
    }
    # A key that nobody else here uses.
    rotation = {"purpose": "id", "alg": "ES256"}
    service.done("POST", "/v1/keys/rotate", json=rotation)
    seqs["keyRevoked"] = service.done("POST", "/v1/keys/rotate", json={**rotation, "revoke": True})
    return {message: done["ledger_seq"] for message, done in seqs.items()}


def test_asyncapi_messages_are_what_the_stream_sends(service: Service, document: dict[str, Any]) -> None:
    sent = {name.removesuffix("Revoked") for name in document["channels"]["feed"]["messages"]}
    assert sent == set(document["channels"]["feed"]["parameters"]["what"]["enum"])
    seqs = revoked(service)
    assert {f"{name}Revoked" for name in sent} == seqs.keys()
    wanted, position = {seq: message for message, seq in seqs.items()}, None
    headers = {"Authorization": f"Bearer {service.admin_token}"}
    query = {"after": min(wanted) - 1}
    with httpx.stream(
        "GET", f"{service.url}/v1/revocations/stream", params=query, headers=headers, trust_env=False, timeout=60
    ) as stream:
        event = ""
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                event = value
            elif name == "data" and event == "position":
                position = json.loads(value)
                fits(document, "streamPosition", position)
            elif name == "data":
                told = json.loads(value)
                message = wanted.pop(told["data"]["ledger_seq"], None)
                if message is not None:
                    fits(document, message, told)
                    others = [one for one in seqs if one != message]
                    for other in others:
                        with pytest.raises(jsonschema.ValidationError):
                            fits(document, other, told)
            elif not line:
                event = ""
            if not wanted and position is not None:
                break
    assert wanted == {}


def test_asyncapi_messages_are_what_only_webhooks_are_sent(document: dict[str, Any]) -> None:
    issuer = "https://ledger.example"
    fits(document, "snapshotRequired", json.loads(messages.snapshot_required("feed", 3, 9, issuer).body))
    fits(document, "webhookTest", json.loads(messages.test_message("whk_1", issuer).body))
