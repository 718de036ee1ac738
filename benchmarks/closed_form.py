"""Closed-form merges of 8 towers beside mergekit and fusion_bench on the same files, and our peak memory for 72 towers.

Each merge runs in a process of its own, on one thread, from files to merged weights in memory. CPU seconds are user and
system time after the imports; memory is the peak above what the process held once the libraries were loaded. The peers
are those in .venv-peers, which `make parity` makes; without it their rows say so. The 72 towers are 72 different files
(25 GB), made when the disk has room.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from measure import Row, Towers, arguments, say, show, towers

TITLE = "Closed-form merges, from files to weights in memory"
ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".venv-peers" / "bin" / "python"
METHODS = ("average", "task arithmetic", "TIES, per tensor", "TIES, whole model", "DARE")
SHARES = {"average": 1.0, "task arithmetic": 1.0, "TIES, per tensor": 1 / 8, "TIES, whole model": 1 / 8, "DARE": 1 / 4}
BY_PEER = {
    "mergekit": METHODS,  # its TIES is per tensor, which stands beside both of ours
    "fusion_bench": ("average", "task arithmetic", "TIES, whole model", "DARE"),
}
COPIES = {("fusion_bench", "TIES, whole model"): 65}  # models in memory at the peak, as far as that is too many
TOY = {"counts": (2, 3), "methods": ("TIES, per tensor",), "repeats": 1}  # for a toy tower: does it run at all?
Found = dict[str, float] | str  # what a process measured about itself, or why there is nothing


def obstacle(made: Towers, tool: str, method: str) -> str | None:
    """Why a tool's merge cannot be measured here, if it cannot."""
    if tool != "mergesolve" and not PEERS.exists():
        return "no .venv-peers: make parity"
    information = Path("/proc/meminfo")
    if (tool, method) in COPIES and information.exists():
        line = next(line for line in information.read_text().splitlines() if line.startswith("MemAvailable:"))
        free, needed = int(line.split()[1]) * 1024, COPIES[tool, method] * made.bytes
        if needed > free:
            return f"needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"
    return None


def measure(made: Towers, work: Sequence[tuple[str, str, bool]], count: int, repeats: int) -> list[Found]:
    """What one_merge.py says of each (tool, method, write to a file): the run with the median CPU time.

    They take turns, so that a disturbance of the machine meets all, `repeats` times or until 10 s have been spent.
    """
    reasons = [obstacle(made, tool, method) for tool, method, _ in work]
    runs: list[list[dict[str, float]]] = [[] for _ in work]
    for _ in range(repeats):
        for k, (tool, method, write) in enumerate(work):
            if reasons[k] is None and sum(run["seconds"] for run in runs[k]) < 10:
                say(f"closed_form: {method} of {count} by {tool}")
                answer = one_merge(made, tool, method, count, write)
                if isinstance(answer, str):
                    reasons[k] = answer
                else:
                    runs[k].append(answer)
    return [reason or median(found) for reason, found in zip(reasons, runs, strict=True)]


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    """The run in the middle by CPU time."""
    return sorted(runs, key=lambda run: run["cpu"])[(len(runs) - 1) // 2]


def one_merge(made: Towers, tool: str, method: str, count: int, write: bool) -> Found:
    """What one process measured, or the last thing it said."""
    python = sys.executable if tool == "mergesolve" else str(PEERS)
    script = str(Path(__file__).with_name("one_merge.py"))
    command = [python, script, tool, method, str(made.folder), str(count), *(["--write"] if write else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == -signal.SIGKILL:
        return "ended by the kernel: out of memory"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it failed"])[-1]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(made: Towers, what: str, tool: str, n: int, found: Found, share: float | None = None, of: Found = "") -> Row:
    """One line; ours has targets: the memory that it may take, and with `share` its CPU time as a share of a peer's."""
    if isinstance(found, str):
        return Row(what, {"n": str(n), "by": tool, "CPU s": f"skipped: {found}"}, float("nan"))
    own = found["peak"] - found["libraries"]
    figures = {
        "n": str(n),
        "by": tool,
        "CPU s": f"{found['cpu']:.2f}",
        "peak MB": f"{own / 1e6:.0f}",
        "in model copies": f"{own / made.bytes:.1f}",
    }
    if tool != "mergesolve":
        return Row(what, figures, found["cpu"])
    target, met = "2 copies + 500 MB", own <= 2 * made.bytes + 500e6
    if share is not None and not isinstance(of, str):
        figures["of mergekit's CPU"] = f"{found['cpu'] / of['cpu']:.3f}"
        target, met = f"{share:.3g} of mergekit's CPU, {target}", met and found["cpu"] <= share * of["cpu"]
    return Row(what, figures, found["cpu"], target, met)


def run(
    made: Towers, counts: tuple[int, int] = (8, 72), methods: tuple[str, ...] = METHODS, repeats: int = 5
) -> list[Row]:
    """For each method our row, ours into a file, and the peers'; then ours for the larger pool."""
    few, many = counts
    warm([made.base, *made.experts(few).values()])
    rows = []
    for method in methods:
        tools = ["mergesolve", *(tool for tool, known in BY_PEER.items() if method in known)]
        work = [("mergesolve", method, True), *((tool, method, False) for tool in tools)]
        written, *others = measure(made, work, few, repeats)
        found = dict(zip(tools, others, strict=True))
        rows.append(row(made, method, "mergesolve", few, found["mergesolve"], SHARES[method], found["mergekit"]))
        rows.append(row(made, f"{method}, into a file", "mergesolve", few, written))
        rows += [row(made, method, tool, few, found[tool]) for tool in tools[1:]]
    try:
        made.experts(many)
    except OSError as error:
        return [*rows, row(made, "a larger pool", "mergesolve", many, str(error))]
    for method in methods:
        (found,) = measure(made, [("mergesolve", method, False)], many, repeats)
        rows.append(row(made, method, "mergesolve", many, found))
    say("")
    return rows


def warm(paths: list[Path]) -> None:
    """Read the files once, so that no tool pays for the disk."""
    for path in paths:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--many", type=int, default=72, help="towers of the larger pool")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this method (may be repeated)")
    options = parser.parse_args()
    with towers(options.folder, options.architecture) as made:
        print(show(TITLE, run(made, (8, options.many), tuple(options.method or METHODS))))
