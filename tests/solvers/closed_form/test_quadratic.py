"""The quadratic family: identities in float64, and the merge against NumPy and brute force."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergesolve.pools import Pool, operator
from mergesolve.pools.statistics import Statistics
from mergesolve.solvers import OptionError
from mergesolve.solvers.closed_form import make_merge, merge_weights, plan, write_merge
from mergesolve.solvers.closed_form.quadratic import GramSystem, Moments, as_rows, diagonal, from_rows
from mergesolve.solvers.domains import Box, Capped, Free, Simplex
from safetensors.torch import load_file, save_file

SHAPES = {
    "blocks.0.conv": (4, 3, 2, 2),
    "blocks.0.weight": (6, 5),
    "blocks.0.bias": (6,),
    "blocks.1.proj": (5, 7),
    "blocks.1.one": (1,),
    "scale": (),
}
AXES = {"blocks.0.conv": 1, "blocks.0.weight": 1, "blocks.1.proj": 0}
INPUTS = {"blocks.0.conv": 12, "blocks.0.weight": 5, "blocks.1.proj": 5}
EXACT = 1e-10


class Part:
    """A whole tensor as a rule sees it, in float64."""

    def __init__(self, name, base, taus, statistics, kind):
        self.name, self.shape = name, tuple(base.shape)
        self.start, self.stop, self.size = 0, base.numel(), base.numel()
        self.n, self.base, self._taus = len(taus), base.reshape(-1), taus.reshape(len(taus), -1)
        self.statistics = None if kind is None else SimpleNamespace(kind=kind)
        self._statistics = statistics
        self.axis = AXES.get(name) if kind == "gram" else None

    def stack(self):
        return self._taus.clone()

    def task_vector(self, expert):
        return self._taus[expert].clone()

    def statistic(self, expert):
        if self._statistics is None:
            return None
        found = self._statistics[expert]
        return found.reshape(-1) if self.statistics.kind == "fisher" else found


class World:
    """Random experts with Fishers (with zeros) and Grams, in float64; and the same as a float32 pool."""

    def __init__(self, n=3, seed=0, dtype=torch.float32, samples=30):
        rng = torch.Generator().manual_seed(1000 * seed + n)

        def normal(*shape):
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        self.n, self.names = n, [f"e{i}" for i in range(n)]
        self.base = {name: normal(*shape) for name, shape in SHAPES.items()}
        self.taus = {name: normal(n, *shape) for name, shape in SHAPES.items()}
        self.fishers = {name: normal(n, *shape).clamp_min(0) ** 2 for name, shape in SHAPES.items()}
        inputs = {name: normal(n, d, samples) for name, d in INPUTS.items()}
        self.grams = {name: x @ x.transpose(1, 2) / samples for name, x in inputs.items()}
        self.pool = self.opened(dtype)

    def states(self, dtype=torch.float32):
        base = {name: value.to(dtype) for name, value in self.base.items()}
        return base, {
            expert: {name: (self.base[name] + self.taus[name][i]).to(dtype) for name in SHAPES}
            for i, expert in enumerate(self.names)
        }

    def opened(self, dtype=torch.float32, **options):
        return Pool.from_state_dicts(*self.states(dtype), **options)

    def statistics(self, kind, pool=None):
        tables = self.fishers if kind == "fisher" else self.grams
        tensors = {
            expert: {name: table[i].float() for name, table in tables.items()} for i, expert in enumerate(self.names)
        }
        return Statistics.from_tensors(pool or self.pool, kind, tensors, axes=AXES)

    def parts(self, kind=None):
        tables = {"fisher": self.fishers, "gram": self.grams, None: {}}[kind]
        return [Part(name, self.base[name], self.taus[name], tables.get(name), kind) for name in SHAPES]

    def run(self, name, **options):
        """Merge in float64: the rule that the merge prepares for the pool, on float64 tensors."""
        merge = make_merge({"name": name, **options})
        kind = merge.statistics
        rule = merge.prepare(self.pool, None if kind is None else self.statistics(kind))
        merged = {part.name: rule(part).reshape(part.shape) for part in self.parts(kind)}
        assert all(value.dtype == torch.float64 for value in merged.values())
        return merged

    def point(self, name, **options):
        """Merge in float64 with the coefficients of a linear merge."""
        matrix, blocks = make_merge({"name": name, **options}).coefficients(self.pool)
        assert blocks.count == 1
        weights = torch.from_numpy(matrix[0])
        return {key: self.base[key] + torch.tensordot(weights, self.taus[key], 1) for key in SHAPES}

    def objective(self, merged, kind, weights, anchor=0.0, ridge=0.0, shrink=1.0):
        """The family's objective, from its definition."""
        total = torch.zeros((), dtype=torch.float64)
        for name in SHAPES:
            delta = merged[name] - self.base[name]
            total = total + anchor * (delta * delta).sum()
            for i, weight in enumerate(weights):
                error = delta - self.taus[name][i]
                if kind == "fisher":
                    total = total + weight * (error * (self.fishers[name][i] + ridge) * error).sum()
                elif kind == "gram" and name in AXES:
                    gram = self.grams[name][i]
                    d = len(gram)
                    eye = torch.eye(d, dtype=torch.float64)
                    metric = shrink * gram + (1 - shrink) * gram * eye + ridge * eye
                    error = error.reshape(-1, d) if AXES[name] == 1 else error.reshape(d, -1).T
                    total = total + weight * torch.trace(error @ metric @ error.T)
                else:
                    total = total + weight * (error * error).sum()
        return total


