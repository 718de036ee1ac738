"""Images are a function of their seed, drawings stay inside their inks, colours keep their contrast."""

from __future__ import annotations

import numpy as np
import pytest
from mergesolve.zoo.drawings import HUES, among_distractors, named_colour
from mergesolve.zoo.rendering import Nuisance, render
from mergesolve.zoo.tasks import ALL, TASKS, Concepts, generator, images

ROWS = pytest.mark.parametrize("row", ALL, ids=lambda row: row.name)


@ROWS
def test_same_seed_gives_the_same_images_and_another_seed_others(row: Concepts) -> None:
    first, labels = images(row, 40, generator(row.name, 50))
    again, same = images(row, 40, generator(row.name, 50))
    other, _ = images(row, 40, generator(row.name, 51))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(labels, same)
    assert first.shape == (40, 3, 32, 32)
    assert first.dtype == np.uint8
    assert (first != other).any(axis=(1, 2, 3)).all()


@ROWS
def test_drawings_do_not_overlap_and_leave_no_canvas_empty(row: Concepts) -> None:
    classes = np.arange(60) % len(row.classes)
    for level in (0.0, 1.0):
        masks = row.drawing(np.random.default_rng(3), classes, level)
        assert masks.sum(axis=1, dtype=int).max() <= 255
        # An even ink over everything would show nothing; a missing glyph or an empty drawing would, too.
        assert (masks[:, 0].reshape(60, -1).std(axis=1) > 1).all()


@ROWS
def test_classes_of_a_row_look_different(row: Concepts) -> None:
    # The mean of a class, over drawings and over their spectra (gratings have no fixed place), is nearest to the mean
    # of the same class in other drawings more often than chance would have it.
    if row.palette is named_colour:
        pytest.skip("colour is the class, the drawings are alike")
    n = len(row.classes)
    means = []
    for half in range(2):
        masks = row.drawing(np.random.default_rng(half), np.repeat(np.arange(n), 24), 0.0).astype(float)
        spectra = np.abs(np.fft.fft2(masks)) / masks.shape[-1]
        both = np.concatenate([masks.reshape(n, 24, -1), spectra.reshape(n, 24, -1)], axis=2)
        means.append(both.mean(axis=1))
    between = np.linalg.norm(means[0][:, None] - means[1][None], axis=2)
    right = (between.argmin(axis=1) == np.arange(n)).mean()
    assert right >= min(0.6, 4 / n)


def test_without_nuisance_an_image_has_the_colours_of_its_palette_only() -> None:
    classes = np.arange(200) % len(HUES)
    still = Nuisance(rotation=0, shift=0, zoom=0, shear=0, clutter=0, shade=0, noise=0, blur=0, dim=0)
    image = render(among_distractors, classes, np.random.default_rng(0), still, 1.0, named_colour)
    saturation = image.max(axis=1).astype(int) - image.min(axis=1)
    for k, hue in enumerate(HUES[:8]):
        pixels = image[classes == k].transpose(0, 2, 3, 1)[saturation[classes == k] > 60]
        assert np.abs(np.median(pixels, axis=0) / 255 - hue).max() < 0.1


def test_nuisance_grows_with_the_level() -> None:
    row = TASKS[0]
    clean, labels = images(row, 100, generator(row.name, 60), 0.0)
    hard, _ = images(row, 100, generator(row.name, 60), 1.0)

    def roughness(x: np.ndarray) -> float:
        return float(np.abs(np.diff(x.astype(float), axis=3)).mean())

    assert roughness(hard) > 1.5 * roughness(clean)
    assert sorted(labels) == sorted(np.arange(100) % 10)
