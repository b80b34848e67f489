"""The published image sets: their files, sizes and addresses."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Source:
    """The files of one image set, and where they come from.

    `files` are those of the training images, then those of the test images. In IDX (`label_bytes` 0) each of the two is a
    file of images and a file of labels. In the CIFAR binaries a record is `label_bytes` labels, the finest last, and the
    pixels; the images are spread evenly over the files.
    """

    name: str
    files: tuple[tuple[str, ...], tuple[str, ...]]
    counts: tuple[int, int]  # images for training and for testing
    image_shape: tuple[int, int, int]  # (C, H, W)
    classes: int
    downloads: dict[str, str]  # file -> MD5
    mirrors: tuple[str, ...]
    subfolders: tuple[str, ...]
    archive: str | None = None  # one .tar.gz with all the files
    label_bytes: int = 0
    pickled: tuple[str, ...] = ()  # what gives away the Python version of the set
    installed: str | None = None  # where a system package puts the files

    @property
    def by_hand(self) -> str:
        """How to get the files by hand, without a network."""
        return (
            f"get {', '.join(self.downloads)} from {' or '.join(self.mirrors)} by hand and name the folder that holds "
            "what you got: --data-dir DIR, in Python data_dir=DIR"
        )


_MNIST_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


def _idx_downloads(*md5: str) -> dict[str, str]:
    return dict(zip((f"{name}.gz" for part in _MNIST_FILES for name in part), md5, strict=True))


_MNIST = Source(
    name="mnist",
    files=_MNIST_FILES,
    counts=(60_000, 10_000),
    image_shape=(1, 28, 28),
    classes=10,
    downloads=_idx_downloads(
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "9fb629c4189551a2d022fa330f9573f3",
        "ec29112dd5afa0611ce80d1b7f02629c",
    ),
    mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    subfolders=("mnist", "MNIST/raw"),
)

_FASHION_MNIST = replace(
    _MNIST,
    name="fashion-mnist",
    downloads=_idx_downloads(
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "25c81989df183df01b3e8a0aad5dffbe",
        "bef4ecab320f06d8554ea6380940ec79",
        "bb300cfdad3c16e7a12a480ee83cd310",
    ),
    mirrors=(
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    subfolders=("fashion-mnist", "FashionMNIST/raw"),
    installed="/usr/share/datasets/fashion-mnist",  # Debian's package dataset-fashion-mnist
)

_CIFAR10 = Source(
    name="cifar10",
    files=(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)),
    counts=(50_000, 10_000),
    image_shape=(3, 32, 32),
    classes=10,
    downloads={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
    mirrors=("https://www.cs.toronto.edu/~kriz/",),
    subfolders=("cifar-10-batches-bin", "cifar10", "cifar10/cifar-10-batches-bin"),
    archive="cifar-10-binary.tar.gz",
    label_bytes=1,
    pickled=("cifar-10-python.tar.gz", "cifar-10-batches-py", "data_batch_1"),
)

_CIFAR100 = replace(
    _CIFAR10,
    name="cifar100",
    files=(("train.bin",), ("test.bin",)),
    classes=100,
    downloads={"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"},
    subfolders=("cifar-100-binary", "cifar100", "cifar100/cifar-100-binary"),
    archive="cifar-100-binary.tar.gz",
    label_bytes=2,  # coarse, fine
    pickled=("cifar-100-python.tar.gz", "cifar-100-python"),
)

SOURCES = {source.name: source for source in (_MNIST, _FASHION_MNIST, _CIFAR10, _CIFAR100)}
