"""The Python interface, on the embedded zoo: merge the experts of four tasks from 100 labelled images a task."""

from mergesolve.objectives import CrossEntropy, evaluate
from mergesolve.pools import Pool
from mergesolve.solvers import FrankWolfe, Problem, solve
from mergesolve.zoo import load

zoo = load()
names = zoo.tasks[:4]
model = zoo.model()

pool = Pool.open(base=zoo.base, experts={name: zoo.experts[name] for name in names})
objective = CrossEntropy(model, [zoo.task(name, "train", limit=100) for name in names])
problem = Problem(pool, objective, blocks="layer", domain="capped")

result = solve(problem, FrankWolfe(step_rule="line-search"), start="average", max_iter=10)
print(result.status, f"loss {result.objective:.4f}, gap {result.gap:.2e}, {result.nit} iterations")

merged = pool.combine(result.coefficients, problem.blocks)
print(evaluate(model, merged, [zoo.task(name, "test") for name in names]))
pool.materialize(result.coefficients, problem.blocks, "merged.safetensors")
