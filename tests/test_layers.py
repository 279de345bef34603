"""The shape that STYLE.md asks for, where a machine can see it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("events", "projections", "service")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
FUNCTION_LINES_MAX = 69
MODULE_LINES_MAX = 800

RULES = sorted((ROOT / "service" / "rules").glob("*.py"))
# Rules and folds see no clock, chance, file or network: what they decide can be decided again.
PURE = [
    *RULES,
    ROOT / "projections" / "grants.py",
    ROOT / "projections" / "registry.py",
    ROOT / "service" / "explanation.py",
]
IMPURE = {
    "asyncio",
    "lmdb",
    "nats",
    "os",
    "pathlib",
    "random",
    "secrets",
    "socket",
    "structlog",
    "threading",
    "time",
    "uuid",
}
CLOCKS = {"now", "utcnow", "today", "time", "monotonic"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, whole names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


def test_imports_point_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """events <- projections <- service, by the contract in pyproject.toml."""
    monkeypatch.chdir(ROOT)
    assert lint_imports() == EXIT_STATUS_SUCCESS


def test_modules_and_functions_are_short() -> None:
    too_long = {}
    for path in MODULES:
        text = path.read_text()
        count = len(text.splitlines())
        if count > MODULE_LINES_MAX:
            too_long[name_of(path)] = count
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or 0) - node.lineno + 1
                if count > FUNCTION_LINES_MAX:
                    too_long[f"{name_of(path)} {node.name}"] = count
    assert too_long == {}


def test_nothing_is_left_unfinished() -> None:
    words = ("NotImplementedError", "TODO", "FIXME", "XXX", "breakpoint(")
    assert [name_of(path) for path in MODULES if any(word in path.read_text() for word in words)] == []


@pytest.mark.parametrize("path", PURE, ids=name_of)
def test_rules_and_folds_are_pure(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert {name.partition(".")[0] for name in imports(tree)} & IMPURE == set()
    for node in ast.walk(tree):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.Global | ast.Nonlocal)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in CLOCKS, f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in CLOCKS | {"open", "print"}, f"line {node.lineno}"


def test_commands_and_rules_know_no_http() -> None:
    http = {"litestar", "httpx", "granian", "service.incoming", "service.outgoing", "service.app", "service.doors"}
    commands = [ROOT / "service" / name for name in ("commands.py", "grants.py", "refresh.py", "registry.py")]
    for path in [*commands, *RULES]:
        found = set(imports(ast.parse(path.read_text())))
        assert not found & http, name_of(path)
        assert not any(one.startswith(("litestar", "service.api")) for one in found), name_of(path)


def test_only_the_codec_reads_and_writes_the_bytes_of_events() -> None:
    """One file knows the old shapes."""
    for path in MODULES:
        if name_of(path) == "events/codec.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in {"Decoder", "decode", "convert"}
            ):
                named = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
                assert not named & {"LedgerEvent", "UseBlock"}, name_of(path)


# What only some of the processes need that `up` starts, or only the commands that ask it.
HEAVY = ("argon2", "cryptography", "duckdb", "granian", "httpx", "jwt", "litestar", "prometheus_client", "pyarrow")


def test_process_that_projects_loads_nothing_that_it_does_not_need() -> None:
    """It would cost each start of the service half a second a process, and memory for as long as it runs."""
    script = "import sys; import service.cli.processes, service.supervisor; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(HEAVY) & set(loaded.stdout.split()) == set()
