from __future__ import annotations

import math
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.objectives import CLIP, CORRUPTIONS, DataError, Task, Weights, corrupt, evaluate
from mergesolve.objectives.corruptions import SEVERITIES, _edges
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

RANDOM = ("motion-blur", "impulse-noise", "gaussian-noise", "spatter")


def _noise(n: int, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (n, 3, height, width), dtype=np.uint8))


def _natural(n: int, side: int) -> torch.Tensor:
    """Images whose amplitudes fall as 1 / frequency, as those of photographs do, with all grey levels in use."""
    rng = np.random.default_rng(5)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(rng.standard_normal((n, 3, side, side))) / frequency
    images = np.fft.ifft2(spectrum).real
    images -= images.mean(axis=(2, 3), keepdims=True)
    images = 128 + 55 * images / images.std(axis=(2, 3), keepdims=True)
    return torch.from_numpy(np.clip(images, 0, 255).astype(np.uint8))


def _task(images: torch.Tensor) -> Task:
    return Task("t", images, torch.arange(len(images)) % 2, ("a", "b"), split="test")


# -- every kind --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_type_and_shape_are_kept_at_every_size_and_the_images_are_left_as_they_were(kind: str) -> None:
    for height, width in ((32, 32), (24, 40), (5, 9), (1, 1), (1, 30)):
        images = _noise(2, height, width)
        before = images.clone()
        for severity in SEVERITIES:
            corrupted = corrupt(images, kind, severity)
            assert corrupted.dtype == torch.uint8
            assert corrupted.shape == images.shape
        assert torch.equal(images, before)
    assert corrupt(images[:0], kind, 1).shape == (0, 3, 1, 30)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize(("side", "n"), [(32, 40), (64, 12), (224, 3)])
def test_images_move_away_from_the_clean_ones_with_severity(kind: str, side: int, n: int) -> None:
    clean = _natural(n, side)
    moved = [(corrupt(clean, kind, s).double() - clean.double()).square().mean().item() for s in SEVERITIES]
    assert moved[0] > 0
    # Water and mud are not comparable; and at 32 pixels the trail of severity 4 is longer only where it has no weight.
    runs = [moved[:3], moved[3:]] if kind == "spatter" else [moved]
    for run in runs:
        if kind == "motion-blur" and side == 32:
            assert run[3] == pytest.approx(run[2], rel=1e-3)
            run = run[:3] + run[4:]
        assert np.all(np.diff(run) > 0), moved


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_an_image_is_corrupted_alike_in_every_batch(kind: str) -> None:
    task = _task(_noise(9)).corrupted(kind, 5, seed=3)
    whole = task.batch(np.arange(9))
    again = _task(_noise(9)).corrupted(kind, 5, seed=3)
    for chunk in ([4], [8, 0], [4, 4, 1], [7, 6, 5, 4, 3]):
        assert torch.equal(again.batch(np.array(chunk)), whole[chunk])
    assert torch.equal(task.take(np.array([6, 2])).batch(np.arange(2)), whole[[6, 2]])
    assert torch.equal(corrupt(_noise(9)[[6, 2]], kind, 5, 3, [6, 2]), whole[[6, 2]])


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_random_kinds_and_only_they_depend_on_the_seed_and_on_the_index(kind: str) -> None:
    images = _noise(1).expand(4, -1, -1, -1)
    one, other = corrupt(images, kind, 5, seed=0), corrupt(images, kind, 5, seed=1)
    assert torch.equal(one, corrupt(images, kind, 5, seed=0))
    assert torch.equal(one, other) == (kind not in RANDOM)
    assert torch.equal(one[0], one[1]) == (kind not in RANDOM)


