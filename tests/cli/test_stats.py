"""`mergesolve stats`: what it computes, where it puts it, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from mergesolve.pools import Pool, Statistics, model_fingerprint
from mergesolve.pools.statistics import read_metadata
from safetensors.torch import load_file, save_file

NAMES = ("blue", "green", "red")


@pytest.fixture
def folder(tiny, tmp_path):
    """The tiny pool, to write into."""
    return Path(shutil.copytree(tiny, tmp_path / "tiny"))


def flags(folder, *names):
    experts = [f"--expert={name}={folder}/experts/{name}.safetensors" for name in names]
    tasks = [f"--task={name}={folder}/{name}_train.npz" for name in names]
    return [f"--base={folder}/base.safetensors", f"--model={folder}/net.py:mlp", *experts, *tasks]


def stamps(place):
    return {path.name: path.stat().st_mtime_ns for path in sorted(Path(place).glob("*.safetensors"))}


def test_statistics_are_written_beside_the_experts_and_read_from_there(run, folder):
    result = run("stats", "--kind", "fisher", "--kind", "gram", *flags(folder, *NAMES))
    assert result.exit_code == 0, result.stderr
    found = {path.name for path in (folder / "experts").iterdir()}
    assert found == {f"{n}{k}.safetensors" for n in NAMES for k in ("", ".fisher", ".gram")}
    assert "green.gram.safetensors" in result.stdout
    # A glob still means the experts alone.
    pool = Pool.open(base=folder / "base.safetensors", experts=[str(folder / "experts" / "*")])
    assert pool.names == NAMES
    grams, fishers = Statistics.open(pool, "gram"), Statistics.open(pool, "fisher")
    for index, name in enumerate(NAMES):
        x = torch.from_numpy(np.load(folder / f"{name}_train.npz")["inputs"]).double()
        expert = load_file(folder / "experts" / f"{name}.safetensors")
        hidden = (x @ expert["0.weight"].double().T + expert["0.bias"].double()).tanh()
        p = (hidden @ expert["2.weight"].double().T + expert["2.bias"].double()).softmax(-1)
        expected = {
            grams.tensor("0.weight", index): x.T @ x / len(x),
            grams.tensor("2.weight", index): hidden.T @ hidden / len(x),
            fishers.tensor("2.bias", index): (p * (1 - p)).mean(0),
            fishers.tensor("2.weight", index): (p * (1 - p)).T @ hidden.square() / len(x),
        }
        for value, reference in expected.items():
            torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-6)
        header = read_metadata(folder / "experts" / f"{name}.fisher.safetensors")
        assert header["expert"] == model_fingerprint(folder / "experts" / f"{name}.safetensors")
        assert (header["task"], header["samples"], header["estimator"]) == (name, "30", "exact")
        assert grams.rows("0.weight", index) == 30


def test_the_same_command_again_keeps_what_is_there_and_json_says_so(run, folder):
    arguments = ["stats", "--kind", "gram", *flags(folder, "blue", "red"), "--out", "out", "--json"]
    first = run(*arguments)
    assert first.exit_code == 0, first.stderr
    assert {row["status"] for row in json.loads(first.stdout)["files"]} == {"written"}
    before = stamps("out")
    assert set(before) == {"blue.gram.safetensors", "red.gram.safetensors"}
    again = run(*arguments)
    rows = json.loads(again.stdout)["files"]
    assert [(row["expert"], row["status"]) for row in rows] == [("blue", "kept"), ("red", "kept")]
    assert stamps("out") == before
    assert not list((folder / "experts").glob("*.gram.*"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--limit", "7"], "samples 30, not 7"),
        (["--seed", "3"], "seed 0, not 3"),
        (["--estimator", "empirical"], "estimator exact, not empirical"),
        (["--exclude", r"2\."], "model "),
    ],
)
def test_files_of_another_computation_are_kept_unless_told(run, folder, change, says):
    arguments = ["stats", "--kind", "fisher", *flags(folder, "blue", "red"), "--out", "out"]
    assert run(*arguments).exit_code == 0
    before = stamps("out")
    result = run(*arguments, *change)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert says in result.stderr
    assert "--overwrite" in result.stderr
    assert stamps("out") == before
    assert run(*arguments, *change, "--overwrite").exit_code == 0
    assert all(stamps("out")[name] > before[name] for name in before)


def test_an_expert_that_changed_is_computed_again_only_when_told(run, folder):
    arguments = ["stats", "--kind", "gram", *flags(folder, "blue")]
    assert run(*arguments).exit_code == 0
    path = folder / "experts" / "blue.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert "expert " in result.stderr
    assert run(*arguments, "--overwrite").exit_code == 0
    assert read_metadata(folder / "experts" / "blue.gram.safetensors")["expert"] == model_fingerprint(path)


def test_damaged_files_are_not_taken_for_finished_ones(run, folder):
    arguments = ["stats", "--kind", "gram", *flags(folder, "blue"), "--out", "out"]
    assert run(*arguments).exit_code == 0
    path = Path("out/blue.gram.safetensors")
    whole = path.read_bytes()
    for damaged in (whole[:-4], whole[:5], b""):
        path.write_bytes(damaged)
        result = run(*arguments)
        assert result.exit_code == 2
        assert "no complete safetensors file" in result.stderr
    assert run(*arguments, "--overwrite").exit_code == 0
    assert path.read_bytes() == whole


def test_an_interrupted_command_goes_on_where_it_stopped(run, folder, monkeypatch):
    import mergesolve.objectives.statistics as statistics

    arguments = ["stats", "--kind", "gram", *flags(folder, *NAMES), "--out", "out"]
    compute, calls = statistics.grams, []

    def interrupted(*given, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(*given, **options)

    monkeypatch.setattr(statistics, "grams", interrupted)
    result = run(*arguments)
    assert result.exit_code == 130
    assert "1 of 3 files are complete" in result.stderr
    assert [path.name for path in Path("out").iterdir()] == ["blue.gram.safetensors"]
    before = stamps("out")
    assert run(*arguments).exit_code == 0
    assert len(calls) == 4
    after = stamps("out")
    assert set(after) == {f"{name}.gram.safetensors" for name in NAMES}
    assert after["blue.gram.safetensors"] == before["blue.gram.safetensors"]


def test_on_gives_an_expert_the_task_of_another_name(run, folder):
    given = [f for f in flags(folder, "blue", "red") if not f.startswith("--task=red")]
    result = run("stats", "--kind", "gram", *given, "--on", "red=blue", "--out", "out")
    assert result.exit_code == 0, result.stderr
    assert read_metadata("out/red.gram.safetensors")["task"] == "blue"
    x = load_file("out/red.gram.safetensors")["0.weight"]
    assert torch.equal(x, load_file("out/blue.gram.safetensors")["0.weight"])


def test_a_recipe_names_pool_model_and_tasks(run, folder):
    result = run("stats", "--kind", "fisher", "--recipe", folder / "recipe.yaml", "--limit", "6", "--seed", "1")
    assert result.exit_code == 0, result.stderr
    headers = [read_metadata(folder / "experts" / f"{name}.fisher.safetensors") for name in NAMES]
    assert [header["task"] for header in headers] == list(NAMES)
    assert {header["samples"] for header in headers} == {"6"}


def test_with_the_zoo_the_experts_of_the_named_tasks_are_written_into_a_folder(run, zoo):
    result = run("stats", "--kind", "gram", "--zoo", "--task", "red", "--task", "blue")
    assert result.exit_code == 0, result.stderr
    assert {path.name for path in Path("statistics").iterdir()} == {"red.gram.safetensors", "blue.gram.safetensors"}
    assert {path.name for path in (zoo.folder / "experts").iterdir()} == {f"{name}.safetensors" for name in NAMES}
    pool = Pool.open(base=zoo.base, experts=zoo.experts)
    assert Statistics.open(pool, "gram", "statistics", experts=["red", "blue"]).experts == ("blue", "red")
    everything = run("stats", "--kind", "gram", "--zoo")
    assert everything.exit_code == 0, everything.stderr
    assert {path.name for path in Path("statistics").iterdir()} == {f"{name}.gram.safetensors" for name in NAMES}
    one = run("stats", "--kind", "gram", "--zoo", "--expert", "green", "--out", "one")
    assert one.exit_code == 0, one.stderr
    assert [path.name for path in Path("one").iterdir()] == ["green.gram.safetensors"]
    other = run("stats", "--kind", "gram", "--zoo", "--on", "green=red", "--out", "other")
    assert other.exit_code == 0, other.stderr
    assert read_metadata("other/green.gram.safetensors")["task"] == "red"


def test_progress_and_results_are_apart(run, folder):
    result = run("stats", "--kind", "gram", *flags(folder, "blue"), "--out", "out")
    assert result.stderr.startswith("blue: gram of 30 samples of blue")
    assert result.stdout.startswith("expert")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Give --kind fisher or --kind gram"),
        (["--kind", "gramm"], "Did you mean 'gram'"),
        (["--kind", "gram", "--estimator", "exact"], "only the Fisher has one"),
        (["--kind", "fisher", "--estimator", "empiric"], "Did you mean 'empirical'"),
        (["--kind", "fisher", "--on", "rod=red"], "Did you mean 'red'"),
        (["--kind", "fisher", "--on", "red=rod"], "Did you mean 'red'"),
        (["--kind", "fisher", "--on", "red"], "expected NAME=VALUE"),
        (["--kind", "fisher", "--on", "red=blue"], "the task 'red' is no expert's"),
        (["--kind", "fisher", "--limit", "0"], "--limit"),
    ],
)
def test_mistakes_are_one_message_and_nothing_is_written(run, folder, arguments, says):
    before = stamps(folder / "experts")
    result = run("stats", *arguments, *flags(folder, "blue", "red"))
    assert result.exit_code == 2, result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr
    assert stamps(folder / "experts") == before


def test_an_expert_without_a_task_is_refused(run, folder):
    given = [f for f in flags(folder, "blue", "red") if not f.startswith("--task=red")]
    result = run("stats", "--kind", "gram", *given)
    assert result.exit_code == 2
    assert "--on red=TASK" in result.stderr


def test_unknown_tasks_and_experts_of_the_zoo_are_refused(run, zoo):
    for arguments in (["--task", "rod"], ["--expert", "rod"], ["--on", "rod=red"], ["--on", "red=rod"]):
        result = run("stats", "--kind", "gram", "--zoo", *arguments)
        assert result.exit_code == 2
        assert "Did you mean 'red'" in result.stderr


def test_two_experts_that_would_share_a_file_are_refused(run, folder):
    path = f"{folder}/experts/blue.safetensors"
    result = run(
        "stats", "--kind", "gram", f"--base={folder}/base.safetensors", f"--model={folder}/net.py:mlp",
        f"--expert=one={path}", f"--expert=two={path}", f"--task=t={folder}/blue_train.npz", "--on", "one=t", "--on",
        "two=t",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "would both write" in result.stderr
    assert not list((folder / "experts").glob("*.gram.*"))


def test_data_without_labels_have_statistics_but_no_empirical_fisher(run, folder):
    arrays = np.load(folder / "blue_train.npz")
    np.savez(folder / "blue_train.npz", inputs=arrays["inputs"], classes=arrays["classes"])
    result = run("stats", "--kind", "fisher", "--estimator", "empirical", *flags(folder, "blue"))
    assert result.exit_code == 2
    assert "needs labels" in result.stderr
    assert run("stats", "--kind", "fisher", "--kind", "gram", *flags(folder, "blue")).exit_code == 0


def test_data_that_do_not_fit_the_model_are_refused(run, folder):
    arrays = np.load(folder / "blue_train.npz")
    np.savez(
        folder / "blue_train.npz", inputs=arrays["inputs"][:, :4], labels=arrays["labels"], classes=arrays["classes"]
    )
    result = run("stats", "--kind", "gram", *flags(folder, "blue"))
    assert result.exit_code == 2
    assert "do not go through" in result.stderr
    assert not list((folder / "experts").glob("*.gram.*"))


def test_the_visual_tower_of_whole_clip_checkpoints(run, tmp_path):
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**config).eval().requires_grad_(False)
    for name in ("base", "cars"):
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / f"{name}.safetensors")
        for tensor in model.visual.parameters():
            tensor += 0.1 * torch.randn_like(tensor)
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "cars.npz", images=images, labels=np.arange(6) % 2, classes=["fox", "owl"])
    fields = {
        "pool": {"base": "base.safetensors", "experts": {"cars": "cars.safetensors"}},
        "model": {"architecture": config},
        "tasks": [{"name": "cars", "npz": "cars.npz"}],
    }
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump(fields))
    result = run("stats", "--kind", "fisher", "--kind", "gram", "--recipe", tmp_path / "clip.yaml")
    assert result.exit_code == 0, result.stderr
    pool = Pool.open(base=tmp_path / "base.safetensors", experts={"cars": tmp_path / "cars.safetensors"})
    fisher, gram = Statistics.open(pool, "fisher"), Statistics.open(pool, "gram")
    assert set(fisher.shapes) == set(pool.tensors)
    matrices = {n for n, shape in pool.tensors.items() if len(shape) > 1 and "embedding" not in n}
    assert set(gram.shapes) == matrices
    assert {n for n, axis in gram.axes.items() if axis == 0} == {"visual.proj"}
