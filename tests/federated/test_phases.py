from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mergesolve.federated import Reply
from mergesolve.federated.phases import FIRST, ByPhase, conflict, mean_cosine
from mergesolve.federated.registry import make_step
from mergesolve.federated.rounds import merge_round
from mergesolve.federated.state import ServerState
from mergesolve.pools import Pool
from mergesolve.solvers import OptionError
from torch import Tensor


def pool_of(task_vectors: Any) -> Pool:
    """A pool on an anchor of zeros from task vectors [n, p], split into two tensors."""
    rows = torch.tensor(np.asarray(task_vectors), dtype=torch.float32)
    cut = rows.shape[1] // 3
    experts = {f"c{i}": {"a": row[:cut], "b": row[cut:]} for i, row in enumerate(rows)}
    return Pool.from_state_dicts({"a": torch.zeros(cut), "b": torch.zeros(rows.shape[1] - cut)}, experts)


def cancelled(rows: Any) -> float:
    return float(1 - np.abs(rows.sum(axis=0)).sum() / np.abs(rows).sum())


@pytest.mark.parametrize("n", [1, 2, 5])
def test_conflict_equals_its_definition(n: int) -> None:
    rows = np.random.default_rng(n).normal(size=(n, 3001)).astype(np.float32)
    assert conflict(pool_of(rows)) == pytest.approx(cancelled(rows.astype(np.float64)), abs=1e-7)


def test_conflict_of_large_tensors_in_pieces_equals_its_definition() -> None:
    rows = np.random.default_rng(9).normal(size=(3, 300_000)).astype(np.float32)
    assert conflict(pool_of(rows)) == pytest.approx(cancelled(rows.astype(np.float64)), abs=1e-6)


def test_conflict_is_zero_where_signs_agree_and_one_where_all_cancels() -> None:
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], size=30)
    agreeing = np.abs(rng.integers(1, 9, size=(4, 30))) * signs
    assert conflict(pool_of(agreeing)) == 0.0
    assert conflict(pool_of(np.stack([signs, -signs]))) == 1.0


def test_conflict_does_not_depend_on_scale_or_order() -> None:
    rows = np.random.default_rng(1).normal(size=(4, 99))
    one = conflict(pool_of(rows))
    assert conflict(pool_of(rows[::-1].copy())) == pytest.approx(one, abs=1e-6)
    assert conflict(pool_of(1e-4 * rows)) == pytest.approx(one, abs=1e-6)


def test_mean_cosine_equals_its_definition() -> None:
    rows = np.random.default_rng(2).normal(size=(4, 20))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [abs(unit[i] @ unit[j]) for i in range(4) for j in range(4) if i != j]
    assert mean_cosine(rows @ rows.T) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert mean_cosine(np.eye(3)) == 0.0
    assert mean_cosine(np.array([[4.0]])) == 0.0


def interfering(shared: float, number: int) -> list[Reply]:
    """Replies of three clients to an anchor of zeros whose pairwise cosine is shared² / (1 + shared²)."""
    basis = torch.eye(40)
    return [
        Reply(f"c{i}", {"w": number * (basis[i] + shared * basis[30]).reshape(5, 8)}, number, samples=1)
        for i in range(3)
    ]


def run(step: ByPhase, shares: list[float]) -> tuple[list[dict[str, Any]], list[dict[str, Tensor]]]:
    """Rounds on an anchor that stays at zero, so that only the replies say how much clients interfere."""
    anchor = {"w": torch.zeros(5, 8)}
    state = ServerState(anchor)
    records, models = [], []
    for number, share in enumerate(shares, 1):
        weights, state, record = merge_round(anchor, interfering(share, number), state, step)
        records.append(record["method"])
        models.append(weights)
    return records, models


def test_density_fades_to_one_as_interference_falls() -> None:
    shares = [2.0, 1.0, 0.5, 0.25, 0.1, 0.0]
    records, _ = run(ByPhase(density=0.2), shares)
    cosine = [s**2 / (1 + s**2) for s in shares]
    expected = [1 - 0.8 * c / cosine[0] for c in cosine]
    np.testing.assert_allclose([r["density"] for r in records], expected, atol=1e-6)
    np.testing.assert_allclose([r["interference"] for r in records], cosine, atol=1e-6)
    densities = [r["density"] for r in records]
    assert densities == sorted(densities)
    assert records[0]["density"] == 0.2  # exactly, as given
    assert records[-1]["density"] == pytest.approx(1.0, abs=1e-9)


def test_interference_above_that_of_the_first_round_is_met_by_the_first_density() -> None:
    records, _ = run(ByPhase(density=0.3), [0.5, 3.0, 0.25])
    assert records[0]["density"] == records[1]["density"] == 0.3
    assert records[2]["density"] > 0.3


@pytest.mark.parametrize("method", ["ties", "dare", "della"])
def test_a_round_is_the_merge_at_its_density(method: str, sampled: Any) -> None:
    anchor, replies = sampled(3)
    step = ByPhase(method=method, density=0.4)
    merged, state, record = merge_round(anchor, replies, ServerState(anchor), step)
    plain, _, _ = merge_round(anchor, replies, ServerState(anchor), make_step({"name": method, "density": 0.4}))
    assert all(torch.equal(merged[n], plain[n]) for n in anchor)
    assert state.memory[FIRST] == record["method"]["interference"]


def test_measured_by_conflict_it_uses_the_conflict_of_the_record(sampled: Any) -> None:
    anchor, replies = sampled(3)
    _, _, record = merge_round(anchor, replies, ServerState(anchor), ByPhase(measure="conflict"))
    assert record["method"]["interference"] == record["conflict"] > 0


def test_a_method_without_density_and_values_out_of_range_are_refused() -> None:
    with pytest.raises(OptionError, match="'density'"):
        ByPhase(method="average")
    with pytest.raises(OptionError, match=r"'density' parameter of ByPhase"):
        ByPhase(density=0.0)
    with pytest.raises(OptionError, match="'measure'"):
        ByPhase(measure="angle")


def test_interference_is_compared_with_the_first_round_that_has_any() -> None:
    records, _ = run(ByPhase(density=0.4), [0.0, 1.0, 0.5])
    assert [records[0]["density"], records[1]["density"]] == [0.4, 0.4]
    assert records[2]["density"] == pytest.approx(1 - 0.6 * 0.2 / 0.5, abs=1e-6)
