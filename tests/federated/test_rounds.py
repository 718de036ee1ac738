from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.federated import FederationError, Reply
from mergesolve.federated.registry import make_step
from mergesolve.federated.rounds import distance, merge_round
from mergesolve.federated.screening import SENT, Screening
from mergesolve.federated.state import ServerState
from safetensors.torch import save_file
from torch import Tensor

STEPS = [
    "fedavg",
    "fednova",
    "fedadam",
    "by-phase",
    "ties",
    "geometric-median",
    "fedexp",
    "quadratic",
    {"name": "anchored", "max_iter": 8},
]
ids = [spec if isinstance(spec, str) else spec["name"] for spec in STEPS]  # type: ignore[index]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def poisoned(reply: Reply, value: float) -> Reply:
    assert isinstance(reply.weights, dict)
    weights = {n: t.clone() for n, t in reply.weights.items()}
    weights["b.weight"][1, 2] = value
    return dataclasses.replace(reply, client=f"{reply.client}-bad", weights=weights)


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the replies that were merged."""
    left_out = ("seconds", "peak_memory", "rejected", "bytes")
    return {key: value for key, value in record.items() if key not in left_out}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", STEPS, ids=ids)
def test_a_nan_of_one_client_never_touches_what_the_others_give(spec: Any, value: float, sampled: Any) -> None:
    anchor, replies = sampled(4)
    state, step = ServerState(anchor), make_step(spec)
    alone = merge_round(anchor, replies, state, step)
    for place in range(4):
        mixed = [*replies[:place], poisoned(replies[place], value), *replies[place:]]
        found = merge_round(anchor, mixed, state, step)
        assert same(found[0], alone[0])
        assert found[2]["rejected"][0]["reason"] == "nonfinite"
        assert plain(found[2]) == plain(alone[2])
        bad = f"{replies[place].client}-bad"
        assert {n: mark for n, mark in found[1].fingerprints.items() if n != bad} == alone[1].fingerprints
        assert found[1].norms == alone[1].norms


def test_a_huge_update_never_touches_what_the_others_give(sampled: Any) -> None:
    anchor, replies = sampled(4)
    weights = {n: anchor[n] + 1e4 * (t - anchor[n]) if n != "count" else t for n, t in replies[2].weights.items()}
    huge = Reply("big", weights, 1, samples=10**9)
    for spec in STEPS:
        alone = merge_round(anchor, replies, ServerState(anchor), make_step(spec))
        found = merge_round(anchor, [huge, *replies], ServerState(anchor), make_step(spec))
        assert found[2]["rejected"][0]["reason"] == "norm"
        assert same(found[0], alone[0])


def test_every_order_of_the_replies_gives_the_same_round(sampled: Any) -> None:
    anchor, replies = sampled(3)
    replies = [*replies, poisoned(replies[0], torch.nan), Reply("gone", None, 1, error="x")]
    orders = list(itertools.permutations(replies))[::11]
    for spec in ("fednova", "by-phase", "dare"):
        rounds = [merge_round(anchor, p, ServerState(anchor), make_step(spec)) for p in orders]
        for weights, state, record in rounds[1:]:
            assert same(weights, rounds[0][0])
            assert state == rounds[0][1]
            assert {**plain(record), "r": record["rejected"], "b": record["bytes"]} == {
                **plain(rounds[0][2]),
                "r": rounds[0][2]["rejected"],
                "b": rounds[0][2]["bytes"],
            }


def test_too_few_replies_repeat_the_round_and_change_nothing(sampled: Any) -> None:
    anchor, replies = sampled(3)
    state = ServerState(anchor, 0, {"first/a.bias": np.ones(6)}, {"c9": "x"}, (1.0,))
    bad = [poisoned(reply, torch.nan) for reply in replies]
    for minimum, given in (
        (1, []),
        (1, bad),
        (1, [Reply("x", None, 1, error="e")]),
        (4, replies),
        (3, [*replies[:2], *bad]),
    ):
        weights, after, record = merge_round(
            anchor, given, state, make_step("fedadam"), screening=Screening(minimum=minimum)
        )
        assert record["repeat"] is True
        assert after is state
        assert all(weights[n] is anchor[n] for n in anchor)
        assert weights is not anchor
        assert len(record["accepted"]) < minimum
    assert (
        merge_round(anchor, replies, state, make_step("fedadam"), screening=Screening(minimum=3))[2]["repeat"] is False
    )


def test_files_count_as_what_they_hold(sampled: Any, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        anchor, replies = sampled(3, dtype)
        files = []
        for reply in replies:
            path = tmp_path / f"{reply.client}-{dtype}.safetensors"
            save_file(reply.weights, path)
            files.append(dataclasses.replace(reply, weights=str(path) if reply.client == "c1" else path))
        for spec in STEPS:
            in_memory = merge_round(anchor, replies, ServerState(anchor), make_step(spec))
            on_disk = merge_round(anchor, files, ServerState(anchor), make_step(spec))
            mixed = merge_round(anchor, [files[0], *replies[1:]], ServerState(anchor), make_step(spec))
            for found in (on_disk, mixed):
                assert same(found[0], in_memory[0])
                assert found[1].fingerprints == in_memory[1].fingerprints
                assert found[1].norms == in_memory[1].norms
                assert found[2]["bytes"] == in_memory[2]["bytes"]


def test_the_record_measures_the_round(sampled: Any) -> None:
    origin, _ = sampled(1)
    anchor = {n: t + 0.5 if t.is_floating_point() else t for n, t in origin.items()}
    _, replies = sampled(3, anchor=anchor)
    replies = [dataclasses.replace(reply, seconds=0.5, fisher=None) for reply in replies]
    weights, state, record = merge_round(anchor, replies, ServerState(origin), make_step("fedavg"))

    def flat(model: Any) -> Any:
        return np.concatenate([t.double().numpy().ravel() for t in model.values() if t.is_floating_point()])

    tau = np.stack([flat({n: reply.weights[n] for n in anchor}) - flat(anchor) for reply in replies])
    norms = np.linalg.norm(tau, axis=1)
    np.testing.assert_allclose(list(record["norms"].values()), norms, rtol=1e-6)
    np.testing.assert_allclose(record["cosines"], tau @ tau.T / np.outer(norms, norms), atol=1e-6)
    assert record["conflict"] == pytest.approx(1 - np.abs(tau.sum(0)).sum() / np.abs(tau).sum(), abs=1e-6)
    assert record["step_length"] == pytest.approx(np.linalg.norm(tau.mean(0)), rel=1e-6)
    assert record["distance"] == pytest.approx(np.linalg.norm(flat(weights) - flat(origin)), rel=1e-6)
    assert record["coefficients"] == pytest.approx({"c0": 1 / 3, "c1": 1 / 3, "c2": 1 / 3})
    size = sum(t.numel() * t.element_size() for t in anchor.values())
    assert record["bytes"] == {"down": 3 * size, "up": 3 * size}
    seconds = record["seconds"]
    assert seconds["clients"] == 1.5
    parts = {key: value for key, value in seconds.items() if key not in ("clients", "server")}
    assert seconds["server"] >= sum(parts.values())
    assert state.norms == tuple(record["norms"].values())
    assert set(state.fingerprints) == {"c0", "c1", "c2", SENT}


def test_bytes_count_what_came_up_even_if_it_was_refused(sampled: Any) -> None:
    anchor, replies = sampled(3)
    size = sum(t.numel() * t.element_size() for t in anchor.values())
    fishers = sum(t.numel() * t.element_size() for t in replies[0].fisher.values())
    given = [*replies[:2], poisoned(replies[2], torch.nan), Reply("gone", None, 1, error="x")]
    _, _, record = merge_round(anchor, given, ServerState(anchor), make_step("fedavg"))
    assert record["bytes"] == {"down": 4 * size, "up": 3 * (size + fishers)}


def test_a_step_that_leaves_the_numbers_is_refused(sampled: Any) -> None:
    anchor, replies = sampled(2)
    replies = [
        dataclasses.replace(r, weights={**r.weights, "a.bias": anchor["a.bias"] + 30 + i})
        for i, r in enumerate(replies)
    ]
    with pytest.raises(FederationError, match=r"'task-arithmetic' gave NaN or infinity in .*smaller steps"):
        merge_round(anchor, replies, ServerState(anchor), make_step({"name": "task-arithmetic", "scale": 3e38}))


def test_a_model_of_half_precision_that_leaves_its_range_is_refused() -> None:
    """65504 is the largest float16: the merge is finite in float32 and infinite as what it is stored as."""
    anchor = {"w": torch.full((3,), 60000.0, dtype=torch.float16)}
    reply = Reply("a", {"w": torch.full((3,), 65000.0, dtype=torch.float16)}, 1)
    with pytest.raises(FederationError, match="gave NaN or infinity in 'w'"):
        merge_round(anchor, [reply], ServerState(anchor), make_step({"name": "task-arithmetic", "scale": 2.0}))


def test_norms_of_rounds_before_count_in_the_next(sampled: Any) -> None:
    anchor, replies = sampled(3)
    _, state, _ = merge_round(anchor, replies, ServerState(anchor), make_step("fedavg"))
    huge = {n: anchor[n] + 500 * (t - anchor[n]) if n != "count" else t for n, t in replies[0].weights.items()}
    lone = Reply("new", huge, 2)
    _, after, record = merge_round(anchor, [lone], state, make_step("fedavg"))
    assert record["repeat"]
    assert record["rejected"][0]["reason"] == "norm"
    assert after is state


def test_distance_is_euclidean_over_floats_in_any_type() -> None:
    a = {"x": torch.tensor([3.0, 0.0]), "h": torch.tensor([4.0]).bfloat16(), "n": torch.tensor(5)}
    b = {"x": torch.zeros(2), "h": torch.zeros(1).bfloat16(), "n": torch.tensor(9)}
    assert distance(a, b) == 5.0
    assert distance(a, a) == 0.0


def test_parameters_that_have_gradients_are_merged_like_any_tensors(sampled: Any) -> None:
    anchor, replies = sampled(2)
    leaves = {n: torch.nn.Parameter(t) if t.is_floating_point() else t for n, t in anchor.items()}
    for spec in STEPS:
        found = merge_round(leaves, replies, ServerState(leaves), make_step(spec))
        wanted = merge_round(anchor, replies, ServerState(anchor), make_step(spec))
        assert same(found[0], wanted[0])
        assert found[2]["distance"] == wanted[2]["distance"]
        assert not any(t.requires_grad for t in found[0].values())


@pytest.mark.parametrize("spec", STEPS, ids=ids)
def test_the_backend_of_the_pool_changes_rounding_only(spec: Any, sampled: Any) -> None:
    anchor, replies = sampled(4)
    one = merge_round(anchor, replies, ServerState(anchor), make_step(spec), backend="streaming")
    two = merge_round(
        anchor, [*replies, poisoned(replies[0], torch.nan)], ServerState(anchor), make_step(spec), backend="resident"
    )
    for name, tensor in one[0].items():
        torch.testing.assert_close(two[0][name], tensor, rtol=1e-5, atol=1e-5)
    assert two[2]["conflict"] == pytest.approx(one[2]["conflict"], abs=1e-6)
    assert two[2]["rejected"][0]["reason"] == "nonfinite"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", STEPS, ids=ids)
def test_models_of_any_precision_are_merged_as_their_float32_counterparts(
    spec: Any, dtype: torch.dtype, sampled: Any
) -> None:
    """Up to one rounding to the type of the model; an empty tensor is carried along."""
    anchor, replies = sampled(3, dtype)
    anchor["empty"] = torch.zeros(0, 3, dtype=dtype)
    for reply in replies:
        reply.weights["empty"] = anchor["empty"]
        del reply.fisher["count"]
    single = {n: t.float() if t.is_floating_point() else t for n, t in anchor.items()}
    singles = [
        dataclasses.replace(r, weights={n: t.float() if t.is_floating_point() else t for n, t in r.weights.items()})
        for r in replies
    ]
    found = merge_round(anchor, replies, ServerState(anchor), make_step(spec))[0]
    wanted = merge_round(single, singles, ServerState(single), make_step(spec))[0]
    for name, tensor in found.items():
        assert tensor.dtype == anchor[name].dtype
        if dtype != torch.float64 and tensor.is_floating_point():
            assert torch.equal(tensor, wanted[name].to(dtype)), name
        torch.testing.assert_close(tensor.float(), wanted[name].float(), rtol=2e-2, atol=1e-5)
