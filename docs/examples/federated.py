"""A federation in one process: five clients whose labels are skewed, FedAvg against a solver as the server step.

The server of the second run holds 60 labelled images, and finds a coefficient for each client and layer on them: five
clients that each know a few digits must be added rather than averaged, and by how much is for the solver to say.
"""

import torch
from mergesolve.federated import (
    Accuracy,
    Federation,
    ServerData,
    TaskClient,
    Training,
    dirichlet,
    federate,
    make_step,
)
from mergesolve.objectives import ModuleModel, Task, evaluate
from sklearn.datasets import load_digits

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(labels))
names = [str(digit) for digit in range(10)]
few, train, test = (
    Task.from_arrays("digits", images[rows], labels[rows], names) for rows in order.split([60, 1200, 537])
)

network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
model, start = ModuleModel(network), network.state_dict()
training = Training(epochs=2, batch=32, lr=2e-3)
clients = [TaskClient(part.name, model, part, training) for part in dirichlet(train, 5, alpha=0.1, seed=0)]
data = ServerData(model, {client.name: few for client in clients[:1]})


def accuracy(weights: dict[str, torch.Tensor]) -> Accuracy:
    """Percent of the test images that are classified right."""
    return Accuracy({"digits": 100 * evaluate(model, weights, test)["digits"]})


for step in ("fedavg", {"name": "projected-gradient", "domain": "free", "max_iter": 20}):
    federation = Federation(clients, start, make_step(step), data=data, evaluate=accuracy)
    history = federate(federation, rounds=5)
    curve = "  ".join(f"{record['mean']:5.1f}" for record in history.records)
    print(f"{federation.step.describe()['name']:20s}{curve}")
