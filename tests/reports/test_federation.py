"""The figures of federated runs, from synthetic traces."""

from __future__ import annotations

import itertools
import re

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mergesolve.reports import RunError, read_federated_run, read_study, save_federation
from mergesolve.reports.federation import (
    _Name,
    _place,
    accuracy,
    apart,
    coefficients,
    constraint,
    cosines,
    cost,
    frontier,
    looks,
    sweep,
)
from PIL import Image

NAMES = ("dots", "gratings", "digits", "letters", "shapes", "glyphs", "textures", "flags", "waves")
CONSTRAINED = tuple({"name": "retention", "retention": {"bound": bound}} for bound in (0.05, 0.1))
SCALED = tuple({"name": "task-arithmetic", "scale": scale} for scale in (0.1, 0.3))


def texts(path):
    """Texts of an SVG."""
    return re.findall(r">([^<>\n]+)</text>", path.read_text())


def drawn(path):
    image = np.asarray(Image.open(path).convert("L"))
    return image.min() < 128 and image.max() == 255


def test_every_figure_of_a_study_is_written(write_study, tmp_path):
    study = read_study(write_study(steps=(*SCALED, *CONSTRAINED), seeds=(0, 1), rounds=3))
    written = save_federation(study, tmp_path / "figures")
    assert {path.name for path in written} == {
        "accuracy.png", "frontier.png", "cost.png", "coefficients.png", "constraint.png",
        "sweep-task-arithmetic-0.1-scale.png", "sweep-retention-0.05-retention.bound.png",
        *(f"cosines-{step}.png" for step in study.steps),
    }  # fmt: skip
    assert all(drawn(path) for path in written)


def test_a_study_of_many_steps_names_each_in_the_accuracies(write_study, tmp_path):
    study = read_study(write_study(rounds=4))
    found = texts(accuracy(study, tmp_path / "a.svg"))
    assert len(study.steps) == 15
    assert all(found.count(name) == 2 for name in (*study.steps, "zero-shot"))


def test_the_frontier_names_steps_bounds_and_the_start(write_study, tmp_path):
    found = texts(frontier(read_study(write_study(rounds=4)), tmp_path / "f.svg"))
    assert {"zero-shot", "average", "fw-hard", "retention", "ε = 0.02", "ε = 0.3", "task-arithmetic-0.2"} <= set(found)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": SCALED[:1], "seeds": (0,), "rounds": 1},
        {"steps": CONSTRAINED[:1], "seeds": (0,), "rounds": 1, "clients": ("one",)},
        {"steps": CONSTRAINED[:1], "seeds": (0,), "rounds": 3, "planned": 6, "rejected": {1: NAMES[:3], 3: NAMES[1:]}},
        {"steps": (SCALED[0], CONSTRAINED[0]), "seeds": (0, 1), "rounds": 2, "reference": False},
        {"steps": CONSTRAINED[:1], "seeds": (0,), "rounds": 2, "clients": [f"client{k}" for k in range(23)]},
        {"steps": SCALED, "seeds": (0,), "rounds": 0, "planned": 3},
    ],
)
def test_small_and_incomplete_studies_are_drawn(write_study, tmp_path, options):
    study = read_study(write_study(**options))
    written = save_federation(study, tmp_path / "figures")
    assert bool(written) == bool(options["rounds"])
    assert all(drawn(path) for path in written)
    assert ("frontier.png" in {path.name for path in written}) == (bool(written) and options.get("reference", True))


def test_the_same_study_gives_the_same_bytes_and_leaves_matplotlib_alone(write_study, tmp_path):
    study = read_study(write_study(steps=(*SCALED, *CONSTRAINED), seeds=(0,), rounds=2))
    before = dict(mpl.rcParams)
    one, two = frontier(study, tmp_path / "one.svg"), frontier(study, tmp_path / "two.svg")
    assert one.read_bytes() == two.read_bytes()
    assert dict(mpl.rcParams) == before


