from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergesolve.federated import FederationError, TaskClient, dirichlet, iid
from mergesolve.objectives import Task
from scipy.stats import chi2_contingency


def labelled(samples: int, classes: int, seed: int = 0) -> Task:
    """Input i is the number i, so that a part shows which samples it has."""
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, classes, samples))
    inputs = torch.arange(samples, dtype=torch.float32)[:, None]
    return Task("t", inputs, labels, tuple(f"c{i}" for i in range(classes)))


def samples(part: Task) -> list[int]:
    return [int(x) for x in part.batch(np.arange(len(part)))[:, 0]]


def table(parts: list[Task]) -> Any:
    """Samples by client and class."""
    return np.array([np.bincount(part.labels, minlength=len(part.classes)) for part in parts])


def pvalue(counts: Any) -> float:
    """Of a chi-square test that class and client are independent."""
    return float(chi2_contingency(counts).pvalue)


@given(
    st.integers(1, 200),
    st.integers(1, 12),
    st.integers(1, 10),
    st.floats(-6, 6),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_every_sample_is_in_exactly_one_part_and_no_part_is_below_the_minimum(
    n: int, classes: int, clients: int, log_alpha: float, minimum: int, seed: int
) -> None:
    task = labelled(n, classes, seed)
    if clients * minimum > n:
        with pytest.raises(FederationError, match=f"at most {n // minimum} clients"):
            dirichlet(task, clients, 10**log_alpha, seed, minimum)
        return
    parts = dirichlet(task, clients, 10**log_alpha, seed, minimum)
    assert len(parts) == clients
    assert sorted(i for part in parts for i in samples(part)) == list(range(n))
    assert min(map(len, parts)) >= minimum
    for part in parts:
        assert part.classes == task.classes
        assert torch.equal(part.labels, task.labels[samples(part)])


@given(st.integers(1, 100), st.integers(1, 10), st.integers(0, 5))
def test_even_parts_differ_by_one_sample_at_most(n: int, clients: int, seed: int) -> None:
    if clients > n:
        with pytest.raises(FederationError, match="too few"):
            iid(labelled(n, 3), clients, seed)
        return
    parts = iid(labelled(n, 3), clients, seed)
    assert sorted(i for part in parts for i in samples(part)) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_parts_are_the_same_for_one_seed_and_others_for_another() -> None:
    task = labelled(100, 5)
    for split in (partial(dirichlet, task, 4, 0.5), partial(iid, task, 4)):
        one = [samples(part) for part in split(0)]
        assert one == [samples(part) for part in split(0)]
        assert one != [samples(part) for part in split(1)]


@pytest.mark.parametrize("seed", range(3))
def test_large_alpha_approaches_an_even_split(seed: int) -> None:
    """A chi-square test of independence of client and class does not reject; at α = 0.5 it does, by far."""
    task = labelled(3000, 6)
    assert pvalue(table(dirichlet(task, 5, 1e8, seed))) > 0.01
    assert pvalue(table(iid(task, 5, seed))) > 0.01
    assert pvalue(table(dirichlet(task, 5, 0.5, seed))) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_small_alpha_gives_every_class_to_one_client(seed: int) -> None:
    counts = table(dirichlet(labelled(3000, 40), 5, 1e-4, seed))
    assert np.mean(counts.max(0) / counts.sum(0)) > 0.99
    assert np.mean((counts > 1).sum(1)) < 12  # 40 classes over 5 clients


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_shares_have_the_moments_of_a_dirichlet(seed: int) -> None:
    """With K clients and 200 classes, E p² = (α + 1) / (K (Kα + 1)) for each share p."""
    clients, alpha = 4, 0.5
    counts = table(dirichlet(labelled(20000, 200), clients, alpha, seed))
    shares = counts / counts.sum(0)
    expected = (alpha + 1) / (clients * (clients * alpha + 1))
    assert np.mean(shares**2) == pytest.approx(expected, rel=0.2)


def test_parts_have_names_of_their_own_and_the_head_of_the_task(clip_federation: Any) -> None:
    model = clip_federation.model
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 3, 16, 16), dtype=np.uint8)
    task = Task.from_arrays("blue", images, rng.integers(0, 3, 24), ("a", "b", "c"))
    for parts in (dirichlet(task, 11, 1.0, 0), iid(task, 11, 0)):
        assert [part.name for part in parts] == [f"blue-{i:02d}" for i in range(11)]
        assert all(torch.equal(model.head(part), model.head(task)) for part in parts)
        client = TaskClient(parts[3].name, model, parts[3])
        assert client.fit(clip_federation.anchor, 1).samples == len(parts[3])


def test_joint_tasks_keep_their_joint_head(clip_federation: Any) -> None:
    joint = clip_federation.tasks[1]
    part = dirichlet(joint, 2, 1.0, 0)[0]
    assert torch.equal(clip_federation.model.head(part), clip_federation.model.head(joint))
    assert len(part.classes) == 6


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan"), "1", True])
def test_alpha_out_of_range_is_named(alpha: Any) -> None:
    with pytest.raises(FederationError, match="alpha must be"):
        dirichlet(labelled(10, 2), 2, alpha, 0)


@pytest.mark.parametrize("option", ["clients", "minimum", "seed"])
def test_counts_out_of_range_are_named(option: str) -> None:
    options: dict[str, Any] = {"clients": 2, "alpha": 1.0, "seed": 0, "minimum": 1, option: -1}
    with pytest.raises(FederationError, match=f"{option} must be an integer"):
        dirichlet(labelled(10, 2), **options)


def test_a_task_without_labels_is_split_evenly_or_not_at_all() -> None:
    task = labelled(10, 2).without_labels()
    with pytest.raises(FederationError, match="no labels to split by"):
        dirichlet(task, 2, 1.0, 0)
    assert [len(part) for part in iid(task, 2, 0)] == [5, 5]
