"""Settings: read once, checked whole, refused precisely. Requirement: STYLE §9, CONTRACT "Commands"."""

from __future__ import annotations

import base64
import ipaddress
import os
import re
from pathlib import Path

import msgspec
import pytest

from service import settings as module
from service.settings import Secret, Settings, SettingsError

KEY = bytes(range(32))


def problems(environ: dict[str, str], overrides: dict[str, object] | None = None) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        Settings.load(environ, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_settings_nothing_given_have_the_documented_defaults() -> None:
    settings = Settings.load({})
    assert settings == Settings()
    assert settings.host == "127.0.0.1"
    assert settings.port == 8080
    assert settings.data_dir == Path("data")
    assert settings.workers == module.cpu_count()
    assert settings.use_recording == "durable"
    assert settings.issuer == "http://127.0.0.1:8080"
    assert settings.nats_url is None
    assert settings.view_staleness_seconds_max == 5
    assert settings.refresh_retry_window_seconds == 10
    assert settings.usage_retention_days == 400
    assert settings.usage_bytes_max == 16 * 1024**3
    assert settings.ledger_bytes_max is None
    assert settings.signing_algorithms == ("EdDSA",)
    assert settings.master_key is None


def test_settings_of_the_process_are_read_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(module.PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TOKEN_LEDGER_PORT", "9000")
    assert Settings.load().port == 9000


def test_settings_issuer_by_default_follows_the_port() -> None:
    assert Settings.load({"TOKEN_LEDGER_PORT": "9001"}).issuer == "http://127.0.0.1:9001"


def test_settings_staleness_by_default_follows_the_recording_mode() -> None:
    assert Settings.load({"TOKEN_LEDGER_USE_RECORDING": "buffered"}).view_staleness_seconds_max == 300
    given = {"TOKEN_LEDGER_USE_RECORDING": "buffered", "TOKEN_LEDGER_VIEW_STALENESS_SECONDS_MAX": "7"}
    assert Settings.load(given).view_staleness_seconds_max == 7


def test_settings_a_flag_wins_over_the_environment_and_an_absent_flag_does_not() -> None:
    environ = {"TOKEN_LEDGER_PORT": "9000", "TOKEN_LEDGER_HOST": "10.0.0.1"}
    settings = Settings.load(environ, {"port": 9100, "host": None})
    assert (settings.port, settings.host) == (9100, "10.0.0.1")


def test_settings_a_wrong_flag_is_named_as_the_flag() -> None:
    (problem,) = problems({"TOKEN_LEDGER_PORT": "9000"}, {"port": 0})
    assert problem == "--port is '0' and must be a whole number from 1 to 65535"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        pytest.param("host", "::1", "::1", id="host-ipv6"),
        pytest.param("host", "ledger-1.internal", "ledger-1.internal", id="host-name"),
        pytest.param("port", "65535", 65535, id="port-largest"),
        pytest.param("data_dir", "/srv/ledger", Path("/srv/ledger"), id="data-dir"),
        pytest.param("data_dir", "~/ledger", Path.home() / "ledger", id="data-dir-home"),
        pytest.param("workers", "4", 4, id="workers"),
        pytest.param("use_recording", "buffered", "buffered", id="use-recording"),
        pytest.param("issuer", "https://auth.example.com", "https://auth.example.com", id="issuer-https"),
        pytest.param("issuer", "https://example.com/a/b", "https://example.com/a/b", id="issuer-path"),
        pytest.param("issuer", "http://localhost:8080", "http://localhost:8080", id="issuer-localhost"),
        pytest.param("issuer", "http://[::1]:8080", "http://[::1]:8080", id="issuer-loopback-ipv6"),
        pytest.param("issuer", "http://127.8.9.1", "http://127.8.9.1", id="issuer-loopback"),
        pytest.param("nats_url", "nats://n1:4222,tls://n2", "nats://n1:4222,tls://n2", id="nats-url-several"),
        pytest.param("nats_port", "4333", 4333, id="nats-port"),
        pytest.param("refresh_retry_window_seconds", "0", 0, id="retry-window-strict"),
        pytest.param("usage_bytes_max", "2GiB", 2 * 1024**3, id="bytes-unit"),
        pytest.param("usage_bytes_max", "134217728", 134_217_728, id="bytes-plain"),
        pytest.param("ledger_bytes_max", "unlimited", None, id="ledger-unlimited"),
        pytest.param("ledger_bytes_max", "1 TiB", 1024**4, id="ledger-limited"),
        pytest.param("signing_algorithms", "ES256, EdDSA", ("ES256", "EdDSA"), id="algorithms"),
        pytest.param(
            "trusted_proxies",
            "10.0.0.0/8, ::1",
            (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("::1/128")),
            id="proxies",
        ),
        pytest.param(
            "webhook_allowed_networks",
            "127.0.0.0/8",
            (ipaddress.ip_network("127.0.0.0/8"),),
            id="webhook-networks",
        ),
        pytest.param("webhook_ports", "443, 8443", (443, 8443), id="webhook-ports"),
        pytest.param("master_key", base64.b64encode(KEY).decode(), KEY, id="key-base64"),
        pytest.param(
            "master_key", base64.urlsafe_b64encode(b"\xff" * 32).decode().rstrip("="), b"\xff" * 32, id="key-url"
        ),
        pytest.param("master_key", KEY.hex().upper(), KEY, id="key-hex"),
        pytest.param("log_level", "debug", "debug", id="log-level"),
        pytest.param("drain_seconds", "6", 6, id="drain"),
    ],
)
def test_settings_value_that_can_be_read_is_converted(name: str, text: str, value: object) -> None:
    assert getattr(Settings.load({module.environment_name(name): text}), name) == value


