"""Does it pay to choose the experts? Two studies on the embedded zoo, each a table.

    python benchmarks/selection_study.py generalization   6 seen and 2 unseen tasks; every subset of 3 of 6 experts
    python benchmarks/selection_study.py robustness       the same merges on corrupted test images of 4 seen tasks
    python benchmarks/selection_study.py --config docs/examples/selection_clip.yaml    CLIP ViT-B/32 and its data sets

Accuracies are top-1 in percent on 200 test images a task. What is chosen (scales, experts, coefficients) is chosen on
validation and training images of the 6 seen tasks. All 20 subsets of 3 are merged, so that the percentile of a chosen
one among them is exact; "random 3" is their mean and standard deviation.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mergesolve.cli.recipe import from_mapping, read_yaml
from mergesolve.cli.selecting import evidence
from mergesolve.cli.setup import Setup
from mergesolve.objectives import evaluate
from mergesolve.objectives.corruptions import CORRUPTIONS
from mergesolve.pools import Weights
from mergesolve.solvers import PRESETS, solve
from mergesolve.solvers.closed_form import make_merge, merge_weights
from mergesolve.solvers.closed_form.scan import scan
from mergesolve.solvers.selection import DPP, Evidence, GreedySoup, quality, similarity
from mergesolve.zoo import load
from scipy.stats import spearmanr
from zoo_study import markdown, spread

TEST, VALIDATION, LABELS = 200, 40, 50  # images a task
SCALES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
K = 3
METHODS = ("task arithmetic", "TIES", "FW soft")
Row = dict[str, Any]


class Study:
    """The pool of the seen tasks' experts, what merges are measured on, and merges that were made already.

    fields: a recipe with pool, model and tasks (or the zoo); its experts are those of the seen tasks, by name. `unseen`
    names the tasks that nothing is chosen on, `corrupted` those of the robustness study.
    """

    def __init__(self, fields: Mapping[str, Any], severity: int = 5) -> None:
        self.severity = severity
        self.fields = {name: value for name, value in fields.items() if name not in ("unseen", "corrupted")}
        names = [task["name"] for task in self.fields["tasks"]]
        self.unseen = list(fields["unseen"])
        self.seen = [name for name in names if name not in self.unseen]
        self.corrupted = list(fields["corrupted"])
        whole = self.setup(names)
        self.model = whole.model
        self.tests = {part.name: whole.load_test(part).subset(TEST, 0) for part in whole.recipe.tasks}
        self.choosing = self.setup(self.seen, split="validation", limit=VALIDATION)
        self.pool = self.choosing.pool
        self._merged: dict[tuple[str, tuple[str, ...]], Weights] = {}

    def setup(self, tasks: Sequence[str], experts: Sequence[str] | None = None, **changes: Any) -> Setup:
        """The live recipe of some tasks and experts."""
        chosen = [task for task in self.fields["tasks"] if task["name"] in tasks]
        if changes.get("split") == "validation":  # where a task has one split, other images than the labelled ones
            chosen = [{**task, "seed": 1} for task in chosen]
        pool = dict(self.fields["pool"])
        if experts is not None:
            given = pool["experts"]
            pool["experts"] = {n: given[n] for n in experts} if isinstance(given, Mapping) else list(experts)
        return Setup(from_mapping({**self.fields, "pool": pool, "tasks": chosen, **changes}, PRESETS))

    def evidence(self) -> Evidence:
        """What selectors may ask: the seen tasks' validation images."""
        return evidence(self.choosing)

    def merged(self, method: str, names: Sequence[str]) -> Weights:
        """Merge some experts; scales are chosen on validation images, coefficients on training images."""
        key = method, tuple(sorted(names))
        if key not in self._merged:
            self._merged[key] = self._solve(key[1]) if method == "FW soft" else self._scanned(method, key[1])
        return self._merged[key]

    def _scanned(self, method: str, names: Sequence[str]) -> Weights:
        pool = self.pool.subset(names)
        merge = make_merge("ties" if method == "TIES" else "task-arithmetic")
        best = scan(pool, merge, {"scale": SCALES}, lambda w: evaluate(self.model, w, self.choosing.tasks)).merge
        return merge_weights(pool, best)

    def _solve(self, names: Sequence[str]) -> Weights:
        setup = self.setup(self.seen, names, preset="fw-soft", limit=LABELS, max_iter=2)
        result = solve(setup.problem, setup.solver, start=setup.start, max_iter=setup.recipe.max_iter)
        return setup.problem.weights(result.coefficients)

    def accuracies(self, method: str, names: Sequence[str]) -> Row:
        """Mean accuracy on seen, unseen and all tasks."""
        return self.grouped(self.merged(method, names))

    def grouped(self, weights: Weights) -> Row:
        """Mean accuracy of any weights on seen, unseen and all tasks."""
        scores = evaluate(self.model, weights, list(self.tests.values()))
        groups = {"seen": self.seen, "unseen": self.unseen, "all": [*self.seen, *self.unseen]}
        return {label: 100 * float(np.mean([scores[name] for name in group])) for label, group in groups.items()}


