"""How far can a merge go? The share of the gap between zero-shot and experts that a merge closes on the embedded zoo.

    python benchmarks/gap_study.py eight    8 tasks and their experts: granularity, objective, domain, pool, data
    python benchmarks/gap_study.py all      all 24 tasks and experts: the rows that matter
    python benchmarks/gap_study.py tune     learning rates, on 4 other tasks and their validation images

share = (accuracy − zero-shot) / (experts − zero-shot), on 1000 test images a task that nothing else looks at. A row
changes one thing of a default: a coefficient a row of each matrix, distillation from the experts on 3000 unlabeled
images a task, the free domain, Adam for 200 steps of 16 images a task. The seed decides which 100 images have labels,
the batches and the mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mergesolve.objectives import CrossEntropy, Distillation, Entropy, Proximity, Task, WeightedSum, evaluate
from mergesolve.pools import Pool
from mergesolve.pools.transforms import make_transform
from mergesolve.solvers import Problem, make_solver
from mergesolve.solvers.loop import iterate
from mergesolve.solvers.points import start_point
from mergesolve.zoo import Zoo, load
from study import Found, collect, markdown, options, put, run_all, spread

PAGE = Path(__file__).parents[1] / "docs" / "gap.md"
RATES = {
    "distillation": {"model": 0.02, "layer": 0.02, "tensor": 0.05, "row": 0.05},
    "labels or entropy": {"model": 0.02, "layer": 0.02, "tensor": 0.02, "row": 0.005},
}
"""Learning rates of Adam, as `tune` finds them on other tasks."""


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    blocks, domain; objective: "labels", "entropy", "distillation", or two of them joined by " + ". data: "all" (3000
    unlabeled images a task, 100 with labels where the objective wants them), "100" (these alone), "100 mixed" (and
    mixtures of them, 2000 in all). pool: "raw", "trimmed", "elected" (trimmed, signs elected), "whole" (all 24
    experts), "selected" (those of the whole pool whose task vectors the first scores like best, as many as tasks).
    penalty: of ½‖θ − average‖². kind: "merge", or weights trained jointly by AdamW from the "base" or the "average".
    """

    kind: str = "merge"
    blocks: str = "row"
    objective: str = "distillation"
    data: str = "all"
    domain: Any = "free"
    pool: str = "raw"
    penalty: float = 0.0
    iterations: int = 200
    rate: float | None = None
    solver: Any = None


DEFAULT = Setting()
TENSOR = replace(DEFAULT, blocks="tensor")
BOX = {"name": "box", "lower": -0.5, "upper": 1.0}
EIGHT: dict[str, dict[str, Setting]] = {
    "References": {
        "weight average": Setting(kind="average"),
        "joint fine-tuning from the base, all labels": Setting(kind="base", objective="labels all", iterations=800),
        "joint fine-tuning from the average, all labels": Setting(
            kind="average-trained", objective="labels all", iterations=800
        ),
        "joint fine-tuning from the average, 100 labels": Setting(
            kind="average-trained", objective="labels", data="100"
        ),
        "joint fine-tuning from the average, distillation": Setting(kind="average-trained", iterations=600),
        "joint fine-tuning from the average, distillation on mixtures of 100": Setting(
            kind="average-trained", data="100 mixed", iterations=600
        ),
    },
    "Granularity and objective (free domain)": {
        f"{blocks} × {objective}": replace(DEFAULT, blocks=blocks, objective=objective)
        for objective in ("labels", "entropy", "distillation", "distillation + labels")
        for blocks in ("model", "layer", "tensor", "row")
    },
    "Domain (rows × distillation)": {
        "simplex": replace(DEFAULT, domain="simplex"),
        "capped simplex": replace(DEFAULT, domain="capped"),
        "box [−0.5, 1]": replace(DEFAULT, domain=BOX),
        "free, penalty 0.03": replace(DEFAULT, penalty=0.03),
    },
    "Pool (rows × distillation)": {
        "trimmed to 20%": replace(DEFAULT, pool="trimmed"),
        "trimmed, signs elected": replace(DEFAULT, pool="elected"),
        "whole pool of 24": replace(DEFAULT, pool="whole"),
        "8 selected from the whole pool": replace(DEFAULT, pool="selected"),
    },
    "From 100 images a task": {
        "tensor × labels, Frank-Wolfe soft (fw-soft)": replace(
            TENSOR, objective="labels", data="100", domain="capped",
            solver={"name": "soft-frank-wolfe", "inner_iterations": 20}, iterations=4,
        ),
        "tensor × labels, projected gradient": replace(
            TENSOR, objective="labels", data="100", domain="capped", solver="projected-gradient", iterations=50
        ),
        "row × labels, capped simplex": replace(DEFAULT, objective="labels", data="100", domain="capped"),
        "row × distillation on the 100": replace(DEFAULT, data="100"),
        "row × distillation + labels on the 100": replace(DEFAULT, objective="distillation + labels", data="100"),
        "tensor × distillation on mixtures": replace(TENSOR, data="100 mixed"),
        "row × distillation on mixtures": replace(DEFAULT, data="100 mixed"),
        "row × distillation on mixtures, capped simplex": replace(DEFAULT, data="100 mixed", domain="capped"),
        "row × distillation on mixtures, penalty 0.03": replace(DEFAULT, data="100 mixed", penalty=0.03),
        "row × distillation on mixtures + labels": replace(
            DEFAULT, objective="distillation + labels", data="100 mixed"
        ),
        "row × distillation on mixtures, 600 steps": replace(DEFAULT, data="100 mixed", iterations=600),
    },
    "From unlabeled images, longer": {
        "row × distillation, 600 steps": replace(DEFAULT, iterations=600),
        "row × distillation, mixtures of all, 600 steps": replace(DEFAULT, data="all mixed", iterations=600),
    },
}  # fmt: skip
ALL: dict[str, dict[str, Setting]] = {
    "All 24 tasks": {
        "weight average": Setting(kind="average"),
        "tensor × labels": replace(TENSOR, objective="labels", data="100"),
        "tensor × distillation": TENSOR,
        "row × distillation": DEFAULT,
        "row × distillation on mixtures of 100": replace(DEFAULT, data="100 mixed"),
    }
}
TUNE: dict[str, dict[str, Setting]] = {
    "Learning rates": {
        f"{blocks} × {objective}, {rate:g}": replace(
            DEFAULT, blocks=blocks, objective=objective, rate=rate, iterations=150
        )
        for blocks, objective, rates in (
            ("layer", "labels", (0.005, 0.02, 0.05)),
            ("tensor", "distillation", (0.005, 0.02, 0.05)),
            ("tensor", "labels", (0.005, 0.02)),
            ("row", "labels", (0.005, 0.02, 0.05)),
            ("row", "distillation", (0.02, 0.05, 0.1)),
        )
        for rate in rates
    }
}
STUDIES = {"eight": EIGHT, "all": ALL, "tune": TUNE}


