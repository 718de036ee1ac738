from __future__ import annotations

import pytest
import torch
from mergesolve.objectives import CrossEntropy, DataError, Distillation, ModuleModel, RelativeLoss, Task, Weights


@pytest.fixture
def experts(mlp64_weights: Weights) -> dict[str, Weights]:
    rng = torch.Generator().manual_seed(2)
    return {
        name: {n: t + 0.3 * torch.randn(t.shape, generator=rng, dtype=t.dtype) for n, t in mlp64_weights.items()}
        for name in ("one", "two")
    }


def _losses(model: ModuleModel, tasks: tuple[Task, Task], weights: Weights) -> dict[str, float]:
    return CrossEntropy(model, tasks).task_losses(weights)


def test_ratios_and_excesses_are_against_each_tasks_own_expert_on_all_its_data(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task], experts: dict[str, Weights]
) -> None:
    own = {name: _losses(mlp_model, mlp_tasks, experts[name])[name] for name in experts}
    ratio = RelativeLoss(CrossEntropy(mlp_model, mlp_tasks, 4), experts)
    excess = RelativeLoss(CrossEntropy(mlp_model, mlp_tasks, 4), experts, "excess")
    assert excess.references == pytest.approx(own, rel=1e-12)
    plain = CrossEntropy(mlp_model, mlp_tasks, 4)
    for iteration in (0, 3, None):
        for objective in (ratio, excess, plain):
            objective.draw(iteration)
        batch = plain.task_losses(mlp64_weights)
        assert ratio.task_losses(mlp64_weights) == pytest.approx({t: batch[t] / own[t] for t in own}, rel=1e-12)
        assert excess.task_losses(mlp64_weights) == pytest.approx({t: batch[t] - own[t] for t in own}, rel=1e-12)
    for name in experts:
        assert ratio.task_losses(experts[name])[name] == pytest.approx(1)
        assert excess.task_losses(experts[name])[name] == pytest.approx(0, abs=1e-12)


def test_the_excess_leaves_the_gradient_and_the_ratio_divides_it(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task], experts: dict[str, Weights]
) -> None:
    plain = CrossEntropy(mlp_model, mlp_tasks).value_and_grad(mlp64_weights, per_task=True).gradient
    objectives = [RelativeLoss(CrossEntropy(mlp_model, mlp_tasks), experts, kind) for kind in ("ratio", "excess")]
    ratio, excess = (objective.value_and_grad(mlp64_weights, per_task=True).gradient for objective in objectives)
    for k, task in enumerate(mlp_tasks):
        for name in mlp64_weights:
            torch.testing.assert_close(excess[k][name], plain[k][name])  # type: ignore[index]
            unit = objectives[0].references[task.name]
            torch.testing.assert_close(ratio[k][name], plain[k][name] / unit)  # type: ignore[index]


def test_a_ratio_divides_by_no_less_than_the_floor(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task], experts: dict[str, Weights]
) -> None:
    high = RelativeLoss(CrossEntropy(mlp_model, mlp_tasks), experts, floor=100.0)
    plain = CrossEntropy(mlp_model, mlp_tasks).task_losses(mlp64_weights)
    assert high.task_losses(mlp64_weights) == pytest.approx({t: v / 100 for t, v in plain.items()}, rel=1e-12)


def test_experts_are_asked_once_on_their_own_task_alone(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task], experts: dict[str, Weights]
) -> None:
    asked: list[str] = []

    def expert(name: str) -> Weights:
        asked.append(name)
        return experts[name]

    objective = RelativeLoss(
        CrossEntropy(mlp_model, mlp_tasks), {"one": lambda: expert("one"), "two": lambda: expert("two")}
    )
    assert asked == []
    objective.value(mlp64_weights)
    objective.value_and_grad(mlp64_weights)
    assert asked == ["one", "two"]
    used = objective.data_used
    assert (used["value_samples"], used["gradient_samples"]) == (2 * 18, 18)


def test_what_cannot_be_relative_is_refused(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task], experts: dict[str, Weights]
) -> None:
    entropy = CrossEntropy(mlp_model, mlp_tasks)
    with pytest.raises(DataError, match=r"RelativeLoss takes an objective of this package .* got int"):
        RelativeLoss(3, experts)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"RelativeLoss: unknown kind 'ratios'. Did you mean 'ratio'"):
        RelativeLoss(entropy, experts, "ratios")
    with pytest.raises(DataError, match=r"RelativeLoss: no teacher for task 'two'"):
        RelativeLoss(entropy, {"one": experts["one"]})
    with pytest.raises(DataError, match=r"'floor' parameter of RelativeLoss must be a float in the range \(0, inf\)"):
        RelativeLoss(entropy, experts, floor=0.0)
    zero = RelativeLoss(Distillation(mlp_model, mlp_tasks, experts), experts)
    with pytest.raises(DataError, match="the loss of every expert on its own task is 0, so there is nothing to divide"):
        zero.value(mlp64_weights)
