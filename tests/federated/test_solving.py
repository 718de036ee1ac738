from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.federated import FederationError
from mergesolve.federated.registry import make_step
from mergesolve.federated.rounds import merge_round
from mergesolve.federated.state import ServerState
from mergesolve.federated.step import ServerData
from torch import Tensor

cp: Any = importlib.import_module("cvxpy")


def flat(model: Mapping[str, Tensor]) -> Any:
    return np.concatenate([t.double().numpy().ravel() for t in model.values() if t.is_floating_point()])


def merged(anchor: Any, replies: Any, spec: Any, data: Any = None, origin: Any = None) -> tuple[dict[str, Tensor], Any]:
    state = ServerState(anchor if origin is None else origin)
    weights, _, record = merge_round(anchor, replies, state, make_step(spec), data=data, seed=2)
    return weights, record


def kl(data: ServerData, origin: Any, weights: Any) -> float:
    """Mean over reference inputs of Σ p log(p / q), p of the origin and q of the weights; float64."""
    assert data.model is not None
    assert data.reference is not None
    inputs = data.reference.inputs[np.arange(len(data.reference))]
    with torch.no_grad():
        p, q = (
            torch.log_softmax(data.model.logits(model, inputs, data.reference).double(), dim=1)
            for model in (origin, weights)
        )
    return float((p.exp() * (p - q)).sum(dim=1).mean())


# Data-free: the anchored step against closed forms and cvxpy


def second_round(sampled: Any) -> tuple[Any, Any, Any]:
    """θ_0, θ_t ≠ θ_0 and replies to θ_t."""
    origin, _ = sampled(1)
    anchor, _ = sampled(1, seed=7)
    anchor = {n: origin[n] + 0.1 * t if t.is_floating_point() else t for n, t in anchor.items()}
    return origin, anchor, sampled(4, anchor=anchor)[1]


def anchored(bound: float, **options: Any) -> dict[str, Any]:
    return {
        "name": "anchored",
        "retention": {"by": "euclidean", "bound": bound, "outer": 8},
        "max_iter": 400,
        **options,
    }


def test_anchored_with_an_inactive_bound_is_fedavg(sampled: Any) -> None:
    origin, anchor, replies = second_round(sampled)
    weights, record = merged(anchor, replies, anchored(1e4), origin=origin)
    np.testing.assert_allclose(flat(weights), np.mean([flat(r.weights) for r in replies], axis=0), atol=2e-6)
    assert record["method"]["multiplier"] == 0.0
    assert record["method"]["status"] == "optimal"


def program(origin: Any, anchor: Any, replies: Any, bound: float, metric: Any = 1.0) -> tuple[Any, float]:
    """The same problem by cvxpy: θ, and the price of its constraint."""
    start, center = flat(anchor), flat(origin)
    models = np.stack([flat({n: r.weights[n] for n in anchor}) for r in replies])
    tau = np.vstack([models - start, center - start])
    weights = cp.Variable(len(tau), nonneg=True)
    theta = start + tau.T @ weights
    loss = sum(cp.sum_squares(theta - model) for model in models) / (2 * len(models))
    held = cp.sum_squares(cp.multiply(np.sqrt(metric), theta - center)) / 2 <= bound
    cp.Problem(cp.Minimize(loss), [cp.sum(weights) <= 1, held]).solve(solver=cp.CLARABEL)
    return start + tau.T @ weights.value, float(np.squeeze(held.dual_value))


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.01])
def test_anchored_with_an_active_bound_lies_where_a_quadratic_program_puts_it(share: float, sampled: Any) -> None:
    origin, anchor, replies = second_round(sampled)
    average = np.mean([flat(r.weights) for r in replies], axis=0)
    bound = share * float(((average - flat(origin)) ** 2).sum()) / 2
    weights, record = merged(anchor, replies, anchored(bound), origin=origin)
    reached = float(((flat(weights) - flat(origin)) ** 2).sum()) / 2
    assert reached == pytest.approx(bound, rel=1e-4)
    assert reached <= bound * (1 + 1e-5)
    assert record["distance"] ** 2 / 2 == pytest.approx(reached, rel=1e-6)
    wanted, price = program(origin, anchor, replies, bound)
    np.testing.assert_allclose(flat(weights), wanted, atol=2e-3)
    assert record["method"]["multiplier"] == pytest.approx(price, rel=2e-2)


