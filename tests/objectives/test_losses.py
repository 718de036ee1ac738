"""Cross-entropy, entropy and distillation against NumPy in float64."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.objectives import (
    CLIP,
    CrossEntropy,
    DataError,
    Distillation,
    Entropy,
    ModuleModel,
    Task,
    WeightedSum,
    Weights,
)
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float64]


def _softmax(z: Array) -> Array:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def _logits(weights: Weights, task: Task) -> Array:
    w = {name: tensor.numpy() for name, tensor in weights.items()}
    hidden = np.tanh(task.inputs[:].numpy() @ w["0.weight"].T + w["0.bias"])
    return np.asarray(hidden @ w["2.weight"].T + w["2.bias"])


def _far(weights: Weights, seed: int = 11) -> Weights:
    rng = torch.Generator().manual_seed(seed)
    return {n: t + torch.randn(t.shape, generator=rng, dtype=t.dtype) for n, t in weights.items()}


@pytest.mark.parametrize(("smoothing", "temperature"), [(0.0, 1.0), (0.1, 1.0), (0.1, 2.5)])
def test_cross_entropy_is_numpys(
    mlp_model: ModuleModel,
    mlp64_weights: Weights,
    mlp_tasks: tuple[Task, Task],
    smoothing: float,
    temperature: float,
) -> None:
    losses = []
    for task in mlp_tasks:
        assert task.labels is not None
        target = np.full((len(task), 4), smoothing / 4)
        target[np.arange(len(task)), task.labels.numpy()] += 1 - smoothing
        p = _softmax(_logits(mlp64_weights, task) / temperature)
        losses.append(float(-(target * np.log(p)).sum(axis=1).mean()))
    objective = CrossEntropy(mlp_model, mlp_tasks, microbatch=3, label_smoothing=smoothing, temperature=temperature)
    evaluation = objective.value_and_grad(mlp64_weights)
    assert list(evaluation.task_losses.values()) == pytest.approx(losses, rel=1e-12)
    assert evaluation.loss == pytest.approx(np.mean(losses), rel=1e-12)
    assert json.loads(json.dumps(objective.describe()))["label_smoothing"] == smoothing


def test_entropy_is_numpys(mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]) -> None:
    expected = []
    for task in mlp_tasks:
        p = _softmax(_logits(mlp64_weights, task))
        expected.append(float(-(p * np.log(p)).sum(axis=1).mean()))
    unlabelled = [task.without_labels() for task in mlp_tasks]
    evaluation = Entropy(mlp_model, unlabelled, microbatch=3).value_and_grad(mlp64_weights)
    assert list(evaluation.task_losses.values()) == pytest.approx(expected, rel=1e-12)


def test_entropy_stays_finite_where_probabilities_underflow(mlp_tasks: tuple[Task, Task]) -> None:
    model = ModuleModel(nn.Linear(6, 4).double())
    weights = {"weight": 1e6 * torch.ones(4, 6).double().cumsum(0), "bias": torch.zeros(4).double()}
    evaluation = Entropy(model, mlp_tasks).value_and_grad(weights)
    assert evaluation.loss == pytest.approx(0.0, abs=1e-12)
    assert all(torch.isfinite(gradient).all() for gradient in evaluation.gradient.values())


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_numpys_kl_divergence_times_the_square_of_the_temperature(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task], temperature: float
) -> None:
    teachers = {"one": _far(mlp64_weights, 1), "two": _far(mlp64_weights, 2)}
    expected = []
    for task in mlp_tasks:
        # Teachers' logits are kept in float32.
        teacher = _logits(teachers[task.name], task).astype(np.float32).astype(np.float64)
        p, q = _softmax(teacher / temperature), _softmax(_logits(mlp64_weights, task) / temperature)
        expected.append(float(temperature**2 * (p * np.log(p / q)).sum(axis=1).mean()))
    objective = Distillation(mlp_model, mlp_tasks, teachers, microbatch=3, temperature=temperature)
    evaluation = objective.value_and_grad(mlp64_weights)
    assert list(evaluation.task_losses.values()) == pytest.approx(expected, rel=1e-9)
    assert json.loads(json.dumps(objective.describe()))["temperature"] == temperature


def test_distillation_is_zero_and_flat_at_the_teacher_and_positive_elsewhere(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]
) -> None:
    objective = Distillation(clip, clip_tasks, {task.name: clip_weights for task in clip_tasks}, microbatch=5)
    at = objective.value_and_grad(clip_weights)
    assert abs(at.loss) < 1e-9
    away = {
        name: tensor + 0.02 * torch.sin(torch.arange(tensor.numel())).view_as(tensor)
        for name, tensor in clip_weights.items()
    }
    off = objective.value_and_grad(away)
    assert off.loss > 1e-4
    largest = [max(float(g.abs().max()) for g in e.gradient.values()) for e in (at, off)]
    assert largest[0] < 1e-3 * largest[1]


def test_the_gradient_of_distillation_is_that_of_cross_entropy_against_soft_labels(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    task, teacher = mlp_tasks[0], _far(mlp64_weights)
    gradient = Distillation(mlp_model, task, {"one": teacher}).value_and_grad(mlp64_weights).gradient
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in mlp64_weights.items()}
    soft = torch.from_numpy(_softmax(_logits(teacher, task)))
    outputs = torch.func.functional_call(mlp_model.module, leaves, (task.inputs[:],))
    nn.functional.cross_entropy(outputs, soft).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(gradient[name], leaf.grad, rtol=1e-5, atol=1e-8)


def test_teachers_are_asked_once_and_let_go(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    import gc
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def teacher(seed: int) -> Weights:
        nonlocal most
        weights = _far(mlp64_weights, seed)
        gc.collect()
        alive.append(weakref.ref(weights["0.weight"]))
        most = max(most, sum(ref() is not None for ref in alive))
        return weights

    seen: list[tuple[str, int, int]] = []
    teachers = {"one": lambda: teacher(1), "two": lambda: teacher(2)}
    objective = Distillation(
        mlp_model, mlp_tasks, teachers, microbatch=4, batch_size=3, progress=lambda *call: seen.append(call)
    )
    assert alive == []  # lazily
    objective.draw(0)
    first = objective.value(mlp64_weights)
    objective.value_and_grad(mlp64_weights)
    objective.predict()
    assert len(alive) == 2
    assert most == 1
    assert seen == [("one", 4, 11), ("one", 8, 11), ("one", 11, 11), ("two", 4, 7), ("two", 7, 7)]
    used = objective.data_used
    assert (used["teacher_samples"], used["value_samples"], used["gradient_samples"]) == (18, 6, 6)
    assert used["samples_seen"] == 30
    assert (used["labelled"], used["unlabelled"]) == (0, 18)
    # The batch's rows of the teacher's logits, and not the first ones.
    objective.draw(1)
    assert objective.value(mlp64_weights) != first


def test_objectives_that_need_what_a_task_lacks_refuse_it(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]
) -> None:
    shapes = clip_tasks[0]
    with pytest.raises(DataError, match="CrossEntropy needs labels, and task 'shapes' has none; give labels, or use"):
        CrossEntropy(clip, shapes.without_labels())
    model = CLIP(clip.architecture, heads={"one": torch.ones(1, 16)})
    with pytest.raises(DataError, match="Entropy: task 'one' has one class, so its entropy is 0 at all weights"):
        Entropy(model, Task("one", shapes.inputs, None, ("disc",)))
    with pytest.raises(DataError, match=r"no teacher for task 'digits'; Did you mean 'digit'.*Give teachers="):
        Distillation(clip, clip_tasks, {"shapes": clip_weights, "digit": clip_weights})
    with pytest.raises(DataError, match=r"needs 'proj', which the weights lack"):
        Distillation(clip, shapes, {"shapes": {n: t for n, t in clip_weights.items() if n != "proj"}}).predict()
    broken = {n: t * float("nan") for n, t in clip_weights.items()}
    with pytest.raises(DataError, match="the teacher of task 'shapes' gives outputs that are not finite"):
        Distillation(clip, shapes, {"shapes": broken}).value(clip_weights)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_label_smoothing_out_of_range_is_refused(clip: CLIP, clip_tasks: Any, value: float) -> None:
    with pytest.raises(
        DataError, match=r"'label_smoothing' parameter of CrossEntropy must be a float in the range \[0, 1\)"
    ):
        CrossEntropy(clip, clip_tasks, label_smoothing=value)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_out_of_range_is_refused(clip: CLIP, clip_tasks: Any, value: float) -> None:
    with pytest.raises(
        DataError, match=r"'temperature' parameter of Distillation must be a float in the range \(0, inf\)"
    ):
        Distillation(clip, clip_tasks, {}, temperature=value)


def test_retention_is_distillation_from_the_base(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]
) -> None:
    shapes, reference = clip_tasks
    base = clip.base_weights()
    retention = Distillation(clip, reference, {"digits": clip.base_weights})
    assert abs(retention.value(base)) < 1e-9
    both = WeightedSum([(1.0, CrossEntropy(clip, shapes)), (0.5, retention)])
    assert both.value(base) == pytest.approx(CrossEntropy(clip, shapes).value(base), abs=1e-9)
    assert both.value(clip_weights) > both.parts[0][1].value(clip_weights)