@pytest.mark.parametrize(
    ("name", "text", "must"),
    [
        pytest.param("port", "0", "a whole number from 1 to 65535", id="port-zero"),
        pytest.param("port", "65536", "a whole number from 1 to 65535", id="port-large"),
        pytest.param("port", "80 80", "a whole number", id="port-not-a-number"),
        pytest.param("port", "٨٠٨٠", "a whole number", id="port-arabic-digits"),
        pytest.param("port", "8_080", "a whole number", id="port-underscore"),
        pytest.param("port", "9" * 5000, "a whole number", id="port-too-long-for-int"),
        pytest.param("host", "127.0.0.1:8080", "without a port", id="host-with-port"),
        pytest.param("host", "a b", "an IP address or a host name", id="host-space"),
        pytest.param("workers", "0", "from 1 to 256", id="workers-none"),
        pytest.param(
            "use_recording", "Durable", "one of durable, buffered; did you mean durable?", id="recording-case"
        ),
        pytest.param("use_recording", "sync", "one of durable, buffered", id="recording-unknown"),
        pytest.param("issuer", "auth.example.com", "a URL such as", id="issuer-no-scheme"),
        pytest.param("issuer", "http://auth.example.com", "must begin with https://", id="issuer-http"),
        pytest.param("issuer", "http://127.0.0.1.example.com", "must begin with https://", id="issuer-looks-loopback"),
        pytest.param("issuer", "ftp://127.0.0.1", "must begin with https://", id="issuer-scheme"),
        pytest.param("issuer", "https://auth.example.com/", "slash", id="issuer-trailing-slash"),
        pytest.param("issuer", "https://auth.example.com?a=b", "no query", id="issuer-query"),
        pytest.param("issuer", "https://auth.example.com?", "no query", id="issuer-empty-query"),
        pytest.param("issuer", "https://auth.example.com#a", "no fragment", id="issuer-fragment"),
        pytest.param("issuer", "https://a:b@auth.example.com", "user name", id="issuer-userinfo"),
        pytest.param("issuer", "https://auth.example.com:99999", "a URL such as", id="issuer-port"),
        pytest.param("issuer", "https://bücher.example", "ASCII", id="issuer-not-ascii"),
        pytest.param("issuer", "https://a\\b", "a URL such as", id="issuer-backslash"),
        pytest.param("issuer", "https://[::1", "a URL such as", id="issuer-broken-ipv6"),
        pytest.param("nats_url", "127.0.0.1:4222", "nats://host:port", id="nats-no-scheme"),
        pytest.param("nats_url", "nats://a:4222,", "nats://host:port", id="nats-empty-part"),
        pytest.param("nats_url", "nats://u:p@a:4222", "nats_creds", id="nats-userinfo"),
        pytest.param("replicas", "2", "one of 1, 3, 5", id="replicas-even"),
        pytest.param("usage_bytes_max", "1KiB", "from 67108864 to", id="bytes-small"),
        pytest.param("usage_bytes_max", "64GB", "KiB, MiB, GiB and TiB", id="bytes-unit"),
        pytest.param("ledger_bytes_max", "none", "bytes", id="ledger-none"),
        pytest.param("key_rotation_days", "-1", "from 1 to 3650", id="rotation-negative"),
        pytest.param("signing_algorithms", "eddsa", "did you mean EdDSA?", id="algorithm-case"),
        pytest.param("signing_algorithms", "HS256", "one of EdDSA, ES256, RS256", id="algorithm-symmetric"),
        pytest.param("signing_algorithms", "none", "one of EdDSA, ES256, RS256", id="algorithm-none"),
        pytest.param("signing_algorithms", "EdDSA,EdDSA", "each algorithm once", id="algorithm-twice"),
        pytest.param("trusted_proxies", "10.0.0.1/8", "host bits set", id="proxies-host-bits"),
        pytest.param("trusted_proxies", "proxy.internal", "addresses or CIDR networks", id="proxies-name"),
        pytest.param("webhook_allowed_networks", "localhost", "addresses or CIDR networks", id="webhook-networks-name"),
        pytest.param("webhook_ports", "443,70000", "from 1 to 65535", id="webhook-ports-range"),
        pytest.param("drain_seconds", "7", "from 1 to 6", id="drain-beyond-the-promise"),
        pytest.param("view_staleness_seconds_max", "0", "from 1 to", id="staleness-zero"),
    ],
)
def test_settings_value_that_cannot_be_read_is_refused_with_what_it_must_be(name: str, text: str, must: str) -> None:
    problem = problems({module.environment_name(name): text})[0]
    assert problem.startswith(f"{module.environment_name(name)} is {text!r} and must ")
    assert must in problem