def choices(study: Study) -> dict[str, tuple[str, ...]]:
    """The subsets that selectors choose."""
    given = study.evidence()
    return {
        "all 6": tuple(study.seen),
        "DPP 3, accuracy × features": DPP(k=K, over="best").select(given).names,
        "DPP 3, no data": DPP(k=K, quality="norm", similarity="task-vectors").select(given).names,
        "quality alone": tuple(np.array(study.seen)[np.argsort(-quality(given, "accuracy", "best"))[:K]]),
        "greedy soup": GreedySoup().select(given).names,
    }


def generalization(study: Study, report: Callable[[Row], None]) -> list[Row]:
    """Selectors against all subsets of 3, by method; then what explains a subset's accuracy."""
    chosen = choices(study)
    given = study.evidence()
    worth, alike = quality(given, "accuracy", "best"), similarity(given, "features")
    subsets = [tuple(subset) for subset in itertools.combinations(study.seen, K)]
    rows: list[Row] = [{"method": "the base", **study.grouped(given.average([]))}]
    report(rows[0])
    for method in METHODS:
        every = {subset: study.accuracies(method, subset) for subset in subsets}
        overall = np.array([row["all"] for row in every.values()])
        for label, names in chosen.items():
            row = {"method": method, "experts": label, **study.accuracies(method, names)}
            if len(names) == K:
                row["percentile"] = 100 * float((overall <= row["all"]).mean())
            row["chosen"] = " ".join(sorted(names)) if len(names) < len(study.seen) else ""
            rows.append(row)
            report(row)
        for label, pick in (("random 3", np.mean), ("± between subsets", np.std), ("best 3 of 20", np.max)):
            row = {"method": method, "experts": label}
            row |= {
                group: float(pick([entry[group] for entry in every.values()])) for group in ("seen", "unseen", "all")
            }
            rows.append(row)
            report(row)
        index = {name: i for i, name in enumerate(study.seen)}
        members = [[index[name] for name in subset] for subset in subsets]
        explained = {
            "quality": [worth[m].mean() for m in members],
            "diversity": [-alike[np.ix_(m, m)].sum() for m in members],
            "log det": [np.linalg.slogdet((worth[:, None] * alike * worth)[np.ix_(m, m)])[1] for m in members],
        }
        ranks = {name: float(spearmanr(values, overall).statistic) for name, values in explained.items()}
        row = {
            "method": method,
            "experts": "rank correlation with " + ", ".join(f"{k} {v:.2f}" for k, v in ranks.items()),
        }
        rows.append(row)
        report(row)
    return rows


def robustness(study: Study, report: Callable[[Row], None]) -> list[Row]:
    """Selectors on corrupted test images of some tasks."""
    chosen = choices(study)
    rng = np.random.default_rng(0)
    for draw in range(3):
        chosen[f"random 3, draw {draw + 1}"] = tuple(rng.choice(study.seen, K, replace=False))
    tasks = [study.tests[name] for name in study.corrupted]
    sets = {"clean": tasks, **{kind: [task.corrupted(kind, study.severity) for task in tasks] for kind in CORRUPTIONS}}
    rows: list[Row] = []
    for method in METHODS:
        for label, names in chosen.items():
            weights = study.merged(method, names)
            row: Row = {"method": method, "experts": label}
            row |= {kind: 100 * evaluate(study.model, weights, group).mean for kind, group in sets.items()}
            row["corrupted"] = float(np.mean([row[kind] for kind in CORRUPTIONS]))
            rows.append(row)
            report(row)
    return rows


def of_the_zoo() -> dict[str, Any]:
    """8 tasks of the embedded zoo, two of them unseen."""
    names = spread(load().tasks, 8)
    unseen = [names[2], names[6]]
    seen = [name for name in names if name not in unseen]
    tasks = [{"name": name} for name in names]
    return {"zoo": True, "pool": {"experts": seen}, "tasks": tasks, "unseen": unseen, "corrupted": seen[:4]}


STUDIES: Mapping[str, Callable[[Study, Callable[[Row], None]], list[Row]]] = {
    "generalization": generalization,
    "robustness": robustness,
}


def main() -> None:
    """Run the studies that are named, print markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"default: all of {', '.join(STUDIES)}")
    parser.add_argument("--config", type=Path, help="other models and data (docs/examples/selection_clip.yaml)")
    parser.add_argument("--severity", type=int, default=5, help="of the corruptions, 1 to 5 (default 5)")
    parser.add_argument("--json", type=Path, default=Path("runs/selection_study.json"), help="where the figures go")
    options = parser.parse_args()
    for name in options.studies:
        if name not in STUDIES:
            parser.error(f"no study {name!r}; there are {', '.join(STUDIES)}")
    study = Study(
        of_the_zoo() if options.config is None else read_yaml(options.config, "configuration"), options.severity
    )
    results = {}
    print(f"seen {', '.join(study.seen)}; unseen {', '.join(study.unseen)}", flush=True)
    for name in options.studies or STUDIES:
        print(f"\n## {name}\n", flush=True)
        results[name] = STUDIES[name](study, lambda row: print(row, flush=True))
        print("\n" + markdown(results[name]), flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