def test_anchored_by_fisher_holds_in_its_metric(sampled: Any) -> None:
    origin, anchor, replies = second_round(sampled)
    data = ServerData(fisher={n: t for n, t in replies[0].fisher.items() if n != "count"})
    metric = flat({n: data.fisher[n] for n in anchor if n != "count"})  # type: ignore[index]
    average = np.mean([flat(r.weights) for r in replies], axis=0)
    bound = 0.4 * float((metric * (average - flat(origin)) ** 2).sum()) / 2
    spec = {**anchored(bound), "retention": {"by": "fisher", "bound": bound, "outer": 8}}
    weights, record = merged(anchor, replies, spec, data, origin)
    reached = float((metric * (flat(weights) - flat(origin)) ** 2).sum()) / 2
    assert reached == pytest.approx(bound, rel=1e-4)
    assert record["method"]["reference_loss"] == pytest.approx(reached, rel=1e-5)
    wanted, _ = program(origin, anchor, replies, bound, metric)
    np.testing.assert_allclose(flat(weights), wanted, atol=2e-3)


@pytest.mark.parametrize("mu", [0.0, 0.3, 2.0])
def test_proximity_with_an_euclidean_penalty_is_the_anchored_closed_form(mu: float, sampled: Any) -> None:
    """min Σ ½‖θ − θ̂_i‖²/N + μ/2 ‖θ − θ0‖² has θ = (mean θ̂ + μ θ0) / (1 + μ)."""
    origin, anchor, replies = second_round(sampled)
    spec = {"name": "anchored", "retention": {"by": "euclidean", "weight": mu}, "max_iter": 300}
    weights, _ = merged(anchor, replies, spec, origin=origin)
    average = np.mean([flat(r.weights) for r in replies], axis=0)
    np.testing.assert_allclose(flat(weights), (average + mu * flat(origin)) / (1 + mu), atol=5e-4)


def test_proximity_of_one_client_is_its_model(sampled: Any) -> None:
    anchor, replies = sampled(1)
    spec = {"name": "solve", "objective": "proximity", "blocks": "row", "start": "base", "max_iter": 300, "tol": 1e-12}
    weights, _ = merged(anchor, replies, spec)
    np.testing.assert_allclose(flat(weights), flat(replies[0].weights), atol=1e-4)


# Starting points


@pytest.mark.parametrize("origin_is_vertex", [False, True])
def test_the_average_that_a_step_starts_from_is_that_of_the_clients(origin_is_vertex: bool, sampled: Any) -> None:
    origin, anchor, replies = second_round(sampled)
    base = {"name": "solve", "objective": "proximity", "origin": origin_is_vertex, "max_iter": 0}
    average = np.mean([flat(r.weights) for r in replies], axis=0)
    found, _ = merged(anchor, replies, base, origin=origin)
    np.testing.assert_allclose(flat(found), average, atol=1e-6)
    tau = sum(flat(r.weights) - flat(anchor) for r in replies)
    spec = {**base, "domain": "free", "start": "task-arithmetic:0.3"}
    np.testing.assert_allclose(
        flat(merged(anchor, replies, spec, origin=origin)[0]), flat(anchor) + 0.3 * tau, atol=1e-6
    )
    spec = {**base, "start": "base"}
    np.testing.assert_allclose(flat(merged(anchor, replies, spec, origin=origin)[0]), flat(anchor), atol=1e-6)
    spec = {**base, "start": "expert:c2"}
    np.testing.assert_allclose(
        flat(merged(anchor, replies, spec, origin=origin)[0]), flat(replies[2].weights), atol=1e-6
    )


def test_the_origin_is_a_vertex_that_can_be_reached(sampled: Any) -> None:
    origin, anchor, replies = second_round(sampled)
    spec = {"name": "solve", "objective": "proximity", "origin": True, "start": "expert:origin", "max_iter": 0}
    weights, record = merged(anchor, replies, spec, origin=origin)
    np.testing.assert_allclose(flat(weights), flat(origin), atol=1e-6)
    assert record["coefficients"] == {"c0": 0, "c1": 0, "c2": 0, "c3": 0, "origin": 1}
    assert record["distance"] < 1e-5


# Retention on reference inputs


@pytest.fixture
def clip_case(clip_federation: Any) -> tuple[Any, Any, Any]:
    """Anchor, replies and the server's data for the tower; the reference inputs are images that nobody trains on."""
    anchor = clip_federation.anchor
    replies = [client.fit(anchor, 1) for client in clip_federation.clients()]
    images = torch.from_numpy(np.random.default_rng(8).integers(0, 256, (16, 3, 16, 16), dtype=np.uint8))
    reference = dataclasses.replace(clip_federation.tasks[0], name="reference", inputs=images, labels=None)
    tasks = {task.name: task.subset(6, 0) for task in clip_federation.tasks}
    return anchor, replies, ServerData(clip_federation.model, tasks, reference)


