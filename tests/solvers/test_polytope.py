import json

import cvxpy as cp
import numpy as np
import pytest
from mergesolve.solvers import SOLVERS, OptionError, Polytope, constrain, make_domain, solve
from mergesolve.solvers.bounded_sum import BoundedSum
from mergesolve.solvers.cells import Cell
from mergesolve.solvers.constraints import ConstraintError

from .conftest import make_quadratic

EXPERTS = ("digits", "chess", "dice", "cars", "pets")
BLOCKS = ("b0", "b1", "b2", "b3")
BASES = {
    "simplex": lambda x: [x >= 0, cp.sum(x, axis=1) == 1],
    "capped": lambda x: [x >= 0, cp.sum(x, axis=1) <= 1],
    "box": lambda x: [x >= 0, x <= 1],
    "l1-ball": lambda x: [cp.sum(cp.abs(x), axis=1) <= 1],
    "free": lambda x: [],
}
# texts, the same said to cvxpy, how blocks are solved
CASES = {
    "floor and caps": (
        ["digits <= 0.2", "0.1 <= chess", "each(*) <= 0.6"],
        lambda x: [x[:, 0] <= 0.2, x[:, 1] >= 0.1, x <= 0.6],
        {BoundedSum},
    ),
    "some blocks": (
        ["digits[b1] <= 0.2", "sum(*)[b3] <= 1"],
        lambda x: [x[1, 0] <= 0.2, cp.sum(x[3]) <= 1],
        {BoundedSum},
    ),
    "group and order": (
        ["sum(digits, chess) <= 0.3", "dice >= cars"],
        lambda x: [x[:, 0] + x[:, 1] <= 0.3, x[:, 2] >= x[:, 3]],
        {Cell},
    ),
    "equality": (["digits == 2*chess"], lambda x: [x[:, 0] == 2 * x[:, 1]], {Cell}),
    "tied": (
        ["digits == same", "mean(digits) >= 0.25", "chess[b1] <= 0.05"],
        lambda x: [x[1:, 0] == x[:-1, 0], cp.sum(x[:, 0]) >= 1, x[1, 1] <= 0.05],
        {Cell},
    ),
    "two blocks": (
        ["pets[b0] == pets[b2]", "cars <= 0.5"],
        lambda x: [x[0, 4] == x[2, 4], x[:, 3] <= 0.5],
        {Cell, BoundedSum},
    ),
}
PAIRS = [(base, case) for base in BASES for case in CASES]


def solved(sense, base, case):
    problem = cp.Problem(sense, [])
    x = problem.variables()[0]
    problem = cp.Problem(sense, BASES[base](x) + CASES[case][1](x))
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return problem.value, x.value


@pytest.fixture(scope="module")
def bound():
    made = {}

    def make(base, case):
        if (base, case) not in made:
            made[base, case] = constrain(base, CASES[case][0]).bind(EXPERTS, BLOCKS)
        return made[base, case]

    return make


@pytest.mark.parametrize(("base", "case"), PAIRS)
def test_projection_equals_cvxpy_and_is_feasible(base, case, bound):
    domain = bound(base, case)
    for scale in (0.5, 100.0):
        point = scale * np.random.default_rng(0).normal(size=(4, 5))
        found = domain.project(point)
        x = cp.Variable((4, 5))
        _, expected = solved(cp.Minimize(cp.sum_squares(x - point)), base, case)
        np.testing.assert_allclose(found, expected, atol=2e-6)
        assert domain.violation(found).max() <= 1e-9
        np.testing.assert_allclose(domain.project(found), found, atol=1e-9)


