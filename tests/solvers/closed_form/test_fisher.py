"""Fisher merging, EWC fusion and uncertainty matching on pools, against float64 NumPy; see test_quadratic.py, too."""

import json

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool, PoolError, operator
from mergesolve.pools.statistics import Statistics, statistics_path, write_statistics
from mergesolve.solvers import OptionError
from mergesolve.solvers.closed_form import describe_merge, make_merge, merge_weights, write_merge
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHAPES = {"a.weight": (7, 11), "a.bias": (11,), "one": (1,), "scale": (), "without": (3, 3)}
MEASURED = [name for name in SHAPES if name != "without"]


def sampled(n, dtype=torch.float32, seed=0, size=1.0):
    """(base, experts, Fishers): many Fishers are 0, some for all experts; one tensor has none."""
    rng = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in SHAPES.items()}
    experts = {
        f"e{i}": {name: (value + torch.randn(value.shape, generator=rng)).to(dtype) for name, value in base.items()}
        for i in range(n)
    }
    fishers = {
        name: {key: size * torch.randn(SHAPES[key], generator=rng).clamp_min(0) ** 2 for key in MEASURED}
        for name in experts
    }
    for table in fishers.values():
        table["a.bias"][:4] = 0
    return base, experts, fishers


def opened(n, dtype=torch.float32, **options):
    base, experts, fishers = sampled(n, dtype)
    pool = Pool.from_state_dicts(base, experts, **options)
    return pool, Statistics.from_tensors(pool, "fisher", fishers)


def arrays(base, experts, fishers):
    plain = {name: value.double().numpy() for name, value in base.items()}
    points = {name: np.stack([state[name].double().numpy() for state in experts.values()]) for name in base}
    metrics = {name: np.stack([table[name].double().numpy() for table in fishers.values()]) for name in MEASURED}
    return plain, points, metrics


def fisher(plain, points, metrics, weights, floor=0.0, ridge=0.0, normalize=False):
    weights, norms = np.array(weights), np.ones(len(weights))
    if normalize:
        flat = np.concatenate([value.reshape(len(weights), -1) for value in metrics.values()], axis=1)
        norms = np.linalg.norm(flat, axis=1)
    merged = {}
    for name, values in points.items():
        shape = (-1, *[1] * (values.ndim - 1))
        found = (np.maximum(metrics[name], floor) + ridge) / norms.reshape(shape) if name in metrics else 1 + 0 * values
        w = weights.reshape(shape)
        total = (w * found).sum(0)
        mean = (w * values).sum(0) / weights.sum()
        merged[name] = np.where(total > 0, (w * found * values).sum(0) / np.where(total > 0, total, 1), mean)
    return merged


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        assert tuple(found[name].shape) == SHAPES[name]
        np.testing.assert_allclose(found[name].numpy(), value, rtol=2e-6, atol=4e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(
    "options", [{}, {"floor": 0.5}, {"ridge": 1e-3}, {"normalize": True}, {"normalize": True, "ridge": 0.1}]
)
def test_fisher_equals_the_reference(options, n, dtype):
    pool, statistics = opened(n, dtype)
    weights = [1.0, 0.25, 2.0, 0.0, 1.0][:n]
    merge = make_merge({"name": "fisher", "weights": dict(zip(pool.names, weights, strict=True)), **options})
    same(merge_weights(pool, merge, statistics), fisher(*arrays(*sampled(n, dtype)), weights, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(("scale", "prior"), [(1.0, None), (0.3, 0.1), (2.0, 10.0), (0.2, 0.0)])
def test_uncertainty_equals_the_reference(scale, prior, n, dtype):
    """θ0 + Σ α (H0 + F) τ / (H0 + Σ α F), with F = 0 for tensors without; the mean entry of the Fishers as H0."""
    pool, statistics = opened(n, dtype)
    plain, points, metrics = arrays(*sampled(n, dtype))
    h0 = np.concatenate([value.ravel() for value in metrics.values()]).mean() if prior is None else prior
    wanted = {}
    for name, values in points.items():
        taus, found = values - plain[name], metrics.get(name, np.zeros_like(values))
        total = h0 + scale * found.sum(0)
        step = scale * ((h0 + found) * taus).sum(0) / np.where(total > 0, total, 1)
        wanted[name] = plain[name] + np.where(total > 0, step, taus.mean(0))
    merge = make_merge({"name": "uncertainty", "scale": scale, "prior": prior})
    same(merge_weights(pool, merge, statistics), wanted)


def test_tensors_without_fishers_and_entries_that_no_task_uses_are_averaged():
    pool, statistics = opened(3)
    _, points, _ = arrays(*sampled(3))
    found = merge_weights(pool, make_merge("fisher"), statistics)
    np.testing.assert_allclose(found["without"].numpy(), points["without"].mean(0), atol=1e-6)
    np.testing.assert_allclose(found["a.bias"][:4].numpy(), points["a.bias"].mean(0)[:4], atol=1e-6)


def test_one_expert_comes_back():
    pool, statistics = opened(1)
    found = merge_weights(pool, make_merge("fisher"), statistics)
    for name, value in sampled(1)[1]["e0"].items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=5e-7)


def test_normalized_fishers_do_not_depend_on_their_scale():
    base, experts, fishers = sampled(3)
    pool = Pool.from_state_dicts(base, experts)
    scaled = {
        name: {key: factor * value for key, value in table.items()}
        for factor, (name, table) in zip((1e-6, 1.0, 1e3), fishers.items(), strict=True)
    }
    merge = make_merge({"name": "fisher", "normalize": True})
    one, two = (merge_weights(pool, merge, Statistics.from_tensors(pool, "fisher", f)) for f in (fishers, scaled))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", [1e-36, 1e-20, 1e20])
def test_the_scale_of_all_fishers_does_not_matter(size):
    base, experts, fishers = sampled(3)
    pool = Pool.from_state_dicts(base, experts)
    scaled = {name: {key: size * value for key, value in table.items()} for name, table in fishers.items()}
    for name in ("fisher", "uncertainty"):
        one, two = (
            merge_weights(pool, make_merge(name), Statistics.from_tensors(pool, "fisher", f)) for f in (fishers, scaled)
        )
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-4)


def test_all_fishers_zero_give_the_average():
    base, experts, _ = sampled(3)
    pool = Pool.from_state_dicts(base, experts)
    zeros = {name: {key: torch.zeros(SHAPES[key]) for key in MEASURED} for name in experts}
    wanted = merge_weights(pool, make_merge("average"))
    for spec in ("fisher", {"name": "fisher", "normalize": True}, {"name": "uncertainty", "prior": 0.0}):
        found = merge_weights(pool, make_merge(spec), Statistics.from_tensors(pool, "fisher", zeros))
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["fisher", "uncertainty"])
@pytest.mark.parametrize("backend", ["streaming", "resident"])
@pytest.mark.parametrize("piece", [5, 64])
def test_does_not_depend_on_pieces_threads_and_backend(name, backend, piece, monkeypatch):
    pool, statistics = opened(3)
    wanted = merge_weights(pool, make_merge(name), statistics)
    monkeypatch.setattr(operator, "PIECE", piece)
    monkeypatch.setattr(operator, "gram_limit", lambda limit, n: max(1, limit // 4))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pool, statistics = opened(3, backend=backend)
        found = merge_weights(pool, make_merge(name), statistics)
    finally:
        torch.set_num_threads(before)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-6, atol=1e-6)


def test_equivariant_to_the_order_of_the_pool():
    base, experts, fishers = sampled(4)
    for name in ("fisher", "uncertainty"):
        one, two = (
            merge_weights(pool, make_merge(name), Statistics.from_tensors(pool, "fisher", fishers))
            for pool in (
                Pool.from_state_dicts(base, experts),
                Pool.from_state_dicts(base, dict(reversed(experts.items()))),
            )
        )
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=2e-6, atol=2e-6)