def test_constants_are_the_papers_at_both_sizes_and_a_power_law_between_them() -> None:
    jpeg, motion = CORRUPTIONS["jpeg"], CORRUPTIONS["motion-blur"]
    assert [jpeg.constants(s, 32) for s in SEVERITIES] == [(80,), (65,), (58,), (50,), (40,)]
    assert [jpeg.constants(s, 224) for s in SEVERITIES] == [(25,), (18,), (15,), (10,), (7,)]
    assert [motion.constants(s, 32) for s in SEVERITIES] == [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)]
    assert [motion.constants(s, 224) for s in SEVERITIES] == [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)]
    middle = round(math.sqrt(32 * 224))
    assert jpeg.constants(1, middle)[0] == pytest.approx(math.sqrt(80 * 25), rel=0.01)
    assert motion.constants(5, middle) == pytest.approx((math.sqrt(9 * 20), math.sqrt(2.5 * 15)), rel=0.01)
    # Beyond them, lengths in pixels follow the size and the rest stays.
    assert motion.constants(5, 448) == (40, 30)
    assert motion.constants(5, 16) == (4.5, 1.25)
    assert (jpeg.constants(2, 448), jpeg.constants(2, 16)) == ((18,), (65,))
    assert CORRUPTIONS["spatter"].constants(5, 448) == (0.67, 0.4, 2, 0.65, 0, 3)
    for corruption in CORRUPTIONS.values():
        assert len(corruption.small) == len(corruption.large) == len(SEVERITIES)
        assert corruption.summary.endswith(".")
        assert "Hendrycks and Dietterich (2019)" in corruption.source


# -- one by one --------------------------------------------------------------------------------------------------------


def test_gaussian_noise_has_mean_zero_and_the_papers_variance() -> None:
    grey = torch.full((40, 3, 32, 32), 128, dtype=torch.uint8)
    for severity, sigma in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noise = corrupt(grey, "gaussian-noise", severity).double() - 128
        n, expected = noise.numel(), (255 * sigma) ** 2 + 1 / 12  # the rounding's variance
        assert abs(noise.mean()) < 4 * math.sqrt(expected / n)
        assert noise.var().item() == pytest.approx(expected, rel=4 * math.sqrt(2 / n))
        # Neither images nor channels share their noise.
        flat = noise.reshape(120, -1).numpy()
        correlation = np.corrcoef(flat)[~np.eye(120, dtype=bool)]
        assert np.abs(correlation).max() < 6 / math.sqrt(32 * 32)


def test_impulse_noise_turns_the_papers_share_black_or_white_and_leaves_the_rest() -> None:
    images = _noise(40).clamp(1, 254)
    for severity, share in zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True):
        corrupted = corrupt(images, "impulse-noise", severity)
        white, black = corrupted == 255, corrupted == 0
        n = images.numel()
        for hit in (white, black):
            assert hit.double().mean().item() == pytest.approx(share / 2, abs=4 * math.sqrt(share / 2 / n))
        assert torch.equal(corrupted[~(white | black)], images[~(white | black)])
    # The harder severity hits what the easier one hit.
    easy, hard = (corrupt(images, "impulse-noise", s) != images for s in (1, 5))
    assert bool(hard[easy].all())


@pytest.mark.parametrize(("side", "factors"), [(32, (0.75, 0.5, 0.4, 0.3, 0.15)), (224, (0.4, 0.3, 0.2, 0.1, 0.05))])
def test_contrast_draws_every_channel_to_its_mean(side: int, factors: tuple[float, ...]) -> None:
    images = _noise(2, side, side)
    values = images.double()
    means = values.mean(dim=(2, 3), keepdim=True)
    for severity, factor in zip(SEVERITIES, factors, strict=True):
        expected = (values - means) * factor + means
        error = corrupt(images, "contrast", severity).double() - expected
        assert error.abs().max() <= 0.5 + 1e-9
    flat = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 3, 4, 4)
    assert torch.equal(corrupt(flat, "contrast", 3), flat)


