"""Where files of image sets come from: a folder, a system package, the cache, the network."""

import gzip
import hashlib
import io
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from tests.lab.data.tiny_sets import tiny_idx, write

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.data import downloads
from kronblocks_lab.data.formats import find_files
from kronblocks_lab.data.sets import load_data
from kronblocks_lab.data.sources import SOURCES


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


def test_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert downloads.data_folder() == tmp_path / "cache"
    monkeypatch.delenv("KRONBLOCKS_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert downloads.data_folder() == tmp_path / "kronblocks" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    for platform, place in (("linux", ".cache"), ("darwin", "Library/Caches")):  # where timings are kept, too
        monkeypatch.setattr(sys, "platform", platform)
        assert downloads.data_folder() == tmp_path / place / "kronblocks" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    with pytest.raises(KronblocksError, match="KRONBLOCKS_DATA"):
        downloads.data_folder()


def test_find_files_prefers_the_usual_subfolder(tmp_path: Path) -> None:
    write(tmp_path, tiny_idx())
    write(tmp_path / "fashion-mnist", tiny_idx(), zipped=True)
    found = find_files(SOURCES["fashion-mnist"], tmp_path)
    assert found and {path.parent for path in found.values()} == {tmp_path / "fashion-mnist"}
