"""Peak memory of a streaming Frank-Wolfe solve, for pools of 2, 8 and 32 experts.

Each solve runs in a process of its own: layer-wise oracle, line search, cross-entropy of the whole visual tower on 8
images, from the average. Python and its libraries (PyTorch, open_clip) hold several hundred MB before anything is
opened, so the peak is shown with and without what the process held once a toy objective had been evaluated. The row
without a pool is a bare
value and gradient of the same objective.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from measure import SMALL, Architecture, Row, Towers, arguments, classifier, images, say, show, towers
from mergesolve.objectives import CrossEntropy
from mergesolve.pools import Pool
from mergesolve.solvers import FrankWolfe, Problem, solve
from process import resident_bytes

TITLE = "Peak memory of a streaming Frank-Wolfe solve"
ALLOWED_COPIES, ALLOWED_EXTRA = 3, 500e6


def child(folder: Path, n: int, architecture: Architecture, iterations: int = 3) -> dict[str, float]:
    """What one process measures about itself; n = 0 is the objective alone."""
    toy = classifier(SMALL)
    CrossEntropy(toy, [images(toy, 1)]).value_and_grad(toy.base_weights())  # loads what is loaded on first use
    libraries = resident_bytes()
    model = classifier(architecture)
    objective = CrossEntropy(model, [images(model, 8)])
    if n == 0:
        weights = Pool.open(base=folder / "base.safetensors", experts=[folder / "expert00.safetensors"]).base_weights()
        objective.value_and_grad(weights)
    else:
        experts = {f"expert{i:02d}": folder / f"expert{i:02d}.safetensors" for i in range(n)}
        pool = Pool.open(base=folder / "base.safetensors", experts=experts, backend="streaming")
        solve(Problem(pool, objective, blocks="layer"), FrankWolfe(), max_iter=iterations)
    return {"libraries": libraries, "peak": resident_bytes(peak=True)}


def run(made: Towers, counts: tuple[int, ...] = (2, 8, 32)) -> list[Row]:
    """Starts one process for each count and tabulates what they say."""
    rows = []
    for n in (0, *counts):
        try:
            made.experts(max(n, 1))
        except OSError as error:
            rows.append(Row(f"n = {n}", {"peak MB": f"skipped: {error}"}, float("nan")))
            continue
        say(f"memory: a solve over {n} experts")
        small = [] if isinstance(made.architecture, str) else ["--small"]
        command = [sys.executable, __file__, "--child", str(n), "--folder", str(made.folder), *small]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        own = found["peak"] - found["libraries"]
        allowed = ALLOWED_COPIES * made.bytes + ALLOWED_EXTRA
        figures = {
            "peak MB": f"{found['peak'] / 1e6:.0f}",
            "libraries MB": f"{found['libraries'] / 1e6:.0f}",
            "solve MB": f"{own / 1e6:.0f}",
            "solve, in model copies": f"{own / made.bytes:.2f}",
        }
        if n == 0:
            rows.append(Row("value and gradient, no pool", figures, own))
        else:
            target = f"{ALLOWED_COPIES} copies + 500 MB = {allowed / 1e6:.0f} MB"
            rows.append(Row(f"n = {n}", figures, own, target, own <= allowed))
    say("")
    return rows


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--child", type=int, help="measure this process; the number of experts in --folder")
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(child(options.folder, options.child, options.architecture)))
    else:
        with towers(options.folder, options.architecture) as made:
            print(show(TITLE, run(made)))
