"""`mergesolve landscape` on the tiny pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from .conftest import NAMES, Run, SmallZoo

QUICK = ("--grid", 3)


def answer(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_segment_writes_numbers_and_figures_and_prints_the_barrier(run: Run, tiny: Path) -> None:
    recipe = ("--recipe", tiny / "recipe.yaml")
    result = run(
        "landscape", "segment", "expert:blue", "expert:red", *recipe, "--grid", 5, "--accuracy", "--out", "out"
    )
    assert result.exit_code == 0, result.output
    assert "blue (t = 0) to red (t = 1): barrier" in result.stdout
    assert {path.name for path in Path("out").iterdir()} == {"segment.png", "segment.svg", "segment.json"}
    found = json.loads(Path("out/segment.json").read_text())
    assert found["steps"][0] == 0
    assert found["steps"][-1] == 1
    assert set(found["tasks"]) == set(found["measured"]) == set(NAMES)
    np.testing.assert_allclose(found["values"], np.mean(list(found["tasks"].values()), axis=0))
    assert [entry["task"] for entry in found["data"]] == list(NAMES)


def test_ends_of_segments_are_points_of_other_commands(run: Run, tiny: Path) -> None:
    recipe = ("--recipe", tiny / "recipe.yaml", "--json")
    there = answer(run("landscape", "segment", "base", "average", *recipe, *QUICK, "--refine", 0))
    swap = answer(run("landscape", "swap", "base", "average", *recipe))
    assert swap["ends"] == pytest.approx([there["values"][0], there["values"][-1]], rel=1e-5)
    assert swap["together"][0][-1] == pytest.approx(there["values"][-1], rel=1e-5)
    pairs = answer(run("landscape", "barriers", "base", "average", *recipe, *QUICK, "--refine", 0))
    assert pairs["segments"][0]["values"] == pytest.approx(there["values"], rel=1e-6)


def test_runs_are_points_with_their_own_pool_and_data(run: Run, solved: Path) -> None:
    result = json.loads((solved / "result.json").read_text())
    trace = [json.loads(line) for line in (solved / "trace.jsonl").read_text().splitlines()[1:]]
    last = trace[-1]["iteration"]
    found = answer(run("landscape", "segment", f"run:{solved}@0", f"run:{solved}", *QUICK, "--json", "--refine", 0))
    assert found["values"][0] == pytest.approx(trace[0]["value"], rel=1e-4)
    assert found["values"][-1] == pytest.approx(result["objective"], rel=1e-4)
    chain = answer(run("landscape", "barriers", "--iterates", solved, *QUICK, "--refine", 0, "--json"))
    assert chain["points"][0] == "0"
    assert chain["points"][-1] == str(last)
    assert len(chain["segments"]) == len(chain["points"]) - 1


def test_plane_projects_a_run_and_keeps_distances(run: Run, solved: Path) -> None:
    flags = ("--trajectory", solved, "--by-task", "--out", "out", "--json", *QUICK)
    found = answer(run("landscape", "plane", "base", "expert:blue", f"run:{solved}", *flags))
    points = np.array(found["points"])
    apart = answer(run("landscape", "segment", "expert:blue", f"run:{solved}", *QUICK, "--refine", 0, "--json"))
    assert np.linalg.norm(points[1] - points[2]) == pytest.approx(apart["length"], rel=1e-5)
    path = np.array(found["paths"]["run"])
    np.testing.assert_allclose(path[-1, :2], points[2], atol=1e-4)  # the best iterate is the last of this solve
    assert Path("out/plane.png").stat().st_size > 0


def test_features_need_no_labels_and_cover_the_tasks(run: Run, tiny: Path) -> None:
    recipe = ("--recipe", tiny / "recipe.yaml")
    found = answer(run("landscape", "features", "base", "expert:green", *recipe, "--grid", 4, "--json"))
    assert set(found["tasks"]) == set(NAMES)
    assert found["steps"] == pytest.approx([1 / 3, 2 / 3])
    assert all(value["cosine"] <= 1 + 1e-9 for values in found["tasks"].values() for value in values)
    assert "cosine to a" in run("landscape", "features", "base", "average", *recipe, "--grid", 3).stdout


def test_check_without_data_reads_the_pool_alone(run: Run, tiny: Path) -> None:
    flags = ("--base", tiny / "base.safetensors", "--expert", tiny / "experts/*.safetensors")
    found = answer(run("landscape", "check", *flags, "--json"))
    assert {one["name"] for one in found["experts"]} == set(NAMES)
    assert found["gain"] is None
    assert all(one["barrier"] is None for one in found["experts"])


def test_check_with_data_measures_barriers_gain_and_bound(run: Run, tiny: Path) -> None:
    recipe = ("--recipe", tiny / "recipe.yaml")
    result = run("landscape", "check", *recipe, *QUICK, "--out", "out")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("out/check.json").read_text())
    assert found["gain"]["gain"] == pytest.approx(found["gain"]["mean"] - found["gain"]["merged"])
    assert all(one["barrier"] >= 0 for one in found["experts"])
    assert found["bound"]["all"]["average_risk"] is not None
    assert "the pool as it is" in result.stdout
    strict = answer(run("landscape", "check", *recipe, *QUICK, "--threshold", "norm_ratio=1.0001", "--json"))
    assert strict["thresholds"]["norm_ratio"] == 1.0001
    assert strict["verdict"] != "go"


def test_zoo_points_and_checks(run: Run, zoo: SmallZoo) -> None:
    flags = ("--zoo", "--task", "blue", "--limit", 6, "--split", "test", *QUICK, "--json")
    found = answer(run("landscape", "segment", "base", "expert:blue", *flags, "--refine", 0))
    assert (found["data"][0]["split"], found["data"][0]["samples"]) == ("test", 6)
    assert answer(run("landscape", "check", *flags))["experts"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment", "base", "expert:pink"], "Unknown expert 'pink'"),
        (["segment", "base", "bass"], "Unknown starting point 'bass'. Did you mean 'base'?"),
        (["segment", "base", "base"], "the point 'base' is given twice"),
        (["segment", "base", "run:"], "needs a folder after the colon"),
        (["segment", "base", "run:nowhere"], "run 'nowhere': there is no such folder"),
        (["plane", "base", "average", "task-arithmetic:0.1"], "lie on a line"),
        (["barriers", "base"], "one point, 'base', has no segment"),
        (["check", "--threshold", "barrier=1"], "There is no threshold 'barrier'"),
        (["check", "--threshold", "similar=much"], "expected a number"),
    ],
)
def test_mistakes_are_told_in_one_line_and_leave_nothing(
    run: Run, tiny: Path, arguments: list[str], message: str
) -> None:
    result = run("landscape", *arguments, "--recipe", tiny / "recipe.yaml", "--out", "out")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not Path("out").exists()


def test_a_file_in_the_place_of_the_folder_is_told_before_anything_is_read(run: Run) -> None:
    Path("taken").write_text("")
    for out in ("taken", "taken/deeper"):
        result = run("landscape", "segment", "base", "average", "--recipe", "nowhere.yaml", "--out", out)
        assert result.exit_code == 2
        assert "'taken' is a file. Name a folder." in result.stderr


def test_iterates_that_are_not_there_and_other_pools_are_refused(run: Run, solved: Path, tiny: Path) -> None:
    result = run("landscape", "segment", f"run:{solved}@999", "base")
    assert result.exit_code == 2
    assert "recorded no iterate 999; it has 0 to" in result.stderr
    fields = yaml.safe_load((tiny / "recipe.yaml").read_text())
    fields["pool"] = {
        "base": str(tiny / "base.safetensors"),
        "experts": {"blue": str(tiny / "experts/red.safetensors")},
    }
    fields["model"] = {"module": str(tiny / "net.py:mlp")}
    fields["tasks"] = [{"name": "blue", "npz": str(tiny / "blue_train.npz")}]
    Path("other.yaml").write_text(yaml.safe_dump(fields))
    result = run("landscape", "segment", f"run:{solved}", "base", "--recipe", "other.yaml")
    assert result.exit_code == 2
    assert "not the one of this pool" in result.stderr or "which this pool lacks" in result.stderr


def test_interrupted_plane_writes_nothing(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mergesolve.solvers.landscape as module

    seen = []
    losses = module.Slice.losses

    def stop(self: Any, *x: float) -> Any:
        seen.append(x)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return losses(self, *x)

    monkeypatch.setattr(module.Slice, "losses", stop)
    recipe = ("--recipe", tiny / "recipe.yaml")
    result = run("landscape", "plane", "base", "expert:blue", "expert:red", *recipe, "--out", "out")
    assert result.exit_code == 130
    assert not Path("out").exists()