def close(found, wanted, atol=EXACT):
    assert set(found) == set(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=atol, msg=name)


@pytest.fixture(scope="module")
def world():
    return World()


# Members of the family


def test_average_is_a_point(world):
    close(world.run("quadratic"), world.point("average"))


def test_weighted_average_is_a_point(world):
    weights = {"e0": 0.3, "e1": 2.0, "e2": 0.0}
    close(world.run("quadratic", weights=weights), world.point("average", weights=weights))


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1 / 3])
def test_paint_is_a_point(world, alpha):
    """μ = 1/α − n; task arithmetic at α is the same point."""
    found = world.run("quadratic", anchor=max(0.0, 1 / alpha - world.n))
    close(found, world.point("paint", alpha=alpha))
    close(found, world.point("task-arithmetic", scale=alpha))


def test_paint_with_weights_is_a_point(world):
    """w = α and μ = 1 − Σ α, the weight of the base."""
    alphas = {"e0": 0.1, "e1": 0.4, "e2": 0.25}
    close(world.run("quadratic", weights=alphas, anchor=0.25), world.point("paint", weights=alphas))


def test_metagpt_is_a_point():
    """w_t = ‖τ_t‖²: on a grid, where the float32 sums of the pool are exact."""
    rng = np.random.default_rng(3)
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    taus = {
        name: rng.integers(-8, 9, (4, *shape)) / 8 * np.arange(1, 5).reshape(4, *[1] * len(shape))
        for name, shape in SHAPES.items()
    }
    experts = {f"e{i}": {name: torch.tensor(taus[name][i]).float() for name in SHAPES} for i in range(4)}
    pool = Pool.from_state_dicts(base, experts)
    squares = sum((tau.reshape(4, -1) ** 2).sum(1) for tau in taus.values())
    merge = make_merge({"name": "quadratic", "weights": "norms"})
    weights = merge._masses(pool)
    np.testing.assert_allclose(weights / weights.sum(), squares / squares.sum(), atol=EXACT)
    assert weights.mean() == pytest.approx(1)
    found = merge_weights(pool, merge)
    for name in SHAPES:
        wanted = np.tensordot(squares / squares.sum(), taus[name], 1)
        np.testing.assert_allclose(found[name].numpy(), wanted, atol=1e-6)
    matrix, _ = make_merge("metagpt").coefficients(pool)
    np.testing.assert_allclose(matrix[0], squares / squares.sum(), atol=EXACT)


def test_metagpt_is_a_point_of_any_pool(world):
    close(world.run("quadratic", weights="norms"), world.point("metagpt"))


def test_norms_of_experts_like_the_base_count_the_same(world):
    nothing = world.pool.transform(lambda name, base, taus: 0 * taus, "nothing")
    found = merge_weights(nothing, make_merge({"name": "quadratic", "weights": "norms"}))
    assert all(torch.equal(found[name], world.base[name].float()) for name in SHAPES)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_fisher_is_a_point(world, ridge):
    weights = {"e1": 0.5, "e2": 3.0}
    close(
        world.run("fisher", weights=weights, ridge=ridge),
        world.run("quadratic", metric="fisher", weights=weights, ridge=ridge),
    )