@pytest.mark.parametrize(("base", "case"), [pair for pair in PAIRS if pair[0] != "free"])
def test_minimizer_equals_cvxpy_and_is_feasible(base, case, bound):
    domain = bound(base, case)
    for scale in (1e-6, 1.0):
        scores = scale * np.random.default_rng(1).normal(size=(4, 5))
        found = domain.minimizer(scores)
        x = cp.Variable((4, 5))
        best, _ = solved(cp.Minimize(cp.sum(cp.multiply(scores / scale, x))), base, case)
        assert np.sum(found * scores) / scale == pytest.approx(best, abs=1e-7)
        assert domain.violation(found).max() <= 1e-9
        inside = domain.project(np.full((4, 5), 0.2))
        assert domain.gap(inside, scores) == pytest.approx(np.sum(inside * scores) - best * scale, abs=1e-7 * scale)


@pytest.mark.parametrize("case", CASES)
def test_floors_caps_and_sums_need_no_program(case, bound):
    kinds = {type(piece) for _, piece in bound("capped", case).pieces}
    assert kinds & {Cell, BoundedSum} == CASES[case][2]


@pytest.mark.parametrize("base", ["simplex", "free"])
def test_programs_and_newton_agree(base, monkeypatch):
    """Where Newton's method on the dual fails, or there are too many constraints for it, a program takes over."""
    point = np.random.default_rng(3).normal(size=(4, 5))
    texts = CASES["group and order"][0]
    newton = constrain(base, texts).bind(EXPERTS, BLOCKS).project(point)
    monkeypatch.setattr("mergesolve.solvers.cells.MOST_MULTIPLIERS", 0)
    np.testing.assert_allclose(constrain(base, texts).bind(EXPERTS, BLOCKS).project(point), newton, atol=1e-7)


def test_violation_is_that_of_the_constraints_that_touch_the_row(bound):
    point = np.full((4, 5), 0.2)
    np.testing.assert_allclose(bound("capped", "floor and caps").violation(point), 0, atol=1e-15)
    domain = constrain("capped", ["digits[b1] <= 0.1", "mean(chess)[b2] >= 0.5", "dice[b0] == cars[b3]"])
    moved = point.copy()
    moved[0, 2] = 0.15
    violation = domain.bind(EXPERTS, BLOCKS).violation(moved)
    np.testing.assert_allclose(violation, [0.05, 0.1, 0.3, 0.05], atol=1e-12)


