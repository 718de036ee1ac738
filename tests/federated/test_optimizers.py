from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.federated import Reply
from mergesolve.federated.optimizers import ServerOptimizer
from mergesolve.federated.registry import make_step
from mergesolve.federated.rounds import merge_round
from mergesolve.federated.state import ServerState
from mergesolve.solvers import OptionError
from torch import Tensor

NAMES = ("a.weight", "a.bias", "b.weight", "scale")


def flat(model: Any) -> Any:
    return np.concatenate([model[name].double().numpy().ravel() for name in NAMES])


def run(sampled: Any, spec: Any, rounds: int = 4, n: int = 3) -> tuple[list[Any], list[Any]]:
    """Models after each round [rounds + 1, p], and the average update of each round at the model it began with."""
    anchor, _ = sampled(n)
    state, models, deltas = ServerState(anchor), [flat(anchor)], []
    for number in range(1, rounds + 1):
        _, replies = sampled(n, number=number, anchor=anchor)
        deltas.append(np.mean([flat(reply.weights) for reply in replies], axis=0) - models[-1])
        anchor, state, _ = merge_round(anchor, replies, state, make_step(spec))
        models.append(flat(anchor))
    return models, deltas


@pytest.mark.parametrize("n", [1, 4])
def test_momentum_zero_and_rate_one_is_fedavg(n: int, sampled: Any) -> None:
    found, _ = run(sampled, {"name": "fedavgm", "momentum": 0.0, "lr": 1.0}, n=n)
    wanted, _ = run(sampled, "fedavg", n=n)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_momentum_zero_and_rate_one_is_any_inner_step(sampled: Any) -> None:
    for inner in ("ties", {"name": "fedavg", "by": "samples"}, "geometric-median"):
        found, _ = run(sampled, {"name": "optimizer", "step": inner, "momentum": 0.0})
        wanted, _ = run(sampled, inner)
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


def reference(method: str, start: Any, deltas: Any, lr: float, beta1: float, beta2: float, tau: float) -> list[Any]:
    theta, m, v, found = start, 0 * start, 0 * start + tau**2, []
    for delta in deltas:
        m = beta1 * m + (delta if method == "momentum" else (1 - beta1) * delta)
        if method == "adagrad":
            v = v + delta**2
        elif method == "adam":
            v = beta2 * v + (1 - beta2) * delta**2
        elif method == "yogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        theta = theta + lr * (m if method == "momentum" else m / (np.sqrt(v) + tau))
        found.append(theta)
    return found


@pytest.mark.parametrize(
    ("name", "method", "given"),
    [
        ("fedavgm", "momentum", {"lr": 1.0, "momentum": 0.9}),
        ("fedavgm", "momentum", {"lr": 0.3, "momentum": 0.5}),
        ("fedadagrad", "adagrad", {"lr": 1e-2, "momentum": 0.0}),
        ("fedadam", "adam", {"lr": 1e-3, "momentum": 0.9}),
        ("fedyogi", "yogi", {"lr": 1e-3, "momentum": 0.9}),
        ("fedyogi", "yogi", {"lr": 0.02, "momentum": 0.5, "decay": 0.5, "adaptivity": 1e-2}),
    ],
)
def test_equals_its_reference_over_rounds(name: str, method: str, given: Any, sampled: Any) -> None:
    """Updates do not depend on where the model is, so the reference sees those that the server saw."""
    models, deltas = run(sampled, {"name": name, **given})
    wanted = reference(
        method,
        models[0],
        deltas,
        given["lr"],
        given["momentum"],
        given.get("decay", 0.99),
        given.get("adaptivity", 1e-3),
    )
    np.testing.assert_allclose(models[1:], wanted, rtol=1e-5, atol=2e-6)


def test_the_registered_defaults_are_those_of_the_reference(sampled: Any) -> None:
    for name, given in (
        ("fedavgm", {"lr": 1.0, "momentum": 0.9}),
        ("fedadagrad", {"lr": 1e-2, "momentum": 0.0, "adaptivity": 1e-3}),
        ("fedadam", {"lr": 1e-3, "momentum": 0.9, "decay": 0.99, "adaptivity": 1e-3}),
        ("fedyogi", {"lr": 1e-3, "momentum": 0.9, "decay": 0.99, "adaptivity": 1e-3}),
    ):
        assert make_step(name) == make_step({"name": name, **given})
        assert make_step(name) == make_step({"name": name, "step": {"name": "fedavg"}})


