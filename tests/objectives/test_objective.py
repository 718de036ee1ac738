from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mergesolve.objectives import (
    CLIP,
    CrossEntropy,
    DataError,
    Distillation,
    Entropy,
    ModuleModel,
    Objective,
    SumObjective,
    Task,
    Weights,
)
from mergesolve.objectives.objective import epoch_batch, readable_out_of_memory
from torch import Tensor, nn

Build = Callable[..., SumObjective]


def _distillation(model: Any, tasks: Any, **options: Any) -> Distillation:
    """Teachers are perturbed copies of the model's own weights."""
    tasks = (tasks,) if isinstance(tasks, Task) else tasks
    rng = torch.Generator().manual_seed(9)
    own = model.module.state_dict() if isinstance(model, ModuleModel) else model.base_weights()
    teachers = {task.name: {n: t + 0.1 * torch.randn(t.shape, generator=rng) for n, t in own.items()} for task in tasks}
    return Distillation(model, tasks, teachers, **options)


BUILDS: dict[str, Build] = {"CrossEntropy": CrossEntropy, "Entropy": Entropy, "Distillation": _distillation}
all_objectives = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())


def _inner(a: Weights, b: Weights) -> float:
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))


def _direction(weights: Weights, seed: int = 0) -> Weights:
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=rng, dtype=torch.float64) for name, t in weights.items()}


def _moved(weights: Weights, direction: Weights, step: float) -> Weights:
    return {name: weights[name] + step * direction[name] for name in weights}


@all_objectives
def test_gradient_is_the_finite_difference_of_the_value_on_an_mlp(
    build: Build, mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    objective = build(mlp_model, mlp_tasks, microbatch=4, task_weights={"one": 0.7, "two": 1.9})
    gradient = objective.value_and_grad(mlp64_weights).gradient
    for seed in range(3):
        d, h = _direction(mlp64_weights, seed), 1e-6
        up, down = objective.value(_moved(mlp64_weights, d, h)), objective.value(_moved(mlp64_weights, d, -h))
        assert (up - down) / (2 * h) == pytest.approx(_inner(gradient, d), rel=1e-6)


@all_objectives
def test_gradient_is_the_finite_difference_of_the_value_on_a_clip_tower(
    build: Build, clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]
) -> None:
    weights = {name: tensor.double() for name, tensor in clip_weights.items()}
    objective = build(clip, clip_tasks, microbatch=8)
    gradient = objective.value_and_grad(weights).gradient
    d, h = _direction(weights), 1e-6
    up, down = objective.value(_moved(weights, d, h)), objective.value(_moved(weights, d, -h))
    assert (up - down) / (2 * h) == pytest.approx(_inner(gradient, d), rel=1e-5)


@all_objectives
def test_result_does_not_depend_on_the_microbatch(
    build: Build, clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]
) -> None:
    whole = build(clip, clip_tasks, microbatch=100).value_and_grad(clip_weights)
    for size in (1, 5, 12):
        split = build(clip, clip_tasks, microbatch=size).value_and_grad(clip_weights)
        assert split.loss == pytest.approx(whole.loss, rel=1e-5, abs=1e-7)
        for name, expected in whole.gradient.items():
            torch.testing.assert_close(split.gradient[name], expected, rtol=1e-3, atol=1e-5)


