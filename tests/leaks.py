"""Looks for secrets and personal data where none may be: in files, logs, stores and tables."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote_to_bytes

import duckdb

from tests.running import CANARIES, Service

FILE_BYTES_MAX = 1 << 30
READABLE_BY_DESIGN = {"bootstrap.json"}
# A prefix alone may stand in a message; with this many digits behind it, it is a token.
RAW_TOKEN = rb"tl_(?:at|rt|pat|sat|ac|cs)_[0-9A-Za-z]{40}"
RAW_JWT = rb"eyJ[0-9A-Za-z_-]{16,}\.eyJ[0-9A-Za-z_-]{16,}"
# nkeys: a seed of a user, account or operator.
RAW_SEED = rb"S[UAO](?!U{16})[A-Z2-7]{56}"  # 0x55 bytes are what DuckDB packs columns of one value into
RAW_WEBHOOK_SECRET = rb"whsec_[0-9A-Za-z+/]{40}"
READABLE = b"|".join([RAW_TOKEN, RAW_JWT, RAW_SEED, RAW_WEBHOOK_SECRET])


def _base64_forms(word: bytes) -> set[bytes]:
    """What stands in base64 for `word`, wherever in the encoded text it begins; both alphabets."""
    forms = set()
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + word)
        # The first letters depend on what stands before, the last on what stands behind.
        start = (0, 2, 3)[shift]
        end = len(encoded) - (0, 4, 3)[(shift + len(word)) % 3] if (shift + len(word)) % 3 else len(encoded)
        inner = encoded[start:end].rstrip(b"=")
        forms |= {inner, inner.translate(bytes.maketrans(b"+/", b"-_"))}
    return forms


def forms(word: str) -> set[bytes]:
    """`word` as it may be written: raw, base64, hex, percent-encoded, UTF-16."""
    raw = word.encode()
    percent = "".join(f"%{byte:02x}" for byte in raw)
    return {
        raw,
        raw.hex().encode(),
        raw.hex().upper().encode(),
        percent.encode(),
        percent.upper().encode(),
        word.encode("utf-16-le"),
        *_base64_forms(raw),
    }


def _pattern(*words: str) -> re.Pattern[bytes]:
    literals = {form for word in words for form in forms(word)}
    return re.compile(b"|".join([READABLE, *map(re.escape, sorted(literals, key=len, reverse=True))]))


def decoded(data: bytes) -> Iterator[bytes]:
    """What long runs of base64 and hex in `data` stand for: a token in them has no fixed spelling to look for."""
    for match in re.finditer(rb"[0-9A-Za-z+/_-]{60,}", data):
        run = match[0].translate(bytes.maketrans(b"-_", b"+/"))
        for start in range(4):
            part = run[start:]
            yield base64.b64decode(part[: len(part) // 4 * 4])
    for match in re.finditer(rb"(?:[0-9A-Fa-f]{2}){50,}", data):
        yield bytes.fromhex(match[0].decode())
        yield bytes.fromhex("0" + match[0].decode()[:-1])
    for match in re.finditer(rb"(?:%[0-9A-Fa-f]{2}){40,}", data):
        yield unquote_to_bytes(match[0])
    yield data[::2]
    yield data[1::2]


def tables(path: Path) -> Iterator[bytes]:
    """Every row of every table of a DuckDB file: it is compressed there, so the file itself shows nothing."""
    with duckdb.connect(str(path), read_only=True) as database:
        names = database.execute("select schema_name, table_name from duckdb_tables()").fetchall()
        for schema, name in names:
            cursor = database.execute(f'select * from "{schema}"."{name}"')
            while rows := cursor.fetchmany(1000):
                yield _readable(rows)


def _readable(rows: list[tuple[object, ...]]) -> bytes:
    values = (value for row in rows for value in row)
    return b"\n".join(value if isinstance(value, bytes) else str(value).encode() for value in values)


def is_duckdb(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(12)[8:12] == b"DUCK"


def search_bytes(data: bytes, where: str, pattern: re.Pattern[bytes]) -> list[str]:
    found = [f"{where}: {match[0][:60]!r}" for match in pattern.finditer(data)]
    for hidden in decoded(data):
        found += [f"{where} (encoded): {match[0][:60]!r}" for match in re.finditer(READABLE, hidden)]
    return found


def search_files(directory: Path, *words: str) -> list[str]:
    """Where `words`, tokens or seeds stand readable under `directory`. Files made for that are left out."""
    pattern = _pattern(*CANARIES, *words)
    found: list[str] = []
    for path in sorted(directory.rglob("*")):
        if not path.is_file() or path.is_symlink() or path.suffix == ".nk":
            continue
        if path.name in READABLE_BY_DESIGN:
            continue
        assert path.stat().st_blocks * 512 < FILE_BYTES_MAX, path
        found += search_bytes(_written(path), str(path), pattern)
        if is_duckdb(path):
            for part in tables(path):
                found += search_bytes(part, f"{path} (rows)", pattern)
    return found


def _written(path: Path) -> bytes:
    """The file up to its last written block: LMDB's map is sparse."""
    with path.open("rb") as file:
        parts = []
        while part := file.read(1 << 20):
            if part.count(0) != len(part):
                parts.append(part)
        return b"".join(parts)


def search_service(service: Service, *words: str) -> list[str]:
    """Everything that a service has left behind; it must have been stopped, since a running one locks its tables."""
    pattern = _pattern(*CANARIES, *words)
    found = search_files(service.data_dir, *words)
    for log in service.log_path.parent.glob("*.log"):
        found += search_bytes(log.read_bytes(), str(log), pattern)
    return found