@pytest.mark.parametrize(
    ("height", "width", "sizes"),
    [(32, 32, (30, 28, 27, 24, 20)), (224, 224, (134, 112, 89, 67, 56))],
)
def test_pixelate_is_pillows_box_filter_down_and_up(height: int, width: int, sizes: tuple[int, ...]) -> None:
    images = _noise(2, height, width)
    for severity, size in zip(SEVERITIES, sizes, strict=True):
        corrupted = corrupt(images, "pixelate", severity)
        for image, found in zip(images, corrupted, strict=True):
            small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BOX)
            expected = np.array(small.resize((width, height), Image.Resampling.BOX))
            assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_pixelate_at_half_the_size_is_the_mean_of_blocks() -> None:
    images = _noise(2, 224, 448)
    blocks = images.double().reshape(2, 3, 112, 2, 224, 2).mean(dim=(3, 5))
    expected = blocks.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert (corrupt(images, "pixelate", 2).double() - expected).abs().max() <= 1  # two roundings


@pytest.mark.parametrize(("side", "qualities"), [(32, (80, 65, 58, 50, 40)), (224, (25, 18, 15, 10, 7))])
def test_jpeg_is_pillows_encoder_at_the_papers_quality(side: int, qualities: tuple[int, ...]) -> None:
    images = _natural(2, side)
    for severity, quality in zip(SEVERITIES, qualities, strict=True):
        for image, found in zip(images, corrupt(images, "jpeg", severity), strict=True):
            file = BytesIO()
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
            with Image.open(file) as decoded:
                assert np.array_equal(found.permute(1, 2, 0).numpy(), np.array(decoded))


class _Angle:
    """A generator that draws this angle."""

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def uniform(self, low: float, high: float) -> float:
        assert (low, high) == (-45, 45)
        return self.degrees


@pytest.mark.parametrize("degrees", [0.0, 30.0, -45.0])
def test_motion_blur_is_a_half_gaussian_along_the_trail(degrees: float) -> None:
    image = _noise(1, 9, 14).numpy()[0]
    height, width = image.shape[1:]
    angle: Any = _Angle(degrees)
    blurred = CORRUPTIONS["motion-blur"].function(image, (2.5, 1.7), angle)
    # ImageMagick's loop over the pixels of the trail, which counts 2 ⌈radius⌉ + 1.
    weights = [math.exp(-(i**2) / (2 * 1.7**2)) for i in range(7)]
    for c, y, x in np.ndindex(image.shape):
        value = 0.0
        for i, weight in enumerate(weights):
            u = x + math.ceil(i * math.cos(math.radians(degrees)) - 0.5)
            v = y + math.ceil(i * math.sin(math.radians(degrees)) - 0.5)
            value += weight / sum(weights) * image[c, min(max(v, 0), height - 1), min(max(u, 0), width - 1)]
        assert abs(int(blurred[c, y, x]) - value) <= 0.5 + 1e-9


def test_motion_blur_leaves_a_flat_image() -> None:
    flat = torch.full((3, 3, 20, 20), 77, dtype=torch.uint8)
    assert torch.equal(corrupt(flat, "motion-blur", 5), flat)


def test_water_brightens_what_it_falls_on_and_mud_darkens_to_brown() -> None:
    images = torch.full((20, 3, 32, 32), 120, dtype=torch.uint8)
    shares = []
    for severity in SEVERITIES:
        change = corrupt(images, "spatter", severity).double() - 120
        hit = change.abs().amax(dim=1) > 0
        shares.append(hit.double().mean().item())
        if severity <= 3:
            assert change.min() >= 0
            # A drop's brightest pixel takes half the colour (175, 238, 238).
            brightest = change.amax(dim=(0, 2, 3))
            assert brightest.tolist() == [round(0.5 * 175), 119, 119]
        else:
            mud = torch.tensor([63.0, 42.0, 20.0], dtype=torch.float64).view(3, 1, 1)
            cover = change / (mud - 120)  # the same in all channels, and all or nothing below 0.8
            assert (cover.amax(dim=1) - cover.amin(dim=1)).max() < 0.02
            assert cover[change != 0].min() > 0.79
            assert cover.max() == 1
    assert np.all(np.diff(shares[:3]) > 0)
    assert shares[4] > shares[3] > 0.01


