import numpy as np
import pytest
from mergesolve.solvers import FunctionProblem, OptionError
from mergesolve.solvers.landscape import (
    Frame,
    Metric,
    Slice,
    barrier_of,
    barriers,
    feature_connectivity,
    layer_swap,
    losses_at,
    merging_gain,
    plane,
    segment,
)


def one_hot(problem, expert):
    point = np.zeros((problem.rows, problem.n))
    point[:, expert] = 1.0
    return point


def points_of(problem, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.dirichlet(np.ones(problem.n), problem.rows) for _ in range(3)]


def distance(problem, a, b):
    """‖θ(a) − θ(b)‖ by forming both, in float64."""
    first = problem.pool.combine(a, problem.blocks)
    second = problem.pool.combine(b, problem.blocks)
    return np.sqrt(sum(float(((first[k].double() - second[k].double()) ** 2).sum()) for k in first))


def hump(height):
    """27/4·h·t²(1−t): 0 at both ends, its maximum h at t = 2/3."""
    return FunctionProblem(lambda x: (27 / 4 * height * x[0, 0] ** 2 * (1 - x[0, 0]), np.zeros_like(x)), 1, 2, "free")


def test_refined_barrier_is_the_known_height_at_the_known_place():
    a, b = np.array([[0.0, 0.0]]), np.array([[1.0, 0.0]])
    coarse = segment(hump(3.0), a, b, grid=6).barrier
    fine = segment(hump(3.0), a, b, grid=6, refine=20).barrier
    assert coarse.height == pytest.approx(27 / 4 * 3 * 0.6**2 * 0.4)
    assert fine.height == pytest.approx(3.0, abs=1e-7)
    assert fine.at == pytest.approx(2 / 3, abs=1e-3)


def test_barrier_covers_the_whole_difference_and_ignores_a_slope():
    tilted = FunctionProblem(
        lambda x: (27 / 4 * x[0, 0] ** 2 * (1 - x[0, 0]) + 50 * x[0, 0] + 7, np.zeros_like(x)), 1, 1, "free"
    )
    found = segment(tilted, np.zeros((1, 1)), np.ones((1, 1)), grid=7, refine=20).barrier
    assert found.height == pytest.approx(1.0, abs=1e-6)


def test_symmetric_double_well_has_its_barrier_in_the_middle():
    well = FunctionProblem(lambda x: ((x[0, 0] ** 2 - 1) ** 2, np.zeros_like(x)), 1, 2, "free")
    found = segment(well, np.array([[-1.0, 0.0]]), np.array([[1.0, 0.0]]), grid=11).barrier
    assert (found.height, found.at, found.middle) == (pytest.approx(1.0), 0.5, pytest.approx(1.0))


@pytest.mark.parametrize("seed", range(5))
def test_convex_loss_has_no_barrier_and_is_not_refined(face, seed):
    quadratic, _ = face
    problem = quadratic.problem("simplex")
    a, b, _ = points_of(problem, seed)
    found = segment(problem, a, b, grid=9, refine=10)
    assert found.barrier.height <= 1e-12
    assert found.barrier.middle <= 0
    assert len(found.steps) == 9


def test_barrier_of_swapped_ends_is_the_same(merge):
    problem = merge(domain="free")
    a, b, _ = points_of(problem)
    there, back = segment(problem, a, b, grid=7), segment(problem, b, a, grid=7)
    np.testing.assert_allclose(there.values, back.values[::-1], rtol=1e-6)
    assert there.length == pytest.approx(back.length)
    wells = hump(2.0)
    a, b = np.array([[0.0, 0.0]]), np.array([[1.0, 0.0]])
    assert segment(wells, b, a, grid=6, refine=20).barrier.at == pytest.approx(1 / 3, abs=1e-3)


def test_barrier_of_a_curve_with_nan_is_infinite():
    assert barrier_of([0, 0.5, 1], [1.0, np.nan, 1.0]).height == np.inf


def test_segment_gives_the_losses_that_the_problem_gives_without_reading_more(merge):
    problem = merge(domain="free", backend="streaming")
    a, b, _ = points_of(problem)
    metric = Metric.of(problem)
    start = problem.pool.bytes_read
    segment(problem, a, b, grid=3, metric=metric)
    few = problem.pool.bytes_read - start
    found = segment(problem, a, b, grid=21, metric=metric)
    assert problem.pool.bytes_read - start == 2 * few
    for step, value in zip(found.steps, found.values, strict=True):
        assert value == pytest.approx(problem.value((1 - step) * a + step * b), rel=1e-5)


def test_segment_measures_weights_where_it_goes(merge):
    problem = merge(domain="free")
    a, b, _ = points_of(problem)
    found = segment(problem, a, b, grid=3, measure=lambda weights: {"sum": float(weights["head"].sum())})
    middle = problem.pool.combine((a + b) / 2, problem.blocks)
    assert found.measured["sum"][1] == pytest.approx(float(middle["head"].sum()), rel=1e-5)


