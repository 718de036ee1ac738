"""RegMean and MaTS on pools and on linear models, against least squares on the data; see test_quadratic.py, too."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool, PoolError
from mergesolve.pools.statistics import Statistics, statistics_path, write_statistics
from mergesolve.solvers import OptionError
from mergesolve.solvers.closed_form import describe_merge, make_merge, merge_weights, plan, write_merge
from safetensors.torch import load_file, save_file

D, OUT = 9, 4
SHAPES = {"linear.weight": (OUT, D), "linear.bias": (OUT,), "proj": (D, OUT), "conv": (OUT, 3, 3, 1), "one": (1, 1)}
AXES = {"linear.weight": 1, "proj": 0, "conv": 1, "one": 1}


class Linears:
    """Experts that are linear maps, each with inputs of its own: {map: X [D, samples]}."""

    def __init__(self, n=3, samples=25, seed=0, dtype=torch.float32):
        rng = np.random.default_rng([seed, n])
        self.base = {name: torch.from_numpy(rng.normal(size=shape)).to(dtype) for name, shape in SHAPES.items()}
        self.experts = {
            f"e{i}": {name: torch.from_numpy(rng.normal(size=shape)).to(dtype) for name, shape in SHAPES.items()}
            for i in range(n)
        }
        self.inputs = {
            name: {key: rng.normal(size=(1 if key == "one" else D, samples)) for key in AXES} for name in self.experts
        }
        self.pool = Pool.from_state_dicts(self.base, self.experts)

    def grams(self, pool=None):
        tensors = {
            name: {key: torch.from_numpy(x @ x.T / x.shape[1]).float() for key, x in table.items()}
            for name, table in self.inputs.items()
        }
        return Statistics.from_tensors(pool or self.pool, "gram", tensors, axes=AXES)

    def matrix(self, state, key):
        """The map out × d of a tensor."""
        value = state[key].double().numpy()
        return value.T if AXES[key] == 0 else value.reshape(len(value), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("name", ["regmean", "mats"])
def test_exact_for_linear_maps(name, n, dtype):
    """The merged map is the least-squares fit, on all data together, of what each expert answers on its own."""
    world = Linears(n, dtype=dtype)
    options = {"shrink": 1.0} | ({"tol": 1e-12, "iterations": 200} if name == "mats" else {})
    found = merge_weights(world.pool, make_merge({"name": name, **options}), world.grams())
    for key in AXES:
        inputs = np.hstack([world.inputs[expert][key] for expert in world.experts])
        outputs = np.hstack([world.matrix(s, key) @ world.inputs[e][key] for e, s in world.experts.items()])
        wanted = np.linalg.lstsq(inputs.T, outputs.T, rcond=None)[0].T
        np.testing.assert_allclose(world.matrix(found, key), wanted, rtol=1e-4, atol=1e-4, err_msg=key)
    mean = np.mean([state["linear.bias"].double().numpy() for state in world.experts.values()], axis=0)
    np.testing.assert_allclose(found["linear.bias"].numpy(), mean, atol=1e-6)


@pytest.mark.parametrize("name", ["regmean", "mats"])
def test_tasks_on_subspaces_of_their_own_keep_their_outputs(name):
    """Where the inputs of the tasks together are a basis, every task's outputs are those of its expert."""
    world = Linears(3, seed=1)
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(D, D)))[0]
    for i, table in enumerate(world.inputs.values()):
        for key in ("linear.weight", "proj", "conv"):
            table[key] = directions[:, 3 * i : 3 * i + 3] @ rng.normal(size=(3, 40))
    found = merge_weights(world.pool, make_merge({"name": name, "shrink": 1.0}), world.grams())
    for expert, state in world.experts.items():
        for key in ("linear.weight", "proj", "conv"):
            x = world.inputs[expert][key]
            np.testing.assert_allclose(world.matrix(found, key) @ x, world.matrix(state, key) @ x, atol=2e-4)


