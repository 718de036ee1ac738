"""`mergesolve pool inspect`: what is in a pool, before it is merged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from .flags import json_flag, pool_fields, pool_flags
from .names import UsageProblem


@click.group()
def group() -> None:
    """Look into a pool of checkpoints before merging it.

    \b
    Examples:
      mergesolve pool inspect --base base.safetensors --expert 'experts/*.safetensors'
    """


@group.command()
@click.argument("pool_yaml", required=False, metavar="[POOL.yaml]")
@click.option("--zoo", is_flag=True, help="The pool of the embedded benchmark, its bad experts included.")
@click.option("--zoo-data", metavar="FOLDER", help="The pool of a zoo that `mergesolve zoo build` left.")
@pool_flags
@click.option("--figure", metavar="PATH", help="Draw the cosine matrix: PATH.png, PATH.svg, or both without suffix.")
@json_flag
def inspect(
    pool_yaml: str | None, zoo: bool, zoo_data: str | None, figure: str | None, as_json: bool, **flags: Any
) -> None:
    """Sizes, blocks, norms and cosines of task vectors, sign conflicts, and experts that look wrong.

    Flagged are experts that do not descend from the base (norm and cosine far outside the rest), duplicates, NaN and
    infinities (by tensor), and half-precision storage whose rounding is of the order of the task vectors.

    \b
    Examples:
      mergesolve pool inspect pool.yaml
      mergesolve pool inspect --base base.safetensors --expert a=a.safetensors --expert b=b.safetensors
      mergesolve pool inspect --base vit/ --expert 'experts/*' --exclude 'head' --figure cosines.png --json
      mergesolve pool inspect --zoo
    """
    from ..pools import inspect as look
    from .console import print_json, show
    from .recipe import PoolPart, Recipe
    from .schema import parse
    from .setup import Setup

    if pool_yaml is not None:
        if flags["pool_file"]:
            raise UsageProblem(f"two pool files: '{pool_yaml}' and --pool '{flags['pool_file']}'. Give one.")
        flags["pool_file"] = pool_yaml
    source = zoo_data or zoo
    part = parse(PoolPart, pool_fields(flags, zoo=bool(source)), "pool")
    setup = Setup(Recipe(zoo=source, pool=part))
    if source and not part.experts:
        setup.recipe = Recipe(zoo=source, pool=replace(part, experts=tuple(setup.zoo.experts)))
    pool = setup.pool
    report = look(pool)
    if figure is not None:
        _draw(report, Path(figure))
    if as_json:
        print_json(_plain(report))
    else:
        for part in _tables(pool, report):
            show(part)
            show("")
