"""Writes files atomically; digests of files, the user's cache folder, sizes as text."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp"  # suffix of files that are being written
STATE = "state.pt"  # in the folder of a run, which continues from it


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; afterwards it is renamed to `path`, or removed after an error.

    At every moment `path` is either the complete old file or the complete new one. A link keeps leading to the same
    file, and a file keeps its permissions.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")  # no other process writes to it
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path` through a temporary file, so that an interrupted write keeps the old file."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hexadecimal text; empty if there is no such file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_dir() -> Path:
    """The folder for what can be made or downloaded again: `$XDG_CACHE_HOME/sret`, or `~/.cache/sret`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sret"


def format_bytes(num_bytes: float) -> str:
    """`"1.5 GiB"`, or `"12.0 MiB"` for less than one GiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
