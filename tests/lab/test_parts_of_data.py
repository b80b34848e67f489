"""Folds and limited sets: parts of the same images, the same in every run."""

from __future__ import annotations

import pytest
import torch

from kronblocks import KronblocksError
from kronblocks_lab.data.sets import FOLDS, limited, load_data


def test_folds_share_out_the_training_images_and_leave_the_test_images_alone():
    whole = load_data("digits")
    labels = []
    for fold in range(FOLDS):
        data = load_data("digits", fold=fold)
        assert len(data.train) + len(data.validation) == len(whole.train) + len(whole.validation)
        assert torch.equal(data.test.labels, whole.test.labels)
        assert abs(len(data.validation) - 1438 / 5) < 1
        counts = data.validation.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 2  # every class in every fold
        labels.append(data.validation.labels)
    assert sum(map(len, labels)) == 1438
    again = load_data("digits", fold=2)
    assert torch.equal(again.validation.labels, labels[2])
    with pytest.raises(KronblocksError, match="0 to 4"):
        load_data("digits", fold=5)


def test_limited_sets_are_parts_of_the_larger_ones():
    data = load_data("digits")
    small, larger = limited(data, 100, 50), limited(data, 300, 200)
    assert (len(small.train), len(small.validation), len(small.test)) == (100, 50, 50)
    assert (len(larger.train), len(larger.validation), len(larger.test)) == (300, 144, 200)  # 144 is all that there are
    assert torch.equal(small.train.images, larger.train.images[:100])
    assert limited(data).train is data.train
    assert torch.equal(limited(data, 100, 50).test.images, small.test.images)
    with pytest.raises(KronblocksError, match="has 1294 images for training"):
        limited(data, 5000)