class WithTasks:
    """An objective that gives losses by task without a gradient."""

    def __init__(self, objective):
        self._objective = objective

    def __getattr__(self, name):
        return getattr(self._objective, name)

    def task_losses(self, weights):
        return self._objective._losses(weights)


def test_tasks_add_up_to_the_loss_along_a_segment_and_have_their_own_barriers(merge):
    problem = merge(domain="free")
    problem.objective = WithTasks(problem.objective)
    a, b, _ = points_of(problem)
    found = segment(problem, a, b, grid=5)
    assert set(found.tasks) == {"left", "right"}
    np.testing.assert_allclose(found.values, np.mean(list(found.tasks.values()), axis=0))
    assert found.task_barriers["left"].height <= 1e-6


def test_pairs_of_points_are_all_connected_unless_some_are_named(merge):
    problem = merge(domain="free")
    points = {f"p{i}": point for i, point in enumerate(points_of(problem))}
    seen = []
    found = barriers(problem, points, grid=3, refine=0, progress=lambda *told: seen.append(told))
    assert list(found) == [("p0", "p1"), ("p0", "p2"), ("p1", "p2")]
    assert seen[-1] == ("", 3, 3)
    assert list(barriers(problem, points, [("p2", "p0")], grid=3, refine=0)) == [("p2", "p0")]


@pytest.mark.parametrize("grid", [2, 2.5, True])
def test_a_grid_needs_an_inside(merge, grid):
    problem = merge(domain="free")
    a, b, _ = points_of(problem)
    with pytest.raises(OptionError, match="grid must be an integer of at least 3"):
        segment(problem, a, b, grid=grid)


@pytest.mark.parametrize("blocks", ["model", "layer", "row"])
def test_plane_coordinates_keep_the_distances_of_the_weights(merge, blocks):
    problem = merge(blocks=blocks, domain="free")
    points = points_of(problem)
    frame = Frame.through(Metric.of(problem), *points)
    flat = [np.array(frame.project(point)) for point in points]
    for i in range(3):
        assert flat[i][2] == pytest.approx(0, abs=1e-5)
        for j in range(i):
            between = np.linalg.norm(flat[i][:2] - flat[j][:2])
            assert between == pytest.approx(distance(problem, points[i], points[j]), rel=1e-4)


def test_projection_leaves_what_is_orthogonal_to_the_plane(merge):
    problem = merge(domain="free")
    a, b, c = points_of(problem)
    metric = Metric.of(problem)
    frame = Frame.through(metric, a, b, c)
    other = one_hot(problem, 4)
    x, y, off = frame.project(other)
    assert x**2 + y**2 + off**2 == pytest.approx(distance(problem, a, other) ** 2, rel=1e-4)
    assert frame.project(a) == pytest.approx((0, 0, 0), abs=1e-9)


def test_plane_holds_the_losses_of_its_points(merge):
    problem = merge(domain="free")
    a, b, c = points_of(problem)
    found = plane(problem, a, b, c, grid=7, paths={"way": [a, (a + b) / 2]})
    cut = Slice(problem, a, *Frame.through(Metric.of(problem), a, b, c).axes)
    for point, (x, y) in zip((a, b, c), found.points, strict=True):
        assert cut.losses(x, y).total == pytest.approx(problem.value(point), rel=1e-5)
        assert found.x[0] < x < found.x[-1]
        assert found.y[0] < y < found.y[-1]
    assert found.values[2, 3] == pytest.approx(cut.losses(found.x[3], found.y[2]).total)
    np.testing.assert_allclose(found.paths["way"][1, :2], found.points[1] / 2, atol=1e-9)
    assert max(found.values.shape) == 7


def test_loss_on_a_plane_of_a_quadratic_is_the_quadratic_of_the_coordinates(face):
    """Along axes that are orthonormal in Λ, second differences of the grid are the curvatures Dᵀ Q D."""
    quadratic, _ = face
    problem = quadratic.problem("free")
    a, b, c = points_of(problem)
    found = plane(problem, a, b, c, grid=5)
    frame = Frame.through(Metric(None), a, b, c)
    curvature = np.einsum("rn,rnm,rm->", frame.axes[0], quadratic.q, frame.axes[0])
    second = (found.values[0, 2] - 2 * found.values[0, 1] + found.values[0, 0]) / (found.x[1] - found.x[0]) ** 2
    assert second == pytest.approx(curvature)


def test_points_on_a_line_have_no_plane(merge):
    problem = merge(domain="free")
    a, b, _ = points_of(problem)
    for three in ((a, b, 0.3 * a + 0.7 * b), (a, a, b), (a, b, a)):
        with pytest.raises(OptionError, match="lie on a line"):
            plane(problem, *three, grid=3)


