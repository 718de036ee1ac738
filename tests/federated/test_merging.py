from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.federated import FederationError
from mergesolve.federated.registry import make_step
from mergesolve.federated.rounds import merge_round
from mergesolve.federated.state import ServerState
from mergesolve.solvers import OptionError
from torch import Tensor

NAMES = ("a.weight", "a.bias", "b.weight", "scale")


def merged(anchor: Any, replies: Any, spec: Any, **options: Any) -> dict[str, Tensor]:
    return merge_round(anchor, replies, ServerState(options.pop("origin", anchor)), make_step(spec), **options)[0]


def flat(model: Any) -> Any:
    return np.concatenate([model[name].double().numpy().ravel() for name in NAMES])


def updates(anchor: Any, replies: Any) -> Any:
    """Task vectors [n, p], float64."""
    return np.stack([flat(reply.weights) - flat(anchor) for reply in replies])


def same(found: Any, wanted: Any, within: float = 3e-7) -> None:
    np.testing.assert_allclose(flat(found) if isinstance(found, dict) else found, wanted, rtol=within, atol=within)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_fedavg_is_task_arithmetic_and_paint_at_one_over_n(n: int, sampled: Any) -> None:
    anchor, replies = sampled(n)
    found = merged(anchor, replies, "fedavg")
    same(found, np.mean([flat(reply.weights) for reply in replies], axis=0))
    for spec in (
        "average",
        {"name": "task-arithmetic", "scale": 1 / n},
        {"name": "paint", "alpha": 1 / n},
        {"name": "paint", "weights": {f"c{i}": 1 / n for i in range(n)}},
    ):
        same(merged(anchor, replies, spec), flat(found))


def test_size_weighted_fedavg_is_the_average_with_the_sizes_as_weights(sampled: Any) -> None:
    anchor, replies = sampled(4)
    found = merged(anchor, replies, {"name": "fedavg", "by": "samples"})
    sizes = np.array([10.0, 20.0, 30.0, 40.0])
    same(found, sizes @ np.stack([flat(reply.weights) for reply in replies]) / sizes.sum())
    weights = {reply.client: float(reply.samples) for reply in replies}
    same(merged(anchor, replies, {"name": "average", "weights": weights}), flat(found))


def test_weights_follow_the_client_and_not_the_place_of_its_reply(sampled: Any) -> None:
    anchor, replies = sampled(4)
    for spec in ({"name": "fedavg", "by": "samples"}, "fednova"):
        assert equal(merged(anchor, replies, spec), merged(anchor, replies[::-1], spec))


def test_a_client_without_samples_counts_for_nothing_by_samples(sampled: Any) -> None:
    anchor, replies = sampled(3)
    silent = [*replies[:2], dataclasses.replace(replies[2], samples=0)]
    spec = {"name": "fedavg", "by": "samples"}
    same(merged(anchor, silent, spec), flat(merged(anchor, replies[:2], spec)))


@pytest.mark.parametrize("by", ["uniform", "samples"])
def test_fednova_with_equal_steps_is_fedavg(by: str, sampled: Any) -> None:
    anchor, replies = sampled(4)
    equal_steps = [dataclasses.replace(reply, steps=17) for reply in replies]
    found = merged(anchor, equal_steps, {"name": "fednova", "by": by})
    same(found, flat(merged(anchor, equal_steps, {"name": "fedavg", "by": by})))


def test_fednova_is_its_definition(sampled: Any) -> None:
    anchor, replies = sampled(4)
    p, steps = np.array([0.1, 0.2, 0.3, 0.4]), np.array([3.0, 4.0, 5.0, 6.0])
    direction = (p / steps) @ updates(anchor, replies)
    same(merged(anchor, replies, "fednova"), flat(anchor) + (p @ steps) * direction)


def test_fednova_does_not_see_how_often_a_client_repeats_its_step(sampled: Any) -> None:
    """Twice the steps with twice the update changes the length of the round's step and not its direction."""
    anchor, replies = sampled(3)
    double = {n: 2 * t - anchor[n] if t.is_floating_point() else t for n, t in replies[0].weights.items()}
    longer = [dataclasses.replace(replies[0], weights=double, steps=2 * replies[0].steps), *replies[1:]]
    one = flat(merged(anchor, replies, "fednova")) - flat(anchor)
    two = flat(merged(anchor, longer, "fednova")) - flat(anchor)
    assert one @ two / np.linalg.norm(one) / np.linalg.norm(two) == pytest.approx(1, abs=1e-9)
    assert np.linalg.norm(two) > np.linalg.norm(one)


@pytest.mark.parametrize("cap", [None, 1.5])
def test_fedexp_is_fedavg_where_clients_agree(cap: float | None, sampled: Any) -> None:
    anchor, replies = sampled(1)
    agreeing = [dataclasses.replace(replies[0], client=f"c{i}") for i in range(5)]
    _, _, record = merge_round(anchor, agreeing, ServerState(anchor), make_step({"name": "fedexp", "cap": cap}))
    np.testing.assert_allclose(list(record["coefficients"].values()), 1 / 5, rtol=1e-12)


