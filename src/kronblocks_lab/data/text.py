"""Texts for language models: read, split and coded by characters the same way every time, and served in seeded windows."""

from __future__ import annotations

import functools
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.data.seeds import generator_of
from kronblocks_lab.data.sets import BatchSampler

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What stands in the vocabulary for all characters that the training part lacks."""

HELD_OUT = 0.05
"""Share of a text in its validation part, and in its test part."""

MOST_HELD_OUT = 200_000
"""Most characters of either, so that validation does not take longer than training."""

MOST_OF_LIBRARY = 4_000_000
"""Most characters of the standard library's text."""


class Source(NamedTuple):
    """Where a text comes from: what stands beside every number that was measured on it."""

    title: str
    characters: int
    bytes: int
    sha256: str  # of the text as UTF-8

    def __str__(self) -> str:
        return f"{self.title}, {self.bytes:,} bytes, SHA-256 {self.sha256[:12]}"


@dataclass(frozen=True, slots=True, eq=False)
class Passage:
    """A contiguous part of a text, as numbers of its characters in the vocabulary, int32 (N,)."""

    codes: Tensor
    context: int

    def __len__(self) -> int:
        """How many windows of `context` characters fit side by side, each with the character after it."""
        return (len(self.codes) - 1) // self.context

    @property
    def starts(self) -> int:
        """At how many places a window can begin."""
        return len(self.codes) - self.context

    def windows(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Windows that begin at some places, and the character that follows each of theirs; both int64 (N, context)."""
        window = self.codes[starts[:, None] + torch.arange(self.context + 1)].long()
        return window[:, :-1], window[:, 1:]


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A text in three contiguous parts that do not overlap: first training, then validation, then test."""

    source: Source
    vocabulary: str
    train: Passage
    validation: Passage
    test: Passage


def load_text(file: Path | None, context: int) -> Text:
    """A text from a file, or the source of Python's standard library.

    The last 5% are for testing and the 5% before for validation, at most 200,000 characters each. The vocabulary has the
    characters of the training part, and one for all others.

    Args:
        file: in UTF-8; None: the standard library of the running Python.
        context: characters that a model sees.

    Raises:
        KronblocksError: the file cannot be read, is not UTF-8, or is too short for the context.
    """
    source, text = library_text() if file is None else _read(file)
    held_out = min(int(HELD_OUT * len(text)), MOST_HELD_OUT)
    if held_out < context + 1:
        needed = -(-(context + 1) // HELD_OUT)
        raise KronblocksError(
            f"{source.title} has {len(text):,} characters, of which {held_out} would be for validation, fewer than a window of "
            f"--context {context} and the character after it: use a text of at least {needed:,.0f} characters, or less context"
        )
    first, second = len(text) - 2 * held_out, len(text) - held_out
    vocabulary = UNKNOWN + "".join(sorted(set(text[:first]) - {UNKNOWN}))
    codes = encoded(text, vocabulary)
    parts = (Passage(codes[slice(*ends)], context) for ends in ((0, first), (first, second), (second, None)))
    return Text(source, vocabulary, *parts)


def encoded(text: str, vocabulary: str) -> Tensor:
    """Numbers of characters in a vocabulary, int32 (N,); 0 for those that it lacks.

    >>> encoded("abca?", "\\N{REPLACEMENT CHARACTER}abc").tolist()
    [1, 2, 3, 1, 0]
    """
    places = torch.zeros(0x110000, dtype=torch.int32)
    places[_points(vocabulary).long()] = torch.arange(len(vocabulary), dtype=torch.int32)
    return places[_points(text).long()]


def _points(text: str) -> Tensor:
    """Unicode code points, int32 (N,)."""
    return torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)


def decoded(codes: Tensor, vocabulary: str) -> str:
    """The text of some numbers (N,)."""
    return "".join(vocabulary[code] for code in codes.tolist())


def source_of(file: Path | None) -> Source:
    """Where a text comes from, and its SHA-256, by which a training knows it again.

    Raises:
        KronblocksError: the file cannot be read, or is not UTF-8.
    """
    return (library_text() if file is None else _read(file))[0]


def _read(file: Path) -> tuple[Source, str]:
    try:
        content = file.expanduser().read_bytes()
    except OSError as error:
        raise KronblocksError(f"cannot read {file}: {error.strerror or error}; name a text file with --data-file") from error
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise KronblocksError(
            f"{file} is not text in UTF-8 (byte 0x{content[error.start]:02x} at place {error.start:,}): convert it first, for "
            f"example with iconv -f LATIN1 -t UTF-8"
        ) from error
    return _described(file.name, text), text


@functools.cache
def library_text() -> tuple[Source, str]:
    """The source of the modules at the top of the installed standard library, in the order of their names.

    The module of build settings, which differs from machine to machine, is left out.

    Raises:
        KronblocksError: it is not installed as source.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda file: file.name)
    try:
        text = "".join(file.read_text("utf-8") for file in files if not file.name.startswith("_sysconfigdata"))
    except (OSError, UnicodeDecodeError) as error:
        raise KronblocksError(f"cannot read Python's standard library ({error}): name a text with --data-file") from error
    if len(text) < 1_000_000:
        raise KronblocksError("Python's standard library is not installed as source here: name a text with --data-file")
    text = text[:MOST_OF_LIBRARY]
    return _described(f"the standard library of Python {platform.python_version()}", text), text


def _described(title: str, text: str) -> Source:
    content = text.encode()
    return Source(title, len(text), len(content), hashlib.sha256(content).hexdigest())


class WindowSampler(Sampler[Tensor]):
    """Batches of places at which windows begin, int64 (batch_size,), drawn evenly from (seed, epoch) and nothing else.

    Lightning calls `set_epoch` automatically.

    Args:
        starts: number of places.
        batch_size: windows in a batch.
        batches: of an epoch.
        seed: of the draws.
    """

    def __init__(self, starts: int, batch_size: int, batches: int, seed: int) -> None:
        self.starts, self.batch_size, self.batches, self.seed = starts, batch_size, batches, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of this epoch for the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        generator = generator_of(self.seed, self.epoch)
        for _ in range(self.batches):
            yield torch.randint(self.starts, (self.batch_size,), generator=generator)


class _Windows(TorchDataset[tuple[Tensor, Tensor]]):
    """A passage indexed by a batch of numbers at a time; window i begins at `i * stride`."""

    def __init__(self, passage: Passage, stride: int) -> None:
        self._passage, self._stride = passage, stride

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self._passage.windows(index * self._stride)

    def __len__(self) -> int:
        return self._passage.starts if self._stride == 1 else len(self._passage)


def random_windows(passage: Passage, sampler: WindowSampler) -> DataLoader:
    """A DataLoader of [characters, following characters], in the sampler's batches; draws nothing from global random state."""
    return DataLoader(_Windows(passage, 1), sampler=sampler, batch_size=None, generator=torch.Generator())


def all_windows(passage: Passage, characters: int = 8192) -> DataLoader:
    """A DataLoader of a passage's windows side by side, each once and in order; batches have about this many characters.

    The characters after the last whole window are left out.
    """
    batches = BatchSampler(len(passage), max(1, characters // passage.context), 0, shuffle=False)
    return DataLoader(_Windows(passage, passage.context), sampler=batches, batch_size=None, generator=torch.Generator())
