import numpy as np
import pytest
import torch
from mergesolve.solvers import OptionError, SoftmaxGradient, solve


@pytest.mark.parametrize("domain", ["simplex", "capped", "box"])
@pytest.mark.parametrize("method", ["adam", "sgd"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_equals_torch_on_the_logits(domain, method, temperature, face):
    """The same path as torch's optimizer with autograd through softmax (sigmoid on the box)."""
    quadratic, _ = face
    rows, n = quadratic.c.shape
    start = np.random.default_rng(0).dirichlet(np.ones(n + 1), rows)
    point = start[:, 1:] / (start[:, 1:].sum(axis=1, keepdims=True) if domain == "simplex" else 1.0)
    solver = SoftmaxGradient(lr=0.05, method=method, temperature=temperature)
    ours = solve(quadratic.problem(domain), solver, start=point, max_iter=20, tol=0).trace[-1]["coefficients"]
    shares = {"simplex": point, "capped": start, "box": point}[domain]
    log = np.log(shares) if domain != "box" else np.log(shares / (1 - shares))
    logits = torch.from_numpy(temperature * log).requires_grad_()
    cls = torch.optim.Adam if method == "adam" else torch.optim.SGD
    optimizer = cls([logits], lr=0.05, **({"momentum": 0.9} if method == "sgd" else {}))

    def merged():
        if domain == "box":
            return torch.sigmoid(logits / temperature)
        return torch.softmax(logits / temperature, dim=1)[:, (domain == "capped") :]

    q, c = torch.from_numpy(quadratic.q), torch.from_numpy(quadratic.c)
    for _ in range(20):
        optimizer.zero_grad()
        at = merged()
        (0.5 * torch.einsum("rn,rnm,rm->", at, q, at) - (c * at).sum()).backward()
        optimizer.step()
    np.testing.assert_allclose(ours, merged().detach().numpy(), atol=1e-9)


@pytest.mark.parametrize("domain", ["simplex", "capped", "box"])
def test_converges_to_cvxpys_optimum(domain, located):
    quadratic, _ = located
    solver = SoftmaxGradient(lr=0.2, schedule="cosine")
    result = solve(quadratic.problem(domain), solver, max_iter=1000, tol=0)
    assert result.objective - quadratic.optimum(domain) < 2e-3


def test_starts_on_the_boundary_are_moved_inside(face):
    begun = []
    solve(face[0].problem("capped"), SoftmaxGradient(), start="base", max_iter=1, tol=0, callback=begun.append)
    np.testing.assert_allclose(begun[0]["coefficients"], 0.01 / 7)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"mixing": 0}, {"lr": -1}, {"schedule": "step"}])
def test_bad_options_are_explained(options):
    with pytest.raises(OptionError, match="parameter of SoftmaxGradient must be"):
        SoftmaxGradient(**options)


def test_domains_without_logits_are_refused(face):
    with pytest.raises(OptionError, match="'free' has none"):
        solve(face[0].problem("free"), "softmax-gradient")
