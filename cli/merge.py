"""`mergesolve merge`: closed-form merges, streamed from checkpoints to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .flags import data_flags, json_flag, live_fields, pool_flags
from .names import UsageProblem, choose

DTYPES = ("float32", "float16", "bfloat16")


@click.command(short_help="Merge in closed form: average, TIES, DARE, Fisher, ...")
@click.argument("method", required=False, metavar="[METHOD]")
@click.option("--recipe", "recipe_file", metavar="FILE", help="A merge recipe: ours, or mergekit's YAML.")
@pool_flags
@click.option("--scale", type=float, help="λ in θ0 + λ · merged task vector (α, t: of methods that call it so).")
@click.option("--density", type=float, help="Fraction of entries that is kept, in (0, 1].")
@click.option("--weight", "expert_weights", multiple=True, metavar="NAME=W", help="Weight of an expert. Repeatable.")
@click.option("--seed", type=int, help="Seed of random masks.")
@click.option("--set", "settings", multiple=True, metavar="OPTION=VALUE", help="Any option of the method. Repeatable.")
@click.option("--options", "show_options", is_flag=True, help="Print the options of METHOD with their defaults.")
@click.option("--statistics", metavar="FOLDER", help="Where `mergesolve stats` wrote (default: beside the experts).")
@click.option(
    "--scan",
    "scans",
    multiple=True,
    metavar="[OPTION=]V,V,...",
    help="Try these values (or 'auto') on --task data and take the best. Repeatable: the product.",
)
@data_flags
@click.option("--split", metavar="SPLIT", help="Split of zoo tasks to scan on: validation (default), train or test.")
@click.option("--limit", type=int, metavar="N", help="Use at most N samples a task, class-balanced.")
@click.option("--out", metavar="PATH", help="A .safetensors file, or a folder (sharded, with configuration files).")
@click.option("--masks", metavar="FILE", help="Also write the TALL masks of `consensus`, one bit an entry and expert.")
@click.option("--dtype", metavar="TYPE", help="float32, float16 or bfloat16 (default: the base's).")
@click.option("--max-shard-size", type=float, metavar="BYTES", help="Of a folder's files (default: 5e9).")
@click.option("--dry-run", is_flag=True, help="Say what would be read, written and held in memory; read headers only.")
@json_flag
def command(
    method: str | None, recipe_file: str | None, show_options: bool, dry_run: bool, as_json: bool, **flags: Any
) -> None:
    """Merge a pool by METHOD and write the result; see `mergesolve list methods`.

    Experts are streamed: memory does not grow with their number. The file is written under a temporary name and
    renamed; its metadata say which models, method and options it comes from.

    \b
    Examples:
      mergesolve merge average --base base/ --expert 'experts/*' --out merged/
      mergesolve merge ties --pool pool.yaml --density 0.2 --scale 0.3 --out ties.safetensors
      mergesolve merge dare --pool pool.yaml --set seed=3 --dtype bfloat16 --dry-run
      mergesolve merge --recipe mergekit.yaml --out merged/
      mergesolve merge ties --zoo --task digits --task chess --scan auto --out ties.safetensors
      mergesolve stats --zoo --kind fisher && mergesolve merge fisher --zoo --statistics statistics --out f.safetensors
    """
    from .merging import Merging, scan_record, write_scan

    if show_options:
        _show_options(method, as_json)
        return
    recipe = _recipe(method, recipe_file, flags)
    if recipe.dtype is not None:
        choose("dtype", recipe.dtype, DTYPES)
    if recipe.out is None and not (dry_run or recipe.scan):
        raise UsageProblem("nothing says where the merged model goes: give --out PATH (or --dry-run).")
    if flags["masks"] is not None:
        _check_masks(flags["masks"], recipe.out)
    merging = Merging.of(recipe)
    if dry_run:
        _show_plan(merging, as_json)
        return
    from .console import counting, note, print_json

    report: dict[str, Any] = {"method": {}, "written": []}
    metadata: dict[str, str] = {}
    out = Path(recipe.out).expanduser() if recipe.out is not None else None
    if recipe.scan:
        with counting("scan", quiet=as_json) as step:
            found = merging.scan(None if step is None else lambda done, total: step("points", done, total))
        record = scan_record(found, merging.setup.tasks)
        folder = Path("scan") if out is None else out.with_name(f"{out.stem}.scan")
        report["scan"] = {**record, "written": [str(path) for path in write_scan(record, folder)]}
        metadata["scan"] = json.dumps({"chosen": record["chosen"], "mean": record["mean"], "data": record["data"]})
        if not as_json:
            _show_scan(record, folder)
    if flags["masks"] is not None:
        report["masks"] = [str(path) for path in merging.write_masks(Path(flags["masks"]).expanduser())]
        if not as_json:
            note(f"wrote {', '.join(report['masks'])}")
    if out is not None:
        with counting("merge", quiet=as_json) as step:
            wrote = merging.write(out, metadata, _fractions(step))
        report["written"] = [str(path) for path in wrote]
        if not as_json:
            note(f"wrote {', '.join(report['written'])}")
    if as_json:
        from ..solvers.closed_form import describe_merge

        print_json({**report, "method": describe_merge(merging.merge), "bytes_read": merging.pool.bytes_read})


def _recipe(method: str | None, recipe_file: str | None, flags: Mapping[str, Any]) -> Any:
    """The recipe file under the flags."""
    from .merging import MergeRecipe
    from .recipe import merge, read_yaml, relative_to
    from .schema import parse

    fields: dict[str, Any] = {}
    if recipe_file is not None:
        fields = read_yaml(recipe_file, "recipe")
        if "merge_method" in fields:
            from .mergekit import from_mergekit

            fields = from_mergekit(fields, f"recipe '{recipe_file}'", folder=Path(recipe_file).parent)
        else:
            fields = relative_to(fields, Path(recipe_file).parent)
    over = live_fields(flags, fields)
    for name in ("split", "limit", "statistics", "out", "dtype", "max_shard_size"):
        if flags.get(name) is not None:
            over[name] = flags[name]
    if method is not None:
        over["method"] = method
    fields = merge(fields, over)
    if "method" not in fields:
        raise UsageProblem("nothing says how to merge: name a METHOD (see `mergesolve list methods`) or --recipe FILE.")
    fields["method"] = _method(fields["method"], flags)
    if flags.get("scans"):
        fields["scan"] = _grid(flags["scans"], fields["method"]["name"])
    return parse(MergeRecipe, fields, "recipe")


def _method(chosen: Any, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The method with the options that flags give."""
    from ..solvers.closed_form.registry import merge_class
    from ..solvers.closed_form.scan import scale_option
    from .recipe import Choice, parse_assignments

    choice = Choice.read(chosen, "recipe: 'method'")
    fields = choice.plain()
    if flags.get("scale") is not None:
        fields[scale_option(merge_class(choice.name)) or "scale"] = flags["scale"]
    for name in ("density", "seed"):
        if flags.get(name) is not None:
            fields[name] = flags[name]
    given = parse_assignments(flags.get("expert_weights") or (), "--weight")
    values = {name: _value(text, f"--weight '{name}={text}'") for name, text in given.items()}
    if values:
        if not isinstance(fields.get("weights"), (Mapping, type(None))):
            raise UsageProblem(f"recipe: the 'weights' of the method must be a mapping; found {fields['weights']!r}.")
        fields["weights"] = {**(fields.get("weights") or {}), **values}
    settings = parse_assignments(flags.get("settings") or (), "--set")
    if "name" in settings:
        raise UsageProblem(f"--set name={settings['name']}: 'name' is no option; the method is the argument METHOD.")
    fields.update({name: _value(text, f"--set '{name}={text}'") for name, text in settings.items()})
    return fields


