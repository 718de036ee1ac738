"""evaluate, materialize, plot, list, pool inspect, zoo and demo on the tiny pool."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mergesolve.cli.demo import LABELS, METHODS, spread
from mergesolve.cli.listing import KINDS
from mergesolve.cli.protocol import PROTOCOLS
from mergesolve.federated.registry import STEPS
from mergesolve.objectives.registry import OBJECTIVES
from mergesolve.pools.transforms import TRANSFORMS
from mergesolve.solvers import DOMAINS, PRESETS, SCALARIZATIONS, SOLVERS, STEP_RULES
from mergesolve.solvers.closed_form import MERGES
from mergesolve.solvers.selection import SELECTORS
from safetensors.torch import load_file, save_file

from .conftest import NAMES, recipe_fields


def top1(folder, weights, name):
    """Accuracy by plain matrix arithmetic."""
    data = np.load(folder / f"{name}_test.npz")
    weights = {k: v.double().numpy() for k, v in weights.items()}
    hidden = np.tanh(data["inputs"] @ weights["0.weight"].T + weights["0.bias"])
    logits = hidden @ weights["2.weight"].T + weights["2.bias"]
    return float((logits.argmax(1) == data["labels"]).mean())


# evaluate


def test_evaluate_of_checkpoints_is_the_accuracy(tiny, run, zoo):
    result = run("evaluate", "--zoo", "base", "red", tiny / "experts" / "blue.safetensors", "--json")
    assert result.exit_code == 0, result.stderr
    table = json.loads(result.stdout)
    assert table["tasks"] == list(NAMES)
    files = [tiny / "base.safetensors", tiny / "experts" / "red.safetensors", tiny / "experts" / "blue.safetensors"]
    for row, file in zip(table["rows"], files, strict=True):
        expected = {name: top1(tiny, load_file(file), name) for name in NAMES}
        assert row["accuracies"] == pytest.approx(expected)
        assert row["mean"] == pytest.approx(np.mean(list(expected.values())))
        assert row["worst"] == pytest.approx(min(expected.values()))


def test_evaluate_of_a_run_is_that_of_its_merged_checkpoint(solved, tiny, run):
    alone = json.loads(run("evaluate", solved, "--json").stdout)
    assert alone["tasks"] == list(NAMES)
    merged = load_file(solved / "merged.safetensors")
    assert alone["rows"][0]["accuracies"] == pytest.approx({name: top1(tiny, merged, name) for name in NAMES})
    beside = run("evaluate", solved, solved / "merged.safetensors", "--recipe", solved / "recipe.yaml", "--json")
    first, second = json.loads(beside.stdout)["rows"]
    assert first["accuracies"] == second["accuracies"] == alone["rows"][0]["accuracies"]


def test_evaluate_takes_data_and_model_from_flags(tiny, run):
    result = run(
        "evaluate", tiny / "experts" / "red.safetensors", "--model", f"{tiny}/net.py:mlp",
        "--task", f"red={tiny}/red_test.npz", "--markdown",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    accuracy = 100 * top1(tiny, load_file(tiny / "experts" / "red.safetensors"), "red")
    assert result.stdout.split("\n")[2].startswith(f"| {tiny}/experts/red.safetensors | {accuracy:.1f} |")


def test_evaluate_without_test_data_says_what_to_give(tiny, run):
    fields = recipe_fields(tiny)
    del fields["tasks"][2]["test"]
    Path("r.yaml").write_text(yaml.safe_dump(fields))
    result = run("evaluate", tiny / "base.safetensors", "--recipe", "r.yaml")
    assert result.exit_code == 2
    assert "'test: PATH'" in result.stderr


# materialize


def test_materialize_writes_what_solve_wrote(solved, run):
    assert run("materialize", solved, "--out", "m.safetensors").exit_code == 0
    written, expected = load_file("m.safetensors"), load_file(solved / "merged.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_materialize_converts_and_writes_folders(solved, run):
    result = run("materialize", solved, "--out", "folder", "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["written"] == ["folder/model.safetensors"]
    expected = load_file(solved / "merged.safetensors")
    for name, tensor in load_file("folder/model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name].bfloat16(), rtol=0.01, atol=0.01)
        assert tensor.dtype == torch.bfloat16


def test_materialize_refuses_a_pool_that_has_changed(solved, tiny, run, tmp_path):
    shutil.copytree(solved, "r")
    moved = shutil.copytree(tiny, tmp_path / "moved")
    recipe = Path("r/recipe.yaml")
    recipe.write_text(recipe.read_text().replace(str(tiny), str(moved)))
    assert run("materialize", "r", "--out", "same.safetensors").exit_code == 0  # another folder, the same files
    changed = load_file(moved / "experts" / "red.safetensors")
    save_file({name: tensor + 1 for name, tensor in changed.items()}, moved / "experts" / "red.safetensors")
    result = run("materialize", "r", "--out", "other.safetensors")
    assert result.exit_code == 2
    assert "have changed since it was solved" in result.stderr
    assert not Path("other.safetensors").exists()
    result = run("evaluate", "r")
    assert result.exit_code == 2
    assert "have changed since it was solved" in result.stderr


# plot


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_are_drawn_without_warnings(solved, run):
    shutil.copytree(solved, "r", ignore=shutil.ignore_patterns("figures"))
    for name in ("trace.jsonl", "result.json"):
        path = Path("r") / name
        path.write_text(path.read_text().replace('"red"', '"\\u732b"').replace('"blue"', '"\\u0928\\u0940"'))
    result = run("plot", "r", "--format", "png")
    assert result.exit_code == 0, result.stderr
    assert "Glyph" not in result.stderr


def test_plot_of_one_run_goes_into_its_folder(solved, run):
    shutil.copytree(solved, "r", ignore=shutil.ignore_patterns("figures"))
    result = run("plot", "r", "--format", "svg", "--json")
    assert result.exit_code == 0
    figures = json.loads(result.stdout)["figures"]
    assert "r/figures/trajectories.svg" in figures
    assert all(Path(path).stat().st_size > 0 for path in figures)


def test_plot_of_several_runs_shows_all_names_side_by_side(solved, run):
    shutil.copytree(solved, "first", ignore=shutil.ignore_patterns("figures"))
    shutil.copytree("first", "second")
    Path("second/result.json").unlink()  # as if it were still going
    assert run("plot", "first", "second", "--out", "both").exit_code == 0
    text = Path("both/convergence.svg").read_text()
    assert ">first<" in text
    assert ">second (running)<" in text


# list


def test_list_names_every_entry_of_every_registry_once(run):
    result = run("list", "--json")
    found = {kind: [entry["name"] for entry in entries] for kind, entries in json.loads(result.stdout).items()}
    assert found == {
        "solvers": list(SOLVERS),
        "rules": list(STEP_RULES),
        "domains": list(DOMAINS),
        "scalarizations": list(SCALARIZATIONS),
        "objectives": list(OBJECTIVES),
        "presets": list(PRESETS),
        "methods": list(MERGES),
        "transforms": list(TRANSFORMS),
        "selectors": list(SELECTORS),
        "steps": list(STEPS),
        "protocols": list(PROTOCOLS),
    }


def test_list_takes_several_kinds_in_the_order_asked_for(run):
    assert list(json.loads(run("list", "rules", "solvers", "--json").stdout)) == ["rules", "solvers"]


@pytest.mark.parametrize("kind", KINDS)
def test_list_has_one_line_for_each_and_a_source_for_each_method(kind, run):
    entries = json.loads(run("list", kind, "--json").stdout)[kind]
    printed = run("list", kind).stdout
    for entry in entries:
        assert entry["summary"]
        assert entry["name"] in printed
        if kind in ("solvers", "rules", "objectives"):
            assert entry["source"]


# pool inspect


def test_inspect_reports_norms_cosines_and_flags(tiny, run, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "pool")
    shutil.copy(folder / "experts" / "red.safetensors", folder / "experts" / "again.safetensors")
    arguments = ("--base", folder / "base.safetensors", "--expert", folder / "experts/*.safetensors")
    result = run("pool", "inspect", *arguments, "--json", "--figure", "cosines.png")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["names"] == ["again", "blue", "green", "red"]
    base = load_file(folder / "base.safetensors")
    vectors = []
    for name in report["names"]:
        expert = load_file(folder / "experts" / f"{name}.safetensors")
        vectors.append(torch.cat([(expert[key] - base[key]).double().flatten() for key in base]))
    np.testing.assert_allclose(report["norms"], [float(v.norm()) for v in vectors], rtol=1e-5)
    expected = torch.nn.functional.cosine_similarity(vectors[1], vectors[2], dim=0)
    assert report["cosines"][1][2] == pytest.approx(float(expected), abs=1e-5)
    assert [flag["model"] for flag in report["flags"] if flag["kind"] == "duplicate"] == ["red"]
    assert Path("cosines.png").stat().st_size > 0
    printed = run("pool", "inspect", *arguments).stdout
    assert "flagged: expert 'red' is a duplicate of 'again'" in printed
    assert "layer 2, tensor 4, row 30" in printed


def test_inspect_reads_a_pool_file_relative_to_itself(tiny, run):
    Path("sub").mkdir()
    shutil.copytree(tiny, "sub/pool")
    Path("sub/pool.yaml").write_text("base: pool/base.safetensors\nexperts: ['pool/experts/*.safetensors']\n")
    result = run("pool", "inspect", "sub/pool.yaml", "--exclude", "bias", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["tensors"], report["carried"]) == (2, 2)


def test_inspect_of_the_zoo_takes_all_its_experts(run, zoo):
    assert json.loads(run("pool", "inspect", "--zoo", "--json").stdout)["names"] == list(NAMES)
    refused = run("pool", "inspect", "--zoo", "--expert", "rde")
    assert refused.exit_code == 2
    assert "unknown expert of the zoo 'rde'. Did you mean 'red'?" in refused.stderr


# zoo


def test_zoo_info_lists_tasks_with_both_accuracies(run, zoo):
    printed = run("zoo", "info").stdout
    for name in NAMES:
        assert f"{name} " in printed
    assert "33.0" in printed
    assert json.loads(run("zoo", "info", "--json").stdout)["record"]["expert_mean"] == 90.0


def test_zoo_build_hands_its_options_on(run, monkeypatch):
    called = {}

    def build(out, **options):
        options["progress"]("base", 1, 2, 0.5)
        called.update(options, out=out)

    import mergesolve.zoo

    monkeypatch.setattr(mergesolve.zoo, "build", build, raising=False)
    assert run("zoo", "build", "somewhere", "--reduced", "--workers", 2).exit_code == 0
    assert called["out"] == "somewhere"
    assert called["reduced"] is True
    assert called["workers"] == 2


def test_solve_on_the_zoo_names_unknown_tasks(run, zoo):
    result = run("solve", "--zoo", "--task", "rde", "--run", "r")
    assert result.exit_code == 2
    assert "unknown task of the zoo 'rde'. Did you mean 'red'?" in result.stderr
    nothing = run("solve", "--zoo", "--run", "r")
    assert nothing.exit_code == 2
    assert "Tasks of the zoo: blue, green, red" in nothing.stderr


def test_solve_on_the_zoo_is_the_solve_on_its_files(run, zoo, tiny):
    common = ("--preset", "fw-soft", "--max-iter", 3, "--no-figures", "--quiet")
    tasks = [part for name in NAMES for part in ("--task", name)]
    assert run("solve", "--zoo", *tasks, *common, "--run", "zoo").exit_code == 0
    assert run("solve", tiny / "recipe.yaml", *common, "--run", "files").exit_code == 0
    merged = load_file("files/merged.safetensors")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in load_file("zoo/merged.safetensors").items())
    assert yaml.safe_load(Path("zoo/recipe.yaml").read_text())["zoo"] is True


# demo


@pytest.fixture(scope="module")
def short_demo():
    """The methods of the demo with fewer iterations."""
    before = {name: dict(preset) for name, preset in PRESETS.items()}
    changes = {name: METHODS[name].changes for name in METHODS}
    for method in METHODS.values():
        PRESETS[method.preset]["max_iter"] = min(PRESETS[method.preset]["max_iter"], 2)
        object.__setattr__(method, "changes", {k: v for k, v in method.changes.items() if k != "max_iter"})
    yield
    for name, preset in before.items():
        PRESETS[name].update(preset)
    for name, method in METHODS.items():
        object.__setattr__(method, "changes", changes[name])


def test_demo_runs_every_method_and_writes_one_table(run, zoo, short_demo, tiny):
    result = run("demo", "--task", "blue", "--task", "red")
    assert result.exit_code == 0, result.stderr
    titles = [method.title for method in METHODS.values()]
    for title in (*titles, "expert: blue", "expert: red", "each task's own expert"):
        assert title in result.stdout
    for title in titles:  # one line a method as it ends
        assert sum(line.startswith(title) for line in result.stderr.split("\n")) >= 1
    table = json.loads(Path("runs/demo/table.json").read_text())
    rows = {row["method"]: row for row in table["rows"]}
    own = {name: top1(tiny, load_file(tiny / "experts" / f"{name}.safetensors"), name) for name in ("blue", "red")}
    assert rows["each task's own expert"]["accuracies"] == pytest.approx(own)
    base = load_file(tiny / "base.safetensors")
    assert rows["pretrained"]["accuracies"] == pytest.approx({name: top1(tiny, base, name) for name in own})
    assert all(rows[title]["seconds"] > 0 and rows[title]["peak_memory"] > 0 for title in titles)
    transductive = {title for title, row in rows.items() if "transductive" in row["data"]}
    assert transductive == {method.title for name, method in METHODS.items() if name.startswith("adamerging")}
    assert Path("runs/demo/table.md").read_text().startswith("| method | blue | red | mean | worst | seconds |")
    assert "Frank-Wolfe, soft" in Path("runs/demo/table.txt").read_text()
    assert Path("runs/demo/figures/trajectories.png").exists()
    for name in METHODS:
        assert Path(f"runs/demo/{name}/merged.safetensors").exists()
        assert Path(f"runs/demo/{name}/recipe.yaml").exists()
        data = json.loads(Path(f"runs/demo/{name}/result.json").read_text())["data"]
        assert data["test_inputs"] is name.startswith("adamerging")
        labels = PRESETS[METHODS[name].preset]["objective"]["name"] == "cross-entropy"
        assert data["labelled"] == (60 if labels else 0)  # 30 a task are there, fewer than the limit


def test_demo_again_replaces_its_runs_and_can_run_few_methods(run, zoo, short_demo):
    arguments = ("demo", "--task", "blue", "--task", "red", "--method", "average", "--json")
    first, second = run(*arguments), run(*arguments)
    assert first.exit_code == second.exit_code == 0, second.stderr
    one, two = (json.loads(result.stdout)["rows"][0]["accuracies"] for result in (first, second))
    assert one == two
    assert [row["method"] for row in json.loads(second.stdout)["rows"]] == [
        "weight average", "expert: blue", "expert: red", "each task's own expert",
    ]  # fmt: skip


def test_a_demo_run_is_a_solve_that_can_be_repeated(run, zoo, short_demo):
    assert run("demo", "--task", "blue", "--task", "red", "--method", "fw-soft", "--json").exit_code == 0
    again = run("solve", "runs/demo/fw-soft/recipe.yaml", "--run", "again", "--no-figures", "--quiet")
    assert again.exit_code == 0, again.stderr
    one, two = (load_file(f"{folder}/coefficients.safetensors") for folder in ("again", "runs/demo/fw-soft"))
    assert torch.equal(one["coefficients"], two["coefficients"])


def test_every_labelled_method_of_the_demo_sees_the_same_labels():
    labelled = [m for m in METHODS.values() if PRESETS[m.preset]["objective"]["name"] == "cross-entropy"]
    assert all(method.changes["limit"] == LABELS for method in labelled)
    assert {"Frank-Wolfe, soft", "projected gradient (control)"} <= {method.title for method in labelled}


def test_evaluation_tasks_are_spread_over_the_table():
    names = tuple(f"t{k}" for k in range(24))
    assert spread(names, 4) == ("t0", "t6", "t12", "t18")
    assert spread(names[:3], 4) == names[:3]
