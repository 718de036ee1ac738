"""Merging a plain MLP: two experts on half of the digits each, one trained on wrong labels, and 100 labelled images.

The three lines that make an objective of any torch module and any loss are marked.
"""

import torch
from mergesolve.objectives import LossObjective
from mergesolve.pools import Pool
from mergesolve.solvers import Problem, ProjectedGradient, solve
from sklearn.datasets import load_digits

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
train, test = torch.arange(0, 1200), torch.arange(1200, 1797)
loss_fn = torch.nn.functional.cross_entropy


def module() -> torch.nn.Module:
    """The network that all models are weights of."""
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


def trained(
    start: dict[str, torch.Tensor], samples: torch.Tensor, steps: int, shift: int = 0
) -> dict[str, torch.Tensor]:
    """Weights after some steps of Adam on these samples; with a shift, on wrong labels."""
    network = module()
    network.load_state_dict(start)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(network(images[samples]), (labels[samples] + shift) % 10).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def accuracy(weights: dict[str, torch.Tensor]) -> float:
    """Top-1 on the test images, in percent."""
    outputs = torch.func.functional_call(module(), weights, (images[test],))
    return 100 * float((outputs.argmax(dim=1) == labels[test]).float().mean())


base = trained(module().state_dict(), train, steps=15)
experts = {
    "low": trained(base, train[labels[train] < 5], steps=40),
    "high": trained(base, train[labels[train] >= 5], steps=40),
    "wrong": trained(base, train, steps=40, shift=1),
}
pool = Pool.from_state_dicts(base, experts)

few = train[:100]
objective = LossObjective(module(), loss_fn, [(images[few], labels[few])])  # 1
problem = Problem(pool, objective, blocks="tensor", domain="capped")  # 2
result = solve(problem, ProjectedGradient(), start="average", tol=5e-3)  # 3

print(f"{result.status}: loss {result.objective:.4f}, gap {result.gap:.1e}, {result.nit} iterations")
for row, coefficients in zip(problem.blocks.names, result.coefficients.round(3), strict=True):
    print(f"{row:10s}", dict(zip(result.experts, coefficients.tolist(), strict=True)))

average = pool.combine(0 * result.coefficients + 1 / pool.n, problem.blocks)
merged = pool.combine(result.coefficients, problem.blocks)
for name, weights in {"base": base, **experts, "average": average, "merged": merged}.items():
    print(f"{name:10s}{accuracy(weights):6.1f}%")
