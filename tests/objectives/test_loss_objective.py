from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from mergesolve.objectives import DataError, LossObjective, Objective, Weights
from torch import Tensor, nn


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    sizes = (4, 9, 1)
    return [
        (torch.randn(n, 5, generator=rng, dtype=torch.float64), torch.randn(n, 2, generator=rng, dtype=torch.float64))
        for n in sizes
    ]


@pytest.fixture
def weights(module: nn.Module) -> Weights:
    return {name: tensor.detach() + 0.1 for name, tensor in module.named_parameters()}


def test_loss_and_gradient_are_those_of_all_samples_in_one_batch(
    module: nn.Module, batches: list[tuple[Tensor, Tensor]], weights: Weights
) -> None:
    objective = LossObjective(module, nn.functional.mse_loss, batches)
    evaluation = objective.value_and_grad(weights)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    inputs, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    loss = nn.functional.mse_loss(torch.func.functional_call(module, leaves, (inputs,)), targets)
    loss.backward()
    assert evaluation.loss == pytest.approx(loss.item(), rel=1e-12)
    assert objective.value(weights) == evaluation.loss
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(evaluation.gradient[name], leaf.grad)


def test_the_gradient_is_the_finite_difference_of_the_value(
    module: nn.Module, batches: list[tuple[Tensor, Tensor]], weights: Weights
) -> None:
    objective = LossObjective(module, nn.functional.mse_loss, batches, batches_per_draw=2)
    objective.draw(1)
    gradient = objective.value_and_grad(weights).gradient
    rng, h = torch.Generator().manual_seed(3), 1e-6
    d = {name: torch.randn(t.shape, generator=rng, dtype=torch.float64) for name, t in weights.items()}
    up, down = (objective.value({n: weights[n] + s * h * d[n] for n in weights}) for s in (1, -1))
    expected = sum(float((gradient[name] * d[name]).sum()) for name in d)
    assert (up - down) / (2 * h) == pytest.approx(expected, rel=1e-6)


def test_batches_are_drawn_without_replacement_within_an_epoch(
    module: nn.Module, batches: list[tuple[Tensor, Tensor]], weights: Weights
) -> None:
    objective = LossObjective(module, nn.functional.mse_loss, batches, batches_per_draw=1, seed=5)
    assert objective.stochastic
    single = [LossObjective(module, nn.functional.mse_loss, [batch]).value(weights) for batch in batches]
    values = []
    for iteration in range(6):
        objective.draw(iteration)
        values.append(objective.value(weights))
        assert objective.value_and_grad(weights).loss == values[-1]
    assert sorted(values[:3]) == pytest.approx(sorted(single))
    assert sorted(values[3:]) == pytest.approx(sorted(single))
    assert not LossObjective(module, nn.functional.mse_loss, batches, batches_per_draw=3).stochastic


def test_inputs_may_be_several_arguments_or_keywords(weights: Weights) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 2).double()

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.layer(x) + shift

    module, x, shift = Two(), torch.ones(3, 5).double(), torch.ones(3, 2).double()
    own = {name: tensor.detach() for name, tensor in module.named_parameters()}

    def mean_square(outputs: Tensor, _: Any) -> Tensor:
        return outputs.square().mean()

    values = [LossObjective(module, mean_square, [(inputs, None)]) for inputs in ((x, shift), {"shift": shift, "x": x})]
    assert values[0].value(own) == pytest.approx(mean_square(module(x, shift), None).item())
    assert values[0].value(own) == values[1].value(own)
    used = values[0].data_used
    assert (used["labelled"], used["unlabelled"], used["value_samples"]) == (0, 3, 6)


def test_tensors_that_are_left_out_keep_the_modules_values(
    module: nn.Module, batches: list[tuple[Tensor, Tensor]], weights: Weights
) -> None:
    objective = LossObjective(module, nn.functional.mse_loss, batches)
    own = {name: tensor.detach() for name, tensor in module.named_parameters()}
    partial = {"0.weight": weights["0.weight"]}
    assert objective.value(partial) == objective.value({**own, **partial})
    assert list(objective.value_and_grad(partial).gradient) == ["0.weight"]


def test_the_record_says_what_it_is_made_of(module: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    objective = LossObjective(module, nn.MSELoss(), batches, name="motors", split="test")
    assert isinstance(objective, Objective)
    assert (objective.tasks, objective.task_weights.tolist()) == (("motors",), [1.0])
    used = objective.data_used
    assert (used["labelled"], used["test_inputs"]) == (14, True)
    record = json.loads(json.dumps(objective.describe()))
    assert record["loss"] == "MSELoss"
    assert record["tasks"] == [{"name": "motors", "split": "test", "samples": 14}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, "at least one batch .* the list is empty"),
        ({"batches": [torch.zeros(3, 5)]}, r"batch 0 is not a pair \(inputs, targets\)"),
        ({"batches": [(torch.zeros(0, 5), None)]}, "batch 0 holds no samples"),
        ({"batches": [(3.0, None)]}, "batch 0 holds no samples"),
        (
            {"batches_per_draw": 0},
            r"'batches_per_draw' parameter of LossObjective must be an int in the range \[1, inf\)",
        ),
        ({"split": "val"}, "the split must be one of 'train', 'validation', 'test', got 'val'"),
        ({"module": nn.Tanh()}, "Tanh has no parameters, so there is nothing to merge"),
    ],
)
def test_what_is_no_objective_is_refused(
    module: nn.Module, batches: Any, changes: dict[str, Any], message: str
) -> None:
    arguments = {"module": module, "loss_fn": nn.functional.mse_loss, "batches": batches}
    with pytest.raises(DataError, match=message):
        LossObjective(**{**arguments, **changes})


def test_a_loss_that_is_no_scalar_is_refused(module: nn.Module, batches: Any, weights: Weights) -> None:
    for loss_fn, found in ((lambda o, t: o - t, r"\[4, 2\]"), (lambda o, t: 0.5, "float")):
        with pytest.raises(DataError, match=f"must return a scalar tensor, .* it returned {found}"):
            LossObjective(module, loss_fn, batches).value(weights)
