from __future__ import annotations

import json

import pytest
import torch
from mergesolve.objectives import CrossEntropy, DataError, ModuleModel, Objective, Proximity, Task, WeightedSum, Weights


@pytest.fixture
def center(mlp64_weights: Weights) -> Weights:
    rng = torch.Generator().manual_seed(2)
    return {n: t + 0.1 * torch.randn(t.shape, generator=rng, dtype=t.dtype) for n, t in mlp64_weights.items()}


@pytest.fixture
def fisher(mlp64_weights: Weights) -> Weights:
    rng = torch.Generator().manual_seed(4)
    return {n: torch.rand(t.shape, generator=rng, dtype=t.dtype) for n, t in mlp64_weights.items()}


@pytest.mark.parametrize("diagonal", [False, True])
def test_value_and_gradient_are_those_of_autograd(
    mlp64_weights: Weights, center: Weights, fisher: Weights, diagonal: bool
) -> None:
    metric = fisher if diagonal else None
    objective = Proximity(center, metric)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in mlp64_weights.items()}
    scale = fisher if diagonal else {name: torch.ones_like(tensor) for name, tensor in center.items()}
    expected = sum(0.5 * (scale[name] * (leaves[name] - center[name]) ** 2).sum() for name in leaves)
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    found = objective.value_and_grad(mlp64_weights)
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-13)
    assert objective.value(mlp64_weights) == found.loss
    assert found.task_losses == {"proximity": found.loss}
    for name, gradient in found.gradient.items():
        torch.testing.assert_close(gradient, leaves[name].grad)
    by_task = objective.value_and_grad(mlp64_weights, per_task=True).gradient
    assert isinstance(by_task, list)
    assert len(by_task) == 1
    torch.testing.assert_close(by_task[0], found.gradient)


def test_at_the_center_both_are_exactly_zero(center: Weights, fisher: Weights) -> None:
    found = Proximity(center, fisher).value_and_grad(center)
    assert found.loss == 0.0
    assert all(not gradient.any() for gradient in found.gradient.values())


def test_the_sum_is_accumulated_in_float64() -> None:
    """In float32 the small tensor would vanish beside the large one: (1e4)² / 2 + (1e-2)² / 2."""
    center = {"large": torch.zeros(1), "small": torch.zeros(1)}
    weights = {"large": torch.full((1,), 1e4), "small": torch.full((1,), 0.0078125)}
    assert Proximity(center).value(weights) == 0.5e8 + 0.5 * 0.0078125**2
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    found = Proximity(center).value_and_grad(half)
    assert found.gradient["small"].dtype == torch.bfloat16
    assert float(found.gradient["small"]) == 0.0078125
    # nor does the centre lose digits to weights of half precision
    near = Proximity({"w": torch.full((1,), 1.001)})
    expected = 0.5 * (1.0 - float(torch.tensor(1.001))) ** 2
    assert near.value({"w": torch.ones(1, dtype=torch.bfloat16)}) == pytest.approx(expected, rel=1e-12)


def test_a_part_of_the_center_will_do_and_integer_tensors_are_left_alone(center: Weights) -> None:
    objective = Proximity({**center, "steps": torch.tensor(3)})
    part = {"0.weight": center["0.weight"] + 2.0, "steps": torch.tensor(4)}
    found = objective.value_and_grad(part)
    assert found.loss == pytest.approx(0.5 * 4.0 * center["0.weight"].numel(), rel=1e-13)
    assert not found.gradient["steps"].any()
    assert objective.value(part) == found.loss


def test_in_a_weighted_sum_it_adds_its_share_and_no_data(
    mlp_model: ModuleModel, mlp_tasks: tuple[Task, Task], mlp64_weights: Weights, center: Weights, fisher: Weights
) -> None:
    loss, anchor = CrossEntropy(mlp_model, mlp_tasks), Proximity(center, fisher)
    for parts in ([(0.5, loss), (3.0, anchor)], [(3.0, anchor), (0.5, loss)]):
        found = WeightedSum(parts).value_and_grad(mlp64_weights)
        one, other = loss.value_and_grad(mlp64_weights), anchor.value_and_grad(mlp64_weights)
        assert found.loss == pytest.approx(0.5 * one.loss + 3.0 * other.loss, rel=1e-13)
        for name, gradient in found.gradient.items():
            torch.testing.assert_close(gradient, 0.5 * one.gradient[name] + 3.0 * other.gradient[name])
    used = anchor.data_used
    assert not any(used.values())
    assert WeightedSum([(1.0, loss), (1.0, anchor)]).data_used["labelled"] == loss.data_used["labelled"]


def test_it_is_an_objective_and_says_around_what(center: Weights, fisher: Weights) -> None:
    objective = Proximity(center, fisher)
    assert isinstance(objective, Objective)
    assert not objective.stochastic
    record = json.loads(json.dumps(objective.describe()))
    assert record["metric"] == "diagonal"
    others = [Proximity(center), Proximity({**center, "0.bias": center["0.bias"] + 1e-9}, fisher)]
    assert len({record["fingerprint"], *(other.describe()["fingerprint"] for other in others)}) == 3
    assert Proximity({n: t.clone() for n, t in center.items()}, fisher).describe() == objective.describe()


def test_what_does_not_fit_is_refused(center: Weights, fisher: Weights) -> None:
    with pytest.raises(DataError, match="no floating-point tensor"):
        Proximity({"steps": torch.tensor(3)})
    with pytest.raises(DataError, match=r"metric of '0.bias' has shape \[2\], its center \[8\]"):
        Proximity(center, {**fisher, "0.bias": torch.ones(2)})
    with pytest.raises(DataError, match=r"metric of '0.bias' has entries that are negative or not finite"):
        Proximity(center, {**fisher, "0.bias": -fisher["0.bias"]})
    with pytest.raises(DataError, match="center lacks 'head'"):
        Proximity(center).value({**center, "head": torch.zeros(2)})
    with pytest.raises(DataError, match=r"metric lacks '0.bias'"):
        Proximity(center, {"0.weight": fisher["0.weight"]}).value_and_grad(
            {n: center[n] for n in ("0.weight", "0.bias")}
        )
    with pytest.raises(DataError, match=r"'0.bias' has shape \[3\], in the center \[8\]"):
        Proximity(center).value({"0.bias": torch.zeros(3)})