def test_cosines_are_those_of_the_first_and_the_last_round_with_their_own_clients(write_federated, tmp_path):
    run = read_federated_run(write_federated(tmp_path / "run", rounds=3, rejected={1: ["dots", "waves"]}))
    found = texts(cosines(run, tmp_path / "c.svg"))
    assert any(text.startswith("round 1,") for text in found)
    assert any(text.startswith("round 3,") for text in found)
    assert (found.count("dots"), found.count("digits")) == (2, 4)  # on both axes of one picture, of both pictures
    matrix = run.cosines(2)[1]
    assert f"{matrix[0, 1]:.2f}".replace("-", "−") in found


def test_the_sweep_has_one_curve_a_value(write_study, tmp_path):
    study = read_study(write_study(steps=(*SCALED, *CONSTRAINED), seeds=(0,), rounds=2))
    assert {"λ = 0.1", "λ = 0.3"} <= set(texts(sweep(study, tmp_path / "s.svg")))


def test_coefficients_name_the_clients_and_the_origin(write_federated, tmp_path):
    run = read_federated_run(write_federated(tmp_path / "run", step=CONSTRAINED[0], rounds=3))
    found = texts(coefficients([run], tmp_path / "c.svg"))
    assert {*NAMES, "origin"} <= set(found)


def test_cost_states_seconds_and_bytes_of_each_step(write_study, tmp_path):
    found = texts(cost(read_study(write_study(steps=SCALED[:1], seeds=(0,), rounds=2)), tmp_path / "c.svg"))
    assert {"task-arithmetic-0.1", "0.34 s", "17.1 MB", "read", "other", "up"} <= set(found)


def test_what_there_is_nothing_to_draw_of_is_said(write_study, tmp_path):
    study = read_study(write_study(steps=SCALED[:1], seeds=(0,), rounds=2, reference=False, clients=("one",)))
    for draw, message in (
        (frontier, "no run has an accuracy on a reference set"),
        (sweep, "no two steps of one method differ in one number.*found task-arithmetic-0.1"),
        (constraint, "no step holds a bound on the reference loss"),
    ):
        with pytest.raises(RunError, match=message):
            draw(study, tmp_path / "x.png")
    with pytest.raises(RunError, match="no round accepted two clients"):
        cosines(study.runs["task-arithmetic-0.1"][0], tmp_path / "x.png")
    with pytest.raises(RunError, match="no run has coefficients"):
        coefficients([], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_steps_of_one_method_share_a_hue_and_no_two_steps_look_alike(write_study):
    found = looks(read_study(write_study(seeds=(0,), rounds=1)))
    assert len({(look.colour, look.line) for look in found.values()}) == 15
    hues = [mpl.colors.rgb_to_hsv(mpl.colors.to_rgb(found[f"retention-{e}"].colour))[0] for e in (0.02, 0.05, 0.1, 0.3)]
    assert np.ptp(hues) < 0.02


def test_names_are_moved_apart_as_little_as_can_be():
    rng = np.random.default_rng(0)
    for _ in range(40):
        values, gap = rng.random(6) * rng.random(), 0.02 + 0.16 * rng.random()
        placed = apart(values, gap, 0.0, 1.0)
        order = np.argsort(values, kind="stable")
        assert (np.diff(placed[order]) >= gap - 1e-9).all()
        assert placed.min() >= -1e-9
        assert placed.max() <= 1 + 1e-9
        for _ in range(60):  # no feasible point is nearer
            other = np.sort(rng.random(6) * (1 - 5 * gap))[np.argsort(order)] + gap * np.argsort(order)
            assert ((placed - values) ** 2).sum() <= ((other - values) ** 2).sum() + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_names_in_a_crowd_cover_neither_names_nor_points(seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(18, 2)) * [1, 0.4]
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*points.T, "o", markersize=5)
    axes.margins(0.15)
    _place(figure, axes, [_Name(x, y, f"a-step-{k}", "#332288", 7.5) for k, (x, y) in enumerate(points)], [points[:3]])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) >= 15
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    dots = axes.transData.transform(points)
    assert not any(box.contains(x, y) for box in boxes for x, y in dots)
