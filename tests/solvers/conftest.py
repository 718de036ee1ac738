"""Test problems with known optima, and small merges with a float64 reference."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import cvxpy as cp
import numpy as np
import pytest
import torch
from mergesolve.pools import Pool
from mergesolve.solvers import FunctionProblem, Problem, make_domain
from mergesolve.solvers.surrogate import QuadraticTasks


@dataclass(frozen=True)
class Quadratic:
    """f(Λ) = Σ_b ½ Λ_b Q_b Λ_bᵀ − c_b Λ_bᵀ, convex by construction (Q_b is a Gram matrix plus 0.05 I)."""

    q: np.ndarray
    c: np.ndarray

    def __call__(self, point):
        product = np.einsum("rnm,rm->rn", self.q, point)
        return 0.5 * np.sum(point * product) - np.sum(self.c * point), product - self.c

    def problem(self, domain, **options):
        return FunctionProblem(self, *self.c.shape, domain, **options)

    def optimum(self, domain):
        """f* by cvxpy with Clarabel at tight tolerances: the independent oracle."""
        point = cp.Variable(self.c.shape)
        objective = sum(
            0.5 * cp.quad_form(point[b], cp.psd_wrap(self.q[b])) - self.c[b] @ point[b] for b in range(len(self.c))
        )
        sums = cp.sum(point, axis=1)
        constraints = {
            "simplex": [point >= 0, sums == 1],
            "capped": [point >= 0, sums <= 1],
            "box": [point >= 0, point <= 1],
            "free": [],
        }[domain]
        problem = cp.Problem(cp.Minimize(objective), constraints)
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        return float(problem.value)


def make_quadratic(seed, rows=3, n=6, where="face"):
    """A quadratic whose minimizer over the simplex lies where it is asked to, by its KKT conditions.

    With x on the simplex, μ ≥ 0 supported off the support of x, and c = Qx − μ, the multiplier of Σλ = 1 is 0 and x is
    optimal: S(x) = Qx − c = μ ≥ 0 with ⟨μ, x⟩ = 0. The same x is optimal on the capped simplex.
    """
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(rows, n, n))
    q = root @ root.transpose(0, 2, 1) / n + 0.05 * np.eye(n)
    support = {"vertex": 1, "edge": 2, "face": max(2, n // 2), "interior": n}[where]
    x = np.zeros((rows, n))
    mu = np.zeros((rows, n))
    for row in range(rows):
        order = rng.permutation(n)
        x[row, order[:support]] = rng.dirichlet(np.full(support, 5.0))
        mu[row, order[support:]] = rng.uniform(0.01, 0.3, n - support)
    return Quadratic(q, np.einsum("rnm,rm->rn", q, x) - mu), x


@pytest.fixture(params=["vertex", "edge", "face", "interior"])
def located(request):
    """A quadratic with its minimizer over the simplex, which is known by construction."""
    return make_quadratic(7, where=request.param)


@pytest.fixture
def face():
    return make_quadratic(3)


@pytest.fixture
def quadratics():
    """Factory of quadratics with known minimizers over the simplex."""
    return make_quadratic


def expression(problem, task, point):
    """A task's loss of a `QuadraticTasks` problem as a cvxpy expression of the vector Λ."""
    square = 0.5 * cp.quad_form(point, cp.psd_wrap(problem.hessians[task]))
    return problem.constants[task] + problem.linear[task] @ point + square


def inside(problem, point):
    """The domain as cvxpy constraints of the vector Λ."""
    sums = cp.sum(cp.reshape(point, (problem.rows, problem.n), order="C"), axis=1)
    return {
        "simplex": [point >= 0, sums == 1],
        "capped": [point >= 0, sums <= 1],
        "box": [point >= 0, point <= 1],
        "free": [],
    }[problem.domain.name]


@pytest.fixture
def many():
    """Factory of convex quadratic tasks with minimizers apart: problem = many(seed, tasks, rows, n, domain)."""

    def make(seed, tasks, rows=2, n=4, domain="simplex"):
        rng = np.random.default_rng(seed)
        roots = rng.normal(size=(tasks, rows * n, rows * n))
        hessians = roots @ roots.transpose(0, 2, 1) / (rows * n) + 0.05 * np.eye(rows * n)
        best = rng.dirichlet(np.ones(n), size=(tasks, rows)).reshape(tasks, -1)
        pull = np.einsum("tij,tj->ti", hessians, best)
        constants = 0.5 * np.sum(pull * best, axis=1) + 0.1 * rng.random(tasks)
        names = [f"task{k}" for k in range(tasks)]
        experts = [f"expert{i}" for i in range(n)]
        return QuadraticTasks(constants, -pull, hessians, make_domain(domain), experts=experts, tasks=names)

    return make


