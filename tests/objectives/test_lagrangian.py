from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mergesolve.objectives import (
    AugmentedLagrangian,
    CrossEntropy,
    DataError,
    Distillation,
    LossObjective,
    ModuleModel,
    Objective,
    Proximity,
    SumObjective,
    Task,
    WeightedSum,
    Weights,
)
from torch import nn

# (multiplier, penalty, bound as a share of g): active, inactive at a positive multiplier, the plain Lagrangian, off
SETTINGS = {
    "active": (0.7, 3.0, 0.5),
    "violated at no multiplier": (0.0, 5.0, 0.5),
    "active though feasible": (2.0, 0.5, 1.5),
    "inactive": (0.1, 50.0, 2.0),
    "plain": (0.9, 0.0, 0.5),
    "off": (0.0, 0.0, 0.5),
}


@pytest.fixture
def parts(mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]) -> tuple[SumObjective, ...]:
    teacher = {name: tensor + 0.3 for name, tensor in mlp64_weights.items()}
    one, two = mlp_tasks
    return (
        CrossEntropy(mlp_model, mlp_tasks, batch_size=5, seed=1, task_weights={"one": 0.3, "two": 0.7}),
        Distillation(mlp_model, [one, two], {"one": teacher, "two": teacher}, batch_size=3, seed=3),
    )


def build(parts: tuple[SumObjective, ...], weights: Weights, setting: str) -> AugmentedLagrangian:
    multiplier, penalty, share = SETTINGS[setting]
    lagrangian = AugmentedLagrangian(*parts, bound=share * parts[1].value(weights))
    lagrangian.multiplier, lagrangian.penalty = multiplier, penalty
    return lagrangian


@pytest.mark.parametrize("setting", SETTINGS)
def test_value_and_gradient_are_the_definition(
    parts: tuple[SumObjective, ...], mlp64_weights: Weights, setting: str
) -> None:
    lagrangian = build(parts, mlp64_weights, setting)
    mu, rho = lagrangian.multiplier, lagrangian.penalty
    for iteration in (None, 0, 4):
        lagrangian.draw(iteration)
        f, g = (part.value_and_grad(mlp64_weights) for part in parts)
        active = max(0.0, mu + rho * (g.loss - lagrangian.bound))
        price = (active**2 - mu**2) / (2 * rho) if rho else mu * (g.loss - lagrangian.bound)
        found = lagrangian.value_and_grad(mlp64_weights)
        assert found.loss == pytest.approx(f.loss + price, rel=1e-12)
        assert lagrangian.value(mlp64_weights) == pytest.approx(found.loss, rel=1e-12)
        for name, gradient in found.gradient.items():
            torch.testing.assert_close(gradient, f.gradient[name] + active * g.gradient[name])


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_gradient_is_that_of_central_differences(
    parts: tuple[SumObjective, ...], mlp64_weights: Weights, setting: str
) -> None:
    lagrangian = build(parts, mlp64_weights, setting)
    lagrangian.draw(None)
    gradient = lagrangian.value_and_grad(mlp64_weights).gradient
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = {n: torch.randn(t.shape, generator=rng, dtype=t.dtype) for n, t in mlp64_weights.items()}
        ahead, behind = (
            lagrangian.value({n: t + step * direction[n] for n, t in mlp64_weights.items()}) for step in (1e-5, -1e-5)
        )
        slope = sum(float((gradient[n] * direction[n]).sum()) for n in direction)
        assert (ahead - behind) / 2e-5 == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_by_task_add_up_to_the_gradient(
    parts: tuple[SumObjective, ...], mlp64_weights: Weights, setting: str
) -> None:
    lagrangian = build(parts, mlp64_weights, setting)
    assert lagrangian.tasks == ("constraint", "one", "two")
    assert lagrangian.task_weights.tolist() == [1.0, 0.3, 0.7]
    whole, apart = (lagrangian.value_and_grad(mlp64_weights, per_task=p) for p in (False, True))
    assert isinstance(apart.gradient, list)
    losses = [apart.task_losses[name] for name in lagrangian.tasks]
    assert np.dot(lagrangian.task_weights, losses) == pytest.approx(whole.loss, rel=1e-12)
    for name, gradient in whole.gradient.items():
        summed = sum(w * g[name] for w, g in zip(lagrangian.task_weights.tolist(), apart.gradient, strict=True))
        torch.testing.assert_close(gradient, summed)