def test_the_share_under_liquid_is_that_of_normal_noise_above_the_threshold() -> None:
    # Smoothing white noise with a Gaussian of length s divides its deviation by 2 s sqrt(pi).
    images = torch.full((60, 3, 64, 64), 0, dtype=torch.uint8)
    mean, deviation, length, threshold, opacity, _ = CORRUPTIONS["spatter"].constants(3, 64)
    assert opacity > 0
    kernel = ndimage.gaussian_filter(np.eye(41)[20], length, truncate=4.0)
    smoothed = deviation * float((np.outer(kernel, kernel) ** 2).sum()) ** 0.5
    expected = 0.5 * math.erfc((threshold - mean) / smoothed / math.sqrt(2))
    hit = (corrupt(images, "spatter", 3).amax(dim=1) > 0).double().mean().item()
    # Where the relief is in shadow, water does not show.
    assert 0.5 * expected < hit <= 1.1 * expected


def test_edges_are_those_of_opencv() -> None:
    # cv2.Canny(levels, 50, 150) of OpenCV 5.0.
    expected = [
        "................",
        "###...##.####...",
        "..###.#.#...####",
        "..#..#........#.",
        "....#..#.....#.#",
        ".####..#....##..",
        "#........#......",
        ".##.....#.##....",
        "..###..#....#...",
        "....#..#.....#..",
        "...#..#.....#.#.",
        "..##..##...##.#.",
        "#.#.....####...#",
        ".#..........#..#",
        "..###.##.....#..",
        "...#.#.....#..#.",
    ]
    i, j = np.mgrid[:16, :16]
    levels = (128 + 100 * np.sin(i / 2) * np.cos(j / 3) + (i * 5 + j * 3) % 7 * 6).clip(0, 255).astype(np.int64)
    assert ["".join("#" if edge else "." for edge in row) for row in _edges(levels)] == expected


# -- tasks -------------------------------------------------------------------------------------------------------------