def worst_optimum(problem, weights=None, levels=None):
    """min_Λ max_t w_t (f_t − z_t) by cvxpy with Clarabel: the independent oracle."""
    tasks = range(len(problem.tasks))
    weights = np.ones(len(tasks)) if weights is None else weights
    levels = np.zeros(len(tasks)) if levels is None else levels
    point, top = cp.Variable(problem.rows * problem.n), cp.Variable()
    below = [float(weights[t]) * (expression(problem, t, point) - float(levels[t])) <= top for t in tasks]
    found = cp.Problem(cp.Minimize(top), below + inside(problem, point))
    found.solve(solver=cp.CLARABEL)
    return float(found.value)


@pytest.fixture
def oracles():
    """What cvxpy says about quadratic tasks: expression, inside, worst_optimum."""
    return SimpleNamespace(expression=expression, inside=inside, worst_optimum=worst_optimum)


class WeightQuadratic:
    """loss_t(θ) = ½ ‖θ − target_t‖² per task: an objective over weights with closed forms for everything."""

    def __init__(self, targets, weights=None, stochastic=False):
        self.targets = targets
        self.tasks = tuple(targets)
        self.task_weights = np.full(len(targets), 1 / len(targets)) if weights is None else np.asarray(weights)
        self.stochastic = stochastic
        self.seed = 0
        self.draws = []
        self.shift = 0.0
        self.seen = 0

    @property
    def data_used(self):
        return {"labelled": 0, "unlabelled": 0, "test_inputs": False, "samples_seen": self.seen}

    def describe(self):
        return {"name": "weight-quadratic", "tasks": list(self.tasks)}

    def draw(self, iteration):
        self.draws.append(iteration)
        self.shift = 0.01 * (iteration % 3 - 1) if self.stochastic and iteration is not None else 0.0

    def _losses(self, weights):
        return {
            name: sum(0.5 * float(((w + self.shift - target[k]).double() ** 2).sum()) for k, w in weights.items())
            for name, target in self.targets.items()
        }

    def task_losses(self, weights):
        return self._losses(weights)

    def value(self, weights):
        return float(np.dot(self.task_weights, list(self._losses(weights).values())))

    def value_and_grad(self, weights, *, per_task=False):
        self.seen += 1
        losses = self._losses(weights)
        gradients = [{k: w + self.shift - target[k] for k, w in weights.items()} for target in self.targets.values()]
        total = {k: sum(float(c) * g[k] for c, g in zip(self.task_weights, gradients, strict=True)) for k in weights}
        loss = float(np.dot(self.task_weights, list(losses.values())))
        return _Evaluation(loss, losses, gradients if per_task else total)


@dataclass
class _Evaluation:
    loss: float
    task_losses: dict
    gradient: object


SHAPES = {"layers.0.weight": (5, 4), "layers.0.bias": (5,), "layers.1.weight": (3, 5), "head": (3,)}


def random_state(rng, scale=1.0, around=None):
    return {
        name: torch.from_numpy((scale * rng.normal(size=shape)).astype(np.float32)) + (around[name] if around else 0.0)
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def states():
    """(base, {expert: state}, {task: target}) with targets near some experts."""
    rng = np.random.default_rng(11)
    base = random_state(rng)
    experts = {f"e{i}": random_state(rng, 0.3, base) for i in range(5)}
    targets = {
        "left": {k: 0.7 * experts["e0"][k] + 0.3 * experts["e2"][k] for k in base},
        "right": random_state(rng, 0.05, experts["e3"]),
    }
    return base, experts, targets


@pytest.fixture
def merge(states):
    """Factory of merge problems over the same pool."""

    def make(blocks="layer", domain="capped", order=None, stochastic=False, **options):
        base, experts, targets = states
        chosen = {name: experts[name] for name in (order or experts)}
        pool = Pool.from_state_dicts(base, chosen, **options)
        return Problem(pool, WeightQuadratic(targets, stochastic=stochastic), blocks, domain)

    return make
