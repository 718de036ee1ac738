"""`mergesolve pool inspect`: what is in a pool, before it is merged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .flags import json_flag, pool_fields, pool_flags
from .names import UsageProblem, choose

if TYPE_CHECKING:
    from ..pools import Pool, Report

SHADES = ((0.9, "bold red"), (0.3, "bold"), (0.1, ""))  # of cosines, from the strongest
MATRIX_LIMIT = 40  # experts, beyond which the matrix of cosines is left to the figure


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
        draw(report, Path(figure))
    if as_json:
        print_json(report.as_dict())
    else:
        for part in tables(pool, report):
            show(part)
            show("")


def tables(pool: Pool, report: Report) -> list[Any]:
    """The report as rich tables: overview, experts, cosines, flags."""
    from ..reports.tables import listing, pairs, size

    storage = sorted(set(report.storage.values()))
    overview = pairs(
        {
            "experts": len(report.names),
            "parameters": f"{report.parameters:,} merged in {report.tensors} tensors; {report.carried} carried over",
            "size": f"{size(report.nbytes)} on disk ({', '.join(storage)}), resident {size(report.resident_nbytes)}",
            "backend": f"{pool.backend} on {pool.device}",
            "blocks": ", ".join(f"{kind} {count}" for kind, count in report.blocks.items()),
            "sign conflicts": f"{100 * report.conflicted:.1f}% of the parameters that experts move",
            "fingerprint": report.fingerprint[:16],
        }
    )
    flagged: dict[str, list[str]] = {}
    for flag in report.flags:
        flagged.setdefault(flag.model, []).append(flag.kind)
    count = len(report.names)
    rows = []
    for i, name in enumerate(report.names):
        others = [j for j in range(count) if j != i]
        cosines = [float(report.cosines[i, j]) for j in others]
        nearest = max(others, key=lambda j: report.cosines[i, j]) if others else i
        conflict = sum(float(report.sign_conflicts[i, j]) for j in others) / max(1, len(others))
        rows.append(
            (
                name,
                f"{report.norms[i]:.4g}",
                f"{100 * report.norms[i] / report.base_norm:.1f}%" if report.base_norm else "–",
                f"{report.base_cosines[i]:.3f}",
                f"{sum(cosines) / len(cosines):.3f}" if cosines else "–",
                f"{report.cosines[i, nearest]:.3f} {report.names[nearest]}" if others else "–",
                f"{100 * conflict:.0f}%" if others else "–",
                ", ".join(flagged.get(name, [])),
            )
        )
    header = ("expert", "‖τ‖", "‖τ‖/‖θ0‖", "cos(θ,θ0)", "mean cos(τ)", "largest cos(τ)", "conflicts", "flags")
    parts: list[Any] = [overview, listing(header, rows, title="task vectors", numeric=(1, 2, 3, 4, 6))]
    if count <= MATRIX_LIMIT:
        parts.append(cosine_matrix(report))
    parts += [f"flagged: {flag.message}".replace("[", r"\[") for flag in report.flags]
    return parts


def cosine_matrix(report: Report) -> Any:
    """Cosines of the task vectors in hundredths, shaded by size."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="cosines of task vectors (× 100)", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for k in range(len(report.names)):
        table.add_column(str(k + 1), justify="right")
    for i, name in enumerate(report.names):
        cells = [Text(f"{i + 1} {name}")]
        for j in range(len(report.names)):
            value = float(report.cosines[i, j])
            strength = next((style for limit, style in SHADES if abs(value) >= limit), "dim")
            cells.append(Text("·", "dim") if i == j else Text(f"{100 * value:.0f}", strength))
        table.add_row(*cells)
    return table


def draw(report: Report, path: Path) -> None:
    """The cosine matrix as a figure."""
    from ..reports import cosines, save_figure

    form = path.suffix.lstrip(".").lower()
    if form:
        choose("figure format", form, ("png", "svg", "pdf"))
    flagged = {flag.model: flag.kind for flag in report.flags}
    save_figure(
        lambda: cosines(report.cosines, report.names, flagged=flagged),
        path.with_suffix("") if form else path,
        (form,) if form else ("png", "svg"),
    )