@all_objectives
def test_weighted_task_gradients_sum_to_the_gradient(
    build: Build, mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    objective = build(mlp_model, mlp_tasks, task_weights={"two": 1.9, "one": 0.7})
    assert objective.task_weights.tolist() == [0.7, 1.9]
    total, by_task = objective.value_and_grad(mlp64_weights), objective.value_and_grad(mlp64_weights, per_task=True)
    assert by_task.task_losses == pytest.approx(total.task_losses)
    assert total.loss == pytest.approx(0.7 * total.task_losses["one"] + 1.9 * total.task_losses["two"])
    for name, expected in total.gradient.items():
        summed = 0.7 * by_task.gradient[0][name] + 1.9 * by_task.gradient[1][name]
        torch.testing.assert_close(summed, expected)


def test_a_task_gradient_is_that_of_the_objective_on_this_task_alone(
    mlp_model: ModuleModel, mlp64_weights: Weights, mlp_tasks: tuple[Task, Task]
) -> None:
    by_task = CrossEntropy(mlp_model, mlp_tasks).value_and_grad(mlp64_weights, per_task=True)
    for task, gradient in zip(mlp_tasks, by_task.gradient, strict=True):
        alone = CrossEntropy(mlp_model, task).value_and_grad(mlp64_weights)
        assert alone.loss == by_task.task_losses[task.name]
        for name, expected in alone.gradient.items():
            torch.testing.assert_close(gradient[name], expected)


@all_objectives
def test_value_equals_the_loss_of_the_gradient_evaluation_on_each_draw(
    build: Build, clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]
) -> None:
    objective = build(clip, clip_tasks, batch_size=5)
    assert objective.stochastic
    losses = []
    for iteration in (0, 1, None):
        objective.draw(iteration)
        losses.append(objective.value_and_grad(clip_weights).loss)
        # The same kernels with and without a gradient: equal to the last bit, or a line search would see noise.
        assert objective.value(clip_weights) == losses[-1]
    assert len(set(losses)) == 3


def test_draws_are_a_function_of_seed_iteration_and_task_only(clip: CLIP, clip_tasks: tuple[Task, Task]) -> None:
    shapes, digits = clip_tasks
    both, alone = CrossEntropy(clip, clip_tasks, batch_size=4, seed=7), Entropy(clip, digits, batch_size=4, seed=7)
    other = CrossEntropy(clip, clip_tasks, batch_size=4, seed=8)
    history = []
    for iteration in (5, 0, 3, 5):
        for objective in (both, alone, other):
            objective.draw(iteration)
        np.testing.assert_array_equal(both.batch_indices(digits), alone.batch_indices(digits))
        assert both.batch_indices(digits).tolist() != other.batch_indices(digits).tolist()
        history.append(both.batch_indices(shapes).tolist())
    assert history[0] == history[3]
    assert history[0] != history[1]


@given(samples=st.integers(1, 40), size=st.integers(1, 45), seed=st.integers(0, 5), stream=st.sampled_from(["a", "b"]))
def test_an_epoch_of_draws_meets_every_sample_once(samples: int, size: int, seed: int, stream: str) -> None:
    epochs = 3
    drawn = [epoch_batch(samples, size, t, seed, stream) for t in range(epochs * samples)]
    if size >= samples:
        assert all(batch.tolist() == list(range(samples)) for batch in drawn)
        return
    assert {len(batch) for batch in drawn} == {size}
    sequence = np.concatenate(drawn)
    for epoch in range(epochs):
        assert sorted(sequence[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def test_before_the_first_draw_and_after_draw_none_it_is_all_the_data(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]
) -> None:
    everything = CrossEntropy(clip, clip_tasks).value(clip_weights)
    objective = CrossEntropy(clip, clip_tasks, batch_size=3)
    assert objective.value(clip_weights) == everything
    objective.draw(2)
    assert objective.value(clip_weights) != everything
    objective.draw(None)
    assert objective.value(clip_weights) == everything


def test_a_batch_as_large_as_the_data_is_not_stochastic(clip: CLIP, clip_tasks: tuple[Task, Task]) -> None:
    assert not CrossEntropy(clip, clip_tasks).stochastic
    assert not CrossEntropy(clip, clip_tasks, batch_size=17).stochastic
    assert CrossEntropy(clip, clip_tasks, batch_size=16).stochastic


def test_randomness_of_the_model_is_frozen_within_an_iteration() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 0.5, training=True))

    torch.manual_seed(0)
    model = ModuleModel(Noisy(6, 3))
    task = Task("t", torch.randn(20, 6), torch.randint(0, 3, (20,)), tuple("abc"))
    objective, weights = CrossEntropy(model, task, batch_size=10), model.base_weights()
    before = torch.get_rng_state()
    objective.draw(4)
    first = objective.value_and_grad(weights).loss
    assert objective.value(weights) == first
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers were used up"
    objective.draw(
        24
    )  # the same samples (two batches an epoch) only if the permutation repeats: other noise, other loss
    assert objective.value(weights) != first


