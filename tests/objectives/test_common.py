"""Checks that every registered objective passes by being listed, on a plain module and a CLIP."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.objectives import (
    AugmentedLagrangian,
    CrossEntropy,
    Distillation,
    Entropy,
    FeatureAlignment,
    LossObjective,
    ModuleModel,
    Objective,
    Proximity,
    RelativeLoss,
    Retention,
    SharpnessAware,
    SumObjective,
    Task,
    WeightedSum,
    Weights,
)
from mergesolve.objectives.accuracy_loss import AccuracyLoss
from mergesolve.objectives.registry import OBJECTIVES
from torch import nn

Make = Callable[[ModuleModel, tuple[Task, ...], Weights], SumObjective]


def _far(weights: Weights, seed: int) -> Weights:
    rng = torch.Generator().manual_seed(seed)
    return {n: t + 0.5 * torch.randn(t.shape, generator=rng, dtype=t.dtype) for n, t in weights.items()}


def _teachers(weights: Weights) -> dict[str, Any]:
    return {"one": _far(weights, 1), "two": lambda: _far(weights, 2)}


def _lagrangian(model: ModuleModel, tasks: tuple[Task, ...], weights: Weights) -> SumObjective:
    made = AugmentedLagrangian(CrossEntropy(model, tasks[0], 4), Entropy(model, tasks[1], 3), 0.1)
    made.multiplier, made.penalty = 0.7, 2.0
    return made


def _own(model: ModuleModel, tasks: tuple[Task, ...], weights: Weights) -> SumObjective:
    batches = [(task.inputs[:], task.labels) for task in tasks]
    return LossObjective(model.module, nn.functional.cross_entropy, batches, name="own")


def _sum(model: ModuleModel, tasks: tuple[Task, ...], weights: Weights) -> SumObjective:
    relative = RelativeLoss(Entropy(model, tasks, 4), _teachers(weights))
    return WeightedSum([(0.5, CrossEntropy(model, tasks, 3)), (2.0, relative), (0.1, Proximity(_far(weights, 3)))])


CASES: dict[str, tuple[str, Make]] = {
    "cross-entropy": ("cross-entropy", lambda m, t, w: CrossEntropy(m, t, 4)),
    "cross-entropy smoothed": (
        "cross-entropy",
        lambda m, t, w: CrossEntropy(m, t, 4, label_smoothing=0.2, temperature=1.7),
    ),
    "accuracy": ("accuracy", lambda m, t, w: AccuracyLoss(m, t, 4)),
    "entropy": ("entropy", lambda m, t, w: Entropy(m, t, 4)),
    "entropy guarded": ("entropy", lambda m, t, w: Entropy(m, t, 4, temperature=0.8, logit_norm=2.0)),
    "distillation": ("distillation", lambda m, t, w: Distillation(m, t, _teachers(w), 4, temperature=2.0)),
    "feature-alignment l1": ("feature-alignment", lambda m, t, w: FeatureAlignment(m, t, _teachers(w), 4)),
    "feature-alignment l2": (
        "feature-alignment",
        lambda m, t, w: FeatureAlignment(m, t, _teachers(w), 4, distance="l2"),
    ),
    "feature-alignment cosine": (
        "feature-alignment",
        lambda m, t, w: FeatureAlignment(m, t, _teachers(w), 4, distance="cosine"),
    ),
    "retention": ("retention", lambda m, t, w: Retention(m, t, _far(w, 4), 4)),
    "proximity": ("proximity", lambda m, t, w: Proximity(_far(w, 3))),
    "sharpness-aware": ("sharpness-aware", lambda m, t, w: SharpnessAware(CrossEntropy(m, t, 4), 0.1)),
    "relative-loss": ("relative-loss", lambda m, t, w: RelativeLoss(CrossEntropy(m, t, 4), _teachers(w))),
    "relative-loss excess": (
        "relative-loss",
        lambda m, t, w: RelativeLoss(Entropy(m, t, 4), _teachers(w), "excess"),
    ),
    "augmented-lagrangian": ("augmented-lagrangian", _lagrangian),
    "weighted-sum": ("weighted-sum", _sum),
    "loss": ("loss", _own),
}
SMOOTH = [name for name in CASES if name not in ("accuracy", "sharpness-aware")]
WITH_GRADIENT = [name for name in CASES if name != "accuracy"]


@pytest.fixture
def make(mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]) -> Callable[[str], SumObjective]:
    return lambda name: CASES[name][1](mlp_model, mlp_tasks, mlp64_weights)


def test_every_objective_is_tried() -> None:
    assert {registered for registered, _ in CASES.values()} == set(OBJECTIVES)


@pytest.mark.parametrize("name", SMOOTH)
def test_the_gradient_is_that_of_finite_differences(
    name: str, make: Callable[[str], SumObjective], mlp64_weights: Weights
) -> None:
    objective = make(name)
    direction = _far({n: torch.zeros_like(t) for n, t in mlp64_weights.items()}, 7)
    for iteration in (None, 1):
        objective.draw(iteration)
        gradient = objective.value_and_grad(mlp64_weights).gradient
        assert isinstance(gradient, dict)
        slope = sum(float((gradient[n] * direction[n]).sum()) for n in direction)
        h = 1e-5
        ahead, behind = (
            objective.value({n: t + sign * h * direction[n] for n, t in mlp64_weights.items()}) for sign in (1, -1)
        )
        assert slope == pytest.approx((ahead - behind) / (2 * h), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_values_and_gradients_are_the_weighted_sums_of_those_by_task(
    name: str, make: Callable[[str], SumObjective], mlp64_weights: Weights
) -> None:
    objective = make(name)
    assert isinstance(objective, Objective)
    assert len(objective.tasks) == len(set(objective.tasks)) == len(objective.task_weights)
    objective.draw(2)
    whole = objective.value_and_grad(mlp64_weights)
    by_task = objective.value_and_grad(mlp64_weights, per_task=True)
    losses = [by_task.task_losses[task] for task in objective.tasks]
    assert whole.loss == pytest.approx(float(np.dot(objective.task_weights, losses)), rel=1e-9)
    assert objective.value(mlp64_weights) == pytest.approx(whole.loss, rel=1e-9)
    assert objective.task_losses(mlp64_weights) == pytest.approx(by_task.task_losses, rel=1e-9)
    assert isinstance(by_task.gradient, list)
    assert isinstance(whole.gradient, dict)
    for tensor, gradient in whole.gradient.items():
        summed = sum(w * g[tensor] for w, g in zip(objective.task_weights, by_task.gradient, strict=True))
        torch.testing.assert_close(gradient, summed, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_draw_is_a_function_of_the_iteration_and_evaluations_leave_the_weights_alone(
    name: str, make: Callable[[str], SumObjective], mlp64_weights: Weights
) -> None:
    objective, other = make(name), make(name)
    before = {n: t.clone() for n, t in mlp64_weights.items()}
    values = {}
    for iteration in (3, 0, None, 1):
        objective.draw(iteration)
        values[iteration] = objective.value(mlp64_weights)
    for iteration in (1, None, 3, 0):
        other.draw(iteration)
        if other.has_gradient:
            other.value_and_grad(mlp64_weights, per_task=iteration == 3)
        assert other.value(mlp64_weights) == pytest.approx(values[iteration], rel=1e-12)
    assert (len(set(values.values())) > 1) == objective.stochastic
    for n, tensor in mlp64_weights.items():
        assert torch.equal(tensor, before[n])
        assert tensor.grad is None


@pytest.mark.parametrize("name", CASES)
def test_the_ledger_grows_by_what_is_forwarded_and_knows_its_examples(
    name: str, make: Callable[[str], SumObjective], mlp64_weights: Weights
) -> None:
    objective = make(name)
    assert objective.data_used["samples_seen"] == 0
    objective.draw(0)
    objective.value(mlp64_weights)
    once = objective.data_used
    objective.value(mlp64_weights)
    twice = objective.data_used
    registered = CASES[name][0]
    entry = OBJECTIVES[registered]
    if entry.data == "labelled":
        assert (once["labelled"], once["unlabelled"]) == (18, 0)
    elif entry.data in ("unlabelled", "teachers"):
        assert (once["labelled"], once["unlabelled"]) == (0, 18)
    elif entry.data == "none":
        assert (once["labelled"], once["unlabelled"], twice["samples_seen"]) == (0, 0, 0)
        return
    assert twice["samples_seen"] > once["samples_seen"] > 0
    for key in ("labelled", "unlabelled", "test_inputs", "teacher_samples"):
        assert twice.get(key) == once.get(key)
    parts = ("gradient_samples", "value_samples", "teacher_samples")
    assert twice["samples_seen"] == sum(twice.get(key, 0) for key in parts)


@pytest.mark.parametrize("name", CASES)
def test_the_record_is_plain_and_tells_options_apart(name: str, make: Callable[[str], SumObjective]) -> None:
    record = json.loads(json.dumps(make(name).describe(), allow_nan=False))
    assert record["objective"]
    assert record["tasks"]
    records = [json.dumps(make(case).describe(), sort_keys=True) for case in CASES]
    assert len(set(records)) == len(records)
