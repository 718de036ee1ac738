from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.objectives import CLIP, CrossEntropy, DataError, Distillation, Task, WeightedSum, Weights
from mergesolve.objectives.mixing import Mixed


@pytest.fixture
def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (7, 3, 5, 4), dtype=np.uint8))


def _task(inputs: Any, labels: Any = None) -> Task:
    return Task("t", inputs, labels, ("a", "b"))


def _all(task: Task) -> torch.Tensor:
    return task.batch(np.arange(len(task)))


def test_the_images_come_first_and_the_rest_are_convex_combinations_of_two_of_them(images: torch.Tensor) -> None:
    task = _task(images).mixed(300, seed=4)
    assert len(task) == 300
    rows = _all(task)
    assert rows.dtype == torch.uint8
    assert torch.equal(rows[:7], images)
    mixed = task.inputs
    assert isinstance(mixed, Mixed)
    a, b, u = (images.numpy().astype(float)[mixed.first], images.numpy().astype(float)[mixed.second], mixed.share)
    assert (mixed.first != mixed.second)[7:].all()
    expected = np.rint(u[:, None, None, None] * a + (1 - u[:, None, None, None]) * b)
    assert np.abs(rows.numpy() - expected).max() <= 1  # halves, and float32
    assert (rows.numpy() == expected).mean() > 0.999
    # u is uniform, and pairs are: mean and variance of 293 draws within four standard errors.
    assert abs(u[7:].mean() - 0.5) < 4 * np.sqrt(1 / 12 / 293)
    assert abs(u[7:].var() - 1 / 12) < 4 * np.sqrt((1 / 80 - 1 / 144) / 293)
    assert len(set(zip(mixed.first[7:].tolist(), mixed.second[7:].tolist(), strict=True))) == 7 * 6


def test_a_mixture_is_the_same_in_every_batch_and_in_a_longer_task_and_changes_with_the_seed(
    images: torch.Tensor,
) -> None:
    task = _task(images).mixed(40)
    whole = _all(task)
    order = np.random.default_rng(1).permutation(40)
    assert torch.equal(task.batch(order), whole[torch.from_numpy(order)])
    assert torch.equal(torch.cat([task.batch(np.array([i, i])) for i in range(40)]), whole.repeat_interleave(2, 0))
    assert torch.equal(_all(_task(images).mixed(90))[:40], whole)
    assert torch.equal(_all(task.take(np.array([39, 2]))), whole[[39, 2]])
    assert not torch.equal(_all(_task(images).mixed(40, seed=1)), whole)


def test_floating_inputs_are_mixed_in_their_type() -> None:
    inputs = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    task = _task(inputs).mixed(12)
    mixed, rows = task.inputs, _all(task)
    assert isinstance(mixed, Mixed)
    u = torch.from_numpy(mixed.share.astype(np.float64)).unsqueeze(1)
    torch.testing.assert_close(rows, u * inputs[mixed.first] + (1 - u) * inputs[mixed.second], rtol=1e-14, atol=1e-14)


def test_no_more_than_there_are_is_the_subset_without_labels(images: torch.Tensor) -> None:
    task = _task(images, torch.arange(7) % 2)
    few = task.mixed(3, seed=2)
    assert few.labels is None
    assert torch.equal(_all(few), _all(task.without_labels().subset(3, 2)))
    assert torch.equal(_all(task.mixed(7)), images)
    assert task.mixed(9).labels is None


def test_image_files_are_mixed_when_they_are_asked_for(images: torch.Tensor, tmp_path: Path) -> None:
    from PIL import Image

    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    folder = Task.from_folder(tmp_path, classes=("a", "b"), image_size=(5, 4), resize_mode="squash")
    assert torch.equal(_all(folder.mixed(20)), _all(_task(images).mixed(20)))


def test_the_ledger_counts_real_examples_once(clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]) -> None:
    shapes = clip_tasks[0]
    mixed = shapes.mixed(50)
    objective = Distillation(clip, mixed, {"shapes": clip_weights}, batch_size=20)
    objective.draw(2)
    objective.value(clip_weights)
    used = objective.data_used
    assert (used["labelled"], used["unlabelled"], used["teacher_samples"], used["value_samples"]) == (0, 12, 50, 20)
    both = WeightedSum([(1.0, CrossEntropy(clip, shapes)), (1.0, objective)]).data_used
    assert (both["labelled"], both["unlabelled"]) == (12, 0)
    # Of three mixtures, at most six inputs; of the first three inputs, three.
    some = mixed.take(np.array([20, 30, 40]))
    assert isinstance(mixed.inputs, Mixed)
    pairs = {int(part[i]) for part in (mixed.inputs.first, mixed.inputs.second) for i in (20, 30, 40)}
    assert some.examples[1] == len(pairs)
    assert mixed.take(np.array([0, 1, 2])).examples[1] == 3
    assert mixed.corrupted("contrast", 1).examples[1] == 12


def test_fingerprints_tell_mixtures_apart(images: torch.Tensor) -> None:
    task = _task(images)
    tasks = [task, task.mixed(20), task.mixed(21), task.mixed(20, seed=1), task.take(np.arange(6)).mixed(20)]
    assert len({t.fingerprint for t in tasks}) == 5
    assert task.mixed(20).fingerprint == task.mixed(20).fingerprint


def test_what_cannot_be_mixed_is_refused(images: torch.Tensor) -> None:
    with pytest.raises(DataError, match="a mixture takes two inputs, and the task has 1; leave 'mixed' out"):
        _task(images[:1]).mixed(2)
    with pytest.raises(DataError, match=r"only images \(uint8\) and floating-point inputs can be mixed.*int64"):
        _task(torch.zeros(3, 4, dtype=torch.int64)).mixed(5)
    for count in (0, 2.0, True):
        with pytest.raises(DataError, match="the number of mixed inputs must be an int of at least 1"):
            _task(images).mixed(count)  # type: ignore[arg-type]