def test_the_dropout_of_a_module_is_off() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    task = Task("t", torch.randn(9, 6), torch.randint(0, 3, (9,)), tuple("abc"))
    model = ModuleModel(module)
    expected = nn.functional.cross_entropy(module.eval()(task.inputs), task.labels).item()
    assert CrossEntropy(model, task).value(model.base_weights()) == pytest.approx(expected, rel=1e-6)


def test_weights_and_gradients_carry_no_graph_and_are_not_touched(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]
) -> None:
    before = {name: tensor.clone() for name, tensor in clip_weights.items()}
    gradient = CrossEntropy(clip, clip_tasks, microbatch=4).value_and_grad(clip_weights).gradient
    assert list(gradient) == list(clip_weights)
    for name, tensor in clip_weights.items():
        assert torch.equal(tensor, before[name])
        assert tensor.grad is None
        assert not tensor.requires_grad
        assert gradient[name].shape == tensor.shape
        assert gradient[name].grad_fn is None
        assert not gradient[name].requires_grad


def test_a_caller_that_has_turned_gradients_off_gets_them_all_the_same(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]
) -> None:
    objective = CrossEntropy(clip, clip_tasks)
    expected = objective.value_and_grad(clip_weights).gradient
    with torch.no_grad():
        found = objective.value_and_grad(clip_weights).gradient
    assert all(torch.equal(found[name], gradient) and gradient.any() for name, gradient in expected.items())


def test_a_second_evaluation_starts_from_a_gradient_of_zero(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]
) -> None:
    objective = CrossEntropy(clip, clip_tasks)
    first, second = objective.value_and_grad(clip_weights).gradient, objective.value_and_grad(clip_weights).gradient
    for name in first:
        assert torch.equal(first[name], second[name])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
def test_many_microbatches_and_tasks_take_one_gradient_of_memory() -> None:
    script = """
        import torch
        from torch import nn
        from mergesolve.objectives import CrossEntropy, ModuleModel, Task
        torch.manual_seed(0)
        width, layers = 1536, 12
        module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        model, weights = ModuleModel(module), {n: p.detach() for n, p in module.named_parameters()}
        labels = torch.arange(8)
        tasks = [Task(str(t), torch.randn(8, width), labels, [str(c) for c in range(width)]) for t in range(2)]
        warm = ModuleModel(nn.Linear(4, 4))
        CrossEntropy(warm, Task("w", torch.randn(4, 4), labels[:4], tuple("abcd"))).value_and_grad(warm.base_weights())
        def peak():  # not ru_maxrss, which a child inherits from the process that started it
            with open("/proc/self/status") as status:
                return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
        before = peak()
        CrossEntropy(model, tasks, microbatch=2).value_and_grad(weights)
        print((peak() - before) / (4 * layers * width**2))
    """
    # Every large tensor gets pages of its own: a fragmented heap would be measured otherwise.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    gradients = float(run.stdout)
    # One gradient, and one tensor (a twelfth) or so in passing. Collecting each microbatch's gradient would take two.
    assert 0.9 < gradients < 1.4


def test_a_tensor_that_the_loss_does_not_depend_on_has_gradient_zero() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(6, 3), nn.Linear(2, 2)
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.norm(x))

    model = ModuleModel(Partly())
    task = Task("t", torch.randn(9, 6), torch.randint(0, 3, (9,)), tuple("abc"))
    gradient = CrossEntropy(model, task).value_and_grad(model.base_weights()).gradient
    assert set(gradient) == set(model.base_weights())
    for name in ("unused.weight", "norm.running_mean", "norm.running_var"):
        assert not gradient[name].any()
    assert gradient["norm.weight"].any()


def test_the_ledger_counts_distinct_examples_and_every_forwarded_sample(
    clip: CLIP, clip_weights: Weights, clip_tasks: tuple[Task, Task]
) -> None:
    objective = CrossEntropy(clip, clip_tasks, batch_size=5, microbatch=2)
    assert objective.data_used == {
        "labelled": 29,
        "unlabelled": 0,
        "test_inputs": True,
        "samples_seen": 0,
        "gradient_samples": 0,
        "value_samples": 0,
    }
    objective.draw(0)
    objective.value_and_grad(clip_weights)
    objective.value(clip_weights)
    objective.draw(None)
    objective.value(clip_weights)
    used = objective.data_used
    assert (used["gradient_samples"], used["value_samples"], used["samples_seen"]) == (10, 10 + 29, 49)
    without = Entropy(clip, clip_tasks[0]).data_used
    assert (without["labelled"], without["unlabelled"], without["test_inputs"]) == (0, 12, False)


