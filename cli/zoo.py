"""`mergesolve zoo`: the embedded benchmark."""

from __future__ import annotations

import time
from typing import Any

import click

from .flags import json_flag


@click.group()
def group() -> None:
    """The embedded benchmark: a small CLIP, 20 and more tasks, one expert each, and three bad ones.

    \b
    Examples:
      mergesolve zoo info
      mergesolve zoo build my_zoo --reduced
    """


@group.command()
@click.option("--zoo-data", metavar="FOLDER", help="A zoo that `mergesolve zoo build` left, instead.")
@json_flag
def info(zoo_data: str | None, as_json: bool) -> None:
    """Tasks, and what the base and the experts reach on them. Builds the cache on first use.

    \b
    Examples:
      mergesolve zoo info
      mergesolve zoo info --json
    """
    from ..reports.tables import listing
    from ..zoo import load
    from .console import note, print_json, show

    zoo = load(data=zoo_data)
    record: dict[str, Any] = dict(zoo.record)
    if as_json:
        print_json({"base": str(zoo.base), "experts": {k: str(v) for k, v in zoo.experts.items()}, "record": record})
        return
    rows = []
    for name in zoo.tasks:
        entry = record["experts"][name]
        rows.append((name, str(entry["classes"]), f"{entry['zero_shot']:.1f}", f"{entry['expert']:.1f}"))
    rows.append(("mean", "", f"{record['zero_shot_mean']:.1f}", f"{record['expert_mean']:.1f}"))
    show(listing(("task", "classes", "zero-shot", "expert"), rows, title="top-1 on test", numeric=(1, 2, 3)))
    others = [name for name in zoo.experts if name not in zoo.task_experts]
    note(f"further experts: {', '.join(others)}; files in {zoo.base.parent}")


@group.command()
@click.argument("out", metavar="FOLDER")
@click.option("--reduced", is_flag=True, help="A small zoo in less than a minute, to see that the builder works.")
@click.option("--workers", type=click.IntRange(1), default=1, metavar="N", help="Experts fine-tuned side by side.")
def build(out: str, reduced: bool, workers: int) -> None:
    """Build the zoo from nothing into FOLDER: pre-train the base, fine-tune every expert. Deterministic, and resumable.

    The full zoo takes an hour or two on a CPU; mergesolve ships its result, and does not need this command.

    \b
    Examples:
      mergesolve zoo build my_zoo --reduced
      mergesolve zoo build my_zoo --workers 2
    """
    from ..zoo import build as construct
    from .console import INTERVAL, counting, note

    began = time.monotonic()
    with counting("building", quiet=False) as step:
        last = 0.0

        def progress(what: str, done: int, total: int, loss: float) -> None:
            nonlocal last
            if step is not None:
                step(f"{what}, loss {loss:.3f}", done, total)
            elif time.monotonic() - last > INTERVAL:
                last = time.monotonic()
                note(f"{what}: {done}/{total}, loss {loss:.3f}")

        construct(out, reduced=reduced, workers=workers, progress=progress)
    note(f"built {out} in {time.monotonic() - began:.0f} s")
