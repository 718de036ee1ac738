from __future__ import annotations

import numpy as np
import pytest
import torch
from mergesolve.objectives import (
    AccuracyLoss,
    CrossEntropy,
    DataError,
    ModuleModel,
    Proximity,
    SharpnessAware,
    Task,
    WeightedSum,
    Weights,
)


def test_on_a_quadratic_the_ascent_step_is_the_worst_point_and_the_value_is_known() -> None:
    """½ ‖θ − c‖² is largest on a ball around θ straight away from c: ½ (‖θ − c‖ + ρ)²."""
    center = {"w": torch.zeros(4, dtype=torch.float64)}
    point = {"w": torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64)}
    found = SharpnessAware(Proximity(center), 0.5).value_and_grad(point)
    assert found.loss == pytest.approx(0.5 * 5.5**2, rel=1e-12)
    assert isinstance(found.gradient, dict)
    torch.testing.assert_close(found.gradient["w"], 1.1 * point["w"])
    flat = SharpnessAware(Proximity(center), 0.5).value_and_grad(center)
    assert flat.loss == 0


def test_value_and_gradient_are_those_at_the_moved_weights(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    plain = CrossEntropy(mlp_model, mlp_tasks, 4)
    sharp = SharpnessAware(CrossEntropy(mlp_model, mlp_tasks, 4), 0.2)
    for iteration in (None, 5):
        plain.draw(iteration)
        sharp.draw(iteration)
        gradient = plain.value_and_grad(mlp64_weights).gradient
        assert isinstance(gradient, dict)
        norm = float(torch.cat([g.flatten() for g in gradient.values()]).norm())
        moved = {n: t + 0.2 * gradient[n] / norm for n, t in mlp64_weights.items()}
        there, found = plain.value_and_grad(moved), sharp.value_and_grad(mlp64_weights)
        assert found.loss == pytest.approx(there.loss, rel=1e-12)
        assert found.loss > plain.value(mlp64_weights)
        assert sharp.value(mlp64_weights) == pytest.approx(there.loss, rel=1e-12)
        assert isinstance(found.gradient, dict)
        assert isinstance(there.gradient, dict)
        for name, tensor in found.gradient.items():
            torch.testing.assert_close(tensor, there.gradient[name])


def test_no_other_step_of_that_length_is_much_worse_to_first_order(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    radius = 1e-3
    plain = CrossEntropy(mlp_model, mlp_tasks)
    worst = SharpnessAware(plain, radius).value(mlp64_weights)
    rng = np.random.default_rng(0)
    for _ in range(20):
        step = {n: torch.from_numpy(rng.normal(size=t.shape)) for n, t in mlp64_weights.items()}
        length = float(torch.cat([s.flatten() for s in step.values()]).norm())
        other = plain.value({n: t + radius / length * step[n] for n, t in mlp64_weights.items()})
        assert other <= worst + 10 * radius**2


def test_in_a_sum_only_its_own_part_moves(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    one, two = CrossEntropy(mlp_model, mlp_tasks[0]), CrossEntropy(mlp_model, mlp_tasks[1])
    sharp = SharpnessAware(CrossEntropy(mlp_model, mlp_tasks[1]), 0.3)
    both = WeightedSum([(1.0, one), (2.0, sharp)])
    found = both.value_and_grad(mlp64_weights)
    parts = [one.value_and_grad(mlp64_weights), sharp.value_and_grad(mlp64_weights)]
    assert found.loss == pytest.approx(parts[0].loss + 2 * parts[1].loss, rel=1e-12)
    assert parts[1].loss > two.value(mlp64_weights)
    for name, tensor in found.gradient.items():  # type: ignore[union-attr]
        torch.testing.assert_close(tensor, parts[0].gradient[name] + 2 * parts[1].gradient[name])  # type: ignore[index]


def test_the_ascent_step_is_counted(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    sharp = SharpnessAware(CrossEntropy(mlp_model, mlp_tasks))
    sharp.value_and_grad(mlp64_weights)
    sharp.value(mlp64_weights)
    used = sharp.data_used
    assert (used["gradient_samples"], used["value_samples"], used["labelled"]) == (3 * 18, 18, 18)


def test_what_has_no_ascent_step_is_refused(mlp_model: ModuleModel, mlp_tasks: tuple[Task, Task]) -> None:
    with pytest.raises(DataError, match=r"SharpnessAware takes an objective of this package .* got str"):
        SharpnessAware("entropy")  # type: ignore[arg-type]
    with pytest.raises(
        DataError, match=r"'radius' parameter of SharpnessAware must be a float in the range \(0, inf\)"
    ):
        SharpnessAware(CrossEntropy(mlp_model, mlp_tasks), 0.0)
    with pytest.raises(DataError, match="needs a gradient for its ascent step, and AccuracyLoss has none"):
        SharpnessAware(AccuracyLoss(mlp_model, mlp_tasks))
