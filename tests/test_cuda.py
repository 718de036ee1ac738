"""The same solve on a GPU and on the CPU: skipped where there is no GPU."""

import numpy as np
import pytest
import torch
from mergesolve.objectives import CrossEntropy, ModuleModel, Task
from mergesolve.pools import Pool
from mergesolve.solvers import SOLVERS, Problem, solve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))


def result(device, backend, solver):
    base = network().state_dict()
    generator = torch.Generator().manual_seed(1)
    experts = {
        f"e{i}": {k: v + 0.3 * torch.randn(v.shape, generator=generator) for k, v in base.items()} for i in range(5)
    }
    inputs, labels = torch.randn(64, 8, generator=generator), torch.randint(3, (64,), generator=generator)
    task = Task.from_arrays("blobs", inputs, labels, classes=("a", "b", "c"))
    pool = Pool.from_state_dicts(base, experts, device=device, backend=backend)
    objective = CrossEntropy(ModuleModel(network().to(device)), task)
    return solve(Problem(pool, objective, "layer", "capped"), solver, max_iter=10, tol=0)


FAST = [name for name, cls in SOLVERS.items() if cls.promise != "none" and name != "corrective-frank-wolfe"]
"""Those whose steps are continuous in rounding; an inner solve ends an iteration sooner or later."""


@pytest.mark.parametrize("backend", ["streaming", "resident"])
@pytest.mark.parametrize("solver", [*FAST, "adaptive", "soft-frank-wolfe"])
def test_the_gpu_finds_the_merge_that_the_cpu_finds(backend, solver):
    cpu, gpu = result("cpu", backend, solver), result("cuda", backend, solver)
    np.testing.assert_allclose(gpu.coefficients, cpu.coefficients, atol=1e-3)
    assert gpu.objective == pytest.approx(cpu.objective, rel=1e-4)
    assert gpu.gap == pytest.approx(cpu.gap, abs=1e-4)