@all_objectives
def test_objectives_follow_the_protocol_and_describe_themselves(
    build: Build, clip: CLIP, clip_tasks: tuple[Task, Task]
) -> None:
    import json

    objective = build(clip, clip_tasks, batch_size=5, seed=3)
    assert isinstance(objective, Objective)
    assert objective.tasks == ("shapes", "digits")
    assert objective.task_weights.tolist() == [0.5, 0.5]
    record = json.loads(json.dumps(objective.describe()))
    assert record["objective"] in BUILDS
    assert (record["seed"], record["batch_size"]) == (3, 5)
    assert [task["name"] for task in record["tasks"]] == ["shapes", "digits"]
    assert [task["split"] for task in record["tasks"]] == ["train", "test"]


def test_running_out_of_memory_names_the_microbatch_to_try() -> None:
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"cuda:0 with 64 samples of task 'sun397'.*microbatch=32"),
        readable_out_of_memory(64, "sun397", torch.device("cuda:0")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"with 1 samples.*precision='bf16'"),
        readable_out_of_memory(1, "sun397", torch.device("cuda:0")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_running_out_of_cpu_memory_is_told_from_other_errors(mlp_tasks: tuple[Task, Task]) -> None:
    class Huge(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.empty(1 << 60)

    model = ModuleModel(Huge(6, 4).double())
    weights = {n: t.detach() for n, t in model.module.named_parameters()}
    with pytest.raises(torch.OutOfMemoryError, match=r"Out of memory on cpu with 8 samples.*microbatch=4"):
        CrossEntropy(model, mlp_tasks, microbatch=8).value_and_grad(weights)
    with (
        pytest.raises(RuntimeError, match=r"^something else$"),
        readable_out_of_memory(8, "t", torch.device("cpu")),
    ):
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"'batch_size' parameter of Entropy must be an int in the range \[1, inf\). Got 0 instead"),
        ({"batch_size": True}, "Got True instead"),
        ({"microbatch": 2.5}, r"'microbatch' parameter of Entropy must be an int .* Got 2.5 instead"),
        ({"seed": -1}, r"'seed' parameter of Entropy must be an int in the range \[0, inf\)"),
        ({"task_weights": {"shapes": 1.0}}, "task_weights lacks 'digits'; give a weight for every task"),
        (
            {"task_weights": {"shape": 1.0}},
            r"task_weights names 'shape', which is not a task\. Did you mean 'shapes'\?",
        ),
        ({"task_weights": {"shapes": 1.0, "digits": -1.0}}, "must be finite, not negative and not all 0"),
        ({"task_weights": {"shapes": 0.0, "digits": 0.0}}, "must be finite, not negative and not all 0"),
        ({"task_weights": {"shapes": 1.0, "digits": float("nan")}}, "must be finite, not negative and not all 0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(
    clip: CLIP, clip_tasks: tuple[Task, Task], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Entropy(clip, clip_tasks, **options)


def test_an_empty_or_ambiguous_list_of_tasks_is_refused(clip: CLIP, clip_tasks: tuple[Task, Task]) -> None:
    with pytest.raises(DataError, match="Entropy needs at least one task; the list of tasks is empty"):
        Entropy(clip, [])
    with pytest.raises(DataError, match="two tasks have the name 'shapes'; give each its own"):
        Entropy(clip, [clip_tasks[0], clip_tasks[0].subset(3)])


def test_weights_without_a_parameter_of_the_model_are_refused(
    mlp_model: ModuleModel, mlp_tasks: tuple[Task, Task]
) -> None:
    with pytest.raises(DataError, match="The weights hold no parameter of the model"):
        CrossEntropy(mlp_model, mlp_tasks).value_and_grad({})
