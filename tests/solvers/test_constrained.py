from __future__ import annotations

import json
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import pytest
import torch
from mergesolve.objectives import AugmentedLagrangian, CrossEntropy, Distillation, ModuleModel, Proximity, Task
from mergesolve.pools import Pool
from mergesolve.solvers import (
    SOLVERS,
    STATUSES,
    ConstrainedResult,
    Evaluation,
    FunctionProblem,
    OptionError,
    Problem,
    Result,
    solve,
    solve_constrained,
)
from torch import nn

DOMAINS = ("simplex", "capped", "box", "free")


@dataclass(frozen=True)
class Quadratic:
    """a (Σ_b ½ Λ_b Q_b Λ_bᵀ − c_b Λ_bᵀ + k), convex by construction."""

    q: np.ndarray
    c: np.ndarray
    k: float = 0.0
    a: float = 1.0

    def __call__(self, point):
        product = np.einsum("rnm,rm->rn", self.q, point)
        value = 0.5 * np.sum(point * product) - np.sum(self.c * point) + self.k
        return self.a * value, self.a * (product - self.c)

    def expression(self, point):
        rows = range(len(self.c))
        squares = sum(0.5 * cp.quad_form(point[b], cp.psd_wrap(self.q[b])) - self.c[b] @ point[b] for b in rows)
        return self.a * (squares + self.k)


class MatrixLagrangian:
    """The augmented Lagrangian of two functions of Λ, in float64: what the outer loop asks of an objective."""

    constraint_task = "constraint"

    def __init__(self, f, g, bound):
        self.f, self.g, self.bound = f, g, bound
        self.multiplier = self.penalty = 0.0
        self.first_draw = 0

    def constraint_value(self, point):
        return self.g(point)[0]

    def parts(self, point):
        (f, df), (g, dg) = self.f(point), self.g(point)
        active = max(0.0, self.multiplier + self.penalty * (g - self.bound))
        if self.penalty == 0:
            return f, df, self.multiplier * (g - self.bound), active * dg
        return f, df, (active**2 - self.multiplier**2) / (2 * self.penalty), active * dg


class ConstrainedQuadratic(FunctionProblem):
    """A problem over Λ itself: its weights are the coefficients."""

    def __init__(self, f, g, bound, domain):
        super().__init__(None, *f.c.shape, domain)
        self.objective = MatrixLagrangian(f, g, bound)
        self.tasks, self.task_weights = ("constraint", "loss"), np.ones(2)

    def weights(self, point):
        return point

    def evaluate(self, point, *, tasks=False, raw=False, experts=None):
        f, df, price, slope = self.objective.parts(point)
        scores = np.stack([slope, df])
        return Evaluation(f + price, df + slope, {"constraint": price, "loss": f}, scores if tasks else None)

    def value(self, point):
        return self.evaluate(point).value


def convex(rng, rows, n):
    root = rng.normal(size=(rows, n, n))
    return root @ root.transpose(0, 2, 1) / n + 0.05 * np.eye(n)


def make(seed, rows=2, n=5):
    """f with its minimizer anywhere, and g = ½ ‖Λ − x‖²_Q, which is 0 at a point x of the simplex and positive else."""
    rng = np.random.default_rng(seed)
    f = Quadratic(convex(rng, rows, n), rng.normal(size=(rows, n)))
    q, x = convex(rng, rows, n), rng.dirichlet(np.ones(n), size=rows)
    return f, Quadratic(q, np.einsum("rnm,rm->rn", q, x), 0.5 * float(np.einsum("rn,rnm,rm->", x, q, x)))


def oracle(f, g, bound, domain):
    """Primal, value and multiplier by cvxpy with Clarabel."""
    point = cp.Variable(f.c.shape)
    sums = cp.sum(point, axis=1)
    inside = {"simplex": [point >= 0, sums == 1], "capped": [point >= 0, sums <= 1], "free": []}
    inside["box"] = [point >= 0, point <= 1]
    held = [g.expression(point) <= bound] if np.isfinite(bound) else []
    problem = cp.Problem(cp.Minimize(f.expression(point)), held + inside[domain])
    problem.solve(solver=cp.CLARABEL)  # to 1e-8
    return point.value, float(problem.value), float(np.sum(held[0].dual_value)) if held else 0.0