def test_fisher_is_its_formula(world):
    """Σ w F θ / Σ w F in float64, and the average where all Fishers are 0."""
    found = world.run("fisher")
    for name in SHAPES:
        fishers, points = world.fishers[name], world.base[name] + world.taus[name]
        total = fishers.sum(0)
        wanted = torch.where(total > 0, (fishers * points).sum(0) / total, points.mean(0))
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=EXACT)
    assert any(bool((value.sum(0) == 0).any()) for value in world.fishers.values())


def test_ewc_is_a_point():
    world = World(n=2, seed=4)
    close(world.run("ewc"), world.run("quadratic", metric="fisher"))
    name = "blocks.0.weight"
    (one, two), points = world.fishers[name], world.base[name] + world.taus[name]
    held = one + two > 0
    wanted = (one * points[0] + two * points[1]) / (one + two)
    torch.testing.assert_close(world.run("ewc")[name][held], wanted[held], rtol=0, atol=EXACT)


@pytest.mark.parametrize("shrink", [1.0, 0.9, 0.0])
def test_regmean_is_a_point_and_its_formula(world, shrink):
    found = world.run("regmean", shrink=shrink)
    close(found, world.run("quadratic", metric="gram", shrink=shrink))
    for name in SHAPES:
        points = (world.base[name] + world.taus[name]).numpy()
        if name not in AXES:
            np.testing.assert_allclose(found[name].numpy(), points.mean(0), atol=EXACT)
            continue
        d = INPUTS[name]
        grams = world.grams[name].numpy()
        grams = shrink * grams + (1 - shrink) * grams * np.eye(d)
        rows = [p.reshape(-1, d) if AXES[name] == 1 else p.reshape(d, -1).T for p in points]
        wanted = np.linalg.solve(grams.sum(0), sum(g @ r.T for g, r in zip(grams, rows, strict=True)))
        wanted = (wanted.T if AXES[name] == 1 else wanted).reshape(SHAPES[name])
        np.testing.assert_allclose(found[name].numpy(), wanted, atol=EXACT)


@pytest.mark.parametrize("start", ["average", "base"])
@pytest.mark.parametrize("shrink", [1.0, 0.9])
def test_mats_at_convergence_is_regmean_and_a_point(world, start, shrink):
    found = world.run("mats", start=start, tol=1e-15, iterations=500, shrink=shrink)
    close(found, world.run("regmean", shrink=shrink))
    close(found, world.run("quadratic", metric="gram", shrink=shrink))


@pytest.mark.parametrize("prior", [0.0, 0.01, 2.0])
@pytest.mark.parametrize("scale", [0.1, 1 / 3])
def test_uncertainty_is_a_point(world, prior, scale):
    """ridge H0 and μ = (1 − Σ α) H0, for Σ α ≤ 1."""
    anchor = max(0.0, 1 - scale * world.n) * prior
    weights = dict.fromkeys(world.names, scale)
    close(
        world.run("uncertainty", scale=scale, prior=prior),
        world.run("quadratic", metric="fisher", weights=weights, ridge=prior, anchor=anchor),
    )


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_uncertainty_is_its_formula(world, scale):
    prior = 0.07
    found = world.run("uncertainty", scale=scale, prior=prior)
    for name in SHAPES:
        fishers, taus = world.fishers[name], world.taus[name]
        wanted = world.base[name] + (scale * (prior + fishers) * taus).sum(0) / (prior + scale * fishers.sum(0))
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=EXACT)


def test_uncertainty_runs_from_fisher_merging_to_task_arithmetic(world):
    close(world.run("uncertainty", prior=0.0), world.run("fisher"))
    close(world.run("uncertainty", prior=1e14), world.point("task-arithmetic", scale=1.0))


def test_equal_metrics_give_the_average():
    world = World(seed=2)
    for table in (world.fishers, world.grams):
        for name, value in table.items():
            table[name] = value[:1].repeat(world.n, *[1] * (value.dim() - 1)) + 0.0
    wanted = world.point("average")
    close(world.run("fisher"), wanted)
    close(world.run("regmean"), wanted)
    close(world.run("mats", tol=1e-15), wanted)


