"""The table is consistent, its captions can be told apart by the text tower, its splits share nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mergesolve.zoo.model import CONTEXT, captions, tokens, vocabulary
from mergesolve.zoo.tasks import ALL, BY_NAME, TASKS, TEMPLATES, balanced, images, reference_images, split_images


def test_the_table_has_many_distinct_tasks() -> None:
    assert len(TASKS) >= 20
    assert len(BY_NAME) == len(ALL)
    assert all(4 <= len(row.classes) <= 26 for row in ALL)
    assert sum(len(row.classes) for row in TASKS) >= 180


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_caption_is_unique_and_fits_the_context(template: str) -> None:
    ids = tokens(captions(template))
    assert len(torch.unique(ids, dim=0)) == sum(len(row.classes) for row in ALL)
    end = len(vocabulary()) - 1
    assert ids.shape[1] == CONTEXT
    assert (ids == end).sum(dim=1).eq(1).all()
    assert ids.argmax(dim=1).max() < CONTEXT - 1  # end-of-text was not cut off


@pytest.mark.parametrize("name", ["digits", "arrows", "colours"])
def test_splits_share_no_image_and_are_balanced(name: str) -> None:
    row = BY_NAME[name]
    seen: set[bytes] = set()
    for split, n in (("train", 300), ("validation", 200), ("test", 200)):
        x, y = split_images(row, split, n)
        counts = np.bincount(y, minlength=len(row.classes))
        assert counts.max() - counts.min() <= 1
        fresh = {image.tobytes() for image in x}
        assert len(fresh) == n
        assert not fresh & seen
        seen |= fresh


def test_augmented_editions_share_no_image_with_the_split() -> None:
    row = BY_NAME["shapes"]
    train = {image.tobytes() for image in split_images(row, "train", 100)[0]}
    again = {image.tobytes() for image in split_images(row, "train", 100, edition=1)[0]}
    assert not train & again


def test_handwritten_digits_of_two_splits_are_different_scans() -> None:
    row = BY_NAME["digits"]
    assert row.splits is not None
    drawings = {"train": row.drawing, **row.splits}
    scans = {}
    for split, drawing in drawings.items():
        masks = drawing(np.random.default_rng(0), np.arange(3000) % 10, 0.0)
        scans[split] = {mask.tobytes() for mask in masks[:, 0]}
    assert len(scans["train"]) > 500
    assert not scans["train"] & scans["test"]
    assert not scans["train"] & scans["validation"]
    assert not scans["validation"] & scans["test"]


def test_balanced_labels_differ_by_at_most_one() -> None:
    labels = balanced(np.random.default_rng(0), 103, 8)
    counts = np.bincount(labels, minlength=8)
    assert counts.sum() == 103
    assert set(counts) == {12, 13}


def test_reference_covers_every_class_of_every_row() -> None:
    sets = reference_images("train", 2)
    assert tuple(sets) == tuple(row.name for row in ALL)
    for row in ALL:
        x, y = sets[row.name]
        assert len(x) == 2 * len(row.classes)
        np.testing.assert_array_equal(np.bincount(y), np.full(len(row.classes), 2))


def test_images_in_chunks_equal_those_of_one_generator() -> None:
    row = BY_NAME["angles"]
    x, y = images(row, 700, np.random.default_rng(1))
    assert x.shape == (700, 3, 32, 32)
    assert y.shape == (700,)
