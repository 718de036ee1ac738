"""Checks that every registered transform passes by being listed, and what each one is by a plain second definition."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from mergesolve.pools import Pool, PoolError, operator
from mergesolve.pools.transforms import TRANSFORMS, make_transform
from mergesolve.solvers import Problem, solve
from safetensors.torch import save_file

SHAPES = {"a.weight": (6, 50), "a.bias": (50,), "conv": (3, 2, 2, 2), "one": (1,), "scale": ()}
N = 3
SPECS = [
    {"name": "trim"},
    {"name": "trim", "density": 0.4, "per": "model"},
    {"name": "trim", "densities": {"e1": 0.7}},
    {"name": "dare", "density": 0.5},
    {"name": "dare", "density": 0.3, "rescale": "l1", "seed": 4},
    {"name": "dare", "rescale": "none"},
    {"name": "della"},
    {"name": "della", "window": "symmetric", "rescale": "l1"},
    {"name": "breadcrumbs", "density": 0.5, "top": 0.1},
    {"name": "elect"},
    {"name": "consensus", "tall": 0.6},
    {"name": "mask"},
]


@pytest.fixture(scope="module")
def states():
    generator = torch.manual_seed(2)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    experts = {
        f"e{i}": {name: value + torch.randn(value.shape, generator=generator) / 4 for name, value in base.items()}
        for i in range(N)
    }
    return base, experts


@pytest.fixture(params=["streaming", "resident"])
def pool(request, states):
    return Pool.from_state_dicts(*states, backend=request.param)


@pytest.fixture(scope="module")
def mask(states, tmp_path_factory):
    generator = torch.manual_seed(3)
    tensors = {name: 2 * torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    save_file(tensors, path)
    return str(path), tensors


@pytest.fixture(params=SPECS, ids=str)
def spec(request, mask):
    return {**request.param, "path": mask[0]} if request.param["name"] == "mask" else request.param


def vectors(pool):
    """Every expert's task vectors: {tensor: [n, *shape]}."""
    rows = [pool.displacement(np.eye(pool.n)[i : i + 1], pool.blocks("model")) for i in range(pool.n)]
    return {name: torch.stack([row[name] for row in rows]).double().numpy() for name in pool.tensors}


def test_every_transform_is_tried():
    assert {spec["name"] for spec in SPECS} == set(TRANSFORMS)