# The minimum itself


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (None, {"anchor": 0.7}),
        ("fisher", {}),
        ("fisher", {"anchor": 0.2, "ridge": 0.1}),
        ("gram", {}),
        ("gram", {"anchor": 0.5, "ridge": 0.2, "shrink": 0.8}),
    ],
)
def test_the_gradient_of_its_own_quadratic_is_zero(world, kind, options):
    weights = [0.5, 1.0, 2.0]
    given = {"weights": dict(zip(world.names, weights, strict=True)), **options}
    merged = world.run("quadratic", metric=kind or "identity", **given)
    leaves = {name: value.requires_grad_() for name, value in merged.items()}
    world.objective(leaves, kind, weights, **options).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), rtol=0, atol=EXACT, msg=name)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 5),
    anchor=st.sampled_from([0.0, 1e-3, 2.0]),
    ridge=st.sampled_from([0.0, 1e-6, 1.0]),
    size=st.floats(1e-150, 1e150),
)
def test_diagonal_zeroes_the_gradient_and_stays_between_the_points(seed, n, anchor, ridge, size):
    rng = torch.Generator().manual_seed(seed)
    points = torch.randn(n, 9, generator=rng, dtype=torch.float64)
    metrics = (torch.rand(n, 9, generator=rng, dtype=torch.float64) - 0.4).clamp_min(0) * size
    weights = torch.rand(n, generator=rng, dtype=torch.float64) + 0.1
    anchor, ridge = anchor * size, ridge * size
    found = diagonal(points, metrics, weights, anchor=anchor, ridge=ridge)
    pulls = weights.unsqueeze(1) * (metrics + ridge)
    slope = (pulls * (found - points)).sum(0) + anchor * found
    assert bool((slope.abs() <= 1e-12 * (pulls.sum(0) + anchor) * 10).all())
    low, high = points.amin(0), points.amax(0)
    if anchor:
        low, high = low.clamp_max(0), high.clamp_min(0)
    assert bool(((found >= low - 1e-12) & (found <= high + 1e-12)).all())


def test_fishers_too_small_for_products_in_float32_count_by_their_ratio():
    points = torch.tensor([[1e-5], [3e-5]])
    metrics = torch.tensor([[1e-36], [3e-36]])
    found = diagonal(points, metrics, torch.ones(2))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(2.5e-5, rel=1e-6)


def test_experts_without_weight_do_not_count_where_others_have_no_fisher():
    points = torch.tensor([[1.0, 1.0], [5.0, 5.0], [7.0, 7.0]])
    metrics = torch.tensor([[0.0, 1.0], [4.0, 4.0], [0.0, 0.0]])
    assert diagonal(points, metrics, torch.tensor([1.0, 0.0, 1.0])).tolist() == [4.0, 1.0]


@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-38])
def test_subnormal_metrics_and_priors_are_finite(size):
    points, metrics = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([[size, 0.0], [0.0, 0.0]])
    assert diagonal(points, metrics, torch.ones(2)).tolist() == [1.0, 1.5]
    assert diagonal(points, 0 * metrics, torch.ones(2), ridge=size, anchor=-size).tolist() == pytest.approx([3, 3])


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_and_back(axis):
    values = torch.arange(24.0)
    shape = (4, 6) if axis == 0 else (4, 3, 2)
    rows = as_rows(values, shape, axis)
    assert rows.shape == ((6, 4) if axis == 0 else (4, 6))
    assert torch.equal(from_rows(rows, axis), values)
    assert torch.equal(as_rows(torch.stack([values, values]), shape, axis)[1], rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [1, 11])
def test_singular_grams_name_tensor_and_remedy(dtype, samples):
    """Also where rounding made them barely positive: as many columns as the data allow, and no more."""
    for seed in range(10):
        rng = torch.Generator().manual_seed(seed)
        system = GramSystem()
        x = torch.randn(12, samples, generator=rng, dtype=torch.float64)  # the same inputs in both tasks
        for _ in range(2):
            system.add(torch.randn(3, 12, generator=rng).to(dtype), (x @ x.T / samples).to(dtype), 1.0)
        with pytest.raises(OptionError, match=r"'layer\.w' are singular.*'shrink'.*'ridge'.*'anchor'"):
            system.solve("layer.w")


@pytest.mark.parametrize("options", [{"shrink": 0.9}, {"ridge": 0.1}, {"anchor": 0.1}])
def test_the_remedies_for_singular_grams_work(options):
    rng = torch.Generator().manual_seed(0)
    system = GramSystem(**options)
    x = torch.randn(12, 2, generator=rng, dtype=torch.float64)
    system.add(torch.randn(3, 12, generator=rng, dtype=torch.float64), x @ x.T, 1.0)
    assert bool(system.solve("w").isfinite().all())


