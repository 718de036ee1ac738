"""Every closed-form merge on the embedded zoo, at its default options and at the scale that validation images choose.

    python benchmarks/zoo_methods.py 8      8 tasks, the pool holds their 8 experts
    python benchmarks/zoo_methods.py all    all 24 tasks and experts

Top-1 in percent on 200 test images a task. Scales are chosen on 40 labelled validation images a task; Fishers (by
sampled labels) and Grams come from 64 training images a task, without labels. Rows that the JSON file holds are not
computed again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesolve.cli import main as command
from mergesolve.objectives import Scores, Task, evaluate
from mergesolve.pools import Pool, Statistics, Weights
from mergesolve.solvers.closed_form import MERGES, make_merge, merge_weights
from mergesolve.solvers.closed_form.scan import scale_option, scan
from mergesolve.zoo import Zoo, load
from zoo_study import markdown, report, spread

GRID = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
TEST, VALIDATION, MEASURED = 200, 40, 64  # images a task
LEFT_OUT = {
    "negation": "unlearns", "analogy": "of three experts", "wise-ft": "of one expert", "expo": "of one expert",
    "tall-mask": "the model of one task",
    "slerp": "of two experts", "ewc": "of two experts; fisher is the same for more", "ema": "of a sequence",
    "swa": "of a sequence; equal to the average here",
}  # fmt: skip
Row = dict[str, Any]


def measure(folder: Path, names: Sequence[str]) -> Path:
    """Have Fishers and Grams computed where they are not there yet."""
    flags = [flag for name in names for flag in ("--expert", name, "--task", name)]
    kinds = [
        "--kind",
        "fisher",
        "--kind",
        "gram",
        "--estimator",
        "sampled",
        "--limit",
        str(MEASURED),
        "--out",
        str(folder),
    ]
    command(["stats", "--zoo", *flags, *kinds], standalone_mode=False)
    return folder


def summary(scores: Mapping[str, float], label: str) -> Row:
    """Mean and worst task in percent."""
    found = Scores(scores)
    return {label: 100 * found.mean, f"{label}, worst": 100 * found.worst}


def study(zoo: Zoo, names: Sequence[str], folder: Path, done: dict[str, Row], keep: Any) -> list[Row]:
    """One row a method."""
    model = zoo.model()
    pool = Pool.open(base=zoo.base, experts={name: zoo.experts[name] for name in names}, backend="streaming")
    tests = [zoo.task(name, "test", limit=TEST) for name in names]
    validation = [zoo.task(name, "validation", limit=VALIDATION) for name in names]
    statistics = {kind: Statistics.open(pool, kind, folder) for kind in ("fisher", "gram")}

    def scores(weights: Weights, tasks: Sequence[Task]) -> Scores:
        return evaluate(model, weights, tasks)

    def row(name: str) -> Row:
        merge = make_merge(name)
        needed = statistics[merge.statistics] if merge.statistics else None
        found: Row = {"method": name, **summary(scores(merge_weights(pool, merge, needed), tests), "default")}
        option = scale_option(merge)
        if option is not None:
            best = scan(pool, merge, {option: GRID}, lambda weights: scores(weights, validation), needed)
            found["chosen"] = f"{option} {best.best.options[option]:g}"
            found.update(summary(scores(merge_weights(pool, best.merge, needed), tests), "scanned"))
        return found

    if "pretrained" not in done:
        done["pretrained"] = {"method": "pretrained", **summary(scores(model.base_weights(), tests), "default")}
    for name in MERGES:
        if name not in LEFT_OUT and name not in done:
            done[name] = report(row(name))
            keep()
    if "each task's own expert" not in done:
        own = [zoo.record["experts"][task]["expert"] / 100 for task in names]
        done["each task's own expert"] = {
            "method": "each task's own expert",
            **summary(dict(zip(names, own, strict=True)), "default"),
        }
    return list(done.values())


def main() -> None:
    """Run the studies that are named, print markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pools", nargs="*", metavar="POOL", help="8 or all (default: both)")
    parser.add_argument("--json", type=Path, default=Path("runs/zoo_methods.json"), help="where the figures go")
    options = parser.parse_args()
    for name in options.pools:
        if name not in ("8", "all"):
            parser.error(f"no pool {name!r}; there are 8 and all")
    zoo = load()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name in options.pools or ("8", "all"):
        names = spread(zoo.tasks, 8) if name == "8" else list(zoo.task_experts)
        print(f"\n## {name}\n", flush=True)
        folder = measure(options.json.parent / "statistics", names)
        done = results.setdefault(name, {})
        rows = study(zoo, names, folder, done, lambda: options.json.write_text(json.dumps(results, indent=1) + "\n"))
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        print("\n" + markdown(rows), flush=True)


if __name__ == "__main__":
    main()
