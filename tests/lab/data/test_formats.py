"""Files of image sets, and every way they can be wrong."""

import gzip
import io
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.lab.data.tiny_sets import idx_bytes, tar_gz, tiny_cifar, tiny_idx, write

from kronblocks.core.errors import KronblocksError, KronblocksWarning
from kronblocks_lab.data.formats import read_idx, read_members
from kronblocks_lab.data.sets import load_data
from kronblocks_lab.data.sources import SOURCES


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