def test_inputs_that_are_always_zero_are_averaged():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 40, generator=rng, dtype=torch.float64)
    x[:, 2] = 0
    vectors = torch.randn(2, 3, 6, generator=rng, dtype=torch.float64)
    keep = [0, 1, 3, 4, 5]
    for anchor in (0.0, 0.5):
        whole, without = GramSystem(anchor), GramSystem(anchor)
        for vector, gram, weight in zip(vectors, x @ x.transpose(1, 2), (1.0, 3.0), strict=True):
            whole.add(vector, gram, weight)
            without.add(vector[:, keep], gram[keep][:, keep], weight)
        found = whole.solve("w")
        torch.testing.assert_close(found[:, keep], without.solve("w"), rtol=0, atol=1e-12)
        mean = (vectors[0] + 3 * vectors[1])[:, 2] / 4
        torch.testing.assert_close(found[:, 2], mean if anchor == 0 else 0 * mean, rtol=0, atol=1e-12)


# Over coefficients


def dense(world, kind, weights, anchor, ridge=0.0, shrink=1.0):
    """Least squares A λ ≈ b whose squared residual is the objective, by tensor: {name: (A [rows, n], b)}."""
    found = {}
    for name in SHAPES:
        taus = world.taus[name].reshape(world.n, -1).numpy()
        blocks, targets = [np.sqrt(anchor) * taus.T], [np.zeros(taus.shape[1])]
        for i, weight in enumerate(weights):
            root = np.eye(taus.shape[1])
            if kind == "fisher":
                root = np.diag(np.sqrt(world.fishers[name][i].reshape(-1).numpy() + ridge))
            elif kind == "gram" and name in AXES:
                gram = world.grams[name][i].numpy()
                d = len(gram)
                values, vectors = np.linalg.eigh(shrink * gram + (1 - shrink) * gram * np.eye(d) + ridge * np.eye(d))
                half = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
                other = np.eye(taus.shape[1] // d)
                root = np.kron(other, half) if AXES[name] == 1 else np.kron(half, other)
            blocks.append(np.sqrt(weight) * root @ taus.T)
            targets.append(np.sqrt(weight) * root @ taus[i])
        found[name] = np.concatenate(blocks), np.concatenate(targets)
    return found


def gathered(world, kind, weights, blocks="layer", **options):
    """The matrices of the program, from float64 parts."""
    moments = Moments(np.array(weights), blocks=world.pool.blocks(blocks), **options)
    for part in world.parts(kind):
        if kind == "gram" and part.axis is not None:
            stack = part._taus
            found = moments.matrix(part, lambda a, b, stack=stack: stack[:, a:b].clone())
        else:
            found = moments.piece(part)
        moments._add(part.name, found)
    return moments


OPTIONS = [(None, {}), ("fisher", {"ridge": 0.3}), ("gram", {"ridge": 0.1, "shrink": 0.7})]


@pytest.mark.parametrize("blocks", ["model", "layer", "tensor"])
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_the_program_is_the_objective_on_the_pool(world, kind, options, blocks):
    weights = [0.5, 1.0, 2.0]
    moments = gathered(world, kind, weights, blocks, anchor=0.4, **options)
    quadratic, linear = np.zeros_like(moments.quadratic), np.zeros_like(moments.linear)
    for name, (a, b) in dense(world, kind, weights, 0.4, **options).items():
        row = moments.blocks.rows[name].start
        quadratic[row] += a.T @ a
        linear[row] += a.T @ b
    np.testing.assert_allclose(moments.quadratic, quadratic, atol=EXACT)
    np.testing.assert_allclose(moments.linear, linear, atol=EXACT)


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_the_pool_gives_the_same_program(world, kind, options, monkeypatch):
    """In float32, in pieces, on threads, with Grams by rows: as good as float32 task vectors."""
    weights = [0.5, 1.0, 2.0]
    wanted = gathered(world, kind, weights, anchor=0.4, **options)
    monkeypatch.setattr(operator, "PIECE", 8)
    monkeypatch.setattr("mergesolve.solvers.closed_form.quadratic.CHUNK", 20)
    for backend in ("streaming", "resident"):
        pool = world.opened(backend=backend)
        moments = Moments(np.array(weights), blocks=pool.blocks("layer"), anchor=0.4, **options)
        moments.take(pool, None if kind is None else world.statistics(kind, pool))
        np.testing.assert_allclose(moments.quadratic, wanted.quadratic, rtol=2e-6, atol=2e-5)
        np.testing.assert_allclose(moments.linear, wanted.linear, rtol=2e-6, atol=2e-5)


def merged_by(world, matrix, blocks):
    return {
        name: world.base[name] + torch.tensordot(torch.from_numpy(matrix[blocks.rows[name].start]), world.taus[name], 1)
        for name in SHAPES
    }


@pytest.mark.parametrize("domain", ["free", "simplex", "capped", "box"])
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_no_point_of_the_domain_is_better(world, kind, options, domain):
    """Against random points of the domain, its corners, and steps from the answer towards them."""
    weights = dict(zip(world.names, [0.5, 1.0, 2.0], strict=True))
    merge = make_merge(
        {"name": "quadratic", "metric": kind or "identity", "over": "coefficients", "domain": domain}
        | {"weights": weights, "anchor": 0.4, **({"upper": 0.3} if domain == "box" else {}), **options}
    )
    statistics = None if kind is None else world.statistics(kind)
    matrix, blocks = merge.coefficients(world.pool, statistics)
    feasible = {"free": Free(), "simplex": Simplex(), "capped": Capped(), "box": Box(0.0, 0.3)}[domain]
    assert feasible.violation(matrix).max() <= 1e-12

    def value(point):
        return float(world.objective(merged_by(world, point, blocks), kind, [0.5, 1.0, 2.0], anchor=0.4, **options))

    best = value(matrix)
    rng = np.random.default_rng(0)
    others = [feasible.project(rng.normal(size=matrix.shape)) for _ in range(20)]
    others += [
        feasible.project(np.tile(np.array(corner, float), (len(matrix), 1)))
        for corner in itertools.product((0, 1), repeat=3)
    ]
    for other in others:
        for step in (1.0, 0.1, 1e-3):
            assert value(matrix + step * (other - matrix)) >= best - 2e-5 * best * step


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_free_coefficients_are_those_of_least_squares(world, kind, options):
    weights = [0.5, 1.0, 2.0]
    merge = make_merge(
        {"name": "quadratic", "metric": kind or "identity", "over": "coefficients", "blocks": "tensor"}
        | {"weights": dict(zip(world.names, weights, strict=True)), "anchor": 0.4, **options}
    )
    matrix, blocks = merge.coefficients(world.pool, None if kind is None else world.statistics(kind))
    for name, (a, b) in dense(world, kind, weights, 0.4, **options).items():
        wanted = np.linalg.lstsq(a, b, rcond=1e-10)[0]
        np.testing.assert_allclose(matrix[blocks.rows[name].start], wanted, atol=2e-5, err_msg=name)


def test_over_coefficients_of_independent_experts_identity_gives_the_average(world):
    """The average lies in the simplex, so it is the minimum there, too; with the anchor, PAINT in the capped one."""
    big = World(n=3, seed=5)
    for options, wanted in (({"domain": "simplex"}, 1 / 3), ({"domain": "capped", "anchor": 1.0}, 1 / 4)):
        merge = make_merge({"name": "quadratic", "over": "coefficients", "blocks": "model", **options})
        matrix, _ = merge.coefficients(big.pool)
        np.testing.assert_allclose(matrix, wanted, atol=EXACT)


def test_merging_by_coefficients_is_the_pool_at_them(world):
    merge = make_merge(
        {"name": "quadratic", "metric": "fisher", "over": "coefficients", "domain": "simplex", "anchor": 2.0}
    )
    statistics = world.statistics("fisher")
    wanted = world.pool.combine(*merge.coefficients(world.pool, statistics))
    found = merge_weights(world.pool, merge, statistics)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-6)