@cache
def zoo() -> Zoo:
    """The embedded benchmark."""
    return load()


def tasks_of(study: str) -> tuple[str, ...]:
    """Names of the evaluation tasks; those of `tune` are in neither the eight nor the four of the paper's tables."""
    names = zoo().tasks
    return {"eight": names[::3], "all": names, "tune": names[1::6]}[study]


def images(name: str, data: str, seed: int) -> tuple[Task, Task]:
    """The 100 labelled images of a task, and its unlabeled ones."""
    task = zoo().task(name)
    few = task.subset(100, seed)
    many = {
        "all": task,
        "all mixed": task.mixed(6000, seed),
        "100": few,
        "100 mixed": few.mixed(2000, seed),
    }[data]
    return few, many.without_labels()


def pool_of(setting: Setting, names: Sequence[str], seed: int) -> Pool:
    """The experts, after selection and transforms."""
    if setting.pool in ("whole", "selected"):
        pool = Pool.open(base=zoo().base, experts=dict(zoo().task_experts))
        return pool.subset(selected(pool, names, seed)) if setting.pool == "selected" else pool
    pool = Pool.open(base=zoo().base, experts={name: zoo().experts[name] for name in names})
    if setting.pool in ("trimmed", "elected"):
        pool = pool.transform(make_transform({"name": "trim", "density": 0.2, "per": "model"}))
    return pool.transform(make_transform("elect")) if setting.pool == "elected" else pool


def selected(pool: Pool, names: Sequence[str], seed: int) -> list[str]:
    """For each task in turn, the expert of lowest score at the average that no other task has."""
    objective = CrossEntropy(zoo().model(), [images(name, "100", seed)[0] for name in names])
    problem = Problem(pool, objective, "model", "capped")
    scores = problem.evaluate(start_point(problem, "average"), tasks=True).task_scores
    assert scores is not None
    chosen: list[str] = []
    for table in scores[:, 0]:
        chosen.append(next(pool.names[i] for i in np.argsort(table) if pool.names[i] not in chosen))
    return [name for name in pool.names if name in chosen]


def objective_of(setting: Setting, names: Sequence[str], seed: int, average: Mapping[str, torch.Tensor]) -> Any:
    """The objective of a setting."""
    model, data = zoo().model(), [images(name, setting.data, seed) for name in names]
    parts: list[tuple[float, Any]] = []
    for part in setting.objective.split(" + "):
        if part == "labels":
            batch = None if setting.solver else 16
            parts.append((1.0, CrossEntropy(model, [few for few, _ in data], batch, seed=seed)))
        elif part == "labels all":
            parts.append((1.0, CrossEntropy(model, [zoo().task(name) for name in names], 16, seed=seed)))
        elif part == "entropy":
            parts.append((1.0, Entropy(model, [many for _, many in data], 16, seed=seed)))
        else:
            one = {name: Pool.open(base=zoo().base, experts={name: zoo().experts[name]}) for name in names}
            teachers = {name: (lambda p=p: p.combine(np.ones((1, 1)), p.blocks("model"))) for name, p in one.items()}
            parts.append((1.0, Distillation(model, [many for _, many in data], teachers, 16, seed=seed)))
    if setting.penalty:
        parts.append((setting.penalty, Proximity(dict(average))))
    return parts[0][1] if len(parts) == 1 else WeightedSum(parts)