def _value(text: str, where: str) -> Any:
    """The value of an option's text."""
    import yaml

    from .recipe import from_yaml

    try:
        return from_yaml(text)
    except yaml.YAMLError:
        raise UsageProblem(f"{where}: the value is not YAML.") from None


def _check_masks(masks: str, out: str | None) -> None:
    """Refuse a place for the masks that is not a file of their own."""
    path = Path(masks).expanduser()
    if path.suffix.lower() != ".safetensors":
        raise UsageProblem(f"--masks '{masks}': expected the name of a .safetensors file.")
    if out is not None and path.resolve() == Path(out).expanduser().resolve():
        raise UsageProblem(f"--masks '{masks}': --out names the same file; give each its own.")


def _grid(texts: tuple[str, ...], method: str) -> dict[str, list[Any]]:
    """The grid of a scan: option -> values."""
    from ..solvers.closed_form.registry import merge_class
    from ..solvers.closed_form.scan import DEFAULT_GRID, scale_option

    grid: dict[str, list[Any]] = {}
    for text in texts:
        name, separator, rest = text.partition("=")
        if not separator:
            found = scale_option(merge_class(method))
            if found is None:
                raise UsageProblem(f"--scan '{text}': '{method}' has no scale; name an option: OPTION={text}.")
            name, rest = found, text
        if name in grid:
            raise UsageProblem(f"--scan '{text}': '{name}' is scanned twice.")
        values = (
            list(DEFAULT_GRID) if rest == "auto" else [_value(value, f"--scan '{text}'") for value in rest.split(",")]
        )
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            raise UsageProblem(f"--scan '{text}': expected numbers separated by commas, or 'auto'.")
        grid[name] = values
    return grid