def test_inside_a_weighted_sum_the_other_gradients_are_not_scaled(
    parts: tuple[SumObjective, ...], mlp64_weights: Weights
) -> None:
    lagrangian = build(parts, mlp64_weights, "active")
    anchor = Proximity({n: t + 1.0 for n, t in mlp64_weights.items()})
    found = WeightedSum([(2.0, anchor), (0.5, lagrangian)]).value_and_grad(mlp64_weights)
    one, other = anchor.value_and_grad(mlp64_weights), lagrangian.value_and_grad(mlp64_weights)
    assert found.loss == pytest.approx(2.0 * one.loss + 0.5 * other.loss, rel=1e-12)
    for name, gradient in found.gradient.items():
        torch.testing.assert_close(gradient, 2.0 * one.gradient[name] + 0.5 * other.gradient[name])


def test_the_exact_constraint_leaves_the_batch_as_it_is(
    parts: tuple[SumObjective, ...], mlp64_weights: Weights
) -> None:
    lagrangian = build(parts, mlp64_weights, "active")
    parts[1].draw(None)
    exact = parts[1].value(mlp64_weights)
    lagrangian.draw(2)
    drawn = lagrangian.value(mlp64_weights)
    assert lagrangian.constraint_value(mlp64_weights) == exact
    assert parts[1].value(mlp64_weights) != exact
    assert lagrangian.value(mlp64_weights) == drawn
    lagrangian.first_draw = 2
    lagrangian.draw(0)
    assert lagrangian.value(mlp64_weights) == drawn


def test_a_module_with_a_plain_loss_under_a_distance(mlp: nn.Module, mlp64_weights: Weights) -> None:
    inputs, targets = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    loss = LossObjective(mlp, nn.functional.mse_loss, [(inputs, targets)])
    anchor = Proximity({n: t + 0.1 for n, t in mlp64_weights.items()})
    lagrangian = AugmentedLagrangian(loss, anchor, 0.01)
    lagrangian.multiplier, lagrangian.penalty = 0.5, 2.0
    active = 0.5 + 2.0 * (anchor.value(mlp64_weights) - 0.01)
    found = lagrangian.value_and_grad(mlp64_weights).gradient
    f, g = loss.value_and_grad(mlp64_weights).gradient, anchor.value_and_grad(mlp64_weights).gradient
    for name in mlp64_weights:
        torch.testing.assert_close(found[name], f[name] + active * g[name])


def test_the_ledger_counts_examples_once_and_passes_twice(
    parts: tuple[SumObjective, ...], mlp64_weights: Weights
) -> None:
    lagrangian = AugmentedLagrangian(*parts, bound=0.1)
    lagrangian.value_and_grad(mlp64_weights)
    used = lagrangian.data_used
    assert (used["labelled"], used["unlabelled"]) == (18, 0)  # both are of the same 11 and 7
    assert used["gradient_samples"] == 2 * 18
    assert used["samples_seen"] == 3 * 18  # the teacher predicted, too


def test_it_is_an_objective_with_a_record(parts: tuple[SumObjective, ...]) -> None:
    lagrangian = AugmentedLagrangian(*parts, bound=0.1)
    assert isinstance(lagrangian, Objective)
    assert lagrangian.stochastic
    assert lagrangian.seed == 1
    record = json.loads(json.dumps(lagrangian.describe()))
    assert (record["bound"], record["minimize"]["objective"], record["constraint"]["objective"]) == (
        0.1,
        "CrossEntropy",
        "Distillation",
    )


def test_a_task_that_is_named_as_the_constraint_keeps_its_name(
    mlp_model: ModuleModel, mlp_tasks: tuple[Task, Task]
) -> None:
    task = Task("constraint", mlp_tasks[0].inputs, mlp_tasks[0].labels, mlp_tasks[0].classes)
    loss = CrossEntropy(mlp_model, task)
    assert AugmentedLagrangian(loss, loss, 0.1).tasks == ("constraint (2)", "constraint")


def test_what_cannot_be_bounded_is_refused(parts: tuple[SumObjective, ...]) -> None:
    with pytest.raises(DataError, match="the constraint is float"):
        AugmentedLagrangian(parts[0], 0.1, 0.1)
    for bound in (float("nan"), "tight", True):
        with pytest.raises(DataError, match="'bound' parameter of AugmentedLagrangian must be a finite number"):
            AugmentedLagrangian(*parts, bound=bound)
    elsewhere = Proximity({"w": torch.ones(2)}, device="meta")
    with pytest.raises(DataError, match="objective is on cpu, the constraint on meta; use one device"):
        AugmentedLagrangian(parts[0], elsewhere, 0.1)
