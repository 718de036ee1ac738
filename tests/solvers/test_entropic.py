import numpy as np
import pytest
from mergesolve.solvers import Box, Capped, Free, OptionError, Simplex
from mergesolve.solvers.entropic import coordinates

DOMAINS = [Simplex(), Capped(), Box(), Box(-0.5, 2.0)]


def inside(domain, rows=4, n=5, seed=0):
    rng = np.random.default_rng(seed)
    if isinstance(domain, Box):
        return rng.uniform(domain.lower, domain.upper, (rows, n))
    shares = rng.dirichlet(np.ones(n + 1), rows)[:, 1:]
    return shares / shares.sum(axis=1, keepdims=True) if isinstance(domain, Simplex) else shares


@pytest.mark.parametrize("domain", DOMAINS)
def test_leaving_undoes_entering_and_huge_coordinates_stay_feasible(domain):
    space, point = coordinates("Test", domain), inside(domain)
    np.testing.assert_allclose(space.leave(space.normalized(space.enter(point))), point, atol=1e-14)
    u = space.enter(point)
    wild = space.normalized(1e4 * np.random.default_rng(1).normal(size=u.shape))
    assert domain.violation(space.leave(wild)).max() <= 1e-12
    assert np.isfinite(wild).all()


@pytest.mark.parametrize("domain", DOMAINS)
def test_gradient_is_the_finite_difference_through_the_coordinates(domain):
    space, point = coordinates("Test", domain), inside(domain)
    scores = np.random.default_rng(2).normal(size=point.shape)
    u = space.normalized(space.enter(point))
    found = space.gradient(u, scores)
    for index in np.ndindex(u.shape):
        shift = np.zeros_like(u)
        shift[index] = 1e-5
        ahead, behind = (np.sum(scores * space.leave(space.normalized(u + sign * shift))) for sign in (1, -1))
        assert found[index] == pytest.approx((ahead - behind) / 2e-5, abs=1e-8)


@pytest.mark.parametrize("domain", DOMAINS)
def test_divergence_is_bregmans_of_the_entropy(domain):
    """D(x, y) = φ(x) − φ(y) − ⟨∇φ(y), x − y⟩ with φ of the module's table, written out in float64."""

    def shares(point):
        if isinstance(domain, Box):
            return np.stack([point - domain.lower, domain.upper - point])
        return np.stack([point, *([1 - point.sum(axis=1, keepdims=True) + 0 * point] if domain.has_base else [])])

    def phi(point):
        parts = shares(point)
        if domain.has_base:
            return np.sum(parts[0] * np.log(parts[0])) + np.sum((parts[1] * np.log(parts[1]))[:, 0])
        return np.sum(parts * np.log(parts))

    def slope(point):
        parts = np.log(shares(point))
        return parts[0] - parts[1] if len(parts) == 2 else parts[0]

    space, one, other = coordinates("Test", domain), inside(domain, seed=3), inside(domain, seed=4)
    expected = phi(one) - phi(other) - np.sum(slope(other) * (one - other))
    u, v = (space.normalized(space.enter(point)) for point in (one, other))
    assert space.divergence(u, v) == pytest.approx(expected, rel=1e-10)
    assert space.divergence(u, u) == 0


@pytest.mark.parametrize("domain", DOMAINS)
def test_only_rows_on_the_boundary_are_moved_inside(domain):
    space, point = coordinates("Test", domain), inside(domain)
    assert space.interior(point, 0.1) is point
    corner = point.copy()
    corner[1] = domain.minimizer(np.arange(5.0)[None] - 2)[0]
    moved = space.interior(corner, 0.1)
    np.testing.assert_array_equal(moved[[0, 2, 3]], point[[0, 2, 3]])
    assert domain.violation(moved).max() <= 1e-12
    assert np.isfinite(space.enter(moved)).all()
    assert 0 < np.abs(moved[1] - corner[1]).max() <= 0.1 * np.ptp(getattr(domain, "upper", 1.0) - corner[1] + 1) + 0.25


def test_other_domains_are_refused_with_the_reason():
    with pytest.raises(OptionError, match=r"Mirror descent moves in the entropy's coordinates.*'free' has none"):
        coordinates("Mirror descent", Free())
