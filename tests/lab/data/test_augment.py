"""Crops, flips, mixup and label smoothing against loops over pixels, and their draws."""

from __future__ import annotations

import pytest
import torch

from kronblocks_lab.data.augment import Augmentation, moved
from kronblocks_lab.data.seeds import generator_of

IMAGES = torch.arange(1.0, 1 + 6 * 2 * 4 * 5).reshape(6, 2, 4, 5)
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])


def piece(image, top, left, mirrored, padding):
    """Pixel by pixel; outside of the image is 0."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for c in range(channels):
        for row in range(height):
            for column in range(width):
                y, x = row + top - padding, (width - 1 - column if mirrored else column) + left - padding
                if 0 <= y < height and 0 <= x < width:
                    out[c, row, column] = image[c, y, x]
    return out


def test_pieces_are_those_of_a_loop_over_pixels():
    offsets = torch.tensor([[0, 0], [4, 4], [2, 2], [1, 3], [3, 0], [0, 4]])
    mirrored = torch.tensor([False, True, True, False, True, False])
    found = moved(IMAGES, offsets, mirrored, 2)
    for image, (top, left), is_mirrored, out in zip(IMAGES, offsets.tolist(), mirrored.tolist(), found, strict=True):
        assert torch.equal(out, piece(image, top, left, is_mirrored, 2))
    assert torch.equal(found[2], IMAGES[2].flip(-1)) and found.is_contiguous()


def test_crops_and_flips_take_every_place_and_nothing_else():
    augmentation = Augmentation(crop=1, flip=True)
    possible = {
        tuple(piece(IMAGES[0], top, left, mirrored, 1).flatten().tolist())
        for top in range(3)
        for left in range(3)
        for mirrored in (False, True)
    }
    seen = set()
    for number in range(60):
        images, labels = augmentation(IMAGES[:1].expand(4, -1, -1, -1), LABELS[:4], 3, generator_of(0, number))
        seen |= {tuple(image.flatten().tolist()) for image in images}
        assert labels is not None and torch.equal(labels, LABELS[:4])
    assert seen == possible and len(possible) == 18


def test_half_of_the_images_are_mirrored_and_without_a_crop_none_is_moved():
    images, _ = Augmentation(flip=True)(IMAGES[:1].expand(2000, -1, -1, -1), torch.zeros(2000).long(), 3, generator_of(0))
    mirrored = (images == IMAGES[0].flip(-1)).all(dim=(1, 2, 3))
    assert 900 < int(mirrored.sum()) < 1100 and torch.equal(
        images[~mirrored], IMAGES[:1].expand(int((~mirrored).sum()), -1, -1, -1)
    )


def test_mixup_mixes_images_and_labels_with_one_share():
    """Image i is all ones at feature i, so a mixture tells who is in it and with which share."""
    images, labels, shares = torch.eye(6).reshape(6, 1, 2, 3), torch.arange(6), []
    for number in range(200):
        mixed, classes = Augmentation(mixup=0.2)(images, labels, 6, generator_of(0, number))
        assert torch.equal(mixed.flatten(1), classes)
        torch.testing.assert_close(classes.sum(0), torch.ones(6))  # each image is in it once as the first, once as the second
        torch.testing.assert_close(classes.sum(1), torch.ones(6))
        assert int((classes > 0).sum(1).max()) <= 2
        shares += [float(classes[0, 0])] if classes[0, 0] < 1 else []
        assert len({round(float(share), 5) for share in classes.diag() if share < 1}) <= 1
    assert len(shares) > 100 and sum(0.1 < share < 0.9 for share in shares) < 0.6 * len(shares)  # Beta(0.2, 0.2)


def test_smoothing_is_that_of_the_cross_entropy():
    logits = torch.randn(6, 3, generator=generator_of(0))
    images, shares = Augmentation(smoothing=0.1)(IMAGES, LABELS, 3, generator_of(0))
    expected = torch.nn.functional.cross_entropy(logits, LABELS, label_smoothing=0.1)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, shares), expected)
    assert images is IMAGES


def test_nothing_is_done_by_default():
    images, labels = Augmentation()(IMAGES, LABELS, 3, generator_of(0))
    assert images is IMAGES and labels is LABELS


@pytest.mark.parametrize(
    "augmentation", [Augmentation(crop=2, flip=True), Augmentation(mixup=0.5), Augmentation(2, True, 0.5, 0.1)]
)
def test_draws_come_from_the_generator_alone(augmentation):
    state = torch.get_rng_state()
    first = augmentation(IMAGES, LABELS, 3, generator_of(1, 2, 3))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(3)
    again, other = (augmentation(IMAGES, LABELS, 3, generator_of(*numbers)) for numbers in ((1, 2, 3), (1, 2, 4)))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
