"""What merging does on the embedded zoo: three questions, each a table.

    python benchmarks/zoo_study.py pool          the whole pool, 4 evaluation tasks: every method
    python benchmarks/zoo_study.py distillation  8 tasks and their experts: how much of the gap to the experts closes
    python benchmarks/zoo_study.py irrelevant    4 relevant experts, then 16 irrelevant ones beside them

Accuracies are top-1 on the test splits, in percent. Every method with labels sees the same 100 training images a task;
distillation sees training images without labels; AdaMerging sees the test images without labels, as published.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesolve.cli.recipe import from_mapping
from mergesolve.cli.setup import Setup
from mergesolve.objectives import evaluate
from mergesolve.solvers import PRESETS, solve
from mergesolve.zoo import Zoo, load

Row = dict[str, Any]
LABELS = {"limit": 100}
POOL: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrained": ("average", {**LABELS, "start": "base", "domain": "capped"}),
    "weight average": ("average", LABELS),
    "task arithmetic 0.3": ("task-arithmetic", LABELS),
    "task arithmetic, scanned on labels": ("task-arithmetic-scan", LABELS),
    "AdaMerging from 0.3 (transductive)": ("adamerging", {"split": "test"}),
    "AdaMerging from 1/n (transductive)": ("adamerging", {"split": "test", "start": "average"}),
    "AdaMerging from 1/n (the labelled images)": ("adamerging", {**LABELS, "start": "average"}),
    "projected gradient, layers": ("projected-gradient", LABELS),
    "projected gradient, tensors": ("projected-gradient", {**LABELS, "blocks": "tensor"}),
    "Adam on labels, tensors, free": (
        "projected-gradient",
        {**LABELS, "blocks": "tensor", "domain": "free", "solver": {"name": "adaptive", "lr": 0.01}, "max_iter": 150},
    ),
    "FW hard": ("fw-hard", LABELS),
    "FW hard, tensors": ("fw-hard", {**LABELS, "blocks": "tensor"}),
    "FW hard as released": ("released-hard", LABELS),
    "FW soft": ("fw-soft", LABELS),
    "rows x distillation, capped": ("row-distillation-simplex", {}),
    "rows x distillation, free": ("row-distillation", {}),
}
DISTILLATION = [
    "pretrained",
    "weight average",
    "task arithmetic, scanned on labels",
    "projected gradient, layers",
    "FW hard",
    "FW soft",
    "rows x distillation, capped",
    "rows x distillation, free",
]
IRRELEVANT = [
    "weight average",
    "task arithmetic 0.3",
    "task arithmetic, scanned on labels",
    "AdaMerging from 1/n (transductive)",
    "projected gradient, layers",
    "FW hard",
    "FW soft",
]


def run(zoo: Zoo, name: str, experts: Sequence[str], tasks: Sequence[str], seed: int) -> Row:
    """Solve one method and evaluate the merge on the tasks' test splits."""
    preset, changes = POOL[name]
    fields: Mapping[str, Any] = {
        "zoo": True,
        "preset": preset,
        "pool": {"experts": list(experts)},
        "tasks": [{"name": task} for task in tasks],
        "seed": seed,
        **changes,
    }
    setup = Setup(from_mapping(fields, PRESETS))
    began = time.monotonic()
    recipe = setup.recipe
    result = solve(setup.problem, setup.solver, start=setup.start, max_iter=recipe.max_iter, tol=recipe.tol)
    seconds = time.monotonic() - began
    scores = evaluate(setup.model, setup.problem.weights(result.coefficients), [zoo.task(t, "test") for t in tasks])
    row: Row = {"method": name, **{task: 100 * scores[task] for task in tasks}}
    return {**row, "mean": 100 * scores.mean, "worst": 100 * scores.worst, "seconds": seconds, "gap": result.gap}


def references(zoo: Zoo, tasks: Sequence[str]) -> tuple[float, float]:
    """Mean accuracy of the base, and of each task's own expert, in percent, as the zoo recorded them."""
    records = [zoo.record["experts"][task] for task in tasks]
    return sum(r["zero_shot"] for r in records) / len(tasks), sum(r["expert"] for r in records) / len(tasks)


def spread(names: Sequence[str], count: int) -> list[str]:
    """Names at equal distances over the list."""
    return list(names)[:: max(1, len(names) // count)][:count]


def study_pool(zoo: Zoo, methods: Sequence[str], seed: int) -> list[Row]:
    """Every method on the whole pool, 4 evaluation tasks."""
    tasks = spread(zoo.tasks, 4)
    return [report(run(zoo, name, list(zoo.task_experts), tasks, seed)) for name in methods or POOL]


def study_distillation(zoo: Zoo, methods: Sequence[str], seed: int) -> list[Row]:
    """8 tasks and their 8 experts; the share of the gap between zero-shot and experts that each method closes."""
    tasks = spread(zoo.tasks, 8)
    zero, own = references(zoo, tasks)
    rows = []
    for name in methods or DISTILLATION:
        row = run(zoo, name, tasks, tasks, seed)
        row["share of the gap"] = 100 * (row["mean"] - zero) / (own - zero)
        rows.append(report(row))
    rows.append({"method": "each task's own expert", "mean": own, "share of the gap": 100.0})
    return rows


def study_irrelevant(zoo: Zoo, methods: Sequence[str], seed: int) -> list[Row]:
    """4 relevant experts, and the same with 16 irrelevant ones in the pool."""
    tasks = spread(zoo.tasks, 4)
    others = [name for name in zoo.task_experts if name not in tasks][:16]
    rows = []
    for name in methods or IRRELEVANT:
        few = run(zoo, name, tasks, tasks, seed)
        many = run(zoo, name, [*tasks, *others], tasks, seed)
        row = {"method": name, "4 experts": few["mean"], "20 experts": many["mean"]}
        rows.append(report({**row, "change": many["mean"] - few["mean"]}))
    return rows


STUDIES: dict[str, Callable[[Zoo, Sequence[str], int], list[Row]]] = {
    "pool": study_pool,
    "distillation": study_distillation,
    "irrelevant": study_irrelevant,
}


def report(row: Row) -> Row:
    """Print a row as soon as it is there."""
    print("  ".join(f"{key} {cell(value)}" for key, value in row.items()), flush=True)
    return row


def cell(value: Any) -> str:
    """Numbers with one decimal."""
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a markdown table; columns in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "gap"))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row[c]) if c in row else "" for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Run the studies that are named, print markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"default: all of {', '.join(STUDIES)}")
    parser.add_argument("--method", action="append", choices=POOL, metavar="NAME", help=f"only: {', '.join(POOL)}")
    parser.add_argument("--seed", type=int, default=0, help="decides every random choice (default 0)")
    parser.add_argument("--json", type=Path, default=Path("runs/zoo_study.json"), help="where the figures go")
    options = parser.parse_args()
    for name in options.studies:
        if name not in STUDIES:
            parser.error(f"no study {name!r}; there are {', '.join(STUDIES)}")
    zoo = load()
    results = {}
    for name in options.studies or STUDIES:
        print(f"\n## {name}\n", flush=True)
        results[name] = STUDIES[name](zoo, options.method, options.seed)
        print("\n" + markdown(results[name]), flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