@pytest.mark.parametrize("name", sorted(module.described()))
def test_settings_empty_value_is_refused_rather_than_taken_for_the_default(name: str) -> None:
    variable = module.environment_name(name)
    assert f"{variable} is empty; leave it out to get the default" in problems({variable: ""})


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        pytest.param("TOKEN_LEDGER_PROT", "; did you mean TOKEN_LEDGER_PORT?", id="typing-error"),
        pytest.param("TOKEN_LEDGER_MASTER_KEY_FIEL", "; did you mean TOKEN_LEDGER_MASTER_KEY_FILE?", id="secret-file"),
        pytest.param("TOKEN_LEDGER_URI", "; did you mean TOKEN_LEDGER_URL?", id="client-name"),
        pytest.param("TOKEN_LEDGER_port", "; did you mean TOKEN_LEDGER_PORT?", id="case"),
        pytest.param("TOKEN_LEDGER_XYZZY", "", id="nothing-like-it"),
        pytest.param("TOKEN_LEDGER_PORT_FILE", "; did you mean TOKEN_LEDGER_PORT?", id="file-of-what-is-no-secret"),
    ],
)
def test_settings_unknown_name_is_refused_with_a_suggestion(variable: str, meant: str) -> None:
    assert problems({variable: "1"}) == (f"{variable} is not a setting{meant}",)


def test_settings_other_programs_variables_and_the_clients_own_are_left_alone() -> None:
    environ = {"HOME": "/root", "TOKENLEDGER_PORT": "x", "TOKEN_LEDGER_URL": "http://x", "TOKEN_LEDGER_TOKEN": "tl_x"}
    assert Settings.load(environ) == Settings()


def test_settings_unknown_override_is_refused() -> None:
    assert problems({}, {"prot": 1}) == ("prot is not a setting; did you mean port?",)


def test_settings_everything_wrong_is_named_at_once() -> None:
    found = problems({"TOKEN_LEDGER_PROT": "1", "TOKEN_LEDGER_WORKERS": "x", "TOKEN_LEDGER_LOG_LEVEL": "loud"})
    assert len(found) == 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        pytest.param({"replicas": "3"}, "replicas is more than 1 without nats_url", id="replicas-of-embedded"),
        pytest.param(
            {"nats_port": "4333", "nats_url": "nats://a"}, "nats_port is set with nats_url", id="port-of-no-server"
        ),
        pytest.param(
            {"key_rotation_days": "1", "key_announce_hours": "24"},
            "key_announce_hours must be less than key_rotation_days",
            id="announced-longer-than-used",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, object], says: str) -> None:
    (problem,) = problems({}, given)
    assert problem.startswith(says)


def test_settings_credentials_without_a_server_are_refused(tmp_path: Path) -> None:
    seed = tmp_path / "service.nk"
    seed.write_text("S")
    (problem,) = problems({}, {"nats_creds": seed})
    assert problem.startswith("nats_creds is set without nats_url")
    assert Settings.load({}, {"nats_creds": seed, "nats_url": "nats://a"}).nats_creds == seed


def test_settings_credentials_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing.nk"
    (problem,) = problems({}, {"nats_creds": missing, "nats_url": "nats://a"})
    assert problem == f"--nats-creds is {str(missing)!r} and must be a file that exists and may be read"