def tight(f, g, domain):
    """A bound that the unconstrained minimizer breaks, so that the constraint is active."""
    return 0.3 * g(oracle(f, g, np.inf, domain)[0])[0]


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("seed", range(3))
def test_value_primal_and_multiplier_are_those_of_an_interior_point_method(seed, domain):
    f, g = make(seed)
    bound = tight(f, g, domain)
    point, value, multiplier = oracle(f, g, bound, domain)
    problem = ConstrainedQuadratic(f, g, bound, domain)
    result = solve_constrained(problem, "projected-gradient", max_iter=500, rounds=20, tol=1e-7, feasibility_tol=1e-7)
    assert result.status == "optimal"
    assert multiplier > 1e-3
    assert result.objective == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(result.coefficients, point, atol=1e-4)
    assert result.multiplier == pytest.approx(multiplier, rel=1e-3)
    # KKT, from the two functions themselves
    (found_f, df), (found_g, dg) = f(result.coefficients), g(result.coefficients)
    assert result.objective == pytest.approx(found_f, abs=1e-12)
    assert result.constraint == pytest.approx(found_g, abs=1e-12)
    assert result.violation == max(0.0, result.constraint - bound) <= 1e-7
    assert result.complementarity == abs(result.multiplier * (result.constraint - bound)) <= 1e-7
    scores = df + result.multiplier * dg
    assert problem.domain.stationarity(result.coefficients, scores) < 1e-3
    if domain != "free":
        assert result.gap == pytest.approx(problem.domain.gap(result.coefficients, scores), abs=1e-12)
        assert result.gap <= 1e-7


@pytest.mark.parametrize("domain", DOMAINS[:3])
def test_gap_and_complementarity_bound_what_is_left_of_an_unfinished_solve(domain):
    f, g = make(5)
    bound = tight(f, g, domain)
    value = oracle(f, g, bound, domain)[1]
    for rounds in (1, 2, 3):
        problem = ConstrainedQuadratic(f, g, bound, domain)
        result = solve_constrained(problem, "frank-wolfe", max_iter=15, rounds=rounds)
        assert result.status == "max_iter"
        assert result.objective - value <= result.gap - result.multiplier * (result.constraint - bound) + 1e-8


@pytest.mark.parametrize("domain", DOMAINS)
def test_an_inactive_constraint_changes_nothing_and_costs_nothing(domain):
    f, g = make(1)
    free = oracle(f, g, np.inf, domain)
    bound = 2.0 * g(free[0])[0]
    result = solve_constrained(ConstrainedQuadratic(f, g, bound, domain), "projected-gradient", max_iter=500)
    plain = solve(ConstrainedQuadratic(f, g, bound, domain), "projected-gradient", max_iter=500)
    assert result.status == "optimal"
    assert result.multiplier == result.complementarity == result.violation == 0.0
    assert len(result.history) == 1
    np.testing.assert_allclose(result.coefficients, plain.coefficients, atol=1e-9)
    assert result.objective == pytest.approx(free[1], abs=1e-6)
    # a multiplier from elsewhere is unlearned
    again = solve_constrained(
        ConstrainedQuadratic(f, g, bound, domain), "projected-gradient", max_iter=500, multiplier=2.0
    )
    assert again.status == "optimal"
    assert again.multiplier <= 1e-5
    assert again.objective == pytest.approx(free[1], abs=1e-5)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_bound_out_of_reach_is_reported_with_the_least_value_found(domain):
    f, g = make(2)
    least = oracle(g, g, np.inf, domain)[1]
    bound = least - 0.05
    result = solve_constrained(
        ConstrainedQuadratic(f, g, bound, domain), "projected-gradient", max_iter=300, repair=True
    )
    assert result.status in set(STATUSES) - {"optimal"}
    assert not result.success
    assert result.repair is None
    assert result.violation == pytest.approx(0.05, abs=1e-4)
    assert f"the least value found is {min(line['constraint'] for line in result.history):.6g}" in result.message
    if domain == "free":
        assert result.least is None
    else:
        assert bound < result.least <= least + 1e-7
        assert f"the bound {bound:.6g} is too low" in result.message