def bounded(bound: float, **options: Any) -> dict[str, Any]:
    return {
        "name": "fw-bound",
        "solver": "projected-gradient",
        "start": "base",
        "max_iter": 40,
        "retention": {"bound": bound, "outer": 4},
        **options,
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": {"name": "frank-wolfe", "step_rule": "line-search"}},
        {"blocks": "row", "domain": "free", "solver": {"name": "adaptive", "lr": 0.1}},
        {"objective": {"name": "cross-entropy"}, "blocks": "tensor"},
        {"objective": {"name": "distillation", "batch_size": 4}, "minibatches": True},
    ],
    ids=["gradient", "frank-wolfe", "rows", "labels", "minibatches"],
)
@pytest.mark.parametrize("share", [0.7, 0.2, 0.01])
def test_the_reference_loss_is_within_the_bound_where_the_start_is(
    options: Any, share: float, federation: Any, trained: Any, server_data: Any
) -> None:
    spec = bounded(1.0, **{k: v for k, v in options.items() if k != "minibatches"})
    free, _ = merged(federation.anchor, trained, {**spec, "retention": None}, server_data)
    bound = share * kl(server_data, federation.anchor, free)
    spec["retention"] = {**spec["retention"], "bound": bound}
    if "minibatches" in options:
        spec["retention"] = {**spec["retention"], "batch_size": 5}
    weights, record = merged(federation.anchor, trained, spec, server_data)
    found = kl(server_data, federation.anchor, weights)
    assert found <= bound * (1 + 1e-6) + 1e-7  # the sums of the server are in float32
    assert record["method"]["reference_loss"] == pytest.approx(found, rel=1e-4, abs=1e-7)
    assert record["method"]["bound"] == bound
    assert record["method"]["violation"] <= bound * 1e-6
    assert record["step_length"] > 0


def test_the_bound_holds_for_a_tower(clip_case: Any) -> None:
    anchor, replies, data = clip_case
    free, _ = merged(anchor, replies, {**bounded(1.0), "retention": None}, data)
    for share in (0.5, 0.1):
        bound = share * kl(data, anchor, free)
        weights, record = merged(anchor, replies, bounded(bound), data)
        assert 0 < kl(data, anchor, weights) <= bound * (1 + 1e-6) + 1e-7
        assert record["data"]["unlabelled"] == 6 + 6 + 16
        assert record["data"]["labelled"] == 0


def test_a_start_outside_of_the_bound_is_brought_inside(federation: Any, trained: Any, server_data: Any) -> None:
    """From the average, which forgets too much; the base of the pool is θ_0 here, and forgets nothing."""
    spec = bounded(0.01, start="average")
    start, _ = merged(federation.anchor, trained, {**spec, "max_iter": 0, "retention": None}, server_data)
    assert kl(server_data, federation.anchor, start) > 0.01
    weights, _ = merged(federation.anchor, trained, spec, server_data)
    assert kl(server_data, federation.anchor, weights) <= 0.01 * (1 + 1e-6) + 1e-7


def test_a_smaller_bound_never_means_more_forgetting(federation: Any, trained: Any, server_data: Any) -> None:
    bounds = [0.002, 0.01, 0.05, 0.2, 1.0, 5.0]
    reached, objectives = [], []
    for bound in bounds:
        weights, record = merged(federation.anchor, trained, bounded(bound, max_iter=120), server_data)
        reached.append(kl(server_data, federation.anchor, weights))
        objectives.append(record["method"]["objective"])
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(reached)), reached
    assert all(a >= b - 1e-4 for a, b in itertools.pairwise(objectives)), objectives
    assert reached[0] < reached[-1]


@pytest.mark.parametrize("by", ["reference", "euclidean", "fisher"])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_penalty_of_weight_zero_is_no_retention_bit_for_bit(
    by: str, batch_size: int | None, federation: Any, trained: Any, server_data: Any
) -> None:
    spec = {"name": "rows", "max_iter": 6, "objective": {"name": "distillation", "batch_size": batch_size}}
    plain, before = merged(federation.anchor, trained, spec, server_data)
    penalty = {**spec, "retention": {"by": by, "weight": 0.0, "batch_size": batch_size}}
    found, after = merged(federation.anchor, trained, penalty, server_data)
    assert all(torch.equal(plain[n], found[n]) for n in plain)
    assert before["method"]["objective"] == after["method"]["objective"]