def test_settings_master_key_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY.hex() + "\n")
    assert Settings.load({"TOKEN_LEDGER_MASTER_KEY_FILE": str(file)}).master_key == KEY


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(None, "cannot be read: No such file or directory", id="missing"),
        pytest.param(b"\xff\xfe", "cannot be read: it is not text", id="not-text"),
        pytest.param(b"", "the content of TOKEN_LEDGER_MASTER_KEY_FILE is empty", id="empty"),
        pytest.param(KEY[:31].hex().encode(), "must be 32 random bytes", id="short"),
    ],
)
def test_settings_master_key_file_that_cannot_be_used_is_refused(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    (problem,) = problems({"TOKEN_LEDGER_MASTER_KEY_FILE": str(file)})
    assert says in problem


def test_settings_master_key_given_twice_is_refused(tmp_path: Path) -> None:
    (problem,) = problems({"TOKEN_LEDGER_MASTER_KEY": KEY.hex(), "TOKEN_LEDGER_MASTER_KEY_FILE": str(tmp_path)})
    assert problem == "TOKEN_LEDGER_MASTER_KEY and TOKEN_LEDGER_MASTER_KEY_FILE are both set; set one of them"


def test_settings_master_key_is_shown_by_no_error_and_no_repr() -> None:
    wrong = "canary" + "0" * 20
    assert "canary" not in problems({"TOKEN_LEDGER_MASTER_KEY": wrong})[0]
    key = Secret(b"canary-canary-canary-canary-cana")
    shown = f"{Settings(master_key=key)!r} {key} {key!r} {[key]}"
    assert "canary" not in shown


def test_settings_environment_gives_the_same_settings_again(tmp_path: Path) -> None:
    seed = tmp_path / "service.nk"
    seed.write_text("S")
    settings = Settings.load(
        {"TOKEN_LEDGER_MASTER_KEY": KEY.hex()},
        {
            "port": 9000,
            "use_recording": "buffered",
            "nats_url": "nats://a:4222",
            "nats_creds": seed,
            "replicas": 3,
            "trusted_proxies": "10.0.0.0/8,::1",
            "webhook_allowed_networks": "10.0.0.0/8",
            "webhook_ports": "443,8443",
            "signing_algorithms": "RS256,EdDSA",
            "ledger_bytes_max": "1TiB",
        },
    )
    assert Settings.load(settings.environment()) == settings
    assert Settings.load(Settings().environment()) == Settings()


def test_settings_environment_of_a_process_told_where_the_server_is_leaves_its_port_out() -> None:
    settings = msgspec.structs.replace(Settings.load({}, {"nats_port": 4333}), nats_url="nats://127.0.0.1:4333")
    assert "TOKEN_LEDGER_NATS_PORT" not in settings.environment()
    assert Settings.load(settings.environment()).nats_url == "nats://127.0.0.1:4333"


def test_settings_given_to_a_process_replace_those_of_its_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY.hex())
    environ = {"TOKEN_LEDGER_MASTER_KEY_FILE": str(file), "TOKEN_LEDGER_NATS_PORT": "4333", "HOME": "/root"}
    settings = msgspec.structs.replace(Settings.load(environ, {"port": 9000}), nats_url="nats://127.0.0.1:4333")
    given = settings.given_to(environ | {"TOKEN_LEDGER_TOKEN": "tl_x"})
    assert (given["HOME"], given["TOKEN_LEDGER_TOKEN"]) == ("/root", "tl_x")
    assert Settings.load(given) == msgspec.structs.replace(settings, nats_port=None)


def test_settings_each_is_described_once_with_its_unit() -> None:
    fields = [field.name for field in msgspec.structs.fields(Settings)]
    assert list(module.described()) == fields
    for name, about in module.described().items():
        assert about.text.endswith(".") or about.text.endswith(")."), name
        assert module.default_worded(name), name
        if match := re.search(r"_(seconds|days|hours|bytes)(_max)?$", name):
            assert about.unit == match[1], name


def test_settings_defaults_lie_within_their_own_ranges() -> None:
    for name, about in module.described().items():
        value = getattr(Settings(), name)
        if value is not None and value != () and not about.secret:
            assert about.parse(module.worded(value)) == value


@pytest.mark.parametrize("name", ["usage_bytes_max", "request_body_bytes_max", "batch_body_bytes_max"])
def test_settings_default_in_the_table_is_the_default(name: str) -> None:
    assert module.described()[name].parse(module.default_worded(name)) == getattr(Settings(), name)


def test_settings_known_names_hold_no_other_issues_names() -> None:
    assert len(set(module.known_names())) == len(module.known_names())
    later = re.compile(r"CONSENT|AUTHORIZ|FINDING")
    assert [name for name in module.known_names() if later.search(name)] == []
