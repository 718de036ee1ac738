import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from mergesolve.reports.landscape import (
    barriers_figure,
    barriers_table,
    chain_figure,
    check_figure,
    check_tables,
    features_figure,
    features_table,
    plane_figure,
    plane_table,
    save_landscape,
    segment_figure,
    segment_tables,
    swap_figure,
    swap_table,
)
from mergesolve.solvers.landscape import FeatureConnectivity, Plane, Segment, Swap
from mergesolve.solvers.readiness import ExpertCheck, PoolCheck
from rich.console import Console
from rich.table import Table


def printed(what: object) -> str:
    console = Console(width=250, file=io.StringIO(), record=True)
    console.print(what)
    return console.export_text()


def hump(height: float = 1.0, tasks: int = 2, measured: bool = False, length: float = 3.0) -> Segment:
    steps = np.linspace(0, 1, 11)
    values = 1 + steps + 4 * height * steps * (1 - steps)
    by_task = {f"task{k}": values + 0.1 * (k - (tasks - 1) / 2) for k in range(tasks)}
    accuracies = {"task0": 0.5 + 0.1 * steps} if measured else {}
    return Segment(steps, values, by_task, accuracies, length)


def bowl(tasks: int = 2, top: float = 9.0) -> Plane:
    x, y = np.linspace(-1, 3, 9), np.linspace(-1, 2, 7)
    values = (x[None] - 1) ** 2 + (y[:, None] - 0.5) ** 2
    values[0, 0] = top
    path = np.array([[0.0, 0.0, 0.0], [0.5, 0.2, 0.1], [1.0, 0.5, 2.0]])
    return Plane(
        x,
        y,
        values,
        {f"task{k}": values + k for k in range(tasks)},
        np.array([[0.0, 0], [2, 0], [1, 1]]),
        {"run": path},
    )


def swapped() -> Swap:
    rng = np.random.default_rng(0)
    parts = {"ends": np.array([1.0, 2.0]), **{k: 1 + rng.random((2, 3)) for k in ("swapped", "halfway", "together")}}
    tasks = {name: {key: value + k for key, value in parts.items()} for k, name in enumerate(("left", "right"))}
    return Swap(("stem", "block", "head"), parts["ends"], parts["swapped"], parts["halfway"], parts["together"], tasks)


def checked(measured: bool = True) -> PoolCheck:
    experts = [ExpertCheck(f"e{i}", 2.0, 0.1, 1.0 + 0.02 * i, 0.99, "e0", 0.1, 2.0) for i in range(3)]
    experts.append(ExpertCheck("odd", 20.0, 1.0, 10.0, 0.3, "e0", 0.0, 20.0))
    experts[-1].judge("no-go", "a stranger [really]")
    if measured:
        for k, one in enumerate(experts):
            one.loss, one.barrier, one.relative_barrier, one.barrier_at, one.influence = 1.0, 0.1 * k, 0.1 * k, 0.5, 0.0
            one.best_gain = ("task", 0.5)
    return PoolCheck(experts, ("e0", "e1", "e2"), 20.0, 21.0, ("e0", "odd"), {"all": 400.0, "kept": 3.0}, "no-go")


def texts(figure: Figure) -> str:
    parts = [text.get_text() for ax in figure.axes for text in [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]]
    return "\n".join(parts)


def test_segment_names_ends_and_tells_the_barrier_where_there_is_one() -> None:
    assert "barrier 1.000 at t = 0.50" in texts(segment_figure(hump(), "here", "there"))
    found = texts(segment_figure(hump(-0.5, measured=True), "here", "there"))
    assert "no barrier" in found
    assert "here" in found
    assert "top-1 (%)" in found
    assert "barrier 1 at t = 0.50" in printed(segment_tables(hump(), "here", "there")[0])
    assert "top-1 task0" in printed(segment_tables(hump(measured=True), "here", "there")[1])


def test_plane_has_a_panel_a_task_and_says_what_lies_off_it() -> None:
    one, many = plane_figure(bowl(), ["a", "b", "c"]), plane_figure(bowl(), ["a", "b", "c"], by_task=True)
    assert len([ax for ax in many.axes if ax.get_title()]) == 3
    assert "run (2 off the plane)" in texts(one)
    assert "lowest of the grid, loss 0.0" in printed(plane_table(bowl(), ["a", "b", "c"]))


@pytest.mark.parametrize("values", [np.zeros((7, 9)), np.full((7, 9), np.nan), np.where(np.eye(7, 9) > 0, np.inf, 1.0)])
def test_plane_of_a_flat_or_broken_loss_is_drawn(values: np.ndarray, tmp_path: Path) -> None:
    found = bowl(0)
    flat = Plane(found.x, found.y, values, {}, found.points, {})
    assert all(path.exists() for path in save_landscape(lambda: plane_figure(flat, ["a", "b", "c"]), tmp_path, "p"))


def test_swap_shows_both_directions_by_layer_and_task() -> None:
    figure = swap_figure(swapped(), "first", "second")
    assert "first with a layer of second" in texts(figure)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["stem", "block", "head"]
    assert f"{swapped().change[0, 0]:+.4f}" in printed(swap_table(swapped(), "first", "second"))


def test_barriers_are_above_and_below_the_diagonal_and_in_the_table() -> None:
    found = {("a", "b"): hump(1.0), ("a", "c"): hump(0.0), ("b", "c"): hump(-0.5)}
    written = texts(barriers_figure(found, ["a", "b", "c"]))
    assert "1.00" in written
    assert "−0.50" in written
    assert "1.0000" in printed(barriers_table(found))
    assert "largest barrier 1.000, a to b" in texts(chain_figure(found, "run"))


def test_features_and_checks_are_drawn_and_printed(tmp_path: Path) -> None:
    found = {"left": [FeatureConnectivity(0.99, 1.1, 0.1, (0.9, 0.8))] * 3}
    assert "cosine of merged features" in texts(features_figure([0.25, 0.5, 0.75], found, "a", "b"))
    assert "0.9900" in printed(features_table([0.25, 0.5, 0.75], found))
    for measured in (True, False):
        assert "odd" in texts(check_figure(checked(measured)))
        parts = check_tables(checked(measured))
        assert any(isinstance(part, Table) for part in parts)
        assert "no-go: a stranger [really]" in "\n".join(printed(part) for part in parts)


def test_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    first = save_landscape(lambda: plane_figure(bowl(), ["a", "b", "c"]), tmp_path / "one", "plane")
    second = save_landscape(lambda: plane_figure(bowl(), ["a", "b", "c"]), tmp_path / "two", "plane")
    assert [path.name for path in first] == ["plane.png", "plane.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
