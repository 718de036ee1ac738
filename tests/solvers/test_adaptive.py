import itertools

import numpy as np
import pytest
import torch
from mergesolve.solvers import AdaptiveGradient, Clock, OptionError, solve


@pytest.mark.parametrize(
    ("solver", "reference"),
    [
        (AdaptiveGradient(lr=0.02), lambda p: torch.optim.Adam(p, lr=0.02)),
        (AdaptiveGradient(lr=0.02, momentum=0.5, decay=0.9), lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.5, 0.9))),
        (AdaptiveGradient(lr=0.02, method="sgd"), lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)),
        (AdaptiveGradient(lr=0.02, method="sgd", momentum=0.0), lambda p: torch.optim.SGD(p, lr=0.02)),
    ],
)
def test_equals_torch_on_the_free_domain(solver, reference, face):
    quadratic, _ = face
    ours = solve(quadratic.problem("free"), solver, max_iter=25, tol=0).trace[-1]["coefficients"]
    point = torch.full(quadratic.c.shape, 1 / quadratic.c.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = reference([point])
    for _ in range(25):
        point.grad = torch.from_numpy(quadratic(point.detach().numpy())[1])
        optimizer.step()
    np.testing.assert_allclose(ours, point.detach().numpy(), atol=1e-9)


def test_schedules_reach_zero_at_the_end():
    for schedule in ("cosine", "linear"):
        solver = AdaptiveGradient(lr=0.3, schedule=schedule)
        rates = [solver.rate(Clock(t, 100)) for t in range(101)]
        assert rates[0] == 0.3
        assert rates[50] == pytest.approx(0.15)
        assert rates[100] == pytest.approx(0, abs=1e-12)
        assert all(after <= before for before, after in itertools.pairwise(rates))
    assert AdaptiveGradient(lr=0.3).rate(Clock(70, 100)) == 0.3


@pytest.mark.parametrize("domain", ["simplex", "capped", "box"])
def test_converges_inside_the_domain(domain, located):
    quadratic, _ = located
    solver = AdaptiveGradient(lr=0.05, schedule="cosine")
    result = solve(quadratic.problem(domain), solver, max_iter=1500, tol=0)
    assert result.objective - quadratic.optimum(domain) < 1e-3


@pytest.mark.parametrize(
    "options",
    [{"lr": 0}, {"lr": float("inf")}, {"method": "lbfgs"}, {"schedule": "step"}, {"momentum": 1}, {"decay": -1}],
)
def test_bad_options_are_explained(options):
    with pytest.raises(OptionError, match="parameter of AdaptiveGradient must be"):
        AdaptiveGradient(**options)
