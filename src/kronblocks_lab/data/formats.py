"""The published files of the image sets: their names, folders and formats.

Files are read whole and checked against the published sizes. Nothing is unpickled, or unpacked to disk.
"""

from __future__ import annotations

import gzip
import math
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.data.sources import Source

_CHUNK = 1 << 18  # bytes read at once where they are only skipped


class Images(NamedTuple):
    """Pixels as published, uint8 (N, C, H, W), and their labels, int64 (N,)."""

    pixels: Tensor
    labels: Tensor


def _folders(source: Source, folder: Path) -> list[Path]:
    """The usual subfolders, then the folder itself: two sets may share file names."""
    return [*(folder / name for name in source.subfolders), folder]


def find_files(source: Source, folder: Path, *, allow_partial: bool = False) -> dict[str, Path] | None:
    """Published name -> path of every file of a set, or of its one archive; None when they are not there.

    Raises:
        KronblocksError: only some of the files are there, unless `allow_partial`.
    """
    names = [name for part in source.files for name in part]
    partial: KronblocksError | None = None
    for place in _folders(source, folder):
        paths = ((name, place / f"{name}{suffix}") for name in names for suffix in (".gz", ""))
        found = {name: path for name, path in paths if path.is_file()}
        if len(found) == len(names):
            return found
        if source.archive and (place / source.archive).is_file():
            return {source.archive: place / source.archive}
        if found and not partial:
            missing = ", ".join(name for name in names if name not in found)
            partial = KronblocksError(
                f"{place} holds only a part of {source.name}; missing: {missing}, with or without .gz. Add these, or "
                f"{source.by_hand}"
            )
    if partial and not allow_partial:
        raise partial
    return None


def pickled_version(source: Source, folder: Path) -> Path | None:
    """The Python (pickle) version of a set, which this library never reads, where only that one is there."""
    candidates = (place / name for place in _folders(source, folder) for name in source.pickled)
    return next((path for path in candidates if path.exists()), None)


def read_files(source: Source, found: dict[str, Path]) -> tuple[Images, Images]:
    """The training images and the test images of a set, from the paths that `find_files` gave.

    Raises:
        KronblocksError: a file is damaged, or is not what its name says.
    """
    train, test = (
        (_read_cifar if source.label_bytes else _read_idx_pair)(source, found, names, count)
        for names, count in zip(source.files, source.counts, strict=True)
    )
    return train, test


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The uint8 tensor of a known shape in an IDX file, gzipped or not.

    Source: the format is described on the page of MNIST (LeCun, Cortes, Burges, 1998).

    Raises:
        KronblocksError: another magic number or shape, fewer or more bytes than the shape needs, damaged gzip.
    """
    with _opened(path) as stream:
        header = stream.read(4 + 4 * len(shape))
        magic = bytes((0, 0, 8, len(shape)))  # 8: unsigned bytes
        if header[:4] != magic:
            raise damaged(path, f"the magic number 0x{magic.hex()} of IDX", f"0x{header[:4].hex()}")
        sizes = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4))
        if sizes != shape:  # nothing is read by sizes that a damaged file promises
            raise damaged(path, f"sizes {' x '.join(map(str, shape))}", " x ".join(map(str, sizes)) or "none")
        return _bytes_tensor(_read_exactly(stream, math.prod(shape), path, last=True)).reshape(shape)


def read_members(path: Path, lengths: dict[str, int]) -> dict[str, bytes]:
    """The contents of the wanted files, name -> length in bytes, of a .tar.gz, whatever folder they are in.

    It reads the plain headers of the archive. So only wanted files of the right length are held in memory, and paths in the
    archive do not matter.

    Raises:
        KronblocksError: a wanted file is missing or of another length, the archive is damaged.
    """
    found: dict[str, bytes] = {}
    with _opened(path) as stream:
        while (header := stream.read(tarfile.BLOCKSIZE)).strip(b"\0"):
            try:
                member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise damaged(path, "a tar archive", f"a header that is none ({error})") from error
            if member.islnk() or member.issym() or member.isdir() or member.isdev():
                continue  # these have no data
            name, size = PurePosixPath(member.name).name, member.size
            padded = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if member.isreg() and name in lengths and name not in found:
                if size != lengths[name]:
                    raise damaged(path, f"{name} of {lengths[name]} bytes", f"{size} bytes")
                found[name] = _read_exactly(stream, size, path)
                padded -= size
            _skip(stream, padded, path)
        while stream.read(_CHUNK):  # to the end, where gzip checks its sum
            pass
    if missing := [name for name in lengths if name not in found]:
        raise damaged(path, ", ".join(lengths), f"no {', '.join(missing)}")
    return found


def checked_labels(path: Path, labels: Tensor, classes: int) -> Tensor:
    """Labels as int64.

    Raises:
        KronblocksError: a label is not below the number of classes.
    """
    if labels.numel() and int(labels.max()) >= classes:
        raise damaged(path, f"labels from 0 to {classes - 1}", f"label {int(labels.max())}")
    return labels.long()


def damaged(path: Path, expected: str, found: str) -> KronblocksError:
    """The error for a file that is not what it should be."""
    return KronblocksError(
        f"{path} is damaged or another file than its name says: expected {expected}, found {found}. "
        "Put a fresh copy in its place, or delete it to have it downloaded again"
    )


def _read_idx_pair(source: Source, found: dict[str, Path], names: tuple[str, ...], count: int) -> Images:
    """One part of a set in IDX: a file of grey images and a file of labels."""
    pixels, labels = (found[name] for name in names)
    images = read_idx(pixels, (count, *source.image_shape[1:])).reshape(count, *source.image_shape)
    return Images(images, checked_labels(labels, read_idx(labels, (count,)), source.classes))


def _read_cifar(source: Source, found: dict[str, Path], names: tuple[str, ...], count: int) -> Images:
    """One part of a set in CIFAR binaries, from its archive or from its files."""
    record = source.label_bytes + math.prod(source.image_shape)
    lengths = dict.fromkeys(names, count // len(names) * record)
    archive = found.get(source.archive or "")
    members = read_members(archive, lengths) if archive else {}
    pixels, labels = [], []
    for name, length in lengths.items():
        path = archive / name if archive else found[name]
        content = members[name] if archive else _read_file(path, length)
        records = _bytes_tensor(content).reshape(-1, record)
        labels.append(checked_labels(path, records[:, source.label_bytes - 1], source.classes))
        pixels.append(records[:, source.label_bytes :].reshape(-1, *source.image_shape))
    return Images(torch.cat(pixels), torch.cat(labels))


def _read_file(path: Path, length: int) -> bytes:
    with _opened(path) as stream:
        return _read_exactly(stream, length, path, last=True)


def _bytes_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed where the content (not the name) says gzip; reading faults become ours."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise damaged(path, "intact gzip data", f"damaged data ({error})") from error
    except OSError as error:
        raise KronblocksError(f"cannot read {path}: {error.strerror or error}") from error


def _read_exactly(stream: BinaryIO, length: int, path: Path, *, last: bool = False) -> bytes:
    """The next `length` bytes; with `last` nothing may follow them. Reads one byte more at most."""
    content = stream.read(length + last)
    if len(content) != length:
        found = "more than that" if len(content) > length else f"only {len(content)}"
        raise damaged(path, f"{length} bytes of data", found)
    return content


def _skip(stream: BinaryIO, length: int, path: Path) -> None:
    while length > 0:
        passed = len(stream.read(min(length, _CHUNK)))
        if not passed:
            raise damaged(path, f"{length} bytes more", "the end of the file")
        length -= passed
