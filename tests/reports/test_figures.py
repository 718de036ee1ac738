from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
import pytest
from mergesolve.reports import FIGURES, Palette, cosines, read_run, save_figure, save_figures
from mergesolve.reports.figures import _spread, applies, shorten
from PIL import Image

MANY = [f"a_long_name_of_a_task_{k:02d}_with_noise" for k in range(27)]


@pytest.fixture
def runs(write_run):
    return [
        read_run(write_run("hull", iterations=8)),
        read_run(write_run("free", domain="free", iterations=60, vertices=False, estimate=True)),
        read_run(write_run("point", iterations=1, vertices=False)),
        read_run(write_run("going", iterations=3, finished=False, tail='{"iter')),
        read_run(write_run("many", experts=MANY, layers=[f"layer{k}" for k in range(70)])),
    ]


def svg(path):
    return path.with_suffix(".svg").read_text()


def test_every_figure_of_every_kind_of_run_is_written_in_both_formats(runs, tmp_path):
    for number in (1, len(runs)):
        written = save_figures(runs[:number], tmp_path / f"{number}")
        assert {path.name for path in written} == {f"{name}.{form}" for name in FIGURES for form in ("png", "svg")}
        for path in written:
            if path.suffix == ".png":
                image = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("L"))
                assert image.min() < 128  # something dark was drawn on the white
                assert image.max() == 255


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    first = {path.name: path.read_bytes() for path in save_figures(runs[:1], tmp_path / "one")}
    second = {path.name: path.read_bytes() for path in save_figures(runs[:1], tmp_path / "two")}
    assert first == second


def test_drawing_leaves_matplotlibs_settings_alone(runs, tmp_path):
    before = dict(mpl.rcParams)
    save_figures(runs[:1], tmp_path)
    assert dict(mpl.rcParams) == before


def test_no_half_figure_is_left_where_the_folder_cannot_be_written(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        save_figures(runs[:1], tmp_path / "file")


def test_an_expert_has_one_colour_in_all_runs(write_run):
    one = read_run(write_run("one", experts=("a", "b", "c")))
    two = read_run(write_run("two", experts=("c", "d", "a"), seed=3))
    palette = Palette.of([one, two])
    assert len({palette[name] for name in "abcd"}) == 4
    assert Palette.of([one, two]).colours == palette.colours


def test_only_the_heaviest_experts_are_coloured_the_rest_is_grey(runs):
    palette = Palette.of([runs[-1]])
    weights = np.abs(runs[-1].trajectory()[1]).mean(axis=(0, 1)) + np.abs(runs[-1].final).mean(axis=0)
    heaviest = {MANY[i] for i in np.argsort(-weights)[: len(palette.colours)]}
    assert set(palette.colours) == heaviest
    assert len({palette[name] for name in MANY if name not in heaviest}) == 1


def test_a_minibatch_gap_is_called_an_estimate_and_a_free_domain_has_none(runs, tmp_path):
    save_figures([runs[0]], tmp_path / "hull")
    save_figures([runs[1]], tmp_path / "free")
    exact, estimated = svg(tmp_path / "hull" / "convergence"), svg(tmp_path / "free" / "convergence")
    assert ">gap<" in exact
    assert "estimated on minibatches" not in exact
    assert ">stationarity (the free domain has no gap)<" in estimated
    assert ">estimated on minibatches<" in estimated


def test_a_run_without_vertices_has_no_vertex_figure(runs, tmp_path):
    assert applies("vertices", runs[:1])
    assert not applies("vertices", [runs[1]])
    assert "vertices.png" not in {path.name for path in save_figures([runs[1]], tmp_path)}


def test_the_base_is_named_where_it_has_a_share(runs, tmp_path):
    save_figures(runs[:1], tmp_path)
    assert ">base<" in svg(tmp_path / "trajectories")


def test_heatmap_names_every_expert_and_layer(write_run, tmp_path):
    save_figures([read_run(write_run(experts=("left", "right"), layers=("top", "bottom")))], tmp_path)
    text = svg(tmp_path / "heatmap")
    assert all(f">{name}<" in text for name in ("left", "right", "top", "bottom"))


def test_a_run_that_died_before_its_first_record_is_drawn_as_empty(write_run, tmp_path):
    run = read_run(write_run(iterations=0, finished=False))
    assert save_figures([run], tmp_path) == []


@pytest.mark.parametrize("count", [2, 5, 30])
def test_cosine_matrix_flags_names(count, tmp_path):
    rng = np.random.default_rng(0)
    matrix = np.corrcoef(rng.normal(size=(count, 50)))
    matrix[0, 1] = matrix[1, 0] = np.nan
    names = [f"expert{k}" for k in range(count)]
    [png] = save_figure(lambda: cosines(matrix, names, flagged={"expert1": "stranger"}), tmp_path / "cos", ("png",))
    pixels = np.asarray(Image.open(png).convert("RGB")).astype(int)
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 100) & (pixels[..., 2] < 90)
    assert red.any()


def test_spread_labels_keep_their_order_distance_and_limits():
    rng = np.random.default_rng(1)
    for _ in range(50):
        values = rng.random(6) * rng.random()
        placed = _spread(values, 0.1, 0.0, 1.0)
        order = np.argsort(values, kind="stable")
        assert (np.diff(placed[order]) >= 0.1 - 1e-3).all()
        assert placed.min() >= -1e-9
        assert placed.max() <= 1 + 1e-9


def test_shortened_names_keep_both_ends():
    assert shorten("short") == "short"
    assert shorten("abcdefghij", 7) == "abc…hij"
    assert len(shorten("x" * 99)) == 24
