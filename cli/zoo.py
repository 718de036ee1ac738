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
@json_flag
def info(as_json: bool) -> None:
    """Tasks, and what the base and the experts reach on them. Builds the cache on first use.

    \b
    Examples:
      mergesolve zoo info
      mergesolve zoo info --json
    """
    from ..reports.tables import listing, percent
    from ..zoo import load
    from .console import note, print_json, show

    zoo = load()
    record: dict[str, Any] = dict(zoo.record)
    if as_json:
        print_json({"base": str(zoo.base), "experts": {k: str(v) for k, v in zoo.experts.items()}, "record": record})
        return
    zero_shot, own = record.get("zero_shot", {}), record.get("experts", {})
    rows = []
    for name in zoo.tasks:
        task = zoo.task(name, split="test")
        rows.append((name, str(len(task.classes)), percent(zero_shot.get(name)), percent(own.get(name))))
    means = [_mean(zero_shot), _mean(own)]
    rows.append(("mean", "", percent(means[0]), percent(means[1])))
    show(listing(("task", "classes", "zero-shot", "expert"), rows, title="top-1 on test", numeric=(1, 2, 3)))
    others = [name for name in zoo.experts if name not in zoo.task_experts]
    note(f"further experts: {', '.join(others)}; files in {zoo.base.parent}")


def _mean(values: dict[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None


@group.command()
@click.argument("out", metavar="FOLDER")
@click.option("--reduced", is_flag=True, help="A small zoo in less than a minute, to see that the builder works.")
def build(out: str, reduced: bool) -> None:
    """Build the zoo from nothing into FOLDER: pre-train the base, fine-tune every expert. Deterministic.

    The full zoo takes hours on a CPU; mergesolve ships its result, and does not need this command.

    \b
    Examples:
      mergesolve zoo build my_zoo --reduced
      mergesolve zoo build my_zoo
    """
    from ..zoo import build as construct
    from .console import note

    began = time.monotonic()
    construct(out, reduced=reduced, progress=note)
    note(f"built {out} in {time.monotonic() - began:.0f} s")