def _fractions(step: Any) -> Any:
    """Progress in percent of the parameters."""
    return None if step is None else lambda done, total: step("% of the parameters", round(100 * done / total), 100)


def _show_plan(merging: Any, as_json: bool) -> None:
    from dataclasses import asdict

    from ..reports.tables import pairs, size
    from ..solvers.closed_form import describe_merge
    from .console import print_json, show

    plan = merging.plan()
    method = describe_merge(merging.merge)
    if as_json:
        print_json({"method": method, **asdict(plan)})
        return
    options = ", ".join(f"{name} {value}" for name, value in method.items() if name != "name" and value is not None)
    show(
        pairs(
            {
                "method": f"{method['name']}{f' ({options})' if options else ''}",
                "experts": f"{plan.experts}, {plan.parameters:,} parameters each",
                "reads": f"{size(plan.bytes_read)} (passes over the pool: {plan.passes})",
                "writes": f"{size(plan.bytes_written)} to {merging.recipe.out or '(no --out)'}",
                "host memory": f"{size(plan.host_memory)} beside the libraries",
                "device memory": size(plan.device_memory) if plan.device_memory else "none",
            }
        )
    )


def _show_scan(record: Mapping[str, Any], folder: Path) -> None:
    from ..reports.tables import listing
    from .console import note, show

    options = list(record["chosen"])
    tasks = list(record["trials"][0]["scores"])
    shown = tasks if len(tasks) <= 8 else []
    rows = []
    for trial in record["trials"]:
        scores = trial["scores"]
        mean = sum(scores.values()) / len(scores)
        mark = "chosen" if trial["options"] == record["chosen"] else ""
        cells = [f"{trial['options'][name]:g}" for name in options]
        rows.append((*cells, *(f"{100 * scores[task]:.1f}" for task in shown), f"{100 * mean:.1f}", mark))
    numeric = tuple(range(len(options) + len(shown) + 1))
    title = f"top-1 (%) on {record['data'][0]['split']} data"
    show(listing((*options, *shown, "mean", ""), rows, title=title, numeric=numeric))
    note(f"curve and record in {folder}")


def _show_options(method: str | None, as_json: bool) -> None:
    """The options of a method, its formula and its source."""
    import dataclasses
    import inspect

    from rich.markup import escape

    from ..reports.tables import listing
    from ..solvers.closed_form.registry import MERGES, merge_class
    from .console import print_json, show

    if method is None:
        raise UsageProblem("--options needs a METHOD; see `mergesolve list methods`.")
    cls = merge_class(method)
    fields = {f.name: {"type": str(f.type), "default": f.default} for f in dataclasses.fields(cls)}
    if as_json:
        print_json({"method": method, "options": fields, "source": MERGES[method].source})
        return
    show(escape(f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{MERGES[method].source}\n"))
    rows = [(name, str(entry["default"]), escape(_in_words(str(entry["type"])))) for name, entry in fields.items()]
    show(listing(("option", "default", "values"), rows) if rows else "It has no options.")


def _in_words(annotation: str) -> str:
    """A field's annotation as the user writes its values."""
    if annotation.startswith("Literal"):
        return " | ".join(part.strip().strip("'\"") for part in annotation[len("Literal[") : -1].split(","))
    words = {"float": "number", "int": "integer", "bool": "true | false", "str": "text", "None": "null"}
    parts = [part.strip() for part in annotation.split("|")]
    return " | ".join("{expert: number, ...}" if p.startswith("Mapping") else words.get(p, p) for p in parts)