def rate_of(setting: Setting) -> float:
    """Adam's learning rate."""
    return RATES["distillation" if "distillation" in setting.objective else "labels or entropy"][setting.blocks]


def merged(setting: Setting, problem: Problem) -> tuple[dict[str, torch.Tensor], int]:
    """The weights at the end of the solve, and how many coefficients there are."""
    solver = make_solver(
        setting.solver or {"name": "adaptive", "lr": setting.rate or rate_of(setting), "schedule": "cosine"}
    )
    start = start_point(problem, "base" if "soft" in str(setting.solver) else "average")
    best = None
    for visit in iterate(problem, solver, solver.init(problem, start), max_iter=setting.iterations, tol=0):
        if problem.stochastic or best is None or visit.evaluation.value < best.evaluation.value:
            best = visit
    assert best is not None
    return problem.weights(best.state.coefficients), int(best.state.coefficients.size)


def trained(setting: Setting, weights: dict[str, torch.Tensor], objective: Any) -> dict[str, torch.Tensor]:
    """All weights by AdamW with the experts' settings: what one model can learn from the same images."""
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    optimizer = torch.optim.AdamW(list(weights.values()), lr=5e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.iterations)
    for step in range(setting.iterations):
        objective.draw(step)
        gradient = objective.value_and_grad(weights).gradient
        for name, tensor in weights.items():
            tensor.grad = gradient[name]
        optimizer.step()
        schedule.step()
    return weights


def run(study: str, row: str, seed: int) -> dict[str, Any]:
    """One row with one seed: accuracies in percent on test images and on the 100 labelled ones, shares and costs."""
    setting = next(table[row] for table in STUDIES[study].values() if row in table)
    names = tasks_of(study)
    seed += 7 * (study == "tune")  # none of the studies' seeds
    pool = pool_of(setting, names, seed)
    whole = pool.blocks("model")
    own = Pool.open(base=zoo().base, experts={name: zoo().experts[name] for name in names})
    average = own.combine(np.full((1, own.n), 1 / own.n), own.blocks("model"))
    found: dict[str, Any] = {"experts": list(pool.names)}
    if setting.kind == "average":
        weights, objective = pool.combine(np.full((1, pool.n), 1 / pool.n), whole), None
    else:
        objective = objective_of(setting, names, seed, average)
        if setting.kind == "merge":
            problem = Problem(pool, objective, setting.blocks, setting.domain)
            weights, found["coefficients"] = merged(setting, problem)
        else:
            weights = trained(setting, average if setting.kind == "average-trained" else own.base_weights(), objective)
            found["coefficients"] = sum(tensor.numel() for tensor in weights.values())
        found["samples"] = objective.data_used["samples_seen"]
    model = zoo().model()
    split = "validation" if study == "tune" else "test"
    test = evaluate(model, weights, [zoo().task(name, split) for name in names])
    few = evaluate(model, weights, [images(name, "100", seed)[0] for name in names])
    records = [zoo().record["experts"][name] for name in names]
    zero, top = (float(np.mean([record[key] for record in records])) for key in ("zero_shot", "expert"))
    return {
        **found,
        "tasks": {name: 100 * value for name, value in test.items()},
        "mean": 100 * test.mean,
        "worst": 100 * test.worst,
        "on the labelled images": 100 * few.mean,
        "share": 100 * (100 * test.mean - zero) / (top - zero),
    }


def table(rows: Sequence[str], found: Found) -> str:
    """One table of the page."""
    header = [
        "",
        "mean",
        "worst task",
        "on the labelled images",
        "share of the gap",
        "coefficients",
        "images seen",
        "seeds",
    ]
    lines = []
    for row in rows:
        seeds = list(found.get(row, {}).values())
        if not seeds:
            continue
        cells = [spread([one[key] for one in seeds]) for key in ("mean", "worst", "on the labelled images")]
        share = spread([one["share"] for one in seeds], 0) + " %"
        size, seen = seeds[0].get("coefficients"), seeds[0].get("samples")
        lines.append([
            row, *cells, share, "" if size is None else f"{size:,}", "" if seen is None else f"{seen / 1000:.0f} k",
            str(len(seeds)),
        ])  # fmt: skip
    return markdown(header, lines)


def main() -> None:
    """Run the studies that are named, print their tables, and put them into the page."""
    asked = options(str(__doc__), list(STUDIES), "runs/gap_study")
    for study in asked.studies:
        groups = STUDIES[study]
        rows = [row for group in groups.values() for row in group if not asked.row or row in asked.row]
        folder = asked.folder / study
        if not asked.no_run:
            run_all(partial(run, study), rows, asked.seeds, folder, asked.workers)
        found = collect(folder, rows)
        text = "\n\n".join(
            f"**{title}**\n\n{table([row for row in group if row in rows], found)}" for title, group in groups.items()
        )
        print(f"\n## {study}\n\n{text}")
        if asked.write:
            put(PAGE, study, text)


if __name__ == "__main__":
    main()
