"""The tables and figures of the FW-Merging paper, on the embedded zoo, with equal budgets and three seeds.

    python benchmarks/paper_tables.py table2    20 experts, 4 tasks: every row of its table 2, and controls
    python benchmarks/paper_tables.py table3    relevant and irrelevant experts are added (table 3, figures 1a and 1b)
    python benchmarks/paper_tables.py table5    hard or soft, task-wise or layer-wise, weights optimized or not
    python benchmarks/paper_tables.py figure1c  a mis-initialized expert joins the pool
    python benchmarks/paper_tables.py figure3   scores of the oracle: does a task's own expert have the lowest?
    python benchmarks/paper_tables.py figure4   starting points (4a) and merge functions (4b)

A method with data sees the same 100 training images a task (the seed draws them) and forwards at most so many samples,
gradients and values together: 5000 a task, in table 3 with 20 evaluation tasks 2000. Accuracies are top-1 in percent on
1000 test images a task, 500 where there are 20 tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from mergesolve.objectives import CrossEntropy, Entropy, Task, evaluate, fisher_diagonal, fit_surgery, grams
from mergesolve.pools import Pool, Statistics, Weights
from mergesolve.pools.transforms import make_transform
from mergesolve.solvers import Problem, SoftFrankWolfe, make_domain, make_solver
from mergesolve.solvers.closed_form import make_merge, merge_weights
from mergesolve.solvers.concrete import Concrete, concrete_merge
from mergesolve.solvers.domains import indicator
from mergesolve.solvers.loop import iterate
from mergesolve.solvers.points import start_point
from mergesolve.zoo import Zoo, load
from study import Found, collect, markdown, options, put, run_all, spread

PAGE = Path(__file__).parents[1] / "docs" / "paper-tables.md"
SIZES = (4, 12, 20)


@dataclass(frozen=True)
class Setting:
    """One run: a closed-form `merge`, or a `solver` on a domain of blocks, with labels or entropy as the objective.

    start: of the solver; "adamerging" is the result of AdaMerging with half of the budget. inputs: "labelled" (the 100
    images) or "test" (transductive). unoptimized: soft Frank-Wolfe with equal weights, γ = 2/(t + 2). ties: the pool's
    task vectors are trimmed and their signs elected. size: experts in the pool, the evaluation tasks' first. noisy: the
    mis-initialized expert joins. relevant: evaluate on all 20 tasks.
    """

    merge: Any = None
    solver: Any = None
    blocks: str = "layer"
    domain: Any = "capped"
    objective: str = "labels"
    inputs: str = "labelled"
    start: str = "average"
    unoptimized: bool = False
    ties: bool = False
    extra: str = ""
    size: int = 20
    noisy: bool = False
    relevant: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


SOFT = {"name": "soft-frank-wolfe", "oracle": "task-wise", "inner_iterations": 12}
ADAM = {"name": "adaptive", "lr": 1e-3}
ADAMERGING = Setting(solver=ADAM, blocks="tensor", domain="free", objective="entropy")
FW_SOFT = Setting(solver=SOFT, blocks="tensor", start="base")
FW_HARD = Setting(solver="frank-wolfe")
CONTROL = Setting(solver="projected-gradient", blocks="tensor")
AVERAGE = Setting(merge="average")
ARITHMETIC = Setting(merge={"name": "task-arithmetic", "scale": 0.3})
TIES = Setting(merge={"name": "ties", "density": 0.2, "scale": 0.3})
DARE = Setting(merge={"name": "dare-ties", "density": 0.2, "scale": 0.3})

TABLE2: dict[str, Setting] = {
    "pretrained": Setting(merge="base"),
    "DARE (TIES)": DARE,
    "task arithmetic 0.3": ARITHMETIC,
    "TIES": TIES,
    "weight average": AVERAGE,
    "Fisher": Setting(merge={"name": "fisher", "normalize": True, "floor": 1e-6}),
    "RegMean": Setting(merge="regmean"),
    "layer-wise Concrete AdaMerging": replace(ADAMERGING, extra="concrete"),
    "AdaMerging from 0.3, on test inputs (as published)": replace(
        ADAMERGING, inputs="test", start="task-arithmetic:0.3"
    ),
    "AdaMerging from 1/n, on test inputs": replace(ADAMERGING, inputs="test"),
    "AdaMerging from 1/n, on the 100 images": ADAMERGING,
    "Surgery on AdaMerging from 1/n, on test inputs": replace(ADAMERGING, inputs="test", extra="surgery"),
    "Surgery on AdaMerging from 1/n, on the 100 images": replace(ADAMERGING, extra="surgery"),
    "FW hard (layer-wise oracle)": FW_HARD,
    "FW soft (task-wise oracle)": FW_SOFT,
    "control: task arithmetic, scale scanned on the labels": Setting(solver="scan", blocks="model", domain="free"),
    "control: projected gradient, tensors": CONTROL,
    "control: Adam on the labels, tensors, free": replace(
        CONTROL, solver={"name": "adaptive", "lr": 0.01}, domain="free"
    ),
}
SCALED: dict[str, Setting] = {
    "DARE (TIES)": DARE,
    "task arithmetic 0.3": ARITHMETIC,
    "TIES": TIES,
    "weight average": AVERAGE,
    "AdaMerging from 1/n": ADAMERGING,
    "FW soft": FW_SOFT,
    "projected gradient": CONTROL,
}
TABLE3: dict[str, Setting] = {
    f"{kind}: {name}, {size}": replace(setting, size=size, relevant=kind == "relevant")
    for kind in ("irrelevant", "relevant")
    for name, setting in SCALED.items()
    for size in SIZES
}
TABLE5: dict[str, Setting] = {
    "optimized, FW soft, layer-wise": replace(FW_SOFT, solver={**SOFT, "oracle": "layer-wise"}),
    "optimized, FW soft, task-wise": FW_SOFT,
    "unoptimized, FW soft, layer-wise": replace(FW_SOFT, solver={**SOFT, "oracle": "layer-wise"}, unoptimized=True),
    "unoptimized, FW soft, task-wise": replace(FW_SOFT, unoptimized=True),
    "FW hard, layer-wise": FW_HARD,
    "FW hard, task-wise": replace(FW_HARD, blocks="model"),
}
FIGURE1C: dict[str, Setting] = {
    f"{name}{', and the mis-initialized expert' if noisy else ''}": replace(setting, noisy=noisy)
    for name, setting in {
        "task arithmetic 0.3": ARITHMETIC,
        "TIES": TIES,
        "weight average": AVERAGE,
        "FW hard": FW_HARD,
        "FW soft": FW_SOFT,
        "projected gradient": CONTROL,
    }.items()
    for noisy in (False, True)
}
FIGURE4: dict[str, Setting] = {
    **{
        f"4a: {name} from {label}": replace(setting, start=start)
        for name, setting in {"FW hard": FW_HARD, "FW soft": FW_SOFT}.items()
        for label, start in {
            "the base": "base",
            "the average": "average",
            "AdaMerging": "adamerging",
        }.items()
    },
    **{
        f"4a: FW hard as released, from {label}": Setting(
            solver="released-frank-wolfe", blocks="model", domain="free", start=start
        )
        for label, start in {"the base": "base", "task arithmetic 0.3": "task-arithmetic:0.3"}.items()
    },
    "4b: TIES alone": TIES,
    "4b: FW hard, task vectors": FW_HARD,
    "4b: FW hard, task vectors as TIES leaves them": replace(FW_HARD, ties=True),
    "4b: FW soft, task vectors": FW_SOFT,
    "4b: FW soft, task vectors as TIES leaves them": replace(FW_SOFT, ties=True),
}
FIGURE3: dict[str, Setting] = {
    "at the base": Setting(solver="point", blocks="model", start="base", options={"scores": True}),
    "at the average": Setting(solver="point", blocks="model", options={"scores": True}),
}
STUDIES = {
    "table2": TABLE2,
    "table3": TABLE3,
    "table5": TABLE5,
    "figure1c": FIGURE1C,
    "figure3": FIGURE3,
    "figure4": FIGURE4,
}


@cache
def zoo() -> Zoo:
    """The embedded benchmark."""
    return load()


def names_of(setting: Setting) -> tuple[list[str], list[str]]:
    """The evaluation tasks, and the experts in the pool."""
    four = list(zoo().tasks[::6])
    twenty = [*four, *[name for name in zoo().tasks if name not in four][:16]]
    return (twenty if setting.relevant else four), twenty[: setting.size]


def pool_of(setting: Setting, experts: Sequence[str]) -> Pool:
    """The pool, the mis-initialized expert last."""
    names = [*experts, *(["misinitialized"] if setting.noisy else [])]
    pool = Pool.open(base=zoo().base, experts={name: zoo().experts[name] for name in names})
    if setting.ties:
        trimmed = pool.transform(make_transform({"name": "trim", "density": 0.2, "per": "model"}))
        return trimmed.transform(make_transform("elect"))
    return pool


def images(setting: Setting, name: str, seed: int) -> Task:
    """What a method sees of a task: 100 labelled training images, or the test images without their labels."""
    if setting.inputs == "test":
        return zoo().task(name, "test").without_labels()
    return zoo().task(name).subset(100, seed)


def objective_of(setting: Setting, names: Sequence[str], seed: int) -> Any:
    """Cross-entropy on all labels at once, or on batches of 16 where the solver is made for batches; or entropy."""
    model, tasks = zoo().model(), [images(setting, name, seed) for name in names]
    if setting.objective == "entropy":
        return Entropy(model, [task.without_labels() for task in tasks], 16, seed=seed)
    return CrossEntropy(model, tasks, 16 if "adaptive" in str(setting.solver) else None, seed=seed)


def closed_form(setting: Setting, pool: Pool, seed: int) -> tuple[Weights, int]:
    """The merged weights, and the samples that their statistics took."""
    if setting.merge == "base":
        return pool.base_weights(), 0
    options = {"name": setting.merge} if isinstance(setting.merge, str) else dict(setting.merge)
    if options["name"] == "dare-ties":
        options["seed"] = seed
    merge, model = make_merge(options), zoo().model()
    if merge.statistics is None:
        return merge_weights(pool, merge, None), 0
    measure = fisher_diagonal if merge.statistics == "fisher" else grams
    found = {}
    for name in pool.names:
        weights = pool.subset([name]).combine(np.ones((1, 1)), pool.blocks("model"))
        found[name] = measure(model, weights, zoo().task(name).subset(100, seed), seed=seed)
    statistics = Statistics.from_tensors(
        pool,
        merge.statistics,
        {name: one.tensors for name, one in found.items()},
        axes=next(iter(found.values())).axes,
        rows={name: one.rows for name, one in found.items()},
    )
    return merge_weights(pool, merge, statistics), 100 * len(pool.names)


def starting_point(setting: Setting, problem: Problem, names: Sequence[str], seed: int, budget: int) -> np.ndarray:
    """Λ at the start; that of AdaMerging has a row a tensor, whose means over the layers a layer-wise start takes."""
    if setting.start != "adamerging":
        return start_point(problem, setting.start)
    found = descend(replace(ADAMERGING, domain="capped"), problem.pool, names, seed, budget)[0]
    if problem.blocks.kind == "tensor":
        return found
    tensors = problem.pool.blocks("tensor")
    return make_domain(setting.domain).project(np.array([found[rows].mean(axis=0) for rows in tensors.layers.values()]))


def descend(
    setting: Setting, pool: Pool, names: Sequence[str], seed: int, budget: int
) -> tuple[np.ndarray, Problem, dict[str, Any]]:
    """Run the solver until the samples are used up: coefficients (the best, on batches the last), problem, ledger."""
    objective = objective_of(setting, names, seed)
    problem = Problem(pool, objective, setting.blocks, setting.domain)
    half = budget // 2
    start = starting_point(setting, problem, names, seed, half)
    budget = half if setting.start == "adamerging" else budget
    if setting.unoptimized:
        return unoptimized(setting, problem, start, budget)
    solver = make_solver(setting.solver)
    best, lowest = start, np.inf
    for visit in iterate(problem, solver, solver.init(problem, start), max_iter=10_000, tol=0):
        if problem.stochastic or visit.evaluation.value < lowest:
            best, lowest = visit.state.coefficients, visit.evaluation.value
        if visit.step is not None and objective.data_used["samples_seen"] >= budget:
            last = visit.step.state.coefficients
            if problem.stochastic or problem.value(last) < lowest:
                best = last
            break
    used = {"iterations": visit.iteration, "samples": objective.data_used["samples_seen"], "gap": visit.certificate.gap}
    return best, problem, used


def unoptimized(
    setting: Setting, problem: Problem, point: np.ndarray, budget: int
) -> tuple[np.ndarray, Problem, dict[str, Any]]:
    """Soft Frank-Wolfe whose vertices all get the same weight: Λ ← Λ + γ (mean_j V_j − Λ), γ = 2/(t + 2)."""
    solver = make_solver(setting.solver)
    assert isinstance(solver, SoftFrankWolfe)
    best, lowest, iteration = point, np.inf, 0
    while True:
        evaluation = problem.evaluate(point, tasks=True)
        if evaluation.value < lowest:
            best, lowest = point, evaluation.value
        if problem.objective.data_used["samples_seen"] >= budget:
            break
        chosen = solver.choose(problem, evaluation)
        middle = np.mean([indicator(rows, problem.n) for rows in chosen], axis=0)
        point = point + 2 / (iteration + 2) * (middle - point)
        iteration += 1
    used = {"iterations": iteration, "samples": problem.objective.data_used["samples_seen"], "gap": None}
    return best, problem, used


def run(study: str, row: str, seed: int) -> dict[str, Any]:
    """One row with one seed."""
    setting = STUDIES[study][row]
    names, experts = names_of(setting)
    pool, model = pool_of(setting, experts), zoo().model()
    budget = (2000 if setting.relevant else 5000) * len(names)
    tests = [zoo().task(name, "test", limit=500 if setting.relevant else None) for name in names]
    found: dict[str, Any] = {}
    if setting.options.get("scores"):
        return oracle(setting, pool, names, seed)
    if setting.merge is not None:
        weights, found["samples"] = closed_form(setting, pool, seed)
    elif setting.extra == "concrete":
        # A step for the mask takes two gradients, one for the coefficients takes one: a third of the budget each time.
        steps = budget // (16 * len(names)) // 3
        concrete = Concrete(
            iterations=steps, lr=0.05, scale=1 / pool.n, inner_lr=0.1, merge_iterations=steps, merge_lr=1e-3, seed=seed
        )
        objective = objective_of(setting, names, seed)
        with TemporaryDirectory() as folder:
            result = concrete_merge(
                pool, objective, Path(folder) / "mask.safetensors", blocks=setting.blocks, options=concrete
            )
            weights = result.pool.combine(result.result.coefficients, result.pool.blocks(setting.blocks))
        found["samples"] = 16 * len(names) * result.gradients
    elif setting.extra == "surgery":
        point, problem, used = descend(setting, pool, names, seed, budget // 2)
        weights = problem.weights(point)
        teachers = {name: pool.subset([name]).combine(np.ones((1, 1)), pool.blocks("model")) for name in names}
        steps = budget // (32 * len(names))
        data = [images(setting, name, seed).without_labels() for name in names]
        model = fit_surgery(model, weights, teachers, data, iterations=steps, batch_size=16, seed=seed)
        found["samples"] = used["samples"] + 16 * len(names) * steps
    else:
        point, problem, used = descend(setting, pool, names, seed, budget)
        weights = problem.weights(point)
        found.update(used)
    scores = evaluate(model, weights, tests)
    return {
        **found,
        "tasks": {name: 100 * value for name, value in scores.items()},
        "mean": 100 * scores.mean,
        "worst": 100 * scores.worst,
    }


def oracle(setting: Setting, pool: Pool, names: Sequence[str], seed: int) -> dict[str, Any]:
    """Scores ⟨∇loss_t, τ_i⟩ of each task and expert [tasks][experts], and the rank of the task's own expert."""
    problem = Problem(pool, objective_of(setting, names, seed), "model", "capped")
    tables = problem.evaluate(start_point(problem, setting.start), tasks=True).task_scores
    assert tables is not None
    scores = {
        name: dict(zip(pool.names, table[0].tolist(), strict=True)) for name, table in zip(names, tables, strict=True)
    }
    ranks = {name: 1 + sum(other < found[name] for other in found.values()) for name, found in scores.items()}
    return {"scores": scores, "ranks": ranks, "first": 100 * float(np.mean([rank == 1 for rank in ranks.values()]))}


