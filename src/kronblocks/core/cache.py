"""A cache of measurements of this machine: one small JSON file per key, in the user's cache folder.

`KRONBLOCKS_CACHE` names the folder (0 or off: no cache); the default is `kronblocks` in the system's cache folder. The file
name is a hash of the key. Files are moved into place, so processes may read and write at once. A damaged file, or one of
another key, counts as missing. Where the folder cannot be written to, nothing is kept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from kronblocks.core.files import write_text


def cache_folder() -> Path | None:
    """The folder of measurements; None: they are not kept."""
    setting = os.environ.get("KRONBLOCKS_CACHE", "")
    if setting.lower() in ("0", "off"):
        return None
    return Path(setting) if setting else users_folder()


def users_folder() -> Path | None:
    """The library's folder in the system's cache folder of this user; None: there is none."""
    named = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None)
    try:
        home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    except RuntimeError:  # a user without a home
        home = None
    base = Path(named) if named else home
    return base / "kronblocks" if base is not None and base.is_absolute() else None


@functools.cache
def processor() -> str:
    """The CPU's name, as the system gives it; it is a part of keys, since other CPUs have other timings."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _path(kind: str, key: str) -> Path | None:
    folder = cache_folder()
    return folder / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json" if folder else None


def read(kind: str, version: int, key: str) -> dict[str, Any] | None:
    """The values that this version wrote under a key, unchecked; None: there are none."""
    path = _path(kind, key)
    try:
        if path is None or not path.is_file():
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # unreadable, or no JSON of ours
        return None
    if not isinstance(content, dict) or (content.get("version"), content.get("key")) != (version, key):
        return None
    return content


def write(kind: str, version: int, key: str, **values: Any) -> None:
    """Keep values under a key."""
    path = _path(kind, key)
    if path is None:
        return
    with contextlib.suppress(OSError):  # a folder that cannot be written to is no reason to stop, or to complain
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"version": version, "key": key, **values}))
