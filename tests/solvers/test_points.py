import numpy as np
import pytest
from mergesolve.pools.transforms import make_transform
from mergesolve.solvers import PRESETS, OptionError, Scan, make_domain, make_solver, solve, start_point


def test_named_points(merge):
    problem = merge("layer")
    assert (start_point(problem, "average") == 0.2).all()
    assert (start_point(problem, "base") == 0).all()
    assert (start_point(problem, "task-arithmetic:-0.3") == -0.3).all()
    np.testing.assert_array_equal(start_point(problem, "expert:e2"), np.tile(np.eye(5)[2], (problem.rows, 1)))
    np.testing.assert_array_equal(start_point(problem, np.full((1, 5), 0.1)), np.full((problem.rows, 5), 0.1))


def test_an_expert_as_point_has_the_weights_of_that_expert(merge, states):
    problem = merge("tensor")
    for name, tensor in problem.weights(start_point(problem, "expert:e3")).items():
        np.testing.assert_allclose(tensor, states[1]["e3"][name], atol=1e-6)


def test_scan_returns_the_best_scale_of_the_grid(merge):
    grid = (0.05, 0.1, 0.2, 0.35, 0.6)
    result = solve(merge("model", "free"), Scan(scales=grid), start="base", max_iter=len(grid), tol=0)
    by_hand = {scale: merge("model", "free").value(np.full((1, 5), scale)) for scale in (0.0, *grid)}
    assert result.coefficients[0, 0] == min(by_hand, key=by_hand.__getitem__)
    assert result.objective == pytest.approx(min(by_hand.values()), rel=1e-5)


def test_scan_goes_through_the_whole_grid_also_from_a_point_of_it(merge):
    result = solve(merge("model", "free"), Scan(scales=(0.0, 0.1, 0.3)), start="base", tol=0)
    assert [line["step"] for line in result.trace[:3]] == [0.0, 0.1, 0.3]
    assert (result.status, result.nit) == ("stalled", 3)


def test_scan_refuses_minibatches_whose_values_do_not_compare(merge):
    with pytest.raises(OptionError, match=r"Scan compares values of different iterations.*Leave out .*batch_size"):
        solve(merge("model", "free", stochastic=True), Scan(scales=(0.1, 0.3)), start="base")


def test_scan_refuses_scales_outside_the_domain(merge):
    with pytest.raises(OptionError, match=r"scale 0.5 of the scan is outside the domain 'capped'"):
        solve(merge("model", "capped"), Scan(scales=(0.1, 0.5)), start="base")
    for scales in ((), "0.1", ("a",)):
        with pytest.raises(OptionError, match="'scales' parameter"):
            Scan(scales=scales)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_things_that_exist_and_fit(name, merge):
    preset = PRESETS[name]
    assert set(preset) - {"pool", "mixed"} == {
        "summary",
        "objective",
        "blocks",
        "domain",
        "solver",
        "start",
        "max_iter",
    }
    assert all(make_transform(spec) for spec in preset.get("pool", {}).get("transforms", ()))
    solver = dict(preset["solver"])
    if solver["name"].endswith("soft-frank-wolfe"):
        solver["inner_iterations"] = 2
    result = solve(
        merge(preset["blocks"], make_domain(preset["domain"])),
        make_solver(solver),
        start=preset["start"],
        max_iter=min(3, preset["max_iter"]),
    )
    assert np.isfinite(result.objective)
