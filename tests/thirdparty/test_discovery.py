"""The service is found from its issuer alone, and says of itself what clients accept."""

from __future__ import annotations

from typing import Any

import pytest
import requests
from requests_oauth2client import OAuth2Client

from tests.nodejs import NodeClient
from tests.running import App, Service, StartService, free_port

OPENID_CONNECT, RFC_8414 = "oidc", "oauth2"


@pytest.fixture(scope="session")  # pytest comes by this module once for each library
def tenant(service_with: StartService) -> Service:
    """Its issuer has a path. No proxy is there to take it off again, so it is asked for nothing but its metadata."""
    port = free_port()
    return service_with(port=port, workers=1, issuer=f"http://127.0.0.1:{port}/tenant")


@pytest.fixture(params=["without a path", "with a path"])
def found(request: pytest.FixtureRequest, service: Service) -> Service:
    return service if request.param == "without a path" else request.getfixturevalue("tenant")


@pytest.mark.parametrize("algorithm", [OPENID_CONNECT, RFC_8414])
def test_client_discovers_the_service(client: NodeClient, found: Service, algorithm: str) -> None:
    """OpenID Connect Discovery §4 puts the well-known path behind the issuer's, RFC 8414 §3 before it."""
    app = App("nobody", "", {"token_endpoint_auth_method": "none"})
    metadata = client.run("metadata", found, app, algorithm=algorithm)
    assert metadata["issuer"] == found.issuer
    endpoints = {name: value for name, value in metadata.items() if name.endswith(("_endpoint", "_uri"))}
    assert endpoints.keys() >= {"authorization_endpoint", "token_endpoint", "userinfo_endpoint", "jwks_uri"}
    assert [value for value in endpoints.values() if not value.startswith(f"{found.issuer}/")] == []


def test_both_documents_say_the_same(client: NodeClient, service: Service) -> None:
    app = App("nobody", "", {"token_endpoint_auth_method": "none"})
    documents: list[dict[str, Any]] = [
        client.run("metadata", service, app, algorithm=algorithm) for algorithm in (OPENID_CONNECT, RFC_8414)
    ]
    assert documents[0] == documents[1]


def test_requests_oauth2client_discovers_the_service(service: Service) -> None:
    """`testing=True` is that library's word for http, which a loopback address is allowed."""
    with requests.Session() as session:
        session.trust_env = False
        client = OAuth2Client.from_discovery_endpoint(
            issuer=service.issuer, auth="nobody", session=session, testing=True
        )
    assert client.pushed_authorization_request_endpoint == f"{service.issuer}/oauth2/par"
    assert client.authorization_response_iss_parameter_supported is True
    assert {key["use"] for key in client.authorization_server_jwks.jwks} == {"sig"}