@pytest.mark.parametrize("domain", DOMAINS[:3])
def test_what_is_said_to_be_out_of_reach_is_even_when_the_solve_is_far_from_done(domain):
    f, g = make(2)
    least = oracle(g, g, np.inf, domain)[1]
    for bound in (least - 5.0, least - 0.05, least + 0.01):
        result = solve_constrained(ConstrainedQuadratic(f, g, bound, domain), "frank-wolfe", rounds=1, max_iter=2)
        assert result.constraint > bound
        assert result.least <= least + 1e-7
        assert result.least < result.constraint
        assert ("is too low" in result.message) == (result.least > bound)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_multiplier_is_the_price_of_the_bound(domain):
    """dp*/dε = −μ: the sensitivity theorem, by central differences of the optimal value."""
    f, g = make(4)
    bound = tight(f, g, domain)
    options = {"max_iter": 500, "rounds": 20, "tol": 1e-8, "feasibility_tol": 1e-9}
    less, here, more = (
        solve_constrained(ConstrainedQuadratic(f, g, bound * share, domain), "projected-gradient", **options)
        for share in (0.99, 1.0, 1.01)
    )
    assert (less.objective - more.objective) / (0.02 * bound) == pytest.approx(here.multiplier, rel=1e-3)


def test_a_dual_from_an_earlier_solve_saves_rounds():
    f, g = make(0)
    bound = tight(f, g, "capped")
    options = {"max_iter": 500, "rounds": 20, "penalty": 20.0}
    cold = solve_constrained(ConstrainedQuadratic(f, g, bound, "capped"), "projected-gradient", **options)
    assert len(cold.history) > 1
    warm = solve_constrained(
        ConstrainedQuadratic(f, g, bound, "capped"), "projected-gradient", multiplier=cold.multiplier, **options
    )
    assert warm.status == cold.status == "optimal"
    assert len(warm.history) == 1
    moved = ConstrainedQuadratic(f, g, 1.1 * bound, "capped")
    near = solve_constrained(moved, "projected-gradient", multiplier=cold.multiplier, start=cold, **options)
    assert near.status == "optimal"
    assert len(near.history) <= len(cold.history)


def test_the_units_of_loss_and_constraint_do_not_matter():
    f, g = make(3)
    bound = tight(f, g, "simplex")
    results = []
    for a, b in ((1.0, 1.0), (1e3, 1.0), (1.0, 1e-3), (1e-2, 1e4)):
        problem = ConstrainedQuadratic(Quadratic(f.q, f.c, f.k, a), Quadratic(g.q, g.c, g.k, b), b * bound, "simplex")
        result = solve_constrained(problem, "projected-gradient", max_iter=500, tol=1e-6 * a, feasibility_tol=1e-6 * b)
        results.append((a, b, result))
    reference = results[0][2]
    assert reference.status == "optimal"
    for a, b, result in results:
        assert result.status == "optimal"
        assert result.history[0]["penalty"] == pytest.approx(reference.history[0]["penalty"] * a / b**2)
        assert result.multiplier == pytest.approx(reference.multiplier * a / b, rel=1e-3)
        np.testing.assert_allclose(result.coefficients, reference.coefficients, atol=1e-3)


def test_a_repaired_point_holds_the_bound_and_stays_in_the_domain():
    f, g = make(6)
    center = np.linalg.solve(g.q, g.c[..., None])[..., 0]  # where g is 0
    for domain in DOMAINS:
        bound = tight(f, g, domain)
        problem = ConstrainedQuadratic(f, g, bound, domain)
        options = {"max_iter": 40, "rounds": 1, "penalty": 0.01, "start": center}  # too soft to hold it
        before = solve_constrained(problem, "projected-gradient", **options)
        result = solve_constrained(problem, "projected-gradient", repair=True, **options)
        assert before.constraint > bound
        assert result.constraint <= bound
        assert result.violation == 0.0
        assert problem.domain.violation(result.coefficients).max() <= 1e-9
        assert result.repair["constraint_before"] == before.constraint
        assert result.repair["toward"] in {"start", "base"}
        # not further than needed: g comes back to the bound
        assert result.repair["share"] == 1.0 or result.constraint == pytest.approx(bound, abs=2e-6)
        assert result.gap != before.gap or domain == "free"


