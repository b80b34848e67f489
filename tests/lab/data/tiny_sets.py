"""Image sets of 40 + 20 images, as files in the formats of the real ones."""

import gzip
import io
import tarfile
from pathlib import Path

import torch

from kronblocks_lab.data.sources import SOURCES

COUNTS = (40, 20)  # images of the tiny sets below, for training and for testing


def idx_bytes(values: torch.Tensor) -> bytes:
    header = bytes((0, 0, 8, values.dim())) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return header + bytes(values.flatten().tolist())


def tiny_idx() -> dict[str, bytes]:
    """The four files of an MNIST of 40 + 20 images, by name."""
    random = torch.Generator().manual_seed(3)
    contents = {}
    for (images, labels), count in zip(SOURCES["mnist"].files, COUNTS, strict=True):
        pixels = torch.randint(0, 256, (count, 28, 28), generator=random)
        contents[images] = idx_bytes(pixels)
        contents[labels] = idx_bytes(torch.arange(count) % 10)
    return contents


def tiny_cifar(name: str) -> dict[str, bytes]:
    """The .bin files of a CIFAR: the first pixel of an image is its number in the file, the fine label number % 4."""
    source = SOURCES[name]
    contents = {}
    for files, count in zip(source.files, COUNTS, strict=True):
        for file in files:
            coarse = [7] * (source.label_bytes - 1)
            records = [bytes([*coarse, i % 4, i]) + bytes(range(256)) * 11 + bytes(255) for i in range(count // len(files))]
            contents[file] = b"".join(records)
    return contents


def write(folder: Path, contents: dict[str, bytes], *, zipped: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}{'.gz' * zipped}").write_bytes(gzip.compress(content, 1) if zipped else content)
    return folder


def tar_gz(contents: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        folder = tarfile.TarInfo("set/")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()
