"""Find the files of a data set in the user's folder, an installed package or the cache, or download them."""

from __future__ import annotations

import hashlib
import http.client
import os
import secrets
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kronblocks.core.cache import users_folder
from kronblocks.core.errors import KronblocksError, KronblocksWarning
from kronblocks_lab.data.formats import find_files, pickled_version
from kronblocks_lab.data.sources import Source

_TIMEOUT = 30.0  # seconds without a byte
_LARGEST_DOWNLOAD = 1 << 28  # bytes; the largest published file has 170 MB
_CHUNK = 1 << 18  # bytes


def data_folder() -> Path:
    """Where downloads are kept: `$KRONBLOCKS_DATA`, else data in the library's cache folder.

    Raises:
        KronblocksError: there is neither.
    """
    if chosen := os.environ.get("KRONBLOCKS_DATA"):
        return Path(chosen).expanduser()
    folder = users_folder()
    if folder is None:
        raise KronblocksError("this user has no cache folder for data sets: name a folder in the variable KRONBLOCKS_DATA")
    return folder / "data"


def locate(source: Source, data_dir: Path | None, download: bool) -> dict[str, Path]:
    """Paths of the files of a set, downloaded if there are none."""
    if data_dir is not None and (found := find_files(source, data_dir)):
        return found
    cache = data_folder()
    places = [Path(source.installed), cache] if source.installed else [cache]
    looked = ((place, find_files(source, place, allow_partial=True)) for place in places)
    used, found = next((pair for pair in looked if pair[1]), (None, None))
    if not found and data_dir is not None and (pickled := pickled_version(source, data_dir)):
        raise KronblocksError(
            f"{pickled} is the Python version of {source.name}: pickles, which are never read here since they can run any "
            f"code. The binary version is needed: {source.by_hand}"
        )
    if not found and not download:
        tried = ", ".join(str(place) for place in ([data_dir, *places] if data_dir is not None else places))
        raise KronblocksError(f"{source.name} is not in {tried}, and download=False. Allow it, or {source.by_hand}")
    if data_dir is not None:
        instead = f"{used} is used" if used else f"it is downloaded to {cache / source.name}"
        warnings.warn(f"{data_dir} has no files of {source.name}: {instead} instead", KronblocksWarning, stacklevel=3)
    if not found:
        _download(source, cache / source.name)
        found = find_files(source, cache)
    assert found, "a finished download is where the cache is looked through"
    return found


def _download(source: Source, folder: Path) -> None:
    """Download the missing files of a set, each from the first mirror that has it."""
    for name, md5 in source.downloads.items():
        if (folder / name).is_file():
            continue
        failures = []
        for mirror in source.mirrors:
            try:
                _fetch(mirror + name, folder / name, md5)
                break
            except (OSError, http.client.HTTPException) as error:
                failures.append(f"{mirror}{name}: {error or type(error).__name__}")
        else:
            raise KronblocksError(
                f"cannot download {source.name} to {folder} ({'; '.join(failures)}). Check the network, or {source.by_hand}"
            )


def _fetch(url: str, target: Path, md5: str) -> None:
    """Download one file and check it. It gets its name only when it is complete."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    digest, size = hashlib.md5(usedforsecurity=False), 0
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
        length = answer.headers.get("Content-Length", "")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file, _progress(target.name, int(length) if length.isdecimal() else None) as advance:
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
                    advance(len(chunk))
                    size += len(chunk)
                    if size > _LARGEST_DOWNLOAD:
                        raise OSError(f"sends more than {_LARGEST_DOWNLOAD} bytes")
            if digest.hexdigest() != md5:
                raise OSError(f"not the published file: {size} bytes with MD5 {digest.hexdigest()} instead of {md5}")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _progress(label: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr where rich is installed; yields what counts bytes."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
    except ImportError:
        yield lambda count: None
        return
    with Progress(label, BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
