from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mergesolve.objectives import (
    CLIP,
    CrossEntropy,
    DataError,
    Distillation,
    Entropy,
    LossObjective,
    ModuleModel,
    Objective,
    SumObjective,
    Task,
    WeightedSum,
    Weights,
)
from torch import nn


@pytest.fixture
def parts(mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]) -> list[SumObjective]:
    teacher = {name: tensor + 0.3 for name, tensor in mlp64_weights.items()}
    one, two = mlp_tasks
    return [
        CrossEntropy(mlp_model, mlp_tasks, batch_size=5, seed=1),
        Entropy(mlp_model, two.without_labels(), seed=2),
        Distillation(mlp_model, [one, two], {"one": teacher, "two": teacher}, batch_size=3, seed=3),
    ]


@pytest.mark.parametrize("coefficients", [(1.0, 1.0, 1.0), (0.5, 0.0, 2.0), (0.1, 3.0, 0.2)])
def test_loss_and_gradient_are_linear_in_the_weights(
    parts: list[SumObjective], mlp64_weights: Weights, coefficients: tuple[float, ...]
) -> None:
    total = WeightedSum(list(zip(coefficients, parts, strict=True)))
    for iteration in (None, 0, 7):
        total.draw(iteration)
        whole = total.value_and_grad(mlp64_weights)
        separate = [part.value_and_grad(mlp64_weights) for part in parts]
        expected = sum(c * e.loss for c, e in zip(coefficients, separate, strict=True))
        assert whole.loss == pytest.approx(expected, rel=1e-12)
        assert total.value(mlp64_weights) == pytest.approx(expected, rel=1e-12)
        for name, gradient in whole.gradient.items():
            summed = sum(c * e.gradient[name] for c, e in zip(coefficients, separate, strict=True))
            torch.testing.assert_close(gradient, summed)


def test_terms_are_the_tasks_of_all_parts_with_weights_that_multiply(
    parts: list[SumObjective], mlp64_weights: Weights
) -> None:
    total = WeightedSum([(0.5, parts[0]), (2.0, parts[1]), (1.0, parts[2])])
    assert isinstance(total, Objective)
    assert total.tasks == ("one", "two", "two (2)", "one (2)", "two (3)")
    assert total.task_weights.tolist() == [0.25, 0.25, 2.0, 0.5, 0.5]
    by_task = total.value_and_grad(mlp64_weights, per_task=True)
    whole = total.value_and_grad(mlp64_weights)
    assert by_task.loss == pytest.approx(
        sum(w * by_task.task_losses[t] for t, w in zip(total.tasks, total.task_weights, strict=True))
    )
    for name, gradient in whole.gradient.items():
        summed = sum(w * g[name] for w, g in zip(total.task_weights, by_task.gradient, strict=True))
        torch.testing.assert_close(gradient, summed)


def test_sums_of_sums_are_sums(parts: list[SumObjective], mlp64_weights: Weights) -> None:
    nested = WeightedSum([(2.0, WeightedSum([(0.5, parts[0]), (1.0, parts[1])])), (1.0, parts[2])])
    flat = WeightedSum([(1.0, parts[0]), (2.0, parts[1]), (1.0, parts[2])])
    assert nested.value(mlp64_weights) == pytest.approx(flat.value(mlp64_weights), rel=1e-12)
    assert nested.tasks == flat.tasks


def test_a_draw_reaches_every_part(parts: list[SumObjective], mlp_tasks: tuple[Task, Task]) -> None:
    total = WeightedSum([(1.0, part) for part in parts])
    assert total.stochastic
    total.draw(3)
    for part in (parts[0], parts[2]):
        assert isinstance(part, CrossEntropy | Distillation)
        drawn = part.batch_indices(mlp_tasks[0])
        part.draw(3)
        np.testing.assert_array_equal(drawn, part.batch_indices(mlp_tasks[0]))
    assert not WeightedSum([(1.0, parts[1])]).stochastic


def test_the_ledger_counts_shared_examples_once_and_forwarded_samples_always(
    parts: list[SumObjective], mlp64_weights: Weights
) -> None:
    total = WeightedSum([(1.0, part) for part in parts])
    assert (total.data_used["labelled"], total.data_used["unlabelled"]) == (18, 0)
    total.draw(0)
    total.value_and_grad(mlp64_weights)
    used = total.data_used
    assert used["gradient_samples"] == (5 + 5) + 7 + (3 + 3)
    assert used["teacher_samples"] == 18
    assert used["samples_seen"] == used["gradient_samples"] + 18
    only = WeightedSum([(1.0, parts[1]), (1.0, parts[2])]).data_used
    assert (only["labelled"], only["unlabelled"]) == (0, 18)


def test_a_loss_of_its_own_can_be_one_of_the_parts(
    mlp: nn.Module, mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    task = mlp_tasks[0]
    own = LossObjective(mlp, nn.functional.cross_entropy, [(task.inputs[:], task.labels)], name="own")
    total = WeightedSum([(1.0, CrossEntropy(mlp_model, task)), (1.0, own)])
    assert total.value(mlp64_weights) == pytest.approx(2 * own.value(mlp64_weights), rel=1e-9)
    record = json.loads(json.dumps(total.describe()))
    assert [part["objective"] for part in record["parts"]] == ["CrossEntropy", "LossObjective"]


def test_what_is_no_weighted_objective_is_refused(clip: CLIP, clip_tasks: tuple[Task, Task]) -> None:
    entropy = Entropy(clip, clip_tasks)
    with pytest.raises(DataError, match=r"at least one \(weight, objective\) pair; the list is empty"):
        WeightedSum([])
    with pytest.raises(DataError, match="weights must be finite and not negative, got -1"):
        WeightedSum([(-1.0, entropy)])
    with pytest.raises(DataError, match=r"pairs of this package's objectives .* got str"):
        WeightedSum([(1.0, "entropy")])  # type: ignore[list-item]
    same = Entropy(clip, clip_tasks)
    same.device = torch.device("cpu:0")  # the same device under another name
    assert WeightedSum([(1.0, entropy), (1.0, same)]).tasks
    elsewhere = Entropy(clip, clip_tasks)
    elsewhere.device = torch.device("meta")
    with pytest.raises(DataError, match=r"on different devices \(cpu, meta\)"):
        WeightedSum([(1.0, entropy), (1.0, elsewhere)])
