"""Write files whole or not at all, and read JSON with one clear error."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from kronblocks.core.errors import KronblocksError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to. At the end it replaces `path`; after an exception the old file stays.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes of this user that write to it. The lock file is not in the folder.

    Do not nest calls: all folders share 16 lock files in the system's temporary folder.
    """
    user = os.getuid() if hasattr(os, "getuid") else "user"
    share = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[0]
    with FileLock(Path(tempfile.gettempdir()) / f"kronblocks-{user}-{share}.lock"):
        yield


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old one or the new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, data: Any) -> None:
    """Write plain values as JSON, atomically."""
    write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        KronblocksError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise KronblocksError(f"cannot read {path}: {error}") from error
