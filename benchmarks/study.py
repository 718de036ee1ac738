"""Studies as tables of rows × seeds: every run leaves one JSON file, so that a study that was killed goes on.

A study is a mapping of row names to settings and one function that runs a setting with a seed. Runs are ordered by
seed, so that every row has one number before any has two.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Work = Callable[[str, int], Mapping[str, Any]]
Found = dict[str, dict[int, dict[str, Any]]]
"""By row, then by seed, what the runs returned."""


def place(folder: Path, row: str, seed: int) -> Path:
    """Where the result of a run lies."""
    return folder / re.sub(r"[^a-z0-9.]+", "-", row.lower()).strip("-") / f"seed-{seed}.json"


def run_all(work: Work, rows: Sequence[str], seeds: int, folder: Path, workers: int) -> None:
    """Run what is missing, in processes of one thread each; a run that fails does not keep the others from running."""
    jobs = [(row, seed) for seed in range(seeds) for row in rows if not place(folder, row, seed).exists()]
    if not jobs:
        return
    began, failed = time.monotonic(), []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        waiting = {pool.submit(_run, work, row, seed, folder): (row, seed) for row, seed in jobs}
        for done, future in enumerate(as_completed(waiting), start=1):
            row, seed = waiting[future]
            error = future.exception()
            if error is not None:
                failed.append(f"{row}, seed {seed}: {type(error).__name__}: {error}")
            text = failed[-1] if error is not None else f"{row}, seed {seed}: {future.result()}"
            spent = (time.monotonic() - began) / 60
            left = spent / done * (len(jobs) - done)
            print(f"[{done}/{len(jobs)}, {spent:.0f} min, about {left:.0f} to go] {text}", flush=True)
    if failed:
        raise SystemExit("these runs failed:\n  " + "\n  ".join(failed))


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _run(work: Work, row: str, seed: int, folder: Path) -> str:
    began = time.monotonic()
    found = {"row": row, "seed": seed, **work(row, seed), "seconds": time.monotonic() - began}
    path = place(folder, row, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)
    return "  ".join(f"{key} {value:.1f}" for key, value in found.items() if isinstance(value, float))


def collect(folder: Path, rows: Sequence[str]) -> Found:
    """The results that are there."""
    found: Found = {}
    for row in rows:
        for path in sorted(place(folder, row, 0).parent.glob("seed-*.json")):
            content = json.loads(path.read_text())
            found.setdefault(row, {})[int(content["seed"])] = content
    return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation over the seeds; the mean alone where there is one, or where all agree."""
    text = f"{fmean(values):.{digits}f}"
    return text if len(values) < 2 or max(values) == min(values) else f"{text} ± {stdev(values):.{digits}f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def put(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a page."""
    content = page.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, separator, rest = content.partition(begin)
    _, closing, tail = rest.partition(end)
    if not separator or not closing:
        raise SystemExit(f"{page} has no place for '{name}': expected {begin} and {end}.")
    page.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


def options(doc: str, studies: Sequence[str], folder: str) -> argparse.Namespace:
    """The command line that the studies share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"default: all of {', '.join(studies)}")
    parser.add_argument("--row", action="append", metavar="NAME", help="only this row; repeatable")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--workers", type=int, default=1, help="processes at once, of one thread each (default 1)")
    parser.add_argument("--folder", type=Path, default=Path(folder), help=f"where the results go (default {folder})")
    parser.add_argument("--write", action="store_true", help="put the tables into the page of docs/")
    parser.add_argument("--no-run", action="store_true", help="only print what is there")
    found = parser.parse_args()
    for name in found.studies:
        if name not in studies:
            parser.error(f"no study {name!r}; there are {', '.join(studies)}")
    found.studies = found.studies or list(studies)
    return found
