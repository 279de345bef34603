"""Settings of the service: one place for each name, default, unit and meaning.

Every setting is read once, at the start, from `TOKEN_LEDGER_<NAME>`; a secret also from the file that
`TOKEN_LEDGER_<NAME>_FILE` names. A flag of the command line wins. A name that is not known, a value that cannot be
read and values that contradict each other refuse the start, all of them named at once.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import functools
import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from projections.abuse import rules as abuse

PREFIX = "TOKEN_LEDGER_"
# Read by the command line's client, so that they may stand in the environment of a service as well.
CLIENT_NAMES = {
    "TOKEN_LEDGER_URL": "Address of the service that the command line talks to, instead of bootstrap.json's.",
    "TOKEN_LEDGER_TOKEN": "Token that the command line presents, instead of bootstrap.json's.",
}
MASTER_KEY_BYTES = 32
UNLIMITED = "unlimited"
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Algorithm = Literal["EdDSA", "ES256", "RS256"]


class SettingsError(Exception):
    """Settings that the service cannot start with. `problems`: one sentence each, naming the setting."""

    fix = "correct what is named; `token-ledger settings` lists every setting with its default and meaning"

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Secret(bytes):
    """Bytes that no log, traceback or repr shows."""

    def __repr__(self) -> str:
        return "Secret(…)"

    __str__ = __repr__


@dataclass(frozen=True)
class About:
    """What is to be known of a setting. `parse` raises ValueError with what the value must be.

    `default`: how the table words a default that is worked out when the service starts.
    """

    text: str
    parse: Callable[[str], Any]
    unit: str = ""
    default: str | None = None
    flag: bool = False
    secret: bool = False


def _integer(least: int, most: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", value) or not least <= int(value) <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(value)

    return parse


_UNITS = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


def _size(least: int, most: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        match = re.fullmatch(r"([0-9]{1,18})\s*(|KiB|MiB|GiB|TiB)", value)
        size = int(match[1]) * _UNITS[match[2]] if match else -1
        if not least <= size <= most:
            raise ValueError(f"must be from {least} to {most} bytes; KiB, MiB, GiB and TiB may follow the number")
        return size

    return parse


def _size_or_unlimited(least: int, most: int) -> Callable[[str], int | None]:
    def parse(value: str) -> int | None:
        return None if value == UNLIMITED else _size(least, most)(value)

    return parse


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{_meant(value, choices)}")
        return value

    return parse


def _replicas(value: str) -> int:
    return int(_choice("1", "3", "5")(value))


def _abuse_rules(value: str) -> tuple[str, ...]:
    changes = tuple(change.strip() for change in value.split(","))
    abuse.configured(changes)  # says what is wrong
    return changes


def _host(value: str) -> str:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        if not re.fullmatch(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?", value):
            raise ValueError("must be an IP address or a host name, without a port") from None
    return value


def _path(value: str) -> Path:
    if "\0" in value:
        raise ValueError("must be a path")
    return Path(value).expanduser()


def _existing_file(value: str) -> Path:
    path = _path(value)
    if not path.is_file():
        raise ValueError("must be a file that exists and may be read")
    return path


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _issuer(value: str) -> str:
    """Source: RFC 8414 §2 (https, no query, no fragment); http only where nobody else can listen in."""
    wrong = None
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("must be a URL such as https://auth.example.com") from None
    if len(value) > 500 or re.search(r"[^!-~]", value) or "\\" in value or not host:
        wrong = "must be a URL such as https://auth.example.com, at most 500 printable ASCII characters"
    elif parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        wrong = "must begin with https://; http:// is for 127.0.0.1, [::1] and localhost only"
    elif "@" in parts.netloc:
        wrong = "must not hold a user name or password"
    elif "?" in value or "#" in value:
        wrong = "must have no query and no fragment (RFC 8414 §2)"
    elif value.endswith("/"):
        wrong = "must not end with a slash: clients compare the issuer character by character"
    if wrong:
        raise ValueError(wrong)
    return value


def _nats_url(value: str) -> str:
    for part in value.split(","):
        try:
            parts = urlsplit(part.strip())
            host, _ = parts.hostname, parts.port
        except ValueError:
            host, parts = None, urlsplit("")
        if parts.scheme not in ("nats", "tls") or not host:
            raise ValueError("must be one or more of nats://host:port or tls://host:port, separated by commas")
        if "@" in parts.netloc:
            # It would be written into bootstrap.json and logs.
            raise ValueError("must not hold a user name or password: give a file of credentials with nats_creds")
    return value


def _networks(value: str) -> tuple[Network, ...]:
    networks: list[Network] = []
    for part in value.split(","):
        try:
            networks.append(ipaddress.ip_network(part.strip()))
        except ValueError as error:
            raise ValueError(f"must be addresses or CIDR networks separated by commas: {error}") from None
    return tuple(networks)


def _ports(value: str) -> tuple[int, ...]:
    return tuple(_integer(1, 65_535)(part.strip()) for part in value.split(","))


def _algorithms(value: str) -> tuple[str, ...]:
    parts = tuple(_choice(*get_args(Algorithm))(part.strip()) for part in value.split(","))
    if len(set(parts)) != len(parts):
        raise ValueError("must name each algorithm once")
    return parts


def parse_key(value: str) -> Secret:
    """32 bytes from 64 hex digits or from base64, in either alphabet, padded or not. Raises: ValueError."""
    value = value.strip()
    key = b""
    if re.fullmatch(r"[0-9A-Fa-f]{64}", value):
        key = bytes.fromhex(value)
    elif re.fullmatch(r"[A-Za-z0-9+/_-]{43}=?", value):
        try:
            key = base64.b64decode(value.rstrip("=").translate(str.maketrans("-_", "+/")) + "=", validate=True)
        except binascii.Error:
            key = b""
    if len(key) != MASTER_KEY_BYTES:
        raise ValueError("must be 32 random bytes, as base64 or as 64 hex digits: openssl rand -base64 32")
    return Secret(key)


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_GIB = 1024**3
_SIZE_MAX = 2**60


class Settings(Struct, frozen=True, kw_only=True):
    """What an operator decides. Made by `Settings.load`, which checks; the constructor does not.

    `workers`, `issuer` and `view_staleness_seconds_max` are worked out if they were not given, so that readers see
    the values that hold.
    """

    host: Annotated[str, About("Address that the HTTP API listens on.", _host, flag=True)] = "127.0.0.1"
    port: Annotated[int, About("Port that the HTTP API listens on.", _integer(1, 65_535), flag=True)] = 8080
    data_dir: Annotated[
        Path,
        About(
            "Directory of everything that is kept: bootstrap.json, the master key, the projections and, if it is "
            "embedded, the nats-server's store.",
            _path,
            default="./data",
            flag=True,
        ),
    ] = Path("data")
    workers: Annotated[
        int,
        About("Worker processes of the HTTP API.", _integer(1, 256), default="number of CPUs", flag=True),
    ] = 0
    use_recording: Annotated[
        Literal["durable", "buffered"],
        About(
            "`durable`: a validation is answered once its use is on disk. `buffered`: it does not wait, and uses that "
            "are in memory when a worker crashes are lost.",
            _choice("durable", "buffered"),
            flag=True,
        ),
    ] = "durable"
    issuer: Annotated[
        str,
        About(
            "URL that stands as `iss` in tokens and metadata. https, or http for a loopback address; no query, "
            "fragment or trailing slash (RFC 8414 §2).",
            _issuer,
            default="http://127.0.0.1:<port>",
            flag=True,
        ),
    ] = ""
    nats_url: Annotated[
        str | None,
        About(
            "nats-servers to use, separated by commas. Given: none is embedded.",
            _nats_url,
            default="an embedded nats-server",
            flag=True,
        ),
    ] = None
    nats_creds: Annotated[
        Path | None,
        About(
            "File with the credentials for `nats_url`: an nkey seed or a `.creds` file.",
            _existing_file,
            default="those of the embedded nats-server",
            flag=True,
        ),
    ] = None
    nats_port: Annotated[
        int | None,
        About(
            "Port that the embedded nats-server listens on, on 127.0.0.1.",
            _integer(1, 65_535),
            default="4222 if it is free, else a free one",
            flag=True,
        ),
    ] = None
    subscriber_nats_url: Annotated[
        str | None,
        About(
            "nats-servers that subscribers are told to connect to, where they reach them by other addresses than the "
            "service does.",
            _nats_url,
            default="those that the service uses",
        ),
    ] = None
    replicas: Annotated[
        int, About("Servers of the JetStream cluster that hold each stream: 1, 3 or 5.", _replicas, flag=True)
    ] = 1
    view_staleness_seconds_max: Annotated[
        int,
        About(
            "A validation is answered 503 rather than from a view that was last known to be complete longer ago "
            "than this.",
            _integer(1, 86_400),
            unit="seconds",
            default="5, or 300 if use_recording is buffered",
        ),
    ] = 0
    refresh_retry_window_seconds: Annotated[
        int,
        About(
            "How long a spent refresh token still gets the same successor, so that a lost response signs nobody out. "
            "0: strict, every reuse revokes the grant.",
            _integer(0, 300),
            unit="seconds",
        ),
    ] = 10
    usage_retention_days: Annotated[
        int, About("How long uses, with their addresses and user agents, are kept.", _integer(1, 36_500), unit="days")
    ] = 400
    usage_bytes_max: Annotated[
        int,
        About(
            "Size of the log of uses, at which its oldest uses are dropped.",
            _size(64 * 1024**2, _SIZE_MAX),
            unit="bytes",
            default="16GiB",
        ),
    ] = 16 * _GIB
    ledger_bytes_max: Annotated[
        int | None,
        About(
            "Size of the ledger, at which nothing more is written to it; nothing of it is ever dropped. "
            "`unlimited`: as far as the disk goes.",
            _size_or_unlimited(64 * 1024**2, _SIZE_MAX),
            unit="bytes",
            default=UNLIMITED,
        ),
    ] = None
    use_buffer_max: Annotated[
        int,
        About(
            "Uses that a worker holds in memory in `buffered` mode while the log is away; what comes beyond is "
            "counted and lost.",
            _integer(1_000, 10_000_000),
            unit="uses",
        ),
    ] = 200_000
    follower_silent_seconds_max: Annotated[
        int,
        About(
            "A follower of the revocations that was not heard of for longer, or has not applied one for longer, is "
            "silent: the log, `/metrics` and `doctor` say so.",
            _integer(1, 86_400),
            unit="seconds",
        ),
    ] = 60
    key_rotation_days: Annotated[
        int, About("Age at which a signing key is replaced.", _integer(1, 3_650), unit="days")
    ] = 90
    key_announce_hours: Annotated[
        int,
        About(
            "How long a new signing key stands in the JWKS before it signs, so that verifiers have fetched it. "
            "0: it signs at once.",
            _integer(0, 720),
            unit="hours",
        ),
    ] = 24
    signing_algorithms: Annotated[
        tuple[Algorithm, ...],
        About(
            "Algorithms that signing keys are kept for, separated by commas, the default one first: EdDSA, ES256, "
            "RS256.",
            _algorithms,
        ),
    ] = ("EdDSA",)
    abuse_rules: Annotated[
        tuple[str, ...],
        About(
            "Changes to the rules that look for abuse, separated by commas: `rule.mode=observe`, `notify` or `revoke`, "
            "and `rule.parameter=number`, as in `burst.mode=revoke,burst.factor=6`.",
            _abuse_rules,
            default="none",
        ),
    ] = ()
    trusted_proxies: Annotated[
        tuple[Network, ...],
        About(
            "Addresses or CIDR networks, separated by commas, of proxies whose X-Forwarded-For is believed.",
            _networks,
            default="none",
        ),
    ] = ()
    webhook_allowed_networks: Annotated[
        tuple[Network, ...],
        About(
            "Addresses or CIDR networks, separated by commas, where receivers of webhooks may be although they are not "
            "public, at any port and without TLS. Whoever may register webhooks reaches what is there.",
            _networks,
            default="none",
        ),
    ] = ()
    webhook_ports: Annotated[
        tuple[int, ...],
        About("Ports, separated by commas, at which receivers of webhooks may listen at public addresses.", _ports),
    ] = (443,)
    webhook_failing_hours_max: Annotated[
        int,
        About("How long every attempt of a webhook may fail before it is disabled.", _integer(1, 720), unit="hours"),
    ] = 72
    master_key: Annotated[
        Secret | None,
        About(
            "Key that seals signing keys and people's keys: 32 bytes as base64 or hex. All hosts need the same one.",
            parse_key,
            default="made on the first start, in <data_dir>/master.key",
            secret=True,
        ),
    ] = None
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        About("Least severity that is logged.", _choice("debug", "info", "warning", "error"), flag=True),
    ] = "info"
    log_format: Annotated[
        Literal["auto", "json", "console"],
        About("`auto`: console on a terminal, else json.", _choice("auto", "json", "console"), flag=True),
    ] = "auto"
    client_auth_failures_per_minute_max: Annotated[
        int,
        About(
            "Wrong client secrets a minute, for each client and address and in each worker, before 429.",
            _integer(1, 1_000_000),
            unit="a minute",
        ),
    ] = 20
    sign_in_failures_free: Annotated[
        int,
        About(
            "Wrong passwords in a row for one name, in each worker, before whoever tries must wait: a second, two, "
            "four and so on. A browser that the person has signed in with before is counted by itself.",
            _integer(1, 1_000),
        ),
    ] = 5
    sign_in_failures_of_address_free: Annotated[
        int,
        About(
            "The same for one address (IPv6: its first 64 bits; four times as many for 56, sixteen for 48), from which "
            "many people may come: one failure passes each minute (15 s, 3.75 s), and nobody waits longer than 30 s.",
            _integer(1, 1_000_000),
        ),
    ] = 30
    sign_in_delay_seconds_max: Annotated[
        int, About("The longest that one must wait.", _integer(1, 86_400), unit="seconds")
    ] = 900
    session_ttl_seconds: Annotated[
        int,
        About("How long people stay signed in, in one browser.", _integer(60, 30 * 86_400), unit="seconds"),
    ] = 43_200
    unknown_tokens_per_minute_max: Annotated[
        int,
        About(
            "Unknown tokens a minute, from each caller or address and in each worker, before 429.",
            _integer(1, 1_000_000),
            unit="a minute",
        ),
    ] = 600
    pushed_request_ttl_seconds: Annotated[
        int,
        About(
            "How long a pushed authorization request (RFC 9126) waits for its person; who has begun to sign in by then "
            "may take longer.",
            _integer(5, 600),
            unit="seconds",
        ),
    ] = 90
    pushed_requests_per_minute_max: Annotated[
        int,
        About(
            "Pushed authorization requests a minute, by each client from one address and in each worker, before 429.",
            _integer(1, 1_000_000),
            unit="a minute",
        ),
    ] = 600
    request_body_bytes_max: Annotated[
        int, About("Largest request body.", _size(1_024, 16 * 1024**2), unit="bytes", default="64KiB")
    ] = 65_536
    batch_body_bytes_max: Annotated[
        int,
        About("Largest request body of a batch validation.", _size(1_024, 64 * 1024**2), unit="bytes", default="4MiB"),
    ] = 4 * 1024**2
    request_seconds_max: Annotated[
        int, About("How long a request's body may take to arrive.", _integer(1, 300), unit="seconds")
    ] = 10
    audit_query_seconds_max: Annotated[
        int, About("How long an auditor's SQL may run.", _integer(1, 3_600), unit="seconds")
    ] = 20
    audit_query_memory_bytes_max: Annotated[
        int,
        About(
            "Memory of one query or export of an auditor.",
            _size(64 * 1024**2, _SIZE_MAX),
            unit="bytes",
            default="512MiB",
        ),
    ] = 512 * 1024**2
    audit_query_rows_max: Annotated[
        int, About("Rows of the answer to an auditor's SQL.", _integer(1, 10_000_000), unit="rows")
    ] = 100_000
    audit_query_bytes_max: Annotated[
        int,
        About(
            "Size of the answer to an auditor's SQL.", _size(64 * 1024, 256 * 1024**2), unit="bytes", default="16MiB"
        ),
    ] = 16 * 1024**2
    audit_queries_at_once_max: Annotated[
        int, About("Auditors' queries that run at once, and beside them as many exports.", _integer(1, 64))
    ] = 2
    audit_export_bytes_max: Annotated[
        int,
        About(
            "Size of one export, which stands in the data directory until it has been sent.",
            _size(1024**2, _SIZE_MAX),
            unit="bytes",
            default="16GiB",
        ),
    ] = 16 * _GIB
    followers_max: Annotated[
        int,
        About(
            "Followers of the feed that each worker serves at once, by streams and by polls; more are answered 503.",
            _integer(1, 100_000),
        ),
    ] = 1_000
    followers_per_caller_max: Annotated[
        int,
        About(
            "How many of these one user or client may be, with whatever tokens; more are answered 429.",
            _integer(1, 100_000),
        ),
    ] = 500
    drain_seconds: Annotated[
        int,
        About(
            "How long requests that are being answered may take to end when the service stops.",
            _integer(1, 6),
            unit="seconds",
        ),
    ] = 5

    def __post_init__(self) -> None:
        if not self.workers:
            msgspec.structs.force_setattr(self, "workers", min(cpu_count(), 256))
        if not self.issuer:
            msgspec.structs.force_setattr(self, "issuer", f"http://127.0.0.1:{self.port}")
        if not self.view_staleness_seconds_max:
            seconds = 300 if self.use_recording == "buffered" else 5
            msgspec.structs.force_setattr(self, "view_staleness_seconds_max", seconds)

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, overrides: Mapping[str, object] | None = None) -> Settings:
        """Settings from `environ` (None: this process's), over which `overrides` (field name to value) win.

        An override that is None was not given.

        Raises: SettingsError naming everything that is wrong.
        """
        given, problems = _given(os.environ if environ is None else environ, overrides or {})
        values: dict[str, Any] = {}
        for name, (source, text) in given.items():
            about = described()[name]
            try:
                if not text:
                    raise ValueError("is empty; leave it out to get the default")
                values[name] = about.parse(text)
            except ValueError as error:
                shown = "" if about.secret or not text else f" is {text!r} and"
                problems.append(f"{source}{shown} {error}")
        problems += _contradictions(given.keys(), values)
        if problems:
            raise SettingsError(*problems)
        return cls(**values)

    def environment(self) -> dict[str, str]:
        """What must stand in an environment for `load` to give these settings again."""
        variables = {}
        for name, about in described().items():
            value = getattr(self, name)
            # The port of the embedded server says nothing to a process that is told where the server is.
            if value == () or (name == "nats_port" and self.nats_url):
                continue
            if value is not None:
                variables[environment_name(name)] = base64.b64encode(value).decode() if about.secret else worded(value)
        return variables

    def given_to(self, environ: Mapping[str, str]) -> dict[str, str]:
        """`environ` for a process that is to have these settings, whatever settings stand in it."""
        others = {name: text for name, text in environ.items() if not name.startswith(PREFIX) or name in CLIENT_NAMES}
        return others | self.environment()


def described() -> dict[str, About]:
    """Every setting by its field name, in the order of the table."""
    return _described()


@functools.cache
def _described() -> dict[str, About]:
    hints = get_type_hints(Settings, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated}


def environment_name(name: str) -> str:
    """`data_dir` → `TOKEN_LEDGER_DATA_DIR`."""
    return PREFIX + name.upper()


def flag_name(name: str) -> str:
    """`data_dir` → `--data-dir`."""
    return "--" + name.replace("_", "-")


def known_names() -> tuple[str, ...]:
    """Every TOKEN_LEDGER_ name that may stand in the environment, in the order of the table."""
    names = []
    for name, about in described().items():
        names.append(environment_name(name))
        if about.secret:
            names.append(environment_name(name) + "_FILE")
    return (*names, *CLIENT_NAMES)


def worded(value: object) -> str:
    """A setting's value as it would be written in the environment. Secrets are not for this function."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)


def default_worded(name: str) -> str:
    """The default of a setting as the table shows it."""
    about = described()[name]
    if about.default is not None:
        return about.default
    fields = {field.name: field.default for field in msgspec.structs.fields(Settings)}
    return worded(fields[name])


def _given(environ: Mapping[str, str], overrides: Mapping[str, object]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """What was given by field name, as (the name it was given by, the text), and what is wrong with the names."""
    known = {environment_name(name): name for name in described()}
    files = {f"{variable}_FILE": name for variable, name in known.items() if described()[name].secret}
    given: dict[str, tuple[str, str]] = {}
    problems = []
    for variable, text in sorted(environ.items()):
        if not variable.startswith(PREFIX) or variable in CLIENT_NAMES:
            continue
        if variable in known:
            given[known[variable]] = (variable, text)
        elif variable not in files:
            problems.append(f"{variable} is not a setting{_meant(variable, known_names())}")
    for variable, name in files.items():
        if variable not in environ:
            continue
        if name in given:
            problems.append(f"{given[name][0]} and {variable} are both set; set one of them")
            continue
        try:
            given[name] = (f"the content of {variable}", Path(environ[variable]).read_text(encoding="ascii").strip())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            problems.append(f"{variable} is {environ[variable]!r}, which cannot be read: {reason}")
    for name, value in overrides.items():
        if name not in described():
            problems.append(f"{name} is not a setting{_meant(name, tuple(described()))}")
        elif value is not None:
            given[name] = (flag_name(name), worded(value))
    return given, problems


def _contradictions(given: AbstractSet[str], values: Mapping[str, Any]) -> list[str]:
    """What each value alone does not show. `given` also names what could not be read."""
    problems = []
    if "nats_creds" in given and "nats_url" not in given:
        problems.append("nats_creds is set without nats_url: the embedded nats-server has credentials of its own")
    if "nats_port" in given and "nats_url" in given:
        problems.append("nats_port is set with nats_url: with nats_url no nats-server is embedded")
    if values.get("replicas", 1) > 1 and "nats_url" not in given:
        problems.append("replicas is more than 1 without nats_url: the embedded nats-server is a single one")
    rotation_days = values.get("key_rotation_days", 90)
    if values.get("key_announce_hours", 24) >= rotation_days * 24:
        problems.append("key_announce_hours must be less than key_rotation_days: a key is announced before it signs")
    return problems


def _meant(name: str, choices: tuple[str, ...]) -> str:
    # The prefix is left out of the comparison: it would make all names alike.
    bare = {choice.removeprefix(PREFIX).lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.removeprefix(PREFIX).lower(), bare, 1, 0.6)
    return f"; did you mean {bare[close[0]]}?" if close else ""