def test_duplicates_share_what_one_of_them_would_get():
    world = World(n=2, seed=6)
    base, experts = world.states()
    pool = Pool.from_state_dicts(base, {**experts, "copy": dict(experts["e1"])})
    merge = make_merge({"name": "quadratic", "over": "coefficients", "blocks": "model", "anchor": 0.3})
    matrix, _ = merge.coefficients(pool)
    assert matrix[0, 1] == pytest.approx(matrix[0, 2], abs=1e-9)
    np.testing.assert_allclose(matrix[0], [1 / 3.3] * 3, atol=1e-9)


# The merge on pools


def reference(world, kind, weights, anchor, ridge, shrink, dtype=torch.float32):
    """NumPy, from what is stored."""
    base, experts = world.states(dtype)
    merged = {}
    for name, shape in SHAPES.items():
        start = base[name].float().numpy().astype(float)
        taus = [state[name].float().numpy().astype(float) - start for state in experts.values()]
        d = INPUTS.get(name, 0)
        if kind == "gram" and name in AXES:
            left, right = anchor * np.eye(d), 0
            for weight, gram, tau in zip(weights, world.grams[name].numpy(), taus, strict=True):
                metric = shrink * gram + ((1 - shrink) * np.diag(gram) + ridge) * np.eye(d)
                rows = tau.reshape(-1, d).T if AXES[name] == 1 else tau.reshape(d, -1)
                left, right = left + weight * metric, right + weight * metric @ rows
            delta = np.linalg.solve(left, right)
            merged[name] = start + (delta.T if AXES[name] == 1 else delta).reshape(shape)
            continue
        metrics = [np.ones(shape)] * len(taus)
        if kind == "fisher":
            metrics = [fisher.numpy() + ridge for fisher in world.fishers[name]]
        right = sum(w * h * tau for w, h, tau in zip(weights, metrics, taus, strict=True))
        left = anchor + sum(w * h for w, h in zip(weights, metrics, strict=True))
        mean = sum(w * tau for w, tau in zip(weights, taus, strict=True)) / sum(weights)
        merged[name] = start + np.where(left > 0, right / np.where(left > 0, left, 1), mean)
    return merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(
    ("metric", "options"),
    [
        ("identity", {"anchor": 0.5}),
        ("fisher", {}),
        ("fisher", {"anchor": 0.3, "ridge": 0.2}),
        ("gram", {"shrink": 0.9}),
        ("gram", {"anchor": 0.5, "ridge": 0.2}),
    ],
)
def test_equals_the_reference(metric, options, n, dtype):
    world = World(n, seed=7, dtype=dtype)
    weights = [1.0, 0.5, 2.0, 0.0, 1.5][:n]
    merge = make_merge(
        {"name": "quadratic", "metric": metric, "weights": dict(zip(world.names, weights, strict=True)), **options}
    )
    statistics = None if metric == "identity" else world.statistics(metric)
    found = merge_weights(world.pool, merge, statistics)
    full = {"anchor": 0.0, "ridge": 0.0, "shrink": 1.0, **options}
    wanted = reference(world, metric, weights, dtype=dtype, **full)
    for name in SHAPES:
        assert found[name].dtype == torch.float32
        np.testing.assert_allclose(found[name].numpy(), wanted[name], atol=2e-5, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("metric", ["identity", "fisher", "gram"])
def test_one_expert_without_anchor_comes_back(metric):
    world = World(1, seed=8)
    statistics = None if metric == "identity" else world.statistics(metric)
    found = merge_weights(world.pool, make_merge({"name": "quadratic", "metric": metric}), statistics)
    for name, value in world.states()[1]["e0"].items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["identity", "fisher", "gram"])
