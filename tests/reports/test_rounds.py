"""Federated runs and studies read back, and the tables made of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mergesolve.reports import (
    RunError,
    accuracy_table,
    cost_table,
    dominance,
    dominance_table,
    read_federated_run,
    read_study,
)
from rich.console import Console

FEW = ({"name": "average"}, {"name": "paint", "alpha": 0.05}, {"name": "retention", "retention": {"bound": 0.1}})


def edit(folder, change):
    """Pass every record of a trace through `change`."""
    path = folder / "rounds.jsonl"
    header, *records = [json.loads(line) for line in path.read_text().split("\n") if line]
    lines = [header, *(change(record) for record in records)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def at(folder, points):
    """Set the last client mean and reference of runs: {"STEP/seed-S": (mean, reference)}."""
    for name, (mean, reference) in points.items():
        edit(folder / name, lambda record, m=mean, r=reference: {**record, "mean": m, "reference": r})
    return read_study(folder)


def printed(grid):
    console = Console(width=400, record=True)
    console.print(grid.rich())
    return console.export_text()


def test_a_run_is_read_completely(write_federated, tmp_path):
    run = read_federated_run(write_federated(tmp_path / "run", step=FEW[2], seed=4, rounds=3, rejected={2: ["dots"]}))
    assert (run.step, run.method, run.options, run.seed) == ("retention", "retention", {"retention.bound": 0.1}, 4)
    assert not run.fixed
    assert run.finished
    np.testing.assert_array_equal(run.rounds, [1, 2, 3])
    np.testing.assert_array_equal(run.series("method", "bound"), [0.1] * 3)
    np.testing.assert_array_equal(np.isnan(run.series("coefficients", "dots")), [False, True, False])
    assert np.isnan(run.series("accuracy", "no such task")).all()
    for index, count in enumerate((9, 8, 9)):
        names, matrix = run.cosines(index)
        assert len(names) == count
        np.testing.assert_allclose(np.diag(matrix), 1)


@pytest.mark.parametrize("tail", ['{"round": 4, "mea', "{", '{"round": 4, "cosines": [[1.0, '])
def test_a_last_line_cut_by_a_kill_is_ignored(write_federated, tmp_path, tail):
    run = read_federated_run(write_federated(tmp_path / "run", rounds=3, planned=5, tail=tail))
    assert len(run.records) == 3
    assert not run.finished


def test_a_round_that_a_resumed_server_ran_again_counts_once(write_federated, tmp_path):
    folder = write_federated(tmp_path / "run", rounds=3)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({"round": 2, "mean": 77.0}) + "\n")
    run = read_federated_run(folder)
    np.testing.assert_array_equal(run.rounds, [1, 2, 3])
    assert run.series("mean")[1] == 77


def test_an_attempt_that_was_repeated_is_counted_and_is_no_round(write_federated, tmp_path):
    folder = write_federated(tmp_path / "run", rounds=2, planned=3)
    with (folder / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({"round": 3, "attempt": 1, "repeat": True, "mean": None}) + "\n")
    run = read_federated_run(folder)
    assert (len(run.records), run.repeats, run.finished) == (2, 1, False)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f.unlink(), r"holds no rounds\.jsonl.*mergesolve federate"),
        (lambda f: f.write_text(""), "is empty, the run died before its start"),
        (lambda f: f.write_text('{"round": 1}\n'), "first line is not a header"),
        (lambda f: f.write_text('{"schema": 99}\n'), "schema 99, this version reads 1"),
        (lambda f: f.write_text('{"schema": 1, "clients": [], "tasks": 3}\n'), "lacks 'tasks' .a list., found 3"),
        (
            lambda f: f.write_text(f.read_text() + '{"mean": 3}\n'),
            r"line 4: a record without 'round', found \['mean'\]",
        ),
        (lambda f: f.write_text(f.read_text().replace('{"round": 1', '{"rou', 1)), r"rounds\.jsonl, line 2: cannot"),
    ],
)
def test_a_folder_that_is_no_federated_run_is_refused_with_the_place(write_federated, tmp_path, spoil, message):
    folder = write_federated(tmp_path / "run", rounds=2)
    spoil(folder / "rounds.jsonl")
    with pytest.raises(RunError, match=message):
        read_federated_run(folder)


def test_cosines_that_do_not_fit_the_accepted_clients_are_refused(write_federated, tmp_path):
    folder = write_federated(tmp_path / "run", rounds=2)
    edit(folder, lambda record: {**record, "accepted": record["accepted"][:4]})
    with pytest.raises(RunError, match="round 1: cosines of 9 rows for 4 accepted clients"):
        read_federated_run(folder).cosines(0)


def test_a_study_keeps_the_order_of_its_plan_and_names_what_has_not_started(write_study, write_federated):
    folder = write_study(steps=FEW, seeds=(0, 1), rounds=2)
    (folder / "average" / "seed-1" / "rounds.jsonl").unlink()
    write_federated(folder / "added" / "seed-7", rounds=2)
    study = read_study(folder)
    assert study.steps == ("average", "paint-0.05", "retention-0.1", "added")
    assert study.missing == (("average", 1),)
    assert study.seeds == (0, 1, 7)
    assert [run.seed for run in study.runs["paint-0.05"]] == [0, 1]
    assert [study.fixed(step) for step in study.steps] == [True, True, False, True]


def test_seeds_of_different_length_are_aligned_by_round(write_study, write_federated):
    folder = write_study(steps=FEW[:1], seeds=(0,), rounds=2, planned=3)
    write_federated(folder / "average" / "seed-1", seed=1, rounds=3)
    rounds, values = read_study(folder).series("average", "mean")
    np.testing.assert_array_equal(rounds, [1, 2, 3])
    np.testing.assert_array_equal(np.isnan(values), [[False, False, True], [False] * 3])


def test_a_sweep_is_the_steps_of_a_method_that_differ_in_one_number(write_study):
    steps = [{"name": "ta", "scale": s, "density": d} for s, d in ((0.3, 1.0), (0.1, 1.0), (0.2, 0.5), (0.2, 1.0))]
    sweeps = read_study(write_study(steps=steps, seeds=(0,), rounds=1)).sweeps()
    assert [(sweep.option, sweep.values) for sweep in sweeps] == [("scale", (0.1, 0.2, 0.3)), ("density", (0.5, 1.0))]
    assert sweeps[0].steps == ("ta-0.1-1.0", "ta-0.2-1.0", "ta-0.3-1.0")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "study.json").write_text("{"), r"study\.json: not JSON"),
        (lambda f: (f / "study.json").write_text("[1]"), "expected a JSON object, found list"),
        (
            lambda f: (f / "average" / "seed-0").rename(f / "average" / "seed-x"),
            "expected a folder name such as seed-0",
        ),
        (lambda f: (f / "average" / "seed-0" / "rounds.jsonl").unlink(), "no run has started"),
    ],
)
def test_a_folder_that_is_no_study_is_refused(write_study, spoil, message):
    folder = write_study(steps=FEW[:1], seeds=(0,), rounds=1)
    spoil(folder)
    with pytest.raises(RunError, match=message):
        read_study(folder)
    with pytest.raises(RunError, match="there is no such folder"):
        read_study(folder / "nothing")


def test_the_accuracy_table_has_mean_and_sample_deviation_over_seeds(write_study):
    folder = write_study(steps=FEW, seeds=(0, 1, 2), rounds=2)
    study = at(folder, {f"average/seed-{s}": (50 + 2 * s, 70) for s in range(3)})
    rows = {row[0]: row for row in accuracy_table(study).rows}
    assert list(rows) == ["zero-shot", *study.steps]
    assert rows["average"][-2:] == ("52.0 ± 2.0", "70.0 ± 0.0")
    first = [run.records[-1]["accuracy"]["dots"] for run in study.runs["retention-0.1"]]
    assert rows["retention-0.1"][1] == f"{np.mean(first):.1f}"
    assert rows["zero-shot"][1:3] == ("40.0", "42.0")


def test_best_and_second_are_marked_and_zero_shot_is_not_ranked(write_study):
    folder = write_study(steps=FEW, seeds=(0,), rounds=1)
    study = at(folder, {f"{s}/seed-0": p for s, p in zip(("average", "paint-0.05", "retention-0.1"),
                                                         ((50, 71), (60, 71), (55, 70)), strict=True)})  # fmt: skip
    text = accuracy_table(study).markdown()
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert lines["zero-shot"].endswith("| 48.0 | 90.0 |")
    assert lines["average"].endswith("| 50.0 | **71.0** |")
    assert lines["paint-0.05"].endswith("| **60.0** | **71.0** |")
    assert lines["retention-0.1"].endswith("| *55.0* | *70.0* |")
    assert all(name in printed(accuracy_table(study)) for name in ("zero-shot", "retention-0.1", "client mean"))


def test_an_unfinished_run_and_a_missing_reference_show_in_the_table(write_study):
    study = read_study(write_study(steps=FEW[:1], seeds=(0,), rounds=2, planned=5, reference=False))
    row = accuracy_table(study).rows[1]
    assert row[0] == "average (round 2 of 5)"
    assert row[-1] == "–"


def test_the_cost_table_has_means_a_round_and_the_peak_over_all(write_study):
    folder = write_study(steps=FEW[:1], seeds=(0, 1), rounds=2)
    edit(folder / "average/seed-1", lambda record: {
        **record, "seconds": {"read": 0.5, "server": 12.0}, "bytes": {"down": 1e6, "up": 3e6}, "peak_memory": 7e9,
    })  # fmt: skip
    edit(folder / "average/seed-0", lambda record: {
        **record, "seconds": {"read": 1.5, "server": 14.0}, "bytes": {"down": 1e6, "up": 1e6}, "peak_memory": 2e9,
    })  # fmt: skip
    grid = cost_table(read_study(folder))
    assert dict(zip(grid.header, grid.rows[0], strict=True)) == {
        "step": "average", "read": "1", "server": "13", "evaluate": "–", "clients": "–", "peak memory": "7.0 GB",
        "down": "1.0 MB", "up": "2.0 MB",
    }  # fmt: skip


def test_a_step_dominates_only_if_it_does_so_in_every_seed(write_study):
    folder = write_study(steps=FEW, seeds=(0, 1), rounds=1)
    study = at(folder, {
        "average/seed-0": (50, 70), "average/seed-1": (52, 70), "paint-0.05/seed-0": (47, 76),
        "paint-0.05/seed-1": (48, 77), "retention-0.1/seed-0": (56, 87), "retention-0.1/seed-1": (55, 77),
    })  # fmt: skip
    [standing] = dominance(study)
    assert standing.dominates  # equal on one axis and better on the other is enough
    assert (standing.mean_margin, standing.reference_margin, standing.seeds) == (3, 0, 2)
    study = at(folder, {"retention-0.1/seed-1": (55, 76.9)})
    [standing] = dominance(study)
    assert standing.beaten == ("average",)
    assert not standing.dominates
    row = dominance_table(study).rows[0]
    assert (row[1], row[2], row[-1]) == ("no", "1 of 2", "paint-0.05")


def test_equal_points_do_not_dominate_each_other(write_study):
    folder = write_study(steps=(FEW[0], FEW[2]), seeds=(0,), rounds=1)
    study = at(folder, {"average/seed-0": (50, 70), "retention-0.1/seed-0": (50, 70)})
    assert not dominance(study)[0].dominates


def test_unfinished_runs_are_not_compared(write_study):
    study = read_study(write_study(steps=FEW, seeds=(0,), rounds=1, planned=2))
    assert dominance(study)[0].opponents == ()
    assert dominance_table(study).rows[0][1] == "–"
    assert "–" in printed(dominance_table(study))
