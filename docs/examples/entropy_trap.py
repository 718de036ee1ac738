"""The entropy trap on a plain network: coefficients that make predictions sure instead of right, and what guards.

Two experts on half of the digits each; 100 images without labels; coefficients without bounds.
"""

import torch
from mergesolve.objectives import Distillation, Entropy, ModuleModel, SumObjective, Task, calibrate
from mergesolve.pools import Pool
from mergesolve.solvers import AdaptiveGradient, Point, Problem, solve
from sklearn.datasets import load_digits

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
module = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


def trained(start: dict[str, torch.Tensor], samples: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """Weights after some steps of Adam on these samples."""
    module.load_state_dict(start)
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(images[samples]), labels[samples])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


train, classes = torch.arange(1200), tuple("0123456789")
base = trained(module.state_dict(), train, steps=15)
halves = {"low": train[labels[train] < 5], "high": train[labels[train] >= 5]}
experts = {name: trained(base, samples, steps=40) for name, samples in halves.items()}
pool, model = Pool.from_state_dicts(base, experts), ModuleModel(module)

few = [Task(name, images[samples[:50]], None, classes) for name, samples in halves.items()]
test = Task("digits", images[1200:], labels[1200:], classes, split="test")
objectives: dict[str, SumObjective] = {
    "average": Entropy(model, few),
    "entropy": Entropy(model, few),
    "entropy, logit_norm=5": Entropy(model, few, logit_norm=5.0),
    "distillation, 1000 mixed inputs": Distillation(model, [task.mixed(500) for task in few], experts),
}
print(f"{'':32s} accuracy  confidence   ECE  logit norm")
for name, objective in objectives.items():
    problem = Problem(pool, objective, blocks="tensor", domain="free")
    solver = Point() if name == "average" else AdaptiveGradient(lr=0.03)
    result = solve(problem, solver, start="average", max_iter=300)
    found = calibrate(model, problem.weights(result.coefficients), test)["digits"]
    shares = 100 * found.accuracy, 100 * found.confidence, 100 * found.ece
    print(f"{name:32s} {shares[0]:8.1f} {shares[1]:11.1f} {shares[2]:5.1f} {found.logit_norm:11.1f}")