@pytest.mark.parametrize("over", ["weights", "coefficients"])
def test_equivariant_to_the_order_of_the_pool(metric, over):
    world = World(4, seed=9)
    base, experts = world.states()
    merge = make_merge({"name": "quadratic", "metric": metric, "over": over, "anchor": 0.1})
    merged = []
    for order in (list(experts), list(reversed(experts))):
        pool = Pool.from_state_dicts(base, {name: experts[name] for name in order})
        statistics = None if metric == "identity" else world.statistics(metric, pool)
        merged.append(merge_weights(pool, merge, statistics))
    for name in SHAPES:
        torch.testing.assert_close(merged[0][name], merged[1][name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("metric", ["fisher", "gram"])
def test_does_not_depend_on_pieces_and_threads(metric, monkeypatch):
    world = World(3, seed=10)
    merge = make_merge({"name": "quadratic", "metric": metric, "ridge": 0.01})
    wanted = merge_weights(world.pool, merge, world.statistics(metric))
    monkeypatch.setattr(operator, "PIECE", 7)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pool = world.opened(backend="streaming")
        found = merge_weights(pool, merge, world.statistics(metric, pool))
    finally:
        torch.set_num_threads(before)
    for name in SHAPES:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "norms"},
        {"over": "coefficients", "domain": "simplex"},
        {"metric": "fisher"},
        {"metric": "fisher", "over": "coefficients"},
        {"metric": "gram"},
        {"metric": "gram", "over": "coefficients", "weights": "norms"},
    ],
)
def test_reads_what_was_planned_and_writes_what_it_returns(options, tmp_path):
    world = World(3, seed=11)
    base, experts = world.states()
    for name, state in {"base": base, **experts}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = {name: tmp_path / f"{name}.safetensors" for name in experts}
    pool = Pool.open(base=tmp_path / "base.safetensors", experts=paths, backend="streaming")
    merge = make_merge({"name": "quadratic", **options})
    statistics = None if merge.statistics is None else world.statistics(merge.statistics, pool)
    planned = plan(pool, merge)
    assert len(pool.tensors) == len(SHAPES)
    assert pool.fingerprint  # it samples the files, once
    before = pool.bytes_read
    (path,) = write_merge(pool, merge, tmp_path / "merged.safetensors", statistics=statistics)
    read = pool.bytes_read - before
    wanted = merge_weights(pool, merge, statistics)
    assert all(torch.equal(value, wanted[name]) for name, value in load_file(path).items())
    table = {"fisher": world.fishers, "gram": world.grams, None: {}}[merge.statistics]
    assert read <= planned.bytes_read + merge.passes * sum(4 * value.numel() for value in table.values())