def rows_as_they_are(rows: Sequence[str], found: Found) -> str:
    """A line a row: each task, their mean, the samples forwarded."""
    names = list(next(iter(found[next(iter(found))].values()))["tasks"])
    lines = []
    for row in rows:
        if row not in found:
            continue
        seeds = list(found[row].values())
        cells = [f"{np.mean([one['tasks'][name] for one in seeds]):.1f}" for name in names]
        mean = spread([one["mean"] for one in seeds])
        samples = np.mean([one.get("samples", 0) for one in seeds]) / 1000
        lines.append([row, *cells, mean, f"{samples:.1f} k" if samples else "–", str(len(seeds))])
    return markdown(["", *names, "mean", "samples", "seeds"], lines)


def table3(rows: Sequence[str], found: Found) -> str:
    """Methods × sizes of the pool, once for irrelevant and once for relevant experts."""
    texts = []
    for kind, what in (
        ("irrelevant", "4 evaluation tasks, their experts first; the others are irrelevant"),
        ("relevant", "20 evaluation tasks; every expert that joins is relevant"),
    ):
        lines = []
        for name in SCALED:
            cells = []
            for size in SIZES:
                seeds = list(found.get(f"{kind}: {name}, {size}", {}).values())
                cells.append(spread([one["mean"] for one in seeds]) if seeds else "")
            lines.append([name, *cells])
        texts.append(f"{what}\n\n" + markdown(["", *(f"{size} experts" for size in SIZES)], lines))
    return "\n\n".join(texts)


def figure3(rows: Sequence[str], found: Found) -> str:
    """The rank of each task's own expert among the 20 by its score; 1 is the lowest."""
    names = list(next(iter(found[next(iter(found))].values()))["ranks"])
    lines = [
        [row, *(", ".join(str(one["ranks"][name]) for one in found[row].values()) for name in names)]
        for row in rows
        if row in found
    ]
    return markdown(["rank of the own expert, by seed", *names], lines)


TABLES = {"table3": table3, "figure3": figure3}


def main() -> None:
    """Run the studies that are named, print their tables, and put them into the page."""
    asked = options(str(__doc__), list(STUDIES), "runs/paper_tables")
    for study in asked.studies:
        rows = [row for row in STUDIES[study] if not asked.row or row in asked.row]
        folder = asked.folder / study
        if not asked.no_run:
            run_all(partial(run, study), rows, asked.seeds, folder, asked.workers)
        found = collect(folder, rows)
        text = TABLES.get(study, rows_as_they_are)(rows, found) if found else "(nothing has been run)"
        print(f"\n## {study}\n\n{text}")
        if asked.write:
            put(PAGE, study, text)


if __name__ == "__main__":
    main()