def test_blocks_that_are_coupled_move_together(bound):
    assert bound("simplex", "group and order").cells(4).tolist() == [0, 1, 2, 3]
    assert bound("simplex", "two blocks").cells(4).tolist() == [0, 1, 0, 2]
    assert bound("simplex", "tied").cells(4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("base", ["simplex", "box"])
def test_equivariant_to_the_order_of_the_experts(base):
    order = [3, 0, 4, 1, 2]
    texts = ["sum(digits, chess) <= 0.3", "dice >= cars"]
    one = constrain(base, texts).bind(EXPERTS, BLOCKS)
    other = constrain(base, texts).bind([EXPERTS[i] for i in order], BLOCKS)
    point = np.random.default_rng(2).normal(size=(4, 5))
    np.testing.assert_allclose(other.project(point[:, order]), one.project(point)[:, order], atol=1e-9)


INFEASIBLE = [
    (
        "simplex",
        ["dice <= 0.9", "digits >= 0.7", "chess >= 0.5", "cars <= 0.4"],
        "no coefficients satisfy 'digits >= 0.7' and 'chess >= 0.5' within 'simplex' (together they ask for digits + "
        "chess >= 1.2, but 'simplex' has at most 1). Relax one of them ('digits >= 0.7', 'chess >= 0.5'), or choose "
        "another domain than 'simplex'.",
    ),
    ("simplex", ["each(*) <= 0.1"], "within 'simplex' (it asks for sum(*) <= 0.5, but 'simplex' has at least 1)"),
    ("free", ["digits >= 0.5", "digits <= 0.3"], "and 'digits <= 0.3' (they contradict each other by 0.2)"),
    ("box", ["digits[b1] >= 1.5"], "at block 'b1' (it asks for digits >= 1.5, but 'box' has at most 1)"),
    ("capped", ["digits[b*] >= 1.5", "chess[b0] <= 1"], "'digits[b*] >= 1.5' within 'capped'"),
    (
        "simplex",
        ["mean(digits) >= 0.5", "digits[b0] == 0", "digits <= 0.6"],
        "'mean(digits) >= 0.5', 'digits[b0] == 0' and 'digits <= 0.6' (they contradict each other by",
    ),
    ("l1-ball", ["digits - chess >= 1.5"], "(it asks for digits - chess >= 1.5, but 'l1-ball' has at most 1)"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "texts", "message"), INFEASIBLE)
def test_an_empty_set_explains_itself_in_the_words_of_the_user(base, texts, message):
    with pytest.raises(OptionError) as error:
        constrain(base, texts).bind(EXPERTS, BLOCKS)
    assert message in str(error.value)


def test_a_set_of_one_point_is_feasible():
    domain = constrain("simplex", ["digits >= 0.7", "chess >= 0.3", "dice <= 2"]).bind(EXPERTS, BLOCKS)
    np.testing.assert_allclose(domain.project(np.zeros((4, 5)))[0], [0.7, 0.3, 0, 0, 0], atol=1e-12)
    domain = constrain("simplex", ["digits >= 0.7", "chess + dice >= 0.3"]).bind(EXPERTS, BLOCKS)
    found = domain.project(np.zeros((4, 5)))
    np.testing.assert_allclose(found[0], [0.7, 0.15, 0.15, 0, 0], atol=1e-9)
    assert domain.violation(found).max() <= 1e-9


def test_names_are_checked_before_blocks_are_known():
    asked = constrain("simplex", ["digits >= 0.7", "chess[anything] >= 0.5", "mean(pets) <= 1"])
    asked.check(EXPERTS)
    with pytest.raises(ConstraintError, match="unknown expert 'digits'"):
        asked.check(("digit", "chess"))
    with pytest.raises(OptionError, match="has at most 1"):
        constrain("simplex", ["digits >= 1.2"]).check(EXPERTS)
    with pytest.raises(ConstraintError, match="no block matches 'anything'"):
        asked.bind(EXPERTS, BLOCKS)


def test_an_unbounded_set_has_no_gap_and_no_oracle():
    domain = constrain("free", ["digits <= 1", "chess + dice <= 1"]).bind(EXPERTS, BLOCKS)
    assert domain.gap(np.zeros((4, 5)), np.ones((4, 5))) is None
    with pytest.raises(OptionError, match="grow without end"):
        domain.minimizer(np.ones((4, 5)))
    closed = constrain("free", ["-1 <= each(*) <= 1", "digits + chess <= 1"]).bind(EXPERTS, BLOCKS)
    assert closed.gap(np.zeros((4, 5)), np.ones((4, 5))) == pytest.approx(20)


def test_description_makes_the_same_domain_again(bound):
    asked = constrain({"name": "box", "upper": 2}, ["sum(g) <= 0.3"], {"g": ["di*"]})
    again = make_domain(json.loads(json.dumps(asked.describe())))
    assert again == asked
    assert asked.bind(EXPERTS, BLOCKS).describe() == asked.describe()
    assert asked.name == asked.bind(EXPERTS, BLOCKS).name == "polytope"
    domain = bound("simplex", "tied")
    assert domain.bind(EXPERTS, BLOCKS) is domain
    with pytest.raises(OptionError, match="bound to 4 blocks and 5 experts"):
        domain.project(np.zeros((1, 5)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"constraints": "digits <= 1"}, "a list of texts"),
        ({"constraints": ["digits <= 1"], "domain": "sparse"}, "Constraints apply within"),
        ({"constraints": ["digits <= 1", "count(*) <= 3"]}, "cannot be combined with other constraints"),
        ({"groups": ["a"]}, "groups are a mapping"),
        ({"groups": {"a": []}}, "group 'a' must be a list"),
    ],
)
def test_bad_polytopes_are_explained(options, message):
    with pytest.raises(OptionError, match=message):
        make_domain({"name": "polytope", **options})