@pytest.fixture
def files(tmp_path):
    """A pool of files with their statistics beside them."""
    base, experts, fishers = sampled(3)
    for name, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = {name: tmp_path / f"{name}.safetensors" for name in experts}
    for name, path in paths.items():
        write_statistics(statistics_path(path, "fisher"), "fisher", fishers[name], {"task": name}, expert=path)
    return lambda *names, **options: Pool.open(
        base=tmp_path / "base.safetensors", experts={name: paths[name] for name in names or paths}, **options
    )


@pytest.mark.parametrize("name", ["fisher", "uncertainty"])
@pytest.mark.parametrize("backend", ["streaming", "resident"])
def test_from_files_to_a_file(name, backend, files, tmp_path):
    pool = files(backend=backend)
    merge = make_merge({"name": name, "weights": {"e1": 2.0}})
    (path,) = write_merge(pool, merge, tmp_path / "merged.safetensors", statistics=Statistics.open(pool, "fisher"))
    memory, statistics = opened(3)
    wanted = merge_weights(memory, merge, statistics)
    found = load_file(path)
    assert set(found) == set(SHAPES)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)
    with safe_open(path, "pt") as file:
        assert make_merge(json.loads(file.metadata()["merge"])) == merge


def test_ewc_takes_two(files, tmp_path):
    three, two = files(), files("e0", "e2")
    with pytest.raises(OptionError, match=r"exactly 2 experts.*the pool has 3: e0, e1, e2"):
        write_merge(
            three, make_merge("ewc"), tmp_path / "merged.safetensors", statistics=Statistics.open(three, "fisher")
        )
    assert not (tmp_path / "merged.safetensors").exists()
    statistics = Statistics.open(two, "fisher")
    found = merge_weights(two, make_merge("ewc"), statistics)
    wanted = merge_weights(two, make_merge("fisher"), statistics)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["fisher", "ewc", "uncertainty"])
def test_statistics_that_are_not_there_or_of_others(name, files, tmp_path):
    pool = files("e0", "e1")
    with pytest.raises(OptionError, match=r"needs fisher statistics.*mergesolve stats --kind fisher"):
        merge_weights(pool, make_merge(name))
    (tmp_path / "e1.fisher.safetensors").rename(tmp_path / "e0.fisher.safetensors")
    with pytest.raises(PoolError, match="does not belong to expert 'e0'"):
        Statistics.open(pool, "fisher")
    (tmp_path / "e0.fisher.safetensors").unlink()
    with pytest.raises(PoolError, match="expert 'e0' has no fisher statistics"):
        Statistics.open(pool, "fisher")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "fisher", "floor": -1.0}, "'floor'"),
        ({"name": "fisher", "ridge": float("nan")}, "'ridge'"),
        ({"name": "fisher", "weights": {"e0": -0.5}}, "must not be negative"),
        ({"name": "uncertainty", "prior": -1.0}, "'prior'"),
        ({"name": "uncertainty", "scale": 0.0}, "'scale'"),
        ({"name": "uncertainty", "weights": [1.0]}, "'weights'"),
    ],
)
def test_bad_options_are_named(spec, message):
    with pytest.raises(OptionError, match=message):
        make_merge(spec)


@pytest.mark.parametrize("name", ["fisher", "ewc", "uncertainty"])
def test_options_survive_json(name):
    merge = make_merge({"name": name, "weights": {"e0": 0.5}})
    assert make_merge(json.loads(json.dumps(describe_merge(merge)))) == merge
    assert describe_merge(merge)["name"] == name