def test_without_off_diagonals_every_input_is_weighed_by_its_power():
    world = Linears(3)
    found = merge_weights(world.pool, make_merge({"name": "regmean", "shrink": 0.0}), world.grams())
    for key in AXES:
        powers = np.stack([(world.inputs[expert][key] ** 2).mean(1) for expert in world.experts])
        maps = np.stack([world.matrix(state, key) for state in world.experts.values()])
        wanted = (powers[:, None] * maps).sum(0) / powers.sum(0)
        np.testing.assert_allclose(world.matrix(found, key), wanted, atol=1e-5)


def test_the_default_shrinks_as_the_paper():
    world = Linears(2, samples=3)  # fewer samples than inputs: singular unless shrunk
    found = merge_weights(world.pool, make_merge("regmean"), world.grams())
    for key in ("linear.weight", "proj", "conv"):
        grams = [x @ x.T / x.shape[1] for x in (world.inputs[expert][key] for expert in world.experts)]
        grams = [gram * (0.9 + 0.1 * np.eye(D)) for gram in grams]
        right = sum(world.matrix(s, key) @ g for s, g in zip(world.experts.values(), grams, strict=True))
        np.testing.assert_allclose(world.matrix(found, key), right @ np.linalg.inv(sum(grams)), rtol=1e-4, atol=1e-4)
    with pytest.raises(OptionError, match=r"Grams of '\w.*' are singular"):
        merge_weights(world.pool, make_merge({"name": "regmean", "shrink": 1.0}), world.grams())


def test_mats_on_singular_grams_moves_only_where_the_data_are():
    world = Linears(2, samples=3, seed=2)
    for start in ("average", "base"):
        merge = make_merge({"name": "mats", "start": start, "iterations": 200})
        found = merge_weights(world.pool, merge, world.grams())
        maps = [world.matrix(state, "conv") for state in world.experts.values()]
        origin = np.mean(maps, axis=0) if start == "average" else world.matrix(world.base, "conv")
        inputs = np.hstack([world.inputs[expert]["conv"] for expert in world.experts])
        outputs = np.hstack([m @ world.inputs[e]["conv"] for m, e in zip(maps, world.experts, strict=True)])
        nearest = origin + (outputs - origin @ inputs) @ np.linalg.pinv(inputs)
        np.testing.assert_allclose(world.matrix(found, "conv"), nearest, atol=1e-4)


def test_mats_without_iterations_is_its_start_and_each_iteration_helps():
    world = Linears(3, seed=3)
    grams = world.grams()

    def merged(**options):
        return merge_weights(world.pool, make_merge({"name": "mats", "tol": 0, **options}), grams)

    average = merge_weights(world.pool, make_merge("average"))
    for key in ("linear.weight", "proj", "conv"):
        torch.testing.assert_close(merged(iterations=0)[key], average[key], rtol=1e-6, atol=1e-6)
        assert torch.equal(merged(iterations=0, start="base")[key], world.base[key])

    def error(found):
        return sum(
            np.sum((world.matrix(found, key) @ x - world.matrix(world.experts[expert], key) @ x) ** 2)
            for expert, table in world.inputs.items()
            for key, x in table.items()
        )

    errors = [error(merged(iterations=k, start="base")) for k in range(6)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_weights_count_like_repeated_experts():
    world = Linears(2, seed=4)
    twice = Pool.from_state_dicts(world.base, {**world.experts, "again": world.experts["e1"]})
    inputs = {**world.inputs, "again": world.inputs["e1"]}
    table = {name: {k: torch.from_numpy(x @ x.T / x.shape[1]) for k, x in t.items()} for name, t in inputs.items()}
    grams = Statistics.from_tensors(twice, "gram", table, axes=AXES)
    for name in ("regmean", "mats"):
        one = merge_weights(world.pool, make_merge({"name": name, "weights": {"e1": 2.0}}), world.grams())
        two = merge_weights(twice, make_merge(name), grams)
        for key in one:
            torch.testing.assert_close(one[key], two[key], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["regmean", "mats"])
@pytest.mark.parametrize("backend", ["streaming", "resident"])
def test_from_files_to_a_file(name, backend, tmp_path):
    world = Linears(3, seed=5)
    for key, state in {"base": world.base, **world.experts}.items():
        save_file(state, tmp_path / f"{key}.safetensors")
    paths = {key: tmp_path / f"{key}.safetensors" for key in world.experts}
    for key, path in paths.items():
        tensors = {k: torch.from_numpy(x @ x.T / x.shape[1]).float() for k, x in world.inputs[key].items()}
        metadata = {"axes": json.dumps(AXES), "task": key}
        write_statistics(statistics_path(path, "gram"), "gram", tensors, metadata, expert=path)
    pool = Pool.open(base=tmp_path / "base.safetensors", experts=paths, backend=backend)
    merge = make_merge({"name": name, "weights": {"e1": 2.0}})
    assert len(pool.tensors) == len(SHAPES)
    assert pool.fingerprint  # it samples the files, once
    before = pool.bytes_read
    (path,) = write_merge(pool, merge, tmp_path / "merged.safetensors", statistics=Statistics.open(pool, "gram"))
    if backend == "streaming":
        assert pool.bytes_read - before <= plan(pool, merge).bytes_read + 2 * pool.n * 4 * OUT * D * 3
    wanted = merge_weights(world.pool, merge, world.grams())
    for key, value in load_file(path).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-6, atol=1e-6)


