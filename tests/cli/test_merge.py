"""`mergesolve merge`: every listed method, what it writes, dry runs, scans, recipes, and mistakes."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mergesolve.pools import Pool
from mergesolve.solvers.closed_form import MERGES, make_merge, merge_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import NAMES, recipe_fields
from .test_bad_input import refused

# Methods that merge exactly so many of the three experts.
COUNTS = {"wise-ft": 1, "expo": 1, "slerp": 2, "ewc": 2, "tall-mask": 1}


def pool_flags(tiny, names=NAMES):
    experts = [flag for name in names for flag in ("--expert", f"{name}={tiny / 'experts' / name}.safetensors")]
    return ["--base", tiny / "base.safetensors", *experts]


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    """Fisher and Gram statistics of the three experts."""
    from click.testing import CliRunner
    from mergesolve.cli import main

    folder = tmp_path_factory.mktemp("measured")
    flags = ["--recipe", tiny / "recipe.yaml", "--out", folder, "--kind", "fisher", "--kind", "gram"]
    result = CliRunner().invoke(main, ["stats", *map(str, flags)])
    assert result.exit_code == 0, result.output
    return folder


def statistics_flags(method, folder):
    return ["--statistics", folder] if make_merge(method).statistics else []


@pytest.mark.parametrize("method", MERGES)
def test_every_method_writes_what_the_api_computes(method, tiny, measured, run):
    names = NAMES[: COUNTS.get(method, 3)]
    result = run(
        "merge", method, *pool_flags(tiny, names), *statistics_flags(method, measured), "--out", "m.safetensors"
    )
    assert result.exit_code == 0, result.output
    pool = Pool.open(
        base=tiny / "base.safetensors",
        experts={name: tiny / "experts" / f"{name}.safetensors" for name in names},
        backend="streaming",
    )
    merge = make_merge(method)
    statistics = None
    if merge.statistics:
        from mergesolve.pools import Statistics

        statistics = Statistics.open(pool, merge.statistics, str(measured))
    expected = merge_weights(pool, merge, statistics)
    found = load_file("m.safetensors")
    assert found.keys() == load_file(tiny / "base.safetensors").keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
    with safe_open("m.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["merge"])["name"] == method
    assert json.loads(metadata["experts"]) == list(names)


@pytest.mark.parametrize("method", MERGES)
def test_every_method_prints_its_options_with_formula_and_source(method, run):
    result = run("merge", method, "--options")
    assert result.exit_code == 0
    for option in fields(make_merge(method)):
        assert option.name in result.stdout
    assert MERGES[method].source.split("(")[0].strip() in " ".join(result.stdout.split())


def test_flags_reach_the_method(tiny, run):
    flags = ["--scale", "0.7", "--density", "0.5", "--weight", "red=2", "--set", "trim=tensor"]
    result = run("merge", "ties", *pool_flags(tiny), *flags, "--out", "m.safetensors", "--json")
    method = json.loads(result.stdout)["method"]
    assert (method["scale"], method["density"], method["weights"], method["trim"]) == (0.7, 0.5, {"red": 2}, "tensor")


def test_scale_means_alpha_where_a_method_calls_it_so(tiny, run):
    run("merge", "wise-ft", *pool_flags(tiny, NAMES[:1]), "--scale", "0.25", "--out", "m.safetensors")
    base, expert = load_file(tiny / "base.safetensors"), load_file(tiny / "experts" / f"{NAMES[0]}.safetensors")
    for name, tensor in load_file("m.safetensors").items():
        torch.testing.assert_close(tensor, 0.75 * base[name] + 0.25 * expert[name])


def test_dry_run_reads_headers_only_and_writes_nothing(tiny, run, monkeypatch, tmp_path):
    def read(*_):
        raise AssertionError("a dry run read data")

    monkeypatch.setattr("mergesolve.pools.workers.Workers.run", read)
    result = run("merge", "ties", *pool_flags(tiny), "--out", "m.safetensors", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    size = sum(tensor.nbytes for tensor in load_file(tiny / "base.safetensors").values())
    assert plan["bytes_written"] == size
    assert plan["passes"] == 3
    assert plan["bytes_read"] == 3 * 4 * size + size
    assert list(tmp_path.iterdir()) == []


def test_dry_run_bounds_what_the_merge_reads(tiny, run):
    model = sum(tensor.nbytes for tensor in load_file(tiny / "base.safetensors").values())
    for method in ("average", "ties", "breadcrumbs", "dare"):
        flags = [*pool_flags(tiny), "--out", "m.safetensors", "--json"]
        plan = json.loads(run("merge", method, *flags, "--dry-run").stdout)
        found = json.loads(run("merge", method, *flags).stdout)["bytes_read"]
        assert found >= plan["passes"] * 3 * model
        # Identical tensors are looked for, and the fingerprint samples: both read less than all models once.
        assert found <= plan["bytes_read"] + 2 * 4 * model


def test_transforms_of_the_pool_come_before_the_method(tiny, run):
    flags = ["--transform", "trim:density=0.2,per=model", "--transform", "elect", "--out", "m.safetensors"]
    assert run("merge", "task-arithmetic", *pool_flags(tiny), *flags, "--scale", "1").exit_code == 0
    ties = ["--set", "merge=sum", "--scale", "1", "--density", "0.2", "--out", "ties.safetensors"]
    assert run("merge", "ties", *pool_flags(tiny), *ties).exit_code == 0
    for name, tensor in load_file("m.safetensors").items():
        torch.testing.assert_close(tensor, load_file("ties.safetensors")[name])


def test_statistics_of_a_recipe_lie_beside_it(tiny, measured, run):
    shutil.copytree(measured, "study/statistics")
    place = Path("study/recipe.yaml")
    place.write_text(yaml.safe_dump({"method": "fisher", "statistics": "statistics"}))
    result = run("merge", "--recipe", place, *pool_flags(tiny), "--out", "m.safetensors")
    assert result.exit_code == 0, result.output


def test_a_prefix_is_dropped_by_a_rename_to_nothing(tiny, run):
    weights = load_file(tiny / "experts" / "red.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in weights.items()}, "red.safetensors")
    flags = ["--base", tiny / "base.safetensors", "--expert", "red.safetensors", "--rename", "module.="]
    result = run("merge", "average", *flags, "--out", "m.safetensors")
    assert result.exit_code == 0, result.output
    for name, tensor in load_file("m.safetensors").items():
        torch.testing.assert_close(tensor, weights[name])


def test_a_recipe_says_all_of_it_and_flags_win(tiny, run):
    recipe = {
        "method": {"name": "ties", "density": 0.5, "scale": 1.0},
        "pool": recipe_fields(tiny)["pool"],
        "overrides": [{"match": r"^2\.", "method": {"name": "task-arithmetic", "scale": 0.5}}],
        "out": "from_recipe.safetensors",
        "dtype": "bfloat16",
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = run("merge", "--recipe", "recipe.yaml", "--density", "0.3", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["method"]["density"] == 0.3
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file("from_recipe.safetensors").values())
    with safe_open("from_recipe.safetensors", "pt") as file:
        assert json.loads(file.metadata()["overrides"])[0][0] == r"^2\."


def test_a_folder_gets_shards_and_the_files_beside_the_base(tiny, run):
    base = Path("base")
    base.mkdir()
    shutil.copy(tiny / "base.safetensors", base / "model.safetensors")
    (base / "config.json").write_text("{}")
    experts = [flag for name in NAMES for flag in ("--expert", f"{name}={tiny / 'experts' / name}.safetensors")]
    result = run("merge", "average", "--base", base, *experts, "--out", "merged", "--max-shard-size", "300")
    assert result.exit_code == 0, result.output
    assert Path("merged/config.json").exists()
    assert Path("merged/model.safetensors.index.json").exists()
    assert (
        Pool.open(base="merged", experts={"itself": "base"}).tensors.keys()
        == load_file(base / "model.safetensors").keys()
    )


def test_masks_are_written_one_bit_an_entry(tiny, run):
    flags = ["--set", "tall=0.6", "--masks", "masks.safetensors", "--out", "m.safetensors"]
    result = run("merge", "consensus", *pool_flags(tiny), *flags)
    assert result.exit_code == 0, result.output
    base = load_file(tiny / "base.safetensors")
    states = {name: load_file(tiny / "experts" / f"{name}.safetensors") for name in NAMES}
    vectors = {name: {k: (v - base[k]).double() for k, v in state.items()} for name, state in states.items()}
    masks = load_file("masks.safetensors")
    assert len(masks) == len(NAMES) * len(base)
    for key, packed in masks.items():
        expert, name = key.split("/")
        total = sum(vectors[other][name] for other in NAMES)
        wanted = vectors[expert][name].abs() >= 0.6 * (total - vectors[expert][name]).abs()
        bits = np.unpackbits(packed.numpy(), count=base[name].numel()).astype(bool)
        assert (bits == wanted.flatten().numpy()).mean() > 0.999  # float32 may decide ties otherwise
    refused(run("merge", "ties", *pool_flags(tiny), "--masks", "x.safetensors", "--out", "y.safetensors"), "no masks")
    assert not Path("y.safetensors").exists()


# scans


def scan_flags(tiny):
    recipe = {**recipe_fields(tiny), "method": "task-arithmetic"}
    for unused in ("domain",):
        recipe.pop(unused)
    Path("scan.yaml").write_text(yaml.safe_dump(recipe))
    return ["--recipe", "scan.yaml"]


def test_a_scan_takes_the_best_mean_and_records_what_it_was_chosen_on(tiny, run):
    result = run("merge", *scan_flags(tiny), "--scan", "0.1,0.3,0.6", "--out", "m.safetensors", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    record = json.loads(Path("m.scan/scan.json").read_text())
    means = [sum(trial["scores"].values()) / 3 for trial in record["trials"]]
    assert [trial["options"]["scale"] for trial in record["trials"]] == [0.1, 0.3, 0.6]
    best = record["trials"][means.index(max(means))]["options"]
    assert record["chosen"] == best == {"scale": report["method"]["scale"]}
    assert [entry["samples"] for entry in record["data"]] == [30, 30, 30]
    with safe_open("m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["scan"])["chosen"] == best
    assert run("merge", "task-arithmetic", *pool_flags(tiny), "--scale", best["scale"], "--out", "n.safetensors")
    for name, tensor in load_file("n.safetensors").items():
        assert torch.equal(tensor, load_file("m.safetensors")[name])


def test_a_scan_of_two_options_is_their_product_with_a_curve_each(tiny, run):
    flags = ["--scan", "0.2,0.4", "--scan", "density=0.1,0.5,1.0"]
    result = run("merge", "ties", *scan_flags(tiny), *flags, "--json")
    assert result.exit_code == 0, result.output
    trials = json.loads(result.stdout)["scan"]["trials"]
    assert len({tuple(trial["options"].items()) for trial in trials}) == 6
    text = Path("scan/scan.svg").read_text()
    assert all(f"density {value:g}" in text for value in (0.1, 0.5, 1.0))


def test_a_scan_of_integers_stays_one(tiny, run):
    flags = ["--scan", "seed=0,1", "--scan", "density=0.5,1", "--out", "m.safetensors", "--json"]
    result = run("merge", "dare", *scan_flags(tiny), *flags)
    assert result.exit_code == 0, result.output
    trials = json.loads(result.stdout)["scan"]["trials"]
    assert [tuple(trial["options"].values()) for trial in trials] == [(0, 0.5), (0, 1), (1, 0.5), (1, 1)]
    assert all(isinstance(trial["options"]["seed"], int) for trial in trials)


# mistakes


@pytest.mark.parametrize("flag", ["--out", "--masks"])
@pytest.mark.parametrize("victim", ["base", "red"])
def test_no_model_that_is_read_is_replaced(flag, victim, tiny, run):
    shutil.copytree(tiny / "experts", "experts")
    shutil.copy(tiny / "base.safetensors", "experts/base.safetensors")
    place = Path(f"experts/{victim}.safetensors")
    before = place.read_bytes()
    Path("link").symlink_to("experts")
    experts = [word for name in NAMES for word in ("--expert", f"experts/{name}.safetensors")]
    out = [] if flag == "--out" else ["--out", "m.safetensors"]
    flags = ["--base", "experts/base.safetensors", *experts, flag, f"link/{place.name}", *out]
    refused(run("merge", "consensus", *flags), place.name, "would be replaced")
    assert place.read_bytes() == before
    assert not Path("m.safetensors").exists()


MISTAKES = {
    "option that is no YAML": (["ties", "--set", "trim=["], ["trim=[", "YAML"]),
    "weight that is no YAML": (["ties", "--weight", "red=["], ["red=[", "YAML"]),
    "scan that is no YAML": (["ties", "--scan", "0.3,["], ["0.3,[", "YAML"]),
    "scale beyond float32": (["ties", "--scale", "1e39"], ["scale", "3.4e+38", "1e+39"]),
    "weight beyond float64": (["average", "--weight", f"red=1{400 * '0'}"], ["weights"]),
    "method as an option": (["average", "--set", "name=ties"], ["name=ties", "METHOD"]),
    "weight that is a truth": (["average", "--weight", "red=true"], ["weights", "True"]),
    "masks in a folder": (["consensus", "--masks", "masks"], ["--masks", ".safetensors"]),
    "masks where the model goes": (["consensus", "--masks", "./m.safetensors"], ["--masks", "--out", "same file"]),
    "negative density": (["ties", "--density", "-0.1"], ["density", "(0, 1]", "-0.1"]),
    "density above one": (["dare", "--density", "1.5"], ["density", "(0, 1]", "1.5"]),
    "unknown method": (["tise"], ["tise", "ties"]),
    "unknown option": (["ties", "--set", "densty=0.2"], ["densty", "density"]),
    "no scale": (["average", "--scale", "0.3"], ["scale"]),
    "weight of nobody": (["average", "--weight", "rde=1"], ["rde", "red"]),
    "weight that is no number": (["average", "--weight", "red=much"], ["weights", "much"]),
    "weights that cancel": (["average", "--weight", "red=-2"], ["weights", "sum to 0"]),
    "scan without data": (["ties", "--scan", "0.1,0.2"], ["scan", "--task"]),
    "scan of text": (["ties", "--scan", "low,high"], ["numbers"]),
    "fisher without statistics": (["fisher"], ["fisher", "mergesolve stats"]),
    "statistics for nothing": (["ties", "--statistics", "."], ["no statistics"]),
    "slerp of three": (["slerp"], ["exactly 2", "has 3"]),
    "ewc of three": (["ewc"], ["2", "3"]),
    "unknown transform": (["average", "--transform", "trmi"], ["trmi", "trim"]),
    "transform with a bad option": (["average", "--transform", "trim:density=7"], ["density", "7"]),
    "override that finds nothing": (["average", "--recipe", "none.yaml"], ["nothing.here"]),
    "no method": ([], ["METHOD"]),
    "dtype": (["average", "--dtype", "int8"], ["int8", "bfloat16"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(case, tiny, run, tmp_path):
    arguments, words = MISTAKES[case]
    recipe = {"overrides": [{"match": "nothing.here", "method": "average"}]}
    Path("none.yaml").write_text(yaml.safe_dump(recipe))
    refused(run("merge", *arguments, *pool_flags(tiny), "--out", "m.safetensors"), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["none.yaml"]


def test_a_weight_over_weights_that_are_no_mapping(tiny, run):
    Path("list.yaml").write_text("method: {name: average, weights: [1, 2]}")
    refused(run("merge", "--recipe", "list.yaml", *pool_flags(tiny), "--weight", "red=2", "--dry-run"), "weights")


def test_an_analogy_of_two_names_the_count(tiny, run, tmp_path):
    refused(run("merge", "analogy", *pool_flags(tiny, NAMES[:2]), "--out", "m.safetensors"), "exactly 3", "has 2")
    assert list(tmp_path.iterdir()) == []


def test_statistics_of_another_expert_are_refused(tiny, measured, run):
    swapped = Path(shutil.copytree(measured, "swapped"))
    first, second = (swapped / f"{name}.fisher.safetensors" for name in NAMES[:2])
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    refused(run("merge", "fisher", *pool_flags(tiny), "--statistics", swapped, "--out", "m.safetensors"), "stats")
    assert not Path("m.safetensors").exists()


def test_grams_of_the_wrong_size_are_refused(tiny, measured, run):
    cut = Path(shutil.copytree(measured, "cut"))
    place = cut / f"{NAMES[0]}.gram.safetensors"
    with safe_open(place, "pt") as file:
        metadata = file.metadata()
    save_file({name: gram[:-1, :-1].contiguous() for name, gram in load_file(place).items()}, place, metadata)
    refused(
        run("merge", "regmean", *pool_flags(tiny), "--statistics", cut, "--out", "m.safetensors"), "[5, 5]", "[6, 6]"
    )
    assert not Path("m.safetensors").exists()


def test_singular_grams_are_refused_with_the_tensor_and_the_remedy(tiny, measured, run):
    flat = Path(shutil.copytree(measured, "flat"))
    for name in NAMES:
        place = flat / f"{name}.gram.safetensors"
        with safe_open(place, "pt") as file:
            metadata = file.metadata()
        save_file({key: torch.ones_like(gram) for key, gram in load_file(place).items()}, place, metadata)
    result = run(
        "merge", "regmean", *pool_flags(tiny), "--statistics", flat, "--set", "shrink=1", "--out", "m.safetensors"
    )
    refused(result, "singular", ".weight")
    assert not Path("m.safetensors").exists()
    assert not list(Path().glob(".*partial"))


def test_an_override_without_tensors_is_a_mistake_of_ours_and_none_of_mergekits(tiny, run):
    models = [{"model": str(tiny / "experts" / f"{name}.safetensors")} for name in NAMES]
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(tiny / "base.safetensors"),
        "models": [{**model, "parameters": {"weight": 0.2}} for model in models],
        "parameters": {"lambda": [{"filter": "norm", "value": 0.5}, {"value": 1.0}]},
    }
    Path("mergekit.yaml").write_text(yaml.safe_dump(spec))
    result = run("merge", "--recipe", "mergekit.yaml", "--out", "m.safetensors")
    assert result.exit_code == 0, result.output
    run("merge", "task-arithmetic", *pool_flags(tiny), "--scale", "0.2", "--out", "n.safetensors")
    for name, tensor in load_file("m.safetensors").items():
        torch.testing.assert_close(tensor, load_file("n.safetensors")[name])


def test_tensors_without_a_fisher_are_told(tiny, run):
    flags = ["--recipe", tiny / "recipe.yaml", "--exclude", "^2", "--out", "some", "--kind", "fisher"]
    assert run("stats", *flags).exit_code == 0
    result = run("merge", "fisher", *pool_flags(tiny), "--statistics", "some", "--out", "m.safetensors")
    assert result.exit_code == 0, result.output
    assert "Warning: 2 of 4 merged tensors have no Fisher, '2.bias' among them: they are averaged." in result.stderr