def test_with_a_decay_of_zero_adam_remembers_the_last_square_and_yogi_all_of_them(sampled: Any) -> None:
    """With β2 = 0 adam's v is Δ²; yogi's is v + Δ² where that exceeds v, as adagrad's."""
    options = {"decay": 0.0, "momentum": 0.0, "adaptivity": 1e-6}
    models, deltas = run(sampled, {"name": "fedadam", "lr": 0.5, **options}, rounds=1)
    np.testing.assert_allclose(models[1] - models[0], 0.5 * np.sign(deltas[0]), rtol=1e-2, atol=1e-3)
    one = run(sampled, {"name": "fedyogi", "lr": 0.5, **options}, rounds=1)[0]
    two = run(sampled, {"name": "fedadagrad", "lr": 0.5, "momentum": 0.0, "adaptivity": 1e-6}, rounds=1)[0]
    np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-7)


def test_a_tensor_that_no_client_changed_keeps_moving_by_its_momentum() -> None:
    anchor = {"a": torch.zeros(2), "b": torch.zeros(2)}
    state, step = ServerState(anchor), make_step({"name": "fedavgm", "momentum": 0.5})
    first = [Reply("x", {"a": torch.ones(2), "b": torch.ones(2)}, 1)]
    weights, state, _ = merge_round(anchor, first, state, step)
    only_a = {"a": weights["a"] + 1, "b": weights["b"].clone()}
    weights, state, _ = merge_round(weights, [Reply("x", only_a, 2)], state, step)
    assert torch.equal(weights["a"], torch.tensor([2.5, 2.5]))
    assert torch.equal(weights["b"], torch.tensor([1.5, 1.5]))


def test_memory_of_inner_steps_is_kept_apart(sampled: Any) -> None:
    """Momentum of momentum, by hand: inner θ' = θ + m1, m1 ← β m1 + Δ; outer m2 ← γ m2 + m1, θ ← θ + m2."""
    inner = {"name": "fedavgm", "momentum": 0.5}
    models, deltas = run(sampled, {"name": "optimizer", "step": inner, "momentum": 0.3})
    theta, m1, m2 = models[0], 0.0, 0.0
    for delta, found in zip(deltas, models[1:], strict=True):
        m1 = 0.5 * m1 + delta
        m2 = 0.3 * m2 + m1
        theta = theta + m2
        np.testing.assert_allclose(found, theta, rtol=1e-5, atol=2e-6)
    phases, _ = run(sampled, {"name": "optimizer", "step": "by-phase", "momentum": 0.0})
    plain, _ = run(sampled, "by-phase")
    np.testing.assert_allclose(phases, plain, rtol=2e-6, atol=2e-6)


def test_what_the_inner_step_counted_and_found_is_in_the_record(
    federation: Any, trained: Any, server_data: Any
) -> None:
    inner = {"name": "fw-federated", "max_iter": 2}
    records = [
        merge_round(federation.anchor, trained, ServerState(federation.anchor), make_step(spec), data=server_data)[2]
        for spec in (inner, {"name": "optimizer", "step": inner})
    ]
    for key in ("bytes", "data"):
        assert records[0][key] == records[1][key]
    assert records[1]["method"]["inner"]["objective"] == records[0]["method"]["objective"]
    assert records[1]["coefficients"] is None


def test_moments_of_tensors_in_another_order_of_memory_can_be_saved(tmp_path: Any) -> None:
    anchor: dict[str, Tensor] = {"w": torch.arange(6.0).reshape(2, 3).T}
    reply = Reply("x", {"w": anchor["w"] + 1}, 1)
    weights, state, _ = merge_round(anchor, [reply], ServerState(anchor), make_step("fedadam"))
    state.save(tmp_path / "s", weights, {})
    found, _ = ServerState.load(tmp_path / "s", anchor, {})
    assert all(np.array_equal(found.memory[name], value) for name, value in state.memory.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sgd"}, "'method'"),
        ({"lr": 0}, r"'lr' parameter of ServerOptimizer must be a number in \(0, inf\)"),
        ({"momentum": 1.0}, r"'momentum' .* \[0, 1\)"),
        ({"decay": -0.1}, "'decay'"),
        ({"adaptivity": 0.0}, "'adaptivity'"),
    ],
)
def test_options_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ServerOptimizer(make_step("fedavg"), **options)