def test_swapping_all_layers_gives_the_other_point_and_one_layer_what_is_said(merge):
    problem = merge(domain="free")
    a, b, _ = points_of(problem)
    found = layer_swap(problem, a, b)
    np.testing.assert_allclose(found.together[:, -1], found.ends[::-1], rtol=1e-5)
    assert found.layers == tuple(problem.layers)
    mixed = a.copy()
    mixed[1] = b[1]
    assert found.swapped[0, 1] == pytest.approx(problem.value(mixed), rel=1e-5)
    assert found.change[0, 1] == pytest.approx(problem.value(mixed) - problem.value(a), abs=1e-4)
    mixed[1] = (a[1] + b[1]) / 2
    assert found.halfway[0, 1] == pytest.approx(problem.value(mixed), rel=1e-5)


def test_layers_of_a_separable_convex_loss_change_it_independently_and_have_no_barriers(face):
    """The quadratic is a sum over rows, so changes add up to the difference of the ends."""
    quadratic, _ = face
    problem = quadratic.problem("free")
    a, b, _ = points_of(problem)
    found = layer_swap(problem, a, b)
    assert found.change[0].sum() == pytest.approx(found.ends[1] - found.ends[0])
    np.testing.assert_allclose(found.change[0], -found.change[1])
    assert (found.barrier <= 0).all()


def test_a_layer_of_several_rows_is_swapped_whole(merge):
    problem = merge(blocks="row", domain="free")
    a, b, _ = points_of(problem)
    found = layer_swap(problem, a, b)
    assert found.layers == ("head", "layers.0", "layers.1")
    mixed = a.copy()
    mixed[problem.layers["layers.0"]] = b[problem.layers["layers.0"]]
    assert found.swapped[0, 1] == pytest.approx(problem.value(mixed), rel=1e-5)


def test_features_of_a_linear_model_are_the_interpolated_ones():
    rng = np.random.default_rng(0)
    inputs, maps, weights = rng.normal(size=(20, 6)), rng.normal(size=(3, 6, 4)), np.array([0.2, 0.5, 0.3])
    features = np.einsum("sk,ikd->isd", inputs, maps)
    found = feature_connectivity(inputs @ np.einsum("i,ikd->kd", weights, maps), features, weights)
    assert (found.cosine, found.scale) == (pytest.approx(1), pytest.approx(1))
    assert found.distance == pytest.approx(0, abs=1e-12)
    expected = [np.mean([u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(
        np.einsum("i,isd->sd", weights, features), one, strict=True)]) for one in features]  # fmt: skip
    assert found.endpoints == pytest.approx(expected)


def test_features_that_differ_by_a_scale_only_have_cosine_one_and_that_scale():
    features = np.random.default_rng(1).normal(size=(2, 9, 5))
    found = feature_connectivity(1.5 * features.mean(axis=0), features, [0.5, 0.5])
    assert (found.cosine, found.scale, found.distance) == pytest.approx((1, 1.5, 0.5))


def test_feature_connectivity_does_not_depend_on_the_order_of_the_models():
    rng = np.random.default_rng(2)
    merged, features, weights = rng.normal(size=(7, 4)), rng.normal(size=(3, 7, 4)), rng.dirichlet(np.ones(3))
    order = [2, 0, 1]
    first = feature_connectivity(merged, features, weights)
    second = feature_connectivity(merged, features[order], weights[order])
    assert second.cosine == pytest.approx(first.cosine)
    assert second.endpoints == pytest.approx([first.endpoints[i] for i in order])


def test_features_of_other_shapes_are_refused():
    with pytest.raises(OptionError, match=r"expected \[samples, d\]"):
        feature_connectivity(np.ones((3, 2)), np.ones((2, 4, 2)), [0.5, 0.5])


@pytest.mark.parametrize("seed", range(4))
def test_gain_of_a_quadratic_is_half_the_spread_in_its_curvature(face, seed):
    """Σ w_i ℓ(θ_i) − ℓ(θ̄) = ½ Σ w_i ‖θ_i − θ̄‖²_H."""
    quadratic, _ = face
    problem = quadratic.problem("free")
    rng = np.random.default_rng(seed)
    points, weights = list(rng.normal(size=(4, problem.rows, problem.n))), rng.dirichlet(np.ones(4))
    average = np.einsum("i,irn->rn", weights, points)
    spread = sum(
        0.5 * w * np.einsum("rn,rnm,rm->", p - average, quadratic.q, p - average)
        for w, p in zip(weights, points, strict=True)
    )
    assert merging_gain(problem, points, weights).gain == pytest.approx(spread)


def test_gain_of_a_loss_with_unit_curvature_is_the_spread_of_the_weights(merge):
    problem = merge(domain="free")
    points = [one_hot(problem, i) for i in range(4)]
    found = merging_gain(problem, points)
    assert found.gain == pytest.approx(found.spread, rel=1e-4)
    assert found.merged == pytest.approx(losses_at(problem, np.mean(points, axis=0)).total)
    assert merging_gain(problem, points, values=[1.0, 2.0, 3.0, 4.0]).mean == 2.5


def test_gain_needs_weights_of_an_average(merge):
    problem = merge(domain="free")
    with pytest.raises(OptionError, match="nonnegative with sum 1"):
        merging_gain(problem, [one_hot(problem, 0), one_hot(problem, 1)], [0.5, 0.6])
