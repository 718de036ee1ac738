import numpy as np
import pytest
from mergesolve.reports.pareto import front_figure, save_front
from mergesolve.solvers import Front


def front(tasks, count=6, predicted=False):
    rng = np.random.default_rng(tasks)
    losses = rng.uniform(size=(count, tasks))
    records = [{"name": f"p{k}", "status": "optimal", "gap": 0.0, "nit": 1} for k in range(count)]
    names = tuple(f"task{t}" for t in range(tasks))
    preferences = rng.dirichlet(np.ones(tasks), size=count)
    found = Front(
        names, ("a",), preferences, losses, np.zeros((count, 1, 1)), records, losses.min(0), np.ones(tasks), 0.5
    )
    found.predicted = losses + 0.01 if predicted else None
    return found


@pytest.mark.parametrize(("tasks", "panels"), [(2, 1), (3, 3), (5, 1)])
@pytest.mark.parametrize("predicted", [False, True])
def test_every_point_is_drawn_in_every_panel(tasks, panels, predicted):
    drawn = front(tasks, predicted=predicted)
    figure = front_figure(drawn)
    assert len(figure.axes) == panels
    for ax in figure.axes:
        if tasks > 3:
            assert sum(len(line.get_xdata()) == tasks for line in ax.lines) == 6
            continue
        points = [line for line in ax.lines if line.get_marker() == "o"]
        assert sum(len(line.get_xdata()) for line in points) == 6
        assert sum(line.get_marker() == "D" for line in ax.lines) == int(predicted)


def test_files_are_the_same_for_the_same_front(tmp_path):
    one, other = (save_front(front(2), tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
    with pytest.raises(ValueError, match="nothing to draw"):
        front_figure(front(1))