def test_grams_of_the_wrong_size_and_missing_ones(tmp_path):
    world = Linears(2)
    tensors = {name: {"linear.weight": torch.eye(OUT)} for name in world.experts}
    with pytest.raises(PoolError, match=r"Gram of the wrong size.*'linear\.weight'.*expected floats \[9, 9\]"):
        Statistics.from_tensors(world.pool, "gram", tensors, axes=AXES)
    for name in ("regmean", "mats"):
        with pytest.raises(OptionError, match=r"needs gram statistics.*mergesolve stats --kind gram"):
            write_merge(world.pool, make_merge(name), tmp_path / "merged.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_some_tensors_take_another_merge():
    """Statistics are found by name, whichever tensors are left to the method."""
    world = Linears(2, seed=7)
    overrides = [("conv", make_merge("average")), ("proj", make_merge({"name": "regmean", "shrink": 0.5}))]
    found = merge_weights(world.pool, make_merge("regmean"), world.grams(), overrides=overrides)
    for key in SHAPES:
        spec = {"conv": "average", "proj": {"name": "regmean", "shrink": 0.5}}.get(key, "regmean")
        alone = merge_weights(world.pool, make_merge(spec), world.grams())
        torch.testing.assert_close(found[key], alone[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["regmean", "mats"])
def test_equivariant_to_the_order_of_the_pool(name):
    world = Linears(4, seed=6)
    turned = Pool.from_state_dicts(world.base, dict(reversed(world.experts.items())))
    one = merge_weights(world.pool, make_merge(name), world.grams())
    two = merge_weights(turned, make_merge(name), world.grams(turned))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "regmean", "shrink": 1.1}, "'shrink'"),
        ({"name": "regmean", "ridge": -1}, "'ridge'"),
        ({"name": "regmean", "weights": {"e0": -1.0}}, "must not be negative"),
        ({"name": "mats", "start": "zero"}, "'start'"),
        ({"name": "mats", "iterations": 1.5}, "'iterations'"),
        ({"name": "mats", "tol": 2}, "'tol'"),
    ],
)
def test_bad_options_are_named(spec, message):
    with pytest.raises(OptionError, match=message):
        make_merge(spec)


@pytest.mark.parametrize("name", ["regmean", "mats"])
def test_options_survive_json(name):
    merge = make_merge({"name": name, "weights": {"e0": 0.5}})
    assert make_merge(json.loads(json.dumps(describe_merge(merge)))) == merge