def test_runs_on_a_transformed_pool(world):
    """Metrics stay what they are for the experts; task vectors are those of the view."""
    doubled = world.pool.transform(lambda name, base, taus: 2 * taus, "doubled")
    for metric in ("fisher", "gram"):
        merge = make_merge({"name": "quadratic", "metric": metric, "ridge": 0.01})
        one = merge_weights(world.pool, merge, world.statistics(metric))
        two = merge_weights(doubled, merge, world.statistics(metric, doubled))
        for name in SHAPES:
            base = world.base[name].float()
            torch.testing.assert_close(two[name] - base, 2 * (one[name] - base), rtol=1e-4, atol=1e-5)


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "hessian"}, "'metric'"),
        ({"over": "all"}, "'over'"),
        ({"over": "coefficients", "domain": "ball"}, "'domain'"),
        ({"blocks": "row"}, "'blocks'"),
        ({"anchor": -1.0}, "'anchor'"),
        ({"metric": "gram", "ridge": -1e-3}, "'ridge'"),
        ({"metric": "gram", "shrink": 1.5}, "'shrink'"),
        ({"upper": 0}, "'upper'"),
        ({"over": "coefficients", "domain": "simplex", "upper": 0.5}, "'upper'.*'box'"),
        ({"weights": "norm"}, "'uniform', 'norms'"),
        ({"weights": {"e0": -1.0}}, "must not be negative"),
        ({"weights": {"e0": float("nan")}}, "'weights'"),
        ({"domain": "simplex"}, "over='coefficients'"),
        ({"ridge": 1.0}, "'ridge'.*'fisher' or 'gram'"),
        ({"metric": "fisher", "shrink": 0.5}, "'shrink'.*'gram'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        make_merge({"name": "quadratic", **options})


def test_weights_that_are_all_zero(world):
    merge = make_merge({"name": "quadratic", "weights": dict.fromkeys(world.names, 0.0)})
    with pytest.raises(OptionError, match="0 for every expert"):
        merge_weights(world.pool, merge)


@pytest.mark.parametrize("over", ["weights", "coefficients"])
@pytest.mark.parametrize("metric", ["fisher", "gram"])
def test_missing_statistics_and_those_of_another_kind(world, metric, over):
    merge = make_merge({"name": "quadratic", "metric": metric, "over": over})
    with pytest.raises(OptionError, match=f"needs {metric} statistics.*mergesolve stats"):
        merge_weights(world.pool, merge)
    other = {"fisher": "gram", "gram": "fisher"}[metric]
    with pytest.raises(OptionError, match=f"needs {metric} statistics.*{other} statistics were given"):
        merge_weights(world.pool, merge, world.statistics(other))


def test_singular_grams_of_a_pool_write_nothing(tmp_path):
    world = World(2, seed=12, samples=2)
    merge = make_merge({"name": "quadratic", "metric": "gram"})
    with pytest.raises(OptionError, match=r"Grams of 'blocks\.0\.\w+' are singular"):
        write_merge(world.pool, merge, tmp_path / "merged.safetensors", statistics=world.statistics("gram"))
    assert list(tmp_path.iterdir()) == []