def test_without_a_point_that_holds_the_bound_nothing_is_repaired_but_the_base_counts():
    f, _ = make(7)
    rows, n = f.c.shape
    g = Quadratic(np.tile(np.eye(n), (rows, 1, 1)), np.zeros((rows, n)))  # ½ ‖Λ‖²: 0 at the base alone
    problem = ConstrainedQuadratic(f, g, 1e-3, "capped")
    result = solve_constrained(problem, "projected-gradient", rounds=1, max_iter=5, penalty=1e-3, repair=True)
    assert result.repair["toward"] == "base"
    assert result.constraint <= 1e-3
    lost = solve_constrained(
        ConstrainedQuadratic(f, g, 1e-3, "simplex"), "projected-gradient", rounds=1, max_iter=5, repair=True
    )
    assert lost.repair is None
    assert lost.violation > 0.0


def test_limits_and_the_callback_end_it_and_the_trace_says_in_which_round():
    f, g = make(0)
    bound = tight(f, g, "capped")
    seen = []
    result = solve_constrained(
        ConstrainedQuadratic(f, g, bound, "capped"), "frank-wolfe", max_iter=5, rounds=3, callback=seen.append
    )
    assert [line["outer"] for line in seen] == [0] * 6 + [1] * 6 + [2] * 6
    assert result.trace == seen
    assert [line["outer"] for line in result.history] == [0, 1, 2]
    assert result.nit == 15

    def stop(line):
        if line["outer"] == 1:
            raise StopIteration

    stopped = solve_constrained(
        ConstrainedQuadratic(f, g, bound, "capped"), "frank-wolfe", max_iter=5, rounds=3, callback=stop
    )
    assert stopped.status == "interrupted"
    assert len(stopped.history) == 2
    late = solve_constrained(ConstrainedQuadratic(f, g, bound, "capped"), "frank-wolfe", time_limit=0.0)
    assert late.status == "time_limit"
    assert len(late.history) == 1


def test_values_that_are_not_finite_end_it_at_the_last_good_point():
    f, g = make(0)
    problem = ConstrainedQuadratic(f, g, tight(f, g, "capped"), "capped")
    visits = []

    def broken(point):
        visits.append(point)
        value, slope = f(point)
        return (np.nan if len(visits) > 30 else value), slope

    problem.objective.f = broken
    result = solve_constrained(problem, "projected-gradient", max_iter=10, rounds=50, tol=0.0)
    assert result.status == "nonfinite"
    assert problem.domain.violation(result.coefficients).max() <= 1e-9


def test_what_cannot_be_solved_is_refused():
    f, g = make(0)
    problem = ConstrainedQuadratic(f, g, 0.1, "capped")
    for options, message in (
        ({"rounds": 0}, r"'rounds' parameter of solve_constrained must be an integer in \[1, inf\)"),
        ({"multiplier": -1.0}, "'multiplier' parameter"),
        ({"penalty": 0.0}, "'penalty' parameter"),
        ({"factor": 0.5}, "'factor' parameter"),
        ({"feasibility_tol": -1.0}, "'feasibility_tol' parameter"),
        ({"max_iter": -1}, "'max_iter' parameter"),
    ):
        with pytest.raises(OptionError, match=message):
            solve_constrained(problem, "frank-wolfe", **options)
    plain = FunctionProblem(f, *f.c.shape)
    with pytest.raises(OptionError, match="needs an objective with a constraint, AugmentedLagrangian"):
        solve_constrained(plain, "frank-wolfe")


