"""`mergesolve select`, and `--select` in front of other commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from mergesolve.pools import Pool
from mergesolve.solvers.selection import SELECTORS
from safetensors import safe_open

from .conftest import NAMES
from .test_bad_input import refused
from .test_merge import pool_flags

DATA_FREE = "dpp:quality=norm,similarity=task-vectors"


def data_flags(tiny):
    tasks = [flag for name in NAMES for flag in ("--task", f"{name}={tiny / name}_train.npz")]
    return ["--model", f"{tiny / 'net.py'}:mlp", *tasks]


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector_prints_its_choice_with_reasons(selector, tiny, run):
    spec = {"dpp": "dpp:over=best,k=2", "random": "random:k=2", "top-k": "top-k:k=2"}.get(selector, selector)
    result = run("select", spec, *pool_flags(tiny), *data_flags(tiny), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    chosen = [entry["expert"] for entry in report["selected"]]
    assert set(chosen) <= set(NAMES)
    assert len(chosen) == len(set(chosen)) >= 1
    assert all(entry["reason"] for entry in report["selected"])
    assert report["selector"]["name"] == selector
    text = run("select", spec, *pool_flags(tiny), *data_flags(tiny)).stdout
    assert all(name in text for name in chosen)


def test_what_is_used_of_the_data_is_recorded(tiny, run):
    report = json.loads(run("select", "best-single", *pool_flags(tiny), *data_flags(tiny), "--json").stdout)
    assert [(entry["task"], entry["samples"]) for entry in report["data"]] == [(name, 30) for name in NAMES]
    report = json.loads(run("select", DATA_FREE, "--k", 2, *pool_flags(tiny), *data_flags(tiny), "--json").stdout)
    assert report["data"] == []


def test_the_pool_that_is_written_is_one_that_other_commands_read(tiny, run):
    result = run("select", DATA_FREE, "--k", 2, *pool_flags(tiny), "--out", "chosen.yaml", "--figures", "figures")
    assert result.exit_code == 0, result.output
    chosen = list(yaml.safe_load(Path("chosen.yaml").read_text())["experts"])
    assert list(Pool.open("chosen.yaml").names) == chosen
    assert len(chosen) == 2
    assert {path.name for path in Path("figures").iterdir()} >= {"kernel.png", "quality.svg", "map.svg"}
    assert run("merge", "average", "--pool", "chosen.yaml", "--out", "m.safetensors").exit_code == 0
    with safe_open("m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["experts"]) == chosen


def test_selection_in_front_of_a_merge_is_the_merge_of_the_selection(tiny, run):
    run("select", DATA_FREE, "--k", 2, *pool_flags(tiny), "--out", "chosen.yaml")
    run("merge", "ties", "--pool", "chosen.yaml", "--out", "a.safetensors")
    result = run("merge", "ties", *pool_flags(tiny), "--select", f"{DATA_FREE},k=2", "--out", "b.safetensors")
    assert result.exit_code == 0, result.output
    with safe_open("a.safetensors", "pt") as a, safe_open("b.safetensors", "pt") as b:
        chosen = json.loads(b.metadata()["selection"])
        assert chosen["selector"]["name"] == "dpp"
        assert [entry["expert"] for entry in chosen["selected"]] == json.loads(b.metadata()["experts"])
        assert a.metadata()["experts"] == b.metadata()["experts"]
        for name in a.keys():  # noqa: SIM118 (not a mapping)
            assert a.get_tensor(name).equal(b.get_tensor(name))


def test_selection_in_front_of_a_solve_is_recorded_and_resolved_in_the_recipe(tiny, run):
    flags = ["--select", "dpp:over=best,k=2", "--preset", "projected-gradient", "--max-iter", "3", "--run", "run"]
    result = run("solve", *pool_flags(tiny), *data_flags(tiny), *flags)
    assert result.exit_code == 0, result.output
    record = json.loads(Path("run/selection.json").read_text())
    chosen = [entry["expert"] for entry in record["selected"]]
    recipe = yaml.safe_load(Path("run/recipe.yaml").read_text())
    assert list(recipe["pool"]["experts"]) == chosen
    assert "select" not in recipe["pool"]
    assert record["data"][0]["samples"] == 30
    assert run("materialize", "run", "--out", "again.safetensors").exit_code == 0
    assert run("solve", "--resume", "run", "--max-iter", "5").exit_code == 0


def test_relevance_is_a_table_of_tasks_and_experts(tiny, run):
    flags = ["--k", "1", "--relevance", "--figures", "figures", "--json"]
    result = run("select", "top-k", *pool_flags(tiny), *data_flags(tiny), *flags)
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)["relevance"]
    assert table["tasks"] == list(NAMES)
    # Along its own expert, each task's loss falls the most.
    assert [min(range(3), key=lambda i, row=row: row[i]) for row in table["scores"]] == [0, 1, 2]
    assert Path("figures/relevance.png").exists()


def test_the_bound_is_that_of_its_terms(tiny, run):
    result = run("select", "all", *pool_flags(tiny), *data_flags(tiny), "--bound", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["bound"]
    assert rows["chosen"] == rows["all"]
    for terms in rows.values():  # lemma 3
        assert terms["ensemble_risk"] <= terms["mean_source_risk"] - terms["diversity"] + 1e-12
        assert terms["delta_squared"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dpp", "--k", "0"], ["'k'", "0"]),
        ([DATA_FREE, "--k", "4"], ["'k'", "3"]),
        (["dppp"], ["dppp", "dpp"]),
        (["dpp:charm=1"], ["charm"]),
        (["greedy-soup"], ["accuracy", "validation data"]),
        (["top-k:k=1", "--relevance"], ["--relevance", "--task"]),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(arguments, words, tiny, run, tmp_path):
    refused(run("select", *arguments, *pool_flags(tiny), "--out", "chosen.yaml", "--figures", "figures"), *words)
    assert list(tmp_path.iterdir()) == []


def test_an_expected_size_instead_of_k_and_lists_of_names(tiny, run):
    report = json.loads(run("select", f"{DATA_FREE},size=1.5", *pool_flags(tiny), "--json").stdout)
    assert report["selector"]["k"] is None
    assert report["details"]["expected_size"] == pytest.approx(1.5)
    names = f"{DATA_FREE},include=[{NAMES[2]},{NAMES[0]}],k=2"
    report = json.loads(run("select", names, *pool_flags(tiny), "--json").stdout)
    assert {entry["expert"] for entry in report["selected"]} == {NAMES[0], NAMES[2]}
    report = json.loads(run("select", f"{DATA_FREE},include={NAMES[1]},k=1", *pool_flags(tiny), "--json").stdout)
    assert [entry["expert"] for entry in report["selected"]] == [NAMES[1]]


def test_the_pool_file_gets_its_folder_and_is_no_model(tiny, run):
    assert run("select", "random:k=1", *pool_flags(tiny), "--out", "new/chosen.yaml").exit_code == 0
    assert Pool.open("new/chosen.yaml").n == 1
    refused(run("select", "random:k=1", *pool_flags(tiny), "--out", "m.safetensors"), "m.safetensors", ".yaml")


def test_select_is_no_flag_where_it_does_nothing(tiny, run):
    refused(run("select", "random:k=2", "--select", "random:k=1", *pool_flags(tiny)), "--select", "argument")
    stats = ["stats", "--kind", "fisher", "--select", "random:k=1", "--recipe", tiny / "recipe.yaml", "--out", "s"]
    refused(run(*stats), "--select", "--expert")
    assert not Path("s").exists()