class Lazy:
    """Inputs that only know index arrays, and remember which were asked for."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: NDArray[np.int64]) -> torch.Tensor:
        self.asked += index.tolist()
        return self.images[torch.from_numpy(index)]


def test_a_corrupted_task_reads_an_image_when_it_is_asked_for_and_once() -> None:
    lazy = Lazy(_noise(10))
    task = Task("t", lazy, torch.arange(10) % 2, ("a", "b"), ("a {}.",), "test").corrupted("gaussian-noise", 3)
    assert lazy.asked == []
    assert (len(task), task.classes, task.templates, task.split, task.name) == (10, ("a", "b"), ("a {}.",), "test", "t")
    assert task.labels is not None
    rows = task.batch(np.array([7, 2, 7]))
    assert lazy.asked == [7, 2]
    assert torch.equal(rows, corrupt(_noise(10)[[7, 2, 7]], "gaussian-noise", 3, 0, [7, 2, 7]))
    task.batch(np.array([2, 3]))
    assert lazy.asked == [7, 2, 3]
    assert torch.equal(task.inputs[1:3], corrupt(_noise(10)[1:3], "gaussian-noise", 3, 0, [1, 2]))


def test_more_images_than_are_kept_are_corrupted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergesolve.objectives.corruptions.KEPT_BYTES", 2 * 3 * 32 * 32)
    lazy = Lazy(_noise(4))
    task = Task("t", lazy, None, ("a", "b")).corrupted("impulse-noise", 3)
    first, second = task.batch(np.arange(4)), task.batch(np.arange(4))
    assert torch.equal(first, second)
    assert lazy.asked == [0, 1, 2, 3, 2, 3]


def test_subsets_of_a_corrupted_task_hold_the_same_images() -> None:
    task = _task(_noise(12)).corrupted("spatter", 5)
    whole = task.batch(np.arange(12))
    small = task.subset(4, seed=1)
    for image in small.batch(np.arange(4)):
        assert any(torch.equal(image, other) for other in whole)
    assert task.without_labels().corruptions == small.corruptions == (("spatter", 5, 0),)


def test_fingerprints_tell_corruptions_apart_even_where_the_images_do_not_show_them() -> None:
    flat = _task(torch.full((3, 3, 8, 8), 128, dtype=torch.uint8))
    tasks = [flat, *(flat.corrupted("contrast", s, seed) for s in (1, 2) for seed in (0, 1))]
    tasks.append(flat.corrupted("contrast", 1).corrupted("contrast", 2))
    tasks.append(flat.corrupted("contrast", 2).corrupted("contrast", 1))
    assert all(torch.equal(task.batch(np.arange(3)), flat.batch(np.arange(3))) for task in tasks)
    assert len({task.fingerprint for task in tasks}) == len(tasks)
    assert flat.corrupted("contrast", 1).fingerprint == flat.corrupted("contrast", 1).fingerprint
    assert flat.corruptions == ()
    assert tasks[-1].corruptions == (("contrast", 2, 0), ("contrast", 1, 0))


def test_corruptions_follow_one_another() -> None:
    images = _noise(3)
    both = _task(images).corrupted("gaussian-noise", 2).corrupted("jpeg", 4).batch(np.arange(3))
    assert torch.equal(both, corrupt(corrupt(images, "gaussian-noise", 2), "jpeg", 4))


def test_models_are_evaluated_on_corrupted_tasks(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]
) -> None:
    task = clip_tasks[1]
    worse = task.corrupted("contrast", 5)
    stored = Task(task.name, worse.batch(np.arange(len(task))), task.labels, task.classes)
    assert evaluate(clip, clip_weights, [worse], microbatch=4) == evaluate(clip, clip_weights, [stored])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("motion blur", 1), r"Unknown corruption 'motion blur'\. Did you mean 'motion-blur'\? Known: 'motion-blur'"),
        (("jpeg", 0), r"'severity' of a corruption must be 1 \(weak\), 2, 3, 4 or 5 \(strong\)\. Got 0 instead"),
        (("jpeg", 6), "Got 6 instead"),
        (("jpeg", 2.0), "Got 2.0 instead"),
        (("jpeg", True), "Got True instead"),
        (("jpeg", "3"), "Got '3' instead"),
        (("jpeg", 3, -1), r"'seed' of a corruption must be an int in the range \[0, inf\)\. Got -1 instead"),
        (("jpeg", 3, 0.5), "Got 0.5 instead"),
    ],
)
def test_unknown_kinds_severities_and_seeds_are_refused(call: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        corrupt(_noise(1), *call)
    with pytest.raises(DataError, match=message):
        _task(_noise(1)).corrupted(*call)


def test_only_uint8_images_can_be_corrupted() -> None:
    message = r"task 't': only uint8 images \(0 to 255\) can be corrupted, and these inputs are torch.float32"
    with pytest.raises(DataError, match=message):
        _task(torch.zeros(2, 3, 8, 8)).corrupted("jpeg", 1)
    late = Task("t", Lazy(torch.zeros(2, 3, 8, 8)), None, ("a", "b")).corrupted("jpeg", 1)
    with pytest.raises(DataError, match=message):
        late.batch(np.array([0]))
    with pytest.raises(DataError, match=r"inputs of shape \[2, 1, 8, 8\]; expected images \[B, 3, H, W\]"):
        corrupt(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "jpeg", 1)
    for indices in ([0], [0, -1]):
        with pytest.raises(DataError, match=r"indices for 2 images; give one, from 0 on, an image"):
            corrupt(_noise(2), "jpeg", 1, indices=indices)