@pytest.fixture
def network():
    """(model, base, experts, tasks): a small pool of networks, and data on which each expert is made for one task."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    base = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    rng = np.random.default_rng(3)
    experts = {
        f"e{i}": {k: t + torch.from_numpy(0.4 * rng.normal(size=t.shape).astype(np.float32)) for k, t in base.items()}
        for i in range(3)
    }
    model, tasks = ModuleModel(module), []
    for name in ("one", "two"):
        inputs = torch.from_numpy(rng.normal(size=(24, 6)).astype(np.float32))
        expert = experts["e0" if name == "one" else "e1"]
        labels = torch.func.functional_call(module, expert, inputs).argmax(1)
        tasks.append(Task(name, inputs, labels, tuple("abcd")))
    return model, base, experts, tasks


def merging(network, domain="capped", constraint="proximity", batch_size=None, share=0.3):
    """A merge of the pool that keeps g within a share of its value at the average."""
    model, base, experts, tasks = network
    pool = Pool.from_state_dicts(base, experts)
    if constraint == "proximity":
        keep = Proximity(base)
    else:
        teachers = {task.name: base for task in tasks}
        keep = Distillation(model, [task.without_labels() for task in tasks], teachers, batch_size, seed=1)
    average = pool.combine(np.full((1, 3), 1 / 3), pool.blocks("model"))
    bound = share * keep.value(average)
    return Problem(pool, AugmentedLagrangian(CrossEntropy(model, tasks, batch_size), keep, bound), "layer", domain)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name not in ("scan", "mgda")])
def test_every_solver_runs_inside_on_a_pool_and_the_record_is_exact(network, name):
    domain = "free" if name.startswith("released") else "capped"
    problem = merging(network, domain)
    options = {"adaptive": {"lr": 0.02}, "released-soft-frank-wolfe": {"inner_iterations": 20}}
    solver = {"name": name, **options.get(name, {})}
    result = solve_constrained(problem, solver, rounds=2, max_iter=4, repair=True)
    assert result.status in STATUSES
    lagrangian = problem.objective
    weights = problem.pool.combine(result.coefficients, problem.blocks)
    assert result.constraint == pytest.approx(lagrangian.constraint.value(weights), rel=1e-5)
    lagrangian.objective.draw(None)
    losses = lagrangian.objective.task_losses(weights)
    value = max(losses.values()) if name == "minimax" else lagrangian.objective.value(weights)
    assert result.objective == pytest.approx(value, rel=1e-5)
    assert result.violation == 0.0
    assert set(result.tasks) == {"one", "two"}


def test_retention_is_held_on_a_pool_and_costs_what_the_multiplier_says(network):
    results = [
        solve_constrained(merging(network, share=share), "projected-gradient", max_iter=150, tol=1e-4)
        for share in (0.29, 0.3, 0.31)
    ]
    for result in results:
        assert result.status == "optimal", result.message
        assert result.violation <= 1e-6
        assert result.multiplier > 0
    less, here, more = results
    slope = (less.objective - more.objective) / (more.bound - less.bound)
    assert slope == pytest.approx(here.multiplier, rel=0.05)


def test_the_multiplier_is_found_on_minibatches_too(network):
    exact = solve_constrained(
        merging(network, constraint="distillation"), "projected-gradient", rounds=12, max_iter=100, tol=1e-4
    )
    assert exact.status == "optimal"
    noisy = solve_constrained(
        merging(network, constraint="distillation", batch_size=12),
        {"name": "adaptive", "lr": 0.02, "schedule": "cosine"},
        rounds=8,
        max_iter=30,
        repair=True,
    )
    assert noisy.multiplier == pytest.approx(exact.multiplier, rel=0.2)
    assert noisy.violation == 0.0
    assert noisy.objective == pytest.approx(exact.objective, abs=0.01)


@pytest.mark.parametrize("constraint", ["proximity", "distillation"])
def test_minibatches_are_never_drawn_twice_and_the_result_is_exact_and_repeatable(network, constraint):
    results = []
    for _ in range(2):
        problem = merging(network, constraint=constraint, batch_size=5)
        drawn, draw = [], problem.objective.objective.draw

        def noted(iteration, drawn=drawn, draw=draw):
            drawn.append(iteration)
            draw(iteration)

        problem.objective.objective.draw = noted
        result = solve_constrained(
            problem, {"name": "adaptive", "lr": 0.05}, start="base", rounds=3, max_iter=20, repair=True
        )
        batches = [iteration for iteration in drawn if iteration is not None]
        assert batches == list(range(3 * 21))
        results.append(result)
        assert len({line["penalty"] for line in result.history}) == 1
        assert all(line["estimate"] for line in result.trace)
        problem.draw(None)
        evaluation = problem.objective.objective.value_and_grad(problem.weights(result.coefficients))
        assert result.objective == pytest.approx(evaluation.loss, rel=1e-5)
        assert result.constraint <= problem.objective.bound
    one, other = results
    assert np.array_equal(one.coefficients, other.coefficients)
    assert one.history == other.history


def test_a_result_is_kept_on_disk(network, tmp_path):
    result = solve_constrained(merging(network), "frank-wolfe", rounds=2, max_iter=3, repair=True)
    result.save(tmp_path)
    back = ConstrainedResult.load(tmp_path)
    assert np.array_equal(back.coefficients, result.coefficients)
    for name in ("constraint", "bound", "violation", "multiplier", "penalty", "history", "repair", "message"):
        assert getattr(back, name) == getattr(result, name)
    assert json.loads((tmp_path / "result.json").read_text())["described_objective"]["bound"] == result.bound


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("killed", [(0, 1), (1, 0), (1, 3)])
def test_a_killed_constrained_solve_goes_on_to_the_same_numbers(killed, stochastic, network, tmp_path):
    """Killed in a round, at its first iteration or later: rounds that ended are kept, and so is what the round did."""

    def run(folder, **options):
        problem = merging(network, "capped", batch_size=8 if stochastic else None)
        return solve_constrained(
            problem,
            {"name": "adaptive", "lr": 0.02},
            rounds=3,
            max_iter=4,
            tol=0,
            run=folder,
            checkpoint_every=2,
            **options,
        )

    def die(line):
        if (line["outer"], line["inner"]) == killed:
            raise RuntimeError("killed")

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", callback=die)
    assert not (tmp_path / "killed/result.json").exists()
    seen = []
    resumed = run(tmp_path / "killed", resume=True, callback=seen.append)
    assert seen[0]["outer"] == killed[0]
    np.testing.assert_array_equal(resumed.coefficients, whole.coefficients)
    assert resumed.counts["gradients"] == whole.counts["gradients"]
    assert resumed.data["gradient_samples"] == whole.data["gradient_samples"]
    assert (resumed.multiplier, resumed.constraint) == (whole.multiplier, whole.constraint)
    assert resumed.history == whole.history
    assert [line["value"] for line in resumed.trace] == [line["value"] for line in whole.trace]
    for name in ("whole", "killed"):
        lines = [json.loads(line) for line in (tmp_path / name / "trace.jsonl").read_text().splitlines()[1:]]
        assert [line["iteration"] for line in lines] == list(range(15))
        assert [line["outer"] for line in lines] == [k // 5 for k in range(15)]
    loaded = ConstrainedResult.load(tmp_path / "killed")
    assert (loaded.multiplier, loaded.history) == (whole.multiplier, whole.history)
    np.testing.assert_array_equal(Result.load(tmp_path / "killed").coefficients, whole.coefficients)


def test_a_resumed_constrained_solve_refuses_another_problem_and_rounds_that_are_used_up(network, tmp_path):
    def run(bound, **options):
        problem = merging(network, "capped")
        problem.objective.bound = bound
        return solve_constrained(problem, "projected-gradient", max_iter=2, tol=0, run=tmp_path, **options)

    run(0.01, rounds=1)
    with pytest.raises(OptionError, match="has done 1 rounds already"):
        run(0.01, rounds=1, resume=True)
    with pytest.raises(OptionError, match="belongs to another solve: constrained"):
        run(0.02, rounds=2, resume=True)
    assert [line["outer"] for line in run(0.01, rounds=2, resume=True).history] == [0, 1]
    with pytest.raises(OptionError, match="needs run=FOLDER"):
        solve_constrained(merging(network, "capped"), "projected-gradient", resume=True)


def test_ctrl_c_between_rounds_leaves_what_is_there():
    f, g = make(0)
    problem = ConstrainedQuadratic(f, g, tight(f, g, "capped"), "capped")
    values, original = [], problem.objective.constraint_value

    def pressed(point):
        values.append(point)
        if len(values) == 3:  # start, round 0, round 1
            raise KeyboardInterrupt
        return original(point)

    problem.objective.constraint_value = pressed
    result = solve_constrained(problem, "frank-wolfe", max_iter=5, rounds=9)
    assert result.status == "interrupted"
    assert len(result.history) == 1
