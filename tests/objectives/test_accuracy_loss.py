from __future__ import annotations

import numpy as np
import pytest
from mergesolve.objectives import (
    AccuracyLoss,
    AugmentedLagrangian,
    CrossEntropy,
    DataError,
    ModuleModel,
    Task,
    WeightedSum,
    Weights,
    evaluate,
)


def test_is_one_minus_what_evaluate_says_and_what_numpy_says(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    objective = AccuracyLoss(mlp_model, mlp_tasks, microbatch=4)
    scores = evaluate(mlp_model, mlp64_weights, mlp_tasks)
    assert objective.task_losses(mlp64_weights) == pytest.approx({name: 1 - value for name, value in scores.items()})
    w = {name: tensor.numpy() for name, tensor in mlp64_weights.items()}
    wrong = []
    for task in mlp_tasks:
        assert task.labels is not None
        logits = np.tanh(task.inputs[:].numpy() @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
        wrong.append(np.mean(logits.argmax(axis=1) != task.labels.numpy()))
    assert objective.value(mlp64_weights) == pytest.approx(np.mean(wrong))
    assert objective.data_used["labelled"] == 18
    assert objective.data_used["gradient_samples"] == 0


def test_has_no_gradient_and_says_who_needs_none(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    objective = AccuracyLoss(mlp_model, mlp_tasks)
    assert not objective.has_gradient
    with pytest.raises(DataError, match=r"AccuracyLoss has no gradient\. Solve with 'cma-es', 'nelder-mead'"):
        objective.value_and_grad(mlp64_weights)


def test_a_sum_with_it_has_no_gradient_and_a_constraint_on_it_is_refused(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    smooth, rough = CrossEntropy(mlp_model, mlp_tasks), AccuracyLoss(mlp_model, mlp_tasks)
    both = WeightedSum([(0.1, smooth), (1.0, rough)])
    assert smooth.has_gradient
    assert not both.has_gradient
    assert both.value(mlp64_weights) == pytest.approx(0.1 * smooth.value(mlp64_weights) + rough.value(mlp64_weights))
    with pytest.raises(DataError, match="AccuracyLoss has no gradient"):
        both.value_and_grad(mlp64_weights)
    with pytest.raises(DataError, match="AugmentedLagrangian needs gradients, and AccuracyLoss, its constraint"):
        AugmentedLagrangian(smooth, rough, 0.5)


def test_needs_labels(mlp_model: ModuleModel, mlp_tasks: tuple[Task, Task]) -> None:
    with pytest.raises(DataError, match="AccuracyLoss needs labels"):
        AccuracyLoss(mlp_model, mlp_tasks[0].without_labels())
