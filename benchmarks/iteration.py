"""A Frank-Wolfe iteration on the CPU against a bare forward and backward pass of the same batch, with 20 experts.

The bare pass is what training would do: the tower, cross-entropy, backward. The iteration is what the solver does: the
same gradient, correlate, the oracle, the step, combine, and its records. A line search adds forward passes of its own,
which are the method's and not overhead: it has a row of its own, and the target is for the fixed step, from the average
of all experts, which keeps every expert active.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from typing import Any, Literal

import torch
from measure import Row, Towers, arguments, classifier, images, say, show, towers
from mergesolve.objectives import CrossEntropy
from mergesolve.pools import Pool
from mergesolve.solvers import FrankWolfe, Problem, solve

TITLE = "A Frank-Wolfe iteration against a bare forward and backward pass"
ALLOWED = 1.25
OPERATORS = ("combine", "displacement", "correlate")
OBJECTIVE = ("value", "value_and_grad")


class Timed:
    """Stands for an object and adds up the seconds that its named methods take."""

    def __init__(self, wrapped: Any, methods: tuple[str, ...]) -> None:
        self._wrapped, self._methods = wrapped, methods
        self.spent: dict[str, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._wrapped, name)
        if name not in self._methods:
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return found(*args, **kwargs)
            finally:
                self.spent[name] += time.perf_counter() - began

        return timed


class BarePass:
    """Forward and backward of one batch, as in training."""

    def __init__(self, made: Towers, batch: int) -> None:
        self.model = classifier(made.architecture)
        self.task = images(self.model, batch)
        self.labels = torch.as_tensor(self.task.labels)
        pool = Pool.open(base=made.base, experts=made.experts(1))
        self.weights = {name: tensor.requires_grad_() for name, tensor in pool.base_weights().items()}

    def __call__(self) -> float:
        """Run it once; returns its seconds."""
        began = time.perf_counter()
        logits = self.model.logits(self.weights, self.task.inputs[:], self.task)
        loss = torch.nn.functional.cross_entropy(logits, self.labels)
        torch.autograd.grad(loss, [self.weights[name] for name in self.model.parameter_names])
        return time.perf_counter() - began


def measure(bare: BarePass, pool: Timed, rule: str, repeats: int) -> tuple[float, float, dict[str, float]]:
    """Median seconds of the bare pass and of an iteration, and of the parts of the iteration.

    A bare pass runs between each two iterations, so that both meet the same machine.
    """
    objective = Timed(CrossEntropy(bare.model, [bare.task], microbatch=len(bare.task)), OBJECTIVE)
    passes: list[float] = []
    moments: list[tuple[float, float, dict[str, float]]] = []

    def between(record: dict[str, Any]) -> None:
        say(f"iteration: {rule}, {record['iteration']} of {repeats}")
        ended = time.perf_counter()
        passes.append(bare())
        moments.append((ended, time.perf_counter(), {**pool.spent, **objective.spent}))

    bare()
    solver = FrankWolfe(step_rule=rule)
    solve(Problem(pool, objective, blocks="layer"), solver, max_iter=repeats, tol=0.0, callback=between)  # type: ignore[arg-type]
    pairs = list(itertools.pairwise(moments))
    whole = statistics.median(later[0] - earlier[1] for earlier, later in pairs)
    parts = {
        name: statistics.median(later[2].get(name, 0.0) - earlier[2].get(name, 0.0) for earlier, later in pairs)
        for name in (*OBJECTIVE, *OPERATORS)
    }
    return statistics.median(passes), whole, parts


def run(made: Towers, n: int = 20, batch: int = 32, repeats: int = 5) -> list[Row]:
    """Both backends, with a step that costs nothing and with a line search."""
    paths = made.experts(n)
    bare = BarePass(made, batch)
    rows = []
    backends: tuple[Literal["streaming", "resident"], ...] = ("streaming", "resident")
    for backend in backends:
        pool = Timed(Pool.open(base=made.base, experts=paths, backend=backend), OPERATORS)
        for rule in ("fixed", "line-search"):
            least, whole, parts = measure(bare, pool, rule, repeats)
            ratio = whole / least
            figures = {
                "bare pass s": f"{least:.2f}",
                "iteration s": f"{whole:.2f}",
                "gradient s": f"{parts['value_and_grad']:.2f}",
                "correlate s": f"{parts['correlate']:.2f}",
                "combine s": f"{parts['combine'] + parts['displacement']:.2f}",
                "trial values s": f"{parts['value']:.2f}",
                "rest s": f"{whole - sum(parts.values()):.2f}",
                "iteration / bare": f"{ratio:.2f}",
            }
            what = f"{backend}, {rule.replace('fixed', 'fixed step')}, n = {n}, {batch} images"
            judged = rule == "fixed"
            rows.append(Row(what, figures, ratio, f"{ALLOWED}" * judged, ratio <= ALLOWED if judged else None))
        del pool  # the next backend's task vectors take its place
    say("")
    return rows


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="iterations that a median is taken of")
    parser.add_argument("--batch", type=int, default=32, help="images in the batch")
    options = parser.parse_args()
    with towers(options.folder, options.architecture) as made:
        print(show(TITLE, run(made, batch=options.batch, repeats=options.repeats)))