@pytest.mark.parametrize("blocks", ["model", "layer", "row"])
def test_combine_and_correlate_are_adjoint(spec, blocks, pool):
    """⟨combine(Λ) − θ0, G⟩ = ⟨Λ, correlate(G)⟩ on the transformed pool."""
    changed = pool.transform(make_transform(spec))
    rows = changed.blocks(blocks)
    rng = np.random.default_rng(0)
    coefficients = rng.normal(size=(rows.count, N))
    gradient = {name: torch.from_numpy(rng.normal(size=shape)).float() for name, shape in changed.tensors.items()}
    moved, base = changed.combine(coefficients, rows), changed.base_weights()
    left = sum(float(((moved[name] - base[name]).double() * gradient[name].double()).sum()) for name in moved)
    right = float((coefficients * changed.correlate(gradient, rows)).sum())
    assert left == pytest.approx(right, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("piece", [7, 64])
def test_does_not_depend_on_pieces_and_backend(spec, piece, states, monkeypatch):
    wanted = vectors(Pool.from_state_dicts(*states, backend="streaming").transform(make_transform(spec)))
    monkeypatch.setattr(operator, "PIECE", piece)
    for backend in ("streaming", "resident"):
        found = vectors(Pool.from_state_dicts(*states, backend=backend).transform(make_transform(spec)))
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("name", [name for name, entry in TRANSFORMS.items() if entry.load().joint])
def test_pieces_shrink_with_the_number_of_experts_that_are_compared(name, monkeypatch):
    """So that what is held does not grow with it, in subsets of the transformed pool, too."""
    base = {"w": torch.randn(100_000, generator=torch.manual_seed(0))}
    experts = {f"e{i}": {"w": base["w"] + 0.1 * i} for i in range(1, 41)}
    pool = Pool.from_state_dicts(base, experts, backend="streaming")
    transform = make_transform(name)
    seen = []

    def prepare(self, source, workers, names):
        def apply(name, start, base, deltas, chosen):
            seen.append(deltas.numel())
            return deltas * 1

        return apply

    monkeypatch.setattr(type(transform), "prepare", prepare)
    for changed in (pool.transform(transform), pool.transform(transform).subset(["e3", "e4"])):
        changed.combine(np.full((1, changed.n), 0.1), changed.blocks("model"))
        changed.gram(changed.blocks("model"))
    assert seen
    assert max(seen) <= 4 * operator.PIECE


def test_nothing_is_read_until_it_is_used(spec, states, tmp_path):
    base, experts = states
    for name, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    pool = Pool.open(
        base=tmp_path / "base.safetensors",
        experts={name: tmp_path / f"{name}.safetensors" for name in experts},
        backend="streaming",
    )
    changed = pool.transform(make_transform(spec))
    assert (pool.bytes_read, changed.bytes_read) == (0, 0)
    assert changed.names == pool.names
    vectors(changed)
    assert changed.bytes_read > 0


def test_enters_the_fingerprint_with_every_option(spec, pool):
    transform = make_transform(spec)
    changed = pool.transform(transform)
    assert changed.transforms == (transform.label,)
    assert changed.fingerprint == pool.transform(make_transform(spec)).fingerprint
    assert changed.fingerprint != pool.fingerprint
    others = {"density": 0.45, "seed": 9, "tall": 0.9, "agree": 3, "scale": 0.5, "top": 0.2, "epsilon": 0.1}
    for field in dataclasses.fields(transform):
        if field.name in others:
            other = dataclasses.replace(transform, **{field.name: others[field.name]})
            assert pool.transform(other).fingerprint != changed.fingerprint


def test_a_solver_runs_on_it(spec, pool):
    """Frank-Wolfe towards a point of the transformed pool finds it."""
    changed = pool.transform(make_transform(spec))
    target = changed.combine(np.array([[0.2, 0.3, 0.5]]), changed.blocks("model"))
    result = solve(
        Problem(changed, Distance(target), "model", "capped"), {"name": "frank-wolfe"}, max_iter=300, tol=1e-6
    )
    assert result.objective <= 1e-5


class Distance:
    """½ ‖θ − target‖²."""

    tasks = ("distance",)
    task_weights = np.ones(1)
    stochastic = False
    data_used = {"labelled": 0, "unlabelled": 0, "test_inputs": False, "samples_seen": 0}  # noqa: RUF012

    def __init__(self, target):
        self.target = target

    def describe(self):
        return {"name": "distance"}

    def draw(self, iteration):
        pass

    def value(self, weights):
        return sum(0.5 * float(((w - self.target[k]).double() ** 2).sum()) for k, w in weights.items())

    def value_and_grad(self, weights, *, per_task=False):
        gradient = {k: w - self.target[k] for k, w in weights.items()}
        loss = self.value(weights)
        return Evaluation(loss, {"distance": loss}, [gradient] if per_task else gradient)


@dataclasses.dataclass
class Evaluation:
    loss: float
    task_losses: dict
    gradient: object


# What they are


@pytest.fixture
def plain(states):
    return vectors(Pool.from_state_dicts(*states))


def transformed(states, **spec):
    return vectors(Pool.from_state_dicts(*states).transform(make_transform(spec)))


def test_trim_keeps_exactly_so_many_of_each_tensor_with_ties():
    """Task vectors of three magnitudes: of those at the cut, the first are kept."""
    values = np.array([1, -2, 2, 1, -1, 2, 3, 1, -1, 1], dtype=np.float32)
    pool = Pool.from_state_dicts({"w": torch.zeros(10)}, {"e": {"w": torch.from_numpy(values)}})
    for density, kept in [(0.1, [6]), (0.3, [1, 2, 6]), (0.5, [0, 1, 2, 5, 6]), (0.6, [0, 1, 2, 3, 5, 6])]:
        found = vectors(pool.transform(make_transform({"name": "trim", "density": density})))["w"][0]
        np.testing.assert_array_equal(np.flatnonzero(found), kept)
        np.testing.assert_array_equal(found[kept], values[kept])


def test_densities_of_single_experts_by_name(states, plain):
    found = transformed(states, name="trim", density=0.1, densities={"e1": 0.5, "e2": 1.0})
    for name, rows in found.items():
        size = rows[0].size
        assert [np.count_nonzero(row) for row in rows] == [max(1, int(0.1 * size)), max(1, int(0.5 * size)), size]
        np.testing.assert_array_equal(rows[2], plain[name][2])


def test_dare_rescales_what_it_keeps(states, plain):
    found = transformed(states, name="dare", density=0.25)
    for name, rows in found.items():
        kept = rows != 0
        np.testing.assert_allclose(rows[kept], 4 * plain[name][kept], rtol=1e-6)
    norms = transformed(states, name="dare", density=0.25, rescale="l1")
    for name, rows in norms.items():
        for row, original in zip(rows, plain[name], strict=True):
            if row.any():
                assert np.abs(row).sum() == pytest.approx(np.abs(original).sum(), rel=1e-5)
    bare = transformed(states, name="dare", density=0.25, rescale="none")
    for name, rows in bare.items():
        assert np.isin(rows[rows != 0], plain[name]).all()
        np.testing.assert_array_equal(rows != 0, found[name] != 0)


def test_della_keeps_large_entries_more_often(states, plain):
    found = [transformed(states, name="della", density=0.5, epsilon=0.8, seed=seed)["a.weight"] for seed in range(40)]
    order = np.abs(plain["a.weight"]).argsort(2).argsort(2)
    kept = np.mean([value != 0 for value in found], axis=0)
    assert kept[order < 10].mean() < 0.3 < 0.7 < kept[order >= 40].mean()
    chances = 0.5 - 0.4 + 0.8 * (order + 1) / 50
    for value in found[:3]:
        np.testing.assert_allclose(value, np.where(value != 0, plain["a.weight"] / chances, 0), rtol=1e-5)


def test_breadcrumbs_keeps_a_band_of_magnitudes(states, plain):
    found = transformed(states, name="breadcrumbs", density=0.5, top=0.1)
    for name, rows in found.items():
        size = rows[0].size
        for row, original in zip(rows, plain[name], strict=True):
            order = np.argsort(-np.abs(original).ravel(), kind="stable")
            band = order[int(0.1 * size) : int(0.1 * size) + int(0.5 * size)]
            np.testing.assert_array_equal(np.flatnonzero(row), np.sort(band))


def test_elect_keeps_the_sign_of_the_sum(states, plain):
    for name, rows in transformed(states, name="elect").items():
        sign = np.sign(plain[name].sum(0))
        np.testing.assert_array_equal(rows, np.where(np.sign(plain[name]) == sign, plain[name], 0))


def test_trim_then_elect_then_the_disjoint_mean_is_ties(states):
    """A pool after `trim` and `elect`, divided entry by entry by how many are left, is what TIES merges."""
    from mergesolve.solvers.closed_form import make_merge, merge_weights

    pool = Pool.from_state_dicts(*states)
    spec = {"name": "trim", "density": 0.4, "per": "model"}
    left = vectors(pool.transform(make_transform(spec)).transform(make_transform("elect")))
    found = merge_weights(pool, make_merge({"name": "ties", "density": 0.4, "scale": 1.0}))
    for name, rows in left.items():
        mean = rows.sum(0) / np.maximum(1, (rows != 0).sum(0))
        np.testing.assert_allclose(found[name] - states[0][name], mean, atol=1e-6)


def test_consensus_keeps_what_enough_experts_need(states, plain):
    for name, rows in transformed(states, name="consensus", tall=0.5, agree=2).items():
        total = plain[name].sum(0)
        active = (np.abs(plain[name]) >= 0.5 * np.abs(total - plain[name])).sum(0)
        np.testing.assert_array_equal(rows, np.where(active >= 2, plain[name], 0))


def test_transforms_are_applied_in_order(states):
    """Electing after trimming is not trimming after electing, and both are in the lineage."""
    pool = Pool.from_state_dicts(*states)
    trim, elect = make_transform({"name": "trim", "density": 0.3}), make_transform("elect")
    one, other = pool.transform(trim).transform(elect), pool.transform(elect).transform(trim)
    assert one.transforms == (trim.label, elect.label)
    assert one.fingerprint != other.fingerprint
    first, second = vectors(one)["a.weight"], vectors(other)["a.weight"]
    assert np.count_nonzero(first) < np.count_nonzero(second)


def test_a_subset_of_a_pool_is_transformed_by_name(states):
    """Masks are drawn for names: the same in a subset. What compares experts compares those of the subset."""
    pool = Pool.from_state_dicts(*states)
    dare = make_transform({"name": "dare", "density": 0.5})
    whole, part = vectors(pool.transform(dare)), vectors(pool.subset(["e2", "e0"]).transform(dare))
    after = vectors(pool.transform(dare).subset(["e2", "e0"]))
    for name, rows in whole.items():
        np.testing.assert_array_equal(part[name], rows[[2, 0]])
        np.testing.assert_array_equal(after[name], rows[[2, 0]])
    pair = vectors(pool.subset(["e0", "e1"]).transform(make_transform("elect")))
    mine = vectors(pool.subset(["e0", "e1"]))
    for name, rows in pair.items():
        np.testing.assert_array_equal(rows, np.where(np.sign(mine[name]) == np.sign(mine[name].sum(0)), mine[name], 0))


# Mistakes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("trimm", "unknown transform 'trimm'.*trim"),
        ({"density": 0.5}, "unknown transform None"),
        ({"name": "trim", "densty": 0.5}, "no option 'densty'.*density"),
        ({"name": "trim", "density": 0}, r"'density' parameter of Trim must be a number in \(0, 1\]. Got 0"),
        ({"name": "trim", "density": 1.5}, "Got 1.5"),
        ({"name": "trim", "density": -0.1}, "Got -0.1"),
        ({"name": "trim", "density": True}, "Got True"),
        ({"name": "trim", "per": "layer"}, "'per' parameter of Trim must be one of 'tensor', 'model'. Got 'layer'"),
        ({"name": "trim", "densities": {"e0": 2.0}}, "'densities' parameter of Trim"),
        ({"name": "trim", "densities": {"e0": True}}, "'densities' parameter of Trim"),
        ({"name": "trim", "densities": {"e0": float("nan")}}, "'densities' parameter of Trim"),
        ({"name": "dare", "seed": -1}, "'seed' parameter of Dare must be an integer of at least 0. Got -1"),
        ({"name": "dare", "rescale": "l2"}, "'rescale' parameter of Dare"),
        ({"name": "della", "density": 0.05}, "must leave probabilities in"),
        ({"name": "della", "epsilon": -0.1}, "'epsilon' parameter of Della"),
        ({"name": "breadcrumbs", "top": 1.5}, "'top' parameter of Breadcrumbs"),
        ({"name": "consensus", "agree": 0}, "'agree' parameter of Consensus"),
        ({"name": "consensus", "tall": 0}, "'tall' parameter of Consensus"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(PoolError, match=message):
        make_transform(spec)


def test_a_density_of_an_expert_that_is_not_there(states):
    pool = Pool.from_state_dicts(*states).transform(make_transform({"name": "trim", "densities": {"e9": 0.5}}))
    with pytest.raises(PoolError, match="there is a density for 'e9', which is no expert"):
        vectors(pool)


def test_a_mask_multiplies_every_expert_by_the_same_tensors_of_its_file(states, plain, mask, tmp_path):
    path, tensors = mask
    found = transformed(states, name="mask", path=path)
    for name, values in plain.items():
        np.testing.assert_allclose(found[name], values * tensors[name].double().numpy(), rtol=1e-6)
    shutil.copy(path, tmp_path / "copy.safetensors")
    assert (
        make_transform({"name": "mask", "path": str(tmp_path / "copy.safetensors")}).label
        == make_transform({"name": "mask", "path": path}).label
    )
    save_file({**tensors, "one": 2 * tensors["one"]}, tmp_path / "other.safetensors")
    assert (
        make_transform({"name": "mask", "path": str(tmp_path / "other.safetensors")}).label
        != make_transform({"name": "mask", "path": path}).label
    )


def test_a_mask_that_does_not_fit_the_pool_is_refused(states, mask, tmp_path):
    tensors = mask[1]
    save_file({name: value for name, value in tensors.items() if name != "conv"}, tmp_path / "less.safetensors")
    with pytest.raises(PoolError, match=r"the mask '.*less.safetensors' lacks 'conv'; it has .*every merged tensor"):
        transformed(states, name="mask", path=str(tmp_path / "less.safetensors"))
    save_file({**tensors, "conv": torch.ones(3, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(PoolError, match=r"'conv' has shape \[3, 2\] in the mask .* and \[3, 2, 2, 2\] in the pool"):
        transformed(states, name="mask", path=str(tmp_path / "other.safetensors"))
    with pytest.raises(PoolError, match=r"The 'path' parameter of Mask must be the path of a checkpoint. Got 3"):
        make_transform({"name": "mask", "path": 3})