def test_a_heavier_penalty_never_means_more_forgetting(federation: Any, trained: Any, server_data: Any) -> None:
    reached = []
    for weight in (0.0, 0.3, 3.0, 100.0):
        spec = {**bounded(1.0, max_iter=60), "retention": {"weight": weight}}
        reached.append(kl(server_data, federation.anchor, merged(federation.anchor, trained, spec, server_data)[0]))
    assert all(a >= b - 1e-6 for a, b in itertools.pairwise(reached)), reached
    assert reached[-1] < 0.2 * reached[0]


# What the server looks at


def test_an_absent_client_is_taught_by_the_global_model(federation: Any, trained: Any, server_data: Any) -> None:
    """With one client there and two away, the loss at θ_t is that of the one alone: the others' terms vanish there."""
    spec = {"name": "solve", "max_iter": 0, "start": "base", "blocks": "model"}
    _, alone = merged(federation.anchor, trained[:1], spec, server_data)
    one = trained[0].client
    only = dataclasses.replace(server_data, tasks={one: server_data.tasks[one]})
    _, single = merged(federation.anchor, trained[:1], spec, only)
    assert alone["method"]["objective"] == pytest.approx(single["method"]["objective"] / 3, rel=1e-5)
    assert single["method"]["objective"] > 1e-3


@pytest.mark.parametrize(
    ("objective", "labelled", "unlabelled"),
    [("cross-entropy", 54, 0), ("entropy", 0, 54), ("distillation", 0, 54), ("proximity", 0, 0)],
)
def test_the_record_says_what_was_looked_at(
    objective: str, labelled: int, unlabelled: int, federation: Any, trained: Any, server_data: Any
) -> None:
    spec = {"name": "solve", "objective": objective, "max_iter": 2}
    used = merged(federation.anchor, trained, spec, server_data)[1]["data"]
    assert (used["labelled"], used["unlabelled"], used["test_inputs"]) == (labelled, unlabelled, False)
    assert (used["samples_seen"] > 0) == (objective != "proximity")


def test_mixtures_are_what_teachers_judge_and_not_what_the_server_holds(
    federation: Any, trained: Any, server_data: Any
) -> None:
    """54 samples of three clients in all, 40 inputs for each of them."""
    spec = {"name": "solve", "objective": "distillation", "max_iter": 0}
    plain = merged(federation.anchor, trained, spec, server_data)[1]
    mixed = merged(federation.anchor, trained, {**spec, "mixed": 40}, server_data)[1]
    assert (mixed["data"]["labelled"], mixed["data"]["unlabelled"]) == (0, 54)
    assert plain["data"]["teacher_samples"] == 54
    assert mixed["data"]["teacher_samples"] == 120
    assert mixed["method"]["objective"] != plain["method"]["objective"]
    few = make_step({"name": "few-shot", "mixed": None})
    assert make_step(few.describe()) == few
    assert "mixed" not in make_step("rows").describe()


def test_labels_do_not_matter_to_objectives_without_them(federation: Any, trained: Any, server_data: Any) -> None:
    bare = dataclasses.replace(server_data, tasks={n: t.without_labels() for n, t in server_data.tasks.items()})
    for objective in ("distillation", "entropy"):
        spec = {"name": "solve", "objective": objective, "max_iter": 3}
        one, _ = merged(federation.anchor, trained, spec, server_data)
        two, _ = merged(federation.anchor, trained, spec, bare)
        assert all(torch.equal(one[n], two[n]) for n in one)
    with pytest.raises(FederationError, match="needs labels, and the server's samples for 'blue' have none"):
        make_step({"name": "solve", "objective": "cross-entropy"}).check(bare)


def test_data_that_are_missing_are_asked_for(server_data: Any) -> None:
    with pytest.raises(FederationError, match="needs inputs at the server, and there are none"):
        make_step("solve").check(ServerData())
    with pytest.raises(FederationError, match="retention by reference inputs needs some at the server"):
        make_step("rows-bound").check(dataclasses.replace(server_data, reference=None))
    spec = {"name": "anchored", "retention": {"by": "fisher", "bound": 1.0}}
    with pytest.raises(FederationError, match="needs the diagonal Fisher information at the first model"):
        make_step(spec).check(ServerData())
    make_step("anchored").check(ServerData())


def test_minibatches_follow_from_seed_and_round(federation: Any, trained: Any, server_data: Any) -> None:
    spec = {"name": "rows", "max_iter": 4, "objective": {"name": "distillation", "batch_size": 4}}
    found = []
    for seed in (0, 0, 1):
        state = ServerState(federation.anchor)
        found.append(merge_round(federation.anchor, trained, state, make_step(spec), data=server_data, seed=seed)[0])
    assert torch.equal(found[0]["first.weight"], found[1]["first.weight"])
    assert not torch.equal(found[0]["first.weight"], found[2]["first.weight"])