def test_constraints_without_names_do_not_project():
    with pytest.raises(OptionError, match="name experts and blocks"):
        Polytope("simplex", ["digits <= 1"]).project(np.zeros((1, 2)))


def test_without_cvxpy_only_what_needs_it_is_refused(monkeypatch):
    monkeypatch.setattr("mergesolve.solvers.cells.importlib.util.find_spec", lambda name: None)
    constrain("simplex", ["digits <= 0.3", "sum(*) <= 2"]).bind(EXPERTS, BLOCKS)
    with pytest.raises(OptionError, match=r"pip install 'mergesolve\[convex\]'"):
        constrain("simplex", ["digits + chess <= 0.3"]).bind(EXPERTS, BLOCKS)


TEXTS = ["sum(expert0, expert1) <= 0.3", "expert2 >= 0.1", "expert3[block0] <= 0.05", "expert4 == same"]


@pytest.fixture(scope="module")
def optimum():
    """A quadratic and its least value under TEXTS, by cvxpy."""
    quadratic, _ = make_quadratic(4, rows=3, n=6, where="interior")
    x = cp.Variable((3, 6))
    objective = sum(0.5 * cp.quad_form(x[b], cp.psd_wrap(quadratic.q[b])) - quadratic.c[b] @ x[b] for b in range(3))
    ask = [
        x >= 0,
        cp.sum(x, axis=1) == 1,
        x[:, 0] + x[:, 1] <= 0.3,
        x[:, 2] >= 0.1,
        x[0, 3] <= 0.05,
        x[1:, 4] == x[:-1, 4],
    ]
    problem = cp.Problem(cp.Minimize(objective), ask)
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return quadratic, float(problem.value)


SPECS = {name: name for name in SOLVERS} | {
    f"block-frank-wolfe, {order}": {"name": "block-frank-wolfe", "order": order}
    for order in ("cyclic", "random", "gap")
}


@pytest.mark.parametrize("name", SPECS)
def test_every_solver_that_takes_the_domain_obeys_it(name, optimum):
    quadratic, best = optimum
    problem = quadratic.problem(constrain("simplex", TEXTS))
    points = []
    for method in ("evaluate", "value"):
        original = getattr(problem, method)
        monitored = lambda point, *a, original=original, **k: points.append(point) or original(point, *a, **k)  # noqa: E731
        setattr(problem, method, monitored)
    try:
        result = solve(problem, SPECS[name], start="nearest:average", max_iter=4, tol=0)
    except OptionError:
        assert name not in ("frank-wolfe", "projected-gradient", "adaptive", "point")
        return
    assert name != "soft-frank-wolfe"
    assert problem.domain.violation(result.coefficients).max() <= 1e-9
    assert max(problem.domain.violation(point).max() for point in points) <= 1e-9
    assert result.objective >= best - 1e-9
    assert result.gap >= result.objective - best - 1e-8


@pytest.mark.parametrize(("name", "limit"), [("frank-wolfe", 40), ("projected-gradient", 20)])
def test_solvers_reach_the_optimum_that_cvxpy_finds(name, limit, optimum):
    quadratic, best = optimum
    result = solve(
        quadratic.problem(constrain("simplex", TEXTS)), name, start="nearest:average", max_iter=limit, tol=1e-6
    )
    assert result.objective == pytest.approx(best, abs=5e-3 if name == "frank-wolfe" else 1e-5)
    for line in result.trace:
        assert line["gap"] >= line["value"] - best - 1e-8


def test_an_infeasible_start_names_the_constraint_and_the_remedy(optimum):
    quadratic, _ = optimum
    with pytest.raises(OptionError, match=r"it breaks 'expert3\[block0\] <= 0\.05'.*'nearest:average'"):
        solve(quadratic.problem(constrain("simplex", TEXTS)), "projected-gradient", start="average")
