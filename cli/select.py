"""`mergesolve select`: which experts of a pool to merge at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import yaml

from .flags import data_flags, json_flag, model_fields, named_options, pool_fields, pool_flags, task_fields
from .names import UsageProblem


@click.command(short_help="Choose the experts that are worth merging.")
@click.argument("selector", required=False, default="dpp", metavar="[SELECTOR[:KEY=VALUE,...]]")
@pool_flags
@data_flags
@click.option("--k", type=int, metavar="K", help="How many experts.")
@click.option("--split", metavar="SPLIT", help="Split of zoo tasks: validation (default), train or test.")
@click.option("--limit", type=int, metavar="N", help="Use at most N samples a task, class-balanced.")
@click.option("--relevance", is_flag=True, help="Also print and draw ⟨∇loss, τ⟩ of every task and expert.")
@click.option("--bound", is_flag=True, help="Also print the measured terms of the bound on the average's risk.")
@click.option("--out", metavar="FILE", help="Write the chosen pool as YAML, which --pool reads.")
@click.option("--figures", metavar="FOLDER", help="Draw kernel, quality against similarity, map of experts.")
@json_flag
def command(
    selector: str,
    k: int | None,
    relevance: bool,
    bound: bool,
    out: str | None,
    figures: str | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Choose experts by SELECTOR: dpp (default), top-k, greedy-soup, best-single, random, all.

    dpp takes good and diverse experts. Its quality is accuracy, loss, norm (no data) or uniform; its similarity is
    features, task-vectors or layers (no data) or agreement. See `mergesolve list selectors`.

    \b
    Examples:
      mergesolve select dpp:over=best --zoo --task digits --task chess --k 2 --out chosen.yaml
      mergesolve select dpp:quality=norm,similarity=task-vectors --k 8 --pool pool.yaml --figures figures
      mergesolve select top-k --zoo --task digits --k 4 --relevance
      mergesolve merge ties --zoo --pool chosen.yaml --out ties.safetensors
    """
    from .console import counting, note, print_json, show
    from .recipe import Choice, Recipe
    from .schema import parse
    from .selecting import bounds, check_selector, evidence, record
    from .setup import Setup

    if flags.get("select"):
        raise UsageProblem(f"--select is for other commands; here the selector is the argument: {flags['select']}.")
    if out is not None and Path(out).suffix.lower() not in (".yaml", ".yml"):
        raise UsageProblem(f"--out '{out}': expected the name of a .yaml file, which --pool reads.")
    choice_fields = named_options(selector, "SELECTOR")
    if k is not None:
        choice_fields["k"] = k
    made = check_selector(Choice.read(choice_fields, "selector"))
    zoo = flags.get("zoo_data") or bool(flags.get("zoo"))
    fields = {
        "zoo": zoo,
        "pool": pool_fields(flags, zoo=bool(zoo)),
        "model": model_fields(flags),
        "tasks": task_fields(flags["tasks"]) if flags.get("tasks") else [],
        "split": flags.get("split") or "validation",
        "limit": flags.get("limit"),
    }
    setup = Setup(parse(Recipe, fields, "recipe"))
    if zoo and not setup.recipe.pool.experts:  # all of it, those that should not be chosen too
        setup.recipe = replace(setup.recipe, pool=replace(setup.recipe.pool, experts=tuple(setup.zoo.experts)))
    if (relevance or bound) and not setup.recipe.tasks:
        raise UsageProblem(
            "--relevance and --bound need labelled data: give --task NAME (zoo) or --task NAME=DATA with --model."
        )
    with counting("experts", quiet=as_json) as progress:
        found = evidence(setup, progress)
        selection = made.select(found)
        table = found.relevance if relevance else None
        terms = bounds(found, selection) if bound else None
    report = record(selection, setup)
    if table is not None:
        report["relevance"] = {"tasks": list(table[0]), "scores": table[1].tolist()}
    if terms is not None:
        report["bound"] = terms
    if out is not None:
        _write_pool(setup, selection.names, Path(out))
        report["written"] = out
    if figures is not None:
        from ..reports.selections import save_selection

        report["figures"] = [str(path) for path in save_selection(report, Path(figures))]
    if as_json:
        print_json(report)
        return
    for part in tables(report):
        show(part)
        show("")
    if out is not None:
        note(f"wrote {out}")
    if figures is not None:
        note(f"wrote {', '.join(report['figures'])}")


def tables(report: dict[str, Any]) -> list[Any]:
    """The ranked subset, the experts that were left out, and the relevance table if there is one."""
    from rich.markup import escape

    from ..reports.tables import listing

    quality = report["quality"]
    index = {name: i for i, name in enumerate(report["candidates"])}
    chosen = [entry["expert"] for entry in report["selected"]]
    options = ", ".join(f"{k} {v}" for k, v in report["selector"].items() if k != "name" and v not in (None, [], ()))
    rows = [
        (
            str(place),
            entry["expert"],
            f"{quality[index[entry['expert']]]:.3g}" if quality else "–",
            escape(entry["reason"]),
        )
        for place, entry in enumerate(report["selected"], start=1)
    ]
    title = f"{report['selector']['name']}{f' ({options})' if options else ''}"
    parts: list[Any] = [listing(("", "expert", "quality", "why"), rows, title=title, numeric=(0, 2))]
    left = [name for name in report["candidates"] if name not in chosen]
    if left:
        parts.append(f"left out: {', '.join(left)}")
    if "relevance" in report:
        scores = report["relevance"]["scores"]
        cells = [(name, *(f"{row[index[name]]:.3g}" for row in scores)) for name in report["candidates"]]
        header = ("expert", *report["relevance"]["tasks"])
        heading = "⟨∇loss, τ⟩ at the base: negative where the loss falls along the expert"
        parts.append(listing(header, cells, title=heading, numeric=tuple(range(1, len(header)))))
    if "bound" in report:
        cells = [(label, *(f"{value:.4g}" for value in terms.values())) for label, terms in report["bound"].items()]
        header = ("experts", "mean risk", "diversity", "risk of the ensemble", "Δ²")
        parts.append(listing(header, cells, title="terms of the bound on validation data", numeric=(1, 2, 3, 4)))
    return parts


def _write_pool(setup: Any, names: tuple[str, ...], path: Path) -> None:
    """The chosen pool as --pool reads it; of the zoo by names, else with absolute paths."""
    from .recipe import plain

    part = plain(setup.recipe.pool, brief=True)
    if setup.recipe.zoo:
        part["experts"] = list(names)
    else:
        part["experts"] = {name: str(Path(setup.paths[name]).absolute()) for name in names}
        if Path(part["base"]).expanduser().exists():
            part["base"] = str(Path(part["base"]).expanduser().absolute())
    for name in ("backend", "device", "select"):
        part.pop(name, None)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(yaml.safe_dump(part, sort_keys=False, allow_unicode=True), encoding="utf-8")
    temporary.replace(path)