def test_fedexp_is_its_definition(sampled: Any) -> None:
    anchor, replies = sampled(5)
    tau = updates(anchor, replies)
    eta = max(1.0, (tau**2).sum() / (2 * 5 * (tau.mean(axis=0) ** 2).sum()))
    assert eta > 1.5
    same(merged(anchor, replies, {"name": "fedexp", "cap": None}), flat(anchor) + eta * tau.mean(axis=0))
    same(merged(anchor, replies, "fedexp"), flat(anchor) + 1.5 * tau.mean(axis=0))


@pytest.mark.parametrize("mu", [0.0, 0.5, 30.0])
def test_average_with_the_origin_is_the_anchored_closed_form(mu: float, sampled: Any) -> None:
    """argmin_θ Σ w_i ‖θ − θ̂_i‖² + μ ‖θ − θ0‖² = (Σ w_i θ̂_i + μ θ0) / (Σ w_i + μ), whatever θ_t is."""
    origin, _ = sampled(1)
    anchor = {n: t + 1 if t.is_floating_point() else t for n, t in origin.items()}
    _, replies = sampled(4, anchor=anchor)
    w = np.array([1.0, 2.0, 0.5, 3.0])
    spec = {"name": "average", "origin": True, "weights": {**{f"c{i}": x for i, x in enumerate(w)}, "origin": mu}}
    found = merged(anchor, replies, spec, origin=origin)
    models = np.stack([flat(reply.weights) for reply in replies])
    same(found, (w @ models + mu * flat(origin)) / (w.sum() + mu))


def test_a_client_called_origin_is_refused_where_the_origin_takes_part(sampled: Any) -> None:
    anchor, replies = sampled(2)
    named = [dataclasses.replace(replies[0], client="origin"), replies[1]]
    with pytest.raises(FederationError, match="a client is called 'origin'"):
        merged(anchor, named, {"name": "average", "origin": True})
    assert merged(anchor, named, "average")


def test_fisher_merging_takes_what_the_clients_send(sampled: Any) -> None:
    anchor, replies = sampled(3)
    fishers = np.stack([np.concatenate([r.fisher[n].double().numpy().ravel() for n in NAMES]) for r in replies])
    models = np.stack([flat(reply.weights) for reply in replies])
    same(merged(anchor, replies, "fisher"), (fishers * models).sum(0) / fishers.sum(0), 1e-5)


def test_steps_that_lack_statistics_say_whose(sampled: Any) -> None:
    anchor, replies = sampled(3)
    without = [replies[0], dataclasses.replace(replies[1], fisher=None), replies[2]]
    with pytest.raises(
        FederationError, match="Fisher needs fisher statistics of every client, and client 'c1' sent none"
    ):
        merged(anchor, without, "fisher")
    with pytest.raises(FederationError, match="clients send no gram statistics"):
        merged(anchor, replies, "regmean")


def test_preparation_selects_then_transforms(sampled: Any) -> None:
    anchor, replies = sampled(3)
    tau = updates(anchor, replies)
    spec = {"name": "task-arithmetic", "scale": 1.0, "transforms": [{"name": "trim", "density": 0.25, "per": "model"}]}
    kept = np.abs(tau) >= np.sort(np.abs(tau), axis=1)[:, [-math.ceil(0.25 * tau.shape[1])]]
    same(merged(anchor, replies, spec), flat(anchor) + (tau * kept).sum(0))
    spec = {"name": "average", "select": {"name": "random", "k": 1, "seed": 3}}
    _, _, record = merge_round(anchor, replies, ServerState(anchor), make_step(spec))
    (chosen,) = record["coefficients"]
    found = merged(anchor, replies, spec)
    same(found, flat(replies[int(chosen[1])].weights))


def test_counts_that_cannot_weigh_are_screened(sampled: Any) -> None:
    anchor, replies = sampled(3)
    for name, count in itertools.product(("samples", "steps"), (0, -5, 2.5, True)):
        wrong = [dataclasses.replace(replies[0], **{name: count}), *replies[1:]]
        weights, _, record = merge_round(anchor, wrong, ServerState(anchor), make_step("fednova"))
        assert [(left["client"], left["reason"]) for left in record["rejected"]] == [(replies[0].client, "counts")]
        expected, _, _ = merge_round(anchor, replies[1:], ServerState(anchor), make_step("fednova"))
        assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_weights_that_are_none_are_refused() -> None:
    with pytest.raises(FederationError, match="'by' parameter of FedAvg"):
        make_step({"name": "fednova", "by": "size"})
    with pytest.raises(OptionError, match="weights"):
        make_step({"name": "average", "weights": {"c0": "much"}})
