"""Runs aligned by what they took: against a lookup by hand on synthetic traces."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mergesolve.reports import RunError, read_run, read_runs
from mergesolve.reports.alignment import align, axis, default_marks, differences, figure, final


def rewrite(folder, header=None, records=None):
    """Change the header by a mapping and each record by a function."""
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    lines[0] |= header or {}
    if records:
        lines[1:] = [records(line) for line in lines[1:]]
    (folder / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def costly(write_run):
    """A run of six iterates, reached at samples 0, 100, 300, ..., 900, and one of ten at 0, 50, 60, ..., 130."""
    slow = rewrite(write_run("slow", iterations=6), records=lambda r: {**r, "samples": 100 + 200 * r["iteration"]})
    fast = rewrite(write_run("fast", iterations=10), records=lambda r: {**r, "samples": 50 + 10 * r["iteration"]})
    return read_runs([slow, fast])


def test_at_a_mark_a_run_shows_the_last_iterate_that_it_had_reached(costly):
    aligned = align(costly, "samples", [0, 49, 50, 99, 100, 299, 300, 900, 2000])
    found = [[(state.record["iteration"], state.ended) for state in line if state] for line in aligned.states]
    assert found == [
        [(0, False), (0, False)],
        [(0, False), (0, False)],
        [(0, False), (1, False)],
        [(0, False), (5, False)],
        [(1, False), (6, False)],
        [(1, False), (9, True)],
        [(2, False), (9, True)],
        [(5, False), (9, True)],
        [(5, True), (9, True)],
    ]


def test_nothing_is_known_of_a_killed_run_after_its_last_record(write_run):
    runs = [read_run(write_run("killed", finished=False, iterations=3)), read_run(write_run("whole", iterations=9))]
    line = align(runs, marks=[2, 3]).states
    assert line[0][0] is not None
    assert line[1][0] is None
    assert line[1][1] is not None


def test_default_marks_span_all_runs_without_repeats(costly):
    marks = default_marks(costly, "samples")
    assert (marks[0], marks[-1], len(marks)) == (0, 900, 10)
    assert default_marks(costly, "iteration", 4).tolist() == [0, 3, 6, 9]
    assert default_marks(costly[:1], "iteration", 50).tolist() == list(range(6))


def test_the_distance_is_the_root_mean_square_over_layers_and_ignores_the_order_of_experts(write_run):
    one = read_run(write_run("one", iterations=4))
    other = write_run("other", iterations=4, seed=3)
    plain = [line[1].distance for line in align([one, read_run(other)]).states]
    mine, theirs = one.trajectory()[1], read_run(other).trajectory()[1]
    np.testing.assert_allclose(plain, np.sqrt(((mine - theirs) ** 2).sum(axis=2).mean(axis=1)))
    order = [2, 0, 1]
    rewrite(
        other,
        {"experts": ["c", "a", "b"]},
        lambda r: {**r, "coefficients": [[line[i] for i in order] for line in r["coefficients"]]},
    )
    assert [line[1].distance for line in align([one, read_run(other)]).states] == pytest.approx(plain)


def test_other_layers_are_compared_by_their_mean_and_other_experts_not_at_all(write_run):
    one = read_run(write_run("one"))
    layers = read_run(write_run("layers", layers=("x", "y", "z"), seed=1))
    by_mean = align([one, layers])
    assert by_mean.distance == "mean"
    expected = np.linalg.norm(one.trajectory()[1].mean(axis=1) - layers.trajectory()[1].mean(axis=1), axis=1)
    np.testing.assert_allclose([line[1].distance for line in by_mean.states], expected)
    strangers = align([one, read_run(write_run("strangers", experts=("a", "b", "d")))])
    assert strangers.distance is None
    assert all(state.distance is None for line in strangers.states for state in line)


def test_an_axis_that_was_not_recorded_is_refused_with_those_that_were(costly, write_run):
    with pytest.raises(RunError, match=r"does not record gradients\. Align by iteration, seconds, samples"):
        align(costly, "gradients")
    with pytest.raises(RunError, match="no iteration yet"):
        axis(read_run(write_run("empty", iterations=0)), "iteration")


def test_what_does_not_compare_is_said(write_run):
    one, same = read_run(write_run("one")), read_run(write_run("same", seed=2))
    assert differences([one, same]) == []
    other = read_run(rewrite(write_run("other", domain="simplex"), {"objective": {"objective": "Entropy"}}))
    said = " ".join(differences([one, other]))
    assert "different objectives" in said
    assert "different domains" in said


def test_the_end_of_a_run_is_its_result_or_its_last_record(write_run):
    done, going = read_run(write_run("done", iterations=5)), read_run(write_run("going", iterations=5, finished=False))
    assert final(done)["status"] == "max_iter"
    assert final(going)["status"] == "running"
    assert final(going)["objective"] == going.records[-1]["value"]
    assert final(going)["iterations"] == 4


@pytest.mark.parametrize("by", ["iteration", "samples"])
def test_the_figure_draws_each_run_over_the_axis(by, costly):
    drawn = figure(costly, by)
    top, bottom = drawn.axes
    for line, run in zip(top.lines, costly, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), axis(run, by))
        np.testing.assert_array_equal(line.get_ydata(), run.series("value"))
    assert bottom.get_yscale() == "log"
    np.testing.assert_array_equal(bottom.lines[1].get_ydata(), costly[1].series("gap"))
