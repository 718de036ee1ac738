from __future__ import annotations

from typing import Any

import pytest
import torch
from mergesolve.objectives import CrossEntropy, DataError, ModuleModel, Task, Weights
from torch import nn


def test_base_weights_are_float32_copies_of_all_floating_tensors() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    model = ModuleModel(module)
    base = model.base_weights()
    assert set(base) == {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    assert {tensor.dtype for tensor in base.values()} == {torch.float32}
    base["0.weight"].zero_()
    assert module[0].weight.any()
    assert not module.training


def test_names_shapes_and_outputs_that_do_not_fit_are_refused(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    objective = CrossEntropy(mlp_model, mlp_tasks)
    with pytest.raises(DataError, match=r"Sequential has no 'head.weight', which the weights have; it has '0.weight'"):
        objective.value({**mlp64_weights, "head.weight": torch.zeros(2)})
    with pytest.raises(DataError, match=r"'0.bias' has shape \[3\] in the weights and \[8\] in the model"):
        objective.value({**mlp64_weights, "0.bias": torch.zeros(3)})
    inputs = mlp_tasks[0].inputs
    for classes, found in ((5, r"\[11, 4\] .* \[11, 5\]"), (3, r"\[11, 4\] .* \[11, 3\]")):
        task = Task("one", inputs, torch.zeros(11, dtype=torch.int64), tuple("abcde"[:classes]))
        with pytest.raises(DataError, match=f"Sequential gives {found}: one column for each of the task's classes"):
            CrossEntropy(mlp_model, task).value(mlp64_weights)


def test_a_module_that_returns_no_tensor_is_refused(mlp_tasks: tuple[Task, Task]) -> None:
    class Pair(nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x), x

    model = ModuleModel(Pair(6, 4).double())
    weights = {name: tensor.detach() for name, tensor in model.module.named_parameters()}
    with pytest.raises(DataError, match=r"Pair gives tuple for 11 inputs of task 'one', expected logits \[11, 4\]"):
        CrossEntropy(model, mlp_tasks).value(weights)
